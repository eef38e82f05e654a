"""Check the types of engine/, kernels/, bench/ and cli.py with mypy: `python -P .ci/check_types.py`.

The repository is the package `dream_fast`, which mypy finds through a link in its cache folder. The bodies of Triton
kernels are another language in Python's syntax, so errors in functions under `@jit` do not count.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "kernels", "bench")
LINE = re.compile(r"(?P<path>[^:]+\.py):(?P<line>\d+): (?P<kind>error|note): ")


def link_package(folder: Path) -> Path:
    """Return a folder in which `dream_fast` is a link to the repository."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "dream_fast"
    if not link.is_symlink() or link.readlink() != ROOT:
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT)
    return folder


def kernel_lines(source: str) -> set[int]:
    """Return the numbers of the lines of a file that belong to functions under `@jit`."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d).split(".") for d in node.decorator_list):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def host_errors(output: str, root: Path) -> list[str]:
    """Return mypy's lines about host code, with paths from the repository's root."""
    errors = []
    for line in output.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        name = match["path"].partition("dream_fast/")[2] or match["path"]
        if int(match["line"]) not in kernel_lines((root / name).read_text(encoding="utf-8")):
            errors.append(name + line[match.end("path") :])
    return errors


def main() -> int:
    path = link_package(ROOT / ".mypy_cache" / "path")
    targets = [word for name in PACKAGES for word in ("-p", f"dream_fast.{name}")]
    command = [sys.executable, "-P", "-m", "mypy", *targets, "-m", "dream_fast.cli"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"MYPYPATH": str(path)}, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        print(result.stdout + result.stderr, file=sys.stderr)
        return result.returncode
    errors = host_errors(result.stdout, ROOT)
    print("\n".join(errors) or "types: no errors")
    return min(len(errors), 1)


if __name__ == "__main__":
    sys.exit(main())
