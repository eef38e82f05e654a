"""Sphere tracing of the procedural world (Hart 1996), in plain PyTorch; `torch.compile` fuses it on a GPU.

Light, shading and cameras are those of the engine, so that rendered fields resemble the training images.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from dream_fast.engine.dream_mini.scenes import KINDS, RADIUS, Scene
from dream_fast.engine.scene.camera import Cameras, rays

MAIN, OTHER, CUT = 1, 2, 3
FAR = 10.0
_SLOTS = {"ball": 24, "box": 12, "cone": 16, "ring": 3}  # slots per scene


class Primitives(NamedTuple):
    """Primitives of one kind in a batch of B scenes, K slots each."""

    center: torch.Tensor  # [B, 1, K, 3]
    rotation: torch.Tensor  # [B, 1, K, 9]
    size: torch.Tensor  # [B, 1, K, 8] size of `scenes.Primitive`, extended by `_prepared`
    color: torch.Tensor  # [B, K, 3]
    role: torch.Tensor  # [B, 1, K] 0 empty | MAIN | OTHER | CUT


class Traced(NamedTuple):
    """Intersections of rays, [B, R, ...]."""

    hit: torch.Tensor  # [B, R] bool
    normal: torch.Tensor  # [B, R, 3]
    albedo: torch.Tensor  # [B, R, 3]


def pack(scenes: list[Scene], device: torch.device | str) -> tuple[dict[str, Primitives], torch.Tensor]:
    """Scenes as tensors by kind of primitive, and their patterns [B]."""
    packed = {}
    for kind in KINDS:
        slots = _SLOTS[kind]
        shape = (len(scenes), slots)
        center, turn = np.zeros((*shape, 3), np.float32), np.zeros((*shape, 9), np.float32)
        size, color = np.ones((*shape, 8), np.float32), np.zeros((*shape, 3), np.float32)
        role = np.zeros(shape, np.int32)
        for b, scene in enumerate(scenes):
            of_kind = [p for p in scene.primitives if p.kind == kind]
            if len(of_kind) > slots:
                raise ValueError(
                    f"{scene.name} has {len(of_kind)} primitives of kind {kind}, at most {slots} are allowed"
                )
            for k, p in enumerate(of_kind):
                center[b, k], turn[b, k], color[b, k] = p.center, p.rotation.reshape(9), p.color
                size[b, k] = _prepared(kind, p.size)
                role[b, k] = CUT if p.cut else MAIN if p.main else OTHER
        arrays = (center[:, None], turn[:, None], size[:, None], color, role[:, None])
        packed[kind] = Primitives(*(torch.from_numpy(a).to(device) for a in arrays))
    return packed, torch.tensor([scene.pattern for scene in scenes], device=device)


def _prepared(kind: str, size: tuple[float, ...]) -> np.ndarray:
    """The size [8], and the reciprocals that spare divisions a ray."""
    out = np.ones(8, np.float32)
    out[: len(size)] = size
    if kind == "ball":
        out[3:6] = 1 / out[:3]
    if kind == "box":
        hx, hy, hz, _, top_x, top_z = size
        slope = max(hx * abs(1 - top_x), hz * abs(1 - top_z)) / (2 * hy)
        out[6:] = 1 / (2 * hy), 1 / np.sqrt(1 + slope**2)
    if kind == "cone":
        r0, r1, h, edge = size
        out[4] = 1 / ((r1 - r0) ** 2 + 4 * (h - edge) ** 2)
    return out


def _ball(x, y, z, s):
    x, y, z = x * s[..., 3], y * s[..., 4], z * s[..., 5]
    k0 = torch.sqrt(x * x + y * y + z * z)
    k1 = (x * s[..., 3]) ** 2 + (y * s[..., 4]) ** 2 + (z * s[..., 5]) ** 2
    return torch.where(k0 < 1e-3, -s[..., 0], k0 * (k0 - 1) * torch.rsqrt(k1.clamp(min=1e-12)))


def _box(x, y, z, s):
    hx, hy, hz, edge, top_x, top_z, per_height, shrink = s.unbind(-1)
    up = ((y + hy) * per_height).clamp(0, 1)
    qx = x.abs() - hx * (1 + (top_x - 1) * up) + edge
    qy, qz = y.abs() - hy + edge, z.abs() - hz * (1 + (top_z - 1) * up) + edge
    outside = torch.sqrt(qx.clamp(min=0) ** 2 + qy.clamp(min=0) ** 2 + qz.clamp(min=0) ** 2)
    return (outside + torch.maximum(torch.maximum(qx, qy), qz).clamp(max=0) - edge) * shrink


def _cone(x, y, z, s):
    edge = s[..., 3]
    r0, r1, h = s[..., 0] - edge, s[..., 1] - edge, s[..., 2] - edge
    q = torch.sqrt(x**2 + z**2)
    cap_x, cap_y = q - torch.minimum(q, torch.where(y < 0, r0, r1)), y.abs() - h
    side_x, side_y = r1 - r0, 2 * h
    along = (((r1 - q) * side_x + (h - y) * side_y) * s[..., 4]).clamp(0, 1)
    wall_x, wall_y = q - r1 + side_x * along, y - h + side_y * along
    inside = (wall_x < 0) & (cap_y < 0)
    distance = torch.sqrt(torch.minimum(cap_x**2 + cap_y**2, wall_x**2 + wall_y**2))
    return torch.where(inside, -distance, distance) - edge


def _ring(x, y, z, s):
    return torch.sqrt((torch.sqrt(x**2 + z**2) - s[..., 0]) ** 2 + y**2) - s[..., 1]


_DISTANCE = {"ball": _ball, "box": _box, "cone": _cone, "ring": _ring}


def _distances(points: torch.Tensor, p: Primitives, kind: str) -> torch.Tensor:
    """Distance of points [B, R, 3] to each primitive of one kind: [B, R, K], FAR where a slot is empty."""
    d = points[:, :, None] - p.center
    dx, dy, dz = d.unbind(-1)
    r = p.rotation
    x = r[..., 0] * dx + r[..., 1] * dy + r[..., 2] * dz
    y = r[..., 3] * dx + r[..., 4] * dy + r[..., 5] * dz
    z = r[..., 6] * dx + r[..., 7] * dy + r[..., 8] * dz
    return torch.where(p.role == 0, FAR, _DISTANCE[kind](x, y, z, p.size))


def distance(points: torch.Tensor, primitives: dict[str, Primitives]) -> torch.Tensor:
    """Signed distance of points [B, R, 3] to the scenes: [B, R]. Cuts take away from main parts only."""
    main = other = cut = torch.full_like(points[..., 0], FAR)
    for kind, p in primitives.items():
        d = _distances(points, p, kind)
        main = torch.minimum(main, torch.where(p.role == MAIN, d, FAR).amin(-1))
        other = torch.minimum(other, torch.where(p.role == OTHER, d, FAR).amin(-1))
        cut = torch.minimum(cut, torch.where(p.role == CUT, d, FAR).amin(-1))
    return torch.minimum(torch.maximum(main, -cut), other)


def _step(points, directions, primitives):
    """Advance points by a step; the factor allows for the inexact distances of ellipsoids and tapered boxes."""
    return points + directions * (0.85 * distance(points, primitives).clamp(min=-0.02))[..., None]


def _surface(points, primitives, pattern):
    """Normal (central differences on a tetrahedron) and albedo at surface points: both [B, R, 3]."""
    normal = torch.zeros_like(points)
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        corner = torch.tensor(corner, device=points.device, dtype=points.dtype)
        normal = normal + corner * distance(points + 5e-4 * corner, primitives)[..., None]
    nearest = torch.full_like(points[..., 0], FAR)
    albedo, main = torch.zeros_like(points), torch.zeros_like(nearest, dtype=torch.bool)
    for kind, p in primitives.items():
        d, index = torch.where((p.role == CUT), FAR, _distances(points, p, kind)).min(-1)
        closer = d < nearest
        nearest = torch.where(closer, d, nearest)
        color = torch.gather(p.color, 1, index[..., None].expand(-1, -1, 3))
        albedo = torch.where(closer[..., None], color, albedo)
        main = torch.where(closer, torch.gather(p.role[:, 0], 1, index) == MAIN, main)
    striped = torch.sin(points[..., 1] * 45) > 0.3
    cell = torch.sin(points * 24)
    spotted = cell[..., 0] * cell[..., 1] * cell[..., 2] > 0.3
    pattern = pattern[:, None]
    painted = main & (((pattern == 1) & striped) | ((pattern == 2) & (spotted | (cell.prod(-1) < -0.3))))
    contrast = torch.where(albedo.mean(-1, keepdim=True) > 0.75, 0.15, 0.95)
    return torch.nn.functional.normalize(normal, dim=-1), torch.where(painted[..., None], contrast, albedo)


def trace(
    origins: torch.Tensor, directions: torch.Tensor, primitives: dict[str, Primitives], pattern: torch.Tensor, steps=32,
    compiled=False,
) -> Traced:  # fmt: skip
    """Trace rays [B, R, 3] of unit direction through scenes inside the sphere of RADIUS."""
    step, surface, far = _compiled() if compiled else (_step, _surface, distance)
    b = (origins * directions).sum(-1)
    inside = b * b - (origins * origins).sum(-1) + (1.04 * RADIUS) ** 2
    entry = -b - inside.clamp(min=0).sqrt()
    points = origins + directions * entry[..., None]
    for _ in range(steps):
        points = step(points, directions, primitives)
    hit = far(points, primitives).abs() < 6e-3
    hit &= (inside > 0) & ((points * points).sum(-1) < (1.06 * RADIUS) ** 2)
    normal, albedo = surface(points, primitives, pattern)
    return Traced(hit, normal, albedo)


@cache
def _compiled() -> tuple:
    """The parts of `trace`, fused; made when first asked for, because the compiler alone takes seconds to import."""
    return tuple(torch.compile(function, dynamic=False) for function in (_step, _surface, distance))


def render(
    packed: tuple[dict[str, Primitives], torch.Tensor], cameras: Cameras, size: int, *, shading: torch.Tensor,
    ambient: torch.Tensor, light_noise: torch.Tensor, background: torch.Tensor, supersample=1.5, compiled=False,
) -> torch.Tensor:  # fmt: skip
    """Images [B, size, size, 3] in [0, 1] of packed scenes, one camera a scene.

    shading [B]: 0 albedo, 1 lambertian, 2 textureless. ambient [B]. light_noise [B, 3]: the light shines from
    normalize(camera position + noise). background [B, 3].
    """
    primitives, pattern = packed
    fine = round(size * supersample)
    origins, directions = rays(cameras, fine, fine)
    traced = trace(origins, directions, primitives, pattern, compiled=compiled)
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
