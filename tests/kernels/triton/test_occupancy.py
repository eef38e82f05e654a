"""Kernels of the occupancy update; points and queries on the device."""

import random

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.kernels import cascades, occupancy_points, occupancy_query, occupancy_update, occupancy_update_reference
from dream_fast.kernels._core.launch import INTERPRETED


def uniform(*shape, seed, device):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def compare(density, fresh, **options):
    """Check that the grid equals the reference's bit for bit, and the bits those of the definition."""
    before = density.clone()
    bits, mean = occupancy_update(density, fresh, **options)
    single, exact = before.clone(), before.double()
    _, single_mean = occupancy_update_reference(single, fresh, **options)
    _, exact_mean = occupancy_update_reference(exact, fresh.double(), **options)
    assert torch.equal(density, single)
    check("mean", mean, single_mean, density.double().mean())
    assert mean.dtype == torch.float32 and mean.shape == () and exact_mean.shape == ()
    # The definition, from the mean that came out.
    cells = (density > mean.clamp(max=options.get("threshold", 10.0))).view(density.shape[0], -1, 8)
    expected = (cells.int() << torch.arange(8, device=density.device)).sum(-1).to(torch.uint8)
    assert bits.dtype == torch.uint8 and torch.equal(bits, expected)
    return bits, mean


@pytest.mark.parametrize(("count", "cells"), [(1, 8), (2, 64), (1, 4096), (1, 4104), (3, 1000), (2, 13824)])
def test_occupancy_small_shapes(count, cells, device):
    """Shapes around one element and one block, and none at all, match the reference."""
    density = uniform(count, cells, seed=1, device=device) * 20
    compare(density, uniform(count, cells, seed=2, device=device) * 20)


@pytest.mark.fuzz
def test_occupancy_random_settings(seed, device):
    """Random sizes and settings match the reference."""
    rng = random.Random(seed)
    count, cells = rng.randint(1, 4), 8 * rng.randint(1, 400 if INTERPRETED else 200_000)
    scale = 10 ** rng.uniform(-3, 3)
    density = scale * uniform(count, cells, seed=2 * seed, device=device)
    fresh = scale * uniform(count, cells, seed=2 * seed + 1, device=device) ** 4
    compare(density, fresh, decay=rng.random(), threshold=10 ** rng.uniform(-3, 3))


def test_occupancy_equal_cells(device):
    """Cells of one density do not exceed their mean."""
    density = torch.full((1, 3 * 4096 + 1352), 0.3, device=device)
    bits, mean = occupancy_update(density, torch.zeros_like(density), decay=1.0)
    assert not bits.any() and float(mean) == float(density[0, 0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 / 0 in the interpreter
def test_occupancy_empty(device):
    """A grid without cells has a mean of NaN."""
    bits, mean = occupancy_update(torch.zeros(0, 64, device=device), torch.zeros(0, 64, device=device))
    assert bits.shape == (0, 8) and torch.isnan(mean)


def test_occupancy_nan(device):
    """A NaN shows in the mean and sets no cell."""
    density = torch.ones(1, 64, device=device)
    fresh = density.clone()
    fresh[0, 5] = float("nan")
    bits, mean = occupancy_update(density, fresh)
    assert torch.isnan(mean) and torch.isnan(density[0, 5]) and not bits.any()


def test_occupancy_non_contiguous(device):
    """Strided inputs give the results of contiguous ones."""
    wide = uniform(2, 128, seed=3, device=device) * 20
    density, fresh = wide[:, ::2], uniform(64, 2, seed=4, device=device).t() * 20
    dense = density.clone()
    bits, _ = occupancy_update(density, fresh)
    expected, _ = occupancy_update(dense, fresh.contiguous())
    assert torch.equal(density, dense) and torch.equal(wide[:, ::2], dense) and torch.equal(bits, expected)


def test_occupancy_repeats(device):
    """Repeats are equal bit for bit."""
    start, fresh = (uniform(1, 5000, seed=seed, device=device) for seed in (5, 6))
    results = [occupancy_update(start.clone(), fresh) for _ in range(10)]
    assert all(torch.equal(bits, results[0][0]) and torch.equal(mean, results[0][1]) for bits, mean in results)


def test_occupancy_refuses_fp64(device):
    """The kernels refuse fp64, which only the reference computes in."""
    density = torch.zeros(1, 8, device=device, dtype=torch.float64)
    with pytest.raises(TypeError, match="density is float64, which the kernels do not compute in"):
        occupancy_update(density, density.clone())


@pytest.mark.parametrize("bound", [0.6, 1.0, 2.5])
def test_occupancy_points_and_queries(bound, device):
    """Points and queries equal those on a CPU, which the test of the reference compares with cells counted by hand."""
    noise = uniform(cascades(bound) * 512, 3, seed=7, device="cpu")
    points = occupancy_points(8, cascades(bound), bound, noise.to(device))
    assert torch.equal(points.cpu(), occupancy_points(8, cascades(bound), bound, noise))
    bits = torch.randint(0, 256, (cascades(bound), 64), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)
    is_set = occupancy_query(bits.to(device), points, bound, 8)
    assert torch.equal(is_set.cpu(), occupancy_query(bits, points.cpu(), bound, 8))


@pytest.mark.full_size("host synchronisations and graphs exist only there")
def test_occupancy_graph(device):
    """Results are the same from a CUDA graph, without a synchronisation."""
    density, fresh = (uniform(3, 128**3, seed=seed, device=device) * 20 for seed in (9, 10))
    noise = uniform(3 * 128**3, 3, seed=11, device=device)

    def update(density):
        points = occupancy_points(128, 3, 4.0, noise)
        bits, mean = occupancy_update(density, fresh)
        return bits, mean, occupancy_query(bits, points, 4.0, 128)

    expected = update(density.clone())
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = update(density.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static = density.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = update(static)
    graph.replay()
    for a, b, c in zip(expected, again, captured, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.full_size("needs a second GPU and streams")
def test_occupancy_stream_and_device(device):
    """Results are the same on another stream and on another GPU."""
    density, fresh = (uniform(1, 64**3, seed=seed, device=device) for seed in (12, 13))
    expected = occupancy_update(density.clone(), fresh)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = occupancy_update(density.clone(), fresh)
    stream.synchronize()
    assert torch.equal(got[0], expected[0])
    if torch.cuda.device_count() > 1:
        got = occupancy_update(density.to("cuda:1"), fresh.to("cuda:1"))
        assert got[0].device.index == 1 and torch.equal(got[0].cpu(), expected[0].cpu())
