"""Runs that are killed, stopped, spread over processes or given impossible parameters.

What is stopped is a real `python -m updetr`; what is killed, or spread over processes, is forks that do what it does. Undisturbed runs
and last resumptions happen in this process, which has imported torch already.
"""
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from tools.processes import Trainer, trained
from updetr.core.checkpoint import load_checkpoint, write_json
from updetr.core.config import make_config
from updetr.tasks.pretrain_task import PretrainTask
from updetr.train.loop import Processes, run

TINY = dict(views=32, view_size=64, patch_size=32, hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2, num_queries=10, num_patches=5,
            batch_size=4, epochs=5, log_every=1, save_every=3, dropout=.1)
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONUNBUFFERED': '1'}


@pytest.fixture(scope='module', autouse=True)
def as_in_the_processes():
    """One thread and no GPU here, too: sums of many threads are rounded in another order."""
    threads, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    torch.set_num_threads(1)
    patch.setattr(torch.cuda, 'is_available', lambda: False)
    yield
    patch.undo()
    torch.set_num_threads(threads)


def make_run(folder, **changes):
    folder.mkdir(parents=True)
    write_json(folder / 'cfg.json', dataclasses.asdict(make_config('demo', **TINY | changes)))
    return folder


def command(folder): return [sys.executable, '-m', 'updetr', '--cfg', str(folder / 'cfg.json')]


def finish(folder): run(folder / 'cfg.json')


def logged(folder, key='train_loss'):
    """A number of every step; of a step that was done twice, both must agree."""
    seen = {}
    for row in map(json.loads, (folder / 'log.txt').read_text().splitlines()):
        assert seen.setdefault(row['step'], row[key]) == row[key], f"step {row['step']} was done twice with different results"
    return [seen[s] for s in sorted(seen)]


def weights(folder): return load_checkpoint(folder / 'checkpoint.pth')['model']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder of runs: they share the bank of features, which the first one makes."""
    return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def whole(runs):
    """The undisturbed run."""
    finish(folder := make_run(runs / 'whole'))
    return folder


@pytest.fixture(scope='module')
def one(runs):
    """An undisturbed run of one process, without dropout: its numbers do not depend on who computes them."""
    finish(folder := make_run(runs / 'one', dropout=0., epochs=2))
    return folder


def test_a_run_is_complete(whole):
    assert len(logged(whole)) == 40 and json.loads((whole / 'done.json').read_text())['step'] == 40 and (whole / 'preview.png').exists()


def kill_twice(folder, steps):
    """Run a folder and kill it after a random number of logged steps, two times."""
    for at in sorted(random.Random(0).sample(steps, 2)):
        process, log = Trainer(folder).processes[0], folder / 'log.txt'
        while process.is_alive() and (not log.exists() or log.read_text().count('"train_loss"') < at): time.sleep(.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, 'the run was over before it could be killed'


def test_killed_twice_and_resumed_is_the_same_run(whole, runs, capsys):
    kill_twice(folder := make_run(runs / 'killed'), range(4, 36))
    finish(folder)
    assert 'resumed after step' in capsys.readouterr().out
    assert logged(folder) == logged(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(folder).values(), weights(whole).values(), strict=True))


def test_sigterm_saves_first(whole, runs):
    folder = make_run(runs / 'stopped', save_every=1000)
    process = subprocess.Popen(command(folder), env=ENV, stdout=subprocess.PIPE, text=True)
    while not (folder / 'log.txt').exists(): time.sleep(.01)
    process.terminate()
    out = process.communicate(timeout=60)[0]
    step = load_checkpoint(folder / 'checkpoint.pth')['step']
    assert process.returncode == 0 and f'stopped after step {step}' in out and step == len(logged(folder)) < 40
    write_json(folder / 'cfg.json', json.loads((folder / 'cfg.json').read_text()) | {'save_every': 3})
    finish(folder)
    assert logged(folder) == logged(whole)


def test_another_number_of_processes_keeps_the_batches(one, tmp_path, capsys):
    """Begun with two processes (which share the making of the bank), gone on with one: the numbers are those of one from the start."""
    folder = make_run(tmp_path / 'run', dropout=0., epochs=2)
    before = (folder / 'cfg.json').read_text()
    trainer = Trainer(folder, world=2)
    trainer.until(lambda: (folder / 'checkpoint.pth').exists())
    for process in trainer.processes: process.terminate()
    assert trainer.wait() == [0, 0], trainer.said()
    assert before == (folder / 'cfg.json').read_text() and not (folder / 'done.json').exists()
    finish(folder)
    assert 'on 1 processes instead of 2' in capsys.readouterr().out
    assert logged(folder) == pytest.approx(logged(one), rel=1e-3)


def test_two_processes_are_one(one, runs):
    """Same losses, gradient norms and weights, within rounding. (test_launch shows that two agents on two machines find each other.)"""
    trained(folder := make_run(runs / 'two', dropout=0., epochs=2), 2)
    assert len(logged(folder)) == 16 and (folder / 'done.json').exists()
    # Two micro-batches in one process are the same sums in the same order. A whole batch rounds otherwise: two steps agree, then kinks of
    # the losses (L1, GIoU) and AdamW's steps along gradients of nearly zero make more of it, how much depends on the CPU.
    finish(same_sums := make_run(runs / 'micro_batches', dropout=0., epochs=2, accumulate=2))
    for key in ('train_loss', 'train_grad_norm'):
        assert logged(folder, key) == pytest.approx(logged(same_sums, key), rel=1e-5)
        assert logged(folder, key)[:2] == pytest.approx(logged(one, key)[:2], rel=1e-5)
    pairs = zip(weights(same_sums).values(), weights(folder).values(), strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in pairs)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, 'barrier', lambda self: None)
    monkeypatch.setattr(Processes, 'gather', lambda self, x: [x])
    (tmp_path / 'run').mkdir()
    with pytest.raises(ValueError, match='batch_size 3 cannot be divided among 2 processes'):
        PretrainTask(make_config('demo', **TINY | {'batch_size': 3}), tmp_path / 'run', Processes(0, 2))


def test_who_watches_from_elsewhere_sees_a_run_that_logs_nothing(runs, monkeypatch):
    "Each step, and each batch of a measurement, asks whether to stop: that makes the log young again."
    young = []
    monkeypatch.setattr(os, 'utime', lambda file: young.append(file))
    finish(folder := make_run(runs / 'quiet', epochs=1))
    assert young and set(young) == {folder / 'log.txt'}


def test_a_changed_configuration_is_refused_by_name(whole, runs):
    folder = make_run(runs / 'changed', lr=5e-4)
    (folder / 'checkpoint.pth').write_bytes((whole / 'checkpoint.pth').read_bytes())
    with pytest.raises(ValueError, match='lr: 0.001 -> 0.0005'): finish(folder)


def test_checkpoints_are_plain_tensors(whole):
    state = torch.load(whole / 'checkpoint.pth', weights_only=True)
    assert {'model', 'optimizer', 'lr_scheduler', 'epoch', 'args', 'step', 'rng'} <= set(state) and len(state['rng']) == 1
