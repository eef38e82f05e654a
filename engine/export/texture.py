"""Textures of a mesh: colours and normals of a field, baked into the charts of a UV atlas.

A render shows a layer of the field around the surface and not the surface alone. So rays are traced into that layer at
each vertex, one straight and four at 54 degrees, which gives the colour of the layer and the depths that contribute to
it. A texel has the mean of the field's colours at those depths, plus the difference between layer colour and mean
colour at the vertices around it: the detail is the field's, the average that of the renders.

Normals are in tangent space, as in glTF: x along u, y along v, z along the smooth normal of the mesh. Between charts
the colours of their borders are extended from coarse to fine (pull-push: Gortler et al., The Lumigraph, 1996), so that
neither filtering nor a smaller copy of the image shows a seam.
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

LAYER_OUTSIDE, LAYER_INSIDE = 1 / 16, 1 / 4  # thickness of the layer on both sides of the surface, of the bound
RAY_SAMPLES = 60  # of a ray through the layer
DEPTH_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the light of a ray: the depths at which the colour is evaluated
SIDE_RAY_SLOPE = 1.4  # tangent of the angle between the straight ray and the others
TRACING_SHARE = 0.2  # of the time, for progress
MIN_NORMAL_COSINE = 0.1  # between a normal of the image and the mesh's


class BakedTextures(NamedTuple):
    """Images [R, R, 3] uint8 without holes."""

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
) -> BakedTextures:
    """Bake the field's colours into resolution^2 texels and, with a volume, its normals too.

    Without a volume the colours are those at the surface itself. `progress` is called with the finished part.
    """
    device, cuda = field.device, field.device.type == "cuda"
    uv, faces = torch.from_numpy(atlas.uv).to(device), torch.from_numpy(atlas.faces).int().to(device)
    clip = torch.cat([uv * 2 - 1, torch.zeros_like(uv[:, :1]), torch.ones_like(uv[:, :1])], dim=1)
    fragments = kernels.rasterize(clip[None], faces, resolution, resolution)
    covered = fragments.triangle[0] >= 0

    points, up = (torch.from_numpy(part).float().to(device) for part in (mesh.vertices, smooth_normals(mesh)))
    depths, difference = torch.zeros_like(points[:, :1]), torch.zeros_like(points)
    if volume is not None:
        volume = volume._replace(values=volume.values.to(device), smooth=volume.smooth.to(device))
        chunks = zip(*(part.split(1 << (18 if cuda else 13)) for part in (points, up)), strict=True)
        traced = [_trace_layer(field, volume, *chunk) for chunk in chunks]
        depths, difference = (torch.cat(part) for part in zip(*traced, strict=True))
        progress(TRACING_SHARE)

    source = torch.from_numpy(atlas.source).to(device)
    frame = torch.from_numpy(tangents(mesh, atlas)).float().to(device)
    attributes = torch.cat([points[source], up[source], frame, difference[source], depths[source]], dim=1)
    albedo, normal = torch.zeros(2, resolution, resolution, 3, device=device)
    rows = max(1, (1 << (22 if cuda else 16)) // resolution)
    for first in range(0, resolution, rows):
        band = slice(first, first + rows)
        mask = covered[band]
        band_fragments = kernels.Fragments(*(part[:, band].contiguous() for part in fragments))
        texels = kernels.interpolate(attributes, faces, band_fragments)[0][mask]
        point, above, tangent, side, rest, depth = texels.split([3, 3, 3, 1, 3, depths.shape[1]], dim=1)
        above = F.normalize(above, dim=1)
        albedo[band][mask] = (_mean_albedo_below(field, point, above, depth) + rest).clamp(0, 1)
        if volume is not None:
            normal[band][mask] = _to_tangent_space(_volume_normals(volume, point), above, tangent, side)
        progress(TRACING_SHARE + (1 - TRACING_SHARE) * min(1.0, (first + rows) / resolution))
    textures = [albedo] if volume is None else [albedo, normal]
    images = [_to_uint8(fill_holes(texture, covered)) for texture in textures]
    return BakedTextures(images[0], images[1] if volume is not None else None)


def _trace_layer(field: Field, volume: Volume, points: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Trace rays into the layer at surface points [V, 3] with normals `up` [V, 3].

    Returns the depths [V, Q] below the surface at the quantiles of the light, in world units, and the difference [V, 3]
    between the colour of the layer and the mean colour at those depths.
    """
    bound, step = volume.bound, (LAYER_OUTSIDE + LAYER_INSIDE) * volume.bound / RAY_SAMPLES
    t = step * (torch.arange(RAY_SAMPLES, device=points.device) + 0.5) - LAYER_OUTSIDE * bound
    side = F.normalize(torch.linalg.cross(up, torch.eye(3, device=up.device)[up.abs().argmin(1)]), dim=1)
    side, other = SIDE_RAY_SLOPE * side, SIDE_RAY_SLOPE * torch.linalg.cross(up, side)
    light = torch.full_like(points[:, :1], 1e-6)
    depths = torch.zeros(len(points), len(DEPTH_QUANTILES), device=points.device)
    colour = 1e-6 * _mean_albedo_below(field, points, up)
    for way in (up, up + side, up - side, up + other, up - other):
        way = F.normalize(way, dim=1)
        sigma = trilinear(volume.values, bound, points[:, None] - t[:, None] * way[:, None]).exp()
        weight = ray_weights(sigma, step)  # [V, RAY_SAMPLES]
        opacity = weight.sum(1, keepdim=True)
        cumulative = weight.cumsum(1) / opacity.clamp(min=1e-12)
        last = RAY_SAMPLES - 1
        depth = torch.stack([t[(cumulative < part).sum(1).clamp(max=last)] for part in DEPTH_QUANTILES], dim=1)
        light += opacity
        depths += opacity * depth * (way * up).sum(1, keepdim=True)
        colour += opacity * _mean_albedo_below(field, points, way, depth)
    depths = depths / light
    return depths, colour / light - _mean_albedo_below(field, points, up, depths)


def _mean_albedo_below(field: Field, points: Tensor, way: Tensor, depths: Tensor | None = None) -> Tensor:
    """Mean albedo [K, 3] at depths [K, Q] (None: 0) from points [K, 3] against the direction `way` [K, 3]."""
    if depths is None:
        depths = torch.zeros_like(points[:, :1])
    positions = points[:, None] - depths[..., None] * way[:, None]
    return field.albedo(positions.view(-1, 3).clamp(-field.bound, field.bound)).float().view(positions.shape).mean(1)


def _volume_normals(volume: Volume, point: Tensor) -> Tensor:
    """Unit directions [K, 3] in which the density falls fastest, by differences over two cells of the volume."""
    offsets = volume.cell * torch.eye(3, device=point.device)
    ahead, behind = (trilinear(volume.smooth, volume.bound, point[:, None] + way) for way in (offsets, -offsets))
    return F.normalize(behind - ahead, dim=1)


def _to_tangent_space(normal: Tensor, up: Tensor, tangent: Tensor, side: Tensor) -> Tensor:
    """(n + 1) / 2 of world normals [K, 3] in the mesh's frame; normals that face away become the mesh's own."""
    tangent = F.normalize(tangent - (tangent * up).sum(1, keepdim=True) * up, dim=1)
    across = torch.linalg.cross(up, tangent) * side.sign()
    local = torch.stack([(normal * axis).sum(1) for axis in (tangent, across, up)], dim=1)
    facing = local[:, 2:] > MIN_NORMAL_COSINE
    return (torch.where(facing, local, local.new_tensor([0.0, 0.0, 1.0])) + 1) / 2


def _to_uint8(values: Tensor) -> np.ndarray:
    return (values * 255).round().clamp(0, 255).byte().cpu().numpy()


def fill_holes(image: Tensor, known: Tensor) -> Tensor:
    """image [H, W, C] with the pixels that are not `known` [H, W] blended from the known ones around them."""
    weight = known.to(image.dtype)[None, None]
    colour = image.permute(2, 0, 1)[None] * weight
    return _pull_push(colour, weight)[0].permute(1, 2, 0)


def _pull_push(colour: Tensor, weight: Tensor) -> Tensor:
    """Fill colour [1, C, H, W], already multiplied by its weight [1, 1, H, W] of 0 or 1, where the weight is 0."""
    height, width = weight.shape[-2:]
    if height == width == 1:
        return colour
    coarse, known = (F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (colour, weight))
    coarse = _pull_push(coarse / known.clamp(min=1e-12) * (known > 0), (known > 0).to(weight.dtype))
    around = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    return torch.where(weight > 0, colour, around)
