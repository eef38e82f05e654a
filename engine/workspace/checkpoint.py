"""Checkpoints: the whole state of a run in one safetensors file, without pickle.

A state is a nested dict of tensors and plain values (numbers, strings, booleans, None, lists of them). Tensors are
stored under their path in the dict ("optimizer/exp_avg"), the plain values as JSON in the file's metadata, beside the
format version, the architecture of the field and a SHA-256 of all of it. Writes are atomic, so that a run that is
killed leaves the previous checkpoint intact.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dream_fast import __version__
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.workspace.atomic import atomic_write
from dream_fast.engine.workspace.stored_run import UNNAMED, complete_architecture, unknown_settings, way_to_read

FORMAT = "dream-fast checkpoint"  # the key of the header in the file's metadata
VERSION = 3
READABLE_VERSIONS = (1, 2, 3)  # 1 did not count the steps whose samples did not fit, 2 had no checksum
CHECKPOINTS_KEPT = 2

_NAME = re.compile(r"step_(\d{6,12})\.safetensors")
_OS_ERROR = re.compile(r"os error (\d+)")  # in safetensors' message about a full disk


class Damaged(UserError):
    """A checkpoint that is damaged."""


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}.safetensors"


def save_checkpoint(directory: Path, step: int, state: Mapping[str, Any], architecture: Mapping[str, Any]) -> Path:
    """Write the state after `step` steps, remove all but the last two checkpoints of `directory`, return the path."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    _flatten(state, "", tensors, values)
    header = {"version": VERSION, "step": step, "architecture": architecture, "values": values}
    header["dream_fast"] = __version__
    header["checksum"] = _checksum(header, tensors)
    # one entry, since safetensors writes several in no fixed order and the same run should give the same file
    metadata = {FORMAT: json.dumps(header, sort_keys=True)}
    path = checkpoint_path(directory, step)
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask, as of any other file of the run
        try:
            save_file(tensors, temporary, metadata=metadata)  # creates a file that its owner alone can read
        except SafetensorError as error:
            if (number := _OS_ERROR.search(str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        temporary.chmod(mode)
    for old in list_checkpoints(directory)[:-CHECKPOINTS_KEPT]:
        old.unlink()
    return path


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of `directory`, oldest step first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


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


def load_checkpoint(path: Path, architecture: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The step and the state (tensors on the CPU). Raises UserError: when the architecture is another one."""
    with _open(path) as file:
        header = _header(path, file)
        _check_architecture(path, header, json.loads(json.dumps(architecture)))
        try:
            flat: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, RuntimeError, ValueError, TypeError, OSError) as error:
            raise damaged(path, first_line(error)) from error
    if "checksum" in header or header["version"] > 2:
        if header.pop("checksum", None) != _checksum(header, flat):
            raise damaged(path, "its checksum is wrong")
    try:
        return header["step"], _nest(flat | header["values"])
    except (AttributeError, TypeError) as error:
        raise damaged(path, f"its state: {first_line(error)}") from error


def _open(path: Path):
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, first_line(error)) from error


def damaged(path: Path, reason: object) -> Damaged:
    """The error about a damaged checkpoint, with advice."""
    checkpoints = list_checkpoints(path.parent)
    oldest = path not in checkpoints or checkpoints.index(path) == 0
    advice = "; --ckpt scratch starts over" if oldest else ""
    return Damaged(f"the checkpoint {path} is damaged, cut short or not a safetensors file ({reason}){advice}")


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
