"""On a GPU, where there is one: the notebooks' cells marked `cuda`, and training as it runs there. It needs neither nbdev nor Jupyter."""
import copy
import json
import re

import numpy as np
import pytest
import torch

from conftest import NOTEBOOKS
from test_logged import MAKE, check, seen  # noqa: F401 (a fixture)
from test_task import SMALL, VIEWS, make_task, save_photos, small_photos, train_small  # noqa: F401 (a fixture)
from updetr.bench.run import TINY, detection_batch
from updetr.bench.step import OurStep
from updetr.core.config import make_config, model_options
from updetr.data.loader import photo_loader, to_device
from updetr.model.detr import build_detr
from updetr.model.losses import build_criterion
from updetr.model.matcher import assign
from updetr.tasks.pretrain_task import encode
from updetr.train.launch import launch, read_log
from updetr.train.progress import watch

pytestmark = pytest.mark.cuda
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def code(path):
    "The code cells of a notebook that need no other flag than `cuda`, and not the export."
    cells = (''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')
    return [c for c in cells if not re.match(r'#\|\s*(slow|multigpu|data|hide)', c)]


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if any(c.startswith('#| cuda') for c in code(p))], ids=lambda p: p.stem)
def test_marked_cells(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    names = {'__name__': 'notebook'}
    for i, cell in enumerate(code(path)): exec(compile(cell, f'{path.name}, code cell {i}', 'exec'), names)


def losses(folder, **changes):
    "The loss of each step."
    train_small(folder, device=DEVICE, **changes)
    return np.array([r['train_loss'] for r in read_log(folder)])


@pytest.mark.parametrize('way', [dict(amp=True), dict(cuda_graphs=True), dict(cuda_graphs=True, amp=True), dict(compile=True, amp=True),
                                 dict(cache_features=True), dict(cache_features=True, cuda_graphs=True, amp=True)], ids=str)
def test_every_way_learns_the_same(way, tmp_path):
    plain, other = losses(tmp_path / 'plain', **VIEWS, amp=False), losses(tmp_path / 'other', **VIEWS, **{'amp': False} | way)
    assert len(plain) == len(other) == 3 and np.allclose(plain, other, rtol=.03), (plain, other)


def test_photos_are_cut_on_the_gpu_as_by_the_workers(tmp_path):
    save_photos(tmp_path / 'photos', 8, size=(160, 120))
    live = dict(data=str(tmp_path / 'photos'), amp=False, num_workers=2)
    curves = [losses(tmp_path / str(here), crop_on_gpu=here, **live) for here in (False, True)]
    assert len(curves[0]) == 4 and np.allclose(*curves, rtol=.03), curves


@pytest.mark.parametrize('shape', [(2, 4, 100, 10), (6, 8, 300, 40), (1, 3, 5, 5), (1, 2, 4, 7)], ids=str)
def test_the_gpu_matches_as_cheaply_as_scipy(shape):
    "The last shape has more objects than queries: that is scipy's, here too"
    torch.manual_seed(0)
    L, B, N, T = shape
    counts = torch.randint(0, T + 1, (B,)).tolist()[:-1] + [T]
    for cost in (torch.randn(shape), torch.randn(shape).round(), torch.full(shape, 1e6)):
        ours, theirs = assign(cost.to(DEVICE), counts).cpu(), assign(cost, counts)
        assert torch.equal((ours >= 0).sum(2), (theirs >= 0).sum(2))
        totals = [(cost.gather(2, m.clamp(min=0)[:, :, None])[:, :, 0] * (m >= 0)).sum(2) for m in (ours, theirs)]
        assert torch.allclose(*totals, rtol=1e-5)
        for queries in ours.flatten(0, 1):
            taken = queries[queries >= 0]
            assert len(taken.unique()) == len(taken)


def test_nothing_ahead_of_the_step_waits_for_the_gpu(tmp_path):
    task = make_task(tmp_path / 'run', device=DEVICE, **VIEWS)
    cnn, batches = task.model.backbone[0], list(photo_loader(task.dataset, task.plan(0, 3)))
    mode = torch.cuda.set_sync_debug_mode if DEVICE.type == 'cuda' else lambda mode: None
    try:
        for i, batch in enumerate(batches):
            if i: mode('error')  # the first one folds the CNN
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
                assert encode(task.model, to_device(batch, DEVICE, cnn.mean, cnn.std))['feature'].device.type == DEVICE.type
    finally: mode('default')


@pytest.mark.parametrize('compiled', [False, True])
def test_fine_tuning_in_half_precision(compiled):
    cfg = make_config('paper', **TINY, dropout=0., lr=1e-3)
    torch.manual_seed(0)
    options = {k: v for k, v in model_options(cfg).items() if k in DETECTOR}
    model, curves = build_detr(20, **options, frozen_backbone=False), []
    for device, amp in (('cpu', False), (DEVICE, DEVICE.type == 'cuda')):
        way, batch = OurStep(copy.deepcopy(model), build_criterion(model), cfg, device, amp), detection_batch(96, 2, device)
        if compiled and device == DEVICE: way.model.backbone[0].compile()
        curves.append([way.detect(*batch).item() for _ in range(3)])
    assert np.allclose(*curves, rtol=.03), curves


DETECTOR = 'backbone weights features position hidden_dim nheads enc_layers dec_layers dim_feedforward dropout pre_norm num_queries'.split()


@pytest.mark.multigpu
def test_processes_with_recordings(tmp_path):
    "One and two processes, recorded and launched: the same global batches, the same losses."
    cfg = dict(SMALL | VIEWS, task='pretrain', amp=False)
    curves = []
    for n, graphs in ((1, False), (2, False), (2, True)):
        run = tmp_path / f'{n}{graphs}'
        full = make_config('paper', **{k: v for k, v in cfg.items() if k != 'task'}, cuda_graphs=graphs)
        watch(launch(run, {**full.__dict__}, n, n), show=lambda line, figure: None)
        curves.append([r['train_loss'] for r in read_log(run) if 'train_loss' in r])
    assert np.allclose(curves[0], curves[1], rtol=.01) and np.allclose(curves[1], curves[2], rtol=.01), curves


@pytest.mark.parametrize('way', [('finetune', dict(amp=True)), ('finetune', dict(amp=True, compile=True, ema=.5)),
                                 ('finetune', dict(frozen_backbone=True, amp=True)), ('oneshot', dict(amp=True, ema=.5)),
                                 ('boxes', dict(amp=False)), ('cnn', dict(amp=True))], ids=str)
def test_a_run_logs_what_its_checkpoint_gives(way, tmp_path, seen):  # noqa: F811
    "The fused optimizer of a GPU does not count what it does to a weight either."
    name, changes = way
    check(MAKE[name](**changes), tmp_path / 'run', seen, DEVICE, rel=.01 if 'compile' in changes else 1e-3)
