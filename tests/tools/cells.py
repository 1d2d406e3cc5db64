"The first cells of a notebook that papermill runs, in this process: what its parameters lead to, without a kernel."
import nbformat


def run_cells(notebook, monkeypatch, until, **parameters):
    "The names that the cells leave, up to and with the one that contains `until`; parameters are set where papermill sets them."
    needs_a_kernel = 'matplotlib_inline.backend_inline.set_matplotlib_formats'
    monkeypatch.setattr(needs_a_kernel, lambda *args, **kwargs: None)
    space = {}
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type != 'code': continue
        exec(cell.source, space)
        if 'parameters' in cell.metadata.get('tags', []): space |= parameters
        if until in cell.source: return space
    raise AssertionError(f'{notebook.name} has no cell with {until!r}')
