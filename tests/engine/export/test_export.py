"""Meshes, videos and images: closed surfaces, their orientation, and complete files."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import fast_simplification
import numpy as np
import pytest
import torch
import trimesh
import uvunwrap
from PIL import Image
from skimage import measure

from dream_fast import kernels
from dream_fast.bench.accuracy import check
from dream_fast.bench.pipeline import mesh_export as bench_mesh
from dream_fast.engine.config.sections import CameraConfig, FieldConfig, RenderConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.export import images, isosurface, mesh_files, texture, uv_atlas, video
from dream_fast.engine.export.silhouette import render_silhouettes
from dream_fast.engine.geometry import marching_cubes as marching_cubes_module
from dream_fast.engine.geometry import mesh as geometry_mesh
from dream_fast.engine.geometry.marching_cubes import EDGE_MARGIN, marching_cubes
from dream_fast.engine.render.volume import VolumeRenderer
from dream_fast.engine.scene.camera import six_views
from dream_fast.engine.scene.hash_grid_field import HashGridField
from dream_fast.engine.workspace import atomic

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
def test_marching_cubes_closed_shapes(name):
    """Surfaces are closed manifolds that face outwards."""
    function, euler = SHAPES[name]
    result = marching_cubes(function(grid(25)), 0.0)
    shape = trimesh.Trimesh(result.vertices, result.faces, process=False)
    assert shape.is_watertight and shape.is_winding_consistent and geometry_mesh.is_closed(result)
    assert shape.volume > 0
    assert shape.area_faces.min() > 0
    assert len(np.unique(result.faces)) == len(result.vertices)
    if euler is not None:
        assert shape.euler_number == euler


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_marching_cubes_slabs_of_shapes(layers, monkeypatch):
    """A surface computed in slabs is the same."""
    volume = SHAPES["noise"][0](grid(12))
    whole = marching_cubes(volume, 0.0)
    monkeypatch.setattr(marching_cubes_module, "LAYER_POINTS", layers * 14 * 14)
    parts = marching_cubes(volume, 0.0)
    assert np.array_equal(parts.vertices, whole.vertices)
    assert np.array_equal(*(np.unique(one.faces, axis=0) for one in (whole, parts)))


def test_marching_cubes_empty_shape():
    """Values below the isovalue give an empty mesh."""
    result = marching_cubes(np.zeros((4, 4, 4)), 1.0)
    assert result.vertices.shape == (0, 3) and result.faces.shape == (0, 3)


def test_marching_cubes_sphere():
    """A sphere agrees with another implementation of marching cubes."""
    n, radius = 48, 0.6
    volume = ball(grid(n), (0.03, -0.02, 0.01), radius)
    mesh = marching_cubes(volume, 0.0)
    shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    vertices, _, _, _ = measure.marching_cubes(volume, 0.0)
    # Both have a vertex on each edge that crosses: in fp32 there, of coordinates up to n; ours a margin from its ends.
    assert len(vertices) == len(mesh.vertices)
    pairs = (torch.from_numpy(one).double() for one in (vertices.copy(), mesh.vertices))
    apart = torch.cdist(*pairs, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
    assert apart.median() < 4 * n * np.finfo(np.float32).eps and apart.max() < EDGE_MARGIN
    # In cells: zeros of straight lines over an edge of 1 lie inside by 1 / 8r at most, if the margin does not move
    # them, and the middle of a triangle, whose corners lie on one cube, below them by (sqrt(3) / 2)^2 / 2r.
    cells, cell, margin = radius * (n - 1) / 2, 2 / (n - 1), EDGE_MARGIN
    distance = np.linalg.norm(mesh.vertices * cell - 1 - np.array([0.03, -0.02, 0.01]), axis=1) / cell
    outer, inner = cells + margin, cells - margin - 1 / (8 * cells)
    assert inner < distance.min() and distance.max() < outer
    inner -= 3 / (8 * cells)
    assert 4 / 3 * np.pi * inner**3 < shape.volume < 4 / 3 * np.pi * outer**3
    assert 4 * np.pi * inner**2 < shape.area < 4 * np.pi * outer**2


def test_visible_parts_of_shapes():
    """Floaters are dropped and parts kept."""
    points = grid(40)
    parts = np.stack([ball(points, (-0.4, 0, 0), 0.4), ball(points, (0.5, 0, 0), 0.2), ball(points, (0, 0.9, 0), 0.05)])
    full = marching_cubes(parts.max(axis=0), 0.0)
    assert len(np.unique(geometry_mesh.mesh_components(full))) == 3
    cleaned = geometry_mesh.visible_parts(full)
    assert len(np.unique(geometry_mesh.mesh_components(cleaned))) == 2
    shape = trimesh.Trimesh(cleaned.vertices, cleaned.faces, process=False)
    assert shape.is_watertight and shape.euler_number == 4
    assert shape.vertices[:, 1].max() < 39 * 0.75


@pytest.mark.parametrize(("gap", "radius", "stays"), [(0.02, 0.06, True), (0.1, 0.06, False), (0.02, 0.02, False)])
def test_visible_parts_near_components(gap, radius, stays):
    """Components beside a part stay unless they are crumbs."""
    points = grid(160)
    pot, knob = ball(points, (0, -0.2, 0), 0.5), ball(points, (0, 0.3 + gap + radius, 0), radius)
    full = marching_cubes(np.maximum(pot, knob), 0.0)
    assert len(np.unique(geometry_mesh.mesh_components(full))) == 2
    assert len(np.unique(geometry_mesh.mesh_components(geometry_mesh.visible_parts(full)))) == 1 + stays


def bumps(points):
    """A wavy ball and torus, a surface that is hard to simplify."""
    waves = np.prod([np.sin(k * points[..., i]) for i, k in enumerate((15, 14, 13))], axis=0)
    return np.maximum(ball(points, (0, 0, 0), 0.5), torus(points)) + 0.02 * waves


@pytest.mark.parametrize("target", [200, 3000, 10**6])
def test_simplify_sphere(target):
    """A simplified surface is closed and near the original."""
    n = 64
    full = marching_cubes(bumps(grid(n)), 0.0)
    simpler = geometry_mesh.simplify(full, target)
    before, after = (trimesh.Trimesh(one.vertices, one.faces, process=False) for one in (full, simpler))
    assert 0.8 * min(target, len(full.faces)) <= len(simpler.faces) <= target
    assert after.is_watertight and after.is_winding_consistent and geometry_mesh.is_closed(simpler)
    # The volume is kept as well as the library keeps it that simplifies, but for what closing pinches costs.
    ratio = max(0.0, 1 - target / len(full.faces))
    points, triangles = fast_simplification.simplify(full.vertices, full.faces.astype(np.int32), ratio)
    plain = trimesh.Trimesh(points, triangles, process=False)
    volumes = (torch.tensor([float(one.volume)], dtype=torch.float64) for one in (after, plain, before))
    check("volume", *volumes)
    assert len(np.unique(simpler.faces)) == len(simpler.vertices)


def test_stage_seconds():
    """The stages of an export are timed by its progress."""
    volume, surface_, atlas_, images = mesh_files.STAGE_ENDS
    progress = [(volume / 2, 1.0), (volume, 2.0), (surface_, 5.0), (atlas_, 6.0), ((atlas_ + images) / 2, 7.0)]
    progress += [(atlas_ + (images - atlas_), 8.0), (1.0, 9.5)]
    parts = bench_mesh.split_seconds(0.5, progress)
    assert parts == {"volume": 1.5, "surface": 3.0, "atlas": 1.0, "images": 2.0, "files": 1.5}


def test_drop_folded_faces_of_shapes():
    """Triangles that lie on each other are removed."""
    ball_ = marching_cubes(SHAPES["sphere"][0](grid(12)), 0.0)
    flap = np.array([[ball_.faces[0, 0], ball_.faces[0, 1], len(ball_.vertices)]])
    vertices = np.concatenate([ball_.vertices, [[9.0, 9.0, 9.0]]])
    broken = geometry_mesh.Mesh(vertices, np.concatenate([ball_.faces, flap, flap[:, ::-1]]))
    assert not geometry_mesh.is_closed(broken)
    mended = geometry_mesh._drop_folded_faces(broken)
    assert geometry_mesh.is_closed(mended) and len(mended.vertices) == len(ball_.vertices)


@pytest.mark.parametrize(
    ("volume", "threshold", "level"),
    [
        ([0.0, 0.0, 40.0, 40.0], 10.0, 10.0),
        ([0.0, 0.0, 0.0, 8.0], 10.0, 2.0),  # the mean is lower than the threshold
        ([20.0, 30.0, 40.0, 80.0], 10.0, 40.0),  # full: everything is above it
        ([0.0, 0.0, 1.0, 1.0], 0.5, 0.5),
    ],
)
def test_choose_isovalue_values(volume, threshold, level):
    """The isovalue is the threshold or the mean density."""
    exact = torch.tensor(level, dtype=torch.float64)
    check("level", torch.tensor(isosurface.choose_isovalue(torch.tensor(volume), threshold)), exact.float(), exact)


@pytest.mark.parametrize("volume", [[0.0, 0.0], [1.0, float("nan")]])
def test_write_mesh_without_surface(volume):
    """A field without a surface is refused."""
    with pytest.raises(UserError, match="no surface"):
        isosurface.choose_isovalue(torch.tensor(volume), 10.0)


# A field that we know


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


CAMERAS = six_views(dataclasses.replace(CameraConfig(), default_radius=3.0, default_fovy=24.0))


@functools.cache
def fitted_renderer():
    """A field fitted to `scene`, so that rendering and export read the same parameters."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        FieldConfig(),
        n_levels=4,
        log2_hashmap_size=14,
        base_resolution=8,
        max_resolution=32,
        hidden_width=32,
        hidden_layers=1,
        blob_density=0.0,
        bg_radius=-1.0,
    )
    field = HashGridField(config, BOUND, torch.Generator().manual_seed(0))
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
    render_config = dataclasses.replace(RenderConfig(), bound=BOUND, max_steps=256, occupancy_resolution=64)
    renderer = VolumeRenderer(field.requires_grad_(False), render_config)
    renderer.update_occupancy(None)
    return renderer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of a mesh of `fitted_renderer`'s field."""
    path = tmp_path_factory.mktemp("mesh") / "mesh.glb"
    options = dict(
        silhouettes=render_silhouettes(fitted_renderer(), CAMERAS), decimate_target=4000, texture_resolution=256
    )
    result = mesh_files.write_mesh(path, fitted_renderer().field, 48, 10.0, **options)
    assert sorted(path.parent.iterdir()) == sorted(mesh_files.mesh_paths(path)) and len(result.faces) <= 4000
    return path


@pytest.fixture(scope="module")
def glb(written):
    return next(iter(trimesh.load_scene(written, process=False).geometry.values()))


def test_write_mesh_six_views(written):
    """Six views of the mesh are those of the field."""
    likeness = bench_mesh.compare_with_field(fitted_renderer(), bench_mesh.read_glb(written), CAMERAS, 96)
    assert min(likeness.iou) > 0.95 and min(likeness.psnr) > 25
    # The object is lopsided: seen in a mirror it is another one.
    mirrored = bench_mesh.read_glb(written)
    mirrored.vertices[:, 0] *= -1
    assert min(bench_mesh.compare_with_field(fitted_renderer(), mirrored, CAMERAS, 96).iou) < 0.85


def test_write_mesh_silhouettes(tmp_path):
    """The mesh has the silhouettes of the images, whatever the threshold."""

    def worst_overlap(threshold, silhouettes):
        options = dict(silhouettes=silhouettes, decimate_target=4000, texture_resolution=64)
        mesh_files.write_mesh(tmp_path / "mesh.glb", fitted_renderer().field, 48, threshold, **options)
        shape = bench_mesh.read_glb(tmp_path / "mesh.glb")
        return min(bench_mesh.compare_with_field(fitted_renderer(), shape, CAMERAS, 96).iou)

    silhouettes = render_silhouettes(fitted_renderer(), CAMERAS)
    for threshold in (0.05, 0.3):
        assert worst_overlap(threshold, None) < 0.9 and worst_overlap(threshold, silhouettes) > 0.94


@pytest.mark.parametrize("suffix", [".glb", ".obj"])
def test_write_mesh_files(written, suffix):
    """The files have a closed textured surface."""
    scene = trimesh.load_scene(written.with_suffix(suffix), process=False)
    (shape,) = scene.geometry.values()
    material = shape.visual.material
    image = material.baseColorTexture if suffix == ".glb" else material.image
    colours = np.asarray(image.convert("RGB")) / 255
    assert colours.shape == (256, 256, 3)
    for place, channel in (((0.43, 0.05, 0), 1), ((-0.1, 0.43, 0), 2), ((0, 0, -0.25), 0)):
        u, v = shape.visual.uv[np.linalg.norm(shape.vertices - np.array(place), axis=1).argmin()]
        assert colours[int((1 - v) * 256), int(u * 256)].argmax() == channel
    assert np.abs(shape.bounds).max() < BOUND
    outward = np.einsum("ij,ij->i", shape.vertex_normals, shape.vertices)
    assert np.mean(outward > 0) > 0.8
    # Seams have doubled vertices: without them the surface is closed.
    shape.merge_vertices(merge_tex=True, merge_norm=True)
    assert shape.is_watertight and shape.volume > 0


def test_write_mesh_material(written, glb):
    """The material is matt and opaque."""
    assert glb.visual.material.metallicFactor == 0 and glb.visual.material.alphaMode in (None, "OPAQUE")
    lines = written.with_suffix(".mtl").read_text().splitlines()
    assert "d 1" in lines and "Ks 0 0 0" in lines and "map_Kd mesh.png" in lines


def test_bake_colours_and_charts(written, pixels_inside):
    """Charts do not overlap, and the texture has the colours of the field."""
    field = fitted_renderer().field
    shape = geometry_mesh.simplify(isosurface.extract_surface(isosurface.sample_volume(field, 40, 10.0)), 2000)
    for unwrapped in (uv_atlas.unwrap(shape, 256), uv_atlas._unwrap_by_xatlas(*as_arrays(shape), 256)):
        assert np.array_equal(unwrapped.source[unwrapped.faces], shape.faces)
        assert 0 <= unwrapped.uv.min() and unwrapped.uv.max() <= 1
        uv = torch.from_numpy(unwrapped.uv)
        clip = torch.cat([2 * uv - 1, torch.zeros(len(uv), 1), torch.ones(len(uv), 1)], dim=1)[None]
        faces = torch.from_numpy(unwrapped.faces).int()
        fragments = kernels.rasterize(clip, faces, 1024, 1024)
        # No pixel is inside of two triangles: together they hold no more of them than are covered.
        covered = int((fragments.triangle >= 0).sum())
        assert 0.3 * 1024**2 < covered and pixels_inside(unwrapped.uv, unwrapped.faces, 1024) <= covered
        image = texture.bake(field, shape, unwrapped, 256).albedo / 255
        texels = torch.from_numpy(unwrapped.source)[faces.long()]
        middle = torch.from_numpy(shape.vertices).float()[texels].mean(1)
        column, row = (unwrapped.uv[unwrapped.faces].mean(1) * [256, -256] + [0, 256]).clip(0, 255).astype(int).T
        expected = field.albedo(middle).numpy()
        assert np.median(np.abs(image[row, column] - expected)) < 0.02


def as_arrays(shape):
    return shape.vertices.astype(np.float32), shape.faces.astype(np.uint32)


def test_fill_holes():
    """Holes get the colours around them."""
    image, known = torch.zeros(37, 20, 3), torch.zeros(37, 20, dtype=torch.bool)
    image[:, :6], known[:, :6] = torch.tensor([1.0, 0.2, 0.0]), True
    image[:, -6:], known[:, -6:] = torch.tensor([0.0, 0.2, 1.0]), True
    filled = texture.fill_holes(image, known)
    assert torch.equal(filled[known], image[known])
    even = torch.full((37, 20), 0.2)
    check("even", filled[..., 1], even, torch.full((37, 20), 0.2, dtype=torch.float64))
    assert (filled[:, 6, 0] > 0.6).all() and (filled[:, 13, 2] > 0.6).all()
    assert filled.min() >= 0 and filled.max() <= 1 + 16 * torch.finfo(torch.float32).eps


def test_unwrap_without_uvunwrap(monkeypatch):
    """xatlas is used without uvunwrap; without both there is an error."""
    shape = marching_cubes(SHAPES["sphere"][0](grid(12)), 0.0)
    monkeypatch.setitem(sys.modules, "uvunwrap", None)
    assert len(uv_atlas.unwrap(shape, 64).faces) == len(shape.faces)
    monkeypatch.setitem(sys.modules, "xatlas", None)
    with pytest.raises(UserError, match="pip install uvunwrap"):
        uv_atlas.unwrap(shape, 64)


@pytest.mark.parametrize("panics", [1, 2])
def test_unwrap_panic(panics, monkeypatch, capfd):
    """After a panic uvunwrap is tried with reversed triangles, then xatlas."""
    shape = marching_cubes(SHAPES["sphere"][0](grid(12)), 0.0)
    generate, xatlas, calls = uvunwrap.generate, uv_atlas._unwrap_by_xatlas, []
    panic = type("PanicException", (BaseException,), {})

    def unreliable(meshes, **options):
        calls.append("uvunwrap")
        if len(calls) <= panics:
            os.write(2, b"thread panicked, stack backtrace")
            raise panic("index out of bounds")
        return generate(meshes, **options)

    monkeypatch.setattr(uvunwrap, "generate", unreliable)
    monkeypatch.setattr(uv_atlas, "_unwrap_by_xatlas", lambda *of: calls.append("xatlas") or xatlas(*of))
    laid = uv_atlas.unwrap(shape, 64)
    assert calls == ["uvunwrap", "uvunwrap"] + ["xatlas"] * (panics - 1)
    assert np.array_equal(laid.source[laid.faces], shape.faces)  # in the mesh's order
    assert texture.bake(fitted_renderer().field, shape, laid, 64).albedo.any()
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


@pytest.mark.parametrize("fault", ["the last file", "the disk, when the files are flushed"])
def test_write_mesh_full_disk(fault, tmp_path, monkeypatch):
    """A full disk leaves the old files unchanged."""
    field, path = fitted_renderer().field, tmp_path / "mesh.glb"
    for old in mesh_files.mesh_paths(path):
        old.write_text("old")
    write, sync = Path.write_bytes, atomic._sync_file

    def full(to, data):
        if to.name.endswith("_normal.writing.png"):
            raise OSError(28, "No space left on device")
        return write(to, data)

    def flush(file, folder):
        if str(file).endswith(".writing.glb"):
            raise OSError(28, "No space left on device")
        sync(file, folder)

    if fault == "the last file":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr(atomic, "_sync_file", flush)
    with pytest.raises(OSError, match="No space"):
        mesh_files.write_mesh(path, field, 16, 10.0, texture_resolution=32)
    assert sorted(tmp_path.iterdir()) == sorted(mesh_files.mesh_paths(path))
    assert all(old.read_text() == "old" for old in mesh_files.mesh_paths(path))


def test_write_mesh_without_scipy(tmp_path):
    """SciPy is not a dependency, though trimesh can use it."""
    code = """
import sys
sys.modules["scipy"] = None
import torch, trimesh
from dream_fast.engine.config.sections import FieldConfig
from dream_fast.engine.export.mesh_files import write_mesh
from dream_fast.engine.scene.hash_grid_field import HashGridField
shape = FieldConfig(n_levels=2, log2_hashmap_size=12, max_resolution=32, bg_radius=-1.0)
write_mesh(sys.argv[1], HashGridField(shape, 0.6, torch.Generator().manual_seed(0)), 24, 10.0, texture_resolution=64)
"""
    path = tmp_path / "mesh.glb"
    process = subprocess.run([sys.executable, "-P", "-c", code, str(path)], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    vertices = trimesh.load(path, force="mesh")
    directions = vertices.vertices / np.linalg.norm(vertices.vertices, axis=1, keepdims=True)
    assert (vertices.vertex_normals * directions).sum(axis=1).min() > 0.5  # the first field is a ball


# Images and videos


def test_write_six_views(tmp_path):
    """Six views are written and show the right sides."""
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


def test_turntable_frames():
    """Frames have colour, normals and depth side by side."""
    config = CameraConfig(W=20, H=20, default_radius=3.0, default_fovy=24.0)
    frames = list(video.turntable_frames(fitted_renderer(), config, 3))
    assert len(frames) == 3 and frames[0].shape == (20, 60, 3) and frames[0].dtype == np.uint8
    colour, normal, depth = np.split(frames[0].astype(int), 3, axis=1)
    assert (colour[0, 0] == 255).all() and (normal[0, 0] == 255).all() and (depth[0, 0] == 0).all()
    assert colour[10, 8, 0] > colour[10, 8, 1] + 60  # the red body
    assert normal[10, 8, 2] > 200  # its front faces +z
    assert depth[10, 8, 0] > 128  # and is nearer than the centre of the scene
