"""Guidance by a diffusion model and a prompt."""

from torch import Tensor

from dream_fast.engine.config.schema import Config
from dream_fast.engine.guidance.base import Guidance, GuidanceResult, StepInputs
from dream_fast.engine.guidance.model.image_model import ImageModel, first_tensor, map_rows
from dream_fast.engine.guidance.perp_neg import Negatives, negative_weights
from dream_fast.engine.guidance.prompts import PromptEmbeddings, ViewAngles, view_weights
from dream_fast.engine.guidance.sds import ScoreDistillation
from dream_fast.engine.scene.camera import Cameras


class DiffusionGuidance(Guidance):
    """Pull images towards a prompt by score distillation. The prompt follows the cameras."""

    def __init__(self, distillation: ScoreDistillation, prompts: PromptEmbeddings, angles: ViewAngles | None = None):
        self.distillation, self.prompts, self.angles = distillation, prompts, angles or ViewAngles()

    @property
    def capturable(self) -> bool:  # type: ignore[override]  # a class attribute in the protocol
        return self.distillation.components.capturable

    @property
    def components(self) -> ImageModel:
        return self.distillation.components

    def prepare_step(self, inputs: StepInputs, batch: int) -> StepInputs:
        return self.distillation.prepare_step(inputs, batch)

    def __call__(self, images: Tensor, cameras: Cameras, inputs: StepInputs) -> GuidanceResult:
        cond, uncond = self.prompts.embeddings(cameras.azimuth, cameras.polar, self.angles)
        negatives = self._negatives(cameras) if self.distillation.config.perpneg else None
        return self.distillation(images, cond, uncond, inputs, negatives)

    def _negatives(self, cameras: Cameras) -> Negatives:
        """The prompts of front and side, weighted by what the cameras see."""
        config = self.distillation.config
        embeddings = map_rows(lambda rows: rows[:2], self.prompts.views)  # of VIEWS
        views = view_weights(cameras.azimuth, cameras.polar, self.angles)
        weights = negative_weights(views, config.negative_w, config.front_decay_factor, config.side_decay_factor)
        return Negatives(embeddings, weights.to(first_tensor(embeddings).device))


def diffusion_guidance(
    components: ImageModel, prompts: PromptEmbeddings, config: Config, *, cuda_graphs: bool = True
) -> DiffusionGuidance:
    """Assemble the guidance of a run from a loaded model and its embedded prompts."""
    distillation = ScoreDistillation(components, config.guidance, cuda_graphs=cuda_graphs)
    return DiffusionGuidance(distillation, prompts, ViewAngles.of(config.camera))
