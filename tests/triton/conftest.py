"""Kernels against their references: on a GPU (`pytest -m gpu`), or interpreted on a CPU (`TRITON_INTERPRET=1`).

Without either there is nothing to test here, and nothing is collected.
"""

import os
from pathlib import Path

import pytest
import torch

from dream_fast.kernels import _grid

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
if not (GPU or INTERPRETED):
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if INTERPRETED and (marker := item.get_closest_marker("full_size")):
                reason = f"only on a GPU: {marker.args[0]}"  # graphs, streams, its memory; or hours when interpreted
                item.add_marker(pytest.mark.skip(reason=reason))  # not left out: `pytest -m gpu` runs it there


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def deterministic():
    """torch's deterministic mode; it also fills what torch.empty gives with NaN, so that elements nobody wrote show."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn)


@pytest.fixture
def everywhere():
    """everywhere(call): what it gives, and what it gives once more where waiting for the GPU raises, on a stream of its
    own, and from a CUDA graph."""

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
def eager_and_compiled():
    """eager_and_compiled(loss, tensors): its value and its gradients into all of them, as it is and compiled."""

    def both(loss, tensors):
        found = []
        for call in (loss, torch.compile(loss, fullgraph=True)):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            value = call(*leaves)
            value.backward()
            found.append((value.detach(), *(leaf.grad for leaf in leaves)))
        return zip(*found, strict=True)

    return both


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """The interpreter takes as long for one lane as for a thousand: many lanes, few steps and few instructions."""
    if INTERPRETED:
        config = _grid._scatter_config

        def short(*shape):
            found = config(*shape)
            return found | {"BLOCK": 512, "RUN": 2, "WIDTH": min(found["WIDTH"], 2)}

        monkeypatch.setattr(_grid, "_scatter_config", short)
