"""The scene's surface as a closed triangle mesh: taken from the density, cleaned and simplified.

The density is sampled on a grid and its iso-surface taken by marching tetrahedra: each cube of the grid is cut into
six tetrahedra around its main diagonal (Kuhn's subdivision, the same in every cube, so neighbours agree on their shared
faces), and each tetrahedron yields no, one or two triangles. No case is ambiguous, so the surface is a closed manifold;
the grid is padded with empty space to close it at the border too. Source: Doi and Koide, 1991.

Simplification is by quadric error (Garland and Heckbert, 1997), through fast-simplification.
Triangles run counter-clockwise seen from outside.
"""

from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import fast_simplification
import numpy as np
import torch
from torch import Tensor

from dream_fast.engine.errors import UserError
from dream_fast.engine.scene_field import SceneField

SMALLEST_COMPONENT = 0.02  # of the area of the largest; smaller ones are floaters
LAYER_POINTS = 1 << 22  # of the grid that are looked at together
EDGE_MARGIN = 0.02  # a vertex keeps this part of its edge from both ends, so that no triangle collapses


class Mesh(NamedTuple):
    """V vertices and T triangles."""

    vertices: np.ndarray  # [V, 3] float, world units
    faces: np.ndarray  # [T, 3] int64, counter-clockwise seen from outside


# ---------------------------------------------------------------------------------------------- marching tetrahedra


@lru_cache(maxsize=1)
def _tetrahedra() -> np.ndarray:
    """Six tetrahedra of the unit cube as corners [6, 4, 3], each with positive volume."""
    cells = []
    for order in permutations(range(3)):
        corners = np.zeros((4, 3), dtype=np.int64)
        for step, axis in enumerate(order):
            corners[step + 1] = corners[step]
            corners[step + 1, axis] = 1
        if np.linalg.det(corners[1:] - corners[0]) < 0:
            corners = corners[[0, 2, 1, 3]]
        cells.append(corners)
    return np.stack(cells)


@lru_cache(maxsize=1)
def _triangle_table() -> dict[int, list[list[tuple[int, int]]]]:
    """Triangles of a positive tetrahedron by case (bit v set: corner v is inside); a triangle is three edges."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=float)
    table = {}
    for case in range(1, 15):
        inside = [v for v in range(4) if case >> v & 1]
        outside = [v for v in range(4) if not case >> v & 1]
        if len(inside) == 2:
            (a, b), (c, d) = inside, outside
            ring = [(a, c), (a, d), (b, d), (b, c)]
        else:
            ring = [(i, o) for i in inside for o in outside]
        points = np.array([corners[i] + corners[o] for i, o in ring]) / 2
        normal = np.cross(points[1] - points[0], points[2] - points[0])
        if normal @ (corners[outside].mean(0) - corners[inside].mean(0)) < 0:
            ring.reverse()
        table[case] = [[ring[0], ring[k], ring[k + 1]] for k in range(1, len(ring) - 1)]
    return table


def marching_tetrahedra(volume: np.ndarray, level: float) -> Mesh:
    """The surface volume = level around the region above it, for values [X, Y, Z] on a grid of unit spacing.

    Vertices are in grid coordinates. Outside the grid counts as below the level. Empty where nothing is above.
    Beside the volume and the surface it needs the memory of some layers.
    """
    shape = np.array(volume.shape) + 2  # with empty space around it
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    outside = min(float(volume.min()), level - 1)
    layers = max(1, LAYER_POINTS // int(strides[0]))
    keys, points, corners = [], [], []
    for first in range(0, int(shape[0]) - 1, layers):
        last = min(first + layers, int(shape[0]) - 1)  # cubes from layer `first` to `last`
        padded = np.full((last + 1 - first, *shape[1:]), outside, dtype=np.float32)
        low, high = max(first - 1, 0), min(last, int(shape[0]) - 2)
        padded[low + 1 - first : high + 1 - first, 1:-1, 1:-1] = volume[low:high]
        found, place, edges = _crossings(padded, level, strides)
        keys.append(found + first * strides[0] * np.array([1, 1]))
        points.append(place + np.array([first, 0, 0]))
        corners.append(edges + sum(map(len, keys[:-1])))
    # Slabs share the vertices of the layer between them.
    keys, points, corners = np.concatenate(keys), np.concatenate(points), np.concatenate(corners)
    _, first, number = np.unique(keys[:, 0] * int(shape.prod()) + keys[:, 1], return_index=True, return_inverse=True)
    return Mesh(points[first] - 1.0, number[corners].reshape(-1, 3))


def _crossings(volume: np.ndarray, level: float, strides: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices of the surface in a slab: the grid points of their edges [V, 2], places [V, 3], triangles [T * 3]."""
    inside = volume > level
    shape = np.array(volume.shape)
    flat_volume, flat_inside = volume.reshape(-1), inside.reshape(-1)

    # Cubes with corners on both sides.
    corners_inside = np.zeros(shape - 1, dtype=np.int8)
    for dx, dy, dz in np.ndindex(2, 2, 2):
        corners_inside += inside[dx : shape[0] - 1 + dx, dy : shape[1] - 1 + dy, dz : shape[2] - 1 + dz]
    cubes = np.argwhere((corners_inside > 0) & (corners_inside < 8)) @ strides  # [A]

    # Every triangle corner lies on an edge between two grid points: [number of triangles, 3, 2].
    edges = []
    for tetrahedron in _tetrahedra():
        points = cubes[:, None] + tetrahedron @ strides  # [A, 4]
        case = flat_inside[points] @ np.array([1, 2, 4, 8])
        for number, triangles in _triangle_table().items():
            found = points[case == number]
            edges += [found[:, np.array(triangle)] for triangle in triangles]
    edges = np.concatenate(edges)

    # Triangles that meet on an edge share its vertex.
    keys, faces = np.unique(edges.min(axis=2) * len(flat_volume) + edges.max(axis=2), return_inverse=True)
    low, high = keys // len(flat_volume), keys % len(flat_volume)
    start, end = flat_volume[low], flat_volume[high]
    part = ((level - start) / (end - start)).clip(EDGE_MARGIN, 1 - EDGE_MARGIN)[:, None]
    place, other = (np.stack(np.unravel_index(ends, shape), axis=-1) for ends in (low, high))
    return np.stack([low, high], axis=1), place + part * (other - place), faces.reshape(-1)


# ------------------------------------------------------------------------------------------------------- components


def components(mesh: Mesh) -> np.ndarray:
    """The component of each vertex [V], named by its lowest vertex."""
    label = np.arange(len(mesh.vertices))
    a, b = mesh.faces[:, [0, 1]].T, mesh.faces[:, [1, 2]].T
    ends = np.concatenate([a, b], axis=1)  # two edges connect a triangle
    while True:
        before = label.copy()
        lowest = label[ends].min(axis=0)
        np.minimum.at(label, label[ends[0]], lowest)
        np.minimum.at(label, label[ends[1]], lowest)
        while not np.array_equal(label, label[label]):
            label = label[label]
        if np.array_equal(label, before):
            return label


def without_floaters(mesh: Mesh) -> Mesh:
    """The mesh without components whose area is under 2 % of the largest one's."""
    if len(mesh.faces) == 0:
        return mesh
    corners = mesh.vertices[mesh.faces]
    doubled = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    label = components(mesh)
    area = np.bincount(label[mesh.faces[:, 0]], weights=doubled, minlength=len(label))
    kept_vertices = area[label] >= SMALLEST_COMPONENT * area.max()
    index = np.cumsum(kept_vertices) - 1
    return Mesh(mesh.vertices[kept_vertices], index[mesh.faces[kept_vertices[mesh.faces[:, 0]]]])


# --------------------------------------------------------------------------------------------------- simplification


def is_closed(mesh: Mesh) -> bool:
    """Whether every edge has two triangles, which run along it in opposite directions."""
    edges = mesh.faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2)
    there, back = (np.sort(edges[:, order] @ np.array([len(mesh.vertices), 1])) for order in ([0, 1], [1, 0]))
    return bool(np.array_equal(there, back) and (np.diff(there) > 0).all())


def _without_flaps(mesh: Mesh) -> Mesh:
    """Without pairs of triangles that lie on each other, which collapsed edges leave, and vertices of no triangle."""
    _, number, times = np.unique(np.sort(mesh.faces, axis=1), axis=0, return_inverse=True, return_counts=True)
    faces = mesh.faces[times[number.reshape(-1)] == 1]
    used, faces = np.unique(faces, return_inverse=True)
    return Mesh(mesh.vertices[used], faces.reshape(-1, 3))


def simplify(mesh: Mesh, faces: int) -> Mesh:
    """About the same surface with at most so many faces, closed where the mesh is; the mesh itself if it has fewer."""
    if len(mesh.faces) <= faces:
        return mesh
    found = None
    # Collapsing edges now and then makes an edge of four triangles; from another number of faces it does not.
    for part in (1, 0.99, 0.98, 0.96, 0.93, 0.9):
        count = max(4, int(part * faces))
        vertices, triangles = fast_simplification.simplify(
            mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32), target_count=count
        )
        simpler = _without_flaps(Mesh(np.asarray(vertices, dtype=np.float64), np.asarray(triangles, dtype=np.int64)))
        if len(simpler.faces) and is_closed(simpler):
            return simpler
        found = found or simpler
    return found if len(found.faces) else mesh


# ------------------------------------------------------------------------------------------------------ from a field


def density_volume(field: SceneField, resolution: int) -> Tensor:
    """Density at resolution^3 points that span the scene cube, [X, Y, Z] on the host."""
    axis = torch.linspace(-field.bound, field.bound, resolution, device=field.device)
    slabs = []
    for x in axis:  # a slab at a time, so that the points of the whole grid never exist at once
        points = torch.cartesian_prod(x[None], axis, axis)
        slabs.append(field.density(points).cpu())
    return torch.stack(slabs).view(resolution, resolution, resolution)


def surface_level(volume: Tensor, threshold: float) -> float:
    """The density at which the surface lies: the threshold, or the mean where that is lower, as for occupancy.

    Where no point, or every point, is above it, the middle between the least and the greatest density.
    """
    if not torch.isfinite(volume).all():
        raise UserError("the field's density is not finite, so it has no surface to export")
    least, mean, greatest = volume.min().item(), volume.mean().item(), volume.max().item()
    if not greatest > least:
        raise UserError("the field's density is the same everywhere, so it has no surface to export")
    level = min(mean, threshold)
    return level if least < level < greatest else (least + greatest) / 2


def extract_mesh(field: SceneField, resolution: int, threshold: float) -> Mesh:
    """The field's surface in world units, floaters removed. Raises UserError where there is none."""
    volume = density_volume(field, resolution)
    level = surface_level(volume, threshold)
    # Density rises exponentially, so its logarithm is what a straight line between two points fits.
    logarithm = volume.clamp_(min=1e-6 * level).log_().numpy()
    mesh = without_floaters(marching_tetrahedra(logarithm, float(np.log(level))))
    bound = field.bound
    return mesh._replace(vertices=mesh.vertices * (2 * bound / (resolution - 1)) - bound)


def smooth_normals(mesh: Mesh) -> np.ndarray:
    """Unit normals [V, 3] of the vertices: the sum of the faces' normals, each weighted by its area."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    face = np.cross(b - a, c - a)
    corners, values = mesh.faces.ravel(), np.repeat(face, 3, axis=0)
    normals = np.stack([np.bincount(corners, values[:, k], len(mesh.vertices)) for k in range(3)], axis=1)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
