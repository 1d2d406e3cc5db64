"""A recorded step in the training loop, without a GPU: what takes the recorder's place rehearses as it does, then does the step anew on the
recording's own tensors."""
import signal
from functools import partialmethod

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from test_resume import as_in_the_processes  # noqa: F401 (a fixture: one thread)
from test_task import SMALL, rows, save_photos, small_photos  # noqa: F401 (a fixture: photos of 64 and 80 px)
from tools.processes import in_processes
from updetr.core.checkpoint import load_checkpoint
from updetr.core.config import make_config
from updetr.model.backbone import Backbone
from updetr.model.losses import SetCriterion
from updetr.model.matcher import HungarianMatcher, match_cost
from updetr.model.transformer import Transformer
from updetr.tasks.pretrain_task import PretrainTask
from updetr.train.loop import Processes, train

# landscape and portrait, two short sides: several shapes; the rate drops after the second of three epochs
LIVE = dict(epochs=3, lr_drop=2, dropout=.1, ema=.9, save_every=5, log_every=4, features='layer2')
STEPS = 12


class Asked(TorchDispatchMode):
    "Notes what waits for the device: values that the host reads, and shapes that depend on values."
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in ('_local_scalar_dense', 'is_nonzero', 'equal', 'masked_select') or name.startswith(('nonzero', '_unique', 'unique'))
        # chosen by a mask: how many there are is a value
        masks = name.startswith('index') and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in leaves(args[1:2]))
        if waits or masks: self.names.add(name)
        return func(*args, **(kwargs or {}))


class Recorder:
    "Rehearses three times, and counts what was recorded and played, with the state that is trained."
    def __init__(self): self.shapes = self.played = 0

    def __call__(self, step, pool):
        for _ in range(3): step()
        self.shapes += 1
        self.state = step.func.__self__.state

        def play():
            self.played += 1
            return step()
        return play


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = save_photos(tmp_path_factory.mktemp('data') / 'photos', 4, (90, 60))
    save_photos(folder / 'portrait', 4, (60, 90), start=4)
    return folder


def go(photos, folder, record=None, stop_at=None, bad=None, moved=None, processes=None, **changes):
    """Train in a folder, up to a step or to the end, recorded or not.

    Before a step a signal comes, or its batch has no numbers, or a weight is put elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = make_config('paper', **SMALL | dict(data=str(photos)) | LIVE | changes)
    task = PretrainTask(cfg, folder, processes or Processes())
    batches, weight = task.batches, task.model.class_embed.weight

    def given(start, total):
        for step, batch in enumerate(batches(start, total), start + 1):
            if step == stop_at: signal.raise_signal(signal.SIGTERM)
            if step == moved: weight.data = weight.data.clone()
            yield batch | {'feature': batch['feature'] * torch.nan} if step == bad else batch
    task.batches, task.record = given, record
    train(task, cfg, folder, task.processes)


def left(folder):
    "The last checkpoint and what is logged."
    logged = [{k: v for k, v in r.items() if k not in ('time', 'seconds', 'img_s', 'max_mem_mb')} for r in rows(folder)]
    return load_checkpoint(folder / 'checkpoint.pth'), logged


@pytest.fixture(scope='module')
def run(photos):
    def to_the_end(folder, *args, **changes):
        go(photos, folder, *args, **changes)
        return left(folder)
    return to_the_end


@pytest.fixture(scope='module')
def plain(run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('updetr.tasks.pretrain_task.PRETRAIN_SIZES', (64, 80))
        return run(tmp_path_factory.mktemp('plain'))


def leaves(x):
    if isinstance(x, dict): return [leaf for k in x for leaf in leaves(x[k])]
    return [leaf for v in x for leaf in leaves(v)] if isinstance(x, (list, tuple)) else [x]


def same(a, b, keys=('model', 'optimizer', 'ema', 'ema_steps', 'rng', 'step')):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
               for k in keys for x, y in zip(leaves(a[k]), leaves(b[k]), strict=True))


def test_recorded_steps_are_the_plain_ones(run, plain, tmp_path):
    "Weights, moments, averages, generator and log, over a drop of the rate and several shapes, bit for bit."
    recorder = Recorder()
    saved, logged = run(tmp_path, recorder)
    assert recorder.played == STEPS and recorder.shapes >= 2
    assert same(saved, plain[0]) and logged == plain[1]
    assert {r['train_lr'] for r in logged} == {1e-3, 1e-4} and [r['step'] for r in logged] == [4, 5, 8, 10, 12]


def test_a_run_goes_on_recorded_or_not(run, plain, tmp_path):
    "A checkpoint says nothing of how it was made. Stopped twice, each time in the middle of a line of the log."
    for recorded, stop_at in ((True, 6), (False, 9), (True, None)):
        saved, logged = run(tmp_path, Recorder() if recorded else None, stop_at)
    assert same(saved, plain[0]) and logged[-1] == plain[1][-1]


@pytest.mark.parametrize('changes', [{}, dict(accumulate=2, gradient_checkpointing=True)], ids=str)
def test_a_compiled_run_is_the_plain_one(run, plain, tmp_path, monkeypatch, changes):
    "Recorded, stopped and resumed; or launched, in micro-batches that are computed twice. The compiler only passes on what it is given."
    for part in (Backbone, Transformer, SetCriterion):
        monkeypatch.setattr(part, 'compile', partialmethod(part.compile, backend='eager', options=None, fullgraph=True))
    recorder = None if changes else Recorder
    wanted = run(tmp_path / 'plain', **changes) if changes else plain
    for stop_at in (6, None): saved, logged = run(tmp_path / 'run', recorder and recorder(), stop_at, compile=True, **changes)
    assert same(saved, wanted[0]) and logged[-1] == wanted[1][-1]


def cheapest(self, logits, pred_boxes, labels, boxes, counts):
    "In place of the assignment, which has its own tests: a function of the device, and of numbers that are none, too."
    return match_cost(logits, pred_boxes, labels, boxes, self.weights).argmin(2)


def test_a_bad_batch_is_found_in_the_log_and_changes_nothing(run, tmp_path, monkeypatch):
    "The line after step 8 tells of step 6; its batch is saved, and the weights are those after step 5."
    monkeypatch.setattr(HungarianMatcher, 'match', cheapest)
    recorder = Recorder()
    with pytest.raises(FloatingPointError, match=r'not finite in step 6, photos \[[0-9]'): run(tmp_path / 'bad', recorder, bad=6)
    replay, state = load_checkpoint(tmp_path / 'bad/not_finite_step6_process0.pth'), recorder.state
    assert state.step == 8 and replay['step'] == 6 and {'loss', 'grad_norm'} <= set(replay['terms'])
    assert not replay['batches'][0]['feature'].isfinite().any()
    wanted, _ = run(tmp_path / 'good', stop_at=5)
    now = {'model': state.model.state_dict(), 'ema': state.ema.module.state_dict(), 'optimizer': state.optimizer.state_dict()['state']}
    assert same(now, wanted | {'optimizer': wanted['optimizer']['state']}, now)
    assert load_checkpoint(tmp_path / 'bad/checkpoint.pth')['step'] == 5


def test_a_recorded_step_asks_the_host_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(HungarianMatcher, 'match', cheapest)
    asked = []

    def recorder(step, pool):
        step()  # what is made at a first time
        with Asked() as mode: step()
        asked.append(mode.names)
        return step
    run(tmp_path, recorder, epochs=1)
    assert asked and not any(asked)
    with Asked() as mode:
        if torch.ones(2)[torch.tensor([True, False])].sum() > 0: pass
    assert len(mode.names) == 2  # it would be seen


def one_of_two(rank, world, photos, folder):
    "Train launched, recorded, and by turns; then with a batch that has no numbers in the second process."
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    second = dict(processes=Processes(rank, world))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('updetr.tasks.pretrain_task.PRETRAIN_SIZES', (64, 80))
        go(photos, folder / 'launched', **second)
        # one process has to record more often than the other
        recorder = Recorder()
        go(photos, folder / 'recorded', recorder, moved=6 if rank else None, **second)
        assert recorder.played == STEPS and recorder.shapes >= 2 + rank
        for recorded, stop_at in ((True, 6), (False, 9), (True, None)):
            go(photos, folder / 'turns', Recorder() if recorded else None, stop_at if rank else None, **second)
        patch.setattr(HungarianMatcher, 'match', cheapest)
        go(photos, folder / 'good', stop_at=5, **second)
        recorder = Recorder()
        with pytest.raises(FloatingPointError, match='not finite in step 6') as error:
            go(photos, folder / 'bad', recorder, bad=6 if rank else None, **second)
        assert ('loss' in str(error.value).split(' not finite')[0]) == bool(rank)
        now, then = recorder.state.model.state_dict(), load_checkpoint(folder / 'good/checkpoint.pth')['model']
        assert recorder.state.step == 8 and all(torch.equal(now[k], then[k]) for k in then)
    dist.destroy_process_group()


@pytest.mark.usefixtures('plain')
def test_two_processes_take_means_between_what_is_recorded_and_the_update(photos, tmp_path):
    "As DDP does, bit for bit, whoever rehearses; what has no numbers in one process changes nothing in both."
    in_processes(one_of_two, 2, photos, tmp_path)
    launched, logged = left(tmp_path / 'launched')
    for name in ('recorded', 'turns'):
        saved, said = left(tmp_path / name)
        assert same(saved, launched) and said[-1] == logged[-1], name
    assert left(tmp_path / 'recorded')[1] == logged
