"""Four views at once, the layout of MVDream (2308.16512): a camera vector a row, self-attention over a group's tokens.

The UNet stays a plain UNet2DConditionModel: without cameras and groups its results stay the same. The camera's
weights are a file of their own beside it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

VIEWS = 4
NUMBERS = 16
FOLDER, WEIGHTS, CONFIG = "multiview", "diffusion_pytorch_model.safetensors", "config.json"


def camera_vectors(c2w: Tensor) -> Tensor:
    """Camera-to-world matrices [B, 4, 4] as MVDream's vectors [B, 16]: z up, the position of length 1, by rows.

    Our y (up) is its z, and our z (the front) its -y.
    """
    x, y, z = c2w[:, 0], c2w[:, 1], c2w[:, 2]
    turned = torch.stack([x, -z, y, c2w[:, 3]], 1)
    position = F.normalize(turned[:, :3, 3], dim=-1)
    upper = torch.cat([turned[:, :3, :3], position[:, :, None]], 2)
    return torch.cat([upper, turned[:, 3:]], 1).flatten(1)


class CameraEmbedding(nn.Sequential):
    """Camera vectors [B, 16] to what is added to the time embedding [B, width]; zero before it has learned anything."""

    def __init__(self, width: int):
        first, last = nn.Linear(NUMBERS, width), nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(first, nn.SiLU(), last)

    def save(self, folder: Path) -> None:
        """Write the weights in fp16 and their configuration to `folder`/multiview."""
        target = folder / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: t.detach().half().cpu().contiguous() for name, t in self.state_dict().items()}, target / WEIGHTS
        )
        (target / CONFIG).write_text(
            json.dumps({"numbers": NUMBERS, "views": VIEWS, "width": self[2].out_features}) + "\n"
        )

    @classmethod
    def load(
        cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "CameraEmbedding":
        """Read what `save` wrote."""
        config = json.loads((folder / FOLDER / CONFIG).read_text())
        embedding = cls(config["width"])
        embedding.load_state_dict(load_file(folder / FOLDER / WEIGHTS))
        return embedding.to(device, dtype)


class _GroupedAttention:
    """Scaled dot product attention; rows from `singles` on attend to the tokens of all views of their group."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, singles=None, **_
    ):
        batch, tokens, _ = hidden_states.shape
        crossed = encoder_hidden_states is not None
        context = encoder_hidden_states if crossed else hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        heads, width = attn.heads, query.shape[-1] // attn.heads

        def attend(q, k, v, rows):
            q, k, v = (t.reshape(rows, -1, heads, width).transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, tokens, heads * width)

        if crossed or singles is None or singles == batch:
            out = attend(query, key, value, batch)
        else:
            groups = (batch - singles) // VIEWS
            joint = attend(query[singles:], key[singles:], value[singles:], groups)
            if singles:
                joint = torch.cat([attend(query[:singles], key[:singles], value[:singles], singles), joint])
            out = joint
        return attn.to_out[1](attn.to_out[0](out))


def make_multiview(unet: Any) -> None:
    """Let a UNet2DConditionModel take cameras and groups through `predict`; its weights stay as they are."""
    from diffusers.models.embeddings import TimestepEmbedding

    class Embedding(TimestepEmbedding):
        """The time embedding with a camera's added to it."""

        def forward(self, sample, condition=None):
            embedded = super().forward(sample)
            return embedded if condition is None else embedded + condition

    unet.time_embedding.__class__ = Embedding
    unet.set_attn_processor(_GroupedAttention())


def predict(unet: Any, latents: Tensor, t: Tensor, states: Tensor, camera: Tensor | None, singles: int) -> Tensor:
    """Predictions [B, C, H, W] of a UNet that `make_multiview` prepared.

    camera [B, width]: embedded cameras, or None. The first `singles` rows are views on their own, the others groups of
    VIEWS rows that see each other.
    """
    return unet(latents, t, states, timestep_cond=camera, cross_attention_kwargs={"singles": singles}).sample
