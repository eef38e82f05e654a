"""The whole command on an untrained model: its files, its refusals, and that it repeats."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
import trimesh
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dream_fast.cli import main
from dream_fast.engine import outputs
from dream_fast.engine.guidance.prompts import PromptEmbeddings
from dream_fast.engine.scene.field import Field
from dream_fast.engine.workspace.checkpoint import FORMAT
from dream_fast.engine.workspace.record import MARK

SIDE, FRAMES = 24, 5
SMALL = f"""
    --device cpu --iters 4 --log_every 2 --seed 7 --w 16 --h 16 --W {SIDE} --H {SIDE} --dataset_size_test {FRAMES}
    --dataset_size_valid 2 --n_levels 3 --log2_hashmap_size 10 --max_resolution 32 --hidden_width 16 --hidden_layers 1
    --bound 0.6 --max_steps 48 --occupancy_resolution 16 --mcubes_resolution 24
    --texture_resolution 64
""".split()


def command(workspace: Path, model: Path, *more: str, text: str = "a hamburger") -> list[str]:
    return ["--text", text, "--hf_key", str(model), "--workspace", str(workspace), *SMALL, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    """The message with which the command refuses `arguments`."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("dream-fast: error: ") and "\n" not in error
    return error


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    """The workspace of a finished run; tests that change it work on a copy."""
    workspace = tmp_path_factory.mktemp("runs") / "trial"
    assert main(command(workspace, tiny_model, "--save_mesh")) == 0
    return workspace


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    for name, data in contents(finished).items():
        (tmp_path / "trial" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "trial" / name).write_bytes(data)
    return tmp_path / "trial"


def test_the_mesh_has_the_outline_of_six_views(copy, monkeypatch):
    genuine, rendered = outputs.write_mesh, []

    def watched(*of, silhouettes, **options):
        rendered.append(silhouettes)
        return genuine(*of, silhouettes=silhouettes, **options)

    monkeypatch.setattr(outputs, "write_mesh", watched)
    assert main(["--test", "--workspace", str(copy), "--save_mesh", "--device", "cpu"]) == 0
    (silhouettes,) = rendered
    assert len(silhouettes.opaque) == 6 and 0 < silhouettes.opaque.float().mean() < 1


def test_a_run_writes_everything(finished, tiny_model):
    manifest = json.loads((finished / "manifest.json").read_text())
    (this,) = manifest["runs"]
    assert (manifest["text"], manifest["seed"], manifest["model"]) == ("a hamburger", 7, str(tiny_model))
    assert (this["from_step"], this["to_step"]) == (0, 4)
    assert this["peak_bytes"]["host"] > 0 and this["seconds"] > 0 and this["versions"]["torch"] == torch.__version__
    assert json.loads((finished / "config.json").read_text())["run"]["seed"] == 7
    assert [json.loads(row)["step"] for row in (finished / "metrics.jsonl").read_text().splitlines()] == [2, 4]
    log = (finished / "log.txt").read_text()
    assert "'a hamburger'" in log and "fp32" in log and "seed 7" in log and "mesh.glb" in log

    assert Image.open(finished / "validation" / "step_000004.png").size == (2 * SIDE, 2 * SIDE)
    for name in ("front", "right", "back", "left", "top", "bottom"):
        assert Image.open(finished / "results" / f"{name}.png").size == (SIDE, SIDE)
    with av.open(str(finished / "results" / "turntable.mp4")) as video:
        frames = list(video.decode(video=0))
    assert len(frames) == FRAMES and (frames[0].width, frames[0].height) == (3 * SIDE, SIDE)
    mesh = trimesh.load(finished / "mesh" / "mesh.glb", force="mesh")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # those that seams of the texture double
    assert len(mesh.faces) > 0 and mesh.is_watertight
    assert [path.name for path in finished.rglob(".*")] == [MARK]  # nothing half-written is left


def test_file_settings_reach_steps(tiny_model, tmp_path, monkeypatch):
    """Cameras, phases and prompts of a file of arguments reach the steps."""
    words = "--jitter_pose --progressive_view --exp_start_iter 1 --exp_end_iter 3 --angle_front 60 --angle_overhead 20"
    (tmp_path / "cameras.txt").write_text(f"# how a run looks at its object\n{words} --view_blend 40\n")
    more, steps = ["--file", str(tmp_path / "cameras.txt"), "--latent_iter_ratio", "0.5"], []
    embeddings = PromptEmbeddings.embeddings

    def spied(self, azimuth, polar, angles):
        steps.append((float(polar), tuple(angles)))
        return embeddings(self, azimuth, polar, angles)

    monkeypatch.setattr(PromptEmbeddings, "embeddings", spied)
    assert main(command(tmp_path / "trial", tiny_model, *more)) == 0
    assert [angles for _, angles in steps] == [(20.0, 40.0, 60.0)] * 4
    # The first two cameras come from a fifth of the range around the default of 90, and jitter adds to that.
    assert all(75 < polar < 100 and polar != 90 for polar, *_ in steps[:2])
    rows = [json.loads(row)["phase"] for row in (tmp_path / "trial" / "metrics.jsonl").read_text().splitlines()]
    assert rows == ["latent", "shaded"]
    assert main(["--test", "--workspace", str(tmp_path / "trial"), "--six_views", "--default_polar", "60"]) == 0


def test_vanilla_run_whole(tmp_path, tiny_model, capsys):
    """A vanilla run writes everything, and can be resumed and tested."""
    words = "--n_frequencies 3 --hidden_width 16 --num_steps 8 --upsample_steps 4 --bound 0.6 --mcubes_resolution 24"
    words += " --texture_resolution 64"
    words += f" --device cpu --log_every 1 --seed 7 --w 16 --h 16 --W {SIDE} --H {SIDE} --dataset_size_test {FRAMES}"
    start = ["--text", "a hamburger", "--hf_key", str(tiny_model), *words.split(), "--save_mesh", "-O2", "--workspace"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*start, str(whole), "--iters", "4"]) == 0
    assert [main([*start, str(parts), "--iters", iters]) for iters in ("2", "4")] == [0, 0]
    files, again = contents(whole), contents(parts)
    assert {"results/turntable.mp4", "results/six_views.png", "validation/step_000004.png"} <= files.keys()
    mesh = trimesh.load(whole / "mesh" / "mesh.glb", force="mesh")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    assert mesh.is_watertight
    assert files.keys() <= again.keys()
    (whole / "results" / "front.png").unlink()
    assert main(["--test", "-O2", "--six_views", "--workspace", str(whole)]) == 0
    assert contents(whole)["results/front.png"] == files["results/front.png"]

    assert "--backbone vanilla, not grid" in refused(capsys, command(whole, tiny_model))
    checkpoint = str(whole / "checkpoints" / "step_000004.safetensors")
    message = refused(capsys, command(tmp_path / "new", tiny_model, "--ckpt", checkpoint))
    assert message.endswith("is of another architecture: backbone vanilla there, grid here")
    assert not (tmp_path / "new").exists()


def test_no_surface_costs_mesh(copy, tiny_model, capsys, monkeypatch):
    """A scene without a surface costs the mesh alone."""
    for old in ("mesh", "results"):
        shutil.rmtree(copy / old)
    (copy / "report.html").unlink()
    before = contents(copy / "checkpoints")
    monkeypatch.setattr(Field, "density", lambda self, x, **_: torch.zeros(len(x)))
    message = refused(capsys, ["--test", "--workspace", str(copy), "--save_mesh", "--device", "cpu"])
    assert message.endswith("the field's density is the same everywhere, so it has no surface to export")
    assert contents(copy / "checkpoints") == before and not list(copy.glob("mesh/*"))
    assert (copy / "results" / "turntable.mp4").exists() and (copy / "report.html").exists()


def test_full_disk_at_mesh(copy, capsys, monkeypatch):
    """A full disk at the mesh leaves nothing half written."""
    before = contents(copy / "checkpoints") | contents(copy / "mesh")

    def full(self, *_, **__):
        raise OSError(28, "No space left on device", str(copy / "mesh" / ".mesh.writing.obj"))

    monkeypatch.setattr("dream_fast.engine.export.mesh_files._obj", full)
    message = refused(capsys, ["--test", "--workspace", str(copy), "--save_mesh", "--six_views", "--device", "cpu"])
    assert "No space left on device" in message and "everything else is whole" in message
    assert contents(copy / "checkpoints") | contents(copy / "mesh") == before


def test_finished_run_writes_missing(copy, tiny_model, capsys):
    """A finished run writes only what is missing, with a message."""
    before = contents(copy)
    (copy / "mesh" / "mesh.glb").unlink()
    (copy / "results" / "back.png").write_bytes(b"kept")
    assert main(command(copy, tiny_model, "--save_mesh")) == 0
    assert "this run is finished (4 of 4 steps)" in capsys.readouterr().out
    after = contents(copy)
    assert after["mesh/mesh.glb"] == before["mesh/mesh.glb"]
    assert after["results/back.png"] == b"kept"
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"results/back.png", "report.html", "log.txt", MARK}


def test_missing_view_written(copy, tiny_model):
    """A missing image of the six views is written again."""
    before = contents(copy)
    for name in ("top_normal.png", "six_views.png"):
        (copy / "results" / name).unlink()
        assert main(command(copy, tiny_model)) == 0
        assert contents(copy)[f"results/{name}"] == before[f"results/{name}"]


def test_a_finished_run_needs_no_model(copy, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dream_fast.engine.guidance.registry.load_image_model", lambda *_, **__: pytest.fail("loaded a model")
    )
    assert main(command(copy, tiny_model)) == 0
    assert main(["--test", "--workspace", str(copy)]) == 0


def test_more_iterations_continue(copy, tiny_model):
    """More iterations extend a run, with its own seed."""
    longer = command(copy, tiny_model, "--iters", "6")
    at = longer.index("--seed")
    assert main(longer[:at] + longer[at + 2 :]) == 0  # no seed typed
    rows = [json.loads(row)["step"] for row in (copy / "metrics.jsonl").read_text().splitlines()]
    assert rows == [2, 4, 6]
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["seed"] == 7
    assert [(run["from_step"], run["to_step"]) for run in manifest["runs"]] == [(0, 4), (4, 6)]


def test_test_other_size(copy):
    """Test writes outputs again at another size."""
    assert main(["--test", "--six_views", "--workspace", str(copy), "--W", "32", "--H", "20"]) == 0
    assert Image.open(copy / "results" / "front.png").size == (32, 20)
    with av.open(str(copy / "results" / "turntable.mp4")) as video:
        assert video.streams.video[0].height == SIDE  # six views alone leave the video as it is


def test_six_views_alone_make_no_video(tmp_path, tiny_model):
    assert main(command(tmp_path, tiny_model, "--six_views", "--iters", "1")) == 0
    assert (tmp_path / "results" / "top.png").is_file()
    assert not (tmp_path / "results" / "turntable.mp4").exists()


def test_scratch_replaces_the_run(copy, tiny_model):
    assert main(command(copy, tiny_model, "--ckpt", "scratch", "--iters", "2", text="a donut")) == 0
    assert json.loads((copy / "manifest.json").read_text())["text"] == "a donut"
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step_000002.safetensors"]
    assert not (copy / "mesh").exists()


def test_ckpt_elsewhere_starts_run(finished, tmp_path, tiny_model):
    """A new run can start from a checkpoint of another folder."""
    checkpoint = finished / "checkpoints" / "step_000004.safetensors"
    assert main(command(tmp_path, tiny_model, "--ckpt", str(checkpoint), "--iters", "6")) == 0
    assert json.loads((tmp_path / "manifest.json").read_text())["runs"][0]["from_step"] == 4


def test_resumed_attention(tmp_path, tiny_model, monkeypatch, capsys):
    """A resumed run computes attention as before."""
    from dream_fast.engine.guidance.model.attention import OPERATORS

    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=OPERATORS["sdpa"]))
    for more, note in (
        (["--attention", "xformers", "--iters", "1"], "xformers"),
        (["--iters", "2"], "xformers"),
        (["--iters", "3", "--attention", "sdpa"], "sdpa"),
        (["--iters", "4"], "sdpa"),
    ):
        assert main(command(tmp_path, tiny_model, "--six_views", *more)) == 0
        assert f"(attention {note})" in capsys.readouterr().out
        assert json.loads((tmp_path / "manifest.json").read_text())["runs"][-1]["attention"] == note


def test_unknown_words_by_model(tmp_path, tiny_model, monkeypatch):
    """Unknown words are passed to Stable Diffusion and not to the embedded model."""
    read = []

    class Stop(Exception):
        pass

    def stop(components, text, negative, *, view_prompts):
        read.append((text, negative, view_prompts))
        raise Stop

    monkeypatch.setattr("dream_fast.engine.guidance.registry.PromptEmbeddings", stop)
    monkeypatch.setattr(
        "dream_fast.engine.guidance.registry.load_image_model", lambda *_, **__: SimpleNamespace(latent_channels=4)
    )
    words = ["--text", "A shiny, red robot!", "--negative", "blurry, blue", "--workspace", str(tmp_path / "new")]
    words += ["--text_back", "A red robot from behind!"]
    for model in ([], ["--hf_key", str(tiny_model)]):
        with pytest.raises(Stop):
            main([*words, *model, "--device", "cpu"])
    assert read == [
        ("a red robot", "blue", {"back": "a red robot"}),
        ("A shiny, red robot!", "blurry, blue", {"back": "A red robot from behind!"}),
    ]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("flags", [["--attention", "cudnn"], ["--compile"]])
def test_cpu_limits_refused_early(flags, tmp_path, tiny_model, capsys):
    """Settings that a CPU does not support are refused before anything is written."""
    sentence = refused(capsys, command(tmp_path / "new", tiny_model, *flags))
    assert flags[0] in sentence and ("--attention sdpa always does" in sentence or "needs a GPU" in sentence)
    assert not (tmp_path / "new").exists()


def test_other_run_refused(copy, tiny_model, capsys):
    """The workspace of another run is refused and left unchanged."""
    before = contents(copy)
    sentence = refused(capsys, command(copy, tiny_model, "--lr", "0.5", text="a donut"))
    assert "--text a hamburger, not a donut" in sentence and "--lr 0.001, not 0.5" in sentence
    assert contents(copy) == before


def test_impossible_run_refused_early(tmp_path, tiny_model, capsys):
    """Impossible settings are refused before anything is written."""
    workspace = tmp_path / "new"
    assert "lacks" in refused(capsys, command(workspace, tmp_path))
    assert "does not exist" in refused(capsys, command(workspace, tmp_path / "gone"))
    assert "no checkpoint" in refused(capsys, command(workspace, tiny_model, "--ckpt", str(tmp_path / "gone")))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("notes")
    assert "is a file" in refused(capsys, command(tmp_path / "file", tiny_model))
    assert (tmp_path / "file").read_text() == "notes"


def test_workspace_cannot_be_made(tiny_model, capsys):
    """A workspace that cannot be made is refused."""
    nowhere = Path("/proc/sys/dream-fast")  # no folder can be made there, whoever asks
    if not nowhere.parent.is_dir():
        pytest.skip("no /proc on this machine")  # no other folder refuses root as well, and only Linux has it
    assert "--workspace /proc/sys/dream-fast" in refused(capsys, command(nowhere, tiny_model))


def test_broken_model_refused_early(tmp_path, tiny_model, capsys):
    """A broken model is refused before anything is written."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(model / "vae")
    assert "lacks its component vae/" in refused(capsys, command(tmp_path / "new", model))
    shutil.copytree(tiny_model / "vae", model / "vae")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is damaged or incomplete" in refused(capsys, command(tmp_path / "new", model))
    assert not (tmp_path / "new").exists()


def test_hub_name_without_network(tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert "the hub cannot be reached" in refused(capsys, command(tmp_path / "new", Path("nobody/nothing")))
    assert not (tmp_path / "new").exists()


def test_ckpt_elsewhere_refused(copy, finished, tiny_model, capsys):
    """A checkpoint of another folder does not replace a stored run."""
    before = contents(copy)
    elsewhere = str(finished / "checkpoints" / "step_000004.safetensors")
    sentence = refused(capsys, command(copy, tiny_model, "--iters", "6", "--ckpt", elsewhere))
    assert "would replace the run" in sentence and "leave it out" in sentence
    assert contents(copy) == before
    checkpoint = str(copy / "checkpoints" / "step_000004.safetensors")
    assert main(command(copy, tiny_model, "--iters", "5", "--ckpt", checkpoint)) == 0


def test_damaged_manifest_refused(copy, tiny_model, capsys):
    """A damaged manifest is refused and left unchanged."""
    (copy / "manifest.json").write_text("{")
    before = contents(copy)
    assert "manifest.json cannot be used" in refused(capsys, command(copy, tiny_model, "--iters", "6"))
    assert contents(copy) == before


def test_other_checkpoint_version_refused(copy, tiny_model, capsys):
    """A checkpoint of another version is refused."""
    path = copy / "checkpoints" / "step_000004.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
    save_file(load_file(path), path, metadata={FORMAT: json.dumps(header | {"version": 99})})
    before = contents(copy)
    assert "reads format versions 1 to 3: upgrade dream-fast" in refused(capsys, ["--test", "--workspace", str(copy)])
    assert "has format version 99" in refused(capsys, command(copy, tiny_model, "--iters", "6"))
    assert contents(copy) == before


def test_damaged_checkpoint_refused(copy, tiny_model, capsys):
    """A damaged checkpoint is refused and left unchanged."""
    checkpoint = copy / "checkpoints" / "step_000004.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    before = contents(copy)
    assert "damaged" in refused(capsys, command(copy, tiny_model, "--iters", "6"))
    assert "damaged" in refused(capsys, ["--test", "--workspace", str(copy)])
    assert contents(copy) == before


def test_damaged_newest_checkpoint_falls_back(copy, tiny_model, capsys):
    """A damaged newest checkpoint falls back to the one before with a message."""
    longer = command(copy, tiny_model, "--iters", "6")
    assert main(longer) == 0
    newest = copy / "checkpoints" / "step_000006.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with (copy / "metrics.jsonl").open("a") as metrics:
        metrics.write("junk\n")
    capsys.readouterr()
    assert main(["--test", "--six_views", "--workspace", str(copy)]) == 0  # looking changes nothing
    assert newest.exists() and "the run resumes from step_000004.safetensors" in capsys.readouterr().out
    assert main(longer) == 0
    output = capsys.readouterr().out
    assert f"warning: the checkpoint {newest} is damaged" in output
    assert "the run resumes from step_000004.safetensors" in output
    assert (
        "the run resumes from step_000004.safetensors" in (copy / "log.txt").read_text() and "cannot be read" in output
    )
    assert [json.loads(row)["step"] for row in (copy / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6]
    assert newest.read_bytes() == whole  # reached once more
    assert newest.with_name("damaged_step_000006.safetensors").exists()


def test_other_architecture_refused(finished, tmp_path, tiny_model, capsys):
    """A checkpoint of another architecture is refused."""
    checkpoint = str(finished / "checkpoints" / "step_000004.safetensors")
    arguments = command(tmp_path / "new", tiny_model, "--ckpt", checkpoint, "--n_levels", "4")
    assert "levels 3 there, 4 here" in refused(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- repetition


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_same_seed_same_files(tmp_path, tiny_model, two_threads):
    """A run in this process and one in a fresh process write the same files."""
    size = ["--w", "48", "--h", "48", "--iters", "3", "--log_every", "1"]  # enough samples to be shared by two threads
    assert main(command(tmp_path / "a", tiny_model, *size, "--save_mesh")) == 0
    words = command(tmp_path / "b", tiny_model, *size, "--save_mesh")
    environment = os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-P", "-m", "dream_fast.cli", *words], env=environment, cwd=tmp_path, check=True)

    def metrics(name: str) -> list[str]:
        rows = [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert all(row.pop("seconds") > 0 and row.pop("it_per_s") > 0 for row in rows)
        return [json.dumps(row) for row in rows]

    assert metrics("a") == metrics("b") and len(metrics("a")) == 3
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "b").keys()
    names = sorted(name for name in contents(tmp_path / "a") if "/" in name)
    same, different, missing = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)
    assert (different, missing) == ([], [])
    expected = {"results/turntable.mp4", "results/six_views.png", "results/front.png", "results/front_normal.png"}
    expected |= {"mesh/mesh.glb", "checkpoints/step_000003.safetensors", "validation/step_000003.png"}
    assert expected <= set(same)
