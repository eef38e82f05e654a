"""Checkpoints: the whole state of a run in one safetensors file, without pickle.

A state is a nested dict of tensors and plain values (numbers, strings, booleans, None, lists of them). Tensors are
stored under their path in the dict ("optimizer/exp_avg"), the plain values as JSON in the file's metadata, with the
format version, the architecture of the field, the run (its id, prompt and seed) and a SHA-256 of all of it. Writes are
atomic, so that a run that is killed leaves the previous checkpoint intact.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dream_fast import __version__
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.files import BadFile, is_regular, open_regular
from dream_fast.engine.workspace.atomic import atomic_write
from dream_fast.engine.workspace.record import Record
from dream_fast.engine.workspace.stored_run import UNNAMED, complete_architecture, unknown_settings, way_to_read

FORMAT = "dream-fast checkpoint"  # the key of the header in the file's metadata
VERSION = 3
READABLE_VERSIONS = (1, 2, 3)  # 1 did not count the steps whose samples did not fit, 2 had no checksum
CHECKPOINTS_KEPT = 2

_NAME = re.compile(r"step_(\d{6,12})\.safetensors")
_OS_ERROR = re.compile(r"os error (\d+)")  # in safetensors' message about a full disk


class Damaged(UserError):
    """A checkpoint that is damaged."""


class Foreign(UserError):
    """A checkpoint of another run, or one that does not match its name."""


def checkpoint_path(directory: Path, step: int, digits: int = 6) -> Path:
    return directory / f"step_{step:0{digits}d}.safetensors"


def save_checkpoint(
    directory: Path,
    step: int,
    state: Mapping[str, Any],
    architecture: Mapping[str, Any],
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write the state after `step` steps, remove all but the last two checkpoints of `directory`, return the path.

    `run` is `Config.run_facts`. In a workspace a file in the way that dream-fast did not write stays, and the step in
    the name has more digits.
    """
    record = Record.around(directory / "checkpoint")
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    _flatten(state, "", tensors, values)
    header = {"version": VERSION, "step": step, "architecture": architecture, "values": values}
    header["dream_fast"] = __version__
    if run is not None:
        header["run"] = run
    header["checksum"] = _checksum(header, tensors)
    # one entry, since safetensors writes several in no fixed order and the same run should give the same file
    metadata = {FORMAT: json.dumps(header, sort_keys=True)}
    path = _free_path(directory, step, record)
    with atomic_write(path) as temporary:
        mode = temporary.stat().st_mode  # by the umask, as of any other file of the run
        try:
            save_file(tensors, temporary, metadata=metadata)  # creates a file that its owner alone can read
        except SafetensorError as error:
            if (number := _OS_ERROR.search(str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        temporary.chmod(mode)
    for old in [path for path in list_checkpoints(directory) if is_own(path, record)][:-CHECKPOINTS_KEPT]:
        old.unlink()
    return path


def _free_path(directory: Path, step: int, record: Record | None) -> Path:
    paths = [checkpoint_path(directory, step, digits) for digits in range(6, 13)]
    if record is not None:
        for path in paths:
            if not os.path.lexists(path) or record.owns(path):
                return path
    return paths[0]


def list_checkpoints(directory: Path) -> list[Path]:
    """The files of `directory` with the name of a checkpoint, oldest step first; nothing else than regular files."""
    if not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and is_regular(path)]
    return sorted(paths, key=lambda path: (step_of(path), path.name))


def newest_readable(checkpoints: Sequence[Path]) -> Path:
    """Return the newest of `checkpoints` whose header can be read and fits its name; without one the newest."""
    for path in reversed(checkpoints):
        try:
            with _open(path) as file:
                _check_name(path, _header(path, file))
            return path
        except UserError:
            continue
    return checkpoints[-1]


def is_own(path: Path, record: Record | None) -> bool:
    """True if dream-fast wrote the checkpoint: it is in the `record`; without one, it has our header."""
    if record is not None:
        return record.owns(path)
    try:
        with _open(path) as file:
            _header(path, file)
    except UserError:
        return False
    return True


def check_belongs(path: Path, record: Record | None, run: Mapping[str, Any], last_step: int) -> None:
    """Check that a checkpoint in the workspace of `record` is of its run (`Config.run_facts`) and at most `last_step`.

    Raises Foreign: it is of another run, or its name is of another step. Raises Damaged: its header cannot be read.
    """
    with _open(path) as file:
        header = _header(path, file)
    _check_name(path, header)
    stated, stays = header.get("run"), ", and stays as it is"
    if stated is None:
        if record is not None and not record.owns(path):
            raise Foreign(f"the checkpoint {path} names no run, and dream-fast did not write it here{stays}")
    else:
        stated = stated if isinstance(stated, dict) else {}
        names = {"text": "prompt", "seed": "seed"}
        if header.get("dream_fast") == __version__:
            names["settings"] = "setting"
        other = [word for name, word in names.items() if stated.get(name) != run.get(name)]
        if other:
            raise Foreign(f"the checkpoint {path} is of another run, with another {' and '.join(other)}{stays}")
    if header["step"] > last_step:
        raise Foreign(f"the checkpoint {path} is of step {header['step']}, beyond the run's {last_step}{stays}")


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint, which may be damaged."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, f"{path.name} is no name of a checkpoint"
    return int(match[1])


def read_architecture(path: Path) -> dict[str, Any]:
    """The architecture of the run that wrote the checkpoint, with the names of this version.

    Raises UserError: when the file is not a checkpoint.
    """
    with _open(path) as file:
        return complete_architecture(_header(path, file)["architecture"])


def load_checkpoint(
    path: Path, architecture: Mapping[str, Any], most_bytes: int | None = None
) -> tuple[int, dict[str, Any]]:
    """The step and the state (tensors on the CPU) of a file of at most `most_bytes`.

    Raises UserError: the architecture is another one. Raises Foreign: its name is of another step. Raises Damaged: the
    file is damaged, larger, or has numbers that are not finite.
    """
    with _open(path, most_bytes) as file:
        header = _header(path, file)
        _check_architecture(path, header, json.loads(json.dumps(architecture)))
        try:
            flat: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, RuntimeError, ValueError, TypeError, OSError) as error:
            raise damaged(path, first_line(error)) from error
    if "checksum" in header or header["version"] > 2:
        if header.pop("checksum", None) != _checksum(header, flat):
            raise damaged(path, "its checksum is wrong")
    _check_name(path, header)
    for name, tensor in flat.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise damaged(path, f"{name} has values that are not finite")
    try:
        return header["step"], _nest(flat | header["values"])
    except (AttributeError, TypeError) as error:
        raise damaged(path, f"its state: {first_line(error)}") from error


def _open(path: Path, most_bytes: int | None = None):
    if path.is_dir() or not path.exists():
        raise UserError(f"there is no checkpoint at {path}")
    try:
        open_regular(path, most_bytes).close()
    except BadFile as error:
        raise damaged(path, f"it {error.reason}") from error
    except OSError as error:
        raise damaged(path, first_line(error)) from error
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, first_line(error)) from error


def damaged(path: Path, reason: object) -> Damaged:
    """The error about a damaged checkpoint, with advice."""
    checkpoints = list_checkpoints(path.parent)
    oldest = path not in checkpoints or checkpoints.index(path) == 0
    advice = "; --ckpt scratch starts over" if oldest else ""
    return Damaged(f"the checkpoint {path} is damaged, truncated or not a safetensors file ({reason}){advice}")


def _header(path: Path, file) -> dict[str, Any]:
    metadata = file.metadata() or {}
    if FORMAT not in metadata:
        raise UserError(f"{path} is a safetensors file, but not a checkpoint of dream-fast")
    try:
        header = json.loads(metadata[FORMAT])
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header: {first_line(error)}") from error
    if not isinstance(header, dict) or "version" not in header:
        raise damaged(path, "its header has no version")
    if header["version"] not in READABLE_VERSIONS:
        raise UserError(
            f"the checkpoint {path} has format version {header['version']}, written by dream-fast "
            f"{header.get('dream_fast', 'of another version')}; this is {__version__}, which reads format versions "
            f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}: upgrade dream-fast"
        )
    for name, kind in (("step", int), ("architecture", dict), ("values", dict)):
        if type(header.get(name)) is not kind:
            raise damaged(path, f"its header has no {name}")
    if header["step"] < 0:
        raise damaged(path, f"its header has step {header['step']}")
    return header


def _check_name(path: Path, header: Mapping[str, Any]) -> None:
    if _NAME.fullmatch(path.name) and step_of(path) != header["step"]:
        raise Foreign(f"the checkpoint {path} is of step {header['step']}, unlike its name: rename it back")


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of the header (without a checksum) and the names, dtypes, shapes and bytes of the tensors."""
    checksum = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        checksum.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()


def _check_architecture(path: Path, header: dict[str, Any], expected: dict[str, Any]) -> None:
    if unknown := unknown_settings(header["architecture"]):
        raise UserError(
            f"the checkpoint {path} is of a field with settings that this version of dream-fast does not know "
            f"({', '.join(unknown)}); {way_to_read(header.get('dream_fast', UNNAMED))}"
        )
    saved = complete_architecture(header["architecture"])
    # Another backbone has other settings, so the message names the backbone alone.
    names = sorted(saved.keys() | expected.keys())
    if saved.get("backbone") != expected.get("backbone"):
        names = ["backbone"]
    differences = [
        f"{n} {saved.get(n)} there, {expected.get(n)} here" for n in names if saved.get(n) != expected.get(n)
    ]
    if differences:
        raise UserError(f"the checkpoint {path} is of another architecture: {'; '.join(differences)}")


def _flatten(state: Mapping[str, Any], prefix: str, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    for name, value in state.items():
        path = f"{prefix}{name}"
        if isinstance(value, torch.Tensor):
            # a copy each: parameters that are views of one buffer share storage, which safetensors refuses
            tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        elif isinstance(value, Mapping):
            _flatten(value, f"{path}/", tensors, values)
        else:
            values[path] = value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return nested
