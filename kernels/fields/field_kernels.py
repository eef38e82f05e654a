"""Kernels of the field, over tiles of points; what the field is stands in `field`."""

from __future__ import annotations

from functools import partial

from dream_fast.kernels._core.launch import jit, tl
from dream_fast.kernels.fields.encode import (
    activate,
    blob,
    blob_slope,
    density_slope,
    encode,
    keep_tile,
    kept_tile,
    load_point,
    outputs_gradient,
    store_channels,
    store_vector,
)
from dream_fast.kernels.fields.mlp import mlp, mlp_learn, mlp_store, mlp_sums, mlp_weights
from dream_fast.kernels.grid.gradients import live_rows


# How many points there are is no reason to compile again.
@partial(jit, do_not_specialize=("rows",))
def field_fwd_kernel(
    x,
    table,
    levels,
    active,
    parameters,
    count,
    sigma,
    albedo,
    kept,
    rows,
    scale,
    blob_density,
    blob_radius,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    LOG2_ENTRIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Programs take tiles of BLOCK points in turns or, where there are many, a run of them each.

    Neighbours on rays find their entries in the program's cache. The features go to kept [tiles, F, PADDED, BLOCK]
    where it is given.
    """
    SINGLE: tl.constexpr = parameters.dtype.element_ty == tl.float32
    live = tl.minimum(tl.full((), rows, tl.int64), live_rows(count, rows))
    weights = mlp_weights(parameters, WIDTH, LAYERS, LEVELS, FEATURES, PADDED)
    # Tiles are counted in 32 bits: the numbers of a loop in 64 took 20 registers more, and with them a fifth program.
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles = tl.cdiv(live, BLOCK).to(tl.int32)
    run = tl.where(tiles < 16 * programs, 1, tl.cdiv(tiles, programs))
    tile = program * run
    while tile < tiles:
        start = tile.to(tl.int64) * BLOCK
        n = start + tl.arange(0, BLOCK)
        inner = n < live
        px, py, pz = load_point(x, n, inner)
        features = encode(
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
        )
        if kept is not None:
            keep_tile(kept, features, start, BLOCK, FEATURES, PADDED)
        outputs, _ = mlp(features, weights, parameters, WIDTH, LAYERS, LEVELS, FEATURES)
        bump = blob(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
        s, r, g, b, _ = activate(outputs, bump, SOFTPLUS, SINGLE)
        tl.store(sigma + n, s, mask=inner)
        store_vector(albedo, n, inner, r, g, b)
        tile += tl.where((tile + 1) % run == 0, (programs - 1) * run + 1, 1)
    start = live + program.to(tl.int64) * BLOCK
    zero = tl.zeros([BLOCK], tl.float32)
    while start < rows:
        n = start + tl.arange(0, BLOCK)
        tl.store(sigma + n, zero, mask=n < rows)
        store_vector(albedo, n, n < rows, zero, zero, zero)
        start += programs * BLOCK


@jit
def field_bwd_kernel(
    x,
    kept,
    table,
    levels,
    active,
    parameters,
    count,
    to_sigma,
    to_albedo,
    to_features,
    to_x,
    partials,
    rows,
    size,
    scale,
    blob_density,
    blob_radius,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    LOG2_ENTRIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """All but what was kept is computed again. Sums of layers FIRST to LAST go to row `program` of partials.

    to_features [L * F, N] and to_x [N, 3] (the blob's part) are written where they are given.
    """
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    SINGLE: tl.constexpr = DTYPE == tl.float32
    live = live_rows(count, rows)
    weights = mlp_weights(parameters, WIDTH, LAYERS, LEVELS, FEATURES, PADDED)
    sums = mlp_sums(BLOCK, DTYPE, FIRST, LAST, WIDTH, LAYERS, FEATURES, PADDED)
    program = tl.program_id(0).to(tl.int64)
    start = program * BLOCK
    while start < live:
        n = start + tl.arange(0, BLOCK)
        inner = n < live
        px, py, pz = load_point(x, n, inner)
        if kept is None:
            features = encode(
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
            )
        else:
            features = kept_tile(kept, start, BLOCK, FEATURES, PADDED)
        outputs, hidden = mlp(features, weights, parameters, WIDTH, LAYERS, LEVELS, FEATURES)
        bump = blob(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
        s, r, g, b, raw = activate(outputs, bump, SOFTPLUS, SINGLE)
        to_raw = tl.load(to_sigma + n, mask=inner, other=0.0) * density_slope(raw, s, SOFTPLUS)
        to_red, to_green, to_blue = load_point(to_albedo, n, inner)
        to_outputs = outputs_gradient(
            to_raw, to_red * (r * (1.0 - r)), to_green * (g * (1.0 - g)), to_blue * (b * (1.0 - b))
        )
        sums, by_feature = mlp_learn(
            sums, to_outputs, features, hidden, weights, BLOCK, DTYPE, FIRST, LAST, LAYERS, FEATURES
        )
        if to_features is not None:
            store_channels(to_features, by_feature, n, inner, rows, LEVELS, FEATURES, PADDED)
        if to_x is not None:
            slope = to_raw * blob_slope(px, py, pz, blob_density, blob_radius, SOFTPLUS)
            store_vector(to_x, n, inner, slope * px, slope * py, slope * pz)
        start += tl.num_programs(0).to(tl.int64) * BLOCK
    mlp_store(sums, partials + program * size, DTYPE, FIRST, LAST, WIDTH, LAYERS, LEVELS, FEATURES, PADDED)
