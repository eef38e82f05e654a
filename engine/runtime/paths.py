"""Paths as they are typed."""

from pathlib import Path

from dream_fast.engine.errors import UserError


def expand_user(name: str | Path) -> Path:
    """The path with ~ and ~user for a home folder. UserError: there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: there is no home folder of that name") from error
