"""Device functions over a tile of rays: the span in the cube, the lattice of intervals, the occupancy of a point.

`march_reference` is the definition. Comparisons decide whether an interval is a sample, so every number in them is
rounded as torch rounds it, one operation at a time. `march` and `render` share the span and the occupancy; `march`
walks the lattice a tile of steps at a time, `render` follows a cursor.

Legend: a cursor identifies an interval of a ray's lattice: by its number (as fp32) where steps are constant, by the t
at which it starts where they grow with the distance (GROWS). lattice: (bound, outer_scale, shortest, longest,
dt_gamma).
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import jit, tl


@jit
def no_fma(product):
    """Return the product, rounded: the compiler cannot fuse it with a sum that follows."""
    return tl.minimum(product, 3.0e38)


@jit
def _axis_span(origin, direction, bound):
    """Entry and exit of rays, t each, of the slab [-bound, bound] of one axis."""
    safe = tl.where(tl.abs(direction) < 1e-15, 1e-15, direction)
    low, high = tl.div_rn(-bound - origin, safe), tl.div_rn(bound - origin, safe)
    return tl.minimum(low, high), tl.maximum(low, high)


@jit
def ray_span(ox, oy, oz, dx, dy, dz, bound, min_near):
    """Return near and far, where rays enter and leave the cube; far < near for those that miss it."""
    near_x, far_x = _axis_span(ox, dx, bound)
    near_y, far_y = _axis_span(oy, dy, bound)
    near_z, far_z = _axis_span(oz, dz, bound)
    near = tl.maximum(tl.maximum(near_x, near_y), near_z)
    return tl.maximum(near, min_near), tl.minimum(tl.minimum(far_x, far_y), far_z)


@jit
def first_cursor(near, GROWS: tl.constexpr):
    """The cursor of the first interval of a lattice that is not shifted."""
    return near if GROWS else near * 0.0


@jit
def interval(cursor, near, lattice, GROWS: tl.constexpr):
    """Middle and width of an interval, and the cursor of the next."""
    _, _, shortest, longest, dt_gamma = lattice
    if GROWS:
        dt = tl.minimum(tl.maximum(cursor * dt_gamma, shortest), longest)
        return cursor + 0.5 * dt, dt, cursor + dt
    else:
        return near + (no_fma(cursor * shortest) + 0.5 * shortest), cursor * 0.0 + shortest, cursor + 1.0


@jit
def _cell(x, scale, RESOLUTION: tl.constexpr):
    """Number of the cell that holds a coordinate."""
    return tl.minimum(tl.maximum((no_fma(x * scale) + 0.5 * RESOLUTION).to(tl.int32), 0), RESOLUTION - 1)


@jit
def occupied(x, y, z, bits, mask, bound, outer_scale, RESOLUTION: tl.constexpr, CASCADES: tl.constexpr):
    """Test whether points, clamped to the cube, lie in set cells. outer_scale: cells a world unit of the last cube."""
    x = tl.minimum(tl.maximum(x, -bound), bound)
    y = tl.minimum(tl.maximum(y, -bound), bound)
    z = tl.minimum(tl.maximum(z, -bound), bound)
    scale = x * 0.0 + outer_scale
    cascade = tl.zeros_like(x).to(tl.int32)
    if CASCADES > 1:
        reach = tl.maximum(tl.maximum(tl.abs(x), tl.abs(y)), tl.abs(z))
        cascade += CASCADES - 1
        for back in tl.static_range(CASCADES - 1):
            # From the last cube but one inwards; the half edges of all but the last are powers of two.
            inner = reach <= 2.0 ** (CASCADES - 2 - back)
            scale = tl.where(inner, 0.5 * RESOLUTION / 2.0 ** (CASCADES - 2 - back), scale)
            cascade = tl.where(inner, CASCADES - 2 - back, cascade)
    i, j, k = _cell(x, scale, RESOLUTION), _cell(y, scale, RESOLUTION), _cell(z, scale, RESOLUTION)
    if CASCADES * RESOLUTION * RESOLUTION * RESOLUTION >= 2147483648:
        cascade = cascade.to(tl.int64)
    cell = ((cascade * RESOLUTION + i) * RESOLUTION + j) * RESOLUTION + k
    byte = tl.load(bits + (cell >> 3), mask=mask, other=0).to(tl.int32)
    return ((byte >> (cell & 7).to(tl.int32)) & 1) != 0
