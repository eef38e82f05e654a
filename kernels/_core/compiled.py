"""Launches of kernels that are compiled already.

`kernel[grid](...)` of Triton takes 15 us for 20 arguments, as long as many a kernel runs, most of it to find what the
kernel was compiled to. Here that takes a third. What compiled code depends on is documented: a pointer's type and
whether it is a multiple of 16, a number's type and, of integers, whether it is 1 or a multiple of 16, a constant's
value, and the options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
except ModuleNotFoundError:  # the references work without
    triton = None

# Releases of Triton that specialise as above, and whose `CompiledKernel.run` takes these arguments; with others, every
# launch is Triton's. On AMD a pointer's range counts too.
_KNOWN = triton is not None and triton.__version__.startswith("3.6.") and torch.version.hip is None


class _Kernel:
    """The parameters of a kernel, each with its name and whether it is a constant, and what it was compiled to."""

    def __init__(self, function: Any) -> None:
        self.parameters = [(name, number in function.constexprs) for number, name in enumerate(function.arg_names)]
        self.compiled: dict[tuple[Any, ...], Any] = {}


_kernels: dict[Callable, _Kernel] = {}


def _specialize_number(value: Any) -> Any:
    """Properties of a number that compiled code depends on."""
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63
    return type(value)


def specialize(parameters: list[tuple[str, bool]], arguments: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Arguments in the order of `parameters`, tensors as addresses; and what compiled code depends on of each."""
    values: list[Any] = []
    key: list[Any] = []
    for name, is_constant in parameters:
        value = arguments[name]
        kind = type(value)
        if isinstance(value, Tensor):
            address = value.data_ptr()
            values.append(address)
            key.append(value.dtype)
            key.append(address & 15)
            continue
        values.append(value)
        if is_constant:
            key.append(value)
        elif kind is int:
            key.append(_specialize_number(value))
        elif kind is tuple:
            key.append(tuple(map(_specialize_number, value)))
        elif value is None or kind is float or kind is bool:
            key.append(kind)
        else:
            key += kind, value  # no launcher passes it; by its value it cannot be taken for another
    return values, key


def start_compiled(
    function: Any, grid: tuple[int, ...], device: int, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    """Start a kernel over `grid` on the current device, whose number is `device`; compile it where it has not been."""
    if not _KNOWN:
        function[grid](**arguments, **options)
        return
    kernel = _kernels.get(function.fn)
    if kernel is None:
        kernel = _kernels[function.fn] = _Kernel(function)
    values, variant = specialize(kernel.parameters, arguments)
    key = (device, *options.values(), *variant)
    compiled = kernel.compiled.get(key)
    if compiled is None or triton.knobs.runtime.launch_enter_hook.calls:  # a profiler that must see the launch
        kernel.compiled[key] = function[grid](**arguments, **options)
        return
    x, y, z, *_ = *grid, 1, 1
    stream = triton.runtime.driver.active.get_current_stream(device)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
