"""What every guidance is: a call that turns rendered images into a loss, and its result."""

from typing import NamedTuple

from torch import Tensor


class Guidance:
    """A guidance by a prompt: the trainer tells it the step besides, for its schedules.

    Without ``takes_latents`` it can only be shown pictures.
    """

    takes_latents = True


class GuidanceResult(NamedTuple):
    """``loss`` scalar 1/2 |g|^2 / B, differentiable in the picture; ``t`` [B] int64; ``grad_norm`` scalar |g|, not
    finite when the gradient is not; ``gradient`` g [B, C, h, w] of the latents, before the division by B.

    To be looked at, where there are latents: ``noisy`` x_t and ``clean`` = (x_t - sqrt(1 - a_t) eps_hat) / sqrt(a_t),
    the model's estimate of what it is without noise, each [B, C, h, w]. ``losses``: of several guidances each one's."""

    loss: Tensor
    t: Tensor
    grad_norm: Tensor
    gradient: Tensor
    noisy: Tensor | None = None
    clean: Tensor | None = None
    losses: dict[str, Tensor] | None = None
