"""The folder of a run: where each file goes, whose run it is, and what may change when it is taken up again.

    config.json      the resolved configuration       log.txt       what the terminal showed, without the bar
    manifest.json    versions, device, seed, command  metrics.jsonl a row every few steps
    checkpoints/     the last two                     validation/   a view now and then during the run
    results/         video and six views              mesh/         the mesh, when asked for
    report.html      all of it on one page            guidance/, tensorboard/, profile/  when asked for

Everything here is plain files; what a run has reached is read from its checkpoints and never kept twice.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dream_fast import __version__
from dream_fast.engine.config.schema import Config
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.workspace.atomic import atomic_write, stale_temp_files
from dream_fast.engine.workspace.checkpoint import list_checkpoints, step_of
from dream_fast.engine.workspace.lock import Lock
from dream_fast.engine.workspace.stored_run import VERSION_KEY, StoredRun, read_run

logger = logging.getLogger(__name__)

# What is read of a run in the manifest again, and its kind: float any number, a dict one of such values.
MANIFEST = {
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
    """The folder at ``path`` and the names of the things in it. Making one touches no disk.

    ``lock`` keeps other processes out, inside `claimed`. ``flag`` is the one that named the folder, for messages.
    """

    path: Path
    lock: Lock | None = None
    flag: str = "--workspace"

    @property
    def named(self) -> str:
        """The folder as it was typed, such as ``--workspace trial``."""
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
        """Every file of the run, in the order of this class; of pictures of the steps only the last."""
        found: list[Path] = []
        for path in self._everything():
            inside = sorted(path.glob("*.*")) if path.is_dir() else [path] * path.exists()
            found += inside[-1:] if path in (self.validation, self.guidance) else inside
        return found

    def _everything(self) -> list[Path]:
        files = [self.config, self.manifest, self.metrics, self.log]
        during = [self.validation, self.guidance, self.tensorboard, self.profile, self.checkpoints]
        return [*files, *during, self.results, self.mesh, self.report]

    def check_usable(self, otherwise: str = "") -> None:
        """UserError when the folder cannot be this run's: a file in its place, no right to write, another's files.

        Writes nothing: the model may still turn out to be missing. ``otherwise`` says what to do where the folder may
        only be read.
        """
        existing = self.path
        try:
            while not existing.exists() and existing != existing.parent:
                existing = existing.parent
            inside = self.path.resolve()
            away = [path.name for path in self._everything() if not path.resolve().is_relative_to(inside)]
        except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, or links in a circle
            raise UserError(f"{self.named} cannot be a folder ({first_line(error)})") from error
        if away:
            raise UserError(f"{self.named}: {', '.join(away)} would be written elsewhere, being a link")
        if not existing.is_dir():
            raise UserError(f"{self.named}: {existing} is a file, not a folder")
        for path in (existing, *(path for path in (self.results, self.mesh, self.log) if path.exists())):
            if not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
                place = "in " * path.is_dir() + str(path)
                raise UserError(f"{self.named}: no permission to write {place}{otherwise}")
        if not self.config.exists():
            foreign = [path.name for path in self._everything() if path.exists()]
            if foreign:
                raise UserError(
                    f"{self.named} holds {', '.join(foreign)} but no config.json, so it is not a run of "
                    "dream-fast; choose another folder"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside the `with` block no other process works here: from now on, or from when the folder is made on."""
        if self.path.is_dir():
            self._claim()
        try:
            yield
        finally:
            if self.lock is not None:
                self.lock.release()
                self.lock = None

    def _claim(self) -> None:
        try:
            self.lock = Lock(self.path)
        except OSError as error:
            raise UserError(f"{self.named} cannot be written to ({error.strerror})") from error

    def check_not_moved(self) -> None:
        """UserError when the folder was moved or removed, or replaced, since it was claimed."""
        if self.lock is not None and not self.lock.is_there():
            raise UserError(
                f"{self.named} is gone: it was moved, removed or unmounted during the run; what was saved "
                "is where the folder is now, and the same command with that --workspace goes on from there"
            )

    def stored_config(self) -> Config | None:
        """The configuration of the run that lives here, or None in a fresh folder."""
        stored = self.stored_run()
        return None if stored is None else stored.config

    def stored_run(self) -> StoredRun | None:
        """The run that lives here, of this version or another one, or None in a fresh folder.

        Raises UserError: its settings are damaged, or this version cannot read them.
        """
        try:
            if not self.config.exists():
                return None
            return read_run(json.loads(self.config.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, UserError) as error:
            raise UserError(f"{self.config} cannot be used: {error}") from error

    def check_same_run(self, config: Config) -> None:
        """UserError, saying what differs, when the run that lives here is not the one that ``config`` describes."""
        stored = self.stored_config()
        if stored is not None and (differences := stored.differences(config)):
            raise UserError(
                f"{self.named} holds another run: it has {'; '.join(differences)} (choose another "
                f"{self.flag}{', or replace that run with --ckpt scratch' * (self.flag == '--workspace')})"
            )

    def make(self) -> None:
        """The folder, claimed. UserError: it cannot be made, or another run began in it since this one started."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.named} cannot be made ({error})") from error
        if self.lock is None:
            self._claim()
            if self.config.exists():
                raise UserError(f"another run has just begun in {self.named}; choose another one")

    def write_config(self, config: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, json.dumps({VERSION_KEY: __version__, **config.to_dict()}, indent=1) + "\n")

    def make_for_outputs_of(self, workspace: "Workspace", config: Config) -> None:
        """The folder, claimed, with the settings, the manifest and the metrics of the run in ``workspace``.

        UserError: it cannot be made, or holds something else.
        """
        if list_checkpoints(self.checkpoints):
            raise UserError(
                f"{self.named} is the workspace of a run; choose another folder, or --workspace {self.path}"
            )
        self.check_same_run(config)
        self.make()
        self.write_config(config)
        for ours, theirs in ((self.manifest, workspace.manifest), (self.metrics, workspace.metrics)):
            if theirs.exists():
                write_text(ours, theirs.read_text(encoding="utf-8", errors="replace"))

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        write_text(self.manifest, json.dumps(manifest, indent=1) + "\n")

    def read_manifest(self) -> dict[str, Any]:
        """The manifest, or an empty one where none was written yet. UserError: it is damaged."""
        if not self.manifest.exists():
            return {}
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.manifest} cannot be used: {error}") from error
        runs = manifest.get("runs", []) if isinstance(manifest, dict) else None
        if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
            raise UserError(f"{self.manifest} cannot be used: it lists no runs")
        wrong = {name for run in runs for name, value in run.items() if not _fits(MANIFEST.get(name), value)}
        if wrong:
            raise UserError(f"{self.manifest} cannot be used: {', '.join(sorted(wrong))} of a run is no such thing")
        return manifest

    def quarantine(self, checkpoint: Path) -> Path:
        """Takes a damaged checkpoint out of the run, and keeps it: returns its new path."""
        return checkpoint.rename(checkpoint.with_name(f"damaged_{checkpoint.name}"))

    def clear(self) -> None:
        """Removes the run that lives here: what ``--ckpt scratch`` asks for."""
        for path in self._everything():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def clear_outputs(self) -> None:
        """Removes what a finished run writes at its end."""
        shutil.rmtree(self.mesh, ignore_errors=True)
        for path in [*self.results.glob("*"), self.report]:
            if not path.name.startswith("turntable_step_"):  # of the steps, not of the end
                path.unlink(missing_ok=True)

    def truncate_after(self, step: int) -> None:
        """Drops what was recorded after ``step``: a run that resumes there records it again. Half-written files go too.

        Rows of the metrics that cannot be read are dropped too, with a logged warning; the last one may be cut short by
        whatever stopped the run, so it goes without one.
        """
        for path in list_checkpoints(self.checkpoints):
            if step_of(path) > step:
                path.unlink()
        for folder in (self.validation, self.guidance, self.results):
            for path in folder.glob("*step_*.*"):
                if (number := path.stem.rpartition("_")[2]).isdecimal() and int(number[:12]) > step:
                    path.unlink()
        for path in stale_temp_files(self.path):
            path.unlink(missing_ok=True)
        if self.metrics.exists():
            text = self.metrics.read_text(encoding="utf-8", errors="replace")
            rows = [(line, _step_of(line)) for line in text.split("\n")[:-1]]
            if damaged := sum(reached is None for _, reached in rows):
                logger.warning("%s: rows that cannot be read are left out: %d", self.metrics, damaged)
            kept = "".join(f"{line}\n" for line, reached in rows if reached is not None and reached <= step)
            if kept != text:
                write_text(self.metrics, kept)


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a kind of MANIFEST; numbers are finite."""
    if kind is None:
        return True
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(kind[str], part) for part in value.values())
    if kind is float:
        return isinstance(value, int | float) and abs(value) < float("inf")
    return isinstance(value, kind)


def _step_of(row: str) -> int | None:
    """The step of a row of the metrics, or None when it is no such row."""
    try:
        step = json.loads(row)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` so that ``path`` is never half a file."""
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")
