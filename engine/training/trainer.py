"""State of a run, and one step of its optimisation, top to bottom.

Every random number of a step comes from generators seeded by the run's seed and the number of the step, so a resumed
run draws what the uninterrupted run would have drawn. Nothing in a step waits for the device; `loop.py` reads numbers
when it logs a row.
"""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

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
from dream_fast.engine.runtime.step_parts import end_part
from dream_fast.engine.scene.camera import Cameras, sample_cameras
from dream_fast.engine.scene.make_field import make_field
from dream_fast.engine.scene.tet_mesh import TetMesh
from dream_fast.engine.training.divergence import MAX_OPACITY, MIN_OPACITY, OUTWEIGHS
from dream_fast.engine.training.dmtet_init import load_start, start_from_field
from dream_fast.engine.training.losses import add_table_gradients, mesh_regularizers, needs_normals, ramp, regularizers
from dream_fast.engine.training.optim import LossScaler, Optimizer
from dream_fast.engine.training.phases import RunProgress, active_levels, choose_phase, phase_progress
from dream_fast.engine.workspace.checkpoint import damaged, load_checkpoint, read_architecture, save_checkpoint
from dream_fast.engine.workspace.folder import Workspace

MAX_COPIES, MAX_OTHER_BYTES = 16, 1 << 30  # size of a checkpoint: parameters with moments and average, and the rest
LATENT_BACKGROUND = 0.5  # background of the latent phase: the middle of the latents' range

GuidanceCall = Guidance | Callable[[Tensor, Cameras, StepInputs], GuidanceResult]


class StepResult(NamedTuple):
    """Result of a step, on the device; with --cuda_graph valid until the next step."""

    phase: str
    shading: str
    terms: dict[str, Tensor]  # weighted losses by name; the guidance first
    t: Tensor  # [B] timesteps; [0] without a diffusion model
    grad_norm: Tensor  # of the guidance, in the latents
    opacity: Tensor  # [B, H, W]
    samples: Tensor  # number of samples
    overflow: Tensor  # bool, some samples did not fit
    table_pull: Tensor | None = None  # length of the table's regularising gradient over that of the rest
    snapshot: GuidanceSnapshot | None = None  # with --save_guidance


class Trainer:
    """Field, renderer and optimiser of a run. Without `guidance` it can be loaded and viewed, but not trained."""

    def __init__(self, config: Config, runtime: Runtime, seed: int, guidance: GuidanceCall | None = None):
        self.config, self.device, self.seed, self.guidance = config, runtime.device, seed, guidance
        init = torch.Generator().manual_seed(step_seed(seed, -1))
        self.field = make_field(config.field, config.render.bound, init).to(runtime.device)
        if runtime.fp16:
            self.field.compute_dtype = torch.float16
        self.shape: TetMesh | None = None  # of a mesh refinement
        if config.dmtet.dmtet:
            self.shape = TetMesh(config.dmtet.tet_grid_size, config.render.bound, locked=config.dmtet.lock_geo)
            self.shape.to(runtime.device)
            self.renderer: Renderer = MeshRenderer(self.field, config.render, self.shape)
        else:
            self.renderer = VolumeRenderer(self.field, config.render)
        networks = [parameter for parameter in self.field.parameters() if parameter is not self.field.table]
        shape = [] if self.shape is None or self.shape.locked else list(self.shape.parameters())
        levels = () if self.field.table is None else self.field.spec.grid.offsets[1:]
        self.optimizer = Optimizer(self.field.table, networks, config.optim, shape, config.dmtet.lr_geo, levels)
        self.scaler = LossScaler(runtime.fp16, runtime.device)
        self.generator = torch.Generator(runtime.device)
        self.schedule = RunProgress(config.run.iters)  # of the learning rate and all schedules
        self.phases = phase_progress(config.run)
        self.attention: AttentionChoice | None = None  # of the guidance; a resumed run takes the same
        self.step = 0
        # Counters on the device.
        self.skipped = torch.zeros((), dtype=torch.int64, device=runtime.device)  # steps without a finite gradient
        self.skipped_in_a_row = torch.zeros_like(self.skipped)
        self.overflowed = torch.zeros_like(self.skipped)  # steps that were not taken because samples did not fit
        self.degenerate_in_a_row = torch.zeros(2, dtype=torch.int64, device=runtime.device)  # vanished, full
        self.outweighed = torch.zeros_like(self.skipped)  # steps led by the table's regularisers, less the others
        self.graphs = StepGraphs(self.generator) if config.run.cuda_graph and runtime.device.type == "cuda" else None
        self._captured_capacity = 0
        self._occupancy_before: dict[str, Tensor] = {}  # the renderer's state before its last update
        self.is_whole = True  # the state is that after `step` steps, also when a step failed

    def train_step(self) -> StepResult:
        """Take one step of the optimisation. One that fails before the optimiser changes nothing."""
        end_part("start")
        update_due = self.step % self.config.render.update_extra_interval == 0
        if update_due:
            self._occupancy_before = {name: tensor.clone() for name, tensor in self.renderer.state_dict().items()}
        try:
            return self._train_step(update_due)
        except BaseException:
            if update_due and self.is_whole:
                self.renderer.load_state_dict(self._occupancy_before)
            raise

    def _train_step(self, update_due: bool) -> StepResult:
        config, progress, phases = self.config, self.schedule.progress(self.step), self.phases.progress(self.step)
        seed = step_seed(self.seed, self.step)
        seed_libraries(seed)
        self.generator.manual_seed(seed)
        inputs = self.step_inputs(random.Random(seed), progress, phases)
        if update_due:
            self.renderer.update_occupancy(self.generator, active_levels=inputs.active_levels)
        if self.graphs is not None and getattr(self.guidance, "capturable", False):  # a function has no attributes
            result = self.replay_gradients(inputs)
        else:
            result = self.gradients(inputs)

        self.is_whole = False
        skipped = self.optimizer.step(
            skip=result.overflow,
            inverse_scale=self.scaler.inverse,
            grad_clip=value_at(config.loss.grad_clip, self.step, progress),
            lr_scale=config.optim.lr_decay**progress,
        )
        self._count(result, skipped)
        end_part("optimiser")
        self.step += 1
        self.is_whole = True
        return result

    def step_inputs(self, rng: random.Random, progress: float, phases: float) -> StepInputs:
        """Make the inputs of this step, at `progress` of the run and `phases` of its phases, on the host.

        Their scalars are "ambient", "ramp" and the settings of the losses that have a schedule; a guidance adds its own
        (`Guidance.prepare_step`).
        """
        config = self.config
        phase = choose_phase(config.shading, phases, rng, self.step, progress)
        if config.dmtet.lock_geo and phase.shading in ("textureless", "normal"):
            phase = phase._replace(shading="lambertian")  # a locked shape learns nothing without colour
        # The background network, if there is one, is rendered in half of the steps.
        background_network = phase.name != "latent" and self.field.has_background and rng.random() < 0.5
        scalars = {"ambient": phase.ambient, "ramp": ramp(progress), **values_at(config.loss, self.step, progress)}
        return StepInputs(
            step=self.step,
            progress=progress,
            generator=self.generator,
            latents=phase.name == "latent",
            scalars=scalars,
            phase=phase.name,
            shading=phase.shading,
            background_network=background_network,
            active_levels=active_levels(config, phases),
        )

    def gradients(self, inputs: StepInputs) -> StepResult:
        """Render, guide, and leave the gradients, times the loss scale, in the optimiser."""
        config, generator, scalars = self.config, self.generator, inputs.scalars
        progress = self.phases.progress(self.step)
        cameras = sample_cameras(config.camera, config.camera.batch_size, generator, self.device, progress)
        rendered = self.renderer.train_views(
            cameras,
            *config.train_size,
            Shading(inputs.shading, scalars["ambient"], self._light(cameras)),
            background=self._background(inputs),
            need_normals=needs_normals(config.loss),
            active_levels=inputs.active_levels,
            generator=generator,
        )
        images = self._images(rendered, inputs)
        end_part("render")

        assert self.guidance is not None, "a trainer without guidance cannot be trained"
        guided = self.guidance(images, cameras, inputs)
        terms = {"guidance": guided.loss}
        if losses := getattr(guided, "losses", None):  # a custom guidance may return another type
            terms = {f"guidance_{name}": loss for name, loss in losses.items()}
        terms |= self._regularizers(rendered, inputs, guided.grad_norm.detach())

        self.optimizer.zero_grad()
        (torch.stack(list(terms.values())).sum() * self.scaler.scale).backward()
        table_pull = add_table_gradients(self.field, config.loss, inputs, self.scaler.scale)
        end_part("backward")
        snapshot = None
        if config.output.save_guidance:
            assert guided.noisy is not None and guided.clean is not None
            snapshot = GuidanceSnapshot(images.detach(), guided.noisy, guided.clean)
        return StepResult(
            phase=inputs.phase,
            shading=inputs.shading,
            terms={name: term.detach() for name, term in terms.items()},  # frees the step's autograd graph
            t=guided.t,
            grad_norm=guided.grad_norm.detach(),
            opacity=rendered.opacity.detach(),
            samples=rendered.sample_count,
            overflow=rendered.overflow,
            table_pull=table_pull,
            snapshot=snapshot,
        )

    def replay_gradients(self, inputs: StepInputs) -> StepResult:
        """`gradients`, replayed from a CUDA graph: one for each kind of step, captured at the first of its kind."""
        assert self.graphs is not None
        inputs = cast(Guidance, self.guidance).prepare_step(inputs, self.config.camera.batch_size)
        capacity = self.renderer.samples_per_ray  # a graph has buffers of this size
        if capacity != self._captured_capacity:
            self.graphs.clear()
            self._captured_capacity = capacity

        levels = inputs.active_levels
        if isinstance(levels, int):  # a number would be the same in every replay
            levels = torch.full((), levels, dtype=torch.int32, device=self.device)

        def gradients(varying: tuple[Tensor, dict[str, Tensor], Tensor | None]) -> StepResult:
            timesteps, scalars, levels = varying
            return self.gradients(inputs._replace(timesteps=timesteps, scalars=scalars, active_levels=levels))

        graph_key = (inputs.phase, inputs.shading, inputs.background_network)
        return self.graphs(graph_key, gradients, (inputs.timesteps, inputs.scalars, levels))

    def _light(self, cameras: Cameras) -> Tensor:
        """Unit directions [B, 3] to a light near each camera: its position, moved by one random vector."""
        noise = torch.randn(3, generator=self.generator, device=self.device)
        return F.normalize(cameras.c2w[:, :3, 3] + noise, dim=-1)

    def _background(self, inputs: StepInputs) -> Tensor | None:
        """A random colour [3], or None for the background network."""
        if inputs.latents:
            return torch.full((3,), LATENT_BACKGROUND, device=self.device)
        colour = torch.rand(3, generator=self.generator, device=self.device)
        return None if inputs.background_network else colour

    def _images(self, rendered: Rendered | RenderedMesh, inputs: StepInputs) -> Tensor:
        """Images for the guidance: colours in [0, 1] [B, 3, H, W], or normals and opacity in [-1, 1] [B, 4, H, W].

        The gradient of a pixel is limited where --grad_clip_rgb is set.
        """
        pixels, config = rendered.rgb, self.config.loss
        if largest(config.grad_clip_rgb) > 0:
            limit = inputs.scalars.get("grad_clip_rgb", cast(float, config.grad_clip_rgb)) * self.scaler.scale
            pixels.register_hook(lambda gradient: torch.clamp(gradient, -limit, limit))
        if inputs.latents:
            pixels = torch.cat([pixels, rendered.opacity[..., None]], dim=-1) * 2 - 1
        return pixels.permute(0, 3, 1, 2)

    def _regularizers(
        self, rendered: Rendered | RenderedMesh, inputs: StepInputs, guidance_norm: Tensor
    ) -> dict[str, Tensor]:
        config = self.config
        if isinstance(rendered, Rendered):
            return regularizers(rendered, self.field, config.loss, config.render, inputs, guidance_norm)
        if self.shape is None or self.shape.locked:
            return {}
        return mesh_regularizers(rendered.surface, rendered.opposite, config.loss, inputs.scalars)

    def _count(self, result: StepResult, skipped: Tensor) -> None:
        """Update the counters, and the loss scale, after a step that the optimiser has `skipped` or not."""
        skipped = skipped & ~result.overflow
        self.scaler.update(skipped)
        self.skipped += skipped
        self.overflowed += result.overflow
        self.skipped_in_a_row.add_(1).mul_(skipped)
        opacity = result.opacity.mean()
        self.degenerate_in_a_row.add_(1).mul_(torch.stack([opacity < MIN_OPACITY, opacity > MAX_OPACITY]))
        if result.table_pull is not None:
            self.outweighed.add_(2 * (result.table_pull > OUTWEIGHS) - 1).clamp_(min=0)  # it varies from step to step

    def adapt_capacity(self, result: StepResult) -> None:
        """Fit the sample buffers to the last steps, of which `result` is one. Reads the device.

        Where their size changes, CUDA graphs are captured again.
        """
        self.renderer.adapt_capacity(result.opacity.numel())

    def warm_up(self, steps: int) -> None:
        """Take `steps` steps, which compile kernels and capture graphs, and fit the sample buffers to them."""
        for _ in range(steps):
            result = self.train_step()
        self.adapt_capacity(result)

    def clear_graphs(self) -> None:
        """Forget the CUDA graphs of the step and free their memory; later steps capture them again."""
        if self.graphs is not None:
            self.graphs.clear()

    def architecture(self) -> dict[str, Any]:
        """Settings that two runs must share for one to load the other's checkpoint: those that shape the state."""
        config = self.config
        settings = dataclasses.asdict(config.field) | {
            "bound": config.render.bound,
            "occupancy_resolution": config.render.occupancy_resolution,
            "optim": config.optim.optim,
        }
        unused = settings_unused_by(config.field.backbone)
        architecture = {name: value for name, value in settings.items() if name not in unused}
        if self.shape is not None:
            architecture |= {"tet_grid_size": config.dmtet.tet_grid_size, "lock_geo": config.dmtet.lock_geo}
        return architecture

    def save(self, workspace: Workspace) -> Path:
        """Write a checkpoint; returns its path."""
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
        run = self.config.run_facts(self.seed)
        return save_checkpoint(workspace.checkpoints, self.step, state, self.architecture(), run)

    def start_shape(self, progress: Callable[[float], None] = lambda part: None) -> None:
        """Initialise the shape of a mesh refinement from --init_with. Raises UserError: when that is not possible."""
        assert self.shape is not None and isinstance(self.renderer, MeshRenderer)
        start = load_start(self.config, self.shape, progress)
        if start is not None and start.checkpoint:
            expected = self.architecture() | {"optim": read_architecture(start.path).get("optim")}  # of any optimiser
            of_mesh = ("tet_grid_size", "lock_geo")
            _, state = load_checkpoint(start.path, {k: v for k, v in expected.items() if k not in of_mesh})
            try:
                self.optimizer.start_scene(state["optimizer"]["ema"])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise damaged(start.path, f"its state: {type(error).__name__}: {first_line(error)}") from error
            start_from_field(self.shape, self.field, self.config.render.density_thresh)
        self.renderer.surface()  # raises UserError: when there is none
        self.optimizer.state.ema.copy_(self.optimizer.params)

    def load(self, path: Path) -> None:
        """Continue from the checkpoint at `path`. Raises UserError: when it is damaged or of another architecture."""
        most_bytes = MAX_COPIES * self.optimizer.params.nbytes + MAX_OTHER_BYTES
        self.step, state = load_checkpoint(path, self.architecture(), most_bytes)
        try:
            self._restore(state)
        except torch.OutOfMemoryError:  # a RuntimeError without a fault of the file
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise damaged(path, f"its state: {type(error).__name__}: {first_line(error)}") from error

    def _restore(self, state: dict[str, Any]) -> None:
        counts = {name: int(state.get(name, 0)) for name in ("skipped", "overflowed", "skipped_in_a_row")}
        counts["the optimiser's steps"] = int(state["optimizer"]["steps"])
        if wrong := [f"{name} {count}" for name, count in counts.items() if not 0 <= count <= self.step]:
            raise ValueError(f"{', '.join(wrong)} after {self.step} steps")
        self.optimizer.load_state_dict(state["optimizer"])
        self.renderer.load_state_dict(state.get("renderer", {}))
        self.scaler.load_state_dict(state["scaler"])
        self.schedule = RunProgress(**state["schedule"]).extended_to(self.step, self.config.run.iters)
        if self.config.run.exp_end_iter is None:  # a configured end of the phases does not move
            phases = state.get("phases", state["schedule"])  # earlier versions had one progress for both
            self.phases = RunProgress(**phases).extended_to(self.step, self.config.run.iters)
        self.skipped.copy_(state["skipped"])
        self.overflowed.copy_(state.get("overflowed", torch.zeros(())))  # earlier versions did not save it
        self.skipped_in_a_row.copy_(state.get("skipped_in_a_row", torch.zeros(())))
        self.degenerate_in_a_row.copy_(state.get("lost_in_a_row", torch.zeros(2)))
        attention = state.get("attention")
        if attention is not None and (len(attention) != 2 or not set(attention) <= set(KINDS)):
            raise ValueError(f"attention is {attention}")
        self.attention = None if attention is None else AttentionChoice(*attention)
