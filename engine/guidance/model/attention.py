"""Operators for the attention of the image model: choosing one, and setting it in diffusers' modules.

    sdpa      torch's scaled_dot_product_attention; torch picks the kernel
    cudnn     the same, restricted to cuDNN's kernels
    xformers  xformers' memory_efficient_attention in the model's own dtype (diffusers' own switch first tries it in
              fp32, and so refuses builds of which only the fp16 operators load)
    matmul    three matrix products and a softmax: for heads too wide for the fast kernels of the others, as in the VAE

All compute softmax(q k^T / sqrt(D)) v for q [B, M, H, D] and k, v [B, N, H, D], and return [B, M, H, D].
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.runtime.cuda_graph import warm_up

logger = logging.getLogger(__name__)

KINDS = ("sdpa", "xformers", "cudnn")  # what --attention names
VAE_KINDS = (*KINDS, "matmul")
# Below this many FLOPs a pass nothing is measured: dream-mini has 0.3 GFLOP of attention, and building cuDNN's plans
# for its shapes takes longer than a run can gain.
MIN_MEASURED_FLOPS = 5e9
# Errors of an operator that does not support these inputs on this machine.
FAILURES = (ImportError, NotImplementedError, RuntimeError, ValueError, OSError)


class AttentionChoice(NamedTuple):
    """The operator of the UNet and that of the VAE's encoder."""

    unet: str
    vae: str

    def __str__(self) -> str:
        return self.unet if self.unet == self.vae else f"{self.unet}, in the VAE {self.vae}"


class Shape(NamedTuple):
    """Sizes of one call: q [rows, queries, heads, width], k and v [rows, keys, heads, width]."""

    rows: int
    queries: int
    keys: int
    heads: int
    width: int


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def _matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads = q.shape[0], q.shape[2]
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B H, tokens, D]
    return _MatmulAttention.apply(*rows).unflatten(0, (batch, heads)).transpose(1, 2)


class _MatmulAttention(torch.autograd.Function):
    """Attention over q [B, M, D], k and v [B, N, D] that saves its weights [B, M, N] in the inputs' dtype.

    Scores, their softmax and their gradient are fp32 where the inputs are half: in fp16 most of a gradient of scores
    would be below the smallest normal number.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = _wide_product(q, k.transpose(1, 2)).mul_(1 / math.sqrt(q.shape[-1]))
        weights = torch.softmax(scores, dim=-1).to(v.dtype)
        del scores
        out = torch.bmm(weights, v)
        ctx.save_for_backward(q, k, v, weights, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, weights, out = ctx.saved_tensors
        scores_grad = _wide_product(upstream, v.transpose(1, 2))
        wide = scores_grad.dtype
        scores_grad.sub_((upstream.to(wide) * out).sum(-1, keepdim=True)).mul_(weights)
        scores_grad.mul_(1 / math.sqrt(q.shape[-1]))
        q_grad = torch.bmm(scores_grad, k.to(wide)).to(q.dtype)
        k_grad = torch.bmm(scores_grad.transpose(1, 2), q.to(wide)).to(k.dtype)
        return q_grad, k_grad, torch.bmm(weights.transpose(1, 2), upstream)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Product of a [B, M, D] and b [B, D, N], in fp32 if they are half."""
    if a.dtype not in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


OPERATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": _sdpa,
    "cudnn": _cudnn,
    "xformers": _xformers,
    "matmul": _matmul,
}


class Processor:
    """Processor for diffusers' Attention: its AttnProcessor2_0 around `attend`, without masks."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]):
        self.attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from `hidden_states` [B, M, C] or [B, C, H, W] to `encoder_hidden_states` [B, N, D], or to themselves.

        Raises ValueError: when there is a mask.
        """
        if attention_mask is not None:
            raise ValueError("attention_mask is not None: the guidance attends to all tokens")
        x, spatial = hidden_states, hidden_states.ndim == 4
        if attn.group_norm is not None:
            x = attn.group_norm(x) if spatial else attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if spatial:
            x = x.flatten(2).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            project(rows).unflatten(-1, (attn.heads, -1))
            for project, rows in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
        )
        out = self.attend(q, k, v).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        if spatial:
            out = out.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        if attn.residual_connection:
            out = hidden_states + out  # in this order the sum has the memory layout of hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def set_attention(model: torch.nn.Module, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Set `attend` in every attention of `model`, except those with parts that `Processor` does not support."""
    for attn in _attentions(model):
        attn.set_processor(Processor(attend))


def _attentions(model: torch.nn.Module) -> list[Any]:
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    unsupported = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    return [
        module
        for module in model.modules()
        if isinstance(module, Attention)
        and type(module.processor) in (AttnProcessor2_0, Processor)
        and not any(getattr(module, part, None) for part in unsupported)
    ]


@torch.no_grad()
def unet_shapes(unet: Any, rows: int, size: int, tokens: int) -> Counter[Shape]:
    """Count the attention calls of one pass of `unet` over `rows` latents of `size`^2 and prompts of `tokens`.

    Afterwards the processors of `set_attention` remain, with sdpa.
    """
    counts: Counter[Shape] = Counter()

    def count(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        counts[Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3])] += 1
        return q

    set_attention(unet, count)
    like = next(unet.parameters())
    latents = torch.zeros(rows, unet.config.in_channels, size, size, device=like.device, dtype=like.dtype)
    prompt = torch.zeros(rows, tokens, unet.config.cross_attention_dim, device=like.device, dtype=like.dtype)
    unet(latents, torch.zeros(rows, device=like.device), encoder_hidden_states=prompt)
    set_attention(unet, _sdpa)
    return counts


def encoder_shapes(encoder: torch.nn.Module, rows: int, size: int) -> Counter[Shape]:
    """Count the attention calls of the VAE's `encoder`, all of which are in its middle, at the size of the latents."""
    return Counter(
        Shape(rows, size * size, size * size, attn.heads, attn.to_q.out_features // attn.heads)
        for attn in _attentions(encoder)
    )


def choose_attention(
    kind: str, previous: AttentionChoice | None, unet: Any, encoder: torch.nn.Module, size: int, tokens: int
) -> AttentionChoice:
    """Choose the operators of `unet` and of the VAE's `encoder`, and set them.

    `kind` is one of KINDS or "auto"; latents are `size`^2, prompts `tokens` long. "auto" takes the `previous` choice of
    a resumed run; else, on a GPU, the fastest that works, measured on the model's own shapes (two rows in the UNet,
    forward and backward of one image in the encoder) as a CUDA graph. The encoder follows a named choice that supports
    its width.

    Raises UserError: when a named or previous operator does not work here.
    """
    like = next(unet.parameters())
    device, dtype = like.device, like.dtype

    def in_unet() -> Counter[Shape]:
        return unet_shapes(unet, 2, size, tokens)

    def in_encoder() -> Counter[Shape]:
        return encoder_shapes(encoder, 1, size)

    if kind == "auto" and previous is None:
        choice = AttentionChoice("sdpa", "sdpa")
        if device.type == "cuda":
            choice = AttentionChoice(
                fastest(KINDS, in_unet(), device, dtype, gradient=False),
                fastest(VAE_KINDS, in_encoder(), device, dtype, gradient=True),
            )
    else:
        choice = previous if kind == "auto" and previous else AttentionChoice(kind, kind)
        if choice.unet != "sdpa" and (
            reason := unsupported_reason(choice.unet, in_unet(), device, dtype, gradient=False)
        ):
            earlier = ", which this run has used so far," if kind == "auto" else ""
            raise UserError(
                f"--attention {choice.unet}{earlier} does not work here, on {device.type} in "
                f"{str(dtype).removeprefix('torch.')} ({reason}); --attention sdpa always does"
            )
        if choice.vae != "sdpa" and unsupported_reason(choice.vae, in_encoder(), device, dtype, gradient=True):
            choice = choice._replace(vae="sdpa")
    set_attention(unet, OPERATORS[choice.unet])
    set_attention(encoder, OPERATORS[choice.vae])
    return choice


def unsupported_reason(
    kind: str, shapes: Counter[Shape], device: torch.device, dtype: torch.dtype, *, gradient: bool
) -> str | None:
    """Return None where `kind` computes all of `shapes`, else the first line of its error."""
    try:
        run_shapes(kind, shapes, device, dtype, gradient)
    except FAILURES as error:
        return first_line(error)
    return None


def run_shapes(
    kind: str, shapes: Counter[Shape], device: torch.device, dtype: torch.dtype, gradient: bool
) -> Callable[[], None]:
    """Compute `kind` once at every shape; returns a function that computes each of `shapes` as often as counted."""
    attend = OPERATORS[kind]
    generator = torch.Generator(device).manual_seed(0)
    inputs = {}
    for shape in shapes:
        sizes = [(shape.rows, tokens, shape.heads, shape.width) for tokens in (shape.queries, shape.keys, shape.keys)]
        drawn = [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]
        inputs[shape] = [x.requires_grad_(gradient) for x in drawn]

    def compute(counts: Counter[Shape]) -> None:
        for shape, count in counts.items():
            for _ in range(count):
                with torch.set_grad_enabled(gradient):
                    out = attend(*inputs[shape])
                if gradient:
                    torch.autograd.grad(out, inputs[shape], out)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once for each of its kernels that does not take a shape
        compute(Counter(dict.fromkeys(shapes, 1)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return lambda: compute(shapes)


def fastest(
    kinds: tuple[str, ...], shapes: Counter[Shape], device: torch.device, dtype: torch.dtype, *, gradient: bool
) -> str:
    """Return the kind that computes `shapes` fastest as a CUDA graph, of those that work; sdpa for little work."""
    if (
        sum(4 * s.rows * s.heads * s.queries * s.keys * s.width * count for s, count in shapes.items())
        < MIN_MEASURED_FLOPS
    ):
        return "sdpa"
    times = {}
    for kind in kinds:
        try:
            times[kind] = _graph_ms(run_shapes(kind, shapes, device, dtype, gradient), device)
        except FAILURES as error:
            logger.info("attention %s is not available: %s", kind, first_line(error))
    torch.cuda.empty_cache()
    logger.info("attention, ms: %s", ", ".join(f"{kind} {time:.3f}" for kind, time in times.items()))
    return min(times, key=times.__getitem__, default="sdpa")


def _graph_ms(call: Callable[[], None], device: torch.device, repeats: int = 5) -> float:
    """Least time of a replay of `call` as a CUDA graph, in ms."""
    with torch.cuda.device(device):
        warm_up(call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
    return min(before.elapsed_time(after) for before, after in pairwise(marks))
