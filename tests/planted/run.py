"""Plant one fault at a time in a copy of the tree and run the tests that are to notice it.

    make faults                       # all of them, as many at once as there are processors
    make faults FAULTS="-n 8 mlp march"   # eight at once, of the lists mlp.toml and march.toml
    make faults FAULTS="--results new.jsonl --first old.jsonl"   # what caught a fault earlier runs first
    python tests/planted/run.py --check   # only whether every fault still applies

A list `NAME.toml` beside this file holds the faults of one file of kernels:

    file = "kernels/rays/composite.py"
    tests = ["tests/kernels/triton/test_composite.py"] # pytest's; the first test that fails ends a fault's run

    [_alpha]                                     # a function
    faults = [
      { kind = "term", old = "(1 / 3)", new = "(1 / 2)" },
    ]

`old` occurs exactly once in the function. A fault may name `tests` of its own, quicker ones as a rule. `gpu = "reason"`
marks one that only a GPU can show: its tests are those that would, and it is not run here. Kinds: mask, stride, clamp,
term, overflow (of 32 bits), axis (also the wrong program), sum (an accumulator that is stale or lost), precision,
stop (where a loop or a ray ends), select (the wrong one of two).

A fault is caught when a test fails by an assertion. Any other end (an exception, a crash, a test that hangs) counts as
missed: the fault is then badly chosen, or the tests do not say what is wrong. Exits with 1 unless all are caught.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import monotonic, sleep
from typing import NoReturn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KINDS = {"mask", "stride", "clamp", "term", "overflow", "axis", "sum", "precision", "stop", "select"}
START, END = "<!-- planted faults -->", "<!-- end of planted faults -->"
COPIED = ("kernels", "engine", "bench", "tests", "pyproject.toml", "__init__.py")
TIME_LIMIT = 600  # seconds of one fault; interpreted test files take a minute or two
SETTINGS = {
    "TRITON_INTERPRET": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # they take a second to import
    "COLUMNS": "400",  # of pytest's summary, which is cut there
}
FAILED = re.compile(r"^FAILED (\S+?\.py::.+?)(?: - (.*))?$", re.MULTILINE)
# How pytest names a failed assert, `raise AssertionError`, `pytest.fail`, and an assertion in a function of a kernel.
ASSERTED = re.compile(r"^(assert |AssertionError|Failed: )|InterpreterError.*AssertionError\(")


@dataclass(frozen=True)
class Fault:
    """A replacement of `old` by `new` in a function of `file`, which `tests` have to detect."""

    file: str
    function: str
    kind: str
    old: str
    new: str
    tests: tuple[str, ...]
    gpu: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.function} [{self.kind}] {self.old.strip()!r} -> {self.new.strip()!r}"


@lru_cache(maxsize=64)
def kernel_functions(source: str) -> dict[str, tuple[int, int]]:
    """First and last line (from 1) of every function that Triton compiles, by name."""
    return {
        node.name: (node.lineno, node.end_lineno)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and any(re.search(r"\bjit\b", ast.unparse(d)) for d in node.decorator_list)
    }


def read_faults(names: list[str], folder: Path = HERE) -> list[Fault]:
    """The faults of the lists called `names`, or of all lists.

    Raises ValueError: for a list that does not exist, or an entry with an unknown key or kind.
    """
    faults = []
    for path in [folder / f"{name}.toml" for name in names] or sorted(folder.glob("*.toml")):
        if not path.exists():
            raise ValueError(f"there is no list {path.name} in {folder}")
        listed = tomllib.loads(path.read_text(encoding="utf-8"))
        file, tests = listed.pop("file"), listed.pop("tests")
        for function, entry in listed.items():
            for fields in entry["faults"]:
                if fields.get("kind") not in KINDS or not fields.keys() <= {"kind", "old", "new", "tests", "gpu"}:
                    raise ValueError(f"{path.name}: a fault of {function} has an unknown kind or key: {fields}")
                found = {"tests": tests} | fields
                faults.append(Fault(file=file, function=function, **found | {"tests": tuple(found["tests"])}))
    return faults


def plant(source: str, fault: Fault) -> str:
    """`source` with the fault in it.

    Raises ValueError: unless `old` occurs exactly once in the function and the result is Python.
    """
    functions = kernel_functions(source)
    if fault.function not in functions:
        raise ValueError(f"{fault}: {fault.file} has no such kernel function")
    first, last = functions[fault.function]
    lines = source.splitlines(keepends=True)
    body = "".join(lines[first - 1 : last])
    if body.count(fault.old) != 1:
        raise ValueError(f"{fault}: the old text occurs {body.count(fault.old)} times, it must occur once")
    planted = body.replace(fault.old, fault.new)
    try:
        same = ast.dump(ast.parse(planted)) == ast.dump(ast.parse(body))
    except SyntaxError as error:
        raise ValueError(f"{fault}: the result is no Python: {error}") from None
    if same:
        raise ValueError(f"{fault}: the result is the same program")
    return "".join([*lines[: first - 1], planted, *lines[last:]])


def problems(faults: list[Fault], root: Path = ROOT) -> Iterator[str]:
    """A sentence for each fault that does not apply, and for each kernel function without one."""
    files = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.glob("kernels/**/*.py")
    }
    for fault in faults:
        if fault.file not in files:
            yield f"{fault}: there is no such file"
            continue
        try:
            plant(files[fault.file], fault)
        except ValueError as error:
            yield str(error)
        for test in fault.tests:
            name, _, case = test.partition("::")
            text = (root / name).read_text(encoding="utf-8") if (root / name).exists() else ""
            if not re.search(rf"^def {re.escape(case.split('[')[0])}" if case else ".", text, re.MULTILINE):
                yield f"{fault}: there is no test {test}"
    covered = {(fault.file, fault.function) for fault in faults}
    for file, source in files.items():
        for function in kernel_functions(source):
            if (file, function) not in covered:
                yield f"{file}:{function} has no planted fault"


def copy_tree(folder: Path) -> Path:
    """A copy of the tree in `folder`, from which it is imported as dream_fast."""
    tree = folder / "dream_fast"
    tree.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        else:
            shutil.copy(source, tree / name)
    return tree


def run_tests(tree: Path, fault: Fault, first: str, output: Path) -> NoReturn:
    """Run the test `first`, if any, and unless it fails all of the fault's, in this process.

    It ends with pytest's status. What it prints goes to `output`.
    """
    import pytest

    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        os.chdir(tree)
        sys.path.insert(0, str(tree.parent))
        sys.dont_write_bytecode = True  # it could outlive the fault
        options = ["-q", "-x", "-rf", "--tb=line", "--no-header", "-p", "no:cacheprovider"]
        for tests in ([first] if first else []), fault.tests:
            status = pytest.main([*options, *tests]) if tests else 0
            if status == pytest.ExitCode.TESTS_FAILED:
                break
        sys.stdout.flush()
        os._exit(status)


def read_verdict(status: int, output: str) -> tuple[str, str]:
    """("caught", the test that failed), ("missed", "") or ("broke", how the run ended)."""
    if status == 0:
        return "missed", ""
    failed = FAILED.search(output)
    if status == 1 and failed:
        message = failed[2] or ""
        return ("caught", failed[1]) if ASSERTED.search(message) else ("broke", f"{failed[1]}: {message[:200]}")
    return "broke", f"ended with status {status}: {output.strip()[-200:]}"


def read_results(path: Path | None) -> dict[str, tuple[str, str]]:
    """The file of `--results`: verdict and detail by the line of a fault; empty if there is no such file."""
    text = path.read_text(encoding="utf-8") if path and path.exists() else ""
    return {line: (verdict, detail) for line, verdict, detail in map(json.loads, text.splitlines())}


def run_faults(
    faults: list[Fault], at_once: int, first: dict[str, tuple[str, str]], kept: Path | None = None
) -> dict[Fault, tuple[str, str]]:
    """The verdict on each fault. Prints a line for each as it ends, and adds it to the file `kept`.

    `first` has earlier results: the test that caught a fault is run before the others. A run is a fork of this process,
    which has imported the slow modules.
    """
    import pytest  # noqa: F401
    import torch._inductor.config  # noqa: F401  the deterministic mode imports it
    import triton  # noqa: F401

    results: dict[Fault, tuple[str, str]] = {}
    caught = {line: test for line, (verdict, test) in first.items() if verdict == "caught"}
    waiting, running = (
        sorted(faults, key=lambda fault: str(fault) not in caught),
        {},
    )  # from its end
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        trees = [copy_tree(Path(folder) / str(number)) for number in range(at_once)]
        while waiting or running:
            while waiting and trees:
                fault, tree = waiting.pop(), trees.pop()
                source = (ROOT / fault.file).read_text(encoding="utf-8")
                (tree / fault.file).write_text(plant(source, fault), encoding="utf-8")
                process = os.fork()
                if process == 0:
                    run_tests(tree, fault, caught.get(str(fault), ""), tree.parent / "output")
                running[process] = fault, tree, source, monotonic()
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                for late, (*_, start) in running.items():
                    if monotonic() - start > TIME_LIMIT:
                        os.kill(late, signal.SIGKILL)
                sleep(0.05)
                continue
            fault, tree, source, start = running.pop(process)
            (tree / fault.file).write_text(source, encoding="utf-8")
            trees.append(tree)
            output = (tree.parent / "output").read_text(encoding="utf-8", errors="replace")
            results[fault] = verdict, detail = read_verdict(os.waitstatus_to_exitcode(status), output)
            print(f"{verdict:6} {monotonic() - start:4.0f} s  {fault}  {detail}", flush=True)
            if kept:
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([str(fault), verdict, detail]) + "\n")
    return results


def summary(faults: list[Fault], results: dict[Fault, tuple[str, str]]) -> str:
    """A Markdown table: how many faults were planted in each kernel, and in a file's other functions, and caught."""
    counts: dict[tuple[str, str], Counter] = {}
    for fault in faults:
        kernel = f"`{fault.function}`" if fault.function.endswith("_kernel") else "functions of kernels"
        count = counts.setdefault((fault.file, kernel), Counter())
        count["gpu" if fault.gpu else "planted"] += 1
        count["caught"] += results.get(fault, ("",))[0] == "caught"
    counts["all", ""] = sum(counts.values(), Counter())
    rows = ["| file | kernel | planted | caught | need a GPU |", "|---|---|---|---|---|"]
    for (file, kernel), count in sorted(counts.items(), key=lambda item: (item[0][0] == "all", *item[0])):
        rows.append(f"| {file} | {kernel} | {count['planted']} | {count['caught']} | {count['gpu']} |")
    return "\n".join(rows)


def write_summary(page: Path, table: str) -> None:
    """Put the table between the markers of the page.

    Raises ValueError: for a page without the markers.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must have the lines '{START}' and '{END}' once each")
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="*", help="names of lists, without .toml; all of them when left out")
    parser.add_argument(
        "-n", type=int, default=os.cpu_count(), metavar="N", help="faults at once; processors by default"
    )
    parser.add_argument("-k", default="", metavar="TEXT", help="only faults whose line has this text")
    parser.add_argument("--check", action="store_true", help="only check that every fault applies")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the summary into this Markdown page")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="keep what became of each; those in it run no more"
    )
    parser.add_argument("--first", type=Path, metavar="FILE", help="earlier results: the test that caught runs first")
    options = parser.parse_args(argv)
    if options.write and (options.lists or options.k):
        parser.error("--write needs all faults: leave out the lists and -k")
    faults = read_faults(options.lists)
    wrong = [line for line in problems(faults) if not (options.lists and line.endswith("has no planted fault"))]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if wrong or options.check:
        return int(bool(wrong))
    chosen = [fault for fault in faults if not fault.gpu and options.k in str(fault)]
    os.environ |= SETTINGS
    kept = read_results(options.results)
    results = {fault: kept[str(fault)] for fault in chosen if str(fault) in kept}
    waiting = [fault for fault in chosen if fault not in results]
    results |= run_faults(waiting, options.n, read_results(options.first), options.results)
    table = summary([fault for fault in faults if fault.gpu or fault in results], results)
    print(f"\n{table}")
    for fault, (verdict, detail) in results.items():
        if verdict != "caught":
            print(f"{verdict}: {fault}  {detail}")
    if options.write:
        write_summary(options.write, table)
    return int(any(verdict != "caught" for verdict, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
