"""One step of Adan over flat parameters, fused with loss scaling, clipping of the gradient's norm and an EMA.

g = clip * inverse_scale * grads, clip = min(1, max_grad_norm / (norm + eps)), norm over all parameters together;
d = g - g_previous (0 in the first step);
m += (1 - b1)(g - m); v += (1 - b2)(d - v); n += (1 - b3)((g + b2 d)^2 - n);
p = (p - lr (m / c1 + b2 v / c2) / (sqrt(n / c3) + eps)) / (1 + lr weight_decay), c_i = 1 - b_i^step;
ema += (1 - ema_decay)(p - ema).
A gradient whose norm is not finite changes nothing, and the step is not counted.

Legend: P parameters, fp32, in groups [0, e_0), [e_0, e_1), ... with a learning rate each. All state is on the device;
the host never waits for it. No gradients.
Numerics: two kernels. The first stores a sum of squares a program; in the second every program adds those up in the
same order, so that all get the same clipping factor without atomics, and updates its part of the parameters.
Source: Xie et al., Adan: Adaptive Nesterov Momentum Algorithm, 2022, algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import FLOATS, check_kernel_dtype, check_tensor
from dream_fast.kernels._core.launch import constant, jit, launch, tl, use_triton
from dream_fast.kernels._core.operator import operator

# Most programs of the norm kernel: each program of the update reads their sums, 4 KiB.
MAX_PARTIALS = 1024
_MAX_PARTIALS = constant(MAX_PARTIALS)
_BUFFERS = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad", "ema")


@dataclass
class AdanState:
    """State of the optimiser."""

    exp_avg: Tensor  # [P] fp32 moment m of the gradient
    exp_avg_diff: Tensor  # [P] fp32 moment v of its difference
    exp_avg_sq: Tensor  # [P] fp32 moment n of the squared sum
    previous_grad: Tensor  # [P] fp32
    ema: Tensor  # [P] fp32 averaged parameters
    step: Tensor  # [] fp32 number of steps taken

    @classmethod
    def zeros(cls, params: Tensor) -> AdanState:
        """Create the state before the first step; the average starts at the parameters."""
        exp_avg, exp_avg_diff, exp_avg_sq, previous_grad = (torch.zeros_like(params) for _ in range(4))
        ema, step = params.detach().clone(), params.new_zeros(())
        return cls(exp_avg, exp_avg_diff, exp_avg_sq, previous_grad, ema, step)


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
    applied = finite.to(params.dtype)
    if max_grad_norm > 0:
        grad *= (max_grad_norm / (norm + eps)).clamp(max=1)
    # A lerp with weight 0 returns its start bit for bit if its end is finite.
    grad = torch.where(finite, grad, 0)
    diff = (grad - state.previous_grad).mul_(state.step > 0)
    state.exp_avg.lerp_(grad, (1 - beta1) * applied)
    state.exp_avg_diff.lerp_(diff, (1 - beta2) * applied)
    state.exp_avg_sq.lerp_(diff.mul_(beta2).add_(grad).square_(), (1 - beta3) * applied)
    state.previous_grad.lerp_(grad, applied)
    state.step += applied
    step = state.step.double().clamp(min=1)
    correction1, correction2, correction3 = ((1 - beta**step).to(params.dtype) for beta in betas)
    update = state.exp_avg / correction1 + state.exp_avg_diff * (beta2 / correction2)
    update /= (state.exp_avg_sq / correction3).sqrt_().add_(eps)
    start = 0
    for end, lr in zip(group_ends, lrs, strict=True):
        group = params[start:end]
        group.lerp_((group - lr * update[start:end]) / (1 + lr * weight_decay), applied)
        start = end
    state.ema.lerp_(params, applied * (1 - ema_decay))
    return ~finite


@jit
def _lerp(start, end, weight):
    """start + weight (end - start), but exactly `end` where the weight is 1, as torch.lerp."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (1 - weight) * (end - start))


@jit
def _read_scalar(value, IS_TENSOR: tl.constexpr):
    """A number, given as such or as a pointer."""
    return tl.load(value).to(tl.float32) if IS_TENSOR else value


@jit
def adan_norm_kernel(
    grads,  # [P] float
    inverse_scale,  # a number, or [] float
    step,  # [] float
    partials,  # [programs] fp32
    step_before,  # [] as step
    size,
    SCALE_IS_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of squares of the unscaled gradient, and a copy of the step."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    scale = _read_scalar(inverse_scale, SCALE_IS_TENSOR)
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    # Full blocks start at multiples of BLOCK and have no mask, so that loads are of 16 bytes whatever P is.
    full_blocks = size // BLOCK
    block = pid
    while block < full_blocks:
        grad = tl.load(grads + tl.cast(block, tl.int64) * BLOCK + lane) * scale
        squares += grad * grad
        block += programs
    if pid == full_blocks % programs:
        start = tl.cast(full_blocks, tl.int64) * BLOCK
        grad = tl.load(grads + start + lane, mask=start + lane < size, other=0.0) * scale
        squares += grad * grad
    tl.store(partials + pid, tl.sum(squares, 0))
    if pid == 0:
        # The update writes the new step while its other programs still read the old one.
        tl.store(step_before, tl.load(step))


@jit
def _step_block(
    tensors,
    start,
    size,
    lrs,
    shrinks,
    group_ends,
    eps,
    scalars,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BETA3: tl.constexpr,
    GROUPS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update parameters start, ..., start + BLOCK - 1."""
    parameters, grads, exp_avg, exp_avg_diff, exp_avg_sq, previous_grad, ema = tensors
    scale, clip, started, inverse1, inverse2, inverse3, ema_weight = scalars
    lane = tl.arange(0, BLOCK)
    index = start + lane
    mask = index < size if MASKED else None
    grad = tl.load(grads + start + lane, mask=mask) * scale * clip
    diff = (grad - tl.load(previous_grad + start + lane, mask=mask)) * started
    m = tl.load(exp_avg + start + lane, mask=mask)
    v = tl.load(exp_avg_diff + start + lane, mask=mask)
    n = tl.load(exp_avg_sq + start + lane, mask=mask)
    p = tl.load(parameters + start + lane, mask=mask)
    average = tl.load(ema + start + lane, mask=mask)

    mixed = grad + BETA2 * diff
    m = _lerp(m, grad, 1 - BETA1)
    v = _lerp(v, diff, 1 - BETA2)
    n = _lerp(n, mixed * mixed, 1 - BETA3)
    lr, shrink = lrs[0], shrinks[0]
    for group in tl.static_range(1, GROUPS):
        in_group = index >= group_ends[group - 1]
        lr = tl.where(in_group, lrs[group], lr)
        shrink = tl.where(in_group, shrinks[group], shrink)
    p = (p - lr * (m * inverse1 + v * inverse2) / (tl.sqrt(n * inverse3) + eps)) * shrink

    tl.store(previous_grad + start + lane, grad, mask=mask)
    tl.store(exp_avg + start + lane, m, mask=mask)
    tl.store(exp_avg_diff + start + lane, v, mask=mask)
    tl.store(exp_avg_sq + start + lane, n, mask=mask)
    tl.store(parameters + start + lane, p, mask=mask)
    tl.store(ema + start + lane, _lerp(average, p, ema_weight), mask=mask)


@jit
def adan_update_kernel(
    parameters,  # [P] fp32, changed in place
    grads,  # [P] float
    exp_avg,  # [P] fp32, like the next four changed in place
    exp_avg_diff,  # [P] fp32
    exp_avg_sq,  # [P] fp32
    previous_grad,  # [P] fp32
    ema,  # [P] fp32
    step,  # [] float, changed in place
    found_inf,  # [] bool
    partials,  # [partial_count] fp32
    partial_count,
    step_before,  # [] as step
    size,
    group_ends,
    lrs,
    shrinks,
    inverse_scale,  # a number, or [] float
    ema_decay,  # a number, or [] float
    eps,
    max_grad_norm,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BETA3: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    LOG_BETA3: tl.constexpr,
    GROUPS: tl.constexpr,
    CLIPS: tl.constexpr,
    SCALE_IS_TENSOR: tl.constexpr,
    DECAY_IS_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update the parameters and the state, unless the norm is not finite."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    slot = tl.arange(0, _MAX_PARTIALS)
    norm = tl.sqrt(tl.sum(tl.load(partials + slot, mask=slot < partial_count, other=0.0), 0))
    finite = norm < float("inf")  # false for NaN as well
    before = tl.load(step_before).to(tl.float64)
    if pid == 0:
        tl.store(found_inf, norm != norm or norm == float("inf"))
        tl.store(step, (before + tl.where(finite, 1, 0)).to(step.dtype.element_ty))
    clip = 1.0
    if CLIPS:
        clip = tl.minimum(max_grad_norm / (norm + eps), 1.0)
    # In fp64, because b^step is close to 1 in the first steps.
    inverse1 = (1 / (1 - tl.exp((before + 1) * LOG_BETA1))).to(tl.float32)
    inverse2 = (BETA2 / (1 - tl.exp((before + 1) * LOG_BETA2))).to(tl.float32)
    inverse3 = (1 / (1 - tl.exp((before + 1) * LOG_BETA3))).to(tl.float32)
    started = tl.where(before > 0, 1.0, 0.0)
    scale = _read_scalar(inverse_scale, SCALE_IS_TENSOR)
    ema_weight = 1 - _read_scalar(ema_decay, DECAY_IS_TENSOR)
    tensors = (parameters, grads, exp_avg, exp_avg_diff, exp_avg_sq, previous_grad, ema)
    scalars = (scale, clip, started, inverse1, inverse2, inverse3, ema_weight)
    # From the end: the norm read it last, so that part of the gradient is still in the cache.
    full_blocks = tl.where(finite, size // BLOCK, 0)
    blocks_before = pid
    while blocks_before < full_blocks:
        start = tl.cast(full_blocks - 1 - blocks_before, tl.int64) * BLOCK
        _step_block(
            tensors, start, size, lrs, shrinks, group_ends, eps, scalars, BETA1, BETA2, BETA3, GROUPS, False, BLOCK
        )
        blocks_before += programs
    if finite and pid == full_blocks % programs:
        start = tl.cast(full_blocks, tl.int64) * BLOCK
        _step_block(
            tensors, start, size, lrs, shrinks, group_ends, eps, scalars, BETA1, BETA2, BETA3, GROUPS, True, BLOCK
        )


class AdanConfig(NamedTuple):
    """Parameters of a block and most programs of both kernels, warps."""

    norm_block: int
    norm_programs: int
    update_block: int
    update_programs: int
    num_warps: int


def _adan_config() -> AdanConfig:
    return AdanConfig(
        # 8 programs of 4 warps fit on each of 132 multiprocessors.
        norm_block=2048,
        norm_programs=MAX_PARTIALS,
        # 8 numbers a lane: 14 loads of 16 bytes in flight. A program goes on to further blocks, so that the partial
        # sums are added and the corrections computed once for several blocks.
        update_block=1024,
        update_programs=132 * 16,
        num_warps=4,
    )


def _scalar(value: float | Tensor) -> tuple[float, Tensor | None]:
    """Split a scalar into the arguments of the custom operator: a number, and a tensor or None."""
    return (0.0, value) if isinstance(value, Tensor) else (float(value), None)


def _square_gradient(grads: Tensor, step: Tensor, scale: dict[str, Any], config: AdanConfig) -> tuple[Tensor, Tensor]:
    """Return partial sums of the squared gradient, fp32, and a copy of `step`; scale: arguments of both kernels."""
    size = grads.shape[0]
    programs = max(1, min(config.norm_programs, -(-size // config.norm_block)))
    partials = torch.empty(programs, dtype=torch.float32, device=grads.device)
    step_before = torch.empty_like(step)
    launch(
        adan_norm_kernel,
        (programs,),
        grads.device,
        grads=grads,
        step=step,
        partials=partials,
        step_before=step_before,
        size=size,
        BLOCK=config.norm_block,
        num_warps=config.num_warps,
        **scale,
    )
    return partials, step_before


@operator(
    "dream_fast::adan_step",
    mutates=("params", "exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad", "ema", "step"),
)
def _adan_step(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_diff: Tensor,
    exp_avg_sq: Tensor,
    previous_grad: Tensor,
    ema: Tensor,
    step: Tensor,
    group_ends: list[int],
    lrs: list[float],
    betas: list[float],
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    inverse_scale: float,
    inverse_scale_tensor: Tensor | None,
    ema_decay: float,
    ema_decay_tensor: Tensor | None,
) -> Tensor:
    size = params.shape[0]
    grads = grads.contiguous()
    scale: dict[str, Any] = {
        "inverse_scale": inverse_scale if inverse_scale_tensor is None else inverse_scale_tensor,
        "SCALE_IS_TENSOR": inverse_scale_tensor is not None,
    }
    config = _adan_config()
    partials, step_before = _square_gradient(grads, step, scale, config)
    found_inf = torch.empty((), dtype=torch.bool, device=params.device)
    logarithms = [math.log(beta) if beta > 0 else -1e30 for beta in betas]
    launch(
        adan_update_kernel,
        (max(1, min(config.update_programs, -(-size // config.update_block))),),
        params.device,
        parameters=params,
        grads=grads,
        exp_avg=exp_avg,
        exp_avg_diff=exp_avg_diff,
        exp_avg_sq=exp_avg_sq,
        previous_grad=previous_grad,
        ema=ema,
        step=step,
        found_inf=found_inf,
        partials=partials,
        partial_count=partials.shape[0],
        step_before=step_before,
        size=size,
        group_ends=tuple(group_ends),
        lrs=tuple(lrs),
        shrinks=tuple(1 / (1 + lr * weight_decay) for lr in lrs),
        ema_decay=ema_decay if ema_decay_tensor is None else ema_decay_tensor,
        eps=eps,
        max_grad_norm=max_grad_norm,
        BETA1=betas[0],
        BETA2=betas[1],
        BETA3=betas[2],
        LOG_BETA1=logarithms[0],
        LOG_BETA2=logarithms[1],
        LOG_BETA3=logarithms[2],
        GROUPS=len(lrs),
        CLIPS=max_grad_norm > 0,
        DECAY_IS_TENSOR=ema_decay_tensor is not None,
        BLOCK=config.update_block,
        num_warps=config.num_warps,
        **scale,
    )
    return found_inf


@_adan_step.register_fake
def _(params: Tensor, *_arguments, **_options) -> Tensor:
    return params.new_empty((), dtype=torch.bool)


def _check_adan(
    params: Tensor, grads: Tensor, state: AdanState, group_ends: tuple[int, ...], lrs: tuple[float, ...]
) -> None:
    """Check the arguments of `adan_step`.

    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype, device or range.
    """
    floats = (torch.float32, torch.float64)
    check_tensor("params", params, ("P",), dtypes=floats)
    size, dtypes, like = tuple(params.shape), (params.dtype,), ("params", params)
    check_tensor("grads", grads, size, dtypes=dtypes, like=like)
    for name in _BUFFERS:
        check_tensor(f"state.{name}", getattr(state, name), size, dtypes=dtypes, like=like)
    check_tensor("state.step", state.step, (), dtypes=floats, like=like)
    if len(group_ends) != len(lrs):
        raise ValueError(f"group_ends and lrs must be as many, got {len(group_ends)} and {len(lrs)}")
    if list(group_ends) != sorted(group_ends) or not group_ends or group_ends[-1] != params.shape[0]:
        raise ValueError(f"group_ends must rise to {params.shape[0]}, got {tuple(group_ends)}")


def _check_adan_kernels(params: Tensor, state: AdanState, scalars: dict[str, float | Tensor]) -> None:
    """Check the demands of the kernels on arguments that `_check_adan` has passed.

    Raises TypeError or ValueError: for fp64, strided buffers, and scalars of the wrong shape, dtype or device.
    """
    check_kernel_dtype("params", params)
    for name, buffer in {"params": params, **{f"state.{name}": getattr(state, name) for name in _BUFFERS}}.items():
        if not buffer.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {buffer.stride()}")
    for name, scalar in scalars.items():
        if isinstance(scalar, Tensor):
            check_tensor(name, scalar, (), dtypes=FLOATS, like=("params", params))


@torch.no_grad()
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

    group_ends: end of each group, the last P; lrs: a learning rate a group. max_grad_norm 0 does not clip.
    inverse_scale: 1 / the loss scale. ema_decay: weight of the old average. found_inf: the norm was not finite.
    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype, device or range.
    """
    _check_adan(params, grads, state, group_ends, lrs)
    if use_triton(params):
        _check_adan_kernels(params, state, {"inverse_scale": inverse_scale, "ema_decay": ema_decay})
        return _adan_step(
            params,
            grads,
            *(getattr(state, name) for name in _BUFFERS),
            state.step,
            list(group_ends),
            list(lrs),
            list(betas),
            eps,
            weight_decay,
            max_grad_norm,
            *_scalar(inverse_scale),
            *_scalar(ema_decay),
        )
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
