"One picture, one answer: by path, PIL image, array and tensor, and in every place that takes pictures."
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from updetr.core import photos
from updetr.core.photos import BadPhoto, as_image, index_photos, read_photo

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 30, 3), np.uint8)


def _exif(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def _alpha(): return np.dstack([RGB, RNG.integers(0, 256, (40, 30), np.uint8)])


FILES = {'plain.png': lambda p: Image.fromarray(RGB).save(p), 'plain.jpg': lambda p: Image.fromarray(RGB).save(p),
         'grey.png': lambda p: Image.fromarray(RGB[..., 0]).save(p),
         'grey16.png': lambda p: Image.fromarray((RGB[..., 0] * 257. - 100 * (RGB[..., 0] > 9)).astype(np.uint16)).save(p),
         'bits.png': lambda p: Image.fromarray(RGB[..., 0] > 99).save(p),
         'rgba.png': lambda p: Image.fromarray(_alpha()).save(p), 'la.png': lambda p: Image.fromarray(_alpha()[..., 2:]).save(p)}
STORED = {'palette.png': lambda p: Image.fromarray(RGB).quantize(9).save(p),
          'clear.png': lambda p: Image.fromarray(RGB).quantize(9).save(p, transparency=0),
          'cmyk.jpg': lambda p: Image.fromarray(RGB).convert('CMYK').save(p),
          **{f'turn{k}.jpg': lambda p, k=k: Image.fromarray(RGB).save(p, exif=_exif(k)) for k in range(1, 9)},
          **{f'turn{k}.png': lambda p, k=k: Image.fromarray(RGB).save(p, exif=_exif(k)) for k in (3, 6)},
          **{f'turn{k}.tif': lambda p, k=k: Image.fromarray(RGB).save(p, exif=_exif(k)) for k in (2, 8)}}


@pytest.mark.parametrize('name', [*FILES, *STORED])
def test_a_file_and_its_pil_image_are_the_same_picture(tmp_path, name):
    (FILES | STORED)[name](path := tmp_path / name)
    truth = read_photo(path)
    assert torch.equal(as_image(path), truth) and torch.equal(as_image(str(path)), truth)
    assert torch.equal(as_image(Image.open(path)), truth)
    opened = Image.open(path)
    opened.load()
    assert torch.equal(as_image(opened), truth) and torch.equal(as_image(opened.copy()), truth)


@pytest.mark.parametrize('name', FILES)
def test_a_file_and_its_numbers_are_the_same_picture(tmp_path, name):
    FILES[name](path := tmp_path / name)
    truth, array = read_photo(path), np.asarray(Image.open(path))
    forms = [array, torch.from_numpy(array.copy())]
    if array.ndim == 3: forms += [np.moveaxis(array, -1, 0), torch.from_numpy(np.moveaxis(array, -1, 0).copy())]
    else: forms += [array[..., None], array[None], torch.from_numpy(array[None].copy())]
    if array.dtype == np.uint8: forms += [array / 255, torch.from_numpy(array / 255), torch.from_numpy(array / 255).float()]
    for form in forms: assert torch.equal(as_image(form), truth), (name, form.dtype, form.shape)


def test_sixteen_bit_colour_is_what_pil_makes_of_it(tmp_path):
    from test_bad_photos import _sixteen_bit_rgb
    (tmp_path / 'c.png').write_bytes(_sixteen_bit_rgb())
    truth = read_photo(tmp_path / 'c.png')
    wide = truth.permute(1, 2, 0).numpy().astype(np.uint16) * 257
    assert torch.equal(as_image(wide), truth) and torch.equal(as_image(torch.from_numpy(wide)), truth)


@pytest.mark.parametrize('odd, words', [
    (RGB.astype(np.float32), 'x / 255'), (RGB.astype(np.int64), 'x / 255'), (RGB / -255., 'floats in 0..1'),
    (np.full((4, 4), np.nan), 'not finite'), (RGB[None], 'one by one'), (RGB[:0], 'shape'), (np.zeros((9, 9, 7)), 'shape'),
    (torch.zeros(2, 3, 4, 4), 'one by one'), (np.zeros(3), 'shape'), (b'', 'path'), (None, 'path'),
    (Image.fromarray(RGB[..., 0].astype(np.float32)), 'no fixed range'), (np.array([['a']]), 'numbers')])
def test_what_is_no_picture_is_named(odd, words):
    with pytest.raises(ValueError, match=words): as_image(odd)


def test_a_truncated_pil_image_is_a_bad_photo(tmp_path):
    Image.fromarray(RGB).save(path := tmp_path / 'cut.jpg')
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(BadPhoto, match='cannot be decoded'): as_image(Image.open(path))


def tensor(pixels): return torch.from_numpy(pixels.copy())


@pytest.mark.parametrize('frame', [RGB, RGB.transpose(2, 0, 1), RGB[..., 0], RGB[:, ::2], _alpha(), RGB / 255,
                                   tensor(RGB), tensor(RGB[..., 0]), tensor(RGB).permute(2, 0, 1),
                                   tensor(RGB.transpose(2, 0, 1)), tensor(RGB) / 255],
                         ids=lambda x: f'{type(x).__name__} {x.dtype} {tuple(x.shape)}')
def test_a_picture_stays_when_its_buffer_is_used_again(frame):
    "A service writes the next frame into the same memory, and draws the answer to the last one"
    kept = as_image(frame)
    before, old = kept.clone(), frame + 0
    frame[:] = 0
    try: assert torch.equal(kept, before) and kept.any()
    finally: frame[:] = old


def test_a_detection_is_drawn_on_the_frame_that_was_asked():
    from updetr import Detector
    frame = RNG.integers(0, 256, (64, 96, 3), np.uint8)
    found = Detector.demo()(frame, threshold=0)
    before = np.asarray(found.plot())
    frame[:] = 255
    assert (np.asarray(found.plot()) == before).all()


def test_every_reader_of_pictures_uses_this_one_function():
    from updetr.predict import detector, localizer, oneshot_detector, segmenter
    assert {m.as_image for m in (detector, localizer, oneshot_detector, segmenter)} == {as_image}


def test_uploads_are_read_as_files_are(tmp_path):
    from updetr.predict.widget import read_upload
    for name in ('turn6.jpg', 'rgba.png', 'grey16.png'):
        (FILES | STORED)[name](path := tmp_path / name)
        assert torch.equal(read_upload({'name': name, 'content': memoryview(path.read_bytes())})[1], read_photo(path))


def _ftyp(brand): return struct.pack('>I', 24) + b'ftyp' + brand + b'\0\0\0\0mif1' + brand + b'\0' * 40


@pytest.mark.parametrize('name, content, kind, way', [
    ('a.heic', _ftyp(b'heic'), 'HEIC photo', 'pillow-heif'), ('b.jpg', _ftyp(b'mif1'), 'HEIC photo', 'pillow-heif'),
    ('c.jxl', b'\xff\x0a' + b'\1' * 50, 'JPEG XL photo', 'save it as JPEG'),
    ('d.svg', b'<?xml version="1.0"?><svg xmlns="x"/>', 'not an image', 'save it as PNG')])
def test_pictures_of_other_kinds_are_named_with_the_way_on(tmp_path, monkeypatch, name, content, kind, way):
    monkeypatch.setattr(photos, 'FORMATS', tuple(f for f in photos.FORMATS if f != 'HEIF'))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadPhoto, match=way): read_photo(tmp_path / name)
    with pytest.raises(ValueError, match=f'1 {kind}'): index_photos(tmp_path)


def test_heic_is_read_where_pillow_heif_is(tmp_path):
    heif = pytest.importorskip('pillow_heif')
    heif.from_pillow(Image.fromarray(RGB)).save(path := tmp_path / 'a.heic', quality=95)
    assert 'HEIF' in photos.FORMATS and read_photo(path).shape == (3, 40, 30)
    assert len(index_photos(tmp_path)) == 1


def test_a_photo_over_the_limit_has_a_way_out(tmp_path):
    Image.new('L', (9100, 9100)).save(path := tmp_path / 'large.png')
    with pytest.raises(BadPhoto, match='UPDETR_MAX_PIXELS'): read_photo(path)
    show = f'''
import os
try: import updetr.core.photos
except ValueError as e: print(e)
os.environ['UPDETR_MAX_PIXELS'] = '90000000'
from updetr.core.photos import *
print(tuple(read_photo({str(path)!r}).shape), index_photos({str(tmp_path)!r}).paths)'''
    told = subprocess.run([sys.executable, '-c', show], text=True, capture_output=True, env=os.environ | {'UPDETR_MAX_PIXELS': 'many'})
    refused, shown = told.stdout.strip().splitlines()
    assert "UPDETR_MAX_PIXELS is 'many'" in refused and shown == "(3, 9100, 9100) ['large.png']", told.stderr


def test_more_than_twice_pils_limit_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    Image.fromarray(RGB).save(path := tmp_path / 'a.png')
    assert read_photo(path).shape == (3, 40, 30)
