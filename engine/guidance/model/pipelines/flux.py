"""FLUX.1 (Black Forest Labs 2024): a flow on 2 x 2 patches of latents, with CLIP and T5.

Its guidance is distilled into the network, which takes a scale as an input. Such a model teaches badly: without
its own guidance, its predictions with and without the prompt differ little from those of other models.
"""

from typing import Any

import torch
from torch import Tensor

from dream_fast.engine.guidance.model.pipelines.base import PipelineModel

# Scale of the distilled guidance: 1 is the unguided prediction, to which classifier-free guidance is applied.
DISTILLED_SCALE = 1.0


class Flux(PipelineModel):
    """Adapter of FluxPipeline."""

    pipeline_class = "FluxPipeline"
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")

    def sizes(self, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
        side = self.pipeline.default_sample_size // 2  # 512 x 512 pixels; the pipeline's own default is 1024 x 1024
        return network["in_channels"] // 4, side, side * 2 ** (len(vae["block_out_channels"]) - 1)

    def embed_positive(self, prompts: list[str]) -> dict[str, Tensor]:
        states, pooled, _ = self.pipeline.encode_prompt(prompts, None, device=self.device)
        return {"states": states, "pooled": pooled}

    def call_network(self, latents: Tensor, t: Tensor, embedding: dict[str, Tensor]) -> Tensor:
        batch, channels, height, width = latents.shape
        pipeline, states = self.pipeline, embedding["states"]
        distilled = self.network.config.guidance_embeds
        out = self.network(
            hidden_states=pipeline._pack_latents(latents, batch, channels, height, width),
            timestep=t.to(latents.dtype) / 1000,
            guidance=torch.full_like(t, DISTILLED_SCALE, dtype=torch.float32) if distilled else None,
            pooled_projections=embedding["pooled"],
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, self.device, latents.dtype),
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(out, height * 8, width * 8, 8)
