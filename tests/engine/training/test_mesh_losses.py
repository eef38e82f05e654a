"""The regularisers of a mesh, against closed forms and written-out sums."""

import torch
import trimesh

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.sections import LossConfig
from dream_fast.engine.geometry.mesh import TensorMesh
from dream_fast.engine.training import losses
from dream_fast.engine.training.losses import laplacian, mesh_regularizers, normal_consistency
from dream_fast.kernels import opposite_corners


def check_value(name, got, exact):
    """Compare a number in fp64 with an exact one."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    check(name, got.detach(), exact, exact)


def from_trimesh(mesh: trimesh.Trimesh, dtype=torch.float32) -> TensorMesh:
    return TensorMesh(torch.tensor(mesh.vertices).to(dtype), torch.tensor(mesh.faces))


def test_normal_consistency():
    """A cube and a plane have their closed forms."""
    cube = from_trimesh(trimesh.creation.box((1, 1, 1)), torch.float64)
    # 12 edges at right angles, 6 diagonals in a plane.
    check_value("cube", normal_consistency(cube, opposite_corners(cube.faces)), 12 / 18)
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=torch.float64)
    flat = TensorMesh(corners, torch.tensor([[0, 1, 2], [2, 1, 3]]))
    check_value("plane", normal_consistency(flat, opposite_corners(flat.faces)), 0.0)


def test_laplacian():
    """The result equals a written-out sum."""
    mesh = from_trimesh(trimesh.creation.icosphere(1), torch.float64)
    by_hand = []
    for number, place in enumerate(mesh.vertices):
        neighbours = {int(v) for face in mesh.faces if number in face for v in face} - {number}
        by_hand.append(sum(place - mesh.vertices[v] for v in neighbours).norm())
    check_value("laplacian", laplacian(mesh), torch.stack(by_hand).mean())


def test_normal_consistency_small_faces():
    """Small triangles count less."""
    mesh = from_trimesh(trimesh.creation.box((1, 1, 1)), torch.float64)
    beyond = opposite_corners(mesh.faces)
    counts = losses._edge_weights(torch.tensor([1.0, 1.0, 0.5, 1.5]), torch.tensor([[1, 2, 3]] * 4))
    assert counts.tolist() == [[1, 0.5, 1], [1, 0.5, 1], [0.5, 0.5, 0.5], [1, 0.5, 1.0]]
    # A sliver between two faces of a box turns with the slightest movement, and pulls no harder than the others.
    places, faces = mesh.vertices.clone(), mesh.faces.clone()
    a, b, c = faces[0].tolist()
    middle = (places[b] + places[c]) / 2 + torch.tensor([1e-6, 2e-6, -1e-6], dtype=torch.float64)
    sliver = TensorMesh(
        torch.cat([places, middle[None]]).requires_grad_(),
        torch.cat([faces[1:], torch.tensor([[a, b, 8], [a, 8, c], [b, c, 8]])]),
    )
    normal_consistency(sliver, opposite_corners(sliver.faces)).backward()
    assert beyond.min() >= 0 and sliver.vertices.grad.norm(dim=1).max() < 3


def test_mesh_regularizers_gradients(monkeypatch):
    """Terms have gradients and weights."""
    # How much an edge counts is no part of the gradient.
    monkeypatch.setattr(losses, "_edge_weights", lambda area, other: torch.ones_like(other, dtype=area.dtype))
    mesh = from_trimesh(trimesh.creation.icosphere(1), torch.float64)
    generator = torch.Generator().manual_seed(0)
    places = (mesh.vertices + 0.05 * torch.randn(mesh.vertices.shape, generator=generator).double()).requires_grad_()
    beyond = opposite_corners(mesh.faces)

    def terms(x):
        return tuple(mesh_regularizers(TensorMesh(x, mesh.faces), beyond, LossConfig()).values())

    assert torch.autograd.gradcheck(terms, (places,))
    surface = TensorMesh(places, mesh.faces)
    one = mesh_regularizers(surface, beyond, LossConfig(lambda_mesh_normal=1.0, lambda_mesh_laplacian=0.0))
    assert one["mesh_normal"] == normal_consistency(surface, beyond) and len(one) == 1
    annealed = LossConfig(lambda_mesh_laplacian=LinearSchedule(0.0, 0.0, 1.0, 1.0))
    now = mesh_regularizers(surface, beyond, annealed, {"lambda_mesh_laplacian": 0.25})
    assert now["mesh_laplacian"] == laplacian(surface) / 4


def test_mesh_regularizers_collapsed_mesh():
    """Terms of a collapsed mesh are finite."""
    mesh = TensorMesh(torch.zeros(3, 3, requires_grad=True), torch.tensor([[0, 1, 2], [0, 2, 1]]))
    sum(mesh_regularizers(mesh, opposite_corners(mesh.faces), LossConfig()).values()).backward()
    assert torch.isfinite(mesh.vertices.grad).all()
