"""Output of a run: each line on the console and in the log, and few lines without a terminal."""

import io

from rich.console import Console

from dream_fast.engine.runtime import reporter as progress
from dream_fast.engine.runtime.reporter import Reporter, format_terms


def make_reporter(terminal: bool) -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    return Reporter(Console(file=out, force_terminal=terminal, width=160, highlight=False)), out


def test_say_before_open_log(tmp_path):
    """Lines before the log are written to it later, and brackets are not markup."""
    reporter, out = make_reporter(terminal=False)
    reporter.say("a [bold] hamburger")
    reporter.warn("left out: sauce")
    assert list(tmp_path.iterdir()) == []
    reporter.open_log(tmp_path / "log.txt")
    reporter.say("later")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["a [bold] hamburger", "warning: left out: sauce", "later"]
    assert out.getvalue().splitlines() == ["a [bold] hamburger", "warning: left out: sauce", "later"]


def test_bar_without_terminal(monkeypatch):
    """Without a terminal there is a line now and then, and one at the end."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    reporter, out = make_reporter(terminal=False)
    with reporter.bar("start", 100) as bar:
        for completed in range(1, 101):
            now[0] += 1.0
            bar.show("albedo", 1.0, {"guidance": 12.345})
            bar.advance(completed)
    lines = out.getvalue().splitlines()
    assert lines[0] == "albedo: 15/100, 1.00 it/s, 85 s left, guidance 12.3"
    assert len(lines) == 7 and lines[-1].startswith("albedo: 100/100")


def test_bar_on_terminal():
    """On a terminal the bar has step, speed and terms."""
    reporter, out = make_reporter(terminal=True)
    with reporter.bar("start", 10) as bar:
        bar.show("shaded", 2.5, {"guidance": 12.345, "entropy": None})
        assert list(bar.count(range(10))) == list(range(10))
    for part in ("shaded", "10/10", "2.50 it/s", "guidance 12.3", "entropy not finite"):
        assert part in out.getvalue()


def test_files_table(tmp_path):
    """The table lists files with their sizes."""
    for name, size in (("a.png", 999), ("b.mp4", 1500), ("c.glb", 2_000_000)):
        (tmp_path / name).write_bytes(bytes(size))
    reporter, out = make_reporter(terminal=False)
    reporter.files(sorted(tmp_path.iterdir()))
    for name, size in (("a.png", "999 B"), ("b.mp4", "1.5 kB"), ("c.glb", "2.0 MB")):
        assert [line for line in out.getvalue().splitlines() if name in line and line.endswith(size)]


def test_format_terms():
    """Terms are short."""
    assert format_terms({"guidance": 0.00123456, "entropy": 1e-9}) == "guidance 0.00123  entropy 1e-09"
