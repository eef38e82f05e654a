"""The page docs/options.md, from the dataclasses of the settings and the list of what is refused.

``python -m dream_fast.engine.config.options_page > docs/options.md`` writes it anew. Nothing heavy is imported.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from dream_fast.engine.config.compat import DIFFERENCES, REFERENCE_FLAGS, UNSUPPORTED_FLAGS, UNSUPPORTED_VALUES
from dream_fast.engine.config.other_programs import ANSWERS
from dream_fast.engine.config.presets import resolve
from dream_fast.engine.config.schedule import Scalar
from dream_fast.engine.config.schema import Config, settings, settings_unused_by
from dream_fast.engine.config.setting import ScalarRange, value_type

# What the command takes beside the settings.
COMMAND_FLAGS = {
    "--version": "show the version and stop",
    "--file": "more arguments from a text file, as if they stood here; later ones count more",
    "--print-config": "print the settings as JSON and stop",
    "--doctor": "look at this machine (versions, GPU, attention, each kernel against its reference), advise and stop",
    "-O": "--fp16 and --cuda_ray",
    "-O2": "--fp16, --backbone vanilla and --progressive_level, each unless you type another value; nothing beside -O",
    "--IF": "DeepFloyd IF in the place of SD in --guidance",
    "--cuda_ray": "march through the occupancy grid: always on with a grid, accepted for old commands",
}


_HEAD = """# Options

Made by `python -m dream_fast.engine.config.options_page > docs/options.md`; a test compares the two.
A setting that is on or off is switched off by `--no-` before its name. `--print-config` shows what a command comes to.

## Flags

The column "reference" holds what `--preset reference` sets: the defaults of stable-dreamfusion, from which Stable
Diffusion starts too (which model guides is never the preset's choice). The next two are dream-mini's defaults where
they differ from it. "none" is no value.

A flag marked "*schedule*" takes a number or `start:v0:v1:end`: v0 up to start, v1 from end on, linear in between. The
ends are steps (`--lambda_orient 100:0.01:0.1:400`) or, when one of them has a decimal point, fractions of the run
(`--guidance_scale 0.0:100:20:0.5`; `0:1:2:1` is from step 0 to step 1). Fractions follow a run that is taken further
later with more --iters, steps stay where they are. `--t_range 0.02 0.0:0.98:0.5:0.4` has a schedule for its upper end.
"""

_REFERENCE_HEAD = """## The flags of stable-dreamfusion

Each of them works under its own name or is refused with the reason below. What a working one means stands above.
"""


_VANILLA_HEAD = """## Defaults of the vanilla backbone

What `--backbone vanilla` (and so `-O2`) starts from where that is not the default above.
"""


_OTHERS_HEAD = """## Flags of other programs

What other programs call it, without the dashes, and what the refusal of such a flag names. `-` counts as `_`.
"""


def page() -> str:
    """The text of docs/options.md."""
    command = [[f"`{flag}`", text] for flag, text in COMMAND_FLAGS.items()]
    parts = [_HEAD, "### The command\n", _table(["flag", "meaning"], command), *_rooms()]
    rows = [[f"`{flag}`", *_here(flag)] for flag in REFERENCE_FLAGS]
    parts += [_REFERENCE_HEAD, _table(["flag", "here", "remark"], rows)]
    others = _table(["elsewhere", "here"], [[names, answer] for names, answer in ANSWERS.items()])
    return "\n".join([*parts, _VANILLA_HEAD, _vanilla(), _OTHERS_HEAD, others])


def _vanilla() -> str:
    """The defaults of the vanilla backbone where they are not the grid's, and the settings that it does not read."""
    cases = [({"preset": "reference"}, "cpu"), ({}, "cpu"), ({}, "cuda")]
    configs = [
        tuple(resolve(typed | {"backbone": name}, "dream-mini", device) for name in ("grid", "vanilla"))
        for typed, device in cases
    ]
    rows = []
    for room, field in settings():
        pairs = [tuple(getattr(getattr(c, room.name), field.name) for c in pair) for pair in configs]
        if field.name != "backbone" and any(grid != own for grid, own in pairs):
            rows.append([f"`--{field.name}`", *(_value(own) if grid != own else "" for grid, own in pairs)])
    unread = ", ".join(f"`--{field.name}`" for _, field in settings() if field.name in settings_unused_by("vanilla"))
    table = _table(["flag", "reference", "dream-mini, CPU", "dream-mini, GPU"], rows)
    return f"{table}\nRefused there, since only the grids read them: {unread}.\n"


def _rooms() -> Iterator[str]:
    """A heading and a table for each room of the settings."""
    # The device is asked of the machine, so it is no default of either.
    mini = [resolve({}, "dream-mini", device).override({"device": "auto"}) for device in ("cpu", "cuda")]
    head = ["flag", "reference", "dream-mini, CPU", "dream-mini, GPU", "meaning"]
    for room in dataclasses.fields(Config):
        rows = [_row(room, field, mini) for owner, field in settings() if owner is room]
        yield f"### {room.type.__doc__.rstrip('.')}\n"
        yield _table(head, rows)


def _row(room: dataclasses.Field, field: dataclasses.Field, mini: list[Config]) -> list[str]:
    own = [getattr(getattr(config, room.name), field.name) for config in mini]
    shown = ["" if value == field.default else _value(value) for value in own]
    choices = field.metadata["choices"]
    return [f"`--{field.name}`", _value(field.default), *shown, _meaning(field, choices)]


def _meaning(field: dataclasses.Field, choices: tuple[str, ...] | None) -> str:
    text = field.metadata["help"]
    if value_type(field) in (Scalar, ScalarRange):
        text += "; *schedule*"
    return f"{text} ({', '.join(choices)})" if choices else text


def _value(value: Any) -> str:
    """A default as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(_value, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return {None: "none", "": '""'}.get(value, str(value))


def _here(flag: str) -> tuple[str, str]:
    """Whether a flag of the reference works, and what to know about it: the reasons of what is refused."""
    if flag in UNSUPPORTED_FLAGS:
        return "refused", UNSUPPORTED_FLAGS[flag]
    values = [f"`{value}` is refused: {why}" for (owner, value), why in UNSUPPORTED_VALUES.items() if owner == flag]
    return "works", "; ".join([*filter(None, [DIFFERENCES.get(flag)]), *values])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
