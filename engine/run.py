"""The order of a run, from its configuration to its files. The command calls `run` with a valid configuration."""

import time
from pathlib import Path
from typing import Any

from dream_fast.engine.config.configure import finalize
from dream_fast.engine.config.schema import Config
from dream_fast.engine.config.validate import check_packages
from dream_fast.engine.export.report import write_report
from dream_fast.engine.guidance.registry import load_guidance
from dream_fast.engine.outputs import choose_output_folder, paths_of_outputs, paths_of_run, write_outputs
from dream_fast.engine.runtime.device import Runtime, choose_runtime, peak_memory, prepare
from dream_fast.engine.runtime.paths import expand_user
from dream_fast.engine.runtime.reporter import Reporter, log_warnings_to
from dream_fast.engine.runtime.seeds import draw_seed
from dream_fast.engine.runtime.signals import signals_raise
from dream_fast.engine.runtime.streams import safe_output
from dream_fast.engine.training.divergence import DEGENERACIES, DegenerateScene, format_flags, rescue_overrides
from dream_fast.engine.training.failures import translate_disk_errors, translate_oom
from dream_fast.engine.training.kernel_warmup import precompile_kernels
from dream_fast.engine.training.loop import Loop, LoopOptions, validate, validation_path
from dream_fast.engine.training.messages import end_message, outputs_message, report_version, start_message
from dream_fast.engine.training.resume import resume
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.folder import Workspace
from dream_fast.engine.workspace.manifest import OUTPUTS_STEP, finish_manifest, make_manifest

MAX_RESCUES = 2


def run(config: Config, loop: LoopOptions | None = None) -> int:
    """Optimise, unless `--test` is set or all iterations are done, and write the outputs. Return the exit status.

    With `--rescue` a run that loses its object restarts with other settings, at most MAX_RESCUES times. `loop` has
    intervals and hooks of the training loop. Everything is checked before a file is written.

    Raises UserError: for every error that the user can fix.
    """
    workspace = Workspace(expand_user(config.run.workspace))
    target = choose_output_folder(config, workspace)
    hint = "; --output FOLDER writes the outputs of --test elsewhere"
    target.check_usable(hint if config.run.test and target is workspace else "")
    reporter = Reporter()
    errors = translate_disk_errors(target, workspace), translate_oom(config, workspace)
    with safe_output(), log_warnings_to(reporter), signals_raise(), target.locked(), errors[0], errors[1]:
        for attempt in range(MAX_RESCUES + 1):
            rescue = config.run.rescue and attempt < MAX_RESCUES
            try:
                return _run_once(config.override({"rescue": rescue}), workspace, target, reporter, loop)
            except DegenerateScene as degenerate:
                config = _restart_rescued(config, degenerate.kind, workspace, reporter)
        raise AssertionError("the last attempt does not raise DegenerateScene")


def _restart_rescued(config: Config, kind: str, workspace: Workspace, reporter: Reporter) -> Config:
    """Clear the workspace and return the configuration of the restart, with settings against that degeneracy."""
    config = workspace.stored_config() or config
    overrides = rescue_overrides(config, kind)
    config = config.override({**overrides, "ckpt": "latest", "rescue": True})
    workspace.clear()
    workspace.write_config(config)
    reporter.warn(f"{DEGENERACIES[kind]}: restarting with {format_flags(overrides)}")
    return config


def _run_once(
    config: Config, workspace: Workspace, target: Workspace, reporter: Reporter, loop: LoopOptions | None
) -> int:
    started = time.monotonic()
    runtime = choose_runtime(config)
    stored = None if config.run.ckpt == "scratch" else workspace.stored_run()
    config = finalize(config, None if stored is None else stored.config, draw_seed())
    if stored is not None:
        # --test may run on another device, since it does not change the run.
        same_device = {"device": stored.config.run.device} if config.run.test else {}
        workspace.check_same_run(config.override(same_device))
        report_version(stored, reporter)
    prepare(runtime, config.run.drawn_seed, deterministic=config.run.deterministic, vram_O=config.run.vram_O)
    trainer = Trainer(config, runtime, config.run.drawn_seed)
    damaged = resume(trainer, workspace, reporter)
    if config.dmtet.dmtet and trainer.step == 0:
        reporter.say(f"the surface starts from {config.dmtet.init_with or 'a sphere'}")
        with reporter.bar("distances", 100) as bar:
            trainer.start_shape(lambda part: bar.advance(round(100 * part)))
    if config.run.test or trainer.step >= config.run.iters:
        return _write_files(trainer, runtime, workspace, target, reporter)
    return _train(trainer, runtime, workspace, damaged, reporter, loop, started)


def _write_files(
    trainer: Trainer, runtime: Runtime, workspace: Workspace, target: Workspace, reporter: Reporter
) -> int:
    """Write the outputs of a stored run: all of them with `--test`, else those that are missing."""
    config = trainer.config
    if target is not workspace:
        target.create_for_outputs_of(workspace, config)
    target.check_free(paths_of_outputs(config, target, only_missing=not config.run.test))
    reporter.open_log(target.log)
    reporter.say(outputs_message(config, runtime, trainer.step))
    if not config.run.test:
        with reporter.collect(workspace.manifest):
            manifest = workspace.read_manifest()
            if manifest.get(OUTPUTS_STEP, trainer.step) != trainer.step:  # ended before it cleared them
                _clear_outputs(trainer, workspace, manifest, reporter)
        strip = validation_path(workspace, trainer.step)
        if not strip.exists():
            with reporter.collect(strip):
                validate(trainer, strip)
    any_written = write_outputs(trainer, target, reporter, only_missing=not config.run.test)
    if any_written or not target.report.is_file():
        with reporter.collect(target.report):
            write_report(target)
    reporter.files(target.files())
    reporter.check_failures()
    return 0


def _clear_outputs(trainer: Trainer, workspace: Workspace, manifest: dict[str, Any], reporter: Reporter) -> None:
    """Remove the outputs of fewer steps, and note in the manifest that those to come are of this step."""
    with reporter.collect(workspace.results):
        workspace.clear_outputs()
    with reporter.collect(workspace.manifest):
        manifest[OUTPUTS_STEP] = trainer.step
        workspace.write_manifest(manifest)


def _train(
    trainer: Trainer,
    runtime: Runtime,
    workspace: Workspace,
    damaged: list[Path],
    reporter: Reporter,
    loop: LoopOptions | None,
    started: float,
) -> int:
    """Load the guidance, train, and write the outputs."""
    config = trainer.config
    check_packages(config)
    workspace.check_free(paths_of_run(config, workspace, trainer.step))
    is_new = config.run.ckpt == "scratch"
    earlier = {} if is_new else workspace.read_manifest()
    loaded = load_guidance(config, runtime, trainer.attention)
    trainer.guidance, trainer.attention = loaded.guidance, loaded.attention

    workspace.create()
    if is_new:
        workspace.clear()
    for path in damaged:
        if (other := workspace.quarantine(path)) is not None:
            reporter.warn(f"the damaged checkpoint is kept as {other}")
    workspace.write_config(config)
    workspace.truncate_after(trainer.step)
    reporter.open_log(workspace.log)
    manifest = make_manifest(config, runtime, loaded.models, loaded.attention, earlier, trainer.step)
    workspace.write_manifest(manifest)
    reporter.say(start_message(trainer, runtime, loaded))
    precompile_kernels(config, runtime, reporter)

    times = [started, time.monotonic()]
    Loop(trainer, workspace, reporter, loop).fit()
    times.append(time.monotonic())
    trainer.guidance = None
    del loaded  # the outputs need its memory
    _clear_outputs(trainer, workspace, manifest, reporter)
    write_outputs(trainer, workspace, reporter)
    times.append(time.monotonic())

    peak = peak_memory(runtime.device)
    finish_manifest(manifest, times, peak)
    with reporter.collect(workspace.manifest):
        workspace.write_manifest(manifest)
    with reporter.collect(workspace.report):
        write_report(workspace)
    reporter.say(end_message(times[-1] - started, peak))
    reporter.files(workspace.files())
    reporter.check_failures()
    return 0
