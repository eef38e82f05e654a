"""Kernels of `composite`: the sums over each ray, and their gradients.

A tile is [RAYS, ROWS]: consecutive samples of some rays. The optical depth in front of it is carried along in fp64.
Legend: see `composite`.
"""

from __future__ import annotations

import math

from dream_fast.kernels._core.launch import constant, jit, tl

# Largest optical depth of one sample, so that sums stay finite.
MAX_SAMPLE_TAU = 1e4
_MAX_SAMPLE_TAU = constant(MAX_SAMPLE_TAU)
_LOG2_E = constant(math.log2(math.e))


@jit
def _exp_minus(x):
    """exp(-x) in fp32 for fp64 x, to a relative error of about 1e-7 however large x is."""
    power = x * _LOG2_E
    floor = tl.floor(power.to(tl.float32))
    return tl.exp2((floor - power).to(tl.float32)) * tl.exp2(-floor)


@jit
def _alpha(tau, transmitted):
    """1 - exp(-tau) for fp32 tau, to a relative error of about 1e-7 also for small tau; transmitted = exp(-tau)."""
    series = 1 - tau * (1 / 7)
    series = 1 - tau * (1 / 6) * series
    series = 1 - tau * (1 / 5) * series
    series = 1 - tau * (1 / 4) * series
    series = 1 - tau * (1 / 3) * series
    series = 1 - tau * (1 / 2) * series
    return tl.where(tl.abs(tau) < 0.35, tau * series, 1 - transmitted)


@jit
def _optical_depth(sigma, dt, row, inside):
    """dt in fp32 and sigma dt in fp64, [RAYS, ROWS] each; 0 outside."""
    length = tl.load(dt + row, mask=inside, other=0.0).to(tl.float32)
    density = tl.load(sigma + row, mask=inside, other=0.0).to(tl.float32)
    tau = density.to(tl.float64) * length.to(tl.float64)
    return length, tl.where(tau > _MAX_SAMPLE_TAU, _MAX_SAMPLE_TAU, tau)


@jit
def _ray_rows(offsets, count, ray, rays, rows):
    """First row [RAYS] and number of rows int32 [RAYS] of rays; 0 rows past the last ray."""
    here = ray < rays
    begin = tl.load(offsets + ray, mask=here, other=0)
    end = tl.minimum(tl.load(offsets + ray + 1, mask=here, other=0), rows)
    if count is not None:
        end = tl.minimum(end, tl.load(count))
    return begin, tl.maximum(end - begin, 0).to(tl.int32)


@jit
def _padding(offsets, count, rays, rows, program, PADDING: tl.constexpr):
    """First row, and the row after the last, of the padding that a program fills."""
    begin = tl.minimum(tl.load(offsets + rays), rows)
    if count is not None:
        begin = tl.minimum(begin, tl.maximum(tl.load(count), 0))
    begin += program * PADDING
    return begin, tl.minimum(begin + PADDING, rows)


@jit
def _fill_zero(pointer, begin, end, BLOCK: tl.constexpr):
    """Fill [begin, end) of a buffer with zeros."""
    while begin < end:
        number = begin + tl.arange(0, BLOCK)
        tl.store(pointer + number, tl.zeros([BLOCK], tl.float32), mask=number < end)
        begin += BLOCK


@jit
def composite_fwd_kernel(
    sigma,  # [cap] float
    values,  # [cap, CHANNELS] float
    t,  # [cap] float
    dt,  # [cap] float
    offsets,  # [R + 1] int64
    count,  # [] int64, or None
    out,  # [R, CHANNELS] as sigma
    opacity,  # [R] as sigma
    depth,  # [R] as sigma
    weights,  # [cap] as sigma
    lengths,  # [R] int32: samples in front of the ray's end
    ray_tau,  # [R] fp64: their optical depth
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
    """Composite RAYS rays and a group of channels; programs from ray_programs on fill the padding.

    A ray ends before the first sample in front of which the optical depth exceeds limit + limit_rest.
    """
    program = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    if program >= ray_programs:
        if group == 0:
            first, last = _padding(offsets, count, rays, rows, program - ray_programs, PADDING)
            _fill_zero(weights, first, last, RAYS * ROWS)
    else:
        ray = program * RAYS + tl.arange(0, RAYS)
        here = ray < rays
        begin, samples = _ray_rows(offsets, count, ray, rays, rows)
        max_tau = tl.full([], limit, tl.float64) + tl.full([], limit_rest, tl.float64)
        tau_in_front = tl.zeros([RAYS], tl.float64)
        # Each lane keeps sums of its own, which are added up after the loop.
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
            before = tau_in_front[:, None] + (tl.cumsum(tau, axis=1) - tau)
            # A NaN stays alive and shows in every sum of its ray.
            alive = inside & ~(before > max_tau)
            single = tau.to(tl.float32)
            weight = tl.where(alive, _exp_minus(before) * _alpha(single, tl.exp(-single)), 0.0)
            tau_in_front += tl.sum(tl.where(alive, tau, 0.0), axis=1)
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
            running = tl.max(tl.where(tau_in_front <= max_tau, samples, 0))
        for part in tl.static_range(GROUP):
            channel = group * GROUP + part
            tl.store(out + ray * CHANNELS + channel, tl.sum(sums[part], axis=1), mask=here & (channel < CHANNELS))
        if group == 0:
            tl.store(opacity + ray, tl.sum(weight_sum, axis=1), mask=here)
            tl.store(depth + ray, tl.sum(depth_sum, axis=1), mask=here)
            tl.store(lengths + ray, tl.sum(alive_sum, axis=1), mask=here)
            tl.store(ray_tau + ray, tau_in_front, mask=here)
            # The rows that the loop did not reach.
            running = tl.max(samples)
            while number < running:
                column = number + tl.arange(0, ROWS)[None, :]
                tl.store(weights + begin[:, None] + column, zero, mask=column < samples[:, None])
                number += ROWS


@jit
def composite_bwd_kernel(
    grad_out,  # [R, CHANNELS] float, or None
    grad_opacity,  # [R] float, or None
    grad_depth,  # [R] float, or None
    grad_weights,  # [cap] float, or None
    sigma,  # [cap] float
    values,  # [cap, CHANNELS] float
    t,  # [cap] float
    dt,  # [cap] float
    offsets,  # [R + 1] int64
    count,  # [] int64, or None
    lengths,  # [R] int32
    ray_tau,  # [R] fp64
    grad_sigma,  # [cap] as sigma
    grad_values,  # [cap, CHANNELS] as values
    rows,
    rays,
    ray_programs,
    CHANNELS: tl.constexpr,
    RAYS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Walk from the end of each ray to its front; programs from ray_programs on fill the padding."""
    program = tl.program_id(0).to(tl.int64)
    if program >= ray_programs:
        first, last = _padding(offsets, count, rays, rows, program - ray_programs, PADDING)
        _fill_zero(grad_sigma, first, last, RAYS * ROWS)
        _fill_zero(grad_values, first * CHANNELS, last * CHANNELS, RAYS * ROWS)
    else:
        ray = program * RAYS + tl.arange(0, RAYS)
        here = ray < rays
        begin, samples = _ray_rows(offsets, count, ray, rays, rows)
        length = tl.load(lengths + ray, mask=here, other=0)
        tau_in_front = tl.load(ray_tau + ray, mask=here, other=0.0)
        sum_behind = tl.zeros([RAYS], tl.float64)
        ray_grad = tl.zeros([RAYS], tl.float32)
        if grad_opacity is not None:
            ray_grad += tl.load(grad_opacity + ray, mask=here, other=0.0).to(tl.float32)
        depth_grad = tl.zeros([RAYS], tl.float32)
        if grad_depth is not None:
            depth_grad += tl.load(grad_depth + ray, mask=here, other=0.0).to(tl.float32)
        number = 0
        longest = tl.max(length)
        while number < longest:
            number += ROWS
            column = (length - number)[:, None] + tl.arange(0, ROWS)[None, :]
            inside = column >= 0
            row = begin[:, None] + column
            step, tau = _optical_depth(sigma, dt, row, inside)
            before = tau_in_front[:, None] - tl.cumsum(tau, axis=1, reverse=True)
            tau_in_front -= tl.sum(tau, axis=1)
            transmitted = _exp_minus(tau)
            transmittance = _exp_minus(before)
            weight = tl.where(inside, transmittance * _alpha(tau.to(tl.float32), transmitted), 0.0)
            grad = ray_grad[:, None] + tl.zeros([RAYS, ROWS], tl.float32)
            if grad_depth is not None:
                grad += depth_grad[:, None] * tl.load(t + row, mask=inside, other=0.0).to(tl.float32)
            if grad_weights is not None:
                grad += tl.load(grad_weights + row, mask=inside, other=0.0).to(tl.float32)
            if CHANNELS <= 8:
                for channel in tl.static_range(CHANNELS):
                    grad += _channel_grads(
                        grad_out, values, grad_values, ray, here, row, inside, weight, channel, CHANNELS
                    )
            else:
                for channel in range(CHANNELS):
                    grad += _channel_grads(
                        grad_out, values, grad_values, ray, here, row, inside, weight, channel, CHANNELS
                    )
            product = grad.to(tl.float64) * weight
            later = sum_behind[:, None] + (tl.cumsum(product, axis=1, reverse=True) - product)
            sum_behind += tl.sum(product, axis=1)
            tl.store(grad_sigma + row, step * (grad * transmittance * transmitted - later.to(tl.float32)), mask=inside)
        # Samples behind a ray's end have no gradient.
        number = 0
        longest = tl.max(samples - length)
        while number < longest:
            column = (length + number)[:, None] + tl.arange(0, ROWS)[None, :]
            inside = column < samples[:, None]
            row = begin[:, None] + column
            zero = tl.zeros([RAYS, ROWS], tl.float32)
            tl.store(grad_sigma + row, zero, mask=inside)
            for channel in range(CHANNELS):
                tl.store(grad_values + row * CHANNELS + channel, zero, mask=inside)
            number += ROWS


@jit
def _channel_grads(grad_out, values, grad_values, ray, here, row, inside, weight, channel, CHANNELS: tl.constexpr):
    """Store the gradient of one channel and return its part of the gradient of the weights."""
    if grad_out is None:
        tl.store(grad_values + row * CHANNELS + channel, tl.zeros_like(weight), mask=inside)
        part = tl.zeros_like(weight)
    else:
        upstream = tl.load(grad_out + ray * CHANNELS + channel, mask=here, other=0.0).to(tl.float32)[:, None]
        tl.store(grad_values + row * CHANNELS + channel, upstream * weight, mask=inside)
        part = upstream * tl.load(values + row * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    return part
