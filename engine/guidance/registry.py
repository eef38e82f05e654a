"""Build the guidance that the settings name."""

from pathlib import Path
from typing import NamedTuple

from dream_fast.engine.config.model_names import CLIP_MODEL, IF_MODEL
from dream_fast.engine.config.schema import Config
from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.dream_mini.vocabulary import known_words
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.base import Guidance
from dream_fast.engine.guidance.clip import clip_guidance
from dream_fast.engine.guidance.diffusion import diffusion_guidance
from dream_fast.engine.guidance.model.attention import AttentionChoice
from dream_fast.engine.guidance.model.components import COMPILED, Components, choose_source, load_components
from dream_fast.engine.guidance.prompts import PromptEmbeddings, ViewAngles
from dream_fast.engine.guidance.sum import GuidanceSum
from dream_fast.engine.runtime.device import Runtime


class LoadedGuidance(NamedTuple):
    """What guides a run, the models' names, and the attention of the one that is a Stable Diffusion, if one is."""

    guidance: Guidance
    models: str
    attention: AttentionChoice | None


def load_guidance(config: Config, runtime: Runtime, previous: AttentionChoice | None = None) -> LoadedGuidance:
    """Load the models that guide, one after the other, and embed the prompts; of several guidances the sum.

    `previous` is the attention that a resumed run has computed with.
    """
    guidance, run = config.guidance, config.run
    angles = ViewAngles.of(config.camera)
    parts: dict[str, Guidance] = {}
    models, attention = [], None
    for name in guidance.guidance:
        if name == "clip":
            source = guidance.clip_key or CLIP_MODEL
            parts[name] = clip_guidance(source, runtime.device, run.text, run.view_prompts, guidance, angles)
            models.append(source)
            continue
        source = choose_source(sd_version=guidance.sd_version, hf_key=guidance.hf_key)
        if name == "IF":
            source = guidance.if_key or IF_MODEL
        components = _load_components(config, runtime, source, name, previous)
        prompts = _embed(config, components, source)
        parts[name] = diffusion_guidance(components, prompts, config)
        models.append(components.name)
        if not components.latents_are_pixels:
            attention = components.attention
    whole = GuidanceSum(parts) if len(parts) > 1 else next(iter(parts.values()))
    return LoadedGuidance(whole, " + ".join(models), attention)


def _load_components(
    config: Config, runtime: Runtime, source: str | Path, name: str, previous: AttentionChoice | None
) -> Components:
    """The diffusion model at ``source``, for the guidance ``name``."""
    run = config.run
    # A measurement may end differently the next time.
    attention = "sdpa" if run.deterministic and run.attention == "auto" else run.attention
    options = dict(vram_O=run.vram_O, attention=attention, previous=previous, compiled=COMPILED if run.compile else ())
    options["need_vae_decoder"] = config.output.save_guidance
    if name == "IF":
        options["kind"] = name
    components = load_components(source, runtime.device, runtime.dtype, **options)
    if config.shading.latent_iter_ratio > 0 and components.latent_channels != 4:
        raise UserError(
            f"the latents of {components.name} have {components.latent_channels} channels; the phase in which normals "
            "and opacity are the latent needs 4, so give --latent_iter_ratio 0"
        )
    return components


def _embed(config: Config, components: Components, source: str | Path) -> PromptEmbeddings:
    """The prompts as the model reads them: of each text the embedded one gets only the words that it knows."""
    run = config.run
    read = known_words if source == MODEL_FOLDER else str
    view_prompts = {view: read(text) for view, text in run.view_prompts.items()}
    return PromptEmbeddings(components, read(run.text), read(run.negative), view_prompts=view_prompts)
