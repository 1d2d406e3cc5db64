"The training loop in numbers that its notebook does not compare: rates, speed, seconds, what processes draw and how often they talk."
import dataclasses
import json
import shutil
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from updetr.core.checkpoint import load_checkpoint, read_json, save_checkpoint
from updetr.core.config import MOST, make_config
from updetr.model.detr import build_detr
from updetr.train.loop import Processes, RunLog, TrainState, build_optimizer, lr_factor, skip_step, train, train_step

CFG = dataclasses.replace(make_config('demo'), epochs=1, save_every=100, log_every=1, batch_size=8, schedule='step', warmup=0., lr=.1)


class Loss(nn.Module):
    "y = sum(x), of which dropout hides a half."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Dropout(.5), nn.Linear(8, 1))

    def forward(self, x): return (self.model(x)[:, 0] - x.sum(1)).square().mean(), {}


class Task:
    "Four steps an epoch, nothing is measured."
    steps_per_epoch, measure_every, notes = 4, 0, {}

    def __init__(self):
        self.module = Loss()
        self.model = self.module.model

    def preview(self, path): pass
    def begin(self, resumed): pass
    def batches(self, start, total): return (torch.full((8, 8), step + 1.) for step in range(start, total))


def run_in(folder, rank=0, **changes):
    folder.mkdir(exist_ok=True)
    return train(Task(), dataclasses.replace(CFG, **changes), folder, Processes(rank))


@pytest.mark.parametrize('schedule', ['step', 'cosine'])
def test_rates_are_those_of_torch_s_schedulers(schedule):
    "Also after a second drop."
    cfg, optimizer = dataclasses.replace(CFG, schedule=schedule, lr_drop=3), torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.)
    theirs = StepLR(optimizer, 3 * 4) if schedule == 'step' else CosineAnnealingLR(optimizer, 40)
    for step in range(40):
        assert lr_factor(step, 40, 4, cfg) == pytest.approx(optimizer.param_groups[0]['lr'], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_a_line_tells_means_and_speed_since_the_last_one(tmp_path, monkeypatch):
    "Half a second a step, eight photos each; a measurement takes a minute, and is no training."
    clock = [100.]
    monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])
    log, state = RunLog(tmp_path, Processes(), 8), TrainState(nn.Linear(1, 1), CFG)
    for state.step in range(1, 7):
        clock[0] += .5
        log.add(['loss', 'accuracy'], torch.tensor([1., 2.]) * state.step)
        if state.step % 3 == 0: log.write(state, 4)
        if state.step == 3:
            clock[0] += 60
            log.append({'step': 3, 'test_AP': 9.})
    rows = [json.loads(line) for line in (tmp_path / 'log.txt').read_text().splitlines()]
    told = [[r[k] for k in ('step', 'epoch', 'train_loss', 'train_accuracy', 'img_s')] for r in rows if 'test_AP' not in r]
    assert told == [[3, 0, 2., 4., 16.], [6, 1, 5., 10., 16.]] and len(rows) == 3


def test_a_skipped_step_takes_its_time(tmp_path, monkeypatch):
    "Half a second a step, eight photos each; of four steps one is skipped."
    clock, task = [100.], Task()
    monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])
    log, state = RunLog(tmp_path, Processes(), 8), TrainState(task.model, dataclasses.replace(CFG, max_skips=1))
    for state.step in range(1, 5):
        clock[0] += .5
        state.skips = int(state.step == 3)
        if state.skips: skip_step(task, state, log, ['loss'], torch.tensor([torch.nan]))
        else: log.add(['loss'], torch.ones(1))
    log.write(state, 4)
    skipped, row = map(json.loads, (tmp_path / 'log.txt').read_text().splitlines())
    assert skipped['skipped'] == 'loss' and row['img_s'] == 3 * 8 / 2


def test_seconds_are_those_of_all_parts_of_a_run(tmp_path):
    run_in(tmp_path)
    file = tmp_path / 'checkpoint.pth'
    save_checkpoint(file, load_checkpoint(file) | {'seconds': 5000.})
    state = run_in(tmp_path, epochs=2)
    assert state.step == 8 and 5000 < state.seconds < 6000 and read_json(tmp_path / 'done.json')['seconds'] == state.seconds


@pytest.mark.parametrize('seed', [0, MOST['seed']])
def test_each_process_draws_numbers_of_its_own(seed, tmp_path):
    "From the start, and where a run goes on with another number of processes."
    first, second = (run_in(tmp_path / f'begun{rank}', rank, seed=seed).model[1].weight for rank in (0, 1))
    assert not torch.equal(first, second)
    file = tmp_path / 'begun0/checkpoint.pth'
    saved = load_checkpoint(file)
    save_checkpoint(file, saved | {'rng': saved['rng'] * 2})
    for rank in (0, 1): shutil.copytree(tmp_path / 'begun0', tmp_path / f'resumed{rank}')
    first, second = (run_in(tmp_path / f'resumed{rank}', rank, epochs=2, seed=seed).model[1].weight for rank in (0, 1))
    assert not torch.equal(first, second)


def test_processes_talk_once_a_step():
    "DDP averages gradients wherever it is not told to wait: three micro-batches would cost three times as much."
    waits = []

    class Apart(Loss):
        def no_sync(self):
            waits.append(True)
            return nullcontext()
    module = Apart()
    train_step(module, iter(Task().batches(0, 3)), TrainState(module.model, dataclasses.replace(CFG, accumulate=3)), 1.)
    assert len(waits) == 2


def test_objects_of_a_step_are_counted_once():
    "Over all its micro-batches: each count waits for all processes."
    counted = []

    class Counts(Loss):
        criterion = SimpleNamespace(shared=lambda targets: counted.append(targets) or nullcontext())

        def forward(self, batch): return super().forward(batch['x'])
    module, batches = Counts(), [{'x': torch.ones(8, 8), 'targets': [k]} for k in range(3)]
    train_step(module, iter(batches), TrainState(module.model, dataclasses.replace(CFG, accumulate=3)), 1.)
    assert counted == [[[0], [1], [2]]]


@pytest.mark.parametrize('learn, rate', [(False, 0.), (True, 3e-4)])
def test_positions_beside_a_frozen_cnn_learn_where_that_is_asked(learn, rate):
    model = build_detr(3, 'resnet18', features=['layer2'], position='learned', frozen_backbone=True, hidden_dim=16, nheads=2,
                       enc_layers=1, dec_layers=1, dim_feedforward=16, num_queries=4)
    cfg = dataclasses.replace(CFG, frozen_backbone=True, learn_positions=learn, lr_backbone=3e-4)
    others, positions = build_optimizer(model, cfg).param_groups
    assert (others['lr'], positions['lr']) == (cfg.lr, rate)
    assert {id(p) for p in positions['params']} == {id(p) for p in model.backbone[1].parameters()}


def test_what_a_board_says_is_not_said_of_the_log(tmp_path):
    "Its line is written, and its failure is its own."
    def refuse(row): raise PermissionError(13, 'no access', 'events')
    log = RunLog(tmp_path, Processes(), 8, refuse)
    with pytest.raises(PermissionError) as e: log.append({'step': 1})
    assert e.value.filename == 'events' and json.loads((tmp_path / 'log.txt').read_text()) == {'step': 1}
