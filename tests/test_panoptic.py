"""Panoptic data, post-processing and PQ: known answers, a second implementation pixel by pixel, COCO's real files."""
import json
import math
import re
from fractions import Fraction
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn import functional as F
from torchvision.io import write_png

from test_masks import SIZES, make, photos
from tools.processes import in_processes
from updetr.core.checkpoint import write_json
from updetr.core.photos import read_photo
from updetr.data import transforms
from updetr.data.check import start_notes
from updetr.data.scenes import Scenes
from updetr.data.transforms import SMALL_SIZES, Changes, DetectionViews
from updetr.model.detr import build_detr
from updetr.model.losses import build_criterion
from updetr.tasks.finetune import val_views
from updetr.tasks.finetune_task import DetectStep, PhotoLooks, open_checked
from updetr.tasks.masks import DETRsegm, MaskStep
from updetr.tasks.panoptic import (
    PanopticEvaluator,
    PanopticScenes,
    PanopticSet,
    as_segments,
    coco_truth,
    copy_mean_mask,
    enlarged,
    id2rgb,
    instance_masks,
    instance_truth,
    mean_mask,
    open_panoptic,
    paint,
    panoptic_segments,
    pq_of,
    pq_stat,
    resize_ids,
    rgb2id,
    write_panoptic,
)
from updetr.tasks.panoptic_task import open_panoptic_sets, panoptic_config
from updetr.train.evaluate import CocoEvaluator
from updetr.train.loop import Processes, overfit_one_batch

# ---- PQ, pixel by pixel ---------------------------------------------------------------------------------------------

def slow_pq(photos, num_classes):
    """PQ, SQ, RQ of each class with fractions: photos are (truth, truth_info, found, found_info), maps as lists of lists."""
    iou, tp, fp, fn = ([Fraction(0)] * num_classes for _ in range(4))
    for truth, truth_info, found, found_info in photos:
        pixels = [(t, f) for a, b in zip(truth, found) for t, f in zip(a, b)]
        taken = set()
        for s in truth_info:
            if s['iscrowd']: continue
            k, hit = s['category_id'], False
            for p in found_info:
                if p['category_id'] != k: continue
                both = sum(t == s['id'] and f == p['id'] for t, f in pixels)
                either = sum(t == s['id'] or (f == p['id'] and t != 0) for t, f in pixels)
                if 2 * both > either:
                    iou[k] += Fraction(both, either)
                    tp[k] += 1
                    taken.add(p['id'])
                    hit = True
            if not hit: fn[k] += 1
        for p in found_info:
            if p['id'] in taken: continue
            crowds = {s['id'] for s in truth_info if s['iscrowd'] and s['category_id'] == p['category_id']} | {0}
            mine = [t for t, f in pixels if f == p['id']]
            if 2 * sum(t in crowds for t in mine) <= len(mine): fp[p['category_id']] += 1
    out = []
    for a, b, c, d in zip(iou, tp, fp, fn):
        whole = b + c / 2 + d / 2
        out.append([float(v) for v in (a / whole, a / b if b else 0, b / whole)] if whole else [math.nan] * 3)
    return np.array(out)


def random_photo(rng, num_classes=4, side=9):
    """Truth with void and crowds, and an answer that agrees with about half of it."""
    truth = np.kron(rng.integers(0, 6, (3, 3)), np.ones((side // 3, side // 3), int))
    found = np.where(rng.random((side, side)) < .75, truth, rng.integers(0, 6, (side, side)))
    kinds = rng.integers(0, num_classes, 6)
    info = [{'id': int(k), 'category_id': int(kinds[k]), 'iscrowd': int(rng.random() < .2)} for k in np.unique(truth) if k]
    others = np.where(rng.random(6) < .8, kinds, rng.integers(0, num_classes, 6))
    said = [{'id': int(k), 'category_id': int(others[k])} for k in np.unique(found) if k]
    return truth, info, found, said


def test_pq_agrees_with_the_slow_way():
    rng = np.random.default_rng(5)
    photos = [random_photo(rng) for _ in range(60)]
    stat = sum(pq_stat(*map(as_tensor, p), 4) for p in photos)
    want = slow_pq([(t.tolist(), a, f.tolist(), b) for t, a, f, b in photos], 4)
    assert stat[:, 1:].min() > 5  # found, wrong and missed ones of every class
    np.testing.assert_allclose(pq_of(stat), want, atol=1e-12)


def as_tensor(x): return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def field(*parts, background=9):
    ids = torch.full((10, 10), background)
    for number, y, x, h, w in parts: ids[y:y + h, x:x + w] = number
    return ids


def listed(kinds, crowd=()): return [{'id': k, 'category_id': c, 'iscrowd': int(k in crowd)} for k, c in kinds.items()]


THING = field((1, 3, 3, 4, 4)), listed({1: 0, 9: 1})
TWO = field((1, 3, 1, 4, 4), (2, 3, 5, 4, 4)), listed({1: 0, 2: 0, 9: 1})
VOID = field((1, 3, 3, 4, 2), (0, 3, 5, 4, 2)), listed({1: 0, 9: 1})
CROWD = field((3, 0, 0, 2, 10)), listed({3: 0, 9: 1}, [3])
FIXTURES = {  # truth, answer, [IoU, TP, FP, FN] of thing and stuff
    'perfect': (THING, (THING[0], listed({1: 0, 9: 1})), [1, 1, 0, 0], [1, 1, 0, 0]),
    'shifted by one': (THING, (field((1, 3, 4, 4, 4)), listed({1: 0, 9: 1})), [12 / 20, 1, 0, 0], [80 / 88, 1, 0, 0]),
    'shifted by two': (THING, (field((1, 3, 5, 4, 4)), listed({1: 0, 9: 1})), [0, 0, 1, 1], [76 / 92, 1, 0, 0]),
    'merged': (TWO, (field((1, 3, 1, 4, 8)), listed({1: 0, 9: 1})), [0, 0, 1, 2], [1, 1, 0, 0]),
    'split': (THING, (field((1, 3, 3, 4, 2), (2, 3, 5, 4, 2)), listed({1: 0, 2: 0, 9: 1})), [0, 0, 2, 1], [1, 1, 0, 0]),
    'nothing': (THING, (field(background=0), []), [0, 0, 0, 1], [0, 0, 0, 1]),
    'half in void': (VOID, (field((1, 3, 3, 4, 4)), listed({1: 0, 9: 1})), [1, 1, 0, 0], [1, 1, 0, 0]),
    'void, forgotten': (VOID, (field((2, 3, 4, 4, 3)), listed({2: 0, 9: 1})), [0, 0, 0, 1], [84 / 88, 1, 0, 0]),
    'crowd, forgotten': (CROWD, (field((5, 0, 0, 2, 4)), listed({5: 0, 9: 1})), [0, 0, 0, 0], [80 / 92, 1, 0, 0]),
    'crowd of another class': (CROWD, (field((5, 0, 0, 2, 4)), listed({5: 1, 9: 1})), [0, 0, 0, 0], [80 / 92, 1, 1, 0]),
    'crowd, exactly half': (CROWD, (field((5, 1, 0, 2, 4)), listed({5: 0, 9: 1})), [0, 0, 1, 0], [76 / 96, 1, 0, 0])}


@pytest.mark.parametrize('name', FIXTURES)
def test_pq_of_known_cases(name):
    truth, found, *want = FIXTURES[name]
    np.testing.assert_allclose(pq_stat(*truth, *found, 2), want)
    listed_ = [truth[0].tolist(), truth[1], found[0].tolist(), found[1]]
    np.testing.assert_allclose(pq_of(np.array(want, float)), slow_pq([listed_], 2))


def test_means_are_over_the_classes_that_occur():
    evaluator = PanopticEvaluator(['thing', 'another', 'stuff', 'never'], [True, True, False, False])
    truth = THING[0], listed({1: 0, 9: 2})
    evaluator.update(1, truth, (field((1, 3, 4, 4, 4)), listed({1: 0, 9: 2})))
    assert evaluator.per_class().keys() == {'thing', 'stuff'}
    want = {'PQ': (.6 + 80 / 88) / 2, 'PQth': .6, 'PQst': 80 / 88, 'SQth': .6, 'RQ': 1}
    got = evaluator.summary()
    assert {k: got[k] for k in want} == pytest.approx({k: 100 * v for k, v in want.items()})
    evaluator.update(1, truth, (field(background=0), []))  # the same photo again replaces, it does not add
    assert evaluator.summary()['PQ'] == 0 and len(evaluator.stats) == 1
    only_stuff = PanopticEvaluator(['thing', 'stuff'], [True, False]).update(0, (field(), listed({9: 1})), (field(), listed({9: 1})))
    assert only_stuff.summary()['PQ'] == 100 and math.isnan(only_stuff.summary()['PQth'])


@pytest.mark.parametrize('found', [(THING[0], listed({1: 0})), (THING[0], listed({1: 0, 9: 1, 4: 1}))])
def test_answers_that_contradict_themselves_are_refused(found):
    with pytest.raises(ValueError, match=r'photo 3: segment (9|4) is in only one'): PanopticEvaluator('ab', [1, 0]).update(3, THING, found)


@pytest.mark.parametrize('size', [(10, 9), (1, 10), (1, 1), (100,)])
def test_answers_of_another_size_are_refused(size):
    "A single row or pixel would be spread over the whole truth, and count as if it had been said everywhere."
    found = torch.full(size, 9), listed({9: 1})
    with pytest.raises(ValueError, match=rf'photo 3: the answer has {re.escape(str(size))} px .*, the truth \(10, 10\)'):
        PanopticEvaluator('ab', [1, 0]).update(3, THING, found)


def judged_by_one_of(rank, world, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder / "store"}', rank=rank, world_size=world)
    rng, evaluator = np.random.default_rng(5), PanopticEvaluator('abcd', [1, 1, 0, 0])
    for i, (t, a, f, b) in enumerate(random_photo(rng) for _ in range(11)):
        twice = i == 0  # shards are filled up
        if i % world == rank or twice: evaluator.update(i, (as_tensor(t), a), (as_tensor(f), b))
    write_json(folder / f'{rank}.json', evaluator.gather().summary())
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path):
    rng, alone = np.random.default_rng(5), PanopticEvaluator('abcd', [1, 1, 0, 0])
    for i, (t, a, f, b) in enumerate(random_photo(rng) for _ in range(11)): alone.update(i, (as_tensor(t), a), (as_tensor(f), b))
    in_processes(judged_by_one_of, 2, tmp_path)
    for rank in (0, 1): assert json.loads((tmp_path / f'{rank}.json').read_text()) == pytest.approx(alone.summary())


# ---- post-processing ------------------------------------------------------------------------------------------------

def slow_resize(ids, size):
    """The pixel under the centre of each new one, with fractions."""
    def under(k, old, new): return math.floor((k + Fraction(1, 2)) * old / new)
    rows, columns = ([under(k, old, new) for k in range(new)] for old, new in zip(ids.shape, size))
    return np.array([[ids[y, x] for x in columns] for y in rows], int)


def test_resizing_picks_the_pixel_under_the_centre():
    """As fractions do; and as Pillow does, which the reference uses, but where a centre lies on a border between two."""
    for old, new in [((5, 7), (11, 3)), ((6, 9), (4, 14)), ((9, 4), (9, 4)), ((13, 17), (40, 29))]:
        ids = torch.randint(0, 2**24, old)
        assert np.array_equal(resize_ids(ids, new).numpy(), slow_resize(ids.numpy(), new))
        column = np.arange(old[1], dtype=np.uint8)[None]
        theirs = np.asarray(Image.fromarray(column).resize((new[1], 1), Image.Resampling.NEAREST))[0]
        border = np.array([((2 * x + 1) * old[1]) % (2 * new[1]) == 0 for x in range(new[1])])
        ours = resize_ids(torch.from_numpy(column), (1, new[1]))[0].numpy()
        assert np.array_equal(ours[~border], theirs[~border])


def slow_paint(logits, labels, isthing, size):
    """The rules, one pixel at a time. Logits (k,H,W)."""
    alive = list(range(len(labels)))
    while alive:
        owner = np.zeros(logits.shape[1:], np.uint8)
        for y in range(owner.shape[0]):
            for x in range(owner.shape[1]):
                best = max(alive, key=lambda q: (float(logits[q, y, x]), -q))
                same = [q for q in range(len(labels)) if labels[q] == labels[best]]
                owner[y, x] = best if isthing[labels[best]] else same[0]
        final = slow_resize(owner, size)
        def area(q, final=final): return int((final == (q if isthing[labels[q]] else labels.index(labels[q]))).sum())
        if all(area(q) > 4 for q in alive): return final
        alive = [q for q in alive if area(q) > 4]
    return np.full(size, -1)


@pytest.mark.parametrize('seed', range(8))
def test_painting_agrees_with_the_slow_way(seed):
    g = torch.Generator().manual_seed(seed)
    k, isthing = 3 + 2 * seed, [True, True, False, False]
    logits, labels = torch.randn(k, 9, 12, generator=g), torch.randint(0, 4, (k,), generator=g)
    logits[::2] -= 1.5  # some own only a few pixels
    for size in ((9, 12), (20, 17), (6, 9)):
        owner = paint(logits, labels, isthing, size)
        assert np.array_equal(owner.numpy(), slow_paint(logits, labels.tolist(), isthing, size))
    ids, info = as_segments(owner, labels, torch.rand(k), torch.arange(k), isthing)
    assert sum(s['area'] for s in info) == (ids > 0).sum() and all(s['area'] > 4 for s in info)
    stuff = [s['category_id'] for s in info if not s['isthing']]
    assert len(stuff) == len(set(stuff))


def test_a_small_segment_gives_its_pixels_to_the_others():
    logits = torch.zeros(3, 8, 8)
    logits[0, :, :4], logits[1, :, 4:] = 1, 1
    logits[2, 0, :4] = 5  # four pixels: dropped; five: kept
    three = torch.zeros(3, dtype=torch.long)
    assert paint(logits, three, [True], (8, 8)).unique().tolist() == [0, 1]
    logits[2, 1, 0] = 5
    assert paint(logits, three, [True], (8, 8)).unique().tolist() == [0, 1, 2]
    assert (paint(logits[2:], three[:1], [True], (2, 2)) == -1).all()  # nothing is left


def opinionated(model, batch, seed=0):
    """Make the class head sure of different things for different queries, though an untrained decoder hardly tells them apart."""
    g, head = torch.Generator().manual_seed(seed), model.eval().detr.class_embed
    with torch.no_grad():
        hs = model.look(batch['images'], batch['mask'])[1].hs.flatten(0, 1)
        head.weight.copy_(torch.randn(head.weight.shape, generator=g) / hs.std(0) / 3)
        head.bias.copy_(-head.weight @ hs.mean(0))
    return model


def batch_of(images, orig):
    H, W = (max(i.shape[d] for i in images) for d in (1, 2))
    padded, mask = torch.zeros(len(images), 3, H, W), torch.ones(len(images), H, W, dtype=torch.bool)
    for i, image in enumerate(images):
        padded[i, :, :image.shape[1], :image.shape[2]], mask[i, :image.shape[1], :image.shape[2]] = image, False
    targets = [{'size': torch.tensor(i.shape[1:]), 'orig_size': torch.tensor(o)} for i, o in zip(images, orig)]
    return {'images': padded, 'mask': mask if mask.any() else None, 'targets': targets}


def test_the_answer_of_a_batch_by_the_plain_model():
    """Look once and draw what has the score = DETR's dictionary with all masks, thresholded afterwards."""
    batch, isthing = batch_of(photos(), [(64, 96), (120, 70)]), [True, True, True, False, False]
    model = opinionated(make(), batch)
    answers, out = panoptic_segments(model, batch, isthing, .6), model(batch['images'], batch['mask'])
    counts = []
    for b, (ids, info) in enumerate(answers):
        (h, w), orig = (tuple(batch['targets'][b][k].tolist()) for k in ('size', 'orig_size'))
        probability = out['pred_logits'][b].softmax(-1)
        keep = [q for q in range(6) if probability[q].argmax() < 5 and probability[q].max() > .6]
        masks = F.interpolate(out['pred_masks'][b][None], batch['images'].shape[-2:], mode='bilinear')[0, keep, :h, :w]
        labels = [int(probability[q].argmax()) for q in keep]
        owner = slow_paint(masks.detach(), labels, isthing, orig)
        want = {s['id']: keep.index(s['query']) for s in info}
        assert ids.shape == orig and np.mean([want.get(int(i), -1) == o for i, o in zip(ids.flatten(), owner.ravel())]) > .995
        assert all(s['score'] == pytest.approx(float(probability[s['query']].max()), abs=1e-5) for s in info)
        counts.append(len(keep))
    assert 0 < min(counts) < 6  # some queries were left out


def test_instances_are_all_queries_that_say_thing():
    batch = batch_of(photos(), [(64, 96), (48, 32)])
    model, count = opinionated(make(num_queries=9), batch), 0
    out = model(batch['images'], batch['mask'])
    isthing = [k == out['pred_logits'][0, 0, :-1].argmax() for k in range(5)]
    for b, p in enumerate(instance_masks(model, batch, isthing, chunk=2)):
        label = out['pred_logits'][b].softmax(-1)[:, :-1].argmax(-1)
        query = [q for q in range(9) if isthing[label[q]]]
        assert p['labels'].tolist() == label[query].tolist()
        count += len(query)
        (h, w), orig = (tuple(batch['targets'][b][k].tolist()) for k in ('size', 'orig_size'))
        want = F.interpolate(out['pred_masks'][b][None], batch['images'].shape[-2:], mode='bilinear')[0, query, :h, :w].sigmoid() > .5
        want = F.interpolate(want[:, None].float(), orig, mode='nearest')[:, 0] > 0
        assert p['masks'].shape == (len(query), *orig) and (p['masks'] != want).float().sum() < .001 * want.numel() + 1
    assert 0 < count < 18


def test_padding_is_cut_off_before_anything_else():
    logits = torch.zeros(1, 8, 8)
    logits[:, :4] = 5
    assert (enlarged(logits, (32, 32), (16, 32)) > 0).all() and enlarged(logits, (32, 32), (16, 20)).shape == (1, 16, 20)


def test_numbers_without_a_class_are_never_answered():
    batch = batch_of(photos(), [(64, 96), (120, 70)])
    model = opinionated(make(), batch)
    said = {s['category_id'] for _, info in panoptic_segments(model, batch, [False] * 5, 0.) for s in info}
    some = sorted(said)[0]
    kinds = [None if k == some else False for k in range(5)]
    assert said - {some} and some not in {s['category_id'] for _, info in panoptic_segments(model, batch, kinds, 0.) for s in info}


def test_no_score_at_the_threshold_is_an_empty_answer():
    answers = panoptic_segments(make().eval(), batch_of(photos(), [(10, 10), (20, 20)]), [True] * 5, 1.)
    assert [(a.shape, a.any().item(), i) for a, i in answers] == [((10, 10), False, []), ((20, 20), False, [])]


# ---- files ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def scenes(): return PanopticScenes(Scenes(6, (64, 80)))


def write_photos(folder, scenes):
    folder.mkdir(parents=True)
    for i in range(len(scenes)): write_png(scenes[i]['image'], str(folder / f'{i}.jpg'))


@pytest.mark.parametrize('layout', ['beside', 'a root of its own', 'photos elsewhere', 'flat'])
def test_layouts(layout, scenes, tmp_path):
    root, elsewhere = tmp_path / 'coco', tmp_path / 'photos'
    (root / 'annotations').mkdir(parents=True)
    write_photos((elsewhere if layout == 'photos elsewhere' else root) / 'train2017', scenes)
    write_panoptic(root / 'annotations' / 'panoptic_train2017.json', {i: scenes.panoptic(i) for i in range(6)}, scenes)
    pngs = root / 'annotations' / 'panoptic_train2017'
    if layout in ('a root of its own', 'photos elsewhere'): pngs.rename(root / 'panoptic_train2017')
    if layout == 'flat':
        for f in pngs.iterdir(): f.rename(root / 'annotations' / f.name)
    again = open_panoptic(root, photos=elsewhere if layout == 'photos elsewhere' else None)
    for i in range(6):
        a, b = again[i], scenes[i]
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(b[k], torch.Tensor) else a[k] == b[k] for k in b)
    if layout == 'photos elsewhere':
        with pytest.raises(FileNotFoundError, match='say photos=FOLDER'): open_panoptic(root)
    assert again.classes == scenes.classes and again.isthing == scenes.isthing


def test_a_run_finds_photos_and_pngs_in_folders_of_their_own(scenes, tmp_path):
    "Those of each part; one folder above the photos of both will do."
    away = tmp_path / 'away'
    (tmp_path / 'coco/annotations').mkdir(parents=True)
    for part in ('train', 'val'):
        write_photos(away / f'{part}2017', scenes)
        write_panoptic(file := tmp_path / f'coco/annotations/panoptic_{part}2017.json', {i: scenes.panoptic(i) for i in range(6)}, scenes)
        file.with_suffix('').rename(away / f'png_{part}')
    places = dict(data=str(tmp_path / 'coco'), pngs=str(away / 'png_train'), pngs_val=str(away / 'png_val'), exif='stored')
    for images in (dict(images=str(away)), dict(images=str(away / 'train2017'), images_val=str(away / 'val2017'))):
        sets = open_panoptic_sets(panoptic_config('demo', **places, **images))
        found = [(ds.photos.name, ds.pngs.name, ds.exif) for ds in sets]
        assert found == [('train2017', 'png_train', 'stored'), ('val2017', 'png_val', 'stored')]


def test_one_file_below_home_is_divided(scenes, tmp_path, monkeypatch):
    "The other name of a file, with ~, was no file: all its photos were trained on and evaluated."
    (tmp_path / 'annotations').mkdir()
    write_photos(tmp_path / 'all', scenes)
    write_panoptic(tmp_path / 'annotations/panoptic_all.json', {i: scenes.panoptic(i) for i in range(6)}, scenes)
    monkeypatch.setenv('HOME', str(tmp_path))
    train, val = open_panoptic_sets(panoptic_config('demo', data='~/annotations/panoptic_all.json'))
    assert len(val) and sorted([*train.image_ids, *val.image_ids]) == list(range(6))


def test_an_instance_file_below_home_is_read(scenes, tmp_path, monkeypatch):
    truth = coco_truth(scenes)
    rows = [a | {'segmentation': [[1, 1, 9, 1, 9, 9]]} for a in truth['annotations'] if scenes.isthing[a['category_id']]]
    write_json(tmp_path / 'instances.json', {'images': truth['images'], 'categories': [], 'annotations': rows})
    monkeypatch.setenv('HOME', str(tmp_path))
    assert len(instance_truth(scenes, '~/instances.json')['annotations']) == len(rows)


@pytest.mark.parametrize('coco_ids', [False, True])
def test_two_classes_of_one_name_are_refused(coco_ids, tmp_path):
    "PQ class by class had only one of the two."
    categories = [{'id': k, 'name': 'sky', 'isthing': 0} for k in (3, 8)]
    with pytest.raises(ValueError, match="p.json: category names must be unique, 'sky' comes 2 times"):
        PanopticSet({'categories': categories}, 'p.json', tmp_path, tmp_path, coco_ids)


def test_two_numberings_of_classes(scenes, tmp_path):
    """COCO's own ids with gaps: renumbered in the order of the ids, or kept among 250."""
    ids = {k: 3 * k + 7 for k in range(12)}
    data = {'images': [{'id': 5, 'file_name': 'a.jpg', 'height': 64, 'width': 80}], 'categories': [
        {'id': ids[k], 'name': n, 'isthing': int(t)} for k, (n, t) in reversed(list(enumerate(zip(scenes.classes, scenes.isthing))))]}
    (tmp_path / 'annotations/panoptic_val').mkdir(parents=True)
    picture, info = scenes.panoptic(1)
    write_png(id2rgb(picture * 70000), str(tmp_path / 'annotations/panoptic_val/a.png'))
    (tmp_path / 'val').mkdir()
    write_png(scenes[1]['image'], str(tmp_path / 'val/a.jpg'))
    segments = [s | {'id': s['id'] * 70000, 'category_id': ids[s['category_id']]} for s in info]
    write_json(tmp_path / 'annotations/panoptic_val.json', data | {'annotations': [{'image_id': 5, 'file_name': 'a.png',
                                                                                    'segments_info': segments}]})
    small, large = open_panoptic(tmp_path, 'val'), open_panoptic(tmp_path, 'val', coco_ids=True)
    assert small.classes == scenes.classes and small[0]['labels'].tolist() == scenes[1]['labels'].tolist()
    assert torch.equal(small[0]['masks'], scenes[1]['masks']) and len(large.classes) == 250
    assert large[0]['labels'].tolist() == [ids[k] for k in scenes[1]['labels'].tolist()]
    assert [large.isthing[ids[k]] for k in range(12)] == scenes.isthing and large.isthing.count(None) == 250 - 12
    assert '12 (8 things, 4 stuff), numbered 0..11' in repr(small) and 'by their own ids, of 250 numbers' in repr(large)
    assert {c['id'] for c in coco_truth(large, masks=True)['categories']} == {ids[k] for k in range(8)}
    assert len(large.coco()['categories']) == 250  # a model may say a number without a class: wrong, but no error
    write_panoptic(tmp_path / 'annotations/panoptic_test.json', {5: large.panoptic(0)}, large)
    written = json.loads((tmp_path / 'annotations/panoptic_test.json').read_text())
    assert {s['category_id'] for s in written['annotations'][0]['segments_info']} == {s['category_id'] for s in segments}


def test_without_masks_no_png_is_read(scenes, tmp_path):
    (tmp_path / 'annotations').mkdir()
    write_photos(tmp_path / 'val2017', scenes)
    write_panoptic(tmp_path / 'annotations/panoptic_val2017.json', {i: scenes.panoptic(i) for i in range(6)}, scenes)
    for f in (tmp_path / 'annotations/panoptic_val2017').iterdir(): f.write_bytes(b'')
    boxes = open_panoptic(tmp_path, 'val', masks=False)
    assert torch.equal(boxes[2]['boxes'], scenes[2]['boxes']) and 'masks' not in boxes[2]
    assert boxes.coco()['annotations'] == scenes.coco()['annotations']


def test_a_crowd_stays_one_in_files(scenes, tmp_path):
    "Written and read, in samples and in the truth of boxes and masks; and in an instances file."
    (tmp_path / 'annotations').mkdir()
    write_photos(tmp_path / 'val2017', scenes)
    answers = {i: scenes.panoptic(i) for i in range(6)}
    marked = next(s for s in answers[0][1] if s['isthing'])['id']
    answers[0] = answers[0][0], [s | {'iscrowd': int(s['id'] == marked)} for s in answers[0][1]]
    write_panoptic(tmp_path / 'annotations/panoptic_val2017.json', answers, scenes)
    val = open_panoptic(tmp_path, 'val')
    want = [s['iscrowd'] for s in answers[0][1]]
    assert sum(want) == 1 and [s['iscrowd'] for s in val.segments(0)] == want == val[0]['iscrowd'].tolist()
    truth = coco_truth(val, masks=True)
    rows = [a | {'category_id': val.category_ids[a['category_id']], 'segmentation': a['segmentation'] | {
            'counts': a['segmentation']['counts'].decode()}} for a in truth['annotations']]
    write_json(tmp_path / 'instances.json', {'images': truth['images'], 'categories': [], 'annotations': rows})
    for some in (val.coco(), truth, instance_truth(val, tmp_path / 'instances.json')):
        assert [a['image_id'] for a in some['annotations'] if a['iscrowd']] == [0]


def test_names_that_lead_out_are_refused(scenes, tmp_path):
    (tmp_path / 'annotations').mkdir()
    write_photos(tmp_path / 'val2017', scenes)
    write_panoptic(file := tmp_path / 'annotations/panoptic_val2017.json', {i: scenes.panoptic(i) for i in range(6)}, scenes)
    good = json.loads(file.read_text())
    for key in ('images', 'annotations'):
        bad = json.loads(json.dumps(good))
        bad[key][1]['file_name'] = '../../secret.png'
        write_json(file, bad)
        with pytest.raises(ValueError, match='leads out of the folder'): open_panoptic(tmp_path, 'val')


@pytest.mark.parametrize('parts', [('train',), ('train', 'val')])
def test_folds_are_a_partition(parts, scenes, tmp_path):
    "Of one file, and of a folder with photos to evaluate on: these stay unseen."
    (tmp_path / 'annotations').mkdir()
    for part in parts:
        write_photos(tmp_path / f'{part}2017', scenes)
        write_panoptic(file := tmp_path / f'annotations/panoptic_{part}2017.json', {i: scenes.panoptic(i) for i in range(6)}, scenes)
    data, seen = str(file if len(parts) == 1 else tmp_path), []
    for k in (1, 2, 3):
        train, val = open_panoptic_sets(panoptic_config('demo', data=data, split_val=f'fold {k} of 3', seed=k))
        assert sorted([*train.image_ids, *val.image_ids]) == list(range(6)) and f'fold {k} of 3' in val.note
        assert 'panoptic_train2017' in val.source and torch.equal(val.panoptic(0)[0], scenes.panoptic(val.image_ids[0])[0])
        seen += val.image_ids
    assert sorted(seen) == list(range(6))


def test_each_photo_has_a_png_of_its_own(scenes, tmp_path):
    "Photos of one name in two folders, or with two endings; and a name that would lead out."
    files = ['clip1/0.jpg', 'clip2/0.jpg', '1.jpg', '1.png', '../../out.jpg', '/root.jpg']
    named = SimpleNamespace(image_ids=list(range(6)), file_ids=list(range(6)), files=files, sizes=scenes.sizes, classes=scenes.classes,
                            isthing=scenes.isthing, category_ids=scenes.category_ids)
    write_panoptic(tmp_path / 'a/b/val.json', {i: scenes.panoptic(i) for i in range(6)}, named)
    rows = json.loads((tmp_path / 'a/b/val.json').read_text())['annotations']
    assert [row['file_name'] for row in rows] == ['clip1/0.png', 'clip2/0.png', '1.png', '1_3.png', 'out.png', 'root.png']
    for i, row in enumerate(rows): assert torch.equal(rgb2id(read_photo(tmp_path / 'a/b/val' / row['file_name'])), scenes.panoptic(i)[0])
    assert {f.parent.name for f in tmp_path.rglob('*.png')} == {'val', 'clip1', 'clip2'}


def test_crowds_are_no_targets(scenes):
    sample = scenes[0] | {'iscrowd': torch.arange(len(scenes[0]['labels'])) == 1}
    class One:  # a set of one photo
        sizes = scenes.sizes[:1]
        def __len__(self): return 1
        def __getitem__(self, i): return sample
    target = DetectionViews(One(), train=False, square=64)[0, 0][1]
    assert len(target['labels']) == len(target['masks']) == len(sample['labels']) - 1


def test_masks_that_nobody_reads_are_not_moved(scenes):
    "Of a view to evaluate on, and of views whose features are cached; boxes and labels are the same without."
    cfg = panoptic_config('demo', 'boxes', val_size=32)
    train = DetectionViews(scenes, sizes=SMALL_SIZES, square=48, changes=Changes(augment='turn'))
    with_masks = val_views(cfg, scenes)
    with_masks.masks = True
    want = [with_masks[0, 2], *[train[k, 2] for k in (0, 1)]]
    assert all(len(target['masks']) == len(target['labels']) > 0 for _, target in want)
    with patch.object(transforms, 'Mask', side_effect=AssertionError('a mask is moved')):
        images, targets, _ = PhotoLooks(train, 2)[2]
        got = [val_views(cfg, scenes)[0, 2], *zip(images, targets)]
    for (image, target), (first, full) in zip(got, want, strict=True):
        assert torch.equal(image, first) and target.keys() == full.keys() - {'masks'}
        assert all(torch.equal(target[k], full[k]) for k in target)


def test_numbers_as_colours():
    some = torch.randint(0, 2**24, (50, 40))
    rgb = id2rgb(some)
    assert torch.equal(rgb2id(rgb), some) and rgb.dtype == torch.uint8
    assert id2rgb(torch.tensor([[1 + 256 * 2 + 65536 * 3]])).flatten().tolist() == [1, 2, 3]


def test_mean_mask_by_hand():
    class Two:
        classes, isthing = ['a', 'b'], [False, False]
        def __len__(self): return 2
        def panoptic(self, i):
            ids = torch.ones(8, 8, dtype=torch.int64)
            ids[:, 4 + 2 * i:] = 2
            return ids, listed({1: 0, 2: 1})
    share = mean_mask(Two(), 8)
    assert share[0, 0].tolist() == [1, 1, 1, 1, .5, .5, 0, 0] and torch.equal(share.sum(0), torch.ones(8, 8))
    ids, info = copy_mean_mask(share, [False, False], (16, 16))
    assert [s['category_id'] for s in info] == [0, 1] and ids.shape == (16, 16) and sum(s['area'] for s in info) == 256


@pytest.mark.parametrize('files', [True, False])
def test_the_mean_mask_is_that_of_the_photos_that_are_trained_on(files, scenes, tmp_path):
    "Of some photos out of one file, which is divided before, and of some scenes: those photos have their segments, too."
    (tmp_path / 'annotations').mkdir()
    write_photos(tmp_path / 'all', scenes)
    write_panoptic(tmp_path / 'annotations/panoptic_all.json', {i: scenes.panoptic(i) for i in range(6)}, scenes)
    place = dict(data=str(tmp_path / 'annotations/panoptic_all.json')) if files else dict(scenes=6, scenes_val=1, scene_size=64)
    whole = scenes if files else PanopticScenes(Scenes(6, 64))
    train, val = open_panoptic_sets(panoptic_config('demo', photos=2, **place))
    assert len(train) == 2 and (not files or not {*train.image_ids} & {*val.image_ids})
    counted = torch.zeros(len(whole.classes), 64, 64)
    for k in train.image_ids:
        ids, info = whole.panoptic(k)
        small = resize_ids(ids, (64, 64))
        for s in info: counted[s['category_id']] += small == s['id']
    assert torch.equal(mean_mask(train), counted / 2)
    boxes = {(a['image_id'], *a['bbox']) for a in whole.coco()['annotations'] if a['image_id'] in train.image_ids}
    assert {(a['image_id'], *a['bbox']) for a in train.coco()['annotations']} == boxes


def test_mean_mask_of_a_large_set_looks_at_some_of_its_photos():
    "Evenly spread ones, each once; of a set that is no larger at all of them."
    class Many:
        classes = ['a', 'b']
        def __init__(self, n): self.n, self.seen = n, []
        def __len__(self): return self.n
        def panoptic(self, i):
            self.seen.append(i)
            return torch.ones(1, 1, dtype=torch.int64), listed({1: i % 2})
    for n, most, seen in ((7, 7, range(7)), (7, 8, range(7)), (13, 5, [0, 2, 5, 7, 10]), (11_000, 5000, None)):
        share = mean_mask(many := Many(n), 1, most)
        assert share.sum().item() == pytest.approx(1) and len(set(many.seen)) == len(many.seen) == min(n, most)
        assert seen is None or many.seen == list(seen)
    assert mean_mask(many := Many(5001), 1).sum().item() == pytest.approx(1) and len(many.seen) == 5000


# ---- COCO's own files -----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def coco(data):
    root = data / 'coco_panoptic_mini'
    if not root.is_dir(): pytest.skip('needs coco_panoptic_mini in UPDETR_DATA')
    return root


@pytest.mark.data
def test_coco_as_it_is(coco):
    train, val, reference = open_panoptic(coco), open_panoptic(coco, 'val'), open_panoptic(coco, 'val', coco_ids=True)
    assert (len(train), len(val), len(val.classes), sum(val.isthing)) == (100, 100, 133, 80) and len(reference.classes) == 250
    assert val.isthing == sorted(val.isthing, reverse=True) and train.classes == val.classes
    assert all(reference.isthing[k] == (k <= 90) for k in reference.category_ids if k is not None)
    for ds in (train, val):
        for i in range(0, 100, 9):
            sample, (ids, _) = ds[i], ds.panoptic(i)
            assert sample['image'].shape[1:] == ids.shape and torch.equal(sample['masks'].sum((1, 2)).float(), sample['area'])
            for mask, box in zip(sample['masks'], sample['boxes']):
                y, x = mask.nonzero().T
                assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.data
def test_pq_and_ap_of_the_truth_are_100(coco):
    val = open_panoptic(coco, 'val')
    truth, evaluator = coco_truth(val, masks=True), PanopticEvaluator(val.classes, val.isthing)
    ap, crowds = CocoEvaluator(truth, 'segm'), sum(s['iscrowd'] for i in range(100) for s in val.segments(i))
    for i in range(100):
        ids, info = val.panoptic(i)
        evaluator.update(val.image_ids[i], (ids, info), (ids, info))
        sample = val[i]
        mine = (sample['labels'] < 80) & ~sample['iscrowd']
        found = {k: sample[k][mine] for k in ('labels', 'boxes', 'masks')} | {'scores': torch.ones(int(mine.sum()))}
        ap.update([val.image_ids[i]], [found])
    assert evaluator.summary()['PQ'] == 100 and ap.summary()['AP'] == pytest.approx(100) and crowds == 5


@pytest.mark.data
def test_pq_of_coco_agrees_with_the_slow_way(coco):
    """Real pictures, made smaller, against the answer of a neighbour: void, crowds and all."""
    val, stats, slow = open_panoptic(coco, 'val'), [], []
    for i in range(0, 100, 4):
        ids, info = val.panoptic(i)
        small = resize_ids(ids, (24, 32))
        there = [s for s in info if (small == s['id']).any()]
        shifted = small.roll(1, 1)
        said = [s for s in there if (shifted == s['id']).any()]
        stats.append(pq_stat(small, there, shifted, said, 133))
        slow.append((small.tolist(), there, shifted.tolist(), said))
    np.testing.assert_allclose(pq_of(sum(stats)), slow_pq(slow, 133), atol=1e-12)


@pytest.mark.data
def test_instance_file_of_coco(coco, tmp_path):
    """The instance file's outlines as truth: a file made of the PNGs' masks gives the same numbers as the PNGs."""
    val = open_panoptic(coco, 'val')
    truth = coco_truth(val, masks=True)
    rows = [a | {'category_id': val.category_ids[a['category_id']], 'segmentation': {'size': a['segmentation']['size'],
            'counts': a['segmentation']['counts'].decode()}} for a in truth['annotations']]
    write_json(tmp_path / 'instances_val2017.json', {'images': truth['images'], 'categories': [], 'annotations': rows})
    again = instance_truth(val, tmp_path / 'instances_val2017.json')
    assert len(again['annotations']) == len(rows) and again['categories'] == truth['categories']
    train = open_panoptic(coco)
    with pytest.raises(ValueError, match='lacks 100 of the 100 photos'): instance_truth(train, tmp_path / 'instances_val2017.json')


@pytest.mark.data
def test_training_steps_on_coco(coco):
    """Real photos through the training views into both losses; the mask losses fall on one batch."""
    train = open_panoptic(coco)
    views = DetectionViews(train, 1, square=96)
    images, targets = zip(*(views[0, i] for i in (3, 4)))
    batch = {'images': torch.stack(images).float() / 255 - .5, 'mask': None, 'targets': list(targets)}
    torch.manual_seed(0)
    detr = build_detr(133, backbone='resnet18', **SIZES | {'num_queries': 40})
    boxes = overfit_one_batch(DetectStep(detr, build_criterion(detr)), batch, 60, 2e-3)
    model = DETRsegm(detr, map_gain=256)
    masks = overfit_one_batch(MaskStep(model, build_criterion(detr)), batch, 60, 3e-3)
    assert all(map(math.isfinite, boxes + masks)) and boxes[-1] < .6 * boxes[0] and masks[-1] < .95 * masks[0]
    answers = panoptic_segments(model.eval(), batch, train.isthing, 0)
    evaluator = PanopticEvaluator(train.classes, train.isthing)
    for i, answer in zip((3, 4), answers): evaluator.update(train.image_ids[i], train.panoptic(i), answer)
    assert 0 <= evaluator.summary()['PQ'] < 20


@pytest.mark.parametrize('stage', ['boxes', 'upsnet'])
def test_only_a_detr_can_have_too_few_queries(stage, scenes, tmp_path, capsys):
    (tmp_path / 'annotations').mkdir()
    write_photos(tmp_path / 'all', scenes)
    write_panoptic(tmp_path / 'annotations/panoptic_all.json', {i: scenes.panoptic(i) for i in range(6)}, scenes)
    cfg = panoptic_config('demo', stage, data=str(tmp_path / 'annotations/panoptic_all.json'), num_queries=1)
    task = SimpleNamespace(cfg=cfg, run_dir=tmp_path, processes=Processes(), open_sets=lambda: open_panoptic_sets(cfg))
    open_checked(task)
    said = capsys.readouterr().out
    assert 'one set without photos' in said and ('can never be found' in said) == (stage == 'boxes')


@pytest.mark.parametrize('masks', [True, False])
def test_missing_training_photos_are_refused_before_the_start(masks, scenes, tmp_path):
    "A photo that is not there was replaced by the next one, and only a file of the run said so"
    (tmp_path / 'annotations').mkdir()
    for part in ('train', 'val'):
        write_photos(tmp_path / f'{part}2017', scenes)
        write_panoptic(tmp_path / f'annotations/panoptic_{part}2017.json', {i: scenes.panoptic(i) for i in range(6)}, scenes)
    train, val = (open_panoptic(tmp_path, part, masks=masks) for part in ('train', 'val'))
    start_notes(train, val, 0)
    photo, png = train.photos / train.files[2], train.pngs / train.rows[3][1]
    photo.rename(tmp_path / 'away')
    with pytest.raises(ValueError, match=f'files missing: 1, first .*{photo.name}.*images=FOLDER'): start_notes(train, val, 0)
    (tmp_path / 'away').rename(photo)
    png.unlink()
    if masks:
        with pytest.raises(ValueError, match=f'files missing: 1, first .*{png.name}'): start_notes(train, val, 0)
    else: start_notes(train, val, 0)
