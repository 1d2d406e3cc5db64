"Fine-tuning in real processes: killed and resumed, one process and two, evaluation, torchvision's detectors, real labelled photos."
import dataclasses
import json

import pytest
import torch

from test_data_changes import coco
from test_resume import as_in_the_processes, kill_twice, weights  # noqa: F401 (a fixture: one thread here, too)
from tools.processes import trained
from updetr.core.checkpoint import load_checkpoint, save_checkpoint, write_json
from updetr.core.config import make_config
from updetr.core.photos import read_photo
from updetr.model.updetr import build_updetr
from updetr.predict.detector import Detector
from updetr.tasks.finetune import finetune_config, open_sets
from updetr.tasks.finetune_task import TASK
from updetr.tasks.oneshot import oneshot_config
from updetr.tasks.panoptic_task import panoptic_config
from updetr.train.launch import read_log
from updetr.train.loop import Processes, run, train

TINY = dict(scenes=8, scenes_val=5, scene_size=64, val_size=64, square=64, backbone='test_resnet', weights='none', features='',
            hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2, num_queries=8, cached_views=0, batch_size=2, epochs=4, eval_every=2,
            log_every=1, save_every=3, dropout=.1, fresh_queries=False)
SHARED = dict(num_queries=8, enc_layers=1, dec_layers=2, hidden_dim=32, nheads=4, dim_feedforward=32)


def make_run(folder, **changes):
    folder.mkdir(parents=True)
    write_json(folder / 'cfg.json', dataclasses.asdict(finetune_config('demo', **TINY | changes)))
    return folder


def finish(folder):
    run(folder / 'cfg.json')
    return folder


def make_task(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    return TASK[1](finetune_config('demo', **TINY | changes), folder, Processes())


def measured(folder): return [(r['step'], r['test_AP50'], r['test_best_iou']) for r in read_log(folder) if 'test_AP50' in r]


def train_rows(folder):
    """The losses; of a step that was done twice, both must agree."""
    rows = [r for r in map(json.loads, (folder / 'log.txt').read_text().splitlines()) if 'train_loss' in r]
    seen = {}
    for r in rows: assert seen.setdefault(r['step'], r['train_loss']) == r['train_loss']
    return [seen[s] for s in sorted(seen)]


@pytest.fixture(scope='module')
def whole(tmp_path_factory): return finish(make_run(tmp_path_factory.mktemp('runs') / 'whole'))


def test_killed_twice_and_resumed_is_the_same_run(whole, tmp_path):
    kill_twice(folder := make_run(tmp_path / 'killed'), range(3, 14))
    finish(folder)
    assert train_rows(folder) == train_rows(whole) and len(train_rows(whole)) == 16
    assert measured(folder) == measured(whole) and [step for step, *_ in measured(whole)] == [8, 16]
    assert all(torch.equal(a, b) for a, b in zip(weights(folder).values(), weights(whole).values(), strict=True))


def test_two_processes_measure_what_one_does(tmp_path):
    """Five photos on two processes: shards are filled up, each photo counts once; and features that two cached are those of one."""
    changes = dict(frozen_backbone=True, cached_views=2, dropout=0., epochs=2, eval_every=1, lr=1e-4)
    one, two = finish(make_run(tmp_path / 'a' / 'one', **changes)), make_run(tmp_path / 'b' / 'two', **changes)
    trained(two, 2)
    for a, b in zip(measured(one), measured(two), strict=True): assert a == pytest.approx(b, abs=2e-3) and a[2] > .05
    banks = [sorted((folder.parent / 'banks').iterdir()) for folder in (one, two)]
    assert [f.name for f in banks[0]] == [f.name for f in banks[1]] and len(banks[0]) == 2
    for a, b in zip(*banks): assert (a / 'feature.npy').read_bytes() == (b / 'feature.npy').read_bytes()
    assert train_rows(two)[0] == pytest.approx(train_rows(one)[0], rel=.1)  # cross entropy is averaged by process, as in the reference


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp('up') / 'up.pth'
    options = dict(backbone='resnet18', num_patches=4, pos_in_input=True, standardize=True, **SHARED)
    model = build_updetr(**options)
    model.feature_norm.fit(torch.randn(2, 512, 4, 4) * 3 + 1)
    save_checkpoint(path, {'model': model.state_dict(), 'args': options | {'task': 'pretrain', 'features': '', 'position': 'sine',
                                                                          'pre_norm': True, 'dilation': False}})
    return path, model.state_dict()


def test_a_run_starts_from_the_checkpoint_and_no_longer_needs_it(pretrained, tmp_path):
    path, state = pretrained
    copy = tmp_path / 'copy.pth'
    copy.write_bytes(path.read_bytes())
    changes = {k: v for k, v in TINY.items() if k not in SHARED and k not in ('backbone', 'features', 'weights')}
    cfg = finetune_config('demo', pretrain=str(copy), **changes | {'num_queries': 8, 'epochs': 1})
    (folder := tmp_path / 'run').mkdir()
    task = TASK[1](cfg, folder, Processes())
    same = {k: torch.equal(v, state[k]) for k, v in task.model.state_dict().items() if k in state}
    assert not any(v for k, v in same.items() if k == 'class_embed.bias') and all(v for k, v in same.items() if 'class_embed' not in k)
    train(task, cfg, folder, Processes())
    copy.unlink()
    (folder / 'done.json').unlink()
    again = TASK[1](cfg, folder, Processes())
    assert train(again, cfg, folder, Processes()).step == 4
    assert torch.equal(again.model.query_embed.weight, task.model.query_embed.weight)


def test_a_large_start_with_the_recipe_of_a_small_one_is_said(tmp_path, capsys):
    "Such as a pre-training by `paper`, where nobody names a preset; the numbers are those of the run."
    large = dict(hidden_dim=256, enc_layers=1, dec_layers=1, dim_feedforward=16, num_queries=8)
    args = dataclasses.asdict(make_config('paper', backbone='resnet18', weights='none', num_patches=4, **large))
    save_checkpoint(path := tmp_path / 'large.pth', {'model': build_updetr('resnet18', num_patches=4, **large).state_dict(), 'args': args})
    said = ('large.pth is 256 channels wide, and the recipe of preset demo is for 128: lr 0.0002, square 256, num_queries 20. '
            'For a large model: -p preset ')
    others_of = {finetune_config: 'voc150 or voc300 or coco150 or coco300', oneshot_config: 'voc', panoptic_config: 'coco'}
    for configure, others in others_of.items():
        configure(lr=2e-4, pretrain=str(path))
        assert capsys.readouterr().out == f'{said}{others}\n'
    finetune_config('coco150', pretrain=str(path))
    finetune_config(hidden_dim=256)
    assert not capsys.readouterr().out


def test_evaluation_can_be_switched_off_and_on(tmp_path):
    folder = finish(make_run(tmp_path / 'run', epochs=1, eval_every=0))
    assert not any(k.startswith('test_') for r in read_log(folder) for k in r)
    cfg = json.loads((folder / 'cfg.json').read_text())
    write_json(folder / 'cfg.json', cfg | {'eval_every': 1})
    finish(folder)
    assert [step for step, *_ in measured(folder)] == [4]
    write_json(folder / 'cfg.json', cfg | {'lr': .5})
    with pytest.raises(ValueError, match='lr: 0.001 -> 0.5'): finish(folder)


@pytest.mark.parametrize('name', ['retinanet', 'faster_rcnn_fpn', 'gridrcnn', 'doublehead'])
def test_a_detector_of_torchvision_in_the_same_harness(name, tmp_path):
    changes = dict(detector=name, features='layer2,layer3', standardize=False, epochs=1, eval_every=1, frozen_backbone=False)
    folder = finish(make_run(tmp_path / 'run', **changes))
    row = read_log(folder)[-1]
    assert row['step'] == 4 and 'test_AP' in row and row['train_loss'] > 0
    answer = Detector.from_checkpoint(folder / 'checkpoint.pth')(open_sets(finetune_config('demo', **TINY))[1][0]['image'], threshold=0.)
    assert answer.boxes.shape[1:] == (4,) and all(0 <= k < 8 for k in answer.labels.tolist())


@pytest.mark.parametrize('changes, why', [
    (dict(preset='voc150'), 'no labelled photos'), (dict(preset='voc150', data='nowhere'), 'nothing at nowhere'),
    (dict(preset='demo', pretrain='no.pth'), 'no.pth'), (dict(preset='demo', detector='yolo', cached_views=0), 'yolo'),
    (dict(preset='demo', frozen_backbone=False), 'cached_views needs'), (dict(preset='demo', detector='retinanet'), 'detector detr'),
    (dict(preset='voc'), "preset 'voc' is unknown"), (dict(preset='demo', eval_evry=2), 'did you mean eval_every'),
    (dict(preset='demo', scenes_val=0), 'belong together'), (dict(preset='demo', num_queries='20'), 'must be int')],
    ids=lambda c: '-'.join(f'{k}' for k in c) if isinstance(c, dict) else '')
def test_what_cannot_be_is_refused(changes, why, tmp_path, monkeypatch):
    monkeypatch.delenv('UPDETR_DATA', raising=False)
    with pytest.raises((ValueError, FileNotFoundError), match=why):
        cfg = finetune_config(**changes)
        TASK[1](cfg, tmp_path, Processes())


def test_year_may_be_a_number(): assert finetune_config('voc150', year=2007).year == '2007'


def test_photos_to_evaluate_on_have_the_labels_of_the_training(tmp_path):
    "Whatever the order of classes in a file of their own, and wherever their photos lie."
    ours, theirs = coco(tmp_path / 'ours'), coco(tmp_path / 'theirs', names=('dog', 'cat'))
    (theirs / 'val').rename(elsewhere := tmp_path / 'elsewhere')
    files = dict(data=ours / 'annotations/instances_train.json', data_val=theirs / 'annotations/instances_val.json')
    files |= dict(images=ours / 'train', images_val=elsewhere)
    train_set, val_set = open_sets(finetune_config('demo', **TINY | dict(scenes=0, scenes_val=0) | {k: str(v) for k, v in files.items()}))
    assert list(train_set.classes) == list(val_set.classes) == ['cat', 'dog']
    for part, names in ((train_set, ['cat', 'dog']), (val_set, ['dog', 'cat'])):
        assert [part.classes[k] for i in range(4) for k in part[i]['labels']] == names * 2
    # photos of the same names lie in both folders
    assert torch.equal(val_set[0]['image'], read_photo(elsewhere / '0.png'))


def small(data, **changes):
    common = dict(square=0, val_size=64, scenes=0, scenes_val=0, batch_size=4, epochs=1, eval_every=1, frozen_backbone=False, save_every=99)
    return finetune_config('demo', **TINY | common | dict(data=str(data)) | changes)


@pytest.mark.data
def test_animals(data, tmp_path, monkeypatch):
    """VOC's layout through the real loaders: padded live views of two steps, and an evaluation."""
    cfg = small(data / 'animals', split='trainval', split_val='test', year='2007', year_val='2007', photos=8)
    task = TASK[1](cfg, tmp_path, Processes())
    assert len(task.train_set) == 8 and len(task.val_set) == 1000 and task.notes['class_names'] == ['cat', 'cow', 'dog', 'horse', 'sheep']
    batch = next(task.batches(0, 1))
    assert batch['mask'] is not None and batch['images'].shape[0] == 4
    assert train(task, cfg, tmp_path, Processes()).step == 2
    row = read_log(tmp_path)[-1]
    assert 0 <= row['test_best_iou'] <= 1 and row['test_AP'] >= 0
    assert load_checkpoint(tmp_path / 'checkpoint.pth')['class_names'][0] == 'cat'


@pytest.mark.data
def test_coco_mini(data, tmp_path):
    """A COCO file by path beside another one to evaluate on; 80 classes, ids up to 90."""
    val = json.loads((data / 'coco_mini/annotations/instances_val.json').read_text())
    val['images'] = val['images'][:12]
    kept = {i['id'] for i in val['images']}
    val['annotations'] = [a for a in val['annotations'] if a['image_id'] in kept]
    (data_val := tmp_path / 'val.json').write_text(json.dumps(val))
    (tmp_path / 'images').symlink_to((data / 'coco_mini/images').resolve())
    cfg = small(data / 'coco_mini/annotations/instances_train.json', data_val=str(data_val), photos=8)
    task = TASK[1](cfg, tmp_path / 'run', Processes()) if (tmp_path / 'run').mkdir() is None else None
    assert len(task.train_set.classes) == 80 and len(task.val_set) == 12
    assert train(task, cfg, tmp_path / 'run', Processes()).step == 2 and 'test_AP' in read_log(tmp_path / 'run')[-1]
