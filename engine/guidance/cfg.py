"""What an image model makes of noisy latents: one call of the UNet, and the guided prediction from its rows.

With eps_c and eps_u the noise predicted with and without the prompt, guidance of scale s (Ho and Salimans 2022) is

    eps_hat = eps_u + s (eps_c - eps_u)

A model that works on pixels puts out the variance of a step beside the noise, of which nothing here makes use.
Noise-predicting and velocity-predicting models (v = sqrt(a) n - sqrt(1 - a) z; Salimans and Ho 2022) give the same
eps_hat. The guided prediction may take part of the spread of the conditional one (MVDream, Shi et al. 2023, section
3.3; Lin et al. 2023), and may turn away from other prompts (`perp_neg`).

Latents are [B, C, h, w], levels t [B] int64. Arithmetic on latents is fp32 whatever the model's dtype. Nothing here
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
    """The guided noise and clean latent, (eps, z0) each [B, C, h, w] fp32, that ``noisy`` holds at ``t`` [B].

    One call of the UNet on 2B rows. For ``rescale`` see :func:`guide`.
    """
    rows = predict(components, noisy, t, [uncond, cond])
    return apply_cfg(components, rows, noisy, t, scale=scale, rescale=rescale or None)


def predict(
    components: Components,
    noisy: Tensor,
    t: Tensor,
    prompts: Sequence[Tensor],
    further: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """What the UNet puts out for ``noisy`` at ``t`` with each of ``prompts`` [B, T, D]; each [B, C, h, w] fp32.

    ``further`` is another noisy latent with its level and prompt, which comes last. One call for all of them, on B rows
    each.
    """
    count, prompts = len(prompts), list(prompts)
    rows, levels = noisy.to(components.dtype).repeat(count, 1, 1, 1), t.repeat(count)
    if further is not None:
        rows, levels = torch.cat([rows, further[0].to(components.dtype)]), torch.cat([levels, further[1]])
        prompts.append(further[2])
    embeddings = torch.cat(prompts).to(components.dtype)
    out = components.unet(rows, levels, encoder_hidden_states=embeddings, return_dict=False)[0].float()
    if out.shape[1] > components.latent_channels:
        out = out[:, : components.latent_channels]
    return out.chunk(len(prompts))


def apply_cfg(
    components: Components,
    rows: Sequence[Tensor],
    noisy: Tensor,
    t: Tensor,
    *,
    scale: float | Tensor,
    rescale: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(eps, z0) from the ``rows`` of :func:`predict` for ``noisy`` at ``t``: without the prompt, with it, and others.

    ``rescale`` in [0, 1] moves the standard deviation of z0 that far towards that of the prediction without guidance;
    None leaves it.
    ``weights`` [B, N] are those of the N other prompts, to turn away from.
    """
    out_uncond, out_cond, *others = rows
    signal, noise = sqrt_alphas(components, t)
    towards = out_cond - out_uncond
    if weights is not None:
        towards = perpendicular_combine(towards, [other - out_uncond for other in others], weights)
    eps, z0 = eps_and_x0(components, out_uncond + scale * towards, noisy, signal, noise)
    if rescale is not None:
        _, plain = eps_and_x0(components, out_cond, noisy, signal, noise)
        ratio = plain.std(dim=(1, 2, 3), keepdim=True) / z0.std(dim=(1, 2, 3), keepdim=True)
        z0 = z0 * (1 + rescale * (ratio - 1))
        eps = (noisy - signal * z0) / noise
    return eps, z0


def sqrt_alphas(components: Components, t: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), each [B, 1, 1, 1]: how much of a noisy latent is signal, and how much noise."""
    alpha = components.alphas_cumprod.index_select(0, t).view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()


def eps_and_x0(
    components: Components, out: Tensor, noisy: Tensor, signal: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The noise and the clean latent, (eps, z0), by the model's output ``out`` for ``noisy`` at these strengths."""
    if components.prediction_type == "v_prediction":
        return signal * out + noise * noisy, signal * noisy - noise * out
    return out, (noisy - noise * out) / signal
