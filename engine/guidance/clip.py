"""Guidance by the similarity of image and prompt in CLIP: no diffusion, so no noise and no timesteps.

With f(x) the unit vector that CLIP (Radford et al. 2021) gives an image and g_v that of the prompt for view v, the
loss is that of stable-dreamfusion,

    L = -10 lambda_guidance mean_b <f(x_b), g_b>

where g_b is blended from the views as the prompts of a diffusion model are (`prompts.py`) and normalised again. The
reference has one text for all views, with a weight of 1 - |azimuth| / 180, which leaves the back without guidance; with
a text for each view every view has the full weight.

CLIP computes in fp32 for any precision of the run: it is small compared with a UNet, and the gradient of a pixel would
often be too small for fp16.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast.engine.config.model_names import hub_name
from dream_fast.engine.config.schedule import value_at
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.guidance.base import Guidance, GuidanceResult, StepInputs
from dream_fast.engine.guidance.model.checks import check_files, read_json
from dream_fast.engine.guidance.model.components import quiet_progress
from dream_fast.engine.guidance.model.settings import check_finite, check_settings, check_tokens, check_weight_file
from dream_fast.engine.guidance.model.text import fit_window
from dream_fast.engine.guidance.prompts import VIEWS, ViewAngles, view_weights
from dream_fast.engine.guidance.sds import InjectGradient, resize
from dream_fast.engine.runtime.paths import expand_user
from dream_fast.engine.runtime.quiet import quiet_diffusers
from dream_fast.engine.scene.camera import Cameras

SCALE = 10.0  # stable-dreamfusion's
# Mean and standard deviation of colours, as OpenAI's models and their successors expect them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipGuidance(Guidance):
    """Pull images towards a prompt by CLIP. `views` [4, D] are unit vectors of the prompt for each of VIEWS."""

    accepts_latents = False

    def __init__(self, model: Any, views: Tensor, config: GuidanceConfig, angles: ViewAngles | None = None):
        self.model, self.views, self.config, self.angles = model, views, config, angles or ViewAngles()
        # Made once: making them in a step would wait for the device.
        self.mean, self.std = (torch.tensor(x, device=views.device).view(3, 1, 1) for x in (MEAN, STD))

    def __call__(self, images: Tensor, cameras: Cameras, inputs: StepInputs) -> GuidanceResult:
        """Guide `images` [B, 3, H, W] in [0, 1]. `t` of the result is empty, `gradient` that of the images.

        Raises ValueError: when `images` are latents or have another shape.
        """
        if inputs.latents or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W] in [0, 1], not {list(images.shape)}, and no latents")
        weights = view_weights(cameras.azimuth, cameras.polar, self.angles).to(self.views.device)
        targets = F.normalize(weights @ self.views, dim=-1)
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            leaf = images.detach().float().requires_grad_()
            similarity = (self.features(leaf) * targets).sum(dim=-1)  # [B]
            weight = value_at(self.config.lambda_guidance, inputs.step, inputs.progress)
            loss = -SCALE * weight * similarity.mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
        no_timesteps = torch.zeros(0, dtype=torch.int64, device=images.device)
        injected = InjectGradient.apply(images, gradient, loss.detach())
        return GuidanceResult(injected, no_timesteps, torch.linalg.vector_norm(gradient), gradient)

    def features(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of images [B, 3, H, W] in [0, 1], differentiable."""
        images = resize(images, self.model.config.vision_config.image_size)
        out = self.model.vision_model(pixel_values=(images - self.mean) / self.std)
        return F.normalize(self.model.visual_projection(out.pooler_output), dim=-1)


def clip_guidance(
    source: str,
    device: torch.device | str,
    text: str,
    view_prompts: Mapping[str, str],
    config: GuidanceConfig,
    angles: ViewAngles,
) -> ClipGuidance:
    """Load CLIP from `source`, embed the prompt and free the text half of CLIP. Raises as `load_clip`."""
    model, tokenizer = load_clip(source, device)
    views = clip_views(model, tokenizer, text, view_prompts)
    model.text_model = model.text_projection = None
    return ClipGuidance(model, views, config, angles)


def load_clip(source: str, device: torch.device | str) -> tuple[Any, Any]:
    """Load a CLIPModel and its tokenizer from `source`, a folder or a hub name: frozen, fp32, on `device`.

    Raises UserError: when a file is missing, damaged or unreachable, or holds weights that would have to be unpickled.
    """
    quiet_diffusers()
    from transformers import CLIPModel, CLIPTokenizer

    folder = expand_user(source)
    place: str | Path = folder
    pinned: dict[str, Any] = {}
    if not folder.is_dir():
        on_hub = hub_name(source)
        if on_hub is None:
            raise UserError(f"the CLIP folder {folder} does not exist")
        place, pinned = on_hub[0], {"revision": on_hub[1]} if on_hub[1] else {}
    else:
        check_clip_folder(folder)
    try:
        with quiet_progress():
            tokenizer = CLIPTokenizer.from_pretrained(place, **pinned)
            model, info = CLIPModel.from_pretrained(
                place, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **pinned
            )
    except Exception as error:  # settings that the library does not expect raise any of Python's errors
        command = _download_command(str(place), pinned)
        fetching = "" if place is folder else f" (where there is a network, `{command}` fetches it)"
        raise UserError(f"the CLIP model {source} does not load: {first_line(error)}{fetching}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"the CLIP model {source} lacks {len(missing)} of its weights, such as {missing[0]}")
    model = model.requires_grad_(False).eval().to(device)
    check_finite(f"the CLIP model {source}", model)
    return model, tokenizer


def check_clip_folder(folder: Path) -> None:
    """Check the files of a CLIP model before it is built. Raises UserError: one of them cannot be right."""
    check_files(folder)
    if (settings := folder / "config.json").exists():
        files = sorted(folder.glob("*.safetensors"))
        tensors = [name for file in files for name in check_weight_file(file)]
        check_settings(f"the CLIP model {folder}", read_json(settings), tensors if files else None)


def _download_command(name: str, pinned: Mapping[str, str]) -> str:
    """The command that downloads what `load_clip` reads."""
    revision = f" --revision {pinned['revision']}" if pinned else ""
    return f"hf download {name}{revision} --include '*.json' --include merges.txt --include model.safetensors"


@torch.no_grad()
def clip_views(model: Any, tokenizer: Any, text: str, view_prompts: Mapping[str, str] | None = None) -> Tensor:
    """Unit vectors [4, D] of `text` for each of VIEWS; `view_prompts` has whole texts by view.

    Words that exceed CLIP's window are left out with a logged warning.
    """
    view_prompts, window = view_prompts or {}, model.config.text_config.max_position_embeddings
    endings = {view: f", {view} view" for view in VIEWS if view not in view_prompts}
    text = fit_window(tokenizer, window, text, list(endings.values()))
    texts = [text + endings[v] if v in endings else fit_window(tokenizer, window, view_prompts[v], [""]) for v in VIEWS]
    tokens = tokenizer(texts, padding="max_length", max_length=window, truncation=True, return_tensors="pt")
    device = model.text_projection.weight.device
    check_tokens("CLIP", tokens.input_ids, model.config.text_config)
    out = model.text_model(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))
    return F.normalize(model.text_projection(out.pooler_output), dim=-1)
