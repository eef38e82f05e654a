"""The page about command lines of stable-dreamfusion: every row has the present result of the command."""

import contextlib
import io
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import dream_fast
from dream_fast.bench.compat import command_lines
from dream_fast.bench.compat.command_lines import LINES, STEPS, CommandLine, Outcome, adapt_words, format_row, run_line
from dream_fast.cli import main, parse

ROOT = Path(dream_fast.__file__).parent
PAGE = ROOT / "docs" / "coming_from_stable_dreamfusion.md"
TINY = """
    --iters 2 --device cpu --w 8 --h 8 --W 8 --H 8 --dataset_size_test 2 --dataset_size_valid 1 --n_levels 2
    --log2_hashmap_size 8 --max_resolution 16 --hidden_width 8 --hidden_layers 1 --max_steps 16 --occupancy_resolution 8
""".split()


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command in this process, since a process for each line would take a minute."""

    def call(words: list[str], folder: Path) -> SimpleNamespace:
        out, error = io.StringIO(), io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = main(words)
        return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=error.getvalue())

    monkeypatch.setattr(command_lines, "run_command", call)


def cells() -> list[list[str]]:
    """The rows of the page's table."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


@pytest.mark.skipif(not PAGE.exists(), reason="an installed package carries no docs")
def test_page_is_current(tmp_path: Path) -> None:
    """Every row of the page has the present result of the command."""
    command_lines.write_files(tmp_path)
    rows = cells()
    assert len(rows) == len(LINES) == 20 and len(set(LINES)) == 20
    again = "write it anew: python -m dream_fast.bench command_lines"
    for line, (source, words, here, happened) in zip(LINES, rows, strict=True):
        assert (source, words) == (line.source, f"`{line.words}`"), again
        if "--test" in line.words:
            parse(shlex.split(line.words))
            outcome = Outcome("works", "")
        else:
            _, outcome = adapt_words(shlex.split(line.words), tmp_path)
        assert here == outcome.verdict, again
        if here == "refused":
            assert happened == outcome.details, again
        else:
            assert re.fullmatch(
                rf"{STEPS} steps; `results/turntable.mp4`, .*`results/six_views.png`.*; \d+ s", happened
            )
    assert {re.match(r"[\w-]+", here)[0] for _, _, here, _ in rows} == {"works", "refused", "dream-mini"}


@pytest.mark.skipif(not PAGE.exists(), reason="an installed package carries no docs")
def test_page_is_linked() -> None:
    """The README links the page."""
    assert "(docs/coming_from_stable_dreamfusion.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_run_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is run, its outputs are listed, and --test takes its workspace."""
    monkeypatch.setattr(command_lines, "SHORT", TINY)
    line = CommandLine("README", '--text "a rose" --negative "red" --workspace trial -O --sd_version 1.5')
    outcome = run_line(line, tmp_path)
    assert outcome.verdict == 'works with dream-mini instead of Stable Diffusion 1.5 and the prompt "a hamburger"'
    assert re.fullmatch(r"2 steps; `results/turntable.mp4`, `results/six_views.png`; \d+ s", outcome.details)
    assert (tmp_path / "trial" / "results" / "turntable.mp4").exists()
    monkeypatch.setattr(command_lines, "SHORT", "--device cpu --W 8 --H 8 --mcubes_resolution 16".split())
    tested = run_line(CommandLine("README", "--workspace trial -O --test --six_views"), tmp_path)
    assert tested.verdict == "works" and "`results/six_views.png`" in tested.details
    gone = run_line(CommandLine("README", "--workspace gone -O --test"), tmp_path)
    assert gone == Outcome("refused", "--test needs a stored run, but --workspace gone holds none")


def test_run_line_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is the row's sentence; any other failure raises."""
    assert run_line(CommandLine("README", '--text "a mug" --workspace trial --gui'), tmp_path).verdict == "refused"
    assert format_row(CommandLine("a", "b|c"), Outcome("refused", "x | y")) == "| a | `b/c` | refused | x / y |\n"
    broken = SimpleNamespace(returncode=1, stdout="", stderr="Traceback")
    monkeypatch.setattr(command_lines, "run_command", lambda words, folder: broken)
    with pytest.raises(RuntimeError, match="Traceback"):
        run_line(CommandLine("README", '--text "a mug"'), tmp_path)
