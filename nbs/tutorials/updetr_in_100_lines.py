import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d, box_convert, generalized_box_iou


def sine_positions(padding, d):  # (B,h,w) bool -> (B,h*w,d): half of the channels for y, half for x
    period, halves = 10000 ** (torch.arange(0, d // 2, 2, device=padding.device) / (d // 2)), []
    for axis in (1, 2):
        place = (~padding).cumsum(axis, dtype=torch.float32)
        angle = 2 * torch.pi * (place / (place.amax(axis, True) + 1e-6))[..., None] / period
        halves.append(torch.stack((angle.sin(), angle.cos()), -1).flatten(-2))
    return torch.cat(halves, -1).flatten(1, 2)


class EncoderLayer(nn.Module):
    def __init__(self, d, heads=8, hidden=2048, dropout=.1):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d, heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(d), nn.LayerNorm(d), nn.Dropout(dropout)

    def feed_forward(self, x):
        return self.dropout(self.linear2(self.dropout(self.linear1(x).relu())))

    def forward(self, x, pos, padding):
        # the photo's tokens look at each other; places join queries and keys, never values
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y + pos, y + pos, y, key_padding_mask=padding)[0])
        return x + self.feed_forward(self.norm2(x))


class DecoderLayer(EncoderLayer):
    def __init__(self, d, heads=8, hidden=2048, dropout=.1):
        super().__init__(d, heads, hidden, dropout)
        self.multihead_attn = nn.MultiheadAttention(d, heads, dropout, batch_first=True)
        self.norm3 = nn.LayerNorm(d)

    def forward(self, x, query, apart, memory, pos, padding):  # at each other, then at the photo
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y + query, y + query, y, attn_mask=apart)[0])
        y, key = self.norm2(x) + query, memory + pos
        x = x + self.dropout(self.multihead_attn(y, key, memory, key_padding_mask=padding)[0])
        return x + self.feed_forward(self.norm3(x))


class MLP(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]: x = layer(x).relu()
        return self.layers[-1](x)


class UPDETR(nn.Module):
    def __init__(self, cnn='resnet50', d=256, layers=6, N=100, M=10, **sizes):
        super().__init__()
        resnet = getattr(torchvision.models, cnn)(norm_layer=FrozenBatchNorm2d)
        C, self.group_size = resnet.fc.in_features, N // M
        body = nn.Sequential()  # the CNN without its pooling and its classes, frozen
        for name, part in [*resnet.named_children()][:-2]: body.add_module(name, part)
        self.backbone = nn.ModuleList([nn.ModuleDict({'body': body.requires_grad_(False)})])
        self.transformer = nn.ModuleDict()
        for name, kind in (('encoder', EncoderLayer), ('decoder', DecoderLayer)):
            stack = nn.ModuleList(kind(d, **sizes) for _ in range(layers))
            self.transformer[name] = nn.ModuleDict({'layers': stack, 'norm': nn.LayerNorm(d)})
        self.input_proj, self.patch2query = nn.Conv2d(C, d, 1), nn.Linear(C, d)
        self.query_embed = nn.Embedding(N, d)
        self.class_embed = nn.Linear(d, 3)  # 0 is never used, 1: here is the patch, 2: no object
        self.bbox_embed, self.feature_align = MLP(d, d, d, 4), MLP(d, d, C)

    def forward(self, photos, patches, padding=None, keep=None):
        cnn, (encoder, decoder) = self.backbone[0]['body'], self.transformer.values()
        # photos (B,3,H,W) become tokens with places; padding (B,H,W) is True beside the photo
        grid = self.input_proj(cnn(photos))
        padding = torch.zeros_like(photos[:, 0]) if padding is None else padding.float()
        padding = F.interpolate(padding[:, None], grid.shape[-2:])[:, 0].bool()
        pos, padding = sine_positions(padding, grid.shape[1]), padding.flatten(1)
        x = grid.flatten(2).mT
        for layer in encoder['layers']: x = layer(x, pos, padding)
        memory = encoder['norm'](x)
        # patches (B,M,3,h,w): the same CNN, one vector each, added to the N/M queries of its group
        feature = cnn(patches.flatten(0, 1)).mean((2, 3)).unflatten(0, patches.shape[:2])
        patch = self.patch2query(feature).repeat_interleave(self.group_size, 1)
        if keep is None: keep = torch.rand_like(patch[..., 0]) >= (.1 if self.training else 0)
        query = self.query_embed.weight[:patch.shape[1]] + patch * keep[..., None]
        # queries of different patches do not see each other; every layer's answer is trained
        group = torch.arange(patch.shape[1], device=patch.device) // self.group_size
        x, states = torch.zeros_like(query), []
        for layer in decoder['layers']:
            x = layer(x, query, group[:, None] != group, memory, pos, padding)
            states.append(decoder['norm'](x))
        x = torch.stack(states)
        return self.class_embed(x), self.bbox_embed(x).sigmoid(), self.feature_align(x), feature


def corners(boxes): return box_convert(boxes, 'cxcywh', 'xyxy')


def loss(outputs, target, eos_coef=.1):  # target (B,M,4): where the patches were, cxcywh in 0..1
    *layers, patch_feature = outputs
    photo, patch, total = torch.arange(len(target))[:, None], torch.arange(target.shape[1]), 0
    for logits, boxes, feature in zip(*layers):
        # which query answers for which patch? the cheapest one-to-one assignment
        giou = generalized_box_iou(corners(boxes), corners(target))
        cost = 5 * torch.cdist(boxes, target, p=1) - 2 * giou - logits.softmax(-1)[..., 1:2]
        query = torch.tensor([linear_sum_assignment(c.T)[1].tolist() for c in cost.detach().cpu()])
        # that query says "here", the others "no object"; it says where, and remembers what it was
        label = torch.full(logits.shape[:2], 2).scatter(1, query, 1).to(logits.device)
        total += F.cross_entropy(logits.mT, label, target.new_tensor([1, 1, eos_coef]))
        total += 5 * (boxes[photo, query] - target).abs().sum(-1).mean()
        total += 2 * (1 - giou[photo, query, patch]).mean()
        error = F.normalize(feature[photo, query], dim=-1) - F.normalize(patch_feature, dim=-1)
        total += error.square().sum(-1).mean()
    return total


# ---- trained on one photo ----
from skimage.data import astronaut
from torchvision.transforms.functional import resize, resized_crop


def cut(photo, n):  # (3,S,S) -> n random patches (n,3,48,48), and where they were (n,4)
    size = torch.empty(n, 2).uniform_(.2, .6)
    corner = torch.rand(n, 2) * (1 - size)
    pixels = (torch.cat((corner, size), 1) * photo.shape[-1]).int().tolist()
    patches = torch.stack([resized_crop(photo, y, x, h, w, (48, 48)) for x, y, w, h in pixels])
    return patches, torch.cat((corner + size / 2, size), 1)


def prepare(model, photo, patches):  # what the frozen CNN makes of them; the CNN is taken out
    cnn, model.backbone[0]['body'] = model.backbone[0]['body'], nn.Identity()
    seen = cnn(resize(photo, 256)[None]), cnn(patches).mean((2, 3), True)
    return [(x - x.mean((0, 2, 3), True)) / (x.std((0, 2, 3), keepdim=True) + 1e-6) for x in seen]


def train(model, photo, patches, boxes, steps):  # features of one photo and of its patches
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        i = torch.randint(len(boxes), (16, 10))
        error = loss(model(photo.expand(16, -1, -1, -1), patches[i]), boxes[i])
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(model.parameters(), .5)
        optimizer.step()
        schedule.step()
        if step % 100 == 0: print(f'step {step}, loss {error.item():.1f}')


if __name__ == '__main__':
    torch.manual_seed(0)
    photo = torch.tensor(astronaut()).permute(2, 0, 1) / 255
    model = UPDETR('resnet18', d=64, layers=2, N=20, M=10, heads=4, hidden=128, dropout=0.)
    patches, boxes = cut(photo, 2200)
    seen, asked = prepare(model, photo, patches)
    train(model, seen, asked[:2000], boxes[:2000], steps=400)
