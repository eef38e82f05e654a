"""A whole step of the optimisation, as the trainer takes it. `python -m dream_fast.bench step`.

Workload `sds_step`: Stable Diffusion 2.1-base's architecture with random weights, fp16, batch 1, a 64 x 64 render of a
ball with about 490,000 samples, lambertian shading with normals, render -> 512^2 -> VAE encoder and back, UNet with
guidance, regularisers, Adan, an update of the occupancy grid every 16 steps. The learning rate is next to nothing, so
that the scene stays. `dream_mini` is the embedded model's own run at 64 x 64 pixels.

A time is a 16th of 16 steps; between two such blocks numbers are read, as a run does. `peak_bytes` is all that torch
has reserved, weights and CUDA graphs included. `split_ms` is of other steps, with a wait between them; its parts
include the host's delays. `modules_ms` is of the UNet (two rows) and of the VAE's encoder (forward and backward, one
picture) each alone, as the step computes them. The accuracy is that of the gradient in the picture, against plain
diffusers in fp32; the tolerance is twice the error of plain diffusers in the model's own dtype. `reference` is the same
step on plain diffusers, without CUDA graphs, and on the operators' PyTorch references.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dream_fast import kernels
from dream_fast.bench import measure, results
from dream_fast.bench.accuracy import error, tolerance
from dream_fast.bench.pipeline.random_sd import TOKENS, RandomPrompt, in_dtype, random_components
from dream_fast.engine.config.presets import resolve
from dream_fast.engine.config.schema import Config
from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.diffusion import diffusion_guidance
from dream_fast.engine.guidance.model.components import COMPILED, Components, load_components, prepare_components
from dream_fast.engine.guidance.prompts import PromptEmbeddings
from dream_fast.engine.guidance.sds import ScoreDistillation
from dream_fast.engine.runtime.device import choose_runtime, prepare
from dream_fast.engine.runtime.quiet import quiet_diffusers
from dream_fast.engine.runtime.step_parts import PARTS, on_part_end
from dream_fast.engine.training.loop import make_metrics_row
from dream_fast.engine.training.trainer import Trainer

MINI_TOKENS = 24
BLOCK = 16  # steps, one of which updates the occupancy grid
GIB = 1 << 30

# A ball of radius 0.49 from 3.2 away: 490,000 samples.
BALL = {
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
MINI = {"text": "a hamburger", "fp16": True, "seed": 0, "w": 64, "h": 64}
# On a CPU, to try the command: the same parts, tiny.
TINY = {
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
    """A name, the embedded model or Stable Diffusion's, flags, what it must reach (ms, GiB), whether it has a peer.

    channels_last, compiled: which of the image model's modules compute so, to try another choice than a run's.
    """

    name: str
    mini: bool = False
    typed: dict[str, Any] = field(default_factory=dict)
    target_ms: float | None = None
    target_gib: float | None = None
    peer: bool = False
    channels_last: tuple[str, ...] | None = None
    compiled: tuple[str, ...] = COMPILED

    def config(self, device: torch.device) -> Config:
        typed = (MINI if self.mini else BALL) | self.typed | (TINY if device.type == "cpu" else {})
        return resolve(typed, "dream-mini" if self.mini else "sd", device.type)


CASES = (
    StepCase("default", target_ms=26, target_gib=5.0, peer=True),
    StepCase("vram_O", typed={"vram_O": True}, target_gib=3.2),
    StepCase("compile", typed={"compile": True}, target_ms=22),
    StepCase("compile_analytic", typed={"compile": True, "normals": "analytic"}, target_ms=17),
    StepCase("dmtet", typed={"dmtet": True}, target_ms=1.3 * 26),
    StepCase("dream_mini", mini=True, target_ms=1000 / 120, peer=True),
)


# ----------------------------------------------------------------------------------------------------- what is measured


def plain_components(mini: bool, device: torch.device, dtype: torch.dtype) -> Components:
    """Modules as diffusers makes them, with nothing of ours in them."""
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
    options = dict(vram_O=run.vram_O, attention=run.attention, compiled=compiled)
    if case.mini:
        return load_components(MODEL_FOLDER, device, dtype, **options)
    components = random_components(device, dtype, tiny=device.type == "cpu")
    prepare_components(components, TOKENS, **options, channels_last=case.channels_last)
    return components


def prompt_of(case: StepCase, components: Components) -> PromptEmbeddings:
    return PromptEmbeddings(components, MINI["text"]) if case.mini else RandomPrompt(components)


def make_trainer(case: StepCase, device: torch.device, *, plain: bool = False) -> Trainer:
    """The trainer of a run with the flags of ``case``; ``plain`` guides by diffusers alone, call by call."""
    config = case.config(device)
    if plain:
        config = config.override({"cuda_graph": False})  # the references ask the device for sizes
    runtime = choose_runtime(config)
    prepare(runtime, config.run.seed, vram_O=config.run.vram_O)
    if plain:
        components = plain_components(case.mini, device, runtime.dtype)
    else:
        components = our_components(case, config, device, runtime.dtype)
    guidance = diffusion_guidance(components, prompt_of(case, components), config, cuda_graphs=not plain)
    return Trainer(config, runtime, config.run.seed, guidance)


@contextmanager
def reference_operators() -> Iterator[None]:
    """Inside the `with` block the engine computes with the operators' PyTorch references, on a GPU too."""
    names = [name.removesuffix("_reference") for name in kernels.__all__ if name.endswith("_reference")]
    before = {name: getattr(kernels, name) for name in names}
    try:
        for name in names:
            setattr(kernels, name, getattr(kernels, f"{name}_reference"))
        yield
    finally:
        for name, operator in before.items():
            setattr(kernels, name, operator)


# ------------------------------------------------------------------------------------------------------------- accuracy


class Exact(NamedTuple):
    """The gradient in a picture by plain diffusers: in fp32 (fp64 on a CPU), and the tolerance that follows from it."""

    gradient: Tensor
    tol: float
    flops: int  # of the UNet and the encoder, forward and backward, in matrix products and convolutions


def picture_gradient(score: ScoreDistillation, side: int, tokens: int) -> Tensor:
    """The gradient [1, 3, side, side] in one picture; the same picture, prompt, level and noise for every model."""
    components, device = score.components, score.components.device
    generator = torch.Generator(device).manual_seed(5)
    picture = torch.rand(1, 3, side, side, generator=generator, device=device).requires_grad_()
    # As long as the prompts of the steps, so that no second CUDA graph is made.
    shape = (2, 1, tokens, components.unet.config.cross_attention_dim)
    cond, uncond = torch.randn(shape, generator=generator, device=device).half().to(components.dtype)
    score(picture, cond, uncond, StepInputs(generator=generator)).loss.backward()
    return picture.grad.double().cpu()


def exact_gradient(case: StepCase, device: torch.device) -> Exact:
    config = case.config(device)
    dtype = choose_runtime(config).dtype
    side = config.camera.h
    plain = plain_components(case.mini, device, dtype)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        gradients = []
        for components in (plain, in_dtype(plain, torch.float32 if device.type == "cuda" else torch.float64)):
            score = ScoreDistillation(components, config.guidance, cuda_graphs=False)
            with FlopCounterMode(display=False) as counter:
                gradients.append(picture_gradient(score, side, MINI_TOKENS if case.mini else TOKENS))
            flops = counter.get_total_flops()
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    own, exact = gradients
    return Exact(exact, tolerance(own, exact), flops)


# ----------------------------------------------------------------------------------------------------------------- time


def settle(trainer: Trainer, blocks: int) -> None:
    """Steps until kernels are compiled, graphs captured and buffers fit, read out as a run does now and then."""
    for _ in range(blocks):
        trainer.warm_up(BLOCK)


def time_steps(trainer: Trainer, device: torch.device, blocks: int) -> measure.Timing:
    """Time of a step, ms: of ``blocks`` blocks. Between two of them numbers are read, as a run does now and then."""
    cuda = device.type == "cuda"
    times = []
    for _ in range(blocks):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        if cuda:
            torch.cuda.synchronize()
            marks[0].record()
        started = time.perf_counter()
        for _ in range(BLOCK):
            step = trainer.train_step()
        times.append((time.perf_counter() - started) * 1e3 / BLOCK)
        if cuda:
            marks[1].record()
            torch.cuda.synchronize()
            times[-1] = marks[0].elapsed_time(marks[1]) / BLOCK
        trainer.adapt_capacity(step)
        make_metrics_row(trainer, step)
    return measure.quantiles(times)


class Clock:
    """Where the time of a step goes. Marks inside a CUDA graph become part of it, and are set by each replay."""

    def __init__(self, trainer: Trainer, device: torch.device):
        self.trainer, self.device = trainer, device
        # Made once: several graphs, one a kind of step, set the same events.
        events = device.type == "cuda"
        self.marks = {
            part: torch.cuda.Event(enable_timing=True, external=True) if events else 0.0 for part in ("start", *PARTS)
        }
        trainer.clear_graphs()  # captured again, with the marks
        if trainer.guidance.distillation.graphs is not None:
            trainer.guidance.distillation.graphs.clear()

    def mark(self, part: str) -> None:
        if self.device.type == "cuda":
            self.marks[part].record()
        else:
            self.marks[part] = time.perf_counter()

    def split(self) -> dict[str, float]:
        """Mean over a block, in ms."""
        total = dict.fromkeys(PARTS, 0.0)
        with on_part_end(self.mark):
            self.trainer.train_step()
            for _ in range(BLOCK):
                self.trainer.train_step()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                for before, part in pairwise(("start", *PARTS)):
                    start, end = self.marks[before], self.marks[part]
                    total[part] += start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3
        return {part: round(time / BLOCK, 4) for part, time in total.items()}


def time_modules(components: Components, tokens: int) -> dict[str, float]:
    """ms of the UNet on two rows, and of the VAE's encoder forward and backward on one picture, each alone."""
    device, dtype, size = components.device, components.dtype, components.latent_size
    channels, side = components.latent_channels, components.image_size
    generator = torch.Generator(device).manual_seed(6)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    latents, prompt = drawn(2, channels, size, size), drawn(2, tokens, components.unet.config.cross_attention_dim)
    levels = torch.full((2,), 500, device=device)
    picture, upstream = drawn(1, 3, side, side).requires_grad_(), drawn(1, 2 * channels, size, size)

    @torch.no_grad()
    def unet() -> None:
        components.unet(latents, levels, encoder_hidden_states=prompt, return_dict=False)

    def encoder() -> None:
        moments = components.vae.encode(picture).latent_dist.parameters
        torch.autograd.grad(moments, picture, upstream)

    calls = {"unet": unet, "vae_encoder": encoder}
    return {name: round(measure.time_call(call, device).median, 4) for name, call in calls.items()}


# ----------------------------------------------------------------------------------------------------------------- rows


def release(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        # cuBLAS keeps a workspace for every stream that it was called on, and with it the pool of a graph.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def bound_memory(gib: float | None, device: torch.device) -> None:
    """Let torch reserve no more than this on the device; None: all there is."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib * GIB / total)


def least_bytes(trainer: Trainer) -> int:
    """What a step has to move: the image model's weights once, the optimiser's state there and back."""
    components = trainer.guidance.components
    weights = [p for model in (components.unet, components.vae.encoder) for p in model.parameters()]
    state = [t for t in trainer.optimizer.state_dict().values() if t.numel() > 1]
    return sum(t.nbytes for t in weights) + 2 * sum(t.nbytes for t in state)


def our_row(case: StepCase, device: torch.device, exact: Exact, head: dict[str, Any], blocks: int) -> dict[str, Any]:
    started = time.monotonic()
    trainer = make_trainer(case, device)
    step = trainer.train_step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.monotonic() - started
    settle(trainer, 3 if device.type == "cuda" else 1)
    skipped, overflowed = int(trainer.skipped), int(trainer.overflowed)
    timing = time_steps(trainer, device, blocks)
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
    bound_memory(None, device)  # what looks at the step from here on is no part of it
    lost = int(trainer.skipped) - skipped + int(trainer.overflowed) - overflowed
    if lost:
        print(f"{case.name}: {lost} of the timed steps were not taken", flush=True)
    distillation = trainer.guidance.distillation
    tokens = trainer.guidance.prompts.negative.shape[1]
    found = error(picture_gradient(distillation, trainer.config.camera.h, tokens), exact.gradient)
    step = trainer.train_step()
    row = make_row(case, "triton" if device.type == "cuda" else "torch", trainer, timing, peak, exact, head)
    row |= {"max_err": float(f"{found:.3g}"), "samples": int(step.samples)}
    row |= {"attention": str(distillation.components.attention), "start_s": round(start_s, 1)}
    row["modules_ms"] = time_modules(distillation.components, tokens)
    try:
        row["split_ms"] = Clock(trainer, device).split()
    except RuntimeError as failure:  # events inside a graph ask for a recent driver; the rest of the row is good
        print(f"{case.name}: no split: {str(failure).splitlines()[0]}", flush=True)
    return row


def peer_row(case: StepCase, device: torch.device, exact: Exact, head: dict[str, Any]) -> dict[str, Any]:
    with reference_operators():
        trainer = make_trainer(case, device, plain=True)
        settle(trainer, 1)
        timing = time_steps(trainer, device, 2)
        peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
        row = make_row(case, "reference", trainer, timing, peak, exact, head)
        guidance = trainer.guidance
        row["modules_ms"] = time_modules(guidance.components, guidance.prompts.negative.shape[1])
        row["split_ms"] = Clock(trainer, device).split()
    return row | {"max_err": float(f"{exact.tol / 2:.3g}")}


def make_row(
    case: StepCase,
    impl: str,
    trainer: Trainer,
    timing: measure.Timing,
    peak: int,
    exact: Exact,
    head: dict[str, Any],
) -> dict[str, Any]:
    floor = 1e3 * max(least_bytes(trainer) / head["copy_rate"], exact.flops / head["matmul_rate"])
    return {
        "op": results.STEP,
        "case": case.name,
        "impl": impl,
        "mode": "train",
        "dtype": str(trainer.guidance.components.dtype).removeprefix("torch."),
        "median_ms": round(timing.median, 4),
        "p20_ms": round(timing.p20, 4),
        "p80_ms": round(timing.p80, 4),
        "floor_ms": round(floor, 4),
        "pct_of_floor": round(100 * floor / timing.median, 2),
        "peak_bytes": peak,
        "max_err": 0.0,
        "tol": float(f"{exact.tol:.3g}"),
    }


def line(case: StepCase, row: dict[str, Any]) -> str:
    """A row for a person."""
    ours = row["impl"] != "reference"
    must = [
        f"must {value:g} {unit}" for value, unit in ((case.target_ms, "ms"), (case.target_gib, "GiB")) if ours and value
    ]
    parts, alone = (
        " ".join(f"{part} {time:.2f}" for part, time in row.get(name, {}).items())
        for name in ("split_ms", "modules_ms")
    )
    return (
        f"{row['case']:17} {row['impl']:9} {row['median_ms']:9.3f} ms ({row['p20_ms']:.3f} to {row['p80_ms']:.3f}), "
        f"{1e3 / row['median_ms']:.1f} it/s, {row['peak_bytes'] / GIB:.2f} GiB, floor {row['floor_ms']:.2f} ms, error "
        f"{row['max_err']:.1e} of {row['tol']:.1e}; {parts}; alone {alone}; {', '.join(must)}"
    ).rstrip("; ")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench step", description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="only this case (may be given several times)")
    parser.add_argument("--no-peer", action="store_true", help="without plain diffusers and the references")
    layouts = (
        "modules of Stable Diffusion in channels last (unet, vae, or none), instead of a run's; give --out as well"
    )
    parser.add_argument("--channels_last", nargs="+", choices=("unet", "vae", "none"), help=layouts)
    parser.add_argument("--compiled", nargs="+", choices=COMPILED, help="modules that the compiled cases compile")
    parser.add_argument(
        "--cuda_graph",
        action=argparse.BooleanOptionalAction,
        help="our steps with or without --cuda_graph, instead of a run's choice; give --out as well",
    )
    parser.add_argument("--limit", type=float, help="GiB that our step may reserve; it fails where that is too little")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of 16 steps that are timed")
    parser.add_argument("--out", type=Path, help="file to write (default results/<gpu>.json of the package)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="a CPU has a tiny scene and model")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU on this machine (--device cpu tries the command)", file=sys.stderr)
        return 2
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    head = results.header(device)
    print(json.dumps(head))
    rows, failed = [], []
    exact: dict[tuple[bool, Any], Exact] = {}
    chosen = [case for case in CASES if not args.case or case.name in args.case]
    if args.channels_last:
        chosen = [replace(case, channels_last=tuple(args.channels_last)) for case in chosen]
    if args.compiled:
        chosen = [replace(case, compiled=tuple(args.compiled)) for case in chosen]
    if args.cuda_graph is not None:
        chosen = [replace(case, typed=case.typed | {"cuda_graph": args.cuda_graph}) for case in chosen]
    if device.type == "cpu":
        for case in chosen:
            if case.typed.get("compile"):
                print(f"left out: {case.name}: compiling is for GPUs")
        chosen = [case for case in chosen if not case.typed.get("compile")]
    # Peers come last: what torch and its libraries keep of them would count as memory of ours.
    wanted = [(case, "ours") for case in chosen]
    wanted += [(case, "peer") for case in chosen if case.peer and not args.no_peer]
    for case, impl in wanted:
        release(device)
        bound_memory(None, device)
        picture = (case.mini, case.config(device).guidance)
        if picture not in exact:
            exact[picture] = exact_gradient(case, device)
            release(device)
        try:
            if impl == "ours":
                bound_memory(args.limit, device)
                row = our_row(case, device, exact[picture], head, args.blocks)
            else:
                row = peer_row(case, device, exact[picture], head)
        except Exception as failure:  # the other cases are still worth their time
            failed.append(f"{case.name} {impl}: {type(failure).__name__}: {str(failure).splitlines()[:1]}")
            print(failed[-1], flush=True)
            continue
        print(line(case, row), flush=True)
        rows.append(row)
        if row["max_err"] > row["tol"]:
            failed.append(f"{case.name} {impl}: error {row['max_err']:.3g}, allowed {row['tol']:.3g}")
    release(device)
    for reason in failed:
        print(f"FAILED: {reason}")
    out = args.out or results.RESULTS / results.file_name(head["gpu"])
    measured = {row["case"] for row in rows}
    results.write_steps(out, head, rows, measured.__contains__)
    print(json.dumps({"out": str(out), "rows": len(rows), "failed": len(failed)}))
    return int(bool(failed))
