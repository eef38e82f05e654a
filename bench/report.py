"""The tables of PROFILING.md, from bench/results. `python -m dream_fast.bench report --write`.

Each table is between `<!-- table: NAME -->` and `<!-- end of table -->`; without `--write` the tables are printed.
A test compares the page with the results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dream_fast.bench.results import RESULTS, ROOT, STEP, call_of

PAGE = ROOT / "PROFILING.md"
H100, H200 = "nvidia-h100-80gb-hbm3.json", "nvidia-h200.json"
END = "<!-- end of table -->"
NORMS = ("group_norm_silu", "bias_residual")  # operators of the image model, in a separate table
MODES = {"forward": "fwd", "forward_backward": "fwd + bwd"}
STEP_GPUS = (H100, H200)
GIB = 1 << 30

Result = dict[str, Any]


def load(name: str) -> Result:
    """A file of results; one without rows where there is none."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def format_number(value: float | None) -> str:
    """Three significant digits, all of them before the point where the number is large; empty for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; rows as long as `head`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def describe_source(name: str, result: Result) -> str:
    """GPU, commit, date and versions of a file of results, as one line."""
    if "gpu" not in result:
        return f"`bench/results/{name}` is missing"
    versions = f"torch {result['torch'].partition('+')[0]}, Triton {result['triton']}, driver {result['driver']}"
    return (
        f"{result['gpu']}: commit {result['git_sha'][:7]}, {result['utc'][:10]}, {versions}, "
        f"copies {result['copy_rate'] / 1e12:.2f} TB/s, matrix products {result['matmul_rate'] / 1e12:.0f} TFLOP/s "
        f"(`bench/results/{name}`)"
    )


def end_to_end_table() -> str:
    """The main command on each device: seconds and memory."""
    rows = []
    for path in sorted(RESULTS.glob("main_job-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        machine, parts = record["machine"], record.get("seconds_of", {})
        processor = f"{machine['processor']}, {machine['cores']} cores"
        memory = record["peak_bytes"].get("device")
        rows.append(
            [
                f"{record['gpu']}, {processor}" if record["gpu"] else processor,
                f"{record['seconds']:.1f}",
                *(format_number(parts.get(name)) for name in ("start", "steps", "outputs")),
                f"{record['host_peak_bytes'] / GIB:.2f}",
                "" if memory is None else f"{memory / GIB:.2f}",
            ]
        )
    head = ["machine", "s", "until the first step, s", "steps, s", "outputs, s", "host, GiB", "GPU, GiB"]
    return format_table(head, rows)


def step_table() -> str:
    """A whole step on each GPU: time and its target, memory, and the image model's modules alone."""
    from dream_fast.bench.pipeline.step_cases import CASES

    cases = {case.name: case for case in CASES}
    rows = []
    for result in map(load, STEP_GPUS):
        for row in (row for row in result["rows"] if row["op"] == STEP):
            ours = row["impl"] != "reference"
            case = cases.get(row["case"]) if ours else None
            modules = row.get("modules_ms", {})
            rows.append(
                [
                    row["case"] if ours else f"{row['case']}, plain diffusers and references",
                    result["gpu"].split()[1],
                    format_number(row["median_ms"]),
                    format_number(case.target_ms if case else None),
                    format_number(row["peak_bytes"] / GIB),
                    format_number(case.target_gib if case else None),
                    format_number(modules.get("unet")),
                    format_number(modules.get("vae_encoder")),
                    result["steps"][row["case"]]["git_sha"][:7],
                ]
            )
    head = ["case", "GPU", "ms", "target", "GiB", "target", "UNet, ms", "encoder, ms", "commit"]
    return format_table(head, rows)


def index_rows(result: Result) -> dict[tuple[str, str, str], dict[str, dict[str, Any]]]:
    """Rows of operators by (operator, case, mode) and implementation; `graph` wins where one has both calls."""
    index: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["op"] != STEP:
            rows = index.setdefault((row["op"], row["case"], row["mode"]), {})
            if row["impl"] not in rows or call_of(row) == "graph":
                rows[row["impl"]] = row
    return index


def kernels_table() -> str:
    """The operators of a step with a target or a peer; times in ms."""
    from dream_fast.bench.ops.cases import find_target

    h100, h200 = load(H100), load(H200)
    first, second = index_rows(h100), index_rows(h200)
    rows = []
    for key in dict.fromkeys((*first, *second)):
        op, case, mode = key
        here, there, target = first.get(key, {}), second.get(key, {}), find_target(op, case, mode)
        if op in NORMS or not (target or "reference" in here or "reference" in there):
            continue
        rows.append(
            [
                op,
                case,
                MODES[mode],
                *(format_number(here.get("triton", {}).get(name)) for name in ("median_ms", "floor_ms")),
                *map(format_number, (target.target, target.stretch, target.peer) if target else [None] * 3),
                *(format_number(there.get(impl, {}).get("median_ms")) for impl in ("triton", "compiled", "reference")),
            ]
        )
    head = ["operator", "case", "mode", "H100", "floor", "target", "stretch", "CUDA peer"]
    table = format_table([*head, "H200", "compiled", "eager"], rows)
    return "\n".join([f"{describe_source(H100, h100)}.", f"{describe_source(H200, h200)}.", "", table])


def norms_table() -> str:
    """Group normalisation with SiLU, then residual sums: forward, and forward + backward; times in ms."""
    h100, h200 = index_rows(load(H100)), index_rows(load(H200))
    rows = []
    for op, case in dict.fromkeys((op, case) for op, case, _ in (*h100, *h200) if op in NORMS):
        cells = []
        for mode in MODES:
            here, there = h100.get((op, case, mode), {}), h200.get((op, case, mode), {})
            cells += [format_number(here.get("triton", {}).get(name)) for name in ("median_ms", "floor_ms")]
            cells.append(format_number(there.get("triton", {}).get("median_ms")))
            cells += [format_number(there.get(impl, {}).get("median_ms")) for impl in ("compiled", "reference")]
        rows.append([case if op == NORMS[0] else f"{op} {case}", *cells])
    columns = ["H100", "floor", "H200", "compiled", "eager"]
    return format_table(["case", *columns, *(f"{name}, both" for name in columns)], rows)


TABLES = {
    "end_to_end": end_to_end_table,
    "step": step_table,
    "kernels": kernels_table,
    "norms": norms_table,
}


def fill_page(text: str) -> str:
    """The page with every table between markers replaced.

    Raises ValueError: when a marker names no table, a table has no marker, or a marker has no end.
    """
    begin = re.compile(r"<!-- table: (\w+) -->")
    names = begin.findall(text)
    if sorted(names) != sorted(TABLES):
        raise ValueError(f"{PAGE.name} must have one marker for each of {', '.join(TABLES)}, has {', '.join(names)}")
    before, *parts = begin.split(text)
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        _, end, rest = part.partition(END)
        if not end:
            raise ValueError(f"{PAGE.name}: no {END!r} after the table {name}")
        before += f"<!-- table: {name} -->\n{TABLES[name]()}\n{END}{rest}"
    return before


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench report", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"replace the tables in {PAGE.name}")
    args = parser.parse_args(argv)
    if args.write:
        PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        for name, make_table in TABLES.items():
            print(f"{name}\n{make_table()}\n")
    return 0
