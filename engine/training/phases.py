"""Progress of a run, and the phases that a run goes through: latent, albedo, shaded."""

import dataclasses
import math
import random
from typing import NamedTuple

from dream_fast.engine.config.schedule import value_at
from dream_fast.engine.config.schema import Config
from dream_fast.engine.config.sections import RunConfig, ShadingConfig


@dataclasses.dataclass(frozen=True)
class RunProgress:
    """Progress of a run: `start_progress` up to `start_step`, 1 from step `iters` on, linear in between.

    Raises ValueError: when `start_progress` lies outside [0, 1] or `start_step` is negative.
    """

    iters: int
    start_step: int = 0
    start_progress: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.start_progress <= 1 and self.start_step >= 0):
            raise ValueError(f"start_step is {self.start_step}, start_progress {self.start_progress}")

    def progress(self, step: int) -> float:
        """Progress in [0, 1] before `step`."""
        if step >= self.iters:
            return 1.0
        share = max(0, step - self.start_step) / (self.iters - self.start_step)
        return self.start_progress + (1.0 - self.start_progress) * share

    def extended_to(self, step: int, iters: int) -> "RunProgress":
        """Progress of a run of `iters` steps that continues this one at `step`: the rest is stretched."""
        if iters == self.iters:
            return self
        return RunProgress(iters, max(step, self.start_step), self.progress(step))


def phase_progress(config: RunConfig) -> RunProgress:
    """Progress of phases, progressive views and progressive levels (--exp_start_iter, --exp_end_iter)."""
    end = config.iters if config.exp_end_iter is None else config.exp_end_iter
    return RunProgress(end, config.exp_start_iter or 0)


class Phase(NamedTuple):
    """Phase of a step, with the shading and the ambient share of its render."""

    name: str  # "latent", "albedo" or "shaded"
    shading: str
    ambient: float


def choose_phase(
    config: ShadingConfig, phase_progress: float, rng: random.Random, step: int = 0, run_progress: float = 0.0
) -> Phase:
    """Choose the phase: normals as latents first, then colour alone, then light on the shape (at times without colour).

    A ratio of 0 leaves its phase out; with a ratio of 1 the phase never ends, also in a run that is extended. Schedules
    are evaluated at `step` and `run_progress`.
    """
    if phase_progress < config.latent_iter_ratio or config.latent_iter_ratio == 1:
        return Phase("latent", "normal", 1.0)
    if phase_progress < config.albedo_iter_ratio or config.albedo_iter_ratio == 1:
        return Phase("albedo", "albedo", 1.0)
    ambient = rng.uniform(value_at(config.min_ambient_ratio, step, run_progress), 1.0)
    textureless = rng.random() < value_at(config.textureless_ratio, step, run_progress)
    return Phase("shaded", "textureless" if textureless else "lambertian", ambient)


def active_levels(config: Config, phase_progress: float) -> int | None:
    """Number of hash-grid levels, or of frequencies, in use: a quarter first, all from 3/8 of the phases on.

    None without --progressive_level: all of them, always.
    """
    if not config.shading.progressive_level:
        return None
    field = config.field
    levels = field.n_frequencies if field.backbone == "vanilla" else field.n_levels
    return max(1, math.ceil(levels * min(1.0, 0.25 + 2.0 * phase_progress)))
