"""The shape of a field: its hash grid, cube, density activation and blob; and checks of the arguments it implies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import FLOATS, check_count, check_positive, check_tensor
from dream_fast.kernels.grid.spec import HashGridSpec, decode_spec, encode_spec


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """Shape of a field.

    grid: the hash grid. bound: half the edge of the scene cube, in world units. density_activation: "exp" (its argument
    is clamped to 15) or "softplus". blob_density, blob_radius: height b and radius r (world units) of the blob that is
    added to the density's logit around the origin.
    Raises ValueError: for a bound or radius that is not positive, and for an unknown activation.
    """

    grid: HashGridSpec = field(default_factory=HashGridSpec)
    bound: float = 1.0
    density_activation: str = "exp"
    blob_density: float = 5.0
    blob_radius: float = 0.2

    def __post_init__(self) -> None:
        check_positive("bound", self.bound)
        check_positive("blob_radius", self.blob_radius)
        if self.density_activation not in ("exp", "softplus"):
            raise ValueError(f'density_activation must be "exp" or "softplus", got "{self.density_activation}"')


def encode_field_spec(spec: FieldSpec) -> list[float]:
    """Numbers of a spec, the grid's first, as a custom operator takes them."""
    softplus = spec.density_activation == "softplus"
    scene = [spec.bound, softplus, spec.blob_density, spec.blob_radius]
    return [float(number) for number in [*encode_spec(spec.grid), *scene]]


def decode_field_spec(numbers: Sequence[float]) -> FieldSpec:
    """The spec that `encode_field_spec` gave these numbers for."""
    return _decode(tuple(numbers))


@lru_cache(maxsize=64)
def _decode(numbers: tuple[float, ...]) -> FieldSpec:
    *grid, bound, softplus, blob_density, blob_radius = numbers
    return FieldSpec(
        grid=decode_spec([int(number) for number in grid]),
        bound=bound,
        density_activation="softplus" if softplus else "exp",
        blob_density=blob_density,
        blob_radius=blob_radius,
    )


def check_field(
    x: Tensor,
    table: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: FieldSpec,
    count: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Check the arguments that the field, its normals and rendering share.

    Raises TypeError or ValueError: for a wrong type, shape, dtype, device or number of layers.
    """
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
