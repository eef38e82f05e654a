"""Translate disk and out-of-memory errors into a UserError with instructions to resume."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dream_fast.engine.config.schema import Config
from dream_fast.engine.errors import UserError
from dream_fast.engine.training.divergence import format_flags
from dream_fast.engine.workspace.checkpoint import list_checkpoints, step_of
from dream_fast.engine.workspace.folder import Workspace

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors of a disk, whichever file they name.
DISK_ERRORS = (*NO_SPACE, errno.EIO, errno.EROFS, errno.ESTALE)


@contextmanager
def translate_disk_errors(target: Workspace, workspace: Workspace) -> Iterator[None]:
    """Translate an OSError about the files in `target` into a UserError.

    `workspace` is that of the run, the same folder unless the outputs go elsewhere.
    """
    try:
        yield
    except OSError as error:
        target.check_not_moved()
        if error.errno not in DISK_ERRORS and not _inside(error.filename, target.path):
            raise
        problem = "no space is left for" if error.errno in NO_SPACE else "the system refuses to write"
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"{problem} {target.typed} ({reason}); {resume_hint(workspace)}") from error


@contextmanager
def translate_oom(config: Config, workspace: Workspace) -> Iterator[None]:
    """Translate a lack of memory outside the steps (loading a model, the outputs) into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(memory_message(config, error, resume_hint(workspace))) from error


def is_out_of_memory(error: BaseException) -> bool:
    """True if the memory of the GPU or the machine did not suffice. On a CPU torch raises a RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def resume_hint(workspace: Workspace) -> str:
    """Return the end of an error message: the last checkpoint, and what the same command does with it."""
    try:
        checkpoints = list_checkpoints(workspace.checkpoints)
    except OSError:
        checkpoints = []
    if not checkpoints:
        return "no checkpoint was saved yet, so the same command starts over"
    return f"the checkpoint of step {step_of(checkpoints[-1])} is complete, and the same command resumes from it"


def _inside(name: object, folder: Path) -> bool:
    return isinstance(name, str | os.PathLike) and Path(name).absolute().is_relative_to(folder.absolute())


MIN_RENDER_SIDE = 32  # pixels; smaller training renders show an image model too little


def low_memory_overrides(config: Config) -> dict[str, Any]:
    """Return settings that reduce the memory of a step and that a resumed run may change."""
    camera = config.camera
    overrides: dict[str, Any] = {}
    if not config.run.vram_O:
        overrides["vram_O"] = True
    if camera.batch_size > 1:
        overrides["batch_size"] = camera.batch_size // 2
    elif min(camera.w, camera.h) > MIN_RENDER_SIDE:
        overrides |= {"w": max(MIN_RENDER_SIDE, camera.w // 2), "h": max(MIN_RENDER_SIDE, camera.h // 2)}
    if config.run.cuda_graph:
        overrides["cuda_graph"] = False
    return overrides


def memory_message(config: Config, error: BaseException, resume_hint: str) -> str:
    """Return the message for an error that `is_out_of_memory`, with flags that reduce memory."""
    size = str(error).partition("ried to allocate ")[2].split(". ")[0]
    device = "GPU" if isinstance(error, torch.OutOfMemoryError) else "machine"
    camera, overrides = config.camera, low_memory_overrides(config)
    current = f"this step: --batch_size {camera.batch_size} --w {camera.w} --h {camera.h}"
    advice = f"give {format_flags(overrides)}" if overrides else f"a smaller image model or another {device} is needed"
    requested = f" ({size.rstrip('.')} more were requested)" if size else ""
    return f"the {device} is out of memory{requested}: {advice} ({current}); {resume_hint}"
