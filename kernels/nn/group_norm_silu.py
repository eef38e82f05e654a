"""Group normalisation, with or without SiLU behind it, in one operator.

With the elements of a group (D = C / G channels of one image at all S places) numbered i, M = D S of them:
mean = sum x_i / M, var = sum (x_i - mean)^2 / M, rstd = 1 / sqrt(var + eps), n_i = (x_i - mean) rstd,
z_i = n_i w_c + b_c with the weight and bias of the channel, y_i = z_i sigmoid(z_i), or z_i without SiLU.
Backward, g_i the gradient of y_i and e_i = g_i s_i (1 + z_i (1 - s_i)), s_i = sigmoid(z_i) (without SiLU e_i = g_i):
dL/dx_i = rstd (w_c e_i - sum_j w_c e_j / M - n_i sum_j w_c e_j n_j / M), dL/dw_c = sum e_i n_i, dL/db_c = sum e_i.

`added`, a number for each channel of an image, is added to x before all that: the bias of a convolution, say, or the
embedding of the time.

Gradients: into x, weight, bias and added. z and s are computed again from x, mean and rstd; nothing else is kept.
Legend: N images, C channels, G groups of D channels, S places (H W of a picture); P parts of a group.
Layouts: x [N, C, ...] contiguous, or with channels last in memory; the output has the layout of x. Others are copied.
Numerics: everything in fp32. A group that stays in registers has its mean taken off before squares are added up; of a
part of a larger one, differences to one of its elements and their squares are. Parts are merged by the formula of Chan
et al. in a fixed order, so that results repeat bit for bit.
Source: Wu and He, Group Normalization, 2018. Merging: Chan, Golub and LeVeque, Algorithms for Computing the Sample
Variance, 1983.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast.kernels._core.checks import check_kernel_dtype, check_positive, check_tensor
from dream_fast.kernels._core.launch import launch, use_triton
from dream_fast.kernels._core.layout import check_feature_map, dense, laid_out_like, power_of_two
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
    normed = torch.group_norm(x, groups, weight, bias, eps)
    return F.silu(normed) if silu else normed


# Elements of a tile: 32 for each lane of 4 warps, so that four 16-byte loads of a lane are under way and its values in
# fp32 leave registers for several programs a multiprocessor.
_TILE = 4096
# A pass that adds up: elements of its tiles, of which a warp takes _SUMMED (it keeps two sums of each in registers, and
# many warps wait long for each other at its end); and the most programs, eight for each of an H100's multiprocessors.
_SUM_TILE = 2048
_SUMMED = 1024
_PROGRAMS = 1056
# Elements of a group that one program keeps in registers: 32 a lane of 16 warps. Twice as many spill.
_WHOLE = 16384
# Parts of a group, times the groups of a tile, up to which every tile merges them for itself instead of a kernel of its
# own before: that saves a launch, and the parts come from the L2 cache.
_MERGE = 1024
# Channels side by side in memory that a tile takes where channels are last: 256 bytes in half precision.
_COLUMNS = 128


def _config(images: int, groups: int, width: int, places: int, channels_last: bool) -> dict[str, int]:
    """Tiles of [ROWS, GROUPS * WIDTH] for groups of `width` channels: one a group where it fits, or as follows.

    Where channels are last a tile holds many channels of some rows, so that it reads long runs of memory whatever the
    width of a group; else many places of one channel, or all places of some channels of a group. Then `parts` (a part
    is `chunk` rows) are added up first; more rows a part keep the number of parts down.
    """
    rows, columns = power_of_two(places), power_of_two(width)
    if rows * columns <= _WHOLE:
        warps = max(1, rows * columns // 1024)
        return {"whole": 1, "ROWS": rows, "GROUPS": 1, "WIDTH": columns, "num_warps": warps}
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
    return {
        "whole": 0,
        "ROWS": rows,
        "GROUPS": together,
        "WIDTH": columns,
        "blocks": blocks,
        "chunk": chunk,
        "row_parts": row_parts,
        "parts": column_parts * row_parts,
        "row_tiles": row_tiles,
        "tiles": column_parts * row_tiles,
        "merge": int(column_parts * row_parts * together <= _MERGE),
        "num_warps": max(1, min(8, rows * together * columns // 1024)),
        "sums": {"ROWS": sum_rows, "num_warps": max(1, min(8, sum_rows * together * columns // _SUMMED))},
    }


def _tiling(x: Tensor, groups: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """What every kernel takes of the layout of x, what those of parts take beside it, and the configuration."""
    images, channels, width = x.shape[0], x.shape[1], x.shape[1] // groups
    places = x[0, 0].numel()
    last = not x.is_contiguous()
    config = _config(images, groups, width, places, last)
    layout = {
        "places": places,
        "channels": channels,
        "groups": groups,
        "width": width,
        "D": width if last else 0,
        "ROWS": config["ROWS"],
        "WIDTH": config["WIDTH"],
        "num_warps": config["num_warps"],
    }
    if config["whole"]:
        return layout, {}, config
    return layout, {"GROUPS": config["GROUPS"], "parts": config["parts"], "blocks": config["blocks"]}, config


@torch.library.custom_op("dream_fast::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, and mean and rstd of every group [2, N, G]."""
    x, weight, bias = dense(x), weight.contiguous(), bias.contiguous()
    added = None if added is None else added.contiguous()
    images, device = x.shape[0], x.device
    y, moments = torch.empty_like(x), torch.empty(2, images, groups, dtype=torch.float32, device=device)
    if x.numel() == 0:
        return y, moments.zero_()
    layout, split, config = _tiling(x, groups)
    common = {"x": x, "added": added, "moments": moments, "moments_plane": images * groups, "eps": eps}
    affine = {"weight": weight, "bias": bias, "y": y, "SILU": silu}
    if config["whole"]:
        launch(group_norm_whole_fwd_kernel, (images * groups,), device, **layout, **common, **affine)
        return y, moments
    parts, chunks = config["parts"], {"row_parts": config["row_parts"], "chunk": config["chunk"]}
    partials = torch.empty(2, images, groups, parts, dtype=torch.float32, device=device)
    buffer = {"partials": partials, "plane": images * groups * parts}
    launch(
        group_norm_moments_fwd_kernel,
        (images * config["blocks"] * parts,),
        device,
        x=x,
        added=added,
        **layout | config["sums"],
        **split,
        **chunks,
        **buffer,
    )
    if not config["merge"]:
        launch(
            group_norm_merge_fwd_kernel,
            (images * groups,),
            device,
            **buffer,
            **chunks,
            moments=moments,
            moments_plane=images * groups,
            places=layout["places"],
            width=layout["width"],
            parts=parts,
            eps=eps,
            WIDTH=config["WIDTH"],
        )
    launch(
        group_norm_apply_fwd_kernel,
        (images * config["blocks"] * config["tiles"],),
        device,
        **layout,
        **split,
        **chunks,
        **buffer,
        **common,
        **affine,
        tiles=config["tiles"],
        row_tiles=config["row_tiles"],
        MERGE=bool(config["merge"]),
    )
    return y, moments


@_group_norm_silu.register_fake
def _(x, groups, weight, bias, eps, silu, added):
    return torch.empty_like(dense(x)), x.new_empty(2, x.shape[0], groups, dtype=torch.float32)


@torch.library.custom_op("dream_fast::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None,
    moments: Tensor,
    silu: bool,
    of_channels: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and those of bias and weight, [2, C] ([2, 0] unless `of_channels`)."""
    x, weight, bias = dense(x), weight.contiguous(), bias.contiguous()
    added = None if added is None else added.contiguous()
    images, channels, groups, device = x.shape[0], x.shape[1], moments.shape[2], x.device
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, x.new_zeros(2, channels if of_channels else 0, dtype=torch.float32)
    grad_y = laid_out_like(grad_y, x)
    layout, split, config = _tiling(x, groups)
    rows = 1 if config["whole"] else config["row_parts"]
    channel_sums = torch.empty(2, images, rows, channels, dtype=torch.float32, device=device) if of_channels else None
    common = {"grad_y": grad_y, "x": x, "added": added, "weight": weight, "bias": bias, "moments": moments}
    common |= {"moments_plane": images * groups, "SILU": silu, **layout}
    sums_of = {"channel_sums": channel_sums, "channel_plane": images * rows * channels}
    if config["whole"]:
        launch(
            group_norm_whole_bwd_kernel,
            (images * groups,),
            device,
            **common,
            **sums_of,
            grad_x=grad_x,
            # Lanes that add up one channel in another order would round the first product of it otherwise, and which of
            # them counts would be a race.
            fp_fusion=False,
        )
    else:
        parts = config["parts"]
        partials = torch.empty(2, images, groups, parts, dtype=torch.float32, device=device)
        buffer = {"partials": partials, "plane": images * groups * parts}
        launch(
            group_norm_sums_bwd_kernel,
            (images * config["blocks"] * parts,),
            device,
            **common | config["sums"],
            **split,
            **buffer,
            **sums_of,
            row_parts=rows,
            chunk=config["chunk"],
        )
        sums = None
        if not config["merge"]:
            sums = torch.empty_like(moments)
            launch(
                group_norm_merge_bwd_kernel,
                (images * groups,),
                device,
                **buffer,
                sums=sums,
                sums_plane=images * groups,
                parts=parts,
            )
        launch(
            group_norm_apply_bwd_kernel,
            (images * config["blocks"] * config["tiles"],),
            device,
            **common,
            **split,
            **buffer,
            sums=sums,
            grad_x=grad_x,
            tiles=config["tiles"],
            row_tiles=config["row_tiles"],
            MERGE=bool(config["merge"]),
        )
    return grad_x, x.new_empty(2, 0, dtype=torch.float32) if channel_sums is None else channel_sums.sum((1, 2))


@_group_norm_silu_backward.register_fake
def _(grad_y, x, weight, bias, added, moments, silu, of_channels):
    return torch.empty_like(dense(x)), x.new_empty(2, x.shape[1] if of_channels else 0, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, _, weight, bias, _, silu, added = inputs
    ctx.silu = silu
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, added, output[1])


def _backward(ctx, grad_y, _):
    if grad_y is None:
        return (None,) * 7
    x, weight, bias, added, moments = ctx.saved_tensors
    of_weight, of_bias = ctx.needs_input_grad[2:4]
    of_channels = of_weight or of_bias
    grad_x, sums = _group_norm_silu_backward(grad_y, x, weight, bias, added, moments, ctx.silu, of_channels)
    grad_weight = sums[1].to(weight.dtype) if of_weight else None
    grad_bias = sums[0].to(bias.dtype) if of_bias else None
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

    Each of the `groups` (a divisor of C) is normalised over its channels and all places of an image; `silu` puts SiLU
    behind it; `added` [N, C] is added to x first.

    Raises TypeError or ValueError for arguments of the wrong type, shape, dtype or device.
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
