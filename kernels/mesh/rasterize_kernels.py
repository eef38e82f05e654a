"""Kernels of `rasterize`: triangles into the z-buffer, the z-buffer into fragments, and the gradient of the corners.

An entry of the z-buffer is (depth, triangle) in 64 bits, so that its minimum is the nearest triangle.
Legend: see `rasterize`. Triangles with few pixels take a lane each; the others are queued, and take a program or, the
largest, all programs together.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.mesh.device import (
    add_corner,
    corner_rows,
    cross,
    find_runs,
    from_pixel,
    load_corner,
    project_corners,
    run_sum,
)

_EMPTY = constant(0x7FFFFFFFFFFFFFFF)
_MIN_W = constant(1e-8)  # a triangle with a corner below has the whole image as its box
_SLACK = constant(1e-2)  # pixels by which a box is wider: more than rounding


@jit
def _ordered(bits):
    """Map the bits of fp32 numbers to int32 in the order of the numbers; its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def _load_triangle(clip, faces, triangle, first, mask):
    """Load corners in the order of their vertices, which is the same for all triangles of an edge."""
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
def _span(p, q, r, in_front, any_in_front, half, size):
    """First pixel and number of pixels along an axis; p, q, r: corners, from the middle of the image."""
    low = tl.ceil(tl.minimum(tl.minimum(p, q), r) + (half - 0.5 - _SLACK))
    high = tl.floor(tl.maximum(tl.maximum(p, q), r) + (half - 0.5 + _SLACK))
    first = tl.minimum(tl.maximum(low, 0.0), size * 1.0).to(tl.int32)
    last = tl.minimum(tl.maximum(high, -1.0), size - 1.0).to(tl.int32)
    first = tl.where(in_front, first, 0)
    last = tl.where(in_front, last, size - 1)
    return first, tl.where(any_in_front, tl.maximum(last - first + 1, 0), 0)


@jit
def _box(a, b, c, mask, width, height, half_width, half_height):
    """First column, first row, columns and rows of the pixels that triangles may cover."""
    in_front = (a[3] > _MIN_W) & (b[3] > _MIN_W) & (c[3] > _MIN_W)
    any_in_front = mask & ((a[3] > 0) | (b[3] > 0) | (c[3] > 0))
    aw, bw, cw = tl.where(in_front, a[3], 1.0), tl.where(in_front, b[3], 1.0), tl.where(in_front, c[3], 1.0)
    across, down = half_width, -half_height
    left, columns = _span(
        a[0] / aw * across, b[0] / bw * across, c[0] / cw * across, in_front, any_in_front, half_width, width
    )
    top, rows = _span(a[1] / aw * down, b[1] / bw * down, c[1] / cw * down, in_front, any_in_front, half_height, height)
    return left, top, columns, rows


@jit
def _update_pixel(keys, base, column, row, mask, a, b, c, triangle, width, half_width, half_height):
    """Lower the entry of a pixel in the z-buffer to that of a triangle, if this covers it."""
    cx = column.to(tl.float32) + (0.5 - half_width)
    cy = row.to(tl.float32) + (0.5 - half_height)
    p = from_pixel(a, cx, cy, half_width, half_height)
    q = from_pixel(b, cx, cy, half_width, half_height)
    r = from_pixel(c, cx, cy, half_width, half_height)
    u, v, t = cross(q, r), -cross(p, r), cross(p, q)
    det = u * a[3] + v * b[3] + t * c[3]
    depth = (u * a[2] + v * b[2] + t * c[2]) / tl.where(det == 0, 1.0, det)
    depth = tl.where(depth == 0, 0.0, depth)  # -0 would be nearer than 0
    front = (u >= 0) & (v >= 0) & (t >= 0) & (det > 0)
    back = (u <= 0) & (v <= 0) & (t <= 0) & (det < 0)
    inside = mask & (front | back) & (depth >= -1) & (depth <= 1)
    key = (_ordered(depth.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | triangle
    pointer = keys + base + row.to(tl.int64) * width + column
    # Entries only fall, so an older value is never below the present one.
    before = tl.load(pointer, mask=inside, other=0)
    tl.atomic_min(pointer, key, mask=inside & (key < before), sem="relaxed")


@jit
def rasterize_small_fwd_kernel(
    clip,  # [B, V, 4] fp32
    faces,  # [T, 3] int
    keys,  # [B H W] int64: z-buffer
    queue,  # [B T] int64: triangles with many pixels, the largest from the end
    counts,  # [2] int32: triangles at the front and at the end of the queue
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
    """Draw a triangle a lane, its pixels one after the other.

    Those with more than SMALL pixels are queued: at the front, or at the end if they have more than LARGE tiles.
    """
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    triangle = program % blocks * BLOCK + tl.arange(0, BLOCK)
    here = triangle < triangles
    a, b, c = _load_triangle(clip, faces, triangle, image * vertices, here)
    left, top, columns, rows = _box(a, b, c, here, width, height, half_width, half_height)
    pixels = columns * rows
    tiles = ((columns + TILE - 1) // TILE) * ((rows + TILE - 1) // TILE)
    entry = image * triangles + triangle
    is_queued = ((pixels > SMALL) & (tiles <= LARGE)).to(tl.int32)
    slot = tl.atomic_add(counts, tl.sum(is_queued), sem="relaxed") + tl.cumsum(is_queued) - is_queued
    tl.store(queue + slot, entry, mask=is_queued > 0)
    is_queued = ((pixels > SMALL) & (tiles > LARGE)).to(tl.int32)
    slot = tl.atomic_add(counts + 1, tl.sum(is_queued), sem="relaxed") + tl.cumsum(is_queued) - is_queued
    tl.store(queue + (entries - 1 - slot), entry, mask=is_queued > 0)
    pixels = tl.where(pixels > SMALL, 0, pixels)
    base = image * height * width
    across = tl.maximum(columns, 1)
    most_pixels = tl.max(pixels)
    number = 0
    while number < most_pixels:
        column, row = left + number % across, top + number // across
        _update_pixel(keys, base, column, row, number < pixels, a, b, c, triangle, width, half_width, half_height)
        number += 1


@jit
def rasterize_tiles_fwd_kernel(
    clip,  # [B, V, 4] fp32
    faces,  # [T, 3] int
    keys,  # [B H W] int64
    queue,  # [B T] int64
    counts,  # [2] int32
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
    """Draw the queue: the first `programs` take a triangle each from its front, the others share those at its end."""
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
        image, triangle = entry // triangles, entry % triangles
        a, b, c = _load_triangle(clip, faces, triangle, image * vertices, True)
        left, top, columns, rows = _box(a, b, c, True, width, height, half_width, half_height)
        across = (columns + TILE - 1) // TILE
        tiles = across * ((rows + TILE - 1) // TILE)
        base = image * height * width
        tile = first_tile
        while tile < tiles:
            column = tile % across * TILE + lane % TILE
            row = tile // across * TILE + lane // TILE
            mask = (column < columns) & (row < rows)
            _update_pixel(keys, base, left + column, top + row, mask, a, b, c, triangle, width, half_width, half_height)
            tile += next_tile
        item += next_item


@jit
def rasterize_resolve_fwd_kernel(
    clip,  # [B, V, 4] fp32
    faces,  # [T, 3] int
    keys,  # [B H W] int64
    triangle,  # [B, H, W] int32
    barycentrics,  # [B, H, W, 3] fp32
    depth,  # [B, H, W] fp32
    vertices,
    width,
    height,
    half_width,
    half_height,
    all_pixels,
    BLOCK: tl.constexpr,
):
    """Write fragments from the z-buffer, a pixel a lane."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = number < all_pixels
    key = tl.load(keys + number, mask=here, other=_EMPTY)
    is_covered = key != _EMPTY
    nearest = tl.where(is_covered, key & 0xFFFFFFFF, -1).to(tl.int32)
    _, _, _, p, q, r, _, _ = project_corners(
        clip, faces, nearest, is_covered, number, vertices, width, height, half_width, half_height
    )
    u, v, t = cross(q, r), cross(r, p), cross(p, q)
    area = u + v + t
    inverse = 1 / tl.where(area == 0, 1.0, area)
    tl.store(triangle + number, nearest, mask=here)
    tl.store(barycentrics + number * 3, tl.where(is_covered, u * inverse, 0.0), mask=here)
    tl.store(barycentrics + number * 3 + 1, tl.where(is_covered, v * inverse, 0.0), mask=here)
    tl.store(barycentrics + number * 3 + 2, tl.where(is_covered, t * inverse, 0.0), mask=here)
    bits = _ordered((key >> 32).to(tl.int32))
    tl.store(depth + number, tl.where(is_covered, bits.to(tl.float32, bitcast=True), 1.0), mask=here)


@jit
def rasterize_bwd_kernel(
    grad_barycentrics,  # [B, H, W, 3] fp32
    clip,  # [B, V, 4] fp32
    faces,  # [T, 3] int
    triangle,  # [B, H, W] int32
    grad,  # [B V, 4] fp32
    values,  # [entries, 4] fp32, or None
    corners,  # [entries] int64, or None
    vertices,
    width,
    height,
    half_width,
    half_height,
    all_pixels,
    DETERMINISTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the corners from that of the barycentrics, a pixel a lane."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    nearest = tl.load(triangle + number, mask=number < all_pixels, other=-1)
    is_covered = nearest >= 0
    i, j, k, p, q, r, cx, cy = project_corners(
        clip, faces, nearest, is_covered, number, vertices, width, height, half_width, half_height
    )
    u, v, t = cross(q, r), cross(r, p), cross(p, q)
    area = u + v + t
    inverse = 1 / tl.where(area == 0, 1.0, area)
    gu = tl.load(grad_barycentrics + number * 3, mask=is_covered, other=0.0)
    gv = tl.load(grad_barycentrics + number * 3 + 1, mask=is_covered, other=0.0)
    gt = tl.load(grad_barycentrics + number * 3 + 2, mask=is_covered, other=0.0)
    mean = (gu * u + gv * v + gt * t) * inverse
    gu, gv, gt = (gu - mean) * inverse, (gv - mean) * inverse, (gt - mean) * inverse
    # u = q x r, v = r x p, t = p x q.
    px, py = gt * q[1] - gv * r[1], gv * r[0] - gt * q[0]
    qx, qy = gu * r[1] - gt * p[1], gt * p[0] - gu * r[0]
    rx, ry = gv * p[1] - gu * q[1], gu * q[0] - gv * p[0]
    # x = X - cx w, with X = x W / 2 and Y = -y H / 2.
    entry = number * 3
    pw, qw, rw = -cx * px - cy * py, -cx * qx - cy * qy, -cx * rx - cy * ry
    first, last = find_runs(triangle, nearest, number, all_pixels, width * height, BLOCK)
    px, py, pw = run_sum(px, first) * half_width, run_sum(py, first) * -half_height, run_sum(pw, first)
    qx, qy, qw = run_sum(qx, first) * half_width, run_sum(qy, first) * -half_height, run_sum(qw, first)
    rx, ry, rw = run_sum(rx, first) * half_width, run_sum(ry, first) * -half_height, run_sum(rw, first)
    add_corner(grad, values, corners, i, entry, px, py, pw, is_covered & last, DETERMINISTIC)
    add_corner(grad, values, corners, j, entry + 1, qx, qy, qw, is_covered & last, DETERMINISTIC)
    add_corner(grad, values, corners, k, entry + 2, rx, ry, rw, is_covered & last, DETERMINISTIC)
