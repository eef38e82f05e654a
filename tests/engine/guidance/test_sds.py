"""Score distillation and sampling, on small random models."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast.bench.accuracy import check, error
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.cfg import guided_prediction
from dream_fast.engine.guidance.ddim import decode, sample
from dream_fast.engine.guidance.model.components import Components, enable_gradient_checkpointing, load_components
from dream_fast.engine.guidance.sds import ScoreDistillation, resize


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


def random_image(batch: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=generator(8)).requires_grad_()


# Score distillation


def by_hand(
    components: Components, rgb: Tensor, cond: Tensor, uncond: Tensor, scale: float, draws: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of an image of the model's size, latents and their gradient, in the dtype of `components`.

    Written out with diffusers' own schedule and one UNet call a row.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=components.prediction_type,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(components.dtype)
    rgb = rgb.detach().to(components.dtype).requires_grad_()
    cond, uncond = cond.to(components.dtype), uncond.to(components.dtype)
    posterior = components.vae.encode(F.interpolate(rgb, (32, 32), mode="bilinear") * 2 - 1).latent_dist
    shape = posterior.mean.shape
    z = posterior.mean + posterior.std * torch.randn(shape, generator=draws).to(components.dtype)
    # As diffusers' pipelines that have a shift: latents / scaling_factor + shift_factor are decoded.
    z = (z - components.shift_factor) * components.scaling_factor
    t = torch.randint(20, 981, (len(rgb),), generator=draws)
    noise = torch.randn(shape, generator=draws).to(components.dtype)
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
    return result, z.detach(), gradient


@pytest.mark.parametrize(("scaling", "shift"), [(0.18215, 0.0), (0.5, 0.4)])
@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
def test_gradient_by_hand(
    components: Components,
    in_fp64: Callable,
    mse_distillation: type[ScoreDistillation],
    size: tuple[int, int],
    scaling: float,
    shift: float,
) -> None:
    """The gradients of image and latents are those of DreamFusion's equation 3, also with a shift of the VAE."""
    components = dataclasses.replace(components, scaling_factor=scaling, shift_factor=shift)
    cond, uncond = prompts(4)
    reference, exact = (
        by_hand(model, random_image(4, *size), cond, uncond, 20.0, generator(3))
        for model in (components, in_fp64(components))
    )
    for method, cls in (("sds", ScoreDistillation), ("mse", mse_distillation)):
        rgb = random_image(4, *size)
        sds = cls(components, GuidanceConfig(guidance_scale=20.0))
        result = sds(rgb, cond, uncond, StepInputs(generator=generator(3)))
        result.loss.backward()
        check(f"{method}, image", rgb.grad, reference[0], exact[0])
        check(f"{method}, latents", result.gradient, reference[2], exact[2])
        # Sums of 1024 squares, which fp32 adds up to the seventh digit.
        squares = result.gradient.double().square().sum()
        summed = result.gradient.square().sum()
        check("loss", result.loss.detach(), summed / 8, squares / 8)
        check("norm", result.grad_norm, summed.sqrt(), squares.sqrt())


@pytest.mark.parametrize(("scaling", "shift"), [(0.18215, 0.0), (0.5, 0.4)])
def test_latents_scaled_and_shifted(components: Components, in_fp64: Callable, scaling: float, shift: float) -> None:
    """Encoded and decoded latents equal those of diffusers' pipelines with a shift."""
    components = dataclasses.replace(components, scaling_factor=scaling, shift_factor=shift)
    (cond, uncond), rgb = prompts(4), random_image(4)
    config = GuidanceConfig(guidance_scale=1.0)
    noisy = ScoreDistillation(components, config)(rgb, cond, uncond, StepInputs(generator=generator(3))).noisy
    expected = []
    for model in (components, in_fp64(components)):
        draws = generator(3)
        _, z, _ = by_hand(model, rgb, cond, uncond, 1.0, draws)
        draws = generator(3)
        torch.randn(z.shape, generator=draws)
        t = torch.randint(20, 981, (4,), generator=draws)
        noise = torch.randn(z.shape, generator=draws).to(z.dtype)
        alpha = components.process.alphas_cumprod[t].view(-1, 1, 1, 1).to(z.dtype)
        image = model.vae.decode(noisy.to(z.dtype) / scaling + shift).sample
        expected.append((alpha.sqrt() * z + (1 - alpha).sqrt() * noise, (image / 2 + 0.5).clamp(0, 1)))
    (reference, image_reference), (exact, image_exact) = expected
    check("noisy latents", noisy, reference, exact)
    check("decoded", decode(components, noisy), image_reference, image_exact)


def test_weight_and_loss_scale(components: Components) -> None:
    """Factors that are powers of two change no bit."""

    def gradient(loss_scale: float, **options: float) -> Tensor:
        rgb = random_image(1)
        sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0, **options))
        (sds(rgb, *prompts(1), StepInputs(generator=generator())).loss * loss_scale).backward()
        return rgb.grad

    plain = gradient(1.0)
    assert plain.abs().max() > 0
    assert torch.equal(gradient(65536.0), plain * 65536)
    assert torch.equal(gradient(1.0, lambda_guidance=0.25), plain / 4)
    assert gradient(1.0, lambda_guidance=0.0).abs().max() == 0


def test_half_precision_large_gradients(tiny_model: Path) -> None:
    """A weight whose product with the gradient overflows fp16 works: the encoder gets a peak of 1."""
    components = load_components(tiny_model, "cpu", torch.float16)
    assert components.vae.dtype == torch.float16
    gradients = []
    for weight in (1.0, 2.0**20):
        rgb = random_image(1)
        sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0, lambda_guidance=weight))
        sds(rgb, *prompts(1), StepInputs(generator=generator())).loss.backward()
        gradients.append(rgb.grad / weight)
    assert gradients[0].dtype == torch.float32 and gradients[0].abs().max() > 0
    assert torch.equal(*gradients)  # a power of two goes out and comes back without a digit changed


@pytest.mark.parametrize("method", ["sds", "mse"])
def test_latents_without_encoder(components: Components, mse_distillation: type, method: str) -> None:
    """Latents are guided without the encoder."""
    latents = torch.randn(2, 4, 8, 8, generator=generator()).requires_grad_()
    cls = mse_distillation if method == "mse" else ScoreDistillation
    sds = cls(components, GuidanceConfig(guidance_scale=10.0))
    result = sds(latents, *prompts(2), StepInputs(generator=generator(1), latents=True))
    result.loss.backward()
    # z - (z - g), rounded at the size of z and of g, is what "mse" gives back
    exact = result.gradient.double() / 2
    z = latents.detach()
    check("latents", latents.grad, (z - (z - result.gradient)) / 2, exact)
    larger = torch.randn(1, 4, 16, 24, generator=generator()).requires_grad_()
    sds(larger, *prompts(1), StepInputs(generator=generator(1), latents=True)).loss.backward()
    assert larger.grad.shape == larger.shape and larger.grad.abs().max() > 0


def test_shrinking_reads_every_pixel(components: Components) -> None:
    """Every pixel of an image four times the model's size gets a gradient."""
    rgb = random_image(1, 128, 128)
    sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0))
    sds(rgb, *prompts(1), StepInputs(generator=generator())).loss.backward()
    assert (rgb.grad != 0).float().mean() > 0.99


def test_vae_slicing(tiny_model: Path, in_fp64: Callable) -> None:
    """Slices of the VAE (--vram_O) are as accurate as single images."""
    plain = load_components(tiny_model, "cpu")
    models = (plain, in_fp64(plain))
    hand = [by_hand(model, random_image(3), *prompts(3), 10.0, generator())[0] for model in models]
    for vram_O in (False, True):
        components = load_components(tiny_model, "cpu", vram_O=vram_O)
        assert components.vae.use_slicing is vram_O
        rgb = random_image(3)
        sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0))
        sds(rgb, *prompts(3), StepInputs(generator=generator())).loss.backward()
        check(f"vram_O {vram_O}", rgb.grad, *hand)


def test_gradient_checkpointing(tiny_model: Path) -> None:
    """Recomputation stores less and gives the same gradient bit for bit."""
    gradients, saved = [], []
    for again in (False, True):
        components = load_components(tiny_model, "cpu")
        if again:
            enable_gradient_checkpointing(components.vae.encoder)
        rgb, held = random_image(1), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x.nbytes) or x, lambda x: x):
            latents = components.vae.encode(rgb).latent_dist.mean
        saved.append(sum(held))
        gradients += torch.autograd.grad(latents.square().sum(), rgb)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    assert saved[1] < saved[0] / 2


def test_nonfinite_gradient_reported(components: Components) -> None:
    """A gradient that is not finite is reported."""
    rgb = random_image(1)
    cond, uncond = prompts(1)
    sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0))
    result = sds(rgb, cond * float("nan"), uncond, StepInputs(generator=generator()))
    result.loss.backward()
    assert not torch.isfinite(result.grad_norm)
    assert not torch.isfinite(rgb.grad).any()


def test_a_seed_repeats_bit_for_bit(components: Components) -> None:
    def gradient(seed: int) -> Tensor:
        rgb = random_image(2, 24, 24)
        sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0))
        sds(rgb, *prompts(2), StepInputs(generator=generator(seed))).loss.backward()
        return rgb.grad

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))


def test_bad_images_raise(components: Components) -> None:
    """Images of a wrong shape are refused."""
    sds = ScoreDistillation(components, GuidanceConfig())
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], not \[1, 4, 8, 8\]"):
        sds(torch.zeros(1, 4, 8, 8), *prompts(1))


def test_timesteps_uniform(components: Components) -> None:
    """Timesteps are uniform in the range."""
    sds = ScoreDistillation(components, GuidanceConfig(t_range=(0.1, 0.2)))
    levels = sds.draw_timesteps(20000, StepInputs(progress=0.9, generator=generator()))
    counts = levels.bincount(minlength=1000)
    assert int(levels.min()) == 100 and int(levels.max()) == 200  # both ends included
    drawn = counts[100:201].double()
    mean, spread = 20000 / 101, (20000 / 101 * 100 / 101) ** 0.5  # of how often one of 101 levels is drawn
    assert (drawn - mean).abs().max() < 5 * spread and counts.sum() == drawn.sum()
    whole = ScoreDistillation(components, GuidanceConfig(t_range=(0.0, 1.0)))
    assert int(whole.draw_timesteps(20000, StepInputs()).max()) == 999


@pytest.mark.parametrize(("anneal", "at_half"), [("linear", 500), ("sqrt", 301), ("square", 740)])
def test_timesteps_annealed(components: Components, anneal: str, at_half: int) -> None:
    """Timesteps fall with progress."""
    sds = ScoreDistillation(components, GuidanceConfig(t_range=(0.02, 0.98), t_anneal=anneal))
    steps = [StepInputs(progress=progress, generator=generator()) for progress in (0.0, 0.25, 0.5, 0.75, 0.999)]
    drawn = [sds.draw_timesteps(2000, inputs) for inputs in steps]
    means = [float(levels.float().mean()) for levels in drawn]
    # Even within 48 on both sides: the mean to five standard errors, and half for the rounding of the level.
    assert means == sorted(means, reverse=True) and abs(means[2] - at_half) < 5 * 96 / (12 * 2000) ** 0.5 + 0.5
    assert 930 < int(drawn[0].min()) and int(drawn[0].max()) == 980
    assert int(drawn[-1].min()) == 20 and int(drawn[-1].max()) < 80
    assert all(90 < int(levels.max() - levels.min()) < 97 for levels in drawn[1:4])


def test_guidance_rescale(components: Components, in_fp64: Callable) -> None:
    """The clean latents equal those of diffusers' `rescale_noise_cfg`, and the guided noise belongs to them."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    cond, uncond = prompts(2)
    noisy, t = torch.randn(2, 4, 8, 8, generator=generator()), torch.tensor([300, 800])

    def by_hand(model: Components, rescale: float) -> tuple[Tensor, Tensor]:
        alpha = model.process.alphas_cumprod[t].view(-1, 1, 1, 1).to(model.dtype)
        signal, spread, x = alpha.sqrt(), (1 - alpha).sqrt(), noisy.to(model.dtype)
        with torch.no_grad():
            outs = [model.unet(x, t, encoder_hidden_states=prompt.to(model.dtype)).sample for prompt in (uncond, cond)]
        if model.prediction_type == "v_prediction":
            free, plain = (signal * x - spread * out for out in outs)
        else:
            free, plain = ((x - spread * out) / signal for out in outs)
        z0 = rescale_noise_cfg(free + 50 * (plain - free), plain, rescale)
        return (x - signal * z0) / spread, z0

    for rescale in (0.0, 0.5, 1.0):
        got = guided_prediction(components, noisy, t, cond, uncond, scale=50.0, rescale=rescale)
        reference, exact = (by_hand(model, rescale) for model in (components, in_fp64(components)))
        for name, *tensors in zip(("noise", "clean"), got, reference, exact, strict=True):
            check(f"{name}, rescale {rescale}", *tensors)
    assert error(by_hand(components, 0.5)[1], by_hand(components, 0.0)[1].double()) > 0.01  # it changes something


# Sampling


def diffusers_pipeline(components: Components):
    """diffusers' own pipeline of the parts of `components`, sampling by DDIM."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=components.prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        unet=components.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_sample_against_diffusers(components: Components, in_fp64: Callable) -> None:
    """Images are those of diffusers' own pipeline for the same latents and prompts."""
    cond, uncond = prompts(2)
    images = sample(components, cond, uncond, steps=10, guidance_scale=3.0, generator=generator())
    assert images.shape == (2, 3, 32, 32) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert torch.equal(images, sample(components, cond, uncond, steps=10, guidance_scale=3.0, generator=generator()))
    latents = torch.randn(2, 4, 8, 8, generator=generator())
    reference, exact = (
        diffusers_pipeline(model)(
            prompt_embeds=cond.to(model.dtype),
            negative_prompt_embeds=uncond.to(model.dtype),
            latents=latents.to(model.dtype),
            num_inference_steps=10,
            guidance_scale=3.0,
            output_type="pt",
        ).images
        for model in (components, in_fp64(components))
    )
    check("images", images, reference, exact)


def test_sample_raises(components: Components, tiny_model: Path) -> None:
    """Sampling refuses impossible arguments."""
    with pytest.raises(ValueError, match="no VAE decoder"):
        sample(load_components(tiny_model, "cpu"), *prompts(1))
    with pytest.raises(ValueError, match="steps must lie in 1 to 1000, not 0"):
        sample(components, *prompts(1), steps=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronisations are a matter of GPUs")
def test_never_synchronizes(tiny_model: Path) -> None:
    """Guidance never waits for the GPU."""
    components = load_components(tiny_model, "cuda", torch.float16)
    sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0, t_anneal="linear", guidance_rescale=0.5))
    cond, uncond = (embedding.cuda() for embedding in prompts(2))
    rgb = random_image(2, 24, 24).detach().cuda().requires_grad_()
    draws = torch.Generator("cuda").manual_seed(0)
    sds(rgb, cond, uncond, StepInputs(progress=0.1, generator=draws)).loss.backward()  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        sds(rgb, cond, uncond, StepInputs(progress=0.2, generator=draws)).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(rgb.grad).all()


def test_deterministic_resize(components: Components) -> None:
    """The matrix products of deterministic mode give the same map and gradient as torch's resize."""

    def resized(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rgb = random_image(2, 80, 128).detach().to(dtype).requires_grad_()
        size = dict(size=(32, 32), mode="bilinear", antialias=True)
        small = F.interpolate(rgb, **size) if dtype == torch.float64 or plainly else resize(rgb, 32)
        upstream = torch.randn(small.shape, generator=generator(1)).to(dtype)
        return small.detach(), torch.autograd.grad(small, rgb, upstream)[0]

    plainly = True
    reference, exact = resized(torch.float32), resized(torch.float64)
    plainly = False
    torch.use_deterministic_algorithms(True)
    try:
        got = resized(torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, *tensors in zip(("image", "gradient"), got, reference, exact, strict=True):
        check(name, *tensors)
