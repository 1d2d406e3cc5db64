"""The number of processes and of micro-batches is no hyper-parameter of fine-tuning; and two processes that are stopped go on as two."""
import dataclasses
import json
import shutil
import signal
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import test_oneshot as oneshot
import test_panoptic_runs as panoptic
from test_finetune_runs import logged, make_run, no_data_by_the_way, rows  # noqa: F401 (a fixture)
from test_resume import as_in_the_processes, weights  # noqa: F401 (a fixture: one thread here, too)
from test_task import save_photos
from tools.processes import in_processes
from updetr.core.checkpoint import read_json, write_json
from updetr.core.config import make_config
from updetr.tasks.cnn_task import CNN_PRESETS, CNNConfig
from updetr.train import loop as loop
from updetr.train.graphs import data_parallel
from updetr.train.loop import Processes, find_task


def go(folder, processes, stop_at=None):
    """Train what a folder describes; a signal comes in a step."""
    kind, task = find_task((content := read_json(folder / 'cfg.json'))['task'])
    cfg, step = kind(**content), loop.train_step

    def stopping(module, batches, state, *more):
        if state.step + 1 == stop_at: signal.raise_signal(signal.SIGTERM)
        return step(module, batches, state, *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'train_step', stopping)
        loop.train(task(cfg, folder, processes), cfg, folder, processes)


def one_of(rank, world, folders, meet):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{meet}', rank=rank, world_size=world)
    for folder in folders:
        if folder.name == 'stopped': go(folder, Processes(rank, world), 2 if rank else None)  # by one of them
        if folder.name == 'stopped' and not rank: shutil.copy(folder / 'log.txt', folder / 'before.txt')
        go(folder, Processes(rank, world))
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def crowded(tmp_path_factory):
    """A COCO folder: photos of noise with one to seven boxes, so that parts of a batch have very different numbers of objects."""
    (folder := tmp_path_factory.mktemp('crowded') / 'annotations').mkdir()
    rng = np.random.default_rng(0)
    for k, (part, n) in enumerate({'train': 8, 'val': 2}.items()):
        save_photos(folder.parent / part, n, (120, 80), start=100 * k)
        number = rng.permutation([1, 1, 1, 1, 2, 5, 6, 7])[:n]
        boxes = [(i, [*rng.uniform(0, 40, 2), *rng.uniform(10, 40, 2)]) for i, t in enumerate(number) for _ in range(t)]
        write_json(folder / f'instances_{part}.json', {
            'images': [{'id': i, 'file_name': f'{i}.jpg', 'width': 120, 'height': 80} for i in range(n)],
            'categories': [{'id': 7, 'name': 'noise'}],
            'annotations': [{'id': j, 'image_id': i, 'category_id': 7, 'bbox': b} for j, (i, b) in enumerate(boxes)]})
    return folder.parent


@pytest.fixture(scope='module')
def half_empty(tmp_path_factory):
    """A COCO folder in which five photos of eight show nothing, so parts of a batch differ in how many photos have a class."""
    (folder := tmp_path_factory.mktemp('half_empty') / 'annotations').mkdir()
    for part, n in {'train': 8, 'val': 2}.items():
        save_photos(folder.parent / part, n, (64, 48), start=n)
        write_json(folder / f'instances_{part}.json', {
            'images': [{'id': i, 'file_name': f'{i}.jpg', 'width': 64, 'height': 48} for i in range(n)],
            'categories': [{'id': k, 'name': f'kind {k}'} for k in (3, 4)],
            'annotations': [{'id': i, 'image_id': i, 'category_id': 3 + i % 2, 'bbox': [4, 4, 50, 40]} for i in range(min(n, 3))]})
    return folder.parent


def make_cnn(folder, data, labels):
    """A run of a CNN whose norms do not average over photos: what a photo gives does not hang on those beside it."""
    folder.mkdir(parents=True)
    tiny = dict(backbone='convnext_atto', features='stages.0', crop_size=32, projection=8, batch_size=8, epochs=6, lr=1e-3)
    tiny |= dict(scenes=0, scenes_val=0, data=str(data), eval_every=0, log_every=1)
    cfg = make_config('demo', CNNConfig, CNN_PRESETS, **tiny, labels=labels)
    write_json(folder / 'cfg.json', dataclasses.asdict(cfg))
    return folder


SAME = dict(dropout=0., epochs=1, eval_every=0, square=64, frozen_backbone=False, num_queries=8)


@pytest.fixture(scope='module')
def in_two(crowded, half_empty, tmp_path_factory):
    """Runs of two processes, which are started once for all of them."""
    root = tmp_path_factory.mktemp('two')
    disturbed = dict(epochs=2, eval_every=0, frozen_backbone=False, ema=.8, dropout=.1, accumulate=2)
    ways = {'2': SAME, '2x2': SAME | dict(accumulate=2),
            'theirs': SAME | dict(ce_per_process=True), 'whole': disturbed, 'stopped': disturbed}
    folders = {name: make_run(root / name, crowded, **way) for name, way in ways.items()}
    folders |= {f'cnn {labels}': make_cnn(root / f'cnn{labels}', half_empty, labels) for labels in (True, False)}
    in_processes(one_of, 2, list(folders.values()), root / 'meet')
    return folders


WATCHED = 'train_class_error', 'train_matched_iou', 'train_cardinality_error', 'train_query_spread'


def curves(folder): return {k: v for k, v in logged(folder).items() if k[1] in ('train_loss', 'train_loss_ce', 'train_grad_norm')}


def test_a_step_is_a_batch_however_it_is_shared_out(crowded, in_two, tmp_path):
    """One process; two and four micro-batches; two processes. The reference's way makes a difference, so this shows something."""
    ways = dict(whole={}, two=dict(accumulate=2), four=dict(accumulate=4), theirs=dict(accumulate=2, ce_per_process=True))
    alone = {name: make_run(tmp_path / name, crowded, **SAME | way) for name, way in ways.items()}
    for folder in alone.values(): go(folder, Processes())
    whole = curves(alone['whole'])
    assert len(whole) == 2 * 3
    for folder in (alone['two'], alone['four'], in_two['2'], in_two['2x2']):
        # the first step is the same up to rounding; then kinks of the losses make more of that
        assert curves(folder) == pytest.approx(whole, rel=1e-2)
        for name in ('train_loss', 'train_loss_ce', 'train_grad_norm'):
            assert curves(folder)[1, name] == pytest.approx(whole[1, name], rel=1e-4)
        for name in WATCHED: assert logged(folder)[1, name] == pytest.approx(logged(alone['whole'])[1, name], rel=1e-4), name
    theirs = [curves(folder)[1, 'train_loss_ce'] for folder in (alone['theirs'], in_two['theirs'])]
    assert all(abs(v - whole[1, 'train_loss_ce']) > 1e-3 * v for v in theirs)


def test_masks_and_one_shot_too(crowded, tmp_path):
    """The other tasks with targets of different lengths, in micro-batches."""
    fields = tmp_path / 'fields'
    for seed, part in enumerate(('train', 'val')): panoptic.Fields(4, seed).write(fields, part)
    go(start := panoptic.make_run(tmp_path / 'boxes', 'boxes', fields, epochs=1, eval_every=0), Processes())
    for n in (1, 2, 4):
        more = dict(epochs=1, eval_every=0, accumulate=n)
        go(panoptic.make_run(tmp_path / f'masks{n}', 'masks', fields, pretrain=str(start / 'checkpoint.pth'), **more), Processes())
        go(oneshot.make_run(tmp_path / f'oneshot{n}', **more | dict(dropout=0., cached_views=0)), Processes())
    for name in ('masks', 'oneshot'):
        first = [next(r for r in rows(tmp_path / f'{name}{n}')) for n in (1, 2, 4)]
        watched = (*WATCHED, 'train_mask_iou') if name == 'masks' else WATCHED
        for k in ('train_loss', 'train_grad_norm', *watched):
            assert [r[k] for r in first] == pytest.approx([first[0][k]] * 3, rel=1e-4), (name, k)


@pytest.mark.parametrize('labels', [True, False])
def test_a_cnn_learns_the_same_in_one_process_and_two(labels, half_empty, in_two, tmp_path):
    """With classes, which most photos have not; and without, where every view is looked for among those of both processes."""
    go(alone := make_cnn(tmp_path / 'alone', half_empty, labels), Processes())
    ours, theirs = (list(rows(folder)) for folder in (alone, in_two[f'cnn {labels}']))
    assert len(ours) == len(theirs) == 6
    for k in ('train_loss', 'train_accuracy', 'train_grad_norm'):
        assert [r[k] for r in theirs] == pytest.approx([r[k] for r in ours], rel=1e-4), k
    a, b = weights(alone), weights(in_two[f'cnn {labels}'])
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a) and a.keys() == b.keys()


def test_two_processes_that_are_stopped_are_two_undisturbed_ones(in_two):
    """With dropout and averaged weights, stopped in the second of four steps by one of them: the same weights, bit by bit."""
    whole, stopped = in_two['whole'], in_two['stopped']
    assert len((stopped / 'before.txt').read_text().splitlines()) == 2
    assert logged(stopped) == logged(whole) and json.loads((stopped / 'done.json').read_text())['step'] == 4
    assert all(torch.equal(a, b) for a, b in zip(weights(stopped).values(), weights(whole).values(), strict=True))


def learn_statistics(rank, world, meet, out):
    dist.init_process_group('gloo', init_method=f'file://{meet}', rank=rank, world_size=world)
    norm = nn.BatchNorm1d(2)
    module = data_parallel(norm, torch.device('cpu'))
    # what one process sees is far from what the other does
    for _ in range(50): module(10. * rank + torch.randn(8, 2)).sum().backward()
    torch.save(norm.running_mean, out / str(rank))
    dist.destroy_process_group()


def test_statistics_that_learn_are_those_of_the_first_process(tmp_path):
    "A detector of one's own may have norms that learn: all processes evaluate the one that is saved, but for the last step's tenth."
    in_processes(learn_statistics, 2, tmp_path / 'meet', tmp_path)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first.abs().max() < 1 and (second - first).abs().max() < 2


def test_processes_wait_for_hours_while_one_reads(monkeypatch):
    "PyTorch's half hour would end a run whose first process reads the headers of a million photos on a slow drive."
    asked = {}
    monkeypatch.setattr(dist, 'init_process_group', lambda backend, **given: asked.update(given))
    monkeypatch.delenv('UPDETR_MEET', raising=False)
    for name, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=0).items(): monkeypatch.setenv(name, str(value))
    joined = loop.join_processes()
    assert (joined.rank, joined.world, asked['rank'], asked['world_size']) == (1, 2, 1, 2)
    assert timedelta(hours=2) <= asked['timeout'] <= timedelta(hours=6)
