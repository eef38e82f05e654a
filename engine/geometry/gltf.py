"""Check what a glTF file states before anything is built from it: nodes, instances, triangles and accessors.

glTF 2.0 is JSON with buffers: separate files (.gltf), text in it, or the rest of the file (.glb). A node places a mesh
and its children, so a small file can state any number of triangles.
"""

import json
import math
import struct
from typing import Any

from dream_fast.engine.errors import UserError, first_line

MAX_JSON_BYTES = 64_000_000
MAX_NODES = 10_000
MAX_DEPTH_SUM = 200_000  # of the nodes with a mesh, since the library follows the path to each
TRIANGLES, STRIP, FAN = 4, 5, 6  # modes of a primitive
GLB_MAGIC, GLB_JSON = b"glTF", b"JSON"


def glb_json(data: bytes) -> bytes:
    """Return the JSON of a .glb. Raises ValueError: when there is none."""
    if len(data) < 20 or data[:4] != GLB_MAGIC or data[16:20] != GLB_JSON:
        raise ValueError("it is not a binary glTF file")
    (length,) = struct.unpack("<I", data[12:16])
    if length > len(data) - 20:
        raise ValueError("it is truncated")
    return data[20 : 20 + length]


def check_gltf(text: bytes, max_faces: int, max_parts: int) -> None:
    """Check the JSON of a glTF file against the limits.

    Raises UserError: when it states more. Raises ValueError: when it is not glTF. Both continue "the mesh file ...".
    """
    if len(text) > MAX_JSON_BYTES:
        raise UserError(f"has {len(text)} bytes of JSON, of at most {MAX_JSON_BYTES}: save it as .glb")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(first_line(error)) from error
    if not isinstance(header, dict):
        raise ValueError("it is not a JSON object")
    accessors = [_count(accessor) for accessor in _objects(header, "accessors")]
    meshes = [[_faces(part, accessors) for part in _objects(mesh, "primitives")] for mesh in _objects(header, "meshes")]
    most = 3 * max_faces
    if max(accessors, default=0) > most or sum(accessors) > 8 * most:
        raise UserError(f"states {max(accessors)} values in a list, of at most {most}")
    nodes = _objects(header, "nodes")
    if len(nodes) > MAX_NODES:
        raise UserError(f"has {len(nodes)} nodes, of at most {MAX_NODES}: join its parts in another program first")
    depths = _depths(nodes)
    placed = [(mesh, depth) for node, depth in zip(nodes, depths, strict=True) if (mesh := _mesh(node, meshes))]
    if sum(depth for _, depth in placed) > MAX_DEPTH_SUM:
        raise UserError("has too many nodes inside each other: join its parts in another program first")
    if (parts := sum(len(mesh) for mesh, _ in placed)) > max_parts:
        raise UserError(f"has {parts} parts, of at most {max_parts}: join them in another program first")
    if (faces := sum(sum(mesh) for mesh, _ in placed)) > max_faces:
        raise UserError(f"has {faces} triangles, of at most {max_faces}: simplify it in another program first")


def _objects(holder: dict[str, Any], name: str) -> list[dict[str, Any]]:
    entries = holder.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"its {name} are not a list of objects")
    return entries


def _whole(value: Any) -> int:
    """Return a whole number that is not negative. Raises ValueError: when it is not one."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]} is not a count")
    return value


def _count(accessor: dict[str, Any]) -> int:
    return _whole(accessor.get("count", 0)) * (16 if accessor.get("type") == "MAT4" else 1)


def _faces(primitive: dict[str, Any], accessors: list[int]) -> int:
    attributes = primitive.get("attributes")
    if not isinstance(attributes, dict):
        raise ValueError("a primitive has no attributes")
    index = primitive.get("indices", attributes.get("POSITION"))
    if index is None:
        return 0
    if _whole(index) >= len(accessors):
        raise ValueError(f"accessor {index} is not there")
    corners, mode = accessors[index], primitive.get("mode", TRIANGLES)
    return max(0, corners - 2) if mode in (STRIP, FAN) else corners // 3 if mode == TRIANGLES else 0


def _mesh(node: dict[str, Any], meshes: list[list[int]]) -> list[int]:
    if "mesh" not in node:
        return []
    if _whole(node["mesh"]) >= len(meshes):
        raise ValueError(f"mesh {node['mesh']} is not there")
    return meshes[node["mesh"]]


def _depths(nodes: list[dict[str, Any]]) -> list[int]:
    """Return the number of nodes above each. Raises ValueError: when the nodes do not form trees."""
    parents: list[int | None] = [None] * len(nodes)
    for index, node in enumerate(nodes):
        children = node.get("children", [])
        for child in children if isinstance(children, list) else [None]:
            number = _whole(child)
            if number >= len(nodes) or parents[number] is not None:
                raise ValueError("its nodes do not form trees")
            parents[number] = index
    depths: list[float] = [math.nan] * len(nodes)
    for index in range(len(nodes)):
        path: list[int] = []
        at: int | None = index
        while at is not None and math.isnan(depths[at]):
            if len(path) > len(nodes):
                raise ValueError("its nodes do not form trees")
            path.append(at)
            at = parents[at]
        depth = -1 if at is None else int(depths[at])
        for node_index in reversed(path):
            depth += 1
            depths[node_index] = depth
    return [int(depth) for depth in depths]
