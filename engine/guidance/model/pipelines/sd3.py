"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a flow with three text encoders, of which T5 may be missing."""

from typing import Any

from torch import Tensor

from dream_fast.engine.guidance.model.pipelines.base import PipelineModel


class StableDiffusion3(PipelineModel):
    """Adapter of StableDiffusion3Pipeline."""

    pipeline_class = "StableDiffusion3Pipeline"
    capturable = True
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")

    def sizes(self, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
        side = network["sample_size"]
        return network["in_channels"], side, side * 2 ** (len(vae["block_out_channels"]) - 1)

    def embed_positive(self, prompts: list[str]) -> dict[str, Tensor]:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    def call_network(self, latents: Tensor, t: Tensor, embedding: dict[str, Tensor]) -> Tensor:
        return self.network(
            latents, embedding["states"], pooled_projections=embedding["pooled"], timestep=t, return_dict=False
        )[0]
