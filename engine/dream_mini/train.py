"""Train dream-mini from the procedural world: `python -m dream_fast.engine.dream_mini.train --out FOLDER`.

Renders the data, trains the autoencoder, caches its latents, trains the text encoder and the UNet together
(v-prediction, Salimans and Ho 2022), and writes the folder. Each stage leaves a file in `--cache`; a second call goes
on from there.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from dream_fast.engine.dream_mini.dataset import BATCH, CAPTIONS, rendered
from dream_fast.engine.dream_mini.model import (
    IMAGE,
    LATENT,
    TOKENS,
    AutoencoderKL,
    make_scheduler,
    make_text_encoder,
    make_unet,
    make_vae,
    save_model,
    save_tokenizer,
)


def render_data(args, device, tokenizer) -> dict[str, torch.Tensor]:
    """Images [N, 128, 128, 3] uint8 and caption tokens [N, CAPTIONS, TOKENS] on the device."""
    views, total = args.views, args.scenes // BATCH * BATCH * args.views
    images = torch.empty(total, IMAGE, IMAGE, 3, dtype=torch.uint8, device=device)
    tokens = torch.empty(total, CAPTIONS, TOKENS, dtype=torch.int16)
    start = time.perf_counter()
    with ProcessPoolExecutor(args.workers) as pool:
        for k, batch in enumerate(rendered(args.seed, args.scenes // BATCH, views, IMAGE, device, pool)):
            rows = slice(k * BATCH, (k + 1) * BATCH)
            images[rows] = batch.images
            flat = [text for texts in batch.captions for text in texts]
            ids = tokenizer(
                flat, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
            ).input_ids
            tokens[rows] = ids.reshape(BATCH, CAPTIONS, TOKENS).to(torch.int16)
            if k % 200 == 0:
                print(f"rendered {(k + 1) * BATCH} of {total} images, {time.perf_counter() - start:.0f} s", flush=True)
    return {"images": images, "tokens": tokens.to(device)}


def _unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] to [-1, 1] [B, 3, H, W], channels last."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def _compile(*parts: torch.nn.Module) -> None:
    """Compile in place, which halves the time of a step; a CPU trains only in tests, where compiling takes longer."""
    for part in parts:
        if next(part.parameters()).is_cuda:
            part.compile()


def _rate(progress: float, peak: float, warm_up: float = 0.03) -> float:
    """Linear warm-up, then a cosine to zero."""
    if progress < warm_up:
        return peak * progress / warm_up
    return peak * 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))


def train_vae(args, images: torch.Tensor) -> AutoencoderKL:
    """L1 + L1 of image gradients + a small KL term; the scale that makes latents of unit variance is stored."""
    device = images.device
    vae = make_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    generator = torch.Generator(device).manual_seed(args.seed)
    _compile(vae.encoder, vae.decoder)
    start = time.perf_counter()
    for step in range(args.vae_steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step / args.vae_steps, 1e-3)
        index = torch.randint(len(images), (args.vae_batch,), device=device, generator=generator)
        x = _unit(images[index]).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(generator)).sample.float()
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        loss = (y - x).abs().mean() + 2 * (y - x).square().mean() + edges + 1e-5 * posterior.kl().mean() / LATENT**2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            psnr = -10 * torch.log10(((y - x) / 2).square().mean()).item()
            elapsed = time.perf_counter() - start
            print(f"vae step {step}, {elapsed:.0f} s, loss {loss.item():.4f}, psnr {psnr:.1f} dB", flush=True)
    vae.eval()
    with torch.no_grad():
        mean = torch.cat(
            [vae.encode(_unit(images[k : k + 256])).latent_dist.mean for k in range(0, min(4096, len(images)), 256)]
        )
    vae.register_to_config(scaling_factor=round(1 / mean.std().item(), 5))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Scaled posterior means and standard deviations of all images: [N, 8, 32, 32] fp16."""
    parts = []
    for k in range(0, len(images), 512):
        with torch.autocast(images.device.type, torch.bfloat16):
            posterior = vae.encode(_unit(images[k : k + 512]).contiguous(memory_format=torch.channels_last)).latent_dist
        parts.append((torch.cat([posterior.mean, posterior.std], 1).float() * vae.config.scaling_factor).half())
    return torch.cat(parts)


class DiffusionTraining:
    """Text encoder and UNet, their optimiser and their EMA; resumable."""

    def __init__(self, args, device, tokenizer):
        self.args, self.device = args, device
        self.models = torch.nn.ModuleList([make_text_encoder(tokenizer), make_unet()]).to(device)
        self.models.to(memory_format=torch.channels_last)
        _compile(*self.models)
        self.average = [p.detach().clone() for p in self.models.parameters()]
        self.optimizer = torch.optim.AdamW(self.models.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
        self.alphas = make_scheduler().alphas_cumprod.to(device)
        self.empty = torch.tensor(
            tokenizer("", padding="max_length", max_length=TOKENS).input_ids, device=device, dtype=torch.int16
        )
        self.generator = torch.Generator(device).manual_seed(args.seed + 1)
        self.step, self.seconds = 0, 0.0

    def state(self):
        return {
            "models": self.models.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }

    def load(self, state):
        self.models.load_state_dict(state["models"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step, self.seconds = [a.detach() for a in state["average"]], state["step"], state["seconds"]

    def loss(self, latents, tokens):
        batch, draw = self.args.batch, self.generator
        index = torch.randint(len(latents), (batch,), device=self.device, generator=draw)
        which = torch.randint(CAPTIONS + 1, (batch,), device=self.device, generator=draw) % CAPTIONS
        ids = tokens[index, which]
        drop = torch.rand(batch, 1, device=self.device, generator=draw) < 0.1
        ids = torch.where(drop, self.empty, ids).long()
        moments = latents[index].float()
        noise = torch.randn(2, batch, 4, LATENT, LATENT, device=self.device, generator=draw)
        x0 = (moments[:, :4] + moments[:, 4:] * noise[0]).contiguous(memory_format=torch.channels_last)
        t = torch.randint(len(self.alphas), (batch,), device=self.device, generator=draw)
        signal, sigma = self.alphas[t].sqrt()[:, None, None, None], (1 - self.alphas[t]).sqrt()[:, None, None, None]
        text_encoder, unet = self.models
        with torch.autocast(self.device.type, torch.bfloat16):
            states = text_encoder(ids).last_hidden_state
            predicted = unet(signal * x0 + sigma * noise[1], t, states).sample
        return (predicted.float() - (signal * noise[1] - sigma * x0)).square().mean()

    def train(self, latents, tokens, until: float):
        """Train until the last step or the wall-clock `until` (perf_counter). Returns True when all steps are done."""
        start, before = time.perf_counter(), self.seconds
        parameters = list(self.models.parameters())
        while self.step < self.args.steps and time.perf_counter() < until:
            for group in self.optimizer.param_groups:
                group["lr"] = _rate(self.step / self.args.steps, self.args.rate)
            loss = self.loss(latents, tokens)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.average, parameters, max(1e-3, 1 / (1 + self.step)))
            if self.step % 100 == 0:
                print(f"unet step {self.step}, {self.seconds:.0f} s, loss {loss.item():.4f}", flush=True)
            self.step += 1
            self.seconds = before + time.perf_counter() - start
        return self.step >= self.args.steps

    @torch.no_grad()
    def averaged(self):
        for parameter, average in zip(self.models.parameters(), self.average, strict=True):
            parameter.copy_(average)
        return self.models


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--cache", type=Path, default=Path("prior-cache"), help="what the stages leave for a next call")
    parser.add_argument("--scenes", type=int, default=20_000, help="objects")
    parser.add_argument("--views", type=int, default=6, help="images of each object")
    parser.add_argument("--vae_steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=6000, help="steps of UNet and text encoder")
    parser.add_argument(
        "--stop_after", type=float, default=1e9, help="stop after this many seconds; the same command continues"
    )
    parser.add_argument("--vae_batch", type=int, default=128)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=6e-4, help="peak learning rate of UNet and text encoder")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    until = time.perf_counter() + args.stop_after
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    args.cache.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(args.out / "tokenizer")
    latents_file, state_file = args.cache / "latents.pt", args.cache / "unet.pt"
    if not latents_file.exists():
        data = render_data(args, device, tokenizer)
        vae = train_vae(args, data["images"])
        vae.save_pretrained(args.cache / "vae")
        torch.save({"latents": encode(vae, data["images"]), "tokens": data["tokens"]}, latents_file)
        del data
    data = torch.load(latents_file, map_location=device, weights_only=True)
    training = DiffusionTraining(args, device, tokenizer)
    if state_file.exists():
        training.load(torch.load(state_file, map_location=device, weights_only=True))
    done = training.train(data["latents"], data["tokens"], until)
    torch.save(training.state(), state_file)
    print(f"{'trained' if done else 'stopped'} at step {training.step}, {training.seconds:.0f} s", flush=True)
    text_encoder, unet = training.averaged()
    vae = AutoencoderKL.from_pretrained(args.cache / "vae")
    save_model(args.out, tokenizer, text_encoder, unet, vae, make_scheduler())


if __name__ == "__main__":
    main()
