"""Inference rendering: any number of rays without gradients, in bounded memory. A ray costs nothing once it is opaque.

Samples, field and compositing are those of training, a few samples of each ray at a time: rays whose transmittance
fell below `stop`, and rays without samples left, drop out of the next round. The normal is that of the field, by finite
differences, at the expected depth o + d depth / opacity.

Legend: R rays. Units: world units. Numerics: fp32 (fp64 when the rays are). No gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dream_fast.kernels._core.checks import check_compute_dtype, check_kernel_dtype, check_positive, check_tensor
from dream_fast.kernels._core.launch import launch, use_triton
from dream_fast.kernels._core.operator import operator
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

# Samples that fields without a fused kernel evaluate together, at most.
_UNFUSED_SAMPLES = 1 << 20
# Samples of a ray in a round: more waste work behind surfaces, fewer make many small rounds.
_ROUND = 8


class View(NamedTuple):
    """Rendered rays."""

    rgb: Tensor  # [R, 3] over the background
    normal: Tensor  # [R, 3] unit, or 0 where the ray is empty
    depth: Tensor  # [R] sum of w t
    opacity: Tensor  # [R]


class _Scene(NamedTuple):
    """The occupancy and the field of a scene, as the public functions take them."""

    bits: Tensor
    table: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    spec: FieldSpec
    active_levels: int | Tensor | None
    dtype: torch.dtype | None

    def evaluate(self, function: Callable, positions: Tensor, **options: Any) -> Any:
        """Call `function` (`field`, `field_normals` or a reference of them) at positions [N, 3]."""
        parameters = (self.table, self.weights, self.biases, self.spec)
        return function(positions, *parameters, active_levels=self.active_levels, dtype=self.dtype, **options)


class _Marching(NamedTuple):
    """Arguments of `march` that do not depend on the rays."""

    resolution: int
    max_steps: int
    dt_gamma: float
    min_near: float


class _Output(NamedTuple):
    """Settings of compositing: background [3] or [R, 3]; normal_epsilon None leaves out the normals."""

    background: Tensor
    stop: float
    normal_epsilon: float | None

    def over_background(self, rgb: Tensor, opacity: Tensor, rays: slice) -> Tensor:
        """rgb [r, 3] of some rays, in front of the background."""
        background = self.background if self.background.dim() == 1 else self.background[rays]
        return rgb + (1 - opacity)[:, None] * background


def _render_rays(origins: Tensor, directions: Tensor, scene: _Scene, marching: _Marching, stop: float):
    """Render r rays -> premultiplied albedo [r, 3], depth [r], opacity [r]."""
    rays = origins.shape[0]
    _, t, dt, samples = packed_intervals(
        origins, directions, scene.bits, bound=scene.spec.bound, perturb=None, **marching._asdict()
    )
    ends = samples.cumsum(0)
    cursor = ends - samples
    sums = origins.new_zeros(rays, 5)
    transmittance = origins.new_ones(rays)
    steps = torch.arange(_ROUND, device=origins.device)
    live = samples.nonzero()[:, 0]
    while live.numel():
        rows = cursor[live, None] + steps
        is_sample = rows < ends[live, None]
        rows, ray = rows[is_sample], live[:, None].expand_as(is_sample)[is_sample]
        positions = origins[ray] + t[rows, None] * directions[ray]
        sigma, albedo = scene.evaluate(field_reference, positions)
        tau = origins.new_zeros(is_sample.shape).masked_scatter_(is_sample, sigma * dt[rows])
        columns = origins.new_zeros(*is_sample.shape, 5)
        columns[is_sample] = torch.cat([albedo, t[rows, None], torch.ones_like(t[rows, None])], 1)
        tau_sum = tau.cumsum(1)
        # Not tau_sum - tau, which loses all digits in a wall.
        before = transmittance[live, None] * torch.exp(-F.pad(tau_sum[:, :-1], (1, 0)))
        weights = torch.where(before >= stop, -torch.expm1(-tau) * before, 0)
        sums[live] += (weights[..., None] * columns).sum(1)
        transmittance[live] *= torch.exp(-tau_sum[:, -1])
        cursor[live] += _ROUND
        live = live[(transmittance[live] >= stop) & (cursor[live] < ends[live])]
    return sums[:, :3], sums[:, 3], sums[:, 4]


def _render_chunks(
    origins: Tensor, directions: Tensor, scene: _Scene, marching: _Marching, output: _Output, chunk: int
) -> View:
    """`render_reference`, its arguments in tuples."""
    view = View(
        rgb=torch.empty_like(origins),
        normal=torch.zeros_like(origins),
        depth=torch.empty_like(origins[:, 0]),
        opacity=torch.empty_like(origins[:, 0]),
    )
    for first in range(0, origins.shape[0], chunk):
        rays = slice(first, first + chunk)
        o, d = origins[rays], directions[rays]
        rgb, depth, opacity = _render_rays(o, d, scene, marching, output.stop)
        view.rgb[rays] = output.over_background(rgb, opacity, rays)
        view.depth[rays] = depth
        view.opacity[rays] = opacity
        hit = (opacity > EMPTY_OPACITY).nonzero()[:, 0]
        if output.normal_epsilon is not None and hit.numel():
            surface = o[hit] + (depth / opacity)[hit, None] * d[hit]
            normals = scene.evaluate(field_normals_reference, surface, epsilon=output.normal_epsilon)[2]
            view.normal[first + hit] = normals
    return view


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
    scene = _Scene(bits, table, weights, biases, spec, active_levels, dtype)
    marching = _Marching(resolution, max_steps, dt_gamma, min_near)
    output = _Output(background, stop, normal_epsilon if normals else None)
    return _render_chunks(origins, directions, scene, marching, output, chunk)


class RenderConfig(NamedTuple):
    """Rays of a queue, and lanes, warps and intervals examined together in each kernel."""

    segment: int
    enter_probes: int
    enter_warps: int
    block: int
    num_warps: int
    shade_probes: int
    walk: int
    shade_registers: int | None


def _render_config(width: int, dtype: torch.dtype) -> RenderConfig:
    return RenderConfig(
        # One ray a lane, eight loads of each in flight.
        segment=256,
        enter_probes=8,
        enter_warps=8,
        block=BLOCK,
        num_warps=tile_warps(dtype),
        # Mostly the next interval is a sample. A field costs about as much as 100 intervals, so a lane in empty space
        # may hold up the others for 16.
        shade_probes=2,
        walk=16,
        # Without a limit ptxas takes 148 registers. With 96, five programs instead of three fit on a multiprocessor,
        # and a frame takes 3.40 ms instead of 3.98 (H100).
        shade_registers=96 if width == 64 and dtype != torch.float32 else None,
    )


@operator("dream_fast::render")
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
    config = _render_config(width, entries.dtype)
    rgb, normal = origins.new_empty(rays, 3), origins.new_empty(rays, 3)
    depth, opacity = origins.new_empty(rays), origins.new_empty(rays)
    segments, limits = -(-rays // config.segment), step_limits(spec.bound, resolution, max_steps)
    queued: dict[str, Any] = {
        "origins": origins.contiguous(),
        "directions": directions.contiguous(),
        "queue": torch.empty(segments * config.segment, dtype=torch.int32, device=device),
        "lengths": torch.empty(segments, dtype=torch.int32, device=device),
        "depth": depth,
        "opacity": opacity,
        "SEGMENT": config.segment,
    }
    marching: dict[str, Any] = {
        "bits": bits.contiguous(),
        "background": background.contiguous(),
        "rgb": rgb,
        "cursors": torch.empty(segments * config.segment, dtype=torch.float32, device=device),
        "PER_RAY": background.dim() == 2,
        "min_near": min_near,
        "lattice": (spec.bound, resolution / (2 * half_sizes(spec.bound)[-1]), *limits, dt_gamma),
        "GROWS": dt_gamma > 0,
        "RESOLUTION": resolution,
        "CASCADES": cascades(spec.bound),
    }
    fields: dict[str, Any] = {
        "table": aligned_rows(entries),
        "levels": level_words(spec.grid, device, levels),
        "active": active,
        "parameters": packed,
        "scene": (unit_scale(spec.bound), spec.blob_density, spec.blob_radius),
        "BLOCK": config.block,
        "SOFTPLUS": spec.density_activation == "softplus",
        "SHAPE": field_shape(spec.grid, width, layers),
    }
    launch(
        render_enter_kernel,
        (segments,),
        device,
        num_warps=config.enter_warps,
        **queued,
        **marching,
        normal=normal,
        rays=rays,
        PROBES=config.enter_probes,
    )
    launch(
        render_shade_kernel,
        (segments,),
        device,
        num_warps=config.num_warps,
        maxnreg=config.shade_registers,
        **queued,
        **marching,
        **fields,
        stop=stop,
        max_steps=max_steps,
        PROBES=config.shade_probes,
        WALK=config.walk,
    )
    if normals:
        launch(
            render_normals_kernel,
            (segments * (config.segment // config.block),),
            device,
            num_warps=config.num_warps,
            **queued,
            **fields,
            normal=normal,
            bound=spec.bound,
            epsilon=normal_epsilon,
        )
    return rgb, normal, depth, opacity


@_render.register_fake
def _(origins, *_arguments, **_options):
    rays = origins.shape[0]
    return origins.new_empty(rays, 3), origins.new_empty(rays, 3), origins.new_empty(rays), origins.new_empty(rays)


def _render_fused(origins: Tensor, directions: Tensor, scene: _Scene, marching: _Marching, output: _Output) -> View:
    """Render with the fused kernels; `scene.dtype` is set."""
    levels = scene.active_levels
    active = levels if isinstance(levels, Tensor) else None
    return View(
        *_render(
            origins,
            directions,
            scene.bits,
            scene.table.to(scene.dtype),
            flatten_parameters(scene.weights, scene.biases).to(scene.dtype),
            active,
            scene.spec.grid.levels if levels is None or active is not None else int(levels),
            output.background,
            scene.weights[0].shape[0],
            len(scene.weights) - 1,
            encode_field_spec(scene.spec),
            marching.resolution,
            marching.max_steps,
            float(marching.dt_gamma),
            float(marching.min_near),
            float(output.stop),
            output.normal_epsilon is not None,
            float(output.normal_epsilon or 0.0),
        )
    )


def _render_unfused(
    origins: Tensor, directions: Tensor, scene: _Scene, marching: _Marching, output: _Output, chunk: int
) -> View:
    """Render with one operator after the other, for fields without a fused kernel; a chunk has room for all samples."""
    bound = scene.spec.bound
    shortest, _ = step_limits(bound, marching.resolution, marching.max_steps)
    samples_a_ray = min(marching.max_steps, math.ceil(2 * math.sqrt(3) * bound / shortest) + 1)
    chunk = max(1, min(chunk, _UNFUSED_SAMPLES // samples_a_ray))
    views = []
    for first in range(0, origins.shape[0], chunk):
        rays = slice(first, first + chunk)
        o, d = origins[rays], directions[rays]
        samples = march(o, d, scene.bits, bound=bound, capacity=o.shape[0] * samples_a_ray, **marching._asdict())
        sigma, albedo = scene.evaluate(field, samples.positions, count=samples.count)
        rgb, opacity, depth, _ = composite(
            sigma, albedo, samples.t, samples.dt, samples.offsets, count=samples.count, stop=output.stop
        )
        normal = torch.zeros_like(o)
        if output.normal_epsilon is not None:
            hit = (opacity > EMPTY_OPACITY)[:, None]
            surface = torch.where(hit, o + (depth / opacity)[:, None] * d, 0)
            normal = torch.where(hit, scene.evaluate(field_normals, surface, epsilon=output.normal_epsilon)[2], 0)
        views.append((output.over_background(rgb, opacity, rays), normal, depth, opacity))
    if not views:
        return View(*(origins.new_empty(shape) for shape in ((0, 3), (0, 3), (0,), (0,))))
    return View(*(torch.cat(column) for column in zip(*views, strict=True)))


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
    active_levels and dtype as in `field`. chunk: rays rendered together, which bounds the memory. A GPU renders all at
    once with 8 bytes a ray besides the result, and uses `chunk` only for fields that run unfused (`field_plan`).
    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype, device or range.
    """
    marching = _Marching(resolution, max_steps, dt_gamma, min_near)
    check_rays(origins, directions, bits, bound=spec.bound, **marching._asdict())
    check_field(origins, table, weights, biases, spec, dtype=dtype)
    shape = (3,) if background.dim() == 1 else tuple(origins.shape)
    check_tensor("background", background, shape, dtypes=(origins.dtype,), like=("origins", origins))
    check_positive("normal_epsilon", normal_epsilon)
    check_positive("chunk", chunk)
    if not 0 <= stop < 1:
        raise ValueError(f"stop must be in [0, 1), got {stop}")
    scene = _Scene(bits, table, weights, biases, spec, active_levels, dtype)
    output = _Output(background, stop, normal_epsilon if normals else None)
    if not use_triton(origins):
        return _render_chunks(origins, directions, scene, marching, output, chunk)
    check_kernel_dtype("origins", origins)
    check_kernel_dtype("table", table)
    compute_dtype = table.dtype if dtype is None else dtype
    check_compute_dtype(compute_dtype)
    scene = scene._replace(dtype=compute_dtype)
    if unfused_reason(spec.grid, weights, compute_dtype):
        return _render_unfused(origins, directions, scene, marching, output, chunk)
    return _render_fused(origins, directions, scene, marching, output)
