"""Features that are kept: used where they belong to what is asked for and are whole, else made anew; what the notebook 30
shows with a toy is shown here with the tasks, with processes, and with anything that a file can hold."""
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from test_resume import as_in_the_processes  # noqa: F401 (a fixture: one thread)
from test_task import make_task as pretrain_task
from test_task import save_photos
from updetr.data.loader import PatchTask, data_loader
from updetr.model.backbone import Backbone
from updetr.tasks.finetune import finetune_config
from updetr.tasks.finetune_task import FinetuneTask
from updetr.tasks.oneshot import oneshot_config
from updetr.tasks.oneshot_task import OneShotTask
from updetr.train import features
from updetr.train.features import FeatureBank, Source, Stored, cnn_key, common_sides, open_features, photos_key
from updetr.train.loop import Processes

CNN = dict(backbone='test_resnet', features='layer1')
VIEWS = dict(views=5, view_size=32, cache_features=True, batch_size=1, **CNN)
TINY = CNN | dict(weights='none', scenes=0, scenes_val=0, square=32, cached_views=2, frozen_backbone=True, batch_size=1, hidden_dim=16,
                  nheads=2, dim_feedforward=16, enc_layers=1, dec_layers=1, num_queries=4, epochs=1)


@pytest.fixture
def computed(monkeypatch):
    """Count how often the CNN is asked for the features of a photo or of some views."""
    count = Counter()

    def counting(module, name):
        function = getattr(module, name)

        def wrapped(*args, **kwargs):
            count[name] += 1
            return function(*args, **kwargs)
        monkeypatch.setattr(module, name, wrapped)

    import updetr.tasks.finetune_task
    import updetr.tasks.oneshot_task
    counting(features, 'encode_views')
    counting(updetr.tasks.finetune_task, 'image_features')
    counting(updetr.tasks.oneshot_task, 'picture_features')
    return count


def begun(task):
    task.begin(resumed=False)
    return task


def kept(folder): return {p.name: p for p in (folder / 'banks').iterdir()}


# ---- pre-training ---------------------------------------------------------------------------------------------------

def pretrained_parts(folder, **changes):
    """The bank of a pre-training run."""
    return begun(pretrain_task(folder, 'demo', **VIEWS | changes)).bank.parts


def save_cnn(path, seed):
    torch.manual_seed(seed)
    torch.save(Backbone('test_resnet', ['layer4']).body.state_dict(), path)


def test_other_weights_under_the_same_path(tmp_path):
    photos, path = str(save_photos(tmp_path / 'photos')), tmp_path / 'cnn.pth'
    parts = []
    for seed in (0, 1, 0):
        save_cnn(path, seed)
        parts.append(pretrained_parts(tmp_path / 'runs' / str(len(parts)), data=photos, weights=str(path))['feature'])
    assert not torch.equal(*parts[:2]) and torch.equal(*parts[::2]) and len(kept(tmp_path / 'runs')) == 2
    os.rename(path, tmp_path / 'moved.pth')
    again = pretrained_parts(tmp_path / 'runs' / '3', data=photos, weights=str(tmp_path / 'moved.pth'))
    assert torch.equal(again['feature'], parts[0]) and len(kept(tmp_path / 'runs')) == 2


@pytest.mark.parametrize('size', [(90, 60), (64, 80)], ids=['same size', 'other size'])
def test_other_photos_under_the_same_names(tmp_path, size):
    """In one kernel, too, where decoded photos are remembered."""
    parts = []
    for start in (0, 10, 0):
        photos = save_photos(tmp_path / 'photos', start=start, size=size if start else (90, 60))
        parts.append(pretrained_parts(tmp_path / 'runs' / str(len(parts)), data=str(photos)))
    assert not torch.equal(parts[0]['feature'], parts[1]['feature']) and len(kept(tmp_path / 'runs')) == 2
    assert all(torch.equal(parts[0][k], parts[2][k]) for k in parts[0])


def test_a_photo_more_and_a_photo_fewer(tmp_path):
    photos = save_photos(tmp_path / 'photos')
    first = pretrained_parts(tmp_path / 'runs' / '0', data=str(photos))['feature']
    save_photos(photos, 1, start=20).joinpath('0.jpg').rename(photos / '9.jpg')
    save_photos(photos, 1)
    more = pretrained_parts(tmp_path / 'runs' / '1', data=str(photos))['feature']
    (photos / '9.jpg').unlink()
    assert not torch.equal(first, more) and torch.equal(first, pretrained_parts(tmp_path / 'runs' / '2', data=str(photos))['feature'])


def test_a_relative_folder_is_where_it_is_now(tmp_path, monkeypatch):
    parts = []
    for place in ('a', 'b'):
        save_photos(tmp_path / place / 'photos', start=len(parts) * 10)
        monkeypatch.chdir(tmp_path / place)
        parts.append(pretrained_parts(tmp_path / 'runs' / place, data='photos')['feature'])
    assert not torch.equal(*parts) and len(kept(tmp_path / 'runs')) == 2
    moved = pretrained_parts(tmp_path / 'runs' / 'c', data=str(tmp_path / 'a' / 'photos'))['feature']  # the same data by another path
    assert torch.equal(parts[0], moved) and len(kept(tmp_path / 'runs')) == 2


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return str(save_photos(tmp_path_factory.mktemp('photos')))


@pytest.mark.parametrize('name', ['feature.npy', 'patch_feature.npy', 'boxes.npy'])
def test_damaged_files_of_pre_training(tmp_path, photos, name, computed, capfd):
    """Half, nothing, one bit, another file of this size: said, and made anew with the same bits."""
    def parts(): return pretrained_parts(tmp_path / 'run', data=photos)
    whole = {k: v.clone() for k, v in parts().items()}
    path, = tmp_path.glob(f'banks/*/{name}')
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-7] ^= 4
    damages = {data[:len(data) // 2]: 'bytes instead of', b'': 'has 0 bytes', bytes(flipped): 'checksum', data[::-1]: 'checksum'}
    for damage, word in damages.items():
        path.write_bytes(damage)
        computed.clear()
        assert all(torch.equal(whole[k], v) for k, v in parts().items()) and path.read_bytes() == data and computed['encode_views'] == 3
        said = capfd.readouterr().out
        assert name in said and word in said and said.count('made anew') == 1
    computed.clear()
    parts()
    assert computed['encode_views'] == 1  # whole: only the first view is looked at


def test_what_does_not_change_features_shares_them(tmp_path, photos, computed):
    pretrained_parts(tmp_path / 'a', data=photos, num_patches=2, cached_patches=2)
    computed.clear()
    pretrained_parts(tmp_path / 'b', data=photos, num_patches=1, cached_patches=2, num_queries=8, mask_ratio=.5, lr=1., hidden_dim=32)
    assert computed['encode_views'] == 1 and len(kept(tmp_path)) == 1
    for change in (dict(seed=7), dict(view_size=48), dict(views=6), dict(patch_size=16), dict(patch_law='fixed'), dict(collage=0.)):
        pretrained_parts(tmp_path / 'c', data=photos, num_patches=2, **change)
    assert len(kept(tmp_path)) == 7


def test_a_dilated_cnn_has_the_weights_of_the_plain_one():
    plain, dilated = (Backbone('resnet50', dilation=d) for d in (False, True))
    dilated.load_state_dict(plain.state_dict())
    assert features.weights_key(plain) == features.weights_key(dilated) and cnn_key(plain) != cnn_key(dilated)


@pytest.mark.parametrize('change', [dict(mean=(.4, .4, .4)), dict(std=(.3, .3, .3)), dict(name='b'), dict(features=['a'])], ids=str)
def test_all_that_features_depend_on_is_in_the_key_of_a_cnn(change, monkeypatch):
    cnn = Backbone('test_resnet', ['layer4'])
    before = cnn_key(cnn)
    for name, value in change.items(): monkeypatch.setattr(cnn, name, value)
    assert cnn_key(cnn) == before | change


def test_broken_photos_of_views_are_told(tmp_path):
    photos = save_photos(tmp_path / 'photos')
    (broken := photos / '1.jpg').write_bytes(broken.read_bytes()[:700])
    pretrained_parts(tmp_path / 'run', data=str(photos))
    said, = tmp_path.glob('banks/*/skipped.json')
    assert '1.jpg' in said.read_text()


def test_a_quarter_of_the_queries_loses_its_patch():
    stored = Stored({'feature': torch.zeros(2, 8, 1, 1), 'patch_feature': torch.zeros(2, 4, 8), 'boxes': torch.zeros(2, 4, 4)}, [])
    bank = FeatureBank(stored, PatchTask(4, 10_000, 32, mask_ratio=.25))
    chosen, keep = bank.draw([(0, 1, 32), (3, 1, 32)])
    assert chosen.tolist() == [[0, 1, 2, 3]] * 2 and keep.float().mean(1).tolist() == pytest.approx([.75, .75], abs=.02)
    assert not torch.equal(*keep)


def test_photos_that_have_room_on_a_gpu(tmp_path, monkeypatch):
    "Limits that are hit exactly; height before width; broken ones take no room."
    folder = save_photos(tmp_path / 'photos', 2, size=(90, 60))
    (folder / '2.jpg').write_bytes(b'')
    paths = sorted(map(str, folder.iterdir()))
    room = 3 * 90 * 60 * len(paths)
    assert len(paths) == 3 and common_sides(paths, room) == (60, 90) and common_sides(paths, room - 1) is None
    assert common_sides(paths[2:], room) is None
    for largest, fits in ((90 * 60, True), (90 * 60 - 1, False)):
        monkeypatch.setattr(features, 'WHOLE_PIXELS', largest)
        assert bool(common_sides(paths, room)) == fits


def test_features_are_the_same_up_to_rounding():
    x = torch.rand(4, 5)
    assert features._same(x, x * 1.01) and not features._same(x, x * 1.05)


# ---- labelled photos ------------------------------------------------------------------------------------------------

def save_set(folder, n=3, shift=0, start=0, classes=('cat', 'dog')):
    """A COCO file with `n` photos of noise beside it, a box in each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(start + i).integers(0, 255, (32, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')
    images = [{'id': i, 'file_name': f'{i}.png', 'height': 32, 'width': 40} for i in range(n)]
    boxes = [{'id': i, 'image_id': i, 'category_id': i % 2, 'bbox': [4 + shift, 4, 20, 16], 'area': 320, 'iscrowd': 0} for i in range(n)]
    categories = [{'id': k, 'name': name} for k, name in enumerate(classes)]
    (folder / 'set.json').write_text(json.dumps({'images': images, 'annotations': boxes, 'categories': categories}))
    return dict(data=str(folder / 'set.json'), data_val=str(folder / 'set.json'))


def labelled(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    return begun(FinetuneTask(finetune_config('demo', **TINY | changes), folder, Processes()))


def boxes(task, part): return task.cached[part].batch([(0, i) for i in range(len(task.train_set))])['targets']


def test_corrected_annotations_are_trained_and_measured_on(tmp_path, computed):
    """The boxes of the cached views, too, are those of now; and going back finds what was kept."""
    labelled(tmp_path / 'a', **save_set(tmp_path / 'data'))
    after = labelled(tmp_path / 'b', **save_set(tmp_path / 'data', shift=8))
    for part in (0, 1):
        live = [after.views if part == 0 else after.val_views][0]
        for target, i in zip(boxes(after, part), range(3), strict=True): assert torch.equal(target['boxes'], live[0, i][1]['boxes'])
    computed.clear()
    labelled(tmp_path / 'c', **save_set(tmp_path / 'data'))
    assert computed['image_features'] == 2 and len(kept(tmp_path)) == 4


@pytest.mark.parametrize('change', [dict(n=4), dict(n=2), dict(start=9), dict(classes=('dog', 'cat'))],
                         ids=['a photo more', 'a photo fewer', 'other photos', 'classes exchanged'])
def test_changed_sets(tmp_path, change):
    labelled(tmp_path / 'a', **save_set(tmp_path / 'data'))
    task = labelled(tmp_path / 'b', **save_set(tmp_path / 'data', **change))
    assert len(task.cached[1].feature) == len(task.val_set) and len(kept(tmp_path)) == 4
    for i, target in enumerate(boxes(task, 1)): assert torch.equal(target['labels'], task.val_views[0, i][1]['labels'])
    now = labelled(tmp_path / 'other' / 'c', **save_set(tmp_path / 'data', **change))  # without anything kept
    assert torch.equal(task.cached[0].feature, now.cached[0].feature)


def test_another_set_in_the_environment(tmp_path, monkeypatch):
    """`UPDETR_DATA` is no part of the configuration."""
    found = []
    for name, start in (('a', 0), ('b', 9)):
        for part in ('train', 'val'):
            save_set(tmp_path / name / f'{part}2017', start=start)
            (tmp_path / name / 'annotations').mkdir(exist_ok=True)
            os.rename(tmp_path / name / f'{part}2017' / 'set.json', tmp_path / name / 'annotations' / f'instances_{part}2017.json')
        monkeypatch.setenv('UPDETR_DATA', str(tmp_path / name))
        found.append(labelled(tmp_path / 'runs' / name).cached[0].feature)
    assert not torch.equal(*found)


def test_a_set_that_moved_is_the_same_set(tmp_path, computed):
    one = labelled(tmp_path / 'a', **save_set(tmp_path / 'data'))
    computed.clear()
    two = labelled(tmp_path / 'b', **save_set(tmp_path / 'elsewhere' / 'data'))
    assert computed['image_features'] == 2 and torch.equal(one.cached[0].feature, two.cached[0].feature)


def test_query_pictures_follow_the_boxes(tmp_path, computed):
    """One-shot: the features of the pictures that are asked with."""
    def pictures(name, **data):
        (tmp_path / name).mkdir()
        task = begun(OneShotTask(oneshot_config('demo', **TINY | dict(unseen='dog', query_size=16) | data), tmp_path / name, Processes()))
        return task.features[1].clone()
    before, after = pictures('a', **save_set(tmp_path / 'data')), pictures('b', **save_set(tmp_path / 'data', shift=8))
    assert before.shape == (3, 2, 32) and not torch.equal(before, after)
    computed.clear()
    assert torch.equal(before, pictures('c', **save_set(tmp_path / 'data'))) and computed['picture_features'] == 2
    for path in tmp_path.glob('banks/*/feature.npy'): path.write_bytes(b'')
    assert torch.equal(before, pictures('d', **save_set(tmp_path / 'data')))


# ---- anything in the files ------------------------------------------------------------------------------------------

ALONE = SimpleNamespace(rank=0, world=1, any=bool, gather=lambda x: [x], barrier=lambda: None)


def toy(num=2, wait=0., calls=None, bad=()):
    """Items whose feature is their number; what is in `bad` is said of them."""
    skipped = []

    def compute(numbers):
        skipped.extend(bad)
        if calls is not None: calls.write(''.join(f'{os.getpid()} {i}\n' for i in numbers))
        time.sleep(wait)
        return {'feature': torch.tensor(numbers).view(-1, 1).expand(-1, 4).half()}, [[{'boxes': torch.ones(i, 4)}] for i in numbers]
    return Source(lambda: {'cnn': 'toy'}, num, compute, skipped=skipped)


def is_whole(stored, num=2):
    feature, counts = toy().compute(list(range(num)))[0]['feature'], [len(t[0]['boxes']) for t in stored.targets]
    return torch.equal(stored.arrays['feature'], feature) and counts == list(range(num))


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just('../../etc/passwd'),
                      lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=5)


@pytest.fixture(scope='module')
def bank(tmp_path_factory):
    """A bank's folder, and what its bank.json says."""
    root = tmp_path_factory.mktemp('banks')
    open_features(root, toy(), ALONE)
    folder, = root.iterdir()
    return folder, json.loads((folder / 'bank.json').read_text())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_bank_json_says(bank, data):
    """Any value in the place of any value: nothing but what it must say is accepted, and nothing else comes of it."""
    folder, about = bank
    changed = json.loads(json.dumps(about))
    place, keys = changed, []
    while isinstance(place, (dict, list)) and (not keys or data.draw(st.booleans())):
        keys.append(data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place)))))
        parent, place = place, place[keys[-1]]
    parent[keys[-1]] = data.draw(values)
    (folder / 'bank.json').write_text(json.dumps(changed))
    assert is_whole(open_features(folder.parent, toy(), ALONE)) and json.loads((folder / 'bank.json').read_text()) == about
    assert sorted(p.name for p in folder.iterdir()) == ['bank.json', 'feature.npy', 'lock', 'targets.safetensors']


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(['bank.json', 'feature.npy', 'targets.safetensors']), content=st.binary(max_size=300), keep=st.integers(0, 300))
def test_whatever_is_in_a_file(bank, name, content, keep):
    folder, _ = bank
    (folder / name).write_bytes((folder / name).read_bytes()[:keep] + content)
    assert is_whole(open_features(folder.parent, toy(), ALONE))


def test_what_was_wrong_with_photos_is_kept_with_a_checksum(tmp_path, capsys):
    """Said to whoever takes the features over, each message once; whatever happens to the file, they are made anew."""
    said = ['a.jpg: broken', 'caf\u00e9\n.jpg: cut']
    assert open_features(tmp_path, toy(bad=said), ALONE).skipped == said
    assert open_features(tmp_path, toy(bad=['not asked']), ALONE).skipped == said and 'made anew' not in capsys.readouterr().out
    file, = tmp_path.glob('*/skipped.json')
    content = file.read_bytes()
    about = json.loads((file.parent / 'bank.json').read_text())
    for spoilt in (content[:-3], content.replace(b'a.jpg', b'b.jpg'), b'', None):
        file.unlink()
        if spoilt is not None: file.write_bytes(spoilt)
        assert open_features(tmp_path, toy(bad=said), ALONE).skipped == said and 'made anew' in capsys.readouterr().out
    # a list of something else, with the right checksum
    for lie in (b'[1]', b'{}', b'['):
        file.write_bytes(lie)
        about['files']['skipped.json'] = [len(lie), zlib.crc32(lie)]
        (file.parent / 'bank.json').write_text(json.dumps(about))
        assert open_features(tmp_path, toy(bad=said), ALONE).skipped == said and 'made anew' in capsys.readouterr().out
    # a file that bank.json does not know is nobody's; a bank from before has none
    file.write_text('["a lie"]')
    del about['files']['skipped.json']
    (file.parent / 'bank.json').write_text(json.dumps(about))
    assert open_features(tmp_path, toy(), ALONE).skipped == [] and 'made anew' not in capsys.readouterr().out


def test_no_files_at_all(tmp_path, capfd):
    """A folder, a pipe, a link to nowhere, a large file in a file's place; nothing waits for the pipe, nothing follows the link."""
    open_features(tmp_path, toy(), ALONE)
    folder, = tmp_path.iterdir()
    for name in ('bank.json', 'feature.npy', 'targets.safetensors'):
        for make in (Path.mkdir, os.mkfifo, lambda p: p.symlink_to(tmp_path / 'nowhere'), lambda p: p.touch() or os.truncate(p, 2**40)):
            (folder / name).unlink()
            make(folder / name)
            assert is_whole(open_features(tmp_path, toy(), ALONE)) and (folder / name).is_file() and not (folder / name).is_symlink()
    assert capfd.readouterr().out.count('made anew') == 12 and not (tmp_path / 'nowhere').exists()


def test_a_lie_with_right_checksums(tmp_path):
    """Shapes are not read from the files, whatever the checksums say."""
    open_features(tmp_path, toy(), ALONE)
    folder, = tmp_path.iterdir()
    about = json.loads((folder / 'bank.json').read_text())
    features.save_tensors(folder / 'targets.safetensors', {'boxes': torch.ones(3), 'boxes.shapes': torch.tensor([[10**9, 4], [1, 4]])})
    np.save(folder / 'feature.npy', np.zeros((2, 4), np.float16))
    about['files'] = {n: [os.path.getsize(folder / n), features.checksum(folder / n)] for n in about['files']}
    (folder / 'bank.json').write_text(json.dumps(about))
    assert is_whole(open_features(tmp_path, toy(), ALONE))


def test_a_full_disk(tmp_path, monkeypatch):
    """Said before anything is computed, and where the room goes meanwhile; nothing is left behind."""
    def refused(source):
        with pytest.raises(OSError, match=r'they need .* GiB, .* free\. Make room.*cached_views=0') as e:
            open_features(tmp_path, source, ALONE)
        assert e.value.filename.startswith(str(tmp_path))
        assert {p.name for p in tmp_path.glob('*/*')} == {'lock'}
    monkeypatch.setattr(features.shutil, 'disk_usage', lambda p: SimpleNamespace(free=100))
    with open(tmp_path.parent / 'calls', 'w+') as calls:
        refused(toy(1000, calls=calls))
        calls.seek(0)
        assert len(calls.read().splitlines()) == 1  # the first item, which tells the size
    monkeypatch.undo()

    def full(numbers):
        if numbers != [0]: raise OSError(28, 'No space left on device')
        return toy().compute(numbers)
    refused(Source(lambda: {}, 5, full))


def test_a_disk_that_keeps_no_file_of_this_size(tmp_path):
    """Told like one that is full, and nothing is left behind."""
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try: open_features(tmp_path, toy(1000), ALONE)
        except OSError as e: os._exit(0 if 'no room for the features' in str(e) else 1)
        os._exit(2)
    process = fork(limited)
    process.join()
    assert process.exitcode == 0 and {p.name for p in tmp_path.glob('*/*')} == {'lock'}


# ---- processes ------------------------------------------------------------------------------------------------------

def fork(target, *args):
    process = multiprocessing.get_context('fork').Process(target=target, args=args)
    process.start()
    return process


def one_run(root, num, wait):
    """A run of its own: opens the toy's bank and notes what it computes."""
    with open(root / f'calls{os.getpid()}', 'w', buffering=1) as calls:
        stored = open_features(root / 'banks', toy(num, wait, calls), ALONE)
    os._exit(0 if is_whole(stored, num) else 1)


def items(root): return Counter(line.split()[1] for path in root.glob('calls*') for line in path.read_text().splitlines())


def wait_for(what, seconds=60):
    end = time.time() + seconds
    while not what():
        assert time.time() < end
        time.sleep(.02)


def test_two_runs_at_once_compute_once(tmp_path, capfd):
    runs = [fork(one_run, tmp_path, 12, .05) for _ in range(2)]
    for run in runs: run.join(60)
    assert [run.exitcode for run in runs] == [0, 0]
    assert items(tmp_path) == {'0': 3} | {str(i): 1 for i in range(1, 12)}  # each looks at the first item
    assert 'waiting for it' in capfd.readouterr().out


def test_the_maker_is_killed(tmp_path):
    """The one that waits makes it; a later one uses it; nothing half made is left."""
    maker = fork(one_run, tmp_path, 12, .4)
    wait_for(lambda: sum(items(tmp_path).values()) > 2)
    waiting = fork(one_run, tmp_path, 12, .0)
    time.sleep(.3)
    # far from its end, on a busy machine, too
    assert sum(items(tmp_path).values()) < 12
    os.kill(maker.pid, signal.SIGKILL)
    waiting.join(60)
    assert waiting.exitcode == 0 and items(tmp_path)['11'] == 1
    folder, = (tmp_path / 'banks').iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ['bank.json', 'feature.npy', 'lock', 'targets.safetensors']
    before = sum(items(tmp_path).values())
    assert is_whole(open_features(tmp_path / 'banks', toy(12), ALONE), 12) and sum(items(tmp_path).values()) == before


def one_of(root, rank, world, num):
    dist.init_process_group('gloo', init_method=f'file://{root}/meet{world}', rank=rank, world_size=world)
    with open(root / f'calls{os.getpid()}', 'w', buffering=1) as calls:
        stored = open_features(root / 'banks', toy(num, 0, calls), Processes(rank, world))
    dist.destroy_process_group()
    os._exit(0 if is_whole(stored, num) else 1)


def together(root, world, num=5):
    runs = [fork(one_of, root, rank, world, num) for rank in range(world)]
    for run in runs: run.join(60)
    assert [run.exitcode for run in runs] == [0] * world


def test_the_number_of_processes_leaves_no_trace(tmp_path):
    """Made by three, found by one and by two; made by one: the same bytes."""
    together(tmp_path, 3)
    assert items(tmp_path) == {'0': 2, '1': 1, '2': 1, '3': 1, '4': 1}
    assert is_whole(open_features(tmp_path / 'banks', toy(5), ALONE), 5)
    together(tmp_path, 2)
    assert items(tmp_path) == {'0': 3, '1': 1, '2': 1, '3': 1, '4': 1}
    open_features(tmp_path / 'alone', toy(5), ALONE)
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / k).glob('*/*')} for k in ('alone', 'banks'))
    assert one == three and len(one) == 4


def test_where_nothing_can_be_locked(tmp_path, monkeypatch):
    """A system without fcntl; two makers at once then do the work twice, and the bank is whole."""
    monkeypatch.setattr(features, 'fcntl', None)
    runs = [fork(one_run, tmp_path, 6, .05) for _ in range(2)]
    for run in runs: run.join(60)
    assert [run.exitcode for run in runs] == [0, 0] and is_whole(open_features(tmp_path / 'banks', toy(6), ALONE), 6)


def test_more_processes_than_items(tmp_path):
    together(tmp_path, 3, 1)
    assert items(tmp_path) == {'0': 2}


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_process_without_items_needs_no_helpers(num_workers):
    source = Source(dict, 1, list, load=lambda chunks, workers: data_loader([5], chunks, list, workers), num_workers=num_workers)
    assert list(source.computed([])) == [] and list(source.computed([[0]])) == [[5]]


def test_progress_is_of_what_a_process_does_itself(tmp_path):
    told, source = [], Source(dict, 5, lambda numbers: ({}, []))
    features._fill(tmp_path, {'arrays': {}}, '', source, range(1, 5, 2), lambda *numbers: told.append(numbers))
    assert told == [(1, 2), (2, 2)]


def test_a_large_photo_that_was_touched_has_another_key(tmp_path, monkeypatch):
    "Only blocks of it were read, and what lies between them may have changed."
    paths = [str(save_photos(tmp_path / 'photos', 1) / '0.jpg')]
    for whole, same in ((2**20, True), (10, False)):
        monkeypatch.setattr(features, 'WHOLE', whole)
        before = photos_key(paths)
        os.utime(paths[0], (1, whole))
        assert (photos_key(paths) == before) == same


def test_photos_that_are_missing_have_a_key(tmp_path):
    path = save_photos(tmp_path / 'photos', 1) / '0.jpg'
    before = photos_key([str(path)])
    path.unlink()
    assert photos_key([str(path)]) != before


def test_machines_that_write_one_file_send_their_rows_alone(tmp_path, monkeypatch):
    "NFS sends whole pages, with the old bytes of others' rows, unless the file is open for synchronous writes."
    (tmp_path / 'rows').write_bytes(b'rows')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert features._opener(Processes(0, 2)) is None
    with open(tmp_path / 'rows', 'r+b', opener=features._opener(Processes(0, 4))) as file:
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DSYNC
        file.write(b'R')
    assert (tmp_path / 'rows').read_bytes() == b'Rows'
