"""Marching cubes: one vertex on every crossed edge, a closed surface around what is above, and closed forms."""

from itertools import combinations, product

import numpy as np
import pytest
import torch

from dream_fast.bench.accuracy import check_fp64
from dream_fast.engine.geometry import marching_cubes as module
from dream_fast.engine.geometry.marching_cubes import CORNERS, EDGES, marching_cubes
from dream_fast.engine.geometry.mesh import Mesh, is_closed, mesh_components

AXES = np.eye(3, dtype=int)


def random_volume(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def padded(volume, level):
    """The volume with the value of the empty space around it."""
    return np.pad(volume, 1, constant_values=min(volume.min(), level - 1))


def crossings(volume, level):
    """The vertex of each edge of the grid that crosses the isovalue, found edge by edge."""
    values, places = padded(volume, level), []
    for point in product(*map(range, values.shape)):
        for step in AXES:
            other = tuple(point + step)
            if other[int(step.argmax())] >= values.shape[int(step.argmax())]:
                continue
            low, high = values[point], values[other]
            if (low > level) != (high > level):
                part = min(max((level - low) / (high - low), 0.02), 0.98)
                places.append(np.array(point) - 1 + part * step)
    return np.array(places).reshape(-1, 3)


def winding(vertices, faces, point):
    """Winding number of the surface around a point: the sum of the solid angles of its triangles (Van Oosterom,
    1983)."""
    a, b, c = (vertices[faces[:, k]] - point for k in range(3))
    la, lb, lc = (np.linalg.norm(side, axis=1) for side in (a, b, c))
    above = (a * np.cross(b, c)).sum(1)
    below = la * lb * lc + (a * b).sum(1) * lc + (b * c).sum(1) * la + (a * c).sum(1) * lb
    return np.arctan2(above, below).sum() / (2 * np.pi)


def assert_around_what_is_above(volume, level):
    """The surface is closed and goes once around each point above the level, and around no other."""
    vertices, faces = marching_cubes(volume, level)
    assert is_closed(Mesh(vertices, faces))
    inside = padded(volume, level) > level
    for point in product(*map(range, inside.shape)):
        assert round(winding(vertices, faces, np.array(point) - 1)) == inside[point]


def ordered(places):
    """Positions sorted after rounding."""
    return torch.from_numpy(places[np.lexsort(places.round(9).T)])


def test_marching_cubes_every_case():
    """All 256 cases of a cube have the right winding number at every corner."""
    module._cases.cache_clear()
    for case in range(256):
        inside = np.array([bool(case >> corner & 1) for corner in range(8)])
        volume = np.full((2, 2, 2), -1.0)
        volume[tuple(CORNERS.T)] = np.where(inside, 1.0, -1.0)
        assert_around_what_is_above(volume, 0.0)


@pytest.mark.parametrize("level", [0.0, 0.7, -3.0, 2.5])
def test_marching_cubes_vertices(level):
    """Vertices agree with a search edge by edge, on a grid with three different sides."""
    volume = random_volume(4, 5, 7)
    vertices, faces = marching_cubes(volume, level)
    check_fp64("vertices", ordered(vertices), ordered(crossings(volume, level)))
    assert faces.dtype == np.int64 and set(faces.ravel()) == set(range(len(vertices)))
    assert_around_what_is_above(volume, level)


def test_marching_cubes_random_values():
    """In a large random grid, with all pairs of neighbouring cases, every edge has two triangles."""
    assert is_closed(Mesh(*marching_cubes(random_volume(24, 24, 24), 0.0)))


@pytest.mark.parametrize(
    ("value", "level", "distance"), [(1, 0.5, 1 / 3), (1e9, 0, 0.98), (1e-9, 0, 0.02), (3, 0, 0.75)]
)
def test_marching_cubes_one_point(value, level, distance):
    """Outside of the grid is isovalue - 1; a vertex keeps 2 % of its edge from both ends."""
    vertices, faces = marching_cubes(np.full((1, 1, 1), float(value)), level)
    assert len(faces) == 8
    check_fp64("vertices", ordered(vertices), ordered(distance * np.concatenate([AXES, -AXES])))


def test_marching_cubes_outside_is_below():
    """A value below isovalue - 1 is also that of the outside, so edges at the border end like those within."""
    vertices, _ = marching_cubes(np.array([[[1.0, -3.0]]]), 0.0)
    check_fp64("vertices", ordered(vertices), ordered(0.25 * np.concatenate([AXES, -AXES])))


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_marching_cubes_empty(value):
    """A value at the isovalue counts as below."""
    vertices, faces = marching_cubes(np.full((2, 3, 4), value), 0.0)
    assert vertices.shape == faces.shape == (0, 3)


def test_marching_cubes_diagonal_points():
    """Two inside corners across a face are separated."""
    for plane in range(3):
        flat = np.array([[1.0, -1.0], [-1.0, 1.0]])
        mesh = Mesh(*marching_cubes(np.expand_dims(flat, plane), 0.0))
        assert len(np.unique(mesh_components(mesh))) == 2


@pytest.mark.parametrize("points", [1, 2 * 9 * 10, 3 * 9 * 10 + 7])
def test_marching_cubes_slabs(points, monkeypatch):
    """Slabs of one, two or three layers give the vertices and triangles of the whole."""
    volume = random_volume(5, 7, 8)
    vertices, faces = marching_cubes(volume, 0.1)
    monkeypatch.setattr(module, "LAYER_POINTS", points)
    slabs = marching_cubes(volume, 0.1)
    assert np.array_equal(slabs[0], vertices) and np.array_equal(slabs[1], faces)


@pytest.mark.parametrize(("points", "slabs"), [(1, 6), (2 * 72, 3), (2 * 72 - 1, 6), (5 * 72, 2), (6 * 72, 1)])
def test_marching_cubes_slab_size(points, slabs, monkeypatch):
    """Slabs have as many layers as the limit allows, and at least one."""
    calls, triangles = [], module._triangles

    def watched(volume, level, begin, end, strides):
        calls.append((begin, end))
        return triangles(volume, level, begin, end, strides)

    monkeypatch.setattr(module, "LAYER_POINTS", points)
    monkeypatch.setattr(module, "_triangles", watched)
    marching_cubes(random_volume(5, 6, 7), 0.0)
    layers = max(1, points // 72)
    assert calls == [(layers * number, layers * (number + 1)) for number in range(slabs)]


def faces_of(edge):
    """The faces of the cube that an edge lies in, as pairs (axis, side)."""
    corner, axis = EDGES[edge]
    return {(other, int(CORNERS[corner][other])) for other in range(3) if other != axis}


def test_edges_in_one_face():
    """Two edges are in one face exactly if both lie in the same plane of the cube."""
    for one, other in combinations(range(12), 2):
        assert module._in_one_face(one, other) == bool(faces_of(one) & faces_of(other))


def test_rings_counter_clockwise():
    """The corners of each of six faces are connected by edges and turn left seen from outside."""
    rings = [CORNERS[ring] for ring in module._rings()]
    assert len({tuple(ring.sum(0)) for ring in rings}) == len(rings) == 6
    for ring in rings:
        steps = np.roll(ring, -1, axis=0) - ring
        assert (np.abs(steps).sum(1) == 1).all()
        outwards = ring.mean(0) - 0.5
        for turn in np.cross(steps, np.roll(steps, -1, axis=0)):
            assert np.array_equal(turn, 2 * outwards)


def test_triangulate_diagonals():
    """Every polygon of the 256 cases has two triangles less than corners, and no diagonal in a face."""
    for case in range(256):
        for polygon in module._polygons([bool(case >> corner & 1) for corner in range(8)]):
            triangles = module._triangulate(polygon)
            assert len(triangles) == len(polygon) - 2
            sides = {frozenset(pair) for pair in zip(polygon, polygon[1:] + polygon[:1], strict=True)}
            diagonals = {frozenset(pair) for triangle in triangles for pair in combinations(triangle, 2)}
            assert sides <= diagonals
            assert not any(module._in_one_face(*diagonal) for diagonal in diagonals - sides)


def test_triangulate_polygon_in_one_face():
    """Four edges of one face have no diagonal outside of it, alone or at the end of a longer polygon."""
    face = [edge for edge in range(12) if (0, 0) in faces_of(edge)]
    assert len(face) == 4
    assert module._triangulate(face) is None
    assert module._triangulate(face[:3]) == [[face[0], face[1], face[2]]]
    assert module._triangulate(face[:2]) == []
