"""What a run shows of itself while it goes on, beside its log and its validation pictures; each only where asked for.

    --save_guidance   guidance/step_*.png    a row a view: render, noisy version, one-step estimate; t in its metadata
    --tensorboard     tensorboard/           the numbers of each row of metrics.jsonl
    --profile         profile/               a trace (`profiling`)

Nothing here draws a random number or writes to what the run computes with, so a run that is watched is the same run.
"""

from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.profiler import record_function

from dream_fast.engine.config.sections import OutputConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.images import save_grid
from dream_fast.engine.guidance.snapshots import guidance_pictures
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.training.profiler import Profile
from dream_fast.engine.workspace.folder import Workspace

if TYPE_CHECKING:
    from dream_fast.engine.training.trainer import StepResult, Trainer

# Tags on the board of the numbers of a row, beside its losses.
NUMBERS = ("lr", "samples", "opacity", "grad_norm", "it_per_s")


class GuidanceSnapshot(NamedTuple):
    """What a step showed to the guidance, and its latents (`GuidanceResult`)."""

    shown: Tensor
    noisy: Tensor
    clean: Tensor


def check_watchable(config: OutputConfig) -> None:
    """UserError when what was asked for needs a package that is not there."""
    if config.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install 'dream-fast[tensorboard]'")


class RunCallbacks:
    """A context around the steps of ``trainer``, which calls it after each step and with each row that is logged."""

    def __init__(self, trainer: "Trainer", workspace: Workspace, reporter: Reporter):
        self._trainer, self._workspace, self._reporter = trainer, workspace, reporter
        self._board: Any = None
        self._profile: Profile | None = None
        self._open = ExitStack()

    def __enter__(self) -> "RunCallbacks":
        trainer, workspace = self._trainer, self._workspace
        if trainer.config.output.save_guidance and getattr(trainer.guidance, "components", None) is None:
            raise UserError("--save_guidance shows the latents of an image model, and this guidance has none")
        if trainer.config.output.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # A run that is taken up records the steps after its checkpoint again.
            self._board = SummaryWriter(str(workspace.tensorboard), purge_step=trainer.step + 1)
            self._open.callback(self._board.close)
        if trainer.config.output.profile:
            left = trainer.config.run.iters - trainer.step
            self._profile = self._open.enter_context(Profile(workspace.profile, trainer.device, left, self._reporter))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def step(self, result: "StepResult") -> None:
        """After each step, before the next one, which may overwrite ``result``."""
        step, output = self._trainer.step, self._trainer.config.output
        if output.save_guidance and step % output.save_guidance_interval == 0:
            with record_function("guidance pictures"):
                self._save_guidance(result)
        if self._profile is not None:
            self._profile.step()

    def _save_guidance(self, result: "StepResult") -> None:
        components = self._trainer.guidance.components
        pictures = guidance_pictures(components, *result.seen, latents=result.phase.name == "latent")
        levels = " ".join(map(str, result.t.tolist()))
        path = self._workspace.guidance / f"step_{self._trainer.step:06d}.png"
        save_grid(path, pictures.permute(0, 1, 3, 4, 2), {"t": levels})

    def row(self, row: dict[str, Any]) -> None:
        """With each row of metrics.jsonl."""
        if self._board is None:
            return
        losses = {f"loss/{name.removeprefix('loss_')}": row[name] for name in row if name.startswith("loss_")}
        numbers = {"loss/sum": row["loss"], **losses, **{name: row[name] for name in NUMBERS}}
        for tag, value in numbers.items():
            self._board.add_scalar(tag, float("nan") if value is None else value, row["step"])
