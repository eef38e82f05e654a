"""Kernels of `group_norm_silu`, which has the maths and the legend.

A tile is [ROWS, GROUPS * WIDTH]: places by channels, with GROUPS groups of WIDTH columns each. Where a group has fewer
channels than WIDTH some columns are empty; where it has more it is cut into column parts. D: channels of a group where
channels are last in memory (a constant, so that the compiler knows the alignment of loads), else 0; then GROUPS is 1.
x, y and their gradients lie in memory as [N, S, C] (D > 0) or [N, C, S].
moments [2, N, G]: mean and rstd. partials [2, N, G, P]: the sums of each part of a group. The second half of such a
pair starts a `plane` behind the first.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import jit, tl
from dream_fast.kernels.nn.group_norm_device import (
    activate,
    activation_grad,
    addresses,
    load_added,
    load_affine,
    load_origin,
    load_pair,
    load_sum,
    load_tile,
    locate,
    merge_moments,
    merge_sums,
    part_rows,
    rows_inside,
    store_pair,
    sum_groups,
    tile_columns,
    tile_moments,
    to_columns,
)


@jit
def group_norm_moments_fwd_kernel(
    x,  # [N, C, S] or [N, S, C] float
    added,  # [N, C] float, or None
    partials,  # [2, N, G, P] fp32
    plane,
    places,
    channels,
    groups,
    width,
    parts,
    row_parts,
    blocks,
    chunk,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Mean and sum of squared deviations of a part of a block of groups."""
    image, block, part = locate(tl.program_id(0), parts, blocks, D)
    column_part, begin, end = part_rows(part, row_parts, chunk, places)
    group, channel, is_channel = tile_columns(block, column_part, groups, width, D, GROUPS, WIDTH)
    position, shape = (image, block, column_part), (places, channels, width)
    first = block * width + column_part * WIDTH
    start, _ = addresses(position, begin, channel, shape, D, ROWS, WIDTH)
    origin = load_origin(x, added, image, start, group, groups, first, channels, D)[None, :]
    addend = load_added(added, image, channel, channels, is_channel)
    # A sum for every place in a tile: the lanes are added up once, after the loop.
    sums, squares = tl.zeros([ROWS, GROUPS * WIDTH], tl.float32), tl.zeros([ROWS, GROUPS * WIDTH], tl.float32)
    row = begin
    while row < end:
        base, offset = addresses(position, row, channel, shape, D, ROWS, WIDTH)
        inside = rows_inside(row, end, is_channel, ROWS)
        value = load_tile(x, base, offset, inside)
        if added is not None:
            value += addend[None, :]
        apart = tl.where(inside, value - origin, 0.0)
        sums += apart
        squares += apart * apart
        row += ROWS
    group = block * GROUPS + tl.arange(0, GROUPS)
    columns = tl.minimum(WIDTH, width - column_part * WIDTH)
    sums = sum_groups(tl.sum(sums, axis=0), GROUPS, WIDTH)
    apart = sums / ((end - begin).to(tl.float32) * columns)
    squares = tl.maximum(sum_groups(tl.sum(squares, axis=0), GROUPS, WIDTH) - sums * apart, 0.0)
    mean = load_origin(x, added, image, start, group, groups, first, channels, D) + apart
    store_pair(partials, plane, (image * groups + group) * parts + part, mean, squares, group < groups)


@jit
def group_norm_merge_fwd_kernel(
    partials,  # [2, N, G, P] fp32
    plane,
    moments,  # [2, N, G] fp32
    moments_plane,
    places,
    width,
    parts,
    row_parts,
    chunk,
    eps,
    WIDTH: tl.constexpr,
):
    """mean and rstd of a group of an image, from those of its parts."""
    group = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    here = group >= 0
    mean, rstd = merge_moments(
        partials, plane, group * parts, here, parts, row_parts, chunk, places, width, eps, 1, WIDTH
    )
    store_pair(moments, moments_plane, group, mean, rstd, None)


@jit
def group_norm_apply_fwd_kernel(
    x,  # [N, C, S] or [N, S, C] float
    added,  # [N, C] float, or None
    weight,  # [C] float
    bias,  # [C] float
    y,  # as x
    partials,  # [2, N, G, P] fp32
    plane,
    moments,  # [2, N, G] fp32: read, or written where MERGE
    moments_plane,
    places,
    channels,
    groups,
    width,
    parts,
    row_parts,
    blocks,
    chunk,
    tiles,
    row_tiles,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    MERGE: tl.constexpr,
):
    """y of a tile, from the last tile to the first: the pass before left the end of x in the cache.

    MERGE: merge the parts here; else another kernel has merged them into moments.
    """
    image, block, tile = locate(tl.num_programs(0) - 1 - tl.program_id(0), tiles, blocks, D)
    group, channel, is_channel = tile_columns(block, tile // row_tiles, groups, width, D, GROUPS, WIDTH)
    row = (tile % row_tiles).to(tl.int64) * ROWS
    position, shape = (image, block, tile // row_tiles), (places, channels, width)
    base, offset = addresses(position, row, channel, shape, D, ROWS, WIDTH)
    inside = rows_inside(row, places, is_channel, ROWS)
    value = load_sum(x, added, image, base, offset, inside, channel, channels, is_channel)
    scale, shift = load_affine(weight, bias, channel, is_channel)
    if MERGE:
        group = block * GROUPS + tl.arange(0, GROUPS)
        here = group < groups
        index = image * groups + group
        mean, rstd = merge_moments(
            partials, plane, index * parts, here, parts, row_parts, chunk, places, width, eps, GROUPS, WIDTH
        )
        if tile == 0:
            store_pair(moments, moments_plane, index, mean, rstd, here)
        mean, rstd = to_columns(mean, GROUPS, WIDTH), to_columns(rstd, GROUPS, WIDTH)
    else:
        mean, rstd = load_pair(moments, moments_plane, image * groups + group, is_channel)
    tl.store(y + base + offset, activate(value, mean, rstd, scale, shift, SILU), mask=inside)


@jit
def group_norm_whole_fwd_kernel(
    x,  # [N, C, S] or [N, S, C] float
    added,  # [N, C] float, or None
    weight,  # [C] float
    bias,  # [C] float
    y,  # as x
    moments,  # [2, N, G] fp32
    moments_plane,
    places,
    channels,
    groups,
    width,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
):
    """y of a group, which stays in registers."""
    image, block, _ = locate(tl.program_id(0), 1, groups, D)
    _, channel, is_channel = tile_columns(block, 0, groups, width, D, 1, WIDTH)
    base, offset = addresses((image, block, 0), 0, channel, (places, channels, width), D, ROWS, WIDTH)
    inside = rows_inside(0, places, is_channel, ROWS)
    value = load_tile(x, base, offset, inside)
    if added is not None:
        value = tl.where(inside, value + load_added(added, image, channel, channels, is_channel)[None, :], 0.0)
    scale, shift = load_affine(weight, bias, channel, is_channel)
    count = places * 1.0 * width
    mean, squares = tile_moments(value, inside, count, 1, WIDTH)
    rstd = tl.rsqrt(squares / count + eps)
    store_pair(moments, moments_plane, image * groups + block + tl.arange(0, 1), mean, rstd, None)
    mean, rstd = to_columns(mean, 1, WIDTH), to_columns(rstd, 1, WIDTH)
    tl.store(y + base + offset, activate(value, mean, rstd, scale, shift, SILU), mask=inside)


@jit
def group_norm_sums_bwd_kernel(
    grad_y,  # as x
    x,  # [N, C, S] or [N, S, C] float
    added,  # [N, C] float, or None
    weight,  # [C] float
    bias,  # [C] float
    moments,  # [2, N, G] fp32
    moments_plane,
    partials,  # [2, N, G, P] fp32: sums of w e and of w e n
    plane,
    channel_sums,  # [2, N, row_parts, C] fp32: sums of e and of e n of every channel; or None
    channel_plane,
    places,
    channels,
    groups,
    width,
    parts,
    row_parts,
    blocks,
    chunk,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
):
    """Add up a part of a block of groups."""
    image, block, part = locate(tl.program_id(0), parts, blocks, D)
    column_part, begin, end = part_rows(part, row_parts, chunk, places)
    group, channel, is_channel = tile_columns(block, column_part, groups, width, D, GROUPS, WIDTH)
    position, shape = (image, block, column_part), (places, channels, width)
    mean, rstd = load_pair(moments, moments_plane, image * groups + group, is_channel)
    scale, shift = load_affine(weight, bias, channel, is_channel)
    addend = load_added(added, image, channel, channels, is_channel)
    # A sum for every place in a tile: the lanes are added up once, after the loop.
    sums, products = tl.zeros([ROWS, GROUPS * WIDTH], tl.float32), tl.zeros([ROWS, GROUPS * WIDTH], tl.float32)
    row = begin
    while row < end:
        base, offset = addresses(position, row, channel, shape, D, ROWS, WIDTH)
        inside = rows_inside(row, end, is_channel, ROWS)
        value = load_tile(x, base, offset, inside)
        if added is not None:
            value += addend[None, :]
        grad = load_tile(grad_y, base, offset, inside)
        deviation, grad = activation_grad(value, grad, mean, rstd, scale, shift, SILU)
        sums += grad
        products += grad * deviation
        row += ROWS
    sums, products = tl.sum(sums, axis=0), tl.sum(products, axis=0) * rstd
    if channel_sums is not None:
        index = (image * row_parts + part % row_parts) * channels + channel
        store_pair(channel_sums, channel_plane, index, sums, products, is_channel)
    group = block * GROUPS + tl.arange(0, GROUPS)
    sums, products = sum_groups(sums * scale, GROUPS, WIDTH), sum_groups(products * scale, GROUPS, WIDTH)
    store_pair(partials, plane, (image * groups + group) * parts + part, sums, products, group < groups)


@jit
def group_norm_merge_bwd_kernel(
    partials,  # [2, N, G, P] fp32
    plane,
    sums,  # [2, N, G] fp32
    sums_plane,
    parts,
):
    """Both sums of a group of an image, from those of its parts."""
    group = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    first, second = merge_sums(partials, plane, group * parts, group >= 0, parts, 1)
    store_pair(sums, sums_plane, group, first, second, None)


@jit
def group_norm_apply_bwd_kernel(
    grad_y,  # as x
    x,  # [N, C, S] or [N, S, C] float
    added,  # [N, C] float, or None
    weight,  # [C] float
    bias,  # [C] float
    moments,  # [2, N, G] fp32
    moments_plane,
    partials,  # [2, N, G, P] fp32
    plane,
    sums,  # [2, N, G] fp32, or None where MERGE
    grad_x,  # as x
    places,
    channels,
    groups,
    width,
    parts,
    blocks,
    tiles,
    row_tiles,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Gradient of x of a tile, from the last tile to the first. MERGE as in `group_norm_apply_fwd_kernel`."""
    image, block, tile = locate(tl.num_programs(0) - 1 - tl.program_id(0), tiles, blocks, D)
    group, channel, is_channel = tile_columns(block, tile // row_tiles, groups, width, D, GROUPS, WIDTH)
    mean, rstd = load_pair(moments, moments_plane, image * groups + group, is_channel)
    scale, shift = load_affine(weight, bias, channel, is_channel)
    row = (tile % row_tiles).to(tl.int64) * ROWS
    position, shape = (image, block, tile // row_tiles), (places, channels, width)
    base, offset = addresses(position, row, channel, shape, D, ROWS, WIDTH)
    inside = rows_inside(row, places, is_channel, ROWS)
    value = load_sum(x, added, image, base, offset, inside, channel, channels, is_channel)
    grad = load_tile(grad_y, base, offset, inside)
    if MERGE:
        merged = block * GROUPS + tl.arange(0, GROUPS)
        first, second = merge_sums(partials, plane, (image * groups + merged) * parts, merged < groups, parts, GROUPS)
        first, second = to_columns(first, GROUPS, WIDTH), to_columns(second, GROUPS, WIDTH)
    else:
        first, second = load_pair(sums, moments_plane, image * groups + group, is_channel)
    inverse = 1.0 / (places * 1.0 * width)
    deviation, grad = activation_grad(value, grad, mean, rstd, scale, shift, SILU)
    common = (first * inverse)[None, :] + deviation * (rstd * second * inverse)[None, :]
    tl.store(grad_x + base + offset, (grad * scale[None, :] - common) * rstd[None, :], mask=inside)


@jit
def group_norm_whole_bwd_kernel(
    grad_y,  # as x
    x,  # [N, C, S] or [N, S, C] float
    added,  # [N, C] float, or None
    weight,  # [C] float
    bias,  # [C] float
    moments,  # [2, N, G] fp32
    moments_plane,
    channel_sums,  # [2, N, 1, C] fp32, or None
    channel_plane,
    grad_x,  # as x
    places,
    channels,
    groups,
    width,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
):
    """Gradient of x of a group, which stays in registers."""
    image, block, _ = locate(tl.program_id(0), 1, groups, D)
    group, channel, is_channel = tile_columns(block, 0, groups, width, D, 1, WIDTH)
    mean, rstd = load_pair(moments, moments_plane, image * groups + group, is_channel)
    scale, shift = load_affine(weight, bias, channel, is_channel)
    base, offset = addresses((image, block, 0), 0, channel, (places, channels, width), D, ROWS, WIDTH)
    inside = rows_inside(0, places, is_channel, ROWS)
    value = load_sum(x, added, image, base, offset, inside, channel, channels, is_channel)
    grad = load_tile(grad_y, base, offset, inside)
    deviation, grad = activation_grad(value, grad, mean, rstd, scale, shift, SILU)
    sums, products = tl.sum(grad, axis=0), tl.sum(grad * deviation, axis=0) * rstd
    if channel_sums is not None:
        store_pair(channel_sums, channel_plane, image * channels + channel, sums, products, is_channel)
    inverse = 1.0 / (places * 1.0 * width)
    first, second = tl.sum(sums * scale, axis=0), tl.sum(products * scale, axis=0)
    common = first * inverse + deviation * (rstd * second * inverse)[None, :]
    tl.store(grad_x + base + offset, (grad * scale[None, :] - common) * rstd[None, :], mask=inside)
