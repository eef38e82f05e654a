"""The file of a checkpoint: names, checksum, readable versions, and messages."""

import errno
import json
import re

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dream_fast import __version__
from dream_fast.engine.errors import UserError
from dream_fast.engine.workspace import checkpoint
from dream_fast.engine.workspace.checkpoint import (
    FORMAT,
    Damaged,
    checkpoint_path,
    damaged,
    list_checkpoints,
    load_checkpoint,
    read_architecture,
    save_checkpoint,
    step_of,
)

ARCHITECTURE = {"n_levels": 8, "hidden_width": 32}


def state(value=1.0):
    return {"field": {"deep": {"weight": torch.tensor([[value, 2.0]]), "rate": 0.5}}, "count": 3}


def save(folder, step=7, architecture=None):
    return save_checkpoint(folder, step, state(), architecture or ARCHITECTURE)


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[FORMAT])


def rewrite(path, header, tensors=None):
    save_file(load_file(path) if tensors is None else tensors, path, metadata={FORMAT: json.dumps(header)})


def test_list_checkpoints_order(tmp_path):
    """Names have at least six digits, are sorted by number, and other names do not count."""
    assert checkpoint_path(tmp_path, 7) == tmp_path / "step_000007.safetensors"
    names = ["step_10000000.safetensors", "step_000999.safetensors", "step_9999999.safetensors"]
    others = ["step_00099.safetensors", "step_000001.safetensors.tmp", "old_step_000001.safetensors", "step_000001"]
    for name in names + others:
        (tmp_path / name).touch()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [999, 9999999, 10000000]
    assert list_checkpoints(tmp_path / "none") == []


def test_header_contents(tmp_path):
    """Tensors are stored by their path, plain values in the header with version, step and architecture."""
    path = save(tmp_path)
    header = header_of(path)
    assert sorted(header) == ["architecture", "checksum", "dream_fast", "step", "values", "version"]
    assert (header["version"], header["step"], header["dream_fast"]) == (3, 7, __version__)
    assert header["architecture"] == ARCHITECTURE and header["values"] == {"field/deep/rate": 0.5, "count": 3}
    assert list(load_file(path)) == ["field/deep/weight"]
    step, loaded = load_checkpoint(path, ARCHITECTURE)
    weight = loaded["field"]["deep"].pop("weight")
    assert step == 7 and loaded == {"field": {"deep": {"rate": 0.5}}, "count": 3}
    assert torch.equal(weight, torch.tensor([[1.0, 2.0]])) and weight.device.type == "cpu"


def test_save_keeps_state(tmp_path):
    """Parameters with gradients and non-contiguous views are saved unchanged."""
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    path = save_checkpoint(tmp_path, 1, {"turned": weight.t(), "weight": weight}, {})
    loaded = load_checkpoint(path, {})[1]
    assert torch.equal(loaded["turned"], weight.detach().t()) and torch.equal(loaded["weight"], weight.detach())
    assert weight.requires_grad


def test_save_architecture_order(tmp_path):
    """The file does not depend on the order of settings."""
    one, other = save(tmp_path / "a"), save(tmp_path / "b", architecture=dict(reversed(ARCHITECTURE.items())))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "tensors",
    [
        {"field/deep/weight": torch.tensor([[1.0, 2.5]])},
        {"field/deep/weight": torch.tensor([[1.0], [2.0]])},
        {"field/deep/weight": torch.tensor([[1.0, 2.0]]).view(torch.int32)},
        {"field/deep/weights": torch.tensor([[1.0, 2.0]])},
        {"field/deep/weight": torch.tensor([[1.0, 2.0]]), "more": torch.zeros(0)},
        {},
    ],
    ids=["value", "shape", "dtype", "name", "another", "none"],
)
def test_checksum_of_tensors(tensors, tmp_path):
    """A file with other tensors is refused."""
    path = save(tmp_path)
    rewrite(path, header_of(path), tensors)
    with pytest.raises(Damaged, match=r"\(its checksum is wrong\)"):
        load_checkpoint(path, ARCHITECTURE)


@pytest.mark.parametrize("change", [{"step": 8}, {"values": {}}, {"version": 2}, {"checksum": "0"}, {"checksum": None}])
def test_checksum_of_header(change, tmp_path):
    """Another step, value, version or checksum is refused."""
    path = save(tmp_path)
    rewrite(path, header_of(path) | change)
    with pytest.raises(Damaged, match="its checksum is wrong"):
        load_checkpoint(path, ARCHITECTURE)


@pytest.mark.parametrize("version", [1, 2])
def test_checksum_not_required(version, tmp_path):
    """Versions 1 and 2 are read without a checksum."""
    path = save(tmp_path)
    header = header_of(path) | {"version": version}
    del header["checksum"]
    rewrite(path, header)
    assert load_checkpoint(path, ARCHITECTURE)[0] == 7


@pytest.mark.parametrize("version", [0, 4])
def test_readable_versions_message(version, tmp_path):
    """Another format version is refused with the readable ones."""
    path = save(tmp_path)
    header = header_of(path) | {"version": version}
    rewrite(path, header)
    with pytest.raises(UserError, match=f"format version {version}, .*which reads format versions 1 to 3: upgrade"):
        load_checkpoint(path, ARCHITECTURE)
    del header["dream_fast"]
    rewrite(path, header)
    with pytest.raises(UserError, match=f"written by dream-fast of another version; this is {re.escape(__version__)},"):
        load_checkpoint(path, ARCHITECTURE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": True}, "its header has no step"),
        ({"step": "7"}, "its header has no step"),
        ({"step": -1}, "its header has step -1"),
        ({"values": []}, "its header has no values"),
        ({"values": None}, "its header has no values"),
        ({"architecture": []}, "its header has no architecture"),
    ],
)
def test_header_wrong_types(change, reason, tmp_path):
    """The message names the entry."""
    path = save(tmp_path)
    rewrite(path, header_of(path) | change)
    with pytest.raises(Damaged, match=rf"\({reason}\)"):
        load_checkpoint(path, ARCHITECTURE)


def test_header_step_zero(tmp_path):
    """A checkpoint before the first step is read."""
    assert load_checkpoint(save(tmp_path, step=0), ARCHITECTURE)[0] == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "its header: Expecting"), ("[1]", "its header has no version"), ("{}", "its header has no version")],
)
def test_header_missing(text, reason, tmp_path):
    """Truncated JSON, and JSON of another type, are refused."""
    path = save(tmp_path)
    save_file(load_file(path), path, metadata={FORMAT: text})
    with pytest.raises(Damaged, match=rf"\({reason}"):
        load_checkpoint(path, ARCHITECTURE)


def test_state_contradicting_paths(tmp_path):
    """A value cannot be a dict as well."""
    path = save(tmp_path)
    header = header_of(path) | {"version": 2, "values": {"a": 1, "a/b": 2}}
    del header["checksum"]
    rewrite(path, header)
    with pytest.raises(Damaged, match=r"\(its state: "):
        load_checkpoint(path, ARCHITECTURE)


def test_damaged_advice(tmp_path):
    """The advice depends on whether there is an older checkpoint."""
    first, second = save(tmp_path, 5), save(tmp_path, 6)
    advice = "; --ckpt scratch starts over"
    beginning = f"the checkpoint {second} is damaged, truncated or not a safetensors file (why)"
    assert str(damaged(second, "why")) == beginning
    assert str(damaged(first, "why")) == beginning.replace(str(second), str(first)) + advice
    elsewhere = tmp_path / "step_000006.other"
    assert str(damaged(elsewhere, "why")).endswith(advice)


def test_damaged_not_safetensors(tmp_path):
    """The message has the reason of the library and the path."""
    path = checkpoint_path(tmp_path, 3)
    path.write_bytes(b"notes")
    for read in (read_architecture, lambda path: load_checkpoint(path, ARCHITECTURE)):
        with pytest.raises(Damaged, match=re.escape(f"the checkpoint {path} is damaged") + r".*\(.*[Hh]eader.*\)"):
            read(path)
    with pytest.raises(UserError, match=re.escape(f"there is no checkpoint at {tmp_path}") + "$"):
        read_architecture(tmp_path)


def test_damaged_tensor(tmp_path, monkeypatch):
    """An error of the library while reading tensors becomes a sentence with its reason."""
    path, open_file = save(tmp_path), checkpoint._open

    class Broken:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def metadata(self):
            return self.file.metadata()

        def keys(self):
            return ["x"]

        def get_tensor(self, name):
            raise SafetensorError(f"cannot read {name}")

    monkeypatch.setattr(checkpoint, "_open", lambda path, most=None: Broken(open_file(path)))
    with pytest.raises(Damaged, match=r"\(cannot read x\)"):
        load_checkpoint(path, ARCHITECTURE)


def test_read_architecture(tmp_path):
    """It has the settings of the header, and those that are newer."""
    architecture = read_architecture(save(tmp_path, architecture={"backbone": "vanilla", "bg_radius": 1.4}))
    assert architecture == {"backbone": "vanilla", "bg_radius": 1.4, "n_frequencies": 12}


def test_architecture_differences(tmp_path):
    """Differences are sorted by name, with both values; a missing setting is None."""
    path = save(tmp_path, architecture={"backbone": "grid", "n_levels": 8, "hidden_width": 32})
    with pytest.raises(UserError) as refused:
        load_checkpoint(path, {"backbone": "grid", "n_levels": 16, "hidden_width": 64, "bound": 1.0})
    differences = "bound None there, 1.0 here; hidden_width 32 there, 64 here; n_levels 8 there, 16 here"
    assert str(refused.value) == f"the checkpoint {path} is of another architecture: {differences}"


def test_architecture_backbone(tmp_path):
    """For another backbone only the backbone is named."""
    path = save(tmp_path, architecture={"backbone": "grid", "n_levels": 8})
    with pytest.raises(UserError) as refused:
        load_checkpoint(path, {"backbone": "vanilla", "n_frequencies": 12})
    assert str(refused.value).endswith("of another architecture: backbone grid there, vanilla here")


def test_architecture_unknown_settings(tmp_path):
    """The message has the version that reads them, 0.1.0 for a header without one."""
    path = save(tmp_path, architecture=ARCHITECTURE | {"zeal": 1, "depth": 3})
    header = header_of(path)
    del header["dream_fast"]
    rewrite(path, header)
    with pytest.raises(UserError, match=r"does not know \(depth, zeal\); dream-fast 0\.1\.0, which wrote it, reads it"):
        load_checkpoint(path, ARCHITECTURE)


def test_architecture_as_json(tmp_path):
    """A tuple that was stored as a list is no difference."""
    path = save(tmp_path, architecture={"n_levels": (1, 2)})
    assert load_checkpoint(path, {"n_levels": (1, 2)})[0] == 7


def test_save_full_disk(tmp_path, monkeypatch):
    """The error of the library becomes an OSError with its number and the file name; no file is left."""
    save(tmp_path, 1)

    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as failure:
        save(tmp_path, 2)
    assert failure.value.errno == errno.ENOSPC and failure.value.filename == str(checkpoint_path(tmp_path, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001.safetensors"]


def test_save_other_error(tmp_path, monkeypatch):
    """An error without a number is raised unchanged."""

    def broken(*arguments, **options):
        raise SafetensorError("another matter")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(SafetensorError, match="another matter"):
        save(tmp_path, 2)
