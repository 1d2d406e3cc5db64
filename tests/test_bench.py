"The benchmark: what is counted is what is timed, a part that fails holds up no other, and no package with weights is needed."
import itertools
import statistics
import sys
import time

import pytest
import torch
from PIL import Image

from updetr.bench import data, run, step
from updetr.bench.step import Clock, Counter, DetectorStep, OurStep, noise_batch, noise_batches, plain, ratio_lines
from updetr.core.checkpoint import read_json
from updetr.core.config import make_config
from updetr.model import backbone


def test_pieces_are_timed_and_counted_with_one_batch_of_the_usual_size(monkeypatch):
    "Which was there before: a size that is new to the allocator of a GPU is slow."
    seen, plain_step = [], DetectorStep.step

    def spy(way, batch, piece=plain):
        if way.name == 'ours': seen.append((batch['images'].numel(), piece if piece is plain else type(piece)))
        return plain_step(way, batch, piece)
    monkeypatch.setattr(DetectorStep, 'step', spy)
    cfg = make_config('paper', **run.TINY)
    run.bench_step(cfg, 3, 4, shrink=8)
    sizes = [b['images'].numel() for b in noise_batches(OurStep, cfg, 3, 5, shrink=8)]
    assert len(set(sizes)) > 1
    assert seen == [(statistics.median(sizes), kind) for kind in (plain, *4 * [Clock], Counter)]


@pytest.fixture
def parts(monkeypatch):
    "Three parts, the first of which fails; and in which order they were begun."
    begun = []

    def part(name):
        def measure():
            begun.append(name)
            time.sleep(.06)  # else it has taken 0.0 s
            if name == 'step': raise RuntimeError('no memory\nat all')
            return {name: len(begun)}
        return measure
    monkeypatch.setattr(run, 'bench_parts', lambda *_: {name: part(name) for name in ('step', 'growth', 'loader')})
    monkeypatch.setattr(run, 'save_pictures', lambda metrics, out: begun.append('pictures'))
    return begun


def call(monkeypatch, folder, *words):
    monkeypatch.setattr(sys, 'argv', ['bench', '--size', 'tiny', '--out', str(folder), *words])
    run.main()


def test_a_part_that_fails_holds_up_no_other(parts, tmp_path, monkeypatch, capsys):
    "The rest is measured and drawn, then the call fails; so does the next one, which tries again."
    def once(*words):
        with pytest.raises(RuntimeError, match=r'^step failed, see .*metrics\.json'): call(monkeypatch, tmp_path, *words)
    once()
    said = capsys.readouterr().out
    assert parts == ['step', 'growth', 'loader', 'pictures'] and 'step: failed\nTraceback' in said and 'in measure' in said
    assert 'step: failed, RuntimeError: no memory' in said.splitlines()
    found = read_json(tmp_path / 'metrics.json')
    assert found['failed'] == {'step': 'RuntimeError: no memory\nat all'} and found['seconds'].keys() == {'growth', 'loader'}
    # a part that is there is none of its business
    call(monkeypatch, tmp_path, '--parts', 'loader')
    parts.clear()
    once()
    assert parts == ['step', 'pictures']


def test_calls_of_one_part_each_come_to_every_part(parts, tmp_path, monkeypatch):
    for _ in range(4):
        with pytest.raises(RuntimeError, match='^step failed'): call(monkeypatch, tmp_path, '--minutes', '1e-9')
    assert [name for name in parts if name != 'pictures'] == ['step', 'growth', 'loader', 'step']


def test_a_part_that_failed_and_is_mended_is_a_part_like_others(parts, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match='^step failed'): call(monkeypatch, tmp_path)
    assert parts == ['step', 'growth', 'loader', 'pictures']
    monkeypatch.setattr(run, 'bench_parts', lambda *_: {name: lambda name=name: {name: 7} for name in ('step', 'growth', 'loader')})
    call(monkeypatch, tmp_path)
    found = read_json(tmp_path / 'metrics.json')
    assert found['step'] == 7 and found['growth'] == 2 and 'failed' not in found
    assert found['seconds'].keys() == found['commits'].keys() == {'step', 'growth', 'loader'}


def test_numbers_that_are_there_stay_when_a_part_measured_again_fails(parts, tmp_path, monkeypatch):
    call(monkeypatch, tmp_path, '--parts', 'growth')
    def stop(): raise ValueError('broken')
    monkeypatch.setattr(run, 'bench_parts', lambda *_: {'growth': stop})
    for again in (['--again'], []):
        with pytest.raises(RuntimeError, match='growth failed'): call(monkeypatch, tmp_path, *again)
        found = read_json(tmp_path / 'metrics.json')
        assert found['growth'] == 1 and found['failed'] == {'growth': 'ValueError: broken'}


def test_who_stops_a_benchmark_stops_it(tmp_path, monkeypatch):
    def stop(): raise KeyboardInterrupt
    monkeypatch.setattr(run, 'bench_parts', lambda *_: {'step': stop, 'growth': lambda: {'growth': 1}})
    with pytest.raises(KeyboardInterrupt): call(monkeypatch, tmp_path)
    assert not (tmp_path / 'metrics.json').exists()


def test_curves_and_processes_need_no_package_with_weights(monkeypatch):
    "The machine of a GPU may lack it; both compare ways, and speeds."
    asked, started = [], []
    monkeypatch.setattr(backbone, 'weights_path', lambda name, weights: asked.append(weights))
    monkeypatch.setattr(run, 'launch', lambda folder, cfg, *counts: started.append(cfg))
    monkeypatch.setattr(run, 'watch', lambda started, show: None)
    monkeypatch.setattr(run, 'read_log', lambda folder: [{'img_s': 1.}])
    run.bench_processes((1, 2))
    run.bench_curves(1, (42,), kinds=('fp32',), backbone='test_resnet', features='layer2')
    assert [cfg['weights'] for cfg in started] == ['none'] * 2 and not asked


@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_photos_of_live_steps_are_pinned_as_by_a_loader(device, monkeypatch):
    "200 MB a step from other memory are slow, and no loader hands them over so."
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda x: x + 0)
    batch = noise_batch(make_config('paper', **run.TINY), [(32, 48)] * 2)
    loaded = run._as_loaded(batch, device)
    assert loaded.keys() == batch.keys()
    for k, v in batch.items():
        if isinstance(v, torch.Tensor): assert (loaded[k] is not v) == (device == 'cuda') and torch.equal(loaded[k], v)
        else: assert loaded[k] is v
    # and so they come to the steps
    handed = []
    monkeypatch.setattr(run, '_as_loaded', lambda batch, device: handed.append(device) or batch)
    run.bench_cached(make_config('paper', **run.TINY), 1, 1, side=64)
    assert handed == ['cpu']


def test_ceilings_are_the_best_of_some_rounds(monkeypatch):
    "A product of n x n has n ** 3 multiplications and as many additions; a copy reads four bytes a cell and writes four."
    class Told(Clock):
        rounds = itertools.count(2)
        def __call__(self, name, f): self.seconds[name] = float(next(self.rounds))
    monkeypatch.setattr(step, 'Clock', Told)
    found = step.ceilings(rounds=3)
    assert found == pytest.approx({'gflop_s': 2 * 1024 ** 3 / 1e9 / 2, 'gb_s': 8 * 2 ** 24 / 1e9 / 3})


def test_growth_is_fixed_time_and_a_price_for_arithmetic(monkeypatch):
    "One number leaves the middle at a time; 5 ms whatever is done, and 2 ms a GFLOP are found again."
    asked = []

    def grow(cfg, batch_size, size, rounds, device):
        asked.append((batch_size, size, cfg.num_queries, cfg.num_patches))
        gflop = batch_size * size[0] * size[1] / 1e4
        return {'ms': 5 + 2 * gflop, 'gflop': gflop}
    monkeypatch.setattr(run, 'grow', grow)
    axes = {'batch_size': (1, 8), 'short side': (90,), 'num_queries': (40,), 'num_patches': (2,)}
    found = run.bench_growth(make_config('paper', **run.TINY), 4, axes=axes, middle=60)
    assert asked == [(1, (60, 80), 10, 5), (8, (60, 80), 10, 5), (4, (90, 120), 10, 5), (4, (60, 80), 40, 5), (4, (60, 80), 10, 2)]
    assert found['ms_fixed'] == pytest.approx(5) and found['gflop_s'] == pytest.approx(500)
    assert all(p['model_ms'] == pytest.approx(p['ms']) for p in found['points'])


def test_the_speed_of_processes_is_that_of_warm_steps(monkeypatch):
    "The first quarter of a log is left out; times as fast as one process."
    logs = {'run1': [1., 10., 10., 10.], 'run2': [1., 1., 30., 30., 30., 30., 1., 1.]}
    monkeypatch.setattr(run, 'launch', lambda *args: None)
    monkeypatch.setattr(run, 'watch', lambda started, show: None)
    monkeypatch.setattr(run, 'read_log', lambda folder: [{'step': 0}, *({'img_s': v} for v in logs[folder.name])])
    assert [(r['img_s'], r['speedup']) for r in run.bench_processes((1, 2))] == [(10, 1), (30, 3)]


def test_steps_from_a_bank_are_cached_ones(monkeypatch):
    monkeypatch.setattr(run, 'in_turn', lambda contenders, *more: {'ours': [2.], 'reference': [6.]})
    found = run.bench_cached(make_config('paper', **run.TINY), 12, side=64)
    assert (found['cached_img_s'], found['live_img_s'], found['ratio']) == (6, 2, 3)


def test_a_pace_is_of_the_steps_after_the_clock_has_started(monkeypatch):
    "Three of five, in 12 s."
    times = iter((100., 112.))
    monkeypatch.setattr(run.time, 'perf_counter', lambda: next(times))
    class Way:
        device = torch.device('cpu')
        def run(self, batches): yield from batches
    assert run.pace(Way(), range(5), 2) == .25


def test_photos_from_files_are_compared_with_those_in_memory(monkeypatch, tmp_path):
    "Round by round: steps from memory, then with patches that workers cut, then with whole photos."
    paces = iter((1., 1., 1., 10., 4., 5.))
    monkeypatch.setattr(run, 'pace', lambda way, batches, passed: next(paces))
    found = run.bench_end_to_end(make_config('paper', **run.TINY), data.imagenet_sized(tmp_path, 2), 2, 2, rounds=1)
    assert [found[f'{k}img_s'] for k in ('synthetic_', '', 'whole_')] == [20, 8, 10]
    assert (found['ratio'], found['ratio_whole']) == (.4, .5)


def test_time_of_workers_is_that_between_their_first_and_last_batch(monkeypatch):
    "What a worker did to begin, and its first batch, is left out: here 30 photos in 1.5 s."
    notes = [(1, 5., 10), (2, 7., 10), (1, 5.5, 10), (1, 6., 10), (2, 7.5, 10)]
    monkeypatch.setattr(data, 'data_loader', lambda *args: [(None, note) for note in notes])
    ms, _ = data._through_workers(None, [], 2, None)
    assert ms == 50


def test_photos_of_imagenets_size_lie_and_stand(tmp_path):
    sizes = [Image.open(path).size for path in data.imagenet_sized(tmp_path, 12)]
    assert set(sizes) == {(500, 375), (375, 500)} and sizes.count((500, 375)) > 6


@pytest.mark.parametrize('wrong', ['_ours', '_plain_pycocotools'])
def test_a_way_of_evaluation_with_other_numbers_is_no_way(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(data, '_plain_pycocotools', lambda *args: [.5] * 12)
    monkeypatch.setattr(data, '_ours', lambda *args: [.5] * 12)
    monkeypatch.setattr(data, '_sharded', lambda *args: (1., 1., [.5] * 12))
    data.bench_evaluation(tmp_path, 3, 5, 2)
    monkeypatch.setattr(data, wrong, lambda *args: [.5] * 11 + [.25])
    with pytest.raises(RuntimeError, match='one_process gives other numbers'): data.bench_evaluation(tmp_path, 3, 5, 2)


def test_the_ratio_of_each_way_is_printed():
    said = ratio_lines({'evaluation': {'reference': {'ratio': 1.}, 'sharded': {'ratio': 2.}}, 'step': {'ratio': 3.}})
    assert said == ['evaluation: sharded 2.00', 'step: ratio 3.00']
