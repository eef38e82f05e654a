"""DDIM (Song et al. 2020, equation 12 with sigma 0): sampling images, and the inversion of latents to noise."""

import torch
from torch import Tensor

from dream_fast.engine.guidance.cfg import guided_prediction
from dream_fast.engine.guidance.model.image_model import Embedding, ImageModel, first_tensor


@torch.no_grad()
def sample(
    model: ImageModel,
    cond: Embedding,
    uncond: Embedding,
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample images [B, 3, S, S] in [0, 1], fp32, for embedded prompts `cond` and `uncond` of B rows.

    S is the model's image_size; `generator` belongs to its device. The timesteps run evenly from the last one down to
    the clean image.

    Raises ValueError: when `model` has no VAE decoder, or `steps` exceeds the timesteps of the noise process.
    """
    count, last = model.process.num_timesteps, model.process.last_timestep
    if not 1 <= steps <= count:
        raise ValueError(f"steps must lie in 1 to {count}, not {steps}")
    batch, size = len(first_tensor(cond)), model.latent_size
    z = torch.randn(batch, model.latent_channels, size, size, generator=generator, device=model.device)
    timesteps = [last - count + count * (steps - i) // steps for i in range(steps)]
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        t = torch.full((batch,), timestep, device=model.device)
        eps, z0 = guided_prediction(model, z, t, cond, uncond, scale=guidance_scale, rescale=guidance_rescale)
        z = z0
        if following is not None:
            mixture = model.process.mixture(torch.full_like(t, following))
            z = mixture.signal * z0 + mixture.noise * eps
    return decode(model, z)


@torch.no_grad()
def decode(model: ImageModel, latents: Tensor) -> Tensor:
    """Decode latents [B, C, h, w] to images [B, 3, S, S] in [0, 1], fp32; S is the model's image_size.

    Raises ValueError: when `model` has no VAE decoder.
    """
    return (model.decode(latents).float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def invert(
    model: ImageModel, z: Tensor, t: Tensor, cond: Embedding, uncond: Embedding, *, scale: float | Tensor, steps: int
) -> Tensor:
    """Invert clean latents z [B, C, h, w]: the noise n for which signal(t) z + noise(t) n leads back to z.

    The deterministic step of DDIM is taken backwards, `steps` times, at timesteps evenly spaced below `t` [B]: at u the
    model splits the latents into (eps, z0), and at the next u' they are signal(u') z0 + noise(u') eps. Clean latents
    count as those of timestep 0. Each step is a call of the network on 2B rows, guided with `scale`.
    """
    noisy, process = z, model.process
    for step in range(steps):
        at = process.fraction(t, step, steps)
        eps, clean = guided_prediction(model, noisy, at, cond, uncond, scale=scale)
        mixture = process.mixture(process.fraction(t, step + 1, steps))
        noisy = mixture.signal * clean + mixture.noise * eps
    return (noisy - mixture.signal * z) / mixture.noise
