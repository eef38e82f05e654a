"""The two gradients of a hash grid's encoding, which several operators share.

`dream_fast.kernels.grid.hash_grid` defines the encoding. A sum of features, sum_f g_f enc_f(u), has a gradient into the
table (`scatter_features`) and one into the coordinates (`position_gradient`); both also exist one order higher, along
a tangent t of the coordinates: the gradients of sum_f g_f (t . d enc_f / du).

Legend: N points, L levels, F features a level; features are stored by channel, [L * F, N].
Units: u = x * scale + shift is in [0,1] inside the scene cube; points outside contribute nothing.
Numerics: everything in fp32. Sums into the table are atomic, in any order, unless `deterministic`, or where fp32
features of many points go into few rows: then they are whole numbers of 2^-s, s chosen on the device so that nothing
overflows, and whole numbers add up the same in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dream_fast.kernels._core.launch import jit, launch, tl
from dream_fast.kernels.grid.device import (
    PRIMES,
    corner_rows,
    corner_weights,
    differences,
    level_table,
    live_rows,
    load_entry,
    load_level,
    load_point,
    locate,
    packed,
    tangent_weights,
)
from dream_fast.kernels.grid.spec import HashGridSpec

__all__ = ["PRIMES", "add_one", "fixed_point", "live_rows", "position_gradient", "scatter_features"]


# Features by channel.


@jit
def _turn_kernel(source, out, count, n, CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start >= live_rows(count, n):
        return
    row = start + tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    mask = (row < n) & (channel < CHANNELS)
    tile = tl.load(source + row * CHANNELS + channel, mask=mask)
    tl.store(out + channel.to(tl.int64) * n + row, tile, mask=mask)


def by_channel(features: Tensor, count: Tensor | None) -> Tensor:
    """features [C, N], contiguous. Of a transposed [N, C], what lies past `count` is not copied: it has any value."""
    if features.is_contiguous() or not features.t().is_contiguous():
        return features.contiguous()
    channels, n = features.shape
    out = torch.empty(channels, n, dtype=features.dtype, device=features.device)
    padded = 1 << (channels - 1).bit_length()
    block = max(4096 // padded, 16)
    launch(
        _turn_kernel,
        (-(-n // block),),
        features.device,
        source=features.t(),
        out=out,
        count=count,
        n=n,
        CHANNELS=channels,
        PADDED=padded,
        BLOCK=block,
    )
    return out


# Gradient into the table.


@jit
def _coordinates_kernel(x, out, count, n, padded, scale, shift, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ux, uy, uz, inside = load_point(x, row, row < live_rows(count, n), scale, shift)
    tl.store(out + row, tl.where(inside, ux, -1.0), mask=row < padded)
    tl.store(out + padded + row, uy, mask=row < padded)
    tl.store(out + 2 * tl.full((), padded, tl.int64) + row, uz, mask=row < padded)


@jit
def _start(sums, fresh):
    """Sums that begin at zero in the lanes that are `fresh`."""
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
    """sums + weights * value, corner by corner."""
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
    """Add the sums of two x-neighbours, rows row0 and row1, channels a and b, by atomics of WIDTH numbers."""
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
    """Add one number a lane, as a whole number of 1 / factor where there is a factor."""
    if factor is not None:
        value = (value * factor).to(tl.int64)
    tl.atomic_add(pointers, value, mask=mask, sem="relaxed")


@jit
def _flush(grad, cell, level, a, b, mask, factor, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Add the sums of the eight corners of each lane's cell to the table."""
    rows = corner_rows(cell[0], cell[1], cell[2], level)
    _add_pair(grad, rows[0], rows[1], a[0], a[1], b[0], b[1], mask, factor, STRIDE, WIDTH)
    _add_pair(grad, rows[2], rows[3], a[2], a[3], b[2], b[3], mask, factor, STRIDE, WIDTH)
    _add_pair(grad, rows[4], rows[5], a[4], a[5], b[4], b[5], mask, factor, STRIDE, WIDTH)
    _add_pair(grad, rows[6], rows[7], a[6], a[7], b[6], b[7], mask, factor, STRIDE, WIDTH)


@jit
def _scatter_kernel(
    u,
    features,
    tangent,
    tangent_features,
    grad,
    factor,
    levels,
    count,
    active,
    n,
    padded,
    FEATURES: tl.constexpr,
    SMOOTH: tl.constexpr,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each lane walks RUN consecutive rows and writes its eight sums where the cell changes, and at the end.

    Consecutive rows are neighbours on a ray: in a coarse level many fall in one cell, and cost one write.
    """
    PAIRS: tl.constexpr = (FEATURES + 1) // 2
    level = tl.program_id(1) // PAIRS
    channel = tl.program_id(1) % PAIRS * 2
    start = tl.program_id(0).to(tl.int64) * (BLOCK * RUN)
    if start >= live_rows(count, n):
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
        _flush(grad, cell, numbers, a, b, changed & (cell[0] >= 0), factor, FEATURES, WIDTH)
        cell = (tl.where(inside, i, cell[0]), tl.where(inside, j, cell[1]), tl.where(inside, k, cell[2]))
        a = _start(a, changed)
        b = _start(b, changed)
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
    _flush(grad, cell, numbers, a, b, cell[0] >= 0, factor, FEATURES, WIDTH)


def _scatter_config(n: int, features: int, whole: bool) -> dict[str, int]:
    """Lanes a program, rows a lane, numbers an atomic, warps.

    A longer run merges more and leaves fewer lanes: few rows need them all. Runs of 8 and 32, and loads of several
    rows at once, were no faster for the samples of 64 x 64 to 256 x 256 rays on an H200.
    """
    width = {1: 1, 2: 4, 4: 2}[features]
    run = 4 if n < 1 << 17 else 16
    return {"BLOCK": 128, "RUN": run, "WIDTH": 1 if whole else width, "num_warps": 4}


def _largest(value: Tensor, count: Tensor | None) -> Tensor:
    """Largest magnitude in the live columns of value [C, N], NaN where there is one."""
    value = value.float().abs()
    if count is not None:
        value = torch.where(torch.arange(value.shape[1], device=value.device) < count, value, 0)
    return value.amax()


def fixed_point(bound: Tensor) -> tuple[Tensor, Tensor]:
    """Power of two that brings sums up to a scalar `bound` into int64, and its inverse, NaN unless bound is finite."""
    exponent = (60 - torch.log2(bound.double()).ceil()).nan_to_num(0, 0, 0).clamp(-120, 120)
    factor = torch.exp2(exponent).float()
    return factor, torch.where(torch.isfinite(bound), 1 / factor, torch.nan)


def scatter_features(
    x: Tensor,
    spec: HashGridSpec,
    *,
    scale: float,
    shift: float,
    features: Tensor | None = None,
    tangent: Tensor | None = None,
    tangent_features: Tensor | None = None,
    count: Tensor | None = None,
    active_levels: int | Tensor | None = None,
    deterministic: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of a table, [rows, F] fp32, added to `out` if there is one.

    x, tangent: [N, 3] fp32; features, tangent_features: [L * F, N].

    table[row of corner c, f] += features[l F + f, n] w_c(u_n) + tangent_features[l F + f, n] (tangent_n . d w_c / du).
    Either part may be left out. Rows from `count` on and levels from `active_levels` on are ignored.
    """
    n, active = x.shape[0], active_levels if isinstance(active_levels, Tensor) else None
    levels = spec.levels if active_levels is None or active is not None else max(0, min(active_levels, spec.levels))
    if n == 0:
        return torch.zeros(spec.rows, spec.features, device=x.device) if out is None else out
    factor = inverse = None
    # A thousand sums and more into a row of the coarsest level lose in fp32 what the addends still have: 5e-6 of the
    # largest, for 3e-7.
    single = all(part is None or part.dtype == torch.float32 for part in (features, tangent_features))
    whole = deterministic or (single and 8 * n > 1000 * spec.offsets[1])
    if whole:
        bound = torch.zeros((), device=x.device)
        if features is not None:
            bound = bound + _largest(features, count)
        if tangent is not None:
            # No weight changes by more than 1.5 R a unit.
            reach = _largest(tangent.t(), count) * (3 * 1.5 * max(spec.resolutions) * abs(scale))
            bound = bound + _largest(tangent_features, count) * reach
        factor, inverse = fixed_point(bound * n)
    grad = out
    if whole or out is None:
        dtype = torch.int64 if whole else torch.float32
        grad = torch.zeros(spec.rows, spec.features, device=x.device, dtype=dtype)
    config = _scatter_config(n, spec.features, whole)
    blocks = -(-n // (config["BLOCK"] * config["RUN"]))
    padded = blocks * config["BLOCK"] * config["RUN"]
    coordinates = torch.empty(3, padded, device=x.device)
    launch(
        _coordinates_kernel,
        (-(-padded // 256),),
        x.device,
        x=x.contiguous(),
        out=coordinates,
        count=count,
        n=n,
        padded=padded,
        scale=float(scale),
        shift=float(shift),
        BLOCK=256,
    )
    launch(
        _scatter_kernel,
        (blocks, levels * max(spec.features // 2, 1)),
        x.device,
        u=coordinates,
        features=None if features is None else by_channel(features, count),
        tangent=None if tangent is None else tangent.contiguous(),
        tangent_features=None if tangent is None else by_channel(tangent_features, count),
        grad=grad,
        factor=factor,
        levels=level_table(spec, x.device),
        count=count,
        active=active,
        n=n,
        padded=padded,
        FEATURES=spec.features,
        SMOOTH=spec.interpolation == "smoothstep",
        **config,
    )
    if whole:
        grad = grad.float() * inverse
        return grad if out is None else out.add_(grad)
    return grad


# Gradient into the coordinates.


@jit
def _position_gradient_kernel(
    features,
    x,
    table,
    tangent,
    out,
    levels,
    count,
    active,
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
    limit = live_rows(count, n)
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
                by = differences(v, wx, wy, wz)
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


def _position_config() -> dict[str, int]:
    """One point a lane."""
    return {"BLOCK": 128, "num_warps": 4}


def position_gradient(
    features: Tensor,
    x: Tensor,
    table: Tensor,
    spec: HashGridSpec,
    *,
    scale: float,
    shift: float,
    tangent: Tensor | None = None,
    rounded: str = "",
    count: Tensor | None = None,
    active_levels: int | Tensor | None = None,
) -> Tensor:
    """d/du of sum_f features[f] enc_f(u), [N, 3] fp32: features [L * F, N], x [N, 3] fp32, table [rows, F].

    With `tangent` [N, 3]: d/du of sum_f features[f] (tangent . d enc_f / du). `rounded` names the type that the entries
    of an fp32 table are rounded to. Zeros outside the cube and from `count` on.
    """
    n, active = x.shape[0], active_levels if isinstance(active_levels, Tensor) else None
    levels = spec.levels if active_levels is None or active is not None else max(0, min(active_levels, spec.levels))
    out = torch.empty(n, 3, device=x.device)
    entries, stored = packed(table.contiguous())
    config = _position_config()
    launch(
        _position_gradient_kernel,
        (-(-n // config["BLOCK"]),),
        x.device,
        features=by_channel(features, count),
        x=x.contiguous(),
        table=entries,
        tangent=None if tangent is None else tangent.contiguous(),
        out=out,
        levels=level_table(spec, x.device),
        count=count,
        active=active,
        n=n,
        active_levels=levels,
        scale=float(scale),
        shift=float(shift),
        LEVELS=spec.levels,
        FEATURES=spec.features,
        SMOOTH=spec.interpolation == "smoothstep",
        STORED=stored,
        ROUNDED=rounded,
        **config,
    )
    return out
