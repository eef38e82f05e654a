"""The optimiser."""

from __future__ import annotations

import torch

from dream_fast.bench.ops.inputs import normal
from dream_fast.bench.ops.spec import FORWARD, AotCase, Case, OpSpec, Problem, Target
from dream_fast.kernels import AdanState


def adan(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    size = round(float(case.case.removesuffix("M")) * 1e6)
    names = ("params", "grads", "exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad", "ema")
    tensors = {name: 0.01 * normal(size, device=device, seed=31 + i) for i, name in enumerate(names)}
    # Far enough from zero that the step does not divide by rounding errors.
    tensors["exp_avg_sq"].square_().add_(1e-4)
    tensors["step"] = torch.full((), 10.0, device=device)
    # The table learns ten times as fast as the MLP, which comes last.
    ends = (max(size - 6500, size // 2), size)

    def call(op, tensors, dtype):
        state = AdanState(**{name: tensors[name] for name in (*names[2:], "step")})
        # max_grad_norm as in a run: with 12.2 M random gradients the clip is at work.
        skipped = op(tensors["params"], tensors["grads"], state, group_ends=ends, lrs=(5e-2, 5e-3))
        return (*(tensors[name] for name in names if name != "grads"), skipped)

    return Problem(
        call=call,
        tensors=tensors,
        mutates=True,
        # The norm needs the gradient of every parameter before the first update: it is read twice.
        least_bytes=size * 4 * (1 + 7 + 6),
    )


SPECS = (
    OpSpec(
        name="adan",
        public="adan_step",
        inputs=adan,
        modes=FORWARD,
        full=("12.2M",),
        small=("0.1M",),
        tiny=("0.0001M",),
        quick=("12.2M",),
        peers=("12.2M",),
        targets={("12.2M", "forward"): Target(None, 0.35, 0.23)},
        aot={"adan/float32": AotCase("12.2M", "float32", "forward")},
    ),
)
