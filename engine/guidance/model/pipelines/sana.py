"""Sana (Xie et al. 2024): a flow on the strongly compressed latents of DC-AE, with a Gemma as its text encoder."""

import inspect
from typing import Any

import torch
from torch import Tensor

from dream_fast.engine.guidance.model.pipelines.base import PipelineModel


class Sana(PipelineModel):
    """Adapter of SanaPipeline."""

    pipeline_class = "SanaPipeline"
    capturable = True
    window = 300

    def sizes(self, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
        side = network["sample_size"]
        return network["in_channels"], side, side * 2 ** (len(vae["encoder_block_out_channels"]) - 1)

    def embed_positive(self, prompts: list[str]) -> dict[str, Tensor]:
        # The pipeline writes its default instruction before prompts.
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        return self._embed(prompts, parameters["complex_human_instruction"].default)

    def embed_negative(self, prompt: str) -> dict[str, Tensor]:
        return self._embed([prompt], None)

    def _embed(self, prompts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
        states, mask, _, _ = self.pipeline.encode_prompt(
            prompts, False, device=self.device, complex_human_instruction=instruction
        )
        return {"states": states, "mask": mask.float()}

    def call_network(self, latents: Tensor, t: Tensor, embedding: dict[str, Tensor]) -> Tensor:
        out = self.network(
            latents,
            encoder_hidden_states=embedding["states"].to(latents.dtype),
            encoder_attention_mask=(embedding["mask"] > 0).to(torch.int64),
            timestep=t * self.network.config.timestep_scale,
            return_dict=False,
        )[0]
        return out[:, : self.latent_channels]
