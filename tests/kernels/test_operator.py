"""The two ways to call an operator: straight to its function, and through torch's dispatcher where it is traced.

Launches are listed and not run, so that no GPU is needed; tests/kernels/triton compares what kernels compute.
"""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dream_fast.bench.ops.cases import SPECS, tiny_cases
from dream_fast.bench.ops.spec import run
from dream_fast.kernels import composite, occupancy_update, recorded_launches
from dream_fast.kernels._core.operator import operator

pytest.importorskip("triton")
# Gradients that the host computes from the table alone are plain functions.
CASES = [
    pytest.param(case, id=f"{case.op} {case.case}")
    for case in tiny_cases()
    if case.op not in ("total_variation", "weight_decay")
]


@operator("dream_fast_test::double")
def double(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(2 * x.detach().numpy())  # as a kernel, it needs the tensor's memory


@double.register_fake
def _(x):
    return torch.empty_like(x)


class CalledOperators(TorchDispatchMode):
    """List this package's operators that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace.startswith("dream_fast"):
            self.names.append(function.name())
        return function(*arguments, **(options or {}))


def run_case(case):
    """Names of the kernels that a call launches, forward and backward, and its results."""
    problem = SPECS[case.op].build(case, count_bytes=False)
    with recorded_launches() as launches:
        results = run(problem, problem.operator, case.mode, case.compute_dtype)
    return [launch.kernel.__name__ for launch in launches], results


@pytest.mark.parametrize("case", CASES)
def test_operator_eager_call_is_not_dispatched(case, monkeypatch):
    """An eager call, with its gradients, launches what a dispatched one does, and calls no custom operator."""
    with CalledOperators() as called:
        dispatched, _ = run_case(case)
    assert dispatched and called.names

    def refuse(*_):
        raise AssertionError("an eager call went through the dispatcher")

    monkeypatch.setattr(type(double.custom), "__call__", refuse)
    assert run_case(case)[0] == dispatched


@pytest.mark.parametrize("case", CASES)
def test_operator_fake_tensors(case):
    """Fake tensors give results and gradients of the shapes and dtypes of real ones, and launch nothing."""
    _, results = run_case(case)
    problem = SPECS[case.op].build(case, count_bytes=False)
    with FakeTensorMode() as mode, recorded_launches() as launches:
        tensors = {name: mode.from_tensor(tensor) for name, tensor in problem.tensors.items()}
        upstream = tuple(None if grad is None else mode.from_tensor(grad) for grad in problem.upstream)
        fake = replace(problem, tensors=tensors, upstream=upstream)
        fakes = run(fake, problem.operator, case.mode, case.compute_dtype)
    assert launches == []
    assert [(value.shape, value.dtype) for value in fakes] == [(value.shape, value.dtype) for value in results]


@pytest.mark.parametrize("case", CASES)
def test_operator_compile_fullgraph(case):
    """torch.compile takes the call without a graph break, as one custom operator, and launches the same kernels."""
    expected, _ = run_case(case)
    problem = SPECS[case.op].build(case, count_bytes=False)
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    call = torch.compile(problem.call, fullgraph=True, backend=backend)
    with recorded_launches() as launches:
        run(replace(problem, call=call), problem.operator, case.mode, case.compute_dtype)
    relaid = {"transpose_kernel"}  # the compiler may lay a gradient out as the kernels want it
    assert {launch.kernel.__name__ for launch in launches} | relaid == {*expected} | relaid
    assert any(target.startswith("dream_fast.") for target in targets)


def test_operator_subclass():
    """A tensor of a subclass is dispatched, so that the subclass sees the operator."""

    class Logged(torch.Tensor):
        names = []

        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            cls.names.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, arguments, options or {})

    assert double(torch.ones(2).as_subclass(Logged)).tolist() == [2, 2]
    assert any("double" in name for name in Logged.names)


def test_operator_under_vmap():
    """A transform of torch.func, whose tensors have no memory of their own, is dispatched."""
    assert torch.func.vmap(double)(torch.ones(3, 2)).tolist() == [[2, 2]] * 3


def test_operator_without_gradient_raises_in_backward():
    """An operator without a gradient gives none silently."""
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert not double(x).requires_grad
    with pytest.raises(RuntimeError, match="no autograd formula"):
        double(x).sum().backward()


def test_operator_saves_only_where_a_gradient_is_needed():
    """Without a tensor that requires a gradient, and under no_grad, results keep no graph; otherwise they do."""
    case = next(case for case in tiny_cases() if case.op == "composite")
    tensors = dict(SPECS[case.op].build(case, count_bytes=False).tensors)
    with recorded_launches():
        assert composite(**tensors).values.grad_fn is None
        tensors["sigma"] = tensors["sigma"].clone().requires_grad_()
        assert composite(**tensors).values.grad_fn is not None
        with torch.no_grad():
            assert composite(**tensors).values.grad_fn is None


def test_operator_counts_versions_of_what_it_changes():
    """A tensor that was saved for a backward and then changed by an operator raises there."""
    density, fresh = torch.ones(1, 64), torch.ones(1, 64)
    before = density._version, fresh._version
    with recorded_launches():
        occupancy_update(density, fresh)
    assert (density._version, fresh._version) == (before[0] + 1, before[1])
