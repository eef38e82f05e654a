"""Captions of the procedural world, in the phrasings that people and the engine's view-dependent prompts use."""

import numpy as np

from dream_fast.engine.dream_mini.scenes import Scene
from dream_fast.engine.dream_mini.vocabulary import COLOR_SYNONYMS, THINGS

PREFIXES = ("", "", "", "", "a photo of ", "a 3d render of ", "a dslr photo of ", "one ")
BORDER = 5.0  # degrees to either side of 45 and 135 in which a caption may call a view either name
_SPELLINGS = {color: [name for name, of in COLOR_SYNONYMS.items() if of == color] for color in COLOR_SYNONYMS.values()}


def view_of(polar: float, azimuth: float, overhead: float = 30.0, rng: np.random.Generator | None = None) -> str:
    """front | side | back | overhead of a camera in degrees. With `rng` the borders vary by up to BORDER degrees,
    because guidance blends neighbouring views there."""
    border = 0.0 if rng is None else rng.uniform(-BORDER, BORDER)
    if polar <= overhead:
        return "overhead"
    turned = abs((azimuth + 180) % 360 - 180)
    return "front" if turned < 45 + border else "back" if turned > 135 + border else "side"


def caption(scene: Scene, view: str | None, rng: np.random.Generator) -> str:
    """A caption such as "a tall red robot with a blue hat, side view"; `view` None leaves the view away."""
    thing = THINGS[scene.name]
    name = scene.name
    if thing.synonyms and rng.random() < 0.2:
        name = thing.synonyms[rng.integers(len(thing.synonyms))]
    words = [scene.attribute] if scene.attribute else []
    if scene.color:
        names = _SPELLINGS.get(scene.color, [])
        words.append(names[rng.integers(len(names))] if names and rng.random() < 0.15 else scene.color)
    words.append(name)
    prefix = PREFIXES[rng.integers(len(PREFIXES))]
    article = "" if prefix == "one " else "an " if words[0][0] in "aeiou" else "a "
    if rng.random() < 0.1:
        prefix, article = "", ""
    hat = f" {('with', 'wearing')[rng.integers(2)]} a {scene.hat} hat" if scene.hat else ""
    return f"{prefix}{article}{' '.join(words)}{hat}" + (f", {view} view" if view else "")
