"""Lumina-Image 2.0 (Qin et al. 2025): a flow that runs from noise to images, with a Gemma as its text encoder."""

from typing import Any

import torch
from torch import Tensor

from dream_fast.engine.guidance.model.pipelines.base import PipelineModel


class Lumina2(PipelineModel):
    """Adapter of Lumina2Pipeline."""

    pipeline_class = "Lumina2Pipeline"
    prediction_type = "negative_flow"
    window = 256

    def sizes(self, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
        side = network["sample_size"] // 2  # half of the size that the pipeline defaults to
        return network["in_channels"], side, side * 2 ** (len(vae["block_out_channels"]) - 1)

    def embed_positive(self, prompts: list[str]) -> dict[str, Tensor]:
        states, mask, _, _ = self.pipeline.encode_prompt(prompts, False, device=self.device)
        return {"states": states, "mask": mask.float()}

    def embed_negative(self, prompt: str) -> dict[str, Tensor]:
        # Without the system prompt, as the pipeline has it.
        states, mask = self.pipeline._get_gemma_prompt_embeds([prompt], self.device)
        return {"states": states, "mask": mask.float()}

    def call_network(self, latents: Tensor, t: Tensor, embedding: dict[str, Tensor]) -> Tensor:
        return self.network(
            hidden_states=latents,
            timestep=1 - t / 1000,
            encoder_hidden_states=embedding["states"],
            encoder_attention_mask=(embedding["mask"] > 0).to(torch.int64),
            return_dict=False,
        )[0]

    def guide_natively(self, guided: Tensor, cond: Tensor) -> Tensor:
        # The guided prediction keeps the length that the conditional one has in each row of pixels.
        return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
