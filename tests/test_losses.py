"What the losses watch and divide by, against loops; each weight of a criterion goes where its name says."
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from updetr.model.detr import build_detr
from updetr.model.losses import SetCriterion, build_criterion, count_amounts, watch_predictions
from updetr.model.matcher import HungarianMatcher
from updetr.model.updetr import build_updetr

L, B, N, C = 2, 3, 6, 4
SMALL = dict(backbone='resnet18', hidden_dim=16, nheads=2, enc_layers=1, dec_layers=1, dim_feedforward=16)


def test_what_is_watched_is_what_loops_find():
    torch.manual_seed(0)
    stacked = {'pred_logits': torch.randn(L, B, N, C + 1), 'pred_boxes': torch.rand(L, B, N, 4) * .4 + .3}
    # "no object" is said more often, and too often in one photo, too rarely in another
    stacked['pred_logits'][..., C] += torch.tensor([-9., 9., 9.])[:, None]
    # photo 0 has three objects, photo 1 one, photo 2 none
    counts, labels, boxes = [3, 1, 0], torch.randint(C, (B, 3)), torch.rand(B, 3, 4) * .4 + .3
    match = torch.full((L, B, 3), -1)
    match[0, 0], match[0, 1, 0] = torch.tensor([5, 0, 2]), 4
    match[1, 0], match[1, 1, 0] = torch.tensor([1, 3, 4]), 0
    # of the four pairs of the last layer two are right
    for q, j in ((1, 0), (4, 2)): stacked['pred_logits'][1, 0, q, labels[0, j]] = 20
    target = torch.full((L, B, N), C)
    for layer in range(L):
        for b, n in enumerate(counts): target[layer, b, match[layer, b, :n]] = labels[b, :n]
    watched = watch_predictions(stacked, match, target, boxes, counts)

    def corners(box): return box_convert(box, 'cxcywh', 'xyxy')[None]
    said, last = stacked['pred_logits'].argmax(-1), L - 1
    pairs = [(b, match[last, b, j], j) for b, n in enumerate(counts) for j in range(n)]
    wrong = [said[last, b, q] != labels[b, j] for b, q, j in pairs]
    ious = [box_iou(corners(stacked['pred_boxes'][last, b, q]), corners(boxes[b, j])) for b, q, j in pairs]
    surplus = [[abs((said[k, b] != C).sum() - n) for b, n in enumerate(counts)] for k in range(L)]
    centres = stacked['pred_boxes'][last, ..., :2]
    spread = ((centres - centres.mean(1, keepdim=True)) ** 2).mean(1).sqrt().mean()
    assert 0 < sum(wrong) < len(wrong)
    torch.testing.assert_close(watched['class_error'], 100 * sum(wrong) / len(wrong))
    torch.testing.assert_close(watched['cardinality_error'], torch.tensor(surplus).float().mean(1))
    torch.testing.assert_close(watched['matched_iou'], torch.cat(ious).mean())
    torch.testing.assert_close(watched['query_spread'], spread)


def test_one_object_in_a_step_of_four_parts_counts_once():
    "The mean of the parts is the loss of the whole, also where most parts are empty; and a step without any has none."
    torch.manual_seed(0)
    criterion = SetCriterion(C, HungarianMatcher(), {'loss_ce': 1, 'loss_bbox': 5, 'loss_giou': 2}, num_layers=1, num_queries=N)
    outputs = {'pred_logits': torch.randn(4, N, C + 1), 'pred_boxes': torch.rand(4, N, 4) * .4 + .3}
    for n in (1, 0):
        objects = [{'labels': torch.ones(k, dtype=torch.long), 'boxes': torch.rand(k, 4) * .4 + .3} for k in (0, n, 0, 0)]
        whole, parts = criterion(outputs, objects), [[t] for t in objects]
        with criterion.shared(parts): each = [criterion({k: v[i:i + 1] for k, v in outputs.items()}, t) for i, t in enumerate(parts)]
        for k in criterion.weights:
            torch.testing.assert_close(torch.stack([part[k] for part in each]).mean(), whole[k])
        assert (whole['loss_bbox'] > 0) == bool(n)


@pytest.mark.parametrize('counts', [(3, 0, 1, N + 2), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize('changes', [{}, dict(ce_per_process=True), dict(class_weights=torch.tensor([1., 2, 3, 4]))], ids=str)
def test_what_is_watched_of_the_parts_of_a_step_is_that_of_the_whole(counts, changes):
    "One part has more objects than queries, of which only as many as there are queries are matched."
    torch.manual_seed(0)
    criterion = SetCriterion(C, HungarianMatcher(), {'loss_ce': 1, 'loss_bbox': 5, 'loss_giou': 2}, num_layers=1, num_queries=N, **changes)
    outputs = {'pred_logits': torch.randn(4, N, C + 1), 'pred_boxes': torch.rand(4, N, 4) * .4 + .3}
    objects = [{'labels': torch.randint(C, (n,)), 'boxes': torch.rand(n, 4) * .4 + .3} for n in counts]
    whole, parts = criterion(outputs, objects), [[t] for t in objects]
    with criterion.shared(parts): each = [criterion({k: v[i:i + 1] for k, v in outputs.items()}, t) for i, t in enumerate(parts)]
    for k in ('class_error', 'matched_iou', 'cardinality_error', 'query_spread'):
        torch.testing.assert_close(torch.stack([part[k] for part in each]).mean(), whole[k])
    assert (whole['class_error'] > 0) == (whole['matched_iou'] > 0) == any(counts)


def test_a_step_that_fails_shares_nothing_with_the_next():
    criterion = SetCriterion(C, HungarianMatcher(), {'loss_ce': 1}, num_queries=N)
    with pytest.raises(KeyError), criterion.shared([[{'labels': torch.ones(1, dtype=torch.long)}]]): raise KeyError
    assert criterion.step is None


def test_a_photo_with_more_objects_than_queries_has_all_of_them_matched():
    weight = torch.tensor([2., .5])  # mean class weight of each photo's objects
    objects, matched, all_weights = count_amounts([N + 4, 2], N, torch.tensor(.1), weight)
    assert objects == N + 6 and matched == N + 2
    torch.testing.assert_close(all_weights, torch.tensor(N * 2. + 2 * .5 + (N - 2) * .1))


def test_each_weight_goes_with_its_own_cost_and_loss():
    torch.manual_seed(0)
    logits, boxes = torch.randn(1, 1, N, C), torch.rand(1, 1, N, 4) * .4 + .3
    labels, targets = torch.tensor([[1, 0]]), torch.rand(1, 2, 4) * .4 + .3
    xyxy = [box_convert(x, 'cxcywh', 'xyxy') for x in (boxes[0, 0], targets[0])]
    costs = {'class': -F.softmax(logits[0, 0], -1)[:, labels[0]], 'bbox': torch.cdist(boxes[0, 0], targets[0], p=1),
             'giou': -generalized_box_iou(*xyxy)}
    none = dict.fromkeys((f'set_cost_{k}' for k in costs), 0.)
    model = build_updetr(**SMALL, num_queries=N, num_patches=2)
    for name, cost in costs.items():
        matcher = build_criterion(model, **none | {f'set_cost_{name}': 3.}).matcher
        torch.testing.assert_close(matcher.cost(logits, boxes, labels, targets, matcher.weights)[0, 0], 3 * cost)
    with pytest.raises(ValueError): build_criterion(model, **none)
    criterion = build_criterion(model, bbox_loss_coef=3, giou_loss_coef=4, feature_loss_coef=.5)
    assert criterion.weights == {'loss_ce': 1, 'loss_bbox': 3, 'loss_giou': 4, 'loss_feature': .5}


def test_heads_that_are_not_there_have_no_loss():
    plain = build_updetr(**SMALL | dict(dec_layers=2), num_queries=N, num_patches=2, aux_loss=False, feature_recon=False)
    assert set(build_criterion(plain).weight_dict) == {'loss_ce', 'loss_bbox', 'loss_giou'}
    out = build_detr(3, **SMALL | dict(dec_layers=2), num_queries=N, aux_loss=False)(torch.zeros(1, 3, 64, 64))
    assert out.keys() == {'pred_logits', 'pred_boxes'}
