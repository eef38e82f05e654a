"""Noise processes: mixtures of latents and noise, and the meaning of a network's output.

A process defines noisy latents x_t = signal(t) z + noise(t) n, for timesteps t from 0 to the noisiest:

    variance preserving   signal = sqrt(a_t), noise = sqrt(1 - a_t)    Stable Diffusion, SDXL, IF, PixArt
    flow matching         signal = 1 - s, noise = s, s = t / 1000      SD3, FLUX, PRX and other rectified flows

A variance preserving model is trained at whole timesteps, a flow at real ones. `split` turns an output of the network
into the predicted noise and clean latents, for each type of prediction:

    epsilon        out = n                     Ho et al. 2020
    v_prediction   out = signal n - noise z    Salimans and Ho 2022
    sample         out = z
    flow           out = n - z                 Lipman et al. 2023; Liu et al. 2023
    negative_flow  out = z - n                 the same with time running from noise to images
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow", "negative_flow")
FLOW_TIMESTEPS = 1000


class Mixture(NamedTuple):
    """Noisy latents x_t = signal z + noise n, each [B, 1, 1, 1] fp32.

    signal_share: signal^2 / (signal^2 + noise^2), which is a_t of a variance preserving process.
    """

    signal: Tensor
    noise: Tensor
    signal_share: Tensor


class NoiseProcess(Protocol):
    """Strengths of signal and noise at the timesteps of an image model.

    num_timesteps: number of timesteps.
    last_timestep: the noisiest one; the first is 0. They are int64 in the former process, fp32 in the latter.
    """

    num_timesteps: int
    last_timestep: int

    def mixture(self, t: Tensor) -> Mixture:
        """The mixture at timesteps `t` [B]."""
        ...

    def fraction(self, t: Tensor, part: int, parts: int) -> Tensor:
        """The timestep at `part` of `parts` of the way from 0 to `t` [B]."""
        ...

    def draw(self, low: int, high: int, count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw timesteps [count], uniform from `low` to `high`."""
        ...


class VariancePreserving:
    """The process of a schedule `alphas_cumprod` [T] fp32, the cumulative signal power a_t at each timestep."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod
        self.num_timesteps = len(alphas_cumprod)
        self.last_timestep = self.num_timesteps - 1

    def mixture(self, t: Tensor) -> Mixture:
        alpha = self.alphas_cumprod.index_select(0, t).view(-1, 1, 1, 1)
        return Mixture(alpha.sqrt(), (1 - alpha).sqrt(), alpha)

    def fraction(self, t: Tensor, part: int, parts: int) -> Tensor:
        return t * part // parts

    def draw(self, low: int, high: int, count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        return torch.randint(low, high + 1, (count,), generator=generator, device=device)


class FlowMatching:
    """The straight path from latents at timestep 0 to pure noise at `num_timesteps`."""

    def __init__(self, num_timesteps: int = FLOW_TIMESTEPS) -> None:
        self.num_timesteps = self.last_timestep = num_timesteps

    def mixture(self, t: Tensor) -> Mixture:
        noise = (t.float() / self.num_timesteps).view(-1, 1, 1, 1)
        power = (1 - noise).square()
        return Mixture(1 - noise, noise, power / (power + noise.square()))

    def fraction(self, t: Tensor, part: int, parts: int) -> Tensor:
        return t * part / parts

    def draw(self, low: int, high: int, count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, device=device)


def split(prediction_type: str, out: Tensor, noisy: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Predicted noise and clean latents from an output of the network for `noisy` of that mixture.

    `prediction_type` is one of PREDICTIONS.
    """
    signal, noise, _ = mixture
    if prediction_type == "epsilon":
        return out, (noisy - noise * out) / signal
    if prediction_type == "v_prediction":
        return signal * out + noise * noisy, signal * noisy - noise * out
    if prediction_type == "sample":
        return (noisy - signal * out) / noise, out
    velocity = out if prediction_type == "flow" else -out
    return noisy + signal * velocity, noisy - noise * velocity
