"""The guidance protocol: a call that turns rendered images into a loss, with its inputs and its result."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dream_fast.engine.guidance.model.image_model import ImageModel
from dream_fast.engine.scene.camera import Cameras


class StepInputs(NamedTuple):
    """Inputs of one optimisation step, made by the trainer on the host once a step.

    A CUDA graph of a step reads `timesteps`, `scalars` and `active_levels` from the device; `phase`, `shading` and
    `background_network` tell the graphs apart, and a captured step reads nothing else that varies.

    step: number of the step, from 0.
    progress: part of the run that lies before it, in [0, 1].
    generator: source of all random draws of the step, on the device; None: torch's default one.
    latents: the images of the step are latents.
    timesteps: [B] from `Guidance.prepare_step`; None: the guidance draws them in its call.
    scalars: the numbers that change from step to step, by name, such as settings with a schedule.
    phase: "latent", "albedo" or "shaded". This and the following attributes are for the trainer.
    shading: shading of the render.
    background_network: the background network is rendered, else one colour.
    active_levels: number of hash-grid levels or frequencies in use; None: all.
    """

    step: int = 0
    progress: float = 0.0
    generator: torch.Generator | None = None
    latents: bool = False
    timesteps: Tensor | None = None
    scalars: Mapping[str, float | Tensor] = {}
    phase: str = "albedo"
    shading: str = "albedo"
    background_network: bool = False
    active_levels: int | Tensor | None = None


class GuidanceResult(NamedTuple):
    """Loss of a step, and what is logged or saved of it. B images, latents [C, h, w].

    loss: scalar, differentiable in the images.
    t: [B] timesteps; [0] without a diffusion model.
    grad_norm: scalar, length of `gradient`; not finite where that is not.
    gradient: [B, C, h, w], of the latents (or of the images, without latents), before the division by B.
    noisy: [B, C, h, w] x_t, or None without a diffusion model.
    clean: [B, C, h, w] x0, the one-step estimate of the clean latents, or None.
    losses: the loss of each guidance by name, of several.
    """

    loss: Tensor
    t: Tensor
    grad_norm: Tensor
    gradient: Tensor
    noisy: Tensor | None = None
    clean: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class Guidance(Protocol):
    """Pull images towards a prompt. A plain function of the same arguments is enough where no step is captured.

    accepts_latents: it can be called with latents; without, a sum leaves it out of a step that shows them.
    capturable: its call can be captured in a CUDA graph, after `prepare_step`.
    components: the diffusion model whose latents `--save_guidance` decodes; None without one.
    """

    accepts_latents: bool = True
    capturable: bool = False

    @property
    def components(self) -> ImageModel | None:
        return None

    def prepare_step(self, inputs: StepInputs, batch: int) -> StepInputs:
        """Return `inputs` with all that a captured call of `batch` images reads, as tensors on the device."""
        return inputs

    def __call__(self, images: Tensor, cameras: Cameras, inputs: StepInputs) -> GuidanceResult:
        """Guide `images` [B, 3, H, W] in [0, 1], or latents [B, 4, H, W], which `cameras` see."""
