"""Cameras that look at the origin (or near it, with jitter), their rays and their projections.

The world is right-handed with y up, and an object's front faces +z. A camera stands on a sphere at

    radius * (sin(polar) sin(azimuth), cos(polar), sin(polar) cos(azimuth))

so azimuth 0 looks from +z (the front), azimuth 90 from +x, polar 0 from above and polar 90 from the horizon. All angles
are degrees. Camera axes are OpenGL's: x right, y up, the camera looks along -z. docs/conventions.md has the drawing.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.config.setting import Range

# (polar, azimuth) of the six views: front, +x side, back, -x side, above, below.
SIX_VIEWS = {
    "front": (90.0, 0.0),
    "right": (90.0, 90.0),
    "back": (90.0, 180.0),
    "left": (90.0, -90.0),
    "top": (0.0, 0.0),
    "bottom": (180.0, 0.0),
}


class Cameras(NamedTuple):
    """A batch of B cameras. Angles in degrees, azimuth in [-180, 180), distances in world units."""

    c2w: Tensor  # [B, 4, 4] camera to world, a rotation and a position
    fovy: Tensor  # [B] vertical field of view
    polar: Tensor  # [B]
    azimuth: Tensor  # [B]
    radius: Tensor  # [B] distance from the target

    def split(self) -> Iterator["Cameras"]:
        """Yield the cameras one by one, as batches of one."""
        for number in range(len(self.fovy)):
            yield Cameras(*(part[number : number + 1] for part in self))


def look_at(polar: Tensor, azimuth: Tensor, radius: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Camera-to-world matrices [B, 4, 4] of cameras at (polar, azimuth, radius), each [B], that look at the origin.

    The axes are computed from the angles and not by a cross product with an up vector, so poles are no special case:
    the view from above at azimuth 0 has +x on its right and -z at its top.
    """
    theta, phi = torch.deg2rad(polar.to(device)), torch.deg2rad(azimuth.to(device))
    sin_t, cos_t, sin_p, cos_p = theta.sin(), theta.cos(), phi.sin(), phi.cos()
    zero, one = torch.zeros_like(theta), torch.ones_like(theta)
    right = torch.stack([cos_p, zero, -sin_p], dim=-1)  # [B, 3]
    up = torch.stack([-cos_t * sin_p, sin_t, -cos_t * cos_p], dim=-1)
    back = torch.stack([sin_t * sin_p, cos_t, sin_t * cos_p], dim=-1)
    position = radius.to(device)[:, None] * back
    top = torch.stack([right, up, back, position], dim=-1)  # [B, 3, 4]
    bottom = torch.stack([zero, zero, zero, one], dim=-1)[:, None, :]
    return torch.cat([top, bottom], dim=1)


def make_cameras(polar: Tensor, azimuth: Tensor, radius: Tensor, fovy: Tensor) -> Cameras:
    """Cameras from angles (degrees) and radius, each [B]; the azimuth is wrapped to [-180, 180)."""
    azimuth = torch.remainder(azimuth + 180.0, 360.0) - 180.0
    return Cameras(look_at(polar, azimuth, radius), fovy, polar, azimuth, radius)


def rays(cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Origins and unit directions, each [B, height * width, 3], of the rays through the pixel centres.

    Row 0 is the top row. The principal point is the centre of the image, and pixels are square.
    """
    device, dtype = cameras.c2w.device, cameras.c2w.dtype
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5 - width / 2) * (2.0 / height)
    y = (height / 2 - torch.arange(height, device=device, dtype=dtype) - 0.5) * (2.0 / height)
    y, x = torch.meshgrid(y, x, indexing="ij")
    tangent = torch.tan(torch.deg2rad(cameras.fovy) / 2)[:, None]  # [B, 1]
    x, y = x.reshape(1, -1) * tangent, y.reshape(1, -1) * tangent  # [B, H*W]
    local = torch.stack([x, y, -torch.ones_like(x)], dim=-1)
    directions = local @ cameras.c2w[:, :3, :3].transpose(1, 2)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    origins = cameras.c2w[:, None, :3, 3].expand_as(directions)
    return origins, directions


def view_ranges(config: CameraConfig, progress: float) -> list[Range]:
    """Ranges of radius, polar angle, azimuth and field of view at a `progress` of the phases in [0, 1].

    With `progressive_view` they widen linearly around the default view of the output camera and reach their full width
    before half of the progress. Azimuths are interpolated as numbers, without wrapping.
    """
    full = [config.radius_range, config.theta_range, config.phi_range, config.fovy_range]
    if not config.progressive_view:
        return full
    width = min(1.0, config.progressive_view_init_ratio + 2.0 * progress)
    view = [config.default_radius, config.default_polar, config.default_azimuth, config.default_fovy]
    return [
        ((1 - width) * default + width * low, (1 - width) * default + width * high)
        for default, (low, high) in zip(view, full, strict=True)
    ]


def sample_cameras(
    config: CameraConfig,
    batch: int,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    progress: float = 1.0,
) -> Cameras:
    """Draw a batch of training cameras on the generator's device and move them to `device`.

    Radius, polar angle and field of view are uniform in their `view_ranges`. Azimuths are stratified: each camera of a
    batch has its own equal sector of their range, so that a batch sees the object from all sides. With probability
    `uniform_sphere_rate` the batch is uniform on the upper hemisphere instead, regardless of the ranges. With
    `jitter_pose` each camera is then moved, turned and rolled a little (`jitter`).
    """
    draws = torch.rand(5, batch, generator=generator, device=generator.device)
    sphere = torch.rand((), generator=generator, device=generator.device) < config.uniform_sphere_rate

    def between(limits, u):
        low, high = limits
        return low + (high - low) * u

    radii, polars, azimuths, fovys = view_ranges(config, progress)
    sector = (torch.arange(batch, device=draws.device) + draws[0]) / batch  # [B] in [0, 1), one in each sector
    azimuth = torch.where(sphere, between((-180.0, 180.0), sector), between(azimuths, sector))
    polar = torch.where(sphere, torch.rad2deg(torch.acos(draws[2])), between(polars, draws[1]))
    radius = between(radii, draws[3])
    fovy = between(fovys, draws[4])
    cameras = make_cameras(polar.to(device), azimuth.to(device), radius.to(device), fovy.to(device))
    if not config.jitter_pose:
        return cameras
    shift = (torch.rand(batch, 3, generator=generator, device=generator.device) - 0.5) * config.jitter_center
    target, tilt = torch.randn(2, batch, 3, generator=generator, device=generator.device)
    return jitter(
        cameras, shift.to(device), (config.jitter_target * target).to(device), (config.jitter_up * tilt).to(device)
    )


def jitter(cameras: Cameras, shift: Tensor, target: Tensor, tilt: Tensor) -> Cameras:
    """Move cameras by `shift`, turn them to `target`, and add `tilt` to the unit vector at the top of the image.

    All are [B, 3] in world axes. Polar angle, azimuth and radius become those of the new position relative to the
    target, so that a view-dependent prompt describes the image. The axes remain a rotation, also at the poles.
    """
    away = cameras.c2w[:, :3, 3] + shift - target  # [B, 3]
    x, y, z = away.unbind(dim=-1)
    polar, azimuth = torch.rad2deg(torch.atan2(torch.hypot(x, z), y)), torch.rad2deg(torch.atan2(x, z))
    level = make_cameras(polar, azimuth, away.norm(dim=-1), cameras.fovy)
    right, up, back, position = level.c2w[:, :3].unbind(dim=-1)  # [B, 3] each
    # The part of the tilt across the line of sight is a roll around it.
    roll = torch.atan2((tilt * right).sum(dim=-1), 1 + (tilt * up).sum(dim=-1))[:, None]
    axes = [roll.cos() * right - roll.sin() * up, roll.cos() * up + roll.sin() * right, back]
    top = torch.stack([*axes, position + target], dim=-1)
    return level._replace(c2w=torch.cat([top, level.c2w[:, 3:]], dim=1))


def turntable(config: CameraConfig, frames: int, device: torch.device | str | None = None) -> Cameras:
    """`frames` default cameras evenly around the object, from the default azimuth on, towards +x."""
    azimuth = config.default_azimuth + torch.arange(frames, device=device) * (360.0 / frames)
    full = torch.ones_like(azimuth)
    return make_cameras(full * config.default_polar, azimuth, full * config.default_radius, full * config.default_fovy)


def six_views(config: CameraConfig, device: torch.device | str | None = None) -> Cameras:
    """The views of SIX_VIEWS, in its order, at the default radius and field of view."""
    angles = torch.tensor(list(SIX_VIEWS.values()), device=device)
    full = torch.ones_like(angles[:, 0])
    return make_cameras(angles[:, 0], angles[:, 1], full * config.default_radius, full * config.default_fovy)


def clip_positions(cameras: Cameras, points: Tensor, height: int, width: int, near: float) -> Tensor:
    """World points [N, 3] in the clip space [B, N, 4] of each camera, for `dream_fast.kernels.rasterize`.

    The images are those of `rays`. z / w rises from -1 at the distance `near` to 1 at infinity.
    """
    local = (points[None] - cameras.c2w[:, None, :3, 3]) @ cameras.c2w[:, :3, :3]  # [B, N, 3]
    scale = 1.0 / torch.tan(torch.deg2rad(cameras.fovy) / 2)[:, None]
    depth = -local[..., 2]
    return torch.stack([local[..., 0] * scale * (height / width), local[..., 1] * scale, depth - 2 * near, depth], -1)


def project(cameras: Cameras, points: Tensor, height: int, width: int) -> Tensor:
    """Project world points [N, 3] into each camera's image: [B, N, 2] as (row, column), pixel centres at +0.5."""
    homogeneous = torch.cat([points, torch.ones_like(points[:, :1])], dim=-1)
    local = homogeneous @ torch.linalg.inv(cameras.c2w).transpose(1, 2)  # [B, N, 4]
    scale = height / 2 / torch.tan(torch.deg2rad(cameras.fovy) / 2)[:, None]
    depth = -local[..., 2]
    row = height / 2 - local[..., 1] / depth * scale
    column = width / 2 + local[..., 0] / depth * scale
    return torch.stack([row, column], dim=-1)
