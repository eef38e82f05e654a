"""Numbers that change during a run, written ``start:v0:v1:end``.

The value is v0 up to ``start``, v1 from ``end`` on, and linear in between. The two ends are steps
(``100:0.1:1:400``) or, when one of them has a decimal point, fractions of the run (``0.0:8:4:1.0``); threestudio tells
the two apart in the same way. Fractions follow a run that is taken further later, steps stay where they are.

A schedule is evaluated on the host from the number of the step, so nothing of it has to be saved for a run that is
taken up; what a CUDA graph reads is a scalar on the device that is filled before each replay. Nothing heavy is
imported.
"""

import dataclasses
import math
from dataclasses import dataclass

from dream_fast.engine.errors import UserError


@dataclass(frozen=True)
class LinearSchedule:
    """``first`` up to ``start``, ``last`` from ``end`` on. The ends are steps, or with ``fractions`` parts of the run.

    UserError: the ends are not in order, not whole steps, or not within 0 to 1.
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
            raise UserError(f"the schedule {self} starts and ends at whole steps from 0 on")
        if self.start >= self.end:
            raise UserError(f"the schedule {self} must end after it starts")

    @classmethod
    def parse(cls, text: str) -> "LinearSchedule":
        """The schedule that ``text`` writes. UserError: it is none."""
        words = text.split(":")
        try:
            start, first, last, end = map(float, words)
        except ValueError:
            raise UserError(
                f"{text!r} is no schedule; one is start:v0:v1:end, as in 0.0:8:4:1.0 (fractions of the run) or "
                "0:8:4:500 (steps)"
            ) from None
        return cls(start, first, last, end, fractions=any(_has_point(words[place]) for place in (0, 3)))

    def __str__(self) -> str:
        """As :meth:`parse` reads it back, every digit of it."""
        ends = [_with_point(end) if self.fractions else _plain(end) for end in (self.start, self.end)]
        return f"{ends[0]}:{_plain(self.first)}:{_plain(self.last)}:{ends[1]}"

    def __format__(self, spec: str) -> str:
        return str(self)  # where a plain number has so many digits

    def at(self, step: int, progress: float) -> float:
        """The value of ``step``, which has ``progress`` of the run behind it."""
        place = progress if self.fractions else step
        done = min(max((place - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.first + (self.last - self.first) * done


Scalar = float | LinearSchedule


def value_at(value: Scalar, step: int, progress: float) -> float:
    """A setting at ``step``, which has ``progress`` of the run behind it."""
    return value.at(step, progress) if isinstance(value, LinearSchedule) else value


def largest(value: Scalar) -> float:
    """The largest value that a setting has in a run."""
    return max(value.first, value.last) if isinstance(value, LinearSchedule) else value


def smallest(value: Scalar) -> float:
    """The smallest value that a setting has in a run."""
    return min(value.first, value.last) if isinstance(value, LinearSchedule) else value


def ever_below(low: Scalar, high: Scalar) -> bool:
    """Whether ``high`` may fall below ``low``. Schedules with other ends are compared by their extremes."""
    if isinstance(low, LinearSchedule) and isinstance(high, LinearSchedule):
        if (low.start, low.end, low.fractions) == (high.start, high.end, high.fractions):
            return low.first > high.first or low.last > high.last
    return largest(low) > smallest(high)


def values_at(room: object, step: int, progress: float) -> dict[str, float]:
    """The schedules among the fields of the dataclass ``room`` by name, each with its value at ``step``."""
    values = {field.name: getattr(room, field.name) for field in dataclasses.fields(room)}
    return {name: value.at(step, progress) for name, value in values.items() if isinstance(value, LinearSchedule)}


def _has_point(word: str) -> bool:
    return any(mark in word.lower() for mark in ".e")


def _plain(value: float) -> str:
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else repr(float(value))


def _with_point(value: float) -> str:
    return repr(float(value))
