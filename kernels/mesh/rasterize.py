"""Rasterisation: the triangle that each pixel sees, and the point on it.

With (x_i, y_i) corner i of a triangle as seen from the pixel, times its w_i (`mesh/device.py`), u_0 = x_1 y_2 - x_2 y_1
and so on cyclically, det = sum u_i w_i: the pixel's centre lies in the triangle, in front of the camera, where all u_i
and det have one sign. There b_i = u_i / sum u_j are the barycentrics in space (perspective-correct), and
z / w = sum u_i z_i / det.
A pixel sees the nearest of the triangles with z / w in [-1, 1], of equally near ones the first, from both sides.

Gradients: from barycentrics into clip (x, y, w). The choice of the triangle has none here; `antialias` has those of
silhouettes.
Legend: B images, V vertices, T triangles (the same in all images), H x W pixels, row 0 on top.
Numerics: the corners of an edge are taken in one order whatever the triangle, so that no pixel falls between two
triangles that share it. Kernels in fp32; the minimum of an entry of the z-buffer is atomic, so the result does not
depend on the order. The sums of the backward pass are atomic, in any order, unless torch's deterministic algorithms are
on.
Source: Laine et al., Modular primitives for high-performance differentiable rendering, 2020, sections 3.1 and 3.2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import check_kernel_dtype, check_positive
from dream_fast.kernels._core.launch import launch, multiprocessors, use_triton
from dream_fast.kernels._core.operator import operator
from dream_fast.kernels._core.reference import gather_rows
from dream_fast.kernels.mesh.device import Fragments, add_at_corners, check_mesh, image_arguments, new_corner_sums
from dream_fast.kernels.mesh.rasterize_kernels import (
    rasterize_bwd_kernel,
    rasterize_resolve_fwd_kernel,
    rasterize_small_fwd_kernel,
    rasterize_tiles_fwd_kernel,
)

# Pairs of a triangle and a pixel that the reference examines together.
_PAIRS = 1 << 21


def _boxes(corners: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """corners [n, 3, 4] -> first column, first row, columns and rows of the pixels they may cover, int64 [n] each."""
    w = corners[..., 3]
    in_front, any_in_front = (w > 1e-8).all(1), (w > 0).any(1)
    x = (corners[..., 0] / w + 1) * (width / 2) - 0.5
    y = (1 - corners[..., 1] / w) * (height / 2) - 0.5
    spans = []
    for position, size in ((x, width), (y, height)):
        position = position.nan_to_num(nan=-2.0)
        low = torch.where(in_front, (position.amin(1) - 1e-2).ceil().clamp(0, size), 0)
        high = torch.where(in_front, (position.amax(1) + 1e-2).floor().clamp(-1, size - 1), size - 1)
        spans.append((low.long(), torch.where(any_in_front, (high - low + 1).clamp(min=0), 0).long()))
    (left, columns), (top, rows) = spans
    return left, top, columns, rows


def _from_pixels(corners: Tensor, pixel: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return x and y [n, 3] of corners [n, 3, 4], times their w, as seen from the centres of pixels int64 [n]."""
    cx = (pixel % width + (0.5 - width / 2)).to(corners.dtype)[:, None]
    cy = (pixel // width % height + (0.5 - height / 2)).to(corners.dtype)[:, None]
    w = corners[..., 3]
    return corners[..., 0] * (width / 2) - cx * w, corners[..., 1] * (-height / 2) - cy * w


def _areas(x: Tensor, y: Tensor) -> Tensor:
    """Return u [n, 3], with the corners of each edge in one order."""
    (x0, x1, x2), (y0, y1, y2) = x.unbind(1), y.unbind(1)
    return torch.stack([x1 * y2 - x2 * y1, -(x0 * y2 - x2 * y0), x0 * y1 - x1 * y0], 1)


@torch.no_grad()
def _nearest(clip: Tensor, faces: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the nearest triangle int64 (-1: none) and its depth (none: 1) of every pixel, [B * H * W] each."""
    batch, vertices, _ = clip.shape
    triangles, size = faces.shape[0], batch * height * width
    depths, nearest = clip.new_full((size,), float("inf")), torch.full((size,), triangles, device=clip.device)
    # One order of the vertices of an edge, whichever triangle it belongs to.
    order = faces.long().sort(dim=1).values
    order = (order + vertices * torch.arange(batch, device=clip.device)[:, None, None]).view(-1, 3)
    corners = clip.reshape(-1, 4)[order]  # [B * T, 3, 4]
    left, top, columns, rows = _boxes(corners, height, width)
    ends = (columns * rows).cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, _PAIRS):
        pair = torch.arange(start, min(start + _PAIRS, total), device=clip.device)
        which = torch.searchsorted(ends, pair, right=True)
        number = pair - ends[which] + (columns * rows)[which]
        column, row = left[which] + number % columns[which], top[which] + number // columns[which]
        pixel = (which // triangles * height + row) * width + column
        corner = corners[which]
        u = _areas(*_from_pixels(corner, pixel, height, width))
        det = (u * corner[..., 3]).sum(1)
        depth = (u * corner[..., 2]).sum(1) / det
        inside = ((u >= 0).all(1) & (det > 0)) | ((u <= 0).all(1) & (det < 0))
        inside &= (depth >= -1) & (depth <= 1)
        pixel, depth, which = pixel[inside], depth[inside], which[inside] % triangles
        before = depths.clone()
        depths.scatter_reduce_(0, pixel, depth, "amin")
        nearest[depths < before] = triangles  # hidden now
        nearest.scatter_reduce_(0, pixel, torch.where(depth == depths[pixel], which, triangles), "amin")
    is_covered = nearest < triangles
    return torch.where(is_covered, nearest, -1), torch.where(is_covered, depths, 1)


def rasterize_reference(clip: Tensor, faces: Tensor, height: int, width: int) -> Fragments:
    """The definition of `rasterize` in plain PyTorch, for fp32 and fp64."""
    batch, vertices, _ = clip.shape
    nearest, depth = _nearest(clip, faces, height, width)
    (pixel,) = torch.nonzero(nearest >= 0, as_tuple=True)
    corner = faces.long()[nearest[pixel]] + (pixel // (height * width) * vertices)[:, None]
    corners = gather_rows(clip.reshape(-1, 4), corner.view(-1)).view(-1, 3, 4)
    u = _areas(*_from_pixels(corners, pixel, height, width))
    weights = u / u.sum(1, keepdim=True)
    barycentrics = clip.new_zeros(batch * height * width, 3).index_put((pixel,), weights)
    shape = (batch, height, width)
    return Fragments(nearest.to(torch.int32).view(shape), barycentrics.view(*shape, 3), depth.view(shape))


class RasterizeConfig(NamedTuple):
    """Triangles a program takes, and the sizes up to which a lane, a program or all of them take one."""

    block: int
    small: int
    tile: int
    large: int
    programs: int
    pixels: int


def _rasterize_config(device: torch.device) -> RasterizeConfig:
    return RasterizeConfig(
        block=32,  # one warp: its lanes wait for the largest of their own triangles only
        small=64,  # pixels of a box that one lane goes through
        tile=16,
        large=256,  # tiles of a box that one program goes through
        programs=16 * multiprocessors(device),  # for triangles of more than `small` pixels; as many for the large ones
        pixels=256,  # a program of the passes over pixels
    )


@operator("dream_fast::rasterize")
def _rasterize(clip: Tensor, faces: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    (batch, vertices, _), triangles, device = clip.shape, faces.shape[0], clip.device
    config = _rasterize_config(device)
    size, entries = batch * height * width, batch * triangles
    clip, faces = clip.contiguous(), faces.contiguous()
    keys = torch.full((size,), 0x7FFFFFFFFFFFFFFF, dtype=torch.int64, device=device)
    queue = torch.empty(entries, dtype=torch.int64, device=device)
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    common: dict[str, Any] = {
        "clip": clip,
        "faces": faces,
        "keys": keys,
        "vertices": vertices,
        **image_arguments(height, width),
    }
    queued: dict[str, Any] = {
        "queue": queue,
        "counts": counts,
        "triangles": triangles,
        "entries": entries,
        "TILE": config.tile,
    }
    blocks = -(-triangles // config.block)
    launch(
        rasterize_small_fwd_kernel,
        (batch * blocks,),
        device,
        num_warps=1,
        **common,
        **queued,
        blocks=blocks,
        BLOCK=config.block,
        SMALL=config.small,
        LARGE=config.large,
    )
    launch(
        rasterize_tiles_fwd_kernel,
        (2 * config.programs if entries else 0,),
        device,
        num_warps=4,
        **common,
        **queued,
        programs=config.programs,
        all_programs=2 * config.programs,
    )
    triangle = torch.empty(batch, height, width, dtype=torch.int32, device=device)
    barycentrics = torch.empty(batch, height, width, 3, dtype=torch.float32, device=device)
    depth = torch.empty(batch, height, width, dtype=torch.float32, device=device)
    launch(
        rasterize_resolve_fwd_kernel,
        (-(-size // config.pixels),),
        device,
        num_warps=4,
        **common,
        triangle=triangle,
        barycentrics=barycentrics,
        depth=depth,
        all_pixels=size,
        BLOCK=config.pixels,
    )
    return triangle, barycentrics, depth


@_rasterize.register_fake
def _(clip, faces, height, width):
    shape = (clip.shape[0], height, width)
    return (
        clip.new_empty(shape, dtype=torch.int32),
        clip.new_empty((*shape, 3), dtype=torch.float32),
        clip.new_empty(shape, dtype=torch.float32),
    )


@operator("dream_fast::rasterize_backward")
def _rasterize_backward(
    grad_barycentrics: Tensor, clip: Tensor, faces: Tensor, triangle: Tensor, deterministic: bool
) -> Tensor:
    (batch, vertices, _), device = clip.shape, clip.device
    _, height, width = triangle.shape
    config = _rasterize_config(device)
    size = triangle.numel()
    sums = new_corner_sums(batch * vertices, size * 3, 4, device, deterministic)
    launch(
        rasterize_bwd_kernel,
        (-(-size // config.pixels),),
        device,
        num_warps=4,
        grad_barycentrics=grad_barycentrics.contiguous(),
        clip=clip.contiguous(),
        faces=faces.contiguous(),
        triangle=triangle,
        **sums,
        vertices=vertices,
        **image_arguments(height, width),
        all_pixels=size,
        DETERMINISTIC=deterministic,
        BLOCK=config.pixels,
    )
    return add_at_corners(**sums).view(batch, vertices, 4)


@_rasterize_backward.register_fake
def _(grad_barycentrics, clip, faces, triangle, deterministic):
    return clip.new_empty(clip.shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[0])


def _backward(ctx, _, grad_barycentrics, __):
    if grad_barycentrics is None:
        return (None,) * 4
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _rasterize_backward(grad_barycentrics, *ctx.saved_tensors, deterministic), None, None, None


_rasterize.register_autograd(_backward, setup_context=_setup_context)


def rasterize(clip: Tensor, faces: Tensor, height: int, width: int) -> Fragments:
    """clip [B, V, 4] (x, y, z, w; y up), faces int32 or int64 [T, 3] -> Fragments of B images of height x width pixels.

    A pixel's centre at (row, column) lies at x / w = (2 column + 1) / W - 1, y / w = 1 - (2 row + 1) / H. `faces` hold
    numbers below V, which is not checked on a GPU.
    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype or device.
    """
    check_mesh(clip, faces)
    check_positive("height", height)
    check_positive("width", width)
    if use_triton(clip):
        check_kernel_dtype("clip", clip)
        triangle, barycentrics, depth = _rasterize(clip, faces, height, width)
    else:
        triangle, barycentrics, depth = rasterize_reference(clip, faces, height, width)
    return Fragments(triangle, barycentrics, depth.detach())
