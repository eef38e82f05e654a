"""Marching cubes: the isosurface of a grid of values as a closed manifold.

A cube whose corners lie on both sides of the isovalue has a vertex on every edge between the sides. On a face of the
cube the vertices are joined in pairs, so that each run of inside corners is separated from the others: a rule that
gives the same pairs in both cubes at a face. The pairs form closed polygons, which are cut into triangles along
diagonals that lie in no face, so that no diagonal meets one of a neighbour. Thus every edge has two triangles,
for any values.
Source: Lorensen and Cline, 1987; faces as in Nielson and Hamann, 1991. The 256 cases are computed here.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from dream_fast.engine.geometry.mesh import Mesh

LAYER_POINTS = 1 << 22  # of the grid that are processed together
EDGE_MARGIN = 0.02  # least distance of a vertex from the ends of its edge, so that no triangle collapses

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
    """The closed polygons of a cube with these corners `inside`, as numbers of edges."""
    after: dict[int, int] = {}
    for ring in _rings():
        crossed = {}  # edge behind a corner of the ring, where it crosses the surface
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


def _triangulate(polygon: list[int]) -> list[list[int]] | None:
    """Cut a polygon into triangles along diagonals that lie in no face of the cube; None: when that is impossible."""
    if len(polygon) < 3:
        return []
    first, last = polygon[0], polygon[-1]
    for place in range(1, len(polygon) - 1):
        middle = polygon[place]
        sides = [(first, middle)] * (place > 1) + [(middle, last)] * (place < len(polygon) - 2)
        if not any(_in_one_face(*side) for side in sides):
            before, after = _triangulate(polygon[: place + 1]), _triangulate(polygon[place:])
            if before is not None and after is not None:
                return [[first, middle, last], *before, *after]
    return None


@lru_cache(maxsize=1)
def _cases() -> tuple[np.ndarray, np.ndarray]:
    """By case (bit c: corner c is inside): index of its first triangle [257], and triangles [T, 3] of edges."""
    first: list[int] = [0]
    triangles: list[list[int]] = []
    for case in range(256):
        for polygon in _polygons([bool(case >> corner & 1) for corner in range(8)]):
            triangles += _triangulate(polygon) or []
        first.append(len(triangles))
    return np.array(first), np.array(triangles)


def marching_cubes(volume: np.ndarray, isovalue: float) -> Mesh:
    """The surface volume = isovalue around the region above it, for values [X, Y, Z] on a grid of unit spacing.

    Vertices are in grid coordinates; triangles run counter-clockwise seen from below the isovalue. Outside the grid
    counts as below. The mesh is empty if nothing is above. Needs the memory of a few layers in addition to
    volume and mesh.
    """
    shape = np.array(volume.shape) + 2  # with empty space around it
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    layers = max(1, LAYER_POINTS // int(strides[0]))
    slabs = [
        _triangles(volume, isovalue, begin, begin + layers, strides) for begin in range(0, int(shape[0]) - 1, layers)
    ]
    # Triangles that meet on an edge share its vertex.
    keys, faces = np.unique(np.concatenate(slabs), return_inverse=True)
    axis, low = keys % 3, np.stack(np.unravel_index(keys // 3, shape), axis=-1)
    step = np.eye(3, dtype=np.int64)[axis]
    outside = min(float(volume.min()), isovalue - 1)

    def values(points: np.ndarray) -> np.ndarray:
        in_grid = ((points > 0) & (points < shape - 1)).all(axis=1)
        result = np.full(len(points), outside)
        result[in_grid] = volume[tuple((points[in_grid] - 1).T)]
        return result

    start, end = values(low), values(low + step)
    part = ((isovalue - start) / (end - start)).clip(EDGE_MARGIN, 1 - EDGE_MARGIN)[:, None]
    return Mesh(low - 1.0 + part * step, faces.reshape(-1, 3))


def _triangles(volume: np.ndarray, isovalue: float, begin: int, end: int, strides: np.ndarray) -> np.ndarray:
    """Corners [3 T] of the triangles in the layers of cubes from `begin` to `end`.

    A corner is three times the index of the grid point below it in the padded grid, plus the axis of its edge.
    """
    end = min(end, len(volume) + 1)
    inside = np.zeros((end + 1 - begin, *(np.array(volume.shape[1:]) + 2)), dtype=np.uint8)
    low, high = max(begin - 1, 0), min(end, len(volume))
    inside[low + 1 - begin : high + 1 - begin, 1:-1, 1:-1] = volume[low:high] > isovalue
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
