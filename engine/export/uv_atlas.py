"""A UV atlas: the triangles of a mesh laid out on a square, in charts, and the tangents that go with it.

Texture coordinates (u, v) are in [0, 1] with v up, so that row 0 of a picture is v = 1.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from dream_fast.engine.errors import UserError
from dream_fast.engine.geometry.mesh import Mesh, smooth_normals

PADDING = 4  # texels between two charts
LARGEST_PAGE = 1 << 15  # texels


class Atlas(NamedTuple):
    """A mesh whose vertices are doubled along the borders of its charts."""

    source: np.ndarray  # [V] int64: the vertex of the mesh that each one is
    faces: np.ndarray  # [T, 3] int64: the mesh's triangles, in their order
    uv: np.ndarray  # [V, 2] float32 in [0, 1]


def unwrap(mesh: Mesh, resolution: int) -> Atlas:
    """Lay the mesh out for a picture of resolution^2 texels, by uvunwrap or, where that cannot, xatlas."""
    vertices, faces = mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32)
    # Its Rust panics on some surfaces full of splinters; from their last triangle to the first it starts elsewhere.
    for order in (slice(None), slice(None, None, -1)):
        try:
            with _panics_unheard():
                laid = _unwrap_by_uvunwrap(vertices, np.ascontiguousarray(faces[order]), resolution)
            return laid._replace(faces=np.ascontiguousarray(laid.faces[order]))
        except ImportError:
            break
        except BaseException as error:
            # A panic is none of Python's errors.
            if type(error).__name__ not in ("PanicException", "UnwrapError"):
                raise
    return _unwrap_by_xatlas(vertices, faces, resolution)


@contextmanager
def _panics_unheard() -> Iterator[None]:
    """With standard error shut: Rust prints a panic there, and a page of its stack, before it is raised."""
    try:
        kept = os.dup(2)
    except OSError:  # shut already
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _unwrap_by_uvunwrap(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> Atlas:
    import uvunwrap

    mesh, page = uvunwrap.Mesh(vertices, faces), resolution
    while True:
        # The densest packing takes minutes for the thousands of charts of a rough surface, and gains 4 % of the page.
        atlas = uvunwrap.generate([mesh], page_size=page, padding=PADDING, packing="fast")
        if atlas.page_count == 1 or page >= LARGEST_PAGE:
            break
        page *= 2  # more charts than fit with their padding: that gets smaller
    laid = atlas.meshes[0]
    uv = np.array(laid.uv, dtype=np.float32).reshape(-1, 2)
    return Atlas(np.array(laid.xref, dtype=np.int64), np.array(laid.indices, dtype=np.int64).reshape(-1, 3), uv)


def _unwrap_by_xatlas(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> Atlas:
    try:
        import xatlas
    except ImportError:
        raise UserError("a textured mesh needs uvunwrap or xatlas: pip install uvunwrap xatlas") from None
    atlas, packing = xatlas.Atlas(), xatlas.PackOptions()
    packing.resolution, packing.padding = resolution, PADDING
    atlas.add_mesh(vertices, faces)
    atlas.generate(pack_options=packing)
    source, laid, uv = atlas[0]
    return Atlas(source.astype(np.int64), laid.astype(np.int64), np.asarray(uv, dtype=np.float32))


def tangents(mesh: Mesh, atlas: Atlas) -> np.ndarray:
    """Of each vertex of the atlas [V, 4]: the direction in which u grows, and 1, or -1 where v grows to its right."""
    corners, normals = mesh.vertices[mesh.faces], smooth_normals(mesh)[atlas.source]
    uv = atlas.uv.astype(np.float64)[atlas.faces]
    (du1, dv1), (du2, dv2) = (uv[:, 1] - uv[:, 0]).T, (uv[:, 2] - uv[:, 0]).T
    edge1, edge2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    twice = du1 * dv2 - du2 * dv1  # area in the picture
    # Each triangle counts by its area, so that slivers do not matter.
    along = (dv2[:, None] * edge1 - dv1[:, None] * edge2) * np.sign(twice)[:, None]
    vertices = np.repeat(atlas.faces.ravel(), 3).reshape(-1, 3)
    summed, side = np.zeros((len(atlas.source), 3)), np.zeros(len(atlas.source))
    np.add.at(summed, (vertices, np.arange(3)), np.repeat(along, 3, axis=0))
    np.add.at(side, atlas.faces.ravel(), np.repeat(twice, 3))
    summed -= (summed * normals).sum(1, keepdims=True) * normals
    length = np.linalg.norm(summed, axis=1, keepdims=True)
    return np.concatenate([summed / np.maximum(length, 1e-30), np.where(side < 0, -1.0, 1.0)[:, None]], axis=1)
