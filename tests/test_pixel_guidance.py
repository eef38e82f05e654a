"""IF: a model that works on pixels, loaded from disk as diffusers writes it, and what it makes of a picture."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dream_fast.engine.config import GuidanceConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance import loader
from dream_fast.engine.guidance.loader import Components, load_components
from dream_fast.engine.guidance.looking import guidance_pictures
from dream_fast.engine.guidance.prompts import PromptEmbeddings, encode
from dream_fast.engine.guidance.sampling import sample
from dream_fast.engine.guidance.sds import ScoreDistillation, resize

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
    assert (components.window, components.prediction_type, components.num_train_timesteps) == (77, "epsilon", 1000)
    # Keys and values of the prompt stand beside those of the picture: another attention would leave them out.
    processors = components.unet.attn_processors.values()
    assert processors and all(type(processor) is AttnAddedKVProcessor2_0 for processor in processors)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    cosine = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2  # the schedule of Nichol and Dhariwal 2021
    betas = (1 - cosine[1:] / cosine[:-1]).clamp(max=0.999)
    torch.testing.assert_close(components.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=1e-6)


def test_prompts_are_in_lower_case_and_their_padding_is_left_out(tiny_if_model: Path, components: Components) -> None:
    (embedded,) = encode(components, ["A Hamburger "])
    assert embedded.shape == (77, 24)
    ids = components.tokenizer(["a hamburger"], return_tensors="pt").input_ids
    assert ids.shape[1] < 20
    with torch.no_grad():
        alone = components.text_encoder(ids)[0][0]  # without padding
    torch.testing.assert_close(embedded[: len(alone)], alone, rtol=1e-4, atol=1e-5)
    prompts = PromptEmbeddings(load_components(tiny_if_model, "cpu", kind="IF"), "a hamburger")
    assert prompts.views.shape == (4, 77, 24) and prompts.negative.shape == (1, 77, 24)


def test_a_longer_prompt_is_cut_at_77_tokens_though_t5_reads_more(components: Components, caplog) -> None:
    prompts = PromptEmbeddings(components, "a hamburger " * 12, keep_text_encoder=True)
    assert prompts.views.shape[1] == 77
    assert "longer than the 77 tokens that the text encoder reads; left out: " in caplog.text


@pytest.mark.parametrize("side", [SIZE, 40])
def test_the_gradient_is_that_of_the_picture_with_the_first_three_channels_as_noise(
    components: Components, side: int
) -> None:
    rgb = torch.rand(2, 3, side, side, generator=generator(1)).requires_grad_()
    cond, uncond = torch.randn(2, 2, 77, 24, generator=generator(2))
    score = ScoreDistillation(components, GuidanceConfig(guidance_scale=20.0, lambda_guidance=3.0))
    result = score(rgb, cond, uncond, generator=generator(3))
    result.loss.backward()

    drawn = generator(3)
    t = score.timesteps(2, 0.0, drawn)
    noise = torch.randn(2, 3, SIZE, SIZE, generator=drawn)
    assert torch.equal(t, result.t)
    a = components.alphas_cumprod[t].view(-1, 1, 1, 1)
    picture = rgb.detach().requires_grad_()
    z = resize(picture, SIZE) * 2 - 1
    noisy = a.sqrt() * z + (1 - a).sqrt() * noise
    with torch.no_grad():
        both = [components.unet(noisy, t, encoder_hidden_states=prompt).sample for prompt in (uncond, cond)]
    assert both[0].shape[1] == 6
    uncond_noise, cond_noise = (out[:, :3] for out in both)
    wanted = 3 * (1 - a) * (uncond_noise + 20 * (cond_noise - uncond_noise) - noise)
    torch.testing.assert_close(result.gradient, wanted, rtol=1e-3, atol=1e-4)
    (expected,) = torch.autograd.grad(z, picture, wanted / 2)
    torch.testing.assert_close(rgb.grad, expected, rtol=1e-3, atol=1e-5)
    if side == SIZE:
        torch.testing.assert_close(expected, wanted)  # twice, for [-1, 1], over a batch of two


@pytest.mark.parametrize(
    "options", [{"score": "csd"}, {"score": "asd"}, {"score": "sdi", "inversion_steps": 2}, {"loss_space": "x0"}]
)
def test_every_score_guides_pixels(components: Components, options: dict) -> None:
    rgb = torch.rand(1, 3, 24, 24, generator=generator(1)).requires_grad_()
    cond, uncond = torch.randn(2, 1, 77, 24, generator=generator(2))
    config = GuidanceConfig(guidance_scale=7.5, **options)
    ScoreDistillation(components, config)(rgb, cond, uncond, generator=generator(3)).loss.backward()
    assert torch.isfinite(rgb.grad).all() and rgb.grad.abs().max() > 0


def test_perp_neg_of_a_batch_is_that_of_its_samples(components: Components) -> None:
    z, noise = torch.randn(2, 3, 3, SIZE, SIZE, generator=generator(1))
    cond, uncond = torch.randn(2, 3, 77, 24, generator=generator(2))
    others, weights = torch.randn(2, 77, 24, generator=generator(4)), torch.tensor([[-1.0, 0], [0, -2.0], [0, 0]])
    score, t = ScoreDistillation(components, GuidanceConfig(perpneg=True)), torch.tensor([100, 500, 900])
    scale = {"guidance_scale": torch.tensor(20.0)}
    whole, *_ = score._gradient(z, t, cond, uncond, scale, noise, others, weights)
    for i in range(3):
        row = slice(i, i + 1)
        one, *_ = score._gradient(z[row], t[row], cond[row], uncond[row], scale, noise[row], others, weights[row])
        torch.testing.assert_close(whole[row], one, rtol=1e-3, atol=1e-3)
    plain, *_ = score._gradient(z, t, cond, uncond, scale, noise)
    torch.testing.assert_close(whole[2], plain[2], rtol=1e-3, atol=1e-3)
    assert ((whole - plain).flatten(1).norm(dim=1)[:2] > 1e-2).all()


def test_latents_are_refused(components: Components) -> None:
    prompts = torch.zeros(1, 77, 24)
    with pytest.raises(ValueError, match="the model works on pixels"):
        ScoreDistillation(components, GuidanceConfig())(torch.zeros(1, 3, 16, 16), prompts, prompts, latents=True)


def test_it_paints_and_shows_what_it_sees_without_a_decoder(components: Components) -> None:
    cond, uncond = torch.randn(2, 2, 77, 24, generator=generator(2))
    images = sample(components, cond, uncond, steps=3, generator=generator())
    assert images.shape == (2, 3, SIZE, SIZE) and images.min() >= 0 and images.max() <= 1 and images.std() > 0.01
    z = torch.rand(2, 3, SIZE, SIZE, generator=generator()) * 2 - 1
    seen = guidance_pictures(components, (z + 1) / 2, z, z)
    torch.testing.assert_close(seen[:, 1], seen[:, 0])
    torch.testing.assert_close(seen[:, 2], seen[:, 0])


def test_half_precision_shards_load_under_the_names_that_the_libraries_write(tiny_if_model: Path, broken: Path) -> None:
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
def test_a_download_takes_one_set_of_weights(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The hub has each model in fp32 and in fp16, the text encoder in shards, and files that nobody needs."""
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


def test_what_is_no_first_stage_of_if_is_one_sentence(broken: Path, tiny_if_model: Path, tiny_model: Path) -> None:
    from diffusers import UNet2DConditionModel

    with pytest.raises(UserError, match="is a StableDiffusionPipeline; only IFPipeline models can guide as IF"):
        load_components(tiny_model, "cpu", kind="IF")
    with pytest.raises(UserError, match="is a IFPipeline; only StableDiffusionPipeline models can guide as SD"):
        load_components(tiny_if_model, "cpu")
    config = UNet2DConditionModel.load_config(broken / "unet")
    UNet2DConditionModel.from_config(config | {"in_channels": 6}).save_pretrained(broken / "unet")
    with pytest.raises(UserError, match="maps 6 to 6 channels, but .* its later stages enlarge pictures"):
        load_components(broken, "cpu", kind="IF")
    UNet2DConditionModel.from_config(config | {"encoder_hid_dim": 40}).save_pretrained(broken / "unet")
    with pytest.raises(UserError, match="width 24 but its unet expects 40"):
        load_components(broken, "cpu", kind="IF")


def test_a_tokenizer_of_sentencepiece_says_what_to_install(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (broken / "tokenizer" / "tokenizer.json").rename(broken / "tokenizer" / "spiece.model")
    for missing in ("sentencepiece", "google.protobuf"):
        monkeypatch.setattr(loader, "_installed", lambda package, missing=missing: package != missing)
        with pytest.raises(UserError, match=r"whose reader is missing: pip install 'dream-fast\[if\]'"):
            load_components(broken, "cpu", kind="IF")
    (broken / "tokenizer" / "spiece.model").unlink()
    with pytest.raises(UserError, match="lacks tokenizer/spiece.model"):
        load_components(broken, "cpu", kind="IF")


def test_a_package_is_looked_for_without_importing_it() -> None:
    assert loader._installed("json") and not loader._installed("nobody_has.this") and not loader._installed("nobodys")


def test_the_command_optimises_by_if(tmp_path: Path, tiny_if_model: Path) -> None:
    from dream_fast.cli import main

    words = """--device cpu --iters 4 --log_every 1 --seed 7 --w 16 --h 16 --W 16 --H 16 --six_views --levels 3
        --log2_entries 10 --max_resolution 32 --hidden_width 16 --hidden_layers 1 --bound 0.6 --max_steps 48
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
