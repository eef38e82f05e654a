"""Output of a run for people: lines on the terminal and in log.txt, a progress bar, the table of files at the end.

None of it can end a run. Files that cannot be written during a run are collected, and reported at its end.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.files import open_append
from dream_fast.engine.text import escape_controls, one_line

T = TypeVar("T")

QUIET_SECONDS = 15.0  # between two lines of a bar without a terminal
FAILURES_SHOWN = 4  # in the sentence at the end; warnings have named all


class Reporter:
    """Prints lines to the console and to the log. Lines before `open_log` are kept and written then."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._log: Path | None = None
        self._waiting: list[str] = []
        self._failures: dict[Path, str] = {}  # sentences about files that could not be written
        self._may_pass = False  # a failure that another call may not have

    def open_log(self, path: Path) -> None:
        self._log = path
        for line in self._waiting:
            self._write(line)
        self._waiting.clear()

    def say(self, line: str) -> None:
        """Print `line`, with control characters escaped and long prompts cut."""
        line = "\n".join(one_line(row) for row in line.split("\n"))
        with suppress(Exception):  # a terminal without a size, a stream of the caller's
            self.console.print(line, markup=False, emoji=False, soft_wrap=True)
        self._write(line)

    def warn(self, line: str) -> None:
        self.say(f"warning: {line}")

    @contextmanager
    def collect(self, path: Path) -> Iterator[None]:
        """Keep an error inside the `with` block, which writes `path`, for the end of the run, and warn of it once."""
        try:
            yield
        except Exception as error:
            if self._add_failure(path, error):
                self.warn(f"{self._failures[path]}; the run continues")

    def _add_failure(self, path: Path, error: Exception) -> bool:
        """Keep the first error about a path. Return False if there was one."""
        self._may_pass |= not isinstance(error, UserError)
        is_new = path not in self._failures
        self._failures.setdefault(path, _failure(path, error))
        return is_new

    def check_failures(self) -> None:
        """Raises UserError: when files could not be written."""
        if self._failures:
            hint = ["everything else is whole, and the same command writes what is missing"] * self._may_pass
            sentences = list(dict.fromkeys(self._failures.values()))
            more = [f"{len(sentences) - FAILURES_SHOWN} more failed"] * (len(sentences) > FAILURES_SHOWN)
            raise UserError("; ".join([*sentences[:FAILURES_SHOWN], *more, *hint]))

    @contextmanager
    def bar(self, label: str, total: int, completed: int = 0) -> Iterator["Bar"]:
        """A `Bar` of `total` steps: drawn on a terminal, a line every QUIET_SECONDS elsewhere."""
        if not self.console.is_terminal:
            yield QuietBar(self, label, total, completed)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[terms]}", style="dim", markup=False),
        )
        # four redraws a second: more would take time from a two-core machine
        progress = Progress(*columns, console=self.console, refresh_per_second=4)
        with suppress(Exception):
            progress.start()
        try:
            yield LiveBar(progress, progress.add_task(label, total=total, completed=completed, speed="", terms=""))
        finally:
            with suppress(Exception):
                progress.stop()

    def files(self, files: Sequence[Path]) -> None:
        """Print a table of files with their sizes."""
        table = Table("file", "size", box=None, pad_edge=False, header_style="bold")
        table.columns[1].justify = "right"
        for path in files:
            with suppress(OSError):  # removed by another process
                size = _size(path.stat().st_size)
                table.add_row(Text(escape_controls(str(path))), size)
                self._write(f"{escape_controls(str(path))} {size}")
        with suppress(Exception):
            self.console.print(table, soft_wrap=True)

    def _write(self, line: str) -> None:
        if self._log is None:
            self._waiting.append(line)
            return
        try:
            with open_append(self._log) as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        except Exception as error:
            self._add_failure(self._log, error)


def _failure(path: Path, error: Exception) -> str:
    """Return the beginning of a sentence about a file that could not be written."""
    if isinstance(error, UserError):
        return str(error)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return f"{getattr(error, 'filename', None) or path} could not be written ({kind}{reason})"


class Bar:
    """A progress bar."""

    def advance(self, completed: int) -> None:
        """Move to a number of completed steps."""
        raise NotImplementedError

    def show(self, label: str, per_second: float, terms: Mapping[str, float | None]) -> None:
        """Show a label, the speed and numbers by name."""
        raise NotImplementedError

    def count(self, items: Iterable[T]) -> Iterator[T]:
        """Iterate over `items`; the bar advances by one after each."""
        for completed, item in enumerate(items, start=1):
            yield item
            self.advance(completed)


class LiveBar(Bar):
    """A bar that rich draws in place."""

    def __init__(self, progress: Progress, task):
        self._progress, self._task = progress, task

    def advance(self, completed: int) -> None:
        with suppress(Exception):
            self._progress.update(self._task, completed=completed)

    def show(self, label: str, per_second: float, terms: Mapping[str, float | None]) -> None:
        speed = f"{per_second:.2f} it/s"
        with suppress(Exception):
            self._progress.update(self._task, description=label, speed=speed, terms=format_terms(terms))


class QuietBar(Bar):
    """A bar for a file or a pipe: a line every QUIET_SECONDS and one at the end."""

    def __init__(self, reporter: Reporter, label: str, total: int, completed: int):
        self._reporter, self._label, self._total, self._completed = reporter, label, total, completed
        self._speed, self._terms = 0.0, ""
        self._last_line = time.monotonic()

    def advance(self, completed: int) -> None:
        self._completed = completed
        if completed < self._total and time.monotonic() - self._last_line < QUIET_SECONDS:
            return
        self._last_line = time.monotonic()
        line = f"{self._label}: {self._completed}/{self._total}"
        if self._speed:
            left = (self._total - self._completed) / self._speed
            line += f", {self._speed:.2f} it/s, {left:.0f} s left, {self._terms}"
        self._reporter.say(line)

    def show(self, label: str, per_second: float, terms: Mapping[str, float | None]) -> None:
        self._label, self._speed, self._terms = label, per_second, format_terms(terms)


def format_terms(terms: Mapping[str, float | None]) -> str:
    """Format numbers by name, as in "guidance 12.3  opacity 0.2"; None is "not finite"."""
    return "  ".join(f"{name} {'not finite' if value is None else f'{value:.3g}'}" for name, value in terms.items())


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@contextmanager
def log_warnings_to(reporter: Reporter):
    """Inside the `with` block, print warnings that the package logs (such as a cut prompt) by the reporter."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reporter.warn(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("dream_fast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
