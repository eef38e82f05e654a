"""Axes and angles: known world points are projected into the images of cameras."""

import dataclasses
import math

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.scene.camera import (
    SIX_VIEWS,
    Cameras,
    jitter,
    look_at,
    make_cameras,
    project,
    rays,
    sample_cameras,
    six_views,
    turntable,
    view_ranges,
)

X, Y, Z = torch.eye(3)
SIZE = 64


ULP = torch.finfo(torch.float32).eps  # relative distance of neighbours in fp32


def camera(polar, azimuth, radius=3.0, fovy=20.0):
    return make_cameras(*(torch.tensor([float(v)]) for v in (polar, azimuth, radius, fovy)))


def check_rounded(name, got, exact):
    """Compare with a closed form, within the error of the plain computation in the dtype of `got`."""
    check(name, got, exact.to(got.dtype), exact.double())


def config(**changes):
    return dataclasses.replace(CameraConfig(), **changes)


@pytest.mark.parametrize(
    ("polar", "azimuth", "right", "up"),
    [
        (90, 0, X, Y),  # front: the object's +x is on the image's right
        (90, 90, -Z, Y),  # from +x: the object's front (+z) is on the left
        (90, 180, -X, Y),
        (90, -90, Z, Y),
        (0, 0, X, -Z),  # from above: the front is at the bottom of the image
        (180, 0, X, Z),
    ],
)
def test_rays_image_axes(polar, azimuth, right, up):
    """Points near the origin appear where similar triangles put them, and the camera is at its position."""
    toward = torch.cross(right, up, dim=0)
    points = 0.1 * torch.stack([right, -right, up, -up, toward, -toward])
    pixels = SIZE / 2 / math.tan(math.radians(10)) * 0.1 / 3  # of a tenth at the distance 3
    offsets = [(0, pixels), (0, -pixels), (-pixels, 0), (pixels, 0), (0, 0), (0, 0)]
    expected = SIZE / 2 + torch.tensor(offsets, dtype=torch.float64)
    check_rounded("pixels", project(camera(polar, azimuth), points, SIZE, SIZE)[0], expected)
    axes = torch.stack([right, up, toward, 3.0 * toward], dim=1)
    check_rounded("camera", camera(polar, azimuth).c2w[0, :3], axes)


def test_look_at_is_a_rotation():
    """The camera matrix is a rotation towards the origin."""
    angles = torch.rand(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    polar, azimuth, radius = angles[0] * 180, angles[1] * 360, 1 + angles[2]
    c2w = look_at(polar, azimuth, radius)
    rotation = c2w[:, :3, :3]
    assert_rotations(c2w)
    check_rounded("position", c2w[:, :3, 3], radius[:, None] * rotation[:, :, 2])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (30, 50), (51, 20)])
def test_rays_project_to_their_pixels(height, width):
    """Points on a ray project to its pixel."""
    cameras = make_cameras(*torch.tensor([[70.0, 30.0], [20.0, -120.0], [3.0, 2.0], [20.0, 60.0]]))
    origins, directions = rays(cameras, height, width)
    assert origins.shape == directions.shape == (2, height * width, 3)
    check_rounded("length", directions.norm(dim=-1), torch.ones(2, height * width))
    tangent = torch.tan(torch.deg2rad(cameras.fovy.double()) / 2)
    for b in range(2):
        # By the pinhole: a point in front of the camera, divided by its depth.
        local = (1.7 * directions[b].double()) @ cameras.c2w[b, :3, :3].double()
        x, y = (local[:, :2] / -local[:, 2:] / tangent[b]).T
        pixels = torch.stack([height / 2 * (1 - y), width / 2 + height / 2 * x], dim=1).view(height, width, 2)
        rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centres = torch.stack([rows, columns], dim=-1)
        check_rounded("pixels of rays", pixels.float(), centres)
        # In fp32 a point loses digits where its distance from the origin is taken, as the plain difference does.
        places = origins[b] + 1.7 * directions[b]
        local = (places - cameras.c2w[b, :3, 3]) @ cameras.c2w[b, :3, :3]
        x, y = (local[:, :2] / -local[:, 2:] / tangent[b].float()).T
        plain = torch.stack([height / 2 * (1 - y), width / 2 + height / 2 * x], dim=1).view(height, width, 2)
        check("projection", project(cameras, places, height, width)[b].view(height, width, 2), plain, centres.double())


def test_rays_wide_image():
    """A wide image has the right principal point and field of view."""
    cameras = camera(90, 0, fovy=40)
    _, directions = rays(cameras, 20, 60)
    centre = directions[0].mean(dim=0)
    check_rounded("centre", centre / centre.norm(), torch.tensor([0.0, 0.0, -1.0]))
    edge = 3 * math.tan(math.radians(20))
    corners = torch.tensor([[0.0, edge, 0.0], [0.0, -edge, 0.0], [3 * edge, 0.0, 0.0], [-3 * edge, 0.0, 0.0]])
    expected = torch.tensor([[0.0, 30.0], [20.0, 30.0], [10.0, 60.0], [10.0, 0.0]])
    check_rounded("edges", project(cameras, corners, 20, 60)[0], expected)


def test_sample_cameras_ranges():
    """Sampled cameras stay in their ranges and are stratified."""
    limits = config(radius_range=(2.0, 2.5), theta_range=(50.0, 80.0), phi_range=(-90.0, 90.0), fovy_range=(15.0, 25.0))
    drawn = sample_cameras(limits, 64, torch.Generator().manual_seed(1))
    for values, (low, high) in [
        (drawn.radius, limits.radius_range),
        (drawn.polar, limits.theta_range),
        (drawn.azimuth, limits.phi_range),
        (drawn.fovy, limits.fovy_range),
    ]:
        assert low <= values.min() and values.max() <= high
        assert values.max() - values.min() > 0.8 * (high - low)
    sector = ((drawn.azimuth + 90) / 180 * 64).floor()
    assert torch.equal(sector, torch.arange(64.0))
    again = sample_cameras(limits, 64, torch.Generator().manual_seed(1))
    assert torch.equal(drawn.c2w, again.c2w)


def test_sample_cameras_uniform_sphere():
    """Cameras cover the upper hemisphere uniformly."""
    drawn = sample_cameras(config(uniform_sphere_rate=1.0), 4000, torch.Generator().manual_seed(2))
    height = drawn.c2w[:, 1, 3] / drawn.radius
    assert height.min() > -ULP
    # Uniform in y: mean, spread, and as many in each tenth, to five standard errors.
    n = len(height)
    assert abs(height.mean() - 0.5) < 5 / (12 * n) ** 0.5
    assert ((height * 10).long().clamp(0, 9).bincount(minlength=10) / n - 0.1).abs().max() < 5 * (0.09 / n) ** 0.5


@pytest.mark.parametrize("batch", [1, 4])
def test_sample_cameras_sphere_rate(batch):
    """Whole batches are on the sphere, with the given probability."""
    narrow = dict(radius_range=(2.0, 2.5), theta_range=(85.0, 95.0), phi_range=(-10.0, 10.0))
    limits, spheres, generator = config(**narrow, uniform_sphere_rate=0.3), 0, torch.Generator().manual_seed(9)
    for _ in range(400):
        drawn = sample_cameras(limits, batch, generator)
        inside = (drawn.polar - 90).abs().le(5) & drawn.azimuth.abs().le(10)
        spheres += not inside.all()
        # Outside for one camera is the sphere for all: of four azimuths, a sector each, at most one can be near 0.
        assert inside.all() or inside.sum() <= max(1, batch // 4)
        assert drawn.radius.min() >= 2 and drawn.radius.max() <= 2.5  # those of the run, in either case
    assert abs(spheres / 400 - 0.3) < 5 * (0.3 * 0.7 / 400) ** 0.5  # five standard errors
    never, always = (config(**narrow, uniform_sphere_rate=rate) for rate in (0.0, 1.0))
    a, b = (sample_cameras(limits, batch, torch.Generator().manual_seed(3)) for limits in (never, always))
    assert a.azimuth.abs().max() <= 10 and torch.equal(a.radius, b.radius)  # one draw, whatever the rate


NARROW = dict(
    progressive_view=True,
    radius_range=(2.0, 4.0),
    theta_range=(40.0, 100.0),
    phi_range=(-180.0, 180.0),
    fovy_range=(10.0, 30.0),
    default_radius=3.5,
    default_polar=90.0,
    default_azimuth=20.0,
    default_fovy=16.0,
)


@pytest.mark.parametrize(
    ("start", "progress", "ranges"),
    [
        (0.0, 0.0, [(3.5, 3.5), (90, 90), (20, 20), (16, 16)]),
        (0.2, 0.0, [(3.2, 3.6), (80, 92), (-20, 52), (14.8, 18.8)]),
        (0.2, 0.15, [(2.75, 3.75), (65, 95), (-80, 100), (13, 23)]),
        (0.2, 0.4, [(2, 4), (40, 100), (-180, 180), (10, 30)]),
        (0.2, 1.0, [(2, 4), (40, 100), (-180, 180), (10, 30)]),
        (1.0, 0.0, [(2, 4), (40, 100), (-180, 180), (10, 30)]),
    ],
)
def test_view_ranges_widen(start, progress, ranges):
    """The ranges widen from the default view."""
    limits = config(**NARROW, progressive_view_init_ratio=start)
    for got, expected in zip(view_ranges(limits, progress), ranges, strict=True):
        check_rounded("range", torch.tensor(got, dtype=torch.float64), torch.tensor(expected))
    drawn = sample_cameras(limits, 500, torch.Generator().manual_seed(6), progress=progress)
    for values, (low, high) in zip((drawn.radius, drawn.polar, drawn.azimuth, drawn.fovy), ranges, strict=True):
        rounding = 2 * ULP * max(abs(low), abs(high))
        assert low - rounding <= values.min() and values.max() <= high + rounding
        assert values.max() - values.min() >= 0.9 * (high - low)


def test_view_ranges_constant():
    """The ranges are constant without progressive view and on the sphere."""
    fixed = config(**NARROW | {"progressive_view": False})
    assert view_ranges(fixed, 0.0) == [fixed.radius_range, fixed.theta_range, fixed.phi_range, fixed.fovy_range]
    sphere = config(**NARROW, uniform_sphere_rate=1.0)
    drawn = sample_cameras(sphere, 500, torch.Generator().manual_seed(7), progress=0.0)
    assert drawn.azimuth.max() - drawn.azimuth.min() > 350 and drawn.polar.min() < 20


# All around, the poles among them.
AROUND = [(90.0, 0.0), (0.0, 0.0), (180.0, 20.0), (1.0, 170.0), (60.0, -130.0), (120.0, 90.0), (90.0, 179.9)]


def around(radius=3.0) -> Cameras:
    polar, azimuth = torch.tensor(AROUND, dtype=torch.float64).T
    return make_cameras(polar, azimuth, torch.full_like(polar, radius), torch.full_like(polar, 20.0))


def offsets(*sizes: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [size * torch.randn(len(AROUND), 3, generator=generator, dtype=torch.float64) for size in sizes]


def assert_rotations(c2w: torch.Tensor) -> None:
    rotation = c2w[:, :3, :3]
    check_rounded("orthogonal", rotation @ rotation.mT, torch.eye(3).expand_as(rotation))
    check_rounded("determinant", torch.linalg.det(rotation), torch.ones(len(c2w)))
    assert torch.equal(c2w[:, 3], torch.eye(4, dtype=c2w.dtype)[3].expand(len(c2w), 4))


@pytest.mark.parametrize("sizes", [(0.1, 0.2, 0.02), (5.0, 5.0, 5.0)])
def test_jitter_is_a_rotation(sizes):
    """A jittered camera is a rotation towards its target."""
    cameras, (shift, target, tilt) = around(), offsets(*sizes)
    moved = jitter(cameras, shift, target, tilt)
    assert_rotations(moved.c2w)
    check_rounded("place", moved.c2w[:, :3, 3], cameras.c2w[:, :3, 3] + shift)
    middles = torch.stack([project(moved, target, SIZE, SIZE)[b, b] for b in range(len(AROUND))])
    check_rounded("middle", middles, torch.full_like(middles, SIZE / 2))


def test_jitter_angles():
    """The angles of a jittered camera are relative to its target."""
    cameras, (shift, target, tilt) = around(), offsets(0.1, 0.2, 0.02)
    moved = jitter(cameras, shift, target, tilt)
    seen_from = look_at(moved.polar, moved.azimuth, moved.radius)[:, :3, 3]
    check_rounded("seen from", seen_from, moved.c2w[:, :3, 3] - target)
    assert ((moved.azimuth >= -180) & (moved.azimuth < 180)).all() and (moved.radius > 0).all()
    assert (moved.azimuth - cameras.azimuth).abs().max() > 1 and torch.equal(moved.fovy, cameras.fovy)


def test_jitter_tilt():
    """A tilt to the right rolls the camera to the right and keeps the centre."""
    cameras, zero = around(), torch.zeros(len(AROUND), 3, dtype=torch.float64)
    right, up, back = (cameras.c2w[:, :3, i] for i in range(3))
    rolled = jitter(cameras, zero, zero, 0.5 * right + 0.25 * up + 7 * back).c2w
    expected = torch.nn.functional.normalize(0.5 * right + 1.25 * up, dim=-1)
    check_rounded("up", rolled[:, :3, 1], expected)
    check_rounded("back and place", rolled[:, :3, 2:], cameras.c2w[:, :3, 2:])
    check_rounded("without jitter", jitter(cameras, zero, zero, zero).c2w, cameras.c2w)


def test_jitter_at_the_target():
    """A camera at its target is still valid."""
    cameras = around(radius=1.0)
    moved = jitter(cameras, -cameras.c2w[:, :3, 3], *offsets(0.0, 0.0))
    assert_rotations(moved.c2w)
    assert all(torch.isfinite(part).all() for part in moved)


def test_sample_cameras_jitter_width():
    """Jitter has its configured width and is off by default."""
    sizes = dict(jitter_center=0.4, jitter_target=0.1, jitter_up=0.05)
    plain, switched_off, drawn = (
        sample_cameras(config(**changes), 4000, torch.Generator().manual_seed(4))
        for changes in ({}, sizes, sizes | {"jitter_pose": True})
    )
    assert all(torch.equal(one, other) for one, other in zip(plain, switched_off, strict=True))
    assert_rotations(drawn.c2w)
    shift = drawn.c2w[:, :3, 3] - plain.c2w[:, :3, 3]
    assert shift.abs().max() <= 0.2 + 8 * ULP  # the difference of places at 3.5 and less
    # Mean and spread to five standard errors of 4000: of a mean s / sqrt(n), of a spread s sqrt((k - 1) / 4n), with the
    # kurtosis k of 1.8 for even and of 3 for normal numbers.
    target = drawn.c2w[:, :3, 3] - drawn.radius[:, None] * drawn.c2w[:, :3, 2]
    level = look_at(drawn.polar, drawn.azimuth, drawn.radius)
    roll = torch.asin((drawn.c2w[:, :3, 1] * level[:, :3, 0]).sum(dim=-1))
    for values, spread, kurtosis in ((shift, 0.4 / 12**0.5, 1.8), (target, 0.1, 3.0), (roll, 0.05, 3.0)):
        assert (values.std(dim=0) / spread - 1).abs().max() < 5 * ((kurtosis - 1) / 16000) ** 0.5
        assert values.mean(dim=0).abs().max() < 5 * spread / 4000**0.5


def test_sample_cameras_reads_no_value(nothing_read):
    """Drawing cameras reads no value on the host."""
    everything = config(jitter_pose=True, uniform_sphere_rate=0.5)
    with nothing_read:
        sample_cameras(everything, 3, torch.Generator().manual_seed(5))


def test_turntable():
    """A turntable starts at the front and turns once."""
    frames = turntable(config(default_azimuth=0.0, default_polar=80.0), 8)
    assert frames.azimuth.tolist() == [0.0, 45, 90, 135, -180, -135, -90, -45]
    assert (frames.polar == 80).all()


def test_six_views():
    """The six views have the directions of their names."""
    views = six_views(config(default_radius=2.0))
    expected = {"front": Z, "right": X, "back": -Z, "left": -X, "top": Y, "bottom": -Y}
    for name, position in zip(SIX_VIEWS, views.c2w[:, :3, 3], strict=True):
        check_rounded(name, position, 2 * expected[name])
