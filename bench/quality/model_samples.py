"""Images that dream-mini makes of prompts.

`python -m dream_fast.bench.quality.model_samples --out sheet.png PROMPT ...`.

A row a prompt, its front, side, back and overhead view in the columns.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.dream_mini.vocabulary import THINGS, VIEWS
from dream_fast.engine.guidance.ddim import sample
from dream_fast.engine.guidance.model.components import Components, load_components


def sample_views(
    components: Components, prompts: list[str], *, views: tuple[str, ...] = VIEWS, seed: int = 0, scale: float = 4.0
) -> torch.Tensor:
    """Images [len(prompts), len(views), 3, S, S] in [0, 1]: each prompt from each of the views."""
    texts = [f"{prompt}, {view} view" for prompt in prompts for view in views]
    cond, uncond = components.embed(texts), components.embed([""]).expand(len(texts), -1, -1)
    generator = torch.Generator(components.device).manual_seed(seed)
    images = [
        sample(components, c, u, steps=30, guidance_scale=scale, generator=generator)
        for c, u in zip(cond.split(64), uncond.split(64), strict=True)
    ]
    return torch.cat(images).unflatten(0, (len(prompts), len(views)))


def sheet(images: torch.Tensor, columns: int = 3) -> Image.Image:
    """Rows of images [N, V, 3, S, S] in `columns` columns of rows."""
    rows, views, _, size, _ = images.shape
    high = -(-rows // columns)
    canvas = torch.ones(3, high * size, columns * (views * size + 8))
    for n, row in enumerate(images.cpu()):
        x, y = (n // high) * (views * size + 8), (n % high) * size
        canvas[:, y : y + size, x : x + views * size] = torch.cat(list(row), dim=2)
    return Image.fromarray((canvas.permute(1, 2, 0) * 255).round().byte().numpy())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="*", default=[f"a {name}" for name in THINGS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance_scale", "--guidance-scale", type=float, default=4.0)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    components = load_components(args.model, device, need_vae_decoder=True)
    images = sample_views(components, args.prompts, seed=args.seed, scale=args.guidance_scale)
    sheet(images).save(args.out)


if __name__ == "__main__":
    main()
