"""Feature maps [N, C, ...] in memory: contiguous, or with the channels of a place together (channels last)."""

from __future__ import annotations

from torch import Tensor, empty_like

from dream_fast.kernels._core.checks import FLOATS, check_tensor


def check_feature_map(name: str, value: Tensor) -> None:
    """Raise TypeError or ValueError unless `value` is a tensor [N, C, ...] of floats."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() < 2:
        raise ValueError(f"{name} must have shape [N, C, ...], got {list(value.shape)}")
    check_tensor(name, value, tuple(value.shape), dtypes=FLOATS)


def dense(x: Tensor) -> Tensor:
    """x in one of the two layouts that the kernels read; contiguous where it is in neither."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def laid_out_like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` if it lies in memory as x does, which is dense and of its shape; else a copy that does.

    How an axis of one element lies does not count.
    """
    same = all(size < 2 or a == b for size, a, b in zip(x.shape, tensor.stride(), x.stride(), strict=True))
    return tensor if same else empty_like(x).copy_(tensor)


def power_of_two(number: int) -> int:
    """The smallest power of two from `number` on, at least 1."""
    return 1 << max(0, number - 1).bit_length()
