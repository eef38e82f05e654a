"""Grids of tetrahedra, and marching tetrahedra: the zero surface of values at their vertices.

The vertices form a body-centred cubic lattice: the corners of n^3 cubes and their centres. Each face between two cubes
gives four tetrahedra, of its edges and the two centres, all of one shape and without a preferred direction. A
tetrahedron with vertices on both sides of the surface gives one or two triangles. No case is ambiguous, so the surface
is a closed manifold if all values at the grid's border are below zero.
Sources: Labelle and Shewchuk, Isosurface stuffing, 2007 (the lattice); Doi and Koide, 1991 (the triangles).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dream_fast.engine.geometry.mesh import TensorMesh

EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # of a tetrahedron, as pairs of its vertices


class TetGrid(NamedTuple):
    """V vertices in [-1, 1]^3 and T tetrahedra of positive volume."""

    vertices: Tensor  # [V, 3]
    tets: Tensor  # int64 [T, 4]
    border: Tensor  # bool [V]


def tet_grid(size: int) -> TetGrid:
    """The grid with `size` + 1 layers of vertices along each axis: corners in even layers, centres in odd ones.

    size: even, at least 4.
    """
    n = size // 2
    even, odd = torch.arange(0, size + 1, 2), torch.arange(1, size, 2)
    layers = torch.cat([torch.cartesian_prod(axis, axis, axis) for axis in (even, odd)])  # [V, 3]
    corner = torch.arange((n + 1) ** 3).view(n + 1, n + 1, n + 1)
    centre = torch.arange((n + 1) ** 3, len(layers)).view(n, n, n)
    cells = []
    for axis in range(3):
        centres, corners = centre.movedim(axis, 0), corner.movedim(axis, 0)
        before, after, between = centres[:-1], centres[1:], corners[1:-1]
        ring = [between[:, :-1, :-1], between[:, 1:, :-1], between[:, 1:, 1:], between[:, :-1, 1:]]
        for k in range(4):
            cells.append(torch.stack([before, after, ring[k], ring[(k + 1) % 4]], -1).view(-1, 4))
    tets = torch.cat(cells)
    a, b, c, d = layers[tets].unbind(1)
    negative = torch.linalg.det(torch.stack([b - a, c - a, d - a], 1).float()) < 0
    tets[negative] = tets[negative][:, [0, 2, 1, 3]]
    is_corner = torch.arange(len(layers)) < (n + 1) ** 3
    border = torch.where(
        is_corner[:, None], (layers == 0) | (layers == size), (layers == 1) | (layers == size - 1)
    ).any(1)
    return TetGrid(layers * (2 / size) - 1.0, tets, border)


@lru_cache(maxsize=1)
def triangle_table() -> dict[int, list[list[tuple[int, int]]]]:
    """Triangles of a positive tetrahedron by case (bit v: vertex v is inside).

    A triangle is three edges, each as (inner vertex, outer vertex).
    """
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=float)
    table = {}
    for case in range(1, 15):
        inside = [v for v in range(4) if case >> v & 1]
        outside = [v for v in range(4) if not case >> v & 1]
        ring = [(i, o) for i in inside for o in outside]
        if len(inside) == 2:
            ring = [ring[0], ring[1], ring[3], ring[2]]
        points = np.array([corners[i] + corners[o] for i, o in ring]) / 2
        normal = np.cross(points[1] - points[0], points[2] - points[0])
        if normal @ (corners[outside].mean(0) - corners[inside].mean(0)) < 0:
            ring.reverse()
        table[case] = [[ring[0], ring[k], ring[k + 1]] for k in range(1, len(ring) - 1)]
    return table


@lru_cache(maxsize=4)
def _triangles(device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of triangles [16] and their edges [16, 2, 3] by case (bit v: vertex v is inside)."""
    counts, table = torch.zeros(16, dtype=torch.int64), torch.zeros(16, 2, 3, dtype=torch.int64)
    for case, triangles in triangle_table().items():
        counts[case] = len(triangles)
        for k, triangle in enumerate(triangles):
            table[case, k] = torch.tensor([EDGES.index((min(pair), max(pair))) for pair in triangle])
    return counts.to(device), table.to(device)


def marching_tetrahedra(positions: Tensor, values: Tensor, tets: Tensor) -> TensorMesh:
    """The surface values = 0 around the region above it, for values [V] at positions [V, 3].

    Gradients flow into both. Waits for the device, since the size of the surface depends on the values.
    """
    device, count = values.device, values.shape[0]
    inside = values.detach() > 0
    case = (inside[tets] * torch.tensor([1, 2, 4, 8], device=device)).sum(1)
    crossed = ((case > 0) & (case < 15)).nonzero()[:, 0]
    case, crossed_tets = case[crossed], tets[crossed]
    ends = crossed_tets[:, torch.tensor(EDGES, device=device)].sort(2).values  # [n, 6, 2]
    crosses = inside[ends[..., 0]] != inside[ends[..., 1]]
    low, high = ends[crosses].unbind(1)
    key, number = torch.unique(low * count + high, return_inverse=True)
    vertex = torch.zeros_like(crosses, dtype=torch.int64).masked_scatter_(crosses, number)  # [n, 6]
    counts, table = _triangles(device)
    faces = [
        vertex[counts[case] > k].gather(1, table[case[counts[case] > k], k]) for k in range(2)
    ]  # triangles that meet on an edge share its vertex
    low, high = key // count, key % count
    start, end = values[low], values[high]
    part = (start / (start - end))[:, None]
    return TensorMesh(positions[low] + part * (positions[high] - positions[low]), torch.cat(faces))
