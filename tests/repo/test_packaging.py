"""The wheel: every module and data file is in it, nothing else, and it works outside the repository."""

import ast
import functools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = ("kernels", "engine", "bench")
DATA = ("engine/dream_mini/weights", "bench/quality/classifier", "bench/results")


# Distributions that have another name than what is imported.
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image"}
# Needed without being imported by us.
INDIRECT = {
    "accelerate": "diffusers and transformers load weights without a second copy with it",
    "sentencepiece": "transformers reads IF's tokenizer with it",
    "protobuf": "transformers reads IF's tokenizer with it",
    "tensorboard": "torch.utils.tensorboard writes with it",
    "debugpy": "its command is started",
    "ruff": "its command is started",
    "pytest-benchmark": "a fixture of pytest",
    "pytest-timeout": "a setting of pytest",
    "pytest-xdist": "an option of make test",
}


def declared(requirements: list[str]) -> set[str]:
    """Names of distributions, of requirements with versions and markers."""
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """What a file imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return frozenset(name.split(".")[0] for name in names)


def imported(files: list[Path]) -> set[str]:
    """Names of the distributions that files import; the standard library apart."""
    names = frozenset().union(*map(imports, files)) - {*sys.stdlib_module_names, "dream_fast"}
    return {DISTRIBUTIONS.get(name, name.lower().replace("_", "-")) for name in names}


PROJECT = PYPROJECT["project"]
OWN = [ROOT / "__init__.py", ROOT / "cli.py", *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
TESTS = [*(ROOT / "tests").rglob("*.py"), *(path for path in OWN if path.name.startswith("test_"))]


def test_every_import_is_declared():
    """What the package imports is installed with it, and what the tests import besides with the extra `test`."""
    needs = declared(PROJECT["dependencies"])
    ours = imported([path for path in OWN if path not in TESTS])
    assert {"torch", "pillow", "fast-simplification"} <= ours <= needs
    assert imported(TESTS) <= needs | declared(PROJECT["optional-dependencies"]["test"])


def test_every_dependency_is_needed():
    """What is installed is imported, or there is another reason."""
    extras = [name for group in PROJECT["optional-dependencies"].values() for name in group]
    needs = declared([*PROJECT["dependencies"], *extras])
    assert needs <= imported(OWN) | imported(TESTS) | INDIRECT.keys()
    assert INDIRECT.keys() <= needs - imported([path for path in OWN if path not in TESTS])


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
