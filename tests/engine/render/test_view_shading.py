"""Shading of views, and the arguments that the renderer passes on."""

import pytest
import torch

from dream_fast import kernels
from dream_fast.bench.accuracy import check
from dream_fast.engine.render.base import Shading, shade
from dream_fast.engine.scene.camera import rays
from dream_fast.tests.engine.render.small_renderer import GREY, cameras, make, seeded


@pytest.mark.parametrize("backbone", ["grid", "vanilla"])
@pytest.mark.parametrize("shading", ["albedo", "lambertian", "textureless", "normal"])
@pytest.mark.parametrize("light", [None, torch.tensor([0.0, 0.6, 0.8])], ids=["camera", "light"])
def test_view_shading(backbone, shading, light):
    """The covered part of a pixel is shaded, and the background is not."""
    renderer = make(backbone)
    plain = renderer.view(cameras(2), 5, 6, background=GREY)
    got = renderer.view(cameras(2), 5, 6, background=GREY, shading=Shading(shading, 0.3, light))
    assert all(torch.equal(getattr(got, name), getattr(plain, name)) for name in ("normal", "depth", "opacity"))
    _, directions = rays(cameras(2), 5, 6)
    toward = -directions.view(2, 5, 6, 3) if light is None else light.expand(2, 5, 6, 3)

    def by_hand(dtype):
        rgb, normal, opacity, to_light = (
            t.to(dtype) for t in (plain.rgb, plain.normal, plain.opacity[..., None], toward)
        )
        behind = (1 - opacity) * GREY.to(dtype)
        strength = 0.3 + 0.7 * (normal * to_light).sum(-1, keepdim=True).clamp(min=0)
        covered = {
            "albedo": rgb - behind,
            "lambertian": (rgb - behind) * strength,
            "textureless": opacity * strength.expand_as(rgb),
            "normal": opacity * (normal + 1) / 2,
        }
        return behind + covered[shading]

    check("rgb", got.rgb, by_hand(torch.float32), by_hand(torch.float64))
    assert plain.opacity.min() < 0.75 < 0.9 < plain.opacity.max()  # so object and background both count


@pytest.mark.parametrize("backbone", ["grid", "vanilla"])
def test_view_without_normals(backbone):
    """Normals are zero if neither they nor a shading are requested."""
    renderer = make(backbone)
    bare, plain = (renderer.view(cameras(), 4, 4, background=GREY, normals=normals) for normals in (False, True))
    assert (bare.normal == 0).all() and plain.normal.abs().sum() > 0 and torch.equal(bare.rgb, plain.rgb)
    shaded = renderer.view(cameras(), 4, 4, background=GREY, normals=False, shading=Shading("lambertian", 0.1))
    again = renderer.view(cameras(), 4, 4, background=GREY, shading=Shading("lambertian", 0.1))
    assert torch.equal(shaded.normal, plain.normal) and torch.equal(shaded.rgb, again.rgb)
    assert not any(part.requires_grad for part in shaded)


@pytest.mark.parametrize("backbone", ["grid", "vanilla"])
def test_view_background(backbone):
    """A given colour is used first, then the network, then white."""
    for background in (1.4, -1.0):
        renderer = make(backbone, background)
        _, directions = rays(cameras(), 4, 4)
        network = renderer.field.background(directions[0]).detach() if background > 0 else torch.ones(16, 3)
        expected = renderer.view(cameras(), 4, 4, background=network)
        assert torch.equal(renderer.view(cameras(), 4, 4).rgb, expected.rgb)
        assert not torch.equal(renderer.view(cameras(), 4, 4, background=GREY).rgb, expected.rgb)


def test_view_one_camera_at_a_time():
    """Each camera is rendered alone, with its size, rays and the request for normals."""
    renderer, calls = make(), []
    render = renderer.render_unshaded

    def record(camera, origins, directions, background, normals):
        assert origins.shape == background.shape == directions.shape
        calls.append((camera, *directions.shape[:2], normals))
        return render(camera, origins, directions, background, normals)

    renderer.render_unshaded = record
    both = cameras(2)
    renderer.view(both, 3, 5, normals=False)
    renderer.view(both, 3, 5, normals=False, shading=Shading("textureless"))
    assert [call[1:] for call in calls] == [(3, 5, False)] * 2 + [(3, 5, True)] * 2
    for number, (camera, *_) in enumerate(calls[:2]):
        assert all(torch.equal(got, expected[number : number + 1]) for got, expected in zip(camera, both, strict=True))


def test_view_operator_arguments(monkeypatch):
    """Grid, parameters, background, precision and steps reach the operator."""
    for name, backbone in (("render", "grid"), ("render_reference", "grid_torch")):
        renderer, calls = make(backbone, normal_epsilon=0.07, dt_gamma=0.01, min_near=0.2), []
        renderer.field.compute_dtype = torch.bfloat16

        def operator(*inputs, calls=calls, **options):
            calls.append((inputs, options))
            zeros = torch.zeros(6)
            return kernels.View(torch.zeros(6, 3), torch.zeros(6, 3), zeros, zeros)

        monkeypatch.setattr(kernels, name, operator)
        renderer.view(cameras(), 2, 3, background=GREY, normals=False)
        ((inputs, options),) = calls
        field = renderer.field
        for got, expected in zip(inputs[:2], rays(cameras(), 2, 3), strict=True):
            assert torch.equal(got, expected[0])
        assert inputs[2] is renderer.sampler.bits and inputs[3] is field.table and inputs[6] is field.spec
        assert [list(part) for part in inputs[4:6]] == [list(field.weights), list(field.biases)]
        assert torch.equal(options.pop("background"), GREY.expand(6, 3))
        assert options == {
            "normals": False,
            "normal_epsilon": 0.07,
            "dtype": torch.bfloat16,
            "chunk": 4096,
            "resolution": 16,
            "max_steps": 64,
            "dt_gamma": 0.01,
            "min_near": 0.2,
        }


def test_train_views_field_arguments():
    """Levels, count and normals reach the field; normals only where they are needed."""
    renderer, calls = make(normals="analytic", normal_epsilon=0.07), []
    field = renderer.field

    def record(x, **options):
        calls.append(options)
        return field(x, **options)

    renderer.field = record
    through = dict(background=GREY, active_levels=1)
    recorded = [
        renderer.train_views(cameras(), 4, 4, **through),
        renderer.train_views(cameras(), 4, 4, need_normals=True, **through),
        renderer.train_views(cameras(), 4, 4, Shading("normal"), **through),
    ]
    assert [options["normals"] for options in calls] == [None, "analytic", "analytic"]
    for options, out in zip(calls, recorded, strict=True):
        assert options["active_levels"] == 1 and options["normal_epsilon"] == 0.07
        assert options["count"] is out.samples.count is out.sample_count and out.overflow is out.samples.overflow
    _, directions = rays(cameras(), 4, 4)
    assert torch.equal(recorded[0].sample_directions, directions[0][recorded[0].samples.ray_ids])
    assert torch.equal(recorded[0].rgb, renderer.train_rays(*rays(cameras(), 4, 4), **through).rgb.view(1, 4, 4, 3))
    assert (
        recorded[1].normal.shape == (1, 4, 4, 3) and recorded[0].normal is None and recorded[0].sample_normals is None
    )


def test_shade_errors():
    """The message has the shading and what it lacks; ambient light alone is uniform."""
    albedo, normal = torch.rand(4, 3, generator=seeded()), torch.eye(3)[[0, 1, 2, 0]]
    for shading in ("lambertian", "textureless", "normal"):
        with pytest.raises(ValueError, match=f"^{shading} shading needs normals$"):
            shade(Shading(shading, 0.1, GREY), albedo, None)
    for shading in ("lambertian", "textureless"):
        with pytest.raises(ValueError, match=f"^{shading} shading needs a light$"):
            shade(Shading(shading, 0.1), albedo, normal)
    assert torch.equal(shade(Shading("lambertian", 1.0, GREY), albedo, normal), albedo)
    assert torch.equal(shade(Shading("textureless", 0.5, -GREY), albedo, normal), torch.full((4, 3), 0.5))
    assert torch.equal(shade(Shading("textureless", 0.0, GREY), albedo, normal)[:, 0], GREY[[0, 1, 2, 0]])
    with pytest.raises(
        ValueError, match="^shading is 'flat', expected one of albedo, lambertian, textureless, normal$"
    ):
        make().view(cameras(), 2, 2, shading=Shading("flat"))
