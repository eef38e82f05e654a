"""Progress and phases of a run: their start and end, also in an extended run, and their random choice."""

import random

import pytest
import torch

from dream_fast.bench.accuracy import check_fp64
from dream_fast.engine.config.sections import ShadingConfig
from dream_fast.engine.training.phases import RunProgress, choose_phase


def test_run_progress_extended():
    """Progress starts at zero, and an extended run never goes back."""
    schedule = RunProgress(100)
    assert [schedule.progress(step) for step in (0, 50, 100)] == [0.0, 0.5, 1.0]
    longer = schedule.extended_to(60, 200)
    got = torch.tensor([longer.progress(step) for step in (60, 130)], dtype=torch.float64)
    check_fp64("progress", got, torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert longer.progress(200) == 1.0
    assert schedule.extended_to(60, 100) == schedule


def test_run_progress_late_start():
    """Progress is 0 before a late start and 1 after its end."""
    late = RunProgress(60, 20)
    assert [late.progress(step) for step in (0, 19, 20, 30, 60, 99)] == [0.0, 0.0, 0.0, 0.25, 1.0, 1.0]
    before, inside = late.extended_to(10, 100), late.extended_to(40, 100)
    assert [before.progress(step) for step in (10, 20, 60, 100)] == [0.0, 0.0, 0.5, 1.0]
    assert [inside.progress(step) for step in (40, 70, 100)] == [0.5, 0.75, 1.0]


def test_phases_follow_each_other():
    config = ShadingConfig(latent_iter_ratio=0.2, albedo_iter_ratio=0.5, min_ambient_ratio=0.3, textureless_ratio=0.4)
    dice = random.Random(0)
    assert choose_phase(config, 0.1, dice) == ("latent", "normal", 1.0)
    assert choose_phase(config, 0.3, dice) == ("albedo", "albedo", 1.0)
    shaded = [choose_phase(config, 0.9, dice) for _ in range(1000)]
    assert {phase.shading for phase in shaded} == {"textureless", "lambertian"}
    assert all(0.3 <= phase.ambient <= 1.0 for phase in shaded)
    share = sum(phase.shading == "textureless" for phase in shaded) / 1000
    assert abs(share - 0.4) < 5 * (0.4 * 0.6 / 1000) ** 0.5  # five standard errors


def test_phase_ratio_zero():
    """A ratio of zero leaves the phase out from the first step on."""
    config = ShadingConfig(latent_iter_ratio=0.0, albedo_iter_ratio=0.0)
    assert choose_phase(config, 0.0, random.Random(0)).name == "shaded"


@pytest.mark.parametrize("name", ["latent", "albedo"])
def test_phase_ratio_one(name):
    """A ratio of one keeps the phase also in an extended run."""
    config = ShadingConfig(**{"latent_iter_ratio": 0.0, f"{name}_iter_ratio": 1.0})
    assert choose_phase(config, 1.0, random.Random(0)).name == name
