"""The suite on other processors than this one: instruction sets, thread counts, with and without units for bf16.

    python .ci/any_cpu.py                         a covering part of the combinations: each pair of values occurs
    python .ci/any_cpu.py --all                   every combination
    python .ci/any_cpu.py --jobs 12 --shard 1/2 --out rows_1.json     half of them, in twelve processes
    python .ci/any_cpu.py --only tests/kernels/reference/test_march.py -- -x     one file; options of pytest after --
    python .ci/any_cpu.py --write rows_1.json rows_2.json             their table into docs/testing.md; runs nothing

Runs without a GPU, as `make test` does: processes of pytest-xdist, those of tests/kernels/triton in Triton's
interpreter. What no processor can change (`ONCE`) runs in one combination. Exit status 1 where a test fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "testing.md"
START, END = "<!-- any_cpu: start -->", "<!-- any_cpu: end -->"
UNSET = "unset"
FACTORS = {"capability": (UNSET, "default", "avx2"), "threads": (1, 2, 4), "bf16": ("used", "hidden")}
# oneDNN's newest instruction set that knows no bf16; a processor that has less uses what it has.
WITHOUT_BF16 = "AVX512_CORE_VNNI"
# Tests that compare no numbers of tensors: they run in the first combination alone.
ONCE = {
    "tests/bench/test_aot.py": "compiles for GPUs, and nothing of it runs",
    "tests/planted/test_planted.py": "reads the lists of faults",
    "tests/repo/test_architecture.py": "reads the sources",
    "tests/repo/test_links.py": "reads the documents",
    "tests/repo/test_makefile.py": "runs make with other programs in place of Python",
    "tests/repo/test_packaging.py": "builds a wheel and looks into it",
    "tests/repo/test_recipes.py": "edits copies of the sources",
}
Combination = dict[str, str | int]
Row = dict[str, object]


def all_combinations() -> list[Combination]:
    """Every combination that a processor can have: units for bf16 come with AVX-512, and fail torch without it."""
    made = [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    return [each for each in made if each["bf16"] == "hidden" or each["capability"] == UNSET]


def pairs(combination: Combination) -> set[tuple]:
    return set(itertools.combinations(combination.items(), 2))


def covering_combinations() -> list[Combination]:
    """A few combinations that have every pair of values, the one with the most new pairs first."""
    left = all_combinations()
    missing = set().union(*map(pairs, left))
    taken = []
    while missing:
        best = max(left, key=lambda combination: len(pairs(combination) & missing))
        taken.append(best)
        left.remove(best)
        missing -= pairs(best)
    return taken


def environment(combination: Combination, *, interpreted: bool) -> dict[str, str]:
    """The environment of a test process."""
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "TRITON_INTERPRET")
    found = {name: value for name, value in os.environ.items() if name not in names}
    threads = str(combination["threads"])
    found |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    found["OMP_WAIT_POLICY"] = "passive"  # a thread that waits leaves its core to the other processes
    if combination["capability"] != UNSET:
        found["ATEN_CPU_CAPABILITY"] = str(combination["capability"])
    if combination["bf16"] == "hidden":
        found["ONEDNN_MAX_CPU_ISA"] = WITHOUT_BF16
    if interpreted:
        found["TRITON_INTERPRET"] = "1"
    return found


def test_files(combination: Combination) -> list[Path]:
    """Every test file that counts in a combination."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    first = combination == covering_combinations()[0]
    return [path for path in files if first or path.relative_to(ROOT).as_posix() not in ONCE]


def run_files(combination: Combination, files: list[Path], options: list[str], jobs: int) -> Row:
    """Counts of the tests in `files`, their seconds, and the names and messages of those that fail."""
    row: Row = {"passed": 0, "skipped": 0, "seconds": 0.0, "failures": []}
    for interpreted in (True, False):
        names = [str(path) for path in files if (path.parent.name == "triton") == interpreted]
        if not names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            spread = ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
            started = time.monotonic()
            ran = subprocess.run(
                [*command, *spread, *names, *options],
                cwd=ROOT,
                env=environment(combination, interpreted=interpreted),
                capture_output=True,
                text=True,
            )
            found = {"seconds": time.monotonic() - started, **read_report(report)}
        # 5: no test was selected, as by -k or for want of a GPU.
        if ran.returncode not in (0, 5) and not found["failures"]:
            last = (ran.stdout + ran.stderr).strip().splitlines()[-1:]
            found["failures"] = [f"pytest ended with status {ran.returncode}: {' '.join(last)}"]
        row = {name: row[name] + found[name] for name in row}
    return row


def read_report(report: Path) -> Row:
    """Read pytest's JUnit file: how many tests passed and were skipped, and which failed with what message."""
    row: Row = {"passed": 0, "skipped": 0, "failures": []}
    if not report.exists():
        return row
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag: child for child in case}
        failure = outcomes.get("failure", outcomes.get("error"))
        if failure is not None:
            message = failure.get("message", "").split("\n")[0][:200]
            row["failures"].append(f"{case.get('classname')}::{case.get('name')}: {message}")
        else:
            row["skipped" if "skipped" in outcomes else "passed"] += 1
    return row


def machine() -> Row:
    """What a row says of the machine."""
    info = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    facts = {name.strip(): value.strip() for name, value in lines.items()}
    units = [name for name in ("amx_bf16", "avx512_bf16") if name in facts.get("flags", "").split()]
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "units": " ".join(units) or "none",
        "torch": metadata.version("torch").split("+")[0],
        "python": platform.python_version(),
    }


def run_round(combinations: list[Combination], only: list[Path], options: list[str], jobs: int) -> list[Row]:
    """A row for each combination, of the files `only` or of all that count; `jobs` processes at a time."""
    rows = []
    for combination in combinations:
        row = {**machine(), **combination, **run_files(combination, only or test_files(combination), options, jobs)}
        row["failures"].sort()
        rows.append(row)
        print("\n".join([line(row), *(f"    failed: {name}" for name in row["failures"])]), flush=True)
    return rows


COLUMNS = ("CPU", "bf16 units", "torch", "Python", "ATEN_CPU_CAPABILITY", "threads", "passed", "failed", "skipped", "s")


def line(row: Row) -> str:
    """A row of the Markdown table."""
    units = "none" if row["units"] == "none" else f"{row['units']}, {row['bf16']}"
    cells = (row["cpu"], units, row["torch"], row["python"], row["capability"], row["threads"])
    counts = (row["passed"], len(row["failures"]), row["skipped"], round(row["seconds"]))
    return f"| {' | '.join(map(str, (*cells, *counts)))} |"


def table(rows: Iterable[Row]) -> str:
    head = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join(head + sorted(map(line, rows)))


def write_table(rows: list[Row], document: Path = DOCUMENT) -> None:
    """Put the table of `rows` between the markers of `document`. Raises `ValueError`: when it lacks a marker."""
    text = document.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{document} lacks the lines {START} and {END}")
    before, after = text.split(START)[0], text.split(END)[1]
    document.write_text(f"{before}{START}\n{table(rows)}\n{END}{after}", encoding="utf-8")


def take_shard(combinations: list[Combination], shard: str) -> list[Combination]:
    """Of "2/3", every third combination from the second on."""
    number, count = map(int, shard.split("/"))
    if not 1 <= number <= count:
        raise ValueError(f"--shard must be I/N with I from 1 to N, got {shard}")
    return combinations[number - 1 :: count]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every combination")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--shard", default="1/1", help="I/N: the I-th of N parts of the combinations")
    parser.add_argument("--only", nargs="+", type=Path, metavar="FILE", help="these test files")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--write", nargs="+", type=Path, metavar="ROWS", help="write the table of these JSON files")
    words = sys.argv[1:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    arguments, options = parser.parse_args(words[:split]), words[split + 1 :]
    if arguments.write:
        write_table([row for path in arguments.write for row in json.loads(path.read_text())])
        return 0
    combinations = take_shard(all_combinations() if arguments.all else covering_combinations(), arguments.shard)
    print(table([]), flush=True)
    rows = run_round(combinations, [path.resolve() for path in arguments.only or ()], options, arguments.jobs)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["failures"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
