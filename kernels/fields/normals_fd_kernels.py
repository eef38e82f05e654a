"""Kernels of the field with normals by differences, over tiles of points.

The seven points of a sample (taps: the centre, then plus and minus a step along x, y and z) run one after the other
through one encoding and MLP. Forward keeps the gradient of sigma, so that backward, which recomputes the rest, needs
each tap once; what goes into the table is written tap by tap of a tile: rays stay in order there, and the taps, which
cancel, meet soon, so that their sums stay small and round less.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.fields.encode import (
    activate,
    activate_density,
    blob,
    blob_slope,
    density_slope,
    encode,
    outputs_gradient,
    store_channels,
    store_vector,
)
from dream_fast.kernels.fields.mlp import mlp, mlp_accumulate, mlp_backward, mlp_store, mlp_sums, mlp_weights, pick
from dream_fast.kernels.fields.normals_device import limit_rows, load_vector, normal_backward, normal_of

TAPS = 7
_TAPS = constant(TAPS)


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
def _column(tile, lane, tap, TILE: tl.constexpr):
    """Where a tap of a point is written: the taps of a tile one after the other, the centre's, the largest, last."""
    return (tile * _TAPS + (_TAPS - 1 - tap)) * TILE + lane


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
    BLOCK: tl.constexpr,
):
    SINGLE: tl.constexpr = parameters.dtype.element_ty == tl.float32
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start + tl.arange(0, BLOCK)
    limit = limit_rows(count, n)
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
    weights = mlp_weights(parameters, WIDTH, LAYERS, LEVELS, FEATURES, PADDED)
    for tap in range(_TAPS):
        px = _step(x0, tap, 1, epsilon, bound)[0]
        py = _step(y0, tap, 3, epsilon, bound)[0]
        pz = _step(z0, tap, 5, epsilon, bound)[0]
        u, v, w = _unit(px, tap, scale), _unit(py, tap, scale), _unit(pz, tap, scale)
        features = encode(u, v, w, table, levels, active, LEVELS, FEATURES, PADDED, LOG2_ENTRIES, SMOOTH, WIDE)
        outputs = mlp(features, weights, parameters, WIDTH, LAYERS, LEVELS, FEATURES)[0]
        bump = blob(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
        if tap == 0:
            density, red, green, blue, raw = activate(outputs, bump, SOFTPLUS, SINGLE)
            tl.store(sigma + row, tl.where(live, density, 0.0), mask=row < n)
            red, green, blue = tl.where(live, red, 0.0), tl.where(live, green, 0.0), tl.where(live, blue, 0.0)
            store_vector(albedo, row, row < n, red, green, blue)
        else:
            density = activate_density(pick(outputs, 0) + bump, SOFTPLUS, SINGLE)
            density = tl.where(tap % 2 == 1, density, -density)
            gx += tl.where(tap <= 2, density, 0.0)
            gy += tl.where((tap == 3) | (tap == 4), density, 0.0)
            gz += tl.where(tap >= 5, density, 0.0)
    gx, gy, gz = gx / (2.0 * epsilon), gy / (2.0 * epsilon), gz / (2.0 * epsilon)
    nx, ny, nz = normal_of(gx, gy, gz)
    store_vector(normal, row, row < n, tl.where(live, nx, 0.0), tl.where(live, ny, 0.0), tl.where(live, nz, 0.0))
    store_vector(gradient, row, live, gx, gy, gz)


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
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes a run of (tile, tap) pairs and adds up what layers FIRST to LAST get.

    With FIRST = 0 also writes to_features [L * F, columns], positions [columns, 3] and to_raw [columns] (may be None)
    with the taps of a tile side by side, as `_column` says, and to `rows` how many columns those are.
    """
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    SINGLE: tl.constexpr = DTYPE == tl.float32
    limit = limit_rows(count, n)
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
        x0, y0, z0 = load_vector(x, row, live)
        px = _step(x0, tap, 1, epsilon, bound)[0]
        py = _step(y0, tap, 3, epsilon, bound)[0]
        pz = _step(z0, tap, 5, epsilon, bound)[0]
        u, v, w = _unit(px, tap, scale), _unit(py, tap, scale), _unit(pz, tap, scale)
        features = encode(u, v, w, table, levels, active, LEVELS, FEATURES, PADDED, LOG2_ENTRIES, SMOOTH, WIDE)
        outputs, hidden = mlp(features, weights, parameters, WIDTH, LAYERS, LEVELS, FEATURES)
        bump = blob(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
        density, red, green, blue, raw = activate(outputs, bump, SOFTPLUS, SINGLE)
        # Only the centre has a colour.
        centre = live & (tap == 0)
        to_red, to_green, to_blue = load_vector(to_albedo, row, centre)
        to_red, to_green, to_blue = (
            to_red * red * (1 - red),
            to_green * green * (1 - green),
            to_blue * blue * (1 - blue),
        )
        to_density = tl.load(to_sigma + row, mask=centre, other=0.0)
        gx, gy, gz = load_vector(gradient, row, live & (tap > 0))
        tx, ty, tz = load_vector(to_normal, row, live & (tap > 0))
        gx, gy, gz = normal_backward(gx, gy, gz, tx, ty, tz)
        along = tl.where(tap <= 2, gx, tl.where(tap <= 4, gy, gz)) / (2.0 * epsilon)
        to_density += tl.where(tap % 2 == 1, along, -along)
        to_logit = to_density * density_slope(raw, density, SOFTPLUS)
        to_outputs = outputs_gradient(to_logit, to_red, to_green, to_blue)
        gradients, into_features = mlp_backward(to_outputs, hidden, weights, DTYPE, LAYERS, FEATURES)
        sums = mlp_accumulate(sums, features, hidden, gradients, BLOCK, DTYPE, FIRST, LAST, LAYERS, FEATURES)
        if FIRST == 0:
            column = _column(item // _TAPS, tl.arange(0, BLOCK), tap, BLOCK)
            every = row >= 0
            store_channels(to_features, into_features, column, every, columns, LEVELS, FEATURES, PADDED)
            store_vector(positions, column, every, u, v, w)
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
    out,
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
    """Gradients into the taps' unit coordinates [columns, 3] and logits [columns] -> into the points [n, 3]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < limit_rows(count, n)
    x0, y0, z0 = load_vector(x, row, live)
    gx = tl.zeros((BLOCK,), tl.float32)
    gy = tl.zeros((BLOCK,), tl.float32)
    gz = tl.zeros((BLOCK,), tl.float32)
    for tap in range(_TAPS):
        px, free_x = _step(x0, tap, 1, epsilon, bound)
        py, free_y = _step(y0, tap, 3, epsilon, bound)
        pz, free_z = _step(z0, tap, 5, epsilon, bound)
        column = _column(row // TILE, row % TILE, tap, TILE)
        along = tl.load(to_raw + column, mask=live, other=0.0)
        along *= blob_slope(px, py, pz, blob_density, blob_radius, SOFTPLUS)
        ux, uy, uz = load_vector(to_units, column, live)
        gx += tl.where(free_x, along * px + scale * ux, 0.0)
        gy += tl.where(free_y, along * py + scale * uy, 0.0)
        gz += tl.where(free_z, along * pz + scale * uz, 0.0)
    store_vector(out, row, row < n, tl.where(live, gx, 0.0), tl.where(live, gy, 0.0), tl.where(live, gz, 0.0))
