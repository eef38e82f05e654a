"""Mesh files of other programs, read into one triangle mesh."""

from pathlib import Path

import numpy as np
import trimesh

from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.geometry.mesh import Mesh, mesh_components

SUFFIXES = (".glb", ".gltf", ".obj", ".off", ".ply", ".stl")
MAX_BYTES = 1 << 30
MAX_FACES = 2_000_000
MAX_PARTS = 10_000


def load_mesh(path: Path) -> Mesh:
    """Read all triangles of a mesh file into one mesh.

    Vertices at the same position are merged (files duplicate them for textures, or for every triangle), and triangles
    without an area are removed. The surface may be open. Raises UserError: when the file is missing, unreadable, has no
    triangle, more than `MAX_FACES` triangles or more than `MAX_PARTS` separate parts.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is not a mesh file: they end in {', '.join(SUFFIXES)}")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"the mesh file {path} is too large: {size / 1e9:.1f} GB, of at most {MAX_BYTES / 1e9:.1f}")
        loaded = trimesh.load_scene(path, process=False)
        parts = [part for part in loaded.dump() if isinstance(part, trimesh.Trimesh)]
    except UserError:
        raise
    except FileNotFoundError as error:
        missing = path if not path.exists() else error.filename or first_line(error)
        raise UserError(f"the mesh file {path} cannot be read: there is no file {missing}") from error
    except Exception as error:  # the readers of a broken file raise anything
        raise UserError(f"the mesh file {path} cannot be read: {first_line(error)}") from error
    count = sum(len(part.faces) for part in parts)
    if count == 0:
        raise UserError(f"the mesh file {path} has no triangles that can be read")
    if count > MAX_FACES:
        raise UserError(
            f"the mesh file {path} has {count} triangles, of at most {MAX_FACES}: simplify it in another program first"
        )
    offsets = np.cumsum([0, *(len(part.vertices) for part in parts[:-1])])
    vertices = np.concatenate([np.asarray(part.vertices, dtype=np.float64) for part in parts])
    faces = np.concatenate([np.asarray(part.faces, np.int64) + at for part, at in zip(parts, offsets, strict=True)])
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise UserError(f"the mesh file {path} is broken: a triangle has a vertex that is not there")
    if not (np.abs(vertices[faces]) < np.finfo(np.float32).max).all():
        raise UserError(f"the mesh file {path} has vertices that are not finite")
    mesh = _merge_vertices(Mesh(vertices, faces))
    if len(mesh.faces) == 0:
        raise UserError(f"the mesh file {path} has no triangle with an area")
    count = len(np.unique(mesh_components(mesh)))
    if count > MAX_PARTS:
        raise UserError(
            f"the mesh file {path} falls into {count} separate parts, of at most {MAX_PARTS}: it is not one object"
        )
    return mesh


def _merge_vertices(mesh: Mesh) -> Mesh:
    """Merge vertices at the same position; remove triangles without an area and vertices of no triangle."""
    order = np.lexsort(mesh.vertices.T)
    places = mesh.vertices[order] + 0.0  # no -0
    is_first = np.concatenate([[True], (places[1:] != places[:-1]).any(1)])
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(is_first) - 1
    vertices, faces = places[is_first], number[mesh.faces]
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    faces = faces[np.linalg.norm(np.cross(b - a, c - a), axis=1) > 0]
    used, faces = np.unique(faces, return_inverse=True)
    return Mesh(vertices[used], faces.reshape(-1, 3))
