"""Grids of tetrahedra, the surfaces in them, and the signed distance to a mesh."""

import math

import pytest
import torch
import trimesh

from dream_fast.bench.accuracy import check
from dream_fast.engine.geometry import signed_distance as module
from dream_fast.engine.geometry.mesh import TensorMesh, vertex_normals
from dream_fast.engine.geometry.signed_distance import inside, signed_distance
from dream_fast.engine.geometry.tet_grid import marching_tetrahedra, tet_grid

ULP = torch.finfo(torch.float32).eps  # relative distance of neighbours in fp32


def as_trimesh(surface: TensorMesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(surface.vertices.detach().numpy(), surface.faces.numpy(), process=False)


def check_value(name, got, exact):
    """Compare a number in fp64 with an exact one."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    check(name, got.detach(), exact, exact)


def from_trimesh(mesh: trimesh.Trimesh, dtype=torch.float32) -> TensorMesh:
    return TensorMesh(torch.tensor(mesh.vertices).to(dtype), torch.tensor(mesh.faces))


@pytest.mark.parametrize("size", [4, 6, 10])
def test_tet_grid_fills_its_cube(size):
    """The tetrahedra of a grid have one shape and fill the cube once."""
    grid = tet_grid(size)
    n = size // 2
    assert len(grid.vertices) == (n + 1) ** 3 + n**3 == len(grid.vertices.unique(dim=0))
    corners = grid.vertices[grid.tets].double()
    volume = torch.linalg.det(corners[:, 1:] - corners[:, :1]) / 6
    assert len(grid.tets) == 12 * n * n * (n - 1) and grid.vertices.abs().max() == 1
    exact = torch.full_like(volume, (2 / n) ** 3 / 12)  # of corners in fp32
    check("volume", volume, torch.linalg.det((corners[:, 1:] - corners[:, :1]).float()) / 6, exact)
    # The hull: between two tetrahedra lies each face but those of the border.
    faces = torch.cat([grid.tets[:, [i for i in range(4) if i != k]] for k in range(4)]).sort(1).values
    unique, times = faces.unique(dim=0, return_counts=True)
    assert (
        times.max() == 2 and grid.border[unique[times == 1]].all() and not grid.border[unique[times == 2]].all(1).all()
    )
    assert (grid.vertices[grid.border].abs().amax(1) >= 1 - 2 / size - 4 * ULP).all()


@pytest.mark.parametrize("shape", ["ball", "ring", "noise"])
def test_marching_tetrahedra_zero_surface(shape):
    """A surface is closed and lies where the values are zero."""
    grid = tet_grid(24)
    x = grid.vertices
    values = {
        "ball": 0.61 - x.norm(dim=1),
        "ring": 0.2 - torch.hypot(torch.hypot(x[:, 0], x[:, 1]) - 0.55, x[:, 2]),
        "noise": torch.randn(len(x), generator=torch.Generator().manual_seed(0)),
    }[shape]
    surface = marching_tetrahedra(x, torch.where(grid.border, -1.0, values), grid.tets)
    mesh = as_trimesh(surface)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    used = surface.faces.unique()
    assert len(used) == len(surface.vertices) and len(surface.faces) > 100
    if shape == "noise":
        return
    # On an edge of length L straight lines miss the zero of a distance whose second derivative is at most 1 / r by
    # L^2 / 8r, and a triangle lies its circumradius' square over 2r, at most L^2 / 6r, below a surface of radius r.
    longest, radius = 2 / 12, {"ball": 0.61, "ring": 0.2}[shape]
    distance = {
        "ball": lambda p: 0.61 - p.norm(dim=1),
        "ring": lambda p: 0.2 - torch.hypot(torch.hypot(p[:, 0], p[:, 1]) - 0.55, p[:, 2]),
    }[shape]
    assert distance(surface.vertices).abs().max() < longest**2 / (8 * radius)
    missed = longest**2 / (8 * radius) + longest**2 / (6 * radius)
    within = {
        "ball": lambda r: 4 / 3 * math.pi * r**3,
        "ring": lambda r: 2 * math.pi**2 * 0.55 * r**2,
    }[shape]
    assert within(radius - missed) < mesh.volume < within(radius)
    assert mesh.euler_number == {"ball": 2, "ring": 0}[shape]
    outward = (vertex_normals(surface) * surface.vertices).sum(1)
    assert shape != "ball" or (outward > 0.5 * surface.vertices.norm(dim=1)).all()


def test_marching_tetrahedra_gradients():
    """A surface has gradients."""
    grid = tet_grid(4)
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(len(grid.vertices), generator=generator).double()).requires_grad_()
    places = grid.vertices.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, v: marching_tetrahedra(x, v, grid.tets).vertices, (places, values), eps=1e-7
    )


def test_marching_tetrahedra_empty():
    """A grid without sign changes has no surface."""
    grid = tet_grid(4)
    for value in (-1.0, 0.0, 1.0):
        surface = marching_tetrahedra(grid.vertices, torch.full((len(grid.vertices),), value), grid.tets)
        assert surface.vertices.shape == (0, 3) and surface.faces.shape == (0, 3)


# Signed distance


ORIGIN, SPACING, SHAPE = torch.tensor([-1.0, -0.98, -1.03]), torch.tensor([0.11, 0.093, 0.102]), (19, 22, 20)


def lattice() -> torch.Tensor:
    return ORIGIN + SPACING * torch.cartesian_prod(*map(torch.arange, SHAPE)).view(*SHAPE, 3)


def signed(mesh: TensorMesh, reach=0.3) -> torch.Tensor:
    return signed_distance(mesh, ORIGIN, SPACING, SHAPE, reach)


def box(extents, dtype=torch.float32) -> torch.Tensor:
    q = lattice().to(dtype).abs() - torch.tensor(extents, dtype=dtype) / 2
    return -(q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0))


@pytest.mark.parametrize("pairs", [1 << 20, 700])
def test_signed_distance_of_a_box(pairs, monkeypatch):
    """Distance to a box is exact within a spacing, its sign anywhere."""
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", pairs)
    mesh = from_trimesh(trimesh.creation.box((0.8, 1.1, 0.5)))
    extents = (0.8, 1.1, 0.5)
    reference, exact = (box(extents, dtype=dtype) for dtype in (torch.float32, torch.float64))
    is_near, got = exact.abs() <= SPACING.amin(), signed(mesh)
    check("distance", got[is_near], reference[is_near], exact[is_near])
    assert torch.equal(got > 0, exact > 0)


def test_signed_distance_bad_meshes():
    """Meshes that are inside out, overlapping or open have the right sign."""
    solid = trimesh.creation.box((0.8, 1.1, 0.5))
    expected = box((0.8, 1.1, 0.5)) > 0
    flipped = TensorMesh(torch.tensor(solid.vertices).float(), torch.tensor(solid.faces).flip(1))
    assert torch.equal(inside(flipped, ORIGIN, SPACING, SHAPE), expected)
    other = trimesh.creation.box((0.5, 0.5, 1.3))
    both = inside(from_trimesh(trimesh.util.concatenate([solid, other])), ORIGIN, SPACING, SHAPE)
    assert torch.equal(both, expected | (box((0.5, 0.5, 1.3)) > 0))
    # A triangle is missing: lines through the hole are outvoted.
    fine = solid.subdivide().subdivide()
    opened = TensorMesh(torch.tensor(fine.vertices).float(), torch.tensor(fine.faces)[1:])
    assert torch.equal(inside(opened, ORIGIN, SPACING, SHAPE), expected)


def test_signed_distance_beyond_the_lattice():
    """A mesh may extend beyond the lattice."""
    mesh = from_trimesh(trimesh.creation.icosphere(3, 5.0))
    assert inside(mesh, ORIGIN, SPACING, SHAPE).all() and (signed(mesh) == 0.3).all()
    away = mesh._replace(vertices=mesh.vertices + 20)
    assert (signed(away) == -0.3).all()
