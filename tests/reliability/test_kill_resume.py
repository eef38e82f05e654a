"""Runs that are stopped: kill -9 at any moment, and a second signal."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dream_fast.bench.reliability.kill_resume import CHECKPOINT_STEPS, OUTPUTS, STAGES, STEPS, plan_kills
from dream_fast.engine.runtime.signals import SIGNALS
from dream_fast.engine.workspace.checkpoint import list_checkpoints

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

# A run whose second step never ends; the file says that it has begun.
STUCK = """
import functools, pathlib, signal, sys
from dream_fast.engine import run
from dream_fast.engine.training.loop import LoopOptions
def before_step(step):
    if step == 1:
        pathlib.Path("begun").touch()
        while True:
            signal.pause()
options = LoopOptions(epoch_steps=1, checkpoint_seconds=0.0, before_step=before_step)
run.run = functools.partial(run.run, loop=options)
from dream_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""
TINY = """
    --device cpu --seed 7 --w 12 --h 12 --W 16 --H 16 --dataset_size_valid 1 --n_levels 2 --log2_hashmap_size 8
    --max_resolution 32 --hidden_width 16 --hidden_layers 1 --bound 0.6 --max_steps 48 --occupancy_resolution 16
""".split()


def test_killed_run_resumes_bit_for_bit(tiny_model):
    """`python -m dream_fast.bench kill_resume` with fewer runs, by its old name."""
    command = [sys.executable, "-P", "-m", "dream_fast.bench", "kills", "--times", "3", "--seed", "5"]
    process = subprocess.run([*command, "--hf_key", str(tiny_model)], env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == {"killed": 3, "different": 0}


def test_plan_kills_meets_every_stage():
    """Kills of a run are in order, those of a checkpoint at its steps; every signal and output occurs."""
    plans = [plan_kills(random.Random(seed)) for seed in range(200)]
    assert {kill.stage for plan in plans for kill in plan} == {"", *STAGES}
    assert {kill.file for plan in plans for kill in plan} == {"", *OUTPUTS}
    assert {kill.number for plan in plans for kill in plan} == {signal.SIGKILL, *SIGNALS}
    for plan in plans:
        steps = [kill.step for kill in plan]
        assert plan and steps == sorted(set(steps)) and 1 <= steps[0] and steps[-1] <= STEPS
        assert all(kill.step % CHECKPOINT_STEPS == 0 for kill in plan if kill.stage)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_at_once(tmp_path, tiny_model, number):
    """The signal ends the process in a step that never ends, and the last checkpoint is complete."""
    words = ["--text", "a hamburger", "--hf_key", str(tiny_model), "--workspace", "trial", "--iters", "4", *TINY]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", STUCK, *words], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(tmp_path / "begun", process)
        process.send_signal(number)
        # The first signal waits for the step, which never ends.
        assert any("finishing this step" in line for line in process.stderr) and process.poll() is None
        process.send_signal(number)
        process.communicate()
    finally:
        process.kill()
    assert process.returncode == -number  # which a shell calls 130 or 143
    assert [path.name for path in list_checkpoints(tmp_path / "trial" / "checkpoints")] == ["step_000001.safetensors"]
