"""PNG files: the six views, and several images side by side."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.render.base import RenderedImages, Renderer
from dream_fast.engine.scene.camera import SIX_VIEWS, six_views, turntable
from dream_fast.engine.workspace.atomic import atomic_write

PNG_LEVEL = 4  # of zlib; its default, 6, takes up to twice the time for at most 3 % fewer bytes


def to_uint8(image: Tensor) -> np.ndarray:
    """Values in [0, 1], any shape, as rounded uint8 on the host."""
    return (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def save_png(path: Path, image: Tensor | np.ndarray, texts: Mapping[str, str] | None = None) -> None:
    """Write [H, W, 3] or [H, W], uint8 or a tensor in [0, 1]; `texts` are stored in the file as well."""
    pixels = to_uint8(image) if isinstance(image, Tensor) else image
    info = PngInfo()
    for name, text in (texts or {}).items():
        info.add_text(name, text)
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, pnginfo=info, compress_level=PNG_LEVEL)


def save_grid(path: Path, images: Tensor, texts: Mapping[str, str] | None = None) -> None:
    """Write [rows, columns, H, W, 3] in [0, 1] as one PNG."""
    save_png(path, np.concatenate([concatenate_images(row) for row in to_uint8(images)], axis=0), texts)


def normal_image(view: RenderedImages) -> Tensor:
    """World normals as colours [..., 3] in [0, 1], white where the image is empty."""
    opacity = view.opacity[..., None]
    return opacity * (view.normal + 1) / 2 + (1 - opacity)


def depth_image(view: RenderedImages, radius: Tensor, bound: float) -> Tensor:
    """Depth of B images as brightness [B, H, W, 3]: white at the near side of the scene's sphere, black at the far one.

    Empty pixels are black. The range depends on the camera's distance `radius` [B] alone, so a video does not flicker.
    """
    sphere = bound * 3**0.5
    expected = view.depth / view.opacity.clamp(min=1e-6)
    brightness = 0.5 - (expected - radius.view(-1, 1, 1)) / (2 * sphere)
    return (brightness.clamp(0, 1) * view.opacity)[..., None].expand(*view.depth.shape, 3)


def concatenate_images(images: Iterable[np.ndarray]) -> np.ndarray:
    """Images [H, W, 3] of one height side by side."""
    return np.concatenate(list(images), axis=1)


def six_view_paths(folder: Path) -> list[Path]:
    """The files <name>.png and <name>_normal.png of SIX_VIEWS, and six_views.png with all of them."""
    names = [f"{name}{suffix}" for suffix in ("", "_normal") for name in SIX_VIEWS]
    return [Path(folder) / f"{name}.png" for name in [*names, "six_views"]]


def write_six_views(folder: Path, renderer: Renderer, config: CameraConfig) -> list[Path]:
    """Write the files of `six_view_paths`; returns their paths."""
    cameras = six_views(config, renderer.field.device)
    view = renderer.view(cameras, config.H, config.W)
    colours, normals = to_uint8(view.rgb), to_uint8(normal_image(view))
    images = [*colours, *normals, np.concatenate([concatenate_images(colours), concatenate_images(normals)], axis=0)]
    paths = six_view_paths(folder)
    for path, image in zip(paths, images, strict=True):
        save_png(path, image)
    return paths


def write_validation(
    path: Path,
    renderer: Renderer,
    config: CameraConfig,
    count: int,
    on_view: Callable[[], None] = lambda: None,
) -> None:
    """Write `count` views around the object as one image: colours above, normals below.

    `on_view` is called before each view.
    """
    colours, normals = [], []
    for camera in turntable(config, count, renderer.field.device).split():
        on_view()
        view = renderer.view(camera, config.H, config.W)
        colours.append(to_uint8(view.rgb)[0])
        normals.append(to_uint8(normal_image(view))[0])
    save_png(path, np.concatenate([concatenate_images(colours), concatenate_images(normals)], axis=0))
