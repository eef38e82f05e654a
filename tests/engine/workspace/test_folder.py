"""A workspace refuses to mix two runs, and loses nothing."""

import json

import pytest
import torch

from dream_fast.engine.config.presets import reference
from dream_fast.engine.errors import UserError
from dream_fast.engine.workspace.atomic import atomic_write
from dream_fast.engine.workspace.checkpoint import checkpoint_path, list_checkpoints, save_checkpoint
from dream_fast.engine.workspace.folder import Workspace, write_text
from dream_fast.engine.workspace.record import MARK

CONFIG = reference().override({"text": "a hamburger", "seed": 3})


def make_workspace(path):
    workspace = Workspace(path)
    workspace.check_usable()
    workspace.write_config(CONFIG)
    return workspace


def test_check_usable_new_folder(tmp_path):
    """A new folder is usable, and the check writes nothing."""
    workspace = Workspace(tmp_path / "a" / "b")
    workspace.check_usable()
    workspace.check_same_run(CONFIG)
    assert workspace.stored_config() is None
    assert list(tmp_path.iterdir()) == []


def test_check_usable_file(tmp_path):
    """A file instead of a folder is refused."""
    (tmp_path / "trial").write_text("notes")
    for path in (tmp_path / "trial", tmp_path / "trial" / "inner"):
        with pytest.raises(UserError, match="is a file"):
            Workspace(path).check_usable()
    assert (tmp_path / "trial").read_text() == "notes"


def test_check_usable_not_writable(tmp_path, monkeypatch):
    """A folder that is not writable is refused."""
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere, so a mode bit shows nothing
    with pytest.raises(UserError, match="permission"):
        Workspace(tmp_path).check_usable()


def test_check_usable_foreign_files(tmp_path):
    """Files with our names are refused, and unrelated files are not."""
    (tmp_path / "notes.txt").write_text("mine")
    Workspace(tmp_path).check_usable()
    (tmp_path / "results").mkdir()
    with pytest.raises(UserError, match="results"):
        Workspace(tmp_path).check_usable()


def test_config_round_trip(tmp_path):
    """A configuration is restored."""
    assert make_workspace(tmp_path).stored_config() == CONFIG


def test_check_same_run_differences(tmp_path):
    """Another run is refused with the differences."""
    workspace = make_workspace(tmp_path)
    with pytest.raises(UserError) as refused:
        workspace.check_same_run(CONFIG.override({"text": "a donut", "lr": 0.5}))
    for part in ("--text a hamburger, not a donut", "--lr 0.001, not 0.5", "--ckpt scratch"):
        assert part in str(refused.value)


def test_check_same_run_resumable(tmp_path):
    """Iterations, outputs and memory settings may change."""
    changed = {"iters": 7, "save_mesh": True, "W": 32, "video_fps": 5, "vram_O": True, "log_every": 1}
    make_workspace(tmp_path).check_same_run(CONFIG.override(changed))


@pytest.mark.parametrize("text", ["{", "[]", '{"run": {}}'])
def test_stored_config_damaged(tmp_path, text):
    """A damaged configuration is refused."""
    workspace = make_workspace(tmp_path)
    workspace.config.write_text(text)
    with pytest.raises(UserError, match="config.json cannot be used"):
        workspace.check_same_run(CONFIG)


def test_read_manifest_damaged(tmp_path):
    """A damaged manifest is refused."""
    workspace = make_workspace(tmp_path)
    assert workspace.read_manifest() == {}
    workspace.manifest.write_text("{")
    with pytest.raises(UserError, match="manifest.json cannot be used"):
        workspace.read_manifest()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("to_step", "6"), ("from_step", None), ("seconds", "1"), ("seconds", 1e999), ("seconds_of", [1])),
        *(("seconds_of", {"start": "1"}), ("peak_bytes", {"host": None}), ("machine", [1]), ("versions", "1")),
        *(("device", 1), ("finished", {})),
    ],
)
def test_read_manifest_wrong_types(name, value, tmp_path):
    """A manifest with values of wrong types is refused."""
    workspace = make_workspace(tmp_path)
    workspace.manifest.write_text(json.dumps({"runs": [{"to_step": 1}, {name: value}]}))
    with pytest.raises(UserError, match=f"cannot be used: {name} of a run"):
        workspace.read_manifest()


def test_truncate_after_later_files(tmp_path, caplog):
    """Later files are removed."""
    workspace = make_workspace(tmp_path)
    for step in (5, 10):
        save_checkpoint(workspace.checkpoints, step, {"x": torch.zeros(1)}, {})
    rows = [json.dumps({"step": step}) + "\n" for step in (2, 4, 6, 8)]
    workspace.metrics.write_text("".join(rows) + '{"ste')  # the last row was being written when the machine stopped
    workspace.truncate_after(5)
    assert list_checkpoints(workspace.checkpoints) == [checkpoint_path(workspace.checkpoints, 5)]
    assert workspace.metrics.read_text() == "".join(rows[:2])
    assert not caplog.records


def test_truncate_after_unreadable_rows(tmp_path, caplog):
    """Readable rows are kept, with one warning about others."""
    workspace = make_workspace(tmp_path)
    good = [json.dumps({"step": step}).encode() + b"\n" for step in (2, 4, 6)]
    junk = [b"junk\n", b"\n", b"[]\n", b"3\n", b'{"step": "4"}\n', b'{"loss": 1.0}\n', b"\xff\x00\n"]
    workspace.metrics.write_bytes(good[0] + b"".join(junk[:4]) + good[1] + b"".join(junk[4:]) + good[2])
    workspace.truncate_after(5)
    assert workspace.metrics.read_bytes() == good[0] + good[1]
    (warning,) = caplog.messages
    assert str(workspace.metrics) in warning and warning.endswith(": 7")


def test_truncate_after_checkpoint_names(tmp_path):
    """Only the names of checkpoints are read."""
    workspace = make_workspace(tmp_path)
    for step in (5, 10):
        with atomic_write(checkpoint_path(workspace.checkpoints, step)) as temporary:
            temporary.write_bytes(b"damaged")
    workspace.truncate_after(5)
    assert list_checkpoints(workspace.checkpoints) == [checkpoint_path(workspace.checkpoints, 5)]


def test_clear_keeps_other_files(tmp_path):
    """The run is removed and nothing else."""
    workspace = make_workspace(tmp_path)
    for folder in (workspace.results, workspace.guidance, workspace.tensorboard, workspace.profile):
        with atomic_write(folder / "video.mp4") as temporary:
            temporary.write_text("old")
    write_text(workspace.report, "old")
    (tmp_path / "notes.txt").write_text("mine")
    (workspace.results / "mine.mp4").write_text("mine")
    workspace.clear()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert names == {MARK, "notes.txt", "results", "results/mine.mp4"}
