"""UP-DETR in 100 lines as one file, from the cells of its notebook that have the tag model, train or main.

python tests/tools/hundred.py    write nbs/tutorials/updetr_in_100_lines.py
"""
import re
import textwrap
from pathlib import Path

import nbformat

NOTEBOOK = Path(__file__).resolve().parents[2] / 'nbs/tutorials/updetr_in_100_lines.ipynb'
SCRIPT = NOTEBOOK.with_suffix('.py')
TRAIN = '# ---- trained on one photo ----'
MAIN = "if __name__ == '__main__':"


def cells_with(notebook, tag):
    "The sources of the cells with a tag, without directives, two empty lines between them."
    cells = [c for c in nbformat.read(notebook, 4).cells if tag in c.metadata.get('tags', [])]
    return '\n\n\n'.join(re.sub(r'^#\|.*\n', '', c.source, flags=re.M) for c in cells)


def script(notebook=NOTEBOOK):
    "The text of the file that belongs to the notebook."
    model, train, main = (cells_with(notebook, tag) for tag in ('model', 'train', 'main'))
    return '\n\n\n'.join((model, f'{TRAIN}\n{train}', f'{MAIN}\n{textwrap.indent(main, " " * 4)}\n'))


if __name__ == '__main__': SCRIPT.write_text(script(), encoding='utf-8')
