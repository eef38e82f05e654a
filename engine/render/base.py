"""The interface of renderers, their shadings, and inference rendering.

Shadings, with n the normal, l the unit direction to the light and a the ambient share:

    albedo       the field's colour
    textureless  a + (1 - a) max(0, n.l)
    lambertian   albedo * textureless
    normal       (n + 1) / 2

`engine/render/volume.py` renders the density of a field, `engine/render/mesh.py` a mesh in the colours of a field.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.engine.config.sections import RenderConfig
from dream_fast.engine.geometry.mesh import Mesh, TensorMesh
from dream_fast.engine.scene.camera import Cameras, rays
from dream_fast.engine.scene.field import Field
from dream_fast.kernels import Samples

SHADINGS = ("albedo", "lambertian", "textureless", "normal")


class Shading(NamedTuple):
    """Colouring of points: a mode and a light."""

    mode: str  # one of SHADINGS
    ambient: float | Tensor = 1.0  # share of the light that comes from all sides
    light: Tensor | None = None  # unit direction to the light, [3], or one a camera [B, 3]


ALBEDO = Shading("albedo")


def check_shading(shading: Shading) -> None:
    """Raises ValueError: when the mode is unknown."""
    if shading.mode not in SHADINGS:
        raise ValueError(f"shading is {shading.mode!r}, expected one of {', '.join(SHADINGS)}")


def shade(shading: Shading, albedo: Tensor, normal: Tensor | None) -> Tensor:
    """Colours [..., 3] of points with this albedo and unit normal [..., 3].

    The light is [3] or [..., 3]. Raises ValueError: when the mode needs a normal or a light and there is none.
    """
    mode, ambient, light = shading
    if mode == "albedo":
        return albedo
    if normal is None:
        raise ValueError(f"{mode} shading needs normals")
    if mode == "normal":
        return (normal + 1) / 2
    if light is None:
        raise ValueError(f"{mode} shading needs a light")
    strength = ambient + (1 - ambient) * (normal * light).sum(dim=-1, keepdim=True).clamp(min=0)
    return strength.expand_as(albedo) if mode == "textureless" else albedo * strength


class Rendered(NamedTuple):
    """A differentiable render of a field's density, in the shape of its rays: [B, H, W] for images of B cameras.

    S is the number of rows of samples; those from `samples.count` on are padding.
    """

    rgb: Tensor  # [B, H, W, 3] over the background
    opacity: Tensor  # [B, H, W]
    depth: Tensor  # [B, H, W] sum of weight * distance along the ray, world units
    normal: Tensor | None  # [B, H, W, 3] sum of weight * normal, None when no normals were needed
    weights: Tensor  # [S]
    sample_normals: Tensor | None  # [S, 3] unit, outward
    sample_directions: Tensor  # [S, 3] directions of the samples' rays
    samples: Samples
    overflow: Tensor  # bool, some samples did not fit the capacity

    @property
    def sample_count(self) -> Tensor:
        """Number of samples."""
        return self.samples.count


class RenderedMesh(NamedTuple):
    """Differentiable images of a mesh from B cameras."""

    rgb: Tensor  # [B, H, W, 3] over the background
    opacity: Tensor  # [B, H, W] 1 inside, 0 outside, in between at silhouettes
    depth: Tensor  # [B, H, W] opacity * distance along the ray, world units
    normal: Tensor  # [B, H, W, 3] opacity * normal
    surface: TensorMesh
    opposite: Tensor  # `kernels.opposite_corners` of its faces
    sample_count: Tensor  # number of points at which the field was evaluated
    overflow: Tensor  # bool, always false


class RenderedImages(NamedTuple):
    """Images of B cameras, without gradient."""

    rgb: Tensor  # [B, H, W, 3] in [0, 1]
    normal: Tensor  # [B, H, W, 3] world normals, 0 where the image is empty
    depth: Tensor  # [B, H, W] sum of weight * distance along the ray, world units
    opacity: Tensor  # [B, H, W]


class Renderer(ABC):
    """Renders a scene: `train_views` with gradients, `view` without, in any size."""

    field: Field
    config: RenderConfig

    @property
    @abstractmethod
    def samples_per_ray(self) -> int:
        """Capacity of the sample buffers; graphs that were captured with another one are invalid."""

    @abstractmethod
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
    ) -> Rendered | RenderedMesh:
        """Images of B cameras with gradients into the scene.

        `background` is [3] or [B, H, W, 3]; None takes the field's background network. `need_normals` returns normals
        that the shading itself does not need. A generator moves the samples at random.
        """

    @abstractmethod
    def render_unshaded(
        self, camera: Cameras, origins: Tensor, directions: Tensor, background: Tensor, normals: bool
    ) -> RenderedImages:
        """The image [H, W] of one camera in the field's colours, without gradient, with normals at the expected depth.

        Its rays and the background are [H, W, 3]. Without `normals` the normals may be 0.
        """

    def mesh(self) -> Mesh | None:
        """The rendered mesh as it is exported, on the host; None for a field, which has none."""
        return None

    @abstractmethod
    def without_floaters(self) -> AbstractContextManager[None]:
        """Inside the `with` block small parts apart from the object are left out."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """State of a checkpoint other than the optimised parameters."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`. Raises ValueError: when a shape differs."""

    @abstractmethod
    def update_occupancy(self, generator: torch.Generator | None, *, active_levels: int | Tensor | None = None) -> None:
        """Evaluate the density once in every cell of the occupancy grid, where there is one."""

    @abstractmethod
    def adapt_capacity(self, rays: int) -> None:
        """Fit the sample buffers, where there are some, to the last steps of `rays` rays each. Reads the device."""

    @torch.no_grad()
    def view(
        self,
        cameras: Cameras,
        height: int,
        width: int,
        *,
        background: Tensor | None = None,
        shading: Shading = ALBEDO,
        normals: bool = True,
    ) -> RenderedImages:
        """Images of the cameras, one after the other.

        `background` is [3] or [H W, 3]; None takes the field's background network, or white where there is none.
        Without a light in `shading`, [3], the light is at the camera. Shadings use the normal at the expected depth.
        Without `normals` (and with albedo shading) the normal image is 0.
        """
        check_shading(shading)
        images = []
        for camera in cameras.split():
            origins, directions = (part[0].view(height, width, 3) for part in rays(camera, height, width))
            behind = self._background(directions, background)
            image = self.render_unshaded(camera, origins, directions, behind, normals or shading.mode != "albedo")
            if shading.mode != "albedo":
                toward_light = -directions if shading.light is None else shading.light
                image = _shade_image(image, shading._replace(light=toward_light), behind)
            images.append(image)
        return RenderedImages(*(torch.stack(part) for part in zip(*images, strict=True)))

    def _background(self, directions: Tensor, background: Tensor | None) -> Tensor:
        """The colours [H, W, 3] behind the scene."""
        if background is not None:
            return background.expand(directions.shape) if background.dim() == 1 else background.view(directions.shape)
        if self.field.has_background:
            return self.field.background(directions.view(-1, 3)).view(directions.shape)
        return torch.ones_like(directions)


def _shade_image(image: RenderedImages, shading: Shading, background: Tensor) -> RenderedImages:
    """`image` [H, W] over `background` [H, W, 3], its covered part shaded by the normal image."""
    opacity = image.opacity[..., None]
    behind = (1 - opacity) * background
    if shading.mode == "lambertian":
        covered = shade(shading, image.rgb - behind, image.normal)
    else:
        covered = opacity * shade(shading, image.rgb, image.normal)
    return image._replace(rgb=behind + covered)
