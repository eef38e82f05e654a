"""Paths as typed by the user."""

from pathlib import Path

from dream_fast.engine.errors import UserError


def expand_user(name: str | Path) -> Path:
    """Expand ~ and ~user to a home folder. Raises UserError: when there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: there is no home folder of that name") from error
