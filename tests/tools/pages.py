"What a notebook or an executed report shows on the site: its cells in another order, with links at names, and words for pictures."
import ast
import os
import re
from pathlib import Path

import nbformat
import torch

SHOWN = {'text/plain', 'text/markdown', 'image/png', 'image/jpeg'}  # kinds of output; none that a page would run
BEFORE_RUNS = {'Parameters', 'What will run', 'What will be run', 'The labels', 'The run', 'The runs'}  # sections without a result
SILENT = 'silent'  # tag of cells of which only the output is shown, and of what the site itself says


def headings(text): return re.findall(r'^#+\s+(.+)$', re.sub(r'```.*?```', '', text, flags=re.S), re.M)


def plain(text):
    "Markdown as words: no marks, addresses, code fences or tables."
    text = re.sub(r'```.*?```|^[|>#][^\n]*|^\s*[-*\d.]+\s', ' ', text, flags=re.M | re.S)
    return ' '.join(re.sub(r'!?\[([^]]*)\]\([^)]*\)', r'\1', re.sub(r'[*`$\\]', '', text)).split())


def harmless(output):
    "The output without what a page would run: names of classes, files and runs are others' words, and a report may be of any data."
    if 'data' not in output: return output
    output.data = {kind: content for kind, content in output.data.items() if kind in SHOWN}
    if 'text/markdown' in output.data:
        text = re.sub(r'<(?=[a-zA-Z/!?])', '&lt;', output.data['text/markdown'])
        output.data['text/markdown'] = re.sub(r'\](?=(\(|:)\s*(javascript|vbscript|data):)', '&#93;', text, flags=re.I)
    return output


def definitions(folder):
    """Name of each public function and class that notebooks of `folder` export -> notebook and id of its cell.

    Left out: names that two notebooks define, and those that are also a method, here or of each torch module: prose may mean that.
    """
    found, methods = {}, set(dir(torch.nn.Module))
    for path in sorted(folder.glob('*.ipynb')):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type != 'code' or not re.search(r'^#\|\s*export\b', cell.source, re.M): continue
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.ClassDef): methods |= {m.name for m in node.body if isinstance(m, ast.FunctionDef)}
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != '_':
                    found.setdefault(node.name, []).append((path, cell.id))
    return {name: places[0] for name, places in found.items() if len(places) == 1 and name not in methods}


def own_names(nb):
    "Names that the notebook gives to something without exporting it: there, they are not the package's."
    code = '\n'.join(c.source for c in nb.cells if c.cell_type == 'code' and not re.search(r'^#\|\s*export\b', c.source, re.M))
    left = re.findall(r'^\s*([\w, ]+?)\s*=[^=]', code, re.M) + re.findall(r'def \w+\(([\w, ]+)', code)  # variables, parameters
    return {*re.findall(r'^\s*(?:def|class) (\w+)', code, re.M), *re.findall(r'\w+', ' '.join(left))}


def linked(text, page, known):
    "`text` of the notebook `page`, with links at back-ticked names that are `known`; code, headings and links stay as they are."
    def link(m):
        code = m['code']
        name = re.fullmatch(r'(\w+)(\.\w+|\(.*\))*', code or '')
        if not name or name[1] not in known or (name[1].islower() and '.' in code.partition('(')[0]): return m[0]
        path, cell = known[name[1]]
        return f'[`{code}`]({Path(os.path.relpath(path, page.parent)).as_posix()}#cell-id={cell})'
    apart = r'```.*?```|^#[^\n]*|!?\[(?:[^][]|\[[^]]*\])*\]\([^)]*\)|<[a-zA-Z/][^>\n]*>'
    return re.sub(apart + r'|`(?P<code>[^`\n]+)`', link, text, flags=re.M | re.S)


def words_for_pictures(nb):
    "A text for each picture among the outputs, in order: the section, and what is said before it."
    section, said = '', ''
    for cell in nb.cells:
        if cell.cell_type == 'markdown':
            if SILENT in cell.metadata.get('tags', []): continue
            section = ([section] + headings(cell.source))[-1]
            said = ([said] + [w for w in map(plain, cell.source.split('\n\n')) if w])[-1]
            continue
        pictures = [o for o in cell.outputs if any(kind.startswith('image/') for kind in o.get('data', {}))]
        for i in range(len(pictures)):
            sentence = re.split(r'(?<=[.:?!]) ', said)[0].rstrip(':')
            count = f' ({i + 1} of {len(pictures)})' if len(pictures) > 1 else ''
            yield f'{plain(section)}: {sentence}'[:200] + count


def result_first(cells, notebook):
    "Cells of a report in the order of a reader: what came out, then how it was run; code stands in `notebook`, but for what was set."
    for cell in cells:
        if cell.cell_type == 'code' and 'injected-parameters' not in cell.metadata.get('tags', []): cell.metadata['tags'] = [SILENT]
    first, later, place = [], [], 'first'
    for cell in cells:
        head = re.match(r'##\s+(.+)', cell.source) if cell.cell_type == 'markdown' else None
        if head: place = 'later' if head[1].strip() in BEFORE_RUNS else 'first'
        (later if place == 'later' else first).append(cell)
    said = 'Executed notebook, its result first' + (f'; the code is that of [{notebook.stem}]({notebook.as_posix()}).' if notebook else '.')
    note = nbformat.v4.new_markdown_cell(f'*{said}*', metadata={'tags': [SILENT]})
    return [*first[:1], note, *first[1:], *later]


def shown(path, known=None, report_of=None):
    """The notebook at `path` as a reader wants it: no hidden cells, no directives, no silent inputs, outputs that do nothing.

    `known`: definitions to link to; `report_of`: for an executed report, the path to its notebook ('': there is none).
    """
    nb = nbformat.read(path, 4)
    known = {name: place for name, place in (known or {}).items() if name not in own_names(nb)}
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*(hide|default_exp)\b', c.source, re.M)]
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = linked(cell.source, path, known)
        if cell.cell_type != 'code': continue
        if re.search(r'^#\|\s*echo:\s*false', cell.source, re.M): cell.metadata['tags'] = [SILENT]
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
        cell.outputs = [harmless(o) for o in cell.outputs]
    if report_of is not None: nb.cells = result_first(nb.cells, report_of and Path(report_of))
    nb.cells = [c for c in nb.cells if c.cell_type != 'code' or c.outputs or SILENT not in c.metadata.get('tags', [])]
    return nb


def title(path):
    "The first heading of a notebook."
    return headings('\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown'))[0]
