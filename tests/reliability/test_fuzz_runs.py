"""Whole runs with random inputs (`fuzz_runs`): each is taken or refused with one sentence, in bounded time and memory.

A few in the suite; 200,000 on 16 cores with `FUZZ_RUNS=200000 FUZZ_JOBS=16 python -P -m pytest
tests/reliability/test_fuzz_runs.py -s --timeout 0`. FUZZ_FIRST is the number of the first input.
"""

import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import pytest

SCRIPT = Path(__file__).with_name("fuzz_runs.py")
RUNS, JOBS, FIRST = (
    int(os.environ.get(f"FUZZ_{name}", default)) for name, default in (("RUNS", 80), ("JOBS", 1), ("FIRST", 0))
)
SECONDS, BYTES = 10.0, 2e9  # of the processor, and above the process before its first input
ENDED = "ended by itself"
TICKS, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


class Use(NamedTuple):
    """Seconds of the processor, and bytes of memory, of a process."""

    seconds: float
    bytes: float


def use_of(process: int) -> Use:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return Use(0, 0)
    return Use((int(fields[11]) + int(fields[12])) / TICKS, int(fields[21]) * PAGE)


def watch(folder: Path, model: Path, first: int, stop: int, stride: int) -> list[tuple[int, str, str]]:
    """Run the inputs of these numbers. Return number, kind and outcome of each; one past a bound is killed."""
    results: list[tuple[int, str, str]] = []
    while first < stop:
        command = [sys.executable, "-P", str(SCRIPT), str(folder), str(model), *map(str, (first, stop, stride))]
        folder.mkdir(parents=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
        ):
            try:
                first = follow(process, process.stdout, results, stop) + stride
            finally:
                process.kill()
            errors.seek(0)
            if results and results[-1][2].endswith(ENDED):
                said = errors.read().decode(errors="replace")[-500:]
                results.append((*results.pop()[:2], f"the process {ENDED}: {said}"))
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    return results


def follow(process: subprocess.Popen, out: IO[bytes], results: list[tuple[int, str, str]], stop: int) -> int:
    """Add results until the process ends, by itself or because an input is past a bound. Return its last number."""
    number, kind, before, idle = stop, "start", Use(0, 0), 0.0
    while True:
        if select.select([out], [], [], 0.1)[0]:
            line = out.readline()
            if not line:
                if process.wait() != 0 or number == stop and not results:
                    results.append((number, kind, f"the process {ENDED}"))
                return number
            message = json.loads(line)
            idle = idle or use_of(process.pid).bytes
            if "input" in message:
                number, kind, before = message["input"], message["kind"], use_of(process.pid)
            elif "outcome" in message:
                results.append((number, kind, message["outcome"]))
        elif kind != "start":
            now = use_of(process.pid)
            if now.seconds - before.seconds > SECONDS or now.bytes - idle > BYTES:
                results.append(
                    (number, kind, f"took {now.seconds - before.seconds:.0f} s, {now.bytes - idle:.1e} bytes")
                )
                return number


def test_runs_taken_or_refused(tmp_path, tiny_model) -> None:
    """No traceback, no other status, no hang, no flood of memory."""
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = [
            pool.submit(watch, tmp_path / str(job), tiny_model, FIRST + job, FIRST + RUNS, JOBS) for job in range(JOBS)
        ]
        results = [result for job in jobs for result in job.result()]
    failures = [result for result in results if result[2] not in ("taken", "refused")]
    print(json.dumps({str(key): count for key, count in sorted(Counter(result[1:] for result in results).items())}))
    assert not failures, "\n".join(f"input {number} ({kind}): {outcome}" for number, kind, outcome in failures[:20])
    assert len(results) == RUNS


WORKER = """
import sys, time
first, stop, stride = map(int, sys.argv[3:])
print('{"ready": true}', flush=True)
for number in range(first, stop, stride):
    print('{"input": %d, "kind": "planted"}' % number, flush=True)
    if number == 1:
        while True: pass
    if number == 2:
        full = bytearray(3_000_000_000); time.sleep(99)
    if number == 3:
        sys.exit("fault three")
    print('{"outcome": "taken"}', flush=True)
"""


def test_watch_notices_faults(tmp_path, monkeypatch) -> None:
    """A hang, memory past the bound and a process that ends are each found, and the inputs after it are still tried."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setitem(watch.__globals__, "SCRIPT", script)
    monkeypatch.setitem(watch.__globals__, "SECONDS", 1.0)
    results = watch(tmp_path / "runs", tmp_path, 0, 5, 1)
    assert [number for number, _, _ in results] == [0, 1, 2, 3, 4]
    outcomes = [outcome for _, _, outcome in results]
    assert outcomes[0] == outcomes[4] == "taken" and "took 1 s" in outcomes[1] and "e+09 bytes" in outcomes[2]
    assert "fault three" in outcomes[3]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ((0, ""), "taken"),
        ((2, "dream-fast: error: no\n"), "refused"),
        ((2, "usage: no\n"), "status 2"),
        ((1, "dream-fast: error: no\n"), "status 1"),
        ((0, "a\x1b[2J"), "said"),
        (KeyError("x"), "KeyError"),
    ],
)
def test_try_input_outcomes(tmp_path, monkeypatch, capsys, answer, outcome) -> None:
    """One sentence and status 2, or status 0; anything else is a failure, and what the input left behind goes."""
    spec = importlib.util.spec_from_file_location("fuzz_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.Fuzz, "run", lambda *_: (0, ""))
    fuzz = module.Fuzz(tmp_path, tmp_path / "model")

    def planted(rng: object) -> tuple[int, str]:
        (tmp_path / "left").mkdir()
        if isinstance(answer, Exception):
            raise answer
        return answer

    fuzz.kinds = {"planted": planted}
    assert outcome in fuzz.try_input(0) and not (tmp_path / "left").exists()
