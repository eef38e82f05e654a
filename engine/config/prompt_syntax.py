"""Syntax that other programs read in a prompt and this one takes as plain words, with what to do instead.

AUTOMATIC1111's weights, schedules and tags, compel's weights, dynamic prompts, and Midjourney's parameters. Nothing
heavy is imported.
"""

import re

_WEIGHT = "write the words alone; --guidance_scale strengthens the whole prompt"
_PLAIN = "write one prompt in plain words"

_SYNTAX: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE),
        "put a LoRA into the weights with diffusers (load_lora_weights, fuse_lora, save_pretrained) and name that "
        "folder with --hf_key",
    ),
    (re.compile(r"<[\w-]+>|\bembedding:[\w.-]+"), "textual inversions cannot be added; write what it stands for"),
    (re.compile(r"\([^()\[\]]*:\s*-?(?:\d+(?:\.\d*)?|\.\d+)\s*\)"), _WEIGHT),
    (re.compile(r"\(\([^()]*\)\)+|\[[^\[\]]*\]"), _WEIGHT),
    (re.compile(r"\b\w{2,}\++(?=[\s,.)]|$)|\)[+-]+(?=[\s,.)]|$)"), _WEIGHT),
    (re.compile(r"\{[^{}]*\|[^{}]*\}|__[A-Za-z0-9]+__"), _PLAIN),
    (re.compile(r"(?<!\S)(?:BREAK|AND)(?!\S)"), _PLAIN),
    (re.compile(r"(?<!\S)--(?:no|neg)\s+[^-\s][^-]*"), "name what should not be seen with --negative"),
    (re.compile(r"(?<!\S)--(?:ar|v|q|s|stylize|chaos|niji|style|seed|steps|cfg)\s+\S+"), "parameters are flags here"),
)
MOST_SHOWN = 60  # characters of it


def foreign_syntax(text: str) -> list[str]:
    """A sentence's part for each kind of such syntax in ``text``: the first of it, and what to do."""
    notes: list[str] = []
    for pattern, advice in _SYNTAX:
        if found := pattern.search(text):
            shown = found[0].strip()
            shown = shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."
            notes.append(f'"{shown}" has no meaning of its own here and is read as words: {advice}')
    return notes
