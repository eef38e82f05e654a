"""UV atlases: the triangles of a mesh laid out on a square in charts, with tangents.

Texture coordinates (u, v) are in [0, 1] with v up, so that row 0 of an image is v = 1.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from dream_fast.engine.errors import UserError
from dream_fast.engine.geometry.mesh import Mesh, smooth_normals

PADDING = 4  # texels between two charts
MAX_PAGE_SIZE = 1 << 15  # texels


class Atlas(NamedTuple):
    """A mesh with a copy of each vertex in every chart that has it: V vertices, T triangles."""

    source: np.ndarray  # [V] int64: vertex of the mesh that each one copies
    faces: np.ndarray  # [T, 3] int64: the mesh's triangles, in their order
    uv: np.ndarray  # [V, 2] float32 in [0, 1]


def unwrap(mesh: Mesh, resolution: int) -> Atlas:
    """Lay the mesh out for an image of resolution^2 texels, by uvunwrap or, where that fails, by xatlas."""
    vertices, faces = mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32)
    # uvunwrap panics on some surfaces with many splinters. With the triangles in reverse it starts elsewhere.
    for order in (slice(None), slice(None, None, -1)):
        try:
            with _silence_stderr():
                atlas = _unwrap_by_uvunwrap(vertices, np.ascontiguousarray(faces[order]), resolution)
            return atlas._replace(faces=np.ascontiguousarray(atlas.faces[order]))
        except ImportError:
            break
        except BaseException as error:
            # A panic is not an `Exception`.
            if type(error).__name__ not in ("PanicException", "UnwrapError"):
                raise
    return _unwrap_by_xatlas(vertices, faces, resolution)


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Close standard error inside the `with` block: Rust prints a panic and its stack there before it raises."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed already
        yield
        return
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        os.close(devnull)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _unwrap_by_uvunwrap(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> Atlas:
    import uvunwrap

    mesh, page = uvunwrap.Mesh(vertices, faces), resolution
    while True:
        # The densest packing takes minutes for the thousands of charts of a rough surface, and gains 4 % of the page.
        atlas = uvunwrap.generate([mesh], page_size=page, padding=PADDING, packing="fast")
        if atlas.page_count == 1 or page >= MAX_PAGE_SIZE:
            break
        page *= 2  # the charts do not fit with their padding: a larger page makes the padding smaller
    charted = atlas.meshes[0]
    uv = np.array(charted.uv, dtype=np.float32).reshape(-1, 2)
    faces = np.array(charted.indices, dtype=np.int64).reshape(-1, 3)
    return Atlas(np.array(charted.xref, dtype=np.int64), faces, uv)


def _unwrap_by_xatlas(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> Atlas:
    try:
        import xatlas
    except ImportError:
        raise UserError("a textured mesh needs uvunwrap or xatlas: pip install uvunwrap xatlas") from None
    atlas, packing = xatlas.Atlas(), xatlas.PackOptions()
    packing.resolution, packing.padding = resolution, PADDING
    atlas.add_mesh(vertices, faces)
    atlas.generate(pack_options=packing)
    source, faces, uv = atlas[0]
    return Atlas(source.astype(np.int64), faces.astype(np.int64), np.asarray(uv, dtype=np.float32))


def tangents(mesh: Mesh, atlas: Atlas) -> np.ndarray:
    """Tangents [V, 4] of the atlas's vertices: the direction in which u grows, and the sign of the bitangent (glTF)."""
    corners, normals = mesh.vertices[mesh.faces], smooth_normals(mesh)[atlas.source]
    uv = atlas.uv.astype(np.float64)[atlas.faces]
    (du1, dv1), (du2, dv2) = (uv[:, 1] - uv[:, 0]).T, (uv[:, 2] - uv[:, 0]).T
    edge1, edge2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    double_area = du1 * dv2 - du2 * dv1  # of the area in the image
    # Triangles are weighted by area, so that slivers do not matter.
    along = (dv2[:, None] * edge1 - dv1[:, None] * edge2) * np.sign(double_area)[:, None]
    vertices = np.repeat(atlas.faces.ravel(), 3).reshape(-1, 3)
    summed, side = np.zeros((len(atlas.source), 3)), np.zeros(len(atlas.source))
    np.add.at(summed, (vertices, np.arange(3)), np.repeat(along, 3, axis=0))
    np.add.at(side, atlas.faces.ravel(), np.repeat(double_area, 3))
    summed -= (summed * normals).sum(1, keepdims=True) * normals
    length = np.linalg.norm(summed, axis=1, keepdims=True)
    return np.concatenate([summed / np.maximum(length, 1e-30), np.where(side < 0, -1.0, 1.0)[:, None]], axis=1)
