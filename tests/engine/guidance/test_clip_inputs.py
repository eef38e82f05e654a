"""Guidance by CLIP: how the model is loaded, and the arguments and results of a call."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.sections import CameraConfig, GuidanceConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance import clip
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.clip import ClipGuidance, clip_guidance, clip_views, load_clip
from dream_fast.engine.guidance.prompts import ViewAngles
from dream_fast.engine.scene.camera import turntable

OWN = {"back": "its rear"}
CAMERAS = turntable(CameraConfig(), 1, "cpu")


def guidance(folder: Path, **settings: Any) -> ClipGuidance:
    return clip_guidance(
        str(folder), "cpu", "a mug", OWN, GuidanceConfig(guidance=("clip",), **settings), ViewAngles(30.0)
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tiny_clip: Path) -> list[tuple[str, Any, dict[str, Any]]]:
    """Names, sources and options of the calls that load CLIP, which return the tiny one."""
    from transformers import CLIPModel, CLIPTokenizer

    calls = []
    for cls in (CLIPTokenizer, CLIPModel):
        load = cls.from_pretrained

        def recorded(source: Any, cls: type = cls, load: Any = load, **options: Any) -> Any:
            calls.append((cls.__name__, source, dict(options)))
            options.pop("revision", None)
            return load(tiny_clip, **options)

        monkeypatch.setattr(cls, "from_pretrained", recorded)
    return calls


@pytest.mark.parametrize(
    ("typed", "name", "pinned"),
    [
        ("nobody/clip", "nobody/clip", {}),
        ("nobody/clip@v2", "nobody/clip", {"revision": "v2"}),
        ("https://huggingface.co/nobody/clip/tree/v2", "nobody/clip", {"revision": "v2"}),
    ],
)
def test_load_clip_revision(calls, typed: str, name: str, pinned: dict[str, str]) -> None:
    """Tokenizer and model have the same repository and revision, in fp32, from safetensors only."""
    load_clip(typed, "cpu")
    (tokenizer, *first), (model, second, options) = calls
    assert (tokenizer, model) == ("CLIPTokenizer", "CLIPModel")
    assert first == [name, pinned] and second == name
    assert options == {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True} | pinned


@pytest.mark.parametrize(("typed", "revision"), [("nobody/clip", ""), ("nobody/clip@v2", " --revision v2")])
def test_load_clip_offline(monkeypatch, typed: str, revision: str) -> None:
    """The message has the reason and the command that downloads the files of the same revision."""
    from transformers import CLIPTokenizer

    def fails(source: Any, **options: Any) -> None:
        raise OSError("no network\nand a second line")

    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", fails)
    with pytest.raises(UserError) as caught:
        load_clip(typed, "cpu")
    assert str(caught.value) == (
        f"the CLIP model {typed} does not load: no network (where there is a network, `hf download nobody/clip"
        f"{revision} --include '*.json' --include merges.txt --include model.safetensors` fetches it)"
    )


def test_load_clip_damaged(tmp_path: Path) -> None:
    """A damaged folder gets no advice to download."""
    with pytest.raises(UserError, match=f"the CLIP model {tmp_path} does not load: ") as caught:
        load_clip(str(tmp_path), "cpu")
    assert "hf download" not in str(caught.value)


def test_load_clip_frozen(tiny_clip: Path, tmp_path: Path) -> None:
    """The model is frozen, in fp32 and on the given device."""
    from transformers import CLIPModel

    half = tmp_path / "half"
    CLIPModel.from_pretrained(tiny_clip, dtype=torch.float16).save_pretrained(half)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (half / name).write_text((tiny_clip / name).read_text())
    model, _ = load_clip(str(half), "meta")
    assert not model.training
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32 and not parameter.requires_grad and parameter.device.type == "meta"


def test_clip_guidance_passes_everything_on(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source and device reach the loader, view prompts the views, and angles the guidance."""
    loaded = load_clip(str(tiny_clip), "cpu")
    views = clip_views(*loaded, "a mug", OWN)
    calls = []
    monkeypatch.setattr(clip, "load_clip", lambda *words: calls.append(words) or loaded)
    config = GuidanceConfig(guidance=("clip",))
    guide = clip_guidance("a folder", "a device", "a mug", OWN, config, ViewAngles(20.0, 45.0, 60.0))
    assert calls == [("a folder", "a device")]
    assert torch.equal(guide.views, views) and not torch.equal(
        views[2], clip_views(*load_clip(str(tiny_clip), "cpu"), "a mug")[2]
    )
    assert guide.config is config and guide.angles == (20.0, 45.0, 60.0)


def test_clip_gradient_injected(tiny_clip: Path) -> None:
    """A call returns no timesteps, and the gradient of the image with its norm."""
    rgb = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    result = guidance(tiny_clip)(rgb, CAMERAS, StepInputs(progress=0.0))
    result.loss.backward()
    assert torch.equal(result.gradient, rgb.grad)
    assert torch.equal(result.grad_norm, torch.linalg.vector_norm(rgb.grad))
    assert result.t.shape == (0,) and result.t.dtype == torch.int64


def test_clip_default_step(tiny_clip: Path) -> None:
    """A call without a step uses the start of a schedule."""
    rgb = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    weight = LinearSchedule(0, 1.0, 5.0, 4, fractions=False)
    guide = guidance(tiny_clip, lambda_guidance=weight)
    first, second = (guide(rgb, CAMERAS, StepInputs(progress=0.0, step=step)).loss for step in (0, 1))
    assert torch.equal(guide(rgb, CAMERAS, StepInputs(progress=0.0)).loss, first) and torch.equal(second, 2 * first)


@pytest.mark.parametrize(("shape", "latents"), [((1, 3, 24, 24), True), ((3, 24, 24), False), ((1, 4, 24, 24), False)])
def test_clip_bad_images_raise(tiny_clip: Path, shape: tuple[int, ...], latents: bool) -> None:
    """Latents of three channels, three dimensions and four channels are each refused."""
    with pytest.raises(ValueError, match="images must be"):
        guidance(tiny_clip)(torch.zeros(shape), CAMERAS, StepInputs(progress=0.0, latents=latents))
