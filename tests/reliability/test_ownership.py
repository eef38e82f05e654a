"""Files not written by dream-fast are never replaced, removed or shortened, whatever their names and types."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dream_fast.engine.config.presets import reference
from dream_fast.engine.errors import UserError
from dream_fast.engine.files import BadFile, open_append
from dream_fast.engine.workspace.atomic import atomic_write
from dream_fast.engine.workspace.checkpoint import checkpoint_path, list_checkpoints, save_checkpoint
from dream_fast.engine.workspace.folder import Workspace, write_text
from dream_fast.engine.workspace.lock import LEASE, LOCK, Lock
from dream_fast.engine.workspace.record import MARK, Record

CONFIG = reference().override({"text": "a hamburger", "seed": 3, "iters": 20})
STATE = {"weight": torch.zeros(2)}
RUN = {"text": "a hamburger", "seed": 3}
FILES = (
    *("config.json", "manifest.json", "metrics.jsonl", "log.txt", "report.html", "results/front.png"),
    *("results/six_views.png", "results/turntable.mp4", "results/turntable_step_000010.mp4", "mesh/mesh.glb"),
    *("mesh/mesh.obj", "validation/step_000010.png", "guidance/step_000010.png", "profile/trace.json.gz"),
    *("checkpoints/step_000010.safetensors", "checkpoints/damaged_step_000010.safetensors"),
)
FOLDERS = ("results", "mesh", "validation", "guidance", "checkpoints", "tensorboard", "profile")
KINDS = ("file", "folder", "pipe", "socket", "link", "broken_link", "folder_link", "hard_link", "huge")
Precious = dict[str, tuple[int, int]]


def place(kind: str, path: Path, outside: Path) -> None:
    """Put something of another program at `path`; links lead to files in `outside`."""
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    elif kind == "link":
        path.symlink_to(outside / "mine.txt")
    elif kind == "broken_link":
        path.symlink_to(outside / "nothing")
    elif kind == "folder_link":
        path.symlink_to(outside)
    elif kind == "hard_link":
        os.link(outside / "mine.txt", path)
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 33)  # takes no room on the disk


def contents(*paths: Path) -> Precious:
    """The inode and the size of all that is at or below `paths`, without following links."""
    found = {}
    for path in paths:
        for item in [path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else [])]:
            info = os.lstat(item)
            found[str(item)] = (info.st_ino, -1 if item.is_dir() else info.st_size)
    return found


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A marked workspace with settings and a checkpoint of step 5."""
    workspace = Workspace(tmp_path / "run")
    workspace.write_config(CONFIG)
    workspace.write_manifest({**RUN, "runs": []})
    save_checkpoint(workspace.checkpoints, 5, STATE, {}, RUN)
    return workspace


def use(workspace: Workspace) -> None:
    """All that a run does to its files; each part may be refused, and none may wait."""
    parts: list[Callable[[], object]] = [
        workspace.check_usable,
        lambda: workspace.truncate_after(5),
        workspace.clear_outputs,
        lambda: workspace.write_config(CONFIG),
        lambda: workspace.write_manifest({**RUN, "runs": []}),
        lambda: workspace.quarantine(checkpoint_path(workspace.checkpoints, 10)),
        lambda: save_checkpoint(workspace.checkpoints, 10, STATE, {}, RUN),
        lambda: save_checkpoint(workspace.checkpoints, 11, STATE, {}, RUN),
        *(lambda name=name: write_text(workspace.path / name, "new") for name in FILES[4:14]),
        lambda: open_append(workspace.metrics).close(),
        lambda: open_append(workspace.log).close(),
        workspace.files,
        workspace.clear,
    ]
    for part in parts:
        try:
            part()
        except (UserError, OSError) as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_file_in_the_way(name: str, kind: str, workspace: Workspace, outside: Path) -> None:
    """A file of each name and type is left unchanged, and so is the target of a link; nothing waits for it."""
    path = workspace.path / name
    path.unlink(missing_ok=True)
    place(kind, path, outside)
    before = contents(path, outside)
    use(workspace)
    assert contents(path, outside) == before


@pytest.mark.parametrize("kind", ["file", "pipe", "link", "broken_link", "folder_link"])
@pytest.mark.parametrize("name", FOLDERS)
def test_folder_in_the_way(name: str, kind: str, workspace: Workspace, outside: Path) -> None:
    """A file in place of a folder is refused by name before anything is written, and left unchanged."""
    path = workspace.path / name
    shutil.rmtree(path, ignore_errors=True)
    place(kind, path, outside)
    before = contents(path, outside)
    with pytest.raises(UserError, match=f"{name}( is|.*being a link)"):
        workspace.check_usable()
    use(workspace)
    assert contents(path, outside) == before


@pytest.mark.parametrize("name", [name for name in FILES if "/" in name])
def test_check_free_names_the_file(name: str, workspace: Workspace) -> None:
    """A file that dream-fast did not write is named; one that it wrote is not in the way; a changed one is named."""
    path = workspace.path / name
    place("file", path, workspace.path)
    with pytest.raises(BadFile, match=f"{name} is in the way: it is a file that dream-fast did not write; move it"):
        workspace.check_free([path])
    path.unlink()
    write_text(path, "ours")
    workspace.check_free([path])
    path.write_text("edited by hand")
    with pytest.raises(BadFile, match=f"{name} is in the way: it was changed after dream-fast wrote it"):
        workspace.check_free([path])


FOREIGN = {
    "bert": {"config.json": '{"model_type": "bert"}', "checkpoints/epoch_40.pt": "x", "results/a.txt": "x"},
    "list": {"config.json": "[]", "log.txt": "x"},
    "no json": {"config.json": "model: 3", "metrics.jsonl": "{}"},
    "only log": {"log.txt": "x"},
    "only checkpoints": {"checkpoints/step_000010.safetensors": "x"},
    "wandb": {"config.json": '{"run": {"id": 1}}', "metrics.jsonl": '{"step": 1}'},
    "another mark": {MARK: "mark", "config.json": "{}"},
    "empty mark": {MARK: "", "results/a.txt": "x"},
    "other program's mark": {MARK: '{"program": "other", "format": 1, "id": "' + "0" * 32 + '"}\n', "log.txt": "x"},
    "mark without an id": {MARK: '{"program": "dream-fast", "format": 1, "id": "x"}\n', "log.txt": "x"},
    "later mark": {MARK: '{"program": "dream-fast", "format": 9, "id": "' + "0" * 32 + '"}\n', "log.txt": "x"},
    "nested mark": {MARK: "[" * 100_000, "log.txt": "x"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_foreign_folder_refused(files: dict[str, str], tmp_path: Path) -> None:
    """A folder of another program with names like ours is refused, and nothing in it changes."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="dream-fast"):
        Workspace(tmp_path).check_usable()
    for act in (Workspace(tmp_path).mark, Workspace(tmp_path).clear):
        with pytest.raises(UserError):
            act() if MARK in files or "config.json" in files else Workspace(tmp_path).check_usable()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "Results", "CONFIG.JSON", "config.json.bak", "результаты", "x" * 200])
def test_other_files_in_a_new_folder_stay(name: str, tmp_path: Path) -> None:
    """Files whose names only look like ours do not stop a new run and are still there after --ckpt scratch."""
    (tmp_path / name).write_text("mine")
    workspace = Workspace(tmp_path)
    workspace.check_usable()
    workspace.write_config(CONFIG)
    write_text(workspace.report, "page")
    workspace.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([MARK, name])


def test_older_workspace_is_taken_over(workspace: Workspace) -> None:
    """Without the mark the files that such a version wrote are ours, others are not; the id comes from the manifest."""
    id = workspace.record().id
    (workspace.path / "results").mkdir()
    for name in ("results/front.png", "results/mine.png", "mesh.obj"):
        (workspace.path / name).write_text("x")
    (workspace.path / MARK).unlink()
    workspace.check_usable()
    record = workspace.mark()
    assert record.id == id and record.owns(workspace.results / "front.png")
    workspace.clear()
    left = {str(path.relative_to(workspace.path)) for path in workspace.path.rglob("*")}
    assert left == {MARK, "results", "results/mine.png", "mesh.obj"}


def test_older_workspace_of_two_runs_refused(workspace: Workspace) -> None:
    """Settings and a manifest of different runs do not make a workspace."""
    write_text(workspace.manifest, json.dumps({"text": "a donut", "seed": 3, "runs": []}))
    (workspace.path / MARK).unlink()
    with pytest.raises(UserError, match="config.json and manifest.json are of two runs"):
        workspace.check_usable()


@pytest.mark.parametrize("name", ["../outside/mine.txt", "/etc/hostname", "a/../../x", "a/b/c", "", ".", "..", MARK, 3])
def test_record_names_stay_inside(name: object, workspace: Workspace, outside: Path) -> None:
    """A record that was written by hand reaches nothing outside the workspace, and not itself."""
    with (workspace.path / MARK).open("a") as file:
        file.write(json.dumps({"file": name, "temporary": name}) + "\n" + json.dumps({"file": name, "size": 4}) + "\n")
    before = contents(outside)
    assert name not in workspace.record().sizes
    workspace.truncate_after(0)
    workspace.clear()
    assert contents(outside) == before and workspace.record() is not None


def test_record_behind_a_link(workspace: Workspace, outside: Path) -> None:
    """A folder that became a link after its files were recorded leads nowhere: what is there is not ours."""
    write_text(workspace.results / "mine.txt", "ours")
    shutil.rmtree(workspace.results)
    workspace.results.symlink_to(outside)
    before = contents(outside)
    use(workspace)
    assert contents(outside) == before


def test_record_torn_line(workspace: Workspace) -> None:
    """A line that was cut short when the machine stopped costs nothing but itself."""
    with (workspace.path / MARK).open("a") as file:
        file.write('{"file": "results/fro')
    assert workspace.record().owns(workspace.config)
    write_text(workspace.results / "front.png", "new")
    assert Record.read(workspace.path).owns(workspace.results / "front.png") in (True, False)
    workspace.check_usable()


def test_killed_while_writing(workspace: Workspace) -> None:
    """A file whose size was not recorded any more is ours, and its half-written copy is removed."""
    record = workspace.record()
    path, half = workspace.results / "front.png", workspace.results / ".00ff00ff.front.writing.png"
    write_text(path, "old")
    record.claim(path, half)
    path.write_text("renamed, and then killed")
    half.write_text("half")
    again = Record.read(workspace.path)
    assert again.owns(path)
    workspace.truncate_after(5)
    assert not half.exists() and path.exists()


def test_file_replaced_while_it_is_written(workspace: Workspace) -> None:
    """Something that appears at the name while its new content is written is not replaced."""
    path = workspace.results / "front.png"
    with pytest.raises(BadFile, match="front.png is in the way"), atomic_write(path) as temporary:
        temporary.write_text("ours")
        path.mkdir()
    assert path.is_dir() and [item.name for item in workspace.results.iterdir()] == ["front.png"]


@pytest.mark.parametrize("swap", ["link", "pipe", "gone"])
def test_temporary_replaced_while_it_is_written(swap: str, workspace: Workspace, outside: Path) -> None:
    """A temporary file that becomes a link or a pipe, or goes, does not get the name."""
    path = workspace.results / "front.png"
    with pytest.raises((BadFile, OSError)), atomic_write(path) as temporary:
        temporary.unlink()
        if swap == "link":
            temporary.symlink_to(outside / "mine.txt")
        elif swap == "pipe":
            os.mkfifo(temporary)
    assert not path.exists() and (outside / "mine.txt").read_text() == "mine"


def test_folder_replaced_while_it_is_written(workspace: Workspace, outside: Path) -> None:
    """A folder that becomes a link in between: nothing there is replaced."""
    (outside / "front.png").write_text("mine")
    with pytest.raises((BadFile, OSError)), atomic_write(workspace.results / "front.png") as temporary:
        temporary.write_text("ours")
        workspace.results.rename(workspace.path / "moved")
        workspace.results.symlink_to(outside)
    assert (outside / "front.png").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "pipe", "link", "broken_link", "hard_link", "folder"])
def test_lock_in_the_way(kind: str, tmp_path: Path, outside: Path) -> None:
    """A lock of another program, and what it leads to, are neither emptied nor removed."""
    folder = tmp_path / "run"
    folder.mkdir()
    place(kind, folder / LOCK, outside)
    before = contents(folder / LOCK, outside)
    with pytest.raises((UserError, OSError)):
        Lock(folder)
    assert contents(folder / LOCK, outside) == before


def test_lease_in_the_way(tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk without locks, something else in place of the lease is refused and left."""
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / LEASE).symlink_to(outside / "mine.txt")
    with pytest.raises(UserError, match="is in the way"):
        Lock(tmp_path)
    assert (outside / "mine.txt").read_text() == "mine"


def test_backup_with_hard_links(workspace: Workspace, tmp_path: Path) -> None:
    """A backup by hard links (cp -al) stays as it is when the run goes on, and does not stop it."""
    for path, text in ((workspace.log, "2026-11-29 22:20:38 line\n"), (workspace.metrics, '{"step": 5}\n')):
        path.write_text(text)
    shutil.copytree(workspace.path, tmp_path / "backup", copy_function=os.link)
    before = contents(tmp_path / "backup")
    workspace.check_usable()
    with workspace.locked():
        open_append(workspace.log).close()
        with open_append(workspace.metrics) as file:
            file.write('{"step": 6}\n')
        workspace.truncate_after(5)
    assert (
        contents(tmp_path / "backup") == {name: (os.lstat(name).st_ino, size) for name, (_, size) in before.items()}
        and (tmp_path / "backup" / "metrics.jsonl").read_text() == '{"step": 5}\n'
    )
    assert workspace.metrics.read_text() == '{"step": 5}\n'


def test_checkpoint_name_taken(workspace: Workspace) -> None:
    """A folder with the name of the next checkpoint stays, and the state is saved under a longer number."""
    taken = checkpoint_path(workspace.checkpoints, 10)
    taken.mkdir()
    path = save_checkpoint(workspace.checkpoints, 10, STATE, {}, RUN)
    assert path.name == "step_0000010.safetensors" and taken.is_dir()
    assert [item.name for item in list_checkpoints(workspace.checkpoints)][-1] == path.name


def test_pruning_leaves_other_checkpoints(workspace: Workspace) -> None:
    """Checkpoints that dream-fast did not write here are neither counted nor removed."""
    other = checkpoint_path(workspace.checkpoints, 1)
    other.write_bytes(b"another program's")
    for step in (6, 7, 8):
        save_checkpoint(workspace.checkpoints, step, STATE, {}, RUN)
    names = [path.name[5:11] for path in list_checkpoints(workspace.checkpoints)]
    assert names == ["000001", "000007", "000008"]
