"""Kernels of the hash grid, one level at a time; `grid.hash_grid` defines it and `grid.gradients` its gradients.

Legend: N points, L levels, F features a level. Features are stored by channel, [L * F, N], so that every level reads
and writes along memory. Numerics: fp32.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import jit, tl
from dream_fast.kernels.grid.device import (
    cell_derivatives,
    corner_rows,
    corner_weights,
    load_count,
    load_entry,
    load_level,
    load_point,
    locate,
    tangent_weights,
)


@jit
def hash_grid_fwd_kernel(
    x,  # [N, 3] fp32
    table,  # [table rows, F], as `view_as_pairs` gives it
    tangent,  # [N, 3] fp32, or None
    out,  # [L * F, N] any float dtype
    levels,  # [L, 6] int64
    count,  # [] int64 or None
    active,  # [] integer or None
    n,
    active_levels,
    FEATURES: tl.constexpr,
    SMOOTH: tl.constexpr,
    STORED: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two features of one level for a block of points. The level changes slowest, so its entries stay in the cache.

    With a tangent: the features' derivative along it.
    """
    PAIRS: tl.constexpr = (FEATURES + 1) // 2
    level = tl.program_id(1) // PAIRS
    pair = tl.program_id(1) % PAIRS
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    limit = load_count(count, n)
    if active is not None:
        active_levels = tl.load(active).to(tl.int32)
    # Blocks and levels that are not live read nothing and write zeros.
    ux, uy, uz, inside = load_point(x, row, (row < limit) & (level < active_levels), 1.0, 0.0)
    numbers = load_level(levels, level)
    i, wx, dx, _ = locate(ux, numbers[1], SMOOTH)
    j, wy, dy, _ = locate(uy, numbers[1], SMOOTH)
    k, wz, dz, _ = locate(uz, numbers[1], SMOOTH)
    if tangent is None:
        weights = corner_weights(1 - wx, wx, 1 - wy, wy, 1 - wz, wz)
    else:
        dx *= tl.load(tangent + row * 3, mask=inside, other=0.0)
        dy *= tl.load(tangent + row * 3 + 1, mask=inside, other=0.0)
        dz *= tl.load(tangent + row * 3 + 2, mask=inside, other=0.0)
        weights = tangent_weights(wx, wy, wz, dx, dy, dz)
    rows = corner_rows(i, j, k, numbers)
    entries = table + numbers[0] * PAIRS + pair
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    for corner in tl.static_range(8):
        first, second = load_entry(entries, rows[corner] * PAIRS, inside, STORED, ROUNDED)
        low += weights[corner] * first
        high += weights[corner] * second
    column = (level * FEATURES + pair * 2).to(tl.int64) * n
    tl.store(out + column + row, low, mask=row < n)
    if FEATURES > 1:
        tl.store(out + column + n + row, high, mask=row < n)


@jit
def transpose_kernel(
    source,  # [N, C] any dtype
    out,  # [C, N] of the same dtype
    count,  # [] int64 or None
    n,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start >= load_count(count, n):
        return
    row = start + tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    mask = (row < n) & (channel < CHANNELS)
    tile = tl.load(source + row * CHANNELS + channel, mask=mask)
    tl.store(out + channel.to(tl.int64) * n + row, tile, mask=mask)


@jit
def hash_grid_coordinates_bwd_kernel(
    x,  # [N, 3] fp32
    out,  # [3, padded] fp32
    count,  # [] int64 or None
    n,
    padded,
    scale,
    shift,
    BLOCK: tl.constexpr,
):
    """Unit coordinates by axis; the first is -1 for points that contribute nothing."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ux, uy, uz, inside = load_point(x, row, row < load_count(count, n), scale, shift)
    tl.store(out + row, tl.where(inside, ux, -1.0), mask=row < padded)
    tl.store(out + padded + row, uy, mask=row < padded)
    tl.store(out + 2 * tl.full((), padded, tl.int64) + row, uz, mask=row < padded)


@jit
def _reset_sums(sums, fresh):
    """The eight sums, 0 in lanes that are `fresh`."""
    return (
        tl.where(fresh, 0.0, sums[0]),
        tl.where(fresh, 0.0, sums[1]),
        tl.where(fresh, 0.0, sums[2]),
        tl.where(fresh, 0.0, sums[3]),
        tl.where(fresh, 0.0, sums[4]),
        tl.where(fresh, 0.0, sums[5]),
        tl.where(fresh, 0.0, sums[6]),
        tl.where(fresh, 0.0, sums[7]),
    )


@jit
def _add_corners(sums, weights, value):
    """Eight sums + weights * value, corner by corner."""
    return (
        sums[0] + weights[0] * value,
        sums[1] + weights[1] * value,
        sums[2] + weights[2] * value,
        sums[3] + weights[3] * value,
        sums[4] + weights[4] * value,
        sums[5] + weights[5] * value,
        sums[6] + weights[6] * value,
        sums[7] + weights[7] * value,
    )


@jit
def _add_pair(grad, row0, row1, a0, a1, b0, b1, mask, factor, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Add the sums of two neighbours along x, rows row0 and row1, channels a and b, by atomics of WIDTH numbers."""
    if WIDTH == 4:
        # Both rows in one instruction where they are the two halves of 16 aligned bytes, else one each.
        joined = (row0 ^ row1) == 1
        odd0 = (row0 & 1) == 1
        partner_a, partner_b = tl.where(joined, a1, 0.0), tl.where(joined, b1, 0.0)
        low = tl.join(tl.where(odd0, partner_a, a0), tl.where(odd0, partner_b, b0))
        high = tl.join(tl.where(odd0, a0, partner_a), tl.where(odd0, b0, partner_b))
        both = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (row0.shape[0], 4))
        lanes = tl.arange(0, 4)[None, :]
        tl.atomic_add(grad + (row0 >> 1)[:, None] * 4 + lanes, both, mask=mask[:, None], sem="relaxed")
        pair = tl.arange(0, 2)[None, :]
        alone = mask & (joined == 0)
        tl.atomic_add(grad + row1[:, None] * 2 + pair, tl.join(a1, b1), mask=alone[:, None], sem="relaxed")
    elif WIDTH == 2:
        pair = tl.arange(0, 2)[None, :]
        tl.atomic_add(grad + row0[:, None] * STRIDE + pair, tl.join(a0, b0), mask=mask[:, None], sem="relaxed")
        tl.atomic_add(grad + row1[:, None] * STRIDE + pair, tl.join(a1, b1), mask=mask[:, None], sem="relaxed")
    else:
        add_one(grad + row0 * STRIDE, a0, mask, factor)
        add_one(grad + row1 * STRIDE, a1, mask, factor)
        if STRIDE > 1:
            add_one(grad + row0 * STRIDE + 1, b0, mask, factor)
            add_one(grad + row1 * STRIDE + 1, b1, mask, factor)


@jit
def add_one(pointers, value, mask, factor):
    """Add one number a lane; where there is a factor, as a fixed-point number, a multiple of 1 / factor."""
    if factor is not None:
        value = (value * factor).to(tl.int64)
    tl.atomic_add(pointers, value, mask=mask, sem="relaxed")


@jit
def _scatter_sums(grad, cell, level, a, b, mask, factor, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Add the sums of the eight corners of each lane's cell to the table."""
    rows = corner_rows(cell[0], cell[1], cell[2], level)
    _add_pair(grad, rows[0], rows[1], a[0], a[1], b[0], b[1], mask, factor, STRIDE, WIDTH)
    _add_pair(grad, rows[2], rows[3], a[2], a[3], b[2], b[3], mask, factor, STRIDE, WIDTH)
    _add_pair(grad, rows[4], rows[5], a[4], a[5], b[4], b[5], mask, factor, STRIDE, WIDTH)
    _add_pair(grad, rows[6], rows[7], a[6], a[7], b[6], b[7], mask, factor, STRIDE, WIDTH)


@jit
def hash_grid_table_bwd_kernel(
    u,  # [3, padded] fp32
    features,  # [L * F, N] any float dtype, or None
    tangent,  # [N, 3] fp32, or None
    tangent_features,  # [L * F, N] any float dtype, or None
    grad,  # [table rows, F] fp32, or int64 where there is a factor
    factor,  # [] fp32 or None
    levels,  # [L, 6] int64
    count,  # [] int64 or None
    active,  # [] integer or None
    n,
    padded,
    FEATURES: tl.constexpr,
    SMOOTH: tl.constexpr,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each lane takes RUN consecutive rows, and adds its eight sums to the table where the cell changes and at the end.

    Consecutive rows are neighbours on a ray: in a coarse level many lie in one cell, and cost one write.
    """
    PAIRS: tl.constexpr = (FEATURES + 1) // 2
    level = tl.program_id(1) // PAIRS
    channel = tl.program_id(1) % PAIRS * 2
    start = tl.program_id(0).to(tl.int64) * (BLOCK * RUN)
    if start >= load_count(count, n):
        return
    if active is not None:
        if level >= tl.load(active):
            return
    numbers = load_level(levels, level)
    grad += numbers[0] * FEATURES + channel
    column = (level * FEATURES + channel).to(tl.int64) * n
    if factor is not None:
        factor = tl.load(factor)
    none = tl.full((BLOCK,), -1, tl.int32)
    zero = tl.zeros((BLOCK,), tl.float32)
    cell = (none, none, none)
    a = (zero, zero, zero, zero, zero, zero, zero, zero)
    b = (zero, zero, zero, zero, zero, zero, zero, zero)
    first = start + tl.arange(0, BLOCK) * RUN
    for step in range(RUN):
        row = first + step
        x = tl.load(u + row)
        inside = x >= 0
        i, wx, dx, _ = locate(tl.where(inside, x, 0.0), numbers[1], SMOOTH)
        j, wy, dy, _ = locate(tl.load(u + padded + row), numbers[1], SMOOTH)
        k, wz, dz, _ = locate(tl.load(u + padded + (padded + row)), numbers[1], SMOOTH)
        changed = inside & ((i != cell[0]) | (j != cell[1]) | (k != cell[2]))
        _scatter_sums(grad, cell, numbers, a, b, changed & (cell[0] >= 0), factor, FEATURES, WIDTH)
        cell = (tl.where(inside, i, cell[0]), tl.where(inside, j, cell[1]), tl.where(inside, k, cell[2]))
        a = _reset_sums(a, changed)
        b = _reset_sums(b, changed)
        if features is not None:
            weights = corner_weights(1 - wx, wx, 1 - wy, wy, 1 - wz, wz)
            a = _add_corners(a, weights, tl.load(features + column + row, mask=inside, other=0.0).to(tl.float32))
            if FEATURES > 1:
                value = tl.load(features + column + (n + row), mask=inside, other=0.0).to(tl.float32)
                b = _add_corners(b, weights, value)
        if tangent is not None:
            tx = tl.load(tangent + row * 3, mask=inside, other=0.0) * dx
            ty = tl.load(tangent + row * 3 + 1, mask=inside, other=0.0) * dy
            tz = tl.load(tangent + row * 3 + 2, mask=inside, other=0.0) * dz
            weights = tangent_weights(wx, wy, wz, tx, ty, tz)
            value = tl.load(tangent_features + column + row, mask=inside, other=0.0).to(tl.float32)
            a = _add_corners(a, weights, value)
            if FEATURES > 1:
                value = tl.load(tangent_features + column + (n + row), mask=inside, other=0.0).to(tl.float32)
                b = _add_corners(b, weights, value)
    _scatter_sums(grad, cell, numbers, a, b, cell[0] >= 0, factor, FEATURES, WIDTH)


@jit
def hash_grid_x_bwd_kernel(
    features,  # [L * F, N] any float dtype
    x,  # [N, 3] fp32
    table,  # [table rows, F], as `view_as_pairs` gives it
    tangent,  # [N, 3] fp32, or None
    out,  # [N, 3] fp32
    levels,  # [L, 6] int64
    count,  # [] int64 or None
    active,  # [] integer or None
    n,
    active_levels,
    scale,
    shift,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    SMOOTH: tl.constexpr,
    STORED: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PAIRS: tl.constexpr = (FEATURES + 1) // 2
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    limit = load_count(count, n)
    if active is not None:
        active_levels = tl.minimum(tl.load(active).to(tl.int32), active_levels)
    ux, uy, uz, inside = load_point(x, row, row < limit, scale, shift)
    if tangent is not None:
        tx = tl.load(tangent + row * 3, mask=inside, other=0.0)
        ty = tl.load(tangent + row * 3 + 1, mask=inside, other=0.0)
        tz = tl.load(tangent + row * 3 + 2, mask=inside, other=0.0)
    wide = tl.full((), n, tl.int64)
    gx = tl.zeros((BLOCK,), tl.float32)
    gy = tl.zeros((BLOCK,), tl.float32)
    gz = tl.zeros((BLOCK,), tl.float32)
    for level in range(LEVELS):
        if level < active_levels:
            numbers = load_level(levels, level)
            i, wx, dx, ex = locate(ux, numbers[1], SMOOTH)
            j, wy, dy, ey = locate(uy, numbers[1], SMOOTH)
            k, wz, dz, ez = locate(uz, numbers[1], SMOOTH)
            rows = corner_rows(i, j, k, numbers)
            for pair in tl.static_range(PAIRS):
                column = (level * FEATURES + 2 * pair) * wide + row
                g0 = tl.load(features + column, mask=inside, other=0.0).to(tl.float32)
                g1 = g0 * 0.0
                if FEATURES > 1:
                    g1 = tl.load(features + column + n, mask=inside, other=0.0).to(tl.float32)
                entries = table + numbers[0] * PAIRS + pair
                v = (
                    _weighted_entry(entries, rows[0] * PAIRS, inside, g0, g1, STORED, ROUNDED),
                    _weighted_entry(entries, rows[1] * PAIRS, inside, g0, g1, STORED, ROUNDED),
                    _weighted_entry(entries, rows[2] * PAIRS, inside, g0, g1, STORED, ROUNDED),
                    _weighted_entry(entries, rows[3] * PAIRS, inside, g0, g1, STORED, ROUNDED),
                    _weighted_entry(entries, rows[4] * PAIRS, inside, g0, g1, STORED, ROUNDED),
                    _weighted_entry(entries, rows[5] * PAIRS, inside, g0, g1, STORED, ROUNDED),
                    _weighted_entry(entries, rows[6] * PAIRS, inside, g0, g1, STORED, ROUNDED),
                    _weighted_entry(entries, rows[7] * PAIRS, inside, g0, g1, STORED, ROUNDED),
                )
                by = cell_derivatives(v, wx, wy, wz)
                if tangent is None:
                    gx += dx * by[0]
                    gy += dy * by[1]
                    gz += dz * by[2]
                else:
                    gx += tx * ex * by[0] + dx * (ty * dy * by[3] + tz * dz * by[4])
                    gy += ty * ey * by[1] + dy * (tx * dx * by[3] + tz * dz * by[5])
                    gz += tz * ez * by[2] + dz * (tx * dx * by[4] + ty * dy * by[5])
    tl.store(out + row * 3, gx, mask=row < n)
    tl.store(out + row * 3 + 1, gy, mask=row < n)
    tl.store(out + row * 3 + 2, gz, mask=row < n)


@jit
def _weighted_entry(table, index, live, g0, g1, STORED: tl.constexpr, ROUNDED: tl.constexpr):
    low, high = load_entry(table, index, live, STORED, ROUNDED)
    return low * g0 if STORED == "single" else low * g0 + high * g1
