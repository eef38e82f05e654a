"""Surfaces of known fields, closed also where simplification pinches them; atlases without overlaps;
normal maps that reproduce the field's normals.
"""

import math

import fast_simplification
import numpy as np
import pytest
import torch
import trimesh

from dream_fast import kernels
from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.export import isosurface, texture, uv_atlas
from dream_fast.engine.export.silhouette import Silhouettes
from dream_fast.engine.geometry import mesh as geometry_mesh
from dream_fast.engine.geometry.marching_cubes import marching_cubes
from dream_fast.engine.geometry.mesh import Mesh, NoSurface
from dream_fast.engine.scene.camera import rays, six_views

ULP = torch.finfo(torch.float32).eps  # relative distance of neighbours in fp32


class Analytic:
    """A field with the density 10 exp(-steep * distance(x)): at the isovalue 10 the distance is 0."""

    device, finest = torch.device("cpu"), None

    def __init__(self, distance, bound=1.0, steep=40.0):
        self.distance, self.bound, self.steep, self.asked = distance, bound, steep, 0

    def albedo(self, x):
        return (x / self.bound + 1) / 2

    def density(self, x):
        self.asked += len(x)
        return 10 * torch.exp((-self.steep * self.distance(x)).clamp(-20, 12))


def ball(radius, centre=(0.0, 0.0, 0.0)):
    return lambda x: (x - x.new_tensor(centre)).norm(dim=-1) - radius


def bumps(x):
    waves = torch.stack([torch.sin(k * x[..., i]) for i, k in enumerate((15, 14, 13))]).prod(dim=0)
    return ball(0.6)(x) + 0.05 * waves


def as_trimesh(mesh):
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def in_a_ball(radius):
    return 4 / 3 * math.pi * radius**3


def below(cell, radius):
    """Greatest distance of marching cubes below a ball: cell^2 / 8r for a line over an edge, and (sqrt(3) / 2
    cell)^2 / 2r
    below it for the middle of a triangle, whose corners lie on one cube.
    """
    return cell**2 / (8 * radius) + 3 * cell**2 / (8 * radius)


def found(field, resolution, threshold=10.0):
    return as_trimesh(isosurface.extract_surface(isosurface.sample_volume(field, resolution, threshold)))


@pytest.mark.parametrize("bound", [0.6, 1.0, 4.0])
def test_extract_surface_ball(bound):
    """A ball has its size at any bound."""
    centre = (0.1 * bound, -0.05 * bound, 0.2 * bound)
    shape = found(Analytic(ball(0.5 * bound, centre), bound, 40 / bound), 64)
    cell = 2 * bound / 63
    assert shape.is_watertight and in_a_ball(0.5 * bound - below(cell, 0.5 * bound)) < shape.volume
    assert shape.volume < in_a_ball(0.5 * bound * (1 + 8 * ULP))
    distances = np.linalg.norm(shape.vertices - np.array(centre), axis=1)
    assert np.abs(distances - 0.5 * bound).max() < 0.1 * cell


def test_sample_volume_refines_near_surface(monkeypatch):
    """The fine grid is evaluated only near the surface."""
    whole, parts = Analytic(bumps), Analytic(bumps)
    monkeypatch.setattr(isosurface, "MAX_DENSE_RESOLUTION", 97)
    exact = isosurface.sample_volume(whole, 97, 10.0)
    monkeypatch.setattr(isosurface, "MAX_DENSE_RESOLUTION", 40)
    monkeypatch.setattr(isosurface, "LAYER_POINTS", 16 * 10 * 97**2)  # several layers together, and a rest
    progress = []
    sparse = isosurface.sample_volume(parts, 97, 10.0, progress=progress.append)
    assert whole.asked == 97**3 and parts.asked < 0.5 * whole.asked
    difference = (sparse.values - exact.values).abs().max().item()
    assert difference < 1.0  # elsewhere it is what the coarse grid has between its points, a cell of which is 2
    one, other = isosurface.extract_surface(exact), isosurface.extract_surface(sparse)
    assert len(one.vertices) == len(other.vertices)
    exact = torch.from_numpy(one.vertices)
    check("vertices", torch.from_numpy(other.vertices), exact, exact)
    assert progress == sorted(progress) and progress[-1] == 1


def test_extract_surface_thin_plate():
    """A plate of two points is kept, though empty space has a very low log density."""

    def distance(x):
        plate = torch.maximum(x[:, 0].abs() - 0.02, x[:, 1:].abs().amax(1) - 0.6)
        return plate.clamp(min=-math.log(3) / 300)

    field = Analytic(distance, steep=300.0)
    field.finest = 32
    shape = found(field, 64)
    assert shape.is_watertight and abs(shape.extents[1] - 1.2) < 2 * 2 / 32 + 2 / 63  # a cell of the field on each side
    assert 0.03 < shape.extents[0] < 0.08


def test_smooth_volume_noise():
    """Noise finer than the field is smoothed at any resolution."""

    def roughness(finest):
        noise = torch.from_numpy(np.random.default_rng(0).standard_normal((24, 24, 24))).float()
        field = Analytic(lambda x: ball(0.6)(x) + 0.02 * noise[tuple(((x + 1) * 11.5).round().long().T)])
        field.finest = finest
        return np.linalg.norm(found(field, 60).vertices, axis=1).std()

    assert roughness(24) < 0.75 * roughness(None)


@pytest.mark.parametrize("radius", [0.3, 0.4, 0.5])
@pytest.mark.parametrize("coarse", [100, 50])
def test_sample_volume_silhouette_of_a_ball(coarse, radius, monkeypatch):
    """A surface has the rendered silhouette."""
    monkeypatch.setattr(isosurface, "MAX_DENSE_RESOLUTION", coarse)
    field = Analytic(ball(0.4), steep=10.0)
    origins, directions = rays(six_views(CameraConfig()), 128, 128)
    past = torch.linalg.cross(origins, directions).norm(dim=-1)  # distance from the ball's centre
    volume = isosurface.sample_volume(field, 100, 10.0, silhouettes=Silhouettes(origins, directions, past < radius))
    distances = np.linalg.norm(isosurface.extract_surface(volume).vertices, axis=1)
    assert np.abs(distances - radius).max() < 0.01  # half a cell; a pixel is 0.009


@pytest.mark.parametrize("everywhere", [True, False])
def test_sample_volume_useless_silhouettes(everywhere):
    """Views without a silhouette do not change the isovalue."""
    origins, directions = rays(six_views(CameraConfig()), 8, 8)
    silhouettes = Silhouettes(origins, directions, torch.full(origins.shape[:2], everywhere))
    level = isosurface.sample_volume(Analytic(ball(0.4)), 24, 7.0, silhouettes=silhouettes).isovalue
    check("level", torch.tensor(level), torch.tensor(7.0), torch.tensor(7.0, dtype=torch.float64))


def test_extract_surface_drops_cavities():
    """The walls of cavities are removed."""
    shell = Analytic(lambda x: torch.maximum(ball(0.7)(x), -ball(0.4)(x)))
    volume = isosurface.sample_volume(shell, 48, 10.0)
    raw = marching_cubes(volume.smooth.numpy(), math.log(volume.isovalue))
    assert len(np.unique(geometry_mesh.mesh_components(raw))) == 2
    shape = as_trimesh(isosurface.extract_surface(volume))
    assert shape.is_watertight and shape.euler_number == 2
    assert in_a_ball(0.7 - below(2 / 47, 0.7)) < shape.volume < in_a_ball(0.7 * (1 + 8 * ULP))


def test_extract_surface_full_box():
    """A scene that fills the box is closed at its border."""
    full = Analytic(lambda x: 0.2 * (x.norm(dim=-1) - 3))
    shape = found(full, 32)
    assert shape.is_watertight and np.abs(shape.bounds).max() < 1 + 2 / 31


@pytest.mark.parametrize("distance", [lambda x: torch.full_like(x[:, 0], math.inf), lambda x: x[:, 0] * math.nan])
def test_sample_volume_no_surface(distance):
    """A constant density is refused."""
    with pytest.raises(NoSurface, match="no surface to export"):
        found(Analytic(distance), 16)


def test_sample_volume_not_finite(monkeypatch):
    """A density that is not finite near the surface is refused."""
    monkeypatch.setattr(isosurface, "MAX_DENSE_RESOLUTION", 9)
    hole = Analytic(lambda x: torch.where((x - 0.45).abs().amax(1) < 0.1, math.nan, ball(0.6)(x)))
    with pytest.raises(NoSurface, match="not finite"):
        found(hole, 65)


# Simplification

BALL = marching_cubes(
    0.6 - np.linalg.norm(np.stack(np.meshgrid(*[np.linspace(-1, 1, 10)] * 3, indexing="ij")), axis=0), 0.0
)


def check_volume(got, exact):
    """Compares volumes, which are sums in fp64."""
    got, exact = (torch.tensor(float(one.volume), dtype=torch.float64) for one in (got, exact))
    check("volume", got, exact, exact)


def glued(pairs):
    """Two balls that share the vertices `pairs`."""
    count = len(BALL.vertices)
    faces = BALL.faces + count
    for first, second in pairs:
        faces = np.where(faces == second + count, first, faces)
    return Mesh(np.concatenate([BALL.vertices, BALL.vertices + 2]), np.concatenate([BALL.faces, faces]))


def test_split_vertices_sheets():
    """Sheets that meet are separated."""
    a, b, c = BALL.faces[7]
    for pairs in ([(a, a)], [(a, b), (b, a)], [(a, b), (b, a), (c, c)]):
        together = glued(pairs)
        apart = as_trimesh(geometry_mesh._split_vertices(geometry_mesh._drop_folded_faces(together)))
        assert geometry_mesh.is_closed(Mesh(apart.vertices, apart.faces)) and apart.is_watertight
        check_volume(apart, as_trimesh(together))
    assert not geometry_mesh.is_closed(glued([(a, b), (b, a)]))


def test_drop_folded_faces_three():
    """Of three triangles at the same place, one remains."""
    extra = np.concatenate([BALL.faces, BALL.faces[3:4], BALL.faces[3:4, ::-1]])
    mended = geometry_mesh._drop_folded_faces(Mesh(BALL.vertices, extra))
    assert geometry_mesh.is_closed(mended) and len(mended.faces) == len(BALL.faces)
    check_volume(as_trimesh(mended), as_trimesh(BALL))


@pytest.mark.parametrize("faces", [20000, 2000])
def test_simplify_rough_surface(faces):
    """A rough surface stays closed."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((96, 96, 96))).float()
    axis = torch.linspace(-1, 1, 96)
    rough = (
        0.6
        - torch.cartesian_prod(axis, axis, axis).norm(dim=1).view(96, 96, 96)
        + 0.2 * isosurface.smooth_volume(noise)
    )
    full = geometry_mesh.visible_parts(marching_cubes(rough.numpy(), 0.0))
    simpler = geometry_mesh.simplify(full, faces)
    assert len(full.faces) > 3 * faces >= 3 * len(simpler.faces) and geometry_mesh.is_closed(simpler)
    # The volume is kept as well as the library keeps it that simplifies.
    points, triangles = fast_simplification.simplify(
        full.vertices, full.faces.astype(np.int32), 1 - faces / len(full.faces)
    )
    plain = trimesh.Trimesh(points, triangles, process=False)
    volumes = (
        torch.tensor([float(one.volume)], dtype=torch.float64) for one in (as_trimesh(simpler), plain, as_trimesh(full))
    )
    check("volume", *volumes)
    merged = trimesh.Trimesh(simpler.vertices.astype(np.float32), simpler.faces, process=True)  # as its reader may
    assert merged.is_watertight


def test_simplify_without_target():
    """No target keeps all triangles."""
    assert geometry_mesh.simplify(BALL, 0) is BALL


# Textures


def rasterize_atlas(laid, resolution):
    """The triangle of an atlas at each texel."""
    uv = torch.from_numpy(laid.uv)
    clip = torch.cat([2 * uv - 1, torch.zeros(len(uv), 1), torch.ones(len(uv), 1)], dim=1)[None]
    return kernels.rasterize(clip, torch.from_numpy(laid.faces).int(), resolution, resolution)


@pytest.mark.parametrize("resolution", [16, 48])
def test_unwrap_small_image(resolution, pixels_inside):
    """Charts do not overlap, even if the image is too small for them."""
    simple = geometry_mesh.simplify(
        isosurface.extract_surface(isosurface.sample_volume(Analytic(bumps), 40, 10.0)), 3000
    )
    laid = uv_atlas.unwrap(simple, resolution)
    covered = int((rasterize_atlas(laid, 2048).triangle >= 0).sum())
    assert 0 < covered and pixels_inside(laid.uv, laid.faces, 2048) <= covered
    assert 0 <= laid.uv.min() and laid.uv.max() <= 1


def test_unwrap_xatlas_fallback(monkeypatch):
    """xatlas is used where uvunwrap panics."""
    import uvunwrap

    def fail(kind):
        def generate(*_, **__):
            raise kind("index out of bounds")

        monkeypatch.setattr(uvunwrap, "generate", generate)

    fail(type("PanicException", (BaseException,), {}))
    laid = uv_atlas.unwrap(BALL, 64)
    assert np.array_equal(laid.source[laid.faces], BALL.faces)
    fail(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        uv_atlas.unwrap(BALL, 64)


def test_bake_normals():
    """The normal map restores detail that simplification removed."""
    field, resolution = Analytic(bumps), 512
    volume = isosurface.sample_volume(field, 128, 10.0)
    mesh = geometry_mesh.simplify(isosurface.extract_surface(volume), 1500)
    laid = uv_atlas.unwrap(mesh, resolution)
    image = texture.bake(field, mesh, laid, resolution, volume).normal
    fragments = rasterize_atlas(laid, resolution)
    triangle = fragments.triangle[0].numpy()
    row, column = np.nonzero(triangle >= 0)
    faces = laid.faces[triangle[row, column]]
    weights = fragments.barycentrics[0].numpy()[row, column][:, :, None]

    def between(values):
        return (values[faces] * weights).sum(1)

    def unit(vectors):
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    # As a viewer does that computes a frame of its own from places and texture coordinates of each triangle.
    places, smooth = mesh.vertices[laid.source], unit(between(geometry_mesh.smooth_normals(mesh)[laid.source]))
    edge1, edge2 = places[faces[:, 1]] - places[faces[:, 0]], places[faces[:, 2]] - places[faces[:, 0]]
    uv = laid.uv.astype(float)
    (du1, dv1), (du2, dv2) = (uv[faces[:, 1]] - uv[faces[:, 0]]).T, (uv[faces[:, 2]] - uv[faces[:, 0]]).T
    area = du1 * dv2 - du2 * dv1
    along_u = (dv2[:, None] * edge1 - dv1[:, None] * edge2) / area[:, None]
    along_v = (du1[:, None] * edge2 - du2[:, None] * edge1) / area[:, None]
    tangent = unit(along_u - (along_u * smooth).sum(1, keepdims=True) * smooth)
    across = np.cross(smooth, tangent) * np.sign((np.cross(smooth, tangent) * along_v).sum(1, keepdims=True))
    local = image[row, column] / 255 * 2 - 1
    mapped = unit(local[:, :1] * tangent + local[:, 1:2] * across + local[:, 2:] * smooth)

    points = torch.from_numpy(between(places)).requires_grad_()
    (gradient,) = torch.autograd.grad(bumps(points).sum(), points)
    true = unit(gradient.numpy())

    def median_degrees(normals):
        return np.degrees(np.median(np.arccos((normals * true).sum(1).clip(-1, 1))))

    assert np.abs(np.linalg.norm(local, axis=1) - 1).max() < 0.02
    assert median_degrees(mapped) < 0.5 * median_degrees(smooth)


def test_bake_layer_colours():
    """A ball in blue fog: straight rays see more of the fog than slanted ones."""
    field = Analytic(lambda x: (ball(0.6)(x) * 50).clamp(min=0), steep=10.0)  # density 10 inside
    red, blue = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    field.albedo = lambda x: torch.where((x.norm(dim=-1) < 0.55)[:, None], red, blue)
    volume = isosurface.sample_volume(field, 128, 9.0)
    mesh = geometry_mesh.simplify(isosurface.extract_surface(volume), 1000)
    assert np.linalg.norm(mesh.vertices, axis=1).min() > 0.58
    laid = uv_atlas.unwrap(mesh, 64)
    outside, through = texture.bake(field, mesh, laid, 64), texture.bake(field, mesh, laid, 64, volume)
    there = (rasterize_atlas(laid, 64).triangle[0] >= 0).numpy()
    assert (outside.albedo[there] == [0, 0, 255]).all() and outside.normal is None
    points, up = (torch.from_numpy(one).float() for one in (mesh.vertices, geometry_mesh.smooth_normals(mesh)))
    depths, _ = texture._trace_layer(field, volume, points, up)
    # Light comes from behind a depth t with exp(-10 t), as far as a ray goes, and four of five rays are slanted.
    cosine = (1 + texture.SIDE_RAY_SLOPE**2) ** -0.5
    light = np.array(texture.DEPTH_QUANTILES) * -np.expm1(-10 * texture.LAYER_INSIDE)
    expected = -np.log(1 - light) / 10 * (1 + 4 * cosine) / 5
    # The density changes within a cell of the volume, and samples are taken a step apart.
    uncertain = volume.cell + (texture.LAYER_OUTSIDE + texture.LAYER_INSIDE) / texture.RAY_SAMPLES
    assert np.abs(depths.mean(0).numpy() - expected).max() < uncertain
    # exp(-0.05 * 10) = 0.61 of the light of the straight ray is red, exp(-0.86) = 0.42 of the others'; a depth that is
    # off changes them by 10 times as much at most.
    assert abs((through.albedo[there] / 255)[:, 0].mean() - 0.46) < 10 * uncertain


def test_bake_haze():
    """A red ball within a blue shell 0.05 thick, which is too thin to be surface."""
    field = Analytic(ball(0.6))
    field.density = lambda x: torch.where(x.norm(dim=-1) < 0.6, 200.0, torch.where(x.norm(dim=-1) < 0.65, 8.0, 1e-6))
    red, blue = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    field.albedo = lambda x: torch.where((x.norm(dim=-1) < 0.6)[:, None], red, blue)
    volume = isosurface.sample_volume(field, 128, 40.0)
    mesh = geometry_mesh.simplify(isosurface.extract_surface(volume), 1000)
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.6).mean() < 0.01
    laid = uv_atlas.unwrap(mesh, 64)
    there = (rasterize_atlas(laid, 64).triangle[0] >= 0).numpy()
    blue = (texture.bake(field, mesh, laid, 64, volume).albedo[there] / 255)[:, 2].mean()
    # Straight rays cross the shell: 1 - exp(-8 * 0.05) = 0.33. Slanted ones begin 1/16 before: 1 - exp(-8 / 16) = 0.39.
    # The shell ends within a cell of the volume, on both sides, and 8 of its optical depth are in a unit.
    assert abs(blue - 0.38) < 8 * 2 * volume.cell * (1 + texture.SIDE_RAY_SLOPE**2) ** 0.5
