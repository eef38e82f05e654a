"""Numbers that change during a run, written `start:v0:v1:end`. Imports nothing heavy.

The value is v0 up to `start`, v1 from `end` on, and linear in between. The two ends are steps (`100:0.1:1:400`) or,
when one of them has a decimal point, fractions of the run (`0.0:8:4:1.0`), as in threestudio. In a run that is extended
later fractions are stretched and steps stay.

A schedule is evaluated on the host from the number of the step, so a checkpoint stores nothing of it. A CUDA graph
reads a scalar on the device, which is filled before each replay.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from dream_fast.engine.errors import UserError


@dataclass(frozen=True)
class LinearSchedule:
    """A value that is `first` up to `start` and `last` from `end` on. The ends are steps or, with `fractions`, parts of
    the run.

    Raises UserError: when the ends are not in order, not whole steps, or not within 0 to 1.
    """

    start: float
    first: float
    last: float
    end: float
    fractions: bool = True

    def __post_init__(self) -> None:
        ends = (self.start, self.end)
        if not all(map(math.isfinite, (*ends, self.first, self.last))):
            raise UserError(f"the schedule {self} needs finite numbers")
        if self.fractions and not all(0 <= end <= 1 for end in ends):
            raise UserError(
                f"the schedule {self} has a decimal point in an end, so both are fractions of the run, from 0.0 to "
                "1.0; steps are whole numbers"
            )
        if not self.fractions and not all(end >= 0 and end == int(end) for end in ends):
            raise UserError(f"the schedule {self} must start and end at whole steps from 0 on")
        if self.start >= self.end:
            raise UserError(f"the schedule {self} must end after it starts")

    @classmethod
    def parse(cls, text: str) -> "LinearSchedule":
        """Return the schedule written in `text`. Raises UserError: when it is not a schedule."""
        words = text.split(":")
        try:
            start, first, last, end = map(float, words)
        except ValueError:
            raise UserError(
                f"{text!r} is not a schedule; write start:v0:v1:end, as in 0.0:8:4:1.0 (fractions of the run) or "
                "0:8:4:500 (steps)"
            ) from None
        return cls(start, first, last, end, fractions=any(_has_point(words[place]) for place in (0, 3)))

    def __str__(self) -> str:
        """Format the schedule as `parse` reads it, with every digit."""
        ends = [_with_point(end) if self.fractions else _plain(end) for end in (self.start, self.end)]
        return f"{ends[0]}:{_plain(self.first)}:{_plain(self.last)}:{ends[1]}"

    def __format__(self, spec: str) -> str:
        return str(self)  # format specs of numbers do not apply

    def at(self, step: int, progress: float) -> float:
        """Return the value at `step`, at `progress` of the run in [0, 1]."""
        place = progress if self.fractions else step
        fraction = min(max((place - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.first + (self.last - self.first) * fraction


Scalar = float | LinearSchedule


def value_at(value: Scalar, step: int, progress: float) -> float:
    """Return the value of a setting at `step`, at `progress` of the run in [0, 1]."""
    return value.at(step, progress) if isinstance(value, LinearSchedule) else value


def largest(value: Scalar) -> float:
    """Return the largest value of a setting in a run."""
    return max(value.first, value.last) if isinstance(value, LinearSchedule) else value


def smallest(value: Scalar) -> float:
    """Return the smallest value of a setting in a run."""
    return min(value.first, value.last) if isinstance(value, LinearSchedule) else value


def ever_below(low: Scalar, high: Scalar) -> bool:
    """Return whether `high` may fall below `low`. Schedules with different ends are compared by their extremes."""
    if isinstance(low, LinearSchedule) and isinstance(high, LinearSchedule):
        if (low.start, low.end, low.fractions) == (high.start, high.end, high.fractions):
            return low.first > high.first or low.last > high.last
    return largest(low) > smallest(high)


def values_at(section: Any, step: int, progress: float) -> dict[str, float]:
    """Return the settings of `section` that have a schedule, by name, with their values at `step`."""
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {name: value.at(step, progress) for name, value in values.items() if isinstance(value, LinearSchedule)}


def _has_point(word: str) -> bool:
    return any(mark in word.lower() for mark in ".e")


def _plain(value: float) -> str:
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else repr(float(value))


def _with_point(value: float) -> str:
    return repr(float(value))
