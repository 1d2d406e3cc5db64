"""What the runnable notebooks find out before the first training, and what they start then. Nothing is trained here."""
import ast
import json
import shlex
import shutil
import sys

import pytest

from conftest import ROOT
from tools.cells import run_cells
from updetr.core.shipped import shipped
from updetr.predict.oneshot_detector import load_oneshot
from updetr.predict.runs import Site

FINETUNE, ONESHOT, PANOPTIC, NEIGHBOURS = (ROOT / 'nbs' / f'{name}.ipynb'
                                           for name in ('finetune', 'oneshot', 'panoptic', 'oneshot_neighbours'))
FEW = dict(scenes=4, scenes_val=2, scene_size=64, batch_size=2, gpus=0)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    "An empty folder, and no data by the way."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('UPDETR_DATA', '')


@pytest.fixture
def started(monkeypatch):
    "{name of a run: its configuration}, of all that is started; nothing is trained."
    runs = {}
    def start(site, name, cfg, steps, data=None):
        runs[name] = cfg
        return site.root / 'runs' / name
    monkeypatch.setattr(Site, 'start', start)
    return runs


def test_one_shot_opens_the_checkpoint_that_its_run_started_from(started, tmp_path, monkeypatch):
    "{seed} and ~ stood in the path after all trainings, when the pre-trained model itself was to be asked."
    monkeypatch.setenv('HOME', str(tmp_path))
    for seed in (42, 43): shutil.copy(shipped('updetr'), tmp_path / f'up-{seed}.safetensors')
    given = FEW | dict(pretrain='~/up-{seed}.safetensors', methods='updetr,detr', seeds=2)
    space = run_cells(ONESHOT, monkeypatch, 'site.start(', **given)
    assert space['start'] == {s: str(tmp_path / f'up-{s}.safetensors') for s in (42, 43)}
    assert {name: c.pretrain for name, c in started.items()} == {
        f'oneshot-demo-{m}-{s}': space['start'][s] if m == 'updetr' else '' for s in (42, 43) for m in ('updetr', 'detr')}
    assert load_oneshot(space['start'][43])[0].num_queries == 50


def test_one_shot_of_detr_alone_is_described_by_its_own_configuration(monkeypatch):
    space = run_cells(ONESHOT, monkeypatch, 'train_plan(cfg', **FEW, pretrain=str(shipped('updetr')), methods='detr')
    assert space['cfg'].pretrain == '' and space['cfg'].weights == 'builtin'


def front_end(notebook, monkeypatch, **parameters):
    "The names that the cells up to the plan leave."
    def trained(*args, **kwargs): raise AssertionError('something was to be trained')
    for name in ('start', 'demo_checkpoint'): monkeypatch.setattr(Site, name, trained)
    return run_cells(notebook, monkeypatch, 'train_plan(cfg', **FEW | parameters)


@pytest.mark.parametrize('notebook', [FINETUNE, ONESHOT, PANOPTIC, NEIGHBOURS], ids=lambda p: p.stem)
@pytest.mark.parametrize('parameters, message', [
    ({'methods': 'detr,updetr', 'pretrain': 'typo.pth'}, 'no checkpoint .*typo.pth'),
    ({'methods': 'detr,updetr', 'pretrain': 'up-{seed}.safetensors', 'seeds': 2}, 'no checkpoint .*up-43.safetensors'),
    ({'methods': 'detr,updetr', 'hidden_dim': 64},
     r"the demo's own pre-training is of another architecture than hidden_dim 64 \(it has 128\)")])
def test_what_one_run_cannot_do_stops_all_of_them(notebook, parameters, message, tmp_path, monkeypatch):
    "DETR and others had been trained, for hours or days, when UP-DETR was refused."
    shutil.copy(shipped('updetr'), tmp_path / 'up-42.safetensors')
    with pytest.raises((ValueError, FileNotFoundError), match=message): front_end(notebook, monkeypatch, **parameters)
    assert [p.name for p in tmp_path.iterdir()] == ['up-42.safetensors']


@pytest.mark.parametrize('notebook, parameters, message', [
    (FINETUNE, {'methods': 'detr,retinanet', 'focal': 2}, 'focal are for detector detr, not retinanet'),
    (ONESHOT, {'matching_init': True}, 'matching_init is for a scratch transformer'),
    (NEIGHBOURS, {'methods': 'detr,coae', 'compare': True}, 'are for DETR, not for coae'),
    (PANOPTIC, {'methods': 'detr', 'mask_epochs': 0}, 'epochs'), (PANOPTIC, {'methods': 'detr', 'mask_lr': -1.}, 'lr')])
def test_so_does_what_goes_with_one_method_alone(notebook, parameters, message, monkeypatch):
    with pytest.raises(ValueError, match=message): front_end(notebook, monkeypatch, **parameters)


def test_measures_of_either_stage_may_choose_its_best_weights(monkeypatch):
    for metric in ('AP', 'PQ'):
        assert front_end(PANOPTIC, monkeypatch, best_metric=metric, methods='detr')['cfg'].best_metric in ('AP', '')


def plain(cfg): return {k: v for k, v in vars(cfg).items() if k not in ('pretrain', 'weights')}


def config_of(space, method, checkpoint=''):
    return space['boxes_config' if 'boxes_config' in space else 'method_config'](method, 42, checkpoint)


@pytest.mark.parametrize('notebook', [FINETUNE, ONESHOT, PANOPTIC, NEIGHBOURS], ids=lambda p: p.stem)
def test_detr_is_as_large_as_the_updetr_beside_it(notebook, monkeypatch):
    "The preset's one encoder layer stood beside the file's two: what was compared was not the start."
    file = str(shipped('updetr'))
    space = front_end(notebook, monkeypatch, pretrain=file, methods='detr,updetr')
    detr, updetr = config_of(space, 'detr'), config_of(space, 'updetr', file)
    assert (updetr.enc_layers, updetr.dim_feedforward) == (2, 256) and plain(detr) == plain(updetr)
    assert (detr.pretrain, detr.weights) == ('', 'builtin')
    # alone it is the preset's, and so it is beside the demo's own pre-training
    for given in (dict(pretrain=file, methods='detr'), dict(methods='detr,updetr')):
        assert config_of(front_end(notebook, monkeypatch, **given), 'detr').enc_layers == 1


def test_a_kept_report_named_the_sizes_itself(monkeypatch):
    "reports/oneshot_neighbours: DETR's configuration is the one that it tells."
    kept = json.loads((ROOT / 'reports/oneshot_neighbours/metrics.json').read_text(encoding='utf-8'))
    words = shlex.split(kept['provenance']['command'])
    given = {words[i + 1]: words[i + 2] for i, w in enumerate(words) if w == '-p'}
    given = {k: ast.literal_eval(v) if k not in ('pretrain', 'report') else v for k, v in given.items()}
    monkeypatch.setattr(sys.modules[__name__], 'FEW', {})
    space = front_end(NEIGHBOURS, monkeypatch, **given | {'pretrain': str(shipped('updetr'))})
    now = vars(config_of(space, 'detr'))
    assert {k: v for k, v in kept['config'].items() if now[k] != v} == {}
