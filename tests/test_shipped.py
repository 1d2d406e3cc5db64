"""The weights that come with the package: whole, small, without a trace of the machine, and as good as their cards say."""
import json
import random
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torchvision.ops import box_iou

from tools.pairs import objects, side_by_side
from updetr import Detector, OneShotDetector, QueryPatchLocalizer
from updetr.core.photos import builtin_photos, read_photo
from updetr.core.shipped import SHIPPED, model_card, shipped
from updetr.predict.localizer import random_questions

ROOT = Path(__file__).parents[1]
REPORTS = {'updetr': 'pretrain_small', 'detector': 'finetune_shipped', 'oneshot': 'oneshot_compare'}
PHOTO = {p.name: p.path for p in builtin_photos()}


@pytest.mark.parametrize('name', SHIPPED)
def test_a_file_is_small_whole_and_says_nothing_of_its_machine(name):
    file = shipped(name)
    assert file.stat().st_size < 4e6 and file.stat().st_mode & 0o444 == 0o444
    with safe_open(file, 'pt') as f:
        text = f.metadata()['config']
        kinds = {f.get_tensor(k).dtype for k in f.keys() if f.get_tensor(k).is_floating_point()}
        assert all(f.get_tensor(k).isfinite().all() for k in f.keys())
    assert kinds == {torch.float16}
    assert not [v for v in json.loads(text).values() if isinstance(v, str) and ('/' in v or '\\' in v)]


@pytest.mark.parametrize('name', SHIPPED)
def test_a_card_says_what_was_measured(name):
    "Each number of the table under 'Measured' stands in the report that the card names"
    card, metrics = model_card(name), (ROOT / 'reports' / REPORTS[name] / 'metrics.json').read_text()
    assert f'reports/{REPORTS[name]}' in card
    table = card.split('## Measured')[1].split('## ')[0]
    said = [float(x) for x in re.findall(r'(?<=\| )\d+\.\d+(?= )', table)]
    known = [float(x) for x in re.findall(r'\d+\.\d+(?:e-?\d+)?', metrics)]
    assert len(said) >= 3
    for x in said:
        digits = 2 if x < 1 else 1
        assert any(round(k, digits) == x for k in known), x


def test_patches_of_photos_never_seen_are_found():
    "Better by far than one and the same box for everything; the untrained network is not"
    images = [read_photo(p.path) for p in builtin_photos('heldout')]
    models = QueryPatchLocalizer.demo(), QueryPatchLocalizer.untrained(shipped('updetr'))
    trained, untrained = (random_questions(model, images, each=20)['IoU'].mean() for model in models)
    assert untrained < .3 < .5 < trained


def test_a_localizer_that_was_opened_in_inference_mode_keeps_a_photo():
    with torch.inference_mode(): localizer = QueryPatchLocalizer.demo()
    photo = localizer.open(PHOTO['coffee'])
    once, twice = (photo.find([(80, 30, 480, 370)]) for _ in range(2))
    assert torch.equal(once.boxes, twice.boxes) and photo.encoded is photo.encoded


def test_the_detector_finds_the_cat():
    "chelsea is a photo of a cat, and no photo of the training"
    found = Detector.demo()(PHOTO['chelsea'], threshold=.3)
    assert len(found) and found.names[0] == 'cat'
    assert box_iou(found.boxes[:1], torch.tensor([[0., 0, 451, 300]])).item() > .4


def test_a_model_that_was_only_pretrained_is_asked_with_pictures():
    photo, box = PHOTO['coffee'], (80, 30, 480, 370)
    found = OneShotDetector.from_checkpoint(shipped('updetr'))(photo, photo, box=box, threshold=0., overlap=.5)
    assert box_iou(found.boxes[:1], torch.tensor([box], dtype=torch.float)).item() > .5


def test_the_one_shot_detector_finds_the_cat():
    "Asked with a piece of it, and for nothing of the kind in a photo of a cup"
    detector, face = OneShotDetector.demo(), (100, 20, 330, 260)
    cat, cup = (detector(PHOTO[name], PHOTO['chelsea'], box=face, threshold=0.) for name in ('chelsea', 'coffee'))
    assert box_iou(cat.boxes[:1], torch.tensor([[0., 0, 451, 300]])).item() > .4
    assert cat.scores[0] > cup.scores[0]


@pytest.mark.data
def test_the_one_shot_detector_looks_at_its_question(data):
    "Two test photos side by side: asked with pictures of either kind, its best answers are more often on that kind's side"
    source, rng = data / 'animals/VOCdevkit/VOC2007', random.Random(0)
    one_box = {}
    for name in (source / 'ImageSets/Main/test.txt').read_text().split():
        found = objects(source / f'Annotations/{name}.xml')
        if len(found) == 1: one_box.setdefault(found[0][0], []).append((name, found[0][1]))
    detector, right = OneShotDetector.demo(), []
    for _ in range(60):
        kinds = rng.sample(sorted(one_box), 2)
        page, _ = side_by_side(source, [rng.choice(one_box[kind])[0] for kind in kinds])
        middle = page.width / 2
        for side, kind in enumerate(kinds):
            name, box = rng.choice(one_box[kind])
            asked = Image.open(source / f'JPEGImages/{name}.jpg').convert('RGB')
            best = detector(page, asked, box=box, threshold=0.).boxes[0]
            right.append((best[[0, 2]].mean().item() > middle) == side)
    assert sum(right) / len(right) > .6
