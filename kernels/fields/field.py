"""The scene's field: a hash grid, then a small MLP, to density and albedo.

h = MLP(hash_grid((x + bound) / (2 bound))), ReLU between layers, 4 outputs.
sigma = exp(min(h_0 + b exp(-|x|^2 / (2 r^2)), 15)) or softplus(h_0 + b (1 - |x| / r)); albedo = sigmoid(h_1..3).
The exponent is clamped in the forward, so that differences of sigma stay finite; its gradient is sigma * upstream on
both sides of the clamp, so that a density past the clamp can come back.

Legend: N points, P outputs of a layer. Units: world units in [-bound, bound]; sigma per world unit.
Gradients: table, weights, biases and x.
Numerics: hash grid and MLP in `dtype`; blob, activations and outputs in fp32 (fp64 when x is).
Source: Poole et al., DreamFusion, 2022 (density blob); Mueller et al., 2022 (grid + MLP, clamped exponential).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast.kernels._core.checks import check_compute_dtype, check_kernel_dtype
from dream_fast.kernels._core.launch import launch, multiprocessors, use_triton
from dream_fast.kernels._core.operator import operator
from dream_fast.kernels._core.reference import live_rows, pad_rows
from dream_fast.kernels.fields.activations import MAX_EXPONENT
from dream_fast.kernels.fields.encode import (
    BLOCK,
    TileConfig,
    aligned_rows,
    field_shape,
    flatten_parameters,
    level_words,
    padded_levels,
    tile_warps,
    unfused_reason,
    unit_scale,
)
from dream_fast.kernels.fields.field_kernels import field_bwd_kernel, field_fwd_kernel
from dream_fast.kernels.fields.spec import FieldSpec, check_field, decode_field_spec, encode_field_spec
from dream_fast.kernels.grid.gradients import GridPoints, position_gradient, scatter_features
from dream_fast.kernels.grid.hash_grid import hash_grid, hash_grid_reference
from dream_fast.kernels.grid.spec import HashGridSpec


class _ClampedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.clamp(max=MAX_EXPONENT).exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return grad * out


def _blob_logit(x: Tensor, spec: FieldSpec) -> Tensor:
    """x [N, 3] -> the blob's part of the density's logit [N]."""
    squared = x.square().sum(1)
    if spec.density_activation == "exp":
        return spec.blob_density * torch.exp(squared / (-2 * spec.blob_radius**2))
    # The gradient of a norm is not defined at 0: the floor makes it 0 there.
    return spec.blob_density * (1 - squared.clamp(min=1e-12).sqrt() / spec.blob_radius)


def density_logit(x: Tensor, h: Tensor, spec: FieldSpec) -> Tensor:
    """A network's first output h [N] at x [N, 3] -> the logit of the density [N]: h and the blob."""
    return h + _blob_logit(x, spec)


def density_activation(logit: Tensor, spec: FieldSpec) -> Tensor:
    """Logit -> density per world unit, elementwise; it rises with the logit."""
    return _ClampedExp.apply(logit) if spec.density_activation == "exp" else F.softplus(logit)


def logits_reference(
    x: Tensor, table: Tensor, weights, biases, spec: FieldSpec, active_levels, dtype: torch.dtype | None
) -> Tensor:
    """x [n, 3] -> outputs of the MLP [n, 4], without the blob, in fp32 or the dtype of x."""
    coordinates = (x + spec.bound) / (2 * spec.bound)
    h = hash_grid_reference(coordinates, table, spec.grid, active_levels=active_levels, dtype=dtype)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h = F.linear(h if layer == 0 else F.relu_(h), weight.to(h.dtype), bias.to(h.dtype))
    return h.to(torch.promote_types(x.dtype, torch.float32))


def sigma_reference(x: Tensor, logits: Tensor, spec: FieldSpec) -> Tensor:
    """x [N, 3], outputs of the MLP [N, 4] -> sigma [N]."""
    return density_activation(density_logit(x, logits[:, 0], spec), spec)


def field_reference(
    x: Tensor,
    table: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: FieldSpec,
    *,
    active_levels: int | Tensor | None = None,
    count: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `field` in plain PyTorch, for any float dtype."""
    rows = x.shape[0]
    x = x[: live_rows(rows, count)]
    logits = logits_reference(x, table, weights, biases, spec, active_levels, dtype)
    return pad_rows(sigma_reference(x, logits, spec), rows), pad_rows(torch.sigmoid(logits[:, 1:]), rows)


def _field_fwd_config(dtype: torch.dtype, save_features: bool) -> TileConfig:
    """20 programs are four rounds of the five that the registers of a multiprocessor hold.

    One round takes 0.183 and 2.19 ms on rays_64 and rays_256, four 0.183 and 2.13 (H100). Programs that store their
    features need more registers.
    """
    return TileConfig(block=BLOCK, warps=tile_warps(dtype), programs=3 if save_features else 20)


def _field_bwd_config(width: int, dtype: torch.dtype) -> TileConfig:
    """The sums of all layers stay in registers where they fit."""
    layers_a_pass = 5 if width <= (32 if dtype == torch.float32 else 64) else 1
    return TileConfig(block=BLOCK, warps=tile_warps(dtype), programs=2, layers_a_pass=layers_a_pass)


def field_constants(spec: FieldSpec, width: int, layers: int) -> dict[str, Any]:
    """Arguments of every kernel over tiles that the spec and the network's shape decide."""
    return {
        "scale": unit_scale(spec.bound),
        "blob_density": spec.blob_density,
        "blob_radius": spec.blob_radius,
        "SOFTPLUS": spec.density_activation == "softplus",
        "SHAPE": field_shape(spec.grid, width, layers),
    }


def layer_passes(layers: int, layers_a_pass: int) -> list[tuple[int, int]]:
    """First and last layer of each pass over layers 0 to `layers`, the output layer."""
    return [(first, min(first + layers_a_pass - 1, layers)) for first in range(0, layers + 1, layers_a_pass)]


def _features_shape(grid: HashGridSpec, rows: int) -> tuple[int, ...]:
    """Shape of the features stored for the backward: 64 bytes a point for 16 levels of 2 features in half precision.

    To read them back takes a fraction of the time of gathering them again, and no registers for the gathers.
    """
    return -(-rows // BLOCK), grid.features, padded_levels(grid), BLOCK


@operator("dream_fast::field")
def _field_fwd(
    x: Tensor,
    table: Tensor,
    parameters: Tensor,
    compute_table: Tensor,
    compute_parameters: Tensor,
    active: Tensor | None,
    levels: int,
    count: Tensor | None,
    width: int,
    layers: int,
    spec_numbers: list[float],
    save_features: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """sigma, albedo, and the features for the backward (empty unless `save_features`).

    Gradients go to table and parameters (all weights, then all biases); compute_table and compute_parameters are the
    same in the compute dtype.
    """
    spec, rows = decode_field_spec(spec_numbers), x.shape[0]
    sigma, albedo = x.new_empty(rows), x.new_empty(rows, 3)
    features = compute_table.new_empty(_features_shape(spec.grid, rows) if save_features else (0,) * 4)
    config = _field_fwd_config(compute_table.dtype, save_features)
    launch(
        field_fwd_kernel,
        (min(config.programs * multiprocessors(x.device), -(-rows // config.block)),),
        x.device,
        num_warps=config.warps,
        x=x.contiguous(),
        table=aligned_rows(compute_table),
        levels=level_words(spec.grid, x.device, levels),
        active=active,
        parameters=compute_parameters,
        count=count,
        sigma=sigma,
        albedo=albedo,
        features=features if save_features else None,
        rows=rows,
        BLOCK=config.block,
        **field_constants(spec, width, layers),
    )
    return sigma, albedo, features


@_field_fwd.register_fake
def _(
    x, table, parameters, compute_table, compute_parameters, active, levels, count, width, layers, spec_numbers, save
):
    rows, grid = x.shape[0], decode_field_spec(spec_numbers).grid
    features = compute_table.new_empty(_features_shape(grid, rows) if save else (0,) * 4)
    return x.new_empty(rows), x.new_empty(rows, 3), features


@operator("dream_fast::field_backward")
def _field_bwd(
    grad_sigma: Tensor,
    grad_albedo: Tensor,
    x: Tensor,
    table: Tensor,
    parameters: Tensor,
    features: Tensor,
    active: Tensor | None,
    levels: int,
    count: Tensor | None,
    width: int,
    layers: int,
    spec_numbers: list[float],
    needs_grad: list[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, table and parameters in fp32, where `needs_grad`; the others are empty.

    table and parameters are in the compute dtype.
    """
    spec, rows = decode_field_spec(spec_numbers), x.shape[0]
    x_needs_grad, table_needs_grad, parameters_need_grad = needs_grad
    x, table, scale = x.contiguous(), aligned_rows(table), unit_scale(spec.bound)
    config = _field_bwd_config(width, table.dtype)
    programs = min(config.programs * multiprocessors(x.device), -(-rows // config.block))
    grad_features = None
    if x_needs_grad or table_needs_grad:
        grad_features = x.new_empty(spec.grid.channels, rows, dtype=table.dtype)
    grad_x = torch.zeros_like(x) if x_needs_grad else None
    partial_sums = x.new_empty(programs, parameters.numel())
    passes = layer_passes(layers, config.layers_a_pass) if parameters_need_grad else [(0, -1)]
    for first, last in passes:
        launch(
            field_bwd_kernel,
            (programs,),
            x.device,
            num_warps=config.warps,
            x=x,
            features=features if features.numel() else None,
            table=table,
            levels=level_words(spec.grid, x.device, levels),
            active=active,
            parameters=parameters,
            count=count,
            grad_sigma=grad_sigma.contiguous(),
            grad_albedo=grad_albedo.contiguous(),
            grad_features=grad_features if first == 0 else None,
            grad_x=grad_x if first == 0 else None,
            partial_sums=partial_sums,
            rows=rows,
            size=parameters.numel(),
            BLOCK=config.block,
            FIRST=first,
            LAST=last,
            **field_constants(spec, width, layers),
        )
    points = GridPoints(x, scale, 0.5, count, levels if active is None else active)
    grad_table = x.new_empty(0)
    if grad_x is not None:
        assert grad_features is not None
        grad_x.add_(position_gradient(grad_features, points, table, spec.grid), alpha=scale)
    if table_needs_grad:
        grad_table = scatter_features(points, spec.grid, features=grad_features, deterministic=deterministic)
    grad_parameters = partial_sums.sum(0) if parameters_need_grad else x.new_empty(0)
    return (x.new_empty(0) if grad_x is None else grad_x), grad_table, grad_parameters


@_field_bwd.register_fake
def _(grad_sigma, grad_albedo, x, table, parameters, features, *options):
    return fake_grads(x, table, parameters, needs_grad=options[-2])


def fake_grads(x: Tensor, table: Tensor, parameters: Tensor, needs_grad: Sequence[bool]) -> tuple[Tensor, ...]:
    """Shapes of the gradients of x, table and parameters, empty where none is needed."""
    return tuple(
        x.new_empty(leaf.shape if needed else 0)
        for leaf, needed in zip((x, table, parameters), needs_grad, strict=True)
    )


def _save(ctx, inputs, output) -> None:
    x, _, parameters, compute_table, compute_parameters, active, levels, count, *shape, _ = inputs
    ctx.save_for_backward(x, compute_table, compute_parameters, output[2], active, count)
    ctx.levels, ctx.shape, ctx.parameters_dtype = levels, shape, parameters.dtype


def _backward(ctx, grad_sigma: Tensor, grad_albedo: Tensor, _):
    x, table, parameters, features, active, count = ctx.saved_tensors
    needs_grad = list(ctx.needs_input_grad[:3])
    grads = _field_bwd(
        grad_sigma,
        grad_albedo,
        x,
        table,
        parameters,
        features,
        active,
        ctx.levels,
        count,
        *ctx.shape,
        needs_grad,
        torch.are_deterministic_algorithms_enabled(),
    )
    return *select_grads(grads, needs_grad, ctx.parameters_dtype), *[None] * 9


def select_grads(grads: Sequence[Tensor], needs_grad: Sequence[bool], parameters_dtype: torch.dtype) -> list:
    """Gradients of x, table and parameters for autograd: None where none is needed, the last in `parameters_dtype`."""
    grad_x, grad_table, grad_parameters = (
        grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)
    )
    return [grad_x, grad_table, None if grad_parameters is None else grad_parameters.to(parameters_dtype)]


_field_fwd.register_autograd(_backward, setup_context=_save)


def unfused_field(
    x: Tensor, table: Tensor, weights, biases, spec: FieldSpec, active_levels, count: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The field from the hash grid's operator and torch's products, for shapes that have no fused kernel."""
    live = None
    if count is not None:
        live = torch.arange(x.shape[0], device=x.device) < count
        x = torch.where(live[:, None], x, 0)
    coordinates = (x + spec.bound) / (2 * spec.bound)
    h = hash_grid(coordinates, table, spec.grid, active_levels=active_levels, count=count, dtype=dtype)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h = F.linear(h if layer == 0 else F.relu(h), weight.to(h.dtype), bias.to(h.dtype))
    logits = h.float()
    sigma, albedo = sigma_reference(x, logits, spec), torch.sigmoid(logits[:, 1:])
    if live is None:
        return sigma, albedo
    return torch.where(live, sigma, 0), torch.where(live[:, None], albedo, 0)


def field_plan(
    spec: FieldSpec, weights: Sequence[Tensor], dtype: torch.dtype = torch.float32, normals: str | None = None
) -> str:
    """Name the way a GPU computes this field in a compute dtype: "fused", or "unfused: " and the reason.

    normals: None, or the mode of normals, as in `field_normals`.
    """
    reason = unfused_reason(spec.grid, weights, dtype, normals)
    return f"unfused: {reason}" if reason else "fused"


def field(
    x: Tensor,
    table: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: FieldSpec,
    *,
    active_levels: int | Tensor | None = None,
    count: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x [N, 3], table [rows, F], weights [out, in] and biases [out] a layer -> sigma [N], albedo [N, 3].

    x in world units, fp32 or fp64; a point outside the cube has the features 0. active_levels: levels of the grid from
    here on give zeros (an int, or an integer scalar tensor on the device). count: rows from here on give zeros and take
    no gradient (an int64 scalar tensor on the device). dtype: the compute dtype of grid and MLP, the table's when None.
    sigma is per world unit, albedo in [0, 1]; both are fp32, or fp64 when x is.
    Raises TypeError or ValueError: for an argument of the wrong type, shape, dtype or device.
    Source: Poole et al., DreamFusion, 2022; Mueller et al., Instant Neural Graphics Primitives, 2022.
    """
    check_field(x, table, weights, biases, spec, count, dtype)
    if not use_triton(x):
        return field_reference(x, table, weights, biases, spec, active_levels=active_levels, count=count, dtype=dtype)
    dtype = table.dtype if dtype is None else dtype
    check_kernel_dtype("x", x)
    check_kernel_dtype("table", table)
    check_compute_dtype(dtype)
    if unfused_reason(spec.grid, weights, dtype):
        return unfused_field(x, table, weights, biases, spec, active_levels, count, dtype)
    parameters = flatten_parameters(weights, biases)
    save_features = torch.is_grad_enabled() and (x.requires_grad or table.requires_grad or parameters.requires_grad)
    save_features = save_features and dtype != torch.float32  # twice the bytes, and not measured
    return _field_fwd(
        *fused_arguments(x, table, parameters, spec, active_levels, count, dtype),
        weights[0].shape[0],
        len(weights) - 1,
        encode_field_spec(spec),
        save_features,
    )[:2]


def fused_arguments(
    x: Tensor,
    table: Tensor,
    parameters: Tensor,
    spec: FieldSpec,
    active_levels: int | Tensor | None,
    count: Tensor | None,
    dtype: torch.dtype,
) -> tuple:
    """The leading arguments of the fused operators: tensors for gradients, in the compute dtype, levels and count."""
    active = active_levels if isinstance(active_levels, Tensor) else None
    levels = spec.grid.levels if active_levels is None or active is not None else int(active_levels)
    compute_table, compute_parameters = table.detach().to(dtype), parameters.detach().to(dtype)
    return x, table, parameters, compute_table, compute_parameters, active, levels, count
