"""The page docs/options.md, made from the settings and the tables of refused flags. Imports nothing heavy.

`python -m dream_fast.engine.config.options_page > docs/options.md` writes it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from dream_fast.engine.config.compat import DIFFERENCES, REFERENCE_FLAGS, UNSUPPORTED_FLAGS, UNSUPPORTED_VALUES
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.other_programs import ANSWERS
from dream_fast.engine.config.schedule import Scalar
from dream_fast.engine.config.schema import Config, settings, settings_unused_by
from dream_fast.engine.config.sections import OptimConfig
from dream_fast.engine.config.setting import ScalarRange, value_type

# Flags of the command that are no settings.
COMMAND_FLAGS = {
    "--version": "show the version and stop",
    "--file": "more arguments from a text file, as if they stood here; later ones count more",
    "--print_config": "print the settings as JSON and stop",
    "--doctor": "look at this machine (versions, GPU, attention, each kernel against its reference), advise and stop",
    "-O": "--fp16 and --cuda_ray",
    "-O2": "--fp16, --backbone vanilla and --progressive_level, each unless you type another value; nothing beside -O",
    "--IF": "DeepFloyd IF in the place of SD in --guidance",
    "--cuda_ray": "march through the occupancy grid: always on with a grid, accepted for old commands",
}


# The flags that people use, in the order of a first run.
MOST_USED = (
    "--text -O --save_mesh --workspace --iters --seed --sd_version --hf_key --guidance_scale --negative --vram_O "
    "--dmtet --init_with --test"
).split()

_HEAD = """# Options

Made by `python -m dream_fast.engine.config.options_page > docs/options.md`; a test compares the two.
`--no-` before the name of a setting that is on or off switches it off. `--print_config` prints a command's settings.

## The flags that people use
"""

_FLAGS_HEAD = """## Flags

The column "reference" holds what `--preset reference` sets: the defaults of stable-dreamfusion, from which Stable
Diffusion starts too (which model guides is never the preset's choice). The next two are dream-mini's defaults where
they differ from it. "none" is no value.

A flag marked "*schedule*" takes a number or `start:v0:v1:end`: v0 up to start, v1 from end on, linear in between. The
ends are steps (`--lambda_orient 100:0.01:0.1:400`) or, when one of them has a decimal point, fractions of the run
(`--guidance_scale 0.0:100:20:0.5`; `0:1:2:1` is from step 0 to step 1). Fractions follow a run that is taken further
later with more --iters, steps stay where they are. `--t_range 0.02 0.0:0.98:0.5:0.4` has a schedule for its upper end.
"""

_RATES_HEAD = """## Learning rates

`--lr` is the base. The start line of a run and `metrics.jsonl` (`lr_network`, `lr_table`, `lr_shape`) have the rates in
use. `--lr_decay` lowers all of them. With the default `--lr`:
"""


_ALIASES_HEAD = """## Earlier names

Flags that earlier versions called by another name. Both names work.
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
    """Return the text of docs/options.md."""
    meanings = COMMAND_FLAGS | {f"--{field.name}": _meaning(field) for _, field in settings()}
    most_used = _table(["flag", "meaning"], [[f"`{flag}`", meanings[flag]] for flag in MOST_USED])
    command = _table(["flag", "meaning"], [[f"`{flag}`", text] for flag, text in COMMAND_FLAGS.items()])
    reference = _table(["flag", "here", "remark"], [[f"`{flag}`", *_here(flag)] for flag in REFERENCE_FLAGS])
    others = _table(["elsewhere", "here"], [[names, answer] for names, answer in ANSWERS.items()])
    blocks = [_HEAD, most_used, _FLAGS_HEAD, "### The command\n", command, *_sections(), _RATES_HEAD, _learning_rates()]
    blocks += [_REFERENCE_HEAD, reference, _VANILLA_HEAD, _vanilla(), _OTHERS_HEAD, others, _ALIASES_HEAD, _aliases()]
    return "\n".join(blocks)


def _learning_rates() -> str:
    """Return the table of the learning rates by group of parameters and optimiser."""
    adan, adam = OptimConfig(optim="adan"), OptimConfig(optim="adam")
    rows = [
        ["MLPs", f"{adan.network_lr:g}", f"{adam.network_lr:g}"],
        ["hash table", f"{adan.table_lr:g}", f"{adam.table_lr:g}"],
        ["shape of `--dmtet`, without `--lr_geo`", f"{adan.lr:g}", f"{adam.lr:g}"],
    ]
    return _table(["parameters", "adan", "adam"], rows)


def _aliases() -> str:
    rows = [["`--print-config`", "`--print_config`"]]
    rows += [[f"`--{alias}`", f"`--{field.name}`"] for _, field in settings() for alias in field.metadata["aliases"]]
    return _table(["earlier", "now"], rows)


def _vanilla() -> str:
    """Return the defaults of the vanilla backbone where they are not the grid's, and the settings it does not read."""
    cases = [({"preset": "reference"}, "cpu"), ({}, "cpu"), ({}, "cuda")]
    configs = [
        tuple(configure(typed | {"backbone": name}, device) for name in ("grid", "vanilla")) for typed, device in cases
    ]
    rows = []
    for section, field in settings():
        pairs = [tuple(getattr(getattr(c, section.name), field.name) for c in pair) for pair in configs]
        if field.name != "backbone" and any(grid != vanilla for grid, vanilla in pairs):
            rows.append([f"`--{field.name}`", *(_value(vanilla) if grid != vanilla else "" for grid, vanilla in pairs)])
    unread = ", ".join(f"`--{field.name}`" for _, field in settings() if field.name in settings_unused_by("vanilla"))
    table = _table(["flag", "reference", "dream-mini, CPU", "dream-mini, GPU"], rows)
    return f"{table}\nRefused there, since only the grids read them: {unread}.\n"


def _sections() -> Iterator[str]:
    """Yield a heading and a table for each section of the configuration."""
    # The machine decides the device, so it is no default of either.
    mini = [configure({}, device).override({"device": "auto"}) for device in ("cpu", "cuda")]
    head = ["flag", "reference", "dream-mini, CPU", "dream-mini, GPU", "meaning"]
    for section in dataclasses.fields(Config):
        rows = [_row(section, field, mini) for owner, field in settings() if owner is section]
        yield f"### {(section.type.__doc__ or '').rstrip('.')}\n"
        yield _table(head, rows)


def _row(section: dataclasses.Field, field: dataclasses.Field, mini: list[Config]) -> list[str]:
    values = [getattr(getattr(config, section.name), field.name) for config in mini]
    shown = ["" if value == field.default else _value(value) for value in values]
    return [f"`--{field.name}`", _value(field.default), *shown, _meaning(field)]


def _meaning(field: dataclasses.Field) -> str:
    text, choices = field.metadata["help"], field.metadata["choices"]
    if value_type(field) in (Scalar, ScalarRange):
        text += "; *schedule*"
    return f"{text} ({', '.join(choices)})" if choices else text


def _value(value: Any) -> str:
    """Format a default as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(_value, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return {None: "none", "": '""'}.get(value, str(value))


def _here(flag: str) -> tuple[str, str]:
    """Return "works" or "refused" for a flag of the reference, and a remark: the difference, or the reasons."""
    if flag in UNSUPPORTED_FLAGS:
        return "refused", UNSUPPORTED_FLAGS[flag]
    values = [f"`{value}` is refused: {why}" for (owner, value), why in UNSUPPORTED_VALUES.items() if owner == flag]
    return "works", "; ".join([*filter(None, [DIFFERENCES.get(flag)]), *values])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
