"""Runs that are killed (kill -9) and taken up again, beside one that is not. `python -m dream_fast.bench kills`.

Each trial is the same small run in a process of its own, with a checkpoint every few steps. It is killed once or twice:
at a random moment of a random step, or while a checkpoint is written (begun, half written, whole but without its name,
or just named). The same run takes it up. Its metrics, last checkpoint and pictures must then be those of the run
that nobody killed, bit for bit (on a GPU in deterministic mode: --device cuda), and nothing half-written may
be left.

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
from typing import NamedTuple

import torch

from dream_fast.engine.config.presets import resolve
from dream_fast.engine.config.schema import Config

STEPS, EVERY = 24, 4  # of a run; between two checkpoints
STAGES = ("begun", "half", "unnamed", "named")  # of writing a checkpoint
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
}


class Kill(NamedTuple):
    """Where a run is killed: in step ``step`` (from 1) after ``delay`` seconds, or at a stage of a checkpoint."""

    step: int
    delay: float = 0.0
    stage: str = ""


def planned(dice: random.Random) -> list[Kill]:
    """One kill, or two of which the second comes later in the run."""
    kills = []
    for _ in range(dice.choice((1, 1, 2))):
        first = kills[-1].step if kills else 0
        if dice.random() < 0.5 and first < STEPS - EVERY:
            step = dice.randrange(first // EVERY + 1, STEPS // EVERY) * EVERY
            kills.append(Kill(step, stage=dice.choice(STAGES)))
        elif first < STEPS:
            kills.append(Kill(dice.randint(first + 1, STEPS), delay=dice.uniform(0, 0.03)))
    return kills


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill: Kill) -> Callable[[int], None]:
    """Let this process be killed as planned; returns what the loop has to call before each step."""
    from dream_fast.engine.workspace import checkpoint

    save, replace = checkpoint.save_file, os.replace

    def before_step(step: int) -> None:
        if not kill.stage and step + 1 == kill.step:
            threading.Timer(kill.delay, _die).start()

    def save_file(tensors: dict, path: Path, **options: object) -> None:
        at = f"step_{kill.step:06d}" in Path(path).name
        if at and kill.stage == "begun":
            _die()
        save(tensors, path, **options)
        if at and kill.stage == "half":
            os.truncate(path, os.path.getsize(path) // 2)
            _die()

    def renamed(source: Path, target: Path) -> None:
        at = Path(target).name == f"step_{kill.step:06d}.safetensors"
        if at and kill.stage == "unnamed":
            _die()
        replace(source, target)
        if at and kill.stage == "named":
            _die()

    checkpoint.save_file, os.replace = save_file, renamed
    return before_step


def prepare_to_fork() -> None:
    """Imports everything that a run does, and starts no thread, after which a process cannot be forked safely."""
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


def forked(config: Config, log: Path, kill: Kill | None) -> int:
    """The exit status of the run in a process of its own, negative where a signal ended it."""
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
            options = LoopOptions(epoch_steps=EVERY, checkpoint_seconds=0.0)
            if kill is not None:
                options = dataclasses.replace(options, before_step=arm(kill))
            status = run(config, loop=options)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(workspace: Path) -> dict[str, object]:
    """What has to be the same: rows without times, and the bytes of what was made."""
    rows = [json.loads(line) for line in (workspace / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, object] = {"metrics": [{k: v for k, v in r.items() if k not in TIMES} for r in rows]}
    for path in sorted(workspace.rglob("*")):
        if path.is_file() and path.parent != workspace:
            found[str(path.relative_to(workspace))] = path.read_bytes()
    return found


TIMES = ("seconds", "it_per_s")


def trial(name: str, kills: list[Kill], typed: dict[str, object], folder: Path) -> dict[str, object]:
    """The result of a run that is killed as planned and taken up to its end."""
    workspace, log = folder / name, folder / f"{name}.log"
    model = "sd" if "hf_key" in typed else "dream-mini"
    config = resolve(typed | {"workspace": str(workspace)}, model, typed["device"])
    for kill in [*kills, None]:
        status = forked(config, log, kill)
        if kill is None and status != 0 or status not in (0, -signal.SIGKILL):
            raise SystemExit(f"the run ended with status {status}; its log:\n{log.read_text(encoding='utf-8')}")
    return result(workspace)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench kills", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--hf_key", help="another model than dream-mini")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    prepare_to_fork()
    dice, different = random.Random(args.seed), 0
    typed = SMALL | {"device": args.device, "deterministic": args.device == "cuda"}
    if args.hf_key:
        typed |= {"hf_key": args.hf_key}

    with tempfile.TemporaryDirectory() as name:
        start = time.monotonic()
        whole = trial("whole", [], typed, Path(name))
        print(f"a whole run: {len(whole['metrics'])} rows, {time.monotonic() - start:.1f} s", flush=True)
        for number in range(args.times):
            kills = planned(dice)
            found = trial(f"killed_{number}", kills, typed, Path(name))
            wrong = sorted(key for key in found.keys() | whole.keys() if found.get(key) != whole.get(key))
            different += bool(wrong)
            moments = ", ".join(
                f"checkpoint {k.step} {k.stage}" if k.stage else f"step {k.step} + {k.delay * 1e3:.0f} ms"
                for k in kills
            )
            print(f"killed at {moments}: {'DIFFERS in ' + ', '.join(wrong) if wrong else 'the same'}", flush=True)
    print(json.dumps({"killed": args.times, "different": different}))
    return int(different > 0)
