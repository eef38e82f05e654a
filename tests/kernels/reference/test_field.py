"""The field: activations, blob, clamped exponential, gradients, normals of a known density, padding."""

import math
from fractions import Fraction

import pytest
import torch

from dream_fast.bench.accuracy import check, check_fp64
from dream_fast.kernels import FieldSpec, HashGridSpec, field, field_normals, hash_grid
from dream_fast.kernels.fields.encode import unit_scale

GRID = HashGridSpec(levels=3, features=2, log2_entries=6, base_resolution=3, max_resolution=8)
# For gradients by differences: few entries, one dense level and one hashed.
TINY = HashGridSpec(levels=2, features=1, log2_entries=3, base_resolution=2, max_resolution=4)


def parameters(grid=GRID, hidden=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    weights = [random(hidden, grid.channels), random(4, hidden)]
    return random(grid.rows, grid.features), weights, [random(hidden), random(4)]


def points(n=6, bound=0.6, seed=1, dtype=torch.float64):
    return (torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1) * bound


def flat(*, constant=0.0):
    """Parameters of a field whose logits are constant: only the blob shapes the density."""
    table, weights, biases = parameters()
    weights[-1].zero_(), biases[-1].fill_(constant)
    return table, weights, biases


@pytest.mark.parametrize("activation", ["exp", "softplus"])
def test_field_blob(activation):
    """The blob's density in closed form, at the origin and at two distances."""
    spec = FieldSpec(grid=GRID, density_activation=activation, blob_density=4.0, blob_radius=0.3)
    sigma, albedo = field(torch.tensor([[0.0, 0, 0], [0.3, 0, 0], [0, 0.4, 0.3]], dtype=torch.float64), *flat(), spec)
    if activation == "exp":
        expected = [math.exp(4 * math.exp(-(r**2) / (2 * 0.09))) for r in (0, 0.3, 0.5)]
    else:
        expected = [math.log1p(math.exp(4 * (1 - r / 0.3))) for r in (1e-6, 0.3, 0.5)]  # the floor of r
    check_fp64("sigma", sigma, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(albedo, torch.full_like(albedo, 0.5))


def by_torchs_layers(x, table, weights, biases, dtype):
    """sigma and albedo with torch's own layers in `dtype`, in a cube of bound 0.6."""
    first, second = torch.nn.Linear(6, 5, dtype=dtype), torch.nn.Linear(5, 4, dtype=dtype)
    for layer, weight, bias in zip((first, second), weights, biases, strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})
    with torch.no_grad():
        h = second(torch.relu(first(hash_grid((x + 0.6) / 1.2, table, GRID, dtype=dtype)))).to(x.dtype)
    return torch.exp(h[:, 0] + 5 * torch.exp(-x.square().sum(1) / 0.08)), torch.sigmoid(h[:, 1:])


def test_field_definition():
    """Outputs equal those of torch's own layers on the grid's features."""
    layers, x = parameters(), points()
    outputs = field(x, *layers, FieldSpec(grid=GRID, bound=0.6))
    for got, expected in zip(outputs, by_torchs_layers(x, *layers, torch.float64), strict=True):
        check_fp64("output", got, expected)


def test_field_clamped_exponential():
    """sigma stops at exp(15), and its gradient goes on as if it were not clamped."""
    table, weights, biases = flat(constant=200.0)
    biases[-1].requires_grad_()
    spec = FieldSpec(grid=GRID)
    sigma, _ = field(points(), table, weights, biases, spec)
    check_fp64("sigma", sigma, torch.full_like(sigma, math.exp(15.0)))
    sigma.sum().backward()
    check_fp64("gradient", biases[-1].grad[:1], torch.full_like(sigma[:1], 6 * math.exp(15.0)))
    normal = field_normals(points(), table, weights, biases, spec)[2]
    assert torch.isfinite(normal).all()


@pytest.mark.parametrize("activation", ["exp", "softplus"])
def test_field_gradients(activation):
    """Gradients of all inputs agree with finite differences."""
    spec = FieldSpec(grid=TINY, bound=0.6, density_activation=activation, blob_density=2.0, blob_radius=0.3)
    table, weights, biases = parameters(TINY, hidden=2)
    leaves = [points(2), table, *weights, *biases]
    for leaf in leaves:
        leaf.requires_grad_()

    def function(x, table, first, second, third, fourth):
        return field(x, table, [first, second], [third, fourth], spec)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("mode", ["finite_difference", "analytic"])
def test_field_normals_gradients(mode):
    """Gradients of all inputs through normals agree with finite differences."""
    spec = FieldSpec(grid=TINY, bound=0.6, blob_density=2.0, blob_radius=0.3)
    table, weights, biases = parameters(TINY, hidden=2)
    table, weights = table * 0.3, [0.3 * weight for weight in weights]
    leaves = [points(2), table, *weights, *biases]
    for leaf in leaves:
        leaf.requires_grad_()

    def function(x, table, first, second, third, fourth):
        return field_normals(x, table, [first, second], [third, fourth], spec, mode=mode, epsilon=0.05)[2]

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("mode", ["finite_difference", "analytic"])
@pytest.mark.parametrize("activation", ["exp", "softplus"])
def test_field_normals_of_the_blob(mode, activation):
    """Normals of the blob alone point away from its centre."""
    spec = FieldSpec(grid=GRID, density_activation=activation, blob_radius=0.4)
    x = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    normal = field_normals(0.3 * x, *flat(), spec, mode=mode, epsilon=1e-3)[2]

    def blob(at):
        r = at.norm(dim=-1)
        if activation == "exp":
            return torch.exp(spec.blob_density * torch.exp(-r.square() / (2 * 0.4**2)))
        return torch.nn.functional.softplus(spec.blob_density * (1 - r / 0.4))

    step = 1e-3 * torch.eye(3, dtype=x.dtype)
    slope = blob(0.3 * x[:, None] - step) - blob(0.3 * x[:, None] + step)
    check_fp64("normal", normal, x if mode == "analytic" else torch.nn.functional.normalize(slope, dim=1))


def test_field_normals_modes_agree():
    """Central differences of small steps give the analytic normals, of length 1."""
    table, weights, biases = parameters()
    spec, x = FieldSpec(grid=GRID, bound=0.6), points(40)
    one = field_normals(x, table, weights, biases, spec, epsilon=1e-6)
    other = field_normals(x, table, weights, biases, spec, mode="analytic")
    for got, expected in zip(one, other, strict=True):
        check_fp64("output", got, expected)
    check_fp64("length", other[2].norm(dim=1), torch.ones(40).double())


def test_field_normals_taps_are_clamped():
    """Taps of a point on a face stay in the cube: the grid is zero outside, which would look like a wall."""
    table, weights, biases = parameters()
    spec = FieldSpec(grid=GRID, bound=0.6, blob_density=0.0)
    face = torch.tensor([[0.6, 0.1, 0.2]]).double()
    normal = field_normals(face, table, weights, biases, spec, epsilon=0.01)[2]
    taps = [
        face.clone().index_add_(1, torch.tensor([axis]), torch.full((1, 1), step).double()).clamp(max=0.6)
        for axis in range(3)
        for step in (0.01, -0.01)
    ]
    sigma = field(torch.cat(taps), table, weights, biases, spec)[0].view(3, 2)
    expected = torch.nn.functional.normalize(sigma[:, 1] - sigma[:, 0], dim=0)
    check_fp64("normal", normal[0], expected)


@pytest.mark.parametrize("mode", ["finite_difference", "analytic"])
def test_field_normals_flat_density(mode):
    """A flat density has normals of 0 and finite gradients."""
    spec = FieldSpec(grid=GRID, blob_density=0.0)
    table, weights, biases = flat()
    table.requires_grad_()
    normal = field_normals(points(), table, weights, biases, spec, mode=mode)[2]
    assert not normal.any()
    normal.sum().backward()
    assert torch.isfinite(table.grad).all()


def test_field_normals_no_grad():
    """Analytic normals under no_grad keep no graph, also of points that require gradients."""
    for x in (points(), points().requires_grad_()):
        with torch.no_grad():
            outputs = field_normals(x, *parameters(), FieldSpec(grid=GRID), mode="analytic")
        assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("mode", [None, "finite_difference", "analytic"])
def test_field_count(mode):
    """Rows past the count give zeros, take no gradient and do not change the others, with and without normals."""
    spec, count = FieldSpec(grid=GRID, bound=0.6), torch.tensor(4)
    grads, results = [], []
    for x, options in ((points(6), {"count": count}), (points(6)[:4], {})):
        table, weights, biases = parameters()
        x[4:] = math.nan
        x.requires_grad_(), biases[-1].requires_grad_()
        if mode is None:
            out = field(x, table, weights, biases, spec, **options)
        else:
            out = field_normals(x, table, weights, biases, spec, mode=mode, **options)
        sum(value.sum() for value in out).backward()
        grads.append((x.grad, biases[-1].grad))
        results.append(out)
    for padded, live in zip(*results, strict=True):
        assert padded.shape[0] == 6 and torch.equal(padded[:4], live) and not padded[4:].any()
    assert torch.equal(grads[0][1], grads[1][1])
    assert torch.equal(grads[0][0][:4], grads[1][0]) and not grads[0][0][4:].any()


@pytest.mark.parametrize("mode", [None, "finite_difference", "analytic"])
def test_field_no_points(mode):
    """No point gives outputs of no row."""
    x = points(0)
    if mode is None:
        out = field(x, *parameters(), FieldSpec(grid=GRID))
    else:
        out = field_normals(x, *parameters(), FieldSpec(grid=GRID), mode=mode)
    assert [value.shape for value in out] == [(0,), (0, 3), (0, 3)][: len(out)]


def test_field_compute_dtype():
    """bf16 is as accurate as torch's layers in bf16; outputs and gradients stay fp32."""
    table, weights, biases = parameters(dtype=torch.float32)
    spec, x = FieldSpec(grid=GRID, bound=0.6), points(50, dtype=torch.float32)
    single = field(x, table, weights, biases, spec)
    plain = by_torchs_layers(x, table, weights, biases, torch.bfloat16)
    precise = [[part.double() for part in layers] for layers in (weights, biases)]
    exact = by_torchs_layers(x.double(), table.double(), *precise, torch.float64)
    table.requires_grad_(), weights[0].requires_grad_()
    out = field(x, table, weights, biases, spec, dtype=torch.bfloat16)
    for name, got, rounded, *others in zip(("sigma", "albedo"), out, plain, exact, single, strict=True):
        check(name, got, rounded, others[0])
        assert got.dtype == torch.float32 and not torch.equal(got, others[1])
    out[1].sum().backward()
    assert table.grad.dtype == weights[0].grad.dtype == torch.float32


def test_field_active_levels():
    """Levels that are not active count as zeros in the table."""
    table, weights, biases = parameters()
    cut = table.clone()
    cut[GRID.offsets[1] :] = 0
    spec = FieldSpec(grid=GRID, bound=0.6)
    got = field(points(), table, weights, biases, spec, active_levels=1)
    for value, expected in zip(got, field(points(), cut, weights, biases, spec), strict=True):
        check_fp64("output", value, expected)


def test_field_errors():
    """Errors name the argument and both values."""
    table, weights, biases = parameters()
    spec = FieldSpec(grid=GRID)
    with pytest.raises(ValueError, match=r"weights\[0\] must have shape \[P, 6\], got \[5, 7\]"):
        field(points(), table, [torch.zeros(5, 7).double(), weights[1]], biases, spec)
    with pytest.raises(ValueError, match=r"weights\[0\] must have shape \[4, 6\], got \[5, 6\]"):
        field(points(), table, weights[:1], biases[:1], spec)
    with pytest.raises(ValueError, match='mode must be "finite_difference" or "analytic", got "exact"'):
        field_normals(points(), table, weights, biases, spec, mode="exact")
    with pytest.raises(ValueError, match='density_activation must be "exp" or "softplus", got "relu"'):
        FieldSpec(density_activation="relu")


@pytest.mark.parametrize("bound", [0.6, 0.7, 0.8, 1.0, 1.3, 2.0, 3.0, 7.7])
def test_unit_scale_of_faces(bound):
    """x * s + 0.5 is at most 1 on a face, also where a fused multiply-add does not round the product."""
    single = torch.tensor(bound, dtype=torch.float32).item()
    assert Fraction(single) * Fraction(unit_scale(bound)) <= Fraction(1, 2)
    assert unit_scale(bound) * single > 0.4999999
