"""Measures of the look of a result, on shapes and colours with known results and on worse ones."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from skimage import color as skimage_color

from dream_fast.bench.accuracy import check_fp64
from dream_fast.bench.pipeline.mesh_export import TexturedMesh, render_normals
from dream_fast.bench.quality import run_measures
from dream_fast.bench.quality.measures import delta_e, edge_ratio, edge_width, floaters, kid, lab, part_color, roughness
from dream_fast.bench.quality.protocol import sides
from dream_fast.engine.render.base import RenderedImages

SIZE = 128


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of pixel centres, from the middle of the image."""
    at = torch.arange(SIZE) + 0.5 - SIZE / 2
    return torch.meshgrid(at, at, indexing="ij")


def sphere(radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Normals [1, H, W, 3] and opacity [1, H, W] of a sphere seen from far away."""
    y, x = grid()
    squared = (x * x + y * y) / radius**2
    normal = torch.stack([x / radius, -y / radius, (1 - squared).clamp(min=0).sqrt()], -1)
    return normal[None], (squared < 1).float()[None]


def noisy(normal: torch.Tensor, degrees: float) -> torch.Tensor:
    """Normals, each turned by a random angle of about this size in degrees."""
    noise = torch.randn(normal.shape, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(normal + math.tan(math.radians(degrees)) * noise / math.sqrt(2), dim=-1)


def test_roughness_of_plane_and_sphere() -> None:
    """A plane has 0; a sphere less the larger it is; pixels outside do not count."""
    normal, opacity = sphere(55)
    flat = torch.zeros_like(normal)
    flat[..., 2] = 3.0  # of any length
    assert roughness(flat, opacity) == 0
    small, large = roughness(*sphere(25)), roughness(normal, opacity)
    assert 0 < large < small < 1
    assert roughness(torch.where(opacity[..., None] > 0, normal, 7.0), opacity) == large
    assert roughness(normal, torch.zeros_like(opacity)) is None


def test_roughness_of_noise() -> None:
    """Noise of a known angle is measured: a pixel is one of the nine of its mean, hence 8/9."""
    normal, opacity = sphere(55)
    flat = torch.zeros_like(normal)
    flat[..., 2] = 1.0
    # Two tangent components of deviation s each: the angle to the mean has the mean s sqrt(pi / 2) sqrt(8 / 9).
    deviation = 2.0 / math.sqrt(2)
    expected = deviation * math.sqrt(math.pi / 2) * math.sqrt(8 / 9)
    result = roughness(noisy(flat, 2.0), opacity)
    pixels = (opacity > 0).sum().item()
    assert abs(result / expected - 1) < 5 / math.sqrt(pixels)  # of the sampling, five deviations at least
    assert roughness(noisy(normal, 20.0), opacity) > 10 * roughness(normal, opacity)


def test_roughness_of_an_edge() -> None:
    """At the edge of two orthogonal planes two columns are off by atan(3/6), all others by 0."""
    normal = torch.zeros(1, SIZE, SIZE, 3)
    normal[:, :, : SIZE // 2, 0], normal[:, :, SIZE // 2 :, 2] = 1, 1
    inner = SIZE - 4  # two pixels at each side are left out
    expected = math.degrees(math.atan2(3, 6)) * 2 / inner
    assert roughness(normal, torch.ones(1, SIZE, SIZE)) == pytest.approx(expected)


def test_edge_ratio_of_fur() -> None:
    """A disc and a square have 1; each hair of one pixel adds two sides a row."""
    y, x = grid()
    disc = (x * x + y * y < 40**2).float()[None]
    assert edge_ratio(disc) == pytest.approx(1, abs=0.05)
    square = ((x.abs() < 30) & (y.abs() < 30)).float()[None]
    furry = square.clone()
    hairs = slice(SIZE // 2 - 20, SIZE // 2 + 20, 2)
    furry[0, hairs, SIZE // 2 + 30 : SIZE // 2 + 40] = 1
    assert edge_ratio(furry) - edge_ratio(square) == pytest.approx(20 * 2 * 10 / (4 * 60), rel=0.1)
    assert edge_ratio(square) < 1.1
    assert edge_ratio(torch.zeros(1, 8, 8)) is None
    assert edge_ratio(torch.ones(1, 40, 40)) < 1.1  # cut off by the image's border


def test_edge_width_of_a_ramp() -> None:
    """A straight edge with a ramp of so many pixels; nothing for a solid object, None without one."""
    solid = torch.zeros(2, 40, 60)
    solid[:, :, 30:] = 1.0
    assert edge_width(solid) == 0
    ramped = solid.clone()
    ramped[:, :, 26:34] = torch.linspace(0.0, 1.0, 10)[1:-1]  # 1/9 to 8/9: all eight are partial
    length = 2 * (40 + 2 * 30 + 40)  # of the rest beyond the edge, the image's border included
    assert edge_width(ramped) == 2 * 40 * 8 / length
    assert edge_width(torch.zeros(1, 4, 4)) is None


def test_floaters_in_views() -> None:
    """Groups other than the largest count, with eight neighbours; a spiral is one group."""
    opacity = torch.zeros(3, 40, 40)
    opacity[0, 5:20, 5:20] = 1
    opacity[0, 30, 30], opacity[0, 31, 31], opacity[0, 2, 35] = 1, 1, 0.6  # two that touch, and one
    opacity[0, 35, 5] = 0.4  # too faint
    opacity[1, ::4] = 1
    opacity[1, :, 0] = 1  # a comb
    assert floaters(opacity) == pytest.approx(2 / 3)
    assert floaters(opacity[1:]) == 0


def test_delta_e_against_skimage() -> None:
    """CIEDE2000 of random colours, grays and pairs whose hues lie on both sides of 0."""
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 4000, 3))
    first[:200] = first[:200, :1]  # gray
    second[100:300] = second[100:300, :1]
    second[300:600] = np.clip(first[300:600] + rng.normal(0, 0.01, (300, 3)), 0, 1)
    result = delta_e(torch.from_numpy(first), torch.from_numpy(second)).numpy()
    # From our L*a*b*: the hue of a gray is rounding alone.
    both = (lab(torch.from_numpy(colors)).numpy() for colors in (first, second))
    assert result == pytest.approx(skimage_color.deltaE_ciede2000(*both))
    # Near black skimage has the rounded constants of an older text.
    bright = first[(first > 0.1).all(1)]
    check_fp64("lab", lab(torch.from_numpy(bright)), torch.from_numpy(skimage_color.rgb2lab(bright)))
    almost_black = torch.full((3,), 0.01)
    assert lab(almost_black)[0].item() == pytest.approx(903.2963 * 0.01 / 12.92)
    black, white = torch.zeros(3).double(), torch.ones(3).double()
    check_fp64("black and white", delta_e(black, white), torch.tensor(100.0).double())
    assert delta_e(white, white).item() == 0


def test_part_color() -> None:
    """The result is the median of the red pixels, among white and black ones."""
    palette = torch.tensor([[0.85, 0.1, 0.1], [0.94, 0.94, 0.93], [0.14, 0.14, 0.16]])
    reds = torch.tensor([[0.7, 0.1, 0.1], [0.72, 0.1, 0.1], [0.74, 0.1, 0.1]])
    others = palette[1:].repeat_interleave(10, 0)
    assert torch.equal(part_color(torch.cat([others, reds]), palette), reds[1])
    assert torch.equal(part_color(palette[1:2].expand(3, 3), palette), palette[1])  # nothing is red: of all


def test_kid_definition() -> None:
    """It equals its definition over pairs; it is about 0 for two draws of one distribution and grows with their
    distance."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(7, 3, generator=generator), torch.randn(5, 3, generator=generator) + 1

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return (float(x.double() @ y.double()) / 3 + 1) ** 3

    by_pairs = (
        sum(k(x, y) for i, x in enumerate(first) for j, y in enumerate(first) if i != j) / 42
        + sum(k(x, y) for i, x in enumerate(second) for j, y in enumerate(second) if i != j) / 20
        - 2 * sum(k(x, y) for x in first for y in second) / 35
    )
    assert kid(first, second) == pytest.approx(by_pairs)
    a, b = torch.randn(2, 400, 8, generator=generator)
    assert abs(kid(a, b)) < kid(a, b + 0.3) / 5 < kid(a, b + 1.0) / 5


# ------------------------------------------------------------------------------------------------------- of a whole run


def test_measure_shape() -> None:
    """Roughness, edge ratio and floaters are those of renders from front, right, back and left over black."""
    entered = []

    @contextmanager
    def ema_weights():
        entered.append(True)
        yield

    def view(cameras, height, width, background):
        assert entered and height == width == run_measures.SHAPE_SIZE and not background.any()
        assert cameras.azimuth.tolist() == [0, 90, -180, -90] and (cameras.polar == 90).all()
        normal, opacity = (part.expand(4, *part.shape[1:]) for part in sphere(50))
        return RenderedImages(torch.zeros_like(normal), normal, torch.zeros_like(opacity), opacity)

    trainer = SimpleNamespace(
        device="cpu", optimizer=SimpleNamespace(ema_weights=ema_weights), renderer=SimpleNamespace(view=view)
    )
    result = run_measures.measure_shape(trainer)
    assert result["roughness_deg"] == pytest.approx(roughness(*sphere(50)))
    assert result["edge_width"] == 0
    assert result["floaters"] == 0 and result["edge_ratio"] == pytest.approx(1, abs=0.05)


def test_mesh_normals() -> None:
    """A sphere's normals point away from its centre, between vertices too, and are as smooth as the sphere's own."""
    sphere_mesh = trimesh.creation.icosphere(subdivisions=5, radius=0.5)
    corners = torch.tensor(np.asarray(sphere_mesh.vertices)).float()
    faces = torch.tensor(np.asarray(sphere_mesh.faces)).int()
    smooth = TexturedMesh(corners, faces, corners / 0.5, corners[:, :2], torch.zeros(2, 2, 3))
    normal, covered = render_normals(smooth, sides("cpu"), SIZE)
    for number, axis in enumerate(([0.0, 0, 1], [1.0, 0, 0], [0.0, 0, -1], [-1.0, 0, 0])):
        middle = normal[number, SIZE // 2, SIZE // 2]
        assert (middle @ torch.tensor(axis)).item() > 0.999
    rough = smooth._replace(normals=noisy(smooth.normals, 20.0))
    assert roughness(normal, covered.float()) < 1.5 < roughness(*render_normals(rough, sides("cpu"), SIZE))


def test_measure_color() -> None:
    """The result is the red of a robot, though most of the image is background and much of the robot is not red."""
    images = torch.full((2, 3, 16, 16), 0.75)
    images[:, :, 4:12, 4:12] = torch.tensor([0.15, 0.80, 0.82])[:, None, None]
    images[:, :, 8:12, 4:12] = torch.tensor([0.9, 0.05, 0.05])[:, None, None]
    result = run_measures.measure_color(images, "a red robot", 0.75)
    check_fp64("red", torch.tensor(result).double(), torch.tensor([0.9, 0.05, 0.05]).double())
