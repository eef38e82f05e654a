"""Guidance by the likeness of picture and prompt in CLIP: no diffusion, so no noise and no levels.

With f(x) the unit vector that CLIP (Radford et al. 2021) has for a picture and g_v that of the prompt from side v, the
loss is that of stable-dreamfusion,

    L = -10 lambda_guidance mean_b <f(x_b), g_b>

where g_b is blended from the sides as the prompts of a diffusion model are (`prompts`) and made a unit vector again.
The reference has one text for all sides and makes up for that by a weight of 1 - |azimuth| / 180, which leaves the back
without guidance; with a text for each side every side counts.

CLIP computes in fp32 whatever the precision of the run: it is small beside a UNet, and the gradient of a pixel would
often be too small for fp16.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast.engine.config.model_names import hub_name
from dream_fast.engine.config.schedule import value_at
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.guidance.base import Guidance, GuidanceResult, StepInputs
from dream_fast.engine.guidance.model.components import quiet_progress
from dream_fast.engine.guidance.prompts import VIEWS, fit, view_weights
from dream_fast.engine.guidance.sds import InjectGradient, resize
from dream_fast.engine.runtime.paths import expand_user
from dream_fast.engine.runtime.quiet import quiet_diffusers
from dream_fast.engine.scene.camera import Cameras

SCALE = 10.0  # the reference's
# What OpenAI's models, and those trained after them, expect of a picture's colours.
MEAN = (0.48145466, 0.4578275, 0.40821073)
SPREAD = (0.26862954, 0.26130258, 0.27577711)


class ClipGuidance(Guidance):
    """Pulls pictures towards a prompt by CLIP. Called like `DiffusionGuidance`.

    ``views`` [4, D] are unit vectors of the prompt from each of VIEWS. It has nothing to say about latents.
    """

    accepts_latents = False

    def __init__(
        self,
        model: Any,
        views: Tensor,
        config: GuidanceConfig,
        angle_overhead: float,
        view_blend: float = 90.0,
        angle_front: float | None = None,
    ):
        self.model, self.views, self.config = model, views, config
        self.angle_overhead, self.view_blend, self.angle_front = angle_overhead, view_blend, angle_front
        # Made once: a step that makes them would wait for the device.
        self.mean, self.spread = (torch.tensor(x, device=views.device).view(3, 1, 1) for x in (MEAN, SPREAD))

    def __call__(self, images: Tensor, cameras: Cameras, inputs: StepInputs) -> GuidanceResult:
        """Guide `images` [B, 3, H, W] in [0, 1]. `t` of the result is empty, `gradient` that of the images.

        Raises ValueError: latents, or images of another shape.
        """
        if inputs.latents or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W] in [0, 1], not {list(images.shape)}, and no latents")
        angles = (cameras.azimuth, cameras.polar, self.angle_overhead, self.view_blend, self.angle_front)
        targets = F.normalize(view_weights(*angles).to(self.views.device) @ self.views, dim=-1)
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            leaf = images.detach().float().requires_grad_()
            similarity = (self.features(leaf) * targets).sum(dim=-1)  # [B]
            weight = value_at(self.config.lambda_guidance, inputs.step, inputs.progress)
            loss = -SCALE * weight * similarity.mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
        no_timesteps = torch.zeros(0, dtype=torch.int64, device=images.device)
        injected = InjectGradient.apply(images, gradient, loss.detach())
        return GuidanceResult(injected, no_timesteps, torch.linalg.vector_norm(gradient), gradient)

    def features(self, pictures: Tensor) -> Tensor:
        """Unit vectors [B, D] of ``pictures`` [B, 3, H, W] in [0, 1], differentiable."""
        pictures = resize(pictures, self.model.config.vision_config.image_size)
        seen = self.model.vision_model(pixel_values=(pictures - self.mean) / self.spread)
        return F.normalize(self.model.visual_projection(seen.pooler_output), dim=-1)


def clip_guidance(
    source: str, device: torch.device | str, text: str, own: Mapping[str, str], config: GuidanceConfig, *angles: Any
) -> ClipGuidance:
    """Load CLIP from ``source``, embed the prompt and drop the part of CLIP that read it. Raises as `load_clip`."""
    model, tokenizer = load_clip(source, device)
    views = clip_views(model, tokenizer, text, own)
    model.text_model = model.text_projection = None
    return ClipGuidance(model, views, config, *angles)


def load_clip(source: str, device: torch.device | str) -> tuple[Any, Any]:
    """The CLIPModel and its tokenizer from ``source``, a folder or a hub name; frozen, fp32, on ``device``.

    Raises UserError for anything missing, damaged or unreachable, and for weights that would have to be unpickled.
    """
    quiet_diffusers()
    from transformers import CLIPModel, CLIPTokenizer

    folder = expand_user(source)
    found, pinned = folder, {}
    if not folder.is_dir():
        on_hub = hub_name(source)
        if on_hub is None:
            raise UserError(f"the CLIP folder {folder} does not exist")
        found, pinned = on_hub[0], {"revision": on_hub[1]} if on_hub[1] else {}
    try:
        with quiet_progress():
            tokenizer = CLIPTokenizer.from_pretrained(found, **pinned)
            model, info = CLIPModel.from_pretrained(
                found, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **pinned
            )
    except Exception as error:  # settings that the library does not expect end in any of Python's errors
        fetching = "" if found is folder else f" (where there is a network, `{_fetching(found, pinned)}` fetches it)"
        raise UserError(f"the CLIP model {source} does not load: {first_line(error)}{fetching}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"the CLIP model {source} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model.requires_grad_(False).eval().to(device), tokenizer


def _fetching(name: str, pinned: Mapping[str, str]) -> str:
    """The command that fetches what `load_clip` reads."""
    revision = f" --revision {pinned['revision']}" if pinned else ""
    return f"hf download {name}{revision} --include '*.json' --include merges.txt --include model.safetensors"


@torch.no_grad()
def clip_views(model: Any, tokenizer: Any, text: str, own: Mapping[str, str] | None = None) -> Tensor:
    """Unit vectors [4, D] of ``text`` as each of VIEWS says it; ``own`` holds whole texts by side.

    Words that do not fit CLIP's window are left out, and a logged warning names them.
    """
    own, window = own or {}, model.config.text_config.max_position_embeddings
    endings = {view: f", {view} view" for view in VIEWS if view not in own}
    text = fit(tokenizer, window, text, list(endings.values()))
    texts = [text + endings[v] if v in endings else fit(tokenizer, window, own[v], [""]) for v in VIEWS]
    tokens = tokenizer(texts, padding="max_length", max_length=window, truncation=True, return_tensors="pt")
    device = model.text_projection.weight.device
    read = model.text_model(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))
    return F.normalize(model.text_projection(read.pooler_output), dim=-1)
