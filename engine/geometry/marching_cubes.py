"""The iso-surface of a grid of values by marching cubes, as a closed manifold.

A cube of the grid whose corners lie on both sides of the level has a vertex on every edge between the two. On a face of
the cube the vertices are joined in pairs, so that every run of inside corners is cut off from the others: a rule that
both cubes at a face apply alike. The pairs make closed polygons, which are cut into triangles along diagonals that lie
in no face, so that no diagonal meets one of a neighbour. Thus every edge has two triangles, whatever the values.
Source: Lorensen and Cline, 1987; faces as in Nielson and Hamann, 1991. The 256 cases are worked out here.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

LAYER_POINTS = 1 << 22  # of the grid that are looked at together
EDGE_MARGIN = 0.02  # a vertex keeps this part of its edge from both ends, so that no triangle collapses

# Corner c of a cube lies at (c & 1, c >> 1 & 1, c >> 2 & 1); an edge goes up from its corner along its axis.
CORNERS = np.array([[c & 1, c >> 1 & 1, c >> 2 & 1] for c in range(8)])
EDGES = [(corner, axis) for axis in range(3) for corner in range(8) if not corner >> axis & 1]


def _rings() -> Iterator[list[int]]:
    """The corners of each face, counter-clockwise seen from outside the cube."""
    for axis in range(3):
        one, other = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        ring = [0, one, one + other, other]
        yield ring[::-1]
        yield [corner + (1 << axis) for corner in ring]


def _polygons(inside: list[bool]) -> Iterator[list[int]]:
    """The closed polygons of a cube whose corners are `inside` or not, by the numbers of their edges."""
    after: dict[int, int] = {}
    for ring in _rings():
        crossed = {}  # the edge behind a corner of the ring, where it passes the surface
        for place, corner in enumerate(ring):
            following = ring[(place + 1) % 4]
            if inside[corner] != inside[following]:
                low = min(corner, following)
                crossed[place] = EDGES.index((low, (abs(following - corner)).bit_length() - 1))
        for place in crossed:
            if not inside[ring[place]]:  # a run of inside corners begins; it ends behind the next crossing
                end = min(crossed, key=lambda other: (other - place - 1) % 4)
                after[crossed[place]] = crossed[end]
    while after:
        polygon = [next(iter(after))]
        while (following := after.pop(polygon[-1])) != polygon[0]:
            polygon.append(following)
        yield polygon


def _in_one_face(edge: int, other: int) -> bool:
    places = np.array([[CORNERS[corner], CORNERS[corner | 1 << axis]] for corner, axis in (EDGES[edge], EDGES[other])])
    places = places.reshape(4, 3)
    return bool((places == places[0]).all(axis=0).any())


def _cut(polygon: list[int]) -> list[list[int]] | None:
    """Triangles of a polygon by diagonals that lie in no face of the cube; None: there are none such."""
    if len(polygon) < 3:
        return []
    first, last = polygon[0], polygon[-1]
    for place in range(1, len(polygon) - 1):
        middle = polygon[place]
        sides = [(first, middle)] * (place > 1) + [(middle, last)] * (place < len(polygon) - 2)
        if not any(_in_one_face(*side) for side in sides):
            before, after = _cut(polygon[: place + 1]), _cut(polygon[place:])
            if before is not None and after is not None:
                return [[first, middle, last], *before, *after]
    return None


@lru_cache(maxsize=1)
def _cases() -> tuple[np.ndarray, np.ndarray]:
    """Of the case with the corners inside whose bits are set: its first triangle [257], triangles [T, 3] of edges."""
    first: list[int] = [0]
    triangles: list[list[int]] = []
    for case in range(256):
        for polygon in _polygons([bool(case >> corner & 1) for corner in range(8)]):
            triangles += _cut(polygon) or []
        first.append(len(triangles))
    return np.array(first), np.array(triangles)


def marching_cubes(volume: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The surface volume = level around the region above it, for values [X, Y, Z] on a grid of unit spacing.

    Vertices [V, 3] in grid coordinates, and triangles [T, 3] int64, counter-clockwise seen from the region below.
    Outside the grid counts as below the level. Empty where nothing is above.
    Beside the volume and the surface it needs the memory of some layers.
    """
    shape = np.array(volume.shape) + 2  # with empty space around it
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    layers = max(1, LAYER_POINTS // int(strides[0]))
    slabs = [_triangles(volume, level, begin, begin + layers, strides) for begin in range(0, int(shape[0]) - 1, layers)]
    # Triangles that meet on an edge share its vertex.
    keys, faces = np.unique(np.concatenate(slabs), return_inverse=True)
    axis, low = keys % 3, np.stack(np.unravel_index(keys // 3, shape), axis=-1)
    step = np.eye(3, dtype=np.int64)[axis]
    outside = min(float(volume.min()), level - 1)

    def values(points: np.ndarray) -> np.ndarray:
        there = ((points > 0) & (points < shape - 1)).all(axis=1)
        found = np.full(len(points), outside)
        found[there] = volume[tuple((points[there] - 1).T)]
        return found

    start, end = values(low), values(low + step)
    part = ((level - start) / (end - start)).clip(EDGE_MARGIN, 1 - EDGE_MARGIN)[:, None]
    return low - 1.0 + part * step, faces.reshape(-1, 3)


def _triangles(volume: np.ndarray, level: float, begin: int, end: int, strides: np.ndarray) -> np.ndarray:
    """Corners [3 T] of the triangles in the layers of cubes from `begin` to `end`: three times the grid point below the
    vertex, by the strides of the padded grid, and the axis of its edge."""
    end = min(end, len(volume) + 1)
    inside = np.zeros((end + 1 - begin, *(np.array(volume.shape[1:]) + 2)), dtype=np.uint8)
    low, high = max(begin - 1, 0), min(end, len(volume))
    inside[low + 1 - begin : high + 1 - begin, 1:-1, 1:-1] = volume[low:high] > level
    size = np.array(inside.shape) - 1
    case = np.zeros(size, dtype=np.uint8)
    for corner, (x, y, z) in enumerate(CORNERS):
        case |= inside[x : x + size[0], y : y + size[1], z : z + size[2]] << corner
    cubes = np.argwhere((case > 0) & (case < 255))
    case = case[tuple(cubes.T)].astype(np.int64)
    first, triangles = _cases()
    count = first[case + 1] - first[case]
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first[case], count)
    edges = np.array([3 * (CORNERS[corner] @ strides) + axis for corner, axis in EDGES])
    base = 3 * (cubes @ strides + begin * strides[0])
    return (np.repeat(base, count)[:, None] + edges[triangles[number]]).ravel()
