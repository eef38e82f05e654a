"""The loader's steps: which files with which options, the facts of a model, and what it is prepared with, by device."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dream_fast.engine.config.model_names import SD_VERSIONS
from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.model import components as loader
from dream_fast.engine.guidance.model.attention import AttentionChoice
from dream_fast.engine.guidance.model.components import (
    CHANNELS_LAST,
    MIN_FUSED_IMAGE_SIZE,
    Components,
    choose_source,
    load_components,
    prepare_components,
)
from dream_fast.engine.guidance.noise import VariancePreserving

# Loading


def test_component_local_files_only(tmp_path: Path) -> None:
    """Nothing is fetched, weights are safetensors, and further options are passed on."""
    asked = []

    class Part:
        @classmethod
        def from_pretrained(cls, path: Path, **options: Any) -> Any:
            asked.append((path, options))
            return ("a part", {"missing_keys": set()}) if "output_loading_info" in options else "a part"

    assert loader._load(Part, tmp_path, "tokenizer", use_fast=True) == "a part"
    assert loader._load_model(Part, tmp_path, "unet", variant="fp16") == "a part"
    local = {"local_files_only": True}
    assert asked == [
        (tmp_path / "tokenizer", local | {"use_fast": True}),
        (tmp_path / "unet", local | {"use_safetensors": True, "output_loading_info": True, "variant": "fp16"}),
    ]


def test_component_raises(tmp_path: Path) -> None:
    """It names the component, the folder and the first line of the reason, or a weight that is missing."""

    def answering(answer: Callable[[], Any]) -> type:
        return type("Part", (), {"from_pretrained": classmethod(lambda cls, path, **options: answer())})

    def fails() -> None:
        raise ValueError("no such setting\nsee the manual")

    with pytest.raises(UserError) as caught:
        loader._load_model(answering(fails), tmp_path, "unet")
    assert str(caught.value) == f"the unet of the model {tmp_path} does not load: no such setting"
    incomplete = answering(lambda: ("a part", {"missing_keys": {"b.weight", "a.bias", "c.bias"}}))
    with pytest.raises(UserError) as caught:
        loader._load_model(incomplete, tmp_path, "vae")
    assert str(caught.value) == f"the vae of the model {tmp_path} lacks 3 of its weights, such as a.bias"


def test_options_passed_on(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To what finds the folder, to what checks it, and to what prepares the model; the defaults as well."""
    prepared, found, checked = [], [], []
    find, look = loader.find_folder, loader.check_folder

    def found_in(*words: Any, **options: Any) -> Any:
        found.append((words, options))
        return find(tiny_model, "SD", half=False)

    monkeypatch.setattr(loader, "find_folder", found_in)
    monkeypatch.setattr(loader, "check_folder", lambda *words: checked.append(words) or look(*words))
    monkeypatch.setattr(loader, "prepare_components", lambda *words, **options: prepared.append((words, options)))
    kept = AttentionChoice("cudnn", "matmul")
    plain = load_components("nobody/model", "cpu")
    given = dict(vram_O=True, attention="xformers", previous=kept, compiled=("unet",))
    address = "https://huggingface.co/nobody/model/tree/v2"
    other = load_components(address, "cpu", torch.float16, need_vae_decoder=True, **given)
    assert found == [(("nobody/model", "SD"), {"half": False}), ((address, "SD"), {"half": True})]
    assert checked == [(tiny_model, "SD", "nobody/model"), (tiny_model, "SD", "nobody/model@v2")]
    assert prepared == [((plain, 77), {}), ((other, 77), given)]
    assert (plain.name, plain.dtype, plain.device) == ("nobody/model", torch.float32, torch.device("cpu"))
    assert (other.name, other.dtype, other.t5, other.window) == (address, torch.float16, False, 77)
    assert plain.vae.decoder is plain.vae.post_quant_conv is None
    assert other.vae.decoder is not None and other.vae.post_quant_conv is not None
    for name in ("unet", "vae", "text_encoder"):
        assert getattr(plain, name).dtype == torch.float32 and getattr(other, name).dtype == torch.float16
    assert plain.process.alphas_cumprod.dtype == other.process.alphas_cumprod.dtype == torch.float32


def test_dream_mini_name() -> None:
    """Reports of a run do not hold the path of the package; a version is a name on the hub."""
    assert load_components(MODEL_FOLDER, "cpu").name == "dream-mini"
    assert choose_source() == MODEL_FOLDER and choose_source(hf_key="~/x") == "~/x"
    assert [choose_source(sd_version=version) for version in SD_VERSIONS] == list(SD_VERSIONS.values())


@pytest.mark.parametrize(("longest", "asked", "window"), [(77, 77, 77), (20, 77, 20), (77, 512, 77)])
def test_window(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, longest: int, asked: int, window: int) -> None:
    """The smaller of the two windows; attention is measured with the encoder's."""
    prepared, load = [], loader._load

    def shortened(cls: type, folder: Path, part: str, **options: Any) -> Any:
        got = load(cls, folder, part, **options)
        if part == "tokenizer":
            got.model_max_length = asked
        if part == "text_encoder":
            got[0].config.max_position_embeddings = longest
        return got

    monkeypatch.setattr(loader, "_load", shortened)
    monkeypatch.setattr(loader, "prepare_components", lambda components, tokens, **_: prepared.append(tokens))
    assert load_components(tiny_model, "cpu").window == window and prepared == [longest]


# Facts


def facts(unet: dict[str, Any], vae: dict[str, Any] | None, width: int = 32, **scheduler: Any) -> dict[str, Any]:
    """`_model_constants` of a model like Stable Diffusion, or like IF where ``vae`` is None, with these changes."""

    class Vae(SimpleNamespace):
        def get(self, name: str) -> Any:
            return getattr(self, name, None)

    channels = (3, 6) if vae is None else (4, 4)
    plain = dict(sample_size=64, in_channels=channels[0], out_channels=channels[1])
    plain |= dict(encoder_hid_dim=None, cross_attention_dim=32)
    settings = dict(latent_channels=4, block_out_channels=(1, 2, 3, 4), scaling_factor=0.5)
    schedule = SimpleNamespace(**dict(prediction_type="epsilon") | scheduler)
    return loader._model_constants(
        Path("model"),
        width,
        SimpleNamespace(**plain | unet),
        None if vae is None else Vae(**settings | vae),
        SimpleNamespace(config=schedule),
    )


def test_constants_of_latent_model() -> None:
    """Pictures are larger by 2 for each level of the VAE but the first; a missing shift is none."""
    plain = {
        "image_size": 512,
        "latent_size": 64,
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.0,
        "prediction_type": "epsilon",
    }
    assert facts({}, {}) == facts({"sample_size": [64, 64]}, {"shift_factor": None}) == plain
    got = facts({"sample_size": 24}, {"block_out_channels": (1, 2), "scaling_factor": 2, "shift_factor": 1})
    assert got == plain | {"image_size": 48, "latent_size": 24, "scaling_factor": 2.0, "shift_factor": 1.0}
    assert all(type(got[name]) is float for name in ("scaling_factor", "shift_factor"))
    assert facts({}, {}, prediction_type="v_prediction") == plain | {"prediction_type": "v_prediction"}


def test_constants_of_pixel_model() -> None:
    """Without a VAE latents are pictures, with or without a learned variance; the text may be projected first."""
    plain = facts({}, None)
    assert plain == facts({"out_channels": 3}, None) == facts({"encoder_hid_dim": 48}, None, width=48)
    assert (plain["image_size"], plain["latent_size"], plain["latent_channels"]) == (64, 64, 3)
    assert (plain["scaling_factor"], plain["shift_factor"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("unet", "vae", "more", "sentence"),
    [
        ({"sample_size": [8, 16]}, {}, {}, "the unet of the model model states no square sample_size ([8, 16])"),
        ({"sample_size": None}, {}, {}, "the unet of the model model states no square sample_size (None)"),
        ({"sample_size": (8.5, 8.5)}, {}, {}, "the unet of the model model states no square sample_size ((8.5, 8.5))"),
        ({"in_channels": 6}, None, {}, "the unet of the model model maps 6 to 6 channels, but that of the first stage"),
        (
            {"out_channels": 4},
            None,
            {},
            "the unet of the model model maps 3 to 4 channels, but that of the first stage",
        ),
        ({"in_channels": 9}, {}, {}, "the unet of the model model maps 9 to 4 channels but its vae has 4; inpainting"),
        ({"out_channels": 8}, {}, {}, "the unet of the model model maps 4 to 8 channels but its vae has 4; inpainting"),
        ({}, {}, {"width": 24}, "the text encoder of the model model has width 24 but its unet expects 32"),
        ({"encoder_hid_dim": 48}, {}, {}, "the text encoder of the model model has width 32 but its unet expects 48"),
        ({}, {}, {"prediction_type": "sample"}, "the model model predicts 'sample'; epsilon or v_prediction is needed"),
    ],
)
def test_mismatched_parts_raise(unet: dict, vae: dict | None, more: dict, sentence: str) -> None:
    """Each alone is enough, and both numbers are named."""
    with pytest.raises(UserError) as caught:
        facts(unet, vae, **more)
    assert str(caught.value).startswith(sentence)


# Preparing


class Model:
    """A model that records what is done with it."""

    def __init__(self, name: str, done: list, encoder: "Model | None" = None):
        self.name, self.done, self.encoder = name, done, encoder

    def requires_grad_(self, wanted: bool) -> "Model":
        self.done.append((self.name, "requires_grad_", wanted))
        return self

    def eval(self) -> "Model":
        self.done.append((self.name, "eval"))
        return self

    def to(self, device: torch.device) -> "Model":
        self.done.append((self.name, "to", device))
        return self

    def enable_slicing(self) -> None:
        self.done.append((self.name, "enable_slicing"))

    def compile(self, **options: Any) -> None:
        self.done.append((self.name, "compile", options))


READY = [("requires_grad_", False), ("eval",)]


class Prepared:
    """Prepares a model on a GPU that need not be there; `done` lists what happened after it was frozen and moved."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        device: str = "cuda",
        size: int = MIN_FUSED_IMAGE_SIZE,
        pixels: bool = False,
    ):
        self.device, self.size, self.pixels = torch.device(device), size, pixels
        self.broken: set[str] = set()
        self.calls: list[tuple] = []
        for name in ("to_channels_last", "fuse_group_norms", "fuse_residual_blocks", "enable_gradient_checkpointing"):
            monkeypatch.setattr(loader, name, lambda model, name=name: self.calls.append((model.name, name)))

        def choose(wanted: str, kept: AttentionChoice | None, **about: Any) -> AttentionChoice:
            self.calls.append(("attention", wanted, kept))
            assert about == dict(unet=self.unet, encoder=self.vae.encoder, size=8, tokens=77)
            if wanted in self.broken:
                raise UserError(f"{wanted} does not work")
            return AttentionChoice(wanted, wanted)

        monkeypatch.setattr(loader, "choose_attention", choose)

    def __call__(self, **options: Any) -> tuple[list[tuple], Components]:
        self.calls.clear()
        self.unet, text = Model("unet", self.calls), Model("text", self.calls)
        self.vae = None if self.pixels else Model("vae", self.calls, Model("encoder", self.calls))
        components = Components(
            name="a model", tokenizer=None, text_encoder=text, unet=self.unet, vae=self.vae, device=self.device,
            dtype=torch.float16, image_size=self.size, latent_size=8, latent_channels=4, scaling_factor=1.0,
            shift_factor=0.0, prediction_type="epsilon", process=VariancePreserving(torch.ones(1)),
        )  # fmt: skip
        prepare_components(components, 77, **options)
        ready = [
            (model.name, *step)
            for model in (text, self.unet, self.vae)
            if model is not None
            for step in (*READY, ("to", self.device))
        ]
        assert self.calls[: len(ready)] == ready
        return self.calls[len(ready) :], components


FUSED = ["to_channels_last", "fuse_group_norms", "fuse_residual_blocks"]
ALL_FUSED = [(model, step) for model in ("unet", "encoder") for step in FUSED]
AUTO = ("attention", "auto", None)


def test_a_large_model_on_a_gpu_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels last: UNet and encoder, from MIN_FUSED_IMAGE_SIZE pixels on; on a CPU nothing is."""
    assert CHANNELS_LAST == ("unet", "vae")
    assert Prepared(monkeypatch)()[0] == [*ALL_FUSED, AUTO]
    assert Prepared(monkeypatch, size=MIN_FUSED_IMAGE_SIZE - 1)()[0] == [AUTO]
    done, components = Prepared(monkeypatch, "cpu")()
    assert done == [AUTO] and components.attention == ("auto", "auto")


def test_channels_last_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU; and none where none is named."""
    assert Prepared(monkeypatch, "cpu")(channels_last=("vae",))[0] == [("encoder", FUSED[0]), AUTO]
    assert Prepared(monkeypatch, "cpu")(channels_last=("unet",))[0] == [("unet", FUSED[0]), AUTO]
    norms = [step for step in ALL_FUSED if step[1] != FUSED[0]]
    assert Prepared(monkeypatch)(channels_last=())[0] == [*norms, AUTO]


def test_pixel_model_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its UNet alone norms are fused; there is no encoder to slice or compile."""
    done, components = Prepared(monkeypatch, pixels=True)(vram_O=True, compiled=("unet", "vae"))
    assert done == [*[("unet", step) for step in FUSED], ("unet", "compile", {"dynamic": False})]
    assert components.attention == ("sdpa", "sdpa")


def test_attention_named_or_previous(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wanted and what an earlier part of the run had reach the choice."""
    kept = AttentionChoice("cudnn", "matmul")
    for options in ({}, {"vram_O": True}):
        for wanted, earlier in (("cudnn", None), ("auto", kept), ("sdpa", kept)):
            done, components = Prepared(monkeypatch, size=64)(attention=wanted, previous=earlier, **options)
            assert done[-1] == ("attention", wanted, earlier) and components.attention == (wanted, wanted)


def test_memory_efficient_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --vram_O: one picture at a time, blocks that are computed again, and xformers on a GPU, else torch's own."""
    frugal = [("vae", "enable_slicing"), ("encoder", "enable_gradient_checkpointing")]
    prepared = Prepared(monkeypatch, size=64)
    done, components = prepared(vram_O=True)
    assert done == [*frugal, ("attention", "xformers", None)] and components.attention == ("xformers", "xformers")
    prepared.broken = {"xformers"}
    done, components = prepared(vram_O=True)
    assert done == [*frugal, ("attention", "xformers", None), ("attention", "sdpa", None)]
    assert components.attention == ("sdpa", "sdpa")
    assert Prepared(monkeypatch, "cpu")(vram_O=True)[0] == [*frugal, AUTO]


@pytest.mark.parametrize(
    ("compiled", "vram_O", "models"),
    [
        ((), False, []),
        (("unet",), False, ["unet"]),
        (("vae",), False, ["encoder"]),
        (("unet", "vae"), False, ["unet", "encoder"]),
        (("unet", "vae"), True, ["unet"]),
    ],
)
def test_what_is_named_is_compiled(monkeypatch, compiled: tuple[str, ...], vram_O: bool, models: list[str]) -> None:
    """For the shapes of the run alone; not an encoder whose blocks are computed again."""
    done, _ = Prepared(monkeypatch, size=64)(compiled=compiled, vram_O=vram_O)
    assert [step for step in done if "compile" in step] == [(name, "compile", {"dynamic": False}) for name in models]


def test_compile_without_gpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, and nothing is moved."""
    prepared = Prepared(monkeypatch, "cpu")
    with pytest.raises(UserError, match="^--compile needs a GPU: on a CPU it gains nothing; leave it out$"):
        prepared(compiled=("vae",))
    assert prepared.calls == []


def test_a_text_encoder_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory goes back to a GPU."""
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    for device, times in (("cpu", 0), ("cuda", 1)):
        _, components = Prepared(monkeypatch, device, size=64)()
        components.free_text_encoder()
        assert components.text_encoder is None and len(emptied) == times


def test_to_channels_last() -> None:
    """The first input of a call is turned, whatever else it is called with; values are the same."""
    seen = []

    class Layer(torch.nn.Conv2d):
        def forward(self, picture: torch.Tensor, *more: Any) -> torch.Tensor:
            seen.append((picture.stride(), more))
            return super().forward(picture)

    layer, picture = Layer(3, 2, 3), torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loader.to_channels_last(layer)
    layer(picture, "a level", "a prompt")
    layer(picture)
    assert seen == [((192, 1, 24, 3), ("a level", "a prompt")), ((192, 1, 24, 3), ())]
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_gradient_checkpointing_rng(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it would end the capture of a CUDA graph; blocks of diffusers and fused ones, and no other module."""
    from diffusers.models.resnet import ResnetBlock2D

    from dream_fast.engine.guidance.model.fused_blocks import ResidualBlock

    asked = []
    monkeypatch.setattr(
        loader, "checkpoint", lambda forward, *words, **options: asked.append((words, options)) or forward(*words)
    )
    block = ResnetBlock2D(in_channels=8, groups=2, temb_channels=None)
    fused = ResidualBlock(ResnetBlock2D(in_channels=8, groups=2, temb_channels=None))
    encoder = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), block, torch.nn.Sequential(fused))
    loader.enable_gradient_checkpointing(encoder)
    picture = torch.ones(1, 8, 2, 2)
    block(picture, None)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    ((words, named),) = asked
    assert words[0] is picture and named == options
    assert fused.forward.keywords == options and not hasattr(encoder[0].forward, "keywords")
