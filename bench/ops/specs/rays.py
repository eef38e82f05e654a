"""Operators on rays: occupancy grid, marching, compositing and inference rendering."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.bench.ops.inputs import (
    GRID,
    MLP,
    MLP_FLOPS,
    OCCUPANCY,
    RADIUS,
    SOLID,
    SOLID_DENSITY,
    STEP,
    TINY_CELLS,
    TINY_FIELD,
    TINY_RAYS,
    camera,
    mlp,
    nbytes,
    normal,
    occupancy_bits,
    parameters,
    points,
    random,
    relative_slope,
    scene_of,
    scene_rays,
    scene_samples,
    size_of,
    sphere_samples,
    tiny_normal,
    tiny_parameters,
    tiny_random,
    tiny_rays,
    tiny_samples,
)
from dream_fast.bench.ops.spec import FORWARD, AotCase, Case, OpSpec, Problem, Results, Target, backpropagate
from dream_fast.bench.ops.specs.grid import POINT_GATE, SCENE_CASES
from dream_fast.kernels import EMPTY_OPACITY

RAYS = ("rays_64", "rays_128", "rays_256", "rays_512", *SCENE_CASES)
CPU = torch.device("cpu")
# Share of march's rays on which fp32 and fp64 may disagree about a sample at the border of a cell.
MAX_DIFFERENT_RAYS = 1e-3


def occupancy_update(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    def call(op, tensors, dtype):
        bits, mean = op(tensors["density"], tensors["fresh"])
        return tensors["density"], mean, bits

    cells = (1, TINY_CELLS**3)
    return Problem(
        call=call,
        tensors={
            "density": tiny_random(*cells, device=device, seed=50),
            "fresh": 30 * tiny_random(*cells, device=device, seed=51),
        },
        mutates=True,
    )


def march(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    options: dict[str, Any]
    bound = 1.0
    if case.case == "tiny":
        tensors = tiny_rays(device) | {"perturb": tiny_random(TINY_RAYS, device=device, seed=40)}
        capacity, options = TINY_RAYS * 64, {"resolution": TINY_CELLS, "max_steps": 32}
    elif named := scene_of(case.case):
        scene, side = named
        tensors, bound = scene_rays(scene, side, device), scene.bound
        capacity, options = side * side * scene.samples_a_ray, {"resolution": OCCUPANCY}
    else:
        side = size_of(case.case, "rays")
        origins, directions = camera(side, device)
        tensors = {
            "origins": origins,
            "directions": directions,
            "bits": occupancy_bits(device),
            "perturb": random(side * side, device=device, seed=1),
        }
        # As many samples as in the sphere, give or take the cells on its surface.
        capacity = math.ceil(1.05 * sphere_samples(side, device)[1].shape[0] / 4096) * 4096
        options = {"resolution": OCCUPANCY}
    options |= {"bound": bound, "capacity": capacity}

    def call(op, tensors, dtype):
        rays = (tensors["origins"], tensors["directions"], tensors["bits"])
        return tuple(op(*rays, perturb=tensors["perturb"], **options))

    return Problem(
        call=call,
        tensors=tensors,
        # A row: position, ray (int64), t and dt; a ray: its offset.
        least_bytes=nbytes(*tensors.values()) + capacity * (12 + 8 + 4 + 4) + (tensors["origins"].shape[0] + 1) * 8,
    )


def select_common_rays(results: list[Results]) -> list[Results]:
    """Positions, t and dt of several results of march, on the rays with equally many samples in all of them.

    The number of samples is a decision at the border of a cell, which rounding may turn on a few rays. Raises
    AssertionError: when it differs on more than MAX_DIFFERENT_RAYS of them.
    """
    samples = [offsets.diff() for *_, offsets, _, _ in results]
    agree = torch.stack([(count == samples[0]) for count in samples]).all(0)
    share = 1 - agree.double().mean().item()
    if share > MAX_DIFFERENT_RAYS:
        raise AssertionError(
            f"march: {share:.2%} of the rays have another number of samples, allowed {MAX_DIFFERENT_RAYS:.2%}"
        )
    common: list[Results] = []
    for positions, rays, t, dt, _, count, _ in results:
        rows = torch.arange(rays.shape[0], device=rays.device) < count
        rows &= agree[rays]
        common.append((positions[rows], t[rows], dt[rows]))
    return common


def composite(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    if case.case == "tiny":
        tensors = tiny_samples(device)
        image = tiny_normal(len(tensors["offsets"]) - 1, 3, device=device, seed=33)
    else:
        named = scene_of(case.case)
        side = named[1] if named else size_of(case.case, "rays")
        _, t, offsets = scene_samples(*named, device) if named else sphere_samples(side, device)
        tensors = {
            # Thin enough that no ray ends early: every sample has to be read.
            "sigma": 4 * random(t.shape[0], device=device, seed=21),
            "values": random(t.shape[0], 3, device=device, seed=22),
            "t": t,
            "dt": torch.full_like(t, STEP),
            "offsets": offsets,
        }
        image = normal(side * side, 3, device=device, seed=23)
    # Written: weights; values, opacity and depth of rays. Backward: the image's gradient in, two gradients out.
    forward_bytes = nbytes(*tensors.values()) + nbytes(tensors["t"]) + image.shape[0] * 5 * 4
    backward_bytes = nbytes(tensors["sigma"], tensors["values"]) + nbytes(image)
    return Problem(
        call=lambda op, tensors, dtype: tuple(op(*(tensors[k] for k in ("sigma", "values", "t", "dt", "offsets")))),
        tensors=tensors,
        leaves=("sigma", "values"),
        upstream=(image, None, None, None),
        least_bytes=forward_bytes + (case.mode == "forward_backward") * backward_bytes,
    )


def weigh_view(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """Weights of the normals of the tiny view, from its fp64 depth: 0 where a ray hits nothing."""
    rays, layers = (tensors["origins"], tensors["directions"]), mlp(tensors)
    view = kernels.render_reference(
        *rays, tensors["bits"], tensors["table"], *layers, TINY_FIELD, background=tensors["background"], **options
    )
    hit = view.opacity > EMPTY_OPACITY
    surface = rays[0] + (view.depth / view.opacity.clamp(min=EMPTY_OPACITY))[:, None] * rays[1]
    return None, relative_slope(surface, tensors["table"], *layers, TINY_FIELD) * hit[:, None]


def tiny_view(device: torch.device) -> dict[str, Tensor]:
    return tiny_rays(device) | tiny_parameters(device) | {"background": torch.ones(3, device=device)}


def solid_view(side: int, device: torch.device) -> dict[str, Tensor]:
    """The camera's rays before a sphere of density SOLID_DENSITY."""
    origins, directions = camera(side, device)
    weights = parameters(device)
    last = len(MLP) - 2
    weights[f"weight_{last}"][0] = 0
    weights[f"bias_{last}"][0] = math.log(SOLID_DENSITY)
    background = torch.ones(3, device=device)
    rays = {"origins": origins, "directions": directions, "bits": occupancy_bits(device)}
    return {**rays, "background": background, **weights}


def render(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    if tiny := case.case == "tiny":
        normals, spec, tensors = True, TINY_FIELD, tiny_view(device)
        options = {"resolution": TINY_CELLS, "max_steps": 32, "normals": True}
    else:
        normals, spec = case.case.endswith("_normals"), SOLID
        tensors = solid_view(size_of(case.case, "frame"), device)
        options = {"resolution": OCCUPANCY, "normals": normals}
    origins, directions = tensors["origins"], tensors["directions"]
    closest = origins - (origins * directions).sum(1, keepdim=True) * directions
    hits = int((closest.norm(dim=1) < RADIUS).sum())
    # A ray ends when its transmittance is below 1e-3.
    samples = hits * math.ceil(math.log(1e3) / (SOLID_DENSITY * STEP))

    def call(op, tensors, dtype):
        rays = (tensors["origins"], tensors["directions"], tensors["bits"])
        more = {"background": tensors["background"], "dtype": dtype}
        return tuple(op(*rays, tensors["table"], *mlp(tensors), spec, **options, **more))

    return Problem(
        call=call,
        tensors=tensors,
        weights=(lambda t: weigh_view(t, options)) if tiny else None,
        least_bytes=nbytes(*tensors.values()) + origins.shape[0] * (3 + 3 + 1 + 1) * 4,
        flops=(samples + 7 * hits * normals) * MLP_FLOPS,
        gathers=(samples + 7 * hits * normals) * 8 * GRID.levels,
    )


def prepare_cascades() -> Callable[[], object]:
    """Marching through three cascades with growing steps, and the gradient into the rays."""
    origins, directions = (rays.requires_grad_() for rays in camera(64, CPU))
    bits = occupancy_bits(CPU).expand(3, -1).contiguous()
    options: dict[str, Any] = {"bound": 4.0, "resolution": OCCUPANCY, "capacity": 1 << 19, "dt_gamma": 1 / 256}
    return lambda: backpropagate(kernels.march(origins, directions, bits, **options).positions)


def prepare_channels(dtype: torch.dtype) -> Callable[[], object]:
    """Colour and normal composited in one pass, gradients from every output."""
    rows, rays = 1 << 19, 64 * 64
    sigma, values = (normal(*shape, device=CPU, seed=1, dtype=dtype).requires_grad_() for shape in ((rows,), (rows, 6)))
    t, dt = torch.ones(rows, dtype=dtype), torch.ones(rows, dtype=dtype)
    offsets = torch.arange(rays + 1) * (rows // rays)
    return lambda: backpropagate(kernels.composite(sigma, values, t, dt, offsets, count=offsets[-1]))


def prepare_occupancy() -> Callable[[], object]:
    """Points, update and query of an occupancy grid with two cascades."""
    density, fresh = torch.zeros(2, OCCUPANCY**3), torch.zeros(2, OCCUPANCY**3)
    x = points("uniform_2^20", CPU)
    noise = torch.zeros(2 * OCCUPANCY**3, 3)

    def call():
        kernels.occupancy_points(OCCUPANCY, 2, 2.0, noise)
        bits, _ = kernels.occupancy_update(density, fresh)
        kernels.occupancy_query(torch.zeros_like(bits), x, 2.0, OCCUPANCY)

    return call


SPECS = (
    OpSpec(
        name="march",
        inputs=march,
        modes=FORWARD,
        full=RAYS,
        small=("rays_8",),
        quick=("rays_64",),
        peers=("rays_64",),
        gate=POINT_GATE,
        compare=select_common_rays,
        targets={
            ("rays_64", "forward"): Target(0.514, 0.15, 0.08),
            ("rays_128", "forward"): Target(0.659, 0.25, 0.12),
            ("rays_256", "forward"): Target(1.89, 0.6, 0.3),
            ("rays_512", "forward"): Target(8.86, 2.5, 1.2),
        },
        aot={
            "march/float32": AotCase("rays_64", "float32", "forward"),
            "march/cascades": prepare_cascades,
        },
    ),
    OpSpec(
        name="composite",
        inputs=composite,
        full=RAYS,
        small=("rays_8",),
        quick=("rays_64",),
        peers=("rays_64",),
        gate=POINT_GATE,
        targets={
            ("rays_256", "forward"): Target(0.308, 0.15, 0.09),
            ("rays_64", "forward_backward"): Target(0.328, 0.12, 0.06),
            ("rays_256", "forward_backward"): Target(1.32, 0.5, 0.28),
            ("rays_512", "forward_backward"): Target(5.69, 2.0, 1.1),
        },
        aot={
            "composite/float32": AotCase("rays_64", "float32"),
            "composite/channels_float32": lambda: prepare_channels(torch.float32),
            "composite/channels_float16": lambda: prepare_channels(torch.float16),
        },
    ),
    OpSpec(
        name="occupancy_update",
        inputs=occupancy_update,
        modes=FORWARD,
        aot={"occupancy/float32": prepare_occupancy},
    ),
    OpSpec(
        name="render",
        inputs=render,
        dtype="float16",
        modes=FORWARD,
        full=("frame_800", "frame_800_normals"),
        small=("frame_16",),
        quick=("frame_800",),
        # No peers: the gate and the reference of a frame do not end in 200 s.
        gate={"frame_800": "frame_64", "frame_800_normals": "frame_64_normals"},
        targets={("frame_800", "forward"): Target(None, 5.0, None)},
        aot={"render/float16": AotCase("frame_800_normals", "float16", "forward")},
    ),
)
