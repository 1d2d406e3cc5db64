"Shared by every test: where the project is, and what a test may need that is not everywhere."
import os
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(ROOT/'nbs').parts))

os.environ.pop('MPLBACKEND', None)  # so that kernels started by tests draw into their notebook...
matplotlib.use('agg')  # ... and the tests themselves need no display


def _lack(mark):
    "Why a test with `mark` cannot run here, or None."
    if mark == 'data':
        folder = os.environ.get('UPDETR_DATA')
        if not folder: return 'needs a folder of photos: UPDETR_DATA is not set'
        if not Path(folder).is_dir(): return f'needs a folder of photos: UPDETR_DATA={folder} is not a folder'
    if mark in ('cuda', 'multigpu'):
        import torch
        need = 1 if mark == 'cuda' else 2
        if torch.cuda.device_count() < need: return f'needs {need} CUDA GPU(s), {torch.cuda.device_count()} found'


def pytest_collection_modifyitems(items):
    for item in items:
        if item.originalname != 'test_notebook': item.add_marker(pytest.mark.xdist_group(item.path.name))  # files share what they prepare
        for mark in ('data', 'cuda', 'multigpu'):
            if item.get_closest_marker(mark) and (why := _lack(mark)): item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope='session')
def root():
    "The repository root."
    return ROOT


@pytest.fixture(scope='session')
def data():
    "The folder UPDETR_DATA (a test that asks for it skips where it is unset)."
    if why := _lack('data'): pytest.skip(why)
    return Path(os.environ['UPDETR_DATA'])
