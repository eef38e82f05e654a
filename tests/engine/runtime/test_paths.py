"""Paths as typed: a home folder is filled in, and names that no file can have are refused."""

from pathlib import Path

import pytest

from dream_fast.engine.errors import UserError
from dream_fast.engine.runtime.paths import expand_user


def test_expand_user(monkeypatch, tmp_path) -> None:
    """Files that exist, and names for new ones, also below a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    for name in ("file", "new", "file/below", "new/below"):
        assert expand_user(f"~/{name}") == tmp_path / name
    assert expand_user("relative") == Path("relative")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("~nobody_at_all/x", "no home folder"), ("x" * 5000, "File name too long"), ("a\0b", "embedded null")],
)
def test_expand_user_refuses(name: str, reason: str) -> None:
    """One sentence, with a name of any length."""
    with pytest.raises(UserError, match=reason) as caught:
        expand_user(name)
    assert len(str(caught.value)) < 1000


def test_expand_user_closed_folder(monkeypatch) -> None:
    """A folder that may not be entered."""

    def closed(path: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("dream_fast.engine.runtime.paths.os.stat", closed)
    with pytest.raises(UserError, match=r"closed/x cannot be used \(Permission denied\)"):
        expand_user("closed/x")
