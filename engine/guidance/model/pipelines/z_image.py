"""Z-Image (Tongyi 2025): a flow that runs from noise to images, whose prompts have no padding.

Its pipeline guides with pos + s (pos - neg): its scale is one less than ours.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dream_fast.engine.guidance.model.pipelines.base import PipelineModel


class ZImage(PipelineModel):
    """Adapter of ZImagePipeline."""

    pipeline_class = "ZImagePipeline"
    prediction_type = "negative_flow"
    window = 512

    def sizes(self, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
        image_size = 512  # the pipeline's own default is 1024
        return network["in_channels"], image_size // 2 ** (len(vae["block_out_channels"]) - 1), image_size

    def embed_positive(self, prompts: list[str]) -> dict[str, Tensor]:
        rows, _ = self.pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        mask = pad_sequence([torch.ones(len(row), device=row.device) for row in rows], batch_first=True)
        return {"states": pad_sequence(rows, batch_first=True), "mask": mask}

    def call_network(self, latents: Tensor, t: Tensor, embedding: dict[str, Tensor]) -> Tensor:
        lengths = (embedding["mask"] > 0).sum(1).tolist()
        states = [row[:length] for row, length in zip(embedding["states"], lengths, strict=True)]
        images = list(latents.unsqueeze(2).unbind())
        return torch.stack(self.network(images, (1000 - t) / 1000, states, return_dict=False)[0]).squeeze(2)
