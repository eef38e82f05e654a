"""The vocabulary of dream-mini: objects, colours, attributes and filler words."""

import re
from typing import NamedTuple

from dream_fast.engine.errors import UserError


class Thing(NamedTuple):
    """An object of the world: other names for it, its natural colours (None: any), and whether it has a face."""

    synonyms: tuple[str, ...] = ()
    natural: tuple[str, ...] | None = None
    face: bool = False


COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.95, 0.85, 0.12),
    "green": (0.15, 0.62, 0.18),
    "cyan": (0.15, 0.80, 0.82),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.50, 0.15, 0.70),
    "pink": (0.96, 0.55, 0.72),
    "brown": (0.42, 0.24, 0.11),
    "black": (0.09, 0.09, 0.10),
    "white": (0.94, 0.94, 0.93),
    "gray": (0.50, 0.50, 0.52),
}
COLOR_SYNONYMS = {"grey": "gray", "teal": "cyan", "turquoise": "cyan", "violet": "purple", "golden": "yellow"}

# Colours of parts of objects, which captions never name.
SHADES: dict[str, tuple[float, float, float]] = {
    "tan": (0.85, 0.60, 0.30),
    "cream": (0.96, 0.90, 0.75),
    "patty": (0.30, 0.16, 0.08),
    "lettuce": (0.40, 0.75, 0.20),
    "wood": (0.55, 0.35, 0.17),
    "leaf": (0.13, 0.50, 0.16),
    "glass": (0.60, 0.82, 0.92),
    "dark": (0.14, 0.14, 0.16),
    "steel": (0.66, 0.68, 0.72),
    "stone": (0.62, 0.60, 0.56),
    "beak": (0.97, 0.60, 0.10),
    "rose": (0.95, 0.60, 0.62),
    "brick": (0.62, 0.22, 0.15),
}

THINGS: dict[str, Thing] = {
    "hamburger": Thing(("burger", "cheeseburger"), ("tan",)),
    "donut": Thing(("doughnut",), ("pink", "brown", "white")),
    "ice cream cone": Thing(("ice cream",), ("pink", "cream", "brown")),
    "cupcake": Thing(("muffin",), ("pink", "cream", "brown")),
    "cake": Thing(("birthday cake",), ("cream", "brown", "pink")),
    "apple": Thing((), ("red", "green")),
    "pear": Thing((), ("green", "yellow")),
    "carrot": Thing((), ("orange",)),
    "mushroom": Thing(("toadstool",), ("red", "brown")),
    "pumpkin": Thing((), ("orange",)),
    "pineapple": Thing((), ("yellow",)),
    "snowman": Thing((), ("white",), True),
    "robot": Thing((), ("gray", "steel"), True),
    "duck": Thing(("rubber duck",), ("yellow",), True),
    "penguin": Thing((), ("black",), True),
    "rabbit": Thing(("bunny",), ("gray", "white", "tan"), True),
    "cat": Thing(("kitten",), ("orange", "gray", "black"), True),
    "dog": Thing(("puppy",), ("brown", "tan"), True),
    "bear": Thing(("teddy bear",), ("brown",), True),
    "pig": Thing(("piglet",), ("pink",), True),
    "owl": Thing((), ("brown", "gray"), True),
    "frog": Thing((), ("green",), True),
    "fish": Thing(("goldfish",), ("orange", "blue")),
    "turtle": Thing(("tortoise",), ("green",), True),
    "cactus": Thing((), ("green",)),
    "tree": Thing((), ("leaf",)),
    "pine tree": Thing(("christmas tree", "fir tree"), ("leaf",)),
    "flower": Thing((), ("red", "yellow", "pink", "purple")),
    "house": Thing(("cottage",), ("cream", "white", "tan")),
    "lighthouse": Thing((), ("red",)),
    "castle": Thing((), ("stone", "gray")),
    "windmill": Thing((), ("white", "cream")),
    "rocket": Thing(("spaceship",), ("white", "red")),
    "car": Thing(),
    "truck": Thing(("lorry",)),
    "airplane": Thing(("plane",), ("white", "gray")),
    "boat": Thing(("sailboat",)),
    "mug": Thing(("cup",)),
    "teapot": Thing(),
    "bottle": Thing((), ("green", "glass")),
    "vase": Thing(),
    "lamp": Thing(),
    "chair": Thing((), ("wood", "brown")),
    "table": Thing(("desk",), ("wood", "brown")),
    "hat": Thing(("top hat",), ("black",)),
    "umbrella": Thing(("parasol",)),
    "candle": Thing((), ("cream", "white", "red")),
    "drum": Thing((), ("red",)),
}

VIEWS = ("front", "side", "back", "overhead")
ATTRIBUTES = ("tall", "wide", "striped", "spotted")
FILLER = frozenset(
    "a an the of with and wearing its on in one single some photo picture image render rendering 3d model toy style "
    "dslr view front side back overhead object asset cute small little".split()
)

_NAMES = {name: name for name in THINGS} | {s: name for name, thing in THINGS.items() for s in thing.synonyms}
_LONGEST_FIRST = sorted(_NAMES, key=len, reverse=True)


def words() -> list[str]:
    """All words of captions, sorted: the vocabulary of the tokenizer."""
    phrases = [*_NAMES, *COLORS, *COLOR_SYNONYMS, *ATTRIBUTES, *FILLER]
    return sorted({word for phrase in phrases for word in phrase.split()})


def _split(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def find_object(text: str) -> str | None:
    """The name of the first known object in a prompt, or None. A hat that an object wears does not count."""
    plain = f" {' '.join(_split(text))} "
    plain = re.sub(r" (?:with|wearing) (?:\w+ ){0,3}hat ", " ", plain)
    found = [(plain.find(f" {name} "), name) for name in _LONGEST_FIRST if f" {name} " in plain]
    return _NAMES[min(found, key=lambda place: place[0])[1]] if found else None


MOST_NAMED = 10  # unknown words, in warnings


def known_words(text: str) -> str:
    """The known words of a prompt, in lower case, without punctuation."""
    known = set(words())
    return " ".join(word for word in _split(text) if word in known)


def check_prompt(text: str, negative: str = "") -> list[str]:
    """Check a prompt for dream-mini; returns warnings about words of it and of `negative` that are ignored.

    Raises UserError: when the prompt contains no known object.
    """
    if find_object(text) is None:
        shown = " ".join(text.split())[:80]
        raise UserError(
            f'the embedded model does not know what "{shown}" is; it knows {", ".join(THINGS)}; '
            "for anything else use Stable Diffusion: --sd_version 2.1, or --hf_key FOLDER_OR_HUB_NAME"
        )
    known = set(words())
    unknown = list(dict.fromkeys(word for word in _split(f"{text} {negative}") if word not in known))
    found = [f'the embedded model does not know the word "{word}" and will ignore it' for word in unknown[:MOST_NAMED]]
    if len(unknown) > MOST_NAMED:
        found.append(f"nor does it know {len(unknown) - MOST_NAMED} other words")
    return found
