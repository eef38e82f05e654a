"""Rendering for looking: any number of rays without gradients, in bounded memory; opaque rays stop costing.

The same samples, field and compositing as in training, a few samples of each ray at a time: rays whose transmittance
fell below `stop`, and rays without samples left, drop out of the next round. The normal is the field's, by finite
differences, at the expected depth o + d depth / opacity.

Legend: R rays. Units: world units. Numerics: fp32 (fp64 when the rays are). No gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dream_fast.kernels._core.checks import check_kernel_dtype, check_positive, check_tensor
from dream_fast.kernels._core.launch import launch, use_triton
from dream_fast.kernels.fields.encode import (
    BLOCK,
    aligned_rows,
    field_shape,
    flatten_parameters,
    level_words,
    tile_warps,
    unfused_reason,
    unit_scale,
)
from dream_fast.kernels.fields.field import field, field_reference
from dream_fast.kernels.fields.normals import field_normals, field_normals_reference
from dream_fast.kernels.fields.spec import FieldSpec, check_field, decode_field_spec, encode_field_spec
from dream_fast.kernels.rays.composite import composite
from dream_fast.kernels.rays.march import check_rays, march, packed_intervals, step_limits
from dream_fast.kernels.rays.occupancy import cascades, half_sizes
from dream_fast.kernels.rays.render_kernels import (
    EMPTY_OPACITY,
    render_enter_kernel,
    render_normals_kernel,
    render_shade_kernel,
)

# Samples that fields without a fused kernel work on together, at most.
_UNFUSED_SAMPLES = 1 << 20
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
        # Not total - tau, which loses all digits in a wall.
        before = transmittance[live, None] * torch.exp(-F.pad(total[:, :-1], (1, 0)))
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


def _enter_config() -> dict[str, int]:
    """Rays of a queue, intervals looked up together, warps: one ray a thread, eight loads in flight each."""
    return {"SEGMENT": 256, "PROBES": 8, "num_warps": 8}


def _shade_config(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Lanes, intervals looked up together, intervals a lane may walk between two samples, warps.

    Mostly the next interval is a sample. A field costs about
    as much as 100 intervals, so a lane in empty space may hold up the others for 16. Left alone, ptxas takes 148
    registers; with 96 there are five programs a multiprocessor for three, and a frame takes 3.40 for 3.98 ms (H100).
    """
    limit = {"maxnreg": 96} if width == 64 and dtype != torch.float32 else {}
    return {**_normals_config(dtype), **limit, "PROBES": 2, "WALK": 16}


def _normals_config(dtype: torch.dtype) -> dict[str, int]:
    """Lanes and warps, as for shading."""
    return {"BLOCK": BLOCK, "num_warps": tile_warps(dtype)}


@torch.library.custom_op("dream_fast::render", mutates_args=())
def _render(
    origins: Tensor,
    directions: Tensor,
    bits: Tensor,
    entries: Tensor,
    packed: Tensor,
    active: Tensor | None,
    levels: int,
    background: Tensor,
    width: int,
    layers: int,
    spec_numbers: list[float],
    resolution: int,
    max_steps: int,
    dt_gamma: float,
    min_near: float,
    stop: float,
    normals: bool,
    normal_epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """entries and packed: table and parameters (all weights, then all biases) in the compute dtype."""
    spec, rays, device = decode_field_spec(spec_numbers), origins.shape[0], origins.device
    rgb, normal = origins.new_empty(rays, 3), origins.new_empty(rays, 3)
    depth, opacity = origins.new_empty(rays), origins.new_empty(rays)
    enter = _enter_config()
    segments = -(-rays // enter["SEGMENT"])
    queue = torch.empty(segments * enter["SEGMENT"], dtype=torch.int32, device=device)
    cursors = torch.empty(segments * enter["SEGMENT"], dtype=torch.float32, device=device)
    lengths = torch.empty(segments, dtype=torch.int32, device=device)
    shortest, longest = step_limits(spec.bound, resolution, max_steps)
    rays_in = {"origins": origins.contiguous(), "directions": directions.contiguous()}
    queued = {"queue": queue, "lengths": lengths, "depth": depth, "opacity": opacity}
    marching = {
        "bits": bits.contiguous(),
        "background": background.contiguous(),
        "rgb": rgb,
        "cursors": cursors,
        "bound": spec.bound,
        "min_near": min_near,
        "last_scale": resolution / (2 * half_sizes(spec.bound)[-1]),
        "shortest": shortest,
        "longest": longest,
        "dt_gamma": dt_gamma,
        "PER_RAY": background.dim() == 2,
        "GROWS": dt_gamma > 0,
        "RESOLUTION": resolution,
        "CASCADES": cascades(spec.bound),
    }
    fields = {
        "table": aligned_rows(entries),
        "levels": level_words(spec.grid, device, levels),
        "active": active,
        "parameters": packed,
        "scale": unit_scale(spec.bound),
        "blob_density": spec.blob_density,
        "blob_radius": spec.blob_radius,
        "SEGMENT": enter["SEGMENT"],
        "SOFTPLUS": spec.density_activation == "softplus",
        "SHAPE": field_shape(spec.grid, width, layers),
    }
    launch(render_enter_kernel, (segments,), device, normal=normal, rays=rays, **rays_in, **queued, **marching, **enter)
    launch(
        render_shade_kernel,
        (segments,),
        device,
        stop=stop,
        max_steps=max_steps,
        **rays_in,
        **queued,
        **marching,
        **fields,
        **_shade_config(width, entries.dtype),
    )
    if normals:
        config = _normals_config(entries.dtype)
        launch(
            render_normals_kernel,
            (segments * (enter["SEGMENT"] // config["BLOCK"]),),
            device,
            normal=normal,
            bound=spec.bound,
            epsilon=normal_epsilon,
            **rays_in,
            **queued,
            **fields,
            **config,
        )
    return rgb, normal, depth, opacity


@_render.register_fake
def _(origins, *_arguments, **_options):
    rays = origins.shape[0]
    return origins.new_empty(rays, 3), origins.new_empty(rays, 3), origins.new_empty(rays), origins.new_empty(rays)


def _render_unfused(
    origins: Tensor,
    directions: Tensor,
    bits: Tensor,
    parameters: tuple,
    spec: FieldSpec,
    background: Tensor,
    marching: dict,
    stop: float,
    normals: bool,
    normal_epsilon: float,
    options: dict,
    chunk: int,
) -> View:
    """From the operators one by one, for fields without a fused kernel; every chunk has room for all its samples."""
    shortest, _ = step_limits(spec.bound, marching["resolution"], marching["max_steps"])
    most = min(marching["max_steps"], math.ceil(2 * math.sqrt(3) * spec.bound / shortest) + 1)
    chunk = max(1, min(chunk, _UNFUSED_SAMPLES // most))
    parts = []
    for first in range(0, origins.shape[0], chunk):
        start, along = origins[first : first + chunk], directions[first : first + chunk]
        samples = march(start, along, bits, bound=spec.bound, capacity=start.shape[0] * most, **marching)
        sigma, albedo = field(samples.positions, *parameters, spec, count=samples.count, **options)
        values, opacity, depth, _ = composite(
            sigma, albedo, samples.t, samples.dt, samples.offsets, count=samples.count, stop=stop
        )
        behind = background if background.dim() == 1 else background[first : first + chunk]
        rgb = values + (1 - opacity)[:, None] * behind
        normal = torch.zeros_like(start)
        if normals:
            hit = (opacity > EMPTY_OPACITY)[:, None]
            surface = start + (depth / opacity)[:, None] * along
            surface = torch.where(hit, surface, 0)
            found = field_normals(surface, *parameters, spec, epsilon=normal_epsilon, **options)[2]
            normal = torch.where(hit, found, 0)
        parts.append((rgb, normal, depth, opacity))
    if not parts:
        return View(*(origins.new_empty(shape) for shape in ((0, 3), (0, 3), (0,), (0,))))
    return View(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
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
    active_levels and dtype as in `field`. chunk: rays worked on together, which bounds the memory; a GPU renders all at
    once with 8 bytes a ray besides the result, and only fields that run unfused (`field_plan`) look at it.
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
    if use_triton(origins):
        dtype = table.dtype if dtype is None else dtype
        check_kernel_dtype("origins", origins)
        check_kernel_dtype("table", table)
        if dtype == torch.float64:
            raise TypeError("dtype is float64, which the kernels do not compute in: call the operator's reference")
        if unfused_reason(spec.grid, weights, dtype):
            return _render_unfused(
                origins,
                directions,
                bits,
                (table, weights, biases),
                spec,
                background,
                {"resolution": resolution, "max_steps": max_steps, "dt_gamma": dt_gamma, "min_near": min_near},
                stop,
                normals,
                normal_epsilon,
                {"active_levels": active_levels, "dtype": dtype},
                chunk,
            )
        active = active_levels if isinstance(active_levels, Tensor) else None
        levels = spec.grid.levels if active_levels is None or active is not None else int(active_levels)
        return View(
            *_render(
                origins,
                directions,
                bits,
                table.to(dtype),
                flatten_parameters(weights, biases).to(dtype),
                active,
                levels,
                background,
                weights[0].shape[0],
                len(weights) - 1,
                encode_field_spec(spec),
                resolution,
                max_steps,
                float(dt_gamma),
                float(min_near),
                float(stop),
                normals,
                float(normal_epsilon),
            )
        )
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
