"""Multiresolution hash grid: features of a point by trilinear interpolation in a table of trainable rows, level by
level.

Level l has R_l vertices a side, R_l = ceil(base * (max / base)^(l / (levels - 1))). A point x in [0,1]^3 lies at
p = clamp(x R_l - 1/2, 0, R_l - 1); its cell is floor(p), at most R_l - 2, so that no corner lies past the grid.
With f = p - cell, or f = s^2 (3 - 2 s) of that s for "smoothstep", the level's features are the sum over the eight
corners of prod_axis (f or 1 - f) * table[row(corner)].
row(i, j, k) = i + R j + R^2 k where R^3 rows fit into 2^log2_entries, else (i ^ 2654435761 j ^ 805459861 k) mod
2^log2_entries.

Legend: N points, F features a level, L levels, rows = sum of the levels' rows.
Units: x is a fraction of the scene cube. Gradients: table (accumulated in the table's dtype) and x, to any order.
Numerics: table entries are rounded to `dtype`, weights and sums are in the wider of fp32 and the table's dtype, the
result is rounded to `dtype`.
Source: Mueller et al., Instant Neural Graphics Primitives, 2022, section 3 (smoothstep: appendix A).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dream_fast.kernels._launch import FLOATS, check_count, check_tensor
from dream_fast.kernels._reference import gather_rows, live_rows, pad_rows, scatter_rows

PRIMES = (1, 2654435761, 805459861)


@dataclass(frozen=True, kw_only=True)
class HashGridSpec:
    """Shape of a hash grid.

    levels, features: L and F. log2_entries: a level has at most 2^log2_entries rows. base_resolution, max_resolution:
    vertices a side of the first and of the last level. interpolation: "smoothstep" or "linear".
    """

    levels: int = 16
    features: int = 2
    log2_entries: int = 19
    base_resolution: int = 16
    max_resolution: int = 2048
    interpolation: str = "smoothstep"

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}")
        if self.features < 1:
            raise ValueError(f"features must be at least 1, got {self.features}")
        if not 3 <= self.log2_entries <= 28:
            raise ValueError(f"log2_entries must be from 3 to 28, got {self.log2_entries}")
        if self.base_resolution < 2:
            raise ValueError(f"base_resolution must be at least 2, got {self.base_resolution}")
        if self.max_resolution < self.base_resolution:
            raise ValueError(
                f"max_resolution must be at least base_resolution = {self.base_resolution}, got {self.max_resolution}"
            )
        if self.interpolation not in ("smoothstep", "linear"):
            raise ValueError(f'interpolation must be "smoothstep" or "linear", got "{self.interpolation}"')

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Vertices a side, a level each."""
        growth = math.log(self.max_resolution / self.base_resolution) / max(self.levels - 1, 1)
        # The small number keeps a resolution that is a whole number from being pushed one up by rounding.
        return tuple(math.ceil(self.base_resolution * math.exp(growth * level) - 1e-6) for level in range(self.levels))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First row of each level, then the total: levels + 1 numbers, all multiples of 8."""
        offsets = [0]
        for resolution in self.resolutions:
            offsets.append(offsets[-1] + min(1 << self.log2_entries, math.ceil(resolution**3 / 8) * 8))
        return tuple(offsets)

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.offsets[-1]

    @property
    def channels(self) -> int:
        """Features of a point: levels * features."""
        return self.levels * self.features

    def dense(self, level: int) -> bool:
        """Whether every vertex of the level has a row of its own."""
        return self.resolutions[level] ** 3 <= 1 << self.log2_entries


def _vertex_rows(i: Tensor, j: Tensor, k: Tensor, level: int, spec: HashGridSpec) -> Tensor:
    """Row of a vertex inside its level; integer tensors that broadcast."""
    if spec.dense(level):
        resolution = spec.resolutions[level]
        return i + (j * resolution + k * resolution**2)
    mask = (1 << spec.log2_entries) - 1
    return (i ^ (j * PRIMES[1]) ^ (k * PRIMES[2])) & mask


def _cells(position: Tensor, resolution: int) -> Tensor:
    """Low vertex of the cell of a position in vertices; a cell always has its high vertex inside the grid."""
    return position.long().clamp_(0, resolution - 2)


def _level(coordinates: tuple[Tensor, ...], entries: Tensor, level: int, spec: HashGridSpec) -> Tensor:
    """One level: coordinates 3 x [n] in [0,1], entries [rows of the level, F] -> [n, F]."""
    resolution = spec.resolutions[level]
    low, high, cells = [], [], []
    for coordinate in coordinates:
        position = (coordinate * resolution - 0.5).clamp(0, resolution - 1)
        cell = _cells(position.detach(), resolution)
        fraction = position - cell
        if spec.interpolation == "smoothstep":
            fraction = fraction * fraction * (3 - 2 * fraction)
        cells.append(cell)
        high.append(fraction)
        low.append(1 - fraction)
    out = None
    for corner in range(8):
        dx, dy, dz = corner & 1, corner >> 1 & 1, corner >> 2
        weight = (high if dx else low)[0] * (high if dy else low)[1] * (high if dz else low)[2]
        rows = _vertex_rows(cells[0] + dx, cells[1] + dy, cells[2] + dz, level, spec)
        term = weight[:, None] * gather_rows(entries, rows)
        out = term if out is None else out + term
    return out


def hash_grid_reference(
    x: Tensor,
    table: Tensor,
    spec: HashGridSpec,
    *,
    active_levels: int | Tensor | None = None,
    count: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition of `hash_grid` in plain PyTorch, for any float dtype."""
    dtype = table.dtype if dtype is None else dtype
    total, live = x.shape[0], live_rows(x.shape[0], count)
    x = x[:live]
    inside = ((x >= 0) & (x <= 1)).all(1)
    coordinates = torch.where(inside[:, None], x, 0).unbind(1)
    entries = table if dtype == table.dtype else table.to(dtype).to(torch.promote_types(table.dtype, torch.float32))
    parts = []
    for level in range(spec.levels):
        if isinstance(active_levels, int) and level >= active_levels:
            parts.append(entries.new_zeros(live, spec.features))
            continue
        part = _level(coordinates, entries[spec.offsets[level] : spec.offsets[level + 1]], level, spec)
        if isinstance(active_levels, Tensor):
            part = torch.where(active_levels > level, part, 0)
        parts.append(part)
    features = torch.where(inside[:, None], torch.cat(parts, 1), 0)
    return pad_rows(features.to(dtype), total)


def hash_grid(
    x: Tensor,
    table: Tensor,
    spec: HashGridSpec,
    *,
    active_levels: int | Tensor | None = None,
    count: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [N, 3], table [rows, F] -> features [N, L * F] of `dtype` (the table's when None), level by level.

    Points outside [0,1]^3 give zeros. Levels from `active_levels` on (an int, or an int scalar tensor on the device)
    give zeros. Rows from `count` on (an int64 scalar tensor on the device) give zeros and take no gradient.
    Raises TypeError or ValueError for arguments of the wrong type, shape, dtype or device.
    """
    check_tensor("x", x, ("N", 3), dtypes=(torch.float32, torch.float64))
    check_tensor("table", table, (spec.rows, spec.features), dtypes=(torch.float32, torch.float64), like=("x", x))
    check_count(count, ("x", x))
    if isinstance(active_levels, Tensor):
        check_tensor("active_levels", active_levels, (), dtypes=(torch.int32, torch.int64), like=("x", x))
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be a float dtype, got {dtype}")
    return hash_grid_reference(x, table, spec, active_levels=active_levels, count=count, dtype=dtype)


@torch.no_grad()
def hash_grid_total_variation_grad(table: Tensor, spec: HashGridSpec, points: Tensor, weight: float | Tensor) -> Tensor:
    """Gradient of the total variation of the table near random points: table [rows, F], points [P, 3] in [0,1] ->
    [rows, F].

    Each point picks, in every level, the low vertex v of its cell. With e the entry of v and e_n those of its
    neighbours along the axes that lie in the grid (3 to 6), v's gradient grows by
    weight / 6 * sum_n (e - e_n) / sqrt(sum_n (e - e_n)^2 + 1e-9), each feature by itself. Add it to the table's
    gradient.
    """
    check_tensor("table", table, (spec.rows, spec.features), dtypes=(torch.float32, torch.float64))
    check_tensor("points", points, ("P", 3), dtypes=(torch.float32, torch.float64), like=("table", table))
    parts = []
    for level, resolution in enumerate(spec.resolutions):
        entries = table[spec.offsets[level] : spec.offsets[level + 1]]
        cells = _cells(points * resolution - 0.5, resolution).unbind(1)
        own_rows = _vertex_rows(*cells, level, spec)
        own = entries.index_select(0, own_rows)
        total, squares = torch.zeros_like(own), torch.zeros_like(own)
        for axis in range(3):
            for step in (-1, 1):
                neighbour = list(cells)
                neighbour[axis] = cells[axis] + step
                inside = (neighbour[axis] >= 0) & (neighbour[axis] < resolution)
                neighbour[axis] = neighbour[axis].clamp(0, resolution - 1)
                difference = own - entries.index_select(0, _vertex_rows(*neighbour, level, spec))
                difference = torch.where(inside[:, None], difference, 0)
                total += difference
                squares += difference.square()
        parts.append(scatter_rows(total * (squares + 1e-9).rsqrt(), own_rows, entries.shape[0]))
    return torch.cat(parts) * (weight / 6)


@torch.no_grad()
def hash_grid_weight_decay_grad(table: Tensor, spec: HashGridSpec, weight: float | Tensor) -> Tensor:
    """Gradient of weight * sum over levels of (sum of squares / rows of the level): table [rows, F] -> [rows, F]."""
    check_tensor("table", table, (spec.rows, spec.features), dtypes=(torch.float32, torch.float64))
    grad = 2 * weight * table
    for start, end in zip(spec.offsets, spec.offsets[1:], strict=False):
        grad[start:end] /= end - start
    return grad
