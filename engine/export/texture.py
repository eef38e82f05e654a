"""A picture for a mesh: its triangles laid out on a square (a UV atlas), and the field's colours baked into it.

Texture coordinates (u, v) are in [0, 1] with v up, so that row 0 of the picture is v = 1.
Between the charts the colours of their borders go on, from coarse to fine (pull-push: Gortler et al., The Lumigraph,
1996), so that neither filtering nor a smaller copy of the picture shows a seam.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dream_fast import kernels
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.surface import Mesh, smooth_normals
from dream_fast.engine.scene_field import SceneField

PADDING = 4  # texels between two charts
SAMPLES = 6  # of the ray into a texel
CHUNK = 1 << 17  # texels whose rays are looked at together


class Atlas(NamedTuple):
    """A mesh whose vertices are doubled along the borders of its charts."""

    source: np.ndarray  # [V] int64: the vertex of the mesh that each one is
    faces: np.ndarray  # [T, 3] int64: the mesh's triangles, in their order
    uv: np.ndarray  # [V, 2] float32 in [0, 1]


def unwrap(mesh: Mesh, resolution: int) -> Atlas:
    """Lay the mesh out for a picture of resolution^2 texels, by uvunwrap or, where that is missing, xatlas."""
    vertices, faces = mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32)
    try:
        import uvunwrap
    except ImportError:
        return _unwrap_by_xatlas(vertices, faces, resolution)
    # The densest packing takes minutes for the thousands of charts of a rough surface, and gains 4 % of the page.
    atlas = uvunwrap.generate([uvunwrap.Mesh(vertices, faces)], page_size=resolution, padding=PADDING, packing="fast")
    laid = atlas.meshes[0]
    uv = np.array(laid.uv, dtype=np.float32).reshape(-1, 2)
    # The page may be smaller than asked for.
    return Atlas(np.array(laid.xref, dtype=np.int64), np.array(laid.indices, dtype=np.int64).reshape(-1, 3), uv)


def _unwrap_by_xatlas(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> Atlas:
    try:
        import xatlas
    except ImportError:
        raise UserError("a textured mesh needs uvunwrap or xatlas: pip install uvunwrap") from None
    atlas, packing = xatlas.Atlas(), xatlas.PackOptions()
    packing.resolution, packing.padding = resolution, PADDING
    atlas.add_mesh(vertices, faces)
    atlas.generate(pack_options=packing)
    source, laid, uv = atlas[0]
    return Atlas(source.astype(np.int64), laid.astype(np.int64), np.asarray(uv, dtype=np.float32))


@torch.no_grad()
def bake(field: SceneField, mesh: Mesh, atlas: Atlas, resolution: int, depth: float) -> np.ndarray:
    """The field's colours at the surface as a picture [resolution, resolution, 3], uint8 sRGB, without holes.

    A texel has the colour that a short ray straight into the surface gathers between `depth` world units before and
    twice as many behind it: what is seen is a layer, and the surface lies somewhere in it.
    """
    device = field.device
    uv = torch.from_numpy(atlas.uv).to(device)
    clip = torch.cat([uv * 2 - 1, torch.zeros_like(uv[:, :1]), torch.ones_like(uv[:, :1])], dim=1)
    faces = torch.from_numpy(atlas.faces).int().to(device)
    seen = kernels.rasterize(clip[None], faces, resolution, resolution)
    both = np.concatenate([mesh.vertices, smooth_normals(mesh)], axis=1)[atlas.source]
    places = kernels.interpolate(torch.from_numpy(both).float().to(device), faces, seen)[0]
    covered = seen.triangle[0] >= 0
    points, inward = places[covered].split(3, dim=-1)
    inward = -inward / inward.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    colours = torch.zeros(resolution, resolution, 3, device=device)
    step = 3 * depth / SAMPLES
    found = []
    for start, way in zip(points.split(CHUNK), inward.split(CHUNK), strict=True):
        t = step * (torch.arange(SAMPLES, device=device) + 0.5) - depth
        along = (start[:, None] + t[:, None] * way[:, None]).clamp(-field.bound, field.bound)
        values = field(along.view(-1, 3))
        tau = values.sigma.view(-1, SAMPLES) * step
        weights = torch.exp(tau - tau.cumsum(1)) * -torch.expm1(-tau) + 1e-6
        found.append((weights[..., None] * values.albedo.view(-1, SAMPLES, 3)).sum(1) / weights.sum(1, keepdim=True))
    colours[covered] = torch.cat([colours[:0, 0], *found]).float()
    filled = fill_holes(colours, covered)
    return (filled * 255).round().clamp(0, 255).byte().cpu().numpy()


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
