"""Values at the points of a grid that spans the scene cube, and groups of its cells."""

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast.engine.geometry.components import MIN_PART_SIZE, connected_components


def trilinear(values: Tensor, bound: float, points: Tensor) -> Tensor:
    """Interpolate values [N, N, N] (by x, y, z) that span the cube [-bound, bound]^3 at world points [..., 3].

    Outside the cube the value is that of the nearest point of the cube.
    """
    places = (points / bound).flip(-1).reshape(1, 1, 1, -1, 3)  # grid_sample takes z, y, x
    values = F.grid_sample(values[None, None], places, mode="bilinear", padding_mode="border", align_corners=True)
    return values.view(points.shape[:-1])


def largest_components(cells: Tensor) -> Tensor:
    """The cells [X, Y, Z] (bool) that belong to a group of 26-neighbours of at least 2 % of the largest group."""
    occupied = cells.nonzero()
    number = torch.full([side + 2 for side in cells.shape], -1, device=cells.device)  # with a border of empty cells
    number[(occupied + 1).unbind(1)] = torch.arange(len(occupied), device=cells.device)

    def neighbours() -> Iterator[Tensor]:
        """Pairs of neighbouring cells, of one direction at a time to save memory."""
        for offset in product((-1, 0, 1), repeat=3):
            if offset > (0, 0, 0):  # one of both directions
                neighbour = number[(occupied + 1 + occupied.new_tensor(offset)).unbind(1)]
                here = (neighbour >= 0).nonzero()[:, 0]
                yield torch.stack([here, neighbour[here]])

    group = connected_components(len(occupied), neighbours())
    sizes = torch.bincount(group, minlength=1)
    large = torch.zeros_like(cells)
    large[occupied.unbind(1)] = sizes[group] >= MIN_PART_SIZE * sizes.max()
    return large
