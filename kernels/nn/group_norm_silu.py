"""Group normalisation, with or without SiLU behind it, in one operator.

With the elements of a group (D = C / G channels of one image at all S places) numbered i, M = D S of them:
mean = sum x_i / M, var = sum (x_i - mean)^2 / M, rstd = 1 / sqrt(var + eps), n_i = (x_i - mean) rstd,
z_i = n_i w_c + b_c with the weight and bias of the channel, y_i = z_i sigmoid(z_i), or z_i without SiLU.
Backward, g_i the gradient of y_i and e_i = g_i s_i (1 + z_i (1 - s_i)), s_i = sigmoid(z_i) (without SiLU e_i = g_i):
dL/dx_i = rstd (w_c e_i - sum_j w_c e_j / M - n_i sum_j w_c e_j n_j / M), dL/dw_c = sum e_i n_i, dL/db_c = sum e_i.

`added`, a number for each channel of an image, is added to x first: the bias of a convolution, say, or the embedding of
the timestep.

Gradients: into x, weight, bias and added. z and s are computed again from x, mean and rstd; nothing else is saved.
Legend: N images, C channels, G groups of D channels, S places (H W of an image); P parts of a group.
Layouts: x [N, C, ...] contiguous, or with channels last in memory; the output has the layout of x. Others are copied.
Numerics: everything in fp32. In a group that stays in registers the squared differences from its mean are added up; in
a part of a larger group, the differences from one of its elements and their squares. Parts are merged by the formula of
Chan et al. in a fixed order, so that results repeat bit for bit.
Source: Wu and He, Group Normalization, 2018. Merging: Chan, Golub and LeVeque, Algorithms for Computing the Sample
Variance, 1983.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast.kernels._core.checks import check_kernel_dtype, check_positive, check_tensor
from dream_fast.kernels._core.launch import launch, use_triton
from dream_fast.kernels._core.layout import check_feature_map, dense, laid_out_like, power_of_two
from dream_fast.kernels._core.operator import operator
from dream_fast.kernels.nn.group_norm_kernels import (
    group_norm_apply_bwd_kernel,
    group_norm_apply_fwd_kernel,
    group_norm_merge_bwd_kernel,
    group_norm_merge_fwd_kernel,
    group_norm_moments_fwd_kernel,
    group_norm_sums_bwd_kernel,
    group_norm_whole_bwd_kernel,
    group_norm_whole_fwd_kernel,
)


def group_norm_silu_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    added: Tensor | None = None,
) -> Tensor:
    """The definition of `group_norm_silu` in plain PyTorch, for any float dtype."""
    if added is not None:
        x = x + added.view(*added.shape, *[1] * (x.dim() - 2))
    if x.numel() == 0:  # torch leaves the gradients of the weights unwritten
        return x * (weight + bias).view(1, -1, *[1] * (x.dim() - 2))
    normalised = torch.group_norm(x, groups, weight, bias, eps)
    return F.silu(normalised) if silu else normalised


# Elements of a tile: 32 for each lane of 4 warps, so that four 16-byte loads of a lane are in flight and its values in
# fp32 leave registers for several programs a multiprocessor.
_TILE = 4096
# A pass that adds up: elements of its tiles, of which a warp takes _SUMMED (it keeps two sums of each in registers, and
# many warps wait long for each other at its end); and the most programs, eight for each of an H100's multiprocessors.
_SUM_TILE = 2048
_SUMMED = 1024
_PROGRAMS = 1056
# Elements of a group that one program keeps in registers: 32 a lane of 16 warps. Twice as many spill.
_WHOLE = 16384
# Parts of a group, times the groups of a tile, up to which every tile merges them itself instead of a kernel of its own
# before: that saves a launch, and the parts come from the L2 cache.
_MERGE = 1024
# Channels side by side in memory that a tile takes where channels are last: 256 bytes in half precision.
_COLUMNS = 128


class GroupNormConfig(NamedTuple):
    """Tiles of [rows, groups * width]; one for a whole group, or several parts and tiles of a block of groups."""

    whole: bool
    rows: int
    groups: int
    width: int
    num_warps: int
    blocks: int = 1  # of groups
    chunk: int = 0  # rows of a part
    row_parts: int = 1
    parts: int = 1
    row_tiles: int = 1
    tiles: int = 1
    merge: bool = False  # every tile merges the parts itself
    sum_rows: int = 0  # of the tiles of passes that add up, and their warps
    sum_warps: int = 1


def _group_norm_silu_config(images: int, groups: int, width: int, places: int, channels_last: bool) -> GroupNormConfig:
    """Choose tiles for groups of `width` channels.

    Where channels are last a tile holds many channels of some rows, so that it reads long runs of memory whatever the
    width of a group; else many places of one channel, or all places of some channels of a group. Parts of `chunk` rows
    are added up first; more rows a part keep the number of parts down.
    """
    rows, columns = power_of_two(places), power_of_two(width)
    if rows * columns <= _WHOLE:
        return GroupNormConfig(True, rows, 1, columns, num_warps=max(1, rows * columns // 1024))
    if channels_last:
        columns = min(columns, _COLUMNS)
        together = min(power_of_two(groups), max(1, min(_COLUMNS, _TILE) // columns))
        rows = max(1, min(rows, _TILE // (together * columns)))
    else:
        together, rows = 1, min(rows, _TILE)
        columns = min(columns, _TILE // rows)
    blocks, column_parts, row_tiles = -(-groups // together), -(-width // columns), -(-places // rows)
    sum_rows = max(1, min(rows, _SUM_TILE // (together * columns)))
    chunk = sum_rows * -(-images * blocks * column_parts * -(-places // sum_rows) // _PROGRAMS)
    row_parts = -(-places // chunk)
    return GroupNormConfig(
        whole=False,
        rows=rows,
        groups=together,
        width=columns,
        num_warps=max(1, min(8, rows * together * columns // 1024)),
        blocks=blocks,
        chunk=chunk,
        row_parts=row_parts,
        parts=column_parts * row_parts,
        row_tiles=row_tiles,
        tiles=column_parts * row_tiles,
        merge=column_parts * row_parts * together <= _MERGE,
        sum_rows=sum_rows,
        sum_warps=max(1, min(8, sum_rows * together * columns // _SUMMED)),
    )


def _tile_arguments(x: Tensor, groups: int) -> tuple[GroupNormConfig, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The configuration, and arguments of all kernels but those that merge, of tiles, of passes that add up."""
    images, channels, width = x.shape[0], x.shape[1], x.shape[1] // groups
    places, channels_last = x[0, 0].numel(), not x.is_contiguous()
    config = _group_norm_silu_config(images, groups, width, places, channels_last)
    layout = {
        "places": places,
        "channels": channels,
        "groups": groups,
        "width": width,
        "D": width if channels_last else 0,
        "WIDTH": config.width,
    }
    tiles = {"ROWS": config.rows, "num_warps": config.num_warps}
    sums = {"ROWS": config.sum_rows, "num_warps": config.sum_warps}
    if not config.whole:
        layout |= {"GROUPS": config.groups, "parts": config.parts, "blocks": config.blocks}
    return config, layout, tiles, sums


def _new_partials(images: int, groups: int, parts: int, device: torch.device) -> dict[str, Any]:
    """Allocate the sums of parts, as arguments of the kernels."""
    partials = torch.empty(2, images, groups, parts, dtype=torch.float32, device=device)
    return {"partials": partials, "plane": images * groups * parts}


@operator("dream_fast::group_norm_silu")
def _group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y, and mean and rstd of every group [2, N, G]."""
    x, weight, bias = dense(x), weight.contiguous(), bias.contiguous()
    added = None if added is None else added.contiguous()
    images, device = x.shape[0], x.device
    y, moments = torch.empty_like(x), torch.empty(2, images, groups, dtype=torch.float32, device=device)
    if x.numel() == 0:
        return y, moments.zero_()
    config, layout, tiles, sums = _tile_arguments(x, groups)
    normalised: dict[str, Any] = {"moments": moments, "moments_plane": images * groups, "eps": eps}
    tensors: dict[str, Any] = {"x": x, "added": added, "weight": weight, "bias": bias, "y": y, "SILU": silu}
    if config.whole:
        launch(group_norm_whole_fwd_kernel, (images * groups,), device, **layout, **tiles, **tensors, **normalised)
        return y, moments
    buffer = _new_partials(images, groups, config.parts, device)
    chunks: dict[str, Any] = {"row_parts": config.row_parts, "chunk": config.chunk}
    launch(
        group_norm_moments_fwd_kernel,
        (images * config.blocks * config.parts,),
        device,
        x=x,
        added=added,
        **layout,
        **sums,
        **chunks,
        **buffer,
    )
    if not config.merge:
        launch(
            group_norm_merge_fwd_kernel,
            (images * groups,),
            device,
            **buffer,
            **chunks,
            **normalised,
            places=layout["places"],
            width=layout["width"],
            parts=config.parts,
            WIDTH=config.width,
        )
    launch(
        group_norm_apply_fwd_kernel,
        (images * config.blocks * config.tiles,),
        device,
        **layout,
        **tiles,
        **chunks,
        **buffer,
        **tensors,
        **normalised,
        tiles=config.tiles,
        row_tiles=config.row_tiles,
        MERGE=config.merge,
    )
    return y, moments


@_group_norm_silu.register_fake
def _(x, groups, weight, bias, eps, silu, added):
    return torch.empty_like(dense(x)), x.new_empty(2, x.shape[0], groups, dtype=torch.float32)


@operator("dream_fast::group_norm_silu_backward")
def _group_norm_silu_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None,
    moments: Tensor,
    silu: bool,
    needs_channels: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and those of bias and weight, [2, C] ([2, 0] unless `needs_channels`)."""
    x, weight, bias = dense(x), weight.contiguous(), bias.contiguous()
    added = None if added is None else added.contiguous()
    images, channels, groups, device = x.shape[0], x.shape[1], moments.shape[2], x.device
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, x.new_zeros(2, channels if needs_channels else 0, dtype=torch.float32)
    config, layout, tiles, sums = _tile_arguments(x, groups)
    tensors: dict[str, Any] = {
        "grad_y": laid_out_like(grad_y, x),
        "x": x,
        "added": added,
        "weight": weight,
        "bias": bias,
    }
    tensors |= {"moments": moments, "moments_plane": images * groups, "SILU": silu}
    rows = 2 if needs_channels else 0
    sums_of_parts = torch.empty(rows, images, config.row_parts, channels, dtype=torch.float32, device=device)
    channel_sums: dict[str, Any] = {
        "channel_sums": sums_of_parts if needs_channels else None,
        "channel_plane": images * config.row_parts * channels,
    }
    if config.whole:
        launch(
            group_norm_whole_bwd_kernel,
            (images * groups,),
            device,
            **layout,
            **tiles,
            **tensors,
            **channel_sums,
            grad_x=grad_x,
            # Lanes that add up one channel in another order would round its first product differently, and which of
            # them is stored would be a race.
            fp_fusion=False,
        )
    else:
        buffer = _new_partials(images, groups, config.parts, device)
        launch(
            group_norm_sums_bwd_kernel,
            (images * config.blocks * config.parts,),
            device,
            **layout,
            **sums,
            **tensors,
            **buffer,
            **channel_sums,
            row_parts=config.row_parts,
            chunk=config.chunk,
        )
        _apply_backward(config, layout | tiles | tensors, buffer, grad_x)
    if not needs_channels:
        return grad_x, x.new_empty(2, 0, dtype=torch.float32)
    return grad_x, sums_of_parts.sum((1, 2))


def _apply_backward(config: GroupNormConfig, common: dict[str, Any], buffer: dict[str, Any], grad_x: Tensor) -> None:
    """Fill grad_x from the sums of the parts."""
    images, groups, device = grad_x.shape[0], common["groups"], grad_x.device
    sums = None
    if not config.merge:
        sums = torch.empty_like(common["moments"])
        launch(
            group_norm_merge_bwd_kernel,
            (images * groups,),
            device,
            **buffer,
            sums=sums,
            sums_plane=images * groups,
            parts=config.parts,
        )
    launch(
        group_norm_apply_bwd_kernel,
        (images * config.blocks * config.tiles,),
        device,
        **common,
        **buffer,
        sums=sums,
        grad_x=grad_x,
        tiles=config.tiles,
        row_tiles=config.row_tiles,
        MERGE=config.merge,
    )


@_group_norm_silu_backward.register_fake
def _(grad_y, x, weight, bias, added, moments, silu, needs_channels):
    return torch.empty_like(dense(x)), x.new_empty(2, x.shape[1] if needs_channels else 0, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, _, weight, bias, _, silu, added = inputs
    ctx.silu = silu
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, added, output[1])


def _backward(ctx, grad_y, _):
    if grad_y is None:
        return (None,) * 7
    x, weight, bias, added, moments = ctx.saved_tensors
    needs_weight, needs_bias = ctx.needs_input_grad[2:4]
    needs_channels = needs_weight or needs_bias
    grad_x, sums = _group_norm_silu_backward(grad_y, x, weight, bias, added, moments, ctx.silu, needs_channels)
    grad_weight = sums[1].to(weight.dtype) if needs_weight else None
    grad_bias = sums[0].to(bias.dtype) if needs_bias else None
    grad_added = None
    if ctx.needs_input_grad[6]:
        grad_added = grad_x.flatten(2).sum(2, dtype=torch.float32).to(added.dtype) if x.dim() > 2 else grad_x
    return grad_x, None, grad_weight, grad_bias, None, None, grad_added


_group_norm_silu.register_autograd(_backward, setup_context=_setup_context)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    added: Tensor | None = None,
) -> Tensor:
    """x [N, C, ...], weight [C], bias [C] -> [N, C, ...] in the dtype and memory format of x.

    Each of the `groups` (a divisor of C) is normalised over its channels and all places of an image. `silu` applies
    SiLU to the result; `added` [N, C] is added to x first.
    Raises TypeError or ValueError: for arguments of the wrong type, shape, dtype or device.
    """
    check_feature_map("x", x)
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    check_tensor("weight", weight, (channels,), dtypes=(x.dtype,), like=("x", x))
    check_tensor("bias", bias, (channels,), dtypes=(x.dtype,), like=("x", x))
    if added is not None:
        check_tensor("added", added, (x.shape[0], channels), dtypes=(x.dtype,), like=("x", x))
    check_positive("eps", eps)
    if use_triton(x):
        check_kernel_dtype("x", x)
        return _group_norm_silu(x, groups, weight, bias, eps, silu, added)[0]
    return group_norm_silu_reference(x, groups, weight, bias, eps, silu, added)
