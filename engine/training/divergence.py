"""Divergence of a run: detection, messages with advice, and the settings that --rescue changes.

| divergence | detected by | reaction |
|---|---|---|
| gradients that are not finite | a skipped step, MAX_NONFINITE_STEPS in a row | the run ends with a diagnosis |
| an object that vanishes | mean opacity < MIN_OPACITY, MAX_DEGENERATE_STEPS in a row | a warning, or --rescue |
| an object that fills the scene | mean opacity > MAX_OPACITY, as many | a warning, or --rescue |
| regularisers of the hash table that outweigh the guidance | OUTWEIGHS times its gradient, about as many | a warning |

--rescue restarts the run with `rescue_overrides`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dream_fast.engine.config.configure import RESCUED
from dream_fast.engine.config.presets import choose_preset
from dream_fast.engine.config.schedule import LinearSchedule, Scalar, largest
from dream_fast.engine.config.schema import Config
from dream_fast.engine.errors import UserError
from dream_fast.engine.training.losses import weight_setting

MAX_NONFINITE_STEPS = 50  # more than a loss scale needs to settle
MAX_DEGENERATE_STEPS = 100  # checked every 100 steps at least, so at most 200 steps pass
# Mean opacity of a step. In 54 good runs it was at most 0.56; in a box full of noise it varies from 0.8 to 1.
MIN_OPACITY, MAX_OPACITY = 0.002, 0.75
# Length of the regularising gradient over that of the guidance: 1/3 smooths; --lambda_tv 0.001 has 4 to 9 and blurs.
OUTWEIGHS = 2.0
# Upper ends of the useful ranges with --regularizers guided (docs/quality.md).
LARGEST_GUIDED = {
    "lambda_opacity_entropy": 10.0,
    "lambda_tv": 0.3,
    "lambda_2d_normal_smooth": 1.0,
    "lambda_3d_normal_smooth": 1.0,
}
DEGENERACIES = {"vanished": "the object has vanished", "full": "the object fills the whole box"}


class DegenerateScene(Exception):
    """Raised when the object is lost; `kind` is a key of DEGENERACIES."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


class Diverged(UserError):
    """Raised when the gradients stay non-finite."""


def rescue_overrides(config: Config, kind: str) -> dict[str, Any]:
    """Return the settings of a restart, by name, that differ from `config`."""
    loss, field, optim = config.loss, config.field, config.optim
    overrides: dict[str, Any] = {"lr": optim.lr / 2}
    if kind == "vanished":
        # Less pull towards empty space, and a denser start.
        overrides |= {"lambda_opacity": 0.0, "lambda_opacity_entropy": _scaled(loss.lambda_opacity_entropy, 0.1)}
        overrides |= {"blob_density": max(10.0, 2 * field.blob_density)}
    else:
        overrides |= {"lambda_opacity": max(1.0, 10 * largest(loss.lambda_opacity))}
        overrides |= {"blob_density": min(10.0, field.blob_density / 2), "blob_radius": min(0.2, field.blob_radius)}
    sections = (loss, field, optim)
    current = {name: getattr(part, name) for part in sections for name in RESCUED if hasattr(part, name)}
    return {name: value for name, value in overrides.items() if value != current[name]}


def degenerate_message(config: Config, kind: str, step: int) -> str:
    """Return the warning of an object that is lost before `step`."""
    advice, raised = format_flags(rescue_overrides(config, kind)), raised_weights(config)
    cause = f"{format_flags(raised)} may be too strong; " if raised else ""
    since = f"({MAX_DEGENERATE_STEPS} steps in a row before step {step})"
    return f"{DEGENERACIES[kind]} {since}; {cause}--rescue restarts with {advice}"


def outweighed_message(config: Config, times: float, step: int) -> str:
    """Return the warning of table regularisers whose gradient is `times` as long as that of the guidance."""
    weights = {name: largest(getattr(config.loss, name)) for name in ("lambda_tv", "lambda_wd")}
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    lowered = {name: float(f"{weight / times:.1g}") for name, weight in weights.items()}
    return (
        f"{format_flags(weights)} pulls {times:.1f} times as hard as the guidance "
        f"(most of {MAX_DEGENERATE_STEPS} steps before step {step}) and smooths the object away; "
        f"{format_flags(lowered)} would pull as hard as that"
    )


def raised_weights(config: Config) -> dict[str, float]:
    """Return weights of regularisers, by name, that exceed the defaults of the run's model and device.

    With --regularizers guided, LARGEST_GUIDED replaces those defaults.
    """
    typed = {"preset": config.run.preset, "guidance": config.guidance.guidance}
    if config.field.backbone == "vanilla":
        typed["backbone"] = "vanilla"
    usual = choose_preset(typed, "cpu" if config.run.device == "auto" else config.run.device).loss
    weights = {
        field.name: largest(getattr(config.loss, field.name))
        for field in dataclasses.fields(usual)
        if field.name.startswith("lambda_")
    }
    limits = {name: largest(getattr(usual, name)) for name in weights}
    if config.loss.regularizers == "guided":
        limits |= LARGEST_GUIDED
    return {name: weight for name, weight in weights.items() if weight > limits[name]}


def format_flags(settings: Mapping[str, Any]) -> str:
    """Format settings as they are typed."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}")
    return " ".join(words)


def _scaled(value: Scalar, factor: float) -> Scalar:
    if isinstance(value, LinearSchedule):
        return dataclasses.replace(value, first=value.first * factor, last=value.last * factor)
    return value * factor


def nonfinite_message(config: Config, steps: int, row: Mapping[str, Any]) -> str:
    """Return the diagnosis of `steps` steps in a row without a finite gradient, from the last `row` of the metrics."""
    terms = [name.removeprefix("loss_") for name, value in row.items() if name.startswith("loss_") and value is None]
    if "guidance" in terms or row.get("grad_norm") is None:
        cause = "the image model's prediction is not finite"
        advice = "--no-fp16" if config.run.fp16 else f"--guidance_scale {largest(config.guidance.guidance_scale) / 2:g}"
    elif terms:
        cause = f"the regulariser {terms[0]} is not finite"
        advice = f"--{weight_setting(terms[0])} 0"
    else:
        cause = "the losses are finite and their gradients are not"
        advice = "--no-fp16" if config.run.fp16 else f"--grad_clip 1 or --lr {config.optim.lr / 2:g}"
    return (
        f"the gradients of the last {steps} steps were not finite, so the run ends: {cause}; {advice} may "
        "help, in a new --workspace with --ckpt and this run's last checkpoint, which those steps have not changed"
    )
