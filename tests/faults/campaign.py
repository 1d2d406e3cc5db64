"""Faults on real training processes: each run is struck once, goes on, and must end as the undisturbed one.

    python tests/faults/campaign.py                              the short form, as in the tests
    python tests/faults/campaign.py --long                       with runs that `launch` starts
    python tests/faults/campaign.py --long --minutes 120 --report reports/reliability

A fault is a name, a blow that the training process deals itself before a step (so that it lands on that step), what may happen
before the run goes on, and the words that the trainer must say. The trainers are forks of one process that has imported torch.
"""
import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from updetr.core.checkpoint import load_checkpoint, write_json
from updetr.core.config import make_config
from updetr.data import loader
from updetr.tasks import pretrain_task
from updetr.train import loop as training
from updetr.train.launch import _members, is_alive, launch, stop

TINY = dict(views=16, view_size=64, patch_size=32, hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2, num_queries=10, num_patches=5,
            batch_size=4, epochs=3, log_every=1, save_every=3, dropout=.1)
STEP = 8  # the blow falls before this step of 12: two saves are there, after 3 and 6
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['updetr.tasks.pretrain_task'])


# ---- a training process --------------------------------------------------------------------------------------------

def take_environment(environment):
    """Forks have the variables of the moment in which their server began; those of who asks for them count."""
    os.environ.clear()
    os.environ |= environment


def child(folder, fault, rank, world, port, environment):
    """Do what the process does: `updetr.train.loop.run`, as `python -m updetr` does, struck by a fault if there is one."""
    take_environment(environment | {'RANK': str(rank), 'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)})
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    torch.set_num_threads(1)
    multiprocessing.set_start_method('fork', force=True)  # of data-loading children, as in `python -m updetr`
    out = os.open(folder / f'out{rank}.txt', os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for descriptor in (1, 2): os.dup2(out, descriptor)
    if fault and fault.early: fault.early()
    if fault and fault.blow and rank == world - 1: before_steps(lambda step: fault.blow(folder) if step == STEP else None)
    if fault and fault.pace: before_steps(fault.pace)
    try: training.run(folder / 'cfg.json')
    except BaseException:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)  # so that it can be said
        traceback.print_exc()
        sys.exit(1)


def before_steps(act):
    """Call `act` with the number of each step before it is done."""
    step = training.train_step

    def struck(module, batches, state, *more):
        act(state.step + 1)
        return step(module, batches, state, *more)
    training.train_step = struck


class Trainer:
    """A run's processes, and what they left behind."""
    def __init__(self, folder, fault=None, world=1):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        self.folder, self.seen = folder, set()
        self.processes = [CONTEXT.Process(target=child, args=(folder, fault, r, world, port, dict(os.environ))) for r in range(world)]
        for r, p in enumerate(self.processes):
            (folder / f'out{r}.txt').write_text('')
            p.start()

    def until(self, condition, seconds=1800):
        """Wait for a condition, noting all descendants."""
        end = time.monotonic() + seconds
        while not condition():
            for p in self.processes:
                try: self.seen |= {psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)}
                except psutil.Error: pass
            if time.monotonic() > end:
                for p in self.processes: p.kill()
                raise AssertionError(f'{self.folder.name} hangs: {self.said()}')
            time.sleep(.1)  # looking costs more than the trainers' steps

    def wait(self, seconds=1800):
        """Exit codes; negative for signals."""
        self.until(lambda: not any(p.is_alive() for p in self.processes), seconds)
        return [p.exitcode for p in self.processes]

    def said(self): return ''.join((self.folder / f'out{r}.txt').read_text() for r in range(len(self.processes)))

    def orphans(self, seconds=60):
        """Count the descendants that outlive the trainer; data-loading children look for their parent every few seconds."""
        end = time.monotonic() + seconds
        while (left := [p for p in self.seen if lives(p)]) and time.monotonic() < end: time.sleep(.1)
        for p in left: p.kill()
        return len(left)


def lives(process):
    """Neither gone nor dead and waiting for somebody to notice."""
    try: return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error: return False


# ---- faults --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Fault:
    """What happens to a run, and what must be said of it."""
    name: str
    blow: Callable | None = None  # (folder), in the process, before step `STEP`
    code: int = 1  # exit code of the process that is struck; 0: it is not stopped, or stops in good order
    words: tuple = ()  # what it says
    between: Callable | None = None  # (folder), when it has ended
    refusal: tuple = ()  # what the next process says that does not go on; () = it goes on at once
    mend: Callable | None = None  # (folder), after the refusal
    resumed: tuple = ()  # what the process says that goes on
    early: Callable | None = None  # (), in the process, before it begins
    meanwhile: Callable | None = None  # (folder), while the process holds before step `STEP`
    pace: Callable | None = None  # (step), in the process, before every step
    base: str = 'bank'  # which undisturbed run it is compared with
    kept: bool = True  # the log of all steps is still there


@dataclass(frozen=True)
class Signal:
    number: int
    def __call__(self, folder): os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class FullDisk:
    """No file may grow beyond so many bytes."""
    limit: int
    def __call__(self, folder): resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


def kill_in_save(folder):
    def dies(*_): os.kill(os.getpid(), signal.SIGKILL)
    os.replace = dies


def remove_log(folder): (folder / 'log.txt').unlink()


@dataclass(frozen=True)
class ClockJump:
    seconds: float
    def __call__(self, folder):
        real = time.time
        time.time = lambda: real() + self.seconds


def nan_loss(folder):
    forward = pretrain_task.PretrainStep.forward

    def broken(self, batch):
        loss, values = forward(self, batch)
        return loss * torch.nan, values | {'loss_bbox': values['loss_bbox'] * torch.nan}
    pretrain_task.PretrainStep.forward = broken


def no_memory(folder):
    def large(self, batch): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    pretrain_task.PretrainStep.forward = large


def worker_raises():
    get = loader.Views.__getitem__

    def raises(self, item):
        if item[0] == 2: raise OSError('bad sector')
        return get(self, item)
    loader.Views.__getitem__ = raises


def kill_workers(folder):
    for p in psutil.Process().children(): p.kill()


def hold(folder):
    (folder / 'held').touch()
    while not (folder / 'go').exists(): time.sleep(.01)


def second_trainer(folder):
    """Another trainer in the same folder stops at once, and the first does not notice."""
    before, second = (folder / 'out0.txt').read_text(), Trainer(folder)
    codes, said = second.wait(), second.said()
    (folder / 'out0.txt').write_text(before)
    (folder / 'go').touch()
    assert codes == [1] and 'is being trained already, by process' in said, said


def truncate(*names): return Damage(names, False)
def flip_bit(*names): return Damage(names, True)


@dataclass(frozen=True)
class Damage:
    """Saved files lose their end, or get one wrong bit in the middle."""
    names: tuple
    flip: bool
    def __call__(self, folder):
        for name in self.names:
            data = (file := folder / name).read_bytes()
            file.with_suffix('.copy').write_bytes(data)
            middle = len(data) // 2
            file.unlink()  # the previous save may be the same file under another name
            file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:] if self.flip else data[:middle])


def restore(folder):
    for copy in folder.glob('*.copy'): os.replace(copy, copy.with_suffix('.pth'))


def photos_of(folder): return Path(json.loads((folder / 'cfg.json').read_text())['data'])
def hide_photos(folder): photos_of(folder).rename(photos_of(folder).with_name('hidden'))
def show_photos(folder): photos_of(folder).with_name('hidden').rename(photos_of(folder))


def replace_photo(folder):
    photo = photos_of(folder) / '0.png'
    photo.rename(photo.with_suffix('.kept'))
    Image.new('RGB', (120, 90), 'red').save(photo)  # of the same size in pixels


def put_back(folder): (photos_of(folder) / '0.kept').rename(photos_of(folder) / '0.png')


SAVE, PREVIOUS = training.SAVED
KILL, TERM, LIVE = Signal(signal.SIGKILL), Signal(signal.SIGTERM), dict(base='live')
SHORT = [
    Fault('SIGKILL', KILL, -9, resumed=('resumed after step 6', '(1 steps are computed again)')),
    Fault('SIGKILL while saving', kill_in_save, -9, resumed=('resumed after step 6',)),
    Fault('SIGKILL of a rank', KILL, -9, resumed=('resumed after step 6',), base='two'),
    Fault('SIGTERM', TERM, 0, ('stopped after step 8 of 12 (SIGTERM); saved',), resumed=('resumed after step 8',)),
    Fault('disk full while saving', FullDisk(200_000), 1, ('no room for checkpoint.pth', 'Make room')),
    Fault('disk full while logging', FullDisk(10), 1, ('log.txt', 'what was saved before is good')),
    Fault('truncated checkpoint', KILL, -9, between=truncate(SAVE), resumed=('resumed after step 3 (4 steps', 'checkpoint_damaged.pth')),
    Fault('flipped bit in a checkpoint', KILL, -9, between=flip_bit(SAVE), resumed=('checksum', 'resumed after step 3 (4 steps')),
    Fault('both saves damaged', KILL, -9, between=flip_bit(SAVE, PREVIOUS), refusal=('no save of this run can be read',), mend=restore),
    Fault('log file removed', remove_log, 0, kept=False),
    Fault('clock jumps a year ahead', ClockJump(3e7), 0),
    Fault('clock jumps a year back', ClockJump(-3e7), 0),
    Fault('photos vanish before a resume', TERM, 0, between=hide_photos, refusal=('no folder',), mend=show_photos, **LIVE),
    Fault('a photo is replaced before a resume', TERM, 0, between=replace_photo, refusal=('another content',), mend=put_back, **LIVE),
    Fault('a worker raises', None, 1, ('bad sector', 'DataLoader worker'), early=worker_raises, **LIVE),
    Fault('a worker is killed', kill_workers, 1, ('a worker of the data loader died',), **LIVE),
    Fault('loss not finite', nan_loss, 1, ('loss_bbox', 'not finite in step 8, photos [', 'Its batch is in')),
    Fault('out of GPU memory (simulated)', no_memory, 1, ('out of GPU memory in step 8', 'batch_size 4', 'accumulate=2')),
    Fault('two trainers in one folder', hold, 0, meanwhile=second_trainer),
]


# ---- what must hold ------------------------------------------------------------------------------------------------

def losses(folder):
    """{step: loss}; of a step that was done twice, both must agree."""
    seen = {}
    for row in map(json.loads, (folder / 'log.txt').read_text().splitlines()):
        if row.get('train_loss') is not None:  # null: not finite
            assert seen.setdefault(row['step'], row['train_loss']) == row['train_loss'], f'step {row["step"]} has two results'
    return seen


def steps(folder):
    cfg = json.loads((folder / 'cfg.json').read_text())
    return cfg['epochs'] * cfg['views'] // cfg['batch_size']


def same_weights(a, b):
    a, b = (load_checkpoint(f / SAVE)['model'] for f in (a, b))
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def half_written(folder): return [p.name for p in folder.rglob('*') if p.suffix in ('.tmp', '.part')]


class Campaign:
    """A folder of runs and the undisturbed ones that they are compared with."""
    def __init__(self, root):
        self.root, self.whole = Path(root), {}

    def make(self, name, base):
        """A run folder; `base` says which kind of run."""
        (folder := self.root / base / name).mkdir(parents=True)
        more = {}
        if base == 'live':
            if not (photos := self.root / 'photos').exists():
                photos.mkdir()
                noise = np.random.default_rng(0).integers(0, 255, (4, 90, 120, 3), np.uint8)
                for i, pixels in enumerate(noise): Image.fromarray(pixels).save(photos / f'{i}.png')
            more = dict(data=str(photos), cache_features=False, num_workers=1, standardize=False)
        if base == 'launched': more = dict(epochs=20)  # not over before it is struck
        write_json(folder / 'cfg.json', dataclasses.asdict(make_config('demo', **TINY | more)))
        return folder

    def undisturbed(self, base):
        if base not in self.whole:
            trainer = Trainer(folder := self.make('undisturbed', base), world=1 + (base in ('two', 'launched')))
            assert not any(trainer.wait()), trainer.said()
            assert sorted(losses(folder)) == list(range(1, steps(folder) + 1))
            self.whole[base] = folder
        return self.whole[base]

    def run(self, fault):
        """The row of the report. Raises AssertionError if something does not hold."""
        whole, world = self.undisturbed(fault.base), 1 + (fault.base == 'two')
        folder = self.make(fault.name.replace(' ', '_'), fault.base)
        first = Trainer(folder, fault, world)
        if fault.meanwhile:
            first.until((folder / 'held').exists)
            fault.meanwhile(folder)
        codes, said = first.wait(), first.said()
        assert codes[-1] == fault.code and (world == 1 or all(codes)), f'{fault.name}: exit codes {codes}: {said}'
        check_words(fault, fault.words, said)
        orphans = first.orphans()
        if fault.between: fault.between(folder)
        if fault.refusal:
            refused = Trainer(folder, world=world)
            assert all(refused.wait()), f'{fault.name}: went on'
            check_words(fault, fault.refusal, refused.said())
            fault.mend(folder)
        again = 0
        if not (folder / 'done.json').exists():
            last = Trainer(folder, world=world)
            assert not any(last.wait()), f'{fault.name}: {last.said()}'
            check_words(fault, fault.resumed, last.said())
            again, orphans = len((folder / 'log.txt').read_text().splitlines()) - steps(folder), orphans + last.orphans()
        want, got = losses(whole), losses(folder)
        lost = [s for s in want if got.get(s, None if fault.kept else want[s]) != want[s]]
        assert not lost and same_weights(folder, whole) and not half_written(folder), (fault.name, lost, half_written(folder))
        assert not orphans, f'{fault.name}: {orphans} orphans'
        outcome = f'{"refused until mended, then " if fault.refusal else ""}same losses and weights'
        return {'name': fault.name, 'outcome': outcome, 'lost_steps': len(lost), 'repeated_steps': again, 'orphans': orphans}


def check_words(fault, words, said):
    missing = [w for w in words if w not in said]
    assert not missing, f'{fault.name}: {missing} not in: {said}'


# ---- runs that are launched ----------------------------------------------------------------------------------------

def member(run, word):
    """Processes of a launched run with a word in their command."""
    mark = json.loads((run / 'launch.json').read_text())['mark']
    return [p for p in _members(mark) if word in p.cmdline()]


def until(condition, seconds=1200):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.02)
    return value


def logged(run, steps): return lambda: (run / 'log.txt').exists() and len((run / 'log.txt').read_text().splitlines()) >= steps


def launched(run, **more): return launch(run, json.loads((run / 'cfg.json').read_text()), **more)


def launched_rank_dies(run):
    """One of two workers is killed: the launcher ends the other and itself."""
    launched(run, processes=2)
    until(logged(run, 2))
    random.Random(0).choice(member(run, 'updetr')[1:] or member(run, 'updetr')).kill()
    until(lambda: not is_alive(run))


def launcher_dies(run):
    """The workers save and leave."""
    launched(run, processes=2)
    until(logged(run, 2))
    psutil.Process(json.loads((run / 'launch.json').read_text())['pid']).kill()
    until(lambda: not is_alive(run))


def kernel_dies(run):
    """The run does not notice."""
    code = f'import sys, time; sys.path.insert(0, {os.path.dirname(__file__)!r}); import campaign; from pathlib import Path; ' \
           f'campaign.launched(Path({str(run)!r}), processes=2); time.sleep(600)'
    kernel = subprocess.Popen([sys.executable, '-c', code], start_new_session=True)
    until(logged(run, 1))
    os.killpg(kernel.pid, signal.SIGKILL)
    kernel.wait()
    until(lambda: not is_alive(run))


def launched_twice(run):
    """The second launch attaches."""
    first, second = (launched(run, processes=2) for _ in range(2))
    assert (first.how, second.how) == ('started', 'attached'), second
    until(lambda: not is_alive(run))


def number_recycled(run):
    """An innocent process has the launcher's number after a kill: it is neither taken for the run nor harmed."""
    launched(run, processes=2)
    until(logged(run, 2))
    stop(run, timeout=0)
    innocent = subprocess.Popen(['sleep', '600'])
    write_json(run / 'launch.json', json.loads((run / 'launch.json').read_text()) | {'pid': innocent.pid})
    assert not is_alive(run) and stop(run) and innocent.poll() is None
    innocent.kill()
    innocent.wait()


LONG = {'SIGKILL of a launched rank': launched_rank_dies, 'SIGKILL of the launcher': launcher_dies,
        'SIGKILL of the notebook kernel': kernel_dies, 'two launches into one folder': launched_twice,
        'process number recycled': number_recycled}
UNHARMED = ('SIGKILL of the notebook kernel', 'two launches into one folder')


def run_launched(campaign, name):
    """The row of a fault on a launched run."""
    whole, run = campaign.undisturbed('launched'), campaign.make(name.replace(' ', '_'), 'launched')
    LONG[name](run)
    assert (run / 'done.json').exists() == (name in UNHARMED), 'the blow came too late'
    mark, end = json.loads((run / 'launch.json').read_text())['mark'], time.monotonic() + 60
    while _members(mark) and time.monotonic() < end: time.sleep(.1)
    orphans = len(_members(mark))
    if not (run / 'done.json').exists():
        assert launched(run, processes=2).how == 'started'
        until(lambda: not is_alive(run))
    want, got = losses(whole), losses(run)
    lost = [s for s in want if got.get(s) != want[s]]
    assert not lost and not orphans and same_weights(run, whole) and not half_written(run), (name, lost, orphans, half_written(run))
    again = len((run / 'log.txt').read_text().splitlines()) - steps(run)
    return {'name': name, 'outcome': 'same losses and weights', 'lost_steps': 0, 'repeated_steps': again, 'orphans': orphans}


# ---- the soak ------------------------------------------------------------------------------------------------------

def growth(samples):
    """From the median of the second fifth to that of the last: the first fifth warms up. None for too few samples."""
    k = len(samples) // 5
    return float(np.median(samples[-k:]) - np.median(samples[k:2 * k])) if k >= 3 else None


def largest(values): return max((v for v in values if v is not None), default=None)


def last_step(run):
    """The step of a log's last whole line."""
    try:
        with open(run / 'log.txt', 'rb') as f:
            f.seek(max(0, os.path.getsize(run / 'log.txt') - 4096))
            return json.loads(f.read().split(b'\n')[-2])['step']
    except (FileNotFoundError, IndexError): return 0


@dataclass(frozen=True)
class Rest:
    """Rest before every step, so that hours of training do not take a whole core."""
    seconds: float
    def __call__(self, step): time.sleep(self.seconds)


@dataclass(frozen=True)
class Follow:
    """Stay a step behind another run until it has ended, then stop in good order after its last step."""
    leader: Path
    def __call__(self, step):
        end = self.leader / 'ended.json'
        while last_step(self.leader) <= step and not end.exists(): time.sleep(.05)
        if end.exists() and json.loads(end.read_text())['step'] == step: os.kill(os.getpid(), signal.SIGTERM)


def log_size(run): return (run / 'log.txt').stat().st_size if (run / 'log.txt').exists() else 0
def saved_at(run): return (run / SAVE).stat().st_mtime_ns if (run / SAVE).exists() else None


def watch_life(trainers, until, samples):
    """Sample memory (MiB) and file handles of runs twice a second until a moment; each from its next save on, when all is loaded."""
    before = [saved_at(t.folder) for t in trainers]
    while time.monotonic() < until and all(t.processes[0].is_alive() for t in trainers):
        for trainer, mark, seen in zip(trainers, before, samples):
            if saved_at(trainer.folder) == mark: continue
            try: seen.append(((now := psutil.Process(trainer.processes[0].pid)).memory_info().rss / 2**20, now.num_fds()))
            except psutil.Error: pass
        time.sleep(.5)
    for t in trainers: assert t.processes[0].is_alive(), f'ended by itself, with {t.processes[0].exitcode}: {t.said()}'


def soak(root, minutes, between=(60, 240), rest=.2, least=1):
    """Train and kill at random moments, so many seconds apart, until the time is over, and `least` times; then stop after a step.
    A second process trains the same undisturbed, a step behind, until that step: losses and weights must be equal."""
    campaign, rng, furthest, lives = Campaign(root), random.Random(0), 0, []
    cfg = dataclasses.asdict(make_config('demo', **TINY | dict(epochs=10**6, warmup=0., save_every=25)))
    for name in ('killed', 'whole'): write_json(campaign.make(name, 'bank') / 'cfg.json', cfg)
    killed, whole = campaign.root / 'bank/killed', campaign.root / 'bank/whole'
    follower, undisturbed, over = Trainer(whole, Fault('undisturbed', pace=Follow(killed))), [], False
    start = time.monotonic()
    end = start + 60 * minutes
    while not over:
        before, life, early = log_size(killed), [], rng.random() < .15
        trainer = Trainer(killed, Fault('killed', pace=Rest(rest)))
        if not early: trainer.until(lambda size=before: log_size(killed) > size)  # a life is counted from its first step on
        stays = time.monotonic() + (rng.uniform(0, 5) if early else rng.uniform(*between))
        watch_life((trainer, follower), min(end, stays) if len(lives) >= least else stays, (life, undisturbed))
        over, process = time.monotonic() >= end and len(lives) >= least, trainer.processes[0]
        if over:  # the other run has not gone beyond any step that this one has done: go on to a new one
            trainer.until(lambda last=furthest: last_step(killed) > last)
            process.terminate()
        else: process.kill()
        trainer.wait()
        assert trainer.orphans() == 0 and process.exitcode == (0 if over else -signal.SIGKILL), trainer.said()
        memory, handles = zip(*life) if life else ((), ())
        lives.append({'samples': len(life), 'memory': growth(memory), 'handles': growth(handles),
                      'level': float(np.median(memory[len(life) // 2:])) if life else None})
        seen, furthest = last_step(killed), max(losses(killed), default=0) if log_size(killed) else 0
        print(f'{(time.monotonic() - start) / 60:.1f} min, life {len(lives)}, step {seen}, furthest {furthest}, {lives[-1]}', flush=True)
    step = load_checkpoint(killed / SAVE)['step']
    write_json(killed / 'ended.json', {'step': step})
    assert follower.wait() == [0], follower.said()
    assert f'stopped after step {step} of' in follower.said(), follower.said()
    same = losses(whole) == losses(killed) and same_weights(whole, killed) and max(losses(whole)) == step
    memory, handles = zip(*undisturbed) if undisturbed else ((), ())
    return {'minutes': round((time.monotonic() - start) / 60, 1), 'steps': step, 'kills': len(lives) - 1, 'weights_equal': same,
            'repeated_steps': len((killed / 'log.txt').read_text().splitlines()) - step,
            'rss_growth_mb': rounded(largest([growth(memory), *(x['memory'] for x in lives)])),
            'rss_growth_undisturbed_mb': rounded(growth(memory)),
            'rss_growth_across_lives_mb': rounded(growth([x['level'] for x in lives if x['level']])),
            'handles_growth': largest([growth(handles), *(x['handles'] for x in lives)]),
            'samples': len(undisturbed) + sum(x['samples'] for x in lives)}


def rounded(x): return None if x is None else round(x, 1)


def attempt(name, act):
    """A row, also of what does not hold."""
    begun = time.monotonic()
    try: row = act()
    except AssertionError as e: row = {'name': name, 'outcome': f'BROKEN: {str(e)[-1500:]}', 'lost_steps': None, 'orphans': None}
    print(f'{time.monotonic() - begun:5.1f} s  {row}', flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--long', action='store_true', help='with runs that are launched')
    parser.add_argument('--minutes', type=float, default=0, help='of the soak; 0 = none')
    parser.add_argument('--report', help='folder for metrics.json; with the corpus of bad inputs')
    args, begun = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        campaign, pool = Campaign(Path(root) / 'runs'), ThreadPoolExecutor(1)
        soaking = pool.submit(soak, Path(root) / 'soak', args.minutes) if args.minutes else None  # at the same time: it rests a lot
        rows = [attempt(f.name, lambda f=f: campaign.run(f)) for f in SHORT]
        if args.long: rows += [attempt(name, lambda name=name: run_launched(campaign, name)) for name in LONG]
        soaked = soaking.result() if soaking else None
        print(soaked, flush=True)
        if args.report: report(args, Path(root), rows, soaked, begun)
    sys.exit(any(r['outcome'].startswith('BROKEN') for r in rows))


def report(args, root, rows, soaked, begun):
    """Write metrics.json."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from bad_inputs import count
    from updetr.core.report import provenance, save_metrics
    (root / 'inputs').mkdir()
    counts, executed, longest = count(root / 'inputs')
    words = ['--long'] * args.long + [f'--minutes {args.minutes:g}'] * bool(args.minutes)
    about = provenance(' '.join(['python tests/faults/campaign.py', *words, f'--report {args.report}']),
                       'tiny models on built-in photos, on the CPU; out of GPU memory is simulated', [42], time.monotonic() - begun)
    save_metrics(args.report, {'faults': rows, 'bad_inputs': counts, 'longest_input_s': round(longest, 2), 'pickles_executed': executed,
                               'soak': soaked, 'provenance': about})


if __name__ == '__main__': main()
