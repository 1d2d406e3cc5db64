"Crops, collages and batches of pre-training: the law that they are drawn by, and whose seed it is."
import numpy as np
import torch

from updetr.core.photos import PRETRAIN_SIZES, builtin_photos
from updetr.data.loader import BatchPlan, PatchTask, SelfDet, Views, cut_crop, draw_crop, draw_parts, epoch_batches, random_view
from updetr.tasks.cnn_task import ObjectViews


def test_crops_are_drawn_by_their_law():
    rng = np.random.default_rng(0)
    drawn = [draw_crop(rng, 300, 400) for _ in range(4000)]
    x1, y1, x2, y2 = np.array([corners for corners, _ in drawn]).T
    share = (x2 - x1) * (y2 - y1) / (300 * 400)
    assert abs(np.mean([mirrored for _, mirrored in drawn]) - .5) < .04
    assert .29 < share.min() < .31 and share.max() > .99 and abs(np.median(share) - .65) < .03
    aspect = (x2 - x1) / (y2 - y1) / (400 / 300)
    small = share < .5                                      # no border is in their way
    assert abs(np.log(aspect[small])).max() < .31 and abs(np.log(aspect[small]).std() - .167) < .01
    assert (x1.min(), y1.min(), x2.max(), y2.max()) == (0, 0, 400, 300)
    # as often at one border as at the other, and one way says nothing of the other
    assert abs((x1 - (400 - x2)).mean()) < 8 and abs((y1 - (300 - y2)).mean()) < 6
    assert abs(np.corrcoef(x1[small], y1[small])[0, 1]) < .1
    assert all(min(draw_crop(rng, 300, 400, low=1)[0][2:]) > 250 for _ in range(20))


def test_a_crop_of_one_row_of_pixels_has_that_row():
    "Three tenths of one pixel are none: there was nothing to resize."
    for height, width in ((1, 40), (40, 1), (1, 1)):
        drawn = [draw_crop(np.random.default_rng(seed), height, width)[0] for seed in range(100)]
        assert all(0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height for x1, y1, x2, y2 in drawn)


def test_an_object_of_one_row_of_pixels_gives_views():
    sample = {'image': torch.zeros(3, 1, 40, dtype=torch.uint8), 'boxes': torch.tensor([[0., 0., 40., 1.]]),
              'labels': torch.tensor([0]), 'iscrowd': torch.tensor([False])}
    views = ObjectViews([sample] * 72)
    assert views[2, 71, 32]['views'].shape == (2, 3, 32, 32)


def test_a_mirrored_crop_has_left_and_right_exchanged():
    wide = torch.arange(24, dtype=torch.uint8).view(1, 4, 6).expand(3, -1, -1)
    part = cut_crop(wide, [1, 0, 5, 3], False, (3, 4))
    assert torch.equal(part, wide[:, :3, 1:5])
    assert torch.equal(cut_crop(wide, [1, 0, 5, 3], True, (3, 4)), part.flip(-1))


def test_a_collage_has_four_parts_in_their_order_at_an_odd_side_too():
    def one_colour(i): return torch.full((3, 40, 50), i, dtype=torch.uint8)

    for size in (64, 65):
        view = random_view(np.random.default_rng(1), one_colour, 200, size, collage=1.)
        numbers = [i for i, *_ in draw_parts(np.random.default_rng(1), lambda i: (40, 50), 200, 1.)]
        assert view.shape == (3, size, size) and len(set(numbers)) == 4
        assert [view[0, y, x].item() for y in (0, -1) for x in (0, -1)] == numbers
        assert random_view(np.random.default_rng(0), one_colour, 9, size, collage=0.).unique().numel() == 1


def test_views_and_photos_follow_seed_epoch_and_number():
    paths, task = [p.path for p in builtin_photos('train')], PatchTask(4, 10, 64)
    assert len({Views(paths, task, 10, seed)[e, i, 64]['boxes'].sum().item()
                for seed, e, i in ((42, 0, 0), (43, 0, 0), (42, 1, 0), (42, 0, 1))}) == 4
    assert max(SelfDet(paths, task, max_size=200)[3, 0, 320]['shape']) == 200


def test_batches_come_in_any_order_and_of_all_sizes():
    landscape = np.random.default_rng(0).random(1000) < .7
    sizes = np.where(landscape[:, None], (375, 500), (500, 375))
    epoch = epoch_batches(sizes, 32, 42, 0)
    first_half = np.mean([landscape[b].mean() > .5 for _, b in epoch[:15]])
    assert .4 < first_half < 1 and {s for s, _ in epoch} <= set(PRETRAIN_SIZES)
    assert len({s for s, _ in epoch}) > 5
    # a plan is that of its seed, epoch after epoch, and says how long it is
    plan = BatchPlan(sizes, 32, 70, seed=5, start_step=40, accumulate=2)
    wanted = [b for k in (1, 2) for _, b in epoch_batches(sizes, 32, 5, k)][9:39]
    got = [[i for _, i, _ in items] for items in plan]
    assert len(plan) == len(got) == 60 and np.array_equal(np.reshape(got, (30, 32)), wanted)
    assert not np.array_equal([b for _, b in epoch], [b for _, b in epoch_batches(sizes, 32, 43, 0)])
