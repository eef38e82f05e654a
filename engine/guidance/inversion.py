"""The noise that a model itself finds in a clean latent, by DDIM inversion.

From the clean latent upwards the deterministic step of DDIM (Song et al. 2020, equation 12 with sigma 0) is taken
backwards: at level u the model splits its latent into (eps, z0), and at the next level u' the latent is
sqrt(a_u') z0 + sqrt(1 - a_u') eps. The clean latent counts as one of level 0.
"""

import torch
from torch import Tensor

from dream_fast.engine.guidance.cfg import guided_prediction, strengths
from dream_fast.engine.guidance.model.components import Components


@torch.no_grad()
def inverted_noise(
    components: Components, z: Tensor, t: Tensor, cond: Tensor, uncond: Tensor, *, scale: float | Tensor, steps: int
) -> Tensor:
    """n [B, C, h, w] for which sqrt(a_t) z + sqrt(1 - a_t) n is what ``z`` is inverted to, up to levels ``t`` [B].

    ``steps`` calls of the UNet on 2B rows, at levels evenly below ``t``; ``scale`` guides each of them.
    """
    noisy = z
    for step in range(steps):
        eps, clean = guided_prediction(components, noisy, t * step // steps, cond, uncond, scale=scale)
        signal, noise = strengths(components, t * (step + 1) // steps)
        noisy = signal * clean + noise * eps
    return (noisy - signal * z) / noise
