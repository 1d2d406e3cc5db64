"""Whatever `cfg.json` and `log.txt` hold: who looks on at a run passes over it and counts it, who trains says in words what is wrong.

The files of a run are written by this kit, but a disk fills, the power fails, folders are copied and edited by hand.
"""
import dataclasses
import itertools
import json
import math
import os
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from updetr.core.config import PretrainConfig
from updetr.core.report import by_epoch, epoch_curves, loss_curves
from updetr.experiments.experiment_report import catch_up, curve
from updetr.experiments.results import log_result, share_mean
from updetr.tasks.finetune import FinetuneConfig
from updetr.tasks.oneshot import OneShotConfig
from updetr.tasks.panoptic_task import PanopticConfig
from updetr.train import loop as training
from updetr.train.launch import launch, prepare, read_log
from updetr.train.progress import draw_curves, seconds_left, starting_line, status_line, watch

LIGHT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(min_value=2**53) | st.floats() | st.text(max_size=8) |
    st.sampled_from(['$x$', '$\\bad$']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)
KEYS = ('step', 'epoch', 'time', 'seconds', 'img_s', 'max_mem_mb', 'train_loss', 'train_loss_ce', 'train_matched_iou', 'train_lr',
        'test_AP', 'test_recall50', 'skipped', 'photos', 'train_loss$\\bad$')


@st.composite
def log_lines(draw):
    "Lines of a log as a run writes them, of which some have wrong values, were torn, or are no lines of a log; whether each is sound."
    lines = []
    for step in range(1, draw(st.integers(1, 8))):
        row = {'step': step, 'epoch': step // 3, 'time': 1e9 + step, 'img_s': 20., 'train_loss': 3. / step, 'train_matched_iou': .5,
               'test_AP': float(step), 'test_recall50': .1}
        text, harm = json.dumps(row), draw(st.sampled_from(['none', 'none', 'value', 'torn', 'text', 'nesting', 'zeros']))
        if harm == 'value': text = json.dumps(row | draw(st.dictionaries(st.sampled_from(KEYS), anything, min_size=1, max_size=3)))
        if harm == 'torn': text = text[:draw(st.integers(1, len(text) - 1))]
        if harm == 'text': text = draw(st.text(min_size=1, max_size=20)).replace('\n', ' ')
        if harm == 'nesting': text = draw(st.sampled_from(['[', '{"step": '])) * 20_000
        if harm == 'zeros': text = '\0' * 50
        lines.append((text, harm))
    return lines


def test_a_lone_carriage_return_is_one_damaged_line_not_two(tmp_path):
    (tmp_path/'log.txt').write_bytes(b'{"step": 1}\n0\r0\n{"step": 2}\r\n')
    rows = read_log(tmp_path)
    assert [r['step'] for r in rows] == [1, 2] and rows.damaged == 1


def write_log(folder, lines):
    (folder / 'log.txt').write_text(''.join(text + '\n' for text, _ in lines), encoding='utf-8', errors='replace')
    return read_log(folder)


@LIGHT
@given(lines=log_lines())
def test_a_damaged_log_is_read_as_far_as_it_is_sound(tmp_path, lines):
    rows = write_log(tmp_path, lines)
    steps = [r['step'] for r in rows]
    assert steps == sorted(set(steps)) and all(math.isfinite(r.get('time', 0)) for r in rows)
    spoilt = [text for text, harm in lines if harm in ('torn', 'nesting', 'zeros')]
    assert len(spoilt) <= rows.damaged <= sum(harm != 'none' for _, harm in lines)        # counted, and only what is wrong
    if all(harm == 'none' for _, harm in lines): assert steps == list(range(1, len(lines) + 1))


@settings(LIGHT, max_examples=12)
@given(lines=log_lines())
def test_whoever_draws_a_damaged_log_does_not_fall_over_it(tmp_path, lines):
    rows = write_log(tmp_path, lines)
    (tmp_path / 'preview.png').write_bytes(b'\x89PNG\r\n\x1a\n half a picture')
    line = status_line(rows, 100)
    assert seconds_left(rows, 100) is None or 'left' in line
    assert (f'{rows.damaged} damaged' in line) == bool(rows and rows.damaged)
    draw_curves(rows, tmp_path / 'preview.png').canvas.draw()
    by_epoch([rows], 'test_AP'), log_result(rows), share_mean(rows, 'train_loss', 0, 1), catch_up(rows, rows, 'test_AP')
    curve([rows, rows], 'train_loss')
    losses = loss_curves({'a $\\bad$ name': rows, 'b': []}, {'train_loss': 'loss'})
    for fig in (losses, epoch_curves({'$\\bad$': [rows]}, {'test_AP': 'AP'})):
        fig.canvas.draw()
        plt.close(fig)


@LIGHT
@given(content=st.dictionaries(st.sampled_from(['phase', 'done', 'total', 'seconds']), anything | st.integers(0, 50), max_size=4),
       cut=st.integers(0, 9))
def test_a_damaged_progress_file_is_said(tmp_path, content, cut):
    text = json.dumps(content)
    (tmp_path / 'progress.json').write_text(text[:len(text) - cut], encoding='utf-8', errors='replace')
    line = starting_line(tmp_path)
    assert line.startswith(('before the first step: ', 'starting: no step yet (progress.json is damaged)'))


def test_a_run_with_torn_files_is_watched_to_its_end(tmp_path):
    "A torn `done.json` is no end: launched again, the run finds its last checkpoint and writes it anew."
    (tmp_path / 'log.txt').write_text('{"step": 1, "train_loss": 3}\n{"step": 2, "tr\n{"step": Infinity}\n{"step": 4, "train_loss": 2}\n')
    for name in ('cfg.json', 'done.json', 'launch.json', 'progress.json'): (tmp_path / name).write_text('{"step": 4, ')
    os.utime(tmp_path / 'log.txt', (1e9, 1e9))                                            # nobody writes it any more
    said = []
    with pytest.raises(RuntimeError, match='after step 4, not at its end'):
        watch(tmp_path, every=.01, show=lambda line, fig=None: said.append(line))
    assert '2 damaged lines' in said[-1]
    (tmp_path / 'done.json').write_text('{"step": 4, "seconds": 1}')
    assert [r['step'] for r in watch(tmp_path, every=.01, show=lambda *a: None)] == [1, 4]


@pytest.mark.parametrize('kind', [PretrainConfig, FinetuneConfig, OneShotConfig, PanopticConfig])
def test_every_field_of_a_configuration_is_checked(kind, tmp_path, monkeypatch):
    "One field wrong at a time, as `python -m updetr --cfg` reads it: a ValueError that names it, or a configuration that may be trained."
    trained, find_task = [], training.find_task
    monkeypatch.setattr(training, 'find_task', lambda name: (find_task(name)[0], lambda *a: None))
    monkeypatch.setattr(training, 'train', lambda task, cfg, *a: trained.append(cfg) or SimpleNamespace(step=0, seconds=0))
    good = dataclasses.asdict(kind())
    wrong = [None, True, 'text', '\0', 'x' * 5000, [], {}, math.nan, math.inf, -1, 0, 1.5, 10**30, 10**400, -10**12, 1e300]
    for name, value in itertools.product(good, wrong):
        (tmp_path / 'cfg.json').write_text(json.dumps(good | {name: value}))
        try: training.run(tmp_path / 'cfg.json')
        except ValueError as e: assert name in str(e) and len(str(e)) < 500, (name, value)
    assert trained                                                            # a value may be as good as the one it replaces
    for cfg in trained: assert all(abs(v) <= 1e30 for v in dataclasses.asdict(cfg).values() if type(v) in (int, float))


def test_an_entry_that_is_not_known_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, 'find_task', lambda name: (PretrainConfig, lambda *a: None))
    monkeypatch.setattr(training, 'train', lambda *a: SimpleNamespace(step=0, seconds=0))
    (tmp_path / 'cfg.json').write_text('{"task": "pretrain", "learning_rate": 1}')
    training.run(tmp_path / 'cfg.json')
    assert "not read: ['learning_rate']" in capsys.readouterr().out


@LIGHT
@given(content=anything, cut=st.integers(0, 5))
def test_any_configuration_file_is_answered_in_words(tmp_path, content, cut):
    text = json.dumps(content)
    (tmp_path / 'cfg.json').write_text(text[:len(text) - cut], encoding='utf-8', errors='replace')
    with pytest.raises(ValueError, match='cfg.json|task|configuration|[a-z_]+ .* must'): training.run(tmp_path / 'cfg.json')
    try: prepare(tmp_path, {'lr': .1})
    except ValueError as e: assert 'cfg.json' in str(e) or 'another configuration' in str(e)
    else: (tmp_path / 'cfg.json').unlink()


@LIGHT
@given(content=st.dictionaries(st.sampled_from(['pid', 'mark', 'host', 'log_start', 'started']), anything, max_size=5))
def test_a_damaged_launch_record_is_named(tmp_path, content):
    (tmp_path / 'launch.json').write_text(json.dumps(content))
    for file in ('cfg.json', 'log.txt'): (tmp_path / file).unlink(missing_ok=True)
    if content:
        with pytest.raises(ValueError, match='launch.json'): launch(tmp_path, {'lr': .1})
