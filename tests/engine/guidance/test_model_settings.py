"""A model that cannot be right is refused before it is built, in one sentence that names the part and the value."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.model.checks import check_folder
from dream_fast.engine.guidance.model.settings import (
    check_finite,
    check_pipeline_settings,
    check_schedule,
    check_settings,
    check_tokens,
    check_weight_file,
)

UNET = [f"down_blocks.{i}.resnets.{j}.conv1.weight" for i in range(2) for j in range(2)]
UNET += [f"up_blocks.{i}.resnets.{j}.conv1.weight" for i in range(2) for j in range(3)]
UNET += ["down_blocks.1.attentions.0.transformer_blocks.0.norm1.weight", "conv_in.weight"]
TEXT = [f"text_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(3)]
T5 = [f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(3)]
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("tensors", "name", "values"),
    [
        (UNET, "layers_per_block", [0, -1, 3, 10**6, [2, 3], [10**6, 1]]),
        (UNET, "transformer_layers_per_block", [0, 2, 10**6, [1, 10**6], [[1], [10**6]]]),
        (UNET, "block_out_channels", [[16], [16] * 3, [16] * 100_000, []]),
        (UNET, "down_block_types", [["DownBlock2D"] * 3]),
        (UNET, "up_block_types", [["UpBlock2D"]]),
        (TEXT, "num_hidden_layers", [0, -1, 4, 10**7]),
        (T5, "num_layers", [0, 4, 10**7]),
        (None, "scaling_factor", [0, -1.0, NAN, INF, 1e308, 10**400]),
        (None, "shift_factor", [NAN, 1e308]),
        (None, "norm_eps", [0, -1e-5, NAN, 1e300]),
        (None, "layer_norm_eps", [0.0, NAN, 5.0]),
        (None, "mid_block_scale_factor", [0, NAN]),
        (None, "resnet_out_scale_factor", [0.0, INF]),
        (None, "freq_shift", [NAN, 1e30]),
        (None, "beta_start", [0, 1.0, 2.0, NAN]),
        (None, "beta_end", [0.0, 2.0, NAN, -1]),
        (None, "num_train_timesteps", [0, 1, -5, 10**9]),
        (None, "trained_betas", [[NAN], [0.1, INF]]),
        (None, "sample_size", [0, -8, 10**9]),
        (None, "norm_num_groups", [0, -1, 10**9]),
        (None, "attention_head_dim", [0, -2, [8, 0]]),
        (None, "conv_in_kernel", [0, 10**6]),
        (None, "downsample_padding", [-1, 10**6]),
        (None, "anything", [NAN, -INF, 10**400, [1, [NAN]], {"deep": INF}]),
    ],
)
def test_check_settings_refused(tensors: list[str] | None, name: str, values: list[Any]) -> None:
    """Each value of a setting that cannot be right is refused, also inside another setting; the sentence is short."""
    for value in values:
        for settings in ({name: value}, {"text_config": {name: value}}):
            with pytest.raises(UserError, match="^the part states ") as refused:
                check_settings("the part", settings, tensors)
            assert len(str(refused.value)) < 200


def test_check_settings_accepted() -> None:
    """Usual settings pass, and so do values that the library has to judge."""
    unet = {
        **{"layers_per_block": 2, "transformer_layers_per_block": [0, 1], "block_out_channels": [16, 32]},
        **{"sample_size": 64, "norm_eps": 1e-5, "norm_num_groups": 32, "attention_head_dim": [5, 10], "dropout": 0.0},
        **{
            "mid_block_scale_factor": 1,
            "conv_in_kernel": 3,
            "freq_shift": 0,
            "flip_sin_to_cos": True,
            "act_fn": "silu",
        },
        **{"layers": None, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "num_class_embeds": None},
    }
    check_settings("the unet", unet, UNET)
    check_settings("the unet", {"transformer_layers_per_block": 1}, ["down_blocks.0.resnets.0.conv1.weight"])
    check_settings("the text encoder", {"num_hidden_layers": 2, "eos_token_id": 49407}, TEXT)  # fewer than it has
    check_settings("the vae", {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": [0.0] * 4}, None)


def test_check_pipeline_settings() -> None:
    """In any architecture: no more layers than some tensor's index, and finite numbers; other counts are not judged."""
    tensors = [f"transformer_blocks.{i}.norm.weight" for i in range(19)]
    check_pipeline_settings("it", {"num_layers": 19, "max_window_layers": 70, "shift": 3.0, "num_heads": 64}, tensors)
    for settings in (
        {"num_layers": 10**7},
        {"text_config": {"num_hidden_layers": 100}},
        {"a": NAN},
        {"a": {"b": [INF]}},
    ):
        with pytest.raises(UserError, match="^it states "):
            check_pipeline_settings("it", settings, tensors)


SCHEDULES = {
    "linear": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "trained": {"trained_betas": torch.linspace(0.001, 0.02, 1000).tolist()},
}


@pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)
def test_check_schedule_accepted(settings: dict[str, Any]) -> None:
    """The schedules that models are trained with."""
    check_schedule("it", DDIMScheduler(**settings).alphas_cumprod, 1000)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_start": 0.0, "beta_end": 0.0},
        {"beta_start": 0.02, "beta_end": 1e-6},
        {"trained_betas": [0.0] * 1000},
        {"trained_betas": [2.0] * 1000},
        {"trained_betas": [-0.1] * 1000},
        {"trained_betas": [0.1] * 5},
        {"trained_betas": [NAN] * 1000},
    ],
)
def test_check_schedule_refused(settings: dict[str, Any]) -> None:
    """A signal that does not fall, falls below 0, or has another length."""
    with pytest.raises(UserError, match="^it states "):
        check_schedule("it", DDIMScheduler(**settings).alphas_cumprod, 1000)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_check_weight_file_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights of whole numbers and booleans are refused by name; counters of positions may be whole numbers."""
    path = tmp_path / "w.safetensors"
    save_file({"a.weight": torch.zeros(2), "b.position_ids": torch.zeros(2, dtype=torch.int64)}, path)
    assert sorted(check_weight_file(path)) == ["a.weight", "b.position_ids"]
    save_file({"a.weight": torch.zeros(2).to(dtype)}, path)
    with pytest.raises(UserError, match="holds a.weight as .*; weights are floating-point numbers"):
        check_weight_file(path)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_check_finite(value: float, dtype: torch.dtype) -> None:
    """A bad weight among many is found and its tensor named; an empty tensor is valid."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1, bias=False)).to(dtype)
    module.register_buffer("empty", torch.zeros(0, dtype=dtype))
    check_finite("it", module)
    module[1].weight.data[0, 3] = value
    with pytest.raises(UserError, match="^it has weights that are not finite, such as 1.weight$"):
        check_finite("it", module)


def test_check_tokens() -> None:
    """Tokens beyond the text encoder's table, and below it, are refused."""
    config = SimpleNamespace(vocab_size=10)
    check_tokens("m", torch.tensor([[0, 9]]), config)
    check_tokens("m", torch.tensor([[0, 99]]), SimpleNamespace())
    for ids in ([[0, 10]], [[-1, 3]]):
        with pytest.raises(UserError, match="does not fit its text encoder, which has 10 tokens"):
            check_tokens("m", torch.tensor(ids), config)


@pytest.mark.parametrize("how", ["pipe", "folder", "device", "huge"])
@pytest.mark.parametrize(
    "name",
    [
        *("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"),
        *("tokenizer/merges.txt", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"),
        *("tokenizer/added_tokens.json", "text_encoder/generation_config.json"),
    ],
)
def test_check_folder_other_kinds(how: str, name: str, tiny_model: Path, tmp_path: Path) -> None:
    """A file of a model that is something else, or huge, is refused at once."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = model / name
    is_extra = not path.exists()
    path.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 34)
    if how == "folder" and (is_extra or name.endswith((".txt", "vocab.json"))):
        return  # a folder is not read as a file, and the tokenizer says what it lacks
    with pytest.raises(UserError, match="model"):
        check_folder(model, "SD", model)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_check_folder_counts_layers(part: str, tiny_model: Path, tmp_path: Path) -> None:
    """The layers of each part are compared with its file before anything is built."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path, name = model / part / "config.json", "num_hidden_layers" if part == "text_encoder" else "layers_per_block"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {name: 10**7}))
    with pytest.raises(UserError, match=f"the {part} of the model .* states {name} 10000000, and its weights have"):
        check_folder(model, "SD", model)
    path.write_text(json.dumps(settings))
    check_folder(model, "SD", model)
    weights = next((model / part).glob("*.safetensors"))
    tensors = load_file(weights)
    save_file({name: tensor.to(torch.int32) for name, tensor in tensors.items()}, weights)
    with pytest.raises(UserError, match="weights are floating-point numbers"):
        check_folder(model, "SD", model)
