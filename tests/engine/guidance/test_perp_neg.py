"""Perp-Neg: its weights by hand, and its gradient against a loop over the samples, on small random models."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dream_fast.bench.accuracy import check, error
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.diffusion import DiffusionGuidance
from dream_fast.engine.guidance.model.components import Components, load_components
from dream_fast.engine.guidance.perp_neg import Negatives, negative_weights, perpendicular_combine
from dream_fast.engine.guidance.prompts import PromptEmbeddings, ViewAngles, view_weights
from dream_fast.engine.guidance.sds import Draws, Prompts, ScoreDistillation, distillation_gradient
from dream_fast.engine.scene.camera import Cameras, make_cameras

SCALE = 20.0


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def components(request: pytest.FixtureRequest, tiny_model: Path, tiny_velocity_model: Path) -> Components:
    return load_components(tiny_model if request.param == "epsilon" else tiny_velocity_model, "cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cameras(azimuth: list[float], polar: float = 90.0) -> Cameras:
    places = torch.tensor(azimuth)
    others = (torch.full_like(places, value) for value in (polar, 3.0, 20.0))
    polars, radius, fovy = others
    return make_cameras(polars, places, radius, fovy)


# Weights


def fp32_weights(azimuth: float) -> Tensor:
    """The formulas of Perp-Neg's weights in fp32, for w = -2 and decays of 2 and 10."""
    turned = abs(torch.tensor(azimuth)) / 90
    if turned < 1:
        r = 1 - turned
        front, side = -2 * torch.exp(-2 * r) * (r <= 0.8), -2 * torch.exp(-10 * (1 - r)) * (r >= 0.2)
    else:
        r = 2 - turned
        front, side = torch.tensor(-2.0), -torch.exp(-10 * r) * (r <= 0.8)
    return torch.stack([front, side])[None]


@pytest.mark.parametrize(
    ("azimuth", "front", "side"),
    [
        (0.0, 0.0, -2.0),  # r = 1: the front is seen, and the side is as far as can be
        (10.0, 0.0, -2 * math.exp(-10 / 9)),  # r = 8/9
        (45.0, -2 * math.exp(-1), -2 * math.exp(-5)),  # r = 1/2
        (-45.0, -2 * math.exp(-1), -2 * math.exp(-5)),
        (-60.0, -2 * math.exp(-2 / 3), -2 * math.exp(-20 / 3)),  # r = 1/3
        (81.0, -2 * math.exp(-0.2), 0.0),  # r = 1/10
        (90.0, -2.0, 0.0),
        (-90.0, -2.0, 0.0),
        (99.0, -2.0, 0.0),  # behind, r = 9/10
        (-120.0, -2.0, -math.exp(-20 / 3)),  # r = 2/3
        (135.0, -2.0, -math.exp(-5)),
        (-135.0, -2.0, -math.exp(-5)),
        (179.1, -2.0, -math.exp(-0.1)),  # r = 1/100
        (180.0, -2.0, -1.0),
        (-180.0, -2.0, -1.0),
    ],
)
def test_weights_by_hand(azimuth: float, front: float, side: float) -> None:
    views = view_weights(torch.tensor([azimuth]), torch.tensor([90.0]), ViewAngles(30.0))
    got = negative_weights(views, -2.0, 2.0, 10.0)
    exact = torch.tensor([[front, side]], dtype=torch.float64)
    check("weights", got, fp32_weights(azimuth), exact)


def test_base_weight_and_decays_count() -> None:
    views = view_weights(torch.tensor([45.0, 135.0]), torch.tensor([90.0, 90.0]), ViewAngles(30.0))
    expected = [[-4 * math.exp(-0.5), -4 * math.exp(-1.5)], [-4.0, -2 * math.exp(-1.5)]]
    exact = torch.tensor(expected, dtype=torch.float64)
    check("weights", negative_weights(views, -4.0, 1.0, 3.0), exact.float(), exact)


def test_overhead_weights_zero() -> None:
    """Weights are zero from above."""
    azimuth = torch.tensor([0.0, 60.0, 120.0, 180.0])
    above = view_weights(azimuth, torch.full((4,), 30.0), ViewAngles(30.0))
    assert (negative_weights(above, -2.0, 2.0, 10.0) == 0).all()
    beside = view_weights(azimuth, torch.full((4,), 31.0), ViewAngles(30.0))
    assert (negative_weights(beside, -2.0, 2.0, 10.0) != 0).any(dim=1).all()


def test_weights_of_unblended_views() -> None:
    """With a narrow blend azimuth 30 is front alone, 60 side alone, 150 back alone."""
    azimuth = torch.tensor([30.0, 60.0, 120.0, 150.0])
    got = negative_weights(view_weights(azimuth, torch.full((4,), 90.0), ViewAngles(30.0, 20.0)), -2.0, 2.0, 10.0)
    assert got.tolist() == [[0.0, -2.0], [-2.0, 0.0], [-2.0, 0.0], [-2.0, -1.0]]


def test_weights_read_nothing() -> None:
    """Tensors without values raise where they are read, so a CUDA graph can capture the weights."""
    azimuth, polar = torch.empty(2, 3, device="meta")
    weights = negative_weights(view_weights(azimuth, polar, ViewAngles(30.0)), -2.0, 2.0, 10.0)
    towards = torch.empty(3, 4, 8, 8, device="meta")
    assert (
        weights.shape == (3, 2) and perpendicular_combine(towards, [towards, towards], weights).shape == towards.shape
    )


# The gradient


def turned_away(towards: Tensor, others: list[Tensor], weights: Tensor) -> Tensor:
    """`perpendicular_combine` by projection, from a QR decomposition."""
    rows = []
    for i, main in enumerate(towards):
        along = torch.linalg.qr(main.reshape(-1, 1)).Q
        aside = torch.stack([other[i].flatten() for other in others], dim=1)
        rows.append(main + ((aside - along @ (along.T @ aside)) @ weights[i]).view_as(main))
    return torch.stack(rows)


def test_perpendicular_combine() -> None:
    """The added part is perpendicular to d_0."""
    towards = torch.randn(3, 4, 8, 8, generator=generator())
    others = [torch.randn(3, 4, 8, 8, generator=generator(seed)) for seed in (1, 2)]
    weights = torch.tensor([[-1.0, -0.5], [0.0, -2.0], [0.0, 0.0]])
    got = perpendicular_combine(towards, others, weights)
    exact = turned_away(towards.double(), [other.double() for other in others], weights.double())
    check("turned", got, turned_away(towards, others, weights), exact)
    assert torch.equal(got[2], towards[2]) and not torch.equal(got[1], towards[1])
    # What lies along d_0 is left alone, but for what cancelling 3 d_0 leaves; a d_0 of zero divides nothing by zero.
    along = perpendicular_combine(towards, [3 * towards], weights[:, :1])
    check("along", along, turned_away(towards, [3 * towards], weights[:, :1]), towards.double())
    still = torch.zeros_like(towards)
    assert torch.equal(perpendicular_combine(still, others[:1], weights[:, :1])[0], -others[0][0])


def by_hand(components: Components, latents: Tensor, prompts: PromptEmbeddings, azimuths: list[float]) -> Tensor:
    """g of the latents in the dtype of the model, sample by sample, as in stable-dreamfusion."""
    draws = generator(3)
    t = torch.randint(20, 981, (len(latents),), generator=draws)
    noise = torch.randn(latents.shape, generator=draws).to(components.dtype)
    latents = latents.to(components.dtype)
    front, side, back, _ = prompts.views.to(components.dtype)
    negative = prompts.negative.to(components.dtype)
    gradients = []
    for i, azimuth in enumerate(azimuths):
        alpha = components.process.alphas_cumprod[t[i]].to(components.dtype)
        noisy = alpha.sqrt() * latents[i] + (1 - alpha).sqrt() * noise[i]

        def epsilon(prompt: Tensor, noisy: Tensor = noisy, alpha: Tensor = alpha, level: Tensor = t[i]) -> Tensor:
            with torch.no_grad():
                out = components.unet(noisy[None], level, encoder_hidden_states=prompt[None]).sample[0]
            if components.prediction_type == "v_prediction":
                out = alpha.sqrt() * out + (1 - alpha).sqrt() * noisy
            return out

        r = 1 - abs(azimuth) / 90 if abs(azimuth) < 90 else 2 - abs(azimuth) / 90
        if abs(azimuth) < 90:
            blended = r * front + (1 - r) * side
            w_front = 0.0 if r > 0.8 else -2 * math.exp(-2 * r)
            w_side = 0.0 if r < 0.2 else -2 * math.exp(-10 * (1 - r))
        else:
            blended = r * side + (1 - r) * back
            w_front, w_side = -2.0, 0.0 if r > 0.8 else -math.exp(-10 * r)
        plain = epsilon(negative[0])
        main = epsilon(blended) - plain
        guided = main.clone()
        for weight, prompt in ((w_front, front), (w_side, side)):
            delta = epsilon(prompt) - plain
            guided += weight * (delta - (delta * main).sum() / main.square().sum().clamp(min=1e-6) * main)
        gradients.append((1 - alpha) * (plain + SCALE * guided - noise[i]))
    return torch.stack(gradients)


@pytest.mark.parametrize("azimuths", [[20.0], [0.0, -30.0, 70.0, 88.0, -100.0, 150.0, 180.0]])
def test_gradient_by_hand(components: Components, in_fp64: Callable, azimuths: list[float]) -> None:
    """A batch equals the loop over its samples."""
    prompts = PromptEmbeddings(components, "a red mug", keep_text_encoder=True)
    latents = torch.randn(len(azimuths), 4, 8, 8, generator=generator(8)).requires_grad_()
    guidance = DiffusionGuidance(
        ScoreDistillation(components, GuidanceConfig(guidance_scale=SCALE, perpneg=True)), prompts
    )
    rows = []
    hook = components.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    result = guidance(latents, cameras(azimuths), StepInputs(progress=0.0, generator=generator(3), latents=True))
    hook.remove()
    reference, exact = (
        by_hand(model, latents.detach(), prompts, azimuths) for model in (components, in_fp64(components))
    )
    assert rows == [4 * len(azimuths)]  # one call
    check("gradient", result.gradient, reference, exact)
    plain = DiffusionGuidance(ScoreDistillation(components, GuidanceConfig(guidance_scale=SCALE)), prompts)
    without = plain(latents, cameras(azimuths), StepInputs(progress=0.0, generator=generator(3), latents=True))
    for i in range(len(azimuths)):  # more than rounding leaves
        assert error(without.gradient[i], exact[i]) > 10 * error(result.gradient[i], exact[i])


@pytest.mark.parametrize("polars", [[20.0, 20.0, 20.0], [90.0, 20.0, 90.0]])
def test_overhead_gradient_unchanged(components: Components, in_fp64: Callable, polars: list[float]) -> None:
    """Weights belong to samples: only those that are not from above change."""
    prompts = PromptEmbeddings(components, "a red mug", keep_text_encoder=True)
    latents = torch.randn(3, 4, 8, 8, generator=generator(8))
    views = cameras([0.0, 120.0, 120.0])._replace(polar=torch.tensor(polars))

    def guided(model: Components, perpneg: bool) -> Tensor:
        sds = ScoreDistillation(model, GuidanceConfig(perpneg=perpneg))
        guidance = DiffusionGuidance(sds, prompts)
        return guidance(latents, views, StepInputs(progress=0.0, generator=generator(3), latents=True)).gradient

    plain, turned = (guided(components, perpneg) for perpneg in (False, True))
    exact = guided(in_fp64(components), False).double()  # the UNet's part of the error is the largest
    above = torch.tensor(polars) < 30
    check("from above", turned[above], plain[above], exact[above])
    for i in (~above).nonzero():
        assert error(turned[i], exact[i]) > 10 * error(plain[i], exact[i])


# Without it


class Recorded(TorchDispatchMode):
    """The names of all operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def gradient_before_perp_neg(components: Components, z, t, cond, uncond, scale, noise, rescale) -> Tensor:
    """The gradient of the latents without Perp-Neg, line by line."""
    alpha = components.process.alphas_cumprod.index_select(0, t).view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
    out = components.unet(
        noisy.to(components.dtype).repeat(2, 1, 1, 1),
        t.repeat(2),
        encoder_hidden_states=torch.cat([uncond, cond]).to(components.dtype),
        return_dict=False,
    )[0].float()
    out_uncond, out_cond = out.chunk(2)
    again = components.process.alphas_cumprod.index_select(0, t).view(-1, 1, 1, 1)
    signal, spread = again.sqrt(), (1 - again).sqrt()

    def split(out: Tensor) -> tuple[Tensor, Tensor]:
        if components.prediction_type == "v_prediction":
            return signal * out + spread * noisy, signal * noisy - spread * out
        return out, (noisy - spread * out) / signal

    eps, z0 = split(out_uncond + scale * (out_cond - out_uncond))
    if rescale > 0:
        _, plain = split(out_cond)
        ratio = plain.std(dim=(1, 2, 3), keepdim=True) / z0.std(dim=(1, 2, 3), keepdim=True)
        z0 = z0 * (1 + rescale * (ratio - 1))
        eps = (noisy - signal * z0) / spread
    return 1.0 * (1 - alpha) * (eps - noise)


@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_disabled_changes_nothing(components: Components, rescale: float) -> None:
    """Without Perp-Neg nothing else is launched and no bit changes."""
    z, noise = torch.randn(2, 3, 4, 8, 8, generator=generator(1))
    cond, uncond = torch.randn(2, 3, 5, 32, generator=generator(2))
    t, scale = torch.tensor([30, 500, 900]), torch.tensor(20.0)
    config, draws = GuidanceConfig(guidance_rescale=rescale), Draws(t, noise)
    with torch.no_grad():
        with Recorded() as before:
            expected = gradient_before_perp_neg(components, z, t, cond, uncond, scale, noise, rescale)
        with Recorded() as now:
            given = Prompts(cond, uncond), {"guidance_scale": scale}
            got, *_ = distillation_gradient(components, config, z, draws, *given)
    assert torch.equal(got, expected) and expected.abs().max() > 0
    assert sorted(now.names) == sorted(before.names)
    with torch.no_grad(), Recorded() as more:
        given = Prompts(cond, uncond, Negatives(cond[:2], torch.full((3, 2), -1.0)))
        distillation_gradient(components, config, z, draws, given, {"guidance_scale": scale})
    assert len(more.names) > len(now.names)


def test_positive_weight_raises() -> None:
    """A positive base weight is refused."""
    with pytest.raises(UserError, match="--negative_w must be at most 0, not 2"):
        GuidanceConfig(perpneg=True, negative_w=2.0)
    with pytest.raises(UserError, match="--side_decay_factor must be at least 0, not -1"):
        GuidanceConfig(side_decay_factor=-1.0)
