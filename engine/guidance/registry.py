"""The builders of the guidances that `--guidance` names, and the guidance of a run.

A new guidance takes an entry here and one in `engine/config/guidances.py`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from dream_fast.engine.config.guidances import CLIP, DEEPFLOYD_IF, DREAM_MINI, GUIDANCES, STABLE_DIFFUSION
from dream_fast.engine.config.model_names import CLIP_MODEL, IF_MODEL
from dream_fast.engine.config.schema import Config
from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.dream_mini.vocabulary import known_words
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.base import Guidance
from dream_fast.engine.guidance.clip import clip_guidance
from dream_fast.engine.guidance.diffusion import diffusion_guidance
from dream_fast.engine.guidance.model.attention import AttentionChoice
from dream_fast.engine.guidance.model.components import COMPILED, choose_source
from dream_fast.engine.guidance.model.image_model import ImageModel
from dream_fast.engine.guidance.model.load import load_image_model
from dream_fast.engine.guidance.prompts import PromptEmbeddings, ViewAngles
from dream_fast.engine.guidance.sum import GuidanceSum
from dream_fast.engine.runtime.device import Runtime


class LoadedGuidance(NamedTuple):
    """A guidance, the names of its models, and the attention of its Stable Diffusion, if it has one."""

    guidance: Guidance
    models: str
    attention: AttentionChoice | None


def load_guidance(config: Config, runtime: Runtime, previous: AttentionChoice | None = None) -> LoadedGuidance:
    """Load the guidances of a run, one after the other, with their prompts embedded. Several are summed.

    `previous` is the attention that a resumed run has computed with. Raises UserError: a model that cannot be used.
    """
    loaded = {name: BUILDERS[name](config, runtime, previous) for name in config.guidance.guidance}
    guidances = {name: part.guidance for name, part in loaded.items()}
    attention = [part.attention for part in loaded.values() if part.attention is not None]
    return LoadedGuidance(
        GuidanceSum(guidances) if len(guidances) > 1 else next(iter(guidances.values())),
        " + ".join(part.models for part in loaded.values()),
        attention[-1] if attention else None,
    )


def _build_dream_mini(config: Config, runtime: Runtime, previous: AttentionChoice | None) -> LoadedGuidance:
    return _build_diffusion(config, _load_model(config, runtime, MODEL_FOLDER, previous), DREAM_MINI.name)


def _build_stable_diffusion(config: Config, runtime: Runtime, previous: AttentionChoice | None) -> LoadedGuidance:
    source = choose_source(sd_version=config.guidance.sd_version, hf_key=config.guidance.hf_key)
    return _build_diffusion(config, _load_model(config, runtime, source, previous), STABLE_DIFFUSION.name)


def _build_if(config: Config, runtime: Runtime, previous: AttentionChoice | None) -> LoadedGuidance:
    source = config.guidance.if_key or IF_MODEL
    model = _load_model(config, runtime, source, previous, kind="IF")
    return _build_diffusion(config, model, DEEPFLOYD_IF.name)


def _build_clip(config: Config, runtime: Runtime, previous: AttentionChoice | None) -> LoadedGuidance:
    run, angles = config.run, ViewAngles.of(config.camera)
    source = config.guidance.clip_key or CLIP_MODEL
    guidance = clip_guidance(source, runtime.device, run.text or "", run.view_prompts, config.guidance, angles)
    return LoadedGuidance(guidance, source, None)


BUILDERS: Mapping[str, Callable[[Config, Runtime, AttentionChoice | None], LoadedGuidance]] = {
    DREAM_MINI.name: _build_dream_mini,
    STABLE_DIFFUSION.name: _build_stable_diffusion,
    DEEPFLOYD_IF.name: _build_if,
    CLIP.name: _build_clip,
}


def _build_diffusion(config: Config, model: ImageModel, name: str) -> LoadedGuidance:
    """Embed the prompts of a run for `model`, and assemble the guidance `name`."""
    read = known_words if GUIDANCES[name].closed_vocabulary else str
    view_prompts = {view: read(text) for view, text in config.run.view_prompts.items()}
    text, negative = read(config.run.text or ""), read(config.run.negative)
    prompts = PromptEmbeddings(model, text, negative, view_prompts=view_prompts)
    attention = model.attention if GUIDANCES[name].has_attention else None
    return LoadedGuidance(diffusion_guidance(model, prompts, config), model.name, attention)


def _load_model(
    config: Config, runtime: Runtime, source: str | Path, previous: AttentionChoice | None, kind: str = "SD"
) -> ImageModel:
    """Load the diffusion model at `source`, a pipeline of that kind."""
    run = config.run
    model = load_image_model(
        source,
        runtime.device,
        runtime.dtype,
        kind=kind,
        vram_O=run.vram_O,
        # A measurement may end differently the next time.
        attention="sdpa" if run.deterministic and run.attention == "auto" else run.attention,
        previous=previous,
        compiled=COMPILED if run.compile else (),
        need_vae_decoder=config.output.save_guidance,
    )
    if config.shading.latent_iter_ratio > 0 and model.latent_channels != 4:
        raise UserError(
            f"the latents of {model.name} have {model.latent_channels} channels; the phase in which normals "
            "and opacity are the latent needs 4, so give --latent_iter_ratio 0"
        )
    return model
