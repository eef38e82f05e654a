"""Mutation tests of the host code, with mutmut: which changes of the code does no test notice?

    python .ci/mutants.py                              # every module of mutants.toml
    python .ci/mutants.py engine/scene/camera.py --jobs 8    # some of them
    python .ci/mutants.py --sample 40 --out FOLDER     # at most 40 mutants a module, drawn at random; goes on in FOLDER
    python .ci/mutants.py engine/scene/camera.py --show      # the diffs of the mutants that survived
    python .ci/mutants.py --write docs/testing.md --read FOLDER     # the table of what --out FOLDER keeps; runs nothing

Each module is mutated in a temporary copy of the tree and tested with the test files that mutants.toml names, so that
a mutant counts as caught only where a test of its unit notices it. Messages (strings of three words or more), log
lines and type hints are not mutated. Survivors that mutants.toml explains are counted apart. A larger sample of a
seed has all of a smaller one. What FOLDER has as caught is not tested again, unless the module has changed.

Needs `pip install mutmut` (https://mutmut.readthedocs.io). Exit status 1 when fewer than 90 % are caught.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / ".ci" / "mutants.toml"
START, END = "<!-- mutants -->", "<!-- end of mutants -->"
TARGET = 0.9
RETRIES = 6  # tests that fail without a mutant, such as those of a package that is missing here, are left out
UNNOTICED = (0, 5, 33)  # exit codes of mutmut's workers: all tests passed, or there are none

# What mutmut has no settings for: strings that a person reads are left out, functions under torch.no_grad are not.
LAUNCHER = """
import json
import sys
import mutmut.mutation.mutators as mutators
import mutmut.mutation.file_mutation as file_mutation

def keep(node):
    value = getattr(node, "value", "")
    return () if len(value.split()) > 2 else mutators.operator_string(node)

mutators.mutation_operators[:] = [
    (kind, keep if operator is mutators.operator_string else operator) for kind, operator in mutators.mutation_operators
]
skips = file_mutation.MutationVisitor._skip_node_and_children

def skip(self, node):
    decorators = getattr(node, "decorators", ())
    if type(node).__name__ == "FunctionDef" and len(decorators) == 1:
        function = getattr(decorators[0].decorator, "func", decorators[0].decorator)
        if getattr(getattr(function, "attr", function), "value", "") in ("no_grad", "once_differentiable"):
            node = node.with_changes(decorators=())
    return skips(self, node)

file_mutation.MutationVisitor._skip_node_and_children = skip

# The first run of the tests, which counts who calls what, has shown that they pass: no second one, none that must fail.
import mutmut.__main__ as program

make_runner = program.get_mutant_runner

def make(*children):
    runner = make_runner(*children)
    runner.run_clean_tests = lambda tests: 0
    return runner

program.get_mutant_runner = make
program.run_forced_fail_test = lambda runner: None

if sys.argv[1] == "diffs":
    from mutmut.__main__ import find_mutant
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    names = json.loads(sys.stdin.read())
    print(json.dumps({name: get_diff_for_mutant(name, path=find_mutant(name).path) for name in names}))
else:
    from mutmut.__main__ import cli

    cli()
"""


def load_table() -> dict:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def tracked_files() -> list[str]:
    """Files of the repository, relative to its root; without git, all that are no hidden ones."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        paths = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        listed = [str(path) for path in paths if not any(part.startswith(".") for part in path.parts)]
    return [name for name in listed if (ROOT / name).is_file()]


def copy_tree(folder: Path) -> None:
    """The package as folder/dream_fast and the tests beside it, as mutmut expects a project."""
    for name in tracked_files():
        if name.startswith((".ci/", ".github/", "docs/", "bench/results/")) and name != "docs/options.md":
            continue  # that page holds the defaults, with which a test compares them
        target = folder / (name if name.startswith("tests/") else f"dream_fast/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".safetensors":
            target.symlink_to(ROOT / name)
        else:
            shutil.copy(ROOT / name, target)
    (folder / "launch.py").write_text(LAUNCHER, encoding="utf-8")
    (folder / "mutants").mkdir()  # before Python looks for it: a missing folder of PYTHONPATH is never looked at again


def write_settings(folder: Path, module: str, tests: list[str], deselected: list[str]) -> None:
    options = ["--import-mode=importlib", "-p", "no:cacheprovider", "-m", "not gpu"]
    for name in deselected:
        options += ["--deselect", name]
    settings = {
        "source_paths": ["dream_fast"],
        "only_mutate": [f"dream_fast/{module}"],
        "pytest_add_cli_args_test_selection": tests,
        "pytest_add_cli_args": options,
        "do_not_mutate_patterns": [r"\blogger\.", r"\bcast\(", r"^\s*raise AssertionError"],
        "timeout_multiplier": 4.0,
        "timeout_constant": 15.0,
        "process_isolation": "fork",
        "use_git_change_detection": False,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    markers = 'markers = ["gpu: needs a GPU", "full_size(reason): needs a real GPU"]'
    text = "\n".join(["[tool.mutmut]", *lines, "", "[tool.pytest.ini_options]", markers, ""])
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")


def run_mutmut(folder: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "mutants"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    words = [sys.executable, "-P", "launch.py", *arguments]
    return subprocess.run(words, cwd=folder, env=environment, input=text, capture_output=True, text=True)


def read_verdicts(folder: Path, module: str) -> dict[str, int | None]:
    meta = folder / "mutants" / "dream_fast" / f"{module}.meta"
    return json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"] if meta.exists() else {}


def changed_lines(diff: str) -> tuple[str, str]:
    """What a mutant removes and what it adds, each as one line."""
    lines = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return tuple(" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")


def explain(module: str, name: str, diff: str, table: dict) -> str | None:
    """Why no test can or need notice a mutant: the reason that mutants.toml gives, or None.

    An entry of `explained` names the line that the mutant adds. One of `equivalent` holds a pattern: where the removed
    and the added line are the same once its matches are deleted, the mutant is what the reason speaks of.
    """
    removed, added = changed_lines(diff)
    function = name.rpartition(".")[2].partition("__mutmut")[0].removeprefix("x_").rpartition("ǁ")[2]
    if function in table["modules"][module].get("gpu_only", ()):
        return "runs on a GPU alone; tests on a GPU notice"
    for entry in table.get("explained", []):
        if entry["module"] == module and entry["line"] in (added, f"- {removed}"):
            return entry["reason"]
    for entry in table.get("equivalent", []):
        lines = (re.sub(entry["pattern"], "", line) for line in (removed, added))
        before, after = (re.sub(r",\s*\)", ")", line) for line in lines)  # what is deleted may leave its comma
        if before == after:
            return entry["reason"]
    return None


@dataclass
class Verdicts:
    """Mutants of a module by what became of them; those that no test noticed with their diffs."""

    module: str
    caught: list[str] = field(default_factory=list)
    explained: list[str] = field(default_factory=list)
    survived: dict[str, str] = field(default_factory=dict)
    failure: str = ""
    made: int = 0  # mutants of the module, tested or not
    source: str = ""  # hash of the module

    def row(self) -> str:
        if self.failure:
            return f"{self.module:40} could not be tested"
        counts = len(self.caught), len(self.explained), len(self.survived)
        return f"{self.module:40} {sum(counts):8} {counts[0]:7} {counts[1]:10} {counts[2]:9}"


def draw_mutants(folder: Path, module: str, args: argparse.Namespace) -> tuple[list[str], int]:
    """Names of at most `args.sample` mutants of `module`, drawn at random, and how many there are."""
    write_settings(folder, module, ["tests/none.py"], [])
    run_mutmut(folder, "run", "no such mutant")  # makes the mutants and ends
    made = sorted(read_verdicts(folder, module))
    random.Random(f"{args.seed} {module}").shuffle(made)
    return made[: args.sample], len(made)


def kept_path(folder: Path, module: str) -> Path:
    return folder / f"{module.replace('/', '.')}.json"


def read_caught(module: str, args: argparse.Namespace, source: str) -> list[str]:
    """Mutants of this source that `--out` has as caught."""
    path = args.out and kept_path(args.out, module)
    if not path or not path.exists():
        return []
    kept = Verdicts(**json.loads(path.read_text(encoding="utf-8")))
    return kept.caught if kept.source == source else []


def test_module(module: str, args: argparse.Namespace, table: dict) -> Verdicts:
    """Mutates one module in a copy of the tree and tests the mutants."""
    entry = table["modules"][module]
    source = hashlib.sha256((ROOT / module).read_bytes()).hexdigest()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy_tree(folder)
        drawn, made = draw_mutants(folder, module, args)
        known = sorted({*read_caught(module, args, source)} & {*drawn})
        names = sorted({*drawn} - {*known})
        if not names:
            return Verdicts(module, known, made=made, source=source)
        deselected: list[str] = []
        for _ in range(RETRIES):
            write_settings(folder, module, entry["tests"], deselected)
            result = run_mutmut(folder, "run", "--max-children", str(args.jobs), *names)
            failing = re.findall(r"^(?:FAILED|ERROR) (tests/\S+)", result.stdout, re.MULTILINE)
            if not result.returncode or not failing:
                break
            deselected += failing
        verdicts = read_verdicts(folder, module)
        codes = {key: verdicts[key] for key in names if verdicts.get(key) is not None}
        if result.returncode or not codes:
            return Verdicts(module, failure=f"{result.stdout[-3000:]}\n{result.stderr[-2000:]}")
        caught = known + [key for key, code in codes.items() if code not in UNNOTICED]
        lost = [key for key, code in codes.items() if code in UNNOTICED]
        diffs = json.loads(run_mutmut(folder, "diffs", text=json.dumps(lost)).stdout)
        explained = [key for key in lost if explain(module, key, diffs[key], table)]
        survived = {key: diffs[key] for key in lost if key not in explained}
        return Verdicts(module, caught, explained, survived, made=made, source=source)


def read_results(folder: Path, table: dict) -> list[Verdicts]:
    """What `--out` keeps, with the reasons of today."""
    results = []
    for path in sorted(folder.glob("*.json")):
        verdicts = Verdicts(**json.loads(path.read_text(encoding="utf-8")))
        lost = {key: diff for key, diff in verdicts.survived.items() if explain(verdicts.module, key, diff, table)}
        verdicts.explained += lost
        verdicts.survived = {key: diff for key, diff in verdicts.survived.items() if key not in lost}
        results.append(verdicts)
    return results


def estimate_share(results: list[Verdicts]) -> tuple[float, float]:
    """Share of all mutants that are caught, those with a reason apart, and its standard error: 0 where all were tested.

    A module weighs as many as it has mutants. The variance is that of samples without replacement.
    """
    total = share = variance = 0.0
    for verdicts in results:
        caught, survived = len(verdicts.caught), len(verdicts.survived)
        tested, counted = caught + survived + len(verdicts.explained), caught + survived
        if not counted:
            continue
        part, made = caught / counted, max(verdicts.made, tested)
        total += made
        share += made * part
        variance += made**2 * part * (1 - part) / max(counted - 1, 1) * (1 - tested / made)
    return share / max(total, 1), variance**0.5 / max(total, 1)


def write_table(page: Path, results: list[Verdicts]) -> None:
    """Replaces the table between the markers of `page`."""
    tested = sorted((verdicts for verdicts in results if not verdicts.failure), key=lambda verdicts: verdicts.module)
    rows = [
        "| module | mutants | tested | caught | explained | survived | share |",
        "|---|---|---|---|---|---|---|",
    ]
    sums = [0] * 5
    for verdicts in tested:
        counts = len(verdicts.caught), len(verdicts.explained), len(verdicts.survived)
        numbers = max(verdicts.made, sum(counts)), sum(counts), *counts
        sums = [total + number for total, number in zip(sums, numbers, strict=True)]
        part = counts[0] / max(counts[0] + counts[2], 1)
        rows.append(f"| `{verdicts.module}` | {' | '.join(map(str, numbers))} | {part:.0%} |")
    share, error = estimate_share(tested)
    spread = f" ± {1.96 * error:.1%}" if error else ""
    rows.append(f"| all | {' | '.join(map(str, sums))} | {share:.1%}{spread} |")
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    page.write_text("\n".join([before + START, *rows, END + after]), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="such as engine/scene/camera.py; default: all of mutants.toml")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants tested at a time in a module")
    parser.add_argument("--together", type=int, default=1, help="modules at a time")
    parser.add_argument("--sample", type=int, help="at most so many mutants a module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print the diffs of survivors")
    parser.add_argument("--out", type=Path, help="folder for the verdicts of each module, as JSON")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table into this Markdown page")
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="take the verdicts of --out instead of testing")
    args = parser.parse_args()
    table = load_table()
    modules = args.modules or list(table["modules"])
    if unknown := [name for name in modules if name not in table["modules"]]:
        parser.error(f"not in {TABLE.name}: {', '.join(unknown)}")
    print(f"{'module':40} {'mutants':>8} {'caught':>7} {'explained':>10} {'survived':>9}", flush=True)
    results = []
    with ThreadPoolExecutor(args.together) as pool:
        tested = (
            as_completed([pool.submit(test_module, name, args, table) for name in modules]) if not args.read else ()
        )
        for verdicts in read_results(args.read, table) if args.read else (future.result() for future in tested):
            results.append(verdicts)
            print(verdicts.row(), flush=True)
            if verdicts.failure or args.show:
                print("\n".join([verdicts.failure, *verdicts.survived.values()]))
            if args.out and not verdicts.failure:
                args.out.mkdir(parents=True, exist_ok=True)
                path = kept_path(args.out, verdicts.module)
                path.write_text(json.dumps(asdict(verdicts), indent=1), encoding="utf-8")
    if args.write:
        write_table(args.write, results)
    caught, explained, survived = (
        sum(len(getattr(verdicts, name)) for verdicts in results) for name in ("caught", "explained", "survived")
    )
    part = caught / max(caught + survived, 1)
    print(f"{'all':40} {caught + explained + survived:8} {caught:7} {explained:10} {survived:9}   {part:.1%}")
    return int(part < TARGET or any(verdicts.failure for verdicts in results))


if __name__ == "__main__":
    sys.exit(main())
