"""Compile the Triton kernels of a run before its first step, in parallel.

Triton compiles a kernel at its first launch, one at a time: 15 s for a run with dream-mini and an empty cache.
The launches are collected from one step and one image of a spare trainer, in which no kernel is launched.
"""

from typing import Any, cast

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.engine.config.schema import Config
from dream_fast.engine.guidance.base import GuidanceResult
from dream_fast.engine.render.volume import VolumeRenderer
from dream_fast.engine.runtime.device import Runtime
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.scene.camera import turntable
from dream_fast.engine.training.trainer import Trainer


def collect_launches(config: Config, runtime: Runtime) -> list[Any]:
    """Collect the launches of a run's first step and of its images without launching a kernel.

    Kernels of later phases are left out.
    """
    spare = Trainer(config.override({"cuda_graph": False, "save_guidance": False}), runtime, 0, _no_guidance)
    sampler = cast(VolumeRenderer, spare.renderer).sampler
    sample = sampler.sample

    def sample_zeros(*rays: Any, **options: Any) -> kernels.Samples:
        samples = sample(*rays, **options)
        for tensor in samples:
            tensor.zero_()  # no kernel wrote it, and some are indices
        return samples

    sampler.sample = sample_zeros  # type: ignore[method-assign]
    with kernels.recorded_launches() as launches:
        spare.train_step()
        spare.renderer.view(turntable(config.camera, 1, runtime.device), config.camera.H, config.camera.W)
    return launches


def precompile_kernels(config: Config, runtime: Runtime, reporter: Reporter) -> None:
    """Compile the kernels of a run on a GPU, or load them from Triton's cache."""
    # The launches of a mesh depend on its size, which is unknown before the first step.
    if runtime.device.type != "cuda" or config.dmtet.dmtet:
        return
    launches = collect_launches(config, runtime)
    kinds = len({launch.kernel for launch in launches})
    with reporter.bar("compiling kernels", kinds) as bar:
        kernels.compile_launches(launches, lambda compiled: bar.advance(min(compiled, kinds - 1)))
        bar.advance(kinds)
    torch.cuda.empty_cache()


def _no_guidance(images: Tensor, *_: Any) -> GuidanceResult:
    loss = images.sum()
    return GuidanceResult(loss, torch.zeros(len(images)), loss.detach(), images.detach())
