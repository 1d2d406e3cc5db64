"""The table of bad inputs, item by item; and what no input at all may break."""
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert

from bad_inputs import BAD_PTH, READERS, TABLE, judge
from updetr.boxes import pad_images
from updetr.launch import torchrun_command
from updetr.loader import BatchPlan, PatchTask, SelfDet, Views, collate, photo_loader
from updetr.matcher import assign, match_cost
from updetr.patches import crop_patches, sample_boxes
from updetr.photos import builtin_photos

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


def test_processes_meet_on_loopback_and_no_shell_sees_parameters(tmp_path):
    words = torchrun_command(tmp_path / '$(touch MADE); x', 2)
    assert words[words.index('--local-addr') + 1] == '127.0.0.1' and '--standalone' in words
    assert str(tmp_path / '$(touch MADE); x' / 'cfg.json') in words  # one word, whatever is in it


# ---- for any numbers -----------------------------------------------------------------------------------------------

side = st.integers(17, 300)


@quick
@given(side, side, st.integers(1, 12), st.integers(0, 2**32), st.sampled_from(('uniform', 'range', 'mixed')))
def test_patches_lie_in_the_photo(height, width, number, seed, law):
    try: boxes = sample_boxes(np.random.default_rng(seed), height, width, number, law=law)
    except ValueError as e:
        assert str(height) in str(e) or str(width) in str(e)
        return
    assert boxes.shape == (number, 4) and (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed % 1000))
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


@quick
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5), st.integers(0, 1000))
def test_padding_loses_no_pixel(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    images = [torch.randint(1, 256, (3, h, w), dtype=torch.uint8, generator=g) for h, w in sizes]
    padded, mask = pad_images(images)
    for image, whole, hidden in zip(images, padded, mask):
        h, w = image.shape[1:]
        assert torch.equal(whole[:, :h, :w], image) and not hidden[:h, :w].any()
        assert hidden.sum() == hidden.numel() - h * w and whole.sum() == image.sum()


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
    assert collate is photo_loader(data, BatchPlan(np.full((4, 2), 64), 2, 4)).collate_fn
