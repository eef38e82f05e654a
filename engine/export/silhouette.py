"""The outline of an object in its pictures, and the density whose surface has that outline.

No density is that of the surface of every field: how wide its edges are, and how dense it is within, differs. In a
picture the object is where a ray loses more than half of its light.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.engine.geometry.voxels import trilinear
from dream_fast.engine.render.base import Renderer
from dream_fast.engine.scene.camera import Cameras, rays
from dream_fast.kernels import near_far

SIZE = 128  # pixels along an edge of a view
STEPS = 128  # of a ray through a volume
LEVELS = 97  # that are tried
RAYS = 1 << 13  # at once


class Silhouette(NamedTuple):
    """What V views of R rays each see of an object."""

    origins: Tensor  # [V, R, 3]
    directions: Tensor  # [V, R, 3] unit
    solid: Tensor  # [V, R] bool: more than half of the light is the object's


def silhouettes(renderer: Renderer, cameras: Cameras) -> Silhouette:
    """The outline that V cameras see."""
    seen = renderer.view(cameras, SIZE, SIZE, normals=False)
    return Silhouette(*rays(cameras, SIZE, SIZE), seen.opacity.flatten(1) > 0.5)


def silhouette_isovalue(values: Tensor, bound: float, outline: Silhouette) -> float | None:
    """The level above which `values` have the outline as nearly as can be: by overlap, the mean of all views.

    values: [N, N, N] by x, y, z, at points that span the cube [-bound, bound]^3. None: no view has an outline.
    """
    some = outline.solid.any(1) & ~outline.solid.all(1)
    if not some.any():
        return None
    origins, directions, solid = (part[some] for part in outline)
    values, step = values.to(solid.device), (torch.arange(STEPS, device=solid.device) + 0.5) / STEPS
    greatest = []
    for origin, direction in zip(*(part.flatten(0, 1).split(RAYS) for part in (origins, directions)), strict=True):
        near, far = near_far(origin, direction, bound, 0.0)
        t = near[:, None] + (far - near)[:, None] * step
        found = trilinear(values, bound, origin[:, None] + t[..., None] * direction[:, None]).amax(1)
        greatest.append(torch.where(far > near, found, -math.inf))
    levels = torch.linspace(values.min().item(), values.max().item(), LEVELS, device=solid.device)[1:-1]
    covered = torch.cat(greatest).view(solid.shape)[..., None] > levels  # [V, R, LEVELS - 2]
    both, either = (covered & solid[..., None]).sum(1), (covered | solid[..., None]).sum(1)
    return levels[(both / either).mean(0).argmax()].item()
