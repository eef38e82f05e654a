"""The kernels of the hash grid: features and gradients to second order against fp64, masks, padding, repeats."""

import math
import random

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.kernels import HashGridSpec, hash_grid, hash_grid_reference
from dream_fast.kernels._core.launch import INTERPRETED
from dream_fast.kernels.grid import gradients as grid_gradients
from dream_fast.kernels.grid import hash_grid as hash_grid_module

HALVES = [torch.float16]
if not INTERPRETED:  # the interpreter cuts fp32 to bfloat16 off instead of rounding it
    HALVES.append(torch.bfloat16)
# Three dense levels and two hashed ones.
SMALL = HashGridSpec(levels=5, features=2, log2_entries=8, base_resolution=4, max_resolution=16)
# One of each.
TINY = HashGridSpec(levels=2, features=2, log2_entries=6, base_resolution=4, max_resolution=7)


def positions(n, seed=0, *, outside=True):
    """Points on a ray, then at random, some outside: multiples of 2^-12, whose cells are the same in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 4097, (n, 3), generator=generator)
    x[: n // 2] = x[:1] // 2 + torch.arange(n // 2)[:, None] * torch.tensor([3, 5, 2])
    if outside and n > 4:
        x[-1, 0], x[-2, 1] = 4100, -1
    return (x / 4096).clamp(max=1.01)


def inputs(spec, n, device, seed=0, dtype=torch.float32):
    """x [n, 3], table, upstream gradient [n, L F] of `dtype`, tangent [n, 3]."""
    generator = torch.Generator().manual_seed(seed + 1000)
    table = torch.randn(spec.rows, spec.features, generator=generator)
    upstream = torch.randn(n, spec.channels, generator=generator).to(dtype)
    tangent = torch.randn(n, 3, generator=generator)
    return [tensor.to(device) for tensor in (positions(n, seed), table, upstream, tangent)]


def gradients(op, tensors, spec, precision=None, *, second=True, **options):
    """Features, both gradients, and of the position gradient along the tangent all three gradients."""
    x, table, upstream, tangent = (t.detach().to(precision or t.dtype) for t in tensors)
    x, table, upstream = (t.requires_grad_() for t in (x, table, upstream))
    out = op(x, table, spec, **options)
    grad_x, grad_table = torch.autograd.grad(out, (x, table), upstream, create_graph=second)
    results = [out, grad_x, grad_table]
    if second:
        leaves = (x, table, upstream)
        second_grads = torch.autograd.grad(grad_x, leaves, tangent, allow_unused=True)
        results += [torch.zeros_like(a) if b is None else b for a, b in zip(leaves, second_grads, strict=True)]
    return [result.detach() for result in results]


NAMES = ("features", "x", "table", "x of x", "table of x", "upstream of x")


def compare(tensors, spec, *, dtype=None, **options):
    got = gradients(hash_grid, tensors, spec, dtype=dtype, **options)
    single = gradients(hash_grid_reference, tensors, spec, dtype=dtype, **options)
    rounded = list(tensors)
    if dtype is not None:  # the table's rounding is part of the definition
        rounded[1] = tensors[1].to(dtype).float()
    exact = gradients(hash_grid_reference, rounded, spec, torch.float64, **options)
    for name, value, reference, truth in zip(NAMES, got, single, exact, strict=True):
        check(name, value, reference, truth)
    return got


@pytest.mark.parametrize("interpolation", ["smoothstep", "linear"])
@pytest.mark.parametrize("features", [1, 2, 4])
def test_hash_grid_gradients(device, features, interpolation):
    """Features and gradients to second order, for 1, 2 and 4 features and both interpolations."""
    spec = HashGridSpec(
        levels=2, features=features, log2_entries=6, base_resolution=4, max_resolution=9, interpolation=interpolation
    )
    compare(inputs(spec, 130, device), spec)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("features", "rounds"), [(1, True), (2, False), (2, True)])
def test_hash_grid_half_precision(device, features, rounds, dtype, monkeypatch):
    """The same in 16 bits, where the whole table is rounded and where each entry is."""
    monkeypatch.setattr(hash_grid_module, "_rounds_table", lambda n, rows: rounds)
    spec = HashGridSpec(levels=2, features=features, log2_entries=6, base_resolution=4, max_resolution=7)
    out = compare(inputs(spec, 60, device, dtype=dtype), spec, dtype=dtype)[0]
    assert out.dtype == dtype


@pytest.mark.parametrize("run", [1, 4])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_hash_grid_atomics(device, width, run, monkeypatch):
    """The table's gradient with atomics of 1, 2 and 4 numbers, for short and long runs."""
    config = grid_gradients.TableBwdConfig(block=32, run=run, width=width, warps=1)
    monkeypatch.setattr(grid_gradients, "_hash_grid_table_bwd_config", lambda *_: config)
    x, table, upstream, _ = inputs(TINY, 129, device)
    upstream = upstream.half()  # in fp32 so many points into so few rows would be fixed-point numbers
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = table.detach().clone().to(dtype).requires_grad_()
        hash_grid_reference(x.to(dtype), leaf, TINY).backward(upstream.to(dtype))
        grads.append(leaf.grad)
    features = upstream.t().contiguous()
    check("table", grid_gradients.scatter_features(grid_gradients.GridPoints(x), TINY, features=features), *grads)


def test_hash_grid_fixed_point_sums(device):
    """Sums of lanes' runs are added as fixed-point numbers in fp32: any order of lanes gives the same bits."""
    spec = HashGridSpec(levels=2, features=2, log2_entries=3, base_resolution=2, max_resolution=5)
    x, _, upstream, _ = inputs(spec, 1200, device)
    runs = torch.arange(1200, device=device).view(-1, grid_gradients._hash_grid_table_bwd_config(1200, 2, True).run)
    grads = [
        grid_gradients.scatter_features(
            grid_gradients.GridPoints(x[rows]), spec, features=upstream[rows].t().contiguous()
        )
        for rows in (runs.flatten(), runs.flip(0).flatten())
    ]
    assert grads[0].any() and torch.equal(*grads)


@pytest.mark.parametrize("deterministic", [False, True])
def test_hash_grid_features_and_tangent(device, deterministic):
    """Both parts of the table's gradient in one pass, with a scale, a shift and a count."""
    u, table, upstream, tangent = inputs(TINY, 70, device)
    scale, shift, live = 0.5, 0.5, 50
    x = ((u - shift) / scale).contiguous()
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf, point = (t.clone().to(dtype).requires_grad_() for t in (table, u[:live]))
        weights = upstream[:live].to(dtype)
        out = hash_grid_reference(point, leaf, TINY)
        (grad_x,) = torch.autograd.grad(out, point, weights, create_graph=True)
        grads += torch.autograd.grad((out * weights).sum() + (grad_x * tangent[:live].to(dtype)).sum(), leaf)
    upstream[live:], tangent[live:] = math.nan, math.nan
    features = upstream.t().contiguous()
    points = grid_gradients.GridPoints(x, scale, shift, torch.tensor(live, device=device))
    got = grid_gradients.scatter_features(
        points,
        TINY,
        features=features,
        tangent=tangent,
        tangent_features=features,
        deterministic=deterministic,
    )
    check("table", got, *grads)


@pytest.mark.parametrize("n", [0, 1, 129])
def test_hash_grid_odd_sizes(device, n, deterministic):
    """No point, one point and strided inputs give the bits of contiguous ones."""
    x, table, upstream, tangent = inputs(TINY, n, device)
    wide = torch.full((n, 6), math.nan, device=device)
    wide[:, ::2] = x
    wide_table = torch.full((TINY.rows, 4), math.nan, device=device)
    wide_table[:, ::2] = table
    strided = [wide[:, ::2], wide_table[:, ::2], upstream, tangent]
    if n == 0:
        results = gradients(hash_grid, strided, TINY)
        assert results[0].shape == (0, TINY.channels) and not results[2].any() and not results[4].any()
        return
    results = gradients(hash_grid, strided, TINY)
    for a, b in zip(compare([x, table, upstream, tangent], TINY), results, strict=True):
        assert torch.equal(a, b)


def test_hash_grid_upstream_strides(device, deterministic):
    """Transposed and expanded upstream gradients give the bits of contiguous ones."""
    x, table, upstream, tangent = inputs(TINY, 40, device)
    expected = gradients(hash_grid, [x, table, upstream, tangent], TINY)
    transposed = gradients(hash_grid, [x, table, upstream.t().contiguous().t(), tangent], TINY)
    ones = torch.ones((), device=device).expand(40, TINY.channels)
    for a, b in zip(expected, transposed, strict=True):
        assert torch.equal(a, b)
    flat = gradients(hash_grid, [x, table, ones, tangent], TINY, second=False)
    dense = gradients(hash_grid, [x, table, ones.contiguous(), tangent], TINY, second=False)
    for a, b in zip(flat, dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("active", [1, 9])
def test_hash_grid_active_levels(device, active, on_device):
    """Levels from `active_levels` on give zeros and take no gradient, as a number and as a tensor."""
    tensors = inputs(TINY, 40, device)
    levels = torch.tensor(active, device=device) if on_device else active
    out, _, grad_table, *_ = compare(tensors, TINY, active_levels=levels)
    assert not out[:, active * 2 :].any()
    assert not grad_table[TINY.offsets[min(active, 2)] :].any()


@pytest.mark.parametrize("on_device", [False, True])
def test_hash_grid_no_active_level(device, on_device, deterministic):
    """No active level gives zeros and gradients of zero; the reference has no graph then."""
    tensors = inputs(TINY, 40, device)
    results = gradients(hash_grid, tensors, TINY, active_levels=torch.tensor(0, device=device) if on_device else 0)
    assert results[0].shape == (40, TINY.channels) and not any(result.any() for result in results)


def test_hash_grid_clamped_positions(device):
    """At the first and last vertex the gradient passes, as torch's clamp lets it; beyond them it is 0."""
    spec = HashGridSpec(
        levels=2, features=2, log2_entries=6, base_resolution=4, max_resolution=8, interpolation="linear"
    )
    steps = torch.tensor([0, 1 / 16, 3 / 32, 1 / 8, 7 / 8, 29 / 32, 15 / 16, 1])
    x = torch.cartesian_prod(steps, steps[2:6], steps[[3]]).to(device)
    _, grad_x, *_ = compare([x, *inputs(spec, x.shape[0], device)[1:]], spec)
    assert not grad_x[x[:, 0] == 0, 0].any() and grad_x[x[:, 0] == 1 / 8, 0].all()


@pytest.mark.parametrize("live", [0, 33, 40])
def test_hash_grid_count(device, live, deterministic):
    """Rows past the count give zeros, take no gradient and do not change the others' bits."""
    tensors = inputs(TINY, 40, device)
    tensors[0][live + 3 :] = math.nan  # three rows of padding look like points
    for tensor in tensors[2:]:
        tensor[live:] = math.nan
    padded = gradients(hash_grid, tensors, TINY, count=torch.tensor(live, device=device))
    short = [tensors[0][:live], tensors[1], tensors[2][:live], tensors[3][:live]]
    expected = gradients(hash_grid, short, TINY)
    for got, want in zip(padded, expected, strict=True):
        if got.shape == want.shape:
            assert torch.equal(got, want)
        else:
            assert torch.equal(got[:live], want) and not got[live:].any()


def test_hash_grid_outside_points(device):
    """Points outside the cube, NaN and infinity give zeros and take no gradient."""
    x = torch.tensor([[0.5, 0.5, 0.5], [1.0001, 0.5, 0.5], [0.5, -1e-6, 0.5], [0.5, math.nan, 0.5], [math.inf, 0, 0]])
    tensors = [x.to(device), *inputs(TINY, 5, device)[1:]]
    out, grad_x, *_ = gradients(hash_grid, tensors, TINY)
    assert out[0].any() and not out[1:].any() and grad_x[0].any() and not grad_x[1:].any()


@pytest.mark.fuzz
def test_hash_grid_random_settings(device, seed):
    """Features and gradients to second order for random shapes and settings."""
    pick = random.Random(seed)
    base = pick.choice([2, 3, 4, 8, 16])
    spec = HashGridSpec(
        levels=pick.randint(1, 2 if INTERPRETED else 16),
        features=pick.choice([1, 2, 4]),
        log2_entries=pick.randint(5, 8 if INTERPRETED else 14),
        base_resolution=base,
        max_resolution=base * pick.choice([1, 2, 8]),
        interpolation=pick.choice(["smoothstep", "linear"]),
    )
    n = pick.choice([1, 31, 64, 127, 200] if INTERPRETED else [1, 127, 128, 1000, 4097, 20001])
    dtype = pick.choice([torch.float32, *HALVES])
    tensors = inputs(spec, n, device, seed, dtype)
    options = {"active_levels": pick.choice([None, pick.randint(1, spec.levels)])}
    if pick.random() < 0.5:
        live = pick.randint(0, n)
        options["count"] = torch.tensor(live, device=device)
    compare(tensors, spec, dtype=dtype, **options)


def test_hash_grid_small_shapes(device):
    """Every kernel of the operator once or twice, for tools that slow them down a thousandfold."""
    for n in (1, 65):
        tensors = inputs(TINY, n, device)
        compare(tensors, TINY, count=torch.tensor(n - n // 3, device=device))


def test_hash_grid_deterministic(device, deterministic):
    """Features and all gradients repeat bit for bit in deterministic mode."""
    n = 100 if INTERPRETED else 100_000
    spec = TINY if INTERPRETED else HashGridSpec(log2_entries=14)
    tensors = inputs(spec, n, device)
    first = gradients(hash_grid, tensors, spec)
    for _ in range(2 if INTERPRETED else 10):
        for a, b in zip(first, gradients(hash_grid, tensors, spec), strict=True):
            assert torch.equal(a, b)


def test_hash_grid_forward_repeats(device):
    """Features repeat bit for bit in any mode."""
    x, table, *_ = inputs(TINY if INTERPRETED else SMALL, 100 if INTERPRETED else 100_000, device)
    spec = TINY if INTERPRETED else SMALL
    first = hash_grid(x, table, spec)
    assert all(torch.equal(first, hash_grid(x, table, spec)) for _ in range(2 if INTERPRETED else 10))


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_hash_grid_deterministic_magnitudes(device, scale, deterministic):
    """Fixed-point sums are as accurate for gradients of any magnitude."""
    x, table, upstream, tangent = inputs(TINY, 60, device)
    x[:] = x[0]  # all into the same rows: the largest sum
    compare([x, table, upstream * scale, tangent], TINY)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hash_grid_deterministic_not_finite(device, value, deterministic):
    """A NaN or infinity in the upstream gradient shows in fixed-point sums."""
    x, table, upstream, _ = inputs(TINY, 60, device)
    upstream[0, 0] = value
    features = upstream.t().contiguous()
    got = grid_gradients.scatter_features(grid_gradients.GridPoints(x), TINY, features=features, deterministic=True)
    assert got.isnan().any()


def test_hash_grid_third_order(device):
    """A third derivative raises."""
    x, table, upstream, tangent = inputs(TINY, 9, device)
    x.requires_grad_()
    out = hash_grid(x, table, TINY)
    (grad_x,) = torch.autograd.grad(out, x, upstream, create_graph=True)
    (second,) = torch.autograd.grad(grad_x, x, tangent, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="no third derivative"):
        torch.autograd.grad(second.sum(), x)


def test_hash_grid_table_gradient_gradients(device):
    """The table's gradient is linear in the upstream gradient, and differentiable itself."""
    x, table, upstream, _ = inputs(TINY, 30, device)

    def run(op, precision):
        point, leaf, up = (t.clone().to(precision).requires_grad_() for t in (x, table, upstream))
        (grad_table,) = torch.autograd.grad(op(point, leaf, TINY), leaf, up, create_graph=True)
        return torch.autograd.grad((grad_table * table.to(precision).cos()).sum(), (point, up))

    got, single = run(hash_grid, torch.float32), run(hash_grid_reference, torch.float32)
    exact = run(hash_grid_reference, torch.float64)
    for name, *values in zip(("x", "upstream"), got, single, exact, strict=True):
        check(name, *values)


def test_hash_grid_errors(device):
    """fp64 and 3 features a level raise."""
    x, table, *_ = inputs(TINY, 4, device)
    with pytest.raises(TypeError, match="x is float64, which the kernels do not compute in"):
        hash_grid(x.double(), table, TINY)
    with pytest.raises(TypeError, match="table is float64"):
        hash_grid(x, table.double(), TINY)
    with pytest.raises(TypeError, match="dtype is float64"):
        hash_grid(x, table, TINY, dtype=torch.float64)
    odd = HashGridSpec(levels=1, features=3, log2_entries=6, base_resolution=4, max_resolution=4)
    with pytest.raises(ValueError, match="the kernels take 1, 2 or 4 features a level, got 3"):
        hash_grid(x, torch.zeros(odd.rows, 3, device=device), odd)


def full_case(device, n=200_000, dtype=torch.float16):
    spec = HashGridSpec(log2_entries=16)
    return spec, inputs(spec, n, device, dtype=dtype)


@pytest.mark.full_size("the kernels are compiled")
def test_hash_grid_default_spec(device):
    """The default shape at full size."""
    spec = HashGridSpec()
    for dtype in (torch.float32, torch.float16):
        compare(inputs(spec, 100_000, device, dtype=dtype), spec, dtype=dtype)


@pytest.mark.full_size("graphs are of CUDA")
def test_hash_grid_cuda_graph(device, deterministic):
    """A captured step gives the bits of an eager one after the count and the table changed."""
    spec, tensors = full_case(device)
    count = torch.tensor(150_000, device=device)
    x, table, upstream, tangent = tensors
    x.requires_grad_(), table.requires_grad_(), upstream.requires_grad_()

    def step():
        out = hash_grid(x, table, spec, dtype=torch.float16, count=count)
        first = torch.autograd.grad(out, (x, table), upstream, create_graph=True)
        return out, *first, *torch.autograd.grad(first[0], (table, upstream), tangent)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        count.fill_(123_457)
        table.mul_(0.5)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.full_size("the CPU has nothing to wait for")
@pytest.mark.parametrize("mode", [False, True])
def test_hash_grid_no_synchronisation(device, mode):
    """No call waits for the GPU, in either mode."""
    spec, tensors = full_case(device)
    options = {
        "dtype": torch.float16,
        "count": torch.tensor(150_000, device=device),
        "active_levels": torch.tensor(12, device=device),
    }
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode, warn_only=True)
    try:
        for error_mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(error_mode)
            gradients(hash_grid, tensors, spec, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(before)


@pytest.mark.full_size("compiled code is for the GPU")
def test_hash_grid_compile(device, deterministic):
    """torch.compile takes the operator without a graph break and gives the same bits."""
    spec, (x, table, upstream, _) = full_case(device, 10_000)
    x.requires_grad_(), table.requires_grad_()

    def step(x, table):
        return hash_grid(x, table, spec, dtype=torch.float16, active_levels=12) * 2

    compiled = torch.compile(step, fullgraph=True)
    for op in (compiled, step):
        out = op(x, table)
        results = [out, *torch.autograd.grad(out, (x, table), upstream)]
        if op is compiled:
            expected = results
    for a, b in zip(expected, results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.full_size("streams are of CUDA")
def test_hash_grid_streams_and_devices(device, deterministic):
    """Another stream and another GPU give the same bits."""
    spec, tensors = full_case(device, 10_000)
    expected = gradients(hash_grid, tensors, spec)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = gradients(hash_grid, tensors, spec)
    stream.synchronize()
    for a, b in zip(expected, results, strict=True):
        assert torch.equal(a, b)
    if torch.cuda.device_count() > 1:
        for a, b in zip(expected, gradients(hash_grid, [t.to("cuda:1") for t in tensors], spec), strict=True):
            assert b.device.index == 1 and torch.equal(a, b.to(a.device))


@pytest.mark.full_size("gigabytes")
@pytest.mark.parametrize("interpolation", ["smoothstep", "linear"])
def test_hash_grid_large_table(device, interpolation):
    """2^24 entries a level: 16 levels with 4 features hold 2^30 numbers, most of them beyond the 2^31st byte."""
    spec = HashGridSpec(features=4, log2_entries=24, base_resolution=256, interpolation=interpolation)
    assert spec.rows * spec.features * 4 > 1 << 31
    generator = torch.Generator(device).manual_seed(0)
    table = torch.randn(spec.rows, spec.features, device=device, generator=generator).requires_grad_()
    x = positions(5000).to(device).requires_grad_()
    upstream = torch.randn(5000, spec.channels, device=device, generator=generator)
    runs = []
    for op, dtype in ((hash_grid, None), (hash_grid_reference, None), (hash_grid_reference, torch.float64)):
        leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in (x, table)]
        out = op(*leaves, spec)
        runs.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
    for name, *results in zip(("features", "gradient of x", "gradient of table"), *runs, strict=True):
        check(name, *results)


@pytest.mark.full_size("gigabytes")
def test_hash_grid_large_features(device):
    """More than 2^31 features: the last points are right, forward and backward."""
    spec = HashGridSpec(log2_entries=12)
    n = (1 << 31) // spec.channels + 1000
    table = torch.randn(spec.rows, spec.features, device=device).requires_grad_()
    x = torch.rand(n, 3, device=device)
    out = hash_grid(x, table, spec, dtype=torch.float16)
    tail = hash_grid_reference(x[-500:], table, spec, dtype=torch.float16)
    precise = table.detach().double().requires_grad_()
    exact = hash_grid_reference(x[-500:].double(), precise, spec)
    check("features", out[-500:].detach(), tail.detach(), exact.detach())
    upstream = torch.zeros(spec.channels, n, device=device, dtype=torch.float16)
    upstream[:, -500:] = 1
    (grad,) = torch.autograd.grad(out, table, upstream.t())
    (expected,) = torch.autograd.grad(tail, table, torch.ones_like(tail))
    check("gradient", grad, expected, torch.autograd.grad(exact.sum(), precise)[0])
