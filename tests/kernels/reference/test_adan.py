"""The Adan step: against pytorch_optimizer's Adan, the loss scale, skipped steps, the average."""

import math

import pytest
import torch
from pytorch_optimizer import Adan

from dream_fast.bench.accuracy import check, check_fp64
from dream_fast.kernels import AdanState, adan_step

ENDS, LRS = (40, 100), (0.05, 0.005)


def start(seed=0):
    params = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    return params, AdanState.zeros(params)


def gradients(number, scale=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(100, generator=generator) for _ in range(number)]


def copy_of(params, state):
    return [params.clone(), *(value.clone() for value in vars(state).values())]


def oracle_step(params, max_grad_norm):
    """step(grads): the parameters after one more step of the published implementation, in the dtype of `params`."""
    groups = [torch.nn.Parameter(params[:40].clone()), torch.nn.Parameter(params[40:].clone())]
    oracle = Adan(
        [{"params": [p], "lr": lr} for p, lr in zip(groups, LRS, strict=True)],
        betas=(0.98, 0.92, 0.99),
        eps=1e-8,
        weight_decay=0.02,
        max_grad_norm=max_grad_norm,
    )

    def step(grads):
        groups[0].grad, groups[1].grad = (part.to(params.dtype, copy=True) for part in (grads[:40], grads[40:]))
        oracle.step()
        return torch.cat([p.detach() for p in groups])

    return step


@pytest.mark.parametrize("max_grad_norm", [0.0, 5.0])
def test_adan_matches_pytorch_optimizer(max_grad_norm):
    """Twenty steps match those of pytorch_optimizer."""
    params, state = start()
    oracles = [oracle_step(params.to(dtype), max_grad_norm) for dtype in (torch.float32, torch.float64)]
    for grads in gradients(20):
        adan_step(params, grads, state, group_ends=ENDS, lrs=LRS, weight_decay=0.02, max_grad_norm=max_grad_norm)
        check("parameters", params, *(step(grads) for step in oracles))
    assert float(state.step) == 20


def test_adan_clips_over_all_groups():
    """Gradients ten times over the limit take the same step as gradients at the limit."""
    results = []
    for scale in (1.0, 100.0):
        params, _ = start()
        params = params.double()
        state = AdanState.zeros(params)
        for grads in gradients(3):
            grads = grads.double()
            adan_step(params, scale * 50 * grads / grads.norm(), state, group_ends=ENDS, lrs=LRS)
        results.append(params)
        limit = torch.tensor(5.0, dtype=torch.float64)
        check_fp64("norm", state.previous_grad.double().norm(), limit)
    check_fp64("parameters", *results)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_adan_loss_scale(as_tensor):
    """A loss scale and its inverse cancel bit for bit."""
    results = []
    for scale in (1.0, 1024.0):
        params, state = start()
        inverse = torch.tensor(1 / scale) if as_tensor else 1 / scale
        for grads in gradients(5, 0.1):
            adan_step(params, scale * grads, state, group_ends=ENDS, lrs=LRS, inverse_scale=inverse)
        results.append(params)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_adan_non_finite_gradient(poison, steps_before):
    """A gradient that is not finite changes nothing, and later steps neither."""
    params, state = start()
    for grads in gradients(steps_before):
        assert not adan_step(params, grads, state, group_ends=ENDS, lrs=LRS)
    before = copy_of(params, state)
    bad = gradients(1)[0]
    bad[17] = poison
    skipped = adan_step(params, bad, state, group_ends=ENDS, lrs=LRS)
    assert skipped.dtype == torch.bool and skipped.shape == () and bool(skipped)
    assert all(torch.equal(one, other) for one, other in zip(before, copy_of(params, state), strict=True))
    good = gradients(1, seed=9)[0]
    other_params, other_state = start()
    for grads in [*gradients(steps_before), good]:
        adan_step(other_params, grads, other_state, group_ends=ENDS, lrs=LRS)
    assert not adan_step(params, good, state, group_ends=ENDS, lrs=LRS)
    assert torch.equal(params, other_params), "the skipped step left a trace"


def test_adan_keeps_gradients():
    """The gradients are not changed."""
    params, state = start()
    grads = gradients(1)[0]
    before = grads.clone()
    adan_step(params, grads, state, group_ends=ENDS, lrs=LRS, inverse_scale=0.5)
    assert torch.equal(grads, before)


def test_adan_ema():
    """The average follows its definition, for a decay as number and as tensor."""
    params = start()[0].double()
    state = AdanState.zeros(params)
    expected = params.clone()
    for step, grads in enumerate(gradients(6)):
        decay = (1 + step) / (10 + step)
        argument = torch.tensor(decay, dtype=torch.float64) if step % 2 else decay
        adan_step(params, grads.double(), state, group_ends=ENDS, lrs=LRS, ema_decay=argument)
        expected = decay * expected + (1 - decay) * params
        check_fp64("average", state.ema, expected)
    assert not torch.equal(state.ema, params)


def test_adan_zero_gradient():
    """Parameters without a gradient only decay."""
    params, state = start()
    first = params.clone()
    grads = gradients(1)[0]
    grads[:40] = 0
    adan_step(params, grads, state, group_ends=ENDS, lrs=LRS, weight_decay=0.0)
    assert torch.equal(params[:40], first[:40]) and not torch.equal(params[40:], first[40:])


def test_adan_bad_arguments():
    """Errors name the argument and both values."""
    params, state = start()
    grads = gradients(1)[0]
    with pytest.raises(ValueError, match=r"grads must have shape \[100\], got \[99\]"):
        adan_step(params, grads[:99], state, group_ends=ENDS, lrs=LRS)
    with pytest.raises(ValueError, match=r"group_ends must rise to 100, got \(40, 99\)"):
        adan_step(params, grads, state, group_ends=(40, 99), lrs=LRS)
    with pytest.raises(ValueError, match="group_ends and lrs must be as many, got 2 and 1"):
        adan_step(params, grads, state, group_ends=ENDS, lrs=(0.1,))
