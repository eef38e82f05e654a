"""Images of known meshes in known colours, and the state of the renderer."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import RenderConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.geometry.mesh import TensorMesh
from dream_fast.engine.render import mesh as mesh_renderer
from dream_fast.engine.render.base import Shading
from dream_fast.engine.render.mesh import MeshRenderer
from dream_fast.engine.scene.camera import make_cameras, rays
from dream_fast.engine.scene.tet_mesh import TetMesh
from dream_fast.kernels import opposite_corners

SIZE = (6, 10)
# Two cameras, from the front and from a side and above, that look at the middle from z = 3.
CAMERAS = make_cameras(*(torch.tensor(v) for v in ([90.0, 60.0], [0.0, 30.0], [3.0, 4.0], [20.0, 30.0])))


class Field:
    """Colours that are a function of the position; records its points and levels."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Any]] = []

    def __call__(self, points: Tensor, *, active_levels: Any = None) -> SimpleNamespace:
        self.asked.append((points, active_levels))
        return SimpleNamespace(albedo=(points / 4 + 0.5).double())  # of another precision than the image

    def background(self, directions: Tensor) -> Tensor:
        return directions.abs()


def wall() -> TensorMesh:
    """Two triangles that cover all of the images at z = 0.25 and face the cameras."""
    corners = torch.tensor([[-50, -50, 0.25], [50, -50, 0.25], [50, 50, 0.25], [-50, 50, 0.25]])
    return TensorMesh(corners, torch.tensor([[0, 1, 2], [0, 2, 3]]))


def box(side: float = 0.5) -> TensorMesh:
    mesh = trimesh.creation.box((side, side, side))
    return TensorMesh(torch.tensor(mesh.vertices).float(), torch.tensor(mesh.faces))


def renderer(surface: TensorMesh | None = None, locked: bool = False, **settings: Any) -> MeshRenderer:
    shape: Any = TetMesh(8, 0.6, locked=locked)
    if surface is not None:
        shape = SimpleNamespace(surface=lambda: surface, locked=locked)
    return MeshRenderer(Field(), RenderConfig(**settings), shape)


def test_train_views_wall() -> None:
    """A wall is opaque, with the normal, distance and colour of the ray's intersection."""
    surface = wall()
    subject = renderer(surface)
    rendered = subject.train_views(CAMERAS, *SIZE, background=torch.zeros(3))
    depths, colours = [], []
    for dtype in (torch.float32, torch.float64):
        origins, directions = (part.reshape(-1, 3).to(dtype) for part in rays(CAMERAS, *SIZE))
        depth = (0.25 - origins[:, 2]) / directions[:, 2]
        depths.append(depth)
        colours.append((origins + depth[:, None] * directions) / 4 + 0.5)
    shape, rows = (2, *SIZE), 2 * SIZE[0] * SIZE[1]
    assert (
        rendered.rgb.shape == rendered.normal.shape == (*shape, 3)
        and rendered.opacity.shape == rendered.depth.shape == shape
    )
    assert torch.equal(rendered.opacity, torch.ones(shape))
    normal = torch.tensor([0.0, 0.0, 1.0]).expand(*shape, 3)
    check("normal", rendered.normal, normal, normal.double())
    check("depth", rendered.depth.flatten(), *depths)
    check("rgb", rendered.rgb.view(-1, 3), *colours)
    assert rendered.rgb.dtype == torch.float32
    assert rendered.surface is surface and torch.equal(rendered.opposite, opposite_corners(surface.faces))
    assert int(rendered.sample_count) == rows and rendered.overflow.dtype == torch.bool and not rendered.overflow


def test_train_views_field_points() -> None:
    """Each visible point is evaluated once, without a gradient into the shape; levels are passed on."""
    subject = renderer(box())
    subject.shape.surface = lambda: box()._replace(vertices=box().vertices.requires_grad_())
    rendered = subject.train_views(CAMERAS, 20, 20, active_levels=3)
    ((points, levels),) = subject.field.asked
    assert levels == 3 and not points.requires_grad and int(rendered.sample_count) == len(points)
    assert 0 < len(points) < 2 * 20 * 20
    on_box = points.abs().amax(1)
    check("places", on_box, torch.full_like(on_box, 0.25), torch.full_like(on_box, 0.25).double())
    inside = (rendered.opacity == 1).sum()
    assert inside <= len(points) <= (rendered.opacity > 0).sum()


def test_train_views_background() -> None:
    """A given background, [3] or [B, H, W, 3], or the field's is used; silhouettes are blended."""
    subject = renderer(box())
    _, directions = (part.view(2, 20, 20, 3) for part in rays(CAMERAS, 20, 20))
    black = subject.train_views(CAMERAS, 20, 20, background=torch.zeros(3))
    assert ((black.opacity > 0) & (black.opacity < 1)).any()
    given = torch.rand(2, 20, 20, 3, generator=torch.Generator().manual_seed(0))
    for background, behind in ((torch.tensor([0.0, 1.0, 0.5]), None), (given, given), (None, directions.abs())):
        rendered = subject.train_views(CAMERAS, 20, 20, background=background)
        behind = background if behind is None else behind
        assert torch.equal(rendered.rgb, black.rgb + (1 - black.opacity)[..., None] * behind)
        assert torch.equal(rendered.opacity, black.opacity)


def test_train_views_shading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shading is that of the call, albedo by default."""
    calls = []

    def shade(shading: Shading, albedo: Tensor, normal: Tensor) -> Tensor:
        calls.append(shading)
        assert albedo.shape == normal.shape == (2 * SIZE[0] * SIZE[1], 3)
        return albedo

    monkeypatch.setattr(mesh_renderer, "shade", shade)
    subject = renderer(wall())
    light = torch.tensor([0.0, 0.0, 1.0])
    subject.train_views(CAMERAS, *SIZE)
    subject.train_views(CAMERAS, *SIZE, Shading("normal", 0.25, light))
    assert calls == [("albedo", 1.0, None), ("normal", 0.25, light)]


@pytest.mark.parametrize(("min_near", "near"), [(0.0, 0.01), (0.005, 0.01), (0.3, 0.3)])
def test_train_views_near_plane(monkeypatch: pytest.MonkeyPatch, min_near: float, near: float) -> None:
    """The near plane is at min_near, and at least at 0.01."""
    calls, positions = [], mesh_renderer.clip_positions

    def recorded(*words: Any) -> Tensor:
        calls.append(words[2:])
        return positions(*words)

    monkeypatch.setattr(mesh_renderer, "clip_positions", recorded)
    renderer(box(), min_near=min_near).train_views(CAMERAS, *SIZE)
    assert calls == [(*SIZE, near)]


def test_view_normals() -> None:
    """Normals have unit length also at silhouettes; colours, depths and opacities are those of the image."""
    subject, black = renderer(box()), torch.zeros(3)
    view = subject.view(CAMERAS, 20, 20, background=black)
    rendered = subject.train_views(CAMERAS, 20, 20, background=black)
    there = view.opacity > 0
    assert ((view.opacity > 0) & (view.opacity < 1)).any() and not there.all()
    length = view.normal.norm(dim=-1)[there]
    check("length", length, torch.ones_like(length), torch.ones_like(length).double())
    assert not view.normal[~there].any()
    for name in ("rgb", "depth", "opacity"):
        got, expected = getattr(view, name), getattr(rendered, name)
        check(name, got.reshape(expected.shape), expected, expected.double())
    partly = rendered.normal.norm(dim=-1) < 0.5
    along = (view.normal * rendered.normal).sum(-1)
    assert (along[partly & there] >= 0).all() and (along[rendered.opacity == 1] > 0.99).all()


# What is kept


def test_surface_unlocked() -> None:
    """Each surface is that of the present distances, and differentiable."""
    subject = renderer()
    first, second = subject.surface(), subject.surface()
    assert first is not second and torch.equal(first.vertices, second.vertices) and first.vertices.requires_grad


def test_surface_locked() -> None:
    """A locked surface is computed once and has no gradient."""
    subject = renderer(locked=True)
    first = subject.surface()
    again = subject.surface()
    assert again is subject.surface() and not again.vertices.requires_grad
    assert torch.equal(first.vertices, again.vertices) and torch.equal(first.faces, again.faces)


def test_surface_vanished() -> None:
    """The message has the settings that can be changed."""
    subject = renderer(TensorMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)))
    with pytest.raises(UserError) as caught:
        subject.surface()
    assert str(caught.value) == (
        "the surface has vanished: every vertex of the tetrahedral grid lies outside (start from something larger "
        "with --init_with, or lower --lr)"
    )


def with_floater() -> TensorMesh:
    """A box, and one of a hundredth of its size beside it."""
    floater = box(0.005)
    return TensorMesh(
        torch.cat([box().vertices, floater.vertices + 0.5]).requires_grad_(),
        torch.cat([box().faces, floater.faces + 8]),
    )


def test_mesh_without_floaters() -> None:
    """The mesh is on the host in fp64, without gradients and floaters."""
    mesh = renderer(with_floater()).mesh()
    assert type(mesh.vertices) is type(mesh.faces) is np.ndarray
    assert mesh.vertices.dtype == np.float64 and mesh.faces.dtype == np.int64
    assert sorted(map(tuple, mesh.vertices.tolist())) == sorted(map(tuple, box().vertices.tolist()))
    assert mesh.faces.shape == (12, 3)


@pytest.mark.parametrize("locked", [False, True])
def test_without_floaters_restores(locked: bool) -> None:
    """Inside the block the surface has no floaters; an error restores the former one."""
    subject = renderer(with_floater(), locked=locked)
    whole = subject.surface()
    with pytest.raises(KeyError), subject.without_floaters():
        inside = subject.surface()
        assert inside is subject.surface() and len(inside.faces) == 12
        assert inside.vertices.dtype == torch.float32 and inside.faces.dtype == torch.int64
        raise KeyError
    again = subject.surface()
    assert torch.equal(again.vertices, whole.vertices) and len(again.faces) == 24


def test_load_state_dict() -> None:
    """A locked surface is computed again after a state is loaded."""
    smaller, subject = (renderer(locked=True) for _ in range(2))
    with torch.no_grad():
        smaller.shape.sdf.sub_(0.5)
    before = subject.surface()
    subject.load_state_dict(smaller.state_dict())
    assert sorted(subject.state_dict()) == sorted(smaller.shape.checkpoint_state())
    assert torch.equal(subject.surface().vertices, smaller.surface().vertices)
    assert len(subject.surface().vertices) != len(before.vertices)


def test_no_occupancy() -> None:
    """It has neither an occupancy grid nor sample buffers."""
    subject = renderer(box())
    subject.update_occupancy(None, active_levels=1)
    subject.adapt_capacity(10)
    assert subject.field.asked == [] and torch.equal(subject.surface().vertices, box().vertices)
