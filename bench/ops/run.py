"""Speed of the operators, behind a gate on their accuracy. `python -m dream_fast.bench kernels`.

Three implementations of each case: `triton`, the PyTorch `reference`, and the reference under torch.compile (default
mode, `compiled`). Ours is timed in two ways: replayed from a CUDA graph (`graph`: the kernels' own time), and called
from Python over and over (`eager`: what a loop gets, the host's part included). Peers are slow to compile and to run,
so they are timed in one way and on a few cases only (on all with --peers all). Results go to results/<gpu>.json. The
table shows the time beside the floor, which is the larger of compulsory bytes over the measured rate of a copy and
FLOPs over the measured rate of a matrix product, and beside the targets, which are for `graph`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from dream_fast.bench import measure, results
from dream_fast.bench.ops import host
from dream_fast.bench.ops.cases import FULL, SMALL, SPECS, build, find_target, tiny_cases
from dream_fast.bench.ops.gate import Verdict, gate_case, judge
from dream_fast.bench.ops.spec import Case, run
from dream_fast.kernels._core.launch import INTERPRETED

IMPLEMENTATIONS = ("triton", "reference", "compiled")
CALLS = ("graph", "eager")  # replayed from a CUDA graph; from Python


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Limit the time of the `with` block, also of compilation. Raises TimeoutError: when the time is over."""

    def stop(*_):
        raise TimeoutError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def find_implementation(case: Case, name: str) -> Callable[..., Any]:
    """Return an implementation, one of IMPLEMENTATIONS, of this case's operator."""
    spec = SPECS[case.op]
    if name == "triton":
        return spec.operator
    return torch.compile(spec.reference, dynamic=False) if name == "compiled" else spec.reference


def ways_to_call(case: Case, name: str, device: torch.device) -> tuple[str, ...]:
    """Those of CALLS in which an implementation is timed."""
    if device.type != "cuda":
        return ("eager",)
    if name == "triton":
        return CALLS
    # Only the kernels can always be captured; most references read sizes on the host.
    return ("graph",) if SPECS[case.op].capturable else ("eager",)


def time_row(
    case: Case,
    name: str,
    way: str,
    operator: Callable[..., Any],
    verdict: Verdict,
    rates: dict[str, Any],
    device: torch.device,
    milliseconds: float,
) -> tuple[dict[str, Any], str]:
    """Time an implementation, called in one of the ways of CALLS; returns a row of the results and a remark on it."""
    problem = build(case, device)
    call = lambda: run(problem, operator, case.mode, case.compute_dtype)  # noqa: E731
    call()
    peak = measure.peak_bytes(call, device)
    least = 10 if name == "triton" else 3
    if way == "graph":
        timing = measure.time_cuda(call, milliseconds=milliseconds, least=least)
    elif device.type == "cuda":
        timing = measure.time_eager(call, milliseconds=milliseconds, least=least)
    else:
        timing = measure.time_cpu(call, milliseconds=milliseconds)
    floor = 1e3 * max(problem.least_bytes / rates["copy_rate"], problem.flops / rates["matmul_rate"])
    row = {
        "op": case.op,
        "case": case.case,
        "impl": name,
        "mode": case.mode,
        "call": "graph" if timing.graph else "eager",
        "dtype": case.dtype,
        "median_ms": round(timing.median, 5),
        "p20_ms": round(timing.p20, 5),
        "p80_ms": round(timing.p80, 5),
        "floor_ms": round(floor, 5),
        "pct_of_floor": round(100 * floor / timing.median, 2),
        "peak_bytes": peak,
        "max_err": float(f"{verdict.max_err:.3g}"),
        "tol": float(f"{verdict.tol:.3g}"),
    }
    remarks = []
    if problem.gathers:
        remarks.append(f"{problem.gathers / timing.median / 1e6:.0f} G gathers/s")
    if problem.scatters:
        remarks.append(f"{problem.scatters / timing.median / 1e6:.0f} G scatters/s")
    if way == "graph" and not timing.graph:
        remarks.append("not capturable: timed without a CUDA graph")
    return row, ", ".join(remarks)


HEAD = (
    f"{'op':15} {'case':29} {'mode':16} {'dtype':8} {'impl':9} {'call':5} {'median':>9} {'p20':>9} {'p80':>9} "
    f"{'floor':>8} {'% floor':>7} {'peak MB':>8} {'error':>8} {'tol':>8} {'peer*':>7} {'target*':>7} {'stretch*':>8}"
)


def format_row(row: dict[str, Any], remark: str) -> str:
    """A row for the terminal."""
    is_ours = row["impl"] == "triton" and row["call"] == "graph"
    target = find_target(row["op"], row["case"], row["mode"]) if is_ours else None
    columns = ["" if value is None else f"{value:g}" for value in (target or (None, None, None))]
    if target:
        columns[1] += " " if row["median_ms"] <= target.target else "!"
    return (
        f"{row['op']:15} {row['case']:29} {row['mode']:16} {row['dtype']:8} {row['impl']:9} {row['call']:5} "
        f"{row['median_ms']:9.4f} {row['p20_ms']:9.4f} {row['p80_ms']:9.4f} "
        f"{row['floor_ms']:8.4f} {row['pct_of_floor']:7.1f} {row['peak_bytes'] / 1e6:8.0f} "
        f"{row['max_err']:8.1e} {row['tol']:8.1e} {columns[0]:>7} {columns[1]:>7} {columns[2]:>8}  {remark}"
    ).rstrip()


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Suite:
    """A run of the benchmark: its rows in their order, and the reasons for missing ones."""

    def __init__(
        self,
        device: torch.device,
        *,
        seconds: float,
        peer_seconds: float,
        milliseconds: float,
        calls: Sequence[str] = CALLS,
    ) -> None:
        self.device, self.milliseconds, self.peer_seconds, self.calls = device, milliseconds, peer_seconds, calls
        self.end = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.inaccurate: list[str] = []
        self.verdicts: dict[tuple[Case, str], Verdict] = {}
        self.compiled: dict[str, Callable[..., Any]] = {}
        self.not_compiled: set[tuple[str, str]] = set()  # operator and case that failed to compile, or took too long
        self.head = results.header(device)

    def operator(self, case: Case, name: str) -> Callable[..., Any]:
        if name != "compiled":
            return find_implementation(case, name)
        if case.op not in self.compiled:
            self.compiled[case.op] = find_implementation(case, name)
        return self.compiled[case.op]

    def measure_case(self, case: Case, name: str) -> None:
        """Judge, then time; a failure is left out, with the reason."""
        label = f"{case.op} {case.case} {case.mode} {name}"
        left = self.end - time.monotonic()
        limit = min(left, self.peer_seconds) if name != "triton" else left
        if limit <= 0:
            self.left_out.append(f"{label}: no time left (--seconds)")
            return
        if name == "compiled" and (case.op, case.case) in self.not_compiled:
            self.left_out.append(f"{label}: not compiled, see above")
            return
        try:
            with time_limit(limit):
                operator = self.operator(case, name)
                key = gate_case(case), name
                if key not in self.verdicts:
                    self.verdicts |= {key: judge(case, self.device, {name: operator})[name]}
                verdict = self.verdicts[key]
                if not verdict.good:
                    reason = f"{label}: error {verdict.max_err:.3g}, allowed {verdict.tol:.3g}"
                    (self.inaccurate if name == "triton" else self.left_out).append(reason)
                    print(reason, flush=True)
                    return
                release(self.device)
                for way in ways_to_call(case, name, self.device):
                    if way in self.calls:
                        row, remark = time_row(
                            case, name, way, operator, verdict, self.head, self.device, self.milliseconds
                        )
                        self.rows.append(row)
                        print(format_row(row, remark), flush=True)
                        release(self.device)
        except AssertionError as failure:
            self.inaccurate.append(f"{label}: {failure}")
            print(self.inaccurate[-1], flush=True)
        except Exception as failure:  # a peer may fail in any way; a failure of ours fails the command
            # Two lines, since inductor's first one only names inductor.
            reason = f"{label}: {type(failure).__name__}: {' '.join(str(failure).splitlines()[:2])}"[:300]
            (self.inaccurate if name == "triton" else self.left_out).append(reason)
            if name == "compiled":
                self.not_compiled.add((case.op, case.case))
            print(reason, flush=True)
        finally:
            release(self.device)


def compile_side_by_side(cases: Sequence[Case], device: str, seconds: float) -> None:
    """Fill inductor's cache with the compiled peers of these cases, each compiled by a process of its own."""
    end = time.monotonic() + seconds

    def compile_one(key: tuple[str, str]) -> None:
        left = max(1.0, end - time.monotonic())
        with tempfile.TemporaryDirectory() as folder, suppress(subprocess.TimeoutExpired):
            options = {"op": key[0], "case": key[1], "impl": "compiled", "peers": "all", "device": device, "ms": 1}
            options |= {"seconds": left, "peer_seconds": left, "out": f"{folder}/rows.json"}
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            command = [sys.executable, "-P", "-m", "dream_fast.bench", "kernels", *words]
            subprocess.run(command, timeout=left, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    keys = list(dict.fromkeys((case.op, case.case) for case in cases))
    # From the end, where the slowest are.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for number, _ in enumerate(pool.map(compile_one, reversed(keys)), start=1):
            print(f"compiled {number} of {len(keys)}", file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", help="only this operator (may be given several times)")
    parser.add_argument("--case", action="append", help="only this case (may be given several times)")
    parser.add_argument("--quick", action="store_true", help="one case of each kind, no peers")
    parser.add_argument("--peers", choices=("none", "some", "all"), default="some", help="cases of the PyTorch peers")
    parser.add_argument("--impl", action="append", choices=IMPLEMENTATIONS, help="only this one (also several times)")
    parser.add_argument("--call", action="append", choices=CALLS, help="only from a CUDA graph, or only from Python")
    parser.add_argument(
        "--compile_seconds",
        "--compile-seconds",
        type=float,
        default=0,
        help="most time for compiling the peers side by side, before anything is timed; each takes minutes in turn",
    )
    parser.add_argument("--out", type=Path, help="file to write (default results/<gpu>.json of the package)")
    parser.add_argument("--seconds", type=float, default=240, help="time after which no more rows are started")
    parser.add_argument(
        "--peer_seconds", "--peer-seconds", type=float, default=45, help="most time for a row of a peer"
    )
    parser.add_argument("--ms", type=float, default=100, help="time measured for a row")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="a CPU has small cases and no triton")
    parser.add_argument(
        "--host", action="store_true", help="the processor's time in each operator's call from Python; needs no GPU"
    )
    return parser


def choose_cases(args: argparse.Namespace) -> dict[str, list[Case]]:
    """The cases that the arguments name, by implementation; empty where they name none."""
    cases = [case for case in (FULL if args.device == "cuda" else SMALL) if not args.op or case.op in args.op]
    cases = [case for case in cases if not args.case or case.case in args.case]
    if args.quick and args.device == "cuda":
        cases = [case for case in cases if case.case in SPECS[case.op].quick]
    if not cases:
        return {}
    some = [case for case in cases if case.case in SPECS[case.op].peers]
    peers = {"none": [], "some": some, "all": cases}["none" if args.quick else args.peers]
    return {
        "triton": cases if args.device == "cuda" else [],
        "reference": cases if args.device == "cpu" else peers,
        # The grids' references, which come first, take longest to compile: they come last here, as time may end.
        "compiled": [case for case in reversed(peers) if case.case not in SPECS[case.op].not_compiled],
    }


def time_hosts(names: Sequence[str] | None) -> int:
    """Print the host's time in calls of operators, or of those that are named."""
    cases = [case for case in tiny_cases() if not names or case.op in names]
    if not cases or INTERPRETED:
        reason = "interpreted kernels are not launched: unset TRITON_INTERPRET" if INTERPRETED else "no such operator"
        print(f"error: {reason}; there are: {', '.join(SPECS)}", file=sys.stderr)
        return 2
    print(host.HEAD)
    for case in cases:
        problem = build(case, count_bytes=False)
        print(host.format_row(case, host.time_host(problem, case.mode, case.compute_dtype)), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.host:
        return time_hosts(args.op)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU on this machine (--device cpu times the references)", file=sys.stderr)
        return 2
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    cases = choose_cases(args)
    if not cases:
        print("error: no such case; there are:", *sorted({f"{c.op}/{c.case}" for c in FULL}), file=sys.stderr)
        return 2
    implementations = args.impl or IMPLEMENTATIONS
    if "compiled" in implementations and args.compile_seconds:
        compile_side_by_side(cases["compiled"], args.device, args.compile_seconds)
    suite = Suite(
        device,
        seconds=args.seconds,
        peer_seconds=args.peer_seconds,
        milliseconds=args.ms,
        calls=args.call or CALLS,
    )
    print(json.dumps(suite.head))
    print(HEAD)
    for name in implementations:
        for case in cases[name]:
            suite.measure_case(case, name)
    print("* ms on an H100: the fastest CUDA peer, the target (! = not reached here), the stretch goal")
    for reason in suite.left_out:
        print(f"left out: {reason}")
    for reason in suite.inaccurate:
        print(f"FAILED: {reason}")
    out = args.out or results.RESULTS / results.file_name(suite.head["gpu"])
    results.write_kernels(out, suite.head, suite.rows)
    print(json.dumps({"out": str(out), "rows": len(suite.rows), "failed": len(suite.inaccurate)}))
    return int(bool(suite.inaccurate))
