"""The scene: a hash grid and a small network that turn a point into density and albedo, and a background network.

Density and albedo come from the fused operator `dream_fast.kernels.field`; this module owns the parameters.
The background depends on the ray's direction alone: a frequency encoding (6 octaves) and a network 39 -> 32 -> 3.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dream_fast import kernels
from dream_fast.engine.config import FieldConfig

TABLE_INIT = 1e-4  # the table starts uniform in [-1e-4, 1e-4], so the blob alone shapes the first renders
BACKGROUND_OCTAVES = 6
BACKGROUND_WIDTH = 32


class FieldValues(NamedTuple):
    """What the field says about N points."""

    sigma: Tensor  # [N] density, per world unit
    albedo: Tensor  # [N, 3] in (0, 1)
    normal: Tensor | None  # [N, 3] unit, outward (-grad sigma), None when not asked for


def _linear_layers(widths: Sequence[int], generator: torch.Generator) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Weights [out, in] and biases [out] of a network with these widths, uniform in +-1/sqrt(in)."""
    weights, biases = nn.ParameterList(), nn.ParameterList()
    for inputs, outputs in pairwise(widths):
        reach = 1.0 / math.sqrt(inputs)
        weights.append(_uniform((outputs, inputs), reach, generator))
        biases.append(_uniform((outputs,), reach, generator))
    return weights, biases


def _uniform(shape: tuple[int, ...], reach: float, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter((torch.rand(shape, generator=generator, device=generator.device) * 2 - 1) * reach)


def _chunk(x: Tensor) -> int:
    """Points evaluated together: on a CPU their temporaries stay in the cache (a fifth quicker), a GPU wants many."""
    return 1 << 20 if x.is_cuda else 1 << 16


class Field(nn.Module):
    """Density and albedo in the cube [-bound, bound]^3, with normals on demand.

    `compute_dtype` is the type that the operator computes in (None: that of the parameters, which stay fp32).
    Parameters are drawn from `generator` on its device; move the module afterwards.
    """

    def __init__(self, config: FieldConfig, bound: float, generator: torch.Generator):
        super().__init__()
        self.spec = kernels.FieldSpec(
            grid=kernels.HashGridSpec(
                levels=config.levels,
                features=config.features,
                log2_entries=config.log2_entries,
                base_resolution=config.base_resolution,
                max_resolution=config.max_resolution,
                interpolation=config.interpolation,
            ),
            bound=bound,
            density_activation=config.density_activation,
            blob_density=config.blob_density,
            blob_radius=config.blob_radius,
        )
        grid = self.spec.grid
        self.compute_dtype: torch.dtype | None = None
        self.table = _uniform((grid.rows, grid.features), TABLE_INIT, generator)
        widths = [grid.channels, *[config.hidden_width] * config.hidden_layers, 4]
        self.weights, self.biases = _linear_layers(widths, generator)
        self.has_background = config.bg_radius > 0
        if self.has_background:
            widths = [3 + 6 * BACKGROUND_OCTAVES, BACKGROUND_WIDTH, 3]
            self.background_weights, self.background_biases = _linear_layers(widths, generator)

    def forward(
        self,
        x: Tensor,
        *,
        active_levels: int | Tensor | None = None,
        count: Tensor | None = None,
        normals: str | None = None,
        normal_epsilon: float = 0.01,
    ) -> FieldValues:
        """Values at world points x [N, 3]. Rows from `count` on are padding.

        `normals` is None, "finite_difference" (six more evaluations at +-normal_epsilon world units) or "analytic".
        """
        inputs = (x, self.table, list(self.weights), list(self.biases), self.spec)
        options = {"active_levels": active_levels, "count": count, "dtype": self.compute_dtype}
        if normals is None:
            return FieldValues(*kernels.field(*inputs, **options), None)
        return FieldValues(*kernels.field_normals(*inputs, mode=normals, epsilon=normal_epsilon, **options))

    @property
    def plan(self) -> str:
        """How a GPU computes this field: "fused", or "unfused: " and the reason."""
        return kernels.field_plan(self.spec, list(self.weights), self.compute_dtype or self.table.dtype)

    @torch.no_grad()
    def density(self, x: Tensor, *, active_levels: int | Tensor | None = None, chunk: int | None = None) -> Tensor:
        """Densities [N] at world points [N, 3], without gradient, `chunk` points at a time."""
        chunk = chunk or _chunk(x)
        return torch.cat([self(part, active_levels=active_levels).sigma for part in x.split(chunk)])

    @torch.no_grad()
    def albedo(self, x: Tensor) -> Tensor:
        """Albedo [N, 3] at world points [N, 3], without gradient, in chunks."""
        return torch.cat([self(part).albedo for part in x.split(_chunk(x))])

    def background(self, directions: Tensor) -> Tensor:
        """Background colour [R, 3] in (0, 1) of unit directions [R, 3]; needs `bg_radius` > 0."""
        if not self.has_background:
            raise ValueError("this field has no background network: bg_radius is not positive")
        octaves = 2.0 ** torch.arange(BACKGROUND_OCTAVES, device=directions.device, dtype=directions.dtype)
        angles = (directions[:, None, :] * octaves[:, None]).flatten(1)  # [R, 18]
        h = torch.cat([directions, angles.sin(), angles.cos()], dim=-1)
        h = F.relu(F.linear(h, self.background_weights[0], self.background_biases[0]))
        return F.linear(h, self.background_weights[1], self.background_biases[1]).sigmoid()
