"""Errors of a disk and of memory: which are translated, and the advice."""

import errno
import os

import pytest
import torch

from dream_fast.engine.config.presets import reference
from dream_fast.engine.errors import UserError
from dream_fast.engine.training import failures
from dream_fast.engine.workspace.folder import Workspace


def configured(**changes):
    return reference().override(changes)


@pytest.fixture
def workspace(tmp_path):
    """A workspace with the checkpoints of steps 3 and 12, by name."""
    folder = Workspace(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    for step in (12, 3):
        (folder.checkpoints / f"step_{step:06d}.safetensors").touch()
    return folder


def test_resume_hint_newest_checkpoint(workspace):
    """The step is that of the newest checkpoint."""
    assert (
        failures.resume_hint(workspace) == "the checkpoint of step 12 is complete, and the same command resumes from it"
    )


@pytest.mark.parametrize("fails", [False, True])
def test_resume_hint_without_checkpoint(tmp_path, monkeypatch, fails):
    """There is no checkpoint, or the disk cannot be read."""
    if fails:
        monkeypatch.setattr(failures, "list_checkpoints", lambda folder: os.stat(tmp_path / "gone"))
    sentence = failures.resume_hint(Workspace(tmp_path / "run"))
    assert sentence == "no checkpoint was saved yet, so the same command starts over"


@pytest.mark.parametrize(
    ("code", "name", "sentence"),
    [
        (errno.ENOSPC, None, "no space is left for --workspace"),
        (errno.EIO, None, "the system refuses to write --workspace"),
        (errno.EACCES, "run/log.txt", "the system refuses to write --workspace"),
    ],
)
def test_translate_disk_errors(workspace, tmp_path, code, name, sentence):
    """A full or broken disk is translated for any file, other errors only for files of the run."""
    with pytest.raises(UserError) as caught, failures.translate_disk_errors(workspace, workspace):
        raise OSError(code, os.strerror(code), None if name is None else str(tmp_path / name))
    assert str(caught.value).startswith(sentence) and str(caught.value).endswith(failures.resume_hint(workspace))
    assert os.strerror(code) in str(caught.value)


@pytest.mark.parametrize("name", [None, 7, "elsewhere/file", "run.txt"])
def test_translate_disk_errors_of_other_files(workspace, tmp_path, name):
    """An error without a file, or of another folder, is raised unchanged."""
    error = OSError(errno.EACCES, "denied", str(tmp_path / name) if isinstance(name, str) else name)
    with pytest.raises(OSError) as caught, failures.translate_disk_errors(workspace, workspace):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("settings", "less"),
    [
        ({"batch_size": 5}, {"vram_O": True, "batch_size": 2}),
        ({"batch_size": 2, "vram_O": True}, {"batch_size": 1}),
        ({"batch_size": 1, "w": 101, "h": 50}, {"vram_O": True, "w": 50, "h": 32}),
        ({"batch_size": 1, "w": 50, "h": 100}, {"vram_O": True, "w": 32, "h": 50}),
        ({"batch_size": 1, "w": 33, "h": 33, "vram_O": True}, {"w": 32, "h": 32}),
        ({"batch_size": 1, "w": 32, "h": 64, "vram_O": True}, {}),
        ({"batch_size": 1, "w": 32, "h": 32, "cuda_graph": True}, {"vram_O": True, "cuda_graph": False}),
    ],
)
def test_low_memory_overrides(settings, less):
    """Half of the views, then half of the sides down to 32 pixels, and no CUDA graph."""
    defaults = {"w": 64, "h": 64, "vram_O": False, "cuda_graph": False}
    assert failures.low_memory_overrides(configured(**(defaults | settings))) == less


@pytest.mark.parametrize(("kind", "device"), [(torch.OutOfMemoryError, "GPU"), (RuntimeError, "machine")])
def test_memory_message(kind, device):
    """The message names the GPU or the machine, with and without a size from torch, and without any advice."""
    error = kind("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")
    config = configured(batch_size=4, w=64, h=32, vram_O=True)
    assert failures.memory_message(config, error, "go on") == (
        f"the {device} is out of memory (2.50 GiB more were requested): give --batch_size 2 (this step: --batch_size 4 "
        "--w 64 --h 32); go on"
    )
    smallest = configured(batch_size=1, w=32, h=32, vram_O=True)
    assert failures.memory_message(smallest, kind("Tried to allocate 2 MiB."), "go on") == (
        f"the {device} is out of memory (2 MiB more were requested): a smaller image model or another {device} is "
        "needed (this step: --batch_size 1 --w 32 --h 32); go on"
    )
    sentence = failures.memory_message(smallest, kind("other"), "go on")
    assert sentence.startswith(f"the {device} is out of memory: a")
