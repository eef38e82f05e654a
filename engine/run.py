"""A whole run, from a configuration to the files: what the command calls once its arguments are good."""

import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import dream_fast
from dream_fast import __version__
from dream_fast.engine.config.model_names import CLIP_MODEL, IF_MODEL
from dream_fast.engine.config.schema import Config, settings
from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.dream_mini.vocabulary import known_words
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.images import six_view_paths, write_six_views
from dream_fast.engine.export.isosurface import NoSurface, simplify
from dream_fast.engine.export.mesh_files import mesh_paths, write_mesh, write_textured
from dream_fast.engine.export.report import write_report
from dream_fast.engine.export.silhouette import outline_of
from dream_fast.engine.export.video import turntable_frames, write_video
from dream_fast.engine.guidance.clip import clip_guidance
from dream_fast.engine.guidance.diffusion import PromptGuidance, TextGuidance
from dream_fast.engine.guidance.model.attention import Chosen
from dream_fast.engine.guidance.model.components import COMPILED, Components, choose_source, load_components
from dream_fast.engine.guidance.prompts import PromptEmbeddings
from dream_fast.engine.guidance.sds import ScoreDistillation
from dream_fast.engine.guidance.sum import GuidanceSum
from dream_fast.engine.render.mesh import MeshRenderer
from dream_fast.engine.runtime.device import Runtime, choose_runtime, draw_seed, machine, peak_memory, prepare
from dream_fast.engine.runtime.paths import expanded
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.runtime.signals import terminating_cleanly
from dream_fast.engine.scene.camera import six_views
from dream_fast.engine.scene.field import SceneField
from dream_fast.engine.training.callbacks import check_watchable
from dream_fast.engine.training.divergence import KINDS, RESCUED, Lost, flags, rescued
from dream_fast.engine.training.failures import disk_troubles, memory_troubles
from dream_fast.engine.training.kernel_warmup import compile_kernels
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.checkpoint import Damaged, list_checkpoints
from dream_fast.engine.workspace.folder import Workspace
from dream_fast.engine.workspace.stored_run import StoredRun

PACKAGES = ("torch", "triton", "diffusers", "transformers", "xformers", "safetensors", "numpy")


def run(config: Config) -> int:
    """Optimises (unless ``--test``, or all iterations are done) and writes the outputs; returns the exit status.

    With --rescue a run whose object is lost starts again with other settings, at most twice.

    Everything that can be refused is refused before anything is written.
    """
    workspace = Workspace(expanded(config.run.workspace))
    target = _output_folder(config, workspace)
    otherwise = "; --output FOLDER takes the outputs of --test elsewhere"
    target.check_usable(otherwise if config.run.test and target is workspace else "")
    reporter = Reporter()
    troubles = disk_troubles(target, workspace), memory_troubles(config, workspace)
    with _warnings_to(reporter), terminating_cleanly(), target.claimed(), troubles[0], troubles[1]:
        for last in (False, False, True):
            try:
                return _run(config.override({"rescue": config.run.rescue and not last}), workspace, target, reporter)
            except Lost as lost:
                tried = workspace.stored_config() or config
                changes = rescued(tried, lost.kind)
                config = tried.override({**changes, "ckpt": "latest", "rescue": True})
                workspace.clear()
                workspace.write_config(config)
                reporter.warn(f"{KINDS[lost.kind]}: starting again with {flags(changes)}")
        raise AssertionError("the last turn does not raise Lost")


def _output_folder(config: Config, workspace: Workspace) -> Workspace:
    """Where the outputs go: the workspace, or with --output another folder."""
    if config.run.output is None:
        return workspace
    target = Workspace(expanded(config.run.output), flag="--output")
    return workspace if os.path.realpath(target.path) == os.path.realpath(workspace.path) else target


def _run(config: Config, workspace: Workspace, target: Workspace, reporter: Reporter) -> int:
    started = time.monotonic()
    runtime = choose_runtime(config)
    fresh = config.run.ckpt == "scratch"
    earlier = None if fresh else workspace.stored_run()
    stored = None if earlier is None else earlier.config
    config = _with_seed(config, stored)
    if stored is not None and config.run.rescue:
        config = config.override({name: _setting(stored, name) for name in RESCUED})
    if stored is not None:
        # Looking at a run is no part of it, so that may happen on another device.
        asked = config.override({"device": stored.run.device}) if config.run.test else config
        workspace.check_same_run(asked)
        _say_version(earlier, reporter)
    prepare(runtime, config.run.seed, deterministic=config.run.deterministic, vram_O=config.run.vram_O)
    trainer = Trainer(config, runtime, config.run.seed)
    spoiled = _load_checkpoint(trainer, config, workspace, reporter)
    if trainer.shape is not None and trainer.step == 0:
        reporter.say(f"the surface starts from {config.dmtet.init_with or 'a sphere'}")
        trainer.start_shape()

    if config.run.test or trainer.step >= config.run.iters:
        if target is not workspace:
            target.make_for_outputs_of(workspace, config)
        reporter.open_log(target.log)
        reporter.say(_looking_line(config, runtime, trainer.step))
        written = write_outputs(trainer, target, reporter, only_missing=not config.run.test)
        if written.some or not target.report.exists():
            write_report(target)
        reporter.files(target.files())
        return written.status()

    check_watchable(config.output)
    runs = [] if fresh else workspace.read_manifest().get("runs", [])
    guiding = load_guidance(config, runtime, trainer.attention)
    trainer.guidance, trainer.attention = guiding.guidance, guiding.attention

    workspace.make()
    if fresh:
        workspace.clear()
    for path in spoiled:
        reporter.warn(f"the damaged checkpoint is kept as {workspace.set_aside(path)}")
    workspace.write_config(config)
    workspace.rewind(trainer.step)
    reporter.open_log(workspace.log)
    manifest = _manifest(config, runtime, guiding, runs, trainer.step)
    workspace.write_manifest(manifest)
    reporter.say(_start_line(config, runtime, guiding, trainer.field, trainer.step))
    compile_kernels(config, runtime, reporter)
    times = [started, time.monotonic()]
    trainer.fit(workspace, reporter)
    times.append(time.monotonic())
    trainer.guidance = None
    del guiding  # its memory is the outputs' now
    written = write_outputs(trainer, workspace, reporter)
    times.append(time.monotonic())
    seconds, peak = times[-1] - started, peak_memory(runtime.device)
    parts = zip(("start", "steps", "outputs"), pairwise(times), strict=True)
    seconds_of = {part: round(end - begin, 1) for part, (begin, end) in parts}
    finished = {"finished": _now(), "seconds": round(seconds, 1), "seconds_of": seconds_of, "peak_bytes": peak}
    manifest["runs"][-1] |= finished
    workspace.write_manifest(manifest)
    write_report(workspace)
    memory = ", ".join(f"{count / 1e9:.2f} GB of {place} memory" for place, count in peak.items())
    reporter.say(f"done in {seconds:.0f} s, at most {memory}")
    reporter.files(workspace.files())
    return written.status()


# -------------------------------------------------------------------------------------------------------------- outputs


class Output(NamedTuple):
    """Files that a finished run should have, and what writes them."""

    paths: list[Path]
    write: Callable[[], object]


def outputs(trainer: Trainer, workspace: Workspace, reporter: Reporter) -> list[Output]:
    """The outputs that were asked for: six views; the video, unless six views alone were asked; the mesh."""
    config = trainer.config
    camera, output = config.camera, config.output
    video = workspace.results / "turntable.mp4"

    def write_turntable() -> None:
        with reporter.bar("video", output.dataset_size_test) as bar:
            frames = turntable_frames(trainer.renderer, camera, output.dataset_size_test)
            write_video(video, bar.count(frames), output.video_fps)

    wanted = [
        Output(six_view_paths(workspace.results), lambda: write_six_views(workspace.results, trainer.renderer, camera))
    ]
    if not config.run.six_views:
        wanted.append(Output([video], write_turntable))
    if config.run.save_mesh:
        wanted.append(_mesh_output(trainer, workspace.mesh / "mesh.glb", reporter))
    return wanted


def _mesh_output(trainer: Trainer, path: Path, reporter: Reporter) -> Output:
    """The field's surface, or that of a mesh refinement as it is."""
    output, refined = trainer.config.output, isinstance(trainer.renderer, MeshRenderer)

    def write() -> None:
        with reporter.bar("mesh", 100) as bar:
            texels, told = output.texture_resolution, dict(progress=lambda part: bar.advance(round(100 * part)))
            if refined:
                mesh = simplify(trainer.renderer.mesh(), output.decimate_target)
                write_textured(path, mesh, trainer.field, texels, **told)
            else:
                outline = outline_of(trainer.renderer, six_views(trainer.config.camera, trainer.device))
                threshold, target = trainer.config.render.density_thresh, output.decimate_target
                options = dict(outline=outline, decimate_target=target, texture_resolution=texels, **told)
                write_mesh(path, trainer.field, output.mcubes_resolution, threshold, **options)

    return Output(mesh_paths(path, normals=not refined), write)


class Written(NamedTuple):
    """What became of the outputs: whether there was something to write, and why there is no mesh."""

    some: bool
    no_mesh: NoSurface | None

    def status(self) -> int:
        """The exit status: 0, or the error, now that everything else is there."""
        if self.no_mesh is not None:
            raise self.no_mesh
        return 0


def write_outputs(trainer: Trainer, workspace: Workspace, reporter: Reporter, *, only_missing: bool = False) -> Written:
    """Writes the outputs from the averaged weights, without specks."""
    some, no_mesh = False, None
    with trainer.optimizer.ema_weights(), trainer.renderer.without_specks():
        for output in outputs(trainer, workspace, reporter):
            if not (only_missing and all(path.exists() for path in output.paths)):
                some = True
                try:
                    output.write()
                except NoSurface as error:
                    no_mesh = error
    return Written(some, no_mesh)


# ---------------------------------------------------------------------------------------------------------------- start


def _with_seed(config: Config, stored: Config | None) -> Config:
    """The seed that was typed, else that of the run that is taken up, else a drawn one."""
    if config.run.seed is not None:
        return config
    return config.override({"seed": draw_seed() if stored is None else stored.run.seed})


def _say_version(stored: StoredRun, reporter: Reporter) -> None:
    """Tell of a run of another version, and which of its settings are ignored."""
    if not stored.is_of_this_version:
        reporter.say(f"dream-fast {stored.version} wrote this run, which keeps its settings; this is {__version__}")
    if stored.ignored:
        flags = ", ".join(f"--{name.partition('.')[2]} {value}" for name, value in stored.ignored.items())
        reporter.warn(f"settings of this run that dream-fast {__version__} does not have are ignored: {flags}")


def _load_checkpoint(trainer: Trainer, config: Config, workspace: Workspace, reporter: Reporter) -> list[Path]:
    """Loads the checkpoint to start from, if there is one; returns those that are newer but damaged.

    UserError: the only one is damaged, or the one that was asked for.
    """
    candidates, spoiled = _find_checkpoints(config, workspace), []
    while candidates:
        path = candidates.pop()
        try:
            trainer.load(path)
            return spoiled
        except Damaged as error:
            if not candidates:
                raise
            spoiled.append(path)
            reporter.warn(f"{error}: this run goes back to {candidates[-1].name}")
    return spoiled


def _setting(config: Config, name: str) -> Any:
    return next(getattr(getattr(config, room.name), name) for room, field in settings() if field.name == name)


def _find_checkpoints(config: Config, workspace: Workspace) -> list[Path]:
    """The checkpoints to start from, the best one last; none to start at the beginning."""
    own = list_checkpoints(workspace.checkpoints)
    if config.run.ckpt not in ("latest", "scratch"):
        path = expanded(config.run.ckpt)
        if own and not config.run.test and path.resolve() not in [mine.resolve() for mine in own]:
            raise UserError(
                f"--ckpt {path} would replace the run that --workspace {workspace.path} holds; leave it out to go on "
                "with that run, or choose another --workspace"
            )
        return [path]
    found = own if config.run.ckpt == "latest" else []
    if config.run.test and not found:
        raise UserError(f"--test needs a checkpoint, and --workspace {workspace.path} has none yet")
    return found


class Guiding(NamedTuple):
    """What guides a run, the models' names, and the attention of the one that is a Stable Diffusion, if one is."""

    guidance: PromptGuidance
    models: str
    attention: Chosen | None


def load_guidance(config: Config, runtime: Runtime, kept: Chosen | None = None) -> Guiding:
    """Load the models that guide, one after the other, and embed the prompts; of several guidances the sum.

    ``kept`` is the attention that a run which is taken up has computed with.
    """
    guidance, run, camera = config.guidance, config.run, config.camera
    angles = (camera.angle_overhead, camera.view_blend, camera.angle_front)
    parts: dict[str, PromptGuidance] = {}
    models, attention = [], None
    for name in guidance.guidance:
        if name == "clip":
            source = guidance.clip_key or CLIP_MODEL
            parts[name] = clip_guidance(source, runtime.device, run.text, run.own_texts, guidance, *angles)
            models.append(source)
            continue
        source = choose_source(sd_version=guidance.sd_version, hf_key=guidance.hf_key)
        if name == "IF":
            source = guidance.if_key or IF_MODEL
        components = _load_components(config, runtime, source, name, kept)
        prompts = _embed(config, components, source)
        parts[name] = TextGuidance(ScoreDistillation(components, guidance), prompts, *angles)
        models.append(components.name)
        if not components.latents_are_pixels:
            attention = components.attention
    whole = GuidanceSum(parts) if len(parts) > 1 else next(iter(parts.values()))
    return Guiding(whole, " + ".join(models), attention)


def _load_components(
    config: Config, runtime: Runtime, source: str | Path, name: str, kept: Chosen | None
) -> Components:
    """The diffusion model at ``source``, for the guidance ``name``."""
    run = config.run
    # A measurement may end differently the next time.
    attention = "sdpa" if run.deterministic and run.attention == "auto" else run.attention
    options = dict(vram_O=run.vram_O, attention=attention, kept=kept, compiled=COMPILED if run.compile else ())
    options["need_vae_decoder"] = config.output.save_guidance
    if name == "IF":
        options["kind"] = name
    components = load_components(source, runtime.device, runtime.dtype, **options)
    if config.shading.latent_iter_ratio > 0 and components.latent_channels != 4:
        raise UserError(
            f"the latents of {components.name} have {components.latent_channels} channels; the phase in which normals "
            "and opacity are the latent needs 4, so give --latent_iter_ratio 0"
        )
    return components


def _embed(config: Config, components: Components, source: str | Path) -> PromptEmbeddings:
    """The prompts as the model reads them: of each text the embedded one gets only the words that it knows."""
    run = config.run
    read = known_words if source == MODEL_FOLDER else str
    own = {view: read(text) for view, text in run.own_texts.items()}
    return PromptEmbeddings(components, read(run.text), read(run.negative), own=own)


def _start_line(config: Config, runtime: Runtime, guiding: Guiding, field: SceneField, step: int) -> str:
    camera, guidance = config.camera, config.guidance
    kernels = f"field {field.plan(config.render.normals)}, " if runtime.device.type == "cuda" else ""
    views = f"{camera.batch_size} x " if camera.batch_size > 1 else ""
    score = f"{guidance.score}{' with Perp-Neg' * guidance.perpneg}, guidance scale {guidance.guidance_scale:g}"
    if guidance.guidance == ("clip",):
        score = "likeness in CLIP"
    notes = [f"attention {guiding.attention}"] * (guiding.attention is not None) + ["compiled"] * config.run.compile
    models = guiding.models + (f" ({', '.join(notes)})" if notes else "")
    height, width = config.train_size
    mesh = f"a mesh in {config.dmtet.tet_grid_size} layers of tetrahedra, " * config.dmtet.dmtet
    return (
        f"{config.run.text!r}: {models} on {runtime.description}; "
        f"{kernels}steps {step} to {config.run.iters}, {mesh}{views}{width}x{height} pixels, {score}, "
        f"{config.optim.optim} lr {config.optim.lr:g}, seed {config.run.seed}"
    )


def _looking_line(config: Config, runtime: Runtime, step: int) -> str:
    if config.run.test:
        return f"{config.run.text!r} after {step} steps, on {runtime.description}"
    return (
        f"this run is finished ({step} of {config.run.iters} steps): only files that are missing are written; "
        "--iters takes it further, --ckpt scratch starts over"
    )


def _manifest(
    config: Config, runtime: Runtime, guiding: Guiding, earlier: list[dict[str, Any]], step: int
) -> dict[str, Any]:
    """What made this run, so that it can be made again; each time it is taken up adds to the ``earlier`` ones."""
    this = {
        "command": shlex.join(["dream-fast", *sys.argv[1:]]),
        "started": _now(),
        "from_step": step,
        "to_step": config.run.iters,
        "device": runtime.description,
        "attention": None if guiding.attention is None else str(guiding.attention),
        "machine": machine(),
        "versions": _versions(),
        "git": _git_revision(),
    }
    return {
        "text": config.run.text,
        "seed": config.run.seed,
        "model": guiding.models,
        "runs": [*earlier, this],
    }


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    ours = {"dream_fast": __version__, "python": platform.python_version()}
    return ours | {package: version(package) for package in PACKAGES}


def _git_revision() -> str | None:
    """The commit that this code was checked out at ("-dirty" with changes), or None for an installed package."""
    root = Path(dream_fast.__file__).parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git program, or no commit yet
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@contextmanager
def _warnings_to(reporter: Reporter):
    """Warnings that our modules log (a truncated prompt) are said where the rest is said."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reporter.warn(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("dream_fast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
