"""The true configurations of Stable Diffusion 1.5, 2.0 and 2.1 through the one loader, without a trained weight.

The weights go to disk as those models have them: fp16, and under the names that their files use, which are older than
today's classes. At their true size they are holes in sparse files that nothing reads, which shows that shapes, names
and constants fit; guidance runs on random weights, with a fifth of the channels and two layers of the text encoder.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.model.components import load_components
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
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def narrowed(unet: dict, vae: dict, text: dict) -> tuple[dict, dict, dict]:
    """The same architecture with fewer channels and layers, whose text width and spatial sizes are the true ones.

    Heads have a width of 64 in version 2, as in truth; in version 1 there are as many as in truth.
    """
    heads = unet["attention_head_dim"]
    unet = unet | {"block_out_channels": [count // 5 for count in unet["block_out_channels"]]}
    if isinstance(heads, list):
        unet["attention_head_dim"] = [count // 5 for count in heads]
    vae = vae | {"block_out_channels": [count // 4 for count in vae["block_out_channels"]]}
    return unet, vae, text | {"num_hidden_layers": 2}


def shapes_in_files(unet: dict, vae: dict, text: dict) -> dict[str, dict[str, torch.Size]]:
    """Shapes of the weights of each part, by their names in its file."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(unet),
            "vae": AutoencoderKL.from_config(vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**{k: v for k, v in text.items() if k != "torch_dtype"})),
        }
    shapes = {}
    for part, module in modules.items():
        shapes[part] = {}
        for name, parameter in module.named_parameters():
            if part == "vae":
                for new, old in OLD_VAE_NAMES.items():
                    name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            elif part == "text_encoder":
                name = f"text_model.{name.removeprefix('text_model.')}"
            shapes[part][name] = parameter.shape
    return shapes


def write_random(path: Path, shapes: dict[str, torch.Size], generator: torch.Generator) -> None:
    """Write fp16 weights: norms at one, the rest small draws."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("weight") and len(shape) > 1:
            weights[name] = torch.randn(shape, generator=generator).mul_(math.prod(shape[1:]) ** -0.5).half()
        else:
            weights[name] = torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
    if path.parent.name == "text_encoder":
        weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path, metadata={"format": "pt"})


def write_holes(path: Path, shapes: dict[str, torch.Size]) -> None:
    """Write a file of fp16 weights whose numbers are a hole: 1.7 GB for a UNet, of which the disk holds a few KB."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    if path.parent.name == "text_encoder":
        start, end = end, end + 8 * 77
        header["text_model.embeddings.position_ids"] = {
            "dtype": "I64",
            "shape": [1, 77],
            "data_offsets": [start, end],
        }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_configurations(folder: Path, unet: dict, vae: dict, text: dict, schedule: dict) -> None:
    """Write the files other than weights and tokenizer, as in the repositories on the hub."""
    for part, config, file in (
        ("unet", unet, "config.json"),
        ("vae", vae, "config.json"),
        ("text_encoder", text, "config.json"),
        ("scheduler", schedule, "scheduler_config.json"),
    ):
        (folder / part / file).write_text(json.dumps(config))
    if text["hidden_size"] == 1024:  # these pad with another token than their tokenizer_config.json says
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


@pytest.fixture
def write_model(tmp_path: Path, tokenizer_writer: Callable[..., int]) -> Callable[..., Path]:
    """write_model(version, narrow): the folder of a model, at its true size or narrow enough to compute."""

    def write(version: str, *, narrow: bool) -> Path:
        unet, vae, text, schedule = MODELS[version]
        configs = narrowed(unet, vae, text) if narrow else (unet, vae, text)
        generator = torch.Generator().manual_seed(0)
        for part, shapes in shapes_in_files(*configs).items():
            (tmp_path / part).mkdir()
            if narrow:
                write_random(tmp_path / part / FILES[part], shapes, generator)
            else:
                write_holes(tmp_path / part / FILES[part], shapes)
        (tmp_path / "scheduler").mkdir()
        tokenizer_writer(tmp_path / "tokenizer", vocabulary_size=text["vocab_size"])
        write_configurations(tmp_path, *configs, schedule)
        return tmp_path

    return write


@pytest.mark.parametrize("version", MODELS)
def test_true_configuration_loads(version: str, write_model: Callable[..., Path]) -> None:
    """Every size, constant and name of the published models fits the loader."""
    unet, _, text, schedule = MODELS[version]
    components = load_components(write_model(version, narrow=False), "cpu", torch.float16)

    latent_size = unet["sample_size"]
    assert (components.latent_size, components.image_size) == (latent_size, 8 * latent_size)
    assert (components.latent_channels, components.scaling_factor, components.shift_factor) == (4, 0.18215, 0.0)
    assert components.prediction_type == schedule.get("prediction_type", "epsilon")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    check("alphas", components.process.alphas_cumprod, (1 - betas.float()).cumprod(0), (1 - betas).cumprod(0))
    assert components.process.num_timesteps == 1000
    ids = components.tokenizer("a", padding="max_length", max_length=4).input_ids
    assert ids[0] == 49406 and ids[2:] == [49407, 49407 if version == "1.5" else 0]
    parameters = sum(parameter.numel() for parameter in components.unet.parameters())
    assert parameters == (859_520_964 if version == "1.5" else 865_910_724)  # as published
    assert components.text_encoder.config.num_hidden_layers == text["num_hidden_layers"]


@pytest.mark.parametrize("version", MODELS)
def test_true_configuration_guides(version: str, write_model: Callable[..., Path]) -> None:
    """Prompts are embedded and a step of guidance has a finite gradient that is not zero."""
    text = MODELS[version][2]
    components = load_components(write_model(version, narrow=True), "cpu", torch.bfloat16)
    prompts = PromptEmbeddings(components, "a hamburger")
    assert components.text_encoder is None
    width = text["hidden_size"]
    assert prompts.views.shape == (4, 77, width) and prompts.negative.shape == (1, 77, width)

    # One step of guidance, at an eighth of the true edge to save time.
    components.image_size, components.latent_size = 64, 8
    rgb = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    cond, uncond = prompts.embeddings(torch.zeros(1), torch.full((1,), 90.0))
    sds = ScoreDistillation(components, GuidanceConfig(guidance_scale=100.0))
    result = sds(rgb, cond, uncond, StepInputs(generator=torch.Generator().manual_seed(2)))
    result.loss.backward()
    assert result.gradient.shape == (1, 4, 8, 8)
    assert torch.isfinite(rgb.grad).all() and rgb.grad.abs().max() > 0
