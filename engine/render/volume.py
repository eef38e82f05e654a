"""From rays to images: samples, field, shading and compositing.

`Renderer.train_rays` is differentiable and returns what the losses need; `Renderer.view` looks at the scene without a
gradient, at any size. Shadings, with n the normal, l the unit direction to the light and a the ambient share:

    albedo       the field's colour
    textureless  a + (1 - a) max(0, n.l)
    lambertian   albedo * textureless
    normal       (n + 1) / 2
"""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.engine.config.schema import RenderConfig
from dream_fast.engine.render.ray_samplers import ImportanceSampler, make_sampler
from dream_fast.engine.scene.camera import Cameras, rays
from dream_fast.engine.scene.field import Field

SHADINGS = ("albedo", "lambertian", "textureless", "normal")
VIEW_SAMPLES = 1 << 17  # evaluated together when looking, where no operator does it; a GPU takes more


class Rendered(NamedTuple):
    """A differentiable render of R rays with S rows of samples; rows from `samples.count` on are padding."""

    rgb: Tensor  # [R, 3] over the background
    opacity: Tensor  # [R]
    depth: Tensor  # [R] sum of weight * distance along the ray, world units
    normal: Tensor | None  # [R, 3] sum of weight * normal, None when no normals were needed
    weights: Tensor  # [S]
    sample_normals: Tensor | None  # [S, 3] unit, outward
    sample_directions: Tensor  # [S, 3] the ray's direction
    samples: kernels.Samples
    overflow: Tensor  # bool, some samples did not fit the capacity

    @property
    def count(self) -> Tensor:
        """How many samples there were."""
        return self.samples.count


class View(NamedTuple):
    """Images of B cameras, without gradient."""

    rgb: Tensor  # [B, H, W, 3] in [0, 1]
    normal: Tensor  # [B, H, W, 3] world normals, 0 where nothing is
    depth: Tensor  # [B, H, W] sum of weight * distance along the ray, world units
    opacity: Tensor  # [B, H, W]


class Renderer:
    """Renders a field: the same shading and compositing whatever the backbone, with samples from its `sampler`."""

    def __init__(self, field: Field, config: RenderConfig):
        self.field, self.config = field, config
        self.sampler = make_sampler(field, config)

    def update_occupancy(self, generator: torch.Generator | None, *, active_levels: int | Tensor | None = None) -> None:
        """Look at the density once in every cell of the occupancy grid, where there is one."""
        self.sampler.update(generator, active_levels=active_levels)

    # ------------------------------------------------------------------------------------------------- training

    def train_views(self, cameras: Cameras, height: int, width: int, **options) -> Rendered:
        """`train_rays` of the rays of all pixels of the cameras."""
        return self.train_rays(*rays(cameras, height, width), **options)

    def train_rays(
        self,
        origins: Tensor,
        directions: Tensor,
        *,
        shading: str = "albedo",
        ambient: float | Tensor = 1.0,
        light: Tensor | None = None,
        background: Tensor | None = None,
        need_normals: bool = False,
        active_levels: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Rendered:
        """Render rays [..., 3] (flattened to R) with gradients into the field.

        `light` is the unit direction to the light, [3] or [R, 3]. `background` is [3] or [R, 3]; None takes the
        background network. `need_normals` asks for normals that the shading itself does not need. With a generator
        the first sample of each ray is moved by a random part of a step.
        """
        if shading not in SHADINGS:
            raise ValueError(f"shading is {shading!r}, expected one of {', '.join(SHADINGS)}")
        origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)
        samples = self.sampler.sample(origins, directions, generator, active_levels=active_levels)
        ray_directions = directions.index_select(0, samples.ray_ids)
        values = self.field(
            samples.positions,
            active_levels=active_levels,
            count=samples.count,
            normals=self.config.normals if need_normals or shading != "albedo" else None,
            normal_epsilon=self.config.normal_epsilon,
        )
        if light is not None and light.dim() == 2:
            light = light.index_select(0, samples.ray_ids)
        channels = shade(shading, values.albedo, values.normal, light, ambient)
        if values.normal is not None:
            channels = torch.cat([channels, values.normal], dim=-1)
        out = kernels.composite(values.sigma, channels, samples.t, samples.dt, samples.offsets, count=samples.count)
        if background is None:
            background = self.field.background(directions)
        return Rendered(
            rgb=out.values[:, :3] + (1 - out.opacity)[:, None] * background,
            opacity=out.opacity,
            depth=out.depth,
            normal=None if values.normal is None else out.values[:, 3:],
            weights=out.weights,
            sample_normals=values.normal,
            sample_directions=ray_directions,
            samples=samples,
            overflow=samples.overflow,
        )

    # -------------------------------------------------------------------------------------------------- looking

    @torch.no_grad()
    def view(
        self,
        cameras: Cameras,
        height: int,
        width: int,
        *,
        background: Tensor | None = None,
        shading: str = "albedo",
        ambient: float = 0.1,
        light: Tensor | None = None,
        normals: bool = True,
    ) -> View:
        """Images of the cameras, one after the other. `background` is [3]; None takes the network, or white.

        `light` [3] is the unit direction to a light that shades; None puts it at the camera. Shadings act on the
        normal at the expected depth. Without `normals` (and with albedo shading) the normal image is 0.
        """
        if shading not in SHADINGS:
            raise ValueError(f"shading is {shading!r}, expected one of {', '.join(SHADINGS)}")
        views = []
        for number in range(len(cameras.fovy)):
            camera = Cameras(*(part[number : number + 1] for part in cameras))
            origins, directions = (part[0] for part in rays(camera, height, width))
            behind = self._background(directions, background)
            seen = self._look(camera, height, width, origins, directions, behind, normals or shading != "albedo")
            rgb = seen.rgb
            if shading != "albedo":
                toward = -directions if light is None else light
                opacity = seen.opacity[:, None]
                behind = (1 - opacity) * behind
                if shading == "lambertian":
                    surface = shade(shading, rgb - behind, seen.normal, toward, ambient)
                else:
                    surface = opacity * shade(shading, rgb, seen.normal, toward, ambient)
                rgb = behind + surface
            views.append(View(rgb, seen.normal, seen.depth, seen.opacity))
        return View(*(torch.stack(part).unflatten(1, (height, width)) for part in zip(*views, strict=True)))

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
        """The R pixels of one camera, whose rays [R, 3] these are, over a background [R, 3], unshaded, with the normal
        at the expected depth."""
        if isinstance(self.sampler, ImportanceSampler):
            samples = VIEW_SAMPLES * (32 if directions.is_cuda else 1)
            chunk = max(1, samples // self.sampler.samples_per_ray)
            parts = zip(origins.split(chunk), directions.split(chunk), background.split(chunk), strict=True)
            return kernels.View(*map(torch.cat, zip(*(self._look_evenly(*p, normals) for p in parts), strict=True)))
        field = self.field
        operator = kernels.render_reference if field.use_reference else kernels.render
        return operator(
            origins,
            directions,
            self.sampler.bits,
            field.table,
            list(field.weights),
            list(field.biases),
            field.spec,
            background=background,
            normals=normals,
            normal_epsilon=self.config.normal_epsilon,
            dtype=field.compute_dtype,
            chunk=1 << (16 if directions.is_cuda else 12),  # a GPU is idle below, a CPU's cache is full above
            **self.sampler.lattice(),
        )

    def _look_evenly(self, origins: Tensor, directions: Tensor, background: Tensor, normals: bool) -> kernels.View:
        """Some of the rays, with the same number of samples on each."""
        seen = self.train_rays(origins, directions, background=background)
        normal = torch.zeros_like(origins)
        if normals:
            expected = seen.depth / seen.opacity.clamp(min=kernels.EMPTY_OPACITY)
            surface = origins + expected[:, None] * directions
            there = (seen.opacity > kernels.EMPTY_OPACITY)[:, None]
            found = self.field(surface, normals="finite_difference", normal_epsilon=self.config.normal_epsilon).normal
            normal = torch.where(there, found, 0)
        return kernels.View(seen.rgb, normal, seen.depth, seen.opacity)

    # ---------------------------------------------------------------------------------------------------- state

    def without_floaters(self) -> AbstractContextManager[None]:
        """Inside the `with` block small things apart from the object are not seen."""
        return self.sampler.without_floaters()

    def adapt_capacity(self, rays: int) -> None:
        """Fit the sample buffers to the last steps of `rays` rays each. Reads the device."""
        self.sampler.adapt_capacity(rays)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the field's parameters."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`; raises ValueError when something differs in shape."""
        self.sampler.load_state_dict(state)

    def _background(self, directions: Tensor, background: Tensor | None) -> Tensor:
        if background is not None:
            return background.expand_as(directions)
        if self.field.has_background:
            return self.field.background(directions)
        return torch.ones_like(directions)


def shade(shading: str, albedo: Tensor, normal: Tensor | None, light: Tensor | None, ambient: float | Tensor) -> Tensor:
    """Colours [N, 3] of points with this albedo and normal [N, 3] under a light ([3] or [N, 3] unit, toward it)."""
    if shading == "albedo":
        return albedo
    if normal is None:
        raise ValueError(f"{shading} shading needs normals")
    if shading == "normal":
        return (normal + 1) / 2
    if light is None:
        raise ValueError(f"{shading} shading needs a light")
    strength = ambient + (1 - ambient) * (normal * light).sum(dim=-1, keepdim=True).clamp(min=0)
    return strength.expand_as(albedo) if shading == "textureless" else albedo * strength
