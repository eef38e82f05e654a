"""The command that repeats a run, made from its settings. Imports nothing heavy."""

from typing import Any

from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.guidances import chosen_guidances
from dream_fast.engine.config.schema import Config, device_kind, settings
from dream_fast.engine.config.setting import value_type
from dream_fast.engine.text import quote

# Settings on which the defaults of others depend.
_DECIDING = ("guidance", "hf_key", "sd_version", "preset", "objective")


def reproduce_command(config: Config, iters: int | None = None) -> str:
    """Return a shell command that resolves to the settings of `config`, with `iters` steps (default: its own).

    It has the settings that differ from the defaults of the model and device, and always the device. `--test` is left
    out, and so is `--ckpt` unless it is a path. Words with invisible characters are written as $'...', for bash, zsh
    and ksh.
    """
    if iters is not None:
        config = config.override({"iters": iters})
    return " ".join(map(quote, ["dream-fast", *_to_words(_settings_to_type(config))]))


def _settings_to_type(config: Config) -> dict[str, Any]:
    """Return the settings that have to be typed, by name, in the order of the sections."""
    values = {field.name: getattr(getattr(config, section.name), field.name) for section, field in settings()}
    defaults = {field.name: field.default for _, field in settings()}
    values["device"] = device_kind(values["device"])  # the number of a GPU belongs to one machine
    deciding = {name: values[name] for name in _DECIDING if values[name] != defaults[name]}
    guidance = deciding.pop("guidance", values["guidance"])
    if tuple(spec.name for spec in chosen_guidances(deciding)) != guidance:
        deciding["guidance"] = guidance
    base = configure(deciding, "cuda" if values["device"] == "cuda" else "cpu")
    differing = {
        field.name: values[field.name]
        for section, field in settings()
        if values[field.name] != getattr(getattr(base, section.name), field.name)
    }
    typed = deciding | differing | {"device": values["device"]}
    if values["ckpt"] in ("latest", "scratch"):
        typed.pop("ckpt", None)
    for name in ("test", "output"):
        typed.pop(name, None)
    return {name: typed[name] for name in values if name in typed}


def _to_words(typed: dict[str, Any]) -> list[str]:
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
            words.append(f"--{name}={value}")  # as a separate word it would be parsed as a flag
        else:
            words += [f"--{name}", str(value)]
    return words
