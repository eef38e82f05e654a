"""The fused field against its reference: outputs and every gradient, on the fused path and on the other one."""

import itertools
import random
import sys

import pytest
import torch

from dream_fast.bench.accuracy import check, check_together
from dream_fast.kernels import FieldSpec, HashGridSpec, field, field_plan, field_reference, hash_grid_reference
from dream_fast.kernels._core.launch import INTERPRETED, recorded_launches

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
WIDTHS = [16, 32, 64, 128]
GRID = HashGridSpec(levels=3, features=2, log2_entries=8, base_resolution=5, max_resolution=20)  # dense, then hashed
FULL = HashGridSpec(levels=16, features=2, log2_entries=12, base_resolution=4, max_resolution=100)


def make(n, grid=GRID, hidden=(16,), *, device, seed=0, reach=1.0):
    """Random x in [-reach, reach]^3, table, weights, biases; and random gradients of the outputs.

    Gradients of sigma have one sign: where contributions cancel, the error of a sum says nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator) * 2 - 1

    sizes = [grid.channels, *hidden, 4]
    weights = [uniform(o, i) * (3 / i) ** 0.5 for i, o in itertools.pairwise(sizes)]
    biases = [uniform(o) * 0.3 for o in sizes[1:]]
    inputs = [uniform(n, 3) * reach, uniform(grid.rows, grid.features), weights, biases]
    upstream = [uniform(n).abs() + 0.1, uniform(n, 3)]

    def move(value):
        return [part.to(device) for part in value] if isinstance(value, list) else value.to(device)

    return [move(value) for value in inputs], move(upstream)


def run(function, inputs, upstream, spec, *, into=("x", "table", "mlp"), precise=False, **options):
    """Outputs and gradients of the inputs named in `into`, by name. `precise` runs in fp64."""

    def leaf(value, name):
        value = value.detach().double() if precise else value.detach()
        return value.clone().requires_grad_(name in into)

    x, table, weights, biases = inputs
    x, table = leaf(x, "x"), leaf(table, "table")
    weights, biases = [leaf(w, "mlp") for w in weights], [leaf(b, "mlp") for b in biases]
    outputs = function(x, table, weights, biases, spec, **options)
    # Of no levels, the reference's albedo does not depend on x.
    used = [(o, u.to(o.dtype)) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
    torch.autograd.backward(*zip(*used, strict=True))
    leaves = {"x": x, "table": table}
    leaves |= {f"weights[{i}]": w for i, w in enumerate(weights)} | {f"biases[{i}]": b for i, b in enumerate(biases)}
    results = {"sigma": outputs[0].detach(), "albedo": outputs[1].detach()}
    for name, value in leaves.items():
        if value.requires_grad:  # no active level is no path from the points and the table
            results[f"gradient of {name}"] = torch.zeros_like(value) if value.grad is None else value.grad
    return results


def compare(inputs, upstream, spec, *, dtype=None, **options):
    if dtype in (None, SINGLE):
        upstream = away_from_kinks(inputs, upstream, spec)
    got = run(field, inputs, upstream, spec, dtype=dtype, **options)
    single = run(field_reference, inputs, upstream, spec, dtype=dtype, **options)
    exact = run(field_reference, inputs, upstream, spec, precise=True, **options)
    assert all(value.dtype == torch.float32 for value in got.values())
    judge(got, single, exact)
    return got


def judge(got, single, exact):
    """Every output and gradient by itself; the layers of the network are one result."""
    network = [name for name in got if "weights" in name or "biases" in name]
    for name in got.keys() - network:
        check(name, got[name], single[name], exact[name])
    if network:
        check_together("network", *([results[name] for name in network] for results in (got, single, exact)))


def away_from_kinks(inputs, upstream, spec):
    """The upstream gradients, 0 where a ReLU is so near its kink that fp32 may fall on the other side than fp64."""
    x, table, weights, biases = ([part.double() for part in v] if isinstance(v, list) else v.double() for v in inputs)
    h = hash_grid_reference((x + spec.bound) / (2 * spec.bound), table, spec.grid)
    keep = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for weight, bias in list(zip(weights, biases, strict=True))[:-1]:
        h = h @ weight.t() + bias
        keep &= (h.abs() > 1e-5).all(1)
        h = h.relu()
    return [u * (keep if u.dim() == 1 else keep[:, None]) for u in upstream]


def skip_bf16(dtype):
    if INTERPRETED and dtype == BRAIN:
        pytest.skip("the interpreter multiplies bf16 matrices wrongly")


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
def test_field_small_shapes(dtype, device):
    """Every kernel once; one point past a tile."""
    skip_bf16(dtype)
    inputs, upstream = make(65, device=device)
    compare(inputs, upstream, FieldSpec(grid=GRID), dtype=dtype)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("width", WIDTHS)
def test_field_widths_and_layers(width, layers, dtype, device):
    """Every width and number of layers is fused and accurate."""
    skip_bf16(dtype)
    if INTERPRETED and dtype == HALF and layers in (2, 4):
        pytest.skip("half of them will do in the interpreter")
    if not INTERPRETED and dtype == SINGLE and WIDTHS.index(width) + layers != 4:
        pytest.skip("kernels of fp32 compile for minutes; each width and each number of layers once")
    spec = FieldSpec(grid=GRID)
    inputs, upstream = make(40 if INTERPRETED else 3000, hidden=(width,) * layers, device=device)
    if dtype == SINGLE and width == 128:
        pytest.skip("in fp32 this width is not fused: see the test of other shapes")
    assert field_plan(spec, inputs[2], dtype) == "fused"
    compare(inputs, upstream, spec, dtype=dtype, into=("mlp",) if INTERPRETED else ("x", "table", "mlp"))


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_field_tiles_of_programs(programs, monkeypatch, device):
    """20 tiles for few programs: in turns where there are few for each, in runs where there are many."""
    module = sys.modules["dream_fast.kernels.fields.field"]
    config = module._field_fwd_config
    monkeypatch.setattr(module, "_field_fwd_config", lambda *args: config(*args)._replace(programs=programs))
    monkeypatch.setattr(module, "multiprocessors", lambda _: 1)
    (x, *rest), _ = make(20 * 64 - 5, device=device)
    spec, count = FieldSpec(grid=GRID), torch.tensor(20 * 64 - 9, device=device)
    with torch.no_grad():
        actual = field(x, *rest, spec, count=count, dtype=HALF)
        expected = field_reference(x, *rest, spec, count=count, dtype=HALF)
        table, *layers = rest
        precise = table.double(), *([part.double() for part in layer] for layer in layers)
        exact = field_reference(x.double(), *precise, spec, count=count)
    for name, value, *others in zip(("sigma", "albedo"), actual, expected, exact, strict=True):
        check(name, value, *others)
        assert not value[count:].any()


@pytest.mark.full_size("as large as a step")
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
def test_field_full_size(dtype, device):
    """A field as large as a run's."""
    grid = HashGridSpec()
    inputs, upstream = make(20_000, grid, (64, 64), device=device)
    compare(inputs, upstream, FieldSpec(grid=grid), dtype=dtype)


@pytest.mark.parametrize("activation", ["exp", "softplus"])
def test_field_activations(activation, device):
    """The origin is a kink of the cone; points outside the cube have no features, points on its faces do."""
    spec = FieldSpec(grid=GRID, bound=0.7, density_activation=activation, blob_density=2.0, blob_radius=0.4)
    inputs, upstream = make(64, device=device, reach=0.75, seed=1)
    inputs[0][3] = 0
    inputs[0][4:7, 1], inputs[0][7:9, 2] = 0.7, -0.7
    compare(inputs, upstream, spec, into=("x", "mlp"))


@pytest.mark.parametrize("n", [0, 1])
def test_field_few_points(n, device):
    """No point and one point."""
    inputs, upstream = make(n, device=device)
    got = compare(inputs, upstream, FieldSpec(grid=GRID))
    assert (got["gradient of weights[0]"].abs().sum() > 0) == (n > 0)


def test_field_clamped_density(device):
    """A density past the clamp is exp(15) and still has a gradient."""
    inputs, upstream = make(40, device=device)
    inputs[3][-1][0] += 20
    got = compare(inputs, upstream, FieldSpec(grid=GRID), into=("mlp",))
    largest = torch.full_like(got["sigma"], 15.0)
    check("sigma", got["sigma"], largest.exp(), largest.double().exp())
    assert got["gradient of biases[1]"][0] > 1e6


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_field_count(dtype, device):
    """Rows past the count give zeros and take no gradient, also where they hold NaN."""
    count = torch.tensor(70, device=device)
    inputs, upstream = make(300, device=device)
    for value in (inputs[0], *upstream):
        value[70:] = torch.nan
    got = compare(inputs, upstream, FieldSpec(grid=GRID), dtype=dtype, count=count)
    for name in ("sigma", "albedo", "gradient of x"):
        assert not got[name][70:].any()
    got = compare(inputs, upstream, FieldSpec(grid=GRID), dtype=dtype, count=torch.zeros_like(count))
    assert not any(value.any() for value in got.values())


@pytest.mark.parametrize("active", [0, 2, 9, torch.tensor(1), torch.tensor(2, dtype=torch.int32)])
def test_field_active_levels(active, device):
    """Levels that are not active give zeros, as a number and as a tensor."""
    active = active.to(device) if isinstance(active, torch.Tensor) else active
    inputs, upstream = make(40, device=device)
    compare(inputs, upstream, FieldSpec(grid=GRID), active_levels=active, into=("x", "mlp"))


def test_field_strides(device):
    """Strided inputs and gradients."""
    inputs, upstream = make(40, device=device)
    x, table, weights, biases = inputs
    strided = [x.t().contiguous().t(), table.t().contiguous().t(), [w.t().contiguous().t() for w in weights], biases]
    gradients = [upstream[0].expand(2, -1).t()[:, 0], upstream[1].flip(1).flip(1).t().contiguous().t()]
    assert not strided[0].is_contiguous() and not gradients[1].is_contiguous()
    compare(strided, gradients, FieldSpec(grid=GRID), into=("x", "mlp"))


def test_field_unaligned_table(device):
    """A table that is a view into a flat buffer, at an odd number, gives the same bits."""
    inputs, upstream = make(40, device=device)
    flat = torch.zeros(GRID.rows * 2 + 1, device=device)
    flat[1:] = inputs[1].flatten()
    plain = run(field, inputs, upstream, FieldSpec(grid=GRID), into=("mlp",))
    inputs[1] = flat[1:].view(-1, 2)
    shifted = run(field, inputs, upstream, FieldSpec(grid=GRID), into=("mlp",))
    assert all(torch.equal(plain[name], shifted[name]) for name in plain)


def test_field_some_gradients(device):
    """Only the gradients of leaves that require them are computed."""
    inputs, upstream = make(40, device=device)
    for into in (("x",), ("table",), ("mlp",)):
        got = run(field, inputs, upstream, FieldSpec(grid=GRID), into=into)
        assert len(got) == (6 if into == ("mlp",) else 3)
        single = run(field_reference, inputs, upstream, FieldSpec(grid=GRID), into=into)
        exact = run(field_reference, inputs, upstream, FieldSpec(grid=GRID), into=into, precise=True)
        for name in got:
            check(name, got[name], single[name], exact[name])


def test_field_half_parameters(device):
    """16-bit parameters get 16-bit gradients."""
    inputs, upstream = make(40, device=device)
    inputs[2:] = [[part.half() for part in layers] for layers in inputs[2:]]
    got = run(field, inputs, upstream, FieldSpec(grid=GRID), dtype=HALF)
    single = run(field_reference, inputs, upstream, FieldSpec(grid=GRID), dtype=HALF)
    exact = run(field_reference, inputs, upstream, FieldSpec(grid=GRID), precise=True)
    for name in got:
        assert got[name].dtype == single[name].dtype
        check(name, got[name], single[name], exact[name])


def test_field_loss_scale(device):
    """fp16 with gradients 2^12 times too large, as the gradient scaler makes them."""
    inputs, upstream = make(64, device=device)
    upstream = [value * 2.0**12 / 20 for value in upstream]
    compare(inputs, upstream, FieldSpec(grid=GRID, blob_density=0.0), dtype=HALF, into=("mlp",))


def test_field_gradient_overflow(device):
    """A gradient that fp16 cannot hold becomes infinite or NaN, so that the optimiser skips the step."""
    inputs, upstream = make(40, device=device)
    upstream[0][7] = 1e9
    got = run(field, inputs, upstream, FieldSpec(grid=GRID), dtype=HALF, into=("mlp",))
    assert not torch.isfinite(got["gradient of weights[1]"]).all()


@pytest.mark.parametrize("hidden", [(), (48,), (16, 32), (8,), (16,) * 5, (256,), (128,)])
def test_field_unfused_shapes(hidden, device):
    """Shapes without a fused kernel take the other path and are as accurate."""
    spec = FieldSpec(grid=GRID)
    inputs, upstream = make(40, hidden=hidden, device=device)
    assert field_plan(spec, inputs[2]).startswith("unfused: ")
    for value in (inputs[0], *upstream):
        value[30:] = torch.nan
    count = torch.tensor(30, device=device)
    compare(inputs, upstream, spec, count=count, into=("x", "mlp") if INTERPRETED else ("x", "table", "mlp"))


def test_field_plan_reasons():
    """The plan names the reason of every shape that is not fused."""

    def plan(*hidden, dtype=HALF, **grid):
        grid = HashGridSpec(**grid)
        sizes = [grid.channels, *hidden, 4]
        weights = [torch.empty(o, i) for i, o in itertools.pairwise(sizes)]
        return field_plan(FieldSpec(grid=grid), weights, dtype)

    assert plan(64, 64) == plan(16) == plan(*[128] * 4, features=4, levels=1) == "fused"
    assert plan(64, dtype=SINGLE) == "fused"
    assert plan(128, dtype=SINGLE) == "unfused: hidden width 128 takes fp16 or bf16"
    assert plan(48) == "unfused: hidden width 48 is not 16, 32, 64 or 128"
    assert plan(64, 32) == "unfused: hidden widths 64, 32 differ"
    assert plan() == "unfused: 0 hidden layers are not from 1 to 4"
    assert plan(64, levels=17) == "unfused: 17 levels are more than 16"
    assert plan(64, features=3) == "unfused: 3 features a level are not 1, 2 or 4"


# What a kernel is compiled for: levels, features, log2_entries, interpolation, activation, hidden width and layers,
# compute dtype. Everything else is drawn anew for each seed.
KINDS = [
    (5, 2, 6, "smoothstep", "exp", 16, 1, SINGLE),
    (1, 4, 3, "linear", "softplus", 32, 2, SINGLE),
    (4, 1, 9, "linear", "exp", 16, 3, SINGLE),
    (3, 4, 8, "smoothstep", "softplus", 64, 1, HALF),
    (5, 2, 10, "linear", "softplus", 128, 2, HALF),
    (2, 1, 12, "smoothstep", "exp", 32, 4, HALF),
]


@pytest.mark.fuzz
def test_field_random_settings(seed, device):
    """Outputs and gradients for random settings of each kind of kernel."""
    pick = random.Random(seed)
    levels, features, log2_entries, interpolation, activation, width, layers, dtype = KINDS[seed % len(KINDS)]
    grid = HashGridSpec(
        levels=levels,
        features=features,
        log2_entries=log2_entries,
        base_resolution=pick.randint(2, 9),
        max_resolution=pick.randint(9, 60),
        interpolation=interpolation,
    )
    spec = FieldSpec(
        grid=grid,
        bound=pick.choice([0.5, 1.0, 1.7]),
        density_activation=activation,
        blob_density=pick.uniform(0, 5),
        blob_radius=pick.uniform(0.2, 1),
    )
    # Of few points the largest error in 16 bits is luck, for the reference as for the kernel.
    least, most = (1, 70) if INTERPRETED else (1, 5000) if dtype == SINGLE else (500, 5000)
    n = pick.randint(least, most)
    inputs, upstream = make(n, grid, (width,) * layers, device=device, seed=seed, reach=spec.bound * 1.05)
    if dtype == HALF:  # the reference's gradients are in fp16: sums over thousands of points would overflow
        upstream = [part / 64 for part in upstream]
    count = torch.tensor(pick.randint(n // 2, n), device=device)
    options = {"active_levels": pick.choice([None, levels // 2]), "count": count, "dtype": dtype}
    into = pick.choice([("x",), ("mlp",), ("x", "mlp")]) if INTERPRETED else ("x", "table", "mlp")
    compare(inputs, upstream, spec, into=into, **options)


def test_field_forward_repeats(device):
    """Outputs repeat bit for bit in any mode."""
    inputs, _ = make(200, device=device)
    first = field(*inputs, FieldSpec(grid=GRID), dtype=HALF)
    for _ in range(2 if INTERPRETED else 10):
        again = field(*inputs, FieldSpec(grid=GRID), dtype=HALF)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_field_backward_repeats(device, deterministic):
    """Gradients repeat bit for bit in deterministic mode."""
    inputs, upstream = make(70 if INTERPRETED else 5000, device=device)
    first = run(field, inputs, upstream, FieldSpec(grid=GRID), dtype=HALF)
    for _ in range(1 if INTERPRETED else 10):
        again = run(field, inputs, upstream, FieldSpec(grid=GRID), dtype=HALF)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_field_second_order(device):
    """A second derivative raises."""
    inputs, upstream = make(3, device=device)
    x = inputs[0].requires_grad_()
    sigma, _ = field(x, *inputs[1:], FieldSpec(grid=GRID))
    (gradient,) = torch.autograd.grad(sigma.sum(), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient.sum().backward()


def test_field_errors(device):
    """fp64 raises, and the error names the argument."""
    inputs, _ = make(3, device=device)
    spec = FieldSpec(grid=GRID)
    with pytest.raises(TypeError, match="x is float64, which the kernels do not compute in"):
        field(inputs[0].double(), *inputs[1:], spec)
    with pytest.raises(TypeError, match="dtype is float64, which the kernels do not compute in"):
        field(*inputs, spec, dtype=torch.float64)


def test_field_recorded_launches():
    """On a machine without a GPU the kernels of a step can be listed."""
    inputs, upstream = make(100, FULL, (64, 64), device=torch.device("cpu"))
    inputs[1].requires_grad_()
    for part in (*inputs[2], *inputs[3]):
        part.requires_grad_()
    with recorded_launches() as launches:
        outputs = field(*inputs, FieldSpec(grid=FULL), count=torch.tensor(50), dtype=HALF)
        torch.autograd.backward(outputs, upstream)
    names = [launch.kernel.__name__ for launch in launches]
    assert names[:2] == ["field_fwd_kernel", "field_bwd_kernel"] and len(names) > 2


@pytest.mark.full_size("CUDA graphs")
def test_field_cuda_graph(device):
    """A captured step gives the results of an eager one after the inputs changed."""
    inputs, upstream = make(3000, FULL, (64, 64), device=device)
    spec, count = FieldSpec(grid=FULL), torch.tensor(2000, device=device)
    options = {"dtype": HALF, "count": count, "into": ("x", "mlp")}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(field, inputs, upstream, spec, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(field, inputs, upstream, spec, **options)
    for live in (2000, 3000, 1):
        count.fill_(live)
        graph.replay()
        eager = run(field, inputs, upstream, spec, **options)
        assert all(torch.equal(captured[name], eager[name]) for name in eager)


@pytest.mark.full_size("host synchronisations")
@pytest.mark.parametrize("hidden", [(64, 64), (48,)])
def test_field_no_synchronisation(hidden, device):
    """No call waits for the GPU."""
    inputs, upstream = make(3000, FULL, hidden, device=device)
    options = {
        "dtype": HALF,
        "count": torch.tensor(2000, device=device),
        "active_levels": torch.tensor(9, device=device),
    }
    run(field, inputs, upstream, FieldSpec(grid=FULL), **options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(field, inputs, upstream, FieldSpec(grid=FULL), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.full_size("torch.compile")
def test_field_compile(device):
    """torch.compile takes the operator without a graph break and is as accurate."""
    inputs, upstream = make(3000, FULL, (64, 64), device=device)
    spec = FieldSpec(grid=FULL)

    def squared(*arguments, operator=field, **options):
        sigma, albedo = operator(*arguments, **options)
        return sigma * 2, albedo * albedo

    compiled = torch.compile(squared, fullgraph=True)
    eager = run(squared, inputs, upstream, spec, dtype=HALF, into=("x", "mlp"))
    results = run(compiled, inputs, upstream, spec, dtype=HALF, into=("x", "mlp"))
    judge(
        results, eager, run(squared, inputs, upstream, spec, operator=field_reference, precise=True, into=("x", "mlp"))
    )


@pytest.mark.full_size("streams")
def test_field_streams(device):
    """Kernels wait for what the current stream did before."""
    inputs, upstream = make(200_000, FULL, (64, 64), device=device)
    expected = run(field, inputs, upstream, FieldSpec(grid=FULL), dtype=HALF, into=("mlp",))
    stream = torch.cuda.Stream()
    x = torch.zeros_like(inputs[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(inputs[0])
        results = run(field, [x, *inputs[1:]], upstream, FieldSpec(grid=FULL), dtype=HALF, into=("mlp",))
    stream.synchronize()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.full_size("two GPUs")
def test_field_second_device(device):
    """The second GPU, while the first is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    inputs, upstream = make(300, device=torch.device("cuda:1"))
    compare(inputs, upstream, FieldSpec(grid=GRID), dtype=HALF)


@pytest.mark.full_size("more than 2^31 numbers in a buffer")
def test_field_large_buffers(device):
    """Outputs and feature gradients past 2^31 numbers: the last points agree with those points alone."""
    n = 2**31 // 3 + 1000
    if torch.cuda.mem_get_info()[0] < 124 << 30:  # 180 bytes a point
        pytest.skip("needs 124 GiB of free memory")
    grid = HashGridSpec(levels=2, features=2, log2_entries=10, base_resolution=4, max_resolution=30)
    (x, *rest), _ = make(1000, grid, device=device)
    large = torch.zeros(n, 3, device=device)
    large[-1000:] = x
    with torch.no_grad():
        sigma, albedo = field(large, *rest, FieldSpec(grid=grid), dtype=HALF)
        expected = field(x, *rest, FieldSpec(grid=grid), dtype=HALF)
    assert torch.equal(sigma[-1000:], expected[0]) and torch.equal(albedo[-1000:], expected[1])
    del sigma, albedo
    table = rest[0].requires_grad_()
    sigma = field(large, table, *rest[1:], FieldSpec(grid=grid), dtype=HALF)[0]
    upstream = torch.zeros(n, device=device)
    upstream[-1000:] = 1
    (grad_table,) = torch.autograd.grad(sigma, table, upstream)
    (expected,) = torch.autograd.grad(field(x, table, *rest[1:], FieldSpec(grid=grid), dtype=HALF)[0].sum(), table)
    inputs, ones = [x, table, *rest[1:]], [torch.ones_like(x[:, 0]), torch.zeros_like(x)]
    exact = run(field_reference, inputs, ones, FieldSpec(grid=grid), precise=True, into=("table",))
    check("gradient of table", grad_table, expected, exact["gradient of table"])
