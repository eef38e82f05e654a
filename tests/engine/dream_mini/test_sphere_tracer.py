"""The sphere tracer: distances of primitives, cuts, views, light and patterns."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import trimesh

from dream_fast.bench.accuracy import check
from dream_fast.engine.dream_mini.scenes import Primitive, Scene, make_scene, rotation
from dream_fast.engine.dream_mini.sphere_tracer import distance, pack
from dream_fast.engine.dream_mini.vocabulary import COLORS, SHADES, THINGS
from dream_fast.engine.scene.camera import rays


def scene_of(*primitives: Primitive, pattern: str | None = None) -> Scene:
    return Scene("test", None, pattern, None, primitives)


def primitive(kind: str, size: tuple[float, ...], center=(0, 0, 0), tilt=(0, 0, 0), main=True, cut=False) -> Primitive:
    return Primitive(kind, np.array(center, float), rotation(tilt), size, np.array([1.0, 0, 0]), main, cut)


def measured(points: np.ndarray, *primitives: Primitive) -> np.ndarray:
    packed, _ = pack([scene_of(*primitives)], "cpu")
    return distance(torch.from_numpy(points.astype(np.float32))[None], packed)[0].numpy()


@pytest.fixture
def points() -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.9, 0.9, (4000, 3))


def rounded_box(x: np.ndarray, half: tuple[float, ...], edge: float) -> np.ndarray:
    q = np.abs(x) - np.array(half) + edge
    return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0) - edge


def rounded_frustum(x: np.ndarray, r0: float, r1: float, h: float, edge: float) -> np.ndarray:
    """Distance to the half profile (0, -h) (r0, -h) (r1, h) (0, h) in the plane of axis and point."""
    r0, r1, h = r0 - edge, r1 - edge, h - edge
    q = np.stack([np.hypot(x[:, 0], x[:, 2]), x[:, 1]], 1)
    corners = np.array([(0, -h), (r0, -h), (r1, h), (0, h)])
    nearest = np.full(len(x), np.inf)
    for a, b in pairwise(corners):
        along = np.clip((q - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
        nearest = np.minimum(nearest, np.linalg.norm(q - a - along[:, None] * (b - a), axis=1))
    wall = (r0 - q[:, 0]) * 2 * h + (r1 - r0) * (q[:, 1] + h)  # > 0 on the axis' side
    return np.where((np.abs(q[:, 1]) < h) & (wall > 0), -nearest, nearest) - edge


@pytest.mark.parametrize(
    ("kind", "size", "exact"),
    [
        ("ball", (0.4, 0.4, 0.4), lambda x: np.linalg.norm(x, axis=1) - 0.4),
        ("box", (0.3, 0.2, 0.4, 0.0, 1.0, 1.0), lambda x: rounded_box(x, (0.3, 0.2, 0.4), 0.0)),
        ("box", (0.3, 0.2, 0.4, 0.05, 1.0, 1.0), lambda x: rounded_box(x, (0.3, 0.2, 0.4), 0.05)),
        ("cone", (0.3, 0.3, 0.4, 0.0), lambda x: rounded_frustum(x, 0.3, 0.3, 0.4, 0.0)),
        ("cone", (0.4, 0.1, 0.3, 0.0), lambda x: rounded_frustum(x, 0.4, 0.1, 0.3, 0.0)),
        ("cone", (0.15, 0.45, 0.3, 0.04), lambda x: rounded_frustum(x, 0.15, 0.45, 0.3, 0.04)),
        ("ring", (0.4, 0.1), lambda x: np.hypot(np.hypot(x[:, 0], x[:, 2]) - 0.4, x[:, 1]) - 0.1),
    ],
)
def test_distance_of_a_primitive_is_exact(
    points: np.ndarray, kind: str, size: tuple[float, ...], exact: Callable[[np.ndarray], np.ndarray]
) -> None:
    center, turn = np.array([0.1, -0.2, 0.05]), (20, -35, 60)
    moved = (points - center) @ rotation(turn).T
    for got, at in (
        (measured(points, primitive(kind, size)), points),
        (measured(points, primitive(kind, size, center, turn)), moved),
    ):
        check(kind, *(torch.from_numpy(one) for one in (got, exact(at.astype(np.float32)), exact(at))))


def test_rotation_order() -> None:
    """Against trimesh's rotations by Euler angles about fixed axes; of a row vector, so transposed."""
    for angles in ((90, 0, 0), (0, 90, 0), (0, 0, 90), (90, 0, 90), (90, 90, 0), (20, -35, 60)):
        exact = trimesh.transformations.euler_matrix(*np.radians(angles), "sxyz")[:3, :3].T
        exact = torch.from_numpy(exact)
        check(str(angles), torch.from_numpy(np.asarray(rotation(angles))), exact, exact)


def test_distance_of_stretched_primitives(points: np.ndarray) -> None:
    """Their distances are inexact off the surface, so the tracer takes shorter steps."""
    radii = np.array([0.2, 0.5, 0.35])
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    ball = primitive("ball", tuple(radii))
    there = torch.from_numpy(measured(unit * radii, ball))
    check("on the ball", there, torch.zeros_like(there), torch.zeros_like(there, dtype=torch.float64))
    assert (measured(0.9 * unit * radii, ball) < 0).all() and (measured(1.1 * unit * radii, ball) > 0).all()
    box = primitive("box", (0.4, 0.3, 0.2, 0.0, 0.5, 1.0))
    width = 0.4 * (1 - 0.5 * (points[:, 1] + 0.3) / 0.6)
    inside = (np.abs(points[:, 1]) < 0.3) & (np.abs(points[:, 2]) < 0.2) & (np.abs(points[:, 0]) < width)
    assert inside.sum() > 50 and np.array_equal(measured(points, box) < 0, inside)


def test_a_cut_takes_away_from_main_parts_only(points: np.ndarray) -> None:
    main, other = primitive("ball", (0.5, 0.5, 0.5)), primitive("ball", (0.1, 0.1, 0.1), (0.3, 0, 0), main=False)
    hole = primitive("box", (0.2, 0.9, 0.9, 0, 1, 1), (0.3, 0, 0), main=False, cut=True)
    d_main, d_other, d_hole = (measured(points, p) for p in (main, other, hole._replace(cut=False)))
    together = measured(points, main, other, hole)
    assert np.array_equal(together, np.minimum(np.maximum(d_main, -d_hole), d_other))
    inside = torch.from_numpy(measured(np.array([[0.3, 0.0, 0.0], [0.3, 0.2, 0.0]]), main, other, hole))
    exact = torch.tensor([-0.1, 0.1], dtype=torch.float64)  # in the other part, and in the hole
    check("inside", inside, exact.float(), exact)


def count(image: torch.Tensor, color: tuple[float, float, float]) -> int:
    return int(((image - torch.tensor(color)).abs().amax(-1) < 0.03).sum())


@pytest.mark.parametrize(
    ("name", "part"), [("duck", "beak"), ("penguin", "white"), ("robot", "cyan"), ("cat", "dark"), ("pig", "rose")]
)
def test_the_front_faces_plus_z(name: str, part: str, views) -> None:
    scene = make_scene(np.random.default_rng(1), name, "green", plain=True)
    front, back = views([scene] * 2, [0.0, 180.0], 24)
    color = SHADES.get(part) or COLORS[part]
    assert count(front, color) >= 2 and count(back, color) == 0
    body = next(p.color for p in scene.primitives if p.main)
    assert count(front, tuple(body)) >= 30 and count(back, tuple(body)) >= 30


def test_every_face_looks_to_the_front(views) -> None:
    faces = [name for name, thing in THINGS.items() if thing.face]
    scenes = [make_scene(np.random.default_rng(1), name, "blue", plain=True) for name in faces]
    images = views(scenes * 2, [0.0] * len(faces) + [180.0] * len(faces), 32)
    for name, front, back in zip(faces, *images.chunk(2), strict=True):
        eye = COLORS["white"] if name == "robot" else SHADES["dark"]  # its hands are dark too
        assert count(front, eye) >= 2 and count(back, eye) == 0, name


def test_light_and_patterns(views, cameras) -> None:
    radius = 0.45
    ball = primitive("ball", (radius,) * 3)
    (lit,) = views([scene_of(ball)], [0.0], 25, shading=2)[..., 0]
    camera = cameras([0.0])
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

    patterns = [scene_of(ball, pattern=pattern) for pattern in (None, "striped", "spotted")]
    plain, striped, spotted = (count(image, (1.0, 0.0, 0.0)) for image in views(patterns, [0.0] * 3, 24))
    assert 0.2 * plain < striped < 0.8 * plain and 0.2 * plain < spotted < 0.95 * plain
