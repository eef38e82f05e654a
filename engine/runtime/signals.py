"""How a run ends before its time: Ctrl-C (SIGINT) or a request to terminate (SIGTERM).

While steps are taken the first signal lets the step finish and be saved; the next one is the system's to handle, which
ends the process at once, whatever it is doing, and so leaves the checkpoint before it whole. Outside the steps there is
nothing to finish. Exit status: 130 and 143, as a shell has them.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = b"\ndream-fast: finishing this step and saving; the same once more leaves at once\n"


class Stopped(KeyboardInterrupt):
    """The run was asked to end by the signal ``number``; ``status`` is the exit status that says so."""

    def __init__(self, number: int):
        super().__init__(number)
        self.status = 128 + number


class StopRequest:
    """Whether a signal came, and which."""

    number: int | None = None

    def check(self) -> None:
        """Raises Stopped if one came."""
        if self.number is not None:
            raise Stopped(self.number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # no other may handle signals


@contextmanager
def _handled(numbers: tuple[int, ...], handler: Any) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def stop_after_current_step() -> Iterator[StopRequest]:
    """Inside the `with` block the first signal is noted, for the loop to end after its step, and no second one is."""
    stop = StopRequest()
    if not _in_main_thread():
        yield stop
        return

    def note(number: int, frame: Any) -> None:
        stop.number = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, _NOTE)  # print may be in the middle of another line

    with _handled(SIGNALS, note):
        yield stop


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside the `with` block SIGTERM raises Stopped, as SIGINT raises KeyboardInterrupt, so that files are tidied."""
    if not _in_main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        raise Stopped(number)

    with _handled((signal.SIGTERM,), leave):
        yield
