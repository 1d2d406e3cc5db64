"""One-shot detection: the protocol against a slow second implementation, runs that are killed, one process and two, the notebook."""
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from test_finetune_runs import SIZES, logged, pretrained  # noqa: F401 (a fixture)
from test_papermill import ONESHOT
from test_resume import as_in_the_processes, finish, kill_twice, weights  # noqa: F401 (a fixture: one thread here, too)
from test_task import rows, save_photos
from tools.cells import run_report
from tools.processes import in_processes
from updetr.core.checkpoint import write_json
from updetr.core.config import NEUTRAL, cfg_changes, make_config
from updetr.data.datasets import open_dataset
from updetr.data.queries import QueryPool, protocol_queries, query_picture, training_photos
from updetr.data.scenes import CLASSES
from updetr.model.detr import build_detr
from updetr.predict.localizer import QueryPatchLocalizer
from updetr.predict.oneshot_detector import OneShotDetector
from updetr.tasks import oneshot_task
from updetr.tasks.oneshot import OneShotConfig, OneShotEvaluator, oneshot_config, oneshot_summary, oneshot_table
from updetr.tasks.oneshot_task import OneShotTask, evaluate_oneshot, model_answer, oneshot_sets, open_run
from updetr.train.loop import Processes
from updetr.train.progress import starting_line

TINY = SIZES | dict(backbone='test_resnet', weights='none', features='layer2', scenes=8, scenes_val=5, scene_size=64, val_size=64,
                    square=64, cached_views=2, query_size=32, batch_size=4, epochs=3, eval_every=3, eval_queries=2, log_every=1,
                    save_every=2, lr=3e-3, dropout=.1)
LIVE = dict(cached_views=0, square=0, frozen_backbone=False)
SETTINGS = {'cached': {}, 'live': LIVE | dict(query_shape='letterbox', query_augment=True, absent=.3, compare=True),
            'binary': dict(binary=True, mask_ratio=.2, class_sampling='inverse', own_queries=False),
            'several': dict(questions=3, compare=True)}


def make_run(folder, **changes):
    folder.mkdir(parents=True)
    write_json(folder / 'cfg.json', dataclasses.asdict(oneshot_config('demo', **TINY | changes)))
    return folder


def make_task(folder, processes=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    task = OneShotTask(oneshot_config('demo', **TINY | changes), folder, processes or Processes())
    task.begin(resumed=False)
    return task


# ---- a second implementation of the protocol, slow and from its text -------------------------------------------------

def inter(a, b): return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
def area(a): return (a[2] - a[0]) * (a[3] - a[1])
def iou(a, b): return inter(a, b) / (area(a) + area(b) - inter(a, b))


def curve(marks, total):
    """Recall and precision after each detection that counts; `marks` by falling score: True, False, or None (does not count)."""
    hits = n = 0
    for mark in marks:
        if mark is None: continue
        hits, n = hits + mark, n + 1
        yield hits / total, hits / n


def slow_coco_ap(things, found, threshold):
    """101 recalls. things: {image: [(box, crowd)]}; found: [(score, image, box)], answers of an image in their order."""
    marks = {}
    for image in {i for _, i, _ in found} | set(things):
        taken = set()
        mine = sorted((d for d in enumerate(found) if d[1][1] == image), key=lambda d: -d[1][0])[:100]
        for place, (_, _, box) in mine:
            best, match = threshold, None
            for k, (truth, crowd) in enumerate(things.get(image, [])):
                if k in taken or crowd: continue
                if iou(box, truth) >= best: best, match = iou(box, truth), k
            if match is not None: taken.add(match)
            lost = match is None and any(crowd and inter(box, t) / area(box) >= threshold for t, crowd in things.get(image, []))
            marks[place] = None if lost else match is not None
    total = sum(not crowd for some in things.values() for _, crowd in some)
    order = sorted(marks, key=lambda place: (-found[place][0], found[place][1], place))
    points = list(curve([marks[p] for p in order], total))
    return 100 * np.mean([max([p for r, p in points if r >= recall], default=0) for recall in np.linspace(0, 1, 101)])


def slow_voc_ap(things, found):
    """11 recalls, IoU 0.5; an answer counts for the thing it overlaps most, even if that is taken; difficult things do not count."""
    marks, taken = [], set()
    for _, image, box in sorted(found, key=lambda d: (-d[0], d[1])):
        overlap, k = max(((iou(box, t), -k) for k, (t, _) in enumerate(things.get(image, []))), default=(0, 0))
        if overlap < .5: marks.append(False)
        elif things[image][-k][1]: marks.append(None)
        else:
            marks.append((image, k) not in taken)
            taken.add((image, k))
    total = sum(not hard for some in things.values() for _, hard in some)
    points = list(curve(marks, total))
    return 100 * np.mean([max([p for r, p in points if r >= k / 10 - 1e-12], default=0) for k in range(11)])


def slow_table(coco, answer, num, own):
    """Class -> AP, AP50, VOC11 as the paper's Section 4.3 reads; answer(image, class, (image, box) of the query) -> [(score, box)]."""
    boxes = [(a['image_id'], a['category_id'], [a['bbox'][0], a['bbox'][1], a['bbox'][0] + a['bbox'][2], a['bbox'][1] + a['bbox'][3]],
              bool(a['iscrowd'])) for a in coco['annotations']]
    hard = [bool(a.get('difficult')) for a in coco['annotations']]
    table = {}
    for c in coco['categories']:
        mine = [(i, j, box) for j, (i, k, box, crowd) in enumerate(boxes) if k == c['id'] and (not crowd or hard[j])]
        pool = sorted(mine, key=lambda q: q[:2])
        rounds = []
        for n in range(num):
            found = []
            for image in sorted({i for i, k, _, crowd in boxes if k == c['id'] and not crowd}):
                asked = [q for q in pool if own or q[0] != image] or pool
                random.Random(image).shuffle(asked)
                found += [(s, image, b) for s, b in answer(image, c['id'], asked[n % len(asked)][::2])]
            things = {}
            for j, (i, k, box, crowd) in enumerate(boxes):
                if k == c['id']: things.setdefault(i, []).append((box, crowd or hard[j]))
            if any(not x for some in things.values() for _, x in some):
                ap = [slow_coco_ap(things, found, t) for t in np.linspace(.5, .95, 10)]
                rounds.append((np.mean(ap), ap[0], slow_voc_ap(things, found)))
        if rounds: table[c['name']] = dict(zip(('AP', 'AP50', 'VOC11'), np.mean(rounds, 0)))
    return table


class Described:
    """A detection set without photos: boxes of three classes, some crowded or difficult, image ids in no order."""
    classes = ['ant', 'bee', 'cat']

    def __init__(self, n=14):
        rng = np.random.default_rng(1)
        self.image_ids, self.sizes, self.annotations = [int(k) for k in rng.permutation(90)[:n] + 5], np.full((n, 2), 200), []
        for i in self.image_ids:
            for _ in range(rng.integers(0, 6)):
                corner, kind = rng.uniform(0, 100, 2), rng.choice(['plain', 'plain', 'plain', 'crowd', 'difficult'])
                self.annotations.append({'image_id': i, 'category_id': int(rng.integers(3)), 'bbox': [*corner, *rng.uniform(20, 100, 2)],
                                         'iscrowd': int(kind != 'plain'), 'difficult': int(kind == 'difficult')})

    def coco(self):
        rows = [a | {'id': k, 'area': a['bbox'][2] * a['bbox'][3]} for k, a in enumerate(self.annotations, 1)]
        return {'images': [{'id': i, 'width': 200, 'height': 200} for i in self.image_ids], 'annotations': rows,
                'categories': [{'id': k, 'name': c} for k, c in enumerate(self.classes)]}


def some_answers(dataset):
    """A detector that is often right, and whose answers depend on image, class and query alone."""
    def answer(image, label, query):
        rng = np.random.default_rng((image, label, query[0], int(query[1][0] * 1000)))
        things = [a['bbox'] for a in dataset.annotations if a['image_id'] == image]
        found = []
        for x, y, w, h in things + things[:2]:
            dx, dy, dw, dh = rng.normal(0, .12, 4) * (w, h, w, h)
            found.append((float(rng.random()), [x + dx, y + dy, x + dx + w + dw, y + dy + h + dh]))
        return sorted(found, reverse=True)[:7]
    return answer


@pytest.mark.parametrize('num, own', [(5, True), (3, False)])
def test_the_protocol_is_that_of_a_slow_second_implementation(num, own):
    dataset = Described()
    pool, answer = QueryPool(dataset), some_answers(dataset)
    evaluator = OneShotEvaluator(dataset.coco(), pool, ['bee'], num, own)
    for i in dataset.image_ids:
        answers = []
        for label, asked in evaluator.questions(i):
            found = [answer(i, label, (pool.image_id[r], pool.boxes[r])) for r in asked]
            answers.append([{'scores': torch.tensor([s for s, _ in f], dtype=torch.float64),
                             'boxes': torch.tensor([b for _, b in f], dtype=torch.float64).reshape(-1, 4)} for f in found])
        evaluator.update(i, answers)
    table, expected = oneshot_table(evaluator.gather()), slow_table(dataset.coco(), answer, num, own)
    assert table.keys() == expected.keys() == set(dataset.classes)
    for name, row in expected.items():
        assert {k: table[name][k] for k in row} == pytest.approx(row, abs=1e-3), name
        assert 5 < row['AP50'] < 95
    summary = oneshot_summary(table)
    assert summary['unseen_AP50'] == table['bee']['AP50'] and [n for n, r in table.items() if r['unseen']] == ['bee']
    assert summary['seen_VOC11'] == pytest.approx((table['ant']['VOC11'] + table['cat']['VOC11']) / 2)


def test_the_order_of_the_files_does_not_matter():
    """The same annotations, photo by photo in another order: the same pictures are asked with."""
    first, second = Described(), Described()
    order = sorted(range(len(second.annotations)), key=lambda k: (-second.annotations[k]['image_id'], k))
    second.annotations, second.image_ids = [second.annotations[k] for k in order], second.image_ids[::-1]
    pools = QueryPool(first), QueryPool(second)
    for image_id in first.image_ids:
        assert pools[0].present[image_id] == pools[1].present[image_id]
        for label in pools[0].present[image_id]:
            a, b = ([(p.image_id[r], p.boxes[r]) for r in protocol_queries(p, image_id, label)] for p in pools)
            assert a == b


def test_answers_are_taken_by_the_classes_of_their_questions(monkeypatch):
    "No question is drawn a second time: that shuffled all boxes of a class, for each of them."
    dataset = Described()
    evaluator = OneShotEvaluator(dataset.coco(), QueryPool(dataset), [], 2)
    asked = {i: [label for label, _ in evaluator.questions(i)] for i in dataset.image_ids}
    monkeypatch.delattr('updetr.tasks.oneshot.protocol_queries')
    for i, labels in asked.items():
        evaluator.update(i, [[{'scores': torch.ones(1), 'boxes': torch.ones(1, 4)}] * 2 for _ in labels])
        assert evaluator.rounds[1].predictions[i]['labels'].tolist() == labels
    assert max(map(len, asked.values())) == 3


def test_photos_without_a_question_have_empty_answers():
    dataset = Described()
    pool = QueryPool(dataset)
    nothing = next(i for i in dataset.image_ids if not pool.present[i])
    evaluator = OneShotEvaluator(dataset.coco(), pool, [])
    evaluator.update(nothing, [])
    assert len(evaluator.rounds[4].predictions[nothing]['scores']) == 0 and evaluator.questions(nothing) == []
    with pytest.raises(ValueError, match='1 answered'): evaluator.update(nothing, [[{}] * 5])


# ---- runs -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', SETTINGS)
def test_killed_twice_and_resumed_is_the_same_run(how, tmp_path):
    finish(whole := make_run(tmp_path / 'whole', **SETTINGS[how]))
    kill_twice(folder := make_run(tmp_path / 'killed', **SETTINGS[how]), range(1, 5))
    finish(folder)
    assert logged(folder) == logged(whole) and {step for step, name in logged(whole) if name == 'train_loss'} == set(range(1, 7))
    assert all(torch.equal(a, b) for a, b in zip(weights(folder).values(), weights(whole).values(), strict=True))
    assert {(6, 'test_seen_AP50'), (6, 'test_unseen_VOC11')} <= logged(folder).keys()


def found_by(task):
    evaluator = evaluate_oneshot(task, model_answer(task.model.eval()))
    return [{i: {k: torch.as_tensor(v) for k, v in p.items()} for i, p in e.predictions.items()} for e in evaluator.rounds]


def found_by_one_of(rank, world, folder, changes):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    torch.save(found_by(make_task(folder, Processes(rank, world), **changes)), folder / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.parametrize('how', ['cached', 'live'])
def test_two_processes_answer_as_one(how, tmp_path):
    """Bit by bit: each photo is a batch of its own."""
    alone = found_by(make_task(tmp_path / 'one' / 'run', **SETTINGS[how]))
    (folder := tmp_path / 'two' / 'run').mkdir(parents=True)
    in_processes(found_by_one_of, 2, folder, SETTINGS[how])
    for rank in (0, 1):
        theirs = torch.load(folder / f'{rank}.pth')
        for a, b in zip(alone, theirs, strict=True):
            assert a.keys() == b.keys() == set(range(5))
            for i in a: assert all(torch.equal(a[i][k], b[i][k]) for k in ('scores', 'labels', 'boxes'))


def test_first_features_are_those_of_each_picture_and_a_watcher_sees_how_far_they_are(tmp_path):
    """Some at a time, with a last part that is smaller."""
    task = make_task(tmp_path / 'run', **LIVE)
    rows = list(range(len(task.pools[0])))[::-1]
    found = oneshot_task._live_features(task, rows, at_once=20)
    alone = [oneshot_task.picture_features(task.cnn, task.pools[0].picture(row)[None])[0] for row in rows]
    assert oneshot_task._live_features(task, []).shape == (0, task.cnn.num_channels)
    assert len(rows) % 20 and torch.allclose(found, torch.stack(alone), atol=1e-5)
    assert f"features of query pictures {len(rows)}/{len(rows)}" in starting_line(tmp_path / 'run')


def test_live_and_cached_answers_agree(tmp_path):
    live, cached = (found_by(make_task(tmp_path / name / 'run', cached_views=v)) for name, v in (('live', 0), ('cached', 2)))
    for a, b in zip(live, cached):
        for i in a:
            assert torch.allclose(a[i]['boxes'], b[i]['boxes'], atol=.3) and torch.allclose(a[i]['scores'], b[i]['scores'], atol=5e-3)


def test_it_starts_from_all_that_was_pretrained(pretrained, tmp_path):  # noqa: F811
    changes = {k: None for k in ('backbone', 'weights', 'features')} | dict(pretrain=str(pretrained), fresh_queries=False)
    task = make_task(tmp_path / 'run', **changes)
    theirs = torch.load(pretrained, weights_only=True)['model']
    mine = task.model.state_dict()
    assert {k for k in theirs if k not in mine} == {k for k in theirs if k.startswith('feature_align')}
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items()) and task.model.patch2query.weight.requires_grad
    assert all(p.requires_grad for n, p in task.model.named_parameters() if not n.startswith('backbone'))


def test_only_the_comparison_is_new(pretrained, tmp_path, monkeypatch):  # noqa: F811
    "It was shown pictures of seen kinds alone; the other tensors are those of the file, and chance goes on as without it"
    changes = {k: None for k in ('backbone', 'weights', 'features')} | dict(pretrain=str(pretrained), fresh_queries=False)
    shown, fit = [], oneshot_task.fit_comparison
    monkeypatch.setattr(oneshot_task, 'fit_comparison', lambda c, features, labels, seed: shown.append((features, labels)) or
                        fit(c, features, labels, seed, steps=3))
    torch.manual_seed(5)
    task = make_task(tmp_path / 'run', **changes, compare=True)
    after, (features, labels) = torch.rand(1), shown.pop()
    assert {k for k in task.model.state_dict() if k.startswith('compare')} == {
        'compare.scale', 'compare.embed.1.weight', 'compare.embed.1.bias', 'compare.embed.4.weight', 'compare.embed.4.bias'}
    mine = [task.pools[0].label[row] for row in range(len(task.pools[0])) if task.pools[0].label[row] in task.seen]
    assert sorted(labels.tolist()) == sorted(mine) and set(mine) <= set(task.seen) and len(features) == len(mine)
    theirs = torch.load(pretrained, weights_only=True)['model']
    assert all(torch.equal(v, theirs[k]) for k, v in task.model.state_dict().items() if not k.startswith('compare'))
    # resumed, it is not fitted again, and without its steps the random numbers are the same
    monkeypatch.setattr(oneshot_task, 'fit_comparison', lambda *a: None)
    torch.manual_seed(5)
    make_task(tmp_path / 'again', **changes, compare=True)
    assert torch.equal(torch.rand(1), after) and not shown


def test_a_run_that_is_opened_again_answers_as_it_measured(pretrained, tmp_path):  # noqa: F811
    """With the CNN that came with the checkpoint, not with one of its own."""
    changes = {k: None for k in ('backbone', 'weights', 'features')} | dict(pretrain=str(pretrained), epochs=1, eval_every=1)
    finish(folder := make_run(tmp_path / 'run', **changes))
    task = open_run(folder)
    again = oneshot_summary(oneshot_table(evaluate_oneshot(task, model_answer(task.model))))
    assert again == pytest.approx({k.removeprefix('test_'): v for k, v in rows(folder)[-1].items() if k.startswith('test_')}, abs=1e-3)
    cnn = {k: v for k, v in torch.load(pretrained, weights_only=True)['model'].items() if k.startswith('backbone')}
    assert all(torch.equal(v, task.model.state_dict()[k]) for k, v in cnn.items()) and len(list(tmp_path.glob('banks/*'))) == 4


@pytest.mark.parametrize('changes, message', [
    (dict(unseen='dragon'), 'the data has no dragon; name some of its classes'), (dict(unseen=','.join(CLASSES)), 'leaves 0 of 8'),
    (dict(query_shape='round'), 'query_shape'), (dict(absent=1.5), 'must lie in'), (dict(query_augment=True), 'needs live views'),
    (dict(frozen_backbone=False), 'cached_views needs'), (dict(questions=0), 'must be positive'),
    (dict(questions=2, cached_views=0), 'questions above 1 needs cached_views'),
    (dict(questions=2, system='siamfc'), 'questions above 1 is for DETR')])
def test_the_impossible_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message): make_task(tmp_path, **changes)


def test_a_run_of_before_the_options_goes_on():
    "The configurations of the reports that were made before `questions` and `compare` are today's with these as they were"
    for name in ('oneshot_pairs', 'oneshot_animals', 'oneshot'):
        old = json.loads((Path(__file__).parents[1] / 'reports' / name / 'metrics.json').read_text())['config']
        assert not {'questions', 'compare'} & old.keys()
        now = dataclasses.asdict(OneShotConfig(**old))
        assert not cfg_changes(old, now, NEUTRAL) and list(cfg_changes(old, now | {'questions': 8}, NEUTRAL)) == ['questions']


def test_a_detector_is_no_start(tmp_path):
    model = build_detr(3, 'resnet18', enc_layers=1, **SIZES)
    torch.save({'model': model.state_dict()}, tmp_path / 'detr.pth')
    loose = {k: None for k in ('backbone', 'weights', 'features', 'nheads', 'enc_layers', 'standardize', 'pos_in_input')}
    with pytest.raises(ValueError, match='no patch2query'): make_task(tmp_path / 'run', **loose, pretrain=str(tmp_path / 'detr.pth'))
    with pytest.raises(ValueError, match='open it with Detector'): OneShotDetector.from_checkpoint(tmp_path / 'detr.pth')



# ---- photos and files -----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def two_kinds(tmp_path_factory):
    """A COCO folder of noise whose photos have one box of 'a', every other one also a box of 'b'."""
    folder = tmp_path_factory.mktemp('kinds')
    for part, n in {'train': 8, 'val': 4}.items():
        save_photos(folder / part, n, (120, 80), start=len(part) * 50)
        boxes = [{'image_id': i, 'category_id': 1, 'bbox': [10 + i, 10, 50, 40]} for i in range(n)]
        boxes += [{'image_id': i, 'category_id': 2, 'bbox': [60, 20 + i, 40, 30]} for i in range(0, n, 2)]
        (folder / 'annotations').mkdir(exist_ok=True)
        write_json(folder / 'annotations' / f'instances_{part}.json', {
            'images': [{'id': i, 'file_name': f'{i}.jpg', 'width': 120, 'height': 80} for i in range(n)],
            'categories': [{'id': 1, 'name': 'a'}, {'id': 2, 'name': 'b'}],
            'annotations': [b | {'id': k} for k, b in enumerate(boxes)]})
    return folder


@pytest.mark.parametrize('unseen_objects, photos', [('background', 8), ('drop', 4)])
def test_photos_from_a_folder(two_kinds, unseen_objects, photos, tmp_path):
    changes = dict(data=str(two_kinds), scenes=0, scenes_val=0, unseen='b', unseen_objects=unseen_objects, epochs=1, eval_every=1) | LIVE
    task = make_task(tmp_path / 'run', **changes)
    assert len(task.train_set) == photos and task.unseen == ['b'] and len(task.val_set) == 4
    for batch in task.batches(0, 2):
        assert all(len(t['boxes']) <= 1 and (t['labels'] == 1).all() and t['query'].shape == (3, 32, 32) for t in batch['targets'])
    dataset = open_dataset(two_kinds, 'val')
    pool = QueryPool(dataset, 32)
    assert [len(r) for r in pool.rows] == [4, 2]
    assert torch.equal(pool.picture(pool.rows[1][1]), query_picture(dataset[2]['image'], (60, 22, 100, 52), 32))
    assert training_photos(dataset, [1]).tolist() == [0, 2]
    finish(folder := make_run(tmp_path / 'whole', **changes))
    assert {'test_seen_AP50', 'test_unseen_AP50'} <= rows(folder)[-1].keys()


def test_as_many_photos_are_drawn_as_the_run_says(two_kinds):
    "Every other photo shows nothing that may be asked for: the draw is made of the others."
    def drawn(n): return oneshot_sets(oneshot_config('demo', data=str(two_kinds), unseen='a', photos=n))[0].image_ids
    assert drawn(0) == drawn(4) == [0, 2, 4, 6] and len(drawn(3)) == 3 and set(drawn(3)) < set(drawn(4))
    with pytest.raises(ValueError, match=r'photos 5: only 4 labelled ones; label more, or ask for .* \(0: all\)'): drawn(5)


def test_what_a_configuration_says_of_questions_arrives(tmp_path):
    "In training, in the test, and in the name of what is kept on the disk."
    law = dict(class_sampling='inverse', query_flip=.25, own_queries=False, absent=.5, seed=7)
    task = make_task(tmp_path / 'run', **LIVE, **law, query_shape='letterbox', query_augment=True, gradient_checkpointing=True)
    asker, layers = task.asker, task.model.transformer
    assert (asker.flip, asker.own, asker.absent, asker.seed, len(set(asker.weight.values())) > 1) == (.25, False, .5, 7, True)
    assert {(pool.size, pool.shape) for pool in task.pools} == {(32, 'letterbox')} and task.views.augment
    assert layers.encoder.gradient_checkpointing and layers.decoder.gradient_checkpointing
    assert not evaluate_oneshot(task, oneshot_task.chance_answer()).own
    pool = task.pools[0]
    others = [QueryPool(pool.dataset, 48, 'letterbox'), QueryPool(pool.dataset, 32), task.pools[1]]
    names = [json.dumps(oneshot_task.picture_source(task.cnn, some).what()) for some in (pool, *others)]
    assert len({*names, json.dumps(oneshot_task.picture_source(task.cnn, pool, pooled=False).what())}) == 5


@pytest.mark.parametrize('replace', [False, True])
def test_pictures_that_are_kept_are_computed_photo_by_photo(replace, two_kinds, tmp_path, monkeypatch):
    "Bit for bit those of a pool that is asked for one picture alone, and a photo is read once, whatever the number of its boxes."
    task = make_task(tmp_path / 'run', data=str(two_kinds), scenes=0, scenes_val=0, unseen='b', **LIVE)
    dataset, cnn, read = task.val_set, task.cnn, []
    alone = [oneshot_task.both_ways(QueryPool(dataset, 32), row) for row in range(6)]
    get = type(dataset).__getitem__
    monkeypatch.setattr(type(dataset), '__getitem__', lambda ds, i: read.append(i) or get(ds, i))
    source = oneshot_task.picture_source(cnn, QueryPool(dataset, 32), replace)
    found = torch.cat([arrays['feature'] for arrays, _ in source.computed([[row] for row in range(6)])])
    assert read == [0, 1, 2, 3]
    assert torch.equal(found, torch.stack([oneshot_task.picture_features(cnn, both) for both in alone]).half())


def test_pictures_are_looked_at_photo_by_photo_and_many_at_once(two_kinds, tmp_path, monkeypatch):
    task = make_task(tmp_path / 'run', data=str(two_kinds), scenes=0, scenes_val=0, unseen='b', **LIVE)
    pool, cnn = task.pools[1], task.cnn
    alone = torch.stack([oneshot_task.picture_features(cnn, pool.picture(row)[None]) for row in range(len(pool))])
    read, shown, look, kind = [], [], oneshot_task.picture_features, type(pool.dataset)
    get = kind.__getitem__
    monkeypatch.setattr(kind, '__getitem__', lambda ds, i: read.append(i) or get(ds, i))
    monkeypatch.setattr(oneshot_task, 'picture_features', lambda cnn, some, *a: shown.append(len(some)) or look(cnn, some, *a))
    for at_once in (64, 4):
        read.clear()
        assert torch.allclose(oneshot_task.live_pictures(task, pool, cnn, at_once=at_once), alone, atol=1e-5) and read == [0, 1, 2, 3]
    assert shown == [1, 6, 1, 4, 2] and len(pool) == 6  # one black picture first, for the shape
    # features are collected on the host, whatever computes them: this device would forget them
    task.processes = Processes(device=torch.device('meta'))
    assert torch.allclose(oneshot_task.live_pictures(task, pool, cnn), alone, atol=1e-5)
    task.processes = Processes()
    assert oneshot_task.live_pictures(task, pool, cnn, stop=True) is None
    assert evaluate_oneshot(task, model_answer(task.model.eval()), stop=True) is None


def test_a_comparison_begins_without_unseen_kinds(two_kinds, tmp_path, monkeypatch):
    "Photos that show 'b' beside 'a' are trained on; their pictures of 'b' are not looked at"
    shown = []
    monkeypatch.setattr(oneshot_task, 'fit_comparison', lambda compare, features, labels, seed: shown.extend(labels.tolist()))
    task = make_task(tmp_path / 'run', data=str(two_kinds), scenes=0, scenes_val=0, unseen='b', compare=True)
    assert set(task.pools[0].label) == {0, 1} and shown == [0] * 8


@pytest.mark.parametrize('compare', [False, True])
def test_the_detector_answers_as_the_task(compare, two_kinds, tmp_path):
    changes = dict(data=str(two_kinds), scenes=0, scenes_val=0, unseen='b', epochs=1, compare=compare) | LIVE
    finish(folder := make_run(tmp_path / 'run', **changes))
    detector, task = OneShotDetector.from_checkpoint(folder / 'checkpoint.pth'), make_task(tmp_path / 'again', **changes)
    assert (detector.model.compare is not None) == compare
    task.model.load_state_dict(detector.model.state_dict())
    if compare:
        with pytest.raises(ValueError, match='ask it with OneShotDetector'): QueryPatchLocalizer.from_checkpoint(folder / 'checkpoint.pth')
    evaluator, pool = evaluate_oneshot(task, model_answer(task.model.eval())), task.pools[1]
    for i, image_id in enumerate(task.val_set.image_ids):
        for label, asked in evaluator.questions(image_id):
            found, given = detector.detect(task.val_set[i]['image'], pool.picture(asked[1]), 0.), evaluator.rounds[1].predictions[image_id]
            mine = torch.as_tensor(given['labels'] == label)
            assert torch.allclose(torch.as_tensor(given['scores'])[mine].sort(descending=True).values.float(), found.scores, atol=1e-5)


@pytest.mark.data
def test_animals_with_one_class_held_out(data, tmp_path):
    """VOC's layout, real photos: cows are unseen. Two steps of training, and the questions of the test."""
    cfg = oneshot_config('demo', **TINY | dict(data=str(data / 'animals'), split='trainval', split_val='test', year='2007', year_val='2007',
                                               scenes=0, scenes_val=0, unseen='cow') | LIVE)
    task = OneShotTask(cfg, tmp_path, Processes())
    task.begin(resumed=False)
    cow = task.train_set.classes.index('cow')
    assert task.unseen == ['cow'] and all(task.pools[0].present[k] - {cow} for k in task.train_set.image_ids)
    for batch in task.batches(0, 2): assert torch.isfinite(task.module(batch)[0])
    questions = [(k, label) for k in task.val_set.image_ids for label in task.pools[1].present[k]]
    assert len(questions) >= 1000 and sum(label == cow for _, label in questions) > 50


@pytest.mark.data
def test_a_split_of_coco(data, tmp_path):
    """A COCO file of 80 classes with ids up to 90: every fourth class is unseen, and is never asked for in training."""
    file = str(data / 'coco_mini/annotations/instances_train.json')
    cfg = oneshot_config('demo', **TINY | dict(data=file, data_val=file, scenes=0, scenes_val=0, unseen='coco2', photos=40) | LIVE)
    task = OneShotTask(cfg, tmp_path, Processes())
    assert len(task.unseen) == 20 and task.unseen[:2] == ['bicycle', 'bus'] and len(task.train_set) == 40
    asked = {task.asker.draw(epoch, i, torch.tensor(sorted(task.pools[0].present[k])), k)[0]
             for epoch in range(3) for i, k in enumerate(task.train_set.image_ids)}
    assert asked and not {task.train_set.classes[k] for k in asked} & set(task.unseen)
    for batch in task.batches(0, 2): assert torch.isfinite(task.module(batch)[0])


# ---- oneshot.ipynb --------------------------------------------------------------------------------------------------

def test_a_small_run_ends_in_a_report(tmp_path, monkeypatch):
    """All its cells, in this process; papermill and a real kernel are `test_papermill`'s."""
    run_report(ONESHOT, tmp_path, monkeypatch, **TINY | dict(methods='detr', epochs=2, eval_every=1, gpus=0))
    metrics, run = json.loads((tmp_path / 'runs/reports/oneshot-demo/metrics.json').read_text()), tmp_path / 'runs/oneshot-demo-detr-42'
    assert metrics['oneshot'].keys() == {'detr', 'detr, wrong picture', 'feature matching', 'chance'}
    assert '-p scenes 8' in metrics['provenance']['command'] and 'small scale' in metrics['provenance']['scale']
    last = rows(run)[-1]
    assert metrics['oneshot']['detr']['seen_AP50']['mean'] == pytest.approx(last['test_seen_AP50'], abs=1e-3)
    assert OneShotDetector.from_checkpoint(run / 'oneshot.safetensors').query_size == 32
    with pytest.raises(ValueError, match='did you mean unseen'): run_report(ONESHOT, tmp_path, monkeypatch, unsen='cat')


def test_presets_are_configurations():
    assert oneshot_config('voc').task == 'oneshot' and make_config('demo').task == 'pretrain'
