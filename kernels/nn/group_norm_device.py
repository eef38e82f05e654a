"""Device functions of group normalisation: where tiles lie in memory, loads, moments and their merging, activation.

The legend is that of `group_norm_kernels.py`.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl

# Parts that a program merges at a time, times the groups that it merges.
_MERGED = constant(1024)


@jit
def locate(program, parts, blocks, D: tl.constexpr):
    """Image, block of groups and part of a program, numbered as they lie in memory."""
    image = program // (parts * blocks)
    rest = program % (parts * blocks)
    if D > 0:
        block, part = rest % blocks, rest // blocks
    else:
        block, part = rest // parts, rest % parts
    return image.to(tl.int64), block, part


@jit
def part_rows(part, row_parts, chunk, places):
    """Column part of a part of a group, its first row and the row after its last."""
    begin = (part % row_parts).to(tl.int64) * chunk
    return part // row_parts, begin, tl.minimum(begin + chunk, places)


@jit
def tile_columns(block, column_part, groups, width, D: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Group and channel of every column of a tile, and whether there is one: [GROUPS * WIDTH] each."""
    column = tl.arange(0, GROUPS * WIDTH)
    group = block * GROUPS + column // WIDTH
    if D == WIDTH:  # no column is empty: one run of channels
        channel = block * (GROUPS * WIDTH) + column
        inside = channel < groups * D
    elif D > 0:
        group_channel = column_part * WIDTH + column % WIDTH
        channel = group * D + group_channel
        inside = (group < groups) & (group_channel < D)
    else:
        channel = block * width + column_part * WIDTH + column
        inside = column < width - column_part * WIDTH
    return group, channel, inside


@jit
def addresses(position, row, channel, shape, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Offset of a tile in int64, and of its elements from there in int32, [ROWS, columns].

    position: (image, block, column part); shape: (places, channels, width).
    """
    image, block, column_part = position
    places, channels, width = shape
    rows = tl.arange(0, ROWS)[:, None]
    if D > 0:
        base = (image * places + row) * channels
        offset = rows * channels + channel[None, :]
    else:
        base = (image * channels + block * width + column_part * WIDTH) * places + row
        offset = rows + (tl.arange(0, WIDTH) * places)[None, :]
    return base, offset


@jit
def rows_inside(row, end, is_channel, ROWS: tl.constexpr):
    """Mask [ROWS, columns] of a tile that starts at `row`, of rows before `end`."""
    return (tl.arange(0, ROWS) < end - row)[:, None] & is_channel[None, :]


@jit
def load_tile(pointer, base, offset, inside):
    """A tile in fp32; 0 outside."""
    return tl.load(pointer + base + offset, mask=inside, other=0.0).to(tl.float32)


@jit
def load_added(added, image, channel, channels, is_channel):
    """The number added to x in every column, fp32."""
    if added is None:
        return tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(added + image * channels + channel, mask=is_channel, other=0.0).to(tl.float32)


@jit
def load_sum(x, added, image, base, offset, inside, channel, channels, is_channel):
    """A tile of x, with what is added to it, in fp32."""
    value = load_tile(x, base, offset, inside)
    if added is not None:
        value += load_added(added, image, channel, channels, is_channel)[None, :]
    return value


@jit
def load_affine(weight, bias, channel, is_channel):
    """weight and bias of every column, fp32."""
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    return scale, shift


@jit
def load_pair(pointer, plane, index, mask):
    """Both numbers of pairs whose second half starts a `plane` behind the first."""
    first = tl.load(pointer + index, mask=mask, other=0.0)
    second = tl.load(pointer + plane + index, mask=mask, other=0.0)
    return first, second


@jit
def store_pair(pointer, plane, index, first, second, mask):
    tl.store(pointer + index, first, mask=mask)
    tl.store(pointer + plane + index, second, mask=mask)


@jit
def sum_groups(value, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums over the columns of each group: [GROUPS * WIDTH] -> [GROUPS]."""
    return tl.sum(tl.reshape(value, [GROUPS, WIDTH]), axis=1)


@jit
def to_columns(value, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Repeat a number a group for its columns: [GROUPS] -> [GROUPS * WIDTH]."""
    return tl.reshape(tl.broadcast_to(value[:, None], [GROUPS, WIDTH]), [GROUPS * WIDTH])


@jit
def tile_moments(x, inside, count, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Mean and sum of squared deviations of each group in a tile with `count` elements a group: [GROUPS] each.

    The mean is corrected by the mean of the deviations from it, as sums of large numbers leave an error.
    """
    inverse = 1.0 / tl.maximum(count, 1.0)
    mean = sum_groups(tl.sum(x, axis=0), GROUPS, WIDTH) * inverse
    deviation = tl.where(inside, x - to_columns(mean, GROUPS, WIDTH)[None, :], 0.0)
    rest = sum_groups(tl.sum(deviation, axis=0), GROUPS, WIDTH) * inverse
    squares = sum_groups(tl.sum(deviation * deviation, axis=0), GROUPS, WIDTH)
    return mean + rest, tl.maximum(squares - count * rest * rest, 0.0)


@jit
def load_origin(x, added, image, base, group, groups, first, channels, D: tl.constexpr):
    """An element of each group, fp32: differences from it are small, whichever element it is.

    Its channel is group * D where channels are last, else `first`.
    """
    here = group < groups
    channel = group * D if D > 0 else first + group * 0
    value = tl.load(x + base + group * D, mask=here, other=0.0).to(tl.float32)
    return value + load_added(added, image, channel, channels, here)


@jit
def _part_size(part, row_parts, chunk, places, width, WIDTH: tl.constexpr):
    """Elements of a group in a part, fp32."""
    rows = tl.minimum(chunk, places - (part % row_parts).to(tl.int64) * chunk)
    return rows.to(tl.float32) * tl.minimum(WIDTH, width - (part // row_parts) * WIDTH)


@jit
def merge_moments(
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
        size = _part_size(part, row_parts, chunk, places, width, WIDTH)
        means = tl.load(partials + base[:, None] + part[None, :], mask=inside, other=0.0)
        mean += tl.sum(tl.where(inside, (means - first[:, None]) * size[None, :], 0.0), axis=1)
        start += _MERGED // GROUPS
    mean = first + mean / total
    squares = tl.zeros([GROUPS], tl.float32)
    start = 0
    while start < parts:
        part = start + tl.arange(0, _MERGED // GROUPS)
        inside = here[:, None] & (part < parts)[None, :]
        size = _part_size(part, row_parts, chunk, places, width, WIDTH)
        apart = tl.load(partials + base[:, None] + part[None, :], mask=inside, other=0.0) - mean[:, None]
        part_squares = tl.load(partials + plane + base[:, None] + part[None, :], mask=inside, other=0.0)
        squares += tl.sum(tl.where(inside, part_squares + apart * apart * size[None, :], 0.0), axis=1)
        start += _MERGED // GROUPS
    return mean, tl.rsqrt(squares / total + eps)


@jit
def merge_sums(partials, plane, base, here, parts, GROUPS: tl.constexpr):
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
def activate(x, mean, rstd, weight, bias, SILU: tl.constexpr):
    """y of a tile; mean, rstd, weight and bias a column each."""
    z = (x - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :]
    if SILU:
        z = z / (1 + tl.exp(-z))
    return z


@jit
def activation_grad(x, grad, mean, rstd, weight, bias, SILU: tl.constexpr):
    """x - mean, which is n / rstd, and e of a tile, from x and the gradient of y."""
    deviation = x - mean[None, :]
    if SILU:
        z = deviation * (rstd * weight)[None, :] + bias[None, :]
        sigmoid = 1 / (1 + tl.exp(-z))
        grad = grad * sigmoid * (1 + z * (1 - sigmoid))
    return deviation, grad
