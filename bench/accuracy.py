"""The one rule for the accuracy of a computation, shared by the benchmark's gate, the doctor and the tests.

A result is right when its error is at most twice that of the plain computation in the same dtype on the same machine,
plus 1e-6. Both errors are measured against the same computation in fp64. No tolerance is chosen by hand, and none
belongs to one processor.

The error is a norm, since the largest of many rounding errors is luck:

    error = max over blocks b of rms_b(got - exact) / rms(exact)

where rms_b is over `BLOCK` consecutive elements and rms over all of them. Up to `BLOCK` elements this is the relative
error in the L2 norm. Beyond, the blocks keep one wrong element among a million from being diluted: it counts as among
`BLOCK`.

Luck decides about a few elements under any rule. Of two equally good roundings one is called wrong in 13 % of the cases
for 4 random numbers, in 2 % for 16, in none of 4000 for 64. Take inputs that give at least 64 elements, or
`check_together` for tensors that are one result.

A quantity that loses digits by its nature takes a `weight`: the inverse of its condition number. A direction g / |g|
loses them where |g| is small, so its weight is |g| of the exact computation.
"""

import math

import torch
from torch import Tensor

FACTOR, FLOOR = 2.0, 1e-6
BLOCK = 256


def error(got: Tensor, exact: Tensor, weight: Tensor | None = None) -> float:
    """Relative deviation of `got` from `exact` (fp64); infinite where `got` is not finite or has another shape.

    `weight` broadcasts against `exact` and multiplies the deviation and `exact`. The error is absolute where `exact`
    is zero everywhere, and zero where it is empty. Raises `AssertionError`: when `exact` or `weight` is not finite.
    """
    if not torch.isfinite(exact).all() or (weight is not None and not torch.isfinite(weight).all()):
        raise AssertionError("exact and weight must be finite: nothing can be compared with them")
    if got.shape != exact.shape or not torch.isfinite(got).all():
        return math.inf
    if exact.numel() == 0:
        return 0.0
    exact = exact.double()
    deviation = got.double() - exact
    if weight is not None:
        deviation, exact = deviation * weight, exact * weight
    count = exact.numel()
    block = min(BLOCK, count)
    blocks = torch.nn.functional.pad(deviation.flatten(), (0, -count % block)).view(-1, block)
    size = exact.norm().item() or math.sqrt(count)
    return blocks.norm(dim=1).max().item() * math.sqrt(count / block) / size


def tolerance(reference: Tensor, exact: Tensor, weight: Tensor | None = None) -> float:
    """The error allowed by the plain computation, `reference`, in the dtype under test.

    Raises `AssertionError`: when `reference` is not finite or has another shape than `exact`, and so allows nothing.
    """
    allowed = FACTOR * error(reference, exact, weight) + FLOOR
    if allowed == math.inf:
        raise AssertionError("the reference must be finite and of the shape of exact: nothing can be compared with it")
    return allowed


def check(name: str, got: Tensor, reference: Tensor, exact: Tensor, weight: Tensor | None = None) -> float:
    """Return the error of `got`. Raises `AssertionError`: when it is larger than `reference` allows."""
    return check_together(name, [got], [reference], [exact], [weight])


def check_fp64(name: str, got: Tensor, exact: Tensor, weight: Tensor | None = None) -> float:
    """Return the error of a computation in fp64 against an independent truth in fp64, such as a closed form.

    Raises `AssertionError`: when it is larger than 1e-6, or `got` is not fp64.
    """
    if got.dtype != torch.float64:
        raise AssertionError(f"{name}: got must be float64, is {got.dtype}")
    return check(name, got, exact, exact, weight)


def check_together(
    name: str,
    got: list[Tensor],
    reference: list[Tensor],
    exact: list[Tensor],
    weights: list[Tensor | None] | None = None,
) -> float:
    """As `check`, for tensors that are one result, such as the gradients of a network's layers.

    The worst of their errors counts. Alone, four biases of a reference in fp16 are now and then right by luck.
    """
    weights = weights or [None] * len(exact)
    worst = max(error(*tensors) for tensors in zip(got, exact, weights, strict=True))
    allowed = max(tolerance(*tensors) for tensors in zip(reference, exact, weights, strict=True))
    if not worst <= allowed:
        raise AssertionError(f"{name}: error {worst:.3g}, allowed {allowed:.3g}")
    return worst
