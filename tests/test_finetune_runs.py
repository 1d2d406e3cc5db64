"""Fine-tuning that has something to measure (AP50 above 0): stopped while measuring, in two processes, from a checkpoint, as a detector;
and `nbs/finetune.ipynb`."""
import dataclasses
import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from test_papermill import FINETUNE
from test_resume import as_in_the_processes, finish, weights  # noqa: F401 (a fixture: one thread here, too)
from test_task import rows, save_photos
from tools.cells import run_cells, run_report
from tools.processes import in_processes
from updetr.core.checkpoint import load_checkpoint, save_checkpoint, write_json
from updetr.core.config import make_config, model_options
from updetr.core.shipped import shipped
from updetr.data.datasets import open_dataset
from updetr.model.updetr import build_updetr
from updetr.predict.detector import Detector
from updetr.tasks.finetune import FinetuneConfig, finetune_config
from updetr.tasks.finetune_task import FinetuneTask, evaluate, fit_statistics, measurement
from updetr.train.evaluate import CocoEvaluator
from updetr.train.loop import Processes, train

SIZES = dict(hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2, num_queries=8)
TINY = SIZES | dict(backbone='resnet18', weights='none', features='layer2', scenes=0, scenes_val=0, val_size=64, square=0, cached_views=0,
                    batch_size=4, epochs=2, eval_every=1, log_every=1, save_every=4, lr=3e-3, dropout=.1)


@pytest.fixture(scope='module', autouse=True)
def no_data_by_the_way():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('UPDETR_DATA', raising=False)
        yield


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
    """A COCO folder: 12 and 5 photos of noise, each with one box that fills most of it, so that AP50 soon leaves 0."""
    (folder := tmp_path_factory.mktemp('noise') / 'annotations').mkdir()
    width, height = size = 120, 80
    for k, (part, n) in enumerate({'train': 12, 'val': 5}.items()):
        save_photos(folder.parent / part, n, size, start=100 * k)
        edges = torch.rand(n, 4, generator=torch.Generator().manual_seed(k)) * .3
        boxes = [[a * width, b * height, (1 - a - c) * width, (1 - b - d) * height] for a, b, c, d in edges.tolist()]
        write_json(folder / f'instances_{part}.json', {
            'images': [{'id': i, 'file_name': f'{i}.jpg', 'width': width, 'height': height} for i in range(n)],
            'categories': [{'id': 7, 'name': 'noise'}],
            'annotations': [{'id': i, 'image_id': i, 'category_id': 7, 'bbox': b} for i, b in enumerate(boxes)]})
    return folder.parent


def make_run(folder, data, preset='demo', **changes):
    folder.mkdir(parents=True)
    write_json(folder / 'cfg.json', dataclasses.asdict(finetune_config(preset, **TINY | {'data': str(data)} | changes)))
    return folder


def change(folder, **values): write_json(folder / 'cfg.json', json.loads((folder / 'cfg.json').read_text()) | values)


def make_task(folder, processes=None):
    cfg = FinetuneConfig(**json.loads((folder / 'cfg.json').read_text()))
    return FinetuneTask(cfg, folder, processes or Processes())


def logged(folder):
    """{(step, name): number}, for all numbers of the losses and the measurements; what was done twice must agree."""
    seen = {}
    for row in rows(folder):
        for name, v in row.items():
            if name.startswith(('train_', 'test_')): assert seen.setdefault((row['step'], name), v) == v, f'{name} of step {row["step"]}'
    return seen


def measured(folder): return [r for r in rows(folder) if any(k.startswith('test_') for k in r)]


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- disturbed runs -------------------------------------------------------------------------------------------------

LIVE = dict(epochs=10, eval_every=2, frozen_backbone=False, ema=.8)


@pytest.fixture(scope='module')
def whole(labelled, tmp_path_factory):
    """The undisturbed run: live views, a trained CNN, averaged weights."""
    finish(folder := make_run(tmp_path_factory.mktemp('whole') / 'run', labelled, **LIVE))
    return folder


def test_it_learns(whole):
    """Else the other tests would compare zeros."""
    test = measured(whole)
    assert [r['step'] for r in test] == [6, 12, 18, 24, 30] and len(rows(whole)) == 30 + 5
    assert all(20 < r['test_AP50'] < 100 for r in test) and len({r['test_best_iou'] for r in test}) == 5


def test_stopped_while_measuring(whole, labelled, tmp_path, monkeypatch):
    """SIGTERM between two batches of an evaluation: nothing of it is logged, and the resumed run begins with it."""
    folder, calls = make_run(tmp_path / 'run', labelled, **LIVE), []
    with monkeypatch.context() as patch:
        def stopping(batches):
            for batch in batches:
                calls.append(len(calls))
                if calls[-1] == 3: signal.raise_signal(signal.SIGTERM)  # the second evaluation, two batches each
                yield batch
        val_batches = evaluate.__globals__['val_batches']
        patch.setitem(evaluate.__globals__, 'val_batches', lambda task: stopping(val_batches(task)))
        finish(folder)
    assert [r['step'] for r in measured(folder)] == [6] and rows(folder)[-1]['step'] == 12 and not (folder / 'done.json').exists()
    before = len(rows(folder))
    finish(folder)
    assert {'test_AP50', 'step'} <= rows(folder)[before].keys() and rows(folder)[before]['step'] == 12
    assert logged(folder) == logged(whole) and same(weights(folder), weights(whole))


# ---- several processes ----------------------------------------------------------------------------------------------

def shown(folder, checkpoint, processes):
    """Predictions and measurement of a run folder's task with the weights of a checkpoint."""
    task = make_task(folder, processes)
    task.model.load_state_dict(weights(checkpoint))
    task.begin(resumed=True)
    evaluator = evaluate(task, task.model)
    return {i: {k: torch.as_tensor(v) for k, v in p.items()} for i, p in evaluator.predictions.items()}, measurement(evaluator)


def shown_by_one_of(rank, world, folders, checkpoint):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folders[0].parent / "store"}', rank=rank, world_size=world)
    for folder in folders: torch.save(shown(folder, checkpoint, Processes(rank, world)), folder / f'{rank}.pth')
    dist.destroy_process_group()


def test_two_processes_measure_what_one_measures(whole, labelled, tmp_path):
    """5 photos in batches of 2: shards are filled up with photos that count once. Live and cached; and the caches are equal."""
    settings = {'live': {}, 'cached': dict(square=64, cached_views=2, frozen_backbone=True)}
    one, two = ([make_run(tmp_path / who / name, labelled, **s) for name, s in settings.items()] for who in ('one', 'two'))
    in_processes(shown_by_one_of, 2, two, whole)
    for alone, folder in zip(one, two):
        predictions, numbers = shown(alone, whole, Processes())
        assert 0 < numbers['test_AP50'] and 0 < numbers['test_best_iou'] < 1
        for rank in (0, 1):
            theirs, their_numbers = torch.load(folder / f'{rank}.pth')
            assert predictions.keys() == theirs.keys() == set(range(5)) and their_numbers == pytest.approx(numbers, abs=1e-3)
            for i, p in predictions.items():
                for k in ('scores', 'boxes'): torch.testing.assert_close(theirs[i][k], p[k], rtol=1e-4, atol=1e-4)
    banks = [{p.name: p for p in (tmp_path / who / 'banks').iterdir()} for who in ('one', 'two')]
    assert banks[0].keys() == banks[1].keys() and len(banks[0]) == 2
    for name in banks[0]:
        mine, theirs = ({p.name: p.read_bytes() for p in b[name].iterdir()} for b in banks)
        assert mine == theirs and mine.keys() == {'lock', 'bank.json', 'feature.npy', 'targets.safetensors'}
        assert np.load(banks[0][name] / 'feature.npy').shape[:2] in ((12, 2), (5, 1))


# ---- what a run starts from, and what it becomes --------------------------------------------------------------------

@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A tiny UP-DETR checkpoint of this kit; its channel statistics are nobody else's."""
    cfg = make_config('demo', **SIZES, num_patches=2, backbone='resnet18', weights='none', features='layer2', dropout=.1)
    torch.manual_seed(3)
    model = build_updetr(**model_options(cfg))
    model.feature_norm.fit(torch.randn(2, 128, 4, 4) * 7)
    path = tmp_path_factory.mktemp('updetr') / 'checkpoint.pth'
    save_checkpoint(path, {'model': model.state_dict(), 'args': dataclasses.asdict(cfg), 'step': 1})
    return path


START = {k: None for k in ('backbone', 'weights', 'features')}  # the checkpoint says so


def test_a_checkpoint_is_where_a_run_starts_once(pretrained, labelled, tmp_path, monkeypatch):
    path = tmp_path / 'gone.pth'
    path.write_bytes(pretrained.read_bytes())
    settings = START | dict(pretrain=str(path), fresh_queries=False, epochs=3, save_every=2)
    finish(undisturbed := make_run(tmp_path / 'undisturbed', labelled, **settings))
    task = make_task(folder := make_run(tmp_path / 'run', labelled, **settings))
    task.begin(resumed=False)
    theirs, mine = load_checkpoint(pretrained)['model'], task.model.state_dict()
    fresh = {'class_embed.weight', 'class_embed.bias'}
    assert mine.keys() - theirs.keys() == set() and all(torch.equal(v, theirs[k]) for k, v in mine.items() if k not in fresh)
    assert len(mine['class_embed.bias']) == 2 and not torch.equal(mine['class_embed.weight'], theirs['class_embed.weight'][:2])

    def stopping(start, total, batches=task.batches):
        for i, batch in enumerate(batches(start, total), 1):
            if i == 4: signal.raise_signal(signal.SIGTERM)
            yield batch

    task.batches = stopping
    assert train(task, task.cfg, folder, Processes()).step == 4
    path.unlink()
    monkeypatch.setattr('updetr.tasks.finetune_task.hand_over', None)
    finish(folder)
    assert logged(folder) == logged(undisturbed) and same(weights(folder), weights(undisturbed))


def detected(file, val_set):
    """Return what the detector in a file, or in a run's folder, finds photo by photo, as an evaluator."""
    detector, evaluator = Detector.from_checkpoint(file), CocoEvaluator(val_set.coco())
    for sample in (val_set[i] for i in range(len(val_set))):
        found = detector.detect(sample['image'], 0.)
        evaluator.update([sample['image_id']], [{k: getattr(found, k) for k in ('scores', 'labels', 'boxes')}])
    return evaluator


@pytest.mark.parametrize('how', ['averaged', 'squashed', 'retinanet'])
def test_the_detector_answers_as_the_run_measured(how, whole, labelled, tmp_path):
    """The photos, shown one by one to `Detector`, give the numbers that the run logged last. Torchvision's detectors included."""
    settings = dict(squashed=dict(square=64, frozen_backbone=True),
                    retinanet=dict(detector='retinanet', features='', epochs=4, eval_every=4, lr=1e-3))
    folder = whole if how == 'averaged' else make_run(tmp_path / 'run', labelled, **settings[how])
    if how != 'averaged': finish(folder)
    val_set = open_dataset(labelled, 'val')
    last, numbers = measured(folder)[-1], measurement(detected(folder / 'checkpoint.pth', val_set))
    assert {k: last[k] for k in numbers} == pytest.approx(numbers, abs=1e-3) and last['test_best_iou'] > 0
    if how == 'retinanet': assert last['step'] == 12 and {'train_classification', 'train_bbox_regression'} <= rows(folder)[0].keys()
    assert Detector.from_checkpoint(folder / 'checkpoint.pth').classes == ('noise',)


def test_the_best_averaged_weights_opened_anew(whole, labelled):
    """A run's folder gives its best weights: the averaged ones, which were measured, not those that were trained."""
    best = load_checkpoint(whole / 'best.pth')
    row, = [r for r in measured(whole) if r['step'] == best['best']['step']]
    numbers = measurement(detected(whole, open_dataset(labelled, 'val')))
    assert {k: row[k] for k in numbers} == pytest.approx(numbers, abs=1e-3) and numbers['test_AP'] == pytest.approx(best['best']['value'])
    last = load_checkpoint(whole / 'checkpoint.pth')
    assert row['step'] < last['step'] or same(best['model'], last['ema'])
    assert not same(best['model'], last['model'])


# ---- finetune.ipynb -------------------------------------------------------------------------------------------------

def front_end(monkeypatch, **parameters):
    """Run the notebook's cells up to the plan, in this process."""
    return run_cells(FINETUNE, monkeypatch, 'train_plan(cfg', **parameters)


@pytest.mark.parametrize('parameters, message', [
    ({'scene': 8}, 'unknown parameter: scene .did you mean scenes?'),
    ({'preset': 'voc150', 'methods': 'updetr'}, '-p pretrain FILE, or ask for -p methods detr'),
    ({'preset': 'voc15'}, "preset 'voc15' is unknown: choose voc150"),
    ({'methods': 'retina'}, 'did you mean retinanet'),
    ({'preset': 'voc150', 'pretrain': 'PRETRAINED', 'hidden_dim': 64}, r'another architecture than hidden_dim 64 \(it has 32\): leave'),
    ({'preset': 'voc150', 'pretrain': 'nowhere.pth'}, 'no checkpoint .*nowhere.pth'),
    ({'preset': 'voc150'}, r'-p data PATH or UPDETR_DATA=PATH .*-p scenes 400 -p scenes_val 100'),
    ({'preset': 'coco150', 'data': 'nowhere'}, 'nothing at nowhere')])
def test_the_impossible_stops_at_once(parameters, message, pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if parameters.get('pretrain') == 'PRETRAINED': parameters = parameters | {'pretrain': str(pretrained)}
    with pytest.raises((ValueError, FileNotFoundError), match=message): front_end(monkeypatch, **parameters)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_decides_the_architecture(pretrained, monkeypatch):
    space = front_end(monkeypatch, preset='voc150', pretrain=str(pretrained), scenes=4, scenes_val=2, scene_size=64, batch_size=2)
    assert space['chosen'] == ['updetr'] and space['steps_per_epoch'] == 2
    assert {k: getattr(space['cfg'], k) for k in SIZES} == SIZES and space['cfg'].features == 'layer2'


def test_a_small_run_ends_in_a_report(tmp_path, monkeypatch):
    """All its cells, in this process; papermill and a real kernel are `test_papermill`'s."""
    tiny = SIZES | dict(methods='detr', scenes=8, scenes_val=4, scene_size=64, val_size=64, square=64, cached_views=2, epochs=2,
                        eval_every=1, gpus=0, weights=str(shipped('updetr')))
    run_report(FINETUNE, tmp_path, monkeypatch, **tiny)
    metrics, run = json.loads((tmp_path / 'runs/reports/finetune-demo/metrics.json').read_text()), tmp_path / 'runs/finetune-demo-detr-42'
    assert metrics['config']['weights'] == 'FOLDER' and metrics['config']['backbone'] == 'tf_efficientnet_lite0'
    assert metrics['detection'].keys() == {'detr'} and {'AP', 'AP50', 'VOC 11', 'VOC all'} <= metrics['detection']['detr'].keys()
    assert {'command', 'commit', 'versions', 'hardware', 'seeds', 'scale', 'wall_s'} <= metrics['provenance'].keys()
    assert '-p scenes 8' in metrics['provenance']['command'] and 'small scale' in metrics['provenance']['scale']
    assert metrics['detection']['detr']['AP50']['mean'] == pytest.approx(measured(run)[-1]['test_AP50'], abs=.1)  # cached in half precision
    assert Detector.from_checkpoint(run / 'detector.safetensors').classes == Detector.from_checkpoint(run / 'checkpoint.pth').classes


def test_workers_of_the_evaluation_live_as_long_as_the_run(labelled, tmp_path):
    """They begin with the first one, and what they bring is what this process reads."""
    found, workers = [], []
    for name, num_workers in (('alone', 0), ('helped', 1)):
        torch.manual_seed(0)
        task = make_task(make_run(tmp_path / name, labelled, num_workers=num_workers))
        task.begin(resumed=False)
        assert task.val_loader is None
        for _ in range(2):
            found.append(evaluate(task, task.model).predictions)
            if num_workers: workers.append([w.pid for w in task.val_loader._iterator._workers])
    assert workers[0] == workers[1] and len(workers[0]) == 1
    assert all(np.array_equal(p[k], other[i][k]) for other in found[1:] for i, p in found[0].items() for k in p)


def test_statistics_of_the_cnn_are_those_of_all_photos():
    "Files may be in the order of their classes: here the second thousand is brighter."
    fitted = []
    bank = SimpleNamespace(batch=lambda items: {'feature': torch.tensor([float(i >= 1000) for _, i in items]).view(-1, 1, 1, 1)})
    task = SimpleNamespace(processes=Processes(), views=range(2000), cfg=SimpleNamespace(seed=42), cached=[bank],
                           model=SimpleNamespace(feature_norm=SimpleNamespace(fit=fitted.append)))
    fit_statistics(task)
    tokens, = fitted
    assert tokens.numel() == 256 and abs(tokens.mean() - .5) < .1
