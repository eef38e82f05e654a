"""Device functions of the small MLP inside fused kernels: forward, backward, and the gradients of its parameters.

A tile is BLOCK points. Features come as F tiles [BLOCK, PADDED], one for each feature of a table's row (see
`fields.encode`), so the first layer is the sum over f of tile_f @ W_in[:, f::F]^T. Parameters are one buffer in the
compute dtype: all weights [out, in], then all biases, layer by layer (see `fields.encode.flatten_parameters`).

Legend: SHAPE = `fields.encode.FieldShape`; H = its width (16, 32, 64 or 128); COLUMNS = 16 padded outputs, 4 of them
used; layer LAYERS is the output layer.
Numerics: products accumulate in fp32. Hidden values and gradients are rounded to the compute dtype where the reference
rounds them. 16-bit operands are multiplied by tensor cores, fp32 by fused multiply-adds (not in tf32).
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl

COLUMNS = constant(16)


@jit
def dot(a, b, acc=None):
    """a @ b + acc in fp32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def _add_bias(acc, bias, DTYPE: tl.constexpr):
    """acc [BLOCK, H] + bias [H].

    Triton turns a product plus a bias into a product that starts from the bias, and in fp32 each of its steps is then
    rounded as coarsely as the bias, which shows in normals by central differences. It leaves a difference alone.
    """
    if DTYPE == tl.float32:
        return acc - (-bias)[None, :]
    else:
        return acc + bias[None, :]


@jit
def mlp_weights(parameters, SHAPE: tl.constexpr):
    """Weights as right factors of `dot`: F tiles [PADDED, H], LAYERS - 1 tiles [H, H], one [H, COLUMNS].

    Call it before a loop over tiles of points: 16-bit weights then stay in shared memory. fp32 weights do not fit there
    and are loaded by `weight` where they are used; the result then holds the pointer alone.
    """
    if parameters.dtype.element_ty == tl.float32:
        return (parameters,)
    else:
        TILES: tl.constexpr = SHAPE.features + SHAPE.layers
        weights = ()
        for place in tl.static_range(TILES):
            weights = weights + (_load_weight(parameters, place, SHAPE),)
        return weights


@jit
def _load_weight(parameters, place, SHAPE: tl.constexpr):
    # Tiles are loaded in memory order and transposed after: a load in the shape of a tile of points, contiguous along
    # its first axis, would make the compiler give that layout, a run of points to a lane, to the gathers of `encode`.
    WIDTH: tl.constexpr = SHAPE.width
    LEVELS: tl.constexpr = SHAPE.levels
    FEATURES: tl.constexpr = SHAPE.features
    PADDED: tl.constexpr = SHAPE.padded
    hidden = tl.arange(0, WIDTH)
    if place < FEATURES:
        level = tl.arange(0, PADDED)[None, :]
        address = parameters + (hidden[:, None] * LEVELS + level) * FEATURES + place
        return tl.trans(tl.load(address, mask=level < LEVELS, other=0.0))
    else:
        start = parameters + WIDTH * LEVELS * FEATURES + (place - FEATURES) * WIDTH * WIDTH
        if place < FEATURES + SHAPE.layers - 1:
            return tl.trans(tl.load(start + hidden[:, None] * WIDTH + hidden[None, :]))
        else:
            column = tl.arange(0, COLUMNS)[:, None]
            return tl.trans(tl.load(start + column * WIDTH + hidden[None, :], mask=column < 4, other=0.0))


@jit
def weight(weights, place, SHAPE: tl.constexpr):
    """Tile number `place` of `mlp_weights`."""
    if weights[0].dtype.is_ptr():
        return _load_weight(weights[0], place, SHAPE)
    else:
        return weights[place]


@jit
def mlp(features, weights, parameters, SHAPE: tl.constexpr):
    """features: F tiles [BLOCK, PADDED]; weights: `mlp_weights` -> outputs [BLOCK, COLUMNS] fp32, hidden values.

    Outputs are rounded to the compute dtype; columns from 4 on are zero. Hidden values: LAYERS tiles [BLOCK, H] in the
    compute dtype, after the ReLU.
    """
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    WIDTH: tl.constexpr = SHAPE.width
    LAYERS: tl.constexpr = SHAPE.layers
    FEATURES: tl.constexpr = SHAPE.features
    biases = parameters + WIDTH * SHAPE.levels * FEATURES + (LAYERS - 1) * WIDTH * WIDTH + 4 * WIDTH
    column = tl.arange(0, COLUMNS)
    hidden = tl.arange(0, WIDTH)
    acc = dot(features[0].to(DTYPE), weight(weights, 0, SHAPE))
    for f in tl.static_range(1, FEATURES):
        acc = dot(features[f].to(DTYPE), weight(weights, f, SHAPE), acc)
    values = ()
    for layer in tl.static_range(LAYERS):
        bias = tl.load(biases + layer * WIDTH + hidden).to(tl.float32)
        h = tl.maximum(_add_bias(acc, bias, DTYPE), 0.0, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)
        values = values + (h,)
        acc = dot(h, weight(weights, FEATURES + layer, SHAPE))
    bias = tl.load(biases + LAYERS * WIDTH + column, mask=column < 4, other=0.0).to(tl.float32)
    return _add_bias(acc, bias, DTYPE).to(DTYPE).to(tl.float32), values


@jit
def mlp_bwd(grad_outputs, hidden, weights, DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """Gradient of the outputs [BLOCK, COLUMNS] -> gradients of the layers' sums in DTYPE, and of the features in fp32.

    hidden: of `mlp`. Returns a tuple of LAYERS + 1 tiles, first layer first ([BLOCK, H] each, the last is grad_outputs
    [BLOCK, COLUMNS]), and F tiles [BLOCK, PADDED].
    """
    LAYERS: tl.constexpr = SHAPE.layers
    FEATURES: tl.constexpr = SHAPE.features
    gradient = grad_outputs.to(DTYPE)
    layer_grads = (gradient,)
    for layer in tl.static_range(LAYERS - 1, -1, -1):
        grad_hidden = dot(gradient, tl.trans(weight(weights, FEATURES + layer, SHAPE)))
        gradient = tl.where(hidden[layer] <= 0, 0.0, grad_hidden).to(DTYPE)
        layer_grads = (gradient,) + layer_grads
    feature_grads = ()
    for f in tl.static_range(FEATURES):
        feature_grads = feature_grads + (dot(gradient, tl.trans(weight(weights, f, SHAPE))),)
    return layer_grads, feature_grads


# Gradients of the parameters, summed over tiles in registers: start from `mlp_weight_grad_zeros`, add each tile by
# `mlp_weight_grad_add` or `mlp_weight_grad_bwd`, end with `mlp_weight_grad_store`. They cover layers FIRST to LAST
# (included): the sums of all layers do not always fit into registers, so a kernel may need several passes.


@jit
def mlp_weight_grad_zeros(
    BLOCK: tl.constexpr, DTYPE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, SHAPE: tl.constexpr
):
    """A tuple of zeros: for each layer its weights' tiles and one for its bias, layer 0 with F tiles of weights."""
    WIDTH: tl.constexpr = SHAPE.width
    LAYERS: tl.constexpr = SHAPE.layers
    FEATURES: tl.constexpr = SHAPE.features
    PADDED: tl.constexpr = SHAPE.padded
    sums = ()
    for layer in tl.static_range(FIRST, LAST + 1):
        if layer == 0:
            for _ in tl.static_range(FEATURES):
                sums = sums + (tl.zeros([WIDTH, PADDED], tl.float32),)
        elif layer < LAYERS:
            sums = sums + (tl.zeros([WIDTH, WIDTH], tl.float32),)
        if layer == LAYERS:
            sums = sums + (tl.zeros([WIDTH, COLUMNS], tl.float32), tl.zeros([BLOCK, COLUMNS], tl.float32))
        elif DTYPE == tl.float32:
            sums = sums + (tl.zeros([WIDTH], tl.float32),)
        else:
            sums = sums + (tl.zeros([WIDTH, COLUMNS], tl.float32),)
    return sums


@jit
def _add_layer(sums, gradient, features, below, layer, BLOCK: tl.constexpr, DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """One layer's sums with a tile added. gradient: of the layer's sum; below: its input, unless it is layer 0."""
    LAYERS: tl.constexpr = SHAPE.layers
    FEATURES: tl.constexpr = SHAPE.features
    new = ()
    if layer == 0:
        for f in tl.static_range(FEATURES):
            new = new + (dot(tl.trans(gradient), features[f].to(DTYPE), sums[f]),)
    elif layer < LAYERS:
        new = new + (dot(tl.trans(gradient), below, sums[0]),)
    else:
        new = new + (dot(tl.trans(below), gradient, sums[0]),)
    bias_sum = sums[len(new)]
    if layer == LAYERS:
        return new + (bias_sum + gradient.to(tl.float32),)
    elif DTYPE == tl.float32:
        return new + (bias_sum + tl.sum(gradient, 0),)
    else:
        # A product with ones adds up over the points without leaving the tensor cores.
        return new + (dot(tl.trans(gradient), tl.full([BLOCK, COLUMNS], 1.0, DTYPE), bias_sum),)


@jit
def mlp_weight_grad_add(
    sums,
    features,
    hidden,
    layer_grads,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """`sums` with a tile added. features: of `encode`; hidden: of `mlp`; layer_grads: of `mlp_bwd`.

    Rows of padding must have zero gradients and finite values.
    """
    new = ()
    for layer in tl.static_range(FIRST, LAST + 1):
        below = hidden[layer - 1]  # not used by layer 0
        new = new + _add_layer(sums[len(new) :], layer_grads[layer], features, below, layer, BLOCK, DTYPE, SHAPE)
    return new


@jit
def mlp_weight_grad_bwd(
    sums,
    grad_outputs,
    features,
    hidden,
    weights,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """`mlp_bwd` and `mlp_weight_grad_add` layer by layer, with fewer live tiles -> sums, gradients of the features."""
    LAYERS: tl.constexpr = SHAPE.layers
    FEATURES: tl.constexpr = SHAPE.features
    gradient = grad_outputs.to(DTYPE)
    new = ()
    for layer in tl.static_range(LAYERS, -1, -1):
        if layer < LAYERS:
            grad_hidden = dot(gradient, tl.trans(weight(weights, FEATURES + layer, SHAPE)))
            gradient = tl.where(hidden[layer] <= 0, 0.0, grad_hidden).to(DTYPE)
        if layer >= FIRST and layer <= LAST:
            # Layer 0 has F + 1 entries, every other two.
            rest = sums if layer == FIRST else sums[2 * (layer - FIRST) + (FEATURES - 1 if FIRST == 0 else 0) :]
            new = _add_layer(rest, gradient, features, hidden[layer - 1], layer, BLOCK, DTYPE, SHAPE) + new
    feature_grads = ()
    for f in tl.static_range(FEATURES):
        feature_grads = feature_grads + (dot(gradient, tl.trans(weight(weights, f, SHAPE))),)
    return new, feature_grads


@jit
def mlp_weight_grad_store(sums, out, DTYPE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, SHAPE: tl.constexpr):
    """Store `sums` at out [parameters] fp32, in the order of `flatten_parameters`."""
    WIDTH: tl.constexpr = SHAPE.width
    LAYERS: tl.constexpr = SHAPE.layers
    LEVELS: tl.constexpr = SHAPE.levels
    FEATURES: tl.constexpr = SHAPE.features
    PADDED: tl.constexpr = SHAPE.padded
    hidden = tl.arange(0, WIDTH)
    level = tl.arange(0, PADDED)
    column = tl.arange(0, COLUMNS)
    biases = out + WIDTH * LEVELS * FEATURES + (LAYERS - 1) * WIDTH * WIDTH + 4 * WIDTH
    for layer in tl.static_range(FIRST, LAST + 1):
        if layer == 0:
            for f in tl.static_range(FEATURES):
                address = out + hidden[:, None] * (LEVELS * FEATURES) + level[None, :] * FEATURES + f
                tl.store(address, sums[f], mask=level[None, :] < LEVELS)
            sums = sums[FEATURES:]
        else:
            weights = out + WIDTH * LEVELS * FEATURES + (layer - 1) * WIDTH * WIDTH
            if layer < LAYERS:
                tl.store(weights + hidden[:, None] * WIDTH + hidden[None, :], sums[0])
            else:
                address = weights + column[:, None] * WIDTH + hidden[None, :]
                tl.store(address, tl.trans(sums[0]), mask=column[:, None] < 4)
            sums = sums[1:]
        if layer == LAYERS:
            tl.store(biases + layer * WIDTH + column, tl.sum(sums[0], 0), mask=column < 4)
        elif DTYPE == tl.float32:
            tl.store(biases + layer * WIDTH + hidden, sums[0])
        else:
            tl.store(biases + layer * WIDTH + hidden, pick(sums[0], 0))
        sums = sums[1:]


@jit
def pick(tile, COLUMN: tl.constexpr):
    """One column [BLOCK] of a tile [BLOCK, COLUMNS]."""
    return tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == COLUMN, tile, 0.0), 1)
