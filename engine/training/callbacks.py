"""Callbacks of a run: additional files that it writes while it trains, each with its flag.

| flag | file | content |
|---|---|---|
| --save_guidance | guidance/step_*.png | a row a view: render, noisy latents, one-step estimate; the timesteps in `t` |
| --tensorboard | tensorboard/ | the numbers of each row of metrics.jsonl |
| --profile | profile/ | a trace (`profiler`) |

Callbacks draw no random numbers and change nothing that a step reads, so the run stays the same bit for bit. Files that
they cannot write do not end it.
"""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from dream_fast.engine.config.schema import Config
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.images import save_grid
from dream_fast.engine.guidance.snapshots import guidance_images
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.training.profiler import Profile
from dream_fast.engine.training.trainer import StepResult
from dream_fast.engine.workspace.folder import Workspace

# TensorBoard tags of the numbers of a row other than losses.
NUMBERS = ("lr", "samples", "opacity", "grad_norm", "it_per_s")


class RunCallbacks:
    """Context around the steps of a run from `step` on, with the `guidance` of images and the `device` of traces.

    Raises UserError: when --save_guidance is set and no guidance has latents.
    """

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        reporter: Reporter,
        *,
        step: int = 0,
        guidance: object = None,
        device: torch.device | None = None,
    ):
        self._config, self._workspace, self._reporter = config, workspace, reporter
        self._step, self._device = step, device or torch.device("cpu")
        self._components = getattr(guidance, "components", None)
        if config.output.save_guidance and self._components is None:
            raise UserError("--save_guidance shows the latents of an image model, and this guidance has none")
        self._writer: Any = None
        self._profile: Profile | None = None

    def __enter__(self) -> "RunCallbacks":
        output, workspace = self._config.output, self._workspace
        if output.tensorboard:
            with self._reporter.collect(workspace.tensorboard):
                from torch.utils.tensorboard import SummaryWriter

                # A resumed run records the steps after its checkpoint again.
                with workspace.recording(workspace.tensorboard):
                    self._writer = SummaryWriter(str(workspace.tensorboard), purge_step=self._step + 1)
        if output.profile:
            left = self._config.run.iters - self._step
            self._profile = Profile(workspace.profile, self._device, left, self._reporter).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            with self._reporter.collect(self._profile.path):
                self._profile.__exit__(*error)
        if self._writer is not None:
            with self._reporter.collect(self._workspace.tensorboard):
                self._writer.close()

    def on_step(self, step: int, result: StepResult) -> None:
        """Handle the result of a step; `step` counts the steps taken. The next step may overwrite `result`."""
        output = self._config.output
        if output.save_guidance and step % output.save_guidance_interval == 0:
            path = self._workspace.guidance / f"step_{step:06d}.png"
            with record_function("guidance images"), self._reporter.collect(path):
                self._save_guidance(path, result)
        if self._profile is not None:
            with self._reporter.collect(self._profile.path):
                self._profile.step()

    def _save_guidance(self, path: Path, result: StepResult) -> None:
        assert self._components is not None and result.snapshot is not None
        images = guidance_images(self._components, *result.snapshot, latents=result.phase == "latent")
        timesteps = " ".join(map(str, result.t.tolist()))
        save_grid(path, images.permute(0, 1, 3, 4, 2), {"t": timesteps})

    def on_log(self, row: dict[str, Any]) -> None:
        """Handle a row of metrics.jsonl."""
        if self._writer is None:
            return
        losses = {f"loss/{name.removeprefix('loss_')}": row[name] for name in row if name.startswith("loss_")}
        numbers: dict[str, Any] = {"loss/sum": row["loss"], **losses, **{name: row[name] for name in NUMBERS}}
        with self._reporter.collect(self._workspace.tensorboard):
            for tag, value in numbers.items():
                self._writer.add_scalar(tag, float("nan") if value is None else value, row["step"])
