"""Score distillation: the gradient that an image model gives to a picture of the scene.

With z = (vae(x) - shift) * scale the latent of a rendered picture x, a noise level t and noise n, the model sees
x_t = sqrt(a_t) z + sqrt(1 - a_t) n, and the gradient of the latent is

    g = lambda_guidance * w(t) * (eps_hat(x_t, t) - e),    w(t) = 1 - a_t,
    eps_hat = eps_uncond + s (eps_cond - eps_uncond)

It is carried back through the VAE's encoder and the resize to the picture, and never through the UNet (DreamFusion,
Poole et al. 2022, equation 3; Latent-NeRF, Metzer et al. 2022, for latents). `prediction` says how eps_hat comes about.
Scores differ in e, what is taken from it, and in the noise:

    sds   e = n, n is random                       Score Distillation Sampling, Poole et al. 2022
    csd   e = eps_uncond(x_t, t), n is random      Classifier Score Distillation, Yu et al. 2023: g without n
    asd   e = eps_cond(x_t', t'), n is random      Asynchronous Score Distillation, Ma et al. 2024
    sdi   e = n, n is z inverted by the model      Score Distillation via Inversion, Lukoianov et al. 2024

so in a eps_cond + b eps_neg + c eps_uncond + d n sds has s, 0, 1 - s, -1 and csd s, 0, -s, 0. A negative prompt stands
in for the empty one, so that with one csd is s, -s, 0, 0: the paper's weights w1 = w2 = s. In asd t' lies a tenth of
its distance from the lower end of t_range above t, and n is that of x_t. In sdi the inversion is guided with -s
(`inversion`).

With --loss_space x0 the gradient is that of 1/2 |z - stopgrad(z0_hat)|^2 instead, z0_hat being the clean latent that
the guided prediction stands for, rescaled as --guidance_rescale says (MVDream, Shi et al. 2023; Lin et al. 2023):
g = lambda_guidance (z - z0_hat), which is sqrt((1 - a_t) / a_t) (eps_hat - n) in place of (1 - a_t) (eps_hat - n).

At last g may be clamped to [-c, c], each element by itself (--clip_grad_latent).

For a model that works on pixels (IF) z is the picture itself, resized and in [-1, 1].

Arithmetic on latents is fp32 whatever the model's dtype. Nothing here waits for the device.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dream_fast.engine.config.schedule import LinearSchedule, largest, value_at, values_at
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.guidance.base import GuidanceResult
from dream_fast.engine.guidance.cfg import apply_cfg, eps_and_x0, predict, sqrt_alphas
from dream_fast.engine.guidance.ddim import inverted_noise
from dream_fast.engine.guidance.model.components import Components
from dream_fast.engine.guidance.perp_neg import Negatives
from dream_fast.engine.runtime.cuda_graph import GraphedFunction

# Half the width of the window that an annealed t is drawn from, in fractions of the whole range.
ANNEAL_JITTER = 0.05
# asd compares with a level that is higher by one in so many levels: the authors' plus_ratio of 0.1.
ASYNCHRONY = 10


class Settled(NamedTuple):
    """What else would depend on numbers of the host: noise levels ``t`` [B], and scalars by name
    (:meth:`ScoreDistillation.numbers`)."""

    t: Tensor
    numbers: dict[str, Tensor]


class ScoreDistillation:
    """Guides pictures by ``components`` as ``config`` says.

    ``method`` "sds" computes the picture's gradient on the spot and injects it by a custom autograd function, so the
    encoder's graph lives no longer than this call and a loss scale never enters fp16 activations; "mse" is the same
    gradient as the derivative of 1/2 |z - stopgrad(z - g)|^2 / B, through a graph that lives until ``backward``.
    On a GPU "sds" replays the encoder, forward and backward, and the UNet as one CUDA graph a picture size, unless
    ``cuda_graphs`` is False.
    """

    def __init__(
        self,
        components: Components,
        config: GuidanceConfig,
        *,
        method: Literal["sds", "mse"] = "sds",
        cuda_graphs: bool = True,
    ) -> None:
        if method not in ("sds", "mse"):
            raise ValueError(f"method must be 'sds' or 'mse', not {method!r}")
        self.components = components
        self.config = config
        self.method = method
        self.annealed = _annealed(config)
        graphed = cuda_graphs and components.device.type == "cuda"
        self.mark: Callable[[str], None] = lambda part: None  # called inside the graph when it is captured
        self._score_of = GraphedFunction(self._score) if graphed else self._score

    def __call__(
        self,
        rgb: Tensor,
        cond: Tensor,
        uncond: Tensor,
        *,
        progress: float = 0.0,
        step: int = 0,
        generator: torch.Generator | None = None,
        latents: bool = False,
        settled: Settled | None = None,
        negatives: Negatives | None = None,
    ) -> GuidanceResult:
        """Guide ``rgb`` [B, 3, H, W] in [0, 1] towards ``cond`` [B, T, D] and away from ``uncond`` [B, T, D].

        ``progress`` is the fraction of the run that is done before ``step``: schedules read them. ``generator`` belongs
        to the model's device. With ``latents``, ``rgb`` is [B, C, h, w] in the scale of latents and is only resized. A
        loss scale enters as the upstream gradient of ``loss``. With ``settled`` the call can be captured in a CUDA
        graph: it takes levels and scalars from there instead of ``progress`` and ``step``, and makes no graph of its
        own. ``negatives`` are prompts that the prediction turns away from besides (`perp_neg`). Raises ValueError for a
        picture of the wrong shape, and for latents where the model works on pixels.
        """
        pixels = self.components.latents_are_pixels
        if latents and pixels:
            raise ValueError("latents must be False: the model works on pixels")
        channels = self.components.latent_channels if latents else 3
        if rgb.ndim != 4 or rgb.shape[1] != channels:
            raise ValueError(f"rgb must be [B, {channels}, H, W], not {list(rgb.shape)}")
        batch = len(rgb)
        device, size = self.components.device, self.components.latent_size
        shape = (batch, self.components.latent_channels, size, size)
        draw = None if latents or pixels else torch.randn(shape, generator=generator, device=device)
        t = self.timesteps(batch, progress, generator, step) if settled is None else settled.t
        noise = torch.randn(shape, generator=generator, device=device)
        if settled is None:
            numbers = self.numbers(step, progress)
            numbers = {name: torch.full((), value, device=device) for name, value in numbers.items()}
        else:
            numbers = settled.numbers
        others = () if negatives is None else tuple(negatives)
        with torch.autocast(rgb.device.type, enabled=False):
            if self.method == "mse":
                z = self._latents(rgb, draw)
                gradient, noisy, clean = self._gradient(z.detach(), t, cond, uncond, numbers, noise, *others)
                loss = 0.5 * (z - (z - gradient).detach()).square().sum() / batch
            else:
                score = self._score_of if settled is None else self._score
                scalars = [numbers[name] for name in self.annealed]
                inputs = (rgb.detach(), t, cond, uncond, draw, noise, *scalars, *others)
                image_gradient, value, gradient, noisy, clean = score(*inputs)
                loss = InjectGradient.apply(rgb, image_gradient, value)
        return GuidanceResult(loss, t, torch.linalg.vector_norm(gradient), gradient, noisy, clean)

    def _score(
        self,
        rgb: Tensor,
        t: Tensor,
        cond: Tensor,
        uncond: Tensor,
        draw: Tensor | None,
        noise: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradient of the picture, the loss, and what :meth:`_gradient` returns; a function of tensors alone.

        ``others``: the scalars of ``annealed``, then nothing or the fields of `Negatives`.
        """
        batch, scalars = len(rgb), len(self.annealed)
        numbers, negatives = dict(zip(self.annealed, others[:scalars], strict=True)), others[scalars:]
        with torch.enable_grad():
            picture = rgb.detach().requires_grad_()
            z = self._latents(picture, draw)
        self.mark("encode")
        gradient, noisy, clean = self._gradient(z.detach(), t, cond, uncond, numbers, noise, *negatives)
        self.mark("unet")
        # The encoder's backward may run in fp16: its upstream gradient gets a peak of 1, to stay in range.
        peak = gradient.abs().amax().clamp_min(1e-12)
        (image_gradient,) = torch.autograd.grad(z, picture, gradient / peak)
        return image_gradient * (peak / batch), 0.5 * gradient.square().sum() / batch, gradient, noisy, clean

    def timesteps(self, batch: int, progress: float, generator: torch.Generator | None = None, step: int = 0) -> Tensor:
        """Noise levels [batch] int64: uniform in t_range, or near a level that falls from its end to its start."""
        low, high = self._level_range(step, progress)
        if self.config.t_anneal != "none":
            done = progress ** {"sqrt": 0.5, "linear": 1.0, "square": 2.0}[self.config.t_anneal]
            level = high - (high - low) * done
            jitter = ANNEAL_JITTER * (high - low)
            low, high = max(low, round(level - jitter)), min(high, round(level + jitter))
        return torch.randint(low, high + 1, (batch,), generator=generator, device=self.components.device)

    def _level_range(self, step: int, progress: float) -> tuple[int, int]:
        steps = self.components.num_train_timesteps
        ends = (value_at(end, step, progress) for end in self.config.t_range)
        low, high = (min(int(steps * fraction), steps - 1) for fraction in ends)
        return low, high

    def numbers(self, step: int, progress: float) -> dict[str, float]:
        """What a step reads from the device, by name: the scale, all that has a schedule, and the lowest level of asd
        ("low_level") where that has one."""
        now = {"guidance_scale": self.config.guidance_scale} | values_at(self.config, step, progress)
        if "low_level" in self.annealed:
            now["low_level"] = self._level_range(step, progress)[0]
        return {name: now[name] for name in self.annealed}

    def settle(self, batch: int, step: int, progress: float, generator: torch.Generator) -> Settled:
        """Levels [batch] and scalars of ``step`` for ``settled``, drawn and filled on the model's device."""
        device = self.components.device
        numbers = {name: torch.full((), value, device=device) for name, value in self.numbers(step, progress).items()}
        return Settled(self.timesteps(batch, progress, generator, step), numbers)

    def _latents(self, picture: Tensor, draw: Tensor | None) -> Tensor:
        """Latents [B, C, h, w] of ``picture``: from the VAE's posterior by the normal ``draw``; None: it is latents."""
        model = self.components
        if model.latents_are_pixels:
            return resize(picture, model.latent_size) * 2 - 1
        if draw is None:
            return resize(picture, model.latent_size)
        images = resize(picture, model.image_size) * 2 - 1
        posterior = model.vae.encode(images.to(model.dtype)).latent_dist
        z = posterior.mean.float() + posterior.std.float() * draw
        return (z - model.shift_factor) * model.scaling_factor

    @torch.no_grad()
    def _gradient(
        self,
        z: Tensor,
        t: Tensor,
        cond: Tensor,
        uncond: Tensor,
        numbers: Mapping[str, Tensor],
        noise: Tensor,
        *negatives: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """g of the module's docstring, with ``noisy`` and ``clean`` of :class:`GuidanceResult`, each [B, C, h, w].

        ``numbers``: the scalars of ``annealed``. ``negatives``: nothing, or the fields of `Negatives`.
        """
        model, config = self.components, self.config
        scale, rescale, weight, limit = (
            numbers.get(name, getattr(config, name))
            for name in ("guidance_scale", "guidance_rescale", "lambda_guidance", "clip_grad_latent")
        )
        prompts, weights, further = [uncond, cond], None, None
        if negatives:
            embeddings, weights = negatives
            prompts += [embedding.expand_as(cond) for embedding in embeddings]
        if config.objective == "sdi":
            noise = inverted_noise(model, z, t, cond, uncond, scale=-scale, steps=config.inversion_steps)
        alpha = model.alphas_cumprod.index_select(0, t).view(-1, 1, 1, 1)
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        noisy = signal * z + spread * noise
        if config.objective == "asd":
            further = (*self._noisier(z, t, noise, numbers.get("low_level")), cond)
        rows = predict(model, noisy, t, prompts, further)
        guided = rows[: len(prompts)]
        if largest(config.guidance_rescale) == 0:
            rescale = None
        eps, clean = apply_cfg(model, guided, noisy, t, scale=scale, rescale=rescale, weights=weights)
        taken = noise
        if config.loss_space == "x0":
            return self._clamped(weight * (z - clean), limit), noisy, clean
        if config.objective == "csd":
            taken, _ = eps_and_x0(model, rows[0], noisy, signal, spread)
        elif config.objective == "asd":
            later, level, _ = further
            taken, _ = eps_and_x0(model, rows[-1], later, *sqrt_alphas(model, level))
        return self._clamped(weight * (1 - alpha) * (eps - taken), limit), noisy, clean

    def _clamped(self, gradient: Tensor, limit: float | Tensor) -> Tensor:
        """``gradient`` with its elements in [-limit, limit], if there is to be one."""
        if largest(self.config.clip_grad_latent) <= 0:
            return gradient
        # An infinite element becomes not a number, not the limit: its step is to be skipped.
        return gradient.clamp(-limit, limit) + 0 * gradient

    def _noisier(self, z: Tensor, t: Tensor, noise: Tensor, low: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """The latents ``z`` with the same noise at the higher level t' of asd, and that level [B].

        ``low`` is the lowest level of the step; None: of a run whose range stays as it is.
        """
        if low is None:
            low, _ = self._level_range(0, 0.0)
        level = (t + (t - low) // ASYNCHRONY).clamp_max(self.components.num_train_timesteps - 1)
        signal, spread = sqrt_alphas(self.components, level)
        return signal * z + spread * noise, level


def _annealed(config: GuidanceConfig) -> tuple[str, ...]:
    """Names of the scalars that a step reads from the device, in their order as inputs of a graph."""
    names = ["guidance_rescale", "lambda_guidance", "clip_grad_latent"]
    names = ["guidance_scale", *(name for name in names if isinstance(getattr(config, name), LinearSchedule))]
    if config.objective == "asd" and isinstance(config.t_range[0], LinearSchedule):
        names.append("low_level")
    return tuple(names)


class InjectGradient(torch.autograd.Function):
    """The scalar ``value``, whose derivative in ``picture`` is declared to be ``gradient``."""

    @staticmethod
    def forward(ctx, picture: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def resize(image: Tensor, size: int) -> Tensor:
    """``image`` [B, C, H, W] at ``size`` x ``size``: bilinear, pixel centres at halves, averaged where it shrinks."""
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image.float()
    shrinks = max(height, width) > size
    if shrinks and torch.are_deterministic_algorithms_enabled():
        # The gradient of torch's averaging adds up in any order and does not say so. As products it has an order, and
        # in fp64 they are no less precise.
        rows, columns = (_interpolate(torch.eye(n, device=image.device)[None, None], size, n) for n in (height, width))
        return (rows.double() @ image.double() @ columns.double().mT).float()
    return _interpolate(image.float(), size, size, antialias=shrinks)


def _interpolate(image: Tensor, height: int, width: int, antialias: bool = True) -> Tensor:
    return F.interpolate(image, (height, width), mode="bilinear", align_corners=False, antialias=antialias)
