"""Images of the procedural world: scenes as tensors, traced by `kernels.rays.trace`, with patterns and light.

Light, shading and cameras are the engine's, so that a rendered field can look like what the model was trained on.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dream_fast.engine.dream_mini.catalogue import PATTERNS
from dream_fast.engine.dream_mini.scenes import KINDS, MAIN, Scene, bounding_points
from dream_fast.engine.scene.camera import Cameras, rays
from dream_fast.kernels import trace as trace_rays

SIZES = 6


class Packed(NamedTuple):
    """B scenes with P primitives: the tensors of `kernels.rays.trace`, and colours."""

    table: Tensor  # [P, 20]
    starts: Tensor  # [B, 3] int32
    blend: Tensor  # [B, 2]
    radius: Tensor  # [B] of a sphere around the unstretched scene
    stretch: Tensor  # [B, 3]
    color: Tensor  # [P, 3]
    pattern: Tensor  # [P] int32 0 plain, else 1 + index into PATTERNS


class Traced(NamedTuple):
    """Surfaces that rays meet."""

    hit: Tensor  # [B, R] bool
    normal: Tensor  # [B, R, 3], 0 where nothing is met
    albedo: Tensor  # [B, R, 3]


def pack(scenes: list[Scene], device: torch.device | str) -> Packed:
    """Scenes as tensors on a device."""
    return to_tensors(pack_arrays(scenes), device)


def to_tensors(arrays: tuple[np.ndarray, ...], device: torch.device | str) -> Packed:
    return Packed(*(torch.from_numpy(array).to(device) for array in arrays))


def pack_arrays(scenes: list[Scene]) -> tuple[np.ndarray, ...]:
    """Scenes as the arrays of `Packed`."""
    rows: list[tuple] = []
    colors, patterns, starts, blends, radii = [], [], [], [], []
    for scene in scenes:
        first = []
        for item in scene.items:
            first.append(len(rows))
            pattern = 1 + PATTERNS.index(item.attribute) if item.attribute in PATTERNS else 0
            for p in item.primitives:
                size = p.size if p.kind != "arc" else (*p.size[:2], np.sin(p.size[2]), np.cos(p.size[2]))
                size = (*size, *(1.0,) * (SIZES - len(size)))
                rows.append((*p.center, *p.rotation.ravel(), *size, KINDS.index(p.kind), p.role))
                colors.append(p.color)
                patterns.append(pattern if p.role == MAIN else 0)
        starts.append((first[0], first[1] if len(first) > 1 else len(rows), len(rows)))
        blends.append([*(item.blend for item in scene.items), 0.0][:2])
        # blended surfaces swell by the logarithm of how many primitives meet
        radii.append(1.02 * np.linalg.norm(bounding_points(scene.primitives), axis=1).max() + 2 * max(blends[-1]))
    return (
        np.array(rows, np.float32), np.array(starts, np.int32), np.array(blends, np.float32),
        np.array(radii, np.float32), np.array([scene.stretch for scene in scenes], np.float32),
        np.array(colors, np.float32), np.array(patterns, np.int32),
    )  # fmt: skip


def trace(origins: Tensor, directions: Tensor, packed: Packed) -> Traced:
    """Trace rays [B, R, 3] through scenes."""
    stretch = packed.stretch[:, None]
    origins, directions = origins / stretch, directions / stretch
    hits = trace_rays(origins, directions, packed.table, packed.starts, packed.blend, packed.radius)
    hit = hits.primitive >= 0
    row = hits.primitive.clamp(min=0).long()
    points = torch.where(hit[..., None], origins + hits.depth[..., None] * directions, 0.0)
    albedo = packed.color[row]
    painted = _painted(points, packed.pattern[row])
    bright = albedo @ albedo.new_tensor([0.3, 0.55, 0.15])
    contrast = torch.where(bright > 0.6, 0.12, 0.95)[..., None].expand_as(albedo)
    normal = torch.nn.functional.normalize(hits.normal / stretch, dim=-1)
    return Traced(hit, normal, torch.where(painted[..., None], contrast, albedo))


def _painted(points: Tensor, pattern: Tensor) -> Tensor:
    """Mask [B, R] of points [B, R, 3] that have the second colour of their pattern [B, R]."""
    x, y, z = points.unbind(-1)
    striped = torch.sin(y * 45) > 0.25
    cell = points * 5.5
    # dots on a body-centred lattice: the nearer of two grids, one shifted by half a cell
    apart = torch.minimum(_to_whole(cell), _to_whole(cell + 0.5))
    spotted = apart < 0.3
    checked = ((torch.floor(x * 11 + 0.5) + torch.floor(y * 11 + 0.5) + torch.floor(z * 11 + 0.5)) % 2) > 0.5
    turn = torch.atan2(x, z) * (9 / torch.pi)
    zigzag = torch.sin(y * 45 + 3.2 * (2 * (turn - torch.floor(turn + 0.5)).abs() - 0.5)) > 0.25
    kinds = (striped, spotted, checked, zigzag)
    return sum(((pattern == 1 + k) & where for k, where in enumerate(kinds)), torch.zeros_like(striped))


def _to_whole(cell: Tensor) -> Tensor:
    return (cell - torch.floor(cell + 0.5)).norm(dim=-1)


def render(
    packed: Packed, cameras: Cameras, size: int, *, shading: Tensor, ambient: Tensor, light_noise: Tensor,
    background: Tensor, supersample=1.5,
) -> Tensor:  # fmt: skip
    """Images [B, size, size, 3] in [0, 1] of packed scenes, one camera a scene.

    shading [B]: 0 albedo, 1 lambertian, 2 textureless. ambient [B]. light_noise [B, 3]: the light shines from
    normalize(camera position + noise). background [B, 3].
    """
    fine = round(size * supersample)
    origins, directions = rays(cameras, fine, fine)
    traced = trace(origins, directions, packed)
    light = torch.nn.functional.normalize(cameras.c2w[:, :3, 3] + light_noise, dim=-1)
    lambert = (traced.normal * light[:, None]).sum(-1, keepdim=True).clamp(min=0)
    lambert = ambient[:, None, None] + (1 - ambient[:, None, None]) * lambert
    shading = shading[:, None, None]
    color = torch.where(shading == 0, traced.albedo, torch.where(shading == 1, traced.albedo * lambert, lambert))
    color = torch.where(traced.hit[..., None], color, background[:, None])
    image = color.reshape(-1, fine, fine, 3).permute(0, 3, 1, 2)
    if fine > size:
        image = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return image.permute(0, 2, 3, 1)
