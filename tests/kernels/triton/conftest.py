"""Kernels against their references: on a GPU (`pytest -m gpu`), or interpreted on a CPU (`TRITON_INTERPRET=1`).

Without either there is nothing to test here, and nothing is collected.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.bench.doctor.interpreter import quick_interpreter
from dream_fast.kernels._core.launch import INTERPRETED
from dream_fast.kernels.grid import gradients as grid_gradients

HERE = Path(__file__).parent
GPU = torch.cuda.is_available() and not INTERPRETED
if not (GPU or INTERPRETED):
    collect_ignore_glob = ["test_*.py"]


def pytest_generate_tests(metafunc):
    """Give a test that is marked `fuzz` its seeds: fewer where kernels are interpreted."""
    for marker in metafunc.definition.iter_markers("fuzz"):
        seeds = {"interpreted": 12, "gpu": 150} | marker.kwargs
        metafunc.parametrize("seed", range(seeds["interpreted" if INTERPRETED else "gpu"]))


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if INTERPRETED and (marker := item.get_closest_marker("full_size")):
                reason = f"only on a GPU: {marker.args[0]}"  # graphs, streams, its memory; or hours when interpreted
                item.add_marker(pytest.mark.skip(reason=reason))  # not left out: `pytest -m gpu` runs it there


class InterpretedMemory:
    """Check each read and write of interpreted kernels, lane by lane.

    A lane that reads or writes outside of the launch's tensors raises AssertionError. A masked load without `other=`
    gives NaN or a large integer in the lanes that it leaves undefined. Inside `far` one program of a launch runs,
    perhaps far from all others: nothing is written, reads outside of the tensors give 1, and `touched` counts the lanes
    that read or write an argument's memory, {"x read": 64, ...}.
    """

    def __init__(self, monkeypatch):
        from triton import knobs
        from triton.runtime import interpreter

        self.interpreter, self.is_far = interpreter, False
        self.touched: Counter[str] = Counter()
        builder = interpreter.InterpreterBuilder
        originals = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store")}
        original_atomic, original_arguments = builder.create_atomic_rmw, interpreter.GridExecutor._init_args_hst

        def load(this, pointers, mask, other, *options):
            keep = self.check(pointers, mask, "read")
            if self.is_far or (other is None and not mask.data.all()):
                kind = interpreter._get_np_dtype(pointers.get_element_ty())
                unknown = np.nan if kind.kind == "f" else np.iinfo(kind).max // 3
                value = unknown if other is None else other.data
                value = np.where(mask.data, 1, value) if self.is_far else np.full(pointers.data.shape, value)
                other = interpreter.TensorHandle(value.astype(kind), pointers.get_element_ty())
            return originals["create_masked_load"](this, pointers, keep, other, *options)

        def store(this, pointers, value, mask, *options):
            return originals["create_masked_store"](
                this, pointers, value, self.check(pointers, mask, "written"), *options
            )

        def atomic(this, operation, pointers, value, mask, *options):
            keep = self.check(pointers, mask, "written")
            return original_atomic(this, operation, pointers, value, keep, *options)

        def arguments(this, positional, keywords):
            self.measure(keywords)
            return original_arguments(this, positional, keywords)

        monkeypatch.setattr(builder, "create_masked_load", load)
        monkeypatch.setattr(builder, "create_masked_store", store)
        monkeypatch.setattr(builder, "create_atomic_rmw", atomic)
        monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", arguments)
        monkeypatch.setattr(knobs.compilation, "front_end_debugging", True)  # an AssertionError comes out as it is
        self.builder = builder

    def measure(self, arguments):
        """Note where the tensors of a launch begin and end."""
        self.extents = {}
        for name, tensor in arguments.items():
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                last = sum((n - 1) * abs(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
                self.extents[name] = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
        ordered = np.array(sorted(self.extents.values()) or [(0, 0)], np.uint64)
        # Of tensors that overlap, the one that reaches farthest counts.
        self.begins, self.ends = ordered[:, 0].copy(), np.maximum.accumulate(ordered[:, 1])

    def check(self, pointers, mask, verb):
        """The lanes that may go on, as the interpreter takes a mask."""
        address, size = pointers.data, np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        live = np.broadcast_to(mask.data, address.shape).astype(bool)
        before = np.searchsorted(self.begins, address, "right") - 1
        outside = live & ((before < 0) | (address + size > self.ends[before]))
        if self.is_far:
            for name, (begin, end) in self.extents.items():
                self.touched[f"{name} {verb}"] += int((live & (address >= begin) & (address + size <= end)).sum())
            live = live & ~outside if verb == "read" else np.zeros_like(live)
        elif outside.any():
            raise AssertionError(f"memory outside of a kernel's tensors is {verb} in {outside.sum()} lanes")
        return self.interpreter.TensorHandle(live, mask.dtype)

    @contextmanager
    def far(self, monkeypatch, program: tuple[int, ...], programs: tuple[int, ...]) -> Iterator[None]:
        """Kernels that are launched inside run as program number `program` of `programs`, each given an axis."""
        handle, int32 = self.interpreter.TensorHandle, self.interpreter.tl.int32
        self.touched, self.is_far = Counter(), True
        with monkeypatch.context() as patch:
            for name, numbers in (("create_get_program_id", program), ("create_get_num_programs", programs)):
                patch.setattr(
                    self.builder,
                    name,
                    lambda _, axis, numbers=numbers: handle(np.array([numbers[axis]], np.int32), int32),
                )
            try:
                yield
            finally:
                self.is_far = False


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter():
    """Interpreted kernels take half of the time that they take without it."""
    with quick_interpreter() if INTERPRETED else nullcontext():
        yield


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Checks every access of interpreted kernels: see `InterpretedMemory`. None on a GPU (`make sanitize` is there)."""
    return InterpretedMemory(monkeypatch) if INTERPRETED else None


@pytest.fixture
def device() -> torch.device:
    """The device of the kernels."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def deterministic():
    """Turn on torch's deterministic mode, which also fills new buffers with NaN: elements that are not written show."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn)


@pytest.fixture
def everywhere():
    """everywhere(call) -> the call's result, and three more results of it.

    They come from a call in which waiting for the GPU raises, from one on another stream, and from a CUDA graph.
    """

    def repeated(call):
        expected = call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        graph.replay()
        return expected, (again, aside, captured)

    return repeated


@pytest.fixture
def compare_compiled():
    """compare_compiled(loss, operator, reference, tensors): check that compiled code is as accurate as eager code.

    loss(operator, *tensors) is a scalar. Its value and its gradients into all tensors count, against the reference in
    fp64.
    """

    def gradients(call, operator, tensors, dtype=None):
        leaves = [tensor.to(dtype or tensor.dtype, copy=True).requires_grad_() for tensor in tensors]
        value = call(operator, *leaves)
        value.backward()
        return value.detach(), *(leaf.grad for leaf in leaves)

    def compare(loss, operator, reference, tensors):
        compiled = gradients(torch.compile(loss, fullgraph=True), operator, tensors)
        eager = gradients(loss, operator, tensors)
        exact = gradients(loss, reference, tensors, torch.float64)
        for number, results in enumerate(zip(compiled, eager, exact, strict=True)):
            check("value" if number == 0 else f"gradient {number}", *results)

    return compare


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """The interpreter takes as long for one lane as for a thousand: many lanes, few steps and few instructions."""
    if INTERPRETED:
        full_config = grid_gradients._hash_grid_table_bwd_config

        def short_config(*shape):
            config = full_config(*shape)
            return config._replace(block=512, run=2, width=min(config.width, 2))

        monkeypatch.setattr(grid_gradients, "_hash_grid_table_bwd_config", short_config)
