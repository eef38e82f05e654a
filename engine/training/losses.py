"""Regularisers beside the guidance: each a scalar with its formula, and `regularizers`, which weights them by a config.

S rows of samples, of which the first `count` are real; R rays. Means over samples divide by the count (at least 1), so
a batch of rays that meets nothing costs 0. The formulas and the ramp are stable-dreamfusion's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.engine.config.schedule import largest
from dream_fast.engine.config.sections import LossConfig
from dream_fast.engine.geometry.mesh import TensorMesh
from dream_fast.engine.render.base import Rendered
from dream_fast.engine.scene.field import Field

TV_POINTS = 1_000_000  # whose differences --lambda_tv weights, in each level
TV_SHARE = 32  # of them, one in so many stands for all on a CPU, where all would take four times as long as a step
TERMS = ("entropy", "entropy_weights", "opacity", "orient", "2d_normal_smooth", "3d_normal_smooth")  # lambda_...
MESH_TERMS = ("mesh_normal", "mesh_laplacian")
TINY = 1e-20  # of a length that is divided by
SMOOTH_REACH = 0.01  # world units, standard deviation of the neighbour in the 3D smoothness term


def weight_setting(term: str) -> str:
    """Return the name of the setting that weights a term of the loss."""
    return "lambda_opacity_entropy" if term == "entropy" else f"lambda_{term}"


def ramp(progress: float) -> float:
    """0 at the start, 1 from the middle of the run on; a run that is taken further does not fall back."""
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
    """Seen normals should face the camera: mean of w max(0, n.d)^2, with no gradient into the weights w.

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
    normals: Tensor, near_normals: Tensor, count: Tensor, seen: tuple[Tensor, int] | None = None
) -> Tensor:
    """Mean absolute difference of normals [S, 3] and those of near points [S, 3].

    With `seen`, the weights [S] of the samples and the number of rays, it is that of what a ray sees, the mean over the
    rays: a sample counts by its weight. Samples of near-empty space, and those inside, would otherwise outnumber those
    of the surface. No gradient goes into the weights.
    """
    difference = (normals - near_normals).abs().mean(dim=-1)
    if seen is None:
        return sample_mean(difference, count)
    weights, rays = seen
    return sample_mean(weights.detach() * difference, count) * count / rays


def normal_consistency(surface: TensorMesh, beyond: Tensor) -> Tensor:
    """Neighbouring triangles should lie in one plane: mean of 1 - n_a.n_b over the edges that two of them share.

    An edge of a triangle smaller than the mean counts as much less as that one is smaller: marching tetrahedra leaves
    slivers, whose normals turn with the slightest movement. beyond: `opposite_corners` of the faces.
    """
    a, b, c = surface.vertices[surface.faces].unbind(1)
    weighted = torch.linalg.cross(b - a, c - a)
    normals = weighted * weighted.square().sum(1, keepdim=True).clamp(min=1e-20).rsqrt()
    other = beyond.clamp(min=0) // 3
    difference = 1 - (normals[:, None] * normals[other]).sum(2)  # [T, 3], of every edge twice
    shared = beyond >= 0
    counts = _edge_counts(weighted.detach().norm(dim=1), other)
    return torch.where(shared, counts * difference, 0).sum() / shared.sum().clamp(min=1)


def _edge_counts(area: Tensor, other: Tensor) -> Tensor:
    """How much edges count, [T, 3]: the smaller one of the areas [T] on both sides as a part of the mean, at most 1."""
    return (torch.minimum(area[:, None], area[other]) / area.mean().clamp(min=1e-20)).clamp(max=1)


def laplacian(surface: TensorMesh) -> Tensor:
    """Vertices should lie amid their neighbours: mean over them of |sum over the neighbours of (v - neighbour)|.

    The surface is closed, so that two triangles share each edge. As in stable-dreamfusion the sum is not divided by the
    number of neighbours.
    """
    vertices, faces = surface
    corners = vertices[faces]  # [T, 3, 3]
    away = 3 * corners - corners.sum(1, keepdim=True)  # from the other two corners
    total = torch.zeros_like(vertices).index_add(0, faces.view(-1), away.view(-1, 3)) / 2
    # The root's slope at 0 would be no number.
    return total.square().sum(1).clamp(min=1e-20).sqrt().mean()


def mesh_regularizers(
    surface: TensorMesh, beyond: Tensor, config: LossConfig, now: Mapping[str, float | Tensor] | None = None
) -> dict[str, Tensor]:
    """The weighted terms of a mesh, by name, as `regularizers` those of a field."""
    weights = {name: getattr(config, weight_setting(name)) for name in MESH_TERMS}
    wanted = [name for name, weight in weights.items() if largest(weight) > 0]
    weights |= {name: now[weight_setting(name)] for name in MESH_TERMS if weight_setting(name) in (now or {})}
    terms = {"mesh_normal": lambda: normal_consistency(surface, beyond), "mesh_laplacian": lambda: laplacian(surface)}
    return {name: weights[name] * terms[name]() for name in wanted}


def needs_normals(config: LossConfig) -> bool:
    """Whether a term asks for normals in steps whose shading has none. (The orientation term takes what is there.)"""
    return largest(config.lambda_2d_normal_smooth) > 0 or largest(config.lambda_3d_normal_smooth) > 0


def regularizers(
    rendered: Rendered,
    config: LossConfig,
    *,
    up: float | Tensor,
    now: Mapping[str, float | Tensor] | None = None,
    field: Field,
    normals: str,
    normal_epsilon: float,
    active_levels: int | Tensor | None = None,
    generator: torch.Generator,
    pull: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """The weighted terms of this step, by name. Terms whose weight is 0 in the whole run, or without the normals they
    need, are left out.

    `up` is the `ramp` of the step, by which the entropies join. `now` holds the weights, by their names in `config`,
    that `config` has a schedule for: their values in this step, on the host or as scalars on the device.
    `field`, `normals`, `normal_epsilon` and `active_levels` serve the 3D smoothness, which evaluates the field again.
    `pull` is the length of the guidance's gradient, by which weights are multiplied where `config` says "guided".
    """
    count = rendered.samples.count
    weights = {name: getattr(config, weight_setting(name)) for name in TERMS}
    wanted = {name for name, weight in weights.items() if largest(weight) > 0}
    weights |= {name: now[weight_setting(name)] for name in TERMS if weight_setting(name) in (now or {})}
    if config.regularizers == "guided":
        weights = {name: weights[name] * pull for name in wanted}
    terms = {}
    if "entropy" in wanted:
        terms["entropy"] = weights["entropy"] * up * opacity_entropy(rendered.opacity)
    if "entropy_weights" in wanted:
        terms["entropy_weights"] = weights["entropy_weights"] * up * weights_entropy(rendered.weights, count)
    if "opacity" in wanted:
        terms["opacity"] = weights["opacity"] * opacity_square(rendered.opacity)
    if rendered.sample_normals is None:
        return terms
    if "orient" in wanted:
        terms["orient"] = weights["orient"] * orientation(
            rendered.weights, rendered.sample_normals, rendered.sample_directions, count
        )
    if "2d_normal_smooth" in wanted:
        terms["2d_normal_smooth"] = weights["2d_normal_smooth"] * normal_image_smoothness(rendered.normal)
    if "3d_normal_smooth" in wanted:
        positions = rendered.samples.positions.detach()
        noise = torch.randn(positions.shape, generator=generator, device=generator.device).to(positions.device)
        near = field(
            positions + SMOOTH_REACH * noise,
            active_levels=active_levels,
            count=count,
            normals=normals,
            normal_epsilon=normal_epsilon,
        ).normal
        seen = (rendered.weights, rendered.opacity.numel()) if config.regularizers == "guided" else None
        smooth = normal_smoothness(rendered.sample_normals, near, count, seen)
        terms["3d_normal_smooth"] = weights["3d_normal_smooth"] * smooth
    return terms


@torch.no_grad()
def add_table_gradients(
    field: Field,
    config: LossConfig,
    *,
    up: float | Tensor,
    now: Mapping[str, float | Tensor],
    scale: float | Tensor,
    generator: torch.Generator,
) -> Tensor | None:
    """Add total variation and weight decay of the hash table straight to its gradient (after `backward`).

    `scale` is the loss scale by which the gradient there is already multiplied; `up` and `now` are those of
    `regularizers`. Returns the length of what is added over that of the gradient before; None: nothing is added.
    """
    if max(largest(config.lambda_tv), largest(config.lambda_wd)) == 0:
        return None
    before = field.table.grad.clone()
    spec = field.spec.grid  # both weights are 0 where there is no table: Config sees to it
    variation, decay = (now.get(name, getattr(config, name)) for name in ("lambda_tv", "lambda_wd"))
    if largest(config.lambda_tv) > 0:
        share = TV_SHARE if field.table.device.type == "cpu" else 1
        points = torch.rand(TV_POINTS // share, 3, generator=generator, device=generator.device).to(field.table.device)
        if config.regularizers == "guided":
            change = kernels.hash_grid_total_variation_grad(field.table, spec, points, 1.0)
            length = field.table.grad.norm() / change.norm().clamp(min=TINY)
            field.table.grad += up * variation * length * change
        else:
            weight = share * up * variation
            field.table.grad += scale * kernels.hash_grid_total_variation_grad(field.table, spec, points, weight)
    if largest(config.lambda_wd) > 0:
        field.table.grad += scale * kernels.hash_grid_weight_decay_grad(field.table, spec, decay)
    return (field.table.grad - before).norm() / before.norm().clamp(min=TINY)
