"""Every kernel once against its reference, on inputs so small that it takes seconds. `dream-fast --doctor` calls it.

`python -m dream_fast.bench selftest` prints a line of JSON a kernel, as it goes. On a machine without a GPU the kernels
run in Triton's interpreter, which has to be asked for before they are imported: TRITON_INTERPRET=1. The rule is that
of the benchmark's gate: an error of at most twice that of the reference in the kernel's own dtype, plus 1e-6.
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
from dream_fast.bench.ops import cases
from dream_fast.bench.ops.cases import Problem, relative_slope, run
from dream_fast.bench.ops.gate import copied, judge_problem
from dream_fast.kernels import EMPTY_OPACITY, AdanState, FieldSpec, HashGridSpec
from dream_fast.kernels.grid import regularizers

GRID = HashGridSpec(levels=2, features=2, log2_entries=8, base_resolution=4, max_resolution=16)
FIELD = FieldSpec(grid=GRID)
POINTS, RAYS, CELLS, HIDDEN, PIXELS = 128, 64, 16, 16, 16
BOTH, FORWARD = "forward_backward", "forward"


def normal(*shape: int, device: torch.device, seed: int) -> Tensor:
    """As `cases.normal`, but the same numbers on every device."""
    return cases.normal(*shape, device=torch.device("cpu"), seed=seed).to(device)


def random(*shape: int, device: torch.device, seed: int) -> Tensor:
    """As `cases.random`, but the same numbers on every device."""
    return cases.random(*shape, device=torch.device("cpu"), seed=seed).to(device)


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


def _mesh(device: torch.device) -> dict[str, Tensor]:
    """A bumpy sheet of 50 triangles, 6 vertices a side, that fills most of a picture."""
    place = torch.linspace(-0.9, 0.9, 6, device=device)
    corners = torch.stack(torch.meshgrid(place, place, indexing="ij"), -1).view(-1, 2)
    corners = corners + 0.08 * normal(36, 2, device=device, seed=34)
    depth_and_w = torch.tensor([0.1, 0.9], device=device) + 0.3 * random(36, 2, device=device, seed=35)
    first = torch.arange(36, device=device).view(6, 6)[:-1, :-1].reshape(-1, 1)
    halves = [first + torch.tensor(half, device=device) for half in ([0, 6, 7], [0, 7, 1])]
    return {"clip": torch.cat([corners, depth_and_w], 1)[None], "faces": torch.cat(halves).int()}


def _slope_at(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The weight of normals at x: [N, 1] fp64."""
    return relative_slope(x, tensors["table"], *_layers(tensors), FIELD)


def _slope_of_view(tensors: dict[str, Tensor], options: dict[str, object]) -> Tensor:
    """The weight of a view's normals, from its fp64 depth: [R, 1], 0 where a ray hits nothing."""
    rays = tensors["origins"], tensors["directions"]
    view = kernels.render_reference(*rays, tensors["bits"], tensors["table"], *_layers(tensors), FIELD, **options)
    hit = view.opacity > EMPTY_OPACITY
    surface = rays[0] + (view.depth / view.opacity.clamp(min=EMPTY_OPACITY))[:, None] * rays[1]
    return _slope_at(surface, tensors) * hit[:, None]


def problems(device: torch.device) -> dict[str, tuple[Problem, str]]:
    """The operators by name, each with its inputs on `device` and what is computed of it."""
    k, r = kernels, regularizers
    draw, uniform = partial(normal, device=device), partial(random, device=device)
    # A GPU has time for more; normals by differences in 16 bits need them.
    count = 4096 if device.type == "cuda" else POINTS
    parameters, rays = _parameters(device), _rays(device)
    # Normals of 16 bits need a slope that the differences do not lose: the steepest quarter of the points.
    points = uniform(4 * count, 3, seed=7)
    points = points[_slope_at(2 * points - 1, parameters)[:, 0].topk(count).indices]
    leaves = tuple(parameters)
    viewing = {"resolution": CELLS, "max_steps": 32, "normals": True}

    def grid(op, t, dtype):
        return (op(t["x"], t["table"], GRID, dtype=dtype),)

    def field(op, t, dtype, **options):
        return op(t["x"], t["table"], *_layers(t), FIELD, dtype=dtype, **options)

    def marched(op, t, dtype):
        options = dict(bound=1.0, resolution=CELLS, capacity=RAYS * 64, max_steps=32, perturb=t["perturb"])
        return tuple(op(t["origins"], t["directions"], t["bits"], **options))

    def rendered(op, t, dtype):
        options = viewing | {"background": t["background"], "dtype": dtype}
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

    x = {"x": 2 * points - 1, **parameters}
    up = [draw(count, seed=8), draw(count, 3, seed=9), draw(count, 3, seed=10)]
    # Weighted as the normals' errors are: else one normal that rounding turns would decide about all gradients.
    slope = _slope_at(x["x"], x)
    up[2] *= slope / slope.mean()
    moments = {name: 0.01 * draw(100, seed=20 + i) for i, name in enumerate(("exp_avg", "exp_avg_diff"))}
    moments |= {"exp_avg_sq": 1e-4 + uniform(100, seed=22), "previous_grad": 0.01 * draw(100, seed=23)}
    moments |= {"ema": draw(100, seed=24), "step": torch.full((), 10.0, device=device)}
    # A ray without samples, some with many, some with few.
    offsets = torch.tensor([0, 0, 7, 20, 21, *range(24, POINTS + 1, 2)], device=device)
    samples = {"sigma": 4 * uniform(POINTS, seed=30), "values": uniform(POINTS, 3, seed=31)}
    samples |= {"t": 1 + uniform(POINTS, seed=32).sort().values, "dt": torch.full((POINTS,), 0.05, device=device)}
    image = draw(len(offsets) - 1, 3, seed=33)
    mesh = _mesh(device)
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
            {"x": draw(1, 4, 8, 8, seed=70), "weight": 1 + 0.2 * draw(4, seed=71), "bias": 0.2 * draw(4, seed=72)},
            BOTH,
        ),
        "bias_residual": (
            *(k.bias_residual, k.bias_residual_reference),
            lambda op, t, dtype: (op(t["x"], t["bias"], t["residual"]),),
            {"x": draw(1, 4, 8, 8, seed=74), "bias": draw(4, seed=75), "residual": draw(1, 4, 8, 8, seed=76)},
            FORWARD,
        ),
        "rasterize": (k.rasterize, k.rasterize_reference, rasterized, mesh, BOTH),
        "interpolate": (
            *(k.interpolate, k.interpolate_reference, interpolated),
            *(seen | {"attributes": draw(36, 3, seed=80)}, BOTH),
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
        "group_norm_silu": (draw(1, 4, 8, 8, seed=73),),
        **dict.fromkeys(("rasterize", "interpolate", "antialias"), (draw(1, PIXELS, PIXELS, 3, seed=82),)),
    }
    differentiated = {"hash_grid": ("table",), "composite": ("sigma", "values"), "group_norm_silu": ("x",)}
    weights = dict.fromkeys((name for name in found if "normals" in name), lambda t: (None, None, _slope_at(t["x"], t)))
    background = {"background": torch.ones(3, dtype=torch.float64, device=device)}
    weights["render"] = lambda t: (None, _slope_of_view(t, viewing | background))
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
                weights=weights.get(name),
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
