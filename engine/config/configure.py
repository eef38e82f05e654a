"""From typed settings to the configuration of a run: preset, overrides, validation. Imports nothing heavy."""

from collections.abc import Mapping
from typing import Any

from dream_fast.engine.config.guidances import DEEPFLOYD_IF, STABLE_DIFFUSION, specs_of
from dream_fast.engine.config.presets import choose_preset
from dream_fast.engine.config.schema import Config, device_kind
from dream_fast.engine.config.validate import check_typed, graph_breaking_flags, validate
from dream_fast.engine.errors import UserError

# The settings that a rescue changes. A rescued run keeps its own when it is resumed.
RESCUED = ("lambda_opacity", "lambda_opacity_entropy", "blob_density", "blob_radius", "lr")


def expand_shortcuts(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the typed settings with `-O`, `-O2` and `--IF` (names O, O2 and IF) replaced by the settings they mean.

    A typed setting wins over a shortcut, except that `--IF` replaces SD in `--guidance`. As in stable-dreamfusion `-O2`
    has no effect together with `-O`.

    Raises UserError: when the backbone has no occupancy grid to march through, or `--IF` has nothing to replace.
    """
    settings = {name: value for name, value in typed.items() if name not in ("O", "O2", "IF")}
    shortcuts: dict[str, Any] = {}
    if typed.get("O"):
        shortcuts = {"fp16": True}
    elif typed.get("O2"):
        shortcuts = {"fp16": True, "backbone": "vanilla"}
        if not typed.get("test"):  # the stored run has its own
            shortcuts["progressive_level"] = True
    settings = shortcuts | settings
    if typed.get("IF"):
        names = settings.get("guidance", (STABLE_DIFFUSION.name,))
        if not {STABLE_DIFFUSION.name, DEEPFLOYD_IF.name} & set(names):
            words = f"--guidance {' '.join(names)}"
            raise UserError(f"--IF replaces SD, which {words} does not name: name IF there")
        replaced = (DEEPFLOYD_IF.name if name == STABLE_DIFFUSION.name else name for name in names)
        settings["guidance"] = tuple(dict.fromkeys(replaced))
    for name, flag in (("O", "-O"), ("cuda_ray", "--cuda_ray")):
        if typed.get(name) and settings.get("backbone") == "vanilla":
            raise UserError(
                f"{flag} marches through the occupancy grid, which the vanilla backbone does not have; use --fp16"
            )
    return settings


def configure(typed: Mapping[str, Any], device: str) -> Config:
    """Return the configuration of a run from the typed settings, by name, on `device` ("cpu", "cuda" or "cuda:N").

    The seed stays None where none was typed: `finalize` sets it. Raises UserError: when settings contradict each other.
    """
    if device_kind(device) not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, not {device!r}")
    check_typed(typed)
    config = choose_preset(typed, device).override({**typed, "device": device})
    if "cuda_graph" not in typed:
        config = config.override({"cuda_graph": _captures_steps(config)})
    validate(config)
    return config


def finalize(config: Config, stored: Config | None, seed: int) -> Config:
    """Return `config` with a seed and, for a run that continues `stored`, with its rescued settings.

    `seed` is used for a new run without `--seed`. Raises UserError: as `validate`.
    """
    overrides: dict[str, Any] = {}
    if config.run.seed is None:
        overrides["seed"] = seed if stored is None else stored.run.seed
    if stored is not None and config.run.rescue:
        overrides |= {name: stored.get(name) for name in RESCUED}
    config = config.override(overrides)
    validate(config)
    return config


def _captures_steps(config: Config) -> bool:
    """Return whether steps are captured by default: on a GPU, with a grid, and one guidance with that default."""
    specs = specs_of(config.guidance.guidance)
    return (
        device_kind(config.run.device) == "cuda"
        and len(specs) == 1
        and specs[0].captured_by_default
        and config.field.backbone == "grid"
        and not config.run.deterministic  # two replayed runs were not the same bit for bit
        and not graph_breaking_flags(config)
    )
