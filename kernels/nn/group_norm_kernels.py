"""Device code of group normalisation with SiLU: see `group_norm_silu` for the maths and the legend.

Tiles are [ROWS, GROUPS * WIDTH]: places by channels, of which GROUPS groups with WIDTH columns each. A group of another
number of channels than WIDTH leaves columns empty, or is cut into several parts. D: channels of a group where channels
are last in memory (the compiler then knows how far loads are aligned), else 0; there GROUPS is 1.
added [N, C] or None: what is added to x first, a number a channel.
moments [2, N, G]: mean and rstd. partials [2, N, G, P]: what the parts of a group add up to. The second half of such a
pair lies a `plane` behind the first.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl

# Parts that a program merges at a time, times the groups that it merges.
_MERGED = constant(1024)


@jit
def _place(program, parts, blocks, D: tl.constexpr):
    """Image, block of groups and part of a program, numbered as they lie in memory."""
    image = program // (parts * blocks)
    rest = program % (parts * blocks)
    if D > 0:
        block, part = rest % blocks, rest // blocks
    else:
        block, part = rest // parts, rest % parts
    return image.to(tl.int64), block, part


@jit
def _columns(block, column_part, groups, width, D: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Group and channel of every column of a tile, and whether there is one: [GROUPS * WIDTH] each."""
    column = tl.arange(0, GROUPS * WIDTH)
    group = block * GROUPS + column // WIDTH
    if D == WIDTH:  # no column is empty: one run of channels
        channel = block * (GROUPS * WIDTH) + column
        inside = channel < groups * D
    elif D > 0:
        within = column_part * WIDTH + column % WIDTH
        channel = group * D + within
        inside = (group < groups) & (within < D)
    else:
        channel = block * width + column_part * WIDTH + column
        inside = column < width - column_part * WIDTH
    return group, channel, inside


@jit
def _addresses(
    image,
    block,
    column_part,
    row,
    channel,
    places,
    channels,
    width,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Where a tile lies: the offset of its beginning in int64, and those from there, int32 [ROWS, columns]."""
    rows = tl.arange(0, ROWS)[:, None]
    if D > 0:
        base = (image * places + row) * channels
        offset = rows * channels + channel[None, :]
    else:
        base = (image * channels + block * width + column_part * WIDTH) * places + row
        offset = rows + (tl.arange(0, WIDTH) * places)[None, :]
    return base, offset


@jit
def _of_groups(value, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums over the columns of each group: [GROUPS * WIDTH] -> [GROUPS]."""
    return tl.sum(tl.reshape(value, [GROUPS, WIDTH]), axis=1)


@jit
def _to_columns(value, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """[GROUPS] -> [GROUPS * WIDTH]"""
    return tl.reshape(tl.broadcast_to(value[:, None], [GROUPS, WIDTH]), [GROUPS * WIDTH])


@jit
def _moments(x, inside, count, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Mean and sum of squared deviations of each group in a tile with `count` elements a group: [GROUPS] each.

    The mean is corrected by the mean of what deviates from it, as sums of large numbers leave an error.
    """
    share = 1.0 / tl.maximum(count, 1.0)
    mean = _of_groups(tl.sum(x, axis=0), GROUPS, WIDTH) * share
    deviation = tl.where(inside, x - _to_columns(mean, GROUPS, WIDTH)[None, :], 0.0)
    rest = _of_groups(tl.sum(deviation, axis=0), GROUPS, WIDTH) * share
    squares = _of_groups(tl.sum(deviation * deviation, axis=0), GROUPS, WIDTH)
    return mean + rest, tl.maximum(squares - count * rest * rest, 0.0)


@jit
def _added(added, image, channel, channels, is_channel):
    """What is added to x in every column, fp32."""
    if added is None:
        return tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(added + image * channels + channel, mask=is_channel, other=0.0).to(tl.float32)


@jit
def _element(x, added, image, base, group, groups, first, channels, D: tl.constexpr):
    """An element of each group, fp32. It is as far from the mean as any other, so that differences to it are small.

    It is of the channel group * D where channels are last, else of the channel `first`.
    """
    here = group < groups
    channel = group * D if D > 0 else first + group * 0
    value = tl.load(x + base + group * D, mask=here, other=0.0).to(tl.float32)
    return value + _added(added, image, channel, channels, here)


@jit
def _merged_moments(
    partials, plane, base, here, parts, row_parts, chunk, places, width, eps, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    """mean and rstd [GROUPS] of groups whose parts start at base [GROUPS] of `partials`."""
    total = places * 1.0 * width
    first = tl.load(partials + base, mask=here, other=0.0)
    mean = tl.zeros([GROUPS], tl.float32)
    start = 0
    while start < parts:
        part = start + tl.arange(0, _MERGED // GROUPS)
        inside = here[:, None] & (part < parts)[None, :]
        count = _count(part, row_parts, chunk, places, width, WIDTH)
        found = tl.load(partials + base[:, None] + part[None, :], mask=inside, other=0.0)
        mean += tl.sum(tl.where(inside, (found - first[:, None]) * count[None, :], 0.0), axis=1)
        start += _MERGED // GROUPS
    mean = first + mean / total
    squares = tl.zeros([GROUPS], tl.float32)
    start = 0
    while start < parts:
        part = start + tl.arange(0, _MERGED // GROUPS)
        inside = here[:, None] & (part < parts)[None, :]
        count = _count(part, row_parts, chunk, places, width, WIDTH)
        found = tl.load(partials + base[:, None] + part[None, :], mask=inside, other=0.0) - mean[:, None]
        within = tl.load(partials + plane + base[:, None] + part[None, :], mask=inside, other=0.0)
        squares += tl.sum(tl.where(inside, within + found * found * count[None, :], 0.0), axis=1)
        start += _MERGED // GROUPS
    return mean, tl.rsqrt(squares / total + eps)


@jit
def _count(part, row_parts, chunk, places, width, WIDTH: tl.constexpr):
    """Elements of a group in a part, fp32."""
    rows = tl.minimum(chunk, places - (part % row_parts).to(tl.int64) * chunk)
    return rows.to(tl.float32) * tl.minimum(WIDTH, width - (part // row_parts) * WIDTH)


@jit
def _merged_sums(partials, plane, base, here, parts, GROUPS: tl.constexpr):
    """Both sums [GROUPS] of groups whose parts start at base [GROUPS] of `partials`."""
    first, second = tl.zeros([GROUPS], tl.float32), tl.zeros([GROUPS], tl.float32)
    start = 0
    while start < parts:
        part = start + tl.arange(0, _MERGED // GROUPS)
        inside = here[:, None] & (part < parts)[None, :]
        first += tl.sum(tl.load(partials + base[:, None] + part[None, :], mask=inside, other=0.0), axis=1)
        second += tl.sum(tl.load(partials + plane + base[:, None] + part[None, :], mask=inside, other=0.0), axis=1)
        start += _MERGED // GROUPS
    return first, second


@jit
def _activated(x, mean, rstd, weight, bias, SILU: tl.constexpr):
    """y of a tile; mean, rstd, weight and bias a column each."""
    z = (x - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :]
    if SILU:
        z = z / (1 + tl.exp(-z))
    return z


@jit
def _before_activation(x, grad, mean, rstd, weight, bias, SILU: tl.constexpr):
    """x - mean, which is n / rstd, and e of a tile, from x and the gradient of y."""
    apart = x - mean[None, :]
    if SILU:
        z = apart * (rstd * weight)[None, :] + bias[None, :]
        sigmoid = 1 / (1 + tl.exp(-z))
        grad = grad * sigmoid * (1 + z * (1 - sigmoid))
    return apart, grad


@jit
def group_norm_moments_fwd_kernel(
    x,
    added,
    partials,
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
    """A program a part of a block of groups: mean and sum of squared deviations to partials [2, N, G, P]."""
    image, block, part = _place(tl.program_id(0), parts, blocks, D)
    group, channel, is_channel = _columns(block, part // row_parts, groups, width, D, GROUPS, WIDTH)
    begin = (part % row_parts).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, places)
    first = block * width + (part // row_parts) * WIDTH
    start, _ = _addresses(image, block, part // row_parts, begin, channel, places, channels, width, WIDTH, ROWS, D)
    shift = _element(x, added, image, start, group, groups, first, channels, D)[None, :]
    more = _added(added, image, channel, channels, is_channel)
    # Of every place in a tile: lanes meet once, behind the loop.
    sums, squares = tl.zeros([ROWS, GROUPS * WIDTH], tl.float32), tl.zeros([ROWS, GROUPS * WIDTH], tl.float32)
    row = begin
    while row < end:
        base, offset = _addresses(
            image, block, part // row_parts, row, channel, places, channels, width, WIDTH, ROWS, D
        )
        inside = (tl.arange(0, ROWS) < end - row)[:, None] & is_channel[None, :]
        value = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
        if added is not None:
            value += more[None, :]
        apart = tl.where(inside, value - shift, 0.0)
        sums += apart
        squares += apart * apart
        row += ROWS
    group = block * GROUPS + tl.arange(0, GROUPS)
    columns = tl.minimum(WIDTH, width - (part // row_parts) * WIDTH)
    sums = _of_groups(tl.sum(sums, axis=0), GROUPS, WIDTH)
    apart = sums / ((end - begin).to(tl.float32) * columns)
    squares = tl.maximum(_of_groups(tl.sum(squares, axis=0), GROUPS, WIDTH) - sums * apart, 0.0)
    mean = _element(x, added, image, start, group, groups, first, channels, D) + apart
    at = (image * groups + group) * parts + part
    tl.store(partials + at, mean, mask=group < groups)
    tl.store(partials + plane + at, squares, mask=group < groups)


@jit
def group_norm_merge_fwd_kernel(
    partials, plane, moments, moments_plane, places, width, parts, row_parts, chunk, eps, WIDTH: tl.constexpr
):
    """A program a group of an image: mean and rstd to moments [2, N, G]."""
    group = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    here = group >= 0
    mean, rstd = _merged_moments(
        partials, plane, group * parts, here, parts, row_parts, chunk, places, width, eps, 1, WIDTH
    )
    tl.store(moments + group, mean)
    tl.store(moments + moments_plane + group, rstd)


@jit
def group_norm_apply_fwd_kernel(
    x,
    added,
    weight,
    bias,
    y,
    partials,
    plane,
    moments,
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
    """A program a tile, from the last to the first: what the pass before read last is still in the cache.

    MERGE: from the parts themselves, else from moments, which another kernel has merged.
    """
    image, block, tile = _place(tl.num_programs(0) - 1 - tl.program_id(0), tiles, blocks, D)
    group, channel, is_channel = _columns(block, tile // row_tiles, groups, width, D, GROUPS, WIDTH)
    row = (tile % row_tiles).to(tl.int64) * ROWS
    base, offset = _addresses(image, block, tile // row_tiles, row, channel, places, channels, width, WIDTH, ROWS, D)
    inside = (tl.arange(0, ROWS) < places - row)[:, None] & is_channel[None, :]
    value = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        value += _added(added, image, channel, channels, is_channel)[None, :]
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    if MERGE:
        own = block * GROUPS + tl.arange(0, GROUPS)
        here = own < groups
        own = image * groups + own
        mean, rstd = _merged_moments(
            partials, plane, own * parts, here, parts, row_parts, chunk, places, width, eps, GROUPS, WIDTH
        )
        if tile == 0:
            tl.store(moments + own, mean, mask=here)
            tl.store(moments + moments_plane + own, rstd, mask=here)
        mean, rstd = _to_columns(mean, GROUPS, WIDTH), _to_columns(rstd, GROUPS, WIDTH)
    else:
        own = image * groups + group
        mean = tl.load(moments + own, mask=is_channel, other=0.0)
        rstd = tl.load(moments + moments_plane + own, mask=is_channel, other=0.0)
    tl.store(y + base + offset, _activated(value, mean, rstd, scale, shift, SILU), mask=inside)


@jit
def group_norm_whole_fwd_kernel(
    x,
    added,
    weight,
    bias,
    y,
    moments,
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
    """A program a group, which stays in registers."""
    image, block, _ = _place(tl.program_id(0), 1, groups, D)
    _, channel, is_channel = _columns(block, 0, groups, width, D, 1, WIDTH)
    base, offset = _addresses(image, block, 0, 0, channel, places, channels, width, WIDTH, ROWS, D)
    inside = (tl.arange(0, ROWS) < places)[:, None] & is_channel[None, :]
    value = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        value = tl.where(inside, value + _added(added, image, channel, channels, is_channel)[None, :], 0.0)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    count = places * 1.0 * width
    mean, squares = _moments(value, inside, count, 1, WIDTH)
    rstd = tl.rsqrt(squares / count + eps)
    at = image * groups + block + tl.arange(0, 1)
    tl.store(moments + at, mean)
    tl.store(moments + moments_plane + at, rstd)
    mean, rstd = _to_columns(mean, 1, WIDTH), _to_columns(rstd, 1, WIDTH)
    tl.store(y + base + offset, _activated(value, mean, rstd, scale, shift, SILU), mask=inside)


@jit
def group_norm_sums_bwd_kernel(
    grad_y,
    x,
    added,
    weight,
    bias,
    moments,
    moments_plane,
    partials,
    plane,
    channel_sums,
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
    """A program a part: sums of w e and of w e n to partials [2, N, G, P].

    With channel_sums also the sums of e and e n of every channel, [2, N, row_parts, C].
    """
    image, block, part = _place(tl.program_id(0), parts, blocks, D)
    group, channel, is_channel = _columns(block, part // row_parts, groups, width, D, GROUPS, WIDTH)
    own = image * groups + group
    mean = tl.load(moments + own, mask=is_channel, other=0.0)
    rstd = tl.load(moments + moments_plane + own, mask=is_channel, other=0.0)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    begin = (part % row_parts).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, places)
    # Of every place in a tile: lanes meet once, behind the loop.
    more = _added(added, image, channel, channels, is_channel)
    sums, products = tl.zeros([ROWS, GROUPS * WIDTH], tl.float32), tl.zeros([ROWS, GROUPS * WIDTH], tl.float32)
    row = begin
    while row < end:
        base, offset = _addresses(
            image, block, part // row_parts, row, channel, places, channels, width, WIDTH, ROWS, D
        )
        inside = (tl.arange(0, ROWS) < end - row)[:, None] & is_channel[None, :]
        value = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
        if added is not None:
            value += more[None, :]
        grad = tl.load(grad_y + base + offset, mask=inside, other=0.0).to(tl.float32)
        apart, grad = _before_activation(value, grad, mean, rstd, scale, shift, SILU)
        sums += grad
        products += grad * apart
        row += ROWS
    sums, products = tl.sum(sums, axis=0), tl.sum(products, axis=0) * rstd
    if channel_sums is not None:
        at = (image * row_parts + part % row_parts) * channels + channel
        tl.store(channel_sums + at, sums, mask=is_channel)
        tl.store(channel_sums + channel_plane + at, products, mask=is_channel)
    group = block * GROUPS + tl.arange(0, GROUPS)
    at = (image * groups + group) * parts + part
    tl.store(partials + at, _of_groups(sums * scale, GROUPS, WIDTH), mask=group < groups)
    tl.store(partials + plane + at, _of_groups(products * scale, GROUPS, WIDTH), mask=group < groups)


@jit
def group_norm_merge_bwd_kernel(partials, plane, sums, sums_plane, parts):
    """A program a group of an image: both sums to sums [2, N, G]."""
    group = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    first, second = _merged_sums(partials, plane, group * parts, group >= 0, parts, 1)
    tl.store(sums + group, first)
    tl.store(sums + sums_plane + group, second)


@jit
def group_norm_apply_bwd_kernel(
    grad_y,
    x,
    added,
    weight,
    bias,
    moments,
    moments_plane,
    partials,
    plane,
    sums,
    grad_x,
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
    """A program a tile, from the last to the first. MERGE as in `group_norm_apply_fwd_kernel`; sums [2, N, G]."""
    image, block, tile = _place(tl.num_programs(0) - 1 - tl.program_id(0), tiles, blocks, D)
    group, channel, is_channel = _columns(block, tile // row_tiles, groups, width, D, GROUPS, WIDTH)
    own = image * groups + group
    mean = tl.load(moments + own, mask=is_channel, other=0.0)
    rstd = tl.load(moments + moments_plane + own, mask=is_channel, other=0.0)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    row = (tile % row_tiles).to(tl.int64) * ROWS
    base, offset = _addresses(image, block, tile // row_tiles, row, channel, places, channels, width, WIDTH, ROWS, D)
    inside = (tl.arange(0, ROWS) < places - row)[:, None] & is_channel[None, :]
    value = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        value += _added(added, image, channel, channels, is_channel)[None, :]
    grad = tl.load(grad_y + base + offset, mask=inside, other=0.0).to(tl.float32)
    if MERGE:
        merged = block * GROUPS + tl.arange(0, GROUPS)
        first, second = _merged_sums(partials, plane, (image * groups + merged) * parts, merged < groups, parts, GROUPS)
        first, second = _to_columns(first, GROUPS, WIDTH), _to_columns(second, GROUPS, WIDTH)
    else:
        first = tl.load(sums + own, mask=is_channel, other=0.0)
        second = tl.load(sums + moments_plane + own, mask=is_channel, other=0.0)
    share = 1.0 / (places * 1.0 * width)
    apart, grad = _before_activation(value, grad, mean, rstd, scale, shift, SILU)
    common = (first * share)[None, :] + apart * (rstd * second * share)[None, :]
    tl.store(grad_x + base + offset, (grad * scale[None, :] - common) * rstd[None, :], mask=inside)


@jit
def group_norm_whole_bwd_kernel(
    grad_y,
    x,
    added,
    weight,
    bias,
    moments,
    moments_plane,
    channel_sums,
    channel_plane,
    grad_x,
    places,
    channels,
    groups,
    width,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
):
    """A program a group, which stays in registers."""
    image, block, _ = _place(tl.program_id(0), 1, groups, D)
    group, channel, is_channel = _columns(block, 0, groups, width, D, 1, WIDTH)
    own = image * groups + group
    mean = tl.load(moments + own, mask=is_channel, other=0.0)
    rstd = tl.load(moments + moments_plane + own, mask=is_channel, other=0.0)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    base, offset = _addresses(image, block, 0, 0, channel, places, channels, width, WIDTH, ROWS, D)
    inside = (tl.arange(0, ROWS) < places)[:, None] & is_channel[None, :]
    value = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        value += _added(added, image, channel, channels, is_channel)[None, :]
    grad = tl.load(grad_y + base + offset, mask=inside, other=0.0).to(tl.float32)
    apart, grad = _before_activation(value, grad, mean, rstd, scale, shift, SILU)
    sums, products = tl.sum(grad, axis=0), tl.sum(grad * apart, axis=0) * rstd
    if channel_sums is not None:
        at = image * channels + channel
        tl.store(channel_sums + at, sums, mask=is_channel)
        tl.store(channel_sums + channel_plane + at, products, mask=is_channel)
    share = 1.0 / (places * 1.0 * width)
    common = tl.sum(sums * scale, axis=0) * share + apart * (rstd * tl.sum(products * scale, axis=0) * share)[None, :]
    tl.store(grad_x + base + offset, (grad * scale[None, :] - common) * rstd[None, :], mask=inside)
