"Every notebook runs from top to bottom, as `nbdev_test` runs it; here each one counts as a test."
import contextlib
import os
import random
import sys
import warnings

import matplotlib
import matplotlib.pyplot as plt
import nbdev.test
import numpy as np
import pytest
import torch
from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook  # under its own name pytest would take it for a test

from conftest import NOTEBOOKS, ROOT, give_back_memory
from tools.cells import run_cells
from updetr.core.fingerprint import set_rows
from updetr.tasks.finetune import Subset


@contextlib.contextmanager
def untouched():
    "All that a notebook sets for the whole process is as before afterwards: all notebooks share this one."
    env, cwd, path, hooks = dict(os.environ), os.getcwd(), list(sys.path), (sys.displayhook, sys.excepthook)
    main = sys.modules['__main__']  # which processes that are started ask for
    answers = dict(set_rows.registry)  # a notebook registers its own functions, whose names are gone when it has ended
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    switches = [(torch.set_grad_enabled, torch.is_grad_enabled()), (torch.set_num_threads, torch.get_num_threads()),
                (torch.set_default_dtype, torch.get_default_dtype()), (torch.set_default_device, None),
                (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
                (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()),
                (torch.autograd.set_detect_anomaly, torch.is_anomaly_enabled())]
    rc, backend = matplotlib.rcParams.copy(), matplotlib.get_backend()
    try:
        with warnings.catch_warnings(): yield
    finally:
        torch.set_rng_state(state[0]), np.random.set_state(state[1]), random.setstate(state[2])
        for put, value in switches: put(value)
        plt.close('all')
        matplotlib.use(backend)
        matplotlib.rcParams.update(rc)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        sys.path[:] = path
        sys.displayhook, sys.excepthook = hooks
        sys.modules['__main__'] = main
        for kind, answer in answers.items(): set_rows.register(kind, answer)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').with_suffix('').as_posix())
def test_notebook(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags, shells = get_config().tst_flags.split(), []
    monkeypatch.setattr(nbdev.test, 'CaptureShell', lambda *args: shells.append(shell := CaptureShell(*args)) or shell)
    with untouched():
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        ok, _ = run_notebook(path, skip_flags=flags, basepath=ROOT)
    for shell in shells: shell.user_ns.clear()  # the shell itself is kept by what it registered for the end of the process
    give_back_memory()
    assert ok, f'{path.name} fails: its traceback is under "Captured stderr"'


def test_globals_are_kept():
    draw, main, answer = torch.get_rng_state().clone(), sys.modules['__main__'], set_rows.dispatch(Subset)
    with untouched():
        torch.manual_seed(5), torch.set_grad_enabled(False), torch.set_default_dtype(torch.float64), torch.set_num_threads(1)
        os.environ['UPDETR_LEFT_BEHIND'], sys.modules['__main__'] = '1', sys
        plt.figure()
        set_rows.register(Subset, str)
    assert set_rows.dispatch(Subset) is answer is not str
    assert torch.equal(torch.get_rng_state(), draw) and torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert 'UPDETR_LEFT_BEHIND' not in os.environ and not plt.get_fignums() and sys.modules['__main__'] is main


def test_the_hours_exercise_without_reconstruction_can_be_done(tmp_path, monkeypatch):
    "The second one: `feature_recon=False` where `cfg` is made, then up to step 6"
    text, made = (ROOT/'nbs/tutorials/updetr_in_60_minutes.ipynb').read_text('utf-8'), "make_config('demo', num_queries=10, num_patches=5"
    assert text.count(made) == 1
    (tmp_path/'hour.ipynb').write_text(text.replace(made, f'{made}, feature_recon=False'), 'utf-8')
    with untouched(): space = run_cells(tmp_path/'hour.ipynb', monkeypatch, 'group_mask(10, 5)')
    assert 'patch2query' in space['extra'] and 'feature_align' not in space['extra']
