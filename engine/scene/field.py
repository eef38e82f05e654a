"""The interface of fields, which give density and albedo at points, with their background network.

`HashGridField` and `FrequencyField` implement it; the frequency encoding is shared.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dream_fast import kernels
from dream_fast.engine.config.sections import FieldConfig

BACKGROUND_WIDTH = 32


class FieldOutput(NamedTuple):
    """Values of a field at N points."""

    sigma: Tensor  # [N] density, per world unit
    albedo: Tensor  # [N, 3] in (0, 1)
    normal: Tensor | None  # [N, 3] unit, outward (-grad sigma), None without normals

    def without_padding(self, count: Tensor | None) -> "FieldOutput":
        """The values with zeros in the rows from `count` on. Does not read the device."""
        if count is None:
            return self
        live = torch.arange(self.sigma.shape[0], device=self.sigma.device) < count
        normal = None if self.normal is None else torch.where(live[:, None], self.normal, 0)
        return FieldOutput(torch.where(live, self.sigma, 0), torch.where(live[:, None], self.albedo, 0), normal)


def linear_layers(widths: Sequence[int], generator: torch.Generator) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Draw weights [out, in] and biases [out] of a network with these widths, uniform in +-1/sqrt(in)."""
    weights, biases = nn.ParameterList(), nn.ParameterList()
    for inputs, outputs in pairwise(widths):
        limit = 1.0 / math.sqrt(inputs)
        weights.append(uniform((outputs, inputs), limit, generator))
        biases.append(uniform((outputs,), limit, generator))
    return weights, biases


def uniform(shape: tuple[int, ...], limit: float, generator: torch.Generator) -> nn.Parameter:
    """Draw a parameter from [-limit, limit)."""
    return nn.Parameter((torch.rand(shape, generator=generator, device=generator.device) * 2 - 1) * limit)


def frequency_encoding(x: Tensor, bands: int, active: int | Tensor | None = None) -> Tensor:
    """Encode x [N, 3] as [N, 3 + 6 bands]: x, then sin(2^k x) and cos(2^k x), k = 0 .. bands - 1.

    Bands from `active` on are zeros. As in stable-dreamfusion the lowest band is one radian a unit, without NeRF's pi.
    Source: Mildenhall et al., NeRF, 2020.
    """
    number = torch.arange(bands, device=x.device)
    angles = (x[:, None, :] * (2.0 ** number.to(x.dtype))[:, None]).flatten(1)  # [N, 3 bands]
    sines, cosines = angles.sin(), angles.cos()
    if active is not None:
        mask = (number < active).to(x.dtype).repeat_interleave(3, output_size=3 * bands)
        sines, cosines = sines * mask, cosines * mask
    return torch.cat([x, sines, cosines], dim=-1)


def _chunk_size(x: Tensor) -> int:
    """Points evaluated together: few on a CPU, so that temporaries stay in its cache (a fifth faster)."""
    return 1 << 20 if x.is_cuda else 1 << 16


class Field(nn.Module):
    """Density and albedo in the cube [-bound, bound]^3, with normals on demand, and a background network.

    `compute_dtype` is the dtype of the networks' products (None: fp32, as the parameters). Parameters are drawn on the
    generator's device; move the module afterwards.
    """

    background_bands = 6
    table: nn.Parameter | None  # of features, where the backbone has one; it has its own learning rate
    weights: nn.ParameterList  # [out, in] of each layer
    biases: nn.ParameterList
    background_weights: nn.ParameterList
    background_biases: nn.ParameterList
    occupancy_grid = False  # rays are marched through an occupancy grid, and `render_rays` renders them
    finest: int | None = None  # cells along an edge of the scene; the field has no detail below one

    def __init__(self, config: FieldConfig, bound: float, grid: kernels.HashGridSpec | None = None):
        super().__init__()
        self.spec = kernels.FieldSpec(
            **({} if grid is None else {"grid": grid}),
            bound=bound,
            density_activation=config.density_activation,
            blob_density=config.blob_density,
            blob_radius=config.blob_radius,
        )
        self.bound = bound
        self.register_parameter("table", None)
        self.compute_dtype: torch.dtype | None = None
        self.has_background = config.bg_radius > 0

    def _add_background(self, generator: torch.Generator) -> None:
        if self.has_background:
            widths = [3 + 6 * self.background_bands, BACKGROUND_WIDTH, 3]
            self.background_weights, self.background_biases = linear_layers(widths, generator)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def backend_description(self, normals: str) -> str:
        """The implementation on a GPU with these normals, in a few words."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        active_levels: int | Tensor | None = None,
        count: Tensor | None = None,
        normals: str | None = None,
        normal_epsilon: float = 0.01,
    ) -> FieldOutput:
        """Values at world points x [N, 3]. Rows from `count` on are padding.

        `active_levels`: number of levels or bands of the encoding in use, coarse to fine; None: all. `normals`: None,
        "finite_difference" (six more evaluations at +-normal_epsilon world units) or "analytic".
        """
        raise NotImplementedError

    def render_rays(
        self,
        origins: Tensor,
        directions: Tensor,
        bits: Tensor,
        *,
        background: Tensor,
        normals: bool,
        normal_epsilon: float,
        **march_options,
    ) -> kernels.View:
        """Render rays [R, 3] through the occupancy grid `bits`, without gradient: `kernels.render` of this field.

        Only of fields with an `occupancy_grid`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def density(self, x: Tensor, *, active_levels: int | Tensor | None = None, chunk: int | None = None) -> Tensor:
        """Densities [N] at world points [N, 3], without gradient, `chunk` points at a time."""
        chunk = chunk or _chunk_size(x)
        return torch.cat([self(part, active_levels=active_levels).sigma for part in x.split(chunk)])

    @torch.no_grad()
    def albedo(self, x: Tensor) -> Tensor:
        """Albedo [N, 3] at world points [N, 3], without gradient, in chunks."""
        return torch.cat([self(part).albedo for part in x.split(_chunk_size(x))])

    def background(self, directions: Tensor) -> Tensor:
        """Background colours [R, 3] in (0, 1) for unit directions [R, 3].

        Raises ValueError: when the field has no background network.
        """
        if not self.has_background:
            raise ValueError("this field has no background network: bg_radius is not positive")
        h = frequency_encoding(directions, self.background_bands)
        h = F.relu(F.linear(h, self.background_weights[0], self.background_biases[0]))
        return F.linear(h, self.background_weights[1], self.background_biases[1]).sigmoid()
