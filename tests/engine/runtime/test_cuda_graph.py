"""Inputs of CUDA graphs: static copies, and the parts of a step that are marked inside a graph."""

import torch
from torch.utils._pytree import tree_leaves

from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.runtime.cuda_graph import fill_static, static_copy
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
    """A filled copy has the values of a new one, in the tensors that a graph reads."""
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
