"""End a run early by a signal.

| signal | sent by |
|---|---|
| SIGINT, SIGQUIT | Ctrl-C, Ctrl-\\ |
| SIGTERM | kill, a system that shuts down, a scheduler |
| SIGHUP | a terminal or a connection that is closed |
| SIGXCPU | the limit of CPU time |
| SIGUSR1, SIGUSR2 | a scheduler, some time before it kills |

During the steps, the first signal ends the run after the current step, with a checkpoint. A second one of PERSONAL has
the system's default effect: it ends the process at once and leaves the last checkpoint intact. Outside the steps a
signal ends the run at once. The exit status is 128 + the signal's number, as reported by a shell.

A signal that the process ignores (nohup, the background of a script) or that another part of it handles stays theirs.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PERSONAL = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGQUIT") if hasattr(signal, name))
SIGNALS = PERSONAL + tuple(
    getattr(signal, name) for name in ("SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
_NOTICE = b"\ndream-fast: finishing this step and saving; the same signal again ends the run at once\n"


class Stopped(KeyboardInterrupt):
    """Raised when the signal `number` ends the run; `status` is the exit status for it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.status = 128 + number


class _Handler:
    """Handler of the SIGNALS of a run."""

    def __call__(self, number: int, frame: Any) -> None:
        raise Stopped(number)


class StopRequest(_Handler):
    """Request to stop, by the signal `number`; None: no signal has come."""

    number: int | None = None

    def check(self) -> None:
        """Raises Stopped: when a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)

    def __call__(self, number: int, frame: Any) -> None:
        """Record the first signal. A second one of PERSONAL has its default effect."""
        if number in PERSONAL:  # before the notice, whose reader may answer at once
            for each in PERSONAL:
                if signal.getsignal(each) is self:
                    signal.signal(each, signal.SIG_DFL)
        if self.number is None:
            self.number = number
            with contextlib.suppress(OSError):  # a terminal that is gone
                os.write(2, _NOTICE)  # print could be in the middle of another line
        elif number in PERSONAL:  # it came while the first one was handled
            os.kill(os.getpid(), number)


def _is_free(number: int) -> bool:
    """True if the run may handle the signal."""
    present = signal.getsignal(number)
    if number in (signal.SIGINT, signal.SIGTERM):
        return present not in (signal.SIG_IGN, None)
    return present is signal.SIG_DFL or isinstance(present, _Handler)


@contextmanager
def _handled(handler: _Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # other threads must not handle signals
        yield
        return
    previous = {number: signal.signal(number, handler) for number in SIGNALS if _is_free(number)}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


@contextmanager
def stop_after_current_step() -> Iterator[StopRequest]:
    """Inside the `with` block, record the first signal, so that the loop can end after its step; not a second one."""
    stop = StopRequest()
    with _handled(stop):
        yield stop


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside the `with` block, each signal raises Stopped, so that clean-up runs."""
    with _handled(_Handler()):
        yield
