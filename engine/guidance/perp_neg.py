"""Perp-Neg: away from the sides that are not seen, without losing what they share with the one that is.

With d_0 = eps_c - eps_u for the prompt of the side that is seen and d_i for those of the front and the side,

    eps_hat = eps_u + s (d_0 + sum_i w_i (d_i - <d_i, d_0> / max(|d_0|^2, 1e-6) d_0)),    w_i <= 0

so that only what is perpendicular to d_0 is pushed away (Armandpour et al. 2023). With the share r of the first of the
two sides that the prompt is blended from, w the base weight and f and s its decays,

    front to side   w_front = 0 if r > 0.8 else w exp(-f r)      w_side = 0 if r < 0.2 else w exp(-s (1 - r))
    side to back    w_front = w                                  w_side = 0 if r > 0.8 else w/2 exp(-s r)

as stable-dreamfusion has them, where r = 1 - |azimuth| / 90 and 2 - |azimuth| / 90. From above there is nothing to turn
away from: the front and the side are both in sight.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Negatives(NamedTuple):
    """Prompts to turn away from: ``embeddings`` [N, T, D], the same for the whole batch, with ``weights`` [B, N]."""

    embeddings: Tensor
    weights: Tensor


def negative_weights(views: Tensor, base: float, front_decay: float, side_decay: float) -> Tensor:
    """Weights [B, 2] of the front and the side, for the weights ``views`` [B, 4] with which the prompt is blended.

    ``views`` are those of :func:`~dream_fast.engine.guidance.prompts.view_weights`: with a --view_blend below 90 the
    share r that the prompt has of a side counts, not the angle.
    """
    front, side, back, overhead = views.unbind(dim=-1)
    before = torch.stack(
        [
            (front <= 0.8) * base * torch.exp(-front_decay * front),
            (front >= 0.2) * base * torch.exp(-side_decay * (1 - front)),
        ]
    )
    behind = torch.stack([torch.full_like(side, base), (side <= 0.8) * (base / 2) * torch.exp(-side_decay * side)])
    return (torch.where(back > 0, behind, before) * (1 - overhead)).T


def perpendicular_combine(towards: Tensor, others: Sequence[Tensor], weights: Tensor) -> Tensor:
    """d_0 + the weighted perpendicular parts, for d_0 = ``towards`` and N ``others``, each [B, C, h, w]."""
    main = towards.flatten(1)
    aside = torch.stack(list(others)).flatten(2)  # [N, B, C h w]
    shared = (aside * main).sum(dim=-1) / main.square().sum(dim=-1).clamp_min(1e-6)
    perpendicular = aside - shared[..., None] * main
    return towards + (weights.T[..., None] * perpendicular).sum(dim=0).view_as(towards)
