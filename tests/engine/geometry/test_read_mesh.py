"""Mesh files: reading into one mesh, and messages for bad files."""

import struct

import numpy as np
import pytest
import trimesh

from dream_fast.engine.errors import UserError
from dream_fast.engine.geometry import read_mesh
from dream_fast.engine.geometry.mesh import is_closed
from dream_fast.engine.geometry.read_mesh import load_mesh

BOX = trimesh.creation.box((1, 2, 3))


@pytest.mark.parametrize("suffix", read_mesh.SUFFIXES)
def test_load_mesh_two_boxes(suffix, tmp_path):
    """A scene of two boxes is read as a closed mesh."""
    scene = trimesh.Scene()
    scene.add_geometry(BOX, geom_name="a")
    scene.add_geometry(BOX, geom_name="b", transform=trimesh.transformations.translation_matrix([5, 0, 0]))
    path = tmp_path / f"two{suffix.upper()}"  # capitals too
    (scene if suffix in (".glb", ".gltf", ".obj") else scene.to_mesh()).export(path, file_type=suffix[1:])
    if suffix == ".gltf":
        for name, data in scene.export(file_type="gltf").items():
            (tmp_path / (path.name if name.endswith(".gltf") else name)).write_bytes(data)
    mesh = load_mesh(path)
    assert len(mesh.vertices) == 16 and len(mesh.faces) == 24 and is_closed(mesh)
    shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert (shape.volume, *shape.extents) == (12, 6, 2, 3)  # halves and whole numbers


def stl(count, triangles):
    body = b"".join(struct.pack("<12fH", *([0.0] * 3), *np.ravel(t), 0) for t in triangles)
    return bytes(80) + struct.pack("<I", count) + body


def ply(vertices, faces):
    lines = [
        "ply",
        "format ascii 1.0",
        f"element vertex {len(vertices)}",
        *(f"property float {axis}" for axis in "xyz"),
    ]
    lines += [f"element face {len(faces)}", "property list uchar int vertex_indices"] if faces else []
    return "\n".join([*lines, "end_header", *(" ".join(map(str, row)) for row in [*vertices, *faces]), ""]).encode()


CORNERS = [(0, 0, 0), (1, 0, 0), (0, 1, 0)]
BROKEN = {
    "empty.glb": (b"", "cannot be read"),
    "empty.obj": (b"", "has no triangles|cannot be read"),
    "text.glb": (b"not a mesh", "cannot be read"),
    "cut.glb": (BOX.export(file_type="glb")[:-200], "cannot be read"),
    "cut.stl": (stl(12, [CORNERS] * 3), "has no triangles that can be read|cannot be read"),
    "more.stl": (stl(2**32 - 1, [CORNERS]), "has no triangles that can be read|cannot be read"),
    "json.gltf": (b'{"asset": ', "cannot be read"),
    "else.gltf": (
        b'{"asset":{"version":"2.0"},"buffers":[{"uri":"gone.bin","byteLength":4}],"meshes":[],"scenes":[{}]}',
        "cannot be read|has no triangles",
    ),
    "points.ply": (ply(CORNERS, []), "has no triangles"),
    "other.ply": (ply(CORNERS, [(3, 0, 1, 7)]), "a vertex that is not there|cannot be read"),
    "nan.obj": (b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "not finite"),
    "large.obj": (b"v 1e39 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "not finite"),
    "point.obj": (b"v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n", "no triangle with an area"),
    "scene.blend": (b"BLENDER", "is not a mesh file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_load_mesh_broken_file(name, tmp_path):
    """A broken file is refused with one sentence."""
    content, sentence = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        load_mesh(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_load_mesh_empty_file(tmp_path):
    """A missing file or a file without triangles is refused."""
    with pytest.raises(UserError, match="gone.glb cannot be read: there is no file"):
        load_mesh(tmp_path / "gone.glb")
    (tmp_path / "folder.obj").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_mesh(tmp_path / "folder.obj")


def test_load_mesh_too_large(tmp_path, monkeypatch):
    """A file that is too large is not opened."""
    with open(tmp_path / "huge.stl", "wb") as file:
        file.truncate(read_mesh.MAX_BYTES + 1)  # takes no room on the disk
    monkeypatch.setattr(trimesh, "load_scene", None)
    with pytest.raises(UserError, match="too large: 1.1 GB, of at most 1.1"):
        load_mesh(tmp_path / "huge.stl")


def test_load_mesh_too_many_faces(tmp_path, monkeypatch):
    """Too many triangles are refused."""
    monkeypatch.setattr(read_mesh, "MAX_FACES", 11)
    BOX.export(tmp_path / "box.ply")
    with pytest.raises(UserError, match="has 12 triangles, of at most 11"):
        load_mesh(tmp_path / "box.ply")


def test_load_mesh_too_many_parts(tmp_path):
    """Too many parts are refused."""
    count = 200_000
    header = bytes(80) + struct.pack("<I", count)
    rows = np.zeros(count, dtype=np.dtype([("normal", "<3f4"), ("corners", "<3,3f4"), ("more", "<u2")]))
    rows["corners"] = np.random.default_rng(0).uniform(-1, 1, (count, 1, 3)) + 1e-3 * np.eye(3)
    (tmp_path / "dust.stl").write_bytes(header + rows.tobytes())
    with pytest.raises(UserError, match="falls into 200000 separate parts"):
        load_mesh(tmp_path / "dust.stl")
