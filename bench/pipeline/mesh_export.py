"""Compare meshes of finished runs with their fields in six views, and time the export.

`python -m dream_fast.bench mesh WORKSPACE [WORKSPACE ...]`.

The mesh is read from its GLB file, rasterised with its texture, and compared with renders of the field. Targets are in
the last column.

    iou           of the silhouettes; the field's is where a ray is more than half opaque            0.95
    psnr          of colours where both silhouettes are, the field's without its background         25 dB
    opaque_psnr   the same where the field's opacity exceeds 0.95: a surface cannot be translucent

The field's rays take more samples than in the run, so that their noise is not attributed to the mesh.
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
SAMPLE_FACTOR = 4  # times the samples of a ray


class TexturedMesh(NamedTuple):
    """The mesh of a GLB file."""

    vertices: Tensor  # [V, 3]
    faces: Tensor  # [T, 3]
    normals: Tensor  # [V, 3] unit
    uv: Tensor  # [V, 2], v up
    texture: Tensor  # [R, R, 3] in [0, 1]


def read_glb(path: Path, device: torch.device | str = "cpu") -> TexturedMesh:
    """Read a GLB file with one mesh and one texture."""
    (shape,) = trimesh.load_scene(path, process=False).geometry.values()
    texture = np.asarray(shape.visual.material.baseColorTexture.convert("RGB"))
    parts = (shape.vertices, shape.faces, shape.vertex_normals, shape.visual.uv, texture / 255)
    kinds = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float32)
    return TexturedMesh(*(torch.tensor(np.asarray(p)).to(device, kind) for p, kind in zip(parts, kinds, strict=True)))


def render_mesh(mesh: TexturedMesh, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """Colours [B, size, size, 3] over white, and the silhouette [B, size, size]."""
    fragments = kernels.rasterize(clip_positions(cameras, mesh.vertices, size, size, NEAR), mesh.faces, size, size)
    uv = kernels.interpolate(mesh.uv, mesh.faces, fragments)
    # Row 0 of the texture is v = 1.
    places = torch.stack([2 * uv[..., 0] - 1, 1 - 2 * uv[..., 1]], dim=-1)
    texture = mesh.texture.permute(2, 0, 1).expand(len(uv), -1, -1, -1)
    colours = F.grid_sample(texture, places, mode="bilinear", padding_mode="border", align_corners=False)
    covered = fragments.triangle >= 0
    return torch.where(covered[..., None], colours.permute(0, 2, 3, 1), 1.0), covered


def render_normals(mesh: TexturedMesh, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """Normals [B, size, size, 3], interpolated between vertices, and the silhouette [B, size, size]."""
    fragments = kernels.rasterize(clip_positions(cameras, mesh.vertices, size, size, NEAR), mesh.faces, size, size)
    return kernels.interpolate(mesh.normals, mesh.faces, fragments), fragments.triangle >= 0


class Likeness(NamedTuple):
    """Agreement of a mesh with its field, a number for each of SIX_VIEWS, and images of both."""

    psnr: list[float]  # dB, where both silhouettes are
    opaque_psnr: list[float]  # dB, where the field is opaque as well
    iou: list[float]
    images: Tensor  # [2, 6, size, size, 3]: the field, the mesh


@torch.no_grad()
def compare_with_field(renderer: Renderer, mesh: TexturedMesh, cameras: Cameras, size: int) -> Likeness:
    """Compare a field with its mesh, both in albedo over white."""
    black = torch.zeros(3, device=mesh.vertices.device)
    view = renderer.view(cameras, size, size, background=black, normals=False)
    albedo = view.rgb / view.opacity[..., None].clamp(min=1e-6)
    colours, covered = render_mesh(mesh, cameras, size)
    solid, error = view.opacity > 0.5, (albedo - colours).square().mean(-1)
    iou = ((solid & covered).sum((1, 2)) / (solid | covered).sum((1, 2)).clamp(min=1)).tolist()

    def psnr(where: Tensor) -> list[float]:
        errors = (error * where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)
        return [-10 * math.log10(max(e, 1e-10)) for e in errors.tolist()]

    opaque = covered & (view.opacity > OPAQUE)
    over_white = view.rgb + 1 - view.opacity[..., None]
    return Likeness(psnr(solid & covered), psnr(opaque), iou, torch.stack([over_white, colours]))


def split_seconds(start: float, progress: list[tuple[float, float]]) -> dict[str, float]:
    """Seconds of each part of the export, from the moments (fraction done, time) that `write_mesh` reported."""
    ends = [max(moment for part, moment in progress if part < end + 1e-6) for end in (*STAGE_ENDS, 1.0)]
    parts = zip(("volume", "surface", "atlas", "images", "files"), pairwise([start, *ends]), strict=True)
    return {name: round(after - before, 2) for name, (before, after) in parts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench mesh", description=__doc__.split("\n\n")[0])
    parser.add_argument("workspaces", nargs="+", type=Path, metavar="WORKSPACE", help="of a finished run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=256, help="of the views, pixels")
    parser.add_argument("--mcubes_resolution", "--mcubes-resolution", type=int, default=256)
    parser.add_argument("--decimate_target", "--decimate-target", type=int, default=50_000)
    parser.add_argument("--texture_resolution", "--texture-resolution", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("meshes"), help="folder for the meshes and images")
    args = parser.parse_args(argv)
    rows = []
    for path in args.workspaces:
        stored = Workspace(path).stored_config()
        assert stored is not None, f"{path} is no workspace"
        overrides = {"device": args.device, "workspace": str(path), "test": True}
        config = stored.override(overrides | {"max_steps": SAMPLE_FACTOR * stored.render.max_steps})
        trainer = load_finished(config, path)
        glb = args.out / path.name / "mesh.glb"
        with trainer.optimizer.ema_weights(), trainer.renderer.without_floaters():
            cameras = six_views(config.camera, trainer.device)
            start = time.perf_counter()
            progress: list[tuple[float, float]] = []

            def note(part: float, progress: list[tuple[float, float]] = progress) -> None:
                progress.append((part, time.perf_counter()))

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
            likeness = compare_with_field(trainer.renderer, read_glb(glb, trainer.device), cameras, args.size)
        save_grid(glb.with_name("views.png"), likeness.images)
        row = {"workspace": path.name, "seconds": round(seconds, 2), "faces": len(surface.faces)}
        row["seconds_of"] = split_seconds(start, progress)
        for name, digits in (("psnr", 2), ("opaque_psnr", 2), ("iou", 4)):
            row[name] = dict(zip(SIX_VIEWS, (round(x, digits) for x in getattr(likeness, name)), strict=True))
        rows.append(row)
        print(
            f"{path.name:24} {row['faces']} faces in {seconds:.1f} s "
            f"({', '.join(f'{name} {part:.1f}' for name, part in row['seconds_of'].items())}); worst of six views: "
            f"PSNR {min(likeness.psnr):.1f} dB ({min(likeness.opaque_psnr):.1f} dB where the field is opaque), "
            f"IoU {min(likeness.iou):.3f}; {glb.with_name('views.png')}"
        )
    print(json.dumps({"device": args.device, "meshes": rows}))
    return 0
