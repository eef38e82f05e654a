"""Meshes, videos and pictures: closed surfaces, the right way round, whole files."""

import dataclasses
import functools
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from skimage import measure

from dream_fast.engine.camera import make_cameras, project
from dream_fast.engine.config import CameraConfig, FieldConfig, RenderConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.export import images, mesh, video
from dream_fast.engine.export.files import written_aside
from dream_fast.engine.field import Field
from dream_fast.engine.renderer import Renderer

BOUND = 0.6


def grid(n):
    return np.stack(np.meshgrid(*[np.linspace(-1, 1, n)] * 3, indexing="ij"), axis=-1)


def ball(points, centre, radius):
    return radius - np.linalg.norm(points - np.array(centre), axis=-1)


def torus(points):
    return 0.2 - np.hypot(np.hypot(points[..., 0], points[..., 2]) - 0.6, points[..., 1])


SHAPES = {
    "sphere": (lambda p: ball(p, (0, 0, 0), 0.6), 2),
    "torus": (torus, 0),
    # The surfaces meet at a grid point, the hardest place to be manifold.
    "touching": (lambda p: np.maximum(ball(p, (0.4, 0, 0), 0.4), ball(p, (-0.4, 0, 0), 0.4)), None),
    "apart": (lambda p: np.maximum(ball(p, (0.5, 0, 0), 0.3), ball(p, (-0.5, 0, 0), 0.3)), 4),
    "noise": (lambda p: np.random.default_rng(0).standard_normal(p.shape[:-1]), None),
    "full": (lambda p: np.ones(p.shape[:-1]), 2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_surfaces_are_closed_manifolds_that_face_outwards(name):
    shape, euler = SHAPES[name]
    result = mesh.marching_tetrahedra(shape(grid(25)), 0.0)
    surface = trimesh.Trimesh(result.vertices, result.faces, process=False)
    assert surface.is_watertight and surface.is_winding_consistent
    assert surface.volume > 0
    assert surface.area_faces.min() > 0
    assert len(np.unique(result.faces)) == len(result.vertices)
    if euler is not None:
        assert surface.euler_number == euler


def test_nothing_above_the_level_is_an_empty_mesh():
    result = mesh.marching_tetrahedra(np.zeros((4, 4, 4)), 1.0)
    assert result.vertices.shape == (0, 3) and result.faces.shape == (0, 3)


def test_sphere_agrees_with_marching_cubes():
    n, radius = 48, 0.6
    volume = ball(grid(n), (0.03, -0.02, 0.01), radius)
    own = mesh.marching_tetrahedra(volume, 0.0)
    surface = trimesh.Trimesh(own.vertices, own.faces, process=False)
    vertices, faces, _, _ = measure.marching_cubes(volume, 0.0)
    oracle = trimesh.Trimesh(vertices, faces[:, ::-1], process=False)
    assert surface.volume == pytest.approx(abs(oracle.volume), rel=5e-3)
    assert surface.area == pytest.approx(oracle.area, rel=5e-3)
    cell = 2 / (n - 1)
    assert surface.volume * cell**3 == pytest.approx(4 / 3 * np.pi * radius**3, rel=5e-3)
    distance = np.linalg.norm(own.vertices * cell - 1 - np.array([0.03, -0.02, 0.01]), axis=1)
    assert np.abs(distance - radius).max() < 0.03 * cell + 1e-3


def test_floaters_are_dropped_and_parts_kept():
    points = grid(40)
    parts = np.stack([ball(points, (-0.4, 0, 0), 0.4), ball(points, (0.5, 0, 0), 0.2), ball(points, (0, 0.9, 0), 0.05)])
    full = mesh.marching_tetrahedra(parts.max(axis=0), 0.0)
    assert len(np.unique(mesh.components(full))) == 3
    cleaned = mesh.without_floaters(full)
    assert len(np.unique(mesh.components(cleaned))) == 2
    surface = trimesh.Trimesh(cleaned.vertices, cleaned.faces, process=False)
    assert surface.is_watertight and surface.euler_number == 4
    assert surface.vertices[:, 1].max() < 39 * 0.75


@pytest.mark.parametrize(
    ("volume", "threshold", "level"),
    [
        ([0.0, 0.0, 40.0, 40.0], 10.0, 10.0),
        ([0.0, 0.0, 0.0, 8.0], 10.0, 2.0),  # the mean is lower than the threshold
        ([20.0, 30.0, 40.0, 50.0], 10.0, 35.0),  # full: everything is above it
        ([0.0, 0.0, 1.0, 1.0], 0.5, 0.5),
    ],
)
def test_surface_level(volume, threshold, level):
    assert mesh.surface_level(torch.tensor(volume), threshold) == pytest.approx(level)


@pytest.mark.parametrize("volume", [[0.0, 0.0], [1.0, float("nan")]])
def test_a_field_without_a_surface_is_said(volume):
    with pytest.raises(UserError, match="no surface"):
        mesh.surface_level(torch.tensor(volume), 10.0)


# ---------------------------------------------------------------------------------------------- a field that we know


def scene(points):
    """Density and albedo of a lopsided object: a red body, a green arm to +x, a blue horn up, a nose to the front."""

    def inside(centre, radius):
        return ((points - points.new_tensor(centre)).norm(dim=-1) < radius).float()

    body, arm = inside((0.0, 0.0, 0.0), 0.25), inside((0.33, 0.05, 0.0), 0.12)
    horn, nose = inside((-0.1, 0.34, 0.0), 0.1), inside((0.0, -0.1, 0.32), 0.1)
    sigma = 200.0 * torch.stack([body, arm, horn, nose]).amax(dim=0) + 0.01
    albedo = points.new_tensor([0.8, 0.1, 0.1]).expand(len(points), 3)
    for part, colour in ((arm, [0.1, 0.8, 0.1]), (horn, [0.1, 0.1, 0.8]), (nose, [0.8, 0.8, 0.8])):
        albedo = torch.where(part[:, None] > body[:, None], points.new_tensor(colour), albedo)
    return sigma, albedo


@functools.cache
def fitted_renderer():
    """A field fitted to `scene`, so that rendering and export read the same parameters."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        FieldConfig(),
        levels=4,
        log2_entries=14,
        base_resolution=8,
        max_resolution=32,
        hidden_width=32,
        hidden_layers=1,
        blob_density=0.0,
        bg_radius=-1.0,
    )
    field = Field(config, BOUND, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(field.parameters(), lr=0.02)
    for _ in range(150):
        points = (torch.rand(4096, 3) * 2 - 1) * BOUND
        sigma, albedo = scene(points)
        values = field(points)
        colour_error = (values.albedo - albedo).square().sum(dim=-1) * (sigma > 1)
        loss = (values.sigma.log() - sigma.log()).square().mean() + 10 * colour_error.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    render_config = dataclasses.replace(RenderConfig(), bound=BOUND, max_steps=256, occupancy_resolution=32)
    renderer = Renderer(field.requires_grad_(False), render_config)
    renderer.update_occupancy(None)
    return renderer


def looking(polar, azimuth):
    return make_cameras(*(torch.tensor([float(v)]) for v in (polar, azimuth, 3.0, 24.0)))


def silhouette(cameras, vertices, faces, size):
    """Pixels [H, W] whose centre lies inside a projected triangle."""
    corners = project(cameras, torch.from_numpy(vertices).float(), size, size)[0].numpy()[faces]  # [T, 3, 2]
    covered = np.zeros((size, size), dtype=bool)
    for a, b, c in corners:
        low = np.floor(np.min([a, b, c], axis=0)).astype(int).clip(0, size - 1)
        high = np.ceil(np.max([a, b, c], axis=0)).astype(int).clip(0, size - 1)
        rows, columns = np.meshgrid(*(np.arange(low[i], high[i] + 1) for i in range(2)), indexing="ij")
        p = np.stack([rows, columns], axis=-1) + 0.5
        sides = [
            (q[0] - o[0]) * (p[..., 1] - o[1]) - (q[1] - o[1]) * (p[..., 0] - o[0]) for o, q in ((a, b), (b, c), (c, a))
        ]
        hit = np.all(np.array(sides) >= 0, axis=0) | np.all(np.array(sides) <= 0, axis=0)
        covered[rows[hit], columns[hit]] = True
    return covered


@pytest.fixture(scope="module")
def glb(tmp_path_factory):
    path = tmp_path_factory.mktemp("mesh") / "mesh.glb"
    mesh.write_mesh(path, fitted_renderer().field, 32, 10.0)
    return next(iter(trimesh.load_scene(path, process=False).geometry.values()))


@pytest.mark.parametrize(("polar", "azimuth"), [(90, 0), (90, 90), (70, 210), (10, 0)])
def test_the_mesh_lies_like_the_render(glb, polar, azimuth):
    cameras, size = looking(polar, azimuth), 48
    seen = (fitted_renderer().view(cameras, size, size, normals=False).opacity[0] > 0.5).numpy()
    covered = silhouette(cameras, np.asarray(glb.vertices, dtype=np.float64), glb.faces, size)

    def overlap(a, b):
        return (a & b).sum() / (a | b).sum()

    assert overlap(covered, seen) > 0.9
    # The object is lopsided, so its mirror images do not fit.
    assert overlap(covered[:, ::-1], seen) < 0.85
    assert overlap(covered[::-1], seen) < 0.85


def test_the_file_holds_a_closed_coloured_surface(glb):
    assert glb.is_watertight and glb.volume > 0
    assert np.abs(glb.bounds).max() < BOUND
    colours = glb.visual.vertex_attributes["color"][:, :3] / 255
    for place, channel in (((0.43, 0.05, 0), 1), ((-0.1, 0.43, 0), 2), ((0, 0, -0.25), 0)):
        nearest = np.linalg.norm(glb.vertices - np.array(place), axis=1).argmin()
        assert colours[nearest].argmax() == channel
    albedo = fitted_renderer().field.albedo(torch.from_numpy(np.array(glb.vertices)).float()).double().numpy()
    np.testing.assert_allclose(colours, mesh.linear_from_srgb(albedo), atol=1 / 255)
    outward = np.einsum("ij,ij->i", glb.vertex_normals, glb.vertices)
    assert np.mean(outward > 0) > 0.8
    assert glb.visual.material.metallicFactor == 0


def test_a_mesh_is_written_without_scipy(tmp_path):
    """SciPy is no dependency of ours; trimesh falls back noisily and slowly where it asks for it."""
    code = """
import sys
sys.modules["scipy"] = None
import torch, trimesh
from dream_fast.engine.config import FieldConfig
from dream_fast.engine.export.mesh import write_mesh
from dream_fast.engine.field import Field
shape = FieldConfig(levels=2, log2_entries=12, max_resolution=32, bg_radius=-1.0)
write_mesh(sys.argv[1], Field(shape, 0.6, torch.Generator().manual_seed(0)), 24, 10.0)
"""
    path = tmp_path / "mesh.glb"
    done = subprocess.run([sys.executable, "-P", "-c", code, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    vertices = trimesh.load(path, force="mesh")
    directions = vertices.vertices / np.linalg.norm(vertices.vertices, axis=1, keepdims=True)
    assert (vertices.vertex_normals * directions).sum(axis=1).min() > 0.5  # the first field is a ball


def test_linear_from_srgb_agrees_with_known_values():
    values = mesh.linear_from_srgb(np.array([0.0, 0.04, 0.5, 1.0]))
    np.testing.assert_allclose(values, [0.0, 0.00309598, 0.21404114, 1.0], rtol=1e-5)


# ------------------------------------------------------------------------------------------------ pictures and videos


def test_six_views_are_written_and_show_the_right_sides(tmp_path):
    config = CameraConfig(W=32, H=24, default_radius=3.0, default_fovy=24.0)
    paths = images.write_six_views(tmp_path, fitted_renderer(), config)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)
    assert len(paths) == 13
    front, back = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("front", "back"))
    assert front.shape == (24, 32, 3)

    def green_side(image):
        columns = np.nonzero((image[..., 1] > image[..., 0] + 60) & (image[..., 1] > image[..., 2] + 60))[1]
        return columns.mean() - 15.5

    assert green_side(front) > 3 and green_side(back) < -3  # the arm points to +x
    assert np.asarray(Image.open(tmp_path / "six_views.png")).shape == (48, 192, 3)


def test_turntable_shows_colour_normals_and_depth_side_by_side():
    config = CameraConfig(W=20, H=20, default_radius=3.0, default_fovy=24.0)
    frames = list(video.turntable_frames(fitted_renderer(), config, 3))
    assert len(frames) == 3 and frames[0].shape == (20, 60, 3) and frames[0].dtype == np.uint8
    colour, normal, depth = np.split(frames[0].astype(int), 3, axis=1)
    assert (colour[0, 0] == 255).all() and (normal[0, 0] == 255).all() and (depth[0, 0] == 0).all()
    assert colour[10, 8, 0] > colour[10, 8, 1] + 60  # the red body
    assert normal[10, 8, 2] > 200  # its front faces +z
    assert depth[10, 8, 0] > 128  # and is nearer than the centre of the scene


def test_video_holds_every_frame_also_with_odd_sides(tmp_path):
    frames = [np.full((21, 33, 3), value, dtype=np.uint8) for value in (0, 120, 240)]
    seen = []
    codec = video.write_video(tmp_path / "v.mp4", iter(frames), 25, on_frame=lambda: seen.append(1))
    assert codec in ("libx264", "mpeg4") and len(seen) == 3
    with av.open(str(tmp_path / "v.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 25
    assert len(decoded) == 3 and decoded[0].shape == (22, 34, 3)
    for frame, expected in zip(decoded, (0, 120, 240), strict=True):
        assert abs(frame.astype(int).mean() - expected) < 6
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_a_video_without_frames_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        video.write_video(tmp_path / "v.mp4", [], 25)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with written_aside(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1
