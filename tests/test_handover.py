"Hand-over: every kind of file gives the same detector, nothing in a file is run, and a refusal changes nothing."
import argparse
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from updetr.core.checkpoint import export_weights, save_checkpoint
from updetr.model.detr import build_detr
from updetr.model.pretrained import hand_over, load_official, open_pretrained
from updetr.model.updetr import build_updetr
from updetr.tasks.finetune import finetune_config
from updetr.tasks.finetune_task import TASK
from updetr.tasks.oneshot import build_oneshot
from updetr.train.loop import Processes, train

SMALL = dict(backbone='resnet18', hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=48, pre_norm=True, num_queries=12)
ARGS = dict(lr=1e-4, lr_backbone=5e-5, batch_size=32, dilation=False, position_embedding='sine', num_patches=4, resume='', **SMALL)
SENTINEL = 12345.


@pytest.fixture(scope='module')
def updetr():
    torch.manual_seed(0)
    model = build_updetr(num_patches=4, **SMALL).eval()
    with torch.no_grad():  # no ones and zeros: every tensor counts, and the queries answer differently
        for b in model.backbone.buffers(): b.copy_(.75 + torch.rand_like(b) / 2)
        for p in model.parameters(): p.add_(.2 * torch.randn_like(p) if p.dim() == 1 else 0)
        for p in (model.query_embed.weight, model.bbox_embed.layers[-1].weight): p.mul_(4)
    return model


def official(model, **args):
    "The reference code's checkpoint of a model."
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 40)
    return {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'lr_scheduler': schedule.state_dict(), 'epoch': 59,
            'args': argparse.Namespace(**ARGS | args)}


def marked(num_classes, **options):
    "A detector that holds the sentinel everywhere."
    model = build_detr(num_classes, **options).eval()
    for t in model.state_dict().values(): t.fill_(SENTINEL)
    return model


def count(model): return [(v == SENTINEL).sum().item() for v in model.state_dict().values()]


def write(kind, path, model):
    state, config = model.state_dict(), SMALL | {'position': 'sine', 'features': '', 'task': 'pretrain'}
    if kind == 'official': torch.save(official(model), path)
    if kind == 'legacy': torch.save(official(model), path, _use_new_zipfile_serialization=False)
    if kind == 'bare': torch.save(state, path)
    if kind == 'hub': torch.save({'model': state}, path)
    if kind == 'parallel': torch.save({'model': {f'module.{k}': v for k, v in state.items()}}, path)
    if kind == 'ours': save_checkpoint(path, {'model': state, 'args': config, 'step': 3})
    if kind == 'averaged': save_checkpoint(path, {'model': {k: 0 * v for k, v in state.items()}, 'ema': state, 'args': config})
    if kind == 'shared': export_weights(path.with_suffix('.safetensors'), model, config, half=False)
    if kind == 'tensors': save_file(dict(state), path.with_suffix('.safetensors'))
    return path.with_suffix('.safetensors') if kind in ('shared', 'tensors') else path


@pytest.mark.parametrize('kind', 'official legacy bare hub parallel ours averaged shared tensors'.split())
def test_every_file_gives_the_same_detector(kind, updetr, tmp_path):
    "The detector's boxes are those of UP-DETR for its object queries alone: computed by UP-DETR's own parts."
    path = write(kind, tmp_path/'weights.pth', updetr)
    told = {'nheads': 4} if kind in ('bare', 'hub', 'parallel', 'tensors') else {}
    pretrained = open_pretrained(path, **told)
    assert pretrained.kind == 'updetr' and pretrained.classes is None and SMALL.items() <= pretrained.options.items()
    model = build_detr(5, **pretrained.options).eval()
    hand_over(model, pretrained)
    images = torch.randn(2, 3, 64, 96)
    queries = updetr.query_embed.weight.expand(2, -1, -1)
    with torch.no_grad():
        expected = updetr.heads(updetr.decode(updetr.encode(updetr.backbone(images)[0]), queries))['pred_boxes'][-1]
        torch.testing.assert_close(model(images)['pred_boxes'], expected, rtol=1e-4, atol=1e-5)
        assert expected.std(1).mean() > 1e-3, 'the queries answer alike: the comparison would see little'


class Runs:
    "Makes a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


class Sneaky(argparse.Namespace):
    "Another class than Namespace, if a subclass."


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_nothing_in_a_file_is_run(legacy, updetr, tmp_path):
    made, path = tmp_path/'made', tmp_path/'weights.pth'
    state = updetr.state_dict()
    for name, content in [('mkdir', {'model': state, 'args': Runs(made)}), ('mkdir', {'args': argparse.Namespace(x=Runs(made))}),
                          ('Sneaky', {'model': state, 'args': Sneaky(lr=1)}), ('UPDETR', {'model': updetr})]:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        for read in (load_official, open_pretrained):
            with pytest.raises(ValueError, match=name) as e: read(path)
            assert 'weights.pth' in str(e.value) and 'could run code' in str(e.value)
    assert not made.exists()


def test_bad_files(updetr, tmp_path):
    path = tmp_path/'weights.pth'
    with pytest.raises(FileNotFoundError, match='weights.pth'): open_pretrained(path)
    state, whole = updetr.state_dict(), official(updetr)
    less = {k: v for k, v in state.items() if k != 'query_embed.weight'}
    foreign = {f'net.{k}': v for k, v in less.items()}
    for content, why in [(5, 'not a dictionary'), ({}, 'no state dict'), ({'model': {'w': 1}}, 'no state dict'),
                         (less, 'query_embed.weight'), (foreign, 'none of DETR.*net.backbone'),
                         (state | {'more.bias': torch.zeros(1)}, '1 of its'),
                         (official(updetr, pre_norm=False), 'pre_norm is True by its tensors'),
                         (official(updetr, hidden_dim=64), 'hidden_dim is 32'), (official(updetr, backbone='resnet34'), 'backbone'),
                         (official(updetr, position_embedding='v3'), 'learned'), (official(updetr, seed={1, 2}), 'seed')]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=why) as e: open_pretrained(path)
        assert 'weights.pth' in str(e.value)
    for suffix, save in (('.pth', torch.save), ('.safetensors', save_file)):
        save(dict(state) if save is save_file else whole, path.with_suffix(suffix))
        data = path.with_suffix(suffix).read_bytes()
        for part in (data[:-500], data[:100], b''):
            path.with_suffix(suffix).write_bytes(part)
            with pytest.raises(ValueError, match=f'weights{suffix} cannot be read'): open_pretrained(path.with_suffix(suffix))


@pytest.mark.parametrize('place', ['model', 'state_dict'])
@pytest.mark.parametrize('made', [dict, argparse.Namespace])
def test_arguments_beside_the_tensors_are_read(place, made, updetr, tmp_path):
    "Also beside a `state_dict`: what they say was not taken from them, but from the published models."
    args = made(**ARGS, frozen_weights=None, betas=(.9, .99))
    torch.save({place: updetr.state_dict(), 'args': args}, tmp_path/'weights.pth')
    found = open_pretrained(tmp_path/'weights.pth', pos_in_input=False)
    assert (found.options['nheads'], found.args['betas'], found.assumed) == (4, (.9, .99), ())


def test_a_cnn_with_a_resnets_names_can_be_told(tmp_path):
    "timm's wide ResNet-50 has the names of the narrow one: who says so, the file or the caller, is believed; both must say the same."
    options = SMALL | {'backbone': 'wide_resnet50_2'}
    state = build_detr(3, **options).state_dict()
    torch.save(state, bare := tmp_path/'bare.pth')
    torch.save({'model': state, 'args': argparse.Namespace(**ARGS | options)}, said := tmp_path/'said.pth')
    for path, told in ((bare, dict(backbone='wide_resnet50_2', nheads=4)), (said, {})):
        assert open_pretrained(path, **told).options['backbone'] == 'wide_resnet50_2'
    with pytest.raises(ValueError, match="is 'wide_resnet50_2' by its arguments"): open_pretrained(said, backbone='wide_resnet101_2')
    # five blocks are no ResNet's: it has to be told
    torch.save({k: v for k, v in state.items() if 'layer3.5.' not in k}, bare)
    with pytest.raises(ValueError, match='bare.pth: its CNN is none of'): open_pretrained(bare, nheads=4)


@pytest.mark.parametrize('lie', [dict(class_names=5), dict(class_names='abc'), dict(class_names=[1, 2, 3]), dict(features=5),
                                 dict(features={}), dict(position_embedding=['v2']), dict(pos_in_input=1)], ids=str)
def test_values_of_another_kind_are_refused(lie, tmp_path):
    "A number for a list of names ended in a TypeError that did not name the file; a text was taken for the names of three classes."
    state = build_detr(3, **SMALL).state_dict()
    for args, more in ((ARGS | lie, {}), (ARGS, lie)) if 'class_names' in lie else ((ARGS | lie, {}),):
        save_checkpoint(tmp_path/'liar.pth', {'model': state, 'args': args} | more)
        with pytest.raises(ValueError, match=f'liar.pth.*{[*lie][0].split("_emb")[0]}'): open_pretrained(tmp_path/'liar.pth')


def test_counts_of_batches_are_left_out(updetr, tmp_path):
    "Norms that were not frozen have them"
    counted = updetr.state_dict() | {'backbone.0.body.bn1.num_batches_tracked': torch.tensor(7)}
    torch.save(official(updetr) | {'model': counted}, tmp_path/'weights.pth')
    assert open_pretrained(tmp_path/'weights.pth').weights.keys() == updetr.state_dict().keys()


@pytest.fixture
def pretrained(updetr, tmp_path):
    torch.save(official(updetr), tmp_path/'weights.pth')
    return open_pretrained(tmp_path/'weights.pth')


@pytest.mark.parametrize('change, why', [
    ({'pre_norm': False}, 'norm placement'), ({'hidden_dim': 64}, 'width'), ({'nheads': 8}, 'heads'), ({'enc_layers': 2}, 'encoder layers'),
    ({'dec_layers': 1}, 'decoder layers'), ({'dim_feedforward': 64}, 'feed-forward'), ({'backbone': 'resnet34'}, 'CNN'),
    ({'position': 'learned'}, 'position'), ({'standardize': True}, 'statistics'), ({'pos_in_input': True}, 'input'),
    ({'num_queries': 9}, '12 object queries, the model 9'), ({'features': ['layer3']}, 'input_proj.weight')],
    ids=lambda c: next(iter(c)) if isinstance(c, dict) else '')
def test_a_refusal_changes_nothing(change, why, pretrained):
    model = marked(5, **pretrained.options | change)
    with pytest.raises(ValueError, match=why) as e: hand_over(model, pretrained)
    assert 'weights.pth' in str(e.value)
    assert sum(count(model)) == sum(v.numel() for v in model.state_dict().values())


def test_damaged_weights_change_nothing(pretrained):
    for name, damage in (('bbox_embed.layers.2.bias', lambda w: w * torch.nan), ('input_proj.bias', lambda w: w[:-1])):
        weights = pretrained.weights | {name: damage(pretrained.weights[name])}
        model = marked(5, **pretrained.options)
        with pytest.raises(ValueError, match=name): hand_over(model, replace(pretrained, weights=weights))
        # so does a tensor that the model does not have
        more = replace(pretrained, weights=pretrained.weights | {f'{name}.more': torch.zeros(1)})
        with pytest.raises(ValueError, match=f'1 tensors unknown to the model, such as {name}.more'): hand_over(model, more)
        assert sum(count(model)) == sum(v.numel() for v in model.state_dict().values())


@pytest.mark.parametrize('N', [12, 7, 30])
def test_report_counts_what_was_copied(N, updetr, pretrained):
    "Loaded numbers are no sentinels any more, fresh ones still are; what the file had is loaded or dropped."
    model = marked(5, **pretrained.options | {'num_queries': N})
    report = hand_over(model, pretrained, num_queries=N)
    left = count(model)
    sizes = [v.numel() for v in model.state_dict().values()]
    assert report.total('fresh') == (sum(n == size for n, size in zip(left, sizes)), sum(left))
    assert report.total('loaded') == (sum(n < size for n, size in zip(left, sizes)), sum(sizes) - sum(left))
    file = updetr.state_dict().values()
    assert report.total('loaded', 'dropped') == (len(file), sum(v.numel() for v in file))
    assert torch.equal(model.query_embed.weight[:min(N, 12)], updetr.query_embed.weight[:N])
    assert str(report).count('\n') == len(report.parts) + 2


def test_fresh_queries_may_be_of_any_number(updetr, pretrained):
    model = marked(5, **pretrained.options | {'num_queries': 30})
    report = hand_over(model, pretrained, fresh_queries=True)
    assert (model.query_embed.weight == SENTINEL).all() and torch.equal(model.input_proj.bias, updetr.input_proj.bias)
    assert report.total('loaded', 'dropped')[0] == len(updetr.state_dict())


def test_a_comparison_goes_over_and_a_detector_drops_it(tmp_path):
    "A one-shot file's trained comparison stays: only a pre-training has none. A detector takes the rest."
    trained, fresh = (build_oneshot(**SMALL, compare=True) for _ in range(2))
    state = trained.state_dict()
    torch.save({'model': state, 'args': argparse.Namespace(**ARGS)}, tmp_path/'oneshot.pth')
    found = open_pretrained(tmp_path/'oneshot.pth')
    assert not torch.equal(fresh.compare.embed[1].weight, trained.compare.embed[1].weight)
    assert hand_over(fresh, found).total('fresh') == (0, 0)
    assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())
    report = hand_over(model := marked(5, **found.options), found)
    assert torch.equal(model.input_proj.bias, trained.input_proj.bias) and report.total('loaded', 'dropped')[0] == len(state)


def test_class_head_needs_the_same_names(tmp_path):
    cats = build_detr(3, **SMALL | {'pre_norm': False})
    torch.save({'model': cats.state_dict(), 'args': argparse.Namespace(**ARGS | {'pre_norm': False})}, tmp_path/'detr.pth')
    names = ['cat', 'dog', 'cow']
    unnamed, named = open_pretrained(tmp_path/'detr.pth'), open_pretrained(tmp_path/'detr.pth', classes=names)
    for pretrained, classes, taken in ((named, names, True), (named, names[::-1], False), (named, None, False), (unnamed, names, False),
                                       (replace(named, kind='updetr'), names, False)):
        model = marked(3, **pretrained.options)
        report = hand_over(model, pretrained, classes=classes)
        assert (sum(count(model)) == 0) == taken == (report.total('fresh') == (0, 0))
        assert torch.equal(model.class_embed.bias, cats.class_embed.bias) == taken
    with pytest.raises(ValueError, match='2 names'): hand_over(build_detr(3, **named.options), named, classes=names[:2])
    with pytest.raises(ValueError, match='3 classes'): open_pretrained(tmp_path/'detr.pth', classes=names[:2])


def test_standardize_goes_over(tmp_path):
    up = build_updetr(num_patches=4, standardize=True, **SMALL)
    up.feature_norm.fit(torch.randn(2, 512, 3, 3) * 7)
    torch.save(official(up), tmp_path/'weights.pth')
    pretrained = open_pretrained(tmp_path/'weights.pth')
    model = build_detr(3, **pretrained.options)
    hand_over(model, pretrained)
    assert torch.equal(model.feature_norm.std, up.feature_norm.std) and model.feature_norm.std.min() > 1
    with pytest.raises(ValueError, match='standardize'): hand_over(build_detr(3, **SMALL), pretrained)


def test_panoptic_files_are_taken_apart_on_request(tmp_path):
    detector = build_detr(250, **SMALL)
    masks = {'mask_head.lay1.bias': torch.zeros(8), 'bbox_attention.q_linear.bias': torch.zeros(3)}
    state = {f'detr.{k}': v for k, v in detector.state_dict().items()} | masks
    torch.save({'model': state, 'args': argparse.Namespace(**ARGS)}, tmp_path/'panoptic.pth')
    with pytest.raises(ValueError, match='panoptic.*detector_part=True'): open_pretrained(tmp_path/'panoptic.pth')
    # so is one that stood in a module around it
    torch.save({f'module.{k}': v for k, v in state.items()}, tmp_path/'wrapped.pth')
    wrapped = open_pretrained(tmp_path/'wrapped.pth', detector_part=True, nheads=4)
    assert wrapped.weights.keys() == {*masks, *detector.state_dict()}
    pretrained = open_pretrained(tmp_path/'panoptic.pth', detector_part=True)
    report = hand_over(model := marked(5, **pretrained.options), pretrained)
    assert report.total('loaded', 'dropped')[0] == len(state) and pretrained.num_classes == 250
    assert torch.equal(model.bbox_embed.layers[2].weight, detector.bbox_embed.layers[2].weight)


def test_dilation_that_differs_is_noted(tmp_path):
    options = SMALL | {'backbone': 'resnet50'}
    torch.save(build_detr(2, **options).state_dict(), tmp_path/'bare.pth')
    for dilation, noted in ((False, True), (True, False)):
        pretrained = open_pretrained(tmp_path/'bare.pth', nheads=4, dilation=dilation)
        assert bool(hand_over(build_detr(2, **options, dilation=True), pretrained).notes) == noted
    # what was assumed was spoken of when the file was opened
    assert not hand_over(build_detr(2, **options, dilation=True), open_pretrained(tmp_path/'bare.pth', nheads=4)).notes


def test_what_nobody_said_is_asked_of_the_caller_only_then(updetr, tmp_path, capsys):
    "Not where the file or the caller says it; and a name that says DC5, in any case, is spoken of."
    torch.save(official(updetr), tmp_path/'said.pth')
    torch.save(updetr.state_dict(), tmp_path/'R50-DC5.pth')
    asked = {'nheads': 2, 'hidden_dim': 64, 'pos_in_input': True}
    said = open_pretrained(tmp_path/'said.pth', otherwise=asked)
    assert (said.options['nheads'], said.options['pos_in_input'], said.assumed) == (4, True, ())
    capsys.readouterr()
    bare = open_pretrained(tmp_path/'R50-DC5.pth', otherwise=asked, nheads=4)
    assert [bare.options[k] for k in ('nheads', 'hidden_dim', 'pos_in_input')] == [4, 32, True] and bare.assumed == ('dilation',)
    assert 'ITS NAME SAYS DC5' in capsys.readouterr().out
    open_pretrained(tmp_path/'R50-DC5.pth', nheads=4, dilation=False)
    assert 'DC5' not in capsys.readouterr().out.replace('R50-DC5.pth', '')


def test_a_published_file_starts_a_run(updetr, tmp_path):
    "A file of the reference code, read by the fine-tuning task: its sizes, its weights, two steps of training, both optimizer groups."
    torch.save(official(updetr), tmp_path/'published.pth')
    cfg = finetune_config('voc150', pretrain=str(tmp_path/'published.pth'), scenes=4, scenes_val=2, scene_size=64, val_size=64,
                          batch_size=2, epochs=1, lr_drop=1, eval_every=0, num_workers=0, log_every=1)
    assert (cfg.backbone, cfg.hidden_dim, cfg.dec_layers, cfg.num_queries, cfg.pre_norm) == ('resnet18', 32, 2, 12, True)
    (run := tmp_path/'run').mkdir()
    task = TASK[1](cfg, run, Processes())
    theirs, mine = updetr.state_dict(), task.model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items() if not k.startswith('class_embed'))
    state = train(task, cfg, run, Processes())
    moved = {k for k, v in state.model.state_dict().items() if not torch.equal(v, theirs.get(k, v))}
    assert state.step == 2 and {'query_embed.weight', 'backbone.0.body.layer2.0.conv1.weight'} <= moved
    assert not any(k.startswith(('backbone.0.body.conv1', 'backbone.0.body.layer1', 'backbone.0.body.bn1')) for k in moved)
