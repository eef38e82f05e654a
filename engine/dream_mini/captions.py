"""Captions of the procedural world, in the phrasings that people and the engine's view-dependent prompts use."""

import numpy as np

from dream_fast.engine.dream_mini.catalogue import COLOR_SYNONYMS, COLORS, RELATIONS, THINGS, UNTEXTURED
from dream_fast.engine.dream_mini.scenes import Item, Scene

PREFIXES = ("", "", "", "", "a photo of ", "a 3d render of ", "a dslr photo of ", "one ")
BORDER = 5.0  # degrees to either side of 45 and 135 in which a caption may call a view either name
_SPELLINGS = {color: [name for name, of in COLOR_SYNONYMS.items() if of == color] for color in COLORS}


def view_of(polar: float, azimuth: float, overhead: float = 30.0, rng: np.random.Generator | None = None) -> str:
    """front | side | back | overhead of a camera in degrees. With `rng` the borders vary by up to BORDER degrees,
    because guidance blends neighbouring views there."""
    border = 0.0 if rng is None else rng.uniform(-BORDER, BORDER)
    if polar <= overhead:
        return "overhead"
    turned = abs((azimuth + 180) % 360 - 180)
    return "front" if turned < 45 + border else "back" if turned > 135 + border else "side"


def caption(scene: Scene, view: str | None, rng: np.random.Generator, *, untextured: bool = False) -> str:
    """A caption such as "a tall red robot with a blue hat, side view"; `view` None leaves the view away.

    An `untextured` image shows no colours and no patterns: its caption has that word instead of theirs, so that
    colours asked for are never missing.
    """
    first, *rest = (_described(item, rng, untextured) for item in scene.items)
    text = _with_article(first, rng)
    if rest:
        assert scene.relation is not None, "two things stand in a relation"
        second = _with_article(rest[0], rng)
        if scene.relation == "in" and rng.random() < 0.5:
            text = f"{second} with {text}"
        else:
            phrases = RELATIONS[scene.relation].phrases
            text = f"{text} {phrases[rng.integers(len(phrases))]} {second}"
        prefix = ""
    else:
        prefix = PREFIXES[rng.integers(len(PREFIXES))]
        if prefix == "one ":
            prefix, text = "", f"one {first}"
    if rng.random() < 0.1:
        prefix, text = "", text.removeprefix("a ").removeprefix("an ").removeprefix("one ")
    return prefix + text + (f", {view} view" if view else "")


def _described(item: Item, rng: np.random.Generator, untextured: bool) -> str:
    """A thing without its article: "tall red robot with a blue hat"."""
    thing = THINGS[item.name]
    name = item.name
    if thing.synonyms and rng.random() < 0.2:
        name = thing.synonyms[rng.integers(len(thing.synonyms))]
    words = [UNTEXTURED] if untextured else []
    if item.attribute and not (untextured and item.attribute not in ("tall", "wide")):
        words.append(item.attribute)
    if item.color and not untextured:
        words.append(_spelled(item.color, rng))
    words.append(name)
    text = " ".join(words)
    if item.part:
        kind, color = item.part
        noun = kind if untextured else f"{_spelled(color, rng)} {kind}"
        noun = noun if kind == "glasses" else _article(noun) + noun
        text += f" {('with', 'wearing')[int(rng.random() < 0.4 and kind != 'flag')]} {noun}"
    return text


def _spelled(color: str, rng: np.random.Generator) -> str:
    names = _SPELLINGS[color]
    return names[rng.integers(len(names))] if names and rng.random() < 0.15 else color


def _article(text: str) -> str:
    return "an " if text[0] in "aeiou" and not text.startswith(("ufo", "one ")) else "a "


def _with_article(text: str, rng: np.random.Generator) -> str:
    return _article(text) + text
