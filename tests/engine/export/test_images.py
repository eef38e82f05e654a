"""Images: colours of normals and depths, strips and grids, names of the views, interpolated values."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from dream_fast.bench.accuracy import check, check_fp64
from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.export import images
from dream_fast.engine.geometry.voxels import trilinear
from dream_fast.engine.scene.camera import SIX_VIEWS


def numbered(*shape):
    return np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)


def read(path):
    with Image.open(path) as image:
        return np.asarray(image), dict(image.text)


def test_to_uint8():
    """Values are rounded to the nearest of 256, from any float dtype and with a gradient."""
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 127 / 255, 1.0, 7.0], requires_grad=True)
    pixels = images.to_uint8(values)
    assert pixels.dtype == np.uint8 and pixels.tolist() == [0, 0, 0, 1, 127, 255, 255]
    assert images.to_uint8(torch.ones(2, 3, dtype=torch.float16)).tolist() == [[255] * 3] * 2


def test_save_png(tmp_path):
    """Arrays are written as they are, tensors as uint8, with texts."""
    for number, pixels in enumerate((numbered(2, 3), numbered(2, 3, 3))):
        images.save_png(tmp_path / f"{number}.png", pixels, {"t": "1 2", "prompt": "a"})
        found, texts = read(tmp_path / f"{number}.png")
        assert np.array_equal(found, pixels) and texts == {"t": "1 2", "prompt": "a"}
    images.save_png(tmp_path / "t.png", torch.full((2, 2, 3), 0.5))
    found, texts = read(tmp_path / "t.png")
    assert (found == 128).all() and found.shape == (2, 2, 3) and texts == {}


def test_save_grid(tmp_path):
    """Columns go from left to right, rows from top to bottom, with texts."""
    grid = numbered(2, 3, 1, 2, 3)
    images.save_grid(tmp_path / "g.png", torch.from_numpy(grid) / 255, {"t": "5"})
    pixels, texts = read(tmp_path / "g.png")
    rows = [np.concatenate(list(row), axis=1) for row in grid]
    assert np.array_equal(pixels, np.concatenate(rows, axis=0)) and texts == {"t": "5"}


def test_normal_image():
    """Normals are (n + 1) / 2 by opacity, over white."""
    normal = torch.tensor([[1.0, -1.0, 0.0]]).double().repeat(3, 1)
    view = SimpleNamespace(normal=normal, opacity=torch.tensor([1.0, 0.5, 0.0]).double())
    check_fp64("colours", images.normal_image(view), torch.tensor([[1, 0, 0.5], [1, 0.5, 0.75], [1, 1, 1]]).double())


def test_depth_image():
    """The sphere has the radius bound * sqrt(3); depths beyond it are clamped, and opacity darkens."""
    reach = 2 * 3**0.5
    expected = torch.tensor([[-2.0, -1, 0, 0.5], [1, 2, 0, 0]]).double()
    opacity = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0.5, 0]]).double()
    radius = torch.tensor([4.0, 6.0]).double()
    depth = (radius.view(2, 1, 1) + reach * expected) * opacity
    pixels = images.depth_image(SimpleNamespace(depth=depth, opacity=opacity.expand(2, 2, 4)), radius, 2.0)
    exact = torch.tensor([[1.0, 1, 0.5, 0.25], [0, 0, 0.25, 0]]).double()
    assert pixels.shape == (2, 2, 4, 3)
    check_fp64("brightness", pixels, exact[..., None].expand(2, 2, 4, 3))


def test_six_view_paths(tmp_path):
    """Colours come first, then normals, then all of them in two rows of six."""
    views = [f"{name}.png" for name in SIX_VIEWS] + [f"{name}_normal.png" for name in SIX_VIEWS]
    assert images.six_view_paths(tmp_path) == [tmp_path / name for name in [*views, "six_views.png"]]
    rgb, normal = torch.rand(2, 6, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    view, calls = SimpleNamespace(rgb=rgb, normal=normal, opacity=torch.ones(6, 2, 4)), []

    def render(cameras, height, width):
        calls.append((len(cameras.radius), height, width))
        if len(cameras.radius) == 6:
            return view
        one = slice(len(calls) - 2, len(calls) - 1)  # after the call with all six
        return SimpleNamespace(rgb=rgb[one], normal=normal[one], opacity=view.opacity[one])

    renderer = SimpleNamespace(field=SimpleNamespace(device=torch.device("cpu")), view=render)
    paths = images.write_six_views(tmp_path / "new", renderer, CameraConfig(H=2, W=4))
    assert calls == [(6, 2, 4)] and paths == images.six_view_paths(tmp_path / "new")
    colours, normals = images.to_uint8(rgb), images.to_uint8(images.normal_image(view))
    for path, pixels in zip(paths[:-1], [*colours, *normals], strict=True):
        assert np.array_equal(read(path)[0], pixels)
    together = np.concatenate([np.concatenate(list(row), axis=1) for row in (colours, normals)])
    assert np.array_equal(read(paths[-1])[0], together)
    images.write_validation(tmp_path / "v.png", renderer, CameraConfig(H=2, W=4), 6)
    assert calls[1:] == [(1, 2, 4)] * 6 and np.array_equal(read(tmp_path / "v.png")[0], together)


def test_trilinear():
    """A linear function is exact between the points, and the nearest value is used outside."""
    bound, axis = 2.0, torch.linspace(-2.0, 2.0, 5).double()
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = 6 * torch.rand(4, 20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 3
    inside = points.clamp(-bound, bound)
    exact = inside @ torch.tensor([1.0, 10, 100]).double()
    values = trilinear(x + 10 * y + 100 * z, bound, points)
    assert values.shape == (4, 20)
    check_fp64("values", values, exact)
    single = trilinear((x + 10 * y + 100 * z).float(), bound, points.float())
    check("single", single, (inside.float() * torch.tensor([1.0, 10, 100])).sum(-1), exact)
