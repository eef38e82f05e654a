"""Load a finished run from its workspace."""

from pathlib import Path

from dream_fast.engine.config.schema import Config
from dream_fast.engine.runtime.device import choose_runtime
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.folder import Workspace


def load_finished(config: Config, workspace: Path) -> Trainer:
    """The trainer of a finished run, with the state of its last checkpoint and without guidance."""
    assert config.run.drawn_seed is not None, f"{workspace} stores no seed"
    trainer = Trainer(config, choose_runtime(config), config.run.drawn_seed)
    trainer.load(max(Workspace(workspace).checkpoints.glob("*.safetensors")))
    return trainer
