"""Guidance by a prompt, in the form that the trainer calls."""

import torch
from torch import Tensor

from dream_fast.engine.guidance.base import Guidance, GuidanceResult
from dream_fast.engine.guidance.perp_neg import Negatives, negative_weights
from dream_fast.engine.guidance.prompts import PromptEmbeddings, view_weights
from dream_fast.engine.guidance.sds import ScoreDistillation, Settled
from dream_fast.engine.scene.camera import Cameras


class DiffusionGuidance(Guidance):
    """Pulls pictures towards a prompt, seen from where their cameras stand.

    The trainer takes anything that is called like this and returns a ``loss`` that is differentiable in the pictures,
    beside ``t`` and ``grad_norm`` for the log.
    """

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

    def __call__(
        self,
        pictures: Tensor,
        cameras: Cameras,
        *,
        progress: float,
        step: int = 0,
        generator: torch.Generator,
        latents: bool = False,
        settled: Settled | None = None,
    ) -> GuidanceResult:
        """``pictures`` [B, 3, H, W] in [0, 1] of B cameras; with ``latents``, [B, 4, H, W] in the scale of latents.

        ``settled`` is for a caller that captures this call in a CUDA graph (:class:`ScoreDistillation`).
        """
        angles = (cameras.azimuth, cameras.polar, self.angle_overhead, self.view_blend, self.angle_front)
        cond, uncond = self.prompts.embeddings(*angles)
        options = dict(progress=progress, step=step, generator=generator, latents=latents, settled=settled)
        if self.score.config.perpneg:
            options["negatives"] = self._negatives(view_weights(*angles))
        return self.score(pictures, cond, uncond, **options)

    def settle(self, batch: int, step: int, progress: float, generator: torch.Generator) -> Settled:
        """What ``settled`` takes for ``step``."""
        return self.score.settle(batch, step, progress, generator)

    def _negatives(self, views: Tensor) -> Negatives:
        """The prompts of the front and the side, with their weights for pictures that show ``views`` [B, 4]."""
        config, embeddings = self.score.config, self.prompts.views[:2]  # of VIEWS
        weights = negative_weights(views, config.negative_w, config.front_decay_factor, config.side_decay_factor)
        return Negatives(embeddings, weights.to(embeddings.device))
