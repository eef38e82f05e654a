"""Replay a function of tensors as a CUDA graph: hundreds of launches for the price of one."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture: libraries choose algorithms and allocate in their first ones

Tensors = tuple[Tensor, ...]


class CudaGraphed:
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
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.function(*own)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = self.function(*own)
        return graph, [x for x in own if x is not None], results
