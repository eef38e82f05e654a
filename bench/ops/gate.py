"""The accuracy gate of the benchmark: no time is reported of a kernel that computes something else.

A case is judged at a size at which its reference in fp64 fits, by `dream_fast.bench.accuracy`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.bench.accuracy import error, tolerance
from dream_fast.bench.ops.cases import Case, Problem, run

# Of fewer numbers luck may decide: see `dream_fast.bench.accuracy`.
FEW_NUMBERS = 64
# Part of march's rays on which fp32 and fp64 may disagree about a sample at the border of a cell.
FEW_RAYS = 1e-3


class Verdict(NamedTuple):
    """Of the output or gradient that comes closest to its tolerance: the error and what it may be."""

    max_err: float
    tol: float

    @property
    def good(self) -> bool:
        return self.max_err <= self.tol


def judged_case(case: Case) -> Case:
    """The same case at a size at which fp64 fits."""
    smaller = {
        "rays_128": "rays_64",
        "rays_256": "rays_64",
        "rays_512": "rays_64",
        "uniform_2^20": "uniform_2^18",
        "uniform_2^22": "uniform_2^18",
        "rays_64_finite_difference": "rays_32_finite_difference",
        "rays_64_analytic": "rays_32_analytic",
        "frame_800": "frame_64",
        "frame_800_normals": "frame_64_normals",
        # In single precision slivers at the rim of a finer mesh change places.
        **dict.fromkeys(("mesh_50k_512", "mesh_50k_2048", "mesh_1M_512", "mesh_1M_2048"), "mesh_4k_256"),
    }
    return replace(case, case=smaller.get(case.case, case.case))


def in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem with copies of its float tensors in another dtype (None of them is the problem's own)."""

    def to(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()

    tensors = {name: to(tensor) for name, tensor in problem.tensors.items()}
    return replace(problem, tensors=tensors, upstream=tuple(map(to, problem.upstream)))


def copied(problem: Problem) -> Problem:
    return replace(problem, tensors={name: tensor.clone() for name, tensor in problem.tensors.items()})


def same_rays(results: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Of several results of march: positions, t and dt of the rays with equally many samples in all of them.

    The number of samples is a decision at the border of a cell, which rounding may turn on a few rays.
    """
    samples = [offsets.diff() for *_, offsets, _, _ in results]
    agree = torch.stack([(count == samples[0]) for count in samples]).all(0)
    share = 1 - agree.double().mean().item()
    if share > FEW_RAYS:
        raise AssertionError(f"march: {share:.2%} of the rays have another number of samples, allowed {FEW_RAYS:.2%}")
    kept = []
    for positions, rays, t, dt, _, count, _ in results:
        rows = torch.arange(rays.shape[0], device=rays.device) < count
        rows &= agree[rays]
        kept.append((positions[rows], t[rows], dt[rows]))
    return kept


def judge(case: Case, device: torch.device, operators: dict[str, Callable[..., Any]]) -> dict[str, Verdict]:
    """Verdicts on implementations of a case's operator, by name. Raises AssertionError where none can be given."""
    problem = judged_case(case).build(device, count_bytes=False)
    return judge_problem(problem, case.mode, case.compute_dtype, operators, march=case.op == "march")


def judge_problem(
    problem: Problem, mode: str, dtype: torch.dtype, operators: dict[str, Callable[..., Any]], *, march: bool
) -> dict[str, Verdict]:
    """The same for a problem, computed in `dtype`; `march`: its results are samples of rays."""
    precise = in_dtype(problem, torch.float64)
    weights = problem.weights(precise.tensors) if problem.weights else ()
    exact = run(precise, problem.reference, mode, torch.float64)
    own = run(copied(problem), problem.reference, mode, dtype)
    gradients = len(problem.leaves) if mode == "forward_backward" else 0
    verdicts = {}
    for name, operator in operators.items():
        results = [run(copied(problem), operator, mode, dtype), own, exact]
        if march:
            results = same_rays(results)
        verdicts[name] = worst_verdict(*results, weights, gradients)
    return verdicts


def worst_verdict(
    got: tuple[Tensor, ...],
    reference: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...] = (),
    gradients: int = 0,
) -> Verdict:
    """The verdict on the result that comes closest to its tolerance; the last `gradients` results are gradients.

    A gradient of few numbers, such as that of a network's last bias, is allowed what any of the gradients is: on one
    processor in ten its reference is right by luck.
    """
    weights = (*weights, *[None] * (len(exact) - len(weights)))
    errors = [error(*tensors) for tensors in zip(got, exact, weights, strict=True)]
    allowed = [tolerance(*tensors) for tensors in zip(reference, exact, weights, strict=True)]
    first = len(exact) - gradients
    for number in range(first, len(exact)):
        if exact[number].numel() < FEW_NUMBERS:
            allowed[number] = max(allowed[first:])
    verdicts = map(Verdict, errors, allowed)
    return max(verdicts, key=lambda verdict: verdict.max_err / verdict.tol)
