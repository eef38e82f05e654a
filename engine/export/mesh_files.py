"""Textured mesh files: GLB (binary glTF, one file), and OBJ with its material and images.

World axes are glTF's (y up, the front faces +z), so nothing is rotated.
"""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import trimesh
from PIL import Image

from dream_fast.engine.export.images import PNG_LEVEL
from dream_fast.engine.export.isosurface import Volume, extract_surface, sample_volume
from dream_fast.engine.export.silhouette import Silhouettes
from dream_fast.engine.export.texture import bake
from dream_fast.engine.export.uv_atlas import unwrap
from dream_fast.engine.geometry.mesh import Mesh, simplify, smooth_normals
from dream_fast.engine.scene.field import Field
from dream_fast.engine.workspace.atomic import atomic_writes

# Progress at which volume, surface, atlas and images are finished: shares of the time on two cores.
STAGE_ENDS = (0.22, 0.33, 0.37, 0.95)


def mesh_paths(glb: Path, *, normals: bool = True) -> list[Path]:
    """The files of a mesh: mesh.glb, mesh.obj, mesh.mtl, mesh.png, and with `normals` mesh_normal.png."""
    glb = Path(glb)
    paths = [glb.with_suffix(suffix) for suffix in (".glb", ".obj", ".mtl", ".png")]
    return [*paths, glb.with_name(f"{glb.stem}_normal.png")] if normals else paths


def write_mesh(
    path: Path,
    field: Field,
    resolution: int,
    threshold: float,
    *,
    silhouettes: Silhouettes | None = None,
    decimate_target: int = 50_000,
    texture_resolution: int = 2048,
    progress: Callable[[float], None] = lambda part: None,
) -> Mesh:
    """Extract the field's surface, write it as `write_textured` does, with normals, and return it.

    resolution: points along an edge of the scene cube. threshold: density of the surface where there are no
    `silhouettes` for it to have. decimate_target: maximum number of faces, 0 for all of them. texture_resolution:
    texels along an edge of the images. `progress` is called with the finished part. Raises NoSurface: when there is
    none.
    """
    volume = sample_volume(
        field, resolution, threshold, silhouettes=silhouettes, progress=lambda part: progress(STAGE_ENDS[0] * part)
    )
    mesh = simplify(extract_surface(volume), decimate_target)
    progress(STAGE_ENDS[1])
    write_textured(path, mesh, field, texture_resolution, volume, progress=progress)
    return mesh


def write_textured(
    path: Path,
    mesh: Mesh,
    field: Field,
    texture_resolution: int,
    volume: Volume | None = None,
    *,
    progress: Callable[[float], None] = lambda part: None,
) -> None:
    """Write a mesh to `path` (.glb), and next to it as .obj, .mtl and .png, without gloss, with the images of `bake`.

    Without a volume there is no normal map. The files appear together, when all of them are written.
    """
    atlas = unwrap(mesh, texture_resolution)
    _, _, start, end = STAGE_ENDS
    progress(start)
    baked = bake(
        field, mesh, atlas, texture_resolution, volume, progress=lambda part: progress(start + (end - start) * part)
    )
    paths = mesh_paths(path, normals=baked.normal is not None)
    names = [path.name for path in paths]
    with ThreadPoolExecutor() as pool:  # images are compressed while the text is written
        encoded = pool.map(_EncodedPng, (texture for texture in baked if texture is not None))
        vertices, normals = mesh.vertices[atlas.source], smooth_normals(mesh)[atlas.source]
        text = _obj(vertices, normals, atlas.uv, atlas.faces, names[2])
        images = list(encoded)
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=images[0],
        normalTexture=images[1] if len(images) == 2 else None,
        metallicFactor=0.0,
        roughnessFactor=1.0,
    )
    visual = trimesh.visual.TextureVisuals(uv=atlas.uv, material=material)
    # process=False: merging near vertices would break the manifold. trimesh needs SciPy to compute normals itself.
    shape = trimesh.Trimesh(vertices, atlas.faces, vertex_normals=normals, visual=visual, process=False)
    with atomic_writes(paths) as (glb, obj, mtl, *pngs):
        shape.export(glb, file_type="glb", include_normals=True)
        obj.write_text(text, encoding="ascii")
        mtl.write_text(_mtl(*names[3:]), encoding="ascii")
        for png, image in zip(pngs, images, strict=True):
            png.write_bytes(image.data)
    progress(1.0)


class _EncodedPng:
    """An image that is encoded already, with the methods that trimesh calls to write an image into a GLB."""

    format = "PNG"

    def __init__(self, pixels: np.ndarray):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format="PNG", compress_level=PNG_LEVEL)
        self.data = out.getvalue()

    def save(self, file: BinaryIO, format: str) -> None:
        file.write(self.data)


def _mtl(albedo: str, normal: str | None = None) -> str:
    """A material file: opaque, no gloss. `norm` is the extension for physically based materials."""
    lines = ["newmtl surface", "Kd 1 1 1", "Ks 0 0 0", "d 1", "illum 1", f"map_Kd {albedo}"]
    return "\n".join([*lines, *([f"norm {normal}"] if normal else [])]) + "\n"


def _obj(vertices: np.ndarray, normals: np.ndarray, uv: np.ndarray, faces: np.ndarray, material: str) -> str:
    """An OBJ file; its indices begin at 1."""
    sections = [f"mtllib {material}\n"]
    for word, rows in (("v", vertices), ("vt", uv), ("vn", normals)):
        sections.append(_format_rows(f"{word}{' %.7g' * rows.shape[1]}\n", rows))
    sections.append("usemtl surface\n")
    sections.append(_format_rows("f %d/%d/%d %d/%d/%d %d/%d/%d\n", np.repeat(faces + 1, 3, axis=1)))
    return "".join(sections)


def _format_rows(row_format: str, rows: np.ndarray) -> str:
    """Format each row [C] of `rows` [R, C]. In one call: row by row takes four times as long."""
    return row_format * len(rows) % tuple(rows.ravel().tolist())
