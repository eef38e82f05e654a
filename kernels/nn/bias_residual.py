"""The end of a residual block in one pass: the output of a convolution, its bias and the residual.

y = x + bias_c + residual, c the channel. A convolution that adds its bias itself writes and reads x once more.

Gradients: into x and residual that of y itself, at no cost; into bias its sum over images and places.
Legend: N images, C channels, S places (H W of an image). In memory x is a matrix, [N S, C] where channels are last,
else [N C, S]; a tile is [ROWS, COLUMNS] of it.
Layouts: x [N, C, ...] contiguous, or with channels last in memory; y has the layout of x. Others are copied.
Numerics: sums in fp32, rounded once.
Source: He et al., Deep Residual Learning for Image Recognition, 2015.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import check_kernel_dtype, check_tensor
from dream_fast.kernels._core.launch import jit, launch, tl, use_triton
from dream_fast.kernels._core.layout import check_feature_map, dense, laid_out_like, power_of_two
from dream_fast.kernels._core.operator import operator


def bias_residual_reference(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The definition of `bias_residual` in plain PyTorch, for any float dtype."""
    return x + bias.view(1, -1, *[1] * (x.dim() - 2)) + residual


@jit
def bias_residual_fwd_kernel(
    x,  # [rows, columns] float
    bias,  # [channels] float
    residual,  # as x
    y,  # as x
    rows,
    columns,
    channels,
    tiles,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y of a tile; `tiles` of them lie side by side. LAST: columns are channels, else rows are."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    element = row[:, None] * columns + column[None, :]
    total = tl.load(x + element, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + element, mask=inside, other=0.0).to(tl.float32)
    if LAST:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    else:
        total += tl.load(bias + row % channels, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(y + element, total, mask=inside)


# Elements of a tile: 16 for each lane of 4 warps, so that two 16-byte loads of each tensor are in flight in half
# precision.
_TILE = 2048


class BiasResidualConfig(NamedTuple):
    """Rows and columns of a tile, warps."""

    rows: int
    columns: int
    num_warps: int


def _bias_residual_config(rows: int, columns: int) -> BiasResidualConfig:
    """Choose long tiles: whole rows where they fit."""
    width = min(_TILE, power_of_two(columns))
    height = min(_TILE // width, power_of_two(rows))
    return BiasResidualConfig(height, width, num_warps=max(1, height * width // 512))


@operator("dream_fast::bias_residual")
def _bias_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    x = dense(x)
    residual, bias, y = laid_out_like(residual, x), bias.contiguous(), torch.empty_like(x)
    if x.numel() == 0:
        return y
    channels, channels_last = x.shape[1], not x.is_contiguous()
    columns = channels if channels_last else x[0, 0].numel()
    rows = x.numel() // columns
    config = _bias_residual_config(rows, columns)
    tiles = -(-columns // config.columns)
    launch(
        bias_residual_fwd_kernel,
        (-(-rows // config.rows) * tiles,),
        x.device,
        x=x,
        bias=bias,
        residual=residual,
        y=y,
        rows=rows,
        columns=columns,
        channels=channels,
        tiles=tiles,
        LAST=channels_last,
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
    return y


@_bias_residual.register_fake
def _(x, bias, residual):
    return torch.empty_like(dense(x))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)


def _backward(ctx, grad):
    if grad is None:
        return None, None, None
    grad_bias = None
    if ctx.needs_input_grad[1]:
        grad_bias = grad.movedim(1, 0).flatten(1).sum(1, dtype=torch.float32).to(grad.dtype)
    return grad, grad_bias, grad


_bias_residual.register_autograd(_backward, setup_context=_setup_context)


def bias_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x [N, C, ...], bias [C], residual as x -> [N, C, ...]: their sum, in the dtype and memory format of x.

    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype or device.
    """
    check_feature_map("x", x)
    check_tensor("bias", bias, (x.shape[1],), dtypes=(x.dtype,), like=("x", x))
    check_tensor("residual", residual, tuple(x.shape), dtypes=(x.dtype,), like=("x", x))
    if use_triton(x):
        check_kernel_dtype("x", x)
        return _bias_residual(x, bias, residual)
    return bias_residual_reference(x, bias, residual)
