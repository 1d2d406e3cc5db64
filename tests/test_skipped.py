"A photo that breaks after the check: skipped and counted in every training on labelled photos, an error in an evaluation."
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from torchvision.io import write_png

from test_data_changes import TINY, annotations, coco, configure
from test_resume import as_in_the_processes, finish  # noqa: F401 (a fixture: one thread here, too)
from updetr.core.checkpoint import load_checkpoint
from updetr.core.config import make_config
from updetr.core.photos import BadPhoto, read_photo
from updetr.data.check import require_readable
from updetr.data.queries import QueryPool
from updetr.data.scenes import Scenes
from updetr.data.transforms import SMALL_SIZES, DetectionViews
from updetr.tasks.cnn_task import CNN_PRESETS, CNNConfig, CNNTask
from updetr.tasks.finetune import finetune_config
from updetr.tasks.finetune_task import FinetuneTask
from updetr.tasks.oneshot import oneshot_config
from updetr.tasks.oneshot_task import OneShotTask
from updetr.tasks.panoptic import PanopticScenes, open_panoptic, write_panoptic
from updetr.tasks.panoptic_task import PanopticTask, open_panoptic_sets, panoptic_config
from updetr.train.launch import read_log
from updetr.train.loop import Processes
from updetr.train.progress import skipped_photos

ONE_SHOT = dict(unseen='dog', query_size=32, unseen_objects='background')
LIVE = dict(cached_views=0, frozen_backbone=False)
def cnn_config(preset, **changes):
    """The training of a CNN, which has fewer parameters than that of a detector, and no views but crops."""
    fields = {f.name for f in dataclasses.fields(CNNConfig)} - {'square', 'cached_views'}
    return make_config(preset, CNNConfig, CNN_PRESETS, **{k: v for k, v in changes.items() if k in fields})


CASES = {
    'cnn': (CNNTask, cnn_config, dict(crop_size=32)),
    'finetune': (FinetuneTask, finetune_config, LIVE),
    'finetune, cached': (FinetuneTask, finetune_config, dict(cached_views=2)),
    'oneshot': (OneShotTask, oneshot_config, ONE_SHOT | LIVE),
    'oneshot, cached': (OneShotTask, oneshot_config, ONE_SHOT | dict(cached_views=2)),
    'panoptic': (PanopticTask, panoptic_config, LIVE)}


@pytest.fixture(autouse=True)
def no_data_by_the_way(monkeypatch): monkeypatch.delenv('UPDETR_DATA', raising=False)


def truncate(file): file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def cut_off(file):
    """A photo of another size than its annotation says."""
    write_png(read_photo(file)[:, :-3], str(file))


HARMS = {'truncated': truncate, 'of another size': cut_off}


def panoptic(folder):
    """A panoptic folder of painted scenes."""
    for part in ('train', 'val'):
        scenes = PanopticScenes(Scenes(4, 64, split=part))
        (folder / part).mkdir(parents=True)
        answers = {i: scenes.panoptic(i) for i in range(4)}
        write_panoptic(folder / f'annotations/panoptic_{part}.json', answers, scenes)
        for i in range(4): write_png(scenes[i]['image'], str(folder / part / f'{i}.jpg'))
    return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A COCO folder and a panoptic one, never changed."""
    root = tmp_path_factory.mktemp('data')
    return {'coco': coco(root / 'coco'), 'panoptic': panoptic(root / 'panoptic')}


def some_run(case, data, folder, broken, harm=truncate, **changes):
    """Task, configuration and folder of a tiny run of which one photo is spoilt after it was listed; the photo's name."""
    task, config, settings = CASES[case]
    kind = 'panoptic' if case == 'panoptic' else 'coco'
    shutil.copytree(data[kind], folder / 'data')
    # photo 2 shows a cat, which one-shot detection is asked for
    file = next((folder / 'data' / broken).glob('2.*'))
    harm(file)
    cfg = config('demo', **TINY | settings | {'data': str(folder / 'data')} | changes)
    return task, cfg, configure(folder / 'runs/run', cfg), file


@pytest.mark.parametrize('harm', HARMS)
@pytest.mark.parametrize('case', CASES)
def test_a_spoilt_photo_is_skipped_counted_and_said(case, harm, data, tmp_path, capsys):
    _, _, run_dir, file = some_run(case, data, tmp_path, 'train', HARMS[harm], epochs=2, eval_every=2)
    finish(run_dir)
    noted = (run_dir / 'skipped.txt').read_text().splitlines()
    assert len(noted) == 1 and noted[0].startswith(f'{file}: ') and (harm == 'truncated' or harm in noted[0])
    assert capsys.readouterr().out.count(f'photo skipped: {file}') == 1
    assert load_checkpoint(run_dir / 'checkpoint.pth')['step'] > 0


def test_a_cnn_learns_where_nothing_can_be_measured(data, tmp_path):
    "No photo to evaluate on has a box."
    shutil.copytree(data['coco'], tmp_path / 'data')
    annotations(tmp_path / 'data', lambda content: [box.update(iscrowd=1) for box in content['annotations']], 'val')
    run_dir = configure(tmp_path / 'run', cnn_config('demo', **TINY | {'data': str(tmp_path / 'data'), 'eval_every': 1, 'crop_size': 32}))
    finish(run_dir)
    assert (run_dir / 'done.json').exists() and not any(k.startswith('test_') for row in read_log(run_dir) for k in row)


def test_a_cnn_says_what_its_set_is_and_misses_no_photo_silently(data, tmp_path, capsys):
    "Missing photos are refused, or left out and counted; one set is divided aloud."
    shutil.copytree(data['coco'], tmp_path / 'data')
    (tmp_path / 'data/train/1.png').unlink()
    settings = TINY | {'data': str(tmp_path / 'data'), 'crop_size': 32}

    def begin(**changes): return CNNTask(cnn_config('demo', **settings | changes), tmp_path, Processes())

    with pytest.raises(ValueError, match=r'photos missing: 1, first 1\.png.*-p missing skip'): begin()
    finish(configure(tmp_path / 'run', cnn_config('demo', **settings, missing='skip')))
    said = capsys.readouterr().out
    assert 'photos missing and left out: 1' in said and not (tmp_path / 'run/skipped.txt').exists()
    begin(data=str(tmp_path / 'data/annotations/instances_val.json'))
    assert 'one set without photos to evaluate on: 1 of its 4' in capsys.readouterr().out


def same(a, b):
    if torch.is_tensor(a): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize('case', ['finetune', 'oneshot', 'panoptic'])
def test_its_place_is_taken_alike_by_workers_and_after_a_resume(case, data, tmp_path):
    batches = {}
    for workers, start in ((0, 0), (2, 0), (0, 3)):
        folder = tmp_path / f'{workers}{start}'
        task, cfg, run_dir, _ = some_run(case, data, folder, 'train', num_workers=workers)
        begun = task(cfg, run_dir, Processes())
        begun.begin(resumed=False)
        batches[workers, start] = list(begun.batches(start, 6))
        assert (run_dir / 'skipped.txt').exists()
    whole = batches[0, 0]
    assert same(whole, batches[2, 0]) and same(whole[3:], batches[0, 3])
    assert not any('skipped' in t for b in whole for t in b['targets'])


@pytest.mark.parametrize('case, harm', [*((case, truncate) for case in CASES), ('finetune', cut_off)])
def test_one_to_evaluate_on_is_an_error_before_the_first_step(case, harm, data, tmp_path):
    _, _, run_dir, file = some_run(case, data, tmp_path, 'val', harm, eval_every=1)
    with pytest.raises(ValueError, match='photos to evaluate on that cannot be used: 1, first ') as e: finish(run_dir)
    assert str(file) in str(e.value) and 'check_dataset(ds, decode=True)' in str(e.value)
    assert not (run_dir / 'checkpoint.pth').exists()


@pytest.mark.parametrize('spoil, said', [(lambda png: png[:, :-3], 'of another size'), (lambda png: png * 0, 'of other segments')])
def test_a_png_that_is_not_that_of_its_list_is_skipped(spoil, said, data, tmp_path):
    """In the second stage of a panoptic training, begun without the notebook, which decodes all of them."""
    shutil.copytree(data['panoptic'], tmp_path / 'data')
    file = tmp_path / 'data/annotations/panoptic_train/1.png'
    write_png(spoil(read_photo(file)), str(file))
    whole = open_panoptic(tmp_path / 'data', 'train')
    views = DetectionViews(whole, sizes=SMALL_SIZES, square=64)
    _, target = views[0, 1]
    message, = target['skipped']
    assert message.startswith(f'{file}: {said}') and int(target['image_id']) == 2
    with pytest.raises(ValueError, match=said): require_readable(whole, what='to train on')


@pytest.mark.parametrize('case', ['finetune, cached', 'oneshot, cached'])
def test_whoever_takes_over_a_bank_is_told_which_photos_were_broken(case, data, tmp_path, capsys):
    """Two runs of one configuration: the second computes nothing, and its folder says the same."""
    _, cfg, first, file = some_run(case, data, tmp_path, 'train')
    finish(first)
    noted = (first / 'skipped.txt').read_text()
    assert noted.startswith(f'{file}: ') and len(noted.splitlines()) == 1
    times = {p: p.stat().st_mtime_ns for p in (first.parent / 'banks').rglob('*.npy')}
    capsys.readouterr()
    finish(second := configure(first.parent / 'second', cfg))
    assert times and times == {p: p.stat().st_mtime_ns for p in (first.parent / 'banks').rglob('*.npy')}
    assert (second / 'skipped.txt').read_text() == noted and capsys.readouterr().out.count(f'photo skipped: {file}') == 1
    assert skipped_photos(second) == f'1 photo could not be read: {file.name}'


class Boxes:
    """A detection set of three photos of one class, two boxes each; the first photo is broken or not."""
    classes, image_ids = ['cat'], [1, 2, 3]

    def __init__(self, reason=''): self.reason = reason

    def __getitem__(self, i):
        if i == 0 and self.reason: raise BadPhoto('a.jpg', self.reason)
        return {'image': torch.full((3, 20, 20), 50 * i, dtype=torch.uint8)}

    def coco(self):
        box = [2., 2., 8., 8.]
        things = [{'image_id': k, 'category_id': 0, 'bbox': box, 'iscrowd': 0} for k in (1, 1, 2, 2, 3, 3)]
        return {'annotations': things}


def test_a_query_picture_is_that_of_the_next_readable_photo():
    pool, whole = QueryPool(Boxes('truncated'), 8), QueryPool(Boxes(), 8)
    picture, skipped = pool.picture_or_next(0)
    assert set(skipped) == {'a.jpg: truncated'} and torch.equal(picture, whole.picture(2))
    assert pool.picture_or_next(3)[1] == [] and np.all(whole.picture_or_next(0)[0].numpy() == 0)
    # asked about photo 2: not with its own boxes
    assert torch.equal(pool.picture_or_next(0, but_not=2)[0], whole.picture(4))


def test_one_panoptic_file_is_divided_by_a_fixed_seed(data, tmp_path):
    file = data['panoptic'] / 'annotations/panoptic_train.json'
    settings = TINY | LIVE | {'data': str(file), 'val_share': .5}
    cfg = panoptic_config('demo', 'boxes', **settings)
    (train, val), other = open_panoptic_sets(cfg), open_panoptic_sets(panoptic_config('demo', 'boxes', seed=7, **settings))
    assert sorted(train.image_ids + val.image_ids) == [0, 1, 2, 3] and len(val) == 2
    assert val.image_ids == other[1].image_ids and 'seed 0' in val.note
    whole = open_panoptic(file)
    for i, k in enumerate(val.image_ids):
        assert torch.equal(val.panoptic(i)[0], whole.panoptic(k)[0]) and val.segments(i) == whole.segments(k)
    mine = {(a['image_id'], *a['bbox']) for a in whole.coco()['annotations'] if a['image_id'] in val.image_ids}
    assert {(a['image_id'], *a['bbox']) for a in val.coco()['annotations']} == mine
    finish(run := configure(tmp_path / 'run', panoptic_config('demo', 'boxes', **settings | {'eval_every': 1})))
    assert load_checkpoint(run / 'checkpoint.pth')['step'] == 1


def test_broken_pngs_of_masks_are_found_before_a_training(data, tmp_path):
    shutil.copytree(data['panoptic'], tmp_path / 'data')
    truncate(tmp_path / 'data/annotations/panoptic_train/1.png')
    with pytest.raises(ValueError, match='photos to train on that cannot be used: 1, first .*panoptic_train/1.png'):
        require_readable(open_panoptic(tmp_path / 'data'), what='to train on')
    require_readable(open_panoptic(tmp_path / 'data', masks=False))
