"""IF: a model that works on pixels, loaded in the layout of diffusers, and its guidance."""

import json
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from dream_fast.bench.accuracy import check, error
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.ddim import sample
from dream_fast.engine.guidance.model import checks
from dream_fast.engine.guidance.model.components import Components, load_components
from dream_fast.engine.guidance.perp_neg import Negatives
from dream_fast.engine.guidance.prompts import PromptEmbeddings
from dream_fast.engine.guidance.sds import Draws, Prompts, ScoreDistillation, distillation_gradient
from dream_fast.engine.guidance.snapshots import guidance_images

SIZE = 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def components(tiny_if_model: Path) -> Components:
    return load_components(tiny_if_model, "cpu", kind="IF")


@pytest.fixture
def broken(tiny_if_model: Path, tmp_path: Path) -> Path:
    """A copy of the model, for a test to break."""
    return shutil.copytree(tiny_if_model, tmp_path / "broken")


def test_facts(components: Components) -> None:
    from diffusers.models.attention_processor import AttnAddedKVProcessor2_0

    assert components.latents_are_pixels and components.vae is None and components.t5
    assert (components.image_size, components.latent_size, components.latent_channels) == (SIZE, SIZE, 3)
    assert (components.window, components.prediction_type, components.process.num_timesteps) == (77, "epsilon", 1000)
    # Keys and values of the prompt stand beside those of the image: another attention would leave them out.
    processors = components.unet.attn_processors.values()
    assert processors and all(type(processor) is AttnAddedKVProcessor2_0 for processor in processors)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    cosine = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2  # the schedule of Nichol and Dhariwal 2021
    betas = (1 - cosine[1:] / cosine[:-1]).clamp(max=0.999)
    check("alphas", components.process.alphas_cumprod, (1 - betas.float()).cumprod(0), (1 - betas).cumprod(0))


def test_prompts_lower_case_and_masked(tiny_if_model: Path, components: Components, in_fp64: Callable) -> None:
    """Prompts are in lower case and their padding is masked."""
    (embedded,) = components.embed(["A Hamburger "])
    assert embedded.shape == (77, 24)
    ids = components.tokenizer(["a hamburger"], return_tensors="pt").input_ids
    assert ids.shape[1] < 20
    with torch.no_grad():  # without padding
        alone, exact = (model.text_encoder(ids)[0][0] for model in (components, in_fp64(components)))
    check("embeddings", embedded[: len(alone)], alone, exact)
    prompts = PromptEmbeddings(load_components(tiny_if_model, "cpu", kind="IF"), "a hamburger")
    assert prompts.views.shape == (4, 77, 24) and prompts.negative.shape == (1, 77, 24)


def test_prompt_cut_at_77_tokens(components: Components, caplog) -> None:
    """A longer prompt is cut at 77 tokens, though T5 supports more."""
    prompts = PromptEmbeddings(components, "a hamburger " * 12, keep_text_encoder=True)
    assert prompts.views.shape[1] == 77
    assert "longer than the 77 tokens that the text encoder reads; left out: " in caplog.text


def by_hand(
    components: Components,
    z: Tensor,
    t: Tensor,
    cond: Tensor,
    uncond: Tensor,
    noise: Tensor,
    others: Sequence[Tensor] = (),
    weights: Tensor | None = None,
) -> Tensor:
    """g of images `z` [B, 3, S, S] with a guidance scale of 20, one by one, in the dtype of `components`."""
    z, cond, uncond, noise = (x.to(components.dtype) for x in (z, cond, uncond, noise))
    gradients = []
    for i, level in enumerate(t):
        a = components.process.alphas_cumprod[level].to(components.dtype)
        noisy = a.sqrt() * z[i] + (1 - a).sqrt() * noise[i]

        def tell(prompt: Tensor, noisy: Tensor = noisy, level: Tensor = level) -> Tensor:
            with torch.no_grad():
                out = components.unet(noisy[None], level, encoder_hidden_states=prompt[None].to(components.dtype))
            assert out.sample.shape[1] == 6
            return out.sample[0, :3]  # the others are the variance

        plain = tell(uncond[i])
        main = tell(cond[i]) - plain
        turned = main.clone()
        for j, other in enumerate(others):
            delta = tell(other) - plain
            turned += weights[i, j] * (delta - (delta * main).sum() / main.square().sum() * main)
        gradients.append((1 - a) * (plain + 20 * turned - noise[i]))
    return torch.stack(gradients)


@pytest.mark.parametrize("side", [SIZE, 40])
def test_pixel_gradient_by_hand(components: Components, in_fp64: Callable, side: int) -> None:
    """The gradient also goes through the averaging of an image that shrinks."""
    rgb = torch.rand(4, 3, side, side, generator=generator(1)).requires_grad_()
    cond, uncond = torch.randn(2, 4, 77, 24, generator=generator(2))
    score = ScoreDistillation(components, GuidanceConfig(guidance_scale=20.0, lambda_guidance=4.0))
    result = score(rgb, cond, uncond, StepInputs(generator=generator(3)))
    result.loss.backward()

    drawn = generator(3)
    t = score.draw_timesteps(4, StepInputs(generator=drawn))
    noise = torch.randn(4, 3, SIZE, SIZE, generator=drawn)
    assert torch.equal(t, result.t)
    expected = []
    for model in (components, in_fp64(components)):
        image = rgb.detach().to(model.dtype).requires_grad_()
        z = F.interpolate(image, (SIZE, SIZE), mode="bilinear", antialias=True) * 2 - 1
        gradient = 4 * by_hand(model, z.detach(), t, cond, uncond, noise)
        expected.append((gradient, torch.autograd.grad(z, image, gradient / 4)[0]))
    (reference, image_reference), (exact, image_exact) = expected
    check("latents", result.gradient, reference, exact)
    check("image", rgb.grad, image_reference, image_exact)
    if side == SIZE:
        # Twice, for [-1, 1], over a batch of four.
        check("image and latents", rgb.grad, result.gradient / 2, result.gradient.double() / 2)


@pytest.mark.parametrize(
    "options",
    [{"objective": "csd"}, {"objective": "asd"}, {"objective": "sdi", "inversion_steps": 2}, {"loss_space": "x0"}],
)
def test_every_score_guides_pixels(components: Components, options: dict) -> None:
    rgb = torch.rand(1, 3, 24, 24, generator=generator(1)).requires_grad_()
    cond, uncond = torch.randn(2, 1, 77, 24, generator=generator(2))
    config = GuidanceConfig(guidance_scale=7.5, **options)
    ScoreDistillation(components, config)(rgb, cond, uncond, StepInputs(generator=generator(3))).loss.backward()
    assert torch.isfinite(rgb.grad).all() and rgb.grad.abs().max() > 0


def test_perp_neg_by_hand(components: Components, in_fp64: Callable) -> None:
    """A batch equals the loop over its samples, each with its own weights."""
    z, noise = torch.randn(2, 3, 3, SIZE, SIZE, generator=generator(1))
    cond, uncond = torch.randn(2, 3, 77, 24, generator=generator(2))
    others, weights = torch.randn(2, 77, 24, generator=generator(4)), torch.tensor([[-1.0, 0], [0, -2.0], [0, 0]])
    config, t = GuidanceConfig(perpneg=True), torch.tensor([100, 500, 900])
    scale = {"guidance_scale": torch.tensor(20.0)}
    given = Prompts(cond, uncond, Negatives(others, weights))
    whole, *_ = distillation_gradient(components, config, z, Draws(t, noise), given, scale)
    models = (components, in_fp64(components))
    check("turned", whole, *(by_hand(model, z, t, cond, uncond, noise, others, weights) for model in models))
    plain, *_ = distillation_gradient(components, config, z, Draws(t, noise), Prompts(cond, uncond), scale)
    without = [by_hand(model, z, t, cond, uncond, noise) for model in models]
    check("plain", plain, *without)
    check("weights of 0", whole[2], without[0][2], without[1][2])
    assert all(error(whole[i], without[1][i]) > 100 * error(plain[i], without[1][i]) for i in (0, 1))


def test_latents_are_refused(components: Components) -> None:
    prompts = torch.zeros(1, 77, 24)
    with pytest.raises(ValueError, match="the model works on pixels"):
        ScoreDistillation(components, GuidanceConfig())(
            torch.zeros(1, 3, 16, 16), prompts, prompts, StepInputs(latents=True)
        )


def test_pixel_sampling_and_images(components: Components) -> None:
    """Sampling and snapshots need no decoder."""
    cond, uncond = torch.randn(2, 2, 77, 24, generator=generator(2))
    images = sample(components, cond, uncond, steps=3, generator=generator())
    assert images.shape == (2, 3, SIZE, SIZE) and images.min() >= 0 and images.max() <= 1 and images.std() > 0.01
    z = torch.rand(2, 3, SIZE, SIZE, generator=generator()) * 2 - 1
    snapshot = guidance_images(components, (z + 1) / 2, z, z)
    for column in (1, 2):
        check("seen", snapshot[:, column], (z + 1) / 2, (z.double() + 1) / 2)


def test_half_precision_shards(tiny_if_model: Path, broken: Path) -> None:
    """Half-precision shards load under the names that libraries write."""
    whole = load_components(tiny_if_model, "cpu", kind="IF")
    for part, name in (("text_encoder", "model"), ("unet", "diffusion_pytorch_model")):
        model = getattr(whole, part)
        model.half().save_pretrained(broken / part, variant="fp16", max_shard_size="5KB")
        (broken / part / f"{name}.safetensors").unlink()
        assert (broken / part / f"{name}.safetensors.index.fp16.json").exists()
        assert len(list((broken / part).glob(f"{name}.fp16-0*-of-*.safetensors"))) > 2
    parts = load_components(broken, "cpu", kind="IF")
    for part in ("text_encoder", "unet"):
        loaded = getattr(parts, part).state_dict()
        for name, value in getattr(whole, part).state_dict().items():
            assert torch.equal(value.float(), loaded[name]), name
    next((broken / "text_encoder").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"text_encoder.*fp16-00002-of-.*missing"):
        load_components(broken, "cpu", kind="IF")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_download_one_set_of_weights(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A single set of weights is downloaded, although the hub has fp32, fp16 and other files."""
    import huggingface_hub

    whole = load_components(broken, "cpu", kind="IF")
    whole.text_encoder.half().save_pretrained(broken / "text_encoder", variant="fp16", max_shard_size="5KB")
    whole.unet.half().save_pretrained(broken / "unet", variant="fp16")
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "watermarker/model.safetensors"):
        (broken / name).parent.mkdir(exist_ok=True)
        (broken / name).write_bytes(b"junk")

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("nobody/if", None)
        for path in broken.rglob("*"):
            relative = str(path.relative_to(broken))
            if path.is_file() and any(fnmatch(relative, pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "cache" / relative)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    components = load_components("nobody/if", "cpu", dtype, kind="IF")
    assert components.unet.dtype == dtype and components.name == "nobody/if"
    fetched = {str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*.*")}
    weights = {name for name in fetched if ".safetensors" in name or name.endswith(".bin")}
    assert weights and all((".fp16" in name) == (dtype == torch.float16) for name in weights)
    assert {name.split("/")[0] for name in weights} == {"text_encoder", "unet"}
    assert not any(name.endswith(".bin") for name in weights)


def test_other_stages_raise(broken: Path, tiny_if_model: Path, tiny_model: Path) -> None:
    """Other stages of IF are refused with one sentence."""
    from diffusers import UNet2DConditionModel

    with pytest.raises(UserError, match="is a StableDiffusionPipeline; only IFPipeline models can guide as IF"):
        load_components(tiny_model, "cpu", kind="IF")
    with pytest.raises(UserError, match="is a IFPipeline; only StableDiffusionPipeline models can guide as SD"):
        load_components(tiny_if_model, "cpu")
    config = UNet2DConditionModel.load_config(broken / "unet")
    UNet2DConditionModel.from_config(config | {"in_channels": 6}).save_pretrained(broken / "unet")
    with pytest.raises(UserError, match="maps 6 to 6 channels, but .* its later stages enlarge images"):
        load_components(broken, "cpu", kind="IF")
    UNet2DConditionModel.from_config(config | {"encoder_hid_dim": 40}).save_pretrained(broken / "unet")
    with pytest.raises(UserError, match="width 24 but its unet expects 40"):
        load_components(broken, "cpu", kind="IF")


def test_sentencepiece_missing(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SentencePiece tokenizer without its reader is refused with the package to install."""
    (broken / "tokenizer" / "tokenizer.json").rename(broken / "tokenizer" / "spiece.model")
    for missing in ("sentencepiece", "google.protobuf"):
        monkeypatch.setattr(checks, "_installed", lambda package, missing=missing: package != missing)
        with pytest.raises(UserError, match=r"whose package is missing: pip install 'dream-fast\[if\]'"):
            load_components(broken, "cpu", kind="IF")
    (broken / "tokenizer" / "spiece.model").unlink()
    with pytest.raises(UserError, match="lacks tokenizer/spiece.model"):
        load_components(broken, "cpu", kind="IF")


def test_package_lookup_without_import() -> None:
    """A package is found without importing it."""
    assert checks._installed("json") and not checks._installed("nobody_has.this") and not checks._installed("nobodys")


def test_the_command_optimises_by_if(tmp_path: Path, tiny_if_model: Path) -> None:
    from dream_fast.cli import main

    words = """--device cpu --iters 4 --log_every 1 --seed 7 --w 16 --h 16 --W 16 --H 16 --six_views --n_levels 3
        --log2_hashmap_size 10 --max_resolution 32 --hidden_width 16 --hidden_layers 1 --bound 0.6 --max_steps 48
        --occupancy_resolution 16 --dataset_size_valid 2 --save_guidance --save_guidance_interval 2""".split()
    workspace = tmp_path / "trial"
    assert (
        main(["--text", "a hamburger", "--IF", "--if_key", str(tiny_if_model), "--workspace", str(workspace), *words])
        == 0
    )
    rows = [json.loads(row) for row in (workspace / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["shaded"] * 4 and all(row["loss_guidance"] > 0 for row in rows)
    assert json.loads((workspace / "manifest.json").read_text())["model"] == str(tiny_if_model)
    assert Image.open(workspace / "guidance" / "step_000004.png").size == (3 * SIZE, SIZE)
    (last,) = (workspace / "checkpoints").iterdir()
    state = load_file(last)
    assert state and all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
