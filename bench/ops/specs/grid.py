"""Operators of the hash grid: encoding and regularisers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.bench.ops.inputs import (
    FIELD,
    GRID,
    SCENES,
    TINY_GRID,
    nbytes,
    normal,
    points,
    random,
    tiny_normal,
    tiny_parameters,
    tiny_points,
    touched_bytes,
)
from dream_fast.bench.ops.spec import FORWARD, AotCase, Case, OpSpec, Problem, Target, backpropagate
from dream_fast.kernels import HashGridSpec

SCENE_CASES = tuple(f"{name}_256" for name in SCENES)
POINTS = ("rays_64", "rays_128", "rays_256", "uniform_2^18", "uniform_2^20", "uniform_2^22")
POINT_GATE = dict.fromkeys(("rays_128", "rays_256", "rays_512"), "rays_64")
POINT_GATE |= dict.fromkeys(("uniform_2^20", "uniform_2^22"), "uniform_2^18")
POINT_GATE |= {case: case.replace("256", "32") for case in SCENE_CASES}
LINEAR = HashGridSpec(interpolation="linear", features=4, levels=8)


def hash_grid(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    if case.case == "tiny":
        spec, x, table = TINY_GRID, tiny_points(device), tiny_parameters(device)["table"]
        upstream = tiny_normal(x.shape[0], spec.channels, device=device, seed=11)
    else:
        spec, x = GRID, (points(case.case, device) + 1) / 2
        table = normal(GRID.rows, GRID.features, device=device, seed=3)
        upstream = normal(x.shape[0], GRID.channels, device=device, seed=11, dtype=case.compute_dtype)
    backward = case.mode == "forward_backward"
    table_bytes = touched_bytes(case.case, device) if count_bytes else 0
    gathers = x.shape[0] * 8 * spec.levels
    return Problem(
        call=lambda op, tensors, dtype: (op(tensors["x"], tensors["table"], spec, dtype=dtype),),
        tensors={"x": x, "table": table},
        leaves=("table",),
        upstream=(upstream,),
        # Read x and the table, write features; backward: read their gradient, write the table's.
        least_bytes=nbytes(x, upstream) + table_bytes + backward * nbytes(upstream, table),
        gathers=gathers,
        scatters=gathers * backward,
    )


def total_variation(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    return Problem(
        call=lambda op, tensors, dtype: (op(tensors["table"], TINY_GRID, tensors["points"], 0.5),),
        tensors={"table": tiny_parameters(device)["table"], "points": tiny_points(device)},
    )


def weight_decay(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    return Problem(
        call=lambda op, tensors, dtype: (op(tensors["table"], TINY_GRID, 0.5),),
        tensors={"table": tiny_parameters(device)["table"]},
    )


def zero_table(grid: HashGridSpec) -> Tensor:
    return torch.zeros(grid.rows, grid.features, requires_grad=True)


def prepare_gradients(grid: HashGridSpec, dtype: torch.dtype, levels: int | None = None) -> Callable[[], object]:
    """Gradients into table and positions, and of the position gradient into the table."""
    x, table = ((points("rays_64", torch.device("cpu")) + 1) / 2).requires_grad_(), zero_table(grid)
    options = {"dtype": dtype, "active_levels": levels, "count": torch.tensor(x.shape[0])}

    def call():
        backpropagate(kernels.hash_grid(x, table, grid, **options))
        features = kernels.hash_grid(x, table, grid, **options)
        (grad_x,) = torch.autograd.grad(features, x, torch.ones_like(features), create_graph=True)
        backpropagate(grad_x)

    return call


def prepare_regularizers() -> Callable[[], object]:
    table = zero_table(FIELD.grid).detach()
    picked = random(1 << 14, 3, device=torch.device("cpu"), seed=1)

    def call():
        kernels.hash_grid_total_variation_grad(table, FIELD.grid, picked, 1.0)
        kernels.hash_grid_weight_decay_grad(table, FIELD.grid, 1.0)

    return call


SPECS = (
    OpSpec(
        name="hash_grid",
        inputs=hash_grid,
        dtype="float16",
        full=(*POINTS, *SCENE_CASES),
        small=("rays_8", "uniform_2^10"),
        quick=("rays_64", "uniform_2^20"),
        peers=("rays_64", "uniform_2^20"),
        gate=POINT_GATE,
        targets={
            ("rays_64", "forward"): Target(0.226, 0.20, 0.12),
            ("rays_256", "forward"): Target(3.23, 2.8, 1.8),
            ("uniform_2^20", "forward"): Target(0.639, 0.60, 0.50),
            ("rays_64", "forward_backward"): Target(2.03, 1.0, 0.6),
            ("rays_128", "forward_backward"): Target(7.16, 4.0, 2.2),
            ("rays_256", "forward_backward"): Target(29.7, 15, 8),
            ("uniform_2^20", "forward_backward"): Target(2.85, 2.8, 1.9),
        },
        aot={
            "hash_grid/float16": AotCase("rays_64", "float16"),
            "hash_grid/float32": AotCase("rays_64", "float32"),
            "hash_grid/positions": partial(prepare_gradients, FIELD.grid, torch.float16),
            "hash_grid/linear": partial(prepare_gradients, LINEAR, torch.float32, 4),
            "hash_grid/deterministic": AotCase("rays_64", "float16", deterministic=True),
        },
    ),
    OpSpec(
        name="total_variation",
        public="hash_grid_total_variation_grad",
        inputs=total_variation,
        modes=FORWARD,
        aot={"hash_grid/regularizers": prepare_regularizers},
    ),
    OpSpec(name="weight_decay", public="hash_grid_weight_decay_grad", inputs=weight_decay, modes=FORWARD),
)
