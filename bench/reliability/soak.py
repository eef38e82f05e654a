"""A long run of dream-mini: memory, file handles and speed stay what they were. `python -m dream_fast.bench long_run`.

The command itself runs in pieces of --piece steps up to --steps, each taking up the one before, so that it can be
stopped (Ctrl-C) and called again. Every row of metrics.jsonl has the process's memory, the GPU's and the open files
beside it; the first --warm steps of each piece do not count. Status 1: in a piece the memory of the second half is more
than 1 % above that of the first, more files are open, or steps are more than 5 % slower.
"""

import argparse
import gc
import json
import os
import statistics
from pathlib import Path

import torch

MEMORY, SPEED = 0.01, 0.05


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def faults(rows: list[dict], warm: int) -> list[str]:
    """What grew or became slower within a piece, as sentences."""
    rows = [row for row in rows if row["in_piece"] > warm]
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    if not first:
        return ["too few steps to compare: more --piece, less --warm or a smaller --log_every"]
    found = []
    for name in ("host_bytes", "device_bytes", "files", "it_per_s"):
        before, after = (statistics.median(row[name] for row in half) for half in (first, second))
        limit = {"files": before, "it_per_s": before * (1 - SPEED)}.get(name, before * (1 + MEMORY))
        if after < limit if name == "it_per_s" else after > limit:
            found.append(f"{name}: {before:g}, later {after:g}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench long_run", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--piece", type=int, default=5_000, help="steps in one piece")
    parser.add_argument("--warm", type=int, default=500, help="steps of a piece that do not count")
    parser.add_argument("--workspace", type=Path, default=Path("long_run"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    from dream_fast.engine import run
    from dream_fast.engine.config.configure import configure
    from dream_fast.engine.training.loop import LoopOptions

    record = args.workspace / "long_run.jsonl"

    def add_usage(row: dict) -> None:
        nonlocal settled
        gc.collect()
        if not settled:
            gc.freeze()  # what was imported is not gone through again, for a quarter of a second each time
            settled = True
        device = torch.cuda.memory_reserved() if args.device == "cuda" else 0
        row |= {"host_bytes": resident_bytes(), "device_bytes": device, "files": open_files()}

    wrong: list[str] = []
    settled, done = False, 0
    if record.exists():
        done = max((json.loads(line)["to"] for line in record.read_text().splitlines()), default=0)
    while done < args.steps:
        end = min(args.steps, done + args.piece)
        typed = {"text": "a hamburger", "iters": end, "seed": 0, "workspace": str(args.workspace), "six_views": True}
        typed |= {"device": args.device, "fp16": True}
        run.run(configure(typed, args.device), loop=LoopOptions(on_row=add_usage))
        gc.unfreeze()
        settled = False
        rows = [json.loads(line) for line in (args.workspace / "metrics.jsonl").read_text().splitlines()]
        begin = json.loads((args.workspace / "manifest.json").read_text())["runs"][-1]["from_step"]
        rows = [made | {"in_piece": made["step"] - begin} for made in rows if made["step"] > begin and "files" in made]
        found = faults(rows, args.warm)
        summary = {name: statistics.median(made[name] for made in rows) for name in ("host_bytes", "files", "it_per_s")}
        with record.open("a") as out:
            out.write(json.dumps({"from": begin, "to": end, "faults": found, "median": summary}) + "\n")
        print(f"steps {begin} to {end}: {'; '.join(found) or 'flat'} {summary}", flush=True)
        wrong, done = wrong + found, end
    print(json.dumps({"steps": done, "faults": wrong}))
    return int(bool(wrong))
