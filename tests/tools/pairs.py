"""Photos of two kinds side by side: a one-shot detector has to look at what it is asked with.

`python tests/tools/pairs.py VOCdevkit/VOC2007 TARGET`. The labels are VOC's. TARGET/VOC2007 gets 1,600 pairs and 1,600 single
photos to train on (trainval), and 500 pairs to test on (test)."""
import random
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from PIL import Image

HEIGHT = 240  # px
SIDES = 'xmin', 'ymin', 'xmax', 'ymax'


def objects(file):
    "(class, xyxy px) of each object of an annotation."
    found = ET.parse(file).iter('object')
    return [(o.findtext('name'), [float(o.find('bndbox').findtext(side)) for side in SIDES]) for o in found]


def side_by_side(source, names):
    "A picture of some photos of one height, in a row, and its objects."
    photos, boxes, left = [], [], 0
    for name in names:
        photo = Image.open(source / f'JPEGImages/{name}.jpg').convert('RGB')
        scale = HEIGHT / photo.height
        photos.append(photo.resize((round(photo.width * scale), HEIGHT), Image.BICUBIC))
        for kind, (x1, y1, x2, y2) in objects(source / f'Annotations/{name}.xml'):
            boxes.append((kind, [left + x1 * scale, y1 * scale, left + x2 * scale, y2 * scale]))
        left += photos[-1].width
    page, left = Image.new('RGB', (left, HEIGHT)), 0
    for photo in photos:
        page.paste(photo, (left, 0))
        left += photo.width
    return page, boxes


def annotation(page, boxes):
    "An annotation as VOC writes it."
    root = ET.Element('annotation')
    size = ET.SubElement(root, 'size')
    for name, value in zip(('width', 'height', 'depth'), (*page.size, 3)): ET.SubElement(size, name).text = str(value)
    for kind, box in boxes:
        thing = ET.SubElement(root, 'object')
        ET.SubElement(thing, 'name').text = kind
        ET.SubElement(thing, 'difficult').text = '0'
        place = ET.SubElement(thing, 'bndbox')
        for side, value in zip(SIDES, box): ET.SubElement(place, side).text = f'{value:.1f}'
    return ET.tostring(root, encoding='unicode')


def make(source, target, split, pairs, singles, rng):
    "Write a split: pairs of photos that show one kind each, of two kinds, and photos as they are."
    names = (source / f'ImageSets/Main/{split}.txt').read_text().split()
    of_kind = {}
    for name in names:
        kinds = {kind for kind, _ in objects(source / f'Annotations/{name}.xml')}
        if len(kinds) == 1: of_kind.setdefault(kinds.pop(), []).append(name)
    written = []
    for i in range(pairs):
        page, boxes = side_by_side(source, [rng.choice(of_kind[kind]) for kind in rng.sample(sorted(of_kind), 2)])
        written.append(f'{split}{i:05d}')
        page.save(target / f'JPEGImages/{written[-1]}.jpg', quality=85)
        (target / f'Annotations/{written[-1]}.xml').write_text(annotation(page, boxes))
    for name in rng.sample(names, singles):
        for folder, ending in (('JPEGImages', 'jpg'), ('Annotations', 'xml')):
            shutil.copy(source / folder / f'{name}.{ending}', target / folder / f'{name}.{ending}')
        written.append(name)
    (target / f'ImageSets/Main/{split}.txt').write_text('\n'.join(written) + '\n')


if __name__ == '__main__':
    if len(sys.argv) != 3: sys.exit(__doc__)
    source, target = Path(sys.argv[1]), Path(sys.argv[2]) / 'VOC2007'
    for split in ('trainval', 'test'):
        wanted = source / f'ImageSets/Main/{split}.txt'
        if not wanted.is_file(): sys.exit(f'{wanted} is not there: give a folder in the layout of VOC')
    for folder in ('JPEGImages', 'Annotations', 'ImageSets/Main'): (target / folder).mkdir(parents=True)
    rng = random.Random(0)
    make(source, target, 'trainval', 1600, 1600, rng)
    make(source, target, 'test', 500, 0, rng)
