"The same five photos and boxes, written in every layout that people have, are the same set; what is malformed is named."
import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import ROOT
from tools.cells import run_cells
from updetr.core.config import make_config
from updetr.core.fingerprint import mark_set, same_data
from updetr.core.photos import index_photos, walk_files
from updetr.data import datasets, photo_files
from updetr.data.annotations import labelme_objects
from updetr.data.check import check_dataset, suggest
from updetr.data.datasets import dataset_parts, open_dataset
from updetr.predict.commands import evaluate
from updetr.predict.detector import Detector
from updetr.tasks.cnn_task import CNN_PRESETS, CNNConfig
from updetr.tasks.finetune import draw_evenly, finetune_config, open_sets, train_views
from updetr.tasks.finetune_task import TASK
from updetr.tasks.oneshot import oneshot_config
from updetr.tasks.panoptic_task import panoptic_config
from updetr.train.features import set_key
from updetr.train.loop import Processes, train

# what was drawn: photo -> its size (width, height) and its objects, by the photo's edges in pixels from 0
PHOTOS = {'a': ((64, 48), [('cat', 8, 6, 40, 30), ('dog', 0, 0, 16, 48)]), 'b': ((48, 64), [('dog', 12, 16, 36, 48)]),
          'c d': ((64, 64), [('cat', 4, 4, 60, 60), ('cat', 16, 32, 24, 40), ('cow', 32, 8, 64, 16)]),
          'e.f': ((80, 60), [('cow', 20, 15, 60, 45)]), 'g': ((64, 48), [])}
CLASSES = ['cat', 'cow', 'dog']
TRAIN, VAL = ['a', 'c d', 'g'], ['b', 'e.f']


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    for name, (size, _) in PHOTOS.items():
        noise = np.random.default_rng(len(name)).integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(noise).save(folder / f'{name}.jpg')
    return folder


def photos(pictures, folder, names=PHOTOS):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names: shutil.copy(pictures / f'{name}.jpg', folder)


def texts(folder, suffix, make, names=PHOTOS):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names: (folder / f'{name}{suffix}').write_text(make(name))


def xml(name):
    (width, height), objects = PHOTOS[name]
    things = ''.join(f'<object><name>{k}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>'
                     '</bndbox></object>' for k, x1, y1, x2, y2 in objects)
    return f'<annotation><size><width>{width}</width><height>{height}</height></size>{things}</annotation>'


def yolo(name, outline=False):
    (w, h), objects = PHOTOS[name]
    rows = []
    for k, x1, y1, x2, y2 in objects:
        box = [(x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h]
        corners = [x1 / w, y1 / h, x2 / w, y1 / h, x2 / w, y2 / h, x1 / w, y2 / h]
        rows.append(' '.join([str(CLASSES.index(k)), *(f'{v:.6f}' for v in (corners if outline else box))]))
    return '\n'.join(rows)


def labelme(name):
    (width, height), objects = PHOTOS[name]
    shapes = [{'label': k, 'shape_type': 'rectangle', 'points': [[x2, y1], [x1, y2]], 'group_id': None} if i % 2 else
              {'label': k, 'shape_type': 'polygon', 'points': [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]}
              for i, (k, x1, y1, x2, y2) in enumerate(objects)]
    return json.dumps({'version': '5', 'shapes': shapes, 'imagePath': f'..\\x\\{name}.jpg', 'imageHeight': height, 'imageWidth': width})


def coco(names=PHOTOS, prefix=''):
    images = [{'id': i, 'file_name': f'{prefix}{n}.jpg', 'width': PHOTOS[n][0][0], 'height': PHOTOS[n][0][1]} for i, n in enumerate(names)]
    boxes = [{'image_id': i, 'category_id': CLASSES.index(k) + 1, 'bbox': [x1, y1, x2 - x1, y2 - y1]}
             for i, n in enumerate(names) for k, x1, y1, x2, y2 in PHOTOS[n][1]]
    return json.dumps({'images': images, 'annotations': [b | {'id': i} for i, b in enumerate(boxes)],
                       'categories': [{'id': i, 'name': k} for i, k in enumerate(CLASSES, 1)]})


def table(file, heads, row, names=PHOTOS, empty=True, **form):
    "A CSV of boxes; a photo without objects has a row with nothing but its name"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, 'w', newline='') as f:
        out = csv.writer(f, **form)
        if heads: out.writerow(heads)
        for name in names:
            objects = PHOTOS[name][1]
            for thing in objects: out.writerow(row(name, *thing))
            if not objects and empty: out.writerow([value if value == row(name, 'x', 1, 2, 3, 4)[place] and name in str(value) else ''
                                                    for place, value in enumerate(row(name, 'z', 5, 6, 7, 8))])


def retinanet(name, k, x1, y1, x2, y2): return [f'/content/data/{name}.jpg', x1, y1, x2, y2, k]
def tensorflow(name, k, x1, y1, x2, y2): return [f'{name}.jpg', *PHOTOS[name][0], k, x1, y1, x2, y2]
def with_sides(name, k, x1, y1, x2, y2): return [k, x1, y1, x2 - x1, y2 - y1, f'{name}.jpg']


TENSORFLOW = 'filename width height class xmin ymin xmax ymax'.split()
YAML = 'names: [cat, cow, dog]\nnc: 3\n'


# ---- sets without parts: (folder of pictures, empty folder) -> (what is opened, images) ------------------------------

def _pair(where, labels, suffix, make, **files):
    "A layout of a label file for each photo: photos in one folder, labels in the same or another"
    def write(p, f):
        photos(p, f / where)
        texts(f / labels, suffix, make)
        for name, text in files.items(): (f / f'{name}.{"labels" if name[0] == "_" else "txt"}').write_text(text)
    return write


_xml_beside = _pair('', '', '.xml', xml)
_xml_apart = _pair('pictures', 'Annotations', '.xml', xml)
_yolo_classes = _pair('images', 'labels', '.txt', yolo, classes='cat\ncow\ndog\n')
_yolo_beside = _pair('', '', '.txt', yolo, _darknet='cat\ncow\ndog')
_labelme_beside = _pair('', '', '.json', labelme)
_labelme_apart = _pair('images', 'annotations', '.json', labelme)


def _xml_images(p, f):
    _pair('photos', 'set', '.xml', xml)(p, f)
    return f / 'set', f / 'photos'


def _json_alone(p, f):
    photos(p, f)
    (f / '_annotations.coco.json').write_text(coco())


def _json_in_folder(p, f):
    photos(p, f / 'my/pictures')
    (f / 'all.json').write_text(coco())


def _yolo_outlines(p, f):
    photos(p, f / 'images')
    # no file is no object, as an empty one
    texts(f / 'labels', '.txt', lambda n: yolo(n, True), [n for n in PHOTOS if n != 'g'])
    (f / 'data.yaml').write_text('names:\n  0: cat\n  1: cow\n  2: dog\n')


def _yolo_label_studio(p, f):
    _yolo_classes(p, f)
    notes = {'categories': [{'id': k, 'name': name} for k, name in enumerate(CLASSES)], 'info': {'contributor': 'Label Studio'}}
    (f / 'notes.json').write_text(json.dumps(notes, indent=2))


def _yolo_cvat(p, f):
    # one list, `train`, for all photos: no part is evaluated on
    photos(p, f / 'obj_train_data')
    texts(f / 'obj_train_data', '.txt', yolo)
    texts(f, '.txt', lambda _: '\n'.join(f'data/obj_train_data/{n}.jpg' for n in PHOTOS), ['train'])
    (f / 'obj.names').write_text('cat\ncow\ndog\n')


def _csv_tensorflow(p, f):
    photos(p, f / 'images')
    table(f / 'labels.csv', TENSORFLOW, tensorflow)


def _csv_sides(p, f):
    photos(p, f)
    table(f / 'a.csv', 'label_name bbox_x bbox_y bbox_width bbox_height image_name'.split(), with_sides)


def _csv_retinanet(p, f):
    photos(p, f / 'images')
    table(f / 'annotations.csv', None, retinanet)
    (f / 'classes.csv').write_text('cat,0\ncow,1\ndog,2\n')


def _csv_file(p, f):
    photos(p, f / 'photos')
    table(f / 'x/boxes.csv', 'Image;X;Y;Width;Height;Class'.split(';'), lambda n, k, a, b, c, d: [f'{n}.jpg', a, b, c - a, d - b, k],
          delimiter=';')
    return f / 'x/boxes.csv', f / 'photos'


WHOLE = {n: v for n, v in list(globals().items()) if re.match(r'_(xml|json|yolo|labelme|csv)_', n)}


# ---- sets with parts -------------------------------------------------------------------------------------------------

def _each(make):
    "A set of which each part is made alike"
    def both(p, f):
        for part, names in (('train', TRAIN), ('val', VAL)): make(p, f, part, names)
        return f
    return both


def voc_lists(p, f, part, names):
    photos(p, f / 'VOC2007/JPEGImages', names)
    texts(f / 'VOC2007/Annotations', '.xml', xml, names)
    texts(f / 'VOC2007/ImageSets/Main', '.txt', lambda _: '\n'.join(names), [part])


def coco_usual(p, f, part, names):
    photos(p, f / f'{part}2017', names)
    texts(f / 'annotations', '.json', lambda _: coco(names), [f'instances_{part}2017'])


def coco_named(p, f, part, names):
    photos(p, f / 'images', names)
    texts(f, '.json', lambda _: coco(names), [f'my_{part}_labels'])


def coco_below(p, f, part, names):
    photos(p, f / 'archive/set/data', names)
    texts(f / 'archive/set', '.json', lambda _: coco(names, 'data/'), [part])


def roboflow(p, f, part, names):
    part = part.replace('val', 'valid')
    photos(p, f / 'export' / part, names)
    texts(f / 'export' / part, '.json', lambda _: coco(names), ['_annotations.coco'])


def cvat_coco(p, f, part, names):
    part = {'train': 'Train', 'val': 'Validation'}[part]
    photos(p, f / 'images' / part, names)
    texts(f / 'annotations', '.json', lambda _: coco(names), [f'instances_{part}'])


def cvat_voc(p, f, part, names):
    photos(p, f / 'JPEGImages', names)
    texts(f / 'Annotations', '.xml', xml, names)
    texts(f / 'ImageSets/Main', '.txt', lambda _: '\n'.join(names), [{'train': 'Train', 'val': 'Validation'}[part]])


def roboflow_folders(p, f, part, names):
    part = {'train': 'Train', 'val': 'Validation'}[part]
    photos(p, f / part, names)
    texts(f / part, '.json', lambda _: coco(names), ['_annotations.coco'])


def roboflow_voc(p, f, part, names):
    part = part.replace('val', 'valid')
    photos(p, f / part, names)
    texts(f / part, '.xml', xml, names)


def roboflow_csv(p, f, part, names):
    photos(p, f / part, names)
    table(f / part / '_annotations.csv', TENSORFLOW, tensorflow, names)


def xml_in_one_folder(p, f, part, names):
    photos(p, f / 'images' / part, names)
    texts(f / 'xmls', '.xml', xml, names)


def ultralytics(p, f, part, names):
    photos(p, f / 'images' / part, names)
    texts(f / 'labels' / part, '.txt', yolo, names)
    (f / 'data.yaml').write_text(YAML + 'path: ../datasets/mine\ntrain: images/train\nval: images/val\n')


def roboflow_yolo(p, f, part, names):
    folder = part.replace('val', 'valid')
    photos(p, f / 'zip' / folder / 'images', names)
    texts(f / 'zip' / folder / 'labels', '.txt', yolo, names)
    (f / 'zip/data.yaml').write_text('train: ../train/images\nval: ../valid/images\n' + YAML)


def yolo_any_names(p, f, part, names):
    place = {'train': 'monday', 'val': 'tuesday'}[part]
    photos(p, f / place / 'images', names)
    texts(f / place / 'labels', '.txt', yolo, names)
    (f / 'set.yaml').write_text(YAML + 'train: [/content/drive/set/monday/images]\nval: tuesday/images\n')


def yolo_lists(p, f, part, names):
    photos(p, f / 'images', names)
    texts(f / 'labels', '.txt', yolo, names)
    texts(f, '.txt', lambda _: '\n'.join(f'./images/{n}.jpg' for n in names), [part])
    (f / 'data.yaml').write_text(YAML + 'train: train.txt\nval: val.txt\n')


def yolo_lists_below(p, f, part, names):
    "Lists and photos lie below the yaml's `path`"
    photos(p, f / 'set/images', names)
    texts(f / 'set/labels', '.txt', yolo, names)
    texts(f / 'set/lists', '.txt', lambda _: '\n'.join(f'../images/{n}.jpg' for n in names[:1]), [f'{part}1'])
    texts(f / 'set', '.txt', lambda _: '\n'.join(f'./images/{n}.jpg' for n in names[1:]), [part])
    lists = [f'{k}: [{k}.txt, lists/{k}1.txt]\n' for k in ('train', 'val')]
    (f / 'data.yaml').write_text(YAML + 'path: set\n' + ''.join(lists))


def cvat_ultralytics(p, f, part, names):
    folder = {'train': 'monday', 'val': 'tuesday'}[part]
    photos(p, f / 'images' / folder, names)
    texts(f / 'labels' / folder, '.txt', yolo, names)
    texts(f, '.txt', lambda _: '\n'.join(f'data/images/{folder}/{n}.jpg' for n in names), [part])
    (f / 'data.yaml').write_text(YAML + 'path: .\ntrain: train.txt\nval: val.txt\n')


def darknet(p, f, part, names):
    photos(p, f / 'obj', names)
    texts(f / 'obj', '.txt', yolo, names)
    texts(f, '.txt', lambda _: '\n'.join(f'data/obj/{n}.jpg' for n in names), [part.replace('val', 'valid')])
    (f / 'obj.names').write_text('cat\ncow\ndog\n')
    (f / 'obj.data').write_text('classes = 3\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n')


def cvat_yolo(p, f, part, names):
    part = {'train': 'Train', 'val': 'Validation'}[part]
    photos(p, f / f'obj_{part}_data', names)
    texts(f / f'obj_{part}_data', '.txt', yolo, names)
    texts(f, '.txt', lambda _: '\n'.join(f'data/obj_{part}_data/{n}.jpg' for n in names), [part])
    (f / 'obj.names').write_text('cat\ncow\ndog\n')


def labelme_parts(p, f, part, names):
    photos(p, f / part, names)
    texts(f / part, '.json', labelme, names)


def csv_parts(p, f, part, names):
    photos(p, f / 'images', names)
    table(f / f'{part}_labels.csv', TENSORFLOW, tensorflow, names)


PARTED = {make.__name__: _each(make) for make in (
    voc_lists, coco_usual, coco_named, coco_below, roboflow, cvat_coco, cvat_voc, roboflow_folders, roboflow_voc, roboflow_csv,
    xml_in_one_folder, ultralytics, roboflow_yolo, yolo_any_names, yolo_lists,
    yolo_lists_below, cvat_ultralytics, darknet, cvat_yolo, labelme_parts, csv_parts)}


def content(ds):
    "{photo: its size and objects}, as `PHOTOS`"
    found = {}
    for i, file in enumerate(ds.table.files):
        sample = ds[i]  # the photo has the stated size
        rows = zip(sample['labels'].tolist(), sample['boxes'].tolist())
        found[Path(file).stem] = tuple(sample['image'].shape[:0:-1]), [(ds.classes[k], *box) for k, box in rows]
    return found


def agree(ds, names):
    found = content(ds)
    assert sorted(found) == sorted(names) and ds.classes == CLASSES and not sum(ds.left_out.values())
    for name, (size, objects) in found.items():
        wanted_size, wanted = PHOTOS[name]
        assert size == wanted_size and [k for k, *_ in objects] == [k for k, *_ in wanted]
        assert np.allclose([o[1:] for o in objects], [o[1:] for o in wanted], atol=.001), name
    report = check_dataset(ds, decode=True)
    assert report.ok and report.warnings == ds.table.notes, report


@pytest.mark.parametrize('layout', WHOLE)
def test_sets_without_parts(layout, pictures, tmp_path):
    path, images = WHOLE[layout](pictures, tmp_path) or (tmp_path, None)
    ds = open_dataset(path, images=images)
    agree(ds, PHOTOS)
    assert dataset_parts(path, images) == []
    # a run divides it: the same two photos for all, and says so
    cfg = finetune_config('demo', data=str(path), images=images and str(images), val_share=.4)
    train, val = open_sets(cfg)
    assert (len(train), len(val)) == (3, 2) and not set(train.image_ids) & set(val.image_ids) and 'seed 0' in train.note
    again = open_sets(finetune_config('demo', data=str(path), images=images and str(images), val_share=.4, seed=7))
    assert val.image_ids == again[1].image_ids
    # and a folder does not take all photos for a part
    if path.is_dir():
        with pytest.raises(ValueError, match="has no parts, so no 'val'"): open_dataset(path, 'val', images=images)


@pytest.mark.parametrize('layout', PARTED)
def test_sets_with_parts(layout, pictures, tmp_path):
    path = PARTED[layout](pictures, tmp_path)
    agree(open_dataset(path, 'train'), TRAIN)
    for name in ('val', 'valid', 'Validation'):
        ds = open_dataset(path, name)
        assert content(ds).keys() == set(VAL) and ds.classes == CLASSES
        assert 'part' not in ds.table.layout or 'val' in repr(ds).lower()
    assert sorted(dataset_parts(path))[0].lower() == 'train' and len(dataset_parts(path)) == 2
    for wrong in ('test', None):
        with pytest.raises(ValueError, match=f'no split {wrong!r}.*[tT]rain'): open_dataset(path, wrong)
    train, val = open_sets(finetune_config('demo', data=str(path)))
    assert len(train) == 3 and len(val) == 2 and train.classes == val.classes == CLASSES


@pytest.mark.parametrize('layout, reader, place, times', [
    ('ultralytics', 'yolo_objects', 0, 3), ('csv_parts', 'csv_objects', 0, 2), ('voc_lists', 'voc_objects', 1, 5)])
def test_each_label_file_is_read_once(layout, reader, place, times, pictures, tmp_path, monkeypatch):
    "Of the other part only where it may tell a class; a data.yaml has told them all"
    path, read, real = PARTED[layout](pictures, tmp_path), [], getattr(datasets, reader)
    def counted(*args):
        read.append(str(args[place]))
        return real(*args)
    for module in (datasets, photo_files):
        if hasattr(module, reader): monkeypatch.setattr(module, reader, counted)
    agree(open_dataset(path, 'train'), TRAIN)
    assert len(read) == len(set(read)) == times


def test_one_part_alone_is_divided_too(pictures, tmp_path):
    "Only train.json, as downloaded; and CVAT's only list, `default`, which tells nothing."
    coco_named(pictures, tmp_path / 'a', 'train', list(PHOTOS))
    (tmp_path / 'b').mkdir()
    voc_lists(pictures, tmp_path / 'b', 'default', list(PHOTOS))
    for folder in ('a', 'b'):
        train, val = open_sets(finetune_config('demo', data=str(tmp_path / folder)))
        assert (len(train), len(val)) == (4, 1) and '1 of its 5 are drawn' in train.note
    assert dataset_parts(tmp_path / 'a') == ['train'] and dataset_parts(tmp_path / 'b') == []
    with pytest.raises(ValueError, match="no split 'val'"): open_dataset(tmp_path / 'a', 'val')


@pytest.mark.parametrize('folder', ['', 'images/'])
def test_a_table_may_name_photos_by_ids(folder, pictures, tmp_path):
    "As Open Images does: photos of these names are looked up in the folder of the table's part, and that is said"
    for part, names in (('train', TRAIN), ('val', VAL)):
        photos(pictures, tmp_path / part, names)
        table(tmp_path / f'{part}.csv', ['ImageID', 'LabelName', 'XMin', 'YMin', 'XMax', 'YMax'],
              lambda name, k, *box: [f'{folder}{name}', k, *box], names)
        ds = open_dataset(tmp_path, part)
        assert content(ds).keys() == set(names) and ds.classes == CLASSES and check_dataset(ds, decode=True).ok
        assert 'without a suffix' in ds.table.notes[0] and ds.table.root.endswith(part)


def test_photos_in_no_list_are_counted(pictures, tmp_path):
    "Also where the photos lie elsewhere, as in a set that CVAT exports without them"
    PARTED['darknet'](pictures, tmp_path / 'set')
    text(tmp_path / 'set/valid.txt', 'data/obj/b.jpg')
    assert content(open_dataset(tmp_path / 'set', 'val')).keys() == {'b'}
    assert open_dataset(tmp_path / 'set', 'train').table.notes == ['photos in no part of the lists of photos are left out: 1']
    photos(pictures, tmp_path / 'photos')
    for file in (tmp_path / 'set').rglob('*.jpg'): file.unlink()
    agree(open_dataset(tmp_path / 'set', 'train', images=tmp_path / 'photos'), TRAIN)


@pytest.mark.parametrize('said', ['0 .5 .5 .5 .5', '', '/', 'data/obj/b.txt', 'obj', 'elsewhere/z.jpg'])
def test_files_that_list_no_photo_divide_nothing(said, pictures, tmp_path):
    "Such as labels of train.jpg and val.jpg"
    photos(pictures, tmp_path / 'obj')
    texts(tmp_path / 'obj', '.txt', yolo)
    for part in ('train', 'val'): text(tmp_path / f'{part}.txt', said)
    assert dataset_parts(tmp_path) == [] and len(open_dataset(tmp_path)) == 5


@pytest.mark.parametrize('place, path', [('yamls/../mine', '../mine'), ('sets/mine', 'sets/mine'), ('datasets/mine', 'mine')])
def test_a_yaml_may_lie_apart_from_its_set(place, path, pictures, tmp_path, monkeypatch):
    "Its path is looked for from its folder, from the working folder, then in the working folder's datasets."
    (tmp_path / 'yamls').mkdir()
    (tmp_path / place).mkdir(parents=True)
    for part, names in (('train', TRAIN), ('val', VAL)): yolo_lists(pictures, tmp_path / place, part, names)
    file = (tmp_path / place / 'data.yaml').rename(tmp_path / 'yamls/data.yaml')
    text(file, file.read_text(encoding='utf-8') + f'path: {path}\n')
    monkeypatch.chdir(tmp_path)
    agree(open_dataset(file, 'train'), TRAIN)
    assert sorted(content(open_dataset(file, 'val'))) == sorted(VAL)


@pytest.mark.parametrize('file', ['data.yaml', './data.yaml', '.'])
def test_a_set_is_opened_from_within(file, pictures, tmp_path, monkeypatch):
    for part, names in (('train', TRAIN), ('val', VAL)): yolo_lists(pictures, tmp_path, part, names)
    monkeypatch.chdir(tmp_path)
    agree(open_dataset(file, 'train'), TRAIN)


@pytest.mark.parametrize('within, path', [('', '.'), ('Annotations', '..')])
def test_a_voc_folder_is_opened_from_within(within, path, pictures, tmp_path, monkeypatch):
    "It is the same set"
    for part, names in (('train', TRAIN), ('val', VAL)): voc_lists(pictures, tmp_path, part, names)
    outside = open_dataset(tmp_path / 'VOC2007', 'train')
    monkeypatch.chdir(tmp_path / 'VOC2007' / within)
    inside = open_dataset(path, 'train', year='07')
    agree(inside, TRAIN)
    assert inside.table.files == outside.table.files and mark_set(inside) == mark_set(outside)


@pytest.mark.parametrize('path', ['.', '/content/mine', 'mine'])
def test_a_part_may_be_the_whole_folder(path, pictures, tmp_path):
    "`path` may be of another machine"
    photos(pictures, tmp_path)
    texts(tmp_path, '.txt', yolo)
    text(tmp_path / 'data.yaml', f'names: [cat, cow, dog]\npath: {path}\ntrain: .\nval: ./\n')
    assert dataset_parts(tmp_path) == ['train'] and len(open_dataset(tmp_path, 'train')) == 5


@pytest.mark.parametrize('said', ['labels', 'docs'])
def test_folders_of_a_yaml_without_photos_divide_nothing(said, pictures, tmp_path):
    "data.yaml may name the folders of the labels, or such as hold no photo: no part was left, and that was an IndexError"
    for part, names in (('train', TRAIN), ('val', VAL)):
        photos(pictures, tmp_path / 'images' / part, names)
        texts(tmp_path / 'labels' / part, '.txt', yolo, names)
        text(tmp_path / 'docs' / part / 'readme.md', 'nothing')
    text(tmp_path / 'data.yaml', f'names: {CLASSES}\ntrain: {said}/train\nval: {said}/val')
    for part, names in (('train', TRAIN), ('val', VAL)): assert content(open_dataset(tmp_path, part)).keys() == set(names)


def test_photos_with_two_labels_are_counted_once(pictures, tmp_path):
    "Labels and a copy of them, of 3 of 5 photos: '-1 photos' were left out"
    photos(pictures, tmp_path / 'images')
    for folder in ('annotations', 'backup'): texts(tmp_path / folder, '.xml', xml, TRAIN)
    ds = open_dataset(tmp_path)
    assert ds.table.notes == ['photos without a .xml file are left out: 2'] and len(ds) == 6
    assert any('listed more than once: 3' in warning for warning in check_dataset(ds).warnings)


def test_two_numbers_of_one_name_are_one_class(tmp_path):
    "One of the two was a class without a box"
    grey(tmp_path / 'images/a.png', 50)
    text(tmp_path / 'labels/a.txt', '0 .5 .5 .2 .2\n1 .3 .3 .2 .2\n2 .6 .6 .2 .2')
    text(tmp_path / 'data.yaml', 'names: [cat, cat, dog]')
    ds = open_dataset(tmp_path)
    assert ds.classes == ['cat', 'dog'] and ds.columns['labels'].tolist() == [0, 0, 1]


def test_lists_of_voc_without_jpegimages_are_not_passed_over_in_silence(pictures, tmp_path):
    "And what is advised takes them"
    for part, names in (('train', TRAIN), ('val', VAL)): voc_lists(pictures, tmp_path, part, names)
    (tmp_path / 'VOC2007/JPEGImages').rename(tmp_path / 'VOC2007/images')
    ds = open_dataset(tmp_path)
    assert len(ds) == 5 and 'the lists in ImageSets/Main are not used' in ds.table.notes[0] and '-p images FOLDER' in ds.table.notes[0]
    agree(open_dataset(tmp_path, 'train', images=tmp_path / 'VOC2007/images'), TRAIN)


@pytest.mark.parametrize('away', [False, True])
def test_names_of_voc_may_have_folders(away, pictures, tmp_path):
    "CVAT's of several cameras; what Jupyter keeps of an annotation tells nothing"
    voc, place = tmp_path / 'VOC2007', tmp_path / ('pictures' if away else 'VOC2007/JPEGImages')
    for part, cam, names in (('train', 'cam1', TRAIN), ('val', 'cam 2/b', VAL)):
        photos(pictures, place / cam, names)
        texts(voc / 'Annotations' / cam, '.xml', xml, names)
        text(voc / f'ImageSets/Main/{part}.txt', '\n'.join(f'{cam}/{n}' for n in names))
    texts(voc / 'Annotations/.ipynb_checkpoints', '.xml', lambda n: xml(n).replace('cat', 'cats'), ['a'])
    train, val = (open_dataset(tmp_path, part, images=place if away else None) for part in ('train', 'val'))
    agree(train, TRAIN)
    assert content(val) == {n: (size, objects) for n, (size, objects) in PHOTOS.items() if n in VAL} and val.classes == CLASSES
    assert [f.split('JPEGImages/')[-1] for f in val.table.files] == ['cam 2/b/b.jpg', 'cam 2/b/e.f.jpg']


def test_one_set_in_two_layouts_is_the_same_data(pictures, tmp_path):
    "A run that goes on may be given the set as YOLO or as LabelMe."
    one, other = tmp_path / 'yolo', tmp_path / 'labelme'
    for make, folder in ((_yolo_classes, one), (_labelme_apart, other)): folder.mkdir() or make(pictures, folder)
    drawn = [open_dataset(folder) for folder in (one, other)]
    for ds in drawn: ds.table.boxes = ds.table.boxes.round(3)  # six digits of a fraction
    drawn = [type(ds)(ds.table) for ds in drawn]
    assert same_data(*map(mark_set, drawn))


def test_folds_are_a_partition(pictures, tmp_path):
    _labelme_beside(pictures, tmp_path)
    seen, config = [], dict(data=str(tmp_path))
    for k in (1, 2, 3):
        train, val = open_sets(finetune_config('demo', **config, split_val=f'fold {k} of 3', seed=k))
        assert sorted([*train.image_ids, *val.image_ids]) == [1, 2, 3, 4, 5] and f'fold {k} of 3' in val.note
        seen += val.image_ids
    assert sorted(seen) == [1, 2, 3, 4, 5]
    for fold in ('fold 0 of 3', 'fold 4 of 3', 'fold 1 of 6', 'fold 1 of 1'):
        with pytest.raises(ValueError, match=fold): open_sets(finetune_config('demo', **config, split_val=fold))


def cnn_config(preset, **changes): return make_config(preset, CNNConfig, CNN_PRESETS, **changes)


@pytest.mark.parametrize('make', [finetune_config, panoptic_config, oneshot_config, cnn_config])
def test_a_fold_beside_other_photos_to_evaluate_on_is_refused(make):
    with pytest.raises(ValueError, match='leave data_val there out'): make('demo', data='here', data_val='there', split_val='fold 1 of 3')
    with pytest.raises(ValueError, match="'fold 1 of 3' is a part .* leave it out"): make('demo', split_val='fold 1 of 3')
    assert make('demo', data='here', split_val='fold 1 of 3').fold == (1, 3) and make('demo').fold is None


@pytest.mark.parametrize('make', [finetune_config, panoptic_config, oneshot_config, cnn_config])
@pytest.mark.parametrize('changes, why', [
    (dict(exif='sidewys'), "exif 'sidewys' must be one of"), (dict(missing='skp'), "missing 'skp' must be one of"),
    (dict(val_share=20.), 'val_share 20.0 must lie between 0 and 1'), (dict(scenes_val=0), 'belong together'),
    (dict(photos=-3), 'photos, scenes, .* must not be negative'), (dict(scenes=-5, scenes_val=-5), 'must not be negative'),
    (dict(eval_every=-1), 'eval_every.* must not be negative'), (dict(scene_size=8), 'scene_size 8 must be at least 32')], ids=str)
def test_photos_are_asked_for_alike_in_every_kind_of_run(make, changes, why):
    with pytest.raises(ValueError, match=why): make('demo', **changes)


@pytest.mark.parametrize('changes', [dict(square=64), dict(cached_views=2)], ids=str)
def test_a_cnn_refuses_views_that_it_does_not_see(changes):
    with pytest.raises(ValueError, match='square and cached_views are for detectors'): cnn_config('demo', **changes)


def test_folds_of_the_part_to_train_on(pictures, tmp_path):
    "Where there are parts, the folds are those of `split`: the photos to evaluate on stay unseen."
    PARTED['ultralytics'](pictures, tmp_path)
    train, val = open_sets(finetune_config('demo', data=str(tmp_path), split_val='fold 2 of 3'))
    assert len(train) == 2 and len(val) == 1 and train.dataset is val.dataset
    assert {Path(f).stem for f in train.dataset.table.files} == set(TRAIN)


def test_classes_are_put_together(pictures, tmp_path):
    "In every kind of table; the boxes of both, and of no other, have the new label."
    for make, folder in ((_json_alone, 'coco'), (_yolo_classes, 'yolo'), (_csv_sides, 'csv')):
        (tmp_path / folder).mkdir()
        make(pictures, tmp_path / folder)
        ds = open_dataset(tmp_path / folder, classes=['cow', 'pet=dog+cat'])
        assert ds.classes == ['cow', 'pet'] and ds.columns['labels'].bincount().tolist() == [2, 5]
        assert ds.category_ids == ([2, 1] if folder == 'coco' else [1, 2])
        with pytest.raises(ValueError, match="'cat' comes 2 times"): open_dataset(tmp_path / folder, classes=['cat', 'pet=dog+cat'])
        assert 'not here: dgo' in open_dataset(tmp_path / folder, classes=['pet=dgo+cat']).table.notes[-1]
    train, _ = open_sets(finetune_config('demo', data=str(tmp_path / 'csv'), classes='pet = cat + dog, cow'))
    assert train.classes == ['pet', 'cow']


def test_photos_that_are_missing(pictures, tmp_path):
    "A label without its photo is a missing photo, as in a COCO file; YOLO's is left out, and said."
    for make, folder in ((_xml_apart, 'xml'), (_labelme_beside, 'labelme'), (_csv_tensorflow, 'csv'), (_yolo_classes, 'yolo')):
        here = tmp_path / folder
        here.mkdir()
        make(pictures, here)
        next(here.rglob('b.jpg')).unlink()
        if folder == 'yolo':
            assert 'label files without a photo are left out: 1' in open_dataset(here).table.notes[0]
            continue
        assert 'photos missing: 1' in str(check_dataset(open_dataset(here)).errors)
        assert len(open_dataset(here, missing='skip')) == 4


def test_what_is_suggested_is_printed(pictures, tmp_path):
    _csv_sides(pictures, tmp_path)
    ds = open_dataset(tmp_path)
    assert suggest(ds) == {'num_queries': 20, 'epochs': 100, 'minutes': 1}
    assert '-p num_queries 20 -p epochs 100 (about 1 min' in str(check_dataset(ds, queries=20))
    assert not check_dataset(ds).advice


def test_photos_are_drawn_by_the_rule_word_for_word():
    "Each time a photo of the class that has fewest so far, in the order of the seed; written out without lists that are kept."
    rng = np.random.default_rng(0)
    for seed in range(40):
        labels = [rng.integers(0, 5, rng.integers(0, 6)).tolist() for _ in range(rng.integers(1, 30))]
        order, count, taken = np.random.default_rng(seed).permutation(len(labels)).tolist(), [0] * 5, []
        while rest := [i for i in order if labels[i] and i not in taken]:
            rarest = min({c for i in rest for c in labels[i]}, key=lambda c: (count[c], c))
            taken.append(next(i for i in rest if rarest in labels[i]))
            for c in labels[taken[-1]]: count[c] += 1
        taken += [i for i in order if not labels[i]]
        for num in {0, 1, len(labels) // 2, len(labels)}: assert draw_evenly(labels, 5, num, seed) == taken[:num]


def test_four_photos_in_a_view_are_counted(pictures, tmp_path, capsys):
    "Three photos of ten objects: a view of four has more than ten of them, `auto` has a query for each, and the run tells who has not."
    photos(pictures, tmp_path, ('a', 'b', 'g'))
    rows = [f'{name}.jpg,{x},{x},{x + 9},{x + 9},cat' for name in ('a', 'b', 'g') for x in range(10)]
    (tmp_path / 'train.csv').write_text('\n'.join(['filename,xmin,ymin,xmax,ymax,class', *rows]))
    asked = dict(data=str(tmp_path), weights='none', square=64, val_size=64, batch_size=2)
    assert finetune_config('demo', **asked, num_queries='auto').num_queries == 20
    cfg = finetune_config('demo', **asked, num_queries='auto', mosaic=1.)
    assert cfg.num_queries == 40 and '2 photos, four in a view (mosaic)' in capsys.readouterr().out
    views = train_views(cfg, open_sets(cfg)[0])
    assert 20 < max(len(views[epoch, 0][1]['labels']) for epoch in range(8)) <= 40
    for queries, told in ((40, False), (39, True)):
        run = tmp_path / f'{queries}'
        run.mkdir()
        TASK[1](dataclasses.replace(cfg, num_queries=queries), run, Processes())
        assert ('num_queries 40 or more' in capsys.readouterr().out) == told


@pytest.mark.parametrize('make', [_csv_sides, PARTED['ultralytics']], ids=['csv', 'yolo'])
def test_the_photos_decide_and_are_trained_on(make, pictures, tmp_path, monkeypatch, capsys):
    "`auto` through the notebook, and an epoch of a small detector: it is measured on the photos to evaluate on."
    (data := tmp_path / 'data').mkdir()
    make(pictures, data)
    tiny = dict(backbone='test_resnet', weights='none', features='layer1', hidden_dim=16, nheads=2, dim_feedforward=16, dec_layers=1,
                square=64, val_size=64, cached_views=1, batch_size=2, standardize=False, eval_every=1)
    asked = dict(data=str(data), methods='detr', epochs='auto', num_queries='auto', classes='pet=cat+dog, cow')
    cfg = run_cells(ROOT / 'nbs/finetune.ipynb', monkeypatch, 'train_plan(cfg', **asked, **tiny)['cfg']
    train_set, val_set = open_sets(cfg)
    assert {k: getattr(cfg, k) for k in ('num_queries', 'epochs')}.items() < suggest(train_set).items()
    said = f'auto: num_queries 20, epochs 100 for {len(train_set)} photos (about 1 min a run on one idle core)'
    assert capsys.readouterr().out.splitlines()[0] == said
    (run := tmp_path / 'run').mkdir()
    cfg = dataclasses.replace(cfg, epochs=1)
    state = train(TASK[1](cfg, run, Processes()), cfg, run, Processes())
    assert state.step == len(train_set) // 2 and 0 <= state.evaluations[-1]['test_best_iou'] <= 1
    assert Detector.from_checkpoint(run).classes == tuple(val_set.classes) == ('pet', 'cow')
    # the report is of the photos that were kept, also where the set has no parts and has moved
    data.rename(tmp_path / 'moved')
    m = evaluate(run, tmp_path / 'moved', tmp_path / 'errors', split='val')
    assert m['AP']['AP'] == pytest.approx(state.evaluations[-1]['test_AP'], abs=1e-3)
    assert [row['class'] for row in m['classes']] == ['pet', 'cow']
    assert {row['image_id'] for row in json.loads((tmp_path / 'errors/results.json').read_text())} == set(val_set.image_ids)


# ---- malformed files -------------------------------------------------------------------------------------------------

LABELS = {'.txt': ('0 .5 .5 .25 .25\n2 .1 .1 .2 .1 .2 .3', b'\0 \n0123456789.-+eE'),
          '.json': (labelme('a'), b'\0{}[]",:0123456789truenull'), '.xml': (xml('a'), b'\0<>/&;0123456789 '),
          '.csv': ('filename,class,xmin,ymin,xmax,ymax\na.jpg,cat,1,2,30,40\na.jpg,dog,5,6,7,8\n', b'\0,;"\n0123456789 ')}


@pytest.mark.parametrize('suffix', LABELS)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_broken_label_file_is_named_or_counted(suffix, data, tmp_path, pictures):
    "Some bytes of a sound file exchanged: it opens, or the complaint is ours and names the file."
    text, strange = LABELS[suffix]
    content = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place, end = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 9))
        content[place:place + end] = bytes(data.draw(st.lists(st.sampled_from(list(strange)), max_size=4)))
    photos(pictures, tmp_path, ['a'])
    (tmp_path / f'a{suffix}').write_bytes(content)
    (tmp_path / 'classes.txt').write_text('cat\ncow\ndog')
    try: ds = open_dataset(tmp_path)
    except (ValueError, FileNotFoundError) as e:
        assert f'a{suffix}' in str(e) or 'no label file has an object' in str(e) or 'EXPECTED' in str(e), e
        return
    assert len(ds.rows) + sum(ds.left_out.values()) == len(ds.table.ids)
    str(check_dataset(ds))


@pytest.mark.parametrize('text, words', [
    ('0 .5 .5 .25 .25\n0 320 240 50 40', ["line 2 has '320'", 'fractions', '0..1']), ('3 .5 .5 .2 .2', ['line 1 has class 3', '0 to 2']),
    ('0 .5 .5 .25', ['line 1 has 4 values']), ('\n\ncat .5 .5 .2 .2', ["line 3 begins with 'cat'"]), ('0 .5 .5 .2 -.2', ["'-.2'"])])
def test_yolo_names_file_and_line(text, words, pictures, tmp_path):
    photos(pictures, tmp_path / 'images')
    texts(tmp_path / 'labels', '.txt', lambda n: text if n == 'e.f' else '')
    (tmp_path / 'data.yaml').write_text(YAML)
    with pytest.raises(ValueError) as e: open_dataset(tmp_path)
    assert all(w in str(e.value) for w in ['e.f.txt', *words]), e.value


@pytest.mark.parametrize('text', ['names: [1, [2]]', 'names: {a: b}', 'names: [cat]\nkpt_shape: [17, 3]', 'names: [a, b, ""]'])
def test_a_yaml_that_cannot_be_meant_is_named(text, pictures, tmp_path):
    _yolo_classes(pictures, tmp_path)
    (tmp_path / 'data.yaml').write_text(text)
    with pytest.raises(ValueError, match='data.yaml'): open_dataset(tmp_path)


def test_a_turned_rectangle_of_labelme_has_a_box(tmp_path):
    "Four corners, as LabelMe's oriented_rectangle and X-AnyLabeling's rotation have them"
    for kind in ('oriented_rectangle', 'rotation', 'polygon'):
        shape = {'label': 'cat', 'shape_type': kind, 'points': [[10, 0], [20, 10], [10, 20], [0, 10]]}
        text(tmp_path / 'a.json', json.dumps({'shapes': [shape], 'imagePath': 'a.jpg', 'imageHeight': 32, 'imageWidth': 32}))
        assert labelme_objects(tmp_path / 'a.json') == ([('cat', [0., 0., 20., 20.], False)], (32, 32), 0)


def grey(path, value):
    "A photo of one colour, which tells where it came from"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(path)


def text(path, said):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(said)


def greys(dataset):
    "Of each photo: how bright it is, and the names of its objects"
    samples = [dataset[i] for i in range(len(dataset))]
    return sorted((round(float(s['image'].float().mean())), dataset.classes[int(s['labels'][0])]) for s in samples)


@pytest.mark.parametrize('order', ['{kind}/{film}', '{film}/{kind}', '{kind}/train/{film}'])
def test_frames_of_several_films_keep_their_labels(tmp_path, order):
    "Films count their frames alike: seq2's labels are seq2's photos'"
    for k, film in enumerate(('seq1', 'seq2', 'seq3')):
        for frame in range(4 - k):
            text(tmp_path / order.format(kind='labels', film=film) / f'{frame:06}.txt', f'{k} .5 .5 .5 .5')
            grey(tmp_path / order.format(kind='images', film=film) / f'{frame:06}.png', 40 + 40 * k)
    text(tmp_path / 'classes.txt', 'a\nb\nc')
    table = open_dataset(tmp_path, 'train' if 'train' in order else None)
    assert greys(table) == [(40, 'a')] * 4 + [(80, 'b')] * 3 + [(120, 'c')] * 2


def _two_folders(root, train, val, **more):
    "Photos of cats (40) and dogs (80), a label beside each, and files of names"
    for part, names in (('train', train), ('val', val)):
        for k, name in enumerate(('cat', 'dog')):
            grey(root / part / f'{name}.png', 40 + 40 * k)
            text(root / part / f'{name}.txt', f'{names.index(name) if name in names else k} .5 .5 .5 .5')
        if names: text(root / part / 'classes.txt', '\n'.join(names))
    for name, said in more.items(): text(root / name.replace('_', '.'), said)


def test_each_folder_has_its_own_numbers_of_classes(tmp_path):
    "labelImg writes a classes.txt into every folder, in the order in which classes came up there"
    _two_folders(tmp_path, ['cat', 'dog'], ['dog', 'cow', 'cat'], other_names='x\ny\nz\nw')
    sets = [open_dataset(tmp_path, part) for part in ('train', 'val')]
    for ds in sets:
        assert greys(ds) == [(40, 'cat'), (80, 'dog')] and ds.classes == ['cat', 'dog', 'cow']
        assert 'other.names and train/classes.txt number the classes otherwise' in ds.table.notes[0]
    # a data.yaml has the last word, and a list that goes on where another ends is no other
    text(tmp_path / 'data.yaml', 'names: [a, b, c]')
    assert greys(open_dataset(tmp_path, 'val')) == [(40, 'c'), (80, 'a')]
    _two_folders(tmp_path / 'more', ['cat'], ['cat', 'dog'])
    ds = open_dataset(tmp_path / 'more', 'train')
    assert greys(ds) == [(40, 'cat'), (80, 'dog')] and not ds.table.notes


@pytest.mark.parametrize('places', [('a_names', 'b_names'), ('sub/a_names', 'zub/b_names')])
def test_two_files_of_names_equally_near_are_refused(places, tmp_path):
    _two_folders(tmp_path, [], [], **dict(zip(places, ('cat\ndog', 'dog\ncat'))))
    with pytest.raises(ValueError, match=r'a\.names and .*b\.names number the classes otherwise.*data\.yaml'):
        open_dataset(tmp_path, 'val')
    text(tmp_path / 'data.yaml', 'names: [cat, dog]')
    assert greys(open_dataset(tmp_path, 'val')) == [(40, 'cat'), (80, 'dog')]


def test_a_name_that_ends_in_a_digit_is_a_part(pictures, tmp_path):
    "Only COCO's train2017 means the same file as train; annotations2.json was left out, and no word was said"
    photos(pictures, tmp_path / 'images')
    for name, some in (('annotations', TRAIN), ('annotations2', VAL)): text(tmp_path / f'{name}.json', coco(some))
    assert dataset_parts(tmp_path) == ['annotations', 'annotations2']
    data = str(tmp_path)
    with pytest.raises(ValueError, match="no split .train.; .* annotations, annotations2"): open_sets(finetune_config('demo', data=data))
    train, val = open_sets(finetune_config('demo', data=data, split='annotations', split_val='annotations2'))
    assert (len(train), len(val)) == (3, 2)
    # every list of VOC is one of its own
    for part, names in (('default', TRAIN), ('default2', VAL)): voc_lists(pictures, tmp_path / 'voc', part, names)
    assert dataset_parts(tmp_path / 'voc') == ['default', 'default2'] and len(open_dataset(tmp_path / 'voc', 'default2')) == 2
    for part, names in (('train', TRAIN), ('val', VAL)): coco_usual(pictures, tmp_path / 'usual', part, names)
    assert sorted(dataset_parts(tmp_path / 'usual')) == ['train', 'val']


def test_masks_are_not_taken_for_photos(tmp_path):
    "Oxford's pets: a mask of each photo, of the photo's name and size, in a folder that comes first in the alphabet"
    for name in ('Abyssinian_1', 'beagle_2'):
        grey(tmp_path / 'images' / f'{name}.png', 200)
        grey(tmp_path / 'annotations' / 'trimaps' / f'{name}.png', 2)
        text(tmp_path / 'annotations' / 'xmls' / f'{name}.xml',
             '<annotation><size><width>32</width><height>32</height></size><object><name>pet</name>'
             '<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object></annotation>')
    assert greys(open_dataset(tmp_path)) == [(200, 'pet')] * 2


@pytest.mark.parametrize('lost', [0, 1])
@pytest.mark.parametrize('kind', ['csv', 'coco'])
def test_a_part_is_read_with_its_own_photos(tmp_path, kind, lost):
    "train and val number their photos alike; also where a photo of val is not there"
    for part, number, value in (('train', 6, 50), ('val', 3, 200)):
        names = [f'{k:06}.png' for k in range(number)]
        for name in names[lost * (part == 'val'):]: grey(tmp_path / 'images' / part / name, value)
        if kind == 'csv':
            rows = [f'{name},32,32,cat,4,4,20,20' for name in names]
            text(tmp_path / f'{part}_labels.csv', '\n'.join(['filename,width,height,class,xmin,ymin,xmax,ymax', *rows]))
        else:
            images = [dict(id=k, file_name=name, width=32, height=32) for k, name in enumerate(names)]
            boxes = [dict(id=k, image_id=k, category_id=1, bbox=[4, 4, 16, 16], area=256, iscrowd=0) for k in range(number)]
            text(tmp_path / f'{part}.json', json.dumps(dict(images=images, annotations=boxes, categories=[dict(id=1, name='cat')])))
    assert greys(open_dataset(tmp_path, 'train')) == [(50, 'cat')] * 6
    assert greys(open_dataset(tmp_path, 'val', missing='skip')) == [(200, 'cat')] * (3 - lost)
    errors = check_dataset(open_dataset(tmp_path, 'val')).errors
    assert len(errors) == lost and all('000000.png' in error for error in errors)


def test_stated_sizes_are_part_of_what_features_are_kept_under(tmp_path):
    "Width and height exchanged, as `check_dataset` advises where boxes were drawn upright: the photo is read another way"
    grey(tmp_path / 'a.png', 50)
    keys = []
    for width, height in ((80, 60), (60, 80)):
        coco = dict(images=[dict(id=0, file_name='a.png', width=width, height=height)], categories=[dict(id=1, name='cat')],
                    annotations=[dict(id=0, image_id=0, category_id=1, bbox=[4, 4, 16, 16], area=256, iscrowd=0)])
        text(tmp_path / 'a.json', json.dumps(coco))
        keys.append(set_key(open_dataset(tmp_path / 'a.json')))
    assert keys[0] != keys[1]


def test_a_box_over_the_edge_does_not_turn_a_photo(tmp_path):
    "YOLO's fractions are of the photo as it is seen: its size was read from the file, and is right"
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / 'images').mkdir()
    Image.fromarray(np.zeros((600, 800, 3), np.uint8)).save(tmp_path / 'images/0.jpg', exif=exif)
    text(tmp_path / 'labels/0.txt', '0 .9 .2 .206 .2')
    table = open_dataset(tmp_path)
    assert table[0]['image'].shape == (3, 800, 600) and not table.table.notes[1:] and table[0]['boxes'][0, 3] < 250


def test_hidden_folders_are_no_photos(tmp_path):
    "git-lfs and DVC keep a copy of each photo: it would lie on both sides of a split"
    grey(tmp_path / 'photos/a.png', 50)
    for hidden in ('.git/lfs/objects/01/ff', '.dvc/cache/2', 'photos/.thumbnails'): grey(tmp_path / hidden / '01ff94.png', 50)
    assert walk_files(tmp_path)[0] == ['photos/a.png'] and index_photos(tmp_path, min_side=1).paths == ['photos/a.png']
    assert walk_files(tmp_path / '.git')[0]
