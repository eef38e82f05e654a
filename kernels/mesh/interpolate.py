"""Interpolation: attributes of a mesh's vertices at the points that pixels see.

out = sum b_i a_i over the corners i of the triangle that the pixel sees, b its barycentrics; 0 where it sees none.
Gradients: into attributes and barycentrics (from there into vertex positions, see `rasterize`).
Legend: B images, V vertices, T triangles, C channels, H x W pixels.
Numerics: sums in fp32 (kernels), results in the attributes' dtype. The sums of the backward pass over the pixels of a
vertex are atomic, in any order, unless torch's deterministic algorithms are on.
Source: Laine et al., Modular primitives for high-performance differentiable rendering, 2020, section 3.3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import FLOATS, check_kernel_dtype, check_tensor
from dream_fast.kernels._core.launch import jit, launch, tl, use_triton
from dream_fast.kernels._core.operator import operator
from dream_fast.kernels._core.reference import gather_rows
from dream_fast.kernels.mesh.device import (
    INDICES,
    Fragments,
    add_at_corners,
    check_fragments,
    corner_rows,
    find_runs,
    new_corner_sums,
    run_sum,
)


def interpolate_reference(attributes: Tensor, faces: Tensor, fragments: Fragments) -> Tensor:
    """The definition of `interpolate` in plain PyTorch, for any float dtype."""
    shared, channels = attributes.dim() == 2, attributes.shape[-1]
    triangle = fragments.triangle.view(-1)
    (pixel,) = torch.nonzero(triangle >= 0, as_tuple=True)
    corner = faces.long()[triangle[pixel].long()]  # [n, 3]
    if not shared:
        image_pixels = fragments.triangle[0].numel() if len(fragments.triangle) else 1
        corner = corner + (pixel // image_pixels * attributes.shape[1])[:, None]
    weights = fragments.barycentrics.reshape(-1, 3)[pixel]
    table = attributes if shared else attributes.flatten(0, 1)
    values = gather_rows(table, corner.view(-1)).view(len(pixel), 3, channels)
    pixel_values = (weights[..., None] * values).sum(1).to(attributes.dtype)
    out = attributes.new_zeros(triangle.shape[0], channels).index_put((pixel,), pixel_values)
    return out.view(*fragments.triangle.shape, channels)


@jit
def _pixel_corners(triangle, faces, number, all_pixels, image_pixels, vertices):
    """Triangle that pixels see (-1: none), and the rows of the attributes at its corners."""
    covering = tl.load(triangle + number, mask=number < all_pixels, other=-1).to(tl.int64)
    i, j, k = corner_rows(faces, covering, number // image_pixels * vertices, covering >= 0)
    return covering, i, j, k


@jit
def interpolate_fwd_kernel(
    attributes,  # [V, CHANNELS], or [B V, CHANNELS], float
    faces,  # [T, 3] int
    triangle,  # [B, H, W] int32
    barycentrics,  # [B, H, W, 3] float
    out,  # [B, H, W, CHANNELS] as attributes
    vertices,
    all_pixels,
    image_pixels,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attributes of a block of pixels and a group of channels."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[None, :]
    covering, i, j, k = _pixel_corners(triangle, faces, number, all_pixels, image_pixels, vertices)
    is_covered = covering >= 0
    u = tl.load(barycentrics + number * 3, mask=is_covered, other=0.0).to(tl.float32)
    v = tl.load(barycentrics + number * 3 + 1, mask=is_covered, other=0.0).to(tl.float32)
    t = tl.load(barycentrics + number * 3 + 2, mask=is_covered, other=0.0).to(tl.float32)
    mask = is_covered[:, None] & (channel < CHANNELS)  # [BLOCK, GROUP]
    a = tl.load(attributes + i[:, None] * CHANNELS + channel, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(attributes + j[:, None] * CHANNELS + channel, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(attributes + k[:, None] * CHANNELS + channel, mask=mask, other=0.0).to(tl.float32)
    value = u[:, None] * a + v[:, None] * b + t[:, None] * c
    tl.store(
        out + number[:, None] * CHANNELS + channel, value, mask=(number < all_pixels)[:, None] & (channel < CHANNELS)
    )


@jit
def _add_to_vertex(
    grad, values, corners, row, entry, value, channel, mask, is_stored, CHANNELS, DETERMINISTIC: tl.constexpr
):
    """Add to a row of the attributes' gradient; or store the value, and its row, as an entry of a list."""
    if DETERMINISTIC:
        tl.store(values + entry[:, None] * CHANNELS + channel, value, mask=mask)
        tl.store(corners + entry, row, mask=is_stored)
    else:
        tl.atomic_add(grad + row[:, None] * CHANNELS + channel, value, mask=mask, sem="relaxed")


@jit
def interpolate_bwd_kernel(
    grad_out,  # [B, H, W, CHANNELS] float
    attributes,  # [V, CHANNELS], or [B V, CHANNELS], float
    faces,  # [T, 3] int
    triangle,  # [B, H, W] int32
    barycentrics,  # [B, H, W, 3] float
    grad,  # as attributes, fp32; or None
    values,  # [entries, CHANNELS] fp32, or None
    corners,  # [entries] int64, or None
    grad_barycentrics,  # as barycentrics, or None
    vertices,
    all_pixels,
    image_pixels,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of a block of pixels, one group of channels after the other."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    covering, i, j, k = _pixel_corners(triangle, faces, number, all_pixels, image_pixels, vertices)
    is_covered = covering >= 0
    first, last = find_runs(triangle, covering, number, all_pixels, image_pixels, BLOCK)
    u = tl.load(barycentrics + number * 3, mask=is_covered, other=0.0).to(tl.float32)
    v = tl.load(barycentrics + number * 3 + 1, mask=is_covered, other=0.0).to(tl.float32)
    t = tl.load(barycentrics + number * 3 + 2, mask=is_covered, other=0.0).to(tl.float32)
    grad_u = tl.zeros([BLOCK], tl.float32)
    grad_v, grad_t = grad_u, grad_u
    for start in tl.static_range(0, CHANNELS, GROUP):
        channel = start + tl.arange(0, GROUP)[None, :]
        mask = is_covered[:, None] & (channel < CHANNELS)
        upstream = tl.load(grad_out + number[:, None] * CHANNELS + channel, mask=mask, other=0.0).to(tl.float32)
        if grad_barycentrics is not None:
            a = tl.load(attributes + i[:, None] * CHANNELS + channel, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(attributes + j[:, None] * CHANNELS + channel, mask=mask, other=0.0).to(tl.float32)
            c = tl.load(attributes + k[:, None] * CHANNELS + channel, mask=mask, other=0.0).to(tl.float32)
            grad_u += tl.sum(upstream * a, axis=1)
            grad_v += tl.sum(upstream * b, axis=1)
            grad_t += tl.sum(upstream * c, axis=1)
        if grad is not None:
            entry, start_of_run = number * 3, first[:, None] & (channel >= 0)  # [BLOCK, GROUP], as the scan needs it
            sum_u = run_sum(upstream * u[:, None], start_of_run)
            sum_v = run_sum(upstream * v[:, None], start_of_run)
            sum_t = run_sum(upstream * t[:, None], start_of_run)
            is_run_end = is_covered & last
            mask = mask & is_run_end[:, None]
            _add_to_vertex(grad, values, corners, i, entry, sum_u, channel, mask, is_run_end, CHANNELS, DETERMINISTIC)
            _add_to_vertex(
                grad, values, corners, j, entry + 1, sum_v, channel, mask, is_run_end, CHANNELS, DETERMINISTIC
            )
            _add_to_vertex(
                grad, values, corners, k, entry + 2, sum_t, channel, mask, is_run_end, CHANNELS, DETERMINISTIC
            )
    if grad_barycentrics is not None:
        here = number < all_pixels
        tl.store(grad_barycentrics + number * 3, grad_u, mask=here)
        tl.store(grad_barycentrics + number * 3 + 1, grad_v, mask=here)
        tl.store(grad_barycentrics + number * 3 + 2, grad_t, mask=here)


class InterpolateConfig(NamedTuple):
    """Channels and pixels of a block, warps."""

    group: int
    block: int
    num_warps: int


def _interpolate_config(channels: int) -> InterpolateConfig:
    """Choose a pixel a lane, and up to 16 of its channels together."""
    group = 1
    while group < min(channels, 16):
        group *= 2
    return InterpolateConfig(group, block=128, num_warps=4)


@operator("dream_fast::interpolate")
def _interpolate(attributes: Tensor, faces: Tensor, triangle: Tensor, barycentrics: Tensor) -> Tensor:
    channels, size = attributes.shape[-1], triangle.numel()
    config = _interpolate_config(channels)
    out = attributes.new_empty(*triangle.shape, channels)
    launch(
        interpolate_fwd_kernel,
        (-(-size // config.block), -(-channels // config.group)),
        attributes.device,
        num_warps=config.num_warps,
        attributes=attributes.contiguous(),
        faces=faces.contiguous(),
        triangle=triangle.contiguous(),
        barycentrics=barycentrics.contiguous(),
        out=out,
        vertices=attributes.shape[1] if attributes.dim() == 3 else 0,
        all_pixels=size,
        image_pixels=triangle.shape[1] * triangle.shape[2],
        CHANNELS=channels,
        GROUP=config.group,
        BLOCK=config.block,
    )
    return out


@_interpolate.register_fake
def _(attributes, faces, triangle, barycentrics):
    return attributes.new_empty(*triangle.shape, attributes.shape[-1])


@operator("dream_fast::interpolate_backward")
def _interpolate_backward(
    grad_out: Tensor,
    attributes: Tensor,
    faces: Tensor,
    triangle: Tensor,
    barycentrics: Tensor,
    needs_attributes: bool,
    needs_barycentrics: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    channels, size, device = attributes.shape[-1], triangle.numel(), attributes.device
    config = _interpolate_config(channels)
    rows = attributes.numel() // max(1, channels)
    sums: dict[str, Any] = {"grad": None, "values": None, "corners": None}
    if needs_attributes:
        sums = new_corner_sums(rows, size * 3, channels, device, deterministic)
    grad_barycentrics = torch.empty_like(barycentrics, memory_format=torch.contiguous_format)
    launch(
        interpolate_bwd_kernel,
        (-(-size // config.block),),
        device,
        num_warps=config.num_warps,
        grad_out=grad_out.contiguous(),
        attributes=attributes.contiguous(),
        faces=faces.contiguous(),
        triangle=triangle.contiguous(),
        barycentrics=barycentrics.contiguous(),
        **sums,
        grad_barycentrics=grad_barycentrics if needs_barycentrics else None,
        vertices=attributes.shape[1] if attributes.dim() == 3 else 0,
        all_pixels=size,
        image_pixels=triangle.shape[1] * triangle.shape[2],
        CHANNELS=channels,
        GROUP=config.group,
        DETERMINISTIC=needs_attributes and deterministic,
        BLOCK=config.block,
    )
    none = attributes.new_empty(0)
    return (
        add_at_corners(**sums).to(attributes.dtype).view(attributes.shape) if needs_attributes else none,
        grad_barycentrics if needs_barycentrics else none.clone(),
    )


@_interpolate_backward.register_fake
def _(grad_out, attributes, faces, triangle, barycentrics, needs_attributes, needs_barycentrics, deterministic):
    return (
        attributes.new_empty(attributes.shape if needs_attributes else 0),
        barycentrics.new_empty(barycentrics.shape if needs_barycentrics else 0),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):
    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = _interpolate_backward(grad_out, *ctx.saved_tensors, *needed, deterministic)
    grad_attributes, grad_barycentrics = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return grad_attributes, None, None, grad_barycentrics


_interpolate.register_autograd(_backward, setup_context=_setup_context)


def interpolate(attributes: Tensor, faces: Tensor, fragments: Fragments) -> Tensor:
    """attributes [V, C], or [B, V, C] with one set an image, faces int [T, 3], fragments -> [B, H, W, C].

    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype or device.
    """
    shape = ("V", "C") if attributes.dim() == 2 else (fragments.triangle.shape[0], "V", "C")
    check_tensor("attributes", attributes, shape, dtypes=FLOATS)
    check_tensor("faces", faces, ("T", 3), dtypes=INDICES, like=("attributes", attributes))
    check_fragments(fragments, ("attributes", attributes))
    if use_triton(attributes):
        check_kernel_dtype("attributes", attributes)
        check_kernel_dtype("fragments.barycentrics", fragments.barycentrics)
        return _interpolate(attributes, faces, fragments.triangle, fragments.barycentrics)
    return interpolate_reference(attributes, faces, fragments)
