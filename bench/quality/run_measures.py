"""Measures of a finished run: shape, colour, the mesh, and a strip of images."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dream_fast.bench.finished_run import load_finished
from dream_fast.bench.pipeline.mesh_export import SAMPLE_FACTOR, compare_with_field, read_glb, render_normals
from dream_fast.bench.quality.measures import SOLID, edge_ratio, edge_width, floaters, part_color, roughness
from dream_fast.bench.quality.protocol import SHAPE_SIZE, sides
from dream_fast.bench.quality.world import make_palette
from dream_fast.engine.config.schema import Config
from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.export.images import to_uint8
from dream_fast.engine.export.mesh_files import write_mesh
from dream_fast.engine.export.silhouette import render_silhouettes
from dream_fast.engine.scene.camera import Cameras, six_views, turntable
from dream_fast.engine.training.trainer import Trainer

STRIP = 512  # pixels of an image of the strip
STRIP_VIEWS = (1, 5)  # of the eight azimuths around the object: from the front's right, from behind on the left


@torch.no_grad()
def measure_shape(trainer: Trainer) -> dict[str, float | None]:
    """Measure shape from four sides, of the averaged weights, without cleaning: the names in `run.SHAPE`."""
    black = torch.zeros(3, device=trainer.device)
    with trainer.optimizer.ema_weights():
        view = trainer.renderer.view(sides(trainer.device), SHAPE_SIZE, SHAPE_SIZE, background=black)
    return {
        "roughness_deg": roughness(view.normal, view.opacity),
        "edge_ratio": edge_ratio(view.opacity),
        "edge_width": edge_width(view.opacity),
        "floaters": floaters(view.opacity),
    }


def measure_color(images: Tensor, prompt: str, background: float) -> list[float]:
    """Median colour [3] of the part that the prompt colours, in images [V, 3, H, W] over a gray background.

    A pixel belongs to the part whose colour in the world is nearest, or to the background.
    """
    palette = torch.cat([make_palette(prompt), torch.full((1, 3), background, dtype=torch.float64)])
    return part_color(images.permute(0, 2, 3, 1).reshape(-1, 3).double(), palette).tolist()


@torch.no_grad()
def write_strip(trainer: Trainer, path: Path, camera: CameraConfig) -> None:
    """Two views of 512 x 512 pixels, in colour and as normals, side by side."""
    gray = torch.full((3,), 0.75, device=trainer.device)
    around = turntable(camera, 8, trainer.device)
    chosen = Cameras(*(part[list(STRIP_VIEWS)] for part in around))
    with trainer.optimizer.ema_weights():
        view = trainer.renderer.view(chosen, STRIP, STRIP, background=gray)
    normal = torch.where(view.opacity[..., None] > SOLID, view.normal / 2 + 0.5, 1.0)
    images = torch.stack([view.rgb, normal], 1).flatten(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_uint8(torch.cat(list(images), 1))).save(path, quality=90)


def measure_mesh(config: Config, workspace: Path, folder: Path, size: int = 256) -> dict[str, float | None]:
    """Measure the mesh of a finished run.

    mesh_psnr in dB and mesh_iou compare it with the field, in the worst of six views; mesh_roughness_deg is that of
    the normals that a viewer interpolates.
    """
    output, glb = config.output, folder / "mesh.glb"
    finer = config.override({"max_steps": SAMPLE_FACTOR * config.render.max_steps})
    trainer = load_finished(finer, workspace)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), trainer.optimizer.ema_weights(), trainer.renderer.without_floaters():
        cameras = six_views(config.camera, trainer.device)
        write_mesh(
            glb,
            trainer.field,
            output.mcubes_resolution,
            config.render.density_thresh,
            silhouettes=render_silhouettes(trainer.renderer, cameras),
            decimate_target=output.decimate_target,
            texture_resolution=output.texture_resolution,
        )
        mesh = read_glb(glb, trainer.device)
        likeness = compare_with_field(trainer.renderer, mesh, cameras, size)
        normal, covered = render_normals(mesh, sides(trainer.device), SHAPE_SIZE)
    return {
        "mesh_psnr": min(likeness.psnr),
        "mesh_iou": min(likeness.iou),
        "mesh_roughness_deg": roughness(normal, covered.float()),
    }


def round_values(values: Mapping[str, object], digits: int = 4) -> dict[str, Any]:
    """Round numbers, also those in lists; None where one is not finite."""

    def one(value: object) -> object:
        if isinstance(value, float):
            return round(value, digits) if math.isfinite(value) else None
        return [one(item) for item in value] if isinstance(value, list) else value

    return {name: one(value) for name, value in values.items()}
