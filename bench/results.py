"""The file of results: rows of several measurements in one place, each replacing its own.

`python -m dream_fast.bench kernels` writes the head and the rows of the operators, `bench step` the rows of whole steps
beside them; a commit stands beside each case of a step, since the rows may come from different days.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEP = "sds_step"
SAME = ("torch", "triton", "driver", "git_sha", "dirty")  # where these are equal, rows of two calls go together


def read(path: Path, gpu: str | None) -> dict[str, Any]:
    """What is there of the same GPU, or nothing."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if found.get("gpu") == gpu else {}


def write(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One row a line, so that a change reads well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}\n", encoding="utf-8")


def _names(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("op", "case", "mode", "dtype", "impl"))


def write_kernels(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Replaces the rows of these names, and all those of another commit, but for whole steps."""
    before = read(path, head["gpu"])
    measured = {_names(row): row for row in rows}
    steps = [row for row in before.get("rows", []) if row["op"] == STEP]
    others = [row for row in before.get("rows", []) if row["op"] != STEP]
    if head["dirty"] or any(before.get(name) != head[name] for name in SAME):
        others = []
    others = [measured.pop(_names(row), row) for row in others]  # each in its place
    write(path, head | ({"steps": before["steps"]} if steps else {}), [*others, *measured.values(), *steps])


def write_steps(path: Path, head: dict[str, Any], rows: list[dict[str, Any]], measured: Callable[[str], bool]) -> None:
    """Replaces the rows of steps whose case was ``measured``, keeps the others and those of the operators."""
    before = read(path, head["gpu"]) or head
    kept = [row for row in before.get("rows", []) if row["op"] != STEP or not measured(row["case"])]
    commits = {case: commit for case, commit in before.get("steps", {}).items() if not measured(case)}
    commit = {name: head[name] for name in ("git_sha", "dirty", "utc", "torch", "triton", "driver")}
    commits |= {row["case"]: commit for row in rows}
    rest = {name: value for name, value in before.items() if name not in ("rows", "steps")}
    write(path, rest | {"steps": commits}, kept + rows)
