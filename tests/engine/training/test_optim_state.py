"""The optimiser's buffers, groups of learning rates and saved state."""

import copy

import pytest
import torch
from torch import nn

from dream_fast.bench.accuracy import check
from dream_fast.engine.config.sections import OptimConfig
from dream_fast.engine.training import optim
from dream_fast.engine.training.optim import AdamState, LossScaler, Optimizer, adam_step


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))))


def config(**changes):
    return OptimConfig(**({"optim": "adam", "lr": 1e-3, "ema_decay": 0.9} | changes))


@pytest.mark.parametrize(("optim", "factor"), [("adam", 1), ("adan", 5)])
@pytest.mark.parametrize(("shape_lr", "lr"), [(None, 1e-3), (2e-4, 2e-4)])
def test_groups(optim, factor, shape_lr, lr):
    """The table has ten times the rate, and the shape its own or --lr, with either optimiser."""
    table, others, shape = parameter(4, 2), [parameter(3), parameter(2, 5)], [parameter(6), parameter(1)]
    optimizer = Optimizer(table, others, config(optim=optim), shape, shape_lr)
    assert optimizer.group_ends == (8, 21, 28) and optimizer.scene == 21
    assert optimizer.lrs == (factor * 1e-3 * 10, factor * 1e-3, lr)
    without = Optimizer(None, others, config(optim=optim))
    assert without.group_ends == (13,) and without.lrs == (factor * 1e-3,) and without.scene == 13
    assert without.learning_rates() == {"network": factor * 1e-3}


def test_learning_rates(monkeypatch):
    """Logged rates are those of the update, group by group."""
    optimizer, used = Optimizer(parameter(4, 2), [parameter(3)], config(), [parameter(6)], 2e-4), []
    monkeypatch.setattr(optim, "adam_step", lambda *_, lrs, **__: used.append(lrs))
    optimizer.step(lr_scale=0.5)
    assert used == [tuple(optimizer.learning_rates(0.5).values())] == [(5e-3, 5e-4, 1e-4)]
    assert list(optimizer.learning_rates()) == ["table", "network", "shape"]


@pytest.mark.parametrize(("optim", "factor"), [("adam", 1), ("adan", 5)])
def test_level_learning_rates(optim, factor):
    """Levels learn the more slowly the finer they are, from the table's rate to its part; one level has the table's."""
    settings = config(optim=optim, lr=1e-2, lr_finest=0.25)
    optimizer = Optimizer(parameter(6, 2), [parameter(3)], settings, level_rows=(1, 3, 6))
    assert optimizer.group_ends == (2, 6, 12, 15)
    table, network = factor * 1e-1, factor * 1e-2
    assert optimizer.lrs == (table, table * 0.5, table * 0.25, network)
    assert list(optimizer.learning_rates()) == ["table_0", "table_1", "table_2", "network"]
    single = Optimizer(parameter(6, 2), [parameter(3)], settings, level_rows=(6,))
    assert single.lrs == (table, network) and list(single.learning_rates()) == ["table", "network"]
    assert Optimizer(parameter(6, 2), [], config(), level_rows=(1, 6)).group_ends == (12, 12)


def test_initial_buffers():
    """Values and shapes are kept; gradients are zero views in the order table, networks, shape."""
    parameters = [parameter(4, 2), parameter(3), parameter(2, 5)]
    before = [one.detach().clone() for one in parameters]
    optimizer = Optimizer(parameters[0], [parameters[1]], config(), [parameters[2]])
    for one, then in zip(parameters, before, strict=True):
        assert torch.equal(one, then) and torch.equal(one.grad, torch.zeros_like(then))
    assert torch.equal(optimizer.params, torch.cat([one.flatten() for one in before]))
    optimizer.grads.copy_(torch.arange(21.0))
    assert torch.equal(torch.cat([one.grad.flatten() for one in parameters]), optimizer.grads)
    optimizer.zero_grad()
    assert not optimizer.grads.any() and not parameters[2].grad.any()
    assert optimizer.steps == 0 and torch.equal(optimizer.state.ema, optimizer.params)


def test_step_by_group_rate():
    """Three groups and an `lr_scale` equal torch's Adam with these rates."""
    rates = (1e-2, 1e-3, 0.5)

    def changes(dtype):
        parts = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in (40, 50, 60)]
        adam = torch.optim.Adam(
            [{"params": [part], "lr": 0.25 * rate} for part, rate in zip(parts, rates, strict=True)],
            betas=(0.9, 0.99),
            eps=1e-15,
        )
        for step in range(3):
            for part in parts:
                part.grad = torch.linspace(-2, 3 + step, len(part), dtype=torch.float32).to(dtype)
            adam.step()
        return torch.cat([part.detach() - 1 for part in parts])

    parts = [nn.Parameter(torch.ones(size)) for size in (40, 50, 60)]
    optimizer = Optimizer(parts[0], [parts[1]], config(), [parts[2]], 0.5)
    for step in range(3):
        for part in parts:
            part.grad.copy_(torch.linspace(-2, 3 + step, len(part)))
        assert not optimizer.step(lr_scale=0.25)
    check("changes", optimizer.params - 1, changes(torch.float32), changes(torch.float64))


@pytest.mark.parametrize("scaling", [{}, {"inverse_scale": 0.5}, {"inverse_scale": torch.tensor(0.5)}])
def test_grad_clip_both_sides(scaling):
    """Components beyond the limit are clamped; a limit of 0 or less has no effect."""
    gradient = torch.tensor([-8.0, -0.25, 0.5, 8.0])
    scale = float(scaling.get("inverse_scale", 1.0))
    for clip, expected in ((1.0, gradient.mul(scale).clamp(-1, 1)), (0.0, gradient * scale), (-1.0, gradient * scale)):
        optimizer = Optimizer(None, [parameter(4)], config())
        optimizer.grads.copy_(gradient)
        optimizer.step(grad_clip=clip, **scaling)
        check("moment", optimizer.state.exp_avg, 0.1 * expected, expected.double() * 0.1)


def test_default_step():
    """By default the gradient is unscaled, with the rate of the settings."""
    optimizers = [Optimizer(None, [parameter(50)], config()) for _ in range(2)]
    for optimizer, options in zip(optimizers, ({}, dict(inverse_scale=1.0, grad_clip=-1.0, lr_scale=1.0)), strict=True):
        optimizer.grads.copy_(torch.linspace(-100, 100, 50))
        optimizer.step(**options)
    for name, value in optimizers[0].state_dict().items():
        assert torch.equal(value, optimizers[1].state_dict()[name]), name


def test_skipped_step_counts_for_warm_up():
    """`steps` counts attempts; Adam's count, moments and average are unchanged."""
    optimizer = Optimizer(None, [parameter(5)], config())
    optimizer.grads.fill_(1.0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.grads[2] = torch.inf
    assert optimizer.step()
    after = optimizer.state_dict()
    assert (before["steps"], after["steps"], after["step"]) == (1, 2, 1)
    assert all(torch.equal(after[name], before[name]) for name in before if name != "steps")


def test_skipped_first_step():
    """A skipped first step does not divide by zero."""
    optimizer = Optimizer(None, [parameter(5)], config())
    before = optimizer.params.clone()
    optimizer.grads.fill_(torch.nan)
    assert optimizer.step() and torch.equal(optimizer.params, before)
    assert torch.equal(optimizer.state.ema, before) and optimizer.state.step == 0


def test_start_scene():
    """The averaged scene of another run becomes the parameters and the average; the shape keeps its values."""
    shape = parameter(3, 1)
    optimizer = Optimizer(parameter(4, 2), [parameter(2)], config(), [shape])
    before, average = shape.detach().clone(), torch.arange(10.0)
    optimizer.start_scene(average)
    assert torch.equal(optimizer.params[:10], average) and torch.equal(shape, before)
    assert torch.equal(optimizer.state.ema, optimizer.params)
    for wrong in (torch.zeros(13), torch.zeros(9), torch.zeros(10, 1)):
        with pytest.raises(ValueError, match=rf"ema has shape \({wrong.shape[0]}, ?.*expected \(10,\)"):
            optimizer.start_scene(wrong)


def test_load_state_dict_in_place():
    """Parameters stay views, and the count of steps is restored as a number."""
    weight = parameter(6)
    optimizer = Optimizer(None, [weight], config())
    optimizer.grads.fill_(1.0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert optimizer.steps == 1 and isinstance(optimizer.steps, int)
    assert torch.equal(weight, saved["params"]) and weight.data_ptr() == optimizer.params.data_ptr()
    for name, value in optimizer.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_load_bad_state_raises():
    """The message has both lists of names, or both shapes; nothing is copied before all is checked."""
    optimizer = Optimizer(None, [parameter(6)], config())
    before = copy.deepcopy(optimizer.state_dict())
    more = {name: torch.ones_like(value) for name, value in before.items()}
    names = r"\['ema', 'exp_avg', 'exp_avg_sq', 'params', 'step', 'steps'\]"
    with pytest.raises(ValueError, match=rf"holds \['ema', 'step'\], expected {names}"):
        optimizer.load_state_dict({name: more[name] for name in ("step", "ema")})
    with pytest.raises(ValueError, match=r"ema has shape \(7,\), expected \(6,\)"):
        optimizer.load_state_dict(more | {"ema": torch.ones(7)})
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state_dict().items())


def test_adam_step_ema():
    """The average has the decay `ema_decay`; values beyond the last group are unchanged."""
    params = torch.arange(6.0)
    state = AdamState(params)
    skipped = adam_step(params, torch.ones(6), state, group_ends=(2, 4), lrs=(0.5, 0.25), ema_decay=0.75)
    exact = torch.arange(6.0).double() - torch.tensor([0.5, 0.5, 0.25, 0.25, 0, 0])
    check("params", params, exact.float(), exact)
    average = 0.75 * torch.arange(6.0).double() + 0.25 * exact
    check("average", state.ema, average.float(), average)
    check("moment", state.exp_avg, torch.full((6,), 0.1), torch.full((6,), 0.1).double())  # of a gradient of 1
    assert not skipped and skipped.dtype == torch.bool and state.step == 1


def test_loss_scaler_defaults():
    """Defaults and state of the loss scale."""
    scaler, good = LossScaler(True, "cpu"), torch.tensor(False)
    assert scaler.scale == 65536 and scaler.inverse == 2.0**-16 and scaler.good_steps == 0
    scaler.load_state_dict({"scale": torch.tensor(8.0), "good_steps": torch.tensor(1998)})
    scaler.update(good)
    assert (scaler.scale, scaler.good_steps) == (8, 1999)
    scaler.update(good)
    assert (scaler.scale, scaler.good_steps) == (16, 0)
    scaler.update(good)
    scaler.update(torch.tensor(True))
    assert scaler.state_dict() == {"scale": 8, "good_steps": 0}


def test_loss_scaler_disabled():
    """Its scale and inverse stay 1."""
    scaler = LossScaler(False, "cpu", start=4.0, interval=1)
    for found_inf in (False, True):
        scaler.update(torch.tensor(found_inf))
        assert scaler.state_dict() == {"scale": 1, "good_steps": 0} and scaler.inverse == 1
