"""Regularisers of a hash grid's table, as gradients: total variation near points, and weight decay by level.

Total variation: each point picks, in every level, the vertex v nearest to it. With e the entry of v and e_n those of
its neighbours along the axes that lie in the grid (3 to 6), v's gradient grows by
weight / 6 * sum_n (e - e_n) / sqrt(sum_n (e - e_n)^2 + 1e-9), each feature by itself.
Weight decay: the gradient of weight * sum over levels of (sum of squares / rows of the level).

Legend: rows and F of the table, P points. Units: points are fractions of the scene cube.
Gradients: these are gradients, and have none themselves.
Numerics: fp32 in the kernels; sums are atomic, of fixed-point numbers when torch's deterministic algorithms are on.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import check_kernel_dtype, check_tensor
from dream_fast.kernels._core.launch import jit, launch, tl, use_triton
from dream_fast.kernels._core.reference import scatter_rows
from dream_fast.kernels.grid.device import corner_row, level_table, load_level
from dream_fast.kernels.grid.gradients import fixed_point
from dream_fast.kernels.grid.hash_grid import axis_rows, check_features, combine_rows
from dream_fast.kernels.grid.hash_grid_kernels import add_one
from dream_fast.kernels.grid.spec import HashGridSpec


@torch.no_grad()
def hash_grid_total_variation_grad_reference(
    table: Tensor, spec: HashGridSpec, points: Tensor, weight: float | Tensor
) -> Tensor:
    """The definition of `hash_grid_total_variation_grad` in plain PyTorch, for any float dtype."""

    def vertex_rows(vertices: Tensor, level: int) -> Tensor:
        return combine_rows(*axis_rows(vertices, level, spec), spec.dense(level)).long()

    level_grads = []
    for level, resolution in enumerate(spec.resolutions):
        entries = table[spec.offsets[level] : spec.offsets[level + 1]]
        nearest = (points.t() * resolution).int().clamp_(0, resolution - 1)
        rows = vertex_rows(nearest, level)
        center = entries.index_select(0, rows)
        total, squares = torch.zeros_like(center), torch.zeros_like(center)
        for axis in range(3):
            for step in (-1, 1):
                vertex = nearest.clone()
                # Past the grid, the vertex is its own neighbour and the difference is 0.
                vertex[axis] = (vertex[axis] + step).clamp_(0, resolution - 1)
                difference = center - entries.index_select(0, vertex_rows(vertex, level))
                total += difference
                squares += difference.square()
        level_grads.append(scatter_rows(total * (squares + 1e-9).rsqrt(), rows, entries.shape[0]))
    return torch.cat(level_grads) * (weight / 6)


@torch.no_grad()
def hash_grid_weight_decay_grad_reference(table: Tensor, spec: HashGridSpec, weight: float | Tensor) -> Tensor:
    """The definition of `hash_grid_weight_decay_grad` in plain PyTorch, for any float dtype."""
    grad = 2 * weight * table
    for start, end in pairwise(spec.offsets):
        grad[start:end] /= end - start
    return grad


@jit
def hash_grid_total_variation_grad_kernel(
    table,  # [rows, F] fp32
    points,  # [P, 3] fp32
    grad,  # [rows, F] fp32, or int64 where there is a factor
    factor,  # [] fp32 or None
    weight,
    weight_tensor,  # [] any float dtype, or None
    levels,  # [L, 6] int64
    n,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One level of a block of points: differences between the nearest vertex and its neighbours, added to its row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < n
    level = load_level(levels, tl.program_id(1))
    i = _nearest(tl.load(points + row * 3, mask=live, other=0.0), level[1])
    j = _nearest(tl.load(points + row * 3 + 1, mask=live, other=0.0), level[1])
    k = _nearest(tl.load(points + row * 3 + 2, mask=live, other=0.0), level[1])
    table += level[0] * FEATURES
    grad += level[0] * FEATURES
    if factor is not None:
        factor = tl.load(factor)
    if weight_tensor is not None:
        weight = weight * tl.load(weight_tensor).to(tl.float32)
    center_row = _vertex_row(i, j, k, level)
    top = level[1] - 1
    # Past the grid, the vertex is its own neighbour and the difference is 0.
    neighbours = (
        _vertex_row(tl.maximum(i - 1, 0), j, k, level),
        _vertex_row(tl.minimum(i + 1, top), j, k, level),
        _vertex_row(i, tl.maximum(j - 1, 0), k, level),
        _vertex_row(i, tl.minimum(j + 1, top), k, level),
        _vertex_row(i, j, tl.maximum(k - 1, 0), level),
        _vertex_row(i, j, tl.minimum(k + 1, top), level),
    )
    for feature in tl.static_range(FEATURES):
        center = tl.load(table + center_row * FEATURES + feature, mask=live, other=0.0)
        total = tl.zeros((BLOCK,), tl.float32)
        squares = tl.zeros((BLOCK,), tl.float32)
        for side in tl.static_range(6):
            difference = center - tl.load(table + neighbours[side] * FEATURES + feature, mask=live, other=0.0)
            total += difference
            squares += difference * difference
        value = total * tl.rsqrt(squares + 1e-9) * weight
        add_one(grad + center_row * FEATURES + feature, value, live, factor)


@jit
def _nearest(u, resolution):
    # A NaN gives vertex 0.
    position = tl.maximum(u * resolution.to(tl.float32), 0.0)
    return tl.minimum(position, (resolution - 1).to(tl.float32)).to(tl.int32)


@jit
def _vertex_row(i, j, k, level):
    return corner_row(i, j * level[2], k * level[3], level[4], level[5])


@jit
def hash_grid_weight_decay_grad_kernel(
    table,  # [rows, F] fp32
    grad,  # [rows, F] fp32
    weight,
    weight_tensor,  # [] any float dtype, or None
    levels,  # [L, 6] int64
    entries,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Rows of the level that an entry is in: the last level that starts before it.
    size = tl.zeros((BLOCK,), tl.float32)
    for number in tl.static_range(LEVELS):
        start = load_level(levels, number)[0] * FEATURES
        end = tl.full((), entries, tl.int64)
        if number + 1 < LEVELS:
            end = load_level(levels, number + 1)[0] * FEATURES
        size = tl.where(index >= start, (end - start).to(tl.float32) / FEATURES, size)
    if weight_tensor is not None:
        weight = weight * tl.load(weight_tensor).to(tl.float32)
    value = tl.load(table + index, mask=index < entries, other=0.0)
    tl.store(grad + index, weight * value / size, mask=index < entries)


class _Config(NamedTuple):
    """Points of a program of total variation, entries of a program of weight decay."""

    points: int
    entries: int


def _regularizers_config() -> _Config:
    """One point, or four entries, a lane."""
    return _Config(points=128, entries=512)


def _split_weight(weight: float | Tensor, factor: float) -> tuple[float, Tensor | None]:
    """A weight times `factor` as a number to multiply by and, when it is on a GPU, a tensor to multiply by as well."""
    if isinstance(weight, Tensor) and weight.is_cuda:
        return factor, weight
    return factor * float(weight), None


@torch.no_grad()
def hash_grid_total_variation_grad(table: Tensor, spec: HashGridSpec, points: Tensor, weight: float | Tensor) -> Tensor:
    """Gradient of the table's total variation near points: table [rows, F], points [P, 3] in [0,1] -> [rows, F].

    points: fractions of the scene cube; outside points take the nearest vertex. weight: a number or a scalar tensor.
    In torch's deterministic mode sums are repeatable, and not finite where the table is not.
    Raises TypeError or ValueError: for an argument of the wrong type, shape, dtype or device.
    """
    check_tensor("table", table, (spec.rows, spec.features), dtypes=(torch.float32, torch.float64))
    check_tensor("points", points, ("P", 3), dtypes=(torch.float32, torch.float64), like=("table", table))
    if not use_triton(table):
        return hash_grid_total_variation_grad_reference(table, spec, points, weight)
    check_kernel_dtype("table", table)
    check_kernel_dtype("points", points)
    check_features(spec)
    number, weight_tensor = _split_weight(weight, 1 / 6)
    n, block = points.shape[0], _regularizers_config().points
    factor = inverse = None
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        # A sum of six numbers over the root of the sum of their squares is at most sqrt(6). A table that is not finite
        # makes the bound, and with it the result, not finite either.
        bound = (table.abs().amax() * 0 + 2.5 * n) * abs(number)
        factor, inverse = fixed_point(bound if weight_tensor is None else bound * weight_tensor.abs())
    grad = torch.zeros(table.shape, dtype=torch.int64 if deterministic else torch.float32, device=table.device)
    launch(
        hash_grid_total_variation_grad_kernel,
        (-(-n // block), spec.levels),
        table.device,
        table=table.contiguous(),
        points=points.contiguous(),
        grad=grad,
        factor=factor,
        weight=number,
        weight_tensor=weight_tensor,
        levels=level_table(spec, table.device),
        n=n,
        FEATURES=spec.features,
        BLOCK=block,
    )
    return grad if inverse is None else grad.float() * inverse


@torch.no_grad()
def hash_grid_weight_decay_grad(table: Tensor, spec: HashGridSpec, weight: float | Tensor) -> Tensor:
    """Gradient of weight * sum over levels of (sum of squares / rows of the level): table [rows, F] -> [rows, F].

    weight: a number or a scalar tensor.
    Raises TypeError or ValueError: for an argument of the wrong type, shape or dtype.
    """
    check_tensor("table", table, (spec.rows, spec.features), dtypes=(torch.float32, torch.float64))
    if not use_triton(table):
        return hash_grid_weight_decay_grad_reference(table, spec, weight)
    check_kernel_dtype("table", table)
    check_features(spec)
    number, weight_tensor = _split_weight(weight, 2.0)
    grad = torch.empty(table.shape, device=table.device)
    block = _regularizers_config().entries
    launch(
        hash_grid_weight_decay_grad_kernel,
        (-(-table.numel() // block),),
        table.device,
        table=table.contiguous(),
        grad=grad,
        weight=number,
        weight_tensor=weight_tensor,
        levels=level_table(spec, table.device),
        entries=table.numel(),
        LEVELS=spec.levels,
        FEATURES=spec.features,
        BLOCK=block,
    )
    return grad
