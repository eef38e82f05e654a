"""What the machine does to a run, as one sentence with the way on: a disk that is full or gone, a GPU whose
memory is."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dream_fast.engine.config.schema import Config
from dream_fast.engine.errors import UserError
from dream_fast.engine.training.divergence import flags
from dream_fast.engine.workspace.checkpoint import list_checkpoints, step_of
from dream_fast.engine.workspace.folder import Workspace

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a disk says, wherever the file is that it says it of.
DISK = (*FULL, errno.EIO, errno.EROFS, errno.ESTALE)


@contextmanager
def translate_disk_errors(target: Workspace, workspace: Workspace) -> Iterator[None]:
    """Turns an error of the system about the files in ``target`` into a UserError that says how to go on.

    ``workspace`` is the run's, the same folder unless the outputs go elsewhere.
    """
    try:
        yield
    except OSError as error:
        target.check_not_moved()
        if error.errno not in DISK and not _inside(error.filename, target.path):
            raise
        what = "there is no room left for" if error.errno in FULL else "the system refuses to write"
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"{what} {target.named} ({reason}); {resume_hint(workspace)}") from error


@contextmanager
def translate_oom(config: Config, workspace: Workspace) -> Iterator[None]:
    """Turns a lack of GPU memory outside the steps (loading a model, pictures at the end) into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(memory_message(config, error, resume_hint(workspace))) from error


def resume_hint(workspace: Workspace) -> str:
    """What is left of the run, and what takes it up."""
    try:
        saved = list_checkpoints(workspace.checkpoints)
    except OSError:
        saved = []
    if not saved:
        return "no checkpoint was saved yet, so the same command starts over"
    return f"the checkpoint of step {step_of(saved[-1])} is whole, and the same command goes on from it"


def _inside(name: object, folder: Path) -> bool:
    return isinstance(name, str | os.PathLike) and Path(name).absolute().is_relative_to(folder.absolute())


LEAST_SIDE = 32  # pixels of a training render: less shows an image model nothing


def low_memory_overrides(config: Config) -> dict[str, Any]:
    """Settings under which a step takes less memory, and under which the run may be taken up."""
    camera, wanted = config.camera, {}
    if not config.run.vram_O:
        wanted["vram_O"] = True
    if camera.batch_size > 1:
        wanted["batch_size"] = camera.batch_size // 2
    elif min(camera.w, camera.h) > LEAST_SIDE:
        wanted |= {"w": max(LEAST_SIDE, camera.w // 2), "h": max(LEAST_SIDE, camera.h // 2)}
    if config.run.cuda_graph:
        wanted["cuda_graph"] = False
    return wanted


def memory_message(config: Config, error: BaseException, resume_hint: str) -> str:
    """Which flags take less memory, for an error such as torch.cuda.OutOfMemoryError."""
    said = str(error)
    tried = said.partition("Tried to allocate ")[2].split(". ")[0]
    camera, less = config.camera, low_memory_overrides(config)
    now = f"this step: --batch_size {camera.batch_size} --w {camera.w} --h {camera.h}"
    advice = f"give {flags(less)} (" + now + ")" if less else f"a smaller image model or another GPU is needed ({now})"
    asked = f", asked for {tried.rstrip('.')} more" if tried else ""
    return f"the GPU has no memory left{asked}: {advice}; {resume_hint}"
