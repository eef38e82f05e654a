"""Mesh files from anywhere, read into one triangle mesh, or refused with a sentence."""

from pathlib import Path

import numpy as np
import trimesh

from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.geometry.mesh import Mesh, mesh_components

SUFFIXES = (".glb", ".gltf", ".obj", ".off", ".ply", ".stl")
MOST_BYTES = 1 << 30
MOST_FACES = 2_000_000
MOST_PARTS = 10_000


def load_mesh(path: Path) -> Mesh:
    """The triangles of a mesh file, of all that it holds in one.

    Vertices at the same place become one (files keep them apart for textures, or at every triangle), and triangles
    without an area go. Nothing else is changed: the surface may be open. UserError: there is no such file, it cannot be
    read, holds no triangle, or more than `MOST_FACES` of them, or falls into more than `MOST_PARTS` separate parts.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is no mesh file: they end in {', '.join(SUFFIXES)}")
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(
                f"the mesh file {path} is too large: {size / 1e9:.1f} GB, of at most {MOST_BYTES / 1e9:.1f}"
            )
        loaded = trimesh.load_scene(path, process=False)
        parts = [part for part in loaded.dump() if isinstance(part, trimesh.Trimesh)]
    except UserError:
        raise
    except FileNotFoundError as error:
        missing = path if not path.exists() else error.filename or first_line(error)
        raise UserError(f"the mesh file {path} cannot be read: there is no file {missing}") from error
    except Exception as error:  # whatever a broken file makes of the reader
        raise UserError(f"the mesh file {path} cannot be read: {first_line(error)}") from error
    count = sum(len(part.faces) for part in parts)
    if count == 0:
        raise UserError(f"the mesh file {path} has no triangles that can be read")
    if count > MOST_FACES:
        raise UserError(
            f"the mesh file {path} has {count} triangles, of at most {MOST_FACES}: simplify it in another program first"
        )
    offsets = np.cumsum([0, *(len(part.vertices) for part in parts[:-1])])
    vertices = np.concatenate([np.asarray(part.vertices, dtype=np.float64) for part in parts])
    faces = np.concatenate([np.asarray(part.faces, np.int64) + at for part, at in zip(parts, offsets, strict=True)])
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise UserError(f"the mesh file {path} is broken: a triangle has a vertex that is not there")
    if not (np.abs(vertices[faces]) < np.finfo(np.float32).max).all():
        raise UserError(f"the mesh file {path} has vertices that are not finite")
    mesh = _joined(Mesh(vertices, faces))
    if len(mesh.faces) == 0:
        raise UserError(f"the mesh file {path} has no triangle with an area")
    count = len(np.unique(mesh_components(mesh)))
    if count > MOST_PARTS:
        raise UserError(
            f"the mesh file {path} falls into {count} separate parts, of at most {MOST_PARTS}: it is no object"
        )
    return mesh


def _joined(mesh: Mesh) -> Mesh:
    """With one vertex a place, without triangles of no area and vertices of no triangle."""
    order = np.lexsort(mesh.vertices.T)
    places = mesh.vertices[order] + 0.0  # no -0
    new = np.concatenate([[True], (places[1:] != places[:-1]).any(1)])
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(new) - 1
    vertices, faces = places[new], number[mesh.faces]
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    faces = faces[np.linalg.norm(np.cross(b - a, c - a), axis=1) > 0]
    used, faces = np.unique(faces, return_inverse=True)
    return Mesh(vertices[used], faces.reshape(-1, 3))
