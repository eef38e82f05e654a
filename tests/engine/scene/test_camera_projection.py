"""Clip space against a pinhole camera; turntable, six views and random cameras by their numbers."""

import dataclasses
import itertools
import math

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.scene.camera import (
    SIX_VIEWS,
    clip_positions,
    look_at,
    make_cameras,
    project,
    rays,
    sample_cameras,
    six_views,
    turntable,
)


def config(**changes) -> CameraConfig:
    return dataclasses.replace(CameraConfig(), **changes)


def exact(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_clip_positions_match_rays():
    """Clip space agrees with the rays."""
    cameras = make_cameras(*(torch.tensor(v) for v in ([40.0, 100], [10.0, -130], [2.0, 3.1], [20.0, 35])))
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    clip = clip_positions(cameras, points, 24, 40, 0.1)
    row = (1 - clip[..., 1] / clip[..., 3]) * 12
    column = (clip[..., 0] / clip[..., 3] + 1) * 20

    def pinhole(dtype):
        """Rows and columns of the points, by the angles of the cameras alone."""
        places = cameras.c2w[:, :3, 3].to(dtype)
        local = (points.to(dtype)[None] - places[:, None]) @ cameras.c2w[:, :3, :3].to(dtype)
        focal = 12 / torch.tan(cameras.fovy.to(dtype).deg2rad() / 2)[:, None]
        return torch.stack([12 + focal * local[..., 1] / local[..., 2], 20 - focal * local[..., 0] / local[..., 2]], -1)

    check("pixels", torch.stack([row, column], -1), pinhole(torch.float32), pinhole(torch.float64))
    check("project", project(cameras, points, 24, 40), pinhole(torch.float32), pinhole(torch.float64))
    depth = clip[..., 2] / clip[..., 3]
    ahead = cameras.c2w[:1, :3, 3] - 0.1 * cameras.c2w[:1, :3, 2]  # 0.1 before the first camera
    at_near = clip_positions(cameras, ahead, 8, 8, 0.1)[0, 0]
    distance = (cameras.c2w[0, :3, 3] - ahead[0]).norm()  # in fp32, of places at 2
    plain = (distance - 0.2) / distance
    assert (depth.abs() < 1).all()
    check("near", at_near[2] / at_near[3], plain, torch.tensor(-1.0, dtype=torch.float64))


def test_clip_positions_pinhole():
    """Points seen from the z axis agree with similar triangles."""
    cameras = make_cameras(exact(90, 90), exact(0, 0), exact(3, 5), exact(40, 60))
    points = torch.tensor([[0.0, 0.0, 2.0], [0.5, 0.0, 1.0], [0.0, -0.25, 0.0]], dtype=torch.float64)
    clip = clip_positions(cameras, points, 20, 50, 0.25)
    expected = []
    for radius, fovy in ((3, 40), (5, 60)):
        scale = 1 / math.tan(math.radians(fovy / 2))
        rows = [(x * scale * 20 / 50, y * scale, radius - z - 0.5, radius - z) for x, y, z in points.tolist()]
        expected.append(rows)
    expected = torch.tensor(expected, dtype=torch.float64)
    check("clip", clip, expected, expected)
    ends = torch.tensor([[0.0, 0.0, 2.75], [0.0, 0.0, -1e9]], dtype=torch.float64)
    near, far = clip_positions(cameras, ends, 8, 8, 0.25)[0, :, 2] / clip_positions(cameras, ends, 8, 8, 0.25)[0, :, 3]
    check("range of depths", torch.stack([near, far]), exact(-1, 1), exact(-1, 1))


def test_look_at_precision():
    """Angles in fp64 give matrices with unit columns in fp64."""
    cameras = make_cameras(exact(30, 80), exact(-50, 200), exact(2, 3), exact(20, 30))
    assert cameras.c2w.dtype == torch.float64 and cameras.c2w.shape == (2, 4, 4)
    assert all(part.dtype == torch.float64 for part in rays(cameras, 3, 5))
    check("columns", cameras.c2w[:, :3, :3].norm(dim=1), torch.ones(2, 3).double(), torch.ones(2, 3).double())
    sine, cosine = math.sin(math.radians(30)), math.cos(math.radians(30))
    place = [2 * sine * math.sin(math.radians(-50)), 2 * cosine, 2 * sine * math.cos(math.radians(-50))]
    check("place", look_at(exact(30), exact(-50), exact(2))[0, :3, 3], exact(*place), exact(*place))


def test_make_cameras_wraps_azimuth():
    """Azimuths are wrapped to [-180, 180), and other numbers are unchanged."""
    azimuths = exact(0, 179, 180, -180, -181, 540, 725)
    others = [torch.arange(7.0).double() + start for start in (20, 2, 30)]
    cameras = make_cameras(others[0], azimuths, others[1], others[2])
    assert cameras.azimuth.tolist() == [0, 179, -180, -180, 179, -180, 5]
    assert torch.equal(cameras.polar, others[0]) and torch.equal(cameras.radius, others[1])
    assert torch.equal(cameras.fovy, others[2])


def test_turntable_default_cameras():
    """Azimuths are evenly spaced from the default one, all else is that of the output camera."""
    view = config(default_azimuth=30.0, default_polar=60.0, default_radius=2.5, default_fovy=25.0)
    frames = turntable(view, 3)
    assert frames.azimuth.tolist() == [30, 150, -90]
    for got, value in ((frames.polar, 60), (frames.radius, 2.5), (frames.fovy, 25)):
        assert got.tolist() == [value] * 3


def test_six_views_default_distance():
    """The angles of the table, in its order, with the default radius and field of view."""
    views = six_views(config(default_radius=2.5, default_fovy=25.0, default_polar=10.0, default_azimuth=70.0))
    angles = [(polar, (azimuth + 180) % 360 - 180) for polar, azimuth in SIX_VIEWS.values()]
    assert list(zip(views.polar.tolist(), views.azimuth.tolist(), strict=True)) == angles
    assert views.radius.tolist() == [2.5] * 6 and views.fovy.tolist() == [25.0] * 6


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_sample_cameras_independent(rate):
    """Radius, polar angle, sector and field of view are uncorrelated, to five standard errors."""
    count = 4000
    drawn = sample_cameras(config(uniform_sphere_rate=rate), count, torch.Generator().manual_seed(8))
    sectors = (drawn.azimuth.double() + 180) / 360 * count
    assert ((sectors - 0.5 - torch.arange(count)).abs() < 0.6).all()  # one camera in each sector, all around
    numbers = [drawn.radius, drawn.polar, sectors - torch.arange(count), drawn.fovy]
    for one, other in itertools.combinations(numbers, 2):
        together = torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1]
        assert abs(together) < 5 / count**0.5


def test_sample_cameras_whole_ranges():
    """Without a progress the ranges of a progressive view are full."""
    limits = config(progressive_view=True, progressive_view_init_ratio=0.0)
    whole, end = (sample_cameras(limits, 9, torch.Generator().manual_seed(1), **at) for at in ({}, {"progress": 1.0}))
    assert torch.equal(whole.c2w, end.c2w) and torch.equal(whole.fovy, end.fovy)
    start = sample_cameras(limits, 9, torch.Generator().manual_seed(1), progress=0.0)
    assert start.radius.tolist() == [whole.radius.new_tensor(limits.default_radius).item()] * 9
