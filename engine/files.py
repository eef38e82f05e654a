"""Open files as what they should be: regular files of a bounded size, inside a folder where one is named.

A name that leads to a folder, a device, a pipe or a socket is refused without waiting for it. The file that was checked
is the one that is read: its kind and size are those of the open handle. Where the system has no O_NOFOLLOW or no
handles of folders (Windows), links are resolved and checked before the file is opened.
"""

import errno
import os
import stat
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from dream_fast.engine.errors import UserError

# Opens without following a last link, and without waiting for the other end of a pipe.
CAREFUL = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
MAX_TEXT_BYTES = 64_000_000  # of a text file that is read whole

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class BadFile(UserError):
    """A file that is not what it should be. `reason` continues a sentence that begins with its path."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        self.path, self.reason = path, reason
        super().__init__(f"{path} {reason}")


def kind_of(mode: int) -> str:
    """Return the kind of a file by its mode, as in "a folder"; "" for a regular file."""
    return next((name for is_kind, name in KINDS if is_kind(mode)), "" if stat.S_ISREG(mode) else "not a regular file")


def is_regular(path: Path) -> bool:
    """Return True for a regular file that is not a link."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):  # no such name, and one that no file can have
        return False


def open_regular(path: Path, most: int | None = None, *, folder: Path | None = None) -> BinaryIO:
    """Open a regular file to read, of at most `most` bytes, following links; with `folder` only inside that folder.

    Raises BadFile: when it is not a regular file, is larger, or lies outside. Raises OSError: when it cannot be opened.
    """
    kind = kind_of(os.stat(path).st_mode)  # before it is opened, since opening a device can do something
    if kind:
        raise BadFile(path, f"is {kind} instead of a file")
    real = Path(os.path.realpath(path))
    if folder is None:
        handle = os.open(real, os.O_RDONLY | CAREFUL)
    else:
        handle = _open_below(Path(os.path.realpath(folder)), real, path)
    try:
        info = os.fstat(handle)
        if kind := kind_of(info.st_mode):
            raise BadFile(path, f"is {kind} instead of a file")
        if most is not None and info.st_size > most:
            raise BadFile(path, f"has {info.st_size} bytes, of at most {most}")
        return cast(BinaryIO, os.fdopen(handle, "rb"))
    except BaseException:
        os.close(handle)
        raise


def _open_below(folder: Path, real: Path, path: Path) -> int:
    """Return a handle of the file at `real`, reached from `folder` without a link. `path` is its name in messages."""
    if not real.is_relative_to(folder) or real == folder:
        raise BadFile(path, f"leads out of {folder}")
    if os.open not in os.supports_dir_fd:
        return os.open(real, os.O_RDONLY | CAREFUL)
    *parents, name = real.relative_to(folder).parts
    handle = os.open(folder, os.O_RDONLY | CAREFUL)
    try:
        for parent in parents:
            inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | CAREFUL, dir_fd=handle)
            os.close(handle)
            handle = inner
        return os.open(name, os.O_RDONLY | CAREFUL, dir_fd=handle)
    finally:
        os.close(handle)


def read_regular(path: Path, most: int = MAX_TEXT_BYTES, *, folder: Path | None = None) -> bytes:
    """Return the bytes of a file. Raises as `open_regular`; BadFile also when it turns out to be longer."""
    with open_regular(path, most, folder=folder) as file:
        data = file.read(most + 1)  # files of the system state no size
    if len(data) > most:
        raise BadFile(path, f"has more than {most} bytes")
    return data


def open_append(path: Path) -> TextIO:
    """Open a text file to append to, and create it where it is missing. Links are not followed.

    Raises BadFile: when it is not a regular file, or has several names, so that another file would be written into.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | CAREFUL, 0o666)
    except OSError as error:
        if kind := _kind_at(path):
            raise BadFile(path, f"is {kind} instead of a file") from error
        raise
    try:
        info = os.fstat(handle)
        if kind := kind_of(info.st_mode):
            raise BadFile(path, f"is {kind} instead of a file")
        if info.st_nlink > 1:
            raise BadFile(path, "is a hard link, so that another file would be written into")
        return TextIOWrapper(os.fdopen(handle, "ab"), encoding="utf-8")
    except BaseException:
        os.close(handle)
        raise


def _kind_at(path: Path) -> str:
    try:
        return kind_of(os.lstat(path).st_mode)
    except OSError as error:
        return "" if error.errno == errno.ENOENT else "not a regular file"
