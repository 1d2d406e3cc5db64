"What follows the CNN in a pre-training step never asks the device, or it could not be recorded; attention has a mask only over padding."
import types
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import batched_nms

from updetr.bench.run import TINY
from updetr.bench.step import OurStep, ReferenceStep, noise_batches
from updetr.core.config import make_config
from updetr.data.loader import send, to_device
from updetr.model import baselines, matcher
from updetr.model.detr import build_detr
from updetr.model.losses import build_criterion, match_patches, matched_losses, patch_predictions
from updetr.model.updetr import build_updetr
from updetr.neighbours import upsnet
from updetr.predict.detector import Detections, by_tiles
from updetr.predict.localizer import QueryPatchLocalizer
from updetr.predict.oneshot_detector import OneShotDetector
from updetr.predict.segmenter import Segments, segments_by_name
from updetr.tasks.finetune import targets_to_device
from updetr.tasks.finetune_task import DetectStep
from updetr.tasks.pretrain_task import encode

SIZES = dict(hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=32, num_queries=20, num_patches=5)
ASKING = {'_local_scalar_dense', 'is_nonzero', 'item', 'equal', 'nonzero', 'masked_select', 'unique', '_unique2', 'bincount', 'lift_fresh'}


class AskNothing(TorchDispatchMode):
    "Within it, what needs an answer of the device is an error, and so is a way to it or back."
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        assert name not in ASKING, name
        if name in ('index', 'index_put', 'index_put_'):
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), 'chosen by a mask'
        assert name != 'repeat_interleave' or 'output_size' in kwargs or len(args) != 1
        out = operation(*args, **kwargs)
        if name == '_to_copy': assert out.device == args[0].device, f'from {args[0].device} to {out.device}'
        return out


def on_device(cost, counts):
    "In the place of the GPU's program: some query for each patch."
    assert counts.device == cost.device and cost.dtype == torch.float32
    return cost.argmin(2)


def step(device, backward, own_group=False, padded=True, amp=False, **options):
    "Run what follows the CNN, inside `AskNothing`."
    with torch.device(device):
        model = build_updetr('resnet18', **SIZES | options)
        criterion = build_criterion(model, own_group=own_group)
        feature, patch_feature = torch.randn(3, 512, 4, 5), torch.rand(3, 5, 512)
        keep, boxes = torch.rand(3, 20) > .1, torch.rand(3, 5, 4) * .4 + .3
        mask = torch.zeros(3, 4, 5, dtype=torch.bool) if padded else None
        with AskNothing(), torch.autocast('cpu', torch.bfloat16, enabled=amp):
            predictions = patch_predictions(model, feature, patch_feature, keep, mask)
            if backward: match = torch.arange(5, device=device).expand(2, 3, -1) * 4  # scipy is no part of a step on a GPU
            else: match = match_patches(criterion, predictions, boxes)
            losses, total = matched_losses(model, criterion, *predictions, match, boxes)
            if backward: total.backward()
    return losses, total, model


@pytest.mark.fake_gpu
@pytest.mark.parametrize('options', [dict(amp=True), dict(own_group=True, padded=False), dict(query_shuffle=True, attention_mask=False)],
                         ids=str)
def test_no_step_on_a_gpu_asks_it(options):
    "Forward, cost, assignment and losses on a GPU that is not there, whose numbers nobody can know; then a backward pass on the CPU."
    with FakeTensorMode(), patch.object(matcher, '_gpu_program', lambda: on_device):
        losses, total, model = step('cuda', backward=False, **options)
        assert total.device.type == 'cuda' and all(v.device.type == 'cuda' for v in losses.values())
    losses, total, model = step('cpu', backward=True, **options)
    assert total.isfinite() and model.class_embed.weight.grad.isfinite().all()


@pytest.mark.parametrize('ask', [lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x[x > 0], lambda x: (x > 0).nonzero(),
                                 lambda x: torch.tensor([1, 2], device=x.device)], ids=range(5))
def test_who_asks_is_caught(ask):
    with pytest.raises(AssertionError), AskNothing(): ask(torch.ones(3))


def test_costs_that_are_no_number_are_the_last_choice_and_are_seen_in_the_loss():
    "As on a GPU: nothing is raised by the matching, by the loss or its gradient it shows."
    torch.manual_seed(0)
    model = build_updetr('resnet18', **SIZES, dropout=0.)
    criterion = build_criterion(model)
    boxes = torch.rand(3, 5, 4) * .4 + .3
    for where in ('feature', 'patch_feature', 'boxes'):
        batch = {'feature': torch.randn(3, 512, 4, 5), 'patch_feature': torch.rand(3, 5, 512), 'boxes': boxes.clone()}
        batch[where][1] = torch.nan
        predictions = patch_predictions(model, batch['feature'], batch['patch_feature'], torch.ones(3, 20, dtype=torch.bool))
        criterion.matcher.strict = True
        with pytest.raises(FloatingPointError, match='image 1 of the batch'): match_patches(criterion, predictions, batch['boxes'])
        criterion.matcher.strict = False
        match = match_patches(criterion, predictions, batch['boxes'])
        assert (match >= 0).all()
        losses, total = matched_losses(model, criterion, *predictions, match, batch['boxes'])
        assert not total.isfinite(), where


def masks_of_attention(model, sizes):
    "The masks that attention gets in a step on photos of these sizes; how many queries look at each other at once."
    sides = torch.tensor(sizes)
    height, width = sides.amax(0).tolist()
    mask = (torch.arange(height) >= sides[:, :1])[:, :, None] | (torch.arange(width) >= sides[:, 1:])[:, None]
    batch = dict(images=torch.zeros(len(sizes), 3, height, width, dtype=torch.uint8), mask=mask if mask.any() else None,
                 patches=torch.zeros(2, 5, 3, 32, 32, dtype=torch.uint8), boxes=torch.rand(2, 5, 4), index=torch.arange(2),
                 keep=torch.ones(2, 20, dtype=torch.bool), factors=torch.tensor([1., 1, 1, 0, 0, 1, 2, 3, 0, 0]).repeat(2, 5, 1))
    seen, attention = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **more):
        seen.append((attn_mask, q.shape[2], k.shape[2]))
        return attention(q, k, v, attn_mask=attn_mask, **more)
    ready = encode(model, to_device(batch, 'cpu', (.5,) * 3, (.5,) * 3))
    with patch.object(F, 'scaled_dot_product_attention', spy):
        patch_predictions(model, *[ready[k] for k in ('feature', 'patch_feature', 'keep', 'mask')])
    return seen


def test_attention_has_a_mask_only_where_a_token_is_padding():
    model = build_updetr('resnet18', **SIZES)
    for sizes in ([(64, 96)] * 2, [(64, 96), (64, 95)], [(63, 96), (64, 95)]):
        seen = masks_of_attention(model, sizes)
        assert all(mask is None for mask, _, _ in seen)
        # tokens in the encoder, groups of four and all tokens in both decoder layers
        assert [(q, k) for _, q, k in seen] == [(6, 6), (4, 4), (20, 6), (4, 4), (20, 6)]
    masks = [mask for mask, _, _ in masks_of_attention(model, [(64, 96), (64, 60)])]
    assert [mask is None for mask in masks] == [False, True, False, True, False]


@pytest.mark.fake_gpu
def test_what_is_on_the_gpu_already_is_not_pinned():
    "As a mask that DDP has moved with the rest of its batch: only memory of the host can be pinned."
    pinned = []

    def pin(x):
        assert x.device.type == 'cpu', f'cannot pin a tensor on {x.device.type}'
        pinned.append(x)
        return x
    with FakeTensorMode(), patch.object(torch.Tensor, 'pin_memory', pin):
        for home in ('cuda', 'cpu'):
            mask = torch.zeros(2, 3, 4, dtype=torch.bool, device=home)
            assert send(mask, torch.device('cuda')).device.type == 'cuda' and len(pinned) == (home == 'cpu')
    assert send(torch.ones(2, 3), torch.device('cpu')).device.type == 'cpu' and len(pinned) == 1


def test_the_benchmark_leaves_a_mask_on_the_host_as_the_loader_does():
    "Whether it pads a token can then be asked without the GPU; the reference's batches lie there as a whole."
    for kind, home in ((OurStep, 'cpu'), (ReferenceStep, 'meta')):
        batches = noise_batches(kind, make_config('paper', **TINY), 4, 3, 'meta', shrink=4)
        assert all(b[k].device.type == 'meta' for b in batches for k in ('images', 'patches', 'boxes', 'keep'))
        masks = [b['mask'] for b in batches if b['mask'] is not None]
        assert masks and all(mask.device.type == home for mask in masks)


class Copies(TorchDispatchMode):
    "Within it, `waits` lists what comes from the host and lets it wait for the device."
    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operation(*args, **kwargs)
        name, to = operation.overloadpacket.__name__, getattr(out, 'device', None)
        # the last argument of `copy_` may be non_blocking, too
        without = kwargs.get('non_blocking', name == 'copy_' and args[2:] and args[2])
        source = args[1] if name == 'copy_' else args[0] if name == '_to_copy' else None
        if source is not None and source.device.type == 'cpu' and to.type == 'cuda' and not without: self.waits.append(tuple(out.shape))
        return out


@pytest.mark.fake_gpu
@pytest.mark.parametrize('share', [False, True])
@pytest.mark.parametrize('numbers', [(2, 0, 3), (2, 2, 2)], ids=str)
def test_a_step_on_labelled_photos_does_not_wait_for_the_gpu(numbers, share):
    "How many objects there are is known to the host: it goes to the GPU without waiting, and so does all else."
    with FakeTensorMode(), patch.object(matcher, '_gpu_program', lambda: on_device), patch.object(torch.Tensor, 'pin_memory', lambda x: x):
        with torch.device('cuda'):
            model = build_detr(4, 'resnet18', **{k: SIZES[k] for k in SIZES if k != 'num_patches'})
            module = DetectStep(model, build_criterion(model))
            targets = [{'labels': torch.zeros(n, dtype=torch.long), 'boxes': torch.rand(n, 4)} for n in numbers]
            batch = {'feature': torch.randn(3, 512, 4, 5), 'mask': None, 'targets': targets}
        with Copies() as copies, module.criterion.shared([targets]) if share else nullcontext(): module(batch)
    assert not copies.waits


@pytest.mark.fake_gpu
@pytest.mark.parametrize('side, pinned_as', [(800, [(5, 800, 800), (7, 800, 800)]), (8, [(12 * 64,)])], ids=['large', 'small'])
def test_large_targets_are_not_joined(side, pinned_as):
    "What the loader has pinned goes to the GPU as it is; joined it would be written to the host's memory and pinned once more."
    pinned = []

    def pin(x):
        pinned.append(tuple(x.shape))
        return x
    with FakeTensorMode(), patch.object(torch.Tensor, 'pin_memory', pin), Copies() as copies:
        targets = [{'masks': torch.zeros(n, side, side, dtype=torch.bool)} for n in (5, 7)]
        there = targets_to_device(targets, torch.device('cuda'))
    assert pinned == pinned_as and not copies.waits
    assert [tuple(t['masks'].shape) for t in there] == [(5, side, side), (7, side, side)]
    assert {t['masks'].device.type for t in there} == {'cuda'}


@pytest.mark.fake_gpu
def test_masks_are_painted_in_boxes_that_the_host_knows():
    "torchvision asks for the sides of one box after the other, thirteen times a mask."
    painted = []

    def paint(masks, boxes, size):
        painted.append((masks.device.type, boxes.device.type))
        return masks.new_zeros(len(masks), 1, *size)
    with FakeTensorMode(), torch.device('cuda'):
        boxes, kinds, masks = torch.rand(3, 4), torch.zeros(3, dtype=torch.long), torch.zeros(3, 28, 28)
        with patch.object(upsnet, 'paste_masks_in_image', paint):
            logits = upsnet.panoptic_logits(torch.zeros(5, 40, 50), masks, boxes, kinds, 2)
        found = {'boxes': boxes, 'labels': kinds, 'scores': torch.rand(3), 'masks': masks[:, None]}
        with patch.object(baselines, 'paste_masks_in_image', paint):
            said = baselines.Baseline._in_photo(SimpleNamespace(first_label=1), found, {'size': (40, 50), 'orig_size': (80, 99)})
    assert painted == [('cuda', 'cpu')] * 2
    assert logits.device.type == said['boxes'].device.type == said['masks'].device.type == 'cuda'


@pytest.mark.fake_gpu
@pytest.mark.parametrize('copy, wait', [(lambda: torch.as_tensor([1, 2], device='cuda'), True), (lambda: torch.ones(2).cuda(), True),
                                        (lambda: torch.ones(1, device='cuda').new_tensor([1.]), True),
                                        (lambda: torch.ones(2, device='cuda').copy_(torch.ones(2)), True),
                                        (lambda: torch.ones(2).cuda(non_blocking=True), False)], ids=range(5))
def test_who_waits_is_caught(copy, wait):
    with FakeTensorMode(), Copies() as copies: copy()
    assert bool(copies.waits) == wait


def test_answers_lie_on_the_host_whatever_device_is_the_default(monkeypatch):
    "Under torch.set_default_device('cuda') tiles and the localizer ended in two devices, and labels of one-shot answers lay on the GPU."
    def apart(*args):  # torchvision has a number on the default device, which a GPU's may be
        with torch.device('cpu'): return batched_nms(*args)

    monkeypatch.setattr('updetr.predict.detector.batched_nms', apart)
    photo, pictures = torch.zeros(3, 200, 200, dtype=torch.uint8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    boxes, scores = torch.tensor([[.1, .1, .5, .5]]).repeat(4, 1) * torch.arange(1, 5)[:, None] / 4, torch.tensor([.1, .4, .3, .2])
    found = Detections(photo, boxes * 100, torch.zeros(4, dtype=torch.long), scores, ('a',))
    tiles = types.SimpleNamespace(detect=lambda *args: found)
    asked = OneShotDetector.demo()
    monkeypatch.setattr(asked, '_answers', lambda image, features: [{'boxes': boxes, 'scores': scores}] * len(features))
    monkeypatch.setattr(asked, '_features', lambda queries: queries.flatten(1).float())
    monkeypatch.setattr(asked, 'query', lambda *picture: pictures[0])
    localizer = QueryPatchLocalizer.demo()
    monkeypatch.setattr(localizer, 'answers', lambda *args: (scores, boxes, None))
    opened = localizer.open(photo)
    assert opened.encoded
    segments = Segments(photo, torch.ones(200, 200, dtype=torch.long), [{'id': 1, 'category_id': 0}], ('a',), None)
    with torch.device('meta'):
        answers = [by_tiles(tiles, photo, size=100, threshold=0), asked.detect(photo, pictures[0], 0),
                   asked.few_shot(photo, {'a': [photo], 'b': [photo]}, 0), opened.ask(pictures), opened.ask(pictures, best_of_group=False)]
        kept, _ = segments_by_name(segments, np.array([0]))
    assert all(v.is_cpu and len(v) for a in answers for v in (a.boxes, a.labels, a.scores)) and kept.all()
