"""Occupancy grid: which cells of the scene hold density, one bit a cell, in nested cubes.

Cascade c covers [-h_c, h_c]^3 with h_c = min(2^c, bound) and has G^3 cells. Cell (i, j, k) of the axes (x, y, z) has
the linear index (i G + j) G + k; bit b of byte n is cell 8 n + b. A point belongs to the smallest cascade around it.
An update takes fresh densities: grid = max(decay * grid, fresh), and a cell is set when its density exceeds
min(mean of the grid, threshold).

Legend: C cascades, G resolution (cells a side, even). Units: world units; density per world unit.
Numerics: fp32, the kernels' mean in fp64 (so that the mean of equal densities is that density, and no cell exceeds it);
no gradients. The host never waits for the device.
Source: Mueller et al., Instant Neural Graphics Primitives, 2022, appendix E.2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import check_kernel_dtype, check_positive, check_tensor
from dream_fast.kernels._core.launch import jit, launch, tl, use_triton
from dream_fast.kernels._core.operator import operator


def cascades(bound: float) -> int:
    """Number of nested cubes for the scene [-bound, bound]^3: 1 + ceil(log2 bound), at least 1.

    Raises ValueError: unless bound > 0.
    """
    check_positive("bound", bound)
    return 1 + max(0, math.ceil(math.log2(bound)))


def half_sizes(bound: float) -> tuple[float, ...]:
    """Half the edge of each cascade's cube, smallest first."""
    return tuple(min(2.0**cascade, float(bound)) for cascade in range(cascades(bound)))


def _per_cascade(values: list[float], like: Tensor) -> Tensor:
    """A number for each cascade, with dtype and device of `like`; filled on the device, not copied from the host."""
    return torch.stack([like.new_full((), value) for value in values])


def check_resolution(resolution: int) -> None:
    """Raise ValueError unless the cells of a cascade fill whole bytes."""
    if resolution < 2 or resolution % 2:
        raise ValueError(f"resolution must be even and at least 2, got {resolution}")


def occupancy_points(
    resolution: int,
    cascades: int,
    bound: float,
    noise: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return one world position in every cell, in the order of the grid: [C * G^3, 3].

    noise [C * G^3, 3] in [0, 1) places each point inside its cell and sets dtype and device; without it they are the
    centres, in fp32 on `device`.
    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype or range.
    """
    check_resolution(resolution)
    sizes = half_sizes(bound)
    if cascades != len(sizes):
        raise ValueError(f"cascades must be {len(sizes)} for bound = {bound}, got {cascades}")
    cells = resolution**3
    if noise is not None:
        check_tensor("noise", noise, (cascades * cells, 3), dtypes=(torch.float32, torch.float64))
        dtype, device = noise.dtype, noise.device
    else:
        dtype = torch.float32
    axis = torch.arange(resolution, dtype=dtype, device=device)
    corners = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(1, cells, 3)
    unit = (corners + (0.5 if noise is None else noise.view(cascades, cells, 3))) * (2 / resolution) - 1
    return (unit * _per_cascade(list(sizes), unit)[:, None, None]).view(-1, 3)


@torch.no_grad()
def occupancy_update_reference(
    density: Tensor, fresh: Tensor, *, decay: float = 0.95, threshold: float = 10.0
) -> tuple[Tensor, Tensor]:
    """The definition of `occupancy_update` in plain PyTorch."""
    torch.maximum(density.mul_(decay), fresh, out=density)
    mean = density.mean()
    cells = (density > mean.clamp(max=threshold)).view(density.shape[0], -1, 8)
    bits = torch.zeros(cells.shape[:2], dtype=torch.uint8, device=density.device)
    for bit in range(8):
        bits |= cells[:, :, bit].to(torch.uint8) << bit
    return bits, mean


@jit
def occupancy_decay_kernel(
    density,  # [cells] fp32, changed in place
    fresh,  # [cells] fp32
    sums,  # [blocks] fp64
    cells,
    decay,
    BLOCK: tl.constexpr,
):
    """Set density = max(decay * density, fresh), and sum the new densities of each block."""
    block = tl.program_id(0).to(tl.int64)
    cell = block * BLOCK + tl.arange(0, BLOCK)
    here = cell < cells
    updated = tl.load(density + cell, mask=here, other=0.0) * decay
    updated = tl.maximum(updated, tl.load(fresh + cell, mask=here, other=0.0), propagate_nan=tl.PropagateNan.ALL)
    tl.store(density + cell, updated, mask=here)
    tl.store(sums + block, tl.sum(tl.where(here, updated, 0.0).to(tl.float64)))


@jit
def occupancy_threshold_kernel(
    density,  # [cells] fp32
    sums,  # [blocks] fp64
    bits,  # [cells / 8] uint8
    mean,  # [] fp32
    cells,
    blocks,
    threshold,
    BLOCKS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Set the bits of cells above min(mean, threshold). Every program adds up the sums of all blocks in one order."""
    total = tl.zeros([BLOCKS], tl.float64)
    first = 0
    while first < blocks:
        block = first + tl.arange(0, BLOCKS)
        total += tl.load(sums + block, mask=block < blocks, other=0.0)
        first += BLOCKS
    average = (tl.sum(total) / cells).to(tl.float32)
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        tl.store(mean, average)
    byte = program * BYTES + tl.arange(0, BYTES)
    here = byte < cells // 8
    bit = tl.arange(0, 8)
    values = tl.load(density + byte[:, None] * 8 + bit[None, :], mask=here[:, None], other=0.0)  # [BYTES, 8]
    above = values > tl.minimum(average, threshold, propagate_nan=tl.PropagateNan.ALL)
    tl.store(bits + byte, tl.sum(above.to(tl.int32) << bit[None, :], axis=1).to(tl.uint8), mask=here)


class OccupancyConfig(NamedTuple):
    """Cells a program updates, sums of blocks it adds up at a time, bytes it writes, warps."""

    block: int
    blocks: int
    bytes: int
    num_warps: int


def _occupancy_config() -> OccupancyConfig:
    # 4096 cells a program: 512 programs for one cascade of 128^3, about four on each multiprocessor, and few sums for
    # each program of the second kernel to add up.
    return OccupancyConfig(block=4096, blocks=1024, bytes=512, num_warps=4)


@operator("dream_fast::occupancy_update", mutates=("density",))
def _update(density: Tensor, fresh: Tensor, decay: float, threshold: float) -> tuple[Tensor, Tensor]:
    config = _occupancy_config()
    cells = density.numel()
    blocks = -(-cells // config.block)
    values = density.contiguous()
    sums = torch.empty(blocks, dtype=torch.float64, device=density.device)
    bits = torch.empty(density.shape[0], density.shape[1] // 8, dtype=torch.uint8, device=density.device)
    mean = torch.empty((), dtype=torch.float32, device=density.device)
    launch(
        occupancy_decay_kernel,
        (blocks,),
        density.device,
        num_warps=config.num_warps,
        density=values,
        fresh=fresh.contiguous(),
        sums=sums,
        cells=cells,
        decay=decay,
        BLOCK=config.block,
    )
    launch(
        occupancy_threshold_kernel,
        (max(1, -(-cells // (8 * config.bytes))),),  # the mean of no cells is NaN, as in the reference
        density.device,
        num_warps=config.num_warps,
        density=values,
        sums=sums,
        bits=bits,
        mean=mean,
        cells=cells,
        blocks=blocks,
        threshold=threshold,
        BLOCKS=config.blocks,
        BYTES=config.bytes,
    )
    if values is not density:
        density.copy_(values)
    return bits, mean


@_update.register_fake
def _(density: Tensor, fresh: Tensor, decay: float, threshold: float) -> tuple[Tensor, Tensor]:
    return density.new_empty(density.shape[0], density.shape[1] // 8, dtype=torch.uint8), density.new_empty(())


@torch.no_grad()
def occupancy_update(
    density: Tensor, fresh: Tensor, *, decay: float = 0.95, threshold: float = 10.0
) -> tuple[Tensor, Tensor]:
    """density [C, G^3] (changed in place), fresh [C, G^3] -> bits uint8 [C, G^3 / 8], mean of the grid (scalar).

    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype or device.
    """
    check_tensor("density", density, ("C", "G^3"), dtypes=(torch.float32, torch.float64))
    check_tensor("fresh", fresh, tuple(density.shape), dtypes=(density.dtype,), like=("density", density))
    if density.shape[1] % 8:
        raise ValueError(f"density must have a multiple of 8 cells a cascade, got {density.shape[1]}")
    if use_triton(density):
        check_kernel_dtype("density", density)
        return _update(density, fresh, decay, threshold)
    return occupancy_update_reference(density, fresh, decay=decay, threshold=threshold)


def cell_of(axes: tuple[Tensor, ...], bound: float, resolution: int) -> Tensor:
    """Return linear indices into [C, G^3] of points, given as three coordinates; outside, of the nearest cell."""
    sizes = half_sizes(bound)
    if len(sizes) == 1:
        factor = resolution / (2 * sizes[0])
        shift = resolution / 2
        index = [(axis * factor + shift).int().clamp_(0, resolution - 1) for axis in axes]
        return (index[0] * resolution + index[1]).mul_(resolution).add_(index[2])
    reach = torch.maximum(torch.maximum(axes[0].abs(), axes[1].abs()), axes[2].abs())
    cascade = torch.zeros_like(reach, dtype=torch.int64)
    for half in sizes[:-1]:
        cascade += reach > half
    scale = _per_cascade([resolution / (2 * half) for half in sizes], reach)[cascade]
    index = [(axis * scale + resolution / 2).long().clamp_(0, resolution - 1) for axis in axes]
    return ((cascade * resolution + index[0]) * resolution + index[1]) * resolution + index[2]


def occupied(bits: Tensor, cells: Tensor) -> Tensor:
    """bits uint8 [C, G^3 / 8], cells (any shape, linear indices) -> bool of that shape."""
    words = bits.view(-1).index_select(0, (cells >> 3).view(-1)).view(cells.shape)
    return (words >> (cells & 7).to(torch.uint8)) & 1 != 0


def occupancy_query(bits: Tensor, x: Tensor, bound: float, resolution: int) -> Tensor:
    """bits uint8 [C, G^3 / 8], x [N, 3] world -> bool [N]: whether a point's cell is set; False outside the scene.

    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype, device or range.
    """
    check_resolution(resolution)
    check_tensor("x", x, ("N", 3), dtypes=(torch.float32, torch.float64))
    check_tensor("bits", bits, (cascades(bound), resolution**3 // 8), dtypes=(torch.uint8,), like=("x", x))
    inside = (x.abs() <= bound).all(1)
    axes = torch.where(inside[:, None], x, 0).unbind(1)
    return occupied(bits, cell_of(axes, bound, resolution)) & inside
