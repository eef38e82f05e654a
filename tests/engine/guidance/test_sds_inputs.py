"""Inputs of score distillation from the host: timesteps and scalars by schedule; resized images."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.model.components import Components, load_components
from dream_fast.engine.guidance.sds import ScoreDistillation, resize

FALLING = LinearSchedule(0.0, 0.9, 0.4, 1.0)
BY_STEPS = LinearSchedule(0, 0.9, 0.5, 100, fractions=False)


@pytest.fixture(scope="module")
def components(tiny_model: Path) -> Components:
    return load_components(tiny_model, "cpu")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def arguments(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents [batch, 4, 8, 8] and embeddings (cond, uncond) [batch, 5, 32]."""
    cond, uncond = torch.randn(2, batch, 5, 32, generator=generator())
    return torch.randn(batch, 4, 8, 8, generator=generator()), cond, uncond


@pytest.mark.parametrize(
    ("schedule", "step", "progress", "level"),
    [(FALLING, 0, 0.0, 900), (FALLING, 0, 0.5, 650), (FALLING, 7, 1.0, 400), (BY_STEPS, 50, 0.0, 700)],
)
def test_t_range_schedule(components, schedule, step, progress, level):
    """Both ends at one schedule leave one timestep, by the step or the progress."""
    score = ScoreDistillation(components, GuidanceConfig(t_range=(schedule, schedule)))
    inputs = StepInputs(step, progress, generator())
    assert score.draw_timesteps(3, inputs).tolist() == [level] * 3
    assert score.prepare_step(inputs, 3).timesteps.tolist() == [level] * 3
    result = score(*arguments(), StepInputs(step, progress, generator(), latents=True))
    assert result.t.tolist() == [level] * 2


def test_default_step(components):
    """A call without a step uses the start of a schedule."""
    score = ScoreDistillation(components, GuidanceConfig(t_range=(BY_STEPS, BY_STEPS)))
    assert score(*arguments(), StepInputs(generator=generator(), latents=True)).t.tolist() == [900, 900]


def test_prepared_step(components):
    """Prepared timesteps and scalars are those that a call draws itself."""
    config = GuidanceConfig(
        t_range=(0.1, 0.9), guidance_scale=LinearSchedule(0.0, 2.0, 10.0, 1.0), guidance_rescale=0.3
    )
    score = ScoreDistillation(components, config)
    rgb, cond, uncond = arguments()
    g = generator()
    prepared = score.prepare_step(StepInputs(0, 0.25, g, latents=True, scalars={"ramp": 0.5}), 2)
    assert prepared.scalars == {"ramp": 0.5, "guidance_scale": 4.0}
    torch.manual_seed(0)
    first = score(rgb, cond, uncond, prepared._replace(generator=generator()))
    assert torch.equal(first.t, prepared.timesteps)
    again = score(rgb, cond, uncond, prepared._replace(progress=0.9, step=9, generator=generator()))
    assert torch.equal(first.gradient, again.gradient)  # what was prepared counts
    other = score.prepare_step(StepInputs(0, 0.75, generator(), latents=True), 2)._replace(timesteps=prepared.timesteps)
    changed = score(rgb, cond, uncond, other._replace(generator=generator()))
    assert not torch.equal(first.gradient, changed.gradient)


def test_guidance_scale_schedule(components):
    """A call with a schedule equals one with its value."""
    rgb, cond, uncond = arguments()
    for schedule, step, progress in (
        (LinearSchedule(0.0, 2.0, 10.0, 1.0), 0, 0.5),
        (LinearSchedule(0, 2.0, 10.0, 8, fractions=False), 4, 0.0),
    ):
        changing, constant = (
            ScoreDistillation(components, GuidanceConfig(guidance_scale=scale))(
                rgb, cond, uncond, StepInputs(step, progress, generator(), latents=True)
            )
            for scale in (schedule, 6.0)
        )
        assert torch.equal(changing.gradient, constant.gradient)


def test_min_timestep_schedule(components):
    """With a schedule of the range, asd uses its lower end at this step."""
    low = LinearSchedule(0.0, 0.5, 0.25, 1.0)
    score = ScoreDistillation(components, GuidanceConfig(objective="asd", t_range=(low, 0.9)))
    lowest = [score.scheduled_scalars(0, progress) for progress in (0.0, 0.5, 1.0)]
    assert [{name: value.item() for name, value in scalars.items()} for scalars in lowest] == [
        {"min_timestep": 500},
        {"min_timestep": 375},
        {"min_timestep": 250},
    ]
    assert score.prepare_step(StepInputs(0, 0.5, generator()), 1).scalars["min_timestep"].item() == 375
    steady = ScoreDistillation(components, GuidanceConfig(objective="asd", t_range=(0.5, 0.9)))
    assert steady.scheduled_scalars(0, 0.5) == {}
    other = ScoreDistillation(components, GuidanceConfig(objective="sds", t_range=(low, 0.9)))
    assert other.scheduled_scalars(0, 0.5) == {}


def test_tiny_gradients(components):
    """The peak that is divided out for fp16 is multiplied back, also for tiny gradients."""
    rgb, cond, uncond = arguments()
    small, large = (
        ScoreDistillation(components, GuidanceConfig(lambda_guidance=weight))(
            leaf, cond, uncond, StepInputs(generator=generator(), latents=True)
        )
        for weight in (2.0**-20, 1.0)
        for leaf in [rgb.clone().requires_grad_()]
    )
    assert torch.equal(small.gradient * 2**20, large.gradient)
    assert torch.equal(small.loss * 2**40, large.loss)


def test_clip_grad_latent_limits(components):
    """A gradient within its limit is unchanged, and one beyond it is clamped."""
    rgb, cond, uncond = arguments()
    plain, wide, tight = (
        ScoreDistillation(components, GuidanceConfig(clip_grad_latent=limit))(
            rgb, cond, uncond, StepInputs(generator=generator(), latents=True)
        ).gradient
        for limit in (-1.0, 1e6, 0.25)
    )
    assert torch.equal(plain, wide)
    assert torch.equal(tight, plain.clamp(-0.25, 0.25)) and not torch.equal(plain, tight)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (20, 12), (32, 16), (32, 32), (8, 200)])
def test_resize_bilinear(shape, deterministic):
    """Images are averaged where a side shrinks, interpolated where both grow, unchanged at the right size; fp32."""
    image = torch.rand(2, 3, *shape, generator=generator(), dtype=torch.float64)
    shrinks = max(shape) > 32
    exact = F.interpolate(image, (32, 32), mode="bilinear", antialias=shrinks)
    reference = F.interpolate(image.float(), (32, 32), mode="bilinear", antialias=shrinks)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        got = resize(image.float(), 32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert got.dtype == torch.float32
    check("resized", got, reference, exact)
