"Every kind of bad, odd and awkward file that a folder of photos may hold: indexed, skipped with a reason, or BadPhoto when read."
import io
import os
import struct
import sys
import warnings
import zlib
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from updetr.core import photos
from updetr.core.photos import BadPhoto, PhotoIndex, builtin_photos, index_photos, read_photo

HEIGHT, WIDTH = 48, 64
pytestmark = pytest.mark.filterwarnings('ignore:The image decoding', 'ignore::UserWarning:PIL')  # damaged TIFFs make PIL talk


def _photo():
    "A small smooth colour picture in which left, right, top and bottom differ"
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([x * 4, y * 5, 255 - 2 * (x + y)], -1).clip(0, 255).astype(np.uint8))


def _encode(image=None, format='JPEG', **options):
    buffer = io.BytesIO()
    (image or _photo()).save(buffer, format, **options)
    return buffer.getvalue()


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _png_claiming(width, height, depth=8, colour=2, data=b''):
    "A PNG with any header"
    def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')


def _sixteen_bit_rgb():
    rows = np.asarray(_photo()).astype('>u2') * 257
    return _png_claiming(WIDTH, HEIGHT, 16, 2, b''.join(b'\0' + row.astype('>u2').tobytes() for row in rows))


def _transparent_palette():
    image = _photo().quantize(16)
    return _encode(image, 'PNG', transparency=0)


def _gray(): return _photo().convert('L')


JPEG, PNG = _encode(quality=95), _encode(format='PNG')
TURNED = ImageOps.exif_transpose  # the second opinion on what is upright

# name: (content, reason of the index or None, reason of the reader or None)
CORPUS = {
    'empty.jpg': (b'', 'empty file', 'empty file'),
    'notes.txt': (b'these are not pixels', 'not an image', 'not an image'),
    'Thumbs.db': (bytes(range(256)) * 4, 'not an image', 'not an image'),
    'page.html': (b'<html>404</html>', 'not an image', 'not an image'),
    'error_page.jpg': (b'<html>404 not found</html>', 'broken image', 'broken image'),
    'drawing.svg': (b'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="90"/>', 'not an image', 'not an image'),
    'font.xbm': (b'#define a_width 64\n#define a_height 64\nstatic char a_bits[] = {0x00};', 'not an image', 'not an image'),
    'noise.png': (bytes(range(256)), 'broken image', 'broken image'),
    'header_only.jpg': (JPEG[:3], 'broken image', 'broken image'),
    'no_pixels.jpg': (JPEG[:JPEG.index(b'\xff\xda')], None, 'cannot be decoded'),
    'half.jpg': (JPEG[:len(JPEG) * 3 // 4], None, 'cannot be decoded'),
    'half.png': (PNG[:len(PNG) // 2], None, 'cannot be decoded'),
    'half.webp': (_encode(format='WEBP')[:200], 'broken image', 'broken image'),
    'half.gif': (_encode(format='GIF')[:900], None, 'cannot be decoded'),
    'half.bmp': (_encode(format='BMP')[:300], None, 'cannot be decoded'),
    'cut_in_header.png': (PNG[:20], 'broken image', 'broken image'),
    'no_zlib.png': (PNG[:41] + b'\0\0' + PNG[43:], None, 'cannot be decoded'),
    'no_data.png': (_png_claiming(64, 48), None, 'cannot be decoded'),
    'bomb.png': (_png_claiming(100_000, 100_000), 'too many pixels', 'too many pixels'),
    'large.png': (_png_claiming(9_000, 9_000), 'too many pixels', 'too many pixels'),
    'sliver.png': (_encode(Image.new('RGB', (300, 16)), 'PNG'), 'too small', None),
    'dot.gif': (_encode(Image.new('L', (1, 1)), 'GIF'), 'too small', None),
    'float.tif': (_encode(Image.fromarray(np.ones((40, 40), np.float32)), 'TIFF'), 'cannot be decoded', 'cannot be decoded'),
    'wide_range.tif': (_encode(Image.fromarray(np.full((40, 40), 1 << 20, np.int32)), 'TIFF'), None, 'cannot be decoded'),
}

# name: (content, what it must look like, grey levels of mean error allowed)
AWKWARD = {
    'plain.jpg': (JPEG, _photo(), 2),
    'plain.png': (PNG, _photo(), 0),
    'no_suffix': (PNG, _photo(), 0),
    'png_called.jpg': (PNG, _photo(), 0),
    'SHOUTING.JPEG': (JPEG, _photo(), 2),
    'progressive.jpg': (_encode(quality=95, progressive=True), _photo(), 2),
    'grey.jpg': (_encode(_gray(), quality=95), _gray(), 2),
    'grey.png': (_encode(_gray(), 'PNG'), _gray(), 0),
    'cmyk.jpg': (_encode(_photo().convert('CMYK'), quality=95), _photo(), 3),
    'palette.gif': (_encode(_photo().quantize(256), 'GIF'), _photo(), 6),
    'palette.png': (_encode(_photo().quantize(256), 'PNG'), _photo(), 6),
    'transparent_palette.png': (_transparent_palette(), None, None),
    'black_and_white.png': (_encode(_photo().convert('1'), 'PNG'), _photo().convert('1'), 0),
    'sixteen_bits.png': (_encode(Image.fromarray(np.asarray(_gray()).astype(np.uint16) * 257), 'PNG'), _gray(), 0),
    'sixteen_bits.tif': (_encode(Image.fromarray(np.asarray(_gray()).astype(np.uint16) * 257), 'TIFF'), _gray(), 0),
    'sixteen_bits.pgm': (b'P5 64 48 65535\n' + (np.asarray(_gray()).astype('>u2') * 257).astype('>u2').tobytes(), _gray(), 0),
    'sixteen_bits_rgb.png': (_sixteen_bit_rgb(), _photo(), 1),
    'clear.png': (_encode(Image.new('RGBA', (40, 40), (9, 9, 9, 0)), 'PNG'), Image.new('RGB', (40, 40), 'white'), 0),
    'half_clear.png': (_encode(Image.new('RGBA', (40, 40), (0, 0, 0, 51)), 'PNG'), Image.new('RGB', (40, 40), (204, 204, 204)), 1),
    'grey_alpha.png': (_encode(Image.new('LA', (40, 40), (7, 0)), 'PNG'), Image.new('RGB', (40, 40), 'white'), 0),
    'lossless.webp': (_encode(format='WEBP', lossless=True), _photo(), 0),
    'picture.bmp': (_encode(format='BMP'), _photo(), 0),
    'scan.tif': (_encode(format='TIFF'), _photo(), 0),
    'animation.gif': (_encode(_photo().quantize(256), 'GIF', save_all=True, append_images=[Image.new('P', (WIDTH, HEIGHT))]), _photo(), 6),
    'pages.tif': (_encode(format='TIFF', save_all=True, append_images=[Image.new('RGB', (WIDTH, HEIGHT))]), _photo(), 0),
    'broken_exif.jpg': (_encode(quality=95, exif=b'Exif\0\0' + b'\xff' * 40), _photo(), 2),
    'orientation_99.jpg': (_encode(quality=95, exif=_exif(99)), _photo(), 2),
    'smallest.png': (_encode(Image.new('RGB', (17, 17), 'red'), 'PNG'), Image.new('RGB', (17, 17), 'red'), 0),
    **{f'turned_{o}.{suffix}': (_encode(format=format, exif=_exif(o), **options), o, levels) for o in range(1, 9)
       for suffix, format, options, levels in (('jpg', 'JPEG', dict(quality=95), 2), ('png', 'PNG', {}, 0), ('tif', 'TIFF', {}, 0))},
}


def _category(reason): return reason.split(':')[0]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('photos')
    for name, (content, *_) in {**CORPUS, **AWKWARD}.items(): (root / name).write_bytes(content)
    return root


@pytest.fixture(scope='module')
def index(folder): return index_photos(folder)


def test_corpus_is_large(): assert len(CORPUS) >= 20 and len(AWKWARD) >= 20


@pytest.mark.parametrize('name', CORPUS)
def test_bad_file(folder, index, name):
    _, index_reason, read_reason = CORPUS[name]
    skipped = {path: _category(reason) for path, reason in index.skipped}
    assert skipped.get(name) == index_reason and (name in index.paths) == (index_reason is None)
    if read_reason is None:
        read_photo(folder / name)
        return
    with pytest.raises(BadPhoto) as caught: read_photo(folder / name)
    assert _category(caught.value.reason) == read_reason and name in str(caught.value)


@pytest.mark.parametrize('name', AWKWARD)
def test_awkward_photo(folder, index, name):
    _, truth, levels = AWKWARD[name]
    x = read_photo(folder / name)
    assert x.dtype == torch.uint8 and x.ndim == 3 and x.shape[0] == 3
    assert tuple(index.sizes[index.paths.index(name)]) == tuple(x.shape[1:])
    if truth is None: return
    if isinstance(truth, int):
        tagged = _photo()
        tagged.getexif()[0x0112] = truth
        truth = TURNED(tagged)
    truth = torch.from_numpy(np.array(truth.convert('RGB'))).permute(2, 0, 1)
    assert x.shape == truth.shape and (x.float() - truth).abs().mean() <= levels


def test_every_file_is_accounted_for(index):
    skipped = [path for path, _ in index.skipped]
    assert sorted(index.paths + skipped) == sorted({**CORPUS, **AWKWARD}) and index.paths == sorted(index.paths)
    for reason, n in (('too small', 2), ('too many pixels', 2), ('not an image', 5), ('empty file', 1)):
        assert f'{n} {reason}' in index.summary()


def test_same_index_for_any_number_of_threads(folder, index):
    one = index_photos(folder, workers=1)
    assert one.paths == index.paths and one.skipped == index.skipped and (one.sizes == index.sizes).all()


def test_fast_and_slow_decoder_agree(folder, monkeypatch):
    paths = [photo.path for photo in builtin_photos()] + [folder / name for name in AWKWARD if name.lower().endswith(('jpg', 'jpeg'))]
    fast = [read_photo(path) for path in paths]
    monkeypatch.setattr(photos, '_decode_jpeg', None)
    for path, x in zip(paths, fast): assert torch.equal(x, read_photo(path)), path
    with pytest.raises(BadPhoto, match='cannot be decoded'): read_photo(folder / 'half.jpg')


def test_links_pipes_and_folders_with_photo_names(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'photo.jpg').write_bytes(JPEG)
    (tmp_path / 'folder.jpg').mkdir()
    (tmp_path / 'a' / 'loop').symlink_to(tmp_path)
    (tmp_path / 'a' / 'self').symlink_to('self')
    (tmp_path / 'dead.jpg').symlink_to(tmp_path / 'gone.jpg')
    (tmp_path / 'link.jpg').symlink_to(tmp_path / 'a' / 'photo.jpg')
    os.mkfifo(tmp_path / 'pipe.jpg')
    index = index_photos(tmp_path)
    assert index.paths == ['a/photo.jpg', 'link.jpg']
    assert {path: _category(reason) for path, reason in index.skipped} == {
        'a/self': 'broken link', 'dead.jpg': 'broken link', 'pipe.jpg': 'not a regular file'}
    for bad in ('pipe.jpg', 'dead.jpg', 'folder.jpg', 'gone.jpg'):
        with pytest.raises(BadPhoto): read_photo(tmp_path / bad)


def test_linked_folders_are_followed(tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'photo.jpg').write_bytes(JPEG)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'train').symlink_to(tmp_path / 'elsewhere')
    assert index_photos(tmp_path / 'data').paths == ['train/photo.jpg']
    (tmp_path / 'all').symlink_to(tmp_path / 'data')
    assert len(index_photos(tmp_path / 'all')) == 1          # the root itself may be a link


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux allows any bytes in a file name')
def test_names_that_are_not_utf8(tmp_path):
    good, bad = os.fsencode(tmp_path) + b'/caf\xe9.png', os.fsencode(tmp_path) + b'/\xff\xfe.txt'
    for name, content in ((good, PNG), (bad, b'text')):
        with open(name, 'wb') as file: file.write(content)
    index = index_photos(tmp_path)
    assert read_photo(index.path(0)).shape == (3, HEIGHT, WIDTH)
    index.summary().encode()                                 # can be printed and logged
    index.save(tmp_path / 'index.json')
    assert PhotoIndex.load(tmp_path / 'index.json').paths == index.paths
    with pytest.raises(BadPhoto) as caught: read_photo(os.fsdecode(bad))
    str(caught.value).encode()


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='permissions do not bind the superuser')
def test_closed_files_and_folders(tmp_path):
    (tmp_path / 'open.png').write_bytes(PNG)
    (tmp_path / 'closed.png').write_bytes(PNG)
    (tmp_path / 'closed').mkdir()
    (tmp_path / 'closed.png').chmod(0)
    (tmp_path / 'closed').chmod(0)
    index = index_photos(tmp_path)
    assert index.paths == ['open.png'] and len(index.skipped) == 2
    (tmp_path / 'closed').chmod(0o700)


def test_folder_with_only_bad_files(tmp_path):
    for name in ('empty.jpg', 'notes.txt', 'noise.png', 'sliver.png'): (tmp_path / name).write_bytes(CORPUS[name][0])
    with pytest.raises(ValueError) as caught: index_photos(tmp_path)
    message = str(caught.value)
    for seen in (str(tmp_path), '4 skipped', 'notes.txt', 'empty file', 'too small', 'Expected'): assert seen in message


def test_empty_missing_and_wrong_root(tmp_path):
    with pytest.raises(ValueError, match='no usable photo'): index_photos(tmp_path)
    with pytest.raises(FileNotFoundError, match='Expected: a folder of photos'): index_photos(tmp_path / 'nowhere')
    (tmp_path / 'one.jpg').write_bytes(JPEG)
    with pytest.raises(ValueError, match='is not a folder'): index_photos(tmp_path / 'one.jpg')


def test_photos_that_change_after_indexing(tmp_path):
    for name in ('a.jpg', 'b.jpg'): (tmp_path / name).write_bytes(JPEG)
    index = index_photos(tmp_path)
    (tmp_path / 'a.jpg').unlink()
    (tmp_path / 'b.jpg').write_bytes(b'')
    for i in range(2):
        with pytest.raises(BadPhoto): read_photo(index.path(i))


def test_saved_index_that_is_none(tmp_path):
    for content in ('', '[]', '{"root": "x"}', 'no json'):
        (tmp_path / 'index.json').write_text(content)
        with pytest.raises(ValueError, match='make it anew'): PhotoIndex.load(tmp_path / 'index.json')


def _smooth(height, width):
    """A picture without detail, of which halves and quarters show the same."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize('limit, part', [(10**6, 1), (4000, 2), (1500, 4), (300, 8)])
@pytest.mark.parametrize('turn', [1, 6])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_a_jpeg_beyond_the_limit_is_decoded_smaller(tmp_path, limit, part, turn, mode):
    """At a half, a quarter or an eighth, the same way up; the header is still told of the whole."""
    image = Image.fromarray(_smooth(96, 128)).convert(mode)
    image.getexif()[0x0112] = turn
    image.save(path := tmp_path / 'a.jpg', exif=image.getexif(), quality=95)
    whole, less = read_photo(path), read_photo(path, limit, reduce=True)
    assert less[0].numel() <= limit and less.shape[1:] == tuple(-(-v // part) for v in whole.shape[1:])
    means = torch.nn.functional.avg_pool2d(whole.float(), part)
    assert (less.float() - means).abs().max() < 6
    assert photos.header_size(path, 1, limit, reduce=True) == tuple(whole.shape[1:])
    if part > 1:
        with pytest.raises(BadPhoto, match='too many pixels'): read_photo(path, limit)
        assert photos.header_size(path, 1, limit).startswith('too many pixels')


def test_what_cannot_be_decoded_smaller_is_named(tmp_path):
    """Other formats, progressive JPEGs (all their coefficients lie in memory at once), and those too large for an eighth."""
    image, path = Image.fromarray(_smooth(96, 128)), tmp_path / 'a.jpg'
    for limit, save in ((4000, dict(format='PNG')), (4000, dict(format='JPEG', progressive=True)), (100, dict(format='JPEG'))):
        image.save(path, **save)
        with pytest.raises(BadPhoto, match='too many pixels: 128x96, limit .*UPDETR_MAX_PIXELS'): read_photo(path, limit, reduce=True)
        assert photos.header_size(path, 1, limit, reduce=True).startswith('too many pixels')
    image.save(path, format='JPEG')
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(BadPhoto, match='cannot be decoded: .*truncated'): read_photo(path, 4000, reduce=True)


def test_nothing_as_large_as_the_whole_is_made(tmp_path):
    """100 megapixels, more than PIL itself opens without a warning: the pixels that are made are a quarter of them."""
    Image.new('L', (10_000, 10_000), 99).save(path := tmp_path / 'a.jpg')
    with warnings.catch_warnings(), patch.object(photos, '_decode_jpeg', None):
        warnings.simplefilter('error')
        assert read_photo(path, reduce=True).shape == (3, 5000, 5000)


def test_any_damage_is_a_bad_photo_or_a_photo(tmp_path):
    "Random bytes changed in real files: an image or BadPhoto, never another exception"
    rng, path = np.random.default_rng(0), tmp_path / 'damaged'
    for content in (JPEG, PNG, _encode(format='WEBP'), _encode(format='GIF'), _encode(format='TIFF'), _encode(format='BMP')):
        for _ in range(40):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(0, min(len(damaged), 400), 4)] = rng.integers(0, 256, 4)
            path.write_bytes(damaged[:rng.integers(20, len(damaged) + 1)].tobytes())
            for limit, reduce in ((10**6, False), (1000, True)):
                try: x = read_photo(path, limit, reduce)
                except BadPhoto as e: assert e.reason
                else: assert x.dtype == torch.uint8 and x.shape[0] == 3 and x[0].numel() <= limit
            try: index_photos(tmp_path, max_pixels=10 ** 6, workers=1)
            except ValueError: pass
