"""The tool for mutation tests: drawing and keeping mutants, and estimates from samples."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SPEC = importlib.util.spec_from_file_location("mutants", Path(__file__).parents[2] / ".ci" / "mutants.py")
mutants = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = mutants  # where dataclasses look for it
SPEC.loader.exec_module(mutants)


def make_verdicts(module: str, caught: int, survived: int, total: int) -> "mutants.Verdicts":
    names = [f"{module}_{number}" for number in range(caught + survived)]
    return mutants.Verdicts(module, names[:caught], survived=dict.fromkeys(names[caught:], ""), made=total)


def test_estimate_share_whole():
    """The share is exact, without an error, if all mutants are tested."""
    results = [make_verdicts("a", 9, 1, 10), make_verdicts("b", 30, 0, 30)]
    assert mutants.estimate_share(results) == (39 / 40, 0)


def test_estimate_share_samples():
    """Mean and spread of estimates over every sample of 3 of 6 mutants are the share and the stated error."""
    caught = [True] * 4 + [False] * 2
    samples = [sum(sample) for sample in itertools.combinations(caught, 3)]
    shares = [mutants.estimate_share([make_verdicts("a", number, 3 - number, 6)]) for number in samples]
    mean = sum(share for share, _ in shares) / len(shares)
    variance = sum((share - mean) ** 2 for share, _ in shares) / len(shares)
    assert round(mean, 12) == round(4 / 6, 12)
    assert round(sum(error**2 for _, error in shares) / len(shares), 12) == round(variance, 12)


def test_draw_mutants_nested(monkeypatch, tmp_path):
    """A larger sample has all of a smaller one; another seed draws others."""
    monkeypatch.setattr(mutants, "run_mutmut", lambda *_: None)
    monkeypatch.setattr(mutants, "read_verdicts", lambda *_: dict.fromkeys(map(str, range(50))))
    few, more, other = (
        mutants.draw_mutants(tmp_path, "a.py", SimpleNamespace(sample=sample, seed=seed))
        for sample, seed in ((5, 0), (20, 0), (5, 1))
    )
    assert more[0][:5] == few[0] != other[0] and len(set(more[0])) == 20 and more[1] == few[1] == 50


@pytest.mark.parametrize(("source", "known"), [("same", ["a_0", "a_1"]), ("changed", [])])
def test_read_caught(tmp_path, source, known):
    """Caught mutants are remembered while their module is unchanged; survivors are not."""
    verdicts = make_verdicts("a", 2, 1, 3)
    verdicts.source = "same"
    mutants.kept_path(tmp_path, "a").write_text(mutants.json.dumps(mutants.asdict(verdicts)))
    assert mutants.read_caught("a", SimpleNamespace(out=tmp_path), source) == known


def test_write_table(tmp_path):
    """The table has a row for each module and their sum, and the text around it stays."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{mutants.START}\nold\n{mutants.END}\nafter\n")
    mutants.write_table(page, [make_verdicts("b", 30, 0, 30), make_verdicts("a", 4, 1, 10)])
    assert page.read_text().split("|---|---|---|---|---|---|---|\n")[1].splitlines() == [
        "| `a` | 10 | 5 | 4 | 0 | 1 | 80% |",
        "| `b` | 30 | 30 | 30 | 0 | 0 | 100% |",
        "| all | 40 | 35 | 34 | 0 | 1 | 95.0% ± 6.9% |",
        mutants.END,
        "after",
    ]
