"""The tracer's kernel against its definition."""

import math

import pytest
import torch

from dream_fast.kernels import trace, trace_reference
from dream_fast.kernels._core.launch import INTERPRETED

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
def test_trace_random_rays(device, blend, length):
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


def test_trace_empty(device):
    """No rays and no scenes give empty results."""
    scene = scenes(SHAPES[0], device=device)
    none = torch.zeros(1, 0, 3, device=device)
    assert trace(none, none, *scene).depth.shape == (1, 0)
    view = [t[:0] for t in rays(1, device)]
    assert trace(*view, scene[0], scene[1][:0], scene[2][:0], scene[3][:0]).primitive.shape[0] == 0


def test_trace_refuses(device):
    """Wrong shapes and dtypes raise."""
    scene, view = scenes(SHAPES[0], device=device), rays(1, device)
    with pytest.raises(ValueError, match="table"):
        trace(*view, scene[0][:, :19], *scene[1:])
    with pytest.raises(TypeError, match="starts"):
        trace(*view, scene[0], scene[1].long(), *scene[2:])
