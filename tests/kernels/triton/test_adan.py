"""Kernels of the Adan step: against the reference in fp64, skipped steps, groups, scalars, sizes."""

import copy
import math
import random

import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.kernels import AdanState, adan_step, adan_step_reference
from dream_fast.kernels._core.launch import INTERPRETED


def normal(size, seed, scale=1.0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def to(state, dtype, device=None):
    return AdanState(**{name: value.to(device=device, dtype=dtype, copy=True) for name, value in vars(state).items()})


def compare(size, device, *, steps=2, seed=0, scale=1.0, **options):
    """Check a few steps, each against the reference from the same state in fp32 and in fp64."""
    options = {"group_ends": (size,), "lrs": (0.01,), **options}
    params = normal(size, seed).to(device)
    state = AdanState.zeros(params)
    for step in range(steps):
        grads = normal(size, seed + step + 1, scale).to(device)
        references = {}
        for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
            p, s = params.to(dtype, copy=True), to(state, dtype)
            adan_step_reference(p, grads.to(dtype), s, **options)
            references[name] = {"params": p, **vars(s)}
        skipped = adan_step(params, grads, state, **options)
        assert skipped.dtype == torch.bool and skipped.shape == () and not bool(skipped)
        for name, value in {"params": params, **vars(state)}.items():
            check(f"{name} after step {step}", value, references["fp32"][name], references["fp64"][name])
    assert float(state.step) == steps
    return params, state


def snapshot(params, state):
    return [params.clone(), *(value.clone() for value in vars(state).values())]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [0, 1, 7, 1023, 1024, 1025, 2048, 2049, 5000])
def test_adan_small_shapes(size, device):
    """Shapes around one element and one block, and none at all, match the reference."""
    compare(size, device, group_ends=(size // 3, size), lrs=(0.1, 0.01))


@pytest.mark.fuzz
def test_adan_random_settings(seed, device):
    """Random sizes and settings match the reference."""
    rng = random.Random(seed)
    size = rng.randint(1, 6000 if INTERPRETED else 3_000_000)
    groups = rng.randint(1, 5)
    scale = 10 ** rng.uniform(-4, 4)
    compare(
        size,
        device,
        steps=rng.randint(1, 3),
        seed=seed,
        scale=scale,
        group_ends=(*sorted(rng.randint(0, size) for _ in range(groups - 1)), size),
        lrs=tuple(10 ** rng.uniform(-4, -1) for _ in range(groups)),
        betas=rng.choice([(0.98, 0.92, 0.99), (0.9, 0.3, 0.999), (0.0, 0.5, 0.2)]),
        eps=rng.choice([1e-8, 1e-5]),
        weight_decay=rng.choice([0.0, 2e-5, 0.1]),
        max_grad_norm=rng.choice([0.0, 5.0, 1e-3]),
        inverse_scale=rng.choice([1.0, 1 / scale, torch.tensor(1 / 1024, device=device)]),
        ema_decay=rng.choice([0.95, 0.0, 1.0, 0.3, torch.tensor(0.5, device=device)]),
    )


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("place", [0, 1700, 2999])
def test_adan_non_finite_norm(poison, place, device):
    """A norm that is not finite changes no byte, and leaves no trace in the next step."""
    params, state = compare(3000, device, group_ends=(2000, 3000), lrs=(0.1, 0.01))
    before = snapshot(params, state)
    other, other_state = params.clone(), copy.deepcopy(state)
    grads = normal(3000, 9).to(device)
    bad = grads.clone()
    bad[place] = poison
    options = {"group_ends": (2000, 3000), "lrs": (0.1, 0.01)}
    assert bool(adan_step(params, bad, state, **options))
    assert same(before, snapshot(params, state))
    assert not bool(adan_step(params, grads, state, **options))
    adan_step(other, grads, other_state, **options)
    assert same(snapshot(params, state), snapshot(other, other_state)), "the skipped step left a trace"


@pytest.mark.parametrize("name", ["inverse_scale", "ema_decay"])
def test_adan_device_scalars(name, device):
    """Scalars as tensors on the device act like numbers."""
    results = []
    for value in (0.25, torch.tensor(0.25, device=device), torch.tensor(0.25, device=device, dtype=torch.float16)):
        params = normal(100, 0).to(device)
        state = AdanState.zeros(params)
        adan_step(params, normal(100, 1).to(device), state, group_ends=(100,), lrs=(0.1,), **{name: value})
        results.append(snapshot(params, state))
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_adan_nan_scale(device):
    """A loss scale of NaN skips the step."""
    params = normal(100, 0).to(device)
    state = AdanState.zeros(params)
    before = snapshot(params, state)
    scale = torch.tensor(math.nan, device=device)
    assert bool(adan_step(params, normal(100, 1).to(device), state, group_ends=(100,), lrs=(0.1,), inverse_scale=scale))
    assert same(before, snapshot(params, state))


def test_adan_repeats(device):
    """Repeats are equal bit for bit."""
    size = 5000 if INTERPRETED else 3_000_000
    results = []
    for _ in range(3 if INTERPRETED else 10):
        params = normal(size, 0).to(device)
        state = AdanState.zeros(params)
        for step in range(2):
            adan_step(params, normal(size, step + 1).to(device), state, group_ends=(size,), lrs=(0.1,))
        results.append(snapshot(params, state))
    assert all(same(results[0], other) for other in results[1:])


def test_adan_strided_gradients(device):
    """Strided gradients give the results of contiguous ones."""
    wide = normal(2 * 300, 1).to(device)
    results = []
    for grads in (wide[::2], wide[::2].clone()):
        params = normal(300, 0).to(device)
        state = AdanState.zeros(params)
        adan_step(params, grads, state, group_ends=(300,), lrs=(0.1,))
        results.append(snapshot(params, state))
    assert same(*results)


def test_adan_unaligned_buffers(device):
    """Buffers that do not start at a multiple of 16 bytes give the same results."""
    results = []
    for shift in (0, 1):
        params, state = normal(3000, 0).to(device), AdanState.zeros(normal(3000, 0).to(device))
        params, *buffers = (
            torch.cat([value.new_zeros(shift), value])[shift:]
            for value in (params, *(value for name, value in vars(state).items() if name != "step"))
        )
        state = AdanState(*buffers, step=state.step)
        adan_step(params, normal(3000, 1).to(device), state, group_ends=(3000,), lrs=(0.1,))
        results.append(snapshot(params, state))
    assert same(*results)


def test_adan_bad_arguments(device):
    """Errors name the argument and both values."""
    params = normal(100, 0).to(device)
    state, grads = AdanState.zeros(params), normal(100, 1).to(device)
    options = {"group_ends": (100,), "lrs": (0.1,)}
    wide = normal(200, 0).to(device)[::2]
    with pytest.raises(ValueError, match=r"params must be contiguous, got strides \(2,\)"):
        adan_step(wide, grads, AdanState.zeros(params), **options)
    with pytest.raises(ValueError, match=r"state.ema must be contiguous"):
        adan_step(params, grads, AdanState(*[params.clone() for _ in range(4)], ema=wide, step=state.step), **options)
    with pytest.raises(ValueError, match=r"inverse_scale must have shape \[\], got \[1\]"):
        adan_step(params, grads, state, inverse_scale=torch.ones(1, device=device), **options)
    with pytest.raises(TypeError, match="params is float64, which the kernels do not compute in"):
        adan_step(params.double(), grads.double(), to(state, torch.float64), **options)


@pytest.mark.full_size("scalars on another device than the parameters")
def test_adan_scalar_on_wrong_device(device):
    """An error names the scalar that is on another device."""
    params = normal(100, 0).to(device)
    with pytest.raises(ValueError, match="ema_decay is on cpu but params is on cuda"):
        adan_step(
            params,
            params.clone(),
            AdanState.zeros(params),
            group_ends=(100,),
            lrs=(0.1,),
            ema_decay=torch.tensor(0.5),
        )


@pytest.mark.full_size("the size of the default field")
def test_adan_default_field(device):
    """Steps over as many parameters as the default field has match the reference."""
    size = 12_202_772
    compare(size, device, steps=3, group_ends=(size - 6532, size), lrs=(0.05, 0.005), scale=10.0)


@pytest.mark.full_size("CUDA graph")
def test_adan_graph(device):
    """A CUDA graph replays the step, also a skipped one."""
    size = 100_001
    grads, scale = normal(size, 1).to(device), torch.ones((), device=device)
    results = []
    for graphed in (False, True):
        params = normal(size, 0).to(device)
        state = AdanState.zeros(params)

        def step(params=params, state=state):
            return adan_step(params, grads, state, group_ends=(5, size), lrs=(0.1, 0.01), inverse_scale=scale)

        if graphed:
            before = snapshot(params, state)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.synchronize()
            for value, old in zip((params, *vars(state).values()), before, strict=True):
                value.copy_(old)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found_inf = step()
            for _ in range(3):
                graph.replay()
            scale.fill_(math.nan)
            graph.replay()
            assert bool(found_inf)
            scale.fill_(1.0)
            graph.replay()
            assert not bool(found_inf)
        else:
            for _ in range(4):
                step()
        results.append(snapshot(params, state))
    assert same(*results)


@pytest.mark.full_size("streams")
def test_adan_two_streams(device):
    """Two optimisers on two streams at once do not disturb each other."""
    size = 1_000_000
    expected = [compare(size, device, steps=2, seed=seed) for seed in (0, 50)]
    inputs = [[normal(size, seed + i).to(device) for i in range(3)] for seed in (0, 50)]
    torch.cuda.synchronize()
    results = []
    for params, *grads in inputs:
        with torch.cuda.stream(torch.cuda.Stream()):
            state = AdanState.zeros(params)
            for grad in grads:
                adan_step(params, grad, state, group_ends=(size,), lrs=(0.01,))
            results.append((params, state))
    torch.cuda.synchronize()
    for (params, state), (other, other_state) in zip(results, expected, strict=True):
        assert same(snapshot(params, state), snapshot(other, other_state))


@pytest.mark.full_size("synchronisation with the host")
def test_adan_no_synchronisation(device):
    """A step does not wait for the device."""
    params, grads = normal(5000, 0).to(device), normal(5000, 1).to(device)
    state, scale = AdanState.zeros(params), torch.ones((), device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adan_step(params, grads, state, group_ends=(5000,), lrs=(0.1,), inverse_scale=scale, ema_decay=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.full_size("more than 2^31 elements")
def test_adan_beyond_int32(device):
    """The last group begins past 2^31 and is compared with a small buffer of the same numbers."""
    size, tail = 2**31 + 5000, 4000
    params = torch.zeros(size, device=device)
    grads = torch.zeros(size, device=device)
    small, small_grads = normal(tail, 0).to(device), normal(tail, 1).to(device)
    params[-tail:], grads[-tail:] = small, small_grads
    state, small_state = AdanState.zeros(params), AdanState.zeros(small)
    exact, exact_state = small.double(), to(small_state, torch.float64)
    options = {"lrs": (0.1, 0.01), "max_grad_norm": 5.0}
    ends = (tail - 1000, tail)
    for _ in range(2):
        adan_step(params, grads, state, group_ends=(size - 1000, size), **options)
        adan_step(small, small_grads, small_state, group_ends=ends, **options)
        adan_step_reference(exact, small_grads.double(), exact_state, group_ends=ends, **options)
    for name, value in vars(state).items():
        if name != "step":
            check(name, value[-tail:], getattr(small_state, name), getattr(exact_state, name))
    check("params", params[-tail:], small, exact)
    assert not params[:-tail].any()


@pytest.mark.full_size("a second GPU")
def test_adan_second_device():
    """Kernels start on the device of their tensors, also where another one is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    compare(5000, torch.device("cuda:1"))
