"""The definition of the tracer against closed forms."""

import math

import pytest
import torch

from dream_fast.kernels.rays.trace import scene_distance

MAIN, OTHER, CUT = 1, 2, 3
BALL, BOX, CONE, RING, LIMB, ARC = range(6)


def row(kind, size, center=(0.0, 0.0, 0.0), role=MAIN, turn=0.0):
    """A row of the table; `turn` is about z, in radians."""
    c, s = math.cos(turn), math.sin(turn)
    return [*center, c, s, 0, -s, c, 0, 0, 0, 1, *size, *[1.0] * (6 - len(size)), kind, role]


def distance(points, *rows, blend=0.0):
    return scene_distance(points, [(torch.tensor(rows, dtype=points.dtype), points.new_tensor(blend))])


@pytest.fixture
def points():
    return torch.rand(3000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(
    ("kind", "size", "exact"),
    [
        (BALL, (0.4, 0.4, 0.4), lambda p: p.norm(dim=1) - 0.4),
        (RING, (0.4, 0.1), lambda p: torch.hypot(torch.hypot(p[:, 0], p[:, 2]) - 0.4, p[:, 1]) - 0.1),
        (ARC, (0.5, 0.1, 0.0, -1.0), lambda p: torch.hypot(torch.hypot(p[:, 0], p[:, 1]) - 0.5, p[:, 2]) - 0.1),
        (
            LIMB, (0.2, 0.2, 0.5),
            lambda p: (p - torch.stack([0 * p[:, 0], p[:, 1].clamp(0, 0.5), 0 * p[:, 0]], 1)).norm(dim=1) - 0.2,
        ),
        (
            BOX, (0.3, 0.2, 0.4, 0.0, 1.0, 1.0),
            lambda p: (q := p.abs() - p.new_tensor([0.3, 0.2, 0.4])).clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0),
        ),
        (
            CONE, (0.3, 0.3, 0.4, 0.0),
            lambda p: (
                q := torch.stack([torch.hypot(p[:, 0], p[:, 2]) - 0.3, p[:, 1].abs() - 0.4], 1)
            ).clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0),
        ),
    ],
)  # fmt: skip
def test_trace_distance(points, kind, size, exact):
    """Distances of primitives are those of closed forms, also moved and turned."""
    assert (distance(points, row(kind, size)) - exact(points)).abs().max() < 1e-12
    center = points.new_tensor([0.1, -0.2, 0.05])
    turn = points.new_tensor([[math.cos(0.7), math.sin(0.7), 0], [-math.sin(0.7), math.cos(0.7), 0], [0, 0, 1]])
    moved = distance(points, row(kind, size, center.tolist(), turn=0.7))
    assert (moved - exact((points - center) @ turn.T)).abs().max() < 1e-12


def test_trace_distance_of_limb_and_arc(points):
    """Their distance is that to the nearest of many balls along them."""
    along = torch.linspace(0, 1, 4001, dtype=torch.float64)
    # a rounded cone is the hull of balls whose radii and centres move together
    centers = torch.stack([0 * along, 0.5 * along, 0 * along], 1)
    nearest = (torch.cdist(points, centers) - (0.3 - 0.2 * along)).amin(1)
    assert (distance(points, row(LIMB, (0.3, 0.1, 0.5))) - nearest)[nearest > 0].abs().max() < 1e-6
    turn = (2 * along - 1) * 2.0
    centers = torch.stack([0.5 * torch.sin(turn), 0.5 * torch.cos(turn), 0 * turn], 1)
    arc = distance(points, row(ARC, (0.5, 0.12, math.sin(2.0), math.cos(2.0))))
    assert (arc - (torch.cdist(points, centers).amin(1) - 0.12)).abs().max() < 1e-6


def test_trace_distance_of_scene(points):
    """Cuts take away from main primitives only, and blends are smooth unions."""
    main, other = row(BALL, (0.5,) * 3), row(BALL, (0.1,) * 3, (0.3, 0, 0), OTHER)
    hole = row(BOX, (0.2, 0.9, 0.9, 0.0, 1.0, 1.0), (0.3, 0, 0), CUT)
    d_main, d_other, d_hole = (distance(points, r[:19] + [MAIN]) for r in (main, other, hole))
    assert torch.allclose(distance(points, main, other, hole), torch.minimum(torch.maximum(d_main, -d_hole), d_other))
    second = row(BALL, (0.3,) * 3, (0.5, 0, 0))
    joined, k = distance(points, main, second, blend=0.05), 0.05
    d_second = distance(points, second)
    assert torch.allclose(joined, -k * torch.log(torch.exp(-d_main / k) + torch.exp(-d_second / k)))
    assert (joined <= torch.minimum(d_main, d_second)).all()
