"""`nbs/pretrain.ipynb` through papermill and a real kernel: a small run with its report, and what stops it at once."""
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import pytest
from click.testing import CliRunner
from nbdev.test import test_nb as run_notebook  # under its own name pytest would take it for a test
from papermill import cli

from conftest import ROOT, copy_project
from test_notebooks import untouched
from tools.cells import run_cells
from tools.readme import readme
from updetr.core.config import PretrainConfig
from updetr.experiments.experiment_report import open_study, study_command
from updetr.predict.runs import command_line, given_parameters
from updetr.tasks.finetune import FinetuneConfig
from updetr.tasks.oneshot import OneShotConfig

NOTEBOOK, FINETUNE, ONESHOT = (ROOT / 'nbs' / f'{name}.ipynb' for name in ('pretrain', 'finetune', 'oneshot'))
TINY = dict(views=24, view_size=64, patch_size=32, hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2, num_queries=10, num_patches=5,
            batch_size=4, epochs=1, gpus=0)


READERS = ['guides/own_photos', 'guides/what_it_bought', 'localize']  # notebooks that read reports, or look for finished runs


def words(parameters): return [w for k, v in parameters.items() for w in ('-p', k, str(v))]


def read_back(command):
    "The parameters of a recorded command, as papermill's own command line reads them."
    return dict(cli.papermill.make_context('papermill', shlex.split(command)[1:]).params['parameters'])


def quiet(**more):
    "The environment without GPUs, photos and settings of the machine's own."
    env = os.environ | {'CUDA_VISIBLE_DEVICES': '', 'JUPYTER_PREFER_ENV_PATH': '1', 'OMP_NUM_THREADS': '1', 'UPDETR_DATA': '', **more}
    # under pytest a kernel does without what it does for users: ipykernel asks for PYTEST_CURRENT_TEST
    foreign = ('MPLBACKEND', 'MAKEFLAGS', 'MAKELEVEL', 'MFLAGS', 'ARGS', 'REPORT', 'PYTEST_CURRENT_TEST')
    return {k: v for k, v in env.items() if k not in foreign}


def papermill(out, cwd=ROOT, notebook=NOTEBOOK, **parameters):
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', '-k', 'python3', str(notebook), str(out), *words(parameters)]
    return subprocess.run(command, cwd=cwd, env=quiet(), capture_output=True, text=True, timeout=400)


def git(folder, *command): return subprocess.run(['git', *command], cwd=folder, capture_output=True, text=True, check=True).stdout


def parameter_lines(notebook=NOTEBOOK):
    cell, = [c for c in nbformat.read(notebook, 4).cells if 'parameters' in c.metadata.get('tags', [])]
    return dict(re.match(r'(\w+): (.*)', line).groups() for line in cell.source.splitlines() if re.match(r'\w+: ', line))


@pytest.mark.parametrize('notebook, kind', [(NOTEBOOK, PretrainConfig), (FINETUNE, FinetuneConfig), (ONESHOT, OneShotConfig)],
                         ids=['pretrain', 'finetune', 'oneshot'])
def test_every_hyper_parameter_can_be_given(notebook, kind):
    lines = parameter_lines(notebook)
    for f in dataclasses.fields(kind):
        if f.name in {'task', 'data', 'seed', 'detector', 'system', 'pretrain'}: continue
        assert re.match(rf"{f.type.__name__} = None  # .+ \((paper|default): ", lines[f.name]), f.name
        quoted = re.split(r' \((?:paper|default): ', lines[f.name])[-1][:-1]
        assert f.default == eval(quoted), f'{f.name}: the comment quotes another default'


def test_options_reach_the_run(monkeypatch):
    given = dict(flip=False, augment='turn', mosaic=.5, freeze='transformer.encoder', class_weights='balanced', focal=2)
    few = dict(methods='detr', scenes=4, scenes_val=2, scene_size=64, batch_size=2)
    cfg = run_cells(FINETUNE, monkeypatch, 'train_plan(cfg', **few, **given)['cfg']
    assert {k: getattr(cfg, k) for k in given} == given
    with pytest.raises(ValueError, match='did you mean rotate'): run_cells(FINETUNE, monkeypatch, 'train_plan(cfg', **few, augment='rotat')


@pytest.mark.parametrize('system', ['siamfc', 'json:dumps'])
def test_a_system_is_given_as_a_method(system):
    "oneshot.ipynb trained it under the name detr, oneshot_neighbours.ipynb dropped it without a word."
    with pytest.raises(ValueError, match=f"system '{system}'.* oneshot_neighbours.ipynb with -p methods {system}$"):
        given_parameters({'preset': 'demo', 'methods': 'detr', 'system': system}, OneShotConfig, 'preset methods')
    # the default is no wish
    assert given_parameters({'system': ''}, OneShotConfig, '') == ({'system': ''}, {'system': ''})


@pytest.mark.parametrize('notebook', [NOTEBOOK, FINETUNE, ONESHOT], ids=lambda p: p.stem)
def test_the_help_lists_every_parameter(notebook):
    out = CliRunner().invoke(cli.papermill, ['--help-notebook', str(notebook)]).output
    assert [n for n in parameter_lines(notebook) if not re.search(rf'^  {n}: ', out, re.M)] == []


def test_a_terminal_shows_where_a_run_is(tmp_path):
    "And the notebook keeps one output, the last"
    cells = ['from updetr.train.progress import Screen\nscreen = Screen()', "for step in range(3): screen(f'step {step} · 2 min left')"]
    spec = dict(name='python3', display_name='Python', language='python')
    new = nbformat.v4
    nb = new.new_notebook(cells=[new.new_code_cell(source) for source in cells], metadata=dict(kernelspec=spec))
    nbformat.write(nb, tmp_path / 'in.ipynb')
    done = papermill(tmp_path / 'out.ipynb', notebook=tmp_path / 'in.ipynb')
    assert done.returncode == 0 and done.stderr.count('min left') == 1 and '\nstep 0 · 2 min left\n' in done.stderr
    outputs = nbformat.read(tmp_path / 'out.ipynb', 4).cells[1].outputs
    assert [o.data['text/plain'] for o in outputs] == ['step 2 · 2 min left']


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """A fresh clone in which `make pretrain` was run, for a few steps. Its Python is the one of this process."""
    if not (shutil.which('make') and shutil.which('git')): pytest.skip('needs make and git')
    root = tmp_path_factory.mktemp('clone')
    copy_project(root)
    git(root, 'init', '-q')
    git(root, 'add', '-Af')
    git(root, '-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'all')
    (root / '.venv/bin').mkdir(parents=True)
    (root / '.venv/bin/python').write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (root / '.venv/bin/python').chmod(0o755)
    (root / '.venv/.installed').touch()
    command = ['make', 'pretrain', 'ARGS=' + ' '.join(words(TINY))]
    r = subprocess.run(command, cwd=root, env=quiet(), capture_output=True, text=True, timeout=400)
    assert r.returncode == 0, r.stderr[-3000:]
    return root


def test_the_tests_do_not_care_whether_something_was_run(report, monkeypatch):
    "After `make pretrain` git sees nothing, and what reads reports or looks for runs passes as it does in a fresh clone."
    assert git(report, 'status', '--porcelain') == ''
    assert (report / 'README.md').read_text(encoding='utf-8') == readme(report)
    monkeypatch.chdir(report)
    for key in ('UPDETR_DATA', 'CUDA_VISIBLE_DEVICES'): monkeypatch.setenv(key, '')
    for name in READERS:
        with untouched(): assert run_notebook(report / 'nbs' / f'{name}.ipynb', basepath=report)[0], name
    assert git(report, 'status', '--porcelain') == ''


def test_a_small_run_ends_in_a_report(report):
    metrics = json.loads((report / 'runs/reports/pretrain/metrics.json').read_text())
    assert set(metrics['pretext']) == {'heldout', 'trained', 'random', 'center', 'template'}
    assert all({'mean_iou', 'iou50', 'n'} <= set(m) for m in metrics['pretext'].values())
    assert metrics['pretext']['template']['mean_iou'] > .5 > metrics['pretext']['random']['mean_iou']
    assert {'command', 'commit', 'versions', 'hardware', 'seeds', 'scale', 'wall_s'} <= set(metrics['provenance'])
    assert "not the paper's setting" in metrics['provenance']['scale']
    given = {'report': 'runs/reports/pretrain', 'preset': 'demo', **TINY}
    assert read_back(metrics['provenance']['command']) == {k: str(v) for k, v in given.items()}
    assert {'curves.png', 'curves.svg', 'localization_0.png'} <= set(os.listdir(report / 'runs/reports/pretrain'))
    assert (report / 'runs/demo-42/updetr.safetensors').exists()


def test_the_executed_notebook_is_small_and_drawn(report):
    cells = nbformat.read(report / 'runs/reports/pretrain/pretrain.ipynb', 4).cells
    kinds = [k for c in cells for o in c.get('outputs', []) for k in o.get('data', {})]
    assert any(k.startswith('image/') for k in kinds) and (report / 'runs/reports/pretrain/pretrain.ipynb').stat().st_size < 1_000_000


def test_running_it_again_finds_it_finished(report, monkeypatch, capsys):
    "The second call has nothing to train; what comes after the training is the first call's test."
    monkeypatch.chdir(report)
    monkeypatch.delenv('UPDETR_DATA', raising=False)
    run_cells(NOTEBOOK, monkeypatch, '\nrun_all(runs)', **TINY)
    assert 'finished: runs/demo-42' in capsys.readouterr().out


@pytest.mark.parametrize('name, more', [
    ('pretrain', {'preset': 'demo', 'seeds': 2, 'views': 24, 'ablation': 3}), ('finetune', {'epochs': 1, 'methods': 'detr'}),
    ('oneshot', {'lr': 1e-5, 'methods': 'detr'}), ('panoptic', {'mask_epochs': 2, 'methods': 'detr'})])
def test_the_recorded_command_is_the_one_that_was_run(name, more, tmp_path, monkeypatch):
    "Read by papermill, it gives every parameter that was given; a folder of the machine is a word, and the defaults are not said."
    given = {'gpus': 0, 'processes': 2, 'name': "one's own", 'report': 'reports/my own', 'data': str(tmp_path), 'weights': '/w.pth', **more}
    space = run_cells(ROOT / 'nbs' / f'{name}.ipynb', monkeypatch, 'report = report or', **given)
    command = command_line(name, space['report'], space['given'])
    want = {k: str(v) for k, v in given.items()} | {'data': 'FOLDER', 'weights': 'FOLDER'}
    assert read_back(command) == want and shlex.split(command)[2] == f'reports/my own/{name}.ipynb'


def test_the_recorded_command_of_other_notebooks(tmp_path, monkeypatch):
    given = {'size': 'tiny', 'parts': 'step,cached', 'again': True, 'report': str(tmp_path)}
    space = run_cells(ROOT / 'nbs' / 'benchmark.ipynb', monkeypatch, 'check_parameters(', **given)
    command = command_line('benchmark', space['report'], space['given'])
    assert read_back(command) == {k: str(v) for k, v in given.items()} | {'report': 'FOLDER'}
    given = {'scale': 'mini', 'photos': str(tmp_path), 'labelled': '.', 'cnns': f'swav,{tmp_path}/w.pth', 'report': str(tmp_path),
             'gpus': 0, 'plan_only': True, 'unseen': 'dining table'}
    hidden = {'photos': 'FOLDER', 'labelled': 'FOLDER', 'report': 'FOLDER', 'cnns': 'swav,FOLDER'}
    command = study_command(open_study('ablations_cnn', dict(given)))
    assert read_back(command) == {k: str(v) for k, v in given.items()} | hidden and str(tmp_path) not in command


def test_the_impossible_stops_at_once(tmp_path):
    r = papermill(tmp_path / 'out.ipynb', tmp_path, gpu=8)
    assert r.returncode and 'did you mean gpus' in r.stderr and not (tmp_path / 'runs').exists()


def front_end(monkeypatch, **parameters):
    """Run the notebook's cells up to the plan, in this process."""
    return run_cells(NOTEBOOK, monkeypatch, 'make_plan(cfg', **parameters)


@pytest.mark.parametrize('parameters, message', [
    ({'gpus': 8}, '8 GPUs asked for, 0 found'), ({'lr_drops': 3}, 'did you mean lr_drop'),
    ({'preset': 'paper', 'data': 'nowhere'}, 'n01440764'), ({'gpus': 0, 'processes': 8}, 'batch_size 4 cannot .*start 4 '),
    ({'num_patches': 7}, 'multiple of num_patches')])
def test_the_impossible_is_refused_with_the_way_on(parameters, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    with pytest.raises((ValueError, FileNotFoundError), match=message): front_end(monkeypatch, **parameters)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not shutil.which('make'), reason='needs make')
@pytest.mark.parametrize('found', [0, 1, 8])
def test_make_pretrain_is_the_demo_with_and_without_gpus(found, monkeypatch, capsys):
    "On a GPU the notebook alone would take the paper's recipe, which has no photos by itself."
    monkeypatch.setattr('torch.cuda.device_count', lambda: found)
    said = subprocess.run(['make', '-n', 'pretrain'], cwd=ROOT, env=quiet(), capture_output=True, text=True, check=True).stdout
    given = dict(re.findall(r' -p (\w+) (\S+)', said))
    exec(re.search(r" -p gpus \$\(\S+ -c '(.+?)'\)", said)[1], {})
    given['gpus'] = int(capsys.readouterr().out)
    front_end(monkeypatch, **given)
    where = '1 GPUs' if found else '1 CPU process'
    assert f'preset demo on {where}; 12 photos to train on' in capsys.readouterr().out


def test_plan_only_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('UPDETR_DATA', raising=False)
    run_cells(NOTEBOOK, monkeypatch, 'run_all(runs)', plan_only=True, preset='paper', img_s=178)
    said = capsys.readouterr().out
    assert '19,164,167 trained' in said and '300,240' in said and not list(tmp_path.iterdir())


def documented_commands():
    for path in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        text = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
        for notebook, out, more in re.findall(r'papermill (nbs/\S+\.ipynb) (\S+\.ipynb)(.*)', text): yield path.stem, notebook, out, more


def test_documented_commands_find_their_notebook_parameters_and_output_folder():
    commands = list(documented_commands())
    assert len(commands) > 40
    for where, notebook, out, more in commands:
        assert (ROOT / notebook).is_file(), f'{where}: {notebook}'
        assert (ROOT / out).parent.is_dir(), f'{where}: papermill writes {out} only into a folder that is there'
        unknown = set(re.findall(r'-p (\w+) ', more)) - set(parameter_lines(ROOT / notebook))
        assert not unknown, f'{where}: {notebook} has no parameters {unknown}'
