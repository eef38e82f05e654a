"""The timer of every benchmark: CUDA events on a GPU, clocks on a CPU.

A call that takes tens of microseconds on a GPU starts slower than it runs, so there are two times of it. `time_cuda`
captures the whole call, autograd included, in a CUDA graph where that is possible, and times the replay, with the L2
cache overwritten between calls: the kernels' own time. `time_eager` times calls from Python, one after the other.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

# The cost of a call on a shared machine: summed over all threads, without waiting for other programs.
processor_time = time.process_time

# Overwritten between two calls: more than the L2 cache of any GPU, so that inputs come from memory.
CACHE_BYTES = 256 << 20


class Timing(NamedTuple):
    """Median, 20th and 80th percentile of the time of a call in ms; graph: the call was replayed from a CUDA graph."""

    median: float
    p20: float
    p80: float
    graph: bool = False


def quantiles(times: list[float], *, graph: bool = False) -> Timing:
    """Summarise times in ms."""
    if len(times) < 2:
        return Timing(times[0], times[0], times[0], graph)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), deciles[1], deciles[7], graph)


def capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    """Capture `call`, warmed up on a side stream, as a CUDA graph; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # torch raises it for anything that a capture forbids
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph


def time_cuda(call: Callable[[], Any], *, milliseconds: float = 100, graph: bool = True, least: int = 10) -> Timing:
    """Time `call` on the current GPU, after a warm-up: for about `milliseconds`, at least `least` calls."""
    call()
    torch.cuda.synchronize()
    captured = capture(call) if graph else None
    run = call if captured is None else captured.replay
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(3):
        cache.zero_()
        run()
    end.record()
    torch.cuda.synchronize()
    # The estimate includes the flush, so that the total time is about `milliseconds`.
    repeats = min(1000, max(least, int(milliseconds / (start.elapsed_time(end) / 3))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in events:
        cache.zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in events]
    del captured, cache
    return quantiles(times, graph=run is not call)


def time_eager(call: Callable[[], Any], *, milliseconds: float = 100, least: int = 10) -> Timing:
    """Time `call` on the current GPU among calls that follow one another, the host's part included, after a warm-up.

    After each batch of calls the host waits for the GPU: for about `milliseconds`, at least `least` batches.
    """

    def time_batch(calls: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / calls

    call()
    # A batch is long beside the wait at its end.
    calls = max(1, int(milliseconds / 50 / time_batch(3)))
    spent, times = 0.0, list[float]()
    while spent < milliseconds or len(times) < least:
        times.append(time_batch(calls))
        spent += times[-1] * calls
    return quantiles(times)


def time_cpu(call: Callable[[], Any], *, milliseconds: float = 100, least: int = 3) -> Timing:
    """Time `call` by the wall clock, after a warm-up: for at least `milliseconds` and `least` calls."""
    call()
    times: list[float] = []
    spent = 0.0
    while spent < milliseconds or len(times) < least:
        times.append(time_once(call, torch.device("cpu")))
        spent += times[-1]
    return quantiles(times)


def time_call(call: Callable[[], Any], device: torch.device, **options: Any) -> Timing:
    """Time `call` on a device; options as of `time_cuda` or `time_cpu`."""
    return time_cuda(call, **options) if device.type == "cuda" else time_cpu(call, **options)


def time_once(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one call in ms, without warm-up; the call may hold any number of launches."""
    if device.type != "cuda":
        seconds = time.perf_counter()
        call()
        return (time.perf_counter() - seconds) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def time_calls(call: Callable[[], Any], count: int, clock: Callable[[], float] = processor_time) -> float:
    """Seconds of `count` calls by a clock."""
    start = clock()
    for _ in range(count):
        call()
    return clock() - start


def prepare_synchronous(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Make a call that other timers can time: on a GPU the replay of its CUDA graph if possible, and waiting for it."""
    if device.type != "cuda":
        return call
    graph = capture(call)
    launch = call if graph is None else graph.replay

    def launch_and_wait() -> None:
        launch()
        torch.cuda.synchronize()

    return launch_and_wait


class PartClock:
    """Times of the parts of a longer call, which calls `mark` at the end of each part.

    On a GPU the marks are events. Inside a CUDA graph they become part of it, and each replay sets them.
    """

    def __init__(self, start: str, parts: Sequence[str], device: torch.device):
        self.names, self.device = (start, *parts), device
        # Made once: several graphs, one for each kind of step, set the same events.
        cuda = device.type == "cuda"
        self.marks: dict[str, Any] = {
            name: torch.cuda.Event(enable_timing=True, external=True) if cuda else 0.0 for name in self.names
        }

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            self.marks[name].record()
        else:
            self.marks[name] = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Wait for the device and return the time of each part in ms."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        pairs = [(self.marks[before], self.marks[name]) for before, name in pairwise(self.names)]
        times = [start.elapsed_time(end) if cuda else (end - start) * 1e3 for start, end in pairs]
        return dict(zip(self.names[1:], times, strict=True))


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak of torch's allocations during `call` in bytes, above what was allocated before; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy larger than every cache."""
    size = (1 << 30) if device.type == "cuda" else (1 << 26)
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    options = {"graph": False} if device.type == "cuda" else {}
    return 2 * size / (time_call(lambda: target.copy_(source), device, **options).median / 1e3)


def matmul_rate(device: torch.device) -> float:
    """FLOPs a second of a large matrix product: bf16 on a GPU, fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    options = {"graph": False} if device.type == "cuda" else {}
    return 2 * size**3 / (time_call(lambda: a @ b, device, **options).median / 1e3)
