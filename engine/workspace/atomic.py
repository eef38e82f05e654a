"""Atomic writes: a file is complete or absent, also after a crash of the machine."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same suffix, which replaces `path` when the block ends without an error.

    The file is synced to the disk before it is renamed, and the folder afterwards.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_writes(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """`atomic_write` of files that belong together: all are synced before the first one is renamed."""
    with ExitStack() as stack:
        temporaries = [stack.enter_context(atomic_write(path)) for path in paths]
        yield temporaries
        for temporary in temporaries:
            _sync(temporary)


def stale_temp_files(folder: Path) -> list[Path]:
    """Temporary files that killed processes left in `folder` and its folders."""
    return [*folder.glob(".*.writing*"), *folder.glob("*/.*.writing*")]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
