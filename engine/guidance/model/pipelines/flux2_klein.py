"""FLUX.2-klein-base (Black Forest Labs 2026): a flow on 2 x 2 patches of latents, normalised by statistics."""

from typing import Any

from torch import Tensor

from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.model.pipelines.base import PipelineModel


class Flux2Klein(PipelineModel):
    """Adapter of Flux2KleinPipeline. Its latents are the patches, [B, 4 C, h / 2, w / 2]."""

    pipeline_class = "Flux2KleinPipeline"
    window = 512

    def sizes(self, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
        if self.pipeline.config.is_distilled:
            raise UserError(
                f"the model {self.folder} was distilled to sample in few steps and has no unguided prediction; name "
                "the model that it was distilled from, such as FLUX.2-klein-base-4B"
            )
        side = self.pipeline.default_sample_size // 4  # 512 x 512 pixels; the pipeline's own default is 1024 x 1024
        return network["in_channels"], side, 2 * side * 2 ** (len(vae["block_out_channels"]) - 1)

    def embed_positive(self, prompts: list[str]) -> dict[str, Tensor]:
        states, _ = self.pipeline.encode_prompt(prompts, device=self.device)
        return {"states": states}

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return (self.pipeline._patchify_latents(latents) - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return self.pipeline._unpatchify_latents(latents * std + mean)

    def as_posterior(self, noise: Tensor) -> Tensor:
        return self.pipeline._unpatchify_latents(noise)

    def call_network(self, latents: Tensor, t: Tensor, embedding: dict[str, Tensor]) -> Tensor:
        pipeline, states = self.pipeline, embedding["states"]
        out = self.network(
            hidden_states=pipeline._pack_latents(latents),
            timestep=t.to(latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=states,
            txt_ids=pipeline._prepare_text_ids(states).to(self.device),
            img_ids=pipeline._prepare_latent_ids(latents).to(self.device),
            return_dict=False,
        )[0]
        return out.transpose(1, 2).reshape(latents.shape)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of patches, each [1, 4 C, 1, 1]."""
        vae = self.pipeline.vae
        mean, variance = (s.float().view(1, -1, 1, 1) for s in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()
