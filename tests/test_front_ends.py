"""What the runnable notebooks find out before the first training, what they start then, and single cells of what follows.
Nothing is trained here."""
import ast
import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch

from conftest import ROOT
from test_task import save_photos
from tools.cells import run_cells
from updetr.core.photos import index_photos
from updetr.core.shipped import shipped
from updetr.data.scenes import Scenes
from updetr.predict.oneshot_detector import load_oneshot
from updetr.predict.runs import Site
from updetr.tasks.panoptic import PanopticScenes

FINETUNE, ONESHOT, PANOPTIC, NEIGHBOURS, PRETRAIN = (
    ROOT / 'nbs' / f'{name}.ipynb' for name in ('finetune', 'oneshot', 'panoptic', 'oneshot_neighbours', 'pretrain'))
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


def test_an_instances_file_that_is_not_there_is_said_first(monkeypatch):
    "It was first read after both stages."
    with pytest.raises((ValueError, FileNotFoundError), match='instances_typo.json'):
        front_end(PANOPTIC, monkeypatch, instances='instances_typo.json', methods='detr')


def test_a_method_of_ones_own_has_a_folder_that_every_system_can_make(started, monkeypatch):
    run_cells(FINETUNE, monkeypatch, 'site.start(', **FEW, methods='detr,json:dumps')
    assert list(started) == ['finetune-demo-detr-42', 'finetune-demo-json-dumps-42']


# ---- single cells of what follows -----------------------------------------------------------------------------------

def run_cell(notebook, word, space):
    "Run the one cell with a word in it, among the names of `space`."
    source, = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == 'code' and word in c.source]
    exec(source, space)
    return space


def in_the_middle(views, patches):
    "A predictor that needs no model: boxes (V,P,4) and scores (V,P)."
    return torch.full((*patches.shape[:2], 4), .5), torch.ones(patches.shape[:2])


@pytest.mark.parametrize('heldout', [0., .5])
def test_photos_that_were_trained_on_are_not_called_held_out(heldout, tmp_path, monkeypatch, capsys):
    save_photos(tmp_path / 'mine', 8, (80, 60))
    given = dict(data=str(tmp_path / 'mine'), heldout=heldout, preset='demo', views=24, view_size=64, patch_size=16, gpus=0)
    space = run_cells(PRETRAIN, monkeypatch, 'make_plan(cfg', **given)
    space |= {'runs': {}, 'load_updetr': lambda path: [None], 'make_predict': lambda model: in_the_middle}
    run_cell(PRETRAIN, 'def measure_runs', space)
    capsys.readouterr()
    space |= {'runs': {Path('run'): space['cfg']}}
    run_cell(PRETRAIN, 'def measure_runs', space)
    per_seed, columns = space['measured']['mid']
    own = ['heldout', 'trained'] if heldout else ['trained']
    assert list(per_seed['run']) == own and list(columns) == [*own, 'random', 'center', 'template']
    assert ('no photos are held out' in capsys.readouterr().out) == (not heldout)
    # the pages' tables of it
    space['Markdown'], space['display'] = str, print
    run_cell(PRETRAIN, 'pretext_table({law', space)
    run_cell(PRETRAIN, "'run': run, 'law': law", space)
    said = capsys.readouterr().out
    assert ('heldout' in said) == bool(heldout) and 'trained' in said


def test_a_broken_held_out_photo_is_not_drawn_and_the_next_one_is(tmp_path, monkeypatch, capsys):
    "It ended the notebook before its metrics."
    save_photos(tmp_path / 'mine', 6, (80, 60))
    first, *_ = sorted((tmp_path / 'mine').iterdir())
    first.write_bytes(first.read_bytes()[:700])
    space, drawn = {}, []
    run_cell(PRETRAIN, 'import dataclasses', space)
    space |= dict(runs=['run'], heldout_photos=index_photos(tmp_path / 'mine'), predict=in_the_middle, size=64, root=tmp_path, report='r',
                  cfg=SimpleNamespace(patch_size=16, data='mine'), save_figure=lambda fig, path: drawn.append(path.name))
    assert len(space['heldout_photos']) == 6
    run_cell(PRETRAIN, 'draw_photo(predict', space)
    assert drawn == [f'localization_{i}' for i in range(4)] and first.name in capsys.readouterr().out


def test_one_panoptic_answer_at_a_time(tmp_path):
    "All of COCO's at once were 12 GB of pictures. And they are judged as they are written: the truth itself is PQ 100."
    val_set, asked = PanopticScenes(Scenes(3, 64, 0, 'val'), True), []
    class Segmenter:
        classes = val_set.classes
        def __call__(self, image): return asked.append(image) or val_set.panoptic(len(asked) - 1)
        def instances(self, image): return {'scores': np.zeros(0), 'labels': np.zeros(0, int), 'masks': np.zeros((0, 64, 64), bool)}
    def write(file, pairs, some):
        for n, (image_id, _) in enumerate(pairs, 1): assert len(asked) == n and image_id == val_set.image_ids[n - 1]
    space = {}
    run_cell(PANOPTIC, 'import dataclasses', space)
    space |= dict(val_set=val_set, cfg=SimpleNamespace(instances=''), site=SimpleNamespace(device='cpu'), runs={'masks': ['run']},
                  PanopticSegmenter=SimpleNamespace(from_checkpoint=lambda file, device: Segmenter()), write_panoptic=write,
                  segments_by_name=lambda answer, places: answer, by_name=lambda found, places: found, masks_truth=None)
    run_cell(PANOPTIC, 'def answers_of', space)
    space['CocoEvaluator'] = lambda truth, kind: SimpleNamespace(update=lambda ids, found: None)
    pq, _ = space['answers_of'](tmp_path)
    assert len(asked) == 3 and pq.summary()['PQ'] == pytest.approx(100)


def test_a_plan_computes_no_truth():
    def computed(*args, **kwargs): raise AssertionError('the masks of all photos')
    space = {'runs': {'masks': {}}, 'cfg': SimpleNamespace(instances=''), 'coco_truth': computed, 'val_set': None}
    run_cell(PANOPTIC, 'def answers_of', space)


def test_more_segments_than_queries():
    "No more can be matched; their memory ended the notebook before its metrics."
    drawn = []
    class Model:
        detr = SimpleNamespace(num_queries=5)
        def train(self): return self
        def look(self, images): return None, 'seen'
        def draw(self, seen, photo, query): drawn.append(query.tolist())
    space = dict(runs={'masks': {'detr': []}}, torch=torch, val_set=[{'image': None}], saved_bytes=lambda f: f() or 2**20,
                 segmenter=SimpleNamespace(model=Model(), prepare=lambda image: {'images': None}))
    class Photos(list):
        def segments(self, i): return range(7)
    space['val_set'] = Photos(space['val_set'])
    run_cell(PANOPTIC, 'def head_mib', space)
    assert drawn == [[0, 1, 2, 3, 4]] * 2 and space['memory'] == {'5 matched queries': 1., '5 queries': 1.}


def test_a_detector_is_opened_once_for_all_its_pictures(tmp_path):
    val_set, opened = Scenes(4, 64, 0, 'val'), []
    class Nothing(SimpleNamespace):
        def __len__(self): return 0
    nothing = Nothing(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    space = {}
    run_cell(FINETUNE, 'import time', space)
    space['Detector'] = SimpleNamespace(from_checkpoint=lambda file: opened.append(file) or SimpleNamespace(detect=lambda image: nothing))
    space |= dict(runs={'detr': [tmp_path / 'a'], 'updetr': [tmp_path / 'b']}, val_set=val_set, folder=tmp_path)
    space['save_figure'] = lambda *figure: None
    run_cell(FINETUNE, "'truth': draw_sample", space)
    assert opened == [tmp_path / 'a/checkpoint.pth', tmp_path / 'b/checkpoint.pth']


def test_no_report_tells_a_place():
    "Weights are often a file of somebody's machine, too."
    for name in ('pretrain', 'finetune', 'oneshot', 'panoptic', 'oneshot_neighbours', 'panoptic_neighbours'):
        code = '\n'.join(c.source for c in nbformat.read(ROOT / 'nbs' / f'{name}.ipynb', 4).cells if c.cell_type == 'code')
        assert "'config': shown_config(cfg)" in code and 'asdict(cfg)' not in code, name
