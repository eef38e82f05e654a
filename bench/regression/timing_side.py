"""A process of `python -m dream_fast.bench timing`: prepares a workload and runs it as often as requested.

A line of JSON in, a line of JSON out: `{"prepare": NAME}` gives `{"missing": null}`, or the reason why this commit
cannot run that workload; `{"calls": N}` gives `{"seconds": processor time of N calls}`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch

from dream_fast.bench import measure
from dream_fast.bench.ops.cases import SMALL, build
from dream_fast.bench.ops.spec import Case, run

STEP = "dream-mini step"
PROMPT = "a hamburger"
PR_SET_THP_DISABLE = 41  # linux/prctl.h


def prepare_operator(case: Case) -> Callable[[], object]:
    problem = build(case, count_bytes=False)
    return lambda: run(problem, problem.operator, case.mode, case.compute_dtype)


def prepare_step() -> Callable[[], object]:
    """A call that repeats one step of the main command."""
    from dream_fast.engine.config.configure import configure
    from dream_fast.engine.dream_mini import MODEL_FOLDER
    from dream_fast.engine.guidance.diffusion import diffusion_guidance
    from dream_fast.engine.guidance.model.components import load_components
    from dream_fast.engine.guidance.prompts import PromptEmbeddings
    from dream_fast.engine.runtime.device import choose_runtime
    from dream_fast.engine.training.trainer import Trainer

    config = configure({"text": PROMPT, "device": "cpu", "seed": 0}, "cpu")
    components = load_components(MODEL_FOLDER, "cpu")
    guidance = diffusion_guidance(components, PromptEmbeddings(components, PROMPT), config)
    trainer = Trainer(config, choose_runtime(config), 0, guidance)
    trainer.train_step()  # the first updates the occupancy

    def step() -> None:
        trainer.step = 1
        trainer.train_step()

    return step


def list_workloads() -> dict[str, Callable[[], Callable[[], object]]]:
    """Functions that prepare a call, by name: operators in their longest mode, on rays if possible, and the step."""
    operators = {}
    for case in SMALL:
        if "uniform" not in case.case:
            operators[f"{case.op} {case.case}"] = lambda case=case: prepare_operator(case)
    return operators | {STEP: prepare_step}


def answer_requests(
    requests: Iterator[str],
    prepared: dict[str, Callable[[], Callable[[], object]]],
    clock: Callable[[], float] = measure.processor_time,
) -> Iterator[dict[str, Any]]:
    """Answer each request. A call runs once when it is prepared, which is not timed."""
    call: Callable[[], object] = lambda: None  # noqa: E731
    for line in requests:
        request = json.loads(line)
        if "prepare" in request:
            try:
                call = prepared[request["prepare"]]()
                call()
                missing = None
            except Exception as failure:  # an earlier commit may lack anything that the workload needs
                missing = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
            yield {"missing": missing}
        else:
            yield {"seconds": measure.time_calls(call, request["calls"], clock)}


def reduce_noise() -> None:
    """Use one thread and no huge pages: a process gets those by luck, and they make a factor of two."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def main(requests: TextIO, answers: TextIO) -> None:
    reduce_noise()
    for reply in answer_requests(iter(requests), list_workloads()):
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of libraries must not mix with the answers
    main(sys.stdin, answers)
