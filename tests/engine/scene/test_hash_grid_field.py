"""The hash grid field as a module: shapes, initial values, normals, background."""

import dataclasses

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import FieldConfig
from dream_fast.engine.scene.hash_grid_field import HashGridField

SMALL = dict(n_levels=3, log2_hashmap_size=10, base_resolution=4, max_resolution=16, hidden_width=16, hidden_layers=2)


def make_field(seed=0, bound=1.0, **changes):
    config = dataclasses.replace(FieldConfig(), **{**SMALL, **changes})
    return HashGridField(config, bound, torch.Generator().manual_seed(seed))


def points(n, seed=1):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


def test_hash_grid_field_parameters():
    """Parameters depend on the configuration and the seed."""
    field = make_field()
    assert [tuple(w.shape) for w in field.weights] == [(16, 6), (16, 16), (4, 16)]
    assert field.table.shape == (field.spec.grid.rows, 2)
    assert 0.5e-4 < field.table.abs().max() <= 1e-4
    assert all(parameter.dtype == torch.float32 for parameter in field.parameters())
    for one, same, other in zip(
        field.parameters(), make_field().parameters(), make_field(seed=3).parameters(), strict=True
    ):
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_hash_grid_field_no_hidden_layer():
    """A field without hidden layers is linear."""
    assert [tuple(w.shape) for w in make_field(hidden_layers=0).weights] == [(4, 6)]


def test_hash_grid_field_starts_as_blob():
    """A new field is the blob."""
    field = make_field()
    sigma = field.density(torch.tensor([[0.0, 0, 0], [0.2, 0, 0], [0.9, 0, 0]]))
    assert sigma[0] > 3 * sigma[1] > 9 * sigma[2]
    exact = make_field(backbone="grid_torch").double().density(points(100).double())
    check("chunks", field.density(points(100), chunk=7), field.density(points(100)), exact)


@pytest.mark.parametrize("mode", ["finite_difference", "analytic"])
def test_hash_grid_field_normals(mode):
    """Normals point out of the blob and have gradients."""
    field = make_field()
    x = points(50)
    values = field(x, normals=mode)
    outward = x / x.norm(dim=-1, keepdim=True)
    assert (values.normal * outward).sum(-1)[x.norm(dim=-1) < 0.5].min() > 0.9
    values.normal.sum().backward()
    assert field.table.grad.abs().sum() > 0
    assert field(x).normal is None


def test_hash_grid_field_count_and_levels():
    """Count and active levels reach the operator."""
    field = make_field()
    field.table.data.normal_(generator=torch.Generator().manual_seed(0))
    x = points(10)
    assert (field(x, count=torch.tensor(4)).sigma[4:] == 0).all()
    coarse, fine = field(x, active_levels=1), field(x)
    field.table.data[field.spec.grid.offsets[1] :] = 0  # what the levels above the first have learned
    without = field(x)
    assert all(torch.equal(one, other) for one, other in zip(coarse[:2], without[:2], strict=True))
    assert not torch.equal(coarse.sigma, fine.sigma)


def test_hash_grid_field_compute_dtype():
    """The compute dtype leaves parameters and results in fp32."""
    field = make_field()
    field.table.data.normal_(generator=torch.Generator().manual_seed(0))
    exact = field(points(20))
    field.compute_dtype = torch.bfloat16
    rounded = field(points(20), normals="finite_difference")
    assert rounded.sigma.dtype == rounded.albedo.dtype == rounded.normal.dtype == torch.float32
    assert not torch.equal(rounded.albedo, exact.albedo)
    (rounded.sigma.sum() + rounded.albedo.sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in [field.table, *field.weights])


def test_background_direction():
    """The background depends on the direction and has gradients."""
    field = make_field(bg_radius=1.4)
    directions = torch.nn.functional.normalize(points(20), dim=-1)
    colour = field.background(directions)
    assert colour.shape == (20, 3) and 0 < colour.min() and colour.max() < 1
    assert colour.std(dim=0).min() > 0
    colour.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in field.background_weights)


def test_background_missing():
    """A field without a background network raises."""
    field = make_field(bg_radius=-1.0)
    with pytest.raises(ValueError, match="bg_radius"):
        field.background(torch.zeros(1, 3))
