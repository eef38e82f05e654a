"""`make` prepares an environment once, and chooses torch and triton by the machine and the environment."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

# Stands in for .venv/bin/python: prints the torch that is "installed", and notes every pip command.
PYTHON = """#!/bin/sh
case "$1" in
  .ci/torch_build.py) cat torch_build ;;
  -m) echo "$*" >> pip.log
      case "$*" in *"install torch"*) echo "$BRINGS" > torch_build ;; esac ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Run make on copies of our files, with a fake Python and GPU, and return the arguments of pip."""
    for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    for name in (".venv/bin", "path"):
        (tmp_path / name).mkdir(parents=True)

    def run(target: str, *, torch_build: str, brings: str = "", gpu: bool = False) -> list[str]:
        for name, text in (
            (".venv/bin/python", PYTHON),
            ("path/nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 1}\n"),
        ):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        (tmp_path / "torch_build").write_text(torch_build)
        (tmp_path / "pip.log").write_text("")
        path = f"{tmp_path / 'path'}{os.pathsep}{os.environ['PATH']}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        subprocess.run(
            ["make", target], cwd=tmp_path, env=environment | {"PATH": path, "BRINGS": brings}, check=True,
            capture_output=True,
        )  # fmt: skip
        return [line.split(" install ")[1] for line in (tmp_path / "pip.log").read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    ("machine", "installed"),
    [
        (dict(torch_build="none", brings="cpu"), ["torch -c constraints-cpu.txt", "-e .[test] triton==3.6.0"]),
        (dict(torch_build="none", brings="gpu"), ["torch -c constraints-cpu.txt", "-e .[test]"]),
        (dict(torch_build="none", brings="gpu", gpu=True), ["torch>=2.10", "-e .[test]"]),
        (dict(torch_build="old", brings="cpu"), ["torch -c constraints-cpu.txt", "-e .[test] triton==3.6.0"]),
        (dict(torch_build="cpu"), ["-e .[test] triton==3.6.0"]),
        (dict(torch_build="gpu", gpu=True), ["-e .[test]"]),
    ],
)
def test_make_chooses_torch(make, machine, installed):
    """Torch and Triton follow the GPU and the installed torch."""
    assert make(".venv/.installed-test", **machine) == installed


def test_make_installs_once(make):
    """The second time nothing is installed."""
    assert make(".venv/.installed", torch_build="cpu") == ["-e . triton==3.6.0"]
    assert make(".venv/.installed", torch_build="cpu") == []
    assert make(".venv/.installed-test", torch_build="cpu") == ["-e .[test] triton==3.6.0"]
    assert make(".venv/.installed", torch_build="cpu") == []


# What `make` starts, by the words that tell it apart, and the program that is to fail.
CHECKS = {
    "lint": "-m ruff check",
    "format": "-m ruff format --check",
    "types": ".ci/check_types.py",
    "tests": "-m pytest -n 2 --dist worksteal;;1;",
    "interpreted": "-m pytest -n 2 --dist worksteal tests/kernels/triton;1;1;",
}
FAILS = """#!/bin/sh
echo "$*;$TRITON_INTERPRET;$OMP_NUM_THREADS;" >> "$SEEN"
case "$*;$TRITON_INTERPRET;$OMP_NUM_THREADS;" in *"$FAILING"*) exit 1 ;; esac
"""
# As NVIDIA's: errors that it sees change its exit status with --error-exitcode only.
SANITIZER = """#!/bin/sh
echo "$*" >> "$SEEN"
while [ $# -gt 0 ]; do
  if [ "$1" = --error-exitcode ]; then status=$2; fi
  shift
done
exit ${status:-0}
"""


@pytest.fixture
def make_installed(tmp_path):
    """Run make with everything installed and fake programs; returns its exit status and the calls."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    for name in ("pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = {".venv/bin/python": FAILS, "path/compute-sanitizer": SANITIZER}
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in (".torch", ".installed", ".installed-test"):
        (tmp_path / ".venv" / name).touch()

    def run(target: str, failing: str = "nothing") -> tuple[int, str]:
        log = tmp_path / "seen"
        log.write_text("")
        path = f"{tmp_path / 'path'}{os.pathsep}{os.environ['PATH']}"
        left_out = ("TRITON_INTERPRET", "OMP_NUM_THREADS")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in left_out}
        environment |= {"PATH": path, "FAILING": failing, "SEEN": str(log)}
        process = subprocess.run(["make", target], cwd=tmp_path, env=environment, capture_output=True)
        return process.returncode, log.read_text()

    return run


@pytest.mark.parametrize("check", CHECKS)
def test_make_test_runs_checks(make_installed, check):
    """`make test` runs linter, formatter, types, tests and interpreted kernels, and fails if one of them does."""
    status, log = make_installed("test")
    assert status == 0 and all(words in log for words in CHECKS.values())
    status, log = make_installed("test", failing=CHECKS[check])
    assert status != 0 and CHECKS[check] in log


def test_make_sanitize_fails(make_installed):
    """An error of a kernel's access that the sanitizer reports fails `make sanitize`."""
    status, log = make_installed("sanitize")
    assert status != 0 and "--tool memcheck" in log and "-m pytest tests/kernels/triton -m gpu" in log


def test_torch_build_without_import():
    """The build of torch is read without importing it."""
    command = [sys.executable, "-X", "importtime", ROOT / ".ci" / "torch_build.py"]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert process.stdout.strip() == ("cpu" if torch.version.cuda is None and torch.version.hip is None else "gpu")
    assert "torch._C" not in process.stderr


@pytest.mark.parametrize(("base", "target"), [(None, ["test"]), ("", ["test"]), ("v1.0", ["test", "timing BASE=v1.0"])])
def test_ci_run_timing(tmp_path, base, target):
    """.ci/run compares speed where TIMING_BASE names a commit, and only there."""
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\n')
    make.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "TIMING_BASE"}
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment |= {} if base is None else {"TIMING_BASE": base}
    subprocess.run([ROOT / ".ci" / "run"], env=environment, check=True)
    assert (tmp_path / "asked").read_text().splitlines() == target


@pytest.mark.parametrize(("words", "end"), [([], "timing "), (["BASE=v1.0"], "timing --base 'v1.0'")])
def test_make_timing_base(words, end):
    """BASE is passed on; without it the command chooses one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--no-print-directory", "timing", *words]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1].endswith(f"-m dream_fast.bench {end}")


# A process that holds nothing, whose child holds 100 MB until its input ends.
HOLD = """
import subprocess, sys
code = "memory = b'x' * 100_000_000; print('held', flush=True); input()"
raise SystemExit(subprocess.call([sys.executable, "-c", code]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the script reads Linux's /proc")
def test_peak_memory_counts_children(capfd):
    """The memory of a child counts once, and the exit status of the command is passed on."""
    script = runpy.run_path(ROOT / ".ci" / "peak_memory.py")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == b"held\n"
        (child,) = script["descendants"](process.pid) - {process.pid}
        assert script["proportional_bytes"](child) > 100e6 > script["proportional_bytes"](process.pid) > 0
        process.communicate(b"\n")
    assert script["proportional_bytes"](child) == 0
    assert script["main"]([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert capfd.readouterr().err.startswith("peak memory ")


def test_scripts_hide_no_standard_module():
    """A script's folder is searched first, so a `types.py` there breaks every import."""
    scripts = [path for folder in (".ci", "tests/planted") for path in (ROOT / folder).glob("*.py")]
    assert len(scripts) > 3 and not {path.stem for path in scripts} & sys.stdlib_module_names
