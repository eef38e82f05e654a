"""The accuracy gate of the benchmark: a kernel that computes something else is not timed.

A case is judged at a size at which its reference in fp64 fits, by the rule of `dream_fast.bench.accuracy`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.bench.accuracy import error, tolerance
from dream_fast.bench.ops.cases import SPECS, build
from dream_fast.bench.ops.spec import Case, Problem, Results, run

# Luck may decide about fewer numbers: see `dream_fast.bench.accuracy`.
FEW_NUMBERS = 64


class Verdict(NamedTuple):
    """Error and tolerance of the output or gradient that comes closest to its tolerance."""

    max_err: float
    tol: float

    @property
    def good(self) -> bool:
        return self.max_err <= self.tol


def gate_case(case: Case) -> Case:
    """The same case at a size at which fp64 fits."""
    return replace(case, case=SPECS[case.op].gate.get(case.case, case.case))


def in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem with copies of its tensors, those of floats in `dtype`."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()

    tensors = {name: convert(tensor) for name, tensor in problem.tensors.items()}
    upstream = tuple(None if tensor is None else convert(tensor) for tensor in problem.upstream)
    return replace(problem, tensors=tensors, upstream=upstream)


def copy_inputs(problem: Problem) -> Problem:
    """The problem with copies of its tensors."""
    return replace(problem, tensors={name: tensor.clone() for name, tensor in problem.tensors.items()})


def judge(case: Case, device: torch.device, operators: dict[str, Callable[..., Any]]) -> dict[str, Verdict]:
    """Verdicts on implementations of a case's operator, by name.

    Raises AssertionError: when the results of the reference, or of too many rays, cannot be compared.
    """
    problem = build(gate_case(case), device, count_bytes=False)
    return judge_problem(problem, case.mode, case.compute_dtype, operators, compare=SPECS[case.op].compare)


def judge_problem(
    problem: Problem,
    mode: str,
    dtype: torch.dtype,
    operators: dict[str, Callable[..., Any]],
    *,
    compare: Callable[[list[Results]], list[Results]] | None = None,
) -> dict[str, Verdict]:
    """Verdicts on implementations of a problem in `dtype`, by name; `compare` as in `OpSpec`."""
    precise = in_dtype(problem, torch.float64)
    weights = problem.weights(precise.tensors) if problem.weights else ()
    exact = run(precise, problem.reference, mode, torch.float64)
    reference = run(copy_inputs(problem), problem.reference, mode, dtype)
    gradients = len(problem.leaves) if mode == "forward_backward" else 0
    verdicts = {}
    for name, operator in operators.items():
        results = [run(copy_inputs(problem), operator, mode, dtype), reference, exact]
        got, plain, true = compare(results) if compare else results
        verdicts[name] = worst_verdict(got, plain, true, weights, gradients)
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
