"""Rendering for looking: any number of rays without gradients, in bounded memory; opaque rays stop costing.

The same samples, field and compositing as in training, a few samples of each ray at a time: rays whose transmittance
fell below `stop`, and rays without samples left, drop out of the next round. The normal is the field's, by finite
differences, at the expected depth o + d depth / opacity.

Legend: R rays. Units: world units. Numerics: fp32 (fp64 when the rays are). No gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._launch import check_positive, check_tensor
from dream_fast.kernels.field import FieldSpec, check_field, field_normals_reference, field_reference
from dream_fast.kernels.march import check_rays, packed_intervals

# A ray that gathers less than this has no surface worth a normal.
EMPTY_OPACITY = 1e-3
# Samples of a ray in a round: more waste work behind surfaces, fewer make many small rounds.
_ROUND = 8


class View(NamedTuple):
    """rgb [R, 3] over the background, normal [R, 3] (unit; 0 where empty), depth [R] (sum of w t), opacity [R]."""

    rgb: Tensor
    normal: Tensor
    depth: Tensor
    opacity: Tensor


def _render_rays(origins, directions, bits, parameters, spec: FieldSpec, options: dict, marching: dict, stop: float):
    """Some rays: premultiplied albedo [r, 3], depth [r], opacity [r]."""
    rays = origins.shape[0]
    _, t, dt, samples = packed_intervals(origins, directions, bits, bound=spec.bound, perturb=None, **marching)
    ends = samples.cumsum(0)
    cursor = ends - samples
    sums = origins.new_zeros(rays, 5)
    transmittance = origins.new_ones(rays)
    steps = torch.arange(_ROUND, device=origins.device)
    live = samples.nonzero()[:, 0]
    while live.numel():
        rows = cursor[live, None] + steps
        there = rows < ends[live, None]
        rows, ray = rows[there], live[:, None].expand_as(there)[there]
        positions = origins[ray] + t[rows, None] * directions[ray]
        sigma, albedo = field_reference(positions, *parameters, spec, **options)
        tau = origins.new_zeros(there.shape).masked_scatter_(there, sigma * dt[rows])
        columns = origins.new_zeros(*there.shape, 5)
        columns[there] = torch.cat([albedo, t[rows, None], torch.ones_like(t[rows, None])], 1)
        total = tau.cumsum(1)
        before = transmittance[live, None] * torch.exp(tau - total)
        weights = torch.where(before >= stop, -torch.expm1(-tau) * before, 0)
        sums[live] += (weights[..., None] * columns).sum(1)
        transmittance[live] *= torch.exp(-total[:, -1])
        cursor[live] += _ROUND
        live = live[(transmittance[live] >= stop) & (cursor[live] < ends[live])]
    return sums[:, :3], sums[:, 3], sums[:, 4]


@torch.no_grad()
def render_reference(
    origins: Tensor,
    directions: Tensor,
    bits: Tensor,
    table: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: FieldSpec,
    *,
    resolution: int,
    background: Tensor,
    max_steps: int = 1024,
    dt_gamma: float = 0.0,
    min_near: float = 0.01,
    stop: float = 1e-3,
    normals: bool = True,
    normal_epsilon: float = 0.01,
    active_levels: int | Tensor | None = None,
    dtype: torch.dtype | None = None,
    chunk: int = 4096,
) -> View:
    """The definition of `render` in plain PyTorch, fp32 or fp64."""
    parameters = (table, weights, biases)
    options = {"active_levels": active_levels, "dtype": dtype}
    marching = {"resolution": resolution, "max_steps": max_steps, "dt_gamma": dt_gamma, "min_near": min_near}
    view = View(
        rgb=torch.empty_like(origins),
        normal=torch.zeros_like(origins),
        depth=torch.empty_like(origins[:, 0]),
        opacity=torch.empty_like(origins[:, 0]),
    )
    for first in range(0, origins.shape[0], chunk):
        part = slice(first, first + chunk)
        start, along = origins[part], directions[part]
        rgb, depth, opacity = _render_rays(start, along, bits, parameters, spec, options, marching, stop)
        behind = background if background.dim() == 1 else background[part]
        view.rgb[part] = rgb + (1 - opacity)[:, None] * behind
        view.depth[part] = depth
        view.opacity[part] = opacity
        hit = (opacity > EMPTY_OPACITY).nonzero()[:, 0]
        if normals and hit.numel():
            surface = start[hit] + (depth / opacity)[hit, None] * along[hit]
            view.normal[first + hit] = field_normals_reference(
                surface, *parameters, spec, epsilon=normal_epsilon, **options
            )[2]
    return view


def render(
    origins: Tensor,
    directions: Tensor,
    bits: Tensor,
    table: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: FieldSpec,
    *,
    resolution: int,
    background: Tensor,
    max_steps: int = 1024,
    dt_gamma: float = 0.0,
    min_near: float = 0.01,
    stop: float = 1e-3,
    normals: bool = True,
    normal_epsilon: float = 0.01,
    active_levels: int | Tensor | None = None,
    dtype: torch.dtype | None = None,
    chunk: int = 4096,
) -> View:
    """origins [R, 3], directions [R, 3] (unit), occupancy bits, field parameters -> View of R rays, without gradients.

    background [3] or [R, 3]. A ray ends where its transmittance falls below `stop`. `normals=False` leaves them 0.
    active_levels and dtype as in `field`. chunk: rays worked on together, which bounds the memory.
    Raises TypeError or ValueError for arguments of the wrong type, shape, dtype, device or range.
    """
    check_rays(
        origins,
        directions,
        bits,
        bound=spec.bound,
        resolution=resolution,
        max_steps=max_steps,
        dt_gamma=dt_gamma,
        min_near=min_near,
    )
    check_field(origins, table, weights, biases, spec, dtype=dtype)
    shape = (3,) if background.dim() == 1 else tuple(origins.shape)
    check_tensor("background", background, shape, dtypes=(origins.dtype,), like=("origins", origins))
    check_positive("normal_epsilon", normal_epsilon)
    check_positive("chunk", chunk)
    if not 0 <= stop < 1:
        raise ValueError(f"stop must be in [0, 1), got {stop}")
    return render_reference(
        origins,
        directions,
        bits,
        table,
        weights,
        biases,
        spec,
        resolution=resolution,
        background=background,
        max_steps=max_steps,
        dt_gamma=dt_gamma,
        min_near=min_near,
        stop=stop,
        normals=normals,
        normal_epsilon=normal_epsilon,
        active_levels=active_levels,
        dtype=dtype,
        chunk=chunk,
    )
