"""Check memory, file handles and speed of a long run of dream-mini. `python -m dream_fast.bench soak`.

The command runs in pieces of --piece steps up to --steps, each resuming the one before, so that it can be stopped
(Ctrl-C) and called again. Every row of metrics.jsonl also holds the process's memory, the GPU's and the number of open
files; the first --warm_up steps of each piece do not count. Status 1: in the second half of a piece the memory is more
than 1 % above that of the first, more files are open, or steps are more than 5 % slower.
"""

import argparse
import gc
import json
import os
import statistics
from pathlib import Path

import torch

MEMORY_LIMIT, SPEED_LIMIT = 0.01, 0.05  # growth and loss that count as a fault


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def count_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def find_faults(rows: list[dict], warm_up: int) -> list[str]:
    """Quantities that grew, or speed that fell, within a piece, one sentence each; `warm_up` steps do not count."""
    rows = [row for row in rows if row["in_piece"] > warm_up]
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    if not first:
        return ["too few steps to compare: more --piece, less --warm_up or a smaller --log_every"]
    faults = []
    for name in ("host_bytes", "device_bytes", "files", "it_per_s"):
        before, after = (statistics.median(row[name] for row in half) for half in (first, second))
        limit = {"files": before, "it_per_s": before * (1 - SPEED_LIMIT)}.get(name, before * (1 + MEMORY_LIMIT))
        if after < limit if name == "it_per_s" else after > limit:
            faults.append(f"{name}: {before:g}, later {after:g}")
    return faults


class UsageRecorder:
    """The hook that adds memory and open files to each row of metrics."""

    def __init__(self, device: str):
        self.device, self.frozen = device, False

    def __call__(self, row: dict) -> None:
        gc.collect()
        if not self.frozen:
            gc.freeze()  # later collections skip the imported modules, which would take a quarter of a second each time
            self.frozen = True
        device_bytes = torch.cuda.memory_reserved() if self.device == "cuda" else 0
        row |= {"host_bytes": resident_bytes(), "device_bytes": device_bytes, "files": count_open_files()}

    def stop(self) -> None:
        gc.unfreeze()
        self.frozen = False


def run_piece(workspace: Path, last_step: int, device: str) -> tuple[int, list[dict]]:
    """Run up to `last_step`; returns the step that the piece began after, and its rows of metrics."""
    from dream_fast.engine import run
    from dream_fast.engine.config.configure import configure
    from dream_fast.engine.training.loop import LoopOptions

    overrides = {"text": "a hamburger", "iters": last_step, "seed": 0, "workspace": str(workspace), "six_views": True}
    recorder = UsageRecorder(device)
    config = configure(overrides | {"device": device, "fp16": True}, device)
    run.run(config, loop=LoopOptions(on_row=recorder))
    recorder.stop()
    rows = [json.loads(line) for line in (workspace / "metrics.jsonl").read_text().splitlines()]
    begin = json.loads((workspace / "manifest.json").read_text())["runs"][-1]["from_step"]
    rows = [row for row in rows if row["step"] > begin and "files" in row]
    return begin, [row | {"in_piece": row["step"] - begin} for row in rows]


def read_last_step(record: Path) -> int:
    """The step up to which earlier calls have come."""
    lines = record.read_text().splitlines() if record.exists() else []
    return max((json.loads(line)["to"] for line in lines), default=0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench soak", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--piece", type=int, default=5_000, help="steps in one piece")
    parser.add_argument(
        "--warm_up", "--warm-up", "--warm", type=int, default=500, help="steps of a piece that do not count"
    )
    parser.add_argument("--workspace", type=Path, default=Path("soak"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    record = args.workspace / "soak.jsonl"
    faults: list[str] = []
    step = read_last_step(record)
    while step < args.steps:
        end = min(args.steps, step + args.piece)
        begin, rows = run_piece(args.workspace, end, args.device)
        new_faults = find_faults(rows, args.warm_up)
        medians = {name: statistics.median(row[name] for row in rows) for name in ("host_bytes", "files", "it_per_s")}
        with record.open("a") as out:
            out.write(json.dumps({"from": begin, "to": end, "faults": new_faults, "median": medians}) + "\n")
        print(f"steps {begin} to {end}: {'; '.join(new_faults) or 'flat'} {medians}", flush=True)
        faults, step = faults + new_faults, end
    print(json.dumps({"steps": step, "faults": faults}))
    return int(bool(faults))
