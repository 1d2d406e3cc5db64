"""`max_skips`: steps whose loss or gradient is no number are passed over, on all processes alike, and change nothing."""
import dataclasses
import json
import signal

import pytest
import torch
import torch.distributed as dist

from faults.campaign import TINY, Fault, Trainer
from test_resume import as_in_the_processes  # noqa: F401 (a fixture: one thread here, too)
from test_task import make_task, rows
from updetr.core.checkpoint import load_checkpoint, write_json
from updetr.core.config import make_config
from updetr.tasks import pretrain_task
from updetr.train import loop as training
from updetr.train.loop import Processes, TrainState, train

LIVE = dict(views=8, view_size=64, epochs=3, dropout=.1, ema=.9, save_every=4, features='layer2')  # four steps an epoch
STEPS = 12


def spoil(task, bad, what):
    """The steps in `bad` get features or boxes without numbers, an infinite loss (with finite gradients), or such gradients."""
    batches, forward, now = task.batches, task.module.forward, []

    def broken(start, total):
        for step, batch in enumerate(batches(start, total), start + 1):
            now[:] = [step]
            yield batch | {what: batch[what] * torch.nan} if step in bad and what in batch else batch

    def infinite(batch):
        loss, values = forward(batch)
        return (loss + torch.inf, values | {'loss_bbox': values['loss_bbox'] + torch.inf}) if now[0] in bad else (loss, values)

    task.batches = broken
    if what == 'loss': task.module.forward = infinite
    if what == 'gradient': task.model.class_embed.weight.register_hook(lambda g: g * torch.nan if now[0] in bad else g)
    return task


def by_hand(task):
    """The same training written out in full, of which the steps in `bad` draw their dropout masks, and do nothing else."""
    def loop(bad):
        torch.manual_seed(task.cfg.seed * 1000)
        task.begin(resumed=False)
        state, params = TrainState(task.model, task.cfg), [p for p in task.model.parameters() if p.requires_grad]
        for step, batch in enumerate(task.batches(0, STEPS), 1):
            loss, _ = task.module.train()(batch)
            if step in bad: continue
            state.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, task.cfg.clip_max_norm)
            state.optimizer.step()
            state.ema.update_parameters(task.model)
        return {'model': state.model.state_dict(), 'optimizer': state.optimizer.state_dict()['state'], 'ema': state.ema.module.state_dict()}
    return loop


def tensors(x):
    if isinstance(x, torch.Tensor): return [x]
    return [t for v in x.values() for t in tensors(v)] if isinstance(x, dict) else []


def same(a, b): return len(tensors(a)) == len(tensors(b)) > 0 and all(map(torch.equal, tensors(a), tensors(b)))


@pytest.fixture(scope='module')
def wanted(tmp_path_factory):
    """Return what is left of twelve steps without steps 5 and 6."""
    return by_hand(make_task(tmp_path_factory.mktemp('by_hand'), **LIVE))({5, 6})


@pytest.mark.parametrize('what', ['feature', 'boxes', 'loss', 'gradient'])
def test_a_skipped_step_changes_nothing(what, wanted, tmp_path):
    """Weights, moments and averages are those of a loop that never saw the step; also where the run stops between two such steps."""
    def run(stop_at=None):
        task = spoil(make_task(tmp_path, max_skips=2, **LIVE), {5, 6}, what)
        batches = task.batches

        def stopping(start, total):
            for step, batch in enumerate(batches(start, total), start + 1):
                if step == stop_at: signal.raise_signal(signal.SIGTERM)
                yield batch
        task.batches = stopping
        return train(task, task.cfg, tmp_path, Processes())
    state = run(stop_at=5)
    assert (state.step, state.skips) == (5, 1)
    state = run()
    assert (state.step, state.skips) == (STEPS, 0)
    saved = load_checkpoint(tmp_path / 'checkpoint.pth')
    assert same({k: saved[k] for k in ('model', 'ema')} | {'optimizer': saved['optimizer']['state']},
                {k: wanted[k] for k in ('model', 'ema')} | {'optimizer': wanted['optimizer']})
    told = {r['step']: r for r in rows(tmp_path) if 'skipped' in r}
    assert told.keys() == {5, 6} and {r['step'] for r in rows(tmp_path) if 'train_loss' in r} == set(range(1, STEPS + 1)) - {5, 6}
    assert {'feature': 'loss', 'boxes': 'loss_bbox', 'loss': 'loss_bbox', 'gradient': 'grad_norm'}[what] in told[5]['skipped'].split(', ')
    task = make_task(tmp_path, max_skips=2, **LIVE)
    for step, row in told.items(): assert row['photos'] == next(iter(task.batches(step - 1, step)))['index'].tolist()
    assert [f.name for f in tmp_path.glob('not_finite*')] == ['not_finite_step5_process0.pth']  # the first is kept, all can be made again
    kept = load_checkpoint(tmp_path / 'not_finite_step5_process0.pth')
    assert kept['step'] == 5 and kept['batches'][0]['index'].tolist() == told[5]['photos']


@pytest.mark.parametrize('max_skips', [0, 2])
def test_too_many_in_a_row_stop_the_run(max_skips, tmp_path):
    """Two and two are passed over where two are allowed, three in a row are not; a stop in between does not begin the count anew."""
    longer = LIVE | dict(epochs=4, save_every=2)
    task = spoil(make_task(tmp_path, max_skips=max_skips, **longer), {3, 4, 6, 7, 11, 12, 13}, 'feature')
    batches, last = task.batches, 13 if max_skips else 3

    def stopping(start, total):
        for step, batch in enumerate(batches(start, total), start + 1):
            if step == 12: signal.raise_signal(signal.SIGTERM)
            yield batch
    task.batches = stopping
    if max_skips: assert train(task, task.cfg, tmp_path, Processes()).step == 12
    task = spoil(make_task(tmp_path, max_skips=max_skips, **longer), {3, 4, 6, 7, 11, 12, 13}, 'feature')
    said = f'not finite in step {last}{", after 2 skipped ones" if max_skips else ""}, photos \\[[0-9]'
    with pytest.raises(FloatingPointError, match=said): train(task, task.cfg, tmp_path, Processes())
    assert (tmp_path / f'not_finite_step{last}_process0.pth').exists()
    saved = load_checkpoint(tmp_path / 'checkpoint.pth')
    assert saved['step'] == last - 1 and all(v.isfinite().all() for v in saved['model'].values())


def test_a_run_that_stopped_goes_on_with_another_policy(tmp_path):
    bad = spoil(make_task(tmp_path, **LIVE), {5}, 'boxes')
    with pytest.raises(FloatingPointError): train(bad, bad.cfg, tmp_path, Processes())
    task = spoil(make_task(tmp_path, max_skips=1, **LIVE), {5}, 'boxes')
    assert train(task, task.cfg, tmp_path, Processes()).step == STEPS


# ---- two processes, of which one has the bad numbers -----------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class SpoilsItself:
    """Done by every process before it begins: the second one's part of step 5 is bad. At the end each saves the weights that it has."""
    what: str
    def __call__(self):
        task_class, what, whole = pretrain_task.PretrainTask, self.what, training.train

        class Spoilt(task_class):
            def __init__(self, cfg, run_dir, processes):
                super().__init__(cfg, run_dir, processes)
                spoil(self, {5} if processes.rank == 1 else (), what)

        def saving(task, cfg, run_dir, processes):
            state = whole(task, cfg, run_dir, processes)
            torch.save(state.model.state_dict(), run_dir / f'weights{processes.rank}.pth')
            return state
        training.find_task, training.train = lambda name: (make_kind(), Spoilt), saving


def make_kind(): return type(make_config('demo'))


@pytest.mark.parametrize('what', ['boxes', 'loss'])
def test_all_processes_skip_alike(what, tmp_path):
    """As one process whose second micro-batch is bad. With an infinite loss the gradients are finite: only the one process knows."""
    cfg = make_config('demo', **TINY | dict(cache_features=False, standardize=False, dropout=0., max_skips=1, epochs=2))
    (folder := tmp_path / 'two').mkdir()
    write_json(folder / 'cfg.json', dataclasses.asdict(cfg))
    trainer = Trainer(folder, Fault('bad numbers', early=SpoilsItself(what)), world=2)
    assert trainer.wait(600) == [0, 0], trainer.said()
    both = [torch.load(folder / f'weights{rank}.pth') for rank in (0, 1)]
    assert same(*both)
    (alone := tmp_path / 'one').mkdir()
    task = pretrain_task.PretrainTask(dataclasses.replace(cfg, accumulate=2), alone, Processes())
    batches, now = task.batches, []

    def counted(start, total):
        for i, batch in enumerate(batches(start, total), 2 * start):
            now[:] = [i]
            yield batch
    task.batches = counted
    forward = task.module.forward

    def infinite(batch):
        loss, values = forward(batch)
        return (loss + torch.inf, values) if now[0] == 9 else (loss, values)
    task.module.forward = infinite
    state = train(task, task.cfg, alone, Processes())
    assert all(torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in zip(state.model.state_dict().values(), both[0].values()))
    mine = next(r for r in rows(folder) if 'skipped' in r)
    assert mine['step'] == 5 and [r['step'] for r in rows(folder) if 'train_loss' in r] == [1, 2, 3, 4, 6, 7, 8]
    of_rank_one = [b['index'].tolist() for b in batches(4, 5)][1]
    assert mine['photos'] == of_rank_one and f'step 5 skipped: {mine["skipped"]} not finite, photos {of_rank_one}' in trainer.said()
    assert not dist.is_initialized() and json.loads((folder / 'done.json').read_text())['step'] == 8
