"""Kernels of `antialias`: the weights from silhouettes between two pixels, blending, and the gradients of both.

Legend: see `antialias`. v, the weight of a pair of pixels, is 0 where no silhouette lies between them.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.mesh.device import (
    add_corner,
    corner_rows,
    cross,
    from_pixel,
    load_corner,
    pixel_centre,
    product_difference,
)

MAX_STEPS = 16
_MIN_W = constant(1e-8)  # an edge with an end below is left as it is
_MIN_V = constant(1e-30)
_MAX_STEPS = constant(MAX_STEPS)


@jit
def _view_corner(clip, row, mask, cx, cy, half_width, half_height, ALONG_X: tl.constexpr):
    """View a vertex from a pixel -> (along, across, w), along and across the axis of the pair of pixels."""
    corner = load_corner(clip, row, mask)
    x, y = from_pixel(corner, cx, cy, half_width, half_height)
    if ALONG_X:
        viewed = (x, y, corner[3])
    else:
        viewed = (y, x, corner[3])
    return viewed


@jit
def _select(condition, a, b):
    """`tl.where` of viewed vertices."""
    return tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1]), tl.where(condition, a[2], b[2])


@jit
def _crosses(a, b):
    """Test whether an edge crosses the axis."""
    return (a[1] < 0) != (b[1] < 0)


@jit
def _crossing(a, b):
    """Position at which an edge crosses the axis; 0 where it does not."""
    slope = product_difference(a[2], b[1], b[2], a[1])
    there = _crosses(a, b) & (slope != 0)
    return tl.where(there, cross(a, b) / tl.where(there, slope, 1.0), 0.0)


@jit
def _folds(a, b, o, direction):
    """Test whether the triangle on the other side of edge (a, b), with corner o, has an area and folds back."""
    ax, ay = product_difference(a[0], o[2], o[0], a[2]), product_difference(a[1], o[2], o[1], a[2])
    bx, by = product_difference(b[0], o[2], o[0], b[2]), product_difference(b[1], o[2], o[1], b[2])
    slope = product_difference(a[2], b[1], b[2], a[1])
    return product_difference(ax, by, bx, ay) * slope * direction > 0


@jit
def _edge_between(clip, row_a, row_b, mask, cx, cy, direction, half_width, half_height, ALONG_X: tl.constexpr):
    """Test whether edges count along this axis; v, from halfway between the centres, where its sign cannot be lost.

    The angle is computed from the vertices themselves, so it is the same from every pixel.
    """
    a, b = load_corner(clip, row_a, mask), load_corner(clip, row_b, mask)
    across = tl.abs(product_difference(a[0], b[3], b[0], a[3])) * half_width
    steep = across <= tl.abs(product_difference(a[1], b[3], b[1], a[3])) * half_height
    if ALONG_X:
        cx += 0.5 * direction
    else:
        cy += 0.5 * direction
    xa, ya = from_pixel(a, cx, cy, half_width, half_height)
    xb, yb = from_pixel(b, cx, cy, half_width, half_height)
    if ALONG_X:
        v = -_crossing((xa, ya, a[3]), (xb, yb, b[3]))
    else:
        v = -_crossing((ya, xa, a[3]), (yb, xb, b[3]))
    return steep == ALONG_X, tl.where(v == 0, _MIN_V, v)  # an edge halfway has a gradient too


@jit
def _find_edge(clip, faces, opposite, triangle, depth, number, mask, vertices, size, ALONG_X: tl.constexpr):
    """Find the silhouette between a pixel and the next one.

    Returns v (0: none), both ends of the edge viewed from the nearer pixel, their rows, and the centre of that pixel.
    """
    width, height, half_width, half_height = size
    if ALONG_X:
        next_one = number + 1
        mask = mask & (number % width < width - 1)
    else:
        next_one = number + width
        mask = mask & (number // width % height < height - 1)
    first = tl.load(triangle + number, mask=mask, other=-1).to(tl.int64)
    second = tl.load(triangle + next_one, mask=mask, other=-1).to(tl.int64)
    mask = mask & (first != second)
    before = tl.load(depth + number, mask=mask, other=0.0)
    after = tl.load(depth + next_one, mask=mask, other=0.0)
    nearer = (second < 0) | ((first >= 0) & (before <= after))
    direction = tl.where(nearer, 1.0, -1.0)
    owner = tl.where(nearer, first, second)
    image, cx, cy = pixel_centre(tl.where(nearer, number, next_one), width, height, half_width, half_height)
    base = image * vertices
    i, j, k = corner_rows(faces, owner, base, mask)
    p = _view_corner(clip, i, mask, cx, cy, half_width, half_height, ALONG_X)
    q = _view_corner(clip, j, mask, cx, cy, half_width, half_height, ALONG_X)
    r = _view_corner(clip, k, mask, cx, cy, half_width, half_height, ALONG_X)
    # The walk leaves the triangle through the farther of the two edges on the axis.
    at_p = tl.where(_crosses(q, r), direction * _crossing(q, r), -1e30)
    at_q = tl.where(_crosses(r, p), direction * _crossing(r, p), -1e30)
    at_r = tl.where(_crosses(p, q), direction * _crossing(p, q), -1e30)
    distance = tl.maximum(tl.maximum(at_p, at_q), at_r)
    by_p = at_p == distance
    by_q = (at_q == distance) & ~by_p
    a, row_a = _select(by_p, q, _select(by_q, r, p)), tl.where(by_p, j, tl.where(by_q, k, i))
    b, row_b = _select(by_p, r, _select(by_q, p, q)), tl.where(by_p, k, tl.where(by_q, i, j))
    row_c = tl.where(by_p, i, tl.where(by_q, j, k))  # the corner opposite to the edge
    corner = owner * 3 + tl.where(by_p, 0, tl.where(by_q, 1, 2))
    is_silhouette = mask & (distance < 0) & (distance >= 0)  # false
    walking = mask & (distance >= 0) & (distance <= 1)
    step = 0
    while (step < _MAX_STEPS) & (tl.max(walking.to(tl.int32)) > 0):
        opposite_corner = tl.load(opposite + corner, mask=walking, other=-1).to(tl.int64)
        inner = walking & (opposite_corner >= 0)
        row_o = base + tl.load(faces + opposite_corner, mask=inner, other=0).to(tl.int64)
        o = _view_corner(clip, row_o, inner, cx, cy, half_width, half_height, ALONG_X)
        edge = walking & ((opposite_corner < 0) | _folds(a, b, o, direction))
        is_silhouette = is_silhouette | edge
        walking = walking & ~edge
        # On through the triangle (a, b, o), to the edge from o to the end on the other side of the axis.
        to_b = walking & _crosses(o, b)
        to_a = walking & ~to_b
        row_c = tl.where(to_b, row_a, tl.where(to_a, row_b, row_c))
        row_a, a = tl.where(to_b, row_b, row_a), _select(to_b, b, a)
        row_b, b = tl.where(walking, row_o, row_b), _select(walking, o, b)
        start = opposite_corner // 3 * 3
        next_corner, other_corner = start + (opposite_corner + 1) % 3, start + (opposite_corner + 2) % 3
        is_next = base + tl.load(faces + next_corner, mask=walking, other=0).to(tl.int64) == row_c
        corner = tl.where(walking, tl.where(is_next, next_corner, other_corner), corner)
        distance = tl.where(walking, direction * _crossing(a, b), distance)
        walking = walking & (distance <= 1)
        step += 1
    counts, v = _edge_between(clip, row_a, row_b, is_silhouette, cx, cy, direction, half_width, half_height, ALONG_X)
    is_silhouette = is_silhouette & counts & (a[2] > _MIN_W) & (b[2] > _MIN_W)
    return tl.where(is_silhouette, v, 0.0), a, b, row_a, row_b, cx, cy


@jit
def antialias_weights_fwd_kernel(
    clip,  # [B, V, 4] fp32
    faces,  # [T, 3] int
    opposite,  # [T, 3] int64: corners 3 t + k, or -1
    triangle,  # [B, H, W] int32
    depth,  # [B, H, W] fp32
    weights,  # [B H W, 2] fp32: v to the right and below
    vertices,
    width,
    height,
    half_width,
    half_height,
    all_pixels,
    BLOCK: tl.constexpr,
):
    """v of each pixel to the right and below."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here, size = number < all_pixels, (width, height, half_width, half_height)
    for axis in tl.static_range(2):
        value = _find_edge(clip, faces, opposite, triangle, depth, number, here, vertices, size, axis == 0)[0]
        tl.store(weights + number * 2 + axis, value, mask=here)


@jit
def antialias_weights_bwd_kernel(
    grad_weights,  # [B H W, 2] fp32
    clip,  # [B, V, 4] fp32
    faces,  # [T, 3] int
    opposite,  # [T, 3] int64: corners 3 t + k, or -1
    triangle,  # [B, H, W] int32
    depth,  # [B, H, W] fp32
    weights,  # [B H W, 2] fp32
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
    """Gradient of the two ends of each edge from that of v."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = (width, height, half_width, half_height)
    for axis in tl.static_range(2):
        mask = tl.load(weights + number * 2 + axis, mask=number < all_pixels, other=0.0) != 0
        if tl.max(mask.to(tl.int32)) > 0:  # few blocks have an edge
            _, a, b, row_a, row_b, cx, cy = _find_edge(
                clip, faces, opposite, triangle, depth, number, mask, vertices, size, axis == 0
            )
            upstream = tl.load(grad_weights + number * 2 + axis, mask=mask, other=0.0)
            slope = product_difference(a[2], b[1], b[2], a[1])
            safe = tl.where(mask, slope, 1.0)
            at = cross(a, b) / safe
            # v = direction (1/2 - direction at): the sign of the direction cancels.
            g = -upstream / safe
            along_a, along_b = g * b[1], -g * a[1]
            across_a, across_b = g * (at * b[2] - b[0]), g * (a[0] - at * a[2])
            if axis == 0:
                xa, ya, xb, yb = along_a, across_a, along_b, across_b
            else:
                xa, ya, xb, yb = across_a, along_a, across_b, along_b
            wa = -g * at * b[1] - cx * xa - cy * ya
            wb = g * at * a[1] - cx * xb - cy * yb
            entry = (number * 2 + axis) * 2
            add_corner(grad, values, corners, row_a, entry, xa * half_width, -ya * half_height, wa, mask, DETERMINISTIC)
            add_corner(
                grad, values, corners, row_b, entry + 1, xb * half_width, -yb * half_height, wb, mask, DETERMINISTIC
            )


@jit
def _weights_around(weights, number, here, width, height):
    """v to the right and below, of the left pixel and of the pixel above; 0 past the border."""
    column, row = number % width, number // width % height
    right = tl.load(weights + number * 2, mask=here, other=0.0)[:, None]
    below = tl.load(weights + number * 2 + 1, mask=here, other=0.0)[:, None]
    left = tl.load(weights + (number - 1) * 2, mask=here & (column > 0), other=0.0)[:, None]
    above = tl.load(weights + (number - width) * 2 + 1, mask=here & (row > 0), other=0.0)[:, None]
    return right, below, left, above


@jit
def _load_pixel(image, number, channel, mask, CHANNELS: tl.constexpr):
    """A group of channels of pixels, [BLOCK, GROUP] fp32."""
    return tl.load(image + number[:, None] * CHANNELS + channel, mask=mask & (channel < CHANNELS), other=0.0).to(
        tl.float32
    )


@jit
def antialias_blend_fwd_kernel(
    image,  # [B H W, CHANNELS] float
    weights,  # [B H W, 2] fp32
    out,  # as image
    width,
    height,
    all_pixels,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blend each pixel with its four neighbours; a block of pixels and a group of channels."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[None, :]
    here = number < all_pixels
    right, below, left, above = _weights_around(weights, number, here, width, height)
    centre = _load_pixel(image, number, channel, here[:, None], CHANNELS)  # [BLOCK, GROUP]
    change = tl.maximum(right, 0.0) * (_load_pixel(image, number + 1, channel, right > 0, CHANNELS) - centre)
    change += tl.maximum(below, 0.0) * (_load_pixel(image, number + width, channel, below > 0, CHANNELS) - centre)
    change += tl.maximum(-left, 0.0) * (_load_pixel(image, number - 1, channel, left < 0, CHANNELS) - centre)
    change += tl.maximum(-above, 0.0) * (_load_pixel(image, number - width, channel, above < 0, CHANNELS) - centre)
    pointer = out + number[:, None] * CHANNELS + channel
    tl.store(pointer, centre + change, mask=here[:, None] & (channel < CHANNELS))


@jit
def antialias_blend_bwd_kernel(
    grad_out,  # [B H W, CHANNELS] float
    image,  # [B H W, CHANNELS] float
    weights,  # [B H W, 2] fp32
    grad_image,  # as image
    grad_weights,  # [B H W, 2] fp32
    width,
    height,
    all_pixels,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the image and of v."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = number < all_pixels
    right, below, left, above = _weights_around(weights, number, here, width, height)
    own_weight = 1 - tl.maximum(right, 0.0) - tl.maximum(below, 0.0) - tl.maximum(-left, 0.0) - tl.maximum(-above, 0.0)
    grad_right = tl.zeros([BLOCK], tl.float32)
    grad_below = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, CHANNELS, GROUP):
        channel = start + tl.arange(0, GROUP)[None, :]
        centre = _load_pixel(grad_out, number, channel, here[:, None], CHANNELS)
        on_right = _load_pixel(grad_out, number + 1, channel, right < 0, CHANNELS)
        on_below = _load_pixel(grad_out, number + width, channel, below < 0, CHANNELS)
        grad = own_weight * centre + tl.maximum(-right, 0.0) * on_right + tl.maximum(-below, 0.0) * on_below
        grad += tl.maximum(left, 0.0) * _load_pixel(grad_out, number - 1, channel, left > 0, CHANNELS)
        grad += tl.maximum(above, 0.0) * _load_pixel(grad_out, number - width, channel, above > 0, CHANNELS)
        mask = here[:, None] & (channel < CHANNELS)
        tl.store(grad_image + number[:, None] * CHANNELS + channel, grad, mask=mask)
        colour = _load_pixel(image, number, channel, (right != 0) | (below != 0), CHANNELS)
        change = _load_pixel(image, number + 1, channel, right != 0, CHANNELS) - colour
        grad_right += tl.sum(tl.where(right > 0, centre, on_right) * change, axis=1)
        change = _load_pixel(image, number + width, channel, below != 0, CHANNELS) - colour
        grad_below += tl.sum(tl.where(below > 0, centre, on_below) * change, axis=1)
    tl.store(grad_weights + number * 2, grad_right, mask=here)
    tl.store(grad_weights + number * 2 + 1, grad_below, mask=here)
