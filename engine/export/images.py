"""PNG pictures: the six views and strips of pictures beside one another."""

from collections.abc import Iterable, Mapping
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

PNG_LEVEL = 4  # of zlib; its default, 6, takes more time, of large pictures twice as much, for 3 % fewer bytes at most


def to_uint8(image: Tensor) -> np.ndarray:
    """Values in [0, 1], any shape, as rounded uint8 on the host."""
    return (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def save_png(path: Path, image: Tensor | np.ndarray, texts: Mapping[str, str] | None = None) -> None:
    """Write [H, W, 3] or [H, W], uint8 or a tensor in [0, 1]; `texts` go into the file beside the picture."""
    pixels = to_uint8(image) if isinstance(image, Tensor) else image
    info = PngInfo()
    for name, text in (texts or {}).items():
        info.add_text(name, text)
    with atomic_write(path) as aside:
        Image.fromarray(pixels).save(aside, pnginfo=info, compress_level=PNG_LEVEL)


def save_grid(path: Path, images: Tensor, texts: Mapping[str, str] | None = None) -> None:
    """Write [rows, columns, H, W, 3] in [0, 1] as one PNG."""
    save_png(path, np.concatenate([strip(row) for row in to_uint8(images)], axis=0), texts)


def normal_image(view: RenderedImages) -> Tensor:
    """World normals as colours, [..., 3] in [0, 1], white where nothing is."""
    opacity = view.opacity[..., None]
    return opacity * (view.normal + 1) / 2 + (1 - opacity)


def depth_image(view: RenderedImages, radius: Tensor, bound: float) -> Tensor:
    """Depth of B views as brightness [B, H, W, 3]: white at the near side of the scene's sphere, black at the far side
    and where nothing is. The range follows from the camera's distance `radius` [B] alone, so a video does not flicker.
    """
    reach = bound * 3**0.5
    expected = view.depth / view.opacity.clamp(min=1e-6)
    brightness = 0.5 - (expected - radius.view(-1, 1, 1)) / (2 * reach)
    return (brightness.clamp(0, 1) * view.opacity)[..., None].expand(*view.depth.shape, 3)


def strip(images: Iterable[np.ndarray]) -> np.ndarray:
    """Pictures [H, W, 3] of one height side by side."""
    return np.concatenate(list(images), axis=1)


def six_view_paths(folder: Path) -> list[Path]:
    """<name>.png of each of SIX_VIEWS, <name>_normal.png of each, and six_views.png with all."""
    names = [f"{name}{suffix}" for suffix in ("", "_normal") for name in SIX_VIEWS]
    return [Path(folder) / f"{name}.png" for name in [*names, "six_views"]]


def write_six_views(folder: Path, renderer: Renderer, config: CameraConfig) -> list[Path]:
    """Write the files of `six_view_paths`; returns their paths."""
    cameras = six_views(config, renderer.field.device)
    view = renderer.view(cameras, config.H, config.W)
    colours, normals = to_uint8(view.rgb), to_uint8(normal_image(view))
    pictures = [*colours, *normals, np.concatenate([strip(colours), strip(normals)], axis=0)]
    paths = six_view_paths(folder)
    for path, picture in zip(paths, pictures, strict=True):
        save_png(path, picture)
    return paths


def write_validation(path: Path, renderer: Renderer, config: CameraConfig, count: int) -> None:
    """Write `count` views around the object as one picture: colours above, normals below."""
    view = renderer.view(turntable(config, count, renderer.field.device), config.H, config.W)
    save_png(path, np.concatenate([strip(to_uint8(view.rgb)), strip(to_uint8(normal_image(view)))], axis=0))
