"""The wheel: every module and data file is in it, nothing else, and it works outside the repository."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = ("kernels", "engine", "bench")
DATA = ("engine/prior/dream-mini", "bench/judge", "bench/results")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the working tree, built from a copy, because a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py", "__main__.py", "cli.py"):
        shutil.copy(ROOT / name, source)
    for room in (*ROOMS, "tests"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_every_package_is_declared():
    found = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")}
    names = {".".join(("dream_fast", *folder.parts)) for folder in found} | {"dream_fast"}
    assert names == set(PYPROJECT["tool"]["setuptools"]["packages"])
    folders_with_code = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert folders_with_code == found, "a folder with code and no __init__.py is left out of the wheel"


def test_the_wheel_holds_the_modules_the_weights_and_nothing_else(wheel):
    modules = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    data = [path for folder in DATA for path in (ROOT / folder).rglob("*") if path.is_file()]
    data.append(ROOT / "engine/export/report.html")
    expected = {f"dream_fast/{path.relative_to(ROOT).as_posix()}" for path in [*modules, *data]}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert any(name.startswith("dream_fast/engine/prior/dream-mini/unet/") for name in names)
    assert any(name.endswith(".safetensors") for name in names)


def test_the_wheel_works_where_there_is_no_repository(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
import dream_fast
from dream_fast.engine.prior import MODEL_FOLDER
print(dream_fast.__file__, (MODEL_FOLDER / "model_index.json").is_file(), MODEL_FOLDER)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [
        str(site / "dream_fast" / "__init__.py"),
        "True",
        str(site / "dream_fast" / "engine" / "prior" / "dream-mini"),
    ], done.stderr


def test_the_wheel_declares_the_command_the_licence_and_its_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    assert "dream-fast = dream_fast.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    needs = [
        line for line in archive.read(f"{info}/METADATA").decode().splitlines() if line.startswith("Requires-Dist")
    ]
    assert "Requires-Dist: torch>=2.10" in needs
    assert not any("torchvision" in line for line in needs), "its CUDA wheel does not import beside a CPU torch"
