"""The scene's field: hash grid, then a small MLP, to density and albedo; and surface normals from the density.

h = MLP(hash_grid((x + bound) / (2 bound))), ReLU between layers, 4 outputs.
sigma = exp(min(h_0 + b exp(-|x|^2 / (2 r^2)), 15)) or softplus(h_0 + b (1 - |x| / r)); albedo = sigmoid(h_1..3).
The exponent is clamped in the forward, so that differences of sigma stay finite; its gradient is sigma * upstream on
both sides of the clamp, so that a density that went past it can come back.
normal = -grad sigma / |grad sigma|, zero where the gradient is: by central differences of step epsilon along the axes
(taps are held inside the cube), or by differentiating the field.

Legend: N points, P = outputs of a layer. Units: world units in [-bound, bound]; sigma per world unit.
Gradients: table, weights, biases and x, also through normals (through analytic ones by double backward).
Numerics: hash grid and MLP in `dtype`; blob, activations and outputs in fp32 (fp64 when x is).
Source: Poole et al., DreamFusion, 2022 (density blob); Mueller et al., 2022 (grid + MLP, clamped exponential).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast.kernels._launch import FLOATS, check_count, check_positive, check_tensor
from dream_fast.kernels._reference import live_rows, pad_rows
from dream_fast.kernels.hash_grid import HashGridSpec, hash_grid_reference

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


def _logits(
    x: Tensor, table: Tensor, weights, biases, spec: FieldSpec, active_levels, dtype: torch.dtype | None
) -> Tensor:
    """x [n, 3] -> outputs of the MLP [n, 4], the blob in the first, in fp32 or the dtype of x."""
    coordinates = (x + spec.bound) / (2 * spec.bound)
    h = hash_grid_reference(coordinates, table, spec.grid, active_levels=active_levels, dtype=dtype)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h = F.linear(h if layer == 0 else F.relu_(h), weight.to(h.dtype), bias.to(h.dtype))
    return h.to(torch.promote_types(x.dtype, torch.float32))


def _sigma(x: Tensor, logits: Tensor, spec: FieldSpec) -> Tensor:
    raw = logits[:, 0] + _blob(x, spec)
    return _ClampedExp.apply(raw) if spec.density_activation == "exp" else F.softplus(raw)


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
    logits = _logits(x, table, weights, biases, spec, active_levels, dtype)
    return pad_rows(_sigma(x, logits, spec), rows), pad_rows(torch.sigmoid(logits[:, 1:]), rows)


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
            plus, minus = (_sigma(tap, _logits(tap, table, weights, biases, spec, **options), spec) for tap in taps)
            differences.append((plus - minus) / (2 * epsilon))
        gradient = torch.stack(differences, 1)
    # Below the floor the normal shrinks to zero instead of dividing 0 by 0.
    normal = -gradient * gradient.square().sum(1, keepdim=True).clamp(min=1e-20).rsqrt()
    return pad_rows(sigma, rows), pad_rows(albedo, rows), pad_rows(normal, rows)


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
    return field_reference(x, table, weights, biases, spec, active_levels=active_levels, count=count, dtype=dtype)


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
