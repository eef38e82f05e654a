"""Divergence: non-finite steps, lost objects, and running out of GPU memory."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dream_fast.cli import main
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.runtime.device import choose_runtime
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.training import divergence, loop
from dream_fast.engine.training.divergence import (
    MAX_DEGENERATE_STEPS,
    MAX_NONFINITE_STEPS,
    DegenerateScene,
    degenerate_message,
    format_flags,
    nonfinite_message,
    rescue_overrides,
)
from dream_fast.engine.training.failures import low_memory_overrides, memory_message
from dream_fast.engine.training.loop import Loop
from dream_fast.engine.training.optim import LossScaler
from dream_fast.engine.training.trainer import StepResult, Trainer
from dream_fast.engine.workspace.folder import Workspace

SMALL = """
    --device cpu --iters 30 --log_every 1 --seed 7 --w 12 --h 12 --W 32 --H 32 --dataset_size_test 2 --six_views
    --dataset_size_valid 1 --n_levels 2 --log2_hashmap_size 8 --max_resolution 32 --hidden_width 16 --hidden_layers 1
    --bound 0.6 --max_steps 48 --occupancy_resolution 16 --bg_radius -1 --latent_iter_ratio 0
""".split()


def command(workspace: Path, model: Path, *more: str) -> list[str]:
    return ["--text", "a hamburger", "--hf_key", str(model), "--workspace", str(workspace), *SMALL, *more]


def rows(workspace: Path) -> list[dict]:
    return [json.loads(row) for row in (workspace / "metrics.jsonl").read_text().splitlines()]


def pairs(words: list[str]) -> zip:
    """(name, value) of a list of alternating names and values."""
    return zip(words[::2], words[1::2], strict=True)


def error_of(capsys) -> str:
    error = capsys.readouterr().err.strip()
    assert error.startswith("dream-fast: error: ") and "\n" not in error
    return error


# ------------------------------------------------------------------------------------------------------ not finite


def test_nonfinite_steps_counted(tmp_path, tiny_model, monkeypatch, capsys):
    """Non-finite steps are skipped, counted and shown."""
    gradients = Trainer.gradients

    def spoiled(self, *given):
        result = gradients(self, *given)
        if self.step in (2, 3):
            self.optimizer.grads[5] = float("inf")
        return result

    monkeypatch.setattr(Trainer, "gradients", spoiled)
    assert main(command(tmp_path, tiny_model, "--iters", "6")) == 0
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 0, 1, 2, 2, 2]
    assert "skipped 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "fp16", "cause", "advice"),
    [
        ({"loss_guidance": None, "grad_norm": None}, True, "the image model's prediction is not finite", "--no-fp16"),
        ({"loss_guidance": None, "grad_norm": None}, False, "the image model's prediction", "--guidance_scale 50"),
        (
            {"loss_guidance": 1.0, "loss_orient": None, "grad_norm": 1.0},
            True,
            "orient is not finite",
            "--lambda_orient 0",
        ),
        ({"loss_guidance": 1.0, "grad_norm": 1.0}, False, "their gradients are not", "--lr 0.0005"),
    ],
)
def test_nonfinite_message_cause(row, fp16, cause, advice):
    """The diagnosis has what is not finite, and a flag."""
    sentence = nonfinite_message(reference().override({"fp16": fp16}), MAX_NONFINITE_STEPS, row)
    assert f"last {MAX_NONFINITE_STEPS} steps were not finite" in sentence and cause in sentence and advice in sentence


def test_loss_scale_recovers():
    """The loss scale grows again."""
    scaler = LossScaler(True, "cpu", interval=3)
    for _ in range(10):
        scaler.update(torch.tensor(True))
    assert scaler.scale == 64
    for _ in range(30):
        scaler.update(torch.tensor(False))
    assert scaler.scale == 65536


# ---------------------------------------------------------------------------------------------------------- the object


VANISHING = ["--lambda_opacity", "1e7", "--lr", "0.05"]
FILLING = ["--blob_density", "60", "--blob_radius", "5"]


@pytest.mark.parametrize(("typed", "kind"), [(VANISHING, "has vanished"), (FILLING, "fills the whole box")])
def test_degenerate_warning_once(tmp_path, tiny_model, monkeypatch, capsys, typed, kind):
    """A lost object gives one warning, with settings to change."""
    monkeypatch.setattr(loop, "MAX_DEGENERATE_STEPS", 8)
    assert main(command(tmp_path, tiny_model, *typed)) == 0
    out = capsys.readouterr().out
    assert out.count(f"warning: the object {kind}") == 1 and "--rescue restarts with --lr 0.0" in out
    assert f"the object {kind}" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(("typed", "kind"), [(VANISHING, "has vanished"), (FILLING, "fills the whole box")])
def test_rescue_restarts(tmp_path, tiny_model, monkeypatch, capsys, typed, kind):
    """A rescue restarts with settings that keep the object."""
    monkeypatch.setattr(loop, "MAX_DEGENERATE_STEPS", 8)
    words = command(tmp_path, tiny_model, *typed, "--rescue")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"the object {kind}: restarting with" in out
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == list(range(1, 31)) and 0.01 < logged[-1]["opacity"] < 0.95
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["loss"]["lambda_opacity"] != 1e7 and stored["optim"]["lr"] < 0.05
    assert main([*words, "--iters", "31"]) == 0  # taken up with the settings of the rescue
    assert rows(tmp_path)[-1]["step"] == 31


def test_outweighed_warning_once(tmp_path, tiny_model, monkeypatch, capsys):
    """The warning has a weight that gives no warning itself."""
    monkeypatch.setattr(loop, "MAX_DEGENERATE_STEPS", 8)
    assert main(command(tmp_path, tiny_model, "--lambda_tv", "1e3", "--log_every", "2")) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "times as hard as the guidance" in line]
    assert (
        len(warnings) == 1 and "--lambda_tv 1000 pulls" in warnings[0] and "would pull as hard as that" in warnings[0]
    )
    gentle = command(
        tmp_path / "gentle", tiny_model, "--lambda_tv", "1", "--regularizers", "guided", "--log_every", "2"
    )
    assert main(gentle) == 0
    assert "times as hard" not in capsys.readouterr().out


def test_degenerate_cause_full():
    """Opacities of a lost run on an H200 give the warning, and those of good runs do not."""
    noise = [0.86, 0.94, 0.95, 0.92, 0.89, 1.0, 0.97, 0.93, 0.99, 0.83, 0.82, 0.81]
    assert min(noise) > divergence.MAX_OPACITY > 0.56
    config = configure(
        {"guidance": ("SD",), "lambda_3d_normal_smooth": 0.1, "lambda_tv": LinearSchedule.parse("0:0:2:9")}, "cuda"
    )
    sentence = degenerate_message(config, "full", 500)
    assert "--lambda_tv 2 --lambda_3d_normal_smooth 0.1 may be too strong; --rescue" in sentence
    for usual in (configure({}, "cuda"), configure({"preset": "reference"}, "cpu")):
        assert "too strong" not in degenerate_message(usual, "full", 500)


def test_degenerate_cause_guided():
    """Weights relative to the guidance have limits of their own: the plain default is three times too strong."""
    usual, strong = (
        configure({"regularizers": "guided", "lambda_opacity_entropy": weight}, "cpu") for weight in (3.0, 30.0)
    )
    assert "too strong" not in degenerate_message(usual, "vanished", 500)
    assert "--lambda_opacity_entropy 30 may be too strong; --rescue" in degenerate_message(strong, "vanished", 500)
    assert "too strong" not in degenerate_message(configure({"lambda_opacity_entropy": 30.0}, "cpu"), "vanished", 500)


@pytest.mark.parametrize("since", [0, 1, 37, 99, 100])
def test_degenerate_within_200_steps(since, tmp_path, monkeypatch):
    """The warning comes within 200 steps, however rarely rows are logged."""

    def pretended(self) -> StepResult:
        self.step += 1
        self.degenerate_in_a_row[0] = max(0, self.step - since)
        nothing = torch.zeros(())
        return StepResult("shaded", "albedo", {}, nothing, nothing, nothing, nothing, nothing)

    monkeypatch.setattr(Trainer, "train_step", pretended)
    monkeypatch.setattr("dream_fast.engine.training.loop.validate", lambda *_: None)
    words = [word.removeprefix("--") for word in SMALL if word != "--six_views"]
    typed = {name: float(value) if "." in value else int(value) for name, value in pairs(words) if name != "device"}
    config = reference().override(
        typed | {"text": "a hamburger", "device": "cpu", "iters": 1000, "log_every": 999, "rescue": True}
    )
    trainer = Trainer(config, choose_runtime(config), 0)
    with pytest.raises(DegenerateScene):
        Loop(trainer, Workspace(tmp_path), Reporter(Console(quiet=True))).fit()
    assert MAX_DEGENERATE_STEPS <= trainer.step - since <= 200


def test_rescue_overrides():
    """Settings of a rescue act against the cause."""
    schedule = LinearSchedule(0.0, 30.0, 10.0, 1.0)
    config = reference().override({"lambda_opacity": 5.0, "lambda_opacity_entropy": schedule, "lr": 0.01})
    vanished, full = (rescue_overrides(config, kind) for kind in divergence.DEGENERACIES)
    assert (
        vanished["lambda_opacity"] == 0
        and vanished["lambda_opacity_entropy"].first == 3
        and vanished["blob_density"] == 10
    )
    assert full["lambda_opacity"] == 50 and full["blob_density"] == 2.5 and vanished["lr"] == full["lr"] == 0.005
    assert config.override(vanished) != config != config.override(full)
    assert "--lambda_opacity_entropy 0.0:3:1:1.0" in format_flags(vanished)


# -------------------------------------------------------------------------------------------------------------- memory

OOM = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1 MiB is free."


def test_oom_in_step(tmp_path, tiny_model, monkeypatch, capsys):
    """Running out of GPU memory gives one sentence and a checkpoint that resumes with less."""
    gradients = Trainer.gradients

    def full(self, *given):
        if self.step == 3 and self.config.camera.batch_size > 1:
            raise torch.cuda.OutOfMemoryError(OOM)
        return gradients(self, *given)

    monkeypatch.setattr(Trainer, "gradients", full)
    words = command(tmp_path, tiny_model, "--iters", "5", "--batch_size", "4")
    assert main(words) == 2
    error = error_of(capsys)
    assert (
        "(2.50 GiB more were requested): give --vram_O --batch_size 2 (this step: --batch_size 4 --w 12 --h 12)"
        in error
    )
    assert "the checkpoint of step 3 is saved" in error
    assert main([*words, "--vram_O", "--batch_size", "1"]) == 0
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_oom_outside_steps(tmp_path, tiny_model, monkeypatch, capsys):
    """Running out of memory while loading or writing outputs gives one sentence."""

    def full(*_, **__):
        raise torch.OutOfMemoryError(OOM)

    monkeypatch.setattr("dream_fast.engine.guidance.registry.load_image_model", full)
    assert main(command(tmp_path / "new", tiny_model)) == 2
    error = error_of(capsys)
    assert "--vram_O" in error and "no checkpoint was saved yet" in error


def test_low_memory_overrides_end():
    """There is no advice when no setting reduces memory."""
    config, overrides = reference().override({"batch_size": 2, "cuda_graph": True}), []
    while less := low_memory_overrides(config):
        overrides.append(format_flags(less))
        config = config.override(less)
    assert overrides == ["--vram_O --batch_size 1 --no-cuda_graph", "--w 32 --h 32"]
    assert "a smaller image model" in memory_message(config, RuntimeError("?"), "that is all")


def test_overflow_grows_buffers(tmp_path, tiny_model):
    """On a GPU a step whose samples do not fit is skipped, and the next row doubles the buffers."""
    from dream_fast.engine.config.sections import RenderConfig
    from dream_fast.engine.render.ray_samplers import OccupancySampler

    sampler = OccupancySampler(SimpleNamespace(device=torch.device("cpu")), RenderConfig(occupancy_resolution=16))
    sampler.samples_per_ray, before = 10, 10
    sampler.overflowed.fill_(True)
    sampler.adapt_capacity(4)
    assert sampler.samples_per_ray == 2 * before and not sampler.overflowed
