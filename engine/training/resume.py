"""Resume a run from the newest checkpoint that is not damaged."""

from pathlib import Path

from dream_fast.engine.config.schema import Config
from dream_fast.engine.errors import UserError
from dream_fast.engine.runtime.paths import expand_user
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.checkpoint import Damaged, list_checkpoints
from dream_fast.engine.workspace.folder import Workspace


def resume(trainer: Trainer, workspace: Workspace, reporter: Reporter) -> list[Path]:
    """Load the checkpoint to start from into `trainer`, if there is one. Return newer ones that are damaged.

    Raises UserError: when the only checkpoint, or that of `--ckpt`, is damaged, or `--test` finds none.
    """
    candidates = _find_checkpoints(trainer.config, workspace)
    damaged: list[Path] = []
    while candidates:
        path = candidates.pop()
        try:
            trainer.load(path)
            return damaged
        except Damaged as error:
            if not candidates:
                raise
            damaged.append(path)
            reporter.warn(f"{error}: the run resumes from {candidates[-1].name}")
    return damaged


def _find_checkpoints(config: Config, workspace: Workspace) -> list[Path]:
    """Return the checkpoints to start from, the best one last; none to start at the beginning."""
    stored = list_checkpoints(workspace.checkpoints)
    if config.run.ckpt not in ("latest", "scratch"):
        path = expand_user(config.run.ckpt)
        if stored and not config.run.test and path.resolve() not in [other.resolve() for other in stored]:
            raise UserError(
                f"--ckpt {path} would replace the run that --workspace {workspace.path} holds; leave it out to resume "
                "that run, or choose another --workspace"
            )
        return [path]
    candidates = stored if config.run.ckpt == "latest" else []
    if config.run.test and not candidates:
        raise UserError(f"--test needs a checkpoint, and --workspace {workspace.path} has none yet")
    return candidates
