"Data sets with something wrong: each kind has its own clear message, when it is opened or when it is checked."
import dataclasses
import json
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from torchvision.io import write_png

import updetr.tasks.panoptic_task  # noqa: F401 (its sets have fingerprints)
from updetr.core.config import LATER, cfg_changes
from updetr.core.fingerprint import data_changes, mark_set, same_data
from updetr.core.photos import BadPhoto, builtin_photos, read_photo
from updetr.data.check import check_dataset, start_notes
from updetr.data.datasets import DetectionSet, coco_table, open_dataset
from updetr.data.queries import QueryPool
from updetr.data.transforms import SMALL_SIZES, DetectionViews
from updetr.tasks.finetune import finetune_config, open_sets
from updetr.tasks.finetune_task import FinetuneTask
from updetr.tasks.panoptic import coco_truth, instance_truth, open_panoptic
from updetr.train.evaluate import CocoEvaluator
from updetr.train.loop import join_processes

PHOTO = next(p.path for p in builtin_photos() if p.name == 'rocket')
HEIGHT, WIDTH = read_photo(PHOTO).shape[1:]


def content():
    "A sound COCO dictionary of two photos and three boxes"
    return {'images': [{'id': k, 'file_name': f'{k}.jpg', 'height': HEIGHT, 'width': WIDTH} for k in (1, 2)],
            'categories': [{'id': 5, 'name': 'rocket'}, {'id': 9, 'name': 'tower'}],
            'annotations': [{'id': 1, 'image_id': 1, 'category_id': 5, 'bbox': [300, 40, 40, 300]},
                            {'id': 2, 'image_id': 1, 'category_id': 9, 'bbox': [100, 40, 90, 300]},
                            {'id': 3, 'image_id': 2, 'category_id': 5, 'bbox': [300, 40, 40, 300]}]}


def coco(root, data=None, text=None):
    "A COCO folder"
    for part in ('annotations', 'train2017'): (root / part).mkdir(parents=True, exist_ok=True)
    for name in ('1.jpg', '2.jpg'): (root / 'train2017' / name).write_bytes(Path(PHOTO).read_bytes())
    (root / 'annotations/instances_train2017.json').write_text(json.dumps(data or content()) if text is None else text)
    return root


OBJECT = ('<object><name>rocket</name><bndbox><xmin>300</xmin><ymin>40</ymin><xmax>340</xmax><ymax>340</ymax></bndbox></object>')


def voc(root, objects=OBJECT, head='', names=('a',), year=2007, xml=None):
    "A VOC folder"
    base = root / f'VOC{year}'
    for part in ('Annotations', 'ImageSets/Main', 'JPEGImages'): (base / part).mkdir(parents=True, exist_ok=True)
    (base / 'ImageSets/Main/trainval.txt').write_text('\n'.join(names))
    (base / 'JPEGImages/a.jpg').write_bytes(Path(PHOTO).read_bytes())
    size = f'<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>'
    (base / 'Annotations/a.xml').write_text(xml or f'{head}<annotation>{size}{objects}</annotation>')
    return root


def change(where, k, **values):
    "The sound dictionary with one entry changed (a value None takes its key away)"
    data = content()
    entry = data[where][k] | values
    data[where][k] = {name: v for name, v in entry.items() if v is not None}
    return data


def without(key): return {k: v for k, v in content().items() if k != key}


def folder(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('')
    return root


def test_the_sound_sets_are_sound(tmp_path):
    "In the good sets that the bad ones are made of there is nothing to complain about."
    for part in ('coco', 'voc'): (tmp_path / part).mkdir()
    for ds in (open_dataset(coco(tmp_path / 'coco'), 'train'), open_dataset(voc(tmp_path / 'voc'), 'trainval')):
        report = check_dataset(ds, decode=True)
        assert report.ok and not report.warnings, report
        assert ds.columns['boxes'].tolist()[0] == [299 if 'VOC' in report.title else 300, 39 if 'VOC' in report.title else 40, 340, 340]


# ---- what cannot be opened: (folder -> opened set), words of the message --------------------------------------------

UNOPENED = {
    'nothing there': (lambda f: open_dataset(f / 'nowhere', 'train'), ['nothing at', 'nowhere']),
    'photos only': (lambda f: open_dataset(folder(f, 'train/a.jpg'), 'train'), ['EXPECTED', 'SEEN', 'a.jpg', 'JPEGImages']),
    'YOLO of other photos': (lambda f: open_dataset(folder(f, 'data.yaml', 'labels/b.txt', 'images/a.jpg'), 'train'),
                             ['EXPECTED', 'SEEN', '1 photos', '1 .yaml', 'Nearest: YOLO', 'has a photo of its name']),
    'no parts': (lambda f: open_dataset(folder(f, 'data.yaml', 'labels/a.txt', 'images/a.jpg'), 'train'), ["no parts, so no 'train'"]),
    'YOLO of a broken photo': (lambda f: open_dataset(folder(f, 'labels/a.txt', 'images/a.jpg')), ['cannot be measured', 'empty']),
    'two sets': (lambda f: open_dataset(coco(f / 'a').parent, 'train') and open_dataset(coco(f / 'b').parent, 'train'),
                 ['2 data sets: a, b', 'Say which']),
    'no such split': (lambda f: open_dataset(coco(f), 'test'), ["no split 'test'", 'it has: train']),
    'no split said': (lambda f: open_dataset(voc(f)), ['no split None', 'it has: trainval']),
    'two years': (lambda f: open_dataset(voc(voc(f), year=2012), 'trainval'), ['VOC2007', 'VOC2012', 'say year=']),
    'no such year': (lambda f: open_dataset(voc(f), 'trainval', year='07+12'), ['07+12', 'VOC2012', "only ['VOC2007']"]),
    'no such policy': (lambda f: open_dataset(voc(f), 'trainval', difficult='yes'), ["'yes'", 'ignore', 'keep', 'drop']),
    'no such class': (lambda f: open_dataset(coco(f), 'train', classes=['cat']), ["none of the classes ['cat']", 'rocket']),
    'no JSON': (lambda f: open_dataset(coco(f, text='{"images": ['), 'train'), ['instances_train2017.json is no JSON', 'line 1']),
    'deep JSON': (lambda f: open_dataset(coco(f, text='[' * 100_000), 'train'), ['is no JSON']),
    'detections': (lambda f: open_dataset(coco(f, text='[{"image_id": 1}]'), 'train'), ['holds a list', 'expected an object']),
    'no annotations': (lambda f: open_dataset(coco(f, without('annotations')), 'train'), ["no list 'annotations'"]),
    'no images': (lambda f: open_dataset(coco(f, content() | {'images': []}), 'train'), ['lists no images']),
    'entry without a box': (lambda f: open_dataset(coco(f, change('annotations', 1, bbox=None)), 'train'),
                            ["annotations[1] has no 'bbox'"]),
    'entry without a class': (lambda f: open_dataset(coco(f, change('annotations', 2, category_id=None)), 'train'),
                              ["annotations[2] has no 'category_id'"]),
    'photo without a name': (lambda f: open_dataset(coco(f, change('images', 1, file_name=None)), 'train'),
                             ["images[1] has no 'file_name'"]),
    'class twice': (lambda f: open_dataset(coco(f, change('categories', 1, name='rocket')), 'train'),
                    ['category names', "'rocket'", '2 times']),
    'class id twice': (lambda f: open_dataset(coco(f, change('categories', 1, id=5)), 'train'), ['category ids', '5 comes 2 times']),
    'photo id twice': (lambda f: open_dataset(coco(f, change('images', 1, id=1)), 'train'), ['image ids', '1 comes 2 times']),
    'name that leads out': (lambda f: open_dataset(coco(f, change('images', 1, file_name='../../secret.jpg')), 'train'),
                            ["'../../secret.jpg'", 'leads out']),
    'absolute name': (lambda f: open_dataset(coco(f, change('images', 1, file_name='/etc/hosts')), 'train'), ["'/etc/hosts'", 'leads out']),
    'VOC name that leads out': (lambda f: open_dataset(voc(f, names=('../../a',)), 'trainval'), ["'../../a'", 'leads out']),
    'image id a list': (lambda f: open_dataset(coco(f, change('images', 1, id=[2])), 'train'),
                        ['images[1] has id [2], a list', 'must be a number or a text']),
    'image id of an annotation true': (lambda f: open_dataset(coco(f, change('annotations', 1, image_id=True)), 'train'),
                                       ['annotations[1] (id 2) has image_id True, a truth value']),
    'iscrowd as text': (lambda f: open_dataset(coco(f, change('annotations', 1, iscrowd='0')), 'train'),
                        ["annotations[1] (id 2) has iscrowd '0', a text", 'must be 0 or 1 without quotes']),
    'area as text': (lambda f: open_dataset(coco(f, change('annotations', 2, area='many')), 'train'),
                     ["annotations[2] (id 3) has area 'many', a text", 'finite number']),
    'class named by a list': (lambda f: open_dataset(coco(f, change('categories', 1, name=['tower'])), 'train'),
                              ["categories[1] (id 9) has name ['tower'], a list", 'in quotes']),
    'class named by a number': (lambda f: open_dataset(coco(f, change('categories', 1, name=float('inf'))), 'train'),
                                ['categories[1] (id 9) has name inf, a number']),
    'half a character': (lambda f: open_dataset(coco(f, change('images', 1, file_name='\ud800.jpg')), 'train'), ['ud800', 'leads out']),
    'difficult in words': (lambda f: open_dataset(voc(f, OBJECT.replace('<bnd', '<difficult>hard</difficult><bnd')), 'trainval'),
                           ["a.xml: object 1 has <difficult> 'hard'", '0 or 1']),
    'no list is text': (lambda f: open_dataset(_list(voc(f), b'\xff\xfea'), 'trainval'), ['trainval.txt is no text']),
    'photos elsewhere': (lambda f: open_dataset(_moved(coco(f)), 'train'), ["'1.jpg'", 'images=FOLDER']),
    'no folder of photos': (lambda f: open_dataset(coco(f), 'train', images=f / 'lost'), ['no folder of photos', 'lost']),
    'no size, no photo': (lambda f: open_dataset(coco(f, change('images', 1, width=None, file_name='3.jpg')), 'train'),
                          ['3.jpg', 'no size', 'cannot be read']),
    'entities': (lambda f: open_dataset(voc(f, head='<!DOCTYPE a [<!ENTITY b "c">]>'), 'trainval'), ['a.xml', 'DOCTYPE', 'refused']),
    'broken XML': (lambda f: open_dataset(voc(f, xml='<annotation><object>'), 'trainval'), ['a.xml is no VOC annotation', 'line 1']),
    'no XML': (lambda f: open_dataset(voc(f, names=('a', 'b')), 'trainval'), ['b.xml cannot be read']),
    'object without a box': (lambda f: open_dataset(voc(f, OBJECT + '<object><name>x</name></object>'), 'trainval'),
                             ['a.xml: object 2 has no <bndbox>']),
    'object without a name': (lambda f: open_dataset(voc(f, '<object><bndbox/></object>'), 'trainval'), ['a.xml: object 1 has no <name>']),
    'empty list': (lambda f: open_dataset(voc(f, names=()), 'trainval'), ['trainval.txt lists no photos']),
    'photo listed twice': (lambda f: open_dataset(voc(f, names=('a', 'a')), 'trainval'), ['photo names', "'VOC2007/a' comes 2 times"]),
    'no objects at all': (lambda f: open_dataset(voc(f, ''), 'trainval'), ['no annotation has an <object>']),
}


def _list(root, data):
    (root / 'VOC2007/ImageSets/Main/trainval.txt').write_bytes(data)
    return root


def _moved(root):
    (root / 'train2017').rename(root / 'elsewhere')
    return root


@pytest.mark.parametrize('kind', UNOPENED)
def test_unopened(kind, tmp_path):
    act, words = UNOPENED[kind]
    with pytest.raises((ValueError, FileNotFoundError)) as e: act(tmp_path)
    missing = [w for w in words if w not in str(e.value)]
    assert not missing, f'{e.value} does not say {missing}'


def test_messages_differ(tmp_path):
    "No two kinds of trouble share a message."
    texts = {}
    for kind, (act, _) in UNOPENED.items():
        here = tmp_path / str(len(texts))
        here.mkdir()
        with pytest.raises((ValueError, FileNotFoundError)) as e: act(here)
        texts[kind] = str(e.value).replace(str(here), 'F')
    assert len(set(texts.values())) == len(texts)


# ---- what opens but does not pass the check: data, level, words ----------------------------------------------------

def _add(**values):
    data = content()
    data['annotations'].append(data['annotations'][0] | {'id': 4} | values)
    return data


def _all_boxes(function):
    data = content()
    for a in data['annotations']: a['bbox'] = function(*a['bbox'])
    return data


UNSOUND = {
    'annotation id twice': (_add(id=3, bbox=[1, 1, 9, 9]), 'errors', ['ids used twice: 1, e.g. 3', 'pycocotools']),
    'unknown photo': (_add(image_id=77), 'errors', ['photo that is not listed', '77']),
    'unknown photo, text for number': (_add(image_id='1'), 'errors', ['photo that is not listed', "'1'"]),
    'unknown class': (_add(category_id=6), 'errors', ['class that is not listed', '6']),
    'NaN': (_add(bbox=[1, 2, float('nan'), 4]), 'errors', ['not four finite numbers: 1', 'annotation 4 of 1.jpg', 'nan']),
    'infinite': (_add(bbox=[1, 2, float('inf'), 4]), 'errors', ['not four finite numbers: 1', 'inf']),
    'five numbers': (_add(bbox=[1, 2, 3, 4, 5]), 'errors', ['not four finite numbers: 1', 'annotation 4']),
    'no numbers': (_add(bbox=['a', 2, 3, 4]), 'errors', ['not four finite numbers: 1', 'annotation 4']),
    'negative': (_add(bbox=[50, 50, -20, 30]), 'errors', ['negative side: 1', '50, 50, -20, 30', 'exchanged']),
    'corners': (_all_boxes(lambda x, y, w, h: [x + 200, y, x + 200 + w, y + h]), 'errors', ['x1, y1, x2, y2', 'x, y, width, height']),
    'fractions': (_all_boxes(lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]), 'errors', ['fractions', 'pixels']),
    'missing photo': (change('images', 1, file_name='lost.jpg'), 'errors', ['photos missing: 1', 'lost.jpg', '-p missing skip']),
    'another size': (change('images', 1, width=WIDTH + 1), 'errors', ['photos of another size: 1', '2.jpg', f'{WIDTH + 1} x {HEIGHT}']),
    'all crowds': (content() | {'annotations': [a | {'iscrowd': 1} for a in content()['annotations']]}, 'errors',
                   ['no box can be trained on', '3 of 3 are marked iscrowd=1', 'write iscrowd 0']),
    'all difficult': (content() | {'annotations': [a | {'difficult': 1} for a in content()['annotations']]}, 'errors',
                      ['no box can be trained on', '3 of 3 are marked difficult', '-p difficult keep']),
    'texts for numbers': (_add(bbox=['1', '2', '3', '4']), 'errors', ['not four finite numbers: 1', 'annotation 4']),
    'nothing to learn': (content() | {'annotations': []}, 'errors', ['no box can be used']),
    'no area': (_add(bbox=[50, 50, 0, 30]), 'warnings', ['without area: 1', '50, 50, 0, 30']),
    'quite outside': (_add(bbox=[WIDTH + 5, 5, 9, 9]), 'warnings', ['quite outside their photos: 1']),
    'sticking out': (_add(bbox=[WIDTH - 5, 5, 9, 9]), 'warnings', ['stick out of their photos: 1', 'clamped']),
    'box twice': (_add(), 'warnings', ['come twice', '1, first annotation 4']),
    'photo twice': (change('images', 1, file_name='1.jpg'), 'warnings', ['listed more than once: 1', '1.jpg']),
    'class without a box': (change('annotations', 1, category_id=5), 'warnings', ['classes without a box: 1, tower']),
}


@pytest.mark.parametrize('kind', UNSOUND)
def test_unsound(kind, tmp_path):
    "The trouble is told once, at its level; what is no error does not stop a training."
    data, level, words = UNSOUND[kind]
    ds = open_dataset(coco(tmp_path, deepcopy(data)), 'train')
    report = check_dataset(ds)
    told = getattr(report, level)
    assert any(all(w in text for w in words) for text in told), f'{words} not in {told}'
    assert report.ok == (level == 'warnings')
    assert len(ds.table.ids) == len(ds.rows) + sum(ds.left_out.values())
    if not report.ok:
        with pytest.raises(ValueError, match='ERROR'): report.require()


def test_broken_photos(tmp_path):
    "A page that calls itself a photo is found from its header; a half photo only by decoding."
    root = coco(tmp_path)
    (root / 'train2017/1.jpg').write_text('<html>404</html>')
    half = Path(PHOTO).read_bytes()
    (root / 'train2017/2.jpg').write_bytes(half[:len(half) // 2])
    ds = open_dataset(root, 'train')
    assert [e for e in check_dataset(ds).errors if 'photos broken: 1, first 1.jpg' in e]
    assert [e for e in check_dataset(ds, decode=True).errors if 'photos broken: 2' in e]


def turned_set(root, turn, said, box, shape=(40, 100), name='a'):
    "A COCO set of one photo with a white object on black, turned by EXIF; `box` on the stored pixels or, if None is said, upright"
    stored = np.zeros((*shape, 3), np.uint8)
    stored[5:15, 10:40] = 255
    note = Image.Exif()
    note[0x0112] = turn
    for part in ('annotations', 'train2017'): (root / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(stored).save(root / f'train2017/{name}.png', exif=note)
    content = {'images': [{'id': 1, 'file_name': f'{name}.png', 'height': said[0], 'width': said[1]}],
               'categories': [{'id': 1, 'name': 'x'}], 'annotations': [{'id': 1, 'image_id': 1, 'category_id': 1, 'bbox': box}]}
    (root / 'annotations/instances_train2017.json').write_text(json.dumps(content))
    return root


def upright_box(root):
    "Where the object is in the upright photo: x, y, width, height"
    rows, columns = (read_photo(root / 'train2017/a.png').float().mean(0) > 128).nonzero().T
    return [int(columns.min()), int(rows.min()), int(columns.max() - columns.min()) + 1, int(rows.max() - rows.min()) + 1]


STORED = [10, 5, 30, 10]
TURNED = {  # said size, boxes drawn on, words of the warning (None: nothing has to be said), the way that is right
    'upright, 90': (6, (100, 40), 'upright', None, 'sizes'),
    'stored, 90': (6, (40, 100), 'stored', 'states the size of the stored pixels: 1', 'sizes'),
    'stored, mirrored': (5, (40, 100), 'stored', 'states the size of the stored pixels: 1', 'sizes'),
    'upright, 180': (3, (40, 100), 'upright', 'does not tell how their boxes were drawn: 1', 'sizes'),
    'stored, 180': (3, (40, 100), 'stored', 'does not tell how their boxes were drawn: 1', 'stored'),
    'stored, 90, told': (8, (40, 100), 'stored', 'states the size of the stored pixels: 1', 'stored'),
}


@pytest.mark.parametrize('kind', TURNED)
def test_boxes_lie_on_objects_of_turned_photos(kind, tmp_path):
    "Stated sizes decide which way up a photo was when its boxes were drawn; where they cannot, that is said, with the way out."
    turn, said, drawn_on, words, way = TURNED[kind]
    root = turned_set(tmp_path, turn, said, STORED)
    if drawn_on == 'upright': turned_set(tmp_path, turn, said, upright_box(root))
    report, ds = check_dataset(open_dataset(root, 'train')), open_dataset(root, 'train', exif=way)
    assert report.ok and report.counts['photos turned by EXIF'] == 1
    assert way == 'sizes' or not check_dataset(ds).warnings
    assert [words in w and 'a.png' in w for w in report.warnings] == ([True] if words else []), report
    image, (x1, y1, x2, y2) = ds[0]['image'], ds[0]['boxes'][0].int().tolist()
    assert image[:, y1:y2, x1:x2].float().mean() > 250 and image.float().sum() == image[:, y1:y2, x1:x2].float().sum()
    assert tuple(image.shape[1:]) == tuple(ds.sizes[0])


def test_boxes_that_fit_only_upright_prove_it(tmp_path):
    "A converter that took the size of the stored pixels for boxes drawn in a browser."
    root = turned_set(tmp_path, 6, (100, 40), STORED)
    box = upright_box(root)
    ds = open_dataset(turned_set(tmp_path, 6, (40, 100), [box[0], 60, 9, 30]), 'train')
    assert ds.sizes.tolist() == [[100, 40]] and ds.columns['boxes'].tolist() == [[box[0], 60, box[0] + 9, 90]]
    assert any('fit only upright: 1, first a.png' in n for n in check_dataset(ds).warnings) and tuple(ds[0]['image'].shape) == (3, 100, 40)


def test_what_one_box_proves_holds_for_the_file(tmp_path):
    "A box that fits both ways does not tell; unless another one denies it, it was drawn as those that do tell."
    root = turned_set(tmp_path, 6, (40, 100), STORED)
    tells, silent, denies = [5, 60, 9, 30], upright_box(root), [60, 5, 30, 9]
    for name in 'bc': turned_set(tmp_path, 8, (40, 100), STORED, name=name)
    Image.new('RGB', (100, 40)).save(root / 'train2017/plain.png')  # no note turns it: it stays as it is

    def opened(**boxes):
        names = [*boxes, 'plain']
        content = {'images': [{'id': i, 'file_name': f'{n}.png', 'height': 40, 'width': 100} for i, n in enumerate(names)],
                   'categories': [{'id': 1, 'name': 'x'}],
                   'annotations': [{'id': i + 1, 'image_id': i, 'category_id': 1, 'bbox': box} for i, box in enumerate(boxes.values())]}
        (root / 'annotations/instances_train2017.json').write_text(json.dumps(content))
        ds = open_dataset(root, 'train')
        return ds, ' '.join(ds.table.notes)
    ds, said = opened(a=silent, b=tells)
    assert ds.sizes.tolist() == [[100, 40], [100, 40], [40, 100]] and 'which do not tell: 1' in said
    image, (x1, y1, x2, y2) = ds[0]['image'], ds[0]['boxes'][0].int().tolist()
    assert image[:, y1:y2, x1:x2].float().mean() > 250  # the object that was drawn upright
    ds, said = opened(a=silent, b=tells, c=denies)
    assert ds.sizes.tolist() == [[40, 100], [100, 40], [40, 100], [40, 100]] and '2 are taken as stated' in said
    assert opened(a=silent, c=denies)[0].sizes.tolist() == [[40, 100]] * 3


def test_a_set_of_two_ways_is_refused(tmp_path):
    "Where the other turned photos were drawn on as stored, an undecided one shown upright is an error."
    root = turned_set(tmp_path, 6, (40, 100), STORED)
    turned_set(tmp_path, 3, (40, 100), STORED, name='b')
    content = json.loads((root / 'annotations/instances_train2017.json').read_text())
    content['images'].append({'id': 2, 'file_name': 'a.png', 'height': 40, 'width': 100})
    (root / 'annotations/instances_train2017.json').write_text(json.dumps(content))
    assert any('b.png' in e and '-p exif stored' in e for e in check_dataset(open_dataset(root, 'train')).errors)
    assert check_dataset(open_dataset(root, 'train', exif='stored')).ok


@pytest.mark.parametrize('open_set', [lambda root, **rule: open_dataset(turned_set(root, 3, (40, 100), STORED), 'train', **rule),
                                      lambda root, **rule: open_panoptic(panoptic(root), **rule)], ids=['boxes', 'panoptic'])
def test_how_photos_are_turned_is_part_of_the_fingerprint(open_set, tmp_path):
    "The same files read another way are other data: a run does not go on with them."
    usual, stored, again = (mark_set(open_set(tmp_path, exif=exif)) for exif in ('sizes', 'stored', 'stored'))
    assert same_data(stored, again) and not same_data(usual, stored) and 'exif stored' in data_changes(usual, stored)[0]


def test_years_of_voc_come_as_they_are_asked_for(tmp_path):
    root = voc(voc(tmp_path), year=2012)
    for year, order in (('07+12', (2007, 2012)), ('2012 + 2007', (2012, 2007)), ('12', (2012,))):
        assert open_dataset(root, 'trainval', year=year).table.files == [f'VOC{y}/JPEGImages/a.jpg' for y in order]


def test_what_rounding_adds_to_a_box_does_not_stick_out(tmp_path):
    "100.1 + 539.9 may be more than 640; a thousandth of a pixel is told"
    def opened(*box): return open_dataset(coco(tmp_path, change('annotations', 1, bbox=box)), 'train')
    assert WIDTH == 640 < 100.1 + 539.9000000000001
    ds = opened(100.1, 40, 539.9000000000001, 300)
    assert ds.clamped == 0 and not check_dataset(ds).warnings and ds[0]['boxes'][1, 2] == 640
    ds = opened(100.1, 40, 539.901, 300)
    assert ds.clamped == 1 and 'stick out of their photos: 1' in check_dataset(ds).warnings[0]


def test_zero_based_voc(tmp_path):
    "A VOC set that counts from 0 gets the hint, and is exact with it."
    box = '<object><name>rocket</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>'
    root = voc(tmp_path, OBJECT + box)
    assert any('one_based=False' in w for w in check_dataset(open_dataset(root, 'trainval')).warnings)
    ds = open_dataset(root, 'trainval', one_based=False)
    assert not check_dataset(ds).warnings and ds[0]['boxes'].tolist()[1] == [0, 0, 9, 9]
    # COCO counts from 0 as it is, and does not ask
    data = content()
    data['annotations'].append(data['annotations'][0] | {'id': 9, 'bbox': [-1, -1, 9, 9]})
    told, = check_dataset(open_dataset(coco(tmp_path / 'coco', data), 'train')).warnings
    assert 'stick out' in told and 'one_based' not in told


def test_boxes_that_begin_and_end_at_one_number_are_counted(tmp_path):
    "VOC counts both ends: such a box is one pixel wide. It is kept, and the check says so; where pixels count from 0 it is empty."
    boxes = [(5, 6, 40, 30), (9, 6, 9, 30), (5, 7, 40, 7)]
    objects = ''.join('<object><name>cat</name><bndbox>' + ''.join(f'<{k}>{v}</{k}>' for k, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), b))
                      + '</bndbox></object>' for b in boxes)
    root = voc(tmp_path, objects)
    ds = open_dataset(root, 'trainval')
    assert len(ds.rows) == 3 and ds.table.boxes[1].tolist() == [8, 5, 1, 25] and ds.category_ids == [1]
    said, = [w for w in check_dataset(ds).warnings if 'xmin = xmax' in w]
    assert ': 2, first in a.xml' in said and 'one pixel' in said
    ds = open_dataset(root, 'trainval', one_based=False)
    assert len(ds.rows) == 1 and not any('xmin = xmax' in w for w in check_dataset(ds).warnings)


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16', 'latin-1'])
def test_entities_in_any_encoding(encoding, tmp_path):
    "The refusal does not depend on how the bytes look."
    bomb = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY b "cc"><!ENTITY d "&b;&b;">]><annotation>&d;</annotation>'
    root = voc(tmp_path)
    (root / 'VOC2007/Annotations/a.xml').write_bytes(bomb.encode(encoding))
    with pytest.raises(ValueError, match='DOCTYPE'): open_dataset(root, 'trainval')


def test_a_table_made_by_hand_needs_no_files():
    "Boxes are judged without photos; only reading and checking photos needs them."
    ds = DetectionSet(coco_table(content(), 'nowhere', 'by hand'))
    assert len(ds) == 2 and ds.coco()['annotations'][1]['category_id'] == 1
    assert any('photos missing: 2' in e for e in check_dataset(ds).errors)


# ---- what people have -----------------------------------------------------------------------------------------------

def test_crowds_that_are_difficult_only(tmp_path):
    "VOC with nothing but difficult objects: an error, and none with the way out."
    root = voc(tmp_path, OBJECT.replace('<bnd', '<difficult>1</difficult><bnd'))
    assert any('1 of 1 are marked difficult' in e for e in check_dataset(open_dataset(root, 'trainval')).errors)
    assert check_dataset(open_dataset(root, 'trainval', difficult='keep')).ok


@pytest.mark.parametrize('ids', [(20230101123456789, 20230101123456790), (2**63 + 5, 2**64), ('0007', '7'), (1.0, 2.5), ('a', 3)])
def test_image_ids_of_any_size_and_type(ids, tmp_path):
    "Photos are numbered anew where pycocotools could not tell them apart; the file's ids are kept beside."
    data = content()
    for photo, i in zip(data['images'], ids): photo['id'] = i
    for a in data['annotations']: a['image_id'] = ids[a['image_id'] - 1]
    ds = open_dataset(coco(tmp_path, data), 'train')
    assert ds.image_ids == [1, 2] and ds.table.file_ids == list(ids) and not ds.table.unknown
    target = DetectionViews(ds, train=False)[0, 1][1]
    evaluator = CocoEvaluator(ds.coco())
    for s in ds: evaluator.update([s['image_id']], [{'scores': torch.ones(len(s['labels'])), 'labels': s['labels'], 'boxes': s['boxes']}])
    assert int(target['image_id']) == 2 and evaluator.summary()['AP'] == pytest.approx(100) and len(QueryPool(ds)) == 3


def test_files_beside_photos(tmp_path):
    "LabelImg's .xml, labelme's .json and YOLO's .txt lie in JPEGImages, too."
    root = voc(tmp_path)
    for suffix in ('xml', 'json', 'txt'): (root / f'VOC2007/JPEGImages/a.{suffix}').write_text('{}')
    ds = open_dataset(root, 'trainval')
    assert ds.table.files == ['VOC2007/JPEGImages/a.jpg'] and check_dataset(ds, decode=True).ok


@pytest.mark.parametrize('line', ['a photo', 'a photo.jpg', '\ufeffa photo', 'a photo  1'])
def test_voc_names_and_splits_as_people_write_them(line, tmp_path):
    root = voc(tmp_path)
    base = root / 'VOC2007'
    for folder, suffix in (('JPEGImages', 'jpg'), ('Annotations', 'xml')):
        (base / folder / f'a.{suffix}').rename(base / folder / f'a photo.{suffix}')
    (base / 'ImageSets/Main/fold1_train.txt').write_text(line + '\n', encoding='utf-8')
    ds = open_dataset(root, 'fold1_train')
    assert ds.table.files == ['VOC2007/JPEGImages/a photo.jpg'] and check_dataset(ds).ok
    with pytest.raises(ValueError, match='fold1_train'): open_dataset(root, 'fold2_train')


@pytest.mark.parametrize('said, real', [('b\\1.jpg', 'b/1.jpg'), ('b%201.jpg', 'b 1.jpg'), ('b%2F1.jpg', 'b/1.jpg')])
@pytest.mark.parametrize('where', [None, 'train2017'])
def test_names_of_other_systems(said, real, where, tmp_path):
    root = coco(tmp_path, change('images', 0, file_name=said))
    (root / 'train2017' / real).parent.mkdir(exist_ok=True)
    (root / 'train2017/1.jpg').rename(root / 'train2017' / real)
    (root / 'train2017/2.jpg').unlink()
    ds = open_dataset(root, 'train', images=where and root / where, missing='skip')
    assert ds.table.files == [real] and len(ds.rows) == 2 and len(ds.table.notes) == 2
    assert check_dataset(ds).ok


def test_photos_away_from_their_file(tmp_path):
    "The folder that is given may be the photos' own or the one above."
    root = _moved(coco(tmp_path / 'set'))
    (root / 'elsewhere').rename(tmp_path / 'train2017')
    for images in (tmp_path, tmp_path / 'train2017'): assert check_dataset(open_dataset(root, 'train', images=images)).ok
    voc_root = voc(tmp_path / 'voc')
    (voc_root / 'VOC2007/JPEGImages').rename(tmp_path / 'jpegs')
    assert check_dataset(open_dataset(voc_root, 'trainval', images=tmp_path / 'jpegs')).ok


def test_the_folder_with_most_photos_wins_and_missing_ones_can_be_left_out(tmp_path):
    "The first, the middle and the last name are the very ones that are missing."
    data = content()
    data['images'] = [{'id': k, 'file_name': f'{k}.jpg', 'height': HEIGHT, 'width': WIDTH} for k in range(1, 12)]
    root = coco(tmp_path, data)
    (root / 'train2017/1.jpg').rename(root / 'train2017/4.jpg')
    ds = open_dataset(root, 'train')
    assert any('photos missing: 9, first 1.jpg' in e and 'missing skip' in e for e in check_dataset(ds).errors)
    ds = open_dataset(root, 'train', missing='skip')
    assert ds.table.files == ['2.jpg', '4.jpg'] and len(ds) == 2 and len(ds.rows) == 1 and not ds.table.unknown
    report = check_dataset(ds, decode=True)
    assert report.ok and any('missing and left out: 9 of 11, first 1.jpg' in n for n in report.warnings)


def run_config(root, **values):
    "A small run on a set"
    return finetune_config('demo', **dict(cached_views=0, square=0, num_queries=3, batch_size=1, epochs=1, data=str(root)) | values)


def begin(cfg, folder):
    "A run that begins: what it does before any time is spent"
    folder.mkdir()
    return FinetuneTask(cfg, folder, join_processes())


def both_parts(root, data=None, **place):
    "A COCO folder with photos to train on and to evaluate on"
    coco(root, data)
    for name in ('train2017', 'annotations/instances_train2017.json'): (root / name).rename(root / name.replace('train', 'val'))
    return coco(root, data)


@pytest.mark.parametrize('data, words', [
    ({'iscrowd': 1}, ['3 of 3 are marked iscrowd=1']), ({'difficult': 1}, ['3 of 3 are marked difficult', '-p difficult keep']),
    (None, ['photos missing: 1, first 2.jpg', '-p missing skip', '-p images FOLDER'])])
def test_a_run_refuses_what_teaches_nothing(data, words, tmp_path):
    "Also one that no notebook has checked; before a network is built."
    root = both_parts(tmp_path / 'set', data and content() | {'annotations': [a | data for a in content()['annotations']]})
    if data is None: (root / 'train2017/2.jpg').unlink()
    with pytest.raises(ValueError) as e: begin(run_config(root), tmp_path / 'run')
    assert not [w for w in words if w not in str(e.value)], e.value


def test_a_run_says_what_its_set_is(tmp_path, capsys):
    "Objects beyond the number of queries, with both numbers; what was left out; and it begins."
    root = both_parts(tmp_path / 'set', _add(bbox=[5, 5, 0, 9]))
    begin(run_config(root, num_queries=1), tmp_path / 'run')
    said = capsys.readouterr().out
    assert 'more objects than the model has queries (1): 1, with up to 2 objects' in said and 'left out, empty: 1' in said
    begin(run_config(root, num_queries=2), tmp_path / 'other')
    assert 'queries' not in capsys.readouterr().out


def test_photos_in_folders_of_their_own_in_a_run(tmp_path):
    "The configuration knows `images` and `images_val`; one folder above both will do."
    root = both_parts(tmp_path / 'set')
    (tmp_path / 'photos').mkdir()
    for part in ('train2017', 'val2017'): (root / part).rename(tmp_path / 'photos' / part)
    with pytest.raises(FileNotFoundError, match='-p images FOLDER'): open_sets(run_config(root))
    photos = tmp_path / 'photos'
    for places in ({'images': str(photos)}, {'images': str(photos / 'train2017'), 'images_val': str(photos / 'val2017')}):
        train, val = open_sets(run_config(root, **places))
        assert (train.table.root, val.table.root) == (str(photos / 'train2017'), str(photos / 'val2017'))


def test_one_file_is_divided(tmp_path):
    "The same photos for every run's seed, none in both parts, none lost; said at the run's start."
    data = content()
    data['images'] = [{'id': k, 'file_name': f'{1 + k % 2}.jpg', 'height': HEIGHT, 'width': WIDTH} for k in range(1, 11)]
    file = coco(tmp_path, data) / 'annotations/instances_train2017.json'
    parts = [open_sets(run_config(file, seed=s)) for s in (1, 2)]
    ids = [[sorted(ds.image_ids) for ds in pair] for pair in parts]
    assert ids[0] == ids[1] and sorted(ids[0][0] + ids[0][1]) == list(range(1, 11)) and len(ids[0][1]) == 2
    assert '2 of its 10 are drawn' in start_notes(*parts[0], 9)[0] and len(open_sets(run_config(file, val_share=.5))[1]) == 5
    with pytest.raises(ValueError, match='val_share'): run_config(file, val_share=1.)


def test_older_runs_go_on_with_the_fields_that_came_later(tmp_path):
    cfg = dataclasses.asdict(run_config(tmp_path))
    old = {k: v for k, v in cfg.items() if k not in LATER}
    assert not cfg_changes(old, cfg) and list(cfg_changes(old, cfg | {'images': 'x'})) == ['images'] and 'val_share' in LATER
    assert {k: cfg[k] for k in LATER if k in cfg} == {k: v for k, v in LATER.items() if k in cfg}


# ---- panoptic -------------------------------------------------------------------------------------------------------

def panoptic(root, data=None, instances=None):
    "A panoptic folder of one photo: a thing above, stuff below"
    data, key = data or panoptic_content(), 7
    for part in ('annotations/panoptic_train2017', 'train2017'): (root / part).mkdir(parents=True, exist_ok=True)
    ids = torch.ones(3, 8, 10, dtype=torch.uint8) * torch.tensor([1, 0, 0], dtype=torch.uint8)[:, None, None]
    ids[0, 4:] = 2
    write_png(ids, str(root / 'annotations/panoptic_train2017/a.png'))
    write_png(ids * 100, str(root / 'train2017/a.png'))
    (root / 'annotations/panoptic_train2017.json').write_text(json.dumps(data))
    segmentation = rle.encode(np.asfortranarray((ids[0] == 1).numpy(), np.uint8))
    outline = {'size': [8, 10], 'counts': segmentation['counts'].decode()}
    thing = {'id': 1, 'image_id': key, 'category_id': 1, 'bbox': [0, 0, 10, 4], 'area': 40, 'iscrowd': 0, 'segmentation': outline}
    rows = [thing | (instances or {})]
    (root / 'instances.json').write_text(json.dumps({'images': data['images'], 'annotations': rows, 'categories': data['categories']}))
    return root


def panoptic_content(key=7):
    segments = [{'id': 1, 'category_id': 1, 'bbox': [0, 0, 10, 4], 'area': 40, 'iscrowd': 0},
                {'id': 2, 'category_id': 5, 'bbox': [0, 4, 10, 4], 'area': 40}]
    return {'images': [{'id': key, 'file_name': 'a.png', 'height': 8, 'width': 10}],
            'categories': [{'id': 1, 'name': 'cat', 'isthing': 1}, {'id': 5, 'name': 'sky', 'isthing': 0}],
            'annotations': [{'image_id': key, 'file_name': 'a.png', 'segments_info': segments}]}


@pytest.mark.parametrize('key', [7, '0007', 2**63 + 1, 2.5])
def test_panoptic_ids_are_as_in_detection(key, tmp_path):
    ds = open_panoptic(panoptic(tmp_path, panoptic_content(key)))
    target = DetectionViews(ds, train=False)[0, 0][1]
    assert ds.file_ids == [key] and int(target['image_id']) == ds.image_ids[0] == (7 if key == 7 else 1) and len(target['boxes']) == 2


def _panoptic_change(**values):
    "The panoptic content with values exchanged in segment 0, in category 0 or in the photo"
    data = panoptic_content()
    for key, v in values.items():
        entry = data['categories'][0] if key in ('name', 'isthing') else data['images'][0] if key in ('height', 'width') else (
            data['annotations'][0]['segments_info'][0])
        entry[key] = v
    return data


@pytest.mark.parametrize('values, words', [
    ({'isthing': 'yes'}, ["categories[0] (id 1) has isthing 'yes', a text", '0 or 1']), ({'isthing': None}, ['isthing None, nothing']),
    ({'name': ['cat']}, ["name ['cat'], a list"]), ({'area': None}, ['segments of photo 7[0] (id 1) has area None']),
    ({'area': 'big'}, ["area 'big', a text"]), ({'iscrowd': 'no'}, ["iscrowd 'no', a text"]),
    ({'bbox': [1, 2, 3]}, ['bbox [1, 2, 3], a list']),
    ({'bbox': [1, 2, 3, float('nan')]}, ['bbox [1, 2, 3, nan]']),
    ({'bbox': ['0', '0', '9', '9']}, ['four finite numbers']),
    ({'id': '1'}, ["id '1', a text", '1..16777215']),
    ({'id': 2**24}, ['id 16777216']), ({'height': '8'}, ["height '8', a text", 'pixels']),
    ({'category_id': [1]}, ['category_id [1], a list']), ({'width': 0}, ['width 0'])])
def test_panoptic_values_of_a_wrong_kind(values, words, tmp_path):
    root = panoptic(tmp_path, _panoptic_change(**values))
    with pytest.raises(ValueError) as e: open_panoptic(root)
    assert not [w for w in ['panoptic_train2017.json', *words] if w not in str(e.value)], e.value


def test_panoptic_segments_without_a_box_are_true_but_no_targets(tmp_path):
    "The picture has their pixels, so PQ and pycocotools judge by them; no query is taught an empty box."
    ds = open_panoptic(panoptic(tmp_path, _panoptic_change(bbox=[0, 0, 10, 0])))
    assert len(ds.segments(0)) == 2 and len(ds[0]['boxes']) == len(ds[0]['masks']) == 1 and ds[0]['labels'].tolist() == [1]
    assert [a['bbox'] for a in coco_truth(ds)['annotations']] == [[0, 0, 10, 0], [0, 4, 10, 4]]


@pytest.mark.parametrize('outline, words', [
    ({'counts': 'x'}, ['size None']), ({'size': '8x10', 'counts': 'x'}, ["size '8x10'"]),
    ({'size': [10, 8], 'counts': 'x'}, ['[10, 8] px']),
    ({'size': [8, 10], 'counts': [1] * 10**6}, ['more runs']), ({'size': [8, 10], 'counts': 'o'}, ['stops in the middle']),
    ({'size': [8, 10], 'counts': [80, 80]}, ['covers 160 pixels']), ([[0, 0, 10**9, 0, 5, 5]], ['far outside']), (None, ['is None']),
    ([[0, 0]], ['polygon'])])
def test_outlines_that_would_hang_or_crash(outline, words, tmp_path):
    ds, begun = open_panoptic(panoptic(tmp_path, instances={'segmentation': outline})), time.perf_counter()
    with pytest.raises(ValueError) as e: instance_truth(ds, tmp_path / 'instances.json')
    assert not [w for w in ['instances.json', 'annotation 1', *words] if w not in str(e.value)], e.value
    assert time.perf_counter() - begun < 5


# ---- any value in any place -----------------------------------------------------------------------------------------

MANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from([0, -1, 2**31, 2**53, 2**63, 2**70, 10**400, 1e308, -1e-300]),
                    st.floats(), st.text(max_size=8), st.sampled_from(['1', 'nan', '../x', '\0', '\ud800', '<b>', '%2e%2e/a', 'a' * 300]))
KEYS = st.sampled_from(['id', 'size', 'counts', 'x'])
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6)
GONE = object()


def places(data, path=()):
    "All places in nested lists and dictionaries"
    yield path
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for k, v in inner: yield from places(v, (*path, k))


def exchanged(data, path, value):
    "The data with one value exchanged or gone"
    if not path: return value
    data = deepcopy(data)
    inner = data
    for k in path[:-1]: inner = inner[k]
    if value is GONE: del inner[path[-1]]
    else: inner[path[-1]] = value
    return data


def named_or_fine(act):
    "Either it works, or one of the kit's own errors says in words what is wrong; never anything from the depths"
    try: return act()
    except (ValueError, FileNotFoundError, BadPhoto) as e:
        assert len(str(e)) > 20 and not isinstance(e, UnicodeError), repr(e)
        at = e.__traceback__
        while at.tb_next: at = at.tb_next
        assert '/updetr/' in at.tb_frame.f_code.co_filename, f'from the depths: {e!r}'
        return None


def use(ds):
    "Everything that is done with an opened set"
    report = check_dataset(ds)
    str(report), repr(ds), json.dumps(ds.coco())
    assert len(ds.table.ids) == len(ds.rows) + sum(ds.left_out.values())
    truth, evaluator = ds.coco(), CocoEvaluator(ds.coco())
    for i in ds.image_ids: evaluator.update([i], [{'scores': [1.], 'labels': [0], 'boxes': [[0, 0, 9, 9]]}])
    evaluator.summary(), QueryPool(ds)
    for i in range(len(ds)): named_or_fine(lambda i=i: DetectionViews(ds, sizes=SMALL_SIZES, train=False)[0, i])
    assert all(np.isfinite(a['bbox']).all() for a in truth['annotations'])
    return report


@MANY
@given(data=st.data())
def test_any_value_anywhere_in_a_coco_file(data, tmp_path):
    whole = content()
    for a in whole['annotations']: a |= {'area': 100., 'iscrowd': 0, 'difficult': 0}
    for c in whole['categories']: c['supercategory'] = 'thing'
    path = data.draw(st.sampled_from(list(places(whole))[1:]))
    value = data.draw(ANYTHING | st.just(GONE))
    root = coco(tmp_path, text=json.dumps(exchanged(whole, path, value)))
    ds = named_or_fine(lambda: open_dataset(root, 'train'))
    if ds is None: return
    report = use(ds)
    boxes = path[0] == 'annotations' and path[-1] not in ('area', 'iscrowd', 'difficult', 'id') and len(path) > 2
    if boxes and not report.errors: assert len(ds.rows) == 3 or report.warnings, f'{path} = {value!r} lost a box in silence'


XML = [('xmin', '300'), ('ymin', '40'), ('xmax', '340'), ('ymax', '340'), ('name', 'rocket'), ('difficult', '0'), ('width', str(WIDTH)),
       ('height', str(HEIGHT))]


@MANY
@given(which=st.sampled_from([k for k, _ in XML]), text=st.text(max_size=8) | st.sampled_from(['1_0', '1e400', 'nan', '-5', '<a/>', '&x;']))
def test_any_text_anywhere_in_a_voc_file(which, text, tmp_path):
    parts = {k: text if k == which else v for k, v in XML}
    box = ''.join(f'<{k}>{parts[k]}</{k}>' for k in ('xmin', 'ymin', 'xmax', 'ymax'))
    xml = (f'<annotation><size><width>{parts["width"]}</width><height>{parts["height"]}</height></size>'
           f'<object><name>{parts["name"]}</name>'
           f'<difficult>{parts["difficult"]}</difficult><bndbox>{box}</bndbox></object></annotation>')
    root = voc(tmp_path)
    (root / 'VOC2007/Annotations/a.xml').write_text(xml, encoding='utf-8', errors='replace')
    ds = named_or_fine(lambda: open_dataset(root, 'trainval'))
    if ds is not None:
        report = use(ds)
        assert len(ds.rows) == 1 or report.errors


@MANY
@given(data=st.data())
def test_any_value_anywhere_in_a_panoptic_file(data, tmp_path):
    whole = panoptic_content()
    path = data.draw(st.sampled_from(list(places(whole))[1:]))
    root = panoptic(tmp_path)
    (root / 'annotations/panoptic_train2017.json').write_text(json.dumps(exchanged(whole, path, data.draw(ANYTHING | st.just(GONE)))))
    def act():
        ds = open_panoptic(root)
        coco_truth(ds), coco_truth(ds, masks=True), repr(ds)
        return [DetectionViews(ds, train=False)[0, i] for i in range(len(ds))]
    named_or_fine(act)


@MANY
@given(data=st.data())
def test_any_outline_is_taken_or_named(data, tmp_path):
    "Whatever is not refused can be given to pycocotools."
    root = panoptic(tmp_path)
    ds, whole = open_panoptic(root), json.loads((root / 'instances.json').read_text())
    path = data.draw(st.sampled_from([p for p in places(whole) if p[:1] == ('annotations',) and len(p) > 1]))
    runs = st.text(st.characters(max_codepoint=130), max_size=9)
    value = ANYTHING | st.just(GONE) | st.fixed_dictionaries({'size': st.just([8, 10]), 'counts': runs})
    (root / 'instances.json').write_text(json.dumps(exchanged(whole, path, data.draw(value))))
    truth = named_or_fine(lambda: instance_truth(ds, root / 'instances.json'))
    if truth is None: return
    mask = {'scores': np.ones(1), 'labels': np.zeros(1), 'boxes': np.zeros((1, 4)), 'masks': np.ones((1, 8, 10))}
    CocoEvaluator(truth, 'segm').update(ds.image_ids, [mask]).summary()
