"""Attention in the image model: every operator against diffusers' own, and the choice of one."""

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dream_fast.bench.accuracy import check
from dream_fast.bench.pipeline.random_sd import in_dtype
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.model import attention
from dream_fast.engine.guidance.model.attention import (
    OPERATORS,
    AttentionChoice,
    Shape,
    choose_attention,
    set_attention,
)
from dream_fast.engine.guidance.model.components import Components, load_components, prepare_components
from dream_fast.engine.runtime.cuda_graph import warm_up

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def no_xformers(dtype: torch.dtype) -> str | None:
    """Return the reason why xformers does not work here, or None."""
    return attention.unsupported_reason(
        "xformers", {Shape(1, 16, 16, 2, 16): 1}, torch.device(DEVICE), dtype, gradient=True
    )


@pytest.fixture
def xformers_of_torch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A substitute for xformers that computes with torch. Returns the shapes of its calls."""
    calls = []

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(tuple(q.shape))
        scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v)

    stub = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers.ops", stub)
    return calls


def draws(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes]


NAMES = ("prediction", "latents", "gradient")


def outputs(components: Components) -> list[Tensor]:
    """The prediction of the UNet, the latents of an image, and their gradient in the image."""
    noisy, prompt, image = (part.to(components.dtype) for part in draws((2, 4, 8, 8), (2, 5, 32), (1, 3, 32, 32)))
    with torch.no_grad():
        predicted = components.unet(noisy, torch.tensor([3, 500], device=DEVICE), prompt).sample
    latents = components.vae.encode(image.requires_grad_()).latent_dist.mean
    (gradient,) = torch.autograd.grad(latents.square().sum(), image)
    return [predicted, latents.detach(), gradient]


@pytest.mark.parametrize("kind", ["sdpa", "xformers", "matmul"])
def test_against_diffusers_processors(kind: str, tiny_model: Path, xformers_of_torch: list) -> None:
    """The model computes the same as with diffusers' processors."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    components = load_components(tiny_model, DEVICE, attention="sdpa")
    set_attention(components.unet, OPERATORS[kind])
    set_attention(components.vae.encoder, OPERATORS[kind])
    got = outputs(components)
    assert bool(xformers_of_torch) == (kind == "xformers")
    replaced = 0
    for model in (components.unet, components.vae.encoder):
        for module in model.modules():
            if isinstance(module, Attention):
                replaced += isinstance(module.processor, attention.Processor)
                module.set_processor(AttnProcessor2_0())
    assert replaced == 9  # self and cross in four blocks of the UNet, and the encoder's own
    exact = outputs(in_dtype(components, torch.float64))
    for name, *results in zip(NAMES, got, outputs(components), exact, strict=True):
        check(name, *results)


def test_channels_last(tiny_model: Path) -> None:
    """Channels last gives the same result and is kept."""
    results, strides, images = [], [], []
    for layout in ((), ("unet", "vae")):
        components = load_components(tiny_model, DEVICE, attention="sdpa")
        prepare_components(components, 77, attention="sdpa", channels_last=layout)
        attn = components.vae.encoder.mid_block.attentions[0]
        attn.register_forward_hook(lambda module, inputs, out: strides.append(out.stride()))
        first = components.vae.encoder.conv_in
        first.register_forward_pre_hook(lambda module, inputs: images.append(inputs[0].stride()[1:]))
        results.append(outputs(components))
    exact = outputs(in_dtype(load_components(tiny_model, DEVICE, attention="sdpa"), torch.float64))
    for name, plain, channels_last, true in zip(NAMES, *results, exact, strict=True):
        check(name, channels_last, plain, true)
    assert strides == [(2048, 64, 8, 1), (2048, 1, 256, 32)]  # no copy between the blocks around the attention
    assert images == [(1024, 32, 1), (1, 96, 3)]  # nor of the gradient behind the first convolution


def attend(kind: str, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = OPERATORS[kind](*leaves)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def exact(inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return attend("sdpa", [x.double() for x in inputs], upstream.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_matmul_attention(dtype: torch.dtype) -> None:
    """The error is at most twice that of the formula in the same dtype, against fp64."""
    q, k, v, upstream = draws((2, 37, 3, 48), (2, 21, 3, 48), (2, 21, 3, 40), (2, 37, 3, 40), dtype=dtype)
    inputs = [4 * q, k, v]
    leaves = [x.detach().requires_grad_() for x in inputs]
    scores = torch.einsum("bmhd,bnhd->bhmn", *leaves[:2]) * 48**-0.5
    out = torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), leaves[2])
    reference = [out, *torch.autograd.grad(out, leaves, upstream)]
    got = attend("matmul", inputs, upstream)
    for name, result, expected, true in zip(
        ("out", "q", "k", "v"), got, reference, exact(inputs, upstream), strict=True
    ):
        assert result.dtype == dtype
        check(name, result, expected, true)


def test_matmul_small_weights() -> None:
    """4096 keys of about equal weight: the gradients of their scores, about 3e-6, are subnormal in fp16."""
    q, k, v, upstream = draws((1, 4, 1, 32), (1, 4096, 1, 32), (1, 4096, 1, 32), (1, 4, 1, 32), dtype=torch.float16)
    inputs = [0.1 * q, k, v]
    upstream = 2.0**-7 * upstream
    _, got, *_ = attend("matmul", inputs, upstream)
    _, true, *_ = exact(inputs, upstream)
    _, longer, *_ = attend("matmul", inputs, 2.0**10 * upstream)  # with nothing below fp16's range
    check("q", got, longer / 2.0**10, true)


def test_gradcheck() -> None:
    leaves = [x.cpu().requires_grad_() for x in draws((1, 3, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4), dtype=torch.float64)]
    assert torch.autograd.gradcheck(OPERATORS["matmul"], leaves)


def test_unet_shapes(tiny_model: Path) -> None:
    """Shapes are those of the model's calls."""
    components = load_components(tiny_model, DEVICE, attention="sdpa")
    counts = attention.unet_shapes(components.unet, 2, 8, 77)
    assert counts == {Shape(2, 16, 16, 2, 16): 4, Shape(2, 16, 77, 2, 16): 4}
    assert attention.encoder_shapes(components.vae.encoder, 1, 8) == {Shape(1, 64, 64, 1, 32): 1}
    assert outputs(components)[0].abs().max() > 0  # what only looked is gone


def test_masks_are_refused(tiny_model: Path) -> None:
    components = load_components(tiny_model, DEVICE, attention="sdpa")
    noisy, prompt = draws((2, 4, 8, 8), (2, 5, 32))
    with pytest.raises(ValueError, match="attends to all tokens"):
        mask = torch.ones(2, 5, device=DEVICE)
        components.unet(noisy, 3, prompt, encoder_attention_mask=mask)


# Choosing


@pytest.fixture
def choose(tiny_model: Path):
    components = load_components(tiny_model, "cpu", attention="sdpa")

    def choice(kind: str, previous: AttentionChoice | None = None) -> AttentionChoice:
        return choose_attention(kind, previous, components.unet, components.vae.encoder, 8, 77)

    return choice


def test_cpu_takes_sdpa(choose) -> None:
    """A CPU uses torch's own attention."""
    assert choose("auto") == choose("sdpa") == ("sdpa", "sdpa")
    assert str(choose("auto")) == "sdpa" and str(AttentionChoice("cudnn", "matmul")) == "cudnn, in the VAE matmul"


@pytest.mark.parametrize("kind", ["xformers", "cudnn"])
def test_named_unsupported_raises(kind: str, choose) -> None:
    """A named operator that does not work is refused with one sentence."""
    with pytest.raises(UserError, match=rf"--attention {kind} does not work here, on cpu in float32 \(.+\)") as refused:
        choose(kind)
    assert "\n" not in str(refused.value) and str(refused.value).endswith("--attention sdpa always does")


def test_little_work_takes_sdpa() -> None:
    """Little attention is not measured."""
    small = Counter({Shape(2, 256, 256, 4, 32): 6, Shape(2, 256, 24, 4, 32): 6})  # the embedded model's
    kinds = ("cudnn", "xformers")  # neither of which would work here
    assert attention.fastest(kinds, small, torch.device("cpu"), torch.float32, gradient=False) == "sdpa"


def test_named_for_both(choose, xformers_of_torch: list) -> None:
    """A named operator that works is used for both."""
    assert choose("xformers") == ("xformers", "xformers")
    assert set(xformers_of_torch) == {(2, 16, 2, 16), (1, 64, 1, 32)}


def test_encoder_falls_back(choose, monkeypatch) -> None:
    """The encoder uses sdpa where the named operator does not work."""

    def narrow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[-1] > 16:
            raise NotImplementedError("no operator for heads wider than 16")
        return q

    monkeypatch.setitem(OPERATORS, "cudnn", narrow)
    assert choose("cudnn") == ("cudnn", "sdpa")


def test_previous_choice(choose, xformers_of_torch: list) -> None:
    """A resumed run keeps its choice unless another is named."""
    assert choose("auto", AttentionChoice("xformers", "matmul")) == ("xformers", "matmul")
    assert choose("sdpa", AttentionChoice("xformers", "matmul")) == ("sdpa", "sdpa")


def test_previous_unsupported_raises(choose, monkeypatch) -> None:
    """A previous choice that no longer works is refused with one sentence."""
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match="xformers, which this run has used so far, does not work here"):
        choose("auto", AttentionChoice("xformers", "xformers"))


# On a GPU


needs_gpu = pytest.mark.skipif(not GPU, reason="kernels of a GPU, and their CUDA graphs")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["xformers", "cudnn", "matmul"])
def test_graph_replay(kind: str) -> None:
    """Shapes of Stable Diffusion's UNet and VAE in fp16, against fp64."""
    if kind == "xformers" and (reason := no_xformers(torch.float16)):
        pytest.skip(f"xformers does not compute here: {reason}")  # its build decides, and a user is told the same
    shape = Shape(1, 1024, 1024, 1, 512) if kind == "matmul" else Shape(2, 1024, 77, 5, 64)
    sizes = [(shape.rows, tokens, shape.heads, shape.width) for tokens in (shape.queries, shape.keys, shape.keys)]
    sizes.append(sizes[0])
    *inputs, upstream = draws(*sizes, dtype=torch.float16)
    places = [x.clone().requires_grad_() for x in inputs]

    def call() -> list[Tensor]:
        out = OPERATORS[kind](*places)
        return [out.detach(), *torch.autograd.grad(out, places, upstream)]

    warm_up(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for factor in (1.0, -0.5):
        fresh = [factor * x for x in inputs]
        with torch.no_grad():
            torch._foreach_copy_(places, fresh)
        graph.replay()
        reference, true = attend("sdpa", fresh, upstream), exact(fresh, upstream)
        for name, result, plain, expected in zip(("out", "q", "k", "v"), results, reference, true, strict=True):
            check(name, result, plain, expected)


@pytest.mark.gpu
@needs_gpu
def test_fastest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """At Stable Diffusion's shapes."""

    def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError("no operator for this")

    monkeypatch.setitem(OPERATORS, "cudnn", refuses)
    device, half = torch.device("cuda", 0), torch.float16
    unet = Counter({Shape(2, 4096, 4096, 5, 64): 5, Shape(2, 4096, 77, 5, 64): 5})
    encoder = Counter({Shape(1, 4096, 4096, 1, 512): 1})
    assert attention.fastest(attention.KINDS, unet, device, half, gradient=False) in ("sdpa", "xformers")
    assert attention.fastest(("cudnn", "matmul"), encoder, device, half, gradient=True) == "matmul"


@pytest.mark.gpu
@needs_gpu
def test_auto_on_gpu(tiny_model: Path) -> None:
    """auto chooses an operator that works, and each choice can be captured in a graph."""
    from dream_fast.engine.config.sections import GuidanceConfig
    from dream_fast.engine.guidance.sds import ScoreDistillation

    kinds = ["auto", "sdpa", "cudnn"] + ["xformers"] * (no_xformers(torch.float16) is None)
    gradients = {}
    for kind in kinds:
        components = load_components(tiny_model, "cuda", torch.float16, attention=kind)
        assert components.attention.unet in attention.KINDS and components.attention.vae in attention.VAE_KINDS
        assert kind in ("auto", components.attention.unet)
        cond, uncond, image = draws((1, 77, 32), (1, 77, 32), (1, 3, 32, 32))
        score = ScoreDistillation(components, GuidanceConfig(guidance_scale=10.0))
        for seed in (0, 1):  # the second replays
            image = image.detach().requires_grad_()
            score(image, cond, uncond, StepInputs(generator=torch.Generator("cuda").manual_seed(seed))).loss.backward()
        gradients[kind] = image.grad
    exact = in_dtype(load_components(tiny_model, "cuda", torch.float32, attention="sdpa"), torch.float64)
    score = ScoreDistillation(exact, GuidanceConfig(guidance_scale=10.0), cuda_graphs=False)
    image = image.detach().requires_grad_()
    cond, uncond = cond.double(), uncond.double()
    score(image, cond, uncond, StepInputs(generator=torch.Generator("cuda").manual_seed(1))).loss.backward()
    for kind in kinds:
        check(kind, gradients[kind], gradients["sdpa"], image.grad.double())


@pytest.mark.gpu
@needs_gpu
def test_xformers_half_only(tiny_model: Path) -> None:
    """xformers is used where only its half-precision operators load."""
    if reason := no_xformers(torch.float16):
        pytest.skip(f"xformers does not compute here: {reason}")  # its build decides, and a user is told the same
    components = load_components(tiny_model, "cuda", torch.float16, attention="xformers")
    assert components.attention.unet == "xformers"
    noisy, prompt = draws((2, 4, 8, 8), (2, 5, 32), dtype=torch.float16)
    with torch.no_grad():
        got = components.unet(noisy, torch.tensor([3, 500], device="cuda"), prompt).sample
        set_attention(components.unet, OPERATORS["sdpa"])
        expected = components.unet(noisy, torch.tensor([3, 500], device="cuda"), prompt).sample
        precise = in_dtype(components, torch.float64).unet
        exact = precise(noisy.double(), torch.tensor([3, 500], device="cuda"), prompt.double()).sample
    check("prediction", got, expected, exact)
