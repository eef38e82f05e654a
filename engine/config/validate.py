"""Checks of settings against each other, and of typed ones that a run would not read. Imports nothing heavy.

A section checks its own settings when it is made; checks across sections are here.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from dream_fast.engine.config.guidances import (
    GUIDANCES,
    GuidanceSpec,
    accept_latents,
    chosen_guidances,
    specs_of,
)
from dream_fast.engine.config.schedule import largest
from dream_fast.engine.config.schema import Config, settings_unused_by
from dream_fast.engine.config.sections import VANILLA, FieldConfig
from dream_fast.engine.errors import UserError

# Reasons to refuse a setting of another backbone: with a grid, and with the vanilla backbone.
REFUSAL_BY_BACKBONE = (
    "its rays march through the occupancy grid, where --max_steps sets the samples of a ray",
    "it has no hash grid, and its rays take --num_steps and --upsample_steps without an occupancy grid",
)


def check_typed(typed: Mapping[str, Any]) -> None:
    """Check the typed settings against each other.

    Raises UserError: when models contradict each other, or the guidances or the backbone do not read a setting.
    """
    specs = chosen_guidances(typed)
    _check_models(typed, specs)
    _check_settings_read(typed, specs)
    backbone = typed.get("backbone", FieldConfig().backbone)
    for name in typed:
        if name in settings_unused_by(backbone):
            reason = REFUSAL_BY_BACKBONE[backbone in VANILLA]
            raise UserError(f"--{name} has no meaning with --backbone {backbone}: {reason}")


def _check_models(typed: Mapping[str, Any], specs: tuple[GuidanceSpec, ...]) -> None:
    words = _guidance_words(specs)
    for spec in GUIDANCES.values():
        keys = [name for name in spec.model_settings if name in typed]
        if len(keys) > 1:
            raise UserError(f"{' and '.join(f'--{key}' for key in keys)} both name a model: give one of them")
    for spec in GUIDANCES.values():
        for key in spec.model_settings:
            if key in typed and spec not in specs:
                raise UserError(
                    f"--{key} names a model for --guidance {spec.name}, which {words} does not name: leave one out"
                )
    for spec in filter(specs.__contains__, GUIDANCES.values()):
        others = sorted(s.name for s in specs if s.family not in (None, spec.family))
        if spec.family is not None and others:
            raise UserError(
                f"--guidance {spec.name} cannot be combined with {' and '.join(others)}: they need other settings of a "
                "run"
            )


def _check_settings_read(typed: Mapping[str, Any], specs: tuple[GuidanceSpec, ...]) -> None:
    optional = {name for spec in GUIDANCES.values() for name in spec.settings_read}
    read = {name for spec in specs for name in spec.settings_read}
    for name in typed:
        if name in optional - read:
            raise UserError(
                f"--{name} has no meaning with {_guidance_words(specs)} alone: only diffusion models read it"
            )


def validate(config: Config) -> None:
    """Check the settings of different sections against each other.

    Raises UserError: when settings contradict each other, or the guidances of the run do not support them.
    """
    if config.field.backbone in VANILLA and max(map(largest, (config.loss.lambda_tv, config.loss.lambda_wd))) > 0:
        raise UserError("--lambda_tv and --lambda_wd apply to the hash table, which --backbone vanilla does not have")
    specs = specs_of(config.guidance.guidance)
    words = _guidance_words(specs)
    if config.shading.latent_iter_ratio > 0 and not accept_latents(specs):
        raise UserError(
            f"--latent_iter_ratio {config.shading.latent_iter_ratio:g} cannot be combined with {words}, which cannot "
            "guide latents: leave it out"
        )
    if config.run.attention not in ("auto", "sdpa") and not any(spec.has_attention for spec in specs):
        raise UserError(
            f"--attention {config.run.attention} is for Stable Diffusion: the models of {words} keep their own"
        )
    if config.output.save_guidance and not any(spec.saves_latents for spec in specs):
        raise UserError(f"--save_guidance saves latents of a diffusion model, and {words} has none")
    if config.run.cuda_graph and not (len(specs) == 1 and specs[0].capturable):
        raise UserError(f"--cuda_graph replays steps of one diffusion model, not those of {words}: leave it out")
    breaking = graph_breaking_flags(config)
    if config.run.cuda_graph and breaking:
        raise UserError(f"--cuda_graph cannot be combined with {breaking[0]}, which changes what a step launches")


def check_packages(config: Config) -> None:
    """Check that the packages of optional outputs are installed. Raises UserError: when one is missing."""
    if config.output.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install 'dream-fast[tensorboard]'")


def graph_breaking_flags(config: Config) -> list[str]:
    """Return the flags in use that change what a step launches, so that no CUDA graph can replay it."""
    flags = {
        "--dmtet": config.dmtet.dmtet,
        "--progressive_view": config.camera.progressive_view,
        # The references of the hash grid read the number of levels on the host.
        "--progressive_level": config.shading.progressive_level and config.field.backbone == "grid_torch",
    }
    return [flag for flag, is_on in flags.items() if is_on]


def _guidance_words(specs: tuple[GuidanceSpec, ...]) -> str:
    return f"--guidance {' '.join(spec.name for spec in specs)}"
