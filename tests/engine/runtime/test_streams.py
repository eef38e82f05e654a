"""Streams that are closed, broken, full or of a poor encoding end nothing."""

import io
import os
import subprocess
import sys

import pytest

from dream_fast.engine.runtime.streams import SafeStream, safe_output

# Prints within `safe_output`, and at the end the number of the first file that is opened.
PRINT = """
import os, sys
from dream_fast.engine.runtime.streams import safe_output
with safe_output():
    handle = os.open(os.devnull, os.O_RDONLY)
    print("h\\u00e4mburger " * 20000, flush=True)
    print("h\\u00e4mburger", file=sys.stderr, flush=True)
sys.exit(handle)
"""


@pytest.mark.parametrize(
    "shell",
    ["> /dev/full", "2> /dev/full", "> /dev/full 2> /dev/full", ">&-", "2>&-", ">&- 2>&-", ">&- 2>&- <&-", "| true"],
)
def test_safe_output_process(tmp_path, shell: str) -> None:
    """The process ends as it would have, says nothing about it, and no file gets the number of a standard stream."""
    environment = os.environ | {"CODE": PRINT, "PYTHON": sys.executable}
    command = f'"$PYTHON" -P -c "$CODE" {shell}; echo "${{PIPESTATUS[0]}}" > status'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert int((tmp_path / "status").read_text()) >= 3
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_safe_stream_encoding() -> None:
    """Letters that the encoding lacks become escapes, the others stay."""
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("h\u00e4mburger \U0001f354")
    stream.flush()
    assert raw.getvalue() == b"h\\xe4mburger \\U0001f354" and stream.error is None


def test_safe_stream_gives_up() -> None:
    """After an error nothing is tried again; a reader that is slow gets later lines."""

    class Failing(io.StringIO):
        error: Exception = BlockingIOError()
        calls = 0

        def write(self, text: str) -> int:
            self.calls += 1
            raise self.error

    inner = Failing()
    stream = SafeStream(inner)
    assert stream.write("one") == 3 and stream.error is None
    inner.error = OSError(5, "Input/output error")
    assert [stream.write("two"), stream.write("three")] == [3, 5]
    assert stream.error is inner.error and inner.calls == 2


def test_safe_output_restores(capsys) -> None:
    """Afterwards the streams are those of before, with what was printed; one inside another changes nothing."""
    before = sys.stdout, sys.stderr
    with safe_output():
        inner = sys.stdout
        with safe_output():
            assert sys.stdout is inner
        print("shown")
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "shown\n"
