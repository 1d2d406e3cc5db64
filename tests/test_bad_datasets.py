"Data sets with something wrong: each kind has its own clear message, when it is opened or when it is checked."
import json
from copy import deepcopy
from pathlib import Path

import pytest
from PIL import Image

from updetr.check import check_dataset
from updetr.datasets import DetectionSet, coco_table, open_dataset
from updetr.photos import builtin_photos, read_photo

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
    for part in ('annotations', 'train2017'): (root / part).mkdir(exist_ok=True)
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
    "What the bad sets are made of has nothing to complain about."
    for part in ('coco', 'voc'): (tmp_path / part).mkdir()
    for ds in (open_dataset(coco(tmp_path / 'coco'), 'train'), open_dataset(voc(tmp_path / 'voc'), 'trainval')):
        report = check_dataset(ds, decode=True)
        assert report.ok and not report.warnings, report
        assert ds.columns['boxes'].tolist()[0] == [299 if 'VOC' in report.title else 300, 39 if 'VOC' in report.title else 40, 340, 340]


# ---- what cannot be opened: (folder -> opened set), words of the message --------------------------------------------

UNOPENED = {
    'nothing there': (lambda f: open_dataset(f / 'nowhere', 'train'), ['nothing at', 'nowhere']),
    'photos only': (lambda f: open_dataset(folder(f, 'train/a.jpg'), 'train'), ['EXPECTED', 'SEEN', 'a.jpg', 'JPEGImages']),
    'one level too low': (lambda f: open_dataset(coco(f) / 'annotations', 'train'), ['EXPECTED', 'SEEN', 'instances_train2017.json']),
    'YOLO': (lambda f: open_dataset(folder(f, 'data.yaml', 'labels/a.txt', 'images/a.jpg'), 'train'), ['YOLO', 'export the set as COCO']),
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
    'missing photo': (change('images', 1, file_name='lost.jpg'), 'errors', ['photos missing: 1', 'lost.jpg']),
    'another size': (change('images', 1, width=WIDTH + 1), 'errors', ['photos of another size: 1', '2.jpg', f'{WIDTH + 1} x {HEIGHT}']),
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


def test_sideways_photos(tmp_path):
    "A photo whose EXIF note turns it does not fit boxes that were drawn on it as stored."
    root, turned = coco(tmp_path), Image.Exif()
    turned[0x0112] = 6
    Image.open(PHOTO).save(root / 'train2017/1.jpg', exif=turned)
    ds = open_dataset(root, 'train')
    assert any('1.jpg' in e and 'EXIF' in e for e in check_dataset(ds).errors)
    with pytest.raises(ValueError, match='EXIF'): ds[0]
    assert ds[1]['boxes'].tolist() == [[300, 40, 340, 340]]


def test_zero_based_voc(tmp_path):
    "A VOC set that counts from 0 gets the hint, and is exact with it."
    box = '<object><name>rocket</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>'
    root = voc(tmp_path, OBJECT + box)
    assert any('one_based=False' in w for w in check_dataset(open_dataset(root, 'trainval')).warnings)
    ds = open_dataset(root, 'trainval', one_based=False)
    assert not check_dataset(ds).warnings and ds[0]['boxes'].tolist()[1] == [0, 0, 9, 9]


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
