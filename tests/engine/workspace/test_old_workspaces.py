"""Workspaces of earlier versions: their images, their mesh, further steps, and meshes that start from them.

tests/fixtures/workspaces/make.sh wrote them with the code of earlier commits.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import load_file

from dream_fast import __version__
from dream_fast.cli import main
from dream_fast.engine.export.images import write_six_views
from dream_fast.engine.runtime.device import choose_runtime
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.checkpoint import list_checkpoints
from dream_fast.engine.workspace.folder import Workspace

FOLDER = Path(__file__).parents[2] / "fixtures" / "workspaces"
STORED = sorted(path.parent for path in FOLDER.glob("*/*/config.json"))
WITH_MESH = [path for path in STORED if (path / "mesh").is_dir()]
LEVEL = 1 / 255  # of an image's colours: two images that each round to the nearest one may differ by as much


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.fixture(params=STORED, ids=named)
def original(request) -> Path:
    """A workspace as its version wrote it."""
    return request.param


@pytest.fixture
def copy(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def images(workspace: Path) -> np.ndarray:
    """Colours and normals of the six views, in one vector, in [0, 1]."""
    paths = sorted(path for path in (workspace / "results").glob("*.png") if path.name != "six_views.png")
    assert len(paths) == 12
    return np.concatenate([np.asarray(Image.open(path).convert("RGB"), dtype=float).ravel() for path in paths]) / 255


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_images(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two sets of images are equal up to rounding to 8 bits, in the norm of all of them."""
    return float(np.linalg.norm(a - b)) <= LEVEL * a.size**0.5


def test_old_workspaces_complete():
    """Each backbone and mesh refinement of 0.1.0 and both older checkpoint formats are included."""
    assert {named(path) for path in STORED} >= {"0.1.0/grid", "0.1.0/vanilla", "0.1.0/dmtet"}
    assert len(WITH_MESH) >= 3
    headers = [list_checkpoints(path / "checkpoints")[-1].read_bytes() for path in STORED]
    formats = {int(re.search(rb'\\"version\\": (\d+)', data)[1]) for data in headers}
    assert formats >= {1, 2, 3}
    for path in STORED:
        assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 100_000


def test_old_workspace_images(original, copy, capsys):
    """--test writes the images of the version that wrote the run, and the report reads it."""
    shutil.rmtree(copy / "results")
    assert main(["--test", "--workspace", str(copy), "--six_views", "--device", "cpu"]) == 0
    before, now = images(original), images(copy)
    assert before.std() > 0.1, "an empty image shows nothing"
    assert same_images(before, now)
    assert (
        f"dream-fast 0.1.0 wrote this run, which keeps its settings; this is {__version__}" in capsys.readouterr().out
    )
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert "a hamburger" in page and "<td>--lr</td><td>0.002</td>" in page


@pytest.mark.parametrize("original", [path for path in STORED if path.name == "grid"], ids=named)
def test_old_workspace_other_weights(original, copy):
    """The comparison of images finds permuted entries of a hash table."""
    before, workspace = images(copy), Workspace(copy)
    config = workspace.stored_config()
    trainer = Trainer(config, choose_runtime(config), 1)
    trainer.load(list_checkpoints(workspace.checkpoints)[-1])
    with trainer.optimizer.ema_weights(), trainer.renderer.without_floaters(), torch.no_grad():
        table = trainer.field.table.view(-1, 2)
        table.copy_(table.roll(1, dims=0).clone())
        write_six_views(workspace.results, trainer.renderer, config.camera)
    assert not same_images(before, images(copy))


def test_old_workspace_mesh(original, copy):
    """--save_mesh gives the surface of the version that wrote the run, within a cell of the grid."""
    shutil.rmtree(copy / "mesh", ignore_errors=True)
    words = ["--test", "--workspace", str(copy), "--six_views", "--save_mesh", "--texture_resolution", "64"]
    assert main([*words, "--device", "cpu"]) == 0
    now = trimesh.load(copy / "mesh" / "mesh.obj", force="mesh")
    config = Workspace(copy).stored_config()
    assert len(now.faces) > 10 and 0 < np.abs(now.bounds).max() < config.render.bound
    if original not in WITH_MESH:
        return
    before = trimesh.load(original / "mesh" / "mesh.obj", force="mesh")
    cells = config.dmtet.tet_grid_size if config.dmtet.dmtet else config.output.mcubes_resolution - 1
    assert np.abs(before.bounds - now.bounds).max() < 2 * config.render.bound / cells


def test_old_workspace_continued(original, copy):
    """The run continues with its weights, counters and random numbers."""
    continued = rows(FOLDER / original.parent.name / f"{original.name}.continued.jsonl")
    stored = Workspace(copy).stored_config()
    steps = stored.run.iters
    words = ["--text", "a hamburger", "--device", "cpu", "--seed", "1", "--lr", "0.002", "--workspace", str(copy)]
    assert main([*words, "--iters", str(steps + 2), "--log_every", "1", "--six_views"]) == 0
    before, now = rows(original / "metrics.jsonl"), rows(copy / "metrics.jsonl")
    assert now[: len(before)] == before
    assert [row["step"] for row in now[len(before) :]] == [steps + 1, steps + 2]
    first, expected = now[len(before)], continued[0]
    assert first["t"] == expected["t"]
    assert abs(first["opacity"] - expected["opacity"]) <= LEVEL
    state = load_file(list_checkpoints(copy / "checkpoints")[-1])
    assert int(state["optimizer/steps"]) == steps + 2
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    assert config["version"] == __version__ and config["optim"]["lr"] == 0.002
    runs = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))["runs"]
    assert [run["versions"]["dream_fast"] for run in runs] == ["0.1.0", __version__]


@pytest.fixture
def grid(tmp_path) -> Path:
    """A copy of the grid of 0.1.0 with an unusual decay of the learning rate."""
    copy = Path(shutil.copytree(FOLDER / "0.1.0" / "grid", tmp_path / "grid"))
    change_settings(copy, lambda data: data["optim"].update(lr_decay=0.5))
    return copy


def change_settings(workspace: Path, change) -> None:
    path = workspace / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def settled(monkeypatch, workspace: Path, *words: str):
    """The configuration of the command."""
    configs = []
    monkeypatch.setattr("dream_fast.engine.run.run", lambda config: configs.append(config) or 0)
    assert main(["--text", "a hamburger", "--device", "cpu", "--workspace", str(workspace), *words]) == 0
    return configs[0]


def test_old_workspace_untyped_settings(monkeypatch, grid):
    """A changed default does not make it another run; typed settings win, and outputs are those of the command."""
    change_settings(grid, lambda data: data["run"].update(save_mesh=True))
    stored = Workspace(grid).stored_config()
    config = settled(monkeypatch, grid, "--iters", "40")
    said_anew = {"save_mesh": False, "six_views": False, "workspace": str(grid)}
    assert config == stored.override({"iters": 40, **said_anew})
    assert config.optim.lr_decay == 0.5 and config.camera.W == 16
    assert settled(monkeypatch, grid, "--ckpt", "scratch").optim.lr_decay == 0.3


def test_old_workspace_typed_settings(grid, capsys):
    """A typed setting that differs is refused; so is a default in a run of this version."""
    words = ["--text", "a hamburger", "--device", "cpu", "--workspace", str(grid)]
    assert main([*words, "--lr", "0.25"]) == 2
    assert "it has --lr 0.002, not 0.25 (choose another" in capsys.readouterr().err
    change_settings(grid, lambda data: data.update(version=__version__))
    assert main([*words, "--lr", "0.002"]) == 2
    assert "--lr_decay 0.5, not 0.3" in capsys.readouterr().err


def test_old_workspace_gone_settings(grid, capsys):
    """A removed setting gives one line on the terminal and in the log."""
    change_settings(grid, lambda data: data["shading"].update(light_phi=12.0))
    assert main(["--test", "--workspace", str(grid), "--six_views", "--device", "cpu"]) == 0
    line = f"warning: settings of this run that dream-fast {__version__} does not have are ignored: --light_phi 12.0"
    assert line in capsys.readouterr().out.splitlines()
    assert line in (grid / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("room", "version", "sentence"),
    [
        ("optim", "999.0.0", "dream-fast 999.0.0 wrote it and this is {}: upgrade dream-fast"),
        ("field", "0.1.1", "dream-fast 0.1.1, which wrote it, reads it; this is {}"),
    ],
)
def test_old_workspace_refusals(grid, capsys, room, version, sentence):
    """--test and resuming refuse alike, and leave the files unchanged."""
    change_settings(grid, lambda data: (data.update(version=version), data[room].update(depth=3)))
    before = {path: path.read_bytes() for path in grid.rglob("*") if path.is_file()}
    for words in (["--test"], ["--text", "a hamburger"]):
        assert main([*words, "--workspace", str(grid), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert f"{room}.depth" in error and sentence.format(__version__) in error
    assert {path: path.read_bytes() for path in grid.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("start", [path for path in STORED if path.name == "grid"], ids=named)
def test_old_workspace_init_with(monkeypatch, start, tmp_path):
    """--dmtet --init_with uses the weights of a run of any checkpoint format."""
    words = ["--dmtet", "--init_with", str(start), "--seed", "1", "--tet_grid_size", "16"]
    config = settled(monkeypatch, tmp_path / "mesh", *words)
    assert config.field == Workspace(start).stored_config().field
    trainer = Trainer(config, choose_runtime(config), 1)
    trainer.start_shape()
    weights = load_file(list_checkpoints(start / "checkpoints")[-1])["optimizer/ema"]
    scene = torch.cat([parameter.detach().view(-1) for parameter in trainer.field.parameters()])
    assert torch.equal(scene.sort().values, weights.sort().values)
    assert len(trainer.renderer.surface().faces) > 10
