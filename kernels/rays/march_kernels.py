"""Kernels of `march`: count the samples of each ray, add the counts up, write the samples; and the backward pass.

Samples equal those of `march_reference` bit for bit: the same fp32 operations in the same order, true division, and
launches without fused multiply-adds. Otherwise an interval within rounding of a cell's edge, or of far, would be a
sample in only one of the two.

Legend: R rays; a tile is [RAYS, STEPS]: lattice steps of some rays. GROWS: steps grow with the distance (dt_gamma > 0),
else all are `shortest`. outer_scale: cells a world unit of the largest cascade.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.rays.device import occupied, ray_span

# Steps of a ray that are examined at most: one with a direction of 0 never leaves the cube.
_MAX_STEPS = constant(1 << 24)


@jit
def _load_rays(origins, directions, ray, here, bound, min_near):
    """Origins and directions of rays, near and far, [RAYS] each; far < near outside of `here`."""
    origin, direction = origins + ray * 3, directions + ray * 3
    ox, dx = tl.load(origin, mask=here, other=0.0), tl.load(direction, mask=here, other=1.0)
    oy, dy = tl.load(origin + 1, mask=here, other=0.0), tl.load(direction + 1, mask=here, other=1.0)
    oz, dz = tl.load(origin + 2, mask=here, other=0.0), tl.load(direction + 2, mask=here, other=1.0)
    near, far = ray_span(ox, oy, oz, dx, dy, dz, bound, min_near)
    return ox, oy, oz, dx, dy, dz, tl.where(here, near, 0.0), tl.where(here, far, -1.0)


@jit
def _step_length(t, shortest, longest, dt_gamma):
    """Length of the lattice steps that begin at t."""
    return tl.minimum(tl.maximum(t * dt_gamma, shortest), longest)


@jit
def _even_steps(start, first, column, shortest):
    """Middles of equal lattice steps, [RAYS, STEPS]; first: number of the leftmost step, a scalar or [RAYS, 1]."""
    number = (first + column[None, :]).to(tl.float32)
    return start[:, None] + (number * shortest + 0.5 * shortest)


@jit
def _growing_steps(t, column, shortest, longest, dt_gamma, STEPS: tl.constexpr):
    """The next STEPS steps from t [RAYS] on: begins, middles and lengths [RAYS, STEPS], and where they end [RAYS].

    A step depends on the one before, so every lane computes all of them.
    """
    begin = t[:, None] + tl.zeros_like(column)[None, :].to(tl.float32)
    for number in range(STEPS):
        begin = tl.where(column[None, :] == number, t[:, None], begin)
        t += _step_length(t, shortest, longest, dt_gamma)
    length = _step_length(begin, shortest, longest, dt_gamma)
    return begin, begin + 0.5 * length, length, t


@jit
def _points(ox, oy, oz, dx, dy, dz, t):
    """The points at t [RAYS, STEPS] of rays, [RAYS, STEPS] an axis."""
    return ox[:, None] + t * dx[:, None], oy[:, None] + t * dy[:, None], oz[:, None] + t * dz[:, None]


@jit
def march_count_fwd_kernel(
    origins,  # [R, 3] fp32
    directions,  # [R, 3] fp32
    bits,  # [CASCADES, RESOLUTION^3 / 8] uint8
    perturb,  # [R] fp32, or None
    counts,  # [R] int32: samples of a ray
    spans,  # [R] int32: lattice steps from its first sample to its last
    first,  # [R] of its first sample: number of the step, int32, or where it begins, fp32 (GROWS)
    rays,
    bound,
    min_near,
    shortest,
    longest,
    dt_gamma,
    outer_scale,
    max_steps,
    GROWS: tl.constexpr,
    CASCADES: tl.constexpr,
    RESOLUTION: tl.constexpr,
    RAYS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Count the samples of each ray, and find its first and last."""
    ray = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    here = ray < rays
    ox, oy, oz, dx, dy, dz, near, far = _load_rays(origins, directions, ray, here, bound, min_near)
    start = near
    if perturb is not None:
        shift = tl.load(perturb + ray, mask=here, other=0.0)
        start += shift * (_step_length(near, shortest, longest, dt_gamma) if GROWS else shortest)
    column = tl.arange(0, STEPS)
    # Each lane keeps sums of its own, which are added up after the loop.
    samples = tl.zeros([RAYS, STEPS], tl.int32)
    lowest = tl.full([RAYS, STEPS], _MAX_STEPS + STEPS, tl.int32)
    highest = tl.zeros([RAYS, STEPS], tl.int32)
    begins = tl.full([RAYS, STEPS], float("inf"), tl.float32)
    # At most so many steps end before far, and one more by rounding.
    step_bound = tl.minimum(tl.maximum((far - start) / shortest, 0.0) + 2.0, _MAX_STEPS).to(tl.int32)
    step_bound = tl.max(tl.where(far > start, step_bound, 0))
    number = 0
    while number < step_bound:
        if GROWS:
            begin, t, _, start = _growing_steps(start, column, shortest, longest, dt_gamma, STEPS)
            step_bound = tl.where(tl.max(tl.where(start < far, 1, 0)) > 0, step_bound, 0)
        else:
            t = _even_steps(start, number, column, shortest)
        x, y, z = _points(ox, oy, oz, dx, dy, dz, t)
        is_sample = occupied(x, y, z, bits, t < far[:, None], bound, outer_scale, RESOLUTION, CASCADES).to(tl.int32)
        samples += is_sample
        step = (number + column)[None, :]
        lowest = tl.where(is_sample > 0, tl.minimum(lowest, step), lowest)
        highest = tl.where(is_sample > 0, step + 1, highest)
        if GROWS:
            begins = tl.where(is_sample > 0, tl.minimum(begins, begin), begins)
        number += STEPS
    lowest = tl.min(lowest, axis=1)
    tl.store(counts + ray, tl.minimum(tl.sum(samples, axis=1), max_steps), mask=here)
    tl.store(spans + ray, tl.maximum(tl.max(highest, axis=1) - lowest, 0), mask=here)
    if GROWS:
        tl.store(first + ray, tl.min(begins, axis=1), mask=here)
    else:
        tl.store(first + ray, lowest, mask=here)


@jit
def march_sums_fwd_kernel(
    counts,  # [R] int32
    sums,  # [blocks] int64
    rays,
    BLOCK: tl.constexpr,
):
    """Add up the samples of each block of rays."""
    block = tl.program_id(0).to(tl.int64)
    ray = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + block, tl.sum(tl.load(counts + ray, mask=ray < rays, other=0).to(tl.int64)))


@jit
def march_offsets_fwd_kernel(
    counts,  # [R] int32
    sums,  # [blocks] int64: samples of each block, or None for one block
    offsets,  # [R + 1] int64
    count,  # [] int64
    overflow,  # [] bool
    rays,
    capacity,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Offsets of the samples of each ray, their number in all, and whether they exceed the capacity."""
    block = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCKS], tl.int64)
    if sums is not None:
        chunk = tl.zeros([], tl.int64)
        while chunk < block:
            other = chunk + tl.arange(0, BLOCKS)
            total += tl.load(sums + other, mask=other < block, other=0)
            chunk += BLOCKS
    before = tl.sum(total)
    ray = block * BLOCK + tl.arange(0, BLOCK)
    samples = tl.load(counts + ray, mask=ray < rays, other=0).to(tl.int64)
    ends = before + tl.cumsum(samples, axis=0)
    tl.store(offsets + 1 + ray, tl.minimum(ends, capacity), mask=ray < rays)
    if block == 0:
        tl.store(offsets, tl.zeros([], tl.int64))
    if block == tl.num_programs(0) - 1:
        total_samples = before + tl.sum(samples)
        tl.store(count, tl.minimum(total_samples, capacity))
        tl.store(overflow, total_samples > capacity)


@jit
def _write_padding(positions, ray_ids, t_out, dt_out, begin, end, BLOCK: tl.constexpr):
    """Fill the rows [begin, end) with zeros."""
    while begin < end:
        row = begin + tl.arange(0, BLOCK)
        here = row < end
        zero = tl.zeros([BLOCK], tl.float32)
        tl.store(t_out + row, zero, mask=here)
        tl.store(dt_out + row, zero, mask=here)
        tl.store(ray_ids + row, zero.to(tl.int64), mask=here)
        for part in tl.static_range(3):
            number = begin * 3 + part * BLOCK + tl.arange(0, BLOCK)
            tl.store(positions + number, zero, mask=number < end * 3)
        begin += BLOCK


@jit
def march_write_fwd_kernel(
    origins,  # [R, 3] fp32
    directions,  # [R, 3] fp32
    bits,  # [CASCADES, RESOLUTION^3 / 8] uint8
    perturb,  # [R] fp32, or None
    counts,  # [R] int32
    spans,  # [R] int32
    first,  # [R] int32, or fp32 (GROWS)
    offsets,  # [R + 1] int64
    positions,  # [cap, 3] fp32
    ray_ids,  # [cap] int64
    t_out,  # [cap] fp32
    dt_out,  # [cap] fp32
    rays,
    ray_programs,
    capacity,
    bound,
    min_near,
    shortest,
    longest,
    dt_gamma,
    outer_scale,
    GROWS: tl.constexpr,
    CASCADES: tl.constexpr,
    RESOLUTION: tl.constexpr,
    RAYS: tl.constexpr,
    STEPS: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Write the samples; programs from ray_programs on fill the padding, PADDING rows each."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, STEPS)
    if program >= ray_programs:
        chunk = tl.load(offsets + rays) + (program - ray_programs) * PADDING
        end = tl.minimum(chunk + PADDING, capacity)
        _write_padding(positions, ray_ids, t_out, dt_out, chunk, end, RAYS * STEPS)
    else:
        ray = program * RAYS + tl.arange(0, RAYS)
        here = ray < rays
        samples = tl.load(counts + ray, mask=here, other=0)[:, None]
        span = tl.load(spans + ray, mask=here, other=0)
        offset = tl.load(offsets + ray, mask=here, other=0)[:, None]
        ox, oy, oz, dx, dy, dz, start, far = _load_rays(origins, directions, ray, here, bound, min_near)
        step = tl.load(first + ray, mask=here, other=0)
        if GROWS:
            start = step
        elif perturb is not None:
            start += tl.load(perturb + ray, mask=here, other=0.0) * shortest
        samples_before = tl.zeros([RAYS], tl.int32)
        longest_span = tl.max(span)
        number = 0
        while number < longest_span:
            if GROWS:
                _, t, dt, start = _growing_steps(start, column, shortest, longest, dt_gamma, STEPS)
            else:
                t = _even_steps(start, step[:, None] + number, column, shortest)
                dt = tl.zeros([RAYS, STEPS], tl.float32) + shortest
            x, y, z = _points(ox, oy, oz, dx, dy, dz, t)
            inside = (t < far[:, None]) & ((number + column)[None, :] < span[:, None])
            is_sample = occupied(x, y, z, bits, inside, bound, outer_scale, RESOLUTION, CASCADES).to(tl.int32)
            rank = samples_before[:, None] + tl.cumsum(is_sample, axis=1) - 1
            samples_before += tl.sum(is_sample, axis=1)
            row = offset + rank
            mask = (is_sample > 0) & (rank < samples) & (row < capacity)
            tl.store(t_out + row, t, mask=mask)
            tl.store(dt_out + row, dt, mask=mask)
            tl.store(ray_ids + row, ray[:, None] + tl.zeros_like(row), mask=mask)
            tl.store(positions + row * 3, x, mask=mask)
            tl.store(positions + row * 3 + 1, y, mask=mask)
            tl.store(positions + row * 3 + 2, z, mask=mask)
            number += STEPS


@jit
def march_bwd_kernel(
    grad,  # [cap, 3] fp32: of the positions
    t,  # [cap] fp32
    offsets,  # [R + 1] int64
    grad_origins,  # [R, 3] fp32
    grad_directions,  # [R, 3] fp32
    rays,
    RAYS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Add up the gradients of the positions of each ray, and t times them."""
    ray = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    here = ray < rays
    begin = tl.load(offsets + ray, mask=here, other=0)
    samples = tl.load(offsets + ray + 1, mask=here, other=0) - begin
    zero = tl.zeros([RAYS, STEPS], tl.float32)
    gx, gy, gz, tx, ty, tz = zero, zero, zero, zero, zero, zero
    most_samples = tl.max(samples)
    chunk = 0
    while chunk < most_samples:
        number = chunk + tl.arange(0, STEPS)[None, :]
        inside = number < samples[:, None]
        row = begin[:, None] + number
        middle = tl.load(t + row, mask=inside, other=0.0)
        x = tl.load(grad + row * 3, mask=inside, other=0.0)
        y = tl.load(grad + row * 3 + 1, mask=inside, other=0.0)
        z = tl.load(grad + row * 3 + 2, mask=inside, other=0.0)
        gx, gy, gz = gx + x, gy + y, gz + z
        tx, ty, tz = tx + middle * x, ty + middle * y, tz + middle * z
        chunk += STEPS
    tl.store(grad_origins + ray * 3, tl.sum(gx, axis=1), mask=here)
    tl.store(grad_origins + ray * 3 + 1, tl.sum(gy, axis=1), mask=here)
    tl.store(grad_origins + ray * 3 + 2, tl.sum(gz, axis=1), mask=here)
    tl.store(grad_directions + ray * 3, tl.sum(tx, axis=1), mask=here)
    tl.store(grad_directions + ray * 3 + 1, tl.sum(ty, axis=1), mask=here)
    tl.store(grad_directions + ray * 3 + 2, tl.sum(tz, axis=1), mask=here)
