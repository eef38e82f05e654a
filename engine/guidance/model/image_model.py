"""The protocol of image models, as score distillation uses them. Each family of models has an adapter.

An adapter hides how a pipeline packs, patches, scales or normalises latents, how it embeds prompts and how it encodes
timesteps. Score distillation, guidance, sampling and previews work on its latents [B, C, h, w] and timesteps [B]
alone, with the model's noise process (`engine/guidance/noise.py`).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dream_fast.engine.guidance.model.attention import AttentionChoice
from dream_fast.engine.guidance.noise import NoiseProcess

# Embedded prompts: one tensor, or several by name (hidden states, a pooled vector, a mask), each with a row a prompt.
# Masks are floats, not zero where a token counts, so that embeddings can be blended.
Embedding = Tensor | dict[str, Tensor]


class ImageModel(Protocol):
    """A loaded image model, frozen, on its device.

    name: for messages and the manifest.
    image_size, latent_size, latent_channels: sides of its square images and latents, and channels of the latter.
    latents_are_pixels: its latents are images in [-1, 1] (it has no VAE).
    process: its noise process.
    prediction_type: what its network returns, one of `noise.PREDICTIONS`.
    attention: the operators of its network's and its VAE's attention.
    embeds_again: prompts can be embedded after `free_text_encoder`, which loads the network; the text encoders are
        loaded for them once more.
    capturable: a CUDA graph can be made of its encoder and its network.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    image_size: int
    latent_size: int
    latent_channels: int
    prediction_type: str
    attention: AttentionChoice
    embeds_again: bool
    capturable: bool

    @property
    def process(self) -> NoiseProcess: ...

    @property
    def latents_are_pixels(self) -> bool: ...

    def fit_prompt(self, text: str, endings: Sequence[str]) -> str:
        """Cut `text` to the leading words that are read with each of `endings`; a warning lists the others."""
        ...

    def embed(self, prompts: Sequence[str], negative: str | None = None) -> Embedding:
        """Embed prompts, a row each, and in a last row the `negative` prompt, which some models treat differently.

        Raises ValueError: when the text encoder was freed for good.
        """
        ...

    def free_text_encoder(self) -> None:
        """Free the text encoder after the prompts of a run are embedded. Large models load the rest only then."""
        ...

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Latents [B, C, h, w] fp32 of images [B, 3, S, S] in [-1, 1], differentiable.

        `noise` [B, C, h, w] draws from the VAE's posterior; None takes its mean.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [-1, 1] of latents. Raises ValueError: when the decoder was not loaded."""
        ...

    def predict(self, noisy: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
        """Output [B, C, h, w] fp32 of the network for noisy latents at timesteps `t` [B]."""
        ...

    def guide_natively(self, guided: Tensor, cond: Tensor) -> Tensor:
        """Apply the additional steps of a model's pipeline after classifier-free guidance.

        `cond` is the output for the prompt alone. Most models return `guided` unchanged.
        """
        ...


def map_rows(function: Callable[..., Tensor], *embeddings: Embedding) -> Embedding:
    """Apply `function` to the tensors of embeddings of one model, such as `torch.cat` to several."""
    return pytree.tree_map(function, *embeddings)


def concatenate(embeddings: Sequence[Embedding]) -> Embedding:
    """Rows of all `embeddings`, in their order."""
    return map_rows(lambda *rows: torch.cat(rows), *embeddings)


def expand(embedding: Embedding, count: int) -> Embedding:
    """Repeat an embedding of one row `count` times, without a copy."""
    return map_rows(lambda row: row.expand(count, *row.shape[1:]), embedding)


def first_tensor(embedding: Embedding) -> Tensor:
    """The first tensor of an embedding; all have the same number of rows and device."""
    return pytree.tree_leaves(embedding)[0]
