"""Both stages of panoptic training: from the right start only, disturbed and whole, in two processes, as a segmenter;
and `nbs/panoptic.ipynb`."""
import argparse
import dataclasses
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT
from test_papermill import parameter_lines
from test_resume import as_in_the_processes, finish, kill_twice, weights  # noqa: F401 (a fixture: one thread here, too)
from test_task import rows
from tools.cells import run_cells, run_report
from tools.processes import in_processes
from updetr.core.checkpoint import load_checkpoint, save_checkpoint, write_json
from updetr.core.config import make_config, model_options
from updetr.core.fingerprint import mark_set
from updetr.experiments.results import finish as keep_result
from updetr.experiments.results import masks_result
from updetr.model.detr import build_detr
from updetr.model.updetr import build_updetr
from updetr.predict.commands import answers_of, evaluate_command, open_model, predict_command
from updetr.predict.detector import Detector
from updetr.predict.export import save_huggingface
from updetr.predict.segmenter import PanopticSegmenter, segments_by_name
from updetr.tasks import panoptic
from updetr.tasks.finetune import finetune_config
from updetr.tasks.finetune_task import FinetuneTask
from updetr.tasks.masks import DETRsegm
from updetr.tasks.panoptic import PanopticEvaluator, open_panoptic, write_panoptic
from updetr.tasks.panoptic_task import (
    PanopticConfig,
    PanopticTask,
    evaluate_panoptic,
    open_panoptic_sets,
    panoptic_config,
    start_kind,
)
from updetr.train.evaluate import classes_by_name
from updetr.train.loop import Processes, train

PANOPTIC = ROOT / 'nbs' / 'panoptic.ipynb'
SIZES = dict(hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2, num_queries=8)
CNN = dict(backbone='test_resnet', weights='none', features='layer3')
VIEWS = dict(scenes=0, scenes_val=0, val_size=64, square=64, cached_views=0, batch_size=4, log_every=1, save_every=7)
BOXES = SIZES | CNN | VIEWS | dict(epochs=20, eval_every=10, lr=3e-3)
MASKS = VIEWS | dict(epochs=8, eval_every=4, lr=3e-3, threshold=.3)


class Fields:
    """Photos of 64 x 64 px, bright above and dark below with noise on both, in COCO's form: a panoptic set that is learnt in seconds."""
    classes, isthing, category_ids = ['sun', 'sky', 'soil'], [True, False, False], [4, 70, 90]

    def __init__(self, num, seed):
        self.image_ids, self.sizes = list(range(5, 5 + num)), np.full((num, 2), 64)
        self.rng, self.borders = np.random.default_rng(seed), np.random.default_rng(seed).integers(24, 40, num)

    def panoptic(self, i):
        ids, border = torch.ones(64, 64, dtype=torch.int64), int(self.borders[i])
        ids[border:] = 2
        parts = (1, 0, border), (2, border, 64 - border)
        info = [{'id': k, 'category_id': k, 'area': 64 * h, 'bbox': [0, y, 64, h]} for k, y, h in parts]
        return ids, info

    def write(self, root, part):
        (root / part).mkdir(parents=True)
        (root / 'annotations').mkdir(exist_ok=True)
        write_panoptic(root / 'annotations' / f'panoptic_{part}.json', {k: self.panoptic(i) for i, k in enumerate(self.image_ids)}, self)
        for i, k in enumerate(self.image_ids):
            light = np.where(np.arange(64) < self.borders[i], 190, 60)[:, None, None] + self.rng.integers(-30, 30, (64, 64, 3))
            Image.fromarray(light.astype(np.uint8)).save(root / part / f'{k}.jpg')


@pytest.fixture(scope='module')
def fields(tmp_path_factory):
    root = tmp_path_factory.mktemp('fields')
    for seed, (part, num) in enumerate({'train': 12, 'val': 5}.items()): Fields(num, seed).write(root, part)
    return root


@pytest.fixture(scope='module', autouse=True)
def no_data_by_the_way():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('UPDETR_DATA', raising=False)
        yield


def make_run(folder, stage, data, **changes):
    folder.mkdir(parents=True)
    settings = (BOXES if stage == 'boxes' else MASKS) | {'data': str(data)} | changes
    write_json(folder / 'cfg.json', dataclasses.asdict(panoptic_config('demo', stage, **settings)))
    return folder


def measured(folder): return [r for r in rows(folder) if any(k.startswith('test_') for k in r)]


def logged(folder):
    """{(step, name): number}; what was done twice must agree."""
    seen = {}
    for row in rows(folder):
        for name, v in row.items():
            if name.startswith(('train_', 'test_')): assert seen.setdefault((row['step'], name), v) == v, f'{name} of step {row["step"]}'
    return seen


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='module')
def boxes(fields, tmp_path_factory):
    """A finished stage boxes."""
    finish(folder := make_run(tmp_path_factory.mktemp('boxes') / 'run', 'boxes', fields))
    return folder


@pytest.fixture(scope='module')
def masks(boxes, fields, tmp_path_factory):
    """The undisturbed stage masks on it."""
    finish(folder := make_run(tmp_path_factory.mktemp('masks') / 'run', 'masks', fields, pretrain=str(boxes / 'checkpoint.pth')))
    return folder


# ---- both stages ----------------------------------------------------------------------------------------------------

def test_boxes_are_of_things_and_stuff(boxes):
    state = load_checkpoint(boxes / 'checkpoint.pth')
    assert state['class_names'] == Fields.classes and len(state['model']['class_embed.bias']) == 4
    assert state['isthing'] == Fields.isthing and start_kind(boxes / 'checkpoint.pth') == 'boxes'
    assert [r['step'] for r in measured(boxes)] == [30, 60] and measured(boxes)[-1]['test_AP50'] > 20


def test_masks_train_the_head_and_nothing_else(boxes, masks):
    before, after = weights(boxes), weights(masks)
    assert same(before, {k.removeprefix('detr.'): v for k, v in after.items() if k.startswith('detr.')})
    assert len(after) == len(before) + 32 and len(load_checkpoint(masks / 'checkpoint.pth')['optimizer']['state']) == 32
    losses = [r['train_loss_mask'] + r['train_loss_dice'] for r in rows(masks) if 'train_loss' in r]
    assert losses[-1] < losses[0] and all(r['train_loss'] == pytest.approx(r['train_loss_mask'] + r['train_loss_dice'], rel=1e-4)
                                          for r in rows(masks) if 'train_loss' in r)
    assert [r['step'] for r in measured(masks)] == [12, 24] and 20 < measured(masks)[-1]['test_PQ'] < 100


class Stuff(Fields):
    """The same photos of a set that has no class of things."""
    classes, isthing, category_ids = ['sky', 'soil'], [False, False], [70, 90]

    def panoptic(self, i):
        ids, info = super().panoptic(i)
        return ids, [part | {'category_id': part['category_id'] - 1} for part in info]


def result_on(run, data, folder):
    """What a finished run of stage masks is worth on other photos."""
    shutil.copytree(run, folder)
    write_json(folder / 'cfg.json', json.loads((folder / 'cfg.json').read_text()) | {'data': str(data)})
    return masks_result(folder)


@pytest.mark.parametrize('crowd, shown', [(0, True), (1, False)], ids=['things', 'crowds alone'])
def test_a_result_has_ap_of_masks_where_things_are_shown(crowd, shown, masks, fields, tmp_path):
    shutil.copytree(fields, data := tmp_path / 'data')
    file = data / 'annotations' / 'panoptic_val.json'
    content = json.loads(file.read_text())
    for photo in content['annotations']: photo['segments_info'][0] |= {'category_id': Fields.category_ids[0], 'iscrowd': crowd}
    write_json(file, content)
    assert ('APseg' in result_on(masks, data, tmp_path / 'run')) == shown


def test_a_result_of_stuff_alone_lacks_the_numbers_of_things(masks, fields, tmp_path):
    """No photo shows a thing; or no class is one, from the training of boxes on. A null of an earlier result is no number either."""
    found = [result_on(masks, fields, tmp_path / 'no thing')]
    for part, num in {'train': 8, 'val': 4}.items(): Stuff(num, 1).write(tmp_path / 'data', part)
    finish(start := make_run(tmp_path / 'boxes', 'boxes', tmp_path / 'data', epochs=2, eval_every=2))
    finish(run := make_run(tmp_path / 'masks', 'masks', tmp_path / 'data', pretrain=str(start / 'checkpoint.pth'), epochs=1, eval_every=1))
    found.append(keep_result(run))
    write_json(run / 'result.json', found[1] | {'APseg': None})
    for result in (*found, keep_result(run)):
        assert {'PQ', 'PQst'} <= result.keys() and not {'PQth', 'APseg'} & result.keys()


def test_killed_twice_and_resumed_is_the_same_run(boxes, masks, fields, tmp_path, monkeypatch):
    """SIGKILL anywhere, also where the start is gone by then."""
    start = tmp_path / 'boxes.pth'
    start.write_bytes((boxes / 'checkpoint.pth').read_bytes())
    kill_twice(folder := make_run(tmp_path / 'run', 'masks', fields, pretrain=str(start)), range(3, 20))
    start.unlink()
    monkeypatch.setattr('updetr.tasks.panoptic_task.hand_over', None)
    finish(folder)
    assert logged(folder) == logged(masks) and same(weights(folder), weights(masks))


def test_stopped_while_measuring(boxes, masks, fields, tmp_path, monkeypatch):
    """SIGTERM between two batches of an evaluation: nothing of it is logged, and the resumed run begins with it."""
    folder, calls = make_run(tmp_path / 'run', 'masks', fields, pretrain=str(boxes / 'checkpoint.pth')), []
    with monkeypatch.context() as patch:
        def stopping(task, val_batches=evaluate_panoptic.__globals__['val_batches']):
            for batch in val_batches(task):
                calls.append(len(calls))
                if calls[-1] == 1: signal.raise_signal(signal.SIGTERM)
                yield batch
        patch.setitem(evaluate_panoptic.__globals__, 'val_batches', stopping)
        finish(folder)
    assert not measured(folder) and not (folder / 'done.json').exists()
    finish(folder)
    assert logged(folder) == logged(masks) and same(weights(folder), weights(masks))


@pytest.mark.parametrize('one_file', [False, True])
def test_an_evaluation_reads_each_png_once(one_file, boxes, fields, tmp_path, monkeypatch):
    "For the truth; views have no masks, whose pictures of numbers were read before. The set itself still has them, and its fingerprint."
    data = fields / 'annotations/panoptic_train.json' if one_file else fields
    cfg = panoptic_config('demo', 'masks', **MASKS | {'data': str(data), 'pretrain': str(boxes / 'checkpoint.pth'), 'batch_size': 1})
    task, read = PanopticTask(cfg, tmp_path, Processes()), []
    plain = panoptic.read_photo
    monkeypatch.setattr(panoptic, 'read_photo', lambda file, *a: read.append(file.name) or plain(file, *a))
    evaluate_panoptic(task, task.model)
    assert sorted(read) == sorted(f'{k}.png' for k in task.val_set.image_ids)
    assert 'masks' in task.val_set[0] and task.marks['val'] == mark_set(open_panoptic_sets(cfg)[1])


def shown_by_one_of(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder / "store"}', rank=rank, world_size=world)
    write_json(folder / f'{rank}.json', shown(folder, Processes(rank, world)))
    dist.destroy_process_group()


def shown(folder, processes):
    """Return what a run folder's task measures with the weights of its checkpoint."""
    task = PanopticTask(PanopticConfig(**json.loads((folder / 'cfg.json').read_text())), folder, processes)
    task.model.load_state_dict(weights(folder))
    return evaluate_panoptic(task, task.model).summary()


def test_two_processes_measure_what_one_measures(masks):
    """5 photos: one process gets one more than the other."""
    in_processes(shown_by_one_of, 2, masks)
    last = measured(masks)[-1]
    for rank in (0, 1):
        theirs = json.loads((masks / f'{rank}.json').read_text())
        assert {k: theirs[k] for k in ('PQ', 'SQ', 'RQ')} == pytest.approx({k: last[f'test_{k}'] for k in ('PQ', 'SQ', 'RQ')}, abs=.1)


def test_the_boxes_answer_as_the_run_measured(boxes, fields, tmp_path):
    """Pictures have the run's sizes, also after they went through a folder for sharing: AP is the last one of the log."""
    save_huggingface(Detector.from_checkpoint(boxes / 'checkpoint.pth'), tmp_path / 'hub')
    assert isinstance(open_model(boxes), Detector)
    for path in (boxes / 'checkpoint.pth', tmp_path / 'hub'):
        detector = Detector.from_checkpoint(path)
        assert (detector.square, detector.sizes.val, detector.cfg.stage) == (64, 64, 'boxes') and detector.category_ids == (4, 70, 90)
        ap, last = answers_of(detector, open_panoptic(fields, 'val')).summary(), measured(boxes)[-1]
        assert last['test_AP50'] > 20 and [ap['AP'], ap['AP50']] == pytest.approx([last['test_AP'], last['test_AP50']], abs=.01)


def test_the_detector_of_a_file_with_masks_is_the_one_of_its_first_stage(boxes, masks, tmp_path):
    """As the error says that names the option: stage masks has left every weight of it, and the sizes, as they were.
    Its model card does not tell of an AP and of epochs that are not the detector's."""
    with pytest.raises(ValueError, match='Give detector_part=True'): Detector.from_checkpoint(masks)
    part, whole = Detector.from_checkpoint(masks, detector_part=True), Detector.from_checkpoint(boxes)
    assert same(part.module.model.state_dict(), whole.module.model.state_dict())
    assert (part.classes, part.square, part.category_ids) == (whole.classes, 64, whole.category_ids)
    for name, detector in {'part': part, 'whole': whole}.items(): save_huggingface(detector, tmp_path / name)
    cards = [(tmp_path / name / 'README.md').read_text() for name in ('part', 'whole')]
    assert [('epochs' in card, 'AP ' in card.split('| measured |')[1]) for card in cards] == [(False, False), (True, True)]
    assert Detector.from_checkpoint(tmp_path / 'part').square == 64


def test_the_segmenter_answers_as_the_run_measured(masks, fields):
    """Photo by photo through the one-liner: the numbers that the run logged last."""
    segmenter, val = PanopticSegmenter.from_checkpoint(masks / 'checkpoint.pth'), open_panoptic(fields, 'val')
    evaluator = PanopticEvaluator(val.classes, val.isthing)
    for i in range(5): evaluator.update(i, val.panoptic(i), ((found := segmenter(val[i]['image'])).ids, found.info))
    last = measured(masks)[-1]
    for k, v in evaluator.summary().items(): assert v == pytest.approx(last.get(f'test_{k}', v), abs=.05, nan_ok=True), k
    assert segmenter.threshold == .3 and list(segmenter.classes) == val.classes and len(found.attention) == len(found)


def drawn(file, entry):
    """{segment: (category id, its pixels)} of one entry of a panoptic JSON, read from its PNG."""
    red, green, blue = np.moveaxis(np.asarray(Image.open(file.with_suffix('') / entry['file_name'])).astype(int), 2, 0)
    numbers = red + 256 * green + 256**2 * blue
    segments = {s['id']: (s['category_id'], numbers == s['id']) for s in entry['segments_info']}
    assert sum(m.sum() for _, m in segments.values()) == (numbers > 0).sum()  # the list says all that is drawn
    return segments


def plain_pq(truth, found):
    """{category id: (PQ, SQ, RQ)} of two files of COCO panoptic that have no crowds and no void: the definition, and nothing else."""
    content, said = (json.loads(f.read_text()) for f in (truth, found))
    answers = {row['image_id']: row for row in said['annotations']}
    assert answers.keys() == {row['image_id'] for row in content['annotations']}
    iou, right, wrong, missed = ({c['id']: 0. for c in content['categories']} for _ in range(4))
    for row in content['annotations']:
        theirs, ours, taken = drawn(truth, row), drawn(found, answers[row['image_id']]), set()
        for kind, mask in theirs.values():
            fits = {b: (mask & m).sum() / (mask | m).sum() for b, (k, m) in ours.items() if k == kind}
            hit = [b for b, v in fits.items() if v > .5]
            for b in hit: iou[kind] += fits[b]
            right[kind] += len(hit)
            missed[kind] += not hit
            taken.update(hit)
        for b, (kind, _) in ours.items(): wrong[kind] += b not in taken
    whole = {k: right[k] + wrong[k] / 2 + missed[k] / 2 for k in iou}
    return {k: (iou[k] / n, iou[k] / max(right[k], 1), right[k] / n) for k, n in whole.items() if n}


def test_a_whole_sets_files_judged_by_themselves_give_the_pq_of_the_log(masks, fields, tmp_path):
    """Panoptic results as COCO's JSON and PNGs: the set's own ids, and by an independent count the run's last numbers."""
    segmenter, val = PanopticSegmenter.from_checkpoint(masks / 'checkpoint.pth'), open_panoptic(fields, 'val')
    places = classes_by_name(segmenter.classes, val.classes)
    answers = ((k, segments_by_name(segmenter(val[i]['image']), places)) for i, k in enumerate(val.image_ids))
    write_panoptic(tmp_path / 'found.json', answers, val)
    judged, last = plain_pq(fields / 'annotations/panoptic_val.json', tmp_path / 'found.json'), measured(masks)[-1]
    assert judged.keys() == {70, 90}  # sky and soil by the file's own ids; the sun never shines
    mean = [100 * v for v in np.mean([*judged.values()], 0)]
    assert [last[f'test_{k}'] for k in ('PQ', 'SQ', 'RQ')] == pytest.approx(mean, abs=.01)
    said = segmenter(val[0]['image']).to_dict(5)
    assert {s['category_id'] for s in said['segments_info']} <= {70, 90} and said['image_id'] == 5


def test_the_command_line_draws_segments(masks, fields, tmp_path, capsys):
    """`predict` with a run's folder: pictures, a PNG of segments and a row a segment, as the segmenter itself answers."""
    predict_command([str(masks), str(fields / 'val'), '--out', str(tmp_path / 'found')])
    assert 'pictures/, segments/, answers.csv' in capsys.readouterr().out
    segmenter, found = PanopticSegmenter.from_checkpoint(masks), tmp_path / 'found'
    entries = json.loads((found / 'results.json').read_text())['annotations']
    lines = (found / 'answers.csv').read_text().splitlines()[1:]
    assert [e['image_id'] for e in entries] == sorted(file.name for file in (fields / 'val').iterdir())
    assert len(lines) == sum(len(e['segments_info']) for e in entries)
    for entry in entries:
        name = entry['image_id']
        answer = segmenter(fields / 'val' / name)
        red, green, blue = np.moveaxis(np.asarray(Image.open(found / 'segments' / entry['file_name'])).astype(int), 2, 0)
        assert np.array_equal(red + 256 * green + 256**2 * blue, answer.ids)
        assert [line.split(',')[:2] for line in lines if line.startswith(name)] == [[name, kind] for kind in answer.names]
        assert Image.open(found / 'pictures' / name).size[0] >= 64
    assert {line.split(',')[1] for line in lines} == {'sky', 'soil'}
    for words, why in ((['--nms', '.5'], 'segments do not overlap'), (['--threshold', '2'], 'threshold')):
        with pytest.raises(ValueError, match=why): predict_command([str(masks), str(fields / 'val'), *words, '--out', str(tmp_path / 'no')])
    with pytest.raises(ValueError, match='segment'): evaluate_command([str(masks), str(fields), '--out', str(tmp_path / 'no')])


# ---- where a stage starts -------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def files(boxes, masks, tmp_path_factory):
    """One file of each kind, of this kit and of the reference's form."""
    folder = tmp_path_factory.mktemp('files')
    cfg = make_config('demo', **SIZES, **CNN, num_patches=2)
    torch.manual_seed(3)
    model = build_updetr(**model_options(cfg))
    save_checkpoint(folder / 'pretrained.pth', {'model': model.state_dict(), 'args': dataclasses.asdict(cfg), 'step': 1})
    save_checkpoint(folder / 'oneshot.pth', {'model': model.state_dict(), 'args': dataclasses.asdict(cfg) | {'task': 'oneshot'}})
    options = dict(backbone='resnet18', hidden_dim=32, nheads=8, enc_layers=1, dec_layers=1, dim_feedforward=32, num_queries=4)
    detr = build_detr(250, **options)
    def published(path, model, **args): torch.save({'model': model.state_dict(), 'args': argparse.Namespace(**args)}, path)
    published(folder / 'detector.pth', detr, dataset_file='coco', masks=False)
    published(folder / 'their_boxes.pth', detr, dataset_file='coco_panoptic', masks=False)
    published(folder / 'their_masks.pth', DETRsegm(detr), dataset_file='coco_panoptic', masks=True)
    return {p.stem: p for p in folder.iterdir()} | {'boxes': boxes / 'checkpoint.pth', 'masks': masks / 'checkpoint.pth'}


@pytest.mark.parametrize('stage, file, message', [
    ('boxes', 'boxes', 'is a finished stage boxes: go on with stage masks'), ('boxes', 'their_boxes', 'is a finished stage boxes'),
    ('boxes', 'masks', 'has masks already'), ('boxes', 'their_masks', 'has masks already'), ('boxes', 'oneshot', 'wait for a picture'),
    ('masks', 'pretrained', 'knows no classes: run stage boxes from it first'), ('masks', 'masks', 'has masks already'),
    ('masks', 'detector', 'things only, so it has no query for stuff'), ('masks', 'their_masks', 'has masks already'),
    ('masks', 'oneshot', 'one-shot')])
def test_wrong_starts_are_refused(stage, file, message, files, fields, tmp_path):
    with pytest.raises(ValueError, match=rf'stage {stage} cannot start from .*{message}'):
        panoptic_config('demo', stage, **VIEWS, pretrain=str(files[file]))
    by_hand = {'stage': stage, 'pretrain': str(files[file])}  # past the first check
    write_json(tmp_path / 'cfg.json', dataclasses.asdict(panoptic_config('demo', 'boxes', **BOXES, data=str(fields))) | by_hand)
    with pytest.raises(ValueError): finish(tmp_path)
    assert not (tmp_path / 'checkpoint.pth').exists()


def test_right_starts(files):
    up = panoptic_config('demo', 'boxes', **VIEWS | dict(cached_views=2), pretrain=str(files['pretrained']))
    assert (up.stage, up.hidden_dim, up.features, up.num_queries, up.pre_norm) == ('boxes', 32, 'layer3', 20, True)
    theirs = panoptic_config('coco', 'masks', pretrain=str(files['their_boxes']))
    assert (theirs.num_queries, theirs.epochs, theirs.lr_drop, theirs.frozen_backbone, theirs.nheads) == (4, 25, 15, True, 8)
    assert panoptic_config('demo', 'boxes', **VIEWS, pretrain=str(files['detector'])).stage == 'boxes'  # a detector may learn stuff
    with pytest.raises(ValueError, match='has 8 object queries: in stage masks the detector stays'):
        panoptic_config('demo', 'masks', **VIEWS, pretrain=str(files['boxes']), num_queries=9)


def test_masks_of_other_classes_are_refused(files, fields, tmp_path):
    folder = make_run(tmp_path / 'run', 'masks', fields, pretrain=str(files['their_boxes']))
    with pytest.raises(ValueError, match=r'trained for 250 classes, the data has 3 \(coco_ids=True has 250\)'): finish(folder)


def test_a_pretrained_transformer_arrives_in_stage_boxes(files, fields, tmp_path):
    folder = make_run(tmp_path / 'run', 'boxes', fields, pretrain=str(files['pretrained']), fresh_queries=False, num_queries=10,
                      **{k: None for k in ('backbone', 'weights', 'features')})
    task = PanopticTask(PanopticConfig(**json.loads((folder / 'cfg.json').read_text())), folder, Processes())
    theirs, mine = load_checkpoint(files['pretrained'])['model'], task.model.state_dict()
    kept = [k for k in mine if k.startswith('transformer.')]
    assert len(kept) > 40 and all(torch.equal(mine[k], theirs[k]) for k in kept)


@pytest.mark.parametrize('changes, message', [
    ({'stage': 'boxes', 'classes': 'cat'}, 'classes cannot be chosen'), ({'stage': 'both'}, "stage 'both' is unknown"),
    ({'stage': 'masks'}, 'stage masks needs pretrain'), ({'stage': 'boxes', 'threshold': 1.5}, 'threshold'),
    ({'stage': 'boxes', 'map_gain': 0.}, 'map_gain must be positive'), ({'stage': 'boxes', 'mask_loss_coef': -1.}, 'not be negative')])
def test_impossible_configurations(changes, message):
    with pytest.raises(ValueError, match=message): panoptic_config('demo', **changes)


def test_the_papers_two_stages():
    """Section 4.4, and DETR's recipe that it follows."""
    first = panoptic_config('coco', 'boxes')
    assert (first.epochs, first.lr_drop, first.lr, first.lr_backbone, first.batch_size, first.pre_norm) == (300, 200, 1e-4, 5e-5, 32, True)
    assert (first.per_head, first.threshold, first.map_gain, first.num_queries, first.frozen_backbone) == (True, .85, 1, 100, False)


def test_cached_features_know_stuff(tmp_path):
    """The same scenes cached for detection lack stuff: the banks of the two tasks must not be mixed."""
    scenes = dict(data='', scenes=8, scenes_val=4, scene_size=64, frozen_backbone=True, cached_views=2)
    finish(folder := make_run(tmp_path / 'run', 'boxes', **scenes, epochs=1, eval_every=0))
    detection = FinetuneTask(finetune_config('demo', **BOXES | scenes), folder, Processes())
    detection.begin(resumed=False)
    labels = [load_file(p / 'targets.safetensors')['labels'] for p in (tmp_path / 'banks').iterdir()]
    assert sorted(x.max() >= 8 for x in labels) == [False, False, True, True] and measured(folder) == []
    assert max(int(t['labels'].max()) for views in detection.cached[0].targets.values() for t in views) < 8


def test_averaged_weights_are_measured_and_kept(boxes, fields, tmp_path):
    folder = make_run(tmp_path / 'run', 'masks', fields, pretrain=str(boxes / 'checkpoint.pth'), ema=.5, epochs=2)
    task = PanopticTask(PanopticConfig(**json.loads((folder / 'cfg.json').read_text())), folder, Processes())
    train(task, task.cfg, folder, Processes())
    state = load_checkpoint(folder / 'checkpoint.pth')
    assert not same(state['ema'], state['model'])
    segmenter = PanopticSegmenter.from_checkpoint(folder / 'checkpoint.pth')
    assert same(segmenter.model.state_dict(), state['ema'])


# ---- panoptic.ipynb -------------------------------------------------------------------------------------------------

def front_end(monkeypatch, **parameters):
    """Run the notebook's cells up to the plan, in this process."""
    return run_cells(PANOPTIC, monkeypatch, 'train_plan(cfg', **parameters)


@pytest.mark.parametrize('parameters, message', [
    ({'scene': 8}, 'unknown parameter: scene .did you mean scenes?'), ({'stage': 'masks'}, 'unknown parameter: stage|both stages are run'),
    ({'preset': 'coco', 'methods': 'updetr'}, '-p pretrain FILE, or ask for -p methods detr'), ({'methods': 'mask_rcnn'}, 'unknown'),
    ({'preset': 'coc'}, 'unknown'), ({'preset': 'coco'}, 'annotations/panoptic_train2017.json'),
    ({'preset': 'coco', 'data': 'nowhere'}, 'nothing at nowhere'), ({'boxes': 'nowhere.pth'}, 'nowhere.pth'),
    ({'boxes': 'x.pth', 'methods': 'detr,updetr'}, 'boxes is one detector'),
    ({'eval_every': 0}, 'eval_every 0: .* -p eval_every EPOCHS .* measures only at the end')])
def test_the_impossible_stops_at_once(parameters, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message): front_end(monkeypatch, **parameters)
    assert not list(tmp_path.iterdir())


def test_boxes_alone_decide_the_rest(boxes, fields, monkeypatch):
    given = dict(boxes=str(boxes / 'checkpoint.pth'), data=str(fields), scenes=0, scenes_val=0, batch_size=4, eval_every=0)
    space = front_end(monkeypatch, **given)
    assert space['chosen'] == ['detr'] and space['cfg'].stage == 'masks' and space['cfg'].num_queries == 8
    assert space['cfg'].eval_every == 0     # the report has no number of the boxes then


def test_a_report_of_neighbours_needs_an_evaluation(monkeypatch):
    with pytest.raises(ValueError, match='eval_every EPOCHS'):
        run_cells(PANOPTIC.with_name('panoptic_neighbours.ipynb'), monkeypatch, 'train_plan(cfg', eval_every=0)


def test_every_hyper_parameter_can_be_given():
    lines, elsewhere = parameter_lines(PANOPTIC), {'task', 'stage', 'pretrain', 'data', 'seed', 'year', 'year_val', 'classes', 'difficult'}
    for f in dataclasses.fields(PanopticConfig):
        if f.name in elsewhere: continue
        assert re.match(rf'{f.type.__name__} = None  # .+ \(paper: ', lines[f.name]), f.name
        assert f.default == eval(lines[f.name].split(' (paper: ')[-1][:-1]), f'{f.name}: the comment quotes another default'


def test_a_small_run_ends_in_a_report(tmp_path, monkeypatch):
    """All its cells, in this process; papermill and a real kernel are `test_papermill`'s."""
    tiny = SIZES | dict(methods='detr', scenes=8, scenes_val=4, scene_size=64, val_size=64, square=64, cached_views=2, epochs=2,
                        mask_epochs=1, threshold=.1, gpus=0)
    run_report(PANOPTIC, tmp_path, monkeypatch, **tiny)
    metrics = json.loads((tmp_path / 'runs/reports/panoptic-demo/metrics.json').read_text())
    run = tmp_path / 'runs/panoptic-demo-detr-masks-42'
    assert metrics['panoptic'].keys() == {'detr'} and {'PQ', 'SQ', 'RQ', 'PQth', 'PQst', 'APseg'} <= metrics['panoptic']['detr'].keys()
    assert {'command', 'commit', 'versions', 'hardware', 'seeds', 'scale', 'wall_s'} <= metrics['provenance'].keys()
    assert '-p mask_epochs 1' in metrics['provenance']['command'] and 'small scale' in metrics['provenance']['scale']
    assert metrics['panoptic']['detr']['PQ']['mean'] == pytest.approx(measured(run)[-1]['test_PQ'], abs=1e-3)
    assert len(json.loads((run / 'panoptic_val.json').read_text())['annotations']) == len(list((run / 'panoptic_val').iterdir())) == 4
    shared = PanopticSegmenter.from_checkpoint(run / 'segmenter.safetensors')
    assert shared.isthing == [True] * 8 + [False] * 4 and (tmp_path / 'runs/reports/panoptic-demo/segments.png').exists()


# ---- COCO -----------------------------------------------------------------------------------------------------------

@pytest.mark.data
@pytest.mark.parametrize('coco_ids', [False, True])
def test_both_stages_on_coco(coco_ids, data, tmp_path):
    """Real photos through the real loader, both stages, PQ; renumbered classes and the reference's 250."""
    root = data / 'coco_panoptic_mini'
    if not root.is_dir(): pytest.skip('needs coco_panoptic_mini in UPDETR_DATA')
    live = dict(data=str(root), scenes=0, scenes_val=0, val_size=96, square=0, cached_views=0, photos=12, batch_size=4, epochs=1,
                eval_every=1, log_every=1, coco_ids=coco_ids)
    finish(first := make_run(tmp_path / 'boxes', 'boxes', **live, num_queries=20))
    finish(second := make_run(tmp_path / 'masks', 'masks', **live | {'pretrain': str(first / 'checkpoint.pth'), 'threshold': 0.}))
    state, last = load_checkpoint(second / 'checkpoint.pth'), measured(second)[-1]
    assert len(state['class_names']) == (250 if coco_ids else 133) and state['isthing'].count(True) == 80
    assert last['step'] == 3 and 0 <= last['test_PQ'] < 20 and 'test_AP50' in measured(first)[-1]
    found = PanopticSegmenter.from_checkpoint(second / 'checkpoint.pth')(next((root / 'val2017').iterdir()), 0.)
    assert found.ids.shape == found.image.shape[1:] and all(s['category_id'] < len(state['class_names']) for s in found.info)
