"""The words of the procedural world: things, colours, patterns, parts and relations that a caption can name.

A trained model knows the catalogue that it was trained with: that one is written beside its weights
(`vocabulary.json`), and `vocabulary.py` reads it from there.
"""

from typing import NamedTuple


class Thing(NamedTuple):
    """A thing of the world: other names for it, its natural colours (None: any), and whether it has a face."""

    synonyms: tuple[str, ...] = ()
    natural: tuple[str, ...] | None = None
    face: bool = False


class Relation(NamedTuple):
    """The phrases of captions for a relation, and the things that can stand first and second."""

    phrases: tuple[str, ...]
    guests: tuple[str, ...]
    places: tuple[str, ...]


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
    "navy": (0.06, 0.09, 0.36),
    "lime": (0.62, 0.90, 0.16),
    "maroon": (0.42, 0.05, 0.14),
    "beige": (0.88, 0.78, 0.60),
}
COLOR_SYNONYMS = {
    "grey": "gray", "silver": "gray", "teal": "cyan", "turquoise": "cyan", "violet": "purple", "golden": "yellow",
    "gold": "yellow", "burgundy": "maroon", "magenta": "pink",
}  # fmt: skip

# Shades that parts of things have by nature; a caption never names them.
SHADES: dict[str, tuple[float, float, float]] = {
    "tan": (0.85, 0.60, 0.30),
    "cream": (0.96, 0.90, 0.75),
    "patty": (0.30, 0.16, 0.08),
    "lettuce": (0.40, 0.75, 0.20),
    "wood": (0.55, 0.35, 0.17),
    "leaf": (0.13, 0.50, 0.16),
    "glass": (0.60, 0.82, 0.92),
    "dark": (0.10, 0.10, 0.12),
    "steel": (0.66, 0.68, 0.72),
    "stone": (0.62, 0.60, 0.56),
    "beak": (0.97, 0.60, 0.10),
    "rose": (0.95, 0.60, 0.62),
    "brick": (0.62, 0.22, 0.15),
    "fox": (0.90, 0.42, 0.12),
    "straw": (0.86, 0.72, 0.38),
    "skin": (0.95, 0.76, 0.60),
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
    "duck": Thing(("rubber duck", "duckling"), ("yellow",), True),
    "penguin": Thing((), ("black",), True),
    "rabbit": Thing(("bunny",), ("gray", "white", "tan"), True),
    "cat": Thing(("kitten",), ("orange", "gray", "black"), True),
    "dog": Thing(("puppy",), ("brown", "tan"), True),
    "bear": Thing(("teddy bear",), ("brown",), True),
    "pig": Thing(("piglet",), ("pink",), True),
    "owl": Thing((), ("brown", "gray"), True),
    "frog": Thing(("toad",), ("green",), True),
    "fish": Thing(("goldfish",), ("orange", "blue")),
    "turtle": Thing(("tortoise",), ("green",), True),
    "cactus": Thing((), ("green",)),
    "tree": Thing((), ("leaf",)),
    "pine tree": Thing(("christmas tree", "fir tree"), ("leaf",)),
    "flower": Thing(("daisy",), ("red", "yellow", "pink", "purple")),
    "house": Thing(("cottage",), ("cream", "white", "tan")),
    "lighthouse": Thing((), ("red",)),
    "castle": Thing((), ("stone", "gray")),
    "windmill": Thing((), ("white", "cream")),
    "rocket": Thing(("spaceship",), ("white", "red")),
    "car": Thing(),
    "truck": Thing(("lorry",)),
    "airplane": Thing(("plane", "aeroplane"), ("white", "gray")),
    "boat": Thing(("sailboat", "ship")),
    "mug": Thing(("cup", "coffee cup")),
    "teapot": Thing(),
    "bottle": Thing((), ("green", "glass")),
    "vase": Thing(),
    "lamp": Thing(("table lamp",)),
    "chair": Thing((), ("wood", "brown")),
    "table": Thing(("desk",), ("wood", "brown")),
    "hat": Thing(("top hat",), ("black",)),
    "umbrella": Thing(("parasol",)),
    "candle": Thing((), ("cream", "white", "red")),
    "drum": Thing((), ("red",)),
    "cow": Thing((), ("white",), True),
    "horse": Thing(("pony",), ("brown", "tan"), True),
    "sheep": Thing(("lamb",), ("cream", "white"), True),
    "lion": Thing((), ("tan", "straw"), True),
    "elephant": Thing((), ("gray",), True),
    "fox": Thing((), ("fox",), True),
    "mouse": Thing(("rat",), ("gray",), True),
    "panda": Thing((), ("white",), True),
    "koala": Thing((), ("gray",), True),
    "monkey": Thing(("chimp",), ("brown",), True),
    "chicken": Thing(("hen", "rooster"), ("white", "tan"), True),
    "giraffe": Thing((), ("straw", "yellow"), True),
    "deer": Thing(("reindeer",), ("tan", "brown"), True),
    "hedgehog": Thing(("porcupine",), ("brown",), True),
    "bee": Thing(("bumblebee",), ("yellow",), True),
    "ladybug": Thing(("ladybird",), ("red",), True),
    "snail": Thing((), ("tan", "brown"), True),
    "octopus": Thing((), ("purple", "red"), True),
    "whale": Thing((), ("blue",), True),
    "crab": Thing((), ("red", "orange"), True),
    "dinosaur": Thing(("t rex",), ("green",), True),
    "dragon": Thing((), ("green", "red"), True),
    "snake": Thing((), ("green",), True),
    "ghost": Thing((), ("white",), True),
    "alien": Thing((), ("lime", "green"), True),
    "astronaut": Thing(("spaceman",), ("white",), True),
    "gnome": Thing(("dwarf",), ("blue", "green"), True),
    "banana": Thing((), ("yellow",)),
    "strawberry": Thing((), ("red",)),
    "cherry": Thing(("cherries",), ("red", "maroon")),
    "watermelon": Thing(("melon",), ("green",)),
    "lemon": Thing((), ("yellow",)),
    "grapes": Thing(("grape",), ("purple", "green")),
    "corn": Thing((), ("yellow",)),
    "hot dog": Thing(("hotdog",), ("tan",)),
    "pizza": Thing((), ("yellow",)),
    "cookie": Thing(("biscuit",), ("tan",)),
    "lollipop": Thing((), ("red", "pink")),
    "cheese": Thing((), ("yellow",)),
    "pancake": Thing(("pancakes",), ("tan",)),
    "eggplant": Thing(("aubergine",), ("purple",)),
    "tomato": Thing((), ("red",)),
    "fries": Thing(("french fries", "chips"), ("red",)),
    "bus": Thing((), ("yellow", "red")),
    "train": Thing(("locomotive", "steam train")),
    "helicopter": Thing(),
    "tractor": Thing((), ("green", "red")),
    "bicycle": Thing(("bike",)),
    "submarine": Thing((), ("yellow",)),
    "hot air balloon": Thing(),
    "ufo": Thing(("flying saucer",), ("gray", "steel")),
    "tent": Thing((), ("orange", "green")),
    "igloo": Thing((), ("white",)),
    "palm tree": Thing((), ("leaf",)),
    "sunflower": Thing((), ("yellow",)),
    "tulip": Thing((), ("red", "pink", "yellow")),
    "book": Thing(),
    "clock": Thing(("alarm clock",), ("red", "blue")),
    "camera": Thing((), ("black", "gray")),
    "guitar": Thing((), ("wood", "brown")),
    "bell": Thing((), ("yellow",)),
    "key": Thing((), ("yellow", "steel")),
    "crown": Thing((), ("yellow",)),
    "boot": Thing(("shoe",), ("brown",)),
    "sofa": Thing(("couch",)),
    "bed": Thing(),
    "bucket": Thing(("pail",), ("steel", "blue")),
    "basket": Thing((), ("tan", "wood")),
    "barrel": Thing((), ("wood", "brown")),
    "sword": Thing((), ("steel",)),
    "hammer": Thing((), ("steel", "red")),
    "pencil": Thing((), ("yellow",)),
    "ball": Thing(("beach ball",)),
    "dice": Thing(("die",), ("white", "red")),
    "gift": Thing(("present", "gift box")),
    "balloon": Thing((), ("red",)),
    "star": Thing((), ("yellow",)),
    "heart": Thing((), ("red", "pink")),
    "diamond": Thing(("gem",), ("cyan", "glass")),
    "trophy": Thing((), ("yellow",)),
    "television": Thing(("tv",), ("brown", "dark")),
    "bowl": Thing(),
    "pan": Thing(("frying pan",), ("dark", "black")),
    "anchor": Thing((), ("dark", "blue")),
    "stool": Thing((), ("wood",)),
    "laptop": Thing(("computer",), ("steel", "gray")),
    "bathtub": Thing(("tub",), ("white",)),
    "skateboard": Thing(),
}

VIEWS = ("front", "side", "back", "overhead")
SHAPES = ("tall", "wide")
PATTERNS = ("striped", "spotted", "checked", "zigzag")
ATTRIBUTES = (*SHAPES, *PATTERNS)
PARTS = ("hat", "crown", "scarf", "bow", "glasses", "backpack", "flag")
UNTEXTURED = "untextured"  # an image that is shown without its colours

_ANIMALS = (
    "cat", "dog", "rabbit", "bear", "pig", "owl", "frog", "duck", "penguin", "fox", "mouse", "panda", "koala", "monkey",
    "chicken", "lion", "sheep", "hedgehog", "turtle", "elephant", "robot", "snowman", "ghost", "alien", "gnome",
    "astronaut", "dinosaur", "cow",
)  # fmt: skip
_GOODS = (
    "apple", "pear", "pumpkin", "hamburger", "donut", "cake", "cupcake", "teapot", "mug", "candle", "lamp", "vase",
    "ball", "gift", "book", "clock", "cactus", "bottle", "trophy", "star", "heart", "hat", "crown", "pineapple",
    "mushroom", "lemon", "tomato", "dice", "bell", "camera", "drum",
)  # fmt: skip
RELATIONS: dict[str, Relation] = {
    "on": Relation(
        ("on", "on top of"),
        (*_ANIMALS, *_GOODS),
        ("chair", "table", "stool", "sofa", "bed", "barrel", "book", "gift", "drum", "skateboard", "car", "truck"),
    ),
    "beside": Relation(
        ("beside", "next to"),
        (*_ANIMALS, *_GOODS, "flower", "tulip", "tree", "car", "chair"),
        (*_ANIMALS, *_GOODS, "house", "tree", "pine tree", "palm tree", "car", "chair", "table", "lighthouse", "tent",
         "rocket", "cactus", "bicycle", "boat"),
    ),
    "under": Relation(
        ("under", "below"),
        (*_ANIMALS, *_GOODS),
        ("table", "umbrella", "tree", "palm tree", "chair", "lamp", "balloon", "hot air balloon"),
    ),
    "in": Relation(
        ("in",),
        (*_ANIMALS, "flower", "tulip", "sunflower", "pencil", "apple", "lemon", "tomato", "star", "heart", "cactus"),
        ("mug", "bowl", "basket", "bucket", "vase", "bathtub", "boot"),
    ),
}  # fmt: skip
# "a mug with a flower": things that stand out of a vessel, of which a narrow one takes no others.
STEMS = ("flower", "tulip", "sunflower", "pencil")
NARROW = ("vase", "boot")

# (first, relation, second): no training image shows these, and a model must make them all the same.
HELD_OUT_PAIRS = frozenset({
    ("cat", "on", "chair"), ("rabbit", "on", "drum"), ("teapot", "on", "table"), ("robot", "on", "skateboard"),
    ("penguin", "on", "sofa"), ("apple", "on", "book"), ("owl", "on", "barrel"), ("candle", "on", "gift"),
    ("dog", "under", "table"), ("duck", "under", "umbrella"), ("fox", "under", "tree"), ("lion", "under", "palm tree"),
    ("flower", "in", "mug"), ("frog", "in", "bucket"), ("bear", "in", "bathtub"), ("rabbit", "in", "basket"),
    ("pencil", "in", "mug"), ("lemon", "in", "bowl"),
    ("pig", "beside", "house"), ("snowman", "beside", "pine tree"), ("dog", "beside", "car"),
    ("mug", "beside", "teapot"), ("astronaut", "beside", "rocket"), ("panda", "beside", "tent"),
})  # fmt: skip

FILLER = frozenset(
    "a an the of with and wearing its on in one single some photo picture image render rendering 3d model toy style "
    "dslr view front side back overhead object asset cute small little untextured".split()
)


def vocabulary() -> dict:
    """The content of `vocabulary.json` for a model that is trained on this world."""
    return {
        "version": 2,
        "things": {name: thing._asdict() for name, thing in THINGS.items()},
        "colors": COLORS,
        "color_synonyms": COLOR_SYNONYMS,
        "shades": SHADES,
        "attributes": ATTRIBUTES,
        "parts": PARTS,
        "relations": {name: relation.phrases for name, relation in RELATIONS.items()},
        "filler": sorted(FILLER),
    }
