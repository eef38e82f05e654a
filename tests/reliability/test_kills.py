"""A run that is stopped, whichever way, loses nothing: kill -9 at any moment, one signal, two signals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dream_fast.bench.reliability.kill_resume import EVERY, STAGES, STEPS, planned
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


def test_a_killed_run_is_taken_up_bit_for_bit(tiny_model):
    """`python -m dream_fast.bench kills` with fewer runs."""
    command = [sys.executable, "-P", "-m", "dream_fast.bench", "kills", "--times", "3", "--seed", "5"]
    done = subprocess.run([*command, "--hf_key", str(tiny_model)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"killed": 3, "different": 0}


def test_the_planned_kills_meet_every_stage_and_come_one_after_the_other():
    plans = [planned(random.Random(seed)) for seed in range(60)]
    assert {kill.stage for plan in plans for kill in plan} == {"", *STAGES}
    for plan in plans:
        steps = [kill.step for kill in plan]
        assert plan and steps == sorted(set(steps)) and 1 <= steps[0] and steps[-1] <= STEPS
        assert all(kill.step % EVERY == 0 for kill in plan if kill.stage)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_with_the_last_checkpoint_whole(tmp_path, tiny_model, number):
    words = ["--text", "a hamburger", "--hf_key", str(tiny_model), "--workspace", "trial", "--iters", "4", *TINY]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", STUCK, *words], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(tmp_path / "begun", process)
        process.send_signal(number)
        # The step, which never ends, is being finished.
        assert any("finishing this step" in line for line in process.stderr) and process.poll() is None
        process.send_signal(number)
        process.communicate()
    finally:
        process.kill()
    assert process.returncode == -number  # which a shell calls 130 or 143
    assert [path.name for path in list_checkpoints(tmp_path / "trial" / "checkpoints")] == ["step_000001.safetensors"]
