"""Launching, with real processes: what a notebook cannot show of notebooks 04, 34 and 35. The trainer here is a fake one that counts."""
import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

import updetr.core.signals
import updetr.train.launch
from test_resume import TINY
from updetr.core.config import make_config
from updetr.experiments.runner import run_jobs
from updetr.train.launch import _members, attach, follow, is_alive, launch, read_log, stop, torchrun_command
from updetr.train.progress import Screen, watch

FAKE = '''
import json, os, pathlib, sys, time
from signals import StopFlag, ignore_stop
cfg = pathlib.Path(sys.argv[sys.argv.index('--cfg') + 1])
run, cfg, rank = cfg.parent, json.loads(cfg.read_text()), int(os.environ['RANK'])
last = run/'last'
step = int(last.read_text()) if last.exists() else 0
if cfg.get('fails') == [rank, step]: raise ValueError(f'loss of rank {rank} is not finite')
(run/f'pid{rank}').write_text(str(os.getpid()))
time.sleep(cfg.get('import_seconds', 0))
with StopFlag() as stop:
    if cfg.get('dist'):
        import torch, torch.distributed as dist
        dist.init_process_group('gloo')
        world = torch.ones(())
        dist.all_reduce(world)
        assert world == cfg['dist']
    if cfg.get('loader'):
        from torch.utils.data import DataLoader
        batches = iter(DataLoader(range(10**6), num_workers=1, worker_init_fn=ignore_stop))
    (run/f'ready{rank}').touch()
    while step < cfg['steps'] and (cfg.get('deaf') or not stop):
        step += 1
        if cfg.get('fails') == [rank, step]: raise ValueError(f'loss of rank {rank} is not finite')
        if cfg.get('loader'): next(batches)
        if rank == 0:
            with open(run/'log.txt', 'a') as f: f.write(json.dumps({'step': step, 'train_loss': 1/step, 'time': time.time()}) + chr(10))
        time.sleep(.05)
    if cfg.get('loader'): next(batches)
    reason = stop.reason
    (run/'saving').touch()
    time.sleep(cfg.get('save_seconds', 0))       # as the real trainer saves: a second request to stop finds the first one's handler
    if rank == 0:
        last.write_text(str(step))
        (run/'why').write_text(str(reason))
        if step == cfg['steps']: (run/'done.json').write_text(json.dumps({'step': step}))
'''
LONG = 2000      # steps of a run that does not end by itself within a test
ENDLESS = dict(views=8, epochs=10**5, save_every=10**6)     # the same of a real one, which should not save meanwhile


def until(condition, seconds=60):
    "Wait for a condition, and return it."
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.05)
    return value


def mark(run): return json.loads((run/'launch.json').read_text())['mark']
def launcher(run): return json.loads((run/'launch.json').read_text())['pid']


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "A folder for runs, with the fake trainer importable; nothing of the runs lives afterwards."
    code = tmp_path/'code'
    code.mkdir()
    (code/'fake.py').write_text(FAKE)
    shutil.copy(updetr.core.signals.__file__, code/'signals.py')      # alone, so that the fake trainer need not import all of updetr
    monkeypatch.setenv('PYTHONPATH', f"{code}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    yield tmp_path
    for record in tmp_path.glob('*/launch.json'): stop(record.parent, timeout=0)


def start(run, processes=1, **cfg): return launch(run, {'steps': LONG, **cfg}, processes=processes, module='fake')


def test_outlives_a_killed_notebook_and_is_stopped_from_another(runs):
    run = runs/'a'
    code = (f"from updetr.train.launch import launch; import time; launch({str(run)!r}, {{'steps': {LONG}}}, module='fake'); "
            "print('up', flush=True); time.sleep(60)")
    kernel = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, start_new_session=True)
    kernel.stdout.readline()
    os.killpg(kernel.pid, signal.SIGKILL)
    kernel.wait()
    seen = len(until(lambda: read_log(run)))
    until(lambda: len(read_log(run)) > seen + 3)
    assert attach(run).how == 'attached'
    again = start(run)                                      # a re-run notebook
    assert again.how == 'attached' and again.process is None
    with pytest.raises(ValueError, match='steps: 2000 -> 9'):
        launch(run, {'steps': 9}, module='fake')
    assert stop(run) and not is_alive(run) and _members(mark(run)) == []
    assert (run/'why').read_text() == 'SIGTERM' and int((run/'last').read_text()) == read_log(run)[-1]['step']


def test_stopped_run_goes_on_where_it_was(runs):
    run = runs/'a'
    start(run, steps=30)
    until(lambda: len(read_log(run)) > 3)
    assert stop(run)
    with pytest.raises(RuntimeError, match='not running'): attach(run)
    assert start(run, steps=30).how == 'started'
    shown = []
    rows = watch(run, every=.2, draw=None, show=lambda line, fig: shown.append(line))
    assert [r['step'] for r in rows] == list(range(1, 31))
    assert len(set(shown)) == len(shown) and '30/30' in shown[-1]
    assert start(run, steps=30).how == 'finished'
    more = launch(run, {'steps': 32}, module='fake', may_change=('steps',))
    assert more.how == 'started' and list(follow(more, .2))[-1][-1]['step'] == 32


def test_a_living_run_is_not_asked_for_other_epochs(runs):
    "It has read its configuration: what it would not do is refused, and not dropped; once it is stopped, it may."
    run = runs/'a'
    def ask(**changes): return start(run, **dict(schedule='step', epochs=3, patience=0, data='here', log_every=10) | changes)
    ask()
    held = (run/'cfg.json').read_text()
    for changes, words in ((dict(epochs=4), 'epochs: 3 -> 4'), (dict(epochs=2), 'epochs: 3 -> 2'), (dict(patience=5), 'patience: 0 -> 5')):
        with pytest.raises(ValueError, match=rf'goes on as it was started, without this change \({words}\): wait') as e: ask(**changes)
        assert f"or stop it (updetr.train.launch.stop('{run}'))" in str(e.value)
    with pytest.raises(ValueError, match='goes on as it was started, without this change .steps: 2000 -> 9'):
        launch(run, json.loads(held) | {'steps': 9}, module='fake', may_change=('steps',))
    # where its data lie now, and how often it says something, changes nothing
    assert ask(data='there', log_every=1).how == 'attached' and (run/'cfg.json').read_text() == held
    assert stop(run) and ask(epochs=4).how == 'started' and json.loads((run/'cfg.json').read_text())['epochs'] == 4


def test_launches_at_once_make_one_run(runs):
    run, gate = runs/'a', threading.Barrier(6)
    run.mkdir()
    (run/'launch.json').write_text(json.dumps({'pid': 1, 'mark': '0'*32, 'host': socket.gethostname()}))     # of a run that died

    def race(_):
        gate.wait()
        return start(run).how
    with ThreadPoolExecutor(6) as pool: assert sorted(pool.map(race, range(6))) == ['attached']*5 + ['started']


def test_recycled_number_is_not_alive(runs):
    run = runs/'a'
    start(run)
    old = json.loads((run/'launch.json').read_text())
    stop(run, timeout=0)
    innocent = subprocess.Popen(['sleep', '60'])
    (run/'launch.json').write_text(json.dumps({**old, 'pid': innocent.pid}))
    assert not is_alive(run)
    assert stop(run) and innocent.poll() is None
    innocent.kill()
    innocent.wait()


def test_a_copied_folder_is_another_run(runs):
    run, copy = runs/'a', runs/'copy'
    start(run)
    until(lambda: len(read_log(run)) > 3)
    shutil.copytree(run, copy)
    assert is_alive(run) and not is_alive(copy)
    with pytest.raises(RuntimeError, match='not running'): attach(copy)
    assert stop(copy) and is_alive(run)
    assert start(copy).how == 'started' and mark(copy) != mark(run)
    assert stop(copy) and is_alive(run) and not is_alive(copy)
    record = json.loads((run/'launch.json').read_text())
    (run/'launch.json').write_text(json.dumps({k: v for k, v in record.items() if k != 'folder'}))
    assert start(run).how == 'attached'                     # a run that an older version has launched
    assert stop(run)


def test_a_renamed_folder_is_the_same_run(runs):
    """The real trainer: it goes on, is found by the new name, and saves there when it is stopped by it."""
    cfg = dataclasses.asdict(make_config('demo', **TINY | ENDLESS))
    launch(runs/'a', cfg)
    seen = len(until(lambda: read_log(runs/'a')))
    (runs/'a').rename(runs/'b')
    until(lambda: len(read_log(runs/'b')) > seen + 3)
    assert launch(runs/'b', cfg).how == 'attached' and not (runs/'a').exists()
    assert stop(runs/'b') and not is_alive(runs/'b') and (runs/'b/checkpoint.pth').exists() and not (runs/'a').exists()


def test_run_of_another_machine_is_attached_to_while_it_logs(runs):
    run = runs/'a'
    run.mkdir()
    (run/'launch.json').write_text(json.dumps({'pid': 1, 'mark': '0'*32, 'host': f'not-{socket.gethostname()}'}))
    log = run/'log.txt'
    log.write_text('{"step": 1}\n')
    assert start(run).how == 'attached'
    with pytest.raises(RuntimeError, match='stop it where it was started'): stop(run)
    os.utime(log, (0, 0))                                   # that machine has been silent since 1970
    (run/'progress.json').write_text('{}')                  # but it makes its feature bank now
    assert start(run).how == 'attached'
    os.utime(run/'progress.json', (0, 0))
    assert start(run).how == 'started'


@pytest.mark.parametrize('when', [0, 3])
def test_dead_worker_turns_red_with_its_own_words(runs, when):
    run = runs/'a'
    start(run, processes=2, fails=[1, when])
    with pytest.raises(RuntimeError, match='loss of rank 1 is not finite') as e: watch(run, every=.2, draw=None, show=lambda *_: None)
    assert 'process 1 failed first' in str(e.value) and 'Traceback' in str(e.value)
    assert ('before its first step' in str(e.value)) == (not read_log(run))
    assert _members(mark(run)) == []


def test_module_that_does_not_exist_is_named(runs):
    launch(runs/'a', {}, module='no_such_trainer')
    with pytest.raises(RuntimeError, match='before its first step(.|\n)*no_such_trainer'): list(follow(runs/'a', .2))


@pytest.mark.parametrize('when, import_seconds', [('pid', 1), ('ready', 0)])
def test_killed_launcher_leaves_no_orphan_and_launch_goes_on(runs, when, import_seconds):
    run = runs/'a'
    start(run, processes=2, import_seconds=import_seconds)
    until(lambda: all((run/f'{when}{r}').exists() for r in range(2)))
    os.kill(launcher(run), signal.SIGKILL)                  # while the workers still import, or in the midst of training
    until(lambda: _members(mark(run)) == [], 10)
    assert not is_alive(run) and (run/'why').read_text() == 'launcher gone'
    with pytest.raises(RuntimeError, match='not at its end'): list(follow(run, .2))
    assert start(run, import_seconds=import_seconds).how == 'started'


@pytest.mark.parametrize('loader', [False, True])
def test_launch_waits_while_an_orphan_saves(loader, runs):
    "It alone is asked to stop: one whose data-loading child is ended saves nothing."
    run = runs/'a'
    start(run, save_seconds=1, loader=loader)
    until(lambda: (run/'ready0').exists())
    os.kill(launcher(run), signal.SIGKILL)
    until(lambda: not is_alive(run))
    until(lambda: (run/'saving').exists())                  # it has seen that its launcher is gone
    assert start(run, save_seconds=1, loader=loader).how == 'started' and (run/'why').read_text() == 'launcher gone'


def test_a_save_may_take_longer_than_the_launcher_waits(runs, monkeypatch):
    "torchrun kills its workers some seconds after a SIGTERM of its own (30 before torch 2.12): it is not what is asked."
    monkeypatch.setenv('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', '1')
    run = runs/'a'
    start(run, processes=2, save_seconds=4)
    until(lambda: (run/'ready0').exists() and (run/'ready1').exists())
    assert stop(run) and (run/'why').read_text() == 'SIGTERM' and int((run/'last').read_text()) == read_log(run)[-1]['step']
    assert 'Traceback' not in (run/'train.log').read_text() and _members(mark(run)) == []


def test_a_launcher_without_workers_is_stopped(runs):
    run = runs/'a'
    start(run)                                              # it still imports torch
    assert stop(run, timeout=20) and not (run/'ready0').exists() and not is_alive(run)


def test_deaf_workers_are_killed_after_the_timeout(runs):
    run = runs/'a'
    start(run, processes=2, deaf=True)
    until(lambda: (run/'ready0').exists() and (run/'ready1').exists())
    assert len(_members(mark(run))) == 3                    # the launcher and two workers, each in a session of its own
    assert not stop(run, timeout=.5)
    assert _members(mark(run)) == [] and not (run/'why').exists()


def test_interrupt_saves_in_spite_of_data_loading_children(runs):
    run = runs/'a'
    start(run, loader=True)
    until(lambda: len(read_log(run)) > 3)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell's background job ignores SIGINT
    threading.Timer(.5, signal.raise_signal, [signal.SIGINT]).start()
    shown = []
    with pytest.raises(KeyboardInterrupt, match='saved and stopped: launch it again'):
        watch(run, every=.2, draw=None, timeout=20, show=lambda line, fig=None: shown.append(line))
    signal.signal(signal.SIGINT, old)
    assert shown[-1].endswith('interrupted, saving') and (run/'why').read_text() == 'SIGTERM', (run/'train.log').read_text()
    assert int((run/'last').read_text()) == read_log(run)[-1]['step']


def test_two_machines_on_loopback(runs):
    run, cfg = runs/'a', {'steps': 3, 'dist': 2}
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        meet = {'nnodes': 2, 'rdzv_endpoint': f'127.0.0.1:{s.getsockname()[1]}'}
    launch(run, cfg, module='fake', **meet)
    other = subprocess.Popen(torchrun_command(run, module='fake', **meet), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert list(follow(run, .2))[-1][-1]['step'] == 3
    assert other.wait(60) == 0, other.stdout.read()
    until(lambda: not is_alive(run))
    assert Path(run/'ready1').exists()                      # rank 1 of the other agent
    with pytest.raises(ValueError, match='rdzv_endpoint'): launch(runs/'b', {}, nnodes=2)


def test_nothing_listens_on_the_network(tmp_path):
    "All sockets of a real run of two processes, and of its launcher, are of this machine alone: no other machine can connect."
    run = tmp_path/'run'
    try:
        launch(run, dataclasses.asdict(make_config('demo', **TINY | ENDLESS)), processes=2)
        until(lambda: read_log(run) or not is_alive(run), 600)
        assert is_alive(run), (run/'train.log').read_text()
        members = _members(mark(run))
        sockets = [(p.pid, end[0]) for p in members for c in p.net_connections('inet') for end in (c.laddr, c.raddr) if end]
    finally: stop(run, timeout=0)
    assert len(members) == 3 and len({pid for pid, _ in sockets}) == 2      # the workers talk to each other, the launcher to nobody
    assert {address.removeprefix('::ffff:') for _, address in sockets} <= {'127.0.0.1', '::1'}


def test_no_shell_reads_what_the_user_gives(runs, monkeypatch):
    "Names and values that a shell would carry out, in the folder's name and in the configuration, arrive as they are."
    monkeypatch.chdir(runs)
    evil = "$(touch MADE); `touch MADE` & touch MADE #'\""
    (run := runs/evil).mkdir()
    start(run, steps=2, note=evil)
    until(lambda: not is_alive(run))
    assert json.loads((run/'cfg.json').read_text())['note'] == evil and (run/'done.json').exists()
    assert not list(runs.rglob('MADE')) and not Path('MADE').exists()


class Narrow(io.StringIO):
    "A terminal of twenty columns."
    def isatty(self): return True


@pytest.mark.parametrize('kind', [Narrow, io.StringIO], ids=['terminal', 'file'])
def test_a_line_fits_a_terminal_and_a_file_keeps_each_that_is_new(kind, tmp_path, monkeypatch):
    "A longer one would wrap, and leave its begin behind; what comes afterwards begins a line."
    monkeypatch.setenv('COLUMNS', '20')
    monkeypatch.setattr('sys.stderr', stderr := kind())
    screen, long = Screen(), 'step 2/9 · loss 0.25 · 3 min left'
    for line in ('step 1', long, long, 'step 3'): screen(line)
    run_jobs([], tmp_path, show=screen)
    run_jobs([], tmp_path, show=screen)
    lines = '\r\x1b[Kstep 1\r\x1b[Kstep 2/9 · loss 0.2\r\x1b[Kstep 3\n' if stderr.isatty() else f'step 1\n{long}\nstep 3\n'
    assert stderr.getvalue() == lines


@pytest.mark.parametrize('kind', [Narrow, io.StringIO], ids=['terminal', 'file'])
def test_a_watched_run_ends_its_line(kind, tmp_path, monkeypatch):
    monkeypatch.setenv('COLUMNS', '20')
    monkeypatch.setattr('sys.stderr', stderr := kind())
    (tmp_path/'log.txt').write_text('{"step": 9, "train_loss": 0.5, "epoch": 3}\n')
    (tmp_path/'done.json').write_text('{"step": 9}')
    watch(tmp_path)
    line = 'step 9 · epoch 3 · loss 0.5'
    assert stderr.getvalue() == (f'\r\x1b[K{line[:19]}\n' if stderr.isatty() else f'{line}\n')


def test_who_looks_on_takes_a_tenth_of_the_time(tmp_path, monkeypatch):
    "The log of days is long: to read it and to draw its curves may take longer than the time between two looks; an hour is no look."
    clock, slept = [0.], []
    monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])
    monkeypatch.setattr(time, 'sleep', slept.append)
    monkeypatch.setattr(updetr.train.launch, '_seems_alive', lambda run: True)
    for look, _ in enumerate(follow(tmp_path, every=5)):
        clock[0] += (.1, 3., 3600., 0.)[look]
        if look == 2: (tmp_path/'done.json').write_text('{}')
    assert slept == [5, 27, 60]


def test_a_disk_without_locks_is_named_where_they_are_needed(tmp_path):
    "Lustre without flock, NFS without a lock service: several machines meet over the network, one in a file."
    def none(*asked): raise OSError(errno.ENOSYS, 'Function not implemented')
    locks = SimpleNamespace(LOCK_EX=2, flock=none)
    with open(tmp_path / 'lock', 'w') as file:
        updetr.train.launch._lock(file, locks, needed=False)
        with pytest.raises(OSError, match='Function not implemented: a run needs a disk where files can be locked.*lock'):
            updetr.train.launch._lock(file, locks, needed=True)
