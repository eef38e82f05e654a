"""What a step showed to the image model and what the model made of it, as pictures."""

import torch
from torch import Tensor

from dream_fast.engine.guidance.ddim import decode
from dream_fast.engine.guidance.model.components import Components
from dream_fast.engine.guidance.sds import resize


@torch.no_grad()
def guidance_pictures(
    components: Components, shown: Tensor, noisy: Tensor, clean: Tensor, *, latents: bool = False
) -> Tensor:
    """Images [B, 3, 3, S, S] in [0, 1]: of each view the render, its noisy version and the one-step estimate.

    ``shown`` [B, 3, H, W] in [0, 1] is what the guidance was called with; with ``latents`` it is [B, C, h, w] in the
    scale of latents, and is decoded. ``noisy`` and ``clean`` [B, C, h, w] are those of its result. S is the model's
    image_size. Raises ValueError for components without the VAE's decoder.
    """
    if latents:
        render = decode(components, resize(shown, components.latent_size))
    else:
        render = resize(shown, components.image_size)
    return torch.stack([render, decode(components, noisy), decode(components, clean)], dim=1)
