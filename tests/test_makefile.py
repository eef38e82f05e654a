"""`make` prepares an environment once, and chooses torch and triton by what the machine and the environment have."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

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
    """Runs make on copies of our files, with a pretend Python and GPU, and returns what pip was told."""
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
    ("machine", "told"),
    [
        (dict(torch_build="none", brings="cpu"), ["torch -c constraints-cpu.txt", "-e .[test] triton==3.6.0"]),
        (dict(torch_build="none", brings="gpu"), ["torch -c constraints-cpu.txt", "-e .[test]"]),
        (dict(torch_build="none", brings="gpu", gpu=True), ["torch>=2.10", "-e .[test]"]),
        (dict(torch_build="old", brings="cpu"), ["torch -c constraints-cpu.txt", "-e .[test] triton==3.6.0"]),
        (dict(torch_build="cpu"), ["-e .[test] triton==3.6.0"]),
        (dict(torch_build="gpu", gpu=True), ["-e .[test]"]),
    ],
)
def test_torch_and_triton_follow_the_machine(make, machine, told):
    assert make(".venv/.installed-test", **machine) == told


def test_the_second_time_nothing_is_installed(make):
    assert make(".venv/.installed", torch_build="cpu") == ["-e . triton==3.6.0"]
    assert make(".venv/.installed", torch_build="cpu") == []
    assert make(".venv/.installed-test", torch_build="cpu") == ["-e .[test] triton==3.6.0"]
    assert make(".venv/.installed", torch_build="cpu") == []


def test_the_build_of_torch_is_read_without_importing_it():
    command = [sys.executable, "-X", "importtime", ROOT / ".ci" / "torch_build.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == ("cpu" if torch.version.cuda is None and torch.version.hip is None else "gpu")
    assert "torch._C" not in done.stderr


@pytest.mark.parametrize(("base", "asked"), [(None, ["test"]), ("", ["test"]), ("v1.0", ["test", "timing BASE=v1.0"])])
def test_what_decides_about_a_change_is_make_test_and_timing_only_with_a_base(tmp_path, base, asked):
    """.ci/run compares speed where TIMING_BASE names a commit, and only there."""
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\n')
    make.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "TIMING_BASE"}
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment |= {} if base is None else {"TIMING_BASE": base}
    subprocess.run([ROOT / ".ci" / "run"], env=environment, check=True)
    assert (tmp_path / "asked").read_text().splitlines() == asked


@pytest.mark.parametrize(("words", "end"), [([], "timing "), (["BASE=v1.0"], "timing --base 'v1.0'")])
def test_the_base_of_make_timing_is_handed_on(words, end):
    """Without BASE the command chooses one itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--no-print-directory", "timing", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].endswith(f"-m dream_fast.bench {end}")
