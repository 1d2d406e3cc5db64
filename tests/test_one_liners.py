"The four one-liners with every kind of picture: one answer, whatever the picture comes as; results that can be drawn, shown and written."
import dataclasses
import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

import updetr
from updetr.core.checkpoint import save_checkpoint
from updetr.core.config import make_config, model_options
from updetr.core.photos import BadPhoto, builtin_photos
from updetr.core.shipped import shipped
from updetr.model.backbone import Backbone
from updetr.model.updetr import build_updetr
from updetr.predict.commands import evaluate, without_duplicates
from updetr.predict.detector import Detections
from updetr.predict.segmenter import Segments
from updetr.tasks.finetune import finetune_config
from updetr.tasks.finetune_task import build_module
from updetr.tasks.oneshot import build_oneshot, oneshot_config
from updetr.tasks.panoptic_task import build_panoptic, panoptic_config

SMALL = dict(backbone='resnet18', weights='none', features='layer2', hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2,
             num_queries=12)
PHOTO = next(p.path for p in builtin_photos() if p.name == 'chelsea')
BOXES = [[120, 80, 260, 200], [30, 20, 90, 120]]
ASK = {'Detector': lambda model, x: model(x, threshold=0.), 'OneShotDetector': lambda model, x: model(x, PHOTO, BOXES[0], threshold=0.),
       'QueryPatchLocalizer': lambda model, x: model(x, [BOXES] * len(x) if isinstance(x, list) else BOXES),
       'PanopticSegmenter': lambda model, x: model(x, 0.)}
COMES_AS = {'a path': Path, 'its name': str, 'PIL': Image.open, 'an array': lambda p: np.array(Image.open(p)),
            'an array with alpha': lambda p: np.array(Image.open(p).convert('RGBA')),
            'a tensor': lambda p: F.pil_to_tensor(Image.open(p)), 'numbers in 0..1': lambda p: F.pil_to_tensor(Image.open(p)) / 255}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "All four from files, with small random networks."
    folder = tmp_path_factory.mktemp('models')
    pre, one = make_config('demo', **SMALL, num_patches=4, patch_size=32, view_size=96), oneshot_config('demo', **SMALL, query_size=32)
    det, pan = finetune_config('demo', **SMALL), panoptic_config('demo', 'boxes', **SMALL | dict(features=''))
    pan = dataclasses.replace(pan, stage='masks', cached_views=0)
    torch.manual_seed(0)
    made = {'Detector': (det, build_module(det, 3).model, {'class_names': ['a', 'b', 'c']}),
            'OneShotDetector': (one, build_oneshot(**model_options(one)), {}),
            'QueryPatchLocalizer': (pre, build_updetr(**model_options(pre)), {}),
            'PanopticSegmenter': (pan, build_panoptic(pan, 3).model, {'class_names': ['a', 'b', 'c'], 'isthing': [True, True, False]})}
    for name, (cfg, model, more) in made.items():
        detr = getattr(model, 'detr', model)
        torch.nn.init.normal_(detr.query_embed.weight)
        detr.bbox_embed.layers[-1].weight.data *= 20
        save_checkpoint(folder / f'{name}.pth', {'model': model.state_dict(), 'args': dataclasses.asdict(cfg) | more})
    return {name: getattr(updetr, name).from_checkpoint(folder / f'{name}.pth') for name in made}


def tensors(found): return {k: v for k, v in vars(found).items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize('name', ASK)
def test_one_answer_whatever_the_picture_comes_as(models, name):
    expected = ASK[name](models[name], PHOTO)
    assert len(expected) > 0
    for kind, make in COMES_AS.items():
        found = ASK[name](models[name], make(PHOTO))
        for k, v in tensors(expected).items(): assert torch.equal(v, tensors(found)[k]), (kind, k)
    several = ASK[name](models[name], [PHOTO, np.array(Image.open(PHOTO))[:, ::-1].copy(), make(PHOTO)])
    assert len(several) == 3 and all(torch.equal(v, tensors(several[2])[k]) for k, v in tensors(expected).items())
    assert not torch.equal(several[1].image, expected.image) and torch.equal(several[1].image.flip(2), expected.image)


@pytest.mark.parametrize('name', ASK)
def test_nothing_of_a_file_is_trained_where_it_is_asked(models, name):
    "So its CNN is folded once, also one that was trained, and not anew for every picture."
    ASK[name](models[name], PHOTO)
    network = models[name].module if name == 'Detector' else models[name].model
    assert not any(p.requires_grad for p in network.parameters())
    cnn, = (m for m in network.modules() if isinstance(m, Backbone))
    assert cnn._folds.frozen and cnn._folds.live.made is None


@pytest.mark.parametrize('name', ASK)
def test_grey_pictures_are_pictures(models, name):
    grey = np.array(Image.open(PHOTO).convert('L'))
    found, same = (ASK[name](models[name], x) for x in (grey, np.stack([grey] * 3, -1)))
    assert all(torch.equal(v, tensors(same)[k]) for k, v in tensors(found).items())


@pytest.mark.parametrize('name', ASK)
def test_results_are_drawn_shown_and_written(models, name):
    found, size = ASK[name](models[name], PHOTO), Image.open(PHOTO).size
    picture, plain = found.plot(), Image.open(PHOTO).convert('RGB')
    assert picture.width == size[0] and picture.height >= size[1]
    assert np.abs(np.array(picture.crop((0, 0, *size)), int) - np.array(plain, int)).max() > 50, 'nothing was drawn'
    assert Image.open(io.BytesIO(found._repr_jpeg_())).size == picture.size
    rows = json.loads(json.dumps(found.to_dict(image_id=7)))
    if name == 'PanopticSegmenter':
        assert rows['image_id'] == 7 and [s['area'] for s in rows['segments_info']] == [int(found.mask(i).sum()) for i in range(len(found))]
        return
    assert len(rows) == len(found) and {r['image_id'] for r in rows} == {7}
    x, y, w, h = torch.tensor([r['bbox'] for r in rows]).T
    assert torch.allclose(torch.stack([x, y, x + w, y + h], 1), found.boxes, atol=1e-3)
    assert [r['category_id'] for r in rows] == found.labels.tolist()
    assert [r['score'] for r in rows] == sorted((r['score'] for r in rows), reverse=True)


@pytest.mark.parametrize('kind', ['Detections', 'Segments'])
def test_names_are_written_with_the_font_that_matplotlib_is_set_to(kind):
    "A font with Chinese letters, say; by itself it is DejaVu Sans."
    image, names = torch.zeros(3, 120, 240, dtype=torch.uint8), ('cat 猫',)
    info = [dict(id=1, category_id=0, isthing=True, area=28800, bbox=[0, 0, 240, 120], score=.9, query=0)]
    found = {'Detections': Detections(image, torch.tensor([[20., 30, 200, 100]]), torch.tensor([0]), torch.tensor([.9]), names),
             'Segments': Segments(image, torch.ones(120, 240, dtype=torch.long), info, names, torch.rand(1, 1, 2, 2))}[kind]
    drawn = {}
    for font in ('DejaVu Sans', 'DejaVu Serif', 'STIXGeneral'):
        with plt.style.context(['default', {'font.sans-serif': [font]}]): drawn[font] = found.plot().tobytes()
    with plt.style.context('default'): assert found.plot().tobytes() == drawn['DejaVu Sans']
    assert len(set(drawn.values())) == 3


@pytest.mark.parametrize('name', ASK)
@pytest.mark.parametrize('wrong', [None, np.zeros((5, 5, 7), np.uint8), torch.zeros(3, 0, 5), torch.full((3, 8, 8), 300.), 'no_such.jpg'],
                         ids=['None', 'seven channels', 'empty', 'numbers too large', 'no file'])
def test_what_is_no_picture_is_named(models, name, wrong):
    with pytest.raises((ValueError, BadPhoto), match='picture must be|numbers of a picture|no_such.jpg'): ASK[name](models[name], wrong)


@pytest.mark.parametrize('threshold', [50, -.1, '.5', float('nan')])
def test_a_threshold_is_a_score(threshold):
    "Else 50, a percentage, would find nothing and say nothing."
    photo = Image.new('RGB', (64, 48))
    for model in (updetr.Detector.demo(), updetr.OneShotDetector.demo()):
        asked = [photo] if isinstance(model, updetr.Detector) else [photo, photo]
        with pytest.raises(ValueError, match='must be a score, a number from 0 to 1'): model(*asked, threshold=threshold)


@pytest.mark.parametrize('nms', [50, 0, 1., '.5', float('nan')], ids=repr)
def test_a_limit_of_nms_is_an_iou(nms, tmp_path):
    "Of the class, and of the command that reports errors; both say it alike."
    file = shipped('detector')
    for asked in (lambda: updetr.Detector.from_checkpoint(file, nms=nms), lambda: evaluate(file, tmp_path, tmp_path / 'out', nms=nms),
                  lambda: without_duplicates(None, nms)):
        with pytest.raises(ValueError, match='nms .* must be an IoU between 0 and 1, such as 0.5'): asked()
