"""What the machine does to a run, as one sentence with the way on: a disk that is full or gone, a GPU whose
memory is."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dream_fast.engine.config.schema import Config
from dream_fast.engine.errors import UserError
from dream_fast.engine.training.divergence import memory_sentence
from dream_fast.engine.workspace.checkpoint import list_checkpoints, step_of
from dream_fast.engine.workspace.folder import Workspace

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a disk says, wherever the file is that it says it of.
DISK = (*FULL, errno.EIO, errno.EROFS, errno.ESTALE)


@contextmanager
def disk_troubles(target: Workspace, workspace: Workspace) -> Iterator[None]:
    """Turns an error of the system about the files in ``target`` into a UserError that says how to go on.

    ``workspace`` is the run's, the same folder unless the outputs go elsewhere.
    """
    try:
        yield
    except OSError as error:
        target.check_there()
        if error.errno not in DISK and not _inside(error.filename, target.path):
            raise
        what = "there is no room left for" if error.errno in FULL else "the system refuses to write"
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"{what} {target.named} ({reason}); {way_on(workspace)}") from error


@contextmanager
def memory_troubles(config: Config, workspace: Workspace) -> Iterator[None]:
    """Turns a lack of GPU memory outside the steps (loading a model, pictures at the end) into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(memory_sentence(config, error, way_on(workspace))) from error


def way_on(workspace: Workspace) -> str:
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
