"Worker processes of the loaders that cannot go on: a named error in seconds, never a hang."
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from tools.processes import in_processes
from updetr.data.loader import PatchTask, data_loader, make_sample, photo_loader
from updetr.tasks.cnn_task import object_loader
from updetr.tasks.finetune import view_loader

ITEMS = [[0, 1]] * 8


class Large(Dataset):
    "Batches of each loader, of 6 MB"
    def __init__(self, kind): self.kind = kind
    def __len__(self): return 2

    def __getitem__(self, i):
        pixels = torch.zeros(3, 1000, 1000, dtype=torch.uint8)
        if self.kind == 'view': return pixels, {'image_id': torch.tensor(i)}
        if self.kind == 'object': return {'views': pixels, 'index': i, 'skipped': []}
        task = PatchTask(2, 4, 16)
        return make_sample(np.random.default_rng(i), pixels, task, (900, 900)) | {'index': i, 'skipped': []}


class Dying(Dataset):
    "The second item costs the worker its life"
    def __len__(self): return 2

    def __getitem__(self, i):
        if i: os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3)


LOADERS = {'photo': photo_loader, 'whole': lambda *args: photo_loader(*args, whole=True), 'view': view_loader, 'object': object_loader}


def load(kind):
    return list(LOADERS[kind](Large(kind), ITEMS, 2))


def load_in_little_room(rank, world, kind, out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    try: load(kind)
    except RuntimeError as e: out.write_text(str(e))


@pytest.mark.parametrize('kind', LOADERS)
def test_shared_memory_that_is_too_small_is_named(kind, tmp_path):
    "A limit on the size of files stands for a full /dev/shm: both refuse the room for a batch"
    in_processes(load_in_little_room, 1, kind, tmp_path / 'said')
    said = (tmp_path / 'said').read_text()
    assert said.startswith('no room for a batch') and '--shm-size' in said and 'num_workers 1, or, without a GPU, 0' in said


@pytest.mark.parametrize('kind', LOADERS)
def test_where_there_is_room_workers_change_nothing(kind):
    def flat(x): return list(x.values()) if isinstance(x, dict) else x
    alone = LOADERS[kind](Large(kind), ITEMS[:1], 0)
    for a, b in zip(flat(next(iter(alone))), flat(load(kind)[0]), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)


def test_a_worker_that_is_killed_is_named():
    loader = data_loader(Dying(), [[0], [0], [1], [0]], num_workers=1)
    with pytest.raises(RuntimeError, match='memory ran out.*num_workers 1'): list(loader)


def test_no_other_loader_is_made_anywhere():
    made = [p.name for p in Path(__file__).parents[1].glob('updetr/**/*.py') if ' DataLoader(' in p.read_text()]
    assert made == []


class Numbered(Dataset):
    "Items that tell which process has read them, beside tensors of all sizes"
    def __len__(self): return 4
    def __getitem__(self, i): return {'who': torch.tensor(os.getpid()), 'small': torch.full((3,), i), 'large': torch.full((9000,), i)}


def test_workers_that_stay_are_the_same_and_leave_with_their_loader():
    "The second pass begins with the processes of the first; a pass that is left in the middle spoils nothing"
    loader = data_loader(Numbered(), [[0, 1], [2, 3], [1, 2]], num_workers=2, stay=True)
    passes = []
    for steps in (3, 1, 3):
        batches = [batch for batch, _ in zip(iter(loader), range(steps))]
        assert [b['small'][:, 0].tolist() for b in batches] == [[0, 1], [2, 3], [1, 2]][:steps]
        assert all(torch.equal(b['large'][:, 0], b['small'][:, 0]) for b in batches)
        passes.append({who for b in batches for who in b['who'].tolist()})
    assert len(passes[0]) == 2 and passes[0] == passes[2] >= passes[1]
    del loader
    for who in passes[0]:
        with pytest.raises(ProcessLookupError): os.kill(who, 0)
    assert len({who for _ in range(2) for b in data_loader(Numbered(), [[0], [1]], num_workers=1) for who in b['who'].tolist()}) == 2


def test_small_tensors_need_no_shared_memory():
    "What is handed over as bytes keeps type and shape"
    class Mixed(Dataset):
        def __getitem__(self, i):
            return {'n': torch.tensor(i), 'b': torch.zeros(0, 4), 'k': torch.ones(2, 3, dtype=torch.bool), 'text': 'a'}
    (alone,), (travelled,) = (list(data_loader(Mixed(), [[5]], list, workers)) for workers in (0, 1))
    for name, v in alone[0].items():
        other = travelled[0][name]
        assert v == other if name == 'text' else v.dtype == other.dtype and torch.equal(v, other) and not other.is_shared()
