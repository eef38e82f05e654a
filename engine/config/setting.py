"""Settings: dataclass fields that are also flags, with their bounds, and the check of a value.

Imports nothing heavy. Errors name the flag and the value.
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

# Bounds of every number, and the smallest one where it must be more than 0: single precision can compute with these
# numbers and with their squares.
LARGEST, SMALLEST = 1e9, 1e-9
MAX_TEXT = 20_000  # characters of a prompt or a name; a model reads some hundred


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
    backbones: tuple[str, ...] | None = None,
    is_limit: bool = False,
    aliases: tuple[str, ...] = (),
) -> Any:
    """Make a dataclass field that is also a flag.

    choices: the allowed words. The N of a choice such as "cuda:N" is any whole number.
    low, high: closed bounds of a number; above, below: open ones. Its size is at most LARGEST unless `high` is larger,
        and at least SMALLEST where it must be more than 0.
    resumable: a resumed run may change it, since it does not change what is learned.
    backbones: the backbones that read it; None: all.
    is_limit: a value that is not positive means no limit.
    aliases: earlier names of the flag.
    """
    metadata = dict(help=help, choices=choices, low=low, above=above, high=high, below=below, resumable=resumable)
    metadata |= dict(backbones=backbones, is_limit=is_limit, aliases=aliases)
    return dataclasses.field(default=default, metadata=metadata)


def value_type(field: dataclasses.Field) -> Any:
    """Return the field's type without `| None`: int, float, str, bool, Scalar, or a tuple of them."""
    if isinstance(field.type, UnionType) and field.type != Scalar:
        return next(kind for kind in get_args(field.type) if kind is not type(None))
    return field.type


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Check a value against the type and the bounds of its field.

    Raises UserError: when it has another type, is out of bounds, a reversed range or an empty list.
    """
    flag = f"--{field.name}"
    if value is None and isinstance(field.type, UnionType) and field.type != Scalar:
        return
    kind = value_type(field)
    if not _has_type(value, kind):
        raise UserError(f"{flag} takes {_type_name(kind)}, not {value!r}")
    for leaf in _leaves(value):
        if field.metadata["choices"] is not None and not any(_is_choice(leaf, c) for c in field.metadata["choices"]):
            raise UserError(f"{flag} is one of {', '.join(field.metadata['choices'])}, not {leaf!r}")
        if isinstance(leaf, str):
            _check_text(flag, leaf, may_be_empty=field.default == "")
        elif not isinstance(leaf, bool):
            _check_number(flag, leaf, field.metadata)
    if isinstance(value, LinearSchedule) and field.metadata["is_limit"] and smallest(value) <= 0:
        raise UserError(f"{flag} as a schedule takes limits above 0, not {value}: -1 means no limit")
    if kind == ScalarRange and any(isinstance(end, LinearSchedule) for end in value):
        if ever_below(*value):
            raise UserError(f"{flag} may be reversed during the run: from {value[0]} to {value[1]}")
    elif kind in (Range, ScalarRange) and value[0] > value[1]:
        raise UserError(f"{flag} is reversed: its lower end {value[0]:g} is more than its upper end {value[1]:g}")
    if kind == tuple[str, ...] and not value:
        raise UserError(f"{flag} needs at least one value")


def _check_text(flag: str, text: str, *, may_be_empty: bool) -> None:
    if len(text) > MAX_TEXT:
        raise UserError(f"{flag} has {len(text)} characters, of at most {MAX_TEXT}")
    if any("\ud800" <= character <= "\udfff" for character in text):  # Python's form of bytes that are not UTF-8
        raise UserError(f"{flag} is not text in UTF-8: {text!r}")
    if not text.strip() and not may_be_empty:
        raise UserError(f"{flag} is empty")


def _check_number(flag: str, number: float, bounds: Any) -> None:
    if isinstance(number, int) and abs(number) >= 2**63:
        raise UserError(f"{flag} is too large a number")
    if not math.isfinite(number):
        raise UserError(f"{flag} must be a finite number, not {number}")
    largest = max(LARGEST, bounds["high"] or 0)
    if abs(number) > largest:
        either_way = " either way" if number < 0 else ""
        raise UserError(f"{flag} must be at most {_digits(largest)}{either_way}, not {_digits(number)}")
    if bounds["above"] == 0 and 0 < number < SMALLEST:
        raise UserError(f"{flag} must be at least {SMALLEST:g}, not {_digits(number)}")
    for bound, holds, words in (
        (bounds["low"], lambda b, x: x >= b, "at least"),
        (bounds["above"], lambda b, x: x > b, "more than"),
        (bounds["high"], lambda b, x: x <= b, "at most"),
        (bounds["below"], lambda b, x: x < b, "less than"),
    ):
        if bound is not None and not holds(bound, number):
            raise UserError(f"{flag} must be {words} {_digits(bound)}, not {_digits(number)}")


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


def _type_name(kind: Any) -> str:
    names: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    names[Scalar] = "a number or a schedule start:v0:v1:end"
    if kind == ScalarRange:
        return "two numbers, or schedules start:v0:v1:end"
    if get_origin(kind) is tuple:
        return "two numbers" if get_args(kind)[-1] is not Ellipsis else "a list of words"
    return names[kind]


def _digits(number: float) -> str:
    """Format a number for a message, with every digit of a whole one."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def _is_choice(word: str, choice: str) -> bool:
    pattern = (
        re.escape(choice.removesuffix("N")) + "(0|[1-9][0-9]{0,3})" if choice.endswith(":N") else re.escape(choice)
    )
    return re.fullmatch(pattern, word) is not None


def _leaves(value: Any) -> tuple[Any, ...]:
    """Return the single values of a tuple, and the two ends of a schedule."""
    if isinstance(value, tuple):
        return tuple(leaf for item in value for leaf in _leaves(item))
    return (value.first, value.last) if isinstance(value, LinearSchedule) else (value,)


@dataclass(frozen=True, kw_only=True)
class ConfigSection:
    """Base of the sections of a configuration. Checks every field when it is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
