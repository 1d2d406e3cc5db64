"The executed reports that are kept are those of today's notebooks: every cell is there, as it stands now."
import ast
import json
import re
import shlex

import nbformat
import pytest

from conftest import ROOT
from tools.experiments import texts

NOTEBOOKS = {p.name: p for folder in ('nbs', 'nbs/experiments') for p in sorted((ROOT / folder).glob('*.ipynb'))}
EXECUTED = [p for p in sorted((ROOT / 'reports').glob('*/*.ipynb')) if p.name in NOTEBOOKS]


def code(path):
    "Return what each code cell does; comments do nothing. Left out: the parameters, of the notebook and of papermill."
    return [ast.unparse(ast.parse(c.source)) for c in nbformat.read(path, 4).cells if c.cell_type == 'code' and not tags(c)]


def parameters(path):
    "The notebook's own parameters with their defaults."
    cell, = [c for c in nbformat.read(path, 4).cells if 'parameters' in tags(c)]
    return {ast.unparse(s) for s in ast.parse(cell.source).body}


def tags(cell): return {'parameters', 'injected-parameters'} & set(cell.metadata.get('tags', []))


def remake(path):
    "The command that makes the executed notebook at `path` anew, and what it took last time."
    report, notebook = path.parent.relative_to(ROOT).as_posix(), NOTEBOOKS[path.name].relative_to(ROOT).as_posix()
    about = json.loads((path.parent / 'metrics.json').read_text())['provenance']
    words = shlex.split(about['command'])
    given = [(words[i + 1], words[i + 2]) for i, w in enumerate(words) if w == '-p' and words[i + 1] != 'report']
    more = ''.join(f' -p {k} {shlex.quote(v)}' for k, v in given)
    if (kept := path.parent / 'ablation.json').exists():
        more += f" -p ablation {len(json.loads(kept.read_text())['provenance']['seeds'])}"
    return f'papermill {notebook} {report}/{path.name} -p report {report}{more}', about['wall_s']


def test_there_are_executed_reports(): assert len(EXECUTED) >= 19


@pytest.mark.parametrize('path', EXECUTED, ids=lambda p: p.parent.name)
def test_an_executed_report_has_the_cells_of_its_notebook(path):
    mine, theirs = code(path), code(NOTEBOOKS[path.name])
    changed = [t.splitlines()[0][:60] for t in theirs if t not in mine]
    gone = [m.splitlines()[0][:60] for m in mine if m not in theirs]
    other = sorted(parameters(path) - parameters(NOTEBOOKS[path.name]))  # one that came since, at its default, changes nothing
    command, seconds = remake(path)
    said = (f'{len(changed)} of {len(theirs)} code cells are not in it ({changed[:3]}), {len(gone)} of its own are gone, '
            f'parameters that are none any more: {other}')
    assert mine == theirs and not other, f'{path.relative_to(ROOT)}: {said}. Make it anew (it took {seconds:.0f} s): {command}'


def words(path):
    "What a notebook or a file of Markdown says, without its code."
    text = path.read_text(encoding='utf-8') if path.suffix == '.md' else '\n'.join(texts(path).values())
    return re.sub(r'`[^`]*`', '', text)


@pytest.mark.parametrize('folder', ['nbs', 'reports'])
def test_links_lead_somewhere(folder):
    "Also those of an executed copy, which lies in another folder than its notebook."
    pages = [p for kind in ('*.ipynb', '*.md') for p in (ROOT / folder).rglob(kind) if '.ipynb_checkpoints' not in p.parts]
    links = [(page, link) for page in pages for link in re.findall(r'\]\(([^)#\s]+)[^)]*\)', words(page))]
    inside = [(page, link) for page, link in links if not re.match(r'\w+:', link)]
    lost = [f'{page.relative_to(ROOT)}: {link}' for page, link in inside if not (page.parent / link).exists()]
    assert len(inside) > 100 and lost == []


def test_a_changed_cell_is_seen(tmp_path):
    notebook = nbformat.read(NOTEBOOKS['pretrain.ipynb'], 4)
    notebook.cells.insert(4, nbformat.v4.new_code_cell('seeds = 3', metadata={'tags': ['injected-parameters']}))
    nbformat.write(notebook, tmp_path / 'pretrain.ipynb')
    assert code(tmp_path / 'pretrain.ipynb') == code(NOTEBOOKS['pretrain.ipynb'])
    notebook.cells[-2].source += ' '
    next(c for c in notebook.cells if 'launch' in c.source and c.cell_type == 'code').source += '\npass'
    nbformat.write(notebook, tmp_path / 'pretrain.ipynb')
    assert code(tmp_path / 'pretrain.ipynb') != code(NOTEBOOKS['pretrain.ipynb'])
    assert parameters(tmp_path / 'pretrain.ipynb') == parameters(NOTEBOOKS['pretrain.ipynb'])
