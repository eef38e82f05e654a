"""Rendering of a field: shadings, gradients, empty batches, capacity, and views without gradient."""

import dataclasses
import inspect
import sys

import pytest
import torch

from dream_fast import kernels
from dream_fast.bench.accuracy import check, tolerance
from dream_fast.engine.config.sections import FieldConfig, RenderConfig
from dream_fast.engine.geometry.voxels import largest_components
from dream_fast.engine.render.base import Shading, shade
from dream_fast.engine.render.volume import VolumeRenderer
from dream_fast.engine.scene.camera import make_cameras, rays
from dream_fast.engine.scene.hash_grid_field import HashGridField

ULP = torch.finfo(torch.float32).eps  # relative distance of neighbours in fp32

WHITE = torch.ones(3)
BLACK = torch.zeros(3)


def make_renderer(seed=0, background=-1.0, backbone="grid", **changes):
    field_config = dataclasses.replace(
        FieldConfig(),
        backbone=backbone,
        n_levels=3,
        log2_hashmap_size=10,
        base_resolution=4,
        max_resolution=16,
        hidden_width=16,
        hidden_layers=1,
        bg_radius=background,
    )
    render_config = dataclasses.replace(
        RenderConfig(), **{"max_steps": 128, "occupancy_resolution": 32, "bound": 1.0, **changes}
    )
    field = HashGridField(field_config, render_config.bound, torch.Generator().manual_seed(seed))
    return VolumeRenderer(field, render_config)


def in_fp64(**options):
    """As `make_renderer`, in fp64; its images count as exact."""
    renderer = make_renderer(**options, backbone="grid_torch")
    renderer.field.double()
    return renderer


def camera(polar=90.0, azimuth=0.0, radius=3.0, fovy=30.0):
    return make_cameras(*(torch.tensor([v]) for v in (polar, azimuth, radius, fovy)))


def render(renderer, size=16, cameras=None, **options):
    """Rays [R, 3] of the cameras."""
    flat = (part.reshape(-1, 3) for part in rays(cameras or camera(), size, size))
    return renderer.train_rays(*flat, **{"background": WHITE, **options})


def gradients(renderer):
    return torch.cat([p.grad.reshape(-1) for p in renderer.field.parameters() if p.grad is not None])


def test_train_rays_blob():
    """The blob is in the centre at its distance."""
    renderer = make_renderer()
    renderer.update_occupancy(None)
    out = render(renderer, generator=torch.Generator().manual_seed(0))
    opacity = out.opacity.view(16, 16)
    assert opacity[7:9, 7:9].min() > 0.95 > 2 * opacity[0, 0]
    depth = (out.depth / out.opacity).view(16, 16)[8, 8]
    assert 2.6 < depth < 3.0  # the blob's near side, seen from distance 3
    assert out.rgb.shape == (256, 3) and not out.overflow


def test_update_occupancy_keeps_the_image():
    """The occupancy grid skips empty space and keeps the image."""
    renderer = make_renderer()
    before = render(renderer)
    renderer.update_occupancy(torch.Generator().manual_seed(0))
    after = render(renderer)
    assert after.samples.count < 0.5 * before.samples.count
    # What is left out of a ray, at most the cube's diagonal long, is less dense than the threshold.
    threshold = min(float(renderer.sampler.density.mean()), renderer.config.density_thresh)
    lost = ((1 - after.opacity) / (1 - before.opacity)).log()
    rounding = 4 * torch.finfo(torch.float32).eps / (1 - before.opacity).min()
    assert lost.min() > -rounding and lost.max() < 2 * 3**0.5 * threshold and after.opacity.max() > 0.95


def test_largest_components_neighbours():
    """Large components and cells that touch them are kept."""
    cells = torch.zeros(12, 12, 12, dtype=torch.bool)
    cells[1:6, 1:6, 1:6] = True  # 125 cells
    cells[6, 6, 6] = True  # touches its corner
    cells[9, 9:11, 9:12] = True  # 6 cells, apart, more than 2 %
    expected = cells.clone()
    cells[0, 11, 0] = cells[11, 0, 11] = True  # the last cell of the grid and one beside a border
    assert torch.equal(largest_components(cells), expected)
    assert not largest_components(torch.zeros(4, 4, 4, dtype=torch.bool)).any()


def test_without_floaters_restores():
    """Inside the block there are no floaters; afterwards the grid is restored."""
    renderer = make_renderer()
    renderer.update_occupancy(None)
    side = renderer.config.occupancy_resolution
    object_alone = renderer.sampler.bits.clone()
    renderer.sampler.bits.view(side, side, side // 8)[1, 1, 0] |= 4  # one cell in a corner
    with_floater = renderer.sampler.bits.clone()
    with renderer.sampler.without_floaters():
        assert torch.equal(renderer.sampler.bits, object_alone)
    assert torch.equal(renderer.sampler.bits, with_floater)


def test_without_floaters_several_cascades():
    """With several cascades nothing is removed."""
    renderer = make_renderer(bound=2.0)
    renderer.sampler.bits.zero_()
    renderer.sampler.bits[0, :2] = 255
    renderer.sampler.bits[1, 99] = 1
    before = renderer.sampler.bits.clone()
    with renderer.sampler.without_floaters():
        assert torch.equal(renderer.sampler.bits, before)


def test_capacity_on_a_cpu():
    """On a CPU the capacity does not change the image."""
    renderer, small = make_renderer(), make_renderer()
    small.sampler.samples_per_ray = 1
    one, other = (render(r, generator=torch.Generator().manual_seed(4)) for r in (renderer, small))
    assert torch.equal(one.rgb, other.rgb) and torch.equal(one.samples.offsets, other.samples.offsets)
    assert one.weights.shape[0] == one.samples.count


def test_adapt_capacity_follows_use():
    renderer = make_renderer()
    used = int(render(renderer).samples.count) / 256
    renderer.sampler.samples_per_ray = 4 * int(used)
    renderer.sampler.adapt_capacity(256)
    assert used < renderer.sampler.samples_per_ray <= 1.5 * used + 1
    capacity = renderer.sampler.samples_per_ray
    render(renderer)
    renderer.sampler.adapt_capacity(256)
    assert renderer.sampler.samples_per_ray == capacity  # it fits, so buffers and captured graphs stay


@pytest.mark.parametrize(
    ("used", "capacity"), [(34, 100), (50, 100), (67, 100), (89, 100), (91, 137), (100, 151), (32, 49)]
)
def test_adapt_capacity_stays(used, capacity):
    """A capacity of 100 samples a ray stays if a third to nine tenths are used."""
    sampler = make_renderer(max_steps=512).sampler
    sampler.samples_per_ray = 100
    sampler.most_samples.fill_(used * 256)
    sampler.adapt_capacity(256)
    assert sampler.samples_per_ray == capacity


def test_adapt_capacity_after_overflow():
    """Capacity grows after an overflow."""
    renderer = make_renderer()
    renderer.sampler.samples_per_ray = 2
    used = int(render(renderer).samples.count) / 256
    for _ in range(8):
        assert renderer.sampler.overflowed
        renderer.sampler.adapt_capacity(256)
        assert not renderer.sampler.overflowed
        render(renderer)
        if not renderer.sampler.overflowed:
            break
    assert used < renderer.sampler.samples_per_ray <= 4 * used


def both(rendered, colour):
    """Render on black, opacity and a colour, in fp32 and in fp64."""
    parts = (rendered.rgb, rendered.opacity, colour)
    return (tuple(part.detach().to(dtype) for part in parts) for dtype in (torch.float32, torch.float64))


def test_background_colour_and_network():
    renderer = make_renderer(background=1.4)
    directions = rays(camera(), 16, 16)[1][0]
    out = render(renderer, background=None)
    expected = renderer.field.background(directions)
    on_black = render(renderer, background=BLACK)
    per_ray = torch.rand(256, 3, generator=torch.Generator().manual_seed(0))
    for got, behind in ((out.rgb, expected), (render(renderer, background=per_ray).rgb, per_ray)):
        over = [black + (1 - opacity)[:, None] * colour for black, opacity, colour in both(on_black, behind)]
        check("over", got, *over)


def test_background_gradient():
    """The opacity has a gradient from the background."""
    found = []
    for dtype in (torch.float32, torch.float64):
        renderer = in_fp64() if dtype == torch.float64 else make_renderer()
        ray_pair = [part.reshape(-1, 3) for part in rays(camera(), 16, 16)]
        for background, value in ((WHITE, "rgb"), (BLACK, "rgb"), (BLACK, "opacity")):
            renderer.field.zero_grad(set_to_none=True)
            out = renderer.train_rays(*(part.to(dtype) for part in ray_pair), background=background.to(dtype))
            getattr(out, value).sum().backward()
            found.append(gradients(renderer))
    white, black, opacity, *exact = found
    # rgb on white = rgb on black + 1 - opacity, in three channels
    check("white", white, black - 3 * opacity, exact[1] - 3 * exact[2])


def test_shade_formulas():
    """Shadings follow their formulas."""
    albedo = torch.tensor([[0.2, 0.4, 0.8]])
    normal = torch.tensor([[0.0, 0.6, 0.8]])
    light = torch.tensor([0.0, 0.0, 1.0])
    strength = 0.1 + 0.9 * 0.8
    assert torch.equal(shade(Shading("albedo", 0.1), albedo, None), albedo)
    for got, expected in (
        (shade(Shading("lambertian", 0.1, light), albedo, normal), [0.2 * strength, 0.4 * strength, 0.8 * strength]),
        (shade(Shading("textureless", 0.1, light), albedo, normal), [strength] * 3),
        (shade(Shading("normal", 0.1), albedo, normal), [0.5, 0.8, 0.9]),
        (shade(Shading("textureless", 0.1, -light), albedo, normal), [0.1] * 3),
    ):
        exact = torch.tensor([expected], dtype=torch.float64)
        check("shade", got, exact.float(), exact)
    with pytest.raises(ValueError, match="needs a light"):
        shade(Shading("lambertian", 0.1), albedo, normal)


def test_light_direction():
    """Light from the side lights that side."""
    renderer = make_renderer()
    renderer.update_occupancy(None)
    left = torch.tensor([-1.0, 0.0, 0.0])
    outwards = torch.where(torch.arange(256)[:, None] % 16 < 8, left, -left)  # another light for each half

    def halves(light):
        out = render(renderer, shading=Shading("textureless", 0.0, light), background=BLACK)
        image = out.rgb.view(16, 16, 3)[..., 0]
        return image[:, :8].sum(), image[:, 8:].sum()

    bright, dark = halves(left)
    assert bright > 5 * dark
    assert torch.equal(torch.stack(halves(outwards)), torch.stack([bright, halves(-left)[1]]))  # each under its own


def test_normals_on_demand():
    """Normals are computed only if requested."""
    renderer = make_renderer()
    assert render(renderer).normal is None
    out = render(renderer, need_normals=True)
    facing = (out.sample_normals * out.sample_directions).sum(-1)
    assert (out.weights * facing).sum() < 0  # what is seen faces the camera


@pytest.mark.parametrize("shading", ["albedo", "lambertian", "textureless", "normal"])
def test_gradients_repeat(shading):
    """Gradients reach the field and repeat bit for bit."""
    found = []
    for _ in range(2):
        renderer = make_renderer(background=1.4)
        out = render(
            renderer,
            shading=Shading(shading, 0.3, torch.tensor([0.0, 0.6, 0.8])),
            background=None,
            generator=torch.Generator().manual_seed(0),
        )
        (out.rgb.square().sum() + out.opacity.sum()).backward()
        found.append(gradients(renderer))
    assert found[0].isfinite().all() and found[0].abs().sum() > 0
    assert torch.equal(*found)


def test_train_rays_empty():
    """Rays without samples give the background."""
    renderer = make_renderer()
    renderer.sampler.bits.zero_()
    out = render(renderer, shading=Shading("lambertian", light=torch.tensor([0.0, 0.0, 1.0])), background=WHITE / 4)
    assert out.samples.count == 0
    assert (out.rgb == 0.25).all() and (out.opacity == 0).all()
    out.rgb.sum().backward()


def test_state_dict_round_trip():
    """A loaded state continues in another renderer."""
    renderer = make_renderer()
    renderer.update_occupancy(torch.Generator().manual_seed(0))
    other = make_renderer()
    other.sampler.load_state_dict({name: tensor.clone() for name, tensor in renderer.sampler.state_dict().items()})
    assert torch.equal(render(renderer).rgb, render(other).rgb)
    with pytest.raises(ValueError, match="density has shape"):
        make_renderer(occupancy_resolution=16).sampler.load_state_dict(renderer.sampler.state_dict())


def test_view_matches_train_rays():
    """A view equals the render of training."""
    renderer = make_renderer(background=1.4)
    renderer.update_occupancy(None)
    cameras = make_cameras(*torch.tensor([[70.0, 90.0], [20.0, -60.0], [3.0, 3.0], [30.0, 30.0]]))
    view = renderer.view(cameras, 12, 20)
    assert view.rgb.shape == (2, 12, 20, 3) and view.depth.shape == (2, 12, 20)
    exactly = in_fp64(background=1.4)
    exactly.sampler.load_state_dict(renderer.sampler.state_dict())
    origins, directions = rays(cameras, 12, 20)
    out, exact = renderer.train_rays(origins, directions), exactly.train_rays(origins.double(), directions.double())
    # A view ends rays earlier: what it leaves out is `stop` of a ray's light, no farther than the cube's far corner.
    stop = inspect.signature(kernels.render).parameters["stop"].default
    for name, largest in (("rgb", 1.0), ("opacity", 1.0), ("depth", 3.0 + 3**0.5)):
        truth = getattr(exact, name).detach()
        check(name, getattr(out, name).detach(), truth.float(), truth)
        left_out = (truth - getattr(view, name).view(truth.shape)).abs().max()
        assert left_out <= (stop + tolerance(truth.float(), truth)) * largest


@pytest.mark.parametrize("density", [1e10, 1e20, float("inf")])
def test_view_wall_behind_fog(density, monkeypatch):
    """Behind a red fog a nearly opaque blue wall looks like a denser one."""

    def view(wall):
        def field(x, *_, **__):
            behind = x[:, 2:] < 0
            blue = torch.tensor([0.0, 0.0, 1.0]).expand(len(x), 3)
            return torch.where(behind[:, 0], wall, 1.0), torch.where(behind, blue, blue.flip(1))

        monkeypatch.setattr(sys.modules["dream_fast.kernels.rays.render"], "field_reference", field)
        return make_renderer().view(camera(), 8, 8, normals=False, background=BLACK)

    plain, dense = view(1e3), view(density)  # at steps of 0.027 exp(-27) passes one
    for name in ("rgb", "opacity", "depth"):
        exact = getattr(plain, name).double()
        check(name, getattr(dense, name), exact.float(), exact)
    assert (dense.rgb[0, 4, 4, [0, 2]] > 0.2).all()


def test_view_shading_light():
    """Shadings of views use the given light."""
    renderer = make_renderer()
    renderer.update_occupancy(None)
    up = torch.tensor([0.0, 1.0, 0.0])
    image = renderer.view(camera(), 16, 16, shading=Shading("textureless", 0.0, up), background=BLACK).rgb[0]
    assert image[:8].sum() > 5 * image[8:].sum()
    ambient = renderer.view(camera(), 16, 16, shading=Shading("textureless", 0.5, up), background=BLACK).rgb[0]
    assert ambient[:, 0].max() < 0.05 < 0.4 < ambient[8, 8].min()  # nothing is at the border, so nothing is lit
    head = renderer.view(camera(), 16, 16, shading=Shading("lambertian", 0.1), background=BLACK).rgb[0, 8, 8]
    plain = renderer.view(camera(), 16, 16, background=BLACK).rgb[0, 8, 8]
    assert (0.7 * plain < head).all() and (head <= plain * (1 + 8 * ULP)).all()
    normals = renderer.view(camera(), 16, 16, shading=Shading("normal"), background=BLACK).rgb[0, 8, 8]
    assert normals[2] > 0.9  # the front faces +z


def test_unknown_shading():
    """Unknown shading is refused."""
    with pytest.raises(ValueError, match="shading is 'flat'"):
        render(make_renderer(), shading=Shading("flat"))
