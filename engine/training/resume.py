"""Resume a run from the newest checkpoint that is not damaged."""

from pathlib import Path

from dream_fast.engine.config.schema import Config
from dream_fast.engine.errors import UserError
from dream_fast.engine.runtime.paths import expand_user
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.checkpoint import Damaged, Foreign, check_belongs, list_checkpoints
from dream_fast.engine.workspace.folder import Workspace


def resume(trainer: Trainer, workspace: Workspace, reporter: Reporter) -> list[Path]:
    """Load the checkpoint to start from into `trainer`, if there is one. Return newer ones that are damaged.

    Those of another run are left out. Raises UserError: when the only checkpoint, or that of `--ckpt`, is damaged or of
    another run, or `--test` finds none.
    """
    candidates = _find_checkpoints(trainer.config, workspace)
    in_workspace = candidates and candidates[0].parent == workspace.checkpoints
    damaged: list[Path] = []
    while candidates:
        path = candidates.pop()
        try:
            if in_workspace:
                _check_belongs(path, trainer, workspace)
            trainer.load(path)
            return damaged
        except (Damaged, Foreign) as error:
            if not candidates:
                raise
            if isinstance(error, Damaged):
                damaged.append(path)
            reporter.warn(f"{error}: the run resumes from {candidates[-1].name}")
    return damaged


def _check_belongs(path: Path, trainer: Trainer, workspace: Workspace) -> None:
    """Raises Foreign: the checkpoint is of another run than `workspace` holds, or beyond its last step."""
    config, stored = trainer.config, workspace.stored_config()
    last_step = max(config.run.iters, 0 if stored is None else stored.run.iters)
    check_belongs(path, workspace.record(), config.run_facts(trainer.seed), last_step)


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
