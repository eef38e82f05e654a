"""Compositing: against a loop, fp64 gradients of all four outputs, the stop, padding, long buffers."""

import math

import pytest
import torch

from dream_fast.bench.accuracy import check, check_fp64
from dream_fast.kernels import composite

LENGTHS = (3, 0, 1, 7, 0, 40, 2)


def inputs(lengths=LENGTHS, padding=0, channels=3, dtype=torch.float64, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    cap = sum(lengths) + padding
    sigma = torch.rand(cap, generator=generator, dtype=dtype) * scale
    values = torch.rand(cap, channels, generator=generator, dtype=dtype)
    dt = torch.rand(cap, generator=generator, dtype=dtype) * 0.2 + 0.05
    t = dt.cumsum(0)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return sigma, values, t, dt, offsets


def by_hand(sigma, values, t, dt, offsets, stop):
    """Composite ray by ray and sample by sample, with Python numbers."""
    rays, channels = len(offsets) - 1, values.shape[1]
    out, opacity, depth = torch.zeros(rays, channels).double(), torch.zeros(rays).double(), torch.zeros(rays).double()
    weights = torch.zeros(len(sigma)).double()
    for ray in range(rays):
        transmittance = 1.0
        for i in range(int(offsets[ray]), int(offsets[ray + 1])):
            if transmittance < stop:
                break
            alpha = 1 - math.exp(-float(sigma[i]) * float(dt[i]))
            weights[i] = transmittance * alpha
            out[ray] += weights[i] * values[i].double()
            opacity[ray] += weights[i]
            depth[ray] += weights[i] * float(t[i])
            transmittance *= 1 - alpha
    return out, opacity, depth, weights


@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("stop", [0.0, 1e-4, 0.3])
def test_composite_definition(channels, stop):
    """Results match the definition, written out with loops."""
    arguments = inputs(channels=channels, scale=10.0)
    for got, expected in zip(composite(*arguments, stop=stop), by_hand(*arguments, stop), strict=True):
        check_fp64("output", got, expected)


def test_composite_opaque_sample():
    """A sample of any density is opaque, and takes nothing from the rays behind it in the buffer."""
    sigma, *rest = inputs(lengths=(3, 7, 40))
    sigma[1] = 1e30
    for got, expected in zip(composite(sigma, *rest), by_hand(sigma, *rest, 1e-4), strict=True):
        check_fp64("output", got, expected)


@pytest.mark.parametrize("stop", [0.0, 0.3])
@pytest.mark.parametrize("output", range(4))
def test_composite_gradients(stop, output):
    """Gradients match finite differences in fp64."""
    sigma, values, t, dt, offsets = inputs(lengths=(3, 0, 5, 1), channels=2, padding=2)
    sigma.requires_grad_(), values.requires_grad_()
    function = lambda s, v: composite(s, v, t, dt, offsets, stop=stop)[output]  # noqa: E731
    assert torch.autograd.gradcheck(function, (sigma, values))


def test_composite_weight_gradient():
    """dL/dsigma_i = dt_i (g_i T_{i+1} - sum_{j>i} g_j w_j) for a gradient g that differs from sample to sample."""
    sigma, values, t, dt, offsets = inputs(lengths=(6,))
    sigma.requires_grad_()
    upstream = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = composite(sigma, values, t, dt, offsets, stop=0).weights
    weights.backward(upstream)
    after = torch.exp(-(sigma * dt).cumsum(0))
    weighted = (upstream * weights).detach()
    expected = [dt[i] * (upstream[i] * after[i] - weighted[i + 1 :].sum()) for i in range(6)]
    check_fp64("gradient of sigma", sigma.grad, torch.stack(expected).detach())


def test_composite_no_gradient_behind_stop():
    """Samples behind the end of a ray have no gradient, all others have one."""
    sigma, values, t, dt, offsets = inputs(lengths=(40,), scale=20.0)
    sigma.requires_grad_()
    out = composite(sigma, values, t, dt, offsets, stop=1e-2)
    ended = out.weights == 0
    assert 0 < int(ended.sum()) < 40
    (out.values.sum() + out.opacity.sum() + out.depth.sum()).backward()
    assert torch.equal(sigma.grad == 0, ended)


def test_composite_padding():
    """NaN in padding rows changes neither results nor gradients."""
    clean = inputs(padding=0)
    sigma, values, t, dt, offsets = inputs(padding=9)
    count = int(offsets[-1])
    for tensor, source in zip((sigma, values, t, dt), clean[:4], strict=True):
        tensor[:count] = source
        tensor[count:] = math.nan
    sigma.requires_grad_(), values.requires_grad_()
    out = composite(sigma, values, t, dt, offsets, count=torch.tensor(count))
    expected = composite(*clean)
    for got, reference in zip(out[:3], expected[:3], strict=True):
        assert torch.equal(got, reference)
    assert torch.equal(out.weights, torch.cat([expected.weights, torch.zeros(9, dtype=torch.float64)]))
    (out.values.sum() + out.opacity.sum() + out.depth.sum() + out.weights.sum()).backward()
    assert torch.isfinite(sigma.grad).all() and not sigma.grad[count:].any() and not values.grad[count:].any()


def test_composite_count():
    """Rows from `count` on do not count."""
    sigma, values, t, dt, offsets = inputs(lengths=(4, 4))
    out = composite(sigma, values, t, dt, offsets, count=torch.tensor(6))
    expected = composite(sigma[:6], values[:6], t[:6], dt[:6], offsets.clamp(max=6))
    assert torch.equal(out.values, expected.values) and torch.equal(out.weights[:6], expected.weights)
    assert not out.weights[6:].any()


def test_composite_empty():
    """Empty inputs give empty or zero results and gradients."""
    sigma, values, t, dt, offsets = inputs(lengths=(0, 0), padding=3)
    sigma.requires_grad_(), values.requires_grad_()
    out = composite(sigma, values, t, dt, offsets)
    assert out.values.shape == (2, 3) and not out.values.any() and not out.weights.any() and out.weights.shape == (3,)
    (out.values.sum() + out.weights.sum()).backward()
    assert not sigma.grad.any()
    out = composite(*inputs(lengths=()))
    assert out.values.shape == (0, 3) and out.opacity.shape == (0,)


def test_composite_long_buffer():
    """An optical depth of 1e9 in front of thin rays does not blur them: they are as accurate as alone."""
    thick, thin, rays = 200, 50, 100
    density = (1e-3 * (1 + torch.arange(rays) / rays)).repeat_interleave(thin)
    sigma = torch.cat([torch.full((thick,), 1e8), density])
    dt = torch.full_like(sigma, 0.05)
    offsets = thick + thin * torch.arange(rays + 1)
    out = composite(sigma, torch.ones_like(sigma)[:, None], dt, dt, torch.cat([torch.zeros(1).long(), offsets]))
    alone = composite(density, torch.ones_like(density)[:, None], dt[thick:], dt[thick:], offsets - thick)
    depth = (density.double() * dt[thick:].double()).view(rays, thin).sum(1)
    check("opacity", out.opacity[1:], alone.opacity, -torch.expm1(-depth))
    assert float(out.opacity[0]) == 1.0


def test_composite_repeats():
    """Repeats are equal bit for bit."""
    sigma, values, t, dt, offsets = inputs(lengths=(50,) * 200, dtype=torch.float32)
    grads = []
    for _ in range(2):
        leaf, colours = sigma.clone().requires_grad_(), values.clone().requires_grad_()
        out = composite(leaf, colours, t, dt, offsets)
        (out.values.square().sum() + out.depth.sum() + out.weights.square().sum()).backward()
        grads.append((leaf.grad, colours.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_composite_bad_arguments():
    """Errors name the argument and both values."""
    sigma, values, t, dt, offsets = inputs()
    with pytest.raises(ValueError, match=rf"values must have shape \[{len(sigma)}, C\], got \[4, 3\]"):
        composite(sigma, values[:4], t, dt, offsets)
    with pytest.raises(TypeError, match="offsets must be int64, got int32"):
        composite(sigma, values, t, dt, offsets.int())
    with pytest.raises(ValueError, match=r"stop must be in \[0, 1\), got 1.5"):
        composite(sigma, values, t, dt, offsets, stop=1.5)
