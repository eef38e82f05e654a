"""Noise processes against closed forms: strengths, predictions, timesteps."""

import pytest
import torch

from dream_fast.bench.accuracy import check_fp64
from dream_fast.engine.guidance.noise import PREDICTIONS, FlowMatching, Mixture, VariancePreserving, split

ALPHAS = torch.linspace(0.999, 0.001, 10)


def mixture(signal: float, noise: float) -> Mixture:
    parts = (torch.full((2, 1, 1, 1), value, dtype=torch.float64) for value in (signal, noise, 0.0))
    return Mixture(*parts)


@pytest.mark.parametrize(
    ("prediction", "signal", "noise"),
    [(prediction, 0.8, 0.6) for prediction in ("epsilon", "v_prediction", "sample")]  # preserves the variance
    + [(prediction, 0.3, 0.7) for prediction in ("flow", "negative_flow", "sample")],  # adds up to 1
)
def test_split_recovers_noise_and_latents(prediction: str, signal: float, noise: float) -> None:
    """An exact prediction is split into the noise and the clean latents that were mixed."""
    z, n = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = {"epsilon": n, "v_prediction": signal * n - noise * z, "sample": z, "flow": n - z, "negative_flow": z - n}
    assert out.keys() == set(PREDICTIONS)
    eps, clean = split(prediction, out[prediction], signal * z + noise * n, mixture(signal, noise))
    check_fp64("noise", eps, n)
    check_fp64("latents", clean, z)


def test_mixture_of_variance_preserving_process() -> None:
    """signal^2 is a_t and noise^2 is 1 - a_t."""
    signal, noise, share = VariancePreserving(ALPHAS).mixture(torch.tensor([0, 4, 9]))
    a = ALPHAS[[0, 4, 9]].view(-1, 1, 1, 1)
    assert torch.equal(signal, a.sqrt()) and torch.equal(noise, (1 - a).sqrt()) and torch.equal(share, a)


def test_mixture_of_flow() -> None:
    """The mixture is linear from the latents to pure noise."""
    signal, noise, share = FlowMatching(1000).mixture(torch.tensor([0.0, 250.0, 500.0, 1000.0]))
    assert signal.flatten().tolist() == [1, 0.75, 0.5, 0] and noise.flatten().tolist() == [0, 0.25, 0.5, 1]
    assert share.shape == (4, 1, 1, 1) and torch.equal(share.flatten(), torch.tensor([1, 0.9, 0.5, 0]))


def test_timesteps_of_processes() -> None:
    """A variance preserving process has whole timesteps below its number, a flow real ones up to it."""
    whole, real = VariancePreserving(ALPHAS), FlowMatching(10)
    assert (whole.num_timesteps, whole.last_timestep) == (10, 9) and (real.num_timesteps, real.last_timestep) == (
        10,
        10,
    )
    t = torch.tensor([5, 9])
    assert torch.equal(whole.fraction(t, 2, 3), torch.tensor([3, 6]))
    assert torch.equal(real.fraction(t.float(), 3, 4), torch.tensor([3.75, 6.75]))
    drawn = whole.draw(3, 6, 1000, t.device, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64 and drawn.unique().tolist() == [3, 4, 5, 6]
    drawn = real.draw(3, 6, 1000, t.device, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32 and 3 <= drawn.min() < 3.1 and 5.9 < drawn.max() <= 6
    assert drawn.histc(3, 3, 6).min() > 250
