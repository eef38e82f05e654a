"""Base class of adapters of diffusers' pipelines: loading in two parts, embedding, and latents of a VAE.

The text encoders of these models are as large as their networks. They are loaded first, embed the prompts of the run
and are freed before the network and the VAE are loaded. Methods of the pipeline embed prompts and arrange latents, so
that its conventions are kept.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.guidance.model.attention import AttentionChoice
from dream_fast.engine.guidance.model.checks import pipeline_variant
from dream_fast.engine.guidance.model.components import enable_gradient_checkpointing, quiet_progress
from dream_fast.engine.guidance.model.image_model import Embedding
from dream_fast.engine.guidance.model.settings import check_finite
from dream_fast.engine.guidance.model.text import fit_window
from dream_fast.engine.guidance.noise import FLOW_TIMESTEPS, FlowMatching, NoiseProcess, VariancePreserving

FLOW_PREDICTIONS = ("flow", "negative_flow")


class PipelineModel(ABC):
    """An image model of diffusers, from the folder of its pipeline, as an `ImageModel`.

    pipeline_class: name of its class in diffusers.
    network_part: the component that predicts.
    text_parts: components that embed prompts.
    prediction_type: of `noise.PREDICTIONS`; None: that of the scheduler.
    window: tokens of a prompt that are read.
    half: dtype in place of fp16, for models that overflow in it.

    `vram_O` encodes one image at a time and recomputes the encoder's blocks in its backward; `compiled` compiles the
    network.

    Raises UserError: when a component is missing, does not load, or does not fit the family.
    """

    pipeline_class: ClassVar[str]
    network_part: ClassVar[str] = "transformer"
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    prediction_type: str = "flow"
    window: ClassVar[int] = 77
    half: ClassVar[torch.dtype] = torch.bfloat16

    latents_are_pixels = False
    embeds_again = True
    capturable: bool = False  # most networks copy positions of tokens to the device in each call

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        *,
        name: str = "",
        need_vae_decoder: bool = False,
        vram_O: bool = False,
        compiled: bool = False,
    ) -> None:
        self.folder, self.name, self.device = folder, name or str(folder), device
        self.dtype = self.half if dtype == torch.float16 else dtype
        self.need_vae_decoder, self.vram_O, self.compiled = need_vae_decoder, vram_O, compiled
        self.attention = AttentionChoice("sdpa", "sdpa")
        self.pipeline = self.load_pipeline({self.network_part: None, "vae": None})
        network, vae = (self.read_settings(part) for part in (self.network_part, "vae"))
        self.latent_channels, self.latent_size, self.image_size = self.sizes(network, vae)
        self.process = self._read_process()
        self.freed = False

    @abstractmethod
    def sizes(self, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
        """Channels and side of the latents, and side of the images, from the settings of the network and the VAE."""

    @abstractmethod
    def embed_positive(self, prompts: list[str]) -> dict[str, Tensor]:
        """Embed prompts to guide towards: tensors by name, a row a prompt, tokens in the second dimension."""

    def embed_negative(self, prompt: str) -> dict[str, Tensor]:
        """Embed the prompt to guide away from, as the pipeline does; one row."""
        return self.embed_positive([prompt])

    @abstractmethod
    def call_network(self, latents: Tensor, t: Tensor, embedding: dict[str, Tensor]) -> Tensor:
        """Output [B, C, h, w] of the network for latents in its dtype, at timesteps `t` [B] in [0, 1000]."""

    def guide_natively(self, guided: Tensor, cond: Tensor) -> Tensor:
        """Apply the pipeline's additional steps after classifier-free guidance; `cond` is the unguided output."""
        return guided

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents of the network from those of the VAE."""
        settings = self.pipeline.vae.config
        return (latents - (settings.get("shift_factor") or 0.0)) * settings.scaling_factor

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        settings = self.pipeline.vae.config
        return latents / settings.scaling_factor + (settings.get("shift_factor") or 0.0)

    def vae_dtype(self, settings: dict[str, Any]) -> torch.dtype:
        """Dtype of the VAE with these settings."""
        return self.dtype

    def fit_prompt(self, text: str, endings: Sequence[str]) -> str:
        return fit_window(self.pipeline.tokenizer, self.window, text, endings)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], negative: str | None = None) -> Embedding:
        loaded = self.pipeline
        if self.freed:
            self.pipeline = self.load_pipeline({self.network_part: None, "vae": None})
        parts = [self.embed_positive(list(prompts))]
        if negative is not None:
            parts.append(self.embed_negative(negative))
        self.pipeline = loaded
        return {name: _pad_and_join([part[name] for part in parts]) for name in parts[0]}

    def free_text_encoder(self) -> None:
        """Free the text encoders and load the network and the VAE."""
        if self.freed:
            return
        self.freed = True
        text = dict.fromkeys(self.text_parts)
        del self.pipeline
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.pipeline = self.load_pipeline(text)
        vae = self.pipeline.vae
        torch.nn.Module.to(vae, self.vae_dtype(vae.config))  # that of diffusers warns of parts in fp32
        if not self.need_vae_decoder:
            vae.decoder = torch.nn.Identity()
        self.network: Any = getattr(self.pipeline, self.network_part)
        if self.vram_O:
            vae.enable_slicing()
            enable_gradient_checkpointing(vae.encoder)
        if self.compiled:
            self.network.compile(dynamic=False)

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        vae = self.pipeline.vae
        encoded = vae.encode(images.to(vae.dtype))
        if not hasattr(encoded, "latent_dist"):  # an encoder without a distribution, such as DC-AE's
            return self.normalize(encoded.latent.float())
        latents = encoded.latent_dist.mean.float()
        if noise is not None:
            latents = latents + encoded.latent_dist.std.float() * self.as_posterior(noise)
        return self.normalize(latents)

    def as_posterior(self, noise: Tensor) -> Tensor:
        """Noise [B, C, h, w] in the shape of the VAE's posterior."""
        return noise

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        if not self.need_vae_decoder:
            raise ValueError("the model has no VAE decoder; load it with need_vae_decoder=True")
        return vae.decode(self.denormalize(latents).to(vae.dtype), return_dict=False)[0]

    def predict(self, noisy: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
        assert isinstance(embedding, dict)
        return self.call_network(noisy.to(self.dtype), t, embedding).float()

    def load_pipeline(self, without: dict[str, None]) -> Any:
        """Load the pipeline without some of its components, for inference on the device."""
        pipeline_class = getattr(diffusers, self.pipeline_class)
        options = {"torch_dtype": self.dtype, "variant": pipeline_variant(self.folder), **without}
        try:
            with quiet_progress():
                pipeline = pipeline_class.from_pretrained(
                    self.folder, local_files_only=True, use_safetensors=True, **options
                )
        except Exception as error:  # settings that the library does not expect raise any of Python's errors
            raise UserError(f"the model {self.folder} does not load: {first_line(error)}") from error
        parts = pipeline.components.items()
        models = {name: part for name, part in parts if isinstance(part, (diffusers.ModelMixin, PreTrainedModel))}
        for model in models.values():
            model.requires_grad_(False).eval()
        pipeline = pipeline.to(self.device)
        for name, model in models.items():
            check_finite(f"the {name} of the model {self.folder}", model)
        return pipeline

    def read_settings(self, part: str) -> dict[str, Any]:
        path = self.folder / part / "config.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"the model file {path} cannot be read ({first_line(error)})") from error

    def _read_process(self) -> NoiseProcess:
        """The noise process of the scheduler. Raises UserError: when it contradicts the family."""
        settings = self.pipeline.scheduler.config
        kind = type(self.pipeline.scheduler).__name__
        flow = "FlowMatch" in kind or settings.get("prediction_type") == "flow_prediction"
        if flow != (self.prediction_type in FLOW_PREDICTIONS):
            expected = "noise variances" if flow else "flow matching"
            raise UserError(
                f"the scheduler of the model {self.folder} is a {kind}, but a {self.pipeline_class} needs {expected}"
            )
        if flow:
            if settings.num_train_timesteps != FLOW_TIMESTEPS:
                raise UserError(
                    f"the scheduler of the model {self.folder} has {settings.num_train_timesteps} timesteps; "
                    f"{FLOW_TIMESTEPS} are needed"
                )
            return FlowMatching(FLOW_TIMESTEPS)
        prediction = settings.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise UserError(
                f"the model {self.folder} predicts {prediction!r}; epsilon, v_prediction or sample is needed"
            )
        self.prediction_type = prediction
        schedule = diffusers.DDIMScheduler.from_config(settings)  # any scheduler; read for its noise schedule
        return VariancePreserving(schedule.alphas_cumprod.to(self.device, torch.float32))


def _pad_and_join(tensors: list[Tensor]) -> Tensor:
    """Join rows of tensors whose second dimensions differ: the shorter ones are padded with zeros."""
    if tensors[0].ndim > 2 or not tensors[0].is_floating_point() or len({t.shape[1] for t in tensors}) > 1:
        longest = max(tensor.shape[1] for tensor in tensors)
        pads = [(0, 0) * (tensor.ndim - 2) + (0, longest - tensor.shape[1]) for tensor in tensors]
        tensors = [F.pad(tensor, pad) for tensor, pad in zip(tensors, pads, strict=True)]
    return torch.cat(tensors)
