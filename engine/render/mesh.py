"""Rendering of a mesh in the colours of a field: rasterised, shaded and antialiased.

The shadings are those of a field, with smooth normals. Colours are the field's at the visible points. Gradients of
colours reach the field and not the mesh. The mesh gets gradients at its silhouettes, which antialiasing blends, and
from normals where a shading shows them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.engine.config.sections import RenderConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.geometry.mesh import Mesh, TensorMesh, vertex_normals, visible_parts
from dream_fast.engine.render.base import ALBEDO, RenderedImages, RenderedMesh, Renderer, Shading, shade
from dream_fast.engine.scene.camera import Cameras, clip_positions, rays
from dream_fast.engine.scene.field import Field
from dream_fast.engine.scene.tet_mesh import TetMesh

MIN_NEAR_PLANE = 0.01  # world units; at 0 all depths would be one


class MeshRenderer(Renderer):
    """Renders the surface of a `TetMesh` in the colours of a field."""

    def __init__(self, field: Field, config: RenderConfig, shape: TetMesh):
        self.field, self.config, self.shape = field, config, shape
        self._surface: TensorMesh | None = None  # computed once for many views

    def surface(self) -> TensorMesh:
        """The rendered surface. Raises UserError: when it is empty."""
        if self._surface is not None:
            return self._surface
        surface = self.shape.surface()
        if len(surface.faces) == 0:
            raise UserError(
                "the surface has vanished: every vertex of the tetrahedral grid lies outside (start from something "
                "larger with --init_with, or lower --lr)"
            )
        if self.shape.locked:
            self._surface = TensorMesh(surface.vertices.detach(), surface.faces)
        return surface

    def mesh(self) -> Mesh:
        """The surface as it is exported: on the host, without floaters."""
        with torch.no_grad():
            surface = self.surface()
        return visible_parts(surface.to_host())

    def train_views(
        self,
        cameras: Cameras,
        height: int,
        width: int,
        shading: Shading = ALBEDO,
        *,
        background: Tensor | None = None,
        need_normals: bool = False,
        active_levels: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> RenderedMesh:
        """Images of B cameras with gradients into field and mesh; normals are always there."""
        surface = self.surface()
        origins, directions = (part.reshape(-1, 3) for part in rays(cameras, height, width))
        clip = clip_positions(cameras, surface.vertices, height, width, max(self.config.min_near, MIN_NEAR_PLANE))
        fragments = kernels.rasterize(clip, surface.faces, height, width)
        shape = fragments.triangle.shape  # B, H, W
        attributes = torch.cat([surface.vertices, vertex_normals(surface)], dim=1)
        points, normal = kernels.interpolate(attributes, surface.faces, fragments).view(-1, 6).split(3, dim=1)
        normal = normal * normal.square().sum(1, keepdim=True).clamp(min=1e-12).rsqrt()
        covered = fragments.triangle.view(-1) >= 0
        pixel = covered.nonzero()[:, 0]
        values = self.field(points.detach().index_select(0, pixel), active_levels=active_levels)
        albedo = torch.zeros_like(points).index_copy(0, pixel, values.albedo.to(points.dtype))
        if shading.light is not None and shading.light.dim() == 2:
            shading = shading._replace(light=shading.light[:, None, None].expand(*shape, 3).reshape(-1, 3))
        colour = shade(shading, albedo, normal)
        distance = (points - origins).norm(dim=1, keepdim=True)
        inside = covered[:, None].to(colour.dtype)
        channels = torch.cat([inside * colour, inside, normal, inside * distance], dim=1).view(*shape, 8)
        opposite = kernels.opposite_corners(surface.faces)
        smooth = kernels.antialias(channels, clip, surface.faces, fragments, opposite)
        if background is None:
            background = self.field.background(directions).view(*shape, 3)
        rgb, opacity, normal, depth = smooth.split([3, 1, 3, 1], dim=-1)
        return RenderedMesh(
            rgb=rgb + (1 - opacity) * background,
            opacity=opacity[..., 0],
            depth=depth[..., 0],
            normal=normal,
            surface=surface,
            opposite=opposite,
            sample_count=torch.tensor(len(pixel)),
            overflow=torch.zeros((), dtype=torch.bool, device=clip.device),
        )

    def render_unshaded(
        self, camera: Cameras, origins: Tensor, directions: Tensor, background: Tensor, normals: bool
    ) -> RenderedImages:
        height, width = directions.shape[:2]
        rendered = self.train_views(camera, height, width, background=background)
        length = rendered.normal.norm(dim=-1, keepdim=True)
        unit = torch.where(length > 0, rendered.normal / length.clamp(min=1e-12), 0)
        return RenderedImages(rendered.rgb[0], unit[0], rendered.depth[0], rendered.opacity[0])

    @contextmanager
    def without_floaters(self) -> Iterator[None]:
        """Inside the `with` block the surface is the present one without small parts apart from the object."""
        before = self._surface
        self._surface = self.mesh().to_tensors(self.field.device)
        try:
            yield
        finally:
            self._surface = before

    @property
    def samples_per_ray(self) -> int:
        return 0

    def update_occupancy(self, generator: torch.Generator | None, *, active_levels: int | Tensor | None = None) -> None:
        """A mesh has no occupancy grid."""

    def adapt_capacity(self, rays: int) -> None:
        """A mesh has no sample buffers."""

    def state_dict(self) -> dict[str, Tensor]:
        return self.shape.checkpoint_state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.shape.load_checkpoint_state(state)
        self._surface = None
