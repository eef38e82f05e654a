"""Volumetric compositing of the samples of every ray, front to back.

alpha_i = 1 - exp(-sigma_i dt_i); T_i = exp(-sum_{j<i} sigma_j dt_j), the sum over the ray's own samples;
w_i = T_i alpha_i where T_i >= stop, else 0.
Per ray: values = sum w_i v_i, opacity = sum w_i, depth = sum w_i t_i (not divided by opacity).
There is no background here: add (1 - opacity) * background outside.

Gradients: into sigma and values, from all four outputs; with g_i the gradient that reaches w_i,
dL/dsigma_i = dt_i (g_i T_{i+1} - sum_{j>i} g_j w_j). t, dt and the rule that ends a ray are constants.
Legend: cap rows of buffer, R rays, C channels; ray r owns rows offsets[r]:offsets[r + 1]; the rest is padding.
Units: t and dt in world units, sigma per world unit.
Numerics: sums in fp64; results in the dtype of sigma. Whatever padding rows hold does not matter.
Source: Max, Optical models for direct volume rendering, 1995; Mildenhall et al., NeRF, 2020, equation 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._launch import FLOATS, check_count, check_tensor
from dream_fast.kernels._reference import gather_rows, live_rows, pad_rows, scatter_rows


class Composited(NamedTuple):
    """values [R, C], opacity [R], depth [R], weights [cap]."""

    values: Tensor
    opacity: Tensor
    depth: Tensor
    weights: Tensor


def ray_of_row(offsets: Tensor, rows: int) -> Tensor:
    """offsets int64 [R + 1] -> int64 [rows]: the ray that owns each row of a packed buffer, R past the last ray's."""
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=offsets.device)
    return starts.index_add_(0, offsets[1:].clamp(max=rows), torch.ones_like(offsets[1:])).cumsum(0)[:rows]


def composite_reference(
    sigma: Tensor,
    values: Tensor,
    t: Tensor,
    dt: Tensor,
    offsets: Tensor,
    *,
    count: Tensor | None = None,
    stop: float = 1e-4,
) -> Composited:
    """The definition of `composite` in plain PyTorch, for any float dtype."""
    rows, rays, channels = sigma.shape[0], offsets.shape[0] - 1, values.shape[1]
    live = live_rows(rows, offsets[-1] if count is None else torch.minimum(offsets[-1], count))
    ray = ray_of_row(offsets, live)
    tau = sigma[:live].double() * dt[:live].double()
    # before[i] = tau_0 + ... + tau_{i-1}, over the whole buffer.
    before = torch.cat([tau.new_zeros(1), tau.cumsum(0)])
    transmittance = torch.exp(gather_rows(before, offsets[ray]) - before[:-1])
    weights = torch.where(transmittance >= stop, -torch.expm1(-tau) * transmittance, 0)
    columns = torch.cat([values[:live].double(), t[:live].double()[:, None], torch.ones_like(weights)[:, None]], 1)
    sums = scatter_rows(weights[:, None] * columns, ray, rays).to(sigma.dtype)
    return Composited(
        values=sums[:, :channels],
        opacity=sums[:, channels + 1],
        depth=sums[:, channels],
        weights=pad_rows(weights.to(sigma.dtype), rows),
    )


def composite(
    sigma: Tensor,
    values: Tensor,
    t: Tensor,
    dt: Tensor,
    offsets: Tensor,
    *,
    count: Tensor | None = None,
    stop: float = 1e-4,
) -> Composited:
    """sigma [cap], values [cap, C], t [cap], dt [cap], offsets int64 [R + 1] -> Composited.

    A ray ends at the first sample whose transmittance is below `stop` (0 = never). Rows from `count` on (an int64
    scalar tensor on the device; None: offsets[R]) weigh nothing and take no gradient.
    Raises TypeError or ValueError for arguments of the wrong type, shape, dtype or device.
    """
    check_tensor("sigma", sigma, ("cap",), dtypes=FLOATS)
    check_tensor("values", values, (sigma.shape[0], "C"), dtypes=FLOATS, like=("sigma", sigma))
    check_tensor("t", t, (sigma.shape[0],), dtypes=FLOATS, like=("sigma", sigma))
    check_tensor("dt", dt, (sigma.shape[0],), dtypes=FLOATS, like=("sigma", sigma))
    check_tensor("offsets", offsets, ("R + 1",), dtypes=(torch.int64,), like=("sigma", sigma))
    if offsets.shape[0] < 1:
        raise ValueError("offsets must have shape [R + 1], got [0]")
    check_count(count, ("sigma", sigma))
    if not 0 <= stop < 1:
        raise ValueError(f"stop must be in [0, 1), got {stop}")
    return composite_reference(sigma, values, t, dt, offsets, count=count, stop=stop)
