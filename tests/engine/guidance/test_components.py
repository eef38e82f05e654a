"""Loading a model: its constants, its file layouts, and messages for broken models."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.model.components import SD_VERSIONS, choose_source, load_components

PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, for a test to break."""
    return shutil.copytree(tiny_model, tmp_path / "broken")


def test_facts(tiny_model: Path) -> None:
    components = load_components(tiny_model, "cpu")
    assert (components.image_size, components.latent_size, components.latent_channels) == (32, 8, 4)
    assert (components.prediction_type, components.process.num_timesteps) == ("epsilon", 1000)
    assert components.scaling_factor == 0.18215 and str(components.attention) == "sdpa"
    alphas = components.process.alphas_cumprod
    assert alphas.shape == (1000,) and alphas.dtype == torch.float32
    assert components.vae.decoder is None
    for model in (components.unet, components.vae, components.text_encoder):
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_constants_from_configurations(broken: Path) -> None:
    """Sizes and constants come from the configurations."""
    config = json.loads((broken / "unet" / "config.json").read_text())
    (broken / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    config = json.loads((broken / "vae" / "config.json").read_text())
    (broken / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5, "shift_factor": 0.1}))
    components = load_components(broken, "cpu", torch.bfloat16)
    assert (components.image_size, components.latent_size) == (64, 16)
    assert (components.scaling_factor, components.shift_factor) == (0.5, 0.1)
    assert components.unet.dtype == components.vae.dtype == components.text_encoder.dtype == torch.bfloat16
    assert components.process.alphas_cumprod.dtype == torch.float32


def test_source() -> None:
    assert choose_source() == MODEL_FOLDER
    assert choose_source(sd_version="2.0") == SD_VERSIONS["2.0"]
    assert choose_source(sd_version="2.0", hf_key="a/b") == "a/b"


def test_sharded_and_half_precision(tiny_model: Path, broken: Path) -> None:
    """Sharded and half-precision files load the same."""
    whole = load_components(tiny_model, "cpu")
    whole.unet.save_pretrained(broken / "unet", max_shard_size="300KB")
    assert len(list((broken / "unet").glob("*-of-*.safetensors"))) > 2
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    stem = broken / "vae" / "diffusion_pytorch_model"
    weights = load_file(f"{stem}.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, f"{stem}.fp16.safetensors")
    Path(f"{stem}.safetensors").unlink()
    parts = load_components(broken, "cpu")
    for name, value in whole.unet.state_dict().items():
        assert torch.equal(value, parts.unet.state_dict()[name]), name
    for name, value in parts.vae.state_dict().items():
        assert torch.equal(value, weights[name].half().float()), name

    next((broken / "unet").glob("*-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"unet.*-of-.*missing"):
        load_components(broken, "cpu")


@pytest.mark.parametrize("shown", [True, False])
def test_quiet_progress(broken: Path, capsys, shown: bool) -> None:
    """Loading shows no progress bars and restores the settings of libraries."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    def settings() -> list[bool]:
        bars = [library.is_progress_bar_enabled() for library in (diffusers_logging, transformers_logging)]
        return [*bars, not hub.are_progress_bars_disabled()]

    load_components(broken, "cpu").unet.save_pretrained(broken / "unet", max_shard_size="300KB")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    before = settings()
    assert before == [True] * 3
    try:
        if not shown:
            hub.disable_progress_bars()
            diffusers_logging.disable_progress_bar()
        wanted = settings()
        capsys.readouterr()
        load_components(broken, "cpu")
        assert capsys.readouterr().err == ""
        assert settings() == wanted
    finally:
        hub.enable_progress_bars()
        diffusers_logging.enable_progress_bar()


@pytest.mark.parametrize("part", PARTS)
def test_missing_component(broken: Path, part: str) -> None:
    shutil.rmtree(broken / part)
    with pytest.raises(UserError, match=f"lacks its component {part}"):
        load_components(broken, "cpu")


def test_compiling_is_for_gpus(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="--compile needs a GPU"):
        load_components(tiny_model, "cpu", compiled=("unet",))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_weight(path: Path) -> None:
    weights = load_file(path)
    weights.pop("conv_in.weight")
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda m: (m / "model_index.json").unlink(), "lacks model_index.json"),
        (lambda m: edit_json(m / "model_index.json", _class_name="StableDiffusionXLPipeline"), "only StableDiffusion"),
        (lambda m: edit_json(m / "model_index.json", vae=[None, None]), "lacks the component vae"),
        (lambda m: edit_json(m / "model_index.json", unet=["x", "MyUNet"]), "a MyUNet; UNet2DConditionModel is needed"),
        (lambda m: (m / "vae" / "config.json").write_text("{"), "vae/config.json cannot be read"),
        (lambda m: (m / "tokenizer" / "vocab.json").unlink(), "lacks tokenizer/vocab.json"),
        (lambda m: truncate(m / UNET_FILE), "unet/diffusion_pytorch_model.safetensors is damaged or incomplete"),
        (lambda m: (m / UNET_FILE).write_bytes(b""), "damaged or incomplete"),
        (lambda m: drop_weight(m / UNET_FILE), "unet .* lacks 1 of its weights, such as conv_in.weight"),
        (lambda m: (m / UNET_FILE).rename(m / "unet" / "diffusion_pytorch_model.bin"), "pickled weights are not load"),
        (lambda m: edit_json(m / "unet" / "config.json", block_out_channels=[16, 64]), "unet of the model .* not load"),
        (lambda m: edit_json(m / "unet" / "config.json", in_channels=9), "unet of the model"),
        (lambda m: edit_json(m / "unet" / "config.json", sample_size=[8, 16]), "no square sample_size"),
        (lambda m: edit_json(m / "scheduler" / "scheduler_config.json", prediction_type="sample"), "predicts 'sample'"),
        (lambda m: edit_json(m / "scheduler" / "scheduler_config.json", beta_schedule="x"), "scheduler of the model"),
    ],
)
def test_broken_model_raises(broken: Path, damage: Callable[[Path], None], sentence: str) -> None:
    """A broken model is refused with one sentence."""
    damage(broken)
    with pytest.raises(UserError, match=sentence) as caught:
        load_components(broken, "cpu")
    assert "\n" not in str(caught.value)


def test_mismatched_models_raise(broken: Path) -> None:
    """Components that do not fit each other are refused."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(broken / "unet")
    UNet2DConditionModel.from_config(config | {"in_channels": 9}).save_pretrained(broken / "unet")
    with pytest.raises(UserError, match="maps 9 to 4 channels but its vae has 4; inpainting"):
        load_components(broken, "cpu")
    UNet2DConditionModel.from_config(config | {"cross_attention_dim": 48}).save_pretrained(broken / "unet")
    with pytest.raises(UserError, match="width 32 but its unet expects 48"):
        load_components(broken, "cpu")


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_components(tmp_path / "nothing", "cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load_components(tmp_path / "file", "cpu")


@pytest.mark.parametrize("offline", [True, False])
def test_hub_name_offline(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    """A name on the hub is refused at once without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s for another try"))
    with pytest.raises(UserError, match="no folder called nobody/nothing, the hub cannot be reached"):
        load_components("nobody/nothing", "cpu")
