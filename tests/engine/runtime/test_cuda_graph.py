"""Inputs of CUDA graphs: static copies, and the parts of a step that are marked inside a graph."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.runtime import cuda_graph
from dream_fast.engine.runtime.cuda_graph import StepGraphs, fill_static, static_copy
from dream_fast.engine.runtime.step_parts import end_part, on_part_end

CPU = torch.device("cpu")


def inputs(value: float) -> tuple:
    timesteps = torch.tensor([int(100 * value)])
    return (
        StepInputs(3, timesteps=timesteps, phase="latent"),
        {"scale": value, "prompt": torch.full((2, 2), value)},
        None,
    )


def test_static_copy_structure() -> None:
    """Tensors are cloned, floats become fp32 scalars, and everything else stays as it is."""
    given = inputs(0.1)
    step, scalars, nothing = static_copy(given, CPU)
    assert nothing is None and (step.step, step.phase, step.latents) == (3, "latent", False)
    assert torch.equal(step.timesteps, given[0].timesteps) and step.timesteps is not given[0].timesteps
    assert step.timesteps.dtype == torch.int64 and torch.equal(scalars["prompt"], given[1]["prompt"])
    assert scalars["scale"].dtype == torch.float32 and scalars["scale"].shape == ()
    assert scalars["scale"] == torch.tensor(0.1)


def test_fill_static_keeps_addresses() -> None:
    """A filled copy has the new values in the same tensors."""
    static, other = static_copy(inputs(0.1), CPU), inputs(0.7)
    places = [leaf.data_ptr() for leaf in tree_leaves(static) if isinstance(leaf, torch.Tensor)]
    fill_static(tree_leaves(static), tree_leaves(other))
    fresh = static_copy(other, CPU)
    leaves = [leaf for leaf in tree_leaves(static) if isinstance(leaf, torch.Tensor)]
    assert [leaf.data_ptr() for leaf in leaves] == places and len(places) == 4
    for leaf, expected in zip(leaves, (x for x in tree_leaves(fresh) if isinstance(x, torch.Tensor)), strict=True):
        assert torch.equal(leaf, expected)


def test_part_hooks_nest_and_end() -> None:
    """Each hook gets the parts that end inside its block."""
    outer, inner = [], []
    end_part("before")
    with on_part_end(outer.append):
        end_part("a")
        with on_part_end(inner.append):
            end_part("b")
    end_part("after")
    assert (outer, inner) == (["a", "b"], ["b"])


class FakeGraph:
    """A CUDA graph that only records its replays."""

    def __init__(self) -> None:
        self.replays, self.generators = 0, []

    def replay(self) -> None:
        self.replays += 1

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """A substitute for CUDA in a capture; returns the captured graphs in order."""
    captured: list[FakeGraph] = []

    @contextmanager
    def graph(graph: FakeGraph, pool: object):
        assert pool == "the pool"
        captured.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(cuda_graph, "warm_up", lambda function: [function() for _ in range(cuda_graph.WARM_UP)])
    return captured


def test_step_graphs_capture_once(fake_cuda: list[FakeGraph]) -> None:
    """A key and shapes are captured at their first call and replayed from then on, with inputs filled before."""
    generator, calls = torch.Generator().manual_seed(3), []
    state = generator.get_state()

    def function(given: tuple) -> tuple:
        calls.append(given)
        torch.rand(1, generator=generator)
        return (given[0].timesteps, given[1]["scale"])

    graphs = StepGraphs(generator)
    first = graphs("a", function, inputs(0.1))
    assert len(calls) == cuda_graph.WARM_UP + 1 and len(fake_cuda) == 1
    assert torch.equal(generator.get_state(), state)  # a replay draws what a call would have drawn
    again = graphs("a", function, inputs(0.7))
    assert len(calls) == cuda_graph.WARM_UP + 1 and [graph.replays for graph in fake_cuda] == [2]
    assert again[0] is first[0] and again[0].tolist() == [70] and again[1] == torch.tensor(0.7)
    graphs("b", function, inputs(0.1))
    wider = inputs(0.1)[0], {"scale": 0.1, "prompt": torch.zeros(3, 2)}, None
    graphs("a", function, wider)
    assert [graph.replays for graph in fake_cuda] == [2, 1, 1]
    assert [graph.generators for graph in fake_cuda] == [[generator]] * 3
    graphs.clear()
    graphs("a", function, inputs(0.1))
    assert len(fake_cuda) == 4


def test_step_graphs_without_a_generator(fake_cuda: list[FakeGraph]) -> None:
    """A function that draws nothing is captured without a generator."""
    result = StepGraphs()("a", lambda given: given * 2, torch.ones(2))
    assert result.tolist() == [2, 2] and fake_cuda[0].generators == []
