"""The table of bad inputs, item by item; and what no input at all may break."""
import ast
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert

from bad_inputs import BAD_PTH, READERS, TABLE, judge
from conftest import ROOT
from updetr.core.boxes import paired_iou
from updetr.core.photos import builtin_photos
from updetr.data.loader import BatchPlan, PatchTask, SelfDet, Views, collate, photo_loader
from updetr.data.patches import crop_patches, sample_boxes
from updetr.model.matcher import assign, match_cost

pytestmark = pytest.mark.filterwarnings('ignore')
quick = settings(max_examples=40, deadline=None)


@pytest.mark.parametrize('name', TABLE)
def test_bad_input(name, tmp_path):
    kind, _ = judge(name, tmp_path)
    assert kind in ('named_error', 'counted_skip')
    assert not (tmp_path / 'MADE').exists(), 'a pickle or a shell was run'


def test_the_table_is_large():
    tried = {name.split(':')[0] for name in TABLE}
    assert len(TABLE) >= 100 and tried >= {*READERS, 'index_photos', 'read_photo', 'open_dataset', 'check_dataset', 'make_config', 'run'}


def test_the_malicious_files_would_run(tmp_path, monkeypatch):
    """Read the careless way, each of these makes its folder: so that the test above is one."""
    monkeypatch.chdir(tmp_path)
    for kind in ('a pickle that runs os.mkdir', 'a pickle that runs eval', 'old format, runs os.mkdir', 'a Namespace that hides one'):
        torch.load(BAD_PTH[kind](tmp_path), weights_only=False)
        (tmp_path / 'MADE').rmdir()


CALLS = ('system', 'popen', 'eval', 'exec', 'bind', 'listen', 'serve_forever', 'HTTPServer', 'Unpickler')


def runs_or_listens(source):
    """Calls in a module that could hand text to a shell, run what a file holds, or open a port."""
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        text, name = ast.unparse(call), getattr(call.func, 'attr', getattr(call.func, 'id', ''))
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        plain = isinstance(call.func, ast.Name) or not text.startswith(('self.', 'task.', 'model.', 'module.'))
        if name in CALLS and plain and (name != 'eval' or isinstance(call.func, ast.Name)): yield text
        if options.get('shell', 'False') != 'False' or 'pickle.load' in text or 'yaml.load' in text: yield text
        if name == 'load' and text.startswith('torch.') and options.get('weights_only') != 'True': yield text
        if options.get('allow_pickle', 'False') != 'False': yield text
        if text.startswith('ElementTree.') and name in ('parse', 'fromstring') and len(call.args) < 2: yield text  # without our parser


def test_no_shell_no_pickle_no_port():
    """The package has no call that could; and such calls would be found."""
    for bad in ('os.system(x)', 'subprocess.run(x, shell=True)', 'eval(x)', 'torch.load(p)', 'pickle.loads(b)', 's.bind(a)',
                'np.load(p, allow_pickle=True)', 'ElementTree.parse(p)', 'torch.load(p, weights_only=False)'):
        assert list(runs_or_listens(bad)), bad
    found = {path.name: calls for path in (ROOT / 'updetr').rglob('*.py') if (calls := list(runs_or_listens(path.read_text())))}
    assert not found


# ---- for any numbers -----------------------------------------------------------------------------------------------

side = st.integers(17, 300)


@quick
@given(side, side, st.integers(1, 12), st.integers(0, 2**32), st.sampled_from(('uniform', 'range', 'mixed', 'regions')))
def test_patches_lie_in_the_photo(height, width, number, seed, law):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed % 1000))
    try: boxes = sample_boxes(np.random.default_rng(seed), height, width, number, law=law, photo=image)
    except ValueError as e:
        assert str(height) in str(e) or str(width) in str(e)
        return
    assert boxes.shape == (number, 4) and (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    patches = crop_patches(image, boxes, 16)
    assert patches.shape == (number, 3, 16, 16) and patches.dtype == torch.uint8 and patches.max() <= image.max()


coordinate = st.floats(0, 1, width=32)


@quick
@given(st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=8))
def test_boxes_come_back(rows):
    boxes = torch.tensor(rows)
    there = box_convert(boxes, 'cxcywh', 'xyxy')
    torch.testing.assert_close(box_convert(there, 'xyxy', 'cxcywh'), boxes, atol=1e-6, rtol=1e-5)
    assert (there[:, 2:] >= there[:, :2]).all()


@quick
@given(st.integers(1, 9), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 10**6))
def test_the_matcher_finds_the_cheapest_pairs(extra, counts, seed):
    """For any numbers of queries and targets: one query a target, none twice, and no dearer than scipy photo by photo."""
    g, T = torch.Generator().manual_seed(seed), max(max(counts), 1)
    N, B = T + extra, len(counts)
    predicted, boxes = torch.rand(1, B, N, 4, generator=g), torch.rand(B, T, 4, generator=g)
    cost = match_cost(torch.randn(1, B, N, 3, generator=g), predicted, torch.randint(0, 2, (B, T), generator=g), boxes)
    match = assign(cost, counts)[0]
    for b, n in enumerate(counts):
        mine = match[b, :n]
        assert (match[b, n:] == -1).all() and len(set(mine.tolist())) == n and (mine >= 0).all()
        rows, columns = linear_sum_assignment(cost[0, b, :, :n])
        assert cost[0, b, mine, torch.arange(n)].sum().item() == pytest.approx(cost[0, b].numpy()[rows, columns].sum(), abs=1e-4)


corner = st.integers(0, 12)
box = st.tuples(corner, corner, corner, corner)


@quick
@given(st.lists(st.tuples(box, box), min_size=1, max_size=8))
def test_iou_is_a_count_of_pixels(pairs):
    """Also of boxes without area, and of those whose corners are exchanged."""
    a, b = (torch.tensor([pair[k] for pair in pairs]) for k in (0, 1))

    def pixels(box): return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}
    counted = [len(pixels(a) & pixels(b)) / max(1, len(pixels(a) | pixels(b))) for a, b in pairs]
    assert paired_iou(a, b).tolist() == pytest.approx(counted, abs=1e-6) and torch.equal(paired_iou(a, b), paired_iou(b, a))


@quick
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5), st.integers(0, 1000))
def test_a_batch_loses_no_pixel_and_no_box(sizes, seed):
    """Photos of any sizes: each is found again in its corner, everything else is padding, and what belongs to it stays with it."""
    g, kinds = torch.Generator().manual_seed(seed), {'patches': (2, 3, 4, 4), 'factors': (2, 5), 'boxes': (2, 4), 'keep': (6,)}
    images = [torch.randint(1, 256, (3, h, w), dtype=torch.uint8, generator=g) for h, w in sizes]
    samples = [{'image': x, 'shape': x.shape[1:], 'patch_size': 4, 'index': 7 * i, 'skipped': [f'{i}'] * (i % 2),
                **{k: torch.rand(s, generator=g) for k, s in kinds.items()}} for i, x in enumerate(images)]
    for s in samples: s['patches'] = (255 * s['patches']).to(torch.uint8)
    batch = collate(samples)
    assert (batch['mask'] is None) == (len(set(sizes)) == 1) and batch['index'].tolist() == [7 * i for i in range(len(sizes))]
    assert batch['skipped'] == [f'{i}' for i in range(len(sizes)) if i % 2]
    hidden = torch.zeros(batch['images'][:, 0].shape, dtype=torch.bool) if batch['mask'] is None else batch['mask']
    for i, (image, (h, w)) in enumerate(zip(images, sizes)):
        assert torch.equal(batch['images'][i, :, :h, :w], image) and not hidden[i, :h, :w].any()
        assert hidden[i].sum() == hidden[i].numel() - h * w and batch['images'][i].sum() == image.sum()
        assert all(torch.equal(batch[k][i], samples[i][k]) for k in kinds)


# ---- the same numbers for any number of workers --------------------------------------------------------------------

@pytest.mark.parametrize('kind', [Views, SelfDet])
def test_batches_do_not_depend_on_workers(kind):
    paths, task = [p.path for p in builtin_photos('train')][:4], PatchTask(num_patches=2, num_queries=4, patch_size=32)
    data = Views(paths, task, 4) if kind is Views else SelfDet(paths, task)

    def batches(workers):
        torch.manual_seed(workers)  # nothing may depend on the process's own generator
        plan = BatchPlan(np.full((4, 2), 64), 2, 4, short_sides=(64, 80))
        return list(photo_loader(data, plan, workers))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        alone, others = batches(0), [batches(1), batches(3)]
    for other in others:
        for a, b in zip(alone, other, strict=True):
            assert all(torch.equal(a[k], b[k]) for k in ('images', 'patches', 'boxes', 'keep', 'factors', 'index'))
    assert collate is photo_loader(data, BatchPlan(np.full((4, 2), 64), 2, 4)).collate_fn.join.func
