"""The field of a configuration."""

import torch

from dream_fast.engine.config.schema import FieldConfig
from dream_fast.engine.scene.field import SceneField
from dream_fast.engine.scene.frequency_field import VanillaField
from dream_fast.engine.scene.hash_grid_field import Field


def make_field(config: FieldConfig, bound: float, generator: torch.Generator) -> SceneField:
    """The field of the configured backbone."""
    return (VanillaField if config.backbone == "vanilla" else Field)(config, bound, generator)
