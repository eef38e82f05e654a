"""Feature maps [N, C, ...] in memory: contiguous, or with the channels of a place together (channels last)."""

from __future__ import annotations

from torch import Tensor, empty_like

from dream_fast.kernels._core.checks import FLOATS, check_tensor


def check_feature_map(name: str, value: Tensor) -> None:
    """Check that `value` is a tensor [N, C, ...] of floats. Raises TypeError or ValueError: unless it is."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() < 2:
        raise ValueError(f"{name} must have shape [N, C, ...], got {list(value.shape)}")
    check_tensor(name, value, tuple(value.shape), dtypes=FLOATS)


def dense(x: Tensor) -> Tensor:
    """x itself where it has one of the two layouts that the kernels read, else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def laid_out_like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` where it has the strides of x, which is dense and of the same shape; else a copy with those strides.

    Strides of an axis of one element do not count.
    """
    same = all(size < 2 or a == b for size, a, b in zip(x.shape, tensor.stride(), x.stride(), strict=True))
    return tensor if same else empty_like(x).copy_(tensor)


def power_of_two(number: int) -> int:
    """Smallest power of two that is at least `number`, and at least 1."""
    return 1 << max(0, number - 1).bit_length()
