"""The outline of an object in its pictures, and the density whose surface has that outline.

No density is that of the surface of every field: how wide its edges are, and how dense it is within, differs. In a
picture the object is where a ray loses more than half of its light.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dream_fast.engine.camera import Cameras, rays
from dream_fast.engine.renderer import Renderer

SIZE = 128  # pixels along an edge of a view
STEPS = 128  # of a ray through a volume
LEVELS = 97  # that are tried
RAYS = 1 << 13  # at once


class Outline(NamedTuple):
    """What V views of R rays each see of an object."""

    origins: Tensor  # [V, R, 3]
    directions: Tensor  # [V, R, 3] unit
    solid: Tensor  # [V, R] bool: more than half of the light is the object's


def outline_of(renderer: Renderer, cameras: Cameras) -> Outline:
    """The outline that V cameras see."""
    seen = renderer.view(cameras, SIZE, SIZE, normals=False)
    return Outline(*rays(cameras, SIZE, SIZE), seen.opacity.flatten(1) > 0.5)


def outlined_level(values: Tensor, bound: float, outline: Outline) -> float | None:
    """The level above which `values` have the outline as nearly as can be: by overlap, the mean of all views.

    values: [N, N, N] by x, y, z, at points that span the cube [-bound, bound]^3. None: no view has an outline.
    """
    some = outline.solid.any(1) & ~outline.solid.all(1)
    if not some.any():
        return None
    origins, directions, solid = (part[some] for part in outline)
    grid = values.to(solid.device)[None, None]
    step = (torch.arange(STEPS, device=solid.device) + 0.5) / STEPS
    greatest = []
    for origin, direction in zip(*(part.flatten(0, 1).split(RAYS) for part in (origins, directions)), strict=True):
        walls = torch.stack([-bound - origin, bound - origin]) / direction  # [2, rays, 3]
        near, far = walls.amin(0).amax(1).clamp(min=0), walls.amax(0).amin(1)
        t = near[:, None] + (far - near)[:, None] * step
        points = (origin[:, None] + t[..., None] * direction[:, None]) / bound
        found = F.grid_sample(grid, points.flip(-1)[None, None], align_corners=True, padding_mode="border")[0, 0, 0]
        greatest.append(torch.where(far > near, found.amax(1), -math.inf))
    levels = torch.linspace(values.min().item(), values.max().item(), LEVELS, device=solid.device)[1:-1]
    covered = torch.cat(greatest).view(solid.shape)[..., None] > levels  # [V, R, LEVELS - 2]
    both, either = (covered & solid[..., None]).sum(1), (covered | solid[..., None]).sum(1)
    return levels[(both / either).mean(0).argmax()].item()
