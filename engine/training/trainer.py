"""The optimisation: one step readable from top to bottom, and the loop around it.

Every random number of a step comes from generators that are seeded by the run's seed and the step's number, so a
resumed run draws what the uninterrupted one would have drawn. Nothing in a step waits for the device; numbers are read
when a row is logged.
"""

import dataclasses
import random
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
from dream_fast.engine.errors import first_line
from dream_fast.engine.guidance.base import Guidance, GuidanceResult, StepInputs
from dream_fast.engine.guidance.model.attention import KINDS, AttentionChoice
from dream_fast.engine.guidance.snapshots import GuidanceSnapshot
from dream_fast.engine.render.base import Rendered, RenderedMesh, Renderer, Shading
from dream_fast.engine.render.mesh import MeshRenderer
from dream_fast.engine.render.volume import VolumeRenderer
from dream_fast.engine.runtime.cuda_graph import StepGraphs
from dream_fast.engine.runtime.device import Runtime
from dream_fast.engine.runtime.seeds import seed_libraries, step_seed
from dream_fast.engine.scene.camera import Cameras, sample_cameras
from dream_fast.engine.scene.make_field import make_field
from dream_fast.engine.scene.tet_mesh import TetMesh
from dream_fast.engine.training.divergence import MAX_OPACITY, MIN_OPACITY, OUTWEIGHS
from dream_fast.engine.training.dmtet_init import load_start, start_from_field
from dream_fast.engine.training.losses import add_table_gradients, mesh_regularizers, needs_normals, ramp, regularizers
from dream_fast.engine.training.optim import LossScaler, Optimizer
from dream_fast.engine.training.phases import Phase, RunProgress, active_levels, choose_phase, phase_progress
from dream_fast.engine.workspace.checkpoint import damaged, load_checkpoint, read_architecture, save_checkpoint
from dream_fast.engine.workspace.folder import Workspace

LATENT_BACKGROUND = 0.5  # background of the latent phase: the middle of the latents' range

GuidanceCall = Guidance | Callable[[Tensor, Cameras, StepInputs], GuidanceResult]


class StepResult(NamedTuple):
    """What a step did, still on the device; with --cuda_graph only until the next step."""

    phase: Phase
    terms: dict[str, Tensor]  # weighted losses by name; the guidance first
    t: Tensor  # [B] noise levels; none where no diffusion model guides
    grad_norm: Tensor  # of the guidance, in the latents
    opacity: Tensor  # [B, H, W]
    samples: Tensor  # how many there were
    overflow: Tensor  # whether they did not all fit
    table_pull: Tensor | None = None  # of the hash table's regularisers, as a part of the rest of its gradient
    snapshot: GuidanceSnapshot | None = None  # with --save_guidance


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
        self.phases = phase_progress(config.run)
        self.attention: AttentionChoice | None = None  # of the guidance; kept, so that a resumed run computes alike
        self.step = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=runtime.device)  # steps without a finite gradient
        self.skipped_in_a_row = torch.zeros_like(self.skipped)
        self.degenerate_in_a_row = torch.zeros(
            2, dtype=torch.int64, device=runtime.device
        )  # without an object, full of it
        self.outweighed = torch.zeros_like(self.skipped)  # steps by the table's regularisers, less those that were not
        self.overflowed = torch.zeros_like(self.skipped)  # steps not taken because their samples did not fit
        self._graphs: StepGraphs | None = None  # of the gradient of a step, one a kind of step
        self._graphs_capacity = 0
        self._captured_inputs: tuple[Tensor, dict[str, Tensor]] | None = None  # where the graphs read
        if config.run.cuda_graph and runtime.device.type == "cuda":
            self._graphs = StepGraphs(self.generator)
        self.mark: Callable[[str], None] = lambda part: None  # called at the end of each part of a step, to time it

    # ------------------------------------------------------------------------------------------------------- a step

    def train_step(self) -> StepResult:
        """One step of the optimisation."""
        self.mark("start")
        config, progress, phases = self.config, self.schedule.progress(self.step), self.phases.progress(self.step)
        seed = step_seed(self.seed, self.step)
        seed_libraries(seed)
        rng = random.Random(seed)
        generator = self.generator.manual_seed(seed)
        phase = choose_phase(config.shading, phases, rng, self.step, progress)
        if config.dmtet.lock_geo and phase.shading in ("textureless", "normal"):
            phase = phase._replace(shading="lambertian")  # the shape alone would teach nothing
        # The background network gets half of the steps, if there is one.
        network = phase.name != "latent" and self.field.has_background and rng.random() < 0.5
        levels = active_levels(config, phases)
        if self.step % config.render.update_extra_interval == 0:
            self.renderer.update_occupancy(generator, active_levels=levels)
        inputs = self._inputs(phase, progress)
        if self._graphs is None or not getattr(self.guidance, "capturable", False):  # a function has no attributes
            result = self._gradients(phase, network, inputs, levels)
        else:
            result = self._replayed_gradients(phase, network, inputs)

        # A step whose samples did not fit their buffers is not taken: not a number tells the optimiser so.
        skipped = self.optimizer.step(
            inverse_scale=torch.where(result.overflow, torch.nan, self.scaler.inverse),
            grad_clip=value_at(config.loss.grad_clip, self.step, progress),
            lr_scale=config.optim.lr_decay**progress,
        )
        skipped = skipped & ~result.overflow
        self.scaler.update(skipped)
        self.skipped += skipped
        self.overflowed += result.overflow
        self.skipped_in_a_row.add_(1).mul_(skipped)
        opacity = result.opacity.mean()
        self.degenerate_in_a_row.add_(1).mul_(torch.stack([opacity < MIN_OPACITY, opacity > MAX_OPACITY]))
        if result.table_pull is not None:
            self.outweighed.add_(2 * (result.table_pull > OUTWEIGHS) - 1).clamp_(min=0)  # it varies from step to step
        self.mark("optimiser")
        self.step += 1
        return result._replace(phase=phase)

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
        snapshot = None
        if config.output.save_guidance:
            snapshot = GuidanceSnapshot(pictures.detach(), guided.noisy, guided.clean)
        norm, overflow = guided.grad_norm.detach(), rendered.overflow
        return StepResult(phase, terms, guided.t, norm, opacity, samples, overflow, table_pull, snapshot)

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

    def adapt_capacity(self, result: StepResult) -> None:
        """Fit the sample buffers to the last steps, of which `result` is one. Reads the device.

        Where their size changes, CUDA graphs are captured again.
        """
        self.renderer.adapt_capacity(result.opacity.numel())

    def warm_up(self, steps: int) -> None:
        """Take `steps` steps, so that kernels are compiled and graphs captured, and fit the sample buffers to them."""
        for _ in range(steps):
            result = self.train_step()
        self.adapt_capacity(result)

    def clear_graphs(self) -> None:
        """Forget the CUDA graphs of the step, with their memory; later steps capture them again."""
        if self._graphs is not None:
            self._graphs.clear()

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
            "lost_in_a_row": self.degenerate_in_a_row,
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
        self.degenerate_in_a_row.copy_(state.get("lost_in_a_row", torch.zeros(2)))
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
