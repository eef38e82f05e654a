"""Guidance by CLIP: the loss against transformers' own features, the sides of the prompt, and a run of the command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dream_fast.engine.camera import turntable
from dream_fast.engine.config import CameraConfig, GuidanceConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.clip import ClipGuidance, clip_guidance, clip_views, load_clip
from dream_fast.engine.schedule import LinearSchedule

SIZE = 24
NO_TEXTS: dict[str, str] = {}


def guidance(folder: Path, text: str = "a hamburger", own: dict[str, str] = NO_TEXTS, **settings) -> ClipGuidance:
    config = GuidanceConfig(guidance=("clip",), **settings)
    return clip_guidance(str(folder), "cpu", text, own, config, 30.0)


def pictures(batch: int, side: int = SIZE) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).requires_grad_()


def texts(folder: Path, *words: str) -> torch.Tensor:
    """Unit vectors of texts, by the model's own path."""
    from transformers import CLIPModel, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder)(list(words), padding=True, return_tensors="pt")
    with torch.no_grad():
        found = CLIPModel.from_pretrained(folder).get_text_features(**tokens)
    return F.normalize(getattr(found, "pooler_output", found), dim=-1)


def test_the_loss_is_ten_times_the_cosine_and_its_gradient_reaches_the_picture(tiny_clip: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel

    rgb, cameras = pictures(4), turntable(CameraConfig(), 4, "cpu")  # azimuths 0, 90, 180, 270
    result = guidance(tiny_clip)(rgb, cameras, progress=0.0)
    (3 * result.loss).backward()

    prepare = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_rescale=False)
    seen = torch.stack([torch.as_tensor(prepare(x.numpy()).pixel_values[0]) for x in rgb.detach()])
    spread = torch.tensor(prepare.image_std).view(3, 1, 1)
    seen.requires_grad_()
    found = CLIPModel.from_pretrained(tiny_clip).get_image_features(pixel_values=seen)
    wanted = texts(tiny_clip, *(f"a hamburger, {side} view" for side in ("front", "side", "back", "side")))
    cosines = (F.normalize(getattr(found, "pooler_output", found), dim=-1) * wanted).sum(dim=-1)
    torch.testing.assert_close(result.loss, -10 * cosines.mean(), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(-10 * cosines.mean(), seen)
    torch.testing.assert_close(rgb.grad, 3 * gradient / spread, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(result.grad_norm, (gradient / spread).norm(), rtol=1e-3, atol=0)
    assert result.t.shape == (0,) and result.noisy is None


def test_following_the_gradient_makes_a_picture_more_like_the_prompt(tiny_clip: Path) -> None:
    guide, cameras = guidance(tiny_clip), turntable(CameraConfig(), 1, "cpu")
    rgb, losses = pictures(1, 32).detach(), []
    for _ in range(10):
        rgb = rgb.requires_grad_()
        result = guide(rgb, cameras, progress=0.0)
        losses.append(result.loss.item())
        result.loss.backward()
        rgb = (rgb.detach() - 0.02 * rgb.grad.sign()).clamp(0, 1)
    assert losses[-1] < losses[0] - 0.5


def test_the_prompt_follows_the_view_and_a_side_may_have_its_own(tiny_clip: Path) -> None:
    model, tokenizer = load_clip(str(tiny_clip), "cpu")
    views = clip_views(model, tokenizer, "a mug", {"back": "its rear"})
    said = ["a mug, front view", "a mug, side view", "its rear", "a mug, overhead view"]
    torch.testing.assert_close(views, texts(tiny_clip, *said), rtol=1e-4, atol=1e-5)
    guide = guidance(tiny_clip, "a mug")
    assert guide.model.text_model is None  # its memory is not needed any more
    # Half-way between front and side the text is their mean, as a unit vector again.
    cameras = turntable(CameraConfig(default_azimuth=45.0), 1, "cpu")
    mean = F.normalize(texts(tiny_clip, *said[:2]).mean(dim=0), dim=0)
    with torch.no_grad():
        likeness = guide.features(pictures(1)) @ mean
    torch.testing.assert_close(guide(pictures(1), cameras, progress=0.0).loss, -10 * likeness[0], rtol=1e-4, atol=1e-5)


def test_lambda_guidance_is_its_weight_and_may_be_a_schedule(tiny_clip: Path) -> None:
    cameras = turntable(CameraConfig(), 1, "cpu")
    plain = guidance(tiny_clip)(pictures(1), cameras, progress=0.0).loss
    for weight, step, progress, factor in (
        (0.5, 0, 0.0, 0.5),
        (LinearSchedule(0.0, 1.0, 3.0, 1.0), 0, 0.5, 2.0),
        (LinearSchedule(0, 1.0, 3.0, 4, fractions=False), 4, 0.0, 3.0),
    ):
        guide = guidance(tiny_clip, lambda_guidance=weight)
        torch.testing.assert_close(guide(pictures(1), cameras, progress=progress, step=step).loss, factor * plain)


def test_a_long_prompt_keeps_its_side_and_says_what_is_left_out(tiny_clip: Path, caplog) -> None:
    model, tokenizer = load_clip(str(tiny_clip), "cpu")
    views = clip_views(model, tokenizer, "a very tasty hamburger " * 10)
    assert "longer than the 77 tokens" in caplog.text
    assert not torch.allclose(views[0], views[2])


def test_a_step_reads_no_value(tiny_clip: Path, nothing_read) -> None:
    guide, cameras = guidance(tiny_clip), turntable(CameraConfig(), 2, "cpu")
    rgb = pictures(2, 40)
    with nothing_read:
        guide(rgb, cameras, progress=0.5).loss.backward()
    assert rgb.grad.abs().max() > 0


def test_latents_and_other_shapes_are_refused(tiny_clip: Path) -> None:
    guide, cameras = guidance(tiny_clip), turntable(CameraConfig(), 1, "cpu")
    for shown, latents in (
        (torch.zeros(1, 4, 8, 8), True),
        (torch.zeros(1, 4, 8, 8), False),
        (torch.zeros(3, 8, 8), False),
    ):
        with pytest.raises(ValueError, match="pictures must be"):
            guide(shown, cameras, progress=0.0, latents=latents)


def test_a_model_that_does_not_load_is_one_sentence(tiny_clip: Path, tiny_model: Path, tmp_path: Path) -> None:
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


def test_the_command_optimises_by_clip_alone(tmp_path: Path, tiny_clip: Path, capsys) -> None:
    from dream_fast.cli import main

    words = """--device cpu --log_every 1 --seed 7 --w 16 --h 16 --W 16 --H 16 --six_views --levels 3
        --log2_entries 10 --max_resolution 32 --hidden_width 16 --hidden_layers 1 --bound 0.6 --max_steps 48
        --occupancy_resolution 16 --dataset_size_valid 2 --guidance clip --clip_key""".split()
    workspace = tmp_path / "trial"
    start = ["--text", "a shiny thing", "--workspace", str(workspace), *words, str(tiny_clip), "--iters"]
    assert main([*start, "3"]) == 0
    assert "likeness in CLIP" in capsys.readouterr().out
    assert main([*start, "4"]) == 0  # and is taken up
    rows = [json.loads(row) for row in (workspace / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["t"] == [] for row in rows)
    assert all(row["grad_norm"] > 0 and abs(row["loss_guidance"]) < 10 for row in rows)
    assert rows[0]["phase"] == "shaded" and (workspace / "report.html").exists()
