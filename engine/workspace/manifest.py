"""The manifest of a run: its command, seed, machine, versions and commit, so that it can be repeated."""

import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import dream_fast
from dream_fast import __version__
from dream_fast.engine.config.schema import Config
from dream_fast.engine.runtime.device import Runtime, machine

PACKAGES = ("torch", "triton", "diffusers", "transformers", "xformers", "safetensors", "numpy")


def make_manifest(
    config: Config, runtime: Runtime, models: str, attention: str | None, earlier: list[dict[str, Any]], step: int
) -> dict[str, Any]:
    """What made this run, so that it can be made again; each time it is taken up adds to the ``earlier`` ones."""
    this = {
        "command": shlex.join(["dream-fast", *sys.argv[1:]]),
        "started": now(),
        "from_step": step,
        "to_step": config.run.iters,
        "device": runtime.description,
        "attention": attention,
        "machine": machine(),
        "versions": _versions(),
        "git": _git_revision(),
    }
    return {
        "text": config.run.text,
        "seed": config.run.seed,
        "model": models,
        "runs": [*earlier, this],
    }


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    ours = {"dream_fast": __version__, "python": platform.python_version()}
    return ours | {package: version(package) for package in PACKAGES}


def _git_revision() -> str | None:
    """The commit that this code was checked out at ("-dirty" with changes), or None for an installed package."""
    root = Path(dream_fast.__file__).parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git program, or no commit yet
        return None


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
