"""Kernels of the field with normals by central differences, over tiles of points.

A point has seven taps: its centre, then plus and minus a step along x, y and z. They run one after the other through
one encoding and one MLP. The forward stores the gradient of sigma, so that the backward, which computes the rest again,
needs each tap once. The backward writes gradients for the table tap by tap of a tile: rays stay in order, and the taps,
which cancel, meet soon, so that their sums stay small and are rounded less.

Legend: N points, T tiles of BLOCK points, columns = 7 * BLOCK * T; SHAPE = `fields.encode.FieldShape`.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.fields.activations import (
    activate,
    activate_density,
    blob_logit,
    blob_slope,
    density_slope,
    join_output_grads,
)
from dream_fast.kernels.fields.encode import encode, load_vector, store_channels, store_vector
from dream_fast.kernels.fields.mlp import (
    mlp,
    mlp_bwd,
    mlp_weight_grad_add,
    mlp_weight_grad_store,
    mlp_weight_grad_zeros,
    mlp_weights,
    pick,
)
from dream_fast.kernels.fields.normals_device import live_points, normal_bwd, normal_of

TAPS = 7
_TAPS = constant(TAPS)


@jit
def _step(x, tap, PLUS: tl.constexpr, epsilon, bound):
    """A coordinate of a tap, clamped to the cube, and whether it was free. PLUS: the tap with a positive step."""
    moved = x + tl.where(tap == PLUS, epsilon, 0.0) - tl.where(tap == PLUS + 1, epsilon, 0.0)
    clamped = tl.minimum(tl.maximum(moved, -bound), bound)
    return tl.where(tap == 0, x, clamped), (tap == 0) | (moved == clamped)


@jit
def _unit(x, tap, scale):
    """World coordinate of a tap -> unit coordinate; rounding does not push a tap out of the cube."""
    u = x * scale + 0.5
    return tl.where(tap == 0, u, tl.minimum(tl.maximum(u, 0.0), 1.0))


@jit
def _column(tile, lane, tap, TILE: tl.constexpr):
    """Column of a tap of a point: the taps of a tile one after the other, the centre's, the largest, last."""
    return (tile * _TAPS + (_TAPS - 1 - tap)) * TILE + lane


@jit
def field_normals_fd_fwd_kernel(
    x,  # [N, 3] fp32
    table,  # [table rows, F] in the compute dtype
    parameters,  # [P] in the compute dtype
    levels,  # [PADDED] int64
    active,  # [] integer or None
    count,  # [] int64 or None
    sigma,  # [N] fp32
    albedo,  # [N, 3] fp32
    normal,  # [N, 3] fp32
    gradient,  # [N, 3] fp32, of sigma, for the backward
    n,
    scale,
    bound,
    epsilon,
    blob_density,
    blob_radius,
    SHAPE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SINGLE: tl.constexpr = parameters.dtype.element_ty == tl.float32
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start + tl.arange(0, BLOCK)
    limit = live_points(count, n)
    gx = tl.zeros((BLOCK,), tl.float32)
    gy = tl.zeros((BLOCK,), tl.float32)
    gz = tl.zeros((BLOCK,), tl.float32)
    if start >= limit:
        tl.store(sigma + row, gx, mask=row < n)
        store_vector(albedo, row, row < n, gx, gx, gx)
        store_vector(normal, row, row < n, gx, gx, gx)
        return
    live = row < limit
    x0, y0, z0 = load_vector(x, row, live)
    weights = mlp_weights(parameters, SHAPE)
    for tap in range(_TAPS):
        px = _step(x0, tap, 1, epsilon, bound)[0]
        py = _step(y0, tap, 3, epsilon, bound)[0]
        pz = _step(z0, tap, 5, epsilon, bound)[0]
        u, v, w = _unit(px, tap, scale), _unit(py, tap, scale), _unit(pz, tap, scale)
        features = encode(u, v, w, table, levels, active, SHAPE)
        outputs = mlp(features, weights, parameters, SHAPE)[0]
        blob = blob_logit(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
        if tap == 0:
            density, red, green, blue, _ = activate(outputs, blob, SOFTPLUS, SINGLE)
            tl.store(sigma + row, tl.where(live, density, 0.0), mask=row < n)
            red, green, blue = tl.where(live, red, 0.0), tl.where(live, green, 0.0), tl.where(live, blue, 0.0)
            store_vector(albedo, row, row < n, red, green, blue)
        else:
            density = activate_density(pick(outputs, 0) + blob, SOFTPLUS, SINGLE)
            density = tl.where(tap % 2 == 1, density, -density)
            gx += tl.where(tap <= 2, density, 0.0)
            gy += tl.where((tap == 3) | (tap == 4), density, 0.0)
            gz += tl.where(tap >= 5, density, 0.0)
    gx, gy, gz = gx / (2.0 * epsilon), gy / (2.0 * epsilon), gz / (2.0 * epsilon)
    nx, ny, nz = normal_of(gx, gy, gz)
    store_vector(normal, row, row < n, tl.where(live, nx, 0.0), tl.where(live, ny, 0.0), tl.where(live, nz, 0.0))
    store_vector(gradient, row, live, gx, gy, gz)


@jit
def field_normals_fd_bwd_kernel(
    x,  # [N, 3] fp32
    table,  # [table rows, F] in the compute dtype
    parameters,  # [P] in the compute dtype
    levels,  # [PADDED] int64
    active,  # [] integer or None
    count,  # [] int64 or None
    gradient,  # [N, 3] fp32, of sigma
    grad_sigma,  # [N] fp32
    grad_albedo,  # [N, 3] fp32
    grad_normal,  # [N, 3] fp32
    grad_features,  # [L * F, columns] in the compute dtype
    positions,  # [columns, 3] fp32, the taps' unit coordinates
    grad_logits,  # [columns] fp32, or None
    rows,  # [] int64, gets the number of columns in use
    partial_sums,  # [programs, size] fp32
    n,
    columns,
    size,
    scale,
    bound,
    epsilon,
    blob_density,
    blob_radius,
    SHAPE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes a run of (tile, tap) pairs and sums the gradients of layers FIRST to LAST.

    With FIRST = 0 it also writes grad_features, positions, grad_logits and rows; `_column` gives the order.
    """
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    SINGLE: tl.constexpr = DTYPE == tl.float32
    limit = live_points(count, n)
    tiles = (limit + BLOCK - 1) // BLOCK
    if FIRST == 0:
        if tl.program_id(0) == 0:
            tl.store(rows, tiles * (BLOCK * _TAPS))
    share = (tiles * _TAPS + tl.num_programs(0) - 1) // tl.num_programs(0)
    item = tl.program_id(0) * share
    end = tl.minimum(item + share, tiles * _TAPS)
    weights = mlp_weights(parameters, SHAPE)
    sums = mlp_weight_grad_zeros(BLOCK, DTYPE, FIRST, LAST, SHAPE)
    while item < end:
        tap = item % _TAPS
        row = item // _TAPS * BLOCK + tl.arange(0, BLOCK)
        live = row < limit
        x0, y0, z0 = load_vector(x, row, live)
        px = _step(x0, tap, 1, epsilon, bound)[0]
        py = _step(y0, tap, 3, epsilon, bound)[0]
        pz = _step(z0, tap, 5, epsilon, bound)[0]
        u, v, w = _unit(px, tap, scale), _unit(py, tap, scale), _unit(pz, tap, scale)
        features = encode(u, v, w, table, levels, active, SHAPE)
        outputs, hidden = mlp(features, weights, parameters, SHAPE)
        blob = blob_logit(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
        density, red, green, blue, logit = activate(outputs, blob, SOFTPLUS, SINGLE)
        centre = live & (tap == 0)  # only the centre has a colour
        grad_red, grad_green, grad_blue = load_vector(grad_albedo, row, centre)
        grad_red, grad_green, grad_blue = (
            grad_red * red * (1 - red),
            grad_green * green * (1 - green),
            grad_blue * blue * (1 - blue),
        )
        grad_density = tl.load(grad_sigma + row, mask=centre, other=0.0)
        gx, gy, gz = load_vector(gradient, row, live & (tap > 0))
        grad_nx, grad_ny, grad_nz = load_vector(grad_normal, row, live & (tap > 0))
        gx, gy, gz = normal_bwd(gx, gy, gz, grad_nx, grad_ny, grad_nz)
        along = tl.where(tap <= 2, gx, tl.where(tap <= 4, gy, gz)) / (2.0 * epsilon)
        grad_density += tl.where(tap % 2 == 1, along, -along)
        grad_logit = grad_density * density_slope(logit, density, SOFTPLUS)
        grad_outputs = join_output_grads(grad_logit, grad_red, grad_green, grad_blue)
        layer_grads, feature_grads = mlp_bwd(grad_outputs, hidden, weights, DTYPE, SHAPE)
        sums = mlp_weight_grad_add(sums, features, hidden, layer_grads, BLOCK, DTYPE, FIRST, LAST, SHAPE)
        if FIRST == 0:
            column = _column(item // _TAPS, tl.arange(0, BLOCK), tap, BLOCK)
            every = row >= 0
            store_channels(grad_features, feature_grads, column, every, columns, SHAPE)
            store_vector(positions, column, every, u, v, w)
            if grad_logits is not None:
                tl.store(grad_logits + column, grad_logit)
        item += 1
    partial_sums += tl.program_id(0).to(tl.int64) * size
    mlp_weight_grad_store(sums, partial_sums, DTYPE, FIRST, LAST, SHAPE)


@jit
def field_normals_fd_x_bwd_kernel(
    x,  # [N, 3] fp32
    grad_units,  # [columns, 3] fp32, of the taps' unit coordinates
    grad_logits,  # [columns] fp32
    count,  # [] int64 or None
    grad_x,  # [N, 3] fp32
    n,
    scale,
    bound,
    epsilon,
    blob_density,
    blob_radius,
    SOFTPLUS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the taps, summed into those of the points."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < live_points(count, n)
    x0, y0, z0 = load_vector(x, row, live)
    gx = tl.zeros((BLOCK,), tl.float32)
    gy = tl.zeros((BLOCK,), tl.float32)
    gz = tl.zeros((BLOCK,), tl.float32)
    for tap in range(_TAPS):
        px, free_x = _step(x0, tap, 1, epsilon, bound)
        py, free_y = _step(y0, tap, 3, epsilon, bound)
        pz, free_z = _step(z0, tap, 5, epsilon, bound)
        column = _column(row // TILE, row % TILE, tap, TILE)
        along = tl.load(grad_logits + column, mask=live, other=0.0)
        along *= blob_slope(px, py, pz, blob_density, blob_radius, SOFTPLUS)
        ux, uy, uz = load_vector(grad_units, column, live)
        gx += tl.where(free_x, along * px + scale * ux, 0.0)
        gy += tl.where(free_y, along * py + scale * uy, 0.0)
        gz += tl.where(free_z, along * pz + scale * uz, 0.0)
    store_vector(grad_x, row, row < n, tl.where(live, gx, 0.0), tl.where(live, gy, 0.0), tl.where(live, gz, 0.0))
