"""Kernels that are compiled before the first step are those of steps and images."""

import pytest
import torch

from dream_fast.engine.config.configure import configure
from dream_fast.engine.guidance.base import GuidanceResult
from dream_fast.engine.runtime.device import choose_runtime
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.scene.camera import turntable
from dream_fast.engine.training.kernel_warmup import collect_launches, precompile_kernels
from dream_fast.engine.training.trainer import Trainer

SMALL = dict(text="a hamburger", w=8, h=8, W=16, H=16, max_steps=16, occupancy_resolution=16)


def small_config(device: str):
    # The GPU's defaults, wherever this runs.
    return configure(SMALL | {"fp16": True}, "cuda").override({"device": device})


def sum_of(images, *_, **__):
    return GuidanceResult(images.sum(), torch.zeros(1), images.sum().detach(), images.detach())


@pytest.fixture
def filled():
    """Fill the results of torch.empty with the largest numbers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_collect_launches_of_a_run(filled):
    """Launches of every part of a run are collected and none is run."""
    config = small_config("cpu")
    names = {launch.kernel.__name__ for launch in collect_launches(config, choose_runtime(config))}
    for part in (
        "field_fwd",
        "field_bwd",
        "hash_grid_table_bwd",
        "march",
        "composite_bwd",
        "threshold",
        "adan",
        "shade",
    ):
        assert any(part in name for name in names), part
    # Afterwards operators compute again.
    assert torch.isfinite(_one_step(config)).all()


def test_collect_launches_with_guidance_images(filled):
    """A run that saves images of its guidance compiles the same kernels; before the first step there are no images."""
    config = small_config("cpu")
    saving = config.override({"save_guidance": True})
    names = [[launch.kernel.__name__ for launch in collect_launches(c, choose_runtime(c))] for c in (config, saving)]
    assert names[0] == names[1]


def _one_step(config):
    trainer = Trainer(config.override({"cuda_graph": False}), choose_runtime(config), 0, sum_of)
    trainer.train_step()
    return trainer.optimizer.params


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are compiled for the GPU that is there")
def test_first_step_compiles_nothing(monkeypatch):
    """The first step and the images compile nothing."""
    import triton

    config = small_config("cuda").override({"w": 24, "h": 24, "hidden_width": 16})
    runtime = choose_runtime(config)
    precompile_kernels(config, runtime, Reporter())
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **event: compiled.append(event["repr"]))
    trainer = Trainer(config.override({"cuda_graph": False}), runtime, 0, sum_of)
    trainer.train_step()
    trainer.renderer.view(turntable(config.camera, 2, runtime.device), config.camera.H, config.camera.W)
    trainer.field.density(torch.zeros(1000, 3, device="cuda"))
    trainer.field.albedo(torch.zeros(77, 3, device="cuda"))
    assert compiled == []
