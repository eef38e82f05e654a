"""Regularisers: a formula for each, and `regularizers`, which weights them by the settings.

S rows of samples, of which the first `count` are real; R rays. Means over samples divide by the count (at least 1), so
rays without samples cost 0. Formulas and ramp are stable-dreamfusion's.

Total variation and weight decay of the hash table are no terms of the loss: `add_table_gradients` adds their closed
gradients to the table's after `backward`, which costs neither a forward pass nor memory for the differences.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.engine.config.schedule import largest
from dream_fast.engine.config.sections import LossConfig, RenderConfig
from dream_fast.engine.geometry.mesh import TensorMesh
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.render.base import Rendered
from dream_fast.engine.scene.field import Field

TV_POINTS = 1_000_000  # points at which --lambda_tv takes differences, in each level
TV_CPU_DIVISOR = 32  # a CPU takes so many times fewer, weighted up: all would take four times as long as a step
TERMS = ("entropy", "entropy_weights", "opacity", "orient", "2d_normal_smooth", "3d_normal_smooth")  # lambda_...
MESH_TERMS = ("mesh_normal", "mesh_laplacian")
MIN_DIVISOR = 1e-20  # of lengths
SMOOTH_DISTANCE = 0.01  # world units, standard deviation of the distance to the near point of the 3D smoothness


def weight_setting(term: str) -> str:
    """Return the setting that weights a term of the loss."""
    return "lambda_opacity_entropy" if term == "entropy" else f"lambda_{term}"


def ramp(progress: float) -> float:
    """Weight of the ramped regularisers: 0 at the start, 1 from the middle of the run on."""
    return min(1.0, 2.0 * progress)


def binary_entropy(p: Tensor) -> Tensor:
    """Entropy in bits of a coin with probability p, clamped to [1e-5, 1 - 1e-5]; elementwise."""
    p = p.clamp(1e-5, 1 - 1e-5)
    return -p * p.log2() - (1 - p) * (1 - p).log2()


def sample_mean(values: Tensor, count: Tensor) -> Tensor:
    """Mean of the first `count` of values [S]; 0 when there are none."""
    real = torch.arange(values.shape[0], device=values.device) < count
    return torch.where(real, values, 0).sum() / count.clamp(min=1)


def opacity_entropy(opacity: Tensor) -> Tensor:
    """Rays [R] should be empty or full: mean entropy of their opacity."""
    return binary_entropy(opacity).mean()


def weights_entropy(weights: Tensor, count: Tensor) -> Tensor:
    """Weights [S] should be 0 or 1: mean entropy over samples, the form that stable-dreamfusion computes."""
    return sample_mean(binary_entropy(weights), count)


def opacity_square(opacity: Tensor) -> Tensor:
    """Mean square of the opacity [R]: less is better."""
    return opacity.square().mean()


def orientation(weights: Tensor, normals: Tensor, directions: Tensor, count: Tensor) -> Tensor:
    """Visible normals should face the camera: mean of w max(0, n.d)^2, with no gradient into the weights w.

    weights [S], normals and ray directions [S, 3]. Source: Verbin et al., Ref-NeRF, 2022, equation 11.
    """
    away = (normals * directions).sum(dim=-1).clamp(min=0)
    return sample_mean(weights.detach() * away.square(), count)


def normal_image_smoothness(image: Tensor) -> Tensor:
    """Mean squared difference of neighbours in normal images [B, H, W, 3], down plus across."""
    down = image[:, 1:] - image[:, :-1]
    across = image[:, :, 1:] - image[:, :, :-1]
    return down.square().mean() + across.square().mean()


def normal_smoothness(
    normals: Tensor, near_normals: Tensor, count: Tensor, weights: Tensor | None = None, rays: int = 1
) -> Tensor:
    """Mean absolute difference of normals [S, 3] and those of near points [S, 3].

    With `weights` [S] of the samples it is the mean over the `rays` of what each ray sees: a sample counts by its
    weight. Otherwise samples of almost empty space and of the inside outnumber those of the surface. No gradient goes
    into the weights.
    """
    difference = (normals - near_normals).abs().mean(dim=-1)
    if weights is None:
        return sample_mean(difference, count)
    return sample_mean(weights.detach() * difference, count) * count / rays


def normal_consistency(surface: TensorMesh, opposite: Tensor) -> Tensor:
    """Neighbouring triangles should lie in one plane: mean of 1 - n_a.n_b over the edges that two of them share.

    An edge of a triangle smaller than the mean counts less in proportion: marching tetrahedra leaves slivers, whose
    normals turn with the slightest movement. `opposite` are the `opposite_corners` of the faces.
    """
    a, b, c = surface.vertices[surface.faces].unbind(1)
    area_normals = torch.linalg.cross(b - a, c - a)
    normals = area_normals * area_normals.square().sum(1, keepdim=True).clamp(min=MIN_DIVISOR).rsqrt()
    neighbour = opposite.clamp(min=0) // 3
    difference = 1 - (normals[:, None] * normals[neighbour]).sum(2)  # [T, 3], of every edge twice
    shared = opposite >= 0
    weights = _edge_weights(area_normals.detach().norm(dim=1), neighbour)
    return torch.where(shared, weights * difference, 0).sum() / shared.sum().clamp(min=1)


def _edge_weights(area: Tensor, neighbour: Tensor) -> Tensor:
    """Weights of edges [T, 3]: the smaller of the areas [T] on both sides over the mean area, at most 1."""
    return (torch.minimum(area[:, None], area[neighbour]) / area.mean().clamp(min=MIN_DIVISOR)).clamp(max=1)


def laplacian(surface: TensorMesh) -> Tensor:
    """Vertices should lie amid their neighbours: mean over them of |sum over the neighbours of (v - neighbour)|.

    The surface is closed, so two triangles share each edge. As in stable-dreamfusion the sum is not divided by the
    number of neighbours.
    """
    vertices, faces = surface
    corners = vertices[faces]  # [T, 3, 3]
    offsets = 3 * corners - corners.sum(1, keepdim=True)  # from the other two corners
    total = torch.zeros_like(vertices).index_add(0, faces.view(-1), offsets.view(-1, 3)) / 2
    # The slope of the root at 0 would be NaN.
    return total.square().sum(1).clamp(min=MIN_DIVISOR).sqrt().mean()


def mesh_regularizers(
    surface: TensorMesh, opposite: Tensor, config: LossConfig, scalars: Mapping[str, float | Tensor] | None = None
) -> dict[str, Tensor]:
    """Weighted terms of a mesh, by name; `scalars` as in `StepInputs`."""
    weights = _weights(MESH_TERMS, config, scalars or {})
    formulas = {
        "mesh_normal": lambda: normal_consistency(surface, opposite),
        "mesh_laplacian": lambda: laplacian(surface),
    }
    return {name: weight * formulas[name]() for name, weight in weights.items()}


def needs_normals(config: LossConfig) -> bool:
    """True if a term needs normals also in steps whose shading has none. (The orientation term does not.)"""
    return largest(config.lambda_2d_normal_smooth) > 0 or largest(config.lambda_3d_normal_smooth) > 0


def regularizers(
    rendered: Rendered,
    field: Field,
    config: LossConfig,
    render: RenderConfig,
    inputs: StepInputs,
    guidance_norm: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """Weighted terms of a step, by name. Terms whose weight is 0 in the whole run are left out, and in steps without
    normals those that need some.

    `inputs.scalars` has "ramp", by which the entropies are multiplied, and the weights that have a schedule. With
    --regularizers guided, weights are multiplied by `guidance_norm`, the length of the guidance's gradient. The 3D
    smoothness evaluates `field` again.
    """
    count, up = rendered.samples.count, inputs.scalars["ramp"]
    weights = _weights(TERMS, config, inputs.scalars)
    guided = config.regularizers == "guided"
    if guided:
        weights = {name: weight * guidance_norm for name, weight in weights.items()}
    terms = {}
    if "entropy" in weights:
        terms["entropy"] = weights["entropy"] * up * opacity_entropy(rendered.opacity)
    if "entropy_weights" in weights:
        terms["entropy_weights"] = weights["entropy_weights"] * up * weights_entropy(rendered.weights, count)
    if "opacity" in weights:
        terms["opacity"] = weights["opacity"] * opacity_square(rendered.opacity)
    if rendered.sample_normals is None or rendered.normal is None:
        return terms
    if "orient" in weights:
        terms["orient"] = weights["orient"] * orientation(
            rendered.weights, rendered.sample_normals, rendered.sample_directions, count
        )
    if "2d_normal_smooth" in weights:
        terms["2d_normal_smooth"] = weights["2d_normal_smooth"] * normal_image_smoothness(rendered.normal)
    if "3d_normal_smooth" in weights:
        near_normals = _near_normals(rendered, field, render, inputs)
        by_weight = (rendered.weights, rendered.opacity.numel()) if guided else ()
        smoothness = normal_smoothness(rendered.sample_normals, near_normals, count, *by_weight)
        terms["3d_normal_smooth"] = weights["3d_normal_smooth"] * smoothness
    return terms


def _weights(
    names: tuple[str, ...], config: LossConfig, scalars: Mapping[str, float | Tensor]
) -> dict[str, float | Tensor]:
    """Weights of those terms, in this step, that are in use in the run."""
    settings = {name: weight_setting(name) for name in names if largest(getattr(config, weight_setting(name))) > 0}
    return {name: scalars.get(setting, getattr(config, setting)) for name, setting in settings.items()}


def _near_normals(rendered: Rendered, field: Field, render: RenderConfig, inputs: StepInputs) -> Tensor:
    """Normals [S, 3] at points near the samples, moved at random."""
    positions, generator = rendered.samples.positions.detach(), inputs.generator
    assert generator is not None
    noise = torch.randn(positions.shape, generator=generator, device=generator.device).to(positions.device)
    return field(
        positions + SMOOTH_DISTANCE * noise,
        active_levels=inputs.active_levels,
        count=rendered.samples.count,
        normals=render.normals,
        normal_epsilon=render.normal_epsilon,
    ).normal


@torch.no_grad()
def add_table_gradients(
    field: Field, config: LossConfig, inputs: StepInputs, loss_scale: float | Tensor
) -> Tensor | None:
    """Add total variation and weight decay of the hash table to its gradient, after `backward`.

    `loss_scale` is the factor that the gradient already has; `inputs` as in `regularizers`. Returns the length of what
    is added over that of the gradient before, or None where both weights are 0.
    """
    if max(largest(config.lambda_tv), largest(config.lambda_wd)) == 0:
        return None
    table, up, generator = field.table, inputs.scalars["ramp"], inputs.generator
    # Where there is no table, Config has both weights at 0.
    assert table is not None and table.grad is not None and generator is not None
    grad, spec = table.grad, field.spec.grid
    before = grad.clone()
    tv_weight, wd_weight = (inputs.scalars.get(name, getattr(config, name)) for name in ("lambda_tv", "lambda_wd"))
    if largest(config.lambda_tv) > 0:
        divisor = TV_CPU_DIVISOR if table.device.type == "cpu" else 1
        shape = (TV_POINTS // divisor, 3)
        points = torch.rand(shape, generator=generator, device=generator.device).to(table.device)
        if config.regularizers == "guided":
            change = kernels.hash_grid_total_variation_grad(table, spec, points, 1.0)
            length = grad.norm() / change.norm().clamp(min=MIN_DIVISOR)
            grad += up * tv_weight * length * change
        else:
            weight = divisor * up * tv_weight
            grad += loss_scale * kernels.hash_grid_total_variation_grad(table, spec, points, weight)
    if largest(config.lambda_wd) > 0:
        grad += loss_scale * kernels.hash_grid_weight_decay_grad(table, spec, wd_weight)
    return (grad - before).norm() / before.norm().clamp(min=MIN_DIVISOR)
