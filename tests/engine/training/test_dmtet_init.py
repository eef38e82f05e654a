"""The grid of a mesh refinement: state, position and initial distances, in closed forms."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trimesh
from torch import Tensor

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.geometry.mesh import TensorMesh
from dream_fast.engine.geometry.tet_grid import tet_grid
from dream_fast.engine.scene.tet_mesh import TetMesh
from dream_fast.engine.training import dmtet_init
from dream_fast.engine.training.dmtet_init import (
    InitSource,
    field_settings,
    find_init_source,
    load_start,
    normalized,
    read_surface,
    start_from_field,
    start_from_mesh,
)

ULP = torch.finfo(torch.float32).eps  # relative distance of neighbours in fp32

BOX = trimesh.creation.box((1, 2, 3))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# The grid


@pytest.mark.parametrize("locked", [False, True])
def test_shape_starts_as_ball(locked: bool) -> None:
    """The ball is half as large as the cube, with ten times its distance; it is optimised unless locked."""
    shape, grid = TetMesh(8, 2.0, locked=locked), tet_grid(8)
    expected = [
        (10 * (1 - 2 * grid.vertices.to(dtype).norm(dim=1))).clamp(-1, 1) for dtype in (torch.float32, torch.float64)
    ]
    check("distance", shape.sdf.detach(), *expected)
    assert all(torch.equal(getattr(shape, name), getattr(grid, name)) for name in ("vertices", "tets", "border"))
    assert shape.center.tolist() == [0, 0, 0] and shape.half_extent.tolist() == [2, 2, 2]
    assert shape.deformation.shape == grid.vertices.shape and not shape.deformation.any()
    assert (shape.size, shape.bound, shape.locked) == (8, 2.0, locked)
    assert all(parameter.requires_grad is not locked for parameter in shape.parameters())
    assert {name for name, _ in shape.named_parameters()} == {"sdf", "deformation"}
    assert not TetMesh(8, 2.0).locked


def test_positions_move_below_half_a_layer() -> None:
    """center + half_extent (vertex + tanh(deformation) / N), along each axis by its own extent."""
    shape = TetMesh(8, 1.0)
    middle, reach = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.25, 0.5, 1.0])
    shape.initialize(middle, reach, shape.sdf.detach())
    with torch.no_grad():
        shape.deformation.copy_(3 * torch.randn(shape.deformation.shape, generator=generator()))
    expected = [
        middle.to(dtype)
        + reach.to(dtype) * (shape.vertices.to(dtype) + torch.tanh(shape.deformation.detach().to(dtype)) / 8)
        for dtype in (torch.float32, torch.float64)
    ]
    check("positions", shape.positions().detach(), *expected)


@pytest.mark.parametrize(("border", "counted"), [(1.0, -0.01), (-0.005, -0.01), (-0.5, -0.5)])
def test_border_sdf_negative(border: float, counted: float) -> None:
    """It is at most -0.01, so the surface closes inside of the border."""
    shape = TetMesh(8, 1.0)
    with torch.no_grad():
        shape.sdf.copy_(torch.where(shape.border, torch.tensor(border), torch.tensor(1.0)))
    surface = shape.surface()
    ends = torch.cat([shape.tets[:, [a, b]] for a in range(4) for b in range(a)])
    ends = ends[shape.border[ends[:, 0]] != shape.border[ends[:, 1]]]
    ends = torch.where(shape.border[ends[:, :1]], ends, ends.flip(1)).unique(dim=0)  # from the border inwards
    start, end = shape.vertices[ends].double().unbind(1)
    places = start + counted / (counted - 1) * (end - start)
    assert len(places) == len(surface.vertices)
    nearest = torch.cdist(surface.vertices.detach().double(), places).min(1)
    assert nearest.indices.unique().numel() == len(places)
    exact = places[nearest.indices]
    start, end = start.float()[nearest.indices], end.float()[nearest.indices]
    inside, low = torch.tensor(1.0), torch.tensor(counted)
    check("vertices", surface.vertices.detach(), end + inside / (inside - low) * (start - end), exact)


def test_initialize_replaces_state() -> None:
    """Distances are clamped and deformations zero; the parameters are the same objects."""
    shape = TetMesh(4, 1.0)
    with torch.no_grad():
        shape.deformation.fill_(0.5)
    distance = torch.linspace(-3, 3, len(shape.vertices))
    learned = shape.sdf
    shape.initialize(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]), distance)
    assert shape.sdf is learned and torch.equal(learned.detach(), distance.clamp(-1, 1))
    assert (
        not shape.deformation.any() and shape.center.tolist() == [1, 2, 3] and shape.half_extent.tolist() == [4, 5, 6]
    )


@pytest.mark.parametrize(
    ("locked", "names"), [(False, ["center", "half_extent"]), (True, ["center", "deformation", "half_extent", "sdf"])]
)
def test_state_round_trip(locked: bool, names: list[str]) -> None:
    """State that is not optimised is in the checkpoint; other names and shapes are refused."""
    shape, other = TetMesh(4, 1.0, locked=locked), TetMesh(4, 1.0, locked=locked)
    shape.initialize(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]), shape.sdf / 2)
    state = shape.checkpoint_state()
    assert sorted(state) == names
    other.load_checkpoint_state(state)
    assert all(torch.equal(value, other.checkpoint_state()[name]) for name, value in state.items())
    with pytest.raises(ValueError) as caught:
        other.load_checkpoint_state({"center": shape.center})
    assert str(caught.value) == f"the grid's state holds ['center'], expected {names}"
    with pytest.raises(ValueError, match=r"^half_extent has shape \(4,\), expected \(3,\)$"):
        other.load_checkpoint_state(state | {"half_extent": torch.zeros(4)})


def test_state_of_version_0_2_0():
    """Version 0.2.0 has other names for the same tensors."""
    shape, other = TetMesh(4, 1.0, locked=True), TetMesh(4, 1.0, locked=True)
    shape.initialize(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]), shape.sdf / 2)
    with torch.no_grad():
        shape.deformation.fill_(0.25)
    old = {"middle": shape.center, "reach": shape.half_extent, "distance": shape.sdf, "shift": shape.deformation}
    other.load_checkpoint_state(old)
    assert all(torch.equal(value, other.checkpoint_state()[name]) for name, value in shape.checkpoint_state().items())


# What a run starts from


def touched(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")


def test_find_init_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the latest checkpoint of a workspace or folder, a checkpoint, a mesh file, and ~."""
    touched(tmp_path / "run" / "checkpoints", "step_000002.safetensors", "step_000010.safetensors")
    touched(tmp_path / "run", "step_000099.safetensors", "shape.GLB", "shape.obj", "other.SAFETENSORS")
    touched(tmp_path / "flat", "step_000001.safetensors", "step_000003.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name, path, checkpoint in (
        ("run", "run/checkpoints/step_000010.safetensors", True),
        ("flat", "flat/step_000003.safetensors", True),
        ("flat/step_000001.safetensors", "flat/step_000001.safetensors", True),
        ("run/other.SAFETENSORS", "run/other.SAFETENSORS", True),
        ("run/shape.GLB", "run/shape.GLB", False),
        ("run/shape.obj", "run/shape.obj", False),
    ):
        assert (
            find_init_source(str(tmp_path / name))
            == find_init_source(f"~/{name}")
            == InitSource(tmp_path / path, checkpoint)
        )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("folder", ": the folder holds no checkpoint of a run"),
        ("gone.glb", ": there is no such file"),
        ("old.pth", ": checkpoints of other programs cannot be read; name a run of dream-fast or a mesh file"),
        ("old.PT", ": checkpoints of other programs cannot be read; name a run of dream-fast or a mesh file"),
        ("old.ckpt", ": checkpoints of other programs cannot be read; name a run of dream-fast or a mesh file"),
        (
            "note.txt",
            " is neither a checkpoint (.safetensors, or the folder of a run) nor a mesh file "
            "(.glb, .gltf, .obj, .off, .ply, .stl)",
        ),
    ],
)
def test_find_init_source_raises(tmp_path: Path, name: str, sentence: str) -> None:
    """The message has the flag, the path and the alternatives."""
    touched(tmp_path, "note.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        find_init_source(str(tmp_path / name))
    assert str(caught.value) == f"--init_with {tmp_path / name}{sentence}"


def test_field_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the field, the bound and the occupancy grid; none for a mesh file, and not of a refinement."""
    architecture: dict[str, Any] = {
        "n_levels": 3,
        "bound": 0.6,
        "occupancy_resolution": 16,
        "backbone": "grid",
        "seed": 4,
    }
    calls = []
    monkeypatch.setattr(dmtet_init, "read_architecture", lambda path: calls.append(path) or architecture)
    start = InitSource(Path("step.safetensors"), True)
    assert field_settings(start) == {name: architecture[name] for name in architecture if name != "seed"}
    assert calls == [start.path]
    assert field_settings(InitSource(Path("shape.glb"), False)) == {} and len(calls) == 1
    architecture["tet_grid_size"] = 32
    with pytest.raises(UserError, match="^--init_with step.safetensors is already a mesh refinement: "):
        field_settings(start)


@pytest.mark.parametrize(("bound", "camera"), [(0.5, {}), (5.0, {"default_radius": 2.0, "default_fovy": 53.130102354})])
def test_normalized_mesh_size(bound: float, camera: dict[str, float]) -> None:
    """The mesh has 0.8 of the cube, or of the camera's view; only used vertices count."""
    corners = torch.tensor([[1.0, 2, 3], [5, 2, 3], [1, 4, 3], [1, 2, 4], [100, 100, 100]])
    mesh = TensorMesh(corners, torch.tensor([[0, 1, 2], [0, 3, 1]]))
    half = 0.8 * min(bound, 1.0)
    got = normalized(mesh, bound, CameraConfig(**{"default_radius": 4.0, "default_fovy": 90.0} | camera))
    exact = (corners.double() - torch.tensor([3, 3, 3.5])) * half / 2
    check("vertices", got.vertices, (corners - torch.tensor([3, 3, 3.5])) * half / 2, exact)
    assert got.faces is mesh.faces


@pytest.mark.parametrize("place", [0.0, float("nan")])
def test_mesh_without_extent_raises(place: float) -> None:
    """A mesh that is one point cannot be scaled."""
    mesh = TensorMesh(torch.full((3, 3), place), torch.tensor([[0, 1, 2]]))
    with pytest.raises(UserError, match="the mesh of --init_with has no extent"):
        normalized(mesh, 1.0, CameraConfig())


def test_mesh_file_fp32(tmp_path: Path) -> None:
    """Positions are fp32 and corners int64."""
    BOX.export(tmp_path / "box.obj")
    mesh = read_surface(tmp_path / "box.obj")
    assert mesh.vertices.dtype == torch.float32 and mesh.faces.dtype == torch.int64
    assert mesh.vertices.abs().amax(0).tolist() == [0.5, 1.0, 1.5] and mesh.faces.shape == (12, 3)


def ball(points: Tensor, radius: float) -> Tensor:
    return radius - points.norm(dim=-1)


def test_mesh_grid_extent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid has a margin of a tenth of the bound, within the cube; distances at its vertices are scaled by ten
    and
    clamped.
    """
    calls = []

    def distance(mesh: TensorMesh, first: Tensor, step: Tensor, shape: tuple, reach: float, **_: object) -> Tensor:
        calls.append((mesh, reach))
        points = first + step * torch.cartesian_prod(*map(torch.arange, shape)).view(*shape, 3)
        return ball(points, 0.4).clamp(-reach, reach)

    monkeypatch.setattr(dmtet_init, "signed_distance", distance)
    corners = torch.tensor([[0.25, -0.75, 0.5], [-0.5, 0.5, 0.0], [0.0, 0.25, 1.875], [9, 9, 9]])
    mesh = TensorMesh(corners, torch.tensor([[0, 1, 2]]))
    for size in (8, 64):
        shape = TetMesh(size, 2.0)
        with torch.no_grad():
            shape.deformation.fill_(1.0)
        calls.clear()
        start_from_mesh(shape, mesh)
        check("half", shape.half_extent, torch.tensor([0.7, 0.95, 2.0]), torch.tensor([0.7, 0.95, 2.0]).double())
        assert not shape.center.any() and not shape.deformation.any()
        # Three of the layers of the longest side, 2 / (size / 2), or the distance in the scene that counts as 1.
        reach = 0.1
        assert [given for _, given in calls] == [reach] * 2
        assert all(torch.equal(used.vertices, corners) and used.faces is mesh.faces for used, _ in calls)
        far, exact = (
            torch.where(near.abs() >= reach, near.sign(), 10 * near)
            for near in (ball(shape.positions().detach().to(dtype), 0.4) for dtype in (torch.float32, torch.float64))
        )
        check("distance", shape.sdf.detach(), far, exact)


def test_mesh_distance_within_three_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Farther away only the sign is right."""
    calls = []

    def distance(mesh: TensorMesh, first: Tensor, step: Tensor, shape: tuple, reach: float, **_: object) -> Tensor:
        calls.append((float(step.max()), shape, reach))
        return torch.ones(shape)

    monkeypatch.setattr(dmtet_init, "signed_distance", distance)
    mesh = TensorMesh(torch.tensor([[0.125, 0.25, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.1]]), torch.tensor([[0, 1, 2]]))
    shape = TetMesh(32, 0.25)
    start_from_mesh(shape, mesh)
    step = 2 * 0.25 / 16  # the longest side is cut off by the cube
    assert calls == [(step, (17, 17, 17), 3 * step), (step, (16, 16, 16), 3 * step)]
    assert (shape.sdf == 1).all()


@pytest.mark.parametrize("value", [0.0, -0.05])
def test_open_mesh_raises(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh that encloses no vertex is refused, and the shape is unchanged."""
    monkeypatch.setattr(
        dmtet_init, "signed_distance", lambda mesh, first, step, shape, reach, **_: torch.full(shape, value)
    )
    shape = TetMesh(8, 1.0)
    before = shape.sdf.detach().clone()
    with pytest.raises(UserError, match="^the mesh of --init_with encloses no space that --tet_grid_size resolves"):
        start_from_mesh(shape, TensorMesh(torch.eye(3), torch.tensor([[0, 1, 2]])))
    assert torch.equal(shape.sdf, before)


def test_many_large_triangles_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any distance is computed; a mesh within the limit is started from, with its progress up to the end."""
    corners = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    mesh = TensorMesh(corners / corners.norm(dim=1, keepdim=True), torch.arange(3000).view(1000, 3))
    monkeypatch.setattr(dmtet_init, "MAX_PAIRS", 1_000_000)
    with pytest.raises(UserError, match="simplify the mesh, or reduce --tet_grid_size"):
        start_from_mesh(TetMesh(64, 1.0), mesh, progress=lambda part: pytest.fail("begun"))
    parts: list[float] = []
    start_from_mesh(TetMesh(8, 1.0), mesh, progress=parts.append)
    assert parts == sorted(parts) and parts[-1] == 1.0


def test_load_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh file initialises the shape; a checkpoint is returned; without either the shape is a ball."""
    BOX.export(tmp_path / "box.obj")
    shape, before = TetMesh(16, 0.6), TetMesh(16, 0.6).sdf.detach()
    config = reference().override({"dmtet": True, "text": "a box"})
    assert load_start(config, shape) is None and torch.equal(shape.sdf, before)
    named = config.override({"init_with": str(tmp_path / "box.obj")})
    assert load_start(named, shape) == InitSource(tmp_path / "box.obj", False)
    expected = TetMesh(16, 0.6)
    start_from_mesh(expected, normalized(read_surface(tmp_path / "box.obj"), 0.6, named.camera))
    assert torch.equal(shape.sdf, expected.sdf) and torch.equal(shape.half_extent, expected.half_extent)
    touched(tmp_path, "step_000001.safetensors")
    calls = []
    monkeypatch.setattr(dmtet_init, "field_settings", calls.append)
    start = InitSource(tmp_path / "step_000001.safetensors", True)
    assert load_start(config.override({"init_with": str(start.path)}), shape) == start and calls == [start]
    assert torch.equal(shape.sdf, expected.sdf)


# From a field


class Boxes:
    """A density that rises exponentially, by `steepness`, with the depth inside of boxes: middles and halves of sides.

    At a density of 1 is the surface of the boxes, and depth is taken along the axes, so that it is flat.
    """

    device, bound = torch.device("cpu"), 1.0

    def __init__(self, steepness: float, *boxes: tuple[tuple[float, float, float], tuple[float, float, float]]):
        self.steepness, self.boxes = steepness, boxes

    def depth(self, points: Tensor) -> Tensor:
        each = [torch.tensor(half) - (points - torch.tensor(middle)).abs() for middle, half in self.boxes]
        return torch.stack(each).amin(-1).amax(0)

    def density(self, points: Tensor) -> Tensor:
        return (self.steepness * self.depth(points)).exp()


def started(field: Any, size: int = 16, threshold: float = 1.0) -> TetMesh:
    shape = TetMesh(size, 1.0)
    with torch.no_grad():
        shape.deformation.fill_(1.0)
    start_from_field(shape, field, threshold)
    return shape


HALF = 0.4
BLOCK = ((0.125, -0.25, 0.0), (HALF, HALF, HALF))
STEEP = (25.0, 50.0)  # so that the threshold is below the mean, and its clamp to -1 far from the block has no effect


@pytest.mark.parametrize("steepness", STEEP)
def test_field_grid_extent(steepness: float) -> None:
    """The grid has a margin of a tenth of the bound around the object, and deformations are zero."""
    shape = started(Boxes(steepness, BLOCK))
    low, high = shape.center - shape.half_extent, shape.center + shape.half_extent
    step, middle = 2 / 63, torch.tensor(BLOCK[0])
    for side in (middle - HALF - low, high - middle - HALF):
        assert (side > 0.1).all() and (side < 0.1 + step + 4 * ULP).all()
    assert not shape.deformation.any()


def test_field_sdf_slope() -> None:
    """The distance is zero at the surface, with the median slope of crossing edges equal to ten."""
    shapes, factors = [started(Boxes(steepness, BLOCK), 24) for steepness in STEEP], []
    depth = Boxes(1.0, BLOCK).depth(shapes[0].positions().detach())
    near = (depth > -0.04) & (depth < 0.05)
    assert (near & (depth > 0)).sum() > 30 and (near & (depth < 0)).sum() > 30
    for shape, steepness in zip(shapes, STEEP, strict=True):
        got, exact = shape.sdf.detach()[near], depth[near].double()
        factors.append((got.double() @ exact) / (exact @ exact))
        logarithm = (steepness * depth[near]).exp().log() / steepness  # which loses digits
        check("distance", got, factors[-1] * logarithm, factors[-1] * exact)
        assert torch.equal(shape.half_extent, shapes[0].half_extent) and torch.equal(shape.center, shapes[0].center)
        assert (shape.sdf[depth > 0.1] == 1).all() and (shape.sdf[depth < -0.1] == -1).all()
    assert all(9.999 < factor < 10.001 * 3**0.5 for factor in factors)
    check("factors", factors[0], factors[1], factors[1])


def test_field_floaters_left_outside() -> None:
    """A plate with less than a fiftieth of the points is not part of the surface."""
    top = BLOCK[0][1] + HALF
    plate = ((0.125, top + 0.105, 0.0), (0.2, 0.02, 0.2))
    shape = started(Boxes(50.0, BLOCK, plate), 32)
    inside = Boxes(1.0, plate).depth(shape.positions().detach()) > 0
    assert inside.sum() > 10 and (shape.sdf[inside] < 0).all()
    assert shape.surface().vertices[:, 1].max() < top + 0.05


def test_field_grid_within_bound() -> None:
    """An object that reaches the sides of the cube has no margin."""
    shape = started(Boxes(50.0, ((0.0, 0.0, 0.0), (0.95, 0.95, 0.95))))
    assert torch.equal(shape.center, torch.zeros(3)) and torch.equal(shape.half_extent, torch.ones(3))


def test_field_sdf_finite() -> None:
    """Densities of zero count as a millionth of the isovalue."""
    field = SimpleNamespace(device=torch.device("cpu"), bound=1.0)
    field.density = lambda points: (points.abs().amax(-1) < HALF).float()
    shape = started(field, threshold=0.5)
    assert torch.isfinite(shape.sdf).all()
    assert torch.equal(shape.sdf > 0, shape.positions().abs().amax(1) < HALF)
