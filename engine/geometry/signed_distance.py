"""Signed distance to a triangle mesh on a regular lattice: exact next to the surface, its sign anywhere.

Distances are computed between each triangle and the lattice points next to it, and extended from point to point, so the
time grows with the number of triangles and of points that the surface passes. A point is inside if a line through it
along an axis has entered the mesh more often than left it, for at least two of the three axes, so that a small hole
changes no sign. Orientation counts: overlapping parts are one solid. A mesh that is inside out is inverted.
"""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from dream_fast.engine.geometry.mesh import TensorMesh

PAIRS_AT_ONCE = 1 << 17  # of a triangle and a lattice point; more of them leave the cache


def _pairs(first: Tensor, counts: Tensor, ends: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The pairs `start` to `stop` of a box and a lattice point in it: box [P], point [P, D].

    The n boxes have counts [n, D] points along each axis, from the point first [n, D] on; `ends` [n] are the sums of
    their numbers of points up to each of them.
    """
    pair = torch.arange(start, stop, device=first.device)
    box = torch.searchsorted(ends, pair, right=True)
    sizes = counts.index_select(0, box).int()
    rest, point = (pair - ends[box]).int() + sizes.prod(1, dtype=torch.int32), []
    for axis in range(counts.shape[1]):
        point.append(rest % sizes[:, axis])
        rest = rest // sizes[:, axis]
    return box, torch.stack(point, 1) + first.index_select(0, box)


def _boxes(low: Tensor, high: Tensor, origin: Tensor, spacing: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
    """First lattice point, and number of points, inside [low, high] along each axis, int64 [n, D]."""
    first = ((low - origin) / spacing).ceil().clamp(min=0).minimum(shape).long()
    last = ((high - origin) / spacing).floor().clamp(min=-1).minimum(shape - 1).long()
    return first, (last - first + 1).clamp(min=0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a[(k + 1) % 3] * b[(k + 2) % 3] - a[(k + 2) % 3] * b[(k + 1) % 3] for k in range(3)])


def _segment_distance(start: Tensor, along: Tensor) -> Tensor:
    """Squared distances [n] of the origin from segments that go from `start` [3, n] by `along` [3, n]."""
    part = -_dot(start, along) / _dot(along, along).clamp(min=1e-30)
    nearest = torch.addcmul(start, part.clamp_(0, 1), along)
    return _dot(nearest, nearest)


def _triangle_distance(points: Tensor, corners: Tensor) -> Tensor:
    """Squared distances [n] of points [3, n] from triangles with corners [3, 3, n], by corner and coordinate."""
    a, b, c = corners - points
    ab, bc, ca = b - a, c - b, a - c
    normal = _cross(ca, ab)
    is_above = _dot(_cross(a, ab), normal) >= 0
    is_above &= _dot(_cross(b, bc), normal) >= 0
    is_above &= _dot(_cross(c, ca), normal) >= 0
    length = _dot(normal, normal)
    plane = _dot(a, normal).square() / length.clamp(min=1e-30)
    edges = torch.minimum(_segment_distance(a, ab), _segment_distance(b, bc))
    edges = torch.minimum(edges, _segment_distance(c, ca))
    return torch.where(is_above & (length > 1e-30), plane, edges)


class _Slabs:
    """For each of T triangles, the lattice points next to it: those within one spacing along each axis, and some more.

    A triangle has columns of points along the axis that its normal is closest to, one for each point of its box on the
    other two axes, and as many points in each column as its plane may be next to.
    """

    def __init__(self, corners: Tensor, origin: Tensor, spacing: Tensor, shape: Tensor):
        self.shape = shape
        first, counts = _boxes(corners.amin(1) - spacing, corners.amax(1) + spacing, origin, spacing, shape)
        a, b, c = ((corners - origin) / spacing).double().unbind(1)  # in units of the lattice
        normal = torch.linalg.cross(b - a, c - a)
        self.axis = normal.abs().argmax(1)
        across = normal.gather(1, self.axis[:, None])
        # The slopes of the plane over the other axes, at most 1. A triangle that is nearly a line has no safe plane.
        length = torch.stack([b - a, c - b, a - c]).norm(dim=2).amax(0)
        has_plane = normal.norm(dim=1) > 1e-6 * length.square()
        self.slope = torch.where(has_plane[:, None], -normal / across, 0)
        self.margin = self.slope.abs().sum(1)  # 1, and what the plane rises within a spacing of the other axes
        depth = torch.where(has_plane, (2 * self.margin).floor().long() + 1, shape.amax())
        column = counts.gather(1, self.axis[:, None])[:, 0]
        self.follows_plane = depth < column
        depth = torch.where(column == 0, 0, torch.minimum(depth, column))
        self.first, self.counts = first, counts.scatter(1, self.axis[:, None], depth[:, None])
        self.ends = self.counts.prod(1).cumsum(0)
        self.corner = a

    @property
    def total(self) -> int:
        """Number of pairs of a triangle and a point."""
        return int(self.ends[-1])

    def pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs `start` to `stop`: triangle [P], point [P, 3], and where the point is in the lattice [P]."""
        triangle, point = _pairs(self.first, self.counts, self.ends, start, stop)
        axis = self.axis[triangle][:, None]
        offset = point.gather(1, axis) - self.first[triangle].gather(1, axis)
        rise = (self.slope[triangle] * (point - self.corner[triangle])).scatter(1, axis, 0).sum(1, keepdim=True)
        lowest = (self.corner[triangle].gather(1, axis) + rise - self.margin[triangle][:, None]).ceil().long()
        along = torch.where(self.follows_plane[triangle][:, None], lowest + offset, point.gather(1, axis))
        return triangle, point.scatter(1, axis, along), ((along >= 0) & (along < self.shape[axis]))[:, 0]


def count_pairs(mesh: TensorMesh, origin: Tensor, spacing: Tensor, shape: tuple[int, int, int]) -> int:
    """Number of pairs of a triangle and a point or line of the lattice that `signed_distance` looks at."""
    corners, size = mesh.vertices[mesh.faces], torch.tensor(shape, device=origin.device)
    low, high = corners.amin(1), corners.amax(1)
    lines = 0
    for axis in range(3):
        across = [k for k in range(3) if k != axis]
        _, counts = _boxes(low[:, across], high[:, across], origin[across], spacing[across], size[across])
        lines += int(counts.prod(1).sum())
    return _Slabs(corners, origin, spacing, size).total + lines


def distance(
    mesh: TensorMesh,
    origin: Tensor,
    spacing: Tensor,
    shape: tuple[int, int, int],
    limit: float,
    *,
    progress: Callable[[int], None] = lambda pairs: None,
) -> Tensor:
    """Distance to the mesh at origin + spacing (i, j, k) [shape], at most `limit`.

    It is exact where the closest point of the mesh is within one spacing along each axis. Farther away it is the length
    of a path over neighbouring points, at most sqrt(3) times the distance from one of them. `progress` is called with
    the number of pairs after each group of them.
    """
    corners, size = mesh.vertices[mesh.faces], torch.tensor(shape, device=origin.device)
    nearest = torch.full((math.prod(shape),), limit**2, dtype=corners.dtype, device=origin.device)
    slabs = _Slabs(corners, origin, spacing, size)
    by_coordinate = corners.permute(1, 2, 0).reshape(9, -1)
    for start in range(0, slabs.total, PAIRS_AT_ONCE):
        stop = min(start + PAIRS_AT_ONCE, slabs.total)
        triangle, point, is_inside = slabs.pairs(start, stop)
        if not is_inside.all():
            triangle, point = triangle[is_inside], point[is_inside]
        selected = by_coordinate.index_select(1, triangle).view(3, 3, -1)
        squared = _triangle_distance((origin + spacing * point).T.contiguous(), selected)
        flat = (point[:, 0] * size[1] + point[:, 1]) * size[2] + point[:, 2]
        nearest.scatter_reduce_(0, flat, squared, "amin")
        progress(stop - start)
    return _extended(nearest.sqrt().view(shape), spacing, limit)


def _extended(distances: Tensor, spacing: Tensor, limit: float) -> Tensor:
    """Distances [shape], each at most that of a neighbour and the way from there, as far as `limit`."""
    offsets = [offset for offset in product((-1, 0, 1), repeat=3) if any(offset)]
    for _ in range(math.ceil(limit / float(spacing.amin()))):
        padded = torch.nn.functional.pad(distances, (1,) * 6, value=limit)
        before = distances
        for offset in offsets:
            part = padded
            for axis, (shift, count) in enumerate(zip(offset, distances.shape, strict=True)):
                part = part.narrow(axis, 1 + shift, count)
            distances = torch.minimum(distances, part + (spacing * spacing.new_tensor(offset)).norm())
        if torch.equal(distances, before):
            break
    return distances


def _winding_along(
    mesh: TensorMesh,
    axis: int,
    origin: Tensor,
    spacing: Tensor,
    shape: tuple[int, int, int],
    progress: Callable[[int], None] = lambda pairs: None,
) -> Tensor:
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
    ends = counts.prod(1).cumsum(0)
    total = int(ends[-1])
    for begin in range(0, total, PAIRS_AT_ONCE):
        triangle, line = _pairs(first, counts, ends, begin, min(begin + PAIRS_AT_ONCE, total))
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
        progress(len(triangle))
    return crossed[..., :-1].cumsum(-1).movedim(-1, axis)


def inside(
    mesh: TensorMesh,
    origin: Tensor,
    spacing: Tensor,
    shape: tuple[int, int, int],
    *,
    progress: Callable[[int], None] = lambda pairs: None,
) -> Tensor:
    """True at lattice points inside the mesh, bool [shape]. `progress` as in `distance`."""
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    volume = (torch.linalg.cross(a, b) * c).sum()
    orientation = torch.where(volume < 0, -1, 1)
    votes = [(_winding_along(mesh, axis, origin, spacing, shape, progress) * orientation) > 0 for axis in range(3)]
    return torch.stack(votes).sum(0) >= 2


def signed_distance(
    mesh: TensorMesh,
    origin: Tensor,
    spacing: Tensor,
    shape: tuple[int, int, int],
    limit: float,
    *,
    progress: Callable[[int], None] = lambda pairs: None,
) -> Tensor:
    """Signed distance at origin + spacing (i, j, k) [shape], positive inside, in [-limit, limit].

    As exact as `distance`, which has `progress` too; the calls add up to about `count_pairs`.
    """
    unsigned = distance(mesh, origin, spacing, shape, limit, progress=progress)
    return torch.where(inside(mesh, origin, spacing, shape, progress=progress), unsigned, -unsigned)
