"""Schedules of numbers: format, values, refusals and the command line."""

import pytest

from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.schedule import LinearSchedule, ever_below, largest, smallest, value_at, values_at
from dream_fast.engine.config.schema import Config
from dream_fast.engine.errors import UserError


@pytest.mark.parametrize("text", ["0:8:4:500", "0.0:8:4:1.0", "100:0.1:1e-05:400", "0.25:-1.5:2:0.75"])
def test_schedule_round_trip(text):
    result = LinearSchedule.parse(text)
    assert LinearSchedule.parse(str(result)) == result
    assert result.fractions == ("." in text.split(":")[0] + text.split(":")[3])


def test_values_before_between_and_after():
    steps, parts = LinearSchedule.parse("100:2:4:300"), LinearSchedule.parse("0.5:2:4:1.0")
    assert [steps.at(step, 0.9) for step in (0, 100, 150, 300, 999)] == [2, 2, 2.5, 4, 4]
    assert [parts.at(7, progress) for progress in (0.0, 0.5, 0.75, 1.0)] == [2, 2, 3, 4]
    assert (value_at(parts, 0, 0.75), value_at(5.0, 0, 0.75)) == (3, 5.0)
    assert (largest(parts), smallest(parts), largest(5.0)) == (4, 2, 5.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1:2:3", "start:v0:v1:end"),
        ("a:2:3:4", "start:v0:v1:end"),
        ("0:1:2:inf", "finite numbers"),
        ("0:nan:2:10", "finite numbers"),
        ("0.0:1:2:3", "from 0.0 to 1.0"),
        ("-5:1:2:10", "whole steps from 0 on"),
        ("20:1:2:10", "must end after it starts"),
    ],
)
def test_what_is_no_schedule_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        LinearSchedule.parse(text)


def test_ever_below_ranges():
    """Ranges that cross are found, and others are not."""
    low, high = LinearSchedule.parse("0.0:0.02:0.6:1.0"), LinearSchedule.parse("0.0:0.5:0.98:1.0")
    assert not ever_below(low, high)  # side by side all the way, although their extremes overlap
    assert ever_below(low, 0.5) and not ever_below(0.02, high)
    assert ever_below(low, LinearSchedule.parse("0.0:0.5:0.98:0.9"))


def test_only_schedules_have_values_of_a_step():
    config = configure({"text": "a cube", "lambda_orient": LinearSchedule.parse("0:0:1:10")}, "cpu")
    assert values_at(config.loss, 5, 0.0) == {"lambda_orient": 0.5}


def test_a_configuration_keeps_its_schedules():
    upper = LinearSchedule.parse("0:0.98:0.5:300")
    typed = {"text": "a cube", "t_range": (0.02, upper), "grad_clip": LinearSchedule.parse("0.0:1:0.1:1.0")}
    config = configure(typed, "cpu")
    assert Config.from_dict(config.to_dict()) == config
    assert config.to_dict()["guidance"]["t_range"] == (0.02, "0:0.98:0.5:300")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance_scale": LinearSchedule.parse("0:-1:5:10")}, "--guidance_scale must be"),
        ({"grad_clip": LinearSchedule.parse("0:-1:5:10")}, "limits above 0"),
        ({"t_range": (0.4, LinearSchedule.parse("0:0.98:0.2:10"))}, "reversed during the run"),
        ({"iters": LinearSchedule.parse("0:1:2:10")}, "--iters takes a whole number"),
    ],
)
def test_schedule_bounds(changes, words):
    """A schedule obeys the bounds of its setting."""
    with pytest.raises(UserError, match=words):
        reference().override(changes)
