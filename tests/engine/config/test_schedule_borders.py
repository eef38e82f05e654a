"""Schedules at their borders: parsing, formatting, and ranges of two schedules."""

import dataclasses
import re

import pytest

from dream_fast.engine.config.schedule import LinearSchedule, ever_below, largest, smallest, value_at, values_at
from dream_fast.engine.errors import UserError


def steps(start, first, last, end) -> LinearSchedule:
    return LinearSchedule(start, first, last, end, fractions=False)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("0:8:4:500", steps(0, 8, 4, 500)),
        ("0.0:8:4:1", LinearSchedule(0, 8, 4, 1)),
        ("0:8:4:1.0", LinearSchedule(0, 8, 4, 1)),
        ("0:0.5:1e-3:2", steps(0, 0.5, 1e-3, 2)),  # a point in a value says nothing of the ends
        ("1e-1:0:1:1", LinearSchedule(0.1, 0, 1, 1)),
        ("0:1:2:1E0", LinearSchedule(0, 1, 2, 1)),
    ],
)
def test_parse_fractions(text, schedule):
    """Either end with a point or an exponent makes both fractions of the run."""
    assert LinearSchedule.parse(text) == schedule


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (LinearSchedule(0, 8, 4, 1), "0.0:8:4:1.0"),
        (steps(0, 8.0, 0.1, 500.0), "0:8:0.1:500"),
        (LinearSchedule(0.25, -1.5, 1e15, 0.75), "0.25:-1.5:1000000000000000.0:0.75"),
        (LinearSchedule(0, 1e15 - 1, -1e16, 1), "0.0:999999999999999:-1e+16:1.0"),
        (LinearSchedule(1e-5, 1 / 3, 0, 1), f"1e-05:{1 / 3!r}:0:1.0"),
    ],
)
def test_schedule_format(schedule, text):
    """Steps have no point, fractions have one, and every digit is kept; a format spec has no effect."""
    assert str(schedule) == f"{schedule}" == f"{schedule:g}" == text
    assert LinearSchedule.parse(text) == schedule


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "1:2:3",
            "'1:2:3' is not a schedule; write start:v0:v1:end, as in 0.0:8:4:1.0 (fractions of the run) or 0:8:4:500",
        ),
        ("1:2:3:4:5", "'1:2:3:4:5' is not a schedule"),
        ("0:x:3:4", "'0:x:3:4' is not a schedule"),
        ("0.0:inf:1:1.0", "the schedule 0.0:inf:1:1.0 needs finite numbers"),
        ("0.0:1:-inf:1.0", "the schedule 0.0:1:-inf:1.0 needs finite numbers"),
        ("nan:1:1:1.0", "the schedule nan:1:1:1.0 needs finite numbers"),
        ("0.0:1:1:1.5", "the schedule 0.0:1:1:1.5 has a decimal point in an end, so both are fractions of the run"),
        ("-0.5:1:1:1.0", "the schedule -0.5:1:1:1.0 has a decimal point in an end"),
        ("-1:1:1:1", "the schedule -1:1:1:1 must start and end at whole steps from 0 on"),
        ("5:1:2:5", "the schedule 5:1:2:5 must end after it starts"),
        ("0.5:1:2:0.5", "the schedule 0.5:1:2:0.5 must end after it starts"),
    ],
)
def test_parse_bad_schedule(text, sentence):
    """The message has the schedule and the reason."""
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        LinearSchedule.parse(text)


def test_schedule_made_in_python():
    """Ends are fractions unless steps are chosen; steps are whole; 0 and 1 are allowed."""
    assert LinearSchedule(0, 1, 2, 1).fractions
    for start, end in ((0.5, 3), (0, 2.5)):
        with pytest.raises(UserError, match="whole steps from 0 on"):
            steps(start, 1, 2, end)
    with pytest.raises(dataclasses.FrozenInstanceError):
        LinearSchedule(0, 1, 2, 1).first = 3


def test_value_at_step():
    """Steps depend on the step, fractions on the progress, and a plain number on neither."""
    by_step, by_part = steps(2, 10, 20, 4), LinearSchedule(0.25, 10, 20, 0.75)
    assert [by_step.at(step, 0.5) for step in (1, 2, 3, 4, 5)] == [10, 10, 15, 20, 20]
    assert [by_part.at(3, progress) for progress in (0, 0.25, 0.5, 0.75, 1)] == [10, 10, 15, 20, 20]
    assert [value_at(value, 3, 0.375) for value in (by_step, by_part, 7.0)] == [15, 12.5, 7]
    for rising in (by_step, steps(2, 20, 10, 4)):
        assert (largest(rising), smallest(rising)) == (20, 10)
    assert (largest(3.0), smallest(3.0)) == (3, 3)


@pytest.mark.parametrize(
    ("low", "high", "below"),
    [
        (1.0, 1.0, False),
        (1.5, 1.0, True),
        (steps(0, 1, 5, 9), steps(0, 1, 5, 9), False),
        (steps(0, 2, 5, 9), steps(0, 1, 6, 9), True),  # at the start
        (steps(0, 1, 6, 9), steps(0, 2, 5, 9), True),  # at the end
        (steps(0, 1, 5, 9), steps(0, 4, 6, 8), True),  # of other ends the extremes count
        (steps(0, 1, 5, 9), steps(1, 4, 6, 9), True),
        (steps(0, 1, 5, 1), LinearSchedule(0, 4, 6, 1), True),
        (steps(0, 1, 4, 9), steps(1, 4, 6, 9), False),
        (steps(0, 1, 5, 9), 5.0, False),
        (steps(0, 1, 5, 9), 4.5, True),
        (5.0, steps(0, 5, 9, 9), False),
        (5.5, steps(0, 5, 9, 9), True),
    ],
)
def test_ever_below_at_both_ends(low, high, below):
    """Schedules with the same ends are compared at both, others by their extremes."""
    assert ever_below(low, high) is below


def test_values_at_section():
    """Plain numbers are left out, and each schedule has its value at the step."""

    @dataclasses.dataclass
    class Section:
        one: object
        two: object
        three: object = 3.0

    section = Section(steps(0, 0, 10, 10), LinearSchedule(0, 0, 10, 1))
    assert values_at(section, 5, 0.25) == {"one": 5, "two": 2.5}
