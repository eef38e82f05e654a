"""Checks of an operator's arguments, with messages that name the argument and both values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    value: Tensor,
    shape: tuple[int | str | None, ...],
    *,
    dtypes: tuple[torch.dtype, ...] | None = None,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Check that `value` has this shape, one of these dtypes, and the device of `like` (a name and a tensor).

    An int in `shape` must match; a string only names a free axis in the message.
    Raises TypeError: for another type or dtype. Raises ValueError: for another shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    size = value.shape
    if len(size) != len(shape):
        raise _wrong_shape(name, size, shape)
    for axis, length in zip(shape, size, strict=True):
        if isinstance(axis, int) and axis != length:
            raise _wrong_shape(name, size, shape)
    if dtypes is not None and value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if like is not None and value.device != like[1].device:
        raise ValueError(f"{name} is on {value.device} but {like[0]} is on {like[1].device}")


def _wrong_shape(name: str, size: Sequence[int], shape: Sequence[int | str | None]) -> ValueError:
    expected = ", ".join(str(axis) for axis in shape)
    return ValueError(f"{name} must have shape [{expected}], got {list(size)}")


def check_kernel_dtype(name: str, value: Tensor) -> None:
    """Check that the kernels compute in the dtype of `value`. Raises TypeError: for float64."""
    if value.dtype == torch.float64:
        raise _not_computed(name)


def check_compute_dtype(dtype: torch.dtype) -> None:
    """Check that the kernels compute in the argument `dtype`. Raises TypeError: for float64."""
    if dtype == torch.float64:
        raise _not_computed("dtype")


def _not_computed(name: str) -> TypeError:
    return TypeError(f"{name} is float64, which the kernels do not compute in: call the operator's reference")


def check_count(count: Tensor | None, like: tuple[str, Tensor]) -> None:
    """Check that `count` is None or an int64 scalar tensor on the device of `like`.

    Raises TypeError or ValueError: as `check_tensor`.
    """
    if count is not None:
        check_tensor("count", count, (), dtypes=(torch.int64,), like=like)


def check_positive(name: str, value: float) -> None:
    """Check that a number is positive. Raises ValueError: unless value > 0, also for NaN."""
    if not value > 0:
        raise ValueError(f"{name} must be greater than 0, got {value}")
