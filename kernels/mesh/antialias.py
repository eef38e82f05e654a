"""Edge antialiasing: blend neighbouring pixels on both sides of a silhouette by its position between them.

Of two neighbours (right or below) with different triangles the nearer triangle counts. From the centre of its pixel we
walk over the surface towards the other centre, from triangle to triangle, up to an edge with no triangle on its other
side, or one that folds back: the silhouette, at a distance d of that centre. If d <= 1 the edge lies x = d (the nearer
pixel is the first of the two) or x = 1 - d after the first centre, and with v = 1/2 - x

    v > 0: the first takes v of the second's colour,  v < 0: the second takes -v of the first's.

An edge counts between pixels in a row where it is steeper than 45 degrees on the screen, else in a column.
Gradients: into image, and through v into clip (x, y, w) of the edge's two vertices: what moves silhouettes.
Legend: B images, V vertices, T triangles, C channels, H x W pixels.
Numerics: as in `rasterize`; the contributions to a pixel are summed in one order. A walk ends after 16 triangles,
without an edge.
Source: Laine et al., Modular primitives for high-performance differentiable rendering, 2020, section 3.4. They
examine only the edges of the one triangle; at the rim of a smooth mesh, where triangles are seen from the side, few of
those are the silhouette.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dream_fast.kernels._core.checks import FLOATS, check_kernel_dtype, check_tensor
from dream_fast.kernels._core.launch import launch, use_triton
from dream_fast.kernels._core.operator import operator
from dream_fast.kernels._core.reference import gather_rows
from dream_fast.kernels.mesh import antialias_kernels
from dream_fast.kernels.mesh.device import (
    Fragments,
    add_at_corners,
    check_fragments,
    check_mesh,
    image_arguments,
    new_corner_sums,
)


@torch.no_grad()
def opposite_corners(faces: Tensor) -> Tensor:
    """faces int [T, 3] -> int64 [T, 3]: for each corner, the corner on the other side of its opposite edge, as 3 t + k.

    -1 where no triangle, or more than one, shares the edge.
    """
    corners = faces.long()
    ends = torch.stack([corners.roll(-1, 1), corners.roll(-2, 1)], -1).view(-1, 2)
    key, order = ((ends.amin(1) << 32) | ends.amax(1)).sort()
    same = (key[1:] == key[:-1]).to(torch.int8)
    before, after = F.pad(same, (1, 0)), F.pad(same, (0, 1))
    before, after = before[: len(key)], after[: len(key)]  # whether the entry before, or after, has the same edge
    first = (after == 1) & (before == 0) & (F.pad(after, (0, 1))[1:] == 0)
    second = F.pad(first, (1, 0))[:-1]
    number = torch.arange(len(key), device=key.device)
    partner = number + first.long() - second.long()
    opposite = torch.empty_like(order)
    opposite[order] = torch.where(first | second, order[partner], -1)
    return opposite.view(-1, 3)


class _ViewedVertex(NamedTuple):
    """Vertices as seen from pixels, [n] each: positions along and across the axis of a pair, times w."""

    along: Tensor
    across: Tensor
    w: Tensor

    def cross(self, other: _ViewedVertex) -> Tensor:
        """Cross product of the positions."""
        return self.along * other.across - other.along * self.across

    def where(self, condition: Tensor, other: _ViewedVertex) -> _ViewedVertex:
        """`torch.where` of every part."""
        return _ViewedVertex(*(torch.where(condition, a, b) for a, b in zip(self, other, strict=True)))

    def crosses(self, other: _ViewedVertex) -> Tensor:
        """Test whether the edge to another vertex crosses the axis."""
        return (self.across < 0) != (other.across < 0)

    def crossing(self, other: _ViewedVertex) -> Tensor:
        """Position at which the edge to another vertex crosses the axis; 0 where it does not."""
        slope = self.w * other.across - other.w * self.across
        there = self.crosses(other) & (slope != 0)
        return torch.where(there, self.cross(other) / torch.where(there, slope, 1), 0)

    def minus(self, other: _ViewedVertex) -> _ViewedVertex:
        """Difference from another vertex, times both w."""
        along, across = (mine * other.w - its * self.w for mine, its in zip(self[:2], other[:2], strict=True))
        return _ViewedVertex(along, across, self.w * other.w)

    def folds(self, b: _ViewedVertex, o: _ViewedVertex, direction: Tensor) -> Tensor:
        """Test whether the triangle on the other side of the edge to b, with corner o, has an area and folds back."""
        slope = self.w * b.across - b.w * self.across
        return self.minus(o).cross(b.minus(o)) * slope * direction > 0


def _view(clip: Tensor, rows: Tensor, pixel: Tensor, axis: int, height: int, width: int) -> _ViewedVertex:
    """View vertices, rows int64 [n] of clip [B * V, 4], from the centres of pixels int64 [n]."""
    x, y, _, w = gather_rows(clip, rows).unbind(1)
    x = x * (width / 2) - (pixel % width + (0.5 - width / 2)).to(x.dtype) * w
    y = y * (-height / 2) - (pixel // width % height + (0.5 - height / 2)).to(y.dtype) * w
    return _ViewedVertex(x, y, w) if axis == 0 else _ViewedVertex(y, x, w)


def _is_steep(clip: Tensor, row_a: Tensor, row_b: Tensor, height: int, width: int) -> Tensor:
    """Test whether edges are steeper than 45 degrees; from the vertices themselves, so the same from every pixel."""
    (xa, ya, _, wa), (xb, yb, _, wb) = (gather_rows(clip, row).unbind(1) for row in (row_a, row_b))
    return (xa * wb - xb * wa).abs() * (width / 2) <= (ya * wb - yb * wa).abs() * (height / 2)


class _Pairs(NamedTuple):
    """Pairs of neighbouring pixels with different triangles, [n] each."""

    owner: Tensor  # the pixel with the nearer triangle
    triangle: Tensor
    direction: Tensor  # of the other pixel along the axis, 1 or -1


@torch.no_grad()
def _walk(
    clip: Tensor, faces: Tensor, opposite: Tensor, pairs: _Pairs, axis: int, size: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk over the surface -> whether a silhouette lies within a pixel, bool [n], and the rows of its edge's ends."""
    (owner, triangle, direction), (height, width, vertices) = pairs, size
    base = owner // (height * width) * vertices
    flat, opposites = faces.reshape(-1).long(), opposite.reshape(-1)

    def view(row):
        return _view(clip, row, owner, axis, height, width)

    rows = [flat[triangle * 3 + k] + base for k in range(3)]
    ends = [view(row) for row in rows]
    distances = []
    for k in range(3):
        a, b = ends[(k + 1) % 3], ends[(k + 2) % 3]
        distances.append(torch.where(a.crosses(b), direction * a.crossing(b), -1e30))
    side = torch.stack(distances).argmax(0)

    def corner_at(shift):
        which = (side + shift) % 3
        row = torch.stack(rows).gather(0, which[None])[0]
        return row, _ViewedVertex(*(torch.stack(part).gather(0, which[None])[0] for part in zip(*ends, strict=True)))

    (row_a, a), (row_b, b), (row_c, _) = corner_at(1), corner_at(2), corner_at(0)  # c: the corner opposite to the edge
    corner = triangle * 3 + side
    distance = torch.stack(distances).amax(0)
    walking, is_silhouette = distance >= 0, torch.zeros_like(distance, dtype=torch.bool)
    for _ in range(antialias_kernels.MAX_STEPS):
        walking = walking & (distance <= 1)
        if not walking.any():
            break
        opposite_corner = opposites[corner]
        row_o = flat[opposite_corner.clamp(min=0)] + base
        o = view(row_o)
        edge = walking & ((opposite_corner < 0) | a.folds(b, o, direction))
        is_silhouette |= edge
        walking = walking & ~edge
        # On through the triangle (a, b, o), to the edge from o to the end on the other side of the axis.
        to_b = walking & o.crosses(b)
        to_a = walking & ~to_b
        row_c = torch.where(to_b, row_a, torch.where(to_a, row_b, row_c))
        row_a, a = torch.where(to_b, row_b, row_a), b.where(to_b, a)
        row_b, b = torch.where(walking, row_o, row_b), o.where(walking, b)
        start, side = opposite_corner // 3 * 3, opposite_corner % 3
        after = start + (side + 1) % 3
        is_after = flat[after.clamp(min=0)] + base == row_c
        corner = torch.where(walking, torch.where(is_after, after, start + (side + 2) % 3), corner)
        distance = torch.where(walking, direction * a.crossing(b), distance)
    is_silhouette &= _is_steep(clip, row_a, row_b, height, width) == (axis == 0)
    is_silhouette &= (a.w > 1e-8) & (b.w > 1e-8)
    return is_silhouette, row_a, row_b


def _reference_weights(clip: Tensor, faces: Tensor, fragments: Fragments, opposite: Tensor, axis: int) -> Tensor:
    """Return v [B, H, W] of each pixel and the next one to the right (axis 0) or below (axis 1)."""
    batch, height, width = fragments.triangle.shape
    pixels = torch.arange(batch * height * width, device=clip.device).view(batch, height, width)
    dim = 2 - axis
    length = pixels.shape[dim] - 1
    triangles, depths = fragments.triangle.view(-1).long(), fragments.depth.reshape(-1)
    first, second = pixels.narrow(dim, 0, length).reshape(-1), pixels.narrow(dim, 1, length).reshape(-1)
    apart = triangles[first] != triangles[second]
    first, second = first[apart], second[apart]
    nearer = (triangles[second] < 0) | ((triangles[first] >= 0) & (depths[first] <= depths[second]))
    owner, direction = torch.where(nearer, first, second), torch.where(nearer, 1, -1)
    rows, size = clip.reshape(-1, 4), (height, width, clip.shape[1])
    is_silhouette, row_a, row_b = _walk(rows, faces, opposite, _Pairs(owner, triangles[owner], direction), axis, size)
    owner, first, direction = owner[is_silhouette], first[is_silhouette], direction[is_silhouette]
    a, b = (_view(rows, row[is_silhouette], owner, axis, height, width) for row in (row_a, row_b))
    value = direction * (0.5 - direction * a.crossing(b))
    return clip.new_zeros(batch * height * width).index_put((first,), value).view(batch, height, width)


def antialias_reference(
    image: Tensor, clip: Tensor, faces: Tensor, fragments: Fragments, opposite: Tensor | None = None
) -> Tensor:
    """The definition of `antialias` in plain PyTorch, for any float dtype of image and fp32 or fp64 clip."""
    opposite = opposite_corners(faces) if opposite is None else opposite
    out = image
    for axis, dim in ((0, 2), (1, 1)):
        length = image.shape[dim] - 1
        weight = _reference_weights(clip, faces, fragments, opposite, axis)[..., None].narrow(dim, 0, length)
        change = image.narrow(dim, 1, length) - image.narrow(dim, 0, length)
        blank = torch.zeros_like(image.narrow(dim, 0, 1))
        # At v = 0, an edge halfway, the gradient is that of the first pixel's side; clamp would give both.
        to_first, to_second = (weight.where(side, 0) * change for side in (weight >= 0, weight < 0))
        out = out + torch.cat([to_first, blank], dim) + torch.cat([blank, to_second], dim)
    return out.to(image.dtype)


class AntialiasConfig(NamedTuple):
    """Channels and pixels of a block, warps."""

    group: int
    block: int
    num_warps: int


def _antialias_config(channels: int) -> AntialiasConfig:
    """Choose a pixel a lane, and up to 8 of its channels together."""
    group = 1
    while group < min(channels, 8):
        group *= 2
    return AntialiasConfig(group, block=128, num_warps=4)


@operator("dream_fast::antialias")
def _antialias(
    image: Tensor, clip: Tensor, faces: Tensor, opposite: Tensor, triangle: Tensor, depth: Tensor
) -> tuple[Tensor, Tensor]:
    channels, size, device = image.shape[-1], triangle.numel(), image.device
    config, pixels = _antialias_config(channels), image_arguments(*triangle.shape[1:])
    weights = torch.empty(size, 2, dtype=torch.float32, device=device)
    out = torch.empty(image.shape, dtype=image.dtype, device=device)
    launch(
        antialias_kernels.antialias_weights_fwd_kernel,
        (-(-size // config.block),),
        device,
        num_warps=config.num_warps,
        clip=clip.contiguous(),
        faces=faces.contiguous(),
        opposite=opposite.contiguous(),
        triangle=triangle.contiguous(),
        depth=depth.contiguous(),
        weights=weights,
        vertices=clip.shape[1],
        **pixels,
        all_pixels=size,
        BLOCK=config.block,
    )
    launch(
        antialias_kernels.antialias_blend_fwd_kernel,
        (-(-size // config.block), -(-channels // config.group)),
        device,
        num_warps=config.num_warps,
        image=image.contiguous(),
        weights=weights,
        out=out,
        width=pixels["width"],
        height=pixels["height"],
        all_pixels=size,
        CHANNELS=channels,
        GROUP=config.group,
        BLOCK=config.block,
    )
    return out, weights


@_antialias.register_fake
def _(image, clip, faces, opposite, triangle, depth):
    return image.new_empty(image.shape), image.new_empty(triangle.numel(), 2, dtype=torch.float32)


@operator("dream_fast::antialias_backward")
def _antialias_backward(
    grad_out: Tensor,
    image: Tensor,
    clip: Tensor,
    faces: Tensor,
    opposite: Tensor,
    triangle: Tensor,
    depth: Tensor,
    weights: Tensor,
    needs_clip: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    channels, size, device = image.shape[-1], triangle.numel(), image.device
    config, pixels = _antialias_config(channels), image_arguments(*triangle.shape[1:])
    grad_image = torch.empty(image.shape, dtype=image.dtype, device=device)
    grad_weights = torch.empty(size, 2, dtype=torch.float32, device=device)
    launch(
        antialias_kernels.antialias_blend_bwd_kernel,
        (-(-size // config.block),),
        device,
        num_warps=config.num_warps,
        grad_out=grad_out.contiguous(),
        image=image.contiguous(),
        weights=weights,
        grad_image=grad_image,
        grad_weights=grad_weights,
        width=pixels["width"],
        height=pixels["height"],
        all_pixels=size,
        CHANNELS=channels,
        GROUP=config.group,
        BLOCK=config.block,
    )
    if not needs_clip:
        return grad_image, grad_weights.new_empty(0, 4)
    sums = new_corner_sums(clip.shape[0] * clip.shape[1], size * 4, 4, device, deterministic)
    launch(
        antialias_kernels.antialias_weights_bwd_kernel,
        (-(-size // config.block),),
        device,
        num_warps=config.num_warps,
        grad_weights=grad_weights,
        clip=clip.contiguous(),
        faces=faces.contiguous(),
        opposite=opposite.contiguous(),
        triangle=triangle.contiguous(),
        depth=depth.contiguous(),
        weights=weights,
        **sums,
        vertices=clip.shape[1],
        **pixels,
        all_pixels=size,
        DETERMINISTIC=deterministic,
        BLOCK=config.block,
    )
    return grad_image, add_at_corners(**sums).view(clip.shape)


@_antialias_backward.register_fake
def _(grad_out, image, clip, faces, opposite, triangle, depth, weights, needs_clip, deterministic):
    return image.new_empty(image.shape), clip.new_empty(clip.shape if needs_clip else (0, 4), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 6
    needs_clip, deterministic = ctx.needs_input_grad[1], torch.are_deterministic_algorithms_enabled()
    grad_image, grad_clip = _antialias_backward(grad_out, *ctx.saved_tensors, needs_clip, deterministic)
    return grad_image, grad_clip if needs_clip else None, None, None, None, None


_antialias.register_autograd(_backward, setup_context=_setup_context)


def antialias(
    image: Tensor, clip: Tensor, faces: Tensor, fragments: Fragments, opposite: Tensor | None = None
) -> Tensor:
    """image [B, H, W, C] with `fragments` = rasterize(clip, faces, H, W) -> the image with antialiased silhouettes.

    opposite: `opposite_corners(faces)`, to compute it once for many images of one mesh.
    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype or device.
    """
    check_mesh(clip, faces)
    check_fragments(fragments, ("clip", clip))
    shape = (*fragments.triangle.shape, "C")
    check_tensor("image", image, shape, dtypes=FLOATS, like=("clip", clip))
    if opposite is None:
        opposite = opposite_corners(faces)
    check_tensor("opposite", opposite, tuple(faces.shape), dtypes=(torch.int64,), like=("clip", clip))
    if use_triton(clip):
        check_kernel_dtype("clip", clip)
        check_kernel_dtype("image", image)
        return _antialias(image, clip, faces, opposite, fragments.triangle, fragments.depth)[0]
    return antialias_reference(image, clip, faces, fragments, opposite)
