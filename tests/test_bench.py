"The benchmark: what is counted is what is timed, a part that fails holds up no other, and no package with weights is needed."
import statistics

from updetr.bench import run
from updetr.bench.step import Clock, Counter, DetectorStep, OurStep, noise_batches, plain
from updetr.core.config import make_config


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
