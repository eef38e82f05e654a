"""The optimisation: one step readable from top to bottom, and the loop around it.

Every random number of a step comes from generators that are seeded by the run's seed and the step's number, so a
resumed run draws what the uninterrupted one would have drawn. Nothing in a step waits for the device; numbers are read
when a row is logged.
"""

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from dream_fast.engine.config.schedule import largest, value_at, values_at
from dream_fast.engine.config.schema import Config, settings_unused_by
from dream_fast.engine.config.sections import RunConfig, ShadingConfig
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.export.images import write_validation
from dream_fast.engine.export.video import turntable_frames, write_video
from dream_fast.engine.guidance.base import Guidance, GuidanceResult, StepInputs
from dream_fast.engine.guidance.model.attention import KINDS, AttentionChoice
from dream_fast.engine.render.base import Rendered, RenderedMesh, Renderer, Shading
from dream_fast.engine.render.mesh import MeshRenderer
from dream_fast.engine.render.volume import VolumeRenderer
from dream_fast.engine.runtime.cuda_graph import StepGraphs
from dream_fast.engine.runtime.device import Runtime
from dream_fast.engine.runtime.reporter import Bar, Reporter
from dream_fast.engine.runtime.seeds import seed_libraries, step_seed
from dream_fast.engine.runtime.signals import stop_after_current_step
from dream_fast.engine.scene.camera import Cameras, sample_cameras
from dream_fast.engine.scene.make_field import make_field
from dream_fast.engine.scene.tet_mesh import TetMesh
from dream_fast.engine.training.callbacks import GuidanceSnapshot, RunCallbacks
from dream_fast.engine.training.divergence import (
    MAX_DEGENERATE_STEPS,
    MAX_NONFINITE_STEPS,
    MAX_OPACITY,
    MIN_OPACITY,
    OUTWEIGHS,
    DegenerateScene,
    degenerate_message,
    diagnosis,
    outweighed_message,
)
from dream_fast.engine.training.dmtet_init import load_start, start_from_field
from dream_fast.engine.training.failures import memory_message
from dream_fast.engine.training.losses import add_table_gradients, mesh_regularizers, needs_normals, ramp, regularizers
from dream_fast.engine.training.optim import LossScaler, Optimizer
from dream_fast.engine.workspace.checkpoint import damaged, load_checkpoint, read_architecture, save_checkpoint
from dream_fast.engine.workspace.folder import Workspace

EPOCH = 100  # steps; validation pictures and checkpoints fall on its multiples
CHECKPOINT_SECONDS = 30.0  # a fast run does not write a checkpoint every epoch
LATENT_BACKGROUND = 0.5  # background of the latent phase: the middle of the latents' range

GuidanceCall = Guidance | Callable[[Tensor, Cameras, StepInputs], GuidanceResult]


@dataclasses.dataclass(frozen=True)
class RunProgress:
    """How far a run is, from 0 at ``start_step`` and before to 1 at ``iters`` and after.

    More iterations asked later stretch what is left; nothing starts over.
    """

    iters: int
    start_step: int = 0
    start_progress: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.start_progress <= 1 and self.start_step >= 0):
            raise ValueError(f"a schedule from step {self.start_step} and {self.start_progress} of its way")

    def progress(self, step: int) -> float:
        if step >= self.iters:
            return 1.0
        done = max(0, step - self.start_step) / (self.iters - self.start_step)
        return self.start_progress + (1.0 - self.start_progress) * done

    def extended_to(self, step: int, iters: int) -> "RunProgress":
        """The schedule of a run of ``iters`` steps that continues this one at ``step``."""
        if iters == self.iters:
            return self
        return RunProgress(iters, max(step, self.start_step), self.progress(step))


def phase_schedule(config: RunConfig) -> RunProgress:
    """The part of a run in which phases, progressive view and levels go from their start to their end."""
    end = config.iters if config.exp_end_iter is None else config.exp_end_iter
    return RunProgress(end, config.exp_start_iter or 0)


class Phase(NamedTuple):
    """What a step shows the guidance."""

    name: str  # "latent" or "albedo" or "shaded"
    shading: str
    ambient: float


def choose_phase(
    config: ShadingConfig, progress: float, dice: random.Random, step: int = 0, done: float = 0.0
) -> Phase:
    """First normals as latents, then colour alone, then light on the shape (some steps without colour).

    ``progress`` is that of the phases. A ratio of 0 leaves a phase out, and with 1 it never ends: progress stays at 1
    once it is there. Schedules read ``step`` and ``done``, the part of the run before it.
    """
    if progress < config.latent_iter_ratio or config.latent_iter_ratio == 1:
        return Phase("latent", "normal", 1.0)
    if progress < config.albedo_iter_ratio or config.albedo_iter_ratio == 1:
        return Phase("albedo", "albedo", 1.0)
    ambient = dice.uniform(value_at(config.min_ambient_ratio, step, done), 1.0)
    textureless = dice.random() < value_at(config.textureless_ratio, step, done)
    return Phase("shaded", "textureless" if textureless else "lambertian", ambient)


class StepResult(NamedTuple):
    """What a step did, still on the device; with --step_graph only until the next step."""

    phase: Phase
    terms: dict[str, Tensor]  # weighted losses by name; the guidance first
    t: Tensor  # [B] noise levels; none where no diffusion model guides
    grad_norm: Tensor  # of the guidance, in the latents
    opacity: Tensor  # [B, H, W]
    samples: Tensor  # how many there were
    overflow: Tensor  # whether they did not all fit
    table_pull: Tensor | None = None  # of the hash table's regularisers, as a part of the rest of its gradient
    seen: GuidanceSnapshot | None = None  # with --save_guidance


class Trainer:
    """Field, renderer and optimiser of a run. Without ``guidance`` it can be loaded and looked at, not trained."""

    def __init__(self, config: Config, runtime: Runtime, seed: int, guidance: GuidanceCall | None = None):
        self.config, self.device, self.seed, self.guidance = config, runtime.device, seed, guidance
        first = torch.Generator().manual_seed(step_seed(seed, -1))
        self.field = make_field(config.field, config.render.bound, first).to(runtime.device)
        if runtime.fp16:
            self.field.compute_dtype = torch.float16
        self.shape: TetMesh | None = None  # of a mesh refinement
        if config.dmtet.dmtet:
            self.shape = TetMesh(config.dmtet.tet_grid_size, config.render.bound, locked=config.dmtet.lock_geo)
            self.shape.to(runtime.device)
            self.renderer: Renderer = MeshRenderer(self.field, config.render, self.shape)
        else:
            self.renderer = VolumeRenderer(self.field, config.render)
        others = [parameter for parameter in self.field.parameters() if parameter is not self.field.table]
        free = [] if self.shape is None or self.shape.locked else list(self.shape.parameters())
        self.optimizer = Optimizer(self.field.table, others, config.optim, free, config.dmtet.lr_geo)
        self.scaler = LossScaler(runtime.fp16, runtime.device)
        self.generator = torch.Generator(runtime.device)
        self.schedule = RunProgress(config.run.iters)  # of the learning rate, the noise level and the guidance scale
        self.phases = phase_schedule(config.run)
        self.attention: AttentionChoice | None = None  # of the guidance; kept, so that a resumed run computes alike
        self.step = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=runtime.device)  # steps without a finite gradient
        self.skipped_in_a_row = torch.zeros_like(self.skipped)
        self.lost_in_a_row = torch.zeros(2, dtype=torch.int64, device=runtime.device)  # without an object, full of it
        self.outweighed = torch.zeros_like(self.skipped)  # steps by the table's regularisers, less those that were not
        self.overflowed = torch.zeros_like(self.skipped)  # steps not taken because their samples did not fit
        self._graphs: StepGraphs | None = None  # of the gradient of a step, one a kind of step
        self._graphs_capacity = 0
        self._captured_inputs: tuple[Tensor, dict[str, Tensor]] | None = None  # where the graphs read
        if config.run.step_graph and runtime.device.type == "cuda":
            self._graphs = StepGraphs(self.generator)
        self.mark: Callable[[str], None] = lambda part: None  # called at the end of each part of a step, to time it

    # ------------------------------------------------------------------------------------------------------- a step

    def train_step(self) -> StepResult:
        """One step of the optimisation."""
        self.mark("start")
        config, progress, phases = self.config, self.schedule.progress(self.step), self.phases.progress(self.step)
        seed = step_seed(self.seed, self.step)
        seed_libraries(seed)
        dice = random.Random(seed)
        generator = self.generator.manual_seed(seed)
        phase = choose_phase(config.shading, phases, dice, self.step, progress)
        if config.dmtet.lock_geo and phase.shading in ("textureless", "normal"):
            phase = phase._replace(shading="lambertian")  # the shape alone would teach nothing
        # The background network gets half of the steps, if there is one.
        network = phase.name != "latent" and self.field.has_background and dice.random() < 0.5
        levels = self._active_levels(phases)
        if self.step % config.render.update_extra_interval == 0:
            self.renderer.update_occupancy(generator, active_levels=levels)
        inputs = self._inputs(phase, progress)
        if self._graphs is None or not getattr(self.guidance, "capturable", False):  # a function has no attributes
            done = self._gradients(phase, network, inputs, levels)
        else:
            done = self._replayed_gradients(phase, network, inputs)

        # A step whose samples did not fit their buffers is not taken: not a number tells the optimiser so.
        skipped = self.optimizer.step(
            inverse_scale=torch.where(done.overflow, torch.nan, self.scaler.inverse),
            grad_clip=value_at(config.loss.grad_clip, self.step, progress),
            lr_scale=config.optim.lr_decay**progress,
        )
        skipped = skipped & ~done.overflow
        self.scaler.update(skipped)
        self.skipped += skipped
        self.overflowed += done.overflow
        self.skipped_in_a_row.add_(1).mul_(skipped)
        opacity = done.opacity.mean()
        self.lost_in_a_row.add_(1).mul_(torch.stack([opacity < MIN_OPACITY, opacity > MAX_OPACITY]))
        if done.table_pull is not None:
            self.outweighed.add_(2 * (done.table_pull > OUTWEIGHS) - 1).clamp_(min=0)  # it varies from step to step
        self.mark("optimiser")
        self.step += 1
        return done._replace(phase=phase)

    def _inputs(self, phase: Phase, progress: float) -> StepInputs:
        """The inputs of this step. Their scalars are "ambient", "ramp" and the scheduled settings of the losses."""
        scalars = {"ambient": phase.ambient, "ramp": ramp(progress), **values_at(self.config.loss, self.step, progress)}
        return StepInputs(self.step, progress, self.generator, latents=phase.name == "latent", scalars=scalars)

    def _gradients(self, phase: Phase, network: bool, inputs: StepInputs, levels: int | None) -> StepResult:
        """Renders, asks the guidance and leaves the gradients, times the loss scale, with the optimiser."""
        config, generator = self.config, self.generator
        (height, width), batch = config.train_size, config.camera.batch_size
        cameras = sample_cameras(config.camera, batch, generator, self.device, self.phases.progress(self.step))
        rendered = self.renderer.train_views(
            cameras,
            height,
            width,
            Shading(phase.shading, inputs.scalars["ambient"], self._light(cameras)),
            background=self._background(phase, network),
            need_normals=needs_normals(config.loss),
            active_levels=levels,
            generator=generator,
        )
        limit = inputs.scalars.get("grad_clip_rgb", config.loss.grad_clip_rgb)
        pictures = self._pictures(rendered, phase, limit)
        self.mark("render")
        guided = self.guidance(pictures, cameras, inputs)
        asked = {"guidance": guided.loss}
        if several := getattr(guided, "losses", None):  # a guidance of one's own need not have it
            asked = {f"guidance_{name}": loss for name, loss in several.items()}
        terms = asked | self._regularizers(rendered, inputs, levels, guided.grad_norm.detach())

        self.optimizer.zero_grad()
        (torch.stack(list(terms.values())).sum() * self.scaler.scale).backward()
        table_pull = add_table_gradients(
            self.field,
            config.loss,
            up=inputs.scalars["ramp"],
            now=inputs.scalars,
            scale=self.scaler.scale,
            generator=generator,
        )
        self.mark("backward")
        terms = {name: term.detach() for name, term in terms.items()}  # nothing of the step's autograd graph lives on
        opacity, samples = rendered.opacity.detach(), rendered.count
        seen = GuidanceSnapshot(pictures.detach(), guided.noisy, guided.clean) if config.output.save_guidance else None
        norm, overflow = guided.grad_norm.detach(), rendered.overflow
        return StepResult(phase, terms, guided.t, norm, opacity, samples, overflow, table_pull, seen)

    def _regularizers(
        self, rendered: Rendered | RenderedMesh, inputs: StepInputs, levels: int | None, pull: Tensor
    ) -> dict[str, Tensor]:
        config = self.config
        if self.shape is not None:
            if self.shape.locked:
                return {}
            return mesh_regularizers(rendered.surface, rendered.opposite, config.loss, inputs.scalars)
        return regularizers(
            rendered,
            config.loss,
            up=inputs.scalars["ramp"],
            now=inputs.scalars,
            field=self.field,
            normals=config.render.normals,
            normal_epsilon=config.render.normal_epsilon,
            active_levels=levels,
            generator=self.generator,
            pull=pull,
        )

    def _replayed_gradients(self, phase: Phase, network: bool, inputs: StepInputs) -> StepResult:
        """`_gradients` as one CUDA graph for each kind of step, which reads what changes from `_captured_inputs`."""
        inputs = self.guidance.prepare_step(inputs, self.config.camera.batch_size)
        changing = (inputs.timesteps, inputs.scalars)
        if self._captured_inputs is None:
            self._captured_inputs = pytree.tree_map(partial(_static_like, device=self.device), changing)
        pytree.tree_map(_copy_static, self._captured_inputs, changing)
        timesteps, scalars = self._captured_inputs
        inputs, capacity = inputs._replace(timesteps=timesteps, scalars=scalars), self.renderer.sampler.samples_per_ray
        if capacity != self._graphs_capacity:
            self._graphs.clear()
            self._graphs_capacity = capacity
        kind = (phase.name, phase.shading, network)
        return self._graphs(kind, lambda: self._gradients(phase, network, inputs, None))

    def _active_levels(self, progress: float) -> int | None:
        if not self.config.shading.progressive_level:
            return None
        field = self.config.field
        levels = field.frequencies if field.backbone == "vanilla" else field.levels
        return max(1, math.ceil(levels * min(1.0, 0.25 + 2.0 * progress)))

    def _light(self, cameras: Cameras) -> Tensor:
        """Unit directions [B, 3] to a light near each camera: the camera's place, moved by one random vector."""
        noise = torch.randn(3, generator=self.generator, device=self.device)
        return F.normalize(cameras.c2w[:, :3, 3] + noise, dim=-1)

    def _background(self, phase: Phase, network: bool) -> Tensor | None:
        """One random colour [3], or None for the background network."""
        if phase.name == "latent":
            return torch.full((3,), LATENT_BACKGROUND, device=self.device)
        colour = torch.rand(3, generator=self.generator, device=self.device)
        return None if network else colour

    def _pictures(self, rendered: Rendered | RenderedMesh, phase: Phase, limit: float | Tensor) -> Tensor:
        """What the guidance sees: colours in [0, 1] [B, 3, H, W], or normals and opacity in [-1, 1] [B, 4, H, W].

        ``limit``, where --grad_clip_rgb sets one, is that of the gradient of a pixel.
        """
        pixels = rendered.rgb
        if largest(self.config.loss.grad_clip_rgb) > 0:
            reach = limit * self.scaler.scale
            pixels.register_hook(lambda gradient: torch.clamp(gradient, -reach, reach))
        if phase.name == "latent":
            pixels = torch.cat([pixels, rendered.opacity[..., None]], dim=-1) * 2 - 1
        return pixels.permute(0, 3, 1, 2)

    # ----------------------------------------------------------------------------------------------------- the loop

    def fit(self, workspace: Workspace, reporter: Reporter) -> None:
        """Trains up to the configured iterations. A signal to stop ends it after the current step, with a checkpoint.

        Raises Stopped then, and UserError when the gradients stay non-finite.
        """
        run, output = self.config.run, self.config.output
        evaluation, tests = output.eval_interval * EPOCH, output.test_interval * EPOCH
        saved = started = time.monotonic()
        logged_step, logged, warned, outweighed = self.step, started, "", False
        with (
            stop_after_current_step() as stop,
            workspace.metrics.open("a", encoding="utf-8") as metrics,
            reporter.bar("start", run.iters, self.step) as bar,
            RunCallbacks(self, workspace, reporter) as watch,
        ):
            while self.step < run.iters and stop.number is None:
                result = self._train_step_or_save(workspace)
                last = self.step == run.iters
                watch.step(result)
                if self.step % run.log_every == 0 or last:
                    row = self._row(result)  # waits for the device
                    now = time.monotonic()
                    speed = (self.step - logged_step) / (now - logged)
                    logged_step, logged = self.step, now
                    row |= {"it_per_s": round(speed, 3), "seconds": round(now - started, 3)}
                    metrics.write(json.dumps(row) + "\n")
                    metrics.flush()
                    watch.row(row)
                    self._show(bar, row)
                    self._check_alive(row)
                    outweighed = outweighed or self._check_table(reporter, result)
                    workspace.check_not_moved()
                if self.step % run.log_every == 0 or self.step % EPOCH == 0:
                    warned = self._check_object(reporter, warned)
                bar.advance(self.step)
                if self.step % evaluation == 0 or last:
                    self.validate(workspace)
                if self.step % tests == 0 and not last and not run.six_views:
                    self.write_test_video(workspace.results / f"turntable_step_{self.step:06d}.mp4")
                if self.step % EPOCH == 0 and time.monotonic() - saved > CHECKPOINT_SECONDS and not last:
                    self.save(workspace)
                    saved = time.monotonic()
            if self.step >= run.iters:
                workspace.clear_outputs()  # those of fewer steps, which would look like the end of this run
            self.save(workspace)
        if stop.number is not None:
            reporter.say(f"stopped after step {self.step} of {run.iters}; the same command takes it up again")
        stop.check()

    def _row(self, result: StepResult) -> dict[str, Any]:
        """A row of metrics.jsonl: numbers of the last step, and the count of skipped steps. Reads the device."""
        self.renderer.adapt_capacity(len(result.opacity))
        terms = {name: _number(term) for name, term in result.terms.items()}
        return {
            "step": self.step,
            "phase": result.phase.name,
            "shading": result.phase.shading,
            "loss": _number(torch.stack(list(result.terms.values())).sum()),
            **{f"loss_{name}": value for name, value in terms.items()},
            "t": result.t.tolist(),
            "grad_norm": _number(result.grad_norm),
            "lr": self.config.optim.lr * self.config.optim.lr_decay ** self.schedule.progress(self.step - 1),
            "opacity": _number(result.opacity.mean()),
            "samples": int(result.samples),
            "skipped": int(self.skipped),
            "overflowed": int(self.overflowed),
        }

    def _show(self, bar: Bar, row: dict[str, Any]) -> None:
        terms = {name.removeprefix("loss_"): value for name, value in row.items() if name.startswith("loss_")}
        skipped = {"skipped": row["skipped"]} if row["skipped"] else {}
        bar.show(row["phase"], row["it_per_s"], terms | {"opacity": row["opacity"]} | skipped)

    def _train_step_or_save(self, workspace: Workspace) -> StepResult:
        """One step. UserError: the GPU's memory does not suffice; what the steps before it reached is saved."""
        try:
            return self.train_step()
        except torch.OutOfMemoryError as error:
            self._graphs = None
            path = self.save(workspace)
            resume_hint = (
                f"the checkpoint of step {self.step} is saved ({path.name}), and the same command with them goes on"
            )
            raise UserError(memory_message(self.config, error, resume_hint)) from error

    def _check_alive(self, row: dict[str, Any]) -> None:
        bad = int(self.skipped_in_a_row)
        if bad >= MAX_NONFINITE_STEPS:
            raise UserError(diagnosis(self.config, bad, row))

    def _check_object(self, reporter: Reporter, warned: str) -> str:
        """Warns of an object that is lost, once for each way; raises Lost with --rescue. Reads the device."""
        lost = [
            kind
            for kind, count in zip(("vanished", "full"), self.lost_in_a_row.tolist(), strict=True)
            if count >= MAX_DEGENERATE_STEPS
        ]
        if not lost or lost[0] == warned:
            return warned
        if self.config.run.rescue:
            raise DegenerateScene(lost[0])
        reporter.warn(degenerate_message(self.config, lost[0], self.step))
        return lost[0]

    def _check_table(self, reporter: Reporter, result: StepResult) -> bool:
        """Warns where regularisers of the hash table outweigh the guidance; whether it did. Reads the device."""
        if int(self.outweighed) < MAX_DEGENERATE_STEPS:
            return False
        reporter.warn(outweighed_message(self.config, float(result.table_pull), self.step))
        return True

    @torch.no_grad()
    def validate(self, workspace: Workspace) -> Path:
        """A strip of pictures around the object as it is now, from the averaged weights."""
        path = workspace.validation / f"step_{self.step:06d}.png"
        with self.optimizer.ema_weights():
            write_validation(path, self.renderer, self.config.camera, self.config.output.dataset_size_valid)
        return path

    def write_test_video(self, path: Path) -> None:
        """The turntable of the object as it is now, from the averaged weights and without specks."""
        output = self.config.output
        with self.optimizer.ema_weights(), self.renderer.without_floaters():
            frames = turntable_frames(self.renderer, self.config.camera, output.dataset_size_test)
            write_video(path, frames, output.video_fps)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def architecture(self) -> dict[str, Any]:
        """What two runs must share for one to load the other's checkpoint: everything that shapes the state."""
        config = self.config
        shape = dataclasses.asdict(config.field) | {
            "bound": config.render.bound,
            "occupancy_resolution": config.render.occupancy_resolution,
            "optim": config.optim.optim,
        }
        elsewhere = settings_unused_by(config.field.backbone)
        found = {name: value for name, value in shape.items() if name not in elsewhere}
        if self.shape is not None:
            found |= {"tet_grid_size": config.dmtet.tet_grid_size, "lock_geo": config.dmtet.lock_geo}
        return found

    def save(self, workspace: Workspace) -> Path:
        workspace.check_not_moved()
        state = {
            "optimizer": self.optimizer.state_dict(),
            "renderer": self.renderer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule": dataclasses.asdict(self.schedule),
            "phases": dataclasses.asdict(self.phases),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "overflowed": self.overflowed,
            "lost_in_a_row": self.lost_in_a_row,
            "attention": None if self.attention is None else list(self.attention),
        }
        return save_checkpoint(workspace.checkpoints, self.step, state, self.architecture())

    def start_shape(self) -> None:
        """Give a mesh refinement what --init_with names to start from. UserError: nothing can be made of that."""
        start = load_start(self.config, self.shape)
        if start is not None and start.checkpoint:
            there, here = read_architecture(start.path), self.architecture()
            of_mesh = here.keys() & {"tet_grid_size", "lock_geo"}
            alike = {name: value for name, value in here.items() if name not in of_mesh}
            _, state = load_checkpoint(start.path, alike | {"optim": there.get("optim")})  # which goes on as it likes
            try:
                self.optimizer.start_scene(state["optimizer"]["ema"])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise damaged(start.path, f"its state: {type(error).__name__}: {first_line(error)}") from error
            start_from_field(self.shape, self.field, self.config.render.density_thresh)
        self.renderer.surface()  # something has to be there
        self.optimizer.state.ema.copy_(self.optimizer.params)

    def load(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``; UserError when it is damaged or of another architecture."""
        self.step, state = load_checkpoint(path, self.architecture())
        try:
            self._restore(state)
        except torch.OutOfMemoryError:  # a RuntimeError, but not the file's fault
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise damaged(path, f"its state: {type(error).__name__}: {first_line(error)}") from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.renderer.load_state_dict(state.get("renderer", {}))
        self.scaler.load_state_dict(state["scaler"])
        self.schedule = RunProgress(**state["schedule"]).extended_to(self.step, self.config.run.iters)
        if self.config.run.exp_end_iter is None:  # an end that was asked for stays where it is
            phases = state.get("phases", state["schedule"])  # checkpoints of earlier versions have one for both
            self.phases = RunProgress(**phases).extended_to(self.step, self.config.run.iters)
        self.skipped.copy_(state["skipped"])
        self.overflowed.copy_(state.get("overflowed", torch.zeros(())))  # as above
        self.skipped_in_a_row.copy_(state.get("skipped_in_a_row", torch.zeros(())))
        self.lost_in_a_row.copy_(state.get("lost_in_a_row", torch.zeros(2)))
        kept = state.get("attention")  # checkpoints of earlier versions have none
        if kept is not None and (len(kept) != 2 or not set(kept) <= set(KINDS)):
            raise ValueError(f"attention is {kept}")
        self.attention = None if kept is None else AttentionChoice(*kept)


def _static_like(value: float | Tensor, device: torch.device) -> Tensor:
    """Where a graph finds ``value``: a scalar on the device, or a tensor like it."""
    return torch.zeros_like(value) if isinstance(value, Tensor) else torch.zeros((), device=device)


def _copy_static(place: Tensor, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        place.copy_(value)
    else:
        place.fill_(value)


def _number(tensor: Tensor) -> float | None:
    """A number for JSON, which knows no infinity."""
    value = tensor.item()
    return value if math.isfinite(value) else None
