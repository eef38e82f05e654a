"""Steps of the trainer: phases, schedules, what is logged, limits of gradients, replayed steps."""

import json
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from dream_fast import kernels
from dream_fast.bench.accuracy import check
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.sections import ShadingConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.runtime.cuda_graph import static_copy
from dream_fast.engine.scene.camera import Cameras, sample_cameras
from dream_fast.engine.training.divergence import MAX_NONFINITE_STEPS
from dream_fast.engine.training.losses import weight_setting
from dream_fast.engine.training.optim import LossScaler
from dream_fast.engine.training.phases import RunProgress, active_levels, choose_phase
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.folder import Workspace

ULP = torch.finfo(torch.float32).eps  # relative distance of neighbours in fp32

BACKBONES = ("grid", "grid_torch", "vanilla")
# Steps of colour alone, without regularisers.
CHEAP = {"albedo_iter_ratio": 1.0, "latent_iter_ratio": 0.0, "lambda_opacity_entropy": 0.0, "bg_radius": -1.0}


def check_values(name: str, got, exact) -> None:
    """Compare numbers of the host with the expected ones."""
    got, exact = (torch.as_tensor(values, dtype=torch.float64) for values in (got, exact))
    check(name, got, exact, exact)


@pytest.mark.parametrize("normals", ["finite_difference", "analytic"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_phases_logged(make_trainer, fit, tmp_path, backbone, normals):
    """Every phase is logged with its terms and changes the weights."""
    terms = dict.fromkeys(("opacity", "2d_normal_smooth", "3d_normal_smooth", "entropy_weights"), 0.1)
    changes = {weight_setting(name): weight for name, weight in terms.items()}
    trainer = make_trainer(bg_radius=1.0, normals=normals, backbone=backbone, **changes)
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


def test_progressive_frequencies(make_trainer, monkeypatch):
    """Frequencies are added during the run."""
    trainer = make_trainer(progressive_level=True, backbone="vanilla", n_frequencies=8)
    assert [active_levels(trainer.config, progress) for progress in (0.0, 0.2, 0.375, 1.0)] == [2, 6, 8, 8]
    calls, network = [], trainer.field._network
    monkeypatch.setattr(trainer.field, "_network", lambda x, active: calls.append(active) or network(x, active))
    trainer.train_step()
    assert len(calls) >= 3 and set(calls) == {2}  # the even samples, the final ones and those of normals
    assert trainer.optimizer.grads.view(-1)[: trainer.field.weights[0].numel()].view(16, 51)[:, 9:27].abs().sum() == 0


def test_learning_rates(make_trainer):
    """The table has ten times the rate of the networks."""
    grid, vanilla = (make_trainer(lr=0.01, backbone=name) for name in ("grid", "vanilla"))
    check_values("grid", grid.optimizer.lrs, [0.5, 0.05])
    check_values("vanilla", vanilla.optimizer.lrs, [0.05])
    assert grid.optimizer.group_ends == (grid.field.table.numel(), sum(p.numel() for p in grid.field.parameters()))
    assert vanilla.optimizer.group_ends == (sum(p.numel() for p in vanilla.field.parameters()),)


def test_progressive_levels(make_trainer):
    """Levels are added during the run."""
    trainer = make_trainer(progressive_level=True, n_levels=8)
    assert [active_levels(trainer.config, progress) for progress in (0.0, 0.2, 0.375, 1.0)] == [2, 6, 8, 8]
    assert active_levels(make_trainer().config, 0.0) is None


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


def test_replayed_step_reads_levels_from_device(make_trainer):
    """A graph that was captured with few levels takes as many as a later step has: they are one of its inputs."""
    trainer = make_trainer(progressive_level=True, **CHEAP | {"n_levels": 8})
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


def test_progressive_views(make_trainer):
    """Progressive views widen during the run."""
    changes = dict(progressive_view=True, progressive_view_init_ratio=0.0, default_azimuth=30.0, iters=8, **CHEAP)
    azimuths = [cameras.azimuth for cameras in cameras_of_steps(make_trainer(**changes), 8)]
    assert (azimuths[0] == 30).all()
    for step in range(4):
        width = 2 * step / 8
        assert (azimuths[step] - 30 * (1 - width)).abs().max() <= 180 * width + 360 * 4 * ULP  # of angles up to 360
    assert max(float(azimuth.abs().max()) for azimuth in azimuths[4:]) > 120
    plain = cameras_of_steps(make_trainer(**CHEAP), 1)
    assert (plain[0].azimuth != 30).all()


PHASED = dict(exp_start_iter=2, exp_end_iter=6, progressive_view=True, progressive_level=True, n_levels=8)


def test_phase_progress_readers(make_trainer, monkeypatch):
    """Only phases, views and levels depend on the progress of phases."""
    trainer = make_trainer(lr_decay=0.5, **PHASED)
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
def test_phases_extended(make_trainer, tmp_path, settings, before, after):
    """An extended run stretches its phases unless their end is set."""
    first = make_trainer(**CHEAP, **settings)
    check_values("before", [first.phases.progress(step) for step in (2, 4)], before)
    first.step = 4
    path = first.save(Workspace(tmp_path))
    longer = make_trainer(iters=16, **CHEAP, **settings)
    longer.load(path)
    check_values("after", [longer.phases.progress(step) for step in (4, 10, 16)], after)
    check_values("schedule", [longer.schedule.progress(step) for step in (4, 10, 16)], [0.5, 0.75, 1.0])


def constant_pull(trainer: Trainer, gradient: float) -> torch.Tensor:
    """The gradient of the table after one step with a constant `gradient` in every pixel."""

    def guidance(images, cameras, inputs):
        return SimpleNamespace(loss=(images * gradient).sum(), t=torch.zeros(2), grad_norm=torch.zeros(()))

    trainer.guidance = guidance
    trainer.train_step()
    return trainer.optimizer.grads.clone()


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_grad_clip_rgb(make_trainer, loss_scale):
    """A gradient of 2 with a limit of 1/2 equals one of 1/2, bit for bit, whatever the loss scale."""
    free, limited = (make_trainer(grad_clip_rgb=limit, **CHEAP) for limit in (-1.0, 0.5))
    limited.scaler = LossScaler(True, "cpu", start=loss_scale)
    expected = constant_pull(free, 2.0) * (loss_scale / 4)
    assert expected.abs().max() > 0
    assert torch.equal(constant_pull(limited, 2.0), expected)


@pytest.mark.parametrize("grad_clip", [-1.0, 1e-3])
def test_loss_scale_changes_nothing(make_trainer, same_state, grad_clip):
    """A step with a loss scale of 1024 equals one without, bit for bit."""
    weights = {weight_setting(name): 0.25 for name in ("entropy", "opacity", "orient", "tv", "wd", "3d_normal_smooth")}
    trainers = [make_trainer(grad_clip=grad_clip, **CHEAP | weights) for _ in range(2)]
    trainers[1].scaler = LossScaler(True, "cpu", start=1024.0)
    for trainer in trainers:
        trainer.schedule = RunProgress(8, 0, 0.5)  # the regularisers have their full weight
        before = trainer.optimizer.params.clone()
        trainer.train_step()
        assert int(trainer.skipped) == 0 and not torch.equal(trainer.optimizer.params, before)
    assert same_state(*trainers)


def test_nonfinite_steps_end_run(make_trainer, fit, tmp_path):
    """Steps without a finite gradient change nothing and end the run with a reason."""
    trainer = make_trainer(iters=3 * MAX_NONFINITE_STEPS, log_every=MAX_NONFINITE_STEPS, **CHEAP)

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


def test_replay_reads_step_inputs(make_trainer, annealed, tmp_path):
    """A graph of a step reads the numbers of the step from the device."""
    trainer = make_trainer(bg_radius=1.0, lambda_opacity_entropy=1.0, t_anneal="linear", **annealed)
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
def test_replayed_run(make_trainer, fit, tmp_path, guided):
    """A replayed run takes every kind of step."""
    trainer = make_trainer(bg_radius=1.0, iters=16, **guided)
    trainer.graphs = Direct()
    workspace = fit(trainer, tmp_path)
    rows = [json.loads(line) for line in workspace.metrics.read_text().splitlines()]
    assert len(rows) == 16 and all(row["skipped"] == 0 and row["loss"] > 0 for row in rows)
    assert {("albedo", "albedo", True), ("albedo", "albedo", False)} <= set(trainer.graphs.keys)


def test_schedules_read_at_step(make_trainer, monkeypatch):
    """The host reads the gradient limit, the light and the weights of the table's regularisers at the step."""
    steps = LinearSchedule.parse("0:1:5:4")
    trainer = make_trainer(grad_clip=steps, lambda_tv=steps, lambda_wd=steps)
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
