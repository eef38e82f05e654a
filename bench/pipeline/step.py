"""A whole step of the optimisation, as the trainer takes it. `python -m dream_fast.bench step`.

Workload `sds_step`: Stable Diffusion 2.1-base's architecture with random weights, fp16, batch 1, a 64 x 64 render of a
ball with about 490,000 samples, lambertian shading with normals, render -> 512^2 -> VAE encoder and back, UNet with
guidance, regularisers, Adan, an update of the occupancy grid every 16 steps. The learning rate is next to nothing, so
that the scene stays. `dream_mini` is the embedded model's own run at 64 x 64 pixels.

| field | content |
|---|---|
| median_ms | a 16th of 16 steps; between two such blocks numbers are read, as in a run |
| peak_bytes | all memory that torch has reserved, weights and CUDA graphs included |
| split_ms | parts of other steps, with a wait between steps; they include the host's delays |
| modules_ms | the UNet (two rows) and the VAE's encoder (forward and backward, one image), each alone |
| max_err | error of the gradient in the image against plain diffusers in fp32 |
| tol | twice the error of plain diffusers in the model's own dtype |
| impl: reference | the step on plain diffusers, without CUDA graphs, and on the operators' PyTorch references |
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dream_fast.bench import measure, results
from dream_fast.bench.accuracy import error, tolerance
from dream_fast.bench.pipeline.random_sd import TOKENS, in_dtype
from dream_fast.bench.pipeline.step_cases import (
    CASES,
    MINI_TOKENS,
    StepCase,
    make_trainer,
    plain_components,
    reference_operators,
)
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.diffusion import DiffusionGuidance
from dream_fast.engine.guidance.model.components import COMPILED, Components
from dream_fast.engine.guidance.sds import ScoreDistillation
from dream_fast.engine.runtime.device import choose_runtime
from dream_fast.engine.runtime.step_parts import PARTS, on_part_end
from dream_fast.engine.training.loop import make_metrics_row
from dream_fast.engine.training.trainer import Trainer

BLOCK = 16  # steps, one of which updates the occupancy grid
GIB = 1 << 30


class Exact(NamedTuple):
    """The gradient in an image by plain diffusers in fp32 (fp64 on a CPU), and the tolerance that follows from it."""

    gradient: Tensor
    tol: float
    flops: int  # of the UNet and the encoder, forward and backward, in matrix products and convolutions


def guidance_of(trainer: Trainer) -> DiffusionGuidance:
    """The guidance of a trainer that `make_trainer` made."""
    return cast(DiffusionGuidance, trainer.guidance)


def components_of(guidance: DiffusionGuidance | ScoreDistillation) -> Components:
    """The image model of a guidance that `make_trainer` made."""
    return cast(Components, guidance.components)


def token_count(guidance: DiffusionGuidance) -> int:
    """Number of tokens in its prompts."""
    return cast(Tensor, guidance.prompts.negative).shape[1]


def image_gradient(distillation: ScoreDistillation, side: int, tokens: int) -> Tensor:
    """The gradient [1, 3, side, side] in one image; image, prompt, timestep and noise are the same for every model."""
    components, device = components_of(distillation), distillation.components.device
    generator = torch.Generator(device).manual_seed(5)
    image = torch.rand(1, 3, side, side, generator=generator, device=device).requires_grad_()
    # As long as the prompts of the steps, so that no second CUDA graph is made.
    shape = (2, 1, tokens, components.unet.config.cross_attention_dim)
    cond, uncond = torch.randn(shape, generator=generator, device=device).half().to(components.dtype)
    distillation(image, cond, uncond, StepInputs(generator=generator)).loss.backward()
    assert image.grad is not None
    return image.grad.double().cpu()


def exact_gradient(case: StepCase, device: torch.device) -> Exact:
    """The truth for `max_err` of a case, and its tolerance; both with TF32 off."""
    config = case.config(device)
    dtype = choose_runtime(config).dtype
    side = config.camera.h
    plain = plain_components(case.mini, device, dtype)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        gradients = []
        for components in (plain, in_dtype(plain, torch.float32 if device.type == "cuda" else torch.float64)):
            distillation = ScoreDistillation(components, config.guidance, cuda_graphs=False)
            with FlopCounterMode(display=False) as counter:
                gradients.append(image_gradient(distillation, side, MINI_TOKENS if case.mini else TOKENS))
            flops = counter.get_total_flops()
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    plain_gradient, exact = gradients
    return Exact(exact, tolerance(plain_gradient, exact), flops)


def time_steps(trainer: Trainer, device: torch.device, blocks: int) -> measure.Timing:
    """Time of a step in ms, from `blocks` blocks; between two of them numbers are read, as in a run."""
    last: list[Any] = [None]

    def take_block() -> None:
        for _ in range(BLOCK):
            last[0] = trainer.train_step()

    times = []
    for _ in range(blocks):
        times.append(measure.time_once(take_block, device) / BLOCK)
        trainer.adapt_capacity(last[0])
        make_metrics_row(trainer, last[0])
    return measure.quantiles(times)


def split_step(trainer: Trainer, device: torch.device) -> dict[str, float]:
    """Time of each part of a step in ms, the mean over a block."""
    clock = measure.PartClock("start", PARTS, device)
    for graphs in (trainer.graphs, guidance_of(trainer).distillation.graphs):
        if graphs is not None:
            graphs.clear()  # captured again, with the marks
    total = dict.fromkeys(PARTS, 0.0)
    with on_part_end(clock.mark):
        trainer.train_step()
        for _ in range(BLOCK):
            trainer.train_step()
            for part, milliseconds in clock.read().items():
                total[part] += milliseconds
    return {part: round(milliseconds / BLOCK, 4) for part, milliseconds in total.items()}


def time_modules(components: Components, tokens: int) -> dict[str, float]:
    """Time in ms of the UNet on two rows, and of the VAE's encoder forward and backward on one image, each alone."""
    device, dtype, size = components.device, components.dtype, components.latent_size
    channels, side = components.latent_channels, components.image_size
    generator = torch.Generator(device).manual_seed(6)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    latents, prompt = draw(2, channels, size, size), draw(2, tokens, components.unet.config.cross_attention_dim)
    timesteps = torch.full((2,), 500, device=device)
    image, upstream = draw(1, 3, side, side).requires_grad_(), draw(1, 2 * channels, size, size)

    @torch.no_grad()
    def unet() -> None:
        components.unet(latents, timesteps, encoder_hidden_states=prompt, return_dict=False)

    def encoder() -> None:
        moments = components.vae.encode(image).latent_dist.parameters
        torch.autograd.grad(moments, image, upstream)

    calls = {"unet": unet, "vae_encoder": encoder}
    return {name: round(measure.time_call(call, device).median, 4) for name, call in calls.items()}


def release(device: torch.device) -> None:
    """Free the memory that earlier cases have left behind."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        # cuBLAS keeps a workspace for every stream that it was called on, and with it the pool of a graph.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def bound_memory(gib: float | None, device: torch.device) -> None:
    """Let torch reserve at most this on the device; None: everything."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib * GIB / total)


def least_bytes(trainer: Trainer) -> int:
    """Compulsory traffic of a step in bytes: the image model's weights once, the optimiser's state read and written."""
    components = components_of(guidance_of(trainer))
    weights = [p for model in (components.unet, components.vae.encoder) for p in model.parameters()]
    state = [t for t in trainer.optimizer.state_dict().values() if t.numel() > 1]
    return sum(t.nbytes for t in weights) + 2 * sum(t.nbytes for t in state)


def our_row(case: StepCase, device: torch.device, exact: Exact, head: dict[str, Any], blocks: int) -> dict[str, Any]:
    """The row of a run's own step."""
    started = time.monotonic()
    trainer = make_trainer(case, device)
    step = trainer.train_step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.monotonic() - started
    for _ in range(3 if device.type == "cuda" else 1):
        trainer.warm_up(BLOCK)
    skipped, overflowed = int(trainer.skipped), int(trainer.overflowed)
    timing = time_steps(trainer, device, blocks)
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
    bound_memory(None, device)  # the measurements from here on are no part of the step
    lost = int(trainer.skipped) - skipped + int(trainer.overflowed) - overflowed
    if lost:
        print(f"{case.name}: {lost} of the timed steps were skipped", flush=True)
    distillation = guidance_of(trainer).distillation
    components, tokens = components_of(distillation), token_count(guidance_of(trainer))
    gradient_error = error(image_gradient(distillation, trainer.config.camera.h, tokens), exact.gradient)
    step = trainer.train_step()
    row = make_row(case, "triton" if device.type == "cuda" else "torch", trainer, timing, peak, exact, head)
    row |= {"max_err": float(f"{gradient_error:.3g}"), "samples": int(step.samples)}
    row |= {"attention": str(components.attention), "start_s": round(start_s, 1)}
    row["modules_ms"] = time_modules(components, tokens)
    try:
        row["split_ms"] = split_step(trainer, device)
    except RuntimeError as failure:  # events inside a graph need a recent driver; the rest of the row is good
        print(f"{case.name}: no split: {str(failure).splitlines()[0]}", flush=True)
    return row


def peer_row(case: StepCase, device: torch.device, exact: Exact, head: dict[str, Any]) -> dict[str, Any]:
    """The row of the same step on plain diffusers and the operators' references."""
    with reference_operators():
        trainer = make_trainer(case, device, plain=True)
        trainer.warm_up(BLOCK)
        timing = time_steps(trainer, device, 2)
        peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
        row = make_row(case, "reference", trainer, timing, peak, exact, head)
        guidance = guidance_of(trainer)
        row["modules_ms"] = time_modules(components_of(guidance), token_count(guidance))
        row["split_ms"] = split_step(trainer, device)
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
        "dtype": str(guidance_of(trainer).components.dtype).removeprefix("torch."),
        "median_ms": round(timing.median, 4),
        "p20_ms": round(timing.p20, 4),
        "p80_ms": round(timing.p80, 4),
        "floor_ms": round(floor, 4),
        "pct_of_floor": round(100 * floor / timing.median, 2),
        "peak_bytes": peak,
        "max_err": 0.0,
        "tol": float(f"{exact.tol:.3g}"),
    }


def format_row(case: StepCase, row: dict[str, Any]) -> str:
    """A row for the terminal."""
    pairs = ((case.target_ms, "ms"), (case.target_gib, "GiB")) if row["impl"] != "reference" else ()
    targets = [f"target {value:g} {unit}" for value, unit in pairs if value]
    parts, alone = (
        " ".join(f"{part} {milliseconds:.2f}" for part, milliseconds in row.get(name, {}).items())
        for name in ("split_ms", "modules_ms")
    )
    return (
        f"{row['case']:17} {row['impl']:9} {row['median_ms']:9.3f} ms ({row['p20_ms']:.3f} to {row['p80_ms']:.3f}), "
        f"{1e3 / row['median_ms']:.1f} it/s, {row['peak_bytes'] / GIB:.2f} GiB, floor {row['floor_ms']:.2f} ms, error "
        f"{row['max_err']:.1e} of {row['tol']:.1e}; {parts}; alone {alone}; {', '.join(targets)}"
    ).rstrip("; ")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench step", description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="only this case (may be given several times)")
    parser.add_argument("--no_peer", "--no-peer", action="store_true", help="skip plain diffusers and the references")
    layouts = "modules of Stable Diffusion in channels last, instead of a run's choice; give --out as well"
    parser.add_argument("--channels_last", "--channels-last", nargs="+", choices=("unet", "vae", "none"), help=layouts)
    parser.add_argument("--compiled", nargs="+", choices=COMPILED, help="modules that the compiled cases compile")
    parser.add_argument(
        "--cuda_graph",
        "--cuda-graph",
        "--step_graph",
        action=argparse.BooleanOptionalAction,
        help="time our steps with or without --cuda_graph, instead of a run's choice; give --out as well",
    )
    parser.add_argument("--limit", type=float, help="GiB that our step may reserve; it fails where that is too little")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of 16 steps that are timed")
    parser.add_argument("--out", type=Path, help="file to write (default results/<gpu>.json of the package)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="a CPU has a tiny scene and model")
    return parser


def choose_cases(args: argparse.Namespace) -> list[StepCase]:
    """The cases that the arguments name, changed as they say; on a CPU without those that compile."""
    cases = [case for case in CASES if not args.case or case.name in args.case]
    if args.channels_last:
        cases = [replace(case, channels_last=tuple(args.channels_last)) for case in cases]
    if args.compiled:
        cases = [replace(case, compiled=tuple(args.compiled)) for case in cases]
    if args.cuda_graph is not None:
        cases = [replace(case, flags=case.flags | {"cuda_graph": args.cuda_graph}) for case in cases]
    if args.device == "cpu":
        for case in cases:
            if case.flags.get("compile"):
                print(f"left out: {case.name}: compiling is for GPUs")
        cases = [case for case in cases if not case.flags.get("compile")]
    return cases


def measure_cases(
    cases: list[StepCase], device: torch.device, head: dict[str, Any], args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the cases, and what failed, one sentence each."""
    rows, failures = [], []
    exact: dict[tuple[bool, Any], Exact] = {}
    # Peers come last: what torch and its libraries keep of them would count as memory of ours.
    jobs = [(case, "ours") for case in cases]
    jobs += [(case, "peer") for case in cases if case.peer and not args.no_peer]
    for case, impl in jobs:
        release(device)
        bound_memory(None, device)
        key = (case.mini, case.config(device).guidance)
        if key not in exact:
            exact[key] = exact_gradient(case, device)
            release(device)
        try:
            if impl == "ours":
                bound_memory(args.limit, device)
                row = our_row(case, device, exact[key], head, args.blocks)
            else:
                row = peer_row(case, device, exact[key], head)
        except Exception as failure:  # the other cases are still worth their time
            failures.append(f"{case.name} {impl}: {type(failure).__name__}: {str(failure).splitlines()[:1]}")
            print(failures[-1], flush=True)
            continue
        print(format_row(case, row), flush=True)
        rows.append(row)
        if row["max_err"] > row["tol"]:
            failures.append(f"{case.name} {impl}: error {row['max_err']:.3g}, allowed {row['tol']:.3g}")
    release(device)
    return rows, failures


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU on this machine (--device cpu tries the command)", file=sys.stderr)
        return 2
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    head = results.header(device)
    print(json.dumps(head))
    rows, failures = measure_cases(choose_cases(args), device, head, args)
    for reason in failures:
        print(f"FAILED: {reason}")
    out = args.out or results.RESULTS / results.file_name(head["gpu"])
    measured = {row["case"] for row in rows}
    results.write_steps(out, head, rows, measured.__contains__)
    print(json.dumps({"out": str(out), "rows": len(rows), "failed": len(failures)}))
    return int(bool(failures))
