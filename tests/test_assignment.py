"""The GPU program of `updetr.core.assignment` without a GPU: it compiles, and Triton's interpreter finds what scipy finds."""
import os
import subprocess
import sys

import pytest

pytest.importorskip('triton')

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from updetr.core.assignment import _assign_one
kinds = {'cost': '*fp32', 'counts': '*i32', 'match': '*i64', 'N': 'i32', 'T': 'i32', 'B': 'i32', 'BLOCK': 'constexpr'}
for generation in (80, 90):
    target = GPUTarget('cuda', generation, 32)
    made = compile(ASTSource(_assign_one, kinds, {(6,): 128}), target=target, options={'num_warps': 1})
    # all vectors stay in registers
    assert f'sm_{generation}' in made.asm['ptx'] and '.local' not in made.asm['ptx']
"""
SOLVE = """
import numpy as np, torch
from scipy.optimize import linear_sum_assignment
from updetr.core.assignment import assign_on_device
from updetr.model import matcher
rng = np.random.default_rng(1)
for trial in range(12):
    N = int(rng.integers(1, 24))
    T = int(rng.integers(1, min(N, 6) + 1))
    counts = rng.integers(0, T + 1, 2).tolist()
    # few values: many ties; large ones: what a cost that is not finite becomes
    cost = torch.tensor(rng.choice([-7.5, 0., .25, 3., 1e6], (2, 2, N, T)) + (trial % 2) * rng.normal(size=(2, 2, N, T)))
    ours, theirs = assign_on_device(cost, counts), matcher.assign(cost, counts)
    assert torch.equal(ours >= 0, theirs >= 0)
    per_problem = [torch.stack([cost[l, b, m[l, b, :n], range(n)].sum() for l in range(2) for b, n in enumerate(counts)])
                   for m in (ours, theirs)]
    assert torch.allclose(*per_problem, rtol=1e-6), (trial, per_problem)
"""


@pytest.mark.parametrize('program, interpreted', [(COMPILE, '0'), (SOLVE, '1')], ids=['compiles for GPUs', 'finds what scipy finds'])
def test_the_program(program, interpreted):
    env = os.environ | {'TRITON_INTERPRET': interpreted}
    done = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
