"""Kernels of the field over tiles of points; `fields.field` defines it and has the legend.

Legend: T = tiles of BLOCK points; SHAPE = `fields.encode.FieldShape`; PADDED its padded levels.
"""

from __future__ import annotations

from functools import partial

from dream_fast.kernels._core.launch import jit, tl
from dream_fast.kernels.fields.activations import activate, blob_logit, blob_slope, density_slope, join_output_grads
from dream_fast.kernels.fields.encode import (
    encode,
    load_features,
    load_vector,
    store_channels,
    store_features,
    store_vector,
)
from dream_fast.kernels.fields.mlp import (
    mlp,
    mlp_weight_grad_bwd,
    mlp_weight_grad_store,
    mlp_weight_grad_zeros,
    mlp_weights,
)
from dream_fast.kernels.grid.device import load_count


# The number of points does not compile the kernel again.
@partial(jit, do_not_specialize=("rows",))
def field_fwd_kernel(
    x,  # [rows, 3] fp32
    table,  # [table rows, F] in the compute dtype
    levels,  # [PADDED] int64
    active,  # [] integer or None
    parameters,  # [P] in the compute dtype
    count,  # [] int64 or None
    sigma,  # [rows] fp32
    albedo,  # [rows, 3] fp32
    features,  # [T, F, PADDED, BLOCK] in the compute dtype, or None
    rows,
    scale,
    blob_density,
    blob_radius,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Density and albedo of tiles of BLOCK points; the encoded features are stored for the backward if asked for.

    Programs take tiles in turns or, where there are many, a run of them each: neighbours on rays find their entries in
    the program's cache.
    """
    SINGLE: tl.constexpr = parameters.dtype.element_ty == tl.float32
    live = tl.minimum(tl.full((), rows, tl.int64), load_count(count, rows))
    weights = mlp_weights(parameters, SHAPE)
    # Tiles are counted in 32 bits: 64-bit loop counters took 20 registers more, and with them a fifth program.
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles = tl.cdiv(live, BLOCK).to(tl.int32)
    run = tl.where(tiles < 16 * programs, 1, tl.cdiv(tiles, programs))
    tile = program * run
    while tile < tiles:
        start = tile.to(tl.int64) * BLOCK
        n = start + tl.arange(0, BLOCK)
        inner = n < live
        px, py, pz = load_vector(x, n, inner)
        encoded = encode(px * scale + 0.5, py * scale + 0.5, pz * scale + 0.5, table, levels, active, SHAPE)
        if features is not None:
            store_features(features, encoded, start, BLOCK, SHAPE)
        outputs, _ = mlp(encoded, weights, parameters, SHAPE)
        blob = blob_logit(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
        s, r, g, b, _ = activate(outputs, blob, SOFTPLUS, SINGLE)
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
    x,  # [rows, 3] fp32
    features,  # [T, F, PADDED, BLOCK] as the forward stored them, or None
    table,  # [table rows, F] in the compute dtype
    levels,  # [PADDED] int64
    active,  # [] integer or None
    parameters,  # [P] in the compute dtype
    count,  # [] int64 or None
    grad_sigma,  # [rows] fp32
    grad_albedo,  # [rows, 3] fp32
    grad_features,  # [L * F, rows] in the compute dtype, or None
    grad_x,  # [rows, 3] fp32, gets the blob's part; or None
    partial_sums,  # [programs, P] fp32
    rows,
    size,
    scale,
    blob_density,
    blob_radius,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Gradients of the features, of the logit's blob, and, a row of `partial_sums` a program, of layers FIRST to LAST.

    Everything except stored features is computed again.
    """
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    SINGLE: tl.constexpr = DTYPE == tl.float32
    live = load_count(count, rows)
    weights = mlp_weights(parameters, SHAPE)
    sums = mlp_weight_grad_zeros(BLOCK, DTYPE, FIRST, LAST, SHAPE)
    program = tl.program_id(0).to(tl.int64)
    start = program * BLOCK
    while start < live:
        n = start + tl.arange(0, BLOCK)
        inner = n < live
        px, py, pz = load_vector(x, n, inner)
        if features is None:
            encoded = encode(px * scale + 0.5, py * scale + 0.5, pz * scale + 0.5, table, levels, active, SHAPE)
        else:
            encoded = load_features(features, start, BLOCK, SHAPE)
        outputs, hidden = mlp(encoded, weights, parameters, SHAPE)
        blob = blob_logit(px, py, pz, blob_density, blob_radius, SOFTPLUS, SINGLE)
        s, r, g, b, logit = activate(outputs, blob, SOFTPLUS, SINGLE)
        grad_logit = tl.load(grad_sigma + n, mask=inner, other=0.0) * density_slope(logit, s, SOFTPLUS)
        grad_red, grad_green, grad_blue = load_vector(grad_albedo, n, inner)
        grad_outputs = join_output_grads(
            grad_logit, grad_red * (r * (1.0 - r)), grad_green * (g * (1.0 - g)), grad_blue * (b * (1.0 - b))
        )
        sums, feature_grads = mlp_weight_grad_bwd(
            sums, grad_outputs, encoded, hidden, weights, BLOCK, DTYPE, FIRST, LAST, SHAPE
        )
        if grad_features is not None:
            store_channels(grad_features, feature_grads, n, inner, rows, SHAPE)
        if grad_x is not None:
            slope = grad_logit * blob_slope(px, py, pz, blob_density, blob_radius, SOFTPLUS)
            store_vector(grad_x, n, inner, slope * px, slope * py, slope * pz)
        start += tl.num_programs(0).to(tl.int64) * BLOCK
    mlp_weight_grad_store(sums, partial_sums + program * size, DTYPE, FIRST, LAST, SHAPE)
