"""Every operator's `OpSpec`, and the cases that follow from them. A new operator is added to `bench/ops/specs`.

A case's name gives its size; any size works.
- `uniform_2^20`: 2^20 points, uniform in the cube.
- `rays_64`: a camera at (0, 0, 3.2) looks at the origin, vertical field of view 20 degrees, 64 x 64 rays; a sample
  every 2 sqrt(3) / 1024 along the ray inside the sphere |x| < 0.5, one random offset a ray, samples in ray order. Their
  number is cut to a multiple of 256, as buffers of a run are. `_finite_difference` and `_analytic` name the normals.
- `shell_256`, `inside_256`, `noise_256`, `bound2_256`: samples that march finds on 256 x 256 rays, as CUDA peers were
  measured on. Cells with 0.48 < |x| < 0.5; the sphere seen from (0, 0.1, 0.9) with 60 degrees; a tenth of all cells at
  random; the shell and the camera's distance twice as large, in two cascades.
- `frame_800`: the same camera and sphere with density 100 inside, 800 x 800 rays; `_normals` adds the normals.
- `12.2M`: as many parameters.
- `mesh_50k_512`: the camera before a bumpy ball of about as many triangles, 512 x 512 pixels (M: millions); of
  barycentrics each pixel counts as much as it lies inside its triangle, since rounding may turn those on an edge.
- `vae_512x512x128`, `unet_64x64x320`: height, width and channels before a GroupNorm of 32 groups in Stable Diffusion,
  one image in the VAE's encoder, two in the UNet; weights are frozen. `_channels_last` is the memory format.
- `tiny`: the self test's, small enough for Triton's interpreter.
Grid: 16 levels, 2 features, 2^19 entries, 16 to 2048, smoothstep. MLP: 32 -> 64 -> 64 -> 4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dream_fast.bench.ops.spec import AotCase, Case, OpSpec, Problem, Target, run
from dream_fast.bench.ops.specs import fields, grid, mesh, nn, optim, rays

SPECS: dict[str, OpSpec] = {
    spec.name: spec for spec in (*grid.SPECS, *fields.SPECS, *rays.SPECS, *optim.SPECS, *nn.SPECS, *mesh.SPECS)
}
FULL = tuple(case for spec in SPECS.values() for case in spec.make_cases(spec.full, spec.dtype))
SMALL = tuple(case for spec in SPECS.values() for case in spec.make_cases(spec.small, "float32"))


def build(case: Case, device: torch.device | str = "cpu", *, count_bytes: bool = True) -> Problem:
    """The problem of a case; see `OpSpec.build`."""
    return SPECS[case.op].build(case, device, count_bytes=count_bytes)


def tiny_cases(dtype: str = "float32") -> list[Case]:
    """The cases of the self test, each in the operator's longest mode."""
    return [case for spec in SPECS.values() for case in spec.make_cases(spec.tiny, dtype, spec.modes[-1:])]


def find_target(op: str, case: str, mode: str) -> Target | None:
    """The target of a row of results, or None."""
    return SPECS[op].targets.get((case, mode)) if op in SPECS else None


def prepare_aot(spec: OpSpec, entry: AotCase) -> Callable[[], object]:
    """A call of a case on CPU tensors; under `recorded_launches` it computes nothing."""
    case = Case(op=spec.name, case=entry.case, mode=entry.mode, dtype=entry.dtype)
    problem = spec.build(case, count_bytes=False)
    call = partial(run, problem, problem.operator, case.mode, case.compute_dtype)
    return partial(call_deterministically, call) if entry.deterministic else call


def call_deterministically(call: Callable[[], object]) -> None:
    """Call with torch's deterministic algorithms, in which sums have an order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        call()
    finally:
        torch.use_deterministic_algorithms(False)


# What the ahead-of-time gate compiles: functions that build inputs and return a call, by entry of the golden file.
# Normals and rendering in fp32 take longest to compile and are nobody's default: tests run them, nothing gates them.
AOT_CASES: dict[str, Callable[[], Callable[[], object]]] = {
    key: partial(prepare_aot, spec, entry) if isinstance(entry, AotCase) else entry
    for spec in SPECS.values()
    for key, entry in spec.aot.items()
}
