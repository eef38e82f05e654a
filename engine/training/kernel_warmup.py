"""Compile the kernels of a run before its first step, side by side.

Triton compiles a kernel when it is first started, so one waits for the other: 15 s for those of a run with dream-mini
where none is in its cache yet. What a run will start is found by going through a step and a picture of a spare trainer
while nothing is started.
"""

from typing import Any

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.engine.config.schema import Config
from dream_fast.engine.guidance.base import GuidanceResult
from dream_fast.engine.runtime.device import Runtime
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.scene.camera import turntable
from dream_fast.engine.training.trainer import Trainer


def collect_launches(config: Config, runtime: Runtime) -> list[Any]:
    """The launches of a run's first step and of its pictures, none of which took place.

    Kernels of later phases are not among them.
    """
    spare = Trainer(config.override({"cuda_graph": False}), runtime, 0, _any_guidance)
    sampler = spare.renderer.sampler
    sample = sampler.sample

    def sampled(*rays: Any, **options: Any) -> kernels.Samples:
        samples = sample(*rays, **options)
        for part in samples:
            part.zero_()  # no kernel wrote it, and some of it are indices
        return samples

    sampler.sample = sampled
    with kernels.recorded_launches() as launches:
        spare.train_step()
        spare.renderer.view(turntable(config.camera, 1, runtime.device), config.camera.H, config.camera.W)
    return launches


def precompile_kernels(config: Config, runtime: Runtime, reporter: Reporter) -> None:
    """Compile what the run will start on a GPU, or load it from Triton's cache."""
    # What a mesh starts depends on its size, which nobody knows before it is there.
    if runtime.device.type != "cuda" or config.dmtet.dmtet:
        return
    launches = collect_launches(config, runtime)
    kinds = len({launch.kernel for launch in launches})
    with reporter.bar("compiling kernels", kinds) as bar:
        kernels.compile_launches(launches, lambda done: bar.advance(min(done, kinds - 1)))
        bar.advance(kinds)
    torch.cuda.empty_cache()


def _any_guidance(pictures: Tensor, *_: Any, **__: Any) -> GuidanceResult:
    loss = pictures.sum()
    return GuidanceResult(loss, torch.zeros(len(pictures)), loss.detach(), pictures.detach())
