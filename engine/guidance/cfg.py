"""Predictions of a diffusion model for noisy latents, and classifier-free guidance.

With eps_c and eps_u the noise predicted with and without the prompt, guidance of scale s (Ho and Salimans 2022) is

    eps_hat = eps_u + s (eps_c - eps_u)

eps_hat does not depend on what the network predicts, since noise, velocity and clean latents are linear in one another
(`noise.py`). The guided prediction may be rescaled towards the spread of the conditional one (MVDream, Shi et al. 2023,
section 3.3; Lin et al. 2023) and pushed away from other prompts (`perp_neg.py`).

Latents are [B, C, h, w], timesteps t [B]. Arithmetic on latents is fp32 for any dtype of the model. Nothing here waits
for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dream_fast.engine.guidance.model.image_model import Embedding, ImageModel, concatenate
from dream_fast.engine.guidance.noise import split
from dream_fast.engine.guidance.perp_neg import perpendicular_combine


@torch.no_grad()
def guided_prediction(
    model: ImageModel,
    noisy: Tensor,
    t: Tensor,
    cond: Embedding,
    uncond: Embedding,
    *,
    scale: float | Tensor,
    rescale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Guided noise and clean latents, (eps, z0) each [B, C, h, w] fp32, in `noisy` at `t`; options as `apply_cfg`.

    One call of the network on 2B rows.
    """
    predictions = predict(model, noisy, t, [uncond, cond])
    return apply_cfg(model, predictions, noisy, t, scale=scale, rescale=rescale or None)


def predict(
    model: ImageModel,
    noisy: Tensor,
    t: Tensor,
    prompts: Sequence[Embedding],
    extra_input: tuple[Tensor, Tensor, Embedding] | None = None,
) -> tuple[Tensor, ...]:
    """Output of the network for `noisy` at `t` with each of `prompts`, of B rows; each [B, C, h, w] fp32.

    `extra_input` is another noisy latent with its timesteps and its prompt, which comes last. One call of the network,
    on B rows for each output.
    """
    count, prompts = len(prompts), list(prompts)
    latents, timesteps = noisy.repeat(count, 1, 1, 1), t.repeat(count)
    if extra_input is not None:
        extra_noisy, extra_t, extra_prompt = extra_input
        latents, timesteps = torch.cat([latents, extra_noisy]), torch.cat([timesteps, extra_t])
        prompts.append(extra_prompt)
    return model.predict(latents, timesteps, concatenate(prompts)).chunk(len(prompts))


def apply_cfg(
    model: ImageModel,
    predictions: Sequence[Tensor],
    noisy: Tensor,
    t: Tensor,
    *,
    scale: float | Tensor,
    rescale: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Guided (eps, z0) from the `predictions` of `predict`: without the prompt, with it, and with N other prompts.

    `rescale` in [0, 1] moves the standard deviation of z0 that far towards that of the prediction without guidance;
    None leaves it. `weights` [B, N] are those of the other prompts (Perp-Neg).
    """
    out_uncond, out_cond, *others = predictions
    mixture = model.process.mixture(t)
    direction = out_cond - out_uncond
    if weights is not None:
        direction = perpendicular_combine(direction, [other - out_uncond for other in others], weights)
    guided = model.guide_natively(out_uncond + scale * direction, out_cond)
    eps, z0 = split(model.prediction_type, guided, noisy, mixture)
    if rescale is not None:
        _, unguided = split(model.prediction_type, out_cond, noisy, mixture)
        ratio = unguided.std(dim=(1, 2, 3), keepdim=True) / z0.std(dim=(1, 2, 3), keepdim=True)
        z0 = z0 * (1 + rescale * (ratio - 1))
        eps = (noisy - mixture.signal * z0) / mixture.noise
    return eps, z0
