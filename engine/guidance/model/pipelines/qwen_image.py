"""Qwen-Image (Wu et al. 2025): a flow on 2 x 2 patches of the latents of a video VAE."""

from typing import Any

import torch
from torch import Tensor

from dream_fast.engine.guidance.model.pipelines.base import PipelineModel


class QwenImage(PipelineModel):
    """Adapter of QwenImagePipeline."""

    pipeline_class = "QwenImagePipeline"
    window = 512

    def sizes(self, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
        side = self.pipeline.default_sample_size // 2  # half of the size that the pipeline defaults to
        return network["in_channels"] // 4, side, side * 2 ** len(vae["temperal_downsample"])

    def embed_positive(self, prompts: list[str]) -> dict[str, Tensor]:
        states, mask = self.pipeline.encode_prompt(prompts, self.device)
        mask = states.new_ones(states.shape[:2]) if mask is None else mask
        return {"states": states, "mask": mask.float()}

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return ((latents - mean) / std).squeeze(2)

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return latents.unsqueeze(2) * std + mean

    def as_posterior(self, noise: Tensor) -> Tensor:
        return noise.unsqueeze(2)

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        return super().encode(images.unsqueeze(2), noise)  # a video of one frame

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents).squeeze(2)

    def call_network(self, latents: Tensor, t: Tensor, embedding: dict[str, Tensor]) -> Tensor:
        batch, channels, height, width = latents.shape
        pipeline = self.pipeline
        out = self.network(
            hidden_states=pipeline._pack_latents(latents, batch, channels, height, width),
            timestep=t.to(latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states_mask=(embedding["mask"] > 0).long(),
            encoder_hidden_states=embedding["states"],
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(out, height * 8, width * 8, 8).squeeze(2)

    def guide_natively(self, guided: Tensor, cond: Tensor) -> Tensor:
        # The guided prediction keeps the length that the conditional one has in each patch.
        ratio = _patch_norm(cond) / _patch_norm(guided)
        return guided * ratio.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, each [1, C, 1, 1, 1]."""
        settings = self.pipeline.vae.config
        values = torch.tensor([settings.latents_mean, settings.latents_std], device=self.device)
        mean, std = values.view(2, 1, -1, 1, 1, 1)
        return mean, std


def _patch_norm(latents: Tensor) -> Tensor:
    """Length [B, 1, h / 2, w / 2] of each patch of 2 x 2 latents [B, C, h, w]."""
    patches = latents.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return patches.square().sum(dim=(1, 3, 5)).sqrt()[:, None]
