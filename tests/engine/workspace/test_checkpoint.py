"""A checkpoint returns what was saved, or is refused with one sentence."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dream_fast import __version__
from dream_fast.engine.errors import UserError
from dream_fast.engine.workspace.checkpoint import (
    FORMAT,
    VERSION,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    step_of,
)

ARCHITECTURE = {"n_levels": 8, "hidden_width": 32}


def make_state():
    flat = torch.arange(12, dtype=torch.float32)
    return {
        "field": {"table": flat[:8].view(4, 2), "bias": flat[8:]},  # views of one buffer, as the optimiser keeps them
        "bits": torch.tensor([1, 255], dtype=torch.uint8),
        "schedule": {"start_step": 3, "start_progress": 0.1 + 0.2},
        "scale": 65536.0,
        "name": None,
    }


def test_checkpoint_round_trip(tmp_path):
    """State is restored bit for bit."""
    path = save_checkpoint(tmp_path, 7, make_state(), ARCHITECTURE)
    step, state = load_checkpoint(path, ARCHITECTURE)
    wanted = make_state()
    assert step == 7 == step_of(path)
    assert state.keys() == wanted.keys()
    assert torch.equal(state["field"]["table"], wanted["field"]["table"])
    assert torch.equal(state["field"]["bias"], wanted["field"]["bias"])
    assert torch.equal(state["bits"], wanted["bits"])
    assert state["schedule"] == wanted["schedule"]
    assert (state["scale"], state["name"]) == (65536.0, None)
    again = save_checkpoint(tmp_path / "again", 7, make_state(), ARCHITECTURE)
    assert again.read_bytes() == path.read_bytes()


def test_checkpoint_file_mode(tmp_path):
    """The permissions of a checkpoint follow the umask."""
    (tmp_path / "any").touch()
    path = save_checkpoint(tmp_path / "c", 7, make_state(), ARCHITECTURE)
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_checkpoint_last_two(tmp_path):
    """The last two checkpoints are kept, and nothing else."""
    for step in (5, 10, 1000000):
        save_checkpoint(tmp_path, step, make_state(), ARCHITECTURE)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 10), checkpoint_path(tmp_path, 1000000)]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("keep", [4, 200, -8])
def test_checkpoint_truncated(tmp_path, keep):
    """A truncated file is refused."""
    path = save_checkpoint(tmp_path, 7, make_state(), ARCHITECTURE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged.*--ckpt scratch starts over"):
        load_checkpoint(path, ARCHITECTURE)


@pytest.mark.parametrize(
    "header",
    ['{"a": [', "[]", "{}", "null", "-1", '"x"', '{"version": 2}', '{"version": 2, "step": 7, "architecture": 1}'],
)
def test_checkpoint_malformed_header(tmp_path, header):
    """A malformed header is refused."""
    path = save_checkpoint(tmp_path, 7, make_state(), ARCHITECTURE)
    save_file(load_file(path), path, metadata={FORMAT: header})
    with pytest.raises(UserError, match="damaged.*its header"):
        load_checkpoint(path, ARCHITECTURE)


def test_checkpoint_changed_byte(tmp_path):
    """A changed byte is found wherever it is."""
    path = save_checkpoint(tmp_path, 7, make_state(), ARCHITECTURE)
    whole = path.read_bytes()
    for place in range(8, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError):
            load_checkpoint(path, ARCHITECTURE)


def test_checkpoint_without_checksum(tmp_path):
    """A checkpoint of the version without checksums is read."""
    path = save_checkpoint(tmp_path, 7, make_state(), ARCHITECTURE)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
    del header["checksum"]
    for version, read in ((2, True), (3, False)):
        save_file(load_file(path), path, metadata={FORMAT: json.dumps(header | {"version": version})})
        if read:
            assert load_checkpoint(path, ARCHITECTURE)[0] == 7
        else:
            with pytest.raises(UserError, match="its checksum is wrong"):
                load_checkpoint(path, ARCHITECTURE)


def test_checkpoint_other_architecture(tmp_path):
    """Another architecture is refused with both values."""
    path = save_checkpoint(tmp_path, 7, make_state(), ARCHITECTURE)
    with pytest.raises(UserError, match="n_levels 8 there, 16 here"):
        load_checkpoint(path, ARCHITECTURE | {"n_levels": 16})


def rewrite_header(path, **changes):
    """Give the header of the checkpoint at `path` other values; its checksum is not that of them."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT]) | changes
    save_file(load_file(path), path, metadata={FORMAT: json.dumps(header)})


def test_checkpoint_newer_format(tmp_path):
    """An unknown format is refused with the version that wrote it."""
    path = save_checkpoint(tmp_path, 7, make_state(), ARCHITECTURE)
    rewrite_header(path, version=VERSION + 1, dream_fast="999.0.0")
    with pytest.raises(
        UserError, match=f"version {VERSION + 1}, written by dream-fast 999.0.0; .*: upgrade dream-fast"
    ):
        load_checkpoint(path, ARCHITECTURE)


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ({"dream_fast": "999.0.0"}, f"dream-fast 999.0.0 wrote it and this is {__version__}: upgrade dream-fast"),
        ({"dream_fast": "0.1.5"}, f"dream-fast 0.1.5, which wrote it, reads it; this is {__version__}"),
    ],
)
def test_checkpoint_unknown_setting(tmp_path, version, sentence):
    """An unknown setting of the field is refused with the version that reads it."""
    path = save_checkpoint(tmp_path, 7, make_state(), ARCHITECTURE)
    rewrite_header(path, architecture=ARCHITECTURE | {"depth": 3}, **version)
    with pytest.raises(UserError, match=re.escape(f"(depth); {sentence}")):
        load_checkpoint(path, ARCHITECTURE)


def test_checkpoint_old_header(tmp_path):
    """A header without a newer setting has its value of that time."""
    saved = {"backbone": "vanilla", "bg_radius": 1.4}
    path = save_checkpoint(tmp_path, 7, make_state(), saved)
    assert load_checkpoint(path, saved | {"n_frequencies": 12})[0] == 7
    with pytest.raises(UserError, match="another architecture: n_frequencies 12 there, 6 here"):
        load_checkpoint(path, saved | {"n_frequencies": 6})


def test_checkpoint_version(tmp_path):
    """Each checkpoint has the version that wrote it, under its checksum."""
    path = save_checkpoint(tmp_path, 7, make_state(), ARCHITECTURE)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()[FORMAT])["dream_fast"] == __version__
    rewrite_header(path, dream_fast="0.1.0")
    with pytest.raises(UserError, match="its checksum is wrong"):
        load_checkpoint(path, ARCHITECTURE)


def test_checkpoint_foreign_file(tmp_path):
    """Other version and foreign file are refused."""
    path = save_checkpoint(tmp_path, 7, make_state(), ARCHITECTURE)
    save_file(load_file(path), path, metadata={FORMAT: json.dumps({"version": 99, "step": 7})})
    with pytest.raises(UserError, match="version 99"):
        load_checkpoint(path, ARCHITECTURE)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(path, ARCHITECTURE)
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path / "gone.safetensors", ARCHITECTURE)
