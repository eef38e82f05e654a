"""Kernels of the field with normals, over tiles of points; `field_normals` says what they compute.

By differences: the seven points of a sample (taps: the centre, then plus and minus a step along x, y and z) run one
after the other through one encoding and MLP. Forward keeps the gradient of sigma, so that backward, which recomputes
the rest, needs each tap once; what goes into the table is written tap by tap, so that rays stay in order.

Analytic: with e the features, J their Jacobian and c_k the gradient of the density's logit into the sum of layer k,
the gradient of sigma is its slope times (J^T W_1^T c_1 + that of the blob). The MLP is piecewise linear: a gradient g
into J^T W_1^T c_1 reaches the weights as c_k (outer) t_k, with t_1 = J g and t_k+1 = mask_k W_k t_k, and the table
through (W_1^T c_1) . J g, which is linear in its entries.
"""

from __future__ import annotations

from dream_fast.kernels._grid import live_rows
from dream_fast.kernels._launch import constant, jit, tl
from dream_fast.kernels._tile import (
    COLUMNS,
    activate,
    activate_density,
    blob,
    blob_slope,
    density_slope,
    dot,
    encode,
    mlp,
    mlp_accumulate,
    mlp_backward,
    mlp_store,
    mlp_sums,
    mlp_weights,
    outputs_gradient,
    pick,
    weight,
)

TAPS = 7
_TAPS = constant(TAPS)
_FLOOR = constant(1e-20)  # of the squared gradient


@jit
def _limit(count, n):
    """Rows that hold points, as int64."""
    return tl.maximum(tl.zeros((), tl.int64) + live_rows(count, n), 0)


@jit
def _load(pointer, row, live):
    """Three numbers of each row."""
    return (
        tl.load(pointer + row * 3, mask=live, other=0.0),
        tl.load(pointer + row * 3 + 1, mask=live, other=0.0),
        tl.load(pointer + row * 3 + 2, mask=live, other=0.0),
    )


@jit
def _store(pointer, row, mask, x, y, z):
    tl.store(pointer + row * 3, x, mask=mask)
    tl.store(pointer + row * 3 + 1, y, mask=mask)
    tl.store(pointer + row * 3 + 2, z, mask=mask)


@jit
def _step(x, tap, PLUS: tl.constexpr, epsilon, bound):
    """A coordinate of a tap, held inside the cube, and whether it was free. PLUS: the tap that adds to this one."""
    moved = x + tl.where(tap == PLUS, epsilon, 0.0) - tl.where(tap == PLUS + 1, epsilon, 0.0)
    held = tl.minimum(tl.maximum(moved, -bound), bound)
    return tl.where(tap == 0, x, held), (tap == 0) | (moved == held)


@jit
def _unit(x, tap, scale):
    """World coordinate of a tap -> unit coordinate; rounding does not push a tap out of the cube."""
    u = x * scale + 0.5
    return tl.where(tap == 0, u, tl.minimum(tl.maximum(u, 0.0), 1.0))


@jit
def _normal(gx, gy, gz):
    inverse = tl.rsqrt(tl.maximum(gx * gx + gy * gy + gz * gz, _FLOOR))
    return -gx * inverse, -gy * inverse, -gz * inverse


@jit
def _normal_backward(gx, gy, gz, tx, ty, tz):
    """Gradient of sigma and gradient into the normal -> gradient into the former, and whether it is above the floor."""
    squared = gx * gx + gy * gy + gz * gz
    above = squared >= _FLOOR
    inverse = tl.rsqrt(tl.maximum(squared, _FLOOR))
    nx, ny, nz = -gx * inverse, -gy * inverse, -gz * inverse
    along = tl.where(above, nx * tx + ny * ty + nz * tz, 0.0)
    return inverse * (along * nx - tx), inverse * (along * ny - ty), inverse * (along * nz - tz), above


@jit
def _store_channels(
    pointer, tiles, row, mask, columns, LEVELS: tl.constexpr, FEATURES: tl.constexpr, PADDED: tl.constexpr
):
    """FEATURES tiles [BLOCK, PADDED] -> rows of a buffer [L * F, columns]."""
    # Transposed before the store, for the reason that `mlp_weights` gives.
    level = tl.arange(0, PADDED)
    for f in tl.static_range(FEATURES):
        at = pointer + (level.to(tl.int64) * FEATURES + f)[:, None] * columns + row[None, :]
        keep = mask[None, :] & (level[:, None] < LEVELS)
        tl.store(at, tl.trans(tiles[f].to(pointer.dtype.element_ty)), mask=keep)


# By differences.


@jit
def differences_fwd_kernel(
    x,
    table,
    parameters,
    levels,
    active,
    count,
    sigma,
    albedo,
    normal,
    gradient,
    n,
    scale,
    bound,
    epsilon,
    blob_density,
    blob_radius,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    LOG2_ENTRIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start + tl.arange(0, BLOCK)
    limit = _limit(count, n)
    gx = tl.zeros((BLOCK,), tl.float32)
    gy = tl.zeros((BLOCK,), tl.float32)
    gz = tl.zeros((BLOCK,), tl.float32)
    if start >= limit:
        tl.store(sigma + row, gx, mask=row < n)
        _store(albedo, row, row < n, gx, gx, gx)
        _store(normal, row, row < n, gx, gx, gx)
        return
    live = row < limit
    x0, y0, z0 = _load(x, row, live)
    weights = mlp_weights(parameters, WIDTH, LAYERS, LEVELS, FEATURES, PADDED)
    for tap in range(_TAPS):
        px = _step(x0, tap, 1, epsilon, bound)[0]
        py = _step(y0, tap, 3, epsilon, bound)[0]
        pz = _step(z0, tap, 5, epsilon, bound)[0]
        u, v, w = _unit(px, tap, scale), _unit(py, tap, scale), _unit(pz, tap, scale)
        features = encode(
            u, v, w, table, levels, active, LEVELS, FEATURES, PADDED, LOG2_ENTRIES, SMOOTH, WIDE, False, PAIRS
        )
        outputs = mlp(features, weights, parameters, WIDTH, LAYERS, LEVELS, FEATURES)[0]
        bump = blob(px, py, pz, blob_density, blob_radius, SOFTPLUS)
        if tap == 0:
            density, red, green, blue, raw = activate(outputs, bump, SOFTPLUS)
            tl.store(sigma + row, tl.where(live, density, 0.0), mask=row < n)
            red, green, blue = tl.where(live, red, 0.0), tl.where(live, green, 0.0), tl.where(live, blue, 0.0)
            _store(albedo, row, row < n, red, green, blue)
        else:
            density = activate_density(pick(outputs, 0) + bump, SOFTPLUS)
            density = tl.where(tap % 2 == 1, density, -density)
            gx += tl.where(tap <= 2, density, 0.0)
            gy += tl.where((tap == 3) | (tap == 4), density, 0.0)
            gz += tl.where(tap >= 5, density, 0.0)
    gx, gy, gz = gx / (2.0 * epsilon), gy / (2.0 * epsilon), gz / (2.0 * epsilon)
    nx, ny, nz = _normal(gx, gy, gz)
    _store(normal, row, row < n, tl.where(live, nx, 0.0), tl.where(live, ny, 0.0), tl.where(live, nz, 0.0))
    _store(gradient, row, live, gx, gy, gz)


@jit
def differences_bwd_kernel(
    x,
    table,
    parameters,
    levels,
    active,
    count,
    gradient,
    to_sigma,
    to_albedo,
    to_normal,
    to_features,
    positions,
    to_raw,
    rows,
    partial,
    n,
    columns,
    size,
    scale,
    bound,
    epsilon,
    blob_density,
    blob_radius,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    LOG2_ENTRIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PAIRS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes a run of (tile, tap) pairs and adds up what layers FIRST to LAST get.

    With FIRST = 0 also writes to_features [L * F, columns], positions [columns, 3] and to_raw [columns] (may be None)
    at column tap * (padded number of points) + point, and to `rows` how many columns those are.
    """
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    limit = _limit(count, n)
    tiles = (limit + BLOCK - 1) // BLOCK
    if FIRST == 0:
        if tl.program_id(0) == 0:
            tl.store(rows, tiles * (BLOCK * _TAPS))
    share = (tiles * _TAPS + tl.num_programs(0) - 1) // tl.num_programs(0)
    item = tl.program_id(0) * share
    end = tl.minimum(item + share, tiles * _TAPS)
    weights = mlp_weights(parameters, WIDTH, LAYERS, LEVELS, FEATURES, PADDED)
    sums = mlp_sums(BLOCK, DTYPE, FIRST, LAST, WIDTH, LAYERS, FEATURES, PADDED)
    while item < end:
        tap = item % _TAPS
        row = item // _TAPS * BLOCK + tl.arange(0, BLOCK)
        live = row < limit
        x0, y0, z0 = _load(x, row, live)
        px = _step(x0, tap, 1, epsilon, bound)[0]
        py = _step(y0, tap, 3, epsilon, bound)[0]
        pz = _step(z0, tap, 5, epsilon, bound)[0]
        u, v, w = _unit(px, tap, scale), _unit(py, tap, scale), _unit(pz, tap, scale)
        features = encode(
            u, v, w, table, levels, active, LEVELS, FEATURES, PADDED, LOG2_ENTRIES, SMOOTH, WIDE, False, PAIRS
        )
        outputs, hidden = mlp(features, weights, parameters, WIDTH, LAYERS, LEVELS, FEATURES)
        bump = blob(px, py, pz, blob_density, blob_radius, SOFTPLUS)
        density, red, green, blue, raw = activate(outputs, bump, SOFTPLUS)
        # Only the centre has a colour.
        centre = live & (tap == 0)
        to_red, to_green, to_blue = _load(to_albedo, row, centre)
        to_red, to_green, to_blue = (
            to_red * red * (1 - red),
            to_green * green * (1 - green),
            to_blue * blue * (1 - blue),
        )
        to_density = tl.load(to_sigma + row, mask=centre, other=0.0)
        gx, gy, gz = _load(gradient, row, live & (tap > 0))
        tx, ty, tz = _load(to_normal, row, live & (tap > 0))
        gx, gy, gz, above = _normal_backward(gx, gy, gz, tx, ty, tz)
        along = tl.where(tap <= 2, gx, tl.where(tap <= 4, gy, gz)) / (2.0 * epsilon)
        to_density += tl.where(tap % 2 == 1, along, -along)
        to_logit = to_density * density_slope(raw, density, SOFTPLUS)
        to_outputs = outputs_gradient(to_logit, to_red, to_green, to_blue)
        gradients, into_features = mlp_backward(to_outputs, hidden, weights, DTYPE, LAYERS, FEATURES)
        sums = mlp_accumulate(sums, features, hidden, gradients, BLOCK, DTYPE, FIRST, LAST, LAYERS, FEATURES)
        if FIRST == 0:
            column = tap * (tiles * BLOCK) + row
            every = row >= 0
            _store_channels(to_features, into_features, column, every, columns, LEVELS, FEATURES, PADDED)
            _store(positions, column, every, u, v, w)
            if to_raw is not None:
                tl.store(to_raw + column, to_logit)
        item += 1
    partial += tl.program_id(0).to(tl.int64) * size
    mlp_store(sums, partial, DTYPE, FIRST, LAST, WIDTH, LAYERS, LEVELS, FEATURES, PADDED)


@jit
def differences_points_kernel(
    x,
    to_units,
    to_raw,
    count,
    rows,
    out,
    n,
    scale,
    bound,
    epsilon,
    blob_density,
    blob_radius,
    SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients into the taps' unit coordinates [columns, 3] and logits [columns] -> into the points [n, 3]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < _limit(count, n)
    stride = tl.load(rows) // _TAPS
    x0, y0, z0 = _load(x, row, live)
    gx = tl.zeros((BLOCK,), tl.float32)
    gy = tl.zeros((BLOCK,), tl.float32)
    gz = tl.zeros((BLOCK,), tl.float32)
    for tap in range(_TAPS):
        px, free_x = _step(x0, tap, 1, epsilon, bound)
        py, free_y = _step(y0, tap, 3, epsilon, bound)
        pz, free_z = _step(z0, tap, 5, epsilon, bound)
        column = tap * stride + row
        along = tl.load(to_raw + column, mask=live, other=0.0)
        along *= blob_slope(px, py, pz, blob_density, blob_radius, SOFTPLUS)
        ux, uy, uz = _load(to_units, column, live)
        gx += tl.where(free_x, along * px + scale * ux, 0.0)
        gy += tl.where(free_y, along * py + scale * uy, 0.0)
        gz += tl.where(free_z, along * pz + scale * uz, 0.0)
    _store(out, row, row < n, tl.where(live, gx, 0.0), tl.where(live, gy, 0.0), tl.where(live, gz, 0.0))


# By differentiating the field.


@jit
def _first_output(BLOCK: tl.constexpr):
    """The gradient of the density's logit into the outputs."""
    return tl.where(tl.arange(0, COLUMNS)[None, :] == 0, 1.0, tl.zeros([BLOCK, COLUMNS], tl.float32))


@jit
def _pull(slopes, into_features, FEATURES: tl.constexpr):
    """One component [BLOCK] of J^T into_features."""
    total = slopes[0] * into_features[0]
    for f in tl.static_range(1, FEATURES):
        total += slopes[f] * into_features[f]
    return tl.sum(total, 1)


@jit
def _push(by_u, by_v, by_w, gu, gv, gw, FEATURES: tl.constexpr):
    """J g, FEATURES tiles."""
    pushed = ()
    for f in tl.static_range(FEATURES):
        pushed = pushed + (by_u[f] * gu[:, None] + by_v[f] * gv[:, None] + by_w[f] * gw[:, None],)
    return pushed


@jit
def _mlp_tangents(tangents, hidden, weights, DTYPE: tl.constexpr, LAYERS: tl.constexpr, FEATURES: tl.constexpr):
    """Tangents of the features -> tangents of the hidden values."""
    WIDTH: tl.constexpr = hidden[0].shape[1]
    acc = dot(tangents[0].to(DTYPE), weight(weights, 0, WIDTH, LAYERS, FEATURES))
    for f in tl.static_range(1, FEATURES):
        acc = dot(tangents[f].to(DTYPE), weight(weights, f, WIDTH, LAYERS, FEATURES), acc)
    values = ()
    for layer in tl.static_range(LAYERS):
        value = tl.where(hidden[layer] > 0, acc, 0.0).to(DTYPE)
        values = values + (value,)
        if layer < LAYERS - 1:
            acc = dot(value, weight(weights, FEATURES + layer, WIDTH, LAYERS, FEATURES))
    return values


@jit
def _add(pointer, value, mask):
    tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) + value, mask=mask)


@jit
def _backward_and_add(
    to_outputs,
    features,
    hidden,
    pushed,
    tangents,
    backs,
    weights,
    partial,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Gradient of the outputs -> gradients of the features, FEATURES tiles [BLOCK, PADDED] in fp32.

    Adds to partial what the tile gives layers FIRST to LAST: weights, through values and through tangents, and biases.
    Sums that stayed in registers from tile to tile would not leave enough for the Jacobian.
    """
    row = tl.arange(0, WIDTH)[:, None]
    level = tl.arange(0, PADDED)[None, :]
    column = tl.arange(0, COLUMNS)
    biases = partial + WIDTH * LEVELS * FEATURES + (LAYERS - 1) * WIDTH * WIDTH + 4 * WIDTH
    gradient = to_outputs.to(DTYPE)
    for layer in tl.static_range(LAYERS, -1, -1):
        if layer >= FIRST and layer <= LAST:
            if layer == 0:
                for f in tl.static_range(FEATURES):
                    part = dot(tl.trans(gradient), features[f].to(DTYPE))
                    part = dot(tl.trans(backs[0]), pushed[f].to(DTYPE), part)
                    _add(partial + row * (LEVELS * FEATURES) + level * FEATURES + f, part, level < LEVELS)
            else:
                at = partial + WIDTH * LEVELS * FEATURES + (layer - 1) * WIDTH * WIDTH
                if layer < LAYERS:
                    part = dot(tl.trans(gradient), hidden[layer - 1])
                    part = dot(tl.trans(backs[layer]), tangents[layer - 1], part)
                    _add(at + row * WIDTH + tl.arange(0, WIDTH)[None, :], part, row >= 0)
                else:
                    part = dot(tl.trans(hidden[layer - 1]), gradient)
                    part = dot(tl.trans(tangents[layer - 1]), backs[layer], part)
                    _add(at + column[None, :] * WIDTH + row, part, column[None, :] < 4)
            if layer == LAYERS:
                _add(biases + layer * WIDTH + column, tl.sum(gradient.to(tl.float32), 0), column < 4)
            elif DTYPE == tl.float32:
                hidden_row = tl.arange(0, WIDTH)
                _add(biases + layer * WIDTH + hidden_row, tl.sum(gradient, 0), hidden_row >= 0)
            else:
                # A product with ones adds up over the points without leaving the tensor cores.
                part = dot(tl.trans(gradient), tl.full([BLOCK, COLUMNS], 1.0, DTYPE))
                _add(biases + layer * WIDTH + row + column[None, :], part, column[None, :] == 0)
        if layer > 0:
            to_hidden = dot(gradient, tl.trans(weight(weights, FEATURES + layer - 1, WIDTH, LAYERS, FEATURES)))
            gradient = tl.where(hidden[layer - 1] <= 0, 0.0, to_hidden).to(DTYPE)
    to_features = ()
    for f in tl.static_range(FEATURES):
        to_features = to_features + (dot(gradient, tl.trans(weight(weights, f, WIDTH, LAYERS, FEATURES))),)
    return to_features


@jit
def analytic_fwd_kernel(
    x,
    table,
    parameters,
    levels,
    active,
    count,
    sigma,
    albedo,
    normal,
    n,
    scale,
    blob_density,
    blob_radius,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    LOG2_ENTRIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start + tl.arange(0, BLOCK)
    limit = _limit(count, n)
    if start >= limit:
        zero = tl.zeros((BLOCK,), tl.float32)
        tl.store(sigma + row, zero, mask=row < n)
        _store(albedo, row, row < n, zero, zero, zero)
        _store(normal, row, row < n, zero, zero, zero)
        return
    live = row < limit
    px, py, pz = _load(x, row, live)
    features, by_u, by_v, by_w = encode(
        px * scale + 0.5,
        py * scale + 0.5,
        pz * scale + 0.5,
        table,
        levels,
        active,
        LEVELS,
        FEATURES,
        PADDED,
        LOG2_ENTRIES,
        SMOOTH,
        WIDE,
        True,
        PAIRS,
    )
    weights = mlp_weights(parameters, WIDTH, LAYERS, LEVELS, FEATURES, PADDED)
    outputs, hidden = mlp(features, weights, parameters, WIDTH, LAYERS, LEVELS, FEATURES)
    bump = blob(px, py, pz, blob_density, blob_radius, SOFTPLUS)
    density, red, green, blue, raw = activate(outputs, bump, SOFTPLUS)
    back, into_features = mlp_backward(_first_output(BLOCK), hidden, weights, DTYPE, LAYERS, FEATURES)
    slope = density_slope(raw, density, SOFTPLUS)
    outward = blob_slope(px, py, pz, blob_density, blob_radius, SOFTPLUS)
    gx = slope * (_pull(by_u, into_features, FEATURES) * scale + outward * px)
    gy = slope * (_pull(by_v, into_features, FEATURES) * scale + outward * py)
    gz = slope * (_pull(by_w, into_features, FEATURES) * scale + outward * pz)
    nx, ny, nz = _normal(gx, gy, gz)
    tl.store(sigma + row, tl.where(live, density, 0.0), mask=row < n)
    red, green, blue = tl.where(live, red, 0.0), tl.where(live, green, 0.0), tl.where(live, blue, 0.0)
    _store(albedo, row, row < n, red, green, blue)
    _store(normal, row, row < n, tl.where(live, nx, 0.0), tl.where(live, ny, 0.0), tl.where(live, nz, 0.0))


@jit
def analytic_bwd_kernel(
    x,
    table,
    parameters,
    levels,
    active,
    count,
    to_sigma,
    to_albedo,
    to_normal,
    to_features,
    backs,
    tangent,
    to_points,
    partial,
    n,
    size,
    scale,
    blob_density,
    blob_radius,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    LOG2_ENTRIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PAIRS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes every so many-th tile and adds what layers FIRST to LAST get to its row of partial.

    With FIRST = 0 also writes to_features and backs (W_1^T c_1) [L * F, n], tangent (g, in unit coordinates) [n, 3] and
    to_points [n, 3] (the blob's part of the gradient into x, or None), up to the last live point.
    """
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    limit = _limit(count, n)
    tiles = (limit + BLOCK - 1) // BLOCK
    weights = mlp_weights(parameters, WIDTH, LAYERS, LEVELS, FEATURES, PADDED)
    partial += tl.program_id(0).to(tl.int64) * size
    tile = tl.program_id(0).to(tl.int64)
    while tile < tiles:
        row = tile * BLOCK + tl.arange(0, BLOCK)
        live = row < limit
        px, py, pz = _load(x, row, live)
        features, by_u, by_v, by_w = encode(
            px * scale + 0.5,
            py * scale + 0.5,
            pz * scale + 0.5,
            table,
            levels,
            active,
            LEVELS,
            FEATURES,
            PADDED,
            LOG2_ENTRIES,
            SMOOTH,
            WIDE,
            True,
            PAIRS,
        )
        outputs, hidden = mlp(features, weights, parameters, WIDTH, LAYERS, LEVELS, FEATURES)
        bump = blob(px, py, pz, blob_density, blob_radius, SOFTPLUS)
        density, red, green, blue, raw = activate(outputs, bump, SOFTPLUS)
        back, into_features = mlp_backward(_first_output(BLOCK), hidden, weights, DTYPE, LAYERS, FEATURES)
        slope = density_slope(raw, density, SOFTPLUS)
        outward = blob_slope(px, py, pz, blob_density, blob_radius, SOFTPLUS)
        dx = _pull(by_u, into_features, FEATURES) * scale + outward * px
        dy = _pull(by_v, into_features, FEATURES) * scale + outward * py
        dz = _pull(by_w, into_features, FEATURES) * scale + outward * pz
        tx, ty, tz = _load(to_normal, row, live)
        gx, gy, gz, above = _normal_backward(slope * dx, slope * dy, slope * dz, tx, ty, tz)
        # The normal feels the slope only below the floor.
        curvature = slope
        if SOFTPLUS:
            curvature = slope * (1.0 - slope)
        to_slope = tl.where(above, 0.0, gx * dx + gy * dy + gz * dz)
        to_logit = tl.load(to_sigma + row, mask=live, other=0.0) * slope + to_slope * curvature
        gx, gy, gz = gx * slope, gy * slope, gz * slope

        pushed = _push(by_u, by_v, by_w, gx * scale, gy * scale, gz * scale, FEATURES)
        tangents = _mlp_tangents(pushed, hidden, weights, DTYPE, LAYERS, FEATURES)
        to_red, to_green, to_blue = _load(to_albedo, row, live)
        to_red, to_green, to_blue = (
            to_red * red * (1 - red),
            to_green * green * (1 - green),
            to_blue * blue * (1 - blue),
        )
        to_outputs = outputs_gradient(to_logit, to_red, to_green, to_blue)
        to_inputs = _backward_and_add(
            to_outputs,
            features,
            hidden,
            pushed,
            tangents,
            back,
            weights,
            partial,
            FIRST,
            LAST,
            DTYPE,
            BLOCK,
            WIDTH,
            LAYERS,
            LEVELS,
            FEATURES,
            PADDED,
        )
        if FIRST == 0:
            _store_channels(to_features, to_inputs, row, live, n, LEVELS, FEATURES, PADDED)
            _store_channels(backs, into_features, row, live, n, LEVELS, FEATURES, PADDED)
            _store(tangent, row, live, gx * scale, gy * scale, gz * scale)
            if to_points is not None:
                # Through the blob's gradient, outward * x, into x.
                squared = px * px + py * py + pz * pz
                if SOFTPLUS:
                    width = tl.maximum(squared, 1e-12)
                else:
                    width = blob_radius * blob_radius + squared * 0.0
                radial = (px * gx + py * gy + pz * gz) / width
                bx = outward * (to_logit * px + gx - px * radial)
                by = outward * (to_logit * py + gy - py * radial)
                bz = outward * (to_logit * pz + gz - pz * radial)
                _store(to_points, row, live, bx, by, bz)
        # Other lanes may read next what this tile added to `partial`.
        tl.debug_barrier()
        tile += tl.num_programs(0)
