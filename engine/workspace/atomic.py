"""Files that are there completely or not at all, also after a crash of the machine."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path with the same suffix to write to; it takes the place of `path` when the block ends without an error.

    It is on the disk before it takes the name, and so is the name before this returns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        yield aside
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_writes(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """`atomic_write` for files that belong together: all of them are on the disk before the first takes its name."""
    with ExitStack() as stack:
        asides = [stack.enter_context(atomic_write(path)) for path in paths]
        yield asides
        for aside in asides:
            _sync(aside)


def stale_temp_files(folder: Path) -> list[Path]:
    """What a process that was killed had begun to write in `folder` and the folders in it."""
    return [*folder.glob(".*.writing*"), *folder.glob("*/.*.writing*")]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
