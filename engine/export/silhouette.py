"""Silhouettes of an object in its images, and the isovalue whose surface has those silhouettes.

No density fits the surface of every field: the width of edges and the density inside differ from field to field. In an
image the object is where a ray loses more than half of its light.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.engine.geometry.voxels import trilinear
from dream_fast.engine.render.base import Renderer
from dream_fast.engine.scene.camera import Cameras, rays
from dream_fast.kernels import near_far

IMAGE_SIZE = 128  # pixels along an edge of a view
RAY_STEPS = 128  # samples of a ray through a volume
ISOVALUES = 97  # from the least to the greatest value of a volume, of which the inner ones are candidates
RAYS_AT_ONCE = 1 << 13


class Silhouettes(NamedTuple):
    """V views of an object, with R rays each."""

    origins: Tensor  # [V, R, 3]
    directions: Tensor  # [V, R, 3] unit
    opaque: Tensor  # [V, R] bool: the ray loses more than half of its light


def render_silhouettes(renderer: Renderer, cameras: Cameras) -> Silhouettes:
    """Render the silhouettes that V cameras see."""
    view = renderer.view(cameras, IMAGE_SIZE, IMAGE_SIZE, normals=False)
    return Silhouettes(*rays(cameras, IMAGE_SIZE, IMAGE_SIZE), view.opacity.flatten(1) > 0.5)


def silhouette_isovalue(values: Tensor, bound: float, silhouettes: Silhouettes) -> float | None:
    """The isovalue of `values` whose region above it has the silhouettes best: the largest mean IoU over the views.

    values: [N, N, N] by x, y, z, at points that span the cube [-bound, bound]^3. None: every view is empty or full.
    """
    useful = silhouettes.opaque.any(1) & ~silhouettes.opaque.all(1)
    if not useful.any():
        return None
    origins, directions, opaque = (part[useful] for part in silhouettes)
    values, step = values.to(opaque.device), (torch.arange(RAY_STEPS, device=opaque.device) + 0.5) / RAY_STEPS
    maxima = []
    chunks = (part.flatten(0, 1).split(RAYS_AT_ONCE) for part in (origins, directions))
    for origin, direction in zip(*chunks, strict=True):
        near, far = near_far(origin, direction, bound, 0.0)
        t = near[:, None] + (far - near)[:, None] * step
        maximum = trilinear(values, bound, origin[:, None] + t[..., None] * direction[:, None]).amax(1)
        maxima.append(torch.where(far > near, maximum, -math.inf))
    isovalues = torch.linspace(values.min().item(), values.max().item(), ISOVALUES, device=opaque.device)[1:-1]
    covered = torch.cat(maxima).view(opaque.shape)[..., None] > isovalues  # [V, R, ISOVALUES - 2]
    both, either = (covered & opaque[..., None]).sum(1), (covered | opaque[..., None]).sum(1)
    return isovalues[(both / either).mean(0).argmax()].item()
