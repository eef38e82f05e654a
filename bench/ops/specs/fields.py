"""Operators that evaluate a field: density and colour, and normals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.bench.ops.inputs import (
    FIELD,
    MLP_FLOPS,
    TINY_FIELD,
    mlp,
    nbytes,
    normal,
    parameters,
    points,
    relative_slope,
    tiny_normal,
    tiny_parameters,
    tiny_points,
    touched_bytes,
)
from dream_fast.bench.ops.spec import AotCase, Case, OpSpec, Problem, Target, backpropagate
from dream_fast.bench.ops.specs.grid import POINT_GATE, POINTS, zero_table
from dream_fast.kernels import FieldSpec

NORMAL_MODES = ("finite_difference", "analytic")
# Fields that a point takes: one at each end of six differences, or a second one for the derivative.
EVALUATIONS = {None: 1, "finite_difference": 7, "analytic": 2}


def tiny_upstream(x: Tensor, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of density, colour and normal, the last weighted as the normals' errors are.

    Otherwise one normal that rounding turns would decide about all gradients.
    """
    sizes = ((x.shape[0],), (x.shape[0], 3), (x.shape[0], 3))
    upstream = [tiny_normal(*size, device=x.device, seed=8 + i) for i, size in enumerate(sizes)]
    slope = relative_slope(x, tensors["table"], *mlp(tensors), TINY_FIELD)
    upstream[2] *= slope / slope.mean()
    return upstream


def full_upstream(x: Tensor) -> list[Tensor]:
    """Gradients of density, colour and normal.

    The loss sees the logarithm of the density, more or less; otherwise the middle of the blob would be all there is.
    """
    rows, device = x.shape[0], x.device
    blob = torch.exp(-FIELD.blob_density * torch.exp(x.square().sum(1) / (-2 * FIELD.blob_radius**2)))
    return [blob * normal(rows, device=device, seed=12), *(normal(rows, 3, device=device, seed=s) for s in (13, 14))]


def field(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    """The problem of `field`, or of `field_normals`, whose cases end in the mode of the normals."""
    normals = case.op == "field_normals"
    mode = next((mode for mode in NORMAL_MODES if case.case.endswith(mode)), None)
    if normals and mode is None:
        raise ValueError(f"a case of field_normals ends in _finite_difference or _analytic, got {case.case}")
    if tiny := case.case.startswith("tiny"):
        spec, x, tensors = TINY_FIELD, 2 * tiny_points(device) - 1, tiny_parameters(device)
    else:
        spec, x, tensors = FIELD, points(case.case, device), parameters(device)
    upstream = (tiny_upstream(x, tensors) if tiny else full_upstream(x))[: 3 if normals else 2]
    rows, backward = x.shape[0], case.mode == "forward_backward"
    corners = rows * 8 * spec.grid.levels * (7 if mode == "finite_difference" else 1)
    table_bytes = touched_bytes("_".join(case.case.split("_")[:2]), device) if count_bytes else 0
    options = {"mode": mode} if normals else {}

    def call(op, tensors, dtype):
        return op(tensors["x"], tensors["table"], *mlp(tensors), spec, dtype=dtype, **options)

    return Problem(
        call=call,
        tensors={"x": x, **tensors},
        leaves=tuple(tensors),
        upstream=tuple(upstream),
        weights=(lambda t: (None, None, relative_slope(t["x"], t["table"], *mlp(t), spec))) if normals else None,
        least_bytes=nbytes(x, *upstream) + table_bytes + backward * nbytes(*upstream, tensors["table"]),
        flops=rows * EVALUATIONS[mode] * MLP_FLOPS * (3 if backward else 1),
        gathers=corners,
        scatters=corners * backward,
    )


def prepare_gradients(
    op: str, width: int, hidden: int, dtype: torch.dtype, activation: str, **options: object
) -> Callable[[], object]:
    """A field of another shape, with gradients into the positions as well."""
    spec = FieldSpec(density_activation=activation)
    sizes = (spec.grid.channels, *[width] * hidden, 4)
    x, table = points("rays_64", torch.device("cpu")).requires_grad_(), zero_table(spec.grid)
    weights = [torch.zeros(b, a, requires_grad=True) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    biases = [torch.zeros(b, requires_grad=True) for b in sizes[1:]]
    options |= {"dtype": dtype, "count": torch.tensor(x.shape[0])}
    return lambda: backpropagate(getattr(kernels, op)(x, table, weights, biases, spec, **options))


SPECS = (
    OpSpec(
        name="field",
        inputs=field,
        dtype="float16",
        full=POINTS,
        small=("rays_8", "uniform_2^10"),
        quick=("rays_64", "uniform_2^20"),
        peers=("rays_64", "uniform_2^20"),
        gate=POINT_GATE,
        targets={
            ("rays_64", "forward"): Target(0.192, 0.19, 0.12),
            ("rays_256", "forward"): Target(2.29, 2.2, 1.5),
            ("rays_64", "forward_backward"): Target(2.03, 1.0, 0.6),
            ("rays_256", "forward_backward"): Target(27.7, 15, 8),
            ("uniform_2^20", "forward_backward"): Target(2.69, 2.65, 2.0),
        },
        aot={
            "field/float16": AotCase("rays_64", "float16"),
            "field/forward": AotCase("rays_64", "float16", "forward"),
            "field/float32": AotCase("rays_64", "float32"),
            "field/narrow": partial(prepare_gradients, "field", 16, 1, torch.float16, "softplus"),
            "field/wide": partial(prepare_gradients, "field", 128, 2, torch.bfloat16, "exp"),
            "field/deterministic": AotCase("rays_64", "float16", deterministic=True),
        },
    ),
    OpSpec(
        name="field_normals",
        inputs=field,
        dtype="float16",
        full=("rays_64_finite_difference", "rays_64_analytic"),
        small=("rays_8_finite_difference", "rays_8_analytic"),
        tiny=("tiny_finite_difference", "tiny_analytic"),
        quick=("rays_64_finite_difference", "rays_64_analytic"),
        peers=("rays_64_finite_difference", "rays_64_analytic"),
        # It differentiates twice, which torch.compile refuses after minutes; inductor stopped on the way compiles no
        # more.
        not_compiled=("rays_64_analytic",),
        gate={f"rays_64_{mode}": f"rays_32_{mode}" for mode in NORMAL_MODES},
        targets={
            ("rays_64_finite_difference", "forward_backward"): Target(22, 6.0, 4.0),
            ("rays_64_analytic", "forward_backward"): Target(None, 3.0, 1.5),
        },
        aot={
            "field_normals/finite_difference_float16": AotCase("rays_64_finite_difference", "float16"),
            "field_normals/analytic_float16": AotCase("rays_64_analytic", "float16"),
            "field_normals/finite_difference_positions": partial(
                prepare_gradients, "field_normals", 16, 1, torch.float16, "exp", mode="finite_difference"
            ),
            "field_normals/analytic_positions": partial(
                prepare_gradients, "field_normals", 16, 1, torch.float16, "softplus", mode="analytic"
            ),
        },
    ),
)
