"""The training loop: save, evaluate, step, log, until the last step or a signal."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from dream_fast.engine.errors import UserError
from dream_fast.engine.export.images import write_validation
from dream_fast.engine.export.video import turntable_frames, write_video
from dream_fast.engine.files import open_append
from dream_fast.engine.runtime.reporter import Bar, Reporter
from dream_fast.engine.runtime.signals import Stopped, StopRequest, stop_after_current_step
from dream_fast.engine.training.callbacks import RunCallbacks
from dream_fast.engine.training.divergence import (
    MAX_DEGENERATE_STEPS,
    MAX_NONFINITE_STEPS,
    DegenerateScene,
    Diverged,
    degenerate_message,
    nonfinite_message,
    outweighed_message,
)
from dream_fast.engine.training.failures import is_out_of_memory, memory_message, resume_hint
from dream_fast.engine.training.trainer import StepResult, Trainer
from dream_fast.engine.workspace.folder import Workspace


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """Intervals and hooks of the loop; a run takes the defaults, benchmarks and tests others.

    `before_step` is called with the number of steps taken so far, `on_row` with each row of metrics.jsonl before it is
    written, to which it may add entries.
    """

    epoch_steps: int = 100  # validation images, videos and checkpoints fall on its multiples
    checkpoint_seconds: float = 30.0  # least time between two checkpoints, so that a fast run does not write many
    before_step: Callable[[int], None] = lambda step: None
    on_row: Callable[[dict[str, Any]], None] = lambda row: None


class Loop:
    """Takes the steps of a run in `workspace`; `fit` is all of it."""

    def __init__(self, trainer: Trainer, workspace: Workspace, reporter: Reporter, options: LoopOptions | None = None):
        self.trainer, self.workspace, self.reporter = trainer, workspace, reporter
        self.options = options or LoopOptions()
        self.config = trainer.config
        self._degeneracy = ""  # the last one with a warning
        self._warned_of_table = False
        self._first_step = self._saved_step = trainer.step

    def fit(self) -> None:
        """Train up to the configured iterations. Whatever ends the loop, the state after its last whole step is saved
        first, except where the object or the gradients are lost.

        Raises Stopped: after a signal. Raises UserError: when the gradients stay non-finite, the memory does not
        suffice, or the workspace is moved. Raises DegenerateScene: with --rescue, when the object is lost.
        """
        trainer, run = self.trainer, self.config.run
        started = time.monotonic()
        with (
            stop_after_current_step() as stop,
            open_append(self.workspace.metrics) as metrics,
            self.reporter.bar("start", run.iters, trainer.step) as bar,
            self._callbacks() as callbacks,
            self._saved_on_error(),
        ):
            saved = logged = started
            logged_step = trainer.step
            while True:
                # once in a while: save, then evaluate; both at the end too
                if trainer.step >= run.iters or stop.number is not None:
                    self._save()
                elif self._saved_step < trainer.step and trainer.step % self.options.epoch_steps == 0:
                    if time.monotonic() - saved > self.options.checkpoint_seconds:
                        self._save()
                        saved = time.monotonic()
                self._evaluate(stop)
                if trainer.step >= run.iters or stop.number is not None:
                    break

                self.options.before_step(trainer.step)
                result = self._step()
                callbacks.on_step(trainer.step, result)

                # once in a while: log
                if trainer.step % run.log_every == 0 or trainer.step == run.iters:
                    trainer.adapt_capacity(result)
                    row = make_metrics_row(trainer, result)  # waits for the device
                    now = time.monotonic()
                    row["it_per_s"] = round((trainer.step - logged_step) / (now - logged), 3)
                    row["seconds"] = round(now - started, 3)
                    logged_step, logged = trainer.step, now
                    self._log(row, result, metrics, bar, callbacks)
                if trainer.step % run.log_every == 0 or trainer.step % self.options.epoch_steps == 0:
                    self._check_object()
                bar.advance(trainer.step)
        if stop.number is not None:
            self.reporter.say(f"stopped after step {trainer.step} of {run.iters}; the same command resumes it")
        stop.check()

    def _save(self) -> Path:
        path = self.trainer.save(self.workspace)
        self._saved_step = self.trainer.step
        return path

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Save the state when an exception ends the `with` block, if that is possible."""
        try:
            yield
        except (DegenerateScene, Diverged):  # what ends the run is in the state
            raise
        except BaseException:
            if self.trainer.is_whole and self._saved_step < self.trainer.step:
                with suppress(Exception):  # the first error is the cause of this one
                    self._save()
            raise

    def _log(self, row: dict[str, Any], result: StepResult, metrics: TextIO, bar: Bar, callbacks: RunCallbacks) -> None:
        """Write and show a row, and check the numbers of the run."""
        self.options.on_row(row)
        metrics.write(json.dumps(row) + "\n")
        metrics.flush()
        callbacks.on_log(row)
        _show(bar, row)
        self._check_finite(row)
        self._check_table(result)
        self.workspace.check_not_moved()

    def _callbacks(self) -> RunCallbacks:
        trainer = self.trainer
        return RunCallbacks(
            self.config,
            self.workspace,
            self.reporter,
            step=trainer.step,
            guidance=trainer.guidance,
            device=trainer.device,
        )

    def _step(self) -> StepResult:
        """Take a step. Raises UserError: when the memory does not suffice; the steps before it are saved."""
        trainer = self.trainer
        try:
            return trainer.train_step()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            trainer.clear_graphs()
            hint = resume_hint(self.workspace)
            if trainer.is_whole:
                name, step = self._save().name, trainer.step
                hint = f"the checkpoint of step {step} is saved ({name}), and the same command with these resumes"
            raise UserError(memory_message(self.config, error, hint)) from error

    def _evaluate(self, stop: StopRequest) -> None:
        """Write the images and videos that are due after this step, until a signal comes.

        At the step that the loop starts from, they are written where they are missing.
        """
        step, output, epoch = self.trainer.step, self.config.output, self.options.epoch_steps
        is_last, is_first = step >= self.config.run.iters, step == self._first_step
        due: list[tuple[bool, Path, Callable[..., None]]] = [
            (step % (output.eval_interval * epoch) == 0 or is_last, validation_path(self.workspace, step), validate),
            (
                step % (output.test_interval * epoch) == 0 and not is_last and not self.config.run.six_views,
                self.workspace.results / f"turntable_step_{step:06d}.mp4",
                write_test_video,
            ),
        ]
        for is_due, path, write in due:
            if is_due and step > 0 and not (is_first and path.exists()):
                with suppress(Stopped), self.reporter.collect(path):
                    write(self.trainer, path, stop.check)

    def _check_finite(self, row: dict[str, Any]) -> None:
        """Raises Diverged: when too many steps in a row had no finite gradient."""
        skipped = int(self.trainer.skipped_in_a_row)
        if skipped >= MAX_NONFINITE_STEPS:
            raise Diverged(nonfinite_message(self.config, skipped, row))

    def _check_object(self) -> None:
        """Warn of an object that vanished or fills the scene, once for each. Raises DegenerateScene: with --rescue."""
        counts = zip(("vanished", "full"), self.trainer.degenerate_in_a_row.tolist(), strict=True)
        degeneracies = [name for name, count in counts if count >= MAX_DEGENERATE_STEPS]
        if not degeneracies or degeneracies[0] == self._degeneracy:
            return
        self._degeneracy = degeneracies[0]
        if self.config.run.rescue:
            raise DegenerateScene(self._degeneracy)
        self.reporter.warn(degenerate_message(self.config, self._degeneracy, self.trainer.step))

    def _check_table(self, result: StepResult) -> None:
        """Warn once of regularisers of the hash table that outweigh the guidance."""
        if self._warned_of_table or int(self.trainer.outweighed) < MAX_DEGENERATE_STEPS:
            return
        self._warned_of_table = True
        assert result.table_pull is not None
        self.reporter.warn(outweighed_message(self.config, float(result.table_pull), self.trainer.step))


def validation_path(workspace: Workspace, step: int) -> Path:
    """Return the path of the validation image after `step` steps."""
    return workspace.validation / f"step_{step:06d}.png"


def validate(trainer: Trainer, path: Path, on_view: Callable[[], None] = lambda: None) -> None:
    """Write a strip of images around the object, from the averaged weights. `on_view` is called before each view."""
    with torch.no_grad(), trainer.optimizer.ema_weights():
        write_validation(
            path, trainer.renderer, trainer.config.camera, trainer.config.output.dataset_size_valid, on_view
        )


def write_test_video(trainer: Trainer, path: Path, on_view: Callable[[], None] = lambda: None) -> None:
    """Write a turntable of the object, from the averaged weights and without floaters."""
    output = trainer.config.output
    with trainer.optimizer.ema_weights(), trainer.renderer.without_floaters():
        frames = turntable_frames(trainer.renderer, trainer.config.camera, output.dataset_size_test, on_view)
        write_video(path, frames, output.video_fps)


def make_metrics_row(trainer: Trainer, result: StepResult) -> dict[str, Any]:
    """Make a row of metrics.jsonl: the numbers of the last step and counts of the run. Reads the device."""
    terms = {f"loss_{name}": _finite_number(term) for name, term in result.terms.items()}
    decay = trainer.config.optim.lr_decay ** trainer.schedule.progress(trainer.step - 1)
    rates = {f"lr_{group}": rate for group, rate in trainer.optimizer.learning_rates(decay).items()}
    return {
        "step": trainer.step,
        "phase": result.phase,
        "shading": result.shading,
        "loss": _finite_number(torch.stack(list(result.terms.values())).sum()),
        **terms,
        "t": result.t.tolist(),
        "grad_norm": _finite_number(result.grad_norm),
        "lr": trainer.config.optim.lr * decay,  # the base rate, as --lr names it
        **rates,
        "opacity": _finite_number(result.opacity.mean()),
        "samples": int(result.samples),
        "skipped": int(trainer.skipped),
        "overflowed": int(trainer.overflowed),
    }


def _finite_number(tensor: Tensor) -> float | None:
    """Return the number in a tensor, or None where it is not finite, which JSON cannot store."""
    value = tensor.item()
    return value if math.isfinite(value) else None


def _show(bar: Bar, row: dict[str, Any]) -> None:
    terms = {name.removeprefix("loss_"): value for name, value in row.items() if name.startswith("loss_")}
    skipped = {"skipped": row["skipped"]} if row["skipped"] else {}
    bar.show(row["phase"], row["it_per_s"], terms | {"opacity": row["opacity"]} | skipped)
