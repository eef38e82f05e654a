"""The cases of `bench step`, and the trainers that they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dream_fast import kernels
from dream_fast.bench.pipeline.random_sd import TOKENS, RandomPrompt, random_components
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.guidances import DREAM_MINI, STABLE_DIFFUSION
from dream_fast.engine.config.schema import Config
from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.guidance.diffusion import diffusion_guidance
from dream_fast.engine.guidance.model.components import COMPILED, Components, load_components, prepare_components
from dream_fast.engine.guidance.prompts import PromptEmbeddings
from dream_fast.engine.runtime.device import choose_runtime, prepare
from dream_fast.engine.runtime.quiet import quiet_diffusers
from dream_fast.engine.training.trainer import Trainer

MINI_TOKENS = 24
# A ball of radius 0.49 from 3.2 away: 490,000 samples.
BALL: dict[str, Any] = {
    "text": "a ball",
    "fp16": True,
    "seed": 0,
    "blob_density": 10.0,
    "blob_radius": 0.282,
    "radius_range": (3.2, 3.2),
    "fovy_range": (20.0, 20.0),
    "latent_iter_ratio": 0.0,
    "textureless_ratio": 0.0,
    "lr": 1e-9,
}
MINI: dict[str, Any] = {"text": "a hamburger", "fp16": True, "seed": 0, "w": 64, "h": 64}
# On a CPU, to try the command: the same parts, tiny.
TINY: dict[str, Any] = {
    "fp16": False,
    "w": 12,
    "h": 12,
    "n_levels": 3,
    "log2_hashmap_size": 10,
    "max_resolution": 32,
    "hidden_width": 16,
    "max_steps": 48,
    "occupancy_resolution": 16,
}


@dataclass(frozen=True)
class StepCase:
    """A case of the benchmark of a step.

    mini: with the embedded model instead of Stable Diffusion's architecture. flags: of the command. peer: the step is
    also timed on plain diffusers and references. channels_last, compiled: modules of the image model that compute so,
    instead of a run's choice.
    """

    name: str
    mini: bool = False
    flags: dict[str, Any] = field(default_factory=dict)
    target_ms: float | None = None
    target_gib: float | None = None
    peer: bool = False
    channels_last: tuple[str, ...] | None = None
    compiled: tuple[str, ...] = COMPILED

    def config(self, device: torch.device) -> Config:
        flags = (MINI if self.mini else BALL) | self.flags | (TINY if device.type == "cpu" else {})
        guidance = DREAM_MINI if self.mini else STABLE_DIFFUSION
        return configure({"guidance": (guidance.name,)} | flags, device.type)


CASES = (
    StepCase("default", target_ms=26, target_gib=5.0, peer=True),
    StepCase("vram_O", flags={"vram_O": True}, target_gib=3.2),
    StepCase("compile", flags={"compile": True}, target_ms=22),
    StepCase("compile_analytic", flags={"compile": True, "normals": "analytic"}, target_ms=17),
    StepCase("dmtet", flags={"dmtet": True}, target_ms=1.3 * 26),
    StepCase("dream_mini", mini=True, target_ms=1000 / 120, peer=True),
)


def plain_components(mini: bool, device: torch.device, dtype: torch.dtype) -> Components:
    """The modules of diffusers without any change of ours."""
    if not mini:
        return random_components(device, dtype, tiny=device.type == "cpu")
    quiet_diffusers()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    components = load_components(MODEL_FOLDER, device, dtype, attention="sdpa")
    for name, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        model = cls.from_pretrained(MODEL_FOLDER / name, torch_dtype=dtype, local_files_only=True)
        setattr(components, name, model.requires_grad_(False).eval().to(device))
    components.vae.decoder = components.vae.post_quant_conv = None
    return components


def our_components(case: StepCase, config: Config, device: torch.device, dtype: torch.dtype) -> Components:
    """The same weights, prepared as a run prepares them."""
    run = config.run
    compiled = case.compiled if run.compile else ()
    options: dict[str, Any] = dict(vram_O=run.vram_O, attention=run.attention, compiled=compiled)
    if case.mini:
        return load_components(MODEL_FOLDER, device, dtype, **options)
    components = random_components(device, dtype, tiny=device.type == "cpu")
    prepare_components(components, TOKENS, **options, channels_last=case.channels_last)
    return components


def embed_prompt(case: StepCase, components: Components) -> PromptEmbeddings:
    return PromptEmbeddings(components, MINI["text"]) if case.mini else RandomPrompt(components)


def make_trainer(case: StepCase, device: torch.device, *, plain: bool = False) -> Trainer:
    """The trainer of a run with the flags of `case`; `plain` guides by diffusers alone, without CUDA graphs."""
    config = case.config(device)
    if plain:
        config = config.override({"cuda_graph": False})  # the references read sizes on the host
    runtime = choose_runtime(config)
    assert config.run.seed is not None, "every case names a seed"
    prepare(runtime, config.run.drawn_seed, vram_O=config.run.vram_O)
    if plain:
        components = plain_components(case.mini, device, runtime.dtype)
    else:
        components = our_components(case, config, device, runtime.dtype)
    guidance = diffusion_guidance(components, embed_prompt(case, components), config, cuda_graphs=not plain)
    return Trainer(config, runtime, config.run.drawn_seed, guidance)


@contextmanager
def reference_operators() -> Iterator[None]:
    """Replace the operators that the engine calls by their PyTorch references, on a GPU too, inside a `with` block."""
    names = [name.removesuffix("_reference") for name in kernels.__all__ if name.endswith("_reference")]
    before = {name: getattr(kernels, name) for name in names}
    try:
        for name in names:
            setattr(kernels, name, getattr(kernels, f"{name}_reference"))
        yield
    finally:
        for name, operator in before.items():
            setattr(kernels, name, operator)
