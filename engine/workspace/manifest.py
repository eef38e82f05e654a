"""The manifest of a run: its command, seed, machine, versions and commit, so that it can be repeated."""

import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import dream_fast
from dream_fast import __version__
from dream_fast.engine.config.schema import Config
from dream_fast.engine.runtime.device import Runtime, machine

OUTPUTS_STEP = "outputs_of_step"  # the step of the outputs that are there
PACKAGES = ("torch", "triton", "diffusers", "transformers", "xformers", "safetensors", "numpy")


def make_manifest(
    config: Config, runtime: Runtime, models: str, attention: object, earlier: Mapping[str, Any], step: int
) -> dict[str, Any]:
    """Return the manifest of a run at its start. Each command that continues it adds to the `earlier` manifest."""
    this_run = {
        "command": shlex.join(["dream-fast", *sys.argv[1:]]),
        "started": _now(),
        "from_step": step,
        "to_step": config.run.iters,
        "device": runtime.description,
        "attention": None if attention is None else str(attention),
        "machine": machine(),
        "versions": _versions(),
        "git": _git_revision(),
    }
    return {
        "text": config.run.text,
        "seed": config.run.seed,
        "model": models,
        OUTPUTS_STEP: earlier.get(OUTPUTS_STEP, step),
        "runs": [*earlier.get("runs", []), this_run],
    }


def finish_manifest(manifest: dict[str, Any], times: Sequence[float], peak_bytes: dict[str, int]) -> None:
    """Add the end of the run: `times` in seconds at its start, its first step, after its last step, and at its end."""
    parts = zip(("start", "steps", "outputs"), pairwise(times), strict=True)
    manifest["runs"][-1] |= {
        "finished": _now(),
        "seconds": round(times[-1] - times[0], 1),
        "seconds_of": {part: round(end - begin, 1) for part, (begin, end) in parts},
        "peak_bytes": peak_bytes,
    }


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    versions: dict[str, str | None] = {"dream_fast": __version__, "python": platform.python_version()}
    # Of a build for CUDA the package's version may lack what `torch.__version__` ends with: +cu130.
    return versions | {package: version(package) for package in PACKAGES} | {"torch": torch.__version__}


def _git_revision() -> str | None:
    """Return the commit that this code was checked out at ("-dirty" with changes); None for an installed package."""
    root = Path(dream_fast.__file__).parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git program, or no commit yet
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
