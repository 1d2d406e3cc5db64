"A GPU's ways through CNN and augmentation, without one: cuDNN's joined calls are stood in for, and fake tensors lie on a GPU."
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch import library, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from updetr.bench import step
from updetr.data.augment import CompiledPass, draw_factors, one_pass
from updetr.data.patches import crop_resize
from updetr.model import backbone
from updetr.model.backbone import NORMS, Backbone, FrozenFold, conv_relu, fold_pairs, join_calls, join_features, make_body


def stand_in(x, weight, z, alpha, bias, *settings):
    "What cuDNN does, and what it wants."
    out = F.conv2d(x, weight, bias, *settings)
    tensors = [t for t in (x, weight, z, bias) if t is not None]
    assert len({t.dtype for t in tensors}) == len({t.device for t in tensors}) == 1 and not out.requires_grad
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight, z) if t is not None)
    assert alpha == 1 and (bias is None or bias.shape == weight.shape[:1]) and (z is None or z.shape == out.shape)
    return F.relu(out if z is None else out + z)


@pytest.fixture
def calls(monkeypatch):
    "cuDNN's two functions on CPU and fake tensors, behind PyTorch's own signatures; they count how often they are called."
    count = Counter()

    def relu(x, weight, bias, *settings):
        count['relu'] += 1
        return stand_in(x, weight, None, 1, bias, *settings)

    def add_relu(*args):
        count['add_relu'] += 1
        return stand_in(*args)
    cudnn = library.Library('aten', 'IMPL')
    for key in ('CPU', 'Meta'):
        cudnn.impl('cudnn_convolution_relu', relu, key)
        cudnn.impl('cudnn_convolution_add_relu', add_relu, key)
    monkeypatch.setattr(backbone, '_cudnn_is_here', lambda x: True)
    monkeypatch.setattr(backbone, '_refused', set())
    yield count
    cudnn._destroy()


def body_of(name, features=None, dilation=False):
    torch.manual_seed(0)
    body = make_body(name, features, dilation).eval().requires_grad_(False)
    for m in body.modules():
        if isinstance(m, NORMS): m.running_mean.normal_(0, .1), m.bias.normal_(0, .1), m.running_var.uniform_(.5, 1.5)
    return body


X = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('name, features, dilation, wanted', [
    ('resnet18', ['layer1', 'layer3', 'layer4'], False, (9, 8)), ('resnet50', None, True, (33, 16)),
    ('regnetx_002', ['s3'], False, (13, 6)), ('tf_efficientnet_lite0', ['blocks.4'], False, (0, 0))])
def test_joined_calls_give_the_same_maps(name, features, dilation, wanted, calls):
    body = body_of(name, features, dilation)
    folded, _ = fold_pairs(body)
    joined = join_calls(folded)
    want, got = body(X), joined(X)
    assert (calls['relu'], calls['add_relu']) == wanted and list(got) == list(want)
    for k, m in want.items(): assert (got[k] - m).abs().max() < 1e-5 * m.abs().max()
    kinds = Counter(type(m) for m in joined.modules())
    if wanted[0]: assert kinds[nn.ReLU] == kinds[nn.Identity] == 0
    # what is left of a residual network is calls, and the shortcuts' convolutions without a bias
    left = {n.target for n in joined.graph.nodes if n.op == 'call_function'}
    if name.startswith('res'): assert left == {conv_relu, F.conv2d, torch.add} and kinds[nn.Conv2d] == 0
    for node in joined.graph.nodes:
        if node.target is F.conv2d: assert node.args[2] is None
        if node.target is torch.add: assert all(a.op == 'get_attr' and a.target.endswith('.bias') for a in node.args)


def test_under_autocast_the_calls_get_its_precision(calls):
    body = body_of('resnet18')
    joined = join_calls(FrozenFold(body, torch.bfloat16).folded)
    with torch.autocast('cpu', torch.bfloat16): want, got = body(X)['layer4'], joined(X)['layer4']
    assert got.dtype == torch.bfloat16 and calls.total() == 17 and (got - want).abs().max() < .05 * want.abs().max()


class Tangled(nn.Module):
    "What looks like the pattern and is not, or is in another order."
    def __init__(self, way):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.relu, self.way = nn.ReLU(inplace=True), way

    def forward(self, x): return self.way(self, x)


def read_twice(net, x):
    m = net.a(x)
    return net.relu(m + 0) + m


def sum_read_twice(net, x):
    m = net.a(x) + x
    return F.relu(m) - m


def input_changed_meanwhile(net, x):
    y = x * 1
    m = net.a(y)
    return torch.relu(m + net.relu(y))


def broadcast(net, x): return (x.mean((2, 3), keepdim=True) + net.a(x)).relu()
def both_convolutions(net, x): return net.relu(net.b(x) + net.a(x))
def twice_the_same(net, x): return net.relu(torch.add(net.a(x), net.b(x), alpha=2)) + net.relu(net.a(x) + 1)
def shortcut_over_one(net, x): return net.relu(net.a(x) + x)
def residual_first(net, x): return net.relu(x + net.a(net.relu(net.b(x))))


WAYS = {read_twice: 0, sum_read_twice: 0, input_changed_meanwhile: 0, broadcast: 0,
        both_convolutions: 1, twice_the_same: 0, shortcut_over_one: 1, residual_first: 2}


@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
def test_a_graph_is_changed_only_where_it_may_be(way, calls):
    net = Tangled(way).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    graph = torch.fx.GraphModule(net, backbone._Tracer().trace(net))
    torch.testing.assert_close(join_calls(graph)(X.clone()), net(X.clone()))
    assert calls.total() == WAYS[way]


def test_where_the_calls_want_something_else_it_goes_in_pieces(calls, monkeypatch):
    w, b, z = torch.randn(3, 3, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(3), X.clone()
    settings = (1, 1), (1, 1), (1, 1), 1

    def agrees(x, w, b, z, joined):
        before = calls.total()
        want = F.relu(F.conv2d(x, w, b, *settings) + (0 if z is None else z))
        torch.testing.assert_close(conv_relu(x, w, b, z, *settings), want, rtol=.02 if want.dtype == torch.bfloat16 else None,
                                   atol=.02 if want.dtype == torch.bfloat16 else None)
        assert calls.total() == before + joined
    agrees(X, w, b, z, 1)
    agrees(X, w, b, None, 1)
    with torch.autocast('cpu', torch.bfloat16):
        agrees(X, w, b, None, 1)
        agrees(X, w, b, z, 0)
        agrees(X, w, b, z.bfloat16(), 1)
    agrees(X.double(), w.double(), b.double(), None, 0)
    agrees(X, w, b, z.double(), 0)
    agrees(X, w, b, z[:, :1], 0)
    agrees(X, w.clone().requires_grad_(), b, z, 0)
    agrees(X[0], w, b, None, 0)
    monkeypatch.setattr(torch, 'cudnn_convolution_relu', lambda *args: (_ for _ in ()).throw(RuntimeError('no engine')))
    with pytest.warns(UserWarning, match='no engine'): agrees(X, w, b, None, 0)
    with warnings.catch_warnings(action='error'): agrees(X, w, b, None, 0)
    agrees(X, w, b, z, 1)


class Quiet(TorchDispatchMode):
    "Fails where the host would wait for the device, or a shape hangs on what is in a tensor."
    loud = {'nonzero', 'item', '_local_scalar_dense', 'masked_select', 'index', 'index_put_', 'unique', 'equal', 'is_nonzero'}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        assert name not in self.loud, name
        out = f(*args, **(kwargs or {}))
        flat = [t for t in torch.utils._pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
        assert not any(t.device.type == 'cpu' and t.ndim for t in flat), name
        return out


@pytest.fixture
def gpu():
    "A device of fake tensors, of which the host knows nothing but shapes."
    with FakeTensorMode(), Quiet(): yield torch.device('cuda')


@pytest.mark.fake_gpu
def test_one_pass_of_augmentation_asks_the_host_nothing(gpu):
    patches = torch.empty(64, 3, 32, 24, dtype=torch.uint8, device=gpu)
    out = one_pass(patches, torch.empty(64, 10, device=gpu))
    assert out.shape == patches.shape and out.dtype == torch.float32 and out.device.type == 'cuda'
    photos, boxes = torch.empty(2, 3, 48, 64, dtype=torch.uint8, device=gpu), torch.empty(2, 5, 4, device=gpu)
    assert crop_resize(photos, boxes, torch.empty(2, 5, 2, device=gpu), (16, 16)).shape == (2, 5, 3, 16, 16)


@pytest.mark.parametrize('half', [False, True])
def test_a_frozen_cnn_is_joined_and_goes_with_its_weights(half, calls):
    "Its stem is wide in half precision; an evaluation, gradients for the photo and changed weights go the same way as ever."
    cnn = Backbone('resnet18', ['layer2'])
    cnn.body.load_state_dict(body_of('resnet18', ['layer2']).state_dict())
    for _ in range(2):
        calls.clear()
        with torch.autocast('cpu', torch.bfloat16, enabled=half):
            got, run = cnn(X), cnn.folded()
            again = join_features(run(X))
        want = join_features(cnn.body(X))
        assert calls == {'relu': 2 * 5, 'add_relu': 2 * 4} and torch.equal(got, again)
        assert (got - want).abs().max() < (.03 if half else 1e-5) * want.abs().max()
        assert run.get_parameter('conv1.weight').shape[1] == 3 + half and cnn.folded() is not None
        with torch.no_grad():
            for p in cnn.parameters(): p.mul_(.9)


@pytest.mark.parametrize('name, wanted', [('resnet50', (33, 16)), ('regnetx_002', (27, 13))])
def test_the_benchmark_counts_joined_calls_as_plain_convolutions(name, wanted, calls):
    "Two photos, strides and groups; on a GPU nearly all of the CNN's arithmetic is in these calls."
    folded, _ = fold_pairs(body_of(name))
    joined, counter, photos = join_calls(folded), step.Counter(), torch.cat([X, X])
    counter('pieces', lambda: folded(photos))
    assert not calls
    counter('joined', lambda: joined(photos))
    assert (calls['relu'], calls['add_relu']) == wanted and counter.gflop['joined'] == counter.gflop['pieces'] > 0
    # maps before the shortcut and the ReLU are neither written nor read again
    assert counter.gb['joined'] < counter.gb['pieces']


def test_augmentation_is_compiled_for_shapes_that_come_again():
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph
    torch._dynamo.reset()
    run = CompiledPass(lambda f, **options: torch.compile(f, backend=note, fullgraph=True, **options))
    for n, compiled in ((3, 0), (3, 1), (4, 1), (3, 1), (4, 2)):
        patches = torch.randint(0, 256, (n, 3, 16, 12), dtype=torch.uint8)
        factors = draw_factors(np.random.default_rng(len(graphs)), n)
        out = run(patches, factors)
        assert len(graphs) == compiled and (out is None or torch.equal(out, one_pass(patches, factors)))


def test_without_a_compiler_augmentation_says_why_and_goes_on():
    def broken(*args): raise RuntimeError('Failed to find C compiler')
    run = CompiledPass(lambda f, **options: broken)
    patches, factors = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 10)
    assert run(patches, factors) is None
    with pytest.warns(UserWarning, match='Failed to find C compiler'): assert run(patches, factors) is None
    with warnings.catch_warnings(action='error'): assert run(patches, factors) is None
