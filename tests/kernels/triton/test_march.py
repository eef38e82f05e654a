"""The kernels of marching: every sample equal to the reference's bit for bit, capacity, gradients of rays.

The kernels round as the reference does, one operation at a time, so nothing is allowed for samples at a cell's edge.
"""

import math
import random

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.kernels import Samples, cascades, march, march_reference
from dream_fast.kernels._core.launch import INTERPRETED
from dream_fast.kernels.rays import march as march_module


@pytest.fixture
def tiles(monkeypatch):
    """tiles(rays, steps) sets the tile of all passes: the interpreter takes as long as there are programs."""
    config = march_module._march_config

    def use(rays, steps):
        sizes = {f"{name}_rays": rays for name in ("count", "write", "bwd")}
        sizes |= {f"{name}_steps": steps for name in ("count", "write", "bwd")}
        monkeypatch.setattr(march_module, "_march_config", lambda *shape: config(*shape)._replace(**sizes))

    return use


def rays(number, seed, device, spread=0.5):
    """Rays from around the scene, and from within, towards somewhere near its middle; some miss it."""
    generator = torch.Generator().manual_seed(seed)
    origins = torch.nn.functional.normalize(torch.randn(number, 3, generator=generator), dim=1) * 3
    origins[1::5] *= 0.1
    directions = torch.nn.functional.normalize(torch.randn(number, 3, generator=generator) * spread - origins, dim=1)
    directions[2::7, 0] = 0.0  # along a face; not quite of unit length, which nothing depends on
    return origins.to(device), directions.to(device)


def random_bits(bound, resolution, device, filling=0.5, seed=0):
    """Runs of set and unset bytes: objects along z with space between."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (cascades(bound), resolution**3 // 8), generator=generator, dtype=torch.uint8)
    here = torch.rand(bits.shape, generator=generator) < filling
    return torch.where(here, bits | 0b01100110, 0).to(device)


def compare(origins, directions, bits, *, reference=None, **options) -> Samples:
    got = march(origins, directions, bits, **options)
    expected = march_reference(origins, directions, bits, **options)
    for name in Samples._fields:
        value, reference_value = getattr(got, name), getattr(expected, name)
        assert value.dtype == reference_value.dtype and value.shape == reference_value.shape, name
        assert torch.equal(value, reference_value), (
            f"{name}: {(value != reference_value).sum()} of {value.numel()} differ"
        )
    return got


def compare_gradients(origins, directions, bits, **options):
    """Check the gradients of the positions; the upstream gradient of padding is NaN, which must not show."""
    upstream = torch.randn(options["capacity"], 3, generator=torch.Generator().manual_seed(1)).to(origins.device)
    grads = []
    for run in (march, march_reference):
        leaves = [tensor.detach().requires_grad_() for tensor in (origins, directions)]
        out = run(*leaves, bits, **options)
        assert out.positions.requires_grad and not out.t.requires_grad and not out.dt.requires_grad
        upstream[int(out.count) :] = math.nan
        grads.append(torch.autograd.grad(out.positions, leaves, upstream))
    count = int(out.count)
    ids, t, used = out.ray_ids[:count], out.t[:count].double(), upstream[:count].double()
    for name, got, single, part in zip(("origins", "directions"), *grads, (used, t[:, None] * used), strict=True):
        check(f"gradient of {name}", got, single, torch.zeros_like(got).double().index_add_(0, ids, part))


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize(("bound", "dt_gamma"), [(1.0, 0.0), (2.5, 0.01)])
def test_march_small_shapes(number, bound, dt_gamma, device, deterministic):
    """Shapes around one element and one block, and none at all, match the reference."""
    origins, directions = rays(number, 1, device)
    bits = random_bits(bound, 16, device)
    options = {"bound": bound, "resolution": 16, "max_steps": 64, "dt_gamma": dt_gamma, "capacity": 301}
    compare(origins, directions, bits, **options)
    compare_gradients(origins, directions, bits, **options)


SCENES = [(1.0, 16), (0.6, 32), (2.5, 16), (7.0, 16)]


@pytest.mark.fuzz
def test_march_random_settings(seed, device, tiles):
    """Random sizes and settings match the reference."""
    rng = random.Random(seed)
    if INTERPRETED:
        tiles(16, 32)
    number = 2 * rng.randint(1, 20 if INTERPRETED else 4000) + 1
    bound, resolution = SCENES[seed % 4]
    options = {
        "bound": bound,
        "resolution": resolution,
        "max_steps": rng.randint(1, 100 if INTERPRETED else 1200),
        "dt_gamma": 0.0 if seed % 3 else rng.uniform(0, 0.05),
        "min_near": rng.uniform(0, 0.3),
        "perturb": None
        if seed % 4 == 3
        else torch.rand(number, generator=torch.Generator().manual_seed(seed)).to(device),
    }
    origins, directions = rays(number, seed, device, spread=rng.uniform(0.1, 2) * bound)
    origins = origins * rng.uniform(0.2, 1.5)
    bits = random_bits(bound, resolution, device, filling=rng.choice([0.01, 0.3, 1.0]), seed=seed)
    no_capacity = march_reference(origins, directions, bits, capacity=0, **options)
    assert int(no_capacity.count) == 0
    capacity = 2 * rng.randint(0, number * 40) + 1
    compare(origins, directions, bits, capacity=capacity, **options)
    compare_gradients(origins, directions, bits, capacity=capacity, **options)


@pytest.mark.parametrize(("width", "steps"), [(1, 128), (2, 64), (4, 32), (16, 32)])
@pytest.mark.parametrize("dt_gamma", [0.0, 0.01])
def test_march_tiles(width, steps, dt_gamma, device, tiles):
    """Results match the reference for every size of the tile."""
    tiles(width, steps if dt_gamma == 0 else 32)
    origins, directions = rays(5, 3, device)
    options = {"bound": 2.5, "resolution": 16, "max_steps": 90, "dt_gamma": dt_gamma, "capacity": 500}
    compare(origins, directions, random_bits(2.5, 16, device), **options)


def test_march_overflow(device, tiles, deterministic):
    """Every capacity around the number of samples gives the samples of the reference."""
    tiles(4, 64)
    origins, directions = rays(6, 2, device)
    bits = random_bits(1.0, 16, device)
    options = {"bound": 1.0, "resolution": 16, "max_steps": 64}
    count = int(march_reference(origins, directions, bits, capacity=1000, **options).count)
    for capacity in (0, 1, count - 1, count, count + 1):
        out = compare(origins, directions, bits, capacity=capacity, **options)
        assert bool(out.overflow) == (capacity < count)


def test_march_scan_blocks(device, monkeypatch, tiles):
    """Three blocks of 16 rays, the last not full; on a GPU the same with the true size."""
    config = march_module._march_config
    number = 41
    if INTERPRETED:
        tiles(16, 32)
        config = march_module._march_config
        monkeypatch.setattr(march_module, "_march_config", lambda *shape: config(*shape)._replace(scan_block=16))
    else:
        number = 1024 * 1100 + 1  # more blocks than a program of the scan adds up at once
    origins, directions = rays(number, 4, device)
    options = {"bound": 1.0, "resolution": 16, "max_steps": 32, "capacity": 20 * number}
    out = compare(origins, directions, random_bits(1.0, 16, device), **options)
    assert int(out.count) > number


def test_march_invalid_rays(device):
    """Directions of 0 and NaN neither hang nor write anywhere else."""
    origins, directions = rays(3, 5, device)
    directions[1] = math.nan
    # A ray without a direction never leaves the cube: the interpreter is too slow for so many steps.
    origins[2], directions[2] = 5.0 if INTERPRETED else 0.0, 0.0
    bits = random_bits(1.0, 16, device, filling=1.0)
    for dt_gamma in (0.0, 0.01):
        options = {"bound": 1.0, "resolution": 16, "max_steps": 32, "capacity": 64, "dt_gamma": dt_gamma}
        out = march(origins, directions, bits, **options)
        alone = march(origins[:1], directions[:1], bits, **options)
        assert torch.equal(out.offsets[:2], alone.offsets) and torch.equal(out.t[:20], alone.t[:20])


def test_march_non_contiguous(device):
    """Strided inputs give the results of contiguous ones."""
    origins, directions = (tensor.t().contiguous().t() for tensor in rays(4, 6, device))
    perturb = torch.rand(8, generator=torch.Generator().manual_seed(0)).to(device)[::2]
    bits = torch.stack([random_bits(1.0, 16, device)] * 2, -1)[..., 0]
    options = {"bound": 1.0, "resolution": 16, "max_steps": 32, "capacity": 150, "perturb": perturb}
    compare(origins, directions, bits, **options)
    compare_gradients(origins, directions, bits, **options)


def test_march_repeats(device, deterministic):
    """Repeats are equal bit for bit."""
    leaves = [tensor.requires_grad_() for tensor in rays(3 if INTERPRETED else 3000, 7, device)]
    bits = random_bits(1.0, 16, device)
    results = []
    for _ in range(10):
        out = march(*leaves, bits, bound=1.0, resolution=16, max_steps=64, capacity=40 * len(leaves[0]))
        results.append([*out, *torch.autograd.grad(out.positions.square().sum(), leaves)])
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_march_refuses_second_order(device):
    """A second derivative raises instead of being wrong."""
    leaves = [tensor.requires_grad_() for tensor in rays(2, 8, device)]
    out = march(*leaves, random_bits(1.0, 16, device), bound=1.0, resolution=16, max_steps=32, capacity=100)
    upstream = torch.ones_like(out.positions).requires_grad_()
    (grad,) = torch.autograd.grad(out.positions, leaves[:1], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_march_refuses_fp64(device):
    """The kernels refuse fp64, which only the reference computes in."""
    origins, directions = (tensor.double() for tensor in rays(2, 9, device))
    with pytest.raises(TypeError, match="origins is float64, which the kernels do not compute in"):
        march(origins, directions, random_bits(1.0, 16, device), bound=1.0, resolution=16, capacity=5)


def camera_rays(side, device):
    axis = torch.linspace(-0.17, 0.17, side, device=device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    directions = torch.nn.functional.normalize(torch.stack([x, y, -torch.ones_like(x)], -1).view(-1, 3), dim=1)
    return torch.tensor([0.0, 0.0, 3.2], device=device).expand_as(directions).contiguous(), directions


@pytest.mark.full_size("host synchronisations, graphs and streams exist only there")
@pytest.mark.parametrize("dt_gamma", [0.0, 0.005])
def test_march_stream_and_graph(dt_gamma, device, everywhere):
    """Results are the same on another stream and from a CUDA graph, without a synchronisation."""
    leaves = [tensor.requires_grad_() for tensor in camera_rays(128, device)]
    bits = random_bits(1.0, 128, device)
    upstream = torch.randn(128 * 128 * 400, 3, device=device)

    def step():
        options = {"bound": 1.0, "resolution": 128, "capacity": len(upstream), "dt_gamma": dt_gamma}
        out = march(*leaves, bits, **options)
        return [*(x.detach() for x in out), *torch.autograd.grad(out.positions, leaves, upstream)]

    expected, repeats = everywhere(step)
    for repeat in repeats:
        assert all(torch.equal(a, b) for a, b in zip(expected, repeat, strict=True))
    if torch.cuda.device_count() > 1:
        elsewhere = [tensor.to("cuda:1") for tensor in (*leaves, bits)]
        out = march(*elsewhere, bound=1.0, resolution=128, capacity=len(upstream), dt_gamma=dt_gamma)
        assert out.t.device.index == 1 and torch.equal(out.t.cpu(), expected[2].cpu())


@pytest.mark.full_size("compiled code runs only there")
def test_march_compiled(device):
    """Compiled code is as accurate as eager code."""
    origins, directions = camera_rays(64, device)
    bits = random_bits(1.0, 128, device)

    def loss(origins, directions):
        out = march(origins, directions, bits, bound=1.0, resolution=128, capacity=64 * 64 * 300)
        return out.positions.sin().sum(), out.t, out.count

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [origins.clone().requires_grad_(), directions.clone().requires_grad_()]
        value, t, count = run(*leaves)
        value.backward()
        results.append((t, count, leaves[0].grad, leaves[1].grad))
    eager, compiled = results
    assert torch.equal(compiled[0], eager[0]) and torch.equal(compiled[1], eager[1])
    # The same samples in fp64: positions are origins + t * directions.
    rows = march(origins, directions, bits, bound=1.0, resolution=128, capacity=64 * 64 * 300).ray_ids[: int(eager[1])]
    t = eager[0][: int(eager[1]), None].double()
    exact = [part.double().requires_grad_() for part in (origins, directions)]
    (exact[0][rows] + t * exact[1][rows]).sin().sum().backward()
    for name, *grads in zip(("origins", "directions"), compiled[2:], eager[2:], exact, strict=True):
        check(f"gradient of {name}", *grads[:2], grads[2].grad)


@pytest.mark.full_size("20 GB of samples")
def test_march_beyond_int32(device):
    """Elements past 2^31 come out as they do alone."""
    side = 1150
    origins, directions = camera_rays(side, device)
    bits = torch.full((1, 128**3 // 8), 255, dtype=torch.uint8, device=device)
    options = {"bound": 1.0, "resolution": 128}
    out = march(origins, directions, bits, capacity=800_000_000, **options)
    count = int(out.count)
    assert 3 * count > 2**31 and not out.overflow
    last = slice(int(out.offsets[-2]), count)
    alone = march(origins[-1:], directions[-1:], bits, capacity=last.stop - last.start, **options)
    assert torch.equal(out.positions[last], alone.positions) and torch.equal(out.t[last], alone.t)
    assert (out.ray_ids[last] == side * side - 1).all() and not out.positions[count : count + 5_000_000].any()
