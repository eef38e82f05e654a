"""Multiresolution hash grid: features of a point, interpolated in tables of trainable rows, level by level.

Level l has R_l vertices a side, R_l = ceil(base * (max / base)^(l / (levels - 1))). A point x in [0,1]^3 lies at
p = clamp(x R_l - 1/2, 0, R_l - 1); its cell is floor(p), at most R_l - 2, so that no corner lies past the grid.
With f = p - cell, or f = s^2 (3 - 2 s) of that s for "smoothstep", the level's features are the sum over the eight
corners of prod_axis (f or 1 - f) * table[row(corner)].
row(i, j, k) = i + R j + R^2 k where R^3 <= 2^log2_entries, else (i ^ 2654435761 j ^ 805459861 k) mod 2^log2_entries.

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
from itertools import pairwise

import torch
from torch import Tensor

from dream_fast.kernels._launch import FLOATS, check_count, check_tensor
from dream_fast.kernels._reference import live_rows, pad_rows, scatter_rows, to_columns

# The first is 2654435761 as an int32: only the low bits of a product count.
PRIMES = (1, 2654435761 - 2**32, 805459861)


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


def _combine(i: Tensor, j: Tensor, k: Tensor, dense: bool) -> Tensor:
    """Row of a vertex from what each of its coordinates adds (dense) or mixes in (hashed); they broadcast."""
    return i + (j + k) if dense else i ^ (j ^ k)


def _axis_rows(vertices: Tensor, level: int, spec: HashGridSpec) -> tuple[Tensor, Tensor, Tensor]:
    """What the coordinates of vertices, int32 [..., 3, n], contribute to their row: a tensor [..., n] an axis."""
    i, j, k = vertices.unbind(-2)
    if spec.dense(level):
        return i, j * spec.resolutions[level], k * spec.resolutions[level] ** 2
    # int32 products wrap, which leaves the low bits that the mask keeps as they are.
    mask = (1 << spec.log2_entries) - 1
    return i & mask, (j * PRIMES[1]) & mask, (k * PRIMES[2]) & mask


def _cells(position: Tensor, resolution: int) -> Tensor:
    """Low vertex (int32) of the cell of a position in vertices; the high one is inside the grid as well."""
    return position.int().clamp_(0, resolution - 2)


# The sum over corners is linear in the entries and in the weights. Written as the three functions below, each gradient
# is another of them, to any order. Everything is stored by coordinate or feature, never by point: columns [F, rows],
# weights [8, n], rows int64 [8, n], features [F, n]. On a CPU this runs along memory and adds up in a fixed order.


class _Interpolate(torch.autograd.Function):
    """out[f, n] = sum_c weights[c, n] columns[f, rows[c, n]]."""

    @staticmethod
    def forward(ctx, columns: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(columns, weights, rows)
        out = columns.new_zeros(columns.shape[0], rows.shape[1])
        for feature, column in zip(out, columns, strict=True):
            for weight, row in zip(weights, rows, strict=True):
                feature.addcmul_(weight, column.index_select(0, row))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        columns, weights, rows = ctx.saved_tensors
        to_columns = _Spread.apply(grad, weights, rows, columns.shape[1]) if ctx.needs_input_grad[0] else None
        to_weights = _Pair.apply(grad, columns, rows) if ctx.needs_input_grad[1] else None
        return to_columns, to_weights, None


class _Spread(torch.autograd.Function):
    """out[f, r] = sum of weights[c, n] features[f, n] over the c, n with rows[c, n] = r."""

    @staticmethod
    def forward(ctx, features: Tensor, weights: Tensor, rows: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(features, weights, rows)
        out = features.new_zeros(features.shape[0], size)
        for column, feature in zip(out, features, strict=True):
            for weight, row in zip(weights, rows, strict=True):
                column.scatter_add_(0, row, weight * feature)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        features, weights, rows = ctx.saved_tensors
        to_features = _Interpolate.apply(grad, weights, rows) if ctx.needs_input_grad[0] else None
        to_weights = _Pair.apply(features, grad, rows) if ctx.needs_input_grad[1] else None
        return to_features, to_weights, None, None


class _Pair(torch.autograd.Function):
    """out[c, n] = sum_f features[f, n] columns[f, rows[c, n]]."""

    @staticmethod
    def forward(ctx, features: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(features, columns, rows)
        out = features.new_zeros(rows.shape)
        for feature, column in zip(features, columns, strict=True):
            for weight, row in zip(out, rows, strict=True):
                weight.addcmul_(feature, column.index_select(0, row))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        features, columns, rows = ctx.saved_tensors
        to_features = _Interpolate.apply(columns, grad, rows) if ctx.needs_input_grad[0] else None
        to_columns = _Spread.apply(features, grad, rows, columns.shape[1]) if ctx.needs_input_grad[1] else None
        return to_features, to_columns, None


class _Rounded(torch.autograd.Function):
    """Round the table to the compute dtype, and leave its gradient as precise as it is."""

    @staticmethod
    def forward(ctx, table: Tensor, dtype: torch.dtype) -> Tensor:
        return table.to(dtype).to(table.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def _level(x: Tensor, inside: Tensor, columns: Tensor, level: int, spec: HashGridSpec) -> Tensor:
    """One level: x [3, n] in [0,1], inside [n] (1 or 0), columns [F, rows of the level] -> [F, n]."""
    resolution = spec.resolutions[level]
    position = (x * resolution - 0.5).clamp(0, resolution - 1)
    cells = _cells(position.detach(), resolution)
    fraction = position - cells
    if spec.interpolation == "smoothstep":
        fraction = fraction * fraction * (3 - 2 * fraction)
    # Axes of the products: z, y and x of the corner (0 low, 1 high), then the point.
    wx, wy, wz = torch.stack([1 - fraction, fraction]).unbind(1)
    weights = (wz[:, None] * wy)[:, :, None] * (wx * inside)
    i, j, k = _axis_rows(torch.stack([cells, cells + 1]), level, spec)
    rows = _combine(i, j[:, None], k[:, None, None], spec.dense(level))
    return _Interpolate.apply(columns, weights.flatten(0, 2).to(columns.dtype), rows.flatten(0, 2).long())


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
    x = to_columns(x[:live])
    inside = (x.detach().clamp(0, 1) == x).all(0)
    x = torch.where(inside, x, 0)
    columns = to_columns(table if dtype == table.dtype else _Rounded.apply(table, dtype))
    sizes = [end - start for start, end in pairwise(spec.offsets)]
    active = spec.levels if active_levels is None else min(max(int(active_levels), 0), spec.levels)
    parts = [_level(x, inside, entries, level, spec) for level, entries in enumerate(columns.split(sizes, 1)[:active])]
    parts.append(columns.new_zeros((spec.levels - active) * spec.features, live))
    return pad_rows(torch.cat(parts).t().to(dtype), total)


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
    return hash_grid_reference(x, table, spec, active_levels=active_levels, count=count, dtype=dtype).contiguous()


@torch.no_grad()
def hash_grid_total_variation_grad(table: Tensor, spec: HashGridSpec, points: Tensor, weight: float | Tensor) -> Tensor:
    """Gradient of the table's total variation near points: table [rows, F], points [P, 3] in [0,1] -> [rows, F].

    Each point picks, in every level, the vertex v nearest to it. With e the entry of v and e_n those of its
    neighbours along the axes that lie in the grid (3 to 6), v's gradient grows by
    weight / 6 * sum_n (e - e_n) / sqrt(sum_n (e - e_n)^2 + 1e-9), each feature by itself.
    """
    check_tensor("table", table, (spec.rows, spec.features), dtypes=(torch.float32, torch.float64))
    check_tensor("points", points, ("P", 3), dtypes=(torch.float32, torch.float64), like=("table", table))

    def rows_of(vertices: Tensor, level: int) -> Tensor:
        return _combine(*_axis_rows(vertices, level, spec), spec.dense(level)).long()

    parts = []
    for level, resolution in enumerate(spec.resolutions):
        entries = table[spec.offsets[level] : spec.offsets[level + 1]]
        nearest = (points.t() * resolution).int().clamp_(0, resolution - 1)
        own_rows = rows_of(nearest, level)
        own = entries.index_select(0, own_rows)
        total, squares = torch.zeros_like(own), torch.zeros_like(own)
        for axis in range(3):
            for step in (-1, 1):
                vertex = nearest.clone()
                # Past the grid, the vertex is its own neighbour and the difference is 0.
                vertex[axis] = (vertex[axis] + step).clamp_(0, resolution - 1)
                difference = own - entries.index_select(0, rows_of(vertex, level))
                total += difference
                squares += difference.square()
        parts.append(scatter_rows(total * (squares + 1e-9).rsqrt(), own_rows, entries.shape[0]))
    return torch.cat(parts) * (weight / 6)


@torch.no_grad()
def hash_grid_weight_decay_grad(table: Tensor, spec: HashGridSpec, weight: float | Tensor) -> Tensor:
    """Gradient of weight * sum over levels of (sum of squares / rows of the level): table [rows, F] -> [rows, F]."""
    check_tensor("table", table, (spec.rows, spec.features), dtypes=(torch.float32, torch.float64))
    grad = 2 * weight * table
    for start, end in pairwise(spec.offsets):
        grad[start:end] /= end - start
    return grad
