"""View-dependent prompts: the text, encoded once for each side, and blended by where the camera stands.

An image model asked for "a car" prefers its front; a scene pulled towards that from all sides grows several fronts. So
the prompt says the side: "..., front view", "..., side view", "..., back view", "..., overhead view" (DreamFusion,
Poole et al. 2022, section 3.2), or a side has a text of its own. Where two sides meet their embeddings are interpolated
linearly in the azimuth, unless an angle is given at which one ends and the next begins.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dream_fast.engine.guidance.model.components import Components

logger = logging.getLogger(__name__)

VIEWS = ("front", "side", "back", "overhead")


class PromptEmbeddings:
    """Embeddings of one prompt from every side and of the negative prompt.

    ``views`` [4, T, D] (in the order of VIEWS) and ``negative`` [1, T, D] are in the model's dtype on its device; T is
    the text encoder's window and D its width. The text encoder is freed afterwards unless ``keep_text_encoder``. Words
    that do not fit the window are left out, and a logged warning names them; the side is always kept. ``own`` holds
    whole texts by side, which take the place of ``text`` and the side's name.
    """

    def __init__(
        self,
        components: Components,
        text: str,
        negative: str = "",
        *,
        own: Mapping[str, str] | None = None,
        keep_text_encoder: bool = False,
    ) -> None:
        if components.text_encoder is None:
            raise ValueError("components.text_encoder was freed: load the components again, or keep_text_encoder=True")
        own = own or {}
        if unknown := own.keys() - set(VIEWS):
            raise ValueError(f"own has texts of {', '.join(VIEWS)}, not of {', '.join(sorted(unknown))}")
        endings = {view: f", {view} view" for view in VIEWS if view not in own}
        fitting = partial(fit, components.tokenizer, components.window)
        text, negative = fitting(text, list(endings.values())), fitting(negative, [""])
        texts = [text + endings[view] if view in endings else fitting(own[view], [""]) for view in VIEWS]
        encoded = encode(components, [*texts, negative])
        self.views = encoded[:-1]
        self.negative = encoded[-1:]
        if not keep_text_encoder:
            components.free_text_encoder()

    def embeddings(
        self,
        azimuth: Tensor,
        polar: Tensor,
        angle_overhead: float,
        view_blend: float = 90.0,
        angle_front: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings for cameras at ``azimuth`` [B] and ``polar`` [B] degrees: (cond [B, T, D], uncond [B, T, D]).

        For the angles see :func:`view_weights`. Works on the embeddings' device.
        """
        weights = view_weights(azimuth, polar, angle_overhead, view_blend, angle_front).to(self.views.device)
        cond = torch.tensordot(weights, self.views.float(), dims=1).to(self.views.dtype)
        return cond, self.negative.expand(len(cond), -1, -1)


def view_weights(
    azimuth: Tensor, polar: Tensor, angle_overhead: float, view_blend: float = 90.0, angle_front: float | None = None
) -> Tensor:
    """Weights [B, 4] of the four VIEWS, each row summing to 1, for ``azimuth`` [B] and ``polar`` [B] in degrees.

    Front turns into side over ``view_blend`` degrees around azimuth 45, and side into back around 135, linearly: with
    90, front weighs 1 - |azimuth| / 90 in the front half. With ``angle_front``, more than 0 and at most 180, nothing is
    blended: up to half of it from azimuth 0 is front, up to half of it from 180 is back, the rest side. A polar angle
    of ``angle_overhead`` or less is overhead.
    """
    turned = (torch.remainder(azimuth.float() + 180, 360) - 180).abs()  # 0 front, 90 side, 180 back
    if angle_front is None:
        front = ((45 - turned) / view_blend + 0.5).clamp(0, 1)
        back = ((turned - 135) / view_blend + 0.5).clamp(0, 1)
    else:
        front = (turned <= angle_front / 2).float()
        back = (180 - turned <= angle_front / 2).float() * (1 - front)  # with 180 both would hold at 90
    above = (polar <= angle_overhead).to(front.dtype)
    around = torch.stack([front, 1 - front - back, back], dim=-1) * (1 - above)[:, None]
    return torch.cat([around, above[:, None]], dim=-1)


@torch.no_grad()
def encode(components: Components, prompts: list[str]) -> Tensor:
    """Last hidden states [len(prompts), T, D] of the text encoder, prompts padded or cut to its window of T tokens."""
    if components.t5:
        prompts = [prompt.lower().strip() for prompt in prompts]  # as IF was trained
    tokens = components.tokenizer(
        prompts, padding="max_length", max_length=components.window, truncation=True, return_tensors="pt"
    )
    mask = None
    if components.t5 or getattr(components.text_encoder.config, "use_attention_mask", False):
        mask = tokens.attention_mask.to(components.device)
    # Stable Diffusion's own pipeline leaves the padding unmasked: that is what its UNet was trained with.
    return components.text_encoder(tokens.input_ids.to(components.device), attention_mask=mask)[0]


def fit(tokenizer: Any, window: int, text: str, endings: list[str]) -> str:
    """The longest run of leading words of ``text`` that fits ``window`` tokens with each of ``endings`` after it."""

    def fits(candidate: str) -> bool:
        return all(len(tokenizer(candidate + ending, verbose=False).input_ids) <= window for ending in endings)

    words = text.split()
    if fits(text) or len(words) < 2:
        return text  # one endless word: the tokenizer cuts it
    kept = min(len(words) - 1, window)  # a word is a token at least
    while kept > 1 and not fits(" ".join(words[:kept])):
        kept -= 1
    logger.warning(
        "the prompt is longer than the %d tokens that the text encoder reads; left out: %s",
        window,
        " ".join(words[kept:]),
    )
    return " ".join(words[:kept])
