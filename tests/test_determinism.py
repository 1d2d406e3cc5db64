"""The same seed gives the same numbers on a CPU, bit for bit, whatever the number of data-loading processes, also across a stop.

Every task with live data: photos are decoded, augmented and batched in the data-loading processes while it trains.
"""
import json
import signal

import pytest
import torch

import test_finetune_runs as detection
import test_oneshot as oneshot
import test_panoptic_runs as panoptic
from test_finetune_runs import labelled  # noqa: F401 (a fixture)
from test_panoptic_runs import fields  # noqa: F401 (a fixture)
from test_resume import as_in_the_processes, make_run  # noqa: F401 (as_in_the_processes is a fixture: one thread)
from test_task import rows, save_photos, small_photos  # noqa: F401 (small_photos is a fixture)
from updetr.core.checkpoint import load_checkpoint, write_json
from updetr.train import loop as training

PRETRAIN = dict(cache_features=False, standardize=False, epochs=2, batch_size=2, weights='none', backbone='test_resnet', features='layer2')


def photos(folder, data):
    """Whole photos in both orientations, in batches of several sizes, of which one cannot be read."""
    save_photos(data / 'a', 5)
    save_photos(data / 'b', 3, size=(60, 90), start=10, broken=[1])
    return make_run(folder, **PRETRAIN | dict(views=0, data=str(data)))


def views(folder, data): return make_run(folder, **PRETRAIN | dict(views=8, patch_law='regions'))


def finetune(folder, data):
    return detection.make_run(folder, data, **detection.LIVE | dict(epochs=3, eval_every=3))


def one_shot(folder, data): return oneshot.make_run(folder, **oneshot.LIVE | dict(query_augment=True, absent=.3))


def panoptic_boxes(folder, data): return panoptic.make_run(folder, 'boxes', data, epochs=3, eval_every=3, dropout=.1)


def panoptic_masks(folder, data):
    if not (start := folder.parents[1] / 'start').exists(): train(panoptic_boxes(start, data), 0)
    return panoptic.make_run(folder, 'masks', data, epochs=2, eval_every=2, pretrain=str(start / 'checkpoint.pth'))


KINDS = {f.__name__: f for f in (photos, views, finetune, one_shot, panoptic_boxes, panoptic_masks)}


def train(folder, workers, stop_after=None):
    """Run or resume a folder with so many data-loading processes, to its end or to SIGTERM."""
    write_json(folder / 'cfg.json', json.loads((folder / 'cfg.json').read_text()) | {'num_workers': workers, 'save_every': 1000})
    step = training.train_step

    def stopping(module, batches, state, *more):
        if state.step + 1 == stop_after: signal.raise_signal(signal.SIGTERM)
        return step(module, batches, state, *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, 'train_step', stopping)
        training.run(folder / 'cfg.json')
    assert (folder / 'done.json').exists() == (stop_after is None)


def numbers(folder):
    """Every logged number of the losses and measurements, and every tensor of the last state but the generator's place in `rng`."""
    saved, logged = load_checkpoint(folder / 'checkpoint.pth'), {}
    for row in rows(folder): logged.setdefault(row['step'], {}).update({k: v for k, v in row.items() if k.startswith(('train_', 'test_'))})
    return logged, {k: saved.get(k) for k in ('model', 'optimizer', 'ema', 'rng')}


def same(a, b):
    """Equal bit for bit, however nested."""
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize('kind', KINDS)
def test_numbers_do_not_depend_on_workers(kind, tmp_path, request):
    """None; one, then three after a stop, then none after another."""
    name = {'finetune': 'labelled', 'panoptic_boxes': 'fields', 'panoptic_masks': 'fields'}.get(kind)
    data = request.getfixturevalue(name) if name else tmp_path / 'data'
    make = KINDS[kind]
    train(whole := make(tmp_path / 'runs/whole', data), 0)
    wanted = numbers(whole)
    assert len(wanted[0]) >= 6 and len({r['train_loss'] for r in wanted[0].values()}) == len(wanted[0])
    folder = make(tmp_path / 'runs/stopped', data)
    for workers, stop_after in ((1, 2), (3, 5), (0, None)): train(folder, workers, stop_after)
    logged, state = numbers(folder)
    assert logged == wanted[0] and same(state, wanted[1])
