"""Compare the speed of this tree with an earlier commit. `python -m dream_fast.bench timing --base REF`.

Every operator on a CPU and a whole step with dream-mini run in two processes, one on each commit's `kernels` and
`engine`; the workloads are this tree's on both sides. The processes take turns (base, new, new, base), so that a
machine that becomes slower or busier does so for both. Each has one thread, and processor time is counted, without
waiting for other programs. The ratio of a workload is the median over the turns. One above 1.25 is measured again by
fresh processes; if it is above 1.25 again, the commit is too slow. Exit status: 0 no workload is too slow, 1 at least
one is, 2 none could be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from dream_fast.bench.results import ROOT
from dream_fast.engine.errors import UserError

LIMIT = 1.25
SAMPLE_SECONDS = 0.02  # the shortest sample, so that clocks and pipes do not count
WORKLOAD_SECONDS = 2.0  # of samples, as far as the numbers of rounds allow
FEWEST_ROUNDS, MOST_ROUNDS = 4, 16


class Side(Protocol):
    """A process on one commit."""

    def prepare(self, name: str) -> str | None:
        """Prepare a workload; returns the reason if that fails, or None."""

    def seconds(self, calls: int) -> float:
        """Processor time of `calls` calls."""


@dataclass(frozen=True)
class Row:
    """A workload: seconds of a call on both sides, their ratio, and the reason if it could not be compared."""

    name: str
    base: float = 0.0
    new: float = 0.0
    ratio: float = 1.0
    missing: str | None = None

    @property
    def slow(self) -> bool:
        return self.ratio > LIMIT


class CannotRun(Exception):
    """This tree fails in a workload."""


def measure_row(name: str, base: Side, new: Side, plant: float = 1.0) -> Row:
    """Turns of both sides: base, new, new, base in each round, and the median of their ratios.

    plant: the new side does this many times the work, to check that a slowdown is noticed.
    Raises CannotRun: when this tree fails in the workload.
    """
    if problem := new.prepare(name):
        raise CannotRun(f"{name}: {problem}")
    if missing := base.prepare(name):
        return Row(name, missing=missing)
    once = max(base.seconds(1), 1e-9)
    calls = 2 * max(1, round(SAMPLE_SECONDS / once / 2))  # even, so that half of the work is a number of calls
    rounds = round(WORKLOAD_SECONDS / (4 * calls * once))
    times = []
    for _ in range(min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS)):
        turns = [side.seconds(round(calls * more)) for side, more in ((base, 1), (new, plant), (new, plant), (base, 1))]
        times += [(turns[0], turns[1]), (turns[3], turns[2])]
    ratio = statistics.median(after / before for before, after in times)
    before, after = (min(column) / calls for column in zip(*times, strict=True))
    return Row(name, before, after, ratio)


def compare(
    names: list[str],
    start: Callable[[], tuple[Side, Side]],
    show: Callable[[Row], None],
    plant: float = 1.0,
) -> list[str]:
    """Names of the workloads that are too slow, twice. `start` gives fresh processes (base, new).

    Raises UserError: when no workload could be compared.
    """

    def measure_rows(names: list[str]) -> list[Row]:
        base, new = start()
        rows = []
        for name in names:
            rows.append(measure_row(name, base, new, plant))
            show(rows[-1])
        return rows

    rows = measure_rows(names)
    if all(row.missing for row in rows):
        raise UserError(f"nothing could be compared with the base: {rows[0].name}: {rows[0].missing}")
    slow = [row.name for row in rows if row.slow]
    return [row.name for row in measure_rows(slow) if row.slow] if slow else []


def git(*words: str) -> str:
    """The output of a git command in this tree. Raises UserError: when git fails."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True)
    except OSError as failure:
        raise UserError(f"git does not start ({failure}), and timing compares two commits") from failure
    except subprocess.CalledProcessError as failure:
        reason = (failure.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"git {' '.join(words)}: {reason}") from failure
    return done.stdout.strip()


def default_base() -> str:
    """The commit where this branch left main; on main the one before."""
    for main in ("origin/main", "main"):
        try:
            fork = git("merge-base", "HEAD", main)
        except UserError:
            continue
        if fork != git("rev-parse", "HEAD"):
            return fork
    return git("rev-parse", "HEAD~1")


@contextmanager
def two_trees(base: str) -> Iterator[tuple[Path, Path]]:
    """Folders to import `dream_fast` from: the base's with this tree's bench, and this tree's."""
    commit = git("rev-parse", "--verify", "--end-of-options", f"{base}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="timing-") as name:
        folder = Path(name)
        tree = folder / "base" / "dream_fast"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            if (tree / "bench").exists():
                shutil.rmtree(tree / "bench")
            (tree / "bench").symlink_to(ROOT / "bench")
            (folder / "new").mkdir()
            (folder / "new" / "dream_fast").symlink_to(ROOT)
            yield folder / "base", folder / "new"
        finally:
            git("worktree", "remove", "--force", str(tree))


class Process:
    """The process of a side, which ends with the `with` block."""

    def __init__(self, folder: Path) -> None:
        # Hashes determine the order of sets: the same ones on both sides.
        steady = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dream_fast.bench.regression.timing_side"],
            env=os.environ | steady | {"PYTHONPATH": str(folder)},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def _ask(self, **request: Any) -> dict[str, Any]:
        with suppress(BrokenPipeError):
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        line = self._answers.readline()
        if not line:
            raise CannotRun(f"a process ended with status {self._process.wait()}; its message is above")
        return json.loads(line)

    def prepare(self, name: str) -> str | None:
        return self._ask(prepare=name)["missing"]

    def seconds(self, calls: int) -> float:
        return self._ask(calls=calls)["seconds"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self._requests.close()
        self._process.wait()
        self._answers.close()


def format_row(row: Row) -> str:
    """A row for the terminal; a slow one is repeated at the end, from fresh processes."""
    if row.missing:
        return f"{row.name:44} not in the base: {row.missing}"
    verdict = f"  over {LIMIT}" if row.slow else ""
    return f"{row.name:44} {1e3 * row.base:9.3f} {1e3 * row.new:9.3f} {row.ratio:6.2f}{verdict}"


HEAD = f"{'workload':44} {'base ms':>9} {'new ms':>9} {'ratio':>6}"


def main(argv: list[str] | None = None) -> int:
    from dream_fast.bench.regression.timing_side import list_workloads

    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench timing", description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="commit, branch or tag to compare with (default: where this branch left main)")
    parser.add_argument("--only", action="append", metavar="WORD", help="only workloads with this word (repeatable)")
    parser.add_argument(
        "--plant", type=float, default=1.0, help="do the new side's work this many times, to check that it is noticed"
    )
    args = parser.parse_args(argv)
    names = [name for name in list_workloads() if not args.only or any(word in name for word in args.only)]
    if not names:
        print(f"error: --only: no such workload; there are: {', '.join(list_workloads())}", file=sys.stderr)
        return 2
    try:
        commit = args.base or default_base()
        print(f"base: {git('log', '-1', '--format=%h %s', '--end-of-options', commit)}\n{HEAD}", flush=True)
        with two_trees(commit) as trees, ExitStack() as stack:

            def start() -> tuple[Side, Side]:
                stack.pop_all().close()
                base, new = (stack.enter_context(Process(tree)) for tree in trees)
                return base, new

            slow = compare(names, start, lambda row: print(format_row(row), flush=True), args.plant)
    except (UserError, CannotRun) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2 if isinstance(failure, UserError) else 1
    print(f"too slow, twice: {', '.join(slow)}" if slow else f"nothing takes {LIMIT} times as long as the base, twice")
    return int(bool(slow))
