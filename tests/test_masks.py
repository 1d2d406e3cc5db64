"""The mask head against a second, slow one that is written only from the method's description: outputs, losses, gradients."""
import math
import re
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

from updetr.model.backbone import Backbone, open_levels, pyramid
from updetr.model.detr import build_detr
from updetr.model.losses import build_criterion
from updetr.tasks.masks import DETRsegm, MaskHeadSmallConv, MaskStep, loss_dice, loss_masks, matched_pairs, pyramid_layers
from updetr.train.graphs import saved_bytes

SIZES = dict(hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=32, num_queries=6, dropout=0.)


def make(per_head=True, freeze_detr=True, **changes):
    torch.manual_seed(1)
    model = DETRsegm(build_detr(5, **SIZES | {'backbone': 'resnet18'} | changes), per_head, freeze_detr)
    with torch.no_grad():  # norms and biases that start as the identity would hide mistakes
        for k, p in model.named_parameters():
            if 'gn' in k or k.endswith('bias'): p.add_(torch.randn_like(p) * .3)
    return model


def photos(sizes=((64, 96), (96, 64)), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *s, generator=g) for s in sizes]


def targets_of(images, counts=(2, 3), seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for image, n in zip(images, counts):
        masks = torch.zeros(n, *image.shape[1:], dtype=torch.bool)
        for m in masks:
            y, x = (int(torch.randint(0, s // 2, (), generator=g)) for s in m.shape)
            m[y:y + m.shape[0] // 2, x:x + m.shape[1] // 3] = True
        boxes = torch.rand(n, 4, generator=g) * .3 + .2
        out.append({'labels': torch.randint(0, 5, (n,), generator=g), 'boxes': boxes, 'masks': masks})
    return out


def as_batch(images, targets):
    H, W = (max(i.shape[d] for i in images) for d in (1, 2))
    padded, mask = torch.zeros(len(images), 3, H, W), torch.ones(len(images), H, W, dtype=torch.bool)
    for i, image in enumerate(images):
        padded[i, :, :image.shape[1], :image.shape[2]], mask[i, :image.shape[1], :image.shape[2]] = image, False
    return {'images': padded, 'mask': mask, 'targets': targets}


# ---- a second implementation ----------------------------------------------------------------------------------------

def conv(p, name, x): return F.conv2d(x, p[name + '.weight'], p[name + '.bias'], padding=p[name + '.weight'].shape[-1] // 2)


def slow_mask(p, hs, memory, src, levels, padding, heads, per_head):
    """One query of one photo: hs (d,), memory and src (d,h,w), levels (C,h,w), padding (h,w) or None, to a mask (H/4,W/4)."""
    d, h, w = src.shape
    q = p['bbox_attention.q_linear.weight'] @ hs + p['bbox_attention.q_linear.bias']
    scores = torch.full((heads, h, w), -math.inf)
    for y in range(h):
        for x in range(w):
            if padding is not None and padding[y, x]: continue
            k = p['bbox_attention.k_linear.weight'] @ memory[:, y, x] + p['bbox_attention.k_linear.bias']
            for i in range(heads):
                part = slice(i * d // heads, (i + 1) * d // heads)
                scores = scores.index_put(tuple(map(torch.tensor, (i, y, x))), (q[part] * k[part]).sum() / math.sqrt(d / heads))
    weights = scores.exp()
    weights = weights / (weights.sum((1, 2), keepdim=True) if per_head else weights.sum())
    x = torch.cat((src, weights))[None]
    groups = {n: max(g for g in (8, 4, 2, 1) if len(p[f'mask_head.gn{n}.weight']) % g == 0) for n in range(1, 6)}

    def stage(n, x):
        x = conv(p, f'mask_head.lay{n}', x)[0]
        parts = x.reshape(groups[n], -1)
        parts = (parts - parts.mean(1, keepdim=True)) / (parts.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = parts.view_as(x) * p[f'mask_head.gn{n}.weight'][:, None, None] + p[f'mask_head.gn{n}.bias'][:, None, None]
        return x.clamp(min=0)[None]

    x = stage(2, stage(1, x))
    for n, level in enumerate(levels, 1):
        finer = conv(p, f'mask_head.adapter{n}', level[None])
        H, W = finer.shape[-2:]
        rows, columns = (torch.arange(size) * old // size for size, old in zip((H, W), x.shape[-2:]))
        x = stage(n + 2, finer + x[..., rows[:, None], columns[None]])
    return conv(p, 'mask_head.out_lay', x)[0, 0]


def slow_losses(masks, truth, num_boxes):
    """masks: (h,w) logits, truth: (H,W) bool, one a pair."""
    focal = dice = 0
    for logit, real in zip(masks, truth):
        x = F.interpolate(logit[None, None], real.shape, mode='bilinear', align_corners=False)[0, 0]
        p, t = 1 / (1 + torch.exp(-x)), real.float()
        right = p * t + (1 - p) * (1 - t)
        alpha = .25 * t + .75 * (1 - t)
        focal = focal + (-alpha * (1 - right) ** 2 * right.log()).mean()
        dice = dice + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    return {'loss_mask': focal / num_boxes, 'loss_dice': dice / num_boxes}


def slow_forward(model, batch):
    """(loss, {(photo, target): mask}) by the slow way, with the model's own detector (frozen, tested elsewhere)."""
    with torch.no_grad():
        outputs, seen = model.look(batch['images'], batch['mask'])
        feature, levels = pyramid(model.detr.backbone[0], batch['images'])
        src = model.detr.input_proj(feature)
    p, (h, w) = dict(model.named_parameters()), src.shape[-2:]
    pad = F.interpolate(batch['mask'][:, None].float(), (h, w))[:, 0].bool()
    masks, truth = {}, []
    pairs = build_criterion(model.detr).matcher({k: outputs[k] for k in ('pred_logits', 'pred_boxes')}, batch['targets'])
    for b, (queries, objects) in enumerate(pairs):
        memory = seen.memory[b].T.unflatten(1, (h, w))
        for q, t in sorted(zip(queries.tolist(), objects.tolist()), key=lambda pair: pair[1]):
            masks[b, t] = slow_mask(p, seen.hs[b, q], memory, src[b], [m[b] for m in levels], pad[b], 4, model.bbox_attention.per_head)
            whole = torch.zeros(batch['images'].shape[-2:], dtype=torch.bool)
            mask = batch['targets'][b]['masks'][t]
            whole[:mask.shape[0], :mask.shape[1]] = mask
            truth.append(whole)
    return slow_losses(masks.values(), truth, len(truth)), masks


@pytest.mark.parametrize('per_head', [True, False])
def test_outputs_losses_and_gradients_agree_with_the_slow_way(per_head):
    model = make(per_head)
    batch = as_batch(images := photos(), targets_of(images))
    step = MaskStep(model, build_criterion(model.detr), mask_loss_coef=2., dice_loss_coef=3.)
    loss, numbers = step(batch)
    want, masks = slow_forward(model, batch)
    for k, v in want.items(): torch.testing.assert_close(numbers[k], v, rtol=1e-4, atol=1e-6)
    weighted = 2 * want['loss_mask'] + 3 * want['loss_dice']
    torch.testing.assert_close(loss, weighted, rtol=1e-4, atol=1e-6)
    outputs, seen = model.look(batch['images'], batch['mask'])
    labels = build_criterion(model.detr).matcher(outputs, batch['targets'])
    for b, (queries, objects) in enumerate(labels):
        for q, t in zip(queries, objects):
            torch.testing.assert_close(model.draw(seen, torch.tensor([b]), q[None])[0], masks[b, int(t)], rtol=1e-3, atol=1e-4)
    head = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert len(head) == 32
    loss.backward()
    for (k, p), g in zip(head.items(), torch.autograd.grad(weighted, list(head.values())), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=2e-3, atol=2e-5, msg=k)


def test_the_two_softmaxes_are_two_models():
    one, other, images = make(True), make(False), photos()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    a, b = one(images)['pred_masks'], other(images)['pred_masks']
    assert not torch.allclose(a, b, atol=1e-3)


# ---- matched only, all, some ----------------------------------------------------------------------------------------

def test_all_queries_at_once_are_each_query_alone():
    model = make()
    out = model(photos())
    seen = model.look(photos())[1]
    assert out['pred_masks'].shape == (2, 6, 24, 24)
    for b in (0, 1):
        for q in range(6):
            alone = model.draw(seen, torch.tensor([b]), torch.tensor([q]))[0]
            torch.testing.assert_close(alone, out['pred_masks'][b, q], rtol=1e-4, atol=1e-4)


def test_memory_does_not_grow_with_the_number_of_queries():
    """Bytes kept for the backward pass: five objects need what they need, however many queries there are."""
    images, kept = photos(((96, 96), (96, 96))), {}
    batch = as_batch(images, targets_of(images))
    for n in (10, 50):
        model = make(num_queries=n).train()
        step = MaskStep(model, build_criterion(model.detr))
        kept[n] = saved_bytes(lambda step=step: step(batch)[0]), saved_bytes(lambda model=model: model(images)['pred_masks'])
    assert kept[50][0] < 1.05 * kept[10][0] and kept[50][1] > 3 * kept[10][1]


def test_a_batch_without_objects_has_a_gradient_of_zero():
    """Else the other processes of a distributed run would wait for this one's gradients for ever."""
    model = make()
    images = photos()
    none = {'labels': torch.zeros(0, dtype=torch.long), 'boxes': torch.zeros(0, 4)}
    nothing = [none | {'masks': torch.zeros(0, *i.shape[1:], dtype=torch.bool)} for i in images]
    loss, _ = MaskStep(model, build_criterion(model.detr))(as_batch(images, nothing))
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_what_is_logged_of_the_parts_of_a_step_is_that_of_the_whole():
    """One photo has more objects than the other: the mean of two means would weigh those of the other more."""
    model, images = make(), photos(((96, 96), (96, 96)))
    targets = targets_of(images)
    assert len(targets[0]['labels']) != len(targets[1]['labels'])
    step = MaskStep(model, build_criterion(model.detr))
    # everything is drawn: in one photo a sixth of it is right, in the other all
    with torch.no_grad(): model.mask_head.out_lay.bias.add_(99)
    targets[1]['masks'][:] = True
    _, whole = step(as_batch(images, targets))
    with step.criterion.shared([[t] for t in targets]):
        parts = [step(as_batch([image], [target]))[1] for image, target in zip(images, targets)]
    torch.testing.assert_close(whole['mask_iou'], torch.tensor((2 * 1 / 6 + 3) / 5))
    for k in ('loss_mask', 'loss_dice', 'mask_iou', 'matched_iou', 'class_error'):
        torch.testing.assert_close((parts[0][k] + parts[1][k]) / 2, whole[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('frozen', [True, False])
def test_one_matching_is_for_boxes_and_masks(frozen):
    "The criterion's own losses, and the masks of the queries that its matcher gives for the last layer: bit for bit, in one call."
    model, images = make(freeze_detr=frozen), photos()
    batch, criterion = as_batch(images, targets_of(images)), build_criterion(model.detr)
    outputs, seen = model.look(batch['images'], batch['mask'])
    if frozen: outputs.pop('aux_outputs')
    want = criterion(outputs, batch['targets'])
    pairs = criterion.matcher(outputs, batch['targets'])
    image = torch.cat([torch.full_like(queries, b) for b, (queries, _) in enumerate(pairs)])
    step = MaskStep(model, criterion)
    with patch.object(criterion.matcher, 'match', wraps=criterion.matcher.match) as match, \
            patch.object(step, 'draw', wraps=step.draw) as draw:
        _, numbers = step(batch)
    assert match.call_count == 1 and all(torch.equal(numbers[k], v) for k, v in want.items()) and ('loss_ce_0' in want) != frozen
    drawn = list(zip(*(x.tolist() for x in draw.call_args.args[1:])))
    assert sorted(drawn) == sorted(zip(image.tolist(), torch.cat([queries for queries, _ in pairs]).tolist()))


def test_matched_pairs_by_hand():
    masks = [torch.ones(2, 1, 2, dtype=torch.bool), torch.ones(1, 2, 1, dtype=torch.bool)]
    image, query, target = matched_pairs(torch.tensor([[4, 2], [0, -1]]), masks, (2, 3))
    assert image.tolist() == [0, 0, 1] and query.tolist() == [4, 2, 0]
    assert target.int().tolist() == [[[1, 1, 0], [0, 0, 0]]] * 2 + [[[1, 0, 0], [1, 0, 0]]]


# ---- losses ---------------------------------------------------------------------------------------------------------

def test_losses_by_hand():
    # p = 3/4 on a real pixel, 1/4 on a wrong one: dice 1 - (2 * .75 + 1) / (1 + 1 + 1)
    x = torch.tensor([[math.log(3), -math.log(3)]])
    assert loss_dice(x, torch.tensor([[1., 0.]])).item() == pytest.approx(1 - 2.5 / 3)
    out = loss_masks(x.view(1, 1, 2), torch.tensor([[[True, False]]]), 4.)
    assert out['loss_dice'].item() == pytest.approx((1 - 2.5 / 3) / 4)
    assert out['loss_mask'].item() == pytest.approx((.25 + .75) / 2 * -math.log(.75) / 16 / 4)
    assert out['mask_iou'] == 1


@pytest.mark.parametrize('scale', [1e3, -1e3])
def test_losses_of_extreme_logits_are_finite(scale):
    logits = torch.full((2, 4, 4), scale, requires_grad=True)
    out = loss_masks(logits, torch.rand(2, 16, 16) > .5, 2.)
    (out['loss_mask'] + out['loss_dice']).backward()
    assert all(torch.isfinite(v) for v in out.values()) and torch.isfinite(logits.grad).all()


# ---- what is trained, and its names ---------------------------------------------------------------------------------

def test_names_are_the_references():
    layers = [f'lay{i}' for i in range(1, 6)] + [f'gn{i}' for i in range(1, 6)] + ['out_lay'] + [f'adapter{i}' for i in range(1, 4)]
    want = {f'mask_head.{k}.{s}' for k in layers for s in ('weight', 'bias')}
    want |= {f'bbox_attention.{k}_linear.{s}' for k in 'qk' for s in ('weight', 'bias')}
    names = make().state_dict().keys()
    assert {k for k in names if not k.startswith('detr.')} == want and len(want) == 32
    detector = build_detr(5, backbone='resnet18', **SIZES).state_dict().keys()
    assert {k.removeprefix('detr.') for k in names if k.startswith('detr.')} == detector


def test_joint_training_reaches_the_detector_and_freezing_does_not():
    images = photos()
    batch = as_batch(images, targets_of(images))
    for frozen in (True, False):
        model = make(freeze_detr=frozen)
        criterion = build_criterion(model.detr)
        loss, numbers = MaskStep(model, criterion)(batch)
        loss.backward()
        assert (model.detr.query_embed.weight.grad is None) == frozen
        assert all(p.grad is not None for k, p in model.named_parameters() if not k.startswith('detr.'))
        masks = (numbers['loss_mask'] + numbers['loss_dice']).item()
        assert loss.item() == pytest.approx(masks + (0 if frozen else criterion.total(numbers).item()), rel=1e-5)
        assert ('loss_ce_0' in numbers) != frozen


def test_the_pyramid_of_a_folded_cnn_is_that_of_the_plain_one():
    for name, features, strides, channels in [('resnet18', None, (16, 8, 4), (256, 128, 64)),
                                              ('tf_efficientnet_lite0', ['blocks.4'], (16, 8, 4), (112, 40, 24))]:
        torch.manual_seed(0)
        cnn = Backbone(name, features)
        for k, v in cnn.body.state_dict().items():
            if k.endswith(('running_mean', 'running_var')): v.uniform_(.5, 1.5)
        names, x = list(cnn.state_dict()), torch.randn(1, 3, 64, 64)
        before = cnn(x)
        open_levels(cnn, pyramid_layers(cnn))
        feature, levels = pyramid(cnn, x)
        torch.testing.assert_close(feature, before)
        assert list(cnn.state_dict()) == names and not any(p.requires_grad for p in cnn.parameters())
        assert [64 // m.shape[3] for m in levels] == list(strides) and [m.shape[1] for m in levels] == list(channels)
        plain = cnn.body(x)
        for a, k in zip(levels, cnn.levels): torch.testing.assert_close(a, plain[k], rtol=1e-4, atol=1e-4)


def test_a_trainable_cnn_stays_trainable_when_levels_are_opened():
    cnn = Backbone('resnet18', frozen=False)
    before = {k for k, p in cnn.named_parameters() if p.requires_grad}
    open_levels(cnn, ['layer1'])
    assert {k for k, p in cnn.named_parameters() if p.requires_grad} == before and 0 < len(before) < len(list(cnn.parameters()))


def test_widths_that_eight_groups_do_not_divide():
    head = MaskHeadSmallConv(132, [8, 8, 8], 128)
    assert [getattr(head, f'gn{i}').num_groups for i in range(1, 6)] == [4, 8, 8, 8, 8]
    assert [m.num_groups for k, m in MaskHeadSmallConv(264, [8] * 3, 256).named_children() if re.match('gn', k)] == [8] * 5


def test_a_gain_changes_the_weights_of_the_maps_alone():
    torch.manual_seed(1)
    plain = DETRsegm(build_detr(5, backbone='resnet18', **SIZES)).state_dict()
    torch.manual_seed(1)
    loud = DETRsegm(build_detr(5, backbone='resnet18', **SIZES), map_gain=10).state_dict()
    changed = {k for k in plain if not torch.equal(plain[k], loud[k])}
    assert changed == {'mask_head.lay1.weight'}
    a, b = (s['mask_head.lay1.weight'] for s in (plain, loud))
    assert torch.equal(a[:, :32], b[:, :32]) and torch.allclose(a[:, 32:] * 10, b[:, 32:])


def test_an_object_without_a_query_counts():
    """Losses are divided by all objects of the batch, as in the reference, not by those that a query was left for."""
    model, images = make(num_queries=2), photos()
    batch = as_batch(images, targets_of(images))
    assert sum(len(t['labels']) for t in batch['targets']) > 4
    want, masks = slow_forward(model, batch)
    _, numbers = MaskStep(model, build_criterion(model.detr))(batch)
    share = len(masks) / sum(len(t['labels']) for t in batch['targets'])
    assert share < 1
    for k, v in want.items(): torch.testing.assert_close(numbers[k], v * share, rtol=1e-4, atol=1e-6)
