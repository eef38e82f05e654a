"""Adapters against diffusers' own pipelines: the same folder, latents, timestep and prompt."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.cfg import guided_prediction
from dream_fast.engine.guidance.model.image_model import Embedding
from dream_fast.engine.guidance.model.pipelines import FAMILIES, PipelineModel
from dream_fast.engine.guidance.sds import Draws, ScoreDistillation
from dream_fast.tests.engine.guidance.tiny_pipelines import BUILDERS, write_tiny_pipeline

PROMPT, NEGATIVE, SCALE = "a red mug", "blue", 3.0
# Arguments of a pipeline's call that differ from guidance_scale=SCALE.
CALLS: dict[str, dict[str, Any]] = {
    "PRXPipeline": dict(guidance_scale=SCALE, use_resolution_binning=False),
    "FluxPipeline": dict(true_cfg_scale=SCALE, guidance_scale=1.0),
    "ZImagePipeline": dict(guidance_scale=SCALE - 1),
    "PixArtSigmaPipeline": dict(guidance_scale=SCALE, use_resolution_binning=False),
    "SanaPipeline": dict(guidance_scale=SCALE, use_resolution_binning=False),
    "QwenImagePipeline": dict(true_cfg_scale=SCALE),
}


@pytest.fixture(scope="module", params=BUILDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny pipeline, named after its class."""
    return write_tiny_pipeline(request.param, tmp_path_factory.mktemp("pipelines") / request.param)


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PipelineModel:
    model = FAMILIES[folder.name](folder, torch.device("cpu"), dtype, **options)
    # Tiny models are made for images of their own size.
    if folder.name in ("FluxPipeline", "Flux2KleinPipeline", "ZImagePipeline", "QwenImagePipeline"):
        model.image_size, model.latent_size = 16, 8 if folder.name != "Flux2KleinPipeline" else 4
    return model


def loaded_with_prompts(folder: Path, dtype: torch.dtype) -> tuple[PipelineModel, tuple[Embedding, Embedding]]:
    """A model with its network, and two rows of its prompts."""
    model = load(folder, dtype)
    embedding = model.embed([PROMPT, PROMPT], NEGATIVE)
    cond, uncond = ({name: rows[part] for name, rows in embedding.items()} for part in ([0, 1], [2, 2]))
    model.free_text_encoder()
    return model, (cond, uncond)


class Recorded:
    """A pipeline's own run: what it gave to its scheduler at each step, and its images."""

    def __init__(self, folder: Path, dtype: torch.dtype, size: int) -> None:
        pipeline = getattr(diffusers, folder.name).from_pretrained(folder, torch_dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        self.outputs: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.samples: list[Tensor] = []
        self.last = torch.empty(0)  # the clean latents at the end
        step = pipeline.scheduler.step

        def record(output: Tensor, t: Tensor, sample: Tensor, *args: Any, **options: Any) -> Any:
            for stored, tensor in ((self.outputs, output), (self.timesteps, t), (self.samples, sample)):
                stored.append(tensor.clone())
            result = step(output, t, sample, *args, **options)
            self.last = result[0]
            return result

        pipeline.scheduler.step = record
        call = CALLS.get(folder.name, dict(guidance_scale=SCALE))
        negative = {} if folder.name == "Flux2KleinPipeline" else {"negative_prompt": NEGATIVE}
        generator = torch.Generator().manual_seed(3)
        self.pipeline, self.size = pipeline, size
        self.images = pipeline(
            prompt=PROMPT, height=size, width=size, num_inference_steps=3, generator=generator, output_type="pt",
            **call, **negative,
        ).images  # fmt: skip

    def arranged(self, tensor: Tensor) -> Tensor:
        """A tensor in the pipeline's layout as [B, C, h, w]."""
        if tensor.ndim == 4:
            return tensor
        if isinstance(self.pipeline, diffusers.Flux2KleinPipeline):
            side = int(tensor.shape[1] ** 0.5)
            return tensor.transpose(1, 2).unflatten(2, (side, side))
        scale = self.pipeline.vae_scale_factor
        unpacked = self.pipeline._unpack_latents(tensor, self.size, self.size, scale)
        return unpacked.squeeze(2) if unpacked.ndim == 5 else unpacked


def test_guided_prediction_equals_pipeline(folder: Path) -> None:
    """At each step of a pipeline's run its guided output is ours, for its latents, timestep and prompts."""
    model = load(folder)
    embedding = model.embed([PROMPT], "" if folder.name == "Flux2KleinPipeline" else NEGATIVE)
    model.free_text_encoder()
    cond, uncond = ({name: rows[i : i + 1] for name, rows in embedding.items()} for i in (0, 1))
    own, exact = (Recorded(folder, dtype, model.image_size) for dtype in (torch.float32, torch.float64))
    steps = zip(exact.timesteps, exact.samples, own.outputs, exact.outputs, strict=True)
    for step, (t, *recorded) in enumerate(steps):
        noisy, reference, output = map(exact.arranged, recorded)
        t = t[None] if "flow" not in model.prediction_type else t[None].float()
        eps, clean = guided_prediction(model, noisy.float(), t, cond, uncond, scale=SCALE)
        got = eps - clean if "flow" in model.prediction_type else eps
        check(f"step {step}", got, reference, output)


def plain_latents(pipeline: Any, images: Tensor, noise: Tensor) -> Tensor:
    """Latents of images as the family's own code for images as input has them, from a draw of the posterior."""
    vae, settings = pipeline.vae, pipeline.vae.config
    if isinstance(vae, diffusers.AutoencoderDC):
        return vae.encode(images).latent * settings.scaling_factor
    if isinstance(vae, diffusers.AutoencoderKLQwenImage):
        posterior = vae.encode(images.unsqueeze(2)).latent_dist
        mean, std = (
            torch.tensor(v, dtype=images.dtype).view(1, -1, 1, 1) for v in (settings.latents_mean, settings.latents_std)
        )
        return ((posterior.mean + posterior.std * noise.unsqueeze(2)).squeeze(2) - mean) / std
    posterior = vae.encode(images).latent_dist
    if isinstance(vae, diffusers.AutoencoderKLFlux2):
        z = pipeline._patchify_latents(posterior.mean + posterior.std * pipeline._unpatchify_latents(noise))
        mean, variance = (v.view(1, -1, 1, 1).to(images.dtype) for v in (vae.bn.running_mean, vae.bn.running_var))
        return (z - mean) / (variance + settings.batch_norm_eps).sqrt()
    return (posterior.mean + posterior.std * noise - (settings.shift_factor or 0)) * settings.scaling_factor


def test_latents_equal_pipeline(folder: Path) -> None:
    """Images are encoded to the latents that the network was trained on."""
    model = load(folder)
    model.free_text_encoder()
    size = model.image_size
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    noise = torch.randn(2, model.latent_channels, model.latent_size, model.latent_size, generator=generator)
    pipeline_class = getattr(diffusers, folder.name)
    own, exact = (pipeline_class.from_pretrained(folder, torch_dtype=t) for t in (torch.float32, torch.float64))
    with torch.no_grad():
        latents = model.encode(images, noise)
        truth = plain_latents(exact, images.double(), noise.double())
        check("latents", latents, plain_latents(own, images, noise), truth)
        assert latents.shape == noise.shape


def test_images_equal_pipeline(folder: Path) -> None:
    """The clean latents of a pipeline's run decode to its images."""
    model = load(folder, need_vae_decoder=True)
    model.free_text_encoder()
    own, exact = (Recorded(folder, dtype, model.image_size) for dtype in (torch.float32, torch.float64))
    with torch.no_grad():
        got = (model.decode(exact.arranged(exact.last).float()) / 2 + 0.5).clamp(0, 1)
    check("images", got, own.images, exact.images)
    with pytest.raises(ValueError, match="no VAE decoder"):
        bare = load(folder)
        bare.free_text_encoder()
        bare.decode(got)


def plain_gradient(folder: Path, dtype: torch.dtype, images: Tensor, draws: Draws) -> Tensor:
    """The gradient of equation 3 at images in [0, 1] by autograd through the pipeline's VAE."""
    model, prompts = loaded_with_prompts(folder, dtype)
    images = images.to(dtype).requires_grad_()
    z = plain_latents(model.pipeline, images * 2 - 1, draws.vae_noise.to(dtype))
    with torch.no_grad():
        signal, noise, share = (part.to(dtype) for part in model.process.mixture(draws.t))
        noisy = signal * z + noise * draws.noise.to(dtype)
        eps, _ = guided_prediction(model, noisy, draws.t, *prompts, scale=SCALE)
        gradient = (1 - share) * (eps - draws.noise)
    (result,) = torch.autograd.grad(z, images, gradient.to(dtype) / len(images))
    return result


def test_gradient_at_images_equals_autograd(folder: Path) -> None:
    """Score distillation gives the images the gradient that autograd finds through the pipeline's parts."""
    model, prompts = loaded_with_prompts(folder, torch.float32)
    images = torch.rand(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(5))
    score = ScoreDistillation(model, GuidanceConfig(guidance_scale=SCALE))
    draws = score.draw(2, StepInputs(generator=torch.Generator().manual_seed(7)))
    leaf = images.clone().requires_grad_()
    score(leaf, *prompts, StepInputs(generator=torch.Generator().manual_seed(7))).loss.backward()
    own, exact = (plain_gradient(folder, dtype, images, draws) for dtype in (torch.float32, torch.float64))
    assert exact.abs().max() > 0
    check("gradient", leaf.grad, own, exact)
