"""The lists of planted faults fit the kernels, and the tool that runs them tells caught from missed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("planted_run", Path(__file__).with_name("run.py"))
run = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = run  # where dataclasses look for it
SPEC.loader.exec_module(run)

KERNEL = """
@jit
def half_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0) / 2, mask=at < n)
"""
LIST = """
file = "kernels/half.py"
tests = ["tests/test_half.py::test_half"]

[half_kernel]
faults = [{ kind = "term", old = "/ 2", new = "/ 3" }]
"""
TEST = "def test_half(): ...\n"


@pytest.fixture
def tree(tmp_path):
    """A tree with one kernel, one test and a list of one fault."""
    for name, text in (("kernels/half.py", KERNEL), ("tests/test_half.py", TEST), ("half.toml", LIST)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def list_problems(tree) -> list[str]:
    return list(run.problems(run.read_faults([], tree), tree))


def test_every_fault_applies():
    """Each planted fault still fits its kernel, and each kernel function has one."""
    assert list(run.problems(run.read_faults([]))) == []


def test_problems_none(tree):
    """A list that fits has no problems."""
    assert list_problems(tree) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("kernels/half.py", "/ 2", "/ 4", "the old text occurs 0 times"),
        ("kernels/half.py", "/ 2", "/ 2 / 2", "the old text occurs 2 times"),
        ("kernels/half.py", "@jit\n", "", "has no such kernel function"),
        ("kernels/half.py", "@jit", "@jit\ndef other(): ...\n\n\n@jit", "half.py:other has no planted fault"),
        ("tests/test_half.py", "test_half", "test_whole", "there is no test tests/test_half.py::test_half"),
        ("half.toml", '"/ 3"', '"/ (3"', "the result is no Python"),
        ("half.toml", '"/ 3"', '"/ (2)"', "the result is the same program"),
        ("half.toml", "kernels/half.py", "kernels/third.py", "there is no such file"),
    ],
)
def test_problems_named(tree, file, old, new, problem):
    """A fault that no longer fits, or a kernel without one, is a problem."""
    path = tree / file
    path.write_text(path.read_text().replace(old, new))
    assert any(problem in line for line in list_problems(tree))


def test_read_faults_unknown_kind(tree):
    """A misspelled kind is refused."""
    (tree / "half.toml").write_text(LIST.replace("term", "tern"))
    with pytest.raises(ValueError, match="unknown kind"):
        run.read_faults([], tree)


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (0, "3 passed", "missed"),
        (1, "FAILED tests/a.py::test_b[1-x y] - AssertionError: values: error 1", "caught"),
        (1, "FAILED tests/a.py::test_b - assert 1 == 2", "caught"),
        (1, "FAILED tests/a.py::test_b - triton.runtime.errors.InterpreterError: AssertionError('outside')", "caught"),
        (1, "FAILED tests/a.py::test_b - triton.runtime.errors.InterpreterError: NameError('x')", "broke"),
        (1, "FAILED tests/a.py::test_b - NameError: name 'x' is not defined", "broke"),
        (2, "ERROR tests/a.py - SyntaxError", "broke"),
        (-11, "", "broke"),
    ],
)
def test_read_verdict(status, output, verdict):
    """Only a failed assertion counts as caught."""
    assert run.read_verdict(status, output)[0] == verdict


def test_run_faults_in_copies(monkeypatch, tmp_path):
    """Each run sees its own fault and no other, and the summary counts what was caught."""

    def pretend(tree, fault, first, output):
        planted = (tree / fault.file).read_text(encoding="utf-8")
        output.write_text(f"FAILED tests/a.py::{first or 'test_a'} - assert 0\n")
        os._exit("(product, 0.0)" in planted)

    monkeypatch.setattr(run, "run_tests", pretend)
    common = {"file": "kernels/rays/device.py", "function": "no_fma", "kind": "term", "old": "3.0e38", "tests": ()}
    caught, missed, again = (run.Fault(**common, new=new) for new in ("0.0", "2.0e38", "1.0e38"))
    verdicts = run.run_faults([caught, missed, again], 2, {})
    assert verdicts == {caught: ("caught", "tests/a.py::test_a"), missed: ("missed", ""), again: ("missed", "")}
    table = run.summary([caught, missed, again], verdicts).splitlines()
    assert table[2:] == ["| kernels/rays/device.py | functions of kernels | 3 | 1 | 0 |", "| all |  | 3 | 1 | 0 |"]

    kept, earlier = tmp_path / "kept.jsonl", {str(caught): ("caught", "test_b"), str(missed): ("broke", "test_c")}
    found = run.run_faults([caught, missed], 1, earlier, kept)
    assert found[caught] == ("caught", "tests/a.py::test_b")
    assert run.read_results(kept) == {str(fault): verdict for fault, verdict in found.items()}


def test_run_tests_first(tmp_path, capfd):
    """The test that caught a fault earlier runs alone; where it passes or is gone, the fault's tests follow."""
    path = tmp_path / "test_two.py"
    path.write_text("def test_good(): ...\ndef test_bad(): assert not 1\ndef test_worse(): assert not 2\n")
    fault = run.Fault("", "", "", "", "", (str(path),))
    for first, caught in (("worse", "not 2"), ("good", "not 1"), ("gone", "not 1"), ("", "not 1")):
        with capfd.disabled():
            process = os.fork()
            if process == 0:
                run.run_tests(tmp_path, fault, f"{path}::test_{first}" if first else "", tmp_path / "output")
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert run.read_verdict(status, (tmp_path / "output").read_text())[0] == "caught"
        assert f"assert {caught}" in (tmp_path / "output").read_text()


def test_results_run_no_more(monkeypatch, tmp_path, capsys):
    """A fault that the file of results has is not run again; it counts in the summary."""
    faults = run.read_faults(["adan"])
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(run.json.dumps([str(fault), "caught", "a"]) + "\n" for fault in faults[1:]))
    started = []
    monkeypatch.setattr(run, "run_faults", lambda waiting, *_: started.extend(waiting) or {faults[0]: ("missed", "")})
    monkeypatch.setattr(run, "SETTINGS", {})
    assert run.main(["adan", "--results", str(kept)]) == 1
    assert started == faults[:1]
    assert f"| all |  | {len(faults)} | {len(faults) - 1} | 0 |" in capsys.readouterr().out


def test_write_summary(tmp_path):
    """The table replaces what stands between the markers, and nothing else."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.START}\nold\n{run.END}\nafter\n")
    run.write_summary(page, "new")
    assert page.read_text() == f"before\n{run.START}\nnew\n{run.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="must have the lines"):
        run.write_summary(page, "new")


def test_named_tests_exist():
    """pytest finds every test that a list names, with its parameters."""
    names = sorted({test for fault in run.read_faults([]) for test in fault.tests if not fault.gpu})
    command = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *names]
    found = subprocess.run(
        command, cwd=run.ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    lines = (found.stdout + found.stderr).splitlines()
    assert [line for line in lines if line.startswith("ERROR")] == [] and found.returncode == 0
