"""The vanilla field: its encoding and network by their definitions, normals, precision; and the grid on PyTorch."""

import math

import pytest
import torch
from torch import nn

from dream_fast import kernels
from dream_fast.bench.accuracy import check, error
from dream_fast.engine.config.sections import FieldConfig, RenderConfig
from dream_fast.engine.render.volume import VolumeRenderer
from dream_fast.engine.scene.camera import make_cameras
from dream_fast.engine.scene.field import frequency_encoding
from dream_fast.engine.scene.frequency_field import FrequencyField
from dream_fast.engine.scene.hash_grid_field import HashGridField
from dream_fast.engine.scene.make_field import make_field

SMALL = dict(backbone="vanilla", n_frequencies=4, hidden_width=16, hidden_layers=3)


def make(seed=0, bound=1.0, **changes) -> FrequencyField:
    return make_field(FieldConfig(**{**SMALL, **changes}), bound, torch.Generator().manual_seed(seed))


def points(n, seed=1):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


def test_frequency_encoding():
    """The encoding is sines and cosines of doubling frequencies."""
    x = points(5).double()
    got = frequency_encoding(x, 12)
    assert got.shape == (5, 75)
    rows = []
    for place in x.tolist():
        sines = [math.sin(2**k * value) for k in range(12) for value in place]
        cosines = [math.cos(2**k * value) for k in range(12) for value in place]
        rows.append([*place, *sines, *cosines])
    exact = torch.tensor(rows, dtype=torch.float64)
    check("encoding", got, exact, exact)


def test_frequency_encoding_active():
    """Inactive bands are zero."""
    x = points(5)
    whole, coarse = frequency_encoding(x, 6), frequency_encoding(x, 6, 2)
    assert torch.equal(coarse[:, :9], whole[:, :9]) and torch.equal(coarse[:, 21:27], whole[:, 21:27])
    assert (coarse[:, 9:21] == 0).all() and (coarse[:, 27:] == 0).all()
    assert torch.equal(frequency_encoding(x, 6, torch.tensor(2)), coarse)
    assert torch.equal(frequency_encoding(x, 6, 6), whole)


def test_frequency_field_parameters():
    """Parameters depend on the configuration and the seed."""
    field = make(n_frequencies=12, hidden_width=64, hidden_layers=4)
    assert [tuple(w.shape) for w in field.weights] == [(64, 75), (64, 64), (64, 64), (64, 64), (4, 64)]
    assert [tuple(s.shape) for s in field.scales] == [(64,)] * 3 == [tuple(s.shape) for s in field.shifts]
    assert all(parameter.dtype == torch.float32 for parameter in field.parameters()) and field.table is None
    one, same, other = (torch.cat([w.reshape(-1) for w in make(seed=s).weights]) for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def by_hand(field: FrequencyField, x: torch.Tensor, products: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Density and albedo by the modules of stable-dreamfusion, with products in one dtype."""

    def linear(h, layer):
        module = nn.Linear(*field.weights[layer].shape[::-1]).to(h.dtype)
        module.load_state_dict({"weight": field.weights[layer], "bias": field.biases[layer]})
        return module.to(products)(h.to(products)).to(h.dtype)

    h = nn.ReLU()(linear(frequency_encoding(x, 4), 0))
    for layer in (1, 2):
        norm = nn.LayerNorm(16).to(x.dtype)
        norm.load_state_dict({"weight": field.scales[layer - 1], "bias": field.shifts[layer - 1]})
        h = nn.SiLU()(norm(linear(h, layer)) + h)
    out = linear(h, 3).detach()
    blob = 5 * torch.exp(-x.square().sum(1) / (2 * 0.2**2))
    return (out[:, 0] + blob).exp(), out[:, 1:].sigmoid()


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_frequency_field_network(products):
    """The network equals the modules of stable-dreamfusion, also in half precision."""
    field, exactly, x = make(), make().double(), points(500)
    for one in (field, exactly):
        generator = torch.Generator().manual_seed(3)
        for parameter in [*one.scales, *one.shifts]:
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) * 4 - 2)
    field.compute_dtype = products
    reference, exact = by_hand(field, x, products), by_hand(exactly, x.double(), torch.float64)
    for name, *tensors in zip(("sigma", "albedo"), field(x)[:2], reference, exact, strict=True):
        check(name, *tensors)


@pytest.mark.parametrize("layers", [0, 1])
def test_frequency_field_few_layers(layers):
    """A network may have few layers."""
    values = make(hidden_layers=layers)(points(5), normals="analytic")
    assert all(part.isfinite().all() for part in values)


def test_frequency_field_softplus():
    """The density may be a softplus."""
    x = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0.9, 0, 0]])
    sigma = make(density_activation="softplus", blob_density=10.0).density(x)
    assert sigma[0] > 8 > sigma[1] > 3 > 1e-3 > sigma[2]


@pytest.mark.parametrize("activation", ["exp", "softplus"])
def test_frequency_field_normals(activation):
    """Normals point in the direction of falling density."""
    field, x = make(density_activation=activation).double(), points(50).double()
    by_gradient = field(x, normals="analytic").normal
    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(field(at).sigma.sum(), at)
    exact = -slope / slope.norm(dim=1, keepdim=True)
    check("by gradient", by_gradient, exact, exact)
    # Central differences are of the second order: half the step leaves a quarter of the error, but for points within
    # a step of a kink of the first layer.
    steps = [field(x, normals="finite_difference", normal_epsilon=epsilon).normal for epsilon in (4e-4, 2e-4)]
    errors = [(normal - exact).norm(dim=1) for normal in steps]
    assert 3.9 < (errors[0] / errors[1]).median() < 4.1 and error(steps[1], exact) < 1e-3
    outward = x / x.norm(dim=-1, keepdim=True)
    assert (by_gradient * outward).sum(-1)[x.norm(dim=-1) < 0.4].min() > 0.9
    assert field(x).normal is None
    with torch.no_grad():
        quiet = field(x, normals="analytic")
    check("without gradient", quiet.normal, exact, exact)
    assert not any(part.requires_grad for part in quiet)


def test_frequency_field_differences_in_cube(monkeypatch):
    """Differences stay inside the cube."""
    field, calls = make(bound=0.5), []
    network = field._network
    monkeypatch.setattr(field, "_network", lambda x, active: calls.append(x) or network(x, active))
    field(torch.tensor([[0.5, 0.0, -0.5]]), normals="finite_difference", normal_epsilon=0.1)
    assert len(calls) == 7 and torch.cat(calls).abs().max() == 0.5


@pytest.mark.parametrize("normals", ["analytic", "finite_difference"])
def test_frequency_field_gradients_through_normals(normals):
    """Gradients go through normals."""
    field, x = make(n_frequencies=2, hidden_width=4).double(), points(4).double()
    weights = [field.weights[0], field.weights[1], field.scales[0]]

    def values(*changed):
        named = {"weights.0": changed[0], "weights.1": changed[1], "scales.0": changed[2]}
        return torch.func.functional_call(field, named, (x,), {"normals": normals})

    assert torch.autograd.gradcheck(values, [w.detach().clone().requires_grad_() for w in weights])


def test_frequency_field_flat_density():
    """A flat density has zero normals."""
    field = make(blob_density=0.0)
    for parameter in field.weights:
        parameter.data.zero_()
    for mode in ("analytic", "finite_difference"):
        values = field(points(4), normals=mode)
        assert (values.normal == 0).all()
        values.normal.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in field.parameters())


def test_frequency_field_padding():
    """Rows past the count are zeros."""
    for normals in (None, "analytic"):
        values = make()(points(10), count=torch.tensor(4), normals=normals)
        for part in values[: 2 if normals is None else 3]:
            assert (part[4:] == 0).all() and (part[:4] != 0).any()


def test_frequency_field_compute_dtype():
    """The compute dtype leaves parameters and results in fp32."""
    field = make()
    exact = field(points(20), normals="analytic")
    field.compute_dtype = torch.bfloat16
    rounded = field(points(20), normals="analytic")
    assert rounded.sigma.dtype == rounded.albedo.dtype == rounded.normal.dtype == torch.float32
    assert not torch.equal(rounded.albedo, exact.albedo)
    (rounded.sigma.sum() + rounded.albedo.sum() + rounded.normal.sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in field.weights)


def test_frequency_field_background():
    """The background has four bands."""
    field = make(bg_radius=1.4)
    assert [tuple(w.shape) for w in field.background_weights] == [(32, 27), (3, 32)]
    field.background(nn.functional.normalize(points(20), dim=-1)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in field.background_weights)


@pytest.mark.parametrize("normals", [None, "finite_difference", "analytic"])
def test_make_field_grid_torch(normals):
    """The grid on PyTorch's operators equals the grid."""
    small = dict(n_levels=3, log2_hashmap_size=10, base_resolution=4, max_resolution=16, hidden_width=16)
    fields = [
        make_field(FieldConfig(backbone=name, **small), 1.0, torch.Generator().manual_seed(0))
        for name in ("grid", "grid_torch", "grid_torch")
    ]
    for field in fields:
        assert type(field) is HashGridField
        field.table.data.normal_(generator=torch.Generator().manual_seed(1))
    fields[2].double()
    options = dict(normals=normals, active_levels=2, count=torch.tensor(150))
    inputs = [x.requires_grad_() for x in (points(200), points(200), points(200).double())]
    values = [field(x, **options) for field, x in zip(fields, inputs, strict=True)]
    # A normal loses digits where the density is flat: its weight is the size of the slope.
    (slope,) = torch.autograd.grad(values[2].sigma.clamp(min=1e-30).log().sum(), inputs[2], retain_graph=True)
    for name in ("sigma", "albedo", "normal")[: 2 if normals is None else 3]:
        weight = slope.norm(dim=1, keepdim=True) if name == "normal" else None
        check(name, *(getattr(one, name).detach() for one in values), weight)


def test_make_field_kernels():
    """Launches are recorded as on a GPU and not run."""
    small = dict(
        n_levels=3, log2_hashmap_size=10, base_resolution=4, max_resolution=16, hidden_width=16, bg_radius=-1.0
    )
    camera = make_cameras(*(torch.tensor([v]) for v in (90.0, 0.0, 3.0, 30.0)))
    started = {}
    for name in ("grid", "grid_torch", "vanilla"):
        field = make_field(FieldConfig(backbone=name, **small), 1.0, torch.Generator().manual_seed(0))
        with kernels.recorded_launches() as launches:
            for normals in (None, "finite_difference", "analytic"):
                field(points(10), normals=normals, count=torch.tensor(7))
            started[name] = [len(launches)]
            if name != "vanilla":  # whose views are put together by the kernel of compositing
                VolumeRenderer(field, RenderConfig(occupancy_resolution=8, max_steps=32)).view(camera, 4, 4)
            started[name].append(len(launches))
    assert 0 < started["grid"][0] < started["grid"][1]
    assert started["grid_torch"] == started["vanilla"] == [0, 0]
