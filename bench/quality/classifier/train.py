"""Train the classifier: `python -m dream_fast.bench.quality.classifier.train` writes judge.safetensors and judge.json.

Things are named by the procedural world. Colours are the caption's, or the thing's natural shade where people have a
word for it; images without colour teach none. Views are taught by things that have a front, and patterns and views
by images of one thing.
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

from dream_fast.bench.quality.classifier import WEIGHTS, sector_centers, to_words
from dream_fast.bench.quality.classifier.disturb import disturb
from dream_fast.bench.quality.classifier.network import SIZE, Logits, Network, catalogue_classes
from dream_fast.engine.dream_mini.catalogue import COLORS, SHADES, THINGS, VIEWS
from dream_fast.engine.dream_mini.dataset import NATURAL, NONE, TEXTURELESS, Labels, Views, rendered

TRAIN_SEED, HELD_OUT_SEED = 101, 202  # dream-mini learns from seed 0
VIEWS_A_SCENE = 4
RATE, BATCH, AVERAGE, SMOOTHING = 3e-3, 512, 0.999, 0.05
UNNAMED = -1
# Natural shades that a word for a colour names. Tan, cream, straw, skin, brick and glass have none here.
CALLED = {
    "leaf": "green", "wood": "brown", "patty": "brown", "steel": "gray", "stone": "gray", "fox": "orange",
    "dark": "black", "rose": "pink",
}  # fmt: skip
CLEAR = 30.0  # degrees from straight ahead, sideways or behind: nobody would call the view another
FACES = frozenset(name for name, thing in THINGS.items() if thing.face)
# Not round: their front can be told from their back.
FRONTS = FACES | {
    "fish", "house", "castle", "windmill", "car", "truck", "airplane", "boat", "chair", "bus", "train", "helicopter",
    "tractor", "bicycle", "submarine", "tent", "igloo", "flower", "sunflower", "clock", "camera", "guitar", "boot",
    "sofa", "bed", "television", "laptop", "gift",
}  # fmt: skip


class Examples(NamedTuple):
    """Images and what is true of them, N of each: indices into the classes, UNNAMED where there is no word."""

    images: Tensor  # [N, 3, SIZE, SIZE] uint8
    object: Tensor  # int64 the first thing
    color: Tensor
    view: Tensor  # int64 index into VIEWS
    attribute: Tensor
    part: Tensor
    part_color: Tensor
    relation: Tensor
    second: Tensor  # int64 the second thing, UNNAMED where there is none
    polar: Tensor  # float32 degrees
    azimuth: Tensor  # float32 degrees in [-180, 180)

    def take(self, index: Tensor) -> "Examples":
        return Examples(*(column[index] for column in self))


def color_labels(views: Views) -> np.ndarray:
    """The word for each first thing's own colour, [B] int64: the caption's, else the natural shade's."""
    names, colors = list(THINGS), list(COLORS)
    found = []
    for labels, paint, shading in zip(views.labels, views.paint, views.shading, strict=True):
        told = Labels(*labels)
        if shading == TEXTURELESS:
            found.append(UNNAMED)
            continue
        if told.color != NATURAL:
            found.append(int(told.color))
            continue
        shades = THINGS[names[told.object]].natural or colors
        nearest = min(shades, key=lambda shade: np.abs(np.array(COLORS.get(shade) or SHADES[shade]) - paint).sum())
        word = CALLED.get(nearest, nearest)
        found.append(colors.index(word) if word in COLORS else UNNAMED)
    return np.array(found)


def examples_of(views: Views, device: torch.device) -> Examples:
    """Images with their classes. What one image cannot show is UNNAMED."""
    labels = dict(zip(Labels._fields, torch.from_numpy(views.labels).long().unbind(1), strict=True))
    bare, pair = torch.from_numpy(views.shading == TEXTURELESS), labels["relation"] != NONE
    columns = (
        labels["object"],
        torch.where(pair, UNNAMED, torch.from_numpy(color_labels(views))),
        labels["view"],
        torch.where(pair | (bare & (labels["attribute"] != NONE)), UNNAMED, labels["attribute"] + 1),
        torch.where(pair, UNNAMED, labels["part"] + 1),
        torch.where(bare | pair, UNNAMED, labels["part_color"]),
        labels["relation"] + 1,
        labels["second"],
        torch.from_numpy(views.cameras[:, 0].copy()),
        torch.from_numpy(views.cameras[:, 1].copy()),
    )
    return Examples(views.images.permute(0, 3, 1, 2), *(column.to(device) for column in columns))


def dataset(seed: int, batches: int, device: torch.device, pool: ProcessPoolExecutor) -> Examples:
    """Renders that a seed names."""
    parts = [examples_of(views, device) for views in rendered(seed, batches, VIEWS_A_SCENE, SIZE, device, pool)]
    return Examples(*(torch.cat(column) for column in zip(*parts, strict=True)))


def mirrored(examples: Examples, which: Tensor) -> Examples:
    """Images [N, ...] seen in a mirror where `which` [N]: a front stays a front, its left becomes its right."""
    images = torch.where(which[:, None, None, None], examples.images.flip(-1), examples.images)
    return examples._replace(images=images, azimuth=torch.where(which, -examples.azimuth, examples.azimuth))


def view_targets(polar: Tensor, azimuth: Tensor) -> Tensor:
    """Membership in each sector and in the view from above: [N, SECTORS + 1], rows sum to 1, soft at borders."""
    away = (azimuth[:, None] - sector_centers().to(azimuth) + 180) % 360 - 180
    sectors = torch.softmax(-0.5 * (away / 10) ** 2, -1)
    above = torch.sigmoid((30 - polar) / 2)[:, None]
    return torch.cat([sectors * (1 - above), above], 1)


def loss_of(classifier: Network, images: Tensor, truth: Examples, fronts: Tensor) -> Tensor:
    """Cross-entropies of all heads where there is a name; of the view, for single things in `fronts` [T] bool."""
    logits = Logits(*(head.float() for head in classifier(images)))

    def named(head: Tensor, target: Tensor) -> Tensor:
        """Mean over what has a name; zero where nothing has."""
        each = F.cross_entropy(head, target, ignore_index=UNNAMED, label_smoothing=SMOOTHING, reduction="sum")
        return each / (target != UNNAMED).sum().clamp(min=1)

    pair = truth.second != UNNAMED
    second = torch.where(pair, truth.second, truth.object)
    one, other = (
        F.cross_entropy(logits.object, target, label_smoothing=SMOOTHING, reduction="none")
        for target in (truth.object, second)
    )
    apart = (fronts[truth.object] & ~pair).float()
    view = F.cross_entropy(logits.view, view_targets(truth.polar, truth.azimuth), reduction="none")
    heads = ("color", "attribute", "part", "part_color", "relation")
    rest = sum(named(getattr(logits, head), getattr(truth, head)) for head in heads)
    return (one + other).mean() / 2 + (view * apart).sum() / apart.sum().clamp(min=1) + rest


def membership(names: frozenset[str], device: torch.device | str) -> Tensor:
    """[T] bool: which of THINGS are in `names`."""
    return torch.tensor([name in names for name in THINGS], device=device)


@torch.no_grad()
def classify_all(classifier: Network, images: Tensor) -> Logits:
    """Logits of uint8 images, in pieces."""
    parts = [classifier(part.float() / 255) for part in images.split(1024)]
    return Logits(*(torch.cat(column) for column in zip(*parts, strict=True)))


def accuracy(seen: Logits, truth: Examples) -> dict[str, float]:
    """Shares right, where there is a word. `both`: of pairs, the two most likely things are the two, and the relation.

    `view_faces` is over things with a face, `view_faces_clear` over those seen well away from the borders of views.
    """
    device, pair = truth.object.device, truth.second != UNNAMED
    single = ~pair
    right = seen.object.argmax(-1) == truth.object
    top = seen.object.topk(2, -1).indices.sort(-1).values
    two = (top == torch.stack([truth.object, truth.second], -1).sort(-1).values).all(-1)
    view, front = to_words(seen.view) == truth.view, membership(FRONTS, device)[truth.object] & single
    face = membership(FACES, device)[truth.object] & single
    away = (truth.azimuth.abs() + 45) % 90 - 45  # degrees from 0, 90 or 180
    clear = face & (truth.polar > 40) & (away.abs() < CLEAR)
    shares = {
        "object": right[single], "both": two[pair], "view_fronts": view[front], "view_faces": view[face],
        "view_faces_clear": view[clear],
    }  # fmt: skip
    for head in ("color", "attribute", "part", "part_color", "relation"):
        target = getattr(truth, head)
        named = target != UNNAMED
        shares[head] = (getattr(seen, head).argmax(-1) == target)[named]
    worn = truth.part > 0
    shares["part_worn"] = (seen.part.argmax(-1) == truth.part)[worn]
    shares["pattern_there"] = (seen.attribute.argmax(-1) == truth.attribute)[truth.attribute > 0]
    return {name: share.float().mean().item() for name, share in shares.items() if len(share)}


def confusion(seen: Tensor, true: Tensor) -> dict[str, dict[str, float]]:
    """For each true view the shares of what was seen, indices into VIEWS: rows sum to 1."""
    return {
        name: {other: round((seen[true == k] == j).float().mean().item(), 4) for j, other in enumerate(VIEWS)}
        for k, name in enumerate(VIEWS)
        if (true == k).any()
    }


class Average:
    """The running average of a classifier's weights and statistics, which is the result of training."""

    def __init__(self, classifier: Network):
        self.classifier = copy.deepcopy(classifier).requires_grad_(False)
        self.steps = 0

    @torch.no_grad()
    def update(self, classifier: Network) -> None:
        self.steps += 1
        mine, theirs = (
            [t for t in model.state_dict().values() if t.is_floating_point()] for model in (self.classifier, classifier)
        )
        torch._foreach_lerp_(mine, theirs, max(1 - AVERAGE, 1 / self.steps))


def train(examples: Examples, steps: int, batch: int = BATCH, seconds: float = 1e9) -> Network:
    """A classifier trained for `steps` steps, or for `seconds` if those end first, for inference."""
    device = examples.images.device
    torch.manual_seed(TRAIN_SEED)
    classifier = Network(catalogue_classes()).to(device)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(classifier)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=0.05)
    generator = torch.Generator(device).manual_seed(TRAIN_SEED)
    fronts = membership(FRONTS, device)
    start = time.perf_counter()
    for step in range(steps):
        done = max(step / steps, (time.perf_counter() - start) / seconds)
        if done >= 1:
            break
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
        if step % 200 == 0:
            print(f"judge step {step}, {time.perf_counter() - start:.0f} s, loss {loss.item():.3f}", flush=True)
    print(f"judge trained for {average.steps} steps, {time.perf_counter() - start:.0f} s", flush=True)
    return average.classifier.eval()


def to_half(classifier: Network) -> dict[str, Tensor]:
    """The judge's state as it is stored."""
    return {name: t.half() if t.is_floating_point() else t for name, t in classifier.state_dict().items()}


def report(classifier: Network, held: Examples) -> dict:
    """Accuracies on held-out renders, as they are and disturbed as in training, and which view is taken for which."""
    seen = classify_all(classifier, held.images)
    generator = torch.Generator(held.images.device).manual_seed(HELD_OUT_SEED)
    worse = [(disturb(part.float() / 255, generator) * 255).round().byte() for part in held.images.split(1024)]
    disturbed = classify_all(classifier, torch.cat(worse))
    face = membership(FACES, held.object.device)[held.object] & (held.second == UNNAMED)
    right = (seen.object.argmax(-1) == held.object) & (held.second == UNNAMED)
    of_thing = {
        name: round(right[(held.object == k) & (held.second == UNNAMED)].float().mean().item(), 3)
        for k, name in enumerate(THINGS)
    }
    return {
        "held_out": {k: round(v, 4) for k, v in accuracy(seen, held).items()},
        "held_out_disturbed": {k: round(v, 4) for k, v in accuracy(disturbed, held).items()},
        "views_of_faces": confusion(to_words(seen.view)[face], held.view[face]),
        "least_recognised": dict(sorted(of_thing.items(), key=lambda entry: entry[1])[:10]),
        "held_out_pictures": len(held.images),
        "held_out_faces": int(face.sum()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--batches", type=int, default=620, help="batches of 64 scenes, four views of each")
    parser.add_argument("--held_out", "--held-out", type=int, default=60, help="such batches to measure on")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seconds", type=float, default=1e9, help="train no longer than so many")
    parser.add_argument("--workers", type=int, default=14)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    start = time.perf_counter()
    with ProcessPoolExecutor(args.workers) as pool:
        held = dataset(HELD_OUT_SEED, args.held_out, device, pool)
        print(f"rendered {len(held.images)} images to measure on, {time.perf_counter() - start:.0f} s", flush=True)
        examples = dataset(TRAIN_SEED, args.batches, device, pool)
    print(f"rendered {len(examples.images)} to learn from, {time.perf_counter() - start:.0f} s", flush=True)
    classifier = train(examples, args.steps, seconds=args.seconds)
    state = to_half(classifier)
    classifier.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().cpu() for name, t in state.items()}, args.out)
    record = {
        **report(classifier, held),
        "pictures": len(examples.images),
        "picture_size": SIZE,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "classes": classifier.classes,
    }
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "classes"}, indent=2))


if __name__ == "__main__":
    main()
