"""The steps of a signed distance, each against independent results: points in boxes, distances, crossings."""

import itertools

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from dream_fast.bench.accuracy import check_fp64
from dream_fast.engine.geometry import signed_distance as module
from dream_fast.engine.geometry.mesh import TensorMesh
from dream_fast.engine.geometry.signed_distance import count_pairs, distance, inside, signed_distance

ORIGIN = torch.tensor([-1.0, -0.5, 0.25], dtype=torch.float64)
SPACING = torch.tensor([0.25, 0.5, 0.125], dtype=torch.float64)
SHAPE = (9, 5, 7)


def lattice() -> Tensor:
    return ORIGIN + SPACING * torch.cartesian_prod(*map(torch.arange, SHAPE)).view(*SHAPE, 3)


def surface(mesh: trimesh.Trimesh) -> TensorMesh:
    return TensorMesh(torch.tensor(np.asarray(mesh.vertices)), torch.tensor(np.asarray(mesh.faces)))


def drawn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("axes", [2, 3])
def test_pairs_all_points(axes: int) -> None:
    """Every point of a box occurs once, in any chunks; empty boxes have none."""
    first = torch.tensor([[1, 0, 4], [2, 2, 2], [0, 5, 1], [3, 0, 0], [7, 1, 2]])[:, :axes]
    counts = torch.tensor([[2, 3, 1], [0, 2, 2], [1, 1, 3], [2, 2, 0], [3, 1, 2]])[:, :axes]
    expected = []
    for box, (start, count) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
        ranges = [range(s, s + c) for s, c in zip(start, count, strict=True)]
        expected += [(box, *point) for point in itertools.product(*ranges)]
    total = len(expected)
    for step in (total, 4, 1):
        rows = []
        for start in range(0, total, step):
            ends = counts.prod(1).cumsum(0)
            box, point = module._pairs(first, counts, ends, start, min(start + step, total))
            assert len(box) == min(step, total - start)
            rows += torch.cat([box[:, None], point], 1).tolist()
        assert sorted(map(tuple, rows)) == expected
        assert [row[0] for row in rows] == [row[0] for row in expected]  # box by box


def test_boxes_points() -> None:
    """Points on the border count, and none outside of the lattice."""
    origin, spacing, shape = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([5])  # points at 1, 1.5, ..., 3
    cases = [(1.5, 2.5), (1.6, 2.4), (1.6, 1.9), (0.0, 1.0), (-9.0, 0.9), (3.0, 9.0), (3.1, 9.0), (-9.0, 9.0)]
    low, high = torch.tensor(cases).T[..., None]
    first, counts = module._boxes(low, high, origin, spacing, shape)
    assert first.dtype == counts.dtype == torch.int64
    got = [list(range(f, f + c)) for f, c in torch.cat([first, counts], 1).tolist()]
    assert got == [[1, 2, 3], [2], [], [0], [], [4], [], [0, 1, 2, 3, 4]]


def squared_distances(points: Tensor, corners: Tensor) -> Tensor:
    """Squared distances of points [n, 3] from triangles [n, 3, 3]."""
    return module._triangle_distance(points.T, corners.permute(1, 2, 0))


def test_squared_distance_closest_point() -> None:
    """Distances equal those of trimesh, near all seven regions of a triangle."""
    corners, points = drawn(3000, 3, 3), 1.5 * drawn(3000, 4, 3)[:, 3]
    closest = torch.tensor(trimesh.triangles.closest_point(corners.numpy(), points.numpy()))
    check_fp64("triangles", squared_distances(points, corners), (closest - points).square().sum(1))
    small = 1e-4  # world units: an area of 1e-8 is still one
    check_fp64(
        "small",
        squared_distances(small * points, small * corners),
        small**2 * (closest - points).square().sum(1),
    )


def test_squared_distance_degenerate_triangles() -> None:
    """Triangles that are a line or a point have the distance to it."""
    points, a, b = drawn(3, 500, 3)
    part = torch.linspace(-1, 2, 500, dtype=torch.float64)[:, None]
    on_line = torch.stack([a, b, a + part * (b - a)], 1)
    lowest, highest = part.clamp(max=0), part.clamp(min=1)  # the ends of the three together
    start, end = a + lowest * (b - a), a + highest * (b - a)
    along = (((points - start) * (end - start)).sum(1) / (end - start).square().sum(1)).clamp(0, 1)[:, None]
    exact = (start + along * (end - start) - points).square().sum(1)
    check_fp64("segments", module._segment_distance((start - points).T, (end - start).T), exact)
    pairs = ((a, b), (b, on_line[:, 2]), (on_line[:, 2], a))
    longest = torch.stack([module._segment_distance((x - points).T, (y - x).T) for x, y in pairs])
    check_fp64("parts", longest.amin(0), exact)
    check_fp64("points", squared_distances(points, a[:, None].expand(-1, 3, -1)), (a - points).square().sum(1))
    whole = torch.tensor([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]], dtype=torch.float64).expand(500, 3, 3)
    outside = torch.stack([points[:, 0].clamp(0, 3), *torch.zeros(2, 500, dtype=torch.float64)], 1)
    check_fp64("on an axis", squared_distances(points, whole), (outside - points).square().sum(1))


@pytest.mark.parametrize("pairs", [1 << 20, 5])
def test_distance_of_a_lattice(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact within a spacing of the surface along each axis, on axes of other lengths, spacings and starts.

    Farther away no path is shorter than the distance, none longer than the worst, `reach` is the most. Pieces change
    nothing."""
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", pairs)
    corners = torch.cat([0.5 * drawn(6, 3, 3), 0.5 * drawn(7, 3, 3)[6:] * 0.2 + 0.3])
    mesh = TensorMesh(corners.view(-1, 3), torch.arange(21).view(7, 3))
    points = lattice().view(-1, 3)
    closest = torch.stack(
        [
            torch.tensor(trimesh.triangles.closest_point(np.broadcast_to(one, (len(points), 3, 3)), points.numpy()))
            for one in corners.numpy()
        ]
    )
    way = closest - points  # [7, n, 3]
    exact, nearest = way.norm(dim=2).min(0)
    is_next = (way[nearest, torch.arange(len(points))].abs() <= SPACING).all(1).view(SHAPE)
    exact, reach = exact.view(SHAPE), 0.6
    assert (exact < reach).sum() > 20 and (exact > reach).sum() > 20 and (is_next & (exact < reach)).sum() > 20
    got = distance(mesh, ORIGIN, SPACING, SHAPE, reach)
    assert got.shape == SHAPE
    check_fp64("distance", got[is_next], exact.clamp(max=reach)[is_next])
    worst = 3**0.5 * exact + (1 + 3**0.5) * SPACING.norm() / 2  # from the lattice point nearest to the surface's
    tiny = 1e-12  # the rounding of fp64
    assert (got >= exact.clamp(max=reach) - tiny).all() and (got <= worst.clamp(max=reach) + tiny).all()
    assert count_pairs(mesh, ORIGIN, SPACING, SHAPE) >= is_next.sum()


def boxes(*extents: tuple[tuple[float, float, float], tuple[float, float, float]]) -> TensorMesh:
    """Boxes from one corner to the other, as one mesh."""
    meshes = [
        trimesh.creation.box(np.subtract(high, low)).apply_translation(np.add(low, high) / 2) for low, high in extents
    ]
    return surface(trimesh.util.concatenate(meshes))


# Between points of the lattice, which has 9 along x from -1, 5 along y from -0.5, and 7 along z from 0.25.
LOW, HIGH = (-0.6, -0.2, 0.3), (0.6, 1.2, 0.7)
SECOND = ((0.1, 0.3, 0.4), (5.0, 1.3, 0.9))


def within(low: tuple, high: tuple) -> Tensor:
    points = lattice()
    return ((points > torch.tensor(low)) & (points < torch.tensor(high))).all(-1)


@pytest.mark.parametrize("pairs", [1 << 20, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_winding_of_lines(axis: int, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along each axis the number is 1 in a box, 2 in two, and -1 in one that is inside out."""
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", pairs)
    mesh = boxes((LOW, HIGH), SECOND)
    expected = within(LOW, HIGH).long() + within(*SECOND).long()
    assert expected.unique().tolist() == [0, 1, 2]
    got = module._winding_along(mesh, axis, ORIGIN, SPACING, SHAPE)
    assert got.dtype == torch.int64 and torch.equal(got, expected)
    flipped = mesh._replace(faces=mesh.faces.flip(1))
    assert torch.equal(module._winding_along(flipped, axis, ORIGIN, SPACING, SHAPE), -expected)


def test_winding_before_the_lattice() -> None:
    """A box around the whole lattice is entered before its first point."""
    around = boxes(((-3.0, -3.0, -3.0), (4.0, 4.0, 4.0)))
    for axis in range(3):
        assert (module._winding_along(around, axis, ORIGIN, SPACING, SHAPE) == 1).all()


@pytest.mark.parametrize("votes", list(itertools.product([1, 0, 2], repeat=3)))
@pytest.mark.parametrize("turned", [False, True])
def test_inside_two_of_three_axes(votes: tuple[int, ...], turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point is inside by two of three axes; in a mesh that is inside out, signs are reversed."""
    mesh = boxes((LOW, HIGH))
    if turned:
        mesh = mesh._replace(faces=mesh.faces.flip(1))
    sign = -1 if turned else 1
    monkeypatch.setattr(
        module,
        "_winding_along",
        lambda mesh, axis, *lattice, **_: torch.tensor([sign * votes[axis], -sign * votes[axis]]),
    )
    expected = sum(vote > 0 for vote in votes) >= 2
    assert inside(mesh, ORIGIN, SPACING, SHAPE).tolist() == [expected, False]


def test_signed_distance_sign() -> None:
    """It is positive inside, negative outside, and `reach` where the mesh is farther."""
    mesh = boxes((LOW, HIGH))
    got = signed_distance(mesh, ORIGIN, SPACING, SHAPE, 0.125)
    assert torch.equal(got.abs(), distance(mesh, ORIGIN, SPACING, SHAPE, 0.125))
    assert (
        torch.equal(got > 0, within(LOW, HIGH)) and (got < 0).any() and (got == 0.125).any() and (got == -0.125).any()
    )
