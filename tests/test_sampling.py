"""Samples of rays: importance sampling by its definition, and both samplers against a dense quadrature."""

import dataclasses

import pytest
import torch

from dream_fast import kernels
from dream_fast.engine.camera import make_cameras, rays
from dream_fast.engine.config import FieldConfig, RenderConfig
from dream_fast.engine.field import make_field
from dream_fast.engine.renderer import Renderer
from dream_fast.engine.sampling import (
    ImportanceSampler,
    OccupancySampler,
    even_edges,
    importance_samples,
    middles,
    ray_weights,
)
from dream_fast.engine.scene_field import FieldValues
from dream_fast.engine.vanilla import VanillaField

EDGES = torch.tensor([[1.0, 1.5, 1.75, 3.0, 3.5], [2.0, 3.0, 4.0, 5.0, 6.0]])
WEIGHTS = torch.tensor([[0.1, 0.4, 0.2, 0.1], [0.0, 0.0, 0.3, 0.0]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vanilla(seed=0, bg_radius=-1.0, **changes) -> Renderer:
    field = FieldConfig(backbone="vanilla", frequencies=4, hidden_width=16, hidden_layers=3, bg_radius=bg_radius)
    config = dataclasses.replace(RenderConfig(), **{"num_steps": 12, "upsample_steps": 6, **changes})
    return Renderer(VanillaField(field, config.bound, seeded(seed)), config)


def some_rays(size=6):
    cameras = make_cameras(*(torch.tensor([v]) for v in (70.0, 30.0, 3.0, 50.0)))
    return tuple(part.reshape(-1, 3) for part in rays(cameras, size, size))


# ------------------------------------------------------------------------------------------------- importance sampling


@pytest.mark.parametrize("generator", [None, seeded()], ids=["middle", "random"])
def test_samples_follow_the_weights_of_the_cells(generator):
    n = 20_000
    t = importance_samples(EDGES, WEIGHTS, n, generator)
    wanted = WEIGHTS / WEIGHTS.sum(1, keepdim=True)
    for ray in range(2):
        cells = torch.bucketize(t[ray], EDGES[ray, 1:-1], right=True)
        share = torch.bincount(cells, minlength=4) / n
        torch.testing.assert_close(share, wanted[ray], atol=3e-4, rtol=0)
        for cell in wanted[ray].nonzero()[:, 0]:  # evenly inside a cell: mean and spread of a uniform variable
            inside = (t[ray][cells == cell] - EDGES[ray, cell]) / (EDGES[ray, cell + 1] - EDGES[ray, cell])
            assert float(inside.mean()) == pytest.approx(0.5, abs=0.01)
            assert float(inside.std()) == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize("generator", [None, seeded(1)], ids=["middle", "random"])
def test_samples_are_sorted_and_inside(generator):
    weights = torch.rand(50, 9, generator=seeded(2)) ** 8  # most of them next to nothing
    edges = torch.rand(50, 10, generator=seeded(3)).cumsum(1)
    t = importance_samples(edges, weights, 33, generator)
    assert t.shape == (50, 33) and (t.diff(dim=1) >= 0).all()
    assert (t >= edges[:, :1]).all() and (t <= edges[:, -1:]).all()


def test_a_ray_through_nothing_is_sampled_evenly():
    t = importance_samples(torch.linspace(2, 4, 9)[None], torch.zeros(1, 8), 4, None)
    torch.testing.assert_close(t, torch.tensor([[2.25, 2.75, 3.25, 3.75]]))


def test_even_intervals_fill_the_ray_and_move_by_up_to_half():
    near, far = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    even = even_edges(near, far, 4, None)
    torch.testing.assert_close(even, torch.tensor([[1.0, 1.5, 2.0, 2.5, 3.0], [2.0] * 5]))
    assert middles(even)[0].tolist() == [1.25, 1.75, 2.25, 2.75]
    moved = even_edges(torch.ones(500), torch.full((500,), 3.0), 4, seeded())
    by = (moved - even[0]) / 0.5
    assert (by[:, 0] == 0).all() and (by[:, -1] == 0).all()
    assert by.abs().max() <= 0.5 and by[:, 1:-1].min() < -0.45 and by[:, 1:-1].max() > 0.45
    assert by[:, 1:-1].mean().abs() < 0.03


def test_weights_are_those_of_compositing():
    sigma, dt = torch.rand(5, 7, generator=seeded()).double() * 9, torch.rand(5, 7, generator=seeded(1)).double()
    offsets = torch.arange(6) * 7
    flat = kernels.composite_reference(
        sigma.view(-1), torch.zeros(35, 1).double(), dt.view(-1), dt.view(-1), offsets, stop=0.0
    )
    torch.testing.assert_close(ray_weights(sigma, dt), flat.weights.view(5, 7))


# ------------------------------------------------------------------------------------------------------- whole samples


def test_every_ray_has_all_its_samples_and_they_fill_it():
    renderer = vanilla()
    origins, directions = some_rays()
    near, far = kernels.near_far(origins, directions, 1.0, 0.01)
    inside = near < far
    assert 0 < inside.sum() < len(inside)  # some rays miss the cube
    for generator in (None, seeded()):
        samples = renderer.sampler.sample(origins, directions, generator)
        t, dt = samples.t.view(-1, 18), samples.dt.view(-1, 18)
        torch.testing.assert_close(dt.sum(1)[inside], (far - near)[inside])
        assert (dt >= 0).all() and (dt[~inside] == 0).all() and (t.diff(dim=1) >= 0).all()
        positions = samples.positions.view(-1, 18, 3)
        torch.testing.assert_close(positions, origins[:, None] + t[..., None] * directions[:, None])
        assert positions[inside].abs().max() <= 1 + 1e-5
        assert samples.offsets.tolist() == list(range(0, 18 * 36 + 1, 18)) and samples.count == 18 * 36
        assert torch.equal(samples.ray_ids, torch.arange(36).repeat_interleave(18)) and not samples.overflow


def test_the_second_pass_goes_where_the_first_found_something():
    renderer = vanilla(num_steps=32, upsample_steps=32)
    renderer.field.density = lambda x, **_: 50.0 * (x.norm(dim=-1) < 0.3)
    origins, directions = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[0.0, 0.0, -1.0]])
    t = renderer.sampler.sample(origins, directions, None).t
    assert ((t > 2.6) & (t < 2.95)).sum() > 32  # of 64 samples on a length of 2; even ones alone would be 6


def test_places_carry_no_gradient_and_rays_do():
    renderer = vanilla()
    origins, directions = (part.requires_grad_() for part in some_rays())
    samples = renderer.sampler.sample(origins, directions, seeded())
    assert not samples.t.requires_grad and not samples.dt.requires_grad
    samples.positions.sum().backward()
    torch.testing.assert_close(origins.grad, torch.full_like(origins, 18.0))
    torch.testing.assert_close(directions.grad, samples.t.view(-1, 18).sum(1)[:, None].expand(-1, 3))
    assert all(parameter.grad is None for parameter in renderer.field.parameters())


def test_gradients_are_those_of_fixed_samples():
    found = []
    for fixed in (False, True):
        renderer = vanilla()
        if fixed:
            samples = renderer.sampler.sample(*some_rays(), seeded(5))
            renderer.sampler.sample = lambda *_, _samples=samples, **__: kernels.Samples(
                *(p.detach() for p in _samples)
            )
        out = renderer.train_rays(*some_rays(), background=torch.ones(3), generator=seeded(5))
        (out.rgb.square().sum() + out.depth.sum()).backward()
        found.append(torch.cat([p.grad.reshape(-1) for p in renderer.field.parameters()]))
    assert torch.equal(*found) and found[0].abs().max() > 0


def test_samples_repeat_with_the_generator():
    renderer = vanilla()
    first, again, other = (renderer.sampler.sample(*some_rays(), seeded(s)).t for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_second_pass_is_even_samples():
    renderer = vanilla(upsample_steps=0)
    renderer.field.density = None  # nobody asks it
    assert renderer.sampler.sample(*some_rays(), None).t.shape == (36 * 12,)


@pytest.mark.parametrize("normals", ["analytic", "finite_difference"])
def test_nothing_waits_for_the_device(normals, nothing_read):
    renderer = vanilla(normals=normals)
    offered, light = some_rays(), torch.tensor([0.0, 0.0, 1.0])
    with nothing_read:
        samples = renderer.sampler.sample(*offered, seeded(), active_levels=2)
        values = renderer.field(samples.positions, count=samples.count, normals=normals, active_levels=2)
        (values.sigma.sum() + values.normal.sum() + (values.albedo * light).sum()).backward()


@pytest.mark.parametrize("background", [None, torch.tensor([0.2, 0.4, 0.6])])
def test_a_view_is_what_training_renders(monkeypatch, background):
    renderer = vanilla(bg_radius=1.4)
    cameras = make_cameras(*torch.tensor([[70.0, 90.0], [20.0, -60.0], [3.0, 3.0], [50.0, 30.0]]))
    out = renderer.train_rays(*rays(cameras, 12, 20), background=background)
    monkeypatch.setattr("dream_fast.engine.renderer.VIEW_SAMPLES", 600)  # 33 rays at a time, the last few alone
    view = renderer.view(cameras, 12, 20, background=background)
    assert view.rgb.shape == (2, 12, 20, 3) and not view.rgb.requires_grad
    for mine, theirs in ((view.rgb, out.rgb), (view.opacity, out.opacity), (view.depth, out.depth)):
        torch.testing.assert_close(mine.flatten(), theirs.flatten(), atol=1e-5, rtol=1e-5)
    origins, directions = (part.reshape(-1, 3) for part in rays(cameras, 12, 20))
    surface = origins + (out.depth / out.opacity)[:, None] * directions
    seen = out.opacity > 0.01
    normal = renderer.field(surface, normals="finite_difference").normal
    torch.testing.assert_close(view.normal.view(-1, 3)[seen], normal[seen], atol=1e-4, rtol=0)
    assert 0 < seen.sum() < len(seen) and (view.normal.view(-1, 3)[out.opacity < 1e-4] == 0).all()


def test_it_has_no_state():
    sampler = vanilla().sampler
    sampler.update(seeded())
    sampler.adapt_capacity(5)
    with sampler.without_specks():
        assert sampler.state_dict() == {} and sampler.samples_per_ray == 18
    sampler.load_state_dict({})
    with pytest.raises(ValueError, match="keeps no state, but there is bits"):
        sampler.load_state_dict({"bits": torch.zeros(1)})


# ------------------------------------------------------------------------------------------------- against a quadrature


class Cloud:
    """A field with a known density: a soft ball beside the middle, coloured by the place."""

    device, has_background = torch.device("cpu"), False

    def __call__(self, x, **_) -> FieldValues:
        return FieldValues(self.density(x), 0.5 + 0.4 * torch.sin(5 * x), None)

    def density(self, x, **_):
        centre = torch.tensor([0.1, -0.05, 0.2], dtype=x.dtype)
        return 30 * torch.exp((x - centre).square().sum(-1) / (-2 * 0.15**2))


class Ball(Cloud):
    """A ball with a sharp border."""

    def density(self, x, **_):
        return 40 * torch.sigmoid((0.35 - x.norm(dim=-1)) / 0.01)


def quadrature(field, origins, directions, steps=20_000) -> torch.Tensor:
    """Colour on white and depth of rays [R, 4], in fp64, by the middles of many even parts of each ray."""
    origins, directions = origins.double(), directions.double()
    near, far = kernels.near_far(origins, directions, 1.0, 0.01)
    rows = []
    for start, along, first, last in zip(origins, directions, near, torch.maximum(near, far), strict=True):
        step = (last - first) / steps
        t = first + (torch.arange(steps).double() + 0.5) * step
        values = field(start + t[:, None] * along)
        passed = torch.exp(-(values.sigma * step).cumsum(0))
        weights = torch.cat([passed.new_ones(1), passed[:-1]]) - passed
        colour = (weights[:, None] * values.albedo).sum(0) + (1 - weights.sum())
        rows.append(torch.cat([colour, (weights * t).sum()[None]]))
    return torch.stack(rows).float()


def picture(sampler, origins, directions) -> torch.Tensor:
    renderer = Renderer.__new__(Renderer)
    renderer.field, renderer.config, renderer.sampler = sampler.field, sampler.config, sampler
    out = renderer.train_rays(origins, directions, background=torch.ones(3))
    return torch.cat([out.rgb, out.depth[:, None]], dim=1)


SAMPLERS = {
    "occupancy": lambda n: OccupancySampler(Cloud(), RenderConfig(max_steps=2 * n, occupancy_resolution=8)),
    "importance": lambda n: ImportanceSampler(Cloud(), RenderConfig(num_steps=n, upsample_steps=n // 2)),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_samples_come_closer_to_the_integral(sampler):
    offered = some_rays()
    exact = quadrature(Cloud(), *offered)
    errors = [float((picture(SAMPLERS[sampler](n), *offered) - exact).abs().max()) for n in (16, 64, 256, 1024)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 5e-3 and errors[3] < 2e-3


def test_both_samplers_see_the_same():
    one, other = (picture(make(1024), *some_rays()) for make in SAMPLERS.values())
    torch.testing.assert_close(one, other, atol=3e-3, rtol=0)
    assert one[:, :3].min() < 0.8


def test_importance_pays():
    """At the same number of samples the picture is closer where they follow the weights."""
    offered = some_rays()
    exact = quadrature(Ball(), *offered)

    def error(even, more):
        config = RenderConfig(num_steps=even, upsample_steps=more)
        return (picture(ImportanceSampler(Ball(), config), *offered) - exact).abs().max()

    assert error(32, 16) < 0.7 * error(48, 0)


def test_a_sampler_belongs_to_the_backbone():
    assert isinstance(vanilla().sampler, ImportanceSampler)
    grid = make_field(FieldConfig(levels=2, log2_entries=8), 1.0, seeded())
    assert isinstance(Renderer(grid, RenderConfig(occupancy_resolution=8)).sampler, OccupancySampler)
