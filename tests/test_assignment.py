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
# a size of 1 is known when the program is compiled
ones = kinds | {'N': 'constexpr', 'T': 'constexpr'}
for generation, kind, known in ((80, kinds, {}), (90, kinds, {}), (90, ones, {(3,): 1, (4,): 1})):
    target = GPUTarget('cuda', generation, 32)
    made = compile(ASTSource(_assign_one, kind, {(6,): 128} | known), target=target, options={'num_warps': 1})
    # all vectors stay in registers
    assert f'sm_{generation}' in made.asm['ptx'] and '.local' not in made.asm['ptx']
"""
SOLVE = """
import numpy as np, torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from updetr.core.assignment import assign_on_device

INF, NAN = float('inf'), float('nan')
# few values: many ties; large ones; and what is no number
PALETTES = [[0.], [-7.5, 0., .25, 3.], [0., 1e6], [-7.5, .25, 3., INF, -INF, NAN], [NAN], [-1e9, 0., 1e9]]

@st.composite
def problems(draw, most_queries, most_targets):
    N, T = draw(st.integers(1, most_queries)), draw(st.integers(0, most_targets))
    L, B = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    counts = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    palette, noise = draw(st.sampled_from(PALETTES)), draw(st.sampled_from([0., 1e-6, 1.]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    cost = rng.choice(palette, (L, B, N, T)) + noise * rng.normal(size=(L, B, N, T))
    if draw(st.booleans()) and T > 1: cost[..., 1] = cost[..., 0]  # two targets alike
    return torch.tensor(cost, dtype=torch.float32), counts

def check(cost, counts):
    ours = assign_on_device(cost, torch.tensor(counts, dtype=torch.int32)).numpy()
    table = cost.nan_to_num(1e6, 1e6, 1e6).double().numpy()
    N = cost.shape[2]
    for layer in range(len(cost)):
        for b, n in enumerate(counts):
            match = ours[layer, b]
            served = [j for j in range(n) if match[j] >= 0]
            taken = match[served]
            # each query at most once, as many as fit, padding has none
            assert (match[n:] == -1).all() and len(set(taken)) == len(taken) == min(N, n) and (taken < N).all()
            best = table[layer, b][linear_sum_assignment(table[layer, b][:, :n])].sum() if n else 0
            found = table[layer, b][taken, served].sum()
            assert abs(found - best) <= 1e-6 * max(1, abs(table[layer, b]).max(initial=0)), (found, best, counts)

quiet = dict(deadline=None, derandomize=True, database=None)
settings(max_examples=40, **quiet)(given(problems(9, 9))(lambda problem: check(*problem)))()
settings(max_examples=2, **quiet)(given(problems(300, 12))(lambda problem: check(*problem)))()
rng = torch.Generator().manual_seed(0)
check(torch.randn(1, 2, 300, 40, generator=rng).round(decimals=1), [40, 7])
"""


@pytest.mark.parametrize('program, interpreted', [(COMPILE, '0'), (SOLVE, '1')], ids=['compiles for GPUs', 'finds what scipy finds'])
def test_the_program(program, interpreted):
    env = os.environ | {'TRITON_INTERPRET': interpreted}
    done = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
