"Shared by every test: where the project is, and what a test may need that is not everywhere."
import ctypes
import gc
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import hypothesis
import matplotlib
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(ROOT/'nbs').parts))

os.environ.pop('MPLBACKEND', None)  # so that kernels started by tests draw into their notebook...
matplotlib.use('agg')  # ... and the tests themselves need no display

# Every run tries the same examples, so that a test's answer changes with the code only; `--hypothesis-profile search` draws new ones.
hypothesis.settings.register_profile('repeatable', derandomize=True)
hypothesis.settings.register_profile('search', derandomize=False)
hypothesis.settings.load_profile('repeatable')


def files(root=ROOT):
    "The project's own files: what git tracks or would add, or, without git, all but what .gitignore names."
    command = ['git', 'ls-files', '-coz', '--exclude-standard']
    git = shutil.which('git') and subprocess.run(command, cwd=root, capture_output=True, text=True)
    if git and git.stdout: return sorted(root/f for f in set(git.stdout.split('\0')) if f and (root/f).is_file())
    ignored = ['.git'] + [s.strip('/') for s in (root/'.gitignore').read_text().split('\n') if s and s[0] != '#']

    def mine(path): return path.is_file() and not any(fnmatch(part, name) for part in path.relative_to(root).parts for name in ignored)
    return sorted(filter(mine, root.rglob('*')))


def copy_project(folder):
    "Copy the project's own files into `folder`; which they are."
    mine = files()
    for f in mine:
        to = Path(folder)/f.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(f, to)
    return mine


def fake_gpu_trouble():
    "Why fake tensors on a GPU that is not there cannot be computed with, or None: PyTorch 2.9 asks the driver even for them."
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    try:
        with FakeTensorMode(): torch.empty(2, device='cuda').uniform_()[0]
    except RuntimeError as e: return f'fake tensors of PyTorch {torch.__version__} need a GPU: {str(e).splitlines()[0]}'


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
    if mark == 'fake_gpu': return fake_gpu_trouble()


# What takes longest begins first, the longest in front: at the very end it would keep all other cores waiting.
LONG = ['test_faults.py', 'test_papermill.py', 'test_experiments.py', 'test_launch.py', 'test_recipe.py', 'test_resume.py',
        'test_widget.py', 'test_compiled.py', 'test_task.py', 'test_logged.py', 'test_oneshot.py', 'test_foreign_files.py',
        'test_features.py',
        'test_panoptic_runs.py', '83_heads', '74_run', 'test_finetune.py', 'test_handover.py', 'test_not_finite.py', '85_upsnet',
        'test_determinism.py', 'test_finetune_runs.py', '84_panoptic_fpn', 'test_baselines.py', 'test_processes.py',
        'test_skipped.py', 'test_form.py', '56_export', 'labels_to_errors', 'test_backbone.py', '20_backbone', '41_pretext',
        'test_hundred.py', 'test_masks.py']


def unit(nodeid):
    "Return what stays together in one process: a file of tests, which share what they prepare, or one notebook."
    name = nodeid.split('::')[0].split('/')[-1]
    return name if name != 'test_notebooks.py' else nodeid.split('[')[-1].split('/')[-1].rstrip(']')


@pytest.hookimpl(optionalhook=True)  # xdist may not be there
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid): return unit(nodeid)

    config.option.loadscopereorder = False  # the order is ours
    return Units(config, log)


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(unit(item.nodeid), len(LONG)))  # stable
    for item in items:
        for mark in ('data', 'cuda', 'multigpu', 'fake_gpu'):
            if item.get_closest_marker(mark) and (why := _lack(mark)): item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope='module', autouse=True)
def little_memory():
    "Give back what a file's tests have left to the system, else a process grows by gigabytes until its last test."
    yield
    give_back_memory()


def give_back_memory():
    gc.collect()
    if sys.platform == 'linux': getattr(ctypes.CDLL(None), 'malloc_trim', lambda pad: None)(0)


@contextmanager
def undrawn():
    "Networks begin with zeros where their weights would be drawn, which takes long: where they are loaded or do not matter."
    import torch

    def zeros(tensor, *args, **kwargs): return tensor.detach().zero_()
    with pytest.MonkeyPatch.context() as patch:
        for draw in ('normal_', 'uniform_', 'kaiming_normal_', 'kaiming_uniform_', 'xavier_uniform_'):
            patch.setattr(torch.nn.init, draw, zeros)
        yield


@pytest.fixture
def weights_do_not_matter():
    with undrawn(): yield


@pytest.fixture(scope='session')
def root():
    "The repository root."
    return ROOT


@pytest.fixture(scope='session')
def data():
    "The folder UPDETR_DATA (a test that asks for it skips where it is unset)."
    if why := _lack('data'): pytest.skip(why)
    return Path(os.environ['UPDETR_DATA'])
