"""Rasterisation, interpolation and antialiasing: against rays, by hand, and gradients against finite differences."""

import math

import pytest
import torch
import trimesh

from dream_fast.bench.accuracy import check_fp64
from dream_fast.kernels import antialias, interpolate, opposite_corners, rasterize

NEAR, FAR = 0.1, 20.0


def project(points, fov=40.0, aspect=1.0):
    """Points [..., 3] in front of a camera at the origin that looks along -z -> clip [..., 4]."""
    tangent = math.tan(math.radians(fov / 2))
    x, y, z = points.unbind(-1)
    return torch.stack(
        [x / (tangent * aspect), y / tangent, -(FAR + NEAR) / (FAR - NEAR) * z - 2 * FAR * NEAR / (FAR - NEAR), -z], -1
    )


def flat(*points, dtype=torch.float64):
    """Clip positions [1, V, 4] of corners in pixels from the top left of an image of 8 x 8, and depth."""
    x, y, z = torch.tensor(points, dtype=dtype).unbind(1)
    return torch.stack([x / 4 - 1, 1 - y / 4, z, torch.ones_like(x)], 1)[None]


def soup(triangles, seed=0, dtype=torch.float64, size=0.6):
    """Triangles in front of the camera, some of them partly behind it."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(triangles, 1, 3, generator=generator, dtype=dtype) * 2 - 1
    centre[..., 2] -= 1.5
    points = centre + size * torch.randn(triangles, 3, 3, generator=generator, dtype=dtype)
    return points.view(-1, 3), torch.arange(3 * triangles).view(-1, 3)


def ball(subdivisions=2, radius=0.5, dtype=torch.float64):
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    points = torch.tensor(mesh.vertices, dtype=dtype)
    points[:, 2] -= 2.2
    return points, torch.tensor(mesh.faces)


def by_rays(points, faces, height, width, fov, aspect):
    """The nearest triangle of each pixel, by intersecting rays (Moeller and Trumbore, 1997), and its barycentrics."""
    tangent = math.tan(math.radians(fov / 2))
    y = (1 - (2 * torch.arange(height, dtype=torch.float64) + 1) / height) * tangent
    x = ((2 * torch.arange(width, dtype=torch.float64) + 1) / width - 1) * tangent * aspect
    y, x = torch.meshgrid(y, x, indexing="ij")
    d = torch.stack([x, y, -torch.ones_like(x)], -1).view(-1, 1, 3)
    a, b, c = points[faces].unbind(1)
    e, f = (b - a)[None], (c - a)[None]
    p = torch.linalg.cross(d, f)
    det = (e * p).sum(-1)
    u = (-a[None] * p).sum(-1) / det
    q = torch.linalg.cross((-a)[None], e)
    v = (d * q).sum(-1) / det
    t = (f * q).sum(-1) / det  # also z, since d has z = -1
    hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (t >= NEAR) & (t <= FAR)
    nearest, which = torch.where(hit, t, math.inf).min(1)
    covered = torch.isfinite(nearest)
    weights = torch.stack([1 - u - v, u, v], -1).gather(1, which[:, None, None].expand(-1, 1, 3))[:, 0]
    shape = (height, width)
    return torch.where(covered, which, -1).view(shape), torch.where(covered[:, None], weights, 0).view(*shape, 3)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (13, 30)])
@pytest.mark.parametrize("size", [0.05, 0.6, 3.0])  # of the triangles; the largest reach behind the camera
def test_rasterize_definition(height, width, size):
    """Triangles, barycentrics and depths match ray casting."""
    points, faces = soup(400 if size < 0.1 else 40, size=size)
    clip = project(points, 60.0, width / height)[None]
    fragments = rasterize(clip, faces.int(), height, width)
    triangle, weights = by_rays(points, faces, height, width, 60.0, width / height)
    ahead = points[faces][..., 2] < 0
    assert (ahead.any(1) & ~ahead.all(1)).any() == (size > 0.1)
    assert torch.equal(fragments.triangle[0].long(), triangle) and (triangle >= 0).sum() > 10
    check_fp64("barycentrics", fragments.barycentrics[0], weights)
    positions = (fragments.barycentrics[0, ..., None] * points[faces[triangle]]).sum(2)  # [H, W, 3]
    z = project(positions)
    covered = triangle >= 0
    check_fp64("depth", fragments.depth[0][covered], (z[..., 2] / z[..., 3])[covered])
    assert (fragments.depth[0][~covered] == 1).all()


def test_rasterize_axes():
    """Rows go down and columns to the right."""
    clip = flat((5, 1, 0), (7.9, 1, 0), (5, 3, 0))
    covered = rasterize(clip, torch.tensor([[0, 1, 2]]), 8, 8).triangle[0] == 0
    assert covered.nonzero().tolist() == [[1, 5], [1, 6], [2, 5]]


def test_rasterize_ties():
    """The first of equally near triangles is visible, from both sides."""
    clip = flat((0, 0, 0), (8, 0, 0), (0, 8, 0), (8, 8, 0))
    faces = torch.tensor([[1, 2, 0], [0, 1, 2], [2, 1, 3], [1, 2, 3]])
    covered = rasterize(clip, faces, 8, 8).triangle[0]
    # The diagonal belongs to both: the first of them.
    assert torch.equal(covered, torch.where(torch.arange(8)[:, None] + torch.arange(8) <= 7, 0, 2).int())
    assert torch.equal(rasterize(clip, faces[[2, 1]], 8, 8).triangle[0].diagonal(), torch.tensor([1] * 4 + [0] * 4))
    assert (rasterize(clip, faces[[2, 1]], 8, 8).triangle[0].flip(1).diagonal() == 0).all()


def test_rasterize_nothing():
    """Triangles that are clipped, behind, beside, degenerate or not finite are not seen."""
    corners = [(0, 0, 0), (8, 0, 0), (0, 8, 0)]
    behind = flat(*corners) * torch.tensor([1, 1, 1, -1.0])
    for clip in (
        flat(*[(x, y, 1.01) for x, y, _ in corners]),  # beyond the far plane
        flat(*[(x, y, -1.01) for x, y, _ in corners]),  # before the near plane
        flat(*[(x + 9, y, 0) for x, y, _ in corners]),  # beside the image
        behind,
        flat((0, 0, 0), (4, 4, 0), (8, 8, 0)),  # without area
        flat((1, 1, 0), (1, 1, 0), (1, 1, 0)),
        flat((1.6, 1.6, 0), (2.4, 1.6, 0), (1.6, 2.4, 0)),  # between the centres
        torch.full((1, 3, 4), math.nan),
        torch.zeros(1, 3, 4),
    ):
        fragments = rasterize(clip, torch.tensor([[0, 1, 2]]), 8, 8)
        assert (fragments.triangle == -1).all() and not fragments.barycentrics.any()


@pytest.mark.parametrize(("batch", "faces"), [(0, 1), (1, 0), (2, 0)])
def test_mesh_empty(batch, faces):
    """No images and no triangles give empty or zero results."""
    clip = torch.zeros(batch, 3, 4, requires_grad=True)
    mesh = torch.arange(3).expand(faces, 3)
    fragments = rasterize(clip, mesh, 5, 6)
    image = antialias(interpolate(torch.ones(3, 2), mesh, fragments), clip, mesh, fragments)
    assert image.shape == (batch, 5, 6, 2) and not image.any()
    image.sum().backward()
    assert not clip.grad.any()


def test_rasterize_no_holes():
    """A closed surface has no holes, also at pixels on edges, with triangles far smaller and far larger than pixels."""
    for subdivisions, size in ((0, 200), (5, 32), (3, 120)):
        points, faces = ball(subdivisions, dtype=torch.float32)
        covered = rasterize(project(points)[None], faces, size, size).triangle[0] >= 0
        for line in (*covered, *covered.T):  # a ball is convex
            (at,) = line.nonzero(as_tuple=True)
            assert len(at) == 0 or len(at) == at[-1] - at[0] + 1


def test_mesh_batch():
    """Every image of a batch has its own vertices and attributes."""
    points, faces = ball()
    two = torch.stack([project(points), project(points * 0.7)])
    fragments = rasterize(two, faces, 20, 20)
    for number in range(2):
        alone = rasterize(two[number : number + 1], faces, 20, 20)
        assert all(torch.equal(a[number], b[0]) for a, b in zip(fragments, alone, strict=True))
    attributes = torch.stack([points, points + 1])
    values = interpolate(attributes, faces, fragments)
    for number in range(2):
        part = type(fragments)(*(value[number : number + 1] for value in fragments))
        check_fp64("attributes", values[number], interpolate(attributes[number], faces, part)[0])


def test_interpolate_perspective():
    """Interpolated positions project to the centres of their pixels."""
    points, faces = ball()
    clip = project(points)[None]
    fragments = rasterize(clip, faces, 32, 32)
    positions = interpolate(points, faces, fragments)[0]
    covered = fragments.triangle[0] >= 0
    again = project(positions[covered])
    row, column = covered.nonzero(as_tuple=True)
    check_fp64("x", again[:, 0] / again[:, 3], (2.0 * column.double() + 1) / 32 - 1)
    check_fp64("y", again[:, 1] / again[:, 3], 1 - (2 * row.double() + 1) / 32)
    assert not positions[~covered].any()


def test_interpolate_gradients():
    """Gradients of values and clip positions match finite differences in fp64."""
    points, faces = soup(5, seed=3)
    clip = project(points, 70.0)[None].requires_grad_()
    values = torch.randn(len(points), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = rasterize(clip, faces, 9, 9).triangle

    def image(clip, values):
        fragments = rasterize(clip, faces, 9, 9)
        assert torch.equal(fragments.triangle, before)  # else the differences are not of one function
        return interpolate(values, faces, fragments)

    assert torch.autograd.gradcheck(image, (clip, values.requires_grad_()), eps=1e-7)
    assert not clip.grad_fn and (before >= 0).sum() > 20


def test_opposite_corners():
    """Opposite corners match a search by hand; edges shared by more than two triangles have none."""
    faces = torch.tensor([[0, 1, 2], [2, 1, 3], [0, 4, 5]])
    assert opposite_corners(faces).tolist() == [[5, -1, -1], [-1, -1, 0], [-1, -1, -1]]
    # Three triangles on one edge, a triangle twice, no triangle.
    fan = torch.tensor([[0, 1, 2], [0, 1, 3], [1, 0, 4]])
    assert (opposite_corners(fan) == -1).all()
    assert opposite_corners(faces[[0, 0]]).tolist() == [[3, 4, 5], [0, 1, 2]]
    assert opposite_corners(faces[:0].int()).shape == (0, 3)
    _, closed = ball()
    opposite = opposite_corners(closed)
    by_hand = {}
    for number, triangle in enumerate(closed.tolist()):
        for k in range(3):
            by_hand.setdefault(frozenset(triangle[:k] + triangle[k + 1 :]), set()).add(3 * number + k)
    for number, (triangle, opposites) in enumerate(zip(closed.tolist(), opposite.tolist(), strict=True)):
        for k in range(3):
            assert by_hand[frozenset(triangle[:k] + triangle[k + 1 :])] == {3 * number + k, opposites[k]}


def rectangle(left, top, right, bottom):
    """A white rectangle's clip positions and faces, in pixels of an image of 8 x 8."""
    one = torch.zeros_like(left)
    corners = [(left, top), (right, top), (left, bottom), (right, bottom)]
    x = torch.stack([x for x, _ in corners])
    y = torch.stack([y for _, y in corners])
    clip = torch.stack([x / 4 - 1, 1 - y / 4, one.expand(4), one.expand(4) + 1], 1)
    return clip[None], torch.tensor([[0, 1, 2], [2, 1, 3]])


def coverage(clip, faces, size=8):
    fragments = rasterize(clip, faces, size, size)
    return antialias((fragments.triangle >= 0)[..., None].to(clip.dtype), clip, faces, fragments)[0, ..., 0]


def test_antialias_coverage():
    """Away from corners the image of a rectangle is the part of each pixel that it covers; so are its gradients."""
    sides = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.3, 2.8, 6.6, 7.45)]
    image = coverage(*rectangle(*sides))
    row = torch.tensor([0, 0.7, 1, 1, 1, 1, 0.6, 0], dtype=torch.float64)
    column = torch.tensor([0, 0, 0.2, 1, 1, 1, 1, 0.45], dtype=torch.float64)
    check_fp64("row", image[5].detach(), row)
    check_fp64("column", image[:, 4].detach(), column)
    for line, grads in ((image[5], (-1, 0, 1, 0)), (image[:, 4], (0, -1, 0, 1))):
        side_grads = torch.autograd.grad(line.sum(), sides, retain_graph=True)
        assert [round(g.item(), 9) for g in side_grads] == list(grads)


def test_antialias_silhouettes_only():
    """Only silhouettes are blended: not the inside of a ball, but where one surface hides another."""
    points, faces = ball(3)
    clip = project(points)[None]
    fragments = rasterize(clip, faces, 24, 24)
    colours = torch.rand(1, 24, 24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = (antialias(colours, clip, faces, fragments) != colours).any(-1)[0]
    covered = fragments.triangle[0] >= 0
    neighbours = torch.nn.functional.max_pool2d(torch.stack([covered, ~covered]).double(), 3, 1, 1).bool()
    border = neighbours[0] & neighbours[1]
    assert not changed[~border].any() and changed[border].double().mean() > 0.25
    # A small ball in front of it.
    small = points * 0.3 + torch.tensor([0, 0, -0.8])
    both, mesh = torch.cat([points, small]), torch.cat([faces, faces + len(points)])
    clip = project(both)[None]
    fragments = rasterize(clip, mesh, 24, 24)
    changed = (antialias(colours, clip, mesh, fragments) != colours).any(-1)[0]
    front = fragments.triangle[0] >= len(faces)
    assert front.any() and changed[~border].sum() > 8


def test_antialias_gradients():
    """Gradients of image and clip positions match finite differences in fp64."""
    points, faces = ball(1)
    points = points + 0.013 * torch.randn(points.shape, generator=torch.Generator().manual_seed(3)).double()
    clip = project(points)[None].requires_grad_()
    fragments = rasterize(clip.detach(), faces, 12, 12)
    image = torch.rand(1, 12, 12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, c: antialias(i, c, faces, fragments), (image, clip), eps=1e-7)


def test_antialias_area_gradient():
    """The gradient of a silhouette is that of the area which it encloses: 2 pi r for a growing disc of radius r."""
    points, faces = ball(4)
    centre = torch.tensor([0, 0, -2.2], dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    size = 128
    image = coverage(project((points - centre) * scale + centre)[None], faces, size)
    (grad,) = torch.autograd.grad(image.sum(), scale)
    distance, radius = 2.2, 0.5
    # The edge of a ball's image is at an angle of asin(r / d).
    pixels = size / 2 / math.tan(math.radians(20))
    edge = radius / math.sqrt(distance**2 - radius**2) * pixels
    slope = pixels * radius * distance**2 / (distance**2 - radius**2) ** 1.5
    assert image.sum().item() == pytest.approx(math.pi * edge**2, rel=3e-3)
    assert grad.item() == pytest.approx(2 * math.pi * edge * slope, rel=0.03)


def test_mesh_half_precision():
    """Results have the dtype of half-precision attributes."""
    points, faces = ball(dtype=torch.float32)
    clip = project(points)[None]
    fragments = rasterize(clip, faces, 12, 12)
    assert interpolate(points.half(), faces, fragments).dtype == torch.float16
    assert antialias(interpolate(points.half(), faces, fragments), clip, faces, fragments).dtype == torch.float16


def test_mesh_repeats():
    """Repeats are equal bit for bit."""
    points, faces = ball(4, dtype=torch.float32)
    clip = project(points)[None]

    def gradients():
        leaf = clip.clone().requires_grad_()
        fragments = rasterize(leaf, faces, 64, 64)
        antialias(interpolate(points, faces, fragments), leaf, faces, fragments).square().sum().backward()
        return leaf.grad

    assert torch.equal(gradients(), gradients())


def test_mesh_bad_arguments():
    """Errors name the argument and both values."""
    points, faces = ball()
    clip = project(points)[None]
    fragments = rasterize(clip, faces, 8, 8)
    with pytest.raises(ValueError, match=r"clip must have shape \[B, V, 4\], got \[1, 162, 3\]"):
        rasterize(clip[..., :3], faces, 8, 8)
    with pytest.raises(TypeError, match="clip must be float32 or float64, got float16"):
        rasterize(clip.half(), faces, 8, 8)
    with pytest.raises(TypeError, match="faces must be int32 or int64, got float32"):
        rasterize(clip, faces.float(), 8, 8)
    with pytest.raises(ValueError, match="height must be greater than 0, got 0"):
        rasterize(clip, faces, 0, 8)
    with pytest.raises(ValueError, match=r"attributes must have shape \[1, V, C\], got \[2, 162, 3\]"):
        interpolate(points.expand(2, -1, -1), faces, fragments)
    with pytest.raises(ValueError, match=r"image must have shape \[1, 8, 8, C\], got \[1, 8, 9, 3\]"):
        antialias(torch.zeros(1, 8, 9, 3), clip, faces, fragments)
    with pytest.raises(ValueError, match=r"opposite must have shape \[320, 3\], got \[3, 3\]"):
        antialias(torch.zeros(1, 8, 8, 3), clip, faces, fragments, faces[:3])
