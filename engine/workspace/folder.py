"""The workspace: the folder of a run, the paths in it, and the checks before another run works in it.

    config.json      the resolved configuration       log.txt       the output of the terminal, without the bar
    manifest.json    versions, device, seed, command  metrics.jsonl a row every `log_every` steps
    checkpoints/     the last two                     validation/   images during the run
    results/         video and six views              mesh/         with --save_mesh
    report.html      all of it on one page            guidance/, tensorboard/, profile/  with their flags
    .dream-fast      the mark of a workspace, and the record of the files that dream-fast wrote (`record`)

All files are plain. How far a run is follows from its checkpoints alone. Only recorded files are replaced, removed or
shortened. A workspace of a version without the mark gets it once its settings and its manifest are those of one run.
"""

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dream_fast import __version__
from dream_fast.engine.config.schema import Config
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.files import BadFile, is_regular, kind_of, read_regular
from dream_fast.engine.workspace.atomic import atomic_write
from dream_fast.engine.workspace.checkpoint import is_own, list_checkpoints, step_of
from dream_fast.engine.workspace.lock import Lock
from dream_fast.engine.workspace.record import MAX_JSON_BYTES, Record
from dream_fast.engine.workspace.stored_run import VERSION_KEY, StoredRun, read_run

logger = logging.getLogger(__name__)

MAX_METRICS_BYTES = 2_000_000_000
# Types of the entries of a run in the manifest that are read again: float is any number, a dict has such values.
MANIFEST_TYPES = {
    "from_step": int,
    "to_step": int,
    "seconds": float,
    "seconds_of": {str: float},
    "peak_bytes": {str: float},
    "device": str,
    "finished": str,
    "machine": dict,
    "versions": dict,
}


@dataclasses.dataclass
class Workspace:
    """The folder at `path` and the paths in it. Creating the object does not touch the disk.

    `lock` keeps other processes out inside `locked()`. `flag` is the flag that named the folder, for messages.
    """

    path: Path
    lock: Lock | None = None
    flag: str = "--workspace"

    @property
    def typed(self) -> str:
        """The folder as it was typed, such as `--workspace trial`."""
        return f"{self.flag} {self.path}"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def validation(self) -> Path:
        return self.path / "validation"

    @property
    def guidance(self) -> Path:
        return self.path / "guidance"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        return self.path / "results"

    @property
    def mesh(self) -> Path:
        return self.path / "mesh"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def files(self) -> list[Path]:
        """The files of the run, in the order of this class; of images during the run only the last."""
        result: list[Path] = []
        for path in self._paths():
            files = [file for file in (sorted(path.glob("*.*")) if path.is_dir() else [path]) if is_regular(file)]
            result += files[-1:] if path in (self.validation, self.guidance) else files
        return result

    def _folders(self) -> list[Path]:
        during = [self.validation, self.guidance, self.tensorboard, self.profile, self.checkpoints]
        return [*during, self.results, self.mesh]

    def _paths(self) -> list[Path]:
        return [self.config, self.manifest, self.metrics, self.log, *self._folders(), self.report]

    def check_usable(self, otherwise: str = "") -> None:
        """Raises UserError: when a file is in the folder's place, it is not writable, or not a workspace of dream-fast.

        Writes nothing, since the model may still turn out to be missing. `otherwise` is appended to the message where
        the folder is not writable.
        """
        existing = self.path
        try:
            while not existing.exists() and existing != existing.parent:
                existing = existing.parent
            self.path.resolve()
            links = [path.name for path in self._paths() if path.is_symlink()]
        except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, or links in a circle
            raise UserError(f"{self.typed} cannot be a folder ({first_line(error)})") from error
        if links:
            raise UserError(f"{self.typed}: {', '.join(links)} would be written elsewhere, being a link")
        if not existing.is_dir():
            raise UserError(f"{self.typed}: {existing} is a file, not a folder")
        for path in (existing, *(path for path in (*self._folders(), self.metrics, self.log) if path.exists())):
            if not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
                place = "in " * path.is_dir() + str(path)
                raise UserError(f"{self.typed}: no permission to write {place}{otherwise}")
        for path in self._paths():
            if path.exists() and (path in self._folders()) != path.is_dir():
                kinds = ("a file", "a folder") if path in self._folders() else (kind_of(path.stat().st_mode), "a file")
                raise UserError(f"{self.typed}: {path} is {kinds[0]} instead of {kinds[1]}: move it away")
        self._check_known()

    def _check_known(self) -> None:
        """Raises UserError: when files have the names of those of a run, and dream-fast did not write them."""
        if (record := self.record()) is not None:
            if not record.owns(self.manifest):
                self.read_manifest()  # raises the error
            record.check_free([self.config, self.manifest, self.metrics, self.log])
            return
        names = [path.name for path in self._paths() if os.path.lexists(path)]
        if not names:
            return
        if not self.config.exists():
            raise UserError(
                f"{self.typed} holds {', '.join(names)} but no config.json, so it is not a run of "
                "dream-fast; choose another folder"
            )
        try:
            config, manifest = self.stored_config(), self.read_manifest()
        except UserError as error:
            raise UserError(f"{error}; so {self.typed} is no run of dream-fast that this version knows") from error
        assert config is not None
        stated = (manifest.get("text", config.run.text), manifest.get("seed", config.run.seed))
        if stated != (config.run.text, config.run.seed):
            raise UserError(
                f"{self.typed}: config.json and manifest.json are of two runs, so it is not a run of dream-fast; "
                "choose another folder"
            )

    def check_free(self, paths: Iterable[Path]) -> None:
        """Raises UserError: when something that dream-fast did not write is in the place of one of the `paths`."""
        if (record := self.record()) is not None:
            record.check_free(paths)

    def record(self) -> Record | None:
        """The record of the files in this folder, or None where there is no workspace yet."""
        return Record.read(self.path)

    def mark(self) -> Record:
        """The record of the files in this folder, which is made where there is none.

        Files of a version without a record are taken over, with the id that the manifest has.
        """
        if (record := self.record()) is not None:
            return record
        if not self.config.exists():
            return Record.create(self.path)
        self._check_known()
        id = self.read_manifest().get("id")
        return Record.adopt(self.path, id if isinstance(id, str) else None)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out inside the `with` block, from its start or, for a new folder, from `create()` on."""
        if self.path.is_dir():
            self._lock()
        try:
            if self.lock is not None and self.config.exists():
                self.mark()
                self._separate()
            yield
        finally:
            if self.lock is not None:
                self.lock.release()
                self.lock = None

    def _separate(self) -> None:
        """Copy files that grow where a backup has hard links to them, so that it stays as it is."""
        for path in (self.metrics, self.log):
            if path.exists() and path.stat().st_nlink > 1:
                data = read_regular(path, MAX_METRICS_BYTES, folder=self.path)
                with atomic_write(path) as temporary:
                    temporary.write_bytes(data)

    def _lock(self) -> None:
        try:
            self.lock = Lock(self.path)
        except OSError as error:
            raise UserError(f"{self.typed} cannot be written to ({error.strerror})") from error

    def check_not_moved(self) -> None:
        """Raises UserError: when the folder was moved, removed or replaced since it was locked."""
        if self.lock is not None and not self.lock.is_valid():
            raise UserError(
                f"{self.typed} is gone: it was moved, removed or unmounted during the run; what was saved "
                "is where the folder is now, and the same command with that --workspace continues there"
            )

    def stored_config(self) -> Config | None:
        """The configuration of the run in this folder, or None in a new folder."""
        stored = self.stored_run()
        return None if stored is None else stored.config

    def stored_run(self) -> StoredRun | None:
        """The run in this folder, of this version or another one, or None in a new folder.

        Raises UserError: when its settings are damaged or of a version that this one cannot read.
        """
        try:
            if not self.config.exists():
                return None
            return read_run(json.loads(read_regular(self.config, MAX_JSON_BYTES).decode("utf-8")))
        except (OSError, ValueError, RecursionError, UserError) as error:
            reason = f"it {error.reason}" if isinstance(error, BadFile) else error
            raise UserError(f"{self.config} cannot be used: {reason}") from error

    def check_same_run(self, config: Config) -> None:
        """Raises UserError: when the run in this folder has another configuration, with the differences."""
        stored = self.stored_config()
        if stored is not None and (differences := stored.differences(config)):
            raise UserError(
                f"{self.typed} holds another run: it has {'; '.join(differences)} (choose another "
                f"{self.flag}{', or replace that run with --ckpt scratch' * (self.flag == '--workspace')})"
            )

    def create(self) -> None:
        """Create the folder and lock it.

        Raises UserError: when it cannot be created, or another run began in it since this one started.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.typed} cannot be created ({error})") from error
        if self.lock is None:
            self._lock()
            if self.config.exists():
                raise UserError(f"another run has just begun in {self.typed}; choose another one")
        self.mark()

    def write_config(self, config: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.mark()
        write_text(self.config, json.dumps({VERSION_KEY: __version__, **config.to_dict()}, indent=1) + "\n")

    def create_for_outputs_of(self, workspace: "Workspace", config: Config) -> None:
        """Create the folder and lock it, with the settings, the manifest and the metrics of the run in `workspace`.

        Raises UserError: when it cannot be created or holds something else.
        """
        if list_checkpoints(self.checkpoints):
            raise UserError(
                f"{self.typed} is the workspace of a run; choose another folder, or --workspace {self.path}"
            )
        self.check_same_run(config)
        self.create()
        self.write_config(config)
        for copy, original in ((self.manifest, workspace.manifest), (self.metrics, workspace.metrics)):
            if original.exists():
                write_text(copy, read_regular(original, MAX_METRICS_BYTES).decode("utf-8", "replace"))

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        if (record := self.record()) is not None:
            manifest = {**manifest, "id": record.id}
        write_text(self.manifest, json.dumps(manifest, indent=1) + "\n")

    def read_manifest(self) -> dict[str, Any]:
        """The manifest, or an empty one where none was written yet. Raises UserError: when it is damaged."""
        if not self.manifest.exists():
            return {}
        try:
            manifest = json.loads(read_regular(self.manifest, MAX_JSON_BYTES).decode("utf-8"))
        except (OSError, ValueError, RecursionError, BadFile) as error:
            reason = f"it {error.reason}" if isinstance(error, BadFile) else error
            raise UserError(f"{self.manifest} cannot be used: {reason}") from error
        runs = manifest.get("runs", []) if isinstance(manifest, dict) else None
        if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
            raise UserError(f"{self.manifest} cannot be used: it lists no runs")
        wrong = {name for run in runs for name, value in run.items() if not _has_type(MANIFEST_TYPES.get(name), value)}
        if wrong:
            raise UserError(f"{self.manifest} cannot be used: {', '.join(sorted(wrong))} of a run has the wrong type")
        return manifest

    def later_files(self, step: int, last: int) -> list[Path]:
        """Files (of any type) with the names of images and videos after `step` and up to step `last`."""
        names = re.compile(r"(?:turntable_)?step_(\d{6,12})\.(?:png|mp4)")
        folders = [folder for folder in (self.validation, self.guidance, self.results) if folder.is_dir()]
        matches = [(path, names.fullmatch(path.name)) for folder in folders for path in folder.iterdir()]
        return [path for path, match in matches if match and step < int(match[1]) <= last]

    @contextmanager
    def recording(self, folder: Path) -> Iterator[None]:
        """Record the files that a library makes in `folder` inside the `with` block, and lets grow later."""
        before = set(folder.glob("*"))
        yield
        if (record := self.record()) is not None:
            for path in set(folder.glob("*")) - before:
                record.take(path)

    def quarantine(self, checkpoint: Path) -> Path | None:
        """Rename a damaged checkpoint so that the run ignores it; returns its new path.

        None: dream-fast did not write it, or the other name is taken, so that it stays.
        """
        path, record = checkpoint.with_name(f"damaged_{checkpoint.name}"), self.mark()
        if record.name(checkpoint) not in record.sizes or os.path.lexists(path) and not record.owns(path):
            return None
        record.claim(path)
        checkpoint.replace(path)
        record.add(path)
        return path

    def clear(self) -> None:
        """Remove the run in this folder (`--ckpt scratch`): the recorded files, and folders that are empty then."""
        record = self.mark()
        for path in record.files():
            record.remove(path)
        record.remove_temporaries()
        _remove_empty(self._folders())
        Record.create(self.path)  # with another id

    def clear_outputs(self) -> None:
        """Remove the recorded files that a run writes at its end."""
        record = self.mark()
        for path in record.files():
            folder = path.relative_to(record.root).parent.as_posix()  # the workspace itself may be called results
            is_output = folder in (self.mesh.name, self.results.name) or path.name == self.report.name
            if is_output and not path.name.startswith("turntable_step_"):  # written during the run
                record.remove(path)
        _remove_empty([self.mesh])

    def truncate_after(self, step: int) -> None:
        """Remove the recorded files and rows of later steps, which a run that resumes at `step` writes again.

        Files that were being written when the run was killed go too, and so do unreadable rows of the metrics, with a
        logged warning; the last row may be cut short, so it goes without one.
        """
        record = self.mark()
        for path in list_checkpoints(self.checkpoints):
            if step_of(path) > step and is_own(path, record):
                path.unlink()
        for path in record.files():
            if path.parent.name in (self.validation.name, self.guidance.name, self.results.name):
                number = path.stem.rpartition("step_")[2]
                if "step_" in path.stem and number.isdecimal() and int(number[:12]) > step:
                    record.remove(path)
        record.remove_temporaries()
        if self.metrics.exists():
            text = read_regular(self.metrics, MAX_METRICS_BYTES).decode("utf-8", "replace")
            rows = [(line, _step_of(line)) for line in text.split("\n")[:-1]]
            if damaged := sum(reached is None for _, reached in rows):
                logger.warning("%s: rows that cannot be read are left out: %d", self.metrics, damaged)
            remaining = "".join(f"{line}\n" for line, reached in rows if reached is not None and reached <= step)
            if remaining != text:
                write_text(self.metrics, remaining)
        record.compact()


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it holds something else, or does not exist
            folder.rmdir()


def _has_type(kind: Any, value: Any) -> bool:
    """True if the value is of a type of MANIFEST_TYPES; numbers have to be finite."""
    if kind is None:
        return True
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_has_type(kind[str], part) for part in value.values())
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e200
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, kind)


def _step_of(row: str) -> int | None:
    """The step of a row of the metrics, or None when the row is unreadable."""
    try:
        step = json.loads(row)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
