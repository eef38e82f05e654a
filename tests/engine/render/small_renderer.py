"""A small renderer and cameras for tests of rendering."""

import dataclasses

import torch

from dream_fast.engine.config.sections import FieldConfig, RenderConfig
from dream_fast.engine.render.volume import VolumeRenderer
from dream_fast.engine.scene.camera import Cameras, make_cameras
from dream_fast.engine.scene.make_field import make_field

GREY = torch.tensor([0.25, 0.5, 0.75])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(backbone: str = "grid", background: float = -1.0, **changes) -> VolumeRenderer:
    small = dict(n_levels=2, log2_hashmap_size=8, base_resolution=4, max_resolution=8, n_frequencies=2, hidden_width=8)
    field = FieldConfig(backbone=backbone, hidden_layers=1, bg_radius=background, **small)
    sizes = dict(max_steps=64, occupancy_resolution=16, num_steps=12, upsample_steps=6)
    config = dataclasses.replace(RenderConfig(), **sizes | changes)
    return VolumeRenderer(make_field(field, config.bound, seeded()), config)


def cameras(count: int = 1) -> Cameras:
    numbers = torch.tensor([[70.0, 100.0], [20.0, -60.0], [3.0, 2.5], [30.0, 40.0]])
    return make_cameras(*numbers[:, :count])
