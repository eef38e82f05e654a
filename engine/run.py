"""A whole run, from a configuration to the files: what the command calls once its arguments are good."""

import os
import time
from itertools import pairwise
from pathlib import Path

from dream_fast import __version__
from dream_fast.engine.config.configure import finalize
from dream_fast.engine.config.schema import Config
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.report import write_report
from dream_fast.engine.guidance.registry import LoadedGuidance, load_guidance
from dream_fast.engine.outputs import write_outputs
from dream_fast.engine.runtime.device import Runtime, choose_runtime, peak_memory, prepare
from dream_fast.engine.runtime.paths import expand_user
from dream_fast.engine.runtime.reporter import Reporter, log_warnings_to
from dream_fast.engine.runtime.seeds import draw_seed
from dream_fast.engine.runtime.signals import sigterm_raises
from dream_fast.engine.training.callbacks import check_callbacks
from dream_fast.engine.training.divergence import DEGENERACIES, DegenerateScene, format_flags, rescue_overrides
from dream_fast.engine.training.failures import translate_disk_errors, translate_oom
from dream_fast.engine.training.kernel_warmup import precompile_kernels
from dream_fast.engine.training.loop import Loop, LoopOptions
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.checkpoint import Damaged, list_checkpoints
from dream_fast.engine.workspace.folder import Workspace
from dream_fast.engine.workspace.manifest import make_manifest, now
from dream_fast.engine.workspace.stored_run import StoredRun


def run(config: Config, loop: LoopOptions | None = None) -> int:
    """Optimises (unless ``--test``, or all iterations are done) and writes the outputs; returns the exit status.

    With --rescue a run whose object is lost starts again with other settings, at most twice. `loop` has other intervals
    and hooks of the training loop.

    Everything that can be refused is refused before anything is written.
    """
    workspace = Workspace(expand_user(config.run.workspace))
    target = _output_folder(config, workspace)
    otherwise = "; --output FOLDER takes the outputs of --test elsewhere"
    target.check_usable(otherwise if config.run.test and target is workspace else "")
    reporter = Reporter()
    troubles = translate_disk_errors(target, workspace), translate_oom(config, workspace)
    with log_warnings_to(reporter), sigterm_raises(), target.locked(), troubles[0], troubles[1]:
        for last in (False, False, True):
            try:
                return _run(
                    config.override({"rescue": config.run.rescue and not last}), workspace, target, reporter, loop
                )
            except DegenerateScene as lost:
                tried = workspace.stored_config() or config
                changes = rescue_overrides(tried, lost.kind)
                config = tried.override({**changes, "ckpt": "latest", "rescue": True})
                workspace.clear()
                workspace.write_config(config)
                reporter.warn(f"{DEGENERACIES[lost.kind]}: starting again with {format_flags(changes)}")
        raise AssertionError("the last turn does not raise Lost")


def _output_folder(config: Config, workspace: Workspace) -> Workspace:
    """Where the outputs go: the workspace, or with --output another folder."""
    if config.run.output is None:
        return workspace
    target = Workspace(expand_user(config.run.output), flag="--output")
    return workspace if os.path.realpath(target.path) == os.path.realpath(workspace.path) else target


def _run(
    config: Config, workspace: Workspace, target: Workspace, reporter: Reporter, loop: LoopOptions | None = None
) -> int:
    started = time.monotonic()
    runtime = choose_runtime(config)
    fresh = config.run.ckpt == "scratch"
    earlier = None if fresh else workspace.stored_run()
    stored = None if earlier is None else earlier.config
    config = finalize(config, stored, draw_seed())
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
            target.create_for_outputs_of(workspace, config)
        reporter.open_log(target.log)
        reporter.say(_test_banner(config, runtime, trainer.step))
        written = write_outputs(trainer, target, reporter, only_missing=not config.run.test)
        if written.some or not target.report.exists():
            write_report(target)
        reporter.files(target.files())
        return written.status()

    check_callbacks(config.output)
    runs = [] if fresh else workspace.read_manifest().get("runs", [])
    guiding = load_guidance(config, runtime, trainer.attention)
    trainer.guidance, trainer.attention = guiding.guidance, guiding.attention

    workspace.create()
    if fresh:
        workspace.clear()
    for path in spoiled:
        reporter.warn(f"the damaged checkpoint is kept as {workspace.quarantine(path)}")
    workspace.write_config(config)
    workspace.truncate_after(trainer.step)
    reporter.open_log(workspace.log)
    attention = None if guiding.attention is None else str(guiding.attention)
    manifest = make_manifest(config, runtime, guiding.models, attention, runs, trainer.step)
    workspace.write_manifest(manifest)
    reporter.say(_start_line(config, runtime, guiding, trainer))
    precompile_kernels(config, runtime, reporter)
    times = [started, time.monotonic()]
    Loop(trainer, workspace, reporter, loop).fit()
    times.append(time.monotonic())
    trainer.guidance = None
    del guiding  # its memory is the outputs' now
    written = write_outputs(trainer, workspace, reporter)
    times.append(time.monotonic())
    seconds, peak = times[-1] - started, peak_memory(runtime.device)
    parts = zip(("start", "steps", "outputs"), pairwise(times), strict=True)
    seconds_of = {part: round(end - begin, 1) for part, (begin, end) in parts}
    finished = {"finished": now(), "seconds": round(seconds, 1), "seconds_of": seconds_of, "peak_bytes": peak}
    manifest["runs"][-1] |= finished
    workspace.write_manifest(manifest)
    write_report(workspace)
    memory = ", ".join(f"{count / 1e9:.2f} GB of {place} memory" for place, count in peak.items())
    reporter.say(f"done in {seconds:.0f} s, at most {memory}")
    reporter.files(workspace.files())
    return written.status()


# -------------------------------------------------------------------------------------------------------------- outputs


# ---------------------------------------------------------------------------------------------------------------- start


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


def _find_checkpoints(config: Config, workspace: Workspace) -> list[Path]:
    """The checkpoints to start from, the best one last; none to start at the beginning."""
    own = list_checkpoints(workspace.checkpoints)
    if config.run.ckpt not in ("latest", "scratch"):
        path = expand_user(config.run.ckpt)
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


def _start_line(config: Config, runtime: Runtime, guiding: LoadedGuidance, trainer: Trainer) -> str:
    camera, guidance = config.camera, config.guidance
    kernels = (
        f"field {trainer.field.backend_description(config.render.normals)}, " if runtime.device.type == "cuda" else ""
    )
    views = f"{camera.batch_size} x " if camera.batch_size > 1 else ""
    score = f"{guidance.objective}{' with Perp-Neg' * guidance.perpneg}, guidance scale {guidance.guidance_scale:g}"
    if guidance.guidance == ("clip",):
        score = "likeness in CLIP"
    notes = [f"attention {guiding.attention}"] * (guiding.attention is not None) + ["compiled"] * config.run.compile
    models = guiding.models + (f" ({', '.join(notes)})" if notes else "")
    height, width = config.train_size
    rates = ", ".join(f"{rate:g} ({group})" for group, rate in trainer.optimizer.learning_rates().items())
    mesh = f"a mesh in {config.dmtet.tet_grid_size} layers of tetrahedra, " * config.dmtet.dmtet
    return (
        f"{config.run.text!r}: {models} on {runtime.description}; "
        f"{kernels}steps {trainer.step} to {config.run.iters}, {mesh}{views}{width}x{height} pixels, {score}, "
        f"{config.optim.optim} with learning rates {rates}, seed {config.run.seed}"
    )


def _test_banner(config: Config, runtime: Runtime, step: int) -> str:
    if config.run.test:
        return f"{config.run.text!r} after {step} steps, on {runtime.description}"
    return (
        f"this run is finished ({step} of {config.run.iters} steps): only files that are missing are written; "
        "--iters takes it further, --ckpt scratch starts over"
    )
