"""The kernels of the hash grid's regularisers against fp64: total variation and weight decay."""

import math

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.kernels import HashGridSpec, hash_grid_total_variation_grad, hash_grid_weight_decay_grad
from dream_fast.kernels._core.launch import INTERPRETED
from dream_fast.kernels.grid.regularizers import (
    hash_grid_total_variation_grad_reference,
    hash_grid_weight_decay_grad_reference,
)

# Three dense levels and two hashed ones.
SPEC = HashGridSpec(levels=5, features=2, log2_entries=8, base_resolution=4, max_resolution=16)


def inputs(spec, n, device):
    """A table, and points [n, 3] in [0, 1]: multiples of 2^-12, whose vertices are the same in any dtype."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(spec.rows, spec.features, generator=generator)
    points = torch.randint(0, 4097, (n, 3), generator=generator) / 4096
    return table.to(device), points.to(device)


def compare(spec, table, points, weight):
    variation = hash_grid_total_variation_grad, hash_grid_total_variation_grad_reference
    decay = hash_grid_weight_decay_grad, hash_grid_weight_decay_grad_reference
    for name, (operator, reference), arguments in (("variation", variation, (points,)), ("decay", decay, ())):
        exact = reference(table.double(), spec, *(argument.double() for argument in arguments), weight)
        actual, single = operator(table, spec, *arguments, weight), reference(table, spec, *arguments, weight)
        check(name, actual, single, exact)


@pytest.mark.parametrize("features", [1, 2, 4])
@pytest.mark.parametrize("on_device", [False, True])
def test_regularizers_gradients(device, features, on_device):
    """Total variation and weight decay, with the weight as a number and on the device."""
    spec = HashGridSpec(levels=4, features=features, log2_entries=7, base_resolution=3, max_resolution=16)
    compare(spec, *inputs(spec, 100, device), torch.tensor(0.7, device=device) if on_device else 0.7)


@pytest.mark.parametrize("n", [0, 1, 65, 129])
def test_regularizers_small_shapes(device, n):
    """No point, one, and one past a block."""
    compare(SPEC, *inputs(SPEC, n, device), 0.3)


def test_regularizers_deterministic(device, deterministic):
    """Total variation repeats bit for bit in deterministic mode, where a NaN in the table shows."""
    table, points = inputs(SPEC, 300, device)
    compare(SPEC, table, points, 0.7)
    first = hash_grid_total_variation_grad(table, SPEC, points, 0.7)
    for _ in range(2 if INTERPRETED else 10):
        assert torch.equal(first, hash_grid_total_variation_grad(table, SPEC, points, 0.7))
    table[3] = math.nan
    assert hash_grid_total_variation_grad(table, SPEC, points, 0.7).isnan().any()


@pytest.mark.full_size("the CPU has nothing to wait for")
@pytest.mark.parametrize("mode", [False, True])
def test_regularizers_no_synchronisation(device, mode):
    """No call waits for the GPU, in either mode."""
    spec = HashGridSpec(log2_entries=16)
    (table, points), weight = inputs(spec, 200_000, device), torch.tensor(0.5, device=device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode, warn_only=True)
    try:
        for error_mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(error_mode)
            hash_grid_total_variation_grad(table, spec, points, weight)
            hash_grid_weight_decay_grad(table, spec, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(before)
