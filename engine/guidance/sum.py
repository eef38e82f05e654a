"""Several guidances at once: the sum of their losses, and so of their gradients."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dream_fast.engine.guidance.base import Guidance, GuidanceResult, StepInputs
from dream_fast.engine.guidance.model.image_model import ImageModel
from dream_fast.engine.scene.camera import Cameras


class GuidanceSum(Guidance):
    """Add up the guidances `terms`, by name. One that does not accept latents is left out of a step that shows them."""

    def __init__(self, terms: Mapping[str, Guidance]):
        self.terms = dict(terms)

    @property
    def components(self) -> ImageModel | None:
        """Those of the first guidance with a diffusion model."""
        return next((term.components for term in self.terms.values() if term.components is not None), None)

    def __call__(self, images: Tensor, cameras: Cameras, inputs: StepInputs) -> GuidanceResult:
        """Return the result of the first guidance with a diffusion model (else of the first one), with the sum of all
        losses as `loss` and each of them in `losses`."""
        terms = {name: term for name, term in self.terms.items() if term.accepts_latents or not inputs.latents}
        results = {name: term(images, cameras, inputs) for name, term in terms.items()}
        with_model = (name for name, term in terms.items() if term.components is not None)
        primary = next(with_model, next(iter(results)))
        losses = {name: result.loss for name, result in results.items()}
        return results[primary]._replace(loss=torch.stack(list(losses.values())).sum(), losses=losses)
