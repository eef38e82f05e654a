"""The procedural world that the embedded model learns from: its things, their captions, their images, the batches."""

import math

import numpy as np
import pytest
import torch

from dream_fast.engine.dream_mini import dataset
from dream_fast.engine.dream_mini.captions import BORDER, caption, view_of
from dream_fast.engine.dream_mini.catalogue import (
    ATTRIBUTES,
    COLOR_SYNONYMS,
    COLORS,
    HELD_OUT_PAIRS,
    PATTERNS,
    RELATIONS,
    SHADES,
    THINGS,
    UNTEXTURED,
    VIEWS,
    vocabulary,
)
from dream_fast.engine.dream_mini.compose import any_scene, build, make_pair, make_scene
from dream_fast.engine.dream_mini.objects import RECIPES
from dream_fast.engine.dream_mini.parts import PARTS, add_part, can_have
from dream_fast.engine.dream_mini.scenes import (
    CUT,
    KINDS,
    MAIN,
    RADIUS,
    Item,
    Primitive,
    Scene,
    bounding_points,
    rotation,
)
from dream_fast.engine.dream_mini.sphere_tracer import pack, render
from dream_fast.engine.dream_mini.vocabulary import Vocabulary
from dream_fast.engine.scene.camera import make_cameras, rays

FACES = [name for name, thing in THINGS.items() if thing.face]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- scenes


def test_catalogue() -> None:
    """The catalogue has enough of each kind, and its names fit together."""
    assert len(THINGS) >= 100 and len(FACES) >= 25 and len(COLORS) >= 16 and len(PARTS) >= 6 and len(RELATIONS) >= 4
    assert set(RECIPES) == set(THINGS)
    for relation in RELATIONS.values():
        assert {*relation.guests, *relation.places} <= set(THINGS)
    for first, relation, second in HELD_OUT_PAIRS:
        assert first in RELATIONS[relation].guests and second in RELATIONS[relation].places
    assert all(color in COLORS or color in SHADES for thing in THINGS.values() for color in thing.natural or ())


@pytest.mark.parametrize("name", THINGS)
def test_recipe(name: str) -> None:
    """Every thing, with every chance that its recipe takes, can be built, is finite, and lies in the sphere."""
    scenes = [make_scene(generator(seed), name) for seed in range(12)]
    for scene in scenes:
        points = bounding_points(scene.primitives) * np.array(scene.stretch)
        assert 0.9 * RADIUS <= np.linalg.norm(points, axis=1).max() <= 1.001 * RADIUS
        assert all(math.isfinite(v) for p in scene.primitives for v in (*p.size, *p.center, *p.color))
        assert all(v > 0 for p in scene.primitives for v in p.size[:2])
        assert any(p.role == MAIN for p in scene.primitives)
    assert len({tuple(scene.primitives[0].center) + scene.primitives[0].size for scene in scenes}) == 12


def test_make_scene() -> None:
    """A seed repeats a scene; given properties are those of the scene."""
    first, again = (make_scene(generator(4)) for _ in range(2))
    assert (first.name, first.color, first.attribute) == (again.name, again.color, again.attribute)
    assert all(np.array_equal(p.center, q.center) for p, q in zip(first.primitives, again.primitives, strict=True))
    asked = [make_scene(generator(seed), "cat", "purple", plain=True).items[0] for seed in range(30)]
    assert {(i.name, i.color, i.attribute, i.part) for i in asked} == {("cat", "purple", None, None)}
    body = [next(p.color for p in item.primitives if p.role == MAIN) for item in asked]
    assert np.abs(np.array(body) - COLORS["purple"]).max() < 0.12
    free = [make_scene(generator(seed)).items[0] for seed in range(500)]
    assert {i.attribute for i in free} == {None, *ATTRIBUTES} and {i.color for i in free} == {None, *COLORS}
    assert {i.part[0] for i in free if i.part} == set(PARTS)


@pytest.mark.parametrize("kind", PARTS)
def test_add_part(kind: str) -> None:
    """A part is added in its colour; a thing without the anchor refuses it."""
    bearers = [name for name in THINGS if can_have(build(generator(), name, "white")[0], kind)]
    assert len(bearers) >= 4
    for name in bearers:
        plain = make_scene(generator(1), name, "white", plain=True)
        dressed = make_scene(generator(1), name, "white", plain=True, part=(kind, "lime"))
        added = len(dressed.primitives) - len(plain.primitives)
        lime = sum(np.allclose(p.color, COLORS["lime"]) for p in dressed.primitives)
        assert added >= 2 and lime >= 1
    with pytest.raises(ValueError, match=kind):
        add_part(build(generator(), "banana", None)[0], kind, "red")


def test_make_scene_stretches() -> None:
    """Tall and wide things have other proportions."""

    def height_to_width(attribute: str | None) -> float:
        scenes = [make_scene(generator(seed), "house", plain=True, attribute=attribute) for seed in range(10)]
        sizes = [np.ptp(bounding_points(s.primitives) * np.array(s.stretch), axis=0) for s in scenes]
        return float(np.mean([size[1] / size[0] for size in sizes]))

    assert height_to_width("tall") > 1.2 * height_to_width(None) > 1.2**2 * height_to_width("wide")


def box_of(item: Item) -> tuple[np.ndarray, np.ndarray]:
    points = bounding_points(item.primitives)
    return points.min(0), points.max(0)


@pytest.mark.parametrize("relation", RELATIONS)
def test_make_pair(relation: str) -> None:
    """The boxes of two things fit their relation."""
    for seed in range(25):
        scene = make_pair(generator(seed), relation, plain=True)
        (low, high), (floor, ceiling) = (box_of(item) for item in scene.items)
        middle = (low + high) / 2
        match relation:
            case "on":
                assert low[1] > floor[1] + 0.02 and (floor < middle)[[0, 2]].all() and (middle < ceiling)[[0, 2]].all()
            case "under":
                assert middle[1] < ceiling[1] - 0.1 and high[1] < ceiling[1]
            case "in":
                assert high[1] > floor[1] + 0.5 * (ceiling - floor)[1] and low[1] > floor[1]
            case "beside":
                assert high[0] < floor[0] or low[0] > ceiling[0]
                assert abs(low[1] - floor[1]) < 1e-6


def test_make_pair_holds_out() -> None:
    """Held-out pairs are never drawn, but built when named."""
    drawn = set()
    for seed in range(3000):
        relation = list(RELATIONS)[seed % len(RELATIONS)]
        rng = generator(seed)
        drawn.add(tuple(_names_of_pair(rng, relation)))
    assert len(drawn) > 800 and not drawn & HELD_OUT_PAIRS
    scene = make_pair(generator(), "on", "cat", "chair", plain=True)
    assert [item.name for item in scene.items] == ["cat", "chair"]
    with pytest.raises(ValueError):
        make_pair(generator(), "on", "cat", "banana")


def _names_of_pair(rng: np.random.Generator, relation: str) -> list[str]:
    from dream_fast.engine.dream_mini.compose import draw_pair

    first, second = draw_pair(rng, relation, None, None)
    return [first, relation, second]


# --- captions


@pytest.mark.parametrize(
    ("polar", "azimuth", "view"),
    [
        (75, 0, "front"), (75, -44, "front"), (75, 361, "front"), (75, 46, "side"), (75, -90, "side"),
        (75, 134, "side"), (75, 136, "back"), (75, -180, "back"), (75, 180, "back"), (30, 0, "overhead"),
        (5, 170, "overhead"), (31, 0, "front"),
    ],
)  # fmt: skip
def test_view_of(polar: float, azimuth: float, view: str) -> None:
    """The word for a camera's view."""
    assert view_of(polar, azimuth) == view


def test_view_of_borders() -> None:
    """Within some degrees of a border either word occurs."""

    def seen(azimuth: float) -> set[str]:
        return {view_of(75, azimuth, rng=generator(seed)) for seed in range(60)}

    assert seen(44) == seen(46) == {"front", "side"} and seen(39) == {"front"} and seen(51) == {"side"}
    assert seen(134) == seen(136) == {"side", "back"} and seen(129) == {"side"} and seen(141) == {"back"}


def test_caption() -> None:
    """A caption names what the scene has, in known words."""
    rng, known = generator(), Vocabulary(vocabulary())
    shares = np.full(len(THINGS), 1 / len(THINGS))
    written = set()
    for _ in range(300):
        scene, view = any_scene(rng, list(THINGS), shares), (*VIEWS, None)[rng.integers(5)]
        text = caption(scene, view, rng)
        written.add(text)
        assert known.check_prompt(text) == []
        assert known.find_object(text) in {item.name for item in scene.items}
        assert text.endswith(f", {view} view") if view else "view" not in text
        for item in scene.items:
            assert item.attribute is None or f" {item.attribute} " in f" {text}"
            assert item.part is None or text.count(item.part[0]) >= 1
            spellings = [item.color, *(s for s, color in COLOR_SYNONYMS.items() if color == item.color)]
            assert item.color is None or any(word in text.split() for word in spellings)
    assert any(text.startswith("a photo of an ") for text in written)
    assert any("wearing" in text for text in written) and any(" grey " in text for text in written)


def test_caption_untextured() -> None:
    """An untextured image's caption has no colour and no pattern."""
    rng, colors = generator(), {*COLORS, *COLOR_SYNONYMS}
    for _ in range(200):
        scene = make_scene(rng)
        text = caption(scene, None, rng, untextured=True)
        assert UNTEXTURED in text and not colors & set(text.split()) and not set(PATTERNS) & set(text.split())


# --- images


def primitive(kind: str, size: tuple[float, ...], center=(0, 0, 0), tilt=(0, 0, 0), role=MAIN) -> Primitive:
    return Primitive(kind, np.array(center, float), rotation(tilt), size, np.array([1.0, 0, 0]), role)


def scene_of(*primitives: Primitive, pattern: str | None = None, stretch=(1.0, 1.0, 1.0)) -> Scene:
    return Scene((Item("test", None, pattern, None, primitives),), None, stretch)


def views(scenes, azimuth, side: int, *, shading=0, light=(0.0, 0.0, 0.0), background=1.0) -> torch.Tensor:
    """Images [N, side, side, 3] without ambient light."""
    n = len(scenes)
    cameras = make_cameras(
        *(torch.full((n,), v) for v in (80.0,)), torch.tensor(azimuth), *(torch.full((n,), v) for v in (3.2, 20.0))
    )
    return render(
        pack(scenes, "cpu"), cameras, side, shading=torch.full((n,), shading), ambient=torch.zeros(n),
        light_noise=torch.tensor(light).expand(n, 3), background=torch.full((n, 3), background), supersample=1,
    )  # fmt: skip


def count(image: torch.Tensor, color: tuple[float, float, float]) -> int:
    return int(((image - torch.tensor(color)).abs().amax(-1) < 0.03).sum())


def test_rotation() -> None:
    """Rotations are about x, then y, then z."""
    assert np.allclose(rotation((90, 0, 0))[1], [0, 0, 1])  # up leans to the front
    assert np.allclose(rotation((0, 90, 0))[2], [1, 0, 0])
    assert np.allclose(rotation((0, 0, 90))[0], [0, 1, 0])
    assert np.allclose(rotation((90, 0, 90))[1], [0, 0, 1]) and np.allclose(rotation((90, 90, 0))[1], [1, 0, 0])


@pytest.mark.parametrize(
    ("name", "part"),
    [("duck", "beak"), ("penguin", "white"), ("robot", "cyan"), ("pig", "rose"), ("astronaut", "skin")],
)
def test_front_is_plus_z(name: str, part: str) -> None:
    """Marks of the front show at azimuth 0 and not at 180."""
    scene = make_scene(generator(1), name, "green", plain=True)
    front, back = views([scene] * 2, [0.0, 180.0], 24)
    color = SHADES.get(part) or COLORS[part]
    assert count(front, color) >= 2 and count(back, color) == 0
    body = next(p.color for p in scene.primitives if p.role == MAIN)
    assert count(front, tuple(body)) >= 25 and count(back, tuple(body)) >= 25


@pytest.mark.parametrize("name", FACES)
def test_faces_look_forward(name: str) -> None:
    """Dark pupils or their white show from the front; from behind less of them does."""
    scene = make_scene(generator(1), name, "blue", plain=True)
    front, back = views([scene] * 2, [0.0, 180.0], 32)
    eyes = {"ghost": ("dark",), "cow": ("white",)}.get(name, ("dark", "white"))  # a ghost is white, a cow has spots
    colors = [SHADES.get(eye) or COLORS[eye] for eye in eyes]
    assert sum(count(front, color) for color in colors) > sum(count(back, color) for color in colors)


def test_render_light() -> None:
    """Shading is the cosine to the light, which is at the camera or beside it."""
    radius = 0.45
    ball = primitive("ball", (radius,) * 3)
    (lit,) = views([scene_of(ball)], [0.0], 25, shading=2)[..., 0]
    camera = make_cameras(*(torch.tensor([v]) for v in (80.0, 0.0, 3.2, 20.0)))
    origins, directions = (r[0] for r in rays(camera, 25, 25))
    b = (origins * directions).sum(-1)
    root = b**2 - (origins**2).sum(-1) + radius**2
    surface = origins + directions * (-b - root.clamp(min=0).sqrt())[:, None]
    facing = (surface / radius) @ torch.nn.functional.normalize(camera.c2w[0, :3, 3], dim=0)
    well_inside = root > 0.02
    assert well_inside.sum() > 250
    assert (lit.flatten() - facing)[well_inside].abs().max() < 0.01  # the light stands at the camera
    assert (lit.flatten()[root < -0.02] == 1).all()  # background
    side = views([scene_of(ball)], [0.0], 25, shading=2, light=(30.0, 0.0, 0.0))[0, ..., 0]
    assert side[12, 18] > 0.5 > side[12, 6]  # light from +x is light from the right


@pytest.mark.parametrize("pattern", PATTERNS)
def test_render_patterns(pattern: str) -> None:
    """A pattern covers a part of the surface."""
    ball = primitive("ball", (0.45,) * 3)
    plain, painted = (count(views([scene_of(ball, pattern=p)], [20.0], 24)[0], (1.0, 0, 0)) for p in (None, pattern))
    assert 0.2 * plain < painted < 0.95 * plain


def test_render_stretched() -> None:
    """A ball stretched upwards is hit where the ellipsoid of those radii is, with its normals."""
    scene = scene_of(primitive("ball", (0.3,) * 3), stretch=(1.0, 1.5, 1.0))
    lit = views([scene], [0.0], 41, shading=2)[0, ..., 0]
    other = views([scene_of(primitive("ball", (0.3, 0.45, 0.3)))], [0.0], 41, shading=2)[0, ..., 0]
    assert (lit - other).abs().mean() < 0.01


class Here:
    """A pool of workers that works at once and in this process."""

    def submit(self, function, *arguments):
        result = function(*arguments)
        return type("Job", (), {"result": lambda self: result})()


@pytest.fixture
def few(monkeypatch) -> None:
    monkeypatch.setattr(dataset, "BATCH", 4)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rendered(few: None) -> None:
    """Batches repeat by their seed; the first views of a group are 90 degrees apart."""
    drawn = list(dataset.rendered(5, 1, 1, 16, torch.device("cpu"), Here(), grouped=True))
    assert len(drawn) == 1 + dataset.GROUP
    again = next(dataset.rendered(5, 1, 1, 16, torch.device("cpu"), Here(), grouped=True))
    assert torch.equal(again.images, drawn[0].images) and again.captions == drawn[0].captions
    for batch in drawn:
        assert batch.images.shape == (4, 16, 16, 3) and batch.images.dtype == torch.uint8
        assert batch.images.float().std(dim=(1, 2)).sum(-1).min() > 10  # something is there
        assert all(len(texts) == dataset.CAPTIONS and "view" not in texts[-1] for texts in batch.captions)
    assert np.array_equal(drawn[0].labels[:, :2], drawn[1].labels[:, :2])  # the same things from elsewhere
    turned = (drawn[1].cameras[:, 1] - drawn[0].cameras[:, 1]) % 360
    assert np.allclose(turned, 90, atol=1e-3) and np.array_equal(
        drawn[0].cameras[:, [0, 2, 3]], drawn[3].cameras[:, [0, 2, 3]]
    )
    assert not torch.equal(drawn[0].images, drawn[1].images)


def test_labels(few: None, monkeypatch) -> None:
    """Labels and captions name the same things, colours and views."""
    monkeypatch.setattr(dataset, "BATCH", 300)
    _, paint, ((camera, shading, _, captions, labels),) = dataset._draw(1, 1, False)
    known = Vocabulary(vocabulary())
    assert paint.shape == (300, 3)
    certain = 0
    for (polar, azimuth, *_), shade, texts, row, mine in zip(camera.T, shading, captions, labels, paint, strict=True):
        told = dataset.Labels(*row)
        name = list(THINGS)[told.object]
        if told.relation == dataset.NONE:
            assert all(known.find_object(text) == name for text in texts)
        if told.color != dataset.NATURAL:
            assert np.abs(mine - list(COLORS.values())[told.color]).max() < 0.2
        assert VIEWS[told.view] == view_of(polar, azimuth)
        assert (shade == dataset.TEXTURELESS) == (UNTEXTURED in texts[0])
        if abs(abs(abs(azimuth) - 90) - 45) > BORDER:  # nearer to a border a caption may call it either
            certain += 1
            assert texts[0].endswith(f", {VIEWS[told.view]} view")
    assert certain > 150 and len(set(labels[:, 2])) == len(VIEWS)


def test_recipes_use_all_kinds() -> None:
    """Recipes use every kind of primitive, and cuts."""
    used = {p.kind for name in THINGS for p in make_scene(generator(), name).primitives}
    assert used == set(KINDS)
    assert any(p.role == CUT for name in THINGS for p in make_scene(generator(), name).primitives)
