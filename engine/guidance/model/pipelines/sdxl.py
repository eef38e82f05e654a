"""Stable Diffusion XL (Podell et al. 2023): two text encoders, a pooled vector and the sizes of the image."""

from typing import Any

import torch
from torch import Tensor

from dream_fast.engine.guidance.model.pipelines.base import PipelineModel


class StableDiffusionXL(PipelineModel):
    """Adapter of StableDiffusionXLPipeline."""

    pipeline_class = "StableDiffusionXLPipeline"
    network_part = "unet"
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    prediction_type = "epsilon"
    half = torch.float16

    def sizes(self, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
        side = network["sample_size"]
        return vae["latent_channels"], side, side * 2 ** (len(vae["block_out_channels"]) - 1)

    def vae_dtype(self, settings: dict[str, Any]) -> torch.dtype:
        # The published VAE, which has this setting, overflows in fp16. bf16 has the range of fp32.
        return torch.bfloat16 if settings.get("force_upcast") and self.dtype == torch.float16 else self.dtype

    def embed_positive(self, prompts: list[str]) -> dict[str, Tensor]:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    def embed_negative(self, prompt: str) -> dict[str, Tensor]:
        embedding = self.embed_positive([prompt])
        if not prompt and self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(tensor) for name, tensor in embedding.items()}
        return embedding

    def call_network(self, latents: Tensor, t: Tensor, embedding: dict[str, Tensor]) -> Tensor:
        # Original size, corner of the crop and target size: an uncropped image of the model's own size.
        sizes = latents.new_full((len(latents), 6), self.image_size)
        sizes[:, 2:4] = 0
        added = {"text_embeds": embedding["pooled"], "time_ids": sizes}
        return self.network(
            latents, t, encoder_hidden_states=embedding["states"], added_cond_kwargs=added, return_dict=False
        )[0]
