"""Signals end the step, or the run outside the steps; those of others stay theirs."""

import os
import signal
import subprocess
import sys

import pytest

from dream_fast.engine.runtime.signals import PERSONAL, SIGNALS, Stopped, signals_raise, stop_after_current_step


def test_signals_are_all() -> None:
    """Everything that a shell, a terminal, a system or a scheduler sends before it kills."""
    names = {"SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2"}
    assert {number.name for number in SIGNALS} == names and set(PERSONAL) < set(SIGNALS)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_recorded(number: int, capfd) -> None:
    """The first one is recorded and announced; machines may repeat theirs, and send another. The handlers go again."""
    before = [signal.getsignal(each) for each in SIGNALS]
    machine = signal.SIGHUP if number in PERSONAL else number
    with stop_after_current_step() as stop:
        for each in (number, machine, signal.SIGUSR1, signal.SIGXCPU):
            os.kill(os.getpid(), each)
        assert stop.number == number
        expected = signal.SIG_DFL if number in PERSONAL else stop
        assert [signal.getsignal(each) for each in PERSONAL] == [expected] * len(PERSONAL)
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.status == 128 + number and capfd.readouterr().err.count("finishing this step") == 1
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_raises(number: int) -> None:
    """Outside the steps a signal ends the run at once, with its status."""
    with pytest.raises(Stopped) as stopped, signals_raise():
        os.kill(os.getpid(), number)
    assert stopped.value.status == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_ignored_signal_stays_ignored(number: int) -> None:
    """As in the background of a script and under nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals_raise(), stop_after_current_step() as stop:
            os.kill(os.getpid(), number)
            assert stop.number is None
    finally:
        signal.signal(number, before)


def test_handler_of_others_stays() -> None:
    """A program that handles a scheduler's signal itself still gets it."""
    received: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: received.append(number))
    try:
        with signals_raise(), stop_after_current_step() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop.number is None and received == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_notice_on_closed_stream() -> None:
    """A signal of a terminal that is gone is recorded although nothing can be written to it."""
    code = (
        "import os, signal\nfrom dream_fast.engine.runtime.signals import stop_after_current_step\n"
        "with stop_after_current_step() as stop:\n"
        "    os.close(2)\n    os.kill(os.getpid(), signal.SIGHUP)\n    print(stop.number)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(int(signal.SIGHUP))]
