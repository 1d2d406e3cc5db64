"`python -m updetr`: what there is, and which function a word calls; the functions are notebook 59's."
import csv
import dataclasses
import json
import ntpath
import os
import runpy
import shutil
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from test_task import save_photos
from updetr.core.checkpoint import write_json
from updetr.core.photos import builtin_photos
from updetr.core.shipped import shipped
from updetr.predict import commands
from updetr.predict.commands import predict, predict_command
from updetr.predict.detector import Detector
from updetr.predict.export import save_huggingface
from updetr.tasks.finetune import finetune_config


def run(monkeypatch, *words):
    "Do what `python -m updetr` does with some words, in this process; its names."
    monkeypatch.setattr(sys, 'argv', ['updetr', *words])
    return runpy.run_path(str(ROOT/'updetr'/'__main__.py'))


def test_help_lists_every_command_and_each_is_there(monkeypatch, capfd):
    for words in ((), ('--help',), ('-h',)):
        commands = run(monkeypatch, *words)['COMMANDS']
        shown = capfd.readouterr().out
        assert '--cfg' in shown and all(name in shown for name in commands)
    for place, about in commands.values():
        module, function = place.split(':')
        assert callable(getattr(import_module(module), function)) and about


def test_words_that_are_no_command(monkeypatch, capfd):
    with pytest.raises(SystemExit, match="no command 'train'"): run(monkeypatch, 'train')
    # the trainer's own parser answers, as it does for a launch
    with pytest.raises(SystemExit): run(monkeypatch, '--cgf', 'cfg.json')
    assert '--cfg' in capfd.readouterr().err
    with pytest.raises(FileNotFoundError): run(monkeypatch, '--cfg', 'nowhere/cfg.json')


@pytest.fixture
def photos(tmp_path):
    "A folder with the first three built-in photos as 0.jpg, 1.jpg and 2.jpg."
    folder = tmp_path / 'photos'
    folder.mkdir()
    for i, photo in enumerate(builtin_photos()[:3]): shutil.copy(photo.path, folder / f'{i}.jpg')
    return folder


def listed(out):
    "The files in answers.csv, and the pictures in results.json."
    with open(out / 'answers.csv', encoding='utf-8', newline='') as file: rows = list(csv.DictReader(file))
    return {row['file'] for row in rows}, {row['image_id'] for row in json.loads((out / 'results.json').read_text())}


def test_a_name_that_is_not_utf8_is_in_the_lists(photos, tmp_path):
    name = os.fsdecode(b'caf\xe9.jpg')
    try: (photos / '0.jpg').rename(photos / name)
    except OSError: pytest.skip('every name is UTF-8 on this disk')
    assert predict(shipped('detector'), [photos], tmp_path / 'found', threshold=0)['pictures'] == 3
    assert listed(tmp_path / 'found') == ({r'caf\xe9.jpg', '1.jpg', '2.jpg'}, {name, '1.jpg', '2.jpg'})
    assert (tmp_path / 'found/pictures' / name).is_file()
    # a segmenter's answer has a PNG of that name, too
    answer = SimpleNamespace(plot=lambda: Image.new('RGB', (8, 8)), ids=torch.arange(64).view(8, 8), to_dict=lambda name: {})
    commands._save_answer(tmp_path / 'found', name, answer, [name])
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'found/segments' / f'{name}.png'))[..., 0], answer.ids)


def test_each_photo_has_a_drawing_of_its_own(tmp_path):
    """A photo that is no JPEG is drawn into NAME.jpg, which may be another photo's name; names that share nothing stay as they are."""
    names = ['a.png', 'a.png.jpg', 'a.png.jpg.jpg', 'b.jpg', 'b.png', 'B.JPEG']
    # each of another height, so that the drawings tell whose they are
    heights = {name: 40 + 8 * i for i, name in enumerate(names)}
    (tmp_path / 'photos').mkdir()
    for name, height in heights.items():
        kind = 'PNG' if name.endswith('png') else 'JPEG'
        Image.new('RGB', (64, height)).save(tmp_path / 'photos' / name, format=kind)
    predict(shipped('detector'), [tmp_path / 'photos'], tmp_path / 'found', threshold=1)
    drawn = {file.name: Image.open(file).height for file in (tmp_path / 'found/pictures').iterdir()}
    own = {'a.png': 'a.png.jpg.jpg.jpg', 'b.png': 'b.png.jpg'}
    assert drawn == {own.get(name, name): height for name, height in heights.items()}


def test_what_was_answered_is_kept_when_it_is_stopped(photos, tmp_path, monkeypatch):
    """Ctrl-C while the second of three pictures is drawn: the lists have the first, and so have the drawings."""
    save = commands._save_answer
    def stopped(out, name, *rest):
        if name == '1.jpg': raise KeyboardInterrupt
        return save(out, name, *rest)

    monkeypatch.setattr(commands, '_save_answer', stopped)
    (photos / 'notes.txt').write_text('no photo')
    with pytest.raises(KeyboardInterrupt): predict(shipped('detector'), [photos], tmp_path / 'found', threshold=0, batch=2)
    assert listed(tmp_path / 'found') == ({'0.jpg'}, {'0.jpg'})
    assert [file.name for file in (tmp_path / 'found/pictures').iterdir()] == ['0.jpg']
    assert 'notes.txt: not an image' in (tmp_path / 'found/skipped.txt').read_text()


@pytest.mark.parametrize('batch', [1, 2, 8])
def test_the_line_of_progress_ends_once(batch, photos, tmp_path, monkeypatch, capsys):
    "Also where fewer pictures are read than there are files: the shell's prompt would stand in it."
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    few = sorted(photos.iterdir())[:2]
    (broken := tmp_path / 'broken.jpg').write_bytes(b'no photo')
    for files in (few, [*few, broken]):
        predict(shipped('detector'), [str(f) for f in files], tmp_path / f'out{len(files)}', batch=batch)
        shown = capsys.readouterr().err
        assert shown.endswith('\n') and shown.count('\n') == 1 and '2 pictures' in shown.split('\r')[-1]


@pytest.mark.parametrize('terminal', [True, False])
def test_where_nothing_can_be_read_the_first_file_is_named(terminal, tmp_path, monkeypatch):
    "Not what is no photo, nor the last one; the line of progress divides by no speed."
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: terminal, raising=False)
    (folder := tmp_path / 'photos').mkdir()
    (folder / 'notes.txt').write_text('no photo')
    good = Path(builtin_photos()[0].path).read_bytes()
    for name in ('1.jpg', '2.jpg'): (folder / name).write_bytes(good[:-700])
    with pytest.raises(ValueError, match='none of the 2 files could be read, first .*1.jpg: cannot be decoded'):
        predict(shipped('detector'), [folder], tmp_path / 'found')
    assert not (tmp_path / 'found/results.json').exists()
    # a film without a frame is one that cannot be read
    (film := tmp_path / 'a.mp4').write_bytes(b'')
    video = nullcontext(SimpleNamespace(decode=lambda video: []))
    monkeypatch.setitem(sys.modules, 'av', SimpleNamespace(open=lambda file: video, FFmpegError=OSError))
    with pytest.raises(ValueError, match='none of the 1 files could be read, first .*a.mp4: .* no frame'):
        predict(shipped('detector'), [film], tmp_path / 'found')


def test_what_the_command_lines_say_arrives(photos, tmp_path, monkeypatch):
    asked, told = [], {}
    def opened(*words):
        asked.append(words)
        return Detector.demo(*words[1:2])

    def evaluated(**options):
        told.update(options)
        kinds = [{'kind': kind, 'AP50 to win': won} for kind, won in (('little', 1.), ('much', 2.))]
        return {'AP': {'AP': 1., 'AP50': 2.}, 'kinds': kinds}

    monkeypatch.setattr(commands, 'open_model', opened)
    predict_command(['x.pth', str(photos), '--out', str(tmp_path / 'found'), '--nms', '.6', '--device', 'cpu'])
    assert asked == [('x.pth', 'cpu', .6)]
    # without a threshold: .5
    with open(tmp_path / 'found/answers.csv') as file: scores = [float(row['score']) for row in csv.DictReader(file)]
    detector = Detector.demo()
    assert len(scores) == sum(len(detector(photos / f'{i}.jpg', .5)) for i in range(3))
    assert len(scores) < sum(len(detector(photos / f'{i}.jpg', .2)) for i in range(3))
    monkeypatch.setattr(commands, 'evaluate', evaluated)
    commands.evaluate_command('x.pth data --out found --split val --year 2007 --images photos --nms .6 --device cuda'.split())
    assert told == dict(checkpoint='x.pth', data='data', out='found', split='val', year='2007', images='photos', nms=.6, device='cuda')


def test_a_checkpoint_whose_name_is_not_utf8_has_a_report(tmp_path, monkeypatch):
    "Its name is the page's title, and the page is UTF-8."
    monkeypatch.setattr(commands, 'open_model', lambda *words: Detector.demo())
    monkeypatch.setattr(commands, 'evaluation_set', lambda *words: [])
    for name in ('training_set', 'answers_of'): monkeypatch.setattr(commands, name, lambda *words: None)
    monkeypatch.setattr(commands, 'photo_findings', lambda *sets: {})
    monkeypatch.setattr(commands, 'write_report', lambda out, evaluator, dataset, findings, title, nms: title)
    assert commands.evaluate(os.fsdecode(b'caf\xe9.pth'), 'photos', tmp_path) == r'caf\xe9.pth on photos'


def test_photos_of_the_training_part_are_listed_ones(photos):
    "Both parts in one folder: only what neither has lies there unlisted, and only what both have was trained on."
    def part(name, *files):
        images = [{'id': 9 - int(f[0]), 'file_name': f, 'width': 8, 'height': 8} for f in files]
        write_json(file := photos.parent / f'{name}.json', {'images': images, 'categories': [{'id': 3, 'name': 'a'}], 'annotations': []})
        return commands.open_dataset(file, images=photos)

    shutil.copy(photos / '0.jpg', photos / '3.jpg')
    val, train = part('val', '0.jpg'), part('train', '1.jpg', '3.jpg')
    def named(findings): return [[os.path.basename(f) for f in pair] for pair in findings['both']], \
        [os.path.basename(f) for f in findings['unlisted']], findings['trained']
    assert named(commands.photo_findings(val, train)) == ([['0.jpg', '3.jpg']], ['2.jpg'], True)
    assert named(commands.photo_findings(val, None)) == ([], ['1.jpg', '2.jpg', '3.jpg'], False)


def test_a_folder_pictures_of_ones_own_is_searched_and_not_written_into(photos, tmp_path):
    "The drawing of 0.jpg would have taken the place of the photo pictures/0.jpg."
    for name in ('pictures', 'segments'):
        (photos / name).mkdir()
        shutil.copy(photos / '1.jpg', photos / name / '0.jpg')
    with pytest.raises(FileExistsError, match='pictures is not empty, .*name another --out'):
        predict(shipped('detector'), [photos], photos)
    assert (photos / 'pictures/0.jpg').read_bytes() == (photos / '1.jpg').read_bytes()
    # a report's folder has no drawings either
    (photos / 'report.html').write_text('')
    with pytest.raises(FileExistsError): predict(shipped('detector'), [photos], photos)
    assert predict(shipped('detector'), [photos], tmp_path / 'found')['pictures'] == 5
    # a call's own results are written anew
    assert predict(shipped('detector'), [photos / '0.jpg'], tmp_path / 'found')['pictures'] == 1


def test_names_of_skipped_files_with_line_breaks_and_colons(photos, tmp_path, capsys):
    for name in ('a\nb.txt', 'c: d.txt', 'e\u2028.txt'): (photos / name).write_text('no photo')
    predict_command([str(shipped('detector')), str(photos), '--out', str(tmp_path / 'found')])
    assert 'skipped 3, all in skipped.txt: 3 not an image\n' in capsys.readouterr().out
    lines = (tmp_path / 'found/skipped.txt').read_text(encoding='utf-8').splitlines()
    assert lines == [f'{photos}/{name}: not an image' for name in ('a b.txt', 'c: d.txt', 'e .txt')]


def test_evaluate_counts_as_the_run_did(tmp_path, monkeypatch):
    "Its rules for boxes and photos, and the place that was named also for the photos it was trained on."
    asked = []
    def opened(data, split=None, year=None, classes=None, **rules):
        asked.append((split, year, rules))
        if (split, year) == ('train', '2007'): raise ValueError('no such year')
        return 'set'
    cfg = finetune_config('demo', data='gone', difficult='keep', missing='skip', exif='stored')
    monkeypatch.setattr(commands, 'open_dataset', opened)
    monkeypatch.setattr(commands, 'dataset_parts', lambda *args: ['train', 'test'])
    rules = dict(difficult='keep', exif='stored', missing='skip')
    for known, expected in ((cfg, rules), (None, {})):
        monkeypatch.setattr(commands, 'run_config', lambda file, known=known: known)
        asked.clear()
        assert commands.evaluation_set('x.pth', tmp_path, 'test', '2007', 'photos') == 'set'
        assert commands.training_set('x.pth', tmp_path, 'test', '2007', 'photos') == 'set'
        assert asked == [('test', '2007', {'images': 'photos'} | expected), ('train', '2007', {'images': 'photos'}),
                         ('train', None, {'images': 'photos'})]


def test_photos_on_two_drives_have_names():
    "On Windows these have no folder in common; names become paths below the folder of the results."
    names = commands._by_what_differs
    files = [r'C:\photos\a.jpg', r'D:\more\a.jpg', r'\\host\share\b.jpg']
    assert names(files, ntpath) == dict(zip([r'C\photos\a.jpg', r'D\more\a.jpg', r'host\share\b.jpg'], files))
    assert names([r'C:\photos\a.jpg', r'C:\photos\sub\a.jpg'], ntpath).keys() == {'a.jpg', r'sub\a.jpg'}


def test_the_fold_that_a_run_kept(tmp_path, monkeypatch):
    "It was evaluated on the part val of its set, which the run had nothing to do with, without a word."
    for part, number in (('train', 10), ('val', 3)):
        for folder in (tmp_path / 'mine', tmp_path / 'other'):
            save_photos(folder / 'images' / part, number, (48, 32), start=10 * (part == 'val'))
            (folder / 'labels' / part).mkdir(parents=True)
            for i in range(number): (folder / f'labels/{part}/{i}.txt').write_text('0 .5 .5 .4 .4', encoding='utf-8')
            (folder / 'data.yaml').write_text('train: images/train\nval: images/val\nnames: [thing]', encoding='utf-8')
    cfg = finetune_config('demo', data=str(tmp_path / 'mine'), split_val='fold 1 of 5')
    def photos(data, **changes):
        monkeypatch.setattr(commands, 'run_config', lambda file: dataclasses.replace(cfg, **changes))
        return commands.evaluation_set('x.pth', tmp_path / data, 'val', None, None)
    assert len(photos('mine')) == 2 and 'fold 1 of 5' in photos('mine').note
    assert len(photos('mine', split_val='val')) == len(photos('other')) == 3
    # of a set without such a part it is what a run keeps
    for kind in ('images', 'labels'): shutil.rmtree(tmp_path / 'other' / kind / 'val')
    (tmp_path / 'other/data.yaml').write_text('train: images/train\nnames: [thing]', encoding='utf-8')
    assert len(photos('other')) == 2, photos('other').note


def test_a_folder_made_for_sharing_counts_as_the_run_did(tmp_path):
    "`evaluate` knows the run's rules, and which photos of a set without parts it kept, as from the run's own file."
    detector = Detector.demo()
    detector.cfg = dataclasses.replace(detector.cfg, classes='kind 1, kind 0', year='', difficult='keep', missing='skip', exif='stored')
    save_huggingface(detector, tmp_path / 'hub')
    assert commands.run_config(tmp_path / 'hub') == commands.run_config(tmp_path / 'hub/model.safetensors') == detector.cfg
    save_photos(tmp_path / 'photos', 10, (48, 32))
    write_json(file := tmp_path / 'all.json', {
        'images': [{'id': i, 'file_name': f'{i}.jpg', 'width': 48, 'height': 32} for i in range(10)],
        'categories': [{'id': k, 'name': f'kind {k}'} for k in range(3)],
        'annotations': [{'id': i, 'image_id': i, 'category_id': i % 3, 'bbox': [4, 4, 20, 20], 'area': 400, 'iscrowd': 0}
                        for i in range(10)]})
    for split, number in (('val', 2), (None, 10)):
        photos = commands.evaluation_set(tmp_path / 'hub', file, split, None, tmp_path / 'photos')
        assert list(photos.classes) == ['kind 1', 'kind 0'] and len(photos) == number
