"""Layers, losses and matching cost through a compiler: the same numbers, only what comes again, copies, failures, and how many kernels.

What a GPU would run is written here, not run: a backend that writes no code stands in for inductor. `test_cuda.py` has the real one."""
import copy
import pickle
import re
import warnings
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CpuInterface
from torch._functorch import config as aot
from torch._inductor import config as inductor
from torch._inductor.utils import get_code
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from updetr.model.backbone import Backbone
from updetr.model.losses import CountCalls, build_criterion, match_patches, matched_losses, patch_predictions
from updetr.model.matcher import match_cost
from updetr.model.transformer import Transformer, TransformerDecoderLayer, TransformerEncoderLayer, compile_options
from updetr.model.updetr import build_updetr
from updetr.train.graphs import compile_parts

SIZES = dict(hidden_dim=32, nheads=4, enc_layers=2, dec_layers=3, dim_feedforward=32, num_queries=20, num_patches=5)
# an older PyTorch compiles a backward pass where it runs first, and a failure ends the step
at_once = pytest.mark.skipif(not hasattr(aot, 'force_non_lazy_backward_lowering'),
                             reason=f'PyTorch {torch.__version__} compiles backward passes late')
# what inductor makes of a graph before it writes code
TRACED = dict(backend='aot_eager_decomp_partition', options=None, fullgraph=True)


@pytest.fixture(autouse=True)
def torchs_dropout():
    with inductor.patch(fallback_random=True): yield
    torch._dynamo.reset()


def make(**options):
    torch.manual_seed(0)
    model = build_updetr('resnet18', **SIZES | options)
    return model, build_criterion(model)


def encoded(padded=False, B=2, h=4):
    torch.manual_seed(1)
    mask = torch.arange(5).expand(B, h, 5) > 3 if padded else None
    return [torch.randn(B, 512, h, 5), torch.rand(B, 5, 512), torch.rand(B, 20) > .1, mask], torch.rand(B, 5, 4) * .4 + .3


def step(model, criterion, batch, amp=False):
    "The loss, what is logged, and all gradients, with the same dropout each time."
    torch.manual_seed(2)
    model.zero_grad()
    inputs, boxes = batch
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        predictions = patch_predictions(model, *inputs)
        matched = match_patches(criterion, predictions, boxes)
        losses, total = matched_losses(model, criterion, *predictions, matched, boxes)
    total.backward()
    return torch.stack([total, *losses.values()]).detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def agree(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
    assert ours[1].keys() == theirs[1].keys() and len(theirs[1]) > 50
    for k, g in theirs[1].items(): assert (ours[1][k] - g).abs().max() < 1e-4 * max(1, g.abs().max()), k


class Graphs:
    "A compiler that only counts."
    def __init__(self): self.n = 0

    def __call__(self, graph, inputs):
        self.n += 1
        return graph


@pytest.mark.parametrize('way', [dict(padded=True, checkpointing=True), dict(pre_norm=False, attention_mask=False)], ids=str)
def test_a_compiled_step_is_the_plain_one(way):
    "With dropout, whose masks are the same; loss, log and the gradients of all parameters."
    way = dict(way)
    padded, checkpointing = way.pop('padded', False), way.pop('checkpointing', False)
    model, criterion = make(dropout=.1, **way)
    for stack in model.transformer.children(): stack.gradient_checkpointing = checkpointing
    batch = encoded(padded)
    plain = step(model, criterion, batch)
    for part in (model.transformer, criterion): part.compile(**TRACED)
    for _ in range(3): agree(step(model, criterion, batch), plain)
    for part in (model.transformer.encoder, model.transformer.decoder, criterion, criterion.matcher):
        assert part.compiled.kinds is not None and len(part.compiled.kinds.known) == 1, 'it was not compiled'


def test_what_comes_again_is_compiled_and_no_more_than_some_sizes(monkeypatch):
    "Not an evaluation, nor what wants maps; layers of one kind share what was compiled."
    monkeypatch.setattr('updetr.model.transformer.MOST_SIZES', 2)
    model, graphs = Transformer(32, 4, 3, 4, 32), Graphs()
    model.compile(backend=graphs, options=None, fullgraph=True)

    def ask(S, **more): return model(torch.randn(2, S, 32, requires_grad=True), torch.randn(1, S, 32), torch.randn(2, 10, 32), **more)[0]
    # the encoder's layers are one graph, the decoder's first has inputs without gradient
    for S, n in ((6, 0), (6, 3), (6, 3), (7, 3), (8, 3), (7, 6), (8, 6), (8, 6)):
        ask(S)
        assert graphs.n == n, (S, graphs.n)
    maps = []
    ask(6, maps=maps)
    assert len(maps) == 4
    with torch.no_grad(): ask(6)
    model.eval()
    for S in (6, 6, 9, 9): ask(S)
    assert graphs.n == 6


def test_copies_and_files_know_nothing_of_the_compiler():
    model, criterion = make(dropout=0.)
    names, graphs, batch = list(model.state_dict()), Graphs(), encoded()
    for part in (model.transformer, criterion): part.compile(backend=graphs, options=None, fullgraph=True)
    for _ in range(2): plain = step(model, criterion, batch)
    assert graphs.n > 3 and list(model.state_dict()) == names
    n = graphs.n
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model).module]
    losses = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), criterion]
    for other, its in zip(others, losses):
        assert all(layer._compiled_call_impl is None for layer in other.transformer.encoder.layers)
        agree(step(other, its, batch), plain)
    assert graphs.n == n
    model.eval()
    module = torch.export.export(model.transformer, (torch.randn(2, 20, 32), torch.randn(1, 20, 32), torch.randn(2, 20, 32))).module()
    assert list(module.state_dict()) == list(model.transformer.state_dict())


@pytest.mark.parametrize('fails', ['forward', pytest.param('backward', marks=at_once)])
@pytest.mark.parametrize('error', [RuntimeError('Failed to find C compiler'), ImportError('no triton here')], ids=str)
def test_without_a_compiler_it_says_why_once_and_goes_on(error, fails):
    def broken(graph, inputs): raise error
    half_way = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=broken)
    backend = broken if fails == 'forward' else half_way
    model, criterion = make(dropout=.1)
    batch = encoded()
    plain = step(model, criterion, batch)
    for part in (model.transformer, criterion): part.compile(backend=backend, options=None, fullgraph=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for _ in range(3): agree(step(model, criterion, batch), plain)
    said = [str(w.message) for w in said if 'not compiled' in str(w.message)]
    # both stacks, cost and losses; the cost has no gradient
    assert len(said) == 4 - (fails == 'backward') and all(str(error) in s for s in said)


@pytest.mark.parametrize('frozen', [True, pytest.param(False, marks=at_once)])
def test_a_cnn_that_cannot_be_compiled_runs_as_it_is(frozen):
    def broken(graph, inputs): raise RuntimeError('Failed to find C compiler')
    cnn, photo = Backbone('resnet18', frozen=frozen).train(), torch.randn(1, 3, 64, 64)
    with torch.no_grad(): wanted = cnn(photo)
    cnn.compile(backend=broken if frozen else aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=broken))
    cnn(photo)
    with pytest.warns(UserWarning, match='not compiled: the CNN, .* Failed to find C compiler'): tried = cnn(photo)
    with warnings.catch_warnings(action='error'): again = cnn(photo)
    assert torch.equal(tried, wanted) and torch.equal(again, wanted) and again.requires_grad != frozen
    if not frozen: again.sum().backward()


def test_each_size_is_compiled_for_itself_with_the_dropout_of_pytorch(monkeypatch):
    model, criterion = make()
    given = []
    monkeypatch.setattr(torch, 'compile', lambda f, **options: given.append(options) or f)
    compile_parts(model, criterion)
    for _ in range(2): step(model, criterion, encoded())
    # five layers, cost and losses; the CNN is not asked
    assert len(given) == 7 and all(options == {'dynamic': False, 'options': {'fallback_random': True}} for options in given)


def test_a_full_gpu_is_no_reason_to_go_on():
    def full(graph, inputs):
        def run(*args): raise torch.OutOfMemoryError('CUDA out of memory')
        return run
    model = Transformer(32, 4, 1, 1, 32)
    model.compile(backend=full, options=None, fullgraph=True)
    given = torch.randn(2, 6, 32, requires_grad=True), torch.randn(1, 6, 32), torch.randn(2, 10, 32)
    model(*given)
    with pytest.raises(torch.OutOfMemoryError): model(*given)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path / 'meet'), 1), rank=0, world_size=1)
    try: yield
    finally: dist.destroy_process_group()


def test_processes_average_what_was_compiled(one_process):
    model = Transformer(32, 4, 1, 2, 32, dropout=0.)
    given = torch.randn(2, 6, 32), torch.randn(1, 6, 32), torch.randn(2, 10, 32)

    def gradients(module):
        model.zero_grad()
        module(*given)[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]
    plain = gradients(model)
    model.compile(**TRACED)
    module = DistributedDataParallel(model)
    for _ in range(3): torch.testing.assert_close(gradients(module), plain)
    assert model.decoder.compiled.kinds.known


def kernels(f, *inputs):
    "How many kernels a GPU is given by what inductor writes: Triton's, forward and backward, and calls of libraries."
    def run():
        # only written: there is nothing to run
        try:
            with torch.autocast('cpu', torch.bfloat16): torch.compile(f, **compile_options(fullgraph=True))(*inputs)
        except AttributeError: pass
    with inductor.patch(cpu_backend='triton', fx_graph_cache=False), \
         aot.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False), \
         patch('torch.utils._triton.triton_hash_with_backend', lambda: ''), \
         patch.object(CpuInterface, 'raise_if_triton_unavailable', lambda *_: None): written = get_code(run)
    calls = [code.split('def call(', 1)[1] for code in written if 'def call(' in code]
    return sum(len(re.findall(r'\.run\(|extern_kernels\.\w+\(|= torch\.ops\.aten\.', text)) for text in calls), len(calls)


def operations(f, *inputs):
    "How many operations the same takes, forward and backward."
    with CountCalls() as forward, torch.autocast('cpu', torch.bfloat16): out = f(*inputs)
    out = out[1] if isinstance(out, tuple) else out
    given = torch.ones_like(out)
    with CountCalls() as backward:
        if out.requires_grad: out.backward(given)
    return (forward.counts + backward.counts).total()


def parts(B=2, S=20, N=20, d=32):
    "What is compiled, how often a step of six and six layers does it, and with what."
    def new(*shape): return torch.randn(*shape, requires_grad=True)
    model, criterion = make(dec_layers=6, dropout=0.)
    sizes, boxes = (d, 4, 64, 0.), torch.rand(B, 5, 4)
    answers = new(6, B, N, 3), torch.rand(6, B, N, 4, requires_grad=True).sigmoid()
    matched = torch.randint(0, N, (6, B, 5))
    yield 'encoder layer', 6, TransformerEncoderLayer(*sizes), (new(B, S, d), torch.randn(1, S, d))
    yield 'decoder layer', 6, TransformerDecoderLayer(*sizes), (*[new(B, n, d) for n in (N, S, S, N)], None, None, None, 5)
    yield 'cost', 1, match_cost, ([a.detach() for a in answers][0], answers[1].detach(), torch.ones(B, 5, dtype=torch.long), boxes)
    yield 'losses', 1, Losses(model, criterion), (*answers, new(6, B, N, d), torch.rand(B, 5, 512), matched, boxes)


class Losses(nn.Module):
    def __init__(self, model, criterion):
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, *tensors): return matched_losses(self.model, self.criterion, *tensors)


@at_once
def test_a_compiled_step_is_less_than_a_thousand_launches():
    "In half precision, behind the CNN. Counted, not timed; a GPU may split a long sum in two."
    model, criterion = make(enc_layers=6, dec_layers=6, dropout=0.)
    with CountCalls() as calls: step(model, criterion, encoded(), amp=True)
    before = after = calls.counts.total()
    for name, times, f, inputs in parts():
        plain, (compiled, graphs) = operations(f, *inputs), kernels(f, *inputs)
        print(f'{name}: {plain} operations, {compiled} kernels')
        assert graphs == (1 if name == 'cost' else 2) and compiled < plain
        after -= times * (plain - compiled)
    print(f'step: {before} operations, {after} with what is compiled')
    assert 1400 < before and after < 1000
