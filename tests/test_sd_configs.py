"""The true configurations of Stable Diffusion 1.5, 2.0 and 2.1, with random weights, through the one loader.

The weights go to disk as those models have them: fp16, and under the names that their files use, which are older than
today's classes. No trained weight is involved; what is tested is that the shapes, names and constants fit.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dream_fast.bench.accuracy import check
from dream_fast.engine.config import GuidanceConfig
from dream_fast.engine.guidance.loader import load_components
from dream_fast.engine.guidance.prompts import PromptEmbeddings
from dream_fast.engine.guidance.sds import ScoreDistillation

UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
UNET_1 = UNET | {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
UNET_2 = UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 64,
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "vocab_size": 49408,
}
TEXT_1 = TEXT | {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "torch_dtype": "float32",
}
TEXT_2 = TEXT | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "torch_dtype": "float16",
}
SCHEDULE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
PNDM = SCHEDULE | {"_class_name": "PNDMScheduler"}
PNDM_2 = PNDM | {"clip_sample": False, "prediction_type": "epsilon"}
DDIM_V = SCHEDULE | {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"}

MODELS = {
    "1.5": (UNET_1, VAE | {"sample_size": 512}, TEXT_1, PNDM),
    "2.0-base and 2.1-base": (  # the same configuration
        UNET_2,
        VAE | {"sample_size": 768},
        TEXT_2,
        PNDM_2,
    ),
    "2.1-768-v": (
        UNET_2 | {"sample_size": 96, "upcast_attention": True},
        VAE | {"sample_size": 768, "scaling_factor": 0.18215},
        TEXT_2,
        DDIM_V,
    ),
}

# Attention in the VAE's files, by the names of the time -> by today's.
OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def random_weights(module: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """fp16 weights for ``module`` (on the meta device): norms at one, the rest small draws, tiled from one block."""
    block = torch.randn(1 << 22, generator=generator).half()
    weights = {}
    for name, parameter in module.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            count, fan_in = parameter.numel(), parameter[0].numel()
            values = block.repeat(-(-count // len(block)))[:count] if count > len(block) else block[:count].clone()
            weights[name] = values.mul_(fan_in**-0.5).view(parameter.shape)
        else:
            weights[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=torch.float16)
    return weights


def write_weights(folder: Path, unet: dict, vae: dict, text: dict) -> None:
    """Write random weights of these shapes in the Stable Diffusion layout, 2.6 GB."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        unet_model = UNet2DConditionModel.from_config(unet)
        vae_model = AutoencoderKL.from_config(vae)
        text_model = CLIPTextModel(CLIPTextConfig(**{k: v for k, v in text.items() if k != "torch_dtype"}))
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        (folder / part).mkdir()
    save_file(random_weights(unet_model, generator), folder / "unet" / "diffusion_pytorch_model.safetensors")

    weights = {}
    for name, value in random_weights(vae_model, generator).items():
        for new, old in OLD_VAE_NAMES.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        weights[name] = value
    save_file(weights, folder / "vae" / "diffusion_pytorch_model.safetensors")

    weights = {
        f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in random_weights(text_model, generator).items()
    }
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})


def write_configurations(folder: Path, unet: dict, vae: dict, text: dict, schedule: dict) -> None:
    """Write what is beside the weights and the tokenizer, as the repositories on the hub have it."""
    for part, config, file in (
        ("unet", unet, "config.json"),
        ("vae", vae, "config.json"),
        ("text_encoder", text, "config.json"),
        ("scheduler", schedule, "scheduler_config.json"),
    ):
        (folder / part / file).write_text(json.dumps(config))
    if text is TEXT_2:  # these pad with another token than their tokenizer_config.json says
        (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    (folder / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusionPipeline",
                "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
                "requires_safety_checker": False,
                "safety_checker": [None, None],
                "scheduler": ["diffusers", schedule["_class_name"]],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            }
        )
    )


@pytest.fixture(scope="module")
def write_model(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_writer: Callable[..., int]
) -> Iterator[Callable[[str], Path]]:
    """Writes a version's model and gives its folder. Versions of the same shapes share weights, one after the other."""
    folders: dict[str, Path] = {}

    def remove() -> None:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        folders.clear()

    def write(version: str) -> Path:
        unet, vae, text, schedule = MODELS[version]
        shapes = version[0]
        if shapes not in folders:
            remove()
            folders[shapes] = tmp_path_factory.mktemp("model")
            write_weights(folders[shapes], unet, vae, text)
            tokenizer_writer(folders[shapes] / "tokenizer", vocabulary_size=text["vocab_size"])
        write_configurations(folders[shapes], unet, vae, text, schedule)
        return folders[shapes]

    yield write
    remove()


@pytest.mark.parametrize("version", MODELS)
def test_true_configuration_loads_and_guides(version: str, write_model: Callable[[str], Path]) -> None:
    unet, _, text, schedule = MODELS[version]
    components = load_components(write_model(version), "cpu", torch.bfloat16)

    latent_size = unet["sample_size"]
    assert (components.latent_size, components.image_size) == (latent_size, 8 * latent_size)
    assert (components.latent_channels, components.scaling_factor, components.shift_factor) == (4, 0.18215, 0.0)
    assert components.prediction_type == schedule.get("prediction_type", "epsilon")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    check("alphas", components.alphas_cumprod, (1 - betas.float()).cumprod(0), (1 - betas).cumprod(0))
    assert components.num_train_timesteps == 1000
    ids = components.tokenizer("a", padding="max_length", max_length=4).input_ids
    assert ids[0] == 49406 and ids[2:] == [49407, 49407 if version == "1.5" else 0]
    parameters = sum(parameter.numel() for parameter in components.unet.parameters())
    assert parameters == (859_520_964 if version == "1.5" else 865_910_724)  # as published

    prompts = PromptEmbeddings(components, "a hamburger")
    assert components.text_encoder is None
    width = text["hidden_size"]
    assert prompts.views.shape == (4, 77, width) and prompts.negative.shape == (1, 77, width)

    # One step of guidance, at an eighth of the true edge to save time.
    components.image_size, components.latent_size = 64, 8
    rgb = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    cond, uncond = prompts.embeddings(torch.zeros(1), torch.full((1,), 90.0), 30.0)
    sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=100.0))
    result = sds(rgb, cond, uncond, generator=torch.Generator().manual_seed(2))
    result.loss.backward()
    assert result.gradient.shape == (1, 4, 8, 8)
    assert torch.isfinite(rgb.grad).all() and rgb.grad.abs().max() > 0
