"""Operators of the image model: group normalisation with SiLU, and the end of a residual block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dream_fast import kernels
from dream_fast.bench.ops.inputs import GROUPS, nbytes, normal
from dream_fast.bench.ops.spec import FORWARD, AotCase, Case, OpSpec, Problem, backpropagate

NORMS = tuple(
    f"{size}{memory}"
    for size in ("vae_512x512x128", "vae_256x256x256", "vae_128x128x512", "vae_64x64x512")
    + ("unet_64x64x320", "unet_64x64x960", "unet_32x32x640", "unet_16x16x1280", "unet_8x8x2560")
    for memory in ("", "_channels_last")
)
LARGEST = ("vae_512x512x128", "vae_512x512x128_channels_last")
UNET = ("unet_64x64x320", "unet_64x64x320_channels_last")
QUICK = (*LARGEST, "vae_64x64x512", "vae_64x64x512_channels_last")


def group_norm_silu(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    part, size, *memory = case.case.split("_", 2)
    if part not in ("vae", "unet") or memory not in ([], ["channels_last"]):
        raise ValueError(f"the case must be vae_HxWxC or unet_HxWxC, with or without _channels_last, got {case.case}")
    height, width, channels = map(int, size.split("x"))
    order = torch.channels_last if memory else torch.contiguous_format
    shape, dtype = (1 if part == "vae" else 2, channels, height, width), case.compute_dtype
    tensors = {
        "x": (0.5 + normal(*shape, device=device, seed=41)).to(dtype, memory_format=order),
        "weight": (1 + 0.2 * normal(channels, device=device, seed=42)).to(dtype),
        "bias": 0.2 * normal(channels, device=device, seed=43, dtype=dtype),
    }
    upstream = normal(*shape, device=device, seed=44).to(dtype, memory_format=order)
    return Problem(
        call=lambda op, tensors, dtype: (op(tensors["x"], GROUPS, tensors["weight"], tensors["bias"]),),
        tensors=tensors,
        leaves=("x",),
        upstream=(upstream,),
        # Read x, write y; backward: read x and the gradient of y, write that of x.
        least_bytes=nbytes(*tensors.values()) + nbytes(upstream) * (4 if case.mode == "forward_backward" else 1),
    )


def bias_residual(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    norm = group_norm_silu(case, device, count_bytes)
    x, bias = norm.tensors["x"], norm.tensors["bias"]
    residual = torch.empty_like(x).copy_(normal(*x.shape, device=device, seed=45))
    return Problem(
        call=lambda op, tensors, dtype: (op(tensors["x"], tensors["bias"], tensors["residual"]),),
        tensors={"x": x, "bias": bias, "residual": residual},
        leaves=("x", "residual"),
        upstream=norm.upstream,
        # The gradients of x and residual are the one that comes.
        least_bytes=nbytes(x, bias, residual) + nbytes(x),
    )


def prepare_norm(
    shape: tuple[int, ...], dtype: torch.dtype, *, last: bool = False, silu: bool = True, added: bool = False
) -> Callable[[], object]:
    """Gradients into x, weight and bias, or with `added` into x alone, as in a frozen model; last: channels_last."""
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.zeros(shape, dtype=dtype).to(memory_format=order).requires_grad_()
    weight, bias = (torch.zeros(shape[1], dtype=dtype, requires_grad=not added) for _ in range(2))
    more = torch.zeros(shape[:2], dtype=dtype) if added else None
    return lambda: backpropagate(kernels.group_norm_silu(x, GROUPS, weight, bias, silu=silu, added=more))


SPECS = (
    OpSpec(
        name="group_norm_silu",
        inputs=group_norm_silu,
        dtype="float16",
        full=NORMS,
        small=("vae_16x16x64", "unet_8x8x64_channels_last"),
        tiny=("vae_8x8x32",),
        quick=QUICK,
        peers=(*QUICK, *UNET),
        capturable=True,
        aot={
            # Groups of many programs (where channels are last merged by a kernel of their own), of some, of one each.
            **{
                f"group_norm_silu/{case}": AotCase(case, "float16")
                for case in (*LARGEST, UNET[1], "unet_16x16x1280_channels_last")
            },
            "group_norm_silu/weights_float32": partial(prepare_norm, (1, 128, 512, 512), torch.float32),
            "group_norm_silu/weights_bfloat16": partial(
                prepare_norm, (2, 640, 32, 32), torch.bfloat16, last=True, silu=False
            ),
            "group_norm_silu/weights_small": partial(prepare_norm, (2, 640, 16, 16), torch.float16, silu=False),
            "group_norm_silu/added": partial(prepare_norm, (1, 128, 512, 512), torch.float16, last=True, added=True),
        },
    ),
    OpSpec(
        name="bias_residual",
        inputs=bias_residual,
        dtype="float16",
        modes=FORWARD,
        full=(*LARGEST, *UNET),
        small=("vae_16x16x64",),
        tiny=("vae_8x8x32",),
        quick=LARGEST,
        peers=(*LARGEST, *UNET),
        capturable=True,
        aot={
            "bias_residual/vae": AotCase(LARGEST[0], "float16", "forward"),
            "bias_residual/unet": AotCase(UNET[1], "float16", "forward"),
        },
    ),
)
