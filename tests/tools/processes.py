"""Processes for tests: forks of one server, which has imported what they need, instead of interpreters that start from nothing.

Each of those would import torch and its companions anew, which takes longer than all that a test does in them.
"""
import multiprocessing
import os
from importlib.util import find_spec

from torch.multiprocessing import start_processes

from faults.campaign import CONTEXT, Trainer, take_environment

TASKS = [f'updetr.tasks.{name}_task' for name in ('pretrain', 'finetune', 'oneshot', 'panoptic', 'cnn')]
# the machine of a GPU may lack Jupyter
MORE = [name for name in ('hypothesis', 'matplotlib', 'nbformat', 'papermill.cli', 'pytest') if find_spec(name.split('.')[0])]
PRELOADED = [*TASKS, *MORE]
# the server passes over what it cannot import, and every process would then take seconds to begin
assert all(map(find_spec, PRELOADED)), 'a module that is to be imported beforehand is not there'
CONTEXT.set_forkserver_preload(PRELOADED)


def _call(rank, function, environment, *args):
    take_environment(environment)
    multiprocessing.set_start_method('fork', force=True)  # of data-loading children, as in `python -m updetr`
    function(rank, *args)


def in_processes(function, world, *args):
    "Call function(rank, world, *args) in so many processes at once; raises what one of them raises."
    start_processes(_call, (function, dict(os.environ), world, *args), nprocs=world, start_method='forkserver')


def trained(folder, world):
    "Train what a folder describes, in so many processes that do what `python -m updetr` does."
    trainer = Trainer(folder, world=world)
    assert trainer.wait(600) == [0] * world, trainer.said()
