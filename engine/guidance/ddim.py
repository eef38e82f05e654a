"""DDIM (Song et al. 2020, equation 12 with sigma 0): sampling images, and the inversion of latents to noise."""

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
    """Sample images [B, 3, S, S] in [0, 1], fp32, for embeddings `cond` and `uncond` [B, T, D].

    S is the model's image_size; `generator` belongs to its device. The timesteps run evenly from the last one down to
    the clean image.

    Raises ValueError: when `components` has no VAE decoder, or `steps` exceeds the timesteps of the schedule.
    """
    _check_decoder(components)
    if not 1 <= steps <= components.num_train_timesteps:
        raise ValueError(f"steps must lie in 1 to {components.num_train_timesteps}, not {steps}")
    batch, size = len(cond), components.latent_size
    shape = (batch, components.latent_channels, size, size)
    z = torch.randn(shape, generator=generator, device=components.device)
    timesteps = [components.num_train_timesteps * (steps - i) // steps - 1 for i in range(steps)]
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        t = torch.full((batch,), timestep, device=components.device)
        eps, z0 = guided_prediction(components, z, t, cond, uncond, scale=guidance_scale, rescale=guidance_rescale)
        if following is None:
            z = z0
        else:
            alpha = components.alphas_cumprod[following]
            z = alpha.sqrt() * z0 + (1 - alpha).sqrt() * eps
    return decode(components, z)


@torch.no_grad()
def decode(components: Components, latents: Tensor) -> Tensor:
    """Decode latents [B, C, h, w] to images [B, 3, S, S] in [0, 1], fp32; S is the model's image_size.

    Raises ValueError: when `components` has no VAE decoder.
    """
    _check_decoder(components)
    if components.latents_are_pixels:
        return (latents / 2 + 0.5).clamp(0, 1)
    latents = latents / components.scaling_factor + components.shift_factor
    images = components.vae.decode(latents.to(components.dtype), return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _check_decoder(components: Components) -> None:
    if not components.latents_are_pixels and components.vae.decoder is None:
        raise ValueError("components have no VAE decoder; load them with need_vae_decoder=True")


@torch.no_grad()
def invert(
    components: Components, z: Tensor, t: Tensor, cond: Tensor, uncond: Tensor, *, scale: float | Tensor, steps: int
) -> Tensor:
    """Invert clean latents z [B, C, h, w]: the noise n for which sqrt(a_t) z + sqrt(1 - a_t) n leads back to z.

    The deterministic step of DDIM is taken backwards, `steps` times, at timesteps evenly spaced below `t` [B]: at u the
    model splits the latents into (eps, z0), and at the next u' they are sqrt(a_u') z0 + sqrt(1 - a_u') eps. Clean
    latents count as those of timestep 0. Each step is a call of the UNet on 2B rows, guided with `scale`.
    """
    noisy = z
    for step in range(steps):
        eps, clean = guided_prediction(components, noisy, t * step // steps, cond, uncond, scale=scale)
        signal, noise = sqrt_alphas(components, t * (step + 1) // steps)
        noisy = signal * clean + noise * eps
    return (noisy - signal * z) / noise
