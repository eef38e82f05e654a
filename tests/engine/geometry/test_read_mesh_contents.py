"""The content of a mesh read from a file: positions, triangles and their order; limits; messages."""

from pathlib import Path

import numpy as np
import pytest
import trimesh

from dream_fast.engine.errors import UserError
from dream_fast.engine.geometry import read_mesh
from dream_fast.engine.geometry.read_mesh import load_mesh

BOX = trimesh.creation.box((1, 2, 3))


def obj(path: Path, vertices: list[tuple], faces: list[tuple]) -> Path:
    """Writes vertices and triangles, counted from 0, as a file of text."""
    lines = [f"v {x} {y} {z}" for x, y, z in vertices] + ["f " + " ".join(str(v + 1) for v in face) for face in faces]
    path.write_text("\n".join([*lines, ""]))
    return path


def triangles(vertices: np.ndarray, faces: np.ndarray) -> list:
    """Positions of the corners of each triangle, from its lowest corner on, in a fixed order."""
    corners = [[tuple(map(float, vertices[v])) for v in face] for face in faces]
    return sorted(face[k:] + face[:k] for face in corners for k in [face.index(min(face))])


def test_load_mesh_merges_vertices(tmp_path: Path) -> None:
    """Positions and orientation are kept in fp64; each position is one vertex, 0 and -0 alike."""
    places = [(0, 0, 0), (1.125, 0, 0), (0, 2.25, 0), (-0.0, 0, -0.0), (0, 2.25, 0), (0, 0, -3.5)]
    faces = [(0, 1, 2), (3, 4, 5)]
    mesh = load_mesh(obj(tmp_path / "two.obj", places, faces))
    assert mesh.vertices.dtype == np.float64 and mesh.faces.dtype == np.int64
    assert mesh.vertices.shape == (4, 3) and not np.signbit(mesh.vertices[mesh.vertices == 0]).any()
    assert triangles(*mesh) == triangles(np.array(places) + 0.0, np.array(faces))


def test_load_mesh_drops_degenerate_faces(tmp_path: Path) -> None:
    """Collinear and repeated corners are removed; a small triangle stays, wherever it is."""
    places = [(1, 1, 0), (2, 1, 0), (4, 1, 0), (7, 7, 7), (1e-6, 0, 0), (0, 1e-6, 0), (0, 0, 1e-6)]
    mesh = load_mesh(obj(tmp_path / "some.obj", places, [(0, 1, 2), (0, 0, 1), (4, 5, 6)]))
    assert triangles(*mesh) == triangles(np.array(places), np.array([(4, 5, 6)]))
    assert mesh.vertices.shape == (3, 3)


def test_load_mesh_keeps_positions(tmp_path: Path) -> None:
    """Three boxes, each with its own vertices in the file, are transformed by the scene."""
    scene, moved = trimesh.Scene(), []
    for number in range(3):
        transform = trimesh.transformations.translation_matrix([4 * number, number, 0])
        scene.add_geometry(BOX, transform=transform)
        moved.append(BOX.copy().apply_transform(transform))
    scene.export(tmp_path / "scene.glb")
    whole = trimesh.util.concatenate(moved)  # of halves and whole numbers, which fp32 holds
    assert triangles(*load_mesh(tmp_path / "scene.glb")) == triangles(whole.vertices, whole.faces)


def test_load_mesh_at_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file at the limits of bytes, triangles and parts is read; one more is refused with both numbers."""
    path = tmp_path / "two.ply"
    trimesh.util.concatenate([BOX, BOX.copy().apply_translation((5, 0, 0))]).export(path)
    limits = {"MAX_BYTES": path.stat().st_size, "MAX_FACES": 24, "MAX_PARTS": 2}
    for name, value in limits.items():
        monkeypatch.setattr(read_mesh, name, value)
    assert len(load_mesh(path).faces) == 24
    for name, sentence in (
        ("MAX_BYTES", "is too large: "),
        ("MAX_FACES", "has 24 triangles, of at most 23: "),
        ("MAX_PARTS", "falls into 2 separate parts, of at most 1: "),
    ):
        with monkeypatch.context() as less:
            less.setattr(read_mesh, name, limits[name] - 1)
            with pytest.raises(UserError, match=f"^the mesh file {path} {sentence}"):
                load_mesh(path)


def test_load_mesh_unknown_suffix(tmp_path: Path) -> None:
    """The message has all suffixes."""
    with pytest.raises(UserError) as caught:
        load_mesh(tmp_path / "scene.fbx")
    assert str(caught.value) == (
        f"{tmp_path / 'scene.fbx'} is not a mesh file: they end in .glb, .gltf, .obj, .off, .ply, .stl"
    )


def test_load_mesh_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the missing mesh file, or a file that it needs."""
    path = tmp_path / "model.gltf"
    with pytest.raises(UserError, match=f"^the mesh file {path} cannot be read: there is no file {path}$"):
        load_mesh(path)
    for name, data in trimesh.Scene(BOX).export(file_type="gltf").items():
        if name.endswith(".gltf"):
            path.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be read: there is no file gltf_buffer_0.bin$"):
        load_mesh(path)

    def missing(*words: object, **options: object) -> None:
        raise FileNotFoundError(2, "No such file", "wood.png")

    monkeypatch.setattr(trimesh, "load_scene", missing)
    with pytest.raises(UserError, match=r"cannot be read: there is no file wood.png$"):
        load_mesh(path)


def test_load_mesh_reader_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the first line of the reader; the library does not process the file."""
    path, calls = obj(tmp_path / "one.obj", [(0, 0, 0), (1, 0, 0), (0, 1, 0)], [(0, 1, 2)]), []

    def broken(*words: object, **options: object) -> None:
        calls.append((words, options))
        raise ValueError("no such version\nand more")

    monkeypatch.setattr(trimesh, "load_scene", broken)
    with pytest.raises(UserError, match=f"^the mesh file {path} cannot be read: no such version$"):
        load_mesh(path)
    ((words, options),) = calls
    assert words[0].read() == path.read_bytes() and options.pop("resolver").folder == tmp_path
    assert options == {"file_type": "obj", "process": False, "skip_materials": True}


@pytest.mark.parametrize(("place", "finite"), [("3.4e38", True), ("3.4028234663852886e38", False), ("-inf", False)])
def test_load_mesh_out_of_fp32(tmp_path: Path, place: str, finite: bool) -> None:
    """Positions beyond fp32 count as infinite; unused ones are ignored."""
    path = tmp_path / "far.obj"
    obj(path, [(0, 0, 0), (1, 0, 0), (0, 1, 0), (place, 0, 0)], [(0, 1, 2)])
    assert len(load_mesh(path).faces) == 1
    obj(path, [(0, 0, 0), (1, 0, 0), (0, 1, 0), (place, 0, 0)], [(0, 1, 2), (0, 3, 2)])
    if finite:
        assert len(load_mesh(path).faces) == 2
    else:
        with pytest.raises(UserError, match=f"^the mesh file {path} has vertices that are not finite$"):
            load_mesh(path)


@pytest.mark.parametrize("wrong", [(-1, 1, 2), (0, 1, 3)])
def test_load_mesh_missing_vertex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: tuple) -> None:
    """Indices below the first and behind the last vertex are refused."""
    part = trimesh.Trimesh(np.eye(3), [(0, 1, 2), wrong], process=False, validate=False)

    class Scene:
        def dump(self) -> list:
            return [trimesh.PointCloud(np.eye(3)), part]

    monkeypatch.setattr(trimesh, "load_scene", lambda *words, **options: Scene())
    path = obj(tmp_path / "one.obj", [], [])
    with pytest.raises(UserError, match=f"^the mesh file {path} is broken: a triangle has a vertex that is not there$"):
        load_mesh(path)
