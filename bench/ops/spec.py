"""The benchmark's view of an operator: `OpSpec`, its cases, and the problem that a case builds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast import kernels

FORWARD, BOTH = ("forward",), ("forward", "forward_backward")
Operator = Callable[..., Any]
Results = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the benchmark without the implementation; names are in `dream_fast.bench.ops.cases`."""

    op: str
    case: str
    mode: str
    dtype: str

    @property
    def compute_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def _not_built(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("OpSpec.build sets the operators of a problem")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs of a case.

    call(operator, tensors, dtype): calls the public operator, or its reference, with `tensors` in a compute dtype and
    returns the outputs as a tuple. tensors: the inputs by name. leaves: those that get gradients. upstream: gradients
    of the outputs (None: the loss does not use the output). weights(tensors): a weight for the error of each output,
    or None, from the inputs in fp64 (see `dream_fast.bench.accuracy`). mutates: the operator changes its inputs.
    least_bytes: the compulsory traffic, each input read once and each output written once. flops: of matrix products.
    gathers: rows of the table that are read; scatters: rows that are added to. operator, reference: set by
    `OpSpec.build`.
    """

    call: Callable[[Operator, dict[str, Tensor], torch.dtype], Results]
    tensors: dict[str, Tensor]
    leaves: tuple[str, ...] = ()
    upstream: tuple[Tensor | None, ...] = ()
    weights: Callable[[dict[str, Tensor]], tuple[Tensor | None, ...]] | None = None
    mutates: bool = False
    least_bytes: int = 0
    flops: int = 0
    gathers: int = 0
    scatters: int = 0
    operator: Operator = _not_built
    reference: Operator = _not_built


class Target(NamedTuple):
    """Times in ms on an H100: of the fastest CUDA peer (None: no peer), to reach, and to aim at (None: no other).

    Peers are stable-dreamfusion, tiny-cuda-nn 2.0 (with and without JIT fusion) and nerfacc.
    """

    peer: float | None
    target: float
    stretch: float | None


class AotCase(NamedTuple):
    """A case for the ahead-of-time gate; deterministic: under torch's deterministic algorithms."""

    case: str
    dtype: str
    mode: str = "forward_backward"
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """Everything that the benchmark, its gates, the self test and the tests need to know about one operator.

    name: of the operator in results. public: of the function in `dream_fast.kernels`, where it differs; the reference
    is `<public>_reference` in the same module. inputs(case, device, count_bytes): builds a case's problem;
    `count_bytes=False` leaves out the search for the rows of a table that are touched. dtype: of the full cases; small
    and tiny ones are fp32. full, small, tiny: names of cases for a GPU, for a CPU, and for the self test (also in
    Triton's interpreter). quick, peers: the full cases that `--quick` times and that peers are timed on. not_compiled:
    cases that torch.compile is not tried on. gate: smaller cases for the accuracy gate, where fp64 fits, by name.
    capturable: the reference can be captured in a CUDA graph. compare: makes the results of several implementations
    comparable. targets: by case and mode. aot: entries of the ahead-of-time gate, each a case or a function that builds
    a call.
    """

    name: str
    inputs: Callable[[Case, torch.device, bool], Problem]
    public: str = ""
    dtype: str = "float32"
    modes: tuple[str, ...] = BOTH
    full: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ("tiny",)
    quick: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    not_compiled: tuple[str, ...] = ()
    gate: Mapping[str, str] = field(default_factory=dict)
    capturable: bool = False
    compare: Callable[[list[Results]], list[Results]] | None = None
    targets: Mapping[tuple[str, str], Target] = field(default_factory=dict)
    aot: Mapping[str, AotCase | Callable[[], Callable[[], object]]] = field(default_factory=dict)

    # The functions are looked up when they are needed: `bench timing` also runs on commits that lack some of them.
    @property
    def operator(self) -> Operator:
        return getattr(kernels, self.public or self.name)

    @property
    def reference(self) -> Operator:
        return getattr(import_module(self.operator.__module__), f"{self.public or self.name}_reference")

    def make_cases(self, names: tuple[str, ...], dtype: str, modes: tuple[str, ...] | None = None) -> list[Case]:
        """Cases of these names in all modes, or in `modes`."""
        return [Case(op=self.name, case=name, mode=mode, dtype=dtype) for name in names for mode in modes or self.modes]

    def build(self, case: Case, device: torch.device | str = "cpu", *, count_bytes: bool = True) -> Problem:
        """The problem of a case on `device`. Raises ValueError: when the name of the case does not fit."""
        problem = self.inputs(case, torch.device(device), count_bytes)
        return replace(problem, operator=self.operator, reference=self.reference)


def run(problem: Problem, operator: Operator, mode: str, dtype: torch.dtype) -> Results:
    """Outputs (forward), or outputs and gradients of the leaves (forward_backward)."""
    if mode == "forward":
        with torch.no_grad():
            return problem.call(operator, problem.tensors, dtype)
    leaves = {name: problem.tensors[name].detach().requires_grad_() for name in problem.leaves}
    outputs = problem.call(operator, problem.tensors | leaves, dtype)
    used = [(out, grad) for out, grad in zip(outputs, problem.upstream, strict=True) if grad is not None]
    grads = torch.autograd.grad([out for out, _ in used], list(leaves.values()), [grad for _, grad in used])
    return (*(out.detach() for out in outputs), *grads)


def backpropagate(outputs: Results | Tensor) -> None:
    """Gradients of everything from every output that has one, with ones upstream."""
    results = (outputs,) if isinstance(outputs, Tensor) else outputs
    differentiable = [out for out in results if out.requires_grad]
    torch.autograd.backward(differentiable, [torch.ones_like(out) for out in differentiable])
