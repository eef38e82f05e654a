"""Where the axes point: every test projects known world points into the image of a camera."""

import dataclasses

import pytest
import torch

from dream_fast.engine.camera import (
    SIX_VIEWS,
    Cameras,
    jittered,
    look_at,
    make_cameras,
    project,
    rays,
    sample_cameras,
    six_views,
    turntable,
    view_ranges,
)
from dream_fast.engine.config import CameraConfig

X, Y, Z = torch.eye(3)
SIZE = 64


def camera(polar, azimuth, radius=3.0, fovy=20.0):
    return make_cameras(*(torch.tensor([float(v)]) for v in (polar, azimuth, radius, fovy)))


def direction_in_image(polar, azimuth, point):
    """(right, up) of a small displacement along `point`, as seen in the image."""
    row, column = (project(camera(polar, azimuth), 0.1 * point[None], SIZE, SIZE)[0, 0] - SIZE / 2).tolist()
    return column, -row


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
def test_image_axes(polar, azimuth, right, up):
    toward = torch.cross(right, up, dim=0)
    x, y = direction_in_image(polar, azimuth, right)
    assert x > 5 and abs(y) < 1e-3
    x, y = direction_in_image(polar, azimuth, up)
    assert y > 5 and abs(x) < 1e-3
    x, y = direction_in_image(polar, azimuth, toward)
    assert abs(x) < 1e-3 and abs(y) < 1e-3
    torch.testing.assert_close(camera(polar, azimuth).c2w[0, :3, 3], 3.0 * toward, atol=1e-5, rtol=0)


def test_camera_is_a_rotation_that_looks_at_the_origin():
    angles = torch.rand(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    polar, azimuth, radius = angles[0] * 180, angles[1] * 360, 1 + angles[2]
    c2w = look_at(polar, azimuth, radius)
    rotation = c2w[:, :3, :3]
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones_like(polar))
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), torch.eye(3, dtype=polar.dtype).expand(50, 3, 3))
    torch.testing.assert_close(c2w[:, :3, 3] - radius[:, None] * rotation[:, :, 2], torch.zeros_like(c2w[:, :3, 3]))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (30, 50), (51, 20)])
def test_rays_meet_their_pixels(height, width):
    cameras = make_cameras(*torch.tensor([[70.0, 30.0], [20.0, -120.0], [3.0, 2.0], [20.0, 60.0]]))
    origins, directions = rays(cameras, height, width)
    assert origins.shape == directions.shape == (2, height * width, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(2, height * width))
    for b in range(2):
        pixels = project(cameras, origins[b] + 1.7 * directions[b], height, width)[b].reshape(height, width, 2)
        rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        torch.testing.assert_close(pixels, torch.stack([rows, columns], dim=-1), atol=2e-3, rtol=0)


def test_principal_point_and_field_of_view_of_a_wide_image():
    cameras = camera(90, 0, fovy=40)
    _, directions = rays(cameras, 20, 60)
    centre = directions[0].mean(dim=0)
    torch.testing.assert_close(centre / centre.norm(), torch.tensor([0.0, 0.0, -1.0]), atol=1e-5, rtol=0)
    top = project(cameras, torch.tensor([[0.0, 3 * torch.tan(torch.deg2rad(torch.tensor(20.0))), 0.0]]), 20, 60)
    torch.testing.assert_close(top[0, 0], torch.tensor([0.0, 30.0]), atol=1e-4, rtol=0)


def test_sampled_cameras_stay_in_their_ranges_and_are_stratified():
    limits = config(radius_range=(2.0, 2.5), theta_range=(50.0, 80.0), phi_range=(-90.0, 90.0), fovy_range=(15.0, 25.0))
    seen = sample_cameras(limits, 64, torch.Generator().manual_seed(1))
    for values, (low, high) in [
        (seen.radius, limits.radius_range),
        (seen.polar, limits.theta_range),
        (seen.azimuth, limits.phi_range),
        (seen.fovy, limits.fovy_range),
    ]:
        assert low <= values.min() and values.max() <= high
        assert values.max() - values.min() > 0.8 * (high - low)
    sector = ((seen.azimuth + 90) / 180 * 64).floor()
    assert torch.equal(sector, torch.arange(64.0))
    again = sample_cameras(limits, 64, torch.Generator().manual_seed(1))
    assert torch.equal(seen.c2w, again.c2w)


def test_uniform_sphere_covers_the_upper_hemisphere_evenly():
    seen = sample_cameras(config(uniform_sphere_rate=1.0), 4000, torch.Generator().manual_seed(2))
    height = seen.c2w[:, 1, 3] / seen.radius
    assert height.min() > -1e-6
    torch.testing.assert_close(height.mean(), torch.tensor(0.5), atol=0.02, rtol=0)  # uniform in y


@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_is_on_the_sphere_as_a_whole_and_as_often_as_its_rate_says(batch):
    narrow = dict(radius_range=(2.0, 2.5), theta_range=(85.0, 95.0), phi_range=(-10.0, 10.0))
    limits, spheres, generator = config(**narrow, uniform_sphere_rate=0.3), 0, torch.Generator().manual_seed(9)
    for _ in range(400):
        seen = sample_cameras(limits, batch, generator)
        inside = (seen.polar - 90).abs().le(5) & seen.azimuth.abs().le(10)
        spheres += not inside.all()
        # Outside for one camera is the sphere for all: of four azimuths, a sector each, at most one can be near 0.
        assert inside.all() or inside.sum() <= max(1, batch // 4)
        assert seen.radius.min() >= 2 and seen.radius.max() <= 2.5  # those of the run, in either case
    assert 0.24 < spheres / 400 < 0.36
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
def test_the_ranges_widen_from_the_default_view(start, progress, ranges):
    limits = config(**NARROW, progressive_view_init_ratio=start)
    for got, expected in zip(view_ranges(limits, progress), ranges, strict=True):
        assert got == pytest.approx(expected)
    seen = sample_cameras(limits, 500, torch.Generator().manual_seed(6), progress=progress)
    for values, (low, high) in zip((seen.radius, seen.polar, seen.azimuth, seen.fovy), ranges, strict=True):
        assert low - 1e-4 <= values.min() and values.max() <= high + 1e-4
        assert values.max() - values.min() >= 0.9 * (high - low)


def test_the_ranges_stay_as_they_are_without_progressive_view_and_on_the_sphere():
    fixed = config(**NARROW | {"progressive_view": False})
    assert view_ranges(fixed, 0.0) == [fixed.radius_range, fixed.theta_range, fixed.phi_range, fixed.fovy_range]
    sphere = config(**NARROW, uniform_sphere_rate=1.0)
    seen = sample_cameras(sphere, 500, torch.Generator().manual_seed(7), progress=0.0)
    assert seen.azimuth.max() - seen.azimuth.min() > 350 and seen.polar.min() < 20


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
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=c2w.dtype).expand_as(rotation))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones_like(c2w[:, 0, 0]))
    torch.testing.assert_close(c2w[:, 3], torch.eye(4, dtype=c2w.dtype)[3].expand(len(c2w), 4))


@pytest.mark.parametrize("sizes", [(0.1, 0.2, 0.02), (5.0, 5.0, 5.0)])
def test_a_jittered_camera_is_a_rotation_that_looks_at_its_target_from_its_new_place(sizes):
    cameras, (shift, target, tilt) = around(), offsets(*sizes)
    moved = jittered(cameras, shift, target, tilt)
    assert_rotations(moved.c2w)
    torch.testing.assert_close(moved.c2w[:, :3, 3], cameras.c2w[:, :3, 3] + shift)
    for b in range(len(AROUND)):
        middle = project(moved, target[b : b + 1], SIZE, SIZE)[b, 0]
        torch.testing.assert_close(middle, torch.full_like(middle, SIZE / 2))


def test_the_angles_of_a_jittered_camera_are_those_under_which_its_target_is_seen():
    cameras, (shift, target, tilt) = around(), offsets(0.1, 0.2, 0.02)
    moved = jittered(cameras, shift, target, tilt)
    seen_from = look_at(moved.polar, moved.azimuth, moved.radius)[:, :3, 3]
    torch.testing.assert_close(seen_from, moved.c2w[:, :3, 3] - target)
    assert ((moved.azimuth >= -180) & (moved.azimuth < 180)).all() and (moved.radius > 0).all()
    assert (moved.azimuth - cameras.azimuth).abs().max() > 1 and torch.equal(moved.fovy, cameras.fovy)


def test_a_tilt_to_the_right_rolls_the_camera_to_the_right_and_keeps_the_middle():
    cameras, zero = around(), torch.zeros(len(AROUND), 3, dtype=torch.float64)
    right, up, back = (cameras.c2w[:, :3, i] for i in range(3))
    rolled = jittered(cameras, zero, zero, 0.5 * right + 0.25 * up + 7 * back).c2w
    expected = torch.nn.functional.normalize(0.5 * right + 1.25 * up, dim=-1)
    torch.testing.assert_close(rolled[:, :3, 1], expected)
    torch.testing.assert_close(rolled[:, :3, 2:], cameras.c2w[:, :3, 2:])
    torch.testing.assert_close(jittered(cameras, zero, zero, zero).c2w, cameras.c2w)


def test_a_camera_that_jitter_puts_at_its_target_is_still_one():
    cameras = around(radius=1.0)
    moved = jittered(cameras, -cameras.c2w[:, :3, 3], *offsets(0.0, 0.0))
    assert_rotations(moved.c2w)
    assert all(torch.isfinite(part).all() for part in moved)


def test_jitter_is_as_wide_as_it_says_and_off_by_default():
    sizes = dict(jitter_center=0.4, jitter_target=0.1, jitter_up=0.05)
    plain, switched_off, seen = (
        sample_cameras(config(**changes), 4000, torch.Generator().manual_seed(4))
        for changes in ({}, sizes, sizes | {"jitter_pose": True})
    )
    assert all(torch.equal(one, other) for one, other in zip(plain, switched_off, strict=True))
    assert_rotations(seen.c2w)
    shift = seen.c2w[:, :3, 3] - plain.c2w[:, :3, 3]
    assert shift.abs().max() < 0.2 + 1e-5
    torch.testing.assert_close(shift.std(dim=0), torch.full((3,), 0.4 / 12**0.5), rtol=0.05, atol=0)
    target = seen.c2w[:, :3, 3] - seen.radius[:, None] * seen.c2w[:, :3, 2]
    torch.testing.assert_close(target.std(dim=0), torch.full((3,), 0.1), rtol=0.05, atol=0)
    level = look_at(seen.polar, seen.azimuth, seen.radius)
    roll = torch.asin((seen.c2w[:, :3, 1] * level[:, :3, 0]).sum(dim=-1))
    torch.testing.assert_close(roll.std(), torch.tensor(0.05), rtol=0.05, atol=0)
    for values in (shift, target, roll):
        assert values.mean(dim=0).abs().max() < 0.01


def test_drawing_cameras_reads_no_value(nothing_read):
    everything = config(jitter_pose=True, uniform_sphere_rate=0.5)
    with nothing_read:
        sample_cameras(everything, 3, torch.Generator().manual_seed(5))


def test_turntable_starts_at_the_front_and_goes_round_once():
    frames = turntable(config(default_azimuth=0.0, default_polar=80.0), 8)
    torch.testing.assert_close(frames.azimuth, torch.tensor([0.0, 45, 90, 135, -180, -135, -90, -45]))
    assert (frames.polar == 80).all()


def test_six_views_follow_their_names():
    views = six_views(config(default_radius=2.0))
    expected = {"front": Z, "right": X, "back": -Z, "left": -X, "top": Y, "bottom": -Y}
    for name, position in zip(SIX_VIEWS, views.c2w[:, :3, 3], strict=True):
        torch.testing.assert_close(position, 2 * expected[name], atol=1e-5, rtol=0)
