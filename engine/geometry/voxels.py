"""Values between the points of a grid that spans the scene cube."""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_PART = 0.02  # of the cells of the largest part; smaller ones are specks


def trilinear(values: Tensor, bound: float, points: Tensor) -> Tensor:
    """Values [N, N, N], by x, y, z at points that span the cube [-bound, bound]^3, at world points [..., 3].

    Trilinear; outside the cube the nearest.
    """
    places = (points / bound).flip(-1).reshape(1, 1, 1, -1, 3)  # grid_sample takes z, y, x
    found = F.grid_sample(values[None, None], places, mode="bilinear", padding_mode="border", align_corners=True)
    return found.view(points.shape[:-1])


def largest_components(cells: Tensor) -> Tensor:
    """Of occupied cells [G, G, G] (bool), those in groups of neighbours (26) of at least 2 % of the largest group."""
    label = torch.arange(cells.numel(), dtype=torch.float64, device=cells.device).view(cells.shape)
    label, before = torch.where(cells, label, -1.0), None
    while before is None or not torch.equal(label, before):
        before = label
        label = torch.where(cells, F.max_pool3d(label[None], 3, stride=1, padding=1)[0], -1.0)
    groups = (label + 1).long()  # 0: not occupied
    sizes = torch.bincount(groups.flatten(), minlength=2)
    sizes[0] = 0
    return (sizes >= SMALLEST_PART * sizes.max())[groups] & cells
