"""Standard output and error that cannot end a run: closed, broken or full, or of an encoding that lacks a letter."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class SafeStream(io.TextIOBase):
    """A text stream that drops what `stream` does not take. `error` is why the stream is given up, or None.

    A letter that its encoding lacks is written as an escape, as in \\u00e4.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self.error: Exception | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return getattr(self._stream, "errors", None)

    @property
    def buffer(self) -> Any:
        return self._stream.buffer if self._stream is not None else io.BytesIO()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("the stream is closed")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if self._stream is not None and self.error is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None and self.error is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not isinstance(error, BlockingIOError):  # a reader that is slow may read again
            self.error = error

    def finish(self) -> None:
        """Flush. What a process could not write is dropped, or Python would try it again at its end, and fail."""
        self.flush()
        if self.error is not None and self._stream is not None:
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


@contextmanager
def safe_output() -> Iterator[None]:
    """Inside the `with` block, sys.stdout and sys.stderr are `SafeStream`s."""
    _open_missing_handles()
    before = sys.stdout, sys.stderr
    safe = [stream if isinstance(stream, SafeStream) else SafeStream(stream) for stream in before]
    sys.stdout, sys.stderr = safe
    try:
        yield
    finally:
        for stream in safe:
            if stream not in before:
                stream.finish()
        sys.stdout, sys.stderr = before


def _open_missing_handles() -> None:
    """Open the handles 0, 1 and 2 where they are closed: a file of the run would get their numbers, and the messages
    that libraries write to them."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
