"""The passes of marching: count the samples of each ray, add the counts up, write the samples; and the backward pass.

Every sample comes out as in `march_reference` bit for bit: the same fp32 operations in the same order, true division,
and launches without fused multiply-adds. One that is a rounding error away from the edge of a cell, or from far, would
otherwise be a sample in one of the two and not in the other.

Legend: R rays; a tile is [RAYS, STEPS]: lattice steps of some rays. origins, directions fp32 [R, 3]; bits uint8;
perturb fp32 [R] or None. counts, spans int32 [R]: samples of a ray, and lattice steps from its first to its last;
first [R]: of its first sample the number of the step (int32) or, in a lattice of growing steps, where it begins (fp32).
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.rays.device import occupied, ray_span

# A ray that is none (with a direction of 0, say) never leaves the cube: no more steps of it are looked at.
_MOST_STEPS = constant(1 << 24)


@jit
def _rays(origins, directions, ray, here, bound, min_near):
    """Origins and directions of rays, near and far, [RAYS] each; far is behind near where not `here`."""
    at, along = origins + ray * 3, directions + ray * 3
    ox, dx = tl.load(at, mask=here, other=0.0), tl.load(along, mask=here, other=1.0)
    oy, dy = tl.load(at + 1, mask=here, other=0.0), tl.load(along + 1, mask=here, other=1.0)
    oz, dz = tl.load(at + 2, mask=here, other=0.0), tl.load(along + 2, mask=here, other=1.0)
    near, far = ray_span(ox, oy, oz, dx, dy, dz, bound, min_near)
    return ox, oy, oz, dx, dy, dz, tl.where(here, near, 0.0), tl.where(here, far, -1.0)


@jit
def _step(t, shortest, longest, dt_gamma):
    return tl.minimum(tl.maximum(t * dt_gamma, shortest), longest)


@jit
def _even_steps(start, first, column, shortest):
    """Middles of lattice steps, [RAYS, STEPS]; first: the number of the leftmost step, a scalar or [RAYS, 1]."""
    number = (first + column[None, :]).to(tl.float32)
    return start[:, None] + (number * shortest + 0.5 * shortest)


@jit
def _growing_steps(t, column, shortest, longest, dt_gamma, STEPS: tl.constexpr):
    """The next STEPS steps from t [RAYS] on: begins, middles, lengths [RAYS, STEPS], and where they end [RAYS].

    A step depends on the one before, so every lane follows them all and keeps its own.
    """
    begin = t[:, None] + tl.zeros_like(column)[None, :].to(tl.float32)
    for number in range(STEPS):
        begin = tl.where(column[None, :] == number, t[:, None], begin)
        t += _step(t, shortest, longest, dt_gamma)
    length = _step(begin, shortest, longest, dt_gamma)
    return begin, begin + 0.5 * length, length, t


@jit
def march_count_fwd_kernel(
    origins,
    directions,
    bits,
    perturb,
    counts,
    spans,
    first,
    rays,
    bound,
    min_near,
    shortest,
    longest,
    dt_gamma,
    outer_scale,
    max_steps,
    EVEN: tl.constexpr,
    CASCADES: tl.constexpr,
    RESOLUTION: tl.constexpr,
    RAYS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """How many samples each ray has, and where they lie."""
    ray = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    here = ray < rays
    ox, oy, oz, dx, dy, dz, near, far = _rays(origins, directions, ray, here, bound, min_near)
    start = near
    if perturb is not None:
        shift = tl.load(perturb + ray, mask=here, other=0.0)
        start += shift * (shortest if EVEN else _step(near, shortest, longest, dt_gamma))
    column = tl.arange(0, STEPS)
    # Each lane of the tile keeps its own sums; they meet after the loop.
    samples = tl.zeros([RAYS, STEPS], tl.int32)
    lowest = tl.full([RAYS, STEPS], _MOST_STEPS + STEPS, tl.int32)
    highest = tl.zeros([RAYS, STEPS], tl.int32)
    begins = tl.full([RAYS, STEPS], float("inf"), tl.float32)
    # No step is shorter: at most so many end before far, with one to spare for rounding.
    most = tl.minimum(tl.maximum((far - start) / shortest, 0.0) + 2.0, _MOST_STEPS).to(tl.int32)
    most = tl.max(tl.where(far > start, most, 0))
    number = 0
    while number < most:
        if EVEN:
            t = _even_steps(start, number, column, shortest)
        else:
            begin, t, _, start = _growing_steps(start, column, shortest, longest, dt_gamma, STEPS)
            most = tl.where(tl.max(tl.where(start < far, 1, 0)) > 0, most, 0)
        x, y, z = (
            ox[:, None] + t * dx[:, None],
            oy[:, None] + t * dy[:, None],
            oz[:, None] + t * dz[:, None],
        )
        kept = occupied(x, y, z, bits, t < far[:, None], bound, outer_scale, RESOLUTION, CASCADES).to(tl.int32)
        samples += kept
        step = (number + column)[None, :]
        lowest = tl.where(kept > 0, tl.minimum(lowest, step), lowest)
        highest = tl.where(kept > 0, step + 1, highest)
        if not EVEN:
            begins = tl.where(kept > 0, tl.minimum(begins, begin), begins)
        number += STEPS
    lowest = tl.min(lowest, axis=1)
    tl.store(counts + ray, tl.minimum(tl.sum(samples, axis=1), max_steps), mask=here)
    tl.store(spans + ray, tl.maximum(tl.max(highest, axis=1) - lowest, 0), mask=here)
    if EVEN:
        tl.store(first + ray, lowest, mask=here)
    else:
        tl.store(first + ray, tl.min(begins, axis=1), mask=here)


@jit
def march_sums_fwd_kernel(counts, sums, rays, BLOCK: tl.constexpr):
    """Samples of each block of rays."""
    block = tl.program_id(0).to(tl.int64)
    ray = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + block, tl.sum(tl.load(counts + ray, mask=ray < rays, other=0).to(tl.int64)))


@jit
def march_offsets_fwd_kernel(
    counts, sums, offsets, count, overflow, rays, capacity, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """Where each ray's samples begin, how many there are, and whether they fit. sums: of the blocks; None for one."""
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
        everything = before + tl.sum(samples)
        tl.store(count, tl.minimum(everything, capacity))
        tl.store(overflow, everything > capacity)


@jit
def march_write_fwd_kernel(
    origins,
    directions,
    bits,
    perturb,
    counts,
    spans,
    first,
    offsets,
    positions,
    ray_ids,
    t_out,
    dt_out,
    rays,
    ray_programs,
    capacity,
    bound,
    min_near,
    shortest,
    longest,
    dt_gamma,
    outer_scale,
    EVEN: tl.constexpr,
    CASCADES: tl.constexpr,
    RESOLUTION: tl.constexpr,
    RAYS: tl.constexpr,
    STEPS: tl.constexpr,
    PADDING: tl.constexpr,
):
    """The samples; programs from ray_programs on fill the padding, PADDING rows each."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, STEPS)
    if program >= ray_programs:
        chunk = tl.load(offsets + rays) + (program - ray_programs) * PADDING
        end = tl.minimum(chunk + PADDING, capacity)
        while chunk < end:
            row = chunk + tl.arange(0, RAYS * STEPS)
            here = row < end
            zero = tl.zeros([RAYS * STEPS], tl.float32)
            tl.store(t_out + row, zero, mask=here)
            tl.store(dt_out + row, zero, mask=here)
            tl.store(ray_ids + row, zero.to(tl.int64), mask=here)
            for part in tl.static_range(3):
                number = chunk * 3 + part * RAYS * STEPS + tl.arange(0, RAYS * STEPS)
                tl.store(positions + number, zero, mask=number < end * 3)
            chunk += RAYS * STEPS
    else:
        ray = program * RAYS + tl.arange(0, RAYS)
        here = ray < rays
        samples = tl.load(counts + ray, mask=here, other=0)[:, None]
        span = tl.load(spans + ray, mask=here, other=0)
        offset = tl.load(offsets + ray, mask=here, other=0)[:, None]
        ox, oy, oz, dx, dy, dz, start, far = _rays(origins, directions, ray, here, bound, min_near)
        step = tl.load(first + ray, mask=here, other=0)
        if EVEN:
            if perturb is not None:
                start += tl.load(perturb + ray, mask=here, other=0.0) * shortest
        else:
            start = step
        done = tl.zeros([RAYS], tl.int32)
        most = tl.max(span)
        number = 0
        while number < most:
            if EVEN:
                t = _even_steps(start, step[:, None] + number, column, shortest)
                dt = tl.zeros([RAYS, STEPS], tl.float32) + shortest
            else:
                _, t, dt, start = _growing_steps(start, column, shortest, longest, dt_gamma, STEPS)
            x, y, z = (
                ox[:, None] + t * dx[:, None],
                oy[:, None] + t * dy[:, None],
                oz[:, None] + t * dz[:, None],
            )
            inside = (t < far[:, None]) & ((number + column)[None, :] < span[:, None])
            kept = occupied(x, y, z, bits, inside, bound, outer_scale, RESOLUTION, CASCADES).to(tl.int32)
            rank = done[:, None] + tl.cumsum(kept, axis=1) - 1
            done += tl.sum(kept, axis=1)
            row = offset + rank
            written = (kept > 0) & (rank < samples) & (row < capacity)
            tl.store(t_out + row, t, mask=written)
            tl.store(dt_out + row, dt, mask=written)
            tl.store(ray_ids + row, ray[:, None] + tl.zeros_like(row), mask=written)
            tl.store(positions + row * 3, x, mask=written)
            tl.store(positions + row * 3 + 1, y, mask=written)
            tl.store(positions + row * 3 + 2, z, mask=written)
            number += STEPS


@jit
def march_bwd_kernel(grad, t, offsets, grad_origins, grad_directions, rays, RAYS: tl.constexpr, STEPS: tl.constexpr):
    """Sums over each ray of the gradients of its positions, and of t times them."""
    ray = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    here = ray < rays
    begin = tl.load(offsets + ray, mask=here, other=0)
    samples = tl.load(offsets + ray + 1, mask=here, other=0) - begin
    zero = tl.zeros([RAYS, STEPS], tl.float32)
    gx, gy, gz, tx, ty, tz = zero, zero, zero, zero, zero, zero
    most = tl.max(samples)
    chunk = 0
    while chunk < most:
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
