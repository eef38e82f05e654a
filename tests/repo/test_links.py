"""The documents: links and files exist, and the two most read ones stay short."""

import re
from pathlib import Path

import pytest

import dream_fast

ROOT = Path(dream_fast.__file__).parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# Files of the tree as a page names them: `engine/run.py`, `bench/results/nvidia-h200.json`.
NAMED_FILE = re.compile(r"`((?:engine|kernels|bench|tests|docs|\.ci)/[\w./-]*\w\.\w+)`")
MAX_LINES = {"README.md": 120, "CONTRIBUTING.md": 150}
PLACEHOLDERS = ("VERSION", "YYYY-MM")  # names of files that a page leaves open
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="an installed package carries no docs")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, spelt as GitHub spells them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page that lead to no file or no heading."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_links_exist(page):
    """Every relative link leads to a file, and to a heading of it."""
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_files_exist(page):
    """Every file of the tree that a page names exists; the log may have earlier names."""
    if page.parent.name == "log":
        pytest.skip("history")
    names = [ROOT / name for name in NAMED_FILE.findall(page.read_text(encoding="utf-8"))]
    assert [name for name in names if name.stem not in PLACEHOLDERS and not name.exists()] == []


def test_readme_names_exist():
    """Names that the README locates in a file are defined there."""
    places = re.findall(r"`([\w.]+)` in \[([\w/.]+)\]", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(places) >= 3
    for name, path in places:
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b", (ROOT / path).read_text(encoding="utf-8")), (name, path)


def test_page_sizes():
    """README and CONTRIBUTING stay short."""
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in MAX_LINES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES[name]} == {}
    assert (ROOT / "PROFILING.md").stat().st_size <= 12 * 1024


def test_broken_links_are_seen(tmp_path):
    """A link without a file and a link without its heading are found."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A title: here\n[a](#a-title-here) [b](#none) [c](gone.md) [d](page.md#none) [e](https://x.org/y)"
    )
    assert broken_links(page) == ["#none", "gone.md", "page.md#none"]
