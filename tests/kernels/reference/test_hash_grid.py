"""Hash grid: against an independent loop, fp64 gradients to second order, masks, repeatability, table regularisers."""

import math
from itertools import pairwise

import pytest
import torch

from dream_fast.bench.accuracy import check, check_fp64
from dream_fast.kernels import HashGridSpec, hash_grid, hash_grid_total_variation_grad, hash_grid_weight_decay_grad

# Three dense levels and two hashed ones.
SMALL = HashGridSpec(levels=5, features=2, log2_entries=8, base_resolution=4, max_resolution=16)


def points(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_table(spec: HashGridSpec, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(spec.rows, spec.features, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(x: list[float], table: torch.Tensor, spec: HashGridSpec) -> list[float]:
    """Features of a point with Python numbers, straight from the definition."""
    out = []
    for level in range(spec.levels):
        resolution, first = spec.resolutions[level], spec.offsets[level]
        cell, fraction = [], []
        for value in x:
            position = min(max(value * resolution - 0.5, 0.0), resolution - 1.0)
            low = min(math.floor(position), resolution - 2)
            part = position - low
            cell.append(low)
            fraction.append(part * part * (3 - 2 * part) if spec.interpolation == "smoothstep" else part)
        features = [0.0] * spec.features
        for corner in range(8):
            vertex = [cell[axis] + (corner >> axis & 1) for axis in range(3)]
            weight = math.prod(fraction[a] if corner >> a & 1 else 1 - fraction[a] for a in range(3))
            if resolution**3 <= 2**spec.log2_entries:
                row = vertex[0] + resolution * vertex[1] + resolution**2 * vertex[2]
            else:
                row = (vertex[0] ^ vertex[1] * 2654435761 ^ vertex[2] * 805459861) % 2**spec.log2_entries
            for channel in range(spec.features):
                features[channel] += weight * float(table[first + row, channel])
        out += features
    return out


def test_hash_grid_spec_sizes():
    """Resolutions, rows and channels of the default shape and of a single level."""
    spec = HashGridSpec()
    assert spec.resolutions[0] == 16 and spec.resolutions[-1] == 2048 and spec.levels == len(spec.resolutions)
    assert spec.rows == spec.offsets[-1] == 6098120
    assert [spec.offsets[i + 1] - spec.offsets[i] for i in (0, 15)] == [16**3, 2**19]
    assert spec.channels == 32
    assert HashGridSpec(levels=1, base_resolution=5, max_resolution=5, log2_entries=10).offsets == (0, 128)


@pytest.mark.parametrize("interpolation", ["smoothstep", "linear"])
@pytest.mark.parametrize("features", [1, 2, 3])
def test_hash_grid_definition(interpolation, features):
    """Features equal those of a loop with Python numbers, in dense and hashed levels and on the faces."""
    spec = HashGridSpec(
        levels=5, features=features, log2_entries=8, base_resolution=4, max_resolution=16, interpolation=interpolation
    )
    x = torch.cat([points(20), torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5], [0.125, 0.375, 0.999]]).double()])
    table = random_table(spec)
    expected = torch.tensor([by_hand(row, table, spec) for row in x.tolist()], dtype=torch.float64)
    check_fp64("features", hash_grid(x, table, spec), expected)


def test_hash_grid_large_coordinates():
    """The hash of coordinates whose products pass 2^32 is that of Python's integers."""
    spec = HashGridSpec(levels=2, features=2, log2_entries=10, base_resolution=16, max_resolution=1 << 19)
    x, table = points(16), random_table(spec)
    expected = torch.tensor([by_hand(row, table, spec) for row in x.tolist()], dtype=torch.float64)
    check_fp64("features", hash_grid(x, table, spec), expected)


@pytest.mark.parametrize("interpolation", ["smoothstep", "linear"])
def test_hash_grid_gradients(interpolation):
    """Gradients of x and table to second order agree with finite differences."""
    spec = HashGridSpec(levels=2, log2_entries=3, base_resolution=2, max_resolution=5, interpolation=interpolation)
    x, table = points(3).requires_grad_(), random_table(spec).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, table: hash_grid(x, table, spec), (x, table))
    assert torch.autograd.gradgradcheck(lambda x, table: hash_grid(x, table, spec), (x, table))


def test_hash_grid_outside_points():
    """Points outside the cube, NaN and infinity give zeros and take no gradient."""
    x = torch.tensor([[0.5, 0.5, 0.5], [1.0001, 0.5, 0.5], [0.5, -1e-6, 0.5], [0.5, math.nan, 0.5], [math.inf, 0, 0]])
    x.requires_grad_()
    table = random_table(SMALL, dtype=torch.float32)
    out = hash_grid(x, table, SMALL)
    assert out[0].abs().min() > 0 and torch.equal(out[1:], torch.zeros_like(out[1:]))
    out.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.equal(x.grad[1:], torch.zeros(4, 3))


@pytest.mark.parametrize("active", [0, 2, 5])
def test_hash_grid_active_levels(active):
    """Levels from `active_levels` on give zeros and take no gradient, as a number and as a tensor."""
    x, table = points(30), random_table(SMALL)
    full = hash_grid(x, table, SMALL)
    expected = full.clone()
    expected[:, active * 2 :] = 0
    assert torch.equal(hash_grid(x, table, SMALL, active_levels=active), expected)
    on_device = torch.tensor(active)
    assert torch.equal(hash_grid(x, table, SMALL, active_levels=on_device), expected)
    if active:
        table.requires_grad_()
        hash_grid(x, table, SMALL, active_levels=on_device).sum().backward()
        assert not table.grad[SMALL.offsets[active] :].any() and table.grad[: SMALL.offsets[active]].any()


def test_hash_grid_count():
    """Rows past the count give zeros, take no gradient and do not change the others."""
    x, table = points(30), random_table(SMALL)
    x[20:] = math.nan
    live = x[:20].clone().requires_grad_()
    padded, first, second = x.clone().requires_grad_(), table.clone().requires_grad_(), table.clone().requires_grad_()
    out = hash_grid(padded, first, SMALL, count=torch.tensor(20))
    expected = hash_grid(live, second, SMALL)
    assert torch.equal(out, torch.cat([expected, torch.zeros(10, SMALL.channels)]))
    out.backward(torch.ones_like(out))
    expected.sum().backward()
    assert torch.equal(first.grad, second.grad)
    assert torch.equal(padded.grad, torch.cat([live.grad, torch.zeros(10, 3)]))


@pytest.mark.parametrize("n", [0, 1, 7])
def test_hash_grid_odd_sizes(n):
    """No point, one point and strided points give the features of contiguous ones."""
    table = random_table(SMALL).requires_grad_()
    wide = points(2 * n).view(n, 6)[:, ::2] if n else points(0)
    out = hash_grid(wide, table, SMALL)
    assert out.shape == (n, SMALL.channels)
    assert torch.equal(out, hash_grid(wide.contiguous(), table, SMALL))
    out.sum().backward()
    assert table.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hash_grid_compute_dtype(dtype):
    """Entries are rounded to the compute dtype; the table's gradient is not."""
    x, table = points(200, dtype=torch.float32), random_table(SMALL, dtype=torch.float32).requires_grad_()
    out = hash_grid(x, table, SMALL, dtype=dtype)
    assert out.dtype == dtype
    exact = hash_grid(x.double(), table.detach().to(dtype).double(), SMALL)
    check("features", out, exact.to(dtype), exact)
    out.float().sum().backward()
    plain, precise = table.detach().clone().requires_grad_(), table.detach().double().requires_grad_()
    hash_grid(x, plain, SMALL).sum().backward()
    hash_grid(x.double(), precise, SMALL).sum().backward()
    assert table.grad.dtype == torch.float32
    check("gradient", table.grad, plain.grad, precise.grad)


def test_hash_grid_repeats():
    """The table's gradient has the same bits with one thread and with two."""
    x, table = points(20000, dtype=torch.float32), random_table(SMALL, dtype=torch.float32)
    upstream = torch.randn(20000, SMALL.channels, generator=torch.Generator().manual_seed(2))
    threads, grads = torch.get_num_threads(), []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            leaf = table.clone().requires_grad_()
            hash_grid(x, leaf, SMALL).backward(upstream)
            grads.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[1], grads[2])


def test_hash_grid_errors():
    """Errors name the argument and both values."""
    x, table = points(4), random_table(SMALL)
    with pytest.raises(ValueError, match=r"x must have shape \[N, 3\], got \[4, 2\]"):
        hash_grid(x[:, :2], table, SMALL)
    with pytest.raises(ValueError, match=rf"table must have shape \[{SMALL.rows}, 2\], got \[10, 2\]"):
        hash_grid(x, table[:10], SMALL)
    with pytest.raises(TypeError, match="table must be float32 or float64, got float16"):
        hash_grid(x, table.half(), SMALL)
    with pytest.raises(TypeError, match="count must be int64, got float32"):
        hash_grid(x, table, SMALL, count=torch.tensor(1.0))
    with pytest.raises(ValueError, match="max_resolution must be at least base_resolution = 16, got 8"):
        HashGridSpec(max_resolution=8)
    with pytest.raises(ValueError, match='interpolation must be "smoothstep" or "linear", got "cubic"'):
        HashGridSpec(interpolation="cubic")


def test_total_variation_definition():
    """The gradient at the vertex of a point in a dense level equals one computed by hand."""
    spec = HashGridSpec(levels=1, features=2, log2_entries=8, base_resolution=4, max_resolution=4)
    table = random_table(spec)
    grad = hash_grid_total_variation_grad(table, spec, torch.tensor([[0.4, 0.49, 0.99]]).double(), 3.0)
    vertex, expected = (1, 1, 3), torch.zeros_like(table)
    grid = table[:64].view(4, 4, 4, 2).permute(2, 1, 0, 3)
    neighbours = [(0, 1, 3), (2, 1, 3), (1, 0, 3), (1, 2, 3), (1, 1, 2)]
    difference = torch.stack([grid[vertex] - grid[n] for n in neighbours])
    expected[1 + 4 + 3 * 16] = 3.0 / 6 * difference.sum(0) / (difference.square().sum(0) + 1e-9).sqrt()
    check_fp64("gradient", grad, expected)


def test_total_variation_padding_rows():
    """Rows that no vertex has (padding, other levels) are not read: they hold NaN here."""
    spec = HashGridSpec(levels=2, features=2, log2_entries=8, base_resolution=3, max_resolution=5)
    corners = torch.tensor([[float(i), float(j), float(k)] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    table = torch.randn(spec.rows, 2, generator=torch.Generator().manual_seed(0))
    table[27:32] = math.nan
    table[32 + 125 :] = math.nan
    grad = hash_grid_total_variation_grad(table, spec, torch.cat([corners, points(500).float()]), 1.0)
    assert torch.isfinite(grad).all() and grad[:27].abs().sum() > 0
    flat = torch.ones(spec.rows, 2)
    assert torch.equal(hash_grid_total_variation_grad(flat, spec, corners, 1.0), torch.zeros_like(flat))


def test_weight_decay_definition():
    """The gradient equals autograd's of the loss."""
    table = random_table(SMALL).requires_grad_()
    loss = sum(table[start:end].square().sum() / (end - start) for start, end in pairwise(SMALL.offsets))
    (0.7 * loss).backward()
    check_fp64("gradient", hash_grid_weight_decay_grad(table.detach(), SMALL, 0.7), table.grad)
