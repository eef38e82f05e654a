"""Rasterisation: which triangle each pixel sees, and where on it.

With (x_i, y_i) corner i of a triangle as seen from the pixel, times its w_i (`_raster`), u_0 = x_1 y_2 - x_2 y_1 and so
on cyclically, det = sum u_i w_i: the pixel's centre lies in the triangle, in front of the camera, where all u_i and det
have one sign. There b_i = u_i / sum u_j are the barycentrics in space (perspective-correct), and
z / w = sum u_i z_i / det.
Of the triangles with z / w in [-1, 1] the nearest counts, the first one of equally near ones. Both sides are seen.

Gradients: from barycentrics into clip (x, y, w). Which triangle a pixel sees has none here: `antialias` gives those of
the silhouettes.
Legend: B pictures, V vertices, T triangles (the same in all pictures), H x W pixels, row 0 on top.
Numerics: corners of an edge are taken in one order whatever the triangle, so that no pixel falls between two triangles
that share it. Kernels in fp32; an entry of the z-buffer is (depth, triangle) in 64 bits and its minimum is atomic, so
the result does not depend on the order. The backward's sums are atomic, in any order, unless torch's deterministic
algorithms are on.
Source: Laine et al., Modular primitives for high-performance differentiable rendering, 2020, sections 3.1 and 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import check_kernel_dtype, check_positive
from dream_fast.kernels._core.launch import constant, jit, launch, multiprocessors, tl, use_triton
from dream_fast.kernels._core.reference import gather_rows
from dream_fast.kernels.mesh.device import (
    Fragments,
    add_at_corners,
    add_corner,
    check_mesh,
    corner_rows,
    corner_sums,
    corners_seen,
    cross,
    from_pixel,
    load_corner,
    picture_numbers,
    run_sum,
    runs,
)

_EMPTY = constant(0x7FFFFFFFFFFFFFFF)
_LEAST_W = constant(1e-8)  # a triangle with a corner below has the whole picture as its box
_SLACK = constant(1e-2)  # pixels by which a box is wider: more than rounding
_PAIRS = 1 << 21  # of a triangle and a pixel that the reference looks at together


# The reference.


def _boxes(corners: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First column, first row, columns and rows of the pixels that triangles [n, 3, 4] may cover, int64 [n] each."""
    w = corners[..., 3]
    ahead, some = (w > 1e-8).all(1), (w > 0).any(1)
    x = (corners[..., 0] / w + 1) * (width / 2) - 0.5
    y = (1 - corners[..., 1] / w) * (height / 2) - 0.5
    found = []
    for at, size in ((x, width), (y, height)):
        at = at.nan_to_num(nan=-2.0)
        low = torch.where(ahead, (at.amin(1) - 1e-2).ceil().clamp(0, size), 0)
        high = torch.where(ahead, (at.amax(1) + 1e-2).floor().clamp(-1, size - 1), size - 1)
        found.append((low.long(), torch.where(some, (high - low + 1).clamp(min=0), 0).long()))
    (left, columns), (top, rows) = found
    return left, top, columns, rows


def _from_pixels(corners: Tensor, pixel: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """x and y [n, 3] of corners [n, 3, 4], times their w, as seen from the centres of pixels int64 [n]."""
    cx = (pixel % width + (0.5 - width / 2)).to(corners.dtype)[:, None]
    cy = (pixel // width % height + (0.5 - height / 2)).to(corners.dtype)[:, None]
    w = corners[..., 3]
    return corners[..., 0] * (width / 2) - cx * w, corners[..., 1] * (-height / 2) - cy * w


def _areas(x: Tensor, y: Tensor) -> Tensor:
    """u [n, 3], in one order of the corners of each edge."""
    (x0, x1, x2), (y0, y1, y2) = x.unbind(1), y.unbind(1)
    return torch.stack([x1 * y2 - x2 * y1, -(x0 * y2 - x2 * y0), x0 * y1 - x1 * y0], 1)


@torch.no_grad()
def _nearest(clip: Tensor, faces: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The nearest triangle int64 (-1: none) and its depth (1) of every pixel, [B * H * W] each."""
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
        nearest[depths < before] = triangles  # what was there is hidden now
        nearest.scatter_reduce_(0, pixel, torch.where(depth == depths[pixel], which, triangles), "amin")
    seen = nearest < triangles
    return torch.where(seen, nearest, -1), torch.where(seen, depths, 1)


def rasterize_reference(clip: Tensor, faces: Tensor, height: int, width: int) -> Fragments:
    """The definition of `rasterize` in plain PyTorch, for fp32 and fp64."""
    batch, vertices, _ = clip.shape
    nearest, depth = _nearest(clip, faces, height, width)
    (pixel,) = torch.nonzero(nearest >= 0, as_tuple=True)
    corner = faces.long()[nearest[pixel]] + (pixel // (height * width) * vertices)[:, None]
    corners = gather_rows(clip.reshape(-1, 4), corner.view(-1)).view(-1, 3, 4)
    u = _areas(*_from_pixels(corners, pixel, height, width))
    seen = u / u.sum(1, keepdim=True)
    barycentrics = clip.new_zeros(batch * height * width, 3).index_put((pixel,), seen)
    shape = (batch, height, width)
    return Fragments(nearest.to(torch.int32).view(shape), barycentrics.view(*shape, 3), depth.view(shape))


# Kernels.


@jit
def _ordered(bits):
    """The bits of fp32 numbers as int32 in the order of the numbers; applied again, the bits."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def _load_triangle(clip, faces, triangle, first, mask):
    """Corners in the order of their vertices, which is the same for all triangles of an edge."""
    a, b, c = corner_rows(faces, triangle, first, mask)
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    lowest, highest = tl.minimum(low, c), tl.maximum(high, c)
    middle = tl.maximum(low, tl.minimum(high, c))
    return (
        load_corner(clip, lowest, mask),
        load_corner(clip, middle, mask),
        load_corner(clip, highest, mask),
    )


@jit
def _span(p, q, r, ahead, some, half, size):
    """First and number of the pixels along an axis of a triangle with corners at p, q, r from the picture's middle."""
    low = tl.ceil(tl.minimum(tl.minimum(p, q), r) + (half - 0.5 - _SLACK))
    high = tl.floor(tl.maximum(tl.maximum(p, q), r) + (half - 0.5 + _SLACK))
    first = tl.minimum(tl.maximum(low, 0.0), size * 1.0).to(tl.int32)
    last = tl.minimum(tl.maximum(high, -1.0), size - 1.0).to(tl.int32)
    first = tl.where(ahead, first, 0)
    last = tl.where(ahead, last, size - 1)
    return first, tl.where(some, tl.maximum(last - first + 1, 0), 0)


@jit
def _box(a, b, c, mask, width, height, half_width, half_height):
    """First column, first row, columns and rows of the pixels that triangles may cover."""
    ahead = (a[3] > _LEAST_W) & (b[3] > _LEAST_W) & (c[3] > _LEAST_W)
    some = mask & ((a[3] > 0) | (b[3] > 0) | (c[3] > 0))
    aw, bw, cw = tl.where(ahead, a[3], 1.0), tl.where(ahead, b[3], 1.0), tl.where(ahead, c[3], 1.0)
    across, down = half_width, -half_height
    left, columns = _span(a[0] / aw * across, b[0] / bw * across, c[0] / cw * across, ahead, some, half_width, width)
    top, rows = _span(a[1] / aw * down, b[1] / bw * down, c[1] / cw * down, ahead, some, half_height, height)
    return left, top, columns, rows


@jit
def _visit(keys, base, column, row, mask, a, b, c, triangle, width, half_width, half_height):
    """Lower the entry of a pixel to that of a triangle which covers it."""
    cx = column.to(tl.float32) + (0.5 - half_width)
    cy = row.to(tl.float32) + (0.5 - half_height)
    p = from_pixel(a, cx, cy, half_width, half_height)
    q = from_pixel(b, cx, cy, half_width, half_height)
    r = from_pixel(c, cx, cy, half_width, half_height)
    u, v, t = cross(q, r), -cross(p, r), cross(p, q)
    det = u * a[3] + v * b[3] + t * c[3]
    depth = (u * a[2] + v * b[2] + t * c[2]) / tl.where(det == 0, 1.0, det)
    depth = tl.where(depth == 0, 0.0, depth)  # -0 would come first
    front = (u >= 0) & (v >= 0) & (t >= 0) & (det > 0)
    back = (u <= 0) & (v <= 0) & (t <= 0) & (det < 0)
    inside = mask & (front | back) & (depth >= -1) & (depth <= 1)
    key = (_ordered(depth.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | triangle
    pointer = keys + base + row.to(tl.int64) * width + column
    # Entries only fall, so what a plain load finds is never less than what is there now.
    before = tl.load(pointer, mask=inside, other=0)
    tl.atomic_min(pointer, key, mask=inside & (key < before), sem="relaxed")


@jit
def rasterize_small_fwd_kernel(
    clip,
    faces,
    keys,
    queue,
    counts,
    vertices,
    triangles,
    entries,
    width,
    height,
    half_width,
    half_height,
    blocks,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
    LARGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """A triangle a lane, its pixels one after the other. Those with more than SMALL pixels go into the queue: at its
    front, or at its end those of more than LARGE tiles."""
    program = tl.program_id(0).to(tl.int64)
    picture = program // blocks
    triangle = program % blocks * BLOCK + tl.arange(0, BLOCK)
    here = triangle < triangles
    a, b, c = _load_triangle(clip, faces, triangle, picture * vertices, here)
    left, top, columns, rows = _box(a, b, c, here, width, height, half_width, half_height)
    pixels = columns * rows
    tiles = ((columns + TILE - 1) // TILE) * ((rows + TILE - 1) // TILE)
    entry = picture * triangles + triangle
    wanted = ((pixels > SMALL) & (tiles <= LARGE)).to(tl.int32)
    slot = tl.atomic_add(counts, tl.sum(wanted), sem="relaxed") + tl.cumsum(wanted) - wanted
    tl.store(queue + slot, entry, mask=wanted > 0)
    wanted = ((pixels > SMALL) & (tiles > LARGE)).to(tl.int32)
    slot = tl.atomic_add(counts + 1, tl.sum(wanted), sem="relaxed") + tl.cumsum(wanted) - wanted
    tl.store(queue + (entries - 1 - slot), entry, mask=wanted > 0)
    pixels = tl.where(pixels > SMALL, 0, pixels)
    base = picture * height * width
    across = tl.maximum(columns, 1)
    most = tl.max(pixels)
    number = 0
    while number < most:
        column, row = left + number % across, top + number // across
        _visit(keys, base, column, row, number < pixels, a, b, c, triangle, width, half_width, half_height)
        number += 1


@jit
def rasterize_tiles_fwd_kernel(
    clip,
    faces,
    keys,
    queue,
    counts,
    vertices,
    triangles,
    entries,
    width,
    height,
    half_width,
    half_height,
    programs,
    all_programs,
    TILE: tl.constexpr,
):
    """The queue: the first `programs` take a triangle of its front each, the others together those of its end."""
    program = tl.program_id(0)
    large = program >= programs
    count = tl.load(counts + large.to(tl.int32))
    item = tl.where(large, 0, program)
    next_item = tl.where(large, 1, programs)
    first_tile = tl.where(large, program - programs, 0)
    next_tile = tl.where(large, all_programs - programs, 1)
    lane = tl.arange(0, TILE * TILE)
    while item < count:
        entry = tl.load(queue + tl.where(large, entries - 1 - item, item.to(tl.int64)))
        picture, triangle = entry // triangles, entry % triangles
        a, b, c = _load_triangle(clip, faces, triangle, picture * vertices, True)
        left, top, columns, rows = _box(a, b, c, True, width, height, half_width, half_height)
        across = (columns + TILE - 1) // TILE
        tiles = across * ((rows + TILE - 1) // TILE)
        base = picture * height * width
        tile = first_tile
        while tile < tiles:
            column = tile % across * TILE + lane % TILE
            row = tile // across * TILE + lane // TILE
            mask = (column < columns) & (row < rows)
            _visit(keys, base, left + column, top + row, mask, a, b, c, triangle, width, half_width, half_height)
            tile += next_tile
        item += next_item


@jit
def rasterize_resolve_fwd_kernel(
    clip,
    faces,
    keys,
    triangle,
    barycentrics,
    depth,
    vertices,
    width,
    height,
    half_width,
    half_height,
    all_pixels,
    BLOCK: tl.constexpr,
):
    """The z-buffer into fragments, a pixel a lane."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = number < all_pixels
    key = tl.load(keys + number, mask=here, other=_EMPTY)
    seen = key != _EMPTY
    found = tl.where(seen, key & 0xFFFFFFFF, -1).to(tl.int32)
    _, _, _, p, q, r, _, _ = corners_seen(
        clip, faces, found, seen, number, vertices, width, height, half_width, half_height
    )
    u, v, t = cross(q, r), cross(r, p), cross(p, q)
    area = u + v + t
    inverse = 1 / tl.where(area == 0, 1.0, area)
    tl.store(triangle + number, found, mask=here)
    tl.store(barycentrics + number * 3, tl.where(seen, u * inverse, 0.0), mask=here)
    tl.store(barycentrics + number * 3 + 1, tl.where(seen, v * inverse, 0.0), mask=here)
    tl.store(barycentrics + number * 3 + 2, tl.where(seen, t * inverse, 0.0), mask=here)
    bits = _ordered((key >> 32).to(tl.int32))
    tl.store(depth + number, tl.where(seen, bits.to(tl.float32, bitcast=True), 1.0), mask=here)


@jit
def rasterize_bwd_kernel(
    grad_barycentrics,
    clip,
    faces,
    triangle,
    grad,
    values,
    corners,
    vertices,
    width,
    height,
    half_width,
    half_height,
    all_pixels,
    TO_CORNERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the gradient of barycentrics to that of the corners, a pixel a lane."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(triangle + number, mask=number < all_pixels, other=-1)
    seen = found >= 0
    i, j, k, p, q, r, cx, cy = corners_seen(
        clip, faces, found, seen, number, vertices, width, height, half_width, half_height
    )
    u, v, t = cross(q, r), cross(r, p), cross(p, q)
    area = u + v + t
    inverse = 1 / tl.where(area == 0, 1.0, area)
    gu = tl.load(grad_barycentrics + number * 3, mask=seen, other=0.0)
    gv = tl.load(grad_barycentrics + number * 3 + 1, mask=seen, other=0.0)
    gt = tl.load(grad_barycentrics + number * 3 + 2, mask=seen, other=0.0)
    mean = (gu * u + gv * v + gt * t) * inverse
    gu, gv, gt = (gu - mean) * inverse, (gv - mean) * inverse, (gt - mean) * inverse
    # u = q x r, v = r x p, t = p x q.
    px, py = gt * q[1] - gv * r[1], gv * r[0] - gt * q[0]
    qx, qy = gu * r[1] - gt * p[1], gt * p[0] - gu * r[0]
    rx, ry = gv * p[1] - gu * q[1], gu * q[0] - gv * p[0]
    # x = X - cx w, with X = x W / 2 and Y = -y H / 2.
    at = number * 3
    pw, qw, rw = -cx * px - cy * py, -cx * qx - cy * qy, -cx * rx - cy * ry
    first, last = runs(triangle, found, number, all_pixels, width * height, BLOCK)
    px, py, pw = run_sum(px, first) * half_width, run_sum(py, first) * -half_height, run_sum(pw, first)
    qx, qy, qw = run_sum(qx, first) * half_width, run_sum(qy, first) * -half_height, run_sum(qw, first)
    rx, ry, rw = run_sum(rx, first) * half_width, run_sum(ry, first) * -half_height, run_sum(rw, first)
    add_corner(grad, values, corners, i, at, px, py, pw, seen & last, TO_CORNERS)
    add_corner(grad, values, corners, j, at + 1, qx, qy, qw, seen & last, TO_CORNERS)
    add_corner(grad, values, corners, k, at + 2, rx, ry, rw, seen & last, TO_CORNERS)


def _raster_config(device: torch.device) -> dict[str, int]:
    """Who takes a triangle: a lane, a program, or all of them."""
    return {
        # One warp: its lanes wait for the one with most pixels, and for nobody else's.
        "BLOCK": 32,
        "SMALL": 64,  # pixels of a box that one lane goes through
        "TILE": 16,
        "LARGE": 256,  # tiles of a box that one program goes through
        "PROGRAMS": 16 * multiprocessors(device),  # for triangles of more than SMALL pixels; as many for the large ones
        "PIXELS": 256,  # a program of the passes over pixels
    }


@torch.library.custom_op("dream_fast::rasterize", mutates_args=())
def _rasterize(clip: Tensor, faces: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    (batch, vertices, _), triangles, device = clip.shape, faces.shape[0], clip.device
    config = _raster_config(device)
    size, entries = batch * height * width, batch * triangles
    clip, faces = clip.contiguous(), faces.contiguous()
    keys = torch.full((size,), 0x7FFFFFFFFFFFFFFF, dtype=torch.int64, device=device)
    queue = torch.empty(entries, dtype=torch.int64, device=device)
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    common = {"clip": clip, "faces": faces, "keys": keys, "vertices": vertices, **picture_numbers(height, width)}
    queued = {"queue": queue, "counts": counts, "triangles": triangles, "entries": entries, "TILE": config["TILE"]}
    blocks = -(-triangles // config["BLOCK"])
    launch(
        rasterize_small_fwd_kernel,
        (batch * blocks,),
        device,
        num_warps=1,
        **common,
        **queued,
        blocks=blocks,
        BLOCK=config["BLOCK"],
        SMALL=config["SMALL"],
        LARGE=config["LARGE"],
    )
    launch(
        rasterize_tiles_fwd_kernel,
        (2 * config["PROGRAMS"] if entries else 0,),
        device,
        num_warps=4,
        **common,
        **queued,
        programs=config["PROGRAMS"],
        all_programs=2 * config["PROGRAMS"],
    )
    triangle = torch.empty(batch, height, width, dtype=torch.int32, device=device)
    barycentrics = torch.empty(batch, height, width, 3, dtype=torch.float32, device=device)
    depth = torch.empty(batch, height, width, dtype=torch.float32, device=device)
    launch(
        rasterize_resolve_fwd_kernel,
        (-(-size // config["PIXELS"]),),
        device,
        num_warps=4,
        **common,
        triangle=triangle,
        barycentrics=barycentrics,
        depth=depth,
        all_pixels=size,
        BLOCK=config["PIXELS"],
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


@torch.library.custom_op("dream_fast::rasterize_backward", mutates_args=())
def _rasterize_backward(
    grad_barycentrics: Tensor, clip: Tensor, faces: Tensor, triangle: Tensor, deterministic: bool
) -> Tensor:
    (batch, vertices, _), device = clip.shape, clip.device
    _, height, width = triangle.shape
    config = _raster_config(device)
    size = triangle.numel()
    sums = corner_sums(batch * vertices, size * 3, 4, device, deterministic)
    launch(
        rasterize_bwd_kernel,
        (-(-size // config["PIXELS"]),),
        device,
        num_warps=4,
        grad_barycentrics=grad_barycentrics.contiguous(),
        clip=clip.contiguous(),
        faces=faces.contiguous(),
        triangle=triangle,
        **sums,
        vertices=vertices,
        **picture_numbers(height, width),
        all_pixels=size,
        TO_CORNERS=deterministic,
        BLOCK=config["PIXELS"],
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
    """clip [B, V, 4] (x, y, z, w; y up), faces int32 or int64 [T, 3] -> Fragments of pictures of height x width.

    A pixel's centre at (row, column) lies at x / w = (2 column + 1) / W - 1, y / w = 1 - (2 row + 1) / H. `faces` hold
    numbers below V, which is not checked on a GPU.
    Raises TypeError or ValueError for arguments of the wrong type, shape, dtype or device.
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
