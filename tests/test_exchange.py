"Exchange with other libraries: transformers' own DETR gives the same boxes, both ways."
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.exc import UserError, UserErrorType

from updetr.core.shipped import shipped
from updetr.data.transforms import DETR_SIZES, SMALL_SIZES
from updetr.model.detr import build_detr
from updetr.model.losses import build_criterion
from updetr.predict import export
from updetr.predict.detector import Detector, picture_batch
from updetr.predict.export import export_program, from_huggingface, open_huggingface, save_huggingface, to_huggingface, to_onnx
from updetr.tasks.finetune_task import DetectStep

SMALL = dict(hidden_dim=32, nheads=4, enc_layers=2, dec_layers=3, dim_feedforward=48, num_queries=7, pre_norm=False)
NAMES = ['cat', 'dog', 'cow']


def spread_out(model):
    "Other numbers in every tensor, so that no two of them can be swapped unseen, and queries that answer differently."
    torch.manual_seed(1)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.dim() > 1: t.normal_(std=4 if 'query' in name else (2 / t[0].numel()) ** .5)
            elif t.dim(): t.copy_((.75 if name.endswith(('weight', 'var')) else 0) + torch.rand_like(t) / 2)
    return model.eval()


@pytest.fixture
def batch():
    torch.manual_seed(2)
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:], mask[1, :, 90:] = True, True
    return torch.randn(2, 3, 96, 128), mask


def same(model, theirs, batch):
    images, mask = batch
    with torch.no_grad(): ours, other = model(images, mask), theirs(images, pixel_mask=(~mask).long())
    torch.testing.assert_close(ours['pred_logits'], other.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours['pred_boxes'], other.pred_boxes, rtol=0, atol=1e-4)
    assert ours['pred_boxes'].std(1).mean() > 1e-3, 'the queries answer alike: the comparison would see little'


@pytest.mark.parametrize('options', [dict(backbone='resnet18'), dict(backbone='resnet50', dilation=True),
                                     dict(backbone='resnet18', position='learned')], ids=['resnet18', 'resnet50-dc5', 'learned'])
def test_to_transformers(options, batch, tmp_path):
    "transformers reads the folder without complaint and finds the same boxes; what it writes comes back bit for bit."
    transformers = pytest.importorskip('transformers')
    model = spread_out(build_detr(3, **SMALL | options))
    state, config = to_huggingface(model, NAMES)
    save_file(state, tmp_path/'model.safetensors', {'format': 'pt'})
    (tmp_path/'config.json').write_text(json.dumps(config))
    theirs, found = transformers.DetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert theirs.config.id2label == dict(enumerate(NAMES))
    same(model, theirs.eval(), batch)
    theirs.save_pretrained(tmp_path/'again')
    for state, config in ((theirs.state_dict(), theirs.config.to_dict()),
                          (load_file(tmp_path/'again'/'model.safetensors'), json.loads((tmp_path/'again'/'config.json').read_text()))):
        back = from_huggingface(state, config).state_dict()
        assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('cnn', ['timm', 'own-basic', 'own-bottleneck'])
def test_from_transformers(cnn, batch):
    "A model that transformers made, with timm's ResNet or its own."
    transformers = pytest.importorskip('transformers')
    own = {'model_type': 'resnet', 'embedding_size': 64, 'out_features': ['stage4']}
    backbone = {'timm': {'model_type': 'timm_backbone', 'backbone': 'resnet18', 'features_only': True, 'use_pretrained_backbone': False,
                         'out_indices': [1, 2, 3, 4]},
                'own-basic': own | {'layer_type': 'basic', 'depths': [2, 2, 2, 2], 'hidden_sizes': [64, 128, 256, 512]},
                'own-bottleneck': own | {'layer_type': 'bottleneck', 'depths': [3, 4, 6, 3], 'hidden_sizes': [256, 512, 1024, 2048]}}[cnn]
    config = transformers.DetrConfig(backbone_config=backbone, use_timm_backbone=False, d_model=32, encoder_layers=1, decoder_layers=2,
                                     encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
                                     num_queries=7, id2label=dict(enumerate(NAMES)))
    theirs = spread_out(transformers.DetrForObjectDetection(config))
    same(from_huggingface(theirs.state_dict(), config.to_dict()), theirs, batch)


@pytest.mark.parametrize('options, why', [({'pre_norm': True}, 'post-norm only'), ({'standardize': True}, 'feature_norm'),
                                          ({'pos_in_input': True}, 'pos_in_input'), ({'features': ['layer3', 'layer4']}, 'cut'),
                                          ({'backbone': 'tf_efficientnet_lite0'}, 'efficientnet')])
def test_what_transformers_cannot_compute_is_refused(options, why):
    with pytest.raises(ValueError, match=why): to_huggingface(build_detr(3, **{'backbone': 'resnet18'} | SMALL | options), NAMES)


def test_tensors_that_do_not_fit_are_refused():
    state, config = to_huggingface(build_detr(3, 'resnet18', **SMALL), NAMES)
    less = {k: v for k, v in state.items() if k != 'model.decoder.layers.1.fc1.bias'}
    more = state | {'mask_head.w': torch.zeros(1)}
    for s, c, why in [(less, {}, '1 tensors missing, such as model.decoder.layers.1.fc1.bias'), (more, {}, 'mask_head.w'),
                      (state, {'num_queries': 9}, 'query_position_embeddings'), (state, {'id2label': {'0': 'cat'}}, 'class_labels'),
                      (state, {'auxiliary_loss': True}, 'auxiliary_loss'), (state, {'decoder_attention_heads': 8}, 'heads'),
                      (state, {'activation_function': 'gelu'}, 'gelu'), (state, {'backbone': 'swin_tiny'}, 'swin_tiny')]:
        with pytest.raises(ValueError, match=why): from_huggingface(s, config | c)
    for k in ('d_model', 'decoder_ffn_dim', 'encoder_attention_heads'):
        with pytest.raises(ValueError, match=f'lacks {k}'): from_huggingface(state, {n: v for n, v in config.items() if n != k})


@pytest.mark.parametrize('frozen', [True, False], ids=['frozen', 'trainable'])
@pytest.mark.parametrize('pre_norm', [True, False], ids=['pre-norm', 'post-norm'])
def test_exported_program_finds_the_same_boxes(frozen, pre_norm):
    model = spread_out(build_detr(3, 'resnet18', frozen_backbone=frozen, **SMALL | {'pre_norm': pre_norm}))
    before, program = {k: v.clone() for k, v in model.state_dict().items()}, export_program(model, (64, 96)).module()
    for _ in range(2):  # the second photo: nothing of the first is kept
        image = torch.randn(1, 3, 64, 96)
        out, expected = program(image), model(image)
        for k in ('pred_logits', 'pred_boxes'): torch.testing.assert_close(out[k], expected[k], rtol=1e-4, atol=1e-5)
    assert 'aux_outputs' in expected and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_published_pre_norm_model_is_passed_on(tmp_path, capsys):
    "Its file says nothing of its heads; the folder does, and nothing needs to be assumed."
    model = spread_out(build_detr(3, 'resnet18', **SMALL | {'pre_norm': True}))
    torch.save({'model': model.state_dict()}, tmp_path/'published.pth')
    detector = Detector.from_checkpoint(tmp_path/'published.pth', classes=NAMES, nheads=4)
    save_huggingface(detector, tmp_path/'hub')
    capsys.readouterr()
    again = Detector.from_checkpoint(tmp_path/'hub')
    assert again.classes == tuple(NAMES) and not capsys.readouterr().out
    picture = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    found, expected = again(picture, 0), detector(picture, 0)
    assert torch.equal(found.boxes, expected.boxes) and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize('how', [dict(sizes=SMALL_SIZES), dict(square=96)], ids=['sizes', 'square'])
def test_sizes_of_a_detector_that_was_built_by_hand_come_back_or_are_refused(how, tmp_path):
    "transformers' folder has a place for them; ours has none without a run's configuration."
    theirs, ours = (build_detr(3, 'resnet18', **SMALL | {'pre_norm': p}) for p in (False, True))
    save_huggingface(Detector(DetectStep(theirs, build_criterion(theirs)), NAMES, **how), tmp_path/'theirs')
    back = open_huggingface(tmp_path/'theirs')
    assert back.square == how.get('square', 0) and back.sizes.val == how.get('sizes', DETR_SIZES).val
    with pytest.raises(ValueError, match='open it with Detector.from_checkpoint'):
        save_huggingface(Detector(DetectStep(ours, build_criterion(ours)), NAMES, **how), tmp_path/'ours')
    assert not (tmp_path/'ours').exists()
    save_huggingface(Detector(DetectStep(ours, build_criterion(ours)), NAMES), tmp_path/'ours')
    assert Detector.from_checkpoint(tmp_path/'ours').sizes == DETR_SIZES


def test_a_card_says_that_answers_were_without_duplicates(tmp_path):
    "The folder holds what was trained: whoever opens it has to say nms= again."
    for nms, said in ((.5, 1), (None, 0)):
        save_huggingface(Detector.from_checkpoint(shipped('detector'), nms=nms), tmp_path/str(nms))
        card = (tmp_path/str(nms)/'README.md').read_text('utf-8')
        assert card.count('| duplicates | answers with nms=0.5: say so at its opening |') == said


def test_transformers_opens_the_folder_and_prepares_pictures_alike(tmp_path):
    transformers = pytest.importorskip('transformers')
    model = spread_out(build_detr(3, 'resnet18', **SMALL))
    detector = Detector(DetectStep(model, build_criterion(model)), NAMES, SMALL_SIZES)
    save_huggingface(detector, tmp_path/'hub')
    picture = torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8).repeat_interleave(12, 1).repeat_interleave(12, 2)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path/'hub')
    ready = processor(picture, return_tensors='pt')['pixel_values']
    ours = picture_batch(picture, detector.cnn, detector.sizes)['images']
    assert ready.shape == ours.shape and (ready - ours).abs().mean() < .02
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path/'hub').eval()
    assert theirs.config.id2label == dict(enumerate(NAMES))
    with torch.no_grad(): torch.testing.assert_close(theirs(ours).pred_boxes, model(ours)['pred_boxes'], rtol=0, atol=1e-4)


def test_any_number_of_photos_of_any_size():
    "Also with learned positions, whose table ends: larger photos are refused when the program is called."
    model = spread_out(build_detr(3, 'resnet18', **SMALL | {'position': 'learned', 'enc_layers': 1, 'dec_layers': 1}))
    try: program = export_program(model).module()
    except ValueError as e:
        if torch.__version__ >= '2.14': raise
        pytest.skip(str(e))
    images = torch.randn(3, 3, 70, 110)
    with torch.no_grad(): torch.testing.assert_close(program(images)['pred_boxes'], model(images)['pred_boxes'], rtol=0, atol=1e-3)
    with pytest.raises(Exception, match='1600'): program(torch.zeros(1, 3, 64, 1632))


def test_a_pytorch_that_cannot_take_any_size_is_named(monkeypatch):
    "As 2.9, for a ResNet; with one size it can."
    def refuses(*args, dynamic_shapes):
        if dynamic_shapes: raise UserError(UserErrorType.CONSTRAINT_VIOLATION, 'Constraints violated (height, width)!')
        return 'a program'
    monkeypatch.setattr(torch.export, 'export', refuses)
    model = build_detr(3, 'resnet18', **SMALL)
    with pytest.raises(ValueError, match='cannot record resnet18 for photos of any size: give size='): export_program(model)
    assert export_program(model, (64, 64)) == 'a program'


def test_the_place_of_an_onnx_file_is_made_before_the_export(tmp_path, monkeypatch):
    "The export takes minutes: a folder that was missing, or that stood in the file's place, was found out afterwards."
    def exported(model): raise RuntimeError('the export begins')
    monkeypatch.setattr(export, 'find_spec', lambda name: True)
    monkeypatch.setattr(export, 'export_program', exported)
    with pytest.raises(IsADirectoryError, match='name a file in it'): to_onnx(Detector.demo(), tmp_path)
    with pytest.raises(RuntimeError, match='the export begins'): to_onnx(Detector.demo(), tmp_path/'new/detector.onnx')
    assert (tmp_path/'new').is_dir()


def test_onnxruntime_answers_as_the_shipped_detector(tmp_path):
    "EfficientNet-Lite0 pads as TensorFlow does, its norms are folded, its maps are standardised: photos of other numbers and sizes."
    for name in ('onnx', 'onnxscript'): pytest.importorskip(name)
    runtime = pytest.importorskip('onnxruntime')
    detector = Detector.demo()
    to_onnx(detector, tmp_path/'detector.onnx')
    session = runtime.InferenceSession(tmp_path/'detector.onnx')
    about = json.loads(session.get_modelmeta().custom_metadata_map['updetr'])
    assert about['classes'] == list(detector.classes) and about['multiple_of'] == 16
    for shape in ((1, 3, 256, 256), (3, 3, 96, 160)):
        images = torch.randn(shape)
        logits, boxes = session.run(['pred_logits', 'pred_boxes'], {'images': images.numpy()})
        with torch.no_grad(): ours = detector.module.model(images)
        torch.testing.assert_close(torch.as_tensor(boxes), ours['pred_boxes'], rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.as_tensor(logits), ours['pred_logits'], rtol=1e-3, atol=1e-3)
