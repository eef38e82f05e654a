"""Arguments in a text file (`--file`), split as a shell splits a command.

Spaces and line ends separate words, quotes keep words together, and `#` at the start of a word begins a comment. A
backslash at the end of a line joins the next one, so a command of several lines can be pasted as it is.
"""

import re
import shlex
from pathlib import Path

from dream_fast.engine.errors import UserError

# White space and comments, or a word with its quotes. shlex alone would cut "runs#3" at the sign.
_PART = re.compile(
    r"""(?:\s|\\\n|\#[^\n]*)+ | (?P<word>(?:[^\s'"\\] | \\[^\n] | '[^']*' | "(?:[^"\\]|\\.)*")+)""",
    re.VERBOSE | re.DOTALL,
)


LARGEST = 300_000  # characters


def read_arguments(name: str) -> list[str]:
    """Return the words of the file `name`.

    Raises UserError: when it cannot be read, is not text, or has an open quote.
    """
    try:
        path = Path(name).expanduser()
        if path.exists() and not path.is_file() and not path.is_dir() and not path.is_fifo():
            raise UserError(f"--file {name} is not a text file")  # a device may have no end
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"--file {name} is longer than {LARGEST} characters, so it is not a list of arguments")
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user in ~user
        raise UserError(f"--file {name} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except ValueError:
        text = "\0"  # not UTF-8
    if "\0" in text:
        raise UserError(f"--file {name} is not a text file")
    return split(text, name)


def split(text: str, name: str) -> list[str]:
    """Return the words of `text`, the content of the file `name`. Raises UserError: when a quote is not closed."""
    words, position = [], 0
    while position < len(text):
        part = _PART.match(text, position)
        if part is None:
            line = text.count("\n", 0, position) + 1
            raise UserError(f"--file {name}: the {text[position]} in line {line} is not closed")
        if part["word"]:
            words += shlex.split(part["word"])
        position = part.end()
    return words
