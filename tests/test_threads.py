"One process, several threads: a server's or a widget's. Answers are those of one thread, and copies answer for themselves."
import copy
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

from updetr import OneShotDetector
from updetr.core.photos import builtin_photos, read_photo
from updetr.predict.localizer import LastSeen

# in a process of its own: what goes wrong here leaves every nn.Module broken
FIRST_USE = textwrap.dedent('''
    from concurrent.futures import ThreadPoolExecutor
    import torch
    from updetr import Detector
    from updetr.core.photos import builtin_photos, read_photo
    from updetr.model.backbone import Backbone
    torch.set_num_threads(1)
    photos = [read_photo(p.path) for p in builtin_photos()[:6]]
    alone = [Detector.demo()(p, threshold=0).scores for p in photos[:2]]
    shared = Detector.demo()
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(Backbone, 'resnet18') for _ in range(2)]
        found = [*pool.map(lambda p: shared(p, threshold=0).scores, photos)]
        for load in loads: load.result()
    assert all(torch.equal(a, b) for a, b in zip(alone, found))
    torch.nn.Linear(2, 2)(torch.ones(2))
    print('same')
''')


def test_the_first_pictures_may_come_in_several_threads():
    ran = subprocess.run([sys.executable, '-c', FIRST_USE], capture_output=True, text=True)
    assert ran.stdout.strip().endswith('same'), ran.stderr[-2000:]


# as `gunicorn --preload` does: the parent computes, then it is forked, and the children compute
FORKED = textwrap.dedent('''
    import multiprocessing
    import torch
    from updetr import Detector
    from updetr.core.photos import builtin_photos
    assert torch.get_num_threads() == 2
    detector, files = Detector.demo(), [p.path for p in builtin_photos()[:2]]
    def scores(path): return torch.get_num_threads(), detector(path, threshold=0).scores.tolist()
    alone = [scores(f)[1] for f in files]
    with multiprocessing.get_context('fork').Pool(2) as pool: found = pool.map(scores, files)
    assert [threads for threads, _ in found] == [1, 1] and torch.get_num_threads() == 2
    for a, (_, b) in zip(alone, found): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    print('same')
''')


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='nothing is forked here')
def test_a_forked_process_answers():
    "Its parent's threads are not in it: to wait for them has no end, which only the limit of time shows"
    ran = subprocess.run([sys.executable, '-c', FORKED], env=os.environ | {'OMP_NUM_THREADS': '2'},
                         capture_output=True, text=True, timeout=300)
    assert ran.stdout.strip().endswith('same'), ran.stderr[-2000:]


def test_pictures_of_another_thread_take_nothing_away():
    "While one thread computes what is new, another one's pictures come in its place"
    inner = torch.full((1, 2, 2), 9.)

    def function(pictures):
        if pictures[0, 0, 0] == 2: seen(inner)
        return pictures.sum((1, 2))

    seen = LastSeen(function)
    first = torch.stack([torch.full((2, 2), 1.), torch.full((2, 2), 3.)])
    assert seen(first).tolist() == [4, 12]
    first[1] = 2
    assert seen(first).tolist() == [4, 8] and seen(inner).tolist() == [36]


def test_a_copy_of_a_one_shot_detector_asks_its_own_model():
    photo = read_photo(builtin_photos()[0].path)
    detector = OneShotDetector.demo()
    def scores(d): return d(photo, photo, [20, 20, 120, 120], threshold=0).scores
    before = scores(detector)
    assert torch.equal(scores(pickle.loads(pickle.dumps(detector))), before)
    other = copy.deepcopy(detector)
    with torch.no_grad():
        for p in other.model.transformer.parameters(): p.zero_()
    assert not torch.equal(scores(other), before) and torch.equal(scores(detector), before)
