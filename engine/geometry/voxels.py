"""Values between the points of a grid that spans the scene cube."""

from torch import Tensor
from torch.nn import functional as F


def look_up(values: Tensor, bound: float, points: Tensor) -> Tensor:
    """Values [N, N, N], by x, y, z at points that span the cube [-bound, bound]^3, at world points [..., 3].

    Trilinear; outside the cube the nearest.
    """
    places = (points / bound).flip(-1).reshape(1, 1, 1, -1, 3)  # grid_sample takes z, y, x
    found = F.grid_sample(values[None, None], places, mode="bilinear", padding_mode="border", align_corners=True)
    return found.view(points.shape[:-1])
