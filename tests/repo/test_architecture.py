"""The layers of the source: which package may import which, checked on the text of every file.

Imports inside functions and behind TYPE_CHECKING count as well. CONTRIBUTING.md explains the rules.
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "engine", "bench")
MODULES = {
    ".".join(["dream_fast", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted([*ROOT.glob("*.py"), *(path for top in PACKAGES for path in (ROOT / top).rglob("*.py"))])
}

# Each line may import from the lines above it, and from its own package. Packages on one line do not import each other.
LAYERS = {
    "engine": (
        ("errors", "text"),
        ("files",),
        ("config",),
        ("runtime", "geometry"),
        ("scene",),
        ("render", "workspace", "dream_mini"),
        ("guidance", "export"),
        ("training",),
        ("outputs",),
        ("run",),
    ),
    "kernels": (
        ("_core",),
        ("grid", "mesh", "nn", "optim"),
        ("fields",),
        ("rays",),
    ),
}

MAX_LINES = 500  # of a file, tests too


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> list[str]:
    """Return the dotted names that a file imports; `from a import b` is `a.b`, a relative import starts with a dot."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def import_faults(package: str, tree: ast.AST) -> list[str]:
    """Return the imports that `package` (kernels, engine, bench, or "" for the root) may not have."""
    faults = []
    for name in imports(tree):
        top = name.split(".")[0]
        path = name.removeprefix("dream_fast.").split(".") if top == "dream_fast" else [""]
        target = path[0]
        if name.startswith("."):
            faults.append(f"relative import {name}")
        elif top in (*PACKAGES, "cli", "tests"):
            faults.append(f"{name} instead of dream_fast.{name}")
        elif name.endswith(".*"):
            faults.append(f"star import {name}")
        elif target == "tests" or (target == "cli" and package):
            faults.append(f"{package} imports {name}")
        elif package == "kernels" and not _allowed_in_kernels(top, target):
            faults.append(f"kernels imports {name}")
        elif package == "engine" and (target == "bench" or top == "triton"):
            faults.append(f"engine imports {name}")
        elif package == "engine" and target == "kernels" and any(part.startswith("_") for part in path):
            faults.append(f"engine imports {name}, which is not public")
    return faults


def _allowed_in_kernels(top: str, target: str) -> bool:
    if top == "dream_fast":
        return target == "kernels"
    return top in ("torch", "triton") or top in sys.stdlib_module_names


def layer_faults(module: str, tree: ast.AST) -> list[str]:
    """Return the imports of `module` from another package of its own line of `LAYERS` or of a later line."""
    top, package, layer = _layer(module)
    if layer is None:
        return []
    faults = []
    for name in imports(tree):
        other_top, other_package, other_layer = _layer(name)
        if other_layer is not None and (other_top, other_layer >= layer) == (top, True) and other_package != package:
            faults.append(f"{module} imports {name}")
    return faults


def _layer(name: str) -> tuple[str, str, int | None]:
    """Return `engine`, `config` and the number of its line in `LAYERS` for `dream_fast.engine.config.schema`."""
    root, top, package, *_ = [*name.split("."), "", "", ""]
    numbers = [i for i, line in enumerate(LAYERS.get(top, ())) if package in line]
    return top, package, numbers[0] if root == "dream_fast" and numbers else None


def private_names(tree: ast.AST) -> list[str]:
    """Return private names of other modules that a file imports or reads as an attribute of a module."""
    modules = set()
    names = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("dream_fast"):
            continue
        for alias in node.names:
            if f"{node.module}.{alias.name}" in MODULES:
                modules.add(alias.asname or alias.name)
            elif _is_private(alias.name):
                names.append(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if _is_private(node.attr):
                names.append(f"{node.value.id}.{node.attr}")
    return names


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other (strongly connected components of more than one)."""
    reachable = {}
    for start in graph:
        visited, stack = set(), [start]
        while stack:
            for target in graph[stack.pop()] - visited:
                visited.add(target)
                stack.append(target)
        reachable[start] = visited
    groups = {tuple(sorted(b for b in reachable[a] if a in reachable[b])) for a in graph if a in reachable[a]}
    return sorted(map(list, groups))


def import_graph() -> dict[str, set[str]]:
    """Return the modules that each module imports."""
    graph = {}
    for module, path in MODULES.items():
        targets = set()
        for name in imports(parse(path)):
            targets |= {name, name.rpartition(".")[0]} & MODULES.keys()
        graph[module] = targets - {module}
    return graph


@pytest.mark.parametrize(("module", "path"), MODULES.items(), ids=MODULES)
def test_import_rules(module, path):
    """A file imports only what its package and its layer may, and no private names of others."""
    parts = path.relative_to(ROOT).parts
    tree = parse(path)
    assert import_faults(parts[0] if len(parts) > 1 else "", tree) == []
    assert layer_faults(module, tree) == []
    assert private_names(tree) == []


def test_layers_name_every_package():
    """A new package of the engine or the kernels has a place in the order."""
    for top, lines in LAYERS.items():
        names = {path.stem for path in (ROOT / top).glob("*.py")} - {"__init__"}
        names |= {path.parent.name for path in (ROOT / top).glob("*/__init__.py")}
        assert sorted(name for line in lines for name in line) == sorted(names)


def test_files_are_short():
    """No file of the sources or of the tests is longer than `MAX_LINES`."""
    paths = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    lengths = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in paths}
    assert lengths and {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_circles():
    """No module imports itself through others, also not inside functions or behind TYPE_CHECKING."""
    assert circles(import_graph()) == []


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("kernels", "from dream_fast.engine import camera"),
        ("kernels", "import dream_fast.bench.run"),
        ("kernels", "from dream_fast import engine"),
        ("kernels", "import numpy"),
        ("kernels", "from .hash_grid import hash_grid"),
        ("engine", "def late():\n    import triton.language as tl"),
        ("engine", "from dream_fast.bench import measure"),
        ("engine", "from dream_fast import bench"),
        ("engine", "from dream_fast.kernels import _launch"),
        ("engine", "from dream_fast.kernels._core.launch import check"),
        ("engine", "from kernels import hash_grid"),
        ("engine", "from dream_fast.engine.config.schema import *"),  # for the rule to refuse: parsed, never imported
        ("bench", "from dream_fast.cli import main"),
        ("bench", "from tests.conftest import tiny_model"),
    ],
)
def test_import_rules_catch_a_fault(package, line):
    """Each import rule refuses a line that breaks it."""
    assert len(import_faults(package, ast.parse(line))) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("engine.config.schema", "from dream_fast.engine.runtime import device"),
        ("engine.config.schema", "from dream_fast.engine import runtime"),
        ("engine.render.volume", "from dream_fast.engine.workspace.folder import Workspace"),
        ("engine.errors", "from dream_fast.engine.text import quote"),
        ("engine.training.trainer", "if TYPE_CHECKING:\n    from dream_fast.engine.run import run"),
        ("kernels.grid.hash_grid", "def late():\n    from dream_fast.kernels.fields.field import field"),
        ("kernels.grid.hash_grid", "from dream_fast.kernels.mesh import rasterize"),
    ],
)
def test_layers_catch_a_fault(module, line):
    """An import from a later layer, or from another package of the same layer, is refused."""
    assert len(layer_faults(f"dream_fast.{module}", ast.parse(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "from dream_fast.engine.export.charts import _digits",
        "from dream_fast.kernels.mesh import antialias\nantialias._pair",
        "from dream_fast.kernels.mesh import antialias as other\nother._pair()",
    ],
)
def test_private_names_are_seen(line):
    """A private name is seen as an import and as an attribute of an imported module."""
    assert len(private_names(ast.parse(line))) == 1


def test_circles_are_seen():
    """Circles of two and three modules are found, a chain is not one."""
    graph = {"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"e"}, "e": {"c"}, "f": {"a"}}
    assert circles(graph) == [["a", "b"], ["c", "d", "e"]]


def test_imports_without_triton():
    """The kernels and the engine import on a machine without triton."""
    # None in sys.modules makes every later `import triton` fail.
    modules = [name for name in MODULES if name.split(".")[1:2] in (["kernels"], ["engine"])]
    code = (
        "import importlib, sys\nsys.modules['triton'] = None\nfor name in sys.argv[1:]: importlib.import_module(name)"
    )
    result = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, cwd="/")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
