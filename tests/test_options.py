"Options of trainings on one's own photos: schedules, averages, frozen parts, weights of classes, changed views, in whole runs."
import dataclasses
import json
import math
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import box_convert, masks_to_boxes

from test_skipped import cnn_config
from updetr.core.config import LATER, check_config, make_config
from updetr.data.scenes import Scenes
from updetr.data.transforms import PIXELS, PLACES, Changes, DetectionViews, Sizes
from updetr.predict.segmenter import PanopticSegmenter
from updetr.tasks.finetune import class_counts, finetune_config
from updetr.tasks.finetune_task import TASK as FINETUNE
from updetr.tasks.oneshot import oneshot_config
from updetr.tasks.oneshot_task import TASK as ONESHOT
from updetr.tasks.panoptic import PanopticScenes
from updetr.tasks.panoptic_task import TASK as PANOPTIC
from updetr.tasks.panoptic_task import panoptic_config
from updetr.train import loop
from updetr.train.launch import read_log
from updetr.train.loop import Processes, train

TINY = dict(scenes=8, scenes_val=2, scene_size=64, val_size=64, square=64, backbone='resnet18', weights='none', features='layer2',
            hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2, num_queries=8, cached_views=0, batch_size=2, epochs=2, eval_every=0,
            log_every=1, dropout=.1, frozen_backbone=False, standardize=False)
KINDS = {'finetune': (finetune_config, FINETUNE[1], {}), 'oneshot': (oneshot_config, ONESHOT[1], dict(query_size=32)),
         'panoptic': (panoptic_config, PANOPTIC[1], dict(features='layer3', dec_layers=1))}
MASKS = ('scenes scenes_val scene_size val_size square batch_size log_every epochs mosaic augment flip freeze best_metric patience '
         'eval_every num_workers threshold').split()


def make(kind, folder, **changes):
    config, task, own = KINDS[kind]
    cfg = config('demo', **TINY | own | changes)
    folder.mkdir()
    return task(cfg, folder, Processes()), cfg


def copied(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.fixture
def after_each_step(monkeypatch):
    "The model's numbers after each step of a run."
    kept, step = [], loop.train_step

    def noted(module, batches, state, *args, **kwargs):
        result = step(module, batches, state, *args, **kwargs)
        kept.append(copied(state.model))
        return result

    monkeypatch.setattr(loop, 'train_step', noted)
    return kept


@pytest.mark.parametrize('kind', ['finetune', 'oneshot'])
def test_all_options_in_one_run(kind, tmp_path, after_each_step):
    "Eight steps, two of them warm-up, then a cosine; averaged weights; a frozen encoder and layers of the CNN; views that are changed."
    task, cfg = make(kind, tmp_path / 'run', schedule='cosine', warmup=.25, ema=.8, weight_decay=.5, lr=1e-2, flip=False, mosaic=.5,
                     augment='turn, rotate, colour', freeze='transformer.encoder, backbone.0.body.layer2.0')
    before = copied(task.model)
    state = train(task, cfg, tmp_path / 'run', Processes())
    after = copied(state.model)

    # the rates, by their formula
    rates = [row['train_lr'] / cfg.lr for row in read_log(tmp_path / 'run') if 'train_lr' in row]
    steps = len(rates)
    assert steps == 2 * task.steps_per_epoch >= 8
    warm = steps // 4
    wanted = [(s + 1) / warm for s in range(warm)] + [(1 + math.cos(math.pi * (s - warm) / (steps - warm))) / 2 for s in range(warm, steps)]
    assert rates == pytest.approx(wanted, rel=1e-6)

    # the average, step by step
    average = after_each_step[0]
    for now in after_each_step[1:]:
        average = {k: .8 * average[k] + .2 * v if v.is_floating_point() else v for k, v in now.items()}
    ours = state.ema.module.state_dict()
    assert all(torch.allclose(average[k], ours[k], atol=1e-6) for k in average if average[k].is_floating_point())
    assert not all(torch.allclose(ours[k], after[k], atol=1e-4) for k in after)

    # what is frozen, also in the average
    still = ('transformer.encoder.', 'backbone.0.body.layer2.0.')
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert not [k for k in moved if k.startswith(still)] and all(torch.equal(before[k], ours[k]) for k in before if k.startswith(still))
    assert any(k.startswith('transformer.decoder.') for k in moved) and any(k.startswith('backbone.0.body.layer2.1.') for k in moved)


def test_workers_draw_the_same_views(tmp_path):
    "Live views, changed and put together, by two processes: the run to the last bit."
    changed = dict(epochs=1, mosaic=.5, augment='turn, rotate, zoom_out, colour, grey, blur', frozen_backbone=True)
    ends = []
    for workers in (0, 2):
        task, cfg = make('finetune', folder := tmp_path / str(workers), num_workers=workers, **changed)
        ends.append(copied(train(task, cfg, folder, Processes()).model))
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_both_stages_of_panoptic_take_the_same_options(tmp_path):
    "As its notebook gives them; what one stage measures or trains is no error in the other."
    given = dict(mosaic=.5, augment='rotate, colour', flip=False, freeze='transformer.encoder', best_metric='PQ', patience=1, eval_every=1,
                 epochs=1, num_workers=0, threshold=.05)
    task, cfg = make('panoptic', boxes := tmp_path / 'boxes', **given)
    before = copied(task.model)
    after = copied(train(task, cfg, boxes, Processes()).model)
    assert all(torch.equal(v, after[k]) == ('encoder' in k) for k, v in before.items() if k.startswith('transformer.') and 'weight' in k)
    cfg = panoptic_config('demo', 'masks', pretrain=str(boxes), **{k: v for k, v in (TINY | given).items() if k in MASKS})
    (masks := tmp_path / 'masks').mkdir()
    state = train(PANOPTIC[1](cfg, masks, Processes()), cfg, masks, Processes())
    assert state.step == 4 and cfg.mosaic == .5 and cfg.freeze == ''
    best = [json.loads((folder / 'evaluations.json').read_text())['best']['metric'] for folder in (boxes, masks)]
    assert best == ['AP', 'PQ'] and PanopticSegmenter.from_checkpoint(masks).classes
    for wrong, why in ((dict(focal=2.), 'unknown parameter: focal'), (dict(best_metric='AQ'), "best_metric 'AQ' is not measured"),
                       (dict(classes='cat'), 'classes cannot be chosen')):
        with pytest.raises(ValueError, match=why): panoptic_config('demo', **wrong)


def test_a_frozen_cnn_stays(tmp_path):
    task, cfg = make('finetune', tmp_path / 'run', frozen_backbone=True, epochs=1, weight_decay=.5)
    before = copied(task.cnn)
    state = train(task, cfg, tmp_path / 'run', Processes())
    assert all(torch.equal(v, before[k]) for k, v in state.model.backbone[0].state_dict().items())


def test_weights_of_classes_come_from_the_training_photos(tmp_path):
    task, cfg = make('finetune', tmp_path / 'run', class_weights='balanced', focal=2., epochs=1)
    counts, criterion = torch.tensor(class_counts(task.train_set)).float(), task.module.criterion
    weights, seen = criterion.empty_weight[:-1], counts > 0
    assert criterion.focal == 2 and (weights[seen] * counts[seen].sqrt()).std() < 1e-5 and len(set(weights.tolist())) > 1
    train(task, cfg, tmp_path / 'run', Processes())
    plain, _ = make('finetune', tmp_path / 'plain')
    assert not plain.module.criterion.weighted and plain.module.criterion.empty_weight.tolist()[:-1] == [1] * 8


@pytest.mark.parametrize('changes, why', [
    (dict(freeze='transformer.encodr'), 'did you mean transformer.encoder'), (dict(class_weights='catt=2'), 'did you mean cat'),
    (dict(class_weights='balance'), "'balanced', or names"), (dict(class_weights='cat'), "class 'cat' has no weight. Write")], ids=str)
def test_a_wrong_name_stops_before_the_first_step(changes, why, tmp_path):
    with pytest.raises(ValueError, match=why): make('finetune', tmp_path / 'run', **changes)


SAVERS = {
    'pretrain': (make_config, {}, {'accumulate', 'gradient_checkpointing'}),
    'of six photos': (finetune_config, dict(batch_size=12, accumulate=2), {'accumulate', 'gradient_checkpointing'}),
    'checkpointed': (finetune_config, dict(gradient_checkpointing=True), {'accumulate'}),
    'retinanet': (finetune_config, dict(detector='retinanet', cached_views=0), {'accumulate'}),
    'siamfc': (oneshot_config, dict(system='siamfc'), {'accumulate'}),
    'boxes': (panoptic_config, {}, {'accumulate', 'gradient_checkpointing'}),
    'panopticfpn': (panoptic_config, dict(stage='panopticfpn', cached_views=0), {'accumulate'}),
    'a photo at a time': (finetune_config, dict(batch_size=2), {'gradient_checkpointing'}),
    'cnn': (cnn_config, {}, set())}


@pytest.mark.parametrize('case', SAVERS)
def test_what_is_said_to_save_memory_can_be_begun(case, monkeypatch):
    "In two processes."
    config, changes, names = SAVERS[case]
    cfg = check_config(config('demo', **changes))
    monkeypatch.setattr(loop, 'process_count', lambda: 2)
    said = loop.memory_advice(torch.zeros(1), SimpleNamespace(cfg=cfg, step=0))
    told = dict(re.findall(r'(accumulate|gradient_checkpointing)=(\w+)', said))
    assert told.keys() == names and ('smaller' in said) == (not names)
    values = {k: told[k] == 'True' or int(told[k]) for k in told}
    for k, v in values.items(): check_config(dataclasses.replace(cfg, **{k: v}))
    micros = values.get('accumulate', 1)
    assert cfg.batch_size % (2 * micros) == 0 and micros in (1, {'of six photos': 3}.get(case, 2))


def test_whose_query_it_is_must_be_known():
    with pytest.raises(ValueError, match='mosaic needs own_queries'): oneshot_config('demo', mosaic=.5, own_queries=False)


def test_the_defaults_are_what_runs_did_before():
    new = {k: LATER[k] for k in ('flip', 'augment', 'mosaic', 'freeze', 'class_weights', 'focal')}
    for preset in ('demo', 'voc150', 'coco300'):
        cfg = dataclasses.asdict(finetune_config(preset))
        assert {k: cfg[k] for k in new} == new
    assert Changes() == finetune_config('demo').view_changes()


def test_masks_follow_and_a_copy_in_another_process_draws_the_same():
    "All that is left of a thing's mask lies in its box. (Which may be larger: what a cell cuts off is not always at the thing's sides.)"
    every = Changes(augment=', '.join([*PLACES, *PIXELS]), mosaic=.5)
    views = DetectionViews(PanopticScenes(Scenes(4, 96), masks=True), sizes=Sizes().scaled(96), changes=every)
    copy = pickle.loads(pickle.dumps(views))
    for epoch in range(4):
        image, target = views[epoch, epoch]
        torch.rand(3)  # another state of torch's generator
        assert torch.equal(copy[epoch, epoch][0], image)
        assert target['masks'].shape[1:] == image.shape[1:] and len(target['masks']) == len(target['boxes']) == len(target['labels']) > 0
        scale = torch.tensor([*image.shape[2:0:-1]] * 2)
        boxes = box_convert(target['boxes'], 'cxcywh', 'xyxy') * scale
        seen = target['masks'].flatten(1).any(1)
        of_masks = masks_to_boxes(target['masks'][seen])
        assert (of_masks[:, :2] >= boxes[seen, :2] - 1.5).all() and (of_masks[:, 2:] + 1 <= boxes[seen, 2:] + 1.5).all()
