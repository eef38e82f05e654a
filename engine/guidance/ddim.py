"""Text to image with a loaded model, to look at what it knows before it guides anything."""

import torch
from torch import Tensor

from dream_fast.engine.guidance.cfg import guided_prediction, sqrt_alphas
from dream_fast.engine.guidance.model.components import Components


@torch.no_grad()
def sample(
    components: Components,
    cond: Tensor,
    uncond: Tensor,
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images [B, 3, S, S] in [0, 1], fp32, for embeddings ``cond`` and ``uncond`` [B, T, D], by deterministic DDIM.

    S is the model's image_size; ``generator`` belongs to its device. The levels run evenly from the noisiest one down
    to the clean image (DDIM, Song et al. 2020, equation 12 with sigma 0). Raises ValueError for components without the
    VAE's decoder and for a number of steps that the schedule does not have.
    """
    _need_decoder(components)
    if not 1 <= steps <= components.num_train_timesteps:
        raise ValueError(f"steps must lie in 1 to {components.num_train_timesteps}, not {steps}")
    batch, size = len(cond), components.latent_size
    shape = (batch, components.latent_channels, size, size)
    z = torch.randn(shape, generator=generator, device=components.device)
    levels = [components.num_train_timesteps * (steps - i) // steps - 1 for i in range(steps)]
    for level, following in zip(levels, [*levels[1:], None], strict=True):
        t = torch.full((batch,), level, device=components.device)
        eps, z0 = guided_prediction(components, z, t, cond, uncond, scale=guidance_scale, rescale=guidance_rescale)
        if following is None:
            z = z0
        else:
            alpha = components.alphas_cumprod[following]
            z = alpha.sqrt() * z0 + (1 - alpha).sqrt() * eps
    return decode(components, z)


@torch.no_grad()
def decode(components: Components, latents: Tensor) -> Tensor:
    """Images [B, 3, S, S] in [0, 1], fp32, of ``latents`` [B, C, h, w]; S is the model's image_size.

    Raises ValueError for components without the VAE's decoder.
    """
    _need_decoder(components)
    if components.latents_are_pixels:
        return (latents / 2 + 0.5).clamp(0, 1)
    latents = latents / components.scaling_factor + components.shift_factor
    images = components.vae.decode(latents.to(components.dtype), return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _need_decoder(components: Components) -> None:
    if not components.latents_are_pixels and components.vae.decoder is None:
        raise ValueError("components have no VAE decoder; load them with need_vae_decoder=True")


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
        signal, noise = sqrt_alphas(components, t * (step + 1) // steps)
        noisy = signal * clean + noise * eps
    return (noisy - signal * z) / noise
