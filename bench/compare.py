"""Compare a run of the benchmark with an earlier one. `python -m dream_fast.bench compare BASE NEW`.

A row is slower when its median grew by more than 5 %, and by more than twice the p20-p80 spread (the wider of the two
runs'). The identity of a row is every field that is not measured; both runs must be of the same GPU. Exit status: 0 no
row is slower, 1 at least one is, 2 the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dream_fast.bench.results import call_of

MEASURED = {"median_ms", "p20_ms", "p80_ms", "floor_ms", "pct_of_floor", "peak_bytes", "max_err", "tol"}
MEASURED |= {"split_ms", "modules_ms", "samples", "attention", "start_s"}  # of a whole step
SHARE = 0.05
SPREADS = 2


class CannotCompare(Exception):
    """The files are not two runs of the same benchmark on the same GPU."""


def load_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        for row in run["rows"]:
            identity(row), row["median_ms"], row["p20_ms"], row["p80_ms"]
        return {**run, "schema": run["schema"], "gpu": run["gpu"]}
    except (OSError, ValueError) as failure:
        raise CannotCompare(f"{path}: {failure}") from failure
    except (KeyError, TypeError, AttributeError) as failure:
        raise CannotCompare(f"{path} is not a result of `bench kernels`: {failure!r}") from failure


def identity(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The fields of a row that are not measured, with the way of calling also where an earlier version lacks it."""
    return tuple(sorted((name, value) for name, value in {**row, "call": call_of(row)}.items() if name not in MEASURED))


def allowed_slowdown(base: dict[str, Any], new: dict[str, Any]) -> float:
    """The slowdown of the median, in ms, that noise explains."""
    spread = max(row["p80_ms"] - row["p20_ms"] for row in (base, new))
    return max(SHARE * base["median_ms"], SPREADS * spread)


def compare(base: dict[str, Any], new: dict[str, Any]) -> tuple[list[tuple[dict, dict]], list[dict]]:
    """Pairs of rows (before, after) that became slower, worst first, and rows of `base` that `new` lacks.

    Raises CannotCompare: when schema or GPU differ, or the files have no row in common.
    """
    for name in ("schema", "gpu"):
        if base[name] != new[name]:
            raise CannotCompare(f"{name} differs: {base[name]} and {new[name]}")
    after = {identity(row): row for row in new["rows"]}
    pairs = [(row, after[identity(row)]) for row in base["rows"] if identity(row) in after]
    if not pairs:
        raise CannotCompare("the files have no row in common")
    slower = [(old, row) for old, row in pairs if row["median_ms"] - old["median_ms"] > allowed_slowdown(old, row)]
    slower.sort(key=lambda pair: pair[0]["median_ms"] / pair[1]["median_ms"])
    return slower, [row for row in base["rows"] if identity(row) not in after]


def format_name(row: dict[str, Any]) -> str:
    return " ".join([*(str(row[field]) for field in ("op", "case", "mode", "dtype", "impl")), call_of(row)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(argv)
    try:
        base, new = load_run(args.base), load_run(args.new)
        slower, missing = compare(base, new)
    except CannotCompare as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    for row in missing:
        print(f"only in {args.base}: {format_name(row)}")
    if not slower:
        print(f"nothing slower among {len(base['rows']) - len(missing)} rows ({base['gpu']})")
        return 0
    print(f"{'slower on ' + str(base['gpu']):70} {'before':>10} {'after':>10} {'change':>8} {'allowed':>8}")
    for old, row in slower:
        before, after = old["median_ms"], row["median_ms"]
        share = 100 * allowed_slowdown(old, row) / before
        print(f"{format_name(row):70} {before:10.4f} {after:10.4f} {100 * (after / before - 1):+7.1f}% {share:7.1f}%")
    return 1
