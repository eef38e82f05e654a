"""Device functions over a tile of points that fused kernels share: hash-grid encoding and the field's activations.

A tile is BLOCK points. Features of a point never leave registers: `encode` returns one tile [BLOCK, PADDED] for each
feature of a row, with the levels (16 when padded) along the second axis, as the MLP of `_mlp` takes them. Gathers run
with neighbouring lanes on neighbouring points, which on a ray fall into the same cells.

Numerics: interpolation and activations in fp32.
Host side: `tile_constants` gives the constants that every function here takes, `level_table` the small tensor of
per-level numbers, `unit_scale` the map from world to unit coordinates, u = x * scale + 0.5.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.fields.mlp import COLUMNS, pick
from dream_fast.kernels.grid.gradients import PRIMES
from dream_fast.kernels.grid.spec import HashGridSpec

BLOCK = 64  # points of a tile
WIDTHS = (16, 32, 64, 128)
MAX_HIDDEN_LAYERS = 4
MAX_LEVELS = 16

_PRIME_Y = constant(PRIMES[1])
_PRIME_Z = constant(PRIMES[2])
_MAX_EXPONENT = constant(15.0)


# Host side.


@lru_cache(maxsize=64)
def unit_scale(bound: float) -> float:
    """The fp32 number s by which x in [-bound, bound] falls into [0, 1] as x * s + 0.5, both ends included.

    Also where the product is not rounded before the sum: bound, as fp32, times s is at most 0.5 exactly.
    """
    (bits,) = struct.unpack("<i", struct.pack("<f", 0.5 / bound))
    (scale, single) = struct.unpack("<ff", struct.pack("<if", bits, bound))
    while scale * single > 0.5:  # fp64 holds the product exactly
        bits -= 1
        (scale,) = struct.unpack("<f", struct.pack("<i", bits))
    return scale


@lru_cache(maxsize=256)
def level_table(spec: HashGridSpec, device: torch.device, active_levels: int | None = None) -> Tensor:
    """int64 [max(16, levels)]: a level's first row * 2^32 + 2^31 if dense + resolution; 0 from `active_levels` on."""
    active = spec.levels if active_levels is None else min(max(active_levels, 0), spec.levels)
    words = [spec.offsets[n] << 32 | spec.dense(n) << 31 | spec.resolutions[n] for n in range(active)]
    words = [word - (1 << 64) if word >= 1 << 63 else word for word in words]
    return torch.tensor(words + [0] * (_padded(spec) - active), dtype=torch.int64, device="cpu").to(device)


def _padded(spec: HashGridSpec) -> int:
    return max(16, 1 << (spec.levels - 1).bit_length())


def tile_constants(spec: HashGridSpec) -> dict[str, int | bool]:
    """Constants of a grid, for `launch`: a kernel that calls `encode` takes them all and hands them on."""
    return {
        "LEVELS": spec.levels,
        "FEATURES": spec.features,
        "PADDED": _padded(spec),
        "LOG2_ENTRIES": spec.log2_entries,
        "SMOOTH": spec.interpolation == "smoothstep",
        "WIDE": spec.rows * spec.features >= 1 << 31,
    }


def tile_warps(dtype: torch.dtype) -> int:
    """Warps of a tile of BLOCK points.

    In 16 bits 4, as a matrix instruction of sm_90 takes 16 rows a warp: with 8, Triton 3.6 gives every product that
    another one takes 128 rows, of which half are read from outside the tile. In fp32 8, for their registers.
    """
    return 8 if dtype == torch.float32 else 4


def aligned_rows(table: Tensor) -> Tensor:
    """A table whose rows may be read by one load each: `table` itself, but for odd views."""
    table = table.contiguous()
    return table.clone() if table.data_ptr() % 16 else table


def flatten_parameters(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """One tensor: all weights [out, in], then all biases; gradients go through it."""
    return torch.cat([part.reshape(-1) for part in (*weights, *biases)])


def unfused_reason(
    spec: HashGridSpec, weights: Sequence[Tensor], dtype: torch.dtype, normals: str | None = None
) -> str:
    """Why these shapes cannot run fused in this compute dtype, with these normals; empty when they can."""
    hidden = [layer.shape[0] for layer in weights[:-1]]
    if not 1 <= len(hidden) <= MAX_HIDDEN_LAYERS:
        return f"{len(hidden)} hidden layers are not from 1 to {MAX_HIDDEN_LAYERS}"
    if len(set(hidden)) > 1:
        return f"hidden widths {', '.join(map(str, hidden))} differ"
    if hidden[0] not in WIDTHS:
        return f"hidden width {hidden[0]} is not {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]}"
    if spec.levels > MAX_LEVELS:
        return f"{spec.levels} levels are more than {MAX_LEVELS}"
    if spec.features not in (1, 2, 4):
        return f"{spec.features} features a level are not 1, 2 or 4"
    if dtype == torch.float32 and hidden[0] == 128:
        return "hidden width 128 takes fp16 or bf16"  # of fp32 it would spill
    if normals == "analytic" and hidden[0] == 128:
        # A thousand registers spill, and with 4 features the backward was seen to read outside shared memory on sm_90.
        return "hidden width 128 is too wide for analytic normals"
    return ""


# Points.


@jit
def load_point(x, n, live):
    """Rows n of x [N, 3]: three tiles [BLOCK], 0 where not live."""
    at = x + n * 3
    return (
        tl.load(at, mask=live, other=0.0),
        tl.load(at + 1, mask=live, other=0.0),
        tl.load(at + 2, mask=live, other=0.0),
    )


@jit
def store_vector(pointer, row, mask, x, y, z):
    """Three numbers of each row."""
    tl.store(pointer + row * 3, x, mask=mask)
    tl.store(pointer + row * 3 + 1, y, mask=mask)
    tl.store(pointer + row * 3 + 2, z, mask=mask)


# Encoding.


@jit
def _unpack(word, ELEMENT: tl.constexpr, FIRST: tl.constexpr):
    """Element number FIRST of a 32 or 64 bit word, as fp32."""
    if ELEMENT.primitive_bitwidth == 32:
        return (word >> (32 * FIRST)).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return (word >> (16 * FIRST)).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)


@jit
def fetch(table, rows, mask, FEATURES: tl.constexpr):
    """Rows of a table in its dtype, one load each -> FEATURES tiles in fp32. mask may be None."""
    ELEMENT: tl.constexpr = table.dtype.element_ty
    BITS: tl.constexpr = FEATURES * ELEMENT.primitive_bitwidth
    other = None if mask is None else 0
    if FEATURES == 1:
        values = (tl.load(table + rows, mask=mask, other=other).to(tl.float32),)
    elif BITS == 32:
        word = tl.load(table.to(tl.pointer_type(tl.int32), bitcast=True) + rows, mask=mask, other=other)
        values = (_unpack(word, ELEMENT, 0), _unpack(word, ELEMENT, 1))
    elif BITS == 64:
        word = tl.load(table.to(tl.pointer_type(tl.int64), bitcast=True) + rows, mask=mask, other=other)
        values = ()
        for f in tl.static_range(FEATURES):
            values = values + (_unpack(word, ELEMENT, f),)
    else:
        tl.static_assert(BITS == 128, "rows are 1, 2 or 4 features of 16 or 32 bits")
        pairs = table.to(tl.pointer_type(tl.int64), bitcast=True) + rows * 2
        low = tl.load(pairs, mask=mask, other=other)
        high = tl.load(pairs + 1, mask=mask, other=other)
        values = (
            _unpack(low, ELEMENT, 0),
            _unpack(low, ELEMENT, 1),
            _unpack(high, ELEMENT, 0),
            _unpack(high, ELEMENT, 1),
        )
    return values


@jit
def _axis(u, resolution, SMOOTH: tl.constexpr):
    """Unit coordinate [BLOCK] -> low vertex, its weight's complement, and d weight / d u, all [BLOCK, PADDED]."""
    scale = resolution.to(tl.float32)
    position = u[:, None] * scale - 0.5
    clamped = tl.minimum(tl.maximum(position, 0.0), scale - 1.0)
    cell = tl.minimum(clamped.to(tl.int32), resolution - 2)
    fraction = clamped - cell.to(tl.float32)
    slope = tl.where(position == clamped, scale, 0.0)
    if SMOOTH:
        slope = slope * (6.0 * fraction * (1.0 - fraction))
        fraction = fraction * fraction * (3.0 - 2.0 * fraction)
    return cell, fraction, slope


@jit
def level_numbers(levels, active, PADDED: tl.constexpr):
    """`level_table` -> resolution int32, first row int64, whether it is dense, whether it is used; all [1, PADDED].

    active: None, or a pointer to the number of used levels. An unused level gets resolution 2, so that every row that
    it computes is harmless.
    """
    level = tl.arange(0, PADDED)
    word = tl.load(levels + level)
    low = word.to(tl.int32)
    dense = low < 0
    resolution = low & 0x7FFFFFFF
    used = resolution > 0
    if active is not None:
        used = used & (level < tl.load(active))
    resolution = tl.where(used, resolution, 2)
    first = (word >> 32) & 0xFFFFFFFF
    return resolution[None, :], first[None, :], dense[None, :], used[None, :]


@jit
def _place(i, jk_sum, jk_mixed, first, dense, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Row in the table of a corner."""
    row = tl.where(dense, i + jk_sum, (i ^ jk_mixed) & LAST)
    if WIDE:
        return row.to(tl.int64) + first
    else:
        return row + first.to(tl.int32)


@jit
def encode(
    u,
    v,
    w,
    table,
    levels,
    active,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    LOG2_ENTRIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    WIDE: tl.constexpr,
    JACOBIAN: tl.constexpr = False,
):
    """Unit coordinates u, v, w [BLOCK] -> FEATURES tiles [BLOCK, PADDED] in fp32; zeros outside the cube.

    With JACOBIAN also three tuples of FEATURES tiles: the derivatives with respect to u, v and w.
    levels: `level_table`; active: None or a pointer to the number of used levels; table: in the compute dtype.
    """
    inside = (u >= 0.0) & (u <= 1.0) & (v >= 0.0) & (v <= 1.0) & (w >= 0.0) & (w <= 1.0)
    u, v, w = tl.where(inside, u, 0.0), tl.where(inside, v, 0.0), tl.where(inside, w, 0.0)
    resolution, first, dense, used = level_numbers(levels, active, PADDED)
    keep = inside[:, None] & used
    # Gathers of levels that do not count cost nothing when masked; when every level counts, neither does the mask.
    mask = None if LEVELS == PADDED and active is None else keep
    i, fx, dx = _axis(u, resolution, SMOOTH)
    j, fy, dy = _axis(v, resolution, SMOOTH)
    k, fz, dz = _axis(w, resolution, SMOOTH)
    step_j = tl.where(dense, resolution, _PRIME_Y)
    step_k = tl.where(dense, resolution * resolution, _PRIME_Z)
    j, k = j * step_j, k * step_k
    LAST: tl.constexpr = (1 << LOG2_ENTRIES) - 1
    zero = fx * 0.0
    out, to_u, to_v, to_w = (), (), (), ()
    for _ in tl.static_range(FEATURES):
        out = out + (zero,)
        to_u, to_v, to_w = to_u + (zero,), to_v + (zero,), to_w + (zero,)
    for edge in tl.static_range(4):  # along u, at the low and high ends of v and w
        cj, ck, wy, wz, sy, sz = j, k, 1.0 - fy, 1.0 - fz, -dy, -dz
        if edge & 1:
            cj, wy, sy = j + step_j, fy, dy
        if edge & 2:
            ck, wz, sz = k + step_k, fz, dz
        rows = _place(i, cj + ck, cj ^ ck, first, dense, LAST, WIDE)
        others = _place(i + 1, cj + ck, cj ^ ck, first, dense, LAST, WIDE)
        low, high = fetch(table, rows, mask, FEATURES), fetch(table, others, mask, FEATURES)
        yz = wy * wz
        w0, w1 = (1.0 - fx) * yz, fx * yz
        new, new_u, new_v, new_w = (), (), (), ()
        for f in tl.static_range(FEATURES):
            if JACOBIAN:
                rise = high[f] - low[f]
                along = low[f] + fx * rise
                new = new + (out[f] + yz * along,)
                new_u = new_u + (to_u[f] + yz * rise,)
                new_v = new_v + (to_v[f] + (wz * sy) * along,)
                new_w = new_w + (to_w[f] + (wy * sz) * along,)
            else:
                new = new + (out[f] + w0 * low[f] + w1 * high[f],)
        out = new
        if JACOBIAN:
            to_u, to_v, to_w = new_u, new_v, new_w
    features = ()
    for f in tl.static_range(FEATURES):
        features = features + (tl.where(keep, out[f], 0.0),)
    if JACOBIAN:
        by_u, by_v, by_w = (), (), ()
        for f in tl.static_range(FEATURES):
            by_u = by_u + (tl.where(keep, dx * to_u[f], 0.0),)
            by_v = by_v + (tl.where(keep, to_v[f], 0.0),)
            by_w = by_w + (tl.where(keep, to_w[f], 0.0),)
        return features, by_u, by_v, by_w
    else:  # a kernel is compiled with one of the two
        return features


# Features in global memory: by channel, [L * F, N], for the gradients of the grid; or a block a tile, to come back.


@jit
def store_channels(
    pointer, tiles, row, mask, columns, LEVELS: tl.constexpr, FEATURES: tl.constexpr, PADDED: tl.constexpr
):
    """FEATURES tiles [BLOCK, PADDED] -> rows of a buffer [L * F, columns]."""
    # Transposed before the store, for the reason that `mlp_weights` gives.
    level = tl.arange(0, PADDED)
    for f in tl.static_range(FEATURES):
        at = pointer + (level.to(tl.int64) * FEATURES + f)[:, None] * columns + row[None, :]
        keep = mask[None, :] & (level[:, None] < LEVELS)
        tl.store(at, tl.trans(tiles[f].to(pointer.dtype.element_ty)), mask=keep)


@jit
def keep_tile(pointer, tiles, start, BLOCK: tl.constexpr, FEATURES: tl.constexpr, PADDED: tl.constexpr):
    """FEATURES tiles [BLOCK, PADDED] of the points from `start` on -> [F, PADDED, BLOCK] at their block of a buffer."""
    block = pointer + start * (FEATURES * PADDED)
    at = tl.arange(0, PADDED)[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
    # Neighbouring lanes store neighbouring points. Several points a lane would be wider stores, but the compiler would
    # give that layout to the gathers of `encode` as well.
    at = tl.max_contiguous(at, [1, 1])
    for f in tl.static_range(FEATURES):
        tl.store(block + (f * PADDED * BLOCK) + at, tiles[f].to(pointer.dtype.element_ty))


@jit
def kept_tile(pointer, start, BLOCK: tl.constexpr, FEATURES: tl.constexpr, PADDED: tl.constexpr):
    """What `keep_tile` kept: FEATURES tiles [BLOCK, PADDED] in the buffer's type."""
    block = pointer + start * (FEATURES * PADDED)
    at = tl.arange(0, PADDED)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tiles = ()
    for f in tl.static_range(FEATURES):
        tiles = tiles + (tl.trans(tl.load(block + (f * PADDED * BLOCK) + at)),)
    return tiles


# Activations.


@jit
def precise_exp(x, SINGLE: tl.constexpr):
    """exp(x) to 2e-7 of itself for any x that fp32 can hold the result of; tl.exp loses |x| times that.

    SINGLE: to half of that, as torch's, for normals by differences of fp32 densities: they multiply it by a hundred.
    """
    x = tl.where(x < -87.0, -87.0, x)
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4  # ln 2 in two parts
    if SINGLE:
        series = 1.0 / 24 + rest * (1.0 / 120 + rest * (1.0 / 720 + rest * (1.0 / 5040)))
        series = 1.0 + rest * (1.0 + rest * (0.5 + rest * (1.0 / 6 + rest * series)))
        return series * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    else:
        return tl.exp2(rest * 1.4426950408889634) * tl.exp2(whole)


@jit
def blob(x, y, z, density, radius, SOFTPLUS: tl.constexpr, SINGLE: tl.constexpr):
    """What the density's logit gets at world points [BLOCK]."""
    squared = x * x + y * y + z * z
    # Rounded as IEEE says: normals by differences make an error of the last bit a hundred times as large.
    if SOFTPLUS:
        return density * (1.0 - tl.div_rn(tl.sqrt_rn(tl.maximum(squared, 1e-12)), radius))
    elif SINGLE:
        return density * precise_exp(tl.div_rn(squared, -2.0 * radius * radius), True)
    else:
        return density * precise_exp(squared / (-2.0 * radius * radius), False)


@jit
def blob_slope(x, y, z, density, radius, SOFTPLUS: tl.constexpr):
    """The number [BLOCK] by which (x, y, z) is multiplied to give the gradient of `blob`."""
    squared = x * x + y * y + z * z
    if SOFTPLUS:
        # The gradient of a norm is not defined at 0: it is 0 below the floor.
        return tl.where(squared < 1e-12, 0.0, -density / (radius * tl.sqrt(tl.maximum(squared, 1e-12))))
    else:
        return precise_exp(squared / (-2.0 * radius * radius), False) * (-density / (radius * radius))


@jit
def activate_density(raw, SOFTPLUS: tl.constexpr, SINGLE: tl.constexpr):
    """sigma of the logit with its blob."""
    if SOFTPLUS:
        # log(1 + e) = 2 atanh(e / (2 + e)) keeps what is small precise.
        e = precise_exp(-tl.abs(raw), SINGLE)
        z = tl.div_rn(e, 2.0 + e)
        t = z * z
        series = 1.0 / 9 + t * (1.0 / 11 + t * (1.0 / 13 + t * (1.0 / 15 + t * (1.0 / 17))))
        series = 1.0 + t * (1.0 / 3 + t * (1.0 / 5 + t * (1.0 / 7 + t * series)))
        return tl.maximum(raw, 0.0) + 2.0 * z * series
    else:
        # The comparison keeps a NaN.
        return precise_exp(tl.where(raw > _MAX_EXPONENT, _MAX_EXPONENT, raw), SINGLE)


@jit
def density_slope(raw, sigma, SOFTPLUS: tl.constexpr):
    """d sigma / d raw; for exp it is sigma on both sides of the clamp."""
    if SOFTPLUS:
        e = precise_exp(-tl.abs(raw), False)
        return tl.where(raw > 0, 1.0, e) / (1.0 + e)
    else:
        return sigma


@jit
def activate(outputs, bump, SOFTPLUS: tl.constexpr, SINGLE: tl.constexpr):
    """outputs [BLOCK, COLUMNS] of `mlp`, `blob` [BLOCK] -> sigma, red, green, blue and the density's logit."""
    raw = pick(outputs, 0) + bump
    sigma = activate_density(raw, SOFTPLUS, SINGLE)
    return sigma, tl.sigmoid(pick(outputs, 1)), tl.sigmoid(pick(outputs, 2)), tl.sigmoid(pick(outputs, 3)), raw


@jit
def outputs_gradient(to_raw, to_red, to_green, to_blue):
    """Gradients [BLOCK] of the four outputs (before the activations) -> tile [BLOCK, COLUMNS]."""
    column = tl.arange(0, COLUMNS)[None, :]
    tile = tl.where(column == 0, to_raw[:, None], 0.0)
    tile = tl.where(column == 1, to_red[:, None], tile)
    tile = tl.where(column == 2, to_green[:, None], tile)
    return tl.where(column == 3, to_blue[:, None], tile)
