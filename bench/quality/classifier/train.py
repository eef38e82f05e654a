"""Train the classifier: `python -m dream_fast.bench.quality.classifier.train` writes judge.safetensors and judge.json.

Objects are named by the procedural world. Colours are the caption's, or the object's natural shade where people have a
word for it; images without colour teach none. Views are taught by objects that have a front.
"""

import argparse
import copy
import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dream_fast.bench.quality.classifier import (
    FACES,
    FRONTS,
    SIZE,
    WEIGHTS,
    Classifier,
    Predictions,
    classify,
    sector_centers,
)
from dream_fast.engine.dream_mini.dataset import NATURAL, Views, rendered
from dream_fast.engine.dream_mini.vocabulary import COLORS, SHADES, THINGS, VIEWS

TRAIN_SEED, HELD_OUT_SEED = 101, 202  # dream-mini learns from seed 0
VIEWS_A_SCENE = 4
RATE, BATCH, AVERAGE, SMOOTHING = 3e-3, 512, 0.999, 0.05
UNNAMED = -1
CALLED = {"leaf": "green", "wood": "brown", "steel": "gray", "stone": "gray"}  # tan, cream and glass have no word here
CLEAR = 30.0  # degrees from straight ahead, sideways or behind: nobody would call the view another


class Examples(NamedTuple):
    """Images and what is true of them, N of each."""

    images: Tensor  # [N, 3, SIZE, SIZE] uint8
    object: Tensor  # int64 index into THINGS
    color: Tensor  # int64 index into COLORS, UNNAMED where no word fits or the image has no colour
    view: Tensor  # int64 index into VIEWS
    polar: Tensor  # float32 degrees
    azimuth: Tensor  # float32 degrees in [-180, 180)

    def take(self, index: Tensor) -> "Examples":
        return Examples(*(column[index] for column in self))


def color_labels(views: Views) -> np.ndarray:
    """The word for each object's own colour, [B] int64: the caption's, else the natural shade's."""
    names, colors = list(THINGS), list(COLORS)
    found = []
    for (thing, color, _), paint, shading in zip(views.labels, views.paint, views.shading, strict=True):
        if shading == 2:
            found.append(UNNAMED)
            continue
        if color != NATURAL:
            found.append(int(color))
            continue
        shades = THINGS[names[thing]].natural or colors
        nearest = min(shades, key=lambda shade: np.abs(np.array(COLORS.get(shade) or SHADES[shade]) - paint).sum())
        word = CALLED.get(nearest, nearest)
        found.append(colors.index(word) if word in COLORS else UNNAMED)
    return np.array(found)


def dataset(seed: int, batches: int, device: torch.device, pool: ProcessPoolExecutor) -> Examples:
    """Renders that a seed names."""
    parts = []
    for views in rendered(seed, batches, VIEWS_A_SCENE, SIZE, device, pool):
        labels = torch.from_numpy(views.labels).long()
        angles = torch.from_numpy(views.angles)
        columns = (labels[:, 0], torch.from_numpy(color_labels(views)), labels[:, 2], angles[:, 0], angles[:, 1])
        parts.append(Examples(views.images.permute(0, 3, 1, 2), *(column.to(device) for column in columns)))
    return Examples(*(torch.cat(column) for column in zip(*parts, strict=True)))


def mirrored(examples: Examples, which: Tensor) -> Examples:
    """Images [N, ...] seen in a mirror where `which` [N]: a front stays a front, its left becomes its right."""
    images = torch.where(which[:, None, None, None], examples.images.flip(-1), examples.images)
    return examples._replace(images=images, azimuth=torch.where(which, -examples.azimuth, examples.azimuth))


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, 3, S, S] in [0, 1] disturbed like rendered fields and decoded latents.

    Shifted, scaled and tilted; blurred; at a lower resolution; cloudy; with floaters in empty space; stronger
    or weaker in contrast and colour; noisy.
    """
    n, _, size, _ = images.shape
    device = images.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator, device=device)

    def enlarged(small: Tensor) -> Tensor:
        return F.interpolate(small, (size, size), mode="bilinear")

    scale, tilt = 0.85 + 0.4 * draw(), 0.12 * (draw() - 0.5)
    rows = torch.stack([torch.stack([scale, -tilt], 1), torch.stack([tilt, scale], 1)], 1)
    theta = torch.cat([rows, 0.3 * (draw(2, 1) - 0.5)], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1)
    images = torch.lerp(images, soft, draw(1, 1, 1))
    coarse = F.interpolate(images, (size * 5 // 12, size * 5 // 12), mode="bilinear", antialias=True)
    images = torch.lerp(images, enlarged(coarse), draw(1, 1, 1) ** 2)
    images = images + 0.07 * draw(1, 1, 1) ** 2 * enlarged(normal(3, max(1, size // 8), max(1, size // 8)))
    floaters = enlarged((normal(1, size // 3, size // 3) > 2.8).float()) * (draw(1, 1, 1) < 0.3)
    images = torch.lerp(images, draw(3, 1, 1).expand_as(images), floaters)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * (0.75 + 0.6 * draw(1, 1, 1))
    middle = gray.mean((2, 3), keepdim=True)
    images = middle + (images - middle) * (0.7 + 0.6 * draw(1, 1, 1))
    gain, lift = 0.88 + 0.24 * draw(1, 1, 1) + 0.1 * (draw(3, 1, 1) - 0.5), 0.1 * (draw(1, 1, 1) - 0.5)
    return (images * gain + lift + 0.05 * draw(1, 1, 1) * normal(3, size, size)).clamp(0, 1)


def view_targets(polar: Tensor, azimuth: Tensor) -> Tensor:
    """Membership in each sector and in the view from above: [N, SECTORS + 1], rows sum to 1, soft at borders."""
    away = (azimuth[:, None] - sector_centers().to(azimuth) + 180) % 360 - 180
    sectors = torch.softmax(-0.5 * (away / 10) ** 2, -1)
    above = torch.sigmoid((30 - polar) / 2)[:, None]
    return torch.cat([sectors * (1 - above), above], 1)


def loss_of(classifier: Classifier, images: Tensor, truth: Examples, fronts: Tensor) -> Tensor:
    """Cross-entropies of object, colour (where it has a name) and view (of objects in `fronts` [48] bool)."""
    objects, colors, views = (logits.float() for logits in classifier(images))
    thing = F.cross_entropy(objects, truth.object, label_smoothing=SMOOTHING)
    color = F.cross_entropy(colors, truth.color, ignore_index=UNNAMED, label_smoothing=SMOOTHING)
    apart = fronts[truth.object].float()
    view = F.cross_entropy(views, view_targets(truth.polar, truth.azimuth), reduction="none")
    return thing + color + (view * apart).sum() / apart.sum().clamp(min=1)


def membership(names: frozenset[str], device: torch.device | str) -> Tensor:
    """[48] bool: which of THINGS are in `names`."""
    return torch.tensor([name in names for name in THINGS], device=device)


def classify_all(classifier: Classifier, images: Tensor) -> Predictions:
    """Classify uint8 images, in pieces."""
    found = [classify(classifier, part.float() / 255) for part in images.split(1024)]
    return Predictions(*(torch.cat(column) for column in zip(*found, strict=True)))


def accuracy(found: Predictions, truth: Examples) -> dict[str, float]:
    """Shares right. Colours count where there is a word for them. `view` is over all objects, round ones included;
    `view_faces` over objects with a face, `view_faces_clear` over those seen well away from the borders between views.
    """
    device = truth.object.device
    right, colored = found.object == truth.object, truth.color != UNNAMED
    view, face = found.view == truth.view, membership(FACES, device)[truth.object]
    away = (truth.azimuth.abs() + 45) % 90 - 45  # degrees from 0, 90 or 180
    clear = face & (truth.polar > 40) & (away.abs() < CLEAR)
    front = membership(FRONTS, device)[truth.object]
    return {
        "object": right.float().mean().item(),
        "color": (found.color == truth.color)[colored].float().mean().item(),
        "object_color": (right & (found.color == truth.color))[colored].float().mean().item(),
        "view": view.float().mean().item(),
        "view_fronts": view[front].float().mean().item(),
        "view_faces": view[face].float().mean().item(),
        "view_faces_clear": view[clear].float().mean().item(),
    }


def confusion(seen: Tensor, true: Tensor) -> dict[str, dict[str, float]]:
    """For each true view the shares of what was seen, indices into VIEWS: rows sum to 1."""
    return {
        name: {other: round((seen[true == k] == j).float().mean().item(), 4) for j, other in enumerate(VIEWS)}
        for k, name in enumerate(VIEWS)
        if (true == k).any()
    }


class Average:
    """The running average of a classifier's weights and statistics, which is the result of training."""

    def __init__(self, classifier: Classifier):
        self.classifier = copy.deepcopy(classifier).requires_grad_(False)
        self.steps = 0

    @torch.no_grad()
    def update(self, classifier: Classifier) -> None:
        self.steps += 1
        mine, theirs = (
            [t for t in model.state_dict().values() if t.is_floating_point()] for model in (self.classifier, classifier)
        )
        torch._foreach_lerp_(mine, theirs, max(1 - AVERAGE, 1 / self.steps))


def train(examples: Examples, steps: int, batch: int = BATCH) -> Classifier:
    """A classifier trained for `steps` steps, for inference."""
    device = examples.images.device
    torch.manual_seed(TRAIN_SEED)
    classifier = Classifier().to(device)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(classifier)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=0.05)
    generator = torch.Generator(device).manual_seed(TRAIN_SEED)
    fronts = membership(FRONTS, device)
    start = time.perf_counter()
    for step in range(steps):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, 20 * done, 1.01 - done)
        index = torch.randint(len(examples.images), (batch,), device=device, generator=generator)
        truth = mirrored(examples.take(index), torch.rand(batch, device=device, generator=generator) < 0.5)
        images = disturb(truth.images.float() / 255, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(classifier, images, truth, fronts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update(classifier)
        if step % 500 == 0:
            print(f"classifier step {step}, {time.perf_counter() - start:.0f} s, loss {loss.item():.3f}", flush=True)
    return average.classifier.eval()


def to_half(classifier: Classifier) -> dict[str, Tensor]:
    """The judge's state as it is stored."""
    return {name: t.half() if t.is_floating_point() else t for name, t in classifier.state_dict().items()}


def report(classifier: Classifier, held: Examples) -> dict:
    """Accuracies on held-out renders, as they are and disturbed as in training, and which view is taken for which."""
    found = classify_all(classifier, held.images)
    generator = torch.Generator(held.images.device).manual_seed(HELD_OUT_SEED)
    worse = [disturb(part.float() / 255, generator) for part in held.images.split(1024)]
    disturbed = classify_all(classifier, (torch.cat(worse) * 255).round().byte())
    face = membership(FACES, held.object.device)[held.object]
    return {
        "held_out": {k: round(v, 4) for k, v in accuracy(found, held).items()},
        "held_out_disturbed": {k: round(v, 4) for k, v in accuracy(disturbed, held).items()},
        "views_of_faces": confusion(found.view[face], held.view[face]),
        "held_out_images": len(held.images),
        "held_out_faces": int(face.sum()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--batches", type=int, default=620, help="batches of 64 objects, four views of each")
    parser.add_argument("--held_out", "--held-out", type=int, default=40, help="such batches to measure on")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--workers", type=int, default=14)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    start = time.perf_counter()
    pool = ProcessPoolExecutor(args.workers)
    held = dataset(HELD_OUT_SEED, args.held_out, device, pool)
    print(f"rendered {len(held.images)} images to measure on, {time.perf_counter() - start:.0f} s", flush=True)
    examples = dataset(TRAIN_SEED, args.batches, device, pool)
    pool.shutdown()
    print(f"rendered {len(examples.images)} to learn from, {time.perf_counter() - start:.0f} s", flush=True)
    classifier = train(examples, args.steps)
    state = to_half(classifier)
    classifier.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().cpu() for name, t in state.items()}, args.out)
    record = {
        **report(classifier, held),
        "images": len(examples.images),
        "image_size": SIZE,
        "steps": args.steps,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
    }
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
