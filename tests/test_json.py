"Whatever the kit writes as JSON, any program can read: no NaN and no Infinity, which Python's own reader lets pass."
import ast
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from torch import nn

from test_resume import as_in_the_processes  # noqa: F401 (a fixture: one thread here, too)
from test_task import make_task
from updetr.core.checkpoint import export_weights, json_text, load_checkpoint, write_json
from updetr.core.photos import PhotoIndex
from updetr.train.features import Source, open_features
from updetr.train.launch import launch, prepare, read_log
from updetr.train.loop import Processes, RunLog, train

BAD = (math.nan, math.inf, -math.inf)


def strict(text):
    def refuse(word): raise AssertionError(f'{word} is no JSON')
    return json.loads(text, parse_constant=refuse)


def test_write_json_and_log_have_null_for_what_is_no_number(tmp_path):
    write_json(tmp_path / 'a.json', {'AP': BAD, 'deep': [{'x': (1., math.nan)}], 'place': tmp_path})
    assert strict((tmp_path / 'a.json').read_text()) == {'AP': [None] * 3, 'deep': [{'x': [1, None]}], 'place': str(tmp_path)}
    for bad in BAD:  # what is to be read back as it was written
        with pytest.raises(ValueError): json_text({'deep': [bad]}, strict=True)
    log = RunLog(tmp_path, Processes(), 1)
    for step, value in enumerate(BAD, 1): log.append({'step': step, 'train_loss': value, 'test_AP': .5, 'time': 1e9 + step})
    rows = [strict(line) for line in (tmp_path / 'log.txt').read_text().splitlines()]
    assert [r['train_loss'] for r in rows] == [None] * 3
    # what is read back is a number again, and no damage
    back = read_log(tmp_path)
    assert len(back) == 3 and not back.damaged and all(math.isnan(r['train_loss']) and r['test_AP'] == .5 for r in back)


def test_null_is_damage_where_a_finite_number_belongs(tmp_path):
    (tmp_path / 'log.txt').write_text('{"step": 1, "time": null}\n{"step": null, "train_loss": 1}\n{"step": 3, "train_loss": null}\n')
    rows = read_log(tmp_path)
    assert [r['step'] for r in rows] == [3] and rows.damaged == 2


@pytest.mark.parametrize('bad', BAD)
def test_a_configuration_that_is_no_number_is_refused_before_anything_starts(bad, tmp_path):
    for start in (prepare, launch):
        with pytest.raises(ValueError, match='lr is .*, but must be finite'): start(tmp_path / 'run', {'lr': bad, 'epochs': 1})
    assert not (tmp_path / 'run/cfg.json').exists() and not (tmp_path / 'run/train.log').exists()
    with pytest.raises(ValueError, match='sizes is .*, but must be finite'): prepare(tmp_path / 'run', {'sizes': [1, [bad]]})


def test_lists_banks_and_weights(tmp_path):
    PhotoIndex(str(tmp_path), ['a.jpg'], np.array([[3, 4]]), [('b.jpg', 'empty file')]).save(tmp_path / 'photos.json')
    strict((tmp_path / 'photos.json').read_text())
    with pytest.raises(ValueError): PhotoIndex(str(tmp_path), ['a.jpg'], np.array([[3, math.nan]]), []).save(tmp_path / 'odd.json')
    assert not (tmp_path / 'odd.json').exists()

    def bank(value):
        def compute(numbers): return {'y': nn.Linear(1, 2).weight.detach().T.repeat(len(numbers), 1)}, []
        return Source(lambda: {'std': value}, 2, compute)
    # the first item is another one at every look, which only a bank that is there would show
    open_features(tmp_path / 'banks', bank(1.), Processes())
    strict(next((tmp_path / 'banks').glob('*/bank.json')).read_text())
    with pytest.raises(ValueError): open_features(tmp_path / 'odd', bank(math.nan), Processes())
    assert not list((tmp_path / 'odd').glob('*/bank.json*'))
    export_weights(tmp_path / 'a.safetensors', nn.Linear(1, 1), {'lr': math.nan, 'data': '/somewhere'})
    with safe_open(tmp_path / 'a.safetensors', 'pt') as f: assert strict(f.metadata()['config']) == {'lr': None, 'data': ''}


def test_all_files_of_a_run_that_went_wrong(tmp_path):
    """Its loss is no number in the last step: row, batch and checkpoint are there, and every file in its folder is JSON."""
    task = make_task(tmp_path, views=8, view_size=64, epochs=2, max_skips=0)
    write_json(tmp_path / 'cfg.json', dataclasses.asdict(task.cfg))
    forward, calls = task.module.forward, []

    def spoilt(batch):
        loss, values = forward(batch)
        calls.append(1)
        return (loss, values | {'loss_bbox': values['loss_bbox'] * math.nan}) if len(calls) == 2 else (loss, values)
    task.module.forward = spoilt
    with pytest.raises(FloatingPointError): train(task, task.cfg, tmp_path, Processes())
    for file in tmp_path.rglob('*.json'): strict(file.read_text())
    rows = [strict(line) for line in (tmp_path / 'log.txt').read_text().splitlines()]
    assert any(r.get('train_loss_bbox', 0) is None for r in rows)
    assert any(math.isnan(r.get('train_loss_bbox', 0)) for r in read_log(tmp_path))
    assert load_checkpoint(next(tmp_path.glob('not_finite_*')))['terms'] == ['loss_bbox']


def test_whoever_writes_json_says_what_becomes_of_nan():
    """Every `json.dump(s)` of the package either cannot write NaN, or its text goes into no file."""
    # digests and comparisons
    no_file = {'fingerprint.py', 'panoptic_task.py', 'jobs.py', 'config.py', 'scenes.py', 'experiment_report.py', 'all_reports.py'}
    found = []
    for file in sorted((Path(__file__).parents[1] / 'updetr').rglob('*.py')):
        for node in ast.walk(ast.parse(file.read_text())):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ('dump', 'dumps')
            if not named or ast.unparse(node.func.value) != 'json' or file.name in no_file: continue
            if not any(k.arg == 'allow_nan' and k.value.value is False for k in node.keywords): found.append((file.name, ast.unparse(node)))
    # read back at once, or hashed: features' description of a bank, and the checksum of a list
    assert {text for _, text in found} == {
        'json.dumps(about)', 'json.dumps(about, sort_keys=True)', "json.dumps([content[k] for k in ('paths', 'sizes', 'skipped')])"}
