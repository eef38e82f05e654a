"""Train dream-mini from the procedural world: `python -m dream_fast.engine.dream_mini.train --out FOLDER`.

Renders the images, trains the autoencoder, caches its latents, trains the text encoder, the UNet and the camera
embedding together, and writes the model folder. Each stage leaves a file in `--cache`, and its state every `--every`
seconds and at the limit `--seconds`. The same command called again resumes, and ends with the same weights as a run
without a stop. On another machine, without that cache, `--start FOLDER` begins from the weights of a model folder
instead (also those of an earlier vocabulary).

The folder also gets log.jsonl, a row a line: losses, and errors on images kept apart.
`python -m dream_fast.bench.quality.train_dream_mini` adds sheets of the model's images.
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from dream_fast.engine.dream_mini.catalogue import vocabulary
from dream_fast.engine.dream_mini.dataset import BATCH, CAPTIONS, GROUP, rendered
from dream_fast.engine.dream_mini.model import (
    IMAGE,
    TOKENS,
    AutoencoderKL,
    CLIPTextModel,
    CLIPTokenizer,
    UNet2DConditionModel,
    make_camera,
    make_scheduler,
    make_text_encoder,
    make_unet,
    make_vae,
    save_model,
    save_tokenizer,
)
from dream_fast.engine.dream_mini.multiview import FOLDER as CAMERA_FOLDER
from dream_fast.engine.dream_mini.multiview import CameraEmbedding
from dream_fast.engine.dream_mini.training import FitAutoencoder, FitDiffusion, Latents, encode_all, vectors
from dream_fast.engine.dream_mini.vocabulary import Vocabulary

Callback = Callable[[Path, int, torch.device], None]  # of a model folder that was written, and its step


def to_ids(tokenizer: CLIPTokenizer, words: list[str]) -> Callable[[str], list[int]]:
    """A function from captions of known words to their TOKENS token ids, which looks words up."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    of_word = {word: tokenizer(word).input_ids[1:-1] for word in [*words, ","]}

    def ids(text: str) -> list[int]:
        inside = [number for word in text.replace(",", " ,").split() for number in of_word[word]][: TOKENS - 2]
        return [start, *inside, *[end] * (TOKENS - 1 - len(inside))]

    return ids


def render_all(args, device: torch.device, ids: Callable[[str], list[int]]) -> dict[str, torch.Tensor]:
    """Images [N, 128, 128, 3] uint8 and tokens [N, CAPTIONS, TOKENS] on the device, cameras [N, 4], groups [G, 4]."""
    batches, views = args.scenes // BATCH, GROUP + args.views
    total = batches * views * BATCH
    images = torch.empty(total, IMAGE, IMAGE, 3, dtype=torch.uint8, device=device)
    tokens, cameras = np.empty((total, CAPTIONS, TOKENS), np.int16), np.empty((total, 4), np.float32)
    start = time.perf_counter()
    with ProcessPoolExecutor(args.workers) as pool:
        for k, batch in enumerate(rendered(args.seed, batches, args.views, IMAGE, device, pool, grouped=True)):
            rows = slice(k * BATCH, (k + 1) * BATCH)
            images[rows] = batch.images
            tokens[rows] = [[ids(text) for text in texts] for texts in batch.captions]
            cameras[rows] = batch.cameras
            if k % 500 == 0:
                print(f"rendered {(k + 1) * BATCH} of {total} images, {time.perf_counter() - start:.0f} s", flush=True)
    first = (np.arange(batches) * views * BATCH)[:, None] + np.arange(BATCH)
    groups = first.reshape(-1, 1) + BATCH * np.arange(GROUP)
    return {
        "images": images, "tokens": torch.from_numpy(tokens).to(device),
        "cameras": torch.from_numpy(cameras).to(device),
        "groups": torch.from_numpy(groups).to(device),
    }  # fmt: skip


def _with_scale(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Store the scale that makes latents of unit variance."""
    vae.register_to_config(scaling_factor=1.0)
    moments = encode_all(vae, images[:4096])
    vae.register_to_config(scaling_factor=round(1 / moments[:, :4].float().std().item(), 5))


def make_latents(args, device: torch.device, ids: Callable[[str], list[int]], until: float) -> bool:
    """Render, train the autoencoder, write it and the latents to the cache. False: the time was too short."""
    vae = make_vae()
    if args.start:
        vae = AutoencoderKL.from_pretrained(args.start / "vae")
    vae = vae.to(device, memory_format=torch.channels_last).float()
    data = render_all(args, device, ids)
    fit = FitAutoencoder(
        vae, data["images"], args.vae_batch, rate=args.vae_rate, seed=args.seed, steps=args.vae_steps, budget=0
    )
    state = args.cache / "vae.pt"
    if state.exists():
        fit.load(state)
    if not fit.run(until, state, args.every, lambda: None, args.out / "log.jsonl"):
        return False
    # A fresh one, which is not compiled, with the weights as they will be shipped: a training that starts from the
    # folder has the same latents.
    vae = make_vae()
    vae.load_state_dict({name: t.half().float() for name, t in fit.averaged()[0].items()})
    vae = vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    _with_scale(vae, data["images"])
    vae.save_pretrained(args.cache / "vae")
    images = data.pop("images")
    held = max(1, args.held // BATCH) * BATCH * (GROUP + args.views)
    latents = {"moments": encode_all(vae, images), "held": held, **data, "cameras": vectors(data["cameras"])}
    beside = args.cache / "latents.new"
    torch.save(latents, beside)
    os.replace(beside, args.cache / "latents.pt")
    return True


def starting_weights(args, tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel, CameraEmbedding]:
    """Text encoder, UNet and camera embedding: new ones, or those of the folder `--start` as far as they fit."""
    text_encoder, unet, camera = make_text_encoder(tokenizer), make_unet(), make_camera()
    if args.start is None:
        return text_encoder, unet, camera
    unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.start / "unet").state_dict())
    before = CLIPTextModel.from_pretrained(args.start / "text_encoder").float().state_dict()
    known = CLIPTokenizer.from_pretrained(args.start / "tokenizer").get_vocab()
    own = text_encoder.state_dict()
    name = next(key for key in own if key.endswith("token_embedding.weight"))
    for word, row in tokenizer.get_vocab().items():
        if word in known:
            own[name][row] = before[name][known[word]]
    text_encoder.load_state_dict(before | {name: own[name]})
    if (args.start / CAMERA_FOLDER).is_dir():
        camera = CameraEmbedding.load(args.start)
    return text_encoder, unet, camera


def write_model(args, fit: FitDiffusion, tokenizer: CLIPTokenizer) -> None:
    """Write the model folder of the averaged weights."""
    text_encoder, unet, camera = make_text_encoder(tokenizer), make_unet(), make_camera()
    for module, weights in zip((text_encoder, unet, camera), fit.averaged(), strict=True):
        module.load_state_dict(weights)
    vae = AutoencoderKL.from_pretrained(args.cache / "vae")
    save_model(args.out, tokenizer, text_encoder, unet, vae, make_scheduler(), camera)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, its log and its images")
    parser.add_argument("--cache", type=Path, default=Path("prior-cache"), help="what the stages leave for a next call")
    parser.add_argument("--start", type=Path, help="folder of a model to begin with, of this architecture")
    parser.add_argument("--seconds", type=float, default=1e9, help="leave after so many; a next call resumes")
    parser.add_argument("--every", type=float, default=180, help="seconds between two saves of the state and the model")
    parser.add_argument("--scenes", type=int, default=30_016)
    parser.add_argument("--views", type=int, default=4, help="images of each scene beside the group of four")
    parser.add_argument("--held", type=int, default=256, help="scenes that only measure")
    parser.add_argument("--vae_steps", type=int, default=2500)
    parser.add_argument("--vae_batch", type=int, default=128)
    parser.add_argument("--vae_rate", type=float, default=1e-3, help="peak learning rate of the autoencoder")
    parser.add_argument("--steps", type=int, help="steps of UNet and text encoder (default: what --budget allows)")
    parser.add_argument("--budget", type=float, default=2400, help="seconds of UNet and text encoder, over all calls")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=6e-4, help="peak learning rate of UNet and text encoder")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, on_save: Callback | None = None) -> bool:
    """Train. True: the training is finished. `on_save` is called with the model folder each time it is written."""
    args = _arguments(argv)
    until = time.perf_counter() + args.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    args.cache.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    words = Vocabulary(vocabulary()).words
    tokenizer = save_tokenizer(args.out / "tokenizer", words)
    latents_file, state_file = args.cache / "latents.pt", args.cache / "unet.pt"
    if not latents_file.exists() and not make_latents(args, device, to_ids(tokenizer, words), until):
        print("stopped while training the autoencoder", flush=True)
        return False
    torch.cuda.empty_cache()
    data = torch.load(latents_file, map_location=device, weights_only=True)
    empty = torch.tensor(to_ids(tokenizer, words)(""), device=device, dtype=torch.int16)
    fit = FitDiffusion(
        *starting_weights(args, tokenizer), Latents(**data), empty, args.batch, rate=args.rate, seed=args.seed + 1,
        steps=args.steps, budget=args.budget,
    )  # fmt: skip
    if state_file.exists():
        fit.load(state_file)

    def save() -> None:
        write_model(args, fit, tokenizer)
        if on_save is not None:
            on_save(args.out, fit.step, device)

    finished = fit.run(until, state_file, args.every, save, args.out / "log.jsonl")
    print(f"{'trained' if finished else 'stopped'} at step {fit.step}, {fit.seconds:.0f} s", flush=True)
    return finished


if __name__ == "__main__":
    main()
