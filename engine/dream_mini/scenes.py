"""The procedural world: a thing is a union of signed-distance primitives, made by a recipe with random proportions.

Axes as everywhere: y up, the front faces +z. A finished scene lies inside the sphere |x| <= RADIUS around the origin.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dream_fast.engine.dream_mini.catalogue import COLORS, SHADES

RADIUS = 0.5
KINDS = ("ball", "box", "cone", "ring", "limb", "arc")
MAIN, OTHER, CUT = 1, 2, 3  # roles of a primitive: the thing's own colour, another colour, taken away from the former
_LENGTHS = {"ball": 3, "box": 4, "cone": 4, "ring": 2, "limb": 3, "arc": 2}  # leading numbers of a size that scale


class Primitive(NamedTuple):
    """A primitive in its local axes, y being the axis of those that have one.

    Sizes: ball (rx, ry, rz); box (hx, hy, hz, round, top_x, top_z), tapered towards its top; cone (r0, r1, h, round), a
    frustum of half height h; ring (R, r); limb (r0, r1, h), balls of r0 at the origin and r1 at (0, h, 0) and what
    lies between; arc (R, r, a), the part of a ring in the xy plane within a radians of +y.
    """

    kind: str
    center: np.ndarray  # [3]
    rotation: np.ndarray  # [3, 3], rows are the local axes
    size: tuple[float, ...]
    color: np.ndarray  # [3]
    role: int

    @property
    def main(self) -> bool:
        """True: it has the thing's own colour."""
        return self.role == MAIN

    @property
    def cut(self) -> bool:
        """True: it is taken away."""
        return self.role == CUT


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    """Rotation about x, then y, then z by degrees; rows are the rotated axes, so that `rotation @ x` is local."""
    if degrees == (0, 0, 0):
        return np.eye(3)
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return (about_z @ about_y @ about_x).T


@dataclass
class Builder:
    """Collects the primitives of one thing; recipes call its methods in any unit of length.

    `blend` is the length over which primitives of the main colour flow into one another. The anchors are where parts
    and other things go; a thing without one takes none.
    """

    rng: np.random.Generator
    main: np.ndarray  # [3] the thing's own colour
    primitives: list[Primitive] = field(default_factory=list)
    blend: float = 0.0
    head: tuple[float, float, float, float] | None = None  # x, y, z of the top of the head, and its radius
    gaze: tuple[float, float, float, float] | None = None  # height, depth, half distance and radius of the eyes
    neck: tuple[float, float, float, float, float] | None = None  # x, y, z, radius, degrees of lean to the front
    back: tuple[float, float, float, float] | None = None  # x, y, z of the surface of the back, half width
    pole: tuple[float, float, float] | None = None  # where a flag stands
    seat: tuple[float, float, float, float] | None = None  # x, y, z and half width of a flat place
    shelter: tuple[float, float, float, float] | None = None  # floor's x, y, z and the height of free room
    mouth: tuple[float, float, float] | None = None  # y of the rim, radius of the opening, depth

    def u(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def one_of(self, *choices):
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def ball(self, x, y, z, rx, ry=None, rz=None, color="main", tilt=(0, 0, 0), cut=False):
        self._add("ball", (x, y, z), (rx, ry or rx, rz or rx), color, rotation(tilt), cut)

    def box(self, x, y, z, hx, hy, hz, color="main", round=0.02, top=(1, 1), tilt=(0, 0, 0), cut=False):
        self._add("box", (x, y, z), (hx, hy, hz, min(round, hx, hy, hz), *top), color, rotation(tilt), cut)

    def cone(self, x, y, z, r0, r1, h, color="main", round=0.01, tilt=(0, 0, 0), cut=False):
        """A cylinder or frustum along y of half-height h, radius r0 below and r1 above."""
        self._add("cone", (x, y, z), (r0, r1, h, min(round, 0.9 * h, max(r0, r1))), color, rotation(tilt), cut)

    def ring(self, x, y, z, radius, thickness, color="main", tilt=(0, 0, 0), cut=False):
        self._add("ring", (x, y, z), (radius, thickness), color, rotation(tilt), cut)

    def arc(self, x, y, z, radius, thickness, degrees, color="main", tilt=(0, 0, 0)):
        """The part of a ring in the xy plane within so many degrees of +y."""
        self._add("arc", (x, y, z), (radius, thickness, np.radians(degrees)), color, rotation(tilt), False)

    def limb(self, start, end, r0, r1=None, color="main"):
        """A rounded cone from a ball of radius r0 at start to one of r1 at end."""
        start, end = np.asarray(start, float), np.asarray(end, float)
        length = np.linalg.norm(end - start)
        y = (end - start) / length
        x = np.cross(y, [0, 0, 1] if abs(y[2]) < 0.9 else [1, 0, 0])
        x /= np.linalg.norm(x)
        r1 = r1 or r0
        if abs(r0 - r1) > 0.95 * length:
            raise ValueError(f"a limb of length {length:.3g} cannot end in radii {r0:.3g} and {r1:.3g}")
        self._add("limb", start, (r0, r1, length), color, np.stack([x, y, np.cross(x, y)]), False)

    def path(self, points, radii, color="main"):
        """Limbs along points; one radius each."""
        for k in range(len(points) - 1):
            self.limb(points[k], points[k + 1], radii[k], radii[k + 1], color)

    def eyes(self, y, z, dx, size, white=1.55, x=0.0):
        """Dark pupils of radius `size` before white balls, which show on a head of any colour."""
        for side in (-1, 1):
            self.ball(x + side * dx, y, z, white * size, white * size, 1.1 * size, "white")
            self.ball(x + side * 0.95 * dx, y, z + 0.7 * size, size, size, 0.7 * size, "dark")
        self.gaze = (y, z + 0.6 * size, dx, white * size)

    def dots(self, y, z, dx, size):
        """Eyes that are dark balls, for faces that are light."""
        for side in (-1, 1):
            self.ball(side * dx, y, z, size, size, 0.7 * size, "dark")
        self.gaze = (y, z, dx, 1.4 * size)

    def _add(self, kind, center, size, color, axes, cut):
        rgb = self.main if color == "main" else _rgb(color)
        size = tuple(float(v) for v in size)
        role = CUT if cut else MAIN if color == "main" else OTHER
        self.primitives.append(Primitive(kind, np.asarray(center, float), axes, size, rgb, role))


def _rgb(color) -> np.ndarray:
    if isinstance(color, str):
        return np.array(COLORS.get(color) or SHADES[color], float)
    return np.asarray(color, float)


@dataclass(frozen=True)
class Item:
    """A finished thing of a scene and what a caption may say about it."""

    name: str
    color: str | None  # a key of COLORS when the colour was chosen, None when it is the natural one
    attribute: str | None  # one of ATTRIBUTES
    part: tuple[str, str] | None  # a part that it wears or carries, and its colour
    primitives: tuple[Primitive, ...]
    blend: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A thing, or two in a relation. Distances are measured in points divided by `stretch`."""

    items: tuple[Item, ...]
    relation: str | None = None
    stretch: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def name(self) -> str:
        return self.items[0].name

    @property
    def color(self) -> str | None:
        return self.items[0].color

    @property
    def attribute(self) -> str | None:
        return self.items[0].attribute

    @property
    def primitives(self) -> tuple[Primitive, ...]:
        return tuple(p for item in self.items for p in item.primitives)


def moved(primitives, scale: float, offset) -> list[Primitive]:
    """Primitives scaled about the origin, then moved by offset."""
    offset = np.asarray(offset, float)
    return [p._replace(center=p.center * scale + offset, size=scaled(p.kind, p.size, scale)) for p in primitives]


def scaled(kind: str, size: tuple[float, ...], scale: float) -> tuple[float, ...]:
    lengths = _LENGTHS[kind]
    return tuple(scale * v for v in size[:lengths]) + size[lengths:]


def bounding_points(primitives) -> np.ndarray:
    """Points [N, 3] that bound what is not cut away."""
    return np.concatenate([_primitive_points(p) for p in primitives if p.role != CUT])


_SIGNS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
_TURNS = np.linspace(0, 2 * np.pi, 12, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURNS), 0 * _TURNS, np.sin(_TURNS)], 1)
_GLOBE = np.array([(x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1) if (x, y, z) != (0, 0, 0)])
_GLOBE = _GLOBE / np.linalg.norm(_GLOBE, axis=1, keepdims=True)


def _primitive_points(p: Primitive) -> np.ndarray:
    s = p.size
    match p.kind:
        case "ball":
            local = _GLOBE * s
        case "box":
            local = _SIGNS * s[:3]
            local[:, ::2] *= np.where(local[:, 1:2] > 0, s[4:6], 1)
        case "cone":
            local = np.concatenate([_CIRCLE * s[0] - [0, s[2], 0], _CIRCLE * s[1] + [0, s[2], 0]])
        case "ring":
            local = _CIRCLE * (s[0] + s[1])
            local = np.concatenate([local + [0, s[1], 0], local - [0, s[1], 0]])
        case "limb":
            local = np.concatenate([_GLOBE * s[0], _GLOBE * s[1] + [0, s[2], 0]])
        case _:
            turn = np.linspace(-s[2], s[2], 9)
            middle = s[0] * np.stack([np.sin(turn), np.cos(turn), 0 * turn], 1)
            local = (middle[:, None] + s[1] * _GLOBE).reshape(-1, 3)
    return local @ p.rotation + p.center
