"""Pictures for a mesh: colours and normals of the field, baked into the charts of a UV atlas.

What is seen of a field is a layer that begins around the surface. So at each vertex rays are sent into it, straight and
at 54 degrees to four sides: that gives the colour of the layer there and the depths that are seen. A texel has the mean
of the field's colours at those depths, plus what the colour of the layer differs from that at the vertices around:
detail from the field itself, and on average the colours of the renders.

Normals are in tangent space, as glTF has them: x along u, y along v, z along the smooth normal of the mesh.
Between the charts the colours of their borders go on, from coarse to fine (pull-push: Gortler et al., The Lumigraph,
1996), so that neither filtering nor a smaller copy of the picture shows a seam.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dream_fast import kernels
from dream_fast.engine.export.isosurface import Volume
from dream_fast.engine.export.uv_atlas import Atlas, tangents
from dream_fast.engine.geometry.mesh import Mesh, smooth_normals
from dream_fast.engine.geometry.voxels import trilinear
from dream_fast.engine.render.ray_samplers import ray_weights
from dream_fast.engine.scene.field import Field

BEFORE, BEHIND, SAMPLES = 1 / 16, 1 / 4, 60  # of a ray: from and to (of the bound, around the surface), and how many
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the light of a ray, at the depths of which the field is asked for its colour
SLANT = 1.4  # tangent of the angle between the straight ray and those to its sides
GATHERED = 0.2  # part of the time that the rays take
STEEPEST = 0.1  # cosine between a normal of the picture and the mesh's, at least


class Baked(NamedTuple):
    """Pictures [R, R, 3] uint8 without holes."""

    albedo: np.ndarray  # sRGB
    normal: np.ndarray | None  # (n + 1) / 2 of unit normals in tangent space


@torch.no_grad()
def bake(
    field: Field,
    mesh: Mesh,
    atlas: Atlas,
    resolution: int,
    volume: Volume | None = None,
    *,
    progress: Callable[[float], None] = lambda part: None,
) -> Baked:
    """The field's colours as a picture of resolution^2 texels, and with a volume its normals too.

    Without a volume the colours are those of the surface itself, and the mesh's own normals are all there is.
    `progress` is told the part that is done.
    """
    device, cuda = field.device, field.device.type == "cuda"
    uv, faces = torch.from_numpy(atlas.uv).to(device), torch.from_numpy(atlas.faces).int().to(device)
    clip = torch.cat([uv * 2 - 1, torch.zeros_like(uv[:, :1]), torch.ones_like(uv[:, :1])], dim=1)
    seen = kernels.rasterize(clip[None], faces, resolution, resolution)
    known = seen.triangle[0] >= 0

    points, up = (torch.from_numpy(one).float().to(device) for one in (mesh.vertices, smooth_normals(mesh)))
    depths, missing = torch.zeros_like(points[:, :1]), torch.zeros_like(points)
    if volume is not None:
        volume = volume._replace(values=volume.values.to(device), shape=volume.shape.to(device))
        parts = zip(*(one.split(1 << (18 if cuda else 13)) for one in (points, up)), strict=True)
        gathered = [_gather(field, volume, *part) for part in parts]
        depths, missing = (torch.cat(one) for one in zip(*gathered, strict=True))
        progress(GATHERED)

    source = torch.from_numpy(atlas.source).to(device)
    frame = torch.from_numpy(tangents(mesh, atlas)).float().to(device)
    each = torch.cat([points[source], up[source], frame, missing[source], depths[source]], dim=1)
    albedo, normal = torch.zeros(2, resolution, resolution, 3, device=device)
    rows = max(1, (1 << (22 if cuda else 16)) // resolution)
    for first in range(0, resolution, rows):
        some = slice(first, first + rows)
        there = known[some]
        band = kernels.Fragments(*(one[:, some].contiguous() for one in seen))
        texels = kernels.interpolate(each, faces, band)[0][there]
        point, above, tangent, side, rest, deep = texels.split([3, 3, 3, 1, 3, depths.shape[1]], dim=1)
        above = F.normalize(above, dim=1)
        albedo[some][there] = (_below(field, point, above, deep) + rest).clamp(0, 1)
        if volume is not None:
            normal[some][there] = _in_tangent_space(_slope(volume, point), above, tangent, side)
        progress(GATHERED + (1 - GATHERED) * min(1.0, (first + rows) / resolution))
    pictures = [_as_picture(fill_holes(one, known)) for one in ([albedo] if volume is None else [albedo, normal])]
    return Baked(pictures[0], pictures[1] if volume is not None else None)


def _gather(field: Field, volume: Volume, points: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """At points [V, 3] of the surface with normals `up`: the depths [V, Q] below it at the quantiles of what is seen,
    world units, and what the colour of the layer differs from the mean colour at those depths [V, 3].
    """
    bound, step = volume.bound, (BEFORE + BEHIND) * volume.bound / SAMPLES
    t = step * (torch.arange(SAMPLES, device=points.device) + 0.5) - BEFORE * bound
    one = F.normalize(torch.linalg.cross(up, torch.eye(3, device=up.device)[up.abs().argmin(1)]), dim=1)
    one, other = SLANT * one, SLANT * torch.linalg.cross(up, one)
    light = torch.full_like(points[:, :1], 1e-6)
    depths, colour = torch.zeros(len(points), len(QUANTILES), device=points.device), 1e-6 * _below(field, points, up)
    for way in (up, up + one, up - one, up + other, up - other):
        way = F.normalize(way, dim=1)
        sigma = trilinear(volume.values, bound, points[:, None] - t[:, None] * way[:, None]).exp()
        weight = ray_weights(sigma, step)  # [V, SAMPLES]
        opacity = weight.sum(1, keepdim=True)
        until = weight.cumsum(1) / opacity.clamp(min=1e-12)
        at = torch.stack([t[(until < part).sum(1).clamp(max=SAMPLES - 1)] for part in QUANTILES], dim=1)
        light += opacity
        depths += opacity * at * (way * up).sum(1, keepdim=True)
        colour += opacity * _below(field, points, way, at)
    depths = depths / light
    return depths, colour / light - _below(field, points, up, depths)


def _below(field: Field, points: Tensor, way: Tensor, depths: Tensor | None = None) -> Tensor:
    """The mean colour [K, 3] of the field at depths [K, Q] against a direction `way` from points [K, 3]; None: at 0."""
    if depths is None:
        depths = torch.zeros_like(points[:, :1])
    places = points[:, None] - depths[..., None] * way[:, None]
    return field.albedo(places.view(-1, 3).clamp(-field.bound, field.bound)).float().view(places.shape).mean(1)


def _slope(volume: Volume, point: Tensor) -> Tensor:
    """Unit directions [K, 3] in which the density falls most, by differences over two cells of the volume."""
    offsets = volume.cell * torch.eye(3, device=point.device)
    ahead, behind = (trilinear(volume.shape, volume.bound, point[:, None] + way) for way in (offsets, -offsets))
    return F.normalize(behind - ahead, dim=1)


def _in_tangent_space(normal: Tensor, up: Tensor, tangent: Tensor, side: Tensor) -> Tensor:
    """(n + 1) / 2 of world normals [K, 3] in the frame of the mesh; its own instead of those that face away."""
    tangent = F.normalize(tangent - (tangent * up).sum(1, keepdim=True) * up, dim=1)
    across = torch.linalg.cross(up, tangent) * side.sign()
    local = torch.stack([(normal * axis).sum(1) for axis in (tangent, across, up)], dim=1)
    good = local[:, 2:] > STEEPEST
    return (torch.where(good, local, local.new_tensor([0.0, 0.0, 1.0])) + 1) / 2


def _as_picture(values: Tensor) -> np.ndarray:
    return (values * 255).round().clamp(0, 255).byte().cpu().numpy()


def fill_holes(picture: Tensor, known: Tensor) -> Tensor:
    """picture [H, W, C] with the pixels that are not `known` [H, W] blended from the known ones around them."""
    weight = known.to(picture.dtype)[None, None]
    colour = picture.permute(2, 0, 1)[None] * weight
    return _pull_push(colour, weight)[0].permute(1, 2, 0)


def _pull_push(colour: Tensor, weight: Tensor) -> Tensor:
    """colour [1, C, H, W], already times its weight [1, 1, H, W] of 0 or 1, with colours where the weight is 0."""
    height, width = weight.shape[-2:]
    if height == width == 1:
        return colour
    coarse, known = (F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (colour, weight))
    coarse = _pull_push(coarse / known.clamp(min=1e-12) * (known > 0), (known > 0).to(weight.dtype))
    around = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    return torch.where(weight > 0, colour, around)
