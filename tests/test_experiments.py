"""The experiments at paper scale against the paper's and the reference's values, their notebooks, and runs that are killed."""
import dataclasses
import fcntl
import json
import multiprocessing.forkserver
import os
import shutil
import time
from contextlib import nullcontext
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

import test_bad_datasets as tiny
from conftest import ROOT
from test_data_changes import annotations, coco, corrected, fewer
from tools.cells import run_cells
from tools.experiments import copies, shared, texts
from tools.processes import CONTEXT, take_environment
from updetr.core.config import make_config
from updetr.data import loader
from updetr.experiments import all_reports, experiment_report, results, runner
from updetr.experiments.experiment_report import (
    PARAMETERS,
    Study,
    arm_bars,
    data_summary,
    disk_gib,
    open_study,
    photos_note,
    places,
    plan_rows,
    plan_text,
    run_study,
    show_claims,
    study_command,
)
from updetr.experiments.jobs import configure, job, job_chain, job_folder
from updetr.experiments.runner import check_finished, data_now, in_order, run_jobs
from updetr.experiments.tables import BASES, EXPERIMENTS, Scale, experiment
from updetr.model.weights import load_updetr
from updetr.train.launch import prepare

PAPER, NOTEBOOKS = Scale('paper'), sorted((ROOT / 'nbs/experiments').glob('*.ipynb'))

# Pre-training, the README command of the reference and the paper's Section 4: every arm of every table, but for what it changes.
PRETRAIN = dict(backbone='resnet50', weights='swav', frozen_backbone=True, num_queries=100, num_patches=10, hidden_dim=256, nheads=8,
                enc_layers=6, dec_layers=6, dim_feedforward=2048, dropout=.1, pre_norm=True, feature_recon=True, mask_ratio=.1,
                query_shuffle=False, attention_mask=True, matching_init=False, query_std=1., own_group=False, pos_in_input=False,
                standardize=False, eos_coef=.1, set_cost_class=1., set_cost_bbox=5., set_cost_giou=2., bbox_loss_coef=5., giou_loss_coef=2.,
                feature_loss_coef=1., lr=1e-4, weight_decay=1e-4, clip_max_norm=.1, batch_size=256, patch_size=128, patch_law='uniform',
                views=0, schedule='step', warmup=0., ema=0., cache_features=False)
FINETUNE = dict(backbone='resnet50', frozen_backbone=False, num_queries=100, hidden_dim=256, nheads=8, enc_layers=6, dec_layers=6,
                dim_feedforward=2048, dropout=.1, pre_norm=True, eos_coef=.1, set_cost_class=1., set_cost_bbox=5., set_cost_giou=2.,
                bbox_loss_coef=5., giou_loss_coef=2., lr=1e-4, lr_backbone=5e-5, weight_decay=1e-4, clip_max_norm=.1, batch_size=32,
                val_size=800, square=0, cached_views=0, schedule='step', warmup=0., fresh_queries=False, photos=0, scenes=0)
VOC = dict(year='07+12', split='trainval', year_val='2007', split_val='test', difficult='ignore')


def values(j, **expected):
    cfg = dataclasses.asdict(configure(j, 42))
    wrong = {k: (cfg[k], v) for k, v in expected.items() if cfg[k] != v}
    assert not wrong, f'{j}: (ours, expected) {wrong}'


def arms(name): return experiment(name, PAPER).arms


@pytest.mark.parametrize('epochs, drop', [(150, 100), (300, 200)])
def test_table1_is_the_papers(epochs, drop):
    detr, updetr = (arms('table1_voc')[f'{n}, {epochs} epochs'] for n in ('DETR', 'UP-DETR'))
    values(detr, **FINETUNE | VOC | dict(epochs=epochs, lr_drop=drop, weights='swav', pretrain=''))
    values(updetr, **FINETUNE | VOC | dict(epochs=epochs, lr_drop=drop, weights='none'))
    values(updetr.start, **PRETRAIN | dict(epochs=60, lr_drop=40))


def test_table2_is_the_papers():
    rows = arms('table2_coco')
    assert list(rows) == [f'{n}, {e} epochs' for e in (150, 300) for n in ('DETR (supervised CNN)', 'DETR (SwAV CNN)', 'UP-DETR')]
    for name, j in rows.items():
        epochs = int(name.split()[-2])
        weights = 'supervised' if 'supervised' in name else 'swav' if 'SwAV' in name else 'none'
        values(j, **FINETUNE | dict(epochs=epochs, lr_drop={150: 100, 300: 200}[epochs], weights=weights, split='train', split_val='val'))
        if name.startswith('UP'): values(j.start, **PRETRAIN | dict(epochs=60, lr_drop=40))


def test_table3_is_the_papers():
    for name, j in arms('table3_oneshot').items():
        values(j, **FINETUNE | VOC | dict(task='oneshot', epochs=300, lr_drop=200, unseen='voc', eval_queries=5, query_size=128, absent=0.))
        assert (j.start is None) == (name == 'DETR')


def test_table4_is_the_papers():
    for name, masks in arms('table4_panoptic').items():
        values(masks, task='panoptic', stage='masks', epochs=25, lr_drop=15, batch_size=32, threshold=.85)
        values(masks.start, **FINETUNE | dict(task='panoptic', stage='boxes', epochs=300, lr_drop=200))
        assert (masks.start.start is None) == (name == 'DETR')


def test_tables_5_and_6_are_the_papers():
    "Section 4.5: 15 epochs, the learning rate drops after 10; then VOC with 150 epochs. A trained CNN has the learning rate of the rest."
    short = PRETRAIN | dict(epochs=15, lr_drop=10)
    for m in (1, 10): values(arms('table5_multiquery')[f'UP-DETR, M={m}'].start, **short | dict(num_patches=m))
    for name, j in arms('table6_frozen_recon').items():
        values(j, **FINETUNE | VOC | dict(epochs=150, lr_drop=100))
        if name == 'DETR': continue
        frozen, recon = 'frozen' in name, 'no reconstruction' not in name
        values(j.start, **short | dict(frozen_backbone=frozen, feature_recon=recon, lr_backbone=1e-4))
    for name, j in arms('fig6_attention_mask').items(): values(j, **short | dict(attention_mask=name == 'with mask'))


def site(scale): return Scale(scale) if scale in ('toy', 'paper') else Scale(scale, '/photos', '/labelled')


CLAIMS = {  # what a reader is told -> the arm that is said to be better, the other one
    'ten patches at a time are better than one': ('UP-DETR, M=10', 'UP-DETR, M=1'),
    'also one patch at a time is better than no pre-training': ('UP-DETR, M=1', 'DETR'),
    'a frozen CNN is essential (with reconstruction)': ('(d) CNN frozen, reconstruction', '(c) CNN trained, reconstruction'),
    'a frozen CNN is essential (without reconstruction)': ('(b) CNN frozen, no reconstruction', '(a) CNN trained, no reconstruction'),
    'reconstruction helps early': ('(d) CNN frozen, reconstruction', '(b) CNN frozen, no reconstruction'),
    'the attention mask lowers the loss late in pre-training': ('with mask', 'without mask'),
    'matching within the own group is better than free matching': ('base', 'free matching'),
    'starting as an appearance matcher is better than the default initialisation': ('base', 'default initialisation'),
    'fifty patches at a time are better than twenty': ('M=50, N=100', 'M=20, N=40'),
    'labels help a CNN to localise': ('own photos, with labels', 'own photos, without labels'),
    'training a CNN without labels helps it to localise': ('own photos, without labels', 'not trained'),
    'with five times as many queries a scratch transformer learns less': ('DETR, N=20', 'DETR, N=100'),
    'three times the epochs make up for pre-training': ('DETR, three times as long', 'UP-DETR, N=20'),
    'pre-training is more than its initialisation': ('UP-DETR, N=20', 'DETR, matching start')}


def test_a_claim_compares_the_arms_that_it_speaks_of():
    "Exchanged, a report would say that the contrary holds."
    for name in EXPERIMENTS:
        for claim in experiment(name, site('mini')).claims:
            pair = CLAIMS.get(claim.text, ('UP-' + claim.worse, claim.worse))
            assert (claim.better, claim.worse) == pair, claim
            assert claim.lower == ('loss' in claim.metric), claim
            assert claim.metric.startswith('early') == any(word in claim.text for word in ('early', 'speeds up')), claim


@pytest.mark.parametrize('scale', BASES)
def test_small_views_are_no_whole_photos(scale):
    "They are the base's views where it has some; at the paper's scale its photos stay whole, and an arm of another name is another job"
    rows = experiment('ablations_pretext', site(scale)).arms
    live, cached = (configure(rows[name], 42) for name in ('small views', 'small views, cached features'))
    assert live.views and (live.views, live.view_size) == (cached.views, cached.view_size) and not live.cache_features
    assert scale != 'paper' or len(set(rows.values())) == len(rows)


@pytest.mark.parametrize('scale', BASES)
def test_more_epochs_are_compared_with_a_pretraining_of_as_many_queries(scale):
    e = experiment('ablations_detr', site(scale))
    claim, = (c for c in e.claims if c.text.startswith('three times the epochs'))
    longer, pretrained = (configure(e.arms[name], 42) for name in (claim.better, claim.worse))
    assert longer.num_queries == pretrained.num_queries and longer.epochs == 3 * pretrained.epochs


def test_a_plan_without_data_counts_the_photos_that_are_drawn():
    "As many steps on fewer photos, in more epochs: 77,550 of 32 photos, those of VOC's 150 epochs."
    rows = plan_rows(experiment('label_fraction', PAPER).wanted([42]), {})
    fewer = [r for r in rows if r['training'].startswith('finetune')]
    assert len({r['photos'] for r in fewer}) == 4
    assert all(abs(r['steps'] / 77_550 - 1) < .03 for r in fewer), [r['steps'] for r in fewer]
    coco = configure(job('finetune', 'coco150', year='2017'), 42)
    assert experiment_report.data_summary(coco).n_train == 118_287


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_the_papers_plan_is_complete(name):
    "Every training stands once, starts before what starts from it, and its steps are those of the drop-last loader."
    e = experiment(name, PAPER)
    rows = plan_rows(e.wanted([42]), {'pretrain': 100., 'finetune': 50., 'oneshot': 50., 'panoptic': 25.})
    names = [r['training'] for r in rows]
    needed = {job_folder('', step, 42).name for j in e.arms.values() for step in job_chain(j)}
    assert len(set(names)) == len(names) and set(names) == needed
    assert all(not r['starts from'] or names.index(r['starts from']) < i for i, r in enumerate(rows))
    assert all(r['GPU hours'] > 0 and r['disk, GiB'] > 0 and r['steps'] == r['photos'] // r['batch'] * r['epochs'] for r in rows)
    assert 'GPU hours' in plan_text(e, [42], {}) and f'{len(rows)} trainings' in plan_text(e, [42], {})


def test_every_experiment_has_its_page():
    assert [p.stem for p in NOTEBOOKS] == sorted(EXPERIMENTS)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_page_has_what_all_pages_share(path):
    "Commands, parameters and the call are written by the tool: the fifteen cannot drift. A page of parameters is one that it reads."
    cells = {c.id: c.source for c in nbformat.read(path, 4).cells}
    differ = {id for id, source in shared(path.stem).items() if cells.get(id) != source}
    assert not differ, f'{path.name}: cells {sorted(differ)} are not as `python tests/tools/experiments.py` writes them'
    assert ROOT / 'reports' / path.stem / path.name in copies(path.stem)
    for copy in copies(path.stem):
        assert texts(copy).items() <= texts(path).items(), f'{copy.parent.name} says something else: the same tool writes it'
    space = {}
    exec(cells['c003'], space)
    own = {name: space[name] for name in PARAMETERS if name in space}
    assert own == {name: PARAMETERS[name] for name in own} and {'scale', 'seeds', 'photos', 'gpus', 'plan_only', 'report'} <= own.keys()
    assert ('private' in own) == any('private' in c for id, c in cells.items() if id not in shared(path.stem))
    assert len([c for c in cells.values() if 'run_study(' in c]) == 1 and 'open_study' not in ''.join(cells.values())


def test_a_parameter_of_another_page_is_taken_and_not_recorded_unless_it_is_given(tmp_path):
    "One command line serves all pages."
    given = dict(seeds=2, unseen='cow', cnns='swav', private=True, labelled='', gpus=0, report=str(tmp_path))
    study = open_study('fig6_attention_mask', dict(given))
    assert study.seeds == [42, 43] and study.given['unseen'] == 'cow'
    line = study_command(study)
    assert '-p seeds 2 ' in line and '-p unseen cow' in line and 'labelled' not in line and 'img_s' not in line


def test_scales_have_the_same_kinds_of_jobs():
    assert set(BASES['toy']) == set(BASES['small']) == set(BASES['mini']) == set(BASES['paper']) - {'coco300'} | {'cnn'}


def test_toy_scale_is_small_and_claims_nothing(tmp_path):
    "Every experiment at toy scale with its one seed: some twenty steps a training."
    rows = {r['training']: r for id in EXPERIMENTS for r in plan_rows(experiment(id, Scale()).wanted([42]), {})}
    assert len(rows) < 60 and sum(r['steps'] for r in rows.values()) < 2000
    study = open_study('table1_voc', dict(gpus=0))
    assert study.seeds == [42] and 'nothing is decided' in show_claims(study) and 'holds' not in show_claims(study)


@pytest.mark.parametrize('scale', ['toy', 'small', 'mini'])
def test_no_training_has_fewer_photos_than_a_batch(scale):
    "It would be refused after the others have been trained, and its table could not be made"
    steps = {step for id in EXPERIMENTS for arm in experiment(id, site(scale)).arms.values() for step in job_chain(arm)}
    for cfg in (configure(step, 42) for step in steps):
        number = getattr(cfg, 'views', 0) or getattr(cfg, 'photos', 0) or getattr(cfg, 'scenes', 0)
        assert not number or number >= cfg.batch_size, cfg


def test_a_report_names_the_photos_that_were_trained_on(tmp_path):
    "At paper scale, too: ImageNet stands only where a plan has no data"
    for name in ('train/a/1.jpg', 'train/b/2.jpg', 'train/b/3.jpg', 'val/a/4.jpg', 'val/b/5.jpg'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    def summary(**data): return dataclasses.astuple(data_summary(configure(Scale('paper', **data).base('pretrain'), 42)))
    assert summary(photos=str(tmp_path)) == (tmp_path.name, 3, 2) and summary(photos=str(tmp_path / 'train')) == ('train', 3, 0)
    assert summary() == ('ImageNet', 1_281_167, 50_000)


def test_the_disk_of_features_is_that_of_their_maps():
    "As many channels and cells as the CNN gives, two bytes each; the rest is checkpoints"
    for changes, channels, cells in ((dict(features='blocks.4'), 112, 16), (dict(features='blocks.4,blocks.5'), 112 + 192, 8),
                                     (dict(backbone='resnet50', weights='none', features=''), 2048, 8)):
        cfg = make_config('demo', view_size=256, **changes)
        kept = disk_gib(cfg, 1000) - disk_gib(dataclasses.replace(cfg, cache_features=False), 1000)
        assert kept == pytest.approx(1000 * 2 * channels * cells ** 2 / 2**30)


def test_a_bar_stands_on_its_arms_line():
    rows = [dict(method=name, seeds=[1], metrics=numbers) for name, numbers in
            (('A', {'n': dict(mean=10., per_seed=[10.])}), ('B', {}), ('C', {'n': dict(mean=30., per_seed=[30.])}))]
    ax, = arm_bars(rows, {'n': 'number'}).axes
    lines = {label.get_text(): y for label, y in zip(ax.get_yticklabels(), ax.get_yticks())}
    assert {bar.get_width(): round(bar.get_y() + bar.get_height() / 2) for bar in ax.patches} == {10.: lines['A'], 30.: lines['C']}


def test_plan_only_prints_the_papers_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = ROOT / 'nbs/experiments/table6_frozen_recon.ipynb'
    wanted = dict(scale='paper', plan_only=True, seeds=1)
    text = run_cells(notebook, monkeypatch, 'run_study(', **wanted)['study'].plan()
    assert '9 trainings' in text and 'frozen_backbone=False' in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize('parameters, message', [
    ({'scael': 'toy'}, 'did you mean scale?'), ({'scale': 'mini'}, '-p photos FOLDER'),
    ({'scale': 'toy', 'photos': 'x'}, '-p scale small')])
def test_a_wrong_parameter_stops_at_once(parameters, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = ROOT / 'nbs/experiments/table1_voc.ipynb'
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_cells(notebook, monkeypatch, 'run_study(', **parameters)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('wrong', [{'workers': -1}, {'seeds': 1.5}, {'seed': 'abc'}, {'private': 'no'}])
def test_a_parameter_of_another_kind_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        experiment_report.open_study('table1_voc', experiment_report.PARAMETERS | wrong)


def test_a_folder_may_have_a_number_for_its_name(tmp_path, monkeypatch):
    "papermill reads it as one"
    given = dict(scale='mini', labelled=2024, photos=7, plan_only=True)
    study = experiment_report.open_study('table1_voc', experiment_report.PARAMETERS | given)
    assert {'2024', '7'} <= set(experiment_report.places(study))


def test_a_killed_training_is_told_from_one_that_failed(tmp_path):
    tiny_job = job('pretrain', 'demo', **TINY)
    folder = job_folder(tmp_path, tiny_job, 1)
    wanted = {folder: (tiny_job, 1)}
    assert 'killed by signal 9' in runner._failures(wanted, {folder: -9})
    assert 'killed by' not in runner._failures(wanted, {folder: 1})
    with pytest.raises(ValueError, match='workers -1'): run_jobs([(tiny_job, 1)], tmp_path, workers=-1)


def test_an_arm_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    e = experiment('table1_voc', Scale('toy'))
    first, second, *_ = e.arms
    for arm, keys in ((first, ['b']), (second, ['a', 'b'])):
        folder = job_folder(tmp_path, e.arms[arm], 42)
        folder.mkdir(parents=True)
        (folder / 'log.txt').write_text('\n'.join(json.dumps({'step': n, **dict.fromkeys(keys, n)}) for n in range(3)))
    fig = experiment_report.arm_curves(e, tmp_path, [42], {'a': 'a', 'b': 'b'})
    one, both = fig.axes
    assert [line.get_color() for line in (*one.lines, *both.lines)] == ['C1', 'C0', 'C1']
    assert len(both.get_legend().get_texts()) == 2 and not one.get_legend()


def labelled_folder(root):
    "Six photos with labels of two classes"
    for kind in ('images', 'labels'): (root / kind).mkdir(parents=True)
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(root / f'images/{k}.png')
        (root / f'labels/{k}.txt').write_text(f'{k % 2} .5 .5 .5 .5')
    return root


def test_data_that_a_table_lacks_is_found_before_the_first_training(tmp_path, monkeypatch):
    "Of two pages the second asks for 200 labelled photos; there are six"
    labelled_folder(tmp_path / 'set')
    command = ['make reports', '--scale', 'small', '--only', 'fig7_localization,table1_voc', '--to', str(tmp_path / 'out')]
    monkeypatch.setattr('sys.argv', [*command, '-p', 'photos', str(tmp_path / 'set/images'), '-p', 'labelled', str(tmp_path / 'set')])
    monkeypatch.setattr(all_reports, 'run_jobs', lambda *args: pytest.fail('trained before the data was looked at'))
    with pytest.raises(ValueError, match='photos 200: only [1-6] labelled(?s:.*)--only fig7_localization$'): all_reports.main()


def test_fewer_photos_than_a_batch_are_found_before_the_first_training(tmp_path, monkeypatch):
    folder = labelled_folder(tmp_path / 'set')
    command = ['make reports', '--scale', 'mini', '--only', 'table2_coco', '-p', 'photos', str(folder), '-p', 'labelled', str(folder)]
    monkeypatch.setattr(all_reports, 'run_jobs', lambda *args: pytest.fail('trained before the photos were counted'))
    monkeypatch.setattr('sys.argv', command)
    with pytest.raises(ValueError, match='finetune takes 64 photos a step, and set has [1-6] to train on'): all_reports.main()


@pytest.mark.parametrize('id, pictures', [('fig7_localization', ('localization_0.png', 'localization_3.svg')),
                                          ('fig8_finetuned', ('detections.png', 'detections.svg'))])
def test_a_private_report_has_no_photos_of_an_earlier_call(id, pictures, tmp_path, monkeypatch):
    for name in (*pictures, 'metrics.json'): (tmp_path / name).write_text('{}')
    def trains(study, show): raise KeyboardInterrupt
    monkeypatch.setattr(Study, 'run', trains)
    with pytest.raises(KeyboardInterrupt): run_study(id, dict(private=True, report=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ['metrics.json']


def test_runs_that_never_began_are_not_said_to_have_failed(tmp_path):
    "One starts from the other, which cannot read its photos"
    start = job('pretrain', 'demo', **TINY | dict(data=str(tmp_path / 'no photos')))
    later = job('finetune', 'demo', start, scenes=8, scenes_val=4)
    with pytest.raises(RuntimeError) as e: run_jobs([(later, 1)], tmp_path, workers=1, show=lambda line: None)
    said = str(e.value)
    assert said.startswith('1 of 2 runs failed, 1 that start from them were left out; call again to go on.')
    assert 'no photos' in said and job_folder(tmp_path, later, 1).name not in said


def test_a_table_of_unseen_classes_asks_for_them_before_the_first_training(tmp_path, monkeypatch):
    "The usual ones are those of the built-in scenes; own photos have other classes"
    folder = labelled_folder(tmp_path / 'set')
    (folder / 'labels/classes.txt').write_text('dog\nsheep')
    task, small = BASES['small']['oneshot']
    monkeypatch.setitem(BASES['small'], 'oneshot', (task, small | dict(photos=0)))
    command = ['make reports', '--scale', 'small', '--only', 'table3_oneshot', '-p', 'photos', str(folder), '-p', 'labelled', str(folder)]
    monkeypatch.setattr(all_reports, 'run_jobs', lambda *args: pytest.fail('trained before the classes were looked at'))
    monkeypatch.setattr('sys.argv', command)
    with pytest.raises(ValueError, match="unseen='scenes': the data has no cat, cup; name some of its classes: dog, sheep"):
        all_reports.main()


@pytest.fixture(scope='module')
def papers_data(tmp_path_factory):
    "VOC's folders, COCO's and one of photos, of a photo or two"
    root = tmp_path_factory.mktemp('papers')
    # a class that is seen in Table 3, and the unseen ones
    objects = ''.join(tiny.OBJECT.replace('rocket', name) for name in ('dog', 'aeroplane', 'cat', 'cow', 'sheep'))
    for year in (2007, 2012): tiny.voc(root / 'VOCdevkit', objects, year=year)
    lists = root / 'VOCdevkit/VOC2007/ImageSets/Main'
    shutil.copy(lists / 'trainval.txt', lists / 'test.txt')
    tiny.panoptic(tiny.coco(root / 'co,co'))
    for path in [*(root / 'co,co').glob('**/*train2017*')]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, path.with_name(path.name.replace('train', 'val')))
    (root / 'photos').mkdir()
    shutil.copy(tiny.PHOTO, root / 'photos')
    (root / 'coco').symlink_to(root / 'co,co')
    return root


@pytest.fixture
def one_a_step(monkeypatch):
    "The paper's trainings with a batch of one photo: the sets of these tests have as few"
    monkeypatch.setitem(BASES, 'paper', {kind: (preset, own | dict(batch_size=1)) for kind, (preset, own) in BASES['paper'].items()})


def papers_study(id, root, labelled): return open_study(id, dict(scale='paper', photos=str(root / 'photos'), labelled=labelled, gpus=0))


# that one takes parts of VOC's 16,551 photos
@pytest.mark.parametrize('id', sorted({*EXPERIMENTS} - {'label_fraction'}))
@pytest.mark.usefixtures('one_a_step')
def test_the_papers_scale_runs_on_voc_and_coco(id, papers_data):
    "Tables of VOC, tables of COCO and those of both, with one command"
    root = papers_data
    study = papers_study(id, root, f'{root}/VOCdevkit, {root}/coco')
    study.plan()
    sets = {cfg.data for cfg in (configure(step, 42) for arm in study.e.arms.values() for step in job_chain(arm)) if cfg.task != 'pretrain'}
    both, coco_only = ({f'{root}/VOCdevkit', f'{root}/coco'}, {f'{root}/coco'})
    want = {'fig1_fig4_curves': both, 'table2_coco': coco_only, 'table4_panoptic': coco_only}
    assert sets <= want.get(id, both - coco_only) and (id not in want or sets == want[id])
    assert {*both, f'{root}/photos'} == {*places(study)}


@pytest.mark.usefixtures('one_a_step')
def test_what_is_asked_for_where_voc_and_coco_are_needed(papers_data):
    "One set is enough for a table of one, and a folder with a comma in its name is one"
    root = papers_data
    study = papers_study('table2_coco', root, f'{root}/co,co')
    assert study.plan() and f'{root}/co,co' in places(study)
    for labelled in ('', f'{root}/VOCdevkit', f'{root}/co,co'):
        with pytest.raises(ValueError, match='-p photos FOLDER and -p labelled VOC,COCO'): papers_study('fig1_fig4_curves', root, labelled)
    with pytest.raises(ValueError, match='must be one set, or two: VOC,COCO'): papers_study('table1_voc', root, 'a,b,c')


@pytest.mark.parametrize('asked', [['--plan'], ['-p', 'plan_only', 'True']], ids=' '.join)
def test_a_plan_is_printed_and_nothing_is_trained(asked, tmp_path, monkeypatch, capsys):
    "The parameter of the pages asks for it as well as the option does"
    monkeypatch.setattr('sys.argv', ['make reports', '--scale', 'paper', '--only', 'fig7_localization', '--to', str(tmp_path), *asked])
    monkeypatch.setattr(all_reports, 'run_jobs', lambda *args: pytest.fail('trained for a plan'))
    all_reports.main()
    assert '3 trainings' in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.usefixtures('one_a_step')
@pytest.mark.parametrize('asked', [['--plan'], []], ids=str)
def test_all_pages_together_tell_once_of_parts_that_are_trained_on_together(asked, tmp_path, monkeypatch, capsys):
    "Photos below train2017/ and val2017/; a text of labels there is no photo"
    for name in ('train2017/1.jpg', 'val2017/2.jpg', 'labels/test2017/2.txt'):
        (tmp_path / 'coco' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'coco' / name).touch()
    command = ['make reports', '--scale', 'paper', '--only', 'fig7_localization,ablations_patches', '--to', str(tmp_path)]
    monkeypatch.setattr('sys.argv', [*command, '-p', 'photos', str(tmp_path / 'coco'), '-p', 'gpus', '0', *asked])
    class Begun(Exception): pass
    def begin(*args): raise Begun
    monkeypatch.setattr(all_reports, 'run_jobs', begin)
    with nullcontext() if asked else pytest.raises(Begun): all_reports.main()
    assert capsys.readouterr().out.count('all parts below coco are trained on (train 1, val 1):') == 1


@pytest.mark.usefixtures('one_a_step')
def test_photos_are_listed_once_for_all_trainings_and_anew_for_the_next_study(tmp_path, monkeypatch):
    "A million files on a network disk take minutes: plan and note share one walk; a cell that is run again sees what has come"
    walked, walk = [], experiment_report.walk_files
    monkeypatch.setattr(experiment_report, 'walk_files', lambda folder: walked.append(folder) or walk(folder))
    for part, number in (('train2017', 1), ('val2017', 2)):
        (tmp_path / part).mkdir()
        (tmp_path / part / '1.jpg').touch()
        study = open_study('ablations_patches', dict(scale='paper', photos=str(tmp_path), plan_only=True, seeds=2))
        rows = plan_rows(study.e.wanted(study.seeds), {})
        assert len(rows) > 2 and {row['photos'] for row in rows} == {number}
        assert ('(train 1, val 1)' in photos_note(study)) == (number == 2)
        assert walked == [str(tmp_path)] * number


def command_line(monkeypatch, *asked):
    "What `make reports` reads of its command line"
    monkeypatch.setattr('sys.argv', ['make reports', *asked])
    return all_reports._arguments()


@pytest.mark.parametrize('asked', [['--only', 'table1_voc,fig7_localization'], ['--only', 'table1_voc', '--only', 'fig7_localization'],
                                   ['--only', 'table1_voc,,table1_voc', '--only', 'fig7_localization,table1_voc']], ids=' '.join)
def test_pages_are_made_once_however_often_they_are_named(asked, monkeypatch):
    "The last of several --only does not stand for all; a page named twice would be written into one file by two processes at once"
    studies = all_reports._open_all(command_line(monkeypatch, *asked))
    assert [study.e.id for study in studies] == ['table1_voc', 'fig7_localization']
    assert len({study.folder for study in studies}) == 2


def test_the_folder_of_one_page_is_not_given_to_all(tmp_path, monkeypatch):
    assert len(all_reports._open_all(command_line(monkeypatch))) == len(EXPERIMENTS)
    with pytest.raises(ValueError, match='is the folder of one page: name that of all with --to'):
        all_reports._open_all(command_line(monkeypatch, '-p', 'report', str(tmp_path)))


TINY = dict(views=16, view_size=64, patch_size=32, hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2, num_queries=10, num_patches=5,
            batch_size=4, epochs=6, save_every=10, log_every=1)


def test_the_call_fails_with_as_many_pages_as_failed(tmp_path, monkeypatch):
    "And the index of the reports that are there is written where they are."
    indices, pages = [], iter((1, 0, 2))
    monkeypatch.setattr('sys.argv', ['make reports', '--only', 'table1_voc,fig7_localization,label_fraction', '--to', str(tmp_path)])
    monkeypatch.setattr(all_reports, 'run_jobs', lambda *args: {})
    monkeypatch.setattr(all_reports, '_execute', lambda study, given: next(pages))
    monkeypatch.setattr(all_reports, 'write_index', indices.append)
    with pytest.raises(SystemExit) as left: all_reports.main()
    assert left.value.code == 2 and indices == [tmp_path]


def test_no_more_trainings_run_at_a_time_than_are_asked_for(tmp_path, monkeypatch):
    "They share the cores; of five two run, and the next begins when one has ended."
    running, most, asked = [], [], []

    class Training:
        sentinel, left = None, 3
        def __init__(self, folder, threads):
            self.folder = folder
            folder.mkdir(parents=True)
            running.append(folder)
            most.append(len(running))
            asked.append(threads)

        def is_alive(self):
            self.left -= 1
            if self.left: return True
            (self.folder / 'result.json').write_text('{}')
            running.remove(self.folder)

        def join(self): pass

    monkeypatch.setattr(runner, 'start_process', Training)
    monkeypatch.setattr(runner, 'write_start', lambda *args: None)
    monkeypatch.setattr(runner.multiprocessing.connection, 'wait', lambda *args: None)
    monkeypatch.setattr(runner, 'usable_cores', lambda: 8)
    monkeypatch.setattr(runner, 'finish', lambda folder: {})
    small = job('pretrain', 'demo', **TINY | dict(weights='none', standardize=False))
    for workers, at_once, threads in ((2, 2, 4), (0, 5, 1)):
        run_jobs([(small, seed) for seed in range(5)], tmp_path / str(workers), workers, show=lambda line: None)
        assert len(most) == 5 and max(most) == at_once and set(asked) == {threads}
        most.clear(), asked.clear()


class Waiting:
    "What `launch` is asked for, and nothing is started; the folder is prepared as by itself."
    def __init__(self, monkeypatch, cores, room):
        self.decoders, self.gpus = [], []
        monkeypatch.setattr(runner, 'usable_cores', lambda: cores)
        monkeypatch.setattr(loader, '_shared_memory', lambda: ('/dev/shm', SimpleNamespace(free=room)))
        monkeypatch.setattr(runner, 'launch', self.launch)
        monkeypatch.setattr(runner, 'watch', lambda run: None)
        monkeypatch.setattr(runner, 'finish', lambda *args: {})

    def launch(self, folder, cfg, gpus, may_change):
        prepare(folder, cfg, may_change)
        self.decoders.append(cfg['num_workers'])
        self.gpus.append(gpus)


@pytest.mark.parametrize('cores, gpus, room, decoders', [
    (16, 1, 2**36, 8), (16, 4, 2**36, 4), (2, 4, 2**36, 0), (16, 1, 2**33, 4), (16, 2, 2**33, 2), (16, 1, 2**26, 0)])
def test_on_a_gpu_other_processes_decode_what_is_not_cached(cores, gpus, room, decoders, tmp_path, monkeypatch):
    "Else the GPU waits for one core. Who asks for a number has it; a bank is filled by all cores anyway. Folders are the same as ever."
    no_cnn, live = dict(weights='none', standardize=False), dict(cache_features=False, cached_patches=0)
    views, photos = TINY | no_cnn, dict(no_cnn, scenes=8, scenes_val=4)
    arms = [job('pretrain', 'demo', **views | live), job('finetune', 'demo', **photos, cached_views=0),
            job('pretrain', 'demo', **views), job('finetune', 'demo', **photos, cached_views=1),
            job('pretrain', 'demo', **views | live | dict(views=20, num_workers=3))]
    waiting = Waiting(monkeypatch, cores, room)
    for _ in range(2): run_jobs([(arm, 1) for arm in arms], tmp_path, gpus=gpus, show=lambda line: None)
    assert waiting.decoders == [decoders, decoders, 0, 0, 3] * 2
    assert set(tmp_path.iterdir()) == {job_folder(tmp_path, arm, 1) for arm in arms}


def test_each_training_takes_as_many_gpus_as_divide_its_batch(tmp_path, monkeypatch, capsys):
    waiting, no_cnn = Waiting(monkeypatch, 16, 2**36), dict(weights='none', standardize=False)
    arms = [job('pretrain', 'demo', **TINY | no_cnn | dict(batch_size=n)) for n in (4, 5, 6)]
    run_jobs([(arm, 1) for arm in arms], tmp_path, gpus=5, show=lambda line: None)
    assert waiting.gpus == [4, 5, 3]
    assert 'on 4 of 5 GPUs: a batch of 4 photos is divided among no more\n' in capsys.readouterr().out


def run_alone(environment, jobs, root):
    "Run jobs as a process of one's own does: with a server of forks that ends with it."
    take_environment(environment)
    multiprocessing.forkserver._forkserver.__init__()
    run_jobs(jobs, root, workers=2, show=lambda line: None)


@pytest.mark.parametrize('where', ['cpu', 'meta'])
def test_a_pretraining_is_measured_where_it_is_asked_for(where, tmp_path, monkeypatch):
    "After a training on a GPU a CPU would need minutes for it"
    tiny = job('pretrain', 'demo', **TINY | dict(epochs=1))
    run_jobs([(tiny, 1)], tmp_path, workers=1, show=lambda line: None)
    folder, asked = job_folder(tmp_path, tiny, 1), []
    (folder / 'result.json').unlink()

    def answer(model):
        asked.append({p.device.type for p in model.parameters()})
        return lambda views, patches: (torch.full((*patches.shape[:2], 4), .5), torch.zeros(patches.shape[:2]))

    monkeypatch.setattr(results, 'make_predict', answer)
    assert results.finish(folder, where)['mid_heldout_mean_iou'] > 0 and asked == [{where}]


def test_a_killed_runner_leaves_no_process_and_goes_on_to_the_same_numbers(tmp_path):
    "SIGKILL of the runner in the middle: its trainers save and leave, and the next call ends with the numbers of an undisturbed one."
    jobs = [(job('pretrain', 'demo', **TINY), s) for s in (1, 2)]
    run_jobs(jobs, tmp_path / 'whole', workers=2, show=lambda line: None)
    folders = [job_folder(tmp_path / 'killed', *one) for one in jobs]
    runner, end = CONTEXT.Process(target=run_alone, args=(dict(os.environ), jobs, tmp_path / 'killed')), time.monotonic() + 200
    runner.start()
    while not any((f / 'checkpoint.pth').exists() for f in folders):
        assert time.monotonic() < end and runner.is_alive()
        time.sleep(.02)
    runner.kill()
    runner.join()
    assert not all((f / 'result.json').exists() for f in folders), 'the blow came too late'
    run_jobs(jobs, tmp_path / 'killed', workers=2, show=lambda line: None)
    for f in folders:
        got, want = (json.loads((tmp_path / kind / f.name / 'result.json').read_text()) for kind in ('killed', 'whole'))
        assert {k: v for k, v in got.items() if k != 'train_seconds'} == {k: v for k, v in want.items() if k != 'train_seconds'}


def test_trainings_leave_with_their_runner(tmp_path):
    "SIGKILL of the runner: nobody goes on in secret; what was trained is kept."
    jobs = [(job('pretrain', 'demo', **TINY | dict(epochs=100_000)), s) for s in (1, 2)]
    folders = [job_folder(tmp_path, *one) for one in jobs]
    runner, end = CONTEXT.Process(target=run_alone, args=(dict(os.environ), jobs, tmp_path)), time.monotonic() + 200
    runner.start()
    while not all((f / 'checkpoint.pth').exists() for f in folders):
        assert time.monotonic() < end and runner.is_alive()
        time.sleep(.02)
    runner.kill()
    for f in folders:
        with open(f / 'training.lock', 'a+') as lock:
            while True:
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    assert time.monotonic() < end, 'it trains on'
                    time.sleep(.02)
        # to the step it came to, and not only each tenth
        last = json.loads((f / 'log.txt').read_text().splitlines()[-1])['step']
        assert torch.load(f / 'checkpoint.pth', weights_only=True)['step'] == last and not (f / 'done.json').exists()


def test_a_given_checkpoint_stands_for_the_pretraining_wherever_it_lies(tmp_path):
    start, root, moved = job('pretrain', 'demo', **TINY), tmp_path / 'runs', tmp_path / 'elsewhere' / 'mine.pth'
    run_jobs([(start, 1)], root, workers=1)
    checkpoint, own = job_folder(root, start, 1) / 'checkpoint.pth', dict(scenes=8, scenes_val=4, scene_size=64, val_size=64, square=64,
                                                                            cached_views=1, epochs=1)
    named = job('finetune', 'demo', pretrain=str(checkpoint), **own)
    by_name, by_job = (run_jobs([(j, 1)], root, workers=1)[j, 1] for j in (named, job('finetune', 'demo', start, **own)))
    assert by_name | {'train_seconds': 0} == by_job | {'train_seconds': 0}
    moved.parent.mkdir()
    shutil.copy(checkpoint, moved)
    done, again = job_folder(root, named, 1) / 'done.json', job('finetune', 'demo', pretrain=str(moved), **own)
    before = done.stat().st_mtime_ns
    assert run_jobs([(again, 1)], root, workers=1)[again, 1] == by_name and done.stat().st_mtime_ns == before
    # an unfinished one goes on from there
    for file in ('result.json', 'done.json'): (job_folder(root, named, 1) / file).unlink()
    assert run_jobs([(again, 1)], root, workers=1)[again, 1] | {'train_seconds': 0} == by_name | {'train_seconds': 0}


def test_a_pretraining_freezes_the_cnn_that_was_trained_for_it(tmp_path):
    "Three trainings in a row: the CNN's own, a pre-training on it, a detector on that. The CNN is the same to the end."
    small = dict(scenes=8, scenes_val=4, scene_size=64, batch_size=4, epochs=1, eval_every=1)
    cnn = job('cnn', 'demo', crop_size=32, **small)
    start = job('pretrain', 'demo', cnn, **TINY | dict(epochs=1))
    after = job('finetune', 'demo', start, val_size=64, square=64, cached_views=1, **small)
    found = run_jobs([(cnn, 1), (after, 1)], tmp_path, workers=1, show=lambda line: None)
    assert {'neighbours', 'most'} <= found[cnn, 1].keys() and 'AP' in found[after, 1]
    learnt, tuned = (torch.load(job_folder(tmp_path, j, 1) / 'checkpoint.pth', weights_only=True)['model'] for j in (cnn, after))
    frozen = load_updetr(job_folder(tmp_path, start, 1) / 'checkpoint.pth')[0].backbone[0].body.state_dict()
    assert frozen and all(torch.equal(v, learnt[f'body.{k}']) and torch.equal(v, tuned[f'backbone.0.body.{k}']) for k, v in frozen.items())


def test_a_result_of_other_data_is_not_used(tmp_path, capsys):
    """Annotations are corrected under the same path: the finished result is refused, the change named; moved away, it is trained anew.

    What cannot be compared is printed: a line of the display would be written over by the next one."""
    data = coco(tmp_path / 'data')
    sizes = dict(hidden_dim=16, nheads=2, dim_feedforward=16, enc_layers=1, dec_layers=1, num_queries=4)
    tiny = job('finetune', 'demo', data=str(data), scenes=0, scenes_val=0, backbone='test_resnet', weights='none', features='layer1',
               standardize=False, val_size=64, square=64, cached_views=1, batch_size=2, epochs=1, eval_every=1, **sizes)
    folder = job_folder(tmp_path / 'runs', tiny, 1)

    def run(): return run_jobs([(tiny, 1)], tmp_path / 'runs', workers=1, show=lambda line: None)

    def printed(words): return [line for line in capsys.readouterr().out.splitlines() if words in line]

    assert run() == run() and not printed('fingerprint')
    seen_before = data_summary(configure(tiny, 1))
    annotations(data, corrected, 'val')
    with pytest.raises(ValueError, match=r'to evaluate on: 1 photo with other boxes or flags \(1.png\)') as e: run()
    assert folder.name in str(e.value) and 'move these folders away' in str(e.value)

    # a result from before fingerprints were kept, and one whose data is elsewhere
    kept = (folder / 'data.json').rename(tmp_path / 'kept.json')
    run()
    assert len(printed('1 finished runs kept no fingerprint')) == 1
    kept.rename(folder / 'data.json')
    data.rename(tmp_path / 'away')
    run()
    assert len(printed('is not here')) == 1
    (tmp_path / 'away').rename(data)

    # the plan counts what is there, however often it is made
    annotations(data, fewer)
    assert (seen_before.n_train, data_summary(configure(tiny, 1)).n_train) == (4, 3)
    with pytest.raises(ValueError, match='1 photo fewer'): run()
    folder.rename(tmp_path / 'old')
    run()
    assert json.loads((folder / 'data.json').read_text())['train']['photos'] == 3


def test_what_started_from_a_run_goes_with_it(tmp_path):
    """Photos change: the pre-training and what started from it are refused together, also after one of them was moved away.

    Of one that was killed after a save nothing is refused: it goes on to the same weights."""
    photos, runs, lines = tmp_path / 'photos', tmp_path / 'runs', []
    photos.mkdir()

    def photo(k): Image.fromarray(np.random.default_rng(k).integers(0, 255, (64, 64, 3), np.uint8)).save(photos / f'{k % 10}.png')

    for k in range(8): photo(k)
    cnn = dict(backbone='test_resnet', weights='none', features='layer1', standardize=False)
    start = job('pretrain', 'demo', data=str(photos), **TINY | cnn | dict(views=8, epochs=1))
    scenes = dict(scenes=8, scenes_val=4, scene_size=64, val_size=64, square=64, cached_views=1, epochs=1, eval_every=1)
    after = job('finetune', 'demo', start, **scenes)
    last = job('finetune', 'demo', after, **scenes)
    folders = [job_folder(runs, one, 1) for one in (start, after, last)]

    def run(): return run_jobs([(last, 1)], runs, workers=1, show=lines.append)

    def refused():
        with pytest.raises(ValueError, match='move these folders away') as e: run()
        return [str(folder) in str(e.value) for folder in folders]

    found = run()
    for name in ('result.json', 'done.json'): (folders[0] / name).unlink()
    assert run() == found

    photo(10)
    assert refused() == [True, True, True]
    for k, folder in enumerate(folders):
        folder.rename(tmp_path / f'old {k}')
        if k < 2: assert refused() == [False, k < 1, True]
    run()
    assert all((folder / 'result.json').exists() for folder in folders)


@pytest.mark.parametrize('photos, reads', [(0, 1), (2, 2)], ids=['all photos', 'some, drawn by the seed'])
def test_photos_that_finished_runs_share_are_read_once(photos, reads, tmp_path, monkeypatch):
    "Reading takes minutes at the paper's scale; the file that a run starts from is looked at for each"
    data, wanted, opened = coco(tmp_path / 'data'), [], []
    for name in ('a', 'b'):
        weights = tmp_path / f'{name}.pth'
        weights.write_text(name)
        arm = job('finetune', 'demo', data=str(data), scenes=0, scenes_val=0, photos=photos, weights=str(weights))
        wanted += [(arm, seed) for seed in (1, 2)]
    folders = in_order(wanted, tmp_path / 'runs')
    for folder, each in folders.items():
        folder.mkdir(parents=True)
        (folder / 'result.json').write_text('{}')
        (folder / 'data.json').write_text(json.dumps(data_now(configure(*each))))
    open_sets = runner.open_sets
    monkeypatch.setattr(runner, 'open_sets', lambda cfg: opened.append(cfg) or open_sets(cfg))
    check_finished(folders)
    assert len(opened) == reads
    weights.write_text('c')
    with pytest.raises(ValueError, match='the file of CNN weights') as e: check_finished(folders)
    assert [str(folder) in str(e.value) for folder in folders] == [False, False, True, True]
