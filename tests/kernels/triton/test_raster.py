"""Kernels of rasterisation, interpolation and antialiasing: decisions, values and gradients against fp64."""

import math
import random

import pytest
import torch

from dream_fast.bench.accuracy import check, check_fp64
from dream_fast.bench.ops.inputs import ball
from dream_fast.kernels import (
    Fragments,
    antialias,
    antialias_reference,
    interpolate,
    interpolate_reference,
    opposite_corners,
    rasterize,
    rasterize_reference,
)
from dream_fast.kernels._core.launch import INTERPRETED
from dream_fast.kernels.mesh import rasterize as rasterize_module

NEAR, FAR = 0.1, 20.0
FEW = 1e-3  # of the pixels, on which fp32 and fp64 may disagree about an edge


@pytest.fixture
def classes(monkeypatch):
    """classes(small, tile, large) sets up to which size a lane, and a program, draws a triangle."""
    config = rasterize_module._rasterize_config

    def use(small, tile, large, programs=4):
        changed = {"small": small, "tile": tile, "large": large, "programs": programs}
        monkeypatch.setattr(rasterize_module, "_rasterize_config", lambda device: config(device)._replace(**changed))

    return use


@pytest.fixture(autouse=True)
def quick(classes):
    """The interpreter takes as long for one pixel as for a thousand."""
    if INTERPRETED:
        classes(4, 8, 4)


def project(points, fov=60.0):
    """Points [..., 3] before a camera at the origin that looks along -z -> clip [..., 4]."""
    tangent = math.tan(math.radians(fov / 2))
    x, y, z = points.unbind(-1)
    return torch.stack(
        [x / tangent, y / tangent, -(FAR + NEAR) / (FAR - NEAR) * z - 2 * FAR * NEAR / (FAR - NEAR), -z], -1
    )


def soup(triangles, device, *, batch=1, size=0.4, seed=0):
    """Clip positions [batch, 3 T, 4] and faces of triangles of all kinds, some of them partly behind the camera."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(batch, triangles, 1, 3, generator=generator) * 2 - 1
    centre[..., 2] -= 1.5
    spread = size * 4 ** torch.randn(batch, triangles, 1, 1, generator=generator)
    points = centre + spread * torch.randn(batch, triangles, 3, 3, generator=generator)
    return project(points.flatten(1, 2)).to(device), torch.arange(3 * triangles, device=device).view(-1, 3)


def surface(side, device, *, batch=1, seed=0):
    """A closed, bumpy surface of 4 side^2 triangles: clip positions [batch, V, 4] and faces."""
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.meshgrid(torch.arange(2 * side), torch.arange(side + 1), indexing="ij")
    azimuth, polar = u * (math.pi / side), v * (math.pi / side)
    unit = torch.stack([polar.sin() * azimuth.cos(), polar.cos(), polar.sin() * azimuth.sin()], -1).view(-1, 3)
    radius = 0.5 + 0.1 * torch.rand(batch, len(unit), 1, generator=generator)
    points = radius * unit + torch.tensor([0, 0, -1.8])

    def number(i, j):
        return i % (2 * side) * (side + 1) + j

    i, j = u[:, :-1].reshape(-1), v[:, :-1].reshape(-1)
    a, b, c, d = number(i, j), number(i + 1, j), number(i, j + 1), number(i + 1, j + 1)
    faces = torch.cat([torch.stack([a, b, c], 1), torch.stack([b, d, c], 1)])
    return project(points, 45.0).to(device), faces.to(device)


def compare_raster(clip, faces, height, width):
    """Fragments of the kernels, and the gradient of their barycentrics."""
    runs = ((rasterize, None), (rasterize_reference, None), (rasterize_reference, torch.float64))
    leaves, results = [], []
    for run, dtype in runs:
        leaves.append(clip.detach().clone().to(dtype or clip.dtype).requires_grad_())
        results.append(run(leaves[-1], faces, height, width))
    got, single, exact = results
    agree = (got.triangle == exact.triangle) & (single.triangle == exact.triangle)
    assert (~agree).double().mean() <= FEW if agree.numel() else True
    assert torch.equal((got.triangle < 0).float() * 2 - 1, torch.where(got.triangle < 0, got.depth, -1.0))
    for name in ("barycentrics", "depth"):
        parts = [getattr(fragments, name)[agree].detach() for fragments in results]
        check(name, *parts[:2], parts[2])
        assert not got.barycentrics[got.triangle < 0].any()
    # Single precision is not accurate where the corners of a triangle are almost in a line with the camera.
    upstream = torch.randn(got.barycentrics.shape, generator=torch.Generator().manual_seed(1)).to(clip.device)
    upstream *= agree[..., None] & (exact.barycentrics.abs().amin(-1, keepdim=True) > 1e-3)
    grads = [
        torch.autograd.grad(fragments.barycentrics, leaf, upstream.to(leaf.dtype))[0]
        for fragments, leaf in zip(results, leaves, strict=True)
    ]
    check("gradient of clip", *grads)
    return Fragments(*(part.detach() for part in got))


@pytest.mark.parametrize("triangles", [0, 1, 31, 33])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 16), (3, 12, 7)])
def test_mesh_small_shapes(triangles, shape, device, deterministic):
    """Small images and few triangles, and none at all, match the reference."""
    batch, height, width = shape
    clip, faces = soup(triangles, device, batch=batch)
    fragments = compare_raster(clip, faces, height, width)
    assert fragments.triangle.shape == shape
    channels = torch.rand(clip.shape[1], 2, device=device)
    compare_interpolate(channels, faces, fragments)
    compare_antialias(torch.rand(*shape, 2, device=device), clip, faces, fragments)


@pytest.mark.parametrize("batch", [0, 2])
def test_mesh_empty_batch_and_int32(batch, device, deterministic):
    """A batch without images, and int32 faces, match the reference."""
    clip, faces = soup(5, device, batch=batch)
    fragments = compare_raster(clip, faces.int(), 8, 8)
    assert interpolate(torch.rand(15, 3, device=device), faces.int(), fragments).shape == (batch, 8, 8, 3)
    assert torch.equal(fragments.triangle, rasterize(clip, faces, 8, 8).triangle)


@pytest.mark.parametrize(("small", "tile", "large"), [(1000, 8, 1), (0, 8, 1000), (0, 4, 0), (4, 4, 3)])
def test_rasterize_classes(small, tile, large, device, classes, deterministic):
    """Results do not depend on whether a lane, a program or all programs draw a triangle."""
    clip, faces = soup(9, device, batch=2, seed=3)
    classes(small, tile, large, programs=3)
    fragments = compare_raster(clip, faces, 16, 12)
    classes(16, 8, 4)
    again = rasterize(clip, faces, 16, 12)
    assert all(torch.equal(a, b) for a, b in zip(fragments, again, strict=True))
    assert (fragments.triangle >= 0).sum() > 20


@pytest.mark.fuzz(interpreted=3, gpu=100)
def test_mesh_random_settings(seed, device):
    """Random meshes, sizes and channels match the reference."""
    rng = random.Random(seed)
    max_side = 24 if INTERPRETED else 700
    height, width, batch = rng.randint(1, max_side), rng.randint(1, max_side), rng.choice([1, 2, 3])
    if seed % 2:
        clip, faces = soup(rng.randint(1, 30 if INTERPRETED else 5000), device, batch=batch, seed=seed)
    else:
        clip, faces = surface(rng.randint(2, 4 if INTERPRETED else 150), device, batch=batch, seed=seed)
    fragments = compare_raster(clip, faces, height, width)
    compare_interpolate(torch.randn(clip.shape[1], rng.choice([1, 3, 5]), device=device), faces, fragments)
    image = torch.rand(batch, height, width, rng.choice([1, 4, 9]), device=device)
    compare_antialias(image, clip, faces, fragments)


def test_rasterize_ties(device, classes):
    """The first of equally near triangles is visible, whichever kernel draws it."""
    corners = torch.tensor([[-1.0, 1, 0, 1], [1, 1, 0, 1], [-1, -1, 0, 1], [1, -1, 0, 1]], device=device)
    faces = torch.tensor([[0, 3, 1], [2, 1, 0], [0, 1, 2], [1, 2, 3], [2, 0, 1], [3, 2, 1]], device=device)
    for small in (0, 100):
        classes(small, 8, 1)
        for order in ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]):
            covered = rasterize(corners[None], faces[order], 8, 8).triangle[0]
            assert torch.equal(covered.cpu(), rasterize_reference(corners[None], faces[order], 8, 8).triangle[0].cpu())
            assert set(covered.flatten().tolist()) == ({0, 2} if order[0] == 1 else {0, 1})


def test_rasterize_nothing(device):
    """Triangles that are clipped, behind, degenerate or not finite are not seen and have no gradient."""
    corners = torch.tensor([[-1.0, 1, 0, 1], [1, 1, 0, 1], [-1, -1, 0, 1]], device=device)
    for change in (
        torch.tensor([1, 1, 1, -1.0]),  # behind the camera
        torch.tensor([1, 0, 1, 1.0]),  # without area
        torch.tensor([0, 0, 0, 0.0]),
        torch.tensor([1, 1, 1, math.nan]),
        torch.tensor([math.inf, 1, 1, 1]),
    ):
        leaf = (corners * change.to(device))[None].requires_grad_()
        fragments = rasterize(leaf, torch.tensor([[0, 1, 2]], device=device), 8, 8)
        assert (fragments.triangle == -1).all()
        fragments.barycentrics.sum().backward()
        assert not leaf.grad.any()
    for shift in ([2.5, 0, 0, 0], [0, 2.5, 0, 0], [0, 0, 1.1, 0], [0, 0, -1.1, 0]):  # beside, above, behind, before
        fragments = rasterize(
            (corners + torch.tensor(shift, device=device))[None], torch.arange(3).view(1, 3).to(device), 8, 8
        )
        assert (fragments.triangle == -1).all()


def test_rasterize_no_holes(device):
    """A closed surface of small triangles has no holes."""
    clip, faces = surface(4 if INTERPRETED else 300, device)
    size = 20 if INTERPRETED else 1000
    covered = rasterize(clip, faces, size, size).triangle[0] >= 0
    inside = rasterize_reference(clip.double(), faces, size, size).triangle[0] >= 0
    # Holes: pixels that are covered in fp64 only.
    assert (covered != inside).double().mean() <= FEW and (inside & ~covered).sum() <= 2


def compare_interpolate(attributes, faces, fragments):
    """Values and both gradients of the kernels."""
    upstream = torch.randn(*fragments.triangle.shape, attributes.shape[-1], generator=torch.Generator().manual_seed(2))
    results = []
    for run, dtype in ((interpolate, None), (interpolate_reference, None), (interpolate_reference, torch.float64)):
        values = attributes.detach().clone().to(dtype or attributes.dtype).requires_grad_()
        weights = fragments.barycentrics.detach().clone().to(dtype or torch.float32).requires_grad_()
        out = run(values, faces, fragments._replace(barycentrics=weights))
        assert out.dtype == values.dtype
        grads = torch.autograd.grad(out, (values, weights), upstream.to(out.device, out.dtype))
        results.append((out.detach(), *grads))
    for name, *parts in zip(("values", "gradient of attributes", "gradient of barycentrics"), *results, strict=True):
        check(name, *parts)
    return results[0]


@pytest.mark.parametrize("channels", [0, 1, 3, 4, 18])
@pytest.mark.parametrize("per_image", [False, True])
def test_mesh_channels(channels, per_image, device, deterministic):
    """Numbers of channels around the size of a group match the reference."""
    clip, faces = surface(2, device, batch=2)
    fragments = rasterize(clip, faces, 8, 9)
    shape = (2, clip.shape[1], channels) if per_image else (clip.shape[1], channels)
    compare_interpolate(torch.randn(shape, device=device), faces, fragments)
    if not per_image:
        compare_antialias(torch.rand(2, 8, 9, channels, device=device), clip, faces, fragments)


def test_mesh_batch_gradients(device):
    """A triangle that fills two images has its own gradients in each."""
    corners = torch.tensor([[-2.0, -2, 0, 1], [6, -2, 0.1, 1.5], [-2, 6, 0.2, 1]], device=device)
    clip, faces = torch.stack([corners, 1.25 * corners]), torch.tensor([[0, 1, 2]], device=device)
    fragments = compare_raster(clip, faces, 4, 4)
    assert (fragments.triangle == 0).all()
    compare_interpolate(torch.randn(2, 3, 2, device=device), faces, fragments)


def test_mesh_half_precision(device):
    """Half-precision attributes and images match the reference."""
    clip, faces = surface(2, device)
    fragments = rasterize(clip, faces, 12, 12)
    compare_interpolate(torch.randn(clip.shape[1], 3, device=device).half(), faces, fragments)
    compare_antialias(torch.rand(1, 12, 12, 3, device=device).half(), clip, faces, fragments)


def test_mesh_needed_gradients(device):
    """Each gradient is computed also if no other is needed."""
    clip, faces = surface(2, device)
    fragments = rasterize(clip, faces, 8, 8)
    values = torch.randn(clip.shape[1], 3, device=device, requires_grad=True)
    interpolate(values, faces, fragments).sum().backward()
    assert values.grad.any() and not fragments.depth.requires_grad
    leaf = clip.clone().requires_grad_()
    leaf_fragments = rasterize(leaf, faces, 8, 8)
    interpolate(values.detach(), faces, leaf_fragments).square().sum().backward()
    assert leaf.grad.any() and not leaf.grad[..., 2].any()
    image = torch.rand(1, 8, 8, 3, device=device, requires_grad=True)
    antialias(image, clip, faces, fragments).sum().backward()
    assert image.grad.any()


def compare_antialias(image, clip, faces, fragments):
    """Values and both gradients of the kernels, with the same fragments for all."""
    opposite = opposite_corners(faces)
    upstream = torch.randn(image.shape, generator=torch.Generator().manual_seed(3))
    results = []
    for run, dtype in ((antialias, None), (antialias_reference, None), (antialias_reference, torch.float64)):
        colours = image.detach().clone().to(dtype or image.dtype).requires_grad_()
        leaf = clip.detach().clone().to(dtype or clip.dtype).requires_grad_()
        out = run(colours, leaf, faces, fragments, opposite)
        assert out.dtype == colours.dtype
        grads = torch.autograd.grad(out, (colours, leaf), upstream.to(out.device, out.dtype), allow_unused=True)
        grads = [torch.zeros_like(leaf) if grad is None else grad for grad in grads]
        results.append((out.detach(), *grads))
    for name, *parts in zip(("image", "gradient of image", "gradient of clip"), *results, strict=True):
        check(name, *parts)
    # A pixel changes by at most half of the difference to a neighbour.
    bounds = torch.zeros_like(image, dtype=torch.float64)
    for axis in (1, 2):
        half = image.double().diff(dim=axis).abs() / 2
        length = half.shape[axis]
        bounds.narrow(axis, 0, length).add_(half)
        bounds.narrow(axis, 1, length).add_(half)
    changes = (results[2][0] - image.double()).abs()
    check_fp64("changes", torch.minimum(changes, bounds), changes)
    return results[0]


def test_antialias_degenerate_triangles(device):
    """At the poles of this ball all vertices are one; one of them lies at the rim."""
    clip, faces, _ = ball("1k", device)
    fragments = rasterize(clip, faces, 48, 48)
    stripes = (torch.arange(48, device=device) % 2).float().expand(1, 48, 48)
    compare_antialias(torch.stack([stripes, stripes.mT], -1), clip, faces, fragments)


def test_antialias_edge_halfway(device):
    """v = 0: nothing is blended yet, and still the edge has a gradient."""
    clip = torch.tensor([[0.0, -2, 0, 1], [0, 2, 0, 1], [-2, 0, 0, 1]], device=device)[None]
    faces = torch.tensor([[0, 1, 2]], device=device)
    fragments = rasterize(clip, faces, 4, 4)
    image = torch.rand(1, 4, 4, 2, device=device)
    out, _, grad = compare_antialias(image, clip, faces, fragments)
    check("image", out, image, image.double())
    assert (grad[0, :2, 0] != 0).all()


@pytest.mark.parametrize("size", [2, 5])
def test_antialias_silhouettes(size, device, deterministic):
    """Silhouettes are blended and have gradients, as in the reference."""
    clip, faces = surface(size, device)
    fragments = rasterize(clip, faces, 20, 22)
    image = torch.rand(1, 20, 22, 3, device=device)
    out, _, grad = compare_antialias(image, clip, faces, fragments)
    assert (out != image).any(-1).sum() > 12 and grad.any(-1).sum() > 6


def test_mesh_deterministic(device):
    """Under torch's deterministic algorithms the sums repeat bit for bit, and are what they are without.

    Without, a sum of atomics differs from repeat to repeat: twice that is allowed.
    """
    side, size = (2, 10) if INTERPRETED else (100, 400)
    clip, faces = surface(side, device)
    channels = torch.randn(clip.shape[1], 3, device=device)

    def gradients():
        leaf, values = clip.clone().requires_grad_(), channels.clone().requires_grad_()
        leaf_fragments = rasterize(leaf, faces, size, size)
        antialias(interpolate(values, faces, leaf_fragments), leaf, faces, leaf_fragments).square().sum().backward()
        return leaf.grad, values.grad

    plain, repeated = gradients(), gradients()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, *others = [gradients() for _ in range(2 if INTERPRETED else 4)]
    finally:
        torch.use_deterministic_algorithms(False)
    for a, again, sums in zip(first, repeated, plain, strict=True):
        check("sums", a, again, sums.double())
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_mesh_non_contiguous(device):
    """Strided inputs give the results of contiguous ones."""
    clip, faces = surface(2, device)
    wide, columns = torch.cat([clip, clip], -1)[..., ::2][..., :4], faces.t().contiguous().t()
    wide = torch.cat([clip[..., None], clip[..., None]], -1)[..., 0]
    assert not wide.is_contiguous() and not columns.is_contiguous()
    fragments, dense = rasterize(wide, columns, 8, 8), rasterize(clip, faces, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(fragments, dense, strict=True))
    values = torch.rand(3, clip.shape[1], device=device).t()
    strange = Fragments(*(part.transpose(1, 2).contiguous().transpose(1, 2) for part in fragments))
    image = interpolate(values, columns, strange)
    assert torch.equal(image, interpolate(values.contiguous(), faces, dense))
    smooth = antialias(image.transpose(1, 2).contiguous().transpose(1, 2), wide, columns, strange)
    assert torch.equal(smooth, antialias(image, clip, faces, dense))
    leaf = clip.clone().requires_grad_()
    rasterize(leaf, faces, 8, 8).barycentrics[..., 0].sum().backward()  # an expanded upstream gradient
    other = clip.clone().requires_grad_()
    upstream = torch.zeros(1, 8, 8, 3, device=device)
    upstream[..., 0] = 1
    rasterize(other, faces, 8, 8).barycentrics.backward(upstream)
    assert torch.equal(leaf.grad, other.grad)


def test_rasterize_refuses_fp64(device):
    """The kernels refuse fp64, which only the reference computes in."""
    clip, faces = surface(2, device)
    with pytest.raises(TypeError, match="clip is float64, which the kernels do not compute in"):
        rasterize(clip.double(), faces, 8, 8)


def step(clip, faces, values, upstream):
    leaf, values = clip.detach().requires_grad_(), values.detach().requires_grad_()
    leaf_fragments = rasterize(leaf, faces, 512, 512)
    image = antialias(interpolate(values, faces, leaf_fragments), leaf, faces, leaf_fragments)
    return [leaf_fragments.triangle, image.detach(), *torch.autograd.grad(image, [leaf, values], upstream)]


@pytest.mark.full_size("host synchronisations, graphs and streams exist only there")
def test_mesh_stream_and_graph(device, everywhere):
    """Results are the same on another stream and from a CUDA graph, without a synchronisation."""
    clip, faces = surface(100, device)
    values = torch.rand(clip.shape[1], 3, device=device)
    upstream = torch.randn(1, 512, 512, 3, device=device)
    arguments = (clip, faces, values, upstream)
    expected, repeats = everywhere(lambda: step(*arguments))
    again = step(*arguments)
    for repeat in repeats:
        assert torch.equal(repeat[0], expected[0]) and torch.equal(repeat[1], expected[1])
        for a, b, c in zip(repeat[2:], again[2:], expected[2:], strict=True):  # sums in any order
            check("sums", a, b, c.double())


@pytest.mark.full_size("two million triangles in 2048 x 2048 pixels")
def test_mesh_full_size(device):
    """Two million triangles match the reference and repeat."""
    clip, faces = surface(708, device)
    assert faces.shape[0] > 2_000_000
    fragments = compare_raster(clip, faces, 2048, 2048)
    compare_interpolate(torch.rand(clip.shape[1], 3, device=device), faces, fragments)
    assert (fragments.triangle >= 0).sum() > 1_000_000
    for _ in range(3):
        assert torch.equal(rasterize(clip, faces, 2048, 2048).triangle, fragments.triangle)
