"""The timing gate of the CPU path: nothing takes more than twice its committed ratio to a fixed work in this run."""

import pytest

from dream_fast.bench import cpu_ratios
from dream_fast.bench.cpu_ratios import LIMIT, ROUNDS, TIMER, one_thread, ratio, seconds, timed, too_slow, yardstick

AGAIN = 2  # a machine that was busy is asked again


@pytest.fixture(scope="module")
def fixed():
    with one_thread():
        yield yardstick()


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("name", timed())
def test_the_cpu_path_is_not_slower_than_it_was(benchmark, fixed, name):
    call, committed = timed()[name](), cpu_ratios.load()[name]
    fixed_seconds = []
    # The fixed work runs before each round, so that both see the same machine.
    benchmark.pedantic(call, setup=lambda: fixed_seconds.append(seconds(fixed)), rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    found = benchmark.stats.stats.min / min(fixed_seconds)
    for _ in range(AGAIN):
        if not too_slow(found, committed):
            break
        found = min(found, ratio(call, fixed))
    benchmark.extra_info |= {"ratio": found, "committed": committed}
    assert not too_slow(found, committed), f"{name}: {found:.3g} times the fixed work, committed {committed:.3g}"


def test_a_planted_slowdown_is_caught_and_a_busy_machine_is_not(fixed):
    name = "composite rays_8 float32"
    call = timed()[name]()
    committed = ratio(call, fixed)

    def slowed():
        for _ in range(6):
            call()

    assert too_slow(ratio(slowed, fixed), committed)
    # Rounds that something else held up do not count.
    rounds = iter(range(1000))

    def held_up():
        call()
        if next(rounds) % 2:
            for _ in range(6):
                call()

    assert not too_slow(ratio(held_up, fixed, 2 * ROUNDS), committed * 1.5)
    assert LIMIT == 2
