"""The kernels of compositing: all outputs and gradients against fp64, ragged rays, the stop, padding, channels."""

import importlib
import math
import os
import random

import pytest
import torch

from dream_fast.bench.accuracy import BLOCK, check
from dream_fast.kernels import composite, composite_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SEEDS = 12 if INTERPRETED else 150
# `dream_fast.kernels.composite` names the function.
MODULE = importlib.import_module("dream_fast.kernels.composite")
OUTPUTS = ("values", "opacity", "depth", "weights")
LENGTHS = (3, 0, 1, 150, 0, 40)


@pytest.fixture
def tiles(monkeypatch):
    """tiles(rays, rows) sets the tiles of both passes; for the interpreter, whose time is the number of programs."""
    config = MODULE._composite_config

    def use(rays, rows):
        passes = {"FORWARD_RAYS": rays, "BACKWARD_RAYS": rays, "FORWARD_ROWS": rows, "BACKWARD_ROWS": rows}
        monkeypatch.setattr(MODULE, "_composite_config", lambda: {**config(), **passes})

    return use


def inputs(lengths, device, *, padding=0, channels=3, dtype=torch.float32, scale=3.0, seed=0):
    """sigma, values, t, dt, offsets; padding rows hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    count = int(ends[-1])
    rows = count + padding
    sigma = torch.rand(rows, generator=generator) ** 3 * scale
    values = torch.rand(rows, channels, generator=generator) * 2 - 0.5
    dt = torch.rand(rows, generator=generator) * 0.2 + 0.01
    t = torch.rand(rows, generator=generator) * 4
    tensors = [tensor.to(dtype) for tensor in (sigma, values, t, dt)]
    for tensor in tensors:
        tensor[count:] = math.nan
    return [*(tensor.to(device) for tensor in tensors), ends.to(device)]


def compare(tensors, *, used=OUTPUTS, count=None, stop=1e-4):
    """Outputs, and gradients of the used outputs, of the kernels; errors against fp64 as large as the reference's."""
    sigma, values, t, dt, offsets = tensors
    generator = torch.Generator().manual_seed(1)
    shapes = {"values": (len(offsets) - 1, values.shape[1]), "weights": sigma.shape}
    upstream = {
        name: torch.randn(shapes.get(name, (len(offsets) - 1,)), generator=generator).to(sigma.device, sigma.dtype)
        for name in OUTPUTS
    }
    # Of padding nothing may be read.
    upstream["weights"][int(offsets[-1] if count is None else torch.minimum(count, offsets[-1])) :] = math.nan
    found = []
    for run, dtype in (
        (composite, None),
        (composite_reference, None),
        (composite_reference, torch.float64),
    ):
        parts = [tensor if dtype is None else tensor.to(dtype) for tensor in (sigma, values, t, dt)]
        leaves = [part.detach().clone().requires_grad_() for part in parts[:2]]
        out = run(*leaves, *parts[2:], offsets, count=count, stop=stop)
        grads = torch.autograd.grad(
            [getattr(out, name) for name in used],
            leaves,
            [upstream[name].to(out.values.dtype) for name in used],
            allow_unused=True,
        )
        grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
        found.append([*(value.detach() for value in out), *grads])
    # Samples of which nothing is seen have gradients of next to nothing, and many of them would make the others' errors
    # large in relation to all together.
    seen = found[2][OUTPUTS.index("weights")] > torch.finfo(torch.float32).eps
    for name, got, single, exact in zip((*OUTPUTS, "gradient of sigma", "gradient of values"), *found, strict=True):
        assert got.dtype == single.dtype
        if "gradient" in name and seen.sum() >= BLOCK:
            check(f"{name}, of what is seen", got[seen], single[seen], exact[seen])
            mask = seen.view(-1, *[1] * (got.dim() - 1))
            got, single = (torch.where(mask, exact.to(part.dtype), part) for part in (got, single))
        check(name, got, single, exact)
    return found[0]


@pytest.mark.parametrize("lengths", [(), (0,), (1,), (2, 0, 33), (64, 65, 128, 129)])
def test_small_shapes(lengths, device, deterministic):
    compare(inputs(lengths, device, padding=3))


@pytest.mark.parametrize("used", [(name,) for name in OUTPUTS] + [("values", "weights"), ("opacity", "depth")])
def test_gradient_of_every_output(used, device, tiles, deterministic):
    tiles(4, 32)
    compare(inputs(LENGTHS, device, padding=5), used=used)


@pytest.mark.parametrize("channels", [0, 1, 2, 6, 8, 9, 20])
def test_channels(channels, device, tiles, deterministic):
    tiles(8, 32)
    compare(inputs(LENGTHS, device, padding=5, channels=channels), used=("values", "opacity", "weights"))


@pytest.mark.parametrize("stop", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("scale", [0.01, 3.0, 100.0, 1e6])
def test_thin_and_thick(scale, stop, device, tiles, deterministic):
    tiles(8, 32)
    compare(inputs(LENGTHS, device, padding=5, scale=scale), stop=stop)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes(dtype, device, tiles):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts digits off where bfloat16 is to be rounded")
    tiles(8, 32)
    compare(inputs(LENGTHS, device, padding=5, dtype=dtype))


def test_mixed_dtypes(device, tiles):
    """sigma in fp32, values as a field in half precision gives them."""
    tiles(8, 32)
    sigma, values, *rest = inputs(LENGTHS, device, padding=5)
    compare([sigma, values.half(), *rest])


COMBINATIONS = [
    (3, ("values",), False),
    (3, OUTPUTS, True),
    (6, ("values", "weights"), True),
    (1, ("opacity", "depth"), False),
    (11, OUTPUTS, True),
]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_settings(seed, device, tiles):
    rng = random.Random(seed)
    if INTERPRETED:
        tiles(8, 32)
    rays = 2 * rng.randint(0, 15 if INTERPRETED else 3000) + 1
    longest = rng.choice([1, 5, 40, 100 if INTERPRETED else 1500])
    lengths = [rng.randint(0, longest) if rng.random() < 0.8 else 0 for _ in range(rays)]
    channels, used, counted = COMBINATIONS[seed % len(COMBINATIONS)]
    padding = 2 * rng.randint(0, 60) + 1 - sum(lengths) % 2 + 1
    tensors = inputs(lengths, device, padding=padding, channels=channels, scale=10 ** rng.uniform(-2, 3), seed=seed)
    # Sometimes the count cuts the last rays short.
    count = torch.tensor(rng.choice([sum(lengths), rng.randint(0, sum(lengths))]), device=device) if counted else None
    compare(tensors, used=used, count=count, stop=rng.choice([0.0, 1e-4, 1e-3, rng.random() * 0.9]))


@pytest.mark.parametrize(("rays", "rows"), [(1, 128), (1, 32), (2, 64), (4, 32)])
def test_tiles(rays, rows, device, tiles):
    tiles(rays, rows)
    compare(inputs((129, 3, 0, 64, 1), device, padding=1))


def test_much_padding_and_count(device, tiles, deterministic):
    """More padding than a program fills; a count in the middle of a ray; a count past the buffer."""
    tiles(8, 128)
    tensors = inputs((5, 9, 30), device, padding=4500)
    for count in (0, 20, 44, 10**6):
        compare(tensors, count=torch.tensor(count, device=device))


def test_offsets_past_the_buffer(device, tiles):
    tiles(8, 32)
    *tensors, offsets = inputs((5, 9, 30), device)
    tensors = [tensor[:20].clone() for tensor in tensors]
    compare([*tensors, offsets])


def test_depth_of_a_billion_in_front_of_thin_rays(device):
    thick, thin, rays = 200, 50, 100
    density = (1e-3 * (1 + torch.arange(rays) / rays)).repeat_interleave(thin).to(device)
    sigma = torch.cat([torch.full((thick,), 1e8, device=device), density])
    t, dt = torch.ones_like(sigma), torch.full_like(sigma, 0.05)
    offsets = thick + thin * torch.arange(rays + 1, device=device)
    out = composite(sigma, t[:, None], t, dt, torch.cat([torch.zeros_like(offsets[:1]), offsets]), stop=0.0)
    t, dt = t[thick:], dt[thick:]
    alone = composite_reference(density, t[:, None], t, dt, offsets - thick, stop=0.0)
    depth = (density.double() * dt.double()).view(rays, thin).sum(1)
    check("opacity", out.opacity[1:], alone.opacity, -torch.expm1(-depth))
    assert float(out.opacity[0]) == 1.0


def test_not_a_number_shows(device):
    sigma, values, t, dt, offsets = inputs((4, 4), device)
    sigma[1] = math.nan
    out = composite(sigma.requires_grad_(), values, t, dt, offsets)
    assert torch.isnan(out.opacity[0]) and torch.isfinite(out.opacity[1])
    (grad,) = torch.autograd.grad(out.values.sum(), sigma)
    assert torch.isnan(grad[:4]).any() and torch.isfinite(grad[4:]).all()


def test_non_contiguous(device, tiles):
    tiles(4, 32)
    sigma, values, t, dt, offsets = inputs((5, 40, 2), device)
    wide = torch.stack([sigma, t, dt], 1)
    columns = values.t().contiguous().t()
    found = compare([wide[:, 0], columns, wide[:, 1], wide[:, 2], offsets])
    dense = compare([sigma, values, t, dt, offsets])
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
    # An upstream gradient that is one number seen many times.
    leaf = sigma.clone().requires_grad_()
    composite(leaf, values, t, dt, offsets).values.sum().backward()
    other = sigma.clone().requires_grad_()
    composite(other, values, t, dt, offsets).values.backward(torch.ones(3, 3, device=device))
    assert torch.equal(leaf.grad, other.grad)


def test_repeats(device, tiles, deterministic):
    if INTERPRETED:
        tiles(4, 32)
    lengths = (50, 0, 70) if INTERPRETED else (50, 0, 700, 3) * 500
    sigma, values, t, dt, offsets = inputs(lengths, device, padding=5)
    leaves = [sigma.requires_grad_(), values.requires_grad_()]
    results = []
    for _ in range(10):
        out = composite(*leaves, t, dt, offsets)
        loss = out.values.square().sum() + out.depth.sum() + out.weights.square().sum()
        results.append([*out, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_second_order_is_refused(device):
    sigma, values, t, dt, offsets = inputs((5,), device)
    upstream = torch.ones(1, 3, device=device, requires_grad=True)
    out = composite(sigma.requires_grad_(), values, t, dt, offsets)
    (grad,) = torch.autograd.grad(out.values, sigma, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_complains_about_doubles(device):
    sigma, values, t, dt, offsets = inputs((5,), device)
    with pytest.raises(TypeError, match="values is float64, which the kernels do not compute in"):
        composite(sigma, values.double(), t, dt, offsets)


def step(tensors, upstream):
    sigma, values, t, dt, offsets = tensors
    leaves = [sigma.detach().requires_grad_(), values.detach().requires_grad_()]
    out = composite(*leaves, t, dt, offsets, count=offsets[-1])
    grads = torch.autograd.grad([out.values, out.opacity, out.weights], leaves, upstream)
    return [*(value.detach() for value in out), *grads]


@pytest.mark.full_size("host synchronisations, graphs and streams exist only there")
def test_no_synchronisation_graph_and_stream(device, everywhere):
    tensors = inputs([(31 * i) % 300 for i in range(5000)], device, padding=1000)
    upstream = [torch.randn(5000, 3, device=device), torch.randn(5000, device=device), torch.randn_like(tensors[0])]
    expected, repeats = everywhere(lambda: step(tensors, upstream))
    for found in repeats:
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    if torch.cuda.device_count() > 1:
        there = step([tensor.to("cuda:1") for tensor in tensors], [grad.to("cuda:1") for grad in upstream])
        assert all(b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, there, strict=True))


@pytest.mark.full_size("compiled code runs only there")
@pytest.mark.parametrize("outputs", [("values",), OUTPUTS])
def test_compiled(outputs, device, compare_compiled):
    sigma, values, t, dt, offsets = inputs([(31 * i) % 300 for i in range(500)], device)

    def loss(operator, sigma, values):
        steps = [part.to(sigma.dtype) for part in (t, dt)]
        out = operator(2 * sigma, values.square(), *steps, offsets, count=offsets[-1])
        return sum(getattr(out, name).square().sum() for name in outputs)

    compare_compiled(loss, composite, composite_reference, [sigma, values])


@pytest.mark.full_size("30 GB of values and gradients")
def test_more_than_two_to_the_31_numbers(device):
    each, rays, channels = 1000, 360_000, 6
    rows = each * rays
    assert rows * channels > 2**31
    sigma = torch.rand(rows, device=device) * 0.01
    values = torch.rand(rows, channels, device=device)
    t, dt = torch.rand(rows, device=device), torch.full((rows,), 0.1, device=device)
    offsets = torch.arange(rays + 1, device=device) * each
    last = slice(rows - each, rows)
    upstream = torch.randn(rays, channels, device=device)
    found = []
    for part, ends, grad in ((slice(0, rows), offsets, upstream), (last, offsets[:2], upstream[-1:])):
        leaves = [tensor[part].detach().requires_grad_() for tensor in (sigma, values)]
        out = composite(*leaves, t[part], dt[part], ends)
        found.append([out.values[-1], out.weights[-each:], *torch.autograd.grad(out.values, leaves, grad)])
    for whole, alone in zip(*found, strict=True):
        assert torch.equal(whole[-len(alone) :], alone)
