"""Adapters of diffusers' pipelines: one class a family, and the table of them.

A new family takes a module here and a line in FAMILIES.
"""

from dream_fast.engine.guidance.model.pipelines.base import PipelineModel
from dream_fast.engine.guidance.model.pipelines.flux import Flux
from dream_fast.engine.guidance.model.pipelines.flux2_klein import Flux2Klein
from dream_fast.engine.guidance.model.pipelines.lumina2 import Lumina2
from dream_fast.engine.guidance.model.pipelines.pixart_sigma import PixArtSigma
from dream_fast.engine.guidance.model.pipelines.prx import PRX
from dream_fast.engine.guidance.model.pipelines.qwen_image import QwenImage
from dream_fast.engine.guidance.model.pipelines.sana import Sana
from dream_fast.engine.guidance.model.pipelines.sd3 import StableDiffusion3
from dream_fast.engine.guidance.model.pipelines.sdxl import StableDiffusionXL
from dream_fast.engine.guidance.model.pipelines.z_image import ZImage

FAMILIES: dict[str, type[PipelineModel]] = {
    family.pipeline_class: family
    for family in (
        StableDiffusionXL, StableDiffusion3, PRX, Flux2Klein, Flux, ZImage, Lumina2, PixArtSigma, Sana, QwenImage,
    )
}  # fmt: skip
