"""The field with surface normals from its density.

normal = -grad sigma / |grad sigma|, zero where the gradient is: by central differences of step epsilon along the axes
(taps are held inside the cube), or by differentiating the field.

Legend, units and numerics: as in the field.
Gradients: table, weights, biases and x, also through normals (through analytic ones by double backward).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import check_kernel_dtype, check_positive
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
from dream_fast.kernels.fields.field import (
    FieldSpec,
    check_field,
    field_reference,
    logits_reference,
    sigma_reference,
    spec_numbers,
    spec_of,
    unfused_field,
)
from dream_fast.kernels.fields.normals_analytic_kernels import analytic_bwd_kernel, analytic_fwd_kernel
from dream_fast.kernels.fields.normals_fd_kernels import (
    TAPS,
    differences_bwd_kernel,
    differences_fwd_kernel,
    differences_points_kernel,
)
from dream_fast.kernels.grid.gradients import position_gradient, scatter_features

FLOOR = 1e-20  # of the gradient's square, below which there is no normal; as in `_normals`


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
    rows = x.shape[0]
    x = x[: live_rows(rows, count)]
    options = {"active_levels": active_levels, "dtype": dtype}
    if mode == "analytic":
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            sigma, albedo = field_reference(at, table, weights, biases, spec, **options)
            (gradient,) = torch.autograd.grad(sigma.sum(), at, create_graph=keep)
        if not keep:
            sigma, albedo = sigma.detach(), albedo.detach()
    else:
        sigma, albedo = field_reference(x, table, weights, biases, spec, **options)
        differences = []
        for axis in range(3):
            step = torch.zeros(3, dtype=x.dtype, device=x.device)
            step[axis] = epsilon
            taps = [(x + sign * step).clamp(-spec.bound, spec.bound) for sign in (1, -1)]
            plus, minus = (
                sigma_reference(tap, logits_reference(tap, table, weights, biases, spec, **options), spec)
                for tap in taps
            )
            differences.append((plus - minus) / (2 * epsilon))
        gradient = torch.stack(differences, 1)
    return pad_rows(sigma, rows), pad_rows(albedo, rows), pad_rows(normal_of_gradient(gradient), rows)


def normal_of_gradient(gradient: Tensor) -> Tensor:
    """Unit normals [N, 3], against the gradient; 0, without a gradient of its own, where that is nothing.

    It is nothing where sigma is the same at all taps, as it is where exp is held at its largest value. Divided by a
    floor, the gradient of such a normal would be ten orders of magnitude above all others.
    """
    squared = gradient.square().sum(1, keepdim=True)
    flat = squared < FLOOR
    return torch.where(flat, 0, -gradient * torch.where(flat, 1, squared).rsqrt())


def _fwd_config(mode: str, dtype: torch.dtype) -> dict[str, int]:
    """Points a tile and warps."""
    # The Jacobian needs as many registers again, which fp32 has for 32 points only.
    small = mode == "analytic" and dtype == torch.float32
    return {"BLOCK": 32 if small else BLOCK, "num_warps": tile_warps(dtype)}


def _bwd_config(mode: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Points a tile, warps, programs a multiprocessor, and of how many layers a pass adds up the gradients."""
    # By differences, the sums of all layers stay in registers where they fit; analytic ones go to memory tile by tile.
    # In either mode a pass over fewer layers needs less shared memory.
    together = 5 if width <= (32 if dtype == torch.float32 else 64) else 1
    return {**_fwd_config(mode, dtype), "programs": 2, "together": together}


# Points by differences whose gradients into the features of all taps are in memory at a time: 68 MB in half precision
# with 16 levels of 2 features, for which a step of a million rows would take 560.
_DIFFERENCES_CHUNK = 1 << 17


def _constants(spec: FieldSpec, width: int, layers: int) -> dict[str, int | bool | float]:
    """What every kernel over tiles takes."""
    return {
        "scale": unit_scale(spec.bound),
        "blob_density": spec.blob_density,
        "blob_radius": spec.blob_radius,
        "SOFTPLUS": spec.density_activation == "softplus",
        "WIDTH": width,
        "LAYERS": layers,
        **tile_constants(spec.grid),
    }


@torch.library.custom_op("dream_fast::field_normals", mutates_args=())
def _field_normals(
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
    mode: str,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sigma, albedo, normal, and the gradient of sigma where backward needs it: by differences.

    table and parameters (all weights, then all biases) are what gradients go to; entries and packed are the same in
    the compute dtype.
    """
    spec, rows = spec_of(tuple(grid), tuple(scene)), x.shape[0]
    sigma, albedo, normal = x.new_empty(rows), x.new_empty(rows, 3), x.new_empty(rows, 3)
    differences = mode == "finite_difference"
    # Zeros below the count: whatever is never read may be looked at by torch's own checks.
    gradient = x.new_zeros(rows, 3) if differences else x.new_empty(0)
    config = _fwd_config(mode, entries.dtype)
    arguments = {
        "x": x.contiguous(),
        "table": aligned_rows(entries),
        "parameters": packed,
        "levels": level_table(spec.grid, x.device, levels),
        "active": active,
        "count": count,
        "sigma": sigma,
        "albedo": albedo,
        "normal": normal,
        "n": rows,
        **_constants(spec, width, layers),
        **config,
    }
    programs = (-(-rows // config["BLOCK"]),)
    if differences:
        arguments |= {"gradient": gradient, "bound": spec.bound, "epsilon": epsilon}
        launch(differences_fwd_kernel, programs, x.device, **arguments)
    else:
        launch(analytic_fwd_kernel, programs, x.device, **arguments)
    return sigma, albedo, normal, gradient


@_field_normals.register_fake
def _(x, table, parameters, entries, packed, active, levels, count, width, layers, grid, scene, mode, epsilon):
    rows = x.shape[0]
    gradient = x.new_empty(rows, 3) if mode == "finite_difference" else x.new_empty(0)
    return x.new_empty(rows), x.new_empty(rows, 3), x.new_empty(rows, 3), gradient


@torch.library.custom_op("dream_fast::field_normals_backward", mutates_args=())
def _field_normals_backward(
    to_sigma: Tensor,
    to_albedo: Tensor,
    to_normal: Tensor,
    gradient: Tensor,
    x: Tensor,
    entries: Tensor,
    packed: Tensor,
    active: Tensor | None,
    levels: int,
    count: Tensor | None,
    width: int,
    layers: int,
    grid: list[int],
    scene: list[float],
    mode: str,
    epsilon: float,
    into: list[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, table and parameters in fp32, those that `into` asks for; the others come empty."""
    spec, rows, size = spec_of(tuple(grid), tuple(scene)), x.shape[0], packed.numel()
    into_x, into_table, into_parameters = into
    x, entries = x.contiguous(), aligned_rows(entries)
    into = _Gradients(
        x=torch.zeros_like(x) if into_x else None,
        table=torch.zeros_like(entries, dtype=torch.float32) if into_table else None,
        parameters=x.new_zeros(size) if into_parameters else None,
    )
    config = _bwd_config(mode, width, entries.dtype)
    together, programs = config.pop("together"), config.pop("programs") * multiprocessors(x.device)
    passes = [(first, min(first + together - 1, layers)) for first in range(0, layers + 1, together)]
    upstream = {"to_sigma": to_sigma, "to_albedo": to_albedo, "to_normal": to_normal}
    chunk = _DIFFERENCES_CHUNK if mode == "finite_difference" else max(rows, 1)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        points = x[part]
        arguments = {
            "x": points,
            "table": entries,
            "parameters": packed,
            "levels": level_table(spec.grid, x.device, levels),
            "active": active,
            "count": count - start if start and count is not None else count,
            **{name: value[part].contiguous() for name, value in upstream.items()},
            "n": points.shape[0],
            **_constants(spec, width, layers),
            **config,
        }
        options = {
            "into": into._replace(x=into.x[part] if into_x else None),
            "spec": spec,
            "passes": passes if into_parameters else [(0, -1)],
            "programs": programs,
            "active_levels": levels if active is None else active,
            "deterministic": deterministic,
        }
        if mode == "finite_difference":
            _differences_backward(arguments, gradient=gradient[part], epsilon=epsilon, **options)
        else:
            _analytic_backward(arguments, **options)
    return tuple(x.new_empty(0) if found is None else found for found in into)


class _Gradients(NamedTuple):
    """What is asked for of x [n, 3], table and parameters, in fp32, to be added to (x: to be written)."""

    x: Tensor | None
    table: Tensor | None
    parameters: Tensor | None

    def add_parameters(self, partial: Tensor) -> None:
        if self.parameters is not None:
            self.parameters.add_(partial[:, : self.parameters.numel()].sum(0))


def _row_of_sums(parameters: Tensor) -> int:
    """Numbers in a program's row of sums: aligned rows are written several numbers at once."""
    return -(-parameters.numel() // 16) * 16


def _differences_backward(
    arguments: dict[str, Any],
    *,
    gradient: Tensor,
    epsilon: float,
    into: _Gradients,
    spec: FieldSpec,
    passes: list[tuple[int, int]],
    programs: int,
    active_levels: int | Tensor,
    deterministic: bool,
) -> None:
    """Adds what some points give to the gradients."""
    x, entries, n = arguments["x"], arguments["table"], arguments["n"]
    tiles = -(-n // arguments["BLOCK"])
    columns = tiles * arguments["BLOCK"] * TAPS
    to_features = x.new_empty(spec.grid.channels, columns, dtype=entries.dtype)
    positions, live = x.new_empty(columns, 3), torch.empty((), dtype=torch.int64, device=x.device)
    to_raw = None if into.x is None else x.new_empty(columns)
    world = {"bound": spec.bound, "epsilon": epsilon}
    partial = x.new_empty(min(programs, tiles * TAPS), _row_of_sums(arguments["parameters"]))
    for first, last in passes:
        launch(
            differences_bwd_kernel,
            partial.shape[:1],
            x.device,
            gradient=gradient,
            to_features=to_features,
            positions=positions,
            to_raw=to_raw,
            rows=live,
            partial=partial,
            columns=columns,
            size=partial.shape[1],
            FIRST=first,
            LAST=last,
            **world,
            **arguments,
        )
    common = {"scale": 1.0, "shift": 0.0, "count": live, "active_levels": active_levels}
    if into.x is not None:
        launch(
            differences_points_kernel,
            (-(-n // 128),),
            x.device,
            x=x,
            to_units=position_gradient(to_features, positions, entries, spec.grid, **common),
            to_raw=to_raw,
            count=arguments["count"],
            out=into.x,
            n=n,
            scale=arguments["scale"],
            blob_density=spec.blob_density,
            blob_radius=spec.blob_radius,
            SOFTPLUS=arguments["SOFTPLUS"],
            TILE=arguments["BLOCK"],
            BLOCK=128,
            **world,
        )
    if into.table is not None:
        scatter_features(
            positions, spec.grid, features=to_features, deterministic=deterministic, out=into.table, **common
        )
    into.add_parameters(partial)


def _analytic_backward(
    arguments: dict[str, Any],
    *,
    into: _Gradients,
    spec: FieldSpec,
    passes: list[tuple[int, int]],
    programs: int,
    active_levels: int | Tensor,
    deterministic: bool,
) -> None:
    """Adds what all points give to the gradients."""
    x, entries, n = arguments["x"], arguments["table"], arguments["n"]
    to_features = x.new_empty(spec.grid.channels, n, dtype=entries.dtype)
    backs, tangent = torch.empty_like(to_features), torch.empty_like(x)
    # A program adds to its row tile by tile.
    partial = x.new_zeros(min(programs, -(-n // arguments["BLOCK"])), _row_of_sums(arguments["parameters"]))
    for first, last in passes:
        launch(
            analytic_bwd_kernel,
            partial.shape[:1],
            x.device,
            to_features=to_features,
            backs=backs,
            tangent=tangent,
            to_points=into.x,
            partial=partial,
            size=partial.shape[1],
            FIRST=first,
            LAST=last,
            **arguments,
        )
    scale = arguments["scale"]
    common = {"scale": scale, "shift": 0.5, "count": arguments["count"], "active_levels": active_levels}
    if into.x is not None:
        to_units = position_gradient(to_features, x, entries, spec.grid, **common)
        to_units += position_gradient(backs, x, entries, spec.grid, tangent=tangent, **common)
        into.x.add_(to_units, alpha=scale)
    if into.table is not None:
        scatter_features(
            x,
            spec.grid,
            features=to_features,
            tangent=tangent,
            tangent_features=backs,
            deterministic=deterministic,
            out=into.table,
            **common,
        )
    into.add_parameters(partial)


@_field_normals_backward.register_fake
def _(
    to_sigma,
    to_albedo,
    to_normal,
    gradient,
    x,
    entries,
    packed,
    active,
    levels,
    count,
    width,
    layers,
    grid,
    scene,
    mode,
    epsilon,
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
    x, _, parameters, entries, packed, active, levels, count, *shape = inputs
    ctx.save_for_backward(x, entries, packed, active, count, output[3])
    ctx.levels, ctx.shape, ctx.parameters_dtype = levels, shape, parameters.dtype


def _backward(ctx, to_sigma: Tensor, to_albedo: Tensor, to_normal: Tensor, _to_gradient: Tensor):
    x, entries, packed, active, count, gradient = ctx.saved_tensors
    into = list(ctx.needs_input_grad[:3])
    found = _field_normals_backward(
        to_sigma,
        to_albedo,
        to_normal,
        gradient,
        x,
        entries,
        packed,
        active,
        ctx.levels,
        count,
        *ctx.shape,
        into,
        torch.are_deterministic_algorithms_enabled(),
    )
    to_x, to_table, to_parameters = (g if wanted else None for g, wanted in zip(found, into, strict=True))
    if to_parameters is not None:
        to_parameters = to_parameters.to(ctx.parameters_dtype)
    return to_x, to_table, to_parameters, *[None] * 11


_field_normals.register_autograd(_backward, setup_context=_save)


def _unfused(
    x: Tensor,
    table: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: FieldSpec,
    count: Tensor | None,
    mode: str,
    epsilon: float,
    options: dict[str, object],
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition over the unfused field, for shapes that have no fused kernel."""
    live = None
    if count is not None:
        live = torch.arange(x.shape[0], device=x.device)[:, None] < count
        x = torch.where(live, x, 0)
    if mode == "analytic":
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            sigma, albedo = unfused_field(at, table, weights, biases, spec, count=count, **options)
            (gradient,) = torch.autograd.grad(sigma.sum(), at, create_graph=keep)
        if not keep:
            sigma, albedo = sigma.detach(), albedo.detach()
    else:
        sigma, albedo = unfused_field(x, table, weights, biases, spec, count=count, **options)
        differences = []
        for axis in range(3):
            step = torch.zeros_like(x)
            step[:, axis] = epsilon
            taps = [(x + sign * step).clamp(-spec.bound, spec.bound) for sign in (1, -1)]
            plus, minus = (unfused_field(tap, table, weights, biases, spec, count=count, **options)[0] for tap in taps)
            differences.append((plus - minus) / (2 * epsilon))
        gradient = torch.stack(differences, 1)
    normal = normal_of_gradient(gradient)
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

    mode "finite_difference" (central, `epsilon` world units: six more fields a point) or "analytic" (one more
    backward).
    Raises as `field`, and ValueError for an unknown mode.
    """
    check_field(x, table, weights, biases, spec, count, dtype)
    if mode not in ("finite_difference", "analytic"):
        raise ValueError(f'mode must be "finite_difference" or "analytic", got "{mode}"')
    check_positive("epsilon", epsilon)
    options = {"active_levels": active_levels, "dtype": dtype}
    if not use_triton(x):
        return field_normals_reference(
            x, table, weights, biases, spec, count=count, mode=mode, epsilon=epsilon, **options
        )
    dtype = table.dtype if dtype is None else dtype
    check_kernel_dtype("x", x)
    check_kernel_dtype("table", table)
    if dtype == torch.float64:
        raise TypeError("dtype is float64, which the kernels do not compute in: call the operator's reference")
    if unfused_reason(spec.grid, weights, dtype, mode):
        return _unfused(x, table, weights, biases, spec, count, mode, epsilon, options)
    parameters = flatten_parameters(weights, biases)
    active = active_levels if isinstance(active_levels, Tensor) else None
    levels = spec.grid.levels if active_levels is None or active is not None else int(active_levels)
    compute = (table.detach().to(dtype), parameters.detach().to(dtype))
    shape = (weights[0].shape[0], len(weights) - 1, *spec_numbers(spec))
    return _field_normals(x, table, parameters, *compute, active, levels, count, *shape, mode, float(epsilon))[:3]
