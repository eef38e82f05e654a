"""A triangle mesh, its connected components, its simplification and its vertex normals."""

import math
from itertools import product
from typing import NamedTuple

import fast_simplification
import numpy as np

from dream_fast.engine.errors import UserError

SMALLEST_PART = 0.02  # of the area of the largest; smaller ones are floaters


SMALLEST_PIECE = 0.002  # the same of what is near a part


BESIDE = 0.02  # of the longest side of the mesh: what is nearer is one part


class NoSurface(UserError):
    """The field has nothing that a mesh could show."""


class Mesh(NamedTuple):
    """V vertices and T triangles."""

    vertices: np.ndarray  # [V, 3] float, world units
    faces: np.ndarray  # [T, 3] int64, counter-clockwise seen from outside


def _groups(count: int, ends: np.ndarray) -> np.ndarray:
    """The group of each of `count` things [count], named by its lowest, when the pairs `ends` [2, P] are together."""
    label = np.arange(count)
    while True:
        before = label.copy()
        lowest = label[ends].min(axis=0)
        np.minimum.at(label, label[ends[0]], lowest)
        np.minimum.at(label, label[ends[1]], lowest)
        while not np.array_equal(label, label[label]):
            label = label[label]
        if np.array_equal(label, before):
            return label


def components(mesh: Mesh) -> np.ndarray:
    """The component of each vertex [V], named by its lowest vertex."""
    a, b = mesh.faces[:, [0, 1]].T, mesh.faces[:, [1, 2]].T
    return _groups(len(mesh.vertices), np.concatenate([a, b], axis=1))  # two edges connect a triangle


def visible_parts(mesh: Mesh) -> Mesh:
    """The mesh without what is no part of the object: floaters and the walls of cavities.

    A part is made of the components that lie side by side, such as the lid of a pot and its knob, but for crumbs: those
    of less than 0.2 % of the area of the largest one. Floaters are parts of less than 2 % of the area of the largest.
    The wall of a cavity is a closed component that faces its own inside, so that its volume is negative: nobody sees
    it, and it would take triangles and texels.
    """
    if len(mesh.faces) == 0:
        return mesh
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    across = np.cross(b - a, c - a)
    label = components(mesh)

    def total(values: np.ndarray) -> np.ndarray:
        """Of the triangles of each component, at the index of the component's lowest vertex."""
        return np.bincount(label[mesh.faces[:, 0]], weights=values, minlength=len(label))

    area, volume = total(np.linalg.norm(across, axis=1)), total((a * across).sum(axis=1))
    kept = (area >= SMALLEST_PIECE * area.max()) & (volume > 0)
    part = _side_by_side(mesh.vertices, label, kept)
    size = np.bincount(part, weights=area * kept, minlength=len(part))
    kept &= size[part] >= SMALLEST_PART * size.max()
    kept_vertices = (kept if kept.any() else area > 0)[label]
    index = np.cumsum(kept_vertices) - 1
    return Mesh(mesh.vertices[kept_vertices], index[mesh.faces[kept_vertices[mesh.faces[:, 0]]]])


def _side_by_side(vertices: np.ndarray, label: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The part [V] of each component, at its lowest vertex: the lowest of those that lie side by side, of what is kept.

    Two points nearer than half of a cell are in one cell of the lattice or of one that is shifted by half of a cell.
    """
    here = np.flatnonzero(kept[label])
    low, size = vertices.min(axis=0), 2 * BESIDE * np.ptp(vertices, axis=0).max()
    places, cells, one = ((vertices[here] - low) / size).T, math.ceil(1 / (2 * BESIDE)) + 2, label[here]
    steps = [[(place + shift).astype(np.int64) * cells**k for shift in (0.0, 0.5)] for k, place in enumerate(places)]
    pairs = []
    for x, y, z in product(*steps):
        cell, somebody = x + y + z, np.empty(cells**3, dtype=np.int64)
        somebody[cell] = one
        other = somebody[cell]
        pairs.append(np.stack([one, other])[:, one != other])
    return _groups(len(vertices), np.concatenate(pairs, axis=1))


def _edges(mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """The edge [3 T] of each triangle's sides, as one number for both directions, and whether it runs forth there."""
    start, end = mesh.faces.ravel(), mesh.faces[:, [1, 2, 0]].ravel()
    return np.minimum(start, end) * len(mesh.vertices) + np.maximum(start, end), start < end


def is_closed(mesh: Mesh) -> bool:
    """Whether every edge has two triangles, which run along it in opposite directions."""
    edge, forth = _edges(mesh)
    there, back = np.sort(edge[forth]), np.sort(edge[~forth])
    return bool(np.array_equal(there, back) and (np.diff(there) > 0).all())


def _drop_folded_faces(mesh: Mesh) -> Mesh:
    """Without pairs of triangles that lie on each other, which collapsed edges leave, and vertices of no triangle."""
    a, b, c = mesh.faces.T
    turns = np.where(((a < b).astype(int) + (b < c) + (c < a)) == 2, 1, -1)  # the way around: two on each other differ
    corners, number = np.unique(np.sort(mesh.faces, axis=1), axis=0, return_inverse=True)
    left = np.bincount(number.reshape(-1), weights=turns, minlength=len(corners)).astype(int)
    faces = np.where(left[:, None] > 0, corners, corners[:, ::-1]).repeat(np.abs(left), axis=0)
    used, faces = np.unique(faces, return_inverse=True)
    return Mesh(mesh.vertices[used], faces.reshape(-1, 3))


def _split_vertices(mesh: Mesh) -> Mesh:
    """Where sheets of the surface meet in an edge or a vertex, each with vertices of its own.

    Triangles stay together over an edge along which one runs forth and the other back; of an edge of four, two pairs
    do. The mesh itself where some edge has not as many of either.
    """
    edge, forth = _edges(mesh)
    here = np.arange(mesh.faces.size)
    there = here.reshape(-1, 3)[:, [1, 2, 0]].ravel()
    forth, back = np.flatnonzero(forth), np.flatnonzero(~forth)
    forth = forth[np.argsort(edge[forth], kind="stable")]
    turned = np.zeros(0, dtype=np.int64)  # edges of four that make other pairs than at first
    for _ in range(4):
        order = np.where(np.isin(edge[back], turned), -back, back)
        back = back[np.lexsort((order, edge[back]))]
        if not np.array_equal(edge[forth], edge[back]):
            return mesh
        pairs = np.concatenate([[here[forth], there[back]], [there[forth], here[back]]], axis=1)
        lowest, number = np.unique(_groups(mesh.faces.size, pairs), return_inverse=True)
        apart = Mesh(mesh.vertices[mesh.faces.ravel()[lowest]], number.reshape(-1, 3))
        # Sheets that go together elsewhere too may still share both ends of an edge.
        _, of, sides = np.unique(_edges(apart)[0], return_inverse=True, return_counts=True)
        still = np.unique(edge[sides[of] > 2])
        if len(still) == 0:
            break
        turned = np.setxor1d(turned, still)
    return apart


def _offset_copies(mesh: Mesh) -> Mesh:
    """Vertices at one place, each a hundredth of an edge into its own sheet: merging by place must not join them."""
    _, of, count = np.unique(mesh.vertices, axis=0, return_inverse=True, return_counts=True)
    shared = count[of.reshape(-1)] > 1
    a, b = mesh.vertices[mesh.faces[:, 0]], mesh.vertices[mesh.faces[:, 1]]
    step = 0.01 * np.linalg.norm(b - a, axis=1).mean() if len(mesh.faces) else 0.0
    return mesh._replace(vertices=mesh.vertices - step * shared[:, None] * smooth_normals(mesh))


def simplify(mesh: Mesh, faces: int) -> Mesh:
    """About the same surface with at most so many faces, closed where the mesh is; the mesh itself if it has fewer.

    With 0 faces it keeps all of them.
    """
    if faces == 0 or len(mesh.faces) <= faces:
        return mesh
    found = None
    # Collapsing edges can leave the surface open here and there; from another number of faces it does not.
    for part in (1, 0.99, 0.98, 0.96, 0.93, 0.9):
        count = max(4, int(part * faces))
        vertices, triangles = fast_simplification.simplify(
            mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32), target_count=count
        )
        simpler = Mesh(np.asarray(vertices, dtype=np.float64), np.asarray(triangles, dtype=np.int64))
        simpler = _offset_copies(_split_vertices(_drop_folded_faces(simpler)))
        if len(simpler.faces) and is_closed(simpler):
            return simpler
        found = found or simpler
    return found if len(found.faces) else mesh


def smooth_normals(mesh: Mesh) -> np.ndarray:
    """Unit normals [V, 3] of the vertices: the sum of the faces' normals, each weighted by its area."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    face = np.cross(b - a, c - a)
    corners, values = mesh.faces.ravel(), np.repeat(face, 3, axis=0)
    normals = np.stack([np.bincount(corners, values[:, k], len(mesh.vertices)) for k in range(3)], axis=1)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
