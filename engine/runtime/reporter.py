"""What a person sees of a run: lines on the terminal and in log.txt, a live bar, the table of files at the end."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dream_fast.engine.text import one_line

T = TypeVar("T")

QUIET_SECONDS = 15.0  # between two lines where there is no terminal to draw a bar on


class Reporter:
    """Says things once, on the console and in the log. Until ``open_log`` the lines wait: no file is made before."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._log: Path | None = None
        self._waiting: list[str] = []

    def open_log(self, path: Path) -> None:
        self._log = path
        for line in self._waiting:
            self._write(line)
        self._waiting.clear()

    def say(self, line: str) -> None:
        """Says ``line``; what would steer the terminal in it is shown, as are long prompts in part."""
        line = "\n".join(one_line(part) for part in line.split("\n"))
        self.console.print(line, markup=False, emoji=False, soft_wrap=True)
        self._write(line)

    def warn(self, line: str) -> None:
        self.say(f"warning: {line}")

    @contextmanager
    def bar(self, what: str, total: int, done: int = 0) -> Iterator["Bar"]:
        """A ``Bar`` of ``total`` steps: drawn on a terminal, a line now and then elsewhere."""
        if not self.console.is_terminal:
            yield QuietBar(self, what, total, done)
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
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            yield LiveBar(progress, progress.add_task(what, total=total, completed=done, speed="", terms=""))

    def files(self, files: Sequence[Path]) -> None:
        """The table of what there is now, with sizes."""
        table = Table("file", "size", box=None, pad_edge=False, header_style="bold")
        table.columns[1].justify = "right"
        for path in files:
            size = _size(path.stat().st_size)
            table.add_row(Text(str(path)), size)
            self._write(f"{path} {size}")
        self.console.print(table, soft_wrap=True)

    def _write(self, line: str) -> None:
        if self._log is None:
            self._waiting.append(line)
            return
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


class Bar:
    """What both bars do: ``advance`` to a number of steps done, ``show`` how it goes."""

    def advance(self, done: int) -> None:
        raise NotImplementedError

    def show(self, what: str, per_second: float, terms: Mapping[str, float | None]) -> None:
        raise NotImplementedError

    def count(self, items: Iterable[T]) -> Iterator[T]:
        """``items``, each advancing the bar by one once it has been used."""
        for done, item in enumerate(items, start=1):
            yield item
            self.advance(done)


class LiveBar(Bar):
    """Drawn in place by rich."""

    def __init__(self, progress: Progress, task):
        self._progress, self._task = progress, task

    def advance(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def show(self, what: str, per_second: float, terms: Mapping[str, float | None]) -> None:
        self._progress.update(self._task, description=what, speed=f"{per_second:.2f} it/s", terms=format_terms(terms))


class QuietBar(Bar):
    """For a file or a pipe: a line every ``QUIET_SECONDS`` and one when all is done."""

    def __init__(self, reporter: Reporter, what: str, total: int, done: int):
        self._reporter, self._what, self._total, self._done = reporter, what, total, done
        self._speed, self._terms = 0.0, ""
        self._said = time.monotonic()

    def advance(self, done: int) -> None:
        self._done = done
        if done < self._total and time.monotonic() - self._said < QUIET_SECONDS:
            return
        self._said = time.monotonic()
        line = f"{self._what}: {self._done}/{self._total}"
        if self._speed:
            left = (self._total - self._done) / self._speed
            line += f", {self._speed:.2f} it/s, {left:.0f} s left, {self._terms}"
        self._reporter.say(line)

    def show(self, what: str, per_second: float, terms: Mapping[str, float | None]) -> None:
        self._what, self._speed, self._terms = what, per_second, format_terms(terms)


def format_terms(terms: Mapping[str, float | None]) -> str:
    """ "guidance 12.3  opacity 0.2"; a term without a finite value has none."""
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
    """Warnings that our modules log (a truncated prompt) are said where the rest is said."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reporter.warn(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("dream_fast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
