"""View-dependent prompts: a text, encoded once for each view, and blended by the direction of the camera.

An image model that is prompted with "a car" prefers its front, and a scene guided so from all sides grows several
fronts. So the prompt names the view: "..., front view", "..., side view", "..., back view", "..., overhead view"
(DreamFusion, Poole et al. 2022, section 3.2), or each view has its own text. Between two views their embeddings
are interpolated linearly in the azimuth, unless an angle is given at which one ends and the next begins.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.guidance.model.image_model import Embedding, ImageModel, expand, map_rows

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

    `views` has four rows (in the order of VIEWS) and `negative` one, in the model's dtype on its device. The text
    encoder is freed afterwards unless `keep_text_encoder`. Words beyond what the model reads are left out with a logged
    warning; the name of the view is always kept. `view_prompts` has whole texts by view, which replace `text` and the
    name of the view.

    Raises ValueError: when the text encoder was freed, or a name in `view_prompts` is unknown.
    """

    def __init__(
        self,
        model: ImageModel,
        text: str,
        negative: str = "",
        *,
        view_prompts: Mapping[str, str] | None = None,
        keep_text_encoder: bool = False,
    ) -> None:
        view_prompts = view_prompts or {}
        if unknown := view_prompts.keys() - set(VIEWS):
            raise ValueError(f"view_prompts has texts of {', '.join(VIEWS)}, not of {', '.join(sorted(unknown))}")
        endings = {view: f", {view} view" for view in VIEWS if view not in view_prompts}
        text, negative = model.fit_prompt(text, list(endings.values())), model.fit_prompt(negative, [""])
        texts = [
            text + endings[view] if view in endings else model.fit_prompt(view_prompts[view], [""]) for view in VIEWS
        ]
        embedded = model.embed(texts, negative)
        self.views = map_rows(lambda rows: rows[:-1], embedded)
        self.negative = map_rows(lambda rows: rows[-1:], embedded)
        if not keep_text_encoder:
            model.free_text_encoder()

    def embeddings(
        self, azimuth: Tensor, polar: Tensor, angles: ViewAngles | None = None
    ) -> tuple[Embedding, Embedding]:
        """Embeddings (cond, uncond) of B rows for cameras at `azimuth` [B] and `polar` [B] degrees.

        Works on the embeddings' device.
        """
        weights = view_weights(azimuth, polar, angles)

        def blend(views: Tensor) -> Tensor:
            return torch.tensordot(weights.to(views.device), views.float(), dims=1).to(views.dtype)

        return map_rows(blend, self.views), expand(self.negative, len(weights))


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
