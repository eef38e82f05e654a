"""Inference rendering: the image that march, field and composite give together; empty scenes; normals."""

import math

import pytest
import torch

from dream_fast.bench.accuracy import check_fp64
from dream_fast.kernels import (
    FieldSpec,
    HashGridSpec,
    composite,
    field,
    field_normals,
    march,
    occupancy_points,
    occupancy_update,
    render,
)
from dream_fast.kernels.rays import render as render_module

GRID = HashGridSpec(levels=3, features=2, log2_entries=8, base_resolution=4, max_resolution=12)
BOUND, RESOLUTION, STEPS = 0.8, 16, 96


def scene(dtype=torch.float64, height=6.0):
    """A bumpy ball of colours, as spec and parameters, and the occupancy of its density."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    weights, biases = [random(8, GRID.channels), random(4, 8)], [random(8), random(4)]
    weights[1][0] *= 0.2
    biases[1][0] = -2.0
    spec = FieldSpec(grid=GRID, bound=BOUND, blob_density=height, blob_radius=0.3)
    parameters = (random(GRID.rows, GRID.features), weights, biases)
    points = occupancy_points(RESOLUTION, 1, BOUND).to(dtype)
    density = field(points, *parameters, spec)[0].view(1, -1)
    bits, _ = occupancy_update(torch.zeros_like(density), density, threshold=1.0)
    return spec, parameters, bits


def camera(side=12, dtype=torch.float64):
    axis = (torch.arange(side, dtype=dtype) + 0.5) / side * 2 - 1
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    directions = torch.stack([0.3 * right, -0.3 * down, -torch.ones_like(right)], -1).view(-1, 3)
    origins = torch.tensor([0.0, 0, 3], dtype=dtype).expand(side * side, 3)
    return origins, torch.nn.functional.normalize(directions, dim=1)


@pytest.mark.parametrize("chunk", [1, 50, 1000])
@pytest.mark.parametrize("stop", [0.0, 1e-2])
def test_render_matches_operators(chunk, stop):
    """The view equals march, field and composite one after the other."""
    spec, parameters, bits = scene()
    origins, directions = camera()
    background = torch.rand(144, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"resolution": RESOLUTION, "max_steps": STEPS}
    view = render(
        origins, directions, bits, *parameters, spec, background=background, stop=stop, chunk=chunk, **options
    )
    samples = march(origins, directions, bits, bound=BOUND, capacity=20000, **options)
    sigma, albedo = field(samples.positions, *parameters, spec, count=samples.count)
    expected = composite(sigma, albedo, samples.t, samples.dt, samples.offsets, stop=stop)
    assert not samples.overflow and (expected.opacity > 0.9).any() and (expected.opacity == 0).any()
    check_fp64("rgb", view.rgb, expected.values + (1 - expected.opacity)[:, None] * background)
    check_fp64("opacity", view.opacity, expected.opacity)
    check_fp64("depth", view.depth, expected.depth)
    hit = expected.opacity > 1e-3
    surface = origins[hit] + (expected.depth / expected.opacity)[hit, None] * directions[hit]
    check_fp64("normal", view.normal[hit], field_normals(surface, *parameters, spec)[2])
    assert not view.normal[~hit].any()


def test_render_ball_normals():
    """A steep blob is a ball: normals at its surface are its radii, and nothing where the ball is not."""
    spec, (table, weights, biases), bits = scene()
    weights[1].zero_(), biases[1].zero_()
    biases[1][0] = -15.0
    spec = FieldSpec(grid=GRID, bound=BOUND, blob_density=40.0, blob_radius=0.3)
    bits = torch.full_like(bits, 255)
    origins, directions = camera(20)
    view = render(
        origins,
        directions,
        bits,
        table,
        weights,
        biases,
        spec,
        resolution=RESOLUTION,
        max_steps=512,
        background=torch.ones(3, dtype=torch.float64),
    )
    solid = view.opacity > 0.99
    assert 20 < int(solid.sum()) < 300
    surface = origins + (view.depth / view.opacity)[:, None] * directions
    radii = torch.nn.functional.normalize(surface, dim=1)
    assert float((view.normal * radii).sum(1)[solid].min()) > 0.999
    assert (view.normal[solid] * directions[solid]).sum(1).max() < 0, "normals face the camera"
    empty = view.opacity <= 1e-3
    assert empty.any() and not view.normal[empty].any()
    transmittance = 1 - view.opacity[empty, None] / 2  # a white background and an albedo of a half
    check_fp64("background", view.rgb[empty], transmittance.expand(-1, 3))


def test_render_empty():
    """An empty scene gives the background; no rays give an empty view."""
    spec, parameters, bits = scene(torch.float32)
    origins, directions = camera(4, torch.float32)
    background = torch.tensor([0.2, 0.4, 0.6])
    options = {"resolution": RESOLUTION, "background": background}
    view = render(origins, directions, torch.zeros_like(bits), *parameters, spec, **options)
    assert torch.equal(view.rgb, background.expand(16, 3))
    assert not view.normal.any() and not view.depth.any() and not view.opacity.any()
    view = render(origins[:0], directions[:0], bits, *parameters, spec, **options)
    assert [value.shape for value in view] == [(0, 3), (0, 3), (0,), (0,)]


def test_render_stops_behind_wall(monkeypatch):
    """The field is not evaluated behind a wall that stops every ray."""
    evaluated = []
    original = render_module.field_reference
    monkeypatch.setattr(
        render_module, "field_reference", lambda x, *a, **k: evaluated.append(len(x)) or original(x, *a, **k)
    )
    spec, (table, weights, biases), bits = scene()
    weights[1].zero_(), biases[1].zero_()
    origins, directions = camera(6)
    arguments = (origins, directions, torch.full_like(bits, 255), table, weights, biases, spec)
    costs = {}
    for name, logit in (("thin", -15.0), ("wall", 12.0)):
        biases[1][0] = logit
        evaluated.clear()
        view = render(
            *arguments, resolution=RESOLUTION, max_steps=STEPS, background=torch.zeros(3).double(), normals=False
        )
        assert not view.normal.any()
        costs[name] = sum(evaluated)
    assert costs["wall"] < costs["thin"] / 3


def test_render_no_gradient_and_bad_arguments():
    """The view has no gradient; errors name the argument and both values."""
    spec, (table, weights, biases), bits = scene()
    origins, directions = camera(3)
    table.requires_grad_()
    white = torch.ones(3, dtype=torch.float64)
    view = render(origins, directions, bits, table, weights, biases, spec, resolution=RESOLUTION, background=white)
    assert not view.rgb.requires_grad
    with pytest.raises(ValueError, match=r"background must have shape \[3\], got \[4\]"):
        render(
            origins, directions, bits, table, weights, biases, spec, resolution=16, background=torch.ones(4).double()
        )
    with pytest.raises(ValueError, match=r"stop must be in \[0, 1\), got nan"):
        render(origins, directions, bits, table, weights, biases, spec, resolution=16, background=white, stop=math.nan)
