"""Group normalisation with SiLU: against the formula and torch's modules, gradients in fp64, layouts, complaints."""

import math

import pytest
import torch
import torch.nn.functional as F

from dream_fast.bench.accuracy import check, check_fp64
from dream_fast.kernels import group_norm_silu
from dream_fast.kernels.nn import group_norm_silu as group_norm_module


def inputs(shape=(2, 6, 3, 5), dtype=torch.float64, seed=0):
    """x, weight, bias"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=dtype) * 2 + 0.5
    return x, *(torch.randn(shape[1], generator=generator, dtype=dtype) for _ in range(2))


def by_hand(x, groups, weight, bias, eps, silu):
    """Group by group, with Python numbers."""
    out = torch.empty_like(x)
    width = x.shape[1] // groups
    for image in range(x.shape[0]):
        for group in range(groups):
            part = slice(group * width, (group + 1) * width)
            values = x[image, part].flatten().tolist()
            mean = sum(values) / len(values)
            rstd = 1 / math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) + eps)
            for channel in range(part.start, part.stop):
                z = (x[image, channel] - mean) * rstd * float(weight[channel]) + float(bias[channel])
                out[image, channel] = z / (1 + torch.exp(-z)) if silu else z
    return out


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (1, 6), (3, 6, 4), (1, 6, 2, 3, 2)])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_definition(shape, groups, silu):
    """Results match the definition, written out with loops."""
    x, weight, bias = inputs(shape)
    got = group_norm_silu(x, groups, weight, bias, 0.1, silu)
    check_fp64("output", got, by_hand(x, groups, weight, bias, 0.1, silu))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_group_norm_matches_torch(dtype):
    """Results equal those of torch.nn.GroupNorm and SiLU."""
    x, weight, bias = inputs((2, 32, 5, 7), dtype)
    norm = torch.nn.GroupNorm(8, 32, eps=1e-6, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(weight), norm.bias.copy_(bias)
    assert torch.equal(group_norm_silu(x, 8, norm.weight, norm.bias, 1e-6), F.silu(norm(x)))
    assert torch.equal(group_norm_silu(x, 8, norm.weight, norm.bias, 1e-6, silu=False), norm(x))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(2, 6, 2, 2), (1, 6, 3)])
def test_group_norm_gradients(shape, silu):
    """Gradients match finite differences in fp64."""
    leaves = [leaf.requires_grad_() for leaf in inputs(shape)]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm_silu(x, 2, w, b, 1e-2, silu), leaves)


def test_group_norm_added():
    """`added` is added before the norm, with gradients."""
    x, weight, bias = inputs()
    added = torch.randn(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = group_norm_silu(x + added[:, :, None, None], 3, weight, bias)
    check_fp64("output", group_norm_silu(x, 3, weight, bias, added=added), expected)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias, added)]
    assert torch.autograd.gradcheck(lambda x, w, b, a: group_norm_silu(x, 2, w, b, 1e-2, added=a), leaves)


def test_group_norm_gradient_formula():
    """The gradient of x matches its closed form."""
    x, weight, bias = inputs((2, 6, 3, 5))
    x.requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(group_norm_silu(x, 3, weight, bias), x, upstream)
    groups = x.detach().reshape(2, 3, -1)
    rstd = (groups.var(2, correction=0, keepdim=True) + 1e-5).rsqrt()
    normed = (groups - groups.mean(2, keepdim=True)) * rstd
    w, b = (tensor[:, None, None].expand(6, 3, 5).reshape(3, -1) for tensor in (weight, bias))
    z = normed * w + b
    sigmoid = torch.sigmoid(z)
    e = w * upstream.reshape(2, 3, -1) * sigmoid * (1 + z * (1 - sigmoid))
    expected = rstd * (e - e.mean(2, keepdim=True) - normed * (e * normed).mean(2, keepdim=True))
    check_fp64("gradient", grad, expected.reshape(x.shape))


def test_group_norm_memory_format():
    """The output has the memory format of x."""
    x, weight, bias = inputs((2, 6, 3, 5), torch.float32)
    last = x.to(memory_format=torch.channels_last)
    out = group_norm_silu(last, 2, weight, bias)
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = group_norm_silu(x.double(), 2, weight.double(), bias.double())
    check("output", out, group_norm_silu(x, 2, weight, bias), exact)


@pytest.mark.parametrize("shape", [(0, 6, 3, 5), (2, 6, 0, 5), (2, 0, 3, 5)])
def test_group_norm_empty(shape):
    """Empty inputs give empty or zero results and gradients."""
    leaves = [leaf.requires_grad_() for leaf in inputs(shape)]
    out = group_norm_silu(leaves[0], 2, *leaves[1:])
    assert out.shape == shape
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves] and not any(grad.any() for grad in grads)


def test_group_norm_one_element():
    """A group of one element gives its bias."""
    x, weight, bias = inputs((1, 4, 1, 1))
    got = group_norm_silu(x, 4, weight, bias, silu=False)
    check_fp64("output", got.flatten(), bias)


def test_group_norm_bad_arguments():
    """Errors name the argument and both values."""
    x, weight, bias = inputs()
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        group_norm_silu([1.0], 2, weight, bias)
    with pytest.raises(ValueError, match=r"x must have shape \[N, C, ...\], got \[6\]"):
        group_norm_silu(weight, 2, weight, bias)
    with pytest.raises(TypeError, match="x must be float16 or bfloat16 or float32 or float64, got int64"):
        group_norm_silu(x.long(), 2, weight, bias)
    for groups in (4, 0, -1):
        with pytest.raises(ValueError, match=f"groups must divide the 6 channels of x, got {groups}"):
            group_norm_silu(x, groups, weight, bias)
    with pytest.raises(ValueError, match=r"weight must have shape \[6\], got \[5\]"):
        group_norm_silu(x, 2, weight[:5], bias)
    with pytest.raises(TypeError, match="bias must be float64, got float32"):
        group_norm_silu(x, 2, weight, bias.float())
    with pytest.raises(ValueError, match=r"added must have shape \[2, 6\], got \[6\]"):
        group_norm_silu(x, 2, weight, bias, added=bias)
    with pytest.raises(ValueError, match="weight is on meta but x is on cpu"):
        group_norm_silu(x, 2, weight.to("meta"), bias)
    with pytest.raises(ValueError, match="eps must be greater than 0, got 0"):
        group_norm_silu(x, 2, weight, bias, 0)


# Height = width, channels and images of Stable Diffusion's encoder and UNet, and some odd ones.
SIZES = [(512, 128, 1), (256, 256, 1), (64, 512, 1), (64, 320, 2), (64, 960, 2), (32, 640, 2), (8, 2560, 2), (7, 96, 3)]


@pytest.mark.parametrize(("side", "channels", "images"), SIZES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_config(side, channels, images, channels_last):
    """Tiles cover every element, fit into registers and read long runs of memory."""
    width, places = channels // 32, side * side
    config = group_norm_module._group_norm_silu_config(images, 32, width, places, channels_last)
    elements = config.rows * config.groups * config.width
    assert elements <= 32 * 32 * config.num_warps or elements < 1024  # at most 32 elements a lane
    if config.whole:
        assert config.rows >= places and config.width >= width
        return
    assert config.row_tiles * config.rows >= places > (config.row_tiles - 1) * config.rows
    assert config.row_parts * config.chunk >= places > (config.row_parts - 1) * config.chunk
    assert config.chunk % config.sum_rows == 0 and config.blocks * config.groups >= 32
    programs = images * config.blocks * config.parts
    assert programs <= group_norm_module._PROGRAMS or config.row_parts == 1  # all run at once
    columns = config.parts // config.row_parts
    assert columns * config.width >= width > (columns - 1) * config.width
    if channels_last:  # a row of a tile is a long run of memory
        assert min(width, config.width) * config.groups >= 64
