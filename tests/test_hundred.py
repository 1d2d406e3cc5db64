"UP-DETR in 100 lines: it has 100, needs nothing of the kit, and is the kit's model: names, outputs, loss, gradients."
import ast
import types

import pytest
import torch

from tools.hundred import MAIN, SCRIPT, TRAIN, script
from updetr.model.losses import build_criterion
from updetr.model.updetr import build_updetr

TEXT = script()
MODEL, REST = TEXT.split(TRAIN)
N, M = 12, 3


def load(text):
    "The names that the lines define."
    module = types.ModuleType('hundred')
    exec(text, vars(module))
    return module


def lines(text): return [line for line in text.splitlines() if line.strip()]


def packages(text):
    nodes = list(ast.walk(ast.parse(text)))
    return ({a.name.split('.')[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
            | {n.module.split('.')[0] for n in nodes if isinstance(n, ast.ImportFrom)})


def test_the_file_is_the_notebooks():
    assert SCRIPT.read_text(encoding='utf-8') == TEXT, 'python tests/tools/hundred.py'


def test_it_has_100_lines():
    assert len(lines(MODEL)) <= 100, f'{len(lines(MODEL))} lines of model and losses'
    assert len(lines(REST)) <= 32, f'{len(lines(REST))} lines that train'
    assert max(map(len, TEXT.splitlines())) <= 100


def test_it_needs_nothing_of_the_kit():
    assert packages(MODEL) == {'torch', 'torchvision', 'scipy'} and packages(REST) == {'skimage', 'torchvision'}


def test_the_papers_model_has_the_same_names():
    "Either loads the other's weights, all of them."
    with torch.device('meta'): mine = load(MODEL).UPDETR()
    kit = build_updetr()
    assert len(mine.state_dict()) == 466
    shapes = ({k: (v.shape, v.dtype) for k, v in model.state_dict().items()} for model in (mine, kit))
    assert next(shapes) == next(shapes)
    mine.load_state_dict(kit.state_dict(), assign=True)
    kit.load_state_dict(mine.state_dict())
    trained = [{k for k, p in model.named_parameters() if p.requires_grad} for model in (mine, kit)]
    assert trained[0] == trained[1]


def small_models(module):
    "Our lines and the kit's model, with the same weights, random but for the CNN's scale."
    torch.manual_seed(0)
    kit = build_updetr('resnet18', hidden_dim=32, nheads=4, enc_layers=2, dec_layers=2, dim_feedforward=48, dropout=0., num_queries=N,
                       num_patches=M)
    for name, p in kit.named_parameters():
        if not name.startswith('backbone'): p.data += .1 * torch.randn_like(p)
    mine = module.UPDETR('resnet18', d=32, layers=2, N=N, M=M, heads=4, hidden=48, dropout=0.)
    mine.load_state_dict(kit.state_dict())
    kit.load_state_dict(mine.state_dict())
    return mine, kit


def close(a, b): return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def differences(text, training=True, m=M, padded=True):
    "Return what differs from the kit on a random batch: outputs, the loss, gradients."
    module = load(text)
    mine, kit = (model.train(training) for model in small_models(module))
    photos, patches, keep = torch.randn(2, 3, 96, 128), torch.randn(2, m, 3, 32, 32), torch.rand(2, m * N // M) > .3
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:], mask[1, :, 96:] = True, True
    mask = mask if padded else None
    boxes = torch.rand(2, m, 4) * .4 + .3
    outputs, expected = mine(photos, patches, mask, keep), kit(photos, patches, mask, keep)
    found = dict(zip(('pred_logits', 'pred_boxes', 'pred_feature'), outputs))
    layers = [*expected['aux_outputs'], expected]
    wrong = [k for k, v in found.items() if not close(v, torch.stack([layer[k] for layer in layers]))]
    criterion = build_criterion(kit)
    if m < M: criterion.num_queries = None  # else the class loss is divided by the weights of all N queries, also of those not asked
    losses = criterion(expected, [{'labels': torch.ones(m, dtype=torch.int64), 'boxes': b} for b in boxes])
    total, kits = module.loss(outputs, boxes), criterion.total(losses)
    if not close(total, kits): wrong.append('loss')
    total.backward(), kits.backward()
    grads = dict(kit.named_parameters())
    for name, p in mine.named_parameters():
        same = p.grad is grads[name].grad if name.startswith('backbone') else p.grad is not None and close(p.grad, grads[name].grad)
        if not same: wrong.append(f'gradient of {name}')
    return wrong


@pytest.mark.parametrize('case', [dict(), dict(training=False), dict(padded=False), dict(m=1), dict(m=2)], ids=str)
def test_outputs_loss_and_gradients_are_the_kits(case):
    assert differences(MODEL, **case) == []


SLIPS = {'eos_coef': ('eos_coef=.1', 'eos_coef=.2'), 'no mask': ('group[:, None] != group', '(group[:, None] != group) & False'),
         'places in values': ('y + pos, y + pos, y,', 'y + pos, y + pos, y + pos,'),
         'queries left out': ('self.norm2(x) + query', 'self.norm2(x)'),
         'boxes without sigmoid': ('.sigmoid()', ''), 'boxes as corners': ("'cxcywh', 'xyxy'", "'xyxy', 'xyxy'"),
         'x before y': ('for axis in (1, 2)', 'for axis in (2, 1)'), 'padding seen': ('key_padding_mask=padding', 'key_padding_mask=None'),
         'keep forgotten': ('patch * keep[..., None]', 'patch'), 'no unit vectors': ('F.normalize(patch_feature, dim=-1)', 'patch_feature'),
         'L1 light': ('total += 5', 'total += 4'), 'matched without the class': (' - logits.softmax(-1)[..., 1:2]', ''),
         'norm left out': ("encoder['norm'](x)", 'x')}


@pytest.mark.parametrize('slip', SLIPS)
def test_a_slip_is_noticed(slip):
    right, wrong = SLIPS[slip]
    assert right in MODEL and differences(MODEL.replace(right, wrong))


def test_one_query_in_ten_loses_its_patch_while_training():
    torch.manual_seed(0)
    module = load(MODEL)
    model = module.UPDETR('resnet18', d=32, layers=1, N=200, M=2, heads=4, hidden=32, dropout=0.)
    seen = []
    model.transformer['decoder']['layers'][0].register_forward_pre_hook(lambda layer, args: seen.append(args[1]))
    for mode in (True, False): model.train(mode)(torch.randn(5, 3, 64, 64), torch.randn(5, 2, 3, 32, 32))
    bare = [(query == model.query_embed.weight).all(-1).float().mean().item() for query in seen]
    assert .05 < bare[0] < .15 and bare[1] == 0


def test_it_trains():
    "The part below, for a few steps: the loss falls, and patches are where they are said to be."
    module = load(TEXT.split(MAIN)[0])
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, 256), torch.linspace(0, 1, 256), indexing='ij')
    patches, boxes = module.cut(torch.stack((x, y, x)), 60)
    assert (patches[:, :2].mean((2, 3)) - boxes[:, :2]).abs().max() < .01
    model = module.UPDETR('resnet18', d=32, layers=1, N=20, M=10, heads=4, hidden=32, dropout=0.)
    photo, patches = module.prepare(model, torch.rand(3, 256, 256), patches)
    assert photo.shape == (1, 512, 8, 8) and patches.shape == (60, 512, 1, 1) and photo.mean((0, 2, 3)).abs().max() < 1e-4

    def loss(): return float(module.loss(model(photo, patches[None, :10]), boxes[None, :10]).detach())
    before = loss()
    module.train(model, photo, patches, boxes, 8)
    assert loss() < before


@pytest.mark.parametrize('masked', [False, True], ids=['no mask', 'mask'])
def test_what_changes_if_a_patch_is_exchanged(masked):
    "Exercise 1: without the mask every query's answer, but not in the first layer, where all values are the same vector"
    apart = 'group[:, None] != group'
    assert TEXT.count(apart) == 1
    model = small_models(load(MODEL if masked else MODEL.replace(apart, f'torch.zeros_like({apart})')))[0].eval()
    photo, patches, others = torch.rand(1, 3, 64, 96), torch.rand(1, M, 3, 32, 32), torch.rand(1, M, 3, 32, 32)
    others[:, 1:] = patches[:, 1:]
    with torch.no_grad(): before, after = (model(photo, p)[:3] for p in (patches, others))
    own = torch.arange(N) < N // M
    for a, b in zip(before, after):
        # (layers, 1, N, numbers)
        moved = (a - b).abs().amax(-1)[:, 0] > 1e-6
        assert moved[:, own].all() and moved[0].equal(own) and moved[1].equal(own if masked else own | True)
