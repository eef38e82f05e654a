"""Kernels of `render`, the inference rendering.

Three kernels, none of which stores anything a sample. Enter: every ray walks to its first sample; those without one
get the background, the others are queued, SEGMENT neighbouring rays a queue. Shade: a program works through a queue
with BLOCK lanes, one sample of each lane's ray at a time through encoding and MLP; a lane whose ray has ended writes
its result and takes the next ray of the queue. Normals: six taps of the field at the depth of each queued ray.

Legend: R rays. A cursor identifies an interval of a ray's lattice (`rays/device.py`); lattice: (bound, outer_scale,
shortest, longest, dt_gamma). Units: world units.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.fields.activations import activate_density, blob_logit
from dream_fast.kernels.fields.encode import encode
from dream_fast.kernels.fields.mlp import mlp, mlp_weights, pick
from dream_fast.kernels.rays.device import first_cursor, interval, no_fma, occupied, ray_span

# Below this opacity a ray has no normal.
EMPTY_OPACITY = 1e-3
_EMPTY_OPACITY = constant(EMPTY_OPACITY)


@jit
def _load_vector(pointer, row, mask, other):
    """Load rows of [R, 3] as three tiles."""
    x = tl.load(pointer + row * 3, mask=mask, other=other[0])
    y = tl.load(pointer + row * 3 + 1, mask=mask, other=other[1])
    z = tl.load(pointer + row * 3 + 2, mask=mask, other=other[2])
    return x, y, z


@jit
def _store_vector(pointer, row, mask, value):
    """Store three tiles as rows of [R, 3]."""
    tl.store(pointer + row * 3, value[0], mask=mask)
    tl.store(pointer + row * 3 + 1, value[1], mask=mask)
    tl.store(pointer + row * 3 + 2, value[2], mask=mask)


@jit
def _column(outputs, lane, COLUMN: tl.constexpr):
    """Column COLUMN of the MLP's outputs, [BLOCK].

    The compiler keeps the layout of a matrix product for everything computed from it, here the rays and with them the
    gathers of the hash grid, which are slow in that layout. A gather over the lanes ends it.
    """
    return tl.gather(pick(outputs, COLUMN), lane, 0)


@jit
def _evaluate(
    u,
    point,
    lane,
    table,
    levels,
    active,
    weights,
    parameters,
    scene,
    SOFTPLUS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """The MLP's outputs and sigma at points; u: x in unit coordinates. Outside of [0, 1] the table is not read.

    scene: (scale to unit coordinates, blob_density, blob_radius).
    """
    x, y, z = point
    scale, blob_density, blob_radius = scene
    SINGLE: tl.constexpr = parameters.dtype.element_ty == tl.float32
    features = encode(u, y * scale + 0.5, z * scale + 0.5, table, levels, active, SHAPE)
    outputs, _ = mlp(features, weights, parameters, SHAPE)
    blob = blob_logit(x, y, z, blob_density, blob_radius, SOFTPLUS, SINGLE)
    return outputs, activate_density(_column(outputs, lane, 0) + blob, SOFTPLUS, SINGLE)


@jit
def _probe(
    cursor,
    near,
    far,
    o,
    d,
    live,
    bits,
    lattice,
    GROWS: tl.constexpr,
    RESOLUTION: tl.constexpr,
    CASCADES: tl.constexpr,
    PROBES: tl.constexpr,
):
    """Examine the next PROBES intervals -> cursor (of the first sample, else behind them), has_sample, not past far.

    All are looked up before any is compared, so that the loads overlap.
    """
    target = cursor
    has_sample = live & (cursor != cursor)
    inside = live
    for _ in tl.static_range(PROBES):
        t, _, following = interval(cursor, near, lattice, GROWS)
        inside = live & (t < far)
        x, y, z = o[0] + no_fma(t * d[0]), o[1] + no_fma(t * d[1]), o[2] + no_fma(t * d[2])
        hit = inside & occupied(x, y, z, bits, inside, lattice[0], lattice[1], RESOLUTION, CASCADES)
        target = tl.where(has_sample, target, cursor)
        has_sample = has_sample | hit
        cursor = following
    return tl.where(has_sample, target, cursor), has_sample, inside


@jit
def render_enter_kernel(
    origins,  # [R, 3] fp32
    directions,  # [R, 3] fp32
    bits,  # [CASCADES, RESOLUTION^3 / 8] uint8
    background,  # [R, 3] (PER_RAY) or [3] fp32
    rgb,  # [R, 3] fp32
    normal,  # [R, 3] fp32
    depth,  # [R] fp32
    opacity,  # [R] fp32
    queue,  # [segments, SEGMENT] int32: rays of the segment that have a sample
    cursors,  # [segments, SEGMENT] fp32: of their first samples
    lengths,  # [segments] int32: rays in each queue
    rays,
    min_near,
    lattice,  # (bound, outer_scale, shortest, longest, dt_gamma)
    PER_RAY: tl.constexpr,
    GROWS: tl.constexpr,
    RESOLUTION: tl.constexpr,
    CASCADES: tl.constexpr,
    SEGMENT: tl.constexpr,
    PROBES: tl.constexpr,
):
    """Find the first sample of each ray of a segment and queue the ray; write the rays that have none."""
    first = tl.program_id(0).to(tl.int64) * SEGMENT
    lane = tl.arange(0, SEGMENT)
    row = first + lane
    here = row < rays
    o = _load_vector(origins, row, here, (0.0, 0.0, 0.0))
    d = _load_vector(directions, row, here, (1.0, 1.0, 1.0))
    near, far = ray_span(o[0], o[1], o[2], d[0], d[1], d[2], lattice[0], min_near)
    cursor = first_cursor(near, GROWS)
    searching = here & (near < far)
    has_sample = here & (near != near)
    while tl.max(searching.to(tl.int32), 0) > 0:
        moved, hit, inside = _probe(
            cursor, near, far, o, d, searching, bits, lattice, GROWS, RESOLUTION, CASCADES, PROBES
        )
        cursor = tl.where(searching, moved, cursor)
        has_sample = has_sample | hit
        searching = inside & (hit == 0)
    place = first + tl.cumsum(has_sample.to(tl.int32), 0) - 1
    tl.store(queue + place, lane, mask=has_sample)
    tl.store(cursors + place, cursor, mask=has_sample)
    tl.store(lengths + tl.program_id(0), tl.sum(has_sample.to(tl.int32), 0))
    zero = tl.zeros([SEGMENT], tl.float32)
    missed = here & (has_sample == 0)
    background_rgb = _load_vector(background, row if PER_RAY else row * 0, missed, (0.0, 0.0, 0.0))
    _store_vector(rgb, row, missed, background_rgb)
    _store_vector(normal, row, here, (zero, zero, zero))
    tl.store(depth + row, zero, mask=missed)
    tl.store(opacity + row, zero, mask=missed)


@jit
def _opacity_of(tau):
    """1 - exp(-tau), accurate for small tau as well."""
    series = tau * (1 - tau * (1 / 2) * (1 - tau * (1 / 3) * (1 - tau * (1 / 4) * (1 - tau * (1 / 5)))))
    return tl.where(tau < 0.1, series, 1 - tl.exp(-tau))


@jit
def _add(total, value, error):
    """Compensated summation -> the sum, and its rounding error for the next addition (Kahan, 1965)."""
    value -= error
    new = total + value
    return new, (new - total) - value


@jit
def render_shade_kernel(
    origins,  # [R, 3] fp32
    directions,  # [R, 3] fp32
    bits,  # [CASCADES, RESOLUTION^3 / 8] uint8
    background,  # [R, 3] (PER_RAY) or [3] fp32
    table,  # [rows, F] compute dtype
    levels,  # [PADDED] int64, `level_words`
    active,  # [] int, or None
    parameters,  # [parameters of the MLP] compute dtype
    rgb,  # [R, 3] fp32
    depth,  # [R] fp32
    opacity,  # [R] fp32
    queue,  # [segments, SEGMENT] int32
    cursors,  # [segments, SEGMENT] fp32
    lengths,  # [segments] int32
    min_near,
    lattice,  # (bound, outer_scale, shortest, longest, dt_gamma)
    stop,
    max_steps,
    scene,  # (scale to unit coordinates, blob_density, blob_radius)
    PER_RAY: tl.constexpr,
    GROWS: tl.constexpr,
    RESOLUTION: tl.constexpr,
    CASCADES: tl.constexpr,
    SEGMENT: tl.constexpr,
    PROBES: tl.constexpr,
    WALK: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Render the rays of one queue, BLOCK at a time. The result of a ray does not depend on its lane."""
    first = tl.program_id(0).to(tl.int64) * SEGMENT
    length = tl.load(lengths + tl.program_id(0))
    if length == 0:
        return
    SINGLE: tl.constexpr = parameters.dtype.element_ty == tl.float32
    weights = mlp_weights(parameters, SHAPE)
    lane = tl.arange(0, BLOCK)
    slot = lane
    rays_taken = 0
    is_free = slot >= 0  # lanes without a ray
    live = slot < 0  # lanes with a ray
    ready = live  # lanes whose cursor is at a sample
    zero = tl.zeros([BLOCK], tl.float32)
    row = slot.to(tl.int64)
    o, d = (zero, zero, zero), (zero, zero, zero)
    near, far, cursor = zero, zero, zero
    tau, red, green, blue, depth_sum, opacity_sum = zero, zero, zero, zero, zero, zero
    kahan_depth, kahan_opacity = zero, zero  # rounding errors of the sums
    depth_limit = tl.minimum(-tl.log(stop), 87.0)  # optical depth behind which nothing counts
    samples = slot
    working = length > 0
    while working:
        # Free lanes take the next rays of the queue.
        slot = tl.where(is_free, rays_taken + tl.cumsum(is_free.to(tl.int32), 0) - 1, slot)
        rays_taken += tl.sum(is_free.to(tl.int32), 0)
        fresh = is_free & (slot < length)
        row = tl.where(fresh, first + tl.load(queue + first + slot, mask=fresh, other=0), row)
        o = _load_vector(origins, row, fresh, o)
        d = _load_vector(directions, row, fresh, d)
        cursor = tl.load(cursors + first + slot, mask=fresh, other=cursor)
        near, far = ray_span(o[0], o[1], o[2], d[0], d[1], d[2], lattice[0], min_near)
        tau = tl.where(fresh, 0.0, tau)
        red, green, blue = tl.where(fresh, 0.0, red), tl.where(fresh, 0.0, green), tl.where(fresh, 0.0, blue)
        depth_sum, opacity_sum = tl.where(fresh, 0.0, depth_sum), tl.where(fresh, 0.0, opacity_sum)
        kahan_depth, kahan_opacity = tl.where(fresh, 0.0, kahan_depth), tl.where(fresh, 0.0, kahan_opacity)
        samples = tl.where(fresh, 0, samples)
        live = (live & (is_free == 0)) | fresh
        ready = (ready & (is_free == 0)) | fresh

        # One sample of every ready lane; the others are outside the cube, where nothing is looked up.
        t, dt, following = interval(cursor, near, lattice, GROWS)
        x, y, z = o[0] + no_fma(t * d[0]), o[1] + no_fma(t * d[1]), o[2] + no_fma(t * d[2])
        outputs, sigma = _evaluate(
            tl.where(ready, x * scene[0] + 0.5, 2.0),
            (x, y, z),
            lane,
            table,
            levels,
            active,
            weights,
            parameters,
            scene,
            SOFTPLUS,
            SHAPE,
        )
        r, g, b = _column(outputs, lane, 1), _column(outputs, lane, 2), _column(outputs, lane, 3)
        r, g, b = tl.sigmoid(r), tl.sigmoid(g), tl.sigmoid(b)
        sample_tau = sigma * dt
        # The transmittance is rounded once: a product of hundreds of factors would be rounded at each.
        weight = tl.where(ready, _opacity_of(sample_tau) * tl.exp(-tau), 0.0)
        tau += tl.where(ready, sample_tau, 0.0)
        red, green, blue = red + weight * r, green + weight * g, blue + weight * b
        if SINGLE:
            # Normals are taken at this depth and vary over the width of a cell of the finest level.
            depth_sum, kahan_depth = _add(depth_sum, weight * t, kahan_depth)
            opacity_sum, kahan_opacity = _add(opacity_sum, weight, kahan_opacity)
        else:
            depth_sum, opacity_sum = depth_sum + weight * t, opacity_sum + weight
        samples = tl.where(ready, samples + 1, samples)
        cursor = tl.where(ready, following, cursor)

        # On to the next sample, or part of the way: lanes that have one do not wait long for the others.
        ended = live & ((tau > depth_limit) | (samples >= max_steps))
        ready = slot < 0
        searching = live & (ended == 0)
        walked = 0
        while (walked < WALK) & (tl.max(searching.to(tl.int32), 0) > 0):
            moved, hit, inside = _probe(
                cursor, near, far, o, d, searching, bits, lattice, GROWS, RESOLUTION, CASCADES, PROBES
            )
            cursor = tl.where(searching, moved, cursor)
            ready = ready | hit
            ended = ended | (searching & (hit == 0) & (inside == 0))
            searching = searching & (hit == 0) & inside
            walked += PROBES

        background_rgb = _load_vector(background, row if PER_RAY else row * 0, ended, (0.0, 0.0, 0.0))
        transmittance = 1 - opacity_sum
        rgb_over_background = (
            red + transmittance * background_rgb[0],
            green + transmittance * background_rgb[1],
            blue + transmittance * background_rgb[2],
        )
        _store_vector(rgb, row, ended, rgb_over_background)
        tl.store(depth + row, depth_sum, mask=ended)
        tl.store(opacity + row, opacity_sum, mask=ended)
        live = live & (ended == 0)
        is_free = live == 0
        working = (tl.max(live.to(tl.int32), 0) > 0) | (rays_taken < length)


@jit
def _store_normal(normal, row, mask, gx, gy, gz):
    """Store the unit vector against the gradient of sigma; 0 where the gradient vanishes."""
    inverse = -tl.rsqrt(tl.maximum(gx * gx + gy * gy + gz * gz, 1e-20))
    _store_vector(normal, row, mask, (gx * inverse, gy * inverse, gz * inverse))


@jit
def render_normals_kernel(
    origins,  # [R, 3] fp32
    directions,  # [R, 3] fp32
    table,  # [rows, F] compute dtype
    levels,  # [PADDED] int64, `level_words`
    active,  # [] int, or None
    parameters,  # [parameters of the MLP] compute dtype
    normal,  # [R, 3] fp32
    depth,  # [R] fp32
    opacity,  # [R] fp32
    queue,  # [segments, SEGMENT] int32
    lengths,  # [segments] int32
    bound,
    epsilon,
    scene,  # (scale to unit coordinates, blob_density, blob_radius)
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Normals of BLOCK rays of a queue, by differences of sigma around the expected depth."""
    PARTS: tl.constexpr = SEGMENT // BLOCK
    segment = tl.program_id(0) // PARTS
    slot = tl.program_id(0) % PARTS * BLOCK
    length = tl.load(lengths + segment)
    if slot >= length:
        return
    SINGLE: tl.constexpr = parameters.dtype.element_ty == tl.float32
    weights = mlp_weights(parameters, SHAPE)
    first = segment.to(tl.int64) * SEGMENT
    lane = tl.arange(0, BLOCK)
    slots = slot + lane
    row = first + tl.load(queue + first + slots, mask=slots < length, other=0)
    ray_opacity = tl.load(opacity + row, mask=slots < length, other=0.0)
    solid = ray_opacity > _EMPTY_OPACITY
    t = tl.load(depth + row, mask=solid, other=0.0) / tl.where(solid, ray_opacity, 1.0)
    o = _load_vector(origins, row, solid, (0.0, 0.0, 0.0))
    d = _load_vector(directions, row, solid, (0.0, 0.0, 0.0))
    gx, gy, gz = t * 0.0, t * 0.0, t * 0.0
    for tap in range(6):
        step = tl.where(tap % 2 == 0, epsilon, -epsilon)
        x = o[0] + t * d[0] + tl.where(tap // 2 == 0, step, 0.0)
        y = o[1] + t * d[1] + tl.where(tap // 2 == 1, step, 0.0)
        z = o[2] + t * d[2] + tl.where(tap // 2 == 2, step, 0.0)
        x = tl.minimum(tl.maximum(x, -bound), bound)
        y = tl.minimum(tl.maximum(y, -bound), bound)
        z = tl.minimum(tl.maximum(z, -bound), bound)
        outputs, sigma = _evaluate(
            x * scene[0] + 0.5, (x, y, z), lane, table, levels, active, weights, parameters, scene, SOFTPLUS, SHAPE
        )
        change = tl.where(tap % 2 == 0, sigma, -sigma) / (2 * epsilon)
        gx += tl.where(tap // 2 == 0, change, 0.0)
        gy += tl.where(tap // 2 == 1, change, 0.0)
        gz += tl.where(tap // 2 == 2, change, 0.0)
        if not SINGLE:
            if tap == 5:
                # With a store in the loop the compiler does not move the loads of the biases out of it, where together
                # they take up to 128 registers.
                _store_normal(normal, row, solid, gx, gy, gz)
    if SINGLE:
        _store_normal(normal, row, solid, gx, gy, gz)
