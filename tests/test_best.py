"""The best weights of a run: killed before any file is put in place, and started again, they are those of the run that went through;
whoever gives the folder of a run gets them. (What is measured of averaged weights: test_finetune_runs.)"""
import dataclasses
import json
import os

import pytest
import torch
from torch import nn

from test_resume import as_in_the_processes, finish  # noqa: F401 (a fixture: one thread here, too)
from updetr.core.checkpoint import load_checkpoint, save_checkpoint, write_json
from updetr.core.config import make_config
from updetr.predict.detector import Detector
from updetr.tasks.finetune import finetune_config
from updetr.tasks.oneshot import oneshot_config
from updetr.tasks.panoptic_task import panoptic_config
from updetr.train.best import keep_best, reason_to_end
from updetr.train.launch import launch
from updetr.train.loop import Processes, train
from updetr.train.progress import watch

VALUES = [3., 5., 4., 6., 6., 2., 9.]
CFG = dataclasses.replace(make_config('demo'), epochs=7, save_every=3, log_every=1, batch_size=1, schedule='step', warmup=0., lr=.1)


class Killed(BaseException):
    "Stands for SIGKILL: nobody catches it."


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer('steps', torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return (self.weight - x).square().sum(), {}


class Task:
    "Two steps an epoch; VALUES tells what is measured after each."
    steps_per_epoch, measure_every, notes = 2, 1, {}

    def __init__(self, patience):
        self.patience, self.model = patience, Model()
        self.module = self.model

    def preview(self, path): pass
    def begin(self, resumed): pass
    def batches(self, start, total): return (torch.full((3,), float(step)) for step in range(start, total))
    def measure(self, model, stop): return {'test_AP': VALUES[int(model.steps) // 2 - 1], 'test_weight': model.weight[0].item()}
    def over(self, state): return reason_to_end(state.evaluations, 'AP', self.patience)

    def measured(self, folder, state, model):
        keep_best(folder, 'AP', state.evaluations, model.state_dict(), {'args': {}})


def run_in(folder, patience=2, **changes):
    folder.mkdir(exist_ok=True)
    train(Task(patience), dataclasses.replace(CFG, **changes), folder, Processes())
    return folder


def kept(folder):
    "All that a run leaves of its evaluations; and its end, without the seconds."
    best = load_checkpoint(folder / 'best.pth')
    done = json.loads((folder / 'done.json').read_text())
    weights = {k: v.tolist() for k, v in best['model'].items()}
    return weights, best['best'], json.loads((folder / 'evaluations.json').read_text()), done['step'], done.get('ended')


@pytest.fixture(scope='module')
def whole(tmp_path_factory): return run_in(tmp_path_factory.mktemp('whole') / 'run')


def test_the_best_is_kept_and_the_run_ends(whole):
    weights, best, told, step, why = kept(whole)
    assert weights['steps'] == 8 and step == 12 and why == 'no AP above 6 (epoch 3) in 2 evaluations'
    assert best == told['best'] == {'metric': 'AP', 'value': 6., 'epoch': 3, 'step': 8}
    assert [row['AP'] for row in told['last']] == VALUES[1:6]
    assert [row['weight'] for row in told['last'] if row['epoch'] == 3] == [weights['weight'][0]]


def test_killed_before_any_file_is_put_in_place(whole, tmp_path, monkeypatch):
    plain, count = os.replace, [0, -1]

    def replace(a, b):
        count[0] += 1
        if count[0] == count[1]: raise Killed
        plain(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    monkeypatch.setattr(os, 'fsync', lambda f: None)  # no power cut here
    run_in(tmp_path / 'again')
    assert (files := count[0]) > 20
    for k in range(1, files + 1):
        count[:] = 0, k
        with pytest.raises(Killed): run_in(tmp_path / str(k))
        assert kept(run_in(tmp_path / str(k))) == kept(whole), f'killed before file {k}'


def test_a_best_that_the_save_does_not_know(whole, tmp_path):
    "The last save is damaged: the run goes on from the one before, while best.pth is from later."
    folder = run_in(tmp_path / 'run', epochs=3)
    before = (folder / 'checkpoint.pth').read_bytes()
    run_in(folder, epochs=4)
    (folder / 'checkpoint_previous.pth').write_bytes(before)
    (last := folder / 'checkpoint.pth').write_bytes(last.read_bytes()[:-99])
    assert load_checkpoint(folder / 'checkpoint_previous.pth')['step'] < load_checkpoint(folder / 'best.pth')['best']['step']
    assert kept(run_in(folder)) == kept(whole)


def test_more_epochs_and_more_patience(whole, tmp_path):
    "A finished run goes on, and one that ended early: as what was asked for so from the start."
    folder = run_in(tmp_path / 'run', epochs=3)
    assert kept(run_in(folder)) == kept(whole)
    patient = kept(run_in(tmp_path / 'patient', patience=0))
    assert kept(run_in(folder, patience=0)) == patient and patient[1]['epoch'] == 6 and patient[3:] == (14, None)


def test_what_was_measured_at_the_end_is_not_forgotten(tmp_path, monkeypatch):
    "Measured every second epoch and after the last: a third epoch that was the last once keeps its numbers."
    monkeypatch.setattr(Task, 'measure_every', 2)
    run_in(tmp_path / 'run', epochs=3)
    told = kept(run_in(tmp_path / 'run', epochs=5))[2]
    assert [(row['epoch'], row['AP']) for row in told['last']] == [(k, VALUES[k]) for k in (1, 2, 3, 4)]


# ---- detectors ------------------------------------------------------------------------------------------------------

TINY = dict(backbone='test_resnet', weights='none', features='layer2', frozen_backbone=True, hidden_dim=16, nheads=2, dim_feedforward=16,
            dec_layers=1, num_queries=4, scenes=4, scenes_val=2, scene_size=64, val_size=64, square=64, cached_views=1, batch_size=2,
            epochs=2, eval_every=1, lr=1e-3, best_metric='best_iou')


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    "A detector's run, in a folder where an earlier one that was thrown away left its best weights."
    (folder := tmp_path_factory.mktemp('detector') / 'run').mkdir()
    write_json(folder / 'cfg.json', dataclasses.asdict(finetune_config('demo', **TINY)))
    save_checkpoint(folder / 'best.pth', {'best': {'metric': 'best_iou', 'value': 2., 'epoch': 0, 'step': 1}})
    finish(folder)
    return folder


def test_whoever_gives_a_folder_gets_the_best(detector, tmp_path, capsys):
    told = json.loads((detector / 'evaluations.json').read_text())
    assert told['best']['value'] == max(row['best_iou'] for row in told['last']) <= 1 and len(told['last']) == 2
    best = load_checkpoint(detector / 'best.pth')
    assert {'class_names', 'category_ids', 'data', 'args'} <= best.keys() and 'optimizer' not in best
    # marked weights: those that are opened are seen
    best['model']['query_embed.weight'].fill_(7)
    save_checkpoint(detector / 'best.pth', best)
    opened = Detector.from_checkpoint(detector)
    assert f'{detector}: best.pth is taken' in capsys.readouterr().out
    assert (opened.module.model.query_embed.weight == 7).all() and opened.classes == tuple(best['class_names'])
    for make in (finetune_config, panoptic_config):
        assert make('demo', pretrain=str(detector)).pretrain == str(detector / 'best.pth')


def test_an_early_end_is_the_end(detector, capsys):
    (done := detector / 'done.json').write_text(json.dumps({'step': 4, 'seconds': 1, 'ended': 'no better best_iou'}))
    cfg = json.loads((detector / 'cfg.json').read_text())
    run = launch(detector, cfg)
    assert run.how == 'finished' and done.exists()
    lines = []
    watch(run, steps=900, draw=None, show=lambda line, fig: lines.append(line))
    assert lines[-1].endswith('ended early: no better best_iou') and '900' not in lines[-1]


def test_what_cannot_be_the_best_is_refused():
    for make, good in ((finetune_config, 'AP50'), (oneshot_config, 'unseen_AP50'), (panoptic_config, 'AP')):
        assert make('demo', best_metric=good, patience=3).best_metric == good
        with pytest.raises(ValueError, match="best_metric 'loss' is not measured here: choose"): make('demo', best_metric='loss')
    assert panoptic_config.__globals__['PanopticConfig'](stage='masks').metrics[0] == 'PQ'
    with pytest.raises(ValueError, match='patience must'): finetune_config('demo', patience=-1)
    with pytest.raises(ValueError, match='needs eval_every'): finetune_config('demo', patience=1, eval_every=0)
    with pytest.raises(ValueError, match='best_metric chooses among evaluations'): finetune_config('demo', best_metric='AP', eval_every=0)


def test_a_number_that_these_photos_do_not_give_is_named(tmp_path, capsys):
    "No object of scenes of 64 px is large: by APL nothing can be chosen"
    write_json(tmp_path / 'cfg.json', dataclasses.asdict(finetune_config('demo', **TINY | dict(best_metric='APL'))))
    finish(tmp_path)
    said = capsys.readouterr().out
    assert 'best_metric APL cannot be measured on these photos' in said and 'best_iou' in said.split('Measured:')[1]
    assert not (tmp_path / 'best.pth').exists()
