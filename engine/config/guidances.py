"""The table of guidances: their models, settings and abilities. Imports nothing heavy.

A new guidance takes an entry here and a builder in `engine/guidance/registry.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

# Settings that only a diffusion model reads.
DIFFUSION_SETTINGS = frozenset(
    "negative objective loss_space inversion_steps guidance_scale t_range t_anneal guidance_rescale clip_grad_latent "
    "perpneg negative_w front_decay_factor side_decay_factor compile".split()
)


@dataclass(frozen=True, kw_only=True)
class GuidanceSpec:
    """A guidance that `--guidance` names.

    name: the word of `--guidance`.
    description: a phrase for the help.
    family: presets that it starts from; None: those of the other guidances of the run. Guidances of different families
        cannot be combined.
    model_settings: settings that name its model. One of them is enough.
    implied_by_model: the guidance is chosen by its model settings where `--guidance` is not typed.
    default_model: overrides where none of the model settings is typed.
    settings_read: settings that are refused unless a guidance of the run reads them.
    accepts_latents: it can guide latents. A diffusion model that cannot excludes a latent phase.
    capturable: a step with this guidance alone can be captured as one CUDA graph.
    captured_by_default: such a step is captured unless another setting excludes it.
    has_attention: `--attention` applies to its model.
    saves_latents: it has latents for `--save_guidance`.
    objective: a phrase for the start line; empty: `--objective`.
    closed_vocabulary: prompts are limited to dream-mini's vocabulary.
    """

    name: str
    description: str
    family: str | None = None
    model_settings: tuple[str, ...] = ()
    implied_by_model: bool = False
    default_model: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    settings_read: frozenset[str] = frozenset()
    accepts_latents: bool = False
    capturable: bool = False
    captured_by_default: bool = False
    has_attention: bool = False
    saves_latents: bool = False
    objective: str = ""
    closed_vocabulary: bool = False

    @property
    def is_diffusion(self) -> bool:
        """True for guidance by a diffusion model."""
        return self.settings_read >= DIFFUSION_SETTINGS


DREAM_MINI = GuidanceSpec(
    name="dream-mini",
    description="the embedded model",
    family="dream-mini",
    settings_read=DIFFUSION_SETTINGS,
    accepts_latents=True,
    capturable=True,
    captured_by_default=True,
    has_attention=True,
    saves_latents=True,
    closed_vocabulary=True,
)
STABLE_DIFFUSION = GuidanceSpec(
    name="SD",
    description="Stable Diffusion",
    family="stable-diffusion",
    model_settings=("hf_key", "sd_version"),
    implied_by_model=True,
    default_model=MappingProxyType({"sd_version": "2.1"}),
    settings_read=DIFFUSION_SETTINGS,
    accepts_latents=True,
    capturable=True,
    has_attention=True,
    saves_latents=True,
)
DEEPFLOYD_IF = GuidanceSpec(
    name="IF",
    description="DeepFloyd IF on 64x64 pixels",
    family="stable-diffusion",
    model_settings=("if_key",),
    settings_read=DIFFUSION_SETTINGS,
    capturable=True,
    saves_latents=True,
)
CLIP = GuidanceSpec(
    name="clip",
    description="similarity of image and prompt in CLIP",
    model_settings=("clip_key",),
    objective="CLIP similarity",
)

GUIDANCES: Mapping[str, GuidanceSpec] = {spec.name: spec for spec in (DREAM_MINI, STABLE_DIFFUSION, DEEPFLOYD_IF, CLIP)}


def specs_of(names: Iterable[str]) -> tuple[GuidanceSpec, ...]:
    """Return the specs of `names`, in their order."""
    return tuple(GUIDANCES[name] for name in names)


def chosen_guidances(typed: Mapping[str, Any]) -> tuple[GuidanceSpec, ...]:
    """Return the guidances that the typed settings choose: by name, by a model, or dream-mini."""
    if "guidance" in typed:
        return specs_of(typed["guidance"])
    implied = [spec for spec in GUIDANCES.values() if spec.implied_by_model and typed.keys() & set(spec.model_settings)]
    return tuple(implied) or (DREAM_MINI,)


def family_of(specs: Iterable[GuidanceSpec]) -> str:
    """Return the family of the presets of a run with these guidances."""
    return next((spec.family for spec in specs if spec.family is not None), "stable-diffusion")


def accept_latents(specs: Iterable[GuidanceSpec]) -> bool:
    """Return whether a run of these guidances can have a latent phase, which leaves out those without diffusion."""
    models = [spec for spec in specs if spec.is_diffusion]
    return bool(models) and all(spec.accepts_latents for spec in models)
