"A CNN where a notebook cannot show it: trained in DDP, pickled, after inference mode, compiled; with other people's weights."
import argparse
import copy
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.models import register_model

from updetr.model import backbone
from updetr.model.backbone import NORMS, Backbone, TrainedFold, build_backbone, eval_mode, fold_norms, fold_pairs, join_features
from updetr.train.graphs import data_parallel


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    cnn = Backbone('resnet18', ['layer3'], frozen=False).double()
    for m in cnn.modules():
        if isinstance(m, NORMS): m.running_mean.normal_(0, .1), m.running_var.uniform_(.5, 1.5), m.weight.uniform_(.5, 1.5)
    return cnn


@pytest.fixture
def x(): return torch.randn(2, 3, 64, 64, dtype=torch.double)


def gradients(run, cnn, x):
    cnn.zero_grad()
    run(x).square().mean().backward()
    return {k: p.grad.clone() for k, p in cnn.named_parameters() if p.grad is not None}


def plain(cnn): return lambda x: join_features(cnn.body(x))


@pytest.mark.filterwarnings('error:Grad strides', 'error:.*deprecated')
def test_ddp_reduces_the_gradients_of_a_folded_cnn(cnn, x, tmp_path):
    want = gradients(plain(cnn), cnn, x)
    dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path / 'meet'), 1), rank=0, world_size=1)
    try:
        module, buckets = data_parallel(cnn, torch.device('cpu')), []

        def doubled(state, bucket):
            buckets.append(bucket.buffer().numel())
            done = torch.futures.Future()
            done.set_result(bucket.buffer().mul_(2))
            return done
        module.register_comm_hook(None, doubled)
        got = gradients(module, cnn, x)
    finally: dist.destroy_process_group()
    assert sum(buckets) == sum(p.numel() for p in cnn.parameters() if p.requires_grad)
    torch.testing.assert_close(got, {k: 2 * g for k, g in want.items()})


def test_copies_and_pickles_go_on_by_themselves(cnn, x):
    cnn(x)
    for twin in (copy.deepcopy(cnn), pickle.loads(pickle.dumps(cnn))):
        with torch.no_grad(): twin.body.get_parameter('layer3.0.conv1.weight').mul_(2)
        torch.testing.assert_close(twin(x), plain(twin)(x))
        assert not torch.allclose(twin(x), cnn(x)) and gradients(twin, twin, x).keys() == gradients(plain(cnn), cnn, x).keys()


def test_what_was_first_asked_in_inference_mode_can_be_trained(cnn, x):
    with torch.inference_mode(): cnn.train()(x)
    torch.testing.assert_close(gradients(cnn, cnn, x), gradients(plain(cnn), cnn, x))


@pytest.mark.parametrize('frozen', [False, True])
def test_what_was_made_in_inference_mode_can_be_asked_anywhere(x, frozen):
    "Its weights count no changes."
    with torch.inference_mode(): cnn = Backbone('resnet18', ['layer3'], frozen=frozen).double()
    with torch.no_grad(): want = plain(cnn)(x)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            for _ in range(2): torch.testing.assert_close(cnn(x), want)


def test_a_photo_gets_its_gradient(cnn, x):
    a, b = (torch.autograd.grad(run(p := x.clone().requires_grad_()).sum(), p)[0] for run in (cnn, plain(cnn)))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize('frozen', [False, True])
def test_frozen_may_change_at_any_time(cnn, x, frozen):
    cnn(x)
    cnn.frozen = frozen
    assert cnn(x).requires_grad == (not frozen)
    torch.testing.assert_close(cnn(x), plain(cnn)(x).detach() if frozen else plain(cnn)(x))


def test_the_copy_for_evaluation_follows_training(cnn, x):
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(cnn.eval()(x), plain(cnn)(x))
            for p in cnn.parameters(): p.mul_(1.1)
    assert cnn._folds.live(cnn.body) is cnn._folds.live(cnn.body) and cnn.folded() is cnn.folded()


def test_gradients_have_the_layout_of_their_weights(cnn, x):
    with torch.autocast('cpu', torch.bfloat16): gradients(cnn.float(), cnn, x.float())
    assert all(p.grad.stride() == p.stride() and p.grad.dtype == p.dtype for p in cnn.parameters() if p.requires_grad)


def test_a_network_that_cannot_be_traced_runs_as_it_is(cnn, x):
    class Asks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = cnn.body

        def forward(self, x):
            if x.sum() > 1e9: return self.body(-x)
            return self.body(x)
    body = Asks()
    fold = TrainedFold(body)
    assert not fold.scales and torch.equal(join_features(fold(body, x)), plain(cnn)(x))


@pytest.mark.parametrize('frozen', [False, True])
def test_a_compiler_of_the_whole_gets_the_network_as_it_is(cnn, x, frozen):
    cnn.frozen = frozen
    module = torch.export.export(cnn, (x,)).module()
    torch.testing.assert_close(module(x), plain(cnn)(x))
    assert cnn._folds.live.made is None and not cnn._folds.frozen


@pytest.mark.parametrize('frozen', [False, True])
def test_compiled_by_itself_it_gives_the_same_for_all_sizes(cnn, x, frozen, monkeypatch):
    "A size is compiled when training shows it again, no more than two of them are here, and an evaluation asks for none."
    monkeypatch.setattr('updetr.model.backbone.MOST_SIZES', 2)
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph
    cnn.frozen = frozen
    cnn.compile(backend=note)

    def agrees(photos, compiled):
        torch.testing.assert_close(cnn(photos), plain(cnn)(photos).detach() if frozen else plain(cnn)(photos))
        assert len(graphs) == compiled
    sizes = [x, torch.randn(1, 3, 33, 64, dtype=torch.double), x[:1]]
    for photos in sizes: agrees(photos, 0)
    cnn.eval()
    for photos in sizes: agrees(photos, 0)
    cnn.train()
    for photos, compiled in zip(sizes, (1, 2, 2)): agrees(photos, compiled)
    for photos in sizes: agrees(photos, 2)
    if not frozen: torch.testing.assert_close(gradients(cnn, cnn, x), gradients(plain(cnn), cnn, x))
    with torch.no_grad():
        cnn.eval()(x)
        assert len(graphs) == 2, 'without gradients it would be compiled anew'
    twin = copy.deepcopy(cnn.train())
    with torch.no_grad():
        for p in cnn.parameters(): p.mul_(1.1)
    for one in (cnn, twin): torch.testing.assert_close(one(x), plain(one)(x).detach() if frozen else plain(one)(x))
    assert not torch.allclose(cnn(x), twin(x))


def fused_step(cnn, x):
    "Train, by an optimizer that changes the weights behind their counters."
    params = [p for p in cnn.parameters() if p.requires_grad]
    versions = [p._version for p in params]
    optimizer = torch.optim.AdamW(params, 1e-2, fused=True)
    cnn.train()(x).square().mean().backward()
    optimizer.step()
    assert versions == [p._version for p in params], 'fused optimizers count again: the text of notebook 20 is out of date'


def scale_data(cnn, x):
    for p in cnn.parameters(): p.data.mul_(.9)


def replace_twice(cnn, x):
    for p in cnn.parameters():
        p.data = p.data * .9
        p.data = p.data * .9


@pytest.mark.parametrize('frozen, change', [(False, fused_step), (False, scale_data), (False, replace_twice), (True, scale_data),
                                            (True, replace_twice)])
def test_an_evaluation_sees_what_no_counter_counts(frozen, change):
    x = torch.randn(1, 3, 64, 64)
    cnn = Backbone('resnet18', ['layer3'], frozen=frozen).eval()
    with torch.no_grad():
        def ask(): return cnn(x), cnn.folded()(x)['layer3']
        with torch.autocast('cpu', torch.bfloat16): half, _ = ask()
        before = ask()
        with torch.enable_grad(): change(cnn, x)
        cnn.eval()
        with torch.autocast('cpu', torch.bfloat16): assert not torch.equal(half, ask()[0])
        after, want = ask(), plain(cnn)(x)
        assert torch.equal(cnn(x), cnn(x)) and not any(torch.allclose(a, b) for a, b in zip(before, after))
        torch.testing.assert_close(after[0], want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_it_follows_every_step_and_what_is_frozen_later():
    cnn, part = Backbone('resnet18', frozen=False), torch.randn(1, 3, 64, 64)

    def agrees():
        with torch.no_grad(): as_it_is = join_features(cnn.body(part))
        return torch.allclose(cnn(part), as_it_is, rtol=1e-4, atol=1e-4 * as_it_is.abs().max())

    def learn():
        optimizer = torch.optim.Adam([p for p in cnn.parameters() if p.requires_grad], 1e-3)
        cnn(part).square().mean().backward()
        learnt = {k.split('.')[1] for k, p in cnn.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        return learnt

    for _ in range(2): assert learn() == {'layer2', 'layer3', 'layer4'} and agrees()
    cnn.body.layer2.requires_grad_(False)
    assert learn() == {'layer3', 'layer4'} and agrees()
    cnn.eval()
    with torch.no_grad(): assert agrees()


def test_half_precision_is_autocasts(cnn, x):
    "A copy in bf16 under autocast, bit for bit what autocast makes of the folded network; each precision keeps its own."
    cnn, x = cnn.float().requires_grad_(False), x.float()
    cnn.frozen = True
    with torch.autocast('cpu', torch.bfloat16):
        with torch.no_grad(): want = join_features(fold_norms(cnn.body)(x.contiguous(memory_format=torch.channels_last)))
        for _ in range(2):
            got, kept = cnn(x), cnn.folded()
            assert got.dtype == torch.bfloat16 and torch.equal(got, want) and cnn.folded() is kept
            with torch.autocast('cpu', enabled=False): torch.testing.assert_close(cnn(x), plain(cnn)(x), rtol=1e-3, atol=1e-3)
    assert {m.weight.dtype for m in kept.modules() if isinstance(m, torch.nn.Conv2d)} == {torch.bfloat16}


@pytest.mark.parametrize('mode', [True, False])
def test_eval_mode_gives_the_mode_back_whatever_happens(mode):
    asked = torch.nn.Dropout().train(mode)
    with eval_mode(asked) as same: assert same is asked and not asked.training
    with pytest.raises(KeyError), eval_mode(asked): raise KeyError('in the middle')
    assert asked.training == mode


@pytest.mark.parametrize('name', ['convnext_atto', 'ghostnet_050', 'vgg11', 'xcit_nano_12_p8_224', 'tresnet_m', 'nextvit_small'])
def test_a_file_of_timm_fits_under_the_names_of_its_wrapper(name, tmp_path):
    "`stages_0.` for `stages.0.`, `model.patch_embed` for `patch_embed`, `body_conv1.` for `body.conv1.`, norms that count batches."
    with torch.device('meta'): named = timm.create_model(name).state_dict()
    theirs = {k: torch.rand(v.shape).to(v.dtype) for k, v in named.items() if not k.startswith(('head.', 'pre_logits.'))}
    save_file(theirs, tmp_path / 'theirs.safetensors')
    body = build_backbone(name, str(tmp_path / 'theirs.safetensors')).body.state_dict()
    # nothing but the wrapper's dots
    by_letters = {k.replace('.', '_'): v for k, v in theirs.items()}
    assert all(torch.equal(v, by_letters[k.removeprefix('model.').replace('.', '_')]) for k, v in body.items())


def test_a_cnn_that_is_cut_takes_the_whole_ones_file_and_nothing_unknown(tmp_path):
    whole = Backbone('resnet18').body.state_dict()
    torch.save({f'module.{k}': v for k, v in whole.items()}, path := tmp_path / 'whole.pth')
    early = build_backbone('resnet18', str(path), ['layer3']).body.state_dict()
    assert len(early) < len(whole) and all(torch.equal(v, whole[k]) for k, v in early.items())
    for before in ('', 'backbone.', 'backbone.0.body.'):
        torch.save({before + k: v for k, v in whole.items()} | {before + 'layer4.9.conv1.weight': torch.zeros(1)}, path)
        with pytest.raises(ValueError, match=r'unknown .*layer4\.9\.conv1\.weight'): build_backbone('resnet18', str(path), ['layer3'])


DETECTORS = {  # project -> what stands before the CNN's names, names of other parts
    'one-shot': ('backbone.0.body.', ['backbone.1.row_embed.weight', 'feature_norm.mean', 'patch_norm.std', 'compare.0.weight']),
    'panoptic': ('detr.backbone.0.body.', ['detr.transformer.encoder.layers.0.norm1.bias', 'bbox_attention.q.bias', 'mask_head.1.bias']),
    'Lightning': ('model.backbone.0.body.', ['model.class_embed.bias', 'criterion.empty_weight']),
    'MMDetection': ('backbone.', ['bbox_head.fc_cls.weight', 'neck.convs.0.conv.weight', 'query_embedding.weight']),
    'torchvision': ('backbone.body.', ['backbone.fpn.inner_blocks.0.0.weight', 'rpn.head.conv.0.0.weight']),
}


@pytest.mark.parametrize('project', DETECTORS)
@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto'])
def test_of_a_detectors_file_the_cnn_alone_is_taken(name, project, tmp_path):
    before, others = DETECTORS[project]
    named = Backbone(name).body.state_dict()
    theirs = {before + k: torch.rand(v.shape) for k, v in named.items()}
    torch.save({'model': theirs | {k: torch.zeros(2) for k in others}}, path := tmp_path / 'detector.pth')
    body = build_backbone(name, str(path)).body.state_dict()
    assert all(torch.equal(body[k], theirs[before + k]) for k in named)
    # a CNN that is not whole is still refused
    del theirs[before + next(iter(named))]
    torch.save({'model': theirs}, path)
    with pytest.raises(ValueError, match='1 tensors missing'): build_backbone(name, str(path))


@pytest.mark.parametrize('where, before', [('model', 'backbone.0.body.'), ('teacher', 'backbone.')])
def test_a_checkpoint_with_its_arguments_is_taken_and_any_other_object_refused(where, before, tmp_path):
    "As the reference code and DINO write it; it was refused for its `argparse.Namespace`."
    named = Backbone('resnet18').body.state_dict()
    state = {where: {before + k: v for k, v in named.items()}, 'args': argparse.Namespace(lr=1e-4), 'epoch': 3, 'optimizer': {'state': {}}}
    torch.save(state, path := tmp_path / 'checkpoint.pth')
    body = build_backbone('resnet18', str(path)).body.state_dict()
    assert all(torch.equal(body[k], v) for k, v in named.items())
    torch.save(state | {'task': pickle.PickleBuffer}, path)
    with pytest.raises(ValueError, match='holds a pickled'): build_backbone('resnet18', str(path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match='weights file .*checkpoint.pth does not exist'): build_backbone('resnet18', str(path))


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'halonet26t', 'inception_v3', 'mambaout_femto', 'sequencer2d_s'])
def test_a_network_that_makes_no_map_is_refused(name):
    "Networks for one size, for large photos alone, and with channels last."
    with pytest.raises(ValueError, match=f'{name} cannot be used: .* any size$'): Backbone(name)


@pytest.mark.parametrize('name', ['resnet18', 'resnet34', 'tf_efficientnet_lite0', 'resnet50d'])
def test_a_network_without_a_dilated_stage_says_so(name):
    with pytest.raises(ValueError, match=f"'{name}' has no dilated C5.*: only resnet50, resnet101, resnet152 have one"):
        Backbone(name, dilation=True)


@pytest.mark.parametrize('name, layer', [('resnet18', 'layer3'), ('tf_efficientnet_lite0', 'blocks.4')])
def test_features_may_be_any_iterable_and_none_of_them_is_the_last_map(name, layer):
    cnn, last = Backbone(name, (f for f in [layer])), Backbone(name)
    assert cnn.features == [layer] and cnn.num_channels == Backbone(name, (layer,)).num_channels != last.num_channels
    for empty in ([], ()):
        bodies = Backbone(name, empty).body, last.body, backbone.make_body(name, empty)
        assert len({tuple(body.state_dict()) for body in bodies}) == 1


def test_a_tag_that_timm_does_not_have_is_refused():
    for features in (None, ['layer3']):
        with pytest.raises(ValueError, match="timm does not make 'resnet18.no_such_tag'"): Backbone('resnet18.no_such_tag', features)


def test_a_network_of_your_own_that_timm_knows_by_name_alone_is_taken():
    "It has no configuration, and so ImageNet's normalisation."
    def own_network_of_this_test(pretrained=False, **options): return timm.create_model('convnext_atto', **options)

    register_model(own_network_of_this_test)
    assert timm.get_pretrained_cfg('own_network_of_this_test') is None
    cnn = Backbone('own_network_of_this_test')
    assert (cnn.mean, cnn.std, cnn.num_channels) == (backbone.IMAGENET_MEAN, backbone.IMAGENET_STD, 320)


@pytest.mark.parametrize('kind', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('given', [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_photos_come_in_the_format_of_the_weights(kind, given):
    "A photo of numpy is float64, which a convolution in float32 refuses."
    cnn, photo = Backbone('resnet18', ['layer2']).to(kind), torch.randint(256, (1, 3, 64, 64))
    ready = backbone.prepare_images(cnn, photo.to(given) if given == torch.uint8 else (photo / 255).to(given))
    want = (photo / 255 - torch.tensor(cnn.mean)[:, None, None]) / torch.tensor(cnn.std)[:, None, None]
    assert ready.dtype == kind and cnn(ready).isfinite().all()
    torch.testing.assert_close(ready.float(), want, rtol=1e-2, atol=1e-2)


def test_a_weight_of_five_dimensions_is_left_as_it_is():
    cnn = Backbone('lambda_resnet26t')
    folded, pairs = fold_pairs(cnn.body)
    assert pairs and {p.dim() for p in folded.parameters()} == {1, 4, 5}
    # the others have the layout that a whole network of maps gets
    last = dict(memory_format=torch.channels_last)
    assert all(p.is_contiguous(**last) for p in folded.parameters() if p.dim() == 4)
    torch.testing.assert_close(cnn(photo := torch.rand(1, 3, 64, 64)), join_features(cnn.body(photo)), rtol=1e-3, atol=1e-4)


def test_the_layout_of_a_folded_network_is_torchs(cnn):
    folded, _ = fold_pairs(cnn.float().body)
    theirs = copy.deepcopy(folded).to(memory_format=torch.contiguous_format).to(memory_format=torch.channels_last)
    strides = zip(folded.parameters(), theirs.parameters(), strict=True)
    assert all(a.stride() == b.stride() for a, b in strides)


@pytest.mark.parametrize('frozen', [False, True])
def test_levels_change_neither_what_a_backbone_gives_nor_what_it_learns(frozen):
    "Layers named in another order than the network's, dilated, opened twice: the same channels in the same order, the same gradients."
    cnn, x = Backbone('resnet50', ['layer4', 'layer3'], dilation=True, frozen=frozen), torch.randn(1, 3, 64, 96)
    learns = [p.requires_grad for p in cnn.parameters()]
    want, stride = cnn(x), cnn.stride
    for levels, strides in ((['layer2'], [8]), (['layer1', 'layer4'], [4, 16])):
        backbone.open_levels(cnn, levels)
        feature, maps = backbone.pyramid(cnn, x)
        for got in (cnn(x), feature): torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
        assert [x.shape[3] // m.shape[3] for m in maps] == strides and stride == 16
        assert [p.requires_grad for p in cnn.parameters()] == learns and feature.requires_grad == (not frozen)


@pytest.mark.parametrize('name, features, fixed', [
    ('resnet18', ['layer2'], {'conv1', 'layer1'}), ('tf_efficientnet_lite0', ['blocks.4'], {'conv_stem', 'blocks.0'}),
    ('convnext_atto', None, {'stem_0', 'stem_1', 'stages_0'}), ('convnext_atto', ['stages.2'], {'stem.0', 'stem.1', 'stages.0'}),
    ('pvt_v2_b0', None, {'patch_embed', 'stages_0'}), ('xcit_nano_12_p8_224', None, {'model.patch_embed', 'model.blocks.0'})])
def test_stem_and_first_stage_are_not_trained(name, features, fixed):
    cnn = Backbone(name, features, frozen=False)
    still = [k for k, p in cnn.body.named_parameters() if not p.requires_grad]
    assert all(any(k.startswith(f'{part}.') for k in still) for part in fixed)
    assert {k for k, _ in cnn.body.named_parameters() if k.startswith(tuple(f'{part}.' for part in fixed))} == set(still)
