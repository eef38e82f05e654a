"""Every kernel once against its reference, on inputs so small that it takes seconds. `dream-fast --doctor` calls it.

`python -m dream_fast.bench selftest` prints a line of JSON a kernel, as it goes. On a machine without a GPU the kernels
run in Triton's interpreter, which has to be asked for before they are imported: TRITON_INTERPRET=1. The measure is that
of the benchmark's gate: an error of at most twice that of the reference in the kernel's own dtype.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.bench.cases import Problem, normal, random, run
from dream_fast.bench.gate import copied, judge_problem
from dream_fast.kernels import AdanState, FieldSpec, HashGridSpec, grid_regularizers

GRID = HashGridSpec(levels=2, features=2, log2_entries=8, base_resolution=4, max_resolution=16)
FIELD = FieldSpec(grid=GRID)
POINTS, RAYS, CELLS, HIDDEN, PIXELS = 48, 9, 16, 16, 8
BOTH, FORWARD = "forward_backward", "forward"


def _parameters(device: torch.device) -> dict[str, Tensor]:
    draw = partial(normal, device=device)
    return {
        "table": draw(GRID.rows, GRID.features, seed=1),
        "weight_0": 0.5 * draw(HIDDEN, GRID.channels, seed=2),
        "weight_1": 0.3 * draw(4, HIDDEN, seed=3),
        "bias_0": 0.1 * draw(HIDDEN, seed=4),
        "bias_1": 0.1 * draw(4, seed=5),
    }


def _layers(tensors: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [tensors["weight_0"], tensors["weight_1"]], [tensors["bias_0"], tensors["bias_1"]]


def _rays(device: torch.device) -> dict[str, Tensor]:
    aims = 0.3 * normal(RAYS, 3, device=device, seed=6)
    origins = torch.tensor([0.1, 0.2, 2.0], device=device).expand(RAYS, 3).contiguous()
    directions = torch.nn.functional.normalize(aims - origins, dim=1)
    return {
        "origins": origins,
        "directions": directions,
        "bits": torch.full((1, CELLS**3 // 8), 255, dtype=torch.uint8, device=device),
    }


def problems(device: torch.device) -> dict[str, tuple[Problem, str]]:
    """The operators by name, each with its inputs on `device` and what is computed of it."""
    k, r = kernels, grid_regularizers
    draw, uniform = partial(normal, device=device), partial(random, device=device)
    # The largest of a few errors is luck, above all of normals by differences in 16 bits; a GPU has time for many.
    count = 4096 if device.type == "cuda" else POINTS
    points, parameters, rays = uniform(count, 3, seed=7), _parameters(device), _rays(device)
    leaves = tuple(parameters)

    def grid(op, t, dtype):
        return (op(t["x"], t["table"], GRID, dtype=dtype),)

    def field(op, t, dtype, **options):
        return op(t["x"], t["table"], *_layers(t), FIELD, dtype=dtype, **options)

    def marched(op, t, dtype):
        options = dict(bound=1.0, resolution=CELLS, capacity=RAYS * 64, max_steps=32, perturb=t["perturb"])
        return tuple(op(t["origins"], t["directions"], t["bits"], **options))

    def rendered(op, t, dtype):
        options = dict(resolution=CELLS, background=t["background"], max_steps=32, normals=True, dtype=dtype)
        return tuple(op(t["origins"], t["directions"], t["bits"], t["table"], *_layers(t), FIELD, **options))

    def composited(op, t, dtype):
        return tuple(op(t["sigma"], t["values"], t["t"], t["dt"], t["offsets"]))

    def adan(op, t, dtype):
        state = AdanState(**{name: t[name] for name in t if name not in ("params", "grads")})
        found = op(t["params"], t["grads"], state, group_ends=(60, 100), lrs=(5e-2, 5e-3), ema_decay=0.9)
        return (*(t[name] for name in t if name != "grads"), found)

    def rasterized(op, t, dtype):
        return (op(t["clip"], t["faces"], PIXELS, PIXELS).barycentrics,)

    def fragments(t):
        return k.Fragments(t["triangle"], t["barycentrics"], t["depth"])

    def interpolated(op, t, dtype):
        return (op(t["attributes"], t["faces"], fragments(t)),)

    def smoothed(op, t, dtype):
        return (op(t["image"], t["clip"], t["faces"], fragments(t)),)

    def occupancy(op, t, dtype):
        bits, mean = op(t["density"], t["fresh"])
        return t["density"], mean, bits

    up = [draw(count, seed=8), draw(count, 3, seed=9), draw(count, 3, seed=10)]
    x = {"x": 2 * points - 1, **parameters}
    moments = {name: 0.01 * draw(100, seed=20 + i) for i, name in enumerate(("exp_avg", "exp_avg_diff"))}
    moments |= {"exp_avg_sq": 1e-4 + uniform(100, seed=22), "previous_grad": 0.01 * draw(100, seed=23)}
    moments |= {"ema": draw(100, seed=24), "step": torch.full((), 10.0, device=device)}
    offsets = torch.tensor([0, 0, 7, 20, 21, POINTS], device=device)
    samples = {"sigma": 4 * uniform(POINTS, seed=30), "values": uniform(POINTS, 3, seed=31)}
    samples |= {"t": 1 + uniform(POINTS, seed=32).sort().values, "dt": torch.full((POINTS,), 0.05, device=device)}
    image = draw(5, 3, seed=33)
    corners = torch.tensor([[0.9, 0.8], [-0.7, 0.6], [-0.8, -0.9], [0.6, -0.7], [0.1, 0.2]], device=device)
    flat = torch.tensor([[0.3, 1.1], [0.2, 0.9], [0.1, 1.2], [0.4, 1.0], [0.2, 1.3]], device=device)
    mesh = {"clip": torch.cat([corners, flat], 1)[None]}
    mesh["faces"] = torch.tensor([[0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]], dtype=torch.int32, device=device)
    seen = {**mesh, **k.rasterize_reference(mesh["clip"], mesh["faces"], PIXELS, PIXELS)._asdict()}
    found = {
        "hash_grid": (k.hash_grid, k.hash_grid_reference, grid, {"x": points, "table": parameters["table"]}, BOTH),
        "field": (k.field, k.field_reference, field, x, BOTH),
        "field_normals (differences)": (k.field_normals, k.field_normals_reference, field, x, BOTH),
        "field_normals (analytic)": (
            *(k.field_normals, k.field_normals_reference, partial(field, mode="analytic"), x, BOTH),
        ),
        "march": (k.march, k.march_reference, marched, rays | {"perturb": uniform(RAYS, seed=40)}, FORWARD),
        "composite": (k.composite, k.composite_reference, composited, samples | {"offsets": offsets}, BOTH),
        "render": (
            *(k.render, k.render_reference, rendered),
            *(rays | parameters | {"background": torch.ones(3, device=device)}, FORWARD),
        ),
        "occupancy_update": (
            *(k.occupancy_update, k.occupancy_update_reference, occupancy),
            *({"density": uniform(1, CELLS**3, seed=50), "fresh": 30 * uniform(1, CELLS**3, seed=51)}, FORWARD),
        ),
        "total variation": (
            *(r.hash_grid_total_variation_grad, r.hash_grid_total_variation_grad_reference),
            lambda op, t, dtype: (op(t["table"], GRID, t["points"], 0.5),),
            *({"table": parameters["table"], "points": points}, FORWARD),
        ),
        "weight decay": (
            *(r.hash_grid_weight_decay_grad, r.hash_grid_weight_decay_grad_reference),
            lambda op, t, dtype: (op(t["table"], GRID, 0.5),),
            *({"table": parameters["table"]}, FORWARD),
        ),
        "adan": (
            *(k.adan_step, k.adan_step_reference, adan),
            *({"params": draw(100, seed=60), "grads": 0.01 * draw(100, seed=61), **moments}, FORWARD),
        ),
        "group_norm_silu": (
            *(k.group_norm_silu, k.group_norm_silu_reference),
            lambda op, t, dtype: (op(t["x"], 2, t["weight"], t["bias"]),),
            {"x": draw(1, 4, 4, 4, seed=70), "weight": 1 + 0.2 * draw(4, seed=71), "bias": 0.2 * draw(4, seed=72)},
            BOTH,
        ),
        "bias_residual": (
            *(k.bias_residual, k.bias_residual_reference),
            lambda op, t, dtype: (op(t["x"], t["bias"], t["residual"]),),
            {"x": draw(1, 4, 4, 4, seed=74), "bias": draw(4, seed=75), "residual": draw(1, 4, 4, 4, seed=76)},
            FORWARD,
        ),
        "rasterize": (k.rasterize, k.rasterize_reference, rasterized, mesh, BOTH),
        "interpolate": (
            *(k.interpolate, k.interpolate_reference, interpolated),
            *(seen | {"attributes": draw(5, 3, seed=80)}, BOTH),
        ),
        "antialias": (
            *(k.antialias, k.antialias_reference, smoothed),
            *(seen | {"image": uniform(1, PIXELS, PIXELS, 3, seed=81)}, BOTH),
        ),
    }
    upstream = {
        "hash_grid": (draw(count, GRID.channels, seed=11),),
        "field": tuple(up[:2]),
        "field_normals (differences)": tuple(up),
        "field_normals (analytic)": tuple(up),
        "composite": (image, None, None, None),
        "group_norm_silu": (draw(1, 4, 4, 4, seed=73),),
        **dict.fromkeys(("rasterize", "interpolate", "antialias"), (draw(1, PIXELS, PIXELS, 3, seed=82),)),
    }
    differentiated = {"hash_grid": ("table",), "composite": ("sigma", "values"), "group_norm_silu": ("x",)}
    differentiated |= {"rasterize": ("clip",), "interpolate": ("attributes",), "antialias": ("image", "clip")}
    return {
        name: (
            Problem(
                operator=operator,
                reference=reference,
                call=call,
                tensors=tensors,
                leaves=differentiated.get(name, leaves),
                upstream=upstream.get(name, ()),
            ),
            mode,
        )
        for name, (operator, reference, call, tensors, mode) in found.items()
    }


def compile_all(found: Iterable[tuple[Problem, str]], dtype: torch.dtype) -> None:
    """Compile the kernels side by side; one by one they would take a minute. What fails is found by `check`."""
    with kernels.recorded_launches() as launches:
        for problem, mode in found:
            run(copied(problem), problem.operator, mode, dtype)
    with suppress(Exception):
        kernels.compile_launches(launches, lambda done: None)


def check(
    device: torch.device, wrap: Callable[[Callable], Callable] = lambda operator: operator
) -> Iterator[dict[str, object]]:
    """For each operator {"kernel", "error" (a sentence, or None when it is right), "seconds"}.

    `wrap` may put another implementation in the operator's place: tests do.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # as a run computes there
    found = problems(device)
    if device.type == "cuda":
        compile_all(found.values(), dtype)
    for name, (problem, mode) in found.items():
        start, wrong = time.monotonic(), None
        try:
            operators = {"kernel": wrap(problem.operator)}
            verdict = judge_problem(problem, mode, dtype, operators, march=name == "march")["kernel"]
            if not verdict.good:
                wrong = f"error {verdict.max_err:.3g}, allowed {verdict.tol:.3g}"
        except Exception as error:  # a compiler, a driver and a launch fail in many ways; each is an answer here
            lines = str(error).strip().splitlines()
            wrong = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
        yield {"kernel": name, "error": wrong, "seconds": round(time.monotonic() - start, 2)}


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m dream_fast.bench selftest", description=__doc__).parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = 0
    for line in check(device):
        print(json.dumps(line), flush=True)
        wrong += line["error"] is not None
    return int(wrong > 0)
