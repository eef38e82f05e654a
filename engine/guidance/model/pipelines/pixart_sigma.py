"""PixArt-Sigma (Chen et al. 2024): a transformer that predicts noise and its variance, with T5 and SDXL's VAE."""

from typing import Any

from torch import Tensor

from dream_fast.engine.guidance.model.pipelines.base import PipelineModel


class PixArtSigma(PipelineModel):
    """Adapter of PixArtSigmaPipeline."""

    pipeline_class = "PixArtSigmaPipeline"
    capturable = True
    prediction_type = "epsilon"
    window = 300

    def sizes(self, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
        side = network["sample_size"]
        return network["in_channels"], side, side * 2 ** (len(vae["block_out_channels"]) - 1)

    def embed_positive(self, prompts: list[str]) -> dict[str, Tensor]:
        states, mask, _, _ = self.pipeline.encode_prompt(prompts, False, device=self.device)
        return {"states": states, "mask": mask.float()}

    def call_network(self, latents: Tensor, t: Tensor, embedding: dict[str, Tensor]) -> Tensor:
        out = self.network(
            latents,
            encoder_hidden_states=embedding["states"],
            encoder_attention_mask=(embedding["mask"] > 0).long(),
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return out[:, : self.latent_channels]  # the rest is the variance
