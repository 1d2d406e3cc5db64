"Runs whose data changed before they went on, or before the same command was given again; data that only moved; more epochs."
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import write_png

from test_resume import TINY as PRETRAIN
from test_resume import as_in_the_processes, finish, weights  # noqa: F401 (a fixture: one thread here, too)
from updetr.core.checkpoint import load_checkpoint, save_checkpoint, write_json
from updetr.core.config import PretrainConfig, make_config
from updetr.core.fingerprint import set_rows
from updetr.data.scenes import Scenes
from updetr.predict.commands import training_set
from updetr.tasks.finetune import FinetuneConfig, finetune_config, labelled_marks, open_sets
from updetr.tasks.oneshot import oneshot_config
from updetr.tasks.oneshot_task import oneshot_sets, open_run
from updetr.tasks.panoptic import PanopticScenes, write_panoptic
from updetr.tasks.panoptic_task import panoptic_config
from updetr.tasks.pretrain_task import PretrainTask, find_photos
from updetr.train.launch import launch, prepare
from updetr.train.loop import Processes

SIZES = dict(hidden_dim=16, nheads=2, dim_feedforward=16, enc_layers=1, dec_layers=1, num_queries=4)
TINY = SIZES | dict(backbone='test_resnet', weights='none', features='layer1', standardize=False, scenes=0, scenes_val=0, val_size=64,
                    square=64, cached_views=1, batch_size=2, epochs=1, eval_every=0, log_every=1, dropout=.1)
STEPS = dict(schedule='step', warmup=0., lr_drop=2, cached_views=0, epochs=2)


@pytest.fixture(autouse=True)
def no_data_by_the_way(monkeypatch): monkeypatch.delenv('UPDETR_DATA', raising=False)


def photo(path, seed, size=(80, 100)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(path)


def coco(folder, names=('cat', 'dog'), photos=4):
    """A COCO folder of noise: photos to train on and to evaluate on, one box each, classes in turn."""
    for part, shift in (('train', 0), ('val', 100)):
        for k in range(photos): photo(folder/part/f'{k}.png', shift + k)
        boxes = [{'id': k + 1, 'image_id': k, 'category_id': k % 2 + 1, 'bbox': [5, 5, 60, 50], 'iscrowd': 0} for k in range(photos)]
        (folder/'annotations').mkdir(exist_ok=True)
        write_json(folder/'annotations'/f'instances_{part}.json', {
            'images': [{'id': k, 'file_name': f'{k}.png', 'width': 100, 'height': 80} for k in range(photos)],
            'categories': [{'id': i, 'name': name} for i, name in enumerate(names, 1)], 'annotations': boxes})
    return folder


def annotations(folder, change, part='train'):
    """Change the file of annotations in place."""
    file = folder/'annotations'/f'instances_{part}.json'
    content = json.loads(file.read_text())
    change(content)
    write_json(file, content)


def configure(folder, cfg):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder/'cfg.json', dataclasses.asdict(cfg))
    return folder


def tuned(folder, data, **changes): return configure(folder, finetune_config('demo', **TINY | {'data': str(data)} | changes))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished run and its data, never changed: each test takes copies."""
    root = tmp_path_factory.mktemp('finished')
    finish(tuned(root/'runs/run', coco(root/'data')))
    return root


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run and its data in another place, by the same relative names."""
    shutil.copytree(finished, tmp_path/'copy')
    tuned(tmp_path/'copy/runs/run', tmp_path/'copy/data')
    return tmp_path/'copy'


def corrected(content): content['annotations'][1]['bbox'] = [10, 5, 60, 50]
def crowd(content): content['annotations'][1]['iscrowd'] = 1
def exchanged(content): content['categories'] = [{'id': 1, 'name': 'dog'}, {'id': 2, 'name': 'cat'}]
def fewer(content): content['images'].pop(), content['annotations'].pop()


def more(content):
    content['images'].append({'id': 9, 'file_name': 'new.png', 'width': 100, 'height': 80})


def first_class(content): content['categories'].append({'id': 0, 'name': 'ant'})


CHANGES = {
    'a corrected box': (corrected, r'to train on: 1 photo with other boxes or flags \(1.png\)'),
    'a crowd': (crowd, r'to train on: 1 photo with other boxes or flags \(1.png\)'),
    'exchanged names of classes': (exchanged, r'the classes are in another order \(cat, dog -> dog, cat\)'),
    'a photo fewer': (fewer, r'to train on: 1 photo fewer \(3.png\)'),
    'a photo more': (more, r'to train on: 1 photo more \(new.png\)'),
    'a class that sorts first': (first_class, "class 'ant' is new")}


@pytest.mark.parametrize('what', CHANGES)
def test_changed_annotations_are_named(what, copy):
    change, words = CHANGES[what]
    photo(copy/'data/train/new.png', 77)
    annotations(copy/'data', change)
    before = (copy/'runs/run/checkpoint.pth').read_bytes()
    with pytest.raises(ValueError, match=words) as e: finish(copy/'runs/run')
    assert 'new name' in str(e.value) and f'-p pretrain {copy/"runs/run/checkpoint.pth"}' in str(e.value)
    assert (copy/'runs/run/checkpoint.pth').read_bytes() == before


def marks_now(folder):
    cfg = FinetuneConfig(**json.loads((folder/'cfg.json').read_text()))
    return dataclasses.asdict(cfg), labelled_marks(cfg, *open_sets(cfg))


def test_the_same_command_with_other_data_is_not_finished(copy):
    """As a notebook does: a finished run is found finished only with the data that it was trained and measured on."""
    cfg, data = marks_now(copy/'runs/run')
    assert launch(copy/'runs/run', cfg, data=data).how == 'finished'
    annotations(copy/'data', corrected, 'val')
    cfg, data = marks_now(copy/'runs/run')
    with pytest.raises(ValueError, match='to evaluate on: 1 photo with other boxes'): launch(copy/'runs/run', cfg, data=data)


def test_a_photo_that_was_replaced_or_is_gone(copy):
    photo(copy/'data/train/2.png', 5000)
    with pytest.raises(ValueError, match=r'1 photo with another content \(2.png\)'): finish(copy/'runs/run')
    os.remove(copy/'data/train/2.png')
    with pytest.raises(ValueError, match='photos missing: 1, first 2.png'): finish(copy/'runs/run')


@pytest.mark.parametrize('how', ('elsewhere', 'relative', 'UPDETR_DATA'))
def test_data_that_moved_goes_on(how, finished, copy, tmp_path, monkeypatch, capsys):
    if how == 'relative':
        monkeypatch.chdir(copy)
        tuned(copy/'runs/run', 'data')
    if how == 'UPDETR_DATA':
        monkeypatch.setenv('UPDETR_DATA', str(copy/'data'))
        tuned(copy/'runs/run', '')
    finish(copy/'runs/run')
    assert 'resumed after step 2' in capsys.readouterr().out
    cfg, data = marks_now(copy/'runs/run')
    assert launch(copy/'runs/run', cfg, data=data).how == 'finished'


def test_another_set_by_the_same_words(copy, tmp_path, monkeypatch):
    """A relative `data` from another folder, and UPDETR_DATA that points elsewhere."""
    other = coco(tmp_path/'there/data', photos=5)
    tuned(copy/'runs/run', 'data')
    monkeypatch.chdir(tmp_path/'there')
    with pytest.raises(ValueError, match=r'1 photo more \(4.png\)'): finish(copy/'runs/run')
    tuned(copy/'runs/run', '')
    monkeypatch.setenv('UPDETR_DATA', str(other))
    with pytest.raises(ValueError, match=r'1 photo more \(4.png\)'): finish(copy/'runs/run')


def test_a_run_that_has_learnt_nothing_begins_with_what_is_there(tmp_path):
    run = tuned(tmp_path/'runs/run', coco(tmp_path/'data'))
    write_json(run/'data.json', {'train': {}, 'val': {}})
    finish(run)
    assert set(json.loads((run/'data.json').read_text())['train']['each']) == {f'{k}.png' for k in range(4)}


def test_what_a_checkpoint_says_where_the_folder_lost_it(copy, capsys):
    """data.json is gone: the checkpoint knows. A checkpoint of an older version knows its classes, or nothing: it goes on, and says so."""
    run, file = copy/'runs/run', copy/'runs/run/checkpoint.pth'
    saved = load_checkpoint(file)
    assert '0.png' not in str(saved['data'])
    (run/'data.json').unlink()
    annotations(copy/'data', corrected)
    with pytest.raises(ValueError, match='to train on: other boxes or flags'): finish(run)
    older = {k: v for k, v in saved.items() if k != 'data'}
    save_checkpoint(file, older)
    annotations(copy/'data', first_class)
    with pytest.raises(ValueError, match="class 'ant' is new"): finish(run)
    annotations(copy/'data', lambda content: content['categories'].pop())
    finish(run)
    assert 'no fingerprint of its data was kept when this run began' in capsys.readouterr().out
    annotations(copy/'data', fewer)
    with pytest.raises(ValueError, match='1 photo fewer'): finish(run)


def test_the_checkpoint_to_start_from(copy, tmp_path):
    """Another content under its name is another run; another place, or no place any more, is not."""
    start = shutil.copy(copy/'runs/run/checkpoint.pth', tmp_path/'start.pth')
    run = tuned(copy/'runs/second', copy/'data', pretrain=str(start))
    finish(run)
    moved = shutil.move(start, tmp_path/'moved.pth')
    finish(tuned(run, copy/'data', pretrain=str(moved)))
    state = load_checkpoint(moved)
    state['model']['class_embed.bias'] += 1
    save_checkpoint(moved, state)
    with pytest.raises(ValueError, match=r'the checkpoint to start from \(pretrain\) has another content'): finish(run)
    os.remove(moved)
    finish(run)


@pytest.fixture(scope='module')
def long(finished, tmp_path_factory):
    """Three epochs of a step schedule at once."""
    finish(run := tuned(tmp_path_factory.mktemp('long')/'run', finished/'data', **STEPS | {'epochs': 3}))
    return run


def test_a_step_schedule_is_made_longer(finished, long, tmp_path):
    run = tuned(tmp_path/'run', finished/'data', **STEPS)
    finish(run)
    assert load_checkpoint(run/'checkpoint.pth')['step'] == 4
    finish(tuned(run, finished/'data', **STEPS | {'epochs': 3}))
    assert load_checkpoint(run/'checkpoint.pth')['step'] == 6
    assert all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(long).values(), strict=True))
    with pytest.raises(ValueError, match='has done 6 steps, more than the 4 of epochs=2'): finish(tuned(run, finished/'data', **STEPS))
    with pytest.raises(ValueError, match='lr_drop: 2 -> 1'): finish(tuned(run, finished/'data', **STEPS | {'epochs': 4, 'lr_drop': 1}))


def test_a_finished_run_stays_finished_where_nothing_is_left_to_do(tmp_path):
    "Not where its data lie elsewhere now, nor with fewer epochs, which are refused before anything is written."
    def ask(**changes): return prepare(tmp_path, dataclasses.asdict(finetune_config('demo', **STEPS | {'data': 'here'} | changes)))
    file, done = ask(), tmp_path/'done.json'
    write_json(done, {'step': 4})
    ask(data='there', images='somewhere')
    assert done.exists() and 'there' in (said := file.read_text())
    with pytest.raises(ValueError, match='has reached its end with epochs=2, and epochs=1 are fewer'): ask(data='there', epochs=1)
    assert done.exists() and file.read_text() == said
    ask(data='there', epochs=3)
    assert not done.exists()


def test_a_cosine_is_not_and_the_way_on_works(copy):
    run = copy/'runs/run'
    for ask in (lambda: finish(tuned(run, copy/'data', epochs=3)),
                lambda: launch(run, dataclasses.asdict(finetune_config('demo', **TINY | {'data': str(copy/'data'), 'epochs': 3})))):
        with pytest.raises(ValueError, match='epochs: 1 -> 3') as e: ask()
        tuned(run, copy/'data')
        assert f'a new name and -p pretrain {run}/checkpoint.pth -p fresh_queries False' in str(e.value)
    new = tuned(copy/'runs/new', copy/'data', epochs=2, pretrain=str(run/'checkpoint.pth'), fresh_queries=False)
    finish(new)
    assert load_checkpoint(new/'checkpoint.pth')['step'] == 4


def test_oneshot_and_panoptic_runs_refuse_alike(tmp_path):
    data = coco(tmp_path/'data')
    cfg = oneshot_config('demo', **TINY | {'data': str(data), 'unseen': 'dog', 'query_size': 32, 'cached_views': 0})
    finish(one := configure(tmp_path/'runs/one', cfg))
    annotations(data, lambda content: content['annotations'][2].update(bbox=[10, 5, 60, 50]))  # a photo of the seen class
    with pytest.raises(ValueError, match=r'1 photo with other boxes or flags \(2.png\)'): finish(one)

    scenes = PanopticScenes(Scenes(4, 64))
    for part in ('train', 'val'):
        write_panoptic(tmp_path/f'segments/annotations/panoptic_{part}2017.json', {i: scenes.panoptic(i) for i in range(4)}, scenes)
        (tmp_path/'segments'/f'{part}2017').mkdir()
        for i in range(4): write_png(scenes[i]['image'], str(tmp_path/'segments'/f'{part}2017'/f'{i}.jpg'))
    cfg = panoptic_config('demo', 'boxes', **TINY | {'data': str(tmp_path/'segments'), 'cached_views': 0})
    finish(boxes := configure(tmp_path/'runs/boxes', cfg))
    file = tmp_path/'segments/annotations/panoptic_train2017.json'
    content = json.loads(file.read_text())
    content['annotations'][2]['segments_info'][0]['bbox'][0] += 1
    write_json(file, content)
    with pytest.raises(ValueError, match=r'1 photo with other boxes or flags \(2.jpg\)'): finish(boxes)


def test_a_finished_run_whose_data_moved_is_opened_where_they_are_now(copy, tmp_path):
    "The checkpoint says where they were, cfg.json where they are: a finished run is not saved again."
    cfg = oneshot_config('demo', **TINY | {'data': str(coco(tmp_path/'data')), 'unseen': 'dog', 'query_size': 32, 'cached_views': 0})
    finish(run := configure(tmp_path/'runs/one', cfg))
    cfg = dataclasses.replace(cfg, data=str((tmp_path/'data').rename(tmp_path/'moved')))
    assert launch(run, dataclasses.asdict(cfg), data=labelled_marks(cfg, *oneshot_sets(cfg)[:2])).how == 'finished'
    task = open_run(run)
    assert task.cfg == cfg and str(tmp_path/'moved') in str(set_rows(task.val_set).paths[0])
    # a detector's photos, too: has any been trained on?
    paths = set_rows(training_set(copy/'runs/run', copy/'data', 'val')).paths
    assert len(paths) == 4 and all(str(path).startswith(str(copy)) for path in paths)


def pretrained(folder, data, **changes):
    return configure(folder, make_config('demo', **PRETRAIN | dict(
        data=str(data), views=8, epochs=1, weights='none', backbone='test_resnet', features='layer1', cache_features=False,
        standardize=False, matching_init=False, heldout=0.) | changes))


def test_pretraining_follows_moved_photos_and_refuses_changed_ones(tmp_path, capsys):
    for k in range(4): photo(tmp_path/'photos/deep'/f'{k}.png', k)
    (tmp_path/'photos/notes.txt').write_text('no photo')
    run = pretrained(tmp_path/'runs/run', tmp_path/'photos')
    finish(run)
    (tmp_path/'photos').rename(tmp_path/'moved')
    finish(pretrained(run, tmp_path/'moved'))
    assert 'resumed after step 2' in capsys.readouterr().out
    (tmp_path/'moved/more.txt').write_text('no photo either')
    finish(run)
    photo(tmp_path/'moved/new.png', 9)
    with pytest.raises(ValueError, match=r'photos to train on: 1 photo more \(new.png\)') as e: finish(run)
    assert 'give the run a new name' in str(e.value) and '-p pretrain' not in str(e.value)
    os.remove(tmp_path/'moved/new.png')
    os.rename(tmp_path/'moved/deep/0.png', tmp_path/'gone.png')
    with pytest.raises(ValueError, match=r'1 photo without a file \(deep/0.png\)'): finish(run)
    photo(tmp_path/'moved/deep/0.png', 55)
    with pytest.raises(ValueError, match=r'1 photo with another content \(deep/0.png\)'): finish(run)


def test_a_pretraining_that_was_never_saved_looks_for_its_photos_again(tmp_path, capsys):
    "Killed before its first save, while photos were still being unpacked: the next start takes all that are there."
    def begin(): return PretrainTask(PretrainConfig(**json.loads((run/'cfg.json').read_text())), run, Processes())

    for k in range(2): photo(tmp_path/'photos'/f'{k}.png', k)
    run = pretrained(tmp_path/'runs/run', tmp_path/'photos')
    assert begin().photos.paths == ['0.png', '1.png']
    for k in range(2, 4): photo(tmp_path/'photos'/f'{k}.png', k)
    task = begin()
    assert task.photos.paths == [f'{k}.png' for k in range(4)] and len(task.marks['train']['each']) == 4
    assert '4 photos to train on' in capsys.readouterr().out
    # what has learnt keeps its list
    finish(run)
    photo(tmp_path/'photos/4.png', 4)
    with pytest.raises(ValueError, match=r'1 photo more \(4.png\)'): finish(run)


def test_parts_that_are_trained_on_together_are_told_once(tmp_path, capsys):
    """COCO's folders, or a copy of ImageNet that begins further up: val and test are trained on, too. Rank 0 says so; so does a page,
    which looks for the photos itself."""
    for name in ('train2017/a', 'train2017/b', 'val2017/c', 'test2017/d'): photo(tmp_path/'coco'/f'{name}.png', ord(name[-1]))
    said = 'all parts below coco are trained on (train 2, val 1, test 1)'
    run = pretrained(tmp_path/'runs/run', tmp_path/'coco')
    cfg = PretrainConfig(**json.loads((run/'cfg.json').read_text()))
    PretrainTask(cfg, run, Processes())
    assert capsys.readouterr().out.count(said) == 1
    assert len(find_photos(cfg)[0]) == 4 and capsys.readouterr().out.count(said) == 1
    # one part, and train/ beside val/
    (tmp_path/'imagenet').mkdir()
    for part in ('train', 'val', 'test'): (tmp_path/f'coco/{part}2017').rename(tmp_path/'imagenet'/part)
    for data, photos in (('imagenet/train', (2, 0)), ('imagenet', (2, 1))):
        found = find_photos(dataclasses.replace(cfg, data=str(tmp_path/data)))
        assert tuple(map(len, found)) == photos and capsys.readouterr().out == ''
