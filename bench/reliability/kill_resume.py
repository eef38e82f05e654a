"""Kill runs, resume them, and compare them with a whole one. `python -m dream_fast.bench kill_resume`.

Each trial is the same small run in a separate process, with a checkpoint every few steps. It is ended once or twice,
by kill -9 or by a signal that it can catch: at a random moment of a random step, while a checkpoint is written (begun,
half written, whole but without its name, or just named), or before or after an output, the manifest or the report gets
its name. The same run resumes it. Its metrics, last checkpoint and images must then equal those of the whole run
bit for bit (on a GPU in deterministic mode: --device cuda), and no half-written file may be left.

Processes are forked from one that has imported everything, so that a trial takes seconds.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.schema import Config
from dream_fast.engine.runtime.signals import SIGNALS, Stopped

STEPS, CHECKPOINT_STEPS = 24, 4  # of a run, and between two checkpoints
TIMES = ("seconds", "it_per_s")  # entries of a row that are never equal
STAGES = ("begun", "half", "unnamed", "named")  # of writing a checkpoint; an output has the last two
OUTPUTS = ("front.png", "six_views.png", "turntable.mp4", "mesh.glb", "mesh.png", "manifest.json", "report.html")
SMALL = {
    **{
        "iters": STEPS,
        "log_every": 1,
        "seed": 7,
        "progressive_level": True,
        "latent_iter_ratio": 0.25,
        "lambda_tv": 0.1,
    },
    **{"w": 16, "h": 16, "W": 32, "H": 32, "dataset_size_test": 3, "dataset_size_valid": 2, "albedo_iter_ratio": 0.5},
    **{
        "n_levels": 3,
        "log2_hashmap_size": 10,
        "max_resolution": 32,
        "hidden_width": 16,
        "hidden_layers": 1,
        "bound": 0.6,
    },
    **{"max_steps": 48, "occupancy_resolution": 16, "text": "a hamburger"},
    **{"save_mesh": True, "mcubes_resolution": 12, "texture_resolution": 32, "decimate_target": 200},
}


class Kill(NamedTuple):
    """The moment of a signal: `delay` seconds into step `step` (from 1), or a stage of writing `file`."""

    step: int
    delay: float = 0.0
    stage: str = ""
    file: str = ""  # default: that step's checkpoint
    number: int = signal.SIGKILL

    @property
    def name(self) -> str:
        return self.file or f"step_{self.step:06d}.safetensors"

    def __str__(self) -> str:
        when = f"{self.name} {self.stage}" if self.stage else f"step {self.step} + {self.delay * 1e3:.0f} ms"
        return f"{signal.Signals(self.number).name} at {when}"

    def send(self) -> None:
        os.kill(os.getpid(), self.number)


def plan_kills(rng: random.Random) -> list[Kill]:
    """Draw one kill, or two of which the second comes later in the run."""
    kills: list[Kill] = []
    for _ in range(rng.choice((1, 1, 2))):
        first = kills[-1].step if kills else 0
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, *SIGNALS))
        kind = rng.choice(("checkpoint", "step", "output"))
        if kind == "output" and not (kills and kills[-1].file):
            kills.append(Kill(STEPS, stage=rng.choice(STAGES[2:]), file=rng.choice(OUTPUTS), number=number))
        elif kind == "checkpoint" and first < STEPS - CHECKPOINT_STEPS:
            step = rng.randrange(first // CHECKPOINT_STEPS + 1, STEPS // CHECKPOINT_STEPS) * CHECKPOINT_STEPS
            kills.append(Kill(step, stage=rng.choice(STAGES), number=number))
        elif first < STEPS - CHECKPOINT_STEPS:  # a later signal leaves another last checkpoint but one
            kills.append(
                Kill(rng.randint(first + 1, STEPS - CHECKPOINT_STEPS), delay=rng.uniform(0, 0.03), number=number)
            )
    return kills


def arm_kill(kill: Kill) -> Callable[[int], None]:
    """Arrange that this process is killed as planned; returns the hook that the loop calls before each step."""
    from dream_fast.engine.workspace import checkpoint

    save, replace = checkpoint.save_file, os.replace
    sent: list[Kill] = []

    def before_step(step: int) -> None:
        if not kill.stage and step + 1 == kill.step:
            threading.Timer(kill.delay, kill.send).start()

    def save_file(tensors: Any, filename: Any, metadata: dict[str, str] | None = None) -> Any:
        matches = f"step_{kill.step:06d}" in Path(filename).name
        if matches and kill.stage == "begun":
            kill.send()
        save(tensors, filename, metadata)
        if matches and kill.stage == "half":
            if kill.number == signal.SIGKILL:
                os.truncate(filename, os.path.getsize(filename) // 2)
            kill.send()

    def rename(src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        matches = Path(dst).name == kill.name and not sent
        if matches and kill.stage == "unnamed":
            sent.append(kill)
            kill.send()
        replace(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        if matches and kill.stage == "named":
            sent.append(kill)
            kill.send()

    checkpoint.save_file = save_file
    os.replace = rename
    return before_step


def prepare_to_fork() -> None:
    """Import everything that a run imports, without starting a thread, since threads make a fork unsafe."""
    torch.set_num_threads(1)
    # A library that finds a GPU while it is imported starts CUDA, and that cannot be forked at all.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import dream_fast.engine.run  # noqa: F401
    from dream_fast.engine.runtime.quiet import quiet_diffusers

    quiet_diffusers()
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    del os.environ["CUDA_VISIBLE_DEVICES"]
    os.environ |= {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}


def run_forked(config: Config, log: Path, kill: Kill | None) -> int:
    """Run in a forked process; returns its exit status, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("a", encoding="utf-8") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            from dream_fast.engine.run import run
            from dream_fast.engine.training import losses
            from dream_fast.engine.training.loop import LoopOptions

            losses.TV_POINTS = 1000
            options = LoopOptions(epoch_steps=CHECKPOINT_STEPS, checkpoint_seconds=0.0)
            if kill is not None:
                options = dataclasses.replace(options, before_step=arm_kill(kill))
            status = run(config, loop=options)
        except Stopped as stopped:
            status = stopped.status
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_result(workspace: Path) -> dict[str, Any]:
    """Everything that has to be equal: rows without times, and the bytes of files, by name."""
    rows = [json.loads(line) for line in (workspace / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result: dict[str, Any] = {"metrics": [{k: v for k, v in r.items() if k not in TIMES} for r in rows]}
    for path in sorted(workspace.rglob("*")):
        if path.is_file() and path.parent != workspace:
            result[str(path.relative_to(workspace))] = path.read_bytes()
    return result


def run_trial(name: str, kills: list[Kill], overrides: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of a run that is killed as planned and resumed until its end."""
    workspace, log = folder / name, folder / f"{name}.log"
    config = configure(overrides | {"workspace": str(workspace)}, overrides["device"])
    for kill in [*kills, None]:
        status = run_forked(config, log, kill)
        expected = {0} if kill is None else {0, -kill.number, 128 + kill.number}
        if status not in expected:
            raise SystemExit(f"the run ended with status {status}; its log:\n{log.read_text(encoding='utf-8')}")
    return read_result(workspace)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench kill_resume", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="number of runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--hf_key", "--hf-key", help="another model than dream-mini")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    prepare_to_fork()
    rng, different = random.Random(args.seed), 0
    overrides: dict[str, Any] = SMALL | {"device": args.device, "deterministic": args.device == "cuda"}
    if args.hf_key:
        overrides |= {"hf_key": args.hf_key}

    with tempfile.TemporaryDirectory() as name:
        start = time.monotonic()
        whole = run_trial("whole", [], overrides, Path(name))
        print(f"a whole run: {len(whole['metrics'])} rows, {time.monotonic() - start:.1f} s", flush=True)
        for number in range(args.times):
            kills = plan_kills(rng)
            killed = run_trial(f"killed_{number}", kills, overrides, Path(name))
            unequal = sorted(key for key in killed.keys() | whole.keys() if killed.get(key) != whole.get(key))
            different += bool(unequal)
            print(
                f"{', '.join(map(str, kills))}: {'DIFFERS in ' + ', '.join(unequal) if unequal else 'the same'}",
                flush=True,
            )
    print(json.dumps({"killed": args.times, "different": different}))
    return int(different > 0)
