"Files of weights from elsewhere, and files whose configuration lies: recognised, named, refused before anything is built."
import argparse
import dataclasses
import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from updetr.core.checkpoint import read_weights, save_checkpoint
from updetr.core.config import make_config, model_options
from updetr.core.shipped import shipped
from updetr.data.transforms import whole_view
from updetr.model.backbone import cnn_numbers
from updetr.model.detr import build_detr
from updetr.model.pretrained import foreign_weights, open_pretrained
from updetr.model.updetr import build_updetr
from updetr.model.weights import load_updetr
from updetr.predict.commands import evaluate, open_model
from updetr.predict.detector import Detector, check_device, load_detector
from updetr.predict.export import open_huggingface, save_huggingface, to_huggingface
from updetr.predict.localizer import QueryPatchLocalizer, load_localizer
from updetr.predict.oneshot_detector import OneShotDetector, load_oneshot
from updetr.predict.segmenter import PanopticSegmenter, load_segmenter
from updetr.tasks.finetune import finetune_config
from updetr.tasks.finetune_task import build_module
from updetr.tasks.oneshot import build_oneshot, oneshot_config
from updetr.tasks.panoptic_task import build_panoptic, panoptic_config

SMALL = dict(backbone='resnet18', weights='none', features='layer1', hidden_dim=32, nheads=4, enc_layers=1, dec_layers=1,
             dim_feedforward=16, num_queries=6, pos_in_input=False, standardize=False)
BARE = {k: v for k, v in SMALL.items() if k not in ('weights', 'features')}
NAMES = ['ant', 'bee', 'cat']
unread = pytest.mark.usefixtures('weights_do_not_matter')  # but shapes and names


def _own(kind):
    "(state, loaders) of a file of this kit"
    if kind == 'pretrain':
        cfg = make_config('demo', **SMALL, num_patches=3)
        state, more = build_updetr(**model_options(cfg) | {'matching_init': False}).state_dict(), {}
    elif kind == 'finetune':
        cfg = finetune_config('demo', **SMALL, square=64)
        state, more = build_module(cfg, 3).model.state_dict(), {'class_names': NAMES}
    elif kind == 'oneshot':
        cfg = oneshot_config('demo', **SMALL, square=64)
        state, more = build_oneshot(**model_options(cfg)).state_dict(), {}
    else:
        boxes = panoptic_config('demo', **SMALL | dict(features=''), square=64, cached_views=0)
        cfg = dataclasses.replace(boxes, stage='masks', pretrain='boxes.pth')
        state, more = build_panoptic(cfg, 3).model.state_dict(), {'class_names': NAMES, 'isthing': [True, True, False]}
    return {'model': state, 'args': dataclasses.asdict(cfg)} | more


LOADERS = {'pretrain': (load_updetr, load_oneshot, load_localizer, open_pretrained), 'finetune': (load_detector, open_pretrained),
           'oneshot': (load_oneshot, load_localizer), 'panoptic': (load_segmenter,)}
FILES = {}


def _file(kind):
    if kind not in FILES: FILES[kind] = _own(kind)
    return FILES[kind]


def _refused(loader, path):
    "ValueError that names the file, or nothing is wrong with it"
    try: loader(path)
    except ValueError as e:
        assert path.name in str(e), e
        return str(e)


LIES = [dict(enc_layers=10**9), dict(dec_layers=10**9), dict(hidden_dim=4 * 10**7), dict(dec_layers=90), dict(hidden_dim=4096),
        dict(dim_feedforward=10**7), dict(num_queries=10**9),
        dict(nheads=0), dict(nheads=-4), dict(nheads=5), dict(nheads='4'), dict(backbone='no_such_cnn'),
        dict(features=[1]), dict(pre_norm='yes'), dict(hidden_dim=float('nan')), dict(dilation=3)]


@pytest.mark.parametrize('kind', LOADERS)
@pytest.mark.parametrize('lie', LIES, ids=str)
def test_a_configuration_that_lies_is_refused_before_anything_is_built(tmp_path, kind, lie):
    state = _file(kind)
    save_checkpoint(path := tmp_path / 'liar.pth', state | {'args': state['args'] | lie})
    for loader in LOADERS[kind]: assert _refused(loader, path), loader


class NothingBig(TorchDispatchMode):
    """Whoever makes a tensor of more than ten million numbers, other than one without memory, is stopped."""
    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for t in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(t, torch.Tensor) and t.device.type != 'meta': assert t.numel() < 10**7, f'{func} made {tuple(t.shape)}'
        return made


@pytest.mark.parametrize('features', ['', 's3'])
@pytest.mark.parametrize('kind', [*LOADERS, 'another detector'])
def test_a_giant_cnn_is_refused_before_it_is_made(tmp_path, kind, features):
    """1.3 thousand million numbers are named, by a file of less than one: whole, and cut after a stage."""
    if kind == 'another detector':
        cfg = finetune_config('demo', detector='fcos', **SMALL | dict(channels=32, cached_views=0, square=64))
        state = {'model': build_module(cfg, 3).state_dict(), 'args': dataclasses.asdict(cfg), 'class_names': NAMES}
    else: state = _file(kind)
    loaders = LOADERS.get(kind, (load_detector,))
    lie = dict(backbone='regnety_2560', features=features)
    save_checkpoint(path := tmp_path / 'liar.pth', state | {'args': state['args'] | lie})
    cnn_numbers.cache_clear()
    with NothingBig():
        for loader in loaders:
            said = _refused(loader, path)
            assert 'contradicts itself' in said and 'regnety_2560' in said, said


@pytest.mark.parametrize('kind', LOADERS)
def test_the_truth_is_opened(tmp_path, kind):
    save_checkpoint(path := tmp_path / 'true.pth', _file(kind))
    for loader in LOADERS[kind]: loader(path)


@pytest.mark.parametrize('more', [
    {'class_names': None}, {'class_names': []}, {'class_names': NAMES[:2]}, {'class_names': [1, 2, 3]}, {'class_names': 'abc'},
    {'square': -64}, {'val_size': -5}, {'square': 10**7}, {'detector': 'frcnn'}], ids=str)
def test_classes_and_sizes_are_checked(tmp_path, more):
    state = _file('finetune')
    stored = {k: v for k, v in more.items() if k == 'class_names'}
    args = state['args'] | {k: v for k, v in more.items() if k not in stored}
    save_checkpoint(path := tmp_path / 'liar.pth', state | stored | {'args': args})
    assert _refused(load_detector, path)


@pytest.mark.parametrize('isthing', [None, [True], ['a', 'b', 'c'], 3])
def test_things_are_checked(tmp_path, isthing):
    save_checkpoint(path := tmp_path / 'liar.pth', _file('panoptic') | {'isthing': isthing})
    assert 'isthing' in _refused(load_segmenter, path)


ANY = st.none() | st.booleans() | st.integers(-10**12, 10**12) | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(sorted(LOADERS)), st.data())
def test_any_field_may_be_anything(tmp_path_factory, kind, data):
    "Opened, or one ValueError that names the file: nothing else, for every field of the configuration"
    state = _file(kind)
    field = data.draw(st.sampled_from([*(k for k in state['args'] if k != 'backbone'), 'class_names']))
    value = data.draw(ANY)
    lie = {field: value} if field == 'class_names' else {'args': state['args'] | {field: value}}
    save_checkpoint(path := tmp_path_factory.getbasetemp() / 'any.pth', state | lie)
    for loader in LOADERS[kind]: _refused(loader, path)


def _detr(**options): return build_detr(3, **BARE | options)


@unread
def test_what_tensors_do_not_show_is_said_and_can_be_told(tmp_path, capsys):
    torch.save({'model': _detr(backbone='resnet50', dilation=True).state_dict()}, path := tmp_path / 'detr-r50-dc5.pth')
    told = dict(dilation=True, nheads=4)
    assert Detector.from_checkpoint(path, **told).module.model.backbone[0].stride == 16
    assert 'dilation=' not in capsys.readouterr().out
    assert Detector.from_checkpoint(path, nheads=4).module.model.backbone[0].stride == 32
    said = capsys.readouterr().out
    assert 'dilation=False' in said and 'DC5' in said and 'nheads' not in said
    for loader in (load_detector, open_pretrained):
        with pytest.raises(ValueError, match='contradicts'): loader(path, dilation=True, pre_norm=False)


@unread
def test_dilation_can_be_told_wherever_a_checkpoint_is_opened(tmp_path):
    model = build_updetr(**BARE | dict(backbone='resnet50', dilation=True), num_patches=2)
    torch.save({'model': model.state_dict()}, path := tmp_path / 'up.pth')
    told = dict(dilation=True, nheads=4)
    assert OneShotDetector.from_checkpoint(path, **told).cnn.stride == 16
    for maker in (QueryPatchLocalizer.from_checkpoint, QueryPatchLocalizer.untrained):
        opened = maker(path, num_patches=2, **told)
        assert opened.cnn.stride == 16 and opened.model.num_patches == 2
    torch.save({'model': model.state_dict(), 'args': argparse.Namespace(num_patches=2, nheads=4)}, path)
    assert QueryPatchLocalizer.from_checkpoint(path, dilation=True).cnn.stride == 16
    cfg = finetune_config('voc150', pretrain=str(path), dilation=True, weights='none')
    assert cfg.dilation and cfg.nheads == 4


def test_a_run_starts_from_bare_tensors_with_the_heads_it_was_told(tmp_path):
    torch.save(_detr().state_dict(), path := tmp_path / 'bare.pth')
    cfg = finetune_config('voc150', pretrain=str(path), nheads=4)
    assert cfg.nheads == 4 and open_pretrained(path, otherwise=vars(cfg)).options['nheads'] == 4


def test_a_panoptic_file_can_be_told_that_it_is_dilated(tmp_path):
    state = _file('panoptic')['model']
    torch.save(state, path := tmp_path / 'bare.pth')
    with pytest.raises(ValueError, match='BasicBlock|built'): PanopticSegmenter.from_checkpoint(path, dilation=True)
    assert PanopticSegmenter.from_checkpoint(path).model.detr.backbone[0].stride == 32


def test_a_panoptic_file_of_other_classes_than_cocos_can_say_its_things(tmp_path, capsys):
    "Its 3 classes were taken for COCO's ids without a word: class 0 for none, so that it was never answered, the others for things."
    torch.save(_file('panoptic')['model'], path := tmp_path / 'bare.pth')
    assert PanopticSegmenter.from_checkpoint(path).isthing == [None, True, True]
    assert "its 3 classes are taken for COCO's ids" in capsys.readouterr().out
    told = PanopticSegmenter.from_checkpoint(path, isthing=np.array([True, True, False]))
    assert told.isthing == [True, True, False] and 'COCO' not in capsys.readouterr().out and told.category_ids == (0, 1, 2)
    said = _refused(lambda path: load_segmenter(path, isthing=[True]), path)
    assert 'has 3 classes, but isthing has 1' in said
    save_checkpoint(path, _file('panoptic'))
    assert 'says itself' in _refused(lambda path: load_segmenter(path, isthing=[True, True, False]), path)


@unread
@pytest.mark.parametrize('kind', ['bare', 'Namespace', 'dict', 'DataParallel'])
def test_the_commands_know_a_published_panoptic_file(tmp_path, kind):
    "It has no task, or no arguments: its mask head shows what it is. What says its task is that, whatever its tensors are called."
    state = _file('panoptic')['model']
    content = {'bare': state, 'Namespace': {'model': state, 'args': argparse.Namespace(nheads=4)}, 'dict': {'model': state, 'args': {}},
               'DataParallel': {'model': {f'module.{k}': v for k, v in state.items()}, 'args': {}}}
    torch.save(content[kind], path := tmp_path / 'published.pth')
    assert isinstance(open_model(path), PanopticSegmenter)
    with pytest.raises(ValueError, match='segments do not overlap'): open_model(path, nms=.5)
    with pytest.raises(ValueError, match='published.pth is a segmenter'): evaluate(path, tmp_path, tmp_path / 'out')
    torch.save({'model': state, 'args': {'task': 'finetune'}}, path)
    with pytest.raises(ValueError, match='published.pth has no list of the names of its classes'): open_model(path)  # `Detector` refuses it


@unread
@pytest.mark.parametrize('m', [2, 3, 4, 0, '2'])
def test_the_patches_of_an_official_namespace_are_read(tmp_path, m):
    model = build_updetr(**BARE, num_patches=2)
    torch.save({'model': model.state_dict(), 'args': argparse.Namespace(num_patches=m, nheads=4)}, path := tmp_path / 'up.pth')
    if m in (2, 3): assert load_localizer(path)[0].num_patches == m
    else: assert 'num_patches' in _refused(load_localizer, path)


SEEN = [(480, 640, (450, 600)), (600, 600, (480, 480)), (300, 2000, (90, 600))]


@unread
def test_a_pretrained_model_sees_photos_as_in_its_evaluation(tmp_path):
    "Short side 480, long side at most 600 (Section 4), for files of the reference and for runs on whole photos"
    model = build_updetr(**BARE, num_patches=2)
    torch.save({'model': model.state_dict(), 'args': argparse.Namespace(num_patches=2, nheads=4)}, path := tmp_path / 'up.pth')
    whole = make_config('paper', **SMALL | dict(features=''), num_patches=2)
    save_checkpoint(own := tmp_path / 'own.pth', {'model': model.state_dict(), 'args': dataclasses.asdict(whole)})
    for file in (path, own):
        localizer = QueryPatchLocalizer.from_checkpoint(file)
        assert OneShotDetector.from_checkpoint(file).sizes == localizer.sizes and not localizer.square
        for height, width, seen in SEEN:
            _, (h, w) = localizer.encode(torch.zeros(3, height, width, dtype=torch.uint8))
            assert (h, w) == tuple(-(-side // localizer.cnn.stride) for side in seen)
            assert whole_view(height, width, localizer.sizes).size == seen


TRANSFORMERS = ['model.backbone.conv_encoder.model.conv1.weight', 'class_labels_classifier.weight', 'bbox_predictor.layers.0.weight']
ELSEWHERE = {
    'from_huggingface': TRANSFORMERS,
    'MMDetection': ['backbone.conv1.weight', 'neck.convs.0.conv.weight', 'encoder.layers.0.self_attn.attn.in_proj_weight',
                    'bbox_head.fc_cls.weight'],
    'Ultralytics': ['model.model.0.conv.weight', 'model.model.0.bn.weight'],
    'Detectron2': ['backbone.bottom_up.stem.conv1.weight', 'proposal_generator.rpn_head.conv.weight',
                   'roi_heads.box_predictor.cls_score.weight'],
    'updetr.model.baselines': ['backbone.body.conv1.weight', 'rpn.head.conv.0.0.weight', 'roi_heads.box_head.fc6.weight'],
    "torchvision's detection": ['model.backbone.cnn.body.conv1.weight', 'model.backbone.fpn.inner_blocks.0.0.weight',
                                'model.rpn.head.conv.0.0.weight'],
    'updetr.model.baselines builds': ['backbone.body.conv1.weight', 'head.classification_head.conv.0.weight'],
    'another network than DETR': ['model.backbone.cnn.body.conv1.weight', 'model.head.regression_head.conv.0.weight'],
    'MMDetection: no function': ['backbone.conv1.weight', 'neck.lateral_convs.0.conv.weight', 'rpn_head.rpn_conv.weight',
                                 'roi_head.bbox_head.fc_cls.weight'],
    'Deformable DETR': ['transformer.level_embed', 'transformer.encoder.layers.0.self_attn.sampling_offsets.weight',
                        'query_embed.weight'],
    'weights=FILE': ['conv1.weight', 'bn1.weight', 'layer1.0.conv1.weight', 'fc.weight']}


@pytest.mark.parametrize('way', ELSEWHERE)
def test_weights_of_other_projects_are_recognised(tmp_path, way):
    state = {name: torch.zeros(2, 2) for name in ELSEWHERE[way]}
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'wrapped.pth')
    torch.save(state, tmp_path / 'bare.pth')
    save_file(state, tmp_path / 'bare.safetensors')
    for name in ('wrapped.pth', 'bare.pth', 'bare.safetensors'):
        for loader in (load_detector, load_segmenter, load_oneshot, load_localizer, open_pretrained):
            assert way in _refused(loader, tmp_path / name), (name, loader)


@unread
def test_a_baseline_of_this_kit_is_no_detr_but_a_detector(tmp_path):
    "Its folder of a run, its file and its bare tensors had been called Hugging Face's."
    options = SMALL | dict(features='layer2,layer3,layer4', square=64, cached_views=0, pretrain='')
    cfg = finetune_config('demo', **options, detector='fcos', channels=32)
    state = build_module(cfg, 3).state_dict()
    save_checkpoint(path := tmp_path / 'fcos.pth', {'model': state, 'args': dataclasses.asdict(cfg), 'class_names': NAMES})
    said = _refused(open_pretrained, path)
    assert "is of the detector 'fcos', not a DETR" in said and 'Detector.from_checkpoint' in said
    assert Detector.from_checkpoint(path).classes == tuple(NAMES)
    assert "torchvision's detection" in foreign_weights(state)


@unread
@pytest.mark.parametrize('features', ['layer1', ('layer1',), ['layer1']], ids=str)
def test_layers_may_be_told_in_any_form(tmp_path, features):
    save_checkpoint(path := tmp_path / 'own.pth', _file('finetune'))
    assert open_pretrained(path, features=features).options['features'] == ['layer1']
    assert load_detector(path, features=features)[1].features == 'layer1'
    for loader in (open_pretrained, load_detector):
        with pytest.raises(ValueError, match='layer2'): loader(path, features='layer1,layer2')
    torch.save(_file('finetune')['model'], bare := tmp_path / 'bare.pth')
    assert open_pretrained(bare, backbone='resnet18', features=features, nheads=4).options['features'] == ['layer1']


def test_our_own_names_are_nobody_elses():
    for kind in LOADERS: assert foreign_weights(_file(kind)['model']) is None


def test_a_transformers_folder_and_its_file_name_the_function(tmp_path):
    state, config = to_huggingface(_detr(pre_norm=False), NAMES)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='from_huggingface'): Detector.from_checkpoint(tmp_path / 'model.safetensors')
    with pytest.raises(FileNotFoundError) as refused: Detector.from_checkpoint(tmp_path)
    # what is advised opens the folder
    call = str(refused.value).rsplit('updetr.predict.export.', 1)[1]
    assert eval(call, {'open_huggingface': open_huggingface}).classes == tuple(NAMES)


def test_a_folder_made_for_sharing_is_opened_or_refused_as_its_file(tmp_path):
    "Whatever is asked to open it: the refusal of a detector is about the detector, not about a folder."
    save_checkpoint(tmp_path / 'own.pth', _file('finetune'))
    detector = Detector.from_checkpoint(tmp_path / 'own.pth')
    save_huggingface(detector, tmp_path / 'hub')
    assert json.loads((tmp_path / 'hub/config.json').read_text(encoding='utf-8'))['model_type'] == 'updetr'
    assert Detector.from_checkpoint(tmp_path / 'hub').classes == detector.classes
    for loader in (load_segmenter, load_oneshot, load_localizer):
        assert _refused(loader, tmp_path / 'hub') == _refused(loader, tmp_path / 'hub/model.safetensors')
    with pytest.raises(FileNotFoundError, match='give .*hub/model.safetensors'): read_weights(tmp_path / 'hub')


def test_a_lightning_checkpoint_is_opened(tmp_path):
    model = _detr()
    state = {f'model.{k}': v for k, v in model.state_dict().items()} | {'criterion.empty_weight': torch.ones(4)}
    torch.save({'state_dict': state, 'pytorch-lightning_version': '2.5', 'epoch': 3}, path := tmp_path / 'epoch3.ckpt')
    again = Detector.from_checkpoint(path, nheads=4).module.model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())
    torch.save({'state_dict': model.state_dict()}, path)
    Detector.from_checkpoint(path, nheads=4)


def test_a_bare_state_dict_of_a_wrapped_model_is_opened(tmp_path):
    "Its names begin with the attribute's, `model.backbone.0.`; those of transformers go on otherwise."
    model = _detr()
    torch.save({f'model.{k}': v for k, v in model.state_dict().items()}, path := tmp_path / 'wrapped.pth')
    again = Detector.from_checkpoint(path, nheads=4).module.model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())


@unread
@pytest.mark.parametrize('before', ['module.', 'model.', 'model.module.', '_orig_mod.'])
@pytest.mark.parametrize('content', ['bare', 'state_dict', 'model', 'args'])
def test_a_module_around_a_panoptic_model_takes_no_part_of_it(tmp_path, before, content):
    "The detector's own `detr.` was taken for a part of the wrapper's name, and the mask head was dropped without a word."
    state = {before + k: v for k, v in _file('panoptic')['model'].items()}
    whole = {'bare': state, 'state_dict': {'state_dict': state}, 'model': {'model': state}, 'args': {'model': state, 'args': {}}}
    torch.save(whole[content], path := tmp_path / 'wrapped.pth')
    again = PanopticSegmenter.from_checkpoint(path).model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in _file('panoptic')['model'].items())
    with pytest.raises(ValueError, match='is a panoptic model'): Detector.from_checkpoint(path, nheads=4)
    # a detector alone may have any name
    torch.save({f'{before}detr.{k}': v for k, v in _detr().state_dict().items()}, path)
    Detector.from_checkpoint(path, nheads=4)


class _Named: pass


def test_pickled_objects_name_their_owner_and_the_way_on(tmp_path, monkeypatch):
    "DETR's reference code has a package `models`, as YOLOv5 has: it is nobody else's, and neither are numbers of numpy."
    owners = {'ultralytics.nn.tasks': 'YOLO', 'models.yolo': 'YOLO', 'mmengine.logging': 'MMDetection', 'lightning.fabric': 'Lightning',
              'models.detr': None, 'mmengines': None}
    for module, words in owners.items():
        for depth in range(module.count('.') + 1):
            monkeypatch.setitem(sys.modules, module.rsplit('.', depth)[0], types.SimpleNamespace(_Named=_Named))
        monkeypatch.setattr(_Named, '__module__', module)
        torch.save({'model': _Named()}, path := tmp_path / 'their.pt')
        said = _refused(load_detector, path)
        assert words in said if words else f'a pickled {module}._Named. Only' in said
        assert 'weights_only=False' in said and 'found["model"]' in said
    torch.save({'model': {}, 'best': np.float64(1)}, path)
    assert '.scalar. Only tensors' in _refused(load_detector, path)
    (tmp_path / 'model_final.pkl').write_bytes(pickle.dumps({'model': {'a': 1}, '__author__': 'Detectron2 Model Zoo'}))
    assert 'Detectron2' in _refused(load_detector, tmp_path / 'model_final.pkl')


@pytest.mark.parametrize('device', ['cudaa', 'cuda:99', '', 3.5, 'meta'])
def test_a_device_that_is_not_there_is_named_before_the_file_is_read(device):
    for maker in (Detector, OneShotDetector, PanopticSegmenter, QueryPatchLocalizer):
        with pytest.raises(ValueError, match='device'): maker.from_checkpoint('nowhere.pth', device=device)
    assert check_device('cpu') == torch.device('cpu')


def test_a_file_does_not_choose_whose_code_runs(tmp_path, monkeypatch):
    "A detector whose configuration names somebody's module, which lies beside it: refused by name, and not imported."
    (tmp_path / 'somebodys.py').write_text('raise SystemExit("it ran")')
    monkeypatch.syspath_prepend(tmp_path)
    mine = shipped('detector')
    with safe_open(mine, 'pt') as f: config = json.loads(f.metadata()['config'])
    assert config['detector'] == 'detr'
    told = {'config': json.dumps(config | {'detector': 'somebodys:build'})}
    save_file(load_file(mine), tmp_path / 'a.safetensors', told)
    with pytest.raises(ValueError, match='somebodys:build, which is not part of this kit: import somebodys first'):
        Detector.from_checkpoint(tmp_path / 'a.safetensors')
    assert 'somebodys' not in sys.modules
    # nor do files of the other harnesses
    for name, more, opener in (('b', {'task': 'panoptic', 'stage': 'somebodys:build', 'isthing': [True] * 5}, PanopticSegmenter),
                               ('c', {'task': 'oneshot', 'system': 'somebodys:build'}, OneShotDetector)):
        save_file(load_file(mine), tmp_path / f'{name}.safetensors', {'config': json.dumps(config | more)})
        with pytest.raises(ValueError, match='somebodys:build, which is not part of this kit: import somebodys first'):
            opener.from_checkpoint(tmp_path / f'{name}.safetensors')
    assert 'somebodys' not in sys.modules
    # a detector that calls itself a system of one stage
    told = {'config': json.dumps(config | {'task': 'panoptic', 'stage': 'upsnet', 'isthing': [True, False, True, True, True]})}
    save_file(load_file(mine), tmp_path / 'd.safetensors', told)
    with pytest.raises(ValueError, match='d.safetensors'): PanopticSegmenter.from_checkpoint(tmp_path / 'd.safetensors')
