"""Notes about prompt syntax of other programs, which is read as plain words here.

It covers AUTOMATIC1111's weights, schedules and tags, compel's weights, dynamic prompts, and Midjourney's parameters.
Imports nothing heavy.
"""

import re

_WEIGHT = "write the words alone; --guidance_scale strengthens the whole prompt"
_PLAIN = "write one prompt in plain words"

_SYNTAX: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE),
        "merge a LoRA into the weights with diffusers (load_lora_weights, fuse_lora, save_pretrained) and name that "
        "folder with --hf_key",
    ),
    (re.compile(r"<[\w-]+>|\bembedding:[\w.-]+"), "textual inversions cannot be added; describe it in words"),
    (re.compile(r"\([^()\[\]]*:\s*-?(?:\d+(?:\.\d*)?|\.\d+)\s*\)"), _WEIGHT),
    (re.compile(r"\(\([^()]*\)\)+|\[[^\[\]]*\]"), _WEIGHT),
    (re.compile(r"\b\w{2,}\++(?=[\s,.)]|$)|\)[+-]+(?=[\s,.)]|$)"), _WEIGHT),
    (re.compile(r"\{[^{}]*\|[^{}]*\}|__[A-Za-z0-9]+__"), _PLAIN),
    (re.compile(r"(?<!\S)(?:BREAK|AND)(?!\S)"), _PLAIN),
    (re.compile(r"(?<!\S)--(?:no|neg)\s+[^-\s][^-]*"), "use --negative for the negative prompt"),
    (re.compile(r"(?<!\S)--(?:ar|v|q|s|stylize|chaos|niji|style|seed|steps|cfg)\s+\S+"), "use flags for parameters"),
)
MAX_EXCERPT = 60  # characters


def foreign_syntax(text: str) -> list[str]:
    """Return a note for each kind of foreign syntax in `text`, with its first occurrence and advice."""
    notes: list[str] = []
    for pattern, advice in _SYNTAX:
        if match := pattern.search(text):
            excerpt = match[0].strip()
            excerpt = excerpt if len(excerpt) <= MAX_EXCERPT else f"{excerpt[:MAX_EXCERPT]}..."
            notes.append(f'"{excerpt}" has no special meaning and is read as words: {advice}')
    return notes
