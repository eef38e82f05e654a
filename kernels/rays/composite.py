"""Volumetric compositing of the samples of every ray, front to back.

alpha_i = 1 - exp(-sigma_i dt_i); T_i = exp(-sum_{j<i} sigma_j dt_j), the sum over the ray's own samples;
w_i = T_i alpha_i where T_i >= stop, else 0.
Per ray: values = sum w_i v_i, opacity = sum w_i, depth = sum w_i t_i (not divided by opacity).
There is no background here: add (1 - opacity) * background outside.

Gradients: into sigma and values, from all four outputs; with g_i the gradient that reaches w_i,
dL/dsigma_i = dt_i (g_i T_{i+1} - sum_{j>i} g_j w_j). t, dt and the rule that ends a ray are constants.
Legend: cap rows of buffer, R rays, C channels; ray r owns rows offsets[r]:offsets[r + 1]; the rest is padding.
Units: t and dt in world units, sigma per world unit.
Numerics: sums in fp64; results in the dtype of sigma. Whatever padding rows hold does not matter. The kernels keep only
the optical depth and the backward's sum in fp64: where a ray ends is decided as exactly as in the reference.
Source: Max, Optical models for direct volume rendering, 1995; Mildenhall et al., NeRF, 2020, equation 3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import FLOATS, check_count, check_kernel_dtype, check_tensor
from dream_fast.kernels._core.launch import constant, jit, launch, tl, use_triton
from dream_fast.kernels._core.reference import gather_rows, live_rows, pad_rows, scatter_rows

# Optical depths from which on nothing is left: exp(-200) is 0 in fp32, and a larger depth would cost the next samples'
# digits for nothing.
_OPAQUE = 200.0
_MOST = 1e4
_MOST_TAU = constant(_MOST)
_LOG2_E = constant(math.log2(math.e))


class Composited(NamedTuple):
    """values [R, C], opacity [R], depth [R], weights [cap]."""

    values: Tensor
    opacity: Tensor
    depth: Tensor
    weights: Tensor


def ray_of_row(offsets: Tensor, rows: int) -> Tensor:
    """offsets int64 [R + 1] -> int64 [rows]: the ray that owns each row of a packed buffer, R past the last ray's."""
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
    tau = (sigma[:live].double() * dt[:live].double()).clamp(max=_MOST)
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


# Tiles are [RAYS, ROWS]: consecutive samples of some rays. A ray's optical depth in front of them is carried along.


@jit
def _exp_minus(x):
    """exp(-x) in fp32 for fp64 x, to a relative error of about 1e-7 however large x is."""
    power = x * _LOG2_E
    whole = tl.floor(power.to(tl.float32))
    return tl.exp2((whole - power).to(tl.float32)) * tl.exp2(-whole)


@jit
def _alpha(tau, passed):
    """1 - exp(-tau), to a relative error of about 1e-7 also for small tau; tau fp32, passed = exp(-tau)."""
    series = 1 - tau * (1 / 7)
    series = 1 - tau * (1 / 6) * series
    series = 1 - tau * (1 / 5) * series
    series = 1 - tau * (1 / 4) * series
    series = 1 - tau * (1 / 3) * series
    series = 1 - tau * (1 / 2) * series
    return tl.where(tl.abs(tau) < 0.35, tau * series, 1 - passed)


@jit
def _optical_depth(sigma, dt, row, inside):
    """dt, and sigma dt in fp64; zeros outside."""
    length = tl.load(dt + row, mask=inside, other=0.0).to(tl.float32)
    density = tl.load(sigma + row, mask=inside, other=0.0).to(tl.float32)
    tau = density.to(tl.float64) * length.to(tl.float64)
    return length, tl.where(tau > _MOST_TAU, _MOST_TAU, tau)


@jit
def _ray_rows(offsets, count, ray, rays, rows):
    """First row [RAYS] and number of rows int32 [RAYS] of rays; 0 rows for those past the last."""
    here = ray < rays
    begin = tl.load(offsets + ray, mask=here, other=0)
    end = tl.minimum(tl.load(offsets + ray + 1, mask=here, other=0), rows)
    if count is not None:
        end = tl.minimum(end, tl.load(count))
    return begin, tl.maximum(end - begin, 0).to(tl.int32)


@jit
def _padding(offsets, count, rays, rows, program, PADDING: tl.constexpr):
    """First row, and the row after the last, of a part of the padding."""
    begin = tl.minimum(tl.load(offsets + rays), rows)
    if count is not None:
        begin = tl.minimum(begin, tl.maximum(tl.load(count), 0))
    begin += program * PADDING
    return begin, tl.minimum(begin + PADDING, rows)


@jit
def _zero(pointer, begin, end, BLOCK: tl.constexpr):
    """Fill [begin, end) of a buffer with zeros."""
    while begin < end:
        number = begin + tl.arange(0, BLOCK)
        tl.store(pointer + number, tl.zeros([BLOCK], tl.float32), mask=number < end)
        begin += BLOCK


@jit
def composite_fwd_kernel(
    sigma,
    values,
    t,
    dt,
    offsets,
    count,
    out,
    opacity,
    depth,
    weights,
    lengths,
    depths,
    rows,
    rays,
    ray_programs,
    limit,
    limit_rest,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    RAYS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Programs (rays, group of channels); those from ray_programs on fill the padding.

    A ray ends before the first sample in front of which the optical depth exceeds limit + limit_rest. lengths, depths:
    how many samples of a ray come before that, and their optical depth.
    """
    program = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    if program >= ray_programs:
        if group == 0:
            first, last = _padding(offsets, count, rays, rows, program - ray_programs, PADDING)
            _zero(weights, first, last, RAYS * ROWS)
    else:
        ray = program * RAYS + tl.arange(0, RAYS)
        here = ray < rays
        begin, samples = _ray_rows(offsets, count, ray, rays, rows)
        most = tl.full([], limit, tl.float64) + tl.full([], limit_rest, tl.float64)
        in_front = tl.zeros([RAYS], tl.float64)
        # Each lane of the tile keeps its own sums; they meet after the loop.
        zero = tl.zeros([RAYS, ROWS], tl.float32)
        alive_sum, weight_sum, depth_sum, sums = zero.to(tl.int32), zero, zero, ()
        for _ in tl.static_range(GROUP):
            sums += (zero,)
        number = 0
        running = tl.max(samples)
        while number < running:
            column = number + tl.arange(0, ROWS)[None, :]
            inside = column < samples[:, None]
            row = begin[:, None] + column
            step, tau = _optical_depth(sigma, dt, row, inside)
            before = in_front[:, None] + (tl.cumsum(tau, axis=1) - tau)
            # Written so that a NaN stays alive and shows in every sum of its ray.
            alive = inside & ~(before > most)
            single = tau.to(tl.float32)
            weight = tl.where(alive, _exp_minus(before) * _alpha(single, tl.exp(-single)), 0.0)
            in_front += tl.sum(tl.where(alive, tau, 0.0), axis=1)
            if group == 0:
                tl.store(weights + row, weight, mask=inside)
                alive_sum += alive.to(tl.int32)
                weight_sum += weight
                depth_sum += weight * tl.load(t + row, mask=alive, other=0.0).to(tl.float32)
            added = ()
            for part in tl.static_range(GROUP):
                channel = group * GROUP + part
                value = tl.load(values + row * CHANNELS + channel, mask=alive & (channel < CHANNELS), other=0.0)
                added += (sums[part] + weight * value.to(tl.float32),)
            sums = added
            number += ROWS
            running = tl.max(tl.where(in_front <= most, samples, 0))
        for part in tl.static_range(GROUP):
            channel = group * GROUP + part
            tl.store(out + ray * CHANNELS + channel, tl.sum(sums[part], axis=1), mask=here & (channel < CHANNELS))
        if group == 0:
            tl.store(opacity + ray, tl.sum(weight_sum, axis=1), mask=here)
            tl.store(depth + ray, tl.sum(depth_sum, axis=1), mask=here)
            tl.store(lengths + ray, tl.sum(alive_sum, axis=1), mask=here)
            tl.store(depths + ray, in_front, mask=here)
            # Behind the end of the last ray to end weights are zero.
            running = tl.max(samples)
            while number < running:
                column = number + tl.arange(0, ROWS)[None, :]
                tl.store(weights + begin[:, None] + column, zero, mask=column < samples[:, None])
                number += ROWS


@jit
def composite_bwd_kernel(
    grad_out,
    grad_opacity,
    grad_depth,
    grad_weights,
    sigma,
    values,
    t,
    dt,
    offsets,
    count,
    lengths,
    depths,
    grad_sigma,
    grad_values,
    rows,
    rays,
    ray_programs,
    CHANNELS: tl.constexpr,
    RAYS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDING: tl.constexpr,
):
    """From the end of each ray to its front; programs from ray_programs on fill the padding."""
    program = tl.program_id(0).to(tl.int64)
    if program >= ray_programs:
        first, last = _padding(offsets, count, rays, rows, program - ray_programs, PADDING)
        _zero(grad_sigma, first, last, RAYS * ROWS)
        _zero(grad_values, first * CHANNELS, last * CHANNELS, RAYS * ROWS)
    else:
        ray = program * RAYS + tl.arange(0, RAYS)
        here = ray < rays
        begin, samples = _ray_rows(offsets, count, ray, rays, rows)
        length = tl.load(lengths + ray, mask=here, other=0)
        in_front = tl.load(depths + ray, mask=here, other=0.0)
        behind = tl.zeros([RAYS], tl.float64)
        of_ray = tl.zeros([RAYS], tl.float32)
        if grad_opacity is not None:
            of_ray += tl.load(grad_opacity + ray, mask=here, other=0.0).to(tl.float32)
        of_depth = tl.zeros([RAYS], tl.float32)
        if grad_depth is not None:
            of_depth += tl.load(grad_depth + ray, mask=here, other=0.0).to(tl.float32)
        number = 0
        most = tl.max(length)
        while number < most:
            number += ROWS
            column = (length - number)[:, None] + tl.arange(0, ROWS)[None, :]
            inside = column >= 0
            row = begin[:, None] + column
            step, tau = _optical_depth(sigma, dt, row, inside)
            before = in_front[:, None] - tl.cumsum(tau, axis=1, reverse=True)
            in_front -= tl.sum(tau, axis=1)
            passed = _exp_minus(tau)
            transmittance = _exp_minus(before)
            weight = tl.where(inside, transmittance * _alpha(tau.to(tl.float32), passed), 0.0)
            grad = of_ray[:, None] + tl.zeros([RAYS, ROWS], tl.float32)
            if grad_depth is not None:
                grad += of_depth[:, None] * tl.load(t + row, mask=inside, other=0.0).to(tl.float32)
            if grad_weights is not None:
                grad += tl.load(grad_weights + row, mask=inside, other=0.0).to(tl.float32)
            if CHANNELS <= 8:
                for channel in tl.static_range(CHANNELS):
                    grad += _channel(grad_out, values, grad_values, ray, here, row, inside, weight, channel, CHANNELS)
            else:
                for channel in range(CHANNELS):
                    grad += _channel(grad_out, values, grad_values, ray, here, row, inside, weight, channel, CHANNELS)
            product = grad.to(tl.float64) * weight
            later = behind[:, None] + (tl.cumsum(product, axis=1, reverse=True) - product)
            behind += tl.sum(product, axis=1)
            tl.store(grad_sigma + row, step * (grad * transmittance * passed - later.to(tl.float32)), mask=inside)
        # Behind a ray's end nothing takes a gradient.
        number = 0
        most = tl.max(samples - length)
        while number < most:
            column = (length + number)[:, None] + tl.arange(0, ROWS)[None, :]
            inside = column < samples[:, None]
            row = begin[:, None] + column
            zero = tl.zeros([RAYS, ROWS], tl.float32)
            tl.store(grad_sigma + row, zero, mask=inside)
            for channel in range(CHANNELS):
                tl.store(grad_values + row * CHANNELS + channel, zero, mask=inside)
            number += ROWS


@jit
def _channel(grad_out, values, grad_values, ray, here, row, inside, weight, channel, CHANNELS: tl.constexpr):
    """One channel of the backward pass: writes its gradient, returns its part of the weights'."""
    if grad_out is None:
        tl.store(grad_values + row * CHANNELS + channel, tl.zeros_like(weight), mask=inside)
        part = tl.zeros_like(weight)
    else:
        upstream = tl.load(grad_out + ray * CHANNELS + channel, mask=here, other=0.0).to(tl.float32)[:, None]
        tl.store(grad_values + row * CHANNELS + channel, upstream * weight, mask=inside)
        part = upstream * tl.load(values + row * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    return part


def _composite_config() -> dict[str, int]:
    """One warp works on one ray, so that none waits for a longer one: rays have from no to over a thousand samples."""
    return {
        # More rows a lane: more loads in flight, more idle lanes at a ray's end. 64 rows took 0.45 ms for the
        # 32.5 M samples of 512 x 512 rays on an H200, 32 rows 0.53 and 128 rows 0.59.
        "FORWARD_RAYS": 1,
        "FORWARD_ROWS": 64,
        "BACKWARD_RAYS": 1,
        "BACKWARD_ROWS": 64,
        # Channels that one program sums: their sums stay in registers. More channels take more programs.
        "GROUP": 8,
        "PADDING": 2048,
        "num_warps": 1,
    }


@torch.library.custom_op("dream_fast::composite", mutates_args=())
def _composite(
    sigma: Tensor, values: Tensor, t: Tensor, dt: Tensor, offsets: Tensor, count: Tensor | None, stop: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, channels, rays, device = sigma.shape[0], values.shape[1], offsets.shape[0] - 1, sigma.device
    config = _composite_config()
    out = sigma.new_empty(rays, channels)
    opacity, depth = sigma.new_empty(rays), sigma.new_empty(rays)
    weights = torch.empty(rows, dtype=sigma.dtype, device=device)
    lengths = torch.empty(rays, dtype=torch.int32, device=device)
    depths = torch.empty(rays, dtype=torch.float64, device=device)
    # T >= stop is as much as depth <= -log(stop). Kernels take numbers as fp32: what that leaves comes separately.
    limit = min(-math.log(stop), _OPAQUE) if stop > 0 else _OPAQUE
    single = torch.tensor(limit, dtype=torch.float32, device="cpu").item()
    group = max(1, min(channels, config["GROUP"]))
    ray_programs = -(-rays // config["FORWARD_RAYS"])
    launch(
        composite_fwd_kernel,
        (ray_programs + -(-rows // config["PADDING"]), max(1, -(-channels // group))),
        device,
        num_warps=config["num_warps"],
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
        depths=depths,
        rows=rows,
        rays=rays,
        ray_programs=ray_programs,
        limit=single,
        limit_rest=limit - single,
        CHANNELS=channels,
        GROUP=group,
        RAYS=config["FORWARD_RAYS"],
        ROWS=config["FORWARD_ROWS"],
        PADDING=config["PADDING"],
    )
    return out, opacity, depth, weights, lengths, depths


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


@torch.library.custom_op("dream_fast::composite_backward", mutates_args=())
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
    depths: Tensor,
) -> tuple[Tensor, Tensor]:
    rows, channels, rays = sigma.shape[0], values.shape[1], offsets.shape[0] - 1
    config = _composite_config()
    grad_sigma = torch.empty(rows, dtype=sigma.dtype, device=sigma.device)
    grad_values = torch.empty(rows, channels, dtype=values.dtype, device=values.device)
    grads = {
        "grad_out": grad_out,
        "grad_opacity": grad_opacity,
        "grad_depth": grad_depth,
        "grad_weights": grad_weights,
    }
    ray_programs = -(-rays // config["BACKWARD_RAYS"])
    launch(
        composite_bwd_kernel,
        (ray_programs + -(-rows // config["PADDING"]),),
        sigma.device,
        num_warps=config["num_warps"],
        **{name: None if grad is None else grad.contiguous() for name, grad in grads.items()},
        sigma=sigma.contiguous(),
        values=values.contiguous(),
        t=t.contiguous(),
        dt=dt.contiguous(),
        offsets=offsets.contiguous(),
        count=count,
        lengths=lengths,
        depths=depths,
        grad_sigma=grad_sigma,
        grad_values=grad_values,
        rows=rows,
        rays=rays,
        ray_programs=ray_programs,
        CHANNELS=channels,
        RAYS=config["BACKWARD_RAYS"],
        ROWS=config["BACKWARD_ROWS"],
        PADDING=config["PADDING"],
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
