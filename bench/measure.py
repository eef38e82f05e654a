"""The only timer. On a GPU: events around one call, L2 cache overwritten between calls; on a CPU: the wall clock.

An operator that takes tens of microseconds starts slower than it runs, so on a GPU the whole call (autograd included)
is captured in a CUDA graph where that is possible, and its replay is timed. One that asks the host for a size cannot be
captured, and is timed as it is, waiting included.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# What a call costs on a machine that others use too: waiting for them is no part of it. Over all threads.
processor_time = time.process_time

# Overwritten between two calls: more than the L2 cache of any GPU, so that inputs come from memory.
CACHE_BYTES = 256 << 20


class Timing(NamedTuple):
    """Median, 20th and 80th percentile of the time of a call, ms; graph: whether it ran from a CUDA graph."""

    median: float
    p20: float
    p80: float
    graph: bool = False


def quantiles(times: list[float], *, graph: bool = False) -> Timing:
    if len(times) < 2:
        return Timing(times[0], times[0], times[0], graph)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), deciles[1], deciles[7], graph)


def capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    """A graph of `call`, warmed up on a side stream before; None where it cannot be captured."""
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
    except RuntimeError:  # torch raises it for whatever a capture forbids
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph


def time_cuda(call: Callable[[], Any], *, milliseconds: float = 100, graph: bool = True, least: int = 10) -> Timing:
    """Times of `call` on the current device, which is warmed up by this. At least `least` calls."""
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
    # The estimate includes the flush, so that the time spent is what was asked for.
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


def time_cpu(call: Callable[[], Any], *, milliseconds: float = 100, least: int = 3) -> Timing:
    call()
    times, spent = [], 0.0
    while spent < milliseconds or len(times) < least:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
        spent += times[-1]
    return quantiles(times)


def time_call(call: Callable[[], Any], device: torch.device, **options: Any) -> Timing:
    return time_cuda(call, **options) if device.type == "cuda" else time_cpu(call, **options)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that torch had allocated during `call` above what was allocated before; 0 on a CPU."""
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
    """Bytes a second, read and written, of a copy that fits no cache."""
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
