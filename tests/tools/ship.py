"""Weights of finished runs, in half precision, for `updetr/shipped/`: `python tests/tools/ship.py updetr=RUN detector=RUN`."""
import sys
from pathlib import Path

import torch

from updetr.core.checkpoint import export_weights, read_weights
from updetr.core.shipped import SHIPPED, shipped


class Held(torch.nn.Module):
    "A state dict as a module, for `export_weights`"
    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def state_dict(self): return self.weights


def ship(name, run):
    "Write a run's weights and configuration under a name of `SHIPPED`."
    weights, cfg = read_weights(Path(run) / 'checkpoint.pth')
    target = shipped(name)
    target.parent.mkdir(exist_ok=True)
    export_weights(target, Held(weights), cfg, half=True)
    target.chmod(0o644)
    print(f'{name}: {target.stat().st_size / 1e6:.2f} MB, {SHIPPED[name]}')


if __name__ == '__main__':
    for pair in sys.argv[1:]: ship(*pair.split('=', 1))
