"Cells of a notebook that papermill runs, in this process: what its parameters lead to, without a kernel, which takes seconds to begin."
import shutil

import nbformat

from conftest import ROOT
from updetr.train import loop


def run_cells(notebook, monkeypatch, until=None, **parameters):
    """The names that the cells leave, up to and with the one that contains `until` (None: all); parameters are set where papermill does."""
    needs_a_kernel = 'matplotlib_inline.backend_inline.set_matplotlib_formats'
    monkeypatch.setattr(needs_a_kernel, lambda *args, **kwargs: None)
    space = {}
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type != 'code': continue
        exec(cell.source, space)
        if 'parameters' in cell.metadata.get('tags', []): space |= parameters
        if until and until in cell.source: return space
    if until is None: return space
    raise AssertionError(f'{notebook.name} has no cell with {until!r}')


def run_report(notebook, folder, monkeypatch, **parameters):
    """The whole notebook in a folder of its own (a copy of settings.ini makes it the root), on the CPU, without data by the way.

    What it launches is trained in this process as well: a new one would import everything again."""
    def start(run, command, env): loop.run(run / 'cfg.json')
    monkeypatch.setattr('updetr.train.launch._start', start)
    shutil.copy(ROOT / 'settings.ini', folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.setenv('UPDETR_DATA', '')
    return run_cells(notebook, monkeypatch, **parameters)
