"""Meshes of finished runs beside their fields: six views of each, and how long the export takes.

`python -m dream_fast.bench mesh WORKSPACE [WORKSPACE ...]`.

The mesh is read from its GLB file as any program would read it, rasterised with its texture, and compared with the
field as it renders: intersection over union of the two silhouettes (of the field: where a ray is more than half
opaque), and PSNR where both are seen, of the field's colours without what shines through from behind; once more where
the field is opaque (19 parts of 20), since what is translucent no surface can show. Wanted: 0.95, and 25 dB.
The field's rays take more samples than in the run, whose noise is none of the mesh's.
"""

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import trimesh
from torch import Tensor
from torch.nn import functional as F

from dream_fast import kernels
from dream_fast.bench.finished_run import load_finished
from dream_fast.engine.export.images import save_grid
from dream_fast.engine.export.mesh_files import STAGE_ENDS, write_mesh
from dream_fast.engine.export.silhouette import render_silhouettes
from dream_fast.engine.render.base import Renderer
from dream_fast.engine.scene.camera import SIX_VIEWS, Cameras, clip_positions, six_views
from dream_fast.engine.workspace.folder import Workspace

NEAR = 0.1
OPAQUE = 0.95
FINER = 4  # times the samples of a ray


class Textured(NamedTuple):
    """A mesh as its file has it."""

    vertices: Tensor  # [V, 3]
    faces: Tensor  # [T, 3]
    uv: Tensor  # [V, 2], v up
    picture: Tensor  # [R, R, 3] in [0, 1]


def read_glb(path: Path, device: torch.device | str = "cpu") -> Textured:
    (shape,) = trimesh.load_scene(path, process=False).geometry.values()
    picture = np.asarray(shape.visual.material.baseColorTexture.convert("RGB"))
    parts = (np.asarray(shape.vertices), np.asarray(shape.faces), np.asarray(shape.visual.uv), picture / 255)
    kinds = (torch.float32, torch.int32, torch.float32, torch.float32)
    return Textured(*(torch.from_numpy(part).to(device, kind) for part, kind in zip(parts, kinds, strict=True)))


def draw(mesh: Textured, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """Colours [B, size, size, 3] before white, and where the mesh is seen [B, size, size]."""
    seen = kernels.rasterize(clip_positions(cameras, mesh.vertices, size, size, NEAR), mesh.faces, size, size)
    uv = kernels.interpolate(mesh.uv, mesh.faces, seen)
    # Row 0 of the picture is v = 1.
    places = torch.stack([2 * uv[..., 0] - 1, 1 - 2 * uv[..., 1]], dim=-1)
    picture = mesh.picture.permute(2, 0, 1).expand(len(uv), -1, -1, -1)
    colours = F.grid_sample(picture, places, mode="bilinear", padding_mode="border", align_corners=False)
    covered = seen.triangle >= 0
    return torch.where(covered[..., None], colours.permute(0, 2, 3, 1), 1.0), covered


class Likeness(NamedTuple):
    """How a mesh looks beside its field, a number a view of SIX_VIEWS, and both as pictures."""

    psnr: list[float]  # dB, where both are seen
    opaque_psnr: list[float]  # dB, of that where the field is opaque
    iou: list[float]
    pictures: Tensor  # [2, 6, size, size, 3]: the field, the mesh


@torch.no_grad()
def compare(renderer: Renderer, mesh: Textured, cameras: Cameras, size: int) -> Likeness:
    """The field and its mesh in albedo before white."""
    black = torch.zeros(3, device=mesh.vertices.device)
    view = renderer.view(cameras, size, size, background=black, normals=False)
    own = view.rgb / view.opacity[..., None].clamp(min=1e-6)
    colours, covered = draw(mesh, cameras, size)
    solid, error = view.opacity > 0.5, (own - colours).square().mean(-1)
    iou = ((solid & covered).sum((1, 2)) / (solid | covered).sum((1, 2)).clamp(min=1)).tolist()

    def psnr(where: Tensor) -> list[float]:
        errors = (error * where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)
        return [-10 * math.log10(max(e, 1e-10)) for e in errors.tolist()]

    opaque = covered & (view.opacity > OPAQUE)
    before_white = view.rgb + 1 - view.opacity[..., None]
    return Likeness(psnr(solid & covered), psnr(opaque), iou, torch.stack([before_white, colours]))


def seconds_of(start: float, told: list[tuple[float, float]]) -> dict[str, float]:
    """How long each part of the export took, from the moments at which `write_mesh` told how far it was."""
    ends = [max(moment for part, moment in told if part < end + 1e-6) for end in (*STAGE_ENDS, 1.0)]
    parts = zip(("volume", "surface", "atlas", "pictures", "files"), pairwise([start, *ends]), strict=True)
    return {name: round(after - before, 2) for name, (before, after) in parts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench mesh", description=__doc__.split("\n\n")[0])
    parser.add_argument("workspaces", nargs="+", type=Path, metavar="WORKSPACE", help="of a finished run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=256, help="of the views, pixels")
    parser.add_argument("--mcubes_resolution", type=int, default=256)
    parser.add_argument("--decimate_target", type=int, default=50_000)
    parser.add_argument("--texture_resolution", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("meshes"), help="folder for the meshes and pictures")
    args = parser.parse_args(argv)
    rows = []
    for path in args.workspaces:
        stored = Workspace(path).stored_config()
        assert stored is not None, f"{path} is no workspace"
        looking = {"device": args.device, "workspace": str(path), "test": True}
        config = stored.override(looking | {"max_steps": FINER * stored.render.max_steps})
        trainer = load_finished(config, path)
        glb = args.out / path.name / "mesh.glb"
        with trainer.optimizer.ema_weights(), trainer.renderer.without_floaters():
            cameras = six_views(config.camera, trainer.device)
            start = time.perf_counter()
            told: list[tuple[float, float]] = []

            def note(part: float, told: list[tuple[float, float]] = told) -> None:
                told.append((part, time.perf_counter()))

            surface = write_mesh(
                glb,
                trainer.field,
                args.mcubes_resolution,
                config.render.density_thresh,
                silhouettes=render_silhouettes(trainer.renderer, cameras),
                decimate_target=args.decimate_target,
                texture_resolution=args.texture_resolution,
                progress=note,
            )
            seconds = time.perf_counter() - start
            found = compare(trainer.renderer, read_glb(glb, trainer.device), cameras, args.size)
        save_grid(glb.with_name("views.png"), found.pictures)
        row = {"workspace": path.name, "seconds": round(seconds, 2), "faces": len(surface.faces)}
        row["seconds_of"] = seconds_of(start, told)
        for name, digits in (("psnr", 2), ("opaque_psnr", 2), ("iou", 4)):
            row[name] = dict(zip(SIX_VIEWS, (round(x, digits) for x in getattr(found, name)), strict=True))
        rows.append(row)
        print(
            f"{path.name:24} {row['faces']} faces in {seconds:.1f} s "
            f"({', '.join(f'{name} {part:.1f}' for name, part in row['seconds_of'].items())}); worst of six views: "
            f"PSNR {min(found.psnr):.1f} dB ({min(found.opaque_psnr):.1f} dB where the field is opaque), "
            f"IoU {min(found.iou):.3f}; {glb.with_name('views.png')}"
        )
    print(json.dumps({"device": args.device, "meshes": rows}))
    return 0
