"""What a run logs is what its own checkpoints give when they are opened anew: no number comes from weights of another moment."""
import dataclasses
import json
from functools import partial, partialmethod

import pytest
import torch

from test_resume import as_in_the_processes  # noqa: F401 (a fixture: one thread here, too)
from updetr.core.checkpoint import load_checkpoint, read_weights, write_json
from updetr.core.config import make_config
from updetr.model.backbone import Backbone, build_backbone
from updetr.model.losses import SetCriterion
from updetr.model.transformer import Transformer
from updetr.model.weights import load_updetr
from updetr.tasks import finetune_task
from updetr.tasks.cnn_task import CNN_PRESETS, CNNConfig
from updetr.tasks.finetune import finetune_config
from updetr.tasks.finetune_task import DetectStep
from updetr.tasks.oneshot import oneshot_config
from updetr.tasks.panoptic_task import panoptic_config
from updetr.tasks.pretrain_task import draw_preview, preview_photo
from updetr.train import loop as loop
from updetr.train.loop import Processes, find_task, train

MODEL = dict(hidden_dim=16, nheads=2, enc_layers=1, dec_layers=1, dim_feedforward=16, num_queries=4, dropout=0.)
CNN = dict(backbone='test_resnet', weights='none')
RATES = dict(lr=3e-3, lr_backbone=3e-3, clip_max_norm=1.)
TRAIN = RATES | dict(batch_size=4, epochs=2, keep_every=1, num_workers=0, schedule='cosine', warmup=0.)
SCENES = dict(scenes=8, scenes_val=4, scene_size=64)
VIEWS = SCENES | dict(val_size=64, square=64, cached_views=0, eval_every=1)
LABELLED = MODEL | CNN | TRAIN | VIEWS | dict(frozen_backbone=False)
FROM_NOTHING = dict(backbone='test_resnet', features='layer2', eval_every=1)
MAKE = {'finetune': partial(finetune_config, **LABELLED | dict(features='layer2')),
        'retinanet': partial(finetune_config, **LABELLED | dict(features='layer2', detector='retinanet', channels=32)),
        'oneshot': partial(oneshot_config, **LABELLED | dict(features='layer2', query_size=32, eval_queries=1)),
        'boxes': partial(panoptic_config, **LABELLED | dict(features='layer3')),
        'masks': partial(panoptic_config, stage='masks', **TRAIN | VIEWS | dict(num_queries=4, threshold=.05)),
        'cnn': lambda **changes: make_config('demo', CNNConfig, CNN_PRESETS, **TRAIN | SCENES | FROM_NOTHING | changes)}


@pytest.fixture(autouse=True)
def quick_compiler_and_half_precision(monkeypatch):
    """What `compile` gives is only traced here, and `amp`, which is the GPU's, counts on a CPU, too."""
    for part in (Backbone, Transformer, SetCriterion):
        monkeypatch.setattr(part, 'compile', partialmethod(part.compile, backend='eager', options=None))
    step = loop.train_step
    def with_amp(module, batches, state, factor, amp, *more):
        return step(module, batches, state, factor, state.cfg.amp, *more)
    monkeypatch.setattr(loop, 'train_step', with_amp)
    monkeypatch.setattr(finetune_task, 'in_half_precision', lambda task: task.cfg.amp and isinstance(task.module, DetectStep))


@pytest.fixture
def seen(monkeypatch):
    """Return what every CNN saw without gradients: the mean square of its maps."""
    numbers, plain = [], Backbone.maps

    def maps(self, x):
        found = plain(self, x)
        each = found.values() if isinstance(found, dict) else found
        if not torch.is_grad_enabled(): numbers.extend(m.float().square().mean().item() for m in each)
        return found
    monkeypatch.setattr(Backbone, 'maps', maps)
    return numbers


def open_task(cfg, folder, device='cpu'):
    folder.mkdir(parents=True, exist_ok=True)
    task = find_task(cfg.task)[1](cfg, folder, Processes(device=torch.device(device)))
    return task


def run_and_note(cfg, folder, seen, device='cpu'):
    """Train; of each measurement what was logged, and what the CNN saw in it."""
    task, notes = open_task(cfg, folder, device), []

    def measure(model, stop, plain=task.measure):
        seen.clear()
        found = plain(model, stop)
        notes.append((found, seen.copy()))
        return found
    task.measure = measure
    write_json(folder / 'cfg.json', dataclasses.asdict(cfg))
    train(task, cfg, folder, task.processes)
    return notes


def check(cfg, folder, seen, device='cpu', rel=1e-4):
    notes = run_and_note(cfg, folder, seen, device)
    logged = [r for r in map(json.loads, (folder / 'log.txt').read_text().splitlines()) if any(k.startswith('test_') for k in r)]
    assert len(notes) == len(logged) == 2
    for epoch, (row, (found, saw)) in enumerate(zip(logged, notes)):
        fresh = open_task(cfg, folder, device)
        fresh.model.load_state_dict(read_weights(folder / f'checkpoint{epoch:04}.pth')[0])
        fresh.begin(resumed=True)
        seen.clear()
        again = fresh.measure(fresh.model, False)
        assert again == pytest.approx(found, rel=rel, abs=1e-3) and found.items() <= row.items()
        assert saw == pytest.approx(seen, rel=rel)
    return notes


# each pair of settings comes together somewhere
WAYS = [('finetune', {}), ('finetune', dict(ema=.5, amp=True)), ('finetune', dict(compile=True, amp=True)),
        ('finetune', dict(frozen_backbone=True, ema=.5, compile=True)), ('finetune', dict(frozen_backbone=True, cached_views=2)),
        ('retinanet', dict(ema=.5)), ('retinanet', dict(frozen_backbone=True)),
        ('oneshot', dict(ema=.5)), ('oneshot', dict(compile=True)), ('oneshot', dict(frozen_backbone=True, amp=True)),
        ('oneshot', dict(frozen_backbone=True, amp=True, cached_views=2, questions=3, compare=True)),
        ('boxes', dict(amp=True)), ('boxes', dict(ema=.5, compile=True)), ('cnn', {}), ('cnn', dict(ema=.5, amp=True))]


def words(way): return '-'.join([way[0], *(k if v is True else f'{k}={v}' for k, v in way[1].items())])


@pytest.mark.parametrize('way', WAYS, ids=words)
def test_a_run_logs_what_its_checkpoint_gives(way, tmp_path, seen):
    name, changes = way
    cfg = MAKE[name](**{'amp': False} | changes)
    (_, first), (_, last) = check(cfg, tmp_path / 'run', seen)
    if first and not cfg.frozen_backbone:
        assert first != pytest.approx(last, rel=1e-3), 'the CNN did not learn, so the test shows nothing'


@pytest.mark.parametrize('changes', [{}, dict(ema=.5, amp=True)], ids=str)
def test_a_mask_head_logs_what_its_checkpoint_gives(changes, tmp_path, seen):
    """Its detector is frozen, and its CNN says it is not where the file comes from a run that trained it."""
    boxes = MAKE['boxes'](epochs=1, amp=False)
    run_and_note(boxes, tmp_path / 'boxes', seen)
    check(MAKE['masks'](pretrain=str(tmp_path / 'boxes' / 'checkpoint.pth'), **{'amp': False} | changes), tmp_path / 'masks', seen)


@pytest.mark.parametrize('changes', [dict(frozen_backbone=False), dict(frozen_backbone=False, amp=True, compile=True),
                                     dict(compile=True), dict(ema=.5)], ids=str)
def test_a_preview_shows_what_the_checkpoint_answers(changes, tmp_path):
    """Pre-training measures nothing; it draws."""
    cfg = make_config('paper', **MODEL | CNN | RATES | dict(num_patches=2, batch_size=4, epochs=1, views=8, view_size=64, patch_size=32,
                                                          features='layer2'),
                      **{'amp': False} | changes)
    task = open_task(cfg, tmp_path / 'run')
    train(task, cfg, task.run_dir, task.processes)
    model, _ = load_updetr(tmp_path / 'run' / 'checkpoint.pth')
    if cfg.ema: model.load_state_dict(load_checkpoint(tmp_path / 'run' / 'checkpoint.pth')['model'])  # it draws the present weights
    draw_preview(model, preview_photo(task.heldout if len(task.heldout) else task.photos), tmp_path / 'again.png', cfg.patch_size)
    assert (tmp_path / 'again.png').read_bytes() == (tmp_path / 'run' / 'preview.png').read_bytes()


def test_a_cnn_is_taken_over_as_it_was_measured(tmp_path, seen):
    """The averaged weights, wherever a run's file is given as `weights`."""
    run_and_note(MAKE['cnn'](ema=.5, amp=False), tmp_path / 'run', seen)
    file = tmp_path / 'run' / 'checkpoint.pth'
    taken, state = build_backbone('test_resnet', str(file), ['layer2']).body.state_dict(), load_checkpoint(file)
    assert all(torch.equal(v, state['ema'][f'body.{k}']) for k, v in taken.items())
    assert not all(torch.equal(v, state['model'][f'body.{k}']) for k, v in taken.items())
