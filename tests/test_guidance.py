"""Score distillation and sampling, on small random models."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast.engine.config import GuidanceConfig
from dream_fast.engine.guidance.loader import Components, load_components, recompute_in_backward
from dream_fast.engine.guidance.prediction import guided_prediction
from dream_fast.engine.guidance.sampling import sample
from dream_fast.engine.guidance.sds import ScoreDistillation


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def components(request: pytest.FixtureRequest, tiny_model: Path, tiny_velocity_model: Path) -> Components:
    folder = tiny_model if request.param == "epsilon" else tiny_velocity_model
    loaded = load_components(folder, "cpu", need_vae_decoder=True)
    assert loaded.prediction_type == request.param
    return loaded


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts(batch: int, width: int = 32) -> tuple[Tensor, Tensor]:
    """Random embeddings (cond, uncond) [batch, 5, width]."""
    drawn = torch.randn(2, batch, 5, width, generator=generator(7))
    return drawn[0], drawn[1]


def picture(batch: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=generator(8)).requires_grad_()


# Score distillation


def by_hand(components: Components, rgb: Tensor, cond: Tensor, uncond: Tensor, seed: int, scale: float) -> Tensor:
    """The picture's gradient, written out with diffusers' own schedule and one UNet call a row."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=components.prediction_type,
    )
    draws = generator(seed)
    rgb = rgb.detach().requires_grad_()
    image = F.interpolate(rgb, (32, 32), mode="bilinear", align_corners=False) * 2 - 1
    posterior = components.vae.encode(image).latent_dist
    z = (posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=draws)) * 0.18215
    t = torch.randint(20, 981, (len(rgb),), generator=draws)
    noise = torch.randn(z.shape, generator=draws)
    with torch.no_grad():
        noisy = scheduler.add_noise(z, noise, t)
        gradient = torch.zeros_like(z)
        for i in range(len(rgb)):

            def epsilon(prompt: Tensor, i: int = i) -> Tensor:
                out = components.unet(noisy[i : i + 1], t[i], encoder_hidden_states=prompt[i : i + 1]).sample
                if components.prediction_type == "v_prediction":
                    alpha = scheduler.alphas_cumprod[t[i]]
                    out = alpha.sqrt() * out + (1 - alpha).sqrt() * noisy[i]
                return out

            guided = epsilon(uncond) + scale * (epsilon(cond) - epsilon(uncond))
            gradient[i] = (1 - scheduler.alphas_cumprod[t[i]]) * (guided[0] - noise[i])
    (result,) = torch.autograd.grad(z, rgb, gradient / len(rgb))
    return result


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
def test_both_methods_give_the_gradient_written_by_hand(components: Components, size: tuple[int, int]) -> None:
    cond, uncond = prompts(2)
    expected = by_hand(components, picture(2, *size), cond, uncond, seed=3, scale=20.0)
    losses = {}
    for method in ("sds", "mse"):
        rgb = picture(2, *size)
        sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=20.0), method=method)
        result = sds(rgb, cond, uncond, generator=generator(3))
        result.loss.backward()
        error = (rgb.grad - expected).norm() / expected.norm()
        assert error < 1e-4, (method, error)
        losses[method] = result.loss
        torch.testing.assert_close(result.grad_norm, result.gradient.norm())
        torch.testing.assert_close(result.loss.detach(), result.gradient.square().sum() / 4, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["sds"], losses["mse"], rtol=1e-4, atol=0)


def test_weight_and_loss_scale_multiply_the_gradient(components: Components) -> None:
    def gradient(loss_scale: float, **options: float) -> Tensor:
        rgb = picture(1)
        sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0, **options))
        (sds(rgb, *prompts(1), generator=generator()).loss * loss_scale).backward()
        return rgb.grad

    plain = gradient(1.0)
    assert plain.abs().max() > 0
    torch.testing.assert_close(gradient(65536.0), plain * 65536)
    torch.testing.assert_close(gradient(1.0, lambda_guidance=0.25), plain / 4)
    assert gradient(1.0, lambda_guidance=0.0).abs().max() == 0


def test_half_precision_encoder_keeps_large_gradients_in_range(tiny_model: Path) -> None:
    """A weight whose product with the gradient overflows fp16 costs nothing: the encoder sees a peak of 1."""
    components = load_components(tiny_model, "cpu", torch.float16)
    assert components.vae.dtype == torch.float16
    gradients = []
    for weight in (1.0, 1e6):
        rgb = picture(1)
        sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0, lambda_guidance=weight))
        sds(rgb, *prompts(1), generator=generator()).loss.backward()
        gradients.append(rgb.grad / weight)
    assert gradients[0].dtype == torch.float32 and gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-2 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("method", ["sds", "mse"])
def test_latents_are_guided_without_the_encoder(components: Components, method: str) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=generator()).requires_grad_()
    sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0), method=method)
    result = sds(latents, *prompts(2), generator=generator(1), latents=True)
    result.loss.backward()
    torch.testing.assert_close(latents.grad, result.gradient / 2, rtol=1e-4, atol=1e-5)
    larger = torch.randn(1, 4, 16, 24, generator=generator()).requires_grad_()
    sds(larger, *prompts(1), generator=generator(1), latents=True).loss.backward()
    assert larger.grad.shape == larger.shape and larger.grad.abs().max() > 0


def test_shrinking_reads_every_pixel(components: Components) -> None:
    """At four times the model's size, sampling four neighbours an output pixel would leave three in four unseen."""
    rgb = picture(1, 128, 128)
    sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0))
    sds(rgb, *prompts(1), generator=generator()).loss.backward()
    assert (rgb.grad != 0).float().mean() > 0.99


def test_one_image_at_a_time_gives_the_same_gradient(tiny_model: Path) -> None:
    gradients = []
    for vram_O in (False, True):
        components = load_components(tiny_model, "cpu", vram_O=vram_O)
        assert components.vae.use_slicing is vram_O
        rgb = picture(3)
        sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0))
        sds(rgb, *prompts(3), generator=generator()).loss.backward()
        gradients.append(rgb.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_recomputation_keeps_less_and_gives_the_same_gradient_bit_for_bit(tiny_model: Path) -> None:
    gradients, kept = [], []
    for again in (False, True):
        components = load_components(tiny_model, "cpu")
        if again:
            recompute_in_backward(components.vae.encoder)
        rgb, held = picture(1), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x.nbytes) or x, lambda x: x):
            latents = components.vae.encode(rgb).latent_dist.mean
        kept.append(sum(held))
        gradients += torch.autograd.grad(latents.square().sum(), rgb)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    assert kept[1] < kept[0] / 2


def test_gradient_that_is_not_finite_is_reported(components: Components) -> None:
    rgb = picture(1)
    cond, uncond = prompts(1)
    sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0))
    result = sds(rgb, cond * float("nan"), uncond, generator=generator())
    result.loss.backward()
    assert not torch.isfinite(result.grad_norm)
    assert not torch.isfinite(rgb.grad).any()


def test_a_seed_repeats_bit_for_bit(components: Components) -> None:
    def gradient(seed: int) -> Tensor:
        rgb = picture(2, 24, 24)
        sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0))
        sds(rgb, *prompts(2), generator=generator(seed)).loss.backward()
        return rgb.grad

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))


def test_wrong_picture(components: Components) -> None:
    sds = ScoreDistillation(components, GuidanceConfig())
    with pytest.raises(ValueError, match=r"rgb must be \[B, 3, H, W\], not \[1, 4, 8, 8\]"):
        sds(torch.zeros(1, 4, 8, 8), *prompts(1))
    with pytest.raises(ValueError, match="method must be"):
        ScoreDistillation(components, GuidanceConfig(), method="ism")


def test_levels_are_uniform_in_the_range(components: Components) -> None:
    sds = ScoreDistillation(components, GuidanceConfig(t_range=(0.1, 0.2)))
    levels = sds.timesteps(20000, 0.9, generator())
    counts = levels.bincount(minlength=1000)
    assert int(levels.min()) == 100 and int(levels.max()) == 200  # both ends included
    assert counts[100:201].min() > 100 and counts.sum() == counts[100:201].sum()
    assert int(ScoreDistillation(components, GuidanceConfig(t_range=(0.0, 1.0))).timesteps(20000, 0.0).max()) == 999


@pytest.mark.parametrize(("anneal", "at_half"), [("linear", 500), ("sqrt", 301), ("square", 740)])
def test_levels_fall_with_progress(components: Components, anneal: str, at_half: int) -> None:
    sds = ScoreDistillation(components, GuidanceConfig(t_range=(0.02, 0.98), t_anneal=anneal))
    drawn = [sds.timesteps(2000, progress, generator()) for progress in (0.0, 0.25, 0.5, 0.75, 0.999)]
    means = [float(levels.float().mean()) for levels in drawn]
    assert means == sorted(means, reverse=True) and abs(means[2] - at_half) < 5
    assert 930 < int(drawn[0].min()) and int(drawn[0].max()) == 980
    assert int(drawn[-1].min()) == 20 and int(drawn[-1].max()) < 80
    assert all(90 < int(levels.max() - levels.min()) < 97 for levels in drawn[1:4])


def test_rescaling_takes_the_spread_of_the_unguided_prediction(components: Components) -> None:
    cond, uncond = prompts(2)
    noisy = torch.randn(2, 4, 8, 8, generator=generator())
    t = torch.tensor([300, 800])

    def spread(scale: float, rescale: float) -> tuple[Tensor, Tensor]:
        eps, z0 = guided_prediction(components, noisy, t, cond, uncond, scale=scale, rescale=rescale)
        alpha = components.alphas_cumprod[t].view(-1, 1, 1, 1)
        torch.testing.assert_close(alpha.sqrt() * z0 + (1 - alpha).sqrt() * eps, noisy, rtol=1e-3, atol=1e-3)
        return z0.std(dim=(1, 2, 3)), z0

    plain, _ = spread(1.0, 0.0)
    wide, _ = spread(50.0, 0.0)
    assert (wide > 1.05 * plain).all()
    torch.testing.assert_close(spread(50.0, 1.0)[0], plain, rtol=1e-3, atol=0)
    torch.testing.assert_close(spread(50.0, 0.5)[0], (plain + wide) / 2, rtol=1e-3, atol=0)


# Sampling


def test_sampling_is_deterministic_ddim(components: Components) -> None:
    from diffusers import DDIMScheduler

    cond, uncond = prompts(2)
    images = sample(components, cond, uncond, steps=10, guidance_scale=3.0, generator=generator())
    assert images.shape == (2, 3, 32, 32) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert torch.equal(images, sample(components, cond, uncond, steps=10, guidance_scale=3.0, generator=generator()))

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=components.prediction_type,
    )
    scheduler.set_timesteps(10)
    z = torch.randn(2, 4, 8, 8, generator=generator())
    with torch.no_grad():
        for t in scheduler.timesteps:
            out_uncond, out = components.unet(torch.cat([z, z]), t, torch.cat([uncond, cond])).sample.chunk(2)
            z = scheduler.step(out_uncond + 3.0 * (out - out_uncond), t, z).prev_sample
        expected = components.vae.decode(z / 0.18215).sample
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-3)


def test_sampling_refuses_what_it_cannot_do(components: Components, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="no VAE decoder"):
        sample(load_components(tiny_model, "cpu"), *prompts(1))
    with pytest.raises(ValueError, match="steps must lie in 1 to 1000, not 0"):
        sample(components, *prompts(1), steps=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronisations are a matter of GPUs")
def test_guidance_never_waits_for_the_gpu(tiny_model: Path) -> None:
    components = load_components(tiny_model, "cuda", torch.float16)
    sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0, t_anneal="linear", guidance_rescale=0.5))
    cond, uncond = (embedding.cuda() for embedding in prompts(2))
    rgb = picture(2, 24, 24).detach().cuda().requires_grad_()
    draws = torch.Generator("cuda").manual_seed(0)
    sds(rgb, cond, uncond, progress=0.1, generator=draws).loss.backward()  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        sds(rgb, cond, uncond, progress=0.2, generator=draws).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(rgb.grad).all()


def test_shrinking_with_deterministic_algorithms_is_shrinking(components: Components) -> None:
    """torch's own gradient adds up in any order on a GPU; the products that stand in for it are the same map."""

    def gradient() -> Tensor:
        rgb = picture(1, 80, 128)
        sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0))
        sds(rgb, *prompts(1), generator=generator()).loss.backward()
        return rgb.grad

    plain = gradient()
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(gradient(), plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
    finally:
        torch.use_deterministic_algorithms(False)
