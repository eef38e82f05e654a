"""The scene as a textured triangle mesh: GLB (glTF's binary form, one file), and OBJ with its material and picture.

World axes are glTF's (y up, the front faces +z), so nothing is turned.
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

from dream_fast.engine.export.files import written_aside
from dream_fast.engine.export.surface import Mesh, extract_mesh, simplify, smooth_normals
from dream_fast.engine.export.texture import bake, unwrap
from dream_fast.engine.scene_field import SceneField


def mesh_paths(glb: Path) -> list[Path]:
    """The files that `write_mesh` writes: mesh.glb, mesh.obj, mesh.mtl, mesh.png."""
    return [Path(glb).with_suffix(suffix) for suffix in (".glb", ".obj", ".mtl", ".png")]


def write_mesh(
    path: Path,
    field: SceneField,
    resolution: int,
    threshold: float,
    *,
    decimate_target: int = 50_000,
    texture_resolution: int = 2048,
) -> Mesh:
    """Write the field's surface as `write_textured` does; returns it. Raises UserError where there is none.

    resolution: points along an edge of the scene cube. threshold: density of the surface. decimate_target: most faces.
    texture_resolution: texels along an edge of the picture.
    """
    mesh = simplify(extract_mesh(field, resolution, threshold), decimate_target)
    write_textured(path, mesh, field, 2 * field.bound / (resolution - 1), texture_resolution)
    return mesh


def write_textured(path: Path, mesh: Mesh, field: SceneField, depth: float, texture_resolution: int) -> None:
    """Write a mesh to `path` (.glb), and beside it as .obj, .mtl and .png, matt, with the colours of `bake`.

    The files take their places together, when all of them are written.
    """
    atlas = unwrap(mesh, texture_resolution)
    picture = Image.fromarray(bake(field, mesh, atlas, texture_resolution, depth))
    vertices, normals = mesh.vertices[atlas.source], smooth_normals(mesh)[atlas.source]

    def shape(material: trimesh.visual.material.Material) -> trimesh.Trimesh:
        visual = trimesh.visual.TextureVisuals(uv=atlas.uv, material=material)
        # process=False: merging near vertices would break the manifold. Normals are ours: trimesh wants SciPy for its.
        return trimesh.Trimesh(vertices, atlas.faces, vertex_normals=normals, visual=visual, process=False)

    matt = trimesh.visual.material.PBRMaterial(baseColorTexture=picture, metallicFactor=0.0, roughnessFactor=1.0)
    with ExitStack() as stack:
        glb, obj, mtl, png = (stack.enter_context(written_aside(file)) for file in mesh_paths(path))
        shape(matt).export(glb, file_type="glb", include_normals=True)
        names = [file.name for file in mesh_paths(path)]
        obj.write_text(_obj(vertices, normals, atlas.uv, atlas.faces, names[2]), encoding="ascii")
        # d 1 is opaque; no gloss.
        mtl.write_text(f"newmtl surface\nKd 1 1 1\nKs 0 0 0\nd 1\nillum 1\nmap_Kd {names[3]}\n", encoding="ascii")
        picture.save(png)


def _obj(vertices: np.ndarray, normals: np.ndarray, uv: np.ndarray, faces: np.ndarray, material: str) -> str:
    """A mesh in Wavefront's form; its indices begin at 1."""
    parts = [f"mtllib {material}"]
    for word, rows in (("v", vertices), ("vt", uv), ("vn", normals)):
        parts += [f"{word} " + " ".join(f"{number:.7g}" for number in row) for row in rows.tolist()]
    parts.append("usemtl surface")
    parts += ["f " + " ".join(f"{index}/{index}/{index}" for index in row) for row in (faces + 1).tolist()]
    return "\n".join(parts) + "\n"
