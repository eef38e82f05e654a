"""Images of what a step showed to a diffusion model and of what the model made of it (--save_guidance)."""

from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.engine.guidance.ddim import decode
from dream_fast.engine.guidance.model.image_model import ImageModel
from dream_fast.engine.guidance.sds import resize


class GuidanceSnapshot(NamedTuple):
    """Input of a guidance and its latents, as in `GuidanceResult`."""

    rendered: Tensor  # [B, 3, H, W] in [0, 1], or latents [B, C, H, W]
    noisy: Tensor  # [B, C, h, w] x_t
    clean: Tensor  # [B, C, h, w] one-step estimate of x_0


@torch.no_grad()
def guidance_images(
    components: ImageModel, rendered: Tensor, noisy: Tensor, clean: Tensor, *, latents: bool = False
) -> Tensor:
    """Decode a snapshot to images [B, 3, 3, S, S] in [0, 1]: of each view the render, x_t and the estimate of x_0.

    With `latents`, `rendered` [B, C, h, w] is decoded too. S is the model's image_size.

    Raises ValueError: when `components` has no VAE decoder.
    """
    if latents:
        render = decode(components, resize(rendered, components.latent_size))
    else:
        render = resize(rendered, components.image_size)
    return torch.stack([render, decode(components, noisy), decode(components, clean)], dim=1)
