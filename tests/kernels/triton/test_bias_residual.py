"""The kernel at the end of a residual block: output and gradients against fp64, both layouts, ragged tiles."""

import random

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.kernels import bias_residual, bias_residual_reference
from dream_fast.kernels._core.launch import INTERPRETED
from dream_fast.kernels.nn import bias_residual as bias_residual_module

NAMES = ("output", "gradient of x", "gradient of bias", "gradient of residual")


def laid_out(tensor, last):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if last else tensor


def inputs(shape, device, *, last=False, dtype=torch.float32, seed=0):
    """x, bias, residual, gradient of the output"""
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape, shape[1:2], shape, shape)
    found = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    return [tensor if tensor.dim() == 1 else laid_out(tensor, last) for tensor in found]


def run(operator, tensors):
    *leaves, upstream = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = operator(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def compare(tensors):
    found = [run(bias_residual, tensors)]
    found += [run(bias_residual_reference, given) for given in (tensors, [tensor.double() for tensor in tensors])]
    for name, mine, theirs, true in zip(NAMES, *found, strict=True):
        assert mine.dtype == theirs.dtype
        check(name, mine, theirs, true)
    return found[0]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4), (2, 5, 7), (2, 12, 5, 3), (1, 8, 2, 3, 2), (1, 33, 4, 4)])
def test_small_shapes(shape, dtype, last, device, deterministic):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts digits off where bfloat16 is to be rounded")
    tensors = inputs(shape, device, last=last, dtype=dtype)
    out = compare(tensors)[0]
    if len(shape) > 2:
        assert out.stride() == tensors[0].stride()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 5, 5), (1, 20, 3, 3), (1, 3, 65)])
def test_more_than_a_tile(shape, last, device, monkeypatch, deterministic):
    monkeypatch.setattr(bias_residual_module, "_TILE", 16)
    compare(inputs(shape, device, last=last))


@pytest.mark.parametrize("shape", [(0, 6, 3), (2, 6, 0, 5), (2, 0, 3)])
def test_empty(shape, device):
    got = run(bias_residual, inputs(shape, device))
    assert [tuple(tensor.shape) for tensor in got] == [shape, shape, shape[1:2], shape]


def test_non_contiguous(device):
    x, bias, residual, upstream = inputs((2, 12, 4, 4), device)
    dense = compare([x, bias, residual, upstream])
    strided = torch.stack([x, x + 1], -1)[..., 0]
    wide = torch.stack([bias, bias], 1)[:, 0]
    for given in ([strided, wide, residual, upstream], [x, bias, laid_out(residual, True), laid_out(upstream, True)]):
        assert torch.equal(compare(given)[0], dense[0])
    mixed = compare([laid_out(x, True), bias, residual, upstream])
    assert torch.equal(mixed[0], dense[0]) and mixed[0].stride() == laid_out(x, True).stride()


@pytest.mark.fuzz(interpreted=8, gpu=60)
def test_random_settings(seed, device):
    rng = random.Random(seed)
    most = 6 if INTERPRETED else 60
    shape = (rng.randint(1, 3), rng.randint(1, 8 * most), *(rng.randint(1, most) for _ in range(rng.randint(0, 2))))
    dtype = rng.choice([torch.float32, torch.float16])
    compare(inputs(shape, device, last=seed % 2 == 1, dtype=dtype, seed=seed))


def test_the_operator_is_declared_as_it_behaves(device):
    for last in (False, True):
        leaves = [tensor.requires_grad_() for tensor in inputs((1, 4, 5, 5), device, last=last)[:3]]
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(bias_residual_module._bias_residual, tuple(leaves), test_utils=checks)


def test_complains_about_doubles(device):
    x, bias, residual, _ = inputs((1, 4, 3, 3), device, dtype=torch.float64)
    with pytest.raises(TypeError, match="x is float64, which the kernels do not compute in"):
        bias_residual(x, bias, residual)


@pytest.mark.full_size("33 million elements a tensor")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("side", "channels", "images"), [(512, 128, 1), (64, 320, 2), (32, 640, 2), (8, 1280, 2)])
def test_sizes_of_stable_diffusion(side, channels, images, last, device, deterministic):
    compare(inputs((images, channels, side, side), device, last=last, dtype=torch.float16))


@pytest.mark.full_size("host synchronisations, graphs and streams exist only there")
def test_no_synchronisation_graph_and_stream(device, everywhere):
    tensors = inputs((2, 320, 64, 64), device, last=True, dtype=torch.float16)
    expected, repeats = everywhere(lambda: run(bias_residual, tensors))
    for found in repeats:
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.full_size("compiled code runs only there")
@pytest.mark.parametrize("last", [False, True])
def test_compiled(last, device, compare_compiled):
    *tensors, upstream = inputs((2, 320, 8, 8), device, last=last)

    def loss(operator, x, bias, residual):
        return (operator(2 * x, bias.square(), residual) * upstream).sum()

    compare_compiled(loss, bias_residual, bias_residual_reference, tensors)


@pytest.mark.full_size("9 GB")
@pytest.mark.parametrize("last", [False, True])
def test_more_than_two_to_the_31_numbers(last, device):
    shape = (130, 64, 512, 512)
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.ones(shape, dtype=torch.float16, device=device).contiguous(memory_format=order)
    x[-1] = torch.randn(shape[1:], device=device).half()
    bias = torch.randn(64, device=device).half()
    got = bias_residual(x, bias, x)
    assert torch.equal(got[-1:], bias_residual_reference(x[-1:].float(), bias.float(), x[-1:].float()).half())
