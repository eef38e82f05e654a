"""Kernels of the field with analytic normals, over tiles of points.

With e the features, J their Jacobian and c_k the gradient of the density's logit into the sum of layer k, the gradient
of sigma is its slope times (J^T W_1^T c_1 + that of the blob). The MLP is piecewise linear: a gradient g into
J^T W_1^T c_1 reaches the weights as c_k (outer) t_k, with t_1 = J g and t_k+1 = mask_k W_k t_k, and the table through
(W_1^T c_1) . J g, which is linear in its entries.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import jit, tl
from dream_fast.kernels.fields.encode import (
    activate,
    blob,
    blob_slope,
    density_slope,
    encode,
    outputs_gradient,
    store_channels,
    store_vector,
)
from dream_fast.kernels.fields.mlp import COLUMNS, dot, mlp, mlp_backward, mlp_weights, weight
from dream_fast.kernels.fields.normals_device import limit_rows, load_vector, normal_backward, normal_of


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
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    SINGLE: tl.constexpr = DTYPE == tl.float32
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start + tl.arange(0, BLOCK)
    limit = limit_rows(count, n)
    if start >= limit:
        zero = tl.zeros((BLOCK,), tl.float32)
        tl.store(sigma + row, zero, mask=row < n)
        store_vector(albedo, row, row < n, zero, zero, zero)
        store_vector(normal, row, row < n, zero, zero, zero)
        return
    live = row < limit
    px, py, pz = load_vector(x, row, live)
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
    )
    weights = mlp_weights(parameters, WIDTH, LAYERS, LEVELS, FEATURES, PADDED)
    outputs, hidden = mlp(features, weights, parameters, WIDTH, LAYERS, LEVELS, FEATURES)
    bump = blob(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
    density, red, green, blue, raw = activate(outputs, bump, SOFTPLUS, SINGLE)
    back, into_features = mlp_backward(_first_output(BLOCK), hidden, weights, DTYPE, LAYERS, FEATURES)
    slope = density_slope(raw, density, SOFTPLUS)
    outward = blob_slope(px, py, pz, blob_density, blob_radius, SOFTPLUS)
    gx = slope * (_pull(by_u, into_features, FEATURES) * scale + outward * px)
    gy = slope * (_pull(by_v, into_features, FEATURES) * scale + outward * py)
    gz = slope * (_pull(by_w, into_features, FEATURES) * scale + outward * pz)
    nx, ny, nz = normal_of(gx, gy, gz)
    tl.store(sigma + row, tl.where(live, density, 0.0), mask=row < n)
    red, green, blue = tl.where(live, red, 0.0), tl.where(live, green, 0.0), tl.where(live, blue, 0.0)
    store_vector(albedo, row, row < n, red, green, blue)
    store_vector(normal, row, row < n, tl.where(live, nx, 0.0), tl.where(live, ny, 0.0), tl.where(live, nz, 0.0))


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
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes every so many-th tile and adds what layers FIRST to LAST get to its row of partial.

    With FIRST = 0 also writes to_features and backs (W_1^T c_1) [L * F, n], tangent (g, in unit coordinates) [n, 3] and
    to_points [n, 3] (the blob's part of the gradient into x, or None), up to the last live point.
    """
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    SINGLE: tl.constexpr = DTYPE == tl.float32
    limit = limit_rows(count, n)
    tiles = (limit + BLOCK - 1) // BLOCK
    weights = mlp_weights(parameters, WIDTH, LAYERS, LEVELS, FEATURES, PADDED)
    partial += tl.program_id(0).to(tl.int64) * size
    tile = tl.program_id(0).to(tl.int64)
    while tile < tiles:
        row = tile * BLOCK + tl.arange(0, BLOCK)
        live = row < limit
        px, py, pz = load_vector(x, row, live)
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
        )
        outputs, hidden = mlp(features, weights, parameters, WIDTH, LAYERS, LEVELS, FEATURES)
        bump = blob(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
        density, red, green, blue, raw = activate(outputs, bump, SOFTPLUS, SINGLE)
        back, into_features = mlp_backward(_first_output(BLOCK), hidden, weights, DTYPE, LAYERS, FEATURES)
        slope = density_slope(raw, density, SOFTPLUS)
        outward = blob_slope(px, py, pz, blob_density, blob_radius, SOFTPLUS)
        dx = _pull(by_u, into_features, FEATURES) * scale + outward * px
        dy = _pull(by_v, into_features, FEATURES) * scale + outward * py
        dz = _pull(by_w, into_features, FEATURES) * scale + outward * pz
        tx, ty, tz = load_vector(to_normal, row, live)
        # The slope scales the gradient alone, of which the normal feels nothing.
        gx, gy, gz = normal_backward(slope * dx, slope * dy, slope * dz, tx, ty, tz)
        to_logit = tl.load(to_sigma + row, mask=live, other=0.0) * slope
        gx, gy, gz = gx * slope, gy * slope, gz * slope

        pushed = _push(by_u, by_v, by_w, gx * scale, gy * scale, gz * scale, FEATURES)
        tangents = _mlp_tangents(pushed, hidden, weights, DTYPE, LAYERS, FEATURES)
        to_red, to_green, to_blue = load_vector(to_albedo, row, live)
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
            store_channels(to_features, to_inputs, row, live, n, LEVELS, FEATURES, PADDED)
            store_channels(backs, into_features, row, live, n, LEVELS, FEATURES, PADDED)
            store_vector(tangent, row, live, gx * scale, gy * scale, gz * scale)
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
                store_vector(to_points, row, live, bx, by, bz)
        # Other lanes may read next what this tile added to `partial`.
        tl.debug_barrier()
        tile += tl.num_programs(0)
