"""The tests in the table of faults exist."""

import re
from pathlib import Path

import pytest

import dream_fast

PAGE = Path(dream_fast.__file__).parent / "docs" / "reliability.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="an installed package carries no docs")


def test_every_row_names_a_test_that_exists():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.rsplit("|", 2)[1])
        assert named, row
        for file, test in named:
            source = next(Path(__file__).parents[1].rglob(file)).read_text(encoding="utf-8")
            assert re.search(rf"^def {test}\(", source, re.MULTILINE), test
