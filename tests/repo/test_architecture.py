"""The import rules of the rooms, read from the source, and that the package works without triton."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("kernels", "engine", "bench")
FILES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
MOST_LINES = 600


def imports(tree: ast.AST) -> list[str]:
    """Dotted names that a file imports; ``from a import b`` counts as ``a.b``, a relative import starts with a dot."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def faults(room: str, source: str) -> list[str]:
    """What a file of ``room`` (kernels, engine, bench, or "" for the root) imports against the rules."""
    found = []
    for name in imports(ast.parse(source)):
        top, ours = name.split(".")[0], name.removeprefix("dream_fast.").split(".") if "dream_fast." in name else []
        target = ours[0] if ours else ""
        if name.startswith("."):
            found.append(f"relative import {name}")
        elif top in (*ROOMS, "cli", "tests"):
            found.append(f"{name} instead of dream_fast.{name}")
        elif name.endswith(".*"):
            found.append(f"star import {name}")
        elif target == "tests" or (target == "cli" and room):
            found.append(f"{room} imports {name}")
        elif room == "kernels" and (target not in ("", "kernels") or not _allowed_beside_kernels(top)):
            found.append(f"kernels imports {name}")
        elif room == "engine" and (target == "bench" or top == "triton"):
            found.append(f"engine imports {name}")
        elif room == "engine" and target == "kernels" and any(part.startswith("_") for part in ours):
            found.append(f"engine imports {name}, which is not public")
    return found


def _allowed_beside_kernels(top: str) -> bool:
    return top in ("torch", "triton", "dream_fast") or top in sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path):
    parts = path.relative_to(ROOT).parts
    source = path.read_text(encoding="utf-8")
    assert faults(parts[0] if len(parts) > 1 else "", source) == []
    assert source.count("\n") <= MOST_LINES


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("kernels", "from dream_fast.engine import camera"),
        ("kernels", "import dream_fast.bench.run"),
        ("kernels", "import numpy"),
        ("kernels", "from .hash_grid import hash_grid"),
        ("engine", "def late():\n    import triton.language as tl"),
        ("engine", "from dream_fast.bench import measure"),
        ("engine", "from dream_fast.kernels import _launch"),
        ("engine", "from dream_fast.kernels._core.launch import check"),
        ("engine", "from kernels import hash_grid"),
        (
            "engine",
            "from dream_fast.engine.config.schema import *",
        ),  # text for the rule to refuse, parsed, never imported
        ("bench", "from dream_fast.cli import main"),
        ("bench", "from tests.conftest import tiny_model"),
    ],
)
def test_the_rules_catch_a_planted_fault(room, line):
    assert len(faults(room, line)) == 1


def test_everything_imports_without_triton_and_says_nothing():
    # None in sys.modules makes every later `import triton` fail, as on a machine that has none.
    modules = [
        ".".join(["dream_fast", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        for path in FILES
        if path.relative_to(ROOT).parts[0] in ("kernels", "engine") and path.name != "__main__.py"
    ]
    code = (
        "import importlib, sys\nsys.modules['triton'] = None\nfor name in sys.argv[1:]: importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
