"""Classify dream-mini's own images: `python -m dream_fast.bench.quality.classifier.prior --out FOLDER`.

On a GPU also renders of the same prompts, by cameras for which a caption has the same word, before and after
dream-mini's autoencoder: their scores are an upper bound.
Writes prior.json and a sheet of images with predictions for each kind.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dream_fast.bench.quality.classifier import FACES, Classifier, Predictions, classify, load_classifier
from dream_fast.bench.quality.classifier.train import confusion
from dream_fast.bench.quality.model_samples import sample_views
from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.dream_mini.captions import view_of
from dream_fast.engine.dream_mini.scenes import make_scene
from dream_fast.engine.dream_mini.sphere_tracer import pack, render
from dream_fast.engine.dream_mini.vocabulary import COLORS, THINGS, VIEWS
from dream_fast.engine.export.images import to_uint8
from dream_fast.engine.guidance.model.components import Components, load_components
from dream_fast.engine.scene.camera import make_cameras

RENDER_SEED = 303  # neither dream-mini nor the classifier has learned from it
SIDES = VIEWS[:3]
COLOR_OF = {name: ("red", "blue")[k % 2] for k, name in enumerate(THINGS)}
PROMPTS = tuple(f"a {color} {name}" for name, color in COLOR_OF.items())


@torch.no_grad()
def renders(size: int, rng: np.random.Generator, device: torch.device | str) -> Tensor:
    """A render of each prompt's object from front, side and back: [48, 3, 3, size, size]. Seconds on a GPU only."""
    columns = []
    for word in SIDES:
        scenes = [make_scene(rng, name, color, plain=True) for name, color in COLOR_OF.items()]
        n = len(scenes)
        angles = np.array([_camera(word, rng) for _ in scenes], np.float32)
        lens = np.stack([rng.uniform(3.0, 3.5, n), rng.uniform(20, 26, n)], 1).astype(np.float32)
        light = rng.random((n, 7)).astype(np.float32)
        light[:, 1:4] = rng.normal(size=(n, 3))
        shading = rng.choice(3, n, p=(0.5, 0.44, 0.06))
        numbers, lights = (torch.from_numpy(a).to(device) for a in (np.concatenate([angles, lens], 1), light))
        images = render(
            pack(scenes, device), make_cameras(*numbers.T), size, shading=torch.from_numpy(shading).to(device),
            ambient=0.1 + 0.9 * lights[:, 0], light_noise=lights[:, 1:4], background=lights[:, 4:],
        )  # fmt: skip
        columns.append(images.permute(0, 3, 1, 2))
    return torch.stack(columns, 1)


def _camera(word: str, rng: np.random.Generator) -> tuple[float, float]:
    """Polar angle and azimuth of a view that a caption calls by this word."""
    while True:
        polar = rng.uniform(5, 45) if rng.random() < 0.15 else rng.uniform(45, 105)
        azimuth = rng.uniform(-180, 180)
        if view_of(polar, azimuth, rng=rng) == word:
            return polar, azimuth


@torch.no_grad()
def through_autoencoder(components: Components, images: Tensor) -> Tensor:
    """Images [N, 3, S, S] in [0, 1], encoded and decoded."""
    parts = []
    for part in images.to(components.dtype).split(48):
        latents = components.vae.encode(part * 2 - 1).latent_dist.mean
        parts.append((components.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(parts)


def classify_sides(classifier: Classifier, images: Tensor) -> Predictions:
    """Predictions on images [N * 48, 3, 3, S, S], each [N * 48, 3]."""
    found = classify(classifier, images.flatten(0, 1).float())
    return Predictions(*(column.cpu().view(-1, len(SIDES)) for column in found))


def scores(found: Predictions) -> dict:
    """Scores of images of N times PROMPTS, each from three sides; views count for objects with a face.

    `view`: the classifier calls it by the caption's word, with borders at 45 and 135 degrees.
    """
    thing = torch.arange(len(THINGS)).repeat(len(found.object) // len(THINGS))
    face = torch.tensor([name in FACES for name in THINGS])[thing]
    wanted = torch.arange(len(SIDES)).expand_as(found.view)
    right = found.view == wanted
    color = torch.tensor([list(COLORS).index(COLOR_OF[name]) for name in THINGS])[thing]
    return {
        "object": round((found.object == thing[:, None]).float().mean().item(), 4),
        "color": round((found.color == color[:, None]).float().mean().item(), 4),
        "view": round(right[face].float().mean().item(), 4),
        "views": confusion(found.view[face], wanted[face]),
        "faces": {
            name: [round(share, 2) for share in right[thing == k].float().mean(0).tolist()]
            for k, name in enumerate(THINGS)
            if name in FACES
        },
        "images": found.object.numel(),
        "images_of_faces": int(face.sum()) * len(SIDES),
    }


def samples(components: Components, seeds: int, scale: float = 4.0) -> Tensor:
    """dream-mini's images of PROMPTS from front, side and back, for each seed: [seeds * 48, 3, 3, S, S]."""
    images = [sample_views(components, list(PROMPTS), views=SIDES, seed=s, scale=scale) for s in range(seeds)]
    return torch.cat(images)


def prior_scores(device: str, seeds: int) -> dict:
    """The scores of dream-mini's own images, for quality.json."""
    components = load_components(MODEL_FOLDER, device, need_vae_decoder=True)
    found = scores(classify_sides(load_classifier(device), samples(components, seeds)))
    return {f"prior_{name}": value for name, value in found.items()}


def sheet(images: Tensor, found: Predictions, repeats: int = 2) -> Image.Image:
    """Objects with a face, a row each: `repeats` times three sides, under each the verdict, red where it is wrong."""
    size, gap = images.shape[-1], 14
    faces = [k for k, name in enumerate(THINGS) if name in FACES]
    canvas = Image.new("RGB", (repeats * len(SIDES) * size, len(faces) * (size + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for row, k in enumerate(faces):
        for column in range(repeats * len(SIDES)):
            n, side = k + column // len(SIDES) * len(THINGS), column % len(SIDES)
            x, y = column * size, row * (size + gap)
            canvas.paste(Image.fromarray(to_uint8(images[n, side].permute(1, 2, 0).cpu())), (x, y))
            name, view = list(THINGS)[found.object[n, side]], VIEWS[found.view[n, side]]
            good = name == list(THINGS)[k] and view == SIDES[side]
            pen.text((x + 2, y + size + 1), f"{name}, {view}", fill="black" if good else "red")
    return canvas


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of prior.json and the images")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--scales", type=float, nargs="+", default=[4.0], help="guidance scales to sample with")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier, components = load_classifier(device), load_components(args.model, device, need_vae_decoder=True)
    args.out.mkdir(parents=True, exist_ok=True)
    shown = {f"samples_scale_{scale:g}": samples(components, args.seeds, scale) for scale in args.scales}
    if device == "cuda":
        rng = np.random.default_rng(RENDER_SEED)
        real = torch.cat([renders(components.image_size, rng, device) for _ in range(args.seeds)])
        shown["renders"] = real
        shown["renders_through_autoencoder"] = through_autoencoder(components, real.flatten(0, 1)).view_as(real)
    record = {}
    for name, images in shown.items():
        found = classify_sides(classifier, images)
        record[name] = scores(found)
        sheet(images, found, min(2, args.seeds)).save(args.out / f"{name}.png")
        print(name, json.dumps(record[name]), flush=True)
    (args.out / "prior.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
