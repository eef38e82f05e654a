"""The timer on a CPU, with a clock that the test moves."""

from types import SimpleNamespace

import pytest
import torch

from dream_fast.bench import measure

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """The timer's clock: `clock.now` in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def advance(clock, seconds):
    """A call that takes so many seconds."""

    def call():
        clock.now += seconds

    return call


def test_time_once(clock):
    """A single call is timed in milliseconds, without a warm-up."""
    assert measure.time_once(advance(clock, 0.25), CPU) == pytest.approx(250)
    assert clock.now == 0.25


def test_time_calls(clock):
    """Several calls are timed in seconds of the given clock."""
    assert measure.time_calls(advance(clock, 0.5), 3, lambda: clock.now) == pytest.approx(1.5)


def test_part_clock(clock):
    """Each part is the time since the mark before it, also when a call is repeated."""
    parts = measure.PartClock("start", ("first", "second"), CPU)
    for seconds in (0.5, 0.25):
        parts.mark("start")
        for name in ("first", "second"):
            clock.now += seconds
            parts.mark(name)
        clock.now += 7.0
        assert parts.read() == {"first": seconds * 1e3, "second": seconds * 1e3}


def test_prepare_synchronous():
    """On a CPU the call is returned unchanged."""
    assert measure.prepare_synchronous(print, CPU) is print
