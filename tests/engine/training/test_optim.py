"""The optimiser: against oracles, groups, average, skipped steps, loss scale, resume."""

import copy

import pytest
import pytorch_optimizer
import torch
from torch import nn

from dream_fast.bench.accuracy import check, check_together
from dream_fast.engine.config.sections import OptimConfig
from dream_fast.engine.training.optim import LossScaler, Optimizer


def make_parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((100, 2), (40, 3), (40,))]


def make(optim="adan", lr=1e-3, ema_decay=0.9):
    parameters = make_parameters()
    return parameters, Optimizer(parameters[0], parameters[1:], OptimConfig(optim=optim, lr=lr, ema_decay=ema_decay))


def run(parameters, optimizer, steps, start=0, scale=1.0, **options):
    skipped = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = sum((p * (step + 1 + i)).sin().sum() for i, p in enumerate(parameters))
        (loss * scale).backward()
        skipped.append(bool(optimizer.step(inverse_scale=1.0 / scale, **options)))
    return skipped


def oracle(optim, dtype, lr=1e-3, steps=6):
    parameters = make_parameters(dtype)
    if optim == "adan":
        base, make_optimizer = 5 * lr, pytorch_optimizer.Adan
        options = dict(betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=2e-5, weight_decouple=False)
    else:
        base, make_optimizer, options = lr, torch.optim.Adam, dict(betas=(0.9, 0.99), eps=1e-15)
    groups = [{"params": parameters[:1], "lr": 10 * base}, {"params": parameters[1:], "lr": base}]
    optimizer = make_optimizer(groups, lr=base, **options)
    for step in range(steps):
        optimizer.zero_grad()
        sum((p * (step + 1 + i)).sin().sum() for i, p in enumerate(parameters)).backward()
        if optim == "adan":
            nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
    return [parameter.data for parameter in parameters]


@pytest.mark.parametrize("optim", ["adan", "adam"])
def test_step_against_oracle(optim):
    """Six steps equal those of pytorch-optimizer's Adan and torch's Adam."""
    before = [parameter.data.double() for parameter in make_parameters()]
    reference, exact = (oracle(optim, dtype) for dtype in (torch.float32, torch.float64))
    for scale in (1.0, 1024.0):
        parameters, optimizer = make(optim)
        run(parameters, optimizer, 6, scale=scale)
        values = [parameter.data for parameter in parameters]
        changes = ([now - then for now, then in zip(one, before, strict=True)] for one in (values, reference, exact))
        check_together(f"scale {scale}", *changes)


def test_parameters_are_views_of_one_buffer():
    parameters, optimizer = make()
    run(parameters, optimizer, 2)
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in parameters]), optimizer.params)
    assert all(p.grad.data_ptr() >= optimizer.grads.data_ptr() for p in parameters)
    assert torch.equal(torch.cat([p.grad.reshape(-1) for p in parameters]), optimizer.grads)


@pytest.mark.parametrize("optim", ["adan", "adam"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("grad_clip", [-1.0, 0.5])
def test_a_bad_gradient_changes_nothing(optim, bad, grad_clip):
    parameters, optimizer = make(optim)
    run(parameters, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.grads[3] = bad
    assert bool(optimizer.step(grad_clip=grad_clip))
    for name, value in optimizer.state_dict().items():
        assert name == "steps" or torch.equal(value, before[name]), name
    assert run(parameters, optimizer, 1, start=2) == [False]
    assert optimizer.params.isfinite().all()


def test_grad_clip_unscaled():
    """The limit applies to the unscaled gradient."""
    parameters, optimizer = make("adam")
    optimizer.grads.fill_(64.0 * 3)
    optimizer.step(inverse_scale=1 / 64, grad_clip=0.25)
    exact = torch.full_like(optimizer.params, 0.1 * 0.25, dtype=torch.float64)
    check("first moment", optimizer.state.exp_avg, exact.float(), exact)


@pytest.mark.parametrize("optim", ["adan", "adam"])
def test_ema_warm_up(optim):
    """The average has a warm-up."""
    parameters, optimizer = make(optim, ema_decay=0.5)
    averages = [optimizer.params.clone(), optimizer.params.double()]
    for step in range(12):
        run(parameters, optimizer, 1, start=step)
        decay = min(0.5, (1 + step) / (10 + step))
        averages = [decay * average + (1 - decay) * optimizer.params for average in averages]
    trained = optimizer.params.clone()
    with optimizer.ema_weights():
        assert not torch.equal(optimizer.params, trained)
        check("average", torch.cat([parameter.data.reshape(-1) for parameter in parameters]), *averages)
    assert torch.equal(optimizer.params, trained)
    with pytest.raises(RuntimeError, match="inside"), optimizer.ema_weights():
        raise RuntimeError("inside")
    assert torch.equal(optimizer.params, trained)


@pytest.mark.parametrize("optim", ["adan", "adam"])
def test_resume_repeats(optim):
    """A resumed run is the same bit for bit."""
    parameters, optimizer = make(optim)
    run(parameters, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    run(parameters, optimizer, 3, start=3)
    again, resumed = make(optim)
    resumed.load_state_dict(saved)
    run(again, resumed, 3, start=3)
    for name, value in optimizer.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_load_other_state_raises():
    """A state of another optimiser or size is refused."""
    _, optimizer = make("adan")
    with pytest.raises(ValueError, match="expected"):
        optimizer.load_state_dict(make("adam")[1].state_dict())
    smaller = {name: value[:-1] if value.dim() else value for name, value in optimizer.state_dict().items()}
    with pytest.raises(ValueError, match="shape"):
        optimizer.load_state_dict(smaller)


def test_parameters_must_be_fp32():
    with pytest.raises(TypeError, match="float16"):
        Optimizer(nn.Parameter(torch.zeros(2, dtype=torch.float16)), [], OptimConfig())


def test_loss_scale_backs_off_and_grows():
    scaler = LossScaler(True, "cpu", start=1024.0, interval=3)
    good, bad = torch.tensor(False), torch.tensor(True)
    for found_inf, expected in [(good, 1024), (bad, 512), (good, 512), (good, 512), (good, 1024), (good, 1024)]:
        scaler.update(found_inf)
        assert scaler.scale == expected and scaler.inverse == 1 / expected
    other = LossScaler(True, "cpu")
    other.load_state_dict(scaler.state_dict())
    assert other.scale == 1024 and other.good_steps == 1


def test_disabled_loss_scale_stays_one():
    scaler = LossScaler(False, "cpu")
    scaler.update(torch.tensor(True))
    scaler.load_state_dict({"scale": torch.tensor(8.0), "good_steps": torch.tensor(1)})
    assert scaler.scale == 1
