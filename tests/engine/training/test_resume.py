"""Runs that are repeated, interrupted and resumed, and checkpoints that do not fit."""

import filecmp
import json
import os
import random
import signal

import numpy as np
import pytest
import torch

from dream_fast.engine.errors import UserError
from dream_fast.engine.runtime.signals import Stopped
from dream_fast.engine.workspace.checkpoint import load_checkpoint, save_checkpoint
from dream_fast.engine.workspace.folder import Workspace

BACKBONES = ("grid", "grid_torch", "vanilla")
# Steps of colour alone, without regularisers.
CHEAP = {"albedo_iter_ratio": 1.0, "latent_iter_ratio": 0.0, "lambda_opacity_entropy": 0.0, "bg_radius": -1.0}


def rows_without_times(workspace: Workspace) -> bytes:
    rows = [json.loads(line) for line in workspace.metrics.read_text().splitlines()]
    for row in rows:
        del row["it_per_s"], row["seconds"]
    return "\n".join(json.dumps(row) for row in rows).encode()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_seed_repeats(make_trainer, fit, same_state, tmp_path, backbone):
    """The same seed gives the same bytes, and another seed does not."""
    torch.manual_seed(1)  # what the process drew before is no part of the run
    first = make_trainer(backbone=backbone)
    one = rows_without_times(fit(first, tmp_path / "a"))
    torch.manual_seed(2)
    second = make_trainer(backbone=backbone)
    two = rows_without_times(fit(second, tmp_path / "b"))
    assert one == two
    assert same_state(first, second)
    other = make_trainer(seed=1, backbone=backbone)
    assert rows_without_times(fit(other, tmp_path / "c")) != one
    for name in ("validation/step_000008.png", "checkpoints/step_000008.safetensors"):
        assert filecmp.cmp(tmp_path / "a" / name, tmp_path / "b" / name, shallow=False)


class Interrupting:
    """Sends a signal to the process in the middle of step `at`."""

    def __init__(self, guidance, at: int, number: int = signal.SIGINT):
        self.guidance, self.at, self.number, self.calls = guidance, at, number, 0

    def __call__(self, *args, **kwargs):
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)
        self.calls += 1
        return self.guidance(*args, **kwargs)


@pytest.mark.parametrize("kind", [*BACKBONES, "schedules"])
def test_resume_after_interrupt(make_trainer, fit, same_state, annealed, tmp_path, kind):
    """Ctrl-C leaves a checkpoint, and the resumed run equals the uninterrupted one."""
    schedules = {
        name: value for name, value in annealed.items() if name != "lambda_guidance"
    }  # of no DiffusionGuidance
    changes = (schedules if kind == "schedules" else {"backbone": kind}) | {"progressive_level": True}
    whole = make_trainer(**changes)
    expected = rows_without_times(fit(whole, tmp_path / "whole"))

    stopped = make_trainer(**changes)
    stopped.guidance = Interrupting(stopped.guidance, at=4)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, tmp_path / "parts")
    assert signal.getsignal(signal.SIGINT) is handler
    workspace = Workspace(tmp_path / "parts")
    checkpoint = workspace.checkpoints / "step_000005.safetensors"
    assert [path.name for path in workspace.checkpoints.iterdir()] == [checkpoint.name]

    resumed = make_trainer(**changes)
    resumed.load(checkpoint)
    assert same_state(resumed, stopped)
    assert rows_without_times(fit(resumed, tmp_path / "parts")) == expected
    assert same_state(resumed, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves(make_trainer, fit, tmp_path, number, status):
    """After a signal the step is finished and saved, and the exit status is that of the signal."""
    trainer = make_trainer(**CHEAP)
    trainer.guidance = Interrupting(trainer.guidance, at=2, number=number)
    with pytest.raises(Stopped) as stopped:
        fit(trainer, tmp_path)
    assert stopped.value.status == status and trainer.step == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000003.safetensors"]


def test_extended_run_keeps_progress(make_trainer, tmp_path):
    """Learning rate, ramp and phase at step 4 of 8 continue when the run is extended to 80 steps."""
    changes = dict(lr_decay=0.25, lambda_opacity_entropy=1.0, latent_iter_ratio=0.25, albedo_iter_ratio=0.4)
    first = make_trainer(iters=8, **changes)
    first.step = 4
    path = first.save(Workspace(tmp_path))
    longer = make_trainer(iters=80, **changes)
    longer.load(path)
    recorded, optimise = {}, longer.optimizer.step
    longer.optimizer.step = lambda *, lr_scale, **named: (
        recorded.update(lr=lr_scale) or optimise(lr_scale=lr_scale, **named)
    )
    gradients = longer.gradients
    longer.gradients = lambda inputs: recorded.update(up=inputs.scalars["ramp"]) or gradients(inputs)
    assert longer.train_step().phase == "shaded"
    assert recorded["up"] == 1.0 and recorded["lr"] == 0.5


def test_library_seeds_resumed(make_trainer):
    """Libraries draw the same numbers in a resumed step."""
    drawn = []
    for step in (0, 2):
        trainer = make_trainer(**CHEAP)
        trainer.step = step
        for _ in range(3 - step):
            trainer.train_step()
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]


def test_load_other_architecture_raises(make_trainer, fit, tmp_path):
    """A checkpoint of another architecture is refused."""
    workspace = fit(make_trainer(iters=1), tmp_path)
    with pytest.raises(UserError, match="levels 3 there, 4 here"):
        make_trainer(n_levels=4).load(workspace.checkpoints / "step_000001.safetensors")
    with pytest.raises(UserError, match="optim adan there, adam here"):
        make_trainer(optim="adam").load(workspace.checkpoints / "step_000001.safetensors")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("other", BACKBONES)
def test_load_other_backbone_raises(make_trainer, fit, tmp_path, backbone, other):
    """A checkpoint of another backbone is refused."""
    workspace = fit(make_trainer(iters=1, backbone=backbone), tmp_path)
    path = workspace.checkpoints / "step_000001.safetensors"
    trainer = make_trainer(iters=1, backbone=other)
    if backbone == other:
        trainer.load(path)
        return
    sentence = f"step_000001.safetensors is of another architecture: backbone {backbone} there, {other} here$"
    with pytest.raises(UserError, match=sentence):
        trainer.load(path)


def test_architecture_of_backbone(make_trainer):
    """Settings that a backbone does not read are not in its architecture."""
    grid, vanilla = (make_trainer(backbone=name).architecture() for name in ("grid", "vanilla"))
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
def test_load_bad_state_raises(make_trainer, fit, tmp_path, part, broken):
    """A checkpoint whose state does not fit is refused."""
    trainer = make_trainer(iters=1)
    _, state = load_checkpoint(fit(trainer, tmp_path).checkpoints / "step_000001.safetensors", trainer.architecture())
    if broken is None:
        del state[part]
    elif part == "renderer" and broken:
        state[part] |= broken
    else:
        state[part] = broken
    path = save_checkpoint(tmp_path / "broken", 1, state, trainer.architecture())
    with pytest.raises(UserError, match="damaged.*its state: .*--ckpt scratch starts over"):
        make_trainer(iters=1).load(path)
