"""Speed of the CPU path beside a fixed piece of PyTorch work in the same run. `python -m dream_fast.bench cpu_ratios`.

What an operator takes in milliseconds says little on a machine that others share; how many times the fixed work it
takes says more. Both run on one thread, in turns; processor time is counted, which waiting for others is no part of,
and the best turn of each. `--write` commits the ratios to results/cpu-ratios.json; the tests refuse more than twice.

Large buffers come with huge pages in one process and without in the next, which alone is worth a factor of two. So
`--write` keeps a committed ratio that is larger; run it a few times, after removing the file to start anew.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dream_fast.bench.cases import SMALL, Case, run

RATIOS = Path(__file__).parent / "results" / "cpu-ratios.json"
LIMIT = 2.0
ROUNDS = 5
STEP = "dream-mini step"
PROMPT = "a hamburger"


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def yardstick() -> Callable[[], None]:
    """The fixed work: what operators and guidance do most, memory, gathers, scatters, products and convolutions."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1 << 20, generator=generator)
    index = torch.randint(1 << 20, (1 << 19,), generator=generator)
    matrix = torch.randn(512, 512, generator=generator)
    image, kernel = torch.randn(1, 64, 64, 64, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)

    @torch.no_grad()
    def work() -> None:
        picked = table.index_select(0, index).exp_()
        torch.zeros(1 << 20).scatter_add_(0, index, picked)
        torch.zeros(1 << 23).add_(1.0)
        matrix @ matrix
        torch.nn.functional.conv2d(image, kernel, padding=1)

    return work


def _operator(case: Case) -> Callable[[], object]:
    problem = case.build("cpu", count_bytes=False)
    return lambda: run(problem, problem.operator, case.mode, case.compute_dtype)


def _step() -> Callable[[], object]:
    """The same step of the main command, over and over."""
    from dream_fast.engine.guidance.loader import load_components
    from dream_fast.engine.guidance.prompts import PromptEmbeddings
    from dream_fast.engine.guidance.sds import ScoreDistillation
    from dream_fast.engine.guidance.text import TextGuidance
    from dream_fast.engine.presets import resolve
    from dream_fast.engine.prior import MODEL_FOLDER
    from dream_fast.engine.runtime import choose_runtime
    from dream_fast.engine.trainer import Trainer

    config = resolve({"text": PROMPT, "device": "cpu", "seed": 0}, "dream-mini", "cpu")
    components = load_components(MODEL_FOLDER, "cpu")
    guidance = TextGuidance(
        ScoreDistillation(components, config.guidance),
        PromptEmbeddings(components, PROMPT),
        config.camera.angle_overhead,
        config.camera.view_blend,
    )
    trainer = Trainer(config, choose_runtime(config), 0, guidance)
    trainer.train_step()  # the first updates the occupancy

    def step() -> None:
        trainer.step = 1
        trainer.train_step()

    return step


def timed() -> dict[str, Callable[[], Callable[[], object]]]:
    """What is timed, by name: functions that prepare it. Operators in their longest mode, on rays where they can."""
    found = {}
    for case in SMALL:
        if "uniform" not in case.case:
            found[f"{case.op} {case.case} {case.dtype}"] = lambda case=case: _operator(case)
    return found | {STEP: _step}


TIMER = time.process_time


def seconds(call: Callable[[], object]) -> float:
    start = TIMER()
    call()
    return TIMER() - start


def ratio(call: Callable[[], object], fixed: Callable[[], object], rounds: int = ROUNDS) -> float:
    """How many times the fixed work `call` takes: the best of some rounds of each, in turns, after one to warm up."""
    fixed(), call()
    times = [(seconds(fixed), seconds(call), seconds(fixed)) for _ in range(rounds)]
    return min(took for _, took, _ in times) / min(min(before, after) for before, _, after in times)


def load() -> dict[str, float]:
    return json.loads(RATIOS.read_text(encoding="utf-8"))["ratios"]


def too_slow(found: float, committed: float) -> bool:
    return found > LIMIT * committed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench cpu_ratios", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="commit larger ratios to results/cpu-ratios.json")
    parser.add_argument("--rounds", type=int, default=2 * ROUNDS)
    args = parser.parse_args(argv)
    committed = load() if RATIOS.exists() else {}
    found, slow = {}, False
    with one_thread():
        fixed = yardstick()
        for name, prepare in timed().items():
            found[name] = round(ratio(prepare(), fixed, args.rounds), 4)
            before = committed.get(name)
            worse = before is not None and too_slow(found[name], before)
            slow |= worse
            print(f"{name:50} {found[name]:9.3f} {before or '':>9} {'too slow' if worse else ''}".rstrip(), flush=True)
    if args.write:
        with one_thread():
            best = min(seconds(fixed) for _ in range(args.rounds))
        ratios = {name: max(value, committed.get(name, 0.0)) for name, value in found.items()}
        record = {"torch": torch.__version__, "fixed_ms": round(1e3 * best, 2), "ratios": ratios}
        RATIOS.write_text(json.dumps(record, indent=1) + "\n")
        return 0
    return int(slow)
