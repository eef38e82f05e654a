"""Check every kernel against its reference, on inputs so small that it takes seconds. `dream-fast --doctor` calls it.

`python -m dream_fast.bench selftest` prints a line of JSON for each kernel. Without a GPU the kernels run in Triton's
interpreter if TRITON_INTERPRET=1 is set, and as their references otherwise. The rule is that of the benchmark's gate:
an error of at most twice that of the reference in the kernel's own dtype, plus 1e-6.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress

import torch

from dream_fast import kernels
from dream_fast.bench.doctor.interpreter import quick_interpreter
from dream_fast.bench.ops.cases import SPECS, build, tiny_cases
from dream_fast.bench.ops.gate import copy_inputs, judge_problem
from dream_fast.bench.ops.spec import Case, Operator, Problem, run
from dream_fast.kernels._core.launch import INTERPRETED


def name_case(case: Case) -> str:
    """The operator's name, and the kind of the case where it has several."""
    several = len(SPECS[case.op].tiny) > 1
    return f"{case.op} ({case.case.removeprefix('tiny_')})" if several else case.op


def build_all(device: torch.device) -> dict[str, tuple[Case, Problem]]:
    """The tiny cases in the dtype of a run on `device`, by name, with their inputs."""
    dtype = "float16" if device.type == "cuda" else "float32"
    return {name_case(case): (case, build(case, device, count_bytes=False)) for case in tiny_cases(dtype)}


def compile_all(problems: dict[str, tuple[Case, Problem]]) -> None:
    """Compile the kernels side by side; one by one they would take a minute. `check` reports what fails."""
    with kernels.recorded_launches() as launches:
        for case, problem in problems.values():
            run(copy_inputs(problem), problem.operator, case.mode, case.compute_dtype)
    with suppress(Exception):
        kernels.compile_launches(launches, lambda done: None)


def check(
    device: torch.device, wrap: Callable[[Operator], Operator] = lambda operator: operator
) -> Iterator[dict[str, object]]:
    """For each operator {"kernel", "error" (a sentence, or None when it is right), "seconds"}.

    `wrap` may replace the operator's implementation: tests do.
    """
    problems = build_all(device)
    if device.type == "cuda":
        compile_all(problems)
    for name, (case, problem) in problems.items():
        start, error = time.monotonic(), None
        try:
            operators, compare = {"kernel": wrap(problem.operator)}, SPECS[case.op].compare
            verdict = judge_problem(problem, case.mode, case.compute_dtype, operators, compare=compare)["kernel"]
            if not verdict.good:
                error = f"error {verdict.max_err:.3g}, allowed {verdict.tol:.3g}"
        except Exception as failure:  # a compiler, a driver and a launch fail in many ways
            lines = str(failure).strip().splitlines()
            error = f"{type(failure).__name__}: {lines[0] if lines else ''}"[:300]
        yield {"kernel": name, "error": error, "seconds": round(time.monotonic() - start, 2)}


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m dream_fast.bench selftest", description=__doc__).parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failures = 0
    with quick_interpreter() if INTERPRETED else nullcontext():
        for row in check(device):
            print(json.dumps(row), flush=True)
            failures += row["error"] is not None
    return int(failures > 0)
