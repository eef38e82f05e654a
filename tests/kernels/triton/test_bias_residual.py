"""Kernel of the end of a residual block: output and gradients against fp64, both layouts, ragged tiles."""

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
    tensors = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    return [tensor if tensor.dim() == 1 else laid_out(tensor, last) for tensor in tensors]


def run(operator, tensors):
    *leaves, upstream = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = operator(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def compare(tensors):
    results = [run(bias_residual, tensors)]
    results += [
        run(bias_residual_reference, arguments) for arguments in (tensors, [tensor.double() for tensor in tensors])
    ]
    for name, value, reference, truth in zip(NAMES, *results, strict=True):
        assert value.dtype == reference.dtype
        check(name, value, reference, truth)
    return results[0]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4), (2, 5, 7), (2, 12, 5, 3), (1, 8, 2, 3, 2), (1, 33, 4, 4)])
def test_bias_residual_small_shapes(shape, dtype, last, device, deterministic):
    """Shapes around one element and one block, and none at all, match the reference."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts digits off where bfloat16 is to be rounded")
    tensors = inputs(shape, device, last=last, dtype=dtype)
    out = compare(tensors)[0]
    if len(shape) > 2:
        assert out.stride() == tensors[0].stride()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 5, 5), (1, 20, 3, 3), (1, 3, 65)])
def test_bias_residual_many_tiles(shape, last, device, monkeypatch, deterministic):
    """Several tiles, the last of them ragged, match the reference."""
    monkeypatch.setattr(bias_residual_module, "_TILE", 16)
    compare(inputs(shape, device, last=last))


@pytest.mark.parametrize("shape", [(0, 6, 3), (2, 6, 0, 5), (2, 0, 3)])
def test_bias_residual_empty(shape, device):
    """Empty inputs give empty or zero results and gradients."""
    got = run(bias_residual, inputs(shape, device))
    assert [tuple(tensor.shape) for tensor in got] == [shape, shape, shape[1:2], shape]


def test_bias_residual_non_contiguous(device):
    """Strided inputs give the results of contiguous ones."""
    x, bias, residual, upstream = inputs((2, 12, 4, 4), device)
    dense = compare([x, bias, residual, upstream])
    strided = torch.stack([x, x + 1], -1)[..., 0]
    wide = torch.stack([bias, bias], 1)[:, 0]
    for arguments in (
        [strided, wide, residual, upstream],
        [x, bias, laid_out(residual, True), laid_out(upstream, True)],
    ):
        assert torch.equal(compare(arguments)[0], dense[0])
    mixed = compare([laid_out(x, True), bias, residual, upstream])
    assert torch.equal(mixed[0], dense[0]) and mixed[0].stride() == laid_out(x, True).stride()


@pytest.mark.fuzz(interpreted=8, gpu=60)
def test_bias_residual_random_settings(seed, device):
    """Random sizes and settings match the reference."""
    rng = random.Random(seed)
    max_side = 6 if INTERPRETED else 60
    shape = (
        rng.randint(1, 3),
        rng.randint(1, 8 * max_side),
        *(rng.randint(1, max_side) for _ in range(rng.randint(0, 2))),
    )
    dtype = rng.choice([torch.float32, torch.float16])
    compare(inputs(shape, device, last=seed % 2 == 1, dtype=dtype, seed=seed))


def test_bias_residual_opcheck(device):
    """Schema, fake tensors and autograd registration fit what the operator does."""
    for last in (False, True):
        leaves = [tensor.requires_grad_() for tensor in inputs((1, 4, 5, 5), device, last=last)[:3]]
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(bias_residual_module._bias_residual.custom, tuple(leaves), test_utils=checks)


def test_bias_residual_refuses_fp64(device):
    """The kernels refuse fp64, which only the reference computes in."""
    x, bias, residual, _ = inputs((1, 4, 3, 3), device, dtype=torch.float64)
    with pytest.raises(TypeError, match="x is float64, which the kernels do not compute in"):
        bias_residual(x, bias, residual)


@pytest.mark.full_size("33 million elements a tensor")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("side", "channels", "images"), [(512, 128, 1), (64, 320, 2), (32, 640, 2), (8, 1280, 2)])
def test_bias_residual_stable_diffusion_sizes(side, channels, images, last, device, deterministic):
    """The sizes of Stable Diffusion match the reference."""
    compare(inputs((images, channels, side, side), device, last=last, dtype=torch.float16))


@pytest.mark.full_size("host synchronisations, graphs and streams exist only there")
def test_bias_residual_stream_and_graph(device, everywhere):
    """Results are the same on another stream and from a CUDA graph, without a synchronisation."""
    tensors = inputs((2, 320, 64, 64), device, last=True, dtype=torch.float16)
    expected, repeats = everywhere(lambda: run(bias_residual, tensors))
    for repeat in repeats:
        assert all(torch.equal(a, b) for a, b in zip(expected, repeat, strict=True))


@pytest.mark.full_size("compiled code runs only there")
@pytest.mark.parametrize("last", [False, True])
def test_bias_residual_compiled(last, device, compare_compiled):
    """Compiled code is as accurate as eager code."""
    *tensors, upstream = inputs((2, 320, 8, 8), device, last=last)

    def loss(operator, x, bias, residual):
        return (operator(2 * x, bias.square(), residual) * upstream).sum()

    compare_compiled(loss, bias_residual, bias_residual_reference, tensors)


@pytest.mark.full_size("9 GB")
@pytest.mark.parametrize("last", [False, True])
def test_bias_residual_beyond_int32(last, device):
    """Elements past 2^31 come out as they do alone."""
    shape = (130, 64, 512, 512)
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.ones(shape, dtype=torch.float16, device=device).contiguous(memory_format=order)
    x[-1] = torch.randn(shape[1:], device=device).half()
    bias = torch.randn(64, device=device).half()
    got = bias_residual(x, bias, x)
    assert torch.equal(got[-1:], bias_residual_reference(x[-1:].float(), bias.float(), x[-1:].float()).half())
