"""Cells of a hash grid for kernels that take one level at a time: corners of a cell, their rows, weights and entries.

`fields.encode` computes all levels of a tile of points at once, and says why there are two encoders.

Eight corners are always in the order x fastest, then y. A level is the tuple that `load_level` returns. Everything is
fp32 and int32, except rows of points and first rows of levels, which are int64.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.grid.spec import HashGridSpec

# The first is 2654435761 as an int32: only the low bits of a product count.
PRIMES = (1, 2654435761 - 2**32, 805459861)

LEVEL_COLUMNS = constant(6)


@lru_cache(maxsize=64)
def level_table(spec: HashGridSpec, device: torch.device) -> Tensor:
    """int64 [L, 6], a row a level: first row, resolution, y and z multiplier, 1 where dense, mask of hashed rows."""
    mask = (1 << spec.log2_entries) - 1
    rows = []
    for level, resolution in enumerate(spec.resolutions):
        dense = spec.dense(level)
        factors = (resolution, resolution**2) if dense else PRIMES[1:]
        rows.append([spec.offsets[level], resolution, *factors, int(dense), mask])
    return torch.tensor(rows, dtype=torch.int64, device=device)


def view_as_pairs(table: Tensor) -> tuple[Tensor, str]:
    """A table of fp32, fp16 or bf16 as `load_entry` takes it, two entries a number, and the name of their type."""
    if table.shape[1] == 1:
        return table, "single"
    return table.view(torch.int64 if table.dtype == torch.float32 else torch.int32), str(table.dtype)[6:]


@jit
def load_level(levels, level):
    """Row `level` of `level_table`: (first row [int64], resolution, y factor, z factor, dense, mask) [int32]."""
    entry = levels + level * LEVEL_COLUMNS
    first = tl.multiple_of(tl.load(entry), 8)
    return (
        first,
        tl.load(entry + 1).to(tl.int32),
        tl.load(entry + 2).to(tl.int32),
        tl.load(entry + 3).to(tl.int32),
        tl.load(entry + 4).to(tl.int32) != 0,
        tl.load(entry + 5).to(tl.int32),
    )


@jit
def load_count(count, n):
    """Number of leading rows that hold points: n, or the number that `count` points to."""
    if count is None:
        return n
    else:  # Triton compiles what follows a return
        return tl.minimum(tl.load(count), n)


@jit
def locate(u, resolution, SMOOTH: tl.constexpr):
    """A coordinate in [0,1] -> low vertex of its cell, weight of the high one, and the weight's two derivatives."""
    last = (resolution - 1).to(tl.float32)
    position = u * resolution.to(tl.float32) - 0.5
    clamped = tl.minimum(tl.maximum(position, 0.0), last)
    cell = tl.minimum(clamped.to(tl.int32), resolution - 2)
    weight = clamped - cell.to(tl.float32)
    slope = tl.where((position >= 0) & (position <= last), resolution.to(tl.float32), 0.0)
    curvature = slope * 0.0
    if SMOOTH:
        curvature = slope * slope * (6.0 - 12.0 * weight)
        slope = slope * (6.0 * weight * (1.0 - weight))
        weight = weight * weight * (3.0 - 2.0 * weight)
    return cell, weight, slope, curvature


@jit
def corner_row(i, j, k, dense, mask):
    """Row in its level of a vertex, from its coordinates times the level's multipliers."""
    return tl.where(dense, i + j + k, (i ^ j ^ k) & mask)


@jit
def corner_rows(i, j, k, level):
    """Rows of the eight corners of a cell in their level, x fastest, then y."""
    y_factor, z_factor, dense, mask = level[2], level[3], level[4], level[5]
    j0 = j * y_factor
    k0 = k * z_factor
    j1, k1 = j0 + y_factor, k0 + z_factor
    return (
        corner_row(i, j0, k0, dense, mask),
        corner_row(i + 1, j0, k0, dense, mask),
        corner_row(i, j1, k0, dense, mask),
        corner_row(i + 1, j1, k0, dense, mask),
        corner_row(i, j0, k1, dense, mask),
        corner_row(i + 1, j0, k1, dense, mask),
        corner_row(i, j1, k1, dense, mask),
        corner_row(i + 1, j1, k1, dense, mask),
    )


@jit
def corner_weights(x0, x1, y0, y1, z0, z1):
    """Products of one number an axis, of the low or the high side, in the order of `corner_rows`."""
    y0z0, y1z0, y0z1, y1z1 = y0 * z0, y1 * z0, y0 * z1, y1 * z1
    return (x0 * y0z0, x1 * y0z0, x0 * y1z0, x1 * y1z0, x0 * y0z1, x1 * y0z1, x0 * y1z1, x1 * y1z1)


@jit
def tangent_weights(wx, wy, wz, tx, ty, tz):
    """Derivatives of the corners' weights along a tangent; t is the tangent times the weight's slope, axis by axis."""
    along_x = corner_weights(-tx, tx, 1 - wy, wy, 1 - wz, wz)
    along_y = corner_weights(1 - wx, wx, -ty, ty, 1 - wz, wz)
    along_z = corner_weights(1 - wx, wx, 1 - wy, wy, -tz, tz)
    return (
        along_x[0] + along_y[0] + along_z[0],
        along_x[1] + along_y[1] + along_z[1],
        along_x[2] + along_y[2] + along_z[2],
        along_x[3] + along_y[3] + along_z[3],
        along_x[4] + along_y[4] + along_z[4],
        along_x[5] + along_y[5] + along_z[5],
        along_x[6] + along_y[6] + along_z[6],
        along_x[7] + along_y[7] + along_z[7],
    )


@jit
def load_point(x, rows, live, scale, shift):
    """Unit coordinates of rows of x [N, 3] and whether they lie in the cube; a point outside is moved to 0."""
    ux = tl.load(x + rows * 3, mask=live, other=0.0) * scale + shift
    uy = tl.load(x + rows * 3 + 1, mask=live, other=0.0) * scale + shift
    uz = tl.load(x + rows * 3 + 2, mask=live, other=0.0) * scale + shift
    inside = live & (ux >= 0) & (ux <= 1) & (uy >= 0) & (uy <= 1) & (uz >= 0) & (uz <= 1)
    return tl.where(inside, ux, 0.0), tl.where(inside, uy, 0.0), tl.where(inside, uz, 0.0), inside


@jit
def unpack(value, STORED: tl.constexpr):
    """The two entries, or one twice, of a loaded number, in fp32."""
    if STORED == "single":
        low = value.to(tl.float32)
        high = low
    elif STORED == "float16":
        low = value.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (value >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif STORED == "bfloat16":
        low = (value << 16).to(tl.float32, bitcast=True)
        high = (value & -65536).to(tl.float32, bitcast=True)
    else:
        low = value.to(tl.int32).to(tl.float32, bitcast=True)
        high = (value >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return low, high


@jit
def load_entry(table, index, live, STORED: tl.constexpr, ROUNDED: tl.constexpr):
    """Two neighbouring entries, or one, as fp32, from a table as `view_as_pairs` gives it.

    STORED: "single" (one entry), "float32", "float16" or "bfloat16" (two). ROUNDED: the type that entries of fp32 are
    rounded to, or "".
    """
    low, high = unpack(tl.load(table + index, mask=live, other=0), STORED)
    if ROUNDED == "float16":
        low, high = low.to(tl.float16).to(tl.float32), high.to(tl.float16).to(tl.float32)
    elif ROUNDED == "bfloat16":
        low, high = low.to(tl.bfloat16).to(tl.float32), high.to(tl.bfloat16).to(tl.float32)
    return low, high


@jit
def cell_derivatives(v, wx, wy, wz):
    """Corner values, weights of the high side -> derivatives by wx, wy, wz, wx and wy, wx and wz, wy and wz."""
    x00, x10, x01, x11 = v[1] - v[0], v[3] - v[2], v[5] - v[4], v[7] - v[6]
    v00, v10, v01, v11 = v[0] + wx * x00, v[2] + wx * x10, v[4] + wx * x01, v[6] + wx * x11
    y0, y1, xy0, xy1 = v10 - v00, v11 - v01, x10 - x00, x11 - x01
    x0, x1, v0, v1 = x00 + wy * xy0, x01 + wy * xy1, v00 + wy * y0, v01 + wy * y1
    return (
        x0 + wz * (x1 - x0),
        y0 + wz * (y1 - y0),
        v1 - v0,
        xy0 + wz * (xy1 - xy0),
        x1 - x0,
        y1 - y0,
    )
