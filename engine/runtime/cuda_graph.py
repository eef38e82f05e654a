"""Replay a function of tensors as a CUDA graph: hundreds of launches for the price of one."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture: libraries choose algorithms and allocate in their first ones

Tensors = tuple[Tensor, ...]


class GraphedFunction:
    """Calls `function` (tensors or None in, a tuple of tensors out, all on one GPU) as a CUDA graph.

    It is captured at the first call with inputs of these shapes and dtypes, after WARM_UP plain calls, and replayed
    from then on. `function` may differentiate inside, must not draw random numbers, and must not look at values on the
    host. Inputs are copied in and results copied out, so nothing that a caller holds changes under it. Weights that it
    reads must stay where they are.
    """

    def __init__(self, function: Callable[..., Tensors]):
        self.function = function
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensors]] = {}

    def __call__(self, *inputs: Tensor | None) -> Tensors:
        key = tuple(None if x is None else (x.shape, x.dtype, x.device) for x in inputs)
        if key not in self.captured:
            self.captured[key] = self._capture(inputs)
        graph, places, results = self.captured[key]
        torch._foreach_copy_(places, [x for x in inputs if x is not None])
        graph.replay()
        return tuple(result.clone() for result in results)

    def _capture(self, inputs: tuple[Tensor | None, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensors]:
        own = [None if x is None else x.detach().clone() for x in inputs]
        device = next(x.device for x in own if x is not None)
        with torch.cuda.device(device):
            warm_up(lambda: self.function(*own))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = self.function(*own)
        return graph, [x for x in own if x is not None], results


class StepGraphs:
    """CUDA graphs of functions without inputs, told apart by a key, that share their memory.

    Such a function reads and writes tensors that stay where they are, may draw from `generator` (a replay draws what a
    call would), and returns tensors in any structure. What it returns is the graph's own: the next replay of any of
    these graphs may overwrite it. Nothing that it computed may still be differentiated.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.pool: Any = None
        self.captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def __call__(self, key: Hashable, function: Callable[[], Any]) -> Any:
        """The result of the replay of `key`, which is captured from `function` when it comes for the first time."""
        if key not in self.captured:
            self.captured[key] = self._capture(function)
        graph, result = self.captured[key]
        graph.replay()
        return result

    def _capture(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        with torch.cuda.device(self.generator.device):
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            drawn_so_far = self.generator.get_state()
            warm_up(function)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, pool=self.pool):
                result = function()
            self.generator.set_state(drawn_so_far)
        return graph, result

    def clear(self) -> None:
        """Forget all graphs and give their memory back."""
        self.captured.clear()
        self.pool = None


def warm_up(function: Callable[[], Any]) -> None:
    """Calls `function` WARM_UP times beside torch's current stream, as a capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
