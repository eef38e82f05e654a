"""Triangle meshes: their types, connected components, simplification and vertex normals.

There are two types. `Mesh` is NumPy on the host in fp64: files are read into it and written from it, and it is
simplified. `TensorMesh` is PyTorch on the device and differentiable: it is rendered and optimised.
"""

import math
from itertools import product
from typing import NamedTuple

import fast_simplification
import numpy as np
import torch
from torch import Tensor

from dream_fast.engine.errors import UserError
from dream_fast.engine.geometry.components import MIN_PART_SIZE, connected_components

MIN_COMPONENT_AREA = 0.002  # of the area of the largest component; smaller ones are crumbs, which no part is made of
MAX_PART_GAP = 0.02  # of the longest side of the mesh: components that are nearer are one part
# Simplification is repeated with these parts of the number of faces where collapsed edges leave the surface open.
FACE_COUNT_TRIES = (1, 0.99, 0.98, 0.96, 0.93, 0.9)


class NoSurface(UserError):
    """The field has no surface that a mesh could represent."""


class Mesh(NamedTuple):
    """V vertices and T triangles on the host."""

    vertices: np.ndarray  # [V, 3] float, world units
    faces: np.ndarray  # [T, 3] int64, counter-clockwise seen from outside

    def to_tensors(self, device: torch.device | str | None = None) -> "TensorMesh":
        """The mesh on `device`, in fp32."""
        vertices, faces = torch.from_numpy(self.vertices).float(), torch.from_numpy(self.faces)
        return TensorMesh(vertices.to(device), faces.to(device))


class TensorMesh(NamedTuple):
    """V vertices and T triangles on the device."""

    vertices: Tensor  # [V, 3]
    faces: Tensor  # int64 [T, 3], counter-clockwise seen from outside

    def to_host(self) -> Mesh:
        """The mesh in fp64 without gradient."""
        return Mesh(self.vertices.detach().cpu().double().numpy(), self.faces.cpu().numpy())


def mesh_components(mesh: Mesh) -> np.ndarray:
    """The component of each vertex [V], named by its lowest vertex."""
    faces = torch.from_numpy(np.ascontiguousarray(mesh.faces))
    edges = torch.cat([faces[:, [0, 1]].T, faces[:, [1, 2]].T], dim=1)  # two edges connect a triangle
    return connected_components(len(mesh.vertices), [edges]).numpy()


def visible_parts(mesh: Mesh) -> Mesh:
    """Remove floaters and the walls of cavities.

    A part consists of the components that lie side by side, such as the lid of a pot and its knob, without crumbs
    (components below `MIN_COMPONENT_AREA`). Floaters are parts below `MIN_PART_SIZE` by area. The wall of a cavity is a
    closed component that faces its own inside, so that its volume is negative: it is invisible and would cost triangles
    and texels.
    """
    if len(mesh.faces) == 0:
        return mesh
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    across = np.cross(b - a, c - a)
    label = mesh_components(mesh)

    def component_sums(values: np.ndarray) -> np.ndarray:
        """Sums over the triangles [T] of each component, at the index of the component's lowest vertex [V]."""
        return np.bincount(label[mesh.faces[:, 0]], weights=values, minlength=len(label))

    area, volume = component_sums(np.linalg.norm(across, axis=1)), component_sums((a * across).sum(axis=1))
    visible = (area >= MIN_COMPONENT_AREA * area.max()) & (volume > 0)
    part = _join_near_components(mesh.vertices, label, visible)
    size = np.bincount(part, weights=area * visible, minlength=len(part))
    visible &= size[part] >= MIN_PART_SIZE * size.max()
    vertices = (visible if visible.any() else area > 0)[label]
    index = np.cumsum(vertices) - 1
    return Mesh(mesh.vertices[vertices], index[mesh.faces[vertices[mesh.faces[:, 0]]]])


def _join_near_components(vertices: np.ndarray, label: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The part [V] of each component, at its lowest vertex: the lowest of the visible components that lie side by side.

    Two points nearer than half of a cell are in one cell of the lattice or of one that is shifted by half of a cell.
    """
    here = np.flatnonzero(visible[label])
    low, size = vertices.min(axis=0), 2 * MAX_PART_GAP * np.ptp(vertices, axis=0).max()
    places, cells, component = ((vertices[here] - low) / size).T, math.ceil(1 / (2 * MAX_PART_GAP)) + 2, label[here]
    shifted = [[(place + shift).astype(np.int64) * cells**k for shift in (0.0, 0.5)] for k, place in enumerate(places)]
    pairs = []
    for x, y, z in product(*shifted):
        cell, occupant = x + y + z, np.empty(cells**3, dtype=np.int64)
        occupant[cell] = component
        other = occupant[cell]
        pairs.append(np.stack([component, other])[:, component != other])
    return connected_components(len(vertices), [torch.from_numpy(np.concatenate(pairs, axis=1))]).numpy()


def _edges(mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """The edge [3 T] of each side, as a number that both directions share, and whether the side runs upwards."""
    start, end = mesh.faces.ravel(), mesh.faces[:, [1, 2, 0]].ravel()
    return np.minimum(start, end) * len(mesh.vertices) + np.maximum(start, end), start < end


def is_closed(mesh: Mesh) -> bool:
    """True if every edge has two triangles, which run along it in opposite directions."""
    edge, upwards = _edges(mesh)
    up, down = np.sort(edge[upwards]), np.sort(edge[~upwards])
    return bool(np.array_equal(up, down) and (np.diff(up) > 0).all())


def _drop_folded_faces(mesh: Mesh) -> Mesh:
    """Remove pairs of triangles that lie on each other, which collapsed edges leave, and vertices of no triangle."""
    a, b, c = mesh.faces.T
    turn = np.where(((a < b).astype(int) + (b < c) + (c < a)) == 2, 1, -1)  # the two of a pair have opposite turns
    corners, number = np.unique(np.sort(mesh.faces, axis=1), axis=0, return_inverse=True)
    left = np.bincount(number.reshape(-1), weights=turn, minlength=len(corners)).astype(int)
    faces = np.where(left[:, None] > 0, corners, corners[:, ::-1]).repeat(np.abs(left), axis=0)
    vertices, faces = np.unique(faces, return_inverse=True)
    return Mesh(mesh.vertices[vertices], faces.reshape(-1, 3))


def _split_vertices(mesh: Mesh) -> Mesh:
    """Give each sheet of the surface its own vertices where sheets meet in an edge or a vertex.

    Triangles stay together over an edge along which they run in opposite directions; an edge of four triangles joins
    two pairs. Returns the mesh itself where an edge has more triangles of one direction than of the other.
    """
    edge, upwards = _edges(mesh)
    here = np.arange(mesh.faces.size)
    there = here.reshape(-1, 3)[:, [1, 2, 0]].ravel()
    up, down = np.flatnonzero(upwards), np.flatnonzero(~upwards)
    up = up[np.argsort(edge[up], kind="stable")]
    repaired = np.zeros(0, dtype=np.int64)  # edges of four that join other pairs than at first
    for _ in range(4):
        order = np.where(np.isin(edge[down], repaired), -down, down)
        down = down[np.lexsort((order, edge[down]))]
        if not np.array_equal(edge[up], edge[down]):
            return mesh
        pairs = np.concatenate([[here[up], there[down]], [there[up], here[down]]], axis=1)
        label = connected_components(mesh.faces.size, [torch.from_numpy(pairs)]).numpy()
        lowest, number = np.unique(label, return_inverse=True)
        split = Mesh(mesh.vertices[mesh.faces.ravel()[lowest]], number.reshape(-1, 3))
        # Sheets that are joined elsewhere too may still share both ends of an edge.
        _, index, sides = np.unique(_edges(split)[0], return_inverse=True, return_counts=True)
        shared = np.unique(edge[sides[index] > 2])
        if len(shared) == 0:
            break
        repaired = np.setxor1d(repaired, shared)
    return split


def _offset_copies(mesh: Mesh) -> Mesh:
    """Move vertices at one place a hundredth of an edge into their own sheets, so that merging by place keeps them."""
    _, index, count = np.unique(mesh.vertices, axis=0, return_inverse=True, return_counts=True)
    copies = count[index.reshape(-1)] > 1
    a, b = mesh.vertices[mesh.faces[:, 0]], mesh.vertices[mesh.faces[:, 1]]
    step = 0.01 * np.linalg.norm(b - a, axis=1).mean() if len(mesh.faces) else 0.0
    return mesh._replace(vertices=mesh.vertices - step * copies[:, None] * smooth_normals(mesh))


def simplify(mesh: Mesh, faces: int) -> Mesh:
    """Reduce a mesh to at most `faces` triangles, closed where the mesh is.

    The mesh itself is returned if it has no more, or for 0 faces. Quadric error (Garland and Heckbert, 1997), by
    fast-simplification.
    """
    if faces == 0 or len(mesh.faces) <= faces:
        return mesh
    results: list[Mesh] = []
    for part in FACE_COUNT_TRIES:
        count = max(4, int(part * faces))
        vertices, triangles = fast_simplification.simplify(
            mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32), target_count=count
        )
        simpler = Mesh(np.asarray(vertices, dtype=np.float64), np.asarray(triangles, dtype=np.int64))
        simpler = _offset_copies(_split_vertices(_drop_folded_faces(simpler)))
        if len(simpler.faces) and is_closed(simpler):
            return simpler
        results.append(simpler)
    return results[0] if len(results[0].faces) else mesh


def smooth_normals(mesh: Mesh) -> np.ndarray:
    """Unit normals [V, 3] of the vertices, outward: the sum of the faces' normals, each weighted by its area."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    face = np.cross(b - a, c - a)
    corners, values = mesh.faces.ravel(), np.repeat(face, 3, axis=0)
    normals = np.stack([np.bincount(corners, values[:, k], len(mesh.vertices)) for k in range(3)], axis=1)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)


def vertex_normals(surface: TensorMesh) -> Tensor:
    """`smooth_normals` of a mesh on the device, differentiable; 0 where a vertex has no area around it."""
    vertices, faces = surface
    a, b, c = vertices[faces].unbind(1)
    weighted = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(vertices).index_add(0, faces.view(-1), weighted.repeat_interleave(3, dim=0))
    # Below the floor a normal shrinks to zero instead of dividing 0 by 0.
    return normals * normals.square().sum(1, keepdim=True).clamp(min=1e-20).rsqrt()
