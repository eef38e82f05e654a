"""CUDA graphs: replay hundreds of launches of a function for the price of one.

A graph repeats the launches of the call that it was captured from, with the same addresses. So everything that varies
from call to call has to lie in tensors that stay where they are: `StepGraphs` keeps a static copy of the inputs for
each graph and fills it before each replay.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3  # calls before the capture: libraries choose algorithms and allocate in their first ones


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Any
    result: Any


class StepGraphs:
    """CUDA graphs of functions of a step, told apart by a key; they share their memory.

    A function takes one argument, a structure (tuples, dicts) whose tensors and floats may vary from call to call, and
    returns tensors in any structure. It may differentiate inside, must not read a value on the host, and may draw
    random numbers from `generator` alone: a replay draws what a call would. Weights that it reads must stay where they
    are.
    """

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator
        self._pool: Any = None
        self._captured: dict[Hashable, _Captured] = {}

    def __call__(self, key: Hashable, function: Callable[[Any], Any], inputs: Any) -> Any:
        """Return `function(inputs)`, replayed from the graph of `key` and of the shapes and dtypes of the inputs.

        A graph is captured at its first call, in which `function` sees the floats of `inputs` as scalars on the device.
        The next replay of any of these graphs may overwrite the result.
        """
        leaves = pytree.tree_leaves(inputs)
        key = (key, *((leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)))
        if key not in self._captured:
            self._captured[key] = self._capture(function, inputs)
        captured = self._captured[key]
        fill_static(pytree.tree_leaves(captured.inputs), leaves)
        captured.graph.replay()
        return captured.result

    def _capture(self, function: Callable[[Any], Any], inputs: Any) -> _Captured:
        device = next(leaf.device for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
        with torch.cuda.device(device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            static = static_copy(inputs, device)
            with _restored(self.generator):
                warm_up(lambda: function(static))
                graph = torch.cuda.CUDAGraph()
                if self.generator is not None:
                    graph.register_generator_state(self.generator)
                with torch.cuda.graph(graph, pool=self._pool):
                    result = function(static)
        return _Captured(graph, static, result)

    def clear(self) -> None:
        """Forget all graphs and free their memory."""
        self._captured.clear()
        self._pool = None


@contextmanager
def _restored(generator: torch.Generator | None) -> Iterator[None]:
    """Inside the `with` block `generator` may draw; afterwards its state is restored."""
    if generator is None:
        yield
        return
    state = generator.get_state()
    yield
    generator.set_state(state)


def static_copy(inputs: Any, device: torch.device) -> Any:
    """Copy a structure for a graph to read: tensors are cloned, floats become fp32 scalars on `device`."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        return torch.full((), leaf, device=device) if isinstance(leaf, float) else leaf

    return pytree.tree_map(copy, inputs)


def fill_static(static: list[Any], leaves: list[Any]) -> None:
    """Fill the leaves of a `static_copy` with those of other inputs of the same structure."""
    pairs = [(place, leaf) for place, leaf in zip(static, leaves, strict=True) if isinstance(place, Tensor)]
    tensors = [(place, leaf) for place, leaf in pairs if isinstance(leaf, Tensor)]
    if tensors:
        torch._foreach_copy_([place for place, _ in tensors], [leaf for _, leaf in tensors])
    for place, leaf in pairs:
        if not isinstance(leaf, Tensor):
            place.fill_(leaf)


def warm_up(function: Callable[[], Any]) -> None:
    """Call `function` WARM_UP times on a side stream, as a capture requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
