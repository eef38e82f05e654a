"""The procedural world: an object is a union of signed-distance primitives with random proportions.

Axes: y up, the front faces +z. A finished object lies inside the sphere |x| <= RADIUS around the origin.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dream_fast.engine.dream_mini.vocabulary import COLORS, SHADES, THINGS

RADIUS = 0.5
KINDS = ("ball", "box", "cone", "ring")
PATTERNS = ("plain", "striped", "spotted")


class Primitive(NamedTuple):
    """A primitive. size: (rx, ry, rz), (hx, hy, hz, round, top_x, top_z), (r0, r1, h, round) or (R, r)."""

    kind: str
    center: np.ndarray  # [3]
    rotation: np.ndarray  # [3, 3], rows are the local axes
    size: tuple[float, ...]
    color: np.ndarray  # [3]
    main: bool  # has the colour and pattern of the object
    cut: bool  # subtracted from the union


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    """Rotation about x, then y, then z by degrees; rows are the rotated axes, so that `rotation @ x` is local."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return (about_z @ about_y @ about_x).T


@dataclass
class Builder:
    """Collects the primitives of an object; the unit of length is arbitrary."""

    rng: np.random.Generator
    main: np.ndarray  # [3] the colour of the object
    primitives: list[Primitive] = field(default_factory=list)
    head: tuple[float, float, float, float] | None = None  # x, y, z of the top of the head, and its radius

    def u(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def ball(self, x, y, z, rx, ry=None, rz=None, color="main", tilt=(0, 0, 0), cut=False):
        self._add("ball", (x, y, z), (rx, ry or rx, rz or rx), color, rotation(tilt), cut)

    def box(self, x, y, z, hx, hy, hz, color="main", round=0.02, top=(1, 1), tilt=(0, 0, 0), cut=False):
        self._add("box", (x, y, z), (hx, hy, hz, round, *top), color, rotation(tilt), cut)

    def cone(self, x, y, z, r0, r1, h, color="main", round=0.01, tilt=(0, 0, 0), cut=False):
        """A cylinder or frustum along y of half-height h, radius r0 below and r1 above."""
        self._add("cone", (x, y, z), (r0, r1, h, round), color, rotation(tilt), cut)

    def ring(self, x, y, z, radius, thickness, color="main", tilt=(0, 0, 0)):
        self._add("ring", (x, y, z), (radius, thickness), color, rotation(tilt), False)

    def limb(self, start, end, r0, r1=None, color="main"):
        """A frustum from start to end with rounded ends."""
        start, end = np.asarray(start, float), np.asarray(end, float)
        length = np.linalg.norm(end - start)
        y = (end - start) / length
        x = np.cross(y, [0, 0, 1] if abs(y[2]) < 0.9 else [1, 0, 0])
        x /= np.linalg.norm(x)
        axes = np.stack([x, y, np.cross(x, y)])
        r1 = r1 or r0
        self._add("cone", (start + end) / 2, (r0, r1, length / 2, 0.4 * min(r0, r1)), color, axes, False)

    def eyes(self, y, z, dx, size):
        """Dark pupils of radius `size` before white balls, which show on a head of any colour."""
        for side in (-1, 1):
            self.ball(side * dx, y, z, 1.6 * size, 1.6 * size, 1.1 * size, "white")
            self.ball(side * 0.97 * dx, y, z + 0.7 * size, size, size, 0.7 * size, "dark")

    def _add(self, kind, center, size, color, axes, cut):
        rgb = self.main if color == "main" else np.array(COLORS.get(color) or SHADES[color])
        size = tuple(float(v) for v in size)
        self.primitives.append(
            Primitive(kind, np.asarray(center, float), axes, size, np.asarray(rgb, float), color == "main", cut)
        )


@dataclass(frozen=True)
class Scene:
    """An object and the attributes that a caption may name."""

    name: str
    color: str | None  # a key of COLORS when the colour was chosen, None when it is the natural one
    attribute: str | None  # tall | wide | striped | spotted
    hat: str | None  # colour of its hat
    primitives: tuple[Primitive, ...]

    @property
    def pattern(self) -> int:
        return PATTERNS.index(self.attribute) if self.attribute in PATTERNS else 0


def make_scene(rng: np.random.Generator, name: str | None = None, color: str | None = None, plain=False) -> Scene:
    """Make a random object, of a given `name` and `color` if set; `plain`: without attributes and hats."""
    from dream_fast.engine.dream_mini.objects import RECIPES

    name = name or list(THINGS)[rng.integers(len(THINGS))]
    natural = THINGS[name].natural
    if color is None and rng.random() < (0.3 if natural else 0.1):
        shade = list(COLORS)[rng.integers(len(COLORS))] if natural is None else natural[rng.integers(len(natural))]
    else:
        color = shade = color or list(COLORS)[rng.integers(len(COLORS))]
    rgb = np.clip(np.array(COLORS.get(shade) or SHADES[shade]) * rng.uniform(0.93, 1.07) + rng.normal(0, 0.02, 3), 0, 1)
    builder = Builder(rng, rgb)
    RECIPES[name](builder)
    attribute = None
    if not plain and rng.random() < 0.25:
        attribute = ("tall", "wide", "striped", "spotted")[rng.integers(4)]
    hat = None
    if not plain and builder.head and rng.random() < 0.2:
        hat = list(COLORS)[rng.integers(len(COLORS))]
        x, y, z, radius = builder.head
        builder.cone(x, y, z, 1.25 * radius, 1.25 * radius, 0.08 * radius, hat)
        builder.cone(x, y + 0.5 * radius, z, 0.75 * radius, 0.7 * radius, 0.5 * radius, hat)
    return Scene(name, color, attribute, hat, _normalise(builder, attribute, rng))


def _normalise(builder: Builder, attribute: str | None, rng: np.random.Generator) -> tuple[Primitive, ...]:
    """Stretch tall and wide objects, then centre the object and scale it into the sphere of RADIUS."""
    stretch = np.ones(3)
    if attribute == "tall":
        stretch[1] = rng.uniform(1.35, 1.6)
    if attribute == "wide":
        stretch[[0, 2]] = rng.uniform(1.3, 1.5)
    primitives = [_stretch(p, stretch) for p in builder.primitives]
    points = np.concatenate([_corners(p) for p in primitives if not p.cut])
    center = (points.min(0) + points.max(0)) / 2
    scale = RADIUS * rng.uniform(0.9, 1.0) / np.linalg.norm(points - center, axis=1).max()
    return tuple(p._replace(center=(p.center - center) * scale, size=_scale(p.kind, p.size, scale)) for p in primitives)


def _scale(kind: str, size: tuple[float, ...], scale: float) -> tuple[float, ...]:
    if kind == "box":
        return tuple(scale * v for v in size[:4]) + size[4:]
    return tuple(scale * v for v in size)


def _stretch(p: Primitive, stretch: np.ndarray) -> Primitive:
    """Stretch along the world axes, as far as the primitive can follow (round ones keep round sections)."""
    if (stretch == 1).all():
        return p
    sx, sy, sz = np.linalg.norm(p.rotation * stretch, axis=1)  # along each local axis
    across = np.sqrt(sx * sz)
    size: tuple[float, ...]
    match p.kind:
        case "ball":
            size = (p.size[0] * sx, p.size[1] * sy, p.size[2] * sz)
        case "box":
            size = (p.size[0] * sx, p.size[1] * sy, p.size[2] * sz, *p.size[3:])
        case "cone":
            size = (p.size[0] * across, p.size[1] * across, p.size[2] * sy, p.size[3])
        case _:
            size = (p.size[0] * across, p.size[1] * min(across, sy))
    return p._replace(center=p.center * stretch, size=size)


def _corners(p: Primitive) -> np.ndarray:
    """Points on the primitive that bound it: [*, 3]."""
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    circle = np.stack([np.cos(turn), 0 * turn, np.sin(turn)], 1)
    match p.kind:
        case "ball":
            latitude = np.radians([-90, -45, 0, 45, 90])[:, None, None]
            unit = circle * np.cos(latitude) + np.array([0, 1, 0]) * np.sin(latitude)
            local = unit.reshape(-1, 3) * p.size
        case "box":
            hx, hy, hz, _, top_x, top_z = p.size
            corners = [(x * (top_x if y > 0 else 1), y, z * (top_z if y > 0 else 1)) for x, y, z in _SIGNS]
            local = np.array(corners) * (hx, hy, hz)
        case "cone":
            r0, r1, h, _ = p.size
            local = np.concatenate([circle * r0 - [0, h, 0], circle * r1 + [0, h, 0]])
        case _:
            local = circle * (p.size[0] + p.size[1])
            local = np.concatenate([local + [0, p.size[1], 0], local - [0, p.size[1], 0]])
    return local @ p.rotation + p.center


_SIGNS = [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
