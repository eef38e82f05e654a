"""Samples of rays: importance sampling by its definition, and both samplers against a dense quadrature."""

import dataclasses

import pytest
import torch

from dream_fast import kernels
from dream_fast.bench.accuracy import check, error
from dream_fast.engine.config.sections import FieldConfig, RenderConfig
from dream_fast.engine.render.ray_samplers import (
    MIN_WEIGHT,
    ImportanceSampler,
    OccupancySampler,
    midpoints,
    ray_weights,
    sample_pdf,
    stratified_edges,
)
from dream_fast.engine.render.volume import VolumeRenderer
from dream_fast.engine.scene.camera import make_cameras, rays
from dream_fast.engine.scene.field import FieldOutput
from dream_fast.engine.scene.frequency_field import FrequencyField
from dream_fast.engine.scene.make_field import make_field

EDGES = torch.tensor([[1.0, 1.5, 1.75, 3.0, 3.5], [2.0, 3.0, 4.0, 5.0, 6.0]])
WEIGHTS = torch.tensor([[0.1, 0.4, 0.2, 0.1], [0.0, 0.0, 0.3, 0.0]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vanilla(seed=0, bg_radius=-1.0, **changes) -> VolumeRenderer:
    field = FieldConfig(backbone="vanilla", n_frequencies=4, hidden_width=16, hidden_layers=3, bg_radius=bg_radius)
    config = dataclasses.replace(RenderConfig(), **{"num_steps": 12, "upsample_steps": 6, **changes})
    return VolumeRenderer(FrequencyField(field, config.bound, seeded(seed)), config)


def some_rays(size=6):
    cameras = make_cameras(*(torch.tensor([v]) for v in (70.0, 30.0, 3.0, 50.0)))
    return tuple(part.reshape(-1, 3) for part in rays(cameras, size, size))


# Importance sampling


@pytest.mark.parametrize("generator", [None, seeded()], ids=["middle", "random"])
def test_sample_pdf_follows_weights(generator):
    """Samples are stratified over the distribution, so a share is off by at most two samples."""
    n = 20_000
    t = sample_pdf(EDGES, WEIGHTS, n, generator)
    expected = WEIGHTS + MIN_WEIGHT
    expected = expected / expected.sum(1, keepdim=True)
    for ray in range(2):
        cells = torch.bucketize(t[ray], EDGES[ray, 1:-1], right=True)
        share = torch.bincount(cells, minlength=4) / n
        assert (share - expected[ray]).abs().max() <= 2.1 / n  # a tenth for the rounding of sums in fp32
        for cell in WEIGHTS[ray].nonzero()[:, 0]:  # evenly inside a cell: mean and spread of a uniform variable
            inside = (t[ray][cells == cell] - EDGES[ray, cell]) / (EDGES[ray, cell + 1] - EDGES[ray, cell])
            spread, count = 12**-0.5, len(inside)
            # To five standard errors of numbers without order, which these have less of.
            assert abs(inside.mean() - 0.5) < 5 * spread / count**0.5
            assert abs(inside.std() / spread - 1) < 5 * (0.8 / (4 * count)) ** 0.5


@pytest.mark.parametrize("generator", [None, seeded(1)], ids=["middle", "random"])
def test_sample_pdf_sorted(generator):
    """Samples are sorted and inside."""
    weights = torch.rand(50, 9, generator=seeded(2)) ** 8  # most of them next to nothing
    edges = torch.rand(50, 10, generator=seeded(3)).cumsum(1)
    t = sample_pdf(edges, weights, 33, generator)
    assert t.shape == (50, 33) and (t.diff(dim=1) >= 0).all()
    assert (t >= edges[:, :1]).all() and (t <= edges[:, -1:]).all()


def test_sample_pdf_empty_ray():
    """A ray through nothing is sampled evenly."""
    t = sample_pdf(torch.linspace(2, 4, 9)[None], torch.zeros(1, 8), 4, None)
    exact = torch.tensor([[2.25, 2.75, 3.25, 3.75]], dtype=torch.float64)
    check("even", t, exact.float(), exact)


def test_stratified_edges():
    """Even intervals fill the ray and move by up to half."""
    near, far = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    even = stratified_edges(near, far, 4, None)
    assert even.tolist() == [[1.0, 1.5, 2.0, 2.5, 3.0], [2.0] * 5]
    assert midpoints(even)[0].tolist() == [1.25, 1.75, 2.25, 2.75]
    moved = stratified_edges(torch.ones(500), torch.full((500,), 3.0), 4, seeded())
    by = (moved - even[0]) / 0.5
    assert (by[:, 0] == 0).all() and (by[:, -1] == 0).all()
    assert by.abs().max() <= 0.5 and by[:, 1:-1].min() < -0.45 and by[:, 1:-1].max() > 0.45
    assert by[:, 1:-1].mean().abs() < 5 * (12 * 1500) ** -0.5  # five standard errors


def test_ray_weights():
    """Weights follow NeRF's equation 3: w_i = alpha_i (1 - alpha_1) ... (1 - alpha_{i - 1})."""
    sigma, dt = 9 * torch.rand(20, 7, generator=seeded()), torch.rand(20, 7, generator=seeded(1))

    def products(dtype):
        alpha = 1 - torch.exp(-sigma.to(dtype) * dt.to(dtype))
        return alpha * torch.cat([torch.ones(20, 1, dtype=dtype), (1 - alpha[:, :-1]).cumprod(1)], dim=1)

    check("weights", ray_weights(sigma, dt), products(torch.float32), products(torch.float64))


@pytest.mark.parametrize("density", [1e10, 1e20, 1e38, float("inf")])
def test_ray_weights_opaque(density):
    """A dense wall behind a thin fog does not change the rays before and after it in the buffer."""
    sigma = torch.tensor([[1.0, 2.0, 0.5, 1.0], [1.0, density, 3.0, 1.0], [1.0, 2.0, 0.5, 1.0]])
    dt = torch.full_like(sigma, 0.5)
    fog = 1 - torch.tensor(-0.5, dtype=torch.float64).exp()
    thin = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64) * 0.5
    alpha = 1 - torch.exp(-thin)
    clear = alpha * torch.cat([alpha.new_ones(1), (1 - alpha[:-1]).cumprod(0)])
    exact = torch.stack([clear, torch.stack([fog, 1 - fog, 0 * fog, 0 * fog]), clear])
    check("importance", ray_weights(sigma, dt), exact.float(), exact)
    colours = torch.rand(12, 3, generator=seeded())
    out = kernels.composite(sigma.view(-1), colours, dt.cumsum(1).view(-1), dt.view(-1), torch.arange(0, 13, 4))
    check("composite", out.weights.view(3, 4), exact.float(), exact)
    check("opacity", out.opacity, exact.sum(1).float(), exact.sum(1))
    colour = (exact[..., None] * colours.view(3, 4, 3).double()).sum(1)
    check("colours", out.values, colour.float(), colour)


# Whole samples


def near_far_of_the_cube(origins, directions):
    """Near and far distances of rays in [-1, 1]^3, in fp64, slab by slab."""
    origins, directions = origins.double(), directions.double()
    ends = torch.stack([(side - origins) / directions for side in (-1, 1)])
    return ends.amax(0).amin(1) - ends.amin(0).amax(1).clamp(min=0.01)


def test_importance_sampler_fills_rays():
    """Every ray has all its samples and they fill it."""
    renderer = vanilla()
    origins, directions = some_rays()
    near, far = kernels.near_far(origins, directions, 1.0, 0.01)
    inside = near < far
    assert 0 < inside.sum() < len(inside)  # some rays miss the cube
    for generator in (None, seeded()):
        samples = renderer.sampler.sample(origins, directions, generator)
        t, dt = samples.t.view(-1, 18), samples.dt.view(-1, 18)
        check("length", dt.sum(1)[inside], (far - near)[inside], near_far_of_the_cube(origins, directions)[inside])
        assert (dt >= 0).all() and (dt[~inside] == 0).all() and (t.diff(dim=1) >= 0).all()
        positions = samples.positions.view(-1, 18, 3)
        parts = (origins[:, None], t[..., None], directions[:, None])
        origin, along, direction = (part.double() for part in parts)
        check("positions", positions, parts[0] + parts[1] * parts[2], origin + along * direction)
        assert positions[inside].abs().max() <= 1 + 8 * torch.finfo(torch.float32).eps  # of distances of about 4
        assert samples.offsets.tolist() == list(range(0, 18 * 36 + 1, 18)) and samples.count == 18 * 36
        assert torch.equal(samples.ray_ids, torch.arange(36).repeat_interleave(18)) and not samples.overflow


def test_importance_sampler_second_pass():
    """The second pass samples where the first found density."""
    renderer = vanilla(num_steps=32, upsample_steps=32)
    renderer.field.density = lambda x, **_: 50.0 * (x.norm(dim=-1) < 0.3)
    origins, directions = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[0.0, 0.0, -1.0]])
    t = renderer.sampler.sample(origins, directions, None).t
    assert ((t > 2.6) & (t < 2.95)).sum() > 32  # of 64 samples on a length of 2; even ones alone would be 6


def test_importance_sampler_ray_gradients():
    """Distances have no gradient, and rays do."""
    renderer = vanilla()
    origins, directions = (part.requires_grad_() for part in some_rays())
    samples = renderer.sampler.sample(origins, directions, seeded())
    assert not samples.t.requires_grad and not samples.dt.requires_grad
    samples.positions.sum().backward()
    assert torch.equal(origins.grad, torch.full_like(origins, 18.0))
    t = samples.t.view(-1, 18)
    sums = (one.sum(1)[:, None].expand(-1, 3) for one in (t, t.double()))
    check("directions", directions.grad, *sums)
    assert all(parameter.grad is None for parameter in renderer.field.parameters())


def test_importance_sampler_fixed_gradients():
    """Gradients are those of fixed samples."""
    gradients = []
    for fixed in (False, True):
        renderer = vanilla()
        if fixed:
            samples = renderer.sampler.sample(*some_rays(), seeded(5))
            renderer.sampler.sample = lambda *_, _samples=samples, **__: kernels.Samples(
                *(p.detach() for p in _samples)
            )
        out = renderer.train_rays(*some_rays(), background=torch.ones(3), generator=seeded(5))
        (out.rgb.square().sum() + out.depth.sum()).backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in renderer.field.parameters()]))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_importance_sampler_repeats():
    """Samples repeat with the generator."""
    renderer = vanilla()
    first, again, other = (renderer.sampler.sample(*some_rays(), seeded(s)).t for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_importance_sampler_one_pass():
    """Without a second pass samples are even."""
    renderer = vanilla(upsample_steps=0)
    renderer.field.density = None  # nobody asks it
    assert renderer.sampler.sample(*some_rays(), None).t.shape == (36 * 12,)


@pytest.mark.parametrize("normals", ["analytic", "finite_difference"])
def test_importance_sampler_does_not_wait(normals, nothing_read):
    """Nothing waits for the device."""
    renderer = vanilla(normals=normals)
    offered, light = some_rays(), torch.tensor([0.0, 0.0, 1.0])
    with nothing_read:
        samples = renderer.sampler.sample(*offered, seeded(), active_levels=2)
        values = renderer.field(samples.positions, count=samples.count, normals=normals, active_levels=2)
        (values.sigma.sum() + values.normal.sum() + (values.albedo * light).sum()).backward()


@pytest.mark.parametrize("background", [None, torch.tensor([0.2, 0.4, 0.6])])
def test_importance_sampler_view(monkeypatch, background):
    """A view equals the render of training."""
    renderer = vanilla(bg_radius=1.4)
    cameras = make_cameras(*torch.tensor([[70.0, 90.0], [20.0, -60.0], [3.0, 3.0], [50.0, 30.0]]))
    offered = tuple(part.reshape(-1, 3) for part in rays(cameras, 12, 20))
    exactly = vanilla(bg_radius=1.4)
    exactly.field.double()
    images, normals = [], []
    for subject, dtype in ((renderer, torch.float32), (exactly, torch.float64)):
        origins, directions = (part.to(dtype) for part in offered)
        colour = None if background is None else background.to(dtype)
        out = subject.train_rays(origins, directions, background=colour)
        images.append(out)
        surface = origins + (out.depth / out.opacity)[:, None] * directions
        normals.append(subject.field(surface, normals="finite_difference").normal)
    out, exact = images
    monkeypatch.setattr(
        "dream_fast.engine.render.volume.INFERENCE_SAMPLES", 600
    )  # 33 rays at a time, the last few alone
    view = renderer.view(cameras, 12, 20, background=background)
    assert view.rgb.shape == (2, 12, 20, 3) and not view.rgb.requires_grad
    for name in ("rgb", "opacity", "depth"):
        got, reference, truth = getattr(view, name).flatten(), getattr(out, name).flatten(), getattr(exact, name)
        check(name, got, reference, truth.flatten())
    covered = exact.opacity > 0.01
    check("normal", view.normal.view(-1, 3)[covered], normals[0][covered], normals[1][covered])
    assert 0 < covered.sum() < len(covered) and (view.normal.view(-1, 3)[out.opacity < 1e-4] == 0).all()


def test_importance_sampler_state():
    """It has no state."""
    sampler = vanilla().sampler
    sampler.update(seeded())
    sampler.adapt_capacity(5)
    with sampler.without_floaters():
        assert sampler.state_dict() == {} and sampler.samples_per_ray == 18
    sampler.load_state_dict({})
    with pytest.raises(ValueError, match="keeps no state, but there is bits"):
        sampler.load_state_dict({"bits": torch.zeros(1)})


# Against a quadrature


class Cloud:
    """A field with a known density: a soft ball off the centre, coloured by position."""

    device, has_background, occupancy_grid = torch.device("cpu"), False, False

    def __call__(self, x, **_) -> FieldOutput:
        return FieldOutput(self.density(x), 0.5 + 0.4 * torch.sin(5 * x), None)

    def density(self, x, **_):
        centre = torch.tensor([0.1, -0.05, 0.2], dtype=x.dtype)
        return 30 * torch.exp((x - centre).square().sum(-1) / (-2 * 0.15**2))


class Ball(Cloud):
    """A ball with a sharp border."""

    def density(self, x, **_):
        return 40 * torch.sigmoid((0.35 - x.norm(dim=-1)) / 0.01)


def quadrature(field, origins, directions, steps=20_000) -> torch.Tensor:
    """Colour on white and depth of rays [R, 4], in fp64, by the midpoint rule."""
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
    return torch.stack(rows)


def image(sampler, origins, directions) -> torch.Tensor:
    renderer = VolumeRenderer.__new__(VolumeRenderer)
    renderer.field, renderer.config, renderer.sampler = sampler.field, sampler.config, sampler
    out = renderer.train_rays(origins, directions, background=torch.ones(3))
    return torch.cat([out.rgb, out.depth[:, None]], dim=1)


SAMPLERS = {
    "occupancy": lambda n: OccupancySampler(Cloud(), RenderConfig(max_steps=2 * n, occupancy_resolution=8)),
    "importance": lambda n: ImportanceSampler(Cloud(), RenderConfig(num_steps=n, upsample_steps=n // 2)),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_converge(sampler):
    """More samples come closer to the integral."""
    offered = some_rays()
    exact = quadrature(Cloud(), *offered)
    assert exact[:, :3].min() < 0.8  # something is seen
    # The error of middles is at least of the first order in the step, and four times as many samples quarter that.
    errors = [error(image(SAMPLERS[sampler](n), *offered), exact) for n in (16, 64, 256, 1024)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 27 * errors[3]


def test_importance_sampler_error():
    """At the same number of samples the error is smaller where they follow the weights."""
    offered = some_rays()
    exact = quadrature(Ball(), *offered)

    def error_of(even, more):
        config = RenderConfig(num_steps=even, upsample_steps=more)
        return error(image(ImportanceSampler(Ball(), config), *offered), exact)

    assert error_of(32, 16) < 0.7 * error_of(48, 0)


def test_make_sampler_by_backbone():
    """Each backbone has its sampler."""
    assert isinstance(vanilla().sampler, ImportanceSampler)
    grid = make_field(FieldConfig(n_levels=2, log2_hashmap_size=8), 1.0, seeded())
    assert isinstance(VolumeRenderer(grid, RenderConfig(occupancy_resolution=8)).sampler, OccupancySampler)
