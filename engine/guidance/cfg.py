"""Predictions of a diffusion model for noisy latents, and classifier-free guidance.

With eps_c and eps_u the noise predicted with and without the prompt, guidance of scale s (Ho and Salimans 2022) is

    eps_hat = eps_u + s (eps_c - eps_u)

Models that predict noise and models that predict velocity (v = sqrt(a) n - sqrt(1 - a) z; Salimans and Ho 2022) give
the same eps_hat. Pixel-space models also predict a variance, which is ignored. The guided prediction may be rescaled
towards the spread of the conditional one (MVDream, Shi et al. 2023, section 3.3; Lin et al. 2023) and pushed away from
other prompts (`perp_neg.py`).

Latents are [B, C, h, w], timesteps t [B] int64. Arithmetic on latents is fp32 whatever the model's dtype. Nothing here
waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dream_fast.engine.guidance.model.components import Components
from dream_fast.engine.guidance.perp_neg import perpendicular_combine


@torch.no_grad()
def guided_prediction(
    components: Components,
    noisy: Tensor,
    t: Tensor,
    cond: Tensor,
    uncond: Tensor,
    *,
    scale: float | Tensor,
    rescale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Guided noise and clean latents, (eps, z0) each [B, C, h, w] fp32, in `noisy` at `t`; options as `apply_cfg`.

    One call of the UNet on 2B rows.
    """
    predictions = predict(components, noisy, t, [uncond, cond])
    return apply_cfg(components, predictions, noisy, t, scale=scale, rescale=rescale or None)


def predict(
    components: Components,
    noisy: Tensor,
    t: Tensor,
    prompts: Sequence[Tensor],
    extra_input: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Output of the UNet for `noisy` at `t` with each of `prompts` [B, T, D]; each [B, C, h, w] fp32.

    `extra_input` is another noisy latent with its timesteps and its prompt, which comes last. One call of the UNet, on
    B rows for each output.
    """
    count, prompts = len(prompts), list(prompts)
    latents, timesteps = noisy.to(components.dtype).repeat(count, 1, 1, 1), t.repeat(count)
    if extra_input is not None:
        extra_noisy, extra_t, extra_prompt = extra_input
        latents = torch.cat([latents, extra_noisy.to(components.dtype)])
        timesteps = torch.cat([timesteps, extra_t])
        prompts.append(extra_prompt)
    embeddings = torch.cat(prompts).to(components.dtype)
    out = components.unet(latents, timesteps, encoder_hidden_states=embeddings, return_dict=False)[0].float()
    if out.shape[1] > components.latent_channels:
        out = out[:, : components.latent_channels]
    return out.chunk(len(prompts))


def apply_cfg(
    components: Components,
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
    signal, noise = sqrt_alphas(components, t)
    direction = out_cond - out_uncond
    if weights is not None:
        direction = perpendicular_combine(direction, [other - out_uncond for other in others], weights)
    eps, z0 = eps_and_x0(components, out_uncond + scale * direction, noisy, signal, noise)
    if rescale is not None:
        _, unguided = eps_and_x0(components, out_cond, noisy, signal, noise)
        ratio = unguided.std(dim=(1, 2, 3), keepdim=True) / z0.std(dim=(1, 2, 3), keepdim=True)
        z0 = z0 * (1 + rescale * (ratio - 1))
        eps = (noisy - signal * z0) / noise
    return eps, z0


def sqrt_alphas(components: Components, t: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), each [B, 1, 1, 1]: the strengths of signal and noise in noisy latents."""
    alpha = components.alphas_cumprod.index_select(0, t).view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()


def eps_and_x0(
    components: Components, out: Tensor, noisy: Tensor, signal: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise and clean latents from an output of the UNet for `noisy`, whose strengths are `signal` and `noise`."""
    if components.prediction_type == "v_prediction":
        return signal * out + noise * noisy, signal * noisy - noise * out
    return out, (noisy - noise * out) / signal
