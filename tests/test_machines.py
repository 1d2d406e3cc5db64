"Machines that lack something: Unix (fcntl, resource, SIGUSR1, process groups), a compiler, a package."
import dataclasses
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from updetr.core.config import check_config
from updetr.core.signals import file_locks
from updetr.tasks.finetune import finetune_config

ROOT = Path(__file__).parents[1]
BARE = '''
import os, signal, sys
sys.path.insert(0, %r)
import psutil, torch, torchvision, multiprocessing.util  # what they need of Unix is theirs
for name in ('fcntl', 'resource'): sys.modules[name] = None
del signal.SIGUSR1, os.setpgrp
'''.replace('%r', repr(str(ROOT)))


def test_every_module_can_be_imported_a_detector_answers_and_training_is_refused_in_words(tmp_path):
    "In one process without them."
    code = f'''
import importlib, pathlib, updetr
for name in updetr.__all__: getattr(updetr, name)
for p in sorted(pathlib.Path('updetr').rglob('[a-z]*.py')): importlib.import_module('.'.join(p.with_suffix('').parts))
print('all of it')
import torch
from updetr import Detector, build_detr
from updetr.train.launch import launch
from updetr.train.loop import only_trainer
small = dict(hidden_dim=32, nheads=4, enc_layers=1, dec_layers=1, dim_feedforward=16, num_queries=5)
torch.save(build_detr(3, 'resnet18', **small).state_dict(), path := {str(tmp_path / 'detr.pth')!r})
print(len(Detector.from_checkpoint(path, nheads=4)(torch.zeros(3, 64, 64), 0)))
for start in (lambda: launch({str(tmp_path / 'run')!r}, {{}}), lambda: only_trainer({str(tmp_path)!r}).__enter__()):
    try: start()
    except RuntimeError as e: print(e)'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', BARE + code], text=True, capture_output=True, cwd=ROOT)
    assert 'all of it\n' in done.stdout, done.stderr[-2000:]
    assert done.stdout.splitlines()[1:] and done.stdout.count('WSL') == 2, done.stdout + done.stderr[-2000:]
    assert '\n5\n' in '\n' + done.stdout


def test_the_commands_page_says_what_the_error_says(monkeypatch):
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    with pytest.raises(RuntimeError) as e: file_locks()
    first, second = str(e.value).split('. ')
    page = nbformat.read(ROOT / 'nbs/guides/commands.ipynb', 4)
    said = [line for cell in page.cells for line in cell.source.splitlines()]
    line, = [line for line in said if line.startswith('- **Windows and macOS**')]
    plain = line.replace('`', '')
    assert first in plain and second.split(' runs ')[0] in plain, (first, second)


@pytest.mark.parametrize('changes, words', [
    ({'eval_backend': 'hotcoco'}, r'pip install .updetr\[fast\]'), ({'eval_backend': 'pycoco'}, 'must be one of pycocotools, hotcoco'),
    ({'compile': True}, 'C.. compiler'), ({'num_workers': -1}, 'not be negative')])
def test_what_cannot_work_here_is_refused_before_time_is_spent(monkeypatch, tmp_path, changes, words):
    monkeypatch.setitem(sys.modules, 'hotcoco', None)
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(ValueError, match=words): finetune_config('demo', **changes)
    stored = dataclasses.replace(finetune_config('demo'), **changes)
    if changes.keys() & {'compile'}: assert check_config(stored, run=False) == stored  # a file of another machine is opened
