"""Trainers of small runs and what tests do with them."""

import pytest
import torch
from rich.console import Console

from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.guidance.diffusion import diffusion_guidance
from dream_fast.engine.guidance.model.components import load_components
from dream_fast.engine.guidance.prompts import PromptEmbeddings
from dream_fast.engine.runtime.device import choose_runtime
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.training.loop import Loop
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.folder import Workspace

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


@pytest.fixture(scope="module")
def make_trainer(tiny_model):
    """make_trainer(seed=0, **changes) -> the trainer of a small run that the tiny model guides."""
    components = load_components(tiny_model, "cpu")
    prompts = PromptEmbeddings(components, "a hamburger")

    def make(seed=0, **changes) -> Trainer:
        config = reference().override(SMALL | BACKBONES[changes.get("backbone", "grid")] | changes)
        return Trainer(config, choose_runtime(config), seed, diffusion_guidance(components, prompts, config))

    return make


@pytest.fixture
def annealed() -> dict:
    """Settings that change during a run, one of each kind that a step reads."""
    return ANNEALED


@pytest.fixture
def fit():
    """fit(trainer, path) trains to the end -> the workspace."""

    def fit(trainer: Trainer, path) -> Workspace:
        workspace = Workspace(path)
        workspace.write_config(trainer.config)
        workspace.truncate_after(trainer.step)
        Loop(trainer, workspace, Reporter(Console(quiet=True))).fit()
        return workspace

    return fit


@pytest.fixture
def same_state():
    """same_state(a, b) -> True where step, optimizer and sampler of two trainers are the same."""

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

    return same_state
