"""Several guidances at once: their losses, and so their gradients, are added."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dream_fast.engine.guidance.base import Guidance, GuidanceResult
from dream_fast.engine.guidance.diffusion import DiffusionGuidance
from dream_fast.engine.scene.camera import Cameras


class GuidanceSum(Guidance):
    """The sum of ``parts``, by name. Called like :class:`~dream_fast.engine.guidance.diffusion.DiffusionGuidance`.

    A part that has nothing to say about latents is left out of a step that shows them.
    """

    def __init__(self, parts: Mapping[str, Guidance]):
        self.parts = dict(parts)

    def __call__(
        self,
        pictures: Tensor,
        cameras: Cameras,
        *,
        progress: float,
        step: int = 0,
        generator: torch.Generator,
        latents: bool = False,
    ) -> GuidanceResult:
        """The result of the first image model (of the first part without one), with the sum of all losses as ``loss``
        and each of them in ``losses``."""
        options = dict(progress=progress, step=step, generator=generator, latents=latents)
        asked = {name: part for name, part in self.parts.items() if part.takes_latents or not latents}
        results = {name: part(pictures, cameras, **options) for name, part in asked.items()}
        shown = next((name for name, part in asked.items() if isinstance(part, DiffusionGuidance)), next(iter(results)))
        losses = {name: result.loss for name, result in results.items()}
        return results[shown]._replace(loss=torch.stack(list(losses.values())).sum(), losses=losses)


def primary_diffusion(guidance: object) -> DiffusionGuidance | None:
    """The guidance by an image model that ``guidance`` is or has, of several the first; else None."""
    parts = guidance.parts.values() if isinstance(guidance, GuidanceSum) else [guidance]
    return next((part for part in parts if isinstance(part, DiffusionGuidance)), None)
