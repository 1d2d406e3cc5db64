"""What goes out: results for COCO's own tools with the ids of the data set's files, and numbers that say what they are."""
import contextlib
import dataclasses
import io
import json
import sys
import warnings
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from conftest import ROOT
from test_finetune_runs import TINY, make_task, measured
from test_task import save_photos
from tools.cells import run_cells
from updetr.core.checkpoint import export_weights, load_checkpoint, read_weights, save_checkpoint, write_json
from updetr.data.datasets import open_dataset
from updetr.data.scenes import Scenes
from updetr.data.transforms import Sizes
from updetr.model.detr import build_detr
from updetr.predict import detector as predict_detector
from updetr.predict.detector import Detections, Detector, by_tiles, check_threshold, coco_results
from updetr.predict.export import to_huggingface
from updetr.predict.oneshot_detector import Matches, OneShotDetector
from updetr.tasks.finetune import FinetuneConfig, Subset, finetune_config
from updetr.tasks.finetune_task import evaluate, measurement
from updetr.tasks.oneshot import build_oneshot, predict_pictures
from updetr.tasks.panoptic import PanopticScenes
from updetr.tasks.panoptic_task import PanopticSubset
from updetr.train.evaluate import CocoEvaluator
from updetr.train.launch import read_log
from updetr.train.loop import Processes, train

IDS, FAR = (7, 900), 3_000_000_000_000
WIDTH, HEIGHT = 120, 80


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    """A COCO folder: ids of classes with gaps, ids of photos beyond 32 bits, one large box a photo."""
    (folder := tmp_path_factory.mktemp('ids') / 'annotations').mkdir()
    for k, (part, n) in enumerate({'train': 12, 'val': 6}.items()):
        save_photos(folder.parent / part, n, (WIDTH, HEIGHT), start=100 * k)
        edges = torch.rand(n, 4, generator=torch.Generator().manual_seed(k)) * .3
        boxes = [[a * WIDTH, b * HEIGHT, (1 - a - c) * WIDTH, (1 - b - d) * HEIGHT] for a, b, c, d in edges.tolist()]
        write_json(folder / f'instances_{part}.json', {
            'images': [{'id': FAR + i, 'file_name': f'{i}.jpg', 'width': WIDTH, 'height': HEIGHT} for i in range(n)],
            'categories': [{'id': k, 'name': f'kind {k}'} for k in IDS],
            'annotations': [{'id': i + 1, 'image_id': FAR + i, 'category_id': IDS[i % 2], 'bbox': b, 'area': b[2] * b[3], 'iscrowd': 0}
                            for i, b in enumerate(boxes)]})
    return folder.parent


@pytest.fixture(scope='module')
def run(noise, tmp_path_factory):
    """A run of three epochs on it."""
    folder = tmp_path_factory.mktemp('run')
    write_json(folder / 'cfg.json', dataclasses.asdict(finetune_config('demo', **TINY | {'data': str(noise), 'epochs': 3})))
    task = make_task(folder)
    train(task, task.cfg, folder, Processes())
    return folder


def judged(truth, results):
    """COCO's own twelve numbers, times 100, of two files."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        found = COCOeval(coco, coco.loadRes(str(results)), 'bbox')
        found.evaluate()
        found.accumulate()
        found.summarize()
    return [100 * float(v) for v in found.stats]


def test_pycocotools_on_the_results_file_gives_the_ap_of_the_log(noise, run, tmp_path):
    detector, seen = Detector.from_checkpoint(run / 'checkpoint.pth'), []
    rows = coco_results(detector, open_dataset(noise, 'val'), tmp_path / 'results.json', progress=lambda *at: seen.append(at))
    stats, last = judged(noise / 'annotations/instances_val.json', tmp_path / 'results.json'), measured(run)[-1]
    assert last['test_AP'] > 0 and stats[:2] == pytest.approx([last['test_AP'], last['test_AP50']], abs=.01)
    assert {r['category_id'] for r in rows} <= set(IDS) and {r['image_id'] for r in rows} == {FAR + i for i in range(6)}
    assert seen == [(i, 6) for i in range(1, 7)]


def test_photos_with_texts_for_ids_are_written_with_them(noise, run, tmp_path):
    """pycocotools counts texts as ids, too: results go with the very file they are made of, of a set and of a part of it."""
    content = json.loads((noise / 'annotations/instances_val.json').read_text())
    names = {p['id']: p['file_name'] for p in content['images']}
    for p in content['images']: p['id'] = names[p['id']]
    for a in content['annotations']: a['image_id'] = names[a['image_id']]
    write_json(file := tmp_path / 'texts.json', content)
    data, detector, taken = open_dataset(file, images=noise / 'val'), Detector.from_checkpoint(run / 'checkpoint.pth'), []
    rows = coco_results(detector, data, tmp_path / 'results.json', take=lambda image_id, found: taken.append(image_id))
    assert taken == data.image_ids == [1, 2, 3, 4, 5, 6] and {r['image_id'] for r in rows} == set(names.values())
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(str(file)).loadRes(str(tmp_path / 'results.json'))
    assert len(theirs.anns) == len(rows)
    part = coco_results(detector, Subset(data, [1, 4]))
    assert part == [r for r in rows if r['image_id'] in (names[FAR + 1], names[FAR + 4])]


@pytest.mark.filterwarnings('ignore:classes that the model never saw')
def test_photos_of_a_panoptic_set_are_written_with_their_texts_too(noise, run, tmp_path):
    """Its table is no table of boxes: the file's ids are its own, also where a run has chosen some of its photos."""
    truth = PanopticScenes(Scenes(3, (64, 96)))
    truth.files, truth.source = ['', '', ''], ''
    truth.file_ids = ['a/0', 'b/1', 'c/2']
    detector = Detector.from_checkpoint(run / 'checkpoint.pth', classes=truth.classes[:2])
    for photos, ids in ((truth, truth.file_ids), (PanopticSubset(Subset(truth, np.array([2, 0]))), ['c/2', 'a/0'])):
        assert list(dict.fromkeys(r['image_id'] for r in coco_results(detector, photos))) == ids


class _Numpys(torch.utils.data.Dataset):
    """A labelled set whose ids are numbers of numpy."""
    classes, category_ids, image_ids = ['cat', 'cow', 'dog', 'horse', 'sheep'], np.arange(5) * 10, np.array([FAR, 5])
    def __getitem__(self, i): return {'image': torch.zeros(3, 80, 120, dtype=torch.uint8)}
    def __len__(self): return 2


def test_results_have_a_place_and_ids_that_json_can_hold(tmp_path):
    """All photos were asked, and then the answers were lost over an id of numpy or a folder that is not there."""
    detector, taken = Detector.demo(), []
    photos = {np.int64(FAR): (80, 120), torch.tensor(4): (60, 60), 'b': (50, 60)}
    pictures = {k: torch.zeros(3, *size, dtype=torch.uint8) for k, size in photos.items()}
    file = tmp_path / 'not/there/results.json'
    rows = coco_results(detector, pictures, file, take=lambda image_id, found: taken.append(image_id))
    assert taken == [FAR, 4, 'b'] and {r['image_id'] for r in rows} == set(taken) and json.loads(file.read_text()) == rows
    rows = coco_results(detector, _Numpys(), file)
    assert json.loads(file.read_text()) == rows and {r['image_id'] for r in rows} == {FAR, 5}
    assert {r['category_id'] for r in rows} <= {0, 10, 20, 30, 40}
    with pytest.raises(IsADirectoryError, match='name a file in it'): coco_results(None, {}, tmp_path)


def test_ids_go_with_the_checkpoint_and_an_old_one_says_what_it_gives(noise, run, tmp_path):
    state = load_checkpoint(run / 'checkpoint.pth')
    assert state['category_ids'] == list(IDS) == read_weights(run / 'checkpoint.pth')[1]['category_ids']
    save_checkpoint(old := tmp_path / 'checkpoint.pth', {k: v for k, v in state.items() if k != 'category_ids'})
    val, detector = open_dataset(noise, 'val'), Detector.from_checkpoint(old)
    with pytest.warns(UserWarning, match='category_id is the label'): labels = detector(val[0]['image'], 0.).to_dict()
    assert {r['category_id'] for r in labels} <= {0, 1}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert {r['category_id'] for r in coco_results(detector, val)} <= set(IDS)  # the set knows its ids
        said = Detector.from_checkpoint(old, category_ids=IDS)(val[0]['image'], 0.).to_dict(5)
    assert {r['category_id'] for r in said} <= set(IDS) and said[0]['image_id'] == 5
    with pytest.raises(ValueError, match='2 classes, but 1 category ids'): Detector.from_checkpoint(old, category_ids=[4])


def test_a_class_that_the_files_lack_has_no_id():
    found = Detections(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(1, 4), torch.tensor([1]), torch.ones(1), ('a', 'b'),
                       category_ids=(3, None))
    with pytest.raises(ValueError, match='class 1 has no id'): found.to_dict()


class _Mine(torch.nn.Module):
    "A detector of one's own, with no more than notebook 27 asks for: `forward`, `predict`, `mean` and `std`."
    mean, std = (0., 0., 0.), (1., 1., 1.)

    def __init__(self):
        super().__init__()
        self.box = torch.nn.Parameter(torch.tensor([[1., 2, 30, 40]]))

    def forward(self, batch): return self.box.sum(), {}

    def predict(self, batch):
        answer = {'boxes': self.box, 'labels': torch.tensor([1]), 'scores': torch.tensor([.75])}
        return [answer] * len(batch['targets'])


def test_a_detector_of_ones_own_is_opened_after_its_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mymodel', SimpleNamespace(build=lambda num_classes, *cnn, **more: _Mine()))
    args = dataclasses.asdict(FinetuneConfig(detector='mymodel:build', weights='none'))
    file = tmp_path / 'checkpoint.pth'
    save_checkpoint(file, {'model': _Mine().state_dict(), 'args': args, 'class_names': ['a', 'b'], 'category_ids': list(IDS)})
    found = Detector.from_checkpoint(file)(torch.zeros(3, 80, 120, dtype=torch.uint8))
    assert found.to_dict() == [{'image_id': 0, 'category_id': IDS[1], 'bbox': [1, 2, 29, 38], 'score': .75}]
    with pytest.raises(ValueError, match='has 2 classes, but 3 names'): Detector.from_checkpoint(file, classes='abc')


def test_matches_carry_the_id_of_what_was_asked_for():
    "A one-shot detector knows one class, 'match': its id is the asker's, and without one it is 0, with no warning of unknown ids."
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    boxes = torch.tensor([[1., 2, 4, 7], [0, 0, 8, 8]])
    found = Matches(picture, boxes, torch.zeros(2).long(), torch.tensor([.5, .25]), ('match',), picture)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        rows = found.to_dict(7, FAR)
        assert [r['category_id'] for r in found.to_dict()] == [0, 0]
    assert rows == [{'image_id': 7, 'category_id': FAR, 'bbox': [1, 2, 3, 5], 'score': .5},
                    {'image_id': 7, 'category_id': FAR, 'bbox': [0, 0, 8, 8], 'score': .25}]


def test_one_shot_answers_end_at_the_photo_and_fit_the_sets_file(noise, monkeypatch):
    """Asked with an object of the set: what leaves the photo is cut off, nothing else is changed, and COCO's tool takes the results."""
    small = dict(hidden_dim=16, nheads=2, enc_layers=1, dec_layers=1, dim_feedforward=16, num_queries=5)
    torch.manual_seed(0)
    model, data, said = build_oneshot(backbone='resnet18', **small), open_dataset(noise, 'val'), []
    with torch.no_grad(): model.bbox_embed.layers[-1].bias.copy_(torch.tensor([-1., 1, 3, 3]))  # large, beyond the left and lower edge
    monkeypatch.setattr('updetr.tasks.oneshot_task.predict_pictures', lambda *args: said.append(predict_pictures(*args)) or said[-1])
    sample = data[1]
    found = OneShotDetector(model, Sizes().scaled(64))(sample['image'], sample['image'], sample['boxes'][0].tolist(), threshold=0.)
    answer = said[0][0]
    free = answer['boxes'][answer['scores'].argsort(descending=True)]
    edges = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    assert (free < 0).any() and (free > edges).any() and torch.equal(found.boxes, free.clamp(min=0).minimum(edges))
    rows = json.loads(json.dumps(found.to_dict(data.image_ids[1], data.category_ids[sample['labels'][0]])))
    assert {(r['image_id'], r['category_id']) for r in rows} == {(FAR + 1, IDS[1])}
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(COCO(str(noise / 'annotations/instances_val.json')).loadRes(rows).anns) == 5


def test_ids_travel_to_transformers():
    small = dict(hidden_dim=16, nheads=2, enc_layers=1, dec_layers=1, dim_feedforward=16, num_queries=4, pre_norm=False)
    model = build_detr(2, 'resnet18', **small)
    config = json.loads(json.dumps(to_huggingface(model, ('cat', 'dog'), IDS)[1]))
    assert config['category_ids'] == list(IDS) and config['id2label'] == {'0': 'cat', '1': 'dog'}
    assert 'category_ids' not in to_huggingface(model, ('cat', 'dog'))[1]


def test_boxes_stay_in_the_photo_and_the_measured_ones_are_the_models(noise, run):
    detector, image = Detector.from_checkpoint(run / 'checkpoint.pth'), open_dataset(noise, 'val')[0]['image']
    with torch.no_grad(): detector.module.model.bbox_embed.layers[-1].bias += 2.  # large boxes, beyond all edges
    inside, free = detector(image, 0.), detector.detect(image, 0., clip=False)
    edges = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    assert (free.boxes > edges).any() and torch.equal(inside.boxes, free.boxes.clamp(min=0).minimum(edges))
    x, y, w, h = torch.tensor([r['bbox'] for r in inside.to_dict()]).T
    assert min(x.min(), y.min()) >= 0 and (x + w).max() <= WIDTH + 1e-4 and (y + h).max() <= HEIGHT + 1e-4
    assert json.loads(json.dumps(inside.to_dict()))


def test_json_has_no_nan_and_a_shared_file_no_folders(run, tmp_path):
    write_json(tmp_path / 'a.json', {'a': float('nan'), 'b': [1., float('inf')], 'c': {'d': (2.5, None)}})
    said = (tmp_path / 'a.json').read_text()
    assert json.loads(said, parse_constant=pytest.fail) == {'a': None, 'b': [1., None], 'c': {'d': [2.5, None]}}
    args, detector = read_weights(run / 'checkpoint.pth')[1], Detector.from_checkpoint(run / 'checkpoint.pth')
    export_weights(shared := tmp_path / 'detector.safetensors', detector.module.model, args | {'weights': '/elsewhere/mine/cnn.pth'})
    assert args['data'].encode() not in (held := shared.read_bytes()) and b'/elsewhere/mine' not in held
    again, image = Detector.from_checkpoint(shared), torch.randint(256, (3, 80, 120), dtype=torch.uint8)
    assert again(image, 0.).to_dict() == detector(image, 0.).to_dict() and again.category_ids == IDS  # fp32: bit for bit


def test_a_class_that_sorts_first_shifts_no_other(noise, run, tmp_path):
    """A class more in the files, with a lower id than all others: results and AP of the others are what they were. So is what a class
    less leaves."""
    content = json.loads((noise / 'annotations/instances_val.json').read_text())
    content['categories'].append({'id': 1, 'name': 'ant'})
    content['annotations'].append({'id': 99, 'image_id': FAR, 'category_id': 1, 'bbox': [1, 1, 30, 30], 'area': 900, 'iscrowd': 0})
    write_json(tmp_path / 'more.json', content)
    detector, tables = Detector.from_checkpoint(run / 'checkpoint.pth'), []

    def table(data):
        evaluator = CocoEvaluator(data.coco())
        def take(i, found): evaluator.update([i], [{'scores': found.scores, 'labels': found.labels, 'boxes': found.boxes}])
        rows = coco_results(detector, data, take=take)
        tables.append(evaluator.per_class())
        return rows

    before = table(open_dataset(noise, 'val'))
    more = open_dataset(tmp_path / 'more.json', images=noise / 'val')
    assert more.classes[0] == 'ant' and max(t['AP'] for t in tables[0].values()) > 0
    with pytest.warns(UserWarning, match="never saw count as not found: 'ant'"): assert table(more) == before
    assert tables[1].pop('ant')['AP'] == 0 and tables[1].keys() == tables[0].keys()
    assert all(tables[1][k] == pytest.approx(tables[0][k]) for k in tables[0])
    content['categories'] = [{'id': 900, 'name': 'kind 900'}]
    content['annotations'] = [a for a in content['annotations'] if a['category_id'] == 900]
    write_json(tmp_path / 'less.json', content)
    with pytest.warns(UserWarning, match="are left out: 'kind 7'"):
        assert table(open_dataset(tmp_path / 'less.json', images=noise / 'val')) == [r for r in before if r['category_id'] == 900]
    assert tables[2].keys() == {'kind 900'} and tables[2]['kind 900'] == pytest.approx(tables[0]['kind 900'])
    content['categories'][0]['name'] = 'cow'
    write_json(tmp_path / 'none.json', content)
    with pytest.raises(ValueError, match="share no class: it knows 'kind 7', 'kind 900', the set has 'cow'"):
        coco_results(detector, open_dataset(tmp_path / 'none.json', images=noise / 'val'))


def test_a_score_is_called_a_score():
    """Its correlation with the IoU is about zero (notebook 53), so no page of the kit calls it confidence."""
    said = [(f.name, c.id, c.source) for f in (ROOT / 'nbs').rglob('*.ipynb') for c in nbformat.read(f, 4).cells]
    assert not [(name, cell) for name, cell, text in said if 'confiden' in text.lower().replace('no confidence', '')]


def test_tiles_are_joined_by_their_limits(monkeypatch):
    "Half of a cut box in a whole one is enough, an IoU of .5 is not; a border is near within a fiftieth of a tile, 2 px at least."
    boxes = torch.tensor([[0., 0, 100, 10], [80, 0, 120, 10], [81, 0, 121, 10]])
    assert predict_detector._pieces(boxes, torch.zeros(3), torch.tensor([False, True, True])).tolist() == [False, True, False]
    for height, left in ((6., 1), (4., 2)):
        two = torch.tensor([[0., 0, 10, 10], [0, 0, 10, height]])
        kept = predict_detector._join(two, torch.zeros(2), torch.tensor([.8, .9]), torch.zeros(2).bool())
        assert kept.tolist() == [1, 0][:left]
    detector = Detector.demo()
    assert not any(p.requires_grad for p in detector.module.parameters()), 'it would be folded for every picture'
    nothing = Detections(boxes, torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0), ('a',))
    monkeypatch.setattr(detector, 'detect', lambda image, threshold: nothing)
    monkeypatch.setattr(predict_detector, '_cut_off', lambda *args, near: seen.append(near) or torch.zeros(0).bool())
    for size, px in ((64, 2), (200, 4)):
        seen = []
        assert len(by_tiles(detector, torch.zeros(3, 250, 450, dtype=torch.uint8), size)) == 0 and set(seen) == {px}
    for limit in (0, 1): check_threshold(limit)


# ---- spread: one definition, in the log, in finetune's last table and in the guide -----------------------------------

def slow_spread(coco, predictions):
    """Return how far the centre of each query's box moves from photo to photo, as a share of the photo's sides; the mean of all."""
    sides, moved = {p['id']: (p['width'], p['height']) for p in coco['images']}, []
    for query in range(len(next(iter(predictions.values()))['boxes'])):
        for axis in (0, 1):
            places = [(p['boxes'][query][axis] + p['boxes'][query][axis + 2]) / 2 / sides[k][axis] for k, p in predictions.items()]
            mean = sum(places) / len(places)
            moved.append((sum((v - mean) ** 2 for v in places) / len(places)) ** .5)
    return float(sum(moved) / len(moved))


def test_the_last_table_of_a_fine_tuning_has_the_logs_spread(run):
    """The cell itself, on a finished run: the number that is logged, which is that of the checkpoint, query by query."""
    notebook = nbformat.read(ROOT / 'nbs/finetune.ipynb', 4)
    cell, tables = next(c for c in notebook.cells if 'SIGNALS = ' in c.source), []
    space = dict(runs={'detr': [run]}, logs={'detr': [read_log(run)]}, folder=run, epoch_curves=lambda *args: None,
                 save_figure=lambda *args: None, markdown_table=tables.append, Markdown=str, display=lambda shown: None)
    exec(cell.source, space)
    task = make_task(run)
    task.model.load_state_dict(load_checkpoint(run / 'checkpoint.pth')['model'])
    evaluator = evaluate(task, task.model)
    assert len(tables) == 1 and tables[0][0]['spread'] == measured(run)[-1]['test_spread'] > 0
    assert tables[0][0]['spread'] == pytest.approx(slow_spread(evaluator.coco, evaluator.predictions), abs=1e-4)


def test_the_guides_sign_of_a_collapse_is_the_logs(monkeypatch):
    """Each cause of the guide: its `spread` is what a log would have, and what the slow way finds."""
    guide, kept = run_cells(ROOT / 'nbs/guides/my_ap_is_0.ipynb', monkeypatch, 'def judge('), []
    guide['CocoEvaluator'] = lambda truth: kept.append(CocoEvaluator(truth)) or kept[-1]
    boxes = guide['perfect'](guide['samples'][0], torch.Generator().manual_seed(0))['boxes']
    for change, near_zero in ((lambda p, i: p, False), (lambda p, i: p | {'boxes': boxes, 'scores': p['scores'].roll(i)}, True)):
        said = guide['judge'](change)['spread']
        evaluator = kept[-1]
        assert said == pytest.approx(slow_spread(evaluator.coco, evaluator.predictions)) and (said < 1e-6) == near_zero
        assert measurement(evaluator)['test_spread'] == round(said, 4)
    monkeypatch.setattr('updetr.train.evaluate._spread', lambda *args: .125)  # one function, used by both
    assert guide['judge'](lambda p, i: p)['spread'] == .125 == measurement(evaluator)['test_spread']
