"""Callbacks: their images and numbers are right, and they do not change the run."""

import gzip
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor

from dream_fast.bench.accuracy import check
from dream_fast.cli import main
from dream_fast.engine import run
from dream_fast.engine.config import validate
from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.images import to_uint8
from dream_fast.engine.guidance import registry
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.diffusion import diffusion_guidance
from dream_fast.engine.guidance.model.components import Components, load_components
from dream_fast.engine.guidance.prompts import PromptEmbeddings
from dream_fast.engine.guidance.sds import Draws, Prompts, ScoreDistillation, distillation_gradient
from dream_fast.engine.guidance.snapshots import guidance_images
from dream_fast.engine.runtime.device import choose_runtime
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.training import callbacks, profiler
from dream_fast.engine.training.loop import Loop, LoopOptions
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.folder import Workspace

SMALL = """
    --device cpu --iters 8 --log_every 2 --seed 7 --w 12 --h 10 --W 16 --H 16 --batch_size 2 --dataset_size_test 3
    --dataset_size_valid 2 --n_levels 3 --log2_hashmap_size 10 --max_resolution 32 --hidden_width 16 --hidden_layers 1
    --bound 0.6 --max_steps 48 --occupancy_resolution 16 --latent_iter_ratio 0.25 --albedo_iter_ratio 0.5
""".split()
IMAGE = 32  # pixels of the tiny model's images
LEVELS = [0, 1, 20, 250, 500, 750, 980, 999]


def command(workspace: Path, model: Path, *more: str) -> list[str]:
    return ["--text", "a hamburger", "--hf_key", str(model), "--workspace", str(workspace), *SMALL, *more]


def checkpoint(workspace: Path) -> bytes:
    (path,) = (workspace / "checkpoints").iterdir()
    return path.read_bytes()


def rows(workspace: Path) -> list[dict]:
    return [json.loads(row) for row in (workspace / "metrics.jsonl").read_text().splitlines()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def components(request: pytest.FixtureRequest, tiny_model: Path, tiny_velocity_model: Path) -> Components:
    folder = tiny_model if request.param == "epsilon" else tiny_velocity_model
    return load_components(folder, "cpu", need_vae_decoder=True)


@pytest.fixture(scope="module")
def unwatched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a run without callbacks."""
    workspace = tmp_path_factory.mktemp("runs") / "unwatched"
    assert main(command(workspace, tiny_model)) == 0
    return workspace


# The one-step estimate


def alphas() -> Tensor:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def test_estimate_of_perfect_model(components, monkeypatch):
    """The estimate of a model that knows the noise is the clean latents, at every timestep."""
    z, noise = torch.randn(2, len(LEVELS), 4, 8, 8, generator=generator())
    t = torch.tensor(LEVELS)
    a = alphas()[t].view(-1, 1, 1, 1)
    truth = noise if components.prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
    monkeypatch.setattr(components.unet, "forward", lambda rows, levels, **_: (truth.repeat(2, 1, 1, 1),))
    prompts = torch.zeros(len(LEVELS), 5, 32)
    given = Draws(t, noise), Prompts(prompts, prompts), {"guidance_scale": torch.tensor(100.0)}
    gradient, noisy, clean = distillation_gradient(components, GuidanceConfig(), z, *given)

    def noised(a: Tensor) -> Tensor:
        return a.sqrt() * z.to(a.dtype) + (1 - a).sqrt() * noise.to(a.dtype)

    check("noisy", noisy, noised(a), noised(a.double()))
    # What noise of x_t is not the true noise counts less and less of the latent, the less of it is left in x_t.
    check("clean", clean, (noised(a) - (1 - a).sqrt() * noise) / a.sqrt(), z.double(), weight=a.double().sqrt())
    plain = (1 - a) * ((noised(a) - a.sqrt() * z) / (1 - a).sqrt() - noise)
    if components.prediction_type == "epsilon":
        assert not gradient.any()
    else:
        check("gradient", gradient, plain, torch.zeros_like(z, dtype=torch.float64))


@pytest.mark.parametrize("score", ["sds", "csd", "asd", "sdi"])
@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_estimate_is_guided(components, in_fp64, score, rescale):
    """It is (x_t - sqrt(1 - a_t) eps_hat) / sqrt(a_t), with one call of the UNet for each prompt and view."""
    config = GuidanceConfig(objective=score, guidance_scale=7.5, inversion_steps=2, guidance_rescale=rescale)
    rgb = torch.rand(2, 3, IMAGE, IMAGE, generator=generator(1))
    cond, uncond = torch.randn(2, 2, 5, 32, generator=generator(2))
    result = ScoreDistillation(components, config)(rgb, cond, uncond, StepInputs(generator=generator(3)))

    def by_hand(model: Components) -> Tensor:
        rows = []
        for i, t in enumerate(result.t.tolist()):
            a, noisy = alphas()[t].to(model.dtype), result.noisy[i : i + 1].to(model.dtype)

            def estimate(scale: float, i: int = i, t: int = t, a: Tensor = a, noisy: Tensor = noisy) -> Tensor:
                def eps(prompt: Tensor) -> Tensor:
                    with torch.no_grad():
                        out = model.unet(noisy, t, encoder_hidden_states=prompt[i : i + 1].to(model.dtype)).sample
                    velocity = model.prediction_type == "v_prediction"
                    return a.sqrt() * out + (1 - a).sqrt() * noisy if velocity else out

                guided = eps(uncond) + scale * (eps(cond) - eps(uncond))
                return (noisy - (1 - a).sqrt() * guided) / a.sqrt()

            expected = estimate(7.5)
            rows.append(expected * (1 + rescale * (estimate(1.0).std() / expected.std() - 1)))
        return torch.cat(rows)

    check("clean", result.clean, by_hand(components), by_hand(in_fp64(components)))


def test_guidance_images(components, in_fp64):
    """A view has three images."""
    noisy, clean, latents = torch.randn(3, 2, 4, 8, 8, generator=generator())
    shown = torch.rand(2, 3, 10, 12, generator=generator(1))
    images = guidance_images(components, shown, noisy, clean)
    assert images.shape == (2, 3, 3, IMAGE, IMAGE)

    def expected(model: Components) -> Tensor:
        def decoded(z: Tensor) -> Tensor:
            with torch.no_grad():
                return (model.vae.decode(z.to(model.dtype) / 0.18215).sample / 2 + 0.5).clamp(0, 1)

        render = F.interpolate(shown.to(model.dtype), (IMAGE, IMAGE), mode="bilinear", align_corners=False)
        return torch.stack([render, decoded(noisy), decoded(clean), decoded(latents)], dim=1)

    reference, exact = (expected(model) for model in (components, in_fp64(components)))
    as_latents = guidance_images(components, latents, noisy, clean, latents=True)
    for column in range(3):
        check("images", images[:, column], reference[:, column], exact[:, column])
    check("latents", as_latents[:, 0], reference[:, 3], exact[:, 3])
    assert torch.equal(as_latents[:, 1:], images[:, 1:])


# --save_guidance


def test_save_guidance_changes_nothing(unwatched, tiny_model, tmp_path):
    """Saving guidance images changes no bit of the run."""
    assert main(command(tmp_path, tiny_model, "--save_guidance", "--save_guidance_interval", "2")) == 0
    assert checkpoint(tmp_path) == checkpoint(unwatched)
    paths = sorted((tmp_path / "guidance").iterdir())
    assert [path.name for path in paths] == [f"step_{step:06d}.png" for step in (2, 4, 6, 8)]
    assert [row["phase"] for row in rows(tmp_path)] == ["latent", "albedo", "shaded", "shaded"]
    for path, row in zip(paths, rows(tmp_path), strict=True):
        image = Image.open(path)
        assert image.size == (3 * IMAGE, 2 * IMAGE) and image.info["t"] == " ".join(map(str, row["t"]))
        tiles = np.asarray(image).reshape(2, IMAGE, 3, IMAGE, 3).swapaxes(1, 2).reshape(6, -1)
        assert len({tile.tobytes() for tile in tiles}) == 6 and tiles.std(axis=1).min() > 1


def test_decoder_loaded_for_images(tiny_model, tmp_path, monkeypatch):
    """The decoder is loaded only for the images."""
    calls = []
    load = registry.load_image_model
    monkeypatch.setattr(registry, "load_image_model", lambda *a, **named: calls.append(named) or load(*a, **named))
    assert main(command(tmp_path / "a", tiny_model, "--iters", "1", "--six_views")) == 0
    assert not (tmp_path / "a" / "guidance").exists()
    assert main(command(tmp_path / "b", tiny_model, "--iters", "1", "--six_views", "--save_guidance")) == 0
    assert [named["need_vae_decoder"] for named in calls] == [False, True]


class Overwriting:
    """A substitute for the CUDA graphs of a step, which overwrites a result at the next replay."""

    def __init__(self):
        self.given: list[Tensor] = []
        self.copies: list[tuple[bool, list[Tensor]]] = []

    def __call__(self, key, function, inputs):
        for tensor in self.given:
            tensor.fill_(torch.nan)
        result = function(inputs)
        self.given = list(result.snapshot)
        self.copies.append((key[0] == "latent", [tensor.clone() for tensor in result.snapshot]))
        return result

    def clear(self):
        pass


def make_trainer(components: Components, **changes) -> Trainer:
    names = [word.removeprefix("--") for word in SMALL[::2]]
    values = [value if value == "cpu" else float(value) if "." in value else int(value) for value in SMALL[1::2]]
    config = reference().override(dict(zip(names, values, strict=True)) | {"text": "a hamburger"} | changes)
    prompts = PromptEmbeddings(components, "a hamburger", keep_text_encoder=True)
    guidance = diffusion_guidance(components, prompts, config)
    return Trainer(config, choose_runtime(config), 7, guidance)


def test_save_guidance_of_replayed_steps(components, tmp_path):
    """Latents of a graph are decoded before the next replay, outside of the graph."""
    trainer = make_trainer(components, save_guidance=True, save_guidance_interval=1)
    trainer.graphs = graphs = Overwriting()
    fit(trainer, tmp_path)
    paths = sorted((tmp_path / "guidance").iterdir())
    assert len(paths) == len(graphs.copies) == 8
    for path, (latents, snapshot) in zip(paths, graphs.copies, strict=True):
        images = to_uint8(guidance_images(components, *snapshot, latents=latents))  # [B, 3, 3, S, S]
        tiles = np.asarray(Image.open(path)).reshape(2, IMAGE, 3, IMAGE, 3).transpose(0, 2, 4, 1, 3)
        assert np.array_equal(tiles, images) and tiles.std() > 1


def fit(trainer: Trainer, path: Path) -> Workspace:
    workspace = Workspace(path)
    workspace.write_config(trainer.config)
    Loop(trainer, workspace, Reporter(Console(quiet=True))).fit()
    return workspace


def test_save_guidance_without_latents_raises(components, tmp_path):
    """A guidance without latents is refused."""
    trainer = make_trainer(components, save_guidance=True)
    trainer.guidance = lambda *_, **__: pytest.fail("a step was taken")
    with pytest.raises(UserError, match="--save_guidance shows the latents"):
        fit(trainer, tmp_path)


# --test_interval


def test_test_interval_videos(unwatched, tiny_model, tmp_path, monkeypatch):
    """Test videos are written during the run, and the last at its end."""
    monkeypatch.setattr(run, "run", partial(run.run, loop=LoopOptions(epoch_steps=2)))
    assert main(command(tmp_path / "a", tiny_model, "--test_interval", "2")) == 0
    videos = sorted(path.name for path in (tmp_path / "a" / "results").glob("*.mp4"))
    assert videos == ["turntable.mp4", "turntable_step_000004.mp4"]  # every 2 epochs of 2 steps; 8 is the end
    with av.open(str(tmp_path / "a" / "results" / videos[1])) as video:
        assert len(list(video.decode(video=0))) == 3
    assert checkpoint(tmp_path / "a") == checkpoint(unwatched)
    assert main(command(tmp_path / "b", tiny_model, "--test_interval", "1", "--six_views")) == 0
    assert not list((tmp_path / "b" / "results").glob("*.mp4"))


# --tensorboard


def test_tensorboard_rows(unwatched, tiny_model, tmp_path):
    """TensorBoard gets the rows of the metrics."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(command(tmp_path, tiny_model, "--tensorboard", "--iters", "4")) == 0
    assert main(command(tmp_path, tiny_model, "--tensorboard")) == 0  # taken further
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [2, 4, 6, 8]
    names = {"loss/sum": "loss", "loss/guidance": "loss_guidance", "loss/entropy": "loss_entropy"}
    names |= {name: name for name in ("lr", "samples", "opacity", "grad_norm", "it_per_s")}
    assert set(names) <= set(board.Tags()["scalars"])
    for tag, name in names.items():
        events = board.Scalars(tag)
        assert [event.step for event in events] == [2, 4, 6, 8]
        assert [event.value for event in events] == [torch.tensor(row[name]).item() for row in logged]  # fp32
    assert not (unwatched / "tensorboard").exists()


def board_of(trainer: Trainer, path: Path) -> callbacks.RunCallbacks:
    return callbacks.RunCallbacks(trainer.config, Workspace(path), Reporter(Console(quiet=True)), step=trainer.step)


def test_tensorboard_nonfinite(components, tmp_path):
    """A number that is not finite is NaN in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(components, tensorboard=True)
    with board_of(trainer, tmp_path) as board:
        board.on_log(dict.fromkeys(callbacks.NUMBERS, 1.0) | {"step": 1, "loss": None, "grad_norm": None})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert np.isnan(events.Scalars("grad_norm")[0].value) and events.Scalars("lr")[0].value == 1


def test_tensorboard_resumed(components, tmp_path):
    """A resumed run repeats the steps after its checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps, value in ((0, (2, 4, 6), 1.0), (4, (6, 8), 2.0)):
        trainer = make_trainer(components, tensorboard=True)
        trainer.step = start
        with board_of(trainer, tmp_path) as board:
            for step in steps:
                board.on_log(dict.fromkeys(callbacks.NUMBERS, value) | {"step": step, "loss": value})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("lr")] == [(2, 1), (4, 1), (6, 2), (8, 2)]


def test_tensorboard_not_installed(tiny_model, tmp_path, monkeypatch, capsys):
    """Without the package the run is refused before anything is written."""
    monkeypatch.setattr(validate, "find_spec", lambda name: None)
    assert main(command(tmp_path / "new", tiny_model, "--tensorboard")) == 2
    assert "pip install 'dream-fast[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(command(tmp_path / "new", tiny_model, "--iters", "1", "--six_views")) == 0


def test_learning_rate_of_row(tiny_model, tmp_path):
    """A row has the learning rate of its step."""
    assert main(command(tmp_path, tiny_model, "--lr", "0.01", "--lr_decay", "0.1", "--log_every", "4")) == 0
    rates = torch.tensor([row["lr"] for row in rows(tmp_path)], dtype=torch.float64)
    exact = 0.01 * 0.1 ** (torch.tensor([3.0, 7.0], dtype=torch.float64) / 8)
    check("rates", rates, exact, exact)


# --profile


def traced(workspace: Path) -> list[str]:
    with gzip.open(workspace / "profile" / "trace.json.gz", "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]


def test_profile_after_warm_up(tiny_model, tmp_path, monkeypatch, capsys):
    """A profile has some steps after the warm-up, and the run continues."""
    assert (profiler.WARM_UP, profiler.STEPS) == (20, 20)  # as the help says; fewer here, to be quick
    monkeypatch.setattr(profiler, "WARM_UP", 5)
    monkeypatch.setattr(profiler, "STEPS", 4)
    size = ["--iters", "12", "--six_views", "--batch_size", "1"]
    assert main(command(tmp_path / "a", tiny_model, *size)) == 0
    capsys.readouterr()
    assert main(command(tmp_path / "b", tiny_model, *size, "--profile")) == 0
    output = capsys.readouterr().out
    assert checkpoint(tmp_path / "a") == checkpoint(tmp_path / "b")
    names = traced(tmp_path / "b")
    steps = {int(match[1]) for name in names if (match := re.fullmatch(r"ProfilerStep#(\d+)", name))}
    assert steps == {5, 6, 7, 8}
    assert "aten::addmm" in names or "aten::linear" in names
    assert f"steps 6 to 9 of this start: {tmp_path / 'b' / 'profile' / 'trace.json.gz'}" in output
    assert "warning" not in output
    (head,) = re.findall(r"^([\d.]+) ms a step on the CPU", output, flags=re.MULTILINE)
    table = re.findall(r"^ +([\d.]+) +([\d.]+)% +([\d.]+)  (\S.*)$", output, flags=re.MULTILINE)
    costs = [float(milliseconds) for milliseconds, *_ in table]
    assert len(table) == profiler.ROWS and costs == sorted(costs, reverse=True) and costs[0] > 0
    for milliseconds, share, calls, name in table:
        # Each number is printed with a digit after the point, so off by up to a twentieth.
        low, high = (100 * (float(milliseconds) + s * 0.05) / (float(head) - s * 0.05) + s * 0.05 for s in (-1, 1))
        assert low <= float(share) <= high and float(calls) > 0
        assert not name.startswith("ProfilerStep")


def test_profile_of_short_run(tiny_model, tmp_path, capsys):
    """A short run is traced from its first step, with a warning."""
    assert main(command(tmp_path, tiny_model, "--profile", "--six_views", "--iters", "3")) == 0
    output = capsys.readouterr().out
    assert "trace of steps 1 to 3 of this start" in output and "warning: the trace began after 0 steps" in output
    assert sum(name.startswith("ProfilerStep") for name in traced(tmp_path)) == 3


@pytest.mark.parametrize("steps", [0, 1, 17, 18, 20, 21, 30])
def test_profile_of_stopped_run(steps, tmp_path):
    """The profile of a stopped run has the steps until then."""
    with profiler.Profile(tmp_path, torch.device("cpu"), 100, Reporter(Console(quiet=True))) as profile:
        for _ in range(steps):
            torch.ones(3).sum()
            profile.step()
    assert (tmp_path / "trace.json.gz").exists() == (steps > profiler.WARM_UP)


def test_imports_without_flags(tiny_model, tmp_path):
    """A run without the flags imports nothing of it."""
    code = "import sys; from dream_fast.cli import main; assert main(sys.argv[1:]) == 0"
    code += "; print([name for name in ('tensorboard', 'debugpy') if name in sys.modules], file=sys.stderr)"
    words = command(tmp_path, tiny_model, "--iters", "1", "--six_views")
    process = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd="/")
    assert process.stderr.splitlines()[-1] == "[]"
