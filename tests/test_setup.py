"`make` sets up once, again when the pins change, and never believes in half an installation. A script plays Python: nothing is installed."
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which('make'), reason='needs make')

PYTHON = f'''#!/bin/sh
# says what it was asked for; makes the virtual environment by copying itself into it; fails where a file says so
echo "$@" >> calls
case "$*" in
  *version_info*) test ! -e version || {shlex.quote(sys.executable)} -c "import sys; sys.version_info = ($(cat version)); $2" ;;
  *"import venv"*) test ! -e no-venv ;;
  -V) echo Python "$(cat version)" ;;
  "-m venv --clear .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"install -r requirements.txt"*) test ! -e no-registry ;;
esac
'''


@pytest.fixture
def project(tmp_path):
    "A folder with our Makefile, and a `make` that returns (exit status, what was printed, what Python was asked for)."
    for name in ('Makefile', 'requirements.txt', 'pyproject.toml'): shutil.copy(ROOT/name, tmp_path)
    (tmp_path/'python').write_text(PYTHON)
    (tmp_path/'python').chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS', 'PYTHON', 'ARGS')}

    def make(*args):
        calls = tmp_path/'calls'
        calls.unlink(missing_ok=True)
        r = subprocess.run(['make', f'PYTHON={tmp_path/"python"}', *args], cwd=tmp_path, env=env, capture_output=True, text=True)
        return r.returncode, r.stdout + r.stderr, calls.read_text() if calls.exists() else ''
    make.folder = tmp_path
    return make


def later(path):
    "Gives the file at `path` a time after all others."
    os.utime(path, (path.stat().st_mtime + 100,) * 2)


def test_set_up_once(project):
    rc, _, calls = project('setup')
    assert rc == 0 and 'venv --clear .venv' in calls and 'install -r requirements.txt' in calls and '-e .' in calls
    rc, _, calls = project('setup')
    assert rc == 0 and not calls


@pytest.mark.parametrize('name', ['requirements.txt', 'pyproject.toml'])
def test_set_up_again_when_pins_change(project, name):
    project('setup')
    later(project.folder/name)
    rc, _, calls = project('setup')
    assert rc == 0 and 'install -r requirements.txt' in calls and 'venv --clear' not in calls


@pytest.mark.parametrize('move', [shutil.copytree, os.rename])
def test_set_up_anew_in_another_place(project, move):
    "Scripts and the link to the package name the old folder; an environment of before the mark is left alone."
    project('setup')
    later(project.folder/'.venv/.installed')
    (there := project.folder/'a place').mkdir()
    for name in ('Makefile', 'requirements.txt', 'pyproject.toml'): shutil.copy2(project.folder/name, there)
    move(project.folder/'.venv', there/'.venv')
    for expected in (True, False):
        rc, _, calls = project('-C', str(there), 'setup')
        said = (there/'calls').read_text() if (there/'calls').exists() else ''
        assert rc == 0 and ('venv --clear .venv' in said and 'install -r' in said) == expected
        (there/'calls').unlink(missing_ok=True)
    (there/'.venv/.place').unlink()
    assert project('-C', str(there), 'setup')[0] == 0 and not (there/'calls').exists()


def test_interrupted_set_up_goes_on(project):
    (project.folder/'no-registry').touch()
    rc, _, calls = project('test')
    assert rc and 'install -r requirements.txt' in calls and 'pytest' not in calls
    (project.folder/'no-registry').unlink()
    rc, _, calls = project('test')
    assert rc == 0 and 'install -r requirements.txt' in calls and '-m pytest' in calls and 'venv --clear' not in calls


def test_failed_update_is_not_taken_for_done(project):
    project('setup')
    later(project.folder/'requirements.txt')
    (project.folder/'no-registry').touch()
    assert project('setup')[0]
    (project.folder/'no-registry').unlink()
    assert 'install -r requirements.txt' in project('setup')[2]


def test_arguments_reach_papermill(project):
    rc, _, calls = project('pretrain', 'ARGS=-p seed 1')
    assert rc == 0 and 'nbs/pretrain.ipynb runs/reports/pretrain/pretrain.ipynb -p report runs/reports/pretrain -p preset demo' in calls
    assert calls.endswith(' -p seed 1\n')  # the last word of a parameter counts
    rc, out, calls = project('pretrain', 'REPORT=reports/pretrain')  # on purpose only
    assert rc == 0 and 'nbs/pretrain.ipynb reports/pretrain/pretrain.ipynb -p report reports/pretrain' in calls
    assert 'numbers in reports/pretrain/' in out


@pytest.mark.parametrize('wish, gpus', [('preset=paper', False), ('ARGS=-p preset paper', False), ('ARGS=-p gpus 4', True)])
def test_the_demo_is_the_default_and_takes_one_gpu(project, wish, gpus):
    "The paper's recipe takes all GPUs; what ARGS says of them comes later, and counts."
    rc, _, calls = project('pretrain', wish)
    line = calls.splitlines()[-1]
    assert rc == 0 and ('torch.cuda.device_count()' in calls) == gpus
    assert line.endswith(wish.partition('=')[2] if 'ARGS' in wish else '-p preset paper')


def test_wrong_python_is_named(project):
    (project.folder/'no-venv').touch()
    rc, out, calls = project('test')
    assert rc and 'python3-venv' in out and str(project.folder/'python') in out and '-m venv' not in calls


@pytest.mark.parametrize('version, fits', [('3, 9, 18', False), ('3, 10, 0', True), ('3, 14, 9', True), ('3, 15, 0', False)])
def test_python_of_another_version_is_named(project, version, fits):
    "Too old for the package, or so new that numpy, scipy and torch have no wheels for it; also where .venv is of such a one."
    (project.folder/'version').write_text(version, encoding='utf-8')
    rc, out, calls = project('setup')
    assert fits == (not rc) == ('-m venv' in calls)
    if fits: return
    assert 'Python 3.10 to 3.14 is needed' in out and f'is Python {version}' in out and 'make PYTHON=python3.12' in out
    (project.folder/'version').unlink()
    project('setup')
    (project.folder/'version').write_text(version, encoding='utf-8')
    later(project.folder/'requirements.txt')
    rc, out, calls = project('setup')
    assert rc and 'is not of 3.10 to 3.14' in out and 'install' not in calls


def test_missing_python_is_named(project):
    rc, out, _ = project('test', 'PYTHON=no-such-python')
    assert rc and "there is no 'no-such-python'" in out
