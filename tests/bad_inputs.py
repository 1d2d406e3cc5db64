"""A table of bad inputs that can be run and counted: each is a named error, or a counted skip.

An error is named if its type is one that the product documents and its message holds the file's name or the value. What these
files have in common with those of test_bad_photos.py and test_bad_datasets.py is taken from there, so that all are in one table.
"""
import argparse
import json
import os
import pickle
import signal
import struct
import time
import zipfile
import zlib
from contextlib import contextmanager

import torch
from safetensors.torch import save_file

from test_bad_datasets import UNOPENED, UNSOUND, change, coco, content, voc
from test_bad_photos import CORPUS, JPEG, PNG, _png_claiming
from updetr.core.checkpoint import load_checkpoint, read_state_dict, read_weights
from updetr.core.config import make_config
from updetr.core.photos import BadPhoto, PhotoIndex, index_photos, read_photo
from updetr.data.check import check_dataset
from updetr.data.datasets import open_dataset
from updetr.model.pretrained import load_official, open_pretrained
from updetr.model.weights import load_updetr
from updetr.predict.detector import Detector
from updetr.tasks.finetune import finetune_config
from updetr.train.launch import is_alive, prepare, torchrun_command
from updetr.train.loop import run

NAMED = (ValueError, FileNotFoundError, BadPhoto, RuntimeError)  # exactly these, no subclass that comes from the depths


class Hangs(Exception):
    """An input kept us longer than it may."""


@contextmanager
def at_most(seconds):
    def late(*_): raise Hangs(f'longer than {seconds} s')
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# ---- making files --------------------------------------------------------------------------------------------------

def put(folder, name, data):
    """A file; its path."""
    (path := folder / name).parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def photo(folder, name, data):
    return read_photo(put(folder, name, data))


def skips(folder, name, data):
    """A folder with one good photo and this file: the skipped ones."""
    put(folder, 'good.png', PNG)
    put(folder, name, data)
    return index_photos(folder).skipped


def opened(folder, **more):
    """A COCO set with changes of the sound one, checked: what the report complains of."""
    report = check_dataset(open_dataset(coco(folder, content() | more), 'train'))
    return [*report.errors, *report.warnings]


def box(*numbers):
    data = content()
    data['annotations'][0]['bbox'] = list(numbers)
    return {'annotations': data['annotations']}


def torch_file(folder, state, name='weights.pth', **options):
    torch.save(state, path := folder / name, **options)
    return path


def flipped(path, at=.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)
    return path


class Runs:
    """Makes a folder when it is unpickled."""
    made = 'MADE'
    def __reduce__(self): return os.mkdir, (self.made,)


class Evals:
    def __reduce__(self): return eval, ('__import__("os").mkdir("MADE")',)


def zip_bomb(folder):
    """A torch file with a compressed part of 2 GB."""
    path = torch_file(folder, {'model': {'w': torch.zeros(4)}, 'args': {}})
    with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as z, z.open('archive/data/9', 'w', force_zip64=True) as part:
        for _ in range(20): part.write(bytes(10_000_000))
    return path


def sparse(folder, name, size):
    with open(path := folder / name, 'wb') as f: f.truncate(size)
    return path


def header(folder, text, body=b''):
    """A .safetensors file with any header."""
    return put(folder, 'weights.safetensors', struct.pack('<Q', len(text)) + text.encode() + body)


def huge_view():
    """Four bytes that say they are a tensor of 4 TB."""
    return {'model': {'input_proj.weight': torch.zeros(1, dtype=torch.half).expand(10**12)}, 'args': {}}


CFG = dict(views=8, num_queries=10, num_patches=5, hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=1)


def run_with(folder, text):
    run(put(folder, 'cfg.json', text))


def cfg_text(**changes):
    import dataclasses
    return json.dumps(dataclasses.asdict(make_config('demo', **CFG)) | changes)


def in_run(name, text, use):
    """A run folder with one damaged file, used."""
    def act(folder):
        put(folder, name, text)
        return use(folder)
    return act


LAYOUT = {'w': torch.zeros(2)}
BAD_PTH = {
    'zero bytes': lambda f: put(f, 'weights.pth', b''),
    'text': lambda f: put(f, 'weights.pth', 'hello'),
    'a JPEG': lambda f: put(f, 'weights.pth', JPEG),
    'half a file': lambda f: put(f, 'weights.pth', torch_file(f, {'model': LAYOUT}).read_bytes()[:300]),
    'flipped bit': lambda f: flipped(torch_file(f, {'model': {'w': torch.randn(20_000)}, 'args': {}})),
    'a pickle that runs os.mkdir': lambda f: torch_file(f, {'model': Runs(), 'args': {}}),
    'a pickle that runs eval': lambda f: torch_file(f, {'model': LAYOUT, 'args': Evals()}),
    'old format, runs os.mkdir': lambda f: torch_file(f, {'model': Runs(), 'args': {}}, _use_new_zipfile_serialization=False),
    'a bare pickle that runs': lambda f: put(f, 'weights.pth', pickle.dumps(Runs())),
    'a Namespace that hides one': lambda f: torch_file(f, {'model': LAYOUT, 'args': argparse.Namespace(x=Runs())}),
    'a whole module': lambda f: torch_file(f, torch.nn.Linear(2, 2)),
    'a list': lambda f: torch_file(f, [1, 2]),
    'a tensor': lambda f: torch_file(f, torch.zeros(3)),
    'empty dictionary': lambda f: torch_file(f, {}),
    'model is a number': lambda f: torch_file(f, {'model': 5, 'args': {}}),
    'args is a text': lambda f: torch_file(f, {'model': LAYOUT, 'args': 'lr=1'}),
    'numbers for names': lambda f: torch_file(f, {'model': {1: torch.zeros(2)}, 'args': {}}),
    'zip bomb': zip_bomb,
    'a zip of something else': lambda f: _zip(f),
    'foreign tensors': lambda f: torch_file(f, {'model': {'conv.weight': torch.zeros(2)}, 'args': {}}),
    'a view of 4 TB': lambda f: torch_file(f, huge_view()),
    'a folder': lambda f: _folder(f / 'weights.pth'),
    'a link to itself': lambda f: _link(f / 'weights.pth'),
    'ten million zeros': lambda f: sparse(f, 'weights.pth', 10**7),
}
BAD_SAFE = {
    'safetensors, zero bytes': lambda f: put(f, 'weights.safetensors', b''),
    'safetensors, text': lambda f: put(f, 'weights.safetensors', 'hello, I am not'),
    'safetensors, huge header': lambda f: put(f, 'weights.safetensors', struct.pack('<Q', 2**62) + b'{}'),
    'safetensors, no JSON': lambda f: header(f, '{{{{'),
    'safetensors, beyond its end': lambda f: header(f, '{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
    'safetensors, no configuration': lambda f: _safe(f, {}),
    'safetensors, broken configuration': lambda f: _safe(f, {'config': '{'}),
    'safetensors, configuration is a number': lambda f: _safe(f, {'config': '5'}),
    'safetensors, foreign configuration': lambda f: _safe(f, {'config': '{"lr": 1}'}),
}


def _zip(folder):
    with zipfile.ZipFile(path := folder / 'weights.pth', 'w') as z: z.writestr('readme.txt', 'hello')
    return path


def _folder(path):
    path.mkdir()
    return path


def _link(path):
    path.symlink_to(path)
    return path


def _safe(folder, metadata):
    save_file(LAYOUT, path := folder / 'weights.safetensors', metadata)
    return path


READERS = {'load_checkpoint': load_checkpoint, 'read_weights': read_weights, 'load_updetr': load_updetr, 'load_official': load_official,
           'open_pretrained': open_pretrained, 'read_state_dict': read_state_dict, 'Detector': Detector.from_checkpoint}
PLAIN = {  # what a reader of plain data may return: the file is sound as far as it can tell
    'load_checkpoint': {'a list', 'a tensor', 'empty dictionary', 'model is a number', 'args is a text', 'numbers for names',
                        'foreign tensors', 'a view of 4 TB'},
    'read_weights': {'numbers for names', 'foreign tensors', 'a view of 4 TB', 'safetensors, foreign configuration'},
    'read_state_dict': {'flipped bit', 'empty dictionary', 'numbers for names', 'args is a text', 'foreign tensors', 'a view of 4 TB',
                        'safetensors, no configuration', 'safetensors, broken configuration', 'safetensors, configuration is a number',
                        'safetensors, foreign configuration'},
    'load_official': {'foreign tensors', 'safetensors, no configuration', 'safetensors, broken configuration',
                      'safetensors, configuration is a number', 'safetensors, foreign configuration'}}

# ---- the table: name -> (folder -> anything), words of the message or the skips ------------------------------------

TABLE = {}
for reader, read in READERS.items():
    for kind, make in (BAD_PTH | BAD_SAFE).items():
        if kind in PLAIN.get(reader, ()) or (reader == 'load_checkpoint' and kind in BAD_SAFE): continue
        TABLE[f'{reader}: {kind}'] = (lambda f, make=make, read=read: read(make(f)), ['weights'])
    TABLE[f'{reader}: nothing there'] = (lambda f, read=read: read(f / 'weights.pth'), ['weights.pth'])

for name, (data, skipped, refused) in CORPUS.items():
    if skipped: TABLE[f'index_photos: {name}'] = (lambda f, name=name, data=data: skips(f, name, data), [name, skipped])
    if refused: TABLE[f'read_photo: {name}'] = (lambda f, name=name, data=data: photo(f, name, data), [name, refused])
for kind, (act, words) in UNOPENED.items(): TABLE[f'open_dataset: {kind}'] = (act, words)
for kind, (data, _, words) in UNSOUND.items():
    TABLE[f'check_dataset: {kind}'] = (lambda f, data=data: opened(f, **data), words)


def _loop(folder):
    put(folder, 'good.png', PNG)
    for name in ('a', 'b'): (folder / name).symlink_to(folder / ('b' if name == 'a' else 'a'))
    (folder / 'up').symlink_to(folder)
    return index_photos(folder).skipped


def _pipe(folder):
    os.mkfifo(folder / 'pipe.jpg')
    return read_photo(folder / 'pipe.jpg')


def _raw_name(folder):
    path = os.fsencode(folder) + b'/caf\xe9.jpg'
    with open(path, 'wb') as f: f.write(b'no photo')
    return read_photo(os.fsdecode(path))


def _text_bomb(kind):
    """A PNG whose text or profile unpacks to 100 MB."""
    packed = zlib.compress(bytes(100_000_000))
    body = b'k\0\0' + packed
    chunk = struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    return PNG[:33] + chunk + PNG[33:]


def laughs(levels=9):
    parts = ''.join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, levels))
    return f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY l0 "ha">{parts}]><annotation>&l{levels - 1};</annotation>'


def deep_xml(): return '<annotation>' + '<object>' * 50_000 + '</object>' * 50_000 + '</annotation>'


def coco_text(text): return lambda f: open_dataset(coco(f, text=text), 'train')
def with_box(*numbers): return lambda f: opened(f, **box(*numbers))
def changed(where, k, **values): return lambda f: opened(f, **change(where, k, **values))
def configured(**changes): return lambda f: make_config('demo', **changes)
def tuned(**changes): return lambda f: finetune_config('demo', **changes)


TABLE |= {
    'index_photos: links in a circle': (_loop, ['a', 'broken link']),
    'read_photo: a pipe': (_pipe, ['pipe.jpg', 'not a regular file']),
    'read_photo: a name that is no UTF-8': (_raw_name, ['caf\\xe9.jpg']),
    'read_photo: text bomb in a PNG': (lambda f: photo(f, 'bomb.png', _text_bomb(b'zTXt')), ['bomb.png']),
    'read_photo: a gigapixel TIFF': (lambda f: photo(f, 'big.tif', b'II*\0\x08\0\0\0\2\0\0\1\4\0\1\0\0\0\xff\xff\xff\x7f'
                                                     b'\1\1\4\0\1\0\0\0\xff\xff\xff\x7f\0\0\0\0'), ['big.tif']),
    'read_photo: zero width': (lambda f: photo(f, 'flat.png', _png_claiming(0, 9)), ['flat.png']),
    'read_photo: a folder': (lambda f: read_photo(f), ['not a regular file']),
    'index_photos: a file': (lambda f: index_photos(put(f, 'a.jpg', JPEG)), ['a.jpg', 'is not a folder']),
    'index_photos: nowhere': (lambda f: index_photos(f / 'nowhere'), ['nowhere']),
    'PhotoIndex: no JSON': (lambda f: PhotoIndex.load(put(f, 'photos.json', '{"root"')), ['photos.json']),
    'PhotoIndex: zero bytes': (lambda f: PhotoIndex.load(put(f, 'photos.json', '')), ['photos.json']),
    'PhotoIndex: deep': (lambda f: PhotoIndex.load(put(f, 'photos.json', '[' * 100_000)), ['photos.json']),
    'open_dataset: zero bytes': (coco_text(''), ['instances_train2017.json']),
    'open_dataset: JSON in latin-1': (lambda f: open_dataset(_latin(f), 'train'), ['instances_train2017.json']),
    'open_dataset: categories are numbers': (coco_text(json.dumps(content() | {'categories': [1, 2]})), ['categories[0]']),
    'open_dataset: an annotation is null': (coco_text(json.dumps(content() | {'annotations': [None]})), ['annotations[0]']),
    'open_dataset: image id is a list': (coco_text(json.dumps(change('images', 0, id=[1]))), ['images[0] has id [1]']),
    'open_dataset: category id is a dictionary': (coco_text(json.dumps(change('categories', 0, id={'a': 1}))), ['categories[0] has id']),
    'open_dataset: file name is a number': (coco_text(json.dumps(change('images', 0, file_name=7))), ['7']),
    'open_dataset: file name with NUL': (coco_text(json.dumps(change('images', 0, file_name='a\0b'))), ['a\\x00b']),
    'open_dataset: home folder': (coco_text(json.dumps(change('images', 0, file_name='../1.jpg'))), ['../1.jpg']),
    'open_dataset: backslashes': (coco_text(json.dumps(change('images', 0, file_name='..\\1.jpg'))), ['1.jpg']),
    'open_dataset: a drive': (coco_text(json.dumps(change('images', 0, file_name='C:1.jpg'))), ['C:1.jpg']),
    'open_dataset: width is a text': (coco_text(json.dumps(change('images', 0, width='wide', file_name='9.jpg'))), ['9.jpg']),
    'open_dataset: negative width': (coco_text(json.dumps(change('images', 0, width=-5, file_name='9.jpg'))), ['9.jpg']),
    'open_dataset: width is infinite': (coco_text(json.dumps(change('images', 0, width=float('inf'), file_name='9.jpg'))), ['9.jpg']),
    'open_dataset: width of 400 digits': (coco_text(json.dumps(change('images', 0, width=10**400, file_name='9.jpg'))), ['9.jpg']),
    'open_dataset: a number of 5000 digits': (coco_text('{"images": [' + '9' * 5000 + ']}'), ['instances_train2017.json']),
    'open_dataset: billion laughs': (lambda f: open_dataset(voc(f, xml=laughs()), 'trainval'), ['a.xml', 'DOCTYPE']),
    'open_dataset: external entity': (lambda f: open_dataset(voc(f, head='<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hosts">]>'),
                                                             'trainval'), ['a.xml', 'DOCTYPE']),
    'open_dataset: parameter entity': (lambda f: open_dataset(voc(f, head='<!DOCTYPE a [<!ENTITY % x SYSTEM "http://x/"> %x;]>'),
                                                              'trainval'), ['a.xml', 'DOCTYPE']),
    'open_dataset: deep XML': (lambda f: open_dataset(voc(f, xml=deep_xml()), 'trainval'), ['a.xml']),
    'open_dataset: XML of zero bytes': (lambda f: open_dataset(voc(f, xml=' '), 'trainval'), ['a.xml']),
    'open_dataset: XML is a photo': (lambda f: open_dataset(_photo_as_xml(f), 'trainval'), ['a.xml']),
    'open_dataset: list is no UTF-8': (lambda f: open_dataset(_raw_list(f), 'trainval'), ['caf\\xe9.xml', 'cannot be read']),
    'open_dataset: list names a folder above': (lambda f: open_dataset(voc(f, names=('..',)), 'trainval'), ["'..'"]),
    'open_dataset: link out of the photos': (lambda f: open_dataset(_linked(f), 'train')[0], ['1.jpg']),
    'check_dataset: huge box': (with_box(0, 0, 1e30, 1e30), ['stick out']),
    'check_dataset: far away': (with_box(-1e30, -1e30, 5, 5), ['outside']),
    'check_dataset: NaN width': (with_box(1, 2, float('nan'), 4), ['not four finite numbers']),
    'check_dataset: minus infinity': (with_box(float('-inf'), 2, 3, 4), ['not four finite numbers']),
    'check_dataset: three numbers': (with_box(1, 2, 3), ['not four finite numbers']),
    'check_dataset: nested box': (with_box([1], 2, 3, 4), ['not four finite numbers']),
    'check_dataset: box of nothing': (with_box(), ['not four finite numbers']),
    'check_dataset: numbers of 400 digits': (with_box(10**400, 2, 3, 4), ['not four finite numbers']),
    'check_dataset: zero box': (with_box(5, 5, 0, 0), ['without area']),
    'check_dataset: area is NaN': (changed('annotations', 0, bbox=[300, 40, -40, 300], area=float('nan')), ['has area nan']),
    'make_config: unknown preset': (lambda f: make_config('demi'), ["'demi'"]),
    'make_config: unknown name': (configured(learning_rate=1), ['learning_rate']),
    'make_config: text for number': (configured(lr='fast'), ["'fast'"]),
    'make_config: a list': (configured(epochs=[1]), ['epochs', '[1]']),
    'make_config: a fraction of an epoch': (configured(epochs=1.5), ['epochs', '1.5']),
    'make_config: truth for number': (configured(epochs=True), ['epochs', 'True']),
    'make_config: negative': (configured(lr=-1.), ['lr', '-1']),
    'make_config: zero': (configured(batch_size=0), ['batch_size', '0']),
    'make_config: NaN': (configured(lr=float('nan')), ['lr', 'nan']),
    'make_config: infinite': (configured(lr=float('inf')), ['lr', 'inf']),
    'make_config: infinite decay': (configured(weight_decay=float('inf')), ['weight_decay', 'inf']),
    'make_config: dropout above one': (configured(dropout=1.5), ['dropout', '1.5']),
    'make_config: heads': (configured(nheads=7), ['nheads 7']),
    'make_config: patches': (configured(num_patches=7), ['num_patches 7']),
    'make_config: accumulate': (configured(accumulate=3), ['accumulate 3']),
    'make_config: a schedule': (configured(schedule='linear'), ["'linear'"]),
    'make_config: shell words': (configured(schedule='$(touch MADE)'), ['$(touch MADE)']),
    'finetune_config: unknown preset': (lambda f: finetune_config('voc'), ["'voc'"]),
    'finetune_config: unknown detector': (tuned(detector='yolo'), ["'yolo'"]),
    'finetune_config: half of the scenes': (tuned(scenes=0), ['scenes']),
    'finetune_config: negative': (tuned(photos=-1), ['photos']),
    'finetune_config: no checkpoint': (lambda f: finetune_config('demo', pretrain=str(f / 'no.pth')), ['no.pth']),
    'finetune_config: checkpoint is text': (lambda f: finetune_config('demo', pretrain=str(put(f, 'bad.pth', 'x'))), ['bad.pth']),
    'run: no JSON': (lambda f: run_with(f, '{'), ['cfg.json']),
    'run: a list': (lambda f: run_with(f, '[]'), ['cfg.json', 'list']),
    'run: zero bytes': (lambda f: run_with(f, ''), ['cfg.json']),
    'run: nothing there': (lambda f: run(f / 'cfg.json'), ['cfg.json']),
    'run: unknown task': (lambda f: run_with(f, '{"task": "dance"}'), ["'dance'"]),
    'run: task is a module elsewhere': (lambda f: run_with(f, '{"task": "../os"}'), ["'../os'"]),
    'run: task is a list': (lambda f: run_with(f, '{"task": []}'), ['[]']),
    'run: text for number': (lambda f: run_with(f, cfg_text(epochs='many')), ["'many'"]),
    'run: null': (lambda f: run_with(f, cfg_text(lr=None)), ['lr', 'None']),
    'run: NaN': (lambda f: run_with(f, cfg_text(lr=float('nan'))), ['nan']),
    'run: no photos': (lambda f: run_with(f, cfg_text(data='/nowhere/at/all')), ['/nowhere/at/all']),
    'launch: damaged cfg.json': (in_run('cfg.json', '{', lambda f: prepare(f, {'a': 1})), ['cfg.json']),
    'launch: damaged launch.json': (in_run('launch.json', '{', is_alive), ['launch.json']),
    'launch: no process': (lambda f: torchrun_command(f, 0), ['processes=0']),
    'launch: nowhere to meet': (lambda f: torchrun_command(f, 1, nnodes=2), ['rdzv_endpoint']),
    'launch: changed': (in_run('cfg.json', '{"a": 1}', lambda f: prepare(f, {'a': 2})), ['a: 1 -> 2']),
}


def _latin(folder):
    root = coco(folder, text='')
    (root / 'annotations/instances_train2017.json').write_bytes('{"images": "é"}'.encode('latin-1'))
    return root


def _photo_as_xml(folder):
    root = voc(folder)
    (root / 'VOC2007/Annotations/a.xml').write_bytes(JPEG)
    return root


def _raw_list(folder):
    root = voc(folder)
    (root / 'VOC2007/ImageSets/Main/trainval.txt').write_bytes(b'caf\xe9\n')
    return root


def _linked(folder):
    """The first photo is a link to a text outside."""
    root = coco(folder)
    put(folder, 'outside/secret.txt', 'secret')
    (root / 'train2017/1.jpg').unlink()
    (root / 'train2017/1.jpg').symlink_to(folder / 'outside/secret.txt')
    return root


def judge(name, folder, seconds=120):
    """('named_error' | 'counted_skip' | why it is neither, seconds of work)."""
    act, words = TABLE[name]
    begun, here = time.process_time(), os.getcwd()
    os.chdir(folder)
    try:
        with at_most(seconds): answer = act(folder)
    except Hangs as e: return str(e), seconds
    except Exception as e: told, kind = str(e), 'named_error' if type(e) in NAMED else f'{type(e).__name__}: {str(e)[:200]}'
    else:
        told, kind = str(answer), 'counted_skip' if isinstance(answer, list) and answer else f'accepted: {str(answer)[:100]}'
    finally: os.chdir(here)
    if kind in ('named_error', 'counted_skip'):
        missing = [w for w in words if w not in told]
        if missing: kind = f'{missing} not in: {told[:300]}'
    return kind, time.process_time() - begun


def count(root):
    """Run the table: {tried, named_error, counted_skip, other: {name: why}}, pickles that were executed, the longest work in seconds."""
    counts, executed, longest = {'tried': 0, 'named_error': 0, 'counted_skip': 0, 'other': {}}, 0, 0.
    for i, name in enumerate(TABLE):
        (folder := root / str(i)).mkdir()
        kind, seconds = judge(name, folder)
        counts['tried'] += 1
        if kind in counts: counts[kind] += 1
        else: counts['other'][name] = kind
        executed, longest = executed + (folder / 'MADE').exists(), max(longest, seconds)
    return counts, executed, longest
