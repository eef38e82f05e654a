"""The weighted terms of a render: weight, ramp and formula."""

import dataclasses

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import FieldConfig, LossConfig, RenderConfig
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.render.volume import VolumeRenderer
from dream_fast.engine.scene.camera import make_cameras
from dream_fast.engine.scene.hash_grid_field import HashGridField
from dream_fast.engine.training import losses

NOTHING = {field.name: 0.0 for field in dataclasses.fields(LossConfig) if field.name.startswith("lambda_")}
HEIGHT, WIDTH = 6, 8


@pytest.fixture(scope="module")
def scene():
    """A small random field, a render of two views of it with normals, and its renderer."""
    config = dataclasses.replace(
        FieldConfig(),
        n_levels=3,
        log2_hashmap_size=9,
        base_resolution=4,
        max_resolution=16,
        hidden_width=8,
        hidden_layers=1,
    )
    field = HashGridField(config, 1.0, torch.Generator().manual_seed(0))
    field.table.data.normal_(generator=torch.Generator().manual_seed(1))
    renderer = VolumeRenderer(field, dataclasses.replace(RenderConfig(), max_steps=64, occupancy_resolution=16))
    cameras = make_cameras(*(torch.tensor(x) for x in ([90.0, 60.0], [0.0, 90.0], [3.0, 3.0], [30.0, 30.0])))
    with torch.no_grad():
        rendered = renderer.train_views(cameras, HEIGHT, WIDTH, background=torch.ones(3), need_normals=True)
    return field, rendered


@torch.no_grad()
def weighted(scene, up=1.0, scalars=None, **weights):
    field, rendered = scene
    return losses.regularizers(
        rendered,
        field,
        dataclasses.replace(LossConfig(), **NOTHING | weights),
        RenderConfig(normals="finite_difference", normal_epsilon=0.01),
        StepInputs(generator=torch.Generator().manual_seed(2), scalars={"ramp": up} | (scalars or {}), active_levels=2),
    )


def check_term(name, got, formula, *tensors):
    """Compare a term with its formula in fp64, within the error of the formula in fp32."""
    check(name, got, formula(*tensors), formula(*(tensor.double() for tensor in tensors)))


def test_entropies_weighted(scene):
    """Both entropies are multiplied by the ramp; other terms are not."""
    _, rendered = scene
    count = int(rendered.samples.count)

    def entropy(p):
        p = p.clamp(1e-5, 1 - 1e-5)
        return 3.0 * 0.25 * (-p * p.log2() - (1 - p) * (1 - p).log2()).mean()

    terms = weighted(scene, up=0.25, lambda_opacity_entropy=3.0, lambda_entropy_weights=3.0, lambda_opacity=3.0)
    check_term("entropy", terms["entropy"], entropy, rendered.opacity)
    check_term("weights", terms["entropy_weights"], entropy, rendered.weights[:count])
    check_term("opacity", terms["opacity"], lambda x: 3.0 * x.square().mean(), rendered.opacity)


def test_normal_image_smoothness_by_view(scene):
    """Only pixels of the same view are neighbours."""
    _, rendered = scene

    def smoothness(normal):
        views = normal.view(2, HEIGHT, WIDTH, 3)
        down = torch.stack([view[row + 1] - view[row] for view in views for row in range(HEIGHT - 1)])
        across = torch.stack([view[:, col + 1] - view[:, col] for view in views for col in range(WIDTH - 1)])
        return 2.0 * (down.square().mean() + across.square().mean())

    got = weighted(scene, lambda_2d_normal_smooth=2.0)["2d_normal_smooth"]
    check_term("2d", got, smoothness, rendered.normal)


def test_normal_smoothness_near_points(scene, monkeypatch):
    """Near points have a standard deviation of 0.01 along each axis, on the active levels."""
    field, rendered = scene
    calls = []
    forward = type(field).forward

    def watched(self, x, **options):
        calls.append((x, options))
        return forward(self, x, **options)

    monkeypatch.setattr(type(field), "forward", watched)
    got = weighted(scene, lambda_3d_normal_smooth=2.0)["3d_normal_smooth"]
    ((points, options),) = calls
    assert options["active_levels"] == 2 and options["normals"] == "finite_difference"
    assert options["normal_epsilon"] == 0.01 and options["count"] is rendered.samples.count
    noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(2))
    positions = rendered.samples.positions
    check("points", points, positions + 0.01 * noise, positions.double() + 0.01 * noise.double())
    near = forward(field, points, **options).normal
    count = int(rendered.samples.count)

    def difference(here, there):
        return 2.0 * (here - there)[:count].abs().mean()

    check_term("3d", got, difference, rendered.sample_normals, near)


def test_scheduled_weight(scene):
    """The value of a schedule at this step is used."""
    terms = weighted(scene, lambda_opacity=3.0)
    assert torch.equal(
        weighted(scene, scalars={"lambda_opacity": 6.0}, lambda_opacity=3.0)["opacity"], 2 * terms["opacity"]
    )


def test_sample_mean_of_one():
    """A single real sample counts whole."""
    assert losses.sample_mean(torch.tensor([4.0, 7.0]), torch.tensor(1)) == 4.0


def test_tiny_triangle_normals():
    """Two orthogonal triangles cost 1 at their common edge, whatever their size."""
    from dream_fast.engine.geometry.mesh import TensorMesh

    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    faces = torch.tensor([[0, 1, 2], [0, 3, 1]])
    beyond = torch.tensor([[5, -1, -1], [-1, -1, 2]])  # of each edge, the corner (3 face + corner) opposite it
    for size in (1.0, 1e-3):
        got = losses.normal_consistency(TensorMesh(size * corners, faces), beyond)
        one = torch.tensor(1.0, dtype=torch.float64)
        check("consistency", got, one, one)
