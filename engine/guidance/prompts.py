"""View-dependent prompts: a text, encoded once for each view, and blended by the direction of the camera.

An image model that is prompted with "a car" prefers its front, and a scene guided so from all sides grows several
fronts. So the prompt names the view: "..., front view", "..., side view", "..., back view", "..., overhead view"
(DreamFusion, Poole et al. 2022, section 3.2), or each view has a text of its own. Between two views their embeddings
are interpolated linearly in the azimuth, unless an angle is given at which one ends and the next begins.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.model.components import Components

logger = logging.getLogger(__name__)

VIEWS = ("front", "side", "back", "overhead")


class ViewAngles(NamedTuple):
    """Angles in degrees at which one view becomes another."""

    overhead: float = 30.0  # polar angle up to which the view is overhead
    blend: float = 90.0  # width over which two views are blended, around azimuths 45 and 135
    front: float | None = None  # in (0, 180]: width of the front and of the back, which are then not blended

    @classmethod
    def of(cls, config: CameraConfig) -> "ViewAngles":
        """The angles of a run."""
        return cls(config.angle_overhead, config.view_blend, config.angle_front)


class PromptEmbeddings:
    """Embeddings of one prompt for each view, and of the negative prompt.

    `views` [4, T, D] (in the order of VIEWS) and `negative` [1, T, D] are in the model's dtype on its device; T is the
    text encoder's window and D its width. The text encoder is freed afterwards unless `keep_text_encoder`. Words that
    exceed the window are left out with a logged warning; the name of the view is always kept. `view_prompts` has whole
    texts by view, which replace `text` and the name of the view.

    Raises ValueError: when the text encoder was freed, or a name in `view_prompts` is unknown.
    """

    def __init__(
        self,
        components: Components,
        text: str,
        negative: str = "",
        *,
        view_prompts: Mapping[str, str] | None = None,
        keep_text_encoder: bool = False,
    ) -> None:
        if components.text_encoder is None:
            raise ValueError("components.text_encoder was freed: load the components again, or keep_text_encoder=True")
        view_prompts = view_prompts or {}
        if unknown := view_prompts.keys() - set(VIEWS):
            raise ValueError(f"view_prompts has texts of {', '.join(VIEWS)}, not of {', '.join(sorted(unknown))}")
        fit_window = partial(fit, components.tokenizer, components.window)
        endings = {view: f", {view} view" for view in VIEWS if view not in view_prompts}
        text, negative = fit_window(text, list(endings.values())), fit_window(negative, [""])
        texts = [text + endings[view] if view in endings else fit_window(view_prompts[view], [""]) for view in VIEWS]
        encoded = encode(components, [*texts, negative])
        self.views = encoded[:-1]
        self.negative = encoded[-1:]
        if not keep_text_encoder:
            components.free_text_encoder()

    def embeddings(self, azimuth: Tensor, polar: Tensor, angles: ViewAngles | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings (cond, uncond), each [B, T, D], for cameras at `azimuth` [B] and `polar` [B] degrees.

        Works on the embeddings' device.
        """
        weights = view_weights(azimuth, polar, angles).to(self.views.device)
        cond = torch.tensordot(weights, self.views.float(), dims=1).to(self.views.dtype)
        return cond, self.negative.expand(len(cond), -1, -1)


def view_weights(azimuth: Tensor, polar: Tensor, angles: ViewAngles | None = None) -> Tensor:
    """Weights [B, 4] of the VIEWS, each row summing to 1, for `azimuth` [B] and `polar` [B] in degrees.

    Front turns into side over `angles.blend` degrees around azimuth 45, and side into back around 135, linearly: with
    90, front weighs 1 - |azimuth| / 90 in the front half. With `angles.front` nothing is blended: up to half of it from
    azimuth 0 is front, up to half of it from 180 is back, the rest side.
    """
    angles = angles or ViewAngles()
    from_front = (torch.remainder(azimuth.float() + 180, 360) - 180).abs()  # 0 front, 90 side, 180 back
    if angles.front is None:
        front = ((45 - from_front) / angles.blend + 0.5).clamp(0, 1)
        back = ((from_front - 135) / angles.blend + 0.5).clamp(0, 1)
    else:
        front = (from_front <= angles.front / 2).float()
        back = (180 - from_front <= angles.front / 2).float() * (1 - front)  # with 180 both would hold at 90
    overhead = (polar <= angles.overhead).to(front.dtype)
    around = torch.stack([front, 1 - front - back, back], dim=-1) * (1 - overhead)[:, None]
    return torch.cat([around, overhead[:, None]], dim=-1)


@torch.no_grad()
def encode(components: Components, prompts: list[str]) -> Tensor:
    """Last hidden states [len(prompts), T, D] of the text encoder, prompts padded or cut to its window of T tokens.

    Raises UserError: the tokenizer has tokens that the text encoder does not have, or the states are not finite.
    """
    if components.t5:
        prompts = [prompt.lower().strip() for prompt in prompts]  # as IF was trained
    tokens = components.tokenizer(
        prompts, padding="max_length", max_length=components.window, truncation=True, return_tensors="pt"
    )
    mask = None
    if components.t5 or getattr(components.text_encoder.config, "use_attention_mask", False):
        mask = tokens.attention_mask.to(components.device)
    # Stable Diffusion's own pipeline leaves the padding unmasked: that is what its UNet was trained with.
    check_tokens(components.name, tokens.input_ids, components.text_encoder.config)
    encoded = components.text_encoder(tokens.input_ids.to(components.device), attention_mask=mask)[0]
    if not bool(torch.isfinite(encoded).all()):
        raise UserError(
            f"the text encoder of the model {components.name} makes numbers that are not finite of a prompt"
        )
    return encoded


def check_tokens(model: str, ids: Tensor, config: Any) -> None:
    """Raises UserError: some `ids` are no tokens of the text encoder with that configuration."""
    count = getattr(config, "vocab_size", None)
    if count is not None and not (0 <= int(ids.min()) and int(ids.max()) < count):
        raise UserError(f"the tokenizer of the model {model} is of another one: its text encoder has {count} tokens")


def fit(tokenizer: Any, window: int, text: str, endings: list[str]) -> str:
    """Cut `text` to the leading words that fit `window` tokens with each of `endings`; a warning names the others."""

    def fits(candidate: str) -> bool:
        return all(len(tokenizer(candidate + ending, verbose=False).input_ids) <= window for ending in endings)

    words = text.split()
    if fits(text) or len(words) < 2:
        return text  # one endless word: the tokenizer cuts it
    count = min(len(words) - 1, window)  # a word is a token at least
    while count > 1 and not fits(" ".join(words[:count])):
        count -= 1
    logger.warning(
        "the prompt is longer than the %d tokens that the text encoder reads; left out: %s",
        window,
        " ".join(words[count:]),
    )
    return " ".join(words[:count])
