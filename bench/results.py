"""The folder of results, and the files in it: header, rows, reading and writing.

`python -m dream_fast.bench kernels` writes the header and the rows of the operators into the file of a GPU, and
`bench step` the rows of whole steps into the same file. Each replaces its own rows. The commit of a step is stored
with its case, since the rows of one file may come from different days.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SCHEMA = 1
ROOT = Path(__file__).parents[1]
IN_REPOSITORY = (ROOT / "pyproject.toml").is_file()
# Commands write here unless `--out` names another place.
RESULTS = ROOT / "bench" / "results" if IN_REPOSITORY else Path.cwd()
STEP = "sds_step"  # the operator of a row that measures a whole step
# Operators whose references were captured in a CUDA graph as well, in files without the field `call`.
CAPTURED_REFERENCES = ("group_norm_silu", "bias_residual")
SETUP = ("torch", "triton", "driver", "git_sha", "dirty")  # rows of two calls are merged where these are equal


def git_state() -> tuple[str, bool | None]:
    """Commit, and whether the tree differs from it; ("unknown", None) outside of a repository.

    The environment variable GIT_STATE ("SHA" or "SHA-dirty") overrides both, for a copy without git.
    """
    if state := os.environ.get("GIT_STATE"):
        return state.removesuffix("-dirty"), state.endswith("-dirty")
    try:
        git = ["git", "-C", str(ROOT)]
        sha = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
        return sha, bool(changes.strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def driver_version() -> str | None:
    """The version of NVIDIA's driver, or None."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def header(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit of a measurement, and the rates (bytes and FLOPs a second) that floors rest on."""
    import torch

    from dream_fast.bench import measure

    try:
        import triton
    except ModuleNotFoundError:
        triton = None
    sha, dirty = git_state()
    cuda = device.type == "cuda"
    return {
        "schema": SCHEMA,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": driver_version() if cuda else None,
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "git_sha": sha,
        "dirty": dirty,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "copy_rate": round(measure.copy_rate(device)),
        "matmul_rate": round(measure.matmul_rate(device)),
    }


def file_name(gpu: str | None) -> str:
    """Name of a GPU's file: nvidia-h100-80gb-hbm3.json for "NVIDIA H100 80GB HBM3"."""
    return "-".join((gpu or "cpu").lower().split()) + ".json"


def read(path: Path, gpu: str | None) -> dict[str, Any]:
    """The stored result; empty where there is none, or one of another GPU."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return stored if stored.get("gpu") == gpu else {}


def write(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write header and rows, one row a line for the sake of diffs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}\n", encoding="utf-8")


def call_of(row: dict[str, Any]) -> str:
    """Return how the calls of a row were timed: `graph`, replayed from a CUDA graph, or `eager`, from Python.

    Files of earlier versions lack this field.
    """
    captured = row["impl"] == "triton" or row["op"] in CAPTURED_REFERENCES
    return row.get("call", "graph" if captured else "eager")


def _identity(row: dict[str, Any]) -> tuple[str, ...]:
    return (*(row[name] for name in ("op", "case", "mode", "dtype", "impl")), call_of(row))


def write_kernels(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write rows of operators. Stored ones of the same clean commit stay, and so do those of whole steps."""
    before = read(path, head["gpu"])
    measured = {_identity(row): row for row in rows}
    steps = [row for row in before.get("rows", []) if row["op"] == STEP]
    others = [row for row in before.get("rows", []) if row["op"] != STEP]
    if head["dirty"] or any(before.get(name) != head[name] for name in SETUP):
        others = []
    others = [measured.pop(_identity(row), row) for row in others]  # each in its place
    write(path, head | ({"steps": before["steps"]} if steps else {}), [*others, *measured.values(), *steps])


def write_steps(path: Path, head: dict[str, Any], rows: list[dict[str, Any]], measured: Callable[[str], bool]) -> None:
    """Write rows of whole steps. Stored ones stay where their case was not `measured`, and so do the operators'."""
    before = read(path, head["gpu"]) or head
    others = [row for row in before.get("rows", []) if row["op"] != STEP or not measured(row["case"])]
    commits = {case: commit for case, commit in before.get("steps", {}).items() if not measured(case)}
    commit = {name: head[name] for name in ("git_sha", "dirty", "utc", "torch", "triton", "driver")}
    commits |= {row["case"]: commit for row in rows}
    rest = {name: value for name, value in before.items() if name not in ("rows", "steps")}
    write(path, rest | {"steps": commits}, others + rows)
