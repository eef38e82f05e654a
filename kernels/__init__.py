"""Operators of text-to-3D: hash grid, occupancy, marching, compositing, field, rendering, triangles, Adan, norm."""

from dream_fast.kernels._core.launch import compile_launches, recorded_launches
from dream_fast.kernels.fields.density_gradient import autograd_gradient, central_differences, normal_of_gradient
from dream_fast.kernels.fields.field import density_activation, density_logit, field, field_plan, field_reference
from dream_fast.kernels.fields.normals import field_normals, field_normals_reference
from dream_fast.kernels.fields.spec import FieldSpec
from dream_fast.kernels.grid.hash_grid import hash_grid, hash_grid_reference
from dream_fast.kernels.grid.regularizers import hash_grid_total_variation_grad, hash_grid_weight_decay_grad
from dream_fast.kernels.grid.spec import HashGridSpec
from dream_fast.kernels.mesh.antialias import antialias, antialias_reference, opposite_corners
from dream_fast.kernels.mesh.device import Fragments
from dream_fast.kernels.mesh.interpolate import interpolate, interpolate_reference
from dream_fast.kernels.mesh.rasterize import rasterize, rasterize_reference
from dream_fast.kernels.nn.bias_residual import bias_residual, bias_residual_reference
from dream_fast.kernels.nn.group_norm_silu import group_norm_silu, group_norm_silu_reference
from dream_fast.kernels.optim.adan import AdanState, adan_step, adan_step_reference
from dream_fast.kernels.rays.composite import Composited, composite, composite_reference
from dream_fast.kernels.rays.march import Samples, march, march_reference, near_far
from dream_fast.kernels.rays.occupancy import (
    cascades,
    occupancy_points,
    occupancy_query,
    occupancy_update,
    occupancy_update_reference,
)
from dream_fast.kernels.rays.render import EMPTY_OPACITY, View, render, render_reference
from dream_fast.kernels.rays.trace import Hits, trace, trace_reference

__all__ = [
    "EMPTY_OPACITY",
    "AdanState",
    "Composited",
    "FieldSpec",
    "Fragments",
    "HashGridSpec",
    "Hits",
    "Samples",
    "View",
    "adan_step",
    "adan_step_reference",
    "antialias",
    "antialias_reference",
    "autograd_gradient",
    "bias_residual",
    "bias_residual_reference",
    "cascades",
    "central_differences",
    "compile_launches",
    "composite",
    "composite_reference",
    "density_activation",
    "density_logit",
    "field",
    "field_normals",
    "field_normals_reference",
    "field_plan",
    "field_reference",
    "group_norm_silu",
    "group_norm_silu_reference",
    "hash_grid",
    "hash_grid_reference",
    "hash_grid_total_variation_grad",
    "hash_grid_weight_decay_grad",
    "interpolate",
    "interpolate_reference",
    "march",
    "march_reference",
    "near_far",
    "normal_of_gradient",
    "occupancy_points",
    "occupancy_query",
    "occupancy_update",
    "occupancy_update_reference",
    "opposite_corners",
    "rasterize",
    "rasterize_reference",
    "recorded_launches",
    "render",
    "render_reference",
    "trace",
    "trace_reference",
]
