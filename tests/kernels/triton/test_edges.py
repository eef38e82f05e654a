"""Edges that random inputs seldom reach: faces of the cube, ends of the range of numbers, tiles in turns."""

import importlib
import sys

import pytest
import torch

from dream_fast import kernels
from dream_fast.bench.accuracy import check
from dream_fast.kernels import FieldSpec, HashGridSpec
from dream_fast.kernels.grid import regularizers

GRID = HashGridSpec(levels=2, features=2, log2_entries=8, base_resolution=4, max_resolution=9)


def network(grid, device, *, seed=0, width=16):
    """Table, weights and biases of a field."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(grid.rows, grid.features), (width, grid.channels), (4, width), (width,), (4,)]
    table, *layers = (torch.randn(*shape, generator=generator).to(device) for shape in shapes)
    return table, [layers[0] * 0.5, layers[1] * 0.3], layers[2:]


def in_fp64(value):
    """Tensors, or lists of them, in fp64 where they are fp32."""
    if isinstance(value, (list, tuple)):
        return [in_fp64(part) for part in value]
    return value.double() if value.dtype == torch.float32 else value


def compare(names, call, operator, reference, tensors):
    """call(operator, *tensors) of the kernels, within the reference's own error from the reference in fp64."""
    results = [call(operator, *tensors), call(reference, *tensors), call(reference, *in_fp64(tensors))]
    for name, got, single, exact in zip(names, *results, strict=True):
        check(name, got, single, exact)
    return results[0]


def together(tensors):
    """Several tensors as one vector, since a comparison of few numbers depends on luck."""
    return torch.cat([part.flatten() for part in tensors])


def test_composite_opaque_sample(device):
    """An optical depth of 1e19 does not cost the depth in front of it its digits, in weights and gradients."""
    generator = torch.Generator().manual_seed(0)
    sigma, values = torch.rand(80, generator=generator).to(device), torch.rand(80, 3, generator=generator).to(device)
    sigma[70] = 1e20
    t, dt = torch.arange(80.0, device=device), torch.full((80,), 0.1, device=device)
    offsets = torch.tensor([0, 80], device=device)

    def call(operator, sigma, values, t, dt):
        leaves = [sigma.detach().requires_grad_(), values.detach().requires_grad_()]
        out = operator(*leaves, t, dt, offsets)
        grads = torch.autograd.grad(out.values.sum() + out.depth.sum(), leaves)
        return out.weights.detach(), *grads

    names = ("weights", "gradient of sigma", "gradient of values")
    compare(names, call, kernels.composite, kernels.composite_reference, (sigma, values, t, dt))


def test_march_faces(device):
    """A ray within a face, and samples so near a face that their cell's number rounds up past the last."""
    step = 2 * 3**0.5 / 64
    origins = torch.zeros(25, 3)
    origins[0] = torch.tensor([-1.0, 0.3, -0.9])
    # The fourth sample of some of these lies at the last number before the face.
    origins[1:, 0] = 1 - (0.01 + 3.5 * step) - torch.arange(-8, 16) * 2.0**-27
    directions = torch.eye(3)[[2] + [0] * 24].contiguous()
    bits = torch.full((1, 16**3 // 8), 255, dtype=torch.uint8)
    arguments = [tensor.to(device) for tensor in (origins, directions, bits)]
    options = {"bound": 1.0, "resolution": 16, "max_steps": 64, "capacity": 2000}
    got, expected = kernels.march(*arguments, **options), kernels.march_reference(*arguments, **options)
    assert expected.offsets[1] > 0 and (expected.positions[:, 0] == 1 - 2**-24).any() and not expected.overflow
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def view_rays(operator, rays, spec, fields, **options):
    """Depth, opacity and normals of rays through a cube whose cells are all set."""
    bits = torch.full((kernels.cascades(spec.bound), 16**3 // 8), 255, dtype=torch.uint8, device=rays[0].device)
    options = {"resolution": 16, "background": torch.zeros_like(rays[0][0]), "max_steps": 64} | options
    view = operator(*rays, bits, *fields, spec, **options)
    return view.depth, view.opacity, view.normal


def test_render_step_limit(device):
    """Steps that grow with the distance are never longer than a cell's diagonal."""
    spec = FieldSpec(grid=GRID, bound=2.0, blob_density=0.0)
    table, weights, biases = network(GRID, device)
    origins = torch.rand(64, 3, generator=torch.Generator().manual_seed(1)).to(device)
    origins[:, 2] = 3.5
    rays = (origins, torch.tensor([[0.0, 0.0, -1.0]], device=device).expand(64, 3))

    def call(operator, rays, *fields):
        return view_rays(operator, rays, spec, fields, dt_gamma=0.5, stop=0.0)[:2]

    names, fields = ("depth", "opacity"), (table * 0.1, weights, [biases[0], biases[1] - 1])
    compare(names, call, kernels.render, kernels.render_reference, (rays, *fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_render_normals_at_faces(dtype, device):
    """The taps of a normal stay in the cube, where the surface is its face."""
    spec = FieldSpec(grid=GRID, blob_density=0.0)
    table, weights, biases = network(GRID, device)
    places = torch.rand(8, 2, generator=torch.Generator().manual_seed(1)).to(device) - 0.5
    rays = [torch.zeros(24, 3, device=device) for _ in range(2)]
    for axis in range(3):
        rows = slice(8 * axis, 8 * axis + 8)
        rays[0][rows, axis], rays[1][rows, axis] = 2.0, -1.0
        rays[0][rows, (axis + 1) % 3], rays[0][rows, (axis + 2) % 3] = places.unbind(1)
    dense = [biases[0], biases[1] + torch.tensor([7.0, 0, 0, 0], device=device)]

    def call(operator, rays, *fields):
        return view_rays(
            operator,
            rays,
            spec,
            fields,
            max_steps=512,
            normal_epsilon=0.05,
            dtype=None if rays[0].dtype == torch.float64 else dtype,
        )[2:]

    compare(("normal",), call, kernels.render, kernels.render_reference, (rays, table, weights, dense))


@pytest.mark.parametrize("features", [1, 2, 4])
def test_field_features(features, device):
    """Rows of one, two and four features in fp32."""
    grid = HashGridSpec(levels=2, features=features, log2_entries=8, base_resolution=4, max_resolution=9)
    spec = FieldSpec(grid=grid)
    x = torch.rand(64, 3, generator=torch.Generator().manual_seed(1)).to(device) * 2 - 1

    def call(operator, x, *fields):
        return operator(x, *fields, spec)

    compare(("sigma", "albedo"), call, kernels.field, kernels.field_reference, (x, *network(grid, device)))


def test_field_blob_far_away(device):
    """Far from a small blob the logarithm of its density is no number that an exponent of fp32 holds."""
    spec = FieldSpec(grid=GRID, blob_radius=0.02)
    x = torch.rand(64, 3, generator=torch.Generator().manual_seed(1)).to(device) * 2 - 1

    def call(operator, x, *fields):
        return operator(x, *fields, spec)

    compare(("sigma", "albedo"), call, kernels.field, kernels.field_reference, (x, *network(GRID, device)))


@pytest.mark.parametrize("mode", [None, "finite_difference", "analytic"])
def test_field_one_program(mode, device, monkeypatch, deterministic):
    """Many tiles for each program, and more padding than one tile: outputs, gradients, zeros past the count."""
    module = sys.modules["dream_fast.kernels.fields.field" if mode is None else "dream_fast.kernels.fields.normals"]
    for name in ("_field_fwd_config", "_field_bwd_config") if mode is None else ("_field_normals_bwd_config",):
        config = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *shape, config=config: config(*shape)._replace(programs=1))
    monkeypatch.setattr(module, "multiprocessors", lambda _: 1)
    spec, options = FieldSpec(grid=GRID), {} if mode is None else {"mode": mode}
    operators = (kernels.field, kernels.field_reference)
    if mode is not None:
        operators = (kernels.field_normals, kernels.field_normals_reference)
    x = torch.rand(250, 3, generator=torch.Generator().manual_seed(2)).to(device) * 1.6 - 0.8
    count = torch.tensor(100, device=device)
    x[100:] = float("nan")

    def call(operator, x, table, weights, biases):
        leaves = [leaf.detach().requires_grad_() for leaf in (table, *weights, *biases)]
        out = operator(x, leaves[0], leaves[1:3], leaves[3:], spec, count=count, **options)
        grads = torch.autograd.grad(sum(part.sum() for part in out[:2]), leaves)
        return *(part.detach() for part in out[:2]), grads[0], together(grads[1:])

    names = ("sigma", "albedo", "gradient of the table", "gradient of the network")
    results = compare(names, call, *operators, (x, *network(GRID, device)))
    assert not results[0][100:].any() and not results[1][100:].any()


def test_field_normals_analytic_floor(device):
    """Below the floor of the gradient's length normals are 0 and take no gradient; above it they do."""
    spec = FieldSpec(grid=GRID, blob_density=0.0)
    table, weights, biases = network(GRID, device)
    x = torch.rand(24, 3, generator=torch.Generator().manual_seed(3)).to(device) * 1.6 - 0.8
    upstream = torch.randn(24, 3, generator=torch.Generator().manual_seed(4)).to(device)

    def call(operator, x, table, weights, biases, upstream):
        leaves = [leaf.detach().requires_grad_() for leaf in (table, *weights, *biases)]
        normal = operator(x, leaves[0], leaves[1:3], leaves[3:], spec, mode="analytic")[2]
        grads = torch.autograd.grad(normal, leaves, upstream, allow_unused=True, materialize_grads=True)
        return normal.detach(), grads[0], together(grads[1:])

    flat = call(kernels.field_normals, x, table * 2e-13, weights, biases, upstream)
    assert not any(tensor.any() for tensor in flat)
    names = ("normal", "gradient of the table", "gradient of the network")
    tensors = (x, table * 2e-8, weights, biases, upstream)
    normal, *_ = compare(names, call, kernels.field_normals, kernels.field_normals_reference, tensors)
    lengths = normal.norm(dim=1)
    check("length", lengths, torch.ones_like(lengths), torch.ones_like(lengths).double())


def test_field_normals_clamped_taps(device):
    """A tap that is clamped to a face does not move with the point; the free ones do."""
    spec = FieldSpec(grid=GRID, blob_radius=0.7)
    table, weights, biases = network(GRID, device)
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(24, 3, generator=generator).to(device) * 1.6 - 0.8
    x[range(24), [i % 3 for i in range(24)]] = torch.tensor([0.97, -0.97] * 12, device=device)
    upstream = torch.randn(24, 3, generator=generator).to(device)

    def call(operator, x, table, weights, biases, upstream):
        x = x.detach().requires_grad_()
        normal = operator(x, table, weights, biases, spec, epsilon=0.05)[2]
        return torch.autograd.grad(normal, x, upstream)

    tensors = (x, table, weights, biases, upstream)
    compare(("x",), call, kernels.field_normals, kernels.field_normals_reference, tensors)


def test_total_variation_last_vertex(device):
    """Points on the far faces of the cube pick the last vertex."""
    table, points = network(GRID, device)[0], torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.2, 0.5]], device=device)

    def call(operator, table, points):
        return (operator(table, GRID, points, 0.5),)

    operators = (
        regularizers.hash_grid_total_variation_grad,
        regularizers.hash_grid_total_variation_grad_reference,
    )
    compare(("gradient",), call, *operators, (table, points))


def test_hash_grid_bf16_table(device, monkeypatch):
    """Both entries of a word, where every number on the way is one of bfloat16: averages of small integers."""
    monkeypatch.setattr(importlib.import_module("dream_fast.kernels.grid.hash_grid"), "_rounds_table", lambda *_: True)
    grid = HashGridSpec(levels=2, features=2, log2_entries=10, base_resolution=4, max_resolution=8)
    generator = torch.Generator().manual_seed(6)
    table = torch.randint(-4, 5, (grid.rows, 2), generator=generator).float().to(device)
    x = ((torch.randint(0, 4, (30, 3), generator=generator) + 0.5) / 4).to(device)
    got = kernels.hash_grid(x, table, grid, dtype=torch.bfloat16)
    assert grid.resolutions == (4, 8) and torch.equal(got.float(), kernels.hash_grid_reference(x, table, grid))


def test_occupancy_many_blocks(device, monkeypatch):
    """More sums of blocks than a program adds up at a time."""
    module = importlib.import_module("dream_fast.kernels.rays.occupancy")
    config = module._occupancy_config()._replace(block=8, blocks=4, bytes=4)
    monkeypatch.setattr(module, "_occupancy_config", lambda: config)
    density = torch.rand(1, 200, generator=torch.Generator().manual_seed(7)).to(device)
    expected = density.clone()
    bits, mean = kernels.occupancy_update(density, torch.zeros_like(density))
    other_bits, other_mean = kernels.occupancy_update_reference(expected, torch.zeros_like(density))
    check("mean", mean, other_mean, expected.double().mean())
    assert torch.equal(bits, other_bits)


def test_rasterize_negative_zero(device):
    """The first of two triangles in one plane is visible, whatever the sign of a depth of zero."""
    corners = torch.tensor([[-1.0, -1, 0, 1], [3, -1, 0, 1], [-1, 3, 0, 1]], device=device)
    clip = torch.cat([corners, corners * torch.tensor([1.0, 1, -1, 1], device=device)])[None]
    fragments = kernels.rasterize(clip, torch.tensor([[0, 1, 2], [3, 4, 5]], device=device), 4, 4)
    assert torch.signbit(clip[0, 3:, 2]).all() and (fragments.triangle == 0).all() and not fragments.depth.any()


def test_adan_bias_correction(device):
    """1 - b^step keeps its digits where b is close to 1: it shows in parameters that start at 0."""
    grads = torch.randn(100, generator=torch.Generator().manual_seed(8)).to(device)

    def call(operator, grads):
        params = torch.zeros_like(grads)
        options = {"group_ends": (100,), "lrs": (0.1,), "betas": (0.9999, 0.9998, 0.9999)}
        operator(params, grads, kernels.AdanState.zeros(params), **options)
        return (params,)

    compare(("parameters",), call, kernels.adan_step, kernels.adan_step_reference, (grads,))


@pytest.mark.parametrize("size", [106, 90])
def test_adan_few_programs(size, device, monkeypatch):
    """Programs that take many blocks each, and the partial block at the end, which belongs to either of them."""
    module = importlib.import_module("dream_fast.kernels.optim.adan")
    config = module.AdanConfig(norm_block=16, norm_programs=2, update_block=16, update_programs=2, num_warps=1)
    monkeypatch.setattr(module, "_adan_config", lambda: config)
    grads = torch.randn(size, generator=torch.Generator().manual_seed(9)).to(device)

    def call(operator, grads):
        params = torch.zeros_like(grads)
        state = kernels.AdanState.zeros(params)
        operator(params, grads, state, group_ends=(size,), lrs=(0.1,), max_grad_norm=0.5)
        return params, state.previous_grad

    compare(("parameters", "gradient"), call, kernels.adan_step, kernels.adan_step_reference, (grads,))


@pytest.mark.parametrize(("logit", "normals"), [(2.0, False), (-14.0, True)])
def test_render_no_normals(logit, normals, device, deterministic):
    """Normals are 0 without `normals`, and on rays through nearly empty space."""
    spec = FieldSpec(grid=GRID, blob_density=0.0)
    table, weights, biases = network(GRID, device)
    fields = (table * 0.1, weights, [biases[0], biases[1] + torch.tensor([logit, 0, 0, 0], device=device)])
    origins = torch.tensor([[0.1, 0.2, 2.0]] * 5 + [[5.0, 5.0, 2.0]], device=device)
    rays = (origins, torch.tensor([[0.0, 0.0, -1.0]], device=device).expand(6, 3))
    _, opacity, normal = view_rays(kernels.render, rays, spec, fields, normals=normals)
    assert opacity[:5].all() and not normal.any()


def test_field_softplus_blob_center(device):
    """The blob's distance and its slope next to its centre, where they have no derivative."""
    spec = FieldSpec(grid=GRID, density_activation="softplus", blob_density=10.0, blob_radius=0.2)
    table, weights, biases = network(GRID, device)
    x = (torch.rand(64, 3, generator=torch.Generator().manual_seed(10)).to(device) - 0.5) * 0.05
    x[0] = 0

    def call(operator, x, table, weights, biases):
        x = x.detach().requires_grad_()
        sigma, albedo = operator(x, table * 0.1, weights, biases, spec)
        return sigma.detach(), torch.autograd.grad(sigma.sum(), x)[0]

    names = ("sigma", "gradient of x")
    compare(names, call, kernels.field, kernels.field_reference, (x, table, weights, biases))


def test_hash_grid_last_vertex(device):
    """A point on the last vertex of a level belongs to the cell before it."""
    grid = HashGridSpec(
        levels=1, features=2, log2_entries=8, base_resolution=4, max_resolution=4, interpolation="linear"
    )
    table = network(grid, device)[0]
    upstream = torch.randn(64, 2, generator=torch.Generator().manual_seed(11)).to(device)
    x = torch.rand(64, 3, generator=torch.Generator().manual_seed(12)).to(device)
    x[range(64), [i % 3 for i in range(64)]] = 3.5 / 4

    def call(operator, x, table, upstream):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(operator(x, table, grid), x, upstream)

    compare(("gradient of x",), call, kernels.hash_grid, kernels.hash_grid_reference, (x, table, upstream))


def test_field_sixteen_levels_outside(device):
    """With all 16 levels in use nothing is masked; outside the cube features are zero all the same."""
    grid = HashGridSpec(levels=16, features=2, log2_entries=6, base_resolution=2, max_resolution=9)
    x = torch.rand(64, 3, generator=torch.Generator().manual_seed(13)).to(device) * 2.6 - 1.3

    def call(operator, x, *fields):
        return operator(x, *fields, FieldSpec(grid=grid))

    compare(("sigma", "albedo"), call, kernels.field, kernels.field_reference, (x, *network(grid, device)))
