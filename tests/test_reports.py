"The executed reports that are kept are those of today's notebooks: every cell is there, as it stands now, or `SINCE` says why not."
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

# Notebook -> {id of a cell that has changed since its copies were executed: what it does otherwise now, and why no number of
# the kept reports changes by it}. Where a number would change, the report is made anew.
SINCE = {
    'finetune.ipynb': {
        'c001': 'It imports other names; nothing else.',
        'c006': (
            "Every run's configuration is made before the first training, and DETR has the sizes of the file of "
            'pretrain where UP-DETR is trained beside it. The kept reports have no such pair: UP-DETR alone, or the '
            "demo's own pre-training, whose sizes are the preset's."),
        'c011': 'The name of a run has - for the : of module:function; the kept reports have no such method.',
        'c020': 'Each detector is opened once, where it was opened for each picture.',
        'c024': (
            "Every folder and file of somebody's machine in the configuration is FOLDER, weights and instances, too: "
            'a text, no number.'),
    },
    'oneshot.ipynb': {
        'c001': 'It imports more; nothing else.',
        'c006': (
            "Every run's configuration is made before the first training, and DETR has the sizes of the file of "
            "pretrain where UP-DETR is trained beside it; metrics.json tells UP-DETR's configuration only where "
            "UP-DETR was chosen. The kept report was given no file: the demo's own pre-training has the preset's "
            'sizes.'),
        'c010': (
            'The pre-trained model is read from the file that the run has started from, also where its path was given '
            "with {seed} or ~. The kept report's paths had neither."),
        'c021': (
            "Every folder and file of somebody's machine in the configuration is FOLDER, weights and instances, too: "
            'a text, no number.'),
    },
    'oneshot_neighbours.ipynb': {
        'c001': 'It imports other names; nothing else.',
        'c005': (
            "Every run's configuration is made before the first training, and DETR has the sizes of the file of "
            'pretrain. The kept report named these sizes itself (tests/test_front_ends.py compares its '
            'configuration).'),
        'c016': (
            "Every folder and file of somebody's machine in the configuration is FOLDER, weights and instances, too: "
            'a text, no number.'),
    },
    'panoptic.ipynb': {
        'c001': 'It imports more; nothing else.',
        'c006': (
            "Every run's configuration is made, and the file of instances read, before the first training, and DETR "
            'has the sizes of the file of pretrain where UP-DETR is trained beside it. The kept report was given '
            "neither file: the demo's own pre-training has the preset's sizes."),
        'c010': 'boxes_config is told the method, for the sizes of the cell above.',
        'c014': (
            'Answers are written and judged one by one, where all were kept; the same ones, in the same order. A plan '
            'computes no truth of masks, and instances are read by the cell of the plan.'),
        'c024': (
            'Where the photo has more segments than there are queries, the queries are counted; in the kept report it '
            'has 7, and there are 20.'),
        'c026': (
            "Every folder and file of somebody's machine in the configuration is FOLDER, weights and instances, too: "
            'a text, no number.'),
    },
    'panoptic_neighbours.ipynb': {
        'c001': 'It imports other names; nothing else.',
        'c013': (
            "Every folder and file of somebody's machine in the configuration is FOLDER, weights and instances, too: "
            'a text, no number.'),
    },
    'pretrain.ipynb': {
        'c001': 'It imports other names; nothing else.',
        'c014': (
            'Without held-out photos there is no column of that name; the kept report has held-out photos, which are '
            'measured in the same order.'),
        'c020': 'The held-out photos have another name in it; they are the same ones.',
        'c022': (
            'A photo that cannot be read is left out, and the next one drawn; those of the kept report can all be '
            'read.'),
        'c024': 'Without held-out photos there is no column of that name; the kept table has one.',
        'c025': 'A table without held-out photos is shown without that column; the kept table has it.',
        'c027': (
            "Every folder and file of somebody's machine in the configuration is FOLDER, weights and instances, too: "
            'a text, no number.'),
    },
}


def code(path):
    "Return what each code cell does, by its id; comments do nothing. Left out: the parameters, of the notebook and of papermill."
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code' and not tags(c)]
    return {c.id: ast.unparse(ast.parse(c.source)) for c in cells}


def differing(mine, theirs):
    "Return the ids of the cells that an executed copy and its notebook have not in common, or in another order."
    common = [[k for k in some if k in other] for some, other in ((mine, theirs), (theirs, mine))]
    moved = {k for pair in zip(*common) if pair[0] != pair[1] for k in pair}
    return moved | {k for k in mine | theirs if mine.get(k) != theirs.get(k)}


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
    odd = sorted(differing(mine, theirs) - set(SINCE.get(path.name, {})))
    other = sorted(parameters(path) - parameters(NOTEBOOKS[path.name]))  # one that came since, at its default, changes nothing
    command, seconds = remake(path)
    begin = {k: theirs.get(k, 'gone').splitlines()[0][:60] for k in odd[:3]}
    said = f'{len(odd)} of {len(theirs)} code cells are others ({begin}), parameters that are none any more: {other}'
    assert not odd and not other, f'{path.relative_to(ROOT)}: {said}. Make it anew (it took {seconds:.0f} s): {command}'


def test_what_has_changed_since_has_changed_in_a_kept_report():
    "An entry that no copy needs any more goes."
    needed = {(path.name, k) for path in EXECUTED for k in differing(code(path), code(NOTEBOOKS[path.name]))}
    assert {(name, k) for name, cells in SINCE.items() for k in cells} <= needed


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
    notebook, now = nbformat.read(NOTEBOOKS['pretrain.ipynb'], 4), code(NOTEBOOKS['pretrain.ipynb'])
    def written():
        nbformat.write(notebook, tmp_path / 'pretrain.ipynb')
        return code(tmp_path / 'pretrain.ipynb')
    notebook.cells.insert(4, nbformat.v4.new_code_cell('seeds = 3', metadata={'tags': ['injected-parameters']}))
    assert differing(written(), now) == set()
    notebook.cells[-2].source += ' '
    launching = next(c for c in notebook.cells if 'launch' in c.source and c.cell_type == 'code')
    launching.source += '\npass'
    assert differing(written(), now) == {launching.id}
    assert parameters(tmp_path / 'pretrain.ipynb') == parameters(NOTEBOOKS['pretrain.ipynb'])
    # another order is another run, and so is a cell more or less
    first, second, *_ = now
    assert differing({second: now[second], **now}, now) >= {first, second}
    assert differing({k: v for k, v in now.items() if k != second}, now) == {second}
    assert differing({**now, 'new': 'pass'}, now) == {'new'}
