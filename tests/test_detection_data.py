"Real labelled photos (UPDETR_DATA) through the loaders, the check and the transforms; and what these owe to workers."
import json
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader

from updetr.core.photos import builtin_photos, read_photo
from updetr.data.check import check_dataset
from updetr.data.datasets import DetectionSet, coco_table, open_dataset
from updetr.data.queries import QueryPool
from updetr.data.transforms import SMALL_SIZES, DetectionViews
from updetr.tasks.finetune import some_photos
from updetr.train.evaluate import CocoEvaluator


def _quiet_coco(file):
    with redirect_stdout(StringIO()): return COCO(file)


@pytest.mark.data
def test_animals(data):
    "VOC layout: the counts that are known, one class list for both parts, nothing wrong."
    sets = {part: open_dataset(data / 'animals', part) for part in ('trainval', 'test')}
    assert {part: len(ds) for part, ds in sets.items()} == {'trainval': 3608, 'test': 1000}
    assert sum(len(ds.rows) for ds in sets.values()) == 6117
    for ds in sets.values():
        assert ds.classes == ['cat', 'cow', 'dog', 'horse', 'sheep'] and not sum(ds.left_out.values())
        report = check_dataset(ds)
        assert report.ok and not report.warnings, report


@pytest.mark.data
def test_animals_through_a_coco_file(data, tmp_path):
    "The set, written as a COCO file and read again, is the same set."
    ds = open_dataset(data / 'animals', 'test')
    (tmp_path / 'test.json').write_text(json.dumps(ds.coco()))
    again = open_dataset(tmp_path / 'test.json', images=ds.table.root)
    assert again.classes == ds.classes and again.image_ids == ds.image_ids and (again.sizes == ds.sizes).all()
    assert all(torch.equal(ds.columns[k], again.columns[k]) for k in ds.columns)


@pytest.mark.data
@pytest.mark.parametrize('part, photos, boxes', [('train', 2272, 21088), ('val', 600, 5797)])
def test_coco_mini(part, photos, boxes, data):
    "COCO layout: known counts, and pycocotools agrees box for box with the ids that we made anew."
    ds = open_dataset(data / 'coco_mini', part)
    assert (len(ds), len(ds.rows), len(ds.classes)) == (photos, boxes, 80) and max(ds.category_ids) == 90
    assert check_dataset(ds).ok
    theirs, ours = _quiet_coco(data / f'coco_mini/annotations/instances_{part}.json'), ds.coco()
    rows = {image: [] for image in ds.image_ids}
    for a in ours['annotations']: rows[a['image_id']].append((ds.category_ids[a['category_id']], *a['bbox'], a['area'], a['iscrowd']))
    for image, mine in rows.items():
        assert mine == [(a['category_id'], *a['bbox'], a['area'], a['iscrowd']) for a in theirs.imgToAnns[image]]


@pytest.mark.data
def test_views_of_real_photos(data):
    "Targets of real photos are what a model may be given."
    views = DetectionViews(open_dataset(data / 'coco_mini', 'val'), sizes=SMALL_SIZES)
    for i in range(40):
        image, target = views[3, i]
        corners = torch.cat([target['boxes'][:, :2] - target['boxes'][:, 2:] / 2, target['boxes'][:, :2] + target['boxes'][:, 2:] / 2], 1)
        assert image.dtype == torch.uint8 and min(image.shape[1:]) <= 240 and max(image.shape[1:]) <= 401
        assert (target['boxes'][:, 2:] > 0).all() and (corners > -1e-6).all() and (corners < 1 + 1e-6).all()
        assert len(target['boxes']) == len(target['labels']) == len(target['area']) and (target['labels'] < 80).all()


def test_workers_change_nothing():
    "The same views, whoever makes them."
    data = {'images': [{'id': k, 'file_name': p.path.lstrip('/'), 'height': h, 'width': w}
                       for k, p in enumerate(builtin_photos('heldout'), 1) for _, h, w in [read_photo(p.path).shape]],
            'categories': [{'id': 1, 'name': 'thing'}],
            'annotations': [{'id': k, 'image_id': k, 'category_id': 1, 'bbox': [20, 30, 200, 150]} for k in range(1, 5)]}
    views = DetectionViews(DetectionSet(coco_table(data, '/', 'heldout')), sizes=SMALL_SIZES)
    items = [(epoch, i) for epoch in (0, 1) for i in range(4)]
    runs = [list(DataLoader(views, batch_size=None, sampler=items, num_workers=w)) for w in (0, 2)]
    for (a, s), (b, t) in zip(*runs): assert torch.equal(a, b) and all(torch.equal(s[k], t[k]) for k in s)
    assert len({x.numpy().tobytes() for x, _ in runs[0]}) == len(items)


def test_a_million_boxes_are_columns():
    "The table does not depend on a loop in which every box is an object: what is known about random boxes holds for all."
    rng, n, m = np.random.default_rng(0), 2000, 20_000
    boxes = np.round(rng.random((m, 4)) * 300, 2)
    data = {'images': [{'id': 3 * k, 'file_name': f'{k}.jpg', 'height': 240, 'width': 320} for k in range(n)],
            'categories': [{'id': 7, 'name': 'b'}, {'id': 4, 'name': 'a'}],
            'annotations': [{'id': k, 'image_id': int(i) * 3, 'category_id': int(c), 'bbox': b}
                            for k, (i, c, b) in enumerate(zip(rng.integers(0, n, m), rng.choice([4, 7], m), boxes.tolist()))]}
    ds = DetectionSet(coco_table(data, '.', 'random'))
    inside = (boxes[:, 1] < 240) & (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    assert len(ds.rows) == inside.sum() and ds.left_out['empty'] == m - inside.sum()
    assert (np.diff(ds.starts) == np.bincount([a['image_id'] // 3 for a, k in zip(data['annotations'], inside) if k], minlength=n)).all()
    b = ds.columns['boxes']
    assert b.min() >= 0 and b[:, 2].max() <= 320 and b[:, 3].max() <= 240 and (b[:, 2:] > b[:, :2]).all()


def awkward_file(seed):
    """A COCO file as strangers make them, and answers {image id: [(category id, score, box)]}. Ids have gaps, boxes are empty, negative or
    outside, areas are their own or 0, some are crowds, some of unknown photos and classes."""
    rng, rows, answers = np.random.default_rng(seed), [], {}
    ids, kinds = (rng.permutation(500)[:12] + 1).tolist(), [3, 17, 90]
    for i in ids:
        answers[i] = []
        for _ in range(rng.integers(1, 7)):
            (x, y), (w, h), kind = rng.uniform(0, 90, 2).tolist(), rng.uniform(8, 100, 2).tolist(), int(rng.choice(kinds))
            odd = rng.choice(['', '', '', 'flat', 'point', 'outside', 'sticking out', 'negative'])
            if odd == 'flat': w = 0
            if odd == 'point': w = h = 0
            if odd == 'outside': x += 300
            if odd == 'sticking out': x, y = x - 40, y - 40
            if odd == 'negative': w = -w
            area = float(rng.choice([0, w * h, w * h / 2, 2000]))
            rows.append(dict(id=len(rows) + 1, image_id=i, category_id=kind, bbox=[x, y, w, h], area=area, iscrowd=int(rng.random() < .1)))
            near = rng.normal(0, 3, rng.integers(0, 3)).tolist()
            answers[i] += [(kind, round(float(rng.random()), 1), [x + d, y + d, abs(w), h]) for d in near]
    rows += [rows[0] | {'id': 900, 'image_id': 9999}, rows[0] | {'id': 901, 'category_id': 5}]
    photos = [{'id': i, 'file_name': f'{i}.jpg', 'width': 150, 'height': 120} for i in ids]
    return {'images': photos, 'categories': [{'id': k, 'name': f'class {k}'} for k in kinds], 'annotations': rows}, answers


@pytest.mark.parametrize('seed', range(3))
def test_ap_is_that_of_pycocotools_on_the_original_file(seed, tmp_path):
    "Boxes that cannot be trained on are in the truth: pycocotools counts them as missed."
    data, answers = awkward_file(seed)
    (tmp_path / 'truth.json').write_text(json.dumps(data))
    found = [{'image_id': i, 'category_id': k, 'score': s, 'bbox': b} for i, some in answers.items() for k, s, b in some]
    with redirect_stdout(StringIO()):
        truth = COCO(str(tmp_path / 'truth.json'))
        theirs = COCOeval(truth, truth.loadRes(found), 'bbox')
        for stage in (theirs.evaluate, theirs.accumulate, theirs.summarize): stage()
    ds = DetectionSet(coco_table(data, '.', 'truth.json'))
    label, ours = {k: c for c, k in enumerate(ds.category_ids)}, CocoEvaluator(ds.coco())
    for i, some in answers.items():
        boxes = np.array([[x, y, x + w, y + h] for _, _, (x, y, w, h) in some]).reshape(-1, 4)
        ours.update([i], [{'scores': [s for _, s, _ in some], 'labels': [label[k] for k, *_ in some], 'boxes': boxes}])
    assert ds.left_out['empty'] > 3 and .02 < theirs.stats[0] < .9
    assert np.allclose(ours.result.stats, theirs.stats, atol=1e-9)


def test_boxes_only_for_evaluation_teach_and_ask_nothing():
    "A box that is empty inside its photo is in the truth, but is no target, is not drawn for, and is not asked with."
    data, _ = awkward_file(0)
    ds = DetectionSet(coco_table(data, '.', 'truth.json'))
    empty = [a for a in ds.coco()['annotations'] if a['empty']]
    assert len(ds.coco()['annotations']) - len(empty) == len(ds.rows) and len(empty) == ds.left_out['empty']
    pool, real = QueryPool(ds), [a for a in ds.coco()['annotations'] if not (a['empty'] or a['iscrowd'])]
    assert len(pool) == len(real) and all(min(a['bbox'][2:]) > 0 for a in real)
    assert {(k, c) for k, some in pool.present.items() for c in some} == {(a['image_id'], a['category_id']) for a in real}
    assert len(some_photos(ds, 5, 0)) == 5


def some_of(things, num, seed, **more):
    "Photos drawn from a COCO file of (photo, class, crowd): their ids"
    data = {'images': [{'id': i, 'file_name': f'{i}.jpg', 'width': 60, 'height': 40} for i in range(60)],
            'categories': [{'id': k, 'name': 'abc'[k]} for k in range(3)],
            'annotations': [dict(id=j + 1, image_id=i, category_id=k, bbox=[5, 5, 20, 20], area=400, iscrowd=crowd)
                            for j, (i, k, crowd) in enumerate(things)]}
    return set(some_photos(DetectionSet(coco_table(data, '.', 'truth.json')), num, seed, **more).image_ids)


@pytest.mark.parametrize('seed', range(5))
def test_what_is_not_trained_on_has_no_say_in_which_photos_are_drawn(seed):
    """Photos of a rare class were drawn for a one-shot training that keeps it unseen, and shows it as background; photos with a crowd or a
    difficult object were drawn for its class."""
    rare = [(i, 1, 0) for i in range(50, 60)]
    common = [(i, 0, 0) for i in range(50)]
    assert len(some_of(common + rare, 10, seed) & set(range(50, 60))) == 5
    assert not some_of(common + rare, 10, seed, wanted=[0]) & set(range(50, 60))
    crowds = [(i, 2, 1) for i in range(50, 59)]
    assert 59 in some_of([*common, *crowds, (59, 2, 0)], 4, seed)
