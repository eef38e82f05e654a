"""Pictures for a mesh: its triangles laid out on a square (a UV atlas), and colours and normals of the field baked in.

Texture coordinates (u, v) are in [0, 1] with v up, so that row 0 of a picture is v = 1. Normals are in tangent space, as
glTF has them: x along u, y along v, z along the smooth normal of the mesh.
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
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.surface import Mesh, Volume, smooth_normals
from dream_fast.engine.scene_field import SceneField

PADDING = 4  # texels between two charts
BEFORE, BEHIND, SAMPLES = 1 / 128, 1 / 16, 16  # of the ray into a texel, from and to (of the bound), and how many
STEEPEST = 0.1  # cosine between a normal of the picture and the mesh's, at least
LARGEST_PAGE = 1 << 15


class Atlas(NamedTuple):
    """A mesh whose vertices are doubled along the borders of its charts."""

    source: np.ndarray  # [V] int64: the vertex of the mesh that each one is
    faces: np.ndarray  # [T, 3] int64: the mesh's triangles, in their order
    uv: np.ndarray  # [V, 2] float32 in [0, 1]


class Baked(NamedTuple):
    """Pictures [R, R, 3] uint8 without holes."""

    albedo: np.ndarray  # sRGB
    normal: np.ndarray | None  # (n + 1) / 2 of unit normals in tangent space


# ---------------------------------------------------------------------------------------------------------------- atlas


def unwrap(mesh: Mesh, resolution: int) -> Atlas:
    """Lay the mesh out for a picture of resolution^2 texels, by uvunwrap or, where that cannot, xatlas."""
    vertices, faces = mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32)
    try:
        return _unwrap_by_uvunwrap(vertices, faces, resolution)
    except ImportError:
        pass
    except BaseException as error:
        # Its Rust panics on some surfaces full of splinters, with an exception that is none of Python's errors.
        if type(error).__name__ not in ("PanicException", "UnwrapError"):
            raise
    return _unwrap_by_xatlas(vertices, faces, resolution)


def _unwrap_by_uvunwrap(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> Atlas:
    import uvunwrap

    mesh, page = uvunwrap.Mesh(vertices, faces), resolution
    while True:
        # The densest packing takes minutes for the thousands of charts of a rough surface, and gains 4 % of the page.
        atlas = uvunwrap.generate([mesh], page_size=page, padding=PADDING, packing="fast")
        if atlas.page_count == 1 or page >= LARGEST_PAGE:
            break
        page *= 2  # more charts than fit with their padding: that gets smaller
    laid = atlas.meshes[0]
    uv = np.array(laid.uv, dtype=np.float32).reshape(-1, 2)
    return Atlas(np.array(laid.xref, dtype=np.int64), np.array(laid.indices, dtype=np.int64).reshape(-1, 3), uv)


def _unwrap_by_xatlas(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> Atlas:
    try:
        import xatlas
    except ImportError:
        raise UserError("a textured mesh needs uvunwrap or xatlas: pip install uvunwrap xatlas") from None
    atlas, packing = xatlas.Atlas(), xatlas.PackOptions()
    packing.resolution, packing.padding = resolution, PADDING
    atlas.add_mesh(vertices, faces)
    atlas.generate(pack_options=packing)
    source, laid, uv = atlas[0]
    return Atlas(source.astype(np.int64), laid.astype(np.int64), np.asarray(uv, dtype=np.float32))


# --------------------------------------------------------------------------------------------------------------- baking


@torch.no_grad()
def bake(
    field: SceneField,
    mesh: Mesh,
    atlas: Atlas,
    resolution: int,
    volume: Volume | None = None,
    *,
    progress: Callable[[float], None] = lambda part: None,
) -> Baked:
    """The field's colours at the surface as a picture of resolution^2 texels, and with a volume its normals.

    With a volume a texel has the colour of the depth from which a ray straight into the surface gathers its light, on
    average: what is seen of a field is a layer, and the surface lies somewhere in it. Without one it is the colour of
    the surface itself, and the mesh's own normals are all there is. `progress` is told the part that is done.
    """
    device = field.device
    uv = torch.from_numpy(atlas.uv).to(device)
    clip = torch.cat([uv * 2 - 1, torch.zeros_like(uv[:, :1]), torch.ones_like(uv[:, :1])], dim=1)
    faces = torch.from_numpy(atlas.faces).int().to(device)
    seen = kernels.rasterize(clip[None], faces, resolution, resolution)
    normals = smooth_normals(mesh)[atlas.source]
    each = np.concatenate([mesh.vertices[atlas.source], normals, tangents(mesh, atlas, normals)], axis=1)
    places = kernels.interpolate(torch.from_numpy(each).float().to(device), faces, seen)[0]  # [R, R, 10]
    texels = (seen.triangle[0] >= 0).nonzero()  # [K, 2]
    del seen
    values, shape = (None, None) if volume is None else (volume.values.to(device), volume.shape.to(device))
    albedo = torch.zeros(resolution, resolution, 3, device=device)
    normal = None if volume is None else torch.zeros_like(albedo)
    chunk = 1 << (22 if device.type == "cuda" else 16)
    for done, some in enumerate(texels.split(chunk)):
        row, column = some.unbind(1)
        point, up, tangent, side = places[row, column].split([3, 3, 3, 1], dim=1)
        up = F.normalize(up, dim=1)
        looked = point
        if values is not None:
            looked = point - _seen_depth(values, volume.bound, point, up) * up
            normal[row, column] = _in_tangent_space(_slope(shape, volume, point), up, tangent, side)
        albedo[row, column] = field.albedo(looked.clamp(-field.bound, field.bound)).float()
        progress(min(1.0, (done + 1) * chunk / len(texels)))
    known = torch.zeros(resolution, resolution, dtype=torch.bool, device=device)
    known[texels.unbind(1)] = True
    return Baked(*(None if one is None else _as_picture(fill_holes(one, known)) for one in (albedo, normal)))


def tangents(mesh: Mesh, atlas: Atlas, normals: np.ndarray) -> np.ndarray:
    """Of each vertex of the atlas [V, 4]: the direction in which u grows, and 1, or -1 where v grows to its right."""
    corners = mesh.vertices[atlas.source][atlas.faces]
    uv = atlas.uv.astype(np.float64)[atlas.faces]
    (du1, dv1), (du2, dv2) = (uv[:, 1] - uv[:, 0]).T, (uv[:, 2] - uv[:, 0]).T
    edge1, edge2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    twice = du1 * dv2 - du2 * dv1  # area in the picture
    along = (dv2[:, None] * edge1 - dv1[:, None] * edge2) * np.sign(twice)[:, None]  # by area, so that slivers count less
    vertices = np.repeat(atlas.faces.ravel(), 3).reshape(-1, 3)
    summed, side = np.zeros((len(atlas.source), 3)), np.zeros(len(atlas.source))
    np.add.at(summed, (vertices, np.arange(3)), np.repeat(along, 3, axis=0))
    np.add.at(side, atlas.faces.ravel(), np.repeat(twice, 3))
    summed -= (summed * normals).sum(1, keepdims=True) * normals
    length = np.linalg.norm(summed, axis=1, keepdims=True)
    return np.concatenate([summed / np.maximum(length, 1e-30), np.where(side < 0, -1.0, 1.0)[:, None]], axis=1)


def _look_up(values: Tensor, bound: float, points: Tensor) -> Tensor:
    """Values [N, N, N] of a volume between its points, at world points [..., 3]."""
    places = (points / bound).flip(-1).reshape(1, 1, 1, -1, 3)  # grid_sample takes z, y, x
    found = F.grid_sample(values[None, None], places, mode="bilinear", padding_mode="border", align_corners=True)
    return found.view(points.shape[:-1])


def _seen_depth(values: Tensor, bound: float, point: Tensor, up: Tensor) -> Tensor:
    """How far behind the surface [K, 1] a ray against `up` [K, 3] gathers its light on average, world units."""
    step = (BEFORE + BEHIND) * bound / SAMPLES
    t = step * (torch.arange(SAMPLES, device=point.device) + 0.5) - BEFORE * bound
    tau = _look_up(values, bound, point[:, None] - t[:, None] * up[:, None]).exp() * step
    weight = torch.exp(tau - tau.cumsum(1)) * -torch.expm1(-tau)
    return ((weight * t).sum(1) / weight.sum(1).clamp(min=1e-12))[:, None]


def _slope(values: Tensor, volume: Volume, point: Tensor) -> Tensor:
    """Unit directions [K, 3] in which the density falls most, by differences over two cells of the volume."""
    offsets = volume.cell * torch.eye(3, device=point.device)
    ahead, behind = (_look_up(values, volume.bound, point[:, None] + way) for way in (offsets, -offsets))
    return F.normalize(behind - ahead, dim=1)


def _in_tangent_space(normal: Tensor, up: Tensor, tangent: Tensor, side: Tensor) -> Tensor:
    """(n + 1) / 2 of world normals [K, 3] in the frame of the mesh; those that nearly face inwards become the mesh's."""
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
    pool = {"kernel_size": 2, "ceil_mode": True, "count_include_pad": False}
    coarse, known = F.avg_pool2d(colour, **pool), F.avg_pool2d(weight, **pool)
    coarse = _pull_push(coarse / known.clamp(min=1e-12) * (known > 0), (known > 0).to(weight.dtype))
    around = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    return torch.where(weight > 0, colour, around)
