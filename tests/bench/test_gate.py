"""The gate of the benchmark: the sizes at which it judges, and the parts of a problem that reach the verdict."""

from dataclasses import replace

import torch

from dream_fast.bench.ops import gate
from dream_fast.bench.ops.cases import FULL
from dream_fast.bench.ops.spec import Problem

CPU = torch.device("cpu")
TOO_LARGE = ("rays_128", "rays_256", "rays_512", "uniform_2^20", "uniform_2^22", "frame_800", "mesh_50k", "mesh_1M")
TOO_LARGE += ("shell_256", "inside_256", "noise_256", "bound2_256")


def test_gate_case():
    """Large cases are judged at a smaller size, small ones as they are; nothing but the size changes."""
    for case in FULL:
        judged = gate.gate_case(case)
        assert replace(judged, case=case.case) == case
        large = case.case.startswith((*TOO_LARGE, "rays_64_"))
        assert (judged.case != case.case) == large
        assert not judged.case.startswith((*TOO_LARGE, "rays_64_"))
        assert judged.case.partition("_")[0] == case.case.partition("_")[0]  # rays stay rays
        normals = ("normals", "analytic", "finite_difference")
        assert [judged.case.endswith(kind) for kind in normals] == [case.case.endswith(kind) for kind in normals]


def problem(weights=None):
    """Two times 100 numbers, computed in the given dtype, with one input that gets a gradient."""
    return Problem(
        operator=lambda x: 2 * x,
        reference=lambda x: 2 * x,
        call=lambda operator, tensors, dtype: (operator(tensors["x"].to(dtype)),),
        tensors={"x": torch.rand(100, generator=torch.Generator().manual_seed(0))},
        leaves=("x",),
        upstream=(torch.ones(100),),
        weights=weights,
    )


def test_judge_problem_weighs_outputs():
    """The weight comes from the problem's tensors: where it is 0 an error does not count."""
    calls = []

    def weights(tensors):
        calls.append(tensors["x"].dtype)
        return ((torch.arange(100) != 7).double(),)

    def wrong(x):
        return 2 * x + (torch.arange(100) == 7)

    for weighted, good in ((weights, True), (None, False)):
        verdicts = gate.judge_problem(problem(weighted), "forward", torch.float32, {"wrong": wrong})
        assert verdicts["wrong"].good == good
    assert calls == [torch.float64]


def test_judge_problem_counts_gradients(monkeypatch):
    """The exact result is in fp64, and the number of gradients is that of the leaves, 0 without a backward."""
    recorded = []

    def record(got, reference, exact, weights, gradients):
        recorded.append((got[0].dtype, exact[0].dtype, len(exact), gradients))

    monkeypatch.setattr(gate, "worst_verdict", record)
    for mode in ("forward", "forward_backward"):
        gate.judge_problem(problem(), mode, torch.float32, {"ours": lambda x: 2 * x})
    assert recorded == [(torch.float32, torch.float64, 1, 0), (torch.float32, torch.float64, 2, 1)]
