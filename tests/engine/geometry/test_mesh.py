"""Parts, sheets and normals of a mesh, and the volume of a surface: closed forms and brute force."""

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dream_fast.bench.accuracy import check, check_fp64
from dream_fast.engine.export import isosurface
from dream_fast.engine.export.isosurface import Volume, make_volume
from dream_fast.engine.geometry import mesh as geometry_mesh
from dream_fast.engine.geometry.components import connected_components
from dream_fast.engine.geometry.mesh import Mesh, NoSurface

TETRAHEDRON = Mesh(
    np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]), np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
)


def box(side, centre=(0.0, 0.0, 0.0)):
    """A closed cube of twelve triangles that face outwards."""
    corners = np.array(list(product((-0.5, 0.5), repeat=3)))
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [triangle for a, b, c, d in quads for triangle in ((a, b, c), (a, c, d))]
    return Mesh(side * corners + np.array(centre), np.array(faces))


def turned(mesh):
    return mesh._replace(faces=mesh.faces[:, ::-1])


def together(*meshes):
    starts = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes])
    faces = [mesh.faces + start for mesh, start in zip(meshes, starts[:-1], strict=True)]
    return Mesh(np.concatenate([mesh.vertices for mesh in meshes]), np.concatenate(faces))


def same(one, other):
    return np.array_equal(one.vertices, other.vertices) and np.array_equal(one.faces, other.faces)


# Parts


def test_connected_components_lowest_name():
    """Random pairs are compared with their transitive closure."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        ends = random.integers(0, 30, (2, int(random.integers(0, 30))))
        linked = np.eye(30, dtype=bool)
        linked[ends[0], ends[1]] = linked[ends[1], ends[0]] = True
        for _ in range(5):
            linked = linked @ linked
        assert np.array_equal(connected_components(30, [torch.from_numpy(ends)]).numpy(), linked.argmax(axis=1))
        batches = torch.from_numpy(ends).split(3, dim=1)
        assert np.array_equal(connected_components(30, batches).numpy(), linked.argmax(axis=1))


def test_mesh_components_by_edges():
    """Triangles that share a vertex are one component; a vertex without triangles is its own."""
    mesh = Mesh(np.zeros((9, 3)), np.array([[8, 1, 7], [7, 2, 3], [4, 6, 5]]))
    assert geometry_mesh.mesh_components(mesh).tolist() == [0, 1, 1, 1, 4, 4, 4, 1, 1]


@pytest.mark.parametrize(
    ("side", "place", "stays"), [(0.15, 3, True), (0.14, 3, False), (0.05, 0.53, True), (0.04, 0.53, False)]
)
def test_visible_parts_drops_by_area(side, place, stays):
    """Beside a box of side 1 a part needs 2 % of its area; at its corner 0.2 % are enough."""
    large, small = box(1), box(side, (place, place, place))
    assert same(geometry_mesh.visible_parts(together(small, large)), together(small, large) if stays else large)


def test_visible_parts_joins_near_components():
    """Two boxes of 1.2 % of the area each stay if they touch, and are removed if they are apart."""
    large, first = box(1), box(0.11, (3, 0, 0))
    for y, stays in ((0.12, True), (1.0, False)):
        mesh = together(large, first, box(0.11, (3, y, 0)))
        assert same(geometry_mesh.visible_parts(mesh), mesh if stays else large)


def test_visible_parts_drops_cavities():
    """A component that faces its own inside is removed, wherever the origin is; alone it stays."""
    shell = together(box(1, (5, 5, 5)), turned(box(0.5, (5, 5, 5))))
    assert same(geometry_mesh.visible_parts(shell), box(1, (5, 5, 5)))
    alone = turned(box(1))
    assert same(geometry_mesh.visible_parts(alone), alone)
    nothing = Mesh(np.zeros((0, 3)), np.zeros((0, 3), dtype=int))
    assert geometry_mesh.visible_parts(nothing) is nothing


def test_join_near_components_distance():
    """Points farther apart than the diagonal of a cell are not joined, nor are they by removed components."""
    random = np.random.default_rng(0)
    for _ in range(200):
        way = random.standard_normal(3)
        way /= np.linalg.norm(way)
        place = random.uniform(0.2, 2.8, 3)
        corners = np.array([[0.0, 0, 0], [3, 3, 3]])
        for distance, joined in ((0.99 * 0.02 * 3, True), (1.01 * math.sqrt(3) * 0.04 * 3, False)):
            points = np.concatenate([[place, place + distance * way], corners]) - 1.5
            part = geometry_mesh._join_near_components(points, np.arange(4), np.ones(4, dtype=bool))
            assert part.tolist() == ([0, 0, 2, 3] if joined else [0, 1, 2, 3])
        dropped = geometry_mesh._join_near_components(
            points[[0, 0, 2, 3]], np.arange(4), np.array([True, False, True, True])
        )
        assert dropped.tolist() == [0, 1, 2, 3]


# Sheets


def test_is_closed():
    """A hole, a flipped triangle, a doubled surface and a flap are not closed."""
    mesh = TETRAHEDRON
    assert geometry_mesh.is_closed(mesh) and geometry_mesh.is_closed(together(mesh, box(1)))
    assert not geometry_mesh.is_closed(mesh._replace(faces=mesh.faces[1:]))
    assert not geometry_mesh.is_closed(mesh._replace(faces=np.concatenate([mesh.faces[:1, ::-1], mesh.faces[1:]])))
    assert not geometry_mesh.is_closed(mesh._replace(faces=np.concatenate([mesh.faces, mesh.faces])))
    assert not geometry_mesh.is_closed(mesh._replace(faces=np.concatenate([mesh.faces, mesh.faces[:, ::-1]])))


@pytest.mark.parametrize("roll", [0, 1, 2])
def test_drop_folded_faces(roll):
    """Two triangles on each other cancel whatever their first corner; the rest keeps its orientation."""
    flap = np.array([[4, 5, 6], np.roll([6, 5, 4], roll)])
    mesh = Mesh(np.concatenate([TETRAHEDRON.vertices, np.ones((3, 3))]), np.concatenate([TETRAHEDRON.faces, flap]))
    left = geometry_mesh._drop_folded_faces(mesh)
    assert np.array_equal(left.vertices, TETRAHEDRON.vertices) and geometry_mesh.is_closed(left)
    assert sorted(np.roll(face, -face.argmin()).tolist() for face in left.faces) == sorted(
        np.roll(face, -face.argmin()).tolist() for face in TETRAHEDRON.faces
    )


def test_drop_folded_faces_of_three():
    """Two copies of a triangle stay."""
    faces = np.array([[0, 1, 2], [1, 2, 0], [3, 2, 1]])
    left = geometry_mesh._drop_folded_faces(Mesh(TETRAHEDRON.vertices, faces))
    assert sorted(np.roll(face, -face.argmin()).tolist() for face in left.faces) == [[0, 1, 2], [0, 1, 2], [1, 3, 2]]


def test_split_vertices_open_mesh():
    """A mesh whose edges do not pair up is returned unchanged."""
    mesh = TETRAHEDRON._replace(faces=TETRAHEDRON.faces[1:])
    assert geometry_mesh._split_vertices(mesh) is mesh


def test_split_vertices_shared_vertex():
    """Two tetrahedra with a common corner get eight vertices at the same positions."""
    other = np.where(TETRAHEDRON.faces == 0, 0, TETRAHEDRON.faces + 3)
    vertices = np.concatenate([TETRAHEDRON.vertices, -TETRAHEDRON.vertices[1:, ::-1]])
    mesh = Mesh(vertices, np.concatenate([TETRAHEDRON.faces, other]))
    apart = geometry_mesh._split_vertices(mesh)
    assert len(apart.vertices) == 8 and geometry_mesh.is_closed(apart)
    assert np.array_equal(apart.vertices[apart.faces], mesh.vertices[mesh.faces])
    assert len(np.unique(geometry_mesh.mesh_components(apart))) == 2


def test_offset_copies():
    """Copies move by a hundredth of the mean first edge against the normal; all others stay."""
    mesh = together(TETRAHEDRON, box(2, (-1, -1, -1)))
    moved = geometry_mesh._offset_copies(mesh).vertices - mesh.vertices
    a, b = mesh.vertices[mesh.faces[:, 0]], mesh.vertices[mesh.faces[:, 1]]
    step = 0.01 * np.linalg.norm(b - a, axis=1).mean()
    shared = (mesh.vertices == 0).all(axis=1)
    assert shared.sum() == 2 and not moved[~shared].any()
    exact = -step * geometry_mesh.smooth_normals(mesh)[shared]
    check_fp64("moved", torch.from_numpy(moved[shared]), torch.from_numpy(exact))


def test_smooth_normals_weighted_by_area():
    """A corner of faces with areas 1, 2 and 3 has the normal (1, 2, 3) / sqrt(14); one without area has zero."""
    vertices = np.array([[0.0, 0, 0], [3, 0, 0], [0, 1.5, 0], [0, 0, 1], [9, 9, 9]])
    faces = np.array([[0, 2, 3], [0, 3, 1], [0, 1, 2], [4, 4, 4]])
    areas = np.array([1.5, 3, 4.5])
    normals = torch.from_numpy(geometry_mesh.smooth_normals(Mesh(vertices, faces)))
    exact = torch.from_numpy(areas / np.linalg.norm(areas))
    check_fp64("corner", normals[0], exact)
    check_fp64(
        "others",
        normals[1:],
        torch.tensor([[0, 3, 4.5], [1.5, 0, 4.5], [1.5, 3, 0], [0, 0, 0]]).double()
        / torch.tensor([math.hypot(3, 4.5), math.hypot(1.5, 4.5), math.hypot(1.5, 3), 1]).double()[:, None],
    )


# Simplification


@pytest.fixture
def simplified(monkeypatch):
    """The targets passed to the library, and the meshes that it returns, in order."""
    targets, gives = [], []

    def simplify(points, triangles, *, target_count):
        assert (points.dtype, triangles.dtype) == (np.float32, np.int32)
        targets.append(target_count)
        return gives[min(len(targets), len(gives)) - 1]

    monkeypatch.setattr(geometry_mesh.fast_simplification, "simplify", simplify)
    return SimpleNamespace(targets=targets, gives=gives)


def test_simplify_first_closed(simplified):
    """After an open mesh the target is a little lower."""
    single = TETRAHEDRON.vertices.astype(np.float32)
    simplified.gives += [(single, TETRAHEDRON.faces[1:]), (single, TETRAHEDRON.faces.astype(np.int32))]
    simpler = geometry_mesh.simplify(together(*[box(1, (2 * k, 0, 0)) for k in range(20)]), 200)
    assert simplified.targets == [200, 198] and geometry_mesh.is_closed(simpler) and len(simpler.faces) == 4
    assert (simpler.vertices.dtype, simpler.faces.dtype) == (np.float64, np.int64)


def test_simplify_none_closed(simplified):
    """After six targets the first mesh is returned; one without triangles is no surface."""
    mesh = together(*[box(1, (2 * k, 0, 0)) for k in range(20)])
    simplified.gives += [(TETRAHEDRON.vertices, TETRAHEDRON.faces[:3]), (TETRAHEDRON.vertices, TETRAHEDRON.faces[:2])]
    assert len(geometry_mesh.simplify(mesh, 100).faces) == 3
    assert simplified.targets == [100, 99, 98, 96, 93, 90]
    simplified.gives[:] = [(np.zeros((0, 3)), np.zeros((0, 3), dtype=int))]
    assert geometry_mesh.simplify(mesh, 100) is mesh


def test_simplify_small_mesh(simplified):
    """A mesh within the target is unchanged; the target is at least four."""
    mesh = box(1)
    assert (
        geometry_mesh.simplify(mesh, 12) is mesh
        and geometry_mesh.simplify(mesh, 0) is mesh
        and simplified.targets == []
    )
    simplified.gives.append(TETRAHEDRON)
    geometry_mesh.simplify(mesh, 1)
    geometry_mesh.simplify(mesh, 11)
    assert simplified.targets == [4, 11]


# Volume


class Linear:
    """A field of density 1000 + x + 10 y + 100 z that records its points."""

    device, finest, bound = torch.device("cpu"), None, 0.5

    def __init__(self):
        self.asked = []

    def density(self, points):
        self.asked.append(points)
        x, y, z = points.unbind(-1)
        return 1000 + x + 10 * y + 100 * z


def test_sample_density(monkeypatch):
    """Densities are ordered by x, y, z and evaluated in layers, with progress."""
    progress, field = [], Linear()
    monkeypatch.setattr(isosurface, "LAYER_POINTS", 16 * (2 * 25 + 3))
    volume = isosurface.sample_density(field, 5, progress=progress.append)
    assert [len(points) for points in field.asked] == [50, 50, 25] and progress == [2 / 5, 4 / 5, 1.0]
    axis = torch.linspace(-0.5, 0.5, 5)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    assert torch.equal(volume, field.density(points.view(-1, 3)).view(5, 5, 5))
    monkeypatch.setattr(isosurface, "LAYER_POINTS", 1)
    assert torch.equal(isosurface.sample_density(field, 5), volume) and len(field.asked[-1]) == 25


@pytest.mark.parametrize(
    ("values", "threshold", "level"),
    [
        ([1.0, 2, 6], 2.5, 2.5),
        ([1.0, 2, 6], 9.0, 3.0),
        ([4.0, 9, 9], 2.0, 6.0),
        ([4.0, 9, 9], 4.0, 6.0),
    ],
)
def test_choose_isovalue(values, threshold, level):
    """It is the threshold, the mean below it, or the geometric mean where all values are above."""
    assert isosurface.choose_isovalue(torch.tensor(values), threshold) == level


@pytest.mark.parametrize(("values", "word"), [([1, math.nan], "finite"), ([1, math.inf], "finite"), ([2, 2], "same")])
def test_choose_isovalue_no_surface(values, word):
    """Densities that are not finite, or constant, are refused."""
    with pytest.raises(NoSurface, match=f"the field's density is .*{word}.* so it has no surface to export"):
        isosurface.choose_isovalue(torch.tensor(values, dtype=torch.float32), 1.0)


def smoothed_by_hand(values, passes):
    """A quarter, half and quarter along each axis, with the border repeated; then Tukey's twicing."""

    def averaged(grid):
        for _, axis in product(range(passes), range(3)):
            wide = np.pad(grid, [(int(k == axis),) * 2 for k in range(3)], mode="edge")
            grid = (
                0.25 * wide.take(range(0, grid.shape[axis]), axis)
                + 0.5 * grid
                + 0.25 * wide.take(range(2, grid.shape[axis] + 2), axis)
            )
        return grid

    once = averaged(values)
    return once + averaged(values - once)


@pytest.mark.parametrize("passes", [1, 3])
def test_smooth_volume(passes):
    """The result equals written-out sums, on a grid with three different sides."""
    values = np.random.default_rng(0).standard_normal((3, 4, 6))
    exact = torch.from_numpy(smoothed_by_hand(values, passes))
    check_fp64("smoothed", isosurface.smooth_volume(torch.from_numpy(values.copy()), passes), exact)
    if passes == 1:
        check_fp64("default", isosurface.smooth_volume(torch.from_numpy(values.copy())), exact)


@pytest.mark.parametrize(("finest", "passes"), [(None, 1), (8, 6), (6, 8), (14, 2), (100, 1)])
def test_make_volume_passes(finest, passes, monkeypatch):
    """There are 1.5 times the squared cells of a detail passes, 1 to 8; only values near the isovalue count."""
    calls = []
    monkeypatch.setattr(
        isosurface, "smooth_volume", lambda values, passes: (calls.append((values, passes)), values + 1)[1]
    )
    values = torch.linspace(-20, 20, 17).repeat(17, 17, 1)
    volume = make_volume(values, 2.0, SimpleNamespace(finest=finest, bound=0.75))
    (near, count), *more = calls
    assert count == passes and not more
    assert torch.equal(near, values.clamp(math.log(2.0) - 3, math.log(2.0) + 3))
    assert torch.equal(volume.values, values) and torch.equal(volume.smooth, near + 1)
    assert (volume.isovalue, volume.bound, volume.cell) == (2.0, 0.75, 1.5 / 16)


@pytest.mark.parametrize(
    ("isovalue", "turns", "level"),
    [
        ([None], 1, 1.0),
        ([0.25], 1, math.exp(0.25)),
        ([1.0, 1.25], 2, math.exp(1.25)),
        ([-1.0, -2.0, -2.25], 3, math.exp(-2.25)),
        ([1.0, None], 2, math.exp(1.0)),
        ([1.0, 2, 3, 4, 5, 6, 7], 6, math.exp(6)),
    ],
)
def test_make_volume_isovalue_search(isovalue, turns, level, monkeypatch):
    """Each round begins at the previous isovalue, until it moves by less than 0.3, at most six times."""
    calls, silhouettes = [], object()

    def silhouette_isovalue(values, bound, of):
        assert (bound, of) == (0.75, silhouettes)
        calls.append((values.min().item(), values.max().item()))
        return isovalue[len(calls) - 1]

    monkeypatch.setattr(isosurface, "silhouette_isovalue", silhouette_isovalue)
    monkeypatch.setattr(isosurface, "smooth_volume", lambda values, passes: values)
    volume = make_volume(
        torch.linspace(-20, 20, 8).view(2, 2, 2), 1.0, SimpleNamespace(finest=2, bound=0.75), silhouettes
    )
    assert len(calls) == turns and volume.isovalue == level
    befores = [math.log(math.exp(before)) for before in (0.0, *isovalue[: turns - 1])]
    assert calls == [tuple(torch.tensor([before - 3, before + 3]).tolist()) for before in befores]


def test_surface_cells():
    """Cells with corners above and at or below the isovalue, and their 26 neighbours, are found."""
    values = torch.zeros(7, 7, 7)
    values[1, 5, 2] = 1.0
    near = torch.zeros(6, 6, 6, dtype=torch.bool)
    near[0:3, 3:6, 0:4] = True
    assert torch.equal(isosurface._surface_cells(values, 0.5), near)
    assert torch.equal(isosurface._surface_cells(values, 0.0), near)
    assert torch.equal(isosurface._surface_cells(-values, -1.0), near)
    assert not isosurface._surface_cells(values, 1.0).any() and not isosurface._surface_cells(values, -0.5).any()


def test_log_density_minimum():
    """The minimum is a millionth of the isovalue."""
    density = torch.tensor([0.0, 1e-9, 2.0])
    reference = torch.tensor([3e-6, 3e-6, 2.0])
    check("logarithm", isosurface._log_density(density, 3.0), reference.log(), reference.double().log())


class Ball:
    """A field with the density exp(8 (0.5 - |x|)) that counts its points."""

    device, finest, bound = torch.device("cpu"), None, 1.0

    def __init__(self):
        self.asked = 0

    def density(self, points):
        self.asked += len(points)
        return (8 * (0.5 - points.norm(dim=-1))).exp()


@pytest.mark.parametrize("layer_points", [16 * 21 * 21 * 4, 1])
def test_sample_volume_fine_grid(layer_points, monkeypatch):
    """Cells near the isovalue have the values of the field, others the trilinear ones of the coarse grid."""
    monkeypatch.setattr(isosurface, "MAX_DENSE_RESOLUTION", 9)
    monkeypatch.setattr(isosurface, "LAYER_POINTS", layer_points)
    field, progress = Ball(), []
    volume = isosurface.sample_volume(field, 21, 1.0, progress=progress.append)
    whole = isosurface.sample_density(Ball(), 21).log()
    coarse = isosurface.sample_density(Ball(), 9)
    level = isosurface.choose_isovalue(coarse, 1.0)
    near = isosurface._surface_cells(coarse.log(), math.log(level))
    place = torch.linspace(0, 8, 21, dtype=torch.float64).long().clamp(max=7)
    exact = near[place][:, place][:, :, place]
    between = F.interpolate(coarse.log()[None, None], (21, 21, 21), mode="trilinear", align_corners=True)[0, 0]
    precise = F.interpolate(coarse.double().log()[None, None], (21,) * 3, mode="trilinear", align_corners=True)[0, 0]
    assert field.asked == 9**3 + exact.sum() and not exact.all()
    check("near", volume.values[exact], whole[exact], whole[exact].double())
    check("between", volume.values[~exact], between[~exact], precise[~exact])
    assert volume.isovalue == level and progress == sorted(progress) and progress[-1] == 1.0
    assert 0.5 in progress and len(progress) >= 4


def test_sample_volume_small_grid(monkeypatch):
    """Up to MAX_DENSE_RESOLUTION every point is evaluated once; half of the progress is reported."""
    monkeypatch.setattr(isosurface, "MAX_DENSE_RESOLUTION", 9)
    field, progress = Ball(), []
    volume = isosurface.sample_volume(field, 9, 1.0, progress=progress.append)
    assert field.asked == 9**3 and progress[-1] == 0.5
    assert torch.equal(volume.values, isosurface._log_density(isosurface.sample_density(Ball(), 9), volume.isovalue))


@pytest.mark.parametrize(("resolution", "points"), [(9, [9]), (21, [9, 21])])
def test_sample_volume_silhouettes(resolution, points, monkeypatch):
    """They determine the isovalue of a whole grid, and of a coarse one before the fine one."""
    calls, silhouettes = [], object()

    def silhouette_isovalue(values, bound, of):
        calls.append((len(values), of))
        return 0.0

    monkeypatch.setattr(isosurface, "MAX_DENSE_RESOLUTION", 9)
    monkeypatch.setattr(isosurface, "silhouette_isovalue", silhouette_isovalue)
    volume = isosurface.sample_volume(Ball(), resolution, 1.0, silhouettes=silhouettes)
    assert volume.isovalue == 1.0 and list(dict.fromkeys(calls)) == [(count, silhouettes) for count in points]


def test_extract_surface_world_units():
    """A single point above the isovalue gives an octahedron at its position in the cube [-bound, bound]^3."""
    shape = torch.full((5, 5, 5), -1.0)
    shape[1, 2, 4] = 1.0
    mesh = isosurface.extract_surface(Volume(shape, shape, 1.0, 4.0))
    assert len(mesh.faces) == 8
    check_fp64("middle", torch.from_numpy(mesh.vertices).mean(0), torch.tensor([-2.0, 0.0, 4.0]).double())
    lengths = torch.from_numpy(np.linalg.norm(mesh.vertices - np.array([-2.0, 0, 4]), axis=1))
    check_fp64("lengths", lengths, torch.ones(6).double())
