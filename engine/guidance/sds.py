"""Score distillation: the gradient that a diffusion model gives to a rendered image.

With z = (vae(x) - shift) * scale the latents of an image x, a timestep t and noise n, the model sees
x_t = signal(t) z + noise(t) n (`noise.py`). `distillation_gradient` computes the gradient of the latents

    g = lambda_guidance * w(t) * (eps_hat(x_t, t) - e),    w(t) = noise^2 / (signal^2 + noise^2),
    eps_hat = eps_uncond + s (eps_cond - eps_uncond)

and `ScoreDistillation` carries it back through the VAE's encoder and the resize to the image, never through the network
(DreamFusion, Poole et al. 2022, equation 3; Latent-NeRF, Metzer et al. 2022, for latents). `cfg.py` computes eps_hat.
With a variance preserving model w(t) is 1 - a_t; a flow gets the weight of the same mixture scaled to variance 1.
The variants (--objective) differ in the baseline e and in the noise:

    sds   e = n, n is random                       Score Distillation Sampling, Poole et al. 2022
    csd   e = eps_uncond(x_t, t), n is random      Classifier Score Distillation, Yu et al. 2023: g without n
    asd   e = eps_cond(x_t', t'), n is random      Asynchronous Score Distillation, Ma et al. 2024
    sdi   e = n, n is z inverted by the model      Score Distillation via Inversion, Lukoianov et al. 2024

In a eps_cond + b eps_neg + c eps_uncond + d n, sds has s, 0, 1 - s, -1 and csd s, 0, -s, 0. A negative prompt takes the
place of the empty one, so with one csd is s, -s, 0, 0: the paper's weights w1 = w2 = s. In asd t' lies above t by a
tenth of its distance from the lower end of t_range, and n is that of x_t. In sdi the inversion is guided with -s
(`ddim.invert`).

With --loss_space x0 the gradient is that of 1/2 |z - stopgrad(z0_hat)|^2 instead, z0_hat being the clean latents that
the guided prediction implies, rescaled by --guidance_rescale (MVDream, Shi et al. 2023; Lin et al. 2023):
g = lambda_guidance (z - z0_hat), which weights eps_hat - n by noise / signal instead of w(t).

--clip_grad_latent c clamps each element of g to [-c, c].

For a model that works on pixels (IF) z is the image itself, resized and in [-1, 1]. Arithmetic on latents is fp32
for any dtype of the model. Nothing here waits for the device.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from dream_fast.engine.config.schedule import LinearSchedule, largest, value_at, values_at
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.guidance.base import GuidanceResult, StepInputs
from dream_fast.engine.guidance.cfg import apply_cfg, predict
from dream_fast.engine.guidance.ddim import invert
from dream_fast.engine.guidance.model.image_model import Embedding, ImageModel, expand, map_rows
from dream_fast.engine.guidance.noise import split
from dream_fast.engine.guidance.perp_neg import Negatives
from dream_fast.engine.runtime.cuda_graph import StepGraphs
from dream_fast.engine.runtime.step_parts import end_part

# Half the width of the window that an annealed t is drawn from, in fractions of the whole range.
ANNEAL_JITTER = 0.05
# asd compares with a timestep later by one in so many: the authors' plus_ratio of 0.1.
ASYNCHRONY = 10

Scalars = Mapping[str, float | Tensor]


class Draws(NamedTuple):
    """Random draws of a step."""

    t: Tensor  # [B] timesteps
    noise: Tensor  # [B, C, h, w] added to the latents
    vae_noise: Tensor | None = None  # [B, C, h, w] of the VAE's posterior; None without an encoder


class Prompts(NamedTuple):
    """Embeddings of B rows that a step is guided by."""

    cond: Embedding  # guided towards
    uncond: Embedding  # guided away from: the negative prompt, or the empty one
    negatives: Negatives | None = None  # also pushed away from (Perp-Neg)


class LatentGradient(NamedTuple):
    """Gradient of latents, and what it was computed from; each [B, C, h, w]."""

    gradient: Tensor
    noisy: Tensor  # x_t
    clean: Tensor  # one-step estimate of x_0


@torch.no_grad()
def distillation_gradient(
    model: ImageModel, config: GuidanceConfig, z: Tensor, draws: Draws, prompts: Prompts, scalars: Scalars
) -> LatentGradient:
    """Compute g of the module's docstring for latents z [B, C, h, w].

    `scalars` has the values in this step of those settings that have a schedule, and "min_timestep" where asd needs it
    (`ScoreDistillation.scheduled_scalars`).
    """
    t, noise = draws.t, draws.noise
    scale, rescale, weight, limit = (
        scalars.get(name, getattr(config, name))
        for name in ("guidance_scale", "guidance_rescale", "lambda_guidance", "clip_grad_latent")
    )
    embeddings, weights, later = [prompts.uncond, prompts.cond], None, None
    if prompts.negatives is not None:
        weights = prompts.negatives.weights
        embeddings += [_row(prompts.negatives.embeddings, row, len(z)) for row in range(weights.shape[1])]
    if config.objective == "sdi":
        noise = invert(model, z, t, prompts.cond, prompts.uncond, scale=-scale, steps=config.inversion_steps)
    mixture = model.process.mixture(t)
    noisy = mixture.signal * z + mixture.noise * noise
    if config.objective == "asd":
        later = (*_at_later_timestep(model, config, z, draws, scalars), prompts.cond)
    predictions = predict(model, noisy, t, embeddings, later)
    guided = predictions[: len(embeddings)]
    if largest(config.guidance_rescale) == 0:
        rescale = None
    eps, clean = apply_cfg(model, guided, noisy, t, scale=scale, rescale=rescale, weights=weights)
    if config.loss_space == "x0":
        return LatentGradient(_clamp(config, weight * (z - clean), limit), noisy, clean)
    baseline = noise
    if config.objective == "csd":
        baseline, _ = split(model.prediction_type, predictions[0], noisy, mixture)
    elif config.objective == "asd":
        assert later is not None
        x_later, t_later, _ = later
        baseline, _ = split(model.prediction_type, predictions[-1], x_later, model.process.mixture(t_later))
    weight = weight * (1 - mixture.signal_share)
    return LatentGradient(_clamp(config, weight * (eps - baseline), limit), noisy, clean)


def _row(embeddings: Embedding, row: int, count: int) -> Embedding:
    """Row `row` of `embeddings`, repeated `count` times."""
    return expand(map_rows(lambda rows: rows[row : row + 1], embeddings), count)


def _clamp(config: GuidanceConfig, gradient: Tensor, limit: float | Tensor) -> Tensor:
    """Clamp the elements of `gradient` to [-limit, limit], where --clip_grad_latent sets a limit."""
    if largest(config.clip_grad_latent) <= 0:
        return gradient
    # An infinite element becomes NaN, not the limit, so that its step is skipped.
    return torch.clamp(gradient, -limit, limit) + 0 * gradient  # type: ignore[arg-type]  # both are of one kind


def _at_later_timestep(
    model: ImageModel, config: GuidanceConfig, z: Tensor, draws: Draws, scalars: Scalars
) -> tuple[Tensor, Tensor]:
    """Latents z with the same noise at the later timestep t' of asd, and t' [B]."""
    low = scalars.get("min_timestep")
    if low is None:
        low, _ = timestep_range(model, config, 0, 0.0)  # without a schedule it is the same in every step
    process = model.process
    t = (draws.t + process.fraction(draws.t - low, 1, ASYNCHRONY)).clamp_max(process.last_timestep)
    mixture = process.mixture(t)
    return mixture.signal * z + mixture.noise * draws.noise, t


def timestep_range(model: ImageModel, config: GuidanceConfig, step: int, progress: float) -> tuple[int, int]:
    """First and last timestep of --t_range at a step."""
    steps, last = model.process.num_timesteps, model.process.last_timestep
    low, high = (min(int(steps * value_at(end, step, progress)), last) for end in config.t_range)
    return low, high


class ScoreDistillation:
    """Guides images by the image model `components`, configured by `config`.

    The gradient of the images is computed at once and injected into the loss by a custom autograd function, so the
    encoder's autograd graph lives no longer than this call and a loss scale never enters fp16 activations. On a GPU
    encoder, UNet and the encoder's backward are replayed as one CUDA graph for each size of images, unless
    `cuda_graphs` is False, the model cannot be captured, or the caller captures the call itself (`prepare_step`).
    """

    def __init__(self, components: ImageModel, config: GuidanceConfig, *, cuda_graphs: bool = True):
        self.components, self.config = components, config
        on_gpu = components.device.type == "cuda"
        self.graphs = StepGraphs() if cuda_graphs and on_gpu and components.capturable else None

    def __call__(
        self,
        images: Tensor,
        cond: Embedding,
        uncond: Embedding,
        inputs: StepInputs | None = None,
        negatives: Negatives | None = None,
    ) -> GuidanceResult:
        """Guide `images` [B, 3, H, W] in [0, 1] towards `cond` and away from `uncond`, of B rows each.

        With `inputs.latents` they are latents [B, C, h, w], which are resized only. `negatives` are prompts to push
        away from too. A loss scale enters as the upstream gradient of the loss.

        Raises ValueError: when `images` has a wrong shape, or latents are given to a model that works on pixels.
        """
        inputs = inputs or StepInputs()
        self._check_images(images, inputs.latents)
        prepared = inputs.timesteps is not None
        scalars = inputs.scalars if prepared else self.scheduled_scalars(inputs.step, inputs.progress)
        draws, prompts = self.draw(len(images), inputs), Prompts(cond, uncond, negatives)
        with torch.autocast(images.device.type, enabled=False):
            arguments = images.detach(), draws, prompts, scalars
            if self.graphs is None or prepared:
                image_gradient, value, latent = self.image_gradient(arguments)
            else:
                # The next replay overwrites the result of this one.
                result = self.graphs("image_gradient", self.image_gradient, arguments)
                image_gradient, value, latent = pytree.tree_map(torch.clone, result)
            loss = InjectGradient.apply(images, image_gradient, value)
        return GuidanceResult(loss, draws.t, torch.linalg.vector_norm(latent.gradient), *latent)

    def _check_images(self, images: Tensor, latents: bool) -> None:
        if latents and self.components.latents_are_pixels:
            raise ValueError("latents must be False: the model works on pixels")
        channels = self.components.latent_channels if latents else 3
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images must be [B, {channels}, H, W], not {list(images.shape)}")

    def draw(self, batch: int, inputs: StepInputs) -> Draws:
        """Draw the random numbers of a step; the timesteps are those of `inputs` where it has them."""
        model, generator = self.components, inputs.generator
        shape = (batch, model.latent_channels, model.latent_size, model.latent_size)
        encoded = not (inputs.latents or model.latents_are_pixels)
        vae_noise = torch.randn(shape, generator=generator, device=model.device) if encoded else None
        t = self.draw_timesteps(batch, inputs) if inputs.timesteps is None else inputs.timesteps
        return Draws(t, torch.randn(shape, generator=generator, device=model.device), vae_noise)

    def draw_timesteps(self, batch: int, inputs: StepInputs) -> Tensor:
        """Draw timesteps [batch]: uniform in --t_range, or (--t_anneal) near one that falls through the range."""
        low, high = timestep_range(self.components, self.config, inputs.step, inputs.progress)
        if self.config.t_anneal != "none":
            fallen = inputs.progress ** {"sqrt": 0.5, "linear": 1.0, "square": 2.0}[self.config.t_anneal]
            middle = high - (high - low) * fallen
            jitter = ANNEAL_JITTER * (high - low)
            low, high = max(low, round(middle - jitter)), min(high, round(middle + jitter))
        return self.components.process.draw(low, high, batch, self.components.device, inputs.generator)

    def scheduled_scalars(self, step: int, progress: float) -> dict[str, float | Tensor]:
        """Values at a step of the settings with a schedule, by name; for asd also "min_timestep" if that has one."""
        scalars: dict[str, float | Tensor] = dict(values_at(self.config, step, progress))
        if self.config.objective == "asd" and isinstance(self.config.t_range[0], LinearSchedule):
            low, _ = timestep_range(self.components, self.config, step, progress)
            scalars["min_timestep"] = torch.full((), low, device=self.components.device)
        return scalars

    def prepare_step(self, inputs: StepInputs, batch: int) -> StepInputs:
        """Return `inputs` with timesteps and scalars, so that a call can be captured in a CUDA graph of the caller."""
        scalars = {**inputs.scalars, **self.scheduled_scalars(inputs.step, inputs.progress)}
        return inputs._replace(timesteps=self.draw_timesteps(batch, inputs), scalars=scalars)

    def image_gradient(
        self, arguments: tuple[Tensor, Draws, Prompts, Scalars]
    ) -> tuple[Tensor, Tensor, LatentGradient]:
        """Gradient of images, the loss, and the gradient of the latents; a function of tensors alone."""
        images, draws, prompts, scalars = arguments
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            z = self.encode(images, draws.vae_noise)
        end_part("encode")
        latent = distillation_gradient(self.components, self.config, z.detach(), draws, prompts, scalars)
        end_part("unet")
        # The encoder's backward may run in fp16: its upstream gradient gets a peak of 1, to stay in range.
        peak = latent.gradient.abs().amax().clamp_min(1e-12)
        (gradient,) = torch.autograd.grad(z, images, latent.gradient / peak)
        return gradient * (peak / len(images)), 0.5 * latent.gradient.square().sum() / len(images), latent

    def encode(self, images: Tensor, vae_noise: Tensor | None) -> Tensor:
        """Encode images to latents [B, C, h, w] by a draw from the VAE's posterior; without a draw they are latents."""
        model = self.components
        if model.latents_are_pixels:
            return resize(images, model.latent_size) * 2 - 1
        if vae_noise is None:
            return resize(images, model.latent_size)
        return model.encode(resize(images, model.image_size) * 2 - 1, vae_noise)


class InjectGradient(torch.autograd.Function):
    """The scalar `value`, whose derivative in `images` is declared to be `gradient`."""

    @staticmethod
    def forward(ctx, images: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images [B, C, H, W] to `size` x `size`: bilinear, pixel centres at halves, averaged where they shrink."""
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images.float()
    shrinks = max(height, width) > size
    if shrinks and torch.are_deterministic_algorithms_enabled():
        # torch's gradient of its averaging adds up in any order, also in deterministic mode. Matrix products have an
        # order, and in fp64 they are no less precise.
        rows, columns = (_interpolate(torch.eye(n, device=images.device)[None, None], size, n) for n in (height, width))
        return (rows.double() @ images.double() @ columns.double().mT).float()
    return _interpolate(images.float(), size, size, antialias=shrinks)


def _interpolate(images: Tensor, height: int, width: int, antialias: bool = True) -> Tensor:
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=antialias)
