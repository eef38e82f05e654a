"""Attention in diffusers' modules: the processor against diffusers' own, its modules, and the choice of operators."""

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
)
from torch import Tensor

from dream_fast.bench.accuracy import check
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.model import attention
from dream_fast.engine.guidance.model.attention import KINDS, OPERATORS, VAE_KINDS, AttentionChoice, Processor, Shape

PLAIN = dict(query_dim=16, heads=2, dim_head=8)


def module(**options: Any) -> Attention:
    """Random attention over 16 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = Attention(**PLAIN | options)
        for parameter in attention.parameters():
            torch.nn.init.normal_(parameter)  # norms too
    return attention.requires_grad_(False)


def check_processor(attention: Attention, rows: Tensor, **inputs: Tensor) -> None:
    """Compare the processor with that of diffusers, and with the same in fp64."""
    outputs = []
    for processor, dtype in (
        (Processor(OPERATORS["sdpa"]), torch.float32),
        (AttnProcessor(), torch.float32),
        (AttnProcessor(), torch.float64),
    ):
        attention = attention.to(dtype)
        attention.set_processor(processor)
        outputs.append(attention(rows.to(dtype), **{name: value.to(dtype) for name, value in inputs.items()}))
    check("output", *outputs)


@pytest.mark.parametrize("size", [(2, 5, 16), (2, 16, 3, 4)], ids=["tokens", "image"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_num_groups": 4},
        {"residual_connection": True},
        {"rescale_output_factor": 2.0, "norm_num_groups": 4, "residual_connection": True, "bias": True},
    ],
    ids=["plain", "norm", "residual", "all"],
)
def test_processor_equals_diffusers(size: tuple[int, ...], options: dict[str, Any]) -> None:
    """For tokens and images, norm, projections, residual and rescaled output equal diffusers' in fp64."""
    attention, rows = module(**options), torch.randn(size, generator=torch.Generator().manual_seed(1))
    check_processor(attention, rows)


def test_processor_cross_attention() -> None:
    """Keys and values may have another width and number than the queries."""
    attention = module(cross_attention_dim=12)
    rows, prompt = (torch.randn(size, generator=torch.Generator().manual_seed(1)) for size in ((2, 5, 16), (2, 7, 12)))
    check_processor(attention, rows, encoder_hidden_states=prompt)


@pytest.mark.parametrize(
    "options",
    [
        {"query_dim": 32, "spatial_norm_dim": 4},
        {"qk_norm": "layer_norm"},
        {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
        {"added_kv_proj_dim": 12},
    ],
    ids=["space", "queries", "prompt", "further"],
)
def test_set_attention_skips_unsupported(options: dict[str, Any]) -> None:
    """Modules with parts that the processor lacks are left alone."""
    made = module(**options)
    made.set_processor(AttnProcessor2_0())
    before = made.processor
    attention.set_attention(torch.nn.ModuleList([made]), OPERATORS["sdpa"])
    assert made.processor is before


def test_set_attention() -> None:
    """Modules with diffusers' usual processor or ours are replaced, and no others."""
    known = [module(processor=AttnProcessor2_0()), module(processor=Processor(OPERATORS["matmul"]))]
    keys, other = module(processor=AttnProcessor2_0()), module(processor=AttnProcessor())
    keys.norm_k = torch.nn.LayerNorm(8)
    attention.set_attention(torch.nn.ModuleList([keys, other, torch.nn.Linear(2, 2), *known]), OPERATORS["sdpa"])
    assert all(one.processor.attend is OPERATORS["sdpa"] for one in known)
    assert [type(one.processor) for one in (keys, other)] == [AttnProcessor2_0, AttnProcessor]


# Choosing


class Recorded:
    """Records the calls of a choice for a model; `fails`: shapes that fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: str = "cuda", fails: str = ""):
        like = SimpleNamespace(device=torch.device(device), dtype=torch.float16)
        self.unet, self.encoder = (SimpleNamespace(parameters=lambda: iter([like])) for _ in range(2))
        self.asked: list[tuple] = []
        self.operators: list[tuple] = []

        def record(name: str, answer: Any) -> None:
            def answered(*words: Any, **options: Any) -> Any:
                self.asked.append((name, *words, *options.values()))
                return answer(*words)

            monkeypatch.setattr(attention, name, answered)

        record("unet_shapes", lambda *words: "shapes of the UNet")
        record("encoder_shapes", lambda *words: "shapes of the encoder")
        record("fastest", lambda kinds, *words: kinds[-1])
        record(
            "unsupported_reason", lambda kind, shapes, *words: "no such kernel" if fails and fails in shapes else None
        )
        monkeypatch.setattr(attention, "set_attention", lambda *words: self.operators.append(words))

    def choose(self, wanted: str, previous: AttentionChoice | None = None) -> AttentionChoice:
        return attention.choose_attention(wanted, previous, self.unet, self.encoder, 64, 77)

    def model(self) -> list[tuple]:
        return [("unet_shapes", self.unet, 2, 64, 77), ("encoder_shapes", self.encoder, 1, 64)]


def test_auto_measures_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of the UNet without gradients and one of the encoder with them are measured."""
    model = Recorded(monkeypatch)
    assert model.choose("auto") == ("cudnn", "matmul")
    on = (torch.device("cuda"), torch.float16)
    unet, encoder = model.model()
    assert model.asked == [
        unet,
        ("fastest", KINDS, "shapes of the UNet", *on, False),
        encoder,
        ("fastest", VAE_KINDS, "shapes of the encoder", *on, True),
    ]
    assert model.operators == [(model.unet, OPERATORS["cudnn"]), (model.encoder, OPERATORS["matmul"])]


def test_sdpa_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own attention works everywhere, so it is neither measured nor tried."""
    for device, kind in (("cpu", "auto"), ("cuda", "sdpa")):
        model = Recorded(monkeypatch, device, fails="shapes")
        assert model.choose(kind) == ("sdpa", "sdpa") and model.asked == []
        assert model.operators == [(model.unet, OPERATORS["sdpa"]), (model.encoder, OPERATORS["sdpa"])]


@pytest.mark.parametrize(("fails", "chosen"), [("", ("xformers", "xformers")), ("encoder", ("xformers", "sdpa"))])
def test_named_tried_on_both(monkeypatch: pytest.MonkeyPatch, fails: str, chosen: tuple) -> None:
    """It is tried with the model's shapes, device and dtype; an encoder where it fails keeps torch's own."""
    model = Recorded(monkeypatch, fails=fails)
    assert model.choose("xformers") == chosen
    on = (torch.device("cuda"), torch.float16)
    unet, encoder = model.model()
    assert model.asked == [
        unet,
        ("unsupported_reason", "xformers", "shapes of the UNet", *on, False),
        encoder,
        ("unsupported_reason", "xformers", "shapes of the encoder", *on, True),
    ]
    assert model.operators == [(model.unet, OPERATORS[chosen[0]]), (model.encoder, OPERATORS[chosen[1]])]


@pytest.mark.parametrize(
    ("kind", "previous", "named"),
    [
        ("cudnn", None, "cudnn does not work"),
        ("auto", AttentionChoice("xformers", "matmul"), "xformers, which this run has used so far, does not work"),
    ],
)
def test_failing_operator_raises(monkeypatch, kind: str, previous: AttentionChoice | None, named: str) -> None:
    """The message has the operator, device, precision, reason and alternative; nothing is set."""
    model = Recorded(monkeypatch, fails="UNet")
    with pytest.raises(UserError) as caught:
        model.choose(kind, previous)
    assert str(caught.value) == (
        f"--attention {named} here, on cuda in float16 (no such kernel); --attention sdpa always does"
    )
    assert model.operators == []


# Trying


def test_unsupported_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors by which libraries refuse are reasons; errors of our code are raised."""
    shapes = Counter({Shape(1, 2, 2, 1, 4): 1})

    def raises(error: Exception) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            raise error

        monkeypatch.setitem(OPERATORS, "cudnn", attend)
        return attention.unsupported_reason("cudnn", shapes, torch.device("cpu"), torch.float32, gradient=False)

    for kind in attention.FAILURES:
        assert raises(kind("a head is too wide\nsee the manual")) == "a head is too wide"
    with pytest.raises(TypeError):
        raises(TypeError("an argument is missing"))
    assert attention.unsupported_reason("sdpa", shapes, torch.device("cpu"), torch.float32, gradient=True) is None


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_run_shapes_counts(monkeypatch, dtype: torch.dtype, gradient: bool) -> None:
    """Each shape runs once, then all as often as counted, with gradients if requested."""
    calls, backward = [], []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert k.shape == v.shape and q.dtype == k.dtype == v.dtype == dtype
        assert all(x.requires_grad is gradient for x in (q, k, v)) and torch.is_grad_enabled() is gradient
        assert q.float().std() > 0.1 and not torch.equal(k, v)
        calls.append((*q.shape, k.shape[1]))
        out = 1 * q + 0 * (k.sum() + v.sum())
        if gradient:
            out.register_hook(lambda upstream: backward.append(torch.equal(upstream, out)))
        return out

    monkeypatch.setitem(OPERATORS, "cudnn", attend)
    shapes = Counter({Shape(2, 6, 6, 3, 4): 3, Shape(2, 6, 5, 3, 4): 1})
    call = attention.run_shapes("cudnn", shapes, torch.device("cpu"), dtype, gradient)
    assert calls == [(2, 6, 3, 4, 6), (2, 6, 3, 4, 5)]
    calls.clear()
    assert call() is None
    assert calls == [(2, 6, 3, 4, 6)] * 3 + [(2, 6, 3, 4, 5)]
    assert backward == [True] * (6 if gradient else 0)


def test_run_shapes_hides_warnings(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings of kernels that do not support a shape are suppressed."""
    import warnings

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        warnings.warn("not this kernel", stacklevel=1)
        return q

    monkeypatch.setitem(OPERATORS, "cudnn", attend)
    shapes = Counter({Shape(1, 2, 2, 1, 4): 1})
    attention.run_shapes("cudnn", shapes, torch.device("cpu"), torch.float32, False)
    assert not recwarn.list


def test_operator_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers gets [rows, tokens, heads, width] unchanged, and cudnn allows only cuDNN's kernels."""
    from torch.nn.attention import SDPBackend

    strides = []
    stub = SimpleNamespace(memory_efficient_attention=lambda *inputs: strides.append(inputs) or "out")
    monkeypatch.setitem(sys.modules, "xformers.ops", stub)
    assert OPERATORS["xformers"]("q", "k", "v") == "out" and strides == [("q", "k", "v")]
    held = []

    class Held:
        def __init__(self, backend: SDPBackend):
            self.backend = backend

        def __enter__(self) -> None:
            held.append(self.backend)

        def __exit__(self, *error: object) -> None:
            held.append(None)

    monkeypatch.setattr(attention, "sdpa_kernel", Held)
    monkeypatch.setattr(attention, "_sdpa", lambda *inputs: held.append(inputs) or "out")
    assert OPERATORS["cudnn"]("q", "k", "v") == "out"
    assert held == [SDPBackend.CUDNN_ATTENTION, ("q", "k", "v"), None]
