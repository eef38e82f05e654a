"""Load the image model that a setting names, by the adapter of its pipeline."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.model.attention import AttentionChoice
from dream_fast.engine.guidance.model.checks import check_pipeline, pipeline_name
from dream_fast.engine.guidance.model.components import load_components
from dream_fast.engine.guidance.model.hub import find_folder
from dream_fast.engine.guidance.model.image_model import ImageModel
from dream_fast.engine.runtime.quiet import quiet_diffusers


def load_image_model(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kind: str = "SD",
    need_vae_decoder: bool = False,
    vram_O: bool = False,
    attention: str = "auto",
    previous: AttentionChoice | None = None,
    compiled: Sequence[str] = (),
) -> ImageModel:
    """Load the pipeline at `source`, a folder or a hub name; the options are those of `load_components`.

    Raises UserError: when a file is missing, damaged or unreachable, no adapter knows the pipeline, or it has another
    attention than the one that `attention` names.
    """
    folder = find_folder(source, kind, half=dtype == torch.float16)
    name = pipeline_name(folder)
    if name is None or kind == "IF":
        return load_components(
            source, device, dtype, kind=kind, need_vae_decoder=need_vae_decoder, vram_O=vram_O, attention=attention,
            previous=previous, compiled=compiled,
        )  # fmt: skip
    if attention not in ("auto", "sdpa"):
        raise UserError(f"--attention {attention} is for Stable Diffusion 1 and 2; {name} uses sdpa")
    check_pipeline(folder)
    quiet_diffusers()
    from dream_fast.engine.guidance.model.pipelines import FAMILIES

    return FAMILIES[name](
        folder, device, dtype, name=str(source), need_vae_decoder=need_vae_decoder, vram_O=vram_O,
        compiled=bool(compiled),
    )  # fmt: skip
