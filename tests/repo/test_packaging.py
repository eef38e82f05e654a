"""The wheel: its content and size, and that it works outside the repository."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from dream_fast.bench.__main__ import COMMANDS, NEED_REPOSITORY

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ("kernels", "engine", "bench")
MODEL, REPORT = "engine/dream_mini/weights", "engine/export/report.html"
MAX_MODEL_BYTES, MAX_CODE_BYTES = 64_000_000, 1_000_000


# Distributions that have another name than what is imported.
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image"}
# Needed without being imported by us.
INDIRECT = {
    "accelerate": "diffusers and transformers load weights without a second copy with it",
    "sentencepiece": "transformers reads IF's tokenizer with it",
    "ftfy": "diffusers cleans the prompts of PRX with it",
    "protobuf": "transformers reads IF's tokenizer with it",
    "tensorboard": "torch.utils.tensorboard writes with it",
    "debugpy": "its command is started",
    "mypy": "its command is started",
    "ruff": "its command is started",
    "pytest-benchmark": "a fixture of pytest",
    "pytest-timeout": "a setting of pytest",
    "pytest-xdist": "an option of make test",
}


def declared(requirements: list[str]) -> set[str]:
    """Names of distributions in requirements with versions and markers."""
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Names that a file imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return frozenset(name.split(".")[0] for name in names)


def imported(files: list[Path]) -> set[str]:
    """Names of the distributions that files import, without the standard library."""
    names = frozenset().union(*map(imports, files)) - {*sys.stdlib_module_names, "dream_fast"}
    return {DISTRIBUTIONS.get(name, name.lower().replace("_", "-")) for name in names}


PROJECT = PYPROJECT["project"]
OWN = [ROOT / "__init__.py", ROOT / "cli.py", *(path for top in PACKAGES for path in (ROOT / top).rglob("*.py"))]
TESTS = [*(ROOT / "tests").rglob("*.py"), *(path for path in OWN if path.name.startswith("test_"))]


def test_imports_declared():
    """Imports of the package are dependencies, and those of the tests are in the extra `test`."""
    needs = declared(PROJECT["dependencies"])
    imports_of_package = imported([path for path in OWN if path not in TESTS])
    assert {"torch", "pillow", "fast-simplification"} <= imports_of_package <= needs
    assert imported(TESTS) <= needs | declared(PROJECT["optional-dependencies"]["test"])


def test_dependencies_needed():
    """Every dependency is imported or has another reason."""
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
    for top in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    process = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert process.returncode == 0, process.stdout + process.stderr
    return next(folder.glob("*.whl"))


def test_packages_declared():
    """A folder with code has an `__init__.py` and is listed in pyproject.toml."""
    folders = {path.parent.relative_to(ROOT) for top in PACKAGES for path in (ROOT / top).rglob("__init__.py")}
    names = {".".join(("dream_fast", *folder.parts)) for folder in folders} | {"dream_fast"}
    assert names == set(PYPROJECT["tool"]["setuptools"]["packages"])
    assert {path.parent.relative_to(ROOT) for top in PACKAGES for path in (ROOT / top).rglob("*.py")} == folders


def test_wheel_contents(wheel):
    """The wheel has every module, the image model and the template of the report, and nothing else."""
    modules = [*ROOT.glob("*.py"), *(path for top in PACKAGES for path in (ROOT / top).rglob("*.py"))]
    data = [ROOT / REPORT, *(path for path in (ROOT / MODEL).rglob("*") if path.is_file())]
    expected = {f"dream_fast/{path.relative_to(ROOT).as_posix()}" for path in [*modules, *data]}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert any(name.startswith(f"dream_fast/{MODEL}/unet/") and name.endswith(".safetensors") for name in names)


def test_wheel_size(wheel):
    """Without the weights of the image model the wheel is small."""
    files = zipfile.ZipFile(wheel).infolist()
    model = sum(file.compress_size for file in files if file.filename.startswith(f"dream_fast/{MODEL}/"))
    assert model <= MAX_MODEL_BYTES
    assert sum(file.compress_size for file in files) - model <= MAX_CODE_BYTES


@pytest.fixture(scope="module")
def run_installed(wheel, tmp_path_factory):
    """Run Python with the wheel unpacked and no repository; returns the finished process."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    environment = os.environ | {"PYTHONPATH": str(folder / "site"), "HOME": str(folder)}

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)

    return run


def test_wheel_finds_the_model(run_installed):
    """The image model is found in the installed package."""
    code = (
        "from pathlib import Path; import dream_fast; from dream_fast.engine.dream_mini import MODEL_FOLDER as model;"
        "print(model.relative_to(Path(dream_fast.__file__).parent), (model / 'model_index.json').is_file())"
    )
    result = run_installed("-c", code)
    assert result.stdout.split() == [MODEL, "True"], result.stderr


def test_wheel_modules(run_installed):
    """Every module imports without the repository; so does what the self test of `--doctor` needs."""
    modules = [
        ".".join(("dream_fast", *path.relative_to(ROOT).with_suffix("").parts))
        for path in OWN
        if path.name not in ("__init__.py", "__main__.py") and path not in TESTS
    ]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    result = run_installed("-c", code, *modules)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_wheel_doctor(run_installed):
    """`--doctor` works without the repository. Without triton it skips the self test, which takes half a minute."""
    code = "import sys; sys.modules['triton'] = None; from dream_fast.cli import main; sys.exit(main(['--doctor']))"
    result = run_installed("-c", code)
    assert result.stderr == "" and "torch" in result.stdout


def test_wheel_bench_commands(run_installed):
    """A benchmark from a wheel prints its help, or one sentence with what it needs."""
    result = run_installed("-m", "dream_fast.bench")
    assert all(name in result.stdout for name in COMMANDS)
    code = "import sys; from dream_fast.bench.__main__ import main; sys.exit(main([sys.argv[1], *sys.argv[2:]]))"
    for name in NEED_REPOSITORY:
        result = run_installed("-c", code, name)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: `bench {name}` needs the repository: ")


def test_wheel_bench_writes_beside_the_caller(run_installed):
    """A measurement from a wheel writes into the current folder, not into the package."""
    code = "from pathlib import Path; from dream_fast.bench.results import RESULTS; print(RESULTS == Path.cwd())"
    assert run_installed("-c", code).stdout.strip() == "True"


def test_wheel_metadata(wheel):
    """The wheel declares the command, the licence and the dependencies."""
    archive = zipfile.ZipFile(wheel)
    info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    assert "dream-fast = dream_fast.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    needs = [
        line for line in archive.read(f"{info}/METADATA").decode().splitlines() if line.startswith("Requires-Dist")
    ]
    assert "Requires-Dist: torch>=2.10" in needs
    assert not any("torchvision" in line for line in needs), "its CUDA wheel does not import beside a CPU torch"
