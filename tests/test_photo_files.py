"Which file is meant where several could be: folders, photos of one name, labels and their photos, parts and their lists."
import os
import re
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image

from updetr.core.photos import read_photo
from updetr.data.photo_files import (
    best_folder,
    file_tree,
    find_files,
    find_layout,
    label_pairs,
    part_of,
    parts_of,
    photos_by_stem,
    pick_part,
    read_as_said,
    read_list,
    voc_classes,
    voc_names,
    voc_splits,
)


def touch(folder, *names, said=''):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(said, encoding='utf-8')


def test_the_innermost_folder_tells_the_part(): assert part_of('val/train/images') == part_of('val/Train/Images') == 'train'


def test_one_photo_of_many_tells_where_they_are(tmp_path):
    "A thousand names are looked up; where none of these is there, all"
    touch(tmp_path, 'far/1.jpg')
    assert best_folder([tmp_path / 'far'], [f'{k}.jpg' for k in range(2500)]) == (str(tmp_path / 'far'), 1)
    # of folders that have as many, the likeliest, which stands first
    touch(tmp_path, 'a/1.jpg', 'b/1.jpg')
    for order in ('ab', 'ba'): assert best_folder([tmp_path / place for place in order], ['1.jpg']) == (str(tmp_path / order[0]), 1)


@pytest.mark.parametrize('written, there', [('NFC', 'NFD'), ('NFD', 'NFC')])
def test_accents_are_read_in_either_form(written, there, tmp_path):
    "é is one character on Linux, an e and an accent on a Mac; names that are there are found as they stand"
    said, real = (normalize(form, 'café') for form in (written, there))
    touch(tmp_path, f'images/{real}.jpg', f'labels/{said}.txt')
    for name in (f'{said}.jpg', normalize(written, 'caf%C3%A9.jpg')):
        folder, names, note = find_files([tmp_path / 'images'], [name], 'photos', 'x.json', '')
        assert names == [f'{real}.jpg'] and note
    assert find_layout(tmp_path).parts == {'': [(f'labels/{said}.txt', f'images/{real}.jpg')]}
    touch(tmp_path, f'images/{said}.jpg')
    assert find_files([tmp_path / 'images'], [f'{said}.jpg'], 'photos', 'x.json', '')[1:] == ([f'{said}.jpg'], '')


def test_of_photos_of_one_name_the_usual_kind_is_taken(tmp_path):
    "And suffixes may be written in capitals"
    touch(tmp_path, 'a.bmp', 'a.png', 'a.JPG', 'a.TXT', 'b.bmp', 'b.png', 'b.txt')
    assert photos_by_stem(tmp_path) == {'a': ['a.JPG', 'a.png', 'a.bmp'], 'b': ['b.png', 'b.bmp']}
    tree = file_tree(tmp_path)
    assert label_pairs(tree, tree, '.txt')[0] == [('a.TXT', 'a.JPG', ''), ('b.txt', 'b.png', '')]


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_a_line_of_a_list_is_first_read_as_it_stands(encoding, tmp_path):
    "Names may have spaces, and end like a flag; a suffix or a flag is taken off only where the name is not known with it"
    def listed(text):
        (tmp_path / 'a.txt').write_bytes(text.encode(encoding))
        return read_list(tmp_path / 'a.txt', {'a', 'my photo', 'b 1', 'c.v2'})
    assert listed('a\r\nmy photo\nb 1\n\n c.v2 \nunknown 7') == (['a', 'my photo', 'b 1', 'c.v2', 'unknown 7'], 0)
    assert listed('a.jpg\nmy photo.JPG\nc.v2.png') == (['a', 'my photo', 'c.v2'], 0)
    assert listed('a  1\nmy photo -1\nb 1 0\nc.v2.jpg -1') == (['a', 'b 1'], 2)


def test_a_list_of_voc_is_read_and_an_unknown_one_is_named_beside_those_that_there_are(tmp_path):
    texts = {'train': 'a\nb c', 'fold1_train': 'b c.jpg', 'cat_train': 'a  1\nb c -1'}
    for name, said in texts.items(): touch(tmp_path, f'ImageSets/Main/{name}.txt', said=said)
    notes = []
    found = {split: voc_names(tmp_path, split, {'a', 'b c'}, notes) for split in texts}
    assert found == {'train': ['a', 'b c'], 'fold1_train': ['b c'], 'cat_train': ['a']}
    assert notes == ['photos marked -1 in cat_train.txt are left out: 1']
    with pytest.raises(ValueError, match="no split 'val'; it has: fold1_train, train$"): voc_names(tmp_path, 'val', {'a'}, [])


def test_links_are_followed_and_what_is_hidden_is_not_there(tmp_path):
    touch(tmp_path, 'far/z.jpg', 'set/b.jpg', 'set/a.jpg', 'set/.c.jpg', 'set/.git/d.jpg', 'set/__MACOSX/a.jpg', 'set/1/2/3/4/5/e.jpg',
          'set/1/2/3/4/5/6/f.jpg')
    (tmp_path / 'set/link').symlink_to(tmp_path / 'far')
    tree = file_tree(tmp_path / 'set')
    assert {folder: names for folder, names in tree.items() if names} == {
        '': ['a.jpg', 'b.jpg'], '1/2/3/4/5': ['e.jpg'], 'link': ['z.jpg']}


def test_a_folder_and_a_link_to_it_hold_the_same_photos_once(tmp_path):
    "Else each is there twice, to train on and to evaluate on; its own folder gives the name, and a link upwards has no end"
    touch(tmp_path, 'v1/images/a.jpg', 'v1/labels/a.txt')
    (tmp_path / 'latest').symlink_to(tmp_path / 'v1')
    (tmp_path / 'v1/up').symlink_to(tmp_path)
    assert find_layout(tmp_path).parts == {'': [('v1/labels/a.txt', 'v1/images/a.jpg')]}


def test_a_closed_folder_does_no_harm(tmp_path, monkeypatch):
    "Such as lost+found of a disk; where nothing else is there, the error shows it"
    touch(tmp_path, 'photos/a.jpg', 'lost+found/b.jpg')
    def closed(function, within):
        def opened(path='.', *args, **more):
            inner = str(path).partition('lost+found')
            if inner[1] and (within or inner[2]): raise PermissionError(13, 'Permission denied', str(path))
            return function(path, *args, **more)
        return opened
    monkeypatch.setattr(os, 'access', lambda path, mode: 'lost+found' not in str(path))
    monkeypatch.setattr(os, 'stat', closed(os.stat, False))
    monkeypatch.setattr(os, 'scandir', closed(os.scandir, True))
    with pytest.raises(ValueError, match=r'SEEN(.|\n)* lost\+found/\n.*  Permission denied\n'): find_layout(tmp_path)
    touch(tmp_path, 'photos/a.xml')
    assert find_layout(tmp_path).parts == {'': [('photos/a.xml', 'photos/a.jpg')]}
    # the folder of another machine may be a closed one here
    touch(tmp_path, 'set.yaml', said=f'names: [cat]\npath: {tmp_path}/lost+found/set')
    with pytest.raises(ValueError, match='no label file'): find_layout(tmp_path / 'set.yaml')


@pytest.mark.parametrize('tree, photo', [
    ({'labels/train2017': ['1.txt'], 'images/test': ['1.jpg'], 'images/train': ['1.jpg']}, 'images/train/1.jpg'),
    ({'set': ['1.txt', '1.jpg'], 'images': ['1.jpg']}, 'set/1.jpg'),
    ({'text': ['1.txt', '2.txt'], 'a': ['1.png'], 'b': ['1.png', '2.png']}, 'b/1.png')], ids=['same part', 'beside it', 'where most are'])
def test_the_photo_of_a_label(tree, photo): assert label_pairs(tree, tree, '.txt')[0][0][1] == photo


@pytest.mark.parametrize('files', [
    'labels/seq1/1.txt labels/seq2/1.txt images/seq1/1.png images/seq2/1.png',
    'seq1/labels/1.txt seq2/labels/1.txt seq1/img/1.png seq2/img/1.png', 'annotations/xmls/1.txt annotations/trimaps/1.png images/1.jpg',
    'text/1.txt depth/1.png image_2/1.png', 'text/1.txt depth/1.png JPEGImages/1.jpg'])
def test_frames_of_films_and_masks_are_told_apart_by_their_folders(files):
    tree = {}
    for file in files.split(): tree.setdefault(file.rpartition('/')[0], []).append('1' + file[-4:])
    pairs, _, _ = label_pairs(tree, tree, '.txt')
    assert pairs and not any(word in photo for _, photo, _ in pairs for word in ('trimaps', 'depth'))
    assert all(('seq1' in label) == ('seq1' in photo) and ('seq2' in label) == ('seq2' in photo) for label, photo, _ in pairs)


def test_labels_that_tell_no_part_are_the_others(tmp_path):
    touch(tmp_path, 'train/a.jpg', 'train/a.xml', 'more/b.jpg', 'more/b.xml')
    assert find_layout(tmp_path).parts == {'train': [('train/a.xml', 'train/a.jpg')], 'others': [('more/b.xml', 'more/b.jpg')]}


def test_a_photo_is_missing_from_where_the_others_are(tmp_path):
    "In the part and in the place of its label"
    touch(tmp_path, *(f'labels/train/{name}.xml' for name in 'abcd'), 'images/a.jpg', 'images/b.jpg', 'other/d.jpg')
    photos = ['images/a.jpg', 'images/b.jpg', 'images/c.jpg', 'other/d.jpg']
    assert find_layout(tmp_path).parts == {'train': [(f'labels/train/{name}.xml', photo) for name, photo in zip('abcd', photos)]}


def test_photos_beside_those_with_labels_have_no_objects(tmp_path):
    "Those in other folders do not belong to the set; and the photos' names give the order"
    touch(tmp_path, 'images/a.jpg', 'images/b.jpg', 'images/c.jpg', 'labels/a.txt', 'labels/c.txt', 'docs/logo.png')
    assert find_layout(tmp_path).parts == {
        '': [('labels/a.txt', 'images/a.jpg'), (None, 'images/b.jpg'), ('labels/c.txt', 'images/c.jpg')]}


def test_folders_that_a_yaml_names_are_photos_without_objects(tmp_path):
    "Background, a part without any label, and photos of a list; not the pictures beside, nor those of a set named as a whole"
    touch(tmp_path, 'images/real/a.jpg', 'labels/real/a.txt', 'images/background/b.jpg', 'images/val/c.jpg',
          'more/d.jpg', 'logo/e.png', 'f.jpg')
    touch(tmp_path, 'test.txt', said='more/d.jpg')
    touch(tmp_path, 'data.yaml', said='names: [cat]\ntrain: [images/real, images/background]\nval: images/val\ntest: test.txt')
    layout = find_layout(tmp_path)
    assert layout.parts == {'train': [(None, 'images/background/b.jpg'), ('labels/real/a.txt', 'images/real/a.jpg')],
                            'val': [(None, 'images/val/c.jpg')], 'test': [(None, 'more/d.jpg')]}
    assert layout.notes == ['photos without a label file, taken as photos without objects: 3']
    touch(tmp_path, 'data.yaml', said='names: [cat]\ntrain: .')
    assert find_layout(tmp_path).parts == {'train': [('labels/real/a.txt', 'images/real/a.jpg')]}


def test_as_much_of_a_path_is_looked_up_as_there_is(tmp_path):
    "Of another machine's set/train/images there is train/images, and images, which are the photos to evaluate on"
    touch(tmp_path, 'train/images/a.jpg', 'train/labels/a.txt', 'images/b.jpg', 'labels/b.txt')
    touch(tmp_path, 'data.yaml', said='names: [cat]\ntrain: /content/set/train/images\nvalid: images')
    assert find_layout(tmp_path).parts == {
        'train': [('train/labels/a.txt', 'train/images/a.jpg')], 'val': [('labels/b.txt', 'images/b.jpg')]}


def test_a_list_of_test_photos_is_a_part(tmp_path):
    touch(tmp_path, 'obj/a.jpg', 'obj/a.txt', 'obj/b.jpg', 'obj/b.txt')
    for part, name in (('train', 'a'), ('test', 'b')): touch(tmp_path, f'{part}.txt', said=f'data/obj/{name}.jpg')
    assert parts_of(find_layout(tmp_path)) == ['train', 'test']


@pytest.mark.parametrize('suffix', ['.yaml', '.yml'])
def test_a_yaml_may_lie_elsewhere(suffix, tmp_path):
    "It says where the labels are; the photos may be in a third place"
    touch(tmp_path, 'set/images/a.jpg', 'set/labels/a.txt', 'photos/a.jpg')
    touch(tmp_path, f'conf/my{suffix}', said='path: ../set\nnames: {0: cat}')
    layout = find_layout(tmp_path / f'conf/my{suffix}')
    assert layout.names == {0: 'cat'} and layout.root == (tmp_path / 'set').resolve()
    away = find_layout(tmp_path / f'conf/my{suffix}', tmp_path / 'photos')
    assert away.photos == tmp_path / 'photos' and away.parts == {'': [('labels/a.txt', 'a.jpg')]}
    touch(tmp_path, f'set/my{suffix}', said='names: {0: dog}')
    assert find_layout(tmp_path / 'set').names == {0: 'dog'}


def test_of_files_that_describe_different_sets_none_is_chosen_in_silence(tmp_path):
    "Names, folders or parts may differ; each file in place of the folder says which"
    touch(tmp_path, *(f'{place}/images/a.jpg' for place in ('names', 'parts', 'sets/one', 'sets/two')),
          *(f'{place}/labels/a.txt' for place in ('names', 'parts', 'sets/one', 'sets/two')))
    for file, names in (('names/data.yaml', 'cat, dog'), ('names/coco.yaml', 'person, bicycle'), ('sets/one/data.yaml', 'cat'),
                        ('sets/two/data.yaml', 'cat'), ('parts/one.yml', 'cat'), ('parts/two.yml', 'cat')):
        touch(tmp_path, file, said=f'names: [{names}]')
    touch(tmp_path, 'parts/two.yml', said='names: [cat]\ntrain: images')
    for place, both in (('names', 'coco.yaml and .*data.yaml'),
                        ('sets', 'one.data.yaml and .*two.data.yaml'), ('parts', 'one.yml and .*two.yml')):
        with pytest.raises(ValueError, match=f'{both} describe different sets: say which'): find_layout(tmp_path / place)
    assert find_layout(tmp_path / 'names/data.yaml').names == {0: 'cat', 1: 'dog'}
    assert find_layout(tmp_path / 'sets/two/data.yaml').root == (tmp_path / 'sets/two').resolve()


def test_a_yaml_that_cannot_be_read_is_named(tmp_path):
    "With YAML's reason: where it was given it is an error, in a folder it has no say, and that is said"
    touch(tmp_path, 'images/a.jpg', 'labels/a.txt')
    touch(tmp_path, 'data.yaml', said='names: [cat, dog\ntrain: images')
    reason = "data.yaml is no YAML file: line 2: expected ',' or ']'"
    with pytest.raises(ValueError, match=reason): find_layout(tmp_path / 'data.yaml')
    layout = find_layout(tmp_path)
    assert not layout.names and re.search(reason, layout.notes[0]) and '\n' not in layout.notes[0]
    (tmp_path / 'data.yaml').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='data.yaml is no text'): find_layout(tmp_path / 'data.yaml')


@pytest.mark.parametrize('names', ['[SE, NO, 010, 1.50, 2024-01-01]', '{0: SE, 1: NO, 2: 010, 3: 1.50, 4: 2024-01-01}'])
def test_names_of_a_yaml_are_taken_as_they_stand(names, tmp_path):
    "YAML would take them for false, eight, 1.5 and a day; a part without a value is none"
    touch(tmp_path, 'images/a.jpg', 'labels/a.txt')
    touch(tmp_path, 'data.yaml', said=f'names: {names}\nkpt_shape: null\ntrain: images\nval:\ntest: null')
    layout = find_layout(tmp_path)
    assert [*layout.names.items()] == [*enumerate(['SE', 'NO', '010', '1.50', '2024-01-01'])]
    assert parts_of(layout) == ['train']


def test_classes_come_in_the_order_of_their_numbers(tmp_path):
    touch(tmp_path, 'images/a.jpg', 'labels/a.txt')
    touch(tmp_path, 'data.yaml', said='names: {10: w, 2: x, 0: y, 1: z}')
    assert [*find_layout(tmp_path).names.items()] == [(0, 'y'), (1, 'z'), (2, 'x'), (10, 'w')]


def test_files_that_describe_nothing_here_or_the_same_or_a_part_of_the_set_do_no_harm(tmp_path):
    "Settings that come first in the alphabet, a copy, and what a downloaded part of the set brought with it"
    touch(tmp_path, 'set/images/a.jpg', 'set/labels/a.txt')
    touch(tmp_path, 'cfg/x.yaml', said='names: [person, bicycle]')
    for file in ('set/data.yaml', 'set/copy.yaml'): touch(tmp_path, file, said='names: [cat, dog]')
    layout = find_layout(tmp_path)
    assert layout.root == (tmp_path / 'set').resolve() and layout.names == {0: 'cat', 1: 'dog'}
    touch(tmp_path, 'data.yaml', said='names: [cow, cat]\ntrain: set/images')
    layout = find_layout(tmp_path)
    assert layout.root == tmp_path.resolve() and layout.names == {0: 'cow', 1: 'cat'} and parts_of(layout) == ['train']


def test_other_files_of_coco_are_no_parts(tmp_path):
    names = 'train', 'val', 'captions_train', 'panoptic_val', 'stuff_val', 'image_info_test'
    touch(tmp_path, *(f'{name}.json' for name in names), said='{"images": [], "annotations": [], "categories": []}')
    assert find_layout(tmp_path).parts == {'train': [tmp_path / 'train.json'], 'val': [tmp_path / 'val.json']}


def test_a_file_of_many_classes_is_one_of_coco(tmp_path):
    "It begins with them, and its photos come late; where there are none, it is Label Studio's"
    many = f'{{"categories": [{" " * 2**16}]'
    touch(tmp_path, 'many.json', said=many + ', "images": [], "annotations": []}')
    touch(tmp_path, 'notes.json', said='{"categories": []}')
    assert find_layout(tmp_path).parts == {'': [tmp_path / 'many.json']}


def test_two_tables_are_two_parts(tmp_path):
    touch(tmp_path, 'a.csv', 'b.csv', said='filename,class,xmin,ymin,xmax,ymax\n')
    assert parts_of(find_layout(tmp_path)) == ['a', 'b']


def test_a_word_for_two_parts_is_for_none(tmp_path):
    touch(tmp_path, 'annotations/instances_Validation.json', 'annotations/instances_valid.json')
    layout = find_layout(tmp_path)
    assert pick_part(layout, 'valid') == 'valid'
    with pytest.raises(ValueError, match='Validation, valid'): pick_part(layout, 'val')


def test_only_lists_of_a_class_are_not_shown(tmp_path):
    "A name that ends as theirs do, or flags alone, make no list of a class"
    for name, said in (('cat_train', 'a  1\n'), ('fold_train', 'a\n'), ('marked', 'a  1\n')):
        touch(tmp_path, f'ImageSets/Main/{name}.txt', said=said)
    assert voc_splits(tmp_path) == (['cat_train', 'fold_train', 'marked'], ['fold_train', 'marked'])


def test_a_broken_annotation_has_no_say_in_the_classes(tmp_path):
    thing = '<object><name>{}</name><bndbox/></object>'
    touch(tmp_path, 'Annotations/a.xml', said='<annotation><object>')
    touch(tmp_path, 'Annotations/b.xml', said=f'<annotation>{thing.format("cow")}{thing.format("cat")}</annotation>')
    assert voc_classes([tmp_path]) == ['cat', 'cow']


def test_a_square_photo_is_upright_unless_it_is_told(tmp_path):
    "Its size does not tell how it was seen"
    pixels, note = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8), Image.Exif()
    note[0x0112] = 6
    Image.fromarray(pixels).save(path := tmp_path / 'a.png', exif=note)
    stored = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(read_as_said(path, (8, 8)), read_photo(path)) and not torch.equal(read_photo(path), stored)
    assert torch.equal(read_as_said(path, (8, 8), 'stored'), stored)
