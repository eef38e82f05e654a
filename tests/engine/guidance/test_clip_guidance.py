"""Guidance by CLIP: the loss against transformers' own features, view prompts, and a run of the command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.sections import CameraConfig, GuidanceConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.clip import ClipGuidance, clip_guidance, clip_views, load_clip
from dream_fast.engine.guidance.prompts import ViewAngles
from dream_fast.engine.scene.camera import Cameras, turntable

SIZE = 24
NO_TEXTS: dict[str, str] = {}


def guidance(
    folder: Path, text: str = "a hamburger", view_prompts: dict[str, str] = NO_TEXTS, **settings
) -> ClipGuidance:
    config = GuidanceConfig(guidance=("clip",), **settings)
    return clip_guidance(str(folder), "cpu", text, view_prompts, config, ViewAngles(30.0))


def random_images(batch: int, side: int = SIZE) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).requires_grad_()


def texts(folder: Path, *words: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Unit vectors of texts, by the model's own path."""
    from transformers import CLIPModel, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder)(list(words), padding=True, return_tensors="pt")
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).to(dtype).get_text_features(**tokens)
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


def by_hand(folder: Path, rgb: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [B] of images, one for each view of a turntable, and the gradient of their mean, by transformers'
    model."""
    from transformers import CLIPImageProcessorPil, CLIPModel

    prepare = CLIPImageProcessorPil()
    mean, spread = (torch.tensor(x, dtype=dtype).view(3, 1, 1) for x in (prepare.image_mean, prepare.image_std))
    rgb = rgb.detach().to(dtype).requires_grad_()
    features = CLIPModel.from_pretrained(folder).to(dtype).get_image_features(pixel_values=(rgb - mean) / spread)
    front, side, back = texts(folder, *(f"a hamburger, {side} view" for side in ("front", "side", "back")), dtype=dtype)
    targets = []
    for azimuth in torch.arange(len(rgb)) * (360 / len(rgb)):
        turned = float(min(azimuth, 360 - azimuth)) / 90
        near, far, r = (front, side, 1 - turned) if turned < 1 else (side, back, 2 - turned)
        targets.append(F.normalize(r * near + (1 - r) * far, dim=0))
    features = F.normalize(getattr(features, "pooler_output", features), dim=-1)
    losses = -10 * (features * torch.stack(targets)).sum(dim=-1)
    return losses.detach(), *torch.autograd.grad(losses.mean(), rgb)


def test_clip_loss_and_gradient(tiny_clip: Path) -> None:
    """They equal those of transformers' features, with blended texts between views."""
    rgb, cameras = random_images(12), turntable(CameraConfig(), 12, "cpu")
    guide = guidance(tiny_clip)
    result = guide(rgb, cameras, StepInputs(progress=0.0))
    (4 * result.loss).backward()
    (reference, gradient), (exact, exact_gradient) = (
        by_hand(tiny_clip, rgb, dtype) for dtype in (torch.float32, torch.float64)
    )
    views = (Cameras(*(part[i : i + 1] for part in cameras)) for i in range(12))
    alone = [guide(rgb[i : i + 1], view, StepInputs(progress=0.0)).loss.detach() for i, view in enumerate(views)]
    check(
        "losses",
        torch.stack([*alone, result.loss.detach()]),
        *(F.pad(x, (0, 1), value=x.mean()) for x in (reference, exact)),
    )
    check("gradient", rgb.grad / 4, gradient, exact_gradient)
    check("norm", result.grad_norm, rgb.grad.norm() / 4, rgb.grad.double().norm() / 4)
    assert result.t.shape == (0,) and result.noisy is None


def test_clip_gradient_direction(tiny_clip: Path) -> None:
    """Following the gradient makes an image more like the prompt."""
    guide, cameras = guidance(tiny_clip), turntable(CameraConfig(), 1, "cpu")
    rgb, losses = random_images(1, 32).detach(), []
    for _ in range(10):
        rgb = rgb.requires_grad_()
        result = guide(rgb, cameras, StepInputs(progress=0.0))
        losses.append(result.loss.item())
        result.loss.backward()
        rgb = (rgb.detach() - 0.02 * rgb.grad.sign()).clamp(0, 1)
    assert losses[-1] < losses[0] - 0.5


def test_clip_view_prompts(tiny_clip: Path) -> None:
    """The prompt follows the view, and a side may have its own."""
    model, tokenizer = load_clip(str(tiny_clip), "cpu")
    views = clip_views(model, tokenizer, "a mug", {"back": "its rear"})
    prompts = ["a mug, front view", "a mug, side view", "its rear", "a mug, overhead view"]
    check("views", views, texts(tiny_clip, *prompts), texts(tiny_clip, *prompts, dtype=torch.float64))
    assert guidance(tiny_clip, "a mug").model.text_model is None  # its memory is not needed any more


def test_clip_lambda_guidance(tiny_clip: Path) -> None:
    """lambda_guidance is the weight and may be a schedule."""
    cameras = turntable(CameraConfig(), 1, "cpu")
    plain = guidance(tiny_clip)(random_images(1), cameras, StepInputs(progress=0.0)).loss
    for weight, step, progress, factor in (
        (0.5, 0, 0.0, 0.5),
        (LinearSchedule(0.0, 1.0, 3.0, 1.0), 0, 0.5, 2.0),
        (LinearSchedule(0, 1.0, 4.0, 4, fractions=False), 4, 0.0, 4.0),
    ):
        guide = guidance(tiny_clip, lambda_guidance=weight)
        # Exactly, because the factors are powers of two.
        assert torch.equal(
            guide(random_images(1), cameras, StepInputs(progress=progress, step=step)).loss, factor * plain
        )


def test_clip_long_prompt(tiny_clip: Path, caplog) -> None:
    """A long prompt keeps the name of its view, and a warning has the words left out."""
    model, tokenizer = load_clip(str(tiny_clip), "cpu")
    views = clip_views(model, tokenizer, "a very tasty hamburger " * 10)
    assert "longer than the 77 tokens" in caplog.text
    prompt = "a very tasty hamburger " * 10
    named = caplog.text.split("left out: ")[1].strip()  # the words at the end
    cut = " ".join(prompt.split()).removesuffix(named).strip()
    assert torch.equal(views, clip_views(model, tokenizer, cut)) and not torch.equal(views[0], views[2])


def test_a_step_reads_no_value(tiny_clip: Path, nothing_read) -> None:
    guide, cameras = guidance(tiny_clip), turntable(CameraConfig(), 2, "cpu")
    rgb = random_images(2, 40)
    with nothing_read:
        guide(rgb, cameras, StepInputs(progress=0.5)).loss.backward()
    assert rgb.grad.abs().max() > 0


def test_clip_bad_shape_raises(tiny_clip: Path) -> None:
    """Latents and other shapes are refused."""
    guide, cameras = guidance(tiny_clip), turntable(CameraConfig(), 1, "cpu")
    for shown, latents in (
        (torch.zeros(1, 4, 8, 8), True),
        (torch.zeros(1, 4, 8, 8), False),
        (torch.zeros(3, 8, 8), False),
    ):
        with pytest.raises(ValueError, match="images must be"):
            guide(shown, cameras, StepInputs(progress=0.0, latents=latents))


def test_load_clip_raises(tiny_clip: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A model that does not load is refused with one sentence."""
    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match="the CLIP folder .*gone does not exist"):
        load_clip(str(tmp_path / "gone"), "cpu")
    for source in (tiny_model, "nobody/nothing"):
        with pytest.raises(UserError, match="the CLIP model .* does not load") as caught:
            load_clip(str(source), "cpu")
        assert "\n" not in str(caught.value)
    broken = shutil.copytree(tiny_clip, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of its weights, such as visual_projection.weight"):
        load_clip(str(broken), "cpu")
    torch.save(weights, broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="does not load"):  # nothing is unpickled
        load_clip(str(broken), "cpu")


def test_clip_command(tmp_path: Path, tiny_clip: Path, capsys) -> None:
    """The command optimises by CLIP alone."""
    from dream_fast.cli import main

    words = """--device cpu --log_every 1 --seed 7 --w 16 --h 16 --W 16 --H 16 --six_views --n_levels 3
        --log2_hashmap_size 10 --max_resolution 32 --hidden_width 16 --hidden_layers 1 --bound 0.6 --max_steps 48
        --occupancy_resolution 16 --dataset_size_valid 2 --guidance clip --clip_key""".split()
    workspace = tmp_path / "trial"
    start = ["--text", "a shiny thing", "--workspace", str(workspace), *words, str(tiny_clip), "--iters"]
    assert main([*start, "3"]) == 0
    assert "CLIP similarity" in capsys.readouterr().out
    assert main([*start, "4"]) == 0  # and is taken up
    rows = [json.loads(row) for row in (workspace / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["t"] == [] for row in rows)
    assert all(row["grad_norm"] > 0 and abs(row["loss_guidance"]) < 10 for row in rows)
    assert rows[0]["phase"] == "shaded" and (workspace / "report.html").exists()
