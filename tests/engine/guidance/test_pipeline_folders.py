"""Folders of pipelines that have an adapter: a run through the command, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.cli import main
from dream_fast.engine.config.model_names import PIPELINES
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.model.checks import missing_files, pipeline_variant
from dream_fast.engine.guidance.model.load import load_image_model
from dream_fast.engine.guidance.model.pipelines import FAMILIES
from dream_fast.tests.engine.guidance.tiny_pipelines import BUILDERS, write_tiny_pipeline

SMALL = """
    --device cpu --iters 3 --log_every 1 --w 16 --h 16 --W 16 --H 16 --dataset_size_test 2 --dataset_size_valid 1
    --n_levels 3 --log2_hashmap_size 10 --max_resolution 32 --hidden_width 16 --hidden_layers 1 --bound 0.6
    --max_steps 48 --occupancy_resolution 16 --latent_iter_ratio 0
""".split()


def edit_json(path: Path, **changes: object) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> object:
    return load_image_model(folder, torch.device("cpu"), dtype, **options)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny SDXL."""
    return write_tiny_pipeline("StableDiffusionXLPipeline", tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture
def broken(sdxl: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(sdxl, tmp_path / "model"))


def test_table_names_every_adapter() -> None:
    """The names that are known without an import are the adapters', and each has a tiny pipeline."""
    assert tuple(FAMILIES) == PIPELINES == tuple(sorted(BUILDERS, key=PIPELINES.index))


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "Flux2KleinPipeline"])
def test_run_through_the_command(name: str, tmp_path: Path) -> None:
    """A run guides by the pipeline: every step has a gradient, and the manifest names the model."""
    model = write_tiny_pipeline(name, tmp_path / "model")
    workspace = tmp_path / "run"
    command = ["--text", "a red mug", "--hf_key", str(model), "--workspace", str(workspace), *SMALL]
    assert main(command) == 0
    rows = [json.loads(line) for line in (workspace / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows if "grad_norm" in row) and rows
    assert json.loads((workspace / "manifest.json").read_text())["model"] == str(model)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda m: (m / "unet/diffusion_pytorch_model.safetensors").unlink(), "lacks unet/diffusion_pytorch_model.saf"),
        (lambda m: (m / "text_encoder_2/model.safetensors").rename(m / "text_encoder_2/model.bin"), "run code"),
        (lambda m: (m / "vae/config.json").unlink(), "lacks vae/config.json"),
        (lambda m: (m / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"0" * 99), "damaged or incomplete"),
        (lambda m: edit_json(m / "scheduler/scheduler_config.json", prediction_type="x0"), "predicts 'x0'"),
        (
            lambda m: edit_json(m / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
            "is a FlowMatchEulerDiscreteScheduler, but a StableDiffusionXLPipeline needs noise variances",
        ),
    ],
)
def test_folders_that_cannot_guide(broken: Path, spoil: Callable[[Path], object], sentence: str) -> None:
    """The error has one line, with the file or setting."""
    spoil(broken)
    with pytest.raises(UserError, match=sentence):
        load(broken)


def test_distilled_klein_is_refused(tmp_path: Path) -> None:
    """A FLUX.2-klein without "base" has no unguided prediction."""
    model = write_tiny_pipeline("Flux2KleinPipeline", tmp_path / "model")
    edit_json(model / "model_index.json", is_distilled=True)
    with pytest.raises(UserError, match="was distilled to sample in few steps"):
        load(model)


def test_page_names_every_pipeline() -> None:
    """docs/image_models.md has a row for each adapter."""
    page = (Path(__file__).parents[3] / "docs/image_models.md").read_text()
    assert all(f"| `{name}` |" in page for name in PIPELINES)


def test_half_precision_files_serve(broken: Path) -> None:
    """A folder that has only fp16 files of a component is complete, and these are loaded."""
    file = broken / "unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert pipeline_variant(broken) == "fp16" and missing_files(broken, "SD") == []
    model = load(broken)
    model.free_text_encoder()
    assert model.predict(
        torch.zeros(1, 4, 8, 8), torch.tensor([500]), {"states": torch.zeros(1, 77, 32), "pooled": torch.zeros(1, 16)}
    ).shape == (1, 4, 8, 8)


def test_options_that_do_not_apply(sdxl: Path) -> None:
    """Another attention than torch's is refused."""
    with pytest.raises(UserError, match="--attention xformers is for Stable Diffusion 1 and 2"):
        load(sdxl, attention="xformers")


def test_prompts_are_embedded_again(sdxl: Path) -> None:
    """Once the network has taken the text encoders' place they are loaded once more, for the same embedding."""
    model = load(sdxl)
    first = model.embed(["a mug"], "")
    model.free_text_encoder()
    again = model.embed(["a mug"], "")
    assert model.pipeline.text_encoder is None and model.network is model.pipeline.unet
    assert all(torch.equal(first[name], again[name]) for name in first) and not first["states"][1].any()


def test_memory_saving_changes_nothing(sdxl: Path) -> None:
    """With vram_O the encoder's latents and gradients stay the same."""

    def latents_and_gradient(dtype: torch.dtype, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model = load(sdxl, dtype, **options)
        model.free_text_encoder()
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        latents = model.encode(images, torch.ones(2, 4, 8, 8))
        return latents, *torch.autograd.grad(latents.square().sum(), images)

    saving, plain = latents_and_gradient(torch.float32, vram_O=True), latents_and_gradient(torch.float32)
    for got, reference, exact in zip(saving, plain, latents_and_gradient(torch.float64), strict=True):
        check("latents or gradient", got, reference, exact)
