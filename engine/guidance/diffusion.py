"""Guidance by a diffusion model and a prompt."""

from torch import Tensor

from dream_fast.engine.guidance.base import Guidance, GuidanceResult, StepInputs
from dream_fast.engine.guidance.model.components import Components
from dream_fast.engine.guidance.perp_neg import Negatives, negative_weights
from dream_fast.engine.guidance.prompts import PromptEmbeddings, view_weights
from dream_fast.engine.guidance.sds import ScoreDistillation, Settled
from dream_fast.engine.scene.camera import Cameras


class DiffusionGuidance(Guidance):
    """Pull images towards a prompt by score distillation. The prompt follows the cameras."""

    capturable = True

    def __init__(
        self,
        score: ScoreDistillation,
        prompts: PromptEmbeddings,
        angle_overhead: float,
        view_blend: float = 90.0,
        angle_front: float | None = None,
    ):
        self.score, self.prompts = score, prompts
        self.angle_overhead, self.view_blend, self.angle_front = angle_overhead, view_blend, angle_front

    @property
    def components(self) -> Components:
        return self.score.components

    def prepare_step(self, inputs: StepInputs, batch: int) -> StepInputs:
        timesteps, scalars = self.score.settle(batch, inputs.step, inputs.progress, inputs.generator)
        return inputs._replace(timesteps=timesteps, scalars={**inputs.scalars, **scalars})

    def __call__(self, images: Tensor, cameras: Cameras, inputs: StepInputs) -> GuidanceResult:
        angles = (cameras.azimuth, cameras.polar, self.angle_overhead, self.view_blend, self.angle_front)
        cond, uncond = self.prompts.embeddings(*angles)
        negatives = self._negatives(view_weights(*angles)) if self.score.config.perpneg else None
        return self.score(
            images,
            cond,
            uncond,
            progress=inputs.progress,
            step=inputs.step,
            generator=inputs.generator,
            latents=inputs.latents,
            settled=None if inputs.timesteps is None else Settled(inputs.timesteps, inputs.scalars),
            negatives=negatives,
        )

    def _negatives(self, views: Tensor) -> Negatives:
        """The prompts of the front and the side, with their weights for images that show ``views`` [B, 4]."""
        config, embeddings = self.score.config, self.prompts.views[:2]  # of VIEWS
        weights = negative_weights(views, config.negative_w, config.front_decay_factor, config.side_decay_factor)
        return Negatives(embeddings, weights.to(embeddings.device))
