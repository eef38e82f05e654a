"""The steps of the loader: files and options, constants of a model, and its preparation by device."""

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
    """Nothing is downloaded, weights are safetensors, and options are passed on."""
    calls = []

    class Part:
        @classmethod
        def from_pretrained(cls, path: Path, **options: Any) -> Any:
            calls.append((path, options))
            return ("a part", {"missing_keys": set()}) if "output_loading_info" in options else "a part"

    assert loader._load(Part, tmp_path, "tokenizer", use_fast=True) == "a part"
    assert loader._load_model(Part, tmp_path, "unet", variant="fp16") == "a part"
    local = {"local_files_only": True}
    assert calls == [
        (tmp_path / "tokenizer", local | {"use_fast": True}),
        (tmp_path / "unet", local | {"use_safetensors": True, "output_loading_info": True, "variant": "fp16"}),
    ]


def test_component_raises(tmp_path: Path) -> None:
    """The message has the component, the folder and the first line of the reason, or a missing weight."""

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
    """Options reach the search for the folder, its check, and the preparation of the model."""
    prepared, folders, checked = [], [], []
    find, check = loader.find_folder, loader.check_folder

    def found_in(*words: Any, **options: Any) -> Any:
        folders.append((words, options))
        return find(tiny_model, "SD", half=False)

    monkeypatch.setattr(loader, "find_folder", found_in)
    monkeypatch.setattr(loader, "check_folder", lambda *words: checked.append(words) or check(*words))
    monkeypatch.setattr(loader, "prepare_components", lambda *words, **options: prepared.append((words, options)))
    choice = AttentionChoice("cudnn", "matmul")
    plain = load_components("nobody/model", "cpu")
    given = dict(vram_O=True, attention="xformers", previous=choice, compiled=("unet",))
    address = "https://huggingface.co/nobody/model/tree/v2"
    other = load_components(address, "cpu", torch.float16, need_vae_decoder=True, **given)
    assert folders == [(("nobody/model", "SD"), {"half": False}), ((address, "SD"), {"half": True})]
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
    """dream-mini has its name instead of a path; a version is a name on the hub."""
    assert load_components(MODEL_FOLDER, "cpu").name == "dream-mini"
    assert choose_source() == MODEL_FOLDER and choose_source(hf_key="~/x") == "~/x"
    assert [choose_source(sd_version=version) for version in SD_VERSIONS] == list(SD_VERSIONS.values())


@pytest.mark.parametrize(("longest", "limit", "window"), [(77, 77, 77), (20, 77, 20), (77, 512, 77)])
def test_window(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, longest: int, limit: int, window: int) -> None:
    """The smaller of two windows is used; attention is measured with that of the encoder."""
    prepared, load = [], loader._load

    def shortened(cls: type, folder: Path, part: str, **options: Any) -> Any:
        got = load(cls, folder, part, **options)
        if part == "tokenizer":
            got.model_max_length = limit
        if part == "text_encoder":
            got[0].config.max_position_embeddings = longest
        return got

    monkeypatch.setattr(loader, "_load", shortened)
    monkeypatch.setattr(loader, "prepare_components", lambda components, tokens, **_: prepared.append(tokens))
    assert load_components(tiny_model, "cpu").window == window and prepared == [longest]


# Facts


def facts(unet: dict[str, Any], vae: dict[str, Any] | None, width: int = 32, **scheduler: Any) -> dict[str, Any]:
    """`_model_constants` of a model like Stable Diffusion, or like IF where `vae` is None, with these changes."""

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
    """Each level of the VAE but the first doubles the image; a missing shift is 0."""
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
    """Without a VAE latents are images, with or without a learned variance; the text may be projected."""
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
    """Each mismatch is refused with both numbers."""
    with pytest.raises(UserError) as caught:
        facts(unet, vae, **more)
    assert str(caught.value).startswith(sentence)


# Preparing


class Model:
    """A model that records its calls."""

    def __init__(self, name: str, calls: list, encoder: "Model | None" = None):
        self.name, self.done, self.encoder = name, calls, encoder

    def requires_grad_(self, flag: bool) -> "Model":
        self.done.append((self.name, "requires_grad_", flag))
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
    """Prepare a model on a substitute for a GPU; returns the calls after it was frozen and moved."""

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

        def choose(kind: str, previous: AttentionChoice | None, **about: Any) -> AttentionChoice:
            self.calls.append(("attention", kind, previous))
            assert about == dict(unet=self.unet, encoder=self.vae.encoder, size=8, tokens=77)
            if kind in self.broken:
                raise UserError(f"{kind} does not work")
            return AttentionChoice(kind, kind)

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


def test_prepare_large_model_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From MIN_FUSED_IMAGE_SIZE pixels on UNet and encoder are fused and channels last, on a GPU only."""
    assert CHANNELS_LAST == ("unet", "vae")
    assert Prepared(monkeypatch)()[0] == [*ALL_FUSED, AUTO]
    assert Prepared(monkeypatch, size=MIN_FUSED_IMAGE_SIZE - 1)()[0] == [AUTO]
    calls, components = Prepared(monkeypatch, "cpu")()
    assert calls == [AUTO] and components.attention == ("auto", "auto")


def test_channels_last_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named modules are channels last, also on a CPU."""
    assert Prepared(monkeypatch, "cpu")(channels_last=("vae",))[0] == [("encoder", FUSED[0]), AUTO]
    assert Prepared(monkeypatch, "cpu")(channels_last=("unet",))[0] == [("unet", FUSED[0]), AUTO]
    norms = [step for step in ALL_FUSED if step[1] != FUSED[0]]
    assert Prepared(monkeypatch)(channels_last=())[0] == [*norms, AUTO]


def test_pixel_model_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the norms of its UNet are fused; there is no encoder to slice or compile."""
    calls, components = Prepared(monkeypatch, pixels=True)(vram_O=True, compiled=("unet", "vae"))
    assert calls == [*[("unet", step) for step in FUSED], ("unet", "compile", {"dynamic": False})]
    assert components.attention == ("sdpa", "sdpa")


def test_attention_named_or_previous(monkeypatch: pytest.MonkeyPatch) -> None:
    """The named operator and the previous choice are passed on."""
    choice = AttentionChoice("cudnn", "matmul")
    for options in ({}, {"vram_O": True}):
        for kind, earlier in (("cudnn", None), ("auto", choice), ("sdpa", choice)):
            calls, components = Prepared(monkeypatch, size=64)(attention=kind, previous=earlier, **options)
            assert calls[-1] == ("attention", kind, earlier) and components.attention == (kind, kind)


def test_memory_efficient_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """--vram_O slices, recomputes blocks, and uses xformers on a GPU where it works."""
    frugal = [("vae", "enable_slicing"), ("encoder", "enable_gradient_checkpointing")]
    prepared = Prepared(monkeypatch, size=64)
    calls, components = prepared(vram_O=True)
    assert calls == [*frugal, ("attention", "xformers", None)] and components.attention == ("xformers", "xformers")
    prepared.broken = {"xformers"}
    calls, components = prepared(vram_O=True)
    assert calls == [*frugal, ("attention", "xformers", None), ("attention", "sdpa", None)]
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
def test_prepare_compiled_modules(monkeypatch, compiled: tuple[str, ...], vram_O: bool, models: list[str]) -> None:
    """Named modules are compiled for static shapes, except an encoder that recomputes blocks."""
    calls, _ = Prepared(monkeypatch, size=64)(compiled=compiled, vram_O=vram_O)
    assert [step for step in calls if "compile" in step] == [(name, "compile", {"dynamic": False}) for name in models]


def test_compile_without_gpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused with one sentence, and nothing is moved."""
    prepared = Prepared(monkeypatch, "cpu")
    with pytest.raises(UserError, match="^--compile needs a GPU: it has no benefit on a CPU; leave it out$"):
        prepared(compiled=("vae",))
    assert prepared.calls == []


def test_free_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is freed on a GPU."""
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    for device, times in (("cpu", 0), ("cuda", 1)):
        _, components = Prepared(monkeypatch, device, size=64)()
        components.free_text_encoder()
        assert components.text_encoder is None and len(emptied) == times


def test_to_channels_last() -> None:
    """The first input of a call is converted, whatever the others are; values stay the same."""
    inputs = []

    class Layer(torch.nn.Conv2d):
        def forward(self, image: torch.Tensor, *more: Any) -> torch.Tensor:
            inputs.append((image.stride(), more))
            return super().forward(image)

    layer, image = Layer(3, 2, 3), torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loader.to_channels_last(layer)
    layer(image, "a level", "a prompt")
    layer(image)
    assert inputs == [((192, 1, 24, 3), ("a level", "a prompt")), ((192, 1, 24, 3), ())]
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_gradient_checkpointing_rng(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random state is not read, which would end a capture; only residual blocks are recomputed."""
    from diffusers.models.resnet import ResnetBlock2D

    from dream_fast.engine.guidance.model.fused_blocks import ResidualBlock

    calls = []
    monkeypatch.setattr(
        loader, "checkpoint", lambda forward, *words, **options: calls.append((words, options)) or forward(*words)
    )
    block = ResnetBlock2D(in_channels=8, groups=2, temb_channels=None)
    fused = ResidualBlock(ResnetBlock2D(in_channels=8, groups=2, temb_channels=None))
    encoder = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), block, torch.nn.Sequential(fused))
    loader.enable_gradient_checkpointing(encoder)
    image = torch.ones(1, 8, 2, 2)
    block(image, None)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    ((words, named),) = calls
    assert words[0] is image and named == options
    assert fused.forward.keywords == options and not hasattr(encoder[0].forward, "keywords")
