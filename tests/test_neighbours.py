"""Other systems than DETR in the one-shot harness: the kit's four on live photos, and one of somebody's own."""
import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import box_iou

from test_oneshot import LIVE, TINY, make_run, make_task
from test_resume import as_in_the_processes, finish  # noqa: F401 (a fixture: one thread here, too)
from test_task import rows
from updetr.core.config import LATER, NEIGHBOURS, cfg_changes, find_builder
from updetr.data.scenes import Scenes
from updetr.data.transforms import DetectionViews, Sizes
from updetr.model.backbone import prepare_images
from updetr.neighbours import siamese
from updetr.neighbours.heads import grid_rcnn
from updetr.neighbours.panoptic_fpn import panoptic_fpn
from updetr.neighbours.tracking import match_frames, moving_scene, track
from updetr.neighbours.upsnet import UPSNet, upsnet
from updetr.predict.detector import Detector
from updetr.predict.oneshot_detector import OneShotDetector
from updetr.tasks.cnn_task import CNN, object_features
from updetr.tasks.oneshot import oneshot_config, oneshot_summary, oneshot_table
from updetr.tasks.oneshot_task import evaluate_oneshot, open_run
from updetr.tasks.panoptic import PanopticScenes

PYRAMID = dict(backbone='tf_efficientnet_lite0', features=['blocks.1', 'blocks.2', 'blocks.4'], weights='builtin', frozen=True, channels=16)

# where a cell of the photo agrees with the mean of the query's map, there is a box of two cells
MINE = '''
import torch
from torch import nn
from updetr.model.backbone import build_backbone

class Cells(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        cnn = build_backbone(cfg.backbone, None, cfg.features.split(','), frozen=cfg.frozen_backbone)
        self.backbone = nn.ModuleList([cnn])
        self.scale = nn.Parameter(torch.ones(cnn.num_channels, 1, 1))

    def agreement(self, feature, pictures):
        return (feature * self.scale * pictures.mean((2, 3), keepdim=True)).mean(1)

    def forward(self, feature, pictures, targets):
        return {'mine': self.agreement(feature, pictures).square().mean()}

    def answer(self, feature, pictures, target):
        height, width = feature.shape[2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
        cell = (target['orig_size'] / torch.tensor([height, width])).flip(0).repeat(2)
        boxes = torch.stack([x - .5, y - .5, x + 1.5, y + 1.5], -1).flatten(0, 1) * cell
        return [{'scores': s.flatten().sigmoid(), 'boxes': boxes} for s in self.agreement(feature, pictures)]

def build(cfg): return Cells(cfg)
'''


def test_windows_are_compared_in_single_precision(monkeypatch):
    "Neither in bf16, nor with the ten bits that GPUs take for float32 in a convolution; outside all is as before."
    seen, whole = [], torch.backends.cudnn
    def of_shape(*shape, made=siamese.window_filter):
        seen.append((whole.allow_tf32, torch.is_autocast_enabled('cpu')))
        return made(*shape)
    monkeypatch.setattr(siamese, 'window_filter', of_shape)
    this = SimpleNamespace(scale=10., offset=-5., stride=16)
    before = whole.enabled, whole.allow_tf32
    with torch.autocast('cpu', torch.bfloat16): siamese.SiamFC.windows(this, torch.randn(1, 8, 6, 6), torch.randn(1, 8, 2, 2))
    assert set(seen) == {(False, False)} and (whole.enabled, whole.allow_tf32) == before


def test_a_system_of_ones_own_is_trained_and_asked(tmp_path, monkeypatch):
    (tmp_path / 'my_system.py').write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    finish(folder := make_run(tmp_path / 'run', system='my_system:build', ema=.5, epochs=2, eval_every=2))
    task = open_run(folder)
    assert sum('train_mine' in row for row in rows(folder)) == 4 and (task.model.scale != 1).all()
    again = oneshot_summary(oneshot_table(evaluate_oneshot(task, task.answer(task.model))))
    assert again == pytest.approx({k.removeprefix('test_'): v for k, v in rows(folder)[-1].items() if k.startswith('test_')}, abs=1e-3)
    assert task.features[1].dim() == 5  # whole maps, plain and mirrored
    with pytest.raises(ValueError, match='open it with OneShotDetector'): Detector.from_checkpoint(folder / 'checkpoint.pth')
    # outside of the run it answers the test's question as in the test
    sample, opened = task.val_set[0], OneShotDetector.from_checkpoint(folder / 'checkpoint.pth')
    image, target = task.val_views.look(sample, 0, 0)
    picture = task.pools[1].picture(0)
    photo, asked = [opened.cnn(prepare_images(opened.cnn, x[None])) for x in (image, picture)]
    want, = task.model.answer(photo, asked, {k: target[k] for k in ('size', 'orig_size')})
    found = opened.detect(sample['image'], picture, threshold=0)
    torch.testing.assert_close(found.scores, want['scores'].sort(descending=True).values)
    assert len(found) > 10
    with pytest.raises(ValueError, match='my_system:biuld cannot be imported'): find_builder('oneshot', 'my_system:biuld')
    # opened elsewhere: a run's file does not choose whose code runs
    monkeypatch.delitem(sys.modules, 'my_system')
    for open_it in (open_run, OneShotDetector.from_checkpoint):
        with pytest.raises(ValueError, match='import my_system first'): open_it(folder)
    assert 'my_system' not in sys.modules


@pytest.mark.parametrize('system', NEIGHBOURS['oneshot'])
def test_photos_as_they_are_train_the_cnn_too(system, tmp_path):
    "Live views, the query's map by the CNN as it is now; every parameter learns, and answers lie in the photo."
    task = make_task(tmp_path / 'run', system=system, **LIVE)
    batch = next(task.batches(0, 1))
    with torch.autocast('cpu', torch.bfloat16):  # as on a GPU; boxes and scores stay in single precision
        half, _ = task.module.train()(batch)
        said, = task.model.eval().answer(torch.randn(1, 48, 8, 8), torch.randn(1, 48, 4, 4), batch['targets'][0])
    assert torch.isfinite(half) and {v.dtype for v in said.values()} == {torch.float32}
    loss, losses = task.module.train()(batch)
    loss.backward()
    assert torch.isfinite(loss) and torch.isclose(loss, sum(losses.values()))
    assert not [n for n, p in task.model.named_parameters() if p.requires_grad and p.grad is None]
    assert any(p.grad.abs().sum() > 0 for n, p in task.model.named_parameters() if 'backbone' in n and p.requires_grad)
    evaluator = evaluate_oneshot(task, task.answer(task.model.eval()))
    for said in (p for e in evaluator.rounds for p in e.predictions.values()):
        assert len(said['boxes']) and said['boxes'].min() >= -.01 and said['boxes'].max() <= 64.01


@pytest.mark.parametrize('system', NEIGHBOURS['oneshot'])
def test_a_photo_twice_as_large_has_boxes_twice_as_large(system):
    "The view is no multiple of the stride, and not square; no two answers are of one place, and all lie in the view's cells."
    torch.manual_seed(0)
    model = find_builder('oneshot', system)(oneshot_config('demo', **TINY, system=system)).eval()
    channels = model.backbone[0].num_channels
    feature, pictures = torch.randn(1, channels, 7, 9), torch.randn(2, channels, 4, 4)
    size = torch.tensor([50, 70])
    with torch.no_grad():
        once = model.answer(feature, pictures, {'size': size, 'orig_size': size})
        twice = model.answer(feature, pictures, {'size': size, 'orig_size': 2 * size})
    for a, b in zip(once, twice, strict=True):
        assert len(a['boxes']) and torch.allclose(a['boxes'] * 2, b['boxes']) and torch.equal(a['scores'], b['scores'])
        assert len(a['boxes']) <= 100 and box_iou(a['boxes'], a['boxes']).triu(1).max() <= .5
        assert a['boxes'].min() >= 0 and (a['boxes'][:, 2:].amax(0) <= torch.tensor([72, 56])).all()


@pytest.mark.parametrize('system, times', [('compnet', 1), ('coae', 3), ('siamrpn', 3)])
def test_what_no_query_has_changed_is_looked_at_once(system, times):
    "Three questions about a photo, together: each is answered as alone, and CompNet's first stage runs on the photo once."
    torch.manual_seed(0)
    model = find_builder('oneshot', system)(oneshot_config('demo', **TINY, system=system)).eval()
    channels, seen, size = model.backbone[0].num_channels, [], torch.tensor([56, 72])
    feature, pictures = torch.randn(1, channels, 7, 9), torch.randn(3, channels, 4, 4)
    target = {'size': size, 'orig_size': size}
    model.rpn.head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0][0])))
    with torch.no_grad():
        together = model.answer(feature, pictures, target)
        assert seen == [times]
        for said, picture in zip(together, pictures, strict=True):
            alone, = model.answer(feature, picture[None], target)
            assert len(said['boxes']) and torch.allclose(said['boxes'], alone['boxes'], atol=1e-3)
            assert torch.allclose(said['scores'], alone['scores'], atol=1e-5)
    assert not torch.equal(together[0]['scores'], together[1]['scores'])


@pytest.mark.parametrize('share', [1., .9])
def test_a_mask_may_stick_out_of_its_box(share):
    "As after a crop: the pixels outside are nobody's loss, and those inside still count."
    scenes = PanopticScenes(Scenes(2, 128, seed=1))
    views = DetectionViews(scenes, sizes=Sizes().scaled(128), train=False)
    images, targets = zip(*[views[0, i] for i in range(2)])
    targets = [t | {'boxes': t['boxes'] * torch.tensor([1, 1, share, share])} for t in targets]
    torch.manual_seed(0)
    model = upsnet(scenes.isthing, **PYRAMID)
    _, losses = model.train()({'images': torch.stack(images).float() / 255, 'mask': None, 'targets': targets})
    assert .1 < losses['loss_panoptic'] < 10


@pytest.mark.parametrize('side', [16, 32, 64])
def test_upsnet_keeps_the_edge_of_a_thing(side):
    "A perfect square with perfect maps: what lies between two cells of the map is not lost"
    model = upsnet([True, False], **PYRAMID).eval()
    inside = torch.zeros(64, 64, dtype=torch.bool)
    cells = slice(64 // model.stride, (64 + side) // model.stride)
    inside[cells, cells] = True
    # stuff first, then things
    semantic = torch.stack([torch.where(inside, -8., 8.), torch.where(inside, 8., -8.)])
    found = dict(boxes=torch.tensor([[64., 64., 64. + side, 64. + side]]), scores=torch.ones(1), labels=torch.ones(1, dtype=torch.long),
                 masks=torch.ones(1, 1, 28, 28))
    size = torch.tensor([256, 256])
    ids, info = model.join(found, semantic, dict(size=size, orig_size=size), .5)
    truth = torch.zeros(256, 256, dtype=torch.bool)
    truth[64:64 + side, 64:64 + side] = True
    thing, = [s['id'] for s in info if s['category_id'] == 0]
    assert (truth & (ids == thing)).sum() / (truth | (ids == thing)).sum() > .95


@pytest.mark.parametrize('build', [panoptic_fpn, upsnet])
def test_padding_says_nothing_and_answers_have_the_photos_size(build):
    "A view that is wider than high, of a photo of another size"
    torch.manual_seed(0)
    model = build([True, False, False], **PYRAMID)
    view, target = torch.randn(3, 96, 128), {'size': torch.tensor([96, 128]), 'orig_size': torch.tensor([60, 90])}
    padded = torch.randn(1, 3, 128, 192)
    padded[0, :, :96, :128] = view
    mask = torch.ones(1, 128, 192, dtype=torch.bool)
    mask[0, :96, :128] = False
    (want, info), = model.segments({'images': view[None], 'mask': None, 'targets': [target]}, .1)
    (ids, same), = model.segments({'images': padded, 'mask': mask, 'targets': [target]}, .1)
    assert ids.shape == (60, 90) and torch.equal(ids, want) and info == same


@pytest.mark.parametrize('share, kept', [(0., 1), (1., 0)])
def test_upsnet_asks_for_the_things_that_are_not_held_back(share, kept):
    "Where they are, in a view that is wider than high."
    torch.manual_seed(0)
    model, seen = upsnet([True, False], **PYRAMID), []
    model.held_back = share
    model._mask_logits = lambda levels, boxes, *more: seen.extend(boxes) or UPSNet._mask_logits(model, levels, boxes, *more)
    masks = torch.zeros(1, 64, 128, dtype=torch.bool)
    masks[0, 16:48, 32:64] = True
    target = {'labels': torch.tensor([0]), 'boxes': torch.tensor([[.375, .5, .25, .5]]), 'masks': masks, 'size': torch.tensor([64, 128])}
    model.train()({'images': torch.randn(1, 3, 64, 128), 'mask': None, 'targets': [target]})
    assert seen[0].tolist() == [[32, 16, 64, 48]][:kept]


def test_upsnet_says_a_thing_once_and_no_crumb_of_stuff():
    "Of two boxes at one place the surer one, whatever the pixels say; classes in any order."
    model = upsnet([False, None, True, False, True], **PYRAMID).eval()
    cells = slice(64 // model.stride, 128 // model.stride)
    # stuff 0 and 3, things 2 and 4; a cell of stuff 3
    semantic = torch.full((4, 64, 64), -8.)
    semantic[0], semantic[1, 0, 0] = 8, 30
    semantic[0, cells, cells], semantic[2, cells, cells], semantic[3, cells, cells] = -8, 9, 8
    found = dict(boxes=torch.tensor([[64., 64., 128., 128.]] * 2), scores=torch.tensor([.9, .8]), labels=torch.tensor([2, 1]),
                 masks=torch.ones(2, 1, 28, 28))
    size = torch.tensor([256, 256])
    _, info = model.join(found, semantic, dict(size=size, orig_size=size), .5)
    assert sorted(s['category_id'] for s in info) == [0, 4]


def test_grids_that_lead_to_one_box_answer_once_and_in_the_photo():
    "Two proposals that hardly overlap, whose maps lead beyond the photo."
    heads = grid_rcnn(1, **PYRAMID).model.roi_heads
    proposals = [torch.tensor([[10., 10, 50, 50], [30, 10, 70, 50]])]
    heads._logits = lambda *_: torch.tensor([[0., 3], [0, 2]])
    maps = torch.zeros(2, 3, 3, 56, 56)
    for i, right in enumerate((54, 40)):
        for row, y in enumerate((1, 28, 54)):
            for column, x in enumerate((1, 28, right)): maps[i, row, column, y, x] = 20
    heads.maps = lambda *_: maps.flatten(1, 2)
    answer, = heads._find(None, proposals, [(64, 66)])
    assert answer['boxes'].round().tolist() == [[0, 0, 66, 64]]


def test_a_track_goes_on_from_the_last_frame():
    "Not from the first one, where something else is nearer."
    class Localizer:
        query_size, query_shape, seen = 32, 'squash', 0
        def open(self, frame): return self
        def ask(self, pictures, best_of_group):
            self.seen += 1
            boxes = torch.tensor([[100., 100, 120, 120], [62., 100, 82, 120]])
            boxes[0] += torch.tensor([20., 0, 20, 0]) * self.seen
            return SimpleNamespace(scores=torch.tensor([.5, .5]), boxes=boxes)

    frames = torch.zeros(4, 3, 400, 400, dtype=torch.uint8)
    assert track(Localizer(), frames, [100, 100, 120, 120], .5)[0][:, 0].tolist() == [100, 120, 140, 160]


def test_a_template_is_found_in_frames_that_are_not_square():
    clip = moving_scene(2, 1)
    frame, box = clip.frames[0][:, :, 20:], clip.boxes[0] - torch.tensor([20, 0, 20, 0])
    frame = torch.cat([frame, frame.flip(2)], 2)[:, :, :400]
    found = match_frames([frame, frame], box.tolist())
    assert box_iou(found[1:], box[None]).item() > .7


def test_a_prior_of_nearly_nothing_takes_the_nearest():
    "Also where all boxes are many sides away, and of whatever score"
    last, prior = torch.tensor([100., 100., 120., 120.]), .01
    boxes = torch.tensor([[300., 300., 320., 320.], [104., 100., 124., 120.], [110., 100., 130., 120.]])

    class Localizer:
        query_size, query_shape = 32, 'squash'
        def open(self, frame): return self
        def ask(self, pictures, best_of_group): return SimpleNamespace(scores=torch.tensor([.01, .9, .95]), boxes=boxes)

    frames = torch.zeros(2, 3, 400, 400, dtype=torch.uint8)
    assert torch.equal(track(Localizer(), frames, last.tolist(), prior)[0][1], boxes[1])
    assert torch.equal(track(Localizer(), frames, last.tolist())[0][1], boxes[2])


def test_a_measurement_of_some_objects_is_of_all_classes():
    "Files are often in the order of their classes: the first ones would all be of one"
    class Ordered:
        classes = ['a', 'b', 'c', 'd']
        def __len__(self): return 40
        def __getitem__(self, i):
            return dict(image=torch.zeros(3, 32, 32, dtype=torch.uint8), boxes=torch.tensor([[2., 2., 20., 20.]]),
                        labels=torch.tensor([i // 10]), iscrowd=torch.tensor([False]))
    model = CNN('resnet18', ['layer1'], 4, labels=True).eval()
    _, labels = object_features(model, Ordered(), 32, limit=20)
    assert len(labels) == 20 and set(labels.tolist()) == {0, 1, 2, 3}


def test_runs_of_detr_keep_their_names():
    "An older configuration is one without another system."
    now = dataclasses.asdict(oneshot_config('demo'))
    older = {k: v for k, v in now.items() if k != 'system'}
    assert LATER['system'] == now['system'] == '' and not cfg_changes(older, now)
    assert cfg_changes(older, now | {'system': 'coae'})
