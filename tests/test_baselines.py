"The baselines against torchvision's own detectors: same losses, same boxes, and labels and sizes that come back right."
import copy
from functools import lru_cache
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import resnet18
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet, fcos, retinanet
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FrozenBatchNorm2d, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from conftest import undrawn
from updetr.core.boxes import pad_images
from updetr.model.baselines import BASELINES, TORCHVISION, TWO_STAGE, Baseline, build_baseline

C, SIZES, PHOTOS = 3, [(64, 96), (96, 64)], [(128, 192), (48, 32)]
BOXES = [[[8., 8, 40, 56], [50, 10, 90, 34]], [[4., 20, 60, 90]]]
LABELS = [[0, 2], [1]]
RCNN = ('faster_rcnn_fpn', 'faster_rcnn_c4', 'mask_rcnn')
FEW = dict(rpn_post_nms_top_n_train=60, rpn_post_nms_top_n_test=20, box_batch_size_per_image=32)


def filled(box, height, width):
    "The mask of a box, bool (h, w)"
    mask, (x1, y1, x2, y2) = torch.zeros(height, width, dtype=torch.bool), map(int, box)
    mask[y1:y2, x1:x2] = True
    return mask


def make_batch(empty=()):
    "Two images of different shapes in the harness's form; those in `empty` have no boxes. And the same in torchvision's, labels from 0."
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *s, generator=g) for s in SIZES]
    padded, mask = pad_images(images)
    padded[mask[:, None].expand_as(padded)] = 7.  # whoever looks at the padding is found out
    targets, theirs = [], []
    for i, ((h, w), photo) in enumerate(zip(SIZES, PHOTOS)):
        boxes = torch.tensor([] if i in empty else BOXES[i]).reshape(-1, 4)
        labels = torch.tensor([] if i in empty else LABELS[i], dtype=torch.long)
        masks = torch.stack([filled(b, h, w) for b in boxes]) if len(boxes) else torch.zeros(0, h, w, dtype=torch.bool)
        relative = torch.stack([(boxes[:, 0] + boxes[:, 2]) / 2 / w, (boxes[:, 1] + boxes[:, 3]) / 2 / h,
                                (boxes[:, 2] - boxes[:, 0]) / w, (boxes[:, 3] - boxes[:, 1]) / h], 1)
        sizes = dict(size=torch.tensor([h, w]), orig_size=torch.tensor(photo), image_id=torch.tensor(i))
        targets.append(dict(labels=labels, boxes=relative, masks=masks, **sizes))
        theirs.append(dict(labels=labels, boxes=boxes, masks=masks.to(torch.uint8)))
    return dict(images=padded, mask=mask, targets=targets), images, theirs


@lru_cache
def built(name, **kwargs):
    few = FEW if name in RCNN else {}
    # each region of this one goes through layer4
    if name == 'faster_rcnn_c4': few = few | dict(box_batch_size_per_image=8)
    return build_baseline(name, C, 'resnet18', **few, **kwargs)


@pytest.fixture(scope='module', autouse=True)
def forget_what_was_built():
    yield
    built.cache_clear()


def build(name, **kwargs):
    "A detector with random weights, always the same: a copy takes a quarter of the time."
    torch.manual_seed(0)
    return copy.deepcopy(built(name, **kwargs))


def torchvision_detector(name, **transform):
    "The same detector as torchvision's users build it. Its weights are not drawn: they are loaded."
    settings = dict(image_mean=[0.] * 3, image_std=[1.] * 3, **transform)
    with undrawn(): return _torchvision_detector(name, settings)


def _torchvision_detector(name, settings):
    if name in ('retinanet', 'fcos'):
        pyramid = resnet_fpn_backbone(backbone_name='resnet18', weights=None, returned_layers=[2, 3, 4],
                                      extra_blocks=LastLevelP6P7(256, 256))
        return dict(retinanet=RetinaNet, fcos=FCOS)[name](pyramid, C, **settings)
    pyramid = resnet_fpn_backbone(backbone_name='resnet18', weights=None)
    return dict(faster_rcnn_fpn=FasterRCNN, mask_rcnn=MaskRCNN)[name](pyramid, C + 1, **settings, **FEW)


def their_state(model): return {k.replace('backbone.cnn.body.', 'backbone.body.'): v for k, v in model.model.state_dict().items()}


each_pyramid = pytest.mark.parametrize('name', ['faster_rcnn_fpn', 'mask_rcnn', 'retinanet', 'fcos'])
each = pytest.mark.parametrize('name', TORCHVISION)


@each_pyramid
@pytest.mark.parametrize('empty', [(), (1,)])
def test_losses_are_torchvisions(name, empty):
    model, theirs = build(name).train(), torchvision_detector(name, _skip_resize=True).train()
    theirs.load_state_dict(their_state(model))
    batch, images, targets = make_batch(empty)
    if name in RCNN: targets = [t | dict(labels=t['labels'] + 1) for t in targets]
    torch.manual_seed(1)
    total, losses = model(batch)
    torch.manual_seed(1)
    want = theirs(images, targets)
    assert losses.keys() == want.keys()
    for k in want: torch.testing.assert_close(losses[k], want[k])
    torch.testing.assert_close(total, torch.stack(list(want.values())).sum())
    trained = {k.replace('backbone.cnn.body.', 'backbone.body.') for k, p in model.model.named_parameters() if p.requires_grad}
    assert trained == {k for k, p in theirs.named_parameters() if p.requires_grad}


@each_pyramid
def test_a_trained_cnn_runs_folded(name):
    "A pass over each map for each of the frozen norms would be spent for nothing."
    model, calls = build(name).train(), []
    for part in model.modules():
        if isinstance(part, FrozenBatchNorm2d): part.register_forward_hook(lambda *call: calls.append(call))
    model(make_batch()[0])[0].backward()
    assert not calls and all(p.grad is not None for p in model.parameters() if p.requires_grad)


@each_pyramid
def test_predictions_are_torchvisions(name):
    "One image at a time, so that torchvision's own resizing has nothing to do; boxes and masks then scaled to the photo."
    model, theirs = build(name).eval(), torchvision_detector(name, min_size=64, max_size=96).eval()
    for m in (model.model, theirs):
        if name in RCNN: m.roi_heads.score_thresh = 0.
        else: m.score_thresh = 0.
    theirs.load_state_dict(their_state(model))
    cnn = model.model.backbone.cnn
    cnn.maps = lambda x: cnn.body(x)  # norm by norm as torchvision's: folded, all but equal scores may change places
    batch, images, _ = make_batch()
    for i, (image, photo) in enumerate(zip(images, PHOTOS)):
        found, = model.predict({k: v[i:i + 1] for k, v in batch.items()})
        with torch.no_grad(): want, = theirs([image])
        scale = torch.tensor([photo[1] / image.shape[2], photo[0] / image.shape[1]]).repeat(2)
        assert len(found['scores']) > 10
        torch.testing.assert_close(found['scores'], want['scores'], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found['boxes'], want['boxes'] * scale, rtol=1e-3, atol=1e-2)
        assert torch.equal(found['labels'], want['labels'] - int(name in RCNN))
        if name == 'mask_rcnn': assert found['masks'].dtype == torch.bool and found['masks'].shape == (len(want['boxes']), *photo)


def class_logits(model):
    "The last layer of the classifier, and which of its outputs is class 0."
    if hasattr(model.model, 'roi_heads'): return model.model.roi_heads.box_predictor.cls_score, 1
    return model.model.head.classification_head.cls_logits, 0


@each
@pytest.mark.parametrize('k', [0, C - 1])
def test_labels_keep_their_number(name, k):
    "A loss of class k moves the logit of class k up, and a detector that says only that logit predicts label k."
    model = build(name, channels=32).train()
    layer, first = class_logits(model)
    nn.init.zeros_(layer.weight)  # the biases alone speak
    nn.init.zeros_(layer.bias)
    batch, _, _ = make_batch()
    for t in batch['targets']: t['labels'] = torch.full_like(t['labels'], k)
    model(batch)[0].backward()
    change = -layer.bias.grad.reshape(-1, C + first).sum(0)[first:]
    assert change.argmax() == k and change.max() > change.sort().values[-2]
    with torch.no_grad(): layer.bias.view(-1, C + first)[:, first + k] += 20
    for p in model.predict(batch): assert len(p['labels']) and (p['labels'][p['scores'] > .5] == k).all() and p['scores'].max() > .5


class Fake(nn.Module):
    "A detector that says one box in pixels of what it is given, with its mask: the whole box."
    def forward(self, images):
        self.sizes = [tuple(x.shape[1:]) for x in images]
        return [dict(boxes=torch.tensor([[8., 16, 40, 48]]), labels=torch.tensor([2]), scores=torch.tensor([.9]),
                     masks=torch.ones(1, 1, 28, 28)) for _ in images]


def test_boxes_and_masks_come_back_in_photo_pixels():
    model = build('retinanet', channels=32).train()
    model.model = Fake()
    found = model.predict(make_batch()[0])
    assert model.model.sizes == SIZES and model.training
    for p, want, photo in zip(found, ([16., 32, 80, 96], [4., 8, 20, 24]), PHOTOS):  # photos twice and half as large
        assert p['boxes'].tolist() == [want] and p['labels'].tolist() == [2] and p['masks'].shape == (1, *photo)
        truth = filled(want, *photo)
        assert (p['masks'][0] & truth).sum() / (p['masks'][0] | truth).sum() > .85


@each
def test_photos_without_boxes(name):
    model = build(name, channels=32).train()
    batch, _, _ = make_batch(empty=(0, 1))
    loss, _ = model(batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        layer, first = class_logits(model)
        layer.weight.zero_()
        layer.bias.view(-1, C + first)[:, first:] = -50.
    for p, photo in zip(model.predict(batch), PHOTOS):
        assert p['scores'].shape == p['labels'].shape == (0,) and p['boxes'].shape == (0, 4)
        assert ('masks' in p) == (name == 'mask_rcnn') and (name != 'mask_rcnn' or p['masks'].shape == (0, *photo))


def test_bad_targets_are_refused():
    batch, _, _ = make_batch()
    model = build('mask_rcnn', channels=32).train()
    del batch['targets'][1]['masks']
    with pytest.raises(ValueError, match='image 1: mask_rcnn needs target.*only the scenes have them'): model(batch)
    model = build('fcos', channels=32).train()
    batch['targets'][0]['labels'] = torch.tensor([0, C])
    with pytest.raises(ValueError, match='image 0: labels 0..3, but the model has 3 classes'): model(batch)
    with pytest.raises(RuntimeError, match='training mode'): model.eval()(batch)


@pytest.mark.parametrize('name', BASELINES)
def test_a_sliver_of_a_box_is_left_out(name):
    "The border may leave a box whose two sides round to the same number: torchvision's losses end the run at it, without the photo's name."
    few = FEW | dict(box_batch_size_per_image=8) if name in TWO_STAGE else {}
    model = build_baseline(name, C, 'resnet18', channels=32, **few).train()
    batch, losses = make_batch()[0], []
    target = batch['targets'][0]
    sliver = dict(boxes=torch.tensor([[.5, 1., .2, 5.96e-8]]), labels=torch.tensor([1]), masks=torch.ones(1, *SIZES[0], dtype=torch.bool))
    for more in (False, True):
        if more: batch['targets'][0] = target | {k: torch.cat([v, target[k]]) for k, v in sliver.items()}
        torch.manual_seed(1)
        losses.append(model(batch)[0])
    assert losses[0].isfinite() and torch.equal(*losses)


class Questions(TorchFunctionMode):
    "Counts what is asked of tensors: on a GPU each question is a wait."
    asked = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.asked += getattr(function, '__name__', '') in ('__int__', '__bool__', '__float__', '__index__', 'item', 'tolist', 'nonzero')
        return function(*args, **(kwargs or {}))


def test_a_step_asks_no_more_questions_of_a_larger_batch():
    "torchvision's own questions are its own."
    class Learner(nn.Module):
        def forward(self, images, targets): return dict(loss=targets[-1]['boxes'].sum())

    model, batch = Baseline(Learner(), C, build('fcos', channels=32).model.backbone.cnn).train(), make_batch()[0]
    few, many = Questions(), Questions()
    with few: model(batch)
    with many: model(dict(images=batch['images'].repeat(4, 1, 1, 1), mask=None, targets=batch['targets'] * 4))
    assert few.asked == many.asked <= 3


@each
def test_weights_reach_every_stage(name, tmp_path):
    "A file of ResNet weights, a classifier's, is in the detector, layer4 included, wherever it went; and the frozen part is frozen."
    torch.manual_seed(1)
    net = resnet18(norm_layer=FrozenBatchNorm2d)
    torch.save(net.state_dict(), tmp_path/'w.pth')
    model = build_baseline(name, C, 'resnet18', weights=str(tmp_path/'w.pth'))
    state, new = model.state_dict(), {'conv1.weight': 'conv1.weight', 'layer3.1.conv2.weight': 'layer3.1.conv2.weight'}
    for key in new | {'layer4.1.conv2.weight': 0}:
        place = f'model.roi_heads.box_head.0{key[6:]}' if name == 'faster_rcnn_c4' and key.startswith('layer4') else None
        found = [k for k in state if k.endswith(f'body.{key}') or k == place]
        assert len(found) == 1 and torch.equal(state[found[0]], net.state_dict()[key])
    trained = {k.split('body.')[1].split('.')[0] for k, p in model.named_parameters() if 'body.' in k and p.requires_grad}
    assert trained == ({'layer2', 'layer3'} if name == 'faster_rcnn_c4' else {'layer2', 'layer3', 'layer4'})


@each
def test_bfloat16_moves_no_anchor(name):
    "bfloat16 has no 257: anchors made in it would be pixels away from where they are in float32."
    model = build(name, channels=32).train()
    generator = getattr(model.model, 'rpn', model.model).anchor_generator
    image, seen = torch.randn(1, 3, 64, 352), []
    generator.register_forward_hook(lambda module, inputs, anchors: seen.append(anchors[0]))
    target = dict(labels=torch.tensor([0]), boxes=torch.tensor([[.5, .5, .5, .5]]), masks=torch.ones(1, 64, 352, dtype=torch.bool),
                  size=torch.tensor([64, 352]), orig_size=torch.tensor([64, 352]))
    for on in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=on): loss, _ = model(dict(images=image, mask=None, targets=[target]))
        assert loss.isfinite()
    assert seen[0].max() > 256 and torch.equal(*seen)


def spied(method, seen):
    "The method of a coder, which writes down the formats of what it is given and of what it returns."
    def spy(self, *boxes):
        out = method(self, *boxes)
        seen.extend(x.dtype for x in (*boxes, out))
        return out
    return spy


def spied_loss(seen):
    "torchvision's focal loss, which writes down the format of what it judges."
    def spy(inputs, *more, **options):
        seen.append(inputs.dtype)
        return sigmoid_focal_loss(inputs, *more, **options)
    return spy


def spied_scores(seen, ranked=RegionProposalNetwork.filter_proposals):
    "torchvision's choice of proposals, which writes down the format of the scores that it ranks."
    def spy(self, proposals, scores, *more):
        seen.append(scores.dtype)
        return ranked(self, proposals, scores, *more)
    return spy


@pytest.mark.parametrize('name', BASELINES)
def test_bfloat16_moves_no_box(name):
    "Scores, proposals, the true boxes sampled with them, targets of the loss and answers: all in float32, also in a copy as EMA's."
    few = FEW | dict(box_batch_size_per_image=8) if name in TWO_STAGE else {}
    model = copy.deepcopy(build_baseline(name, C, 'resnet18', channels=32, **few)).train()
    batch, seen = make_batch()[0], []
    places = [(BoxCoder, 'encode_single'), (BoxCoder, 'decode_single'), (BoxLinearCoder, 'encode'), (BoxLinearCoder, 'decode')]
    spies = [patch.object(coder, method, spied(getattr(coder, method), seen)) for coder, method in places]
    judged = [patch.object(retinanet, 'sigmoid_focal_loss', spied_loss(seen)), patch.object(fcos, 'sigmoid_focal_loss', spied_loss(seen)),
              patch.object(RegionProposalNetwork, 'filter_proposals', spied_scores(seen))]
    with spies[0], spies[1], spies[2], spies[3], judged[0], judged[1], judged[2], torch.autocast('cpu', torch.bfloat16):
        loss, _ = model(batch)
        learned = len(seen)
        model.predict(batch)
    assert loss.isfinite() and 0 < learned < len(seen) and set(seen) == {torch.float32}


@pytest.mark.parametrize('features', [['blocks.4'], ['blocks.2', 'blocks.4']])
@pytest.mark.parametrize('name', ['faster_rcnn_fpn', 'retinanet', 'fcos', 'mask_rcnn'])
def test_any_backbone_with_features(name, features):
    "A frozen timm network: no gradient reaches it, all that is new gets one, and each place of each level has its anchors."
    few = FEW if name in RCNN else {}
    sizes = [(16, 32)] if len(features) == 1 and name != 'fcos' else None
    model = build_baseline(name, C, 'tf_efficientnet_lite0', features=features, frozen=True, channels=32, anchor_sizes=sizes, **few).train()
    model(make_batch()[0])[0].backward()
    assert all((p.grad is not None) == ('.body.' not in k) for k, p in model.named_parameters())
    generator = getattr(model.model, 'rpn', model.model).anchor_generator
    assert len(generator.sizes) == len(model.model.backbone(torch.zeros(1, 3, 64, 64)))


@pytest.mark.parametrize('kwargs, words', [
    (dict(name='yolo'), 'choose from'),
    (dict(name='retinanet', box_score_thresh=.1), r"retinanet has no setting \['box_score_thresh'\]"),
    (dict(name='faster_rcnn_fpn', min_size=800), 'no setting'),
    (dict(name='faster_rcnn_c4', backbone='tf_efficientnet_lite0'), "ResNet's layer3"),
    (dict(name='fcos', backbone='tf_efficientnet_lite0'), r'features=\[layers\]'),
    (dict(name='fcos', channels=40), 'multiple of 32'),
    (dict(name='fcos', anchor_sizes=[(8,)]), 'no anchors'),
    (dict(name='retinanet', anchor_sizes=[(8,), (16,)]), r'levels of strides \[8, 16, 32, 64, 128\]'),
    (dict(name='retinanet', features=['layer2', 'layer4']), 'finest first'),
    (dict(name='fcos', num_classes=0), 'at least one class')])
def test_what_cannot_be_built_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words): build_baseline(**dict(num_classes=C, backbone='resnet18') | kwargs)


def test_normalisation_is_the_backbones():
    model = build_baseline('fcos', C, 'tf_efficientnet_lite0', features=['blocks.4'], channels=32)
    assert isinstance(model, Baseline) and model.mean == model.std == (.5, .5, .5)
