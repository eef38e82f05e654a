"""Kernels of rendering for looking; `render` says what they compute.

Three kernels, none of which stores anything a sample. Enter: every ray walks to its first sample; those without one
get the background, the others are queued, SEGMENT neighbouring rays a queue. Shade: a program works through a queue
with BLOCK lanes, one sample of each lane's ray at a time through encoding and MLP; a lane whose ray has ended writes
it and takes the next of the queue. Normals: six taps of the field at the depth of each queued ray.

Legend: R rays. A cursor names an interval of a ray's lattice (`_rays`). Units: world units.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.fields.activations import activate_density, blob_logit
from dream_fast.kernels.fields.encode import encode
from dream_fast.kernels.fields.mlp import mlp, mlp_weights, pick
from dream_fast.kernels.rays.device import first_cursor, interval, occupied, ray_span, rounded

# A ray that gathers less than this has no surface worth a normal.
EMPTY_OPACITY = 1e-3
_EMPTY_OPACITY = constant(EMPTY_OPACITY)


@jit
def _load_vector(pointer, row, mask, other):
    """Rows of [R, 3] as three tiles."""
    x = tl.load(pointer + row * 3, mask=mask, other=other[0])
    y = tl.load(pointer + row * 3 + 1, mask=mask, other=other[1])
    z = tl.load(pointer + row * 3 + 2, mask=mask, other=other[2])
    return x, y, z


@jit
def _store_vector(pointer, row, mask, value):
    tl.store(pointer + row * 3, value[0], mask=mask)
    tl.store(pointer + row * 3 + 1, value[1], mask=mask)
    tl.store(pointer + row * 3 + 2, value[2], mask=mask)


@jit
def _column(outputs, lane, COLUMN: tl.constexpr):
    """One output of the MLP of each lane. The compiler carries the layout of a matrix product on to all that is done
    with its elements, here to the rays and with them to the hash grid's gathers, which are slow in it; a gather over
    the lanes stops it."""
    return tl.gather(pick(outputs, COLUMN), lane, 0)


@jit
def _probe(
    cursor,
    near,
    far,
    o,
    d,
    live,
    bits,
    bound,
    last_scale,
    shortest,
    longest,
    dt_gamma,
    GROWS: tl.constexpr,
    RESOLUTION: tl.constexpr,
    CASCADES: tl.constexpr,
    PROBES: tl.constexpr,
):
    """The next PROBES intervals -> cursor (of the first sample among them, else behind them), found, not past far.

    All are looked up before any is judged, so that the loads overlap.
    """
    target = cursor
    found = live & (cursor != cursor)
    inside = live
    for _ in tl.static_range(PROBES):
        t, _, following = interval(cursor, near, shortest, longest, dt_gamma, GROWS)
        inside = live & (t < far)
        x, y, z = o[0] + rounded(t * d[0]), o[1] + rounded(t * d[1]), o[2] + rounded(t * d[2])
        hit = inside & occupied(x, y, z, bits, inside, bound, last_scale, RESOLUTION, CASCADES)
        target = tl.where(found, target, cursor)
        found = found | hit
        cursor = following
    return tl.where(found, target, cursor), found, inside


@jit
def render_enter_kernel(
    origins,
    directions,
    bits,
    background,
    rgb,
    normal,
    depth,
    opacity,
    queue,  # int32 [segments, SEGMENT]: rays of the segment that have a sample
    cursors,  # fp32 [segments, SEGMENT]: where that is
    lengths,  # int32 [segments]
    rays,
    bound,
    min_near,
    last_scale,
    shortest,
    longest,
    dt_gamma,
    PER_RAY: tl.constexpr,
    GROWS: tl.constexpr,
    RESOLUTION: tl.constexpr,
    CASCADES: tl.constexpr,
    SEGMENT: tl.constexpr,
    PROBES: tl.constexpr,
):
    """Segment `program`: the first sample of each ray; rays that have none are finished here."""
    first = tl.program_id(0).to(tl.int64) * SEGMENT
    lane = tl.arange(0, SEGMENT)
    row = first + lane
    there = row < rays
    o = _load_vector(origins, row, there, (0.0, 0.0, 0.0))
    d = _load_vector(directions, row, there, (1.0, 1.0, 1.0))
    near, far = ray_span(o[0], o[1], o[2], d[0], d[1], d[2], bound, min_near)
    cursor = first_cursor(near, GROWS)
    searching = there & (near < far)
    found = there & (near != near)
    while tl.max(searching.to(tl.int32), 0) > 0:
        moved, hit, inside = _probe(
            cursor,
            near,
            far,
            o,
            d,
            searching,
            bits,
            bound,
            last_scale,
            shortest,
            longest,
            dt_gamma,
            GROWS,
            RESOLUTION,
            CASCADES,
            PROBES,
        )
        cursor = tl.where(searching, moved, cursor)
        found = found | hit
        searching = inside & (hit == 0)
    place = first + tl.cumsum(found.to(tl.int32), 0) - 1
    tl.store(queue + place, lane, mask=found)
    tl.store(cursors + place, cursor, mask=found)
    tl.store(lengths + tl.program_id(0), tl.sum(found.to(tl.int32), 0))
    zero = tl.zeros([SEGMENT], tl.float32)
    missed = there & (found == 0)
    behind = _load_vector(background, row if PER_RAY else row * 0, missed, (0.0, 0.0, 0.0))
    _store_vector(rgb, row, missed, behind)
    _store_vector(normal, row, there, (zero, zero, zero))
    tl.store(depth + row, zero, mask=missed)
    tl.store(opacity + row, zero, mask=missed)


@jit
def _opacity_of(tau):
    """1 - exp(-tau), without losing the digits of a small tau."""
    series = tau * (1 - tau * (1 / 2) * (1 - tau * (1 / 3) * (1 - tau * (1 / 4) * (1 - tau * (1 / 5)))))
    return tl.where(tau < 0.1, series, 1 - tl.exp(-tau))


@jit
def _add(total, value, lost):
    """A sum and what rounding takes from it, so that it can be given back (Kahan, 1965)."""
    value -= lost
    new = total + value
    return new, (new - total) - value


@jit
def render_shade_kernel(
    origins,
    directions,
    bits,
    background,
    table,
    levels,
    active,
    parameters,
    rgb,
    depth,
    opacity,
    queue,
    cursors,
    lengths,
    bound,
    min_near,
    last_scale,
    shortest,
    longest,
    dt_gamma,
    stop,
    max_steps,
    scale,
    blob_density,
    blob_radius,
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
    """The rays of one queue, BLOCK at a time. A ray's result does not depend on the lane that takes it."""
    first = tl.program_id(0).to(tl.int64) * SEGMENT
    length = tl.load(lengths + tl.program_id(0))
    if length == 0:
        return
    SINGLE: tl.constexpr = parameters.dtype.element_ty == tl.float32
    weights = mlp_weights(parameters, SHAPE)
    lane = tl.arange(0, BLOCK)
    slot = lane
    taken = 0
    taking = slot >= 0  # lanes that need a ray
    live = slot < 0  # lanes that have one
    ready = live  # lanes whose cursor is at a sample
    zero = tl.zeros([BLOCK], tl.float32)
    row = slot.to(tl.int64)
    o, d = (zero, zero, zero), (zero, zero, zero)
    near, far, cursor = zero, zero, zero
    passed, red, green, blue, deep, total = zero, zero, zero, zero, zero, zero
    lost_depth, lost = zero, zero  # what rounding took from the sums
    depth_limit = tl.minimum(-tl.log(stop), 87.0)  # optical depth behind which nothing counts
    samples = slot
    working = length > 0
    while working:
        # Free lanes take the next rays of the queue.
        slot = tl.where(taking, taken + tl.cumsum(taking.to(tl.int32), 0) - 1, slot)
        taken += tl.sum(taking.to(tl.int32), 0)
        fresh = taking & (slot < length)
        row = tl.where(fresh, first + tl.load(queue + first + slot, mask=fresh, other=0), row)
        o = _load_vector(origins, row, fresh, o)
        d = _load_vector(directions, row, fresh, d)
        cursor = tl.load(cursors + first + slot, mask=fresh, other=cursor)
        near, far = ray_span(o[0], o[1], o[2], d[0], d[1], d[2], bound, min_near)
        passed = tl.where(fresh, 0.0, passed)
        red, green, blue = tl.where(fresh, 0.0, red), tl.where(fresh, 0.0, green), tl.where(fresh, 0.0, blue)
        deep, total = tl.where(fresh, 0.0, deep), tl.where(fresh, 0.0, total)
        lost_depth, lost = tl.where(fresh, 0.0, lost_depth), tl.where(fresh, 0.0, lost)
        samples = tl.where(fresh, 0, samples)
        live = (live & (taking == 0)) | fresh
        ready = (ready & (taking == 0)) | fresh

        # One sample of every ready lane; the others are outside the cube, where nothing is looked up far away.
        t, dt, following = interval(cursor, near, shortest, longest, dt_gamma, GROWS)
        x, y, z = o[0] + rounded(t * d[0]), o[1] + rounded(t * d[1]), o[2] + rounded(t * d[2])
        features = encode(
            tl.where(ready, x * scale + 0.5, 2.0),
            y * scale + 0.5,
            z * scale + 0.5,
            table,
            levels,
            active,
            SHAPE,
        )
        outputs, _ = mlp(features, weights, parameters, SHAPE)
        blob = blob_logit(x, y, z, blob_density, blob_radius, SOFTPLUS, SINGLE)
        sigma = activate_density(_column(outputs, lane, 0) + blob, SOFTPLUS, SINGLE)
        r, g, b = _column(outputs, lane, 1), _column(outputs, lane, 2), _column(outputs, lane, 3)
        r, g, b = tl.sigmoid(r), tl.sigmoid(g), tl.sigmoid(b)
        tau = sigma * dt
        # What is left is rounded once: a product of hundreds of factors would be rounded at each.
        weight = tl.where(ready, _opacity_of(tau) * tl.exp(-passed), 0.0)
        passed += tl.where(ready, tau, 0.0)
        red, green, blue = red + weight * r, green + weight * g, blue + weight * b
        if SINGLE:
            # A normal is taken at this depth, and turns by as much as a cell of the finest level is wide.
            deep, lost_depth = _add(deep, weight * t, lost_depth)
            total, lost = _add(total, weight, lost)
        else:
            deep, total = deep + weight * t, total + weight
        samples = tl.where(ready, samples + 1, samples)
        cursor = tl.where(ready, following, cursor)

        # The next sample of each, or a part of the way: lanes that have one do not wait long for those that do not.
        ended = live & ((passed > depth_limit) | (samples >= max_steps))
        ready = slot < 0
        searching = live & (ended == 0)
        walked = 0
        while (walked < WALK) & (tl.max(searching.to(tl.int32), 0) > 0):
            moved, hit, inside = _probe(
                cursor,
                near,
                far,
                o,
                d,
                searching,
                bits,
                bound,
                last_scale,
                shortest,
                longest,
                dt_gamma,
                GROWS,
                RESOLUTION,
                CASCADES,
                PROBES,
            )
            cursor = tl.where(searching, moved, cursor)
            ready = ready | hit
            ended = ended | (searching & (hit == 0) & (inside == 0))
            searching = searching & (hit == 0) & inside
            walked += PROBES

        behind = _load_vector(background, row if PER_RAY else row * 0, ended, (0.0, 0.0, 0.0))
        through = 1 - total
        color = (red + through * behind[0], green + through * behind[1], blue + through * behind[2])
        _store_vector(rgb, row, ended, color)
        tl.store(depth + row, deep, mask=ended)
        tl.store(opacity + row, total, mask=ended)
        live = live & (ended == 0)
        taking = live == 0
        working = (tl.max(live.to(tl.int32), 0) > 0) | (taken < length)


@jit
def _store_normal(normal, row, mask, gx, gy, gz):
    """Against the gradient of sigma, of length 1 or, where that vanishes, 0."""
    inverse = -tl.rsqrt(tl.maximum(gx * gx + gy * gy + gz * gz, 1e-20))
    _store_vector(normal, row, mask, (gx * inverse, gy * inverse, gz * inverse))


@jit
def render_normals_kernel(
    origins,
    directions,
    table,
    levels,
    active,
    parameters,
    normal,
    depth,
    opacity,
    queue,
    lengths,
    bound,
    epsilon,
    scale,
    blob_density,
    blob_radius,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """BLOCK rays of a queue: differences of sigma around the expected depth."""
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
    total = tl.load(opacity + row, mask=slots < length, other=0.0)
    solid = total > _EMPTY_OPACITY
    t = tl.load(depth + row, mask=solid, other=0.0) / tl.where(solid, total, 1.0)
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
        features = encode(
            x * scale + 0.5,
            y * scale + 0.5,
            z * scale + 0.5,
            table,
            levels,
            active,
            SHAPE,
        )
        outputs, _ = mlp(features, weights, parameters, SHAPE)
        blob = blob_logit(x, y, z, blob_density, blob_radius, SOFTPLUS, SINGLE)
        sigma = activate_density(_column(outputs, lane, 0) + blob, SOFTPLUS, SINGLE)
        change = tl.where(tap % 2 == 0, sigma, -sigma) / (2 * epsilon)
        gx += tl.where(tap // 2 == 0, change, 0.0)
        gy += tl.where(tap // 2 == 1, change, 0.0)
        gz += tl.where(tap // 2 == 2, change, 0.0)
        if not SINGLE:
            if tap == 5:
                # Behind a store the compiler does not move the loads of the biases out of the loop, where all of them
                # together take up to 128 registers.
                _store_normal(normal, row, solid, gx, gy, gz)
    if SINGLE:
        _store_normal(normal, row, solid, gx, gy, gz)
