"""Device functions of the small MLP inside fused kernels: forward, backward and the sums of its weights' gradients.

A tile is BLOCK points; features come as one tile [BLOCK, PADDED] for each feature of a table's row (`_tile.encode`), so
the first layer is the sum over f of tile_f @ W_in[:, f::F]^T. Parameters are one buffer in the compute dtype: all
weights [out, in], then all biases, layer by layer (`_tile.flatten_parameters`).

Legend: H hidden width (16, 32, 64 or 128), LAYERS hidden layers (1 to 4), F features a row, COLUMNS = 16 padded
outputs (4 used).
Numerics: products accumulate in fp32; hidden values and gradients are rounded to the compute dtype where the references
round them. Numbers of 16 bits are multiplied by tensor cores, fp32 by fused multiply-adds (not in tf32).
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl

COLUMNS = constant(16)


@jit
def dot(a, b, acc=None):
    """a @ b + acc in fp32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def _biased(acc, bias, DTYPE: tl.constexpr):
    """acc [BLOCK, H] + bias [H].

    Of a product and a sum Triton makes a product that starts from the bias, and in fp32 rounds each of its steps as
    coarsely as the bias: normals by differences show that. It leaves a difference alone.
    """
    if DTYPE == tl.float32:
        return acc - (-bias)[None, :]
    else:
        return acc + bias[None, :]


@jit
def mlp_weights(
    parameters,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Weights as right factors of `dot`: FEATURES tiles [PADDED, H], LAYERS - 1 tiles [H, H], one [H, COLUMNS].

    To be called before a loop over tiles of points: weights of 16 bits then stay in shared memory. Of fp32 there are
    too many for that: they are only described here, and loaded by `weight` where they are used.
    """
    if parameters.dtype.element_ty == tl.float32:
        return (parameters, LEVELS)
    else:
        weights = ()
        for place in tl.static_range(FEATURES + LAYERS):
            weights = weights + (_load_weight(parameters, place, LEVELS, WIDTH, LAYERS, FEATURES, PADDED),)
        return weights


@jit
def _load_weight(
    parameters,
    place,
    levels,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
):
    # Tiles are loaded as they lie and transposed after: a load of the shape of a tile of points, contiguous along its
    # first axis, would make the compiler give that layout, a run of points to a lane, to the gathers of `encode` too.
    hidden = tl.arange(0, WIDTH)
    if place < FEATURES:
        level = tl.arange(0, PADDED)[None, :]
        at = parameters + (hidden[:, None] * levels + level) * FEATURES + place
        return tl.trans(tl.load(at, mask=level < levels, other=0.0))
    else:
        at = parameters + WIDTH * levels * FEATURES + (place - FEATURES) * WIDTH * WIDTH
        if place < FEATURES + LAYERS - 1:
            return tl.trans(tl.load(at + hidden[:, None] * WIDTH + hidden[None, :]))
        else:
            column = tl.arange(0, COLUMNS)[:, None]
            return tl.trans(tl.load(at + column * WIDTH + hidden[None, :], mask=column < 4, other=0.0))


@jit
def weight(weights, place, WIDTH: tl.constexpr, LAYERS: tl.constexpr, FEATURES: tl.constexpr):
    """Number `place` of the tiles of `mlp_weights`."""
    if weights[0].dtype.is_ptr():
        return _load_weight(weights[0], place, weights[1], WIDTH, LAYERS, FEATURES, COLUMNS)
    else:
        return weights[place]


@jit
def mlp(
    features,
    weights,
    parameters,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """features: tiles [BLOCK, PADDED]; weights: of `mlp_weights` -> outputs [BLOCK, COLUMNS] fp32, hidden values.

    Outputs are rounded to the compute dtype; columns from 4 on are zero. Hidden values: LAYERS tiles [BLOCK, H] in the
    compute dtype, after the ReLU.
    """
    DTYPE: tl.constexpr = parameters.dtype.element_ty
    biases = parameters + WIDTH * LEVELS * FEATURES + (LAYERS - 1) * WIDTH * WIDTH + 4 * WIDTH
    column = tl.arange(0, COLUMNS)
    hidden = tl.arange(0, WIDTH)
    acc = dot(features[0].to(DTYPE), weight(weights, 0, WIDTH, LAYERS, FEATURES))
    for f in tl.static_range(1, FEATURES):
        acc = dot(features[f].to(DTYPE), weight(weights, f, WIDTH, LAYERS, FEATURES), acc)
    values = ()
    for layer in tl.static_range(LAYERS):
        bias = tl.load(biases + layer * WIDTH + hidden).to(tl.float32)
        h = tl.maximum(_biased(acc, bias, DTYPE), 0.0, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)
        values = values + (h,)
        acc = dot(h, weight(weights, FEATURES + layer, WIDTH, LAYERS, FEATURES))
    bias = tl.load(biases + LAYERS * WIDTH + column, mask=column < 4, other=0.0).to(tl.float32)
    return _biased(acc, bias, DTYPE).to(DTYPE).to(tl.float32), values


@jit
def mlp_backward(
    to_outputs,
    hidden,
    weights,
    DTYPE: tl.constexpr,
    LAYERS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Gradient of the outputs [BLOCK, COLUMNS] -> gradients in DTYPE of each layer's sum, and of the features in fp32.

    hidden: of `mlp`. Returns a tuple of LAYERS + 1 tiles, first layer first ([BLOCK, H] each, the last is to_outputs
    [BLOCK, COLUMNS]), and FEATURES tiles [BLOCK, PADDED].
    """
    WIDTH: tl.constexpr = hidden[0].shape[1]
    gradient = to_outputs.to(DTYPE)
    sums = (gradient,)
    for layer in tl.static_range(LAYERS - 1, -1, -1):
        to_hidden = dot(gradient, tl.trans(weight(weights, FEATURES + layer, WIDTH, LAYERS, FEATURES)))
        gradient = tl.where(hidden[layer] <= 0, 0.0, to_hidden).to(DTYPE)
        sums = (gradient,) + sums
    to_features = ()
    for f in tl.static_range(FEATURES):
        to_features = to_features + (dot(gradient, tl.trans(weight(weights, f, WIDTH, LAYERS, FEATURES))),)
    return sums, to_features


@jit
def mlp_sums(
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Zeros for `mlp_accumulate`: what layers FIRST to LAST (included; LAYERS is the output layer) add up."""
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
def _layer_sums(
    sums,
    gradient,
    features,
    below,
    layer,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    LAYERS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One layer's part of `mlp_sums` with a tile added. gradient: of the layer's sum; below: what the layer takes."""
    new = ()
    if layer == 0:
        for f in tl.static_range(FEATURES):
            new = new + (dot(tl.trans(gradient), features[f].to(DTYPE), sums[f]),)
    elif layer < LAYERS:
        new = new + (dot(tl.trans(gradient), below, sums[0]),)
    else:
        new = new + (dot(tl.trans(below), gradient, sums[0]),)
    last = sums[len(new)]
    if layer == LAYERS:
        return new + (last + gradient.to(tl.float32),)
    elif DTYPE == tl.float32:
        return new + (last + tl.sum(gradient, 0),)
    else:
        # A product with ones adds up over the points without leaving the tensor cores.
        return new + (dot(tl.trans(gradient), tl.full([BLOCK, COLUMNS], 1.0, DTYPE), last),)


@jit
def mlp_accumulate(
    sums,
    features,
    hidden,
    gradients,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    LAYERS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """`sums` with a tile's weight and bias gradients added. features, hidden: of `encode`, `mlp`; gradients: the first
    tuple of `mlp_backward`. Rows that do not count must have zero gradients and finite values.
    """
    new = ()
    for layer in tl.static_range(FIRST, LAST + 1):
        below = hidden[layer - 1]  # of layer 0 not used
        new = new + _layer_sums(
            sums[len(new) :], gradients[layer], features, below, layer, BLOCK, DTYPE, LAYERS, FEATURES
        )
    return new


@jit
def mlp_learn(
    sums,
    to_outputs,
    features,
    hidden,
    weights,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    LAYERS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """`mlp_backward` and `mlp_accumulate` layer by layer, so that little is kept: sums, gradients of the features."""
    WIDTH: tl.constexpr = hidden[0].shape[1]
    gradient = to_outputs.to(DTYPE)
    new = ()
    for layer in tl.static_range(LAYERS, -1, -1):
        if layer < LAYERS:
            to_hidden = dot(gradient, tl.trans(weight(weights, FEATURES + layer, WIDTH, LAYERS, FEATURES)))
            gradient = tl.where(hidden[layer] <= 0, 0.0, to_hidden).to(DTYPE)
        if layer >= FIRST and layer <= LAST:
            # Layer 0 has FEATURES + 1 entries, every other two.
            rest = sums if layer == FIRST else sums[2 * (layer - FIRST) + (FEATURES - 1 if FIRST == 0 else 0) :]
            new = _layer_sums(rest, gradient, features, hidden[layer - 1], layer, BLOCK, DTYPE, LAYERS, FEATURES) + new
    to_features = ()
    for f in tl.static_range(FEATURES):
        to_features = to_features + (dot(gradient, tl.trans(weight(weights, f, WIDTH, LAYERS, FEATURES))),)
    return new, to_features


@jit
def mlp_store(
    sums,
    out,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Store `sums` at `out` (fp32) in the places that `flatten_parameters` gives the parameters."""
    hidden = tl.arange(0, WIDTH)
    level = tl.arange(0, PADDED)
    column = tl.arange(0, COLUMNS)
    biases = out + WIDTH * LEVELS * FEATURES + (LAYERS - 1) * WIDTH * WIDTH + 4 * WIDTH
    for layer in tl.static_range(FIRST, LAST + 1):
        if layer == 0:
            for f in tl.static_range(FEATURES):
                at = out + hidden[:, None] * (LEVELS * FEATURES) + level[None, :] * FEATURES + f
                tl.store(at, sums[f], mask=level[None, :] < LEVELS)
            sums = sums[FEATURES:]
        else:
            weights = out + WIDTH * LEVELS * FEATURES + (layer - 1) * WIDTH * WIDTH
            if layer < LAYERS:
                tl.store(weights + hidden[:, None] * WIDTH + hidden[None, :], sums[0])
            else:
                at = weights + column[:, None] * WIDTH + hidden[None, :]
                tl.store(at, tl.trans(sums[0]), mask=column[:, None] < 4)
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
