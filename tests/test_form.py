"The form of the project: notebooks, package and README are in step, and the notebooks keep to their limits."
import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import nbformat
import pytest
import torch
from packaging.requirements import Requirement

from conftest import NOTEBOOKS, ROOT, copy_project, files
from tools.readme import readme

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

FUNCTION_LINES = CELL_LINES = 40  # what a screen shows at once
CLASS_LINES = 120  # a class may be read as a whole
CODE_LINES, OUTPUT_BYTES = 900, 200_000
LINE = 100  # characters of a line in the notebooks that are the library
NUMBERED = [p for p in NOTEBOOKS if re.match(r'\d', p.name)]
GUIDES = [p for p in NOTEBOOKS if p.parent.name in ('guides', 'tutorials')]
RUNNABLE = [p for p in NOTEBOOKS if p not in NUMBERED + GUIDES and p.stem != 'index']
BY_HAND = {'__init__', '__main__', '_modidx'}  # the modules that no notebook exports
TOOLS = {'nbdev', 'fastcore', 'execnb', 'IPython', 'ipykernel', 'ipywidgets', 'anywidget', 'jupyter', 'jupyter_client', 'jupyter_core',
         'nbformat', 'nbclient', 'nbconvert', 'papermill', 'pytest'}

each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
each_numbered = pytest.mark.parametrize('path', NUMBERED, ids=lambda p: p.stem)


@cache
def code_cells(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
def exported(cell): return re.search(r'^#\|\s*exports?i?\b', cell.source, re.M)
def no_directives(source): return re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
def tags(cell): return cell.metadata.get('tags', [])


def statements(source):
    "The top-level statements of a cell, without IPython's magics and shell lines."
    return ast.parse(re.sub(r'^(\s*)[%!?].*$', r'\1pass', source, flags=re.M)).body if not source.startswith('%%') else []


@cache
def module_of(path):
    "The module that the notebook at `path` exports, or None."
    m = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(c.source for c in code_cells(path)), re.M)
    return m and m[1]


def source_of(module):
    "The code of updetr's `module`."
    return ROOT.joinpath('updetr', *module.split('.')).with_suffix('.py').read_text(encoding='utf-8')


def order(path):
    "The number of a numbered notebook: 26 for 26_losses.ipynb."
    return int(re.match(r'(\d\d)_', path.name)[1])


def dotted(path):
    "The module's name within the package: model.losses."
    return path.relative_to(ROOT/'updetr').with_suffix('').as_posix().replace('/', '.')


def names_imported(tree, module=''):
    "(line, name) for each import in `tree`, the code of updetr's `module`; relative imports are written out."
    folders = ['updetr', *module.split('.')[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folders[:len(folders) - node.level + 1] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            is_package = base == 'updetr' or (ROOT.joinpath(*base.split('.'))/'__init__.py').exists()
            if is_package: yield from ((node.lineno, f'{base}.{a.name}') for a in node.names)
            else: yield node.lineno, base


# ---- in step --------------------------------------------------------------------------------------------------------

def test_clean_and_export_change_nothing(tmp_path):
    "`nbdev_clean` and `nbdev_export`, run in a copy, leave every file as it was."
    mine = copy_project(tmp_path)
    code = 'from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; nbdev_clean(); nbdev_export()'
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
    before = {f.relative_to(ROOT): f.read_bytes() for f in mine}
    after = {f.relative_to(tmp_path): f.read_bytes() for f in tmp_path.rglob('*') if f.is_file() and '__pycache__' not in f.parts}
    changed = sorted(str(f) for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    assert not changed, f'nbdev_clean and nbdev_export would change {changed}: run both and keep what they write'


def test_every_module_has_its_notebook():
    modules = [module_of(p) for p in NUMBERED]
    assert None not in modules, f'no default_exp: {[p.name for p, m in zip(NUMBERED, modules) if m is None]}'
    assert len(set(modules)) == len(modules), 'two notebooks export the same module'
    written = {dotted(p) for p in (ROOT/'updetr').rglob('*.py') if p.stem not in BY_HAND}
    assert written == set(modules)


def test_numbers_are_unique():
    places = [order(p) for p in NUMBERED]
    assert len(set(places)) == len(places), f'two notebooks with one number: {[p.name for p in NUMBERED]}'


def test_a_chapter_is_a_folder():
    "Ten numbers belong to one folder of the package, and a notebook has its module's name: nbs/26_losses.ipynb is model/losses.py."
    folders = {}
    for p in NUMBERED:
        folder, name = module_of(p).split('.')
        folders.setdefault(p.name[0], set()).add(folder)
        assert p.stem[3:] == name, f'{p.name} exports {name}'
    assert all(len(names) == 1 for names in folders.values()), folders
    assert len({*map(tuple, folders.values())}) == len(folders), folders


def test_readme_is_in_step():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme(ROOT), 'README.md is not what nbs/index.ipynb gives: make readme'


def test_every_notebook_is_listed():
    "In the list that README leads to; README itself has the reading path, and is read in three minutes."
    path = ROOT/'nbs/guides/notebooks.ipynb'
    text = ''.join(o.data['text/markdown'] for c in code_cells(path) for o in c.outputs if 'text/markdown' in o.get('data', {}))
    missing = [p.name for p in NUMBERED + RUNNABLE + GUIDES if f'(../{p.relative_to(ROOT/"nbs").as_posix()})' not in text]
    assert not missing, f'{path.name} does not list {missing}: execute it again'
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert '(nbs/guides/notebooks.ipynb)' in text and len(text.split()) < 700


def test_readme_links_are_there():
    text = re.sub(r'^```.*?^```', '', (ROOT/'README.md').read_text(encoding='utf-8'), flags=re.M | re.S)
    links = re.findall(r'\]\(([^)\s#]+)|(?:src|href)="([^"#]+)"', text)
    local = [a or b for a, b in links if not re.match(r'[a-z][a-z+.-]*:', a or b)]
    assert local, 'README.md links to nothing'
    assert not [t for t in local if t.startswith(('/', '..')) or not (ROOT/t).exists()]


# ---- imports --------------------------------------------------------------------------------------------------------

@each_numbered
def test_imports_come_from_lower_numbers(path):
    "The module and the notebook's own cells use only modules of lower-numbered notebooks (the cells also their own)."
    place = {module_of(p): order(p) for p in NUMBERED}
    mine = module_of(path)
    module = ast.parse(source_of(mine))
    cells = [ast.Module(statements(c.source), []) for c in code_cells(path) if not exported(c)]
    uses = [('module', n) for _, n in names_imported(module, mine)] + [('cell', n) for tree in cells for _, n in names_imported(tree)]
    bad = []
    for where, name in uses:
        if name.split('.')[0] != 'updetr': continue
        other = next((m for m in place if f'{name}.'.startswith(f'updetr.{m}.')), None)
        if other is None or place[other] > order(path) or (where == 'module' and other == mine): bad.append(f'{where}: {name}')
    assert not bad, f'{path.name} imports upwards or around: {bad}'


@each_notebook
def test_imports_are_alone_in_their_cells(path):
    "nbdev runs every cell that imports when it builds pages: whatever stands beside an import would run too."
    mixed = []
    for i, cell in enumerate(code_cells(path)):
        if 'nbdev_export(' in cell.source: continue
        imports = [isinstance(s, (ast.Import, ast.ImportFrom)) for s in statements(cell.source) if not isinstance(s, ast.Pass)]
        if any(imports) and not all(imports): mixed.append((i, cell.source[:80]))
    assert not mixed, f'{path.name}: cells that import and do something else: {mixed}'


@pytest.mark.parametrize('path', sorted((ROOT/'updetr').rglob('*.py')), ids=lambda p: p.stem)
def test_modules_share_public_names_only(path):
    "A thing that another module needs has a name and a docstring for its reader; `_name` is a module's own."
    imports = [s for s in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(s, ast.ImportFrom) and s.level]
    private = [f'{s.module}.{a.name}' for s in imports for a in s.names if a.name.startswith('_')]
    assert not private, f'{path.name} imports private names: {private}'


@pytest.mark.parametrize('path', sorted((ROOT/'updetr').rglob('*.py')), ids=lambda p: p.stem)
def test_package_does_not_import_tools(path):
    "Exported code needs no notebook tools; a module that shows widgets or notebooks may have them inside the functions that do."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    at_import = ast.Module([s for s in tree.body if not isinstance(s, (ast.FunctionDef, ast.ClassDef))], [])
    assert not [n for _, n in names_imported(at_import) if n.split('.')[0] in TOOLS]
    assert not [n for _, n in names_imported(tree) if n.split('.')[0] in {'nbdev', 'fastcore', 'execnb', 'pytest'}]


def test_training_imports_no_tools():
    "Importing what training processes need brings in neither notebook tools nor matplotlib, by any way; a detector, no notebook tools."
    main = ast.parse((ROOT/'updetr'/'__main__.py').read_text(encoding='utf-8'))
    modules = {p.stem: f'updetr.{dotted(p)}' for p in sorted((ROOT/'updetr').rglob('*.py'))}
    tasks = [name for stem, name in modules.items() if stem.endswith('_task')]
    assert len(tasks) == 5, tasks
    names = [modules['loader'], *tasks, *(n for _, n in names_imported(main))]  # importing __main__ itself would start a run
    code = f'import sys, {", ".join(names)}; print(*sys.modules); import {modules["detector"]}; print(*sys.modules)'
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    training, detector = ({m.split('.')[0] for m in line.split()} for line in out.splitlines()[-2:])
    found = (training & (TOOLS | {'matplotlib'})) | (detector & TOOLS)
    assert not found, f'{names} also import {sorted(found)}: look with python -X importtime -c "{code}"'


# ---- limits ---------------------------------------------------------------------------------------------------------

def too_long(source):
    "(lines, name) of the cell and of its functions that are longer than they may be."
    tree = ast.parse(source)
    has_class = any(isinstance(node, ast.ClassDef) for node in tree.body)
    lines = source.splitlines()
    if len(lines) > (CLASS_LINES if has_class else CELL_LINES): yield len(lines), f'cell {lines[0]!r}'
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef): continue
        length = node.end_lineno - node.lineno + 1
        if length > FUNCTION_LINES: yield length, node.name


@each_notebook
def test_cells_have_ids_of_their_own(path):
    "nbformat gives the second of two cells another one, another each time: whoever names a cell by its id would be wrong."
    ids = [cell['id'] for cell in json.loads(path.read_text(encoding='utf-8'))['cells']]
    assert len(set(ids)) == len(ids), f'{path.name}: cells of one id: {[i for i in ids if ids.count(i) > 1]}'


@each_notebook
def test_sizes(path):
    cells = code_cells(path)
    long = [found for cell in cells if exported(cell) for found in too_long(no_directives(cell.source))]
    assert not long, f'{path.name}: cells or functions of more than {CELL_LINES} lines, or {CLASS_LINES} with a class: {long}'
    lines = sum(len(c.source.splitlines()) for c in cells)
    assert lines <= CODE_LINES, f'{path.name}: {lines} lines of code, more than {CODE_LINES}'
    size = len(json.dumps([c.outputs for c in cells]))
    assert size < OUTPUT_BYTES, f'{path.name}: {size/1000:.0f} KB of outputs, limit {OUTPUT_BYTES/1000:.0f}: smaller figures, fewer lines'
    assert 'widgets' not in nbformat.read(path, 4).metadata, f'{path.name} keeps its widgets with their photos: delete metadata.widgets'


@each_notebook
def test_parameters_cell(path):
    "papermill puts its parameters after the one cell so tagged; it takes the first of several and says nothing."
    n = sum('parameters' in tags(c) for c in code_cells(path))
    assert n == (path in RUNNABLE), f'{path.name} has {n} cells tagged "parameters"'


@each_notebook
def test_outputs_show_no_error(path):
    "The outputs that are kept are those of a run that went through, in order, from a fresh start."
    bad = [o.get('ename') for c in code_cells(path) for o in c.outputs if o.output_type == 'error' and 'raises-exception' not in tags(c)]
    assert not bad, f'{path.name} keeps the output of a failed cell: {bad}'


# ---- docstrings -----------------------------------------------------------------------------------------------------

def undocumented(source):
    """Names in a module's source that lack a docstring, and parameters that lack their docment.

    Parameters of public functions and constructors count, and fields of data classes. A docment stands on the parameter's own line
    or alone on the line before it; on a shared line it belongs to the last name there (or to the annotated result), as nbdev shows it.
    """
    tree = ast.parse(source)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    comments = {t.start[0] for t in tokens} | {t.start[0] + 1 for t in tokens if t.line.lstrip().startswith('#')}
    assigned = {getattr(s.targets[0], 'id', ''): s.value for s in tree.body if isinstance(s, ast.Assign)}
    public = ast.literal_eval(assigned['__all__'])

    def bare(names):  # [(name, line)] without a comment that is theirs
        last = {line: name for name, line in names}
        return [name for name, line in names if name != 'return' and (line not in comments or last[line] != name)]

    def params(f):
        args = [a for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs if a.arg not in ('self', 'cls')]
        return bare([(a.arg, a.lineno) for a in args] + ([('return', f.returns.lineno)] if f.returns else []))

    for node in tree.body:
        name = getattr(node, 'name', None)
        if name not in public: continue
        if not ast.get_docstring(node): yield f'{name}: docstring'
        if isinstance(node, ast.FunctionDef): yield from (f'{name}({p})' for p in params(node))
        if not isinstance(node, ast.ClassDef): continue
        if any('dataclass' in ast.unparse(d) for d in node.decorator_list):
            yield from (f'{name}.{f}' for f in bare([(s.target.id, s.lineno) for s in node.body if isinstance(s, ast.AnnAssign)]))
        for m in node.body:
            if not isinstance(m, ast.FunctionDef): continue
            if m.name == '__init__': yield from (f'{name}({p})' for p in params(m))
            elif m.name[0] != '_' and not hasattr(torch.nn.Module, m.name) and not ast.get_docstring(m): yield f'{name}.{m.name}: docstring'


@each_numbered
def test_public_names_are_documented(path):
    missing = list(undocumented(source_of(module_of(path))))
    assert not missing, f'{path.name}: no docstring or docment for {missing}'


# ---- how it reads ---------------------------------------------------------------------------------------------------

@each_numbered
def test_no_line_is_long(path):
    long = [line[:60] for cell in code_cells(path) for line in cell.source.splitlines() if len(line) > LINE]
    assert not long, f'{path.name}: lines of more than {LINE} characters: {long}'


def tics(source):
    "(line, what) of habits that make code hard to read at speaking pace."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (ast.get_docstring(node) or '').startswith(('What ', 'How ', 'Which ', 'Whether ')):
            yield node.lineno, f'the docstring of {node.name} does not say what is returned or done'
        if not isinstance(node, ast.Assign): continue
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.GeneratorExp): yield node.lineno, 'an unpacked generator'
        if isinstance(node.value, ast.Dict) and sum(isinstance(v, ast.Lambda) for v in node.value.values) > 1:
            yield node.lineno, 'a dictionary of lambdas'


@each_numbered
def test_code_reads_at_speaking_pace(path):
    found = list(tics(source_of(module_of(path))))
    assert not found, f'{path.name}: {found}'


def test_tics_are_seen():
    code = 'def f():\n    "How it is done."\na, b = (f(x) for x in y)\nd = {1: lambda: 0, 2: lambda: 1}\n'
    assert {line for line, _ in tics(code)} == {1, 3, 4}


# ---- the rest -------------------------------------------------------------------------------------------------------

def test_ruff():
    command = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise', '.']
    r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not r.returncode, r.stdout + r.stderr


MACHINE = re.compile(r'''(?<![\w~./$}-]) (?: /(?:home|Users)/[\w.-]+/ | /(?:root|tmp|work|private|var/folders)/[\w.-]
                                            | [A-Za-z]:\\\\?Users\\ )''', re.X)


def machine_paths(text): return [m.group() for m in MACHINE.finditer(text)]


def test_no_paths_of_one_machine():
    "No file names a folder that only its author's machine has."
    found = {}
    for f in files():
        try: text = f.read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        if f != Path(__file__) and (hits := machine_paths(text)): found[str(f.relative_to(ROOT))] = sorted(set(hits))
    assert not found, f'paths of one machine: {found}'


def test_pins_fit_the_package():
    "Every dependency in pyproject.toml is pinned in requirements.txt, for each Python, at a version that fits."
    pins = [Requirement(s) for s in re.findall(r'^[\w-].*', (ROOT/'requirements.txt').read_text(), re.M)]
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    for python in ('3.10', '3.11', '3.12', '3.13', '3.14'):
        here = {p.name: p for p in pins if not p.marker or p.marker.evaluate({'python_version': python})}
        assert all(re.fullmatch(r'==[\w.]+', str(p.specifier)) for p in here.values()), 'a requirement that is no exact version'
        extras = [d for name in ('dev', 'docs') for d in project['optional-dependencies'][name]]
        for need in map(Requirement, project['dependencies'] + extras):
            assert need.name in here, f'{need.name} is not in requirements.txt for Python {python}'
            assert need.specifier.contains(str(here[need.name].specifier)[2:]), f'{here[need.name]} does not fit {need}'


def test_one_version():
    settings = re.search(r'^version\s*=\s*(\S+)', (ROOT/'settings.ini').read_text(), re.M)[1]
    assert f'__version__ = "{settings}"' in (ROOT/'updetr'/'__init__.py').read_text()
