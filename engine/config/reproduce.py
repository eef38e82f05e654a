"""The command that makes a run again, from its settings, as a person would type it. Nothing heavy is imported."""

import re
import shlex
import unicodedata
from typing import Any

from dream_fast.engine.config.presets import resolve
from dream_fast.engine.config.schema import Config, device_kind, settings
from dream_fast.engine.config.setting import value_type

# What decides about other settings' defaults, so it comes before them.
_DECIDING = ("guidance", "hf_key", "sd_version", "preset", "score")
# Characters that show nothing and belong to no category that says so: fillers, and the marks of variants of letters.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\U000e0100-\U000e01ef]")
# Of the category of invisible ones: joiners, which emoji and Persian are written with, and signs that are seen.
_SEEN = "\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2"


def repeating_command(config: Config, iters: int | None = None) -> str:
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
    model = "dream-mini" if config.guidance.embedded else "sd"
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


def quote(word: str) -> str:
    """``word`` as a shell reads it back."""
    if not any(map(_hidden, word)):
        return shlex.quote(word)
    return "$'" + visible(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def visible(text: str) -> str:
    """``text`` with the characters that steer a terminal or that nobody sees as escapes: \\x1b, \\u202e, \\u200b."""
    return "".join(_escaped(character) if _hidden(character) else character for character in text)


def in_a_line(text: str, most: int = 1000) -> str:
    """`visible` text of at most about ``most`` characters, its middle left out: for a terminal and a log."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... ({len(text) - most} characters) ... {text[-most // 2 :]}"
    return visible(text)


def _hidden(character: str) -> bool:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character not in _SEEN
    return _INVISIBLE.match(character) is not None


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of the command line that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
