"""Faults of the disk and of other processes: the run ends with a sentence, and nothing incomplete passes for
complete."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from dream_fast.cli import main
from dream_fast.engine import run
from dream_fast.engine.errors import UserError
from dream_fast.engine.training.loop import LoopOptions
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.checkpoint import list_checkpoints
from dream_fast.engine.workspace.folder import Workspace
from dream_fast.engine.workspace.lock import LOCK, Lock
from dream_fast.engine.workspace.record import MARK

SMALL = """
    --device cpu --iters 6 --log_every 1 --seed 7 --w 12 --h 12 --W 32 --H 32 --dataset_size_test 2
    --dataset_size_valid 1 --n_levels 2 --log2_hashmap_size 8 --max_resolution 32 --hidden_width 16 --hidden_layers 1
    --bound 0.6 --max_steps 48 --occupancy_resolution 16
""".split()


def command(workspace: Path, model: Path, *more: str) -> list[str]:
    return ["--text", "a hamburger", "--hf_key", str(model), "--workspace", str(workspace), *SMALL, *more]


@pytest.fixture
def often(monkeypatch):
    """Save checkpoints after every second step."""
    options = LoopOptions(epoch_steps=2, checkpoint_seconds=0.0)
    monkeypatch.setattr(run, "run", partial(run.run, loop=options))


def at_step(monkeypatch, step: int, act) -> None:
    """Call `act` before step `step` (from 0)."""
    take = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: (act() if self.step == step else None, take(self))[1])


def sentence(capsys) -> str:
    error = capsys.readouterr().err.strip()
    assert error.startswith("dream-fast: error: ") and "\n" not in error
    return error


# ------------------------------------------------------------------------------------------------------------- the lock


def test_lock_second_process(tmp_path, tiny_model, monkeypatch, capsys):
    messages = []
    at_step(monkeypatch, 3, lambda: messages.append(main(command(tmp_path / "trial", tiny_model))))
    assert main(command(tmp_path / "trial", tiny_model)) == 0
    assert messages == [2]
    error = capsys.readouterr().err
    assert f"is in use by process {os.getpid()} on " in error and "choose another --workspace" in error
    assert not (tmp_path / "trial" / LOCK).exists()


def test_lock_test_of_running_run(tmp_path, tiny_model, capsys):
    assert main(command(tmp_path / "trial", tiny_model, "--iters", "1")) == 0
    lock = Lock(tmp_path / "trial")
    capsys.readouterr()
    assert main(["--test", "--workspace", str(tmp_path / "trial")]) == 2
    assert "is in use by process" in sentence(capsys)
    lock.release()
    assert main(["--test", "--workspace", str(tmp_path / "trial")]) == 0


def test_lock_of_killed_process(tmp_path):
    imported = "import sys, os, pathlib; from dream_fast.engine.workspace.lock import Lock"
    code = f"{imported}; Lock(pathlib.Path(sys.argv[1])); os.kill("
    process = subprocess.run([sys.executable, "-P", "-c", f"{code}os.getpid(), 9)", str(tmp_path)])
    assert process.returncode == -signal.SIGKILL and (tmp_path / LOCK).read_text().startswith("process ")
    lock = Lock(tmp_path)
    assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()
    lock.release()


def test_lock_file_removed_before_locking(tmp_path, monkeypatch):
    """A lock on a file that the previous holder has just removed is not used."""
    flock, removed = fcntl.flock, []

    def late(handle, how):
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = Lock(tmp_path)
    assert removed and lock.is_valid()
    with pytest.raises(UserError, match="is in use"):
        Lock(tmp_path)
    lock.release()


def test_lock_file_has_current_holder(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on a machine with a very long name, for which nobody waits any more\n" * 9)
    lock = Lock(tmp_path)
    assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert (tmp_path / LOCK).read_text().count("\n") == 1
    lock.release()


def test_lock_many_at_once(tmp_path):
    inside, most, refused = [], [], []

    def work() -> None:
        for _ in range(50):
            try:
                lock = Lock(tmp_path)
            except UserError:
                refused.append(1)
                continue
            inside.append(1)
            most.append(len(inside))
            inside.pop()
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) + len(refused) == 200


def test_lock_new_folder(tmp_path):
    workspace = Workspace(tmp_path / "new")
    with workspace.locked():
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "config.json").write_text("{}")  # another run was faster
        with pytest.raises(UserError, match="another run has just begun"):
            workspace.create()


# ------------------------------------------------------------------------------------------------------------- the disk

# Nothing longer than the third argument can be written; what a full disk says is the same but for the number.
LIMITED = """
import functools, resource, signal, sys
from dream_fast.cli import main
from dream_fast.engine import run
from dream_fast.engine.training.loop import LoopOptions
def before_step(step):
    if step == 3:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
options = LoopOptions(epoch_steps=2, checkpoint_seconds=0.0, before_step=before_step)
run.run = functools.partial(run.run, loop=options)
sys.exit(main(sys.argv[1:]))
"""


def test_full_disk_limit(tmp_path, tiny_model, often):
    words = command(tmp_path / "trial", tiny_model, "--eval_interval", "9")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-P", "-c", LIMITED, *words], env=environment, capture_output=True, text=True
    )
    error = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "no space is left for --workspace" in error and "step 2 is complete" in error
    assert [path.name for path in list_checkpoints(tmp_path / "trial" / "checkpoints")] == ["step_000002.safetensors"]
    assert main(words) == 0
    rows = [json.loads(row)["step"] for row in (tmp_path / "trial" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in (tmp_path / "trial").rglob(".*")] == [MARK]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB, unmounted at the end whatever happens."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")  # who is not has the test above, which limits the size of files
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_full_disk_mounted(small_disk, tiny_model, often, capsys):
    assert main(command(small_disk / "trial", tiny_model)) == 2
    error = sentence(capsys)
    assert "no space is left for --workspace" in error and "(No space left on device)" in error
    assert not list(small_disk.rglob("*.writing*"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(command(small_disk / "trial", tiny_model)) == 2
    assert "no permission to write in" in sentence(capsys)


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_workspace_vanishes(tmp_path, tiny_model, often, monkeypatch, capsys, how):
    trial, elsewhere = tmp_path / "trial", tmp_path / "elsewhere"

    def vanish() -> None:
        shutil.rmtree(trial) if how == "removed" else trial.rename(elsewhere)
        if how == "replaced":
            trial.mkdir()

    at_step(monkeypatch, 3, vanish)
    assert main(command(trial, tiny_model)) == 2
    assert f"--workspace {trial} is gone" in sentence(capsys)
    assert list(trial.iterdir()) == [] if how == "replaced" else not trial.exists()
    if how != "removed":
        monkeypatch.undo()
        assert main(command(elsewhere, tiny_model)) == 0


def test_half_written_files_removed(tmp_path, tiny_model):
    assert main(command(tmp_path, tiny_model, "--iters", "1")) == 0
    half = [tmp_path / "checkpoints" / ".step_000002.writing.safetensors", tmp_path / ".config.writing.json"]
    later = [tmp_path / "validation" / "step_000009.png", tmp_path / "results" / "turntable_step_000009.mp4"]
    for path in [*half, *later]:
        path.write_bytes(b"half")
    (tmp_path / MARK).unlink()  # as a version without a record left it
    assert main(command(tmp_path, tiny_model, "--iters", "2")) == 0
    assert not [path for path in [*half, *later] if path.exists()]


def test_outputs_of_fewer_steps_removed(tmp_path, tiny_model, monkeypatch):
    assert main(command(tmp_path, tiny_model, "--iters", "1")) == 0
    before = (tmp_path / "results" / "front.png").read_bytes()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # after the last checkpoint, before the outputs

    monkeypatch.setattr("dream_fast.engine.run.write_outputs", killed)
    assert main(command(tmp_path, tiny_model, "--iters", "6")) == 130
    assert not (tmp_path / "results" / "front.png").exists() and not (tmp_path / "report.html").exists()
    monkeypatch.undo()
    assert main(command(tmp_path, tiny_model, "--iters", "6")) == 0
    assert (tmp_path / "results" / "front.png").read_bytes() != before
