"""The trainer and its loop: phases, schedules, metrics, resuming, interruption."""

import filecmp
import json
import os
import random
import signal
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from dream_fast import kernels
from dream_fast.bench.accuracy import check
from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.schema import Config
from dream_fast.engine.config.sections import ShadingConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.diffusion import diffusion_guidance
from dream_fast.engine.guidance.model.components import load_components
from dream_fast.engine.guidance.prompts import PromptEmbeddings
from dream_fast.engine.runtime.cuda_graph import static_copy
from dream_fast.engine.runtime.device import choose_runtime
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.runtime.signals import Stopped
from dream_fast.engine.scene.camera import Cameras, sample_cameras
from dream_fast.engine.training.divergence import MAX_NONFINITE_STEPS
from dream_fast.engine.training.loop import Loop
from dream_fast.engine.training.losses import weight_setting
from dream_fast.engine.training.optim import LossScaler
from dream_fast.engine.training.phases import RunProgress, active_levels, choose_phase
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.checkpoint import load_checkpoint, save_checkpoint
from dream_fast.engine.workspace.folder import Workspace

ULP = torch.finfo(torch.float32).eps  # relative distance of neighbours in fp32

SMALL = {
    "text": "a hamburger",
    "device": "cpu",
    "iters": 8,
    "log_every": 1,
    "batch_size": 2,
    "w": 12,
    "h": 10,
    "W": 16,
    "H": 16,
    "dataset_size_valid": 2,
    "n_levels": 3,
    "log2_hashmap_size": 10,
    "max_resolution": 32,
    "hidden_width": 16,
    "hidden_layers": 1,
    "bound": 0.6,
    "max_steps": 48,
    "occupancy_resolution": 16,
    "update_extra_interval": 3,
    "latent_iter_ratio": 0.25,
    "albedo_iter_ratio": 0.5,
}
# Settings of the other backbones, also of that size.
BACKBONES = {
    "grid": {},
    "grid_torch": {"backbone": "grid_torch"},
    "vanilla": {"backbone": "vanilla", "n_frequencies": 4, "num_steps": 10, "upsample_steps": 6},
}
# Schedules of every kind of number that a step reads from the device.
ANNEALED = {
    "guidance_scale": LinearSchedule(0.0, 100.0, 5.0, 1.0),
    "guidance_rescale": LinearSchedule(0.0, 0.0, 0.9, 0.5),
    "lambda_guidance": LinearSchedule(1, 1.0, 3.0, 6, fractions=False),
    "clip_grad_latent": LinearSchedule(0.25, 0.5, 2.0, 1.0),
    "t_range": (LinearSchedule(0.0, 0.02, 0.3, 1.0), LinearSchedule(0.0, 0.98, 0.5, 1.0)),
    "lambda_orient": LinearSchedule(0, 0.0, 1.0, 8, fractions=False),
    "lambda_opacity": LinearSchedule(0.0, 1.0, 0.0, 1.0),
    "grad_clip_rgb": LinearSchedule(0.0, 1e-3, 1e-1, 1.0),
    "grad_clip": LinearSchedule(0.0, 1e-3, 1e-1, 1.0),
    "min_ambient_ratio": LinearSchedule(0.5, 0.1, 0.9, 1.0),
    "textureless_ratio": LinearSchedule(0.5, 1.0, 0.0, 1.0),
}
# Steps of colour alone, without regularisers.
CHEAP = {"albedo_iter_ratio": 1.0, "latent_iter_ratio": 0.0, "lambda_opacity_entropy": 0.0, "bg_radius": -1.0}


def small_config(**changes) -> Config:
    return reference().override(SMALL | changes)


@pytest.fixture(scope="module")
def text_guidance(tiny_model):
    components = load_components(tiny_model, "cpu")
    prompts = PromptEmbeddings(components, "a hamburger")
    return lambda config: diffusion_guidance(components, prompts, config)


def make_trainer(text_guidance, seed=0, **changes) -> Trainer:
    config = small_config(**changes)
    return Trainer(config, choose_runtime(config), seed, text_guidance(config))


def fit(trainer: Trainer, path) -> Workspace:
    workspace = Workspace(path)
    workspace.write_config(trainer.config)
    workspace.truncate_after(trainer.step)
    Loop(trainer, workspace, Reporter(Console(quiet=True))).fit()
    return workspace


def rows_without_times(workspace: Workspace) -> bytes:
    rows = [json.loads(line) for line in workspace.metrics.read_text().splitlines()]
    for row in rows:
        del row["it_per_s"], row["seconds"]
    return "\n".join(json.dumps(row) for row in rows).encode()


def check_values(name: str, got, exact) -> None:
    """Compare numbers of the host with the expected ones."""
    got, exact = (torch.as_tensor(values, dtype=torch.float64) for values in (got, exact))
    check(name, got, exact, exact)


def same_state(a: Trainer, b: Trainer) -> bool:
    pairs = [
        (one[name], other[name])
        for one, other in (
            (a.optimizer.state_dict(), b.optimizer.state_dict()),
            (a.renderer.sampler.state_dict(), b.renderer.sampler.state_dict()),
        )
        for name in one
    ]
    return a.step == b.step and all(torch.equal(one, other) for one, other in pairs)


# ------------------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("normals", ["finite_difference", "analytic"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_phases_logged(text_guidance, tmp_path, backbone, normals):
    """Every phase is logged with its terms and changes the weights."""
    terms = dict.fromkeys(("opacity", "2d_normal_smooth", "3d_normal_smooth", "entropy_weights"), 0.1)
    changes = {weight_setting(name): weight for name, weight in terms.items()} | BACKBONES[backbone]
    trainer = make_trainer(text_guidance, bg_radius=1.0, normals=normals, **changes)
    before = trainer.optimizer.params.clone()
    workspace = fit(trainer, tmp_path)
    rows = [json.loads(line) for line in workspace.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["phase"] for row in rows] == ["latent"] * 2 + ["albedo"] * 2 + ["shaded"] * 4
    for row in rows:
        assert row["skipped"] == 0 and row["grad_norm"] > 0 and row["samples"] > 0 and len(row["t"]) == 2
        assert {f"loss_{name}" for name in ("guidance", "entropy", "orient", *terms)} <= row.keys()
        losses = torch.tensor([v for k, v in row.items() if k.startswith("loss_")], dtype=torch.float64)
        check("loss", torch.tensor(row["loss"]), losses.float().sum(), losses.sum())
    assert not torch.equal(trainer.optimizer.params, before)
    assert not torch.equal(trainer.optimizer.state.ema, trainer.optimizer.params)
    assert (workspace.validation / "step_000008.png").is_file()


def test_progressive_frequencies(text_guidance, monkeypatch):
    """Frequencies are added during the run."""
    trainer = make_trainer(text_guidance, progressive_level=True, **BACKBONES["vanilla"] | {"n_frequencies": 8})
    assert [active_levels(trainer.config, progress) for progress in (0.0, 0.2, 0.375, 1.0)] == [2, 6, 8, 8]
    calls, network = [], trainer.field._network
    monkeypatch.setattr(trainer.field, "_network", lambda x, active: calls.append(active) or network(x, active))
    trainer.train_step()
    assert len(calls) >= 3 and set(calls) == {2}  # the even samples, the final ones and those of normals
    assert trainer.optimizer.grads.view(-1)[: trainer.field.weights[0].numel()].view(16, 51)[:, 9:27].abs().sum() == 0


def test_learning_rates(text_guidance):
    """The table has ten times the rate of the networks."""
    grid, vanilla = (make_trainer(text_guidance, lr=0.01, **BACKBONES[name]) for name in ("grid", "vanilla"))
    check_values("grid", grid.optimizer.lrs, [0.5, 0.05])
    check_values("vanilla", vanilla.optimizer.lrs, [0.05])
    assert grid.optimizer.group_ends == (grid.field.table.numel(), sum(p.numel() for p in grid.field.parameters()))
    assert vanilla.optimizer.group_ends == (sum(p.numel() for p in vanilla.field.parameters()),)


def test_progressive_levels(text_guidance):
    """Levels are added during the run."""
    trainer = make_trainer(text_guidance, progressive_level=True, n_levels=8)
    assert [active_levels(trainer.config, progress) for progress in (0.0, 0.2, 0.375, 1.0)] == [2, 6, 8, 8]
    assert active_levels(make_trainer(text_guidance).config, 0.0) is None


class Replaying:
    """Stands in for the CUDA graphs of a step: calls the function of the first call with the inputs of the present."""

    def __init__(self):
        self.first = None

    def clear(self):
        self.first = None

    def __call__(self, key, function, inputs):
        self.first = self.first or (key, function)
        assert key == self.first[0]
        return self.first[1](inputs)


def test_replayed_step_reads_levels_from_device(text_guidance):
    """A graph that was captured with few levels takes as many as a later step has: they are one of its inputs."""
    trainer = make_trainer(text_guidance, progressive_level=True, **CHEAP | {"n_levels": 8})
    trainer.graphs = Replaying()
    ends = trainer.field.spec.grid.offsets
    for progress in (0.0, 0.2):
        trainer.replay_gradients(trainer.step_inputs(random.Random(0), progress, progress))
        used = trainer.optimizer.grads[: trainer.field.table.numel()].view_as(trainer.field.table).any(1)
        rows = [bool(used[start:end].any()) for start, end in pairwise(ends)]
        assert rows == [level < active_levels(trainer.config, progress) for level in range(8)]


def cameras_of_steps(trainer: Trainer, steps: int) -> list[Cameras]:
    """The cameras of the next steps."""
    recorded = []

    def guidance(images, cameras, inputs):
        recorded.append(cameras)
        return SimpleNamespace(loss=images.sum(), t=torch.zeros(2), grad_norm=torch.zeros(()))

    trainer.guidance = guidance
    for _ in range(steps):
        trainer.train_step()
    return recorded


def test_progressive_views(text_guidance):
    """Progressive views widen during the run."""
    changes = dict(progressive_view=True, progressive_view_init_ratio=0.0, default_azimuth=30.0, iters=8, **CHEAP)
    azimuths = [cameras.azimuth for cameras in cameras_of_steps(make_trainer(text_guidance, **changes), 8)]
    assert (azimuths[0] == 30).all()
    for step in range(4):
        width = 2 * step / 8
        assert (azimuths[step] - 30 * (1 - width)).abs().max() <= 180 * width + 360 * 4 * ULP  # of angles up to 360
    assert max(float(azimuth.abs().max()) for azimuth in azimuths[4:]) > 120
    plain = cameras_of_steps(make_trainer(text_guidance, **CHEAP), 1)
    assert (plain[0].azimuth != 30).all()


PHASED = dict(exp_start_iter=2, exp_end_iter=6, progressive_view=True, progressive_level=True, n_levels=8)


def test_phase_progress_readers(text_guidance, monkeypatch):
    """Only phases, views and levels depend on the progress of phases."""
    trainer = make_trainer(text_guidance, lr_decay=0.5, **PHASED)
    views, levels, noise, rates = [], [], [], []
    optimise = trainer.optimizer.step

    def spied_cameras(*given):
        views.append(given[-1])
        return sample_cameras(*given)

    def spied_levels(config, progress):
        levels.append(progress)
        return active_levels(config, progress)

    def guidance(images, cameras, inputs):
        noise.append(inputs.progress)
        return SimpleNamespace(loss=images.sum(), t=torch.zeros(2), grad_norm=torch.zeros(()))

    def spied_optimiser(*, lr_scale, **named):
        rates.append(lr_scale)
        return optimise(lr_scale=lr_scale, **named)

    monkeypatch.setattr("dream_fast.engine.training.trainer.sample_cameras", spied_cameras)
    monkeypatch.setattr("dream_fast.engine.training.trainer.active_levels", spied_levels)
    trainer.guidance, trainer.optimizer.step = guidance, spied_optimiser
    names = [trainer.train_step().phase for _ in range(8)]
    assert names == ["latent"] * 3 + ["albedo"] + ["shaded"] * 4
    assert views == levels == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert noise == [step / 8 for step in range(8)]
    check_values("rates", rates, [0.5 ** (step / 8) for step in range(8)])


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({}, [0.25, 0.5], [0.5, 0.75, 1.0]),
        ({"exp_start_iter": 2}, [0.0, 1 / 3], [1 / 3, 2 / 3, 1.0]),
        ({"exp_end_iter": 5}, [0.4, 0.8], [0.8, 1.0, 1.0]),
        ({"exp_start_iter": 2, "exp_end_iter": 18}, [0.0, 0.125], [0.125, 0.5, 0.875]),
    ],
)
def test_phases_extended(text_guidance, tmp_path, settings, before, after):
    """An extended run stretches its phases unless their end is set."""
    first = make_trainer(text_guidance, **CHEAP, **settings)
    check_values("before", [first.phases.progress(step) for step in (2, 4)], before)
    first.step = 4
    path = first.save(Workspace(tmp_path))
    longer = make_trainer(text_guidance, iters=16, **CHEAP, **settings)
    longer.load(path)
    check_values("after", [longer.phases.progress(step) for step in (4, 10, 16)], after)
    check_values("schedule", [longer.schedule.progress(step) for step in (4, 10, 16)], [0.5, 0.75, 1.0])


def constant_pull(trainer: Trainer, gradient: float) -> torch.Tensor:
    """The gradient of the table after one step with a constant ``gradient`` in every pixel."""

    def guidance(images, cameras, inputs):
        return SimpleNamespace(loss=(images * gradient).sum(), t=torch.zeros(2), grad_norm=torch.zeros(()))

    trainer.guidance = guidance
    trainer.train_step()
    return trainer.optimizer.grads.clone()


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_grad_clip_rgb(text_guidance, loss_scale):
    """A gradient of 2 with a limit of 1/2 equals one of 1/2, bit for bit, whatever the loss scale."""
    free, limited = (make_trainer(text_guidance, grad_clip_rgb=limit, **CHEAP) for limit in (-1.0, 0.5))
    limited.scaler = LossScaler(True, "cpu", start=loss_scale)
    expected = constant_pull(free, 2.0) * (loss_scale / 4)
    assert expected.abs().max() > 0
    assert torch.equal(constant_pull(limited, 2.0), expected)


@pytest.mark.parametrize("grad_clip", [-1.0, 1e-3])
def test_loss_scale_changes_nothing(text_guidance, grad_clip):
    """A step with a loss scale of 1024 equals one without, bit for bit."""
    weights = {weight_setting(name): 0.25 for name in ("entropy", "opacity", "orient", "tv", "wd", "3d_normal_smooth")}
    trainers = [make_trainer(text_guidance, grad_clip=grad_clip, **CHEAP | weights) for _ in range(2)]
    trainers[1].scaler = LossScaler(True, "cpu", start=1024.0)
    for trainer in trainers:
        trainer.schedule = RunProgress(8, 0, 0.5)  # the regularisers have their full weight
        before = trainer.optimizer.params.clone()
        trainer.train_step()
        assert int(trainer.skipped) == 0 and not torch.equal(trainer.optimizer.params, before)
    assert same_state(*trainers)


def test_nonfinite_steps_end_run(text_guidance, tmp_path):
    """Steps without a finite gradient change nothing and end the run with a reason."""
    trainer = make_trainer(text_guidance, iters=3 * MAX_NONFINITE_STEPS, log_every=MAX_NONFINITE_STEPS, **CHEAP)

    def guidance(images, cameras, inputs):
        loss = images.sum() * float("nan")
        return SimpleNamespace(loss=loss, t=torch.zeros(2), grad_norm=loss.detach())

    trainer.guidance = guidance
    before = trainer.optimizer.params.clone()
    with pytest.raises(UserError, match=f"last {MAX_NONFINITE_STEPS} steps were not finite"):
        fit(trainer, tmp_path)
    assert torch.equal(trainer.optimizer.params, before)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["skipped"] == MAX_NONFINITE_STEPS and row["grad_norm"] is None


class Direct:
    """As `StepGraphs`, but calls the function with the static inputs."""

    def __init__(self):
        self.keys = []

    def __call__(self, key, function, inputs):
        self.keys.append(key)
        return function(static_copy(inputs, torch.device("cpu")))

    def clear(self):
        pass


def test_replay_reads_step_inputs(text_guidance, tmp_path):
    """A graph of a step reads the numbers of the step from the device."""
    trainer = make_trainer(text_guidance, bg_radius=1.0, lambda_opacity_entropy=1.0, t_anneal="linear", **ANNEALED)
    trainer.graphs = Direct()
    for step in range(8):
        trainer.step = step
        progress = trainer.schedule.progress(step)
        inputs = trainer.step_inputs(random.Random(step), progress, progress)._replace(background_network=True)
        trainer.generator.manual_seed(step)
        replayed = trainer.replay_gradients(inputs)
        got = trainer.optimizer.grads.clone()
        trainer.generator.manual_seed(step)
        inputs = trainer.guidance.prepare_step(inputs, 2)
        # A graph reads them in fp32; with those numbers nothing differs.
        scalars = {k: torch.tensor(x).item() if isinstance(x, float) else x for k, x in inputs.scalars.items()}
        called = trainer.gradients(inputs._replace(scalars=scalars))
        assert torch.equal(replayed.t, called.t) and called.terms.keys() == replayed.terms.keys()
        for name, term in called.terms.items():
            assert torch.equal(replayed.terms[name], term) and not term.requires_grad
        assert torch.equal(got, trainer.optimizer.grads) and got.abs().max() > 0
    assert {name for name, *_ in trainer.graphs.keys} == {"latent", "albedo", "shaded"}


@pytest.mark.parametrize(
    "guided",
    [
        {},
        {"perpneg": True},
        {"objective": "csd", "clip_grad_latent": 1.0},
        {"objective": "asd", "guidance_scale": 7.5},
        {"objective": "sdi", "guidance_scale": 7.5, "inversion_steps": 2},
    ],
    ids=lambda guided: "-".join(guided) or "default",
)
def test_replayed_run(text_guidance, tmp_path, guided):
    """A replayed run takes every kind of step."""
    trainer = make_trainer(text_guidance, bg_radius=1.0, iters=16, **guided)
    trainer.graphs = Direct()
    workspace = fit(trainer, tmp_path)
    rows = [json.loads(line) for line in workspace.metrics.read_text().splitlines()]
    assert len(rows) == 16 and all(row["skipped"] == 0 and row["loss"] > 0 for row in rows)
    assert {("albedo", "albedo", True), ("albedo", "albedo", False)} <= set(trainer.graphs.keys)


# --------------------------------------------------------------------------------------------- repetition and resuming


@pytest.mark.parametrize("backbone", BACKBONES)
def test_seed_repeats(text_guidance, tmp_path, backbone):
    """The same seed gives the same bytes, and another seed does not."""
    torch.manual_seed(1)  # what the process drew before is no part of the run
    first = make_trainer(text_guidance, **BACKBONES[backbone])
    one = rows_without_times(fit(first, tmp_path / "a"))
    torch.manual_seed(2)
    second = make_trainer(text_guidance, **BACKBONES[backbone])
    two = rows_without_times(fit(second, tmp_path / "b"))
    assert one == two
    assert same_state(first, second)
    other = make_trainer(text_guidance, seed=1, **BACKBONES[backbone])
    assert rows_without_times(fit(other, tmp_path / "c")) != one
    for name in ("validation/step_000008.png", "checkpoints/step_000008.safetensors"):
        assert filecmp.cmp(tmp_path / "a" / name, tmp_path / "b" / name, shallow=False)


class Interrupting:
    """Sends a signal to the process in the middle of step ``at``."""

    def __init__(self, guidance, at: int, number: int = signal.SIGINT):
        self.guidance, self.at, self.number, self.calls = guidance, at, number, 0

    def __call__(self, *args, **kwargs):
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)
        self.calls += 1
        return self.guidance(*args, **kwargs)


@pytest.mark.parametrize("kind", [*BACKBONES, "schedules"])
def test_resume_after_interrupt(text_guidance, tmp_path, kind):
    """Ctrl-C leaves a checkpoint, and the resumed run equals the uninterrupted one."""
    in_parts = {name: value for name, value in ANNEALED.items() if name != "lambda_guidance"}  # of no DiffusionGuidance
    changes = (BACKBONES | {"schedules": in_parts})[kind] | {"progressive_level": True}
    whole = make_trainer(text_guidance, **changes)
    expected = rows_without_times(fit(whole, tmp_path / "whole"))

    stopped = make_trainer(text_guidance, **changes)
    stopped.guidance = Interrupting(stopped.guidance, at=4)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, tmp_path / "parts")
    assert signal.getsignal(signal.SIGINT) is handler
    workspace = Workspace(tmp_path / "parts")
    checkpoint = workspace.checkpoints / "step_000005.safetensors"
    assert [path.name for path in workspace.checkpoints.iterdir()] == [checkpoint.name]

    resumed = make_trainer(text_guidance, **changes)
    resumed.load(checkpoint)
    assert same_state(resumed, stopped)
    assert rows_without_times(fit(resumed, tmp_path / "parts")) == expected
    assert same_state(resumed, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves(text_guidance, tmp_path, number, status):
    """After a signal the step is finished and saved, and the exit status is that of the signal."""
    trainer = make_trainer(text_guidance, **CHEAP)
    trainer.guidance = Interrupting(trainer.guidance, at=2, number=number)
    with pytest.raises(Stopped) as stopped:
        fit(trainer, tmp_path)
    assert stopped.value.status == status and trainer.step == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000003.safetensors"]


def test_extended_run_keeps_progress(text_guidance, tmp_path):
    """Learning rate, ramp and phase at step 4 of 8 continue when the run is extended to 80 steps."""
    changes = dict(lr_decay=0.25, lambda_opacity_entropy=1.0, latent_iter_ratio=0.25, albedo_iter_ratio=0.4)
    first = make_trainer(text_guidance, iters=8, **changes)
    first.step = 4
    path = first.save(Workspace(tmp_path))
    longer = make_trainer(text_guidance, iters=80, **changes)
    longer.load(path)
    recorded, optimise = {}, longer.optimizer.step
    longer.optimizer.step = lambda *, lr_scale, **named: (
        recorded.update(lr=lr_scale) or optimise(lr_scale=lr_scale, **named)
    )
    gradients = longer.gradients
    longer.gradients = lambda inputs: recorded.update(up=inputs.scalars["ramp"]) or gradients(inputs)
    assert longer.train_step().phase == "shaded"
    assert recorded["up"] == 1.0 and recorded["lr"] == 0.5


def test_library_seeds_resumed(text_guidance):
    """Libraries draw the same numbers in a resumed step."""
    drawn = []
    for step in (0, 2):
        trainer = make_trainer(text_guidance, **CHEAP)
        trainer.step = step
        for _ in range(3 - step):
            trainer.train_step()
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]


def test_load_other_architecture_raises(text_guidance, tmp_path):
    """A checkpoint of another architecture is refused."""
    workspace = fit(make_trainer(text_guidance, iters=1), tmp_path)
    with pytest.raises(UserError, match="levels 3 there, 4 here"):
        make_trainer(text_guidance, n_levels=4).load(workspace.checkpoints / "step_000001.safetensors")
    with pytest.raises(UserError, match="optim adan there, adam here"):
        make_trainer(text_guidance, optim="adam").load(workspace.checkpoints / "step_000001.safetensors")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("other", BACKBONES)
def test_load_other_backbone_raises(text_guidance, tmp_path, backbone, other):
    """A checkpoint of another backbone is refused."""
    workspace = fit(make_trainer(text_guidance, iters=1, **BACKBONES[backbone]), tmp_path)
    path = workspace.checkpoints / "step_000001.safetensors"
    trainer = make_trainer(text_guidance, iters=1, **BACKBONES[other])
    if backbone == other:
        trainer.load(path)
        return
    sentence = f"step_000001.safetensors is of another architecture: backbone {backbone} there, {other} here$"
    with pytest.raises(UserError, match=sentence):
        trainer.load(path)


def test_architecture_of_backbone(text_guidance):
    """Settings that a backbone does not read are not in its architecture."""
    grid, vanilla = (make_trainer(text_guidance, **BACKBONES[name]).architecture() for name in ("grid", "vanilla"))
    assert "n_frequencies" not in grid and grid["n_levels"] == 3 and grid["occupancy_resolution"] == 16
    assert vanilla["n_frequencies"] == 4 and not {"n_levels", "max_resolution", "occupancy_resolution"} & set(vanilla)


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("optimizer", None),
        ("renderer", {}),
        ("schedule", {"start_step": 1, "colour": "red"}),
        ("phases", {"start_step": 1, "colour": "red"}),
        ("schedule", {"iters": 1, "start_step": 0, "start_progress": 7e9}),
        ("attention", ["evil", "sdpa"]),
        ("attention", ["sdpa"]),
        ("renderer", {"samples_per_ray": torch.tensor(10**12)}),
        ("renderer", {"samples_per_ray": torch.tensor(-5)}),
        ("skipped", torch.zeros(3)),
    ],
)
def test_load_bad_state_raises(text_guidance, tmp_path, part, broken):
    """A checkpoint whose state does not fit is refused."""
    trainer = make_trainer(text_guidance, iters=1)
    _, state = load_checkpoint(fit(trainer, tmp_path).checkpoints / "step_000001.safetensors", trainer.architecture())
    if broken is None:
        del state[part]
    elif part == "renderer" and broken:
        state[part] |= broken
    else:
        state[part] = broken
    path = save_checkpoint(tmp_path / "broken", 1, state, trainer.architecture())
    with pytest.raises(UserError, match="damaged.*its state: .*--ckpt scratch starts over"):
        make_trainer(text_guidance, iters=1).load(path)


def test_schedules_read_at_step(text_guidance, monkeypatch):
    """The host reads the gradient limit, the light and the weights of the table's regularisers at the step."""
    steps = LinearSchedule.parse("0:1:5:4")
    trainer = make_trainer(text_guidance, grad_clip=steps, lambda_tv=steps, lambda_wd=steps)
    limits, weights, step = [], [], trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda **given: limits.append(given["grad_clip"]) or step(**given))
    decay = kernels.hash_grid_weight_decay_grad
    monkeypatch.setattr(
        kernels,
        "hash_grid_weight_decay_grad",
        lambda table, spec, weight: weights.append(weight) or decay(table, spec, weight),
    )
    for _ in range(6):
        trainer.train_step()
    assert limits == weights == [1, 2, 3, 4, 5, 5]
    light = ShadingConfig(latent_iter_ratio=0.0, min_ambient_ratio=LinearSchedule.parse("0:0.1:0.9:10"))
    ambient = [choose_phase(light, 0.5, random.Random(0), step=step).ambient for step in (0, 10)]
    assert ambient[0] < 0.9 < ambient[1]
