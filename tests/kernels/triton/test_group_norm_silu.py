"""Kernels of group normalisation: output, gradients against fp64, both layouts, ragged tiles, one part or many."""

import math
import random

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.kernels import group_norm_silu, group_norm_silu_reference
from dream_fast.kernels._core.launch import INTERPRETED
from dream_fast.kernels.nn import group_norm_silu as group_norm_module

# Masked exponentials may overflow, of which the interpreter's numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
NAMES = ("output", "gradient of x", "gradient of weight", "gradient of bias", "gradient of added")


@pytest.fixture
def tiles(monkeypatch):
    """tiles(elements of a tile, programs that add up, parts that a tile merges itself): no group stays whole."""

    def use(tile, programs, merge):
        for name, value in {"_TILE": tile, "_PROGRAMS": programs, "_WHOLE": 0, "_MERGE": merge}.items():
            monkeypatch.setattr(group_norm_module, name, value)

    return use


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def inputs(shape, device, *, last=False, dtype=torch.float32, offset=0.5, seed=0):
    """x, weight, bias, gradient of the output"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2 + offset
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    upstream = torch.randn(shape, generator=generator)
    order = channels_last if last else torch.clone
    return [tensor.to(device, dtype) for tensor in (order(x), weight, bias, order(upstream))]


def with_added(tensors, seed=0):
    """The same, with `added` before the upstream gradient."""
    *leaves, upstream = tensors
    added = torch.randn(leaves[0].shape[:2], generator=torch.Generator().manual_seed(100 + seed)) * 3
    return [*leaves, added.to(upstream), upstream]


def run(operator, tensors, groups, eps=1e-5, silu=True):
    """Return the output and the gradients of x, weight, bias and, if it is given, added."""
    *leaves, upstream = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x, weight, bias, *added = leaves
    out = operator(x, groups, weight, bias, eps, silu, *added)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def compare(tensors, groups, **options):
    """Check output and gradients against fp64; errors may be as large as the reference's. The layout is that of x."""
    got = run(group_norm_silu, tensors, groups, **options)
    # Contiguous: with channels last torch's own sums of squares on a CPU are less exact.
    single = run(group_norm_silu_reference, [tensor.contiguous() for tensor in tensors], groups, **options)
    exact = run(group_norm_silu_reference, [tensor.double() for tensor in tensors], groups, **options)
    for name, value, reference, truth in zip(NAMES[: len(got)], got, single, exact, strict=True):
        assert value.dtype == reference.dtype
        # The mean of a group is subtracted: with one channel a group the gradient of added is 0 but for rounding.
        if name != NAMES[-1] or groups < tensors[0].shape[1]:
            check(name, value, reference, truth)
    x = tensors[0]
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        assert got[0].stride() == got[1].stride() == x.stride()
    return got


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 1, 1), 1), ((3, 4), 2), ((1, 6, 9), 1), ((2, 12, 5, 7), 4), ((1, 40, 3, 3), 2)]
)
def test_group_norm_small_shapes(shape, groups, last, device, deterministic):
    """Shapes around one element and one block, and none at all, match the reference."""
    compare(inputs(shape, device, last=last), groups)
    compare(with_added(inputs(shape, device, last=last)), groups)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("programs", "merge"), [(1000, 0), (4, 1024)])  # a tile a part, and several
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 12, 5, 3), 4),  # nothing divides anything
        ((1, 8, 8, 6), 8),  # one channel a group
        ((1, 16, 4, 4), 1),  # all channels a group
        ((1, 6, 65), 2),  # one past a tile
        ((1, 20, 2, 3), 2),  # more columns than rows
    ],
)
def test_group_norm_parts(shape, groups, programs, merge, last, device, tiles, deterministic):
    """Groups that are cut into parts match the reference."""
    tiles(64 if merge else 32, programs, merge)
    compare(inputs(shape, device, last=last), groups)
    compare(with_added(inputs(shape, device, last=last)), groups)


def test_group_norm_many_parts_in_tile(device, tiles, deterministic):
    """More parts than a tile merges at a time match the reference."""
    tiles(32, 1000, 10**6)
    assert group_norm_module._group_norm_silu_config(1, 32, 1, 37, True).parts * 32 > 1024
    compare(inputs((1, 32, 37), device, last=True), 32)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(0, 6, 3, 5), (2, 6, 0, 5), (2, 0, 3, 5)])
def test_group_norm_empty(shape, last, device):
    """Empty inputs give empty or zero results and gradients."""
    got = run(group_norm_silu, inputs(shape, device, last=last), 2)
    assert [tuple(tensor.shape) for tensor in got] == [shape, shape, shape[1:2], shape[1:2]]
    assert not any(tensor.any() for tensor in got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_half_precision(dtype, silu, device, tiles):
    """16-bit inputs match the reference."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts digits off where bfloat16 is to be rounded")
    for last in (False, True):
        compare(inputs((2, 12, 5, 7), device, dtype=dtype, last=last), 4, silu=silu)
    tiles(64, 4, 1024)
    compare(inputs((2, 12, 5, 7), device, dtype=dtype), 4, silu=silu)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("parts", [False, True])
def test_group_norm_far_from_zero(parts, last, device, tiles):
    """A mean of 1000 at a spread of 2: the mean of squares less the square of the mean would leave three digits."""
    if parts:
        tiles(64, 4, 1024)
    tensors = inputs((1, 16, 7, 7), device, last=last, offset=1000.0)
    compare(tensors, 4)
    x, weight, bias, upstream = tensors
    compare([x, weight, bias, torch.full((1, 16), -1000.0, device=device), upstream], 4)  # and brought back


@pytest.mark.parametrize("parts", [False, True])
def test_group_norm_no_spread(parts, device, tiles):
    """Equal numbers in a group, and steps between parts, so that all the spread is between them."""
    if parts:
        tiles(64, 1000, 1024)
    x, weight, bias, upstream = inputs((1, 4, 16, 16), device)
    x[:, :2] = 3.1
    x[:, 2:] = torch.arange(16, device=device)[:, None].float() * 100
    compare([x, weight, bias, upstream], 2)


@pytest.mark.fuzz(interpreted=8, gpu=40)
def test_group_norm_random_settings(seed, device, tiles):
    """Random sizes and settings match the reference."""
    rng = random.Random(seed)
    if INTERPRETED or rng.random() < 0.3:
        tiles(2 ** rng.randint(5, 8), rng.choice([1, 4, 1000]), rng.choice([0, 8, 1024]))
    groups, width = rng.choice([1, 2, 3, 8, 32]), rng.choice([1, 2, 3, 4, 5, 8, 10])
    max_places = 150 // (groups * width) + 2 if INTERPRETED else 40_000 // (groups * width) + 2
    shape = (rng.randint(1, 2), groups * width, *(rng.randint(1, math.isqrt(max_places) + 1) for _ in range(2)))
    dtype = rng.choice([torch.float32, torch.float16])
    tensors = inputs(shape, device, last=seed % 2 == 1, dtype=dtype, offset=rng.uniform(-5, 5), seed=seed)
    if rng.random() < 0.5:
        tensors = with_added(tensors, seed)
    compare(tensors, groups, eps=10 ** rng.uniform(-6, -1), silu=rng.random() < 0.7)


def test_group_norm_nan(device, tiles):
    """A NaN shows in its group and in no other."""
    tiles(32, 4, 1024)
    for last in (False, True):
        tensors = inputs((2, 8, 5, 5), device, last=last)
        tensors[0][1, 3, 2, 2] = math.nan
        out, grad, *_ = run(group_norm_silu, tensors, 4)
        group = slice(2, 4)
        for result in (out, grad):
            assert torch.isnan(result[1, group]).all()
            assert torch.isfinite(result[0]).all()
            assert torch.isfinite(result[1, :2]).all() and torch.isfinite(result[1, 4:]).all()


@pytest.mark.parametrize("parts", [False, True])
def test_group_norm_non_contiguous(parts, device, tiles):
    """Strided inputs give the results of contiguous ones."""
    if parts:
        tiles(64, 4, 1024)
    x, weight, bias, upstream = inputs((1, 12, 4, 4), device)
    strided = torch.stack([x, x + 1], -1)[..., 0]
    wide = torch.stack([weight, bias], 1)
    strided_results = compare([strided, wide[:, 0], wide[:, 1], channels_last(upstream)], 4)
    dense = compare([x, weight, bias, upstream], 4)
    assert all(torch.equal(a, b) for a, b in zip(strided_results, dense, strict=True))
    # An expanded upstream gradient.
    compare([x, weight, bias, torch.ones((), device=device).expand(x.shape)], 4)
    # Tokens [N, S, C] as attention turns them to [N, C, S].
    tokens = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
    compare([tokens, weight, bias, upstream.flatten(2)], 4)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_group_norm_needed_gradients(needed, device, tiles, deterministic):
    """Only the gradients that are needed are computed, with the same values."""
    tiles(64, 4, 1024)
    *tensors, upstream = inputs((2, 12, 5, 5), device)
    expected = run(group_norm_silu, [*tensors, upstream], 4)[1:]
    leaves = [tensor.detach().requires_grad_(number in needed) for number, tensor in enumerate(tensors)]
    group_norm_silu(leaves[0], 4, *leaves[1:]).backward(upstream)
    for number, (leaf, grad) in enumerate(zip(leaves, expected, strict=True)):
        assert torch.equal(leaf.grad, grad) if number in needed else leaf.grad is None


def test_group_norm_repeats(device, tiles, deterministic):
    """Repeats are equal bit for bit."""
    if INTERPRETED:
        tiles(64, 4, 0)
    shape = (1, 12, 5, 5) if INTERPRETED else (2, 96, 150, 150)
    for last in (False, True):
        tensors = inputs(shape, device, last=last, dtype=torch.float16)
        results = [run(group_norm_silu, tensors, 4) for _ in range(3 if INTERPRETED else 10)]
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("has_added", [False, True])
def test_group_norm_opcheck(has_added, device, tiles):
    """Schema, fake tensors and autograd registration fit what the operators do."""
    tiles(64, 4, 1024)
    for last in (False, True):
        tensors = inputs((1, 4, 5, 5), device, last=last)
        *leaves, upstream = with_added(tensors) if has_added else tensors
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        x, weight, bias, *added = (tensor.requires_grad_() for tensor in leaves)
        added = added[0] if has_added else None
        arguments = (x, 2, weight, bias, 1e-5, True, added)
        torch.library.opcheck(group_norm_module._group_norm_silu.custom, arguments, test_utils=checks)
        x, weight, bias, added = (None if tensor is None else tensor.detach() for tensor in (x, weight, bias, added))
        _, moments = group_norm_module._group_norm_silu(x, 2, weight, bias, 1e-5, True, added)
        for needs_channels in (True, False):
            torch.library.opcheck(
                group_norm_module._group_norm_silu_backward.custom,
                (upstream, x, weight, bias, added, moments, True, needs_channels),
                test_utils=checks[:2],
            )


def test_group_norm_refuses_second_order(device):
    """A second derivative raises instead of being wrong."""
    x, weight, bias, upstream = inputs((1, 4, 3, 3), device)
    out = group_norm_silu(x.requires_grad_(), 2, weight, bias)
    (grad,) = torch.autograd.grad(out, x, upstream.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_group_norm_refuses_fp64(device):
    """The kernels refuse fp64, which only the reference computes in."""
    x, weight, bias, _ = inputs((1, 4, 3, 3), device, dtype=torch.float64)
    with pytest.raises(TypeError, match="x is float64, which the kernels do not compute in"):
        group_norm_silu(x, 2, weight, bias)


# Height = width, channels and images of Stable Diffusion's encoder and UNet.
SIZES = [(512, 128, 1), (256, 256, 1), (128, 512, 1), (64, 512, 1), (64, 320, 2), (64, 960, 2), (32, 640, 2)]
SIZES += [(32, 1920, 2), (16, 1280, 2), (16, 2560, 2), (8, 1280, 2), (8, 2560, 2)]


# Other dtypes with a group of many programs, of some, and of one.
SIZED = [(*size, torch.float16) for size in SIZES]
SIZED += [(*size, dtype) for size in (SIZES[0], SIZES[4], SIZES[8]) for dtype in (torch.bfloat16, torch.float32)]


@pytest.mark.full_size("33 million elements a tensor")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("side", "channels", "images", "dtype"), SIZED)
def test_group_norm_stable_diffusion_sizes(side, channels, images, dtype, last, device, deterministic):
    """The sizes of Stable Diffusion match the reference."""
    tensors = inputs((images, channels, side, side), device, last=last, dtype=dtype)
    compare(with_added(tensors) if last else tensors, 32)


@pytest.mark.full_size("4096 parts of 8192 elements")
def test_group_norm_many_parts_in_kernel(device, monkeypatch, deterministic):
    """More parts than the merging kernel takes at a time match the reference."""
    monkeypatch.setattr(group_norm_module, "_PROGRAMS", 4096)
    assert group_norm_module._group_norm_silu_config(1, 32, 4, 512 * 512, True).parts == 4096
    compare(inputs((1, 128, 512, 512), device, last=True, dtype=torch.float16), 32)


@pytest.mark.full_size("host synchronisations, graphs and streams exist only there")
@pytest.mark.parametrize("shape", [(1, 128, 256, 256), (2, 320, 64, 64), (2, 1280, 16, 16)])
@pytest.mark.parametrize("last", [False, True])
def test_group_norm_stream_and_graph(shape, last, device, everywhere):
    """Results are the same on another stream and from a CUDA graph, without a synchronisation."""
    tensors = inputs(shape, device, last=last, dtype=torch.float16)
    expected, repeats = everywhere(lambda: run(group_norm_silu, tensors, 32))
    for repeat in repeats:
        assert all(torch.equal(a, b) for a, b in zip(expected, repeat, strict=True))
    if torch.cuda.device_count() > 1:
        elsewhere = run(group_norm_silu, [tensor.to("cuda:1") for tensor in tensors], 32)
        assert all(
            b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, elsewhere, strict=True)
        )


@pytest.mark.full_size("compiled code runs only there")
@pytest.mark.parametrize("last", [False, True])
def test_group_norm_compiled(last, device, compare_compiled):
    """Compiled code is as accurate as eager code."""
    *tensors, upstream = inputs((2, 320, 64, 64), device, last=last)

    def loss(operator, x, weight, bias):
        out = operator(2 * x, 32, weight, bias.square(), silu=True)
        return (operator(out, 32, weight, bias, silu=False) * upstream).sum()

    compare_compiled(loss, group_norm_silu, group_norm_silu_reference, tensors)


@pytest.mark.full_size("13 GB of activations")
@pytest.mark.parametrize("last", [False, True])
def test_group_norm_beyond_int32(last, device, monkeypatch):
    """Elements past 2^31 come out as they do alone."""
    monkeypatch.setattr(group_norm_module, "_PROGRAMS", 10**9)  # the same parts, however many images
    shape = (130, 64, 512, 512)
    assert math.prod(shape) > 2**31
    order = torch.channels_last if last else torch.contiguous_format
    x, upstream = (
        torch.randn(shape, dtype=torch.float16, device=device).contiguous(memory_format=order) for _ in range(2)
    )
    weight, bias = (torch.randn(64, dtype=torch.float16, device=device) for _ in range(2))
    results = []
    for part in (slice(None), slice(129, None)):
        leaf = x[part].detach().requires_grad_()
        out = group_norm_silu(leaf, 32, weight, bias)
        (grad,) = torch.autograd.grad(out, leaf, upstream[part])
        results.append((out[-1].detach(), grad[-1]))
    for all_images, alone in zip(*results, strict=True):
        assert torch.equal(all_images, alone)
