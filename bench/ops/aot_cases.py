"""What the ahead-of-time gate compiles: every kernel of every operator, at the sizes of the benchmark.

Each entry builds its inputs on the CPU and gives a function that calls public operators; under `recorded_launches`
nothing is computed, so the sizes cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.bench.ops.cases import FIELD, OCCUPANCY, Case, camera, normal, occupancy_bits, points, random, run
from dream_fast.kernels import FieldSpec, HashGridSpec

CPU = torch.device("cpu")
Call = Callable[[], object]


def benchmarked(op: str, case: str, mode: str, dtype: str) -> Call:
    """A row of the benchmark."""
    what = Case(op=op, case=case, mode=mode, dtype=dtype)
    problem = what.build(CPU, count_bytes=False)
    return partial(run, problem, problem.operator, mode, what.compute_dtype)


def backward(outputs: tuple[Tensor, ...] | Tensor) -> None:
    """Gradients of everything from every output."""
    outputs = [out for out in ([outputs] if isinstance(outputs, Tensor) else outputs) if out.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])


def world(case: str = "rays_64") -> Tensor:
    return points(case, CPU).requires_grad_()


def table_of(grid: HashGridSpec) -> Tensor:
    return torch.zeros(grid.rows, grid.features, requires_grad=True)


def grid_gradients(grid: HashGridSpec, dtype: torch.dtype, levels: int | None = None) -> Call:
    """Gradients into table and positions, and of the position gradient into the table."""
    x, table = ((world().detach() + 1) / 2).requires_grad_(), table_of(grid)
    options = {"dtype": dtype, "active_levels": levels, "count": torch.tensor(x.shape[0])}

    def call():
        backward(kernels.hash_grid(x, table, grid, **options))
        features = kernels.hash_grid(x, table, grid, **options)
        (to_x,) = torch.autograd.grad(features, x, torch.ones_like(features), create_graph=True)
        backward(to_x)

    return call


def deterministic(call: Call) -> Call:
    """With torch's deterministic algorithms, in which sums have an order."""

    def wrapped():
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            call()
        finally:
            torch.use_deterministic_algorithms(False)

    return wrapped


def grid_regularizers() -> Call:
    table = table_of(FIELD.grid).detach()
    picked = random(1 << 14, 3, device=CPU, seed=1)

    def call():
        kernels.hash_grid_total_variation_grad(table, FIELD.grid, picked, 1.0)
        kernels.hash_grid_weight_decay_grad(table, FIELD.grid, 1.0)

    return call


def field_gradients(op: Callable, width: int, hidden: int, dtype: torch.dtype, activation: str, **options) -> Call:
    """A field of another shape, with gradients into the positions as well."""
    spec = FieldSpec(density_activation=activation)
    sizes = (spec.grid.channels, *[width] * hidden, 4)
    x, table = world(), table_of(spec.grid)
    weights = [torch.zeros(b, a, requires_grad=True) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    biases = [torch.zeros(b, requires_grad=True) for b in sizes[1:]]
    count = torch.tensor(x.shape[0])
    return lambda: backward(op(x, table, weights, biases, spec, dtype=dtype, count=count, **options))


def march_cascades() -> Call:
    """Three cascades, growing steps, and the gradient into the rays."""
    origins, directions = (rays.requires_grad_() for rays in camera(64, CPU))
    bits = occupancy_bits(CPU).expand(3, -1).contiguous()
    options = {"bound": 4.0, "resolution": OCCUPANCY, "capacity": 1 << 19, "dt_gamma": 1 / 256}
    return lambda: backward(kernels.march(origins, directions, bits, **options).positions)


def composite_channels(dtype: torch.dtype) -> Call:
    """Colour and normal in one pass, gradients from every output."""
    rows, rays = 1 << 19, 64 * 64
    sigma, values = (normal(*shape, device=CPU, seed=1, dtype=dtype).requires_grad_() for shape in ((rows,), (rows, 6)))
    t, dt = torch.ones(rows, dtype=dtype), torch.ones(rows, dtype=dtype)
    offsets = torch.arange(rays + 1) * (rows // rays)
    return lambda: backward(kernels.composite(sigma, values, t, dt, offsets, count=offsets[-1]))


def occupancy() -> Call:
    density, fresh = torch.zeros(2, OCCUPANCY**3), torch.zeros(2, OCCUPANCY**3)
    x = world("uniform_2^20").detach()
    noise = torch.zeros(2 * OCCUPANCY**3, 3)

    def call():
        kernels.occupancy_points(OCCUPANCY, 2, 2.0, noise)
        bits, _ = kernels.occupancy_update(density, fresh)
        kernels.occupancy_query(torch.zeros_like(bits), x, 2.0, OCCUPANCY)

    return call


def group_norm(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, last: bool, silu: bool = True, added: bool = False
) -> Call:
    """Gradients into x, weight and bias, or with ``added`` into x alone, as in a frozen model."""
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.zeros(shape, dtype=dtype).to(memory_format=order).requires_grad_()
    weight, bias = (torch.zeros(shape[1], dtype=dtype, requires_grad=not added) for _ in range(2))
    more = torch.zeros(shape[:2], dtype=dtype) if added else None
    return lambda: backward(kernels.group_norm_silu(x, groups, weight, bias, silu=silu, added=more))


HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16
FINITE, ANALYTIC = {"mode": "finite_difference"}, {"mode": "analytic"}
LINEAR = HashGridSpec(interpolation="linear", features=4, levels=8)

# Normals and rendering in fp32 take longest to compile and are nobody's default: tests run them, nothing gates them.
AOT_CASES: dict[str, Callable[[], Call]] = {
    "hash_grid/float16": partial(benchmarked, "hash_grid", "rays_64", "forward_backward", "float16"),
    "hash_grid/float32": partial(benchmarked, "hash_grid", "rays_64", "forward_backward", "float32"),
    "hash_grid/positions": partial(grid_gradients, FIELD.grid, HALF),
    "hash_grid/linear": partial(grid_gradients, LINEAR, FULL, 4),
    "hash_grid/deterministic": lambda: deterministic(
        benchmarked("hash_grid", "rays_64", "forward_backward", "float16")
    ),
    "hash_grid/regularizers": grid_regularizers,
    "field/float16": partial(benchmarked, "field", "rays_64", "forward_backward", "float16"),
    "field/forward": partial(benchmarked, "field", "rays_64", "forward", "float16"),
    "field/float32": partial(benchmarked, "field", "rays_64", "forward_backward", "float32"),
    "field/narrow": partial(field_gradients, kernels.field, 16, 1, HALF, "softplus"),
    "field/wide": partial(field_gradients, kernels.field, 128, 2, BRAIN, "exp"),
    "field/deterministic": lambda: deterministic(benchmarked("field", "rays_64", "forward_backward", "float16")),
    "field_normals/finite_difference_float16": partial(
        benchmarked, "field_normals", "rays_64_finite_difference", "forward_backward", "float16"
    ),
    "field_normals/analytic_float16": partial(
        benchmarked, "field_normals", "rays_64_analytic", "forward_backward", "float16"
    ),
    "field_normals/finite_difference_positions": partial(
        field_gradients, kernels.field_normals, 16, 1, HALF, "exp", **FINITE
    ),
    "field_normals/analytic_positions": partial(
        field_gradients, kernels.field_normals, 16, 1, HALF, "softplus", **ANALYTIC
    ),
    "march/float32": partial(benchmarked, "march", "rays_64", "forward", "float32"),
    "march/cascades": march_cascades,
    "composite/float32": partial(benchmarked, "composite", "rays_64", "forward_backward", "float32"),
    "composite/channels_float32": partial(composite_channels, FULL),
    "composite/channels_float16": partial(composite_channels, HALF),
    "occupancy/float32": occupancy,
    "render/float16": partial(benchmarked, "render", "frame_800_normals", "forward", "float16"),
    "adan/float32": partial(benchmarked, "adan", "12.2M", "forward", "float32"),
    # Groups of many programs (where channels are last merged by a kernel of their own), of some, and of one each.
    **{
        f"group_norm_silu/{case}": partial(benchmarked, "group_norm_silu", case, "forward_backward", "float16")
        for case in ("vae_512x512x128", "vae_512x512x128_channels_last")
        + ("unet_64x64x320_channels_last", "unet_16x16x1280_channels_last")
    },
    "bias_residual/vae": partial(benchmarked, "bias_residual", "vae_512x512x128", "forward", "float16"),
    "bias_residual/unet": partial(benchmarked, "bias_residual", "unet_64x64x320_channels_last", "forward", "float16"),
    "raster/float32": partial(benchmarked, "raster", "mesh_50k_512", "forward_backward", "float32"),
    "raster/interpolate": partial(benchmarked, "interpolate", "mesh_50k_512", "forward_backward", "float32"),
    "raster/antialias": partial(benchmarked, "antialias", "mesh_50k_512", "forward_backward", "float32"),
    "raster/deterministic": lambda: deterministic(benchmarked("raster", "mesh_50k_512", "forward_backward", "float32")),
    "group_norm_silu/weights_float32": partial(group_norm, (1, 128, 512, 512), 32, FULL, False),
    "group_norm_silu/weights_bfloat16": partial(group_norm, (2, 640, 32, 32), 32, BRAIN, True, False),
    "group_norm_silu/weights_small": partial(group_norm, (2, 640, 16, 16), 32, HALF, False, False),
    "group_norm_silu/added": partial(group_norm, (1, 128, 512, 512), 32, HALF, True, added=True),
}
