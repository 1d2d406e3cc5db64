"""UP-DETR and DETR against a second implementation, written from the published description and sharing nothing with the package:
sequence-first `nn.MultiheadAttention` with additive float masks, one Python loop over layers, positions and norms by hand, the matching
cost of all queries with the targets of all photos, losses pair by pair. Weights go over by name."""
import math

import pytest
import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import nn

from updetr.model.detr import build_detr
from updetr.model.losses import build_criterion
from updetr.model.updetr import build_updetr

D, HEADS, N, M = 32, 4, 20, 4
SIZES = [(96, 128), (60, 90)]  # the second one is padded: a row and a column of its 3x4 features
CLOSE = dict(rtol=1e-4, atol=1e-4)
# The first self-attention of the decoder sees zeros: pre-norm, the norm's weight multiplies zeros; post-norm, all projections do.
NO_GRADIENT = {f'transformer.decoder.layers.0.{name}' for name in ('norm1.weight', 'self_attn.in_proj_weight')}


# ---- the second implementation --------------------------------------------------------------------------------------

class Layer(nn.Module):
    "An encoder layer, or with `cross` a decoder layer."
    def __init__(self, pre_norm, cross):
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = nn.MultiheadAttention(D, HEADS)
        if cross: self.multihead_attn = nn.MultiheadAttention(D, HEADS)
        self.linear1, self.linear2 = nn.Linear(D, 64), nn.Linear(64, D)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        if cross: self.norm3 = nn.LayerNorm(D)

    def encode(self, x, pos, padding):
        if self.pre_norm:
            y = self.norm1(x)
            x = x + self.self_attn(y + pos, y + pos, y, key_padding_mask=padding)[0]
            return x + self.linear2(self.linear1(self.norm2(x)).relu())
        x = self.norm1(x + self.self_attn(x + pos, x + pos, x, key_padding_mask=padding)[0])
        return self.norm2(x + self.linear2(self.linear1(x).relu()))

    def decode(self, x, memory, pos, query_pos, padding, mask):
        look = dict(key=memory + pos, value=memory, key_padding_mask=padding)
        if self.pre_norm:
            y = self.norm1(x)
            x = x + self.self_attn(y + query_pos, y + query_pos, y, attn_mask=mask)[0]
            x = x + self.multihead_attn(self.norm2(x) + query_pos, **look)[0]
            return x + self.linear2(self.linear1(self.norm3(x)).relu())
        x = self.norm1(x + self.self_attn(x + query_pos, x + query_pos, x, attn_mask=mask)[0])
        x = self.norm2(x + self.multihead_attn(x + query_pos, **look)[0])
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


def stack(pre_norm, cross):
    part = nn.Module()
    part.layers = nn.ModuleList(Layer(pre_norm, cross) for _ in range(2))
    if cross or pre_norm: part.norm = nn.LayerNorm(D)
    return part


def perceptron(*sizes):
    mlp = nn.Module()
    mlp.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
    return mlp


def run(mlp, x):
    for i, layer in enumerate(mlp.layers): x = layer(x.relu() if i else x)
    return x


def sines(mask):
    "(B,h,w) bool, True = padding -> (B,D,h,w), every number by itself."
    pos = torch.zeros(len(mask), D, *mask.shape[1:])
    for b, m in enumerate(mask):
        rows, columns = (~m).any(1).sum().item(), (~m).any(0).sum().item()  # the real part is a rectangle
        for r in range(m.shape[0]):
            for c in range(m.shape[1]):
                y, x = min(r + 1, rows) * (c < columns), min(c + 1, columns) * (r < rows)
                y = y / (rows * (c < columns) + 1e-6) * 2 * math.pi
                x = x / (columns * (r < rows) + 1e-6) * 2 * math.pi
                for i in range(D // 4):
                    t = 10000 ** (2 * i / (D // 2))
                    pos[b, 2 * i, r, c], pos[b, 2 * i + 1, r, c] = math.sin(y / t), math.cos(y / t)
                    pos[b, D // 2 + 2 * i, r, c], pos[b, D // 2 + 2 * i + 1, r, c] = math.sin(x / t), math.cos(x / t)
    return pos


class Reference(nn.Module):
    def __init__(self, num_classes, pre_norm, patches):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.encoder, self.transformer.decoder = stack(pre_norm, False), stack(pre_norm, True)
        self.class_embed, self.bbox_embed = nn.Linear(D, num_classes + 1), perceptron(D, D, D, 4)
        self.query_embed, self.input_proj = nn.Embedding(N, D), nn.Conv2d(512, D, 1)
        norm = torchvision.ops.misc.FrozenBatchNorm2d
        self.backbone = nn.ModuleList([nn.Module()])
        self.backbone[0].body = torchvision.models.resnet18(norm_layer=norm)
        del self.backbone[0].body.fc
        if patches: self.patch2query, self.feature_align = nn.Linear(512, D), perceptron(D, D, 512)

    def cnn(self, x):
        b = self.backbone[0].body
        return b.layer4(b.layer3(b.layer2(b.layer1(b.maxpool(b.relu(b.bn1(b.conv1(x))))))))

    def forward(self, images, patches=None, keep=None):
        H, W = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
        batch, padding = torch.zeros(len(images), 3, H, W), torch.ones(len(images), H, W, dtype=torch.bool)
        for b, i in enumerate(images): batch[b, :, :i.shape[1], :i.shape[2]], padding[b, :i.shape[1], :i.shape[2]] = i, False
        feature = self.cnn(batch)
        h, w = feature.shape[2:]
        mask = padding[:, [int(r * H / h) for r in range(h)]][..., [int(c * W / w) for c in range(w)]]
        assert mask.any() and not mask.all(2).all(1).any()
        pos, mask = sines(mask).flatten(2).permute(2, 0, 1), mask.flatten(1)
        memory = self.input_proj(feature).flatten(2).permute(2, 0, 1)
        for layer in self.transformer.encoder.layers: memory = layer.encode(memory, pos, mask)
        if hasattr(self.transformer.encoder, 'norm'): memory = self.transformer.encoder.norm(memory)

        query_pos = self.query_embed.weight[:, None].repeat(1, len(images), 1)
        attention, outputs = None, {}
        if patches is not None:
            m, size = patches.shape[1], N // M
            p = self.cnn(patches.flatten(0, 1)).flatten(2).mean(2)
            outputs['gt_feature'] = p.view(len(images), m, -1)
            p = self.patch2query(p).view(len(images), m, D)
            added = torch.stack([p[:, q // size] for q in range(m * size)])
            if keep is not None: added = added * keep.T[..., None].float()
            query_pos = query_pos[:m * size] + added
            attention = torch.full((m * size, m * size), -math.inf)
            for k in range(m): attention[k * size:(k + 1) * size, k * size:(k + 1) * size] = 0.
        x, layers = torch.zeros_like(query_pos), []
        for layer in self.transformer.decoder.layers:
            x = layer.decode(x, memory, pos, query_pos, mask, attention)
            hs = self.transformer.decoder.norm(x).transpose(0, 1)
            layers.append({'pred_logits': self.class_embed(hs), 'pred_boxes': run(self.bbox_embed, hs).sigmoid()})
            if patches is not None: layers[-1]['pred_feature'] = run(self.feature_align, hs)
        return outputs | layers[-1] | {'aux_outputs': layers[:-1]}


def corners(b):
    "cxcywh to xyxy."
    return torch.cat((b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2), -1)


def giou(a, b):
    "Generalised IoU of boxes (...,4) in cxcywh, element by element."
    a, b = corners(a), corners(b)
    def area(lo, hi): return (hi - lo).clamp(min=0).prod(-1)
    inter = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - inter
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return inter / union - (hull - union) / hull


def matching(layer, targets):
    "One cost matrix of all queries of the batch and all targets of the batch; each photo uses its own block of it."
    B, n = layer['pred_logits'].shape[:2]
    p, boxes = layer['pred_logits'].flatten(0, 1).softmax(-1), layer['pred_boxes'].flatten(0, 1)
    labels, wanted = torch.cat([t['labels'] for t in targets]), torch.cat([t['boxes'] for t in targets])
    cost = 5 * (boxes[:, None] - wanted[None]).abs().sum(-1) - p[:, labels] - 2 * giou(boxes[:, None], wanted[None])
    blocks = cost.detach().view(B, n, -1).split([len(t['labels']) for t in targets], -1)
    return [[(i, j) for i, j in zip(*linear_sum_assignment(block[b]))] for b, block in enumerate(blocks)]


def reference_losses(outputs, targets, num_classes):
    "The weighted total, the single terms by DETR's names, and the matchings, of all decoder layers."
    count = max(1, sum(len(t['labels']) for t in targets))
    layers = [*outputs['aux_outputs'], outputs]
    terms, pairs = {}, []
    for number, layer in enumerate(layers):
        suffix = '' if layer is outputs else f'_{number}'
        pairs.append(matching(layer, targets))
        chosen = [(b, i, j) for b, photo in enumerate(pairs[-1]) for i, j in photo]
        wanted = {(b, i): targets[b]['labels'][j].item() for b, i, j in chosen}
        ce = weights = 0.
        for b, photo in enumerate(layer['pred_logits']):
            for i, logits in enumerate(photo):
                c = wanted.get((b, i), num_classes)
                weight = .1 if c == num_classes else 1.
                ce, weights = ce - weight * logits.log_softmax(0)[c], weights + weight
        terms['loss_ce' + suffix] = ce / weights
        terms['loss_bbox' + suffix] = sum((layer['pred_boxes'][b, i] - targets[b]['boxes'][j]).abs().sum() for b, i, j in chosen) / count
        terms['loss_giou' + suffix] = sum(1 - giou(layer['pred_boxes'][b, i], targets[b]['boxes'][j]) for b, i, j in chosen) / count
        if 'pred_feature' in layer:
            def unit(v): return v / v.norm()
            features = [(layer['pred_feature'][b, i], outputs['gt_feature'][b, j].detach()) for b, i, j in chosen]
            terms['loss_feature' + suffix] = sum((unit(p) - unit(t)).square().sum() for p, t in features) / count
    weight = {'ce': 1, 'bbox': 5, 'giou': 2, 'feature': 1}
    return sum(weight[k.split('_')[1]] * v for k, v in terms.items()), terms, pairs


# ---- the comparison -------------------------------------------------------------------------------------------------

def spread_out(model):
    "Other numbers in every place that starts as 0 or 1, and weights that make the queries answer differently."
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith('backbone') and p.dim() == 1: p.add_(.2 * torch.randn_like(p))
            if name.endswith('multihead_attn.in_proj_weight'): p.mul_(2)
        model.query_embed.weight.mul_(3)
        model.bbox_embed.layers[-1].weight.mul_(4)
        for name, b in model.backbone.named_buffers():
            b.copy_(.75 + torch.rand_like(b) / 2 if name.endswith(('weight', 'var')) else .1 * torch.randn_like(b))
    return model


def photos(sizes=SIZES): return [torch.randn(3, h, w) for h, w in sizes]
def some_targets(labels): return [{'labels': torch.tensor(c, dtype=torch.long), 'boxes': .1 + .4 * torch.rand(len(c), 4)} for c in labels]


def same_outputs(ours, theirs):
    assert set(ours) == set(theirs) and len(ours['aux_outputs']) == len(theirs['aux_outputs'])
    for mine, other in zip([ours, *ours['aux_outputs']], [theirs, *theirs['aux_outputs']]):
        assert set(mine) == set(other) and set(mine) >= {'pred_logits', 'pred_boxes'}
        for k in set(mine) - {'aux_outputs'}: torch.testing.assert_close(mine[k], other[k], **CLOSE, msg=lambda m, k=k: f'{k}: {m}')
    assert ours['pred_boxes'].std(1).mean() > .01, 'the queries answer alike: the comparison would see little'


def same_training(model, reference, ours, theirs, targets):
    "Equal matchings, losses and gradients."
    criterion = build_criterion(model)
    losses = criterion(ours, targets)
    total, terms, pairs = reference_losses(theirs, targets, model.num_classes)
    for layer, expected in zip([*ours['aux_outputs'], ours], pairs):
        assert [[(i, j) for i, j in zip(q.tolist(), t.tolist())] for q, t in criterion.matcher(layer, targets)] == expected
    assert set(criterion.weight_dict) == set(terms)
    for k, v in terms.items(): torch.testing.assert_close(losses[k], v, **CLOSE, msg=lambda m, k=k: f'{k}: {m}')
    torch.testing.assert_close(criterion.total(losses), total, **CLOSE)
    criterion.total(losses).backward()
    total.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    largest = max(g.abs().max() for g in gradients.values() if g is not None)
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        if not p.requires_grad: continue
        scale = gradients[name].abs().max()
        if name in NO_GRADIENT and scale < 1e-6 * largest:
            assert p.grad.abs().max() < 1e-6 * largest, name
            continue
        assert scale > 1e-4 * largest, f'{name} gets no gradient'
        torch.testing.assert_close(p.grad / scale, gradients[name] / scale, **CLOSE, msg=lambda m, name=name: f'gradient of {name}: {m}')


def pair(build, classes, pre_norm, patches, **options):
    "Our model and the reference with the same weights, without dropout."
    torch.manual_seed(0)
    sizes = dict(hidden_dim=D, nheads=HEADS, enc_layers=2, dec_layers=2, dim_feedforward=64, num_queries=N, dropout=0.)
    model = spread_out(build(backbone='resnet18', pre_norm=pre_norm, **sizes, **options))
    reference = Reference(classes, pre_norm, patches)
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and not missing, 'the reference has other tensors than the model'
    return model, reference


@pytest.mark.parametrize('pre_norm', [True, False], ids=['pre-norm', 'post-norm'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_pretraining(pre_norm, training):
    model, reference = pair(build_updetr, 2, pre_norm, True, num_patches=M, mask_ratio=0.)
    images, patches = photos(), torch.randn(2, M, 3, 48, 48)
    model.train(training)
    ours, theirs = model(images, patches), reference(images, patches)
    same_outputs(ours, theirs)
    same_training(model, reference, ours, theirs, some_targets([[1] * M] * 2))


def test_keep_mask_and_fewer_patches():
    model, reference = pair(build_updetr, 2, True, True, num_patches=M)
    images, keep = photos(), torch.rand(2, N) < .5
    same_outputs(model.train()(images, p := torch.randn(2, M, 3, 48, 48), keep=keep), reference(images, p, keep))
    model.eval()
    for m in (1, 3): same_outputs(model(images, p[:, :m]), reference(images, p[:, :m]))


@pytest.mark.parametrize('pre_norm', [True, False], ids=['pre-norm', 'post-norm'])
@pytest.mark.parametrize('frozen', [True, False], ids=['frozen', 'trainable'])
def test_detection(pre_norm, frozen):
    "DETR, with different numbers of objects and one photo without any; with a trainable CNN its gradients are compared too."
    model, reference = pair(build_detr, 5, pre_norm, False, num_classes=5, frozen_backbone=frozen)
    images = photos(SIZES + [(64, 64)])
    ours, theirs = model.eval()(images), reference(images)
    same_outputs(ours, theirs)
    same_training(model, reference, ours, theirs, some_targets([[3, 0, 3], [], [1]]))
