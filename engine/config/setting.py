"""What a room of settings is made of: fields that are also flags, with their bounds, and the check of a value.

This module imports nothing heavy. Errors: a bad value raises :class:`UserError` naming the flag and the value.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin

from dream_fast.engine.config.schedule import LinearSchedule, Scalar, ever_below, smallest
from dream_fast.engine.errors import UserError

Range = tuple[float, float]
ScalarRange = tuple[Scalar, Scalar]
# Settings that a score, a renderer or an optimiser reads as "no limit" where they are not positive.
LIMITS = ("clip_grad_latent", "grad_clip", "grad_clip_rgb")

# What a number without bounds of its own may be, and how small one that must be more than 0: single precision computes
# with it, and so with its square.
LARGEST, SMALLEST = 1e9, 1e-9

BACKBONES = ("grid", "grid_torch", "vanilla")
GRIDS, VANILLA = BACKBONES[:2], BACKBONES[2:]


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    resumable: bool = False,
    backbones: tuple[str, ...] = BACKBONES,
) -> Any:
    """A field that is also a flag. ``low``/``high`` are allowed values, ``above``/``below`` are not.

    Without them a number is at most LARGEST either way, and one above 0 at least SMALLEST.

    The N of a choice such as "cuda:N" is any whole number.

    ``resumable``: a resumed run may have another value (it shapes what is written, not what is learned).
    ``backbones``: those that read it.
    """
    metadata = dict(help=help, choices=choices, low=low, above=above, high=high, below=below, resumable=resumable)
    metadata["backbones"] = backbones
    return dataclasses.field(default=default, metadata=metadata)


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    names[Scalar] = "a number or a schedule start:v0:v1:end"
    if kind == ScalarRange:
        return "two numbers, or schedules start:v0:v1:end"
    if get_origin(kind) is tuple:
        return "two numbers" if get_args(kind)[-1] is not Ellipsis else "a list of words"
    return names[kind]


def value_type(field: dataclasses.Field) -> Any:
    """The field's type without ``| None``: int, float, str, bool, Scalar, a tuple of two of them, a tuple of words."""
    if isinstance(field.type, UnionType) and field.type != Scalar:
        return next(kind for kind in get_args(field.type) if kind is not type(None))
    return field.type


def _has_type(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if not isinstance(value, tuple) or (items[-1] is not Ellipsis and len(value) != len(items)):
            return False
        return all(_has_type(item, items[0]) for item in value)
    if kind == Scalar and isinstance(value, LinearSchedule):
        return True
    if kind in (float, Scalar):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Raise UserError unless ``value`` has the field's type and lies within its bounds; a range is not reversed."""
    flag, meta = f"--{field.name}", field.metadata
    if value is None and isinstance(field.type, UnionType) and field.type != Scalar:
        return
    kind = value_type(field)
    if not _has_type(value, kind):
        raise UserError(f"{flag} takes {_type_name(kind)}, not {value!r}")
    for item in _leaves(value):
        if meta["choices"] is not None and not any(_is_choice(item, choice) for choice in meta["choices"]):
            raise UserError(f"{flag} is one of {', '.join(meta['choices'])}, not {item!r}")
        if isinstance(item, str) and any("\ud800" <= sign <= "\udfff" for sign in item):  # how Python keeps other bytes
            raise UserError(f"{flag} is not text in UTF-8: {item!r}")
        if isinstance(item, str) and not item.strip() and field.default != "":
            raise UserError(f"{flag} is empty")
        if isinstance(item, str | bool):
            continue
        if isinstance(item, int) and abs(item) >= 2**63:
            raise UserError(f"{flag} is too large a number")
        if not math.isfinite(item):
            raise UserError(f"{flag} must be a finite number, not {item}")
        largest = max(LARGEST, meta["high"] or 0)
        if abs(item) > largest:
            either_way = " either way" if item < 0 else ""
            raise UserError(f"{flag} must be at most {_digits(largest)}{either_way}, not {_digits(item)}")
        if meta["above"] == 0 and 0 < item < SMALLEST:
            raise UserError(f"{flag} must be at least {SMALLEST:g}, not {_digits(item)}")
        for bound, good, words in (
            (meta["low"], lambda b, x: x >= b, "at least"),
            (meta["above"], lambda b, x: x > b, "more than"),
            (meta["high"], lambda b, x: x <= b, "at most"),
            (meta["below"], lambda b, x: x < b, "less than"),
        ):
            if bound is not None and not good(bound, item):
                raise UserError(f"{flag} must be {words} {_digits(bound)}, not {_digits(item)}")
    if isinstance(value, LinearSchedule) and field.name in LIMITS and smallest(value) <= 0:
        raise UserError(f"{flag} as a schedule takes limits above 0, not {value}: -1 is no limit to start from")
    if kind == ScalarRange and any(isinstance(end, LinearSchedule) for end in value):
        if ever_below(*value):
            raise UserError(f"{flag} may be reversed during the run: from {value[0]} to {value[1]}")
    elif kind in (Range, ScalarRange) and value[0] > value[1]:
        raise UserError(f"{flag} is reversed: its lower end {value[0]:g} is more than its upper end {value[1]:g}")
    if kind == tuple[str, ...] and not value:
        raise UserError(f"{flag} needs at least one value")


def _digits(number: float) -> str:
    """A number for a sentence: every digit of a whole one."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def _is_choice(item: str, choice: str) -> bool:
    pattern = (
        re.escape(choice.removesuffix("N")) + "(0|[1-9][0-9]{0,3})" if choice.endswith(":N") else re.escape(choice)
    )
    return re.fullmatch(pattern, item) is not None


def _leaves(value: Any) -> tuple[Any, ...]:
    """The single values of a setting, of a schedule its two."""
    if isinstance(value, tuple):
        return tuple(number for item in value for number in _leaves(item))
    return (value.first, value.last) if isinstance(value, LinearSchedule) else (value,)


@dataclass(frozen=True, kw_only=True)
class ConfigSection:
    """Base of the rooms: checks every field when it is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
