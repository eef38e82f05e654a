"""The scene's surface as a closed triangle mesh: taken from the density, cleaned and simplified.

The density is sampled on a grid and its iso-surface taken by marching cubes. The grid is filled from coarse to fine:
every second point of it or so shows where the surface may be, and only there the others are looked at (the cells with a
corner on either side, and those around them).

Simplification is by quadric error (Garland and Heckbert, 1997), through fast-simplification.
Triangles run counter-clockwise seen from outside.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import fast_simplification
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dream_fast.engine.errors import UserError
from dream_fast.engine.export.silhouette import Outline, outlined_level
from dream_fast.engine.geometry.marching_cubes import LAYER_POINTS, marching_cubes
from dream_fast.engine.scene.field import SceneField

SMALLEST_PART = 0.02  # of the area of the largest; smaller ones are floaters
SMALLEST_PIECE = 0.002  # the same of what is near a part
BESIDE = 0.02  # of the longest side of the mesh: what is nearer is one part
FINEST_WHOLE = 128  # points along an edge at which all of the grid is looked at
NEAR = 3.0  # of log density on either side of the surface that it is taken from: thin parts stand smoothing so
MOST_PASSES = 8  # of smoothing
TURNS, SETTLED = 6, 0.3  # at most, to find the level of an outline; what its logarithm may still move by


class NoSurface(UserError):
    """The field has nothing that a mesh could show."""


class Mesh(NamedTuple):
    """V vertices and T triangles."""

    vertices: np.ndarray  # [V, 3] float, world units
    faces: np.ndarray  # [T, 3] int64, counter-clockwise seen from outside


# ------------------------------------------------------------------------------------------------------- components


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


# --------------------------------------------------------------------------------------------------- simplification


def _edges(mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """The edge [3 T] of each triangle's sides, as one number for both directions, and whether it runs forth there."""
    start, end = mesh.faces.ravel(), mesh.faces[:, [1, 2, 0]].ravel()
    return np.minimum(start, end) * len(mesh.vertices) + np.maximum(start, end), start < end


def is_closed(mesh: Mesh) -> bool:
    """Whether every edge has two triangles, which run along it in opposite directions."""
    edge, forth = _edges(mesh)
    there, back = np.sort(edge[forth]), np.sort(edge[~forth])
    return bool(np.array_equal(there, back) and (np.diff(there) > 0).all())


def _without_flaps(mesh: Mesh) -> Mesh:
    """Without pairs of triangles that lie on each other, which collapsed edges leave, and vertices of no triangle."""
    a, b, c = mesh.faces.T
    turns = np.where(((a < b).astype(int) + (b < c) + (c < a)) == 2, 1, -1)  # the way around: two on each other differ
    corners, number = np.unique(np.sort(mesh.faces, axis=1), axis=0, return_inverse=True)
    left = np.bincount(number.reshape(-1), weights=turns, minlength=len(corners)).astype(int)
    faces = np.where(left[:, None] > 0, corners, corners[:, ::-1]).repeat(np.abs(left), axis=0)
    used, faces = np.unique(faces, return_inverse=True)
    return Mesh(mesh.vertices[used], faces.reshape(-1, 3))


def _taken_apart(mesh: Mesh) -> Mesh:
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


def _set_apart(mesh: Mesh) -> Mesh:
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
        simpler = _set_apart(_taken_apart(_without_flaps(simpler)))
        if len(simpler.faces) and is_closed(simpler):
            return simpler
        found = found or simpler
    return found if len(found.faces) else mesh


# ------------------------------------------------------------------------------------------------------ from a field


def _points_at_once(field: SceneField) -> int:
    """Of the grid; a CPU gets fewer so that it can tell how far it is."""
    return LAYER_POINTS if field.device.type == "cuda" else LAYER_POINTS // 16


class Volume(NamedTuple):
    """A field at the points of a grid that spans the scene cube [-bound, bound]^3, [N, N, N] by x, y, z."""

    values: Tensor  # log density, at least log(level) - 14
    shape: Tensor  # the same near the level, smoothed: what the surface and its normals are taken from
    level: float  # density of the surface
    bound: float  # world units

    @property
    def cell(self) -> float:
        """Distance of two neighbouring points, world units."""
        return 2 * self.bound / (len(self.values) - 1)

    @classmethod
    def of(cls, values: Tensor, level: float, field: SceneField, outline: Outline | None = None) -> "Volume":
        """The volume of these log densities of a field: of this level or, looked for from there, of that with the
        outline. What is near the level moves with it, so that is done again where it moves far.
        """
        # The width of a pass grows with the root of their number; between its own points the field has no detail.
        finest = field.finest or len(values)
        passes = min(MOST_PASSES, max(1, round(1.5 * ((len(values) - 1) / finest) ** 2)))
        for _ in range(TURNS):
            before = math.log(level)
            shape = smoothed(values.clamp(before - NEAR, before + NEAR), passes)
            found = outlined_level(shape, field.bound, outline) if outline is not None else None
            level = level if found is None else math.exp(found)
            if found is None or abs(found - before) < SETTLED:
                break
        return cls(values, shape, level, field.bound)


def density_volume(
    field: SceneField, resolution: int, *, progress: Callable[[float], None] = lambda part: None
) -> Tensor:
    """Density at resolution^3 points that span the scene cube, [X, Y, Z] on the host."""
    axis = torch.linspace(-field.bound, field.bound, resolution, device=field.device)
    volume = torch.empty(resolution, resolution, resolution)
    layers = max(1, _points_at_once(field) // resolution**2)
    for first in range(0, resolution, layers):  # the points of the whole grid never exist at once
        some = volume[first : first + layers]
        points = torch.cartesian_prod(axis[first : first + layers], axis, axis)
        some.copy_(field.density(points).view(some.shape))
        progress(min(1.0, (first + layers) / resolution))
    return volume


def surface_level(volume: Tensor, threshold: float) -> float:
    """The density at which the surface lies: the threshold, or the mean where that is lower, as for occupancy.

    Where every point is above it, the middle between the least and the greatest density, by their ratio.
    """
    if not torch.isfinite(volume).all():
        raise NoSurface("the field's density is not finite, so it has no surface to export")
    least, mean, greatest = volume.min().item(), volume.mean().item(), volume.max().item()
    if not greatest > least:
        raise NoSurface("the field's density is the same everywhere, so it has no surface to export")
    level = min(mean, threshold)
    return level if least < level < greatest else math.sqrt(least * greatest)


def log_density_volume(
    field: SceneField,
    resolution: int,
    threshold: float,
    *,
    outline: Outline | None = None,
    progress: Callable[[float], None] = lambda part: None,
) -> Volume:
    """The field at resolution^3 points, exact where its surface may be. NoSurface: there is none.

    The surface is of the density that has the outline, or that `surface_level` finds. `progress` is told the part that
    is done.
    """
    coarse = density_volume(field, min(resolution, FINEST_WHOLE), progress=lambda part: progress(part / 2))
    level = surface_level(coarse, threshold)
    found = Volume.of(_logarithm(coarse, level), level, field, outline)
    if len(coarse) == resolution:
        return found
    coarse, level = found.values, found.level
    near = _cells_near(coarse, math.log(level))
    axis = torch.linspace(-field.bound, field.bound, resolution, device=field.device)
    places = torch.linspace(0, len(coarse) - 1, resolution, dtype=torch.float64)  # in the coarse grid
    cell = places.long().clamp(max=len(coarse) - 2)
    volume = torch.empty(resolution, resolution, resolution)
    layers = max(1, _points_at_once(field) // resolution**2)
    for first in range(0, resolution, layers):
        some = slice(first, first + layers)
        # Elsewhere the coarse grid serves, whose cells have all corners on one side there.
        low, part = cell[some], (places - cell)[some].float()[:, None, None]
        between = torch.lerp(coarse[low], coarse[low + 1], part)
        volume[some] = F.interpolate(between[None], (resolution, resolution), mode="bilinear", align_corners=True)[0]
        asked = near[low][:, cell][:, :, cell].nonzero()
        if len(asked):
            points = axis[(asked + asked.new_tensor([first, 0, 0])).to(field.device)]
            volume[some][asked.unbind(1)] = _logarithm(field.density(points).float(), level).cpu()
        progress((1 + min(1.0, (first + layers) / resolution)) / 2)
    if not torch.isfinite(volume).all():
        raise NoSurface("the field's density is not finite, so it has no surface to export")
    return Volume.of(volume, level, field, outline)


def smoothed(values: Tensor, passes: int = 1) -> Tensor:
    """values [N, N, N] without what single points of a learned field have of their own.

    A pass has a quarter of both neighbours and half of the value itself, along each axis. What the passes took is
    smoothed as well and given back (Tukey's twicing), so that round parts do not shrink. Overwrites its argument.
    """
    smooth = _averaged(values.clone(), passes)
    return smooth.add_(_averaged(values.sub_(smooth), passes))


def _averaged(values: Tensor, passes: int) -> Tensor:
    """The passes of `smoothed`, in place."""
    for _, axis in product(range(passes), range(3)):
        count = values.shape[axis] - 1
        neighbours = torch.cat([values.narrow(axis, 1, count), values.narrow(axis, count, 1)], dim=axis)
        neighbours.narrow(axis, 1, count).add_(values.narrow(axis, 0, count))
        neighbours.narrow(axis, 0, 1).add_(values.narrow(axis, 0, 1))
        values.mul_(0.5).add_(neighbours, alpha=0.25)
    return values


def _logarithm(density: Tensor, level: float) -> Tensor:
    """Density rises exponentially, so its logarithm is what a straight line between two points fits. In place."""
    return density.clamp_(min=1e-6 * level).log_()


def _cells_near(values: Tensor, level: float) -> Tensor:
    """Cells [N - 1, N - 1, N - 1] of a grid [N, N, N] with corners on both sides of the level, and all around them."""
    greatest, least = F.max_pool3d(values[None], 2, 1)[0], -F.max_pool3d(-values[None], 2, 1)[0]
    return F.max_pool3d(((greatest > level) & (least <= level))[None].float(), 3, 1, padding=1)[0] > 0


def iso_surface(volume: np.ndarray, level: float) -> Mesh:
    """Of `marching_cubes`, with its arguments, in grid coordinates."""
    return Mesh(*marching_cubes(volume, level))


def surface_of(volume: Volume) -> Mesh:
    """The surface of a volume in world units, without floaters and cavities."""
    mesh = visible_parts(iso_surface(volume.shape.numpy(), math.log(volume.level)))
    return mesh._replace(vertices=mesh.vertices * volume.cell - volume.bound)


def smooth_normals(mesh: Mesh) -> np.ndarray:
    """Unit normals [V, 3] of the vertices: the sum of the faces' normals, each weighted by its area."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    face = np.cross(b - a, c - a)
    corners, values = mesh.faces.ravel(), np.repeat(face, 3, axis=0)
    normals = np.stack([np.bincount(corners, values[:, k], len(mesh.vertices)) for k in range(3)], axis=1)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
