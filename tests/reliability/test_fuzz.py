"""Inputs that nobody would type: flags, --file, checkpoints, config.json, mesh files. Each is taken, or refused in a
sentence: no traceback, no hang, nothing written or removed outside the workspace, nothing unpickled, no
program started.

2,000 inputs by hypothesis, some from words of the format, some good ones with a change; 200,000 with
`FUZZ_INPUTS=200000 python -m pytest tests/reliability/test_fuzz.py -k hypothesis --timeout 0` (no guard against hangs).
"""

import contextlib
import io
import json
import os
import pickle
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import trimesh
from safetensors.torch import save

from dream_fast.cli import main
from dream_fast.engine.config.argument_file import split
from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.reproduce import reproduce_command
from dream_fast.engine.config.schema import Config, settings
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.report import text
from dream_fast.engine.geometry.read_mesh import load_mesh
from dream_fast.engine.text import escape_controls, one_line
from dream_fast.engine.workspace.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from dream_fast.engine.workspace.folder import Workspace

WRITES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
RUNS = {"subprocess.Popen", "os.system", "os.exec", "pickle.find_class", "socket.connect"}
ARCHITECTURE = {"n_levels": 2, "backbone": "grid"}
STATE = {"optimizer": {"params": torch.arange(6.0)}, "schedule": {"iters": 8, "start_step": 0}, "attention": None}


class Escape(AssertionError):
    """Something outside the folder was changed, or code was run."""


class Guard:
    """Watches Python's audit events while `armed`; an audit hook cannot be removed."""

    def __init__(self, folder: Path):
        self.folder, self.armed = folder.resolve(), False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.armed:
            return
        if event in RUNS:
            raise Escape(f"{event} {arguments[:1]!r}"[:200])
        writes = (
            event in WRITES or event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
        )
        if writes and isinstance(arguments[0], str | bytes):
            path = Path(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode(errors="replace"))
            if not path.resolve().is_relative_to(self.folder):
                raise Escape(f"{event} {str(path)[:200]!r}")


def flags(words: list[str]) -> None:
    """The command, which makes its configuration and stops."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*words, "--print-config"])
    output = err.getvalue()
    assert escape_controls(output.replace("\n", "")) == output.replace("\n", "") and len(output) < 20_000
    if status == 0:
        command = reproduce_command(Config.from_dict(json.loads(out.getvalue())))
        assert escape_controls(command) == command and shlex.split(command)
    else:
        assert status == 2 and output.splitlines()[-1].startswith("dream-fast: error: ")


def argument_file(content: str) -> None:
    split(content, "arguments.txt")


def targets(folder: Path) -> dict[str, Callable]:
    """Functions that take an input, by name."""
    good = save_checkpoint(folder / "good", 8, STATE, ARCHITECTURE).read_bytes()
    configuration = json.dumps(reference().override({"text": "a cat", "seed": 1}).to_dict())
    workspace = Workspace(folder)

    def checkpoint(change: tuple) -> None:
        kind, value = change
        path = folder / "step_000008.safetensors"
        if kind == "header":
            path.write_bytes(save({"a": torch.zeros(2)}, metadata={FORMAT: value}))
        elif kind == "raw":
            path.write_bytes(value)
        else:
            place, byte = value
            place %= len(good)
            path.write_bytes(good[:place] + bytes([byte]) + (good[place + 1 :] if kind == "byte" else b""))
        load_checkpoint(path, ARCHITECTURE)

    def config(change: tuple) -> None:
        kind, value = change
        if kind == "setting":
            room, name, new = value
            data = json.loads(configuration)
            if name is None:
                data[room] = new
            else:
                data.setdefault(room, {})[name] = new
            content = json.dumps(data)
        else:
            content = value
        workspace.config.write_text(content, encoding="utf-8", errors="surrogatepass")
        stored = workspace.stored_config()
        if stored is not None:
            workspace.check_same_run(reference())

    def mesh(change: tuple) -> None:
        suffix, content = change
        path = folder / f"mesh{suffix}"
        path.write_bytes(content)
        load_mesh(path)

    return {"flags": flags, "file": argument_file, "checkpoint": checkpoint, "config": config, "mesh": mesh}


def strategies() -> dict[str, object]:
    """Hypothesis strategies for each of the targets."""
    from hypothesis import strategies as st

    names = [(room.name, field.name) for room, field in settings()]
    odd = st.sampled_from(["", "0", "-1", "nan", "inf", "1e999", "9" * 400, "0:1:2:1", "0.0:nan:1:1", "::", "a\x1b[2J"])
    odd |= st.sampled_from(["../../x", "/dev/zero", "\u202etxet", "\ud800", "x" * 100_000, "$(touch x)", "`id`", "\0"])
    word = odd | st.text(max_size=40) | st.integers().map(str) | st.floats().map(str)
    flag = st.tuples(st.sampled_from([*(name for _, name in names), "file"]), word).map(
        lambda pair: f"--{pair[0]}={pair[1]}"
    )
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | odd | st.text(max_size=20) | st.just(10**400)
    value = st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
    pieces = st.sampled_from(["--text", "'", '"', "\\", "#", "\n", " ", "a cat", "--file", "\r", "\0", "\u2028"])
    header = st.fixed_dictionaries(
        {},
        optional={
            "version": st.sampled_from([1, 2, 3]) | value,
            "step": st.integers() | value,
            "architecture": st.just(ARCHITECTURE) | value,
            "values": st.dictionaries(st.sampled_from(["a", "a/b", "optimizer", "../x", "/"]), value) | value,
            "checksum": value,
        },
    ).map(json.dumps)
    place = st.tuples(st.integers(0, 10_000), st.integers(0, 255))
    kinds, whole = (".glb", ".gltf", ".obj", ".off", ".ply", ".stl"), trimesh.creation.box()
    good = {kind: as_bytes(whole.export(file_type=kind[1:])) for kind in kinds if kind != ".gltf"}

    def changed(drawn: tuple) -> tuple[str, bytes]:
        kind, other, (at, byte), cut = drawn
        content = good[other]
        at %= len(content)
        return kind, content[:at] + bytes([byte]) + (b"" if cut else content[at + 1 :])

    kind, lines = (
        st.sampled_from(kinds),
        st.sampled_from(["v 0 0 0", "v 1e999 nan 0", "f 1 2 3", "f 1//9 -7 2", "OFF", "ply", "solid"]),
    )
    mesh = st.tuples(kind, st.binary(max_size=200)) | st.tuples(
        kind, st.sampled_from(list(good)), place, st.booleans()
    ).map(changed)
    mesh |= st.tuples(
        kind,
        st.lists(lines | st.text(max_size=10), max_size=20)
        .map("\n".join)
        .map(lambda text: text.encode("utf-8", "replace")),
    )
    mesh |= st.tuples(st.just(".gltf"), value.map(json.dumps).map(str.encode))
    return {
        "flags": st.lists(flag | flag | word, max_size=4).map(lambda words: ["--text=a cat", *words]),
        "file": st.lists(pieces | st.text(max_size=10), max_size=30).map("".join),
        "checkpoint": st.tuples(st.just("header"), header | st.just("[" * 100_000))
        | st.tuples(st.just("raw"), st.binary(max_size=200))
        | st.tuples(st.sampled_from(["byte", "cut"]), place),
        "config": st.tuples(
            st.just("setting"),
            st.sampled_from([*names, ("run", None), ("x", "y")]).flatmap(
                lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), value)
            ),
        )
        | st.tuples(st.just("text"), value.map(json.dumps) | st.text(max_size=50) | st.just("[" * 100_000)),
        "mesh": mesh,
    }


def as_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def fuzz(inputs: int, seed: int, folder: Path) -> dict[str, int]:
    """Try inputs of each kind and return their numbers; raises at the first that is neither accepted nor refused
    properly."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    guard, counts = Guard(folder), {}
    made, feeders = strategies(), targets(folder)
    for name, target in feeders.items():
        counts[name] = 0

        def one(data: object) -> None:
            counts[name] += 1  # noqa: B023  # called before the next turn
            guard.armed = True
            try:
                target(data)  # noqa: B023
            except UserError as error:
                one_line(str(error)), text(error)
            finally:
                guard.armed = False

        options = settings(
            max_examples=inputs // len(feeders),
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        seeded(seed)(options(given(made[name])(one)))()
    return counts


@pytest.fixture(autouse=True)
def small_numbers():
    """Restore subnormal numbers, which a run on a CPU flushes to 0 in the whole process."""
    torch.set_flush_denormal(False)


def test_fuzz_hypothesis(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = int(os.environ.get("FUZZ_INPUTS", "2000"))
    counts = fuzz(inputs, int(os.environ.get("FUZZ_SEED", "0")), tmp_path)
    assert counts.keys() == strategies().keys() and min(counts.values()) >= inputs // len(counts) // 2


@pytest.mark.parametrize("fault", ["open", "pickle", "traceback"])
def test_the_fuzz_notices_a_way_out(tmp_path, monkeypatch, fault):
    def planted(content: str) -> None:
        if fault == "open":
            (tmp_path.parent / "escaped").write_text(content)
        elif fault == "pickle":
            pickle.loads(pickle.dumps(Path))
        else:
            raise KeyError(content)

    (tmp_path / "inside").mkdir()
    monkeypatch.setitem(fuzz.__globals__, "argument_file", planted)
    with pytest.raises((Escape, KeyError)):
        fuzz(40, 0, tmp_path / "inside")
    assert not (tmp_path.parent / "escaped").exists()
