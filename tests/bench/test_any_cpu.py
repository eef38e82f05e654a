"""The runs on several processors: combinations, environment, counts and table."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("any_cpu", ROOT / ".ci" / "any_cpu.py")
any_cpu = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(any_cpu)

PLAIN = {"capability": "unset", "threads": 1, "bf16": "used"}
AS_AMD = {"capability": "avx2", "threads": 4, "bf16": "hidden"}
ROW = {"cpu": "A", "units": "none", "torch": "2", "python": "3", "passed": 5, "skipped": 1, "seconds": 2.4}


def test_combinations_cover_pairs():
    """Ten combinations have all pairs of values, as few as there can be, but bf16 on a processor without AVX-512."""
    taken, impossible = any_cpu.covering_combinations(), {("default", "used"), ("avx2", "used")}
    assert len(taken) == 10 and len(any_cpu.all_combinations()) == 12
    for (one, values), (other, others) in itertools.combinations(any_cpu.FACTORS.items(), 2):
        assert {(c[one], c[other]) for c in taken} == set(itertools.product(values, others)) - impossible


def test_environment(monkeypatch):
    """Every factor is set or unset, whatever the caller's environment has, and there is no GPU."""
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "of the caller")
    plain, amd = any_cpu.environment(PLAIN, interpreted=False), any_cpu.environment(AS_AMD, interpreted=True)
    assert not {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "TRITON_INTERPRET"} & plain.keys()
    assert (plain["OMP_NUM_THREADS"], amd["OMP_NUM_THREADS"], amd["ATEN_CPU_CAPABILITY"]) == ("1", "4", "avx2")
    assert (amd["ONEDNN_MAX_CPU_ISA"], amd["TRITON_INTERPRET"]) == ("AVX512_CORE_VNNI", "1")
    assert plain["CUDA_VISIBLE_DEVICES"] == amd["CUDA_VISIBLE_DEVICES"] == ""


def test_take_shard():
    """Three shards share the combinations; a shard past the last is refused."""
    combinations = any_cpu.all_combinations()
    shards = [any_cpu.take_shard(combinations, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(map(str, itertools.chain(*shards))) == sorted(map(str, combinations))
    with pytest.raises(ValueError, match="--shard must be I/N with I from 1 to N, got 4/3"):
        any_cpu.take_shard(combinations, "4/3")


def test_test_files():
    """The first combination has every test file, the others all but those that no processor can change."""
    first, *others = any_cpu.covering_combinations()
    files = set((ROOT / "tests").rglob("test_*.py"))
    once = {ROOT / name for name in any_cpu.ONCE}
    assert set(any_cpu.test_files(first)) == files and once < files
    assert all(set(any_cpu.test_files(combination)) == files - once for combination in others)


@pytest.mark.parametrize("name", any_cpu.ONCE)
def test_once_compares_no_numbers(name):
    """A file that runs in one combination only does not compare numbers of tensors."""
    words = ("bench.accuracy", "assert_close", "allclose", "approx(", "torch.equal", "rtol")
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [word for word in words if word in text] == []


TESTS = """
import os, pytest
def test_right(): assert os.environ["OMP_NUM_THREADS"] == "4"
def test_wrong(): assert False
@pytest.fixture
def broken(): raise OSError
def test_of_a_fixture(broken): pass
@pytest.mark.skip(reason="none")
def test_skipped(): pass
"""


def test_run_files_counts(tmp_path):
    """Passed, failed (in a test or its fixture) and skipped tests are told apart, with messages of failures."""
    path, out = tmp_path / "test_some.py", tmp_path / "rows.json"
    path.write_text(TESTS)
    for jobs in (1, 2):
        row = any_cpu.run_files(AS_AMD, [path], [], jobs)
        assert (row["passed"], row["skipped"]) == (1, 1)
        assert {name.split("::")[1] for name in row["failures"]} == {
            "test_wrong: assert False",
            'test_of_a_fixture: failed on setup with "OSError"',
        }
    assert any_cpu.main(["--only", str(path), "--shard", "1/10", "--out", str(out), "--", "-k", "wrong"]) == 1
    assert any_cpu.main(["--only", str(path), "--shard", "1/10", "--out", str(out), "--", "-k", "skipped"]) == 0
    (row,) = json.loads(out.read_text())
    assert (row["passed"], row["skipped"], row["failures"]) == (0, 1, [])


def test_run_files_of_a_dead_process(tmp_path):
    """A crash leaves no report of pytest, and is not taken for a file without failures."""
    path = tmp_path / "test_dies.py"
    path.write_text("import os\ndef test_dies(): os._exit(3)\n")
    (failure,) = any_cpu.run_files(PLAIN, [path], [], 1)["failures"]
    assert failure.startswith("pytest ended with status 3")
    (failure,) = any_cpu.run_files(PLAIN, [path], [], 2)["failures"]
    assert "test_dies" in failure and "crashed" in failure


def test_table_replaces_markers(tmp_path):
    """The document keeps its text around the table; without markers it is left alone."""
    document = tmp_path / "testing.md"
    document.write_text(f"before\n{any_cpu.START}\nold\n{any_cpu.END}\nafter\n")
    rows = [{**ROW, **PLAIN, "failures": []}, {**ROW, **AS_AMD, "units": "amx_bf16", "failures": ["a::b"]}]
    any_cpu.write_table(rows, document)
    text = document.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
    assert "| A | none | 2 | 3 | unset | 1 | 5 | 0 | 1 | 2 |" in text
    assert "| A | amx_bf16, hidden | 2 | 3 | avx2 | 4 | 5 | 1 | 1 | 2 |" in text
    document.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the lines"):
        any_cpu.write_table(rows, document)
    assert document.read_text() == "no markers"


def test_document_has_markers():
    """docs/testing.md has a place for the table."""
    text = any_cpu.DOCUMENT.read_text(encoding="utf-8")
    assert text.count(any_cpu.START) == text.count(any_cpu.END) == 1
