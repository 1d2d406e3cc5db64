"""What the runnable notebooks find out before the first training, and what they start then. Nothing is trained here."""
import shutil

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
