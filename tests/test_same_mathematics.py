"""Score distillation as a run computes it against plain diffusers: same weights, pictures, levels and noise.

The gradient in the picture may be twice as far from the exact one as that of plain diffusers in the model's own dtype.
On a GPU that is the architecture of Stable Diffusion 2.1-base in fp16 against fp32, on a CPU a tiny one in fp32 against
fp64.
"""

import pytest
import torch
from torch import Tensor

from dream_fast.bench.accuracy import check
from dream_fast.bench.sd_model import TOKENS, in_dtype, random_components
from dream_fast.engine.config import GuidanceConfig
from dream_fast.engine.guidance.loader import Components, prepare_components
from dream_fast.engine.guidance.sds import ScoreDistillation

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
OWN, EXACT = (torch.float16, torch.float32) if GPU else (torch.float32, torch.float64)
STEPS = 4
KINDS = {
    "default": {},
    "vram_O": {"vram_O": True},
    "channels_last": {"channels_last": ("unet", "vae")},
} | ({"compiled": {"compiled": ("unet", "vae")}} if GPU else {})

pytestmark = pytest.mark.gpu


def gradients(components: Components, *, graphs: bool) -> list[Tensor]:
    """Of STEPS pictures [1, 3, 64, 64], each with its own prompt, level and noise."""
    score = ScoreDistillation(components, GuidanceConfig(guidance_scale=20.0), cuda_graphs=graphs)
    found = []
    for step in range(STEPS):
        generator = torch.Generator(DEVICE).manual_seed(step)
        picture = torch.rand(1, 3, 64, 64, generator=generator, device=DEVICE).requires_grad_()
        shape = (2, 1, TOKENS, components.unet.config.cross_attention_dim)
        cond, uncond = torch.randn(shape, generator=generator, device=DEVICE).half().to(components.dtype)
        score(picture, cond, uncond, generator=generator).loss.backward()
        found.append(picture.grad.double())
    return found


@pytest.fixture(scope="module")
def plain() -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of plain diffusers in the model's own dtype, and exact ones."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        components = random_components(DEVICE, OWN, tiny=not GPU)
        return gradients(components, graphs=False), gradients(in_dtype(components, EXACT), graphs=False)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_computes_what_plain_diffusers_does(kind: str, plain: tuple[list[Tensor], list[Tensor]]) -> None:
    components = random_components(DEVICE, OWN, tiny=not GPU)
    prepare_components(components, TOKENS, **KINDS[kind])
    for step, (got, own, exact) in enumerate(zip(gradients(components, graphs=True), *plain, strict=True)):
        assert exact.abs().max() > 0
        check(f"{kind}, step {step}", got, own, exact)


def test_a_changed_weight_is_seen(plain: tuple[list[Tensor], list[Tensor]]) -> None:
    components = random_components(DEVICE, OWN, tiny=not GPU)
    prepare_components(components, TOKENS)
    components.vae.encoder.conv_norm_out.weight.data *= 1.1
    with pytest.raises(AssertionError, match="error"):
        check("changed", gradients(components, graphs=True)[0], plain[0][0], plain[1][0])
