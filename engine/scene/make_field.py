"""The choice of the field by the configuration."""

import torch

from dream_fast.engine.config.sections import FieldConfig
from dream_fast.engine.scene.field import Field
from dream_fast.engine.scene.frequency_field import FrequencyField
from dream_fast.engine.scene.hash_grid_field import HashGridField


def make_field(config: FieldConfig, bound: float, generator: torch.Generator) -> Field:
    """The field of the configured backbone."""
    return (FrequencyField if config.backbone == "vanilla" else HashGridField)(config, bound, generator)
