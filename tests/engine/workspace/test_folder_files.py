"""The folder of a run: names, removed and kept files, refusals, and copies for outputs."""

import json
import logging
import os
import re

import pytest
import torch

from dream_fast import __version__
from dream_fast.engine.config.presets import reference
from dream_fast.engine.errors import UserError
from dream_fast.engine.workspace.atomic import atomic_write
from dream_fast.engine.workspace.checkpoint import save_checkpoint
from dream_fast.engine.workspace.folder import Workspace, write_text
from dream_fast.engine.workspace.lock import LOCK
from dream_fast.engine.workspace.record import MARK, Record

CONFIG = reference().override({"text": "a hamburger", "seed": 3})


def make(path, flag="--workspace"):
    workspace = Workspace(path, flag=flag)
    workspace.write_config(CONFIG)
    return workspace


def names(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MARK]
    return sorted(str(path.relative_to(folder)) for path in paths)


def fill(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def fill_recorded(folder, *files):
    Record.read(folder) or Record.create(folder)
    for name in files:
        write_text(folder / name, name)


def test_files_order(tmp_path):
    """Files are in the order of the class; of validation and guidance only the last image."""
    order = ["config.json", "manifest.json", "metrics.jsonl", "log.txt"]
    order += ["validation/step_000002.png", "guidance/step_000003.png", "tensorboard/a.1", "tensorboard/b.2"]
    order += ["profile/trace.json", "checkpoints/step_000001.safetensors", "checkpoints/step_000002.safetensors"]
    order += ["results/a.png", "results/b.mp4", "mesh/mesh.obj", "report.html"]
    fill(tmp_path, *order, "validation/step_000001.png", "guidance/step_000001.png", "notes.txt", "results/unnamed")
    workspace = Workspace(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in workspace.files()] == order
    (tmp_path / "log.txt").unlink()
    assert [path.name for path in workspace.files()][:4] == ["config.json", "manifest.json", "metrics.jsonl"] + [
        "step_000002.png"
    ]
    assert Workspace(tmp_path / "none").files() == []


def test_clear(tmp_path):
    """Files and folders of the run go, and everything else stays."""
    before = Record.create(tmp_path).id
    workspace = make(tmp_path)
    fill_recorded(tmp_path, "log.txt", "report.html", "results/a.png", "checkpoints/x", "mesh/y")
    fill(tmp_path, "mine/z", "notes.txt", "mesh/deep/y", "checkpoints/y")
    workspace.clear()
    assert names(tmp_path) == ["checkpoints/y", "mesh/deep/y", "mine/z", "notes.txt"]
    assert not workspace.results.exists() and workspace.record().id != before
    workspace.clear()


def test_clear_outputs(tmp_path):
    """Results, mesh and report go; turntables of the steps, images and checkpoints stay."""
    kept = ["config.json", "results/turntable_step_000001.mp4", "validation/step_000001.png", "checkpoints/c"]
    fill_recorded(tmp_path, *kept, "results/turntable.mp4", "results/front.png", "mesh/mesh.obj", "report.html")
    Workspace(tmp_path).clear_outputs()
    assert names(tmp_path) == sorted(kept) and not (tmp_path / "mesh").exists()
    fill(tmp_path, "results/mine.png", "mesh/mine.obj")
    Workspace(tmp_path).clear_outputs()
    assert names(tmp_path) == sorted([*kept, "results/mine.png", "mesh/mine.obj"])


def test_truncate_after(tmp_path):
    """Later checkpoints, images and turntables, and half-written files, are removed."""
    remaining = ["validation/step_000005.png", "guidance/step_000004.png", "results/turntable_step_000005.mp4"]
    remaining += ["results/front.png", "checkpoints/step_000005.safetensors", "validation/step_last.png", "notes.txt"]
    gone = ["validation/step_000006.png", "guidance/step_1000000.png", "results/turntable_step_000006.mp4"]
    gone += ["checkpoints/step_000006.safetensors"]
    fill_recorded(tmp_path, *remaining, *gone)
    foreign = [".notes.writing.txt", "results/.front.writing.png", "validation/step_000007.png"]
    fill(tmp_path, *foreign)
    with pytest.raises(BaseException, match="killed"), atomic_write(tmp_path / "results" / "half.png") as half:
        os.link(half, tmp_path / "results" / "again")
        half.unlink()
        raise BaseException("killed")
    (tmp_path / "results" / "again").rename(half)
    Workspace(tmp_path).truncate_after(5)
    assert names(tmp_path) == sorted([*remaining, *foreign])


def test_truncate_after_writes_changes_only(tmp_path, caplog):
    """A file of rows up to the step is not written again."""
    workspace = Workspace(tmp_path)
    rows = ['{"loss": 1.0,  "step": 0}\n', '{"step": 5}\n', '{"step": 6}\n']
    workspace.metrics.write_text("".join(rows))
    workspace.truncate_after(5)
    assert workspace.metrics.read_text() == "".join(rows[:2])
    before = workspace.metrics.stat()
    workspace.truncate_after(5)
    after = workspace.metrics.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    with caplog.at_level(logging.WARNING):
        workspace.metrics.write_text('{"step": null}\n{"step": 1.0}\n[]\n{"step": 4}\n{"st')
        workspace.truncate_after(5)
    assert workspace.metrics.read_text() == '{"step": 4}\n'
    assert caplog.messages[0].endswith("left out: 3")


def test_truncate_after_missing_files(tmp_path):
    """A half-written file that is gone is no error."""
    record = Record.create(tmp_path)
    record.claim(tmp_path / "notes.txt", tmp_path / ".gone.writing.txt")
    Workspace(tmp_path).truncate_after(5)
    assert names(tmp_path) == []


def test_write_config_version(tmp_path):
    """The version is first; the text is indented by one and ends in a newline."""
    workspace = make(tmp_path / "a" / "b")
    text = workspace.config.read_text()
    assert text.startswith(f'{{\n "version": "{__version__}",\n') and text.endswith("}\n")
    assert json.loads(text) == {"version": __version__, **json.loads(json.dumps(CONFIG.to_dict()))}
    assert workspace.stored_run().version == __version__ and workspace.stored_config() == CONFIG


def test_manifest_round_trip(tmp_path):
    """Numbers and unknown entries are restored; the text ends in a newline."""
    workspace = Workspace(tmp_path)
    run = {"from_step": 0, "to_step": 6, "seconds": 1, "seconds_of": {"start": 0.5}, "peak_bytes": {"host": 1.5e9}}
    run |= {"device": "cpu", "finished": "now", "machine": {"cores": 2}, "versions": {}, "anything": [None]}
    workspace.write_manifest({"runs": [run]})
    assert workspace.read_manifest() == {"runs": [run]}
    assert workspace.manifest.read_text() == json.dumps({"runs": [run]}, indent=1) + "\n"
    workspace.write_manifest({})
    assert workspace.read_manifest() == {}


@pytest.mark.parametrize("text", ["[]", "3", '{"runs": {}}', '{"runs": [1]}', '{"runs": null}', "null"])
def test_read_manifest_without_runs(text, tmp_path):
    """The message names the file."""
    workspace = Workspace(tmp_path)
    workspace.manifest.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{workspace.manifest} cannot be used: it lists no runs")):
        workspace.read_manifest()


def test_read_manifest_wrong_entries(tmp_path):
    """Each wrong entry is named once, in order."""
    workspace = Workspace(tmp_path)
    runs = [{"to_step": "1", "device": "cpu"}, {"machine": 1, "to_step": 2.5, "seconds": float("inf")}]
    workspace.manifest.write_text(json.dumps({"runs": runs}))
    with pytest.raises(UserError, match="cannot be used: machine, seconds, to_step of a run"):
        workspace.read_manifest()


def test_check_same_run_flag(tmp_path):
    """The advice --ckpt scratch is only for --workspace."""
    other = CONFIG.override({"text": "a donut"})
    with pytest.raises(UserError) as refused:
        make(tmp_path).check_same_run(other)
    beginning = f"--workspace {tmp_path} holds another run: it has --text a hamburger, not a donut (choose another "
    assert str(refused.value) == beginning + "--workspace, or replace that run with --ckpt scratch)"
    with pytest.raises(UserError) as refused:
        make(tmp_path, "--output").check_same_run(other)
    assert str(refused.value) == beginning.replace("--workspace", "--output") + "--output)"


def test_stored_config_reason(tmp_path):
    """The message has the file and the reason."""
    workspace = make(tmp_path)
    for text, reason in (("{", "Expecting"), ("[]", "it holds no settings of a run")):
        workspace.config.write_text(text)
        with pytest.raises(UserError, match=re.escape(f"{workspace.config} cannot be used: {reason}")):
            workspace.stored_run()


def test_create_for_outputs_of(tmp_path):
    """Manifest and metrics of the run are copied; the folder is locked."""
    run, outputs = make(tmp_path / "run"), Workspace(tmp_path / "out" / "deep", flag="--output")
    run.metrics.write_bytes(b'{"step": 1}\n\xff\n')
    outputs.create_for_outputs_of(run, CONFIG)
    assert names(outputs.path) == [LOCK, "config.json", "metrics.jsonl"]
    assert outputs.metrics.read_text() == '{"step": 1}\n\ufffd\n' and outputs.stored_config() == CONFIG
    run.write_manifest({"runs": []})
    outputs.create_for_outputs_of(run, CONFIG)
    assert outputs.read_manifest() == {"runs": [], "id": run.record().id}
    outputs.lock.release()


def test_create_for_outputs_of_another_run(tmp_path):
    """A folder with checkpoints or other settings is refused."""
    run, outputs = make(tmp_path / "run"), Workspace(tmp_path / "out", flag="--output")
    save_checkpoint(outputs.checkpoints, 1, {"x": torch.zeros(1)}, {})
    with pytest.raises(UserError) as refused:
        outputs.create_for_outputs_of(run, CONFIG)
    sentence = "is the workspace of a run; choose another folder, or --workspace"
    assert str(refused.value) == f"--output {outputs.path} {sentence} {outputs.path}"
    other = make(tmp_path / "other", "--output")
    with pytest.raises(UserError, match="holds another run: it has --seed 3, not 4"):
        other.create_for_outputs_of(run, CONFIG.override({"seed": 4}))


def test_locked(tmp_path):
    """A second lock is refused with the folder; a folder created in the block is locked then."""
    workspace = Workspace(tmp_path)
    with workspace.locked():
        assert workspace.lock.is_valid()
        workspace.check_not_moved()
        with pytest.raises(UserError, match="in use by process"), Workspace(tmp_path).locked():
            pass
    assert workspace.lock is None and not (tmp_path / LOCK).exists()
    fresh = Workspace(tmp_path / "a" / "b")
    with fresh.locked():
        assert fresh.lock is None and not fresh.path.exists()
        fresh.create()
        assert (fresh.path / LOCK).exists() and fresh.lock.is_valid()
        fresh.create()
    assert not (fresh.path / LOCK).exists()


def test_check_not_moved(tmp_path):
    """A missing lock file ends the run; without a lock there is no check."""
    workspace = Workspace(tmp_path / "run")
    workspace.check_not_moved()
    workspace.create()
    (workspace.path / LOCK).unlink()
    with pytest.raises(UserError, match=re.escape(f"--workspace {workspace.path} is gone: it was moved, removed")):
        workspace.check_not_moved()
    workspace.lock.release()


def test_create_after_another_run(tmp_path):
    """A folder that got settings in the meantime is refused."""
    make(tmp_path)
    late = Workspace(tmp_path, flag="--output")
    sentence = f"another run has just begun in --output {tmp_path}; choose another one"
    with pytest.raises(UserError, match=re.escape(sentence)):
        late.create()
    late.lock.release()


def test_create_errors(tmp_path, monkeypatch):
    """The message has the reason of the system."""
    (tmp_path / "file").write_text("notes")
    with pytest.raises(UserError, match=re.escape(f"--workspace {tmp_path / 'file'} cannot be created (")):
        Workspace(tmp_path / "file").create()

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(UserError) as refused, Workspace(tmp_path).locked():
        pass
    assert str(refused.value) == f"--workspace {tmp_path} cannot be written to (Read-only file system)"


def test_check_usable_advice(tmp_path, monkeypatch):
    """Folders and files that grow are asked for the right to write, a folder for that to enter as well."""
    workspace, asked = make(tmp_path), []
    fill(tmp_path, "results/a.png", "mesh/m.obj", "log.txt", "metrics.jsonl")
    workspace.log.write_text("2026-11-29 22:20:38 a line\n")
    workspace.metrics.write_text('{"step": 1}\n')
    monkeypatch.setattr("os.access", lambda path, mode: asked.append((path, mode)) or True)
    workspace.check_usable()
    folder = os.W_OK | os.X_OK
    assert asked == [
        (tmp_path, folder),
        (workspace.results, folder),
        (workspace.mesh, folder),
        (workspace.metrics, os.W_OK),
        (workspace.log, os.W_OK),
    ]
    for place, words in ((tmp_path, "in "), (workspace.mesh, "in "), (workspace.log, "")):
        monkeypatch.setattr("os.access", lambda path, mode, place=place: path != place)
        with pytest.raises(UserError) as refused:
            workspace.check_usable("; copy it")
        assert str(refused.value) == f"--workspace {tmp_path}: no permission to write {words}{place}; copy it"
        with pytest.raises(UserError, match=re.escape(f"no permission to write {words}{place}") + "$"):
            workspace.check_usable()


def test_check_usable_links(tmp_path):
    """Nothing is written through a link; a link to the folder is no harm."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    workspace = Workspace(tmp_path / "link")
    workspace.check_usable()
    for name in ("mesh", "log.txt"):
        (workspace.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError) as refused:
        workspace.check_usable()
    assert str(refused.value) == f"{workspace.typed}: log.txt, mesh would be written elsewhere, being a link"


def test_check_usable_no_folder(tmp_path):
    """A name that is too long, a file, and a folder of another program have their messages."""
    with pytest.raises(UserError, match=r"--workspace .*x cannot be a folder \(.*File name too long"):
        Workspace(tmp_path / ("x" * 300)).check_usable()
    fill(tmp_path, "file", "other/results/a.png", "other/log.txt")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'file'}: {tmp_path / 'file'} is a file, not a folder")):
        Workspace(tmp_path / "file").check_usable()
    with pytest.raises(UserError, match="other holds log.txt, results but no config.json"):
        Workspace(tmp_path / "other").check_usable()


def test_quarantine(tmp_path):
    """Under a name that is no checkpoint's; what dream-fast did not write stays, and so does what has the name."""
    workspace = Workspace(tmp_path)
    path, moved = (workspace.checkpoints / f"{name}step_000005.safetensors" for name in ("", "damaged_"))
    fill(tmp_path, "checkpoints/step_000005.safetensors")
    assert workspace.quarantine(path) is None and path.exists()
    path.unlink()
    fill_recorded(tmp_path, "checkpoints/step_000005.safetensors")
    moved.write_text("mine")
    assert workspace.quarantine(path) is None and moved.read_text() == "mine"
    moved.unlink()
    assert workspace.quarantine(path) == moved and names(tmp_path) == [f"checkpoints/{moved.name}"]
    assert moved.read_text() == "checkpoints/step_000005.safetensors" and workspace.record().owns(moved)
