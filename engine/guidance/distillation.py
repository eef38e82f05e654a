"""Score distillation as a loss for any differentiable images: `Distillation`.

    guide = Distillation.from_pretrained()
    loss = guide(images, "a red mug")  # images [B, 3, H, W] in [0, 1]
    loss.backward()

Whatever renders the images: an image of pixels, a mesh, Gaussian splats. docs/python.md has examples.
"""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dream_fast.engine.config.presets import dream_mini_cpu, dream_mini_gpu, stable_diffusion
from dream_fast.engine.config.schema import Config
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.dream_mini.vocabulary import check_prompt, known_words
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.model.image_model import Embedding, ImageModel, concatenate, expand, map_rows
from dream_fast.engine.guidance.model.load import load_image_model
from dream_fast.engine.guidance.prompts import PromptEmbeddings, ViewAngles
from dream_fast.engine.guidance.sds import ScoreDistillation
from dream_fast.engine.scene.camera import Cameras

logger = logging.getLogger(__name__)

# Settings of `GuidanceConfig` that choose a model or weigh several guidances: a Distillation has one model.
NOT_SETTINGS = frozenset("guidance sd_version hf_key if_key clip_key".split())


class Distillation:
    """A loss that pulls images towards a prompt by an image model.

    `model` is the loaded model, and `settings` those of score distillation with their defaults, such as
    `guidance_scale=20`, `t_range=(0.02, 0.98)`, `objective="sds"` (docs/options.md, Guidance). They replace those of
    `preset`, which also has the angles at which views change. `negative` is the prompt to stay away from. With
    `closed_vocabulary` prompts are read as dream-mini's words.

    Raises TypeError: for a setting that does not exist.
    """

    def __init__(
        self,
        model: ImageModel,
        *,
        preset: Config | None = None,
        negative: str = "",
        closed_vocabulary: bool = False,
        **settings: Any,
    ) -> None:
        preset = preset or stable_diffusion()
        known = {field.name for field in fields(GuidanceConfig)} - NOT_SETTINGS
        if unknown := settings.keys() - known:
            raise TypeError(f"no setting of score distillation is called {', '.join(sorted(unknown))}")
        self.model, self.negative, self.closed_vocabulary = model, negative, closed_vocabulary
        self.score = ScoreDistillation(model, replace(preset.guidance, **settings))
        self.angles = ViewAngles.of(preset.camera)
        self._views: dict[str, PromptEmbeddings] = {}
        self._plain: dict[str, tuple[Embedding, Embedding]] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        vram_O: bool = False,
        **settings: Any,
    ) -> "Distillation":
        """Load the image model at `source`: a folder or a hub name (docs/image_models.md); None: dream-mini.

        `device` is the GPU where there is one, and `dtype` then fp16; on a CPU it is fp32. `vram_O` saves memory, and
        the other arguments are those of the class. Settings default to those of the command with this model.

        Raises UserError: when the model cannot be loaded.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        model = load_image_model(MODEL_FOLDER if source is None else source, device, dtype, vram_O=vram_O)
        if source is None:
            mini = dream_mini_gpu() if device.type == "cuda" else dream_mini_cpu()
            settings = {"preset": mini, "closed_vocabulary": True} | settings
        return cls(model, **settings)

    @torch.compiler.disable
    def __call__(
        self,
        images: Tensor,
        prompt: str | Sequence[str],
        cameras: Cameras | None = None,
        *,
        progress: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss, a scalar that is differentiable in `images` [B, 3, H, W] in [0, 1].

        `prompt` is one text, or one for each image. With `cameras` a view is added to it, such as "front view".
        `progress` in [0, 1] is the part of the run that is over, for settings with a schedule. `generator`, on the
        model's device, draws timesteps and noise. Images of another device are moved; the loss is on the model's.

        Raises ValueError: for images of another shape, or another number of prompts or cameras than images. UserError:
        for a prompt whose thing dream-mini does not know.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], not {list(images.shape)}")
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in 0 to 1, not {progress}")
        count = len(images)
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise ValueError(f"there are {len(prompts)} prompts and {count} images: give one prompt, or one for each")
        if cameras is not None and len(cameras.azimuth) != count:
            raise ValueError(f"there are {len(cameras.azimuth)} cameras and {count} images: give one for each")
        if len(set(prompts)) == 1:
            cond, uncond = self._embed(prompts[0], cameras, count)
        else:
            single = [None] * count if cameras is None else list(cameras.split())
            pairs = [self._embed(text, camera, 1) for text, camera in zip(prompts, single, strict=True)]
            cond, uncond = (concatenate(part) for part in zip(*pairs, strict=True))
        inputs = StepInputs(progress=float(progress), generator=generator)
        return self.score(images.to(self.model.device), cond, uncond, inputs).loss

    def _embed(self, prompt: str, cameras: Cameras | None, count: int) -> tuple[Embedding, Embedding]:
        """Embeddings (cond, uncond) of `count` rows for one prompt; each text is embedded once."""
        text = self._read(prompt)
        if cameras is not None:
            if text not in self._views:
                self._views[text] = PromptEmbeddings(self.model, text, self.negative, keep_text_encoder=True)
                self._load_network()
            return self._views[text].embeddings(cameras.azimuth, cameras.polar, self.angles)
        if text not in self._plain:
            embedded = self.model.embed([self.model.fit_prompt(text, [""])], self.negative)
            self._plain[text] = map_rows(lambda rows: rows[:1], embedded), map_rows(lambda rows: rows[1:], embedded)
            self._load_network()
        cond, uncond = self._plain[text]
        return expand(cond, count), expand(uncond, count)

    def _read(self, prompt: str) -> str:
        """The words of a prompt that the model reads. Raises UserError: when dream-mini knows none of its things."""
        if not self.closed_vocabulary:
            return prompt
        for warning in check_prompt(prompt):
            logger.warning("%s", warning)
        return known_words(prompt)

    def _load_network(self) -> None:
        """Let a large model free its text encoders and load its network. The others keep theirs, for more prompts."""
        if self.model.embeds_again:
            self.model.free_text_encoder()
