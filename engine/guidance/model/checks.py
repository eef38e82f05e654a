"""Check the folder of an image model before anything is loaded; each error has instructions.

Nothing is unpickled: weights are safetensors, and the error for other files has the command that converts them.
"""

import json
import logging
import os
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from dream_fast.engine.config.model_names import PIPELINES, SAME_PARTS, cached_name
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.files import BadFile, is_regular, kind_of, read_regular
from dream_fast.engine.guidance.model.settings import (
    MAX_SETTINGS_BYTES,
    check_pipeline_settings,
    check_settings,
    check_weight_file,
)

logger = logging.getLogger(__name__)

SINGLE_FILES = (".safetensors", ".ckpt")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class Kind(NamedTuple):
    """Components of a kind of model.

    `parts`: folder of each component -> (class names allowed in model_index.json, its configuration, stem of its
    weights or None).
    """

    pipeline: str
    flag: str
    vocabularies: tuple[str, ...]
    parts: dict[str, tuple[tuple[str, ...], str, str | None]]


_SETTINGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
_UNET = (("UNet2DConditionModel",), "config.json", "diffusion_pytorch_model")
_SCHEDULER = ((), "scheduler_config.json", None)  # of any class: only its noise schedule is used
KINDS = {
    "SD": Kind(
        "StableDiffusionPipeline",
        "--hf_key",
        ("vocab.json", "tokenizer.json"),
        {
            "tokenizer": (("CLIPTokenizer", "CLIPTokenizerFast"), "tokenizer_config.json", None),
            "text_encoder": (("CLIPTextModel",), "config.json", "model"),
            "unet": _UNET,
            "vae": (("AutoencoderKL",), "config.json", "diffusion_pytorch_model"),
            "scheduler": _SCHEDULER,
        },
    ),
    "IF": Kind(
        "IFPipeline",
        "--if_key",
        ("spiece.model", "tokenizer.json"),
        {
            "tokenizer": (("T5Tokenizer", "T5TokenizerFast"), "tokenizer_config.json", None),
            "text_encoder": (("T5EncoderModel",), "config.json", "model"),
            "unet": _UNET,
            "scheduler": _SCHEDULER,
        },
    ),
}


def check_folder(folder: Path, kind: str, source: str | Path) -> dict[str, str | None]:
    """Return the variant, None or "fp16", of each part's weights in `folder`, the one of `source` (a folder, a name).

    Raises UserError: when it is another kind of model or folder, or a file is missing or damaged.
    """
    _check_layout(folder, kind)
    _check_index(folder, kind)
    return {part: _check_part(folder, kind, part, source) for part in KINDS[kind].parts}


def missing_files(folder: Path, kind: str) -> list[str]:
    """Names, relative to `folder`, of files that a run needs and it lacks; of weights those in full precision."""
    if kind == "SD" and pipeline_name(folder) is not None:
        return _missing_of_pipeline(folder)
    _, _, vocabularies, parts = KINDS[kind]
    needed = ["model_index.json", *(f"{part}/{config}" for part, (_, config, _) in parts.items())]
    lacking = [name for name in needed if not (folder / name).exists()]
    if not any((folder / "tokenizer" / name).exists() for name in vocabularies):
        lacking.append(f"tokenizer/{vocabularies[0]}")
    for part, (_, _, stem) in parts.items():
        if stem and weights_of(folder, part, stem) is None:
            lacking.append(f"{part}/{stem}.safetensors")
    return lacking


def weight_files(stem: str, variant: str | None) -> tuple[str, str]:
    """Names of a component's weights in one file, and of the index of several files."""
    ending = "" if variant is None else f".{variant}"
    return f"{stem}{ending}.safetensors", f"{stem}.safetensors.index{ending}.json"


def pipeline_name(folder: Path) -> str | None:
    """Return the class of a folder's pipeline if it has an adapter, else None."""
    if not (folder / "model_index.json").exists():
        return None
    name = read_json(folder / "model_index.json").get("_class_name")
    return name if name in PIPELINES else None


def pipeline_parts(folder: Path) -> list[str]:
    """Names of the components that the index of a pipeline with an adapter lists."""
    index = read_json(folder / "model_index.json")
    return [part for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]]


def check_pipeline(folder: Path) -> None:
    """Raises UserError: when a component of a pipeline with an adapter is missing, damaged, or only pickled."""
    if lacking := _missing_of_pipeline(folder):
        pickled = any(path.suffix in PICKLES for path in folder.glob("*/*"))
        advice = "; pickled weights are not loaded, as a pickle can run code" if pickled else ""
        raise UserError(f"the model {folder} lacks {lacking[0]}{advice}")
    for part in pipeline_parts(folder):
        check_files(folder / part)
        tensors = [name for path in sorted((folder / part).glob("*.safetensors")) for name in check_weight_file(path)]
        for settings in ("config.json", "scheduler_config.json"):
            if (folder / part / settings).exists():
                place = f"the {part} of the model {folder}"
                check_pipeline_settings(place, read_json(folder / part / settings), tensors)


def _missing_of_pipeline(folder: Path) -> list[str]:
    """Files that a pipeline with an adapter lacks: settings of each component, and weights of its models."""
    lacking = []
    for part in pipeline_parts(folder):
        settings = _SETTINGS.get(part.rstrip("_23"), "config.json")
        if not (folder / part / settings).exists():
            lacking.append(f"{part}/{settings}")
        elif settings == "config.json" and weights_of(folder, part, weight_stem(part)) is None:
            lacking.append(f"{part}/{weight_stem(part)}.safetensors")
    return lacking


def weight_stem(part: str) -> str:
    """Return the stem of the weights of a pipeline's component: that of transformers or that of diffusers."""
    return "model" if "encoder" in part else "diffusion_pytorch_model"


def pipeline_variant(folder: Path) -> str | None:
    """Return the variant "fp16" where a component of a pipeline has only such weights, else None."""
    weights = [weights_of(folder, part, weight_stem(part)) for part in pipeline_parts(folder)]
    return next((found.variant for found in weights if found is not None and found.variant), None)


class Weights(NamedTuple):
    """Files of a component's weights, and their variant."""

    files: list[str]
    variant: str | None


def weights_of(folder: Path, part: str, stem: str) -> Weights | None:
    """Return the first complete weights of `part` in `folder`, full precision before fp16, or None.

    Raises UserError: when an index cannot be read.
    """
    for variant in (None, "fp16"):
        name, index = weight_files(stem, variant)
        files = _shards(folder / part / index) if (folder / part / index).exists() else [name]
        if all((folder / part / file).exists() for file in files):
            return Weights(files, variant)
    return None


def _check_layout(folder: Path, kind: str) -> None:
    """Raises UserError: when a folder does not have the layout of diffusers; the message identifies it."""
    if (folder / "model_index.json").exists():
        return
    flag = KINDS[kind].flag
    if (name := cached_name(folder.name)) is not None:
        raise UserError(f"{folder} is the hub's cache of {name}: name the model by {flag} {name}")
    if (folder.parent / "model_index.json").exists():
        raise UserError(f"{folder} is one component of a model: name the folder around it, {flag} {folder.parent}")
    single = sorted(path for path in folder.iterdir() if path.suffix in SINGLE_FILES)
    if single and not (folder / "config.json").exists():
        raise UserError(f"the model {folder} lacks model_index.json; {single_file(single[0], kind)}")


def single_file(path: Path, kind: str) -> str:
    """Advice for a model that is one file."""
    if _is_lora(path):
        return f"{path} is a LoRA: put it into the weights of a model with diffusers (load_lora_weights, fuse_lora)"
    if path.suffix not in (*SINGLE_FILES, *PICKLES):
        return f"{path} is a file; a folder in the layout of diffusers is needed"
    out = path.with_suffix("")
    flag, command = KINDS[kind].flag, _convert(kind, "from_single_file", path, out)
    return (
        f"{path} is a single file; convert it to a folder with the following command, and use {flag} {out}: {command}"
    )


def _is_lora(path: Path) -> bool:
    """Return whether a safetensors file has the tensor names of a LoRA."""
    if path.suffix != ".safetensors" or not is_regular(Path(os.path.realpath(path))):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return any("lora" in name.lower() for name in file.keys())
    except (SafetensorError, OSError):
        return False


def _convert(kind: str, method: str, source: str | Path, out: str | Path) -> str:
    """Command that converts a model to the layout of diffusers with safetensors."""
    pipeline = KINDS[kind].pipeline
    code = f"from diffusers import {pipeline} as P; P.{method}({_string(source)}).save_pretrained({_string(out)})"
    return f"python -c {shlex.quote(code)}"


def _string(path: str | Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _check_index(folder: Path, kind: str) -> None:
    """Raises UserError: when model_index.json describes another pipeline than this kind's."""
    index = read_json(folder / "model_index.json")
    pipeline, parts = index.get("_class_name"), KINDS[kind].parts
    if isinstance(pipeline, list) and pipeline:
        pipeline = pipeline[-1]  # of a pipeline with its own code, whose name comes first
    if pipeline not in SAME_PARTS[kind]:
        raise UserError(_other_pipeline(folder, kind, pipeline))
    for part, (classes, _, _) in parts.items():
        entry = index.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1]):
            raise UserError(f"the model {folder} lacks the component {part} (see its model_index.json)")
        if classes and entry[1] not in classes:
            raise UserError(f"the {part} of the model {folder} is a {entry[1]}; {classes[0]} is needed")
    if "controlnet" in index or "adapter" in index:
        logger.warning("the model %s is used without its ControlNet or adapter", folder)
    if index["scheduler"][1] in ("LCMScheduler", "TCDScheduler"):
        logger.warning(
            "the model %s was distilled for sampling in few steps (%s); the original model guides better",
            folder,
            index["scheduler"][1],
        )


def _other_pipeline(folder: Path, kind: str, pipeline: Any) -> str:
    """Message about a pipeline of another kind."""
    is_a = f"is a {pipeline}" if isinstance(pipeline, str) else "states no pipeline"
    sentence = f"the model {folder} {is_a}; only {KINDS[kind].pipeline} models can guide as {kind}"
    other = next((name for name, classes in SAME_PARTS.items() if pipeline in classes), None)
    if other is not None:
        return f"{sentence}: name it by {KINDS[other].flag}, with --guidance {other}"
    if "SuperResolution" in str(pipeline) or "Upscale" in str(pipeline):
        return f"{sentence}: name the model that makes the small images instead of the one that enlarges them"
    advice = "a Stable Diffusion 1.x or 2.x, such as --sd_version 2.1" if kind == "SD" else "the first stage of IF"
    return f"{sentence}: take {advice}"


def check_sentencepiece(folder: Path) -> None:
    """Raises UserError: when the tokenizer is a SentencePiece file and its reader is not installed."""
    packages = ("sentencepiece", "google.protobuf")
    if not (folder / "tokenizer" / "tokenizer.json").exists() and not all(map(_installed, packages)):
        raise UserError(
            f"the tokenizer of the model {folder} is a file of SentencePiece, whose package is missing: "
            "pip install 'dream-fast[if]'"
        )


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def _check_part(folder: Path, kind: str, part: str, source: str | Path) -> str | None:
    """Return the variant of the weights of `part`. Raises UserError: when a file is missing or damaged."""
    _, _, vocabularies, parts = KINDS[kind]
    _, config, stem = parts[part]
    if not (folder / part).is_dir():
        raise UserError(f"the model {folder} lacks its component {part}/")
    check_files(folder / part)
    settings = read_json(folder / part / config)
    if part == "scheduler":
        check_settings(f"the scheduler of the model {folder}", settings)
    if stem is None:
        if part == "tokenizer" and not any((folder / part / name).exists() for name in vocabularies):
            raise UserError(f"the model {folder} lacks tokenizer/{vocabularies[0]}")
        return None
    if part == "unet" and settings.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"the unet of the model {folder} takes the guidance scale as an input (time_cond_proj_dim), as a distilled "
            "model such as LCM does, so it has no unguided prediction; name the model that it was distilled from"
        )
    weights = _check_weights(folder, kind, part, stem, source)
    tensors = [name for file in weights.files for name in check_weight_file(folder / part / file)]
    check_settings(f"the {part} of the model {folder}", settings, tensors)
    return weights.variant


def check_files(folder: Path) -> None:
    """Check that all that a library may read in the folder of a component is a file of a sensible size.

    Raises UserError: it is something else, such as a pipe, or settings or a vocabulary are too large.
    """
    for path in sorted(folder.iterdir()):
        try:
            info = path.stat()
        except OSError as error:
            raise UserError(f"the model file {path} cannot be read ({error.strerror})") from error
        if (kind := kind_of(info.st_mode)) and kind != "a folder":
            raise UserError(f"the model file {path} is {kind} instead of a file")
        if not kind and path.suffix in (".json", ".txt", ".model") and info.st_size > MAX_SETTINGS_BYTES:
            raise UserError(f"the model file {path} has {info.st_size} bytes, of at most {MAX_SETTINGS_BYTES}")


def _check_weights(folder: Path, kind: str, part: str, stem: str, source: str | Path) -> Weights:
    """Return the weights of `part`. Raises UserError: when they are missing, damaged or pickled."""
    if (weights := weights_of(folder, part, stem)) is not None:
        return weights
    for index in (weight_files(stem, variant)[1] for variant in (None, "fp16")):
        if (folder / part / index).exists():
            for file in _shards(folder / part / index):
                check_weight_file(folder / part / file)
    lacks = f"the model {source} lacks {part}/{stem}.safetensors"
    from_hub = folder != Path(source).expanduser()
    if not from_hub and not any(path.suffix in PICKLES for path in (folder / part).iterdir()):
        raise UserError(lacks)
    out = f"{Path(source).name.replace('@', '-')}-safetensors" if from_hub else f"{folder}-safetensors"
    command = _convert(kind, "from_pretrained", source, out)
    raise UserError(
        f"{lacks}, and pickled weights are not loaded, as a pickle can run code; if you trust it, "
        f"convert it to safetensors with the following command, and use {KINDS[kind].flag} {out}: {command}"
    )


def _shards(index: Path) -> list[str]:
    """Files that an index names. Raises UserError: when it names none, or files outside its folder."""
    named = read_json(index).get("weight_map")
    files = list(named.values()) if isinstance(named, dict) else []
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise UserError(f"the model file {index} must name files in its own folder in its weight_map")
    return sorted(set(files))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file of settings of a model. Raises UserError: it cannot be read or is another value."""
    try:
        content = json.loads(read_regular(path, MAX_SETTINGS_BYTES).decode("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"the model {path.parent} lacks {path.name}") from error
    except BadFile as error:
        raise UserError(f"the model file {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the model file {path} cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"the model file {path} is not a JSON object")
    return content
