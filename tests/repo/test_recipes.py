"""CONTRIBUTING.md: each recipe is followed literally in a copy of the tree, and its result works."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dream_fast

ROOT = Path(dream_fast.__file__).parent
PAGE = ROOT / "CONTRIBUTING.md"
RECIPES = ["A setting", "A guidance", "An operator", "A preset", "An output"]
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="an installed package carries no documents")


def recipes() -> dict[str, list[tuple[str, str]]]:
    """Return the blocks (language, text) of each recipe, by its title."""
    parts = re.split(r"^### (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    blocks = {}
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        recipe = text.partition("\n## ")[0]
        blocks[title] = re.findall(r"^```(\w+)\n(.*?)^```$", recipe, flags=re.MULTILINE | re.DOTALL)
    return blocks


def apply_changes(tree: Path, block: str) -> None:
    """Apply a block: `+++` and a file, then changes between `@@`: lines that stay (" "), go ("-") and come ("+")."""
    for part in block.removeprefix("+++ ").split("\n+++ "):
        name, _, text = part.partition("\n")
        path = tree / name
        for change in text.split("@@\n"):
            lines = change.splitlines()
            old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
            new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
            source = path.read_text(encoding="utf-8") if old else ""
            assert not old or source.count(old) == 1, f"{name}: {old!r} is there {source.count(old)} times"
            path.write_text(source.replace(old, new) if old else new, encoding="utf-8")


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the sources, with links to the weights and without results."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "weights", "results", "fixtures", "*.safetensors")
    for name in ("engine", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("__init__.py", "__main__.py", "cli.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    for name in ("engine/dream_mini/weights", "bench/results"):
        (tree / name).symlink_to(ROOT / name)
    (tree / "docs").mkdir()
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "dream_fast").symlink_to(tree)
    return tree


def follow(tree: Path, title: str) -> str:
    """Apply the changes of a recipe and run its commands; returns their output."""
    output = ""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(tree.parent / "path")}
    for language, text in recipes()[title]:
        if language == "diff":
            apply_changes(tree, text)
        else:
            result = subprocess.run(
                ["bash", "-ec", text], cwd=tree, env=environment, capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, f"{text}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
            output += result.stdout
    return output


def test_recipes_are_tested():
    """Each recipe of the page has a test, and consists of changes and commands."""
    assert list(recipes()) == RECIPES
    assert {language for blocks in recipes().values() for language, _ in blocks} == {"diff", "sh"}


def test_setting(tree):
    """The flag is parsed, has its default, and is on the page of options."""
    output = follow(tree, "A setting")
    assert '"warmup": 20' in output
    assert "`--warmup`" in (tree / "docs" / "options.md").read_text(encoding="utf-8")


def test_guidance(tree):
    """A run uses the guidance, and each step has its loss."""
    follow(tree, "A guidance")
    config = json.loads((tree / "red" / "config.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (tree / "red" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert config["guidance"]["guidance"] == ["red"]
    assert len(rows) == 4 and all(row["loss_guidance"] > 0 for row in rows)


def test_preset(tree):
    """A run starts from the preset."""
    assert '"iters": 200' in follow(tree, "A preset")


def test_output(tree):
    """A run writes the output."""
    follow(tree, "An output")
    assert "hamburger" in (tree / "trial" / "results" / "settings.txt").read_text(encoding="utf-8")


def test_operator(tree):
    """The operator has a reference, a kernel that agrees with it, a benchmark and an ahead-of-time entry."""
    output = follow(tree, "An operator")
    assert "scaled_sum" in (tree / "new.json").read_text(encoding="utf-8")
    assert "scaled_sum/vae" in output and "scaled_sum_fwd_kernel" in output
