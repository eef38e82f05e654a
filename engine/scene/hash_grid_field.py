"""The field of the backbones `grid` and `grid_torch`: a hash grid and a small network.

Density and albedo are computed by the operator `dream_fast.kernels.field`, fused in Triton (`grid`) or with PyTorch's
operators (`grid_torch`); this module owns the parameters. The background depends on the ray's direction alone: a
frequency encoding (6 bands) and a network 39 -> 32 -> 3.
"""

import torch
from torch import Tensor, nn

from dream_fast import kernels
from dream_fast.engine.config.sections import FieldConfig
from dream_fast.engine.scene.field import Field, FieldOutput, linear_layers, uniform

TABLE_INIT = 1e-4  # the table is uniform in [-1e-4, 1e-4] at first, so that the first renders show the blob alone


class HashGridField(Field):
    """A hash grid and a network. They run in Triton on a GPU unless the backbone is `grid_torch`."""

    occupancy_grid = True
    table: nn.Parameter

    def __init__(self, config: FieldConfig, bound: float, generator: torch.Generator):
        grid = kernels.HashGridSpec(
            levels=config.n_levels,
            features=config.n_features_per_level,
            log2_entries=config.log2_hashmap_size,
            base_resolution=config.base_resolution,
            max_resolution=config.max_resolution,
            interpolation=config.interpolation,
        )
        super().__init__(config, bound, grid)
        self.finest = config.max_resolution
        self.use_reference = config.backbone == "grid_torch"
        self.table = uniform((grid.rows, grid.features), TABLE_INIT, generator)
        widths = [grid.channels, *[config.hidden_width] * config.hidden_layers, 4]
        self.weights, self.biases = linear_layers(widths, generator)
        self._add_background(generator)

    def forward(
        self,
        x: Tensor,
        *,
        active_levels: int | Tensor | None = None,
        count: Tensor | None = None,
        normals: str | None = None,
        normal_epsilon: float = 0.01,
    ) -> FieldOutput:
        # The references would read the count from the device, so they compute all rows instead.
        live = None if self.use_reference else count
        inputs = (x, self.table, list(self.weights), list(self.biases), self.spec)
        if normals is None:
            operator = kernels.field_reference if self.use_reference else kernels.field
            sigma, albedo = operator(*inputs, active_levels=active_levels, count=live, dtype=self.compute_dtype)
            values = FieldOutput(sigma, albedo, None)
        else:
            with_normals = kernels.field_normals_reference if self.use_reference else kernels.field_normals
            values = FieldOutput(
                *with_normals(
                    *inputs,
                    active_levels=active_levels,
                    count=live,
                    dtype=self.compute_dtype,
                    mode=normals,
                    epsilon=normal_epsilon,
                )
            )
        return values.without_padding(count) if self.use_reference else values

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
        operator = kernels.render_reference if self.use_reference else kernels.render
        return operator(
            origins,
            directions,
            bits,
            self.table,
            list(self.weights),
            list(self.biases),
            self.spec,
            background=background,
            normals=normals,
            normal_epsilon=normal_epsilon,
            dtype=self.compute_dtype,
            chunk=1 << (16 if directions.is_cuda else 12),  # a GPU is idle below, a CPU's cache is full above
            **march_options,
        )

    def backend_description(self, normals: str) -> str:
        """The implementation on a GPU: "fused", or "unfused: " and the reason."""
        if self.use_reference:
            return "on PyTorch's operators"
        return kernels.field_plan(self.spec, list(self.weights), self.compute_dtype or self.table.dtype, normals)
