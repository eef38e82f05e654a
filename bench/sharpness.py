"""Mesh refinement against the field that it began from. `python -m dream_fast.bench sharpness`.

For each prompt one run, and one with --dmtet that starts from it, by the command's own path. Of both, from the eight
azimuths of `quality`: the share of pictures in which the judge sees the object (and its colour), and how sharp the
shape is, in 256 x 256 textureless pictures lit from the camera over white. Sharpness is the mean length of the
brightness' gradient (central differences, per pixel) where it counts:

    silhouette   pixels inside whose neighbour is outside
    creases      of the pixels with inside neighbours alone, the 5 % whose normals differ most from their neighbours'
    rest         the other ones: what is there is mostly noise, which the creases of a noisy shape hold as well

`contrast` is sharpness as a multiple of the rest.
Written to <work>/sharpness.json, with a picture of both beside one another. The refinement has to be 1.3 times as sharp
on the mean of the two, and not worse for the judge.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dream_fast.bench.judge import load_judge
from dream_fast.bench.quality import AZIMUTHS, assess, finished, pictures_of
from dream_fast.engine.camera import turntable
from dream_fast.engine.config import Config
from dream_fast.engine.export.images import save_grid
from dream_fast.engine.presets import resolve
from dream_fast.engine.trainer import Trainer

PROMPTS = ("a hamburger", "a yellow duck", "a red mushroom")
SIZE = 256
SHARPEST = 0.05  # part of the inner pixels that are creases
FACTOR = 1.3


@torch.no_grad()
def textureless(trainer: Trainer) -> tuple[Tensor, Tensor, Tensor]:
    """Brightness [8, H, W] over white, opacity [8, H, W] and normals [8, H, W, 3], from averaged weights."""
    cameras = turntable(trainer.config.camera, AZIMUTHS, trainer.device)
    with trainer.optimizer.ema_weights(), trainer.renderer.without_specks():
        view = trainer.renderer.view(
            cameras, SIZE, SIZE, shading="textureless", background=torch.ones(3, device=trainer.device)
        )
    return view.rgb[..., 0], view.opacity, view.normal


def edges(opacity: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of the silhouette, of creases and all inner ones, bool [N, H, W] each, of opacities and normals."""
    inside = opacity > 0.5
    eroded = -F.max_pool2d(-inside[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
    inner = -F.max_pool2d(-eroded[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
    turn = torch.zeros_like(opacity)
    for dim in (1, 2):
        length = normal.shape[dim]
        cosine = (normal.narrow(dim, 2, length - 2) * normal.narrow(dim, 0, length - 2)).sum(-1)
        turn.narrow(dim, 1, length - 2).add_(1 - cosine)
    creases = torch.zeros_like(inner)
    for number in range(len(opacity)):
        found = turn[number][inner[number]]
        if found.numel():
            creases[number] = inner[number] & (turn[number] >= found.quantile(1 - SHARPEST))
    return inside & ~eroded, creases, inner


def slope(brightness: Tensor) -> Tensor:
    """Length of the gradient [N, H, W] of brightnesses, per pixel; 0 at the border."""
    found = torch.zeros(2, *brightness.shape, device=brightness.device)
    found[0, :, :, 1:-1] = (brightness[:, :, 2:] - brightness[:, :, :-2]) / 2
    found[1, :, 1:-1] = (brightness[:, 2:] - brightness[:, :-2]) / 2
    return found.norm(dim=0)


def measure(trainer: Trainer, prompt: str) -> tuple[dict[str, float | None], Tensor]:
    """The row of a finished run, and its textureless pictures [8, H, W]."""
    scores = assess(load_judge(), pictures_of(trainer).cpu(), prompt)
    brightness, opacity, normal = textureless(trainer)
    silhouette, creases, inner = edges(opacity, normal)
    steep = slope(brightness)
    row = {name: scores[name] for name in ("object", "object_color")}
    row |= {
        name: round(steep[where].mean().item(), 4) if where.any() else 0.0
        for name, where in (("silhouette", silhouette), ("creases", creases), ("rest", inner & ~creases))
    }
    sharpness = (row["silhouette"] + row["creases"]) / 2
    row |= {"sharpness": round(sharpness, 4), "contrast": round(sharpness / max(row["rest"], 1e-6), 2)}
    return row, brightness.cpu()


def make(typed: dict, device: str) -> Trainer:
    """The trainer of a run that is made now, or was before."""
    from dream_fast.engine.run import run

    config: Config = resolve(typed, "dream-mini", device)
    run(config)
    return finished(config, Path(config.run.workspace))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench sharpness", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("sharpness"), help="folder of the runs and of sharpness.json")
    parser.add_argument("--prompt", action="append", help="another prompt (may be given several times)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iters", type=int, help="steps of the runs that are refined; default: the preset's")
    parser.add_argument("--dmtet_iters", type=int, help="steps of the refinements; default: the preset's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    rows, good = [], True
    for prompt in args.prompt or PROMPTS:
        name = f"{prompt.replace(' ', '-')}-{args.seed}"
        common = {"text": prompt, "seed": args.seed, "fp16": True, "device": args.device, "six_views": True}
        field = common | {"workspace": str(args.work / name)}
        mesh = common | {"workspace": str(args.work / f"{name}-dmtet"), "dmtet": True, "init_with": field["workspace"]}
        field |= {"iters": args.iters} if args.iters else {}
        mesh |= {"iters": args.dmtet_iters} if args.dmtet_iters else {}
        before, shown_before = measure(make(field, args.device), prompt)
        after, shown_after = measure(make(mesh, args.device), prompt)
        save_grid(
            args.work / f"{name}.png", torch.stack([shown_before, shown_after])[..., None].expand(-1, -1, -1, -1, 3)
        )
        factor = round(after["sharpness"] / max(before["sharpness"], 1e-6), 3)
        good &= factor >= FACTOR and after["object"] >= before["object"]
        rows.append({"prompt": prompt, "field": before, "dmtet": after, "factor": factor})
        print(json.dumps(rows[-1]), flush=True)
    (args.work / "sharpness.json").write_text(json.dumps({"rows": rows, "good": good}, indent=1) + "\n")
    return int(not good)
