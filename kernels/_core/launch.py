"""Launching kernels: the choice between Triton and the reference, the launch itself, and recording it.

Every kernel starts through `launch`, on the device of its tensors and torch's current stream. Inside
`intercepted_launches` a function of the caller's gets them instead; `recorded_launches` lists them, so that a machine
without a GPU can compile exactly what a GPU would run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.compiled import start_compiled

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the references work without
    triton = tl = None


# Triton decides when a kernel is defined whether it will be interpreted, so this cannot change later.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """One recorded launch: the kernel, its grid, its arguments and constants by name, the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


_intercept: Callable[[Launch], None] | None = None


def jit(function: Callable, **options: Any) -> Any:
    """`triton.jit`; without triton the plain function, which nothing calls."""
    return function if triton is None else triton.jit(function, **options)


def constant(value: Any) -> Any:
    """A module-level number that kernels may use."""
    return value if triton is None else tl.constexpr(value)


def use_triton(tensor: Tensor) -> bool:
    """True where an operator on this tensor runs its kernels: on a GPU, in the interpreter, and while intercepted.

    Raises RuntimeError: for a tensor on a GPU where triton is missing.
    """
    if tensor.is_cuda and triton is None:
        raise RuntimeError("tensors on a GPU need triton, which is not installed: pip install triton")
    return tensor.is_cuda or INTERPRETED or _intercept is not None


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 1 in the interpreter, which runs programs one by one; else an H100's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if INTERPRETED else 132


@lru_cache(maxsize=16)
def _at_least_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *,
    num_warps: int = 4,
    num_stages: int = 1,
    maxnreg: int | None = None,
    fp_fusion: bool = True,
    **arguments,
) -> None:
    """Start `kernel` over `grid` on `device` and torch's current stream; an empty grid starts nothing.

    maxnreg: the most registers a lane, so that a multiprocessor holds more programs; ignored before sm_90, whose matrix
    products need more of them. fp_fusion: allow fused multiply-adds.
    """
    if not all(grid):
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if not fp_fusion:
        options["enable_fp_fusion"] = False
    if maxnreg is not None and (_intercept is not None or _at_least_hopper(device)):
        options["maxnreg"] = maxnreg
    if _intercept is not None:
        _intercept(Launch(kernel, grid, arguments, options))
    elif device.type == "cuda":
        if torch.cuda.current_device() == device.index:
            start_compiled(kernel, grid, device.index, arguments, options)
        else:
            with torch.cuda.device(device):
                start_compiled(kernel, grid, device.index, arguments, options)
    else:
        kernel[grid](**arguments, **options)


@contextmanager
def intercepted_launches(receive: Callable[[Launch], None]) -> Iterator[None]:
    """Pass the launches of operators on CPU tensors inside the `with` block to `receive`; nothing is run."""
    global _intercept
    before, _intercept = _intercept, receive
    try:
        yield
    finally:
        _intercept = before


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """List the launches of operators on CPU tensors inside the `with` block; nothing is run."""
    launches: list[Launch] = []
    with intercepted_launches(launches.append):
        yield launches


def compile_launches(launches: Sequence[Launch], on_compiled: Callable[[int], None]) -> None:
    """Compile recorded launches of tensors on a GPU, in parallel.

    on_compiled: called with the number of kernels compiled so far, without those that already were.
    """
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool) as compiling:
        for kernel, grid, arguments, options in launches:
            kernel.warmup(grid=grid, **arguments, **options)
        for number, _ in enumerate(as_completed(compiling.raw_futures), start=1):
            on_compiled(number)
