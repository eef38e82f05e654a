"""Prompts: the weights of the sides, the embeddings, and what happens to words that do not fit."""

import logging
from pathlib import Path

import pytest
import torch

from dream_fast.engine.guidance.loader import Components, load_components
from dream_fast.engine.guidance.prompts import VIEWS, PromptEmbeddings, encode, view_weights


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
        (108, 60, [0, 0.8, 0.2, 0]),
        (180, 90, [0, 0, 1, 0]),
        (-180, 90, [0, 0, 1, 0]),
        (270, 90, [0, 1, 0, 0]),  # turned once around
        (-350, 90, [8 / 9, 1 / 9, 0, 0]),
        (180, 30, [0, 0, 0, 1]),  # overhead, its limit included
        (180, 30.5, [0, 0, 1, 0]),
        (20, 0, [0, 0, 0, 1]),
    ],
)
def test_weights_of_the_views(azimuth: float, polar: float, weights: list[float]) -> None:
    got = view_weights(torch.tensor([float(azimuth)]), torch.tensor([float(polar)]), 30.0)
    torch.testing.assert_close(got, torch.tensor([weights], dtype=torch.float32), rtol=0, atol=1e-6)


def test_views_may_turn_into_each_other_over_fewer_degrees() -> None:
    azimuth = torch.tensor([0.0, 34.0, -40.0, 45.0, 50.0, 56.0, 124.0, -135.0, 146.0])
    front, side, back, overhead = view_weights(azimuth, torch.full((9,), 90.0), 30.0, 20.0).T
    torch.testing.assert_close(front, torch.tensor([1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0]))
    torch.testing.assert_close(back, torch.tensor([0, 0, 0, 0, 0, 0, 0, 0.5, 1]))
    torch.testing.assert_close(front + side + back, torch.ones(9))
    assert not overhead.any()


def names_of(azimuth: list[float], polar: float, angle_front: float) -> list[str]:
    """The one view of each camera that the thresholded prompt names."""
    weights = view_weights(torch.tensor(azimuth), torch.full((len(azimuth),), polar), 30.0, 20.0, angle_front)
    assert weights.shape == (len(azimuth), 4) and weights.dtype == torch.float32
    assert torch.equal(weights.sum(dim=-1), torch.ones(len(azimuth))) and ((weights == 0) | (weights == 1)).all()
    return [VIEWS[index] for index in weights.argmax(dim=-1).tolist()]


def test_with_a_front_angle_a_camera_sees_one_side() -> None:
    front, side, back = [0.0, 30.0, -30.0, 360.0, 335.0], [30.5, -30.5, 90.0, 149.5, -149.5], [150.0, -150.0, 180, 200]
    names = ["front"] * 5 + ["side"] * 5 + ["back"] * 4
    assert names_of(front + side + back, 90.0, 60.0) == names
    assert names_of(front + side + back, 30.0, 60.0) == ["overhead"] * 14
    assert names_of([-180.0], 90.0, 60.0) == ["back"]
    assert names_of([0.0, 89.0, 90.0, -90.0, 91.0, -91.0], 90.0, 180.0) == ["front"] * 4 + ["back"] * 2


def test_weighing_the_views_reads_no_value(nothing_read) -> None:
    with nothing_read:
        for angle_front in (None, 60.0):
            view_weights(torch.tensor([0.0, 100.0]), torch.tensor([90.0, 10.0]), 30.0, 90.0, angle_front)


def test_embeddings_are_the_encoded_prompts_blended(components: Components) -> None:
    prompts = PromptEmbeddings(components, "a red mug", "blurry", keep_text_encoder=True)
    front, side, back, overhead = encode(components, [f"a red mug, {view} view" for view in VIEWS])
    torch.testing.assert_close(prompts.negative, encode(components, ["blurry"]))
    assert not torch.allclose(prompts.negative, encode(components, [""]), atol=1e-3)
    azimuth, polar = torch.tensor([0.0, 30.0, -135.0, 180.0]), torch.tensor([90.0, 60.0, 90.0, 10.0])
    cond, uncond = prompts.embeddings(azimuth, polar, 30.0)
    expected = torch.stack([front, front * 2 / 3 + side / 3, side / 2 + back / 2, overhead])
    torch.testing.assert_close(cond, expected, rtol=1e-5, atol=1e-5)
    assert cond.shape == uncond.shape == (4, 77, 32)
    sharp, _ = prompts.embeddings(azimuth, polar, 30.0, 90.0, 60.0)
    torch.testing.assert_close(sharp, torch.stack([front, front, side, overhead]), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(row, prompts.negative[0]) for row in uncond)
    assert (front - back).abs().max() > 1e-2  # the sides differ at all


def test_a_side_may_have_a_text_of_its_own(components: Components) -> None:
    own = {"back": "the back of a red mug", "overhead": "the inside of a red mug"}
    prompts = PromptEmbeddings(components, "a red mug", own=own, keep_text_encoder=True)
    texts = ["a red mug, front view", "a red mug, side view", own["back"], own["overhead"]]
    torch.testing.assert_close(prompts.views, encode(components, texts))
    torch.testing.assert_close(prompts.negative, encode(components, [""]))
    with pytest.raises(ValueError, match="own has texts of front, side, back, overhead, not of below, left"):
        PromptEmbeddings(components, "a red mug", own={"left": "a", "below": "b"})


def test_own_texts_that_do_not_fit_are_cut_and_leave_room_for_no_side(
    components: Components, caplog: pytest.LogCaptureFixture
) -> None:
    """75 letters fit. A text of its own has no ending, and the prompt need not fit where it is not used."""
    with caplog.at_level(logging.WARNING):
        whole = PromptEmbeddings(components, "x", own={"back": "a" * 70 + " bbbbb"}, keep_text_encoder=True)
        every = {view: "a red mug" for view in VIEWS}
        PromptEmbeddings(components, "not " * 40, own=every, keep_text_encoder=True)
        assert not caplog.records
        cut = PromptEmbeddings(components, "x", own={"back": "a" * 70 + " bbbbb dragon"}, keep_text_encoder=True)
    (record,) = caplog.records
    assert record.getMessage().endswith("left out: dragon")
    assert torch.equal(cut.views, whole.views)


def test_encoding_is_that_of_the_model_itself(components: Components) -> None:
    """Token by token, against the plain use of tokenizer and encoder."""
    ids = components.tokenizer("a red mug").input_ids
    ids += [components.tokenizer.pad_token_id] * (77 - len(ids))
    with torch.no_grad():
        expected = components.text_encoder(torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(encode(components, ["a red mug"]), expected)


def test_text_encoder_is_freed_once_the_prompts_are_embedded(components: Components) -> None:
    PromptEmbeddings(components, "a red mug", keep_text_encoder=True)
    PromptEmbeddings(components, "a red mug")
    assert components.text_encoder is None
    with pytest.raises(ValueError, match="freed"):
        PromptEmbeddings(components, "a red mug")


def test_embeddings_take_the_dtype_of_the_model(tiny_model: Path) -> None:
    prompts = PromptEmbeddings(load_components(tiny_model, "cpu", torch.bfloat16), "a red mug")
    cond, uncond = prompts.embeddings(torch.tensor([10.0]), torch.tensor([90.0]), 30.0)
    assert cond.dtype == uncond.dtype == torch.bfloat16


def test_words_that_do_not_fit_are_named_and_the_side_is_kept(
    components: Components, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny model's tokens are bytes: 75 letters fit beside the two markers, and ", overhead view" takes 14."""
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


def test_long_negative_prompt_and_endless_word(components: Components, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prompts = PromptEmbeddings(components, "x" * 300, "ugly " * 30)
    assert prompts.views.shape == (4, 77, 32) and torch.isfinite(prompts.views).all()
    assert any("left out: ugly" in record.getMessage() for record in caplog.records)
