"""Every operator under pytest-benchmark: `pytest bench`, with --benchmark-autosave and --benchmark-compare.

The cases of `python -m dream_fast.bench kernels` on a GPU, where a CUDA graph of the call is replayed, and small ones
on a CPU, by the timer of `make timing`. Only the public operators are timed: Triton on a GPU, the reference on a CPU.
"""

import time

import pytest
import torch

from dream_fast.bench import measure
from dream_fast.bench.ops.cases import FULL, SMALL, build
from dream_fast.bench.ops.spec import run

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.benchmark(timer=time.perf_counter if GPU else measure.processor_time)
CASES = FULL if GPU else SMALL
DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.case}-{case.mode}-{case.dtype}")
def test_speed(benchmark, case):
    problem = build(case, DEVICE, count_bytes=False)

    def call():
        return run(problem, problem.operator, case.mode, case.compute_dtype)

    benchmark.group = f"{case.op} {case.mode}"
    benchmark.extra_info |= {"op": case.op, "case": case.case, "mode": case.mode, "dtype": case.dtype}
    timed = measure.prepare_synchronous(call, DEVICE)
    benchmark.pedantic(timed, rounds=20 if GPU else 3, warmup_rounds=1)
