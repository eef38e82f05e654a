"""Images that dream-mini makes of prompts.

`python -m dream_fast.bench.quality.model_samples --out sheet.png PROMPT ...`.

A row a prompt, its front, side, back and overhead view in the columns; with `--multiview` four views that the model
makes together, 90 degrees apart.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.dream_mini.catalogue import VIEWS
from dream_fast.engine.dream_mini.multiview import VIEWS as GROUP
from dream_fast.engine.dream_mini.multiview import CameraEmbedding, camera_vectors, make_multiview, predict
from dream_fast.engine.dream_mini.vocabulary import read_vocabulary
from dream_fast.engine.guidance.ddim import sample
from dream_fast.engine.guidance.model.components import Components, load_components
from dream_fast.engine.guidance.prompts import encode
from dream_fast.engine.scene.camera import make_cameras


def sample_views(
    components: Components, prompts: list[str], *, views: tuple[str, ...] = VIEWS, seed: int = 0, scale: float = 4.0
) -> torch.Tensor:
    """Images [len(prompts), len(views), 3, S, S] in [0, 1]: each prompt from each of the views."""
    texts = [f"{prompt}, {view} view" for prompt in prompts for view in views]
    cond, uncond = encode(components, texts), encode(components, [""]).expand(len(texts), -1, -1)
    generator = torch.Generator(components.device).manual_seed(seed)
    images = [
        sample(components, c, u, steps=30, guidance_scale=scale, generator=generator)
        for c, u in zip(cond.split(64), uncond.split(64), strict=True)
    ]
    return torch.cat(images).unflatten(0, (len(prompts), len(views)))


class _Together:
    """A UNet whose rows are groups of four views from given cameras."""

    def __init__(self, unet, camera: torch.Tensor):
        self.unet, self.camera, self.config = unet, camera, unet.config

    def __call__(self, rows, t, encoder_hidden_states, return_dict=False):
        camera = self.camera.repeat(len(rows) // len(self.camera), 1)
        return (predict(self.unet, rows, t, encoder_hidden_states, camera.to(rows.dtype), 0),)


def sample_groups(
    components: Components,
    folder: Path,
    prompts: list[str],
    *,
    polar: float = 75.0,
    seed: int = 0,
    scale: float = 4.0,
    steps: int = 30,
) -> torch.Tensor:
    """Images [len(prompts), 4, 3, S, S] in [0, 1]: four views of each prompt from 0, 90, 180 and 270 degrees, together.

    `folder` is the model's. Afterwards the UNet of `components` takes groups.
    """
    azimuth = torch.arange(0.0, 360.0, 90.0).repeat(len(prompts))
    same = torch.ones_like(azimuth)
    vectors = camera_vectors(make_cameras(polar * same, azimuth, 3.2 * same, 23 * same).c2w).to(components.device)
    camera = CameraEmbedding.load(folder, components.device)(vectors).detach()
    make_multiview(components.unet)
    cond = encode(components, prompts).repeat_interleave(GROUP, 0)
    uncond = encode(components, [""]).expand(len(cond), -1, -1)
    generator = torch.Generator(components.device).manual_seed(seed)
    together = replace(components, unet=_Together(components.unet, camera))
    images = sample(together, cond, uncond, steps=steps, guidance_scale=scale, generator=generator)
    return images.unflatten(0, (len(prompts), GROUP))


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
    parser.add_argument("prompts", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance_scale", "--guidance-scale", type=float, default=4.0)
    parser.add_argument(
        "--multiview", action="store_true", help="four views of each prompt that the model makes together"
    )
    args = parser.parse_args(argv)
    prompts = args.prompts or [f"a {name}" for name in read_vocabulary(args.model).things]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    components = load_components(args.model, device, need_vae_decoder=True)
    if args.multiview:
        images = sample_groups(components, args.model, prompts, seed=args.seed, scale=args.guidance_scale)
    else:
        images = sample_views(components, prompts, seed=args.seed, scale=args.guidance_scale)
    sheet(images).save(args.out)


if __name__ == "__main__":
    main()
