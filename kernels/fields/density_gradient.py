"""Normals from any density in plain PyTorch: its gradient by autograd or central differences, and the unit normal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dream_fast.kernels.fields.normals_device import FLOOR


def normal_of_gradient(gradient: Tensor) -> Tensor:
    """Gradient of a density [N, 3] -> unit normals [N, 3] against it; 0, with gradient 0, where the density is flat.

    It is flat where sigma is the same at all taps, as where the exponential is clamped. Divided by a floor instead, the
    gradient of such a normal would be ten orders of magnitude above all others.
    """
    squared = gradient.square().sum(1, keepdim=True)
    flat = squared < FLOOR
    return torch.where(flat, 0, -gradient * torch.where(flat, 1, squared).rsqrt())


def central_differences(density: Callable[[Tensor], Tensor], x: Tensor, epsilon: float, bound: float) -> Tensor:
    """Gradient [N, 3] of a density [N, 3] -> [N] at x, by steps of `epsilon` along each axis.

    Taps are clamped to the cube [-bound, bound]^3; the denominator stays 2 * epsilon.
    """
    differences = []
    for axis in range(3):
        step = torch.zeros(3, dtype=x.dtype, device=x.device)
        step[axis] = epsilon
        plus, minus = (density((x + sign * step).clamp(-bound, bound)) for sign in (1, -1))
        differences.append((plus - minus) / (2 * epsilon))
    return torch.stack(differences, 1)


def autograd_gradient(field: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """field: x [N, 3] -> density [N], anything else -> both at x, and the gradient of the density [N, 3].

    The gradient is differentiable where gradients are enabled; elsewhere nothing keeps a graph.
    """
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        at = x if training and x.requires_grad else x.detach().requires_grad_()
        density, others = field(at)
        (gradient,) = torch.autograd.grad(density.sum(), at, create_graph=training)
    if not training:
        density, others = density.detach(), others.detach()
    return density, others, gradient
