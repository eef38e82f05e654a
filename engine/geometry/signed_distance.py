"""Signed distance to a triangle mesh on a regular lattice: exact near the surface, its sign anywhere.

Distances are computed between each triangle and the lattice points around it. A point is inside if a line through it
along an axis has entered the mesh more often than left it, for at least two of the three axes, so that a small hole
changes no sign. Orientation counts: overlapping parts are one solid. A mesh that is inside out is inverted.
"""

import math

import torch
from torch import Tensor

from dream_fast.engine.geometry.mesh import TensorMesh

PAIRS_AT_ONCE = 1 << 20  # of a triangle and a lattice point


def _pairs(first: Tensor, counts: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The pairs `start` to `stop` of a box and a lattice point in it: box [P], point [P, D].

    The n boxes have counts [n, D] points along each axis, from the point first [n, D] on.
    """
    ends = counts.prod(1).cumsum(0)
    pair = torch.arange(start, stop, device=first.device)
    box = torch.searchsorted(ends, pair, right=True)
    rest, point = pair - (ends - counts.prod(1))[box], []
    for axis in range(counts.shape[1]):
        size = counts[box, axis]
        point.append(first[box, axis] + rest % size)
        rest = rest // size
    return box, torch.stack(point, 1)


def _boxes(low: Tensor, high: Tensor, origin: Tensor, spacing: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
    """First lattice point, and number of points, inside [low, high] along each axis, int64 [n, D]."""
    first = ((low - origin) / spacing).ceil().clamp(min=0).minimum(shape).long()
    last = ((high - origin) / spacing).floor().clamp(min=-1).minimum(shape - 1).long()
    return first, (last - first + 1).clamp(min=0)


def _segment_distance(p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [n] of points p [n, 3] from segments a to b, [n, 3] each."""
    along = b - a
    part = ((p - a) * along).sum(1) / along.square().sum(1).clamp(min=1e-30)
    return (a + part.clamp(0, 1)[:, None] * along - p).square().sum(1)


def _triangle_distance(p: Tensor, corners: Tensor) -> Tensor:
    """Squared distances [n] of points p [n, 3] from triangles [n, 3, 3]."""
    a, b, c = corners.unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    above = torch.stack(
        [(torch.linalg.cross(y - x, p - x) * normal).sum(1) >= 0 for x, y in ((a, b), (b, c), (c, a))]
    ).all(0)
    length = normal.square().sum(1)
    plane = ((p - a) * normal).sum(1).square() / length.clamp(min=1e-30)
    edges = torch.stack([_segment_distance(p, a, b), _segment_distance(p, b, c), _segment_distance(p, c, a)]).amin(0)
    return torch.where(above & (length > 1e-30), plane, edges)


def distance(mesh: TensorMesh, origin: Tensor, spacing: Tensor, shape: tuple[int, int, int], limit: float) -> Tensor:
    """Distance to the mesh at origin + spacing (i, j, k) [shape], at most `limit`."""
    corners, size = mesh.vertices[mesh.faces], torch.tensor(shape, device=origin.device)
    first, counts = _boxes(corners.amin(1) - limit, corners.amax(1) + limit, origin, spacing, size)
    nearest = torch.full((math.prod(shape),), limit**2, dtype=corners.dtype, device=origin.device)
    total = int(counts.prod(1).sum())
    for start in range(0, total, PAIRS_AT_ONCE):
        triangle, point = _pairs(first, counts, start, min(start + PAIRS_AT_ONCE, total))
        squared = _triangle_distance(origin + spacing * point, corners[triangle])
        flat = (point[:, 0] * size[1] + point[:, 1]) * size[2] + point[:, 2]
        nearest.scatter_reduce_(0, flat, squared, "amin")
    return nearest.sqrt().view(shape)


def _winding_along(mesh: TensorMesh, axis: int, origin: Tensor, spacing: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Number of times that lines along `axis` have entered the mesh, minus left it, before each point [shape]."""
    across = [k for k in range(3) if k != axis]
    size = torch.tensor(shape, device=origin.device)
    # Lines are moved off the lattice, so that few meet an edge exactly.
    shift = spacing[across] * torch.tensor([1.7e-3, 2.9e-3], device=origin.device)
    corners = mesh.vertices[mesh.faces].double()
    flat, start = corners[..., across], (origin[across] + shift).double()
    step = spacing[across].double()
    first, counts = _boxes(flat.amin(1), flat.amax(1), start, step, size[across])
    crossed = torch.zeros(*(shape[k] for k in across), shape[axis] + 1, dtype=torch.int64, device=origin.device)
    total = int(counts.prod(1).sum())
    for begin in range(0, total, PAIRS_AT_ONCE):
        triangle, line = _pairs(first, counts, begin, min(begin + PAIRS_AT_ONCE, total))
        relative = flat[triangle] - (start + step * line)[:, None]  # [n, 3, 2]
        x, y = relative.unbind(2)
        u = torch.stack(
            [x[:, (k + 1) % 3] * y[:, (k + 2) % 3] - x[:, (k + 2) % 3] * y[:, (k + 1) % 3] for k in range(3)], 1
        )
        area = u.sum(1)
        # An edge on the line belongs to one of its two triangles: the one on its positive side.
        hit = torch.where(area > 0, (u > 0).all(1), (u < 0).all(1)) & (area != 0)
        height = (u * corners[triangle][..., axis]).sum(1) / area
        layer = ((height - origin[axis]) / spacing[axis]).ceil().clamp(0, shape[axis]).long()
        flat_line = line[:, 0] * shape[across[1]] + line[:, 1]
        sign = torch.where(area > 0, -1, 1) * (1 if axis != 1 else -1)
        index = (flat_line * (shape[axis] + 1) + layer)[hit]
        crossed.view(-1).scatter_add_(0, index, sign[hit])
    return crossed[..., :-1].cumsum(-1).movedim(-1, axis)


def inside(mesh: TensorMesh, origin: Tensor, spacing: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """True at lattice points inside the mesh, bool [shape]."""
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    volume = (torch.linalg.cross(a, b) * c).sum()
    orientation = torch.where(volume < 0, -1, 1)
    votes = [(_winding_along(mesh, axis, origin, spacing, shape) * orientation) > 0 for axis in range(3)]
    return torch.stack(votes).sum(0) >= 2


def signed_distance(
    mesh: TensorMesh, origin: Tensor, spacing: Tensor, shape: tuple[int, int, int], limit: float
) -> Tensor:
    """Signed distance at origin + spacing (i, j, k) [shape], positive inside, in [-limit, limit]."""
    unsigned = distance(mesh, origin, spacing, shape, limit)
    return torch.where(inside(mesh, origin, spacing, shape), unsigned, -unsigned)
