"""Every regulariser against its formula, and the direction of its gradient."""

import dataclasses
import math

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import FieldConfig, LossConfig, RenderConfig
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.render.volume import VolumeRenderer
from dream_fast.engine.scene.camera import make_cameras
from dream_fast.engine.scene.hash_grid_field import HashGridField
from dream_fast.engine.training import losses

COUNT = torch.tensor(3)
NONE = torch.tensor(0)


def check_value(name, got, exact):
    """Compare a number in fp64 with a closed form."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    check(name, got.detach(), exact, exact)


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_ramp():
    assert [losses.ramp(progress) for progress in (0.0, 0.25, 0.5, 0.99)] == [0, 0.5, 1, 1]


def test_opacity_entropy_gradient():
    """Opacity moves away from one half."""
    opacity = leaf(0.3, 0.7, 0.5)
    loss = losses.opacity_entropy(opacity)
    entropies = [-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in (0.3, 0.7, 0.5)]
    check_value("entropy", loss, sum(entropies) / 3)
    loss.backward()
    check_value("gradient", opacity.grad, [math.log2((1 - p) / p) / 3 for p in (0.3, 0.7, 0.5)])
    assert torch.autograd.gradcheck(losses.opacity_entropy, opacity)
    assert losses.opacity_entropy(torch.tensor([0.0, 1.0])).isfinite()


def test_weights_entropy_ignores_padding():
    weights = leaf(0.3, 0.7, 0.2, 0.5, 0.5)
    loss = losses.weights_entropy(weights, COUNT)
    check_value("entropy", loss, sum(-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in (0.3, 0.7, 0.2)) / 3)
    loss.backward()
    assert (weights.grad[3:] == 0).all() and (weights.grad[:3] != 0).all()
    assert torch.autograd.gradcheck(lambda w: losses.weights_entropy(w, COUNT), weights)
    assert losses.weights_entropy(weights, NONE) == 0


def test_opacity_square():
    opacity = leaf(0.5, 1.0)
    assert losses.opacity_square(opacity) == 0.625
    assert torch.autograd.gradcheck(losses.opacity_square, opacity)


def test_orientation_gradient():
    """Normals turn to the camera, and the weights have no gradient."""
    normals = leaf([0.0, 0, 1], [0.0, 0, -1], [0.0, 0.6, 0.8], [0.0, 0, 1])
    directions = torch.tensor([[0.0, 0, -1]] * 2 + [[0.0, 1, 0]] * 2, dtype=torch.float64)
    weights = leaf(1.0, 0.5, 0.25, 1.0)
    loss = losses.orientation(weights, normals, directions, COUNT)
    check_value("orientation", loss, (0.5 * 1 + 0.25 * 0.36) / 3)
    loss.backward()
    assert weights.grad is None
    assert (normals.grad[0] == 0).all() and (normals.grad[3] == 0).all()
    assert normals.grad[1] @ directions[1] > 0
    weights = weights.detach()
    assert torch.autograd.gradcheck(lambda n: losses.orientation(weights, n, directions, COUNT), normals)


def test_normal_image_smoothness():
    image = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    image[0, 0, 0, 0] = 2.0
    image.requires_grad_()
    check_value("smoothness", losses.normal_image_smoothness(image), 4 / 9 + 4 / 12)
    assert torch.autograd.gradcheck(losses.normal_image_smoothness, image)


def test_normal_smoothness_ignores_padding():
    normals = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    near = torch.zeros_like(normals)
    loss = losses.normal_smoothness(normals, near, COUNT)
    check_value("smoothness", loss, sum(abs(value) for row in normals[:3].tolist() for value in row) / 9)
    assert torch.autograd.gradcheck(lambda n: losses.normal_smoothness(n, near, COUNT), normals)


def test_normal_smoothness_by_weight():
    """A sample counts by its weight, and the mean is over rays."""
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.tensor([0.5, 0.0, 0.25, 9.0, 9.0], dtype=torch.float64).requires_grad_()
    loss = losses.normal_smoothness(normals, torch.zeros_like(normals), COUNT, weights, 2)
    each = normals.abs().mean(dim=1)
    check_value("smoothness", loss, (0.5 * each[0] + 0.25 * each[2]).detach() / 2)
    loss.backward()
    assert weights.grad is None and not normals.grad[1].any() and normals.grad[0].all()


# --------------------------------------------------------------------------------------------------- on a true render

ALL = dict(
    lambda_opacity_entropy=1.0,
    lambda_entropy_weights=1.0,
    lambda_opacity=1.0,
    lambda_orient=1.0,
    lambda_2d_normal_smooth=1.0,
    lambda_3d_normal_smooth=1.0,
)
NOTHING = dict.fromkeys([*ALL, "lambda_tv", "lambda_wd"], 0.0)


def small_renderer():
    field_config = dataclasses.replace(
        FieldConfig(),
        n_levels=2,
        log2_hashmap_size=9,
        base_resolution=4,
        max_resolution=8,
        hidden_width=8,
        hidden_layers=1,
    )
    render_config = dataclasses.replace(RenderConfig(), max_steps=64, occupancy_resolution=16)
    field = HashGridField(field_config, 1.0, torch.Generator().manual_seed(0))
    field.table.data.normal_(generator=torch.Generator().manual_seed(1))
    return VolumeRenderer(field, render_config)


def terms_of(renderer, need_normals=True, empty=False, pull=1.0, **weights):
    if empty:
        renderer.sampler.bits.zero_()
    cameras = make_cameras(*(torch.tensor([v]) for v in (90.0, 0.0, 3.0, 30.0)))
    background = torch.ones(3)
    rendered = renderer.train_views(cameras, 6, 8, background=background, need_normals=need_normals)
    return losses.regularizers(
        rendered,
        renderer.field,
        dataclasses.replace(LossConfig(), **{**NOTHING, **weights}),
        RenderConfig(normals="finite_difference", normal_epsilon=0.01),
        StepInputs(generator=torch.Generator().manual_seed(2), scalars={"ramp": losses.ramp(0.5)}),
        pull,
    )


def term_of(setting: str) -> str:
    """The term of a setting."""
    return next(term for term in losses.TERMS if losses.weight_setting(term) == setting)


@pytest.mark.parametrize("name", ALL)
def test_term_scales_with_weight(name):
    """Each term reaches the field and scales with its weight."""
    renderer = small_renderer()
    terms = terms_of(renderer, **{name: 1.0})
    assert list(terms) == [term_of(name)]
    (loss,) = terms.values()
    assert loss > 0
    assert torch.equal(terms_of(renderer, **{name: 4.0})[term_of(name)], 4 * loss)
    loss.backward()
    gradient = renderer.field.table.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ALL)
def test_guided_weights(name):
    """A weight has the same effect for a guidance whose gradient is eight times as long."""
    renderer, short = small_renderer(), term_of(name)
    one, eight = (terms_of(renderer, pull=p, regularizers="guided", **{name: 1.0})[short] for p in (1.0, 8.0))
    assert torch.equal(eight, 8 * one)
    assert torch.equal(terms_of(renderer, pull=8.0, **{name: 1.0})[short], terms_of(renderer, **{name: 1.0})[short])


def test_terms_without_normals_are_left_out():
    assert set(terms_of(small_renderer(), need_normals=False, **ALL)) == {"entropy", "entropy_weights", "opacity"}
    assert terms_of(small_renderer()) == {}


def test_no_samples_cost_nothing():
    """A batch without samples has no normal loss."""
    terms = terms_of(small_renderer(), empty=True, **ALL)
    assert all(term.isfinite() for term in terms.values())
    assert terms["orient"] == terms["2d_normal_smooth"] == terms["3d_normal_smooth"] == terms["opacity"] == 0


def test_needs_normals():
    assert not losses.needs_normals(LossConfig(lambda_orient=1.0))
    assert losses.needs_normals(LossConfig(lambda_2d_normal_smooth=1.0))
    assert losses.needs_normals(LossConfig(lambda_3d_normal_smooth=1.0))


def test_table_gradients_direction(monkeypatch):
    """Table gradients make the table smaller and smoother."""
    monkeypatch.setattr(losses, "TV_POINTS", 2000)
    for name in ("lambda_tv", "lambda_wd"):
        field = small_renderer().field
        field.table.grad = torch.ones_like(field.table)
        config = dataclasses.replace(LossConfig(), **{**NOTHING, name: 1e-2})
        inputs = StepInputs(generator=torch.Generator().manual_seed(0), scalars={"ramp": 1.0})
        losses.add_table_gradients(field, config, inputs, 4.0)
        added = field.table.grad - 1
        assert (added * field.table).sum() > 0  # descending shrinks the random table
        assert added.abs().max() > 0


@pytest.mark.parametrize("length", [1e-3, 1e3])
def test_guided_total_variation_length(monkeypatch, length):
    """It is a share of the present gradient, whatever its length and the loss scale."""
    monkeypatch.setattr(losses, "TV_POINTS", 2000)
    field = small_renderer().field
    there = torch.randn(field.table.shape, generator=torch.Generator().manual_seed(0))
    there *= length / there.norm()
    field.table.grad = there.clone()
    config = dataclasses.replace(LossConfig(), **NOTHING | {"lambda_tv": 0.3, "regularizers": "guided"})
    inputs = StepInputs(generator=torch.Generator().manual_seed(0), scalars={"ramp": 0.5})
    part = losses.add_table_gradients(field, config, inputs, 4.0)
    added = field.table.grad - there
    assert torch.equal(part, added.norm() / there.norm())
    exact = added.double() * (0.15 * length / added.double().norm())
    check("added", added, there + exact.float() - there, exact)
    assert (added * field.table).sum() > 0  # descending makes the table smoother
    assert losses.add_table_gradients(field, dataclasses.replace(LossConfig(), **NOTHING), inputs, 4.0) is None


def added_gradient(field, scale, up=1.0, **weights):
    """The gradient that `add_table_gradients` adds, over the loss scale."""
    field.table.grad = torch.zeros_like(field.table)
    config = dataclasses.replace(LossConfig(), **NOTHING | weights)
    generator = torch.Generator().manual_seed(0)
    losses.add_table_gradients(field, config, StepInputs(generator=generator, scalars={"ramp": up}), scale)
    return field.table.grad / scale


def test_weight_decay_gradient():
    """It is the gradient of the mean squares of the levels."""
    field = small_renderer().field
    table = field.table.detach().clone().requires_grad_()
    starts = field.spec.grid.offsets
    table64 = table.detach().double().requires_grad_()
    levels, levels64 = (
        [one[start:end] for start, end in zip(starts[:-1], starts[1:], strict=True)] for one in (table, table64)
    )
    assert len(levels) == 2
    (expected,) = torch.autograd.grad(0.3 * sum(e.square().sum() / len(e) for e in levels), table)
    exact = torch.autograd.grad(0.3 * sum(e.square().sum() / len(e) for e in levels64), table64)[0]
    check("weight decay", added_gradient(field, 4.0, lambda_wd=0.3), expected, exact)


@pytest.mark.parametrize(("share", "up"), [(1, 1.0), (1, 0.5), (3, 1.0)])
def test_total_variation_gradient(monkeypatch, share, up):
    """Vertex by vertex: sqrt(sum of squared differences + 1e-9) / 6, with those neighbours held that the grid has.

    Where a share of the points stands for all, each counts as many times.
    """
    monkeypatch.setattr(losses, "TV_POINTS", 60 * share)
    monkeypatch.setattr(losses, "TV_CPU_DIVISOR", share)
    field = small_renderer().field
    points = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))

    def by_hand(dtype):
        table = field.table.detach().to(dtype).requires_grad_()
        fixed, sides, total = table.detach(), (-1, 1), 0.0
        for start, size in zip(field.spec.grid.offsets[:-1], (4, 8), strict=True):  # both levels are dense

            def row(vertex, start=start, size=size):
                return start + vertex[0] + size * (vertex[1] + size * vertex[2])

            for x, y, z in (points * size).int().tolist():
                near = [(x + s, y, z) for s in sides] + [(x, y + s, z) for s in sides] + [(x, y, z + s) for s in sides]
                near = [row(vertex) for vertex in near if 0 <= min(vertex) and max(vertex) < size]
                assert 3 <= len(near) <= 6
                differences = table[row((x, y, z))] - fixed[near]
                total = total + (differences.square().sum(dim=0) + 1e-9).sqrt().sum() / 6
        return torch.autograd.grad(0.2 * share * up * total, table)[0]

    reference, exact = by_hand(torch.float32), by_hand(torch.float64)
    assert exact.count_nonzero() > 100
    check("total variation", added_gradient(field, 8.0, up, lambda_tv=0.2), reference, exact)
