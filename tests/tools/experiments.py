"""The parts that the pages of nbs/experiments share: made from the package and the reports, and written into them.

Run in the project: python tests/tools/experiments.py"""
import json
import pathlib

import nbformat

from updetr.experiments.experiment_report import STARTED, needs_labels, page_parameters

ROOT = pathlib.Path(__file__).parents[2]
SECTION = """## Plan, numbers, claims

One call (notebook 66): the plan, the runs with their progress, mean and spread over seeds beside the paper's numbers,
which were measured at another scale, and what became of the claims, decided seed by seed by a paired one-sided test at 95 %."""


# measured with the recipe of that time; goes when the scale is run anew
EARLIER = 'mini, before it was made for one GPU (Animal-Pose)'


def numbers(report):
    "Return the numbers of a kept report; None: it is not kept."
    path = ROOT / 'reports' / report / 'metrics.json'
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


def took(found):
    "Return how many trainings a report has, and their minutes."
    seconds = found['provenance']['train_seconds'].values()
    return f'{len(seconds)} training{"s"[:len(seconds) != 1]}, {sum(seconds) / 60:.1f} minutes of one core'


def links(report, id):
    "The executed page of a report, or its numbers and pictures where that is not kept."
    folder = ROOT / 'reports' / report
    page, place = folder / f'{id}.ipynb', f'../../reports/{report}'
    if page.exists(): return f'[executed]({place}/{id}.ipynb)'
    pictures = ''.join(f', [picture]({place}/{p.name})' for p in sorted(folder.glob('*.png')))
    return f'[numbers]({place}/metrics.json){pictures}'


def how(id):
    "The commands of a page, and what they took."
    line = f'papermill nbs/experiments/{id}.ipynb runs/{id}.ipynb'
    own = '-p photos FOLDER' + (' -p labelled FOLDER' if needs_labels(id, 'mini') else '')
    speeds = '-p img_s 170' + (' -p finetune_img_s 35' if needs_labels(id, 'paper') else '')
    lines = [f'{line}   # toy: it runs', f'{line} -p scale small {own}   # your own photos, two CPU cores',
             f'{line} -p scale mini {own}   # the same on one GPU',
             f'{line} -p scale paper -p plan_only True {speeds}   # what the paper\'s would cost']
    if id in STARTED:
        # what still needs photos pre-trains another start, too
        photos = '-p photos FOLDER ' if id == 'ablations_detr' else ''
        lines.insert(2, f'{line} -p scale small -p pretrain updetr/shipped/updetr.safetensors {photos}-p labelled FOLDER'
                        '   # from weights that are there already')
    said = []
    for scale, report in (('toy', id), ('small', f'{id}_small'), (EARLIER, f'{id}_mini')):
        found = numbers(report)
        if not found: continue
        if scale == 'small': scale += f' ({found["rows"][0]["dataset"]})'
        said.append(f'- {scale}: {took(found)}; {links(report, id)}')
    commands = '\n'.join(lines)
    return (f'```\n{commands}\n```\n\nWhat it took; trainings that pages share are made once, and an interrupted one goes on:\n\n'
            + '\n'.join(said))


def shared(id):
    "Return what a page shares with the others: cell id -> source."
    return {'c000b': how(id), 'c003': page_parameters(id), 'c004': SECTION, 'c005': f"#| slow\nstudy = run_study('{id}', globals())"}


def copies(id):
    "The executed copies of a page, one a scale."
    return sorted((ROOT / 'reports').glob(f'{id}*/{id}.ipynb'))


def texts(path):
    "The markdown cells of a notebook: cell id -> source."
    return {c.id: c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown'}


def write(path, sources):
    "Put sources into the cells of a notebook, by their ids."
    nb = nbformat.read(path, 4)
    cells = {cell.id: cell for cell in nb.cells}
    for id, source in sources.items(): cells[id].source = source
    nbformat.write(nb, path)


def main():
    for path in sorted((ROOT / 'nbs/experiments').glob('*.ipynb')):
        id = path.stem
        write(path, shared(id))
        # an executed page keeps its code; what it says of others may have become old
        for copy in copies(id):
            there = texts(copy)
            write(copy, {name: text for name, text in texts(path).items() if name in there})


if __name__ == '__main__': main()
