"""When the numbers of a run go wrong: what is said, and which settings would help.

    gradients that are not finite      skipped and counted; after DIVERGED in a row the run ends with a diagnosis
    an object that vanishes            rays see less than NOTHING of it for MAX_DEGENERATE_STEPS steps in a row
    an object that fills the box       rays see more than ALL of it for as long
    a regulariser of the hash table    it pulls OUTWEIGHS times as hard as the guidance, about as long
    no memory left on the GPU          a checkpoint is saved, and the run ends with flags that take less

The two of an object are warned of, or with --rescue answered by a new start with `rescued` settings.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dream_fast.engine.config.presets import resolve
from dream_fast.engine.config.schedule import LinearSchedule, Scalar, largest
from dream_fast.engine.config.schema import Config, device_kind
from dream_fast.engine.training.losses import weight_setting

MAX_NONFINITE_STEPS = 50  # steps in a row without a finite gradient: more than a loss scale needs to find its place
MAX_DEGENERATE_STEPS = 100  # steps in a row; looked at every 100 steps at least, so that 200 pass at most
# Mean opacity of a step's rays. Of 54 good runs it was 0.56 at most; with a box full of noise it wavers from 0.8 to 1.
MIN_OPACITY, MAX_OPACITY = 0.002, 0.75
# Times the length of the table's gradient: a third smooths, and --lambda_tv 0.001, which blurs, has 4 to 9.
OUTWEIGHS = 2.0
DEGENERACIES = {"vanished": "the object has vanished", "full": "the object fills the whole box"}
# The settings that a rescue changes; a run that was rescued keeps its own when it is taken up.
RESCUED = ("lambda_opacity", "lambda_opacity_entropy", "blob_density", "blob_radius", "lr")


class DegenerateScene(Exception):
    """The object is lost, in the way ``kind`` of KINDS."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


def rescue_overrides(config: Config, kind: str) -> dict[str, Any]:
    """The settings to start again with, by name: those that differ."""
    loss, field, optim = config.loss, config.field, config.optim
    wanted: dict[str, Any] = {"lr": optim.lr / 2}
    if kind == "vanished":
        # Nothing pulls it down, and there is more of it to begin with.
        wanted |= {"lambda_opacity": 0.0, "lambda_opacity_entropy": _times(loss.lambda_opacity_entropy, 0.1)}
        wanted |= {"blob_density": max(10.0, 2 * field.blob_density)}
    else:
        wanted |= {"lambda_opacity": max(1.0, 10 * largest(loss.lambda_opacity))}
        wanted |= {"blob_density": min(10.0, field.blob_density / 2), "blob_radius": min(0.2, field.blob_radius)}
    now = {name: getattr(room, name) for room in (loss, field, optim) for name in RESCUED if hasattr(room, name)}
    return {name: value for name, value in wanted.items() if value != now[name]}


def degenerate_message(config: Config, kind: str, step: int) -> str:
    advice, strong = flags(rescue_overrides(config, kind)), raised_weights(config)
    cause = f"{flags(strong)} may be too strong; " if strong else ""
    since = f"({MAX_DEGENERATE_STEPS} steps in a row before step {step})"
    return f"{DEGENERACIES[kind]} {since}; {cause}--rescue starts again with {advice}"


def outweighed_message(config: Config, times: float, step: int) -> str:
    """What is said when the regularisers of the hash table pull so many ``times`` as hard as the guidance."""
    strong = {name: largest(getattr(config.loss, name)) for name in ("lambda_tv", "lambda_wd")}
    strong = {name: weight for name, weight in strong.items() if weight > 0}
    less = {name: float(f"{weight / times:.1g}") for name, weight in strong.items()}
    return (
        f"{flags(strong)} pulls {times:.1f} times as hard as the guidance "
        f"(most of {MAX_DEGENERATE_STEPS} steps before step {step}) and smooths the object away; "
        f"{flags(less)} would pull as hard as that"
    )


def raised_weights(config: Config) -> dict[str, float]:
    """The weights of regularisers, by name, that are larger than those of the run's model and device."""
    typed = {"preset": config.run.preset} if config.run.preset else {}
    if config.field.backbone == "vanilla":
        typed["backbone"] = "vanilla"
    model = "dream-mini" if "dream-mini" in config.guidance.guidance else "sd"
    usual = resolve(typed, model, "cpu" if config.run.device == "auto" else device_kind(config.run.device)).loss
    weights = {
        field.name: largest(getattr(config.loss, field.name))
        for field in dataclasses.fields(usual)
        if field.name.startswith("lambda_")
    }
    return {name: weight for name, weight in weights.items() if weight > largest(getattr(usual, name))}


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as they are typed."""
    parts = []
    for name, value in settings.items():
        if isinstance(value, bool):
            parts.append(f"--{name}" if value else f"--no-{name}")
        else:
            parts.append(f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}")
    return " ".join(parts)


def _times(value: Scalar, factor: float) -> Scalar:
    if isinstance(value, LinearSchedule):
        return dataclasses.replace(value, first=value.first * factor, last=value.last * factor)
    return value * factor


def diagnosis(config: Config, bad: int, row: Mapping[str, Any]) -> str:
    """Why ``bad`` steps in a row had no finite gradient, as far as a ``row`` of the metrics tells."""
    terms = [name.removeprefix("loss_") for name, value in row.items() if name.startswith("loss_") and value is None]
    if "guidance" in terms or row.get("grad_norm") is None:
        cause = "the image model's answer is not finite"
        advice = "--no-fp16" if config.run.fp16 else f"--guidance_scale {largest(config.guidance.guidance_scale) / 2:g}"
    elif terms:
        cause = f"the regulariser {terms[0]} is not finite"
        advice = f"--{weight_setting(terms[0])} 0"
    else:
        cause = "the losses are finite and their gradients are not"
        advice = "--no-fp16" if config.run.fp16 else f"--grad_clip 1 or --lr {config.optim.lr / 2:g}"
    return (
        f"the gradients of the last {bad} steps were not finite, so the run cannot go on: {cause}; {advice} may help, "
        "in a new --workspace with --ckpt and this run's last checkpoint, which those steps have not changed"
    )
