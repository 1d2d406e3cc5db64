"Another seed is another training: each thing that is drawn, by itself. (All other tests run with the seed that is the default.)"
import numpy as np
import pytest
import torch

from test_logged import MAKE, open_task
from test_task import make_task, save_photos, small_photos  # noqa: F401 (a fixture: photos of 64 and 80 px)
from updetr.tasks.finetune import train_plan

N = 40  # queries: all the same are kept in one draw of 10^12


def order(plan): return torch.tensor([i for items in plan for _, i, *_ in items])


def drawn_before(task):
    "What a pre-training draws: the order of photos, patches and kept queries of one photo, the start of the model."
    photo = task.dataset[0, 0, 64]
    return {'order': order(task.plan(0, 2 * task.steps_per_epoch)), 'patches': photo['boxes'], 'kept': photo['keep'],
            'weights': task.model.query_embed.weight}


def drawn_labelled(task):
    "What a training on labelled photos draws: which of them, their order, a view of one, the start of the model."
    plan = train_plan(task.cfg, task.train_set, 0, 2 * task.steps_per_epoch)
    weights = [p for p in task.model.parameters() if p.requires_grad and p.dim() > 1]
    return {'chosen': task.train_set.chosen, 'order': order(plan), 'view': task.views[0, 0][0], 'weights': weights[0]}


def compare(draw, make):
    "All that is drawn is another thing with another seed, and the same with the same one."
    first, again, other = (draw(make(k, seed)) for k, seed in enumerate((1, 1, 2)))
    for k, v in first.items():
        v, again_v, other_v = (torch.as_tensor(x[k]) for x in (first, again, other))
        assert torch.equal(v, again_v), k
        assert not torch.equal(v, other_v), k


@pytest.mark.parametrize('views', [{}, dict(views=12, view_size=64)], ids=['photos', 'views'])
def test_of_a_pre_training(views, tmp_path):
    data = str(save_photos(tmp_path / 'photos', 12))
    def make(k, seed): return make_task(tmp_path / str(k), data=data, seed=seed, num_queries=N, mask_ratio=.5, **views)
    compare(drawn_before, make)


@pytest.mark.parametrize('kind', ['finetune', 'oneshot', 'boxes'])
def test_of_a_training_on_labelled_photos(kind, tmp_path):
    def make(k, seed): return open_task(MAKE[kind](seed=seed, photos=7, scenes=12, batch_size=1), tmp_path / str(k))
    compare(drawn_labelled, make)


def test_of_stored_features(tmp_path):
    "Which of the patches that are kept, and which queries keep theirs: drawn anew in each epoch."
    kept = dict(views=4, view_size=64, cache_features=True, cached_patches=20, mask_ratio=.5, num_queries=N)
    banks = []
    for seed in (1, 2):
        task = make_task(tmp_path / str(seed), seed=seed, **kept)
        task.begin(resumed=False)
        banks.append(task.bank)
    draws = [bank.draw([(epoch, i, 64)]) for bank in banks for epoch in (0, 1) for i in (0, 1)]
    for part in range(2): assert len({np.asarray(d[part]).tobytes() for d in draws}) == len(draws)
