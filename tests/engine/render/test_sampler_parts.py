"""State and capacity of samplers, and the parts of importance sampling."""

import pytest
import torch

from dream_fast import kernels
from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import RenderConfig
from dream_fast.engine.geometry.voxels import largest_components
from dream_fast.engine.render.ray_samplers import (
    MIN_WEIGHT,
    ImportanceSampler,
    OccupancySampler,
    _stratified_samples,
    make_sampler,
    midpoints,
    sample_pdf,
    stratified_edges,
)
from dream_fast.tests.engine.render.small_renderer import GREY, cameras, make, seeded

ULP = torch.finfo(torch.float32).eps  # relative distance of neighbours in fp32


def test_occupancy_sampler_initial_state():
    """There is a grid for each cascade, and a capacity of at most 256 samples a ray."""
    assert isinstance(make_sampler(make().field, RenderConfig()), OccupancySampler)
    assert isinstance(make_sampler(make("vanilla").field, RenderConfig()), ImportanceSampler)
    sampler = make(bound=1.5).sampler
    assert sampler.cascades == kernels.cascades(1.5) == 2
    assert sampler.density.shape == (2, 16**3) and (sampler.density == 0).all()
    assert sampler.bits.shape == (2, 16**3 // 8) and sampler.bits.dtype == torch.uint8 and (sampler.bits == 255).all()
    assert sampler.samples_per_ray == 64 and make(max_steps=1024).sampler.samples_per_ray == 256
    assert sampler.most_samples == 0 and not sampler.overflowed
    assert (sampler.most_samples.dtype, sampler.overflowed.dtype) == (torch.int64, torch.bool)


def test_update_density_per_cell():
    """Cells are evaluated at their centres, or at random points with a generator, with the active levels."""
    renderer, calls = make(density_thresh=3.0), []
    sampler = renderer.sampler

    def density(points, *, active_levels=None):
        calls.append((points, active_levels))
        return torch.where(points[:, 0] > 0, 8.0, 0.0)

    renderer.field.density = density
    renderer.update_occupancy(None, active_levels=1)
    centres = kernels.occupancy_points(16, 1, 1.0, None)
    assert torch.equal(calls[0][0], centres) and calls[0][1] == 1
    assert torch.equal(sampler.density[0] > 0, centres[:, 0] > 0)
    powers = 2 ** torch.arange(8)
    assert torch.equal((sampler.bits[0][:, None] & powers).bool().flatten(), centres[:, 0] > 0)
    renderer.update_occupancy(seeded(5))
    moved = calls[1][0]
    assert calls[1][1] is None and not torch.equal(moved, centres)
    assert (moved - centres).abs().max() <= 1 / 16 + 4 * ULP  # half a cell of 2/16
    noise = torch.rand(16**3, 3, generator=seeded(5))
    assert torch.equal(moved, kernels.occupancy_points(16, 1, 1.0, noise))


def test_sampler_state_dict():
    """There are five tensors, of which earlier versions lack two; shapes and capacity must fit."""
    sampler, other = make().sampler, make().sampler
    sampler.samples_per_ray = 17
    sampler.most_samples.fill_(5)
    sampler.overflowed.fill_(True)
    sampler.density.fill_(3.0)
    sampler.bits.fill_(9)
    state = {name: value.clone() for name, value in sampler.state_dict().items()}
    assert set(state) == {"density", "bits", "samples_per_ray", "most_samples", "overflowed"}
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    old = {name: state[name] for name in ("density", "bits", "samples_per_ray")}
    other.load_state_dict(old)
    assert other.most_samples == 0 and not other.overflowed and other.samples_per_ray == 17
    for capacity, good in ((0, False), (-1, False), (1, True), (64, True), (65, False)):
        changed = state | {"samples_per_ray": torch.tensor(capacity)}
        if good:
            other.load_state_dict(changed)
            assert other.samples_per_ray == capacity
        else:
            with pytest.raises(ValueError, match=f"^samples_per_ray is {capacity}, and --max_steps 64$"):
                other.load_state_dict(changed)
    make(max_steps=2).sampler.load_state_dict(state | {"samples_per_ray": torch.tensor(8)})  # the least capacity
    with pytest.raises(ValueError, match=r"^bits has shape \(1, 3\), the renderer's is \(1, 512\)$"):
        other.load_state_dict(state | {"bits": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="^the renderer keeps no state, but there is a, b$"):
        make("vanilla").sampler.load_state_dict({"b": GREY, "a": GREY})


def test_adapt_capacity_limits():
    """The capacity is 8 to `max_steps` samples a ray, and doubles after an overflow."""
    sampler = make().sampler
    for start, used, overflowed, capacity in (
        (64, 0, False, 8),
        (20, 100, False, 64),
        (20, 4, True, 40),
        (2, 1, True, 8),
    ):
        sampler.samples_per_ray = start
        sampler.most_samples.fill_(used * 10)
        sampler.overflowed.fill_(overflowed)
        sampler.adapt_capacity(10)
        assert (sampler.samples_per_ray, int(sampler.most_samples), bool(sampler.overflowed)) == (capacity, 0, False)
    sampler.samples_per_ray = 7
    sampler.most_samples.fill_(7)
    sampler.adapt_capacity(0)
    assert sampler.samples_per_ray == 11


def test_use_until_capacity_is_adapted():
    """The fullest step counts, and an overflow is remembered."""
    renderer = make()
    full = renderer.train_views(cameras(), 6, 6, background=GREY)
    renderer.sampler.samples_per_ray = 1
    renderer.train_views(cameras(), 2, 2, background=GREY)
    assert renderer.sampler.most_samples == full.sample_count > 0 and renderer.sampler.overflowed
    renderer.sampler.samples_per_ray = 64
    renderer.train_views(cameras(), 2, 2, background=GREY)
    assert renderer.sampler.overflowed


def test_stratified_edges_by_hand():
    """Edges go from near to far; random inner ones stay in their half interval."""
    near, far = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    edges = stratified_edges(near, far, 4, None)
    assert edges.tolist() == [[1.0, 1.5, 2.0, 2.5, 3.0], [2.0] * 5]
    assert midpoints(edges).tolist() == [[1.25, 1.75, 2.25, 2.75], [2.0] * 4]
    moved = stratified_edges(near.expand(500, 2).reshape(-1), far.expand(500, 2).reshape(-1), 4, seeded())[::2]
    assert (moved[:, 0] == 1).all() and (moved[:, 4] == 3).all()
    for i in (1, 2, 3):
        place = (moved[:, i] - edges[0, i]) / 0.5  # in intervals
        assert place.abs().max() <= 0.5 + 16 * ULP and place.min() < -0.45 and place.max() > 0.45


def test_stratified_samples():
    """Samples are midpoints without a generator, in the given dtype."""
    like = torch.zeros(1, dtype=torch.float64)
    middle = _stratified_samples(3, 4, None, like)
    assert middle.dtype == torch.float64 and middle.tolist() == [[0.125, 0.375, 0.625, 0.875]] * 3
    drawn = _stratified_samples(200, 4, seeded(), like)
    assert drawn.shape == (200, 4) and drawn.dtype == torch.float64
    inside = drawn * 4 - torch.arange(4)
    assert 0 <= inside.min() < 0.01 and 0.99 < inside.max() < 1 and not torch.equal(drawn[0], drawn[1])


def test_sample_pdf_two_steps():
    """With three quarters of the weight in the second interval distances are as computed by hand."""
    edges = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.75]], dtype=torch.float64) - MIN_WEIGHT
    expected = torch.tensor([[0.5, 1 + 2 / 6, 1 + 2 / 2, 1 + 2 * 5 / 6]], dtype=torch.float64)
    check("places", sample_pdf(edges, weights, 4, None), expected, expected)
    even = torch.tensor([[0.25, 0.75, 1.5, 2.5]], dtype=torch.float64)
    check("nothing", sample_pdf(edges, torch.zeros(1, 2).double(), 4, None), even, even)


def test_largest_components_size():
    """Two of 100 cells are enough and one is not, also at the border; diagonal neighbours are connected."""
    cells = torch.zeros(12, 12, 12, dtype=torch.bool)
    cells[0:5, 0:5, 0:4] = True
    cells[8, 8, 8] = cells[9, 9, 9] = True
    expected = cells.clone()
    cells[11, 11, 11] = True
    assert torch.equal(largest_components(cells), expected)
    assert torch.equal(largest_components(expected[8:10, 8:10, 8:10]), expected[8:10, 8:10, 8:10])
