"""Atomic writes: a file is complete or absent, also after a crash of the machine.

In a workspace a file is recorded before and after it is written (`record`), and what dream-fast did not write there is
never replaced.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dream_fast.engine.files import CAREFUL, BadFile, kind_of
from dream_fast.engine.workspace.record import Record

FOLDER_HANDLES = os.open in os.supports_dir_fd  # not on Windows


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same suffix, which replaces `path` when the block ends without an error.

    The temporary file is new, with a random name, and empty. It is synced to the disk before it is renamed, and the
    folder afterwards. Raises BadFile: in a workspace, something that dream-fast did not write is in the way.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.stem}.writing{path.suffix}")
    record = Record.around(path)
    if record is not None:
        record.claim(path, temporary)
    with _folder(path.parent) as folder:
        try:
            os.close(os.open(temporary.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | CAREFUL, 0o666, dir_fd=folder))
            yield temporary
            _sync_file(temporary, folder)
            if record is not None:
                record.check_free([path])
            _replace(temporary, path, folder)
            _sync_folder(path.parent, folder)
        except OSError as error:
            if error.filename in (temporary.name, str(temporary)):
                error.filename = str(path)  # the name that people know
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary if folder is None else temporary.name, dir_fd=folder)
    if record is not None:
        record.add(path)


@contextmanager
def atomic_writes(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """`atomic_write` of files that belong together: all are synced before the first one is renamed."""
    with ExitStack() as stack:
        temporaries = [stack.enter_context(atomic_write(path)) for path in paths]
        yield temporaries
        for temporary in temporaries:
            _sync_file(temporary, None)


@contextmanager
def _folder(path: Path) -> Iterator[int | None]:
    """Yield a handle of the folder, so that the file is renamed in the folder that was checked; None on Windows."""
    if not FOLDER_HANDLES:
        yield None
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def _sync_file(path: Path, folder: int | None) -> None:
    """Sync a file to the disk. Raises BadFile: it became something else while it was written."""
    flags = os.O_RDWR if folder is None and not FOLDER_HANDLES else os.O_RDONLY  # Windows syncs what it may write
    handle = os.open(path if folder is None else path.name, flags | CAREFUL, dir_fd=folder)
    try:
        if kind := kind_of(os.fstat(handle).st_mode):
            raise BadFile(path, f"became {kind} while it was written")
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(temporary: Path, path: Path, folder: int | None) -> None:
    if folder is None:
        os.replace(temporary, path)
    else:
        os.replace(temporary.name, path.name, src_dir_fd=folder, dst_dir_fd=folder)


def _sync_folder(path: Path, folder: int | None) -> None:
    if folder is not None:
        os.fsync(folder)
