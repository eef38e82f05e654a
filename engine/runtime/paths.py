"""Paths as typed by the user."""

import os
from pathlib import Path

from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.text import one_line


def expand_user(name: str | Path) -> Path:
    """Expand ~ and ~user to a home folder.

    Raises UserError: when there is no such user, no file can have that name, or the way to it is closed.
    """
    try:
        path = Path(name).expanduser()
        os.stat(path)
    except RuntimeError as error:
        raise UserError(f"{name}: there is no home folder of that name") from error
    except (FileNotFoundError, NotADirectoryError):  # a name for something new, or the caller has the message
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{one_line(str(name), 200)} cannot be used ({reason})") from error
    return path
