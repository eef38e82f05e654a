"""Pictures of a mesh whose colours are a field's: rasterised, shaded and antialiased.

The same shadings as of a field, with smooth normals. Colours are those of the field at the points that pixels see; what
they teach the field teaches the shape nothing. The shape learns from its silhouettes, which antialiasing moves, and
from normals where a shading shows them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.engine.config.schema import RenderConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.geometry.mesh import Mesh, visible_parts
from dream_fast.engine.geometry.tet_grid import TriMesh, vertex_normals
from dream_fast.engine.render.volume import Renderer, shade
from dream_fast.engine.scene.camera import Cameras, clip_positions, rays
from dream_fast.engine.scene.field import Field
from dream_fast.engine.scene.tet_mesh import TetMesh

LEAST_NEAR = 0.01  # of the near plane: at 0 all depths would be one


class RenderedMesh(NamedTuple):
    """A differentiable picture of R pixels, and what it shows."""

    rgb: Tensor  # [R, 3] over the background
    opacity: Tensor  # [R] 1 inside, 0 outside, between them at silhouettes
    depth: Tensor  # [R] opacity * distance along the ray, world units
    normal: Tensor  # [R, 3] opacity * normal
    surface: TriMesh
    beyond: Tensor  # opposite_corners of its faces
    count: Tensor  # points at which the field was asked
    overflow: Tensor  # bool, never


class MeshRenderer(Renderer):
    """Renders the surface of a `TetMesh` in the colours of a field."""

    def __init__(self, field: Field, config: RenderConfig, shape: TetMesh):
        self.field, self.config, self.shape = field, config, shape
        self._surface: TriMesh | None = None  # one that is looked at from many sides

    def surface(self) -> TriMesh:
        """What is rendered. UserError: nothing is left of it."""
        if self._surface is not None:
            return self._surface
        found = self.shape.surface()
        if len(found.faces) == 0:
            raise UserError(
                "the surface has vanished: every vertex of the tetrahedral grid lies outside (start from something "
                "larger with --init_with, or lower --lr)"
            )
        if self.shape.locked:
            self._surface = TriMesh(found.vertices.detach(), found.faces)
        return found

    def mesh(self) -> Mesh:
        """The surface for a file, without floaters, on the host."""
        with torch.no_grad():
            surface = self.surface()
        return visible_parts(Mesh(surface.vertices.detach().cpu().double().numpy(), surface.faces.cpu().numpy()))

    # ------------------------------------------------------------------------------------------------- training

    def update_occupancy(self, generator: torch.Generator | None, *, active_levels: int | Tensor | None = None) -> None:
        """A mesh has no occupancy grid."""

    def train_views(
        self,
        cameras: Cameras,
        height: int,
        width: int,
        *,
        shading: str = "albedo",
        ambient: float | Tensor = 1.0,
        light: Tensor | None = None,
        background: Tensor | None = None,
        need_normals: bool = False,
        active_levels: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> RenderedMesh:
        """Pictures of B cameras, R = B height width, with gradients into field and shape; options as `train_rays`."""
        surface = self.surface()
        origins, directions = (part.reshape(-1, 3) for part in rays(cameras, height, width))
        clip = clip_positions(cameras, surface.vertices, height, width, max(self.config.min_near, LEAST_NEAR))
        seen = kernels.rasterize(clip, surface.faces, height, width)
        attributes = torch.cat([surface.vertices, vertex_normals(surface)], dim=1)
        points, normal = kernels.interpolate(attributes, surface.faces, seen).view(-1, 6).split(3, dim=1)
        normal = normal * normal.square().sum(1, keepdim=True).clamp(min=1e-12).rsqrt()
        covered = seen.triangle.view(-1) >= 0
        pixel = covered.nonzero()[:, 0]
        values = self.field(points.detach().index_select(0, pixel), active_levels=active_levels)
        albedo = torch.zeros_like(points).index_copy(0, pixel, values.albedo.to(points.dtype))
        colour = shade(shading, albedo, normal, light, ambient)
        distance = (points - origins).norm(dim=1, keepdim=True)
        inside = covered[:, None].to(colour.dtype)
        channels = torch.cat([inside * colour, inside, normal, inside * distance], dim=1)
        beyond = kernels.opposite_corners(surface.faces)
        smooth = kernels.antialias(channels.view(*seen.triangle.shape, 8), clip, surface.faces, seen, beyond).view(
            -1, 8
        )
        if background is None:
            background = self.field.background(directions)
        rgb, opacity, normal, depth = smooth.split([3, 1, 3, 1], dim=1)
        return RenderedMesh(
            rgb=rgb + (1 - opacity) * background,
            opacity=opacity[:, 0],
            depth=depth[:, 0],
            normal=normal,
            surface=surface,
            beyond=beyond,
            count=torch.tensor(len(pixel)),
            overflow=torch.zeros((), dtype=torch.bool, device=clip.device),
        )

    # -------------------------------------------------------------------------------------------------- looking

    def _look(
        self,
        camera: Cameras,
        height: int,
        width: int,
        origins: Tensor,
        directions: Tensor,
        background: Tensor,
        normals: bool,
    ) -> kernels.View:
        seen = self.train_views(camera, height, width, background=background)
        length = seen.normal.norm(dim=1, keepdim=True)
        unit = torch.where(length > 0, seen.normal / length.clamp(min=1e-12), 0)
        return kernels.View(seen.rgb, unit, seen.depth, seen.opacity)

    @contextmanager
    def without_floaters(self) -> Iterator[None]:
        """Inside the `with` block the surface stays what it is now, without small parts apart from the object."""
        mesh, before = self.mesh(), self._surface
        device = self.field.device
        self._surface = TriMesh(
            torch.from_numpy(mesh.vertices).float().to(device), torch.from_numpy(mesh.faces).to(device)
        )
        try:
            yield
        finally:
            self._surface = before

    # ------------------------------------------------------------------------------------------------------ state

    def adapt_capacity(self, rays: int) -> None:
        """The buffers fit always."""

    def state_dict(self) -> dict[str, Tensor]:
        return self.shape.kept_state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.shape.load_kept_state(state)
        self._surface = None
