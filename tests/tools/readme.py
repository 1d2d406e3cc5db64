"""README.md from nbs/index.ipynb, with nbdev's own processors and nbconvert (no quarto).

python tests/tools/readme.py          write README.md
python tests/tools/readme.py --check  fail where README.md is not in step
"""
import argparse
import os
import re
import sys
from pathlib import Path

import nbformat
from execnb.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parents[2]
SKIP = {'FrontmatterProc',  # would take the title out of the text
        'add_links',        # would link every `name` to a documentation site
        'insert_warning'}   # HEAD says it better
HEAD = '<!-- Written from nbs/index.ipynb by `make readme`: change that, not this. -->'


def processed(path):
    "The notebook at `path` as nbdev's documentation has it (hidden cells, magics, directives gone), no raw cells, silent inputs empty."
    procs = [p for p in FilterDefaults().procs() if p.__name__ not in SKIP]
    nb = nbformat.reads(nb2str(NBProcessor(path, procs=procs, process=True).nb), as_version=4)
    nb.cells = [c for c in nb.cells if c.cell_type != 'raw']
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        silent = re.search(r'^#\|\s*echo:\s*false', cell.source, re.M) or cell.source.strip().startswith('show_doc(')
        cell.source = '' if silent else re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    return nb


def relocated(text, folder, root):
    "`text` with the links and images that are relative to `folder` made relative to `root`; a dead one is an error."
    def fix(m):
        before, target, after = m.groups()
        if re.match(r'[a-zA-Z][\w+.-]*:|#|/', target): return m.group()
        path, hash_, anchor = target.partition('#')
        if not (folder/path).exists(): raise FileNotFoundError(f'{folder/"index.ipynb"}: {target} is not there (looked from {folder})')
        return before + Path(os.path.relpath(folder/path, root)).as_posix() + hash_ + anchor + after
    parts = re.split(r'(^```.*?^```|`[^`\n]+`)', text, flags=re.M | re.S)  # code stays as it is
    link = re.compile(r'(\]\(\s*|<(?:img|a)\b[^>]*?\b(?:src|href)=")([^\s")]+)([^)\n]*\)|")')
    return ''.join(p if i % 2 else link.sub(fix, p) for i, p in enumerate(parts))


def readme(root=ROOT):
    "The text of README.md that belongs to `root`/nbs/index.ipynb."
    path, cwd = Path(root)/'nbs'/'index.ipynb', os.getcwd()
    os.chdir(root)  # nbdev finds settings.ini from here
    try: nb = processed(path)
    finally: os.chdir(cwd)
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get('outputs'):
        raise ValueError(f'{path}: a cell shows a picture, which README.md cannot hold: save it and write ![what](../reports/...)')
    text = re.sub(r'^```\w*\n\s*```\n', '', text, flags=re.M)  # silent inputs
    text = re.sub(r'\n{3,}', '\n\n', f'{HEAD}\n\n{text.strip()}\n')
    return relocated(text, path.parent, Path(root))


def main():
    parser = argparse.ArgumentParser(description='README.md from nbs/index.ipynb')
    parser.add_argument('--check', action='store_true', help='write nothing; fail where README.md is not in step')
    args = parser.parse_args()
    text, path = readme(), ROOT/'README.md'
    if not args.check: path.write_text(text, encoding='utf-8')
    elif not path.exists() or path.read_text(encoding='utf-8') != text:
        sys.exit('README.md is not in step with nbs/index.ipynb: make readme')


if __name__ == '__main__': main()
