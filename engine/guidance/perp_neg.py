"""Perp-Neg: push a prediction away from views that the camera does not see, keeping what they share with its view.

With d_0 = eps_c - eps_u for the prompt of the camera's view and d_i for those of the front and the side,

    eps_hat = eps_u + s (d_0 + sum_i w_i (d_i - <d_i, d_0> / max(|d_0|^2, 1e-6) d_0)),    w_i <= 0

so only parts perpendicular to d_0 are pushed away (Armandpour et al. 2023). With r the share of the first of the two
views that the prompt is blended from, w the base weight and f and s its decays, the weights are

    front to side   w_front = 0 if r > 0.8 else w exp(-f r)      w_side = 0 if r < 0.2 else w exp(-s (1 - r))
    side to back    w_front = w                                  w_side = 0 if r > 0.8 else w/2 exp(-s r)

as in stable-dreamfusion, where r = 1 - |azimuth| / 90 and 2 - |azimuth| / 90. From above nothing is pushed away: front
and side are both visible.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.engine.guidance.model.image_model import Embedding


class Negatives(NamedTuple):
    """Prompts to push away from."""

    embeddings: Embedding  # of N rows, the same for the whole batch
    weights: Tensor  # [B, N]


def negative_weights(views: Tensor, base: float, front_decay: float, side_decay: float) -> Tensor:
    """Weights [B, 2] of the front and the side, for the blending weights `views` [B, 4] of `prompts.view_weights`.

    With a --view_blend below 90, r is the share of a view in the blended prompt, not the angle.
    """
    front, side, back, overhead = views.unbind(dim=-1)
    front_to_side = torch.stack(
        [
            (front <= 0.8) * base * torch.exp(-front_decay * front),
            (front >= 0.2) * base * torch.exp(-side_decay * (1 - front)),
        ]
    )
    side_to_back = torch.stack(
        [torch.full_like(side, base), (side <= 0.8) * (base / 2) * torch.exp(-side_decay * side)]
    )
    return (torch.where(back > 0, side_to_back, front_to_side) * (1 - overhead)).T


def perpendicular_combine(direction: Tensor, others: Sequence[Tensor], weights: Tensor) -> Tensor:
    """d_0 plus the weighted perpendicular parts of the others: d_0 `direction` and N `others` each [B, C, h, w]."""
    main = direction.flatten(1)
    stacked = torch.stack(list(others)).flatten(2)  # [N, B, C h w]
    along = (stacked * main).sum(dim=-1) / main.square().sum(dim=-1).clamp_min(1e-6)
    perpendicular = stacked - along[..., None] * main
    return direction + (weights.T[..., None] * perpendicular).sum(dim=0).view_as(direction)
