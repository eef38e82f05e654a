"""The mark of a workspace, and the record of the files that dream-fast wrote in it.

The file .dream-fast in a workspace is both. Its first line is the mark, with a random id of the run. Each later line
has the name of a file: before it is written with the temporary name, afterwards with its size. So the record is correct
even if the process is killed. Only recorded files of the recorded size are ever replaced, removed or shortened; a file
that grows or that people edit (GROWING) is known by its content instead.
"""

import contextlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dream_fast.engine.errors import UserError
from dream_fast.engine.files import CAREFUL, BadFile, kind_of, open_append, open_regular, read_regular
from dream_fast.engine.scene.camera import SIX_VIEWS

MARK = ".dream-fast"
PROGRAM, FORMAT = "dream-fast", 1
MAX_JSON_BYTES = 16_000_000  # of config.json and manifest.json

_ID = re.compile(r"[0-9a-f]{32}")
_IMAGE = rf"({'|'.join(SIX_VIEWS)})(_normal)?|six_views"
# The names that versions without a record wrote.
_WRITTEN = re.compile(
    r"config\.json|manifest\.json|metrics\.jsonl|log\.txt|report\.html|(validation|guidance)/step_\d+\.png"
    r"|checkpoints/(damaged_)?step_\d{6,12}\.safetensors|tensorboard/events\.out\.tfevents\.[^/]+"
    rf"|results/({_IMAGE})\.png|results/turntable(_step_\d+)?\.mp4"
    r"|mesh/mesh(_normal)?\.(glb|obj|mtl|png)|profile/trace\.json(\.gz)?"
)
_TEMPORARY = re.compile(r"\.(?P<stem>.+)\.writing(?P<suffix>\.\w+)")  # of those versions


def _is_json(first: str, *names: str) -> bool:
    """True for a JSON object with at least one of `names`."""
    try:
        content = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and any(name in content for name in names)


# Files that are edited or appended to, each recognised by its beginning (JSON files by all of it).
GROWING: dict[str, Callable[[str], bool]] = {
    "config.json": lambda text: _is_json(text, "run"),
    "manifest.json": lambda text: _is_json(text, "runs"),
    "metrics.jsonl": lambda text: not text or '"step"' in text,
    "log.txt": lambda text: not text or re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", text) is not None,
}


class _Stamp(NamedTuple):
    """Identity of a file at the time of reading, to detect changes."""

    inode: int
    size: int
    changed: int


class Record:
    """The record of the workspace at `root`, with the `id` of its run.

    `sizes` has the sizes that each file may have, by its name relative to `root`; None is any size, of a file that was
    being written. `temporaries` are the names of files that were being written.
    """

    def __init__(self, root: Path, id: str):
        self.root, self.id = root, id
        self.sizes: dict[str, set[int | None]] = {}
        self.temporaries: set[str] = set()
        self._stamp: _Stamp | None = None

    @classmethod
    def read(cls, root: Path) -> "Record | None":
        """Return the record of the workspace at `root`, or None in a folder without the mark.

        Raises BadFile: when the mark is not a file of dream-fast.
        """
        root = Path(os.path.realpath(root))
        path = root / MARK
        try:
            info = os.lstat(path)
        except (OSError, ValueError):
            return None
        if kind := kind_of(info.st_mode):
            raise BadFile(path, f"is {kind} instead of the mark of a workspace: move it away")
        stamp = _Stamp(info.st_ino, info.st_size, info.st_mtime_ns)
        record = _READ.get(path)
        if record is None or record._stamp != stamp:
            record = cls._parse(root, read_regular(path, folder=root).decode("utf-8", "replace"))
            record._stamp = stamp
            _READ[path] = record
        return record

    @classmethod
    def _parse(cls, root: Path, text: str) -> "Record":
        first, *lines = text.split("\n")
        with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError):
            mark = json.loads(first)
            if mark["program"] == PROGRAM and type(mark["format"]) is int and _ID.fullmatch(mark["id"]):
                if mark["format"] > FORMAT:
                    raise UserError(f"{root / MARK} is of a later version of dream-fast: upgrade dream-fast")
                record = cls(root, mark["id"])
                for line in lines:
                    record._take(line)
                return record
        raise BadFile(root / MARK, "is not a mark of dream-fast: move it away, or choose another folder")

    def _take(self, line: str) -> None:
        """Take over a line of the file; one that was cut short is left out."""
        try:
            entry = json.loads(line)
            name, size, temporary = entry["file"], entry.get("size"), entry.get("temporary")
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            return
        if not _is_name(name) or not (size is None or type(size) is int):
            return
        if size is None:
            self.sizes.setdefault(name, set()).add(None)
            if _is_name(temporary):
                self.temporaries.add(temporary)
        else:
            self.sizes[name] = {size}

    @classmethod
    def create(cls, root: Path) -> "Record":
        """Mark `root`, which has no mark or one that is replaced, and return a record of the files that will grow."""
        record = cls(Path(os.path.realpath(root)), secrets.token_hex(16))
        record.sizes = {name: {None} for name in GROWING}
        record._write(record._lines())
        return record

    @classmethod
    def adopt(cls, root: Path, id: str | None = None) -> "Record":
        """Mark `root`, the workspace of a version without a record, and record the files that such a version wrote."""
        record = cls(Path(os.path.realpath(root)), id if id and _ID.fullmatch(id) else secrets.token_hex(16))
        record.sizes = {name: {None} for name in GROWING}
        for path in _files_below(record.root):
            name = path.relative_to(record.root).as_posix()
            half = _TEMPORARY.fullmatch(path.name)
            whole = (path.parent / f"{half['stem']}{half['suffix']}") if half else None
            if _WRITTEN.fullmatch(name):
                record.sizes[name] = {os.lstat(path).st_size}
            elif whole is not None and _WRITTEN.fullmatch(whole.relative_to(record.root).as_posix()):
                record.temporaries.add(name)
        record._write(record._lines())
        return record

    def compact(self) -> None:
        """Rewrite the file, without entries of files that no longer exist."""
        sizes: dict[str, set[int | None]] = {
            name: {os.lstat(self.root / name).st_size} for name in self.sizes if self.owns(self.root / name)
        }
        sizes |= {name: {None} for name in sizes if name.startswith("tensorboard/")}
        growing: dict[str, set[int | None]] = {name: {None} for name in GROWING}
        self.sizes = growing | sizes
        self.temporaries = {name for name in self.temporaries if (self.root / name).exists()}
        self._write(self._lines())

    def _lines(self) -> list[str]:
        entries: list[dict[str, Any]] = [{"file": name, "temporary": name} for name in sorted(self.temporaries)]
        entries += [{"file": name, "size": size} for name in sorted(self.sizes) for size in self.sizes[name]]
        return [json.dumps(entry) for entry in entries]

    def _write(self, lines: Iterable[str]) -> None:
        path, temporary = self.root / MARK, self.root / f"{MARK}.{secrets.token_hex(4)}"
        first = json.dumps({"program": PROGRAM, "format": FORMAT, "id": self.id})
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | CAREFUL, 0o666)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in (first, *lines)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._remember()

    def _remember(self) -> None:
        info = os.lstat(self.root / MARK)
        self._stamp = _Stamp(info.st_ino, info.st_size, info.st_mtime_ns)
        _READ[self.root / MARK] = self

    def _append(self, entry: dict[str, Any], *, sync: bool) -> None:
        if os.lstat(self.root / MARK).st_nlink > 1:  # a backup has a hard link to it, and stays as it is
            self._write(self._lines())
        with open_append(self.root / MARK) as file:
            file.write(f"{json.dumps(entry)}\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())
        self._remember()

    @classmethod
    def around(cls, path: Path) -> "Record | None":
        """Return the record of the workspace that `path` belongs to: that of its folder or of the one around it."""
        folder = Path(os.path.abspath(path)).parent
        for root in (folder, folder.parent):
            if (record := cls.read(root)) is not None:
                return record
        return None

    def name(self, path: Path) -> str:
        """Return the name of a file in the record."""
        absolute = Path(os.path.abspath(path))
        for root in (self.root, *(part for part in absolute.parents if os.path.realpath(part) == str(self.root))):
            if absolute.is_relative_to(root):
                return absolute.relative_to(root).as_posix()
        raise BadFile(path, f"leads out of {self.root}")

    def claim(self, path: Path, temporary: Path | None = None) -> None:
        """Record that `path` is about to be written. Raises UserError: something else is in its place."""
        self.check_free([path])
        name = self.name(path)
        entry: dict[str, Any] = {"file": name}
        self.sizes.setdefault(name, set()).add(None)
        if temporary is not None:
            entry["temporary"] = self.name(temporary)
            self.temporaries.add(entry["temporary"])
        self._append(entry, sync=True)

    def add(self, path: Path) -> None:
        """Record that `path` is written."""
        name, size = self.name(path), os.lstat(path).st_size
        self.sizes[name] = {size}
        self._append({"file": name, "size": size}, sync=False)

    def take(self, path: Path) -> None:
        """Record a file that is there already and grows."""
        self.sizes[self.name(path)] = {None}
        self._append({"file": self.name(path)}, sync=True)

    def owns(self, path: Path) -> bool:
        """True if dream-fast wrote the file that is at `path` now."""
        try:
            name = self.name(path)
            info = os.lstat(path)
        except (OSError, ValueError, BadFile):
            return False
        sizes = self.sizes.get(name)
        if sizes is None or not stat.S_ISREG(info.st_mode) or self._is_behind_link(name):
            return False
        return None in sizes and name not in GROWING or info.st_size in sizes or self._looks_right(name)

    def _is_behind_link(self, name: str) -> bool:
        folder = str((self.root / name).parent)
        return os.path.realpath(folder) != folder

    def _looks_right(self, name: str) -> bool:
        if name not in GROWING:
            return False
        try:
            with open_regular(self.root / name, folder=self.root) as file:
                beginning = file.read(MAX_JSON_BYTES if name.endswith(".json") else 4096)
                return GROWING[name](beginning.decode("utf-8", "replace"))
        except (OSError, BadFile):
            return False

    def check_free(self, paths: Iterable[Path]) -> None:
        """Raises BadFile: something that dream-fast did not write is at one of the `paths`, or in a folder's place."""
        for path in paths:
            parent = path.parent
            if os.path.lexists(parent) and (kind := kind_of(os.lstat(parent).st_mode)) != "a folder":
                if Path(os.path.realpath(parent)) != self.root:
                    raise BadFile(parent, f"is {kind or 'a file'} instead of a folder: move it away")
            if os.path.lexists(path) and not self.owns(path):
                kind = kind_of(os.lstat(path).st_mode)
                what = f"it is {kind or 'a file'} that dream-fast did not write"
                if not kind and self.sizes.get(self.name(path)):
                    what = "it was changed after dream-fast wrote it"
                raise BadFile(path, f"is in the way: {what}; move it away")

    def remove(self, path: Path) -> bool:
        """Remove the file at `path` if dream-fast wrote it; returns True if it is gone."""
        if self.owns(path):
            path.unlink(missing_ok=True)
        return not os.path.lexists(path)

    def remove_temporaries(self) -> None:
        """Remove what killed processes left half-written."""
        for name in sorted(self.temporaries):
            path = self.root / name
            with contextlib.suppress(OSError):
                if stat.S_ISREG(os.lstat(path).st_mode) and not self._is_behind_link(name):
                    path.unlink()
        self.temporaries.clear()

    def files(self) -> list[Path]:
        """Return the paths of all recorded files that are there."""
        return [path for path in (self.root / name for name in sorted(self.sizes)) if self.owns(path)]


_READ: dict[Path, Record] = {}  # the records that were read, by the path of the mark


def _is_name(name: Any) -> bool:
    """True for the name of a file in a workspace or in one of its folders."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name or name.startswith("/"):
        return False
    parts = name.split("/")
    return len(parts) <= 2 and not {"", ".", ".."} & set(parts) and PurePosixPath(name).name != MARK


def _files_below(root: Path) -> list[Path]:
    """Return the regular files in `root` and in its folders, without following links."""
    folders = [root, *(Path(entry.path) for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))]
    paths = []
    for folder in folders:
        with contextlib.suppress(PermissionError):
            paths += [Path(entry.path) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    return paths
