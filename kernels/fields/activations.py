"""Device functions of the field's activations: the density with its blob, the albedo, and their derivatives.

`fields.field` defines them. Everything is fp32, a tile [BLOCK] of points at a time.
SOFTPLUS: the density's activation is softplus, otherwise the clamped exponential. SINGLE: the field computes in fp32,
where sigma has to be as precise as torch's.
"""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.fields.mlp import COLUMNS, pick

MAX_EXPONENT = 15.0
_MAX_EXPONENT = constant(MAX_EXPONENT)


@jit
def precise_exp(x, SINGLE: tl.constexpr):
    """exp(x) to a relative error of 2e-7, wherever fp32 can hold the result; the error of tl.exp grows with |x|.

    SINGLE halves the error, to that of torch, for normals by central differences: they multiply it by a hundred.
    """
    x = tl.where(x < -87.0, -87.0, x)
    exponent = tl.floor(x * 1.4426950408889634 + 0.5)
    remainder = (x - exponent * 0.693359375) + exponent * 2.12194440e-4  # ln 2 in two parts
    if SINGLE:
        series = 1.0 / 24 + remainder * (1.0 / 120 + remainder * (1.0 / 720 + remainder * (1.0 / 5040)))
        series = 1.0 + remainder * (1.0 + remainder * (0.5 + remainder * (1.0 / 6 + remainder * series)))
        return series * ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    else:
        return tl.exp2(remainder * 1.4426950408889634) * tl.exp2(exponent)


@jit
def blob_logit(x, y, z, density, radius, SOFTPLUS: tl.constexpr, SINGLE: tl.constexpr):
    """World coordinates [BLOCK] -> the blob's part of the density's logit [BLOCK]."""
    squared = x * x + y * y + z * z
    # Division and root are rounded as IEEE 754 demands: central differences make an error of the last bit a hundred
    # times as large.
    if SOFTPLUS:
        return density * (1.0 - tl.div_rn(tl.sqrt_rn(tl.maximum(squared, 1e-12)), radius))
    elif SINGLE:
        return density * precise_exp(tl.div_rn(squared, -2.0 * radius * radius), True)
    else:
        return density * precise_exp(squared / (-2.0 * radius * radius), False)


@jit
def blob_slope(x, y, z, density, radius, SOFTPLUS: tl.constexpr):
    """The factor [BLOCK] that turns (x, y, z) into the gradient of `blob_logit`."""
    squared = x * x + y * y + z * z
    if SOFTPLUS:
        # The gradient of a norm is not defined at 0: it is 0 below the floor.
        return tl.where(squared < 1e-12, 0.0, -density / (radius * tl.sqrt(tl.maximum(squared, 1e-12))))
    else:
        return precise_exp(squared / (-2.0 * radius * radius), False) * (-density / (radius * radius))


@jit
def activate_density(logit, SOFTPLUS: tl.constexpr, SINGLE: tl.constexpr):
    """Logit with its blob [BLOCK] -> sigma [BLOCK]."""
    if SOFTPLUS:
        # log(1 + e) = 2 atanh(e / (2 + e)) keeps the digits of a small e.
        e = precise_exp(-tl.abs(logit), SINGLE)
        z = tl.div_rn(e, 2.0 + e)
        t = z * z
        series = 1.0 / 9 + t * (1.0 / 11 + t * (1.0 / 13 + t * (1.0 / 15 + t * (1.0 / 17))))
        series = 1.0 + t * (1.0 / 3 + t * (1.0 / 5 + t * (1.0 / 7 + t * series)))
        return tl.maximum(logit, 0.0) + 2.0 * z * series
    else:
        # A comparison keeps a NaN, a minimum would not.
        return precise_exp(tl.where(logit > _MAX_EXPONENT, _MAX_EXPONENT, logit), SINGLE)


@jit
def density_slope(logit, sigma, SOFTPLUS: tl.constexpr):
    """d sigma / d logit [BLOCK]; of the exponential it is sigma on both sides of the clamp."""
    if SOFTPLUS:
        e = precise_exp(-tl.abs(logit), False)
        return tl.where(logit > 0, 1.0, e) / (1.0 + e)
    else:
        return sigma


@jit
def activate(outputs, blob, SOFTPLUS: tl.constexpr, SINGLE: tl.constexpr):
    """outputs [BLOCK, COLUMNS] of `mlp`, `blob_logit` [BLOCK] -> sigma, red, green, blue, the density's logit."""
    logit = pick(outputs, 0) + blob
    sigma = activate_density(logit, SOFTPLUS, SINGLE)
    return sigma, tl.sigmoid(pick(outputs, 1)), tl.sigmoid(pick(outputs, 2)), tl.sigmoid(pick(outputs, 3)), logit


@jit
def join_output_grads(grad_logit, grad_red, grad_green, grad_blue):
    """Gradients [BLOCK] of the four outputs, before their activations -> tile [BLOCK, COLUMNS]."""
    column = tl.arange(0, COLUMNS)[None, :]
    tile = tl.where(column == 0, grad_logit[:, None], 0.0)
    tile = tl.where(column == 1, grad_red[:, None], tile)
    tile = tl.where(column == 2, grad_green[:, None], tile)
    return tl.where(column == 3, grad_blue[:, None], tile)
