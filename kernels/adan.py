"""One step of Adan over flat parameters, with the loss scale, the clipping of the gradient's norm and the EMA in it.

g = clip * inverse_scale * grads, clip = min(1, max_grad_norm / (norm + eps)), norm over all parameters together;
d = g - g_previous (0 in the first step);
m += (1 - b1)(g - m); v += (1 - b2)(d - v); n += (1 - b3)((g + b2 d)^2 - n);
p = (p - lr (m / c1 + b2 v / c2) / (sqrt(n / c3) + eps)) / (1 + lr weight_decay), c_i = 1 - b_i^step;
ema += (1 - ema_decay)(p - ema).
A gradient whose norm is not finite changes nothing at all, and the step is not counted.

Legend: P parameters, fp32, in groups [0, e_0), [e_0, e_1), ... with a learning rate each. All state is on the device
and nothing asks the host. No gradients.
Source: Xie et al., Adan: Adaptive Nesterov Momentum Algorithm, 2022, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dream_fast.kernels._launch import check_tensor


@dataclass
class AdanState:
    """Moments of the gradient (exp_avg), of its difference (exp_avg_diff), of the squared sum (exp_avg_sq), the last
    gradient (previous_grad) and the averaged parameters (ema), each [P] fp32; step: fp32 scalar, steps taken."""

    exp_avg: Tensor
    exp_avg_diff: Tensor
    exp_avg_sq: Tensor
    previous_grad: Tensor
    ema: Tensor
    step: Tensor

    @classmethod
    def zeros(cls, params: Tensor) -> AdanState:
        """State before the first step; the average starts at the parameters."""
        moments = (torch.zeros_like(params) for _ in range(4))
        return cls(*moments, ema=params.detach().clone(), step=params.new_zeros(()))


@torch.no_grad()
def adan_step_reference(
    params: Tensor,
    grads: Tensor,
    state: AdanState,
    *,
    group_ends: tuple[int, ...],
    lrs: tuple[float, ...],
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 2e-5,
    max_grad_norm: float = 5.0,
    inverse_scale: float | Tensor = 1.0,
    ema_decay: float | Tensor = 0.95,
) -> Tensor:
    """The definition of `adan_step` in plain PyTorch."""
    beta1, beta2, beta3 = betas
    grad = grads * inverse_scale
    norm = torch.linalg.vector_norm(grad)
    finite = torch.isfinite(norm)
    keep = finite.to(params.dtype)
    if max_grad_norm > 0:
        grad *= (max_grad_norm / (norm + eps)).clamp(max=1)
    # With a weight of 0 a lerp leaves its start bit for bit, as long as its end is finite.
    grad = torch.where(finite, grad, 0)
    diff = (grad - state.previous_grad).mul_(state.step > 0)
    state.exp_avg.lerp_(grad, (1 - beta1) * keep)
    state.exp_avg_diff.lerp_(diff, (1 - beta2) * keep)
    state.exp_avg_sq.lerp_(diff.mul_(beta2).add_(grad).square_(), (1 - beta3) * keep)
    state.previous_grad.lerp_(grad, keep)
    state.step += keep
    step = state.step.double().clamp(min=1)
    correction1, correction2, correction3 = ((1 - beta**step).to(params.dtype) for beta in betas)
    update = state.exp_avg / correction1 + state.exp_avg_diff * (beta2 / correction2)
    update /= (state.exp_avg_sq / correction3).sqrt_().add_(eps)
    start = 0
    for end, lr in zip(group_ends, lrs, strict=True):
        group = params[start:end]
        group.lerp_((group - lr * update[start:end]) / (1 + lr * weight_decay), keep)
        start = end
    state.ema.lerp_(params, keep * (1 - ema_decay))
    return ~finite


def adan_step(
    params: Tensor,
    grads: Tensor,
    state: AdanState,
    *,
    group_ends: tuple[int, ...],
    lrs: tuple[float, ...],
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 2e-5,
    max_grad_norm: float = 5.0,
    inverse_scale: float | Tensor = 1.0,
    ema_decay: float | Tensor = 0.95,
) -> Tensor:
    """params [P] and state (changed in place), grads [P] (times the loss scale) -> found_inf, bool scalar tensor.

    group_ends: where each group ends, the last at P; lrs: a learning rate a group. max_grad_norm 0 does not clip.
    inverse_scale: what undoes the loss scale. ema_decay: part of the average that stays.
    Raises TypeError or ValueError for arguments of the wrong type, shape, dtype, device or range.
    """
    floats = (torch.float32, torch.float64)
    check_tensor("params", params, ("P",), dtypes=floats)
    like = ("params", params)
    check_tensor("grads", grads, (params.shape[0],), dtypes=(params.dtype,), like=like)
    for name in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad", "ema"):
        check_tensor(f"state.{name}", getattr(state, name), (params.shape[0],), dtypes=(params.dtype,), like=like)
    check_tensor("state.step", state.step, (), dtypes=floats, like=like)
    if len(group_ends) != len(lrs):
        raise ValueError(f"group_ends and lrs must be as many, got {len(group_ends)} and {len(lrs)}")
    if list(group_ends) != sorted(group_ends) or not group_ends or group_ends[-1] != params.shape[0]:
        raise ValueError(f"group_ends must rise to {params.shape[0]}, got {tuple(group_ends)}")
    return adan_step_reference(
        params,
        grads,
        state,
        group_ends=group_ends,
        lrs=lrs,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        inverse_scale=inverse_scale,
        ema_decay=ema_decay,
    )
