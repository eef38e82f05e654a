"""The benchmark of a whole step: its command on a tiny model, its file, and on a GPU its bounds on memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dream_fast import kernels
from dream_fast.bench import compare, measure, results
from dream_fast.bench.ops import run as bench
from dream_fast.bench.pipeline import random_sd, step, step_cases

CPU = torch.device("cpu")
ROW = "op case impl mode dtype median_ms p20_ms p80_ms floor_ms pct_of_floor peak_bytes max_err tol".split()


@pytest.fixture(autouse=True)
def no_rates(monkeypatch):
    """Constant rates of the machine, since measuring them takes a second."""
    monkeypatch.setattr(measure, "copy_rate", lambda device: 10e9)
    monkeypatch.setattr(measure, "matmul_rate", lambda device: 100e9)
    if not torch.cuda.is_available():
        monkeypatch.setattr(step, "BLOCK", 2)


def test_step_command_writes_rows(tmp_path, capsys):
    """Rows of steps and of operators replace only their own."""
    out = tmp_path / "cpu.json"
    operators = ["--device", "cpu", "--op", "march", "--ms", "5", "--out", str(out)]
    assert bench.main(operators) == 0
    before = json.loads(out.read_text())
    words = ["--device", "cpu", "--blocks", "1", "--out", str(out), "--case", "compile"]
    assert step.main([*words, "--case", "default", "--case", "vram_O"]) == 0
    assert "left out: compile: compiling is for GPUs" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["rows"][:1] == before["rows"] and record["utc"] == before["utc"]
    assert [(row["case"], row["impl"]) for row in record["rows"][1:]] == [
        ("default", "torch"),
        ("vram_O", "torch"),
        ("default", "reference"),
    ]
    for row in record["rows"][1:]:
        assert list(row)[: len(ROW)] == ROW and row["op"] == "sds_step" and row["max_err"] <= row["tol"]
        assert list(row["split_ms"]) == ["render", "encode", "unet", "backward", "optimiser"]
        assert list(row["modules_ms"]) == ["unet", "vae_encoder"]
        assert all(part > 0 for name in ("split_ms", "modules_ms") for part in row[name].values())
    assert record["steps"].keys() == {"default", "vram_O"} and "git_sha" in record["steps"]["default"]
    assert compare.main([str(out)] * 2) == 0

    assert step.main([*words[:-1], "vram_O"]) == 0  # its row is replaced, the others stay
    again = json.loads(out.read_text())
    assert [row["case"] for row in again["rows"]] == ["rays_8", "default", "default", "vram_O"]
    others = [row for row in record["rows"] if row["case"] != "vram_O"]
    assert again["rows"][:3] == others and again["rows"][3] not in record["rows"]
    assert bench.main(operators) == 0  # and the operators' rows are replaced without those of the steps
    assert [row["op"] for row in json.loads(out.read_text())["rows"]] == ["march"] + 3 * ["sds_step"]


def test_write_kernels_keeps_rows(tmp_path):
    """Stored rows stay if GPU, versions and a clean commit are the same."""
    path = tmp_path / "r.json"
    head = {"gpu": "A", "torch": "2", "triton": "3", "driver": "5", "git_sha": "abc", "dirty": False}

    def written(head, *rows):
        names = dict(case="rays_8", mode="forward", dtype="float32", impl="triton")
        results.write_kernels(path, head, [{"op": op, **names, "median_ms": median} for op, median in rows])
        return [(row["op"], row["median_ms"]) for row in results.read(path, head["gpu"])["rows"]]

    assert written(head, ("march", 1), ("adan", 1)) == [("march", 1), ("adan", 1)]
    assert written(head, ("march", 2), ("field", 2)) == [("march", 2), ("adan", 1), ("field", 2)]
    assert results.read(path, "B") == {}
    for other in ({"git_sha": "abd"}, {"torch": "2.1"}, {"gpu": "B"}, {"dirty": True}):
        written(head, ("march", 3), ("field", 3))
        assert written(head | other, ("adan", 4)) == [("adan", 4)]
    assert written(head | {"dirty": True}, ("march", 5)) == [("march", 5)]  # two states without a commit may differ


def test_write_kernels_keeps_both_calls(tmp_path):
    """A row replayed from a graph and one called from Python are two; a stored one without the field is the former."""
    path = tmp_path / "r.json"
    head = {"gpu": "A", "torch": "2", "triton": "3", "driver": "5", "git_sha": "abc", "dirty": False}
    row = dict(op="march", case="rays_8", mode="forward", dtype="float32", impl="triton")
    results.write_kernels(path, head, [row | {"median_ms": 1}])
    results.write_kernels(
        path, head, [row | {"call": "eager", "median_ms": 2}, row | {"call": "graph", "median_ms": 3}]
    )
    rows = results.read(path, "A")["rows"]
    assert [(row["call"], row["median_ms"]) for row in rows] == [("graph", 3), ("eager", 2)]


def test_step_fails_on_wrong_gradient(tmp_path, monkeypatch, capsys):
    """A biased image model fails the command."""
    genuine = step_cases.our_components

    def biased(*args):
        components = genuine(*args)
        components.unet.conv_out.bias.data += 0.01
        return components

    monkeypatch.setattr(step_cases, "our_components", biased)
    words = ["--device", "cpu", "--blocks", "1", "--no-peer", "--case", "default", "--out", str(tmp_path / "cpu.json")]
    assert step.main(words) == 1
    assert "FAILED: default ours: error" in capsys.readouterr().out


def test_random_components_architecture():
    """Parameters and sizes are those of Stable Diffusion 2.1-base."""
    components = random_sd.random_components(torch.device("meta"), torch.float16)
    assert sum(parameter.numel() for parameter in components.unet.parameters()) == 865_910_724  # as published
    assert (components.image_size, components.latent_size) == (512, 64)
    assert {p.dtype for m in (components.unet, components.vae) for p in m.parameters()} == {torch.float16}


def test_random_components_repeat():
    """Random weights are the same each time, and copies in another dtype have them."""
    one, two = (random_sd.random_components(CPU, torch.float32, tiny=True) for _ in range(2))
    exact = random_sd.in_dtype(one, torch.float64)
    for name, value in one.unet.state_dict().items():
        assert torch.equal(value, two.unet.state_dict()[name]), name
        assert torch.equal(exact.unet.state_dict()[name], value.double()), name
    assert exact.dtype == torch.float64 and one.dtype == torch.float32


def test_reference_operators():
    """Operators are references inside the block and themselves after it."""
    before = kernels.composite
    with step_cases.reference_operators():
        assert kernels.composite is kernels.composite_reference and kernels.march is kernels.march_reference
        assert kernels.adan_step is kernels.adan_step_reference
    assert kernels.composite is before and before is not kernels.composite_reference


def test_ball_samples():
    """A quarter of 490,000 samples at a quarter of the pixels; the untrained network, left out here, adds 7 %."""
    from dream_fast.engine.render.volume import VolumeRenderer
    from dream_fast.engine.scene.camera import rays, sample_cameras
    from dream_fast.engine.scene.hash_grid_field import HashGridField

    config = step_cases.configure({"guidance": ("SD",)} | step_cases.BALL, "cpu")
    field = HashGridField(config.field, config.render.bound, torch.Generator().manual_seed(0))
    renderer = VolumeRenderer(field, config.render)
    density = torch.exp(field_blob(renderer, config))
    bits, _ = kernels.occupancy_update(
        renderer.sampler.density, density.view_as(renderer.sampler.density), threshold=10.0
    )
    renderer.sampler.bits.copy_(bits)
    generator = torch.Generator().manual_seed(0)
    origins, directions = rays(sample_cameras(config.camera, 1, generator), 32, 32)
    samples = renderer.sampler.sample(origins[0].contiguous(), directions[0].contiguous(), generator)
    assert 1.07 * 4 * int(samples.count) == pytest.approx(490_000, rel=0.02)


def field_blob(renderer, config) -> torch.Tensor:
    points = kernels.occupancy_points(config.render.occupancy_resolution, 1, config.render.bound, None, device=CPU)
    spec = renderer.field.spec
    return spec.blob_density * torch.exp(-points.square().sum(-1) / (2 * spec.blob_radius**2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the command measures for minutes and refuses nothing")
def test_step_command_without_gpu(capsys):
    """Without a GPU the command ends with status 2."""
    assert step.main([]) == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory of a GPU")
@pytest.mark.parametrize(("case", "gib"), [("default", 5.0), ("vram_O", 3.2)])
def test_step_memory(case: str, gib: float, tmp_path: Path) -> None:
    """A step fits into its limit, in a process that may not reserve more."""
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "dream_fast.bench", "step", "--case", case, "--no-peer", "--limit", str(gib)]
    process = subprocess.run([*command, "--blocks", "1", "--out", str(out)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert 0 < row["peak_bytes"] <= gib * step.GIB
