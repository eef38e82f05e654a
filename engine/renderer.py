"""From rays to images: occupancy grid, ray marching, field, shading and compositing.

`Renderer.train_rays` is differentiable and returns what the losses need; `Renderer.view` looks at the scene without a
gradient, at any size. Shadings, with n the normal, l the unit direction to the light and a the ambient share:

    albedo       the field's colour
    textureless  a + (1 - a) max(0, n.l)
    lambertian   albedo * textureless
    normal       (n + 1) / 2
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast import kernels
from dream_fast.engine.camera import Cameras, rays
from dream_fast.engine.config import RenderConfig
from dream_fast.engine.field import Field

SHADINGS = ("albedo", "lambertian", "textureless", "normal")
SMALLEST_PART = 0.02  # of the cells of the largest part; smaller ones are specks


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


class View(NamedTuple):
    """Images of B cameras, without gradient."""

    rgb: Tensor  # [B, H, W, 3] in [0, 1]
    normal: Tensor  # [B, H, W, 3] world normals, 0 where nothing is
    depth: Tensor  # [B, H, W] sum of weight * distance along the ray, world units
    opacity: Tensor  # [B, H, W]


class Renderer:
    """Renders a field. Holds the occupancy grid and the capacity of the sample buffers, both part of a checkpoint.

    The grid starts full: until the first `update_occupancy` rays are marched through the whole cube.
    """

    def __init__(self, field: Field, config: RenderConfig):
        self.field, self.config = field, config
        device = field.table.device
        cells = config.occupancy_resolution**3
        self.cascades = kernels.cascades(config.bound)
        self.density = torch.zeros(self.cascades, cells, device=device)
        self.bits = torch.full((self.cascades, cells // 8), 255, dtype=torch.uint8, device=device)
        self.samples_per_ray = min(config.max_steps, 256)
        # Since the capacity was last adapted, on the device: the fullest step, and whether one did not fit.
        self.most_samples = torch.zeros((), dtype=torch.int64, device=device)
        self.overflowed = torch.zeros((), dtype=torch.bool, device=device)

    # ------------------------------------------------------------------------------------------------ occupancy

    @torch.no_grad()
    def update_occupancy(self, generator: torch.Generator | None, *, active_levels: int | Tensor | None = None) -> None:
        """Look at the density once in every cell (at a random point, or the centre without a generator)."""
        resolution = self.config.occupancy_resolution
        noise = None
        if generator is not None:
            noise = torch.rand(self.density.numel(), 3, generator=generator, device=generator.device)
            noise = noise.to(self.density.device)
        points = kernels.occupancy_points(
            resolution, self.cascades, self.config.bound, noise, device=self.density.device
        )
        fresh = self.field.density(points, active_levels=active_levels).view_as(self.density)
        bits, _ = kernels.occupancy_update(self.density, fresh, threshold=self.config.density_thresh)
        self.bits.copy_(bits)

    @contextmanager
    def without_specks(self) -> Iterator[None]:
        """Inside the `with` block rays pass through small groups of occupied cells that stand apart from the object.

        Scenes of one cascade only; across several the groups are not followed, and nothing changes.
        """
        before = self.bits.clone()
        if self.cascades == 1:
            side = self.config.occupancy_resolution
            powers = 2 ** torch.arange(8, device=self.bits.device)
            cells = (self.bits[0][:, None] & powers).bool().view(side, side, side)
            self.bits.copy_((large_parts(cells).view(-1, 8) * powers).sum(1))
        try:
            yield
        finally:
            self.bits.copy_(before)

    def adapt_capacity(self, rays: int) -> None:
        """Fit the sample buffers to the fullest step of `rays` rays since the last call, with room to spare.

        Reads the device, so call it where the host waits anyway (when a line is logged).
        """
        wanted = int(1.5 * int(self.most_samples) / max(1, rays)) + 1
        if self.overflowed:
            wanted = max(wanted, 2 * self.samples_per_ray)
        if not self.samples_per_ray / 2 <= wanted <= self.samples_per_ray:
            self.samples_per_ray = max(8, min(self.config.max_steps, wanted))
        self.most_samples.zero_()
        self.overflowed.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The occupancy grid and the capacity, as tensors."""
        return {
            "density": self.density,
            "bits": self.bits,
            "samples_per_ray": torch.tensor(self.samples_per_ray),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`; raises ValueError when the grids differ in shape."""
        for name, own in (("density", self.density), ("bits", self.bits)):
            if state[name].shape != own.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, the renderer's is {tuple(own.shape)}")
            own.copy_(state[name])
        self.samples_per_ray = int(state["samples_per_ray"])

    # ------------------------------------------------------------------------------------------------- training

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
        samples = self._march(origins, directions, generator)
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

    def _march(self, origins: Tensor, directions: Tensor, generator: torch.Generator | None) -> kernels.Samples:
        count = origins.shape[0]
        perturb = None
        if generator is not None:
            perturb = torch.rand(count, generator=generator, device=generator.device).to(origins.device)
        options = {**self._lattice(), "bound": self.config.bound, "perturb": perturb}
        samples = kernels.march(origins, directions, self.bits, capacity=count * self.samples_per_ray, **options)
        torch.maximum(self.most_samples, samples.count, out=self.most_samples)
        self.overflowed |= samples.overflow
        if origins.is_cuda:
            return samples
        # On a CPU reading the count is free: nothing is dropped, and the buffers hold no padding.
        if samples.overflow:
            samples = kernels.march(origins, directions, self.bits, capacity=count * self.config.max_steps, **options)
        used = int(samples.count)
        return samples._replace(
            positions=samples.positions[:used],
            ray_ids=samples.ray_ids[:used],
            t=samples.t[:used],
            dt=samples.dt[:used],
        )

    def _lattice(self) -> dict:
        """Where samples lie on a ray, as the operators' arguments."""
        config = self.config
        return {
            "resolution": config.occupancy_resolution,
            "max_steps": config.max_steps,
            "dt_gamma": config.dt_gamma,
            "min_near": config.min_near,
        }

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
        for origins, directions in zip(*rays(cameras, height, width), strict=True):
            behind = self._background(directions, background)
            seen = kernels.render(
                origins,
                directions,
                self.bits,
                self.field.table,
                list(self.field.weights),
                list(self.field.biases),
                self.field.spec,
                background=behind,
                normals=normals or shading != "albedo",
                normal_epsilon=self.config.normal_epsilon,
                dtype=self.field.compute_dtype,
                chunk=1 << (16 if directions.is_cuda else 12),  # a GPU is idle below, a CPU's cache is full above
                **self._lattice(),
            )
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

    def _background(self, directions: Tensor, background: Tensor | None) -> Tensor:
        if background is not None:
            return background.expand_as(directions)
        if self.field.has_background:
            return self.field.background(directions)
        return torch.ones_like(directions)


def large_parts(cells: Tensor) -> Tensor:
    """Of occupied cells [G, G, G] (bool), those in groups of neighbours (26) of at least 2 % of the largest group."""
    label = torch.arange(cells.numel(), dtype=torch.float64, device=cells.device).view(cells.shape)
    label, before = torch.where(cells, label, -1.0), None
    while before is None or not torch.equal(label, before):
        before = label
        label = torch.where(cells, F.max_pool3d(label[None], 3, stride=1, padding=1)[0], -1.0)
    groups = (label + 1).long()  # 0: not occupied
    sizes = torch.bincount(groups.flatten(), minlength=2)
    sizes[0] = 0
    return (sizes >= SMALLEST_PART * sizes.max())[groups] & cells


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
