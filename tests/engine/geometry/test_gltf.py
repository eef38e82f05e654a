"""Contents of glTF files are checked before use."""

import base64
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from dream_fast.engine.errors import UserError
from dream_fast.engine.geometry.gltf import check_gltf, glb_json
from dream_fast.engine.geometry.read_mesh import load_mesh

BOX = trimesh.creation.box((1, 2, 3))
VERTICES, FACES = np.asarray(BOX.vertices, "<f4").tobytes(), np.asarray(BOX.faces, "<u4").tobytes()
DATA = VERTICES + FACES
PART = {"attributes": {"POSITION": 0}, "indices": 1}


def gltf(**changes: Any) -> dict[str, Any]:
    """A box, with other entries."""
    views = [{"buffer": 0, "byteOffset": 0, "byteLength": len(VERTICES)}]
    views += [{"buffer": 0, "byteOffset": len(VERTICES), "byteLength": len(FACES)}]
    accessors = [{"bufferView": 0, "componentType": 5126, "count": 8, "type": "VEC3"}]
    accessors += [{"bufferView": 1, "componentType": 5125, "count": 36, "type": "SCALAR"}]
    whole = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}]}
    whole |= {"meshes": [{"primitives": [PART]}], "accessors": accessors, "bufferViews": views}
    return whole | {"buffers": [{"uri": "box.bin", "byteLength": len(DATA)}]} | changes


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def chain(count: int, *, meshes: bool) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = [{"children": [i + 1]} for i in range(count - 1)] + [{}]
    for node in nodes if meshes else nodes[-1:]:
        node["mesh"] = 0
    return nodes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nodes": [{"mesh": 0}] * 100_000}, "has 100000 nodes"),
        ({"nodes": chain(5000, meshes=True)}, "too many nodes inside each other"),
        ({"nodes": [{"mesh": 0}] * 9, "meshes": [{"primitives": [PART] * 2000}]}, "has 18000 parts, of at most 10000"),
        ({"nodes": [{"mesh": 0}] * 300, "meshes": [{"primitives": [PART] * 30}]}, "has 108000 triangles, of at most"),
        ({"accessors": [{"count": 10**9}, {}]}, "states 1000000000 values in a list"),
        ({"accessors": [{"count": 100_000}] * 100}, "states 100000 values in a list"),
        ({"nodes": [{"children": [1]}, {"children": [0]}]}, "do not form trees"),
        ({"nodes": [{"children": [0]}]}, "do not form trees"),
        ({"nodes": [{"children": [2]}, {"children": [2]}, {}]}, "do not form trees"),
        ({"nodes": [{"children": [7]}]}, "do not form trees"),
        ({"nodes": [{"children": 3}]}, "None is not a count"),
        ({"nodes": [{"mesh": -1}]}, "-1 is not a count"),
        ({"nodes": [{"mesh": 5}]}, "mesh 5 is not there"),
        ({"nodes": {"mesh": 0}}, "its nodes are not a list of objects"),
        ({"meshes": [{"primitives": [{"attributes": {"POSITION": 9}}]}]}, "accessor 9 is not there"),
        ({"meshes": [{"primitives": [{}]}]}, "a primitive has no attributes"),
        ({"meshes": [3]}, "its meshes are not a list of objects"),
        ({"accessors": [{"count": 1.5}]}, "1.5 is not a count"),
        ({"accessors": [{"count": True}]}, "True is not a count"),
    ],
)
def test_check_gltf_refused(changes: dict[str, Any], sentence: str) -> None:
    """Counts beyond the limits, and references that lead nowhere or in a circle."""
    with pytest.raises((UserError, ValueError), match=sentence):
        check_gltf(json.dumps(gltf(**changes)).encode(), max_faces=100_000, max_parts=10_000)


def test_check_gltf_accepted() -> None:
    """A box passes, and so do a deep chain of nodes with one mesh, and strips, fans, lines and points."""
    for changes in ({}, {"nodes": chain(9000, meshes=False)}, {"meshes": [], "nodes": []}):
        check_gltf(json.dumps(gltf(**changes)).encode(), 100, 10)
    for mode, faces in ((5, 34), (6, 34), (1, 0), (0, 0), (4, 12)):
        content = json.dumps(gltf(meshes=[{"primitives": [PART | {"mode": mode}]}])).encode()
        check_gltf(content, faces + 1000, 10)
        if faces:
            with pytest.raises(UserError, match=f"has {faces} triangles|values in a list"):
                check_gltf(content, faces - 1, 10)


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{", b"[" * 100_000, b"\xff"])
def test_check_gltf_no_object(text: bytes) -> None:
    """Values other than JSON objects are refused, at any depth."""
    with pytest.raises(ValueError):
        check_gltf(text, 10, 10)


@pytest.mark.parametrize(
    "data", [b"", b"glTF", b"glTF" + bytes(30), b"glTF" + struct.pack("<4I", 2, 30, 99, 0x4E4F534A)]
)
def test_glb_json_broken(data: bytes) -> None:
    """A file that is too short, has no JSON, or less than it states."""
    with pytest.raises(ValueError, match="is not a binary glTF file|is truncated"):
        glb_json(data)


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("../outside.bin", "leads out of"),
        ("{folder}/outside.bin", "leads out of"),
        ("link.bin", "leads out of"),
        ("deep/../../outside.bin", "leads out of"),
        ("/dev/zero", "is a device instead of a file"),
        ("pipe.bin", "is a pipe instead of a file"),
        ("folder.bin", "is a folder instead of a file"),
        ("", "is a folder instead of a file"),
        ("gone.bin", "there is no file gone.bin"),
        ("http://localhost/box.bin", "there is no file http"),
        ("file:///etc/passwd", "there is no file file"),
        ("%2e%2e/outside.bin", "leads out of"),
    ],
)
def test_load_mesh_reference_refused(uri: str, sentence: str, tmp_path: Path) -> None:
    """A buffer outside the folder of the mesh, or that is not a file, is refused at once and named."""
    folder = tmp_path / "mesh"
    (folder / "folder.bin").mkdir(parents=True)
    (folder / "deep").mkdir()
    (tmp_path / "outside.bin").write_bytes(DATA)
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    os.mkfifo(folder / "pipe.bin")
    buffers = [{"uri": uri.format(folder=tmp_path), "byteLength": len(DATA)}]
    path = write(folder / "box.gltf", gltf(buffers=buffers))
    with pytest.raises(UserError, match=sentence):
        load_mesh(path)


@pytest.mark.parametrize("uri", ["box.bin", "a%20box.bin", "near.bin", "data:application/octet-stream;base64,"])
def test_load_mesh_reference_accepted(uri: str, tmp_path: Path) -> None:
    """Buffers in separate files, with an escaped name, by a link inside the folder, and inside the file."""
    for name in ("box.bin", "a box.bin"):
        (tmp_path / name).write_bytes(DATA)
    (tmp_path / "near.bin").symlink_to("box.bin")
    whole = uri + base64.b64encode(DATA).decode() if uri.startswith("data") else uri
    path = write(tmp_path / "box.gltf", gltf(buffers=[{"uri": whole, "byteLength": len(DATA)}]))
    assert len(load_mesh(path).faces) == 12


def test_load_mesh_leaves_materials_out(tmp_path: Path) -> None:
    """Images and materials of a mesh are not opened: neither those of glTF nor the pipe that an OBJ names."""
    (tmp_path / "box.bin").write_bytes(DATA)
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.mtl")
    textured = {"images": [{"uri": "pipe.png"}], "textures": [{"source": 0}]}
    textured |= {"materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]}
    content = gltf(meshes=[{"primitives": [PART | {"material": 0}]}], **textured)
    assert len(load_mesh(write(tmp_path / "box.gltf", content)).faces) == 12
    text = "mtllib pipe.mtl\nusemtl a\no b\ng c\ns 1\n" + BOX.export(file_type="obj").replace("\nf", "\nusemtl x\nf")
    (tmp_path / "box.obj").write_text(text)
    assert len(load_mesh(tmp_path / "box.obj").faces) == 12


@pytest.mark.parametrize("name", ["few.ply", "few.off", "many.ply", "many.off", "pipe.stl", "text.obj"])
def test_load_mesh_stated_count(name: str, tmp_path: Path) -> None:
    """A file with fewer faces than it states is truncated; one that states too many is refused before it is read."""
    path, count = tmp_path / name, 9 if name.startswith("few") else 10**9
    if name == "pipe.stl":
        os.mkfifo(path)
    elif name == "text.obj":
        path.touch()
        os.truncate(path, 260_000_000)
    elif name.endswith("ply"):
        head = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
        head += f"element face {count}\nproperty list uchar int vertex_indices\nend_header\n"
        path.write_text(head + "0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    else:
        path.write_text(f"OFF\n# a comment\n3 {count} 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    sentence = {"few": "should have 9 faces and has 1|cannot be read", "many": "has 1000000000 triangles"}
    with pytest.raises(UserError, match=sentence.get(name.split(".")[0], "is a pipe|is too large: 0.26 GB of text")):
        load_mesh(path)
