"""The two trainings of dream-mini: the autoencoder, then text encoder, UNet and camera embedding together."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dream_fast.engine.dream_mini.dataset import CAPTIONS
from dream_fast.engine.dream_mini.fit import Fit
from dream_fast.engine.dream_mini.model import LATENT, AutoencoderKL, make_scheduler
from dream_fast.engine.dream_mini.multiview import VIEWS, camera_vectors, make_multiview, predict
from dream_fast.engine.scene.camera import make_cameras

ALONE = 5 / 8  # share of a batch's rows that are views on their own; the others are groups of four
PLACED = 0.2  # share of those whose camera is given
UNPROMPTED = 0.1  # share of rows and groups without their caption


class Latents(NamedTuple):
    """Training data of the UNet: N images, of which rows of `groups` [G, 4] show one scene from four sides."""

    moments: Tensor  # [N, 8, LATENT, LATENT] fp16, scaled means and standard deviations
    tokens: Tensor  # [N, CAPTIONS, TOKENS] int16
    cameras: Tensor  # [N, 16] camera vectors
    groups: Tensor  # [G, 4] int64
    held: int  # the first images, and the groups among them, are kept to measure on


def unit(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to [-1, 1] [B, 3, H, W], channels last."""
    return (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def vectors(cameras: Tensor) -> Tensor:
    """Camera vectors [N, 16] of (polar, azimuth, radius, field of view) [N, 4]."""
    return camera_vectors(make_cameras(*cameras.unbind(-1)).c2w)


def compile_on_gpu(*parts: nn.Module) -> None:
    """Compile in place, which halves the time of a step; a CPU trains only in tests, where compiling takes longer."""
    for part in parts:
        if next(part.parameters()).is_cuda:
            part.compile()


class FitAutoencoder(Fit):
    """L1, L2 and L1 of image gradients, and a small KL term."""

    name = "vae"

    def __init__(self, vae: AutoencoderKL, images: Tensor, batch: int, **options):
        self.vae, self.images, self.batch = vae, images, batch
        super().__init__(nn.ModuleList([vae]), **options)
        compile_on_gpu(vae.encoder, vae.decoder)
        self.square_error = torch.zeros(())  # of the last batch

    def loss(self) -> Tensor:
        index = torch.randint(len(self.images), (self.batch,), device=self.device, generator=self.generator)
        x = unit(self.images[index])
        with torch.autocast(self.device.type, torch.bfloat16):
            posterior = self.vae.encode(x).latent_dist
            y = self.vae.decode(posterior.sample(self.generator)).sample.float()
        edges = torch.stack([(y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3)]).sum()
        square = (y - x).square().mean()
        self.square_error = square.detach()
        return (y - x).abs().mean() + 2 * square + edges + 1e-5 * posterior.kl().mean() / LATENT**2

    def figures(self) -> dict[str, float]:
        return {"psnr": -10 * torch.log10(self.square_error / 4).item()}


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled posterior means and standard deviations of all images: [N, 8, LATENT, LATENT] fp16."""
    parts = []
    for part in images.split(512):
        with torch.autocast(images.device.type, torch.bfloat16):
            posterior = vae.encode(unit(part)).latent_dist
        parts.append((torch.cat([posterior.mean, posterior.std], 1).float() * vae.config.scaling_factor).half())
    return torch.cat(parts)


class FitDiffusion(Fit):
    """v-prediction (Salimans and Ho 2022) of single views and of groups of four in one batch."""

    name = "unet"

    def __init__(self, text_encoder, unet, camera, data: Latents, empty: Tensor, batch: int, **options):
        make_multiview(unet)
        models = nn.ModuleList([text_encoder, unet, camera]).to(data.moments.device)
        models.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(models, **options)
        compile_on_gpu(text_encoder, unet)
        self.data, self.empty, self.batch = data, empty, batch
        self.groups = round(batch * (1 - ALONE) / VIEWS)
        self.singles = batch - VIEWS * self.groups
        self.alphas = make_scheduler().alphas_cumprod.to(self.device)
        held_groups = data.groups[(data.groups < data.held).all(1)]
        self.free_groups = data.groups[(data.groups >= data.held).all(1)]
        draw = torch.Generator(self.device).manual_seed(0)
        self.measured = self._batch(draw, torch.arange(data.held, device=self.device), held_groups)

    def _batch(self, draw: torch.Generator, rows: Tensor, groups: Tensor) -> tuple[Tensor, ...]:
        """Noisy latents, timesteps, tokens, camera vectors and targets, of rows and groups drawn."""
        alone, together, device = self.singles, self.groups, self.device

        def pick(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, device=device, generator=draw)

        index = torch.cat([rows[pick(len(rows), alone)], groups[pick(len(groups), together)].flatten()])
        # one view in four, and two groups in three, have a caption without a view
        group_caption = pick(2 * CAPTIONS, together).clamp(max=CAPTIONS - 1).repeat_interleave(VIEWS)
        caption = torch.cat([pick(CAPTIONS + 1, alone) % CAPTIONS, group_caption])
        units = torch.rand(2, alone + together, device=device, generator=draw)
        units = torch.cat([units[:, :alone], units[:, alone:].repeat_interleave(VIEWS, 1)], 1)
        tokens = torch.where(units[0, :, None] < UNPROMPTED, self.empty, self.data.tokens[index, caption]).long()
        placed = torch.rand(alone + VIEWS * together, 1, device=device, generator=draw) < PLACED
        placed[alone:] = True
        # timesteps spread evenly over the batch, one for a group
        spread = torch.randperm(alone + together, device=device, generator=draw)
        share = (spread + torch.rand(alone + together, device=device, generator=draw)) / (alone + together)
        t = (share * len(self.alphas)).long()
        t = torch.cat([t[:alone], t[alone:].repeat_interleave(VIEWS)])
        moments = self.data.moments[index].float()
        noise = torch.randn(2, *moments[:, :4].shape, device=device, generator=draw)
        x0 = moments[:, :4] + moments[:, 4:] * noise[0]
        signal, sigma = self.alphas[t].sqrt()[:, None, None, None], (1 - self.alphas[t]).sqrt()[:, None, None, None]
        noisy = (signal * x0 + sigma * noise[1]).contiguous(memory_format=torch.channels_last)
        return noisy, t, tokens, self.data.cameras[index], placed, signal * noise[1] - sigma * x0

    def _error(self, batch: tuple[Tensor, ...]) -> Tensor:
        noisy, t, tokens, cameras, placed, target = batch
        text_encoder, unet, camera = self.models
        with torch.autocast(self.device.type, torch.bfloat16):
            states = text_encoder(tokens).last_hidden_state
            embedded = camera(cameras) * placed
            predicted = predict(unet, noisy, t, states, embedded, self.singles)
        return (predicted.float() - target).square().flatten(1).mean(1)

    def loss(self) -> Tensor:
        rows = self.data.held + torch.arange(len(self.data.moments) - self.data.held, device=self.device)
        return self._error(self._batch(self.generator, rows, self.free_groups)).mean()

    def figures(self) -> dict[str, float]:
        """Errors on images that are kept apart: of single views and of groups."""
        error = self._error(self.measured).detach()  # with gradients on, or the compiled UNet is compiled once more
        return {"held_single": error[: self.singles].mean().item(), "held_group": error[self.singles :].mean().item()}
