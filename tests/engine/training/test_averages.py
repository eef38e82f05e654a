"""Outputs show the averaged weights instead of those of the last step."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from rich.console import Console

from dream_fast.engine.config.presets import reference
from dream_fast.engine.outputs import write_outputs
from dream_fast.engine.runtime.device import choose_runtime
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.training.loop import validate, write_test_video
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.folder import Workspace

SMALL = dict(
    text="a hamburger", device="cpu", iters=1, W=24, H=24, dataset_size_valid=2, dataset_size_test=2, n_levels=2,
    log2_hashmap_size=8, max_resolution=32, hidden_width=16, hidden_layers=1, bound=0.6, max_steps=48, bg_radius=-1.0,
    occupancy_resolution=16, mcubes_resolution=24, texture_resolution=64, save_mesh=True,
)  # fmt: skip
RED, BLUE = (8.0, -8.0, -8.0), (-8.0, -8.0, 8.0)  # logits


@pytest.fixture
def trainer() -> Trainer:
    """A run whose averaged weights show a red object, and its last step a blue one."""
    config = reference().override(SMALL)
    built = Trainer(config, choose_runtime(config), 0)
    logits = built.field.biases[-1].data[1:]
    logits.copy_(torch.tensor(RED))
    built.optimizer.state.ema.copy_(built.optimizer.params)
    built.renderer.update_occupancy(None)
    logits.copy_(torch.tensor(BLUE))
    return built


def assert_red(pixels: np.ndarray) -> None:
    """Check that the object in `pixels` [..., 3] over white is red."""
    red, _, blue = pixels.reshape(-1, 3).astype(float).T
    assert (red - blue).max() > 150 and (blue - red).max() < 50


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def test_outputs_show_average(trainer, tmp_path):
    """Six views, video and mesh show the averaged weights, and the run keeps its own."""
    before = trainer.optimizer.params.clone()
    write_outputs(trainer, Workspace(tmp_path), Reporter(Console(quiet=True)))
    for name in ("front", "right", "back", "left", "top", "bottom"):
        assert_red(np.asarray(Image.open(tmp_path / "results" / f"{name}.png").convert("RGB")))
    assert_red(frames(tmp_path / "results" / "turntable.mp4")[:, :, :24])  # the colours stand left
    texture = trimesh.load(tmp_path / "mesh" / "mesh.glb", force="mesh").visual.material.baseColorTexture
    assert_red(np.asarray(texture.convert("RGB")))
    assert torch.equal(trainer.optimizer.params, before)


def test_validation_shows_average(trainer, tmp_path):
    """Validation images show the averaged weights."""
    validate(trainer, tmp_path / "strip.png")
    strip = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB"))
    assert_red(strip[:24])  # colours above, depths below


def test_test_video_shows_average(trainer, tmp_path):
    """Videos of --test_interval show the averaged weights."""
    write_test_video(trainer, tmp_path / "turntable.mp4")
    assert_red(frames(tmp_path / "turntable.mp4")[:, :, :24])
