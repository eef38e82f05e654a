"""Ends of a run: the state is saved first, what could not be written is reported, and the next call makes only that."""

import errno
import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dream_fast.cli import main
from dream_fast.engine import run
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.training.loop import LoopOptions
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.checkpoint import list_checkpoints, step_of
from dream_fast.engine.workspace.folder import Workspace

SMALL = """
    --device cpu --iters 6 --log_every 1 --seed 7 --w 12 --h 12 --W 32 --H 32 --dataset_size_test 2
    --dataset_size_valid 2 --n_levels 2 --log2_hashmap_size 8 --max_resolution 32 --hidden_width 16 --hidden_layers 1
    --bound 0.6 --max_steps 48 --occupancy_resolution 16 --update_extra_interval 3 --tensorboard
""".split()
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
TIMES = ("seconds", "it_per_s")
LOOP, OUTPUTS = "dream_fast.engine.training.loop", "dream_fast.engine.outputs"


@pytest.fixture(autouse=True, scope="module")
def often():
    """Evaluation and checkpoints after every second step."""
    options = LoopOptions(epoch_steps=2, checkpoint_seconds=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run", functools.partial(run.run, loop=options))
        yield


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory, often) -> Path:
    """The workspace of a run that nothing happened to."""
    workspace = tmp_path_factory.mktemp("whole") / "trial"
    assert main(command(workspace, tiny_model)) == 0
    return workspace


def command(workspace: Path, model: Path, *more: str) -> list[str]:
    return ["--text", "a hamburger", "--hf_key", str(model), "--workspace", str(workspace), *SMALL, *more]


def raise_(error: BaseException) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


def result(workspace: Path) -> dict[str, object]:
    """The rows, the last checkpoint and the images of a run."""
    rows = [json.loads(line) for line in (workspace / "metrics.jsonl").read_text().splitlines()]
    files = [
        *list_checkpoints(workspace / "checkpoints")[-1:],
        *workspace.glob("validation/*"),
        *workspace.glob("results/*"),
    ]
    return {
        "rows": [{name: value for name, value in row.items() if name not in TIMES} for row in rows],
        **{path.name: path.read_bytes() for path in files},
    }


def saved_step(workspace: Path) -> int:
    return step_of(list_checkpoints(workspace / "checkpoints")[-1])


@pytest.mark.parametrize(
    ("place", "path", "error"),
    [
        (f"{OUTPUTS}.write_six_views", "results/front.png", NO_SPACE),
        (f"{OUTPUTS}.write_video", "results/turntable.mp4", ValueError("of a library")),
        ("dream_fast.engine.export.mesh_files.simplify", "mesh/mesh.glb", NO_SPACE),
        ("dream_fast.engine.run.write_report", "report.html", IsADirectoryError(errno.EISDIR, "Is a directory")),
    ],
)
def test_failed_output_costs_itself_only(tmp_path, tiny_model, whole, monkeypatch, capsys, place, path, error) -> None:
    """Exit status 2 with its path; all else is there, and the next call writes only what is missing."""
    monkeypatch.setattr(place, raise_(error))
    more = ["--save_mesh", "--mcubes_resolution", "12", "--texture_resolution", "32"] * ("mesh" in path)
    words = command(tmp_path, tiny_model, *more)
    assert main(words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    reason = error.strerror if isinstance(error, OSError) else "ValueError: of a library"
    assert f"{tmp_path / path} could not be written ({reason})" in last and "the same command writes what" in last
    assert saved_step(tmp_path) == 6 and not (tmp_path / path).exists()
    present = {file: file.stat().st_mtime_ns for file in (tmp_path / "results").iterdir()}
    assert len(present) > 0 and (path == "report.html" or (tmp_path / "report.html").exists())
    monkeypatch.undo()
    assert main(words) == 0
    assert (tmp_path / path).exists() and {file: file.stat().st_mtime_ns for file in present} == present
    assert result(tmp_path) == result(whole)


def test_failures_during_run(tmp_path, tiny_model, whole, monkeypatch, capsys) -> None:
    """Images, the log and TensorBoard that cannot be written cost no step, and each is reported once."""
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setattr(f"{LOOP}.write_validation", raise_(NO_SPACE))
    monkeypatch.setattr(SummaryWriter, "add_scalar", raise_(NO_SPACE))
    monkeypatch.setattr(Reporter, "open_log", lambda self, path: setattr(self, "_log", tmp_path))
    assert main(command(tmp_path / "trial", tiny_model)) == 2
    captured = capsys.readouterr()
    assert "1 more failed" in captured.err.splitlines()[-1]
    images = [f"step_{step:06d}.png" for step in (2, 4, 6)]
    for name in (*(f"trial/validation/{image}" for image in images), "trial/tensorboard", "."):
        said = captured.err.splitlines()[-1] if name == "." else captured.out  # the log cannot warn of itself
        assert said.count(f"{tmp_path / name} could") + said.count(f"{tmp_path / name} is a folder") == 1
    expected = result(whole)
    assert result(tmp_path / "trial") == {name: each for name, each in expected.items() if name not in images}


@pytest.mark.parametrize(("kind", "step"), [("memory", 3), ("torch", 4), ("disk", 3), ("defect", 3)])
def test_error_in_step_saves_whole_steps(tmp_path, tiny_model, whole, monkeypatch, capsys, step, kind) -> None:
    """The steps before it are saved bit for bit, also where the step had updated the occupancy grid."""
    errors: dict[str, Exception] = {
        "memory": MemoryError(),
        "torch": RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"
        ),
        "disk": NO_SPACE,
        "defect": KeyError("x"),
    }
    gradients = Trainer.gradients

    def failing(self, *given):
        if self.step == step:
            raise errors[kind]
        return gradients(self, *given)

    monkeypatch.setattr(Trainer, "gradients", failing)
    words = command(tmp_path, tiny_model)
    if kind == "defect":
        with pytest.raises(KeyError):
            main(words)
    else:
        assert main(words) == 2
        assert f"step {step} is " in capsys.readouterr().err
    assert saved_step(tmp_path) == step
    monkeypatch.undo()
    assert main(words) == 0
    assert result(tmp_path) == result(whole)


def test_error_in_optimiser_saves_nothing(tmp_path, tiny_model, whole, monkeypatch) -> None:
    """A step that may be half taken is not saved; the last checkpoint goes on."""
    monkeypatch.setattr(Trainer, "_count", raise_(MemoryError()))
    assert main(command(tmp_path, tiny_model)) == 2
    assert not list_checkpoints(tmp_path / "checkpoints")


def test_metrics_on_full_disk(tmp_path, tiny_model, monkeypatch, capsys) -> None:
    """The run ends with the step saved."""
    monkeypatch.setattr(f"{LOOP}.Loop._log", raise_(NO_SPACE))
    assert main(command(tmp_path, tiny_model)) == 2
    assert "the checkpoint of step 1 is complete" in capsys.readouterr().err and saved_step(tmp_path) == 1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_signal_while_drawing(tmp_path, tiny_model, whole, monkeypatch, number) -> None:
    """The image is given up, the state is saved, and the resumed run draws it."""
    from dream_fast.engine.render.volume import VolumeRenderer

    view, seen = VolumeRenderer.view, []

    def signalled(self, *given, **more):
        seen.append(1)
        if len(seen) == 3:  # in the second set of two views
            os.kill(os.getpid(), number)
        return view(self, *given, **more)

    monkeypatch.setattr(VolumeRenderer, "view", signalled)
    words = command(tmp_path, tiny_model)
    assert main(words) == 128 + number
    assert len(seen) == 3 and saved_step(tmp_path) == 4 and not (tmp_path / "validation" / "step_000004.png").exists()
    monkeypatch.undo()
    assert main(words) == 0
    assert result(tmp_path) == result(whole)


def test_killed_before_outputs_are_cleared(tmp_path, tiny_model, whole, monkeypatch) -> None:
    """Outputs of fewer steps do not pass for those of a longer run that was saved and then killed."""
    assert main(command(tmp_path, tiny_model, "--iters", "4")) == 0
    monkeypatch.setattr(Workspace, "clear_outputs", raise_(KeyboardInterrupt()))
    assert main(command(tmp_path, tiny_model)) == 130
    assert saved_step(tmp_path) == 6
    before = (tmp_path / "results" / "front.png").read_bytes()
    monkeypatch.undo()
    assert main(command(tmp_path, tiny_model)) == 0
    assert (tmp_path / "results" / "front.png").read_bytes() != before


def test_outputs_that_cannot_be_cleared(tmp_path, tiny_model, monkeypatch) -> None:
    """All steps are saved."""
    assert main(command(tmp_path, tiny_model, "--iters", "2")) == 0
    monkeypatch.setattr(Workspace, "clear_outputs", raise_(IsADirectoryError(errno.EISDIR, "Is a directory", "old")))
    assert main(command(tmp_path, tiny_model)) == 2
    assert saved_step(tmp_path) == 6
