"""The scene's field: hash grid, then a small MLP, to density and albedo.

h = MLP(hash_grid((x + bound) / (2 bound))), ReLU between layers, 4 outputs.
sigma = exp(min(h_0 + b exp(-|x|^2 / (2 r^2)), 15)) or softplus(h_0 + b (1 - |x| / r)); albedo = sigmoid(h_1..3).
The exponent is clamped in the forward, so that differences of sigma stay finite; its gradient is sigma * upstream on
both sides of the clamp, so that a density that went past it can come back.

Legend: N points, P = outputs of a layer. Units: world units in [-bound, bound]; sigma per world unit.
Gradients: table, weights, biases and x.
Numerics: hash grid and MLP in `dtype`; blob, activations and outputs in fp32 (fp64 when x is).
Source: Poole et al., DreamFusion, 2022 (density blob); Mueller et al., 2022 (grid + MLP, clamped exponential).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast.kernels._core.checks import FLOATS, check_count, check_kernel_dtype, check_positive, check_tensor
from dream_fast.kernels._core.launch import launch, multiprocessors, use_triton
from dream_fast.kernels._core.reference import live_rows, pad_rows
from dream_fast.kernels.fields.encode import (
    BLOCK,
    aligned_rows,
    flatten_parameters,
    level_table,
    tile_constants,
    tile_warps,
    unfused_reason,
    unit_scale,
)
from dream_fast.kernels.fields.field_kernels import field_bwd_kernel, field_fwd_kernel
from dream_fast.kernels.grid.gradients import position_gradient, scatter_features
from dream_fast.kernels.grid.hash_grid import hash_grid, hash_grid_reference
from dream_fast.kernels.grid.spec import HashGridSpec

MAX_EXPONENT = 15.0


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """Shape of a field.

    grid: the hash grid. bound: half the edge of the scene cube. density_activation: "exp" (its argument is clamped to
    MAX_EXPONENT = 15) or "softplus". blob_density, blob_radius: height b and radius r of the blob added to the
    density's logit at the origin.
    """

    grid: HashGridSpec = dataclass_field(default_factory=HashGridSpec)
    bound: float = 1.0
    density_activation: str = "exp"
    blob_density: float = 5.0
    blob_radius: float = 0.2

    def __post_init__(self) -> None:
        check_positive("bound", self.bound)
        check_positive("blob_radius", self.blob_radius)
        if self.density_activation not in ("exp", "softplus"):
            raise ValueError(f'density_activation must be "exp" or "softplus", got "{self.density_activation}"')


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


def _blob(x: Tensor, spec: FieldSpec) -> Tensor:
    """What the density's logit gets at x [N, 3] -> [N]."""
    squared = x.square().sum(1)
    if spec.density_activation == "exp":
        return spec.blob_density * torch.exp(squared / (-2 * spec.blob_radius**2))
    # The gradient of a norm is not defined at 0: the floor makes it 0 there.
    return spec.blob_density * (1 - squared.clamp(min=1e-12).sqrt() / spec.blob_radius)


def logits_reference(
    x: Tensor, table: Tensor, weights, biases, spec: FieldSpec, active_levels, dtype: torch.dtype | None
) -> Tensor:
    """x [n, 3] -> outputs of the MLP [n, 4], the blob in the first, in fp32 or the dtype of x."""
    coordinates = (x + spec.bound) / (2 * spec.bound)
    h = hash_grid_reference(coordinates, table, spec.grid, active_levels=active_levels, dtype=dtype)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h = F.linear(h if layer == 0 else F.relu_(h), weight.to(h.dtype), bias.to(h.dtype))
    return h.to(torch.promote_types(x.dtype, torch.float32))


def density_logit(x: Tensor, h: Tensor, spec: FieldSpec) -> Tensor:
    """A network's first output h [N] at x [N, 3], with the blob -> what the density's activation takes [N]."""
    return h + _blob(x, spec)


def density_activation(logit: Tensor, spec: FieldSpec) -> Tensor:
    """Density per world unit, elementwise; it rises with the logit."""
    return _ClampedExp.apply(logit) if spec.density_activation == "exp" else F.softplus(logit)


def sigma_reference(x: Tensor, logits: Tensor, spec: FieldSpec) -> Tensor:
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


def check_field(
    x: Tensor,
    table: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: FieldSpec,
    count: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Checks of the arguments that the field, its normals and rendering share."""
    check_tensor("x", x, ("N", 3), dtypes=(torch.float32, torch.float64))
    check_tensor(
        "table", table, (spec.grid.rows, spec.grid.features), dtypes=(torch.float32, torch.float64), like=("x", x)
    )
    if len(weights) != len(biases) or not weights:
        raise ValueError(f"weights and biases must be as many and at least 1, got {len(weights)} and {len(biases)}")
    inputs = spec.grid.channels
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        outputs = 4 if layer == len(weights) - 1 else "P"
        check_tensor(f"weights[{layer}]", weight, (outputs, inputs), dtypes=FLOATS, like=("x", x))
        check_tensor(f"biases[{layer}]", bias, (weight.shape[0],), dtypes=FLOATS, like=("x", x))
        inputs = weight.shape[0]
    check_count(count, ("x", x))
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be a float dtype, got {dtype}")


def _fwd_config(dtype: torch.dtype, keep: bool) -> dict[str, int]:
    """Points a tile, warps, and programs a multiprocessor."""
    # Whole rounds of the five that its registers hold: four rounds take 0.183 and 2.13 ms on rays_64 and rays_256, one
    # 0.183 and 2.19 (H100). Those that keep the features need more registers.
    return {"BLOCK": BLOCK, "num_warps": tile_warps(dtype), "programs": 3 if keep else 20}


def _bwd_config(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Points a tile, warps, programs a multiprocessor, and of how many layers a pass adds up the gradients."""
    # The sums of all layers stay in registers where they fit.
    together = 5 if width <= (32 if dtype == torch.float32 else 64) else 1
    return {"BLOCK": BLOCK, "num_warps": tile_warps(dtype), "programs": 2, "together": together}


@lru_cache(maxsize=64)
def spec_of(grid: tuple[int, ...], scene: tuple[float, ...]) -> FieldSpec:
    """The spec whose `spec_numbers` these are."""
    levels, features, log2_entries, base, largest, smooth, softplus = grid
    return FieldSpec(
        grid=HashGridSpec(
            levels=levels,
            features=features,
            log2_entries=log2_entries,
            base_resolution=base,
            max_resolution=largest,
            interpolation="smoothstep" if smooth else "linear",
        ),
        bound=scene[0],
        density_activation="softplus" if softplus else "exp",
        blob_density=scene[1],
        blob_radius=scene[2],
    )


def spec_numbers(spec: FieldSpec) -> tuple[list[int], list[float]]:
    """The spec as a custom operator takes it."""
    grid = spec.grid
    whole = [grid.levels, grid.features, grid.log2_entries, grid.base_resolution, grid.max_resolution]
    choices = [int(grid.interpolation == "smoothstep"), int(spec.density_activation == "softplus")]
    return whole + choices, [float(spec.bound), float(spec.blob_density), float(spec.blob_radius)]


def _kept_shape(grid: HashGridSpec, rows: int) -> tuple[int, ...]:
    """Of the features that a backward will want: 64 bytes a point of 16 levels and 2 features in half precision.

    Reading them back takes a fraction of the time of gathering them again, and no registers for the gathers.
    """
    return -(-rows // BLOCK), grid.features, tile_constants(grid)["PADDED"], BLOCK


@torch.library.custom_op("dream_fast::field", mutates_args=())
def _field(
    x: Tensor,
    table: Tensor,
    parameters: Tensor,
    entries: Tensor,
    packed: Tensor,
    active: Tensor | None,
    levels: int,
    count: Tensor | None,
    width: int,
    layers: int,
    grid: list[int],
    scene: list[float],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """sigma, albedo, and the features, tile by tile (empty unless `keep`), which the backward takes.

    table and parameters (all weights, then all biases) are what gradients go to; entries and packed are the same in
    the compute dtype.
    """
    spec, rows = spec_of(tuple(grid), tuple(scene)), x.shape[0]
    sigma, albedo = x.new_empty(rows), x.new_empty(rows, 3)
    kept = entries.new_empty(_kept_shape(spec.grid, rows) if keep else (0,) * 4)
    config = _fwd_config(entries.dtype, keep)
    programs = config.pop("programs") * multiprocessors(x.device)
    launch(
        field_fwd_kernel,
        (min(programs, -(-rows // config["BLOCK"])),),
        x.device,
        x=x.contiguous(),
        table=aligned_rows(entries),
        levels=level_table(spec.grid, x.device, levels),
        active=active,
        parameters=packed,
        count=count,
        sigma=sigma,
        albedo=albedo,
        kept=kept if keep else None,
        rows=rows,
        scale=unit_scale(spec.bound),
        blob_density=spec.blob_density,
        blob_radius=spec.blob_radius,
        SOFTPLUS=spec.density_activation == "softplus",
        WIDTH=width,
        LAYERS=layers,
        **config,
        **tile_constants(spec.grid),
    )
    return sigma, albedo, kept


@_field.register_fake
def _(x, table, parameters, entries, packed, active, levels, count, width, layers, grid, scene, keep):
    rows, spec = x.shape[0], spec_of(tuple(grid), tuple(scene))
    kept = entries.new_empty(_kept_shape(spec.grid, rows) if keep else (0,) * 4)
    return x.new_empty(rows), x.new_empty(rows, 3), kept


@torch.library.custom_op("dream_fast::field_backward", mutates_args=())
def _field_backward(
    to_sigma: Tensor,
    to_albedo: Tensor,
    x: Tensor,
    entries: Tensor,
    packed: Tensor,
    kept: Tensor,
    active: Tensor | None,
    levels: int,
    count: Tensor | None,
    width: int,
    layers: int,
    grid: list[int],
    scene: list[float],
    into: list[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, table and parameters in fp32, those that `into` asks for; the others come empty."""
    spec, rows, size = spec_of(tuple(grid), tuple(scene)), x.shape[0], packed.numel()
    into_x, into_table, into_parameters = into
    x, scale = x.contiguous(), unit_scale(spec.bound)
    config = _bwd_config(width, entries.dtype)
    programs = config.pop("programs") * multiprocessors(x.device)
    programs = min(programs, -(-rows // config["BLOCK"]))
    together = config.pop("together")
    to_features = None
    if into_x or into_table:
        to_features = x.new_empty(spec.grid.channels, rows, dtype=entries.dtype)
    to_x = torch.zeros_like(x) if into_x else None
    partials = x.new_empty(programs, size)
    passes = range(0, layers + 1, together) if into_parameters else (0,)
    for first in passes:
        launch(
            field_bwd_kernel,
            (programs,),
            x.device,
            x=x,
            kept=kept if kept.numel() else None,
            table=aligned_rows(entries),
            levels=level_table(spec.grid, x.device, levels),
            active=active,
            parameters=packed,
            count=count,
            to_sigma=to_sigma.contiguous(),
            to_albedo=to_albedo.contiguous(),
            to_features=to_features if first == 0 else None,
            to_x=to_x if first == 0 else None,
            partials=partials,
            rows=rows,
            size=size,
            scale=scale,
            blob_density=spec.blob_density,
            blob_radius=spec.blob_radius,
            FIRST=first,
            LAST=min(first + together - 1, layers) if into_parameters else -1,
            SOFTPLUS=spec.density_activation == "softplus",
            WIDTH=width,
            LAYERS=layers,
            **config,
            **tile_constants(spec.grid),
        )
    common = {
        "scale": scale,
        "shift": 0.5,
        "count": count,
        "active_levels": levels if active is None else active,
    }
    nothing = x.new_empty(0)
    if into_x:
        to_x.add_(position_gradient(to_features, x, aligned_rows(entries), spec.grid, **common), alpha=scale)
    to_table = nothing
    if into_table:
        to_table = scatter_features(x, spec.grid, features=to_features, deterministic=deterministic, **common)
    to_parameters = partials.sum(0) if into_parameters else x.new_empty(0)
    return (to_x if into_x else x.new_empty(0)), to_table, to_parameters


@_field_backward.register_fake
def _(
    to_sigma,
    to_albedo,
    x,
    entries,
    packed,
    kept,
    active,
    levels,
    count,
    width,
    layers,
    grid,
    scene,
    into,
    deterministic,
):
    into_x, into_table, into_parameters = into
    return (
        x.new_empty(x.shape if into_x else 0),
        x.new_empty(entries.shape if into_table else 0),
        x.new_empty(packed.shape if into_parameters else 0),
    )


def _save(ctx, inputs, output) -> None:
    x, _, _, entries, packed, active, levels, count, *shape, _ = inputs
    ctx.save_for_backward(x, entries, packed, output[2], active, count)
    ctx.levels, ctx.shape = levels, shape
    ctx.parameters_dtype = inputs[2].dtype


def _backward(ctx, to_sigma: Tensor, to_albedo: Tensor, _):
    x, entries, packed, kept, active, count = ctx.saved_tensors
    into = list(ctx.needs_input_grad[:3])
    deterministic = torch.are_deterministic_algorithms_enabled()
    inputs = (x, entries, packed, kept, active, ctx.levels, count, *ctx.shape)
    found = _field_backward(to_sigma, to_albedo, *inputs, into, deterministic)
    to_x, to_table, to_parameters = (g if wanted else None for g, wanted in zip(found, into, strict=True))
    if to_parameters is not None:
        to_parameters = to_parameters.to(ctx.parameters_dtype)
    return to_x, to_table, to_parameters, *[None] * 10


_field.register_autograd(_backward, setup_context=_save)


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
    """How a GPU computes this field in a compute dtype: "fused", or "unfused: " and the reason.

    normals: with normals of this mode, as `field_normals` does.
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
    """x [N, 3] world, table [rows, F], weights [out, in] and biases [out] a layer -> sigma [N], albedo [N, 3].

    dtype is the compute dtype of grid and MLP (the table's when None); results are fp32 (fp64 when x is). Rows from
    `count` on (an int64 scalar tensor on the device) give zeros and take no gradient.
    Raises TypeError or ValueError for arguments of the wrong type, shape, dtype or device.
    """
    check_field(x, table, weights, biases, spec, count, dtype)
    if not use_triton(x):
        return field_reference(x, table, weights, biases, spec, active_levels=active_levels, count=count, dtype=dtype)
    dtype = table.dtype if dtype is None else dtype
    check_kernel_dtype("x", x)
    check_kernel_dtype("table", table)
    if dtype == torch.float64:
        raise TypeError("dtype is float64, which the kernels do not compute in: call the operator's reference")
    if unfused_reason(spec.grid, weights, dtype):
        return unfused_field(x, table, weights, biases, spec, active_levels, count, dtype)
    parameters = flatten_parameters(weights, biases)
    active = active_levels if isinstance(active_levels, Tensor) else None
    levels = spec.grid.levels if active_levels is None or active is not None else int(active_levels)
    grid, scene = spec_numbers(spec)
    compute = (table.detach().to(dtype), parameters.detach().to(dtype))
    shape = (weights[0].shape[0], len(weights) - 1, grid, scene)
    keep = torch.is_grad_enabled() and (x.requires_grad or table.requires_grad or parameters.requires_grad)
    keep = keep and dtype != torch.float32  # twice the bytes, and not measured
    return _field(x, table, parameters, *compute, active, levels, count, *shape, keep)[:2]
