"""Hash-grid encoding of a tile of points, inside kernels that go on with the MLP; and what their launchers prepare.

A tile is BLOCK points. Their features never leave registers: `encode` returns one tile [BLOCK, PADDED] for each feature
of a table's row, with the levels along the second axis (16 when padded), as `fields.mlp` takes them. Neighbouring lanes
gather for neighbouring points, which on a ray fall into the same cells. Numerics: interpolation in fp32.

There are two encoders. This one computes all levels of a tile at once, vectorised over [BLOCK, PADDED], because the MLP
needs all features of a point together; a row of the table is one load. `grid.device` computes one level at a time, with
the level's numbers as scalars and 32-bit pairs of features, because the hash grid's own kernels write features by
channel and run one level a program. A common set of functions would be compiled to slower code in one of them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.grid.device import PRIMES
from dream_fast.kernels.grid.spec import HashGridSpec

BLOCK = 64  # points of a tile
WIDTHS = (16, 32, 64, 128)
MAX_HIDDEN_LAYERS = 4
MAX_LEVELS = 16

_PRIME_Y = constant(PRIMES[1])
_PRIME_Z = constant(PRIMES[2])


class FieldShape(NamedTuple):
    """Constants of a hash grid and an MLP that kernels are compiled for; their argument `SHAPE`.

    levels, features, log2_entries: of the grid. padded: levels of a tile, a power of two, at least 16. smooth: whether
    the interpolation is smoothstep. wide: whether an index into the table needs 64 bits. width, layers: of the MLP's
    hidden layers.
    """

    levels: int
    features: int
    padded: int
    log2_entries: int
    smooth: bool
    wide: bool
    width: int
    layers: int


class TileConfig(NamedTuple):
    """Sizes of a launch over tiles, of which a kernel uses those it needs.

    block: points of a tile. programs: of a multiprocessor. layers_a_pass: layers whose parameters' gradients one launch
    sums.
    """

    block: int
    warps: int
    programs: int = 0
    layers_a_pass: int = 0


def field_shape(spec: HashGridSpec, width: int, layers: int) -> FieldShape:
    """Constants of a grid and of an MLP with `layers` hidden layers of `width`."""
    return FieldShape(
        levels=spec.levels,
        features=spec.features,
        padded=padded_levels(spec),
        log2_entries=spec.log2_entries,
        smooth=spec.interpolation == "smoothstep",
        wide=spec.rows * spec.features >= 1 << 31,
        width=width,
        layers=layers,
    )


def padded_levels(spec: HashGridSpec) -> int:
    """Levels of a tile: a power of two, at least 16."""
    return max(16, 1 << (spec.levels - 1).bit_length())


@lru_cache(maxsize=64)
def unit_scale(bound: float) -> float:
    """The fp32 number s by which x in [-bound, bound] falls into [0, 1] as x * s + 0.5, both ends included.

    This holds with and without rounding of the product: bound, as fp32, times s is at most 0.5 exactly.
    """
    (bits,) = struct.unpack("<i", struct.pack("<f", 0.5 / bound))
    (scale, single) = struct.unpack("<ff", struct.pack("<if", bits, bound))
    while scale * single > 0.5:  # fp64 holds the product exactly
        bits -= 1
        (scale,) = struct.unpack("<f", struct.pack("<i", bits))
    return scale


@lru_cache(maxsize=256)
def level_words(spec: HashGridSpec, device: torch.device, active_levels: int | None = None) -> Tensor:
    """int64 [max(16, levels)]: a level's first row * 2^32 + 2^31 if dense + resolution; 0 from `active_levels` on.

    One load of all levels; `grid.device.level_table` has six numbers a level for kernels that take one.
    """
    active = spec.levels if active_levels is None else min(max(active_levels, 0), spec.levels)
    words = [spec.offsets[n] << 32 | spec.dense(n) << 31 | spec.resolutions[n] for n in range(active)]
    words = [word - (1 << 64) if word >= 1 << 63 else word for word in words]
    return torch.tensor(words + [0] * (padded_levels(spec) - active), dtype=torch.int64, device="cpu").to(device)


def tile_warps(dtype: torch.dtype) -> int:
    """Warps of a tile of BLOCK points.

    In 16 bits 4: a matrix instruction of sm_90 takes 16 rows a warp, and with 8 warps Triton 3.6 gives every product
    that feeds another one 128 rows, half of them read from outside the tile. In fp32 8, for their registers.
    """
    return 8 if dtype == torch.float32 else 4


def aligned_rows(table: Tensor) -> Tensor:
    """A table whose rows may each be read by one load: `table` itself, or a copy of a view that is not aligned."""
    table = table.contiguous()
    return table.clone() if table.data_ptr() % 16 else table


def flatten_parameters(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """One differentiable tensor of all weights [out, in], then all biases."""
    return torch.cat([parameter.reshape(-1) for parameter in (*weights, *biases)])


def unfused_reason(
    spec: HashGridSpec, weights: Sequence[Tensor], dtype: torch.dtype, normals: str | None = None
) -> str:
    """Name what keeps fused kernels from these shapes, compute dtype and mode of normals; empty if nothing does."""
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
        return "hidden width 128 takes fp16 or bf16"  # fp32 would spill
    if normals == "analytic" and hidden[0] == 128:
        # A thousand registers spill, and with 4 features the backward was seen to read outside shared memory on sm_90.
        return "hidden width 128 is too wide for analytic normals"
    return ""


@jit
def load_vector(pointer, row, live):
    """Rows of a [N, 3] tensor: three tiles [BLOCK], 0 where not live."""
    at = pointer + row * 3
    return (
        tl.load(at, mask=live, other=0.0),
        tl.load(at + 1, mask=live, other=0.0),
        tl.load(at + 2, mask=live, other=0.0),
    )


@jit
def store_vector(pointer, row, mask, x, y, z):
    """Three tiles [BLOCK] to rows of a [N, 3] tensor."""
    tl.store(pointer + row * 3, x, mask=mask)
    tl.store(pointer + row * 3 + 1, y, mask=mask)
    tl.store(pointer + row * 3 + 2, z, mask=mask)


@jit
def _unpack(word, ELEMENT: tl.constexpr, FIRST: tl.constexpr):
    """Element number FIRST of a 32- or 64-bit word, as fp32."""
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
    """Unit coordinate [BLOCK] -> low vertex, weight of the high one, and d weight / d u, all [BLOCK, PADDED]."""
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
def _unpack_levels(levels, active, PADDED: tl.constexpr):
    """`level_words` -> resolution int32, first row int64, whether it is dense, whether it is used; all [1, PADDED].

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
def _table_row(i, jk_sum, jk_mixed, first, dense, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Row of a corner in the table."""
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
    table,  # [rows, F] in the compute dtype
    levels,  # [PADDED] int64, `level_words`
    active,  # [] integer, the number of used levels, or None
    SHAPE: tl.constexpr,
    JACOBIAN: tl.constexpr = False,
):
    """Unit coordinates u, v, w [BLOCK] -> F tiles [BLOCK, PADDED] in fp32; zeros outside the cube.

    With JACOBIAN also three tuples of F tiles: the derivatives with respect to u, v and w.
    """
    LEVELS: tl.constexpr = SHAPE.levels
    FEATURES: tl.constexpr = SHAPE.features
    PADDED: tl.constexpr = SHAPE.padded
    SMOOTH: tl.constexpr = SHAPE.smooth
    WIDE: tl.constexpr = SHAPE.wide
    LAST: tl.constexpr = (1 << SHAPE.log2_entries) - 1
    inside = (u >= 0.0) & (u <= 1.0) & (v >= 0.0) & (v <= 1.0) & (w >= 0.0) & (w <= 1.0)
    u, v, w = tl.where(inside, u, 0.0), tl.where(inside, v, 0.0), tl.where(inside, w, 0.0)
    resolution, first, dense, used = _unpack_levels(levels, active, PADDED)
    keep = inside[:, None] & used
    # A mask saves the gathers of levels that are padding or not active; when every level counts, it saves nothing.
    mask = None if LEVELS == PADDED and active is None else keep
    i, fx, dx = _axis(u, resolution, SMOOTH)
    j, fy, dy = _axis(v, resolution, SMOOTH)
    k, fz, dz = _axis(w, resolution, SMOOTH)
    step_j = tl.where(dense, resolution, _PRIME_Y)
    step_k = tl.where(dense, resolution * resolution, _PRIME_Z)
    j, k = j * step_j, k * step_k
    zero = fx * 0.0
    out, sum_u, sum_v, sum_w = (), (), (), ()
    for _ in tl.static_range(FEATURES):
        out = out + (zero,)
        sum_u, sum_v, sum_w = sum_u + (zero,), sum_v + (zero,), sum_w + (zero,)
    for edge in tl.static_range(4):  # along u, at the low and high ends of v and w
        cj, ck, wy, wz, sy, sz = j, k, 1.0 - fy, 1.0 - fz, -dy, -dz
        if edge & 1:
            cj, wy, sy = j + step_j, fy, dy
        if edge & 2:
            ck, wz, sz = k + step_k, fz, dz
        rows = _table_row(i, cj + ck, cj ^ ck, first, dense, LAST, WIDE)
        others = _table_row(i + 1, cj + ck, cj ^ ck, first, dense, LAST, WIDE)
        low, high = fetch(table, rows, mask, FEATURES), fetch(table, others, mask, FEATURES)
        yz = wy * wz
        w0, w1 = (1.0 - fx) * yz, fx * yz
        new, new_u, new_v, new_w = (), (), (), ()
        for f in tl.static_range(FEATURES):
            if JACOBIAN:
                rise = high[f] - low[f]
                along = low[f] + fx * rise
                new = new + (out[f] + yz * along,)
                new_u = new_u + (sum_u[f] + yz * rise,)
                new_v = new_v + (sum_v[f] + (wz * sy) * along,)
                new_w = new_w + (sum_w[f] + (wy * sz) * along,)
            else:
                new = new + (out[f] + w0 * low[f] + w1 * high[f],)
        out = new
        if JACOBIAN:
            sum_u, sum_v, sum_w = new_u, new_v, new_w
    features = ()
    for f in tl.static_range(FEATURES):
        features = features + (tl.where(keep, out[f], 0.0),)
    if JACOBIAN:
        by_u, by_v, by_w = (), (), ()
        for f in tl.static_range(FEATURES):
            by_u = by_u + (tl.where(keep, dx * sum_u[f], 0.0),)
            by_v = by_v + (tl.where(keep, sum_v[f], 0.0),)
            by_w = by_w + (tl.where(keep, sum_w[f], 0.0),)
        return features, by_u, by_v, by_w
    else:  # a kernel is compiled with one of the two
        return features


@jit
def store_channels(
    out,  # [L * F, columns]
    tiles,
    row,
    mask,
    columns,
    SHAPE: tl.constexpr,
):
    """F tiles [BLOCK, PADDED] -> columns `row` of a buffer by channel, as the gradients of the grid take it."""
    # Transposed before the store, for the reason that `_load_weight` gives.
    FEATURES: tl.constexpr = SHAPE.features
    PADDED: tl.constexpr = SHAPE.padded
    level = tl.arange(0, PADDED)
    for f in tl.static_range(FEATURES):
        at = out + (level.to(tl.int64) * FEATURES + f)[:, None] * columns + row[None, :]
        keep = mask[None, :] & (level[:, None] < SHAPE.levels)
        tl.store(at, tl.trans(tiles[f].to(out.dtype.element_ty)), mask=keep)


@jit
def store_features(
    out,  # [tiles, F, PADDED, BLOCK]
    tiles,
    start,
    BLOCK: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """F tiles [BLOCK, PADDED] of the points from `start` on, for `load_features`."""
    FEATURES: tl.constexpr = SHAPE.features
    PADDED: tl.constexpr = SHAPE.padded
    block = out + start * (FEATURES * PADDED)
    at = tl.arange(0, PADDED)[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
    # Neighbouring lanes store neighbouring points. Several points a lane would be wider stores, but the compiler would
    # give that layout to the gathers of `encode` as well.
    at = tl.max_contiguous(at, [1, 1])
    for f in tl.static_range(FEATURES):
        tl.store(block + (f * PADDED * BLOCK) + at, tiles[f].to(out.dtype.element_ty))


@jit
def load_features(
    features,  # [tiles, F, PADDED, BLOCK]
    start,
    BLOCK: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """F tiles [BLOCK, PADDED] that `store_features` stored, in the buffer's dtype."""
    FEATURES: tl.constexpr = SHAPE.features
    PADDED: tl.constexpr = SHAPE.padded
    block = features + start * (FEATURES * PADDED)
    at = tl.arange(0, PADDED)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tiles = ()
    for f in tl.static_range(FEATURES):
        tiles = tiles + (tl.trans(tl.load(block + (f * PADDED * BLOCK) + at)),)
    return tiles
