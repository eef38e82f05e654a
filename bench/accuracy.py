"""The one measure of a kernel's error, shared by the benchmark's gate and the tests.

A kernel is right when its error against the reference in fp64 is at most twice that of the reference run in the
kernel's own dtype, plus 1e-6. No tolerance is chosen by hand.
"""

import torch
from torch import Tensor


def error(got: Tensor, exact: Tensor) -> float:
    """Largest deviation from `exact` (fp64), as a part of its largest value; infinite where NaN or shape is wrong."""
    if got.shape != exact.shape or not torch.isfinite(got).all():
        return float("inf")
    if exact.numel() == 0:
        return 0.0
    largest = exact.abs().max().item()
    return (got.double() - exact).abs().max().item() / (largest or 1.0)


def tolerance(reference: Tensor, exact: Tensor) -> float:
    """What a kernel's error may be, given the reference in the kernel's dtype."""
    return 2 * error(reference, exact) + 1e-6


def check_together(name: str, got: list[Tensor], reference: list[Tensor], exact: list[Tensor]) -> float:
    """As `check`, for tensors that are one result, such as the gradients of a network's layers.

    The worst of their errors counts. Alone, four biases of a reference in fp16 are now and then right by luck.
    """
    found = max(map(error, got, exact))
    allowed = max(map(tolerance, reference, exact))
    if not found <= allowed:
        raise AssertionError(f"{name}: error {found:.3g}, allowed {allowed:.3g}")
    return found


def check(name: str, got: Tensor, reference: Tensor, exact: Tensor) -> float:
    """Raise AssertionError with both errors unless `got` is accurate; returns its error."""
    found, allowed = error(got, exact), tolerance(reference, exact)
    if not found <= allowed:
        raise AssertionError(f"{name}: error {found:.3g}, allowed {allowed:.3g}")
    return found
