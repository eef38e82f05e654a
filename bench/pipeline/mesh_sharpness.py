"""Compare mesh refinements with the fields that they begin from. `python -m dream_fast.bench sharpness`.

For each prompt one run, and one with --dmtet that starts from it, by the command itself. Of both, from the eight
azimuths of `quality`: the share of images in which the classifier finds the object (and its colour), and the sharpness
of the shape in 512 x 512 textureless images lit from the camera. Sharpness is the mean length of the brightness'
gradient (central differences, per pixel) over a set of pixels:

    silhouette   pixels inside whose neighbour is outside, of each of the two. Over white and over black, and the mean
                 of both: a face towards the light is as white as one background, a rim as dark as the other
    creases      the 5 % of the mesh's inner pixels whose normals differ most from their neighbours', in both images
    own_creases  the same of each image's own normals: a field's are mostly noise
    rest         inner pixels outside of own_creases

Target: the refinement is 1.3 times as sharp on the mean of silhouette and creases, and the classifier finds the object
at least as often. Written to <work>/sharpness.json, with an image of both beside one another.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dream_fast.bench.finished_run import load_finished
from dream_fast.bench.quality.classifier import load_classifier
from dream_fast.bench.quality.protocol import AZIMUTHS
from dream_fast.bench.quality.run import assess, render_views
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.schema import Config
from dream_fast.engine.export.images import save_grid
from dream_fast.engine.render.base import Shading
from dream_fast.engine.scene.camera import turntable
from dream_fast.engine.training.trainer import Trainer

PROMPTS = ("a hamburger", "a yellow duck", "a red mushroom")
SIZE = 512
CREASE_SHARE = 0.05  # of the inner pixels
TARGET_FACTOR = 1.3


class Appearance(NamedTuple):
    """Renders of a finished run from all sides, and the classifier's scores."""

    scores: dict[str, float | None]
    brightness: Tensor  # [8, H, W] textureless, over black
    opacity: Tensor  # [8, H, W]
    normal: Tensor  # [8, H, W, 3]


@torch.no_grad()
def render_appearance(trainer: Trainer, prompt: str) -> Appearance:
    """Render a run with its averaged weights, and score it."""
    assessed = assess(load_classifier(), render_views(trainer).cpu(), prompt)
    cameras = turntable(trainer.config.camera, AZIMUTHS, trainer.device)
    black = torch.zeros(3, device=trainer.device)
    with trainer.optimizer.ema_weights(), trainer.renderer.without_floaters():
        view = trainer.renderer.view(cameras, SIZE, SIZE, shading=Shading("textureless", 0.1), background=black)
    scores = {name: assessed[name] for name in ("object", "object_color")}
    return Appearance(scores, view.rgb[..., 0].cpu(), view.opacity.cpu(), view.normal.cpu())


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
        turns = turn[number][inner[number]]
        if turns.numel():
            creases[number] = inner[number] & (turn[number] >= turns.quantile(1 - CREASE_SHARE))
    return inside & ~eroded, creases, inner


def slope(brightness: Tensor) -> Tensor:
    """Length of the gradient [N, H, W] of brightnesses, per pixel; 0 at the border."""
    gradient = torch.zeros(2, *brightness.shape, device=brightness.device)
    gradient[0, :, :, 1:-1] = (brightness[:, :, 2:] - brightness[:, :, :-2]) / 2
    gradient[1, :, 1:-1] = (brightness[:, 2:] - brightness[:, :-2]) / 2
    return gradient.norm(dim=0)


def measure_sharpness(run: Appearance, mesh: Appearance) -> dict[str, Any]:
    """Scores and sharpness of a run, with the creases of the mesh."""
    over_black, over_white = slope(run.brightness), slope(run.brightness + 1 - run.opacity)
    silhouette, own_creases, inner = edges(run.opacity, run.normal)
    creases = edges(mesh.opacity, mesh.normal)[1]
    means = {
        "silhouette": (over_black + over_white)[silhouette] / 2,
        "silhouette_over_white": over_white[silhouette],
        "creases": over_black[creases],
        "own_creases": over_black[own_creases],
        "rest": over_black[inner & ~own_creases],
    }
    row: dict[str, Any] = run.scores | {
        name: round(part.mean().item(), 4) if len(part) else 0.0 for name, part in means.items()
    }
    return row | {"sharpness": round((row["silhouette"] + row["creases"]) / 2, 4)}


def make_run(overrides: dict, device: str) -> Trainer:
    """Make a run, unless it is finished already, and load it."""
    from dream_fast.engine.run import run

    config: Config = configure(overrides, device)
    run(config)
    return load_finished(config, Path(config.run.workspace))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench sharpness", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("sharpness"), help="folder of the runs and of sharpness.json")
    parser.add_argument("--prompt", action="append", help="another prompt (may be given several times)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iters", type=int, help="steps of the runs that are refined; default: the preset's")
    parser.add_argument(
        "--dmtet_iters", "--dmtet-iters", type=int, help="steps of the refinements; default: the preset's"
    )
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
        before = render_appearance(make_run(field, args.device), prompt)
        after = render_appearance(make_run(mesh, args.device), prompt)
        shown = torch.stack([1 + view.brightness - view.opacity for view in (before, after)])
        save_grid(args.work / f"{name}.png", shown[..., None].expand(-1, -1, -1, -1, 3))
        field_row, mesh_row = measure_sharpness(before, after), measure_sharpness(after, after)
        factor = round(mesh_row["sharpness"] / max(field_row["sharpness"], 1e-6), 3)
        good &= factor >= TARGET_FACTOR and mesh_row["object"] >= field_row["object"]
        rows.append({"prompt": prompt, "field": field_row, "dmtet": mesh_row, "factor": factor})
        print(json.dumps(rows[-1]), flush=True)
    (args.work / "sharpness.json").write_text(json.dumps({"rows": rows, "good": good}, indent=1) + "\n")
    return int(not good)
