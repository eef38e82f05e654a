"""The two gradients of a hash grid's encoding, which several operators share.

`grid.hash_grid` defines the encoding enc. A sum of features, sum_f g_f enc_f(u), has a gradient of the table
(`scatter_features`) and one of the coordinates (`position_gradient`). Both also exist one order higher, along a tangent
t of the coordinates: the gradients of sum_f g_f (t . d enc_f / du).

Legend: N points, L levels, F features a level; features are stored by channel, [L * F, N].
Units: u = x * scale + shift is in [0,1] inside the scene cube; points outside contribute nothing.
Numerics: fp32. Sums into the table are atomic and in any order, except with `deterministic`, or where fp32 features of
many points go into few rows: those are fixed-point numbers, multiples of 2^-s with s chosen on the device so that
nothing overflows, which add up the same in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.launch import launch
from dream_fast.kernels.grid.device import level_table, view_as_pairs
from dream_fast.kernels.grid.hash_grid_kernels import (
    hash_grid_coordinates_bwd_kernel,
    hash_grid_table_bwd_kernel,
    hash_grid_x_bwd_kernel,
    transpose_kernel,
)
from dream_fast.kernels.grid.spec import HashGridSpec


class GridPoints(NamedTuple):
    """Points of a hash grid, and which of them and of the levels count.

    x: [N, 3] fp32; x * scale + shift are unit coordinates. count: rows from here on are padding ([] int64).
    active_levels: levels from here on are ignored (an int, or an integer scalar tensor on the device).
    """

    x: Tensor
    scale: float = 1.0
    shift: float = 0.0
    count: Tensor | None = None  # type: ignore[assignment]  # in place of tuple.count
    active_levels: int | Tensor | None = None

    def levels(self, spec: HashGridSpec) -> tuple[int, Tensor | None]:
        """Number of levels as far as the host knows it, and the number on the device."""
        if self.active_levels is None:
            return spec.levels, None
        if isinstance(self.active_levels, Tensor):
            return spec.levels, self.active_levels
        return max(0, min(self.active_levels, spec.levels)), None


def channel_major(features: Tensor, count: Tensor | None) -> Tensor:
    """features [C, N], made contiguous. Columns past `count` of a transposed [N, C] are not copied: any value."""
    if features.is_contiguous():
        return features
    source = features.t()
    if not source.is_contiguous():
        return features.contiguous()
    channels, n = features.shape
    out = torch.empty(channels, n, dtype=features.dtype, device=features.device)
    padded = 1 << (channels - 1).bit_length()
    block = max(4096 // padded, 16)
    launch(
        transpose_kernel,
        (-(-n // block),),
        features.device,
        source=source,
        out=out,
        count=count,
        n=n,
        CHANNELS=channels,
        PADDED=padded,
        BLOCK=block,
    )
    return out


class TableBwdConfig(NamedTuple):
    """block: lanes of a program. run: rows of a lane. width: numbers of an atomic."""

    block: int
    run: int
    width: int
    warps: int


def _hash_grid_table_bwd_config(n: int, features: int, fixed: bool) -> TableBwdConfig:
    """A longer run merges more writes and leaves fewer lanes: few rows need them all.

    Runs of 8 and 32, and loads of several rows at once, were no faster for the samples of 64 x 64 to 256 x 256 rays on
    an H200. Fixed-point numbers are added one by one.
    """
    width = {1: 1, 2: 4, 4: 2}[features]
    return TableBwdConfig(block=128, run=4 if n < 1 << 17 else 16, width=1 if fixed else width, warps=4)


def _largest(value: Tensor, count: Tensor | None) -> Tensor:
    """Largest magnitude [] in the live columns of value [C, N], NaN where there is one."""
    value = value.float().abs()
    if count is not None:
        value = torch.where(torch.arange(value.shape[1], device=value.device) < count, value, 0)
    return value.amax()


def fixed_point(bound: Tensor) -> tuple[Tensor, Tensor]:
    """Power of two that scales sums up to a scalar `bound` into int64, and its inverse, NaN unless bound is finite."""
    exponent = (60 - torch.log2(bound.double()).ceil()).nan_to_num(0, 0, 0).clamp(-120, 120)
    factor = torch.exp2(exponent).float()
    return factor, torch.where(torch.isfinite(bound), 1 / factor, torch.nan)


def _fixed_point_factor(
    points: GridPoints,
    spec: HashGridSpec,
    features: Tensor | None,
    tangent: Tensor | None,
    tangent_features: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`fixed_point` for the sums that `scatter_features` of these arguments adds up."""
    bound = torch.zeros((), device=points.x.device)
    if features is not None:
        bound = bound + _largest(features, points.count)
    if tangent is not None and tangent_features is not None:
        # No weight changes by more than 1.5 R a unit.
        reach = _largest(tangent.t(), points.count) * (3 * 1.5 * max(spec.resolutions) * abs(points.scale))
        bound = bound + _largest(tangent_features, points.count) * reach
    return fixed_point(bound * points.x.shape[0])


def _unit_coordinates(points: GridPoints, padded: int) -> Tensor:
    """Unit coordinates [3, padded] fp32; x is -1 for points that contribute nothing."""
    out = torch.empty(3, padded, device=points.x.device)
    launch(
        hash_grid_coordinates_bwd_kernel,
        (-(-padded // 256),),
        points.x.device,
        x=points.x.contiguous(),
        out=out,
        count=points.count,
        n=points.x.shape[0],
        padded=padded,
        scale=float(points.scale),
        shift=float(points.shift),
        BLOCK=256,
    )
    return out


def scatter_features(
    points: GridPoints,
    spec: HashGridSpec,
    *,
    features: Tensor | None = None,
    tangent: Tensor | None = None,
    tangent_features: Tensor | None = None,
    deterministic: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of a table, [rows, F] fp32, added to `out` if there is one.

    tangent: [N, 3] fp32; features, tangent_features: [L * F, N].

    table[row of corner c, f] += features[l F + f, n] w_c(u_n) + tangent_features[l F + f, n] (tangent_n . d w_c / du).
    Either part may be left out.
    """
    n, device = points.x.shape[0], points.x.device
    levels, active = points.levels(spec)
    if n == 0:
        return torch.zeros(spec.rows, spec.features, device=device) if out is None else out
    factor = inverse = None
    # A thousand sums and more into a row of the coarsest level lose digits in fp32 that the addends have: an error of
    # 5e-6 of the largest, where fixed-point numbers have 3e-7.
    single = all(value is None or value.dtype == torch.float32 for value in (features, tangent_features))
    fixed = deterministic or (single and 8 * n > 1000 * spec.offsets[1])
    if fixed:
        factor, inverse = _fixed_point_factor(points, spec, features, tangent, tangent_features)
    if out is None or fixed:
        grad = torch.zeros(spec.rows, spec.features, device=device, dtype=torch.int64 if fixed else torch.float32)
    else:
        grad = out
    config = _hash_grid_table_bwd_config(n, spec.features, fixed)
    blocks = -(-n // (config.block * config.run))
    padded = blocks * config.block * config.run
    launch(
        hash_grid_table_bwd_kernel,
        (blocks, levels * max(spec.features // 2, 1)),
        device,
        num_warps=config.warps,
        u=_unit_coordinates(points, padded),
        features=None if features is None else channel_major(features, points.count),
        tangent=None if tangent is None else tangent.contiguous(),
        tangent_features=None if tangent_features is None else channel_major(tangent_features, points.count),
        grad=grad,
        factor=factor,
        levels=level_table(spec, device),
        count=points.count,
        active=active,
        n=n,
        padded=padded,
        FEATURES=spec.features,
        SMOOTH=spec.interpolation == "smoothstep",
        WIDTH=config.width,
        RUN=config.run,
        BLOCK=config.block,
    )
    if inverse is None:
        return grad
    grad = grad.float() * inverse
    return grad if out is None else out.add_(grad)


class XBwdConfig(NamedTuple):
    """block: points of a program."""

    block: int
    warps: int


def _hash_grid_x_bwd_config() -> XBwdConfig:
    """A point a lane."""
    return XBwdConfig(block=128, warps=4)


def position_gradient(
    features: Tensor,
    points: GridPoints,
    table: Tensor,
    spec: HashGridSpec,
    *,
    tangent: Tensor | None = None,
    rounded: str = "",
) -> Tensor:
    """Gradient [N, 3] fp32 by u of sum_f features[f] enc_f(u): features [L * F, N], table [rows, F].

    With `tangent` [N, 3]: by u of sum_f features[f] (tangent . d enc_f / du). `rounded` names the type that the entries
    of an fp32 table are rounded to. Zeros outside the cube and past the count.
    """
    n, device = points.x.shape[0], points.x.device
    levels, active = points.levels(spec)
    out = torch.empty(n, 3, device=device)
    pairs, stored = view_as_pairs(table.contiguous())
    config = _hash_grid_x_bwd_config()
    launch(
        hash_grid_x_bwd_kernel,
        (-(-n // config.block),),
        device,
        num_warps=config.warps,
        features=channel_major(features, points.count),
        x=points.x.contiguous(),
        table=pairs,
        tangent=None if tangent is None else tangent.contiguous(),
        out=out,
        levels=level_table(spec, device),
        count=points.count,
        active=active,
        n=n,
        active_levels=levels,
        scale=float(points.scale),
        shift=float(points.shift),
        LEVELS=spec.levels,
        FEATURES=spec.features,
        SMOOTH=spec.interpolation == "smoothstep",
        STORED=stored,
        ROUNDED=rounded,
        BLOCK=config.block,
    )
    return out
