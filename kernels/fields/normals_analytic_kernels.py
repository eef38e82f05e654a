"""Kernels of the field with analytic normals, over tiles of points.

With e the features, J their Jacobian d e / d x and c_k the derivative of the density's logit by the sum of layer k, the
gradient of sigma is its slope times (J^T W_1^T c_1 + the gradient of the blob). The MLP is piecewise linear: a gradient
g of J^T W_1^T c_1 reaches the weights of layer k as c_k (outer) t_k, with t_1 = J g and t_k+1 = mask_k W_k t_k, and the
table through (W_1^T c_1) . J g, which is linear in its entries.

Legend: N points; SHAPE = `fields.encode.FieldShape`; logit_slopes = c, feature_slopes = W_1^T c_1, tangents = t.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import jit, tl
from dream_fast.kernels.fields.activations import activate, blob_logit, blob_slope, density_slope, join_output_grads
from dream_fast.kernels.fields.encode import encode, load_vector, store_channels, store_vector
from dream_fast.kernels.fields.mlp import COLUMNS, dot, mlp, mlp_bwd, mlp_weights, weight
from dream_fast.kernels.fields.normals_device import live_points, normal_bwd, normal_of


@jit
def _first_output(BLOCK: tl.constexpr):
    """Derivative of the density's logit by the outputs: 1 in the first column."""
    return tl.where(tl.arange(0, COLUMNS)[None, :] == 0, 1.0, tl.zeros([BLOCK, COLUMNS], tl.float32))


@jit
def _vjp(jacobian, feature_slopes, FEATURES: tl.constexpr):
    """One component [BLOCK] of J^T feature_slopes, from that column of J."""
    total = jacobian[0] * feature_slopes[0]
    for f in tl.static_range(1, FEATURES):
        total += jacobian[f] * feature_slopes[f]
    return tl.sum(total, 1)


@jit
def _jvp(by_u, by_v, by_w, gu, gv, gw, FEATURES: tl.constexpr):
    """J g, F tiles [BLOCK, PADDED], from the three columns of J."""
    product = ()
    for f in tl.static_range(FEATURES):
        product = product + (by_u[f] * gu[:, None] + by_v[f] * gv[:, None] + by_w[f] * gw[:, None],)
    return product


@jit
def _mlp_jvp(feature_tangents, hidden, weights, DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """Tangents of the features -> tangents of the hidden values, LAYERS tiles [BLOCK, H]."""
    LAYERS: tl.constexpr = SHAPE.layers
    FEATURES: tl.constexpr = SHAPE.features
    acc = dot(feature_tangents[0].to(DTYPE), weight(weights, 0, SHAPE))
    for f in tl.static_range(1, FEATURES):
        acc = dot(feature_tangents[f].to(DTYPE), weight(weights, f, SHAPE), acc)
    values = ()
    for layer in tl.static_range(LAYERS):
        value = tl.where(hidden[layer] > 0, acc, 0.0).to(DTYPE)
        values = values + (value,)
        if layer < LAYERS - 1:
            acc = dot(value, weight(weights, FEATURES + layer, SHAPE))
    return values


@jit
def _add(pointer, value, mask):
    tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) + value, mask=mask)


@jit
def _mlp_bwd_add(
    grad_outputs,
    features,
    hidden,
    feature_tangents,
    hidden_tangents,
    logit_slopes,
    weights,
    partial_sums,  # [P] fp32
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Gradient of the outputs -> gradients of the features, F tiles [BLOCK, PADDED] in fp32.

    Adds the tile's gradients of layers FIRST to LAST to `partial_sums`: weights, through values and through tangents,
    and biases. Sums that stayed in registers from tile to tile would not leave enough of them for the Jacobian.
    """
    WIDTH: tl.constexpr = SHAPE.width
    LAYERS: tl.constexpr = SHAPE.layers
    LEVELS: tl.constexpr = SHAPE.levels
    FEATURES: tl.constexpr = SHAPE.features
    PADDED: tl.constexpr = SHAPE.padded
    row = tl.arange(0, WIDTH)[:, None]
    level = tl.arange(0, PADDED)[None, :]
    column = tl.arange(0, COLUMNS)
    biases = partial_sums + WIDTH * LEVELS * FEATURES + (LAYERS - 1) * WIDTH * WIDTH + 4 * WIDTH
    gradient = grad_outputs.to(DTYPE)
    for layer in tl.static_range(LAYERS, -1, -1):
        if layer >= FIRST and layer <= LAST:
            if layer == 0:
                for f in tl.static_range(FEATURES):
                    part = dot(tl.trans(gradient), features[f].to(DTYPE))
                    part = dot(tl.trans(logit_slopes[0]), feature_tangents[f].to(DTYPE), part)
                    _add(partial_sums + row * (LEVELS * FEATURES) + level * FEATURES + f, part, level < LEVELS)
            else:
                start = partial_sums + WIDTH * LEVELS * FEATURES + (layer - 1) * WIDTH * WIDTH
                if layer < LAYERS:
                    part = dot(tl.trans(gradient), hidden[layer - 1])
                    part = dot(tl.trans(logit_slopes[layer]), hidden_tangents[layer - 1], part)
                    _add(start + row * WIDTH + tl.arange(0, WIDTH)[None, :], part, row >= 0)
                else:
                    part = dot(tl.trans(hidden[layer - 1]), gradient)
                    part = dot(tl.trans(hidden_tangents[layer - 1]), logit_slopes[layer], part)
                    _add(start + column[None, :] * WIDTH + row, part, column[None, :] < 4)
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
            grad_hidden = dot(gradient, tl.trans(weight(weights, FEATURES + layer - 1, SHAPE)))
            gradient = tl.where(hidden[layer - 1] <= 0, 0.0, grad_hidden).to(DTYPE)
    feature_grads = ()
    for f in tl.static_range(FEATURES):
        feature_grads = feature_grads + (dot(gradient, tl.trans(weight(weights, f, SHAPE))),)
    return feature_grads


@jit
def field_normals_analytic_fwd_kernel(
    x,  # [N, 3] fp32
    table,  # [table rows, F] in the compute dtype
    parameters,  # [P] in the compute dtype
    levels,  # [PADDED] int64
    active,  # [] integer or None
    count,  # [] int64 or None
    sigma,  # [N] fp32
    albedo,  # [N, 3] fp32
    normal,  # [N, 3] fp32
    n,
    scale,
    blob_density,
    blob_radius,
    SHAPE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    SINGLE: tl.constexpr = DTYPE == tl.float32
    FEATURES: tl.constexpr = SHAPE.features
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start + tl.arange(0, BLOCK)
    limit = live_points(count, n)
    if start >= limit:
        zero = tl.zeros((BLOCK,), tl.float32)
        tl.store(sigma + row, zero, mask=row < n)
        store_vector(albedo, row, row < n, zero, zero, zero)
        store_vector(normal, row, row < n, zero, zero, zero)
        return
    live = row < limit
    px, py, pz = load_vector(x, row, live)
    features, by_u, by_v, by_w = encode(
        px * scale + 0.5, py * scale + 0.5, pz * scale + 0.5, table, levels, active, SHAPE, True
    )
    weights = mlp_weights(parameters, SHAPE)
    outputs, hidden = mlp(features, weights, parameters, SHAPE)
    blob = blob_logit(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
    density, red, green, blue, logit = activate(outputs, blob, SOFTPLUS, SINGLE)
    _, feature_slopes = mlp_bwd(_first_output(BLOCK), hidden, weights, DTYPE, SHAPE)
    slope = density_slope(logit, density, SOFTPLUS)
    outward = blob_slope(px, py, pz, blob_density, blob_radius, SOFTPLUS)
    gx = slope * (_vjp(by_u, feature_slopes, FEATURES) * scale + outward * px)
    gy = slope * (_vjp(by_v, feature_slopes, FEATURES) * scale + outward * py)
    gz = slope * (_vjp(by_w, feature_slopes, FEATURES) * scale + outward * pz)
    nx, ny, nz = normal_of(gx, gy, gz)
    tl.store(sigma + row, tl.where(live, density, 0.0), mask=row < n)
    red, green, blue = tl.where(live, red, 0.0), tl.where(live, green, 0.0), tl.where(live, blue, 0.0)
    store_vector(albedo, row, row < n, red, green, blue)
    store_vector(normal, row, row < n, tl.where(live, nx, 0.0), tl.where(live, ny, 0.0), tl.where(live, nz, 0.0))


@jit
def field_normals_analytic_bwd_kernel(
    x,  # [N, 3] fp32
    table,  # [table rows, F] in the compute dtype
    parameters,  # [P] in the compute dtype
    levels,  # [PADDED] int64
    active,  # [] integer or None
    count,  # [] int64 or None
    grad_sigma,  # [N] fp32
    grad_albedo,  # [N, 3] fp32
    grad_normal,  # [N, 3] fp32
    grad_features,  # [L * F, N] in the compute dtype
    slopes,  # [L * F, N] in the compute dtype, W_1^T c_1
    tangent,  # [N, 3] fp32, g in unit coordinates
    grad_x,  # [N, 3] fp32, gets the blob's part; or None
    partial_sums,  # [programs, size] fp32, is added to
    n,
    size,
    scale,
    blob_density,
    blob_radius,
    SHAPE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes every so many-th tile and adds the gradients of layers FIRST to LAST to its row of sums.

    With FIRST = 0 it also writes grad_features, slopes, tangent and grad_x up to the last live point.
    """
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    SINGLE: tl.constexpr = DTYPE == tl.float32
    FEATURES: tl.constexpr = SHAPE.features
    limit = live_points(count, n)
    tiles = (limit + BLOCK - 1) // BLOCK
    weights = mlp_weights(parameters, SHAPE)
    partial_sums += tl.program_id(0).to(tl.int64) * size
    tile = tl.program_id(0).to(tl.int64)
    while tile < tiles:
        row = tile * BLOCK + tl.arange(0, BLOCK)
        live = row < limit
        px, py, pz = load_vector(x, row, live)
        features, by_u, by_v, by_w = encode(
            px * scale + 0.5, py * scale + 0.5, pz * scale + 0.5, table, levels, active, SHAPE, True
        )
        outputs, hidden = mlp(features, weights, parameters, SHAPE)
        blob = blob_logit(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
        density, red, green, blue, logit = activate(outputs, blob, SOFTPLUS, SINGLE)
        logit_slopes, feature_slopes = mlp_bwd(_first_output(BLOCK), hidden, weights, DTYPE, SHAPE)
        slope = density_slope(logit, density, SOFTPLUS)
        outward = blob_slope(px, py, pz, blob_density, blob_radius, SOFTPLUS)
        dx = _vjp(by_u, feature_slopes, FEATURES) * scale + outward * px
        dy = _vjp(by_v, feature_slopes, FEATURES) * scale + outward * py
        dz = _vjp(by_w, feature_slopes, FEATURES) * scale + outward * pz
        grad_nx, grad_ny, grad_nz = load_vector(grad_normal, row, live)
        # The slope scales the gradient without turning it: the normal does not depend on it.
        gx, gy, gz = normal_bwd(slope * dx, slope * dy, slope * dz, grad_nx, grad_ny, grad_nz)
        grad_logit = tl.load(grad_sigma + row, mask=live, other=0.0) * slope
        gx, gy, gz = gx * slope, gy * slope, gz * slope

        feature_tangents = _jvp(by_u, by_v, by_w, gx * scale, gy * scale, gz * scale, FEATURES)
        hidden_tangents = _mlp_jvp(feature_tangents, hidden, weights, DTYPE, SHAPE)
        grad_red, grad_green, grad_blue = load_vector(grad_albedo, row, live)
        grad_red, grad_green, grad_blue = (
            grad_red * red * (1 - red),
            grad_green * green * (1 - green),
            grad_blue * blue * (1 - blue),
        )
        feature_grads = _mlp_bwd_add(
            join_output_grads(grad_logit, grad_red, grad_green, grad_blue),
            features,
            hidden,
            feature_tangents,
            hidden_tangents,
            logit_slopes,
            weights,
            partial_sums,
            FIRST,
            LAST,
            DTYPE,
            BLOCK,
            SHAPE,
        )
        if FIRST == 0:
            store_channels(grad_features, feature_grads, row, live, n, SHAPE)
            store_channels(slopes, feature_slopes, row, live, n, SHAPE)
            store_vector(tangent, row, live, gx * scale, gy * scale, gz * scale)
            if grad_x is not None:
                # Through the blob's gradient, outward * x, to x.
                squared = px * px + py * py + pz * pz
                if SOFTPLUS:
                    width = tl.maximum(squared, 1e-12)
                else:
                    width = blob_radius * blob_radius + squared * 0.0
                radial = (px * gx + py * gy + pz * gz) / width
                bx = outward * (grad_logit * px + gx - px * radial)
                by = outward * (grad_logit * py + gy - py * radial)
                bz = outward * (grad_logit * pz + gz - pz * radial)
                store_vector(grad_x, row, live, bx, by, bz)
        # Other lanes may read next what this tile added to `partial_sums`.
        tl.debug_barrier()
        tile += tl.num_programs(0)
