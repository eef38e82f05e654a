"""Words that fit the window of a text encoder, and the limits of Perp-Neg's weights."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dream_fast.engine.guidance.model.components import Components
from dream_fast.engine.guidance.model.text import fit_window
from dream_fast.engine.guidance.perp_neg import negative_weights
from dream_fast.engine.guidance.prompts import PromptEmbeddings


def letters(text: str, verbose: bool) -> SimpleNamespace:
    """A tokenizer with a token for each letter, and two markers."""
    assert not verbose  # it would warn of each prompt that is too long
    return SimpleNamespace(input_ids=[0, *range(len(text.replace(" ", ""))), 0])


@pytest.mark.parametrize(
    ("text", "window", "fitting", "left_out"),
    [
        ("aaa bb", 8, "aaa bb", None),  # 5 letters, an ending of one, two markers: as many as fit
        ("aaa bb", 7, "aaa", "bb"),
        ("a b c", 4, "a", "b c"),
        ("a b c", 5, "a b", "c"),
        ("aaaa b", 4, "aaaa", "b"),  # the first word stays, for the tokenizer to cut
        ("aaaa b c", 4, "aaaa", "b c"),
        ("aaaaaaaa", 4, "aaaaaaaa", None),
        ("  aaa   bb cc ", 7, "aaa", "bb cc"),
        ("", 4, "", None),
    ],
)
def test_fit_keeps_the_words_that_fit(caplog, text: str, window: int, fitting: str, left_out: str | None) -> None:
    """The longest leading words that fit with every ending are kept; a warning has the rest."""
    with caplog.at_level(logging.WARNING):
        assert fit_window(letters, window, text, ["", "x"]) == fitting
    messages = [record.getMessage() for record in caplog.records]
    sentence = f"the prompt is longer than the {window} tokens that the text encoder reads; left out: {left_out}"
    assert messages == ([] if left_out is None else [sentence])


def test_fit_tries_no_more_words_than_tokens() -> None:
    """A word has at least one token, so a very long prompt is tried from the window's length on."""
    tried = []

    def tokenizer(text: str, verbose: bool) -> SimpleNamespace:
        tried.append(len(text.split()))
        return letters(text, verbose)

    assert fit_window(tokenizer, 6, " ".join("a" * 10_000), [""]) == "a a a a"
    assert tried == [10_000, 6, 5, 4]
    tried.clear()
    assert fit_window(tokenizer, 6, "aaaa bbbb cc", [""]) == "aaaa"
    assert tried == [3, 2]  # the whole once, and the first word not at all: it stays anyhow


def test_views_and_negative_encoded(caplog) -> None:
    """Prompts are in the order of VIEWS, view prompts unchanged, and the text encoder is freed."""
    encoded, freed = [], []
    components = SimpleNamespace(
        fit_prompt=lambda text, endings: fit_window(letters, 16, text, endings),
        embed=lambda texts, negative: encoded.append([*texts, negative]) or torch.eye(5)[:, None],
        free_text_encoder=lambda: freed.append(True),
    )
    negative = "n" * 14  # as many as fit beside two markers: nothing comes behind it
    with caplog.at_level(logging.WARNING):
        embeddings = PromptEmbeddings(components, "ab", negative, view_prompts={"overhead": "o" * 14, "side": "s"})
    assert encoded == [["ab, front view", "s", "ab, back view", "o" * 14, negative]] and not caplog.records
    assert torch.equal(embeddings.views, torch.eye(5)[:4, None]) and torch.equal(
        embeddings.negative, torch.eye(5)[4:, None]
    )
    assert freed == [True]
    PromptEmbeddings(components, "ab", keep_text_encoder=True)
    assert encoded[1] == [f"ab, {side} view" for side in ("front", "side", "back", "overhead")] + [""]
    assert freed == [True]


@pytest.mark.parametrize(
    ("t5", "settings", "masked"),
    [(True, {}, True), (False, {}, False), (False, {"use_attention_mask": False}, False)]
    + [(False, {"use_attention_mask": True}, True)],
)
def test_padding_mask(t5: bool, settings: dict[str, bool], masked: bool) -> None:
    """T5 and encoders with that setting get a mask; prompts are padded or cut to the window."""
    calls = []

    def tokenizer(texts: list[str], **options: Any) -> SimpleNamespace:
        calls.append((texts, options))
        return SimpleNamespace(input_ids=torch.tensor([[1, 2]]), attention_mask=torch.tensor([[1, 0]]))

    def text_encoder(ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        assert torch.equal(ids, torch.tensor([[1, 2]])) and (attention_mask is not None) is masked
        assert not masked or torch.equal(attention_mask, torch.tensor([[1, 0]]))
        assert not torch.is_grad_enabled()
        return torch.ones(1, 2, 3), None

    text_encoder.config = SimpleNamespace(**settings)
    components = SimpleNamespace(
        name="a model", t5=t5, tokenizer=tokenizer, window=2, text_encoder=text_encoder, device=torch.device("cpu")
    )
    assert torch.equal(Components.embed(components, [" A Mug "]), torch.ones(1, 2, 3))
    options = dict(padding="max_length", max_length=2, truncation=True, return_tensors="pt")
    assert calls == [(["a mug"] if t5 else [" A Mug "], options)]


@pytest.mark.parametrize(
    ("views", "weights"),
    [
        ([0.8, 0.2, 0.0, 0.0], [True, True]),
        ([0.81, 0.19, 0.0, 0.0], [False, True]),
        ([0.2, 0.8, 0.0, 0.0], [True, True]),
        ([0.19, 0.81, 0.0, 0.0], [True, False]),
        ([0.0, 0.8, 0.2, 0.0], [True, True]),
        ([0.0, 0.81, 0.19, 0.0], [True, False]),
    ],
)
def test_negative_weights_at_limits(views: list[float], weights: list[bool]) -> None:
    """Shares of exactly 0.8 and 0.2 still have a weight."""
    got = negative_weights(torch.tensor([views], dtype=torch.float64), -2.0, 2.0, 10.0)
    assert (got != 0).tolist() == [weights]
