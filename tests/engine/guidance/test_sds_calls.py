"""A call of score distillation: defaults, refusals, dtypes, and CUDA graphs."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.guidance import sds
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.cfg import guided_prediction
from dream_fast.engine.guidance.model.components import Components, load_components
from dream_fast.engine.guidance.sds import ScoreDistillation, resize
from dream_fast.engine.runtime.cuda_graph import StepGraphs
from dream_fast.engine.runtime.step_parts import on_part_end


@pytest.fixture(scope="module")
def components(tiny_model: Path) -> Components:
    return load_components(tiny_model, "cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random embeddings (cond, uncond) [batch, 5, 32]."""
    cond, uncond = torch.randn(2, batch, 5, 32, generator=generator(7))
    return cond, uncond


def random_image(batch: int = 1, side: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=generator(8)).requires_grad_()


def test_graphs_are_for_gpus(components: Components) -> None:
    """On a GPU encoder and UNet are a CUDA graph unless switched off; on a CPU never."""
    config, on_gpu = GuidanceConfig(), dataclasses.replace(components, device=torch.device("cuda"))
    assert isinstance(ScoreDistillation(on_gpu, config).graphs, StepGraphs)
    assert ScoreDistillation(on_gpu, config, cuda_graphs=False).graphs is None
    assert ScoreDistillation(components, config).graphs is None


def test_encoder_graph_freed(components: Components, mse_distillation: type) -> None:
    """The gradient of "sds" is computed in the call; "mse" is differentiated through the encoder and keeps more
    until
    `backward`.
    """
    nodes = {}
    for method, cls in (("sds", ScoreDistillation), ("mse", mse_distillation)):
        result = cls(components, GuidanceConfig())(random_image(), *prompts(1), StepInputs(generator=generator()))
        visited, waiting = set(), [result.loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in visited:
                visited.add(node)
                waiting += [before for before, _ in node.next_functions]
        nodes[method] = len(visited)
    assert nodes["sds"] == 2 < nodes["mse"]  # the injection, and the image that accumulates


def test_parts_marked(components: Components) -> None:
    """The ends of encoder and UNet are marked for the benchmark of a step."""
    score, marked = ScoreDistillation(components, GuidanceConfig()), []
    with on_part_end(marked.append):
        score(random_image(), *prompts(1), StepInputs(generator=generator()))
    score(random_image(), *prompts(1), StepInputs(generator=generator()))  # outside nothing is marked
    assert marked == ["encode", "unet"]


def test_half_precision_small_gradients(tiny_model: Path) -> None:
    """A gradient that is mostly subnormal in fp16 reaches the image accurately: the encoder gets a peak of 1."""
    components, gradients = load_components(tiny_model, "cpu", torch.float16), []
    for weight in (1.0, 2.0**-24):
        rgb = random_image()
        score = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0, lambda_guidance=weight))
        score(rgb, *prompts(1), StepInputs(generator=generator())).loss.backward()
        gradients.append(rgb.grad / weight)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_autocast_changes_nothing(components: Components, mse_distillation: type) -> None:
    """Inside autocast latents and models keep their dtypes, bit for bit."""
    for cls in (ScoreDistillation, mse_distillation):
        score = cls(components, GuidanceConfig())
        plain = score(random_image(), *prompts(1), StepInputs(generator=generator()))
        with torch.autocast("cpu", torch.bfloat16):
            cast = score(random_image(), *prompts(1), StepInputs(generator=generator()))
        assert torch.equal(cast.gradient, plain.gradient) and torch.equal(cast.loss, plain.loss)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (20, 12), (16, 32)])
def test_resize_by_products(monkeypatch, shape: tuple[int, int], deterministic: bool) -> None:
    """Resizing equals torch's bit for bit, except shrinking in deterministic mode, by two products."""
    image, resized, interpolate = torch.rand(1, 3, *shape, generator=generator()), [], sds._interpolate
    plain = F.interpolate(image, (32, 32), mode="bilinear", antialias=max(shape) > 32)

    def recorded(what: torch.Tensor, *sizes: int, **options: bool) -> torch.Tensor:
        resized.append((tuple(what.shape), sizes))
        return interpolate(what, *sizes, **options)

    monkeypatch.setattr(sds, "_interpolate", recorded)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        got = resize(image, 32)
    finally:
        torch.use_deterministic_algorithms(False)
    if deterministic and max(shape) > 32:
        assert resized == [((1, 1, side, side), (32, side)) for side in shape]
    else:
        assert resized == [((1, 3, *shape), (32, 32))] and torch.equal(got, plain)


def test_pixels_are_their_own_latents(components: Components) -> None:
    """The latents of a model of pixels are the image, resized, in [-1, 1]."""
    score = ScoreDistillation(dataclasses.replace(components, vae=None, latent_size=16), GuidanceConfig())
    rgb = random_image(2, 16).detach()
    assert torch.equal(score.encode(rgb, None), rgb * 2 - 1)
    large = random_image(2, 48).detach()
    assert torch.equal(score.encode(large, None), resize(large, 16) * 2 - 1)


@pytest.mark.parametrize(
    ("shape", "latents", "sentence"),
    [
        ((3, 3, 32), False, r"images must be \[B, 3, H, W\], not \[3, 3, 32\]"),
        ((1, 4, 8, 8), False, r"images must be \[B, 3, H, W\], not \[1, 4, 8, 8\]"),
        ((1, 3, 8, 8), True, r"images must be \[B, 4, H, W\], not \[1, 3, 8, 8\]"),
        ((4, 4, 8), True, r"images must be \[B, 4, H, W\], not \[4, 4, 8\]"),
    ],
)
def test_bad_shape_raises(components, shape, latents, sentence) -> None:
    """A wrong number of dimensions or channels is refused with both shapes."""
    with pytest.raises(ValueError, match=sentence):
        ScoreDistillation(components, GuidanceConfig())(torch.zeros(shape), *prompts(1), StepInputs(latents=latents))


def test_latents_of_pixel_model_raise(components: Components) -> None:
    """A model of pixels refuses latents."""
    score = ScoreDistillation(dataclasses.replace(components, vae=None), GuidanceConfig())
    with pytest.raises(ValueError, match="latents must be False"):
        score(torch.zeros(1, 4, 8, 8), *prompts(1), StepInputs(latents=True))


def test_learned_variance_ignored(components: Components) -> None:
    """Channels beyond those of the latents are ignored."""
    noisy, t = torch.randn(2, 4, 8, 8, generator=generator()), torch.tensor([300, 800])
    expected = guided_prediction(components, noisy, t, *prompts(2), scale=5.0)

    class Wider:
        def __call__(self, *rows, **options):
            (out,) = components.unet(*rows, **options)
            return (torch.cat([out, 1 + out], dim=1),)

    got = guided_prediction(dataclasses.replace(components, unet=Wider()), noisy, t, *prompts(2), scale=5.0)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_clip_grad_latent_zero(components: Components) -> None:
    """A limit of zero clamps nothing, like a negative one."""
    z = torch.randn(1, 4, 8, 8, generator=generator())
    free, zero = (
        ScoreDistillation(components, GuidanceConfig(clip_grad_latent=limit))(
            z, *prompts(1), StepInputs(generator=generator(), latents=True)
        ).gradient
        for limit in (-1.0, 0.0)
    )
    assert torch.equal(free, zero) and free.abs().max() > 0
