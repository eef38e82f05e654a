"""`bench models`: time and memory of a guidance step of large image models, at their true sizes.

Weights and prompts are random, so nothing is downloaded: neither time nor memory depends on them. A row has the
milliseconds of the gradient of one image of 64 x 64 pixels, eager and as a CUDA graph, and the memory reserved. Text
encoders are not part of it, as a run frees them before its first step.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.model.pipelines import FAMILIES, PipelineModel
from dream_fast.engine.guidance.sds import ScoreDistillation
from dream_fast.engine.runtime.quiet import quiet_diffusers

GIB = 2**30
WARM_UP, STEPS = 3, 10


class Case(NamedTuple):
    """A model by the classes and settings of its network, VAE and scheduler, and the shapes of a prompt's tensors."""

    pipeline: str
    network: tuple[str, dict[str, Any]]
    vae: tuple[str, dict[str, Any]]
    scheduler: tuple[str, dict[str, Any]]
    prompt: dict[str, tuple[int, ...]]
    options: dict[str, Any] = {}  # of the pipeline


FLOW: tuple[str, dict[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {})
KL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2,
}  # fmt: skip
# As published in the config.json of each model.
CASES: dict[str, Case] = {
    "sdxl": Case(
        "StableDiffusionXLPipeline",
        (
            "UNet2DConditionModel",
            {
                "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10), "layers_per_block": 2,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        ("AutoencoderKL", KL | {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True}),
        ("DDIMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
        {"states": (77, 2048), "pooled": (1280,)},
    ),
    "sd3.5-medium": Case(
        "StableDiffusion3Pipeline",
        (
            "SD3Transformer2DModel",
            {
                "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
            },
        ),
        ("AutoencoderKL", KL | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
        FLOW,
        {"states": (333, 4096), "pooled": (2048,)},
    ),
    "prx-512": Case(
        "PRXPipeline",
        ("PRXTransformer2DModel", {"axes_dim": (32, 32)}),
        ("AutoencoderKL", KL | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
        FLOW,
        {"states": (256, 2304), "mask": (256,)},
        {"default_sample_size": 512},
    ),
    "flux2-klein-4b": Case(
        "Flux2KleinPipeline",
        (
            "Flux2Transformer2DModel",
            {
                "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
        ),
        ("AutoencoderKLFlux2", {}),
        FLOW,
        {"states": (512, 7680)},
    ),
}  # fmt: skip


def random_model(case: Case, device: torch.device, *, vram_O: bool = False) -> PipelineModel:
    """The model of a case with random weights, ready to predict; on a GPU in half precision."""
    quiet_diffusers()
    import diffusers

    family = FAMILIES[case.pipeline]

    class Random(family):  # type: ignore[misc, valid-type]
        def load_pipeline(self, without: dict[str, None]) -> Any:
            parts: dict[str, Any] = dict.fromkeys(self.text_parts)
            for part, (name, settings) in {self.network_part: case.network, "vae": case.vae}.items():
                parts[part] = None
                if part not in without:
                    with torch.device(device):
                        model = getattr(diffusers, name)(**settings)
                    parts[part] = torch.nn.Module.to(model, self.dtype).requires_grad_(False).eval()
            name, settings = case.scheduler
            parts["scheduler"] = getattr(diffusers, name)(**settings)
            return getattr(diffusers, case.pipeline)(**parts, **case.options)

        def read_settings(self, part: str) -> dict[str, Any]:
            name, settings = case.vae if part == "vae" else case.network
            with torch.device("meta"):
                return dict(getattr(diffusers, name)(**settings).config)

    half = torch.float16 if device.type == "cuda" else torch.float32
    model = Random(Path(), device, half, name=case.pipeline, vram_O=vram_O)
    model.free_text_encoder()
    return model


def prompt_of(case: Case, model: PipelineModel, seed: int) -> dict[str, Tensor]:
    """Random tensors in place of an embedded prompt, one row."""
    generator = torch.Generator(model.device).manual_seed(seed)
    return {
        name: torch.ones(1, *shape, device=model.device)
        if name == "mask"
        else torch.randn(1, *shape, generator=generator, device=model.device).to(model.dtype)
        for name, shape in case.prompt.items()
    }


def milliseconds(score: ScoreDistillation, case: Case) -> float:
    """Time of the gradient at one image, the mean of STEPS after WARM_UP."""
    model = score.components
    assert isinstance(model, PipelineModel)
    cond, uncond = (prompt_of(case, model, seed) for seed in (0, 1))
    image = torch.rand(1, 3, 64, 64, device=model.device).requires_grad_()
    started = 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            torch.cuda.synchronize()
            started = time.perf_counter()
        score(image, cond, uncond, StepInputs(step=step)).loss.backward()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / STEPS * 1e3


def row_of(name: str, device: torch.device, *, vram_O: bool) -> dict[str, Any]:
    """The row of a case."""
    case = CASES[name]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = random_model(case, device, vram_O=vram_O)
    parts = {"network": model.network, "vae_encoder": model.pipeline.vae.encoder}
    row: dict[str, Any] = {"model": name, "vram_O": vram_O, "image_size": model.image_size}
    row |= {f"{part}_parameters_M": sum(p.numel() for p in m.parameters()) // 10**6 for part, m in parts.items()}
    eager = ScoreDistillation(model, GuidanceConfig(guidance_scale=20.0), cuda_graphs=False)
    row["eager_ms"] = round(milliseconds(eager, case), 2)
    row["peak_GiB"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    graphed = ScoreDistillation(model, GuidanceConfig(guidance_scale=20.0))
    row["graph_ms"] = None if graphed.graphs is None else round(milliseconds(graphed, case), 2)
    return row


def main(argv: list[str]) -> int:
    """The command `bench models`."""
    parser = argparse.ArgumentParser(
        prog="bench models", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="models to measure")
    parser.add_argument("--vram_O", action="store_true", help="measure with --vram_O")
    parser.add_argument("--out", type=Path, help="file for the rows, JSON")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: bench models needs a GPU: these models take minutes a step on a CPU")
        return 2
    rows = []
    for name in args.only:
        rows.append(row_of(name, torch.device("cuda"), vram_O=args.vram_O))
        print(json.dumps(rows[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0
