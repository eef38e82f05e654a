"""Quality: whole runs with default settings, looked at by the judge. `python -m dream_fast.bench quality`.

R-precision over all captions (object, and object x colour): the share of pictures, eight azimuths around each object,
whose most likely caption is the prompt's. `janus_rate`: for objects with a face, the share of pictures from behind that
show the front. The prompts were fixed before any setting was tuned.
"""

import argparse
import json
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dream_fast.bench.judge import Judge, load_judge, verdicts
from dream_fast.engine.camera import turntable
from dream_fast.engine.config import Config, resolve
from dream_fast.engine.export.images import to_uint8
from dream_fast.engine.prior import MODEL_FOLDER
from dream_fast.engine.prior.vocabulary import COLORS, THINGS, VIEWS, find_object
from dream_fast.engine.runtime import Runtime, choose_runtime, machine
from dream_fast.engine.trainer import Trainer
from dream_fast.engine.workspace import Workspace

PROMPTS = (
    "a hamburger", "a red robot", "a yellow duck", "a blue car", "a snowman", "a green cactus", "a pink pig",
    "a purple mug", "a brown bear", "a white rabbit", "an orange cat", "a red mushroom", "a pineapple", "a cyan teapot",
    "a blue house", "a black penguin",
)  # fmt: skip
HELD_OUT = (
    "a donut", "a purple owl", "a red truck", "a yellow dog", "a green frog", "a pink cupcake", "a lighthouse",
    "a blue fish", "a gray cat", "a white robot", "an orange bear", "a brown chair", "a cyan vase", "a black hat",
    "a red apple", "a green turtle",
)  # fmt: skip
AZIMUTHS, SIZE = 8, 128
BEHIND = (3, 4, 5)  # of the azimuths 0, 45, ... 315: those whose side is the back
BACKGROUND = 0.75
RESULTS = Path(__file__).parent / "results"


def wanted(prompt: str) -> tuple[int, int | None]:
    """The classes that the judge should see: object, and colour where the prompt names one."""
    words = prompt.split()
    color = next((k for k, name in enumerate(COLORS) if name in words), None)
    return list(THINGS).index(find_object(prompt)), color


@torch.no_grad()
def pictures_of(trainer: Trainer) -> Tensor:
    """The object from eight azimuths at the default camera, averaged weights: [8, 3, 128, 128] in [0, 1]."""
    device = trainer.device
    background = torch.full((3,), BACKGROUND, device=device)
    with trainer.optimizer.ema_weights():
        cameras = turntable(trainer.config.camera, AZIMUTHS, device)
        return trainer.renderer.view(cameras, SIZE, SIZE, background=background, normals=False).rgb.permute(0, 3, 1, 2)


def assess(judge: Judge, pictures: Tensor, prompt: str) -> dict[str, float | None]:
    """Shares of the pictures that are right; None where the prompt says nothing about it."""
    found = verdicts(judge, pictures.float().cpu())
    thing, color = wanted(prompt)
    right = found.object == thing
    both = None if color is None else (right & (found.color == color)).float().mean().item()
    janus = None
    if list(THINGS.values())[thing].face:
        janus = (found.view[list(BEHIND)] == VIEWS.index("front")).float().mean().item()
    return {"object": right.float().mean().item(), "object_color": both, "janus": janus}


def make(prompt: str, seed: int, workspace: Path, device: str) -> dict:
    """One run of the command's own path in this process; returns its row, and keeps views.png in the workspace."""
    from dream_fast.engine.run import run

    shutil.rmtree(workspace, ignore_errors=True)
    typed = {"text": prompt, "seed": seed, "workspace": str(workspace), "fp16": True, "device": device}
    typed |= {"six_views": True, "eval_interval": 1000}  # no video and no pictures on the way: they change no result
    config = resolve(typed, "dream-mini", device)
    start = time.monotonic()
    run(config)
    seconds = time.monotonic() - start
    trainer = finished(config, workspace)
    pictures = pictures_of(trainer)
    strip = torch.cat(list(pictures), dim=2).permute(1, 2, 0)
    Image.fromarray(to_uint8(strip)).save(workspace / "views.png")
    scores = assess(load_judge(), pictures, prompt)
    return {"prompt": prompt, "seed": seed, **scores, "seconds": round(seconds, 1), "iters": config.run.iters}


def finished(config: Config, workspace: Path) -> Trainer:
    """The trainer of a finished run, loaded from its last checkpoint."""
    runtime: Runtime = choose_runtime(config)
    trainer = Trainer(config, runtime, config.run.seed)
    trainer.load(max(Workspace(workspace).checkpoints.glob("*.safetensors")))
    return trainer


def _mean(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return round(sum(values) / len(values), 4) if values else None


def summary(rows: list[dict]) -> dict[str, float | None]:
    return {
        "object": _mean(rows, "object"),
        "object_color": _mean(rows, "object_color"),
        "janus_rate": _mean(rows, "janus"),
        "runs": len(rows),
    }


def prior_scores(device: str) -> dict[str, float]:
    """dream-mini's own 2D samples: every object from front, side and back; the view counts for objects with a face."""
    from dream_fast.engine.guidance.loader import load_components
    from dream_fast.engine.prior.sample import sample_views

    components = load_components(MODEL_FOLDER, device, need_vae_decoder=True)
    prompts = [f"a {('red', 'blue')[k % 2]} {name}" for k, name in enumerate(THINGS)]
    images = sample_views(components, prompts, views=VIEWS[:3]).cpu()
    found = verdicts(load_judge(), images.flatten(0, 1))
    objects = found.object.view(-1, 3) == torch.tensor([wanted(prompt)[0] for prompt in prompts])[:, None]
    faces = torch.tensor([THINGS[find_object(prompt)].face for prompt in prompts])
    views = found.view.view(-1, 3)[faces] == torch.arange(3)
    return {
        "prior_object": round(objects.float().mean().item(), 4),
        "prior_view": round(views.float().mean().item(), 4),
    }


def contact_sheet(work: Path, prompts: tuple[str, ...], path: Path) -> None:
    """Four views of each prompt's first seed, two prompts a row in their order; the place of a missing run is white."""
    sheet = Image.new("RGB", (2 * 4 * SIZE + 8, -(-len(prompts) // 2) * SIZE), "white")
    for n, prompt in enumerate(prompts):
        file = work / _name(prompt, 0) / "views.png"
        if not file.exists():
            continue
        image = Image.open(file)
        for k in range(4):
            view = image.crop((2 * k * SIZE, 0, (2 * k + 1) * SIZE, SIZE))
            sheet.paste(view, ((n % 2) * (4 * SIZE + 8) + k * SIZE, n // 2 * SIZE))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _name(prompt: str, seed: int) -> str:
    return f"{prompt.replace(' ', '-')}-{seed}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench quality", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of quality.json and the contact sheet")
    parser.add_argument("--work", type=Path, default=Path("quality"), help="folder of the runs' workspaces")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", nargs="*", help="these instead of the fixed 32")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after so long; the rows tell")
    args = parser.parse_args(argv)
    held_out = () if args.prompts else HELD_OUT
    prompts = tuple(args.prompts or PROMPTS)
    start = time.monotonic()
    jobs = [(prompt, seed) for seed in range(args.seeds) for prompt in (*prompts, *held_out)]
    rows = []
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {
            pool.submit(_timed, start + args.seconds, prompt, seed, args.work / _name(prompt, seed), args.device)
            for prompt, seed in jobs
        }
        for job in as_completed(waiting):
            row = job.result()
            if row is not None:
                rows.append(row)
                print(json.dumps(row), flush=True)
    rows.sort(key=lambda row: jobs.index((row["prompt"], row["seed"])))
    fixed = [row for row in rows if row["prompt"] in prompts]
    others = [row for row in rows if row["prompt"] in held_out]
    record = {
        **summary(fixed),
        "held_out": summary(others),
        **prior_scores(args.device),
        "judge": json.loads((Path(__file__).parent / "judge" / "judge.json").read_text())["held_out"],
        "device": torch.cuda.get_device_name() if args.device == "cuda" else machine()["processor"],
        "settings": resolve({}, "dream-mini", args.device).to_dict(),
        "seconds": round(time.monotonic() - start, 1),
        "jobs": args.jobs,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    contact_sheet(args.work, prompts, args.out / "quality.png")
    print(json.dumps({k: v for k, v in record.items() if k not in ("rows", "settings")}, indent=1))
    return 0


def _timed(deadline: float, prompt: str, seed: int, workspace: Path, device: str) -> dict | None:
    return make(prompt, seed, workspace, device) if time.monotonic() < deadline else None
