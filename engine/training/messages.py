"""Messages of a run: its start, its end, and differences of another version."""

from collections.abc import Mapping

from dream_fast import __version__
from dream_fast.engine.config.guidances import specs_of
from dream_fast.engine.config.schema import Config
from dream_fast.engine.guidance.registry import LoadedGuidance
from dream_fast.engine.runtime.device import Runtime
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.stored_run import StoredRun


def start_message(trainer: Trainer, runtime: Runtime, loaded: LoadedGuidance) -> str:
    """Return the line at the start of a run: prompt, models, device, steps, size, objective, learning rates, seed."""
    config = trainer.config
    backend = f"field {trainer.field.backend_description(config.render.normals)}, "
    notes = [] if loaded.attention is None else [f"attention {loaded.attention}"]
    notes += ["compiled"] * config.run.compile
    models = loaded.models + (f" ({', '.join(notes)})" if notes else "")
    mesh = f"a mesh in {config.dmtet.tet_grid_size} layers of tetrahedra, " * config.dmtet.dmtet
    views = f"{config.camera.batch_size} x " if config.camera.batch_size > 1 else ""
    height, width = config.train_size
    rates = ", ".join(f"{rate:g} ({group})" for group, rate in trainer.optimizer.learning_rates().items())
    return (
        f"{config.run.text!r}: {models} on {runtime.description}; "
        f"{backend if runtime.device.type == 'cuda' else ''}steps {trainer.step} to {config.run.iters}, "
        f"{mesh}{views}{width}x{height} pixels, {_objective(config)}, "
        f"{config.optim.optim} with learning rates {rates}, seed {config.run.seed}"
    )


def _objective(config: Config) -> str:
    specs, guidance = specs_of(config.guidance.guidance), config.guidance
    if not any(spec.is_diffusion for spec in specs):
        return ", ".join(spec.objective for spec in specs)
    perp_neg = " with Perp-Neg" * guidance.perpneg
    return f"{guidance.objective}{perp_neg}, guidance scale {guidance.guidance_scale:g}"


def outputs_message(config: Config, runtime: Runtime, step: int) -> str:
    """Return the line of a run without steps: `--test`, or a finished run."""
    if config.run.test:
        return f"{config.run.text!r} after {step} steps, on {runtime.description}"
    return (
        f"this run is finished ({step} of {config.run.iters} steps): only files that are missing are written; "
        "--iters takes it further, --ckpt scratch starts over"
    )


def end_message(seconds: float, peak: Mapping[str, int]) -> str:
    """Return the line at the end of a run: its seconds, and peak bytes by kind of memory."""
    memory = ", ".join(f"{count / 1e9:.2f} GB of {kind} memory" for kind, count in peak.items())
    return f"done in {seconds:.0f} s, at most {memory}"


def report_version(stored: StoredRun, reporter: Reporter) -> None:
    """Report a run of another version, and which of its settings are ignored."""
    if not stored.is_of_this_version:
        reporter.say(f"dream-fast {stored.version} wrote this run, which keeps its settings; this is {__version__}")
    if stored.ignored:
        flags = ", ".join(f"--{name.partition('.')[2]} {value}" for name, value in stored.ignored.items())
        reporter.warn(f"settings of this run that dream-fast {__version__} does not have are ignored: {flags}")
