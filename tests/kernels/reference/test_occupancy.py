"""Occupancy grid: cells and points agree, cascades, the decaying maximum, the threshold, the packed bits."""

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.kernels import cascades, occupancy_points, occupancy_query, occupancy_update


def test_occupancy_cascades():
    """The number of cascades follows from the bound."""
    assert [cascades(b) for b in (0.3, 1, 1.01, 2, 3, 4, 16)] == [1, 1, 2, 2, 3, 3, 5]


def test_occupancy_points_order():
    """Points lie in the centres of their cells, in the order of the grid."""
    points = occupancy_points(4, 1, 0.5)
    assert points.shape == (64, 3)
    # z runs fastest, then y, then x.
    assert points[0].tolist() == [-0.375, -0.375, -0.375]
    assert points[1].tolist() == [-0.375, -0.375, -0.125]
    assert points[4].tolist() == [-0.375, -0.125, -0.375]
    assert points[16].tolist() == [-0.125, -0.375, -0.375]


def test_occupancy_points_cascades():
    """Points of each cascade cover its cube, with noise inside their cells; bad arguments raise."""
    points = occupancy_points(2, 3, 3.0).view(3, 8, 3)
    assert [float(points[c].abs().max()) for c in range(3)] == [0.5, 1.0, 1.5]
    noise = torch.rand(3 * 8, 3, generator=torch.Generator().manual_seed(0))
    noisy = occupancy_points(2, 3, 3.0, noise).view(3, 8, 3)
    for cascade, half in enumerate((1.0, 2.0, 3.0)):
        low = points[cascade] - half / 2
        assert ((noisy[cascade] >= low) & (noisy[cascade] < low + half)).all()
    with pytest.raises(ValueError, match=r"cascades must be 3 for bound = 3.0, got 1"):
        occupancy_points(2, 1, 3.0)
    with pytest.raises(ValueError, match="resolution must be even and at least 2, got 5"):
        occupancy_points(5, 1, 1.0)


@pytest.mark.parametrize("bound", [0.6, 1.0, 2.5])
def test_occupancy_query(bound):
    """Random points of each cell find its bit, unless a smaller cascade holds them."""
    resolution, count = 8, cascades(bound)
    generator = torch.Generator().manual_seed(0)
    density = torch.zeros(count, resolution**3)
    fresh = torch.randint(0, 2, density.shape, generator=generator).float()
    bits, mean = occupancy_update(density, fresh)
    assert bits.dtype == torch.uint8 and bits.shape == (count, resolution**3 // 8)
    check("mean", mean, fresh.mean(), fresh.double().mean())
    noise = torch.rand(count * resolution**3, 3, generator=generator)
    points = occupancy_points(resolution, count, bound, noise)
    owner = torch.arange(count).repeat_interleave(resolution**3)
    inner = torch.tensor([0.0] + [2.0**c for c in range(count - 1)])[owner]
    is_own = points.abs().amax(1) > inner
    assert is_own.sum() > 300
    is_set = occupancy_query(bits, points, bound, resolution)
    assert torch.equal(is_set[is_own], fresh.view(-1)[is_own] > 0)


def test_occupancy_bit_order():
    """Bit b of byte n is cell 8 n + b."""
    fresh = torch.zeros(1, 64)
    fresh[0, [0, 9, 15]] = 1
    bits, _ = occupancy_update(torch.zeros(1, 64), fresh)
    assert bits[0].tolist() == [1, 0b10000010, 0, 0, 0, 0, 0, 0]


def test_occupancy_query_outside():
    """Points outside of the scene, and NaN, are in no set cell."""
    bits = torch.full((1, 8), 255, dtype=torch.uint8)
    x = torch.tensor([[0.0, 0, 0], [0.6, 0.6, -0.6], [0.61, 0, 0], [0, -0.7, 0], [0, 0, float("nan")]])
    assert occupancy_query(bits, x, 0.6, 4).tolist() == [True, True, False, False, False]


def test_occupancy_update():
    """Densities decay, and cells above the threshold or the mean are set."""
    density = torch.tensor([[8.0, 0, 0, 0, 100, 0, 0, 0]])
    fresh = torch.tensor([[2.0, 11, 0, 0, 0, 0, 0, 40]])
    bits, mean = occupancy_update(density, fresh, decay=0.5, threshold=10.0)
    assert density.tolist() == [[4, 11, 0, 0, 50, 0, 0, 40]]
    assert float(mean) == 105 / 8
    assert bits.tolist() == [[0b10010010]]  # above 10, which is below the mean
    bits, mean = occupancy_update(density, torch.zeros_like(density), decay=0.125, threshold=10.0)
    assert float(mean) == 105 / 64
    assert bits.tolist() == [[0b10010000]]  # above the mean, 1.6
    bits, mean = occupancy_update(torch.zeros(1, 8), torch.zeros(1, 8))
    assert bits.tolist() == [[0]] and float(mean) == 0
