"""Specification, parameters and background of fields, and the operators that they call."""

import math

import pytest
import torch
from torch.nn import functional as F

from dream_fast import kernels
from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import FieldConfig
from dream_fast.engine.scene.field import Field, FieldOutput, frequency_encoding, linear_layers, uniform
from dream_fast.engine.scene.frequency_field import FrequencyField
from dream_fast.engine.scene.hash_grid_field import HashGridField
from dream_fast.engine.scene.make_field import make_field

ULP = torch.finfo(torch.float32).eps  # relative distance of neighbours in fp32

GRID = dict(
    n_levels=3,
    n_features_per_level=4,
    log2_hashmap_size=9,
    base_resolution=5,
    max_resolution=17,
    interpolation="linear",
)
SPEC = dict(
    levels=3, features=4, log2_entries=9, base_resolution=5, max_resolution=17, interpolation="linear"
)  # GRID by the operators' names
BLOB = dict(density_activation="softplus", blob_density=7.0, blob_radius=0.35)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(backbone: str = "grid", bound: float = 0.75, **changes) -> Field:
    config = FieldConfig(backbone=backbone, n_frequencies=3, hidden_width=8, **GRID | BLOB | changes)
    return make_field(config, bound, seeded())


@pytest.mark.parametrize("backbone", ["grid", "grid_torch", "vanilla"])
def test_make_field_by_config(backbone):
    """Settings of grid, blob and scene are in the specification of the operators."""
    field = make(backbone)
    assert type(field) is (FrequencyField if backbone == "vanilla" else HashGridField)
    expected = dict(bound=0.75, **BLOB) | ({} if backbone == "vanilla" else {"grid": kernels.HashGridSpec(**SPEC)})
    assert field.spec == kernels.FieldSpec(**expected) and field.bound == 0.75
    assert field.finest == (None if backbone == "vanilla" else 17)
    assert field.compute_dtype is None and field.device == torch.device("cpu")
    assert (field.table is None) == (backbone == "vanilla")
    if backbone != "vanilla":
        assert field.use_reference is (backbone == "grid_torch")


@pytest.mark.parametrize(("radius", "there"), [(-1.0, False), (0.0, False), (0.1, True)])
def test_field_has_background(radius, there):
    """Without a background there are no parameters of it."""
    field = make(bg_radius=radius)
    assert field.has_background is there
    assert any(name.startswith("background") for name, _ in field.named_parameters()) is there


def test_linear_layers_range():
    """Weights and biases are uniform in +-1/sqrt(in), and differ between layers."""
    weights, biases = linear_layers([100, 50, 400], seeded())
    assert [tuple(w.shape) for w in weights] == [(50, 100), (400, 50)]
    assert [tuple(b.shape) for b in biases] == [(50,), (400,)]
    for inputs, parts in ((100, (weights[0],)), (50, (weights[1], biases[1]))):
        for part in parts:
            unit = part.detach() * math.sqrt(inputs)  # uniform in [-1, 1): variance 1/3, kurtosis 1.8
            n = part.numel()
            assert 0.95 < unit.abs().max() <= 1 + 4 * ULP
            assert abs(unit.mean()) < 5 / (3 * n) ** 0.5 and abs(unit.square().mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    assert biases[0].abs().max() <= 0.1
    field = make(n_levels=8)
    part = uniform((1000,), 0.5, seeded(4))
    assert part.requires_grad and torch.equal(part, (torch.rand(1000, generator=seeded(4)) * 2 - 1) * 0.5)
    assert field.table.min() < -0.9e-4 and field.table.max() > 0.9e-4 and field.table.abs().max() <= 1e-4


OPERATORS = ("field", "field_reference", "field_normals", "field_normals_reference")


@pytest.mark.parametrize(
    ("backbone", "normals", "name"),
    [
        ("grid", None, "field"),
        ("grid", "analytic", "field_normals"),
        ("grid_torch", None, "field_reference"),
        ("grid_torch", "finite_difference", "field_normals_reference"),
    ],
)
def test_hash_grid_field_operator_arguments(backbone, normals, name, monkeypatch):
    """The right one of four operators is called, with its parameters and options."""
    field, x, count = make(backbone), torch.rand(5, 3, generator=seeded()), torch.tensor(3)
    field.compute_dtype = torch.bfloat16
    calls = []
    results = tuple(torch.rand(shape, generator=seeded()) + 1 for shape in ((5,), (5, 3), (5, 3)))

    def record(called):
        def operator(*inputs, **options):
            calls.append((called, inputs, options))
            return results if "normals" in called else results[:2]

        return operator

    for operator in OPERATORS:
        monkeypatch.setattr(kernels, operator, record(operator))
    values = field(x, active_levels=2, count=count, normals=normals, normal_epsilon=0.3)
    ((called, inputs, options),) = calls
    assert called == name
    assert inputs[0] is x and inputs[1] is field.table and inputs[4] is field.spec
    for got, own in ((inputs[2], field.weights), (inputs[3], field.biases)):
        assert isinstance(got, list) and len(got) == len(own)
        assert all(one is other for one, other in zip(got, own, strict=True))
    expected = {"active_levels": 2, "dtype": torch.bfloat16}
    expected |= {"count": None if backbone == "grid_torch" else count}
    expected |= {} if normals is None else {"mode": normals, "epsilon": 0.3}
    assert options == expected
    live = slice(None, 3 if backbone == "grid_torch" else 5)  # the references leave the padding to the field
    for got, result in zip(values, (*results[:2], None if normals is None else results[2]), strict=True):
        assert (got is None) == (result is None)
        if got is not None:
            assert torch.equal(got[live], result[live]) and (backbone == "grid" or (got[3:] == 0).all())
    calls.clear()
    field(x, normals="analytic")
    assert calls[0][2]["epsilon"] == 0.01 and calls[0][2]["active_levels"] is None


def test_backend_description(monkeypatch):
    """The description depends on the weights, the dtype and the normals."""
    calls = []
    monkeypatch.setattr(kernels, "field_plan", lambda *words: calls.append(words) or "fused")
    field = make()
    assert field.backend_description("analytic") == "fused"
    field.compute_dtype = torch.float16
    assert field.backend_description("finite_difference") == "fused"
    for (spec, weights, dtype, normals), expected in zip(
        calls, ((torch.float32, "analytic"), (torch.float16, "finite_difference")), strict=True
    ):
        assert spec is field.spec and (dtype, normals) == expected
        assert all(one is other for one, other in zip(weights, field.weights, strict=True))
    assert (
        make("grid_torch").backend_description("analytic")
        == make("vanilla").backend_description("analytic")
        == "on PyTorch's operators"
    )
    assert len(calls) == 2


def test_without_padding():
    """Rows before the count are kept; without a count nothing changes."""
    values = FieldOutput(torch.tensor([1.0, 2.0, math.nan]), torch.full((3, 3), 0.5), torch.ones(3, 3))
    padded = values.without_padding(torch.tensor(2))
    assert padded.sigma.tolist() == [1, 2, 0]
    assert padded.albedo.tolist() == [[0.5] * 3] * 2 + [[0] * 3] and padded.normal.tolist() == [[1] * 3] * 2 + [[0] * 3]
    assert values._replace(normal=None).without_padding(torch.tensor(2)).normal is None
    assert values.without_padding(None) is values


class Counted(Field):
    """A field that records the number of points of each call."""

    def __init__(self):
        super().__init__(FieldConfig(), 1.0)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.asked = []

    def forward(self, x, *, active_levels=None, **_):
        self.asked.append((len(x), active_levels))
        return FieldOutput(self.scale * x[:, 0], self.scale * x, None)


def test_density_in_chunks():
    """Chunks have 2^16 points on a CPU by default, and results are in order."""
    field, x = Counted(), torch.rand(2**16 + 3, 3, generator=seeded())
    with torch.enable_grad():
        density, albedo = field.density(x, active_levels=2), field.albedo(x)
        small = field.density(x[:10], chunk=4)
    assert field.asked == [(2**16, 2), (3, 2), (2**16, None), (3, None), (4, None), (4, None), (2, None)]
    assert torch.equal(density, x[:, 0]) and torch.equal(albedo, x) and torch.equal(small, x[:10, 0])
    assert not (density.requires_grad or albedo.requires_grad or small.requires_grad)


@pytest.mark.parametrize(("backbone", "bands"), [("grid", 6), ("vanilla", 4)])
def test_background_network(backbone, bands):
    """It is a frequency encoding, a hidden layer of 32 with ReLU, and a sigmoid."""
    field, exactly = make(backbone, bg_radius=1.4), make(backbone, bg_radius=1.4).double()
    directions = F.normalize(torch.randn(50, 3, generator=seeded()), dim=1)
    assert field.background_weights[0].shape == (32, 3 + 6 * bands)

    def by_hand(one, d):
        first, second = one.background_weights
        hidden = (frequency_encoding(d, bands) @ first.T + one.background_biases[0]).clamp(min=0)
        return (1 / (1 + torch.exp(-(hidden @ second.T + one.background_biases[1])))).detach()

    check(
        "background",
        field.background(directions).detach(),
        by_hand(field, directions),
        by_hand(exactly, directions.double()),
    )
    with pytest.raises(ValueError, match="^this field has no background network: bg_radius is not positive$"):
        make(backbone, bg_radius=-1.0).background(directions)


def test_frequency_encoding_dtype():
    """Number of bands, dtype and inactive bands are right."""
    x = torch.rand(4, 3, generator=seeded(), dtype=torch.float64)
    for active in (None, 1, torch.tensor(1)):
        encoded = frequency_encoding(x, 3, active)
        assert encoded.dtype == torch.float64 and encoded.shape == (4, 21)
    assert torch.equal(frequency_encoding(x, 3, 0)[:, 3:], torch.zeros(4, 18).double())
    assert torch.equal(frequency_encoding(x, 3, 0)[:, :3], x)
    exact = torch.cat([torch.sin(4 * x), torch.cos(4 * x)], dim=1)
    check("finest", encoded[:, [3, 4, 5]], torch.sin(x), torch.sin(x))
    check("all", frequency_encoding(x, 3)[:, [9, 10, 11, 18, 19, 20]], exact, exact)


def test_frequency_field_initial_blocks():
    """Scales are one and shifts zero, for each hidden layer after the first."""
    for layers, pairs in ((0, 0), (1, 0), (2, 1), (4, 3)):
        field = make("vanilla", hidden_layers=layers)
        assert len(field.scales) == len(field.shifts) == pairs and len(field.weights) == layers + 1
        assert all(torch.equal(scale, torch.ones(8)) and scale.requires_grad for scale in field.scales)
        assert all(torch.equal(shift, torch.zeros(8)) and shift.requires_grad for shift in field.shifts)


@pytest.mark.parametrize("normals", [None, "finite_difference", "analytic"])
def test_frequency_field_inactive_bands(normals):
    """Inactive bands have no effect on values, normals and gradients."""
    field, x = make("vanilla"), torch.rand(20, 3, generator=seeded()) - 0.5
    coarse, fine = field(x, active_levels=1, normals=normals), field(x, normals=normals)
    with torch.no_grad():
        quiet = field(x, active_levels=1, normals=normals)
        field.weights[0][:, [*range(6, 12), *range(15, 21)]] = 0  # sines and cosines of the two finer bands
    for name in ("sigma", "albedo") if normals is None else ("sigma", "albedo", "normal"):
        got, expected = getattr(coarse, name), getattr(field(x, normals=normals), name)
        assert torch.equal(got, expected) and torch.equal(getattr(quiet, name), got)
        assert not torch.equal(got, getattr(fine, name)) and got.requires_grad
        assert not getattr(quiet, name).requires_grad
    assert normals is not None or coarse.normal is None


def test_frequency_field_default_epsilon():
    """The default step of normals is that of the settings."""
    field, x = make("vanilla"), torch.rand(20, 3, generator=seeded()) - 0.5
    normal, same, other = (
        field(x, normals="finite_difference", **step).normal
        for step in ({}, {"normal_epsilon": 0.01}, {"normal_epsilon": 0.1})
    )
    assert torch.equal(normal, same) and not torch.equal(normal, other)
