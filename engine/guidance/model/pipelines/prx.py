"""PRX (Photoroom 2025): a small flow at 256 x 256 or 512 x 512 pixels, with Flux's VAE or DC-AE."""

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.model.pipelines.base import PipelineModel


class PRX(PipelineModel):
    """Adapter of PRXPipeline."""

    pipeline_class = "PRXPipeline"
    capturable = True
    window = 256

    def sizes(self, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
        image_size = self.pipeline.get_default_resolution()
        blocks = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
        return network["in_channels"], image_size // 2 ** (len(blocks) - 1), image_size

    def embed_positive(self, prompts: list[str]) -> dict[str, Tensor]:
        if find_spec("ftfy") is None:
            raise UserError("PRX cleans its prompts with ftfy, which is missing: pip install 'dream-fast[models]'")
        states, mask, _, _ = self.pipeline.encode_prompt(prompts, self.device, do_classifier_free_guidance=False)
        return {"states": states, "mask": mask.float()}

    def call_network(self, latents: Tensor, t: Tensor, embedding: dict[str, Tensor]) -> Tensor:
        return self.network(
            hidden_states=latents,
            timestep=t / 1000,
            encoder_hidden_states=embedding["states"],
            attention_mask=embedding["mask"] > 0,
            return_dict=False,
        )[0]
