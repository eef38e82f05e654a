"""An image model of Stable Diffusion 2.1-base's architecture with random weights, and a tiny one for tests.

Time and memory of a step do not depend on what the weights are, so nothing is downloaded.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from dream_fast.engine.guidance.model.components import Components
from dream_fast.engine.guidance.noise import VariancePreserving
from dream_fast.engine.guidance.prompts import VIEWS, PromptEmbeddings
from dream_fast.engine.runtime.quiet import quiet_diffusers

TOKENS = 77
# As published in unet/config.json and vae/config.json.
UNET: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 768,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TINY_UNET = UNET | {
    "attention_head_dim": 2,
    "block_out_channels": [16, 32],
    "cross_attention_dim": 32,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
TINY_VAE = VAE | {
    "block_out_channels": [16, 16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 32,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}


def random_components(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Components:
    """The plain modules of diffusers, frozen and on `device`, without text encoder and VAE decoder. Always the same.

    `dream_fast.engine.guidance.model.components.prepare_components` makes of them what a run has.
    """
    quiet_diffusers()
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet_config, vae_config = (TINY_UNET, TINY_VAE) if tiny else (UNET, VAE)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
        vae = AutoencoderKL.from_config(vae_config)
    vae.decoder = vae.post_quant_conv = None
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    for model in (unet, vae):
        _to(model, dtype).to_empty(device=device).requires_grad_(False).eval()
        _fill(model, generator)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    size = unet_config["sample_size"]
    return Components(
        name="tiny" if tiny else "Stable Diffusion 2.1-base, random weights",
        tokenizer=None,
        text_encoder=None,
        unet=unet,
        vae=vae,
        device=device,
        dtype=dtype,
        image_size=size * 2 ** (len(vae_config["block_out_channels"]) - 1),
        latent_size=size,
        latent_channels=4,
        scaling_factor=0.18215,
        shift_factor=0.0,
        prediction_type="epsilon",
        process=VariancePreserving((1 - betas).cumprod(0).to(device, torch.float32)),
    )


def _to(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """torch's conversion; that of diffusers warns of models that need parts in fp32, which these do not."""
    return torch.nn.Module.to(model, dtype)


@torch.no_grad()
def _fill(model: torch.nn.Module, generator: torch.Generator | None) -> None:
    """Scales of norms at one, biases at zero, the rest normal with a variance of one over the inputs."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(float(name.endswith("weight")))


def in_dtype(components: Components, dtype: torch.dtype) -> Components:
    """A copy whose modules have their weights in `dtype`."""
    parts = {name: _to(copy.deepcopy(getattr(components, name)), dtype) for name in ("unet", "vae")}
    return Components(**(vars(components) | parts | {"dtype": dtype}))


class RandomPrompt(PromptEmbeddings):
    """Embeddings that no text encoder made."""

    def __init__(self, components: Components):
        width = components.unet.config.cross_attention_dim
        generator = torch.Generator(components.device).manual_seed(1)
        drawn: Tensor = torch.randn(len(VIEWS) + 1, TOKENS, width, generator=generator, device=components.device)
        self.views, self.negative = drawn.to(components.dtype).split([len(VIEWS), 1])
