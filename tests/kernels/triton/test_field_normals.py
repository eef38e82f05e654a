"""The kernels of the field with normals against the reference: both modes, every output and every gradient."""

import random
import sys
from itertools import pairwise

import pytest
import torch

from dream_fast.bench.accuracy import check, check_together
from dream_fast.kernels import (
    FieldSpec,
    HashGridSpec,
    field_normals,
    field_normals_reference,
    field_plan,
    field_reference,
    hash_grid_reference,
)
from dream_fast.kernels._core.launch import INTERPRETED

MODES = ["finite_difference", "analytic"]
HALF = torch.float16
# With few points, one near a kink of a ReLU determines the largest error.
POINTS = 60 if INTERPRETED else 2000
# A dense level and hashed ones. The interpreter takes its time for every level, and for every tile of 64 points.
GRID = HashGridSpec(levels=2 if INTERPRETED else 3, features=2, log2_entries=8, base_resolution=5, max_resolution=20)
SPEC = FieldSpec(grid=GRID, blob_radius=0.5)
FUSED = [(width, layers) for width in (16, 32, 64, 128) for layers in (1, 2, 3, 4)]
UNFUSED = [(24,), (16, 32), (), (16,) * 5]
if INTERPRETED:
    FUSED, UNFUSED = [(16, 4), (32, 2), (64, 3), (128, 1)], [(24,)]
NAMES = ("sigma", "albedo", "normal")


def make(n, spec=SPEC, hidden=(16,), *, device, seed=0, reach=1.0, logit=0.0, active_levels=None):
    """Random x, table, weights, biases, and upstream gradients. x reaches `reach` bounds; `logit` shifts the density's.

    The direction of a small gradient is rounding noise, of which the largest would decide every comparison: of four
    times as many points, those are taken where the density changes most for its size.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator) * 2 - 1

    sizes = [spec.grid.channels, *hidden, 4]
    x = uniform(4 * n, 3) * spec.bound * reach
    table = uniform(spec.grid.rows, spec.grid.features)
    weights = [uniform(o, i) * (3 / i) ** 0.5 for i, o in pairwise(sizes)]
    biases = [uniform(o) * 0.3 for o in sizes[1:]]
    upstream = [uniform(n), uniform(n, 3), uniform(n, 3)]
    at = x.double().requires_grad_()
    parameters = (table.double(), [w.double() for w in weights], [b.double() for b in biases])
    sigma, _ = field_reference(at, *parameters, spec, active_levels=active_levels)
    (gradient,) = torch.autograd.grad(sigma.sum(), at)
    x = x[(gradient.norm(dim=1) / sigma.detach()).topk(n).indices.sort().values]
    biases[-1][0] += logit
    inputs = [x.to(device), table.to(device), [w.to(device) for w in weights], [b.to(device) for b in biases]]
    return inputs, [u.to(device) for u in upstream]


def run(function, inputs, upstream, spec, *, points=False, precise=False, **options):
    """Outputs and gradients by name. `precise` runs in fp64; `points` adds the gradient of x."""

    def leaf(value, needs_grad=True):
        value = value.detach().double() if precise else value.detach()
        return value.clone().requires_grad_(needs_grad)

    x, table, weights, biases = inputs
    x, table = leaf(x, points), leaf(table)
    weights, biases = [leaf(w) for w in weights], [leaf(b) for b in biases]
    outputs = function(x, table, weights, biases, spec, **options)
    torch.autograd.backward(outputs, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    results = dict(zip(NAMES, (o.detach() for o in outputs), strict=True))
    # No active level is no path from the table.
    results["gradient of table"] = torch.zeros_like(table) if table.grad is None else table.grad
    if points:
        results["gradient of x"] = x.grad
    # Most of a layer's bias gradient may be one number, whose error can be small by chance: with the weights it is not.
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        results[f"gradient of layer {layer}"] = torch.cat([weight.grad.flatten(), bias.grad])
    return results


def compare(inputs, upstream, spec, *, dtype=None, **options):
    three = all_three(inputs, upstream, spec, dtype=dtype, **options)
    judge(*three)
    return three[0]


def all_three(inputs, upstream, spec, *, dtype=None, **options):
    """Results of the kernels, of the reference in their dtype, and of the reference in fp64.

    In fp32 without what a ReLU decides that is so near its kink that rounding may put it on the other side: there
    gradients jump, and so do analytic normals.
    """
    keep = None
    if dtype in (None, torch.float32):
        epsilon = options.get("epsilon", 0.01) if options.get("mode") != "analytic" else None
        keep = away_from_kinks(inputs, spec, epsilon, options.get("active_levels"))
        upstream = [u * (keep if u.dim() == 1 else keep[:, None]) for u in upstream]
    got = run(field_normals, inputs, upstream, spec, dtype=dtype, **options)
    single = run(field_normals_reference, inputs, upstream, spec, dtype=dtype, **options)
    exact = run(field_normals_reference, inputs, upstream, spec, precise=True, **options)
    assert all(value.dtype == torch.float32 for value in got.values())
    if keep is not None and options.get("mode") == "analytic":
        for results in (got, single, exact):
            results["normal"] = results["normal"] * keep[:, None]
    return got, single, exact


def away_from_kinks(inputs, spec, epsilon, active_levels):
    """Mask of the points, nearly all, with no ReLU near its kink there or, with an epsilon, at their taps."""
    x, table, weights, biases = ([part.double() for part in v] if isinstance(v, list) else v.double() for v in inputs)
    keep = torch.ones(len(x), dtype=torch.bool, device=x.device)
    steps = epsilon * torch.eye(3, dtype=x.dtype, device=x.device) if epsilon else x.new_zeros(0, 3)
    for tap in (x.new_zeros(3), *steps, *-steps):
        at = (x + tap).clamp(-spec.bound, spec.bound) if tap.any() else x
        h = hash_grid_reference((at + spec.bound) / (2 * spec.bound), table, spec.grid, active_levels=active_levels)
        for weight, bias in list(zip(weights, biases, strict=True))[:-1]:
            h = h @ weight.t() + bias
            keep &= (h.abs() > 1e-5).all(1)
            h = h.relu()
    assert keep.float().mean() > 0.9 or len(keep) < 100
    return keep


def judge(got, single, exact):
    """Every output and gradient by itself; the layers of the network are one result, as in the tests of the field."""
    network = [name for name in got if "layer" in name]
    for name in got.keys() - network:
        check(name, got[name], single[name], exact[name])
    check_together("network", *([results[name] for name in network] for results in (got, single, exact)))


def skip_bf16(dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bf16 matrices wrongly")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16])
def test_field_normals_gradients(mode, dtype, device):
    """Outputs and gradients in each mode and dtype."""
    skip_bf16(dtype)
    inputs, upstream = make(POINTS, device=device)
    compare(inputs, upstream, SPEC, dtype=dtype, mode=mode, epsilon=0.05)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["exp", "softplus"])
def test_field_normals_activations(mode, activation, device):
    """The origin is a kink of the cone; points outside the cube have no features."""
    spec = FieldSpec(grid=GRID, bound=0.7, density_activation=activation, blob_density=2.0, blob_radius=0.4)
    inputs, upstream = make(POINTS, spec, device=device, reach=1.1, seed=1)
    inputs[0][3], inputs[0][4] = 0, 0.72
    compare(inputs, upstream, spec, mode=mode, epsilon=0.03)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("logit", [-26.0, 30.0], ids=["floor", "clamp"])
def test_field_normals_density_range(mode, logit, device):
    """Below the floor there is no normal and no gradient through it; past the clamp sigma is flat, its slope is not.

    Differences of a flat sigma have no direction, so nothing goes through them, whatever comes from above.
    A logit of -26 in fp32 is a few millionths off, by luck more or less: three scenes are judged together.
    """
    scenes = []
    for seed in (2, 3, 4):
        inputs, upstream = make(POINTS, device=device, logit=logit, seed=seed)
        scenes.append(all_three(inputs, upstream, SPEC, mode=mode, epsilon=0.05))
    for name in scenes[0][0]:
        check_together(name, *([scene[name] for scene in results] for results in zip(*scenes, strict=True)))
    length, exact = (scenes[0][of]["normal"].norm(dim=1) for of in (0, 2))
    if logit < 0:
        assert (length == 0).any() and (length > 0.9).any() and torch.equal(length > 0, exact > 0)
    elif mode == "finite_difference":
        assert not length.any()


@pytest.mark.parametrize("points", [False, True])
def test_field_normals_x_by_differences(points, device):
    """Points on the cube's faces and past them: a clamped tap takes no gradient along that axis."""
    spec = FieldSpec(grid=GRID, bound=0.75, blob_radius=0.5)  # a face that is the same in every dtype
    inputs, upstream = make(POINTS, spec, device=device, reach=1.05, seed=3)
    inputs[0][:4, 1] = 0.75
    inputs[0][4:8, 2] = -0.75
    got = compare(inputs, upstream, spec, epsilon=0.05, points=points)
    assert ("gradient of x" in got) == points


@pytest.mark.parametrize("activation", ["exp", "softplus"])
def test_field_normals_x_analytic(activation, device):
    """The gradient of x through analytic normals, for both activations."""
    spec = FieldSpec(grid=GRID, bound=0.6, density_activation=activation, blob_radius=0.5)
    inputs, upstream = make(POINTS, spec, device=device, reach=1.05, seed=4)
    inputs[0][3] = 0
    compare(inputs, upstream, spec, mode="analytic", points=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("width", "layers"), FUSED)
def test_field_normals_fused_shapes(mode, width, layers, device):
    """Widths and numbers of layers, fused except width 128 with analytic normals."""
    inputs, upstream = make(POINTS, device=device, hidden=(width,) * layers, seed=width + layers)
    dtype = torch.float32 if INTERPRETED and width < 128 else HALF
    wide = mode == "analytic" and width == 128
    assert field_plan(SPEC, inputs[2], dtype, mode) == (
        "unfused: hidden width 128 is too wide for analytic normals" if wide else "fused"
    )
    compare(inputs, upstream, SPEC, mode=mode, epsilon=0.1, dtype=dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hidden", UNFUSED, ids=str)
def test_field_normals_unfused_shapes(mode, hidden, device):
    """Shapes without a fused kernel take the other path and are as accurate."""
    inputs, upstream = make(POINTS, device=device, hidden=hidden, seed=5)
    compare(inputs, upstream, SPEC, mode=mode, epsilon=0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [0, 1, 7, 65])
def test_field_normals_small_shapes(mode, n, device):
    """Empty, one, odd, one past a block; also the test that runs under compute-sanitizer."""
    inputs, upstream = make(n, device=device, seed=n)
    compare(inputs, upstream, SPEC, mode=mode, epsilon=0.1, points=n == 7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "count"), [(80, 0), (60, 1), (80, 65), (60, 99)])
def test_field_normals_count(mode, n, count, device):
    """Rows past the count give zeros and take no gradient, also where they hold NaN."""
    inputs, upstream = make(n, device=device, seed=6)
    options = {"mode": mode, "epsilon": 0.1, "count": torch.tensor(count, device=device)}
    inputs[0][count:] = float("nan")
    for value in upstream:
        value[count:] = float("nan")
    clean = [torch.nan_to_num(value) for value in upstream]
    points = count == 65
    got = run(field_normals, inputs, upstream, SPEC, points=points, **options)
    single = run(field_normals_reference, inputs, clean, SPEC, points=points, **options)
    exact = run(field_normals_reference, inputs, clean, SPEC, points=points, precise=True, **options)
    judge(got, single, exact)
    for name in (*NAMES, *(["gradient of x"] if points else [])):
        assert not got[name][count:].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("active", [0, 1, 9, "tensor"])
def test_field_normals_active_levels(mode, active, device):
    """Levels that are not active give zeros, as a number and as a tensor."""
    inputs, upstream = make(POINTS, device=device, seed=7)
    active = torch.tensor(1, device=device) if active == "tensor" else active
    compare(inputs, upstream, SPEC, mode=mode, epsilon=0.1, active_levels=active)


@pytest.mark.parametrize("mode", MODES)
def test_field_normals_strides(mode, device, deterministic):
    """Strided inputs and gradients give the same bits."""
    inputs, upstream = make(POINTS, device=device, seed=8)
    x, table, weights, biases = inputs
    strided = [x.t().contiguous().t(), table.t().contiguous().t(), [w.t().contiguous().t() for w in weights], biases]
    slanted = [u.repeat_interleave(2, 0)[::2] for u in upstream]
    spec = SPEC
    for one, other in zip(
        run(field_normals, inputs, upstream, spec, mode=mode).items(),
        run(field_normals, strided, slanted, spec, mode=mode).items(),
        strict=True,
    ):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1]), one[0]


@pytest.mark.parametrize("mode", MODES)
def test_field_normals_flat_density(mode, device):
    """A flat density has normals of 0 and finite gradients."""
    inputs, upstream = make(POINTS, device=device)
    inputs[2][-1].zero_()
    got = run(field_normals, inputs, upstream, FieldSpec(grid=GRID, blob_density=0.0), mode=mode)
    assert not got["normal"].any()
    assert all(torch.isfinite(value).all() for value in got.values())


@pytest.mark.fuzz(interpreted=6)
def test_field_normals_random_settings(seed, device):
    """Outputs and gradients for random settings."""
    choose = random.Random(seed)
    features = choose.choice([1, 2, 4])
    base = choose.choice([2, 3, 5, 16])
    grid = HashGridSpec(
        levels=choose.randint(1, 3 if INTERPRETED else 16),
        features=features,
        log2_entries=choose.choice([4, 8, 12] if INTERPRETED else [12, 15, 19]),
        base_resolution=base,
        max_resolution=base * choose.choice([1, 2, 8]),
        interpolation=choose.choice(["smoothstep", "linear"]),
    )
    bound = choose.choice([0.5, 0.7, 1.0, 2.0])
    spec = FieldSpec(
        grid=grid,
        bound=bound,
        density_activation=choose.choice(["exp", "softplus"]),
        blob_density=choose.choice([2.0, 5.0]),
        blob_radius=bound * choose.choice([0.4, 0.7]),
    )
    mode = choose.choice(MODES)
    dtype = choose.choice([None, torch.float32, HALF, *([] if INTERPRETED else [torch.bfloat16])])
    n = choose.randint(32, 64) if INTERPRETED else choose.randint(1000, 6000)
    hidden = (choose.choice([16, 32, 64, 128]),) * choose.randint(1, 4)
    # A few points past the cube, but none so near a face that fp32 and fp64 could see it on different sides.
    reach, epsilon = choose.choice([0.7, 1.02]), bound * choose.choice([0.03, 0.1])
    active_levels = choose.choice([None, 1, grid.levels])
    inputs, upstream = make(n, spec, hidden, device=device, seed=seed, reach=reach, active_levels=active_levels)
    compare(
        inputs,
        upstream,
        spec,
        dtype=dtype,
        mode=mode,
        epsilon=epsilon,
        active_levels=active_levels,
        count=choose.choice([None, torch.tensor(max(1, n - 5), device=device)]),
        points=choose.random() < 0.3,
    )


@pytest.mark.parametrize("mode", MODES)
def test_field_normals_repeats(mode, device, deterministic):
    """Outputs always repeat bit for bit; gradients do in deterministic mode, where new buffers hold NaN."""
    n = 40 if INTERPRETED else 50_000
    inputs, upstream = make(n, device=device, seed=9)
    count = torch.tensor(n - 9, device=device)
    options = {"mode": mode, "dtype": HALF, "count": count, "points": True}
    first = run(field_normals, inputs, upstream, SPEC, **options)
    assert all(torch.isfinite(value).all() for value in first.values())
    for _ in range(1 if INTERPRETED else 9):
        again = run(field_normals, inputs, upstream, SPEC, **options)
        assert all(torch.equal(value, first[name]) for name, value in again.items())


def test_field_normals_no_grad(device):
    """Outputs under no_grad keep no graph, also of points that require gradients."""
    (x, *others), _ = make(5, device=device)
    for mode in MODES:
        for points in (x, x.clone().requires_grad_()):
            with torch.no_grad():
                outputs = field_normals(points, *others, SPEC, mode=mode)
            assert not any(output.requires_grad for output in outputs)


def test_field_normals_errors(device):
    """fp64 raises, and the error names the argument."""
    (x, table, weights, biases), _ = make(5, device=device)
    with pytest.raises(TypeError, match="x is float64, which the kernels do not compute in"):
        field_normals(x.double(), table, weights, biases, SPEC)
    with pytest.raises(TypeError, match="dtype is float64, which the kernels do not compute in"):
        field_normals(x, table, weights, biases, SPEC, dtype=torch.float64)


FULL = HashGridSpec()


def layer_gradients(gradients):
    """Gradients of all weights, then of all biases, joined layer by layer as `run` does."""
    half = len(gradients) // 2
    return [torch.cat([w.flatten(), b]) for w, b in zip(gradients[:half], gradients[half:], strict=True)]


@pytest.mark.full_size("a captured graph")
@pytest.mark.parametrize("mode", MODES)
def test_field_normals_cuda_graph(mode, device):
    """A captured step gives the outputs of an eager one after points and count changed."""
    inputs, upstream = make(20_000, FieldSpec(grid=FULL), (64, 64), device=device)
    count = torch.tensor(15_000, device=device)
    x, table, weights, biases = inputs
    leaves = [value.requires_grad_() for value in (table, *weights, *biases)]

    def step():
        outputs = field_normals(*inputs, FieldSpec(grid=FULL), mode=mode, dtype=HALF, count=count)
        return outputs, torch.autograd.grad(outputs, leaves, upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gradients = step()
    x.copy_(x.roll(1, 0))
    count.fill_(12_000)
    graph.replay()
    expected_outputs, expected_gradients = step()
    for got, expected in zip(outputs, expected_outputs, strict=True):
        assert torch.equal(got, expected)
    exact = run(field_normals_reference, inputs, upstream, FieldSpec(grid=FULL), precise=True, mode=mode, count=count)
    table, layers = exact["gradient of table"], [value for name, value in exact.items() if "layer" in name]
    both = [(grads[0], layer_gradients(grads[1:])) for grads in (gradients, expected_gradients)]
    check("gradient of table", *(grads for grads, _ in both), table)
    check_together("network", *(grads for _, grads in both), layers)


@pytest.mark.full_size("the device's synchronisation")
@pytest.mark.parametrize("mode", MODES)
def test_field_normals_no_synchronisation(mode, device):
    """No call waits for the GPU."""
    inputs, upstream = make(20_000, FieldSpec(grid=FULL), (64, 64), device=device)
    options = {"mode": mode, "dtype": HALF, "count": torch.tensor(15_000, device=device)}
    run(field_normals, inputs, upstream, FieldSpec(grid=FULL), **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(field_normals, inputs, upstream, FieldSpec(grid=FULL), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.full_size("torch.compile for a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_field_normals_compile(mode, device):
    """torch.compile takes the operator without a graph break and is as accurate."""
    inputs, upstream = make(3000, device=device)

    def function(x, table, weights, biases, spec, **options):
        return torch.compile(field_normals, fullgraph=True)(x, table, weights, biases, spec, **options)

    spec = SPEC
    eager = run(field_normals, inputs, upstream, spec, mode=mode)
    compiled = run(function, inputs, upstream, spec, mode=mode)
    judge(compiled, eager, run(field_normals_reference, inputs, upstream, spec, precise=True, mode=mode))


@pytest.mark.full_size("streams")
@pytest.mark.parametrize("mode", MODES)
def test_field_normals_streams(mode, device):
    """Another stream gives the same bits."""
    inputs, upstream = make(20_000, FieldSpec(grid=FULL), (64, 64), device=device)
    spec = FieldSpec(grid=FULL)
    expected = run(field_normals, inputs, upstream, spec, mode=mode, dtype=HALF)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = run(field_normals, inputs, upstream, spec, mode=mode, dtype=HALF)
    side.synchronize()
    for name in NAMES:
        assert torch.equal(got[name], expected[name])


@pytest.mark.full_size("a second GPU")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_field_normals_second_device():
    """The second GPU, while the first is current."""
    inputs, upstream = make(500, device=torch.device("cuda:1"))
    compare(inputs, upstream, SPEC)


@pytest.mark.full_size("buffers of more than 2^31 elements")
@pytest.mark.parametrize("mode", MODES)
def test_field_normals_large_buffers(mode, device):
    """7 taps of 32 features pass 2^31 elements at 9.6 M points; only the last ones are compared."""
    tail, n = 1000, 10_000_000 if mode == "finite_difference" else 68_000_000
    inputs, upstream = make(tail, FieldSpec(grid=FULL), (16,), device=device)
    x = torch.zeros(n, 3, device=device)
    x[-tail:] = inputs[0]
    longer = [torch.zeros(n, *u.shape[1:], device=device) for u in upstream]
    for value, last in zip(longer, upstream, strict=True):
        value[-tail:] = last
    spec = FieldSpec(grid=FULL, blob_density=0.0)
    expected = run(field_normals, inputs, upstream, spec, mode=mode, dtype=HALF)
    got = run(field_normals, [x, *inputs[1:]], longer, spec, mode=mode, dtype=HALF)
    got |= {name: got[name][-tail:] for name in NAMES}
    judge(got, expected, run(field_normals_reference, inputs, upstream, spec, precise=True, mode=mode))


@pytest.mark.parametrize(("n", "count"), [(150, None), (150, 100), (150, 40), (128, 128)])
def test_field_normals_chunks(n, count, monkeypatch, device, deterministic):
    """The backward by differences takes a chunk of the points at a time; a count may end in any of them."""
    monkeypatch.setattr(sys.modules["dream_fast.kernels.fields.normals"], "_DIFFERENCES_CHUNK", 64)
    inputs, upstream = make(n, device=device, seed=11)
    compare(
        inputs,
        upstream,
        SPEC,
        epsilon=0.1,
        count=None if count is None else torch.tensor(count, device=device),
        points=n == 150,
    )
