"""Volumetric compositing of the samples of every ray, front to back.

alpha_i = 1 - exp(-sigma_i dt_i); T_i = exp(-sum_{j<i} sigma_j dt_j), the sum over the ray's own samples;
w_i = T_i alpha_i where T_i >= stop, else 0.
Per ray: values = sum w_i v_i, opacity = sum w_i, depth = sum w_i t_i (not divided by opacity).
The background is left to the caller: add (1 - opacity) * background.

Gradients: into sigma and values, from all four outputs. With g_i the gradient of w_i,
dL/dsigma_i = dt_i (g_i T_{i+1} - sum_{j>i} g_j w_j). t, dt and the rule that ends a ray are constants.
Legend: cap rows of buffer, R rays, C channels; ray r owns rows offsets[r]:offsets[r + 1]; the rest is padding.
Units: t and dt in world units, sigma per world unit.
Numerics: sums in fp64; results in the dtype of sigma. Padding rows may hold anything. The kernels keep only the
optical depth and the sum of the backward pass in fp64, so that a ray ends where it does in the reference.
Source: Max, Optical models for direct volume rendering, 1995; Mildenhall et al., NeRF, 2020, equation 3.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import FLOATS, check_count, check_kernel_dtype, check_tensor
from dream_fast.kernels._core.launch import launch, use_triton
from dream_fast.kernels._core.operator import operator
from dream_fast.kernels._core.reference import gather_rows, live_rows, pad_rows, scatter_rows
from dream_fast.kernels.rays.composite_kernels import MAX_SAMPLE_TAU, composite_bwd_kernel, composite_fwd_kernel

# Optical depth at which every ray ends: exp(-200) is 0 in fp32, and larger depths would cost later samples digits.
_OPAQUE_TAU = 200.0


class Composited(NamedTuple):
    """Sums over each ray, and the weight of each sample."""

    values: Tensor  # [R, C]
    opacity: Tensor  # [R]
    depth: Tensor  # [R]
    weights: Tensor  # [cap]


def ray_of_row(offsets: Tensor, rows: int) -> Tensor:
    """offsets int64 [R + 1] -> int64 [rows]: the ray that owns each row of a packed buffer, R past the last ray."""
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=offsets.device)
    return starts.index_add_(0, offsets[1:].clamp(max=rows), torch.ones_like(offsets[1:])).cumsum(0)[:rows]


def composite_reference(
    sigma: Tensor,
    values: Tensor,
    t: Tensor,
    dt: Tensor,
    offsets: Tensor,
    *,
    count: Tensor | None = None,
    stop: float = 1e-4,
) -> Composited:
    """The definition of `composite` in plain PyTorch, for any float dtype."""
    rows, rays, channels = sigma.shape[0], offsets.shape[0] - 1, values.shape[1]
    live = live_rows(rows, offsets[-1] if count is None else torch.minimum(offsets[-1], count))
    ray = ray_of_row(offsets, live)
    tau = (sigma[:live].double() * dt[:live].double()).clamp(max=MAX_SAMPLE_TAU)
    # before[i] = tau_0 + ... + tau_{i-1}, over the whole buffer.
    before = torch.cat([tau.new_zeros(1), tau.cumsum(0)])
    transmittance = torch.exp(gather_rows(before, offsets[ray]) - before[:-1])
    weights = torch.where(transmittance >= stop, -torch.expm1(-tau) * transmittance, 0)
    columns = torch.cat([values[:live].double(), t[:live].double()[:, None], torch.ones_like(weights)[:, None]], 1)
    sums = scatter_rows(weights[:, None] * columns, ray, rays).to(sigma.dtype)
    return Composited(
        values=sums[:, :channels],
        opacity=sums[:, channels + 1],
        depth=sums[:, channels],
        weights=pad_rows(weights.to(sigma.dtype), rows),
    )


class CompositeConfig(NamedTuple):
    """Tiles [rays, rows] of both passes, channels a program sums, rows of padding a program fills, warps."""

    fwd_rays: int
    fwd_rows: int
    bwd_rays: int
    bwd_rows: int
    group: int
    padding: int
    num_warps: int


def _composite_config() -> CompositeConfig:
    return CompositeConfig(
        # One warp works on one ray and waits for no longer one: rays have from 0 to over a thousand samples.
        # More rows a lane: more loads in flight, more idle lanes at a ray's end. 64 rows took 0.45 ms for the
        # 32.5 M samples of 512 x 512 rays on an H200, 32 rows 0.53 and 128 rows 0.59.
        fwd_rays=1,
        fwd_rows=64,
        bwd_rays=1,
        bwd_rows=64,
        # The sums of these channels stay in registers. More channels take more programs.
        group=8,
        padding=2048,
        num_warps=1,
    )


@lru_cache(maxsize=64)
def _largest_tau(stop: float) -> tuple[float, float]:
    """Optical depth at which a ray ends: T >= stop means tau <= -log(stop). A fp32 number, and what is left of fp64."""
    limit = min(-math.log(stop), _OPAQUE_TAU) if stop > 0 else _OPAQUE_TAU
    limit32 = torch.tensor(limit, dtype=torch.float32, device="cpu").item()
    return limit32, limit - limit32


@operator("dream_fast::composite")
def _composite(
    sigma: Tensor, values: Tensor, t: Tensor, dt: Tensor, offsets: Tensor, count: Tensor | None, stop: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, channels, rays, device = sigma.shape[0], values.shape[1], offsets.shape[0] - 1, sigma.device
    config = _composite_config()
    out = sigma.new_empty(rays, channels)
    opacity, depth = sigma.new_empty(rays), sigma.new_empty(rays)
    weights = torch.empty(rows, dtype=sigma.dtype, device=device)
    lengths = torch.empty(rays, dtype=torch.int32, device=device)
    ray_tau = torch.empty(rays, dtype=torch.float64, device=device)
    limit, limit_rest = _largest_tau(stop)
    group = max(1, min(channels, config.group))
    ray_programs = -(-rays // config.fwd_rays)
    launch(
        composite_fwd_kernel,
        (ray_programs + -(-rows // config.padding), max(1, -(-channels // group))),
        device,
        num_warps=config.num_warps,
        sigma=sigma.contiguous(),
        values=values.contiguous(),
        t=t.contiguous(),
        dt=dt.contiguous(),
        offsets=offsets.contiguous(),
        count=count,
        out=out,
        opacity=opacity,
        depth=depth,
        weights=weights,
        lengths=lengths,
        ray_tau=ray_tau,
        rows=rows,
        rays=rays,
        ray_programs=ray_programs,
        limit=limit,
        limit_rest=limit_rest,
        CHANNELS=channels,
        GROUP=group,
        RAYS=config.fwd_rays,
        ROWS=config.fwd_rows,
        PADDING=config.padding,
    )
    return out, opacity, depth, weights, lengths, ray_tau


@_composite.register_fake
def _(sigma, values, t, dt, offsets, count, stop):
    rays = offsets.shape[0] - 1
    return (
        sigma.new_empty(rays, values.shape[1]),
        sigma.new_empty(rays),
        sigma.new_empty(rays),
        sigma.new_empty(sigma.shape[0]),
        sigma.new_empty(rays, dtype=torch.int32),
        sigma.new_empty(rays, dtype=torch.float64),
    )


@operator("dream_fast::composite_backward")
def _composite_backward(
    grad_out: Tensor | None,
    grad_opacity: Tensor | None,
    grad_depth: Tensor | None,
    grad_weights: Tensor | None,
    sigma: Tensor,
    values: Tensor,
    t: Tensor,
    dt: Tensor,
    offsets: Tensor,
    count: Tensor | None,
    lengths: Tensor,
    ray_tau: Tensor,
) -> tuple[Tensor, Tensor]:
    rows, channels, rays = sigma.shape[0], values.shape[1], offsets.shape[0] - 1
    config = _composite_config()
    grad_sigma = torch.empty(rows, dtype=sigma.dtype, device=sigma.device)
    grad_values = torch.empty(rows, channels, dtype=values.dtype, device=values.device)
    grads: dict[str, Tensor | None] = {
        "grad_out": grad_out,
        "grad_opacity": grad_opacity,
        "grad_depth": grad_depth,
        "grad_weights": grad_weights,
    }
    contiguous: dict[str, Any] = {name: None if grad is None else grad.contiguous() for name, grad in grads.items()}
    ray_programs = -(-rays // config.bwd_rays)
    launch(
        composite_bwd_kernel,
        (ray_programs + -(-rows // config.padding),),
        sigma.device,
        num_warps=config.num_warps,
        **contiguous,
        sigma=sigma.contiguous(),
        values=values.contiguous(),
        t=t.contiguous(),
        dt=dt.contiguous(),
        offsets=offsets.contiguous(),
        count=count,
        lengths=lengths,
        ray_tau=ray_tau,
        grad_sigma=grad_sigma,
        grad_values=grad_values,
        rows=rows,
        rays=rays,
        ray_programs=ray_programs,
        CHANNELS=channels,
        RAYS=config.bwd_rays,
        ROWS=config.bwd_rows,
        PADDING=config.padding,
    )
    return grad_sigma, grad_values


@_composite_backward.register_fake
def _(grad_out, grad_opacity, grad_depth, grad_weights, sigma, values, *_):
    return sigma.new_empty(sigma.shape), values.new_empty(values.shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output[4:])


def _backward(ctx, *grads):
    if all(grad is None for grad in grads[:4]):
        return (None,) * 7
    # t, dt and where a ray ends are constants.
    return (*_composite_backward(*grads[:4], *ctx.saved_tensors), None, None, None, None, None)


_composite.register_autograd(_backward, setup_context=_setup_context)


def composite(
    sigma: Tensor,
    values: Tensor,
    t: Tensor,
    dt: Tensor,
    offsets: Tensor,
    *,
    count: Tensor | None = None,
    stop: float = 1e-4,
) -> Composited:
    """sigma [cap], values [cap, C], t [cap], dt [cap], offsets int64 [R + 1] -> Composited.

    A ray ends at the first sample whose transmittance is below `stop` (0 = never). Rows from `count` on (an int64
    scalar tensor on the device; None: offsets[R]) weigh nothing and take no gradient.
    Raises TypeError or ValueError for arguments of the wrong type, shape, dtype or device.
    """
    check_tensor("sigma", sigma, ("cap",), dtypes=FLOATS)
    check_tensor("values", values, (sigma.shape[0], "C"), dtypes=FLOATS, like=("sigma", sigma))
    check_tensor("t", t, (sigma.shape[0],), dtypes=FLOATS, like=("sigma", sigma))
    check_tensor("dt", dt, (sigma.shape[0],), dtypes=FLOATS, like=("sigma", sigma))
    check_tensor("offsets", offsets, ("R + 1",), dtypes=(torch.int64,), like=("sigma", sigma))
    if offsets.shape[0] < 1:
        raise ValueError("offsets must have shape [R + 1], got [0]")
    check_count(count, ("sigma", sigma))
    if not 0 <= stop < 1:
        raise ValueError(f"stop must be in [0, 1), got {stop}")
    if use_triton(sigma):
        for name, value in (("sigma", sigma), ("values", values), ("t", t), ("dt", dt)):
            check_kernel_dtype(name, value)
        if values.shape[1] == 0:  # the compiler does not take a tile without columns
            one = _composite(sigma, sigma[:, None].detach(), t, dt, offsets, count, stop)[:4]
            return Composited(one[0][:, :0], *one[1:])
        return Composited(*_composite(sigma, values, t, dt, offsets, count, stop)[:4])
    return composite_reference(sigma, values, t, dt, offsets, count=count, stop=stop)
