"""The scene as a triangle mesh with vertex colours, in glTF's binary form (GLB).

The density is sampled on a grid and its iso-surface taken by marching tetrahedra: each cube of the grid is cut into
six tetrahedra around its main diagonal (Kuhn's subdivision, the same in every cube, so neighbours agree on their shared
faces), and each tetrahedron yields no, one or two triangles. No case is ambiguous, so the surface is a closed manifold;
the grid is padded with empty space to close it at the border too. Source: Doi and Koide, 1991.

World axes are glTF's (y up, the front faces +z), so nothing is turned. Triangles run counter-clockwise seen from
outside.
"""

from functools import lru_cache
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import trimesh
from torch import Tensor

from dream_fast.engine.errors import UserError
from dream_fast.engine.export.files import written_aside
from dream_fast.engine.scene_field import SceneField

SMALLEST_COMPONENT = 0.02  # of the area of the largest; smaller ones are floaters
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
    """
    volume = np.pad(volume.astype(np.float32), 1, constant_values=min(float(volume.min()), level - 1))
    inside = volume > level
    shape = np.array(volume.shape)
    strides = np.array([shape[1] * shape[2], shape[2], 1])
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
    edges = np.concatenate(edges) if edges else np.zeros((0, 3, 2), dtype=np.int64)

    # Triangles that meet on an edge share its vertex.
    low, high = edges.min(axis=2), edges.max(axis=2)
    keys, faces = np.unique(low * len(flat_volume) + high, return_inverse=True)
    low, high = keys // len(flat_volume), keys % len(flat_volume)
    start, end = flat_volume[low], flat_volume[high]
    part = ((level - start) / (end - start)).clip(EDGE_MARGIN, 1 - EDGE_MARGIN)[:, None]
    low, high = (np.stack(np.unravel_index(ends, shape), axis=-1) for ends in (low, high))
    return Mesh(low + part * (high - low) - 1.0, faces.reshape(-1, 3))


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
    logarithm = volume.clamp(min=1e-6 * level).log().numpy()
    mesh = without_floaters(marching_tetrahedra(logarithm, float(np.log(level))))
    bound = field.bound
    return mesh._replace(vertices=mesh.vertices * (2 * bound / (resolution - 1)) - bound)


def linear_from_srgb(colour: np.ndarray) -> np.ndarray:
    """Displayed colour in [0, 1] to the linear light that glTF expects of vertex colours."""
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def smooth_normals(mesh: Mesh) -> np.ndarray:
    """Unit normals [V, 3] of the vertices: the sum of the faces' normals, each weighted by its area."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    face = np.cross(b - a, c - a)
    corners, values = mesh.faces.ravel(), np.repeat(face, 3, axis=0)
    normals = np.stack([np.bincount(corners, values[:, k], len(mesh.vertices)) for k in range(3)], axis=1)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)


def write_mesh(path: Path, field: SceneField, resolution: int, threshold: float) -> Mesh:
    """Write the field's surface as `write_glb` does."""
    mesh = extract_mesh(field, resolution, threshold)
    write_glb(path, mesh, field)
    return mesh


def write_glb(path: Path, mesh: Mesh, field: SceneField) -> None:
    """Write a mesh as GLB: vertex colours from the field's albedo, a matt white material, smooth normals."""
    points = torch.from_numpy(mesh.vertices).float().to(field.device)
    albedo = linear_from_srgb(field.albedo(points).cpu().double().numpy())
    colours = np.concatenate([albedo, np.ones_like(albedo[:, :1])], axis=1)
    material = trimesh.visual.material.PBRMaterial(metallicFactor=0.0, roughnessFactor=1.0)
    visual = trimesh.visual.TextureVisuals(material=material)
    visual.vertex_attributes["color"] = (colours * 255).round().astype(np.uint8)
    # process=False: merging near vertices would break the manifold. Normals of our own: trimesh wants SciPy for its.
    normals = smooth_normals(mesh)
    shape = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=normals, visual=visual, process=False)
    with written_aside(path) as aside:
        shape.export(aside, file_type="glb", include_normals=True)
