"""A checkpoint is of the run that it states, or it is refused by name and left where it is."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dream_fast.engine.config.presets import reference
from dream_fast.engine.errors import UserError
from dream_fast.engine.workspace import checkpoint
from dream_fast.engine.workspace.checkpoint import (
    FORMAT,
    Damaged,
    Foreign,
    check_belongs,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    newest_readable,
    save_checkpoint,
)
from dream_fast.engine.workspace.record import Record

CONFIG = reference().override({"text": "a hamburger", "seed": 3, "iters": 20})
RUN = CONFIG.run_facts(3)


def save(folder: Path, step: int = 5, run: dict[str, Any] | None = RUN, value: float = 1.0) -> Path:
    return save_checkpoint(folder, step, {"optimizer": {"params": torch.tensor([value, 2.0])}}, {}, run)


def restate(path: Path, changes: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write another header, and other tensors, with a checksum that is right."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT]) | changes
    tensors = load_file(path) if tensors is None else tensors
    del header["checksum"]
    header["checksum"] = checkpoint._checksum(header, tensors)
    save_file(tensors, path, metadata={FORMAT: json.dumps(header, sort_keys=True)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Record.create(tmp_path)
    return tmp_path / "checkpoints"


def test_run_facts() -> None:
    """Settings that may change in a run do not change the digest; those that make another run do."""
    for changes in ({"iters": 99}, {"save_mesh": True}, {"W": 32}, {"workspace": "elsewhere"}, {"device": "cuda"}):
        assert CONFIG.override(changes).run_facts(3) == RUN
    for changes in ({"lr": 0.5}, {"bound": 0.7}, {"negative": "blurry"}):
        assert CONFIG.override(changes).run_facts(3)["settings"] != RUN["settings"]
    assert CONFIG.run_facts(4)["settings"] != RUN["settings"] and CONFIG.run_facts(4)["seed"] == 4


def test_check_belongs_own(folder: Path) -> None:
    """A run's own checkpoint belongs to it, up to its last step."""
    path, record = save(folder), Record.read(folder.parent)
    check_belongs(path, record, RUN, 5)
    with pytest.raises(Foreign, match="step_000005.safetensors is of step 5, beyond the run's 4, and stays"):
        check_belongs(path, record, RUN, 4)


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ({"text": "a donut"}, "another prompt,"),
        ({"seed": 4}, "another seed,"),
        ({"settings": "0"}, "another setting,"),
        ({"text": None, "seed": None, "settings": None}, "another prompt and seed and setting,"),
        ([1], "another prompt and seed and setting,"),
        ("x", "another prompt and seed and setting,"),
    ],
)
def test_check_belongs_another_run(stated: Any, sentence: str, folder: Path) -> None:
    """The sentence names the file and what differs, and nothing happens to the file."""
    path = save(folder)
    restate(path, {"run": RUN | stated if isinstance(stated, dict) else stated})
    before = path.read_bytes()
    with pytest.raises(Foreign, match=f"step_000005.safetensors is of another run, with {sentence} and stays as it is"):
        check_belongs(path, Record.read(folder.parent), RUN, 20)
    assert path.read_bytes() == before


def test_check_belongs_another_version(folder: Path) -> None:
    """The digest of another version's settings is not compared, since its settings may be others."""
    path = save(folder)
    restate(path, {"run": RUN | {"settings": "0"}, "dream_fast": "0.2.0"})
    check_belongs(path, Record.read(folder.parent), RUN, 20)


def test_check_belongs_no_run(folder: Path) -> None:
    """A checkpoint of an earlier version names no run: it is of this one where the record has it."""
    path, record = save(folder, run=None), Record.read(folder.parent)
    check_belongs(path, record, RUN, 20)
    other = folder / "step_000006.safetensors"
    other.write_bytes(path.read_bytes())
    restate(other, {"step": 6})
    with pytest.raises(Foreign, match="step_000006.safetensors names no run, and dream-fast did not write it here"):
        check_belongs(other, record, RUN, 20)


def test_load_name_of_another_step(tmp_path: Path) -> None:
    """A renamed checkpoint is refused with the step that it is of; under a name without a step it is read."""
    path = save(tmp_path)
    for name, loads in (("step_000030.safetensors", False), ("best.safetensors", True)):
        path = path.rename(tmp_path / name)
        if loads:
            assert load_checkpoint(path, {})[0] == 5
        else:
            with pytest.raises(Foreign, match="step_000030.safetensors is of step 5, unlike its name"):
                load_checkpoint(path, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_load_nonfinite(value: float, tmp_path: Path) -> None:
    """Weights that are not finite are refused although the checksum is right."""
    with pytest.raises(Damaged, match="optimizer/params has values that are not finite"):
        load_checkpoint(save(tmp_path, value=value), {})


def test_load_too_large(tmp_path: Path) -> None:
    """A file that is larger than the state can be is refused before it is read."""
    path = save(tmp_path)
    os.truncate(path, 1 << 40)
    with pytest.raises(Damaged, match="it has 1099511627776 bytes, of at most 1000000"):
        load_checkpoint(path, {}, 1_000_000)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "broken_link", "empty", "text", "renamed", "device"])
def test_newest_good_one_is_found(kind: str, tmp_path: Path) -> None:
    """Whatever has the name of a later checkpoint hides none."""
    good, other = save(tmp_path), checkpoint_path(tmp_path, 9)
    if kind == "folder":
        other.mkdir()
    elif kind == "pipe":
        os.mkfifo(other)
    elif kind in ("link", "broken_link", "device"):
        other.symlink_to({"link": good, "broken_link": tmp_path / "gone", "device": Path("/dev/zero")}[kind])
    elif kind == "renamed":
        other.write_bytes(good.read_bytes())
    else:
        other.write_text("" if kind == "empty" else "text")
    assert newest_readable(list_checkpoints(tmp_path)) == good


def test_newest_readable_without_a_good_one(tmp_path: Path) -> None:
    """Without a good one the newest is returned, whose error names it."""
    for step in (1, 2):
        checkpoint_path(tmp_path, step).write_text("text")
    path = newest_readable(list_checkpoints(tmp_path))
    assert path == checkpoint_path(tmp_path, 2)
    with pytest.raises(UserError, match="step_000002"):
        load_checkpoint(path, {})
