"""The tracer's kernel against its definition, and that against closed forms."""

import math
import os

import pytest
import torch

from dream_fast.kernels import trace, trace_reference
from dream_fast.kernels.trace import scene_distance

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIDE = 9 if INTERPRETED else 64
MAIN, OTHER, CUT = 1, 2, 3
BALL, BOX, CONE, RING, LIMB, ARC = range(6)


def row(kind, size, center=(0.0, 0.0, 0.0), role=MAIN, turn=0.0):
    """A row of the table; `turn` is about z, in radians."""
    c, s = math.cos(turn), math.sin(turn)
    return [*center, c, s, 0, -s, c, 0, 0, 0, 1, *size, *[1.0] * (6 - len(size)), kind, role]


def scenes(*items, blend=0.0, device="cpu"):
    """Table, starts, blends and radii of scenes of one item each."""
    rows = torch.tensor([r for item in items for r in item], dtype=torch.float32)
    ends = torch.tensor([0, *torch.tensor([len(item) for item in items]).cumsum(0).tolist()])
    starts = torch.stack([ends[:-1], ends[1:], ends[1:]], 1).int()
    full = torch.full((len(items),), 1.0)
    return [t.to(device) for t in (rows, starts, torch.tensor([[blend, 0.0]] * len(items)), full)]


def rays(count, device="cpu", length=1.0):
    """Parallel rays along -z over the square of half width 1, for each of `count` scenes."""
    at = torch.linspace(-0.97, 0.97, SIDE)
    y, x = torch.meshgrid(at, at, indexing="ij")
    origins = torch.stack([x, y, torch.full_like(x, 3.0)], -1).view(1, -1, 3).expand(count, -1, -1).contiguous()
    directions = torch.tensor([0.0, 0.0, -length]).expand_as(origins).contiguous()
    return origins.to(device), directions.to(device)


SHAPES = (
    [row(BALL, (0.6, 0.4, 0.5), turn=0.4), row(BALL, (0.2, 0.2, 0.2), (0.3, 0.3, 0.3), OTHER)],
    [row(BOX, (0.5, 0.4, 0.3, 0.1, 0.5, 1.0), turn=0.3), row(BALL, (0.3, 0.3, 0.3), (0, 0, 0.3), CUT)],
    [row(CONE, (0.5, 0.2, 0.4, 0.05), turn=1.0), row(RING, (0.6, 0.1), (0, -0.2, 0), OTHER)],
    [row(LIMB, (0.3, 0.1, 0.5), (0, -0.3, 0), turn=-0.5), row(LIMB, (0.2, 0.15, 0.4), turn=0.8)],
    [row(ARC, (0.5, 0.12, math.sin(2.0), math.cos(2.0)), turn=0.7)],
)


@pytest.mark.parametrize("blend", [0.0, 0.05])
@pytest.mark.parametrize("length", [1.0, 0.4])
def test_trace_equals_its_definition(device, blend, length):
    """The kernel meets what the reference meets, where rounding cannot decide; all kinds, roles and lengths of rays."""
    scene, view = scenes(*SHAPES, blend=blend, device=device), rays(len(SHAPES), device, length)
    seen, told = trace(*view, *scene), trace_reference(*view, *scene)
    exact = trace_reference(*(t.double() for t in view), scene[0].double(), scene[1], *(t.double() for t in scene[2:]))
    sure = (told.primitive == exact.primitive) & ((told.depth - exact.depth).abs() < 1e-4).logical_or(
        told.primitive < 0
    )
    assert sure.float().mean() > 0.95 and (told.primitive >= 0).float().mean() > 0.1
    assert (seen.primitive == told.primitive)[sure].float().mean() > 0.999
    both = sure & (seen.primitive >= 0) & (told.primitive >= 0)
    error, own = (seen.depth - exact.depth)[both].abs().max(), (told.depth - exact.depth)[both].abs().max()
    assert error <= 2 * own + 1e-6
    assert (seen.normal.norm(dim=-1)[both] - 1).abs().max() < 1e-5
    apart, mine = (
        (seen.normal - exact.normal)[both].norm(dim=-1).mean(),
        (told.normal - exact.normal)[both].norm(dim=-1).mean(),
    )
    assert apart <= 2 * mine + 1e-6
    assert torch.isinf(seen.depth[seen.primitive < 0]).all() and not seen.normal[seen.primitive < 0].any()


def test_no_rays_and_no_scenes(device):
    scene = scenes(SHAPES[0], device=device)
    none = torch.zeros(1, 0, 3, device=device)
    assert trace(none, none, *scene).depth.shape == (1, 0)
    view = [t[:0] for t in rays(1, device)]
    assert trace(*view, scene[0], scene[1][:0], scene[2][:0], scene[3][:0]).primitive.shape[0] == 0


def test_what_is_refused(device):
    scene, view = scenes(SHAPES[0], device=device), rays(1, device)
    with pytest.raises(ValueError, match="table"):
        trace(*view, scene[0][:, :19], *scene[1:])
    with pytest.raises(TypeError, match="starts"):
        trace(*view, scene[0], scene[1].long(), *scene[2:])


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
def test_distance_of_a_primitive_is_exact(points, kind, size, exact):
    assert (distance(points, row(kind, size)) - exact(points)).abs().max() < 1e-12
    center = points.new_tensor([0.1, -0.2, 0.05])
    turn = points.new_tensor([[math.cos(0.7), math.sin(0.7), 0], [-math.sin(0.7), math.cos(0.7), 0], [0, 0, 1]])
    moved = distance(points, row(kind, size, center.tolist(), turn=0.7))
    assert (moved - exact((points - center) @ turn.T)).abs().max() < 1e-12


def test_a_rounded_cone_and_an_arc_end_where_they_should(points):
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


def test_a_cut_takes_away_from_main_parts_and_a_blend_joins_them(points):
    main, other = row(BALL, (0.5,) * 3), row(BALL, (0.1,) * 3, (0.3, 0, 0), OTHER)
    hole = row(BOX, (0.2, 0.9, 0.9, 0.0, 1.0, 1.0), (0.3, 0, 0), CUT)
    d_main, d_other, d_hole = (distance(points, r[:19] + [MAIN]) for r in (main, other, hole))
    assert torch.allclose(distance(points, main, other, hole), torch.minimum(torch.maximum(d_main, -d_hole), d_other))
    second = row(BALL, (0.3,) * 3, (0.5, 0, 0))
    joined, k = distance(points, main, second, blend=0.05), 0.05
    d_second = distance(points, second)
    assert torch.allclose(joined, -k * torch.log(torch.exp(-d_main / k) + torch.exp(-d_second / k)))
    assert (joined <= torch.minimum(d_main, d_second)).all()
