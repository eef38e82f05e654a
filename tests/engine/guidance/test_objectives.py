"""The objectives of score distillation, each against a loop over samples, on small random models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dream_fast.bench.accuracy import check, error
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.presets import dream_mini_cpu
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.model.components import Components, load_components
from dream_fast.engine.guidance.sds import Draws, Prompts, ScoreDistillation, distillation_gradient

SCORES = ("sds", "csd", "asd", "sdi")
SCALE, STEPS = 7.5, 4
LOW, HIGH = 100, 950  # of the levels that are drawn


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def components(request: pytest.FixtureRequest, tiny_model: Path, tiny_velocity_model: Path) -> Components:
    return load_components(tiny_model if request.param == "epsilon" else tiny_velocity_model, "cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts(batch: int) -> tuple[Tensor, Tensor]:
    """Random embeddings (cond, uncond) [batch, 5, 32]."""
    cond, uncond = torch.randn(2, batch, 5, 32, generator=generator(7))
    return cond, uncond


def config(score: str, **changes: float) -> GuidanceConfig:
    return GuidanceConfig(
        objective=score, guidance_scale=SCALE, inversion_steps=STEPS, t_range=(LOW / 1000, HIGH / 1000), **changes
    )


# By hand: one sample, no batch, alphas from diffusers


def alphas() -> Tensor:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def teller(components: Components) -> Callable[[Tensor, int, Tensor], Tensor]:
    """The noise [4, 8, 8] that the model predicts for noisy latents [4, 8, 8], at a timestep, with a prompt [T, D]."""
    a = alphas().to(components.dtype)

    def tell(noisy: Tensor, level: int, prompt: Tensor) -> Tensor:
        with torch.no_grad():
            out = components.unet(noisy[None], level, encoder_hidden_states=prompt[None]).sample[0]
        if components.prediction_type == "v_prediction":
            out = a[level].sqrt() * out + (1 - a[level]).sqrt() * noisy
        return out

    return tell


def by_hand(components: Components, score: str, z: Tensor, t: int, noise: Tensor, cond: Tensor, uncond: Tensor):
    """g of one latent `z` [4, 8, 8], in the dtype of the model."""
    a, tell = alphas().to(components.dtype), teller(components)
    z, noise, cond, uncond = (x.to(components.dtype) for x in (z, noise, cond, uncond))

    def at(level: int, noise: Tensor) -> Tensor:
        return a[level] ** 0.5 * z + (1 - a[level]) ** 0.5 * noise

    def guided(noisy: Tensor, level: int, scale: float) -> Tensor:
        return scale * tell(noisy, level, cond) + (1 - scale) * tell(noisy, level, uncond)

    weight = 1 - a[t]
    if score == "sds":
        return weight * (guided(at(t, noise), t, SCALE) - noise)
    if score == "csd":
        return weight * SCALE * (tell(at(t, noise), t, cond) - tell(at(t, noise), t, uncond))
    if score == "asd":
        later = t + int(0.1 * (t - LOW) + 1e-6)
        return weight * (guided(at(t, noise), t, SCALE) - tell(at(later, noise), later, cond))
    x = z
    for step in range(STEPS):
        here, there = int(t * step / STEPS + 1e-6), int(t * (step + 1) / STEPS + 1e-6)
        eps = guided(x, here, -SCALE)
        clean = (x - (1 - a[here]) ** 0.5 * eps) / a[here] ** 0.5
        x = a[there] ** 0.5 * clean + (1 - a[there]) ** 0.5 * eps
    predicted = (x - a[t] ** 0.5 * z) / (1 - a[t]) ** 0.5
    return weight * (guided(x, t, SCALE) - predicted)


@pytest.mark.parametrize("score", SCORES)
def test_gradient_by_hand(components: Components, in_fp64: Callable, score: str) -> None:
    """A batch equals the loop over its samples."""
    batch = 5
    z = torch.randn(batch, 4, 8, 8, generator=generator(8))
    cond, uncond = prompts(batch)
    called = []
    hook = components.unet.register_forward_pre_hook(lambda module, inputs: called.append(len(inputs[0]) // batch))
    result = ScoreDistillation(components, config(score))(
        z, cond, uncond, StepInputs(generator=generator(3), latents=True)
    )
    hook.remove()
    draws = generator(3)
    t = torch.randint(LOW, HIGH + 1, (batch,), generator=draws)
    noise = torch.randn(z.shape, generator=draws)
    assert torch.equal(result.t, t)
    reference, exact = (
        torch.stack([by_hand(model, score, z[i], int(t[i]), noise[i], cond[i], uncond[i]) for i in range(batch)])
        for model in (components, in_fp64(components))
    )
    check(score, result.gradient, reference, exact)
    # Rows an image in each call of the UNet.
    assert called == {"sds": [2], "csd": [2], "asd": [3], "sdi": [2] * (STEPS + 1)}[score]


@pytest.mark.parametrize("score", SCORES)
def test_image_gradient_through_encoder(
    components: Components, in_fp64: Callable, mse_distillation: type, score: str
) -> None:
    """The gradient of the image is that of the latents times the encoder's derivative."""
    cond, uncond = prompts(2)
    images = torch.rand(2, 3, 32, 32, generator=generator(8))

    def through_the_encoder(model: Components, gradient: Tensor) -> Tensor:
        rgb = images.detach().clone().to(model.dtype).requires_grad_()
        posterior = model.vae.encode(rgb * 2 - 1).latent_dist
        draw = torch.randn(posterior.mean.shape, generator=generator(3)).to(model.dtype)
        z = (posterior.mean + posterior.std * draw) * 0.18215
        return torch.autograd.grad(z, rgb, gradient.to(model.dtype) / 2)[0]

    for method, cls in (("sds", ScoreDistillation), ("mse", mse_distillation)):
        rgb = images.clone().requires_grad_()
        result = cls(components, config(score))(rgb, cond, uncond, StepInputs(generator=generator(3)))
        result.loss.backward()
        models = (components, in_fp64(components))
        check(method, rgb.grad, *(through_the_encoder(model, result.gradient) for model in models))
        assert result.gradient.abs().max() > 0


def test_csd_without_noise(components: Components) -> None:
    """Without an effect of the prompt csd leaves rounding errors only; other objectives keep a residual."""
    z = torch.randn(1, 4, 8, 8, generator=generator(8))
    cond, _ = prompts(1)
    left = {
        score: float(
            ScoreDistillation(components, config(score))(
                z, cond, cond, StepInputs(generator=generator(3), latents=True)
            ).grad_norm
        )
        for score in SCORES
    }
    # Of two rows of a batch that are alike; a thousand times less is far above what fp32 leaves.
    assert 1000 * left["csd"] < min(left["sds"], left["asd"], left["sdi"])


def test_asd_later_timestep(components: Components) -> None:
    """The later timestep is at most the last one."""
    z, t, calls = torch.ones(4, 4, 8, 8), torch.tensor([20, 39, 520, 990]), []
    config = GuidanceConfig(objective="asd", t_range=(0.02, 1.0))
    hook = components.unet.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[1]))
    distillation_gradient(components, config, z, Draws(t, torch.zeros_like(z)), Prompts(*prompts(4)), {})
    hook.remove()
    assert calls[0].tolist() == [*t.tolist(), *t.tolist(), 20, 40, 570, 999]


@pytest.mark.parametrize("score", ["sds", "asd"])
@pytest.mark.parametrize("method", ["sds", "mse"])
def test_clip_grad_latent(components: Components, mse_distillation: type, score: str, method: str) -> None:
    """The gradient is clamped by element."""
    cls = mse_distillation if method == "mse" else ScoreDistillation

    def guided(limit: float) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.randn(2, 4, 8, 8, generator=generator(8)).requires_grad_()
        sds = cls(components, config(score, clip_grad_latent=limit, lambda_guidance=2.0))
        result = sds(z, *prompts(2), StepInputs(generator=generator(3), latents=True))
        result.loss.backward()
        return result.gradient, z.grad, result.grad_norm

    free, _, _ = guided(-1.0)
    limit = float(free.abs().median())
    clipped, arrived, norm = guided(limit)
    assert torch.equal(clipped, free.clamp(-limit, limit)) and not torch.equal(clipped, free)
    z = torch.randn(2, 4, 8, 8, generator=generator(8))
    check("arrived", arrived, (z - (z - clipped)) / 2, clipped.double() / 2)  # "mse" takes this difference
    check("norm", norm, clipped.norm(), clipped.double().norm())
    assert torch.equal(guided(1e9)[0], free)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_clip_grad_latent_nonfinite(components: Components, bad: float, monkeypatch) -> None:
    """An infinite output of the UNet, as fp16 gives, makes the step be skipped."""
    forward = components.unet.forward

    def overflowing(*args, **options):
        out = forward(*args, **options)[0].clone()
        out[-1, 0, 0, 0] = bad  # with the prompt; twice infinity would be not a number at once
        return (out,)

    monkeypatch.setattr(components.unet, "forward", overflowing)
    z = torch.randn(1, 4, 8, 8, generator=generator(8))
    noise, t = torch.randn(z.shape, generator=generator(1)), torch.tensor([500])
    given = Draws(t, noise), Prompts(*prompts(1)), {"guidance_scale": torch.tensor(SCALE)}
    gradient, *_ = distillation_gradient(components, config("csd", clip_grad_latent=0.5), z, *given)
    assert not torch.isfinite(torch.linalg.vector_norm(gradient))
    assert torch.isfinite(gradient[:, 1:]).all()


# What a graph cannot hold


class Forbidden(TorchDispatchMode):
    """Records operators that read values on the host, or draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        masked = name.startswith("aten.index.") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if masked or any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "rand")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_forbidden_is_noticed() -> None:
    ones = torch.ones(2)
    for does in (lambda: ones[0].item(), lambda: bool(ones[0] > 0), lambda: ones[ones > 0], lambda: torch.randn(2)):
        with Forbidden() as noticed:
            does()
        assert noticed.found


@pytest.mark.parametrize("score", SCORES)
def test_distillation_gradient_capturable(components: Components, score: str) -> None:
    """Nothing is read on the host and nothing is drawn."""
    z, noise = torch.randn(2, 2, 4, 8, 8, generator=generator(1))
    draws, given = Draws(torch.tensor([300, 700]), noise), Prompts(*prompts(2))
    scalars = {"guidance_scale": torch.tensor(SCALE)}
    with Forbidden() as noticed, torch.no_grad():
        distillation_gradient(components, config(score), z, draws, given, scalars)
    assert noticed.found == []


# Settings


@pytest.mark.parametrize(
    ("typed", "scale", "rescale"),
    [
        ({}, "0.0:8:4:1.0", 0.8),
        ({"objective": "sds"}, "0.0:8:4:1.0", 0.8),
        ({"objective": "csd"}, "0.0:8:4:1.0", 0.0),
        ({"objective": "csd", "guidance_rescale": 0.25}, "0.0:8:4:1.0", 0.25),
        ({"objective": "asd"}, "7.5", 0.8),
        ({"objective": "sdi"}, "7.5", 0.8),
        ({"objective": "sdi", "guidance_scale": 30.0}, "30.0", 0.8),
        ({"objective": "asd", "guidance_scale": LinearSchedule(0.0, 7.5, 2.0, 1.0)}, "0.0:7.5:2:1.0", 0.8),
        ({"objective": "asd", "preset": "reference"}, "7.5", 0.0),
        ({"objective": "csd", "preset": "reference"}, "100.0", 0.0),
    ],
)
def test_objective_default_scale(typed, scale, rescale) -> None:
    """An objective has its own scale unless one is typed."""
    assert str(dream_mini_cpu().guidance.guidance_scale) == "0.0:8:4:1.0"
    got = configure(typed, "cpu").guidance
    assert (str(got.guidance_scale), got.guidance_rescale) == (scale, rescale)


@pytest.mark.parametrize("score", ["csd", "asd", "sdi"])
def test_perp_neg_goes_with_sds_only(score: str) -> None:
    with pytest.raises(
        UserError, match=f"^--perpneg works only with --objective sds, not with {score}: leave one of them"
    ):
        configure({"guidance": ("SD",), "objective": score, "perpneg": True}, "cpu")
    with pytest.raises(UserError, match="--objective is one of sds, csd, asd, sdi, not 'vsd'"):
        GuidanceConfig(objective="vsd")
    with pytest.raises(UserError, match="--inversion_steps must be at least 1, not 0"):
        GuidanceConfig(inversion_steps=0)


@pytest.mark.parametrize("score", ["sds", "sdi"])
def test_loss_space_x0_weight(components: Components, in_fp64: Callable, score: str) -> None:
    """The loss of clean latents is the same difference with another weight."""
    cond, uncond = prompts(2)
    z = torch.randn(2, 4, 8, 8, generator=generator(3))
    t, noise = torch.tensor([300, 700]), torch.randn(2, 4, 8, 8, generator=generator(4))
    given = Draws(t, noise), Prompts(cond, uncond), {"guidance_scale": torch.tensor(SCALE)}
    plain, x0 = (
        distillation_gradient(components, config(score, loss_space=space), z, *given).gradient
        for space in ("noise", "x0")
    )
    expected = []
    for model in (components, in_fp64(components)):
        a = alphas()[t].view(-1, 1, 1, 1).to(model.dtype)
        rows = [by_hand(model, score, z[i], int(t[i]), noise[i], cond[i], uncond[i]) for i in range(2)]
        expected.append(torch.stack(rows) / (1 - a) * ((1 - a) / a).sqrt())
    check("x0", x0, *expected)
    a = alphas()[t].view(-1, 1, 1, 1).double()
    assert error(plain, expected[1] * (1 - a) / ((1 - a) / a).sqrt()) < 0.01 < error(plain, expected[1])


def clean_latents(components: Components, noisy: Tensor, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """The clean latents that the guided noise in `noisy` at timestep 500 implies."""
    a, tell = alphas()[500].to(components.dtype), teller(components)
    noisy, cond, uncond = (x[0].to(components.dtype) for x in (noisy, cond, uncond))
    eps = scale * tell(noisy, 500, cond) + (1 - scale) * tell(noisy, 500, uncond)
    return ((noisy - (1 - a).sqrt() * eps) / a.sqrt())[None]


def test_loss_space_x0_rescaled(components: Components, in_fp64: Callable) -> None:
    """The result equals that of diffusers' `rescale_noise_cfg`."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    cond, uncond = prompts(1)
    z, noise = (torch.randn(1, 4, 8, 8, generator=generator(seed)) for seed in (3, 4))
    settings = config("sds", loss_space="x0", guidance_rescale=1.0, lambda_guidance=0.5)
    given = Draws(torch.tensor([500]), noise), Prompts(cond, uncond), {"guidance_scale": torch.tensor(SCALE)}
    gradient, noisy, clean = distillation_gradient(components, settings, z, *given)
    assert torch.equal(gradient, 0.5 * (z - clean))
    expected = [
        rescale_noise_cfg(
            clean_latents(model, noisy, cond, uncond, SCALE), clean_latents(model, noisy, cond, uncond, 1.0), 1.0
        )
        for model in (components, in_fp64(components))
    ]
    check("clean", clean, *expected)


@pytest.mark.parametrize("score", ["csd", "asd"])
def test_loss_space_x0_raises(score: str) -> None:
    """Objectives without clean latents refuse this loss."""
    with pytest.raises(UserError, match="--loss_space x0 works only with --objective sds and sdi"):
        config(score, loss_space="x0")
