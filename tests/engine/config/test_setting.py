"""Fields that are flags: their types and bounds, at each border."""

import dataclasses
import re
from dataclasses import dataclass

import pytest

from dream_fast.engine.config.schedule import LinearSchedule, Scalar
from dream_fast.engine.config.setting import (
    LARGEST,
    SMALLEST,
    ConfigSection,
    Range,
    ScalarRange,
    setting,
    value_type,
)
from dream_fast.engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sample(ConfigSection):
    """A field of each kind."""

    count: int = setting(3, "a count", low=1, high=5)
    big: int = setting(0, "up to 4e9", low=0, high=4 * 10**9)
    number: float = setting(0.5, "open on both sides", above=0, below=2)
    free: float = setting(0.5, "without bounds")
    maybe: float | None = setting(None, "a number or nothing", low=1)
    words: str = setting("a", "never empty")
    blank: str = setting("", "may be empty")
    switch: bool = setting(False, "on or off")
    place: str = setting("cpu", "where", choices=("cpu", "cuda", "cuda:N", "v1.5"))
    many: tuple[str, ...] = setting(("a",), "some", choices=("a", "b"))
    span: Range = setting((0.0, 1.0), "two numbers", low=0)
    scalar: Scalar = setting(0.5, "a number or a schedule", low=0, high=1)
    grad_clip: Scalar = setting(-1.0, "a limit, or -1", low=-1, is_limit=True)
    scalars: ScalarRange = setting((0.0, 1.0), "two numbers or schedules", low=0, high=2)


UP, DOWN = LinearSchedule(0.0, 0.25, 0.75, 1.0), LinearSchedule(0.0, 0.75, 0.25, 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("count", value) for value in (1, 5)],
        *[("big", value) for value in (0, 4 * 10**9)],
        *[("number", value) for value in (SMALLEST, 1, 1.9999)],
        *[("free", value) for value in (LARGEST, -LARGEST, 0, 1e-12)],
        *[("maybe", value) for value in (None, 1.0)],
        *[("blank", value) for value in ("", " ")],
        *[("place", value) for value in ("cuda", "cuda:0", "cuda:7", "cuda:10", "cuda:9999", "v1.5")],
        *[("many", value) for value in (("b",), ("a", "b", "a"))],
        *[("span", value) for value in ((0, 0), (1.5, 1.5), (0.0, 9))],
        *[("scalar", value) for value in (0, 1, UP, LinearSchedule(0, 0.0, 1.0, 5, fractions=False))],
        *[("grad_clip", value) for value in (-1, 0.0, UP)],
        *[("scalars", value) for value in ((UP, UP), (UP, 0.75), (0.25, UP), (1, 1))],
        ("switch", True),
    ],
)
def test_check_value_at_bound(name, value):
    """Closed bounds include their value, open ones exclude it."""
    assert getattr(Sample(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("count", 0, "must be at least 1, not 0"),
        ("count", 6, "must be at most 5, not 6"),
        ("count", None, "takes a whole number, not None"),
        ("count", True, "takes a whole number, not True"),
        ("count", "3", "takes a whole number, not '3'"),
        ("count", 2**63, "is too large a number"),
        ("count", -(2**63), "is too large a number"),
        ("count", 2**63 - 1, f"must be at most 1e+09, not {2**63 - 1}"),
        ("big", 4 * 10**9 + 1, "must be at most 4000000000, not 4000000001"),
        ("number", 0, "must be more than 0, not 0"),
        ("number", 2, "must be less than 2, not 2"),
        ("number", SMALLEST / 2, "must be at least 1e-09, not 5e-10"),
        ("number", False, "takes a number, not False"),
        ("free", 1.01e9, "must be at most 1e+09, not 1.01e+09"),
        ("free", -1.01e9, "must be at most 1e+09 either way, not -1.01e+09"),
        ("free", float("-inf"), "must be a finite number, not -inf"),
        ("maybe", 0.5, "must be at least 1, not 0.5"),
        ("maybe", "x", "takes a number, not 'x'"),
        ("words", "", "is empty"),
        ("words", " \n", "is empty"),
        ("words", 3, "takes text, not 3"),
        ("words", "a\ud800", "is not text in UTF-8: 'a\\ud800'"),
        ("words", "\udfffa", "is not text in UTF-8: '\\udfffa'"),
        ("switch", 1, "takes true or false, not 1"),
        ("many", (), "needs at least one value"),
        ("many", "a", "takes a list of words, not 'a'"),
        ("many", ("a", 1), "takes a list of words, not ('a', 1)"),
        ("many", ("a", "c"), "is one of a, b, not 'c'"),
        ("span", (1.0, 2.0, 3.0), "takes two numbers, not (1.0, 2.0, 3.0)"),
        ("span", [1.0, 2.0], "takes two numbers, not [1.0, 2.0]"),
        ("span", (0.5, UP), f"takes two numbers, not {(0.5, UP)!r}"),
        ("span", (2.5, 2), "is reversed: its lower end 2.5 is more than its upper end 2"),
        ("span", (-1, 2), "must be at least 0, not -1"),
        ("scalar", "0.5", "takes a number or a schedule start:v0:v1:end, not '0.5'"),
        ("scalar", True, "takes a number or a schedule start:v0:v1:end, not True"),
        ("scalar", LinearSchedule(0.0, 0.5, 1.5, 1.0), "must be at most 1, not 1.5"),
        ("scalar", LinearSchedule(0.0, -0.5, 0.5, 1.0), "must be at least 0, not -0.5"),
        ("grad_clip", LinearSchedule(0.0, 0.0, 1.0, 1.0), "as a schedule takes limits above 0, not 0.0:0:1:1.0"),
        ("grad_clip", LinearSchedule(0.0, 1.0, -1.0, 1.0), "as a schedule takes limits above 0, not 0.0:1:-1:1.0"),
        ("scalars", (1.0,), "takes two numbers, or schedules start:v0:v1:end, not (1.0,)"),
        ("scalars", (1.5, 1.25), "is reversed: its lower end 1.5 is more than its upper end 1.25"),
        ("scalars", (UP, 0.5), "may be reversed during the run: from 0.0:0.25:0.75:1.0 to 0.5"),
        ("scalars", (0.5, DOWN), "may be reversed during the run: from 0.5 to 0.0:0.75:0.25:1.0"),
    ],
)
def test_check_value_past_bound(name, value, sentence):
    """The message has the flag, the bound and the value."""
    with pytest.raises(UserError, match=f"^{re.escape(f'--{name} {sentence}')}"):
        Sample(**{name: value})


@pytest.mark.parametrize(
    "word", ["", "cuda:", "cuda:01", "cuda:10000", "cuda:-1", "cuda:N", "xcuda:1", "cuda:1x", "cpu2", "v1x5", "CUDA"]
)
def test_check_value_choice(word):
    """The N of a choice is a whole number of up to four digits, and a choice matches whole words."""
    with pytest.raises(UserError, match=f"^--place is one of cpu, cuda, cuda:N, v1.5, not {re.escape(repr(word))}$"):
        Sample(place=word)


def test_setting_metadata():
    """Default, help and bounds are stored; by default there are none, and a resumed run may not change it."""
    nothing = dict(choices=None, low=None, above=None, high=None, below=None, resumable=False, backbones=None)
    nothing |= dict(is_limit=False, aliases=())
    bare = setting(0.5, "a number")
    assert bare.default == 0.5 and dict(bare.metadata) == nothing | {"help": "a number"}
    options = dict(choices=("a",), low=1, above=2, high=3, below=4, resumable=True, backbones=("grid",))
    options |= dict(is_limit=True, aliases=("b",))
    assert dict(setting("a", "a word", **options).metadata) == options | {"help": "a word"}
    kinds = {field.name: value_type(field) for field in dataclasses.fields(Sample)}
    assert (kinds["maybe"], kinds["scalar"], kinds["span"], kinds["count"]) == (float, Scalar, Range, int)
