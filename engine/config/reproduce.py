"""The command that makes a run again, from its settings, as a person would type it. Nothing heavy is imported."""

from typing import Any

from dream_fast.engine.config.presets import resolve
from dream_fast.engine.config.schema import Config, device_kind, settings
from dream_fast.engine.config.setting import value_type
from dream_fast.engine.text import quote

# What decides about other settings' defaults, so it comes before them.
_DECIDING = ("guidance", "hf_key", "sd_version", "preset", "objective")


def reproduce_command(config: Config, iters: int | None = None) -> str:
    """A shell command whose settings come out as those of ``config``, up to ``iters`` steps (default: its own).

    Only what differs from the defaults of its model and device is in it, and always the device; not --test, and of
    --ckpt only a path: what to do with a run that is already there is for the user to say. Words with characters
    that a terminal would not show are written in $'...', which bash, zsh and ksh read.
    """
    if iters is not None:
        config = config.override({"iters": iters})
    return " ".join(map(quote, ["dream-fast", *_words(_typed(config))]))


def _typed(config: Config) -> dict[str, Any]:
    """The settings that have to be typed, by name."""
    mine = {field.name: getattr(getattr(config, room.name), field.name) for room, field in settings()}
    default = {field.name: field.default for _, field in settings()}
    model = "dream-mini" if config.guidance.uses_dream_mini else "sd"
    mine["device"] = device_kind(mine["device"])  # its number is of one machine
    device = "cuda" if mine["device"] == "cuda" else "cpu"
    deciding = {name: mine[name] for name in _DECIDING if mine[name] != default[name]}
    if deciding.get("guidance") == ("SD",):
        del deciding["guidance"]  # its source says so
    base = resolve(deciding, model, device)
    differing = {
        field.name: mine[field.name]
        for room, field in settings()
        if mine[field.name] != getattr(getattr(base, room.name), field.name)
    }
    wanted = deciding | differing | {"device": mine["device"]}
    if mine["ckpt"] in ("latest", "scratch"):
        wanted.pop("ckpt", None)
    for name in ("test", "output"):
        wanted.pop(name, None)
    return {name: wanted[name] for name in mine if name in wanted}


def _words(typed: dict[str, Any]) -> list[str]:
    kinds = {field.name: value_type(field) for _, field in settings()}
    words: list[str] = []
    for name, value in typed.items():
        if name == "fp16" and value:
            words.append("-O")
        elif kinds[name] is bool:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, str) and value.startswith("-"):
            words.append(f"--{name}={value}")  # apart from its flag it would be read as one
        else:
            words += [f"--{name}", str(value)]
    return words
