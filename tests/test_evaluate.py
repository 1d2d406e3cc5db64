"Evaluation as notebook 36 cannot show it: several processes, and the fast back end against pycocotools."
import io
import json
import sys
import types
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

import updetr.train.evaluate
from tools.processes import in_processes
from updetr.train.evaluate import CocoEvaluator, voc_ap


def fixture(seed, images=24):
    "Ground truth and predictions with crowds, empty images, images without detections, equal scores and more than 100 detections."
    rng, truth, predictions = np.random.default_rng(seed), [], {}
    ids = rng.permutation(500)[:images].tolist()
    for place, i in enumerate(ids):
        n = 0 if place in (3, 4) else int(rng.integers(1, 6))
        corner, size, kinds = rng.uniform(0, 150, (n, 2)), np.exp(rng.uniform(1.5, 4.8, (n, 2))), rng.integers(0, 3, n)
        for c, s, k in zip(corner.tolist(), size.tolist(), kinds.tolist()):
            crowd = int(rng.random() < .2)
            truth.append(dict(id=len(truth) + 1, image_id=i, category_id=k, bbox=[*c, *s], area=s[0] * s[1], iscrowd=crowd))
        near = np.concatenate([corner, corner + size], 1).repeat(2, 0)
        far = np.sort(rng.uniform(-20, 220, (120 if place == 7 else 5, 2, 2)), 1).reshape(-1, 4)
        boxes = np.concatenate([near + rng.normal(0, 2, near.shape), far])
        labels = np.concatenate([kinds.repeat(2), rng.integers(0, 3, len(far))])
        if place in (4, 5): boxes, labels = boxes[:0], labels[:0]
        predictions[i] = dict(scores=rng.random(len(boxes)).round(1), labels=labels, boxes=boxes)
    photos, names = [dict(id=i, height=200, width=200) for i in ids], [dict(id=k, name=f'class {k}') for k in range(4)]
    return dict(images=photos, categories=names, annotations=truth), predictions


def filled(coco, predictions, **settings):
    return CocoEvaluator(coco, **settings).update(list(predictions), list(predictions.values()))


@pytest.fixture(scope='module')
def case():
    coco, predictions = fixture(0)
    assert len({len(p['scores']) for p in predictions.values()}) > 3 and max(len(p['scores']) for p in predictions.values()) > 100
    assert {a['iscrowd'] for a in coco['annotations']} == {0, 1}
    return coco, predictions


@pytest.mark.parametrize('seed', range(4))
def test_equals_pycocotools_on_files(seed, tmp_path):
    coco, predictions = fixture(seed)
    results = [dict(image_id=i, category_id=int(k), score=float(s), bbox=[x1, y1, x2 - x1, y2 - y1])
               for i, p in predictions.items() for s, k, (x1, y1, x2, y2) in zip(p['scores'], p['labels'], p['boxes'].tolist())]
    for name, content in (('truth', coco), ('results', results)): (tmp_path/f'{name}.json').write_text(json.dumps(content))
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path/'truth.json'))
        theirs = COCOeval(truth, truth.loadRes(str(tmp_path/'results.json')), 'bbox')
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    ours = filled(coco, dict(reversed(predictions.items()))).result
    assert np.array_equal(ours.stats, theirs.stats) and 0 < ours.stats[0] < ours.stats[1] < 1
    for key in ('precision', 'recall', 'scores'): assert np.array_equal(ours.eval[key], theirs.eval[key])


def test_prints_nothing_and_changes_nothing(case, capfd):
    coco, predictions = case
    before = json.dumps(coco)
    filled(coco, predictions).summary()
    assert json.dumps(coco) == before and capfd.readouterr().out == ''


# ---- several processes ----------------------------------------------------------------------------------------------

def test_voc_costs_nothing_where_nothing_was_found(case, monkeypatch):
    "Notebook 36 compares its numbers with a second computation; here is counted that photos without a class are passed over."
    coco, predictions = case
    looked = []
    monkeypatch.setattr(updetr.train.evaluate, 'box_iou', lambda a, b: looked.append(len(a)) or box_iou(a, b))
    voc_ap(coco, predictions)
    found = [int((p['labels'] == k).sum()) for k in range(4) for _, p in sorted(predictions.items())]
    assert looked == [n for n in found if n] and 0 in found


def part_of(case, rank, world, images=None):
    "Return what process `rank` evaluates: the last image is shown to all, as a sampler does that fills up; the first one's answer counts."
    coco, predictions = case
    order = list(predictions)[:images]
    mine = order[rank::world]
    ev = CocoEvaluator(coco).update(mine, [predictions[i] for i in mine])
    return ev.update(order[-1:], [dict(scores=[], labels=[], boxes=[]) if rank else predictions[order[-1]]])


def one_class(case):
    "Return class 1 alone, with another id."
    coco, predictions = case
    kept = [a | dict(category_id=5) for a in coco['annotations'] if a['category_id'] == 1]
    found = {i: {k: v[p['labels'] == 1] for k, v in p.items()} for i, p in predictions.items()}
    found = {i: p | dict(labels=p['labels'] + 4) for i, p in found.items()}
    return coco | dict(annotations=kept, categories=[dict(id=5, name='class 1')]), found


def numbers(ev):
    "All that an evaluator says, as text: nan equals nan."
    return json.dumps([ev.result.stats.tolist(), ev.summary(), ev.per_class(), voc_ap(ev.coco, ev.predictions), len(ev.predictions)])


def evaluate_part(rank, world, store, out, case):
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world)
    ev = part_of(case, rank, world).gather()
    said = [numbers(ev), numbers(ev.gather()), numbers(part_of(one_class(case), rank, world).gather())]
    try: part_of(case, rank, world, images=20).gather()
    except ValueError as e: said.append(str(e))
    (out/f'{rank}.json').write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.mark.parametrize('world', [2, 3])
def test_processes_give_the_numbers_of_one(world, case, tmp_path):
    in_processes(evaluate_part, world, tmp_path/'store', tmp_path, case)
    expected, alone = filled(*case), filled(*one_class(case))
    # a class is worth the same among others; more processes than classes
    assert alone.per_class()['class 1'] == pytest.approx(expected.per_class()['class 1']) and alone.summary()['AP'] > 0
    for rank in range(world):
        first, again, few, missing = json.loads((tmp_path/f'{rank}.json').read_text())
        assert first == again == numbers(expected) and few == numbers(alone) and '4 of 24 images' in missing


# ---- the fast back end ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(4))
def test_fast_backend_gives_the_same_numbers(seed, capfd):
    pytest.importorskip('hotcoco', reason="needs pip install 'updetr[fast]'")
    coco, predictions = fixture(seed)
    slow, fast = filled(coco, predictions), filled(coco, predictions, backend='hotcoco')
    assert slow.summary() == pytest.approx(fast.summary(), abs=0, rel=0, nan_ok=True)
    assert np.array_equal(slow.result.eval['precision'], np.asarray(fast.result.eval['precision']))
    assert json.dumps(slow.per_class()) == json.dumps(fast.per_class()) and capfd.readouterr().out == ''


def test_fast_backend_with_nothing_found(case):
    pytest.importorskip('hotcoco', reason="needs pip install 'updetr[fast]'")
    coco, predictions = case
    nothing = dict.fromkeys(predictions, dict(scores=[], labels=[], boxes=[]))
    assert json.dumps(filled(coco, nothing).summary()) == json.dumps(filled(coco, nothing, backend='hotcoco').summary())


def test_missing_fast_backend_says_what_to_install(case, monkeypatch):
    monkeypatch.setitem(sys.modules, 'hotcoco', None)
    with pytest.raises(ImportError, match=r"pip install 'updetr\[fast\]'"): CocoEvaluator(case[0], backend='hotcoco')


def test_backend_is_really_used(case, monkeypatch):
    "A stand-in with pycocotools' interface is handed the data and asked for the numbers."
    used = []

    class Evaluator(COCOeval):
        def evaluate(self):
            used.append(len(self.cocoDt.anns))
            super().evaluate()

    def make(dataset):
        coco = COCO()
        coco.dataset = dataset
        coco.createIndex()
        return coco
    monkeypatch.setitem(sys.modules, 'hotcoco', types.SimpleNamespace(COCO=make, COCOeval=Evaluator))
    assert filled(*case, backend='hotcoco').summary()['AP'] == filled(*case).summary()['AP']
    assert used == [sum(len(p['scores']) for p in case[1].values())]


def renamed(coco, changes):
    "The ground truth with other names of classes, {id: name}."
    return coco | {'categories': [c | {'name': changes.get(c['id'], c['name'])} for c in coco['categories']]}


def test_two_classes_of_one_name_are_refused(case):
    "Tables by name had only one of the two."
    twice = renamed(case[0], {1: 'class 0'})
    for judge in (CocoEvaluator, lambda coco: voc_ap(coco, case[1])):
        with pytest.raises(ValueError, match="category names must be unique, 'class 0' comes 2 times: keep one"): judge(twice)


@pytest.mark.parametrize('parent', [-1, 9])
def test_a_parent_without_things_may_have_the_name_of_a_class(parent, case):
    "Roboflow's files have one, id 0: the class's numbers are in the table, whichever comes first."
    coco, predictions = case
    both = coco | {'categories': [*coco['categories'], {'id': parent, 'name': 'class 1'}]}
    for measure in (lambda coco: filled(coco, predictions).per_class(), lambda coco: voc_ap(coco, predictions)):
        assert str(sorted(measure(both).items())) == str(sorted(measure(coco).items()))
