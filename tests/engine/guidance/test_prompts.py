"""Prompts: view weights, embeddings, and words that do not fit."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dream_fast.bench.accuracy import check, error
from dream_fast.engine.guidance.model.components import Components, load_components
from dream_fast.engine.guidance.prompts import VIEWS, PromptEmbeddings, ViewAngles, view_weights


@pytest.fixture
def components(tiny_model: Path) -> Components:
    return load_components(tiny_model, "cpu")


@pytest.mark.parametrize(
    ("azimuth", "polar", "weights"),
    [
        (0, 90, [1, 0, 0, 0]),
        (45, 90, [0.5, 0.5, 0, 0]),
        (-45, 90, [0.5, 0.5, 0, 0]),
        (90, 90, [0, 1, 0, 0]),
        (-90, 90, [0, 1, 0, 0]),
        (112.5, 60, [0, 0.75, 0.25, 0]),
        (180, 90, [0, 0, 1, 0]),
        (-180, 90, [0, 0, 1, 0]),
        (270, 90, [0, 1, 0, 0]),  # turned once around
        (-337.5, 90, [0.75, 0.25, 0, 0]),
        (180, 30, [0, 0, 0, 1]),  # overhead, its limit included
        (180, 30.5, [0, 0, 1, 0]),
        (20, 0, [0, 0, 0, 1]),
    ],
)
def test_weights_of_the_views(azimuth: float, polar: float, weights: list[float]) -> None:
    got = view_weights(torch.tensor([float(azimuth)]), torch.tensor([float(polar)]), ViewAngles(30.0))
    assert torch.equal(got, torch.tensor([weights], dtype=torch.float32))  # quarters of the half turn are exact


def test_view_weights_linear() -> None:
    """In the front half front weighs r = 1 - |azimuth| / 90 and side the rest; behind, side and back."""
    azimuth = torch.linspace(-180, 180, 501)[:-1]

    def expected(dtype: torch.dtype) -> torch.Tensor:
        r = 1 - azimuth.to(dtype).abs() / 90
        return torch.stack([r.clamp(min=0), 1 - r.abs(), (-r).clamp(min=0), 0 * r], dim=1)

    got = view_weights(azimuth, torch.full_like(azimuth, 90.0), ViewAngles(30.0))
    check("weights", got, expected(torch.float32), expected(torch.float64))


def test_view_weights_blend() -> None:
    """Views may be blended over fewer degrees."""
    azimuth = torch.tensor([0.0, 34.0, -40.0, 45.0, 50.0, 56.0, 124.0, -135.0, 146.0])
    front, side, back, overhead = view_weights(azimuth, torch.full((9,), 90.0), ViewAngles(30.0, 20.0)).T
    assert front.tolist() == [1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0]
    assert back.tolist() == [0, 0, 0, 0, 0, 0, 0, 0.5, 1]
    assert torch.equal(front + side + back, torch.ones(9))
    assert not overhead.any()


def names_of(azimuth: list[float], polar: float, angle_front: float) -> list[str]:
    """The view of each camera without blending."""
    weights = view_weights(
        torch.tensor(azimuth), torch.full((len(azimuth),), polar), ViewAngles(30.0, 20.0, angle_front)
    )
    assert weights.shape == (len(azimuth), 4) and weights.dtype == torch.float32
    assert torch.equal(weights.sum(dim=-1), torch.ones(len(azimuth))) and ((weights == 0) | (weights == 1)).all()
    return [VIEWS[index] for index in weights.argmax(dim=-1).tolist()]


def test_view_weights_front_angle() -> None:
    """With a front angle a camera has a single view."""
    front, side, back = [0.0, 30.0, -30.0, 360.0, 335.0], [30.5, -30.5, 90.0, 149.5, -149.5], [150.0, -150.0, 180, 200]
    names = ["front"] * 5 + ["side"] * 5 + ["back"] * 4
    assert names_of(front + side + back, 90.0, 60.0) == names
    assert names_of(front + side + back, 30.0, 60.0) == ["overhead"] * 14
    assert names_of([-180.0], 90.0, 60.0) == ["back"]
    assert names_of([0.0, 89.0, 90.0, -90.0, 91.0, -91.0], 90.0, 180.0) == ["front"] * 4 + ["back"] * 2


def test_view_weights_read_nothing(nothing_read) -> None:
    """View weights read no value on the host."""
    with nothing_read:
        for angle_front in (None, 60.0):
            view_weights(torch.tensor([0.0, 100.0]), torch.tensor([90.0, 10.0]), ViewAngles(30.0, 90.0, angle_front))


def by_diffusers(components: Components, texts: list[str]) -> torch.Tensor:
    """Embeddings of texts by diffusers' own pipeline, in the dtype of `components`."""
    from diffusers import StableDiffusionPipeline

    parts = dict.fromkeys(["vae", "unet", "scheduler", "safety_checker", "feature_extractor"])
    pipeline = StableDiffusionPipeline(
        text_encoder=components.text_encoder, tokenizer=components.tokenizer, requires_safety_checker=False, **parts
    )
    with torch.no_grad():
        return pipeline.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)[0]


@pytest.fixture
def both(components: Components, in_fp64: Callable) -> tuple[Components, Components]:
    """The model, and the same in fp64."""
    return components, in_fp64(components)


def test_embeddings_blended(both: tuple[Components, Components]) -> None:
    """Embeddings equal the blend of diffusers' own encoding of each view."""
    prompts = PromptEmbeddings(both[0], "a red mug", "blurry", keep_text_encoder=True)
    texts = [f"a red mug, {view} view" for view in VIEWS]
    check("negative", prompts.negative, *(by_diffusers(model, ["blurry"]) for model in both))
    empty = by_diffusers(both[1], [""])
    assert error(prompts.negative, empty) > 100 * error(prompts.negative, by_diffusers(both[1], ["blurry"]))
    azimuth, polar = torch.tensor([0.0, 22.5, -135.0, 180.0]), torch.tensor([90.0, 60.0, 90.0, 10.0])
    cond, uncond = prompts.embeddings(azimuth, polar, ViewAngles(30.0))
    sharp, _ = prompts.embeddings(azimuth, polar, ViewAngles(30.0, 90.0, 60.0))
    blended, thresholded = [], []
    for model in both:
        front, side, back, overhead = by_diffusers(model, texts)
        blended.append(torch.stack([front, front * 0.75 + side * 0.25, side / 2 + back / 2, overhead]))
        thresholded.append(torch.stack([front, front, side, overhead]))
    check("blended", cond, *blended)
    check("one side each", sharp, *thresholded)
    assert cond.shape == uncond.shape == (4, 77, 32)
    assert all(torch.equal(row, prompts.negative[0]) for row in uncond)
    assert (front - back).abs().max() > 1e-2  # the sides differ at all


def test_view_prompts_of_sides(both: tuple[Components, Components]) -> None:
    view_prompts = {"back": "the back of a red mug", "overhead": "the inside of a red mug"}
    prompts = PromptEmbeddings(both[0], "a red mug", view_prompts=view_prompts, keep_text_encoder=True)
    texts = ["a red mug, front view", "a red mug, side view", view_prompts["back"], view_prompts["overhead"]]
    check("views", prompts.views, *(by_diffusers(model, texts) for model in both))
    check("negative", prompts.negative, *(by_diffusers(model, [""]) for model in both))
    with pytest.raises(ValueError, match="view_prompts has texts of front, side, back, overhead, not of below, left"):
        PromptEmbeddings(both[0], "a red mug", view_prompts={"left": "a", "below": "b"})


def test_long_view_prompts_cut(components: Components, caplog: pytest.LogCaptureFixture) -> None:
    """75 letters fit. A view prompt has no ending, and the prompt need not fit where it is unused."""
    with caplog.at_level(logging.WARNING):
        whole = PromptEmbeddings(components, "x", view_prompts={"back": "a" * 70 + " bbbbb"}, keep_text_encoder=True)
        every = dict.fromkeys(VIEWS, "a red mug")
        PromptEmbeddings(components, "not " * 40, view_prompts=every, keep_text_encoder=True)
        assert not caplog.records
        cut = PromptEmbeddings(
            components, "x", view_prompts={"back": "a" * 70 + " bbbbb dragon"}, keep_text_encoder=True
        )
    (record,) = caplog.records
    assert record.getMessage().endswith("left out: dragon")
    assert torch.equal(cut.views, whole.views)


def test_encode_against_model(both: tuple[Components, Components]) -> None:
    """Short, long and empty prompts equal those of diffusers' own pipeline."""
    texts = ["a red mug", "", "a very long prompt " * 20]
    check("embeddings", both[0].embed(texts), *(by_diffusers(model, texts) for model in both))


def test_text_encoder_freed(components: Components) -> None:
    """The text encoder is freed after the prompts are embedded."""
    PromptEmbeddings(components, "a red mug", keep_text_encoder=True)
    PromptEmbeddings(components, "a red mug")
    assert components.text_encoder is None
    with pytest.raises(ValueError, match="freed"):
        PromptEmbeddings(components, "a red mug")


def test_embeddings_dtype(tiny_model: Path) -> None:
    """Embeddings have the dtype of the model."""
    prompts = PromptEmbeddings(load_components(tiny_model, "cpu", torch.bfloat16), "a red mug")
    cond, uncond = prompts.embeddings(torch.tensor([10.0]), torch.tensor([90.0]), ViewAngles(30.0))
    assert cond.dtype == uncond.dtype == torch.bfloat16


def test_long_prompt_cut(components: Components, caplog: pytest.LogCaptureFixture) -> None:
    """The tiny model's tokens are bytes: 75 letters and the two markers fit, and ", overhead view" takes 14."""
    fitting = "a " + "b" * 30 + " " + "c" * 29  # 60 letters
    with caplog.at_level(logging.WARNING):
        whole = PromptEmbeddings(components, fitting, keep_text_encoder=True)
        assert not caplog.records
        cut = PromptEmbeddings(components, f"{fitting} dragon in a teapot", keep_text_encoder=True)
    (record,) = caplog.records
    message = record.getMessage()
    assert "77 tokens" in message and message.endswith("left out: dragon in a teapot")
    assert torch.equal(cut.views, whole.views)
    assert not torch.equal(cut.views[0], cut.views[2])


def test_long_negative_prompt(components: Components, caplog: pytest.LogCaptureFixture) -> None:
    """A long negative prompt and an endless word are cut."""
    with caplog.at_level(logging.WARNING):
        prompts = PromptEmbeddings(components, "x" * 300, "ugly " * 30)
    assert prompts.views.shape == (4, 77, 32) and torch.isfinite(prompts.views).all()
    assert any("left out: ugly" in record.getMessage() for record in caplog.records)
