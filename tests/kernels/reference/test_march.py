"""Marching: against a loop over one ray at a time, capacity, ragged rays, limits, gradients of positions."""

import math

import pytest
import torch

from dream_fast.bench.accuracy import check_fp64
from dream_fast.kernels import cascades, march, occupancy_points, occupancy_query, occupancy_update


def sphere(resolution: int = 16, bound: float = 1.0, radius: float = 0.5) -> torch.Tensor:
    """Bits of the cells whose centre lies in the sphere."""
    count = cascades(bound)
    inside = occupancy_points(resolution, count, bound).norm(dim=1) < radius
    return occupancy_update(torch.zeros(count, resolution**3), 100 * inside.float().view(count, -1))[0]


def full(resolution: int = 16, bound: float = 1.0) -> torch.Tensor:
    return torch.full((cascades(bound), resolution**3 // 8), 255, dtype=torch.uint8)


def rays(number: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays from around the scene towards somewhere near its middle; some miss it."""
    generator = torch.Generator().manual_seed(seed)
    origins = torch.nn.functional.normalize(torch.randn(number, 3, generator=generator, dtype=dtype), dim=1) * 3
    targets = torch.randn(number, 3, generator=generator, dtype=dtype) * 0.5
    return origins, torch.nn.functional.normalize(targets - origins, dim=1)


def by_hand(o, d, bits, bound, resolution, max_steps, dt_gamma, min_near, perturb) -> list[tuple[float, float]]:
    """Middles and steps of one ray's samples with Python numbers, straight from the definition."""
    near, far = min_near, math.inf
    for axis in range(3):
        if d[axis] == 0:
            if abs(o[axis]) > bound:
                return []
            continue
        first, last = sorted(((-bound - o[axis]) / d[axis], (bound - o[axis]) / d[axis]))
        near, far = max(near, first), min(far, last)
    highest = 2 * math.sqrt(3) * bound / resolution
    lowest = min(2 * math.sqrt(3) / max_steps, highest)
    t = near + perturb * min(max(near * dt_gamma, lowest), highest)
    samples = []
    while t < far and len(samples) < max_steps:
        dt = min(max(t * dt_gamma, lowest), highest)
        middle = t + dt / 2
        x = torch.tensor([[o[axis] + middle * d[axis] for axis in range(3)]], dtype=torch.float64)
        if middle < far and occupancy_query(bits, x.clamp(-bound, bound), bound, resolution):
            samples.append((middle, dt))
        t += dt
    return samples


@pytest.mark.parametrize(
    ("bound", "dt_gamma", "max_steps"), [(1.0, 0.0, 64), (0.6, 0.0, 256), (1.0, 0.02, 128), (2.5, 0.01, 100)]
)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_march_definition(bound, dt_gamma, max_steps, shifted, dense):
    """Results match the definition, written out with loops."""
    origins, directions = rays(12)
    origins[0], directions[0] = torch.tensor([0.1, 0.2, 3.0]), torch.tensor([0.0, 0.0, -1.0])  # two components are zero
    origins[1] = 0.0  # starts inside
    origins[2], directions[2] = torch.tensor([5.0, 5, 5]), torch.tensor([0.0, 1, 0])  # misses
    generator = torch.Generator().manual_seed(3)
    perturb = torch.rand(12, generator=generator, dtype=torch.float64)
    bits = full(bound=bound) if dense else sphere(bound=bound, radius=0.6 * bound)
    options = {"bound": bound, "resolution": 16, "max_steps": max_steps, "dt_gamma": dt_gamma, "min_near": 0.05}
    out = march(origins, directions, bits, capacity=4096, perturb=perturb if shifted else None, **options)
    assert not out.overflow and int(out.count) == int(out.offsets[-1]) > 50
    for ray in range(12):
        shift = float(perturb[ray]) if shifted else 0.0
        expected = by_hand(origins[ray].tolist(), directions[ray].tolist(), bits, perturb=shift, **options)
        rows = slice(int(out.offsets[ray]), int(out.offsets[ray + 1]))
        got = torch.stack([out.t[rows], out.dt[rows]], 1)
        check_fp64("t and dt", got, torch.tensor(expected, dtype=torch.float64).view(-1, 2))
        assert (out.ray_ids[rows] == ray).all()
        check_fp64("positions", out.positions[rows], origins[ray] + out.t[rows, None] * directions[ray])
    assert out.offsets[3] == out.offsets[2], "a ray that misses has no sample"


def test_march_padding():
    """Rows from `count` on are zero."""
    origins, directions = rays(8)
    out = march(origins, directions, sphere(), bound=1.0, resolution=16, capacity=2000, max_steps=64)
    count = int(out.count)
    assert 0 < count < 2000
    for value in (out.positions, out.ray_ids, out.t, out.dt):
        assert value.shape[0] == 2000 and not value[count:].any() and value[:count].any()


def test_march_overflow():
    """Samples past the capacity are dropped, and `overflow` is set."""
    origins, directions = rays(8)
    options = {"bound": 1.0, "resolution": 16, "max_steps": 64}
    whole = march(origins, directions, sphere(), capacity=2000, **options)
    for capacity in (0, 1, int(whole.count) - 1, int(whole.count)):
        out = march(origins, directions, sphere(), capacity=capacity, **options)
        assert bool(out.overflow) == (capacity < int(whole.count))
        assert int(out.count) == int(out.offsets[-1]) == min(capacity, int(whole.count))
        assert torch.equal(out.offsets, whole.offsets.clamp(max=capacity))
        assert torch.equal(out.positions, whole.positions[:capacity]) and torch.equal(out.dt, whole.dt[:capacity])


def test_march_empty():
    """No rays, and rays without samples, give empty results."""
    nothing = torch.zeros(0, 3)
    out = march(nothing, nothing, full(), bound=1.0, resolution=16, capacity=5)
    assert out.offsets.tolist() == [0] and int(out.count) == 0 and out.positions.shape == (5, 3)
    origins, directions = rays(3, dtype=torch.float32)
    out = march(origins, directions, full() * 0, bound=1.0, resolution=16, capacity=5)
    assert out.offsets.tolist() == [0, 0, 0, 0] and int(out.count) == 0 and not out.overflow


def test_march_max_steps():
    """A ray keeps its first max_steps samples."""
    origins, directions = torch.tensor([[-2.0, -2, -2]]), torch.ones(1, 3) / math.sqrt(3)
    out = march(origins, directions, full(bound=2.0), bound=2.0, resolution=16, capacity=2000, max_steps=50)
    assert int(out.count) == 50
    assert float(out.t[0]) < 0.1, "the first samples stay"


def test_march_full_grid():
    """Steps of a ray through a full cube add up to the length inside, to one step."""
    origins, directions = rays(30)
    out = march(origins, directions, full(), bound=1.0, resolution=16, capacity=20000, max_steps=512)
    low, high = (-1 - origins) / directions, (1 - origins) / directions
    near = torch.minimum(low, high).amax(1).clamp(min=0.01)
    far = torch.maximum(low, high).amin(1)
    inside = torch.zeros(30, dtype=torch.float64).index_add_(0, out.ray_ids, out.dt)
    assert ((inside - (far - near).clamp(min=0)).abs() <= 2 * math.sqrt(3) / 512).all()


def test_march_position_gradients():
    """From inside the cube near is min_near, so t does not move with the ray and gradcheck holds."""
    generator = torch.Generator().manual_seed(0)
    origins = (torch.rand(4, 3, generator=generator, dtype=torch.float64) - 0.5).requires_grad_()
    directions = torch.nn.functional.normalize(torch.randn(4, 3, generator=generator, dtype=torch.float64), dim=1)
    directions.requires_grad_()
    options = {"bound": 1.0, "resolution": 16, "capacity": 100, "max_steps": 32, "min_near": 0.2}
    out = march(origins, directions, full(), **options)
    first = torch.tensor(0.2 + math.sqrt(3) / 32, dtype=torch.float64)
    check_fp64("first sample", out.t[: int(out.count)].min(), first)
    assert not out.t.requires_grad and not out.dt.requires_grad
    assert torch.autograd.gradcheck(lambda o, d: march(o, d, full(), **options).positions, (origins, directions))


def test_march_bad_arguments():
    """Errors name the argument and both values."""
    origins, directions = rays(4)
    with pytest.raises(ValueError, match=r"bits must have shape \[1, 512\], got \[1, 8\]"):
        march(origins, directions, full(4), bound=1.0, resolution=16, capacity=5)
    with pytest.raises(ValueError, match=r"directions must have shape \[4, 3\], got \[3, 3\]"):
        march(origins, directions[:3], full(), bound=1.0, resolution=16, capacity=5)
    with pytest.raises(ValueError, match="capacity must be at least 0, got -1"):
        march(origins, directions, full(), bound=1.0, resolution=16, capacity=-1)
    with pytest.raises(ValueError, match="dt_gamma must be at least 0, got nan"):
        march(origins, directions, full(), bound=1.0, resolution=16, capacity=1, dt_gamma=math.nan)
