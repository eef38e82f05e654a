"""Ray marching through the occupancy grid: packed samples of ragged rays.

A ray o + t d is cut to the cube [-bound, bound]^3 and to t >= min_near, which gives near and far. From
t_0 = near + perturb * dt_0 it advances in a lattice t_{k+1} = t_k + dt_k with
dt_k = clamp(t_k dt_gamma, 2 sqrt(3) / max_steps, 2 sqrt(3) bound / resolution), where the upper limit wins. An interval
[t_k, t_k + dt_k] is a sample when its middle lies before far and in an occupied cell (of the smallest cascade that
holds it); a ray keeps its first max_steps samples.

The samples of ray r are the rows offsets[r]:offsets[r + 1] of buffers of a fixed capacity, near to far. What does not
fit is dropped, and `overflow` is set. Rows from `count` on are padding: zeros everywhere.

Legend: R rays, cap capacity. Units: world units. Gradients: positions = o + t d, with t held constant, into o and d.
Numerics: fp32 (fp64 when the rays are). The result's shape does not depend on the data. The kernels compute each
sample with the operations of the reference in its order, without fused multiply-adds, so that both agree on samples at
a cell's edge: they are equal bit for bit.
Source: Mueller et al., Instant Neural Graphics Primitives, 2022, appendix E.1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import check_kernel_dtype, check_positive, check_tensor
from dream_fast.kernels._core.launch import launch, use_triton
from dream_fast.kernels._core.operator import operator
from dream_fast.kernels._core.reference import gather_rows, pad_rows
from dream_fast.kernels.rays.march_kernels import (
    march_bwd_kernel,
    march_count_fwd_kernel,
    march_offsets_fwd_kernel,
    march_sums_fwd_kernel,
    march_write_fwd_kernel,
)
from dream_fast.kernels.rays.occupancy import cascades, cell_of, check_resolution, half_sizes, occupied

# Lattice points that the reference examines together: a few temporaries of this many numbers stay in the cache.
_BLOCK_POINTS = 1 << 17


class Samples(NamedTuple):
    """Packed samples of R rays in buffers of a fixed capacity."""

    positions: Tensor  # [cap, 3]
    ray_ids: Tensor  # [cap] int64
    t: Tensor  # [cap] middle of the interval
    dt: Tensor  # [cap] its length
    offsets: Tensor  # [R + 1] int64: first row of each ray
    count: Tensor  # type: ignore[assignment]  # [] int64: rows in use; in place of tuple.count
    overflow: Tensor  # [] bool: whether samples were dropped


def step_limits(bound: float, resolution: int, max_steps: int) -> tuple[float, float]:
    """Return the smallest and the largest step of the lattice, in world units."""
    largest = 2 * math.sqrt(3) * bound / resolution
    return min(2 * math.sqrt(3) / max_steps, largest), largest


def near_far(origins: Tensor, directions: Tensor, bound: float, min_near: float) -> tuple[Tensor, Tensor]:
    """origins, directions [R, 3] -> near, far [R]: t where rays enter and leave the cube; far < near if they miss."""
    # A direction along a face has a zero component: a tiny one avoids 0 / 0 and changes nothing else.
    safe = torch.where(directions.abs() < 1e-15, 1e-15, directions)
    low, high = (-bound - origins) / safe, (bound - origins) / safe
    return torch.minimum(low, high).amax(1).clamp(min=min_near), torch.maximum(low, high).amin(1)


def _lattice(near: Tensor, far: Tensor, perturb: Tensor | None, limits: tuple[float, float], dt_gamma: float):
    """Return middles and lengths of the lattice intervals of r rays: t [r, K], dt [r, K] (or [1, 1] when constant)."""
    longest = float((far - near).max().clamp(min=0)) if near.numel() else 0.0
    steps = math.ceil(longest / limits[0]) + 1
    if dt_gamma == 0:
        start = near if perturb is None else near + perturb * limits[0]
        middle = torch.arange(steps, dtype=near.dtype, device=near.device) * limits[0] + 0.5 * limits[0]
        return start[:, None] + middle, near.new_full((1, 1), limits[0])
    step = (near * dt_gamma).clamp(*limits)
    t = near if perturb is None else near + perturb * step
    middles, lengths = [], []
    for _ in range(steps):
        step = (t * dt_gamma).clamp(*limits)
        middles.append(t + 0.5 * step)
        lengths.append(step)
        t = t + step
    return torch.stack(middles, 1), torch.stack(lengths, 1)


@torch.no_grad()
def packed_intervals(
    origins: Tensor,
    directions: Tensor,
    bits: Tensor,
    *,
    bound: float,
    resolution: int,
    max_steps: int,
    dt_gamma: float,
    min_near: float,
    perturb: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return all samples, without a capacity: ray [M] int64, t [M], dt [M], samples a ray int64 [R]."""
    rays = origins.shape[0]
    limits = step_limits(bound, resolution, max_steps)
    near, far = near_far(origins, directions, bound, min_near)
    max_intervals = math.ceil(2 * math.sqrt(3) * bound / limits[0]) + 1
    size = max(1, _BLOCK_POINTS // max_intervals)
    intervals, counts = [], []
    for first in range(0, rays, size):
        block = slice(first, min(first + size, rays))
        t, dt = _lattice(near[block], far[block], None if perturb is None else perturb[block], limits, dt_gamma)
        axes = tuple(
            (origin[block, None] + t * direction[block, None]).clamp_(-bound, bound)
            for origin, direction in zip(origins.unbind(1), directions.unbind(1), strict=True)
        )
        is_sample = occupied(bits, cell_of(axes, bound, resolution)) & (t < far[block, None])
        if t.shape[1] > max_steps:
            is_sample &= is_sample.cumsum(1) <= max_steps
        ray, step = is_sample.nonzero(as_tuple=True)
        length = dt.expand_as(t)
        intervals.append((ray + first, t[ray, step], length[ray, step]))
        counts.append(is_sample.sum(1))
    if not intervals:
        empty = origins.new_zeros(0)
        return empty.long(), empty, empty, empty.long()
    ray, t, dt = (torch.cat(column) for column in zip(*intervals, strict=True))
    return ray, t, dt, torch.cat(counts)


def march_reference(
    origins: Tensor,
    directions: Tensor,
    bits: Tensor,
    *,
    bound: float,
    resolution: int,
    capacity: int,
    max_steps: int = 1024,
    dt_gamma: float = 0.0,
    min_near: float = 0.01,
    perturb: Tensor | None = None,
) -> Samples:
    """The definition of `march` in plain PyTorch. It reads sizes back from the device, which a kernel must not."""
    ray, t, dt, samples = packed_intervals(
        origins,
        directions,
        bits,
        bound=bound,
        resolution=resolution,
        max_steps=max_steps,
        dt_gamma=dt_gamma,
        min_near=min_near,
        perturb=perturb,
    )
    overflow = torch.tensor(ray.shape[0] > capacity, device=ray.device)
    ray, t, dt = ray[:capacity], t[:capacity], dt[:capacity]
    offsets = torch.cat([samples.new_zeros(1), samples.cumsum(0)]).clamp_(max=capacity)
    positions = gather_rows(origins, ray) + t[:, None] * gather_rows(directions, ray)
    return Samples(
        positions=pad_rows(positions, capacity),
        ray_ids=pad_rows(ray, capacity),
        t=pad_rows(t, capacity),
        dt=pad_rows(dt, capacity),
        offsets=offsets,
        count=offsets[-1].clone(),
        overflow=overflow,
    )


class MarchConfig(NamedTuple):
    """Tiles [rays, steps] of the passes, rows of padding a program fills, warps.

    A program of the scan has `scan_block` rays, and adds up the sums of earlier programs `scan_sums` at a time.
    """

    count_rays: int
    count_steps: int
    write_rays: int
    write_steps: int
    bwd_rays: int
    bwd_steps: int
    padding: int
    scan_block: int
    scan_sums: int
    scan_warps: int
    num_warps: int


def _march_config(rays: int, grows: bool) -> MarchConfig:
    # Lanes along a ray: neighbouring steps read the same bytes. Growing steps cost a sequential pass over the tile.
    steps = 32 if grows else 128
    return MarchConfig(
        count_rays=1,
        count_steps=steps,
        write_rays=1,
        write_steps=steps,
        bwd_rays=1,
        bwd_steps=64,
        padding=2048,
        # Up to 4096 rays one program adds up all counts, which saves a launch.
        scan_block=4096 if rays <= 4096 else 1024,
        scan_sums=1024,
        scan_warps=16 if rays <= 4096 else 4,
        # One warp a program, so that none waits for a longer ray.
        num_warps=1,
    )


def _scan_counts(counts: Tensor, capacity: int, config: MarchConfig) -> tuple[Tensor, Tensor, Tensor]:
    """counts int32 [R] -> offsets int64 [R + 1], count int64 [], overflow bool []."""
    rays, device = counts.shape[0], counts.device
    blocks = max(1, -(-rays // config.scan_block))
    sums = None
    if blocks > 1:
        sums = torch.empty(blocks, dtype=torch.int64, device=device)
        launch(
            march_sums_fwd_kernel,
            (blocks,),
            device,
            counts=counts,
            sums=sums,
            rays=rays,
            BLOCK=config.scan_block,
        )
    offsets = torch.empty(rays + 1, dtype=torch.int64, device=device)
    count = torch.empty((), dtype=torch.int64, device=device)
    overflow = torch.empty((), dtype=torch.bool, device=device)
    launch(
        march_offsets_fwd_kernel,
        (blocks,),
        device,
        counts=counts,
        sums=sums,
        offsets=offsets,
        count=count,
        overflow=overflow,
        rays=rays,
        capacity=capacity,
        num_warps=config.scan_warps,
        BLOCK=config.scan_block,
        BLOCKS=config.scan_sums,
    )
    return offsets, count, overflow


def _write_samples(
    marching: dict[str, Any], offsets: Tensor, capacity: int, config: MarchConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, ray_ids, t and dt of `Samples`; marching: the arguments that counting takes as well."""
    device = offsets.device
    positions = torch.empty(capacity, 3, dtype=torch.float32, device=device)
    ray_ids = torch.empty(capacity, dtype=torch.int64, device=device)
    t, dt = (torch.empty(capacity, dtype=torch.float32, device=device) for _ in range(2))
    ray_programs = -(-marching["rays"] // config.write_rays)
    launch(
        march_write_fwd_kernel,
        (ray_programs + -(-capacity // config.padding),),
        device,
        **marching,
        offsets=offsets,
        positions=positions,
        ray_ids=ray_ids,
        t_out=t,
        dt_out=dt,
        ray_programs=ray_programs,
        capacity=capacity,
        RAYS=config.write_rays,
        STEPS=config.write_steps,
        PADDING=config.padding,
    )
    return positions, ray_ids, t, dt


@operator("dream_fast::march")
def _march(
    origins: Tensor,
    directions: Tensor,
    bits: Tensor,
    perturb: Tensor | None,
    bound: float,
    resolution: int,
    capacity: int,
    max_steps: int,
    dt_gamma: float,
    min_near: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rays, device, grows = origins.shape[0], origins.device, dt_gamma != 0
    config = _march_config(rays, grows)
    shortest, longest = step_limits(bound, resolution, max_steps)
    counts, spans = (torch.empty(rays, dtype=torch.int32, device=device) for _ in range(2))
    marching: dict[str, Any] = {
        "origins": origins.contiguous(),
        "directions": directions.contiguous(),
        "bits": bits.contiguous(),
        "perturb": None if perturb is None else perturb.contiguous(),
        "counts": counts,
        "spans": spans,
        "first": torch.empty(rays, dtype=torch.float32 if grows else torch.int32, device=device),
        "rays": rays,
        "bound": bound,
        "min_near": min_near,
        "shortest": shortest,
        "longest": longest,
        "dt_gamma": dt_gamma,
        "outer_scale": resolution / (2 * half_sizes(bound)[-1]),
        "GROWS": grows,
        "CASCADES": cascades(bound),
        "RESOLUTION": resolution,
        "num_warps": config.num_warps,
        "fp_fusion": False,
    }
    launch(
        march_count_fwd_kernel,
        (-(-rays // config.count_rays),),
        device,
        **marching,
        max_steps=min(max_steps, 2**31 - 1),
        RAYS=config.count_rays,
        STEPS=config.count_steps,
    )
    offsets, count, overflow = _scan_counts(counts, capacity, config)
    return *_write_samples(marching, offsets, capacity, config), offsets, count, overflow


@_march.register_fake
def _(origins, directions, bits, perturb, bound, resolution, capacity, max_steps, dt_gamma, min_near):
    return (
        origins.new_empty(capacity, 3),
        origins.new_empty(capacity, dtype=torch.int64),
        origins.new_empty(capacity),
        origins.new_empty(capacity),
        origins.new_empty(origins.shape[0] + 1, dtype=torch.int64),
        origins.new_empty((), dtype=torch.int64),
        origins.new_empty((), dtype=torch.bool),
    )


@operator("dream_fast::march_backward")
def _march_backward(grad: Tensor, t: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rays = offsets.shape[0] - 1
    config = _march_config(rays, False)
    grad_origins, grad_directions = (torch.empty(rays, 3, dtype=grad.dtype, device=grad.device) for _ in range(2))
    launch(
        march_bwd_kernel,
        (-(-rays // config.bwd_rays),),
        grad.device,
        num_warps=config.num_warps,
        grad=grad.contiguous(),
        t=t,
        offsets=offsets,
        grad_origins=grad_origins,
        grad_directions=grad_directions,
        rays=rays,
        RAYS=config.bwd_rays,
        STEPS=config.bwd_steps,
    )
    return grad_origins, grad_directions


@_march_backward.register_fake
def _(grad, t, offsets):
    return tuple(grad.new_empty(offsets.shape[0] - 1, 3) for _ in range(2))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], output[4])


def _backward(ctx, grad, *_):
    # Only positions depend on the rays: the public function detaches t and dt.
    grads = (None, None) if grad is None else _march_backward(grad, *ctx.saved_tensors)
    return (*grads, *(None,) * 8)


_march.register_autograd(_backward, setup_context=_setup_context)


def check_rays(
    origins: Tensor,
    directions: Tensor,
    bits: Tensor,
    *,
    bound: float,
    resolution: int,
    max_steps: int,
    dt_gamma: float,
    min_near: float,
) -> None:
    """Check the arguments that marching and rendering share.

    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype, device or range.
    """
    check_tensor("origins", origins, ("R", 3), dtypes=(torch.float32, torch.float64))
    check_tensor("directions", directions, tuple(origins.shape), dtypes=(origins.dtype,), like=("origins", origins))
    check_resolution(resolution)
    check_tensor("bits", bits, (cascades(bound), resolution**3 // 8), dtypes=(torch.uint8,), like=("origins", origins))
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if not dt_gamma >= 0:
        raise ValueError(f"dt_gamma must be at least 0, got {dt_gamma}")
    if not min_near >= 0:
        raise ValueError(f"min_near must be at least 0, got {min_near}")
    check_positive("bound", bound)


def march(
    origins: Tensor,
    directions: Tensor,
    bits: Tensor,
    *,
    bound: float,
    resolution: int,
    capacity: int,
    max_steps: int = 1024,
    dt_gamma: float = 0.0,
    min_near: float = 0.01,
    perturb: Tensor | None = None,
) -> Samples:
    """origins [R, 3], directions [R, 3] (unit), bits uint8 [C, G^3 / 8] -> Samples with `capacity` rows.

    perturb [R] in [0, 1) shifts the lattice of each ray by a part of its first step; None does not shift. bound and
    min_near are in world units.
    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype, device or range.
    """
    check_rays(
        origins,
        directions,
        bits,
        bound=bound,
        resolution=resolution,
        max_steps=max_steps,
        dt_gamma=dt_gamma,
        min_near=min_near,
    )
    if capacity < 0:
        raise ValueError(f"capacity must be at least 0, got {capacity}")
    if perturb is not None:
        check_tensor("perturb", perturb, (origins.shape[0],), dtypes=(origins.dtype,), like=("origins", origins))
    if use_triton(origins):
        check_kernel_dtype("origins", origins)
        positions, ray_ids, t, dt, *sizes = _march(
            origins, directions, bits, perturb, bound, resolution, capacity, max_steps, dt_gamma, min_near
        )
        return Samples(positions, ray_ids, t.detach(), dt.detach(), *sizes)
    return march_reference(
        origins,
        directions,
        bits,
        bound=bound,
        resolution=resolution,
        capacity=capacity,
        max_steps=max_steps,
        dt_gamma=dt_gamma,
        min_near=min_near,
        perturb=perturb,
    )
