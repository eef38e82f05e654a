"""Time of the processor in an operator's call from Python, without a GPU. `python -m dream_fast.bench kernels --host`.

Operators get CPU tensors and Triton a driver that compiles and starts nothing. What is left is what the host does on a
GPU too: checks, autograd, allocation, and Triton's launch up to the call of CUDA. Times are the processor's, so that
other programs on the machine matter little. They are for comparing two commits on one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, NamedTuple

import torch

from dream_fast.bench import measure
from dream_fast.bench.ops.spec import Case, Problem
from dream_fast.kernels._core.compiled import start_compiled
from dream_fast.kernels._core.launch import Launch, intercepted_launches

CALLS, BATCHES = 50, 40


# Numbers of devices, each used once, so that nothing compiled for another is found; no GPU has them.
_numbers = count(-1, -1)


class _Driver:
    """A GPU for Triton, with no more than a launch uses."""

    def __init__(self) -> None:
        self.number = next(_numbers)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def stubbed_triton(run: Callable[..., None] = lambda *_: None) -> Iterator[Callable[[Launch], None]]:
    """Give Triton a driver without a GPU; yields a function that takes a launch as far as the call of CUDA.

    run: called in place of CUDA, with grid, stream, function, metadata, hooks and the kernel's arguments.
    """
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    class Stub(CompiledKernel):
        def __init__(self, *_, **__) -> None:
            self.module = self.function = self.packed_metadata = 0
            self.name, self.src = "stub", None
            self._run = run

    def start(launch: Launch) -> None:
        launch.kernel.device_caches[stub.number]  # sets `compile`
        launch.kernel.compile = Stub
        start_compiled(launch.kernel, launch.grid, stub.number, launch.arguments, launch.options)

    stub, before = _Driver(), None
    with suppress(RuntimeError):  # without a GPU there is none
        before = driver.active
    driver.set_active(stub)
    try:
        yield start
    finally:
        driver.set_active(before)


class HostTime(NamedTuple):
    """Microseconds of the processor in a call, those of them in launches, and the number of launches."""

    call: float
    launches: float
    launch_count: int


def _prepare_call(problem: Problem, mode: str, dtype: torch.dtype) -> Callable[[], object]:
    """A call, with gradients of tensors that are ready; `spec.run` also makes them and drops results."""
    if mode == "forward":
        tensors = problem.tensors
        return lambda: problem.call(problem.operator, tensors, dtype)
    leaves = {name: problem.tensors[name].detach().requires_grad_() for name in problem.leaves}
    tensors, inputs = problem.tensors | leaves, list(leaves.values())
    used = [number for number, grad in enumerate(problem.upstream) if grad is not None]
    upstream = [problem.upstream[number] for number in used]

    def call() -> object:
        outputs = problem.call(problem.operator, tensors, dtype)
        return torch.autograd.grad([outputs[number] for number in used], inputs, upstream)

    return call


def _fastest(call: Callable[[], object]) -> float:
    """Microseconds of a call in the fastest of some batches."""
    return min(measure.time_calls(call, CALLS) for _ in range(BATCHES)) / CALLS * 1e6


def time_host(problem: Problem, mode: str, dtype: torch.dtype) -> HostTime:
    """Time of the host in a call of a problem on CPU tensors."""
    call = _prepare_call(problem, mode, dtype)
    launches: list[Launch] = []
    with intercepted_launches(launches.append):
        call()
    with intercepted_launches(lambda _: None):
        without = _fastest(call)
    with stubbed_triton() as start, intercepted_launches(start):
        with_launches = _fastest(call)
    return HostTime(with_launches, with_launches - without, len(launches))


HEAD = f"{'op':16} {'case':23} {'mode':16} {'us':>7} {'launching':>9} {'launches':>8}"


def format_row(case: Case, host: HostTime) -> str:
    """A row for the terminal."""
    return f"{case.op:16} {case.case:23} {case.mode:16} {host.call:7.1f} {host.launches:9.1f} {host.launch_count:8}"
