"""Launches of compiled kernels: which launches share one, and what they pass on. Nothing is compiled or run."""

import random

import numpy as np
import pytest
import torch

from dream_fast.bench.ops.cases import SPECS, tiny_cases
from dream_fast.bench.ops.host import stubbed_triton
from dream_fast.bench.ops.spec import run
from dream_fast.kernels._core import compiled
from dream_fast.kernels._core.launch import INTERPRETED, Launch, intercepted_launches, jit, tl

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)


@jit
def example_kernel(x, y, number, pair, SIZE: tl.constexpr, NAME: tl.constexpr):
    pass


class Subclass(torch.Tensor):
    pass


MEMORY = torch.empty(64)
# Values that Triton may tell apart: types, alignment, 1, multiples of 16, 32 and 64 bits.
POINTERS = [MEMORY, MEMORY[1:], MEMORY[4:], MEMORY.view(torch.int32), torch.nn.Parameter(MEMORY), None]
POINTERS += [tensor.as_subclass(Subclass) for tensor in POINTERS[:4]]
NUMBERS = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 - 16, -(2**31), -(2**31) - 1, 2**40, 2**62, 2**63]
NUMBERS += [0.0, 1.0, 2.5, True, False, *map(np.float64, (1.0, 2.5))]
PAIRS = [(1, 2), (16, 2), (1, 2.0), (0.5, 2.0), (0.25, 4.0), (2**40, 2), (3, 4), (5, 6)]
CONSTANTS = [(1, "float16"), (2, "float16"), (16, "float16"), (16, "bfloat16")]


def example_arguments(x, y, number, pair, constants):
    return {"x": x, "y": y, "number": number, "pair": pair, "SIZE": constants[0], "NAME": constants[1]}


def test_specialize_tells_apart_what_triton_does():
    """Two launches with one key have one key of Triton's, over all pairs of values that it may tell apart."""
    choices = random.Random(0)
    sets = [POINTERS, POINTERS, NUMBERS, PAIRS, CONSTANTS]
    launches = [example_arguments(*(choices.choice(values) for values in sets)) for _ in range(3000)]
    for axis, values in enumerate(sets):  # and each value alone
        first = [some[0] for some in sets]
        launches += [example_arguments(*first[:axis], value, *first[axis + 1 :]) for value in values]
    parameters = compiled._Kernel(example_kernel).parameters
    with stubbed_triton():
        *_, binder = example_kernel.device_caches[triton.runtime.driver.active.get_current_device()]
        theirs = {}
        for arguments in launches:
            key = tuple(compiled.specialize(parameters, arguments)[1])
            specialization = str(binder(**arguments)[1])
            assert theirs.setdefault(key, specialization) == specialization, arguments
    # And hardly more are told apart: by an address that is no multiple of 16, or the sign of a number.
    assert len({*theirs.values()}) <= len(theirs) <= 3 * len({*theirs.values()})


@pytest.fixture
def no_kernels(monkeypatch):
    """Nothing is compiled yet."""
    monkeypatch.setattr(compiled, "_kernels", {})


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter, Subclass])
def test_start_compiled_passes_arguments_in_order(kind, no_kernels):
    """The first launch of a kind is Triton's; later ones pass grid, addresses and numbers in the parameters' order."""
    runs = []
    with stubbed_triton(lambda *values: runs.append(values)) as start:
        for number in (3, 5, 16, 32):
            x = kind(MEMORY[4:]) if kind is torch.nn.Parameter else MEMORY[4:].as_subclass(kind)
            arguments = example_arguments(x, None, number, (1, 2.0), (8, "float16"))
            start(Launch(example_kernel, (7, number), dict(reversed(arguments.items())), {"num_warps": 4}))
        start(Launch(example_kernel, (1,), arguments, {"num_warps": 8}))
    (kernel,) = compiled._kernels.values()
    assert len(kernel.compiled) == 3  # of 16 and 32 another than of 3 and 5, and another of 8 warps
    for number, values in zip((3, 5, 16, 32), runs[:4], strict=True):
        grid_and_stream, (x, *others) = values[:4], values[9:]
        assert grid_and_stream == (7, number, 1, 0)
        assert others == [None, number, (1, 2.0), 8, "float16"]
        assert (x if number in (5, 32) else x.data_ptr()) == MEMORY[4:].data_ptr()


def test_start_compiled_leaves_launches_to_profilers(no_kernels):
    """Where a hook must see launches, every launch is Triton's, which calls it."""
    runs = []
    arguments = example_arguments(MEMORY, None, 3, (1, 2.0), (8, "float16"))
    launch = Launch(example_kernel, (1,), arguments, {"num_warps": 4})
    hook = triton.knobs.runtime.launch_enter_hook
    with stubbed_triton(lambda *values: runs.append(values)) as start:
        start(launch)
        start(launch)
        hook.add(print)
        try:
            start(launch)
        finally:
            hook.remove(print)
    assert [values[7] is hook for values in runs] == [True, False, True]


@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: f"{case.op} {case.case}")
def test_start_compiled_launches_every_operator(case, no_kernels):
    """A second call launches the same kernels as the first, on the same grids, without a search by Triton."""
    problem = SPECS[case.op].build(case, count_bytes=False)
    runs = []
    with stubbed_triton(lambda *values: runs.append(values)) as start, intercepted_launches(start):
        run(problem, problem.operator, case.mode, case.compute_dtype)
        first, runs[:] = list(runs), []
        problem = SPECS[case.op].build(case, count_bytes=False)
        run(problem, problem.operator, case.mode, case.compute_dtype)
    assert [values[:4] for values in runs] == [values[:4] for values in first] and runs
    assert not any(isinstance(value, torch.Tensor) for values in runs for value in values)
