"""Mesh files of other programs, read into one triangle mesh.

Only the triangles are read: materials, textures and names of groups are left out before the library sees them. A file
that a mesh file refers to (a buffer of .gltf) has to lie in its folder.
"""

import io
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import trimesh

from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.files import BadFile, read_regular
from dream_fast.engine.geometry.gltf import check_gltf, glb_json
from dream_fast.engine.geometry.mesh import Mesh, mesh_components

SUFFIXES = (".glb", ".gltf", ".obj", ".off", ".ply", ".stl")
MAX_BYTES = 1 << 30
MAX_TEXT_BYTES = 250_000_000  # of a file of text, of which the library keeps several copies
MAX_FACES = 2_000_000
MAX_PARTS = 10_000
SKIPPABLE = ("glb", "gltf", "obj", "ply")  # kinds whose materials the library can leave out

_OBJ_NAMES = re.compile(rb"^[ \t]*(?:usemtl|mtllib|maplib|usemap|[gos])(?:[ \t][^\n]*)?$", re.MULTILINE)
_PLY_COUNT = re.compile(rb"^element[ \t]+(vertex|face)[ \t]+(\d+)[ \t\r]*$", re.MULTILINE)


class _Beside(trimesh.resolvers.Resolver):
    """Reads the files that a mesh file in `folder` refers to: at most MAX_BYTES in all."""

    def __init__(self, folder: Path):
        self.folder, self.left = folder, MAX_BYTES

    def get(self, key: str) -> bytes:
        names = dict.fromkeys([key.strip(), unquote(key.strip())])
        path = next((path for name in names if (path := self.folder / name).exists()), None)
        if path is None:
            raise FileNotFoundError(2, "no such file", key)
        data = read_regular(path, self.left, folder=self.folder)
        self.left -= len(data)
        return data

    def keys(self) -> list[str]:
        return []

    def write(self, name: str, data: Any) -> None:
        raise UserError("a mesh file that is read is not written to")

    def namespaced(self, namespace: str) -> "_Beside":
        return self


def load_mesh(path: Path) -> Mesh:
    """Read all triangles of a mesh file into one mesh.

    Vertices at the same position are merged (files duplicate them for textures, or for every triangle), and triangles
    without an area are removed. The surface may be open. Raises UserError: when the file is missing, unreadable, larger
    than `MAX_BYTES` (text: `MAX_TEXT_BYTES`), has no triangle, more than `MAX_FACES` triangles or more than `MAX_PARTS`
    separate parts, or refers to a file outside its folder.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is not a mesh file: they end in {', '.join(SUFFIXES)}")
    vertices, faces = _read_triangles(path)
    if len(faces) == 0:
        raise UserError(f"the mesh file {path} has no triangles that can be read")
    _check_count(path, len(faces))
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


def _check_count(path: Path, count: int) -> None:
    if count > MAX_FACES:
        raise UserError(
            f"the mesh file {path} has {count} triangles, of at most {MAX_FACES}: simplify it in another program first"
        )


def _read_triangles(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return all vertices [V, 3] and triangles [T, 3] of the parts of a file. Raises UserError: it cannot be read."""
    kind = path.suffix.lower()[1:]
    try:
        data = read_regular(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"the mesh file {path} cannot be read: there is no file {path}") from error
    except BadFile as error:
        size = path.stat().st_size
        if path.is_file() and size > MAX_BYTES:
            raise UserError(
                f"the mesh file {path} is too large: {size / 1e9:.1f} GB, of at most {MAX_BYTES / 1e9:.1f}"
            ) from error
        raise UserError(f"the mesh file {path} cannot be read: it {error.reason}") from error
    except OSError as error:
        raise UserError(f"the mesh file {path} cannot be read: {error.strerror or first_line(error)}") from error
    data, stated = _prepare(path, kind, data)
    options: dict[str, Any] = {"skip_materials": True} if kind in SKIPPABLE else {}
    try:
        file = io.BytesIO(data)
        loaded = trimesh.load_scene(file, file_type=kind, resolver=_Beside(path.parent), process=False, **options)
        parts = [part for part in loaded.dump() if isinstance(part, trimesh.Trimesh)]
    except FileNotFoundError as error:
        missing = error.filename or first_line(error)
        raise UserError(f"the mesh file {path} cannot be read: there is no file {missing}") from error
    except BadFile as error:
        raise UserError(f"the mesh file {path} cannot be read: its file {error}") from error
    except Exception as error:  # the readers of a broken file raise anything
        raise UserError(f"the mesh file {path} cannot be read: {_reason(error)}") from error
    if not parts:
        return np.zeros((0, 3)), np.zeros((0, 3), np.int64)
    offsets = np.cumsum([0, *(len(part.vertices) for part in parts[:-1])])
    vertices = np.concatenate([np.asarray(part.vertices, dtype=np.float64) for part in parts])
    faces = np.concatenate([np.asarray(part.faces, np.int64) + at for part, at in zip(parts, offsets, strict=True)])
    if len(faces) and len(faces) < stated:
        raise UserError(f"the mesh file {path} is truncated: it should have {stated} faces and has {len(faces)}")
    return vertices, faces


def _prepare(path: Path, kind: str, data: bytes) -> tuple[bytes, int]:
    """Return the file without names and materials, and the number of faces that it states, 0 where it states none.

    Raises UserError: it states more than can be read.
    """
    stated = 0
    is_text = kind in ("obj", "off", "gltf") or (kind == "stl" and _is_text(data)) or b"format ascii" in data[:1000]
    if is_text and len(data) > MAX_TEXT_BYTES and kind != "gltf":
        sizes = f"{len(data) / 1e9:.2f} GB of text, of at most {MAX_TEXT_BYTES / 1e9:.2f}"
        raise UserError(f"the mesh file {path} is too large: {sizes}; save it as .glb or .stl")
    try:
        if kind in ("glb", "gltf"):
            check_gltf(glb_json(data) if kind == "glb" else data, MAX_FACES, MAX_PARTS)
    except UserError as error:
        raise UserError(f"the mesh file {path} {error}") from error
    except ValueError as error:
        raise UserError(f"the mesh file {path} cannot be read: {first_line(error)}") from error
    if kind == "obj":
        data = _OBJ_NAMES.sub(b"", data.replace(b"\\\n", b" ").replace(b"\r\n", b"\n"))
        _check_count(path, data.count(b"\nf "))
    if kind == "ply":
        counts = {name: int(count[:18]) for name, count in _PLY_COUNT.findall(data[: data.find(b"end_header")])}
        stated = counts.get(b"face", 0)
    if kind == "off" and (match := re.search(rb"OFF\s+(?:#[^\n]*\s+)*(\d+)\s+(\d+)", data[:10_000])):
        stated = int(match[2][:18])
    _check_count(path, stated)
    return data, stated


def _is_text(data: bytes) -> bool:
    return data[:5].lower() == b"solid" and b"\0" not in data[:1000]


def _reason(error: Exception) -> str:
    """Return why the library could not read a file, as the end of a sentence."""
    if isinstance(error, KeyError):
        return f"it has no {first_line(str(error.args[0]))}" if error.args else "it lacks an entry"
    if isinstance(error, AssertionError | IndexError | TypeError | AttributeError) or not str(error).strip():
        return "its contents do not fit together"
    return first_line(error)


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
