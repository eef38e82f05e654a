"""The end of a residual block: the definition, gradients in fp64, layouts, complaints."""

import pytest
import torch

from dream_fast.bench.accuracy import check_fp64
from dream_fast.kernels import bias_residual


def inputs(shape=(2, 6, 3, 5), dtype=torch.float64):
    """x, bias, residual"""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape[1:2], shape)
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (3, 6), (1, 6, 4), (2, 6, 2, 3, 2)])
def test_bias_residual_definition(shape):
    """Results match the definition, written out with loops."""
    x, bias, residual = inputs(shape)
    got = bias_residual(x, bias, residual)
    for channel in range(6):
        expected = x[:, channel] + float(bias[channel]) + residual[:, channel]
        check_fp64("output", got[:, channel], expected)


def test_bias_residual_gradients():
    """Gradients match finite differences in fp64."""
    assert torch.autograd.gradcheck(bias_residual, [tensor.requires_grad_() for tensor in inputs()])


def test_bias_residual_memory_format():
    """The output has the memory format of x."""
    x, bias, residual = inputs()
    x, residual = (tensor.to(memory_format=torch.channels_last) for tensor in (x, residual))
    assert bias_residual(x, bias, residual).is_contiguous(memory_format=torch.channels_last)


def test_bias_residual_bad_arguments():
    """Errors name the argument and both values."""
    x, bias, residual = inputs()
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        bias_residual([1.0], bias, residual)
    with pytest.raises(ValueError, match=r"x must have shape \[N, C, ...\], got \[6\]"):
        bias_residual(bias, bias, residual)
    with pytest.raises(ValueError, match=r"bias must have shape \[6\], got \[5\]"):
        bias_residual(x, bias[:5], residual)
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 6, 3, 5\], got \[1, 6, 3, 5\]"):
        bias_residual(x, bias, residual[:1])
    with pytest.raises(TypeError, match="residual must be float64, got float32"):
        bias_residual(x, bias, residual.float())
    with pytest.raises(ValueError, match="bias is on meta but x is on cpu"):
        bias_residual(x, bias.to("meta"), residual)
