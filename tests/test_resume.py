"""Runs that are killed, stopped, spread over processes or given impossible parameters, as real `python -m updetr` processes."""
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from updetr.checkpoint import load_checkpoint, write_json
from updetr.config import make_config

TINY = dict(views=32, view_size=64, patch_size=32, hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2, num_queries=10, num_patches=5,
            batch_size=4, epochs=5, log_every=1, save_every=3, dropout=.1)
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONUNBUFFERED': '1'}


def make_run(folder, **changes):
    folder.mkdir(parents=True)
    write_json(folder / 'cfg.json', dataclasses.asdict(make_config('demo', **TINY | changes)))
    return folder


def command(run, processes=1, *more):
    torchrun = ['-m', 'torch.distributed.run', *(more or ['--standalone']), '--nproc-per-node', str(processes)] if processes > 1 or more else []
    return [sys.executable, *torchrun, '-m', 'updetr', '--cfg', str(run / 'cfg.json')]


def finish(run, processes=1):
    r = subprocess.run(command(run, processes), env=ENV, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    return r.stdout


def losses(run):
    """Loss of every step; of a step that was done twice, both must agree."""
    seen = {}
    for row in map(json.loads, (run / 'log.txt').read_text().splitlines()):
        assert seen.setdefault(row['step'], row['train_loss']) == row['train_loss'], f"step {row['step']} had two losses"
    return [seen[s] for s in sorted(seen)]


def weights(run): return load_checkpoint(run / 'checkpoint.pth')['model']


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The undisturbed run."""
    run = make_run(tmp_path_factory.mktemp('whole') / 'run')
    finish(run)
    return run


def test_a_run_is_complete(whole):
    assert len(losses(whole)) == 40 and json.loads((whole / 'done.json').read_text())['step'] == 40 and (whole / 'preview.png').exists()


def test_killed_twice_and_resumed_is_the_same_run(whole, tmp_path):
    run, rng = make_run(tmp_path / 'run'), random.Random(0)
    for at in sorted(rng.sample(range(4, 36), 2)):
        process = subprocess.Popen(command(run), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not (run / 'log.txt').exists() or (run / 'log.txt').read_text().count('"step"') < at): time.sleep(.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, 'the run was over before it could be killed'
    assert 'resumed after step' in finish(run)
    assert losses(run) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(whole).values(), strict=True))


def test_sigterm_saves_first(whole, tmp_path):
    run = make_run(tmp_path / 'run', save_every=1000)
    process = subprocess.Popen(command(run), env=ENV, stdout=subprocess.PIPE, text=True)
    while not (run / 'log.txt').exists(): time.sleep(.01)
    process.terminate()
    out = process.communicate(timeout=60)[0]
    step = load_checkpoint(run / 'checkpoint.pth')['step']
    assert process.returncode == 0 and f'stopped after step {step}' in out and step == len(losses(run)) < 40
    cfg = json.loads((run / 'cfg.json').read_text()) | {'save_every': 3}
    write_json(run / 'cfg.json', cfg)
    finish(run)
    assert losses(run) == losses(whole)


def test_two_processes_are_one(tmp_path):
    """Same global batch, no dropout: same losses, same gradient norms, same weights within rounding."""
    one, two = (make_run(tmp_path / n / 'run', dropout=0., epochs=1) for n in ('one', 'two'))
    finish(one), finish(two, 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    norms = [[json.loads(line)['train_grad_norm'] for line in (r / 'log.txt').read_text().splitlines()] for r in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-3) for a, b in zip(weights(one).values(), weights(two).values(), strict=True))


def test_another_number_of_processes_keeps_the_batches(tmp_path):
    """Begun with two processes, gone on with one: the losses are those of a run with one from the start."""
    one, changed = (make_run(tmp_path / n / 'run', dropout=0., epochs=2, save_every=8) for n in ('one', 'changed'))
    finish(one)
    short = json.loads((changed / 'cfg.json').read_text())
    process = subprocess.Popen(command(changed, 2), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (changed / 'checkpoint.pth').exists(): time.sleep(.01)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)
    assert short == json.loads((changed / 'cfg.json').read_text()) and not (changed / 'done.json').exists()
    assert 'on 1 processes instead of 2' in finish(changed)
    assert losses(changed) == pytest.approx(losses(one), rel=1e-3)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    run = make_run(tmp_path / 'run', batch_size=3)
    r = subprocess.run(command(run, 2), env=ENV, capture_output=True, text=True, timeout=120)
    assert r.returncode and 'batch_size 3 cannot be divided among 2 processes' in r.stderr + r.stdout


def test_a_changed_configuration_is_refused_by_name(whole, tmp_path):
    run = make_run(tmp_path / 'run', lr=5e-4)
    (run / 'checkpoint.pth').write_bytes((whole / 'checkpoint.pth').read_bytes())
    r = subprocess.run(command(run), env=ENV, capture_output=True, text=True, timeout=120)
    assert r.returncode and 'lr: 0.001 -> 0.0005' in r.stderr


def test_two_agents_meet_on_loopback(tmp_path):
    """Two `torch.distributed.run` agents, as on two machines."""
    run = make_run(tmp_path / 'run', epochs=1)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    meet = ['--nnodes', '2', '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'127.0.0.1:{port}', '--rdzv-id', 'test', '--local-addr', '127.0.0.1']
    agents = [subprocess.Popen(command(run, 1, *meet), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    out = [a.communicate(timeout=120)[0] for a in agents]
    assert [a.returncode for a in agents] == [0, 0], out
    assert len(losses(run)) == 8 and (run / 'done.json').exists()


def test_checkpoints_are_plain_tensors(whole):
    state = torch.load(whole / 'checkpoint.pth', weights_only=True)
    assert {'model', 'optimizer', 'lr_scheduler', 'epoch', 'args', 'step', 'rng'} <= set(state) and len(state['rng']) == 1
