"""Scenes from recipes: colours, patterns and shapes of a thing, parts that it wears, and two things in a relation."""

import numpy as np

from dream_fast.engine.dream_mini.catalogue import (
    ATTRIBUTES,
    COLORS,
    HELD_OUT_PAIRS,
    NARROW,
    RELATIONS,
    SHADES,
    SHAPES,
    STEMS,
    THINGS,
)
from dream_fast.engine.dream_mini.parts import PARTS, add_part, can_have
from dream_fast.engine.dream_mini.scenes import RADIUS, Builder, Item, Primitive, Scene, bounding_points, moved

PAIRS = 0.25  # share of scenes with two things


def make_scene(
    rng: np.random.Generator,
    name: str | None = None,
    color: str | None = None,
    *,
    plain: bool = False,
    attribute: str | None = None,
    part: tuple[str, str] | None = None,
) -> Scene:
    """Make a scene of one random thing with the given properties; `plain`: no other attribute and no other part."""
    name = name or list(THINGS)[rng.integers(len(THINGS))]
    if attribute is None and not plain and rng.random() < 0.3:
        attribute = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
    builder, color = build(rng, name, color)
    if part is None and not plain and rng.random() < 0.5:
        fitting = [kind for kind in PARTS if can_have(builder, kind)]
        if fitting:
            part = fitting[rng.integers(len(fitting))], _any_color(rng)
    if part is not None:
        add_part(builder, *part)
    stretch = np.ones(3)
    if attribute == "tall":
        stretch[1] = rng.uniform(1.35, 1.6)
    if attribute == "wide":
        stretch[[0, 2]] = rng.uniform(1.3, 1.5)
    item = Item(name, color, attribute, part, tuple(builder.primitives), builder.blend)
    return _fitted(Scene((item,), None, (stretch[0], stretch[1], stretch[2])), rng)


def make_pair(
    rng: np.random.Generator,
    relation: str | None = None,
    first: str | None = None,
    second: str | None = None,
    *,
    colors: tuple[str | None, str | None] = (None, None),
    plain: bool = False,
) -> Scene:
    """Make a scene of two things in a relation. Without names, none of the HELD_OUT_PAIRS.

    Raises ValueError: when the second thing has no place for that relation.
    """
    relation = relation or list(RELATIONS)[rng.integers(len(RELATIONS))]
    names = draw_pair(rng, relation, first, second)
    guest, guest_color = build(rng, names[0], colors[0])
    place, place_color = build(rng, names[1], colors[1])
    attributes: list[str | None] = [None, None]
    if not plain:
        patterns = [a for a in ATTRIBUTES if a not in SHAPES]
        attributes = [patterns[rng.integers(len(patterns))] if rng.random() < 0.12 else None for _ in range(2)]
    part = None
    if not plain and rng.random() < 0.15:
        fitting = [kind for kind in PARTS if can_have(guest, kind) and kind != "backpack"]
        if fitting:
            part = fitting[rng.integers(len(fitting))], _any_color(rng)
            add_part(guest, *part)
    scale, offset = _placed(rng, relation, guest, place, names[0] in STEMS)
    items = (
        Item(
            names[0],
            guest_color,
            attributes[0],
            part,
            tuple(moved(guest.primitives, scale, offset)),
            guest.blend * scale,
        ),
        Item(names[1], place_color, attributes[1], None, tuple(place.primitives), place.blend),
    )
    return _fitted(Scene(items, relation), rng)


def draw_pair(rng: np.random.Generator, relation: str, first: str | None, second: str | None) -> tuple[str, str]:
    """Draw the names of two things for a relation; where one is drawn, none of the HELD_OUT_PAIRS."""
    if first and second:
        return first, second
    while True:
        places, guests = RELATIONS[relation].places, RELATIONS[relation].guests
        names = first or guests[rng.integers(len(guests))], second or places[rng.integers(len(places))]
        fits = first is not None or not (names[1] in NARROW and relation == "in") or names[0] in STEMS
        if names[0] != names[1] and fits and (names[0], relation, names[1]) not in HELD_OUT_PAIRS:
            return names


def any_scene(rng: np.random.Generator, names: list[str], shares: np.ndarray) -> Scene:
    """Make a training scene: one thing, or two for a share of PAIRS."""
    if rng.random() < PAIRS:
        return make_pair(rng)
    return make_scene(rng, names[rng.choice(len(names), p=shares)])


def build(rng: np.random.Generator, name: str, color: str | None) -> tuple[Builder, str | None]:
    """Build a thing: its primitives, and the name of its colour where one was given or drawn."""
    from dream_fast.engine.dream_mini.objects import RECIPES

    natural = THINGS[name].natural
    if color is None and rng.random() < (0.3 if natural else 0.1):
        shade = _any_color(rng) if natural is None else natural[rng.integers(len(natural))]
    else:
        color = shade = color or _any_color(rng)
    rgb = np.array(COLORS.get(shade) or SHADES[shade]) * rng.uniform(0.95, 1.05) + rng.normal(0, 0.012, 3)
    builder = Builder(rng, np.clip(rgb, 0, 1))
    RECIPES[name](builder)
    return builder, color


def _any_color(rng: np.random.Generator) -> str:
    return list(COLORS)[rng.integers(len(COLORS))]


def _size(primitives: list[Primitive]) -> tuple[np.ndarray, np.ndarray]:
    points = bounding_points(primitives)
    return points.min(0), points.max(0)


def _placed(rng, relation: str, guest: Builder, place: Builder, stem: bool) -> tuple[float, np.ndarray]:
    """Scale and offset that bring the guest to its place; of a `stem` only the lower end goes into a vessel."""
    low, high = _size(guest.primitives)
    middle, extent = (low + high) / 2, high - low
    floor, ceiling = _size(place.primitives)
    room = ceiling - floor
    foot = np.array([middle[0], low[1], middle[2]])  # what stands on a surface
    match relation:
        case "on":
            if place.seat is None:
                raise ValueError("nothing can be put on it")
            x, y, z, half = place.seat
            scale = min(2.1 * half / max(extent[0], extent[2]), 0.95 * room.max() / extent[1])
            target = np.array([x, y - 0.01 * extent[1] * scale, z])
        case "under":
            if place.shelter is None:
                raise ValueError("nothing can be put under it")
            x, y, z, height = place.shelter
            scale = min(0.95 * height / extent[1], 0.8 * room[0] / extent[0])
            target = np.array([x, y, z])
        case "in":
            if place.mouth is None:
                raise ValueError("nothing can be put in it")
            y, radius, depth = place.mouth
            scale = 2.1 * radius / max(extent[0], extent[2])
            if stem:  # only the stem has to fit
                scale = 1.15 * room[1] / extent[1]
            sunk = min(depth, 0.3 * extent[1] * scale)
            target = np.array([0.0, y - sunk, 0.0])
        case _:
            scale = rng.uniform(0.75, 1.0) * room.max() / extent.max()
            side = -1 if rng.random() < 0.5 else 1
            gap = 0.08 * room.max()
            x = floor[0] - gap - scale * extent[0] / 2 if side < 0 else ceiling[0] + gap + scale * extent[0] / 2
            target = np.array([x, floor[1], (floor[2] + ceiling[2]) / 2])
    return scale, target - foot * scale


def _fitted(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene centred and scaled, so that it fills the sphere of RADIUS when it is stretched."""
    stretch = np.array(scene.stretch)
    points = bounding_points(scene.primitives) * stretch
    center = (points.min(0) + points.max(0)) / 2
    scale = RADIUS * rng.uniform(0.92, 1.0) / np.linalg.norm(points - center, axis=1).max()
    items = tuple(
        Item(
            i.name,
            i.color,
            i.attribute,
            i.part,
            tuple(moved(i.primitives, scale, -center / stretch * scale)),
            i.blend * scale,
        )
        for i in scene.items
    )
    return Scene(items, scene.relation, scene.stretch)
