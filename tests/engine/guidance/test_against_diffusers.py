"""Score distillation as in a run against plain diffusers: same weights, images, timesteps and noise.

The plain computation is written here from the paper (DreamFusion, Poole et al. 2022, equation 3) with the modules of
diffusers and torch's autograd; it shares no code with the engine but the weights.

The gradient in the image may be twice as far from the exact one as that of plain diffusers in the model's own dtype.
On a GPU that is the architecture of Stable Diffusion 2.1-base in fp16 against fp32, on a CPU a tiny one in fp32 against
fp64.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast.bench.accuracy import check
from dream_fast.bench.pipeline.random_sd import TOKENS, in_dtype, random_components
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.model.components import Components, prepare_components
from dream_fast.engine.guidance.sds import ScoreDistillation

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
OWN, EXACT = (torch.float16, torch.float32) if GPU else (torch.float32, torch.float64)
STEPS, SCALE = 4, 20.0
KINDS = {
    "default": {},
    "vram_O": {"vram_O": True},
    "channels_last": {"channels_last": ("unet", "vae")},
} | ({"compiled": {"compiled": ("unet", "vae")}} if GPU else {})

pytestmark = pytest.mark.gpu


def gradients(components: Components, *, graphs: bool) -> list[Tensor]:
    """Gradients [1, 3, 64, 64] in STEPS images, each with its own prompt, timestep and noise."""
    score = ScoreDistillation(components, GuidanceConfig(guidance_scale=SCALE), cuda_graphs=graphs)
    gradients_of_steps = []
    for step in range(STEPS):
        generator = torch.Generator(DEVICE).manual_seed(step)
        image = torch.rand(1, 3, 64, 64, generator=generator, device=DEVICE).requires_grad_()
        shape = (2, 1, TOKENS, components.unet.config.cross_attention_dim)
        cond, uncond = torch.randn(shape, generator=generator, device=DEVICE).half().to(components.dtype)
        score(image, cond, uncond, StepInputs(generator=generator)).loss.backward()
        gradients_of_steps.append(image.grad.double())
    return gradients_of_steps


def plain_gradients(components: Components) -> list[Tensor]:
    """The same gradients by the modules of `components` alone, in their dtype; sums of latents are at least fp32."""
    sums = torch.promote_types(components.dtype, torch.float32)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0).to(DEVICE, sums)
    size, gradients_of_steps = components.unet.config.sample_size, []
    for step in range(STEPS):
        generator = torch.Generator(DEVICE).manual_seed(step)
        image = torch.rand(1, 3, 64, 64, generator=generator, device=DEVICE).to(sums).requires_grad_()
        shape = (2, 1, TOKENS, components.unet.config.cross_attention_dim)
        cond, uncond = torch.randn(shape, generator=generator, device=DEVICE).half().to(components.dtype)
        draw = torch.randn(1, 4, size, size, generator=generator, device=DEVICE)
        t = torch.randint(20, 981, (1,), generator=generator, device=DEVICE)
        noise = torch.randn(1, 4, size, size, generator=generator, device=DEVICE).to(sums)
        # An encoder of three blocks halves its image twice, one of four thrice.
        side = size * 2 ** (len(components.vae.config.block_out_channels) - 1)
        resized = F.interpolate(image, (side, side), mode="bilinear", antialias=side < 64)
        posterior = components.vae.encode((2 * resized - 1).to(components.dtype)).latent_dist
        z = 0.18215 * (posterior.mean.to(sums) + posterior.std.to(sums) * draw)
        with torch.no_grad():
            noisy = alphas[t].sqrt() * z + (1 - alphas[t]).sqrt() * noise
            with_prompt, without = (
                components.unet(noisy.to(components.dtype), t, encoder_hidden_states=prompt).sample.to(sums)
                for prompt in (cond, uncond)
            )
            gradient = (1 - alphas[t]) * (without + SCALE * (with_prompt - without) - noise)
            peak = gradient.abs().max()  # a loss scale, for fp16
        (grad,) = torch.autograd.grad(z, image, gradient / peak)
        gradients_of_steps.append((grad * peak).double())
    return gradients_of_steps


@pytest.fixture(scope="module")
def plain() -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of plain diffusers in the model's own dtype, and exact ones."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        components = random_components(DEVICE, OWN, tiny=not GPU)
        return plain_gradients(components), plain_gradients(in_dtype(components, EXACT))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_diffusers(kind: str, plain: tuple[list[Tensor], list[Tensor]]) -> None:
    """A run is as accurate as plain diffusers."""
    components = random_components(DEVICE, OWN, tiny=not GPU)
    prepare_components(components, TOKENS, **KINDS[kind])
    for step, (got, reference, exact) in enumerate(zip(gradients(components, graphs=True), *plain, strict=True)):
        assert exact.abs().max() > 0
        check(f"{kind}, step {step}", got, reference, exact)


def test_a_changed_weight_is_seen(plain: tuple[list[Tensor], list[Tensor]]) -> None:
    components = random_components(DEVICE, OWN, tiny=not GPU)
    prepare_components(components, TOKENS)
    components.vae.encoder.conv_norm_out.weight.data *= 1.1
    with pytest.raises(AssertionError, match="error"):
        check("changed", gradients(components, graphs=True)[0], plain[0][0], plain[1][0])
