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

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dream_fast.engine.export.silhouette import Silhouette, silhouette_isovalue
from dream_fast.engine.geometry.marching_cubes import LAYER_POINTS, marching_cubes
from dream_fast.engine.geometry.mesh import Mesh, NoSurface, visible_parts
from dream_fast.engine.scene.field import Field

FINEST_WHOLE = 128  # points along an edge at which all of the grid is looked at
NEAR = 3.0  # of log density on either side of the surface that it is taken from: thin parts stand smoothing so
MOST_PASSES = 8  # of smoothing
TURNS, SETTLED = 6, 0.3  # at most, to find the level of an outline; what its logarithm may still move by


# ------------------------------------------------------------------------------------------------------- components


# --------------------------------------------------------------------------------------------------- simplification


# ------------------------------------------------------------------------------------------------------ from a field


def _points_at_once(field: Field) -> int:
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
    def of(cls, values: Tensor, level: float, field: Field, outline: Silhouette | None = None) -> "Volume":
        """The volume of these log densities of a field: of this level or, looked for from there, of that with the
        outline. What is near the level moves with it, so that is done again where it moves far.
        """
        # The width of a pass grows with the root of their number; between its own points the field has no detail.
        finest = field.finest or len(values)
        passes = min(MOST_PASSES, max(1, round(1.5 * ((len(values) - 1) / finest) ** 2)))
        for _ in range(TURNS):
            before = math.log(level)
            shape = smoothed(values.clamp(before - NEAR, before + NEAR), passes)
            found = silhouette_isovalue(shape, field.bound, outline) if outline is not None else None
            level = level if found is None else math.exp(found)
            if found is None or abs(found - before) < SETTLED:
                break
        return cls(values, shape, level, field.bound)


def density_volume(field: Field, resolution: int, *, progress: Callable[[float], None] = lambda part: None) -> Tensor:
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
    field: Field,
    resolution: int,
    threshold: float,
    *,
    outline: Silhouette | None = None,
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
