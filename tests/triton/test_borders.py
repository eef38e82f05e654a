"""Borders of masks, tiles and ranges that whole inputs of the other files do not touch."""

import importlib

import pytest
import torch

from dream_fast import kernels
from dream_fast.bench.accuracy import check, check_together
from dream_fast.kernels import FieldSpec, HashGridSpec
from dream_fast.kernels._grid import by_channel


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_adan_takes_an_end_bit_for_bit(device):
    """Where a running value has no memory it is the new value itself, however far away the old one was."""
    params, grads = (draw(300, seed=seed).to(device) for seed in (0, 1))
    state = kernels.AdanState.zeros(params)
    state.ema, state.exp_avg = state.ema + 1e4, state.exp_avg - 1e4
    options = {"betas": (0.0, 0.92, 0.99), "max_grad_norm": 0.0, "ema_decay": 0.0}
    kernels.adan_step(params, grads, state, group_ends=(300,), lrs=(0.1,), **options)
    assert torch.equal(state.ema, params) and torch.equal(state.exp_avg, grads)


@pytest.mark.parametrize("channels", [9, 15])
def test_composite_reads_no_channel_behind_the_last_sample(channels, device):
    """Values end with the last sample, and the last group of channels is not full."""
    sigma, dt = draw(40).to(device), torch.full((40,), 0.05, device=device)
    values = draw(40, channels, seed=1).to(device)
    t, offsets = torch.arange(40.0, device=device) * 0.05, torch.tensor([0, 40], device=device)
    found = kernels.composite(sigma, values, t, dt, offsets)
    single = kernels.composite_reference(sigma, values, t, dt, offsets)
    exact = kernels.composite_reference(*(part.double() for part in (sigma, values, t, dt)), offsets)
    check_together("values", *([one.values, one.weights] for one in (found, single, exact)))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("beyond", [-0.01, 1.01])
def test_a_point_outside_by_one_coordinate_has_no_features(axis, beyond, device):
    grid = HashGridSpec(levels=2, features=2, log2_entries=8, base_resolution=4, max_resolution=9)
    x, table = draw(70, 3).to(device), 1 + draw(grid.rows, 2, seed=1).to(device)
    x[::2, axis] = beyond
    found = kernels.hash_grid(x, table, grid)
    assert not found[::2].any() and found[1::2].all()


@pytest.mark.parametrize("rows", [1, 70, 700])
def test_features_that_are_turned_keep_their_places(rows, device):
    """Six channels, which are no power of two."""
    features = draw(rows, 6).to(device)
    assert torch.equal(by_channel(features.t(), None), features.t().contiguous())


def normalised(shape, groups, device):
    """Output of group normalisation, channels last, by kernels and reference, and in fp64."""
    x = draw(*shape).to(device).movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias = (draw(shape[1], seed=seed).to(device) for seed in (1, 2))
    found = kernels.group_norm_silu(x, groups, weight, bias, 1e-5, True)
    single = kernels.group_norm_silu_reference(x, groups, weight, bias, 1e-5, True)
    exact = kernels.group_norm_silu_reference(x.double(), groups, weight.double(), bias.double(), 1e-5, True)
    check("output", found, single, exact)


@pytest.fixture
def parts(monkeypatch):
    """Group normalisation in tiles of a few groups, with several parts each; no group stays whole."""
    module = importlib.import_module("dream_fast.kernels.group_norm_silu")
    for name, value in {"_TILE": 64, "_SUM_TILE": 16, "_COLUMNS": 16, "_PROGRAMS": 64, "_WHOLE": 0}.items():
        monkeypatch.setattr(module, name, value)


def test_groups_in_several_blocks(device, parts):
    """Seven groups of three channels, of which a tile takes four."""
    normalised((2, 21, 5, 4), 7, device)


def test_parts_of_a_single_place(device, parts):
    """The last block of groups is not full, and nothing lies behind its last place."""
    normalised((2, 21, 2, 1), 7, device)


def rays_and_bits(number, device):
    origins = torch.nn.functional.normalize(torch.randn(number, 3, generator=torch.Generator().manual_seed(3)), dim=1)
    aims = (draw(number, 3, seed=4) - 0.5) * 0.6
    bits = torch.randint(0, 256, (1, 8**3 // 8), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return (3 * origins).to(device), (aims - 3 * origins).to(device), bits.to(device)


def same_samples(rays, bits, **options):
    got, expected = (
        run(*rays, bits, bound=1.0, resolution=8, **options) for run in (kernels.march, kernels.march_reference)
    )
    for name, one, other in zip(got._fields, got, expected, strict=True):
        assert torch.equal(one, other), name
    return got


def test_growing_steps_are_never_longer_than_a_cell(device):
    *rays, bits = rays_and_bits(20, device)
    samples = same_samples(rays, bits, capacity=2000, max_steps=64, dt_gamma=0.9)
    assert int(samples.count) > 10


def test_offsets_of_many_blocks_of_rays(device, monkeypatch):
    """More blocks than are added up at a time, the last of them not full."""
    module = importlib.import_module("dream_fast.kernels.march")
    config = module._march_config
    monkeypatch.setattr(
        module, "_march_config", lambda *shape: {**config(*shape), "SCAN": 1, "COUNT_RAYS": 64, "WRITE_RAYS": 64}
    )
    *rays, bits = rays_and_bits(1030, device)
    same_samples(rays, bits, capacity=4000, max_steps=8)


def test_blocks_of_rays_end_where_the_rays_do(device, monkeypatch):
    module = importlib.import_module("dream_fast.kernels.march")
    config = module._march_config
    monkeypatch.setattr(module, "_march_config", lambda *shape: {**config(*shape), "SCAN": 16})
    *rays, bits = rays_and_bits(37, device)
    same_samples(rays, bits, capacity=2000, max_steps=64)


def test_the_nearest_of_negative_depths_is_seen(device):
    """Depths below 0 are in order too: of two triangles that fill the picture the nearer one is seen."""
    corners = torch.tensor([[-3.0, -1.0], [1.0, -1.0], [1.0, 3.0]])
    depths = torch.tensor([-0.25, -0.75, -0.5])
    clip = torch.cat([corners.repeat(3, 1), depths.repeat_interleave(3)[:, None], torch.ones(9, 1)], 1)[None]
    faces = torch.arange(9).view(3, 3)
    found = kernels.rasterize(clip.to(device), faces.to(device), 8, 8)
    expected = kernels.rasterize_reference(clip.to(device), faces.to(device), 8, 8)
    assert (found.triangle[found.triangle >= 0] == 1).all() and torch.equal(found.triangle, expected.triangle)


@pytest.mark.parametrize("mode", [None, "finite_difference"])
def test_one_program_adds_up_layers_between_hidden_ones(mode, device, monkeypatch, deterministic):
    """Three hidden layers, whose sums one program takes from tile to tile, the output layer's in a pass of its own."""
    module = importlib.import_module("dream_fast.kernels.field" if mode is None else "dream_fast.kernels.field_normals")
    config = module._bwd_config
    monkeypatch.setattr(module, "_bwd_config", lambda *shape: {**config(*shape), "programs": 1, "together": 3})
    monkeypatch.setattr(module, "multiprocessors", lambda _: 1)
    grid = HashGridSpec(levels=2, features=2, log2_entries=8, base_resolution=4, max_resolution=9)
    operators, options = (kernels.field, kernels.field_reference), {}
    if mode is not None:
        operators, options = (kernels.field_normals, kernels.field_normals_reference), {"mode": mode}
    sizes = [(16, 4), (16, 16), (16, 16), (4, 16)]
    weights = [(draw(*shape, seed=k) - 0.4).to(device) * 0.5 for k, shape in enumerate(sizes)]
    biases = [draw(shape[0], seed=10 + k).to(device) for k, shape in enumerate(sizes)]
    x, table = (draw(100, 3, seed=20) * 1.6 - 0.8).to(device), draw(grid.rows, 2, seed=21).to(device)
    found = []
    for operator, dtype in ((operators[0], None), (operators[1], None), (operators[1], torch.float64)):
        leaves = [part.detach().to(dtype or part.dtype).requires_grad_() for part in (table, *weights, *biases)]
        out = operator(x.to(dtype or x.dtype), leaves[0], leaves[1:5], leaves[5:], FieldSpec(grid=grid), **options)
        found.append(list(torch.autograd.grad(sum(part.sum() for part in out[:2]), leaves)[1:]))
    check_together("gradient of the network", *found)
