"""Settings that the command takes from a stored run: with --test, when resumed, and as a mesh refinement."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dream_fast.cli import main
from dream_fast.engine.config.configure import configure
from dream_fast.engine.workspace.folder import Workspace

CPU = ["--device", "cpu"]


@pytest.fixture
def handed(monkeypatch, tmp_path):
    """The configurations that the command passes to the engine. Runs in an empty folder."""
    configs = []
    monkeypatch.setitem(sys.modules, "dream_fast.engine.run", SimpleNamespace(run=lambda c: configs.append(c) or 0))
    monkeypatch.chdir(tmp_path)
    return configs


def store(folder: str, version: str | None = None, **typed):
    """Write the settings of a run as this version, or the named one, stores them."""
    config = configure({"text": "a cat", "workspace": folder} | typed, "cpu")
    Workspace(Path(folder)).write_config(config)
    path = Path(folder) / "config.json"
    if version is not None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    return config


def test_test_default_workspace(handed, monkeypatch):
    """--test alone uses the run of the default folder, with its precision and the present device."""
    config = store("workspace", lr=0.25, fp16=True, save_mesh=True, six_views=True, ckpt="scratch")
    monkeypatch.setattr("dream_fast.engine.runtime.device.find_gpu", lambda: (True, ""))
    assert main(["--test", "--no-fp16", "--seed", "4"]) == 0
    anew = {"test": True, "save_mesh": False, "six_views": False, "ckpt": "latest", "device": "cuda", "seed": 4}
    assert handed == [config.override(anew)]
    assert main(["--test", "--save_mesh", "--six_views", "--output", "o", "--ckpt", "a/b", *CPU]) == 0
    typed = {"test": True, "save_mesh": True, "six_views": True, "ckpt": "a/b", "output": "o"}
    assert handed[1] == config.override(typed)
    store("workspace", test=True, output="before")  # the settings beside outputs that went elsewhere
    assert main(["--test", *CPU]) == 0 and handed[2].run.output is None


def test_test_without_run(handed, capsys):
    """The message has the typed folder or the default one."""
    for words, folder in (([], "workspace"), (["--workspace", "~/none"], "~/none")):
        assert main(["--test", *words, *CPU]) == 2
        sentence = f"--test needs a stored run, but --workspace {folder} holds none"
        assert capsys.readouterr().err == f"dream-fast: error: {sentence}\n"


def test_other_version_keeps_defaults(handed):
    """Settings of another version win unless typed; those of this version and with --ckpt scratch do not."""
    words = ["--text", "a cat", "--workspace", "w", "--iters", "9", *CPU]
    old = store("w", version="0.1.0", lr=0.25, save_mesh=True, six_views=True)
    assert main(words) == 0
    assert handed.pop() == old.override({"iters": 9, "save_mesh": False, "six_views": False})
    assert main([*words, "--lr", "0.5", "--six_views", "--ckpt", "latest"]) == 0
    assert handed.pop() == old.override({"iters": 9, "lr": 0.5, "six_views": True, "save_mesh": False})
    fresh = configure({"text": "a cat", "workspace": "w", "iters": 9}, "cpu")
    assert main([*words, "--ckpt", "scratch"]) == 0
    assert handed.pop() == fresh.override({"ckpt": "scratch"})
    store("w", lr=0.25)
    assert main(words) == 0 and handed.pop() == fresh
    assert main([*words, "--workspace", "empty"]) == 0 and handed.pop() == fresh.override({"workspace": "empty"})


def test_other_version_device(handed, monkeypatch):
    """The device is that of the command, and an earlier --test has no effect."""
    store("workspace", version="0.1.0", test=True, output="before", lr=0.25)
    monkeypatch.setattr("dream_fast.engine.runtime.device.find_gpu", lambda: (True, ""))
    assert main(["--text", "a cat"]) == 0
    run = handed[0].run
    assert (run.device, run.test, run.output, handed[0].optim.lr) == ("cuda", False, None, 0.25)


@pytest.mark.parametrize(
    "typed", [{"n_levels": 5, "bound": 0.75}, {"backbone": "vanilla", "n_frequencies": 5, "bound": 0.75}]
)
def test_refinement_keeps_field(typed, handed, capsys):
    """The stored field wins over that of --init_with, which may be missing; a typed setting wins over both."""
    words = ["--text", "a cat", "--dmtet", "--init_with", "gone.glb", *CPU]
    backbone = ["--backbone", typed.get("backbone", "grid")]
    store("workspace", dmtet=True, init_with="gone.glb", **typed)
    assert main([*words, *backbone, "--hidden_width", "8"]) == 0
    config = handed.pop()
    sections = config.to_dict()["field"] | config.to_dict()["render"]
    assert {name: sections[name] for name in typed} == typed and config.field.hidden_width == 8
    gone = "dream-fast: error: --init_with gone.glb: there is no such file\n"
    assert main([*words, "--ckpt", "scratch"]) == 2 and capsys.readouterr().err == gone
    assert main([*words, "--workspace", "other"]) == 2 and capsys.readouterr().err == gone
    store("workspace", dmtet=True, init_with="another.glb")
    assert main(words) == 2 and capsys.readouterr().err == gone
