"""Borders of masks, tiles and ranges that whole inputs of the other files do not touch."""

import importlib
import sys

import pytest
import torch

from dream_fast import kernels
from dream_fast.bench.accuracy import check, check_together
from dream_fast.kernels import FieldSpec, HashGridSpec
from dream_fast.kernels.grid.gradients import channel_major

GRID = HashGridSpec(levels=2, features=2, log2_entries=8, base_resolution=4, max_resolution=9)


def draw(*shape, seed=0):
    """Random numbers from 0 to 1."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_adan_weight_one(device):
    """A running average without memory is the new value bit for bit, however far away the old one was."""
    params, grads = (draw(300, seed=seed).to(device) for seed in (0, 1))
    state = kernels.AdanState.zeros(params)
    state.ema, state.exp_avg = state.ema + 1e4, state.exp_avg - 1e4
    settings = {"betas": (0.0, 0.92, 0.99), "max_grad_norm": 0.0, "ema_decay": 0.0}
    kernels.adan_step(params, grads, state, group_ends=(300,), lrs=(0.1,), **settings)
    assert torch.equal(state.ema, params) and torch.equal(state.exp_avg, grads)


@pytest.mark.parametrize("channels", [9, 15])
def test_composite_last_channels(channels, device):
    """The values end with the last sample, whose last group of channels is not full."""
    sigma, dt = draw(40).to(device), torch.full((40,), 0.05, device=device)
    values = draw(40, channels, seed=1).to(device)
    t, offsets = torch.arange(40.0, device=device) * 0.05, torch.tensor([0, 40], device=device)
    got = kernels.composite(sigma, values, t, dt, offsets)
    single = kernels.composite_reference(sigma, values, t, dt, offsets)
    exact = kernels.composite_reference(*(tensor.double() for tensor in (sigma, values, t, dt)), offsets)
    check_together("values", *([out.values, out.weights] for out in (got, single, exact)))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("coordinate", [-0.01, 1.01])
def test_hash_grid_outside_along_one_axis(axis, coordinate, device):
    """A point with a single coordinate outside the cube has no features."""
    x, table = draw(70, 3).to(device), 1 + draw(GRID.rows, 2, seed=1).to(device)
    x[::2, axis] = coordinate
    features = kernels.hash_grid(x, table, GRID)
    assert not features[::2].any() and features[1::2].all()


@pytest.mark.parametrize("rows", [1, 70, 700])
def test_channel_major_six_channels(rows, device):
    """Transposed features keep their places where the number of channels is no power of two."""
    features = draw(rows, 6).to(device)
    assert torch.equal(channel_major(features.t(), None), features.t().contiguous())


def check_group_norm(shape, groups, device):
    """Compare group normalisation of a channels-last tensor with the reference in fp64."""
    x = draw(*shape).to(device).movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias = (draw(shape[1], seed=seed).to(device) for seed in (1, 2))
    got = kernels.group_norm_silu(x, groups, weight, bias, 1e-5, True)
    single = kernels.group_norm_silu_reference(x, groups, weight, bias, 1e-5, True)
    exact = kernels.group_norm_silu_reference(x.double(), groups, weight.double(), bias.double(), 1e-5, True)
    check("output", got, single, exact)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of group normalisation that hold a few groups in several parts, and no group as a whole."""
    module = importlib.import_module("dream_fast.kernels.nn.group_norm_silu")
    for name, value in {"_TILE": 64, "_SUM_TILE": 16, "_COLUMNS": 16, "_PROGRAMS": 64, "_WHOLE": 0}.items():
        monkeypatch.setattr(module, name, value)


def test_group_norm_silu_several_blocks(device, small_tiles):
    """Seven groups of three channels, of which a tile holds four."""
    check_group_norm((2, 21, 5, 4), 7, device)


def test_group_norm_silu_two_places(device, small_tiles):
    """The last block of groups is not full, and the tensor ends with its last place."""
    check_group_norm((2, 21, 2, 1), 7, device)


def draw_rays(number, device):
    """Origins, directions and bits of rays that point at a cube of random cells."""
    origins = torch.nn.functional.normalize(torch.randn(number, 3, generator=torch.Generator().manual_seed(3)), dim=1)
    targets = (draw(number, 3, seed=4) - 0.5) * 0.6
    bits = torch.randint(0, 256, (1, 8**3 // 8), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return [tensor.to(device) for tensor in (3 * origins, targets - 3 * origins, bits)]


def march_like_reference(rays, **settings):
    """Samples of `march`, which are the reference's bit for bit."""
    got, expected = (
        operator(*rays, bound=1.0, resolution=8, **settings) for operator in (kernels.march, kernels.march_reference)
    )
    for name, tensor, other in zip(got._fields, got, expected, strict=True):
        assert torch.equal(tensor, other), name
    return got


def set_march_config(monkeypatch, **fields):
    """Change fields of the configuration of `march`."""
    module = importlib.import_module("dream_fast.kernels.rays.march")
    config = module._march_config
    monkeypatch.setattr(module, "_march_config", lambda *shape: config(*shape)._replace(**fields))


def test_march_step_limit(device):
    """Steps that grow with the distance are never longer than a cell's diagonal."""
    samples = march_like_reference(draw_rays(20, device), capacity=2000, max_steps=64, dt_gamma=0.9)
    assert int(samples.count) > 10


def test_march_many_blocks(device, monkeypatch):
    """More blocks of rays than a program of the scan adds up at a time."""
    set_march_config(monkeypatch, scan_block=4, scan_sums=4)
    march_like_reference(draw_rays(37, device), capacity=2000, max_steps=8)


def test_march_partial_block(device, monkeypatch):
    """The last block of rays in the scan is not full."""
    set_march_config(monkeypatch, scan_block=16)
    march_like_reference(draw_rays(37, device), capacity=2000, max_steps=64)


def test_rasterize_negative_depths(device):
    """The nearest of three triangles is visible, also where depths are negative."""
    corners = torch.tensor([[-3.0, -1.0], [1.0, -1.0], [1.0, 3.0]])
    depths = torch.tensor([-0.25, -0.75, -0.5])
    clip = torch.cat([corners.repeat(3, 1), depths.repeat_interleave(3)[:, None], torch.ones(9, 1)], 1)[None]
    faces = torch.arange(9).view(3, 3)
    got = kernels.rasterize(clip.to(device), faces.to(device), 8, 8)
    expected = kernels.rasterize_reference(clip.to(device), faces.to(device), 8, 8)
    assert (got.triangle[got.triangle >= 0] == 1).all() and torch.equal(got.triangle, expected.triangle)


@pytest.mark.parametrize("mode", [None, "finite_difference"])
def test_field_one_program_hidden_layers(mode, device, monkeypatch, deterministic):
    """Three hidden layers whose sums one program keeps from tile to tile; the output layer has a pass of its own."""
    module = sys.modules["dream_fast.kernels.fields.field" if mode is None else "dream_fast.kernels.fields.normals"]
    name = "_field_bwd_config" if mode is None else "_field_normals_bwd_config"
    config = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *shape: config(*shape)._replace(programs=1, layers_a_pass=3))
    monkeypatch.setattr(module, "multiprocessors", lambda _: 1)
    operators, settings = (kernels.field, kernels.field_reference), {}
    if mode is not None:
        operators, settings = (kernels.field_normals, kernels.field_normals_reference), {"mode": mode}
    shapes = [(16, 4), (16, 16), (16, 16), (4, 16)]
    weights = [(draw(*shape, seed=number) - 0.4).to(device) * 0.5 for number, shape in enumerate(shapes)]
    biases = [draw(shape[0], seed=10 + number).to(device) for number, shape in enumerate(shapes)]
    x, table = (draw(100, 3, seed=20) * 1.6 - 0.8).to(device), draw(GRID.rows, 2, seed=21).to(device)
    results = []
    for operator, dtype in ((operators[0], None), (operators[1], None), (operators[1], torch.float64)):
        leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (table, *weights, *biases)]
        out = operator(x.to(dtype or x.dtype), leaves[0], leaves[1:5], leaves[5:], FieldSpec(grid=GRID), **settings)
        results.append(list(torch.autograd.grad(sum(tensor.sum() for tensor in out[:2]), leaves)[1:]))
    check_together("gradient of the network", *results)
