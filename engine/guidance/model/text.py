"""Prompts that fit the window of a text encoder."""

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)


def fit_window(tokenizer: Any, window: int, text: str, endings: Sequence[str]) -> str:
    """Cut `text` to the leading words that fit `window` tokens with each of `endings`; a warning lists the others."""

    def fits(candidate: str) -> bool:
        return all(len(tokenizer(candidate + ending, verbose=False).input_ids) <= window for ending in endings)

    words = text.split()
    if fits(text) or len(words) < 2:
        return text  # a single long word: the tokenizer truncates it
    count = min(len(words) - 1, window)  # a word has at least one token
    while count > 1 and not fits(" ".join(words[:count])):
        count -= 1
    logger.warning(
        "the prompt is longer than the %d tokens that the text encoder reads; left out: %s",
        window,
        " ".join(words[count:]),
    )
    return " ".join(words[:count])
