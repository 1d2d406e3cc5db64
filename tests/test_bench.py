"The benchmark: what is counted is what is timed, a part that fails holds up no other, and no package with weights is needed."
import statistics
import sys
import time

import pytest
import torch

from updetr.bench import run
from updetr.bench.step import Clock, Counter, DetectorStep, OurStep, noise_batch, noise_batches, plain
from updetr.core.checkpoint import read_json
from updetr.core.config import make_config
from updetr.model import backbone


def test_pieces_are_timed_and_counted_with_one_batch_of_the_usual_size(monkeypatch):
    "Which was there before: a size that is new to the allocator of a GPU is slow."
    seen, step = [], DetectorStep.step

    def spy(way, batch, piece=plain):
        if way.name == 'ours': seen.append((batch['images'].numel(), piece if piece is plain else type(piece)))
        return step(way, batch, piece)
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
