"""The kernels of rendering: the same image as the reference, ray by ray; queues that run over; every setting.

A ray is judged where rounding cannot change which samples it has: fp32 and fp64 must agree on their number, and a
`stop` 0.1 % away must not change the ray.
"""

import random

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.kernels import FieldSpec, HashGridSpec, View, cascades, render, render_reference
from dream_fast.kernels._core.launch import INTERPRETED, jit, launch, tl
from dream_fast.kernels.fields.field import field_reference
from dream_fast.kernels.rays import render as render_module
from dream_fast.kernels.rays.march import packed_intervals
from dream_fast.kernels.rays.render import EMPTY_OPACITY
from dream_fast.kernels.rays.render_kernels import _add

SMALL = HashGridSpec(levels=3, features=2, log2_entries=8, base_resolution=4, max_resolution=12)


@pytest.fixture(autouse=True)
def short_queues(monkeypatch):
    """Use queues of 32 rays and 16 lanes in the interpreter, so that a few rays fill several and lanes are reused."""
    if INTERPRETED:
        config = render_module.RenderConfig(
            segment=32,
            enter_probes=4,
            enter_warps=1,
            block=16,
            num_warps=1,
            shade_probes=2,
            walk=4,
            shade_registers=None,
        )
        monkeypatch.setattr(render_module, "_render_config", lambda *_: config)


def scene(device, *, seed=0, grid=SMALL, width=16, hidden=1, bound=0.8, resolution=16, filled=0.5, **spec):
    """bits, table, weights, biases, spec: a random field, about as opaque as a ray is long, in random cells."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    sizes = [grid.channels, *[width] * hidden, 4]
    weights = [normal(b, a) / a**0.5 for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    biases = [0.1 * normal(size) for size in sizes[1:]]
    biases[-1][0] += 0.5
    cells = torch.rand(cascades(bound), resolution**3 // 8, 8, generator=generator) < filled
    bits = (cells * 2 ** torch.arange(8)).sum(-1).to(torch.uint8).to(device)
    spec = FieldSpec(grid=grid, bound=bound, **{"blob_density": 4.0, "blob_radius": 0.3 * bound, **spec})
    return bits, normal(grid.rows, grid.features), weights, biases, spec


def camera(rays, device, *, seed=0, distance=2.0, spread=0.3):
    """Rays from around the scene towards it; some miss. Not contiguous in the origins."""
    generator = torch.Generator().manual_seed(seed)
    origin = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0) * distance
    directions = -origin / distance + spread * torch.randn(rays, 3, generator=generator)
    return origin.to(device).expand(rays, 3), torch.nn.functional.normalize(directions, dim=1).to(device)


def doubled(arguments):
    def double(value):
        if isinstance(value, (list, tuple)):
            return [double(one) for one in value]
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return [double(value) for value in arguments]


def certainty(x, table, weights, biases, spec, epsilon, active_levels):
    """Certainty of the normal at x: the gradient of sigma by differences, relative to an error of the logit."""
    steps = epsilon * torch.eye(3, dtype=x.dtype, device=x.device)
    sides = [(x + sign * step).clamp(-spec.bound, spec.bound) for step in steps for sign in (1, -1)]
    options = {"active_levels": active_levels}
    sigma = torch.stack([field_reference(side, table, weights, biases, spec, **options)[0] for side in sides])
    noise = sigma if spec.density_activation == "exp" else 1 - torch.exp(-sigma)  # d sigma / d logit
    return (sigma[::2] - sigma[1::2]).norm(dim=0) / noise.amax(0)


def compare(origins, directions, bits, table, weights, biases, spec, *, dtype=None, fewest=1, **options):
    """Check the kernels' view against the reference in fp64, and return it."""
    defaults = {"resolution": 16, "max_steps": 24, "stop": 1e-3, "dt_gamma": 0.0, "min_near": 0.01}
    options = {**defaults, "background": origins.new_tensor([0.2, 0.5, 0.9]), **options}
    arguments = (origins, directions, bits, table, weights, biases)
    view = render(*arguments, spec, dtype=dtype, **options)
    reference = render_reference(*arguments, spec, dtype=dtype, **options)
    exact_arguments = doubled(arguments)
    exact_options = {**options, "background": options["background"].double()}
    stop = options["stop"]
    exact = render_reference(*exact_arguments, spec, **exact_options)
    neighbours = [
        render_reference(*exact_arguments, spec, **{**exact_options, "stop": stop * factor, "normals": False})
        for factor in (0.999, 1.001)
    ]
    marching = {name: options[name] for name in ("resolution", "max_steps", "dt_gamma", "min_near")}
    counts = [
        packed_intervals(*rays, bits, bound=spec.bound, perturb=None, **marching)[3]
        for rays in ((origins, directions), exact_arguments[:2])
    ]
    compared = (counts[0] == counts[1]) & (neighbours[0].opacity == neighbours[1].opacity)
    # Half precision moves the transmittance by more than 0.1 %.
    if stop > 0 and dtype not in (None, torch.float32):
        compared &= exact.opacity < 1 - 1.5 * stop
    assert int(compared.sum()) >= min(fewest, len(origins)), "the scene proves nothing"
    for name in ("rgb", "depth", "opacity"):
        check(name, *(getattr(one, name)[compared] for one in (view, reference, exact)))
    if options.get("normals", True):
        compared &= (exact.opacity - EMPTY_OPACITY).abs() > 1e-4
        hit = exact.opacity > EMPTY_OPACITY
        assert not view.normal[compared & ~hit].any()
        compared &= hit
        surface = exact_arguments[0] + (exact.depth / exact.opacity)[:, None] * exact_arguments[1]
        epsilon, active = options.get("normal_epsilon", 0.01), options.get("active_levels")
        weight = certainty(surface[compared], *exact_arguments[3:], spec, epsilon, active)[:, None]
        check("normal", *(one.normal[compared] * weight.to(one.normal.dtype) for one in (view, reference, exact)))
    else:
        assert not view.normal.any()
    return view


def equal(one: View, other: View) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("rays", [0, 1, 33])
def test_render_small_shapes(rays, device):
    """Shapes around one element and one block, and none at all, match the reference."""
    compare(*camera(rays, device), *scene(device))


@pytest.mark.full_size("queues of 256 rays")
@pytest.mark.parametrize("rays", [255, 256, 257, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_render_queues(rays, dtype, device):
    """Numbers of rays around the size of a queue match the reference."""
    compare(*camera(rays, device), *scene(device, width=64, hidden=2), dtype=dtype, max_steps=256, fewest=100)


@pytest.mark.fuzz
def test_render_random_settings(seed, device):
    """Random sizes and settings match the reference."""
    rng = random.Random(seed)
    rays = rng.randint(1, 20 if INTERPRETED else 4000)
    bound = rng.choice([0.8, 1.0, 2.0, 3.0])
    grid = HashGridSpec(
        levels=rng.randint(1, 4 if INTERPRETED else 16),
        features=rng.choice([1, 2, 4]),
        log2_entries=rng.randint(6, 10 if INTERPRETED else 16),
        base_resolution=4,
        max_resolution=rng.randint(8, 60),
        interpolation=rng.choice(["smoothstep", "linear"]),
    )
    resolution = rng.choice([8, 16, 32])
    dtype = rng.choice([None, torch.float16] if INTERPRETED else [None, torch.float32, torch.float16, torch.bfloat16])
    active = rng.choice([None, 1, torch.tensor(2, device=device), 0])
    origins, directions = camera(rays, device, seed=seed, distance=bound * rng.uniform(0.1, 2.5))
    compare(
        origins,
        directions,
        *scene(
            device,
            seed=seed,
            grid=grid,
            bound=bound,
            resolution=resolution,
            filled=rng.choice([0.1, 0.5, 1.0]),
            width=rng.choice([16, 32] if INTERPRETED else [16, 32, 64, 128]),
            hidden=rng.randint(1, 2 if INTERPRETED else 4),
            density_activation=rng.choice(["exp", "softplus"]),
        ),
        dtype=dtype,
        resolution=resolution,
        max_steps=rng.choice([1, 9, 20] if INTERPRETED else [1, 20, 100, 512]),
        dt_gamma=rng.choice([0.0, 1 / 32]),
        min_near=rng.choice([0.01, 0.5]),
        stop=rng.choice([0.0, 1e-3, 0.2]),
        # Normals that are noise in half precision cannot be compared.
        normals=dtype in (None, torch.float32) and rng.random() < 0.7,
        normal_epsilon=rng.choice([0.01, 0.05]),
        active_levels=active,
        background=rng.choice([torch.rand(3, device=device), torch.rand(rays, 3, device=device)]),
        fewest=0,
    )


def test_render_empty(device):
    """An empty scene gives the background."""
    bits, *field = scene(device)
    origins, directions = camera(20, device)
    background = torch.rand(20, 3, device=device)
    view = render(
        origins, directions, torch.zeros_like(bits), *field, resolution=16, background=background, max_steps=24
    )
    assert torch.equal(view.rgb, background)
    assert not view.normal.any() and not view.depth.any() and not view.opacity.any()


def test_render_ragged_rays(device):
    """Rays of very different length in one queue give the results of each ray alone."""
    bits, table, weights, biases, spec = scene(device, filled=0.02)
    count = 36 if INTERPRETED else 3000
    origins, directions = camera(count, device, spread=0.2)
    options = {"resolution": 16, "background": torch.ones(3, device=device), "max_steps": 20}
    arguments = (bits, table, weights, biases, spec)
    view = render(origins, directions, *arguments, **options)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device)
    if INTERPRETED:
        order = order[:14]
    shuffled = render(origins[order], directions[order], *arguments, **options)
    assert equal(View(*(value[order] for value in view)), shuffled)


def test_render_repeats(device):
    """Repeats are equal bit for bit."""
    arguments = (*camera(4 if INTERPRETED else 20_000, device), *scene(device))
    options = {"resolution": 16, "max_steps": 24, "background": torch.ones(3, device=device)}
    first = render(*arguments, **options)
    assert all(equal(first, render(*arguments, **options)) for _ in range(1 if INTERPRETED else 9))


@pytest.mark.parametrize("width", [24])
def test_render_unfused_field(width, device):
    """Fields without a fused kernel match the reference."""
    compare(*camera(6, device), *scene(device, width=width), chunk=4, max_steps=12)


def test_render_bad_arguments(device):
    """Errors name the argument and both values."""
    origins, directions = camera(3, device)
    bits, table, weights, biases, spec = scene(device)
    white = torch.ones(3, device=device)
    with pytest.raises(TypeError, match="origins is float64, which the kernels do not compute in"):
        render(
            *doubled((origins, directions, bits, table, weights, biases)),
            spec,
            resolution=16,
            background=white.double(),
        )
    with pytest.raises(TypeError, match="dtype is float64, which the kernels do not compute in"):
        render(
            origins,
            directions,
            bits,
            table,
            weights,
            biases,
            spec,
            resolution=16,
            background=white,
            dtype=torch.float64,
        )


@jit
def _sums_kernel(values, sums, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Each lane adds its value to a sum COUNT times."""
    lane = tl.arange(0, LANES)
    value = tl.load(values + lane)
    total, error = value * 0, value * 0
    for _ in range(COUNT):
        total, error = _add(total, value, error)
    tl.store(sums + lane, total)


def test_render_compensated_sum(device):
    """Hundreds of equal numbers add up to their product; plain additions are all off to the same side."""
    values = (1 + torch.rand(64, generator=torch.Generator().manual_seed(0))).to(device)
    sums, exact = torch.empty_like(values), 700 * values.double()
    launch(_sums_kernel, (1,), values.device, values=values, sums=sums, COUNT=700, LANES=64)
    check("sums", sums, exact.float(), exact)


def sphere(side, device):
    """The rays_* camera and a solid ball of density 100 whose colour and normal come from a random field."""
    axis = ((torch.arange(side, device=device) + 0.5) / side * 2 - 1) * 0.17632698  # tan 10 degrees
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    directions = torch.nn.functional.normalize(
        torch.stack([right, -down, -torch.ones_like(right)], -1).view(-1, 3), dim=1
    )
    origins = torch.tensor([0.0, 0.0, 3.2], device=device).expand(side * side, 3).contiguous()
    _, table, weights, biases, spec = scene(
        device, grid=HashGridSpec(), width=64, hidden=2, bound=1.0, blob_density=0.0
    )
    weights[-1][0] *= 0.1
    biases[-1][0] = 4.6
    centre = (torch.arange(128, device=device) + 0.5) / 64 - 1
    x, y, z = torch.meshgrid(centre, centre, centre, indexing="ij")
    inside = (x * x + y * y + z * z < 0.25).view(1, -1, 8)
    bits = (inside * 2 ** torch.arange(8, device=device)).sum(-1).to(torch.uint8)
    return origins, directions, bits, table, weights, biases, spec


@pytest.mark.full_size("a frame")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_render_frame(dtype, device):
    """A frame matches the reference."""
    origins, directions, *field = sphere(200, device)
    view = compare(origins, directions, *field, dtype=dtype, resolution=128, max_steps=1024, stop=0.0, fewest=10_000)
    assert 0.55 < float((view.opacity > 0.9).float().mean()) < 0.7


@pytest.mark.full_size("memory of a frame")
def test_render_memory(device):
    """Memory does not grow with the samples."""
    arguments = sphere(800, device)
    options = {"resolution": 128, "background": torch.ones(3, device=device), "dtype": torch.float16}
    render(*arguments, **options)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    render(*arguments, **options)
    peak = torch.cuda.max_memory_allocated() - before
    # 32 bytes a ray for the result and 8 for its queue; 2 bytes an entry of the table.
    assert peak < 640_000 * 44 + 2 * arguments[3].numel() + 2**20


@pytest.mark.full_size("CUDA graph, streams, synchronisation with the host")
def test_render_stream_and_graph(device):
    """Results are the same on another stream and from a CUDA graph, without a synchronisation."""
    arguments = sphere(64, device)
    active = torch.tensor(12, device=device)
    options = {
        "resolution": 128,
        "background": torch.ones(3, device=device),
        "dtype": torch.float16,
        "active_levels": active,
    }
    eager = render(*arguments, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        render(*arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = render(*arguments, **options)
    torch.cuda.synchronize()
    assert equal(eager, on_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = render(*arguments, **options)
    graph.replay()
    assert equal(eager, captured)
    active.fill_(1)
    graph.replay()
    assert equal(render(*arguments, **{**options, "active_levels": 1}), captured)


@pytest.mark.full_size("fields without a fused kernel, without a synchronisation")
def test_render_unfused_no_synchronisation(device):
    """The unfused path does not wait for the device."""
    arguments = (*camera(3000, device), *scene(device, width=24))
    options = {"resolution": 16, "background": torch.ones(3, device=device), "max_steps": 64}
    eager = render(*arguments, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = render(*arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(eager, again)


@pytest.mark.full_size("more than 2^31 elements")
def test_render_beyond_int32(device):
    """The last rays of so many that their coordinates pass 2^31; all the others miss."""
    rays, tail = 2**31 // 3 + 1000, 500
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("needs 70 GiB")
    origins = torch.full((rays, 3), 5.0, device=device)
    directions = torch.full((rays, 3), 3**-0.5, device=device)
    origins[-tail:], directions[-tail:] = camera(tail, device)
    field = scene(device)
    options = {"resolution": 16, "background": torch.ones(3, device=device)}
    view = render(origins, directions, *field, **options)
    small = render(origins[-tail:].clone(), directions[-tail:].clone(), *field, **options)
    assert equal(View(*(value[-tail:] for value in view)), small)
    assert bool((view.opacity[:-tail] == 0).all()) and bool((view.rgb[:-tail] == 1).all())


@pytest.mark.full_size("a second GPU")
def test_render_second_device():
    """Kernels start on the device of their tensors, also where another one is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    device = torch.device("cuda:1")
    compare(*camera(300, device), *scene(device))
