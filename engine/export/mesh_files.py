"""The scene as a textured triangle mesh: GLB (glTF's binary form, one file), and OBJ with its material and pictures.

World axes are glTF's (y up, the front faces +z), so nothing is turned.
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
from dream_fast.engine.export.isosurface import Volume, log_density_volume, surface_of
from dream_fast.engine.export.silhouette import Silhouette
from dream_fast.engine.export.texture import bake
from dream_fast.engine.export.uv_atlas import unwrap
from dream_fast.engine.geometry.mesh import Mesh, simplify, smooth_normals
from dream_fast.engine.scene.field import Field
from dream_fast.engine.workspace.atomic import atomic_writes

# What of the time passes until the volume, the surface, the atlas and the pictures are there, on two cores.
PARTS = (0.22, 0.33, 0.37, 0.95)


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
    outline: Silhouette | None = None,
    decimate_target: int = 50_000,
    texture_resolution: int = 2048,
    progress: Callable[[float], None] = lambda part: None,
) -> Mesh:
    """Write the field's surface as `write_textured` does, with normals; returns it. NoSurface: there is none.

    resolution: points along an edge of the scene cube. threshold: density of the surface, where it has no `outline` to
    keep to. decimate_target: most faces, 0 for all of them. texture_resolution: texels along an edge of the pictures.
    `progress` is told the part that is done.
    """
    volume = log_density_volume(
        field, resolution, threshold, outline=outline, progress=lambda part: progress(PARTS[0] * part)
    )
    mesh = simplify(surface_of(volume), decimate_target)
    progress(PARTS[1])
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
    """Write a mesh to `path` (.glb), and beside it as .obj, .mtl and .png, matt, with the pictures of `bake`.

    Without a volume it has no picture of normals. The files take their places together, when all of them are written.
    """
    atlas = unwrap(mesh, texture_resolution)
    _, _, start, end = PARTS
    progress(start)
    baked = bake(
        field, mesh, atlas, texture_resolution, volume, progress=lambda part: progress(start + (end - start) * part)
    )
    paths = mesh_paths(path, normals=baked.normal is not None)
    names = [path.name for path in paths]
    with ThreadPoolExecutor() as pool:  # pictures are packed while the text is written
        encoded = pool.map(_Png, (one for one in baked if one is not None))
        vertices, normals = mesh.vertices[atlas.source], smooth_normals(mesh)[atlas.source]
        text = _obj(vertices, normals, atlas.uv, atlas.faces, names[2])
        pictures = list(encoded)
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=pictures[0],
        normalTexture=pictures[1] if len(pictures) == 2 else None,
        metallicFactor=0.0,
        roughnessFactor=1.0,
    )
    visual = trimesh.visual.TextureVisuals(uv=atlas.uv, material=material)
    # process=False: merging near vertices would break the manifold. Normals are ours: trimesh wants SciPy for its.
    shape = trimesh.Trimesh(vertices, atlas.faces, vertex_normals=normals, visual=visual, process=False)
    with atomic_writes(paths) as (glb, obj, mtl, *pngs):
        shape.export(glb, file_type="glb", include_normals=True)
        obj.write_text(text, encoding="ascii")
        mtl.write_text(_mtl(*names[3:]), encoding="ascii")
        for png, picture in zip(pngs, pictures, strict=True):
            png.write_bytes(picture.data)
    progress(1.0)


class _Png:
    """A picture that is encoded already, in the shape in which trimesh takes one into a GLB."""

    format = "PNG"

    def __init__(self, pixels: np.ndarray):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format="PNG", compress_level=PNG_LEVEL)
        self.data = out.getvalue()

    def save(self, file: BinaryIO, format: str) -> None:
        file.write(self.data)


def _mtl(albedo: str, normal: str | None = None) -> str:
    """A material in Wavefront's form: opaque, no gloss; `norm` is the extension for physically based materials."""
    lines = ["newmtl surface", "Kd 1 1 1", "Ks 0 0 0", "d 1", "illum 1", f"map_Kd {albedo}"]
    return "\n".join([*lines, *([f"norm {normal}"] if normal else [])]) + "\n"


def _obj(vertices: np.ndarray, normals: np.ndarray, uv: np.ndarray, faces: np.ndarray, material: str) -> str:
    """A mesh in Wavefront's form; its indices begin at 1."""
    parts = [f"mtllib {material}\n"]
    for word, rows in (("v", vertices), ("vt", uv), ("vn", normals)):
        parts.append(_lines(f"{word}{' %.7g' * rows.shape[1]}\n", rows))
    parts.append("usemtl surface\n")
    parts.append(_lines("f %d/%d/%d %d/%d/%d %d/%d/%d\n", np.repeat(faces + 1, 3, axis=1)))
    return "".join(parts)


def _lines(form: str, rows: np.ndarray) -> str:
    """Each row in this form. All at once: row by row it takes four times as long."""
    return form * len(rows) % tuple(rows.ravel().tolist())
