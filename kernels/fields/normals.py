"""The field with surface normals from its density.

normal = -grad sigma / |grad sigma|, zero where the gradient is: by central differences of step epsilon along the axes
(taps are clamped to the cube), or by differentiating the field.

Legend, units and numerics: as in `fields.field`.
Gradients: table, weights, biases and x, also through normals (through analytic ones by double backward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import check_compute_dtype, check_kernel_dtype, check_positive
from dream_fast.kernels._core.launch import launch, multiprocessors, use_triton
from dream_fast.kernels._core.operator import operator
from dream_fast.kernels._core.reference import live_rows, pad_rows
from dream_fast.kernels.fields.density_gradient import autograd_gradient, central_differences, normal_of_gradient
from dream_fast.kernels.fields.encode import (
    BLOCK,
    TileConfig,
    aligned_rows,
    flatten_parameters,
    level_words,
    tile_warps,
    unfused_reason,
)
from dream_fast.kernels.fields.field import (
    fake_grads,
    field_constants,
    field_reference,
    fused_arguments,
    layer_passes,
    logits_reference,
    select_grads,
    sigma_reference,
    unfused_field,
)
from dream_fast.kernels.fields.normals_analytic_kernels import (
    field_normals_analytic_bwd_kernel,
    field_normals_analytic_fwd_kernel,
)
from dream_fast.kernels.fields.normals_fd_kernels import (
    TAPS,
    field_normals_fd_bwd_kernel,
    field_normals_fd_fwd_kernel,
    field_normals_fd_x_bwd_kernel,
)
from dream_fast.kernels.fields.spec import FieldSpec, check_field, decode_field_spec, encode_field_spec
from dream_fast.kernels.grid.gradients import GridPoints, position_gradient, scatter_features


def _with_normals(
    field: Callable[[Tensor], tuple[Tensor, Tensor]],
    density: Callable[[Tensor], Tensor],
    x: Tensor,
    spec: FieldSpec,
    mode: str,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """field: x -> sigma, albedo; density: x -> sigma alone -> sigma, albedo, normal at x."""
    if mode == "analytic":
        sigma, albedo, gradient = autograd_gradient(field, x)
    else:
        sigma, albedo = field(x)
        gradient = central_differences(density, x, epsilon, spec.bound)
    return sigma, albedo, normal_of_gradient(gradient)


def field_normals_reference(
    x: Tensor,
    table: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: FieldSpec,
    *,
    active_levels: int | Tensor | None = None,
    count: Tensor | None = None,
    dtype: torch.dtype | None = None,
    mode: str = "finite_difference",
    epsilon: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `field_normals` in plain PyTorch, for any float dtype."""
    arguments = (table, weights, biases, spec)

    def evaluate(at: Tensor) -> tuple[Tensor, Tensor]:
        return field_reference(at, *arguments, active_levels=active_levels, dtype=dtype)

    def density(at: Tensor) -> Tensor:
        return sigma_reference(at, logits_reference(at, *arguments, active_levels, dtype), spec)

    rows = x.shape[0]
    sigma, albedo, normal = _with_normals(evaluate, density, x[: live_rows(rows, count)], spec, mode, epsilon)
    return pad_rows(sigma, rows), pad_rows(albedo, rows), pad_rows(normal, rows)


def _field_normals_fwd_config(mode: str, dtype: torch.dtype) -> TileConfig:
    """The Jacobian needs as many registers again, which fp32 has for 32 points only."""
    small = mode == "analytic" and dtype == torch.float32
    return TileConfig(block=32 if small else BLOCK, warps=tile_warps(dtype))


def _field_normals_bwd_config(mode: str, width: int, dtype: torch.dtype) -> TileConfig:
    """By differences, the sums of all layers stay in registers where they fit; analytic ones go to memory tile by tile.

    In either mode a pass over fewer layers needs less shared memory.
    """
    layers_a_pass = 5 if width <= (32 if dtype == torch.float32 else 64) else 1
    return _field_normals_fwd_config(mode, dtype)._replace(programs=2, layers_a_pass=layers_a_pass)


# Points by differences whose gradients of the features of all taps are in memory at a time: 68 MB in half precision
# with 16 levels of 2 features, where a step of a million rows would take 560.
_DIFFERENCES_CHUNK = 1 << 17


@operator("dream_fast::field_normals")
def _field_normals_fwd(
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
    mode: str,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sigma, albedo, normal, and the gradient of sigma, which the backward by differences needs (else empty).

    Gradients go to table and parameters (all weights, then all biases); compute_table and compute_parameters are the
    same in the compute dtype.
    """
    spec, rows = decode_field_spec(spec_numbers), x.shape[0]
    sigma, albedo, normal = x.new_empty(rows), x.new_empty(rows, 3), x.new_empty(rows, 3)
    by_differences = mode == "finite_difference"
    # Zeros past the count: torch's own checks may read what no kernel does.
    gradient = x.new_zeros(rows, 3) if by_differences else x.new_empty(0)
    config = _field_normals_fwd_config(mode, compute_table.dtype)
    arguments = {
        "x": x.contiguous(),
        "table": aligned_rows(compute_table),
        "parameters": compute_parameters,
        "levels": level_words(spec.grid, x.device, levels),
        "active": active,
        "count": count,
        "sigma": sigma,
        "albedo": albedo,
        "normal": normal,
        "n": rows,
        "BLOCK": config.block,
        "num_warps": config.warps,
        **field_constants(spec, width, layers),
    }
    programs = (-(-rows // config.block),)
    if by_differences:
        arguments |= {"gradient": gradient, "bound": spec.bound, "epsilon": epsilon}
        launch(field_normals_fd_fwd_kernel, programs, x.device, **arguments)
    else:
        launch(field_normals_analytic_fwd_kernel, programs, x.device, **arguments)
    return sigma, albedo, normal, gradient


@_field_normals_fwd.register_fake
def _(x, *arguments):
    *_, mode, _epsilon = arguments
    rows = x.shape[0]
    gradient = x.new_empty(rows, 3) if mode == "finite_difference" else x.new_empty(0)
    return x.new_empty(rows), x.new_empty(rows, 3), x.new_empty(rows, 3), gradient


@operator("dream_fast::field_normals_backward")
def _field_normals_bwd(
    grad_sigma: Tensor,
    grad_albedo: Tensor,
    grad_normal: Tensor,
    gradient: Tensor,
    x: Tensor,
    table: Tensor,
    parameters: Tensor,
    active: Tensor | None,
    levels: int,
    count: Tensor | None,
    width: int,
    layers: int,
    spec_numbers: list[float],
    mode: str,
    epsilon: float,
    needs_grad: list[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, table and parameters in fp32, where `needs_grad`; the others are empty.

    table and parameters are in the compute dtype; gradient is that of sigma, of the forward.
    """
    spec, rows = decode_field_spec(spec_numbers), x.shape[0]
    x_needs_grad, table_needs_grad, parameters_need_grad = needs_grad
    x, table = x.contiguous(), aligned_rows(table)
    grads = _Gradients(
        x=torch.zeros_like(x) if x_needs_grad else None,
        table=torch.zeros_like(table, dtype=torch.float32) if table_needs_grad else None,
        parameters=x.new_zeros(parameters.numel()) if parameters_need_grad else None,
    )
    config = _field_normals_bwd_config(mode, width, table.dtype)
    work = _Backward(
        spec=spec,
        passes=layer_passes(layers, config.layers_a_pass) if parameters_need_grad else [(0, -1)],
        programs=config.programs * multiprocessors(x.device),
        active_levels=levels if active is None else active,
        deterministic=deterministic,
    )
    upstream = {"grad_sigma": grad_sigma, "grad_albedo": grad_albedo, "grad_normal": grad_normal}
    chunk = _DIFFERENCES_CHUNK if mode == "finite_difference" else max(rows, 1)
    for start in range(0, rows, chunk):
        rows_of_chunk = slice(start, start + chunk)
        points = x[rows_of_chunk]
        arguments = {
            "x": points,
            "table": table,
            "parameters": parameters,
            "levels": level_words(spec.grid, x.device, levels),
            "active": active,
            "count": count - start if start and count is not None else count,
            **{name: value[rows_of_chunk].contiguous() for name, value in upstream.items()},
            "n": points.shape[0],
            "BLOCK": config.block,
            "num_warps": config.warps,
            **field_constants(spec, width, layers),
        }
        grads_of_chunk = grads._replace(x=None if grads.x is None else grads.x[rows_of_chunk])
        if mode == "finite_difference":
            _fd_bwd(arguments, grads_of_chunk, work, gradient[rows_of_chunk], epsilon)
        else:
            _analytic_bwd(arguments, grads_of_chunk, work)
    grad_x, grad_table, grad_parameters = (x.new_empty(0) if grad is None else grad for grad in grads)
    return grad_x, grad_table, grad_parameters


class _Gradients(NamedTuple):
    """fp32 buffers for the gradients of x [n, 3] (written), table and parameters (added to); None where not needed."""

    x: Tensor | None
    table: Tensor | None
    parameters: Tensor | None

    def add_parameters(self, partial_sums: Tensor) -> None:
        """Add partial_sums [programs, size] to the parameters' gradient."""
        if self.parameters is not None:
            self.parameters.add_(partial_sums[:, : self.parameters.numel()].sum(0))


class _Backward(NamedTuple):
    """Settings of a backward. passes: first and last layer of each; programs: of a launch at most."""

    spec: FieldSpec
    passes: list[tuple[int, int]]
    programs: int
    active_levels: int | Tensor
    deterministic: bool


def _sums_size(parameters: Tensor) -> int:
    """Numbers in a program's row of sums: aligned rows are written several numbers at once."""
    return -(-parameters.numel() // 16) * 16


def _fd_bwd(arguments: dict[str, Any], grads: _Gradients, work: _Backward, gradient: Tensor, epsilon: float) -> None:
    """Add the gradients of some points, by central differences, to `grads`."""
    x, table, n, spec = arguments["x"], arguments["table"], arguments["n"], work.spec
    tiles = -(-n // arguments["BLOCK"])
    columns = tiles * arguments["BLOCK"] * TAPS
    grad_features = x.new_empty(spec.grid.channels, columns, dtype=table.dtype)
    positions, live = x.new_empty(columns, 3), torch.empty((), dtype=torch.int64, device=x.device)
    grad_logits = None if grads.x is None else x.new_empty(columns)
    world: dict[str, Any] = {"bound": spec.bound, "epsilon": epsilon}
    partial_sums = x.new_empty(min(work.programs, tiles * TAPS), _sums_size(arguments["parameters"]))
    for first, last in work.passes:
        launch(
            field_normals_fd_bwd_kernel,
            partial_sums.shape[:1],
            x.device,
            gradient=gradient,
            grad_features=grad_features,
            positions=positions,
            grad_logits=grad_logits,
            rows=live,
            partial_sums=partial_sums,
            columns=columns,
            size=partial_sums.shape[1],
            FIRST=first,
            LAST=last,
            **world,
            **arguments,
        )
    taps = GridPoints(positions, count=live, active_levels=work.active_levels)
    if grads.x is not None:
        launch(
            field_normals_fd_x_bwd_kernel,
            (-(-n // 128),),
            x.device,
            x=x,
            grad_units=position_gradient(grad_features, taps, table, spec.grid),
            grad_logits=grad_logits,
            count=arguments["count"],
            grad_x=grads.x,
            n=n,
            scale=arguments["scale"],
            blob_density=spec.blob_density,
            blob_radius=spec.blob_radius,
            SOFTPLUS=arguments["SOFTPLUS"],
            TILE=arguments["BLOCK"],
            BLOCK=128,
            **world,
        )
    if grads.table is not None:
        scatter_features(taps, spec.grid, features=grad_features, deterministic=work.deterministic, out=grads.table)
    grads.add_parameters(partial_sums)


def _analytic_bwd(arguments: dict[str, Any], grads: _Gradients, work: _Backward) -> None:
    """Add the gradients of all points, with analytic normals, to `grads`."""
    x, table, n, grid = arguments["x"], arguments["table"], arguments["n"], work.spec.grid
    grad_features = x.new_empty(grid.channels, n, dtype=table.dtype)
    slopes, tangent = torch.empty_like(grad_features), torch.empty_like(x)
    # Zeros: a program adds to its row tile by tile.
    partial_sums = x.new_zeros(min(work.programs, -(-n // arguments["BLOCK"])), _sums_size(arguments["parameters"]))
    for first, last in work.passes:
        launch(
            field_normals_analytic_bwd_kernel,
            partial_sums.shape[:1],
            x.device,
            grad_features=grad_features,
            slopes=slopes,
            tangent=tangent,
            grad_x=grads.x,
            partial_sums=partial_sums,
            size=partial_sums.shape[1],
            FIRST=first,
            LAST=last,
            **arguments,
        )
    scale = arguments["scale"]
    points = GridPoints(x, scale, 0.5, arguments["count"], work.active_levels)
    if grads.x is not None:
        grad_units = position_gradient(grad_features, points, table, grid)
        grad_units += position_gradient(slopes, points, table, grid, tangent=tangent)
        grads.x.add_(grad_units, alpha=scale)
    if grads.table is not None:
        scatter_features(
            points,
            grid,
            features=grad_features,
            tangent=tangent,
            tangent_features=slopes,
            deterministic=work.deterministic,
            out=grads.table,
        )
    grads.add_parameters(partial_sums)


@_field_normals_bwd.register_fake
def _(grad_sigma, grad_albedo, grad_normal, gradient, x, table, parameters, *options):
    return fake_grads(x, table, parameters, needs_grad=options[-2])


def _save(ctx, inputs, output) -> None:
    x, _, parameters, compute_table, compute_parameters, active, levels, count, *shape = inputs
    ctx.save_for_backward(x, compute_table, compute_parameters, active, count, output[3])
    ctx.levels, ctx.shape, ctx.parameters_dtype = levels, shape, parameters.dtype


def _backward(ctx, grad_sigma: Tensor, grad_albedo: Tensor, grad_normal: Tensor, _):
    x, table, parameters, active, count, gradient = ctx.saved_tensors
    needs_grad = list(ctx.needs_input_grad[:3])
    grads = _field_normals_bwd(
        grad_sigma,
        grad_albedo,
        grad_normal,
        gradient,
        x,
        table,
        parameters,
        active,
        ctx.levels,
        count,
        *ctx.shape,
        needs_grad,
        torch.are_deterministic_algorithms_enabled(),
    )
    return *select_grads(grads, needs_grad, ctx.parameters_dtype), *[None] * 10


_field_normals_fwd.register_autograd(_backward, setup_context=_save)


def _unfused_field_normals(
    x: Tensor,
    parameters: tuple[Tensor, Sequence[Tensor], Sequence[Tensor]],
    spec: FieldSpec,
    active_levels,
    count: Tensor | None,
    dtype,
    mode: str,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition over the unfused field, for shapes that have no fused kernel."""
    live = None
    if count is not None:
        live = torch.arange(x.shape[0], device=x.device)[:, None] < count
        x = torch.where(live, x, 0)

    def evaluate(at: Tensor) -> tuple[Tensor, Tensor]:
        return unfused_field(at, *parameters, spec, active_levels, count, dtype)

    def density(at: Tensor) -> Tensor:
        return evaluate(at)[0]

    sigma, albedo, normal = _with_normals(evaluate, density, x, spec, mode, epsilon)
    return sigma, albedo, normal if live is None else torch.where(live, normal, 0)


def field_normals(
    x: Tensor,
    table: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: FieldSpec,
    *,
    active_levels: int | Tensor | None = None,
    count: Tensor | None = None,
    dtype: torch.dtype | None = None,
    mode: str = "finite_difference",
    epsilon: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `field`, with normals: sigma [N], albedo [N, 3], normal [N, 3] (unit, pointing out of the matter).

    A normal is 0 where the density is flat. mode: "finite_difference" (central, steps of `epsilon` world units: six
    more fields a point) or "analytic" (one more backward).
    Raises TypeError or ValueError: as `field`, and for an unknown mode or an epsilon that is not positive.
    Source: Poole et al., DreamFusion, 2022 (normals of the density).
    """
    check_field(x, table, weights, biases, spec, count, dtype)
    if mode not in ("finite_difference", "analytic"):
        raise ValueError(f'mode must be "finite_difference" or "analytic", got "{mode}"')
    check_positive("epsilon", epsilon)
    if not use_triton(x):
        return field_normals_reference(
            x,
            table,
            weights,
            biases,
            spec,
            active_levels=active_levels,
            count=count,
            dtype=dtype,
            mode=mode,
            epsilon=epsilon,
        )
    dtype = table.dtype if dtype is None else dtype
    check_kernel_dtype("x", x)
    check_kernel_dtype("table", table)
    check_compute_dtype(dtype)
    if unfused_reason(spec.grid, weights, dtype, mode):
        return _unfused_field_normals(x, (table, weights, biases), spec, active_levels, count, dtype, mode, epsilon)
    return _field_normals_fwd(
        *fused_arguments(x, table, flatten_parameters(weights, biases), spec, active_levels, count, dtype),
        weights[0].shape[0],
        len(weights) - 1,
        encode_field_spec(spec),
        mode,
        float(epsilon),
    )[:3]
