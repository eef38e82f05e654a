"""Several guidances: the sum of losses and gradients, each logged; a single guidance is not wrapped."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.schema import Config
from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.clip import ClipGuidance
from dream_fast.engine.guidance.diffusion import DiffusionGuidance
from dream_fast.engine.guidance.registry import load_guidance
from dream_fast.engine.guidance.sum import GuidanceSum
from dream_fast.engine.runtime.device import choose_runtime
from dream_fast.engine.scene.camera import turntable

SMALL = """
    --device cpu --iters 4 --log_every 1 --seed 7 --w 16 --h 16 --W 16 --H 16 --six_views --n_levels 3
    --log2_hashmap_size 10 --max_resolution 32 --hidden_width 16 --hidden_layers 1 --bound 0.6 --max_steps 48
    --occupancy_resolution 16 --dataset_size_valid 2
""".split()


@pytest.fixture(scope="module")
def keys(tiny_model: Path, tiny_if_model: Path, tiny_clip: Path) -> dict[str, tuple[str, str]]:
    """The setting and the folder of each model."""
    folders = {"SD": ("hf_key", tiny_model), "IF": ("if_key", tiny_if_model), "clip": ("clip_key", tiny_clip)}
    return {name: (key, str(folder)) for name, (key, folder) in folders.items()}


def configured(keys: dict[str, tuple[str, str]], *named: str) -> Config:
    typed = {"text": "a mug", "seed": 1, "guidance": named, "guidance_scale": 20.0}
    if named == ("clip",):
        del typed["guidance_scale"]
    typed |= dict(keys[name] for name in named)
    return configure(typed, "cpu")


def gradient(guidance, latents: bool = False) -> tuple[torch.Tensor, object]:
    shape = (2, 4, 8, 8) if latents else (2, 3, 20, 20)
    shown = torch.rand(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs = StepInputs(1, 0.25, torch.Generator().manual_seed(2), latents)
    result = guidance(shown, turntable(CameraConfig(), 2, "cpu"), inputs)
    result.loss.backward()
    return shown.grad, result


@pytest.mark.parametrize(
    ("name", "kind"), [("SD", DiffusionGuidance), ("IF", DiffusionGuidance), ("clip", ClipGuidance)]
)
def test_load_one_guidance(keys, name: str, kind: type) -> None:
    """A single guidance is not wrapped."""
    config = configured(keys, name)
    guiding = load_guidance(config, choose_runtime(config))
    assert type(guiding.guidance) is kind and guiding.models == keys[name][1]
    assert str(guiding.attention) == ("sdpa" if name == "SD" else "None")


def test_sum_gradient_and_losses(keys) -> None:
    """The gradient is the sum, and every loss is named."""
    config = configured(keys, "SD", "IF", "clip")
    guiding = load_guidance(config, choose_runtime(config))
    whole = guiding.guidance
    assert type(whole) is GuidanceSum and list(whole.terms) == ["SD", "IF", "clip"]
    assert guiding.models == " + ".join(folder for _, folder in keys.values())
    total, result = gradient(whole)

    # One after the other they draw from one generator.
    cameras, generator, parts = turntable(CameraConfig(), 2, "cpu"), torch.Generator().manual_seed(2), {}
    expected, exact = torch.zeros_like(total), torch.zeros_like(total, dtype=torch.float64)
    for name, part in whole.terms.items():
        shown = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
        parts[name] = part(shown, cameras, StepInputs(1, 0.25, generator))
        parts[name].loss.backward()
        assert shown.grad.abs().max() > 0
        expected += shown.grad
        exact += shown.grad
    check("sum of gradients", total, expected, exact)  # which fp32 adds up in some order
    assert {name: loss.item() for name, loss in result.losses.items()} == {n: r.loss.item() for n, r in parts.items()}
    losses = torch.stack([part.loss.detach() for part in parts.values()])
    check("sum of losses", result.loss.detach(), losses.sum(), losses.double().sum())
    assert torch.equal(result.t, parts["SD"].t) and result.noisy.shape == (2, 4, 8, 8)


def test_sum_leaves_out_clip(keys) -> None:
    """Guidances that do not accept latents are left out of the latent phase."""
    config = configured(keys, "clip", "SD")
    whole = load_guidance(config, choose_runtime(config)).guidance
    total, result = gradient(whole, latents=True)
    assert list(result.losses) == ["SD"]
    alone, _ = gradient(whole.terms["SD"], latents=True)
    assert torch.equal(total, alone)
    _, result = gradient(whole)
    assert list(result.losses) == ["clip", "SD"] and result.t.shape == (2,)  # levels are those of the image model


def test_sum_components() -> None:
    """A sum decodes latents with its first diffusion model; CLIP has none."""
    text, clip = object.__new__(DiffusionGuidance), object.__new__(ClipGuidance)
    text.distillation = SimpleNamespace(components="the model")
    assert text.components == GuidanceSum({"clip": clip, "SD": text}).components == "the model"
    assert clip.components is None and GuidanceSum({"clip": clip}).components is None


def test_sum_command(tmp_path: Path, keys, capsys) -> None:
    """The command adds losses and logs each."""
    from dream_fast.cli import main

    named = [word for key, folder in keys.values() for word in (f"--{key}", folder)]
    words = ["--text", "a mug", *SMALL, "--guidance", "SD", "IF", "clip", *named, "--save_guidance"]
    assert main([*words, "--workspace", str(tmp_path / "trial"), "--save_guidance_interval", "4"]) == 0
    output = capsys.readouterr().out
    assert " + ".join(folder for _, folder in keys.values()) in output
    rows = [json.loads(row) for row in (tmp_path / "trial" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        losses = {name: value for name, value in row.items() if name.startswith("loss_")}
        assert {"loss_guidance_SD", "loss_guidance_IF", "loss_guidance_clip"} < losses.keys()
        terms = torch.tensor(list(losses.values()), dtype=torch.float64)  # fp32 on the way
        check("loss", torch.tensor(row["loss"]), terms.float().sum(), terms.sum())
    assert (tmp_path / "trial" / "guidance" / "step_000004.png").exists()
    assert "guidance_clip" in (tmp_path / "trial" / "report.html").read_text()


def test_sum_command_with_latent_phase(tmp_path: Path, keys) -> None:
    """CLIP joins after the latent phase."""
    from dream_fast.cli import main

    words = ["--text", "a mug", *SMALL, "--guidance", "SD", "clip", "--latent_iter_ratio", "0.5"]
    words += [word for name in ("SD", "clip") for word in (f"--{keys[name][0]}", keys[name][1])]
    assert main([*words, "--workspace", str(tmp_path / "trial")]) == 0
    rows = [json.loads(row) for row in (tmp_path / "trial" / "metrics.jsonl").read_text().splitlines()]
    assert [("loss_guidance_clip" in row, row["phase"]) for row in rows] == [(False, "latent")] * 2 + [
        (True, "shaded")
    ] * 2
