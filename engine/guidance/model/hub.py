"""Find the folder of an image model: a local folder, a download from the hub, or without a network the hub's cache.

Only the files that a run reads are downloaded, one set of weights for each component. In the cache any set is used:
weights in full precision for a run in half precision, and the reverse.
"""

import logging
import shlex
from collections.abc import Callable
from pathlib import Path

from dream_fast.engine.config.model_names import copies, hub_name, is_address, other_names
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.guidance.model.checks import (
    KINDS,
    missing_files,
    pipeline_name,
    pipeline_parts,
    single_file,
    weight_files,
    weight_stem,
    weights_of,
)
from dream_fast.engine.runtime.paths import expand_user

logger = logging.getLogger(__name__)


def find_folder(source: str | Path, kind: str, *, half: bool) -> Path:
    """Return the local folder of `source`, after a download when it is a name on the hub.

    Raises UserError: when there is no such folder or model; the message has instructions.
    """
    folder = expand_user(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"the model {single_file(folder, kind)}")
    named = hub_name(str(source))
    if named is None:
        if is_address(str(source)):
            raise UserError(
                f"{source} is not the address of a model on the hub; download it and name the file or folder"
            )
        owner = "; a name on the hub has an owner, as in OWNER/NAME" * ("/" not in str(source))
        raise UserError(f"the model folder {folder} does not exist{owner}")
    return _download(*named, kind, half=half)


def _download(name: str, revision: str | None, kind: str, *, half: bool) -> Path:
    """Download a model of the hub (or find it in the hub's cache) and return its folder.

    `revision` is a commit, a tag or a branch. With `half`, fp16 weights are preferred where the repository has them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        folder = _fetch_parts(fetch, kind, half)
    except GatedRepoError as error:
        raise UserError(
            f"the hub model {name} is gated: accept its licence at https://huggingface.co/{name} and run "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        flag = KINDS[kind].flag
        raise UserError(f"there is no folder and no model on the hub called {name}{copies(name, flag)}") from error
    except RevisionNotFoundError as error:
        raise UserError(f"the hub model {name} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        return _in_cache(name, revision, kind, error)
    except OSError as error:
        raise UserError(f"the download of the hub model {name} failed: {first_line(error)}") from error
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # of the client, such as a proxy that refuses
            raise
        return _in_cache(name, revision, kind, error)
    # Without a network an older client returns whatever the cache has, even if incomplete.
    if missing_files(folder, kind) and not _reaches_hub(name, revision):
        return _in_cache(name, revision, kind)
    return folder


def _fetch_parts(fetch: Callable[[list[str]], Path], kind: str, half: bool) -> Path:
    """Fetch the settings, and of each component with weights the first variant that exists."""
    parts = KINDS[kind].parts
    stems = {part: stem for part, (_, _, stem) in parts.items() if stem}
    folder = fetch(["model_index.json", "tokenizer/*", *(f"{part}/{name}" for part, (_, name, _) in parts.items())])
    if kind == "SD" and pipeline_name(folder) is not None:
        named = pipeline_parts(folder)
        folder = fetch([f"{part}/{name}" for part in named for name in ("*.json", "*.txt", "*.model")])
        stems = {part: weight_stem(part) for part in named if (folder / part / "config.json").exists()}
    missing = stems
    for variant in ("fp16", None) if half else (None, "fp16"):
        if half or variant == "fp16":
            missing = {part: stem for part, stem in stems.items() if weights_of(folder, part, stem) is None}
        if missing:
            folder = fetch([pattern for part, stem in missing.items() for pattern in _patterns(part, stem, variant)])
    return folder


def _patterns(part: str, stem: str, variant: str | None) -> list[str]:
    """Return patterns of the files of a component's weights, one file or several."""
    whole, index = weight_files(stem, variant)
    return [f"{part}/{name}" for name in (whole, index, f"{whole.removesuffix('.safetensors')}-0*.safetensors")]


def _reaches_hub(name: str, revision: str | None) -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except Exception:  # of the client's own kinds, which differ between its versions
        return False
    return True


def _in_cache(name: str, revision: str | None, kind: str, error: Exception | None = None) -> Path:
    """Return the folder of `name` in the hub's cache, with any one set of weights.

    Raises UserError: when a file is missing; the message has the command that downloads it.
    """
    folders = _snapshots(name, revision)
    complete = [folder for folder in folders if not missing_files(folder, kind)]
    if complete:
        if complete[0] != folders[0]:
            lacking = ", ".join(missing_files(folders[0], kind))
            logger.warning(
                "the cached revision %s of %s lacks %s; revision %s is used",
                folders[0].name[:8],
                name,
                lacking,
                complete[0].name[:8],
            )
        return complete[0]
    command = f"where there is a network: {_download_command(name, revision, kind, folders)}"
    unreachable = f"the hub cannot be reached{_because(error)}"
    if folders:
        lacking = ", ".join(missing_files(folders[0], kind))
        raise UserError(f"{unreachable}, and its cache of {name} lacks {lacking}; {command}") from error
    flag = KINDS[kind].flag
    at = f" at revision {revision}" if revision else ""
    nothing = f"there is no folder called {name}, {unreachable}, and its cache does not hold that model{at}"
    held = [other for other in other_names(name) if any(not missing_files(f, kind) for f in _snapshots(other, None))]
    if held:
        raise UserError(f"{nothing}, but {flag} {held[0]}, which has the same weights") from error
    gone = copies(name, flag)
    raise UserError(nothing + (gone or f"; {command}")) from error


def _because(error: Exception | None) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return " (HF_HUB_OFFLINE is set)"
    return f" ({first_line(error)})" if error and type(error).__module__.startswith("httpx") else ""


def _snapshots(name: str, revision: str | None) -> list[Path]:
    """Return the folders of `name` in the hub's cache: of `revision`, or of main, then the others, newest first."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folders: list[Path] = []
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=["model_index.json"], local_files_only=True)
        folders.append(Path(folder))
    except LocalEntryNotFoundError as error:
        if path := getattr(error, "snapshot_path", None):  # without even that file
            folders.append(Path(path))
    if revision is None:
        cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
        others = [folder for folder in cache.glob("*") if folder not in folders]
        folders += sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True)
    return folders


def _download_command(name: str, revision: str | None, kind: str, folders: list[Path]) -> str:
    """Return the command that downloads the files that the newest of `folders` lacks, or all of them."""
    lacking = missing_files(folders[0], kind) if folders else missing_files(Path("/dev/null"), kind)
    stems = {f"{part}/{stem}.safetensors": (part, stem) for part, (_, _, stem) in KINDS[kind].parts.items() if stem}
    patterns: list[str] = []
    for file in lacking:
        if file in stems:
            patterns += _patterns(*stems[file], None)
        else:
            patterns.append("tokenizer/*" if file.startswith("tokenizer/") else file)
    words = ["hf", "download", name, *(["--revision", revision] if revision else [])]
    includes = [word for pattern in dict.fromkeys(patterns) for word in ("--include", pattern)]
    return shlex.join([*words, *includes])
