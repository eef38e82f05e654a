"""Files are on the disk before they are renamed, and no half-written file is left."""

import os
from pathlib import Path

import pytest

from dream_fast.cli import main
from dream_fast.engine.workspace.atomic import atomic_write, atomic_writes
from dream_fast.engine.workspace.checkpoint import save_checkpoint
from dream_fast.engine.workspace.record import MARK

SMALL = """
    --device cpu --iters 1 --seed 7 --w 8 --h 8 --W 16 --H 16 --dataset_size_test 2 --dataset_size_valid 1 --n_levels 2
    --log2_hashmap_size 8 --max_resolution 16 --hidden_width 16 --hidden_layers 1 --bound 0.6 --max_steps 32
    --occupancy_resolution 16 --mcubes_resolution 16 --texture_resolution 64 --save_mesh
""".split()


@pytest.fixture
def disk(monkeypatch) -> list[tuple[str, Path]]:
    """Operations on the disk, in order: ("sync", path) and ("rename", new path).

    Fails where a file takes its name before all that was written of it is on the disk.
    """
    operations: list[tuple[str, Path]] = []
    synced: dict[int, tuple[int, int]] = {}  # size and time of change of each inode when it was synced
    opened: dict[int, Path] = {}
    open_, fsync, replace = os.open, os.fsync, os.replace

    def whole(path, folder: int | None) -> Path:
        return Path(path) if folder is None else opened[folder] / path

    def watched_open(path, *flags, dir_fd: int | None = None) -> int:
        handle = open_(path, *flags, dir_fd=dir_fd)
        opened[handle] = whole(path, dir_fd)
        return handle

    def watched_fsync(handle) -> None:
        status = os.fstat(handle)
        synced[status.st_ino] = (status.st_size, status.st_mtime_ns)
        if not opened[handle].name.startswith(MARK):
            operations.append(("sync", opened[handle]))
        fsync(handle)

    def watched_replace(source, target, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        status = os.stat(source, dir_fd=src_dir_fd)
        assert synced.get(status.st_ino) == (status.st_size, status.st_mtime_ns), f"{target} is not on the disk yet"
        if whole(target, dst_dir_fd).name != MARK:
            operations.append(("rename", whole(target, dst_dir_fd)))
        replace(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    for name in ("rename", "link"):
        monkeypatch.setattr(os, name, lambda *_, **__: pytest.fail("a way around os.replace"))
    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    return operations


def assert_names_are_synced(operations: list[tuple[str, Path]]) -> None:
    """After each renaming its folder is synced."""
    for number, (what, path) in enumerate(operations):
        if what == "rename":
            assert ("sync", path.parent) in operations[number + 1 :], path


def test_atomic_write_sync_order(tmp_path, disk):
    """The file is synced, then renamed, then the folder is synced."""
    path = tmp_path / "new" / "notes.txt"
    for text in ("one", "two"):
        disk.clear()
        with atomic_write(path) as aside:
            aside.write_text(text)
            assert path.exists() == (text == "two") and (text == "one" or path.read_text() == "one")
        assert disk == [("sync", aside), ("rename", path), ("sync", path.parent)]
        assert path.read_text() == text and list(path.parent.iterdir()) == [path]


def test_atomic_write_after_an_error(tmp_path, disk):
    """After an error the temporary file is removed, and nothing is renamed."""
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as aside:
        aside.write_text("half")
        assert set(tmp_path.iterdir()) == {path, aside}
        raise RuntimeError
    assert disk == [] and list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


def test_atomic_writes_sync_order(tmp_path, disk):
    """Files that belong together are all synced before one of them is renamed."""
    paths = [tmp_path / name for name in ("a.obj", "b.mtl", "c.png")]
    with atomic_writes(paths) as asides:
        for aside in asides:
            aside.write_text(aside.name)
    first = next(number for number, (what, _) in enumerate(disk) if what == "rename")
    assert {path for what, path in disk[:first] if what == "sync"} == set(asides)
    assert sorted(tmp_path.iterdir()) == paths
    assert_names_are_synced(disk)


def test_save_checkpoint_sync_order(tmp_path, disk, monkeypatch):
    """The new checkpoint and its name are synced before an old one is removed."""
    unlink = Path.unlink

    def watched_unlink(path, **options):
        if path.exists():
            disk.append(("remove", path))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", watched_unlink)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"value": 1.0}, {})
    assert disk[-4][0] == "sync" and disk[-4][1].name.endswith(".step_000003.writing.safetensors")
    expected = [("rename", tmp_path / "step_000003.safetensors"), ("sync", tmp_path)]
    assert disk[-3:] == [*expected, ("remove", tmp_path / "step_000001.safetensors")]


def test_run_syncs_every_file(tmp_path, tiny_model, disk):
    """Checkpoint, settings, manifest, images, video, mesh and report of a run are synced."""
    command = ["--text", "a hamburger", "--hf_key", str(tiny_model), "--workspace", str(tmp_path), *SMALL]
    assert main(command) == 0
    renamed = {str(path.relative_to(tmp_path)) for what, path in disk if what == "rename"}
    appended = {"metrics.jsonl", "log.txt", MARK}
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert renamed == files - appended and "checkpoints/step_000001.safetensors" in renamed
    assert_names_are_synced(disk)


def test_atomic_write_keeps_the_old_file(tmp_path):
    """A failed write keeps the old file."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1
