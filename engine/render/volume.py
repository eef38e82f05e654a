"""Rendering of a field's density: samples on rays, field, shading and compositing."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.engine.config.sections import RenderConfig
from dream_fast.engine.render.base import (
    ALBEDO,
    Rendered,
    RenderedImages,
    Renderer,
    Shading,
    check_shading,
    shade,
)
from dream_fast.engine.render.ray_samplers import make_sampler, march_options
from dream_fast.engine.scene.camera import Cameras, rays
from dream_fast.engine.scene.field import Field

INFERENCE_SAMPLES = 1 << 17  # evaluated together where no operator renders; a GPU takes more


class VolumeRenderer(Renderer):
    """Renders a field with the samples of its `sampler`; shading and compositing do not depend on the backbone."""

    def __init__(self, field: Field, config: RenderConfig):
        self.field, self.config = field, config
        self.sampler = make_sampler(field, config)

    @property
    def samples_per_ray(self) -> int:
        return self.sampler.samples_per_ray

    def update_occupancy(self, generator: torch.Generator | None, *, active_levels: int | Tensor | None = None) -> None:
        self.sampler.update(generator, active_levels=active_levels)

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
    ) -> Rendered:
        if shading.light is not None and shading.light.dim() == 2:
            shading = shading._replace(light=shading.light[:, None, None])
        origins, directions = rays(cameras, height, width)
        return self.train_rays(
            origins.unflatten(1, (height, width)),
            directions.unflatten(1, (height, width)),
            shading,
            background=background,
            need_normals=need_normals,
            active_levels=active_levels,
            generator=generator,
        )

    def train_rays(
        self,
        origins: Tensor,
        directions: Tensor,
        shading: Shading = ALBEDO,
        *,
        background: Tensor | None = None,
        need_normals: bool = False,
        active_levels: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Rendered:
        """Render rays [..., 3] with gradients into the field, as `train_views`; results have the shape of the rays.

        Light and background are [3] or broadcast to the rays. Raises ValueError: when the shading is unknown.
        """
        check_shading(shading)
        shape = directions.shape
        origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)
        samples = self.sampler.sample(origins, directions, generator, active_levels=active_levels)
        values = self.field(
            samples.positions,
            active_levels=active_levels,
            count=samples.count,
            normals=self.config.normals if need_normals or shading.mode != "albedo" else None,
            normal_epsilon=self.config.normal_epsilon,
        )
        if shading.light is not None and shading.light.dim() > 1:
            light = shading.light.expand(shape).reshape(-1, 3)
            shading = shading._replace(light=light.index_select(0, samples.ray_ids))
        channels = shade(shading, values.albedo, values.normal)
        if values.normal is not None:
            channels = torch.cat([channels, values.normal], dim=-1)
        out = kernels.composite(values.sigma, channels, samples.t, samples.dt, samples.offsets, count=samples.count)
        if background is None:
            background = self.field.background(directions).view(shape)
        opacity = out.opacity.view(shape[:-1])
        return Rendered(
            rgb=out.values[:, :3].view(shape) + (1 - opacity)[..., None] * background,
            opacity=opacity,
            depth=out.depth.view(shape[:-1]),
            normal=None if values.normal is None else out.values[:, 3:].view(shape),
            weights=out.weights,
            sample_normals=values.normal,
            sample_directions=directions.index_select(0, samples.ray_ids),
            samples=samples,
            overflow=samples.overflow,
        )

    def render_unshaded(
        self, camera: Cameras, origins: Tensor, directions: Tensor, background: Tensor, normals: bool
    ) -> RenderedImages:
        shape = directions.shape[:-1]
        origins, directions, background = (part.reshape(-1, 3) for part in (origins, directions, background))
        if self.sampler.bits is None:
            image = self._render_chunks(origins, directions, background, normals)
        else:
            image = self.field.render_rays(
                origins,
                directions,
                self.sampler.bits,
                background=background,
                normals=normals,
                normal_epsilon=self.config.normal_epsilon,
                **march_options(self.config),
            )
        return RenderedImages(*(part.unflatten(0, shape) for part in image))

    def _render_chunks(self, origins: Tensor, directions: Tensor, background: Tensor, normals: bool) -> kernels.View:
        """Rays [R, 3] that have the same number of samples each, some at a time."""
        samples = INFERENCE_SAMPLES * (32 if directions.is_cuda else 1)
        size = max(1, samples // self.sampler.samples_per_ray)
        chunks = zip(origins.split(size), directions.split(size), background.split(size), strict=True)
        return kernels.View(*map(torch.cat, zip(*(self._render_chunk(*c, normals) for c in chunks), strict=True)))

    def _render_chunk(self, origins: Tensor, directions: Tensor, background: Tensor, normals: bool) -> kernels.View:
        rendered = self.train_rays(origins, directions, background=background)
        normal = torch.zeros_like(origins)
        if normals:
            expected = rendered.depth / rendered.opacity.clamp(min=kernels.EMPTY_OPACITY)
            surface = origins + expected[:, None] * directions
            covered = (rendered.opacity > kernels.EMPTY_OPACITY)[:, None]
            values = self.field(surface, normals="finite_difference", normal_epsilon=self.config.normal_epsilon)
            normal = torch.where(covered, values.normal, 0)
        return kernels.View(rendered.rgb, normal, rendered.depth, rendered.opacity)

    def without_floaters(self) -> AbstractContextManager[None]:
        return self.sampler.without_floaters()

    def adapt_capacity(self, rays: int) -> None:
        self.sampler.adapt_capacity(rays)

    def state_dict(self) -> dict[str, Tensor]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sampler.load_state_dict(state)
