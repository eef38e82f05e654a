"""Multiresolution hash grid: features of a point, interpolated in tables of trainable rows, level by level.

Level l has R_l vertices a side, R_l = ceil(base * (max / base)^(l / (levels - 1))). A point x in [0,1]^3 lies at
p = clamp(x R_l - 1/2, 0, R_l - 1); its cell is floor(p), at most R_l - 2, so that no corner lies past the grid.
With f = p - cell, or f = s^2 (3 - 2 s) of that s for "smoothstep", the level's features are the sum over the eight
corners of prod_axis (f or 1 - f) * table[row(corner)].
row(i, j, k) = i + R j + R^2 k where R^3 <= 2^log2_entries, else (i ^ 2654435761 j ^ 805459861 k) mod 2^log2_entries.

Legend: N points, F features a level, L levels, rows = sum of the levels' rows.
Units: x is a fraction of the scene cube.
Gradients: table (summed in the table's dtype) and x, to any order in the reference, to second order in the kernels,
where a third raises.
Numerics: table entries are rounded to `dtype`, weights and sums are in the wider of fp32 and the table's dtype, the
result is rounded to `dtype`.
Source: Mueller et al., Instant Neural Graphics Primitives, 2022, section 3 (smoothstep: appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import FLOATS, check_compute_dtype, check_count, check_kernel_dtype, check_tensor
from dream_fast.kernels._core.launch import launch, use_triton
from dream_fast.kernels._core.operator import operator
from dream_fast.kernels._core.reference import live_rows, pad_rows, to_columns
from dream_fast.kernels.grid.device import PRIMES, level_table, view_as_pairs
from dream_fast.kernels.grid.gradients import GridPoints, position_gradient, scatter_features
from dream_fast.kernels.grid.hash_grid_kernels import hash_grid_fwd_kernel
from dream_fast.kernels.grid.spec import HashGridSpec, decode_spec, encode_spec


def combine_rows(i: Tensor, j: Tensor, k: Tensor, dense: bool) -> Tensor:
    """Row of a vertex from the parts of its coordinates that `axis_rows` gives; they broadcast."""
    return i + (j + k) if dense else i ^ (j ^ k)


def axis_rows(vertices: Tensor, level: int, spec: HashGridSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Vertices int32 [..., 3, n] -> the parts of their rows that come from x, y and z, [..., n] each."""
    i, j, k = vertices.unbind(-2)
    if spec.dense(level):
        return i, j * spec.resolutions[level], k * spec.resolutions[level] ** 2
    # int32 products wrap around, which does not change the low bits that the mask keeps.
    mask = (1 << spec.log2_entries) - 1
    return i & mask, (j * PRIMES[1]) & mask, (k * PRIMES[2]) & mask


def _cells(position: Tensor, resolution: int) -> Tensor:
    """Low vertex (int32) of the cell of a position, in vertices; the high one is inside the grid as well."""
    return position.int().clamp_(0, resolution - 2)


# The sum over corners is linear in the entries and in the weights. Written as the three functions below, each gradient
# is another of them, to any order. Everything is stored by coordinate or feature, never by point: columns [F, rows],
# weights [8, n], rows int64 [8, n], features [F, n]. On a CPU loops then run along memory, in a fixed order.


class _InterpolateCorners(torch.autograd.Function):
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
        grad_columns = _ScatterCorners.apply(grad, weights, rows, columns.shape[1]) if ctx.needs_input_grad[0] else None
        grad_weights = _PairCorners.apply(grad, columns, rows) if ctx.needs_input_grad[1] else None
        return grad_columns, grad_weights, None


class _ScatterCorners(torch.autograd.Function):
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
        grad_features = _InterpolateCorners.apply(grad, weights, rows) if ctx.needs_input_grad[0] else None
        grad_weights = _PairCorners.apply(features, grad, rows) if ctx.needs_input_grad[1] else None
        return grad_features, grad_weights, None, None


class _PairCorners(torch.autograd.Function):
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
        grad_features = _InterpolateCorners.apply(columns, grad, rows) if ctx.needs_input_grad[0] else None
        grad_columns = (
            _ScatterCorners.apply(features, grad, rows, columns.shape[1]) if ctx.needs_input_grad[1] else None
        )
        return grad_features, grad_columns, None


class _RoundTable(torch.autograd.Function):
    """Round the table to the compute dtype; the gradient is not rounded."""

    @staticmethod
    def forward(ctx, table: Tensor, dtype: torch.dtype) -> Tensor:
        return table.to(dtype).to(table.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def _level_features(x: Tensor, inside: Tensor, columns: Tensor, level: int, spec: HashGridSpec) -> Tensor:
    """Features of a level: x [3, n] in [0,1], inside [n] (1 or 0), columns [F, rows of the level] -> [F, n]."""
    resolution = spec.resolutions[level]
    position = (x * resolution - 0.5).clamp(0, resolution - 1)
    cells = _cells(position.detach(), resolution)
    fraction = position - cells
    if spec.interpolation == "smoothstep":
        fraction = fraction * fraction * (3 - 2 * fraction)
    # Axes of the products: z, y and x of the corner (0 low, 1 high), then the point.
    wx, wy, wz = torch.stack([1 - fraction, fraction]).unbind(1)
    weights = (wz[:, None] * wy)[:, :, None] * (wx * inside)
    i, j, k = axis_rows(torch.stack([cells, cells + 1]), level, spec)
    rows = combine_rows(i, j[:, None], k[:, None, None], spec.dense(level))
    return _InterpolateCorners.apply(columns, weights.flatten(0, 2).to(columns.dtype), rows.flatten(0, 2).long())


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
    columns = to_columns(table if dtype == table.dtype else _RoundTable.apply(table, dtype))
    sizes = [end - start for start, end in pairwise(spec.offsets)]
    active = spec.levels if active_levels is None else min(max(int(active_levels), 0), spec.levels)
    features = [
        _level_features(x, inside, entries, level, spec)
        for level, entries in enumerate(columns.split(sizes, 1)[:active])
    ]
    features.append(columns.new_zeros((spec.levels - active) * spec.features, live))
    return pad_rows(torch.cat(features).t().to(dtype), total)


class _FwdConfig(NamedTuple):
    """block: points of a program."""

    block: int
    warps: int


def _hash_grid_fwd_config() -> _FwdConfig:
    """A point a lane: its eight gathers are in flight together."""
    return _FwdConfig(block=256, warps=8)


def _rounds_table(n: int, rows: int) -> bool:
    """True to round the whole table before the gathers, False to round each entry after its gather.

    The copy moves 6 bytes an entry once and halves what the gathers fetch. With 6.1 M rows of two entries it takes
    0.023 ms on an H200 and pays from 0.3 M points on.
    """
    return 24 * n >= rows


# Three operators, whose gradients are each other. With E(x, T)[f] the encoding of x in table T and a tangent t:
#
#   _encode             E(x, T)              or, with a tangent, t . dE(x, T)/dx
#   _table_gradient     d/dT sum(g * E)      or d/dT sum(g * (t . dE/dx))
#   _position_gradient  d/dx sum(g * E)      or d/dx sum(g * (t . dE/dx))
#
# E is linear in T, and each sum is linear in g. So the gradient of any of them by T or g is another of them, with the
# upstream gradient in the place of T or g, or as the tangent t. The gradient by x is `_position_gradient`, with a
# tangent where it is that of `_position_gradient` itself. Second derivatives (analytic normals of an unfused field need
# them) thus take no kernels of their own; the backward functions below only pass arguments on. A third order would
# need two tangents, and raises NotImplementedError.
# torch.compile has to pass them without a graph break, so they are operators of torch as well. Their schema knows no
# classes: a spec travels as `encode_spec` gives it.


@operator("dream_fast::hash_grid")
def _encode(
    x: Tensor,
    table: Tensor,
    tangent: Tensor | None,
    active_levels: Tensor | None,
    count: Tensor | None,
    spec_numbers: Sequence[int],
    active: int,
    dtype: str,
    rounded: str,
) -> Tensor:
    """Features [L * F, N] of `dtype`, or their derivative along `tangent` [N, 3].

    Entries are rounded to `rounded` (a name, "" for none). Levels from `active` and from `active_levels` on give zeros.
    """
    spec, n = decode_spec(spec_numbers), x.shape[0]
    if rounded and _rounds_table(n, spec.rows):
        table, rounded = table.to(getattr(torch, rounded)), ""
    pairs, stored = view_as_pairs(table.contiguous())
    out = torch.empty(spec.channels, n, dtype=getattr(torch, dtype), device=x.device)
    config = _hash_grid_fwd_config()
    launch(
        hash_grid_fwd_kernel,
        (-(-n // config.block), spec.levels * max(spec.features // 2, 1)),
        x.device,
        num_warps=config.warps,
        x=x.contiguous(),
        table=pairs,
        tangent=None if tangent is None else tangent.contiguous(),
        out=out,
        levels=level_table(spec, x.device),
        count=count,
        active=active_levels,
        n=n,
        active_levels=active,
        FEATURES=spec.features,
        SMOOTH=spec.interpolation == "smoothstep",
        STORED=stored,
        ROUNDED=rounded,
        BLOCK=config.block,
    )
    return out


@_encode.register_fake
def _(x, table, tangent, active_levels, count, spec_numbers, active, dtype, rounded):
    return x.new_empty(decode_spec(spec_numbers).channels, x.shape[0], dtype=getattr(torch, dtype))


@operator("dream_fast::hash_grid_table_gradient")
def _table_gradient(
    x: Tensor,
    features: Tensor,
    tangent: Tensor | None,
    active_levels: Tensor | None,
    count: Tensor | None,
    spec_numbers: Sequence[int],
    active: int,
) -> Tensor:
    """Gradient [rows, F] by the table of sum(features * encoding), or of its derivative along `tangent`."""
    points = GridPoints(x, count=count, active_levels=active if active_levels is None else active_levels)
    return scatter_features(
        points,
        decode_spec(spec_numbers),
        features=features if tangent is None else None,
        tangent=tangent,
        tangent_features=None if tangent is None else features,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@_table_gradient.register_fake
def _(x, features, tangent, active_levels, count, spec_numbers, active):
    spec = decode_spec(spec_numbers)
    return x.new_empty(spec.rows, spec.features)


@operator("dream_fast::hash_grid_position_gradient")
def _position_gradient(
    x: Tensor,
    table: Tensor,
    features: Tensor,
    tangent: Tensor | None,
    active_levels: Tensor | None,
    count: Tensor | None,
    spec_numbers: Sequence[int],
    active: int,
    rounded: str,
) -> Tensor:
    """Gradient [N, 3] by x of sum(features * encoding), or of its derivative along `tangent`."""
    points = GridPoints(x, count=count, active_levels=active if active_levels is None else active_levels)
    return position_gradient(features, points, table, decode_spec(spec_numbers), tangent=tangent, rounded=rounded)


@_position_gradient.register_fake
def _(x, table, features, tangent, active_levels, count, spec_numbers, active, rounded):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_encode(ctx, inputs, output):
    x, table, tangent, active_levels, count, ctx.spec_numbers, ctx.active, _, ctx.rounded = inputs
    ctx.save_for_backward(x, table, tangent, active_levels, count)


def _save_table_gradient(ctx, inputs, output):
    x, features, tangent, active_levels, count, ctx.spec_numbers, ctx.active = inputs
    ctx.save_for_backward(x, features, tangent, active_levels, count)


def _save_position_gradient(ctx, inputs, output):
    x, table, features, tangent, active_levels, count, ctx.spec_numbers, ctx.active, ctx.rounded = inputs
    ctx.save_for_backward(x, table, features, tangent, active_levels, count)


def _refuse_third_order(tangent: Tensor | None) -> None:
    if tangent is not None:
        raise NotImplementedError("the hash grid's kernels have no third derivative: call hash_grid_reference")


def _backward_encode(ctx, grad):
    x, table, tangent, active_levels, count = ctx.saved_tensors
    _refuse_third_order(tangent)
    masks = (None, active_levels, count, ctx.spec_numbers, ctx.active)
    grad_x = grad_table = None
    if ctx.needs_input_grad[0] and ctx.needs_input_grad[1]:
        grad = grad.contiguous()  # once for both
    if ctx.needs_input_grad[0]:
        grad_x = _position_gradient(x, table, grad, *masks, ctx.rounded)
    if ctx.needs_input_grad[1]:
        grad_table = _table_gradient(x, grad, *masks)
    return grad_x, grad_table, None, None, None, None, None, None, None


def _backward_table_gradient(ctx, grad):
    x, features, tangent, active_levels, count = ctx.saved_tensors
    _refuse_third_order(tangent)
    masks = (None, active_levels, count, ctx.spec_numbers, ctx.active)
    grad_x = _position_gradient(x, grad, features, *masks, "") if ctx.needs_input_grad[0] else None
    grad_features = None
    if ctx.needs_input_grad[1]:
        grad_features = _encode(x, grad, *masks, "float32", "").to(features.dtype)
    return grad_x, grad_features, None, None, None, None, None


def _backward_position_gradient(ctx, grad):
    x, table, features, tangent, active_levels, count = ctx.saved_tensors
    _refuse_third_order(tangent)
    masks = (grad.contiguous(), active_levels, count, ctx.spec_numbers, ctx.active)
    grad_x = grad_table = grad_features = None
    if ctx.needs_input_grad[0]:
        grad_x = _position_gradient(x, table, features, *masks, ctx.rounded)
    if ctx.needs_input_grad[1]:
        grad_table = _table_gradient(x, features, *masks)
    if ctx.needs_input_grad[2]:
        grad_features = _encode(x, table, *masks, "float32", ctx.rounded).to(features.dtype)
    return grad_x, grad_table, grad_features, None, None, None, None, None, None


_encode.register_autograd(_backward_encode, setup_context=_save_encode)
_table_gradient.register_autograd(_backward_table_gradient, setup_context=_save_table_gradient)
_position_gradient.register_autograd(_backward_position_gradient, setup_context=_save_position_gradient)


def check_features(spec: HashGridSpec) -> None:
    """Check that the kernels take this many features a level. Raises ValueError: unless they are 1, 2 or 4."""
    if spec.features not in (1, 2, 4):
        raise ValueError(f"the kernels take 1, 2 or 4 features a level, got {spec.features}: call the reference")


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

    x: fractions of the scene cube, fp32 or fp64 as the table; points outside [0,1]^3 give zeros. active_levels: levels
    from here on give zeros (an int, or an integer scalar tensor on the device). count: rows from here on give zeros and
    take no gradient (an int64 scalar tensor on the device).
    Raises TypeError or ValueError: for an argument of the wrong type, shape, dtype or device.
    Source: Mueller et al., Instant Neural Graphics Primitives, 2022.
    """
    check_tensor("x", x, ("N", 3), dtypes=(torch.float32, torch.float64))
    check_tensor("table", table, (spec.rows, spec.features), dtypes=(torch.float32, torch.float64), like=("x", x))
    check_count(count, ("x", x))
    if isinstance(active_levels, Tensor):
        check_tensor("active_levels", active_levels, (), dtypes=(torch.int32, torch.int64), like=("x", x))
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be a float dtype, got {dtype}")
    if not use_triton(x):
        return hash_grid_reference(x, table, spec, active_levels=active_levels, count=count, dtype=dtype).contiguous()
    check_kernel_dtype("x", x)
    check_kernel_dtype("table", table)
    dtype = torch.float32 if dtype is None else dtype
    check_compute_dtype(dtype)
    check_features(spec)
    on_device = isinstance(active_levels, Tensor)
    active = spec.levels if active_levels is None or on_device else min(max(int(active_levels), 0), spec.levels)
    name = str(dtype).removeprefix("torch.")
    rounded = "" if dtype == torch.float32 else name
    masks = (active_levels if on_device else None, count, encode_spec(spec), active)
    return _encode(x, table, None, *masks, name, rounded).t()
