"""End a run early by Ctrl-C (SIGINT) or a request to terminate (SIGTERM).

During the steps, the first signal ends the run after the current step, with a checkpoint. A second one has the system's
default effect: it ends the process at once and leaves the last checkpoint whole. Outside the steps a signal ends the
run at once. The exit status is 130 or 143, as a shell has it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = b"\ndream-fast: finishing this step and saving; the same signal again ends the run at once\n"


class Stopped(KeyboardInterrupt):
    """Raised when the signal `number` ends the run; `status` is the exit status for it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.status = 128 + number


class StopRequest:
    """Request to stop, by the signal `number`; None: no signal has come."""

    number: int | None = None

    def check(self) -> None:
        """Raises Stopped: when a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # other threads must not handle signals


@contextmanager
def _handled(numbers: tuple[int, ...], handler: Any) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


@contextmanager
def stop_after_current_step() -> Iterator[StopRequest]:
    """Inside the `with` block, record the first signal, so that the loop can end after its step; not a second one."""
    stop = StopRequest()
    if not _in_main_thread():
        yield stop
        return

    def record(number: int, frame: Any) -> None:
        stop.number = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, _NOTICE)  # print could be in the middle of another line

    with _handled(SIGNALS, record):
        yield stop


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside the `with` block, SIGTERM raises Stopped, as SIGINT raises KeyboardInterrupt, so that clean-up runs."""
    if not _in_main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    with _handled((signal.SIGTERM,), stop):
        yield
