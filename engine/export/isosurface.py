"""The surface of a field as a closed triangle mesh: an isosurface of its density, without floaters and cavities.

The density is sampled on a grid, from coarse to fine: a coarse grid shows where the surface may be (the cells with
corners on both sides and those around them), and only there the fine grid is evaluated. Triangles run counter-clockwise
seen from outside.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dream_fast.engine.export.silhouette import Silhouettes, silhouette_isovalue
from dream_fast.engine.geometry.marching_cubes import LAYER_POINTS, marching_cubes
from dream_fast.engine.geometry.mesh import Mesh, NoSurface, visible_parts
from dream_fast.engine.scene.field import Field

MAX_DENSE_RESOLUTION = 128  # points along an edge up to which the whole grid is evaluated
LOG_DENSITY_BAND = 3.0  # on either side of the isovalue; a narrow band keeps thin parts when it is smoothed
MAX_SMOOTHING_PASSES = 8
MAX_ISOVALUE_ROUNDS, ISOVALUE_TOLERANCE = 6, 0.3  # of the search by silhouettes; the tolerance is of the logarithm


class Volume(NamedTuple):
    """A field at the points of a grid that spans the scene cube [-bound, bound]^3, [N, N, N] by x, y, z."""

    values: Tensor  # log density, at least log(isovalue) - 14
    smooth: Tensor  # log density near the isovalue, smoothed: the surface and its normals are taken from it
    isovalue: float  # density of the surface
    bound: float  # world units

    @property
    def cell(self) -> float:
        """Distance of two neighbouring points, world units."""
        return 2 * self.bound / (len(self.values) - 1)


def make_volume(values: Tensor, isovalue: float, field: Field, silhouettes: Silhouettes | None = None) -> Volume:
    """The volume of log densities [N, N, N] of a field, with this isovalue or that of the silhouettes.

    The search for the latter begins at `isovalue`. The smoothed band moves with the isovalue, so the search is repeated
    until it moves by less than the tolerance.
    """
    # The width of a pass grows with the root of their number; between its own points the field has no detail.
    finest = field.finest or len(values)
    passes = min(MAX_SMOOTHING_PASSES, max(1, round(1.5 * ((len(values) - 1) / finest) ** 2)))
    for _ in range(MAX_ISOVALUE_ROUNDS):
        middle = math.log(isovalue)
        smooth = smooth_volume(values.clamp(middle - LOG_DENSITY_BAND, middle + LOG_DENSITY_BAND), passes)
        better = None if silhouettes is None else silhouette_isovalue(smooth, field.bound, silhouettes)
        isovalue = isovalue if better is None else math.exp(better)
        if better is None or abs(better - middle) < ISOVALUE_TOLERANCE:
            break
    return Volume(values, smooth, isovalue, field.bound)


def _points_at_once(field: Field) -> int:
    """Points of the grid that are evaluated together; fewer on a CPU, so that progress is reported often."""
    return LAYER_POINTS if field.device.type == "cuda" else LAYER_POINTS // 16


def sample_density(field: Field, resolution: int, *, progress: Callable[[float], None] = lambda part: None) -> Tensor:
    """Densities at resolution^3 points that span the scene cube, [X, Y, Z] on the host."""
    axis = torch.linspace(-field.bound, field.bound, resolution, device=field.device)
    volume = torch.empty(resolution, resolution, resolution)
    layers = max(1, _points_at_once(field) // resolution**2)
    for first in range(0, resolution, layers):  # the points of the whole grid never exist at once
        slab = volume[first : first + layers]
        points = torch.cartesian_prod(axis[first : first + layers], axis, axis)
        slab.copy_(field.density(points).view(slab.shape))
        progress(min(1.0, (first + layers) / resolution))
    return volume


def choose_isovalue(volume: Tensor, threshold: float) -> float:
    """The density of the surface: the threshold, or the mean density where that is lower, as for occupancy.

    Where every point is above it, the geometric mean of the least and the greatest density. Raises NoSurface: when the
    density is constant or not finite.
    """
    if not torch.isfinite(volume).all():
        raise NoSurface("the field's density is not finite, so it has no surface to export")
    least, mean, greatest = volume.min().item(), volume.mean().item(), volume.max().item()
    if not greatest > least:
        raise NoSurface("the field's density is the same everywhere, so it has no surface to export")
    isovalue = min(mean, threshold)
    return isovalue if least < isovalue < greatest else math.sqrt(least * greatest)


def sample_volume(
    field: Field,
    resolution: int,
    threshold: float,
    *,
    silhouettes: Silhouettes | None = None,
    progress: Callable[[float], None] = lambda part: None,
) -> Volume:
    """The field at resolution^3 points, exact where its surface may be.

    The isovalue is that of the silhouettes, or of `choose_isovalue`. `progress` is called with the finished part.
    Raises NoSurface: when the density is constant or not finite.
    """
    coarse = sample_density(field, min(resolution, MAX_DENSE_RESOLUTION), progress=lambda part: progress(part / 2))
    isovalue = choose_isovalue(coarse, threshold)
    volume = make_volume(_log_density(coarse, isovalue), isovalue, field, silhouettes)
    if len(coarse) < resolution:
        values = _refine(field, volume, resolution, progress=lambda part: progress((1 + part) / 2))
        volume = make_volume(values, volume.isovalue, field, silhouettes)
    return volume


def _refine(field: Field, coarse: Volume, resolution: int, progress: Callable[[float], None]) -> Tensor:
    """Log densities [N, N, N] of a finer grid: the field's near the surface, elsewhere interpolated."""
    near, points = _surface_cells(coarse.values, math.log(coarse.isovalue)), len(coarse.values)
    axis = torch.linspace(-field.bound, field.bound, resolution, device=field.device)
    places = torch.linspace(0, points - 1, resolution, dtype=torch.float64)  # in the coarse grid
    cell = places.long().clamp(max=points - 2)
    values = torch.empty(resolution, resolution, resolution)
    layers = max(1, _points_at_once(field) // resolution**2)
    for first in range(0, resolution, layers):
        slab = slice(first, first + layers)
        # Interpolation is enough elsewhere: the coarse cells there have all corners on one side.
        low, part = cell[slab], (places - cell)[slab].float()[:, None, None]
        between = torch.lerp(coarse.values[low], coarse.values[low + 1], part)
        values[slab] = F.interpolate(between[None], (resolution, resolution), mode="bilinear", align_corners=True)[0]
        index = near[low][:, cell][:, :, cell].nonzero()
        if len(index):
            positions = axis[(index + index.new_tensor([first, 0, 0])).to(field.device)]
            values[slab][index.unbind(1)] = _log_density(field.density(positions).float(), coarse.isovalue).cpu()
        progress(min(1.0, (first + layers) / resolution))
    if not torch.isfinite(values).all():
        raise NoSurface("the field's density is not finite, so it has no surface to export")
    return values


def smooth_volume(values: Tensor, passes: int = 1) -> Tensor:
    """Remove the noise of single points of a learned field from values [N, N, N]. Overwrites its argument.

    Each pass replaces a value by half of it and a quarter of both neighbours, along each axis. The removed part is
    smoothed as well and added back (Tukey's twicing), so that round parts do not shrink.
    """
    smooth = _average_neighbours(values.clone(), passes)
    return smooth.add_(_average_neighbours(values.sub_(smooth), passes))


def _average_neighbours(values: Tensor, passes: int) -> Tensor:
    """The passes of `smooth_volume`, in place."""
    for _, axis in product(range(passes), range(3)):
        count = values.shape[axis] - 1
        neighbours = torch.cat([values.narrow(axis, 1, count), values.narrow(axis, count, 1)], dim=axis)
        neighbours.narrow(axis, 1, count).add_(values.narrow(axis, 0, count))
        neighbours.narrow(axis, 0, 1).add_(values.narrow(axis, 0, 1))
        values.mul_(0.5).add_(neighbours, alpha=0.25)
    return values


def _log_density(density: Tensor, isovalue: float) -> Tensor:
    """The logarithm, which is interpolated linearly since density rises exponentially. In place."""
    return density.clamp_(min=1e-6 * isovalue).log_()


def _surface_cells(values: Tensor, isovalue: float) -> Tensor:
    """Cells [N - 1, N - 1, N - 1] of a grid [N, N, N] with corners on both sides, and the cells around them."""
    greatest, least = F.max_pool3d(values[None], 2, 1)[0], -F.max_pool3d(-values[None], 2, 1)[0]
    return F.max_pool3d(((greatest > isovalue) & (least <= isovalue))[None].float(), 3, 1, padding=1)[0] > 0


def extract_surface(volume: Volume) -> Mesh:
    """The surface of a volume in world units, without floaters and cavities."""
    mesh = visible_parts(marching_cubes(volume.smooth.numpy(), math.log(volume.isovalue)))
    return mesh._replace(vertices=mesh.vertices * volume.cell - volume.bound)
